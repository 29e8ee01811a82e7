"""What a page is made of, in plain text: sections of sentences, charts and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chart:
    """A picture with its title and what it shows, in a sentence."""

    title: str
    says: str
    figure: Any
    min_width: int = 0
    """Pixels; on a narrower screen it is scrolled in its own box."""


@dataclass(frozen=True)
class Numbers:
    """A table."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    is_open: bool = False
    """Shown at once; otherwise on request."""


@dataclass(frozen=True)
class Reading:
    """A passage of text, once for each of those who read it, every token coloured by a number."""

    title: str
    says: str
    tokens: Sequence[str]
    readers: Sequence[str]
    """Who reads it."""
    values: Sequence[Sequence[float]]
    """[reader][token]; nan where there is none."""
    most: float
    """The number from which on the colour is full."""
    pointed: Sequence[Sequence[str]]
    """[token]: lines that show when a token is pointed at."""


@dataclass(frozen=True)
class Attention:
    """Attention patterns of some heads, drawn small, and one of them large."""

    title: str
    says: str
    tokens: Sequence[str]
    heads: Sequence[str]
    patterns: Sequence[Sequence[Sequence[float]]]
    """[head][from][to]."""


@dataclass(frozen=True)
class Code:
    """A line to be copied, with what it does."""

    says: str
    text: str


Block = Chart | Numbers | Reading | Attention | Code
"""What a section can hold."""


@dataclass(frozen=True)
class Content:
    """What a section tells."""

    says: Sequence[str] = ()
    """Sentences; empty ones are left out."""
    blocks: Sequence[Block] = ()
    """What stands below them."""


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
    """What stands below them."""


@dataclass(frozen=True)
class Opening:
    """What was asked, and the answer."""

    title: str
    asked: str
    answer: str
    marks: Sequence[tuple[str, str]] = ()
    """A few numbers by name."""
