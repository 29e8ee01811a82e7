"""The page of an n-gram ladder: what each rung adds, how small it is, where it lives, and what rungs share.

Every sentence is computed from the ladder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from bigram_circuits.experiments.ladder import FULL, INDUCTION, N_GRAMS, WITHIN, Ladder, Rung, Step
from bigram_circuits.measures.html import write_page
from bigram_circuits.measures.quantities import FRACTION, MEAN_SURPRISAL
from bigram_circuits.measures.words import listed, percent, rounded, span
from bigram_circuits.names import model_words
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Chart, Content, Mark, Numbers, Opening
from bigram_circuits.report.compared_figures import pair_maps
from bigram_circuits.report.compared_words import few
from bigram_circuits.report.document import document
from bigram_circuits.report.sections import Sections

LADDER_SECTIONS = Sections()
"""The sections of the page."""
section = LADDER_SECTIONS.add

_SURPRISING = math.log10(0.05)


def write_ladder(ladder: Ladder, path: str | os.PathLike[str] = "ladder.html") -> Path:
    """Write the page of a ladder, replacing an earlier one; it is one file that requests nothing from the network.

    Args:
        ladder: From `find_ladder` or `load_ladder`.
        path: Where to write it.

    Returns:
        The file.

    Raises:
        ValueError: If the path is a folder.
        OSError: If the page cannot be written.

    Example:
        >>> bc.write_ladder(bc.load_ladder("runs/ladder"), "ladder.html")
    """
    sections = [tell(ladder) for tell in LADDER_SECTIONS]
    footer = "Made from a ladder that find_ladder returned."
    return write_page(path, lambda: document(_opening(ladder), sections, footer))


def _opening(ladder: Ladder) -> Opening:
    text = "the reference text" if ladder.text.source == "reference" else f"the text {ladder.text.source}"
    asked = "Which weights are enough for unigrams, bigrams, trigrams and induction, and is each part of the next?"
    how = (
        f"Masks were learned on {text}, induction on random tokens that are repeated; all are measured on held-out "
        "text and on other random tokens."
    )
    sizes = [f"{name} {percent(ladder.rung(name).fraction)}" for name in (*N_GRAMS, INDUCTION)]
    marks = [
        Mark(percent(ladder.rung(name).fraction), f"of weights, {name}", FRACTION.meaning)
        for name in (*N_GRAMS, INDUCTION)
    ]
    marks.append(Mark(rounded(ladder.rung(FULL).loss), "loss of the full model", MEAN_SURPRISAL.meaning))
    answer = f"Found free, they keep {listed(sizes)} of {ladder.rung(FULL).total:,} maskable weights. {_walk(ladder)}"
    title = f"The n-gram ladder of {model_words(ladder.model)}"
    return Opening(title, asked, answer, marks, notes=[_induced(ladder), how])


def _walk(ladder: Ladder) -> str:
    """What the n-grams tell of what the full model tells."""
    steps = [one for one in ladder.steps if one.ladder == "free" and one.name != FULL]
    known = [f"{one.name} {percent(one.share)}" for one in steps if not math.isnan(one.share)]
    if not known:
        return "The full model predicts the text no better than the empty one, so there is nothing to explain."
    return f"Of what the full model gains over the empty one, each adds to the one before: {listed(known)}."


def _induced(ladder: Ladder) -> str:
    own, whole = ladder.rung(INDUCTION), ladder.rung(FULL)
    if not ladder.ability.able:
        return (
            f"Induction: the full model is not shown to do it (loss {rounded(whole.repeated)} nats a repeated token, "
            f"guessing {rounded(ladder.ability.chance)}), so a mask for it explains nothing that the model does."
        )
    best = min((ladder.rung(name) for name in N_GRAMS), key=lambda one: one.repeated)
    return (
        f"Induction: at repeated random tokens its mask has a loss of {rounded(own.repeated)} nats "
        f"({span(*own.repeated_interval)}), the full model {rounded(whole.repeated)}, guessing "
        f"{rounded(ladder.ability.chance)}; of the n-gram masks the best, {best.name}, has {rounded(best.repeated)}."
    )


@section("rungs", "The rungs")
def rungs(ladder: Ladder) -> Content:
    """Size, faithfulness and loss of every rung."""
    names = [one.name for one in ladder.rungs]
    loss = figures.bars(
        names, {"loss": [one.loss for one in ladder.rungs]}, "loss at the next token, nats",
        {"loss": ([one.loss_interval[0] for one in ladder.rungs], [one.loss_interval[1] for one in ladder.rungs])},
    )  # fmt: skip
    masks = [one for one in ladder.rungs if one.own is not None]
    own = figures.bars(
        [one.name for one in masks], {"KL": [one.own.kl for one in masks if one.own]}, "KL from its own target, nats",
        {"KL": ([one.kl_interval[0] for one in masks], [one.kl_interval[1] for one in masks])},
    )  # fmt: skip
    columns, rows = ladder.table
    ends = [
        [
            one.name,
            _of_own(one, "kl"),
            span(*one.kl_interval),
            _of_own(one, "surprisal_correlation"),
            span(*one.r_interval),
            one.kl_of_empty,
            one.kl_of_full,
            one.faithfulness,
        ]
        for one in masks
    ]
    return Content(
        [
            "Free masks are found among all weights. Nested ones are found within a larger n-gram's mask.",
            "Faithfulness is 1 - KL / KL of the empty model. For induction, KL is minus the log-probability of all "
            "right tokens of a prompt together, and r is undefined.",
            "Intervals are 95% bootstrap intervals over sequences.",
            *ladder.cautions,
        ],
        [
            Numbers("Every rung", columns, rows, is_open=True),
            Chart("Loss at the next token of held-out text", "", loss),
            Chart("Distance from its own target", "", own),
            Numbers(
                "Each mask and its own target",
                ["mask", "KL", "95% interval", "r", "95% interval", "KL of empty", "KL of full", "faithfulness"], ends,
            ),
        ],
    )  # fmt: skip


def _of_own(rung: Rung, name: str) -> float:
    return math.nan if rung.own is None else getattr(rung.own, name)


@section("steps", "What each step adds")
def steps(ladder: Ladder) -> Content:
    """The fall in loss from each rung to the next."""
    blocks = []
    for kind in ("free", "nested"):
        these = [one for one in ladder.steps if one.ladder == kind]
        chart = figures.bars(
            [one.name for one in these], {"gain": [one.gain for one in these]}, "fall in loss, nats a token",
            {"gain": ([one.interval[0] for one in these], [one.interval[1] for one in these])},
        )  # fmt: skip
        blocks.append(Chart(f"{kind.capitalize()}: fall in loss from the rung before", _worse(these), chart))
    columns = ["rung", "ladder", "rung before", "fall in loss", "95% interval", "of all that the full model gains"]
    rows = [
        [one.name, one.ladder, one.before, one.gain, span(*one.interval), percent(one.share)] for one in ladder.steps
    ]
    says = [
        "The loss of the rung before minus its own, in nats a token, on the same held-out text: the information that "
        "the step adds. The last step is what the full model does beyond trigrams.",
        *(_cost(ladder, name) for name in WITHIN),
    ]
    return Content(says, [*blocks, Numbers("What each step adds", columns, rows)])


def _worse(these: Sequence[Step]) -> str:
    """The steps that are not shown to add anything."""
    flat = [one.name for one in these if not one.interval[0] > 0]
    return (
        f"Not shown to add anything: {listed(flat)}."
        if flat
        else "Every step adds something: all intervals lie above 0."
    )


def _cost(ladder: Ladder, name: str) -> str:
    """What looking for an n-gram within a larger one's mask costs."""
    nested, free = ladder.rung(name), ladder.rung(name.split()[0])
    return (
        f"{name.capitalize()}: KL {rounded(_of_own(nested, 'kl'))} with {nested.kept:,} weights; found free, "
        f"{rounded(_of_own(free, 'kl'))} with {free.kept:,}."
    )


