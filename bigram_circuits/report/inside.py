"""Sections about what was found in the model: where it is, ablations, layers, attribution, what it lacks."""

from __future__ import annotations

import math

import numpy as np

from bigram_circuits.circuit import Circuit
from bigram_circuits.measures.conditions import CONDITIONS, OWN, condition_of, label_of, own_of
from bigram_circuits.measures.results import Curves, Effects, Maps
from bigram_circuits.measures.words import listed, percent, rounded, sentence
from bigram_circuits.names import PartName, head_label
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Block, Chart, Content, Numbers
from bigram_circuits.report.nodes import nodes_kept
from bigram_circuits.report.results import (
    LAYER_CHARTS,
    LayerChart,
    Results,
    activating_tokens,
    result_blocks,
    result_table,
)
from bigram_circuits.report.sections import section
from bigram_circuits.report.words import component_words
from bigram_circuits.runs import Run

_MOST_BARS = 20


@section("where", "Where the kept weights are")
def where(run: Run, results: Results) -> Content:
    """Kept weights by layer, component, head and neuron; of a circuit, which nodes are kept."""
    if isinstance(run.mask, Circuit):
        return nodes_kept(run.mask, results)
    says = [_component_words(run)]
    if not run.analyses:
        says.append("This run was not analysed, so nothing is known about single heads and neurons.")
    says += results.reasons("by_layer", "by_head", "concentration", "whole_neurons", "max_activating_tokens")
    return Content(says, [*_by_component(run, results), *_by_head(results), *_neurons(results)])


def _by_component(run: Run, results: Results) -> list[Block]:
    """Kept weights by layer and component, counted from the subnetwork itself."""
    counts = run.subnetwork.by_component()
    layers, parts = sorted({layer for layer, _ in counts}), sorted({part for _, part in counts})
    share = [
        [counts[x, p].kept / max(run.subnetwork.kept, 1) if (x, p) in counts else 0.0 for p in parts] for x in layers
    ]
    densest = max(counts, key=lambda at: counts[at].fraction)
    density = percent(counts[densest].fraction)
    says = f"The densest component is {PartName(densest[1], densest[0]).label}: {density} of its weights are kept."
    columns = [component_words(part) for part in parts]
    chart = figures.heat_map(share, [str(layer) for layer in layers], columns, "layer", "share")
    rows = [[PartName(part, layer).label, n.kept, n.total, n.fraction] for (layer, part), n in counts.items()]
    blocks: list[Block] = [Chart("Share of all kept weights, by layer and component", says, chart)]
    blocks.append(Numbers("Numbers: kept weights by component", ["component", "kept", "of", "fraction"], rows))
    measured = results.maps("by_layer")
    return [*blocks, result_table(measured, "by layer")] if measured else blocks


def _by_head(results: Results) -> list[Block]:
    heads = results.maps("by_head")
    if not heads:
        return []
    says = [f"{_densest(heads, name)} in the {label_of(name)}" for name in heads.conditions]
    title = "Share of each head's weights that is kept"
    figure = figures.dressed(heads.plot("density")).update_layout(coloraxis_colorbar_tickformat="~%")
    chart = Chart(title, f"The densest head is {', and '.join(says)}.", figure)
    return [chart, result_table(heads, "by head")]


def _neurons(results: Results) -> list[Block]:
    """How kept MLP weights are spread over neurons, the densest neurons, and their maximally activating tokens."""
    blocks: list[Block] = []
    dense = results.curves("concentration")
    if dense:
        blocks += result_blocks(dense, dense.title, _concentration_words(dense))
    neurons, tokens = results.effects("whole_neurons"), results.maps("max_activating_tokens")
    if neurons and neurons.names:
        says = "".join(
            f"The densest neuron is {name}: {percent(x)} of its weights are kept." for name, x in neurons.top(1)
        )
        series = {"share of the neuron's weights kept": neurons.values[0].tolist()}
        blocks.append(Chart(neurons.title, says, figures.bars(neurons.names, series, neurons.quantities[0].label)))
        blocks.append(result_table(neurons, "densest neurons"))
    if tokens and tokens.text:
        blocks += [
            activating_tokens(tokens),
            result_table(tokens, "maximally activating tokens of the densest neurons"),
        ]
    return blocks


def _component_words(run: Run) -> str:
    counts, kept = run.subnetwork.by_component(), run.subnetwork.kept
    if not kept:
        return "No weight was kept."
    parts = {part: sum(n.kept for (_, p), n in counts.items() if p == part) for part in sorted({p for _, p in counts})}
    layers = {layer: sum(n.kept for (x, _), n in counts.items() if x == layer) for layer in {x for x, _ in counts}}
    part, layer = max(parts, key=lambda one: parts[one]), max(layers, key=lambda one: layers[one])
    return (
        f"{percent(parts[part] / kept)} of the kept weights are in {component_words(part)} matrices, "
        f"{percent(layers[layer] / kept)} in layer {layer}."
    )


