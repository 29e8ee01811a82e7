"""Sections of the comparison page about weights, or nodes: how far they overlap, where they are, what they do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bigram_circuits.circuit import Circuit
from bigram_circuits.experiments.comparison import SMALLEST, Compared, Comparison, Pair
from bigram_circuits.measures.results import Curves
from bigram_circuits.measures.words import listed, percent, rounded
from bigram_circuits.names import COMPONENTS, PartName
from bigram_circuits.report import compared_figures
from bigram_circuits.report.blocks import Block, Chart, Content, Numbers
from bigram_circuits.report.compared_words import (
    MOST_DRAWN,
    SURPRISING,
    drawn,
    few,
    found_pairs,
    left_out,
    pair_with,
    pair_words,
    section,
    value_range,
)
from bigram_circuits.report.results import LAYER_CHARTS, LayerChart
from bigram_circuits.report.words import component_name, component_words, unit_words

_MOST_ROWS = 28  # pairs in a map; more are in the table alone
_MOST_LABELS = 60  # nodes of a circuit, named one by one
_CELL = 74  # pixels, of width for a column of a map with words


@section("overlaps", "Are they the same weights?")
def overlaps(comparison: Comparison) -> Content:
    """Overlap of each pair, against chance."""
    pairs, items, units = comparison.pairs, comparison.items, comparison.units
    heading = "" if units == "weights" else f"Are they the same {units}?"
    empty = [one.name for one in items if not one.subnetwork.kept]
    says = [f"Empty, and so without overlaps: {listed(empty)}."] if empty else []
    if not pairs:
        return Content(says, heading=heading)
    given = [pair_with(pair) for pair in pairs if pair.is_given]
    if given:
        says.insert(0, f"Nested by construction, so their overlap is not a finding: {listed(given)}.")
    if found_pairs(pairs):
        says.insert(0, _overlap_words(found_pairs(pairs), units))
    if comparison.against is not None:
        says.insert(0, f"Of {len(items)} {comparison.noun}s, each is compared with one alone, {comparison.against}.")
    corrected = f", with Holm's correction over the {len(pairs)} pairs" if len(pairs) > 1 else ""
    where, places = ("in every matrix", "matrices") if units == "weights" else ("at every hook point", "hook points")
    says.append(
        f"Chance: one of the two is drawn at random with the same number of {units} {where}, so a shared "
        f"preference for some {places} does not count as evidence. p is exact (a sum of hypergeometric counts) and "
        f"one-sided{corrected}."
    )
    columns = ["", *_PAIR_COLUMNS]
    rows = [[pair_words(pair), *_pair_row(pair, "all")] for pair in pairs]
    table = Numbers("Overlap of each pair", columns, rows, is_open=len(rows) <= _MOST_ROWS)
    if comparison.against is not None or len(items) > MOST_DRAWN:
        says.append(
            f"Left out: the map of all pairs, and overlaps by component if there are more than {_MOST_ROWS} pairs "
            "(compare(...).pairs has them)."
        )
        return Content(says, [table, *(_by_component(pairs, units) if len(pairs) <= _MOST_ROWS else [])], heading)
    names = [one.name for one in items]
    maps = compared_figures.pair_maps(
        names, {"observed": comparison.shares, "expected by chance": comparison.chances}, "share"
    )
    chart = Chart(f"Share of the row's {units} that the column keeps too", _largest(pairs, units), maps, 640)
    return Content(says, [chart, table, *_by_component(pairs, units)], heading)


_PAIR_COLUMNS = (
    "shared", "expected", "times chance", "p (Holm)", "log10 p", "of first", "of second", "Jaccard",
)  # fmt: skip


def _pair_row(pair: Pair, stratum: str) -> list[float | int | str]:
    p = pair.p(stratum)
    tested = [pair.ratio(stratum), p if p > SMALLEST else f"< {SMALLEST:.0e}", pair.log10_p[stratum]]
    shares = [pair.get(key, stratum) for key in ("share_of_a_in_b", "share_of_b_in_a", "jaccard")]
    return [pair.get("intersection", stratum), pair.get("expected", stratum), *tested, *shares]


def _overlap_words(pairs: Sequence[Pair], units: str) -> str:
    if len(pairs) == 1:
        pair = pairs[0]
        is_above = "significantly" if pair.p() < SURPRISING else "not significantly"
        return (
            f"{pair_words(pair)} share {pair.get('intersection'):,.0f} {units}: Jaccard "
            f"{percent(pair.get('jaccard'))}, {few(pair.ratio())} times chance ({pair.get('expected'):,.0f} expected), "
            f"{is_above} above it ({_p_words(pair)})."
        )
    below = [pair_with(pair) for pair in pairs if pair.p() >= SURPRISING]
    says = f"Of {len(pairs)} pairs, {len(pairs) - len(below)} overlap significantly more than chance"
    if not below:
        says = f"All {len(pairs)} pairs overlap significantly more than chance"
    return f"{says} (p < {SURPRISING} after Holm's correction).{f' Not significant: {listed(below)}.' if below else ''}"


def _p_words(pair: Pair) -> str:
    return f"p = {pair.p():.2g}" if pair.p() > 1e-4 else f"p = 10^{pair.log10_p['all']:,.0f}"


def _largest(pairs: Sequence[Pair], units: str) -> str:
    """The largest share, among pairs that are not nested by construction."""
    shares = [
        (pair.get(share), pair.get("expected") / pair.get(kept), one.name, other.name)
        for pair in found_pairs(pairs)
        for share, kept, one, other in (
            ("share_of_a_in_b", "kept_a", pair.first, pair.second),
            ("share_of_b_in_a", "kept_b", pair.second, pair.first),
        )
    ]
    if not shares:
        return ""
    share, chance, one, other = max(shares)
    among = "Largest" if len(shares) == 2 * len(pairs) else "Largest of those not nested by construction"
    return (
        f"{among}: {percent(share)} of the {units} of {one} are also in {other} ({percent(chance)} expected by chance)."
    )


def _by_component(pairs: Sequence[Pair], units: str) -> list[Block]:
    strata = [name for name in pairs[0].effects.names if name != "all"]
    rows = [[pair_words(pair), component_name(name), *_pair_row(pair, name)] for pair in pairs for name in strata]
    what = "component" if units == "weights" else "hook point"
    columns = ["", what, *_PAIR_COLUMNS]
    caption = f"Overlap by {what} (Holm's correction over all {what}s of all pairs)"
    blocks: list[Block] = []
    if len(pairs) <= _MOST_ROWS:
        ratios = [[pair.ratio(name) for name in strata] for pair in pairs]
        labels = [component_name(name) for name in strata]
        figure = compared_figures.ratio_map([pair_words(pair) for pair in pairs], labels, ratios)
        tested = [(pair, name) for pair in found_pairs(pairs) for name in strata if pair.get("sd", name) > 0]
        above = sum(pair.p(name) < SURPRISING for pair, name in tested)
        says = (
            f"Shared {units} over those expected by chance; empty where none is shared or expected. {above} of "
            f"{len(tested)} overlaps are significantly above chance (p < {SURPRISING} after Holm's correction)."
        )
        width = 220 + _CELL * len(strata)
        blocks.append(Chart(f"Overlap by {what}, in times chance", says, figure, width))
    return [*blocks, Numbers(caption, columns, rows)]


@section("places", "Where the kept weights are")
def places(comparison: Comparison) -> Content:
    """Kept weights by layer and component, or nodes by layer and unit."""
    items, units = drawn(comparison), comparison.units
    counts = {one.name: one.subnetwork.by_place() for one in items}
    parts = sorted({part for _, part in counts[items[0].name]})
    layers = sorted({layer for layer, _ in counts[items[0].name]})
    words = {part: component_words(part) if units == "weights" else unit_words(part) for part in parts}
    panels: dict[str, list[compared_figures.Line]] = {words[part]: [] for part in parts}
    rows = []
    for place, one in enumerate(items):
        for part in parts:
            here = [counts[one.name].get((layer, part)) for layer in layers]
            shares = [count.kept / max(one.subnetwork.kept, 1) if count else math.nan for count in here]
            line = compared_figures.Line(one.name, place, [str(layer) for layer in layers], shares)
            panels[words[part]].append(line)
            rows += [
                [one.name, _place_label(layer, part), count.kept, count.total, share, count.fraction]
                for layer, count, share in zip(layers, here, shares, strict=True)
                if count
            ]
    what = "component" if units == "weights" else "unit"
    chart = Chart(f"Share of all kept {units}, by layer and {what}", "", compared_figures.lines(panels, "layer", "~%"))
    columns = ["", what, "kept", "of", "share of all kept", "fraction"]
    table = Numbers(f"Numbers: kept {units} by {what}", columns, rows)
    heading = "" if units == "weights" else f"Where the kept {units} are"
    blocks: list[Block] = [chart, table]
    if units != "weights":
        blocks.append(_nodes_of_each(items))
    return Content([_place_words(comparison.items), left_out(comparison)], blocks, heading)


def _nodes_of_each(items: Sequence[Compared]) -> Numbers:
    """The labels of the nodes that each keeps, where they are few."""
    rows = []
    for one in items:
        assert isinstance(one.subnetwork, Circuit), "all are circuits"
        nodes = one.subnetwork.nodes
        rows.append([one.name, ", ".join(nodes) if len(nodes) <= _MOST_LABELS else f"{len(nodes):,}: too many to list"])
    return Numbers("The nodes that each keeps", ["", "nodes"], rows, is_open=True)


def _place_label(layer: int, part: str) -> str:
    """The label of a component, or of the nodes of a unit in a layer."""
    return PartName(part, layer).label if part in COMPONENTS else f"L{layer} {unit_words(part)}"


def _place_words(items: Sequence[Compared]) -> str:
    """The component that holds most of the kept weights, for each subnetwork."""
    units = items[0].subnetwork.units
    by_place: dict[tuple[int, str], dict[str, float | int]] = {}
    for one in items:
        counts = one.subnetwork.by_place()
        if one.subnetwork.kept:
            at = max(counts, key=lambda place: counts[place].kept)
            by_place.setdefault(at, {})[one.name] = counts[at].kept / one.subnetwork.kept
    parts = []
    for (layer, part), shares in by_place.items():
        of = "all of them" if len(by_place) == 1 and len(shares) == len(items) else listed(list(shares))
        parts.append(
            f"{_place_label(layer, part)} in {of} ({value_range(list(shares.values()), percent)} of the kept {units})"
        )
    if not parts:
        return f"No {units.removesuffix('s')} was kept."
    whose = "component" if units == "weights" else "place"
    return f"The {whose} with the most kept {units} is {'; '.join(parts)}."


@section("layers", "Layer by layer")
def layers(comparison: Comparison) -> Content:
    """Lenses, cosines and rotations of the model with only a subnetwork's weights, by layer."""
    items = drawn(comparison)
    having = [one for one in items if any(isinstance(one.analyses.get(chart.result), Curves) for chart in LAYER_CHARTS)]
    lacking = [one.name for one in items if one not in having]
    how = " (bigram-circuits analyze RUN measures it)" if any(one.run for one in items if one not in having) else ""
    missing = f"Not measured layer by layer{how}: {listed(lacking)}." if lacking else ""
    if not having:
        return Content([left_out(comparison), missing])
    blocks: list[Block] = []
    for chart in LAYER_CHARTS:
        blocks += _by_layer(items, having, chart)
    says = [
        left_out(comparison),
        missing,
        f"The model with only the {comparison.noun}'s {comparison.units}, after every layer.",
    ]
    return Content(says, blocks)


