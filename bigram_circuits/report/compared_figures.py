"""Charts of several subnetworks: each has one colour and one symbol in all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bigram_circuits.experiments.comparison import numbered
from bigram_circuits.measures.conditions import condition_of, label_of
from bigram_circuits.measures.plots import (
    IN_CELL,
    LIGHT_SHADES,
    SERIES,
    SIGNED_LIGHT_SHADES,
    SYMBOLS,
    axis_points,
    plain,
    told,
)
from bigram_circuits.report.figures import INK, MUTED, dressed, error_bars

_NAME = 30  # characters, of a name in a legend or beside a map
_MOST_MARKS = 24  # subnetworks with a mark, an error bar and a legend entry each
_LEGEND_LINE = 19  # pixels
_R_TICKS = (-0.9, -0.5, 0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
_R_MOST = 0.99999  # of r on Fisher's scale, which has no place for 1


@dataclass(frozen=True)
class Points:
    """One quantity of every subnetwork, to be drawn against the share of weights kept."""

    title: str
    """The title of the axis."""
    values: Sequence[float | int | None]
    """By subnetwork; None where unknown."""
    low: Sequence[float | int | None]
    """Lower ends of intervals."""
    high: Sequence[float | int | None]
    """Upper ends."""
    random: Sequence[float | int | None]
    """Of matched random weights."""
    whole: Sequence[float | int] = ()
    """Of the full model: one level per task."""
    fronts: Sequence[Sequence[int]] = ()
    """For each task, the indices of the subnetworks on the Pareto front."""
    is_r: bool = False
    """Whether it is a correlation, drawn on Fisher's z scale; other quantities get a log scale if all are positive."""


@dataclass(frozen=True)
class Line:
    """One quantity of one subnetwork, by layer."""

    name: str
    """The subnetwork's name."""
    place: int | None
    """The subnetwork's index; None for the full model."""
    x: Sequence[str]
    """The layers."""
    y: Sequence[float | int] = field(repr=False)
    """The values."""


