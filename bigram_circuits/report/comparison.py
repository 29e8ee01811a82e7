"""The page about several subnetworks of one model: which keeps least for what it does, and are they the same weights?

Every sentence is computed from what is compared; what is missing is said.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.experiments.comparison import (
    SMALLEST,
    Compared,
    Comparison,
    Pair,
    Source,
    compare,
    differing_settings,
)
from bigram_circuits.measures.results import Curves
from bigram_circuits.measures.words import percent, rounded, span
from bigram_circuits.names import PartName
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import LAYER_CHARTS, Block, Chart, Numbers, Opening, Section, interval
from bigram_circuits.report.document import document
from bigram_circuits.runs import model_words
from bigram_circuits.storage.files import write_text

_MOST_ROWS = 28  # pairs in a map; more are in the table alone
_MOST_NAMED = 8  # in a sentence
_SURPRISING = 0.05  # a p-value below it
_CELL = 74  # pixels, of width for a column of a map with words
_R, _KL = "surprisal_correlation", "kl"
_COMPONENTS = {"attn": "attention", "mlp": "MLP"}


def write_comparison(
    runs: Comparison | Mapping[str, Source] | Sequence[Source] | Source,
    path: str | os.PathLike[str] = "comparison.html",
) -> Path:
    """Write the page that sets several subnetworks of one model side by side; an earlier one is replaced.

    Args:
        runs: At least two runs, run folders, subnetworks or subnetwork files, in a sequence or by name. A folder
            written by `find --sparsity-weights` counts as all its runs. Subnetworks of which nothing was measured
            appear in the overlaps and profiles only.
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
        raise ValueError(f"{str(path)!r} is a folder: give a name for the page in it")
    write_text(path, page(runs if isinstance(runs, Comparison) else compare(runs)))
    return path


def page(comparison: Comparison) -> str:
    """The page as text."""
    steps = (_what, _pareto, _overlaps, _places, _layers)
    footer = "Made from the folders and files of what is compared."
    return document(_opening(comparison), [step(comparison) for step in steps], footer)


# --- the top ---


def _opening(comparison: Comparison) -> Opening:
    items = comparison.items
    fractions = [one.subnetwork.fraction for one in items]
    sizes = f"They keep {_range(fractions, percent)} of {items[0].subnetwork.total:,} maskable weights."
    answer = " ".join(sentence for sentence in (sizes, _best(items), _shared(comparison)) if sentence)
    title = f"{len(items)} subnetworks of {_model(items)}, compared"
    asked = "Which of them reproduces its target best with the fewest weights, and do they consist of the same weights?"
    marks = [("subnetworks", str(len(items))), ("of the weights kept", _range(fractions, percent))]
    known = _known(items, _R)
    if known:
        marks.append(("r with the target", _range(list(known.values()), rounded)))
    found = _found(comparison.pairs)
    if found:
        ratios = [pair.ratio() for pair in found]
        marks.append(("times the overlap expected by chance", _range(ratios, _few)))
    return Opening(title, asked, answer, marks)


def _model(items: Sequence[Compared]) -> str:
    runs = [one.run for one in items if one.run]
    if runs:
        return model_words(runs[0])
    return next((one.subnetwork.model_name for one in items if one.subnetwork.model_name), "a model")


def _best(items: Sequence[Compared]) -> str:
    """Who has the highest r and the lowest KL; not told where targets or texts differ."""
    if len(_tasks(items, _R)) > 1:
        return "They were measured with different targets or texts, so their r and KL cannot be ranked."
    parts = []
    for quantity, words, choose in ((_R, "The highest r", max), (_KL, "the lowest KL", min)):
        known = _known(items, quantity)
        if known:
            name = choose(known, key=lambda one: known[one])
            share = next(one.subnetwork.fraction for one in items if one.name == name)
            unit = " nats" if quantity == _KL else ""
            parts.append(f"{words} is that of {name} ({rounded(known[name])}{unit}, {percent(share)} kept)")
    return _sentence("; ".join(parts)) if parts else "None of them was evaluated."


