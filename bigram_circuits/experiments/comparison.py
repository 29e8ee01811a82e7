"""Compare subnetworks, or circuits, of one model: their faithfulness, their settings and the overlap of each pair."""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations, count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bigram_circuits.analysis.overlap import overlap
from bigram_circuits.capacity import MaskCapacity
from bigram_circuits.circuit import Circuit
from bigram_circuits.evaluation import Evaluation
from bigram_circuits.experiments.seeds import Seeds, Spread, load_seeds, overlaps_of
from bigram_circuits.experiments.sparsity_path import is_path, load_path_runs, with_path_evaluation
from bigram_circuits.experiments.stricter import FOLDER, StricterTests, load_stricter
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.measures import statistics
from bigram_circuits.measures.quantities import FAITHFULNESS
from bigram_circuits.measures.results import Effects, Result
from bigram_circuits.measures.words import flat, listed, percent, rounded
from bigram_circuits.models.identity import how_models_differ
from bigram_circuits.runs import Run, load_run
from bigram_circuits.storage.files import write_text
from bigram_circuits.storage.records import read_tensors
from bigram_circuits.subnetwork import Subnetwork

Source: TypeAlias = Run | MaskLike | str | os.PathLike[str]
"""A run, a subnetwork or circuit, or what holds one; a run's folder, a path's folder (all its runs), or the file of a
subnetwork or circuit."""
SMALLEST = sys.float_info.min
"""Smaller p-values are reported as this one; their logarithm is exact."""
R, KL, CROSS_ENTROPY = "surprisal_correlation", "kl", "cross_entropy"
MOST_PAIRED = 32
"""Of so many subnetworks every pair is compared; of more, each is compared with one of them."""
_HASHED = {"target": "target.", "corpus.source": "corpus.fingerprint"}  # if the key differs, the hash adds nothing


@dataclass(frozen=True)
class Compared:
    """One of the subnetworks that are compared."""

    name: str
    """A name that no other has."""
    subnetwork: Mask
    """What it keeps: a subnetwork or a circuit."""
    run: Run | None = None
    """The run that found it, if known."""

    @property
    def evaluation(self) -> Evaluation | None:
        """Its evaluation; None if it was not evaluated."""
        return self.run.evaluation if self.run else None

    @cached_property
    def analyses(self) -> Mapping[str, Result]:
        """The results of `analyze`; empty if it was not analysed."""
        return self.run.analyses if self.run else {}

    @cached_property
    def seeds(self) -> Seeds | None:
        """What other seeds found, if its run is of several; None if it is of one."""
        return load_seeds(self.run.path, self.run) if self.run else None

    @cached_property
    def stricter(self) -> StricterTests:
        """What the stricter tests of its run found; empty if there are none."""
        return load_stricter(self.run.path / FOLDER, self.run) if self.run else StricterTests()

    @property
    def task(self) -> str:
        """Target and text it was measured on: numbers are comparable only within one task."""
        if self.run is None:
            return ""
        settings = self.run.settings
        text = self.run.evaluated_on or settings.corpus
        return repr((settings.target, replace(settings.corpus, source=None, fingerprint=text.fingerprint)))

    @property
    def is_evaluated(self) -> bool:
        """Whether it was evaluated."""
        return self.evaluation is not None

    @property
    def verdict(self) -> str:
        """The verdict of its evaluation; empty if it was evaluated without controls, or not at all."""
        return self.evaluation.verdict if self.evaluation and self.evaluation.advantage else ""

    @property
    def mask_capacity(self) -> MaskCapacity | None:
        """Whether its mask could hold the target; None if that was not measured."""
        return self.evaluation.mask_capacity if self.evaluation else None

    @property
    def within(self) -> str | None:
        """Checksum of the subnetwork that the search was restricted to; None if it was unrestricted."""
        return self.run.settings.within if self.run else None

    @cached_property
    def _rows(self) -> Mapping[str, Any]:
        """The rows of its evaluation, by condition."""
        return dict(self.evaluation.rows()) if self.evaluation else {}

    def measured(self, quantity: str, condition: str = "subnetwork") -> float | int | None:
        """A quantity of its evaluation; None if it was not measured or is undefined."""
        row = self._rows.get(condition)
        value = math.nan if row is None else row[quantity]
        return None if math.isnan(value) else value

    @property
    def rise_without(self) -> float | None:
        """Rise of the full model's loss without it, in nats; None if it was not measured."""
        without, full = (self.measured("mean_surprisal", one) for one in ("complement", "full"))
        return None if without is None or full is None else without - full

    def interval(self, quantity: str) -> tuple[float | None, float | None]:
        """Ends of the subnetwork's 95% interval of a quantity; (None, None) where it is undefined."""
        low, high = self.evaluation.interval("subnetwork", quantity) if self.evaluation else (math.nan, math.nan)
        return (None, None) if math.isnan(low) else (low, high)


