"""Format numbers and settings as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MOST_NAMED = 8  # in a sentence


def span(low: float | None, high: float | None) -> str:
    """Format an interval on one line; empty if there is none."""
    return (
        "" if low is None or math.isnan(low) else f"{rounded(low)}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{rounded(high)}"
    )


def percent(share: float | None) -> str:
    """Format a share as a percentage."""
    if share is None or math.isnan(share):
        return "undefined"
    return f"{100 * share:.2f}%" if abs(share) < 0.1 else f"{100 * share:.1f}%"


def rounded(value: float | np.floating | int | None, digits: int = 3) -> str:
    """Format a number with a fixed number of decimals, or as "undefined"."""
    return "undefined" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def flat(values: Mapping[str, Any], at: str = "") -> list[list[str]]:
    """Flatten nested settings to rows of dotted name (`recipe.seed`) and value, both as text."""
    rows = []
    for key, value in values.items():
        name = f"{at}{key}"
        rows += flat(value, f"{name}.") if isinstance(value, Mapping) and value else [[name, _plain(value)]]
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "not set" if value is None else str(value)


def listed(names: Sequence[str], most: int = _MOST_NAMED) -> str:
    """Names in a sentence; of a long list, the first ones and how many more there are."""
    if len(names) > most + 1:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def sentence(words: str) -> str:
    """Words with a capital letter and a full stop; empty if there are no words."""
    return f"{words[:1].upper()}{words[1:]}." if words else ""
