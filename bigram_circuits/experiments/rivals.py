"""Rival masks: others of the same size that do the same with as little in common as can be.

Circuits of the same accuracy can share almost nothing ("All Circuits Lead to Rome", 2026), and other seeds of one
recipe do not show it, since they tend to find the same weights again. So each further mask is learned apart from all
earlier ones: beside the penalty of the recipe, sharing costs an overlap weight (`find_subnetwork`, `apart_from`). What
is then said of "the circuit" should be said of what its rivals have in common, or of each of them.

A mask counts as a rival if the 95% interval of what it recovers of the information that the first mask recovers lies
above 95%, and its Jaccard index with every earlier one is below 0.95. That information is 1 - KL / KL0 (KL0 is that of
the best constant prediction, as in `falsification.py`); where a target has no such number, as a task has none, it is
the fall of the cross-entropy from that of the empty mask.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import and_, or_
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.analysis.overlap import jaccard, overlap
from bigram_circuits.circuit import Circuit
from bigram_circuits.evaluation import Measured, measure
from bigram_circuits.learning.ranks import refuse_several
from bigram_circuits.learning.training import find_mask
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.masking.candidates import OVERLAP_WEIGHT, Candidates
from bigram_circuits.measures import html
from bigram_circuits.measures.quantities import (
    CONTEXT_TOLD,
    CROSS_ENTROPY,
    FRACTION,
    KL,
    SURPRISAL_CORRELATION,
    Quantity,
)
from bigram_circuits.measures.results import Curves, Effects, Ends, effects_of, load_result_and_origin
from bigram_circuits.measures.statistics import STATISTICS, ContextTold, Statistic, interval
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.runs.folder import MASKS
from bigram_circuits.storage.files import remove_leftovers
from bigram_circuits.storage.locks import lock_folder
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import check_no_link
from bigram_circuits.targets.base import Target, kl_of_best_constant, target_of
from bigram_circuits.text.corpus import Corpus

ENOUGH = 0.95
"""Share of what the first mask recovers that a rival recovers."""
SAME = 0.95
"""Jaccard index from which two masks are the same one."""
FIRST, FULL = "first", "full"
"""The mask that the others are rivals of, and the full model."""
ALONE = "core alone"
"""How the names of rows of `cores` end that are of the core alone."""

RECOVERED = Quantity("recovered", "share", "Of the information about the target that the first mask recovers.")
_OVERLAP = (
    Quantity("jaccard", "share", "Kept by both this mask and the first, as a share of what either keeps."),
    Quantity("times_chance", "", "Kept by both, over the expectation for as many draws in every matrix."),
    Quantity("log10_p", "", "log10 of the exact p-value of an overlap that is as large, by chance."),
    Quantity("most_jaccard", "share", "The largest such share with one of the earlier masks."),
    Quantity("share_of_earlier", "share", "Of what it keeps, the share that one of the earlier masks keeps too."),
    Quantity("times_chance_earlier", "", "Kept also by an earlier mask, over its expectation."),
    Quantity("log10_p_earlier", "", "log10 of the exact p-value of an overlap with them that is as large."),
)
_MEASURED = (SURPRISAL_CORRELATION, KL, CROSS_ENTROPY, CONTEXT_TOLD, FRACTION)
_GAPS = (
    Quantity("r_gap", "", "Pearson r minus that of the first mask."),
    Quantity("kl_gap", "nats", "KL minus that of the first mask."),
    Quantity("cross_entropy_gap", "nats", "Cross-entropy minus that of the first mask."),
)


@dataclass(frozen=True)
class Rivals:
    """Masks of one size for one target, learned with as little in common as can be.

    Example:
        >>> found_rivals = bc.rivals(model, target, corpus, k=2, first=found, config=config)
        >>> found_rivals.verdict  # whether another mask does the same, in words
        >>> found_rivals.save("runs/rivals")
    """

    masks: tuple[Mask, ...] = field(repr=False)
    """The first mask and the others, as in `measured`."""
    measured: Effects
    """A row for each mask: what it shares with the first and with all earlier ones (of its overlap weight), beside
    chance and with the exact p-value; r, KL, cross-entropy, context told and its share of the first's, with 95%
    intervals, and the differences from the first, which are paired. Overlaps are of what the recipe can drop."""
    cores: Effects
    """For each overlap weight: what the shared core (kept by all) does alone, and the model without the core, and
    without all that any of them keeps; and the full model."""
    of: Origin | None = None
    """The first mask and the text."""

    @property
    def rivals(self) -> tuple[str, ...]:
        """Names of the masks that are rivals of the first."""
        return tuple(name for name in self.measured.names if self.finding(name) == "rival")

    @property
    def verdict(self) -> str:
        """What was found, in a sentence or two."""
        findings = {name: self.finding(name) for name in self.measured.names if name != FIRST}
        if self.rivals:
            return self._rivals_words()
        if "unclear" in findings.values():
            names = [name for name, one in findings.items() if one == "unclear"]
            return (
                f"Undecided: of {', '.join(map(self._words, names))} the interval includes {100 * ENOUGH:.0f}%; "
                "more held-out text would decide it."
            )
        worse = [name for name, one in findings.items() if one == "worse"]
        if not worse:
            least = min(self.measured.get("most_jaccard")[name] for name in findings)
            return f"No rival: what is found is an earlier mask again (Jaccard at least {least:.3f})."
        best = max(worse, key=lambda name: self.measured.get("recovered")[name])
        return f"No rival: masks with less in common do worse. The best of them, {self._words(best)}."

    def finding(self, name: str) -> str:
        """What a mask is: `rival`, `same` (as an earlier mask), `worse`, or `unclear`."""
        at = self.measured.names.index(name)
        if self.measured.get("most_jaccard")[name] >= SAME:
            return "same"
        if self.measured.low[0, at] >= ENOUGH:
            return "rival"
        return "worse" if self.measured.high[0, at] < ENOUGH else "unclear"

    def _rivals_words(self) -> str:
        """A sentence about the overlap weight with the most rivals, and of these the one with the smallest core."""
        groups = {weight: [name for name in self.rivals if _weight_of(name) == weight] for weight in self._weights}
        cores = self.cores.get("share_of_first")
        chosen = max(groups, key=lambda weight: (len(groups[weight]), -cores[f"{weight}: {ALONE}"]))
        names = groups[chosen]
        shared = reduce(and_, (self.masks[self.measured.names.index(name)] for name in (FIRST, *names)))
        of_all = shared.kept / self.masks[0].kept
        indices = [self.measured.get("jaccard")[name] for name in names]
        times = [self.measured.get("times_chance")[name] for name in names]
        least = min(names, key=lambda name: self.measured.get("recovered")[name])
        return (
            f"Rivals: {1 + len(names)} masks of {self.masks[0].kept:,} {self.masks[0].units} that have "
            f"{100 * of_all:.0f}% of these in common do the same ({chosen}; Jaccard with the first "
            f"{_range(indices, 2)}, {_range(times, 1)} times chance). The least faithful, {self._words(least)}."
        )

    def _words(self, name: str) -> str:
        at = self.measured.names.index(name)
        value, low, high = (100 * part[0, at] for part in (self.measured.values, self.measured.low, self.measured.high))
        return (
            f"{name}, with Jaccard {self.measured.get('jaccard')[name]:.2f}, recovers {value:z.1f}% of what the first "
            f"does (95% interval {low:z.1f}% to {high:z.1f}%)"
        )

    @property
    def _weights(self) -> list[str]:
        return list(dict.fromkeys(_weight_of(name) for name in self.measured.names if name != FIRST))

    def plot(self, quantity: str = "recovered") -> Any:
        """A plotly figure of a quantity of the masks by their Jaccard index with the first."""
        order = np.argsort([self.measured.get("jaccard")[name] for name in self.measured.names], kind="stable")
        parts = [part[:, None, order] for part in (self.measured.values, self.measured.low, self.measured.high)]
        points = tuple(np.round(parts[0][self._place("jaccard"), 0], 4).tolist())
        axis = "overlap with the first (Jaccard)"
        return Curves(self.measured.title, self.measured.quantities, axis, points, ("masks",), *parts).plot(quantity)

    def _place(self, quantity: str) -> int:
        return self.measured.quantities.index(self.measured.quantity(quantity))

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each mask."""
        return self.measured.to_dataframe()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write results and masks to a folder."""
        for at, mask in enumerate(self.masks):
            mask.save(Path(folder) / _file_of(at, mask.noun))
        for name in _PARTS:
            getattr(self, name).save(Path(folder) / f"{name}.json", self.of)

    def __str__(self) -> str:
        rows = [f"{'mask':<24}{'Jaccard':>9}{'x chance':>10}{'r':>8}{'KL':>8}{'recovered':>11}{'95% interval':>20}"]
        keys = ("jaccard", "times_chance", "surprisal_correlation", "kl", "recovered")
        for at, name in enumerate(self.measured.names):
            index, times, r, kl, recovered = (self.measured.get(key)[name] for key in keys)
            ends = f"{self.measured.low[0, at]:.3f} to {self.measured.high[0, at]:.3f}" if name != FIRST else ""
            rows.append(f"{name:<24}{index:>9.3f}{times:>10.1f}{r:>8.3f}{kl:>8.3f}{recovered:>11.3f}{ends:>20}")
        rows += ["", f"{'':<34}{'kept':>10}{'r':>8}{'KL':>8}{'recovered':>11}"]
        for name in self.cores.names:
            kept, r, kl, recovered = (
                self.cores.get(key)[name] for key in ("kept", "surprisal_correlation", "kl", "recovered")
            )
            rows.append(f"{name:<34}{kept:>10,.0f}{r:>8.3f}{kl:>8.3f}{recovered:>11.3f}")
        return "\n".join([self.measured.title, *rows, "", self.verdict])

    def _repr_html_(self) -> str:
        """HTML for notebooks: the verdict, and both tables."""
        tables = (part._repr_html_() for part in (self.measured, self.cores))  # pyright: ignore[reportPrivateUsage]
        return html.summary(self.measured.title, [self.verdict], *tables)


_PARTS = ("measured", "cores")
_WITHOUT_CORE, _WITHOUT_ALL = "without the core", "without all of them"


def _weight_of(name: str) -> str:
    """The overlap weight in the name of a mask."""
    return name.split(":")[0]


def _file_of(at: int, noun: str) -> str:
    return f"mask-{at}.{noun}.safetensors"


def _range(values: Sequence[float], digits: int) -> str:
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values)))
    return " to ".join(ends)


def load_rivals(folder: str | os.PathLike[str]) -> Rivals | None:
    """Read what `Rivals.save` wrote; None if the folder holds none.

    Raises:
        ValueError: If a file is damaged, missing, a symbolic link, or not of these rivals.

    Example:
        >>> bc.load_rivals("runs/short") is None  # nobody has looked for rivals in this folder
        True
    """
    paths = {name: Path(folder) / f"{name}.json" for name in _PARTS}
    if not all(path.is_file() for path in paths.values()):
        return None
    read = {name: load_result_and_origin(path, follow=False) for name, path in paths.items()}
    measured, of = read["measured"]
    cores, _ = read["cores"]
    if not (isinstance(measured, Effects) and isinstance(cores, Effects) and "masks" in measured.notes):
        raise ValueError(f"{str(folder)!r} holds results of another kind, not those of `rivals`")
    noun, checksums = measured.notes["noun"], measured.notes["masks"]
    if noun not in MASKS or len(checksums) != len(measured.names):
        raise ValueError(f"{str(folder)!r} holds {len(checksums)} {noun}s for {len(measured.names)} names")
    masks = tuple(
        MASKS[noun].load(Path(folder) / _file_of(at, noun), follow_links=False) for at in range(len(checksums))
    )
    wrong = [at for at, (mask, wanted) in enumerate(zip(masks, checksums, strict=True)) if mask.checksum != wanted]
    if wrong:
        raise ValueError(f"{str(Path(folder) / _file_of(wrong[0], noun))!r} is another mask than the one measured")
    return Rivals(masks, measured, cores, of)


@uses_model
def rivals(
    model: Model,
    target: Any,
    corpus: Corpus,
    k: int = 3,
    overlap_weight: float | int | Sequence[float | int] = OVERLAP_WEIGHT,
    *,
    config: SparsifyConfig | None = None,
    size: float | None = None,
    first: MaskLike | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    check_memory: str = "warn",
) -> Rivals:
    """Find masks of one size that do the same with as little in common as can be, one after another.

    It takes `k` - 1 times as long as finding a mask for each overlap weight.

    Args:
        model: From `load_model`.
        target: As for `find_subnetwork`, or for a recipe with `units`, as for `find_circuit`.
        corpus: Masks are learned on its training part and measured on its held-out part.
        k: Number of masks, with the first one; at least 2.
        overlap_weight: What it costs to keep what an earlier mask keeps, in nats, as for `find_subnetwork`; 0 gives
            other seeds, `math.inf` masks that share nothing. Several give a curve of overlap against faithfulness.
        config: The recipe, `SparsifyConfig()` by default. The rivals have the seeds after its own, and the size of the
            first mask as `target_fraction`.
        size: Share of the weights or nodes to keep; by default that of the first mask.
        first: The mask to find rivals of; by default it is found by the recipe (at `size`, if that is given).
        run_dir: A folder for the runs and the results; runs that are already there are reused.
        check_memory: As for `find_subnetwork`.

    Raises:
        ValueError: If an argument is out of range, both `size` and `first` are given, the first mask is of other units
            than the recipe or keeps nothing that the recipe can drop, the recipe polishes, or model, target and corpus
            do not fit together.
        OSError: If another process is writing to `run_dir`, or it cannot be written.

    Example:
        >>> found_rivals = bc.rivals(model, target, corpus, k=2, first=found, config=config)
        >>> print(len(found_rivals.masks))
        2
    """
    refuse_several("rivals")
    weights = [overlap_weight] if isinstance(overlap_weight, int | float) else list(overlap_weight)
    _check(k, weights, size, first)
    target, config = target_of(target, model), config or SparsifyConfig()
    if config.polish:
        raise ValueError("rivals are not polished, which would share weights again: leave polish out of the recipe")
    if size is not None:
        config = replace(config, target_fraction=size)
    search = _Search(model, target, corpus, config, None if run_dir is None else Path(run_dir), check_memory)
    if run_dir is None:
        return search.run(k, weights, first)
    check_no_link(run_dir)
    with lock_folder(run_dir):
        remove_leftovers(Path(run_dir))
        found = search.run(k, weights, first)
        found.save(run_dir)
    return found


def _check(k: int, weights: Sequence[float | int], size: float | None, first: MaskLike | None) -> None:
    if k < 2:
        raise ValueError(f"k counts the first mask too, so it is at least 2, not {k}")
    if not weights or not all(weight >= 0 for weight in weights) or len(set(weights)) < len(weights):
        raise ValueError(f"overlap_weight must be a number of at least 0, or several different ones, not {weights}")
    if size is not None and first is not None:
        raise ValueError("rivals have the size of the first mask: give size or first, not both")


@dataclass(frozen=True)
class _Search:
    """What rivals are looked for with."""

    model: Model
    target: Target
    corpus: Corpus
    config: SparsifyConfig
    folder: Path | None
    check_memory: str

    def run(self, k: int, weights: Sequence[float | int], given: MaskLike | None) -> Rivals:
        """Find the masks, and measure them."""
        candidates = Candidates(self.model, self.config)
        first = self._first(candidates, given)
        droppable = candidates.droppable
        if not (first & droppable).kept:
            raise ValueError(f"the first mask keeps none of the {first.units} that the recipe can drop")
        groups = {weight: self._apart(first, k, weight) for weight in weights}
        judge = _Judge.of(self, first)
        measured, cores = {FIRST: judge.row(first, [first], droppable)}, {}
        for weight, others in groups.items():
            label, masks = f"weight {weight:g}", [first, *others]
            for at in range(1, k):
                measured[f"{label}: rival {at}"] = judge.row(masks[at], masks[:at], droppable)
            core, union = reduce(and_, masks), reduce(or_, masks)
            parts = {ALONE: core, _WITHOUT_CORE: ~(core & droppable), _WITHOUT_ALL: ~(union & droppable)}
            cores |= {f"{label}: {name}": judge.core_row(part, core, droppable) for name, part in parts.items()}
        cores[FULL] = judge.core_row(first.constant(True), first.constant(True), droppable)
        everyone = (first, *(mask for others in groups.values() for mask in others))
        notes = {"noun": first.noun, "units": first.units, "masks": [one.checksum for one in everyone]}
        of_all = (Quantity("kept", first.units, f"{first.units.capitalize()} kept."), _SHARE, RECOVERED, *_MEASURED)
        of_each = (RECOVERED, *_OVERLAP, *_MEASURED, *_GAPS)
        return Rivals(
            everyone,
            effects_of(f"Rivals of a {first.noun} of {first.kept:,} {first.units}", of_each, "mask", measured, notes),
            effects_of("What all of them share, and the model without it", of_all, "condition", cores),
            Origin(None, first.checksum, self.corpus.fingerprint, self.corpus.source),
        )

    def _first(self, candidates: Candidates, given: MaskLike | None) -> Mask:
        """The mask that the others are rivals of."""
        if given is None:
            return self._learn("first", self.config)
        first = as_mask(given)
        candidates.check_covers(first, "first")
        if candidates.total != first.total:
            raise ValueError(f"the recipe is of {candidates.total:,} {first.units}, the first mask of {first.total:,}")
        if isinstance(first, Circuit) and first.replacement.kind != self.config.replace:
            raise ValueError(
                f"the recipe replaces nodes by {self.config.replace}, the first circuit by {first.replacement.kind}"
            )
        return first

    def _apart(self, first: Mask, k: int, weight: float | int) -> list[Mask]:
        """The other masks of an overlap weight."""
        masks = [first]
        for at in range(1, k):
            recipe = replace(self.config, target_fraction=first.kept / first.total, seed=self.config.seed + at)
            how: dict[str, Any] = {"apart_from": tuple(masks), "overlap_weight": weight}
            masks.append(self._learn(f"weight-{weight:g}-rival-{at}", recipe, **how))
        return masks[1:]

    def _learn(self, name: str, recipe: SparsifyConfig, **how: Any) -> Mask:
        to = None if self.folder is None else self.folder / name
        if to is not None:
            check_no_link(to)
        how |= {"run_dir": to, "check_memory": self.check_memory}
        return find_mask(self.model, self.target, self.corpus, recipe, **how).mask


# --- what is measured ------------------------------------------------------------------------------------------------

_SHARE = Quantity("share_of_first", "share", "What all of them keep, over what the first mask keeps.")


@dataclass(frozen=True)
class _Judge:
    """Measures masks on the held-out text, and compares them with the first."""

    measure: Callable[[Mask], Measured]
    told: ContextTold
    first: Mask
    of_first: Measured
    empty: Measured

    @classmethod
    def of(cls, search: _Search, first: Mask) -> _Judge:
        text = search.corpus.held_out

        def measured(mask: Mask) -> Measured:
            return measure(search.model, mask, search.target, text)

        told = ContextTold(kl_of_best_constant(search.target, text))
        return cls(measured, told, first, measured(first), measured(first.constant(False)))

    def row(self, mask: Mask, earlier: Sequence[Mask], droppable: Mask) -> list[Ends]:
        """Overlap, faithfulness, and the differences from the first mask."""
        one = self.of_first if mask is self.first else self.measure(mask)
        gaps = [one.minus(self.of_first, STATISTICS[key]) for key in ("surprisal_correlation", "kl", "cross_entropy")]
        own = mask & droppable
        index, _, *chance = _shared(own, self.first & droppable)
        _, *of_earlier = _shared(own, reduce(or_, earlier) & droppable)
        most = max(jaccard(own, one & droppable) for one in earlier)
        overlaps = [(value, math.nan, math.nan) for value in (index, *chance, most, *of_earlier)]
        return [self._recovered(one), *overlaps, *self._numbers(one), *gaps]

    def core_row(self, mask: Mask, core: Mask, droppable: Mask) -> list[Ends]:
        """What the core does, or the model without it."""
        one = self.measure(mask)
        share = (core & droppable).kept / (self.first & droppable).kept
        sizes = [(value, math.nan, math.nan) for value in (float(mask.kept), share)]
        return [*sizes, self._recovered(one), *self._numbers(one)]

    def _numbers(self, one: Measured) -> list[Ends]:
        """Each of `_MEASURED`."""
        row: list[Ends] = []
        for quantity in _MEASURED:
            statistic: Statistic | None = self.told if quantity is CONTEXT_TOLD else STATISTICS.get(quantity.name)
            if statistic is None:
                row.append((getattr(one.faithfulness, quantity.name), math.nan, math.nan))
            else:
                row.append((float(statistic(one.sums.sum(0))), *one.interval(statistic)))
        return row

    def _recovered(self, one: Measured) -> Ends:
        """Its share of the information that the first mask recovers; nan if that recovers none."""
        value = self._share(one.sums.sum(0), self.of_first.sums.sum(0), self.empty.sums.sum(0))
        draws = self._share(one.draws, self.of_first.draws, self.empty.draws)
        return float(value), *interval(draws)

    def _share(self, own: np.ndarray, of_first: np.ndarray, of_empty: np.ndarray) -> np.ndarray:
        if math.isnan(self.told(of_first.reshape(-1, of_first.shape[-1])[0])):
            loss = STATISTICS["cross_entropy"]
            gained, possible = loss(of_empty) - loss(own), loss(of_empty) - loss(of_first)
        else:
            gained, possible = self.told(own), self.told(of_first)
        return np.where(possible > 0, gained / np.where(possible > 0, possible, 1.0), math.nan)


def _shared(a: Mask, b: Mask) -> tuple[float, float, float, float]:
    """Jaccard index, share of a in b, intersection over its expectation, log10 of the p-value; nan if a is empty."""
    if not a.kept:
        return 0.0, math.nan, math.nan, math.nan
    values = {name: overlap(a, b).get(name)["all"] for name in _OF_OVERLAP}
    times = values["intersection"] / values["expected"] if values["expected"] else math.nan
    return values["jaccard"], values["share_of_a_in_b"], times, values["log10_p"]


_OF_OVERLAP = ("jaccard", "share_of_a_in_b", "intersection", "expected", "log10_p")