def _shared(comparison: Comparison) -> str:
    if not _found(comparison.pairs):
        return ""
    pairs = sorted(_found(comparison.pairs), key=lambda pair: _or_lowest(pair.ratio()))
    least, most = pairs[0], pairs[-1]
    if least is most:
        return f"{_two(most)} share {_few(most.ratio())} times as many weights as chance would give."
    return (
        f"Furthest above chance is the overlap of {_two(most)}, {_few(most.ratio())} times what chance would give; "
        f"least, that of {_two(least)}, {_few(least.ratio())} times."
    )


# --- what is compared ---


def _what(comparison: Comparison) -> Section:
    items = comparison.items
    differing = differing_settings(items)
    says = [_differences(items, differing)]
    names = _column_names(list(differing))
    rows = [[one.name, *(values[place] for values in differing.values())] for place, one in enumerate(items) if one.run]
    blocks: list[Block] = []
    if rows and differing:
        blocks.append(Numbers("The settings that differ", ["", *names], rows, is_open=True))
    blocks.append(_measured(items))
    unmeasured = [one.name for one in items if not one.metrics]
    if unmeasured:
        says.append(f"Not evaluated, so without r, KL and losses: {_list(unmeasured)}.")
    if any(one.metrics for one in items):
        says.append(
            "r, cross-entropy and KL are with the target, on held-out text; own loss is the masked model's next-token "
            "loss. Cross-entropy, KL and loss are in nats. Intervals: 95%, bootstrap over sequences."
        )
    verdicts = [
        [one.name, str(one.metrics["verdict"]).removeprefix("Verdict: ")] for one in items if one.metrics.get("verdict")
    ]
    if verdicts:
        blocks.append(Numbers("What each is shown to do against its controls", ["", "verdict"], verdicts, is_open=True))
    unjudged = [one.name for one in items if one.metrics and not one.metrics.get("verdict")]
    if unjudged:
        says.append(f"Evaluated without controls, so without a verdict: {_list(unjudged)}.")
    columns = ["", "folder", "found as", "model", "weight hash"]
    blocks.append(Numbers("Where each comes from", columns, [_origin(one) for one in items]))
    return Section("what", "What is compared", says, blocks)


def _differences(items: Sequence[Compared], differing: Mapping[str, Any]) -> str:
    runs, n = [one for one in items if one.run], len(items)
    alone = n - len(runs)
    counted = f"{n} subnetworks, {len(runs)} of them of a run." if alone and runs else f"{n} subnetworks."
    counted = f"{n} runs." if not alone else counted
    if len(runs) < 2:
        return counted
    if not differing:
        return f"{counted} No setting of the runs differs."
    names = _list(_column_names(list(differing)), most=20)
    return f"{counted} The runs differ in {names}; all their other settings agree."


def _measured(items: Sequence[Compared]) -> Numbers:
    columns = ["", "weights kept", "fraction", "r", "KL", "cross-entropy", "own loss", "interval of r",
               "of cross-entropy", "of own loss"]  # fmt: skip
    measured, bounded = (_R, _KL, "cross_entropy", "mean_surprisal"), (_R, "cross_entropy", "mean_surprisal")
    rows = [
        [one.name, one.subnetwork.kept, one.subnetwork.fraction, *(one.measured(key) for key in measured),
         *(span(*interval(one.metrics, "subnetwork", key)) for key in bounded)]
        for one in items
    ]  # fmt: skip
    shown = [at for at in range(len(columns)) if at < 3 or any(row[at] not in (None, "") for row in rows)]
    table = [[row[at] for at in shown] for row in rows]
    return Numbers("Sizes and what was measured", [columns[at] for at in shown], table, is_open=True)


def _origin(one: Compared) -> list[str]:
    subnetwork = one.subnetwork
    where = str(one.run.path) if one.run else "not a run"
    return [one.name, where, subnetwork.lineage, str(subnetwork.model_name), str(subnetwork.weight_hash)]


