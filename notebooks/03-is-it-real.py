# %% [markdown]
# # Is it real?
#
# Choosing weights by gradient is a form of fitting, and a mask can create behaviour that the model never shows. Five
# checks: controls of the same size; another seed; a mask that never saw a bigram; masks on weights that learned
# nothing; and ablating the rest of the model step by step.

# %%
import pandas as pd

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
# A number alone means little, so `evaluate` measures controls on the same held-out text: the full model, no maskable
# weight at all, the full model without the subnetwork, as many of the largest weights in every matrix, and as many
# random ones.

# %%
evaluation = bc.evaluate(model, bigram, target, corpus.held_out[::4], seeds=2)
evaluation

# %%
evaluation.plot()

# %% [markdown]
# Is it *necessary*, too? `necessity` is the rise of the model's own loss when the subnetwork is dropped, and when as
# many random weights are.

# %%
without_it, without_random = evaluation.necessity
print(f"without the subnetwork: +{without_it:.2f} nats; without as many random weights: +{without_random:.2f} nats")

# %% [markdown]
# ## Another seed, and a mask that never saw a bigram
#
# Two more masks of the same size. One is found like the first, from text in another order. The other has
# another target: the full model's own predictions (optimal pruning). It never sees a bigram.
# (Fewer and smaller steps than above, to save time.)

# %%
quick = {"target_fraction": bigram.fraction, "beta_growth": 1.1, "max_steps": 70, "batch_size": 8}
again = bc.find_subnetwork(model, target, corpus, bc.SparsifyConfig(seed=1, **quick)).subnetwork
itself = bc.ModelTarget(model)
pruned = bc.find_subnetwork(model, itself, corpus, bc.SparsifyConfig(seed=2, **quick)).subnetwork
random = bigram.random_like(seed=0)
masks = {"bigram, seed 0": bigram, "bigram, seed 1": again, "optimal pruning": pruned, "random": random}

# %% [markdown]
# How many weights do they share, as a multiple of what chance would give? (The null keeps the number of weights in
# every matrix, so it accounts for the first MLP. The scale is log2: 1 is twice as many, 2 four times.)

# %%
analysis.overlaps(masks).plot("log2_ratio")

# %%
bc.overlap(pruned.named("optimal pruning"), bigram, by="component").to_dataframe()[
    ["component", "intersection", "expected", "share_of_a_in_b", "z"]
].round(2)

# %% [markdown]
# The two seeds agree on many weights, far more than by chance, though not on all: some weights can replace each other.
# And the mask whose target is the model's own predictions keeps many of the same weights, above all in the first MLP: a
# model reduced to few weights keeps its bigrams. `share_of_a_in_b` is the share of its weights that the bigram
# subnetwork keeps too.
#
# ## Could untrained weights do it?
#
# A mask of many bits can hold a bigram table whatever the weights are. Can this one?

# %%
bc.could_mask_hold_it(bigram, target, evaluation.subnetwork.kl).says

# %% [markdown]
# It can, so that the mask exists shows nothing yet. What shows something is how good a mask of *the same size* is on
# weights that did not learn: on blocks that were re-initialised, and on blocks whose weights were shuffled within every
# matrix. (The same quick recipe for all three.)

# %%
others = {"re-initialised blocks": bc.with_random_blocks(model), "shuffled blocks": bc.with_shuffled_blocks(model)}
rows = {"trained": bc.evaluate(model, again, target, corpus.held_out[::8], controls=False).subnetwork}
for name, other in others.items():
    mask = bc.find_subnetwork(other, target, corpus, bc.SparsifyConfig(seed=1, **quick)).subnetwork
    rows[name] = bc.evaluate(other, mask, target, corpus.held_out[::8], controls=False).subnetwork
pd.DataFrame(
    [{"weights": name, "r": one.surprisal_correlation, "KL": one.kl, "kept": one.kept} for name, one in rows.items()]
).round(3)

# %% [markdown]
# All three predict bigrams to some degree, between embeddings that are trained in each case. The trained blocks are
# ahead of both others, and that gap is what their training adds. `bc.study(..., falsify=True)` compares whole curves,
# with intervals and seeds, and a nonsense target.
#
# ## Ablate the rest step by step
#
# If the subnetwork carries bigrams inside the full model, they should remain as more and more of everything else is
# dropped. With a random mask of the same size they should not.

# %%
analysis.stochastic_ablation(
    model, bigram, target, corpus.held_out[::16], shares=(0, 0.25, 0.5, 0.75, 0.9, 1), draws=1
).plot("surprisal_correlation")

# %% [markdown]
# The more is dropped around the subnetwork, the more the rest resembles a bigram table. Around random weights there is
# soon nothing left.
#
# No check here shows that the model computes bigrams *only* in this way. The intervals cover the choice of held-out
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
