"""The registry of the comparison page's sections, and how they name pairs and ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from bigram_circuits.experiments.comparison import Compared, Comparison, Pair
from bigram_circuits.report.sections import Sections

COMPARISON_SECTIONS = Sections(
    {
        "How good they are": ("what", "pareto", "seeds", "stricter"),
        "How alike they are": ("overlaps", "places"),
        "What happens inside": ("layers", "..."),
    },
    opened=("what", "pareto", "seeds", "stricter", "overlaps"),
)
"""The sections of the comparison page; `report.comparison` imports the modules that register them."""
section = COMPARISON_SECTIONS.add


SURPRISING = 0.05
"""A p-value below it is significant."""
MOST_DRAWN = 24
"""Subnetworks that a chart by layer or by pair can show; of more, some are drawn."""


def drawn(comparison: Comparison) -> Sequence[Compared]:
    """Those that the charts with a line for each show: all, or some that are evenly spaced in the order given."""
    items = comparison.items
    if len(items) <= MOST_DRAWN:
        return items
    return [items[place] for place in sorted({round(at) for at in np.linspace(0, len(items) - 1, MOST_DRAWN)})]


def left_out(comparison: Comparison) -> str:
    """How many the charts with a line for each leave out; empty if they show all."""
    few, n = len(drawn(comparison)), len(comparison.items)
    return "" if few == n else f"Only {few} of the {n} are shown here, evenly spaced in the order given."


def found_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs that are not nested by construction, whose overlap is a finding."""
    return [pair for pair in pairs if not pair.is_given]


def value_range(values: Sequence[float | int], words: Callable[[float], str]) -> str:
    """The smallest and the largest value, or the one that all of them have."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "undefined"
    low, high = words(min(known)), words(max(known))
    return low if low == high else f"{low} to {high}"


def few(value: float | int) -> str:
    """A ratio with few digits."""
    return "undefined" if math.isnan(value) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def pair_words(pair: Pair) -> str:
    """Both names, as the subject of a sentence."""
    return f"{pair.first.name} and {pair.second.name}"


def pair_with(pair: Pair) -> str:
    """Both names, as an item of a list."""
    return f"{pair.first.name} with {pair.second.name}"