def _column_names(settings: Sequence[str]) -> list[str]:
    """Last parts of the settings' names, where these tell them apart."""
    last = [name.rsplit(".", 1)[-1] for name in settings]
    chosen = [short if last.count(short) == 1 else name for name, short in zip(settings, last, strict=True)]
    return [name.replace("_", " ").replace(".", " ") for name in chosen]


# --- the Pareto curve ---


def _pareto(comparison: Comparison) -> Section:
    items, heading = comparison.items, "How much for how few weights"
    drawn = [one for one in items if one.metrics and one.subnetwork.kept]
    if not drawn:
        return Section("pareto", heading, ["None of them was evaluated, so there is no curve."])
    panels = [
        _points(drawn, _R, "r with the target"),
        _points(drawn, _KL, "KL from the target (nats)"),
    ]
    panels = [panel for panel in panels if any(value is not None for value in panel.values)]
    says = [_front_words(drawn, panel) for panel in panels]
    if len(_tasks(drawn, _R)) > 1:
        says.insert(0, "Targets or texts differ: the heights of such marks cannot be compared, and a line joins only "
                       "those with the same target and text.")  # fmt: skip
    missing = [one.name for one in items if one not in drawn]
    if missing:
        says.append(f"Not on the curve, because nothing was measured or kept: {_list(missing)}.")
    if not panels:
        return Section("pareto", heading, [*says, "r and KL are undefined for all of them."])
    what = [
        "Higher and further left is better for r, lower and further left for KL. The line joins those that are not "
        "dominated: none of the others keeps no more weights and does no worse."
    ]
    lacking = [one.name for one in drawn if one.measured(_R, "random") is None]
    if len(lacking) < len(drawn):
        what.append("Hollow marks: as many weights in every matrix, drawn at random (mean over seeds).")
    if lacking:
        says.append(f"Without a random control: {_list(lacking)}.")
    if any(panel.whole for panel in panels):
        what.append("Dashed: the whole model.")
    what.append("The axis of r is stretched towards 1 (Fisher's z).")
    figure = figures.pareto([one.name for one in drawn], [one.subnetwork.fraction for one in drawn], panels)
    rows = [
        [one.name, one.subnetwork.fraction, *(one.measured(key, of) for key in (_R, _KL) for of in _CONDITIONS)]
        for one in drawn
    ]
    columns = ["", "fraction", *(f"{word}{of}" for word in ("r", "KL") for of in ("", " of random", " of whole model"))]
    chart = Chart("Share of the weights kept, against r and KL", " ".join(what), figure)
    return Section("pareto", heading, says, [chart, Numbers("Numbers: the Pareto curve", columns, rows)])


_CONDITIONS = ("subnetwork", "random", "full")


def _points(items: Sequence[Compared], quantity: str, title: str) -> figures.Points:
    ends = [interval(one.metrics, "subnetwork", quantity) for one in items]
    whole = [one.measured(quantity, "full") for one in items]
    return figures.Points(
        title=title,
        values=[one.measured(quantity) for one in items],
        low=[low for low, _ in ends],
        high=[high for _, high in ends],
        random=[one.measured(quantity, "random") for one in items],
        whole=sorted({round(level, 3) for level in whole if level is not None}),
        fronts=[not_dominated(items, quantity, task) for task in _tasks(items, quantity)],
        is_r=quantity == _R,
    )


def not_dominated(items: Sequence[Compared], quantity: str, task: str) -> list[int]:
    """Places of those of a task than which no other keeps no more and does no worse, by fraction.

    r is better when higher, other quantities when lower. Of equal ones the first stays.
    """
    sign = -1 if quantity == _R else 1
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


def _front_words(items: Sequence[Compared], panel: figures.Points) -> str:
    word = "r" if panel.is_r else "KL"
    best = [items[place].name for front in panel.fronts for place in front]
    others = [
        one.name for one, value in zip(items, panel.values, strict=True) if value is not None and one.name not in best
    ]
    if not others:
        return f"In fraction and {word}, none is dominated by another."
    return f"In fraction and {word}, not dominated: {_list(best)}. Dominated: {_list(others)}."


