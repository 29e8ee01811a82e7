"""Precision and recall on planted circuits, for each method: `python benchmarks/planted.py` (about an hour).

A cell is a model with a planted circuit (`bigram_circuits.plant_bigram`: an architecture, a number of layers, a
strength of the distractors), a method, and what sets the size: the circuit's own size as `target_fraction`, or a
`sparsity_weight`. Each is measured with several seeds (of model, text and learning), before and after `polish`. Every
run adds a line to the results, and a run that has a line there is not repeated. `--write` writes the table and the
words below it into the page.

Settings were chosen on models with the seeds `CHOSEN_ON`, not all of them for every choice; those reported are others.
"""

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bigram_circuits as bc

PAGES = Path(__file__).parents[1] / "docs"
RESULTS = PAGES / "planted.jsonl"
ARCHITECTURES, LAYERS, DISTRACTORS, SEEDS = ("gpt2", "neox", "llama"), (1, 2), (0.1, 0.3), (10, 11, 12, 13, 14)
CHOSEN_ON = (0, 1, 2, 3, 4)
"""Seeds of the models on which the settings below were chosen."""
D_VOCAB, BLOCKS = 16, 2
"""Size of the models."""
WANTED = 0.95
"""Precision and recall that a method should have."""
BEGIN, END = "<!-- written by benchmarks/planted.py -->", "<!-- end -->"

SHARED: dict[str, Any] = {"sparsity_weight": 30.0, "batch_size": 8, "retries": 0}
METHODS: dict[str, dict[str, Any]] = {
    "continuous_sparsification": {"beta_growth": 1.012, "max_steps": 450, "first_score": 0.7},
    "hard_concrete": {"learning_rate": 0.1, "max_steps": 500},
    "straight_through": {"max_steps": 400},
}
"""Settings by method, besides `SHARED`."""
BY_LAYERS: dict[tuple[str, int], dict[str, Any]] = {("hard_concrete", 2): {"first_score": 2.0}}
"""Settings by method and layers of the circuit."""
POLISH: dict[str, Any] = {"passes": 5, "most": 300, "sequences": 32}
SIZES = ("sparsity weight", "target fraction")
NEAR = 0.05
"""A KL that is close to the circuit's, which is 0: nats per position."""


@dataclass(frozen=True)
class Row:
    """One run."""

    architecture: str
    layers: int
    distractors: float
    method: str
    """A masking method, or `magnitude`: the largest weights, as many in every matrix as are planted there."""
    size: str
    """What sets the size, of `SIZES`; empty for `magnitude`."""
    seed: int
    settings: str
    """Digest of the recipe, and of how the mask is polished: rows with other settings than today's are left out."""
    planted: int
    """Number of planted weights."""
    kept: int
    precision: float
    recall: float
    kl: float
    """Held-out KL from the target, nats per position; this and the three before it as learned."""
    polished_kept: int
    polished_precision: float
    polished_recall: float
    polished_kl: float
    seconds: float
    """Time spent learning and polishing."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What distinguishes it from other runs."""
        return *cell_of(self), self.seed, self.settings


Cell = tuple[str, int, float, str, str]
"""Architecture, layers, distractors, method and what sets the size."""


def cells(architectures: Iterable[str], layers: Iterable[int], distractors: Iterable[float]) -> Iterator[Cell]:
    for one in itertools.product(architectures, layers, distractors):
        yield *one, "magnitude", ""
        for method, size in itertools.product(METHODS, SIZES):
            if method != "straight_through" or size == "target fraction":
                yield *one, method, size


def recipe_of(cell: Cell) -> dict[str, Any]:
    layers, method = cell[1], cell[3]
    if method == "magnitude":
        return {}
    own = METHODS[method] | BY_LAYERS.get((method, layers), {})
    return SHARED | own | {"method": method}


def settings_of(cell: Cell) -> str:
    settings = [recipe_of(cell), POLISH] if cell[3] != "magnitude" else []
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()


