"""Sections about text, token by token: what model, subnetwork and target predict, and where heads attend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigram_circuits.measures.conditions import OWN, label_of
from bigram_circuits.measures.results import Maps
from bigram_circuits.measures.words import percent, rounded
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Attention, Block, Chart, Content, Numbers, Reading
from bigram_circuits.report.results import Results, result_table
from bigram_circuits.report.sections import section
from bigram_circuits.report.words import predictions, spoken
from bigram_circuits.runs import Run

_CELL = 47  # pixels, of width for a column of a wide map


@section("passage", "One passage, token by token")
def passage(run: Run, results: Results) -> Content:
    """Logit lens and cosines on the first held-out tokens, after every layer."""
    lens, cosine = results.maps("prompt_lens"), results.maps("prompt_cosine")
    blocks: list[Block] = []
    for result, title, words in (
        (lens, "Most likely token after every layer, and its probability", _prompt_words(lens) if lens else ""),
        (cosine, "Cosine with the current token's embedding, token by token", _cosine_words(cosine) if cosine else ""),
    ):
        if result:
            figure = figures.dressed(result.plot()).update_annotations(x=0, xanchor="left")
            figures.without_first_row(figure)
            blocks.append(Chart(title, words, figure, 90 + _CELL * len(result.columns)))
            blocks.append(result_table(result, title))
    says = "The first tokens of the held-out text; the logit lens and the cosines are taken after every layer."
    steps = ("prompt_lens", "prompt_cosine")
    words = [says, *results.reasons(*steps)] if blocks else results.absent("lenses on a passage", *steps)
    return Content(words, blocks)


def _prompt_words(lens: Maps) -> str:
    """At how many positions the most likely token is settled before the last layer."""
    if lens.text is None:
        return ""
    parts = []
    for condition in (name for name in (*OWN, "full") if name in lens.conditions):
        text = lens.text[lens.conditions.index(condition)]
        first = [[cell.split("\n")[0] for cell in row] for row in text]
        same = [sum(a == b for a, b in zip(row, first[-1], strict=True)) for row in first]
        if len(same) > 1:
            parts.append(f"{same[-2]} of {len(lens.columns)} positions in the {label_of(condition)}")
    if not parts:
        return ""
    return f"Before the last layer, the most likely token is already the final one at {' and '.join(parts)}."


def _cosine_words(cosine: Maps) -> str:
    last = {name: cosine.values[0, c, -1] for c, name in enumerate(cosine.conditions)}
    means = [
        f"{rounded(float(np.nanmean(last[name])), 2)} in the {label_of(name)}"
        for name in (*OWN, "full")
        if name in last and not np.isnan(last[name]).all()
    ]
    return f"After the last layer, the mean is {' and '.join(means)}." if means else ""


@section("read", "Surprisal on real text: full model, subnetwork and target")
def read(run: Run, results: Results) -> Content:
    """Passages of held-out text, coloured by the surprisal of each reader."""
    found = results.maps("passages")
    heading = "" if run.mask.noun == "subnetwork" else "Surprisal on real text: full model, circuit and target"
    if not found or found.text is None:
        return Content(results.absent("surprisal on passages", "passages"), heading=heading)
    names = [name for name in ("full", *OWN, "target") if name in found.conditions]
    most = _full_colour([found.get(found.quantities[0].name, name) for name in names])
    passages = [_passage_reading(run, found, names, row, most) for row in range(len(found.rows))]
    says = (
        f"Held-out text, coloured by surprisal: white at 0 nats, full orange from {rounded(most, 1)} nats. Hover over "
        "a token, or tap it, to see what each predicted in its place."
    )
    return Content([says], [*passages, _reading_table(found)], heading)


def _passage_reading(run: Run, found: Maps, names: Sequence[str], row: int, most: float) -> Reading:
    """One passage, as each of the conditions reads it."""
    assert found.text is not None
    readers = {name: _reader(run, name) for name in names}
    cells = {name: found.text[found.conditions.index(name)][row] for name in names}
    values = {name: found.get(found.quantities[0].name, name)[row].tolist() for name in names}
    means = {name: float(np.nanmean(of)) for name, of in values.items() if not np.isnan(of).all()}
    says = ", ".join(f"{readers[name].lower()} {rounded(mean, 2)}" for name, mean in means.items())
    return Reading(
        title=f"Passage {int(found.rows[row]) + 1}" if found.rows[row].isdigit() else found.rows[row],
        says=f"Mean surprisal in nats: {says}." if says else "",
        tokens=[cell.split("\n")[0] for cell in next(iter(cells.values()), ())],
        readers=list(readers.values()),
        values=[  # a probability of 0 is as surprising as can be
            [0.0 if not at else most if math.isnan(v) else v for at, v in enumerate(of)] for of in values.values()
        ],
        most=most,
        pointed=[
            _pointed({readers[name]: (cells[name][at], values[name][at]) for name in names}, at)
            for at in range(len(found.columns))
        ],
    )


def _reader(run: Run, condition: str) -> str:
    """Who reads: the full model, the subnetwork, or the target by its name."""
    return f"The {run.target_words[0] if condition == 'target' else label_of(condition)}"


def _full_colour(values: Sequence[np.ndarray]) -> float:
    """The 95th percentile of the surprisals, in nats, and at least 1."""
    known = np.concatenate([one[np.isfinite(one)] for one in values]) if values else np.zeros(0)
    return max(1.0, float(np.quantile(known, 0.95))) if known.size else 1.0


def _pointed(readers: Mapping[str, tuple[str, float]], at: int) -> list[str]:
    """The lines that show for a token: itself, then each reader's surprisal and predictions."""
    token = next(iter(readers.values()))[0].split("\n")[0] if readers else ""
    if not at:
        return [spoken(token), "The first token: nothing predicts it."]
    lines = [spoken(token)]
    for reader, (cell, value) in readers.items():
        how = "probability 0" if math.isnan(value) else f"{rounded(value, 2)} nats"
        lines.append(f"{reader}: {how}; predicted {predictions(cell)}")
    return lines