@dataclass(frozen=True)
class Pair:
    """Two subnetworks and their overlap."""

    first: Compared
    """The first subnetwork, `a` of the overlap."""
    second: Compared
    """The second, `b` of the overlap."""
    effects: Effects
    """The result of `overlap(first, second, by="component")`."""
    log10_p: Mapping[str, float]
    """log10 of p after Holm's correction: for `all` over pairs, for a component over all components of all pairs."""

    @property
    def is_given(self) -> bool:
        """Whether one was searched for inside the other, so that their overlap is given by construction."""
        both = self.get("intersection")
        return any(one.within is not None and one.subnetwork.kept == both for one in (self.first, self.second))

    def get(self, quantity: str, stratum: str = "all") -> float:
        """A quantity of the overlap."""
        return self.effects.get(quantity)[stratum]

    def ratio(self, stratum: str = "all") -> float:
        """Weights kept by both over those expected by chance."""
        expected = self.get("expected", stratum)
        return self.get("intersection", stratum) / expected if expected else math.nan

    def p(self, stratum: str = "all") -> float:
        """P-value after Holm's correction; `SMALLEST` where it is too small for a float."""
        return max(SMALLEST, 10 ** self.log10_p[stratum])


@dataclass(frozen=True)
class Repetition:
    """One recipe that was run with several seeds."""

    members: tuple[str, ...]
    """Names of those compared that it found: several, or one whose run is itself of several seeds."""
    seeds: int
    """Number of seeds."""
    spreads: Mapping[str, Spread]
    """The headline numbers over seeds, by name; those that were not measured of all are left out."""
    overlaps: Effects
    """Overlap of each pair of seeds, overall and by component, with the exact null."""

    @property
    def name(self) -> str:
        """What it is called: its only member, or the first and how many others there are."""
        first, *others = self.members
        return f"{first} and {len(others)} of other seeds" if others else first

    def pairs(self, quantity: str) -> list[float]:
        """A quantity of the overlap of every pair of seeds, over all weights."""
        return [self.overlaps.get(quantity)[f"{pair}: all"] for pair in self.overlaps.notes["pairs"]]

    @property
    def times(self) -> list[float]:
        """What every pair of seeds shares, in times chance."""
        both = zip(self.pairs("intersection"), self.pairs("expected"), strict=True)
        return [shared / expected if expected else math.nan for shared, expected in both]