def _densest(heads: Maps, condition: str) -> str:
    density = heads.get("density", condition)
    if np.isnan(density).all():
        return "unknown"
    row, column = np.unravel_index(int(np.nanargmax(density)), density.shape)
    return (
        f"{head_label(int(heads.rows[row]), int(heads.columns[column]))} ({percent(float(density[row, column]))} kept)"
    )


def _concentration_words(dense: Curves) -> str:
    near = int(np.argmin([abs(float(point) - 0.1) for point in dense.points]))
    shares = [
        f"{percent(float(line[near]))} in the {label_of(name)}"
        for name, line in zip(dense.conditions, dense.values[0], strict=True)
    ]
    neurons = f"{100 * float(dense.points[near]):.0f}%"
    return f"Share of the kept MLP weights in the densest {neurons} of neurons: {', '.join(shares)}."


@section("task", "The answers of the task")
def task(run: Run, results: Results) -> Content:
    """What the model answers under each condition."""
    found = results.effects("task")
    if not found:
        return Content([])
    accuracy, losses = found.get("accuracy"), found.get("loss")
    parts = [f"{percent(accuracy[n])} ({label_of(n)}, {rounded(losses[n], 2)} nats)" for n in found.names]
    says = (
        f"Of {found.notes['rows']:,} held-out rows, the right answer is the most likely one in {listed(parts)}; in "
        f"brackets, the surprisal of the answer, which for guessing is {rounded(found.notes['loss_of_guessing'], 2)}."
    )
    return Content([says], result_blocks(found, found.title, ""))


@section("needed", "What the model and the subnetwork need")
def needed(run: Run, results: Results) -> Content:
    """The rise in loss when components or heads are ablated, and r as everything else is removed."""
    blocks: list[Block] = []
    for name, what in (("ablation_components", "component"), ("ablation_heads", "head")):
        effects = results.effects(name)
        if effects:
            blocks += _ablation(effects, what)
    removed = results.curves("stochastic_ablation")
    if removed:
        key, measured, shown = "surprisal_correlation", "r", "r with the target"
        if np.isnan(removed.get(key, removed.conditions[0])).all():
            key, measured, shown = "loss", "the model's loss", "The model's loss"
        gone = "removed" if run.mask.units == "weights" else "replaced"
        lines = {name: removed.get(key, name) for name in removed.conditions}
        says = [
            f"from {rounded(float(line[0]), 2)} to {rounded(float(line[-1]), 2)} for the {label_of(name)}"
            for name, line in lines.items()
        ]
        words = f"As all other {run.mask.units} are {gone} at random, {measured} goes {listed(says)}."
        title = f"{shown} as all other {run.mask.units} are {gone}"
        blocks += result_blocks(removed, title, words, key)
    steps = ("ablation_components", "ablation_heads", "stochastic_ablation")
    heading = "" if run.mask.noun == "subnetwork" else f"What the model and the {run.mask.noun} need"
    says = results.reasons(*steps) if blocks else results.absent("what ablations cost", *steps)
    return Content(says, blocks, heading)


def _ablation(effects: Effects, what: str) -> list[Block]:
    keys = {"full": "rise_in_loss"} | {own: f"rise_in_loss_in_{own}" for own in OWN}
    names = [one.name for one in effects.quantities]
    series = {name: effects.get(key) for name, key in keys.items() if key in names}
    if not series:
        return result_blocks(effects, effects.title, "")
    chosen = [name for name, _ in effects.top(_MOST_BARS, keys["full"] if "full" in series else None)]
    if len(effects.names) <= _MOST_BARS:
        chosen = list(effects.names)
    at = [effects.names.index(name) for name in chosen]
    ends = {
        name: (effects.low[names.index(keys[name])][at].tolist(), effects.high[names.index(keys[name])][at].tolist())
        for name in series
    }
    says = [
        f"{costliest} for the {label_of(name)} ({rounded(cost, 2)} nats)"
        for name in series
        for costliest, cost in effects.top(1, keys[name])
    ]
    words = f"The costliest {what} to set to zero: {', '.join(says)}.{_beyond_chance(effects)}" if says else ""
    shown = {name: [values[one] for one in chosen] for name, values in series.items()}
    few = f" (the {len(chosen)} largest of {len(effects.names)})" if len(chosen) < len(effects.names) else ""
    title = f"Rise in loss when one {what} is set to zero{few}"
    return [
        Chart(title, words, figures.bars(chosen, shown, "rise in loss (nats)", ends)),
        result_table(effects, f"ablation of every {what}"),
    ]


