"""What a page is made of, in plain text: sections of sentences, charts and tables, and numbers in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


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
class Section:
    """A step of the story."""

    key: str
    heading: str
    says: Sequence[str] = ()
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Opening:
    """What was asked, and the answer."""

    title: str
    asked: str
    answer: str
    marks: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """A few numbers by name."""


def span(low: float | None, high: float | None) -> str:
    """An interval on one line; empty if there is none."""
    return "" if low is None else f"{rounded(low)}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{rounded(high)}"


def percent(share: float | None) -> str:
    """A share, in words."""
    if share is None or math.isnan(share):
        return "undefined"
    return f"{100 * share:.2f}%" if abs(share) < 0.1 else f"{100 * share:.1f}%"


def rounded(value: float | np.floating | int | None, digits: int = 3) -> str:
    """A number, in words."""
    return "undefined" if value is None or math.isnan(value) else f"{value:,.{digits}f}"
