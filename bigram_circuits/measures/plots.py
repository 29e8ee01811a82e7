"""Plotly figures for each kind of result, in one style and palette."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bigram_circuits.measures.conditions import CONDITIONS, colour_of
from bigram_circuits.measures.html import plain
from bigram_circuits.measures.results import Curves, Effects, Maps, Result

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


def draw(result: Result, quantity: str | None = None) -> Any:
    """Draw one quantity of a result, by default the first."""
    chosen = result.quantities[0] if quantity is None else result.quantity(quantity)
    figure = DRAWN_BY[type(result)](result, chosen.name)
    title = plain(f"{result.title}: {chosen.words}")
    return figure.update_layout(template="plotly_white", title=title, legend={"orientation": "h", "y": -0.2})


def lines(result: Curves, quantity: str) -> Any:
    """Draw a line for every condition, with its confidence intervals as a band."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, condition in enumerate(result.conditions):
        colour = colour_of(condition) or _BESIDE_CONDITIONS[index % len(_BESIDE_CONDITIONS)]
        low, high = result.interval(quantity, condition)
        if not np.isnan(low).all():
            band = {"mode": "lines", "fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}}
            figure.add_scatter(
                x=[*result.points, *reversed(result.points)], y=np.concatenate([high, low[::-1]]), **band,
                hoverinfo="skip", legendgroup=condition, showlegend=False,
            )  # fmt: skip
        line = {"color": colour, "width": 2, "dash": "dot" if condition.startswith("random") else "solid"}
        figure.add_scatter(
            x=list(result.points), y=result.get(quantity, condition), name=condition, legendgroup=condition, line=line,
            mode="lines+markers" if len(result.points) <= _MARKED else "lines",
        )  # fmt: skip
    figure.update_xaxes(title=result.axis.replace("_", " "))
    return figure.update_yaxes(title=result.quantity(quantity).label)


def heat_maps(result: Maps, quantity: str) -> Any:
    """Draw a panel for every condition, on one colour scale; wide panels are stacked vertically.

    If the result has text, a cell shows its first line, and all lines on hover.
    """
    from plotly.subplots import make_subplots

    n_panels, n_rows, n_columns = len(result.conditions), len(result.rows), len(result.columns)
    above = n_columns > _WIDE and (n_rows < n_columns or n_panels > 2)
    figure = make_subplots(
        rows=n_panels if above else 1, cols=1 if above else n_panels, shared_xaxes=above, shared_yaxes=not above,
        subplot_titles=[plain(name) for name in result.conditions], vertical_spacing=0.25 / n_panels,
    )  # fmt: skip
    for index, condition in enumerate(result.conditions):
        place = {"row": index + 1, "col": 1} if above else {"row": 1, "col": index + 1}
        figure.add_heatmap(
            z=result.get(quantity, condition), x=list(range(n_columns)), y=list(range(n_rows)), coloraxis="coloraxis",
            **_words(result, index), **place,
        )  # fmt: skip
    for axes, names in ((figure.update_xaxes, result.columns), (figure.update_yaxes, result.rows)):
        axes(tickmode="array", tickvals=list(range(len(names))), ticktext=[plain(name) for name in names])
    figure.update_xaxes(title=result.column_axis, row=n_panels if above else None)
    figure.update_yaxes(title=result.row_axis, col=1)
    if result.row_axis not in _UPWARDS:
        figure.update_yaxes(autorange="reversed")
    figure.update_layout(coloraxis=_scale(result, quantity))
    if above:
        figure.update_layout(height=120 + n_panels * (60 + 26 * n_rows))
    elif n_rows > _TALL:
        figure.update_layout(height=160 + 18 * n_rows)
    return figure


def bars(result: Effects, quantity: str) -> Any:
    """Draw a bar for every item, with its confidence interval."""
    import plotly.graph_objects as go

    chosen = result.quantity(quantity)
    values, low, high = (ends[result.quantities.index(chosen)] for ends in (result.values, result.low, result.high))
    figure = go.Figure()
    errors: dict[str, Any] = {}
    if not np.isnan(low).all():
        errors["error_y"] = {"type": "data", "symmetric": False, "array": high - values, "arrayminus": values - low}
    figure.add_bar(x=list(result.names), y=values, marker={"color": CONDITIONS["subnetwork"].colour}, **errors)
    figure.update_xaxes(title=result.subject, type="category")
    return figure.update_yaxes(title=chosen.label)


DRAWN_BY: Mapping[type[Result], Callable[..., Any]] = {Curves: lines, Maps: heat_maps, Effects: bars}
"""The function that draws each kind of result."""


def _scale(result: Maps, quantity: str) -> dict[str, Any]:
    """Choose the colour scale shared by all panels: centred on 0 if some values are clearly negative."""
    chosen = result.quantity(quantity)
    shown = result.values[result.quantities.index(chosen)]
    signed = np.nanmin(shown, initial=0) < -0.01 * np.nanmax(np.abs(shown), initial=0)
    scale = {"colorscale": SIGNED_SHADES if signed else SHADES, "colorbar": {"title": chosen.unit}}
    return scale | ({"cmid": 0} if signed else {})


def _words(result: Maps, index: int) -> dict[str, Any]:
    """Return the plotly arguments that write text into the cells of a panel."""
    if result.text is None:
        return {}
    cells = [[[plain(line) for line in cell.split("\n")] for cell in row] for row in result.text[index]]
    return {
        "text": [[cell[0] for cell in row] for row in cells],
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "customdata": [["<br>".join(cell) for cell in row] for row in cells],
        "hovertemplate": "%{customdata}<br>%{z:.3f}<extra></extra>",
    }