def run(planted: bc.Planted, cell: Cell, seed: int, quick: bool = False) -> Row:
    """Learn and polish a mask, or take the largest weights, and compare it with the circuit."""
    started = time.perf_counter()
    if cell[3] == "magnitude":
        learned = polished = bc.Subnetwork.magnitude(planted.model, like=planted.circuit)
    else:
        exact = cell[4] == "target fraction"
        size = {"target_fraction": planted.circuit.fraction} if exact else {}
        changes = {"max_steps": 5} if quick else {}
        config = bc.SparsifyConfig(**(recipe_of(cell) | changes), seed=seed, **size)
        learned = bc.find_subnetwork(planted.model, planted.target, planted.corpus, config).subnetwork
        polished = bc.polish(
            planted.model, learned, planted.target, planted.corpus, sparsity_weight=config.sparsity_weight,
            same_size=exact, seed=seed, **(POLISH | ({"most": 20} if quick else {})),
        ).subnetwork  # fmt: skip
    seconds = time.perf_counter() - started
    numbers = itertools.chain.from_iterable(numbers_of(planted, one) for one in (learned, polished))
    return Row(*cell, seed, settings_of(cell), planted.circuit.kept, *numbers, round(seconds, 1))


def numbers_of(planted: bc.Planted, found: bc.Subnetwork) -> tuple[int, float, float, float]:
    precision, recall = planted.recovery(found)
    held_out = planted.corpus.held_out
    kl = bc.evaluate(planted.model, found, planted.target, held_out, controls=False).subnetwork.kl
    return found.kept, round(precision, 4), round(recall, 4), round(kl, 5)


# --- results and page ------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of a results file that have the present settings."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**{one.name: record[one.name] for one in fields(Row)}) for record in map(json.loads, lines)]
    return [row for row in rows if row.settings == settings_of(cell_of(row))]


def cell_of(row: Row) -> Cell:
    return row.architecture, row.layers, row.distractors, row.method, row.size


def by_cell(rows: Sequence[Row]) -> dict[Cell, list[Row]]:
    found: dict[Cell, list[Row]] = {cell: [] for cell in cells(ARCHITECTURES, LAYERS, DISTRACTORS)}
    for row in rows:
        if row.seed in SEEDS:
            found.setdefault(cell_of(row), []).append(row)
    return {cell: group for cell, group in found.items() if group}


def mean_and_least(values: Iterable[float]) -> str:
    array = np.array([*values])
    return f"{array.mean():.3f} ({array.min():.3f})"


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| model | layers | distractors | method | size set by | seeds | precision | recall | polished: precision "
        "| recall | kept of planted | KL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (architecture, layers, distractors, method, size), group in by_cell(rows).items():
        columns = [
            mean_and_least(getattr(row, name) for row in group)
            for name in ("precision", "recall", "polished_precision", "polished_recall")
        ]
        if method == "magnitude":
            columns[2:] = ["", ""]
        kept = f"{np.mean([row.polished_kept for row in group]):.0f} of {group[0].planted}"
        kl = f"{np.mean([row.polished_kl for row in group]):.4f}"
        start = (architecture, layers, f"{distractors:g}", method.replace("_", " "), size, len(group))
        lines.append("| " + " | ".join(map(str, [*start, *columns, kept, kl])) + " |")
    return lines


def worst(group: Sequence[Row], prefix: str = "polished_") -> float:
    """The smaller of mean precision and mean recall."""
    return min(float(np.mean([getattr(row, prefix + name) for row in group])) for name in ("precision", "recall"))


