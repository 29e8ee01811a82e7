# %% [markdown]
# # A task of your own, and the circuit that does it
#
# A task is a file: prompts with answers. Which attention heads does the model need to answer them? From the file to a
# circuit, its controls, other ways of choosing one, and the edges between the heads.

# %%
import itertools
import json
from pathlib import Path

import bigram_circuits as bc
from bigram_circuits import analysis

model = bc.load_model("reference")

# %% [markdown]
# ## A file of rows
#
# Three words, then the same again: `list file type list file type list` goes on with `file`. The *counterfactual* of a
# prompt is the same with another second word, so the two differ in what is to be copied, and in nothing else.

# %%
words = ["list", "string", "value", "object", "file", "number", "name", "type"]
words += ["function", "class", "module", "code", "method", "error", "line", "set"]
rows = []
for n, (a, b, c) in enumerate(list(itertools.permutations(words, 3))[::14]):
    d = [word for word in words if word not in (a, b, c)][n % 13]
    rows.append(
        {
            "prompt": f" {a} {b} {c} {a} {b} {c} {a}",
            "answer": f" {b}",
            "wrong": f" {c}",
            "counterfactual": f" {a} {d} {c} {a} {d} {c} {a}",
            "counterfactual_answer": f" {d}",
        }
    )
Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
task = bc.load_task("rows.jsonl", tokenizer=model.tokenizer)
task

# %% [markdown]
# Can the full model do it at all? A circuit of a model that cannot would explain nothing.

# %%
able = analysis.ability(model, task)
print(able)

# %% [markdown]
# ## Learn a circuit
#
# Every head gets a gate. Where a gate is closed, the head's value is replaced by the one it has in the counterfactual
# prompt: the head then says "copy the other word". What is asked for is what the *full model* does at the answer
# (`kl`), mistakes included. Exactly a tenth of the heads may stay. (Fewer steps than usual, to save time.)

# %%
recipe = bc.SparsifyConfig(method="straight_through", along_path=True, target_fraction=0.1, max_steps=40)
found = bc.find_circuit(
    model, task, config=recipe, units="head", replace="counterfactual", measure="kl", run_dir="runs/heads"
)
found.circuit.nodes

# %% [markdown]
# ## Its controls
#
# All on rows that were not learned from. *Random nodes* are as many heads in every layer, drawn at random; *strongest
# nodes* those whose gates have the largest gradient, as many in every layer; the *complement* is the full model without
# the circuit.

# %%
target, corpus = bc.TaskTarget(task, "kl", model=model), task.corpus()
evaluation = bc.evaluate(model, found, target, corpus.held_out, seeds=5)
evaluation

# %%
evaluation.plot("kl")

# %%
print(f"share of the way from no head to the full model: {evaluation.recovered:.0%}")
for seed, one in enumerate(evaluation.random):
    print(f"as many heads at random, seed {seed}: KL {one.kl:.2f} nats; of the circuit: {evaluation.subnetwork.kl:.2f}")

# %% [markdown]
# Three heads of 32 go most of the way, and without them the model does little better than without any. The verdict is
# stricter: it also asks whether the circuit finds the same *answers* hard as the full model does (r), and three heads
# do not show that. Nor are random heads always bad: they vary as they happen to include a head that matters.
#
# ## Other ways of choosing
#
# Is learning needed? *Attribution patching* ranks heads by one gradient each. All ways choose on the training rows and
# are measured on the held-out ones, at several sizes. Faithfulness is 0 for the circuit without any head, and 1 for the
# full model.

# %%
curves = bc.faithfulness_curves(
    model, task, config=recipe, units="head", replace="counterfactual", measure="kl",
    sizes=(0.05, 0.1, 0.2, 0.4), methods=("learned", "attribution", "random"), seeds=3,
)  # fmt: skip
curves.plot()

# %% [markdown]
# In one number each: CMD is the area between a curve and 1, so the smaller, the better. `cmd_over_learned` is the
# difference to the learned circuits, on the same rows, with its 95% interval.

# %%
cmd = ["cmd", "cmd_over_learned", "cmd_over_learned_low", "cmd_over_learned_high"]
curves.areas.to_dataframe().set_index("method")[cmd].round(3)

# %% [markdown]
# Where that interval lies above 0, the learned circuits are better. The page has the same with all numbers, and which
# heads each way keeps.

# %%
page = bc.write_curves(curves, "curves.html")
for method, circuits in curves.circuits.items():
    print(f"{method:<12} {', '.join(circuits[0].nodes)}")

# %% [markdown]
# ## Edges of the same behaviour
#
# Which parts read from which? An edge is what one part writes, into what another reads: `L0H3->L1H2.k` into the keys of
# a head. There are 1,487 of them here. At one size, a tenth, learned ones beside three other choices:

# %%
of_edges = bc.faithfulness_curves(
    model, task, config=recipe, units="edge", replace="counterfactual", measure="kl",
    sizes=(0.1,), methods=("learned", "integrated", "attribution", "random"), seeds=2, steps=5,
)  # fmt: skip
for method in of_edges.curves.conditions:
    low, high = of_edges.curves.interval("faithfulness", method)[:, 0]
    print(f"{method:<12} faithfulness {of_edges.curves.get('faithfulness', method)[0]:.2f} ({low:.2f} to {high:.2f})")

# %% [markdown]
# The gradient in the full model alone (`attribution`) is misleading here: near the full model, no single edge matters
# much, since others do the same. Averaged over the way from no edge to all (`integrated`), it is not; and learning,
# which moves all gates together, does better still.
#
# Which edges into the last block are kept, and what reads into `logits`?

# %%
(edges,) = of_edges.circuits["learned"]
last = [edge for edge in edges.edges if "->L3H" in edge or "->logits" in edge]
print(f"{edges.kept} edges, of these {len(last)} into the heads of the last block and into logits:")
print(", ".join(last))

# %% [markdown]
# `bc.find_circuit(model, task, units="edge", ...)` learns edges as it learns heads.
#
# A circuit says what is enough, for these prompts, with this replacement. Another replacement asks another question:
# try `replace="mean"`.
#
# ## Your model
#
# Change these lines; everything else stays the same. `bc.load_task` says which rows your tokenizer cannot express.
# Without `config`, the recipe takes 200 steps. `bigram-circuits find --task rows.jsonl --unit head --replace
# counterfactual` and `bigram-circuits curves` do the same on the command line.
#
# ```python
# model = bc.load_model("EleutherAI/pythia-70m")                        # or "meta-llama/Llama-3.2-1B", or a folder
# task = bc.load_task("my-rows.jsonl", tokenizer=model.tokenizer)
# found = bc.find_circuit(model, task, units="head", replace="mean", target_fraction=0.1, run_dir="runs/pythia-70m")
# ```