def _beyond_chance(effects: Effects) -> str:
    names = [one.name for one in effects.quantities]
    if "excess" not in names or np.isnan(effects.low[names.index("excess")]).all():
        return ""
    above = int((effects.low[names.index("excess")] > 0).sum())
    return f" {above} of {len(effects.names)} cost more than a random ablation of the same size (95% intervals)."


@section("layers", "Layer by layer")
def layers(run: Run, results: Results) -> Content:
    """Lenses, cosines, rotations and covariances by layer."""
    blocks: list[Block] = []
    for name in dict.fromkeys(chart.result for chart in LAYER_CHARTS):
        curves = results.curves(name)
        if curves:
            blocks += [_by_layer(curves, chart) for chart in LAYER_CHARTS if _shows(curves, name, chart)]
            blocks.append(result_table(curves, f"{curves.title}, by layer"))
    alike = results.maps("covariance")
    if alike:
        min_width = 620 if len(alike.conditions) > 1 else 0
        blocks += result_blocks(alike, alike.title, _alike_words(alike), min_width=min_width)
    says = (
        f"One line per condition: the full model, the {run.mask.noun}, its complement (the full model without it), and "
        f"matched random {run.mask.units}."
    )
    lens = results.curves("logit_lens")
    steps = ("layer by layer", "covariance")
    words = (
        [_rise_words(lens) if lens else "", says, *results.reasons(*steps)]
        if blocks
        else results.absent("what happens layer by layer", *steps)
    )
    return Content(words, blocks)


def _shows(curves: Curves, name: str, chart: LayerChart) -> bool:
    """Whether a chart is of these curves and they have numbers for it."""
    names = [one.name for one in curves.quantities]
    if chart.result != name or chart.quantity not in names:
        return False
    return not np.isnan(curves.values[names.index(chart.quantity)]).all()


def _by_layer(curves: Curves, chart: LayerChart) -> Chart:
    words = _course(curves, chart.quantity, chart.words)
    if f"{chart.quantity}_baseline" in [one.name for one in curves.quantities]:
        words += " Dashed: the baseline with tokens of other positions."
        return Chart(chart.title, words, figures.with_baseline(curves, chart.quantity))
    return Chart(chart.title, words, figures.dressed(curves.plot(chart.quantity)))


def _course(curves: Curves, quantity: str, what: str) -> str:
    """The first and the last value, by condition, and the layer that changes it most."""
    parts = []
    for condition in (name for name in (*OWN, "full") if name in curves.conditions):
        values = curves.get(quantity, condition)
        steps = np.abs(np.diff(values))
        if np.isnan(steps).all():
            continue
        known = values[~np.isnan(values)]
        where = _layer_words(curves, int(np.nanargmax(steps)) + 1)
        most = f" (mostly at {where})" if steps.size > 1 and np.nanmax(steps) > _LITTLE else ""
        parts.append(f"from {rounded(known[0], 2)} to {rounded(known[-1], 2)} in the {label_of(condition)}{most}")
    return f"From the first layer to the last, {what} goes {' and '.join(parts)}." if parts else ""


def _layer_words(curves: Curves, place: int) -> str:
    """A layer by its number, and whether it is the first or the last."""
    which = {1: ", the first", len(curves.points) - 1: ", the last"}.get(place, "") if len(curves.points) > 2 else ""
    return f"layer {curves.points[place]}{which}"


def _rise_words(lens: Curves) -> str:
    """Where the logit lens' r with the target rises most, by condition: computed, not assumed to be the first layer."""
    if "surprisal_correlation" not in [one.name for one in lens.quantities]:
        return ""
    parts = []
    for condition in (name for name in ("full", *OWN) if name in lens.conditions):
        values = lens.get("surprisal_correlation", condition)
        steps = np.diff(values)
        if np.isnan(steps).all():
            continue
        place = int(np.nanargmax(steps))
        rise = f"from {rounded(values[place], 2)} to {rounded(values[place + 1], 2)}"
        where = f"most at {_layer_words(lens, place + 1)}, {rise}" if steps[place] > _LITTLE else "at no layer"
        parts.append(f"in the {label_of(condition)} {where}")
    return f"The r of the logit lens with the target's surprisals rises {'; '.join(parts)}." if parts else ""


_LITTLE = 0.01
"""A smaller change from one layer to the next is not told."""


def _alike_words(alike: Maps) -> str:
    both = [name for name in alike.conditions if "full" in name and any(own in name for own in OWN)]
    if not both or len(alike.rows) != len(alike.columns):
        return ""
    own = np.diag(alike.get(alike.quantities[0].name, both[0]))
    return (
        f"Between the same layer of the full model and the {own_of(alike.conditions)}: "
        f"{rounded(float(own[0]), 2)} at {alike.rows[0]}, "
        f"{rounded(float(own[-1]), 2)} at layer {alike.rows[-1]}."
    )