def setup() -> str:
    """What was measured, and with which settings."""
    special = [
        f"{method.replace('_', ' ')} with {layers} layers also {_listed(more)}"
        for (method, layers), more in BY_LAYERS.items()
    ]
    each = [f"{method.replace('_', ' ')} {_listed(own)}" for method, own in METHODS.items()]
    return (
        f"Models have {D_VOCAB} tokens and {BLOCKS} blocks. Each cell has the mean of {len(SEEDS)} seeds of model, "
        f"text and learning, {SEEDS[0]} to {SEEDS[-1]}, and (in brackets) the least; settings were chosen on models "
        f"with seeds {CHOSEN_ON[0]} to {CHOSEN_ON[-1]}. Settings: {_listed(SHARED)}; {'; '.join([*each, *special])}. "
        f"`polish`: {_listed(POLISH)}."
    )


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}` {value:g}" for name, value in settings.items())


def words(rows: Sequence[Row]) -> list[str]:
    """What the table says, method by method, and what a low KL says of recovery."""
    lines = []
    groups = by_cell(rows)
    for method, size in dict.fromkeys(cell[3:] for cell in groups if cell[3] != "magnitude"):
        mine = {cell: group for cell, group in groups.items() if cell[3:] == (method, size)}
        reach = [sum(worst(group, prefix) >= WANTED for group in mine.values()) for prefix in ("", "polished_")]
        below = [f"{cell[0]}, {cell[1]}, {cell[2]:g}: {worst(group):.3f}" for cell, group in mine.items()
                 if worst(group) < WANTED]  # fmt: skip
        says = (
            f"- **{method.replace('_', ' ').capitalize()}, size set by {size}**: mean precision and recall are both at "
            f"least {WANTED} in {reach[0]} of {len(mine)} cells as learned, in {reach[1]} after polishing."
        )
        lines.append(
            says + (f" Below it after polishing (the smaller of the two): {'; '.join(below)}." if below else "")
        )
    near = {cell: worst(group) for cell, group in groups.items() if np.mean([row.polished_kl for row in group]) < NEAR}
    if near:
        least = min(near, key=lambda cell: near[cell])
        name = ", ".join(part.replace("_", " ") for part in (*map(str, least[:3]), *least[3:]) if part)
        lines.append(
            f"- **A low KL is no proof of recovery**: of the {len(near)} cells with a mean KL below {NEAR:g} nats, "
            f"that of {name} has the lowest precision or recall, {near[least]:.3f}."
        )
    return lines


def page_with(page: str, rows: Sequence[Row]) -> str:
    """The page with what is between the markers written anew."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:start] + "\n\n" + "\n".join([setup(), "", *table(rows), "", *words(rows)]) + "\n\n" + page[end:]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, help="gpt2, neox, llama")
    parser.add_argument("--distractors", nargs="+", type=float, default=DISTRACTORS)
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS)
    parser.add_argument("--methods", nargs="+", default=["magnitude", *METHODS])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--d-vocab", type=int, default=D_VOCAB)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one for each run")
    parser.add_argument("--write", type=Path, help="the page to write the table into, such as docs/planted.md")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs; writes nothing")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.architectures, arguments.layers, arguments.distractors, arguments.seeds = ["gpt2"], [1], [0.1], [0]
        arguments.d_vocab = 8
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    rows = [] if arguments.smoke else read(arguments.results)
    done = {row.key for row in rows}
    wanted = [one for one in cells(arguments.architectures, arguments.layers, arguments.distractors)
              if one[3] in arguments.methods]  # fmt: skip
    for seed, (start, group) in itertools.product(
        arguments.seeds, [(key, [*group]) for key, group in itertools.groupby(wanted, key=lambda cell: cell[:3])]
    ):
        planted = None
        for cell in group:
            if (*cell, seed, settings_of(cell)) in done:
                continue
            planted = planted or bc.plant_bigram(
                start[0], layers=start[1], distractors=start[2], d_vocab=arguments.d_vocab, n_layers=BLOCKS, seed=seed
            )
            rows.append(row := run(planted, cell, seed, arguments.smoke))
            print(
                f"{' '.join(map(str, cell)):<50} seed {seed}: precision {row.precision:.3f} recall {row.recall:.3f}, "
                f"polished {row.polished_precision:.3f} {row.polished_recall:.3f} ({row.seconds:.0f} s)", flush=True,
            )  # fmt: skip
            if not arguments.smoke:
                with arguments.results.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    print("\n".join([*table(rows), "", *words(rows)]))
    if arguments.write and not arguments.smoke:
        arguments.write.write_text(page_with(arguments.write.read_text(), rows))


if __name__ == "__main__":
    main()