def _tasks(items: Sequence[Compared], quantity: str) -> list[str]:
    return list(dict.fromkeys(one.task for one in items if one.measured(quantity) is not None))


# --- overlaps ---


def _overlaps(comparison: Comparison) -> Section:
    heading, pairs, items = "Are they the same weights?", comparison.pairs, comparison.items
    empty = [one.name for one in items if not one.subnetwork.kept]
    says = [f"Without any weight, and so without overlaps: {_list(empty)}."] if empty else []
    if not pairs:
        return Section("overlaps", heading, says)
    given = [_with(pair) for pair in pairs if pair.is_given]
    if given:
        says.insert(0, f"One was looked for inside the other, so that their overlap is no finding: {_list(given)}.")
    if _found(pairs):
        says.insert(0, _overlap_words(_found(pairs)))
    says.append(
        "By chance: one of the two drawn at random with as many weights in every weight matrix as it has, so that a "
        "common liking for a matrix is no evidence. p is exact (a sum of hypergeometric counts), for an overlap above "
        f"chance, with Holm's correction over the {len(pairs)} pairs."
    )
    names = [one.name for one in items]
    maps = figures.pair_maps(names, {"observed": comparison.shares, "by chance": comparison.chances}, "share")
    chart = Chart("Of the row's weights, the share that the column keeps too", _largest(pairs), maps, 640)
    columns = ["", *_PAIR_COLUMNS]
    rows = [[_two(pair), *_pair_row(pair, "all")] for pair in pairs]
    blocks: list[Block] = [chart, Numbers("Overlap of every pair", columns, rows, is_open=True)]
    return Section("overlaps", heading, says, [*blocks, *_by_component(pairs)])


_PAIR_COLUMNS = (
    "kept by both", "by chance", "times chance", "p (Holm)", "its log10", "of the first", "of the second", "Jaccard",
)  # fmt: skip


def _pair_row(pair: Pair, stratum: str) -> list[float | int | str]:
    p = pair.p(stratum)
    tested = [pair.ratio(stratum), p if p > SMALLEST else f"< {SMALLEST:.0e}", pair.log10_p[stratum]]
    shares = [pair.get(key, stratum) for key in ("share_of_a_in_b", "share_of_b_in_a", "jaccard")]
    return [pair.get("intersection", stratum), pair.get("expected", stratum), *tested, *shares]