def _reading_table(found: Maps) -> Numbers:
    """A row for every token: surprisal and predictions of each condition."""
    assert found.text is not None
    values = found.values[0]
    rows = []
    for r, passage in enumerate(found.rows):
        for c in range(len(found.columns)):
            cells = [of[r][c] for of in found.text]
            read_as = [x for k, cell in enumerate(cells) for x in (float(values[k, r, c]), predictions(cell))]
            rows.append([passage, c, spoken(cells[0].split("\n")[0]), *read_as])
    conditions = [x for name in found.conditions for x in (f"{name}: surprisal (nats)", f"{name}: predicted")]
    return Numbers("Numbers: every token of the passages", ["passage", "position", "token", *conditions], rows)


@section("tokens", "After which tokens it is most and least faithful")
def tokens(run: Run, results: Results) -> Content:
    """Frequent tokens after which KL from the target is lowest and highest."""
    found = results.maps("faithful_tokens")
    if not found or found.text is None:
        return Content(results.absent("faithfulness by token", "faithful_tokens"))
    own = next((name for name in (*OWN, "full") if name in found.conditions), found.conditions[0])
    shown = [name for name in dict.fromkeys((own, "full")) if name in found.conditions]
    predicting = [name for name in ("target", own) if name in found.conditions]
    text = {name: found.text[found.conditions.index(name)] for name in (own, *predicting)}
    series: dict[str, list[float]] = {name: [] for name in shown}
    rows, names = [], []
    for r, row in enumerate(found.rows):
        for c in range(len(found.columns)):
            names.append(f"{row} {c + 1}: {spoken(text[own][r][c].split(chr(10))[0])}")
            kl = [float(found.get("kl", name)[r, c]) for name in shown]
            for name, value in zip(shown, kl, strict=True):
                series[name].append(value)
            predicted = [predictions(text[name][r][c]) for name in predicting]
            rows.append([names[-1], float(found.get("count", own)[r, c]), *kl, *predicted])
    columns = ["token", "occurrences", *(f"KL, {label_of(name)}" for name in shown)]
    columns += [f"{_reader(run, name).lower()} predicts" for name in predicting]
    chart = Chart("KL from the target by current token", "", figures.bars(names, series, "KL (nats)"))
    table = Numbers("Predictions after these tokens", columns, rows, is_open=True)
    return Content([_extremes(found, own, names)], [chart, table, result_table(found, found.title)])


