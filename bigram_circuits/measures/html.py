"""Tables and text as HTML, and what all pages share; everything that comes from data is escaped here.

A page is one file that needs no server, no network and no other file: `templates/shell.html` around what a room's own
templates say, in the style of `templates/page.css`.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigram_circuits.storage.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment

_PRECISE = 4  # significant digits shown


def environment(*rooms: str) -> Environment:
    """Jinja2 with the templates of rooms (`report`) and those that all pages share; imported only when needed.

    In a template, `source(name)` is the text of a style sheet or a script, unescaped.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    found = Environment(
        loader=ChoiceLoader([PackageLoader(f"bigram_circuits.{room}") for room in (*rooms, "measures")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    def source(name: str) -> Markup:
        assert found.loader is not None
        return Markup(found.loader.get_source(found, name)[0])

    found.globals["source"] = source
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return found


def write_page(path: str | os.PathLike[str], make: Callable[[], str]) -> Path:
    """Write the page that `make` returns, replacing an earlier one; returns its path.

    Raises:
        ValueError: If the path is a folder; whatever `make` raises.
        OSError: If it cannot be written.
    """
    path = Path(path)
    check_no_folder(path)
    write_text(path, make())
    return path


def check_no_folder(path: Path) -> None:
    """Raise ValueError if a page is to be written where a folder is."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: name a file in it")


def escape(value: Any) -> str:
    """Escape a value for HTML text and attributes."""
    return html.escape(str(value), quote=True)


def explained(name: str, meaning: str | None) -> str:
    """A name with what it means, which shows on hover (a page's script also shows it on touch and focus)."""
    if not meaning:
        return escape(name)
    return f'<abbr title="{escape(meaning)}" tabindex="0">{escape(name)}</abbr>'


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    caption: str,
    meanings: Mapping[str, str] | None = None,
) -> str:
    """Build an HTML table whose first column names the rows; numbers are rounded, with the full value in `<data>`.

    Names of columns and rows that are among `meanings` show what they mean, a row's where it is the first of that name.
    """
    meanings = meanings or {}
    first = {row[0]: at for at, row in reversed([*enumerate(rows)]) if row and isinstance(row[0], str)}
    classes = [' class="n"' if _is_numeric(rows, at) else "" for at in range(len(columns))]
    names = [explained(name, meanings.get(name)) for name in columns]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for kind, name in zip(classes, names, strict=True))
    body = "".join(
        f"<tr>{_heading(row[0], meanings if first.get(row[0]) == at else {})}{''.join(map(_cell, row[1:]))}</tr>"
        for at, row in enumerate(rows)
        if row
    )
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


def _heading(value: Any, meanings: Mapping[str, str]) -> str:
    """Build the cell that names a row."""
    if isinstance(value, str) and value in meanings:
        return f'<th scope="row">{explained(value, meanings[value])}</th>'
    return _cell(value, 'th scope="row"')


def _cell(value: Any, tag: str = "td") -> str:
    """Build a table cell; a number is shown rounded, with the full value in `<data>`."""
    end = tag.split()[0]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return f"<{tag}>–</{end}>"  # noqa: RUF001 (a dash for what is undefined)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<{tag}>{escape(value)}</{end}>"
    return f'<{tag}><data value="{value!r}">{shown(value)}</data></{end}>'


def shown(value: float | int) -> str:
    """Format a number with few digits."""
    if value == int(value) and abs(value) < 1e15 if math.isfinite(value) else False:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.1f}"
    return f"{value:#.{_PRECISE}g}" if abs(value) >= 1e-3 else f"{value:.2e}"
