# %% [markdown]
# # Find a bigram subnetwork
#
# A language model has millions of weights. How many of them does it take to do the simplest thing a language model
# can do: predict the next token from the current one alone? Chang and Bergen
# ([2025](https://arxiv.org/abs/2504.15471)) found that a few per cent suffice, most of them in the first MLP. Here we
# find such a *bigram subnetwork* in a small model that comes with the package.

# %%
import bigram_circuits as bc
from bigram_circuits import analysis

# %% [markdown]
# ## A model, a text, and its bigrams
#
# The reference model has four blocks of Pythia's architecture, and was trained on Python's own documentation, which
# is installed with Python. Part of the documents is held out: nothing below is learned or counted from them.

# %%
model = bc.load_model("reference")
corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
print(f"{corpus.train.size:,} tokens to learn from, {corpus.held_out.size:,} held out")

# %% [markdown]
# The target is a table of counts: what comes after each token, and how often.

# %%
words = ["The", " of", " is", "import", "("]
analysis.next_tokens(model, target=target, prompts=words).only("target", "full").plot()

# %% [markdown]
# Given a single token, the full model (right) predicts much the same as the table (left). In a text it has more
# context, and uses it.
#
# ## Learn which weights it takes
#
# Every attention and MLP weight is multiplied by a gate between 0 and 1. The gates follow the gradient of the
# cross-entropy with the table, plus a penalty on how many are open, and harden as they learn: in the end each is open
# or closed. The model's weights do not change. (Here beta, the steepness of the gates, grows by 5% per step. The
# default, 3%, takes longer, and finds fewer weights that do as well: the numbers below are not those of the README.)

# %%
recipe = bc.SparsifyConfig(beta_growth=1.05)
found = bc.find_subnetwork(model, target, corpus, recipe, run_dir="runs/first")
found

# %%
found.plot("fraction")

# %%
first_mlp = found.subnetwork.by_component()[0, "mlp"]
print(f"{first_mlp.kept / found.subnetwork.kept:.0%} of the kept weights are in the first MLP")

# %% [markdown]
# ## What it predicts
#
# The table, the subnetwork, and a random one with as many weights in every matrix:

# %%
analysis.next_tokens(model, found, target, words).only("target", "subnetwork", "random").plot()

# %% [markdown]
# And on held-out documents, against as many weights chosen in other ways. *r* is the correlation between the
# subnetwork's and the table's surprisal of each next token; 1 would be perfect agreement.

# %%
bc.evaluate(model, found.subnetwork, target, corpus.held_out[::4], seeds=2)

# %% [markdown]
# The subnetwork follows the table far more closely than the full model does (which uses more than one token, so its
# own loss is lower), and than as many large or random weights. Dropping it costs the full model much; dropping as many
# random weights costs next to nothing. [Is it real?](03-is-it-real.ipynb) looks further into this.
#
# The run is on disk. `bc.load_run` reads it; calling `find_subnetwork` again returns it, or continues it if it was
# interrupted; `bc.write_report` writes its page. `bc.study` does all of this notebook and more in one call.

# %%
bc.load_run("runs/first")

# %% [markdown]
# ## Your model
#
# Change these lines; everything else stays the same. `device="cuda"` for `load_model` puts it on a GPU, and
# `bc.SparsifyConfig.paper()` is the published recipe. The words above are single tokens of the reference model:
# choose some of your model's.
#
# ```python
# model = bc.load_model("EleutherAI/pythia-70m")                        # or "meta-llama/Llama-3.2-1B", or a folder
# corpus = bc.load_corpus("path/to/texts", tokenizer=model.tokenizer)   # text, JSONL, Parquet, or a dataset's name
# recipe = bc.SparsifyConfig()
# found = bc.find_subnetwork(model, target, corpus, recipe, run_dir="runs/pythia-70m")
# ```
