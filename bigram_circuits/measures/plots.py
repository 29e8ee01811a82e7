"""Plotly figures for each kind of result, in one style and palette.

Plotly reads every string that it draws as markup of its own (`<a href>`, `<b>`, `&lt;`), so every string that comes
from data goes through `plain` before it enters a figure. Backgrounds are transparent and the text is grey, so that
figures can be read in the light and in the dark theme of a notebook.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from bigram_circuits.measures.conditions import CONDITIONS, GREY, colour_of, label_of

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
    "linecolor": GRID,
    "automargin": True,
    "title": {"standoff": 15},
}
STYLE = {
    "layout": {
        "paper_bgcolor": TRANSPARENT, "plot_bgcolor": TRANSPARENT, "font": {"color": GREY}, "hovermode": "closest",
        "xaxis": _AXIS, "yaxis": _AXIS, "coloraxis": {"colorbar": {"outlinewidth": 0, "ticks": ""}},
    }
}  # fmt: skip
"""Plotly template of every figure; plotly's own would make pages a third larger."""
_BESIDE_CONDITIONS = SERIES[2:-1]  # the other colours belong to conditions
_LONGEST = 200  # characters of a string in a figure
_MARKED = 40  # longer lines are drawn without markers
_WIDE = 12  # columns; wider maps are stacked vertically
_TALL = 14  # rows that fit a figure of the default height
_UPWARDS = ("layer",)  # row axes drawn bottom-up; others are read top-down, as in a table


Numbers = Float[np.ndarray, "..."]


def plain(value: Any) -> str:
    """Escape a value for plotly, so that it is shown literally instead of being read as markup; cut if very long."""
    text = str(value)
    return html.escape(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…", quote=False)


def lines(axis: str, points: Sequence[Any], series: Mapping[str, Sequence[Numbers]], unit: str, title: str) -> Any:
    """A line for every condition, from (values, low, high), with its intervals as a band; `unit` names the heights."""
    import plotly.graph_objects as go

    figure = go.Figure()
    at = axis_points(points)
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
        )  # fmt: skip
    figure.update_xaxes(title=plain(axis.replace("_", " ")))
    figure.update_yaxes(title=plain(unit))
    return _titled(figure, title)


def axis_points(points: Sequence[Any]) -> list[Any]:
    """Points of an axis for plotly: numbers as they are, names escaped."""
    return [point if isinstance(point, int | float) else plain(point) for point in points]


def heat_maps(
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    panels: Mapping[str, Numbers],
    text: Sequence[Sequence[Sequence[str]]] | None,
    unit: str,
    title: str,
) -> Any:
    """A panel for every condition, on one colour scale; wide panels are stacked.

    Rows and columns are given with the name of their axis. Where there is text, [panel][row][column], a cell shows its
    first line, and all of it on hover.
    """
    from plotly.subplots import make_subplots

    n_panels, n_rows, n_columns = len(panels), len(rows[1]), len(columns[1])
    above = n_columns > _WIDE and (n_rows < n_columns or n_panels > 2)
    figure = make_subplots(
        rows=n_panels if above else 1, cols=1 if above else n_panels, shared_xaxes=above, shared_yaxes=not above,
        subplot_titles=[plain(label_of(name)) for name in panels], vertical_spacing=0.25 / n_panels,
    )  # fmt: skip
    for index, values in enumerate(panels.values()):
        place = {"row": index + 1, "col": 1} if above else {"row": 1, "col": index + 1}
        figure.add_heatmap(
            z=values, x=list(range(n_columns)), y=list(range(n_rows)), coloraxis="coloraxis",
            **({} if text is None else _words(text[index])), **place,
        )  # fmt: skip
    for axes, (_, names) in ((figure.update_xaxes, columns), (figure.update_yaxes, rows)):
        axes(tickmode="array", tickvals=list(range(len(names))), ticktext=[plain(name) for name in names])
    figure.update_xaxes(title=plain(columns[0]), row=n_panels if above else None)
    figure.update_yaxes(title=plain(rows[0]), col=1)
    if rows[0] not in _UPWARDS:
        figure.update_yaxes(autorange="reversed")
    figure.update_layout(coloraxis=_scale(panels, unit, has_words=text is not None))
    if above:
        figure.update_layout(height=120 + n_panels * (60 + 26 * n_rows))
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
        hovertemplate=f"%{{text}}<br>{plain(x[1])}: %{{x:.3f}}<br>{plain(y[1])}: %{{y:.3f}}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title=plain(x[1]))
    figure.update_yaxes(title=plain(y[1]))
    return _titled(figure, title)


def bars(subject: str, names: Sequence[str], series: Sequence[Numbers], unit: str, title: str) -> Any:
    """A bar for every thing, from (values, low, high), with its interval; `unit` names the heights."""
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
        x=axis_points(list(map(label_of, names))), y=values, marker={"color": CONDITIONS["subnetwork"].colour}, **errors
    )
    figure.update_xaxes(title=plain(subject), type="category")
    figure.update_yaxes(title=plain(unit))
    return _titled(figure, title)


def ranked(subject: str, names: Sequence[str], values: Numbers, unit: str, title: str) -> Any:
    """A horizontal bar for every thing, the first one on top, coloured by its sign; `unit` names the lengths."""
    import plotly.graph_objects as go

    rows = list(range(len(names)))  # names may be equal
    figure = go.Figure()
    colours = [NEGATIVE if value < 0 else POSITIVE for value in values]
    figure.add_bar(
        x=values, y=rows, orientation="h", marker={"color": colours}, customdata=[plain(name) for name in names],
        hovertemplate="%{customdata}<br>%{x:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title=plain(unit))
    figure.update_yaxes(
        title=plain(subject), autorange="reversed", tickmode="array", tickvals=rows, ticktext=list(map(plain, names))
    )
    figure.update_layout(height=160 + 24 * len(names))
    return _titled(figure, title)


def _titled(figure: Any, title: str) -> Any:
    return figure.update_layout(template=STYLE, title=plain(title), legend={"orientation": "h", "y": -0.2})


def _scale(panels: Mapping[str, Numbers], unit: str, *, has_words: bool) -> dict[str, Any]:
    """The colour scale of all panels: centred on 0 if some numbers are well below it."""
    shown = np.stack(list(panels.values()))
    signed = np.nanmin(shown, initial=0) < -0.01 * np.nanmax(np.abs(shown), initial=0)
    shades = (SIGNED_LIGHT_SHADES if signed else LIGHT_SHADES) if has_words else SIGNED_SHADES if signed else SHADES
    scale = {"colorscale": shades, "colorbar": {"title": plain(unit)}}
    return scale | ({"cmid": 0} if signed else {})


def _words(text: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What plotly needs to write words into the cells of a panel."""
    cells = [[[plain(line) for line in cell.split("\n")] for cell in row] for row in text]
    return {
        "text": [[cell[0] for cell in row] for row in cells],
        "texttemplate": "%{text}",
        "textfont": {"size": 11, "color": IN_CELL},
        "customdata": [["<br>".join(cell) for cell in row] for row in cells],
        "hovertemplate": "%{customdata}<br>%{z:.3f}<extra></extra>",
    }
