"""Tables and words as HTML: all that comes from data is escaped here."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

_PRECISE = 4  # digits shown


def escape(value: Any) -> str:
    """Words as they are, for HTML text and attributes."""
    return html.escape(str(value), quote=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """An HTML table; its first column names the rows. Numbers are shown with few digits and carry all of them."""
    classes = [' class="n"' if _is_numeric(rows, at) else "" for at in range(len(columns))]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(classes, columns, strict=True))
    body = "".join(f"<tr>{''.join(_cell(value, first=not at) for at, value in enumerate(row))}</tr>" for row in rows)
    return f'<table aria-label="{escape(caption)}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _is_numeric(rows: Sequence[Sequence[Any]], at: int) -> bool:
    return at > 0 and any(isinstance(row[at], int | float) for row in rows)


def _cell(value: Any, *, first: bool) -> str:
    """A cell; a number is shown with few digits and carries all of them."""
    tag = 'th scope="row"' if first else "td"
    end = "th" if first else "td"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return f"<{tag}>–</{end}>"  # noqa: RUF001 (a dash for what is undefined)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<{tag}>{escape(value)}</{end}>"
    return f'<{tag} class="n"><data value="{value!r}">{shown(value)}</data></{end}>'


def shown(value: float | int) -> str:
    """A number with few digits."""
    if value == int(value) and abs(value) < 1e15 if math.isfinite(value) else False:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:#.{_PRECISE}g}" if abs(value) >= 1e-3 else f"{value:.2e}"
