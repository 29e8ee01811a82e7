# %% [markdown]
# # Your own model, your own text
#
# Everything works with any model that `transformers` can load or that you have in memory, and with any text. To show
# every step, this notebook makes both in a few seconds: a language of a few dozen words, and a small Llama that learns
# it. The language has one rule that no bigram can capture.

# %%
import copy
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bigram_circuits as bc
from bigram_circuits import analysis

# %% [markdown]
# ## A text
#
# *The cat near the dogs sleeps.* The verb agrees with the subject, not with the noun right before it. A bigram sees
# only that noun, and is wrong whenever the two differ in number.

# %%
nouns = ["cat", "dog", "bird", "girl", "farmer", "teacher"]
verbs = ["sleep", "sing", "eat", "run", "wait", "dream"]
adjectives = ["small", "old", "quiet", "clever"]
places = ["near", "behind", "beside"]
dice = random.Random(0)


def noun_phrase(plural):
    """A noun phrase in words, for example `the old cats`."""
    adjective = [dice.choice(adjectives)] if dice.random() < 0.4 else []
    return ["the", *adjective, dice.choice(nouns) + ("s" if plural else "")]


def sentence():
    """A sentence, for example `the cat near the dogs sleeps .`; its verb agrees with the first noun."""
    plural = dice.random() < 0.5
    place = [dice.choice(places), *noun_phrase(dice.random() < 0.5)] if dice.random() < 0.6 else []
    return " ".join([*noun_phrase(plural), *place, dice.choice(verbs) + ("" if plural else "s"), "."])


documents = [" ".join(sentence() for _ in range(30)) for _ in range(600)]
print(*documents[0].split(" . ")[:6], sep="\n")

# %% [markdown]
# ## A model
#
# A tokenizer with a token for every word, and a Llama of two blocks, trained with plain PyTorch. Copies are kept from
# early in its training.

# %%
words = sorted({word for document in documents for word in document.split()})
vocabulary = {word: place for place, word in enumerate(["<end>", *words])}
plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<end>")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(vocabulary), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
llama = LlamaForCausalLM(config)
ids = torch.tensor([vocabulary[word] for document in documents[:500] for word in document.split()])
optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
copies = {}
for step in range(300):
    if step in (20, 60, 120):
        copies[f"step {step}"] = copy.deepcopy(llama)
    starts = torch.randint(len(ids) - 64, (32, 1))
    batch = ids[starts + torch.arange(64)]
    loss = llama(batch, labels=batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"{loss.item():.2f} nats per token")

# %% [markdown]
# ## From here on, as with any model
#
# A model in memory is hooked as it is: its weights are shared, not copied, and `llama` stays a plain Hugging Face
# model. One that was saved is loaded by the name of its folder, and one from the hub by its name there. A list of
# documents is a corpus, as are text, JSONL and Parquet files, and datasets from the hub. Which documents are held out
# depends on their content, so it is the same each time.

# %%
model = bc.load_model(llama, tokenizer=tokenizer)
corpus = bc.load_corpus(documents, tokenizer=model.tokenizer, context_length=64)
target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
found = bc.find_subnetwork(model, target, corpus, bc.SparsifyConfig(sparsity_weight=2.0))
found

# %%
bc.evaluate(model, found.subnetwork, target, corpus.held_out)

# %% [markdown]
# The subnetwork follows the table closely, with less than one weight in a hundred. But look at the controls: in so
# small a language, embedding and unembedding alone (`empty`) come close, and the model without the subnetwork does
# nearly as well. It is *sufficient* for bigrams, and hardly *necessary*. In the reference model it is
# [both](03-is-it-real.ipynb).
#
# ## The rule
#
# How does a sentence go on after a singular subject and a plural noun, and the other way round?

# %%
prompts = ["the cat near the dogs", "the cats near the dog"]
analysis.next_tokens(model, found, prompts=prompts, top_k=6).only("full", "subnetwork").plot()

# %% [markdown]
# The full model (left) looks back at the subject: its verbs agree with *cat*, then with *cats*. The subnetwork uses the
# last word alone, as a bigram does. It expects another place to follow, and verbs that agree with the wrong noun.
#
# ## Over training
#
# When does the model become more than a bigram? The copies are measured like checkpoints of a model on the hub: how far
# is what they say from the bigram table, and how much do they lose on the actual next word?

# %%
measure = analysis.faithfulness_to(None, target, corpus)
over = analysis.trajectory({**copies, "step 300": llama}, measure, tokenizer=tokenizer)
over.to_dataframe()[["checkpoint", "kl", "surprisal_correlation", "mean_surprisal"]]

# %% [markdown]
# At first it comes closer to the table; then its loss goes on falling while it moves away from it again: it has learned
# the rule.
#
# ## Your model
#
# Change these lines; everything else stays the same. `revision="step1000"` loads a training checkpoint of Pythia;
# which architectures can be masked is [listed](../docs/own-model.md), and so is what a [target of your
# own](../docs/own-target.md) needs.
#
# ```python
# model = bc.load_model("EleutherAI/pythia-70m")                        # or "meta-llama/Llama-3.2-1B", or a folder
# model = bc.load_model(yours, tokenizer=tokenizer)                     # or a model in memory
# corpus = bc.load_corpus("path/to/texts", tokenizer=model.tokenizer)   # or "name:configuration" of a dataset
# found = bc.find_subnetwork(model, target, corpus, bc.SparsifyConfig(), run_dir="runs/pythia-70m")
# ```
