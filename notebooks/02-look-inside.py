# %% [markdown]
# # Look inside it
#
# A bigram subnetwork turns the current token into a prediction of the next one. Where in the model does that happen,
# and does the whole model do it there too? Every analysis below measures four conditions on the same held-out text:
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
curves = analysis.layer_by_layer(model, corpus, bigram, target, tokens=6_000, fit_tokens=12_000)
curves["logit_lens"].plot("surprisal_correlation")

# %% [markdown]
# The first block makes the step, in the whole model and in the subnetwork alike: before it there is no trace of
# bigrams, after it the predictions follow them closely. From there the two part. The subnetwork stays with the
# bigram; the whole model moves on to predictions that use more than one token. Random weights never get there.
#
# The same, token by token. Each cell shows the most likely next token after that block, coloured by the probability
# of the token that comes next in the prompt.

# %%
analysis.logit_lens(model, "Return the value of the", bigram).only("full", "subnetwork").plot("probability")

# %% [markdown]
# The affine (tuned) lens first sends each layer's residual stream through a map that was fitted to give the last
# layer's.

# %%
curves["affine_lens"].plot("surprisal_correlation")

# %% [markdown]
# With a map of its own it finds bigrams in the embedding already: a map can hold a bigram table. So it says what
# *could* be read off a layer, and the logit lens what the model's own unembedding does read.
#
# ## Where does the residual stream point?
#
# At first it points at the embedding of the current token, and nowhere else.

# %%
curves["cosine"].plot("current_embedding")

# %% [markdown]
# After the first block it points at the unembedding of a next token: here, the bigram table's most likely one.
# Current-token space turns into next-token space in one step.

# %%
curves["cosine"].plot("target_unembedding")

# %% [markdown]
# ## A rotation
#
# For each layer, the affine map that best takes its residual stream to the last layer's. The eigenvalues of that map
# have angles; their median says by how much the layer still has to turn. At the last layer nothing is left to turn.

# %%
curves["rotations"].plot("output_angle")

# %% [markdown]
# Nearly all of the turning is done by the first block, in the whole model and in the subnetwork. Random weights turn
# little.

# %% [markdown]
# ## The same geometry?
#
# Linear CKA compares the geometry of two layers' activations: 1 if they differ by a rotation and a scale only. The
# third panel holds the whole model (rows) against the subnetwork (columns).

# %%
bc.covariance_similarity(model, corpus, bigram, max_tokens=4_096).plot()

# %% [markdown]
# In the whole model every block changes the geometry. The later layers of the subnetwork look alike: little is added
# to them any more. The two are most alike at the beginning.
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
