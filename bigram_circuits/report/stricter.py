"""Sections about the stricter tests: the worst case, rivals, and whether other masks compute the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from bigram_circuits.experiments.rivals import ALONE, ENOUGH, Rivals
from bigram_circuits.experiments.same_function import ELSEWHERE, HELD_OUT, SameFunction
from bigram_circuits.experiments.worst_case import (
    MEAN_GATE,
    SHUFFLED,
    SIGNS,
    WORST,
    is_told,
    worst_case_left,
    worst_case_words,
)
from bigram_circuits.measures.quantities import CONTEXT_TOLD, CROSS_ENTROPY
from bigram_circuits.measures.results import Curves, Effects
from bigram_circuits.measures.words import percent, rounded, sentence, span
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Block, Chart, Content, Numbers
from bigram_circuits.report.refuting import RIVALS, SAME_FUNCTION, WORST_CASE
from bigram_circuits.report.results import Results, result_table
from bigram_circuits.report.sections import section
from bigram_circuits.runs import Run

_MOST_ROWS = 24  # of a table that is shown at once
_LOWEST = -1.0  # share of information at the bottom of the chart, at least


@section("worst_case", "What if the rest is not exactly absent?")
def worst_case(run: Run, results: Results) -> Content:
    """What is left of the information when an adversary opens what is dropped."""
    curves, reason = results.stricter.worst_case, results.stricter.left_out.get("worst_case")
    if curves is None and reason:
        return Content([f"The test means nothing here: {reason}."])
    if curves is None:
        return Content([f"Not tried: {WORST_CASE} measures it."])
    units = run.mask.units
    forced = "It was measured although the full model does something else than the target: what opening the rest "
    forced += "brings back is then the full model's own behaviour, and a fall says nothing about the mask."
    says = [
        forced if curves.notes["forced"] else "",
        worst_case_words(curves),
        f"Each of the dropped {units} gets a gate from 0 (as in the mask) to 1 (as in the full model), the same in "
        "all texts, and an adversary moves the gates step by step such that the loss rises. What it finds on one "
        "text is measured on another.",
        "A fall is a proof by example that the rest matters, but not that what is kept is wrong. A flat curve is "
        "evidence that the rest does not matter, and no proof: the search may have missed something worse.",
    ]
    named = replace(curves, conditions=tuple(_NAMES.get(name, name) for name in curves.conditions))
    return Content(says, [_falls(curves), _by_steps(curves), result_table(named, "the worst case")])


_NAMES = {WORST: "worst case", SIGNS: "steps at random", SHUFFLED: "same gates elsewhere"}
_CONDITIONS = {
    WORST: "Gates set by the adversary.",
    SIGNS: "As many steps, each gate up or down at random.",
    SHUFFLED: "The adversary's gates, in random places.",
}
_LEFT = "Of what the mask itself recovers, the share that is left in the worst case."


def _quantity(curves: Curves) -> str:
    return CONTEXT_TOLD.name if is_told(curves) else CROSS_ENTROPY.name


def _falls(curves: Curves) -> Block:
    """The chart; steps are names, since they grow by factors."""
    key = _quantity(curves)
    shown = curves.only(*_NAMES)
    figure = replace(shown, points=tuple(map(str, shown.points)), conditions=tuple(_NAMES.values())).plot(key)
    figure.update_xaxes(type="category", title="steps of search")
    if key == CROSS_ENTROPY.name:
        return Chart("Cross-entropy from the target, by steps", "Higher is worse.", figures.dressed(figure))
    figure.update_yaxes(title="explained information", tickformat="~%")
    heights = np.concatenate([part[curves.quantities.index(curves.quantity(key))].ravel() for part in _parts(shown)])
    heights = heights[np.isfinite(heights)]
    says = "Share of what the context tells that is recovered; bands are 95% intervals. Below 0, it is worse than a "
    says += "constant prediction."
    if heights.size and heights.min() < _LOWEST:
        figure.update_yaxes(range=[_LOWEST - 0.05, min(float(heights.max()), 1.0) + 0.05])
        says += " The chart is cut off below; the table has all."
    return Chart("Explained information by steps of search", says, figures.dressed(figure))


def _parts(result: Curves | Effects) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return result.values, result.low, result.high


def _by_steps(curves: Curves) -> Numbers:
    """A row for each number of steps."""
    key, left = _quantity(curves), worst_case_left(curves)
    gates = curves.get(MEAN_GATE.name, WORST)
    rows = []
    for place, steps in enumerate(curves.points):
        at = curves.quantities.index(curves.quantity(key))
        cells = [_cell(curves, (at, curves.conditions.index(name), place)) for name in _CONDITIONS]
        rows.append([f"{steps:,}", *cells, percent(left[int(steps)]), rounded(gates[place])])
    columns = ["steps", *_NAMES.values(), "left of its own", "mean gate"]
    meanings = {_NAMES[name]: meaning for name, meaning in _CONDITIONS.items()} | {
        "left of its own": _LEFT,
        "mean gate": MEAN_GATE.meaning,
    }
    what = "Explained information" if key == CONTEXT_TOLD.name else "Cross-entropy, in nats,"
    return Numbers(f"{what} by steps, with 95% intervals", columns, rows, is_open=True, meanings=meanings)


def _cell(result: Curves | Effects, at: tuple[int, ...]) -> str:
    """A number with its interval."""
    value, low, high = (float(part[at]) for part in _parts(result))
    ends = span(low, high)
    return f"{rounded(value)}{f' ({ends})' if ends else ''}"


# --- rivals ---


@section("rivals", "Could others do the same?")
def rivals(run: Run, results: Results) -> Content:
    """Masks of the same size with as little in common as can be, and what all of them share."""
    found, reason = results.stricter.rivals, results.stricter.left_out.get("rivals")
    if found is None:
        return Content([f"Left out: {reason}." if reason else f"Not tried: {RIVALS} looks for them."])
    units, noun = run.mask.units, run.mask.noun
    says = [
        found.verdict,
        f"Each is as large as this {noun} and was learned on the same text, but keeping what an earlier one keeps "
        f"cost extra (the overlap weight). It is a rival if it surely (by its 95% interval) recovers {ENOUGH:.0%} of "
        "what this one does, and is not an earlier one again.",
        f"Rivals do not make this {noun} less sufficient. They say that which {units} are kept is a choice among "
        "several: speak of what all of them share (the core), or of each. That none was found does not show that there "
        "is none.",
    ]
    tables = [result_table(found.measured, "rivals"), result_table(found.cores, "what all of them share")]
    return Content(says, [_chart(found), _masks(found), _cores(found), *tables])


_FINDINGS = {"rival": "a rival", "same": "an earlier mask again", "worse": "does worse", "unclear": "undecided"}


def _chart(found: Rivals) -> Block:
    measured = found.measured
    at = measured.quantities.index(measured.quantity("recovered"))
    ends = zip(*(part[at].tolist() for part in _parts(measured)), strict=True)
    points = {name: (measured.get("jaccard")[name], *three) for name, three in zip(measured.names, ends, strict=True)}
    figure = figures.overlaps(points, "overlap with the first (Jaccard)", "recovered", ENOUGH)
    says = f"Further left, less is shared. Above the dashed line ({ENOUGH:.0%}), a mask does the same as the first."
    return Chart("What each recovers of what the first does, by what it shares with it", says, figure)


def _masks(found: Rivals) -> Numbers:
    """A row for each mask."""
    measured = found.measured
    keys = ("jaccard", "times_chance", "log10_p", "surprisal_correlation", "kl")
    recovered = measured.quantities.index(measured.quantity("recovered"))
    rows = []
    for at, name in enumerate(measured.names):
        jaccard, times, p, r, kl = (measured.get(key)[name] for key in keys)
        what = "this one" if not at else _FINDINGS[found.finding(name)]
        whole = _cell(measured, (recovered, at)) if at else "1"
        rows.append([name, what, rounded(jaccard), rounded(times, 1), rounded(p, 1), rounded(r), rounded(kl), whole])
    columns = ["", "what it is", "Jaccard", "times chance", "log10 p", "r", "KL", "recovered"]
    return Numbers("The masks, with 95% intervals", columns, rows, is_open=True, meanings=_meanings(measured))


def _cores(found: Rivals) -> Numbers:
    """A row for what all share alone, and for the model without it."""
    cores = found.cores
    keys = ("share_of_first", "surprisal_correlation", "kl", "recovered")
    rows = []
    for name in cores.names:
        share, r, kl, recovered = (cores.get(key)[name] for key in keys)
        own = percent(share) if name.endswith(ALONE) else ""
        rows.append([name, f"{cores.get('kept')[name]:,.0f}", own, rounded(r), rounded(kl), rounded(recovered)])
    columns = ["", "kept", "share of the first", "r", "KL", "recovered"]
    return Numbers(
        "What all of them share, and the model without it", columns, rows, is_open=True, meanings=_meanings(cores)
    )


def _meanings(result: Effects) -> dict[str, str]:
    known = {one.name: sentence(one.meaning.rstrip(".")) for one in result.quantities}
    labels = {"recovered": "recovered", "share of the first": "share_of_first"}
    return {label: known[name] for label, name in labels.items() if name in known}


# --- the same function ---


@section("same_function", "Do other masks compute the same?")
def same_function(run: Run, results: Results) -> Content:
    """Behaviour, splices and residual streams of this mask and others."""
    compared = results.stricter.same
    if not compared:
        return Content([f"Not tried: {SAME_FUNCTION} compares it with the mask of another run."])
    says = [f"{name}. {one.says}" for name, one in compared.items()]
    says.append(
        "They compute the same if each tells nearly all (90%) that the other takes from the context, on held-out text "
        "and on text it was not made for. It does not say that they do it in the same place: that is what taking "
        "parts of one into the other shows."
    )
    blocks: list[Block] = [_verdicts(compared), _splices(compared), *_streams(compared)]
    blocks += [
        table for name, one in compared.items()
        for table in (result_table(one.behaviour, f"behaviour, {name}"), result_table(one.splices, f"splices, {name}"))
    ]  # fmt: skip
    return Content(says, blocks)


_SAME = {
    "agrees": "Of what either takes from the context, the share that the other tells: the lower of both.",
    "elsewhere": "The same out of distribution: by default, on shuffled text.",
    "top-1": "Places where both have the same most likely token, on held-out text.",
    "least kept": "Of its own information, what either keeps at least with a part of the other that it needs.",
}


def _verdicts(compared: Mapping[str, SameFunction]) -> Numbers:
    """A row for each other mask."""
    rows = []
    for name, one in compared.items():
        both = one.overlap.get("intersection")["all"], one.overlap.get("expected")["all"]
        times = both[0] / both[1] if both[1] else math.nan
        agreement = (_agreement(one, text) for text in (HELD_OUT, ELSEWHERE))
        top = one.behaviour.get("top1_agreement").get(HELD_OUT, math.nan)
        rows.append(
            [name, one.verdict, *map(percent, (*agreement, top, one.jaccard)), rounded(times, 1), percent(one.spliced)]
        )
    agree, (least,) = list(_SAME)[:3], list(_SAME)[3:]
    columns = ["", "verdict", *agree, "Jaccard", "times chance", least]
    return Numbers("Compared with this one", columns, rows, is_open=True, meanings=_SAME)


def _agreement(one: SameFunction, text: str) -> float:
    """The lower of both directions; nan where it was not measured."""
    return min(one.behaviour.get(key).get(text, math.nan) for key in ("agreement", "agreement_back"))


_SPLICED = {
    "kept_in_a": "kept by this",
    "without_in_a": "this without",
    "kept_in_b": "kept by other",
    "without_in_b": "other without",
}


def _splices(compared: Mapping[str, SameFunction]) -> Numbers:
    """A row for each part of each other mask."""
    rows = [
        [name, part, *(percent(one.splices.get(key)[part]) for key in _SPLICED)]
        for name, one in compared.items() for part in one.splices.names
    ]  # fmt: skip
    first = next(iter(compared.values()))
    meanings = {label: first.splices.quantity(key).meaning for key, label in _SPLICED.items()}
    caption = "Parts of one in the other: what is kept of its own explained information"
    columns = ["", "part", *_SPLICED.values()]
    return Numbers(caption, columns, rows, is_open=len(rows) <= _MOST_ROWS, meanings=meanings)


def _streams(compared: Mapping[str, SameFunction]) -> list[Block]:
    """How alike the residual streams are by layer, a line for each other mask."""
    known = {name: one.streams for name, one in compared.items() if one.streams is not None}
    if not known:
        return []
    first, *_ = known.values()
    alike = {name: one for name, one in known.items() if one.points == first.points}
    parts = [np.concatenate([part[at] for part in map(_parts, alike.values())], 1) for at in range(3)]
    joined = Curves("Residual streams", first.quantities, first.axis, first.points, tuple(alike), *parts)
    says = (
        "Similarity of what the layers write over the same tokens (linear CKA): 1 is the same up to rotation and scale."
    )
    chart = Chart("How alike their residual streams are", says, figures.dressed(joined.plot("cka")))
    return [chart, result_table(joined, "residual streams")]
