"""Plotly figures for each kind of result, in one style and palette."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from bigram_circuits.measures.conditions import CONDITIONS, colour_of
from bigram_circuits.measures.html import plain

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
_BESIDE_CONDITIONS = SERIES[2:-1]  # the other colours belong to conditions
_MARKED = 40  # longer lines are drawn without markers
_WIDE = 12  # columns; wider maps are stacked vertically
_TALL = 14  # rows that fit a figure of the default height
_UPWARDS = ("layer",)  # row axes drawn bottom-up; others are read top-down, as in a table


Numbers = Float[np.ndarray, "..."]


def lines(axis: str, points: Sequence[Any], series: Mapping[str, Sequence[Numbers]], unit: str, title: str) -> Any:
    """A line for every condition, from (values, low, high), with its intervals as a band; `unit` names the heights."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (condition, (values, low, high)) in enumerate(series.items()):
        colour = colour_of(condition) or _BESIDE_CONDITIONS[index % len(_BESIDE_CONDITIONS)]
        if not np.isnan(low).all():
            band = {"mode": "lines", "fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}}
            figure.add_scatter(
                x=[*points, *reversed(points)], y=np.concatenate([high, low[::-1]]), **band,
                hoverinfo="skip", legendgroup=condition, showlegend=False,
            )  # fmt: skip
        line = {"color": colour, "width": 2, "dash": "dot" if condition.startswith("random") else "solid"}
        figure.add_scatter(
            x=list(points), y=values, name=condition, legendgroup=condition, line=line,
            mode="lines+markers" if len(points) <= _MARKED else "lines",
        )  # fmt: skip
    figure.update_xaxes(title=axis.replace("_", " "))
    figure.update_yaxes(title=unit)
    return _titled(figure, title)


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
        subplot_titles=[plain(name) for name in panels], vertical_spacing=0.25 / n_panels,
    )  # fmt: skip
    for index, values in enumerate(panels.values()):
        place = {"row": index + 1, "col": 1} if above else {"row": 1, "col": index + 1}
        figure.add_heatmap(
            z=values, x=list(range(n_columns)), y=list(range(n_rows)), coloraxis="coloraxis",
            **({} if text is None else _words(text[index])), **place,
        )  # fmt: skip
    for axes, (_, names) in ((figure.update_xaxes, columns), (figure.update_yaxes, rows)):
        axes(tickmode="array", tickvals=list(range(len(names))), ticktext=[plain(name) for name in names])
    figure.update_xaxes(title=columns[0], row=n_panels if above else None)
    figure.update_yaxes(title=rows[0], col=1)
    if rows[0] not in _UPWARDS:
        figure.update_yaxes(autorange="reversed")
    figure.update_layout(coloraxis=_scale(panels, unit))
    if above:
        figure.update_layout(height=120 + n_panels * (60 + 26 * n_rows))
    elif n_rows > _TALL:
        figure.update_layout(height=160 + 18 * n_rows)
    return _titled(figure, title)


def bars(subject: str, names: Sequence[str], series: Sequence[Numbers], unit: str, title: str) -> Any:
    """A bar for every thing, from (values, low, high), with its interval; `unit` names the heights."""
    import plotly.graph_objects as go

    values, low, high = series
    figure = go.Figure()
    errors: dict[str, Any] = {}
    if not np.isnan(low).all():
        errors["error_y"] = {"type": "data", "symmetric": False, "array": high - values, "arrayminus": values - low}
    figure.add_bar(x=list(names), y=values, marker={"color": CONDITIONS["subnetwork"].colour}, **errors)
    figure.update_xaxes(title=subject, type="category")
    figure.update_yaxes(title=unit)
    return _titled(figure, title)


def _titled(figure: Any, title: str) -> Any:
    return figure.update_layout(template="plotly_white", title=plain(title), legend={"orientation": "h", "y": -0.2})


def _scale(panels: Mapping[str, Numbers], unit: str) -> dict[str, Any]:
    """The colour scale of all panels: centred on 0 if some numbers are well below it."""
    shown = np.stack(list(panels.values()))
    signed = np.nanmin(shown, initial=0) < -0.01 * np.nanmax(np.abs(shown), initial=0)
    scale = {"colorscale": SIGNED_SHADES if signed else SHADES, "colorbar": {"title": unit}}
    return scale | ({"cmid": 0} if signed else {})


def _words(text: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What plotly needs to write words into the cells of a panel."""
    cells = [[[plain(line) for line in cell.split("\n")] for cell in row] for row in text]
    return {
        "text": [[cell[0] for cell in row] for row in cells],
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "customdata": [["<br>".join(cell) for cell in row] for row in cells],
        "hovertemplate": "%{customdata}<br>%{z:.3f}<extra></extra>",
    }