def pareto(
    names: Sequence[str], fractions: Sequence[float | int], panels: Sequence[Points], noun: str = "subnetwork"
) -> Any:
    """Quantities against the share kept, one panel each: a mark per subnetwork or circuit, a line for the front."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    seen: set[str] = set()
    short = short_names(names)
    for row, panel in enumerate(panels, start=1):
        scale, ticks = _scale(panel)
        at: dict[str, Any] = {"row": row, "col": 1}
        shown = [x for x, value in zip(fractions, panel.values, strict=True) if x > 0 and value is not None]
        for level in panel.whole if shown else ():
            figure.add_scatter(
                x=_widened(shown), y=[scale(level)] * 2, mode="lines", name="full model", hoverinfo="name",
                line={"color": INK, "width": 1.5, "dash": "dash"}, **_legend("full model", seen), **at,
            )  # fmt: skip
        for front in panel.fronts:
            figure.add_scatter(
                x=[fractions[place] for place in front], y=[scale(panel.values[place]) for place in front],
                mode="lines", name="Pareto front", hoverinfo="skip", line={"color": MUTED, "width": 1.5},
                **_legend("Pareto front", seen), **at,
            )  # fmt: skip
        if len(names) > _MOST_MARKS:
            _add_cloud(figure, short, fractions, panel, scale, seen, at, noun)
        else:
            _add_marks(figure, short, fractions, panel, scale, seen, at, noun)
        figure.update_yaxes(title=plain(panel.title), zeroline=False, **ticks, **at)
    ticks = _log_ticks([fraction for fraction in fractions if fraction > 0])
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{100 * tick:.6g}%" for tick in ticks], zeroline=False)
    figure.update_xaxes(
        title=f"share of {'weights' if noun == 'subnetwork' else 'nodes'} kept (log scale)", row=len(panels), col=1
    )
    told = names if len(names) <= _MOST_MARKS else []
    return dressed(figure, 90 + 270 * len(panels) + _legend_height([*told, "full model", "Pareto front", "random"]))


def _add_marks(
    figure: Any, names: Sequence[str], fractions: Sequence[float | int], panel: Points, scale: Any, seen: set[str],
    at: Mapping[str, Any], noun: str,
) -> None:  # fmt: skip
    """Add a mark with error bars for every subnetwork, each in its colour, and hollow ones for random weights."""
    random = label_of(condition_of("random", noun))
    for place, (fraction, chance) in enumerate(zip(fractions, panel.random, strict=True)):
        if fraction > 0 and chance is not None:
            look = {"size": 9, "color": MUTED, "symbol": f"{_symbol(place)}-open"}
            what = _legend(random, seen) | {"name": random}
            figure.add_scatter(**_dot(fraction, chance, scale), marker=look, **what, **at)
    for place, (name, fraction, value) in enumerate(zip(names, fractions, panel.values, strict=True)):
        if fraction > 0 and value is not None:
            look = {"size": 11, "color": _series(place), "symbol": _symbol(place)}
            low, high = panel.low[place], panel.high[place]
            bars = {}
            if low is not None and high is not None:
                bars = error_bars([scale(value)], [scale(low)], [scale(high)], "y")
            what = _legend(str(place), seen) | {"name": name}
            figure.add_scatter(**_dot(fraction, value, scale), marker=look, **what, **bars, **at)


def _add_cloud(
    figure: Any, names: Sequence[str], fractions: Sequence[float | int], panel: Points, scale: Any, seen: set[str],
    at: Mapping[str, Any], noun: str,
) -> None:  # fmt: skip
    """Add the marks of many subnetworks in one colour, without error bars; their names show on hover."""
    clouds = {
        label_of(condition_of("random", noun)): (panel.random, {"size": 6, "color": MUTED, "symbol": "circle-open"}),
        f"{noun}s": (panel.values, {"size": 6, "color": SERIES[0]}),
    }
    for what, (values, look) in clouds.items():
        known = [
            (name, fraction, value)
            for name, fraction, value in zip(names, fractions, values, strict=True)
            if fraction > 0 and value is not None
        ]
        figure.add_scatter(
            x=[fraction for _, fraction, _ in known], y=[scale(value) for *_, value in known], mode="markers",
            marker=look, customdata=[[name, f"{fraction:.2%}", value] for name, fraction, value in known], name=what,
            hovertemplate="%{customdata[0]}: %{customdata[1]} kept: %{customdata[2]:.3f}<extra></extra>",
            **_legend(what, seen), **at,
        )  # fmt: skip


def lines(panels: Mapping[str, Sequence[Line]], axis: str, tickformat: str | None = None) -> Any:
    """Lines by layer, one panel per title; the full model is dashed."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.08)
    seen: set[str] = set()
    names = list(dict.fromkeys(line.name for drawn in panels.values() for line in drawn))
    short = dict(zip(names, short_names(names), strict=True))
    digits = ".3~p" if tickformat else ".3f"
    for row, (title, drawn) in enumerate(panels.items(), start=1):
        for line in drawn:
            marker, style = {}, {"color": INK, "dash": "dash", "width": 1.5}
            if line.place is not None:
                marker, style = {"symbol": _symbol(line.place), "size": 8}, {"color": _series(line.place), "width": 2}
            figure.add_scatter(
                x=axis_points(line.x), y=list(line.y), mode="lines+markers" if marker else "lines", line=style,
                marker=marker, name=short[line.name], **_legend(str(line.place), seen), row=row, col=1,
                hovertemplate=told(f"{plain(axis)} %{{x}}", f"{plain(title)} %{{y:{digits}}}", name=short[line.name]),
            )  # fmt: skip
        range_mode = "tozero" if tickformat else "normal"
        figure.update_yaxes(title=plain(title), tickformat=tickformat, rangemode=range_mode, row=row, col=1)
    figure.update_xaxes(type="category")
    figure.update_xaxes(title=plain(axis), row=len(panels), col=1)
    return dressed(figure, 60 + 220 * max(len(panels), 1) + _legend_height(names))


def pair_maps(names: Sequence[str], panels: Mapping[str, Any], unit: str) -> Any:
    """Square maps on one colour scale, with shares written into the cells; side by side for up to six names."""
    from plotly.subplots import make_subplots

    beside = len(names) <= _BESIDE
    rows, columns = (1, len(panels)) if beside else (len(panels), 1)
    figure = make_subplots(
        rows=rows, cols=columns, shared_yaxes=beside, subplot_titles=[plain(title) for title in panels],
        horizontal_spacing=0.04, vertical_spacing=0.12,
    )  # fmt: skip
    places = list(range(len(names)))
    for place, values in enumerate(panels.values()):
        at = {"row": 1, "col": place + 1} if beside else {"row": place + 1, "col": 1}
        text = [["" if math.isnan(value) else f"{value:.1%}" for value in row] for row in values]
        figure.add_heatmap(
            z=[[None if math.isnan(value) else float(value) for value in row] for row in values], x=places, y=places,
            coloraxis="coloraxis", text=text, texttemplate="%{text}", hovertemplate="%{text}<extra></extra>",
            textfont={"color": IN_CELL},
            xgap=1, ygap=1, **at,
        )  # fmt: skip
    labels = {"tickmode": "array", "tickvals": places, "ticktext": short_names(names, 20)}
    figure.update_xaxes(**labels, tickangle=-35 if len(names) > 3 else 0, constrain="domain")
    figure.update_yaxes(**labels, autorange="reversed")
    figure.update_layout(
        coloraxis={
            "colorscale": LIGHT_SHADES,
            "cmin": 0,
            "colorbar": {"title": plain(unit), "tickformat": "~%"} | _SHORT_BAR,
        }
    )
    height = 46 * len(names) + 60
    return _plain_map(dressed(figure, 90 + (height if beside else height * len(panels))))


