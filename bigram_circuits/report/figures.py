"""The charts of the report that are not a result's own `.plot()`, and the one look that all of them have.

Backgrounds are transparent, and two colours are roles, not colours: `INK` stands for the page's text and `MUTED` for
its softer text. The page puts in the ones of its light or dark theme when it draws.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bigram_circuits.measures.conditions import CONDITIONS, colour_of
from bigram_circuits.measures.plots import SERIES, SHADES, SIGNED_SHADES, SYMBOLS
from bigram_circuits.measures.results import Curves

INK = CONDITIONS["full"].colour
"""The colour that the page replaces by its text's; results draw the full model in it."""
MUTED = "#808080"
"""The colour that the page replaces by its softer text's."""
GRID = "rgba(128,128,128,0.22)"
_NAME = 30  # characters, of a name in a legend or beside a map
_LEGEND_LINE = 19  # pixels
_R_TICKS = (-0.9, -0.5, 0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
_R_MOST = 0.99999  # of r on Fisher's scale, which has no place for 1
_BAR = 24  # pixels, of height for a horizontal bar
_HEIGHT = 340
_WORD = 6  # characters, of a word in a cell


def dressed(figure: Any, height: int | None = None) -> Any:
    """The look of the report: transparent, no title (the page writes it), the legend above, quiet lines."""
    figure.update_layout(
        template="plotly_white", title=None, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": MUTED},
        margin={"l": 8, "r": 8, "t": 36, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "title": None},
        height=height or figure.layout.height or _HEIGHT, bargap=0.3,
    )  # fmt: skip
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(gridcolor=GRID, zerolinecolor="rgba(128,128,128,0.5)", linecolor=GRID, automargin=True, title_font_size=13)
    figure.update_annotations(font={"size": 13, "color": MUTED})
    if figure.layout.coloraxis.colorscale:
        figure.update_layout(
            coloraxis={"colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"font": {"size": 13}}}}
        )
        figure.update_xaxes(showgrid=False)
        figure.update_yaxes(showgrid=False)
    return figure


def training(history: Sequence[Mapping[str, Any]]) -> Any:
    """Cross-entropy, share kept and share undecided by step, under each other; a line for every attempt."""
    from plotly.subplots import make_subplots

    panels = {
        "cross-entropy (nats)": "cross_entropy",
        "share kept": "fraction",
        "undecided, of all gates": "undecided",
    }
    figure = make_subplots(
        rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.09, subplot_titles=list(panels)
    )
    attempts = sorted({int(record.get("attempt", 0)) for record in history})
    for row, key in enumerate(panels.values(), start=1):
        for attempt in attempts:
            of = [record for record in history if record.get("attempt", 0) == attempt]
            colour = CONDITIONS["subnetwork" if attempt == attempts[-1] else "random"].colour
            figure.add_scatter(
                x=[record.get("step") for record in of], y=[record.get(key) for record in of], mode="lines",
                line={"color": colour, "width": 2}, name=f"attempt {attempt}", legendgroup=str(attempt),
                showlegend=row == 1 and len(attempts) > 1, row=row, col=1,
            )  # fmt: skip
        if key != "cross_entropy":
            figure.update_yaxes(tickformat="~%", rangemode="tozero", row=row, col=1)
    figure.update_annotations(x=0, xanchor="left")
    figure.update_xaxes(title="step", row=len(panels), col=1)
    return dressed(figure, 560)


def controls(rows: Sequence[tuple[str, float | None, float | None, float | None]]) -> Any:
    """Dots with intervals: (name, value, low, high); the first row is on top."""
    import plotly.graph_objects as go

    known = [row for row in rows if row[1] is not None]
    figure = go.Figure()
    for name, value, low, high in known:
        assert value is not None
        bars = {} if low is None or high is None else _error([value], [low], [high], "x")
        figure.add_scatter(
            x=[value], y=[name], mode="markers", marker={"size": 11, "color": colour_of(name) or MUTED},
            showlegend=False, name=name, **bars,
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(title="r with the target's surprisals")
    dressed(figure, 90 + 32 * len(known))
    return figure.update_layout(margin_t=8)


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], row_axis: str, unit: str
) -> Any:
    """One matrix with its shares written into the cells."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_heatmap(
        z=values, x=list(columns), y=list(rows), coloraxis="coloraxis",
        text=[[f"{x:.2%}" for x in row] for row in values], texttemplate="%{text}",
        hovertemplate=f"{row_axis} %{{y}}, %{{x}}: %{{text}}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(coloraxis={"colorscale": SHADES, "colorbar": {"title": unit, "tickformat": "~%"}})
    figure.update_xaxes(type="category", side="top")
    figure.update_yaxes(type="category", title=row_axis)
    return dressed(figure, 110 + 34 * len(rows))


def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    unit: str,
    intervals: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Any:
    """Horizontal bars, the first name on top, a colour for every series."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, values in series.items():
        low, high = (intervals or {}).get(name, ([], []))
        error = _error(values, low, high, "x") if len(low) and not np.isnan(np.asarray(low, dtype=float)).all() else {}
        colour = colour_of(name) or CONDITIONS["subnetwork"].colour
        figure.add_bar(
            y=[html.escape(one, quote=False) for one in names], x=list(values), name=name, orientation="h",
            marker={"color": colour}, showlegend=len(series) > 1, **error,
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(title=unit)
    dressed(figure, 100 + (_BAR - 13 + 13 * len(series)) * len(names))
    return figure.update_layout(margin_t=36 if len(series) > 1 else 8)


def shorten_words(figure: Any) -> None:
    """Cut the words in the cells of a map so that they stay in them; all of a word shows when pointed at."""
    for trace in figure.data:
        if trace.text is not None:
            trace.text = [[_short(html.unescape(word)) for word in row] for row in trace.text]
    figure.update_traces(textfont_size=10)


def without_first_row(figure: Any) -> None:
    """Colours by the range of all rows but the first: the embedding's own would leave none for the others."""
    values = np.concatenate([np.asarray(trace.z, dtype=float)[1:].ravel() for trace in figure.data])
    most = float(np.nanmax(np.abs(values), initial=0))
    if figure.layout.coloraxis.cmid == 0 and most > 0:
        figure.update_layout(coloraxis={"cmin": -most, "cmax": most, "cmid": None})


def _short(word: str) -> str:
    return html.escape(word if len(word) <= _WORD else f"{word[: _WORD - 1]}…", quote=False)


def with_baseline(curves: Curves, quantity: str) -> Any:
    """A quantity's lines, and dashed those of its `_baseline`."""
    figure = curves.plot(quantity)
    shown = {trace.name: trace.line.color for trace in figure.data if trace.name}
    for condition in curves.conditions:
        figure.add_scatter(
            x=list(curves.points), y=curves.get(f"{quantity}_baseline", condition), mode="lines", showlegend=False,
            name=f"{condition}, other positions", legendgroup=condition, opacity=0.7,
            line={"color": shown.get(condition, MUTED), "width": 1.5, "dash": "dash"},
        )  # fmt: skip
    return dressed(figure)


def _error(values: Sequence[float], low: Sequence[float], high: Sequence[float], axis: str) -> dict[str, Any]:
    middle = np.asarray(values, dtype=float)
    ends = {"array": np.asarray(high, dtype=float) - middle, "arrayminus": middle - np.asarray(low, dtype=float)}
    return {f"error_{axis}": {"type": "data", "symmetric": False, "color": MUTED, "thickness": 1.5, **ends}}


# --- several subnetworks ---


@dataclass(frozen=True)
class Points:
    """A number of every subnetwork, to be drawn against the share it keeps."""

    title: str
    """Of the axis."""
    values: Sequence[float | int | None]
    """None where it is not known."""
    low: Sequence[float | int | None]
    """Lower ends of intervals."""
    high: Sequence[float | int | None]
    """Upper ends."""
    random: Sequence[float | int | None]
    """Of as many weights drawn at random."""
    whole: Sequence[float | int] = ()
    """Of the whole model: a level for each task."""
    fronts: Sequence[Sequence[int]] = ()
    """Places of those that are not dominated, for each task: joined by a line."""
    is_r: bool = False
    """A correlation: drawn on Fisher's scale. Others are drawn on a log scale if they are above 0."""


@dataclass(frozen=True)
class Line:
    """A number of one subnetwork by layer."""

    name: str
    """Of the subnetwork."""
    place: int | None
    """Which one it is; None for the whole model."""
    x: Sequence[str]
    """Layers."""
    y: Sequence[float | int] = field(repr=False)
    """Numbers."""


def pareto(names: Sequence[str], fractions: Sequence[float | int], panels: Sequence[Points]) -> Any:
    """Numbers against the share kept, under each other: a mark for each, the best joined by a line."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    seen: set[str] = set()
    for row, panel in enumerate(panels, start=1):
        scale, ticks = _scale(panel)
        at: dict[str, Any] = {"row": row, "col": 1}
        shown = [x for x, value in zip(fractions, panel.values, strict=True) if x > 0 and value is not None]
        for level in panel.whole if shown else ():
            figure.add_scatter(
                x=_widened(shown), y=[scale(level)] * 2, mode="lines", name="whole model", hoverinfo="name",
                line={"color": INK, "width": 1.5, "dash": "dash"}, **_legend("whole model", seen), **at,
            )  # fmt: skip
        for front in panel.fronts:
            figure.add_scatter(
                x=[fractions[place] for place in front], y=[scale(panel.values[place]) for place in front],
                mode="lines", name="not dominated", hoverinfo="skip", line={"color": MUTED, "width": 1.5},
                **_legend("not dominated", seen), **at,
            )  # fmt: skip
        for place, (fraction, chance) in enumerate(zip(fractions, panel.random, strict=True)):
            if fraction > 0 and chance is not None:
                look = {"size": 9, "color": MUTED, "symbol": f"{_symbol(place)}-open"}
                what = _legend("random weights, as many", seen) | {"name": "random weights, as many"}
                figure.add_scatter(**_dot(fraction, chance, scale), marker=look, **what, **at)
        for place, (name, fraction, value) in enumerate(zip(names, fractions, panel.values, strict=True)):
            if fraction > 0 and value is not None:
                look = {"size": 11, "color": _series(place), "symbol": _symbol(place)}
                low, high = panel.low[place], panel.high[place]
                bars = {}
                if low is not None and high is not None:
                    bars = _error([scale(value)], [scale(low)], [scale(high)], "y")
                what = _legend(str(place), seen) | {"name": _named(name)}
                figure.add_scatter(**_dot(fraction, value, scale), marker=look, **what, **bars, **at)
        figure.update_yaxes(title=panel.title, zeroline=False, **ticks, **at)
    ticks = _log_ticks([fraction for fraction in fractions if fraction > 0])
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{100 * tick:g}%" for tick in ticks], zeroline=False)
    figure.update_xaxes(title="share of the weights kept (log scale)", row=len(panels), col=1)
    return dressed(figure, 90 + 270 * len(panels) + _legend_height([*names, "whole model", "not dominated", "random"]))


def lines(panels: Mapping[str, Sequence[Line]], axis: str, tickformat: str | None = None) -> Any:
    """Lines by layer, panels by title under each other; the whole model dashed."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.08)
    seen: set[str] = set()
    for row, (title, drawn) in enumerate(panels.items(), start=1):
        for line in drawn:
            marker, style = {}, {"color": INK, "dash": "dash", "width": 1.5}
            if line.place is not None:
                marker, style = {"symbol": _symbol(line.place), "size": 8}, {"color": _series(line.place), "width": 2}
            figure.add_scatter(
                x=list(line.x), y=list(line.y), mode="lines+markers" if marker else "lines", line=style, marker=marker,
                name=_named(line.name), **_legend(str(line.place), seen), row=row, col=1,
            )  # fmt: skip
        range_mode = "tozero" if tickformat else "normal"
        figure.update_yaxes(title=title, tickformat=tickformat, rangemode=range_mode, row=row, col=1)
    figure.update_xaxes(type="category")
    figure.update_xaxes(title=axis, row=len(panels), col=1)
    names = dict.fromkeys(line.name for drawn in panels.values() for line in drawn)
    return dressed(figure, 60 + 220 * max(len(panels), 1) + _legend_height(list(names)))


def pair_maps(names: Sequence[str], panels: Mapping[str, Any], unit: str) -> Any:
    """A square map for each panel on one colour scale, shares written into the cells; up to six names side by side."""
    from plotly.subplots import make_subplots

    beside = len(names) <= _BESIDE
    rows, columns = (1, len(panels)) if beside else (len(panels), 1)
    figure = make_subplots(
        rows=rows, cols=columns, shared_yaxes=beside, subplot_titles=list(panels), horizontal_spacing=0.04,
        vertical_spacing=0.12,
    )  # fmt: skip
    places = list(range(len(names)))
    for place, values in enumerate(panels.values()):
        at = {"row": 1, "col": place + 1} if beside else {"row": place + 1, "col": 1}
        text = [["" if math.isnan(value) else f"{value:.1%}" for value in row] for row in values]
        figure.add_heatmap(
            z=[[None if math.isnan(value) else float(value) for value in row] for row in values], x=places, y=places,
            coloraxis="coloraxis", text=text, texttemplate="%{text}", hovertemplate="%{text}<extra></extra>",
            xgap=1, ygap=1, **at,
        )  # fmt: skip
    labels = {"tickmode": "array", "tickvals": places, "ticktext": [_named(name, 20) for name in names]}
    figure.update_xaxes(**labels, tickangle=-35 if len(names) > 3 else 0, constrain="domain")
    figure.update_yaxes(**labels, autorange="reversed")
    figure.update_layout(
        coloraxis={"colorscale": SHADES, "cmin": 0, "colorbar": {"title": unit, "tickformat": "~%"} | _SHORT_BAR}
    )
    height = 46 * len(names) + 60
    return _plain_map(dressed(figure, 90 + (height if beside else height * len(panels))))


def ratio_map(rows: Sequence[str], columns: Sequence[str], ratios: Any) -> Any:
    """How many times chance, in colours of its log2; empty where undefined or 0."""
    import plotly.graph_objects as go

    figure = go.Figure()
    known = [[ratio if ratio > 0 else math.nan for ratio in row] for row in ratios]
    figure.add_heatmap(
        z=[[None if math.isnan(ratio) else math.log2(ratio) for ratio in row] for row in known],
        x=list(columns), y=list(range(len(rows))), coloraxis="coloraxis", xgap=1, ygap=1,
        text=[["" if math.isnan(ratio) else times(ratio) for ratio in row] for row in known],
        texttemplate="%{text}", hovertemplate="%{x}: %{text}<extra></extra>",
    )  # fmt: skip
    most = max((abs(math.log2(x)) for row in known for x in row if not math.isnan(x)), default=1.0)
    step = max(1, round(most / 3))
    powers = [step * count for count in range(-int(most // step), int(most // step) + 1)]
    labels = [times(2**power) if power >= 0 else f"1/{times(2**-power)}" for power in powers]
    bar = {"title": "times chance", "tickvals": powers, "ticktext": labels} | _SHORT_BAR
    figure.update_layout(coloraxis={"colorscale": SIGNED_SHADES, "cmin": -most, "cmax": most, "colorbar": bar})
    figure.update_xaxes(type="category", side="top")
    figure.update_yaxes(
        tickmode="array", tickvals=list(range(len(rows))), ticktext=[_named(row, 44) for row in rows],
        autorange="reversed",
    )  # fmt: skip
    return _plain_map(dressed(figure, max(260, 110 + 30 * len(rows))))


def times(ratio: float | int) -> str:
    """A ratio with about two digits."""
    number = f"{ratio:,.0f}" if ratio >= 10 or ratio == int(ratio) else f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"
    return f"{number}×"  # noqa: RUF001


def _plain_map(figure: Any) -> Any:
    """Without lines where cells are empty."""
    figure.update_xaxes(zeroline=False)
    return figure.update_yaxes(zeroline=False)


_SHORT_BAR = {"len": 220, "lenmode": "pixels", "y": 1, "yanchor": "top"}
_BESIDE = 6  # names; maps of more stand above each other


def _dot(fraction: float | int, value: float | int, scale: Any) -> dict[str, Any]:
    return {
        "x": [fraction],
        "y": [scale(value)],
        "mode": "markers",
        "customdata": [[f"{fraction:.2%}", value]],
        "hovertemplate": "%{customdata[0]} kept: %{customdata[1]:.3f}<extra>%{fullData.name}</extra>",
    }


def _series(place: int) -> str:
    return SERIES[place % len(SERIES)]


def _symbol(place: int) -> str:
    return SYMBOLS[(place + place // len(SYMBOLS)) % len(SYMBOLS)]


def _named(name: str, most: int = _NAME) -> str:
    """A name as plotly shows it as it is; of a long one, both ends."""
    end = 2 * most // 3
    short = name if len(name) <= most else f"{name[: most - end - 1]}…{name[-end:]}"
    return html.escape(short, quote=False)


def _legend(key: str, seen: set[str]) -> dict[str, Any]:
    """One entry in the legend for what is drawn in several panels."""
    first = key not in seen
    seen.add(key)
    return {"legendgroup": key, "showlegend": first}


def _legend_height(names: Sequence[str]) -> int:
    """About what a legend takes on a narrow screen."""
    per_line = max(1, 40 // max((min(len(name), _NAME) + 6 for name in names), default=40))
    return _LEGEND_LINE * math.ceil(len(names) / per_line)


def _scale(panel: Points) -> tuple[Any, dict[str, Any]]:
    """What takes a number to its height, and the ticks of the axis."""
    known = [value for value in (*panel.values, *panel.random, *panel.whole) if value is not None]
    if panel.is_r:
        ticks = {"tickvals": [math.atanh(tick) for tick in _R_TICKS], "ticktext": [f"{tick:g}" for tick in _R_TICKS]}
        return (lambda r: math.atanh(min(max(r, -_R_MOST), _R_MOST))), ticks
    if known and min(known) > 0:
        ticks = _log_ticks(known)
        return (lambda x: x), {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return (lambda x: x), {"rangemode": "tozero"}


def _log_ticks(values: Sequence[float | int]) -> list[float | int]:
    """1, 2, 5, 10 ... around the values; only powers of ten where these are many."""
    if not values:
        return []
    first, last = math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1
    factors = (1, 2, 5) if last - first <= 5 else (1,)
    return [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]


def _widened(fractions: Sequence[float | int]) -> list[float | int]:
    return [min(fractions) / 1.25, min(1.0, max(fractions) * 1.25)]
