"""The page that sets several subnetworks, or circuits, of one model side by side: how faithful, how small, how alike.

Every sentence is computed from what is compared; what is missing is named.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigram_circuits.experiments.comparison import (
    KL,
    SEED,
    Compared,
    Comparison,
    R,
    Source,
    compare,
    known_values,
    leaders,
    measured_tasks,
)
from bigram_circuits.measures import quantities
from bigram_circuits.measures.html import write_page
from bigram_circuits.measures.words import listed, percent, rounded
from bigram_circuits.names import short_name
from bigram_circuits.report import compared_measures, compared_seeds, compared_stricter, compared_weights  # noqa: F401 (they register their sections)
from bigram_circuits.report.blocks import Check, Mark, Opening
from bigram_circuits.report.compared_measures import front
from bigram_circuits.report.compared_words import (
    COMPARISON_SECTIONS,
    SURPRISING,
    few,
    found_pairs,
    pair_with,
    value_range,
)
from bigram_circuits.report.document import document
from bigram_circuits.report.refuting import EVALUATE


def write_comparison(
    runs: Comparison | Mapping[str, Source] | Sequence[Source] | Source,
    path: str | os.PathLike[str] = "comparison.html",
) -> Path:
    """Write the page that sets several subnetworks, or circuits, of one model side by side, replacing an earlier one.

    Args:
        runs: At least two runs, run folders, subnetworks, circuits or their files, in a sequence or by name. A folder
            written by `find --sparsity-weights` counts as all its runs. Subnetworks without an evaluation appear
            only where weights are compared.
        path: Where to write it.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no run in a folder, or no such file.
        ValueError: If there are fewer than two, a file cannot be read, or two of them are of different models.
        OSError: If the page cannot be written.

    Example:
        >>> largest = bc.Subnetwork.magnitude(model, like=found)
        >>> bc.write_comparison({"found": found, "largest": largest}, "comparison.html")
    """
    return write_page(path, lambda: page(runs if isinstance(runs, Comparison) else compare(runs)))


def page(comparison: Comparison) -> str:
    """The page as text."""
    sections = [section(comparison) for section in COMPARISON_SECTIONS]
    return document(
        opening(comparison), sections, f"Made from the folders and files of the {comparison.noun}s compared."
    )


def opening(comparison: Comparison) -> Opening:
    """The first screen: question, answer, a few numbers, a picture, and what would change the conclusion."""
    items, noun, units = comparison.items, comparison.noun, comparison.units
    model = _model(items)
    asked = f"Which of these {len(items)} {noun}s of {model} is best, and at what size?"
    if comparison.is_repetition:
        asked = f"How much does the {noun} of {model} depend on the seed?"
    quantity = R if known_values(items, R) else KL
    return Opening(
        title=f"{len(items)} {noun}s of {model}, compared",
        asked=asked,
        answer=_answer(comparison, quantity),
        marks=_marks(comparison, quantity),
        picture=front(comparison),
        checks=[one for one in (tell(comparison, quantity) for tell in _CHECKS) if one],
        tested="What would change the conclusion, and does it?",
        notes=[f"{items[0].subnetwork.total:,} {units} could be kept or dropped. All is measured on held-out text."],
    )


def _model(items: Sequence[Compared]) -> str:
    runs = [one.run for one in items if one.run]
    if runs:
        return runs[0].model_words
    return short_name(next((one.subnetwork.model_name for one in items if one.subnetwork.model_name), "a model"))


def _marks(comparison: Comparison, quantity: str) -> list[Mark]:
    items, noun, units = comparison.items, comparison.noun, comparison.units
    fractions = [one.subnetwork.fraction for one in items]
    marks = [
        Mark(str(len(items)), f"{noun}s"),
        Mark(value_range(fractions, percent), f"of {units} kept", quantities.FRACTION.meaning),
    ]
    known = known_values(items, quantity)
    if known:
        words = "agreement with the target" if quantity == R else "distance from the target"
        meaning = quantities.SURPRISAL_CORRELATION if quantity == R else quantities.KL
        marks.append(Mark(value_range(list(known.values()), _short), words, meaning.meaning))
    found = found_pairs(comparison.pairs)
    if found:
        how = "How many times as much of two of them is the same as would be by chance, if one were drawn at random."
        marks.append(Mark(f"{value_range([pair.ratio() for pair in found], few)}×", "overlap, in times chance", how))  # noqa: RUF001
    return marks


def _short(value: float | int) -> str:
    return rounded(value, 2)


# --- the answer ---


def _answer(comparison: Comparison, quantity: str) -> str:
    """Which is best at what size, as far as intervals tell; over seeds, mean and spread."""
    items = comparison.items
    known, first = known_values(items, quantity), leaders(items, quantity)
    if not known:
        kept = value_range([one.subnetwork.fraction for one in items], percent)
        return f"None of them was evaluated, so only what they keep is compared: {kept} of the {comparison.units}."
    if len(measured_tasks(items, quantity)) > 1:
        return "They were measured with different targets or texts, so none can be called the best."
    spread = comparison.spread(quantity)
    if comparison.is_repetition and spread is not None:
        sd = "" if math.isnan(spread.deviation) else f", with a standard deviation of {rounded(spread.deviation)}"
        return f"Over {len(known)} seeds, the {_WORDS[quantity]} is {rounded(spread.mean)} on average{sd}."
    best, equally, unit = _BEST[quantity]
    reached = value_range(list(known.values()), rounded)
    if len(known) == 1:
        return f"Only {next(iter(known))} was evaluated: its {_WORDS[quantity]} is {reached}."
    if not first:
        return f"Some have no interval, so they cannot be ranked: {_WORDS[quantity]} {reached}."
    by_size = sorted((one for one in items if one.name in known), key=lambda one: one.subnetwork.fraction)
    leading, least = [one for one in by_size if one.name in first], by_size[0]
    own = f"{value_range([known[name] for name in first], rounded)}{unit}"
    if len(first) == 1:
        says = f"{first[0]} {best} ({own}), with {_size(leading[0], comparison)}"
        if least is leading[0]:
            return f"{says}, the fewest of all."
        return (
            f"{says}; the smallest, {least.name}, keeps {percent(least.subnetwork.fraction)} and has "
            f"{rounded(known[least.name])}."
        )
    who = {2: "Both"}.get(len(first), f"All {len(first)}") if len(first) == len(known) else listed(first)
    smallest = f"the smallest of them, {leading[0].name}, keeps {_size(leading[0], comparison)}"
    if len({one.subnetwork.kept for one in leading}) == 1:
        smallest = f"each keeps {_size(leading[0], comparison)}"
    return f"{who} {equally} as far as the intervals tell ({own}); {smallest}."


_WORDS = {R: "agreement with the target (1 is perfect)", KL: "distance from the target (KL in nats)"}
_BEST = {
    R: ("agrees best with its target", "agree equally well with their target", "; 1 is perfect"),
    KL: ("is closest to its target", "are equally close to their target", " nats; 0 is perfect"),
}
"""By quantity: how the best is, how several are, and what the numbers are."""


def _size(one: Compared, comparison: Comparison) -> str:
    return f"{percent(one.subnetwork.fraction)} of the {comparison.units}"


# --- what would change it ---


def _alike(comparison: Comparison, quantity: str) -> Check | None:
    asked = "Were they measured alike?"
    tasks = measured_tasks(comparison.items, quantity)
    if not tasks:
        return Check(asked, "not tried", "What tries it:", "what", EVALUATE)
    if len(tasks) > 1:
        return Check(asked, "failed", f"No: with {len(tasks)} different targets or texts.", "what")
    return Check(asked, "passed", "Yes: with the same target, on the same text.", "what")


def _noise(comparison: Comparison, quantity: str) -> Check | None:
    """Whether intervals tell them apart; None where there is no order to doubt."""
    items = comparison.items
    known, first = known_values(items, quantity), leaders(items, quantity)
    if comparison.is_repetition or len(known) < 2 or len(measured_tasks(items, quantity)) > 1:
        return None
    asked = "Could it be the choice of text that puts one first?"
    if not first:
        return Check(asked, "not tried", "Some were evaluated without intervals.", "pareto")
    if len(first) == 1:
        return Check(asked, "passed", f"No: the 95% interval of {first[0]} overlaps no other.", "pareto")
    return Check(asked, "in doubt", f"Yes: the 95% intervals of {listed(first)} overlap.", "pareto")


def _seed(comparison: Comparison, quantity: str) -> Check | None:
    """Whether other seeds would put another one first; None where the comparison is of seeds."""
    if comparison.is_repetition or not any(one.run for one in comparison.items):
        return None
    asked, known = "Would other seeds change it?", known_values(comparison.items, quantity)
    ranges: dict[str, tuple[float, float]] = {
        one.name: (one.spreads[quantity].low, one.spreads[quantity].high)
        for one in comparison.repetitions
        if quantity in one.spreads
    }
    if not ranges:
        if SEED in comparison.differing:
            return Check(asked, "in doubt", "Their seeds differ, but so do other settings.", "what")
        return Check(asked, "not tried", "What tries it, for each:", "what", "bigram-circuits find --seeds 5")
    several = {name for one in comparison.repetitions for name in one.members}
    once = {name: (float(value), float(value)) for name, value in known.items() if name not in several}
    told = listed([f"{name} {value_range(ends, rounded)}" for name, ends in ranges.items()])
    told = f"over seeds, the {_WORDS[quantity]} is {told}{f'; of one seed: {listed(list(once))}' if once else ''}."
    ordered = sorted((ranges | once).values(), key=lambda ends: ends[0] + ends[1], reverse=quantity == R)
    best, others = ordered[0], ordered[1:]
    if not others:
        return Check(asked, "in doubt", f"There is nothing to compare it with; {told}", "seeds")
    if any(low <= best[1] and best[0] <= high for low, high in others):
        return Check(asked, "in doubt", f"Yes: {told}", "seeds")
    return Check(asked, "in doubt" if once else "passed", f"{'Perhaps' if once else 'No'}: {told}", "seeds")


def _random(comparison: Comparison, quantity: str) -> Check | None:
    asked = f"Would random {comparison.units} do as well?"
    beaten = {
        one.name: is_beaten for one in comparison.items
        if one.evaluation and (is_beaten := one.evaluation.beats("random")) is not None
    }  # fmt: skip
    if not beaten:
        return Check(asked, "not tried", "What tries it:", "pareto", EVALUATE)
    as_good = [name for name, is_beaten in beaten.items() if not is_beaten]
    if as_good:
        return Check(asked, "failed", f"Not excluded for {listed(as_good)}.", "pareto")
    lacking = len(comparison.items) - len(beaten)
    says = f"No: each is closer to the target{f', {lacking} without this control aside' if lacking else ''}."
    return Check(asked, "passed", says, "pareto")


def _capacity(comparison: Comparison, quantity: str) -> Check | None:
    """Whether the masks could hold the answer; None if their bits were not counted."""
    held = {one.name: one.mask_capacity for one in comparison.items if one.mask_capacity}
    if not held:
        return None
    asked = "Could the masks themselves hold the answer?"
    could = [name for name, one in held.items() if not one.is_far_fewer]
    if could:
        says = f"Not excluded for {listed(could)}: they take enough bits to say."
        return Check(asked, "in doubt", says, "what")
    return Check(asked, "passed", "No: they take far fewer bits to say than an equally good table.", "what")


def _shared(comparison: Comparison, quantity: str) -> Check | None:
    """Whether they overlap beyond chance; None if there is no pair to tell."""
    found = found_pairs(comparison.pairs)
    if not found:
        return None
    asked = f"Do they keep the same {comparison.units} only by chance?"
    times = value_range([pair.ratio() for pair in found], few)
    below = [pair_with(pair) for pair in found if pair.p() >= SURPRISING]
    if below:
        return Check(asked, "in doubt", f"It may be chance for {listed(below)}.", "overlaps")
    pairs = "every pair shares" if len(found) > 1 else "they share"
    return Check(asked, "passed", f"No: {pairs} {times} times as many as by chance.", "overlaps")


_CHECKS = (_alike, _noise, _random, _seed, _capacity, _shared)
"""What would change the conclusion."""
