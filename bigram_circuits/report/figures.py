"""Charts that are not a result's own `.plot()`, and the style that all charts of a page share.

Backgrounds are transparent, and two colours are placeholders: `INK` for the page's text and `MUTED` for its softer
text. When the page draws a chart, it replaces them by the colours of its light or dark theme.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigram_circuits.measures.conditions import CONDITIONS, colour_of, label_of
from bigram_circuits.measures.plots import IN_CELL, LIGHT_SHADES, STYLE, axis_points, plain, told
from bigram_circuits.measures.results import Curves
from bigram_circuits.measures.words import span
from bigram_circuits.runs import StepRecord

INK = CONDITIONS["full"].colour
"""Replaced by the colour of the page's text; results draw the full model in it."""
MUTED = "#808080"
"""Replaced by the colour of the page's softer text."""
_BAR = 24  # pixels, of height for a horizontal bar
_HEIGHT = 340
_SQUARE = 18  # pixels, of the side of a node in a grid
_FAR = 3.0  # times the smallest height of lines by size, from which the heights are logarithmic
_LABEL = 24  # characters, of a line of a label beside a chart


def dressed(figure: Any, height: int | None = None) -> Any:
    """Apply the page's style: transparent, no title (the page has it), the legend above, light grid lines."""
    figure.layout.template = STYLE
    figure.update_layout(
        title=None,
        font={"family": "system-ui, sans-serif", "size": 13, "color": MUTED},
        margin={"l": 8, "r": 8, "t": 36, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "title": None},
        height=height or figure.layout.height or _HEIGHT, width=None, bargap=0.3,
    )  # fmt: skip
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(title_font_size=13)
    figure.update_annotations(font={"size": 13, "color": MUTED})
    if figure.layout.coloraxis.colorscale:
        figure.update_layout(
            coloraxis={"colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"font": {"size": 13}}}}
        )
        figure.update_xaxes(showgrid=False)
        figure.update_yaxes(showgrid=False)
    return figure


def training(steps: Sequence[StepRecord], units: str) -> Any:
    """Cross-entropy, share of weights or nodes kept and share of gates undecided by step, a line for every attempt."""
    from plotly.subplots import make_subplots

    panels = {
        "cross-entropy (nats)": "cross_entropy",
        f"share of {units} kept": "fraction",
        "share of gates undecided": "undecided",
    }
    figure = make_subplots(
        rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.09, subplot_titles=list(panels)
    )
    attempts = sorted({one.attempt for one in steps})
    for row, (words, key) in enumerate(panels.items(), start=1):
        digits = ".3f" if key == "cross_entropy" else ".3~p"
        for attempt in attempts:
            of = [one for one in steps if one.attempt == attempt]
            colour = CONDITIONS["subnetwork" if attempt == attempts[-1] else "random"].colour
            figure.add_scatter(
                x=[one.step for one in of], y=[getattr(one, key) for one in of], mode="lines",
                line={"color": colour, "width": 2}, name=f"attempt {attempt}", legendgroup=str(attempt),
                showlegend=row == 1 and len(attempts) > 1, row=row, col=1,
                hovertemplate=told("step %{x}", f"{words} %{{y:{digits}}}"),
            )  # fmt: skip
        if key != "cross_entropy":
            figure.update_yaxes(tickformat="~%", rangemode="tozero", row=row, col=1)
    figure.update_annotations(x=0, xanchor="left")
    figure.update_xaxes(title="step", row=len(panels), col=1)
    return dressed(figure, 560)


def controls(rows: Sequence[tuple[str, float, float, float]], axis: str) -> Any:
    """Dots with error bars, from (name, value, low, high); the first row is on top. `axis` says what the value is."""
    import plotly.graph_objects as go

    known = [row for row in rows if not math.isnan(row[1])]
    figure = go.Figure()
    for key, value, low, high in known:
        name = "<br>".join(map(plain, textwrap.wrap(label_of(key), _LABEL)))
        bars = {} if math.isnan(low) else error_bars([value], [low], [high], "x")
        figure.add_scatter(
            x=[value], y=[name], mode="markers", showlegend=False, name=name,
            marker={"size": 11, "color": colour_of(key) or MUTED}, **bars,
            hovertemplate=told("%{y}", f"{plain(axis)} %{{x:.3f}}{'' if math.isnan(low) else f' ({span(low, high)})'}"),
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(title=axis)
    dressed(figure, 90 + 32 * len(known))
    return figure.update_layout(margin_t=8)


def by_size(curves: Curves, quantity: str, ends: Mapping[str, tuple[float, float]], units: str) -> Any:
    """A quantity's lines by share kept, and where each ends: (share, value) without a penalty, dotted."""
    figure = curves.plot(quantity)
    shown = {trace.name: trace.line.color for trace in figure.data if trace.name}
    for condition, (share, value) in ends.items():
        name, line = plain(label_of(condition)), curves.get(quantity, condition)
        last = int(np.flatnonzero(~np.isnan(line))[-1])
        figure.add_scatter(
            x=[curves.points[last], share], y=[line[last], value], mode="lines+markers", showlegend=False,
            name=f"{name}, no penalty", legendgroup=name, line={"color": shown.get(name, MUTED), "dash": "dot"},
            marker={"symbol": "circle-open", "size": [0, 11]},
            hovertemplate=told("%{x} kept", "%{y:.3f}", name=f"{name}, no penalty"),
        )  # fmt: skip
    figure.update_xaxes(type="log", dtick="D2", title=f"share of {units} kept", tickformat="~%")
    heights = curves.values[curves.quantities.index(curves.quantity(quantity))]
    if np.nanmin(heights) > 0 and np.nanmax(heights) > _FAR * np.nanmin(heights):
        figure.update_yaxes(
            type="log", dtick="D2", tickformat="~g"
        )  # or a small gap is lost beside a model that learned nothing
    return dressed(figure)


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], row_axis: str, unit: str
) -> Any:
    """A matrix of shares, written into the cells."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_heatmap(
        z=values, x=axis_points(columns), y=axis_points(rows), coloraxis="coloraxis", textfont={"color": IN_CELL},
        text=[[f"{x:.2%}" for x in row] for row in values], texttemplate="%{text}",
        hovertemplate=f"{plain(row_axis)} %{{y}}, %{{x}}: %{{text}}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(coloraxis={"colorscale": LIGHT_SHADES, "colorbar": {"title": plain(unit), "tickformat": "~%"}})
    figure.update_xaxes(type="category", side="top")
    figure.update_yaxes(type="category", title=plain(row_axis))
    return dressed(figure, 110 + 34 * len(rows))


def grid(rows: Sequence[str], columns: Sequence[str], kept: Sequence[Sequence[bool | None]], row_axis: str) -> Any:
    """Squares for the nodes of each row: filled if kept, hollow if dropped; none where it is None."""
    import plotly.graph_objects as go

    figure = go.Figure()
    looks = {
        "kept": {"color": CONDITIONS["circuit"].colour, "size": _SQUARE, "symbol": "square"},
        "dropped": {"color": MUTED, "size": _SQUARE, "symbol": "square-open", "opacity": 0.6},
    }
    for name, look in looks.items():
        at = [(r, c) for r, row in enumerate(kept) for c, one in enumerate(row) if one is (name == "kept")]
        figure.add_scatter(
            x=[columns[c] for _, c in at], y=[rows[r] for r, _ in at], mode="markers", name=name, marker=look,
            hovertemplate=f"{plain(row_axis)} %{{y}}, %{{x}}: {name}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        type="category", categoryorder="array", categoryarray=list(columns), range=[-0.7, len(columns) - 0.3],
        showgrid=False, zeroline=False, side="top",
    )  # fmt: skip
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=list(rows), range=[len(rows) - 0.3, -0.7],
        title=plain(row_axis), showgrid=False, zeroline=False,
    )  # fmt: skip
    dressed(figure, 110 + 30 * len(rows))
    return figure.update_layout(margin_t=56, legend_y=1.0 + 36 / (30 * len(rows) + 46))


def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    unit: str,
    intervals: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Any:
    """Horizontal bars: the first name on top, one colour per series."""
    import plotly.graph_objects as go

    figure = go.Figure()
    many = len(series) > 1
    for name, values in series.items():
        low, high = (intervals or {}).get(name, ([], []))
        error = (
            error_bars(values, low, high, "x") if len(low) and not np.isnan(np.asarray(low, dtype=float)).all() else {}
        )
        colour = colour_of(name) or CONDITIONS["subnetwork"].colour
        figure.add_bar(
            y=axis_points(names), x=list(values), name=plain(label_of(name)), orientation="h",
            marker={"color": colour}, showlegend=many, **error,
            hovertemplate=told("%{y}", f"{plain(unit)} %{{x:.3~g}}", name=plain(label_of(name)) if many else ""),
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(title=plain(unit))
    dressed(figure, 100 + (_BAR - 13 + 13 * len(series)) * len(names))
    return figure.update_layout(margin_t=36 if len(series) > 1 else 8)


def overlaps(points: Mapping[str, tuple[float, float, float, float]], x: str, y: str, enough: float) -> Any:
    """Points with error bars, from (share on the x axis, value, low, high) by name, and a dashed line at a value."""
    import plotly.graph_objects as go

    figure = go.Figure()
    at, value, low, high = (list(column) for column in zip(*points.values(), strict=True))
    figure.add_scatter(
        x=at, y=value, mode="markers", showlegend=False, text=[plain(name) for name in points],
        marker={"size": 11, "color": CONDITIONS["subnetwork"].colour}, **error_bars(value, low, high, "y"),
        hovertemplate=told("%{text}", f"{plain(x)} %{{x:.3f}}", f"{plain(y)} %{{y:.3f}}"),
    )  # fmt: skip
    figure.add_hline(y=enough, line={"color": MUTED, "width": 1, "dash": "dash"})
    known = [one for one in (*value, *low, *high, enough) if math.isfinite(one)]
    room = 0.06 * (max(known) - min(known)) or 0.01
    figure.update_xaxes(title=x, range=[-0.03, 1.03])
    figure.update_yaxes(title=y, tickformat="~%", range=[min(known) - room, max(known) + room])
    dressed(figure)
    return figure.update_layout(margin_t=8)


def without_first_row(figure: Any) -> None:
    """Scale colours by all rows but the first, the embedding's, whose values are far larger than the others'."""
    values = np.concatenate([np.asarray(trace.z, dtype=float)[1:].ravel() for trace in figure.data])
    most = float(np.nanmax(np.abs(values), initial=0))
    if figure.layout.coloraxis.cmid == 0 and most > 0:
        figure.update_layout(coloraxis={"cmin": -most, "cmax": most, "cmid": None})


def with_baseline(curves: Curves, quantity: str) -> Any:
    """A quantity's lines, with those of its `_baseline` dashed."""
    figure = curves.plot(quantity)
    shown = {trace.name: trace.line.color for trace in figure.data if trace.name}
    for condition in curves.conditions:
        name, values = plain(label_of(condition)), curves.get(f"{quantity}_baseline", condition)
        figure.add_scatter(
            x=axis_points(curves.points), y=values, mode="lines", showlegend=False, name=f"{name}, other positions",
            legendgroup=name, opacity=0.7, line={"color": shown.get(name, MUTED), "width": 1.5, "dash": "dash"},
            hovertemplate=told(f"{plain(curves.axis)} %{{x}}", "%{y:.3f}", name=f"{name}, other positions"),
        )  # fmt: skip
    return dressed(figure)


def error_bars(values: Sequence[float], low: Sequence[float], high: Sequence[float], axis: str) -> dict[str, Any]:
    """Plotly error bars from the ends of intervals."""
    middle = np.asarray(values, dtype=float)
    ends = {"array": np.asarray(high, dtype=float) - middle, "arrayminus": middle - np.asarray(low, dtype=float)}
    return {f"error_{axis}": {"type": "data", "symmetric": False, "color": MUTED, "thickness": 1.5, **ends}}
