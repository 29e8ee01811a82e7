"""What a page is made of, in plain text: sections of sentences, charts and tables; numbers and settings in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LAYER_CHARTS = (
    ("logit_lens", "surprisal_correlation", "Logit lens: r with the target", "r with the target"),
    ("affine_lens", "surprisal_correlation", "Affine lens: r with the target", "r with the target"),
    ("affine_lens", "recall_at_1", "Recall of the current token", "the share of tokens found first"),
    ("cosine", "current_embedding", "Cosine with the current token's embedding", "the mean cosine"),
    ("cosine", "target_unembedding", "Cosine with the unembedding of the target's next token", "the mean cosine"),
    ("rotations", "output_angle", "Rotation of the map to the output", "the median angle in degrees"),
)  # fmt: skip
"""Result, quantity, title and words of what is drawn by layer."""


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


def interval(
    metrics: Mapping[str, Any], condition: str, quantity: str = "surprisal_correlation"
) -> tuple[float | None, float | None]:
    """Of r, or of another quantity; ends are None where it is undefined."""
    low, high = (metrics.get("intervals") or {}).get(condition, {}).get(quantity) or (None, None)
    return low, high