@dataclass(frozen=True)
class Comparison:
    """Subnetworks of one model, and their pairwise overlaps."""

    items: tuple[Compared, ...]
    """The subnetworks, in the order given."""
    pairs: tuple[Pair, ...]
    """Every pair of subnetworks that are not empty; or, with `against`, that one's pairs with each of the others."""
    against: str | None = None
    """Name of the subnetwork that each of the others is compared with; None if every pair is compared."""

    @property
    def units(self) -> str:
        """What they keep: `weights` or `nodes`."""
        return self.items[0].subnetwork.units

    @property
    def noun(self) -> str:
        """What they are: `subnetwork` or `circuit`."""
        return self.items[0].subnetwork.noun

    @cached_property
    def differing(self) -> Mapping[str, list[str | None]]:
        """The settings that differ between runs: name -> one value each, None where the run is unknown."""
        return differing_settings(self.items)

    @property
    def is_repetition(self) -> bool:
        """Whether all are runs that differ in the seed and nothing else: their differences are scatter."""
        return all(one.run for one in self.items) and set(self.differing) == {SEED}

    @cached_property
    def repetitions(self) -> tuple[Repetition, ...]:
        """The recipes of which several seeds are there: as runs that differ only in it, or within one run's folder."""
        groups: dict[str, list[Compared]] = {}
        for one in self.items:
            settings = _settings(one, {})
            if settings is not None:
                rest = sorted((name, value) for name, value in settings.items() if name != SEED)
                groups.setdefault(repr((rest, one.task)), []).append(one)
        return tuple(found for group in groups.values() if (found := _repetition(group)) is not None)

    def spread(self, quantity: str) -> Spread | None:
        """A quantity over all that were measured; None if none was."""
        known = list(known_values(self.items, quantity).values())
        return Spread.of(known) if known else None

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each: sizes, measurements with intervals, controls, settings that differ."""
        import pandas as pd

        table: dict[str, Any] = {
            "name": [one.name for one in self.items],
            "kept": [one.subnetwork.kept for one in self.items],
            "total": [one.subnetwork.total for one in self.items],
            "fraction": [one.subnetwork.fraction for one in self.items],
        }
        for quantity in (one.name for one in FAITHFULNESS):
            table[quantity] = [one.measured(quantity) for one in self.items]
            ends = [one.interval(quantity) for one in self.items]
            if any(low is not None for low, _ in ends):
                table[f"{quantity}_low"], table[f"{quantity}_high"] = zip(*ends, strict=True)
        for condition in ("random", "full", "complement"):
            for quantity in (R, "mean_surprisal"):
                table[f"{quantity}_{condition}"] = [one.measured(quantity, condition) for one in self.items]
        table |= self.differing
        table["folder"] = [str(one.run.path) if one.run else None for one in self.items]
        return pd.DataFrame(table)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_dataframe` as a CSV file, replacing an earlier one.

        Raises:
            OSError: If it cannot be written.
        """
        write_text(path, self.to_dataframe().to_csv(index=False))
        return Path(path)

    @property
    def shares(self) -> np.ndarray:
        """[row, column]: share of the row's weights that the column also keeps; nan on the diagonal."""
        return self._matrix("share_of_a_in_b", "share_of_b_in_a")

    @property
    def chances(self) -> np.ndarray:
        """[row, column]: the share expected by chance."""
        expected = self._matrix("expected", "expected")
        return expected / np.array([[max(one.subnetwork.kept, 1)] for one in self.items])

    def _matrix(self, above: str, below: str) -> np.ndarray:
        values = np.full((len(self.items), len(self.items)), np.nan)
        at = {one.name: place for place, one in enumerate(self.items)}
        for pair in self.pairs:
            i, j = at[pair.first.name], at[pair.second.name]
            values[i, j], values[j, i] = pair.get(above), pair.get(below)
        return values

    def __str__(self) -> str:
        numbers = [f"[{place}]" for place in range(1, len(self.items) + 1)]
        names = [f"{number} {one.name}" for number, one in zip(numbers, self.items, strict=True)]
        columns = [place for place, one in enumerate(self.items) if self.against in (None, one.name)]
        width = max(len(name) for name in names) + 2
        lines = [f"{'':<{width}}{'kept':>12}{'fraction':>10}{'r':>8}{'KL':>8}  {self.units} also kept by (by chance)"]
        lines.append(" " * (width + 38) + "".join(f"{numbers[place]:>17}" for place in columns))
        for name, one, shares, chances in zip(names, self.items, self.shares, self.chances, strict=True):
            r, kl = (_cell(one.measured(key)) for key in ("surprisal_correlation", "kl"))
            cells = [_share(shares[place], chances[place]) for place in columns]
            sizes = f"{one.subnetwork.kept:>12,}{percent(one.subnetwork.fraction):>10}"
            lines.append(f"{name:<{width}}{sizes}{r:>8}{kl:>8}{''.join(f'{cell:>17}' for cell in cells)}")
        spreads = {words: self.spread(key) for key, words in ((R, "r"), (KL, "KL"))} if self.is_repetition else {}
        told = [f"{words} {one.mean:.3f} (sd {one.deviation:.3f})" for words, one in spreads.items() if one]
        return "\n".join([*lines, *([f"They differ only in the seed; mean: {', '.join(told)}."] if told else [])])