def _found(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose overlap is not given by how they were made."""
    return [pair for pair in pairs if not pair.is_given]


def _overlap_words(pairs: Sequence[Pair]) -> str:
    if len(pairs) == 1:
        pair = pairs[0]
        is_above = "above chance" if pair.p() < _SURPRISING else "not shown to be above chance"
        return (
            f"{_two(pair)} both keep {pair.get('intersection'):,.0f} weights, {_few(pair.ratio())} times what chance "
            f"would give ({pair.get('expected'):,.0f}): {is_above} ({_p_words(pair)})."
        )
    below = [_with(pair) for pair in pairs if pair.p() >= _SURPRISING]
    says = f"Of {len(pairs)} pairs, {len(pairs) - len(below)} overlap more than chance would have it"
    if not below:
        says = f"All {len(pairs)} pairs overlap more than chance would have it"
    return f"{says} (p < {_SURPRISING} after Holm's correction).{f' Not shown for {_list(below)}.' if below else ''}"


def _p_words(pair: Pair) -> str:
    return f"p = {pair.p():.2g}" if pair.p() > 1e-4 else f"p = 10^{pair.log10_p['all']:,.0f}"


def _largest(pairs: Sequence[Pair]) -> str:
    """The largest share that is a finding."""
    shares = [
        (pair.get(share), pair.get("expected") / pair.get(kept), one.name, other.name)
        for pair in _found(pairs)
        for share, kept, one, other in (
            ("share_of_a_in_b", "kept_a", pair.first, pair.second),
            ("share_of_b_in_a", "kept_b", pair.second, pair.first),
        )
    ]
    if not shares:
        return ""
    share, chance, one, other = max(shares)
    among = "Largest" if len(shares) == 2 * len(pairs) else "Largest where it is a finding"
    return f"{among}: {percent(share)} of the weights of {one} are in {other} too; by chance, {percent(chance)}."


def _by_component(pairs: Sequence[Pair]) -> list[Block]:
    strata = [name for name in pairs[0].effects.names if name != "all"]
    rows = [[_two(pair), name, *_pair_row(pair, name)] for pair in pairs for name in strata]
    columns = ["", "component", *_PAIR_COLUMNS]
    caption = "Overlap by component (Holm's correction over all components of all pairs)"
    blocks: list[Block] = []
    if len(pairs) <= _MOST_ROWS:
        ratios = [[pair.ratio(name) for name in strata] for pair in pairs]
        figure = figures.ratio_map([_two(pair) for pair in pairs], strata, ratios)
        tested = [(pair, name) for pair in _found(pairs) for name in strata if pair.get("sd", name) > 0]
        above = sum(pair.p(name) < _SURPRISING for pair, name in tested)
        says = (
            f"Weights kept by both, over those expected by chance; empty where none is shared or expected. "
            f"{above} of {len(tested)} overlaps are above chance (p < {_SURPRISING} after Holm's correction over all)."
        )
        width = 220 + _CELL * len(strata)
        blocks.append(Chart("Overlap by layer and component, in times chance", says, figure, width))
    return [*blocks, Numbers(caption, columns, rows)]


# --- where they are, and layer by layer ---


def _places(comparison: Comparison) -> Section:
    items = comparison.items
    counts = {one.name: one.subnetwork.by_component() for one in items}
    parts = sorted({part for _, part in counts[items[0].name]})
    layers = sorted({layer for layer, _ in counts[items[0].name]})
    panels: dict[str, list[figures.Line]] = {_COMPONENTS.get(part, part): [] for part in parts}
    rows = []
    for place, one in enumerate(items):
        for part in parts:
            here = [counts[one.name].get((layer, part)) for layer in layers]
            shares = [count.kept / max(one.subnetwork.kept, 1) if count else math.nan for count in here]
            line = figures.Line(one.name, place, [str(layer) for layer in layers], shares)
            panels[_COMPONENTS.get(part, part)].append(line)
            rows += [
                [one.name, PartName(part, layer).label, count.kept, count.total, share, count.fraction]
                for layer, count, share in zip(layers, here, shares, strict=True)
                if count
            ]
    chart = Chart("Of all kept weights, the share in each place", "", figures.lines(panels, "layer", "~%"))
    columns = ["", "layer and component", "kept", "of", "share of all kept", "share of the place"]
    table = Numbers("Numbers: kept weights by layer and component", columns, rows)
    return Section("places", "Where the kept weights are", [_place_words(items)], [chart, table])


def _place_words(items: Sequence[Compared]) -> str:
    """The place that holds most, of each."""
    by_place: dict[tuple[int, str], dict[str, float | int]] = {}
    for one in items:
        counts = one.subnetwork.by_component()
        if one.subnetwork.kept:
            at = max(counts, key=lambda place: counts[place].kept)
            by_place.setdefault(at, {})[one.name] = counts[at].kept / one.subnetwork.kept
    parts = []
    for (layer, part), shares in by_place.items():
        of = "all" if len(by_place) == 1 and len(shares) == len(items) else _list(list(shares))
        word = _COMPONENTS.get(part, part)
        parts.append(f"the {word} of layer {layer} ({_range(list(shares.values()), percent)}), in {of}")
    return f"The largest part of the kept weights is in {'; in '.join(parts)}." if parts else "No weight was kept."


def _layers(comparison: Comparison) -> Section:
    items, heading = comparison.items, "Layer by layer"
    having = [one for one in items if any(isinstance(one.analyses.get(name), Curves) for name, *_ in LAYER_CHARTS)]
    lacking = [one.name for one in items if one not in having]
    how = " (bigram-circuits analyze RUN measures it)" if any(one.run for one in items if one not in having) else ""
    missing = f"Not measured layer by layer{how}: {_list(lacking)}." if lacking else ""
    if not having:
        return Section("layers", heading, [missing])
    blocks: list[Block] = []
    for name, quantity, title, what in LAYER_CHARTS:
        blocks += _by_layer(items, having, name, quantity, title, what)
    says = [missing, "What the model does when only a subnetwork's weights are kept, read after every layer."]
    return Section("layers", heading, says, blocks)


def _by_layer(
    items: Sequence[Compared], having: Sequence[Compared], name: str, quantity: str, title: str, what: str
) -> list[Block]:
    lines, rows, ends, tokens = [], [], [], {}
    for one in having:
        curves = _curves(one, name, quantity, "subnetwork")
        if curves is None:
            continue
        points, values = [str(point) for point in curves.points], curves.get(quantity, "subnetwork")
        lines.append(figures.Line(one.name, items.index(one), points, values.tolist()))
        low, high = curves.interval(quantity, "subnetwork")
        rows += [[one.name, *row] for row in zip(points, values.tolist(), low.tolist(), high.tolist(), strict=True)]
        tokens[one.name] = curves.notes.get("tokens")
        known = values[~np.isnan(values)]
        ends.append(f"{rounded(float(known[0]), 2)} to {rounded(float(known[-1]), 2)} in {one.name}")
    if not lines:
        return []
    whole = _whole_line(having, name, quantity)
    says = f"From the first layer to the last, {what} goes from {_list(ends, most=6)}."
    if whole:
        says += " Dashed: the whole model."
    if len(set(tokens.values())) > 1:
        counts = [f"{'unknown' if n is None else f'{n:,}'} in {one}" for one, n in tokens.items()]
        says += f" Tokens measured on: {_list(counts)}."
    figure = figures.lines({what: [*lines, *([whole] if whole else [])]}, "layer")
    table = Numbers(f"Numbers: {title}", ["", "layer", what, "low", "high"], rows)
    return [Chart(title, says, figure), table]


def _whole_line(having: Sequence[Compared], name: str, quantity: str) -> figures.Line | None:
    """That of the whole model, if all were measured with the same target and text."""
    if len({one.task for one in having}) > 1:
        return None
    for one in having:
        curves = _curves(one, name, quantity, "full")
        if curves is not None:
            points = [str(point) for point in curves.points]
            return figures.Line("whole model", None, points, curves.get(quantity, "full").tolist())
    return None


def _curves(one: Compared, name: str, quantity: str, condition: str) -> Curves | None:
    """A result that has numbers of a quantity for a condition."""
    curves = one.analyses.get(name)
    if not isinstance(curves, Curves) or condition not in curves.conditions:
        return None
    if quantity not in [known.name for known in curves.quantities] or np.isnan(curves.get(quantity, condition)).all():
        return None
    return curves


# --- words ---


def _known(items: Sequence[Compared], quantity: str) -> dict[str, float | int]:
    known = {one.name: one.measured(quantity) for one in items}
    return {name: value for name, value in known.items() if value is not None}


def _range(values: Sequence[float | int], words: Any) -> str:
    """From the smallest to the largest, or the one that all of them are."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "undefined"
    low, high = words(min(known)), words(max(known))
    return low if low == high else f"{low} to {high}"


def _few(value: float | int) -> str:
    return "undefined" if math.isnan(value) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _or_lowest(value: float | int) -> float | int:
    return -math.inf if math.isnan(value) else value


def _two(pair: Pair) -> str:
    return f"{pair.first.name} and {pair.second.name}"


def _with(pair: Pair) -> str:
    """The same, to be put in a list."""
    return f"{pair.first.name} with {pair.second.name}"


def _list(names: Sequence[str], most: int = _MOST_NAMED) -> str:
    """Names in a sentence; of many, the first ones and how many more."""
    if len(names) > most + 1:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}." if words else ""
