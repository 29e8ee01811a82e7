"""What pages are made of, in plain text: sections of sentences, charts and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bigram_circuits.explanations.page import CircuitView
from bigram_circuits.measures.words import sentence
from bigram_circuits.report.sketch import Sketch


class Block:
    """Anything a section can hold."""

    def check(self) -> None:
        """Raise an error if the block cannot be drawn."""


@dataclass(frozen=True)
class Chart(Block):
    """A plotly figure with its title and, in a sentence, what it shows."""

    title: str
    says: str
    figure: Any
    min_width: int = 0
    """In pixels; on a narrower screen the chart scrolls in its own box."""

    def drawn(self) -> Any:
        """The figure as JSON values, without infinities, which JSON does not have."""
        return _finite(json.loads(self.figure.to_json()))

    def check(self) -> None:
        """Raise ValueError if the figure has no height."""
        if not self.figure.layout.height:
            raise ValueError(f"the chart {self.title!r} has no height")


@dataclass(frozen=True)
class Numbers(Block):
    """A table."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    is_open: bool = False
    """Whether it is shown at once or only on request."""
    meanings: Mapping[str, str] = field(default_factory=dict)
    """What names of columns and rows mean, where `words.COLUMNS` does not say it."""

    def check(self) -> None:
        """Raise ValueError if a row has another number of cells than there are columns."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {self.caption!r} has {len(row)} cells, not {len(self.columns)}")


@dataclass(frozen=True)
class Reading(Block):
    """A passage of text, once for each reader, with every token coloured by a number."""

    title: str
    says: str
    tokens: Sequence[str]
    readers: Sequence[str]
    """For example the full model and the subnetwork."""
    values: Sequence[Sequence[float]]
    """[reader][token]; nan where undefined."""
    most: float
    """The number from which the colour is full."""
    pointed: Sequence[Sequence[str]]
    """[token]: the lines that show when a token is hovered over."""


@dataclass(frozen=True)
class Attention(Block):
    """Attention patterns of several heads: thumbnails, and one of them large."""

    title: str
    says: str
    tokens: Sequence[str]
    heads: Sequence[str]
    patterns: Sequence[Sequence[Sequence[float]]]
    """[head][from][to]."""


@dataclass(frozen=True)
class Circuit(Block):
    """The picture of an explanation, or of an atlas, that a reader can explore; with its sentences and tables."""

    title: str
    says: str
    view: CircuitView
    """From `circuit_view` or `atlas_view`."""


@dataclass(frozen=True)
class Preview(Block):
    """A still picture of an explanation, small enough for the top of a page."""

    title: str
    says: str
    sketch: Sketch
    """From `sketch_of`."""
    link: str = ""
    """The anchor of the section that shows more."""


@dataclass(frozen=True)
class Code(Block):
    """A command to copy, with what it does."""

    says: str
    text: str


@dataclass(frozen=True)
class Content:
    """What a section function returns."""

    says: Sequence[str] = ()
    """Sentences; empty ones are left out."""
    blocks: Sequence[Block] = ()
    """Charts and tables below them."""
    heading: str = ""
    """The heading, if it is not the section's usual one."""


@dataclass(frozen=True)
class Section:
    """A section of a page."""

    key: str
    """Its anchor in the page."""
    heading: str
    """Its heading."""
    says: Sequence[str] = ()
    """Sentences; empty ones are left out."""
    blocks: Sequence[Block] = ()
    """Charts and tables below them."""
    group: str = ""
    """The heading that it stands under."""
    is_open: bool = True
    """Whether it is shown at once or only on request."""


@dataclass(frozen=True)
class Mark:
    """A number that is shown large."""

    value: str
    what: str
    """What it is, in a line."""
    measured: str = ""
    """How it was measured, in a sentence or two; shown on request."""
    spread: str = ""
    """How much it depends on the seed and on the text, in a phrase."""


OUTCOMES = {"passed": "✓", "failed": "✗", "in doubt": "!", "not tried": "–", "not applicable": "–"}  # noqa: RUF001 (a dash)
"""What may come of a check, and its sign."""


@dataclass(frozen=True)
class Check:
    """Something that would refute, or weaken, what a page says, and whether it did."""

    asked: str
    """The question."""
    outcome: str
    """One of `OUTCOMES`."""
    says: str
    """The answer and what was measured, in a sentence."""
    key: str
    """The anchor of the section that shows more."""
    command: str = ""
    """Of what was not tried: what tries it."""


@dataclass(frozen=True)
class Opening:
    """The first screen of a page: the question, the answer, a picture, and what would refute it."""

    title: str
    """What the page is about; its name in tabs and bookmarks."""
    asked: str
    """The question, without symbols."""
    answer: str
    """The answer in a sentence without jargon."""
    marks: Sequence[Mark] = ()
    """A few numbers, shown large."""
    picture: Block | None = None
    checks: Sequence[Check] = ()
    tested: str = "What would refute it, and did it?"
    """The heading of the checks."""
    notes: Sequence[str] = ()
    """How it was made, in small print; empty ones are left out."""

    @property
    def tally(self) -> str:
        """How many checks came out how, in a sentence."""
        counts = {one: sum(check.outcome == one for check in self.checks) for one in OUTCOMES}
        return sentence(", ".join(f"{count} {one}" for one, count in counts.items() if count))


def _finite(value: Any) -> Any:
    """JSON values with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
