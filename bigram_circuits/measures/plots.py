"""Plotly figures for each kind of result, in one style and palette.

Plotly reads every string that it draws as markup of its own (`<a href>`, `<b>`, `&lt;`), so every string that comes
from data goes through `plain` before it enters a figure. Backgrounds are transparent and the text is grey, so that
figures can be read in the light and in the dark theme of a notebook.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float

from bigram_circuits.measures.conditions import CONDITIONS, GREY, colour_of, label_of
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.words import span

SERIES = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#8C6BD1", "#A6761D", "#00A3A3", "#C7405D", "#7C9A00", "#999999",
)  # fmt: skip
"""Colours of series other than conditions, in this order; the first six are from Okabe and Ito."""
SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "triangle-down", "cross",
    "x", "star", "pentagon", "hexagram", "triangle-left", "triangle-right",
)  # fmt: skip
"""Marker symbols of the same series."""
SHADES = "Viridis"
"""Colour scale for non-negative values."""
SIGNED_SHADES = "RdBu_r"
"""Colour scale for values that can be negative."""
LIGHT_SHADES = ((0.0, "#f2f7fb"), (1.0, "#5aa9dd"))
"""Colour scale of cells with words in them: black text is readable on all of it."""
SIGNED_LIGHT_SHADES = ((0.0, "#6fb1dc"), (0.5, "#f7f7f7"), (1.0, "#ef9a72"))
"""The same for values that can be negative."""
POSITIVE, NEGATIVE = SERIES[1], SERIES[0]
"""Colours of values above and below 0, as at the ends of `SIGNED_SHADES`."""
IN_CELL = "#111111"
"""Colour of words in cells."""
GRID = "rgba(128,128,128,0.22)"
"""Colour of grid lines."""
ZERO_LINE = "rgba(128,128,128,0.5)"
"""Colour of the lines at 0."""
TRANSPARENT = "rgba(0,0,0,0)"
"""Colour of backgrounds."""
_AXIS = {
    "gridcolor": GRID,
    "zerolinecolor": ZERO_LINE,
    "zerolinewidth": 2,
    "linecolor": GRID,
    "automargin": True,
    "title": {"standoff": 15},
}
STYLE = {
    "layout": {
        "paper_bgcolor": TRANSPARENT, "plot_bgcolor": TRANSPARENT, "font": {"color": GREY}, "hovermode": "closest",
        "autotypenumbers": "strict", "hoverlabel": {"align": "left"}, "title": {"x": 0.05},
        "xaxis": _AXIS, "yaxis": _AXIS, "coloraxis": {"colorbar": {"outlinewidth": 0, "ticks": ""}},
    }
}  # fmt: skip
"""Plotly template of every figure, to be set as `layout.template`: `update_layout` would add it to plotly's own, which
makes pages a third larger and takes ten times as long."""
_BESIDE_CONDITIONS = SERIES[2:-1]  # the other colours belong to conditions
_LONGEST = 200  # characters of a string in a figure
_MARKED = 40  # longer lines are drawn without markers
_WIDE = 12  # columns; wider maps are stacked vertically
_LARGE, _SMALL = 100, 0.01  # numbers from which fewer, and below which more digits are shown on hover
_TALL = 14  # rows that fit a figure of the default height
_ACROSS = 720  # pixels that a figure of usual width has for its columns
_LETTER = 5.8  # pixels, of a letter in a cell or beside an axis
_NARROW = 34  # pixels, of a column with words in it; a map with more of them than fit is made wider
_TICK = 12  # pixels, of a label beside another; where there is less room, some are left out
_LONGEST_WORD = 14  # letters of a word in a cell or beside an axis; the whole word shows on hover
_TITLES = 80  # letters for the titles of all panels beside one another
_UPWARDS = ("layer",)  # row axes drawn bottom-up; others are read top-down, as in a table


Numbers = Float[np.ndarray, "..."]


def plain(value: Any) -> str:
    """Escape a value for plotly, so that it is shown literally instead of being read as markup; cut if very long."""
    text = str(value)
    return html.escape(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…", quote=False)


def lines(
    axis: str, points: Sequence[Any], series: Mapping[str, Sequence[Numbers]], measured: Quantity, title: str
) -> Any:
    """A line for every condition, from (values, low, high), with its intervals as a band."""
    import plotly.graph_objects as go

    figure = go.Figure()
    at, along = axis_points(points), plain(axis.replace("_", " "))
    number = hovered(measured.unit, *(values for values, *_ in series.values()))("y")
    says = f"{along} %{{x}}", f"{plain(measured.words)} {number}%{{customdata}}"
    for index, (condition, (values, low, high)) in enumerate(series.items()):
        colour = colour_of(condition) or _BESIDE_CONDITIONS[index % len(_BESIDE_CONDITIONS)]
        name = plain(label_of(condition))
        if not np.isnan(low).all():
            band = {"mode": "lines", "fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}}
            figure.add_scatter(
                x=[*at, *reversed(at)], y=np.concatenate([high, low[::-1]]), **band,
                hoverinfo="skip", legendgroup=name, showlegend=False,
            )  # fmt: skip
        line = {"color": colour, "width": 2, "dash": "dot" if condition.startswith("random") else "solid"}
        figure.add_scatter(
            x=at, y=values, name=name, legendgroup=name, line=line,
            mode="lines+markers" if len(points) <= _MARKED else "lines",
            customdata=_spans(low, high), hovertemplate=told(*says, name=name),
        )  # fmt: skip
    figure.update_xaxes(title=along)
    figure.update_yaxes(title=plain(measured.label))
    return _titled(figure, title)


def axis_points(points: Sequence[Any]) -> list[Any]:
    """Points of an axis for plotly: numbers as they are, names escaped."""
    return [point if isinstance(point, int | float) else plain(point) for point in points]


def heat_maps(
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    panels: Mapping[str, Numbers],
    text: Sequence[Sequence[Sequence[str]]] | None,
    measured: Quantity,
    title: str,
) -> Any:
    """A panel for every condition, on one colour scale; wide panels are stacked.

    Rows and columns are given with the name of their axis. Where there is text, [panel][row][column], a cell shows its
    first line, cut if it does not fit, and all of it on hover.
    """
    from plotly.subplots import make_subplots

    n_panels, n_rows, n_columns = len(panels), len(rows[1]), len(columns[1])
    above = n_columns > _WIDE and (n_rows < n_columns or n_panels > 2)
    room = _ACROSS / max(1, n_columns if above else n_columns * n_panels)  # pixels, of a column
    wide = text is not None and room < _NARROW
    room = _NARROW if wide else room
    wrap = _TITLES if above else max(_LONGEST_WORD, _TITLES // n_panels)
    figure = make_subplots(
        rows=n_panels if above else 1, cols=1 if above else n_panels, shared_xaxes=above, shared_yaxes=not above,
        subplot_titles=["<br>".join(map(plain, textwrap.wrap(label_of(name), wrap))) for name in panels],
        vertical_spacing=0.25 / n_panels,
    )  # fmt: skip
    where = f"{plain(rows[0])} %{{y}}, {plain(columns[0])} %{{x}}", *([] if text is None else ["%{customdata}"])
    says = *where, f"{plain(measured.words)} {hovered(measured.unit, *panels.values())('z')}"
    for index, (name, values) in enumerate(panels.items()):
        place = {"row": index + 1, "col": 1} if above else {"row": 1, "col": index + 1}
        figure.add_heatmap(
            z=values, x=list(range(n_columns)), y=list(range(n_rows)), coloraxis="coloraxis",
            hovertemplate=told(*says, name=plain(label_of(name))),
            **({} if text is None else _words(text[index], room)), **place,
        )  # fmt: skip
    for axes, (_, names), step in ((figure.update_xaxes, columns, ceil(_TICK / room)), (figure.update_yaxes, rows, 1)):
        places = range(0, len(names), step)
        axes(tickmode="array", tickvals=list(places), ticktext=[plain(_cut(names[place])) for place in places])
    longest = max((len(_cut(name)) for name in columns[1]), default=0)
    slanted = longest * _LETTER > room
    figure.update_xaxes(title=plain(columns[0]), row=n_panels if above else None)
    if slanted:
        figure.update_xaxes(tickangle=-45 if room > 2 * _TICK else -90)
    if wide:
        figure.update_layout(width=_ACROSS // 4 + _NARROW * n_columns)
    figure.update_yaxes(title=plain(rows[0]), col=1)
    if rows[0] not in _UPWARDS:
        figure.update_yaxes(autorange="reversed")
    figure.update_layout(coloraxis=_scale(panels, measured.unit, has_words=text is not None))
    if above:
        figure.update_layout(height=150 + (5 * longest if slanted else 0) + n_panels * (60 + 26 * n_rows))
    elif n_rows > _TALL:
        figure.update_layout(height=160 + 18 * n_rows)
    return _titled(figure, title)


def points(names: Sequence[str], x: tuple[Numbers, str], y: tuple[Numbers, str], title: str) -> Any:
    """Points with the diagonal, on which both numbers are the same; each number comes with the words on its axis."""
    import plotly.graph_objects as go

    both = np.concatenate([x[0], y[0]])
    both = both[np.isfinite(both)]
    ends = [float(both.min()), float(both.max())] if len(both) else [0.0, 1.0]
    figure = go.Figure()
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        line={"color": GREY, "width": 1, "dash": "dot"},
    )
    figure.add_scatter(
        x=x[0], y=y[0], mode="markers", text=[plain(name) for name in names], showlegend=False,
        marker={"color": SERIES[0], "size": 5, "opacity": 0.45},
        hovertemplate=told("%{text}", f"{plain(x[1])} %{{x:.3f}}", f"{plain(y[1])} %{{y:.3f}}"),
    )  # fmt: skip
    figure.update_xaxes(title=plain(x[1]))
    figure.update_yaxes(title=plain(y[1]))
    return _titled(figure, title)


def bars(subject: str, names: Sequence[str], series: Sequence[Numbers], measured: Quantity, title: str) -> Any:
    """A bar for every thing, from (values, low, high), with its interval."""
    import plotly.graph_objects as go

    values, low, high = series
    figure = go.Figure()
    errors: dict[str, Any] = {}
    if not np.isnan(low).all():
        errors["error_y"] = {
            "type": "data",
            "symmetric": False,
            "color": GREY,
            "array": high - values,
            "arrayminus": values - low,
        }
    figure.add_bar(
        x=axis_points(list(map(label_of, names))), y=values, marker={"color": CONDITIONS["subnetwork"].colour},
        customdata=_spans(low, high),
        hovertemplate=told("%{x}", f"{plain(measured.words)} {hovered(measured.unit, values)('y')}%{{customdata}}"),
        **errors,
    )  # fmt: skip
    figure.update_xaxes(title=plain(subject.replace("_", " ")), type="category")
    figure.update_yaxes(title=plain(measured.label))
    return _titled(figure, title)


def ranked(subject: str, names: Sequence[str], values: Numbers, unit: str, title: str) -> Any:
    """A horizontal bar for every thing, the first one on top, coloured by its sign; `unit` names the lengths."""
    import plotly.graph_objects as go

    rows = list(range(len(names)))  # names may be equal
    figure = go.Figure()
    colours = [NEGATIVE if value < 0 else POSITIVE for value in values]
    figure.add_bar(
        x=values, y=rows, orientation="h", marker={"color": colours}, customdata=[plain(name) for name in names],
        hovertemplate=told("%{customdata}", f"{plain(unit)} %{{x:.3f}}"),
    )  # fmt: skip
    figure.update_xaxes(title=plain(unit))
    figure.update_yaxes(
        title=plain(subject), autorange="reversed", tickmode="array", tickvals=rows, ticktext=list(map(plain, names))
    )
    figure.update_layout(height=160 + 24 * len(names))
    return _titled(figure, title)


def told(*lines: str, name: str = "") -> str:
    """A hover template of these lines, with the name of a trace beside it; all of them escaped."""
    return f"{'<br>'.join(lines)}<extra>{name}</extra>"


def hovered(unit: str, *values: Any) -> Callable[[str], str]:
    """How numbers are shown on hover: as percentages, whole or with a few digits, and with their unit.

    Returns a function from the name of a trace's numbers (`x`, `y`, `z`) to what a hover template has for them.
    """
    known = np.concatenate([np.asarray(one, dtype=float).ravel() for one in values]) if values else np.zeros(0)
    known = known[np.isfinite(known)]
    if unit == "share":
        return lambda name: f"%{{{name}:.3~p}}"
    if (known == known.round()).all() or np.abs(known).max(initial=0) >= _LARGE:
        digits = ",.0f" if (known == known.round()).all() else ",.1f"
    else:
        digits = ".3f" if np.abs(known).max(initial=0) >= _SMALL else ".3~g"
    return lambda name: f"%{{{name}:{digits}}}{plain(f' {unit}') if unit else ''}"


def _spans(low: Numbers, high: Numbers) -> list[str]:
    """The intervals of numbers, for a hover template; empty where there is none."""
    return ["" if np.isnan(one) else f" ({span(one, other)})" for one, other in zip(low, high, strict=True)]


def _cut(name: Any, most: int = _LONGEST_WORD) -> str:
    """A name, cut if it is longer than `most` letters."""
    text = str(name)
    return text if len(text) <= most else f"{text[: max(1, most - 1)]}…"


def _titled(figure: Any, title: str) -> Any:
    figure.layout.template = STYLE
    return figure.update_layout(title=plain(title), legend={"orientation": "h", "y": -0.2})


def _scale(panels: Mapping[str, Numbers], unit: str, *, has_words: bool) -> dict[str, Any]:
    """The colour scale of all panels: centred on 0 if some numbers are well below it."""
    shown = np.stack(list(panels.values()))
    signed = np.nanmin(shown, initial=0) < -0.01 * np.nanmax(np.abs(shown), initial=0)
    shades = (SIGNED_LIGHT_SHADES if signed else LIGHT_SHADES) if has_words else SIGNED_SHADES if signed else SHADES
    scale = {"colorscale": shades, "colorbar": {"title": plain(unit)}}
    return scale | ({"cmid": 0} if signed else {})


def _words(text: Sequence[Sequence[str]], room: float | int) -> dict[str, Any]:
    """What plotly needs to write words into the cells of a panel, each with room for so many pixels."""
    most = min(_LONGEST_WORD, max(2, int(room / _LETTER)))
    cells = [[cell.split("\n") for cell in row] for row in text]
    return {
        "text": [[plain(_cut(cell[0], most)) for cell in row] for row in cells],
        "texttemplate": "%{text}",
        "textfont": {"size": 10 if room < 2 * _NARROW else 11, "color": IN_CELL},
        "customdata": [["<br>".join(map(plain, cell)) for cell in row] for row in cells],
    }
