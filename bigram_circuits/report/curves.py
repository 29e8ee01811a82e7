"""The page of faithfulness curves: how small a circuit can be, by the way it is chosen, and what each way keeps.

Every sentence is computed from the curves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigram_circuits.circuit import Circuit
from bigram_circuits.experiments.faithfulness_curves import LABELS, FaithfulnessCurves
from bigram_circuits.measures.html import write_page
from bigram_circuits.measures.words import flat, listed, percent, rounded, span
from bigram_circuits.names import model_words
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Chart, Content, Mark, Numbers, Opening
from bigram_circuits.report.document import document
from bigram_circuits.report.sections import Sections
from bigram_circuits.report.words import IN_PLACE

CURVES_SECTIONS = Sections()
"""The sections of the page."""
section = CURVES_SECTIONS.add

ENOUGH = 0.9
"""The faithfulness for which the page names the smallest circuits."""
_MOST_NAMED = 30  # nodes of a circuit whose labels are listed; of more, they are counted
_LOWEST = -1.0  # faithfulness at the bottom of the chart, at least


def write_curves(found: FaithfulnessCurves, path: str | os.PathLike[str] = "curves.html") -> Path:
    """Write the page of faithfulness curves, replacing an earlier one; it requests nothing from the network.

    Args:
        found: From `faithfulness_curves` or `FaithfulnessCurves.load`.
        path: Where to write it.

    Returns:
        The file.

    Raises:
        ValueError: If the path is a folder.
        OSError: If the page cannot be written.

    Example:
        >>> planted = bc.plant_attention("previous_token", d_vocab=8)
        >>> known = planted.model, planted.target, planted.corpus
        >>> curves = bc.faithfulness_curves(*known, units="head", sizes=(0.5,), methods=("attribution",))
        >>> bc.write_curves(curves, "curves.html")
    """
    sections = [tell(found) for tell in CURVES_SECTIONS]
    footer = "Made from curves that faithfulness_curves returned."
    return write_page(path, lambda: document(_opening(found), sections, footer))


def _opening(found: FaithfulnessCurves) -> Opening:
    notes = found.curves.notes
    name = model_words(str(notes.get("model")))
    noun, total = found.noun, int(notes.get("nodes", 0))
    replaced = IN_PLACE.get(str(notes.get("replace")), "other values")
    asked = (
        f"How few of the {total:,} {noun} of {name} does {notes.get('target')} need, and which way of choosing finds "
        "the fewest?"
    )
    how = (
        f"Dropped {noun} are given {replaced}. All ways choose on the training part; faithfulness is measured on "
        f"{notes.get('sequences', 0):,} held-out sequences."
    )
    methods = found.areas.names
    cmd = {method: float(value) for method, value in zip(methods, found.areas.values[0], strict=True)}
    measured = found.areas.quantities[0].meaning
    marks = [Mark(f"{total:,}", f"{noun} in all")]
    marks += [Mark(rounded(value), f"CMD, {LABELS.get(method, method)}", measured) for method, value in cmd.items()]
    return Opening(f"Circuits of {name}, by size", asked, _smallest(found), marks, notes=[_compared(found), how])


def _smallest(found: FaithfulnessCurves) -> str:
    """The smallest faithful circuit of each method."""
    some, none = [], []
    for method in found.curves.conditions:
        one, label = found.smallest(method, ENOUGH), LABELS.get(method, method)
        if one is None:
            none.append(label)
        else:
            some.append(f"{label} {one.kept:,} ({percent(one.fraction)})")
    says = [f"The fewest {found.noun} with a faithfulness of at least {ENOUGH}: {listed(some)}." if some else ""]
    says.append(f"Not reached at any of these sizes: {listed(none)}." if none else "")
    return " ".join(filter(None, says))


def _compared(found: FaithfulnessCurves) -> str:
    """Where the learned circuits are better, and where they are not shown to be."""
    if "learned" not in found.areas.names:
        return ""
    over = {name: _area(found, "cmd_over_learned", name) for name in found.areas.names if name != "learned"}
    better = [
        f"{LABELS.get(name, name)} (by {rounded(value)}, {span(low, high)})"
        for name, (value, low, high) in over.items()
        if low > 0
    ]
    worse = [LABELS.get(name, name) for name, (_, _, high) in over.items() if high < 0]
    alike = [LABELS.get(name, name) for name, (_, low, high) in over.items() if low <= 0 <= high]
    says = [f"Over all sizes, learned circuits are closer to the full model than {listed(better)}." if better else ""]
    says.append(f"They are farther from it than {listed(worse)}." if worse else "")
    says.append(f"No difference is shown to {listed(alike)}." if alike else "")
    return " ".join(filter(None, says))


def _area(found: FaithfulnessCurves, quantity: str, method: str) -> tuple[float, float, float]:
    q = [one.name for one in found.areas.quantities].index(quantity)
    at = found.areas.names.index(method)
    value, low, high = (float(part[q, at]) for part in (found.areas.values, found.areas.low, found.areas.high))
    return value, low, high


@section("faithfulness", "Faithfulness by size")
def faithfulness(found: FaithfulnessCurves) -> Content:
    """The curves, and the numbers behind them."""
    curves, notes = found.curves, found.curves.notes
    figure = figures.dressed(found.plot(), 420)
    lowest, highest = float(curves.low[0].min()), float(curves.high[0].max())
    bottom = min(0.0, lowest) - 0.05
    cut = bottom < _LOWEST
    figure.update_yaxes(range=[max(bottom, _LOWEST), max(1.0, min(highest, 2.0)) + 0.05])
    for level, colour in ((0, figures.MUTED), (1, figures.INK)):
        figure.add_hline(y=level, line={"color": colour, "width": 1, "dash": "dash"})
    rows = []
    for method in curves.conditions:
        intervals = curves.interval("faithfulness", method)
        for place, circuit in enumerate(found.circuits[method]):
            values = [float(curves.get(name, method)[place]) for name in ("faithfulness", "cross_entropy")]
            kept = [LABELS.get(method, method), circuit.kept, percent(circuit.fraction)]
            rows.append([*kept, values[0], span(*map(float, intervals[:, place])), values[1]])
    says = [
        "Faithfulness is (CE of the empty circuit - CE) / (CE of the empty circuit - CE of the full model): 0 for the "
        f"empty circuit (CE {rounded(notes.get('empty'))} nats), 1 for the full model (CE "
        f"{rounded(notes.get('full'))}). Below 0 a circuit is worse than none, above 1 better than the model.",
        "Bands are 95% bootstrap intervals over held-out sequences.",
        f"The chart ends at {rounded(_LOWEST, 0)}; the table has what lies below." if cut else "",
    ]
    table = Numbers(
        "Every circuit",
        ["chosen", f"{found.noun} kept", "share", "faithfulness", "95% interval", "CE, nats"],
        rows,
    )
    return Content(says, [Chart(f"Faithfulness by share of {found.noun} kept", "", figure), table])


@section("areas", "Areas over size")
def areas(found: FaithfulnessCurves) -> Content:
    """CMD, area and CPR, and the paired difference to the learned circuits."""
    methods = found.areas.names
    named = [(name, LABELS.get(name, name)) for name in methods]
    cmd = [_area(found, "cmd", name) for name in methods]
    figure = figures.bars(
        [label for _, label in named], {"CMD": [one[0] for one in cmd]}, "CMD: area between faithfulness and 1",
        {"CMD": ([one[1] for one in cmd], [one[2] for one in cmd])},
    )  # fmt: skip
    interval = "95% interval"
    over = [[label, *_cells(found, name, "cmd", "cmd_over_learned")] for name, label in named]
    under = [[label, *_cells(found, name, "area", "cpr")] for name, label in named]
    tables = [
        Numbers("CMD", ["chosen", "CMD", interval, "CMD over learned", f"{interval}, paired"], over, is_open=True),
        Numbers("Area and CPR", ["chosen", "area", interval, "CPR", interval], under, is_open=True),
    ]
    says = [
        "Areas are over the share kept, from 0 to 1 on a linear axis, where the ends are 0 and 1 by definition.",
        "CMD is the area between faithfulness and 1: the smaller, the better. CPR, the area under faithfulness, "
        "rewards circuits that beat the model; area is the same with faithfulness cut off at 0 and 1.",
    ]
    return Content(says, [Chart("CMD", "", figure), *tables])


def _cells(found: FaithfulnessCurves, method: str, *quantities: str) -> list[Any]:
    """Values and intervals."""
    measured = [_area(found, one, method) for one in quantities]
    return [cell for value, low, high in measured for cell in (value, span(low, high))]


@section("kept", "What each way keeps")
def kept(found: FaithfulnessCurves) -> Content:
    """The nodes of every circuit: their labels, or counts by layer and kind."""
    learned = found.circuits.get("learned", ())
    rows = []
    for place in range(len(found.curves.points)):
        for method, circuits in found.circuits.items():
            one = circuits[place]
            cells: list[Any] = [f"{one.kept:,} ({percent(one.fraction)})", LABELS.get(method, method)]
            if learned:
                cells.append("" if method == "learned" else percent((one & learned[place]).kept / one.kept))
            rows.append([*cells, _named(one)])
    columns = ["kept", "chosen", *(["also learned"] if learned else []), found.noun]
    says = []
    if any(one.kept > _MOST_NAMED for circuits in found.circuits.values() for one in circuits):
        says.append(f"Of more than {_MOST_NAMED} {found.noun}, how many are kept is said by layer and kind.")
    if learned and len(found.circuits) > 1:
        says.append("Also learned: the share that the learned circuit of this size keeps too.")
    if "random" in found.circuits:
        says.append("Those at random are the first of several draws.")
    return Content(says, [Numbers(f"The {found.noun} that are kept", columns, rows, is_open=True)])


def _named(circuit: Circuit) -> str:
    """The labels of what a circuit keeps, or their counts by layer and kind."""
    labels: Sequence[str] = (*circuit.nodes, *circuit.edges)
    if len(labels) <= _MOST_NAMED:
        return ", ".join(labels)
    counts = {place: count for place, count in circuit.by_place().items() if count.kept}
    last = max(layer for layer, _ in circuit.by_place())
    return ", ".join(f"{_place(*place, last)} {count.kept:,} of {count.total:,}" for place, count in counts.items())


def _place(layer: int, kind: str, last: int) -> str:
    return kind if layer < 0 or (layer == last and kind == "logits") else f"L{layer} {kind}"


@section("made", "How it was made")
def made(found: FaithfulnessCurves) -> Content:
    """What was left out, and all settings."""
    says = [f"Left out: {LABELS.get(name, name)}, {why}." for name, why in found.left_out.items()]
    notes = {name: value for name, value in found.curves.notes.items() if name != "left_out"}
    units = notes.get("units")
    notes["units"] = listed(units) if isinstance(units, list | tuple) else units
    rows = [[name, _short(value)] for name, value in flat(notes)]
    return Content(says or ["No way of choosing was left out."], [Numbers("Settings", ["setting", "value"], rows)])


def _short(value: str) -> str:
    """A number with few digits; other text as it is."""
    try:
        number = float(value)
    except ValueError:
        return value
    return value if not math.isfinite(number) or number.is_integer() else f"{number:.4g}"