def _by_layer(items: Sequence[Compared], having: Sequence[Compared], chart: LayerChart) -> list[Block]:
    lines, rows, ends, tokens = [], [], [], {}
    for one in having:
        own = one.subnetwork.noun
        curves = _curves(one, chart, own)
        if curves is None:
            continue
        points, values = [str(point) for point in curves.points], curves.get(chart.quantity, own)
        lines.append(compared_figures.Line(one.name, items.index(one), points, values.tolist()))
        low, high = curves.interval(chart.quantity, own)
        rows += [[one.name, *row] for row in zip(points, values.tolist(), low.tolist(), high.tolist(), strict=True)]
        tokens[one.name] = curves.notes.get("tokens")
        known = values[~np.isnan(values)]
        ends.append(f"{rounded(float(known[0]), 2)} to {rounded(float(known[-1]), 2)} in {one.name}")
    if not lines:
        return []
    whole = _whole_line(having, chart)
    says = f"From the first layer to the last, {chart.words} goes from {listed(ends, most=6)}."
    if whole:
        says += " Dashed: the full model."
    if len(set(tokens.values())) > 1:
        counts = [f"{'unknown' if n is None else f'{n:,}'} for {one}" for one, n in tokens.items()]
        says += f" Number of tokens measured: {listed(counts)}."
    figure = compared_figures.lines({chart.label: [*lines, *([whole] if whole else [])]}, "layer")
    table = Numbers(f"Numbers: {chart.title}", ["", "layer", chart.label, "low", "high"], rows)
    return [Chart(chart.title, says, figure), table]


def _whole_line(having: Sequence[Compared], chart: LayerChart) -> compared_figures.Line | None:
    """The full model's line, if all were measured with the same target and text."""
    if len({one.task for one in having}) > 1:
        return None
    for one in having:
        curves = _curves(one, chart, "full")
        if curves is not None:
            points = [str(point) for point in curves.points]
            return compared_figures.Line("full model", None, points, curves.get(chart.quantity, "full").tolist())
    return None


def _curves(one: Compared, chart: LayerChart, condition: str) -> Curves | None:
    """The result that a chart is of, if it has numbers for a condition."""
    curves = one.analyses.get(chart.result)
    if not isinstance(curves, Curves) or condition not in curves.conditions:
        return None
    quantity = chart.quantity
    if quantity not in [known.name for known in curves.quantities] or np.isnan(curves.get(quantity, condition)).all():
        return None
    return curves