def ratio_map(rows: Sequence[str], columns: Sequence[str], ratios: Any) -> Any:
    """Overlaps in times chance, coloured by log2; empty where undefined or 0."""
    import plotly.graph_objects as go

    figure = go.Figure()
    known = [[ratio if ratio > 0 else math.nan for ratio in row] for row in ratios]
    figure.add_heatmap(
        z=[[None if math.isnan(ratio) else math.log2(ratio) for ratio in row] for row in known],
        x=[plain(column) for column in columns], y=list(range(len(rows))), coloraxis="coloraxis", xgap=1, ygap=1,
        textfont={"color": IN_CELL},
        text=[["" if math.isnan(ratio) else times(ratio) for ratio in row] for row in known],
        texttemplate="%{text}", hovertemplate="%{x}: %{text}<extra></extra>",
    )  # fmt: skip
    most = max((abs(math.log2(x)) for row in known for x in row if not math.isnan(x)), default=1.0)
    step = max(1, round(most / 3))
    powers = [step * count for count in range(-int(most // step), int(most // step) + 1)]
    labels = [times(2**power) if power >= 0 else f"1/{times(2**-power)}" for power in powers]
    bar = {"title": "times chance", "tickvals": powers, "ticktext": labels} | _SHORT_BAR
    figure.update_layout(coloraxis={"colorscale": SIGNED_LIGHT_SHADES, "cmin": -most, "cmax": most, "colorbar": bar})
    figure.update_xaxes(type="category", side="top")
    figure.update_yaxes(
        tickmode="array", tickvals=list(range(len(rows))), ticktext=short_names(rows, 44),
        autorange="reversed",
    )  # fmt: skip
    return _plain_map(dressed(figure, max(260, 110 + 30 * len(rows))))


def times(ratio: float | int) -> str:
    """A ratio with about two digits."""
    number = f"{ratio:,.0f}" if ratio >= 10 or ratio == int(ratio) else f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"
    return f"{number}×"  # noqa: RUF001


def _plain_map(figure: Any) -> Any:
    """Remove the zero lines that would show through empty cells."""
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


def short_names(names: Sequence[str], most: int = _NAME) -> list[str]:
    """Distinct names for plotly, escaped; a long one is cut in the middle."""
    end = 2 * most // 3
    cut = [name if len(name) <= most else f"{name[: most - end - 1]}…{name[-end:]}" for name in names]
    return [plain(name) for name in numbered(cut)]


def _legend(key: str, seen: set[str]) -> dict[str, Any]:
    """One legend entry for what is drawn in several panels."""
    first = key not in seen
    seen.add(key)
    return {"legendgroup": key, "showlegend": first}


def _legend_height(names: Sequence[str]) -> int:
    """The approximate height of a legend on a narrow screen, in pixels."""
    per_line = max(1, 40 // max((min(len(name), _NAME) + 6 for name in names), default=40))
    return _LEGEND_LINE * math.ceil(len(names) / per_line)


def _scale(panel: Points) -> tuple[Any, dict[str, Any]]:
    """The function from a value to its position, and the axis settings that go with it."""
    known = [value for value in (*panel.values, *panel.random, *panel.whole) if value is not None]
    if panel.is_r:
        shown = [tick for tick in _R_TICKS if known and min(known) <= tick <= max(known)]
        shown = shown if len(shown) > 1 else [tick for tick in _even_ticks(known) if abs(tick) < 1]
        ticks = {"tickvals": [math.atanh(tick) for tick in shown], "ticktext": [f"{tick:.6g}" for tick in shown]}
        return (lambda r: math.atanh(min(max(r, -_R_MOST), _R_MOST))), ticks
    if known and min(known) > 0:
        ticks = _log_ticks(known)
        return (lambda x: x), {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.6g}" for tick in ticks]}
    return (lambda x: x), {"rangemode": "tozero"}


def _log_ticks(values: Sequence[float | int]) -> list[float | int]:
    """Ticks at 1, 2, 5, 10 ... among the values; powers of ten over a wide range, even steps over a narrow one."""
    if not values:
        return []
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    inside = [tick for tick in ticks if min(values) <= tick <= max(values)]
    return inside if len(inside) > 1 else _even_ticks(values)


def _even_ticks(values: Sequence[float | int]) -> list[float | int]:
    """Round numbers in even steps, two or more among or around the values."""
    if not values:
        return []
    low, high = float(min(values)), float(max(values))
    if low == high:
        low, high = low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0)
    width = high - low
    power = 10.0 ** math.floor(math.log10(width / 2))
    step = next(factor * power for factor in (5, 2, 1) if factor * power <= width / 2)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{step * count:.9g}") for count in range(first, last + 1)]


def _widened(fractions: Sequence[float | int]) -> list[float | int]:
    return [min(fractions) / 1.25, min(1.0, max(fractions) * 1.25)]
