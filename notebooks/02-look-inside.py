# %% [markdown]
# # Look inside it
#
# A bigram subnetwork turns the current token into a prediction of the next one. Where in the model does that happen,
# and does the full model do it there too? Every analysis below measures four conditions on the same held-out text:
# the `full` model, the `subnetwork`, its `complement` (the model without it), and as many `random` weights.

# %%
import bigram_circuits as bc
from bigram_circuits import analysis

model = bc.load_model("reference")
corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
recipe = bc.SparsifyConfig(beta_growth=1.05)
found = bc.find_subnetwork(model, target, corpus, recipe, run_dir="runs/first")  # read, if it is there already
bigram = found.subnetwork
bigram

# %% [markdown]
# ## What would each layer predict?
#
# The logit lens reads the residual stream after each block as if the model stopped there. The *r* below is between
# the surprisals of these predictions and those of the bigram table.

# %%
curves = analysis.layer_by_layer(model, bigram, target, corpus, tokens=6_000, fit_tokens=12_000)
curves["logit_lens"].plot("surprisal_correlation")

# %% [markdown]
# The first block makes the step, both in the full model and in the subnetwork: before it there is no trace of bigrams,
# after it the predictions follow them closely. Then the two diverge. The subnetwork stays with the bigram; the full
# model moves on to predictions that use more than one token. Random weights never get there.
#
# The same, token by token. Each cell shows the most likely next token after that block, coloured by the probability
# of the token that comes next in the prompt.

# %%
analysis.logit_lens(model, bigram, text="Return the value of the").only("full", "subnetwork").plot("probability")

# %% [markdown]
# The affine (tuned) lens first sends each layer's residual stream through an affine map that was fitted to predict the
# last layer's.

# %%
curves["affine_lens"].plot("surprisal_correlation")

# %% [markdown]
# It finds bigrams in the embedding already: a map can hold a bigram table. So the affine lens shows what *could* be
# read off a layer, and the logit lens what the model's own unembedding does read.
#
# ## Where does the residual stream point?
#
# At first it points at the embedding of the current token, and nowhere else.

# %%
curves["cosine"].plot("current_embedding")

# %% [markdown]
# After the first block it points at the unembedding of a next token: here, the bigram table's most likely one.
# One block maps current-token space to next-token space.

# %%
curves["cosine"].plot("target_unembedding")

# %% [markdown]
# ## A rotation
#
# For each layer, the affine map that best takes its residual stream to the last layer's. The eigenvalues of that map
# have angles; their median says how much rotation is still to come. At the last layer none is left.

# %%
curves["rotations"].plot("output_angle")

# %% [markdown]
# The first block does nearly all of the rotation, in the full model and in the subnetwork. Random weights
# rotate little.

# %% [markdown]
# ## The same geometry?
#
# Linear CKA compares the geometry of two layers' activations: 1 if they differ by a rotation and a scale only. The
# third panel compares the full model (rows) with the subnetwork (columns).

# %%
bc.covariance_similarity(model, bigram, corpus, max_tokens=4_096).plot()

# %% [markdown]
# In the full model every block changes the geometry. The later layers of the subnetwork are alike: little is added
# there. The two are most similar in the first layers.
#
# ## Your model
#
# Change these lines; everything else stays the same. `tokens` and `fit_tokens` say how much text is used: to map a
# residual stream of width 2,048, give `fit_tokens` at least ten times that. `bc.analyze(model, bigram, target,
# corpus)` does all of this and more in one go.
#
# ```python
# model = bc.load_model("EleutherAI/pythia-70m")                        # or "meta-llama/Llama-3.2-1B", or a folder
# corpus = bc.load_corpus("path/to/texts", tokenizer=model.tokenizer)
# recipe = bc.SparsifyConfig()
# found = bc.find_subnetwork(model, target, corpus, recipe, run_dir="runs/pythia-70m")
# ```
