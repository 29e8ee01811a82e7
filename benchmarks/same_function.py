"""Is `same_function` right where the truth is known? `python benchmarks/same_function.py` (about ten minutes).

Pairs of masks are constructed, of weights in planted bigrams and of nodes in planted circuits with attention, such that
it is known what the verdict must be: the same weights; other weights that compute the same, because they are twins of
the planted ones, or because what else they keep leads nowhere (`closed=True`); or something else, because planted parts
are missing, are others, or are there twice. Of masks that miss very little, the agreement is printed without a verdict
that would be right: they are not the same, but nearly. `--write` writes the tables into the page.
"""

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pages
import planted as weights
import torch

import bigram_circuits as bc
from bigram_circuits.experiments.same_function import SAME_FUNCTION, SAME_WEIGHTS
from bigram_circuits.planted.attention import KINDS

ARCHITECTURES, LAYERS, SEEDS = ("gpt2", "neox", "llama"), (1, 2), (10, 11, 12, 13, 14)
SAME, OTHER_WEIGHTS, OTHER = "same weights", "other weights, same function", "other function"
LARGER = 32
"""Tokens of the models in which little is missing."""
NEARLY = ""
"""In place of a verdict: a pair that differs by very little, of which none is expected."""
NAME = "benchmarks/same_function.py"

Pair = tuple[str, str, Any, Any]
"""What was done, the right verdict, and the two masks."""


@dataclass(frozen=True)
class Row:
    """One pair of masks."""

    model: str
    units: str
    made: str
    """How the second mask was made from the first."""
    truth: str
    """The right verdict, or `NEARLY`."""
    seed: int
    verdict: str
    agreement: float
    jaccard: float
    cka: float
    """The least of all layers; nan if streams are not shown."""

    @property
    def is_right(self) -> bool:
        """Whether the verdict is what it must be."""
        return self.verdict == self.truth


def of_bigram(architecture: str, layers: int, seed: int, quick: bool) -> Iterator[Row]:
    """Pairs of weight masks: in a closed model with twins, and in an open one without."""
    shape = {"d_vocab": 8 if quick else weights.D_VOCAB, "layers": layers, "seed": seed}
    name, rng = f"{architecture}, {layers} layer{'s' if layers > 1 else ''}", np.random.default_rng(seed)
    twins = bc.plant_bigram(architecture, unique=False, closed=True, **shape)
    alone = bc.plant_bigram(architecture, **shape)
    for planted, pairs in ((twins, with_twins(twins, rng)), (alone, without_twins(alone, rng))):
        yield from rows(name, "weights", planted, pairs, seed, quick)
    if layers == 1:
        yield from rows(name, "weights", alone, learned(alone, architecture, seed, quick), seed, quick)
        larger = bc.plant_bigram(architecture, **(shape if quick else shape | {"d_vocab": LARGER}))
        yield from rows(name, "weights", larger, nearly(larger, rng), seed, quick)


