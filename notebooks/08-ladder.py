# %% [markdown]
# # The n-gram ladder
#
# A model knows which tokens are frequent (unigrams), which follow one another (bigrams), which follow two others
# (trigrams), and that what was repeated once will be repeated again (induction). Which weights are enough for each of
# these, and how much does each add to the one before?

# %%
import pandas as pd

import bigram_circuits as bc

model = bc.load_model("reference")
corpus = bc.load_corpus("reference", tokenizer=model.tokenizer, max_tokens=60_000)

# %% [markdown]
# ## Six masks
#
# One for each rung, *free*: searched for among all weights. And two *nested* ones: the bigram's within the trigram's
# mask, and the unigram's within that. Each is measured against its own target, and all on the same held-out text and
# on random tokens that repeat. (Few and small steps, and little text, to save time, which leaves masks large: by
# default `find_ladder` takes several minutes.)

# %%
recipe = bc.SparsifyConfig(beta_growth=1.2, max_steps=36, batch_size=4, retries=0)
ladder = bc.find_ladder(model, corpus, recipe, prompts=40, period=16, run_dir="runs/ladder")
ladder

# %% [markdown]
# `loss` is that at the next token of held-out text, `repeated` that at repeated random tokens, where n-grams do not
# help. The cautions are due to the few steps.
#
# ## What each step adds
#
# The loss of the rung before, minus its own, with a paired 95% interval. The steps from the empty to the full model add
# up to all that the model gains.

# %%
for step in ladder.steps:
    low, high = step.interval
    print(f"{step.ladder:<7} {step.before:>22} -> {step.name:<22} {step.gain:+.3f} nats ({low:+.3f} to {high:+.3f})")

# %%
ladder.plot("mean_surprisal")

# %% [markdown]
# Most of what the model gains is in the first two rungs. The trigram adds less: a table of so little text has seen few of
# the contexts that it is asked about. The last step is what the model knows beyond such tables.
#
# ## Induction
#
# On repeated random tokens only looking back helps.

# %%
ladder.plot("repeated_surprisal")

# %% [markdown]
# ## Which weights do they share?
#
# Against as many weights drawn at random in every matrix; p is exact, with Holm's correction. Pairs of which one was
# searched within the other are left out: their overlap is given and says nothing.

# %%
pd.DataFrame(
    [
        {"pair": f"{one.first}, {one.second}", "shared": one.shared, "times chance": one.ratio, "log10 p": one.log10_p}
        for one in ladder.overlaps
        if not one.is_given
    ]
).round(1)

# %% [markdown]
# ## The page
#
# All of it on one page, with where each mask's weights are. The masks themselves are runs like any other.

# %%
bc.write_ladder(ladder, "ladder.html")
bigram = bc.load_run("runs/ladder/bigram")
bigram.subnetwork

# %% [markdown]
# That a nested mask does as well as a free one of its size says that the smaller n-gram *can* be read out of the larger
# one's weights, not that the model does so.
#
# ## Your model
#
# Change these lines; everything else stays the same. `bigram-circuits ladder` does the same on the command line.
#
# ```python
# model = bc.load_model("EleutherAI/pythia-70m")                        # or "meta-llama/Llama-3.2-1B", or a folder
# corpus = bc.load_corpus("path/to/texts", tokenizer=model.tokenizer)
# recipe = bc.SparsifyConfig()
# ladder = bc.find_ladder(model, corpus, recipe, run_dir="runs/pythia-70m-ladder")
# ```
