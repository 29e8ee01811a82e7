"""Tables and text as HTML; everything that comes from data is escaped here."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

_PRECISE = 4  # significant digits shown


def escape(value: Any) -> str:
    """Escape a value for HTML text and attributes."""
    return html.escape(str(value), quote=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """Build an HTML table whose first column names the rows; numbers are rounded, with the full value in `<data>`."""
    classes = [' class="n"' if _is_numeric(rows, at) else "" for at in range(len(columns))]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(classes, columns, strict=True))
    body = "".join(f"<tr>{''.join(_cell(value, first=not at) for at, value in enumerate(row))}</tr>" for row in rows)
    return f'<table aria-label="{escape(caption)}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def summary(title: str, says: Sequence[str], *tables: str) -> str:
    """Build an object's HTML view in a notebook: title, sentences, and ready-made tables; no scripts, no colours."""
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in says if sentence)
    return f"<div><p><strong>{escape(title)}</strong></p>{sentences}{''.join(tables)}</div>"


def small(says: Sequence[str]) -> str:
    """Format sentences as small print below a table."""
    return "".join(f"<p><small>{escape(sentence)}</small></p>" for sentence in says if sentence)


def shortened(rows: Sequence[Sequence[Any]], most: int) -> list[Sequence[Any]]:
    """Shorten a table to `most` rows: the first ones, a row that says how many are omitted, and the last one."""
    if len(rows) <= most:
        return list(rows)
    left_out = [f"… {len(rows) - most + 1} more", *[""] * (len(rows[0]) - 1)]
    return [*rows[: most - 2], left_out, rows[-1]]


def _is_numeric(rows: Sequence[Sequence[Any]], at: int) -> bool:
    return at > 0 and any(isinstance(row[at], int | float) for row in rows)


def _cell(value: Any, *, first: bool) -> str:
    """Build a table cell; a number is shown rounded, with the full value in `<data>`."""
    tag = 'th scope="row"' if first else "td"
    end = "th" if first else "td"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return f"<{tag}>–</{end}>"  # noqa: RUF001 (a dash for what is undefined)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<{tag}>{escape(value)}</{end}>"
    return f'<{tag} class="n"><data value="{value!r}">{shown(value)}</data></{end}>'


def shown(value: float | int) -> str:
    """Format a number with few digits."""
    if value == int(value) and abs(value) < 1e15 if math.isfinite(value) else False:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:#.{_PRECISE}g}" if abs(value) >= 1e-3 else f"{value:.2e}"
