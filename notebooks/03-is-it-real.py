# %% [markdown]
# # Is it real?
#
# Choosing weights by gradient is a way of fitting, and a mask can be made to do things that the model never does.
# Four checks: controls of the same size; another seed; a mask that never saw a bigram; and the rest of the model
# taken away bit by bit.

# %%
import bigram_circuits as bc
from bigram_circuits import analysis

model = bc.load_model("reference")
corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
recipe = bc.SparsifyConfig(beta_growth=1.05)
found = bc.find_subnetwork(model, target, corpus, recipe, run_dir="runs/first")  # read, if it is there already
bigram = found.subnetwork.named("bigram, seed 0")

# %% [markdown]
# ## Controls
#
# A number alone means little, so `evaluate` puts controls beside it, on the same held-out text: the whole model, no
# maskable weight at all, the whole model without the subnetwork, as many of the largest weights in every matrix, and
# as many random ones.

# %%
evaluation = bc.evaluate(model, bigram, target, corpus.held_out[::4], seeds=2)
evaluation

# %%
evaluation.plot()

# %% [markdown]
# Is it *necessary*, too? `necessity` is the rise of the model's own loss when the subnetwork is taken out of it, and
# when as many random weights are.

# %%
without_it, without_random = evaluation.necessity
print(f"without the subnetwork: +{without_it:.2f} nats; without as many random weights: +{without_random:.2f} nats")

# %% [markdown]
# ## Another seed, and a mask that never saw a bigram
#
# Two more masks of the same size. One is found like the first, from text in another order. The other is asked for
# something else altogether: the whole model's own predictions (optimal pruning). Nothing tells it about bigrams.
# (Fewer and smaller steps than above, to save time.)

# %%
quick = {"target_fraction": bigram.fraction, "beta_growth": 1.1, "max_steps": 70, "batch_size": 8}
again = bc.find_subnetwork(model, target, corpus, bc.SparsifyConfig(seed=1, **quick)).subnetwork
itself = bc.ModelTarget(model)
pruned = bc.find_subnetwork(model, itself, corpus, bc.SparsifyConfig(seed=2, **quick)).subnetwork
random = bigram.random_like(seed=0)
masks = {"bigram, seed 0": bigram, "bigram, seed 1": again, "optimal pruning": pruned, "random": random}

# %% [markdown]
# How many weights do they share, as a multiple of what chance would give? (Chance keeps the number of weights in
# every matrix, so that it knows about the first MLP. The scale is log2: 1 is twice as many, 2 four times.)

# %%
analysis.overlaps(masks).plot("log2_ratio")

# %%
bc.overlap(pruned.named("optimal pruning"), bigram, by="component").to_dataframe()[
    ["component", "intersection", "expected", "share_of_a_in_b", "z"]
].round(2)

# %% [markdown]
# The two seeds agree on many weights, far more than chance would have them share, though not on all: weights can
# stand in for each other. And the mask that was only asked to keep the model's predictions picks many of the same
# weights, above all in the first MLP: a model that has to get by with few weights keeps its bigrams.
# `share_of_a_in_b` is the share of its weights that the bigram subnetwork has too.
#
# ## Take the rest away bit by bit
#
# If the subnetwork carries bigrams inside the whole model, then they should stay as more and more of everything else
# is removed. For a random mask of the same size they should not.

# %%
analysis.stochastic_ablation(
    model, bigram, target, corpus.held_out[::16], shares=(0, 0.25, 0.5, 0.75, 0.9, 1), draws=1
).plot("surprisal_correlation")

# %% [markdown]
# Around the subnetwork, the more is taken away, the more what is left looks like a bigram table. Around random
# weights there is soon nothing.
#
# What no check here shows: that the model computes bigrams *only* so. The intervals cover the choice of held-out
# text, not the choice of seed or training text.
#
# ## Your model
#
# Change these lines; everything else stays the same. `corpus.held_out` instead of `corpus.held_out[::4]` uses all of
# the text.
#
# ```python
# model = bc.load_model("EleutherAI/pythia-70m")                        # or "meta-llama/Llama-3.2-1B", or a folder
# corpus = bc.load_corpus("path/to/texts", tokenizer=model.tokenizer)
# recipe = bc.SparsifyConfig()
# found = bc.find_subnetwork(model, target, corpus, recipe, run_dir="runs/pythia-70m")
# quick = {"target_fraction": bigram.fraction}                          # the default recipe, at the same size
# ```
