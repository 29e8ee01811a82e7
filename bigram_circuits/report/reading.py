"""Sections about text, token by token: what model, subnetwork and target expect, and where heads look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigram_circuits.measures.results import Maps
from bigram_circuits.measures.words import percent, rounded
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Attention, Block, Chart, Content, Numbers, Reading
from bigram_circuits.report.results import Results, result_table
from bigram_circuits.report.sections import section
from bigram_circuits.report.words import condition_words, expected, spoken
from bigram_circuits.runs import Run

_CELL = 47  # pixels, of width for a column of a wide map


@section("passage", "One passage, token by token")
def passage(run: Run, results: Results) -> Content:
    """The first held-out tokens, read after every layer."""
    lens, cosine = results.maps("prompt_lens"), results.maps("prompt_cosine")
    blocks: list[Block] = []
    for result, title, words in (
        (lens, "Most likely token after every layer, and its probability", _prompt_words(lens) if lens else ""),
        (cosine, "Cosine with the current token's embedding, token by token", _cosine_words(cosine) if cosine else ""),
    ):
        if result:
            figure = figures.dressed(result.plot()).update_annotations(x=0, xanchor="left")
            figures.shorten_words(figure)
            figures.without_first_row(figure)
            blocks.append(Chart(title, words, figure, 90 + _CELL * len(result.columns)))
            blocks.append(result_table(result, title))
    says = "The first tokens of the held-out text, read through the model's own output layer after every layer."
    steps = ("prompt_lens", "prompt_cosine")
    words = [says, *results.reasons(*steps)] if blocks else results.absent("shown a passage", *steps)
    return Content(words, blocks)


def _prompt_words(lens: Maps) -> str:
    """From which layer on the most likely token is the one that comes out."""
    if lens.text is None:
        return ""
    parts = []
    for condition in (name for name in ("subnetwork", "full") if name in lens.conditions):
        text = lens.text[lens.conditions.index(condition)]
        first = [[cell.split("\n")[0] for cell in row] for row in text]
        same = [sum(a == b for a, b in zip(row, first[-1], strict=True)) for row in first]
        if len(same) > 1:
            parts.append(f"{same[-2]} of {len(lens.columns)} in the {condition_words(condition)}")
    return (
        f"One layer before the last, the most likely token is already the final one at {' and '.join(parts)}."
        if parts
        else ""
    )


def _cosine_words(cosine: Maps) -> str:
    last = {name: cosine.values[0, c, -1] for c, name in enumerate(cosine.conditions)}
    means = [
        f"{rounded(float(np.nanmean(last[name])), 2)} in the {condition_words(name)}"
        for name in ("subnetwork", "full")
        if name in last and not np.isnan(last[name]).all()
    ]
    return f"After the last layer it is on average {' and '.join(means)}." if means else ""


@section("read", "Real text, read by the model, the subnetwork and the target")
def read(run: Run, results: Results) -> Content:
    """Passages, coloured by surprisal."""
    found = results.maps("passages")
    if not found or found.text is None:
        return Content(results.absent("shown passages", "passages"))
    by_condition = {name: found.get(found.quantities[0].name, name) for name in found.conditions}
    readers = {name: _reader(run, name) for name in ("full", "subnetwork", "target") if name in by_condition}
    most = _full_colour([by_condition[name] for name in readers])
    blocks: list[Block] = []
    for row, passage in enumerate(found.rows):
        cells = {name: found.text[found.conditions.index(name)][row] for name in readers}
        values = {name: by_condition[name][row].tolist() for name in readers}
        pointed = [
            _pointed({readers[name]: (cells[name][at], values[name][at]) for name in readers}, at)
            for at in range(len(found.columns))
        ]
        first = next(iter(cells.values()), ())
        means = {name: float(np.nanmean(v)) for name, v in values.items() if not np.isnan(v).all()}
        says = ", ".join(f"{readers[name].lower()} {rounded(mean, 2)}" for name, mean in means.items())
        blocks.append(
            Reading(
                title=f"Passage {int(passage) + 1}" if passage.isdigit() else passage,
                says=f"Mean surprisal in nats: {says}." if says else "",
                tokens=[cell.split("\n")[0] for cell in first],
                readers=list(readers.values()),
                values=[  # a probability of 0 is as surprising as can be
                    [0.0 if not at else most if math.isnan(v) else v for at, v in enumerate(values[name])]
                    for name in readers
                ],
                most=most,
                pointed=pointed,
            )
        )
    blocks.append(_reading_table(found))
    says = (
        f"Held-out text. The more orange a token, the less it was expected: white at 0 nats, full colour from "
        f"{rounded(most, 1)} nats. Point at a token, or touch it, to see what each expected in its place."
    )
    return Content([says], blocks)


def _reader(run: Run, condition: str) -> str:
    return f"The {run.target_words[0] if condition == 'target' else condition_words(condition)}"


def _full_colour(values: Sequence[np.ndarray]) -> float:
    """The surprisal that nineteen of twenty tokens stay below, in nats."""
    known = np.concatenate([one[~np.isnan(one)] for one in values]) if values else np.zeros(0)
    return max(1.0, float(np.quantile(known, 0.95))) if known.size else 1.0


def _pointed(readers: Mapping[str, tuple[str, float]], at: int) -> list[str]:
    """What is told about a token: itself, then for each reader its surprisal and what was expected."""
    token = next(iter(readers.values()))[0].split("\n")[0] if readers else ""
    if not at:
        return [spoken(token), "The first token: nothing was expected."]
    lines = [spoken(token)]
    for reader, (cell, value) in readers.items():
        how = "probability 0" if math.isnan(value) else f"{rounded(value, 2)} nats"
        lines.append(f"{reader}: {how}; expected {expected(cell)}")
    return lines


def _reading_table(found: Maps) -> Numbers:
    """A row for every token; surprisal and expectation of each condition."""
    assert found.text is not None
    values = found.values[0]
    rows = []
    for r, passage in enumerate(found.rows):
        for c in range(len(found.columns)):
            cells = [of[r][c] for of in found.text]
            told = [x for k, cell in enumerate(cells) for x in (float(values[k, r, c]), expected(cell))]
            rows.append([passage, c, spoken(cells[0].split("\n")[0]), *told])
    conditions = [x for name in found.conditions for x in (f"{name}: surprisal (nats)", f"{name}: expected")]
    return Numbers("Numbers: every token of the passages", ["passage", "position", "token", *conditions], rows)


@section("tokens", "After which tokens it is right, and after which not")
def tokens(run: Run, results: Results) -> Content:
    """After which tokens the target is reproduced."""
    found = results.maps("faithful_tokens")
    if not found or found.text is None:
        return Content(results.absent("looked at token by token", "faithful_tokens"))
    own = next((name for name in ("subnetwork", "full") if name in found.conditions), found.conditions[0])
    shown = [name for name in (own, "full") if name in found.conditions]
    texts = {name: found.text[found.conditions.index(name)] for name in (*dict.fromkeys((own, *found.conditions)),)}
    rows, names = [], []
    series: dict[str, list[float]] = {name: [] for name in dict.fromkeys(shown)}
    for r, row in enumerate(found.rows):
        for c in range(len(found.columns)):
            cells = {name: of[r][c] for name, of in texts.items()}
            kl = {name: float(found.get("kl", name)[r, c]) for name in series}
            names.append(f"{row} {c + 1}: {spoken(cells[own].split(chr(10))[0])}")
            for name, value in kl.items():
                series[name].append(value)
            told = [expected(cells[name]) for name in ("target", own) if name in cells]
            rows.append([names[-1], float(found.get("count", own)[r, c]), *kl.values(), *told])
    columns = ["token", "times", *(f"KL, {condition_words(name)}" for name in series)]
    columns += [f"{_reader(run, name).lower()} expects" for name in ("target", own) if name in texts]
    best, worst = (found.get("kl", own)[found.rows.index(name)] for name in ("best", "worst"))
    says = (
        f"Of {found.notes.get('frequent', 0):,} frequent tokens, the best and the worst by KL from the target, "
        f"mean over the places where they stand: {rounded(float(best[0]), 3)} nats after "
        f"{names[0].split(': ', 1)[1]}, {rounded(float(worst[0]), 3)} after "
        f"{names[len(found.columns)].split(': ', 1)[1]}."
    )
    chart = Chart("KL from the target after single tokens", "", figures.bars(names, series, "KL (nats)"))
    table = Numbers("What follows these tokens", columns, rows, is_open=True)
    return Content([says], [chart, table, result_table(found, found.title)])


@section("heads", "Where the heads that survive look")
def heads(run: Run, results: Results) -> Content:
    """Attention patterns of the heads that survive."""
    found = results.maps("attention")
    if not found:
        return Content(results.absent("shown attention patterns", "attention"))
    panels = [tuple(name.rsplit(" ", 1)) for name in found.conditions]
    heads = list(dict.fromkeys(head for _, head in panels))
    blocks: list[Block] = []
    rows = []
    numbers = []
    tokens = [name.split(": ", 1)[-1] for name in found.rows]
    for condition in (name for name in ("full", "subnetwork") if (name, heads[0]) in panels):
        patterns = [found.get(found.quantities[0].name, f"{condition} {head}") for head in heads]
        blocks.append(
            Attention(f"In the {condition_words(condition)}", "", tokens, heads, [one.tolist() for one in patterns])
        )
        for head, pattern in zip(heads, patterns, strict=True):
            rows.append([head, condition_words(condition), *_looks(pattern)])
            numbers += [
                [
                    head,
                    condition_words(condition),
                    name,
                    *(float(x) if c <= r else "" for c, x in enumerate(pattern[r])),
                ]
                for r, name in enumerate(found.rows)
            ]
    rows.sort(key=lambda row: heads.index(row[0]))
    blocks.append(
        Numbers("Mean attention", ["head", "in", "the token before", "itself", "the first token"], rows, is_open=True)
    )
    blocks.append(Numbers("Numbers: attention patterns", ["head", "in", "from", *found.rows], numbers))
    says = (
        "The heads of which most weights are kept, on the first tokens of the held-out text. A row is a token that "
        "looks; below, the mean share of attention to the token before, to itself, and to the first token."
    )
    return Content([says, _most_backward(rows)], blocks)


def _most_backward(rows: Sequence[Sequence[Any]]) -> str:
    """Which head looks most at the token before, and whether it does so in the subnetwork."""
    by_condition = {condition: {row[0]: row[2] for row in rows if row[1] == condition} for _, condition, *_ in rows}
    parts = []
    for condition, shares in by_condition.items():
        known = {head: share for head, share in shares.items() if not math.isnan(share)}
        if known:
            head = max(known, key=lambda one: known[one])
            parts.append(f"in the {condition} {head} does most, with {percent(known[head])}")
    return f"Looking at the token before: {'; '.join(parts)}." if parts else ""


def _looks(pattern: np.ndarray) -> tuple[float, float, float]:
    """Mean attention to the token before, to itself and to the first token, from the third token on."""
    places = np.arange(2, len(pattern))
    if not len(places):
        return math.nan, math.nan, math.nan
    targets = (places - 1, places, np.zeros_like(places))
    before, same, first = (float(pattern[places, at].mean()) for at in targets)
    return before, same, first