@section("attribution", "Which components write the prediction")
def attribution(run: Run, results: Results) -> Content:
    """Direct logit attribution to components."""
    found = results.maps("attribution")
    if not found:
        return Content(results.absent("direct logit attribution", "attribution"))
    parts = []
    for condition in (name for name in (*OWN, "full") if name in found.conditions):
        values = found.get(found.quantities[0].name, condition)
        if not np.isnan(values).all():
            row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
            value = rounded(float(values[row, column]), 2)
            token = f"“{found.columns[column]}”"
            parts.append(f"in the {label_of(condition)}, {found.rows[row]} adds most to {token} ({value})")
    says = sentence("; ".join(parts))
    if len(found.columns) > 1:
        return Content([], result_blocks(found, found.title, says))
    series = {name: found.values[0, c, :, 0].tolist() for c, name in enumerate(found.conditions)}
    chart = figures.bars(found.rows, series, found.quantities[0].label)
    return Content([], [Chart(found.title, says, chart), result_table(found, "attribution")])


@section("overlap", "Is it just the largest weights?")
def overlap(run: Run, results: Results) -> Content:
    """Overlap of the kept weights with the largest ones; of kept nodes, with those of the largest gradients."""
    found = results.effects("overlap_magnitude")
    of_nodes = isinstance(run.mask, Circuit)
    heading = "Is it what gradients alone would choose?" if of_nodes else ""
    if not found:
        what = CONDITIONS[condition_of("magnitude", run.mask.noun)].label
        return Content(results.absent(f"overlap with the {what}", "overlap_magnitude"), heading=heading)
    shares, expected, kept = found.get("share_of_a_in_b"), found.get("expected"), found.get("kept_a")
    common = found.get("intersection")
    chance = [expected[name] / kept[name] if kept[name] else math.nan for name in found.names]
    whole = found.names[0]
    among = (
        "have the largest gradients of their hook points, in the full model" if of_nodes
        else "are also among the largest of their matrices"
    )  # fmt: skip
    says = (
        f"{percent(shares[whole])} of the kept {run.mask.units} ({common[whole]:,.0f}) {among}; "
        f"{percent(chance[0])} ({expected[whole]:,.0f}) are expected by chance."
    )
    what = f"strongest {run.mask.units}" if of_nodes else "largest weights"
    series = {run.mask.noun: list(shares.values()), condition_of("random", run.mask.noun): chance}
    chart = figures.bars(found.names, series, f"share among the {what}")
    which = "strongest" if of_nodes else "largest"
    title = f"Share of the kept {run.mask.units} that are among the {which} (random: expected by chance)"
    return Content([], [Chart(title, says, chart), result_table(found, "overlap")], heading)


@section("lacks", "What it lacks: induction")
def lacks(run: Run, results: Results) -> Content:
    """How far single heads and pairs of heads, added to the subnetwork, restore induction."""
    blocks: list[Block] = []
    for name, title in (
        ("induction", f"Fall in loss when one head is added to the {run.mask.noun}"),
        ("induction_pairs", "Fall in loss when the best head and another are added"),
    ):
        found = results.effects(name)
        if found:
            blocks += _sufficient(found, title)
    if not blocks:
        return Content(results.absent("which heads restore induction", "induction"))
    notes = next(results.by_name[name].notes for name in ("induction", "induction_pairs") if name in results.by_name)
    known = {key: notes.get(f"loss_of_{key}") for key in ("base", "full", "guessing")}
    says = (
        f"On repeated random tokens, the loss is {rounded(known['base'], 2)} nats for the {run.mask.noun}, "
        f"{rounded(known['full'], 2)} for the full model and {rounded(known['guessing'], 2)} for a uniform guess."
    )
    return Content([says if None not in known.values() else ""], blocks)


def _sufficient(found: Effects, title: str) -> list[Block]:
    top = found.top(_MOST_BARS)
    if not top:
        return result_blocks(found, title, "")
    at = [found.names.index(name) for name, _ in top]
    unit = found.quantities[0].label
    name, value = top[0]
    says = f"{name[:1].upper()}{name[1:]} helps most: it lowers the loss by {rounded(value, 2)} nats."
    table = result_table(found, title)
    if len(top) < len(found.names):
        title = f"{title} (the {len(top)} largest of {len(found.names)})"
    chart = figures.bars(
        [name for name, _ in top], {"fall": [value for _, value in top]}, unit,
        {"fall": (found.low[0][at].tolist(), found.high[0][at].tolist())},
    )  # fmt: skip
    return [Chart(title, says, chart), table]


@section("other", "Other results")
def other(run: Run, results: Results) -> Content:
    """Results that no other section shows."""
    blocks: list[Block] = []
    for name, result in results.rest().items():
        blocks += result_blocks(result, f"{result.title} ({name})", "")
    return Content([], blocks)
