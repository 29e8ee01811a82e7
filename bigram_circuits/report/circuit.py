"""Sections about the circuit: from token in to token out, what each neuron does, whether the picture predicts."""

from __future__ import annotations

import math

from bigram_circuits.explanations.page import atlas_view
from bigram_circuits.measures.conditions import OWN, label_of
from bigram_circuits.measures.results import Effects, Scatter
from bigram_circuits.measures.words import percent, rounded, span
from bigram_circuits.report import blocks as made
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Block, Chart, Content, Numbers
from bigram_circuits.report.results import Results, result_table
from bigram_circuits.report.sections import section
from bigram_circuits.report.words import spoken_tokens
from bigram_circuits.runs import Run

PREDICTS, HARDLY = 0.7, 0.4
"""Least r of predicted and measured effects at which a picture predicts, and at which it does so roughly."""
_CELL = 20  # pixels, of the width and height of a cell in the map of neurons and tokens
_TOKENS = 6  # in a table cell


@section("circuit", "The circuit, from token in to token out")
def circuit(run: Run, results: Results) -> Content:
    """The atlas, to be explored."""
    atlas = results.atlas
    if atlas is None or not atlas.explanations:
        return Content(results.absent("how predictions come about", "atlas"))
    says = (
        "Orange raises the logit that is explained, blue lowers it. Numbers are logits. With attention patterns, the "
    )
    says += "scales of norms and the slopes of activation functions frozen at their values on this prompt, everything "
    says += "that flows into the answer adds up to its logit exactly."
    return Content([*_used(results)], [made.Circuit(atlas.title, says, atlas_view(atlas))])


def _used(results: Results) -> list[str]:
    """How many neurons an average token uses, beside random weights."""
    used = results.effects("neurons_used")
    own = next((name for name in OWN if used and name in used.names), None)
    if used is None or own is None:
        return []
    half, most = used.get("for_half"), used.get("for_90_percent")
    says = f"After an average token, half of all that flows to the prediction goes through {half[own]:.0f} neurons of "
    says += f"the {label_of(own)}, and 90% through {most[own]:.0f}"
    others = [name for name in used.names if name != own and not math.isnan(half[name])]
    beside = [f"{half[name]:.0f} and {most[name]:.0f} in the {label_of(name)}" for name in others]
    return [f"{says} ({'; '.join(beside)})." if beside else f"{says}."]


@section("predicts", "Does the picture predict?")
def predicts(run: Run, results: Results) -> Content:
    """What explanations say that neurons add, against what their removal does."""
    found = results.effects("predicted_effects")
    if not isinstance(found, Scatter):
        return Content(results.absent("what the removal of neurons does", "predicted_effects"))
    says = [_verdict(found)]
    blocks: list[Block] = []
    for quantity, title in (("direct", "What a neuron adds by itself"), ("flow", "What it adds along all paths")):
        figure = figures.dressed(found.plot(quantity))
        blocks.append(Chart(f"{title}, against the fall of the logit without it", _fit_words(found, quantity), figure))
    rows = [
        [words, fit["r"], span(*fit["r_interval"]), fit["slope"], span(*fit["slope_interval"])]
        for words, fit in (("directly", found.notes["direct"]), ("along all paths", found.notes["flow"]))
    ]
    columns = ["predicted", "r", "95% interval", "slope (1: the right size)", "95% interval of the slope"]
    return Content(says, [*blocks, Numbers("Numbers: predicted and measured effects", columns, rows)])


def _verdict(found: Scatter) -> str:
    """Whether the picture predicts, in a sentence."""
    r = found.notes["direct"]["r"]
    pairs = f"over {found.notes['pairs']:,} pairs of a neuron and one of {found.notes['tokens']} frequent tokens"
    if r is None or math.isnan(r):
        return f"Whether it predicts is unknown: removals have no spread {pairs}."
    if r >= PREDICTS:
        return (
            f"It does: what a neuron adds to the logit of the predicted token by itself and how far that logit falls "
            f"when the neuron is removed agree with r = {rounded(r, 2)}, {pairs}."
        )
    how = "only roughly" if r >= HARDLY else "hardly"
    return (
        f"It predicts {how}: what a neuron adds by itself and how far the logit falls when the neuron is removed agree "
        f"with r = {rounded(r, 2)} alone, {pairs}. Take single edges of the picture with care."
    )


def _fit_words(found: Scatter, quantity: str) -> str:
    fit = found.notes[quantity]
    between = span(*fit["r_interval"])
    between = f" (95% interval {between})" if between else ""
    says = f"r = {rounded(fit['r'], 2)}{between}, slope {rounded(fit['slope'], 2)}."
    return f"{says} On the dotted line, the removal does just what the picture says."


@section("units", "What neurons and heads do")
def units(run: Run, results: Results) -> Content:
    """Which tokens neurons serve, and what is lost without each."""
    effects, mapped = results.effects("unit_effects"), results.maps("neuron_map")
    blocks: list[Block] = []
    if mapped:
        figure = figures.dressed(mapped.plot(), 120 + _CELL * len(mapped.rows))
        says = (
            f"Rows and columns are ordered so that what is similar stands side by side. These {len(mapped.rows)} "
            f"neurons carry {percent(mapped.notes['share_shown'])} of what flows through all neurons."
        )
        blocks.append(Chart(mapped.title, says, figure, 160 + _CELL * len(mapped.columns)))
        blocks.append(result_table(mapped, mapped.title))
    if effects and effects.names:
        blocks.append(_unit_table(effects))
    if not blocks:
        return Content(results.absent("what neurons and heads do", "unit_effects", "neuron_map"))
    return Content([*_lost_words(effects), *results.reasons("unit_effects", "neuron_map", "neurons_used")], blocks)


def _lost_words(effects: Effects | None) -> list[str]:
    if effects is None or not effects.names:
        return []
    name, rise = effects.top(1)[0]
    lost = effects.get("lost")[name]
    share = "" if math.isnan(lost) else f", {percent(lost)} of what the context tells about the next token"
    return [
        f"Of {effects.notes['kept_units']:,} neurons and heads of which something is kept, the {len(effects.names)} "
        f"through which most flows were removed one at a time. Without {name}, the loss against the target rises most: "
        f"by {rounded(rise)} nats{share}."
    ]


def _unit_table(effects: Effects) -> Numbers:
    known = effects.notes["units"]
    rise, lost = effects.get("rise"), effects.get("lost")
    rows = [
        [label, rise[label], span(effects.low[0, at], effects.high[0, at]), lost[label],
         *(spoken_tokens([word for word, _ in known[label][key]][:_TOKENS]) if label in known else ""
           for key in ("drives", "promotes", "suppresses"))]
        for at, label in enumerate(effects.names)
    ]  # fmt: skip
    columns = [
        "unit", "loss without it rises by (nats)", "95% interval", "share of information lost", "driven by", "raises",
        "lowers",
    ]  # fmt: skip
    return Numbers("Neurons and heads, by what is lost without each", columns, rows, is_open=True)
