"""Two processes that learn together: `torchrun --nproc-per-node 2 -m tests.ranked FOLDER`.

Each writes what it saw to `0.json` or `1.json` in the folder, beside what the first finds alone;
`tests/learning/test_ranks.py` looks at both. In the end the second process fails.
"""

import contextlib
import dataclasses
import io
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.learning import training
from bigram_circuits.learning.learner import Learner
from bigram_circuits.learning.ranks import alone, current_ranks
from bigram_circuits.runs.contents import StepRecord
from bigram_circuits.tasks.task import Task

QUICK = bc.SparsifyConfig(sparsity_weight=1.0, learning_rate=0.05, max_steps=6, batch_size=5, retries=0)
"""Of five sequences, one process takes two and the other three."""
RECIPES = {
    "weights": QUICK,
    "fraction": dataclasses.replace(QUICK, target_fraction=0.1, batch_size=4),
    "attacked": dataclasses.replace(QUICK, worst_case=2),
    "neurons": dataclasses.replace(QUICK, granularity="neuron", method="hard_concrete"),
    "polished": dataclasses.replace(QUICK, polish=1, max_steps=2),
}

SHARDED = {
    "sharded weights": lambda model, target: bc.ModelTarget(model),
    "sharded fraction": lambda model, target: target,
    "sharded attacked": lambda model, target: target,
}
"""Recipes that are also learned sharded, and on what."""


class Watcher:
    """A callback that counts."""

    def __init__(self) -> None:
        self.steps, self.ends = 0, 0

    def on_step(self, record: StepRecord) -> None:
        self.steps += 1

    def on_end(self, found: object) -> None:
        self.ends += 1


class Odd(bc.Target):
    """A target whose loss is not finite, or that fails, at one step of one process."""

    def __init__(self, at: int, exception: Exception | None = None) -> None:
        self.at, self.exception = at, exception

    def cross_entropy(self, logits, tokens):
        self.at -= 1
        if self.at == 0 and self.exception is not None:
            raise self.exception
        return -logits.log_softmax(-1).mean(-1) * (torch.nan if self.at == 0 else 1.0)

    def surprisal(self, tokens):
        return torch.ones(tokens[:, 1:].shape)


