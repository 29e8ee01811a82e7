"""The page that sets several subnetworks of one model side by side: how faithful for how few weights, and how alike.

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
    compare,
    known_values,
    measured_tasks,
)
from bigram_circuits.measures.words import percent, rounded
from bigram_circuits.names import short_name
from bigram_circuits.report import compared_measures, compared_weights  # noqa: F401 (they register their sections)
from bigram_circuits.report.blocks import Opening
from bigram_circuits.report.compared_words import COMPARISON_SECTIONS, few, found_pairs, pair_words, value_range
from bigram_circuits.report.document import document
from bigram_circuits.report.words import sentence
from bigram_circuits.storage.files import write_text


def write_comparison(
    runs: Comparison | Mapping[str, Source] | Sequence[Source] | Source,
    path: str | os.PathLike[str] = "comparison.html",
) -> Path:
    """Write the page that sets several subnetworks of one model side by side, replacing an earlier one.

    Args:
        runs: At least two runs, run folders, subnetworks or subnetwork files, in a sequence or by name. A folder
            written by `find --sparsity-weights` counts as all its runs. Subnetworks without an evaluation appear
            only where weights are compared.
        path: Where to write it.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If there is no run in a folder, or no such file.
        ValueError: If there are fewer than two, a file cannot be read, or two of them are of different models.
        OSError: If the page cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: name a file in it")
    write_text(path, page(runs if isinstance(runs, Comparison) else compare(runs)))
    return path


def page(comparison: Comparison) -> str:
    """The page as text."""
    sections = [section(comparison) for section in COMPARISON_SECTIONS]
    return document(_opening(comparison), sections, "Made from the folders and files of the subnetworks compared.")


def _opening(comparison: Comparison) -> Opening:
    items = comparison.items
    fractions = [one.subnetwork.fraction for one in items]
    sizes = f"They keep {value_range(fractions, percent)} of {items[0].subnetwork.total:,} maskable weights."
    answer = " ".join(one for one in (sizes, _best(items), _shared(comparison)) if one)
    title = f"{len(items)} subnetworks of {_model(items)}, compared"
    asked = "Which subnetwork reproduces its target best with the fewest weights, and do they share the same weights?"
    marks = [("subnetworks", str(len(items))), ("of weights kept", value_range(fractions, percent))]
    known = known_values(items, R)
    if known:
        marks.append(("r with the target", value_range(list(known.values()), rounded)))
    found = found_pairs(comparison.pairs)
    if found:
        ratios = [pair.ratio() for pair in found]
        marks.append(("overlap, in times chance", value_range(ratios, few)))
    return Opening(title, asked, answer, marks)


def _model(items: Sequence[Compared]) -> str:
    runs = [one.run for one in items if one.run]
    if runs:
        return runs[0].model_words
    return short_name(next((one.subnetwork.model_name for one in items if one.subnetwork.model_name), "a model"))


def _best(items: Sequence[Compared]) -> str:
    """The subnetworks with the highest r and the lowest KL, unless targets or texts differ."""
    if len(measured_tasks(items, R)) > 1:
        return "They were evaluated with different targets or texts, so their r and KL cannot be ranked."
    parts = []
    for quantity, words, choose in ((R, "highest r", max), (KL, "lowest KL", min)):
        known = known_values(items, quantity)
        if known:
            name = choose(known, key=lambda one: known[one])
            share = next(one.subnetwork.fraction for one in items if one.name == name)
            unit = " nats" if quantity == KL else ""
            parts.append(f"{words}: {name} ({rounded(known[name])}{unit}, {percent(share)} kept)")
    return sentence("; ".join(parts)) if parts else "None of them was evaluated."


def _shared(comparison: Comparison) -> str:
    if not found_pairs(comparison.pairs):
        return ""
    pairs = sorted(found_pairs(comparison.pairs), key=lambda pair: _or_lowest(pair.ratio()))
    least, most = pairs[0], pairs[-1]
    if least is most:
        return f"{pair_words(most)} share {few(most.ratio())} times as many weights as expected by chance."
    return (
        f"Relative to chance, {pair_words(most)} overlap most ({few(most.ratio())} times), {pair_words(least)} least "
        f"({few(least.ratio())} times)."
    )


def _or_lowest(value: float | int) -> float | int:
    return -math.inf if math.isnan(value) else value