def _cell(value: float | int | None) -> str:
    return "-" if value is None else rounded(value)


def _share(share: float, chance: float) -> str:
    return "-" if math.isnan(share) else f"{percent(float(share))} ({percent(float(chance))})"


def compare(runs: Mapping[str, Source] | Sequence[Source] | Source, *, against: str | None = None) -> Comparison:
    """Read runs or subnetworks and compute the overlap of each pair.

    Args:
        runs: At least two runs, subnetworks or circuits of one model, by name or in a sequence. A folder written by
            `find --sparsity-weights` stands for all its runs, and may be given alone. A run without a name is named
            after its folder, or after its settings that differ from the others' if its folder is named by a hash.
        against: Name of one of them: only the overlaps of the others with this one are computed. By default those of
            every pair; of more than 32 subnetworks, those with the first that keeps any weight.

    Raises:
        FileNotFoundError: If a folder holds no run, or a file does not exist.
        ValueError: If there are fewer than two, a file cannot be read, they are of different models, or none is
            named `against`.

    Example:
        >>> largest = bc.Subnetwork.magnitude(model, like=found)
        >>> bc.compare({"found": found, "largest": largest}).to_dataframe()
    """
    is_one = isinstance(runs, Run | Subnetwork | Circuit | str | os.PathLike)
    several: Any = [runs] if is_one or hasattr(runs, "subnetwork") or hasattr(runs, "circuit") else runs
    by_name = isinstance(several, Mapping)
    labelled = [
        (label, subnetwork, run)
        for name, source in (several.items() if by_name else ((None, source) for source in several))
        for label, subnetwork, run in _opened(source, name)
    ]
    if len(labelled) < 2:
        raise ValueError(f"a comparison needs at least two runs or subnetworks, not {len(labelled)}")
    names = _distinct([label for label, *_ in labelled], shortest=not by_name)
    items = tuple(Compared(name, subnetwork, run) for name, (_, subnetwork, run) in zip(names, labelled, strict=True))
    if not by_name:
        items = _named_by_settings(items)
    _check_one_model(items)
    if against is not None and against not in [one.name for one in items]:
        raise ValueError(f"none of them is named {against!r}: they are {listed([one.name for one in items])}")
    if against is None and len(items) > MOST_PAIRED:
        against = next((one.name for one in items if one.subnetwork.kept), items[0].name)
    return Comparison(items, _pairs(items, against), against)


# --- reading and naming ---

_Label: TypeAlias = tuple[str, ...]  # parts of a name; the last is shown first, others only if needed


def _opened(source: Any, name: str | None) -> Iterator[tuple[_Label, Mask, Run | None]]:
    """The subnetworks or circuits in a source, with the parts of their names and their runs."""
    if isinstance(source, Run):
        run = with_path_evaluation(source)
        yield (name,) if name else _parts(run.path), run.mask, run
    elif not isinstance(source, str | os.PathLike):
        try:
            held = as_mask(source)
        except ValueError:
            what = "give runs, subnetworks, circuits, folders or files"
            raise ValueError(f"cannot compare a {type(source).__name__}: {what}") from None
        yield (name or held.lineage,), held, None
    elif Path(source).is_file():
        path = Path(source)
        label = (*_parts(path)[:-1], path.stem)
        yield (name,) if name else label, _loaded(path), None
    elif is_path(source):
        for run in load_path_runs(source):
            yield (name, run.path.name) if name else _parts(run.path), run.mask, run
    else:
        yield from _opened(load_run(source, history=False), name)


