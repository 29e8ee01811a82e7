"""Sections of the comparison page about faithfulness: what is compared, and faithfulness against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bigram_circuits.experiments.comparison import (
    CROSS_ENTROPY,
    KL,
    Compared,
    Comparison,
    R,
    Spread,
    clearly_dominated,
    measured_tasks,
    not_dominated,
    short_settings,
)
from bigram_circuits.measures.words import listed, span
from bigram_circuits.names import short_hash, short_name
from bigram_circuits.report import compared_figures
from bigram_circuits.report.blocks import Block, Chart, Content, Numbers
from bigram_circuits.report.compared_words import MOST_DRAWN, section


@section("what", "What is compared")
def what(comparison: Comparison) -> Content:
    """Settings that differ, sizes, measurements, verdicts and origins."""
    items = comparison.items
    differing = comparison.differing
    says = [_differences(items, differing, comparison.noun)]
    many = len(items) > MOST_DRAWN
    names = short_settings(list(differing))
    rows = [[one.name, *(values[place] for values in differing.values())] for place, one in enumerate(items) if one.run]
    blocks: list[Block] = []
    if comparison.is_repetition:
        says.append(
            "What differs between them is the scatter of the method, and they are not ranked. Mean and spread over "
            "seeds are in the first table."
        )
        blocks.append(_spread(comparison))
    if rows and differing:
        blocks.append(Numbers("Settings that differ", ["", *names], rows, is_open=not many))
    blocks.append(_measured(items, is_open=not many))
    unmeasured = [one.name for one in items if not one.is_evaluated]
    if unmeasured:
        says.append(f"Not evaluated, so without r, KL and losses: {listed(unmeasured)}.")
    if any(one.is_evaluated for one in items):
        says.append(
            "r, cross-entropy and KL are measured against the target, on held-out text; loss is the masked model's "
            "next-token loss. Cross-entropy, KL and loss are in nats; intervals are 95% bootstrap intervals over "
            "sequences."
        )
    verdicts = [[one.name, one.verdict.removeprefix("Verdict: ")] for one in items if one.verdict]
    if verdicts:
        blocks.append(Numbers("Verdict of each against its controls", ["", "verdict"], verdicts, is_open=not many))
    held = [
        [one.name, found.mask_bits, found.table_bits, found.ratio, found.says] for one in items
        if (found := one.mask_capacity)
    ]  # fmt: skip
    if held:
        columns = ["", "bits of the mask", "bits of a table as good", "ratio", "in words"]
        blocks.append(Numbers("Could the mask itself hold the answer?", columns, held, is_open=not many))
    unjudged = [one.name for one in items if one.is_evaluated and not one.verdict]
    if unjudged:
        says.append(f"Evaluated without controls, so without a verdict: {listed(unjudged)}.")
    columns = ["", "folder", "lineage", "model", "weight hash"]
    blocks.append(Numbers("Origin of each", columns, [_origin(one) for one in items]))
    return Content(says, blocks)


def _differences(items: Sequence[Compared], differing: Mapping[str, Any], noun: str) -> str:
    runs, n = [one for one in items if one.run], len(items)
    alone = n - len(runs)
    counted = f"{n} {noun}s, {len(runs)} of them from runs." if alone and runs else f"{n} {noun}s."
    counted = f"{n} runs." if not alone else counted
    if len(runs) < 2:
        return counted
    if not differing:
        return f"{counted} The runs have the same settings."
    names = listed(short_settings(list(differing)), most=20)
    return f"{counted} The runs differ in {names}; all their other settings agree."


def _measured(items: Sequence[Compared], *, is_open: bool) -> Numbers:
    columns = ["", f"{items[0].subnetwork.units} kept", "fraction", "r", "KL", "cross-entropy", "loss", "interval of r",
               "of cross-entropy", "of loss"]  # fmt: skip
    measured, bounded = (R, KL, "cross_entropy", "mean_surprisal"), (R, "cross_entropy", "mean_surprisal")
    rows = [
        [one.name, one.subnetwork.kept, one.subnetwork.fraction, *(one.measured(key) for key in measured),
         *(span(*one.interval(key)) for key in bounded)]
        for one in items
    ]  # fmt: skip
    shown = [at for at in range(len(columns)) if at < 3 or any(row[at] not in (None, "") for row in rows)]
    table = [[row[at] for at in shown] for row in rows]
    return Numbers("Sizes and measurements", [columns[at] for at in shown], table, is_open=is_open)


def _spread(comparison: Comparison) -> Numbers:
    """Mean, standard deviation and range over seeds of what was measured."""
    rows = [
        [words, one.mean, one.deviation, one.low, one.high]
        for key, words in ((R, "r"), (KL, "KL"), (CROSS_ENTROPY, "cross-entropy"), ("mean_surprisal", "loss"))
        if (one := comparison.spread(key)) is not None
    ]
    size = Spread.of([one.subnetwork.fraction for one in comparison.items])
    rows.append(["fraction", size.mean, size.deviation, size.low, size.high])
    columns = ["", "mean", "standard deviation", "smallest", "largest"]
    return Numbers(f"Over {len(comparison.items)} seeds", columns, rows, is_open=True)


def _origin(one: Compared) -> list[str]:
    subnetwork = one.subnetwork
    where = str(one.run.path) if one.run else "not a run"
    made_for = short_name(subnetwork.model_name or "unknown"), short_hash(subnetwork.weight_hash)
    return [one.name, where, subnetwork.lineage, *made_for]


@section("pareto", "Faithfulness against size")
def pareto(comparison: Comparison) -> Content:
    """Faithfulness (r and KL) against the share of weights or nodes kept."""
    items, noun, units = comparison.items, comparison.noun, comparison.units
    drawn = [one for one in items if one.is_evaluated and one.subnetwork.kept]
    if not drawn:
        return Content(["None of them was evaluated, so there is nothing to plot."])
    panels = _panels(comparison, drawn)
    says = [_front_words(drawn, panel) for panel in panels if panel.fronts]
    if len(measured_tasks(drawn, R)) > 1:
        says.insert(0, "Targets or texts differ: values for different ones cannot be compared, and lines join only "
                       "those with the same target and text.")  # fmt: skip
    missing = [one.name for one in items if one not in drawn]
    if missing:
        says.append(f"Not plotted, because nothing was measured or kept: {listed(missing)}.")
    if not panels:
        return Content([*says, "r and KL are undefined for all of them."])
    what = ["Better is up and to the left for r, down and to the left for KL."]
    if any(panel.fronts for panel in panels):
        what.append(
            f"The line is the Pareto front of the measured values: no other {noun} keeps as few {units} and does "
            "as well as one on it. Differences within the intervals (error bars) may be noise."
        )
    lacking = [one.name for one in drawn if one.measured(R, "random") is None and one.measured(KL, "random") is None]
    if len(lacking) < len(drawn):
        where = "in every matrix" if units == "weights" else "at every hook point"
        what.append(f"Hollow marks: random {units}, as many {where} (mean over seeds).")
    if lacking:
        says.append(f"Without a random control: {listed(lacking)}.")
    if any(panel.whole for panel in panels):
        what.append("Dashed: the full model.")
    what.append("The axis of r is Fisher's z.")
    fractions = [one.subnetwork.fraction for one in drawn]
    figure = compared_figures.pareto([one.name for one in drawn], fractions, panels, noun)
    rows = [
        [one.name, one.subnetwork.fraction, *(one.measured(key, of) for key in (R, KL) for of in _CONDITIONS)]
        for one in drawn
    ]
    columns = ["", "fraction", *(f"{word}{of}" for word in ("r", "KL") for of in ("", " of random", " of full model"))]
    chart = Chart(f"r and KL against the share of {units} kept", " ".join(what), figure)
    return Content(says, [chart, Numbers("Numbers: faithfulness against size", columns, rows)])


def front(comparison: Comparison) -> Chart | None:
    """The first of these charts alone, for the top of the page; None if there is nothing to plot."""
    drawn = [one for one in comparison.items if one.is_evaluated and one.subnetwork.kept]
    panels = _panels(comparison, drawn)[:1]
    if not panels:
        return None
    names, fractions = [one.name for one in drawn], [one.subnetwork.fraction for one in drawn]
    better = "up" if panels[0].is_r else "down"
    says = f"Better is {better}, smaller is left. On the line, none of the others is as good and as small."
    says = says if panels[0].fronts else f"Better is {better}, smaller is left."
    says += " Hollow: random ones of the same size." if any(one is not None for one in panels[0].random) else ""
    return Chart("How good at what size", says, compared_figures.pareto(names, fractions, panels, comparison.noun))


def _panels(comparison: Comparison, drawn: Sequence[Compared]) -> list[compared_figures.Points]:
    """R and KL against size, as far as they were measured."""
    has_front = not comparison.is_repetition
    panels = [
        _points(drawn, R, "r with the target", has_front=has_front),
        _points(drawn, KL, "KL from the target (nats)", has_front=has_front),
    ]
    return [panel for panel in panels if any(value is not None for value in panel.values)]


_CONDITIONS = ("subnetwork", "random", "full")


def _points(items: Sequence[Compared], quantity: str, title: str, *, has_front: bool) -> compared_figures.Points:
    ends = [one.interval(quantity) for one in items]
    whole = [one.measured(quantity, "full") for one in items]
    return compared_figures.Points(
        title=title,
        values=[one.measured(quantity) for one in items],
        low=[low for low, _ in ends],
        high=[high for _, high in ends],
        random=[one.measured(quantity, "random") for one in items],
        whole=sorted({round(level, 3) for level in whole if level is not None}),
        fronts=[not_dominated(items, quantity, task) for task in measured_tasks(items, quantity)] if has_front else [],
        is_r=quantity == R,
    )


def _front_words(items: Sequence[Compared], panel: compared_figures.Points) -> str:
    """Those on the front, those that are dominated beyond doubt, and those of which the intervals do not tell."""
    word, quantity = ("r", R) if panel.is_r else ("KL", KL)
    known = {place for place, value in enumerate(panel.values) if value is not None}
    beaten = {place for task in measured_tasks(items, quantity) for place in clearly_dominated(items, quantity, task)}
    best = {place for front in panel.fronts for place in front} - beaten
    names = {
        f"On the Pareto front for {word}": best,
        "Dominated, with intervals that do not overlap": beaten,
        "Not told apart from the front by the intervals": known - best - beaten,
    }
    if not known - best:
        return f"All are on the Pareto front for {word}."
    return " ".join(
        f"{what}: {listed([items[place].name for place in sorted(places)])}."
        for what, places in names.items()
        if places
    )