def prompts() -> Task:
    """A task of prompts with counterfactuals, whose answer is the last token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 257, (24, 8))
    scored = np.zeros(tokens.shape, dtype=bool)
    scored[:, -1] = True
    return Task("pairs", tokens, scored, 5.0, counterfactual=rng.integers(1, 257, (24, 8)))


def by_command(folder: Path) -> list:
    """The exit code of `find`, and what it prints."""
    (folder / "text.txt").write_text("ab ba aab\n\n" * 600)
    given = f"find {folder / 'model'} --corpus {folder / 'text.txt'} --context-length 16 --steps 3 --batch-size 4"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*given.split(), "--no-analysis", "--random-seeds", "1", "--out", str(folder / "command")])
    return [code, out.getvalue(), err.getvalue()]


def text(model) -> bc.Corpus:
    """A short text in which some letters are more frequent than others."""
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list("abcd"), 200, p=[0.4, 0.3, 0.2, 0.1])) for _ in range(20)]
    return bc.load_corpus(documents, tokenizer=model.tokenizer, context_length=16, held_out=0.2)


def as_numbers(found) -> dict:
    """What a run found, for JSON."""
    mask = np.concatenate([found.mask[name].flatten().numpy() for name in found.mask])
    return {
        "kept": np.flatnonzero(mask).tolist(),
        "history": [record.to_json() for record in found.history],
        "gap": [found.gap.soft, found.gap.hard],
        "rollbacks": [[one.step, one.back_to] for one in found.rollbacks],
    }


def together_and_alone(find) -> dict:
    """What all processes find together, and what the first finds alone."""
    together = as_numbers(find())
    with alone():
        return {"together": together, "alone": as_numbers(find()) if current_rank() == 0 else None}


def current_rank() -> int:
    return int(os.environ["RANK"])


def error_of(work) -> str | None:
    """The line with which something ends; None if it does not fail."""
    try:
        work()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def terminated(rank: int, step: int):
    """Within the block, a process gets SIGTERM during a step."""
    record = Learner.record

    def and_terminate(self, at, *rest):
        if at == step and current_rank() == rank:
            for _ in range(1 + (current_ranks().size > 1)):  # torchrun passes on what all have got already
                os.kill(os.getpid(), signal.SIGTERM)
        return record(self, at, *rest)

    with mock.patch.object(Learner, "record", and_terminate):
        yield


def resumed(model, target, corpus, folder: Path, sharded: bool = False) -> dict:
    """A run that one process begins, both go on with, and one ends."""

    def find():
        return bc.find_subnetwork(model, target, corpus, QUICK, run_dir=folder, sharded=sharded)

    rank, ended = current_rank(), []
    if rank == 0:
        with alone(), terminated(0, 1):
            ended.append(error_of(find))
    current_ranks().gather(None)
    with terminated(1, 3):
        ended.append(error_of(find))
    steps = bc.runs.RunFolder(folder).read_checkpoint().step
    current_ranks().gather(None)
    with alone():
        found = as_numbers(find()) if rank == 0 else None
    again = as_numbers(find())
    return {"ended": ended, "steps": steps, "found": found, "again": again["kept"]}


@mock.patch.object(training, "_MOST_MEASURED", 8)
def main() -> None:
    """Do everything, and write it down."""
    folder, rank = Path(sys.argv[1]), current_rank()
    model = bc.load_model(folder / "model", device="cpu")
    corpus = text(model)
    target, seen, watcher = bc.count_ngrams(corpus.train, 2, d_vocab=257), {}, Watcher()
    for name, recipe in RECIPES.items():
        seen[name] = together_and_alone(
            lambda recipe=recipe: bc.find_subnetwork(model, target, corpus, recipe, callbacks=[watcher])
        )
    for kind in ("mean_by_position", "counterfactual"):
        options = {"units": ("head", "neuron"), "replace": kind, "target_fraction": 0.3, "force": True}
        recipe = dataclasses.replace(QUICK, max_steps=4)
        seen[kind] = together_and_alone(
            lambda options=options, recipe=recipe: bc.find_circuit(model, prompts(), config=recipe, **options)
        )
    seen["watched"] = [watcher.steps, watcher.ends]
    seen["resumed"] = resumed(model, target, corpus, folder / "resumed")
    weights = {name: one.clone() for name, one in model.named_parameters()}
    for name, target_of in SHARDED.items():
        recipe, own = RECIPES[name.removeprefix("sharded ")], target_of(model, target)
        seen[name] = together_and_alone(
            lambda recipe=recipe, own=own: bc.find_subnetwork(model, own, corpus, recipe, sharded=True)
        )
    seen["resumed sharded"] = resumed(model, target, corpus, folder / "sharded", sharded=True)
    odd = Odd(5 if rank else 0)
    seen["rolled back sharded"] = as_numbers(bc.find_subnetwork(model, odd, corpus, QUICK, sharded=True))
    seen["left alone"] = all(torch.equal(one, weights[name]) for name, one in model.named_parameters())
    seen["rolled back"] = as_numbers(bc.find_subnetwork(model, Odd(5 if rank else 0), corpus, QUICK))
    seen["refused"] = [
        error_of(lambda: bc.find_subnetwork(model, target, corpus, dataclasses.replace(QUICK, batch_size=1))),
        error_of(lambda: bc.find_circuit(model, target, corpus, units="head", replace="resample")),
        error_of(lambda: bc.find_subnetwork(model, target, corpus, dataclasses.replace(QUICK, seed=rank))),
        error_of(lambda: bc.find_subnetwork(model, target, corpus, RECIPES["neurons"], sharded=True)),
    ]
    seen["command"] = by_command(folder)
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    current_ranks().gather(None)

    if rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until it has written what it was told
    failing = Odd(3 if rank else 0, ValueError("the target of one process fails"))
    if rank == 1:
        bc.find_subnetwork(model, failing, corpus, QUICK)
    (folder / "last").write_text(error_of(lambda: bc.find_subnetwork(model, failing, corpus, QUICK)) or "")


if __name__ == "__main__":
    main()