def _extremes(found: Maps, own: str, names: Sequence[str]) -> str:
    """The tokens with the lowest and the highest KL; `names` are those of the best, then of the worst."""
    best, worst = (float(found.get("kl", own)[found.rows.index(name)][0]) for name in ("best", "worst"))
    lowest, highest = (names[place].split(": ", 1)[1] for place in (0, len(found.columns)))
    return (
        f"Of {found.notes.get('frequent', 0):,} frequent tokens, KL from the target (mean over occurrences) is lowest "
        f"after {lowest} ({rounded(best, 3)} nats) and highest after {highest} ({rounded(worst, 3)} nats)."
    )


@section("heads", "Attention of the heads that survive")
def heads(run: Run, results: Results) -> Content:
    """Attention patterns of the heads that keep most, in the full model and in the subnetwork."""
    found = results.maps("attention")
    if not found:
        return Content(results.absent("attention patterns", "attention"))
    panels = [tuple(name.rsplit(" ", 1)) for name in found.conditions]
    heads = list(dict.fromkeys(head for _, head in panels))
    blocks: list[Block] = []
    rows = []
    numbers = []
    tokens = [name.split(": ", 1)[-1] for name in found.rows]
    for condition in (name for name in ("full", *OWN) if (name, heads[0]) in panels):
        patterns = [found.get(found.quantities[0].name, f"{condition} {head}") for head in heads]
        blocks.append(Attention(f"In the {label_of(condition)}", "", tokens, heads, [one.tolist() for one in patterns]))
        for head, pattern in zip(heads, patterns, strict=True):
            rows.append([head, label_of(condition), *_looks(pattern)])
            numbers += [
                [
                    head,
                    label_of(condition),
                    name,
                    *(float(x) if c <= r else "" for c, x in enumerate(pattern[r])),
                ]
                for r, name in enumerate(found.rows)
            ]
    rows.sort(key=lambda row: heads.index(row[0]))
    blocks.append(
        Numbers("Mean attention", ["head", "in", "previous token", "itself", "first token"], rows, is_open=True)
    )
    blocks.append(Numbers("Numbers: attention patterns", ["head", "in", "from", *found.rows], numbers))
    which = "The heads that keep most of their weights"
    if run.mask.noun == "circuit":
        which = "Of the heads that are kept, those with the largest effects (by the gradients of their gates)"
    says = (
        f"{which}, on the first tokens of the held-out text; each row is a query "
        "position. The table gives the mean attention to the previous token, to the token itself and to the first one."
    )
    return Content([says, _most_backward(rows)], blocks)


def _most_backward(rows: Sequence[Sequence[Any]]) -> str:
    """The head that attends most to the previous token, in each condition."""
    by_condition = {condition: {row[0]: row[2] for row in rows if row[1] == condition} for _, condition, *_ in rows}
    parts = []
    for condition, shares in by_condition.items():
        known = {head: share for head, share in shares.items() if not math.isnan(share)}
        if known:
            head = max(known, key=lambda one: known[one])
            parts.append(f"{head} in the {condition} ({percent(known[head])})")
    return f"Most attention to the previous token: {', '.join(parts)}." if parts else ""


def _looks(pattern: np.ndarray) -> tuple[float, float, float]:
    """Mean attention to the previous token, to itself and to the first token, from the third token on."""
    places = np.arange(2, len(pattern))
    if not len(places):
        return math.nan, math.nan, math.nan
    targets = (places - 1, places, np.zeros_like(places))
    before, same, first = (float(pattern[places, at].mean()) for at in targets)
    return before, same, first
