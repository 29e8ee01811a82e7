# %% [markdown]
# # The circuit, from token to token
#
# A bigram subnetwork turns ` of` into ` the`. How? This notebook walks that way from token to token, neuron by neuron.
# A walk like that makes a good story, so the second half checks it: neurons are removed, and what then happens is
# compared with what the picture said.

# %%
import numpy as np
import pandas as pd
import torch

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
# ## One bigram
#
# Given the single token ` of`, what does the subnetwork predict, and along which paths? Each row is a path from an
# input to the logit of the predicted token, and how much it adds to that logit. Expect many paths of similar strength,
# not a few strong ones.

# %%
of = bc.explain(model, bigram, " of", nodes=100)
of

# %% [markdown]
# Most of the listed paths lead through one neuron of the first MLP, as they should in a bigram subnetwork. And the
# sentence above the table warns: what is left out has most of all paths' strength. There are thousands of weak paths.
#
# The first row is no path from ` of`: biases write the same after every token. Softmax ignores what is added
# to all logits alike, so a single logit has a part that says nothing about the prediction. (`bc.explain(model, bigram,
# " of", wrong=" a")` explains the difference of two logits, which has no such part.)
#
# The same as a picture. Orange raises the logit, blue lowers it.

# %%
of.plot()

# %% [markdown]
# `to_html` writes a page on which the circuit can be explored: a column for the token, one for each layer, one for the
# answer; click on a neuron to see what drives it and what it writes to. It is one file that works offline. Open
# `of.html` in a browser.

# %%
page = of.to_html("of.html")
print(f"{len(of.nodes)} nodes, {len(of.edges)} edges, {len(page) / 1e3:.0f} kB")

# %% [markdown]
# ## It adds up
#
# With attention patterns, the scales of norms and the slopes of activation functions frozen at their values on this
# prompt, the subnetwork is linear. So the logit is a sum, over *terms* (what every embedding, head, neuron and bias
# writes to it by itself) and over *paths*; and the flow of every node is the sum over the *edges* into it. Each pair of
# numbers below should agree.

# %%
print(f"the logit: {of.value:.4f}")
print(f"the sum of {len(of.terms):,} terms: {sum(of.terms.values()):.4f}")
listed = sum(path.value for path in of.paths)
print(
    f"{len(of.paths)} listed paths and what is left out: {listed:.4f} + {of.left_out:.4f} = {listed + of.left_out:.4f}"
)
neurons = sorted((node for node in of.nodes if node.kind == "neuron"), key=lambda node: -abs(node.flow))
for node in neurons[:3]:
    into = sum(edge.flow for edge in of.edges if edge.target == node.key)
    print(
        f"{node.label}: edges into it {into:.4f}, from what is not listed {node.unseen:.4f}; its flow {node.flow:.4f}"
    )

# %% [markdown]
# This is arithmetic: it would also be true of random weights. It says what is added up, not yet what matters.
#
# ## What the strongest neurons do
#
# For each, `adds` is what it adds to the logit by itself, and `flow` what it adds along all paths, also through later
# neurons. Then the tokens that drive it most when they come alone, and those whose logits it raises most. Do they make
# sense for what follows ` of`?


# %%
def tokens(pairs):
    """The first few tokens, in quotes."""
    return " ".join(repr(token) for token, _ in pairs[:5])


pd.DataFrame(
    {
        "neuron": node.label,
        "adds": round(node.direct, 2),
        "flow": round(node.flow, 2),
        "driven by": tokens(of.units[node.label].drives),
        "raises": tokens(of.units[node.label].promotes),
    }
    for node in neurons[:8]
)

# %% [markdown]
# Some are easy to read: driven by prepositions, or raising articles. Others are not, and no neuron is for this one
# bigram alone. Adding and flowing are much the same here: most of what these neurons write is read by the unembedding
# itself, without a detour.
#
# ## The check: remove them
#
# Does it matter to the prediction if such a neuron is gone? We drop the ten strongest of the picture from the
# subnetwork, one at a time and then all together, and for comparison ten others that also add something, drawn at
# random. `said` is what the picture says that the neuron adds by itself; `falls` by how much the logit of ` the` falls
# without it, and `probability` likewise. If the picture is any good, the ten should matter, the random ones should not,
# and `falls` should be near `said`.

# %%
answer = model.tokenizer(of.predictions[0][0], add_special_tokens=False)["input_ids"]
prompt = torch.tensor([model.tokenizer(" of", add_special_tokens=False)["input_ids"]])


def without(labels):
    """Logit and probability of the answer in the subnetwork without these neurons."""
    rest = bigram
    for label in labels:
        layer, index = label[1:].split("N")
        rest = rest.drop_neurons(int(layer), [int(index)])
    with torch.no_grad(), bc.masked(model, rest):
        logits = model(prompt)[0, -1]
    return np.array([float(logits[answer[0]]), float(logits.softmax(-1)[answer[0]])])


strongest = [node.label for node in neurons[:10]]
others = [label for label in of.terms if "N" in label and label not in strongest]
random = np.random.default_rng(0).choice(others, 10, replace=False).tolist()
rows, whole = [], without([])
for name, group in (("strongest", strongest), ("random", random)):
    for removed in [*([label] for label in group), group]:
        fall = whole - without(removed)
        which = removed[0] if len(removed) == 1 else f"all ten {name}"
        rows.append((which, sum(of.terms[label] for label in removed), *fall))
checked = pd.DataFrame(rows, columns=["removed", "said", "falls", "probability"]).set_index("removed")
checked.round(3)