def with_twins(planted: bc.Planted, rng: np.random.Generator) -> Iterator[Pair]:
    circuit, twin = planted.solutions
    n = planted.model.cfg.d_vocab
    inert = ~(circuit | twin)
    few, many = (chosen(inert, number, rng) for number in (circuit.kept // 20, circuit.kept))
    yield "the same", SAME, circuit, circuit
    yield "5% more weights that lead nowhere", SAME, circuit, circuit | few
    yield "its twin", OTHER_WEIGHTS, circuit, twin
    each = rng.permutation(n) < n // 2
    swapped = np.flatnonzero(each)
    mixed = without(circuit, swapped) | without(twin, np.flatnonzero(~each))
    yield "the twin for half of the tokens", OTHER_WEIGHTS, circuit, mixed
    if len(circuit_layers(circuit)) > 1:
        crossed = circuit.drop_layer(1) | twin.drop_layer(0)
        yield "the twin in the second layer alone", OTHER_WEIGHTS, circuit, crossed
    yield "as many more weights that lead nowhere", OTHER_WEIGHTS, circuit, circuit | many
    yield "all that it drops (its twin, and what leads nowhere)", OTHER_WEIGHTS, circuit, ~circuit
    half = without(circuit, swapped)
    yield "half of its tokens, and their twins", OTHER_WEIGHTS, half, without(twin, swapped)
    yield "both twins at once: twice the logits", OTHER, circuit, circuit | twin
    yield "the twin, without half of its tokens", OTHER, circuit, without(twin, swapped)
    yield "half of its tokens, and the twins of the others", OTHER, half, without(twin, np.flatnonzero(~each))


def without_twins(planted: bc.Planted, rng: np.random.Generator) -> Iterator[Pair]:
    circuit, n = planted.circuit, planted.model.cfg.d_vocab
    order = rng.permutation(n)
    for part, words in ((4, "a quarter"), (2, "half")):
        yield f"without {words} of its tokens", OTHER, circuit, without(circuit, order[: n // part])
    yield "all that it drops", OTHER, circuit, ~circuit
    yield "as many at random", OTHER, circuit, circuit.random_like(seed=int(rng.integers(1000)))
    yield "half of its tokens, and the other half", OTHER, *(without(circuit, part) for part in np.split(order, 2))
    first, second = tables(planted)
    yield "half of each token's successors", OTHER, circuit, first
    yield "two tables: half of each token's successors, and the other half", OTHER, first, second


def nearly(planted: bc.Planted, rng: np.random.Generator) -> Iterator[Pair]:
    """The circuit without a few tokens, or without a single weight."""
    circuit, n = planted.circuit, planted.model.cfg.d_vocab
    order = rng.permutation(n)
    for missing in range(1, 5):
        made = f"without {missing} of {n} tokens ({missing / n:.0%})"
        yield made, NEARLY, circuit, without(circuit, order[:missing])
    name, token = output_of(circuit), int(order[0])
    columns = circuit[name][token].nonzero().flatten()
    successors = planted.probs[token, columns - columns_of(circuit).start].argsort()
    for place, words in ((-1, "most"), (0, "least")):
        mask = circuit[name].clone()
        mask[token, columns[successors[place]]] = False
        made = f"without the weight of one token's {words} likely successor ({n} tokens)"
        yield made, NEARLY, circuit, bc.Subnetwork(dict(circuit.items()) | {name: mask})


def learned(planted: bc.Planted, architecture: str, seed: int, quick: bool) -> Iterator[Pair]:
    """A mask found by learning, with another seed than the model's; where it has all of the circuit and little more."""
    recipe = weights.recipe_of((architecture, 1, 0.1, "continuous_sparsification", "target fraction"))
    recipe |= {"target_fraction": 1.03 * planted.circuit.fraction, "seed": seed + 100}
    config = bc.SparsifyConfig(**(recipe | ({"max_steps": 5} if quick else {})))
    found = bc.find_subnetwork(planted.model, planted.target, planted.corpus, config).subnetwork
    precision, recall = planted.recovery(found)
    if recall == 1 and precision >= SAME_WEIGHTS:
        yield "found again by learning, 3% larger", SAME, planted.circuit, found


def of_attention(kind: str, seed: int, quick: bool) -> Iterator[Row]:
    """Pairs of circuits of heads and neurons, in a closed model."""
    planted = bc.plant_attention(kind, closed=True, seed=seed)
    pairs = of_nodes(planted, np.random.default_rng(seed))
    yield from rows(kind.replace("_", " "), "heads and neurons", planted, pairs, seed, quick)


def of_nodes(planted: bc.PlantedAttention, rng: np.random.Generator) -> Iterator[Pair]:
    circuit = planted.nodes
    inert = rng.permutation((~circuit).nodes).tolist()
    heads = [label for label in circuit.nodes if "H" in label]
    neurons = rng.permutation([label for label in circuit.nodes if "N" in label]).tolist()
    yield "the same", SAME, circuit, circuit
    if few := circuit.kept // 20:
        yield "5% more nodes that lead nowhere", SAME, circuit, circuit.keep(*inert[:few])
    yield "as many more nodes that lead nowhere", OTHER_WEIGHTS, circuit, circuit.keep(*inert[: circuit.kept])
    yield "the full model, whose other nodes lead nowhere", OTHER_WEIGHTS, circuit, bc.Circuit.full(planted.model)
    for head in heads if circuit.kept > 1 else []:
        yield "without one of its heads", OTHER, circuit, circuit.drop(head)
    for part, words in ((4, "a quarter"), (2, "half")):
        if neurons:
            yield f"without {words} of its neurons", OTHER, circuit, circuit.drop(*neurons[: len(neurons) // part])
    yield "all that it drops", OTHER, circuit, ~circuit
    yield "as many at random", OTHER, circuit, bc.Circuit.empty(planted.model).keep(*inert[: circuit.kept])
    if neurons:
        yield "without one of its neurons", NEARLY, circuit, circuit.drop(neurons[0])


# --- masks ------------------------------------------------------------------------------------------------------------


def chosen(among: bc.Subnetwork, number: int, rng: np.random.Generator) -> bc.Subnetwork:
    """So many of the weights of a mask, at random, of all matrices together."""
    flat = torch.cat([mask.flatten() for mask in among.values()]).nonzero().flatten()
    kept = torch.zeros(among.total, dtype=torch.bool)
    kept[flat[torch.as_tensor(rng.permutation(len(flat))[:number])]] = True
    parts = kept.split([mask.numel() for mask in among.values()])
    return bc.Subnetwork({name: part.view_as(among[name]) for name, part in zip(among, parts, strict=True)})


def circuit_layers(circuit: bc.Subnetwork) -> list[int]:
    return sorted({circuit.place_of(name)[0] for name, mask in circuit.items() if mask.any()})


def without(circuit: bc.Subnetwork, tokens: Sequence[int] | np.ndarray) -> bc.Subnetwork:
    """A planted circuit, or its twin, without the neurons of some tokens."""
    for layer in circuit_layers(circuit):
        first = int(circuit[f"blocks.{layer}.mlp.W_out"].any(1).nonzero().min())
        circuit = circuit.drop_neurons(layer, [first + int(token) for token in tokens])
    return circuit


def output_of(circuit: bc.Subnetwork) -> str:
    """The matrix that writes the logits."""
    return f"blocks.{circuit_layers(circuit)[-1]}.mlp.W_out"


def columns_of(circuit: bc.Subnetwork) -> range:
    """The coordinates of the residual stream that hold the logits: every token follows some other."""
    written = circuit[output_of(circuit)].any(0).nonzero().flatten().tolist()
    return range(written[0], written[-1] + 1)


def tables(planted: bc.Planted) -> tuple[bc.Subnetwork, bc.Subnetwork]:
    """The circuit with the more and the less likely half of each token's successors: every other one."""
    name = output_of(planted.circuit)
    kept = planted.circuit[name]
    count = int(kept[0].sum())
    columns = columns_of(planted.circuit).start + planted.probs.argsort(1, descending=True)[:, :count]
    made = []
    for half in range(2):
        mask = torch.zeros_like(kept)
        mask[torch.arange(len(columns))[:, None], columns[:, half::2]] = True
        made.append(bc.Subnetwork(dict(planted.circuit.items()) | {name: mask}))
    return made[0], made[1]


# --- rows and tables --------------------------------------------------------------------------------------------------


def rows(model: str, units: str, planted: Any, pairs: Iterator[Pair], seed: int, quick: bool) -> Iterator[Row]:
    text = planted.corpus.held_out[: 4 if quick else None]
    for made, truth, a, b in pairs:
        found = bc.same_function(planted.model, a, b, planted.target, text)
        cka = np.nan if found.streams is None else float(np.nanmin(found.streams.get("cka", "both")))
        yield Row(model, units, made, truth, seed, found.verdict, found.agreement, found.jaccard, cka)


def tables_of(found: Sequence[Row]) -> list[str]:
    judged = [row for row in found if row.truth != NEARLY]
    right = sum(row.is_right for row in judged)
    lines = [
        f"{right} of {len(judged)} verdicts are right ({right / len(judged):.1%}).",
        "",
        "| units | the second mask | models and seeds | right verdict | given | agreement | Jaccard | least CKA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (units, made, truth), group in grouped(judged).items():
        counts = f"{len(group)} | {truth} | {sum(row.is_right for row in group)}"
        lines.append(f"| {units} | {made} | {counts} | {numbers(group)} |")
    wrong = [row for row in judged if not row.is_right]
    if wrong:
        lines += ["", "Wrong:", ""]
        lines += [f"- {row.model}, seed {row.seed}, {row.made}: {row.verdict} ({row.agreement:.3f})" for row in wrong]
    lines += [
        "",
        f"Masks that miss little, and how often their agreement is still {SAME_FUNCTION} or more:",
        "",
        "| units | the second mask | models and seeds | still the same function | agreement | Jaccard | least CKA |",
        "|---|---|---|---|---|---|---|",
    ]
    for (units, made, _), group in grouped([row for row in found if row.truth == NEARLY]).items():
        same = sum(row.verdict != OTHER for row in group)
        lines.append(f"| {units} | {made} | {len(group)} | {same} | {numbers(group)} |")
    return lines


def grouped(found: Sequence[Row]) -> Mapping[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(found, key=lambda row: (row.units != "weights", ORDER.index(row.truth))):
        groups.setdefault((row.units, row.made, row.truth), []).append(row)
    return groups


ORDER = (SAME, OTHER_WEIGHTS, OTHER, NEARLY)


def numbers(group: Sequence[Row]) -> str:
    return " | ".join(span([getattr(row, name) for row in group]) for name in ("agreement", "jaccard", "cka"))


def span(values: Sequence[float]) -> str:
    """The range."""
    return " to ".join(dict.fromkeys(f"{value:.3f}" for value in (min(values), max(values))))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES, help="gpt2, neox, llama")
    parser.add_argument("--kinds", nargs="*", default=KINDS, help="previous_token, trigram, induction")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--write", type=Path, help="the page to write the tables into, such as docs/planted.md")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs; writes nothing")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.architectures, arguments.kinds, arguments.seeds = ["gpt2"], ["previous_token"], [0]
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    layers = LAYERS[:1] if arguments.smoke else LAYERS
    jobs: list[tuple[Any, tuple[Any, ...]]] = [
        (of_bigram, one) for one in itertools.product(arguments.architectures, layers)
    ]
    jobs += [(of_attention, (kind,)) for kind in arguments.kinds]
    found = []
    for seed, (job, what) in itertools.product(arguments.seeds, jobs):
        for row in job(*what, seed, arguments.smoke):
            found.append(row)
            print("" if row.truth == NEARLY else row.is_right, row, flush=True)
    print("\n".join(tables_of(found)))
    if arguments.write and not arguments.smoke:
        pages.write(arguments.write, NAME, tables_of(found))


if __name__ == "__main__":
    main()
