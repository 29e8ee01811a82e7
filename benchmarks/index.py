"""Time of a step whose target is looked up in an index, relative to a counted table: `python benchmarks/index.py`.

The reference model and text; the index is one of tokengrams, of the training text. Both targets are used by
`find_subnetwork` itself, in turns; every run with an index opens it anew, so that all of its rows are fetched. The
first steps, whose contexts are new, are shown apart from the last ones.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokengrams

import bigram_circuits as bc

GOAL = 1.3


class Steps:
    """A callback that notes when each step ends."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step(self, record: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def on_end(self, found: Any) -> None:
        """Nothing is left to note."""

    def seconds(self, part: slice) -> float:
        """Mean time of some steps, without the first, which also prepares."""
        return statistics.mean(np.diff(self.ends)[1:][part].tolist())


def build(corpus: bc.Corpus, folder: Path, d_vocab: int) -> Path:
    """Write the training text and its suffix array; returns the index."""
    path = folder / "text.idx"
    corpus.train.astype("<u2").tofile(path.with_suffix(".bin"))
    tokengrams.MemmapIndex.build(str(path.with_suffix(".bin")), str(path), vocab=d_vocab)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="steps of each run (default: 60)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each target (default: 3)")
    parser.add_argument("--smoke", action="store_true", help="a few steps, only to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.steps, arguments.rounds = 4, 1
    model = bc.load_model("reference")
    corpus = bc.load_corpus("reference", tokenizer=model.tokenizer, max_tokens=20_000 if arguments.smoke else None)
    config = bc.SparsifyConfig(max_steps=arguments.steps, batch_size=4 if arguments.smoke else 16, retries=0)
    halves = {"first half": slice(0, arguments.steps // 2), "second half": slice(arguments.steps // 2, None)}
    with tempfile.TemporaryDirectory() as folder:
        path = build(corpus, Path(folder), model.cfg.d_vocab)
        for order in (2, 3):
            table = bc.count_ngrams(corpus.train, order, d_vocab=model.cfg.d_vocab)
            ratios: dict[str, list[float]] = {name: [] for name in halves}
            for _ in range(arguments.rounds):
                took = {}
                for name in ("table", "index"):
                    target = table
                    if name == "index":
                        target = bc.IndexTarget(path, d_vocab=model.cfg.d_vocab, order=order)
                    took[name] = Steps()
                    bc.find_subnetwork(model, target, corpus, config, callbacks=[took[name]], check_memory="off")
                for name, part in halves.items():
                    ratios[name].append(took["index"].seconds(part) / took["table"].seconds(part))
            found = ", ".join(
                f"{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f}) in the {name}"
                for name, own in ratios.items()
            )
            print(f"order {order}: a step with the index takes {found} of one with the table (goal: at most {GOAL})")


if __name__ == "__main__":
    main()