# %% [markdown]
# Three things to see.
#
# - The picture finds the neurons that matter: together, the ten take away more than half of the probability that ` the`
#   had; ten random ones take away next to nothing.
# - It overstates how much each matters. Take one away, and the logit falls by less than what it added, because the rest
#   adapts: the norm rescales what remains, and later neurons read a changed residual stream. Of one of the ten the
#   picture is plainly wrong: without it, the logit does not fall.
# - One at a time is not the same as together. The falls of the ten one by one add up to less than the fall without all
#   of them, since neurons stand in for each other. (And a logit is not a probability: where a neuron raises other
#   tokens too, the probability of ` the` may even rise without it.)
#
# ## Over many tokens
#
# Ten neurons after one token are an anecdote. `predicted_effects` does the same for many neurons after each of the 24
# most frequent tokens, and always for the logit of the token that is predicted. Each point is a neuron after a token;
# on the dotted line, the removal does just what the picture says.

# %%
predicted = analysis.predicted_effects(model, bigram, corpus, tokens=24, neurons=100)
predicted.plot("direct")

# %%
for way in ("direct", "flow"):
    fit = predicted.notes[way]
    (r_low, r_high), (low, high) = fit["r_interval"], fit["slope_interval"]
    print(
        f"{way:<6}  r {fit['r']:.2f} ({r_low:.2f} to {r_high:.2f}), slope {fit['slope']:.2f} ({low:.2f} to {high:.2f})"
    )

# %% [markdown]
# So the picture says fairly well *which* neurons matter (r), and too much about *how much* (slope below 1): removal
# does less than the frozen sum says, because other parts and the norm adapt. Counting what flows along later paths as
# well makes the sizes worse here, for it relies on more that is frozen.
#
# What this does not show: that the subnetwork works as the picture tells it. It was tested by removing one neuron at a
# time, not by any other change, and not for single paths.
#
# ## How many neurons does it take?
#
# Rows are neurons, columns tokens with what is predicted after them; similar ones stand side by side. If there were a
# neuron for each bigram, every row would have one cell. Expect neurons that serve several tokens, and tokens that use
# several neurons.

# %%
analysis.neuron_map(model, bigram, corpus, tokens=32, neurons=24).plot()

# %% [markdown]
# A block of neurons serves nearly every token that ` the` follows, whatever the token; others are there for one or two
# tokens alone. And this is only a small part of all neurons. In a number: through how few neurons does half of all that
# flows go, after an average token? For the subnetwork, the full model, its complement, and as many random weights.

# %%
used = analysis.neurons_used(model, bigram, corpus, tokens=32)
used.to_dataframe()[["condition", "for_half", "for_half_low", "for_half_high", "for_90_percent"]].round(0)

# %% [markdown]
# Some two hundred neurons for half of the flow (and more than a thousand for 90%): far fewer than in random weights,
# but somewhat more than in the full model. The circuit is distributed. A drawing with a dozen boxes, like that on the
# page, is its strongest part and not all of it.
#
# ## A choice as a direction
#
# Why ` the` and not ` a`? The difference of two logits is an *observable*. Pulled back through the first MLP it becomes
# a single direction in the space of the embeddings (Dunefsky and Cohan 2023). Tokens whose embeddings point along it
# should prefer ` the`, those that point against it ` a`.

# %%
choice = bc.observable(model, (" the", " a"))
direction = analysis.pulled_back(model, choice, bigram, corpus.held_out[:8], through="L0.mlp")
direction

# %% [markdown]
# The direction was made from slopes, averaged over a text. Here is what the subnetwork really does after every token of
# the vocabulary, each alone:

# %%
every = torch.arange(model.cfg.d_vocab)[:, None]
with torch.no_grad(), bc.masked(model, bigram):
    real = choice.value(model(every)[:, -1]).numpy()
order = np.argsort(-direction.cosines)
r = np.corrcoef(direction.cosines, real)[0, 1]
print(f"r of the cosine with the real difference, over {len(real):,} tokens: {r:.2f}")
print(f"mean difference after the ten most exciting tokens: {real[order[:10]].mean():+.2f}")
print(f"after the ten most inhibiting ones: {real[order[-10:]].mean():+.2f}; after all: {real.mean():+.2f}")

# %% [markdown]
# One direction of the embedding says much of how every token chooses between ` the` and ` a`.
#
# ## All frequent tokens
#
# An *atlas* has an explanation for each of the most frequent tokens. `bigram-circuits find` makes one of 200 tokens for
# the page of every run; `bigram-circuits explain runs/first --token " of"` is the first half of this notebook.

# %%
atlas = bc.atlas(model, bigram, corpus, tokens=60)
page = atlas.to_html("atlas.html")
print(f"atlas.html: {len(page) / 1e6:.1f} MB")
atlas.to_dataframe()[["token", "prediction", "probability", "neurons", "left_out"]].head(12)

# %% [markdown]
# ## Your model
#
# Change these lines; everything else stays the same. `explain` takes apart whatever adds what its attentions and MLPs
# write to a residual stream, and says which parts it had to leave whole.
#
# ```python
# model = bc.load_model("EleutherAI/pythia-70m")                        # or "meta-llama/Llama-3.2-1B", or a folder
# corpus = bc.load_corpus("path/to/texts", tokenizer=model.tokenizer)
# target = bc.count_ngrams(corpus.train, order=2, d_vocab=model.cfg.d_vocab)
# found = bc.find_subnetwork(model, target, corpus, run_dir="runs/pythia-70m")
# print(bc.explain(model, found, "The capital of"))                     # a text, a token, or token ids
# ```
