# %% [markdown]
# # The paper's published masks
#
# Chang and Bergen released the bigram subnetworks they found in GPT-2 and Pythia. They are pickles: a
# dictionary of boolean arrays by Hugging Face parameter name, with the name of the model. This notebook reads such a
# file.
#
# So that it runs anywhere, without a download, the file it reads is **not one of theirs**. It is a mask of the
# reference model, found below with a quick recipe and written in their format. The lines for the real ones are at the
# end.

# %%
import pickle
import tempfile

import numpy as np
from transformers import AutoModelForCausalLM

import bigram_circuits as bc

model = bc.load_model("reference")
corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
recipe = bc.SparsifyConfig(beta_growth=1.05)
found = bc.find_subnetwork(model, target, corpus, recipe, run_dir="runs/first")  # read, if it is there already

# %% [markdown]
# ## A file in the released format
#
# A checkpoint names and shapes its weights in its own way: here queries, keys and values of all heads are one matrix.

# %%
masks = {name: mask.numpy() for name, mask in found.subnetwork.to_huggingface(model).items()}
with open("runs/subnetwork_dict_lambda1e1.pickle", "wb") as file:
    pickle.dump({**masks, "orig_model_name": "reference"}, file)
{name: mask.shape for name, mask in list(masks.items())[:4]}

# %% [markdown]
# ## Read it
#
# The names are matched with the model's own weights by tracing, whatever the architecture, and nothing is lost.

# %%
published = bc.import_published("runs/subnetwork_dict_lambda1e1.pickle", model)
assert published == found.subnetwork
published

# %% [markdown]
# A pickle can hold a program, and loading it the usual way runs it. This reader accepts boolean arrays, strings and a
# dictionary, and refuses anything else before it does anything:


# %%
class Surprise:
    """When unpickled the usual way, prints; it could do anything."""

    def __reduce__(self):
        return print, ("this ran while a file was read",)


with open("runs/surprise.pickle", "wb") as file:
    pickle.dump({"a.weight": np.ones((2, 2), dtype=bool), "b.weight": Surprise()}, file)
try:
    bc.import_published("runs/surprise.pickle", model)
except ValueError as error:
    print(error)

# %% [markdown]
# ## Measure it
#
# An imported mask is a subnetwork like any other.

# %%
bc.evaluate(model, published, target, corpus.held_out[::8], seeds=1)

# %% [markdown]
# And it can be exported as a model of its own, which plain `transformers` loads:

# %%
with tempfile.TemporaryDirectory() as folder:
    bc.export_huggingface(model, published, folder)
    alone = AutoModelForCausalLM.from_pretrained(folder)
print(f"{type(alone).__name__}: {sum((p == 0).sum().item() for p in alone.parameters()):,} weights are 0")

# %% [markdown]
# ## Your model
#
# The real masks, of any released model. The paper reports r = 0.961 for Pythia 70M with about 15% of the weights, and
# 0.737 for the full model; the numbers depend on the text.
#
# ```python
# model = bc.load_model("EleutherAI/pythia-70m")                        # or "gpt2"
# published = bc.load_published("EleutherAI/pythia-70m", model=model)   # the sparsest; sparsity=1 for another lambda
# corpus = bc.load_corpus("path/to/texts", tokenizer=model.tokenizer)
# target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
# bc.evaluate(model, published, target, corpus.held_out)
# ```
#
# There are no published masks for Llama; `bc.find_subnetwork` finds one. For models that have them, `bc.overlap(
# published, found.subnetwork)` measures how far a published mask and one of yours agree.