@section("induction", "Induction")
def induction(ladder: Ladder) -> Content:
    """The loss at repeated random tokens."""
    chart = figures.bars(
        [one.name for one in ladder.rungs], {"loss": [one.repeated for one in ladder.rungs]},
        "loss at repeated random tokens, nats",
        {
            "loss": (
                [one.repeated_interval[0] for one in ladder.rungs],
                [one.repeated_interval[1] for one in ladder.rungs],
            )
        },
    )  # fmt: skip
    rows = [[one.name, one.repeated, span(*one.repeated_interval)] for one in ladder.rungs]
    says = [
        "A block of random tokens, repeated: only the repetition says what comes next, so n-grams do not help.",
        f"Guessing has a loss of {rounded(ladder.ability.chance)} nats.",
        _induced(ladder),
    ]
    table = Numbers("Loss at repeated random tokens", ["rung", "loss", "95% interval"], rows)
    return Content(says, [Chart("Loss at repeated random tokens", "", chart), table])


@section("shared", "Which weights they share")
def shared(ladder: Ladder) -> Content:
    """Overlap of every pair, against chance."""
    masks = [one for one in ladder.rungs if one.own is not None and one.kept]
    empty = [one.name for one in ladder.rungs if one.own is not None and not one.kept]
    says = [f"Empty, and so without overlaps: {listed(empty)}."] if empty else []
    if not ladder.overlaps:
        return Content(says)
    found = [one for one in ladder.overlaps if not one.is_given]
    above = sum(one.log10_p < _SURPRISING for one in found)
    says = [
        f"{above} of {len(found)} pairs that were not searched in one another share more weights than by chance (p < "
        "0.05 with Holm's correction).",
        "Chance: as many weights in every matrix, drawn at random; p is exact.",
        *says,
    ]
    names = [one.name for one in masks]
    observed = [[math.nan] * len(names) for _ in names]
    chance = [[math.nan] * len(names) for _ in names]
    for one in ladder.overlaps:
        i, j = names.index(one.first), names.index(one.second)
        observed[i][j], observed[j][i] = one.share_of_first, one.share_of_second
        chance[i][j], chance[j][i] = one.expected / masks[i].kept, one.expected / masks[j].kept
    maps = pair_maps(names, {"observed": observed, "expected by chance": chance}, "share")
    columns = ["pair", "shared", "expected", "times chance", "log10 p (Holm)", "of first", "of second"]
    rows = [
        [
            f"{one.first}, {one.second}", one.shared, one.expected, few(one.ratio),
            "given" if one.is_given else one.log10_p, percent(one.share_of_first), percent(one.share_of_second),
        ]
        for one in ladder.overlaps
    ]  # fmt: skip
    return Content(
        says,
        [
            Chart("Share of the row's weights that the column keeps too", "", maps, 640),
            Numbers("Overlap of every pair", columns, rows, is_open=True),
        ],
    )


@section("places", "Where they live")
def places(ladder: Ladder) -> Content:
    """Kept weights by layer and component."""
    masks = [one for one in ladder.rungs if one.places is not None and one.kept]
    if not masks:
        return Content(["No mask keeps a weight."])
    parts = list(masks[0].places or ())
    shares = [[(one.places or {})[part] / one.kept for part in parts] for one in masks]
    chart = figures.heat_map(shares, [one.name for one in masks], parts, "mask", "share")
    chart.update_yaxes(autorange="reversed")
    most = {one.name: max(parts, key=lambda part, of=one: (of.places or {})[part]) for one in masks}
    words = [
        f"of {name}, {part} ({percent(shares[at][parts.index(part)])})" for at, (name, part) in enumerate(most.items())
    ]
    rows = [[one.name, *((one.places or {})[part] for part in parts)] for one in masks]
    return Content(
        [f"The part with most of a mask's weights: {'; '.join(words)}."],
        [
            Chart("Share of each mask's weights, by layer and component", "", chart, 120 + 80 * len(parts)),
            Numbers("Kept weights by layer and component", ["mask", *parts], rows),
        ],
    )
