"""What pages are made of, in plain text: sections of sentences, charts and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chart:
    """A plotly figure with its title and, in a sentence, what it shows."""

    title: str
    says: str
    figure: Any
    min_width: int = 0
    """In pixels; on a narrower screen the chart scrolls in its own box."""


@dataclass(frozen=True)
class Numbers:
    """A table."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    is_open: bool = False
    """Whether it is shown at once or only on request."""


@dataclass(frozen=True)
class Reading:
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
class Attention:
    """Attention patterns of several heads: thumbnails, and one of them large."""

    title: str
    says: str
    tokens: Sequence[str]
    heads: Sequence[str]
    patterns: Sequence[Sequence[Sequence[float]]]
    """[head][from][to]."""


@dataclass(frozen=True)
class Code:
    """A command to copy, with what it does."""

    says: str
    text: str


Block = Chart | Numbers | Reading | Attention | Code
"""Anything a section can hold."""


@dataclass(frozen=True)
class Content:
    """What a section function returns."""

    says: Sequence[str] = ()
    """Sentences; empty ones are left out."""
    blocks: Sequence[Block] = ()
    """Charts and tables below them."""


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


@dataclass(frozen=True)
class Opening:
    """The top of a page: what was asked, and the answer."""

    title: str
    asked: str
    answer: str
    verdict: str = ""
    """What follows from the answer."""
    made: str = ""
    """When, and with what."""
    marks: Sequence[tuple[str, str]] = ()
    """A few numbers, shown large: what each is, and its value."""