def _loaded(path: Path) -> Mask:
    """The subnetwork or circuit in a file."""
    _, metadata = read_tensors(path, "is not a subnetwork file")
    return (Circuit if metadata.get("format") == Circuit.file_format else Subnetwork).load(path)


def _parts(path: Path) -> _Label:
    return path.absolute().parts[1:] or (str(path),)


def _distinct(labels: Sequence[_Label], *, shortest: bool) -> list[str]:
    """A distinct name for each: as few trailing parts as needed; identical labels are numbered."""
    depths = {label: 1 if shortest else len(label) for label in labels}
    while True:
        names = {label: printable("/".join(label[-depth:])) for label, depth in depths.items()}
        counts = Counter(names.values())
        short = [label for label, name in names.items() if counts[name] > 1 and depths[label] < len(label)]
        if not short:
            break
        depths |= {label: depths[label] + 1 for label in short}
    return numbered([names[label] for label in labels])


def numbered(names: Sequence[str]) -> list[str]:
    """Distinct names: those that occurred before get a number."""
    taken: dict[str, None] = {}
    for name in names:
        candidates = (f"{name} ({number})" if number > 1 else name for number in count(1))
        taken[next(one for one in candidates if one not in taken)] = None
    return list(taken)


def printable(name: str) -> str:
    """A name on one line, without control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split()) or "unnamed"


_HASH = re.compile(r".+-[0-9a-f]{8}")  # the default folder of a run: its model, and a hash of its settings
_MOST_SETTINGS = 3  # in a name
_LONGEST_SETTING = 24  # characters


def _named_by_settings(items: tuple[Compared, ...]) -> tuple[Compared, ...]:
    """Runs in folders that are named by a hash, named after the settings that differ instead."""
    hashed = [one.run is not None and _HASH.fullmatch(one.run.path.name) is not None for one in items]
    if not any(hashed):
        return items
    differing = differing_settings(items)
    if not 0 < len(differing) <= _MOST_SETTINGS:
        return items
    words = dict(zip(differing, short_settings(list(differing)), strict=True))
    names = []
    for place, one in enumerate(items):
        values = {name: values[place] or "" for name, values in differing.items()}
        is_short = hashed[place] and all(len(value) <= _LONGEST_SETTING for value in values.values())
        name = ", ".join(f"{words[name]} {value}" for name, value in values.items())
        names.append(printable(name) if is_short else one.name)
    return tuple(replace(one, name=name) for one, name in zip(items, numbered(names), strict=True))


def _check_one_model(items: Sequence[Compared]) -> None:
    """Raise ValueError unless all have the same matrices and, as far as known, the same weights."""
    first = items[0]
    hashed: Compared | None = None
    for other in items:
        if first.subnetwork.noun != other.subnetwork.noun:
            kinds = f"{first.name!r} is a {first.subnetwork.noun}, {other.name!r} a {other.subnetwork.noun}"
            raise ValueError(f"{kinds}: compare those of one kind")
        ours, theirs = first.subnetwork.shapes, other.subnetwork.shapes
        for matrix in (*ours, *theirs):
            if ours.get(matrix) != theirs.get(matrix):
                what = "of different models" if first.subnetwork.units == "weights" else "over different nodes"
                shapes = f"{matrix} has shape {ours.get(matrix)} in the one, {theirs.get(matrix)} in the other"
                raise ValueError(f"{first.name!r} and {other.name!r} are {what}: {shapes}")
        if hashed is None:
            hashed = other if _weight_hash(other) else None
        elif (its := _weight_hash(other)) and (how := how_models_differ(_weight_hash(hashed) or "", its)):
            raise ValueError(f"{hashed.name!r} and {other.name!r} are of different models: {how}")


def _weight_hash(one: Compared) -> str | None:
    return one.subnetwork.weight_hash or (one.run.settings.model.weight_hash if one.run else None)


def _pairs(items: Sequence[Compared], against: str | None) -> tuple[Pair, ...]:
    chosen = combinations(items, 2) if against is None else _with_one(items, against)
    found = [
        (a, b, overlap(a.subnetwork, b.subnetwork, by="component"))
        for a, b in chosen
        if a.subnetwork.kept and b.subnetwork.kept
    ]
    families: list[list[tuple[int, str]]] = [[], []]  # overlaps of all weights, of undetermined components
    for place, (_, _, effects) in enumerate(found):
        for name, deviation in effects.get("sd").items():
            if name == "all" or deviation > 0:
                families[name != "all"].append((place, name))
    logs: list[dict[str, float]] = [dict.fromkeys(effects.names, 0.0) for *_, effects in found]
    for family in families:
        adjusted = statistics.holm([found[place][2].get("log10_p")[name] * math.log(10) for place, name in family])
        for (place, name), log_p in zip(family, adjusted, strict=True):
            logs[place][name] = log_p / math.log(10)
    return tuple(Pair(*one, log10_p) for one, log10_p in zip(found, logs, strict=True))


def _with_one(items: Sequence[Compared], name: str) -> Iterator[tuple[Compared, Compared]]:
    """The pairs of the subnetwork of this name with each of the others."""
    one = next(item for item in items if item.name == name)
    return ((one, other) for other in items if other is not one)


# --- what was measured ---


def known_values(items: Sequence[Compared], quantity: str) -> dict[str, float | int]:
    """A quantity by subnetwork name, where it was measured and is defined."""
    known = {one.name: one.measured(quantity) for one in items}
    return {name: value for name, value in known.items() if value is not None}


def measured_tasks(items: Sequence[Compared], quantity: str) -> list[str]:
    """The distinct tasks (target and text) on which a quantity was measured."""
    return list(dict.fromkeys(one.task for one in items if one.measured(quantity) is not None))


def not_dominated(items: Sequence[Compared], quantity: str, task: str) -> list[int]:
    """Indices of the Pareto front of one task (size against a quantity), ordered by fraction.

    Higher is better for r, lower for other quantities. Of equal subnetworks the first is kept.
    """
    sign = -1 if quantity == R else 1
    known = {
        place: (one.subnetwork.fraction, sign * value, place)
        for place, one in enumerate(items)
        if one.task == task and (value := one.measured(quantity)) is not None
    }
    front: list[int] = []
    for place in sorted(known, key=lambda one: known[one]):
        if not front or known[place][1] < known[front[-1]][1]:
            front.append(place)
    return front


def leaders(items: Sequence[Compared], quantity: str) -> list[str]:
    """Names of those that may be the best at a quantity: their intervals overlap the interval of the best.

    Higher is better for r, lower for other quantities. Empty if an interval is unknown, so that nothing can be ranked.
    KL goes by the intervals of the cross-entropy, from which it differs by a constant on the same text.
    """
    sign, bounded = (-1 if quantity == R else 1), (CROSS_ENTROPY if quantity == KL else quantity)
    known = [one for one in items if one.measured(quantity) is not None]
    ends = {one.name: _ordered(one.interval(bounded), sign) for one in known}
    if not known or None in ends.values():
        return []
    best = min(known, key=lambda one: sign * (one.measured(quantity) or 0.0))
    worst_of_best = ends[best.name][1]  # pyright: ignore[reportOptionalSubscript]
    return [name for name, pair in ends.items() if pair is not None and pair[0] <= worst_of_best]


def clearly_dominated(items: Sequence[Compared], quantity: str, task: str) -> list[int]:
    """Indices of those that another of the same task beats beyond doubt, with at most as many weights.

    Beyond doubt: the intervals do not overlap. `not_dominated` goes by the values alone.
    """
    sign, bounded = (-1 if quantity == R else 1), (CROSS_ENTROPY if quantity == KL else quantity)
    known = [
        (one.subnetwork.fraction, ends, place)
        for place, one in enumerate(items)
        if one.task == task and (ends := _ordered(one.interval(bounded), sign)) is not None
    ]
    beaten, least = [], math.inf  # the smallest worse end among those with fewer weights
    for _, (better, worse), place in sorted(known):
        if better > least:
            beaten.append(place)
        least = min(least, worse)
    return sorted(beaten)


def _ordered(ends: tuple[float | None, float | None], sign: int) -> tuple[float, float] | None:
    """The better and the worse end of an interval, both times `sign`; None if there is none."""
    low, high = ends
    if low is None or high is None:
        return None
    return (low, high) if sign > 0 else (-high, -low)


# --- seeds ---


def _repetition(group: Sequence[Compared]) -> Repetition | None:
    """What the seeds of one recipe show; None if there is one seed."""
    by_seed = {one.run.settings.recipe.seed: one for one in group if one.run}
    names = tuple(one.name for one in group)
    if len(by_seed) > 1:
        members = list(by_seed.values())
        numbers = {key: [read(one) for one in members] for key, read in HEADLINES.items()}
        known = {key: [v for v in values if v is not None] for key, values in numbers.items()}
        spreads = {key: Spread.of(values) for key, values in known.items() if len(values) == len(members)}
        return Repetition(names, len(members), spreads, overlaps_of({one.name: one.subnetwork for one in members}))
    several = next((one.seeds for one in group if one.seeds is not None), None)
    if several is None:
        return None
    table = zip(several.spread.names, several.spread.values.T.tolist(), strict=True)
    spreads = {key: Spread(*row) for key, row in table if key in HEADLINES and not math.isnan(row[0])}
    return Repetition(names, len(several.seeds), spreads, several.overlaps)


HEADLINES: Mapping[str, Callable[[Compared], float | int | None]] = {
    "fraction": lambda one: one.subnetwork.fraction,
    **{key: partial(Compared.measured, quantity=key) for key in (R, KL, CROSS_ENTROPY, "mean_surprisal")},
    "r_of_random": lambda one: one.measured(R, "random"),
    "rise_without": lambda one: one.rise_without,
}
"""The numbers whose spread over seeds is told, as `Seeds.spread` names them, and how each is read from a run."""


# --- settings ---

SEED = "recipe.seed"
"""The setting that differs between repetitions."""


def short_settings(settings: Sequence[str]) -> list[str]:
    """The last part of each setting's name, where it is unique."""
    last = [name.rsplit(".", 1)[-1] for name in settings]
    chosen = [short if last.count(short) == 1 else name for name, short in zip(settings, last, strict=True)]
    return [name.replace("_", " ").replace(".", " ") for name in chosen]


def differing_settings(items: Sequence[Compared]) -> dict[str, list[str | None]]:
    """The settings that differ between runs: name -> one value each, None where the run is unknown."""
    named = {one.subnetwork.checksum: one.name for one in items} if any(one.within for one in items) else {}
    known = [_settings(one, named) for one in items]
    names = list(dict.fromkeys(name for settings in known if settings for name in settings))
    columns = {name: [settings.get(name, "not set") if settings else None for settings in known] for name in names}
    columns = {name: values for name, values in columns.items() if len(set(values) - {None}) > 1}
    hidden = tuple(prefix for name, prefix in _HASHED.items() if name in columns)
    return {name: values for name, values in columns.items() if not (hidden and name.startswith(hidden))}


def _settings(one: Compared, named: Mapping[str, str]) -> dict[str, str] | None:
    if one.run is None:
        return None
    settings = {"target": one.run.target_words[0]} | dict(flat(one.run.settings.to_json()))
    within = settings.get("within")
    return settings | ({"within": named.get(within, within)} if within else {})
