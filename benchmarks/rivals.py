"""Rivals of planted circuits: `python benchmarks/rivals.py` (about a quarter of an hour).

Where the planted circuit is the only solution, a rival of its size must do worse, or be the circuit. Where every neuron
has a twin (`plant_bigram(unique=False)`), the rival must be the twins, which share nothing with the circuit. The recipe
is that of `planted.py` for continuous sparsification, and for nodes that of `find_circuit`. `--write` writes the table
into the page.

`--real RUN` looks instead for rivals of a run on the reference model, with its own recipe: `--k` masks with the first,
for each of `--weights`; what was found in that folder before is used again.
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pages
import planted as weights
import torch

import bigram_circuits as bc
from bigram_circuits.experiments.rivals import ENOUGH, FIRST, SAME
from bigram_circuits.recipe import for_nodes

PAGES = Path(__file__).parents[1] / "docs"
ARCHITECTURES, KINDS, SEEDS = ("gpt2", "llama"), ("previous_token", "induction"), (10, 11, 12, 13, 14)
OF_WEIGHTS, OF_NODES = (10.0, 30.0), (30.0, math.inf)
"""Overlap weights. Few nodes are planted, and each matters so much that no finite one makes masks leave them out."""
UNITS = ("head", "neuron")
NAME = "benchmarks/rivals.py"


@dataclass(frozen=True)
class Row:
    """One rival."""

    model: str
    """Architecture of planted weights, or kind of planted nodes."""
    planted: str
    """`unique`, or `twins`."""
    overlap_weight: float
    seed: int
    jaccard: float
    """With the planted circuit."""
    recovered: float
    """Of the information that the planted circuit recovers."""
    high: float
    """Upper end of its 95% interval."""
    is_solution: bool
    """Whether it is the planted circuit, or one of each neuron and its twin."""

    @property
    def is_right(self) -> bool:
        """Whether it is what is known to be there."""
        if self.planted == "twins":
            return self.is_solution and self.jaccard < 1 - SAME
        return self.high < ENOUGH or self.jaccard >= SAME


def of_weights(architecture: str, unique: bool, seed: int, quick: bool) -> Iterator[Row]:
    made = bc.plant_bigram(
        architecture, d_vocab=8 if quick else weights.D_VOCAB, n_layers=1 if quick else weights.BLOCKS, distractors=0.1,
        unique=unique, seed=seed,
    )  # fmt: skip
    method = "continuous_sparsification"
    recipe = weights.recipe_of((architecture, 1, 0.1, method, "target fraction"))
    config = bc.SparsifyConfig(**(recipe | ({"max_steps": 5} if quick else {})), seed=seed)
    yield from rows(made, made.circuit, config, OF_WEIGHTS, architecture, unique, seed)


def of_nodes(kind: str, seed: int, quick: bool) -> Iterator[Row]:
    made = bc.plant_attention(kind, seed=seed)
    share = made.nodes.fraction
    recipe = for_nodes(share, UNITS) | ({"max_steps": 5} if quick else {})
    config = bc.SparsifyConfig(**recipe, target_fraction=share, units=UNITS, seed=seed)
    yield from rows(made, made.nodes, config, OF_NODES, kind.replace("_", " "), True, seed)


def rows(
    made: Any,
    first: Any,
    config: bc.SparsifyConfig,
    overlap_weights: Sequence[float],
    model: str,
    unique: bool,
    seed: int,
) -> Iterator[Row]:
    found = bc.rivals(
        made.model, made.target, made.corpus, 2, overlap_weights, config=config, first=first, check_memory="off"
    )
    jaccard, recovered = found.measured.get("jaccard"), found.measured.get("recovered")
    for at, (mask, weight) in enumerate(zip(found.masks[1:], overlap_weights, strict=True), start=1):
        name = found.measured.names[at]
        is_solution = mask == first if isinstance(mask, bc.Circuit) else made.is_solution(mask)
        numbers = jaccard[name], recovered[name], float(found.measured.high[0, at])
        yield Row(model, "unique" if unique else "twins", weight, seed, *numbers, is_solution)


def table(found: Sequence[Row]) -> list[str]:
    lines = [
        "| model | planted | overlap weight | seeds | Jaccard with the circuit | recovered of its information "
        "| solutions | as it should be |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in found:
        groups.setdefault((row.model, row.planted, row.overlap_weight), []).append(row)
    for (model, planted, weight), group in groups.items():
        spans = [span([getattr(row, name) for row in group]) for name in ("jaccard", "recovered")]
        counts = [f"{sum(getattr(row, name) for row in group)} of {len(group)}" for name in ("is_solution", "is_right")]
        lines.append("| " + " | ".join([model, planted, f"{weight:g}", str(len(group)), *spans, *counts]) + " |")
    return lines


def span(values: Sequence[float]) -> str:
    """The mean, and in brackets the range."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def real(folder: Path, k: int, overlap_weights: Sequence[float]) -> list[str]:
    """The table of a run's rivals, and of what they have in common."""
    run, tried = bc.load_run(folder), folder / "falsify" / "rivals-tried"
    found = bc.load_rivals(tried)
    if found is None:
        model = bc.load_model("reference", device="cpu")
        corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
        target = bc.count_ngrams(corpus.train, 2, d_vocab=model.cfg.d_vocab)
        found = bc.rivals(
            model, target, corpus, k, overlap_weights, config=run.settings.recipe, first=run, run_dir=tried,
            check_memory="off",
        )  # fmt: skip
    print(found)
    lines = [
        "| mask | Jaccard with the first | times chance | r | KL | recovered of its information (95% interval) |",
        "|---|---|---|---|---|---|",
    ]
    keys = ("jaccard", "times_chance", "surprisal_correlation", "kl", "recovered")
    for at, name in enumerate(found.measured.names):
        jaccard, times, r, kl, recovered = (found.measured.get(key)[name] for key in keys)
        low, high = found.measured.low[0, at], found.measured.high[0, at]
        ends = "" if name == FIRST else f" ({low:.3f} to {high:.3f})"
        lines.append(f"| {name} | {jaccard:.3f} | {times:.1f} | {r:.3f} | {kl:.3f} | {recovered:.3f}{ends} |")
    lines += ["", "| what is kept | weights | r | KL |", "|---|---|---|---|"]
    for name in found.cores.names:
        kept, r, kl = (found.cores.get(key)[name] for key in ("kept", "surprisal_correlation", "kl"))
        lines.append(f"| {name} | {kept:,.0f} | {r:.3f} | {kl:.2f} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES, help="gpt2, neox, llama")
    parser.add_argument("--kinds", nargs="*", default=KINDS, help="previous_token, trigram, induction")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--real", type=Path, help="the folder of a run on the reference model: its rivals instead")
    parser.add_argument("--k", type=int, default=3, help="with --real: masks, with the first")
    parser.add_argument("--weights", nargs="+", type=float, default=[30.0], help="with --real: overlap weights")
    parser.add_argument("--write", type=Path, help="the page to write the table into, such as docs/planted.md")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs; writes nothing")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.architectures, arguments.kinds, arguments.seeds = ["gpt2"], ["previous_token"], [0]
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    if arguments.real:
        lines = real(arguments.real, arguments.k, arguments.weights)
        if arguments.write:
            pages.write(arguments.write, f"{NAME} --real", lines)
        return
    jobs = [(of_weights, one) for one in itertools.product(arguments.architectures, (True, False))]
    jobs += [(of_nodes, (kind,)) for kind in arguments.kinds]
    found = []
    for seed, (job, what) in itertools.product(arguments.seeds, jobs):
        for row in job(*what, seed, arguments.smoke):
            found.append(row)
            print(row, row.is_right, flush=True)
    order = [row.model for row in found]
    found.sort(key=lambda row: order.index(row.model))
    print("\n".join(table(found)))
    if arguments.write and not arguments.smoke:
        pages.write(arguments.write, NAME, table(found))


if __name__ == "__main__":
    main()
