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
    Compared,
    Comparison,
    R,
    Source,
    Spread,
    compare,
    known_values,
    leaders,
    measured_tasks,
)
from bigram_circuits.measures.html import write_page
from bigram_circuits.measures.words import listed, percent, rounded, sentence
from bigram_circuits.names import short_name
from bigram_circuits.report import compared_measures, compared_weights  # noqa: F401 (they register their sections)
from bigram_circuits.report.blocks import Opening
from bigram_circuits.report.compared_words import COMPARISON_SECTIONS, few, found_pairs, pair_words, value_range
from bigram_circuits.report.document import document


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
        _opening(comparison), sections, f"Made from the folders and files of the {comparison.noun}s compared."
    )


def _opening(comparison: Comparison) -> Opening:
    items, noun, units = comparison.items, comparison.noun, comparison.units
    fractions = [one.subnetwork.fraction for one in items]
    what = "maskable weights" if units == "weights" else units
    sizes = f"They keep {value_range(fractions, percent)} of {items[0].subnetwork.total:,} {what}."
    answer = " ".join(one for one in (sizes, _best(comparison), _shared(comparison)) if one)
    title = f"{len(items)} {noun}s of {_model(items)}, compared"
    asked = f"Which {noun} reproduces its target best with the fewest {units}, and do they share the same {units}?"
    if comparison.is_repetition:
        asked = "How much does the result depend on the seed?"
    marks = [(f"{noun}s", str(len(items))), (f"of {units} kept", value_range(fractions, percent))]
    known = known_values(items, R)
    if known:
        marks.append(("r with the target", value_range(list(known.values()), rounded)))
    found = found_pairs(comparison.pairs)
    if found:
        ratios = [pair.ratio() for pair in found]
        marks.append(("overlap, in times chance", value_range(ratios, few)))
    return Opening(title, asked, answer, marks=marks)


def _model(items: Sequence[Compared]) -> str:
    runs = [one.run for one in items if one.run]
    if runs:
        return runs[0].model_words
    return short_name(next((one.subnetwork.model_name for one in items if one.subnetwork.model_name), "a model"))


def _best(comparison: Comparison) -> str:
    """The subnetworks with the highest r and the lowest KL, as far as intervals tell; over seeds, mean and spread."""
    items = comparison.items
    if len(measured_tasks(items, R)) > 1:
        return "They were evaluated with different targets or texts, so their r and KL cannot be ranked."
    if comparison.is_repetition:
        spreads = [(words, comparison.spread(key)) for key, words in ((R, "r"), (KL, "KL"))]
        parts = [f"{words} is {rounded(one.mean)} (sd {rounded(one.deviation)})" for words, one in spreads if one]
        return f"They differ only in the seed: on average, {listed(parts)}." if parts else "None of them was evaluated."
    parts = [_first(items, *one) for one in ((R, "r", "highest"), (KL, "KL", "lowest"))]
    return sentence("; ".join(part for part in parts if part)) or "None of them was evaluated."


def _first(items: Sequence[Compared], quantity: str, word: str, rank: str) -> str:
    """Who is first in a quantity, if the intervals tell."""
    known = known_values(items, quantity)
    if not known:
        return ""
    first = leaders(items, quantity)
    unit = " nats" if quantity == KL else ""
    if len(first) == 1:
        share = next(one.subnetwork.fraction for one in items if one.name == first[0])
        return f"{rank} {word}: {first[0]} ({rounded(known[first[0]])}{unit}, {percent(share)} kept)"
    span = f"{value_range(list(known.values()), rounded)}{unit}"
    if not first:
        return f"{word}: {span}, not ranked, since some have no interval" if len(known) > 1 else f"{word}: {span}"
    if len(first) == len(known):
        return f"{word}: {span}, with intervals that overlap that of the {rank}"
    own = value_range([known[name] for name in first], rounded)
    return f"{rank} {word}: {listed(first)} ({own}{unit}), which their intervals do not tell apart"


def _shared(comparison: Comparison) -> str:
    found = found_pairs(comparison.pairs)
    if not found:
        return ""
    if comparison.is_repetition and len(found) > 1:
        jaccard = Spread.of([pair.get("jaccard") for pair in found])
        times = Spread.of([pair.ratio() for pair in found])
        return (
            f"Two of them share {percent(jaccard.mean)} of the {comparison.units} that either keeps "
            f"(mean of {len(found)} pairs, "
            f"{percent(jaccard.low)} to {percent(jaccard.high)}): {few(times.mean)} times as many as by chance."
        )
    pairs = sorted(found, key=lambda pair: _or_lowest(pair.ratio()))
    least, most = pairs[0], pairs[-1]
    if least is most:
        return f"{pair_words(most)} share {few(most.ratio())} times as many {comparison.units} as expected by chance."
    return (
        f"Relative to chance, {pair_words(most)} overlap most ({few(most.ratio())} times), {pair_words(least)} least "
        f"({few(least.ratio())} times)."
    )


def _or_lowest(value: float | int) -> float | int:
    return -math.inf if math.isnan(value) else value
