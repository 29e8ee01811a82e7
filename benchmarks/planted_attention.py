"""Precision and recall of nodes and edges on planted attention circuits: `python benchmarks/planted_attention.py`.

A run is a model with a planted circuit (`bigram_circuits.plant_attention`) and what is learned, nodes (heads and
neurons) or edges, by `find_circuit` with its own recipe and the circuit's own size. Each is measured with several seeds
(of model, text and learning). Every run adds a line to the results, and a run that has a line there is not repeated.
`--write` writes the table into the page. It takes about three minutes.

The recipe was chosen on models with the seeds 0 and 1; those reported are others.
"""

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from planted import PAGES, SEEDS, WANTED, mean_and_least

import bigram_circuits as bc
from bigram_circuits.planted.attention import KINDS
from bigram_circuits.recipe import for_nodes

RESULTS = PAGES / "planted_attention.jsonl"
UNITS = {"heads and neurons": ("head", "neuron"), "edges": ("edge",)}
"""What is learned."""
BEGIN, END = "<!-- written by benchmarks/planted_attention.py -->", "<!-- end of benchmarks/planted_attention.py -->"


@dataclass(frozen=True)
class Row:
    """One run."""

    kind: str
    """The behaviour, of `KINDS`."""
    what: str
    """What was learned, of `UNITS`."""
    seed: int
    settings: str
    """Digest of the recipe: rows with another one than today's are left out."""
    planted: int
    """Number of planted nodes or edges, which is also how many are kept."""
    total: int
    precision: float
    recall: float
    cross_entropy: float
    """Held-out cross-entropy from the target, of what was learned: nats per answer of a task, of `trigram` per
    position."""
    planted_cross_entropy: float
    """That of what was planted, with the same replacement."""
    seconds: float


def settings_of(what: str) -> str:
    return hashlib.blake2b(json.dumps(for_nodes(0.1, UNITS[what])).encode(), digest_size=4).hexdigest()


def run(planted: bc.PlantedAttention, what: str, seed: int, quick: bool = False) -> Row:
    """Learn the circuit at its own size, and compare it with the planted one."""
    started = time.perf_counter()
    full = bc.Circuit.full(planted.model, UNITS[what])
    truth = full.constant(False).keep(*(planted.edges if what == "edges" else planted.nodes.nodes))
    config = bc.SparsifyConfig(
        **for_nodes(truth.fraction, UNITS[what]) | ({"max_steps": 4} if quick else {}),
        target_fraction=truth.fraction, units=UNITS[what], seed=seed,
    )  # fmt: skip
    found = bc.find_circuit(planted.model, planted.target, planted.corpus, config, check_memory="off").circuit
    seconds = time.perf_counter() - started
    both = (found & truth).kept
    losses = [
        bc.evaluate(planted.model, one, planted.target, planted.corpus.held_out, controls=False).subnetwork
        for one in (found, truth.with_replacement(found.replacement))
    ]
    return Row(
        planted.kind, what, seed, settings_of(what), truth.kept, truth.total, round(both / found.kept, 4),
        round(both / truth.kept, 4), *(round(one.cross_entropy, 5) for one in losses), round(seconds, 1),
    )  # fmt: skip


def read(path: Path) -> list[Row]:
    """The rows of a results file that have the present settings."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**{one.name: record[one.name] for one in fields(Row)}) for record in map(json.loads, lines)]
    return [row for row in rows if row.settings == settings_of(row.what)]


def by_cell(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found = {
        cell: [row for row in rows if (row.kind, row.what) == cell and row.seed in SEEDS]
        for cell in itertools.product(KINDS, UNITS)
    }
    return {cell: group for cell, group in found.items() if group}


def table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| circuit | learned | seeds | planted | precision | recall | cross-entropy: learned | planted |"
    yield "|---|---|---|---|---|---|---|---|"
    for (kind, what), group in by_cell(rows).items():
        names = ("precision", "recall", "cross_entropy", "planted_cross_entropy")
        values = {name: [getattr(row, name) for row in group] for name in names}
        shares = [mean_and_least(values[name]) for name in names[:2]]
        losses = [f"{np.mean(values[name]):.4f}" for name in names[2:]]
        size = f"{group[0].planted} of {group[0].total}"
        start = (kind.replace("_", " "), what, len(group), size)
        yield "| " + " | ".join(map(str, [*start, *shares, *losses])) + " |"


def words(rows: Sequence[Row]) -> str:
    """What the table says."""
    groups = by_cell(rows)
    reached = [min(row.precision for row in group) >= WANTED <= min(row.recall for row in group)
               for group in groups.values()]  # fmt: skip
    return f"Precision and recall are at least {WANTED} with every seed in {sum(reached)} of {len(groups)} rows."


def page_with(page: str, rows: Sequence[Row]) -> str:
    """The page with what is between the markers written anew."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:start] + "\n\n" + "\n".join([*table(rows), "", words(rows)]) + "\n\n" + page[end:]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines, one for each run")
    parser.add_argument("--write", type=Path, help="the page to write the table into, such as docs/planted.md")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs; writes nothing")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.kinds, arguments.seeds = ["previous_token"], [0]
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    rows = [] if arguments.smoke else read(arguments.results)
    done = {(row.kind, row.what, row.seed) for row in rows}
    for kind, seed in itertools.product(arguments.kinds, arguments.seeds):
        missing: Iterable[str] = [what for what in UNITS if (kind, what, seed) not in done]
        planted = bc.plant_attention(kind, seed=seed) if missing else None
        for what in missing:
            assert planted is not None
            rows.append(row := run(planted, what, seed, arguments.smoke))
            print(
                f"{kind:<15} seed {seed} {what:<17}: precision {row.precision:.3f} recall {row.recall:.3f}, "
                f"cross-entropy {row.cross_entropy:.4f} ({row.seconds:.0f} s)", flush=True,
            )  # fmt: skip
            if not arguments.smoke:
                with arguments.results.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    print("\n".join([*table(rows), "", words(rows)]))
    if arguments.write and not arguments.smoke:
        arguments.write.write_text(page_with(arguments.write.read_text(), rows))


if __name__ == "__main__":
    main()
