"""Results of analyses: frozen arrays with named axes that can be tabulated, plotted, and saved as JSON.

There are three kinds. `Curves`: quantities along an axis (layer, size, checkpoint), one line per condition. `Maps`:
one matrix per condition (layer by position, layer by layer). `Effects`: a list of items (ablations, heads, components),
with numbers for each. A condition is the set of weights that the model was run with: `full`, `subnetwork`,
`complement`, `random`. All results survive a round trip through JSON, so a report can be made without a model.
"""

from __future__ import annotations

import json
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from bigram_circuits.measures import html, plots, statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.storage.files import write_text
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import read_record, sealed, shown
from bigram_circuits.storage.typed import from_json

_FORMAT = "bigram_circuits.result/1"
_NUMBERS = ("values", "low", "high")
_ROWS_SHOWN = 12  # in a notebook
_COLUMNS_SHOWN = 12
_COUNTED = ("weights", "nodes", "edges", "tokens")


@dataclass(frozen=True)
class Result(ABC):
    """The base class of all results.

    Example:
        >>> lens = bc.logit_lens(model, text="import os")
        >>> lens.save("lens.json")
        >>> bc.load_result("lens.json").to_dataframe()
    """

    title: str
    """What was measured, in a few words."""
    quantities: tuple[Quantity, ...]
    """The quantities measured, along the first axis of the values."""
    notes: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """How they were measured: number of tokens, seeds, settings, as JSON values."""

    kinds: ClassVar[dict[str, type[Result]]] = {}
    axes: ClassVar[tuple[str, ...]]
    """The fields that name the axes of the values."""

    def __init_subclass__(cls) -> None:
        Result.kinds[cls.__name__] = cls

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in ("axes", "kinds")]

    def quantity(self, name: str) -> Quantity:
        """Look up a quantity by name. Raises ValueError if it was not measured."""
        return self.quantities[_place("quantity", name, [quantity.name for quantity in self.quantities])]

    @abstractmethod
    def to_dataframe(self) -> Any:
        """Convert to a pandas DataFrame."""

    def plot(self, quantity: str | None = None) -> Any:
        """Draw one quantity, by default the first, as a plotly figure.

        `Curves` become lines with their intervals as bands, `Maps` heat maps on one colour scale (if there is text, a
        cell shows its first line, and all lines on hover), `Effects` bars with their intervals.
        """
        chosen = self.quantities[0] if quantity is None else self.quantity(quantity)
        return self._plot(chosen, f"{self.title}: {chosen.words}")

    @abstractmethod
    def _plot(self, chosen: Quantity, title: str) -> Any:
        """The figure of a quantity."""

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values; undefined numbers become None."""
        values = {one.name: _to_json(getattr(self, one.name)) for one in fields(self)}
        return {"format": _FORMAT, "kind": type(self).__name__, **values}

    def save(self, path: str | os.PathLike[str], of: Origin | None = None) -> None:
        """Write the result as a JSON file with a checksum, which says what it is of if that is given."""
        record = self.to_json() | ({} if of is None else {"of": of.to_json()})
        write_text(Path(path), json.dumps(sealed(record)) + "\n")

    @abstractmethod
    def _shown(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        """Return columns and rows of the table that a notebook shows; the caller shortens long tables."""

    def _sorted_by(self) -> str:
        """How the rows of that table are sorted, if not as they were measured: a sentence and a space, or nothing."""
        return ""

    def _repr_html_(self) -> str:
        """Build the notebook view: the title, the first quantity as a compact table, and where to find the rest."""
        columns, rows = self._shown()
        first, *others = self.quantities
        says = [f"{first.label}: {first.meaning.rstrip('.')}."]
        others = [one.name for one in others if one.name not in columns]
        more = f"Also measured: {', '.join(others)}. " if others else ""
        table = html.table(columns, html.shortened(rows, _ROWS_SHOWN), self.title)
        end = html.small([f"{self._sorted_by()}{more}All numbers: to_dataframe(); a picture: plot()."])
        return html.summary(self.title, says, table, end)

    def __str__(self) -> str:
        return f"{self.title}\n{self.to_dataframe().to_string(index=False, float_format=lambda x: f'{x:.3f}')}"


@dataclass(frozen=True)
class Curves(Result):
    """Quantities along an axis, one line per condition.

    Example:
        >>> lens = bc.logit_lens(model, found, target, text)
        >>> lens.get("kl", "subnetwork")  # an array with a number for each layer
        >>> lens.only("full", "subnetwork").plot("kl")
    """

    axes = ("quantities", "conditions", "points")

    axis: str
    """What the points are: `layer`, `fraction`, `checkpoint`."""
    points: tuple[str | float | int, ...]
    """The points, as names or numbers."""
    conditions: tuple[str, ...]
    """The condition of each line."""
    values: Float[np.ndarray, "quantity condition point"]
    """The numbers; nan where undefined."""
    low: Float[np.ndarray, "quantity condition point"]
    """Lower end of a 95% interval; nan where there is none."""
    high: Float[np.ndarray, "quantity condition point"]
    """Upper end."""

    def get(self, quantity: str, condition: str = "full") -> Float[np.ndarray, " point"]:
        """Return the values of one line."""
        return self.values[self._at(quantity, condition)]

    def interval(self, quantity: str, condition: str = "full") -> Float[np.ndarray, "low_high point"]:
        """Return the 95% interval of a line, as lower and upper ends."""
        at = self._at(quantity, condition)
        return np.stack([self.low[at], self.high[at]])

    def only(self, *conditions: str) -> Curves:
        """Select some of the lines, in this order."""
        places = [_place("condition", name, self.conditions) for name in conditions]
        parts = {name: getattr(self, name)[:, places] for name in ("values", "low", "high")}
        return replace(self, conditions=conditions, **parts)

    def _at(self, quantity: str, condition: str) -> tuple[int, int]:
        names = [one.name for one in self.quantities]
        return _place("quantity", quantity, names), _place("condition", condition, self.conditions)

    def _plot(self, chosen: Quantity, title: str) -> Any:
        series = {name: (self.get(chosen.name, name), *self.interval(chosen.name, name)) for name in self.conditions}
        return plots.lines(self.axis, self.points, series, chosen, title)

    def to_dataframe(self) -> Any:
        """Convert to a DataFrame: a row per condition and point, a column per quantity (`_low`, `_high` if known)."""
        import pandas as pd

        rows = []
        for c, condition in enumerate(self.conditions):
            for p, point in enumerate(self.points):
                row: dict[str, Any] = {"condition": condition, self.axis: point}
                for q, quantity in enumerate(self.quantities):
                    row[quantity.name] = self.values[q, c, p]
                    if not np.isnan(self.low[q]).all():
                        row[f"{quantity.name}_low"], row[f"{quantity.name}_high"] = (
                            self.low[q, c, p],
                            self.high[q, c, p],
                        )
                rows.append(row)
        return pd.DataFrame(rows)

    def table(self, quantity: str) -> str:
        """Format one quantity as a text table: a row per condition, a column per point."""
        widths = [max(8, len(str(point)) + 2) for point in self.points]
        head = f"{self.axis:<14}" + "".join(f"{point!s:>{w}}" for point, w in zip(self.points, widths, strict=True))
        rows = [
            "".join(f"{value:>{w}.3f}" for value, w in zip(self.get(quantity, name), widths, strict=True))
            for name in self.conditions
        ]
        return "\n".join([head, *(f"{name:<14}{row}" for name, row in zip(self.conditions, rows, strict=True))])

    def _shown(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        places = _some(len(self.points))
        rows = [[name, *(float(self.values[0, c, p]) for p in places)] for c, name in enumerate(self.conditions)]
        return [self.axis, *(str(self.points[p]) for p in places)], rows


@dataclass(frozen=True)
class Maps(Result):
    """One matrix per quantity and condition.

    Example:
        >>> lens = bc.logit_lens(model, found, text="import os")
        >>> lens.only("full", "subnetwork").plot()
        >>> lens.get("entropy", "full").shape  # [layer, position]
    """

    axes = ("quantities", "conditions", "rows", "columns")

    row_axis: str
    """What the rows are, for example `layer`."""
    rows: tuple[str, ...]
    """Names of the rows."""
    column_axis: str
    """What the columns are, for example `position`."""
    columns: tuple[str, ...]
    """Names of the columns."""
    conditions: tuple[str, ...]
    """The condition of each panel."""
    values: Float[np.ndarray, "quantity condition row column"]
    """The numbers; nan where undefined."""
    text: tuple[tuple[tuple[str, ...], ...], ...] | None = None
    """Text of every cell, [condition][row][column], with line breaks: for example the most likely tokens."""

    def get(self, quantity: str, condition: str = "full") -> Float[np.ndarray, "row column"]:
        """Return one matrix."""
        names = [one.name for one in self.quantities]
        return self.values[_place("quantity", quantity, names), _place("condition", condition, self.conditions)]

    def only(self, *conditions: str) -> Maps:
        """Select some of the panels, in this order."""
        places = [_place("condition", name, self.conditions) for name in conditions]
        text = None if self.text is None else tuple(self.text[place] for place in places)
        return replace(self, conditions=conditions, values=self.values[:, places], text=text)

    def _plot(self, chosen: Quantity, title: str) -> Any:
        panels = {name: self.get(chosen.name, name) for name in self.conditions}
        axes = (self.row_axis, self.rows), (self.column_axis, self.columns)
        return plots.heat_maps(*axes, panels, self.text, chosen, title)

    def to_dataframe(self) -> Any:
        """Convert to a DataFrame: a row per condition and cell, a column per quantity, and `text` if there is any."""
        import pandas as pd

        table = []
        for c, condition in enumerate(self.conditions):
            for r, row in enumerate(self.rows):
                for k, column in enumerate(self.columns):
                    cell: dict[str, Any] = {"condition": condition, self.row_axis: row, self.column_axis: column}
                    if self.row_axis == self.column_axis:
                        cell = {"condition": condition, f"{self.row_axis}_1": row, f"{self.row_axis}_2": column}
                    cell |= {one.name: self.values[q, c, r, k] for q, one in enumerate(self.quantities)}
                    if self.text is not None:
                        cell["text"] = self.text[c][r][k].replace("\n", " | ")
                    table.append(cell)
        return pd.DataFrame(table)

    def _shown(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        places = _some(len(self.columns))
        several = len(self.conditions) > 1
        rows = [
            [*([condition] if several else []), row, *(self._cell(c, r, p) for p in places)]
            for c, condition in enumerate(self.conditions)
            for r, row in enumerate(self.rows)
        ]
        return [*(["condition"] if several else []), self.row_axis, *(self.columns[p] for p in places)], rows

    def _cell(self, condition: int, row: int, column: int) -> str | float:
        """Return the first line of a cell's text, or its value if there is no text."""
        if self.text is not None:
            return self.text[condition][row][column].split("\n")[0]
        return float(self.values[0, condition, row, column])


@dataclass(frozen=True)
class Effects(Result):
    """A list of items, with numbers for each.

    Example:
        >>> heads = bc.ablate(model, ["L0H0", "L0.mlp"], tokens=text)
        >>> heads.top(1)  # what matters most to the loss
        >>> heads.to_dataframe()
    """

    axes = ("quantities", "names")

    subject: str
    """What the items are, for example `ablation`, `head`, `component`."""
    names: tuple[str, ...]
    """Names of the items."""
    values: Float[np.ndarray, "quantity thing"]
    """The numbers; nan where undefined."""
    low: Float[np.ndarray, "quantity thing"]
    """Lower end of a 95% interval; nan where there is none."""
    high: Float[np.ndarray, "quantity thing"]
    """Upper end."""

    def get(self, quantity: str) -> dict[str, float]:
        """Return one quantity, by item name."""
        at = _place("quantity", quantity, [one.name for one in self.quantities])
        return dict(zip(self.names, self.values[at].tolist(), strict=True))

    def top(self, k: int = 5, quantity: str | None = None) -> list[tuple[str, float]]:
        """Return the k items with the largest values of a quantity, by default the first."""
        numbers = self.get(quantity or self.quantities[0].name)
        known = [item for item in numbers.items() if not math.isnan(item[1])]
        return sorted(known, key=lambda item: -item[1])[:k]

    def _plot(self, chosen: Quantity, title: str) -> Any:
        at = self.quantities.index(chosen)
        series = self.values[at], self.low[at], self.high[at]
        return plots.bars(self.subject, self.names, series, chosen, title)

    def to_dataframe(self) -> Any:
        """Convert to a DataFrame: a row per item, a column per quantity (`_low`, `_high` if known)."""
        import pandas as pd

        columns: dict[str, Any] = {self.subject: list(self.names)}
        for q, quantity in enumerate(self.quantities):
            columns[quantity.name] = _as_counted(quantity, self.values[q])
            if not np.isnan(self.low[q]).all():
                columns[f"{quantity.name}_low"], columns[f"{quantity.name}_high"] = self.low[q], self.high[q]
        return pd.DataFrame(columns)

    def _shown(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        shown = self.quantities[: _COLUMNS_SHOWN // 2]
        sure = not np.isnan(self.low[0]).all()
        order = range(len(self.names))
        if self._sorted_by():
            order = np.argsort(-np.abs(self.values[0]), kind="stable").tolist()  # nan last
        numbers = self.values[: len(shown)].T.tolist()
        rows = [[self.names[t], *numbers[t], *([self._interval(t)] if sure else [])] for t in order]
        ends = [f"95% interval of {shown[0].name}"] if sure else []
        return [self.subject, *(one.name for one in shown), *ends], rows

    def _sorted_by(self) -> str:
        return f"Sorted by the size of {self.quantities[0].words}. " if len(self.names) > _ROWS_SHOWN else ""

    def _interval(self, thing: int) -> str:
        low, high = self.low[0, thing], self.high[0, thing]
        return "" if math.isnan(low) else f"{low:.3f} to {high:.3f}"


@dataclass(frozen=True)
class Scatter(Effects):
    """Items as points: one quantity against the others.

    Example:
        >>> predicted = analysis.predicted_effects(model, found, text, tokens=3)
        >>> predicted.plot()  # what is predicted against what is measured
    """

    against: str = ""
    """The quantity on the vertical axis."""

    def _plot(self, chosen: Quantity, title: str) -> Any:
        other = self.quantity(self.against)
        x, y = (self.values[self.quantities.index(one)] for one in (chosen, other))
        return plots.points(self.names, (x, chosen.label), (y, other.label), title)


Ends = tuple[float, float, float]
"""A number and its 95% interval; nan where there is none."""


def effects_of(
    title: str,
    quantities: tuple[Quantity, ...],
    subject: str,
    rows: Mapping[str, Sequence[Ends]],
    notes: Mapping[str, Any] | None = None,
) -> Effects:
    """A result with a row for each name, of every quantity with its interval."""
    numbers = np.array(list(rows.values()), dtype=float).reshape(len(rows), len(quantities), 3)
    values, low, high = numbers.transpose(2, 1, 0)
    return Effects(title, quantities, subject, tuple(rows), values, low, high, notes=dict(notes or {}))


def curves_from_sums(
    title: str,
    quantities: Sequence[Quantity],
    axis: str,
    points: Sequence[str | float | int],
    sums: Mapping[str, Float[np.ndarray, "sequence point column"]],
    statistic: Callable[[Float[np.ndarray, "... point column"]], Float[np.ndarray, "... quantity point"]],
    notes: Mapping[str, Any],
) -> Curves:
    """Compute curves of a statistic of per-sequence sums, with 95% intervals from a bootstrap over sequences.

    `sums` has a row for every sequence, so no further forward pass is needed; `statistic` takes totals of rows.
    """
    values, low, high = [], [], []
    for rows in sums.values():
        values.append(statistic(rows.sum(0)))
        draws = statistics.bootstrap(rows.reshape(len(rows), -1)).reshape(-1, *rows.shape[1:])
        ends = np.quantile(statistic(draws), [0.025, 0.975], axis=0)
        low.append(ends[0])
        high.append(ends[1])
    stacked = [np.stack(part, axis=1) for part in (values, low, high)]
    return Curves(title, tuple(quantities), axis, tuple(points), tuple(sums), *stacked, notes=notes)


def load_result(path: str | os.PathLike[str]) -> Result:
    """Load a result from its JSON file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a result, has another format version, or is damaged.

    Example:
        >>> bc.logit_lens(model, found, target, text).save("lens.json")
        >>> bc.load_result("lens.json").plot("kl")
    """
    return load_result_and_origin(path)[0]


def load_result_and_origin(path: str | os.PathLike[str], *, follow: bool = True) -> tuple[Result, Origin | None]:
    """Load a result, and what it says it is of; `follow` says whether the file may be a symbolic link.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a result, has another format version, or is damaged.
    """
    complaint = "is not a result that can be read"
    record = read_record(path, complaint, follow=follow)
    try:
        if record.get("format") != _FORMAT:
            raise ValueError(f"its format is {shown(record.get('format'))}, but {_FORMAT!r} is needed")
        of = from_json(Origin | None, record.pop("of", None), "of")
        return result_from_json(record), of
    except ValueError as error:
        raise ValueError(f"{str(path)!r} {complaint}: {error}") from error


def result_from_json(record: Mapping[str, Any]) -> Result:
    """Rebuild a result from the values returned by `to_json`.

    Raises:
        ValueError: If the values do not form a valid result.
    """
    kind = Result.kinds.get(record["kind"]) if isinstance(record.get("kind"), str) else None
    if kind is None:
        raise ValueError(f"its kind is {shown(record.get('kind'))}, not one of {', '.join(Result.kinds)}")
    names = {one.name for one in fields(kind)}
    if set(record) != names | {"format", "kind"}:
        raise ValueError(f"it has a missing or unknown field: {shown(min(set(record) ^ (names | {'format', 'kind'})))}")
    values = {name: _from_json(name, record[name]) for name in names}
    _check_fit(kind, values)
    return kind(**values)


def _check_fit(kind: type[Result], values: Mapping[str, Any]) -> None:
    """Raise ValueError unless the shape of the values matches the names along their axes."""
    shape = tuple(len(values[axis]) for axis in kind.axes)
    for name in _NUMBERS:
        numbers = values.get(name)
        if numbers is not None and numbers.shape != shape:
            raise ValueError(f"its {name} have shape {numbers.shape} but should have {shape}")
    if values.get("text") is not None and not _is_grid(values["text"], shape[1:]):
        raise ValueError(f"its text should be words in lists of {shape[1:]}")
    if not isinstance(values["notes"], dict) or not _are_plain(values["notes"]):
        raise ValueError(f"its notes should be texts and finite numbers with names, not {shown(values['notes'])}")
    if not values["quantities"]:
        raise ValueError("it has no quantities")
    if "against" in values and values["against"] not in [one.name for one in values["quantities"]]:
        raise ValueError(f"it is against {shown(values['against'])}, which is none of its quantities")


def _to_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return _to_json(value.tolist())
    if isinstance(value, Quantity):
        return {"name": value.name, "unit": value.unit, "meaning": value.meaning}
    if isinstance(value, Mapping):
        return {str(key): _to_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _from_json(name: str, value: Any) -> Any:
    if name in _NUMBERS:
        return _numbers(name, value)
    if name == "quantities":
        return tuple(_quantity(one) for one in _list(name, value))
    if name == "notes":
        return value
    if name == "text":
        return None if value is None else _tuples(_list(name, value))
    if name in ("title", "axis", "row_axis", "column_axis", "subject", "against"):
        return _text(name, value)
    if name == "points":
        return tuple(one if _is_finite(one) else _text(name, one) for one in _list(name, value))
    return tuple(_text(name, one) for one in _list(name, value))


def _numbers(name: str, value: Any) -> Float[np.ndarray, "..."]:
    """Read nested lists of numbers into an array; None becomes nan."""
    if not _are_numbers(_list(name, value)):
        raise ValueError(f"its {name} should hold only numbers and nulls")
    try:
        return np.array(value, dtype=float)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"its {name} are not a rectangular array of numbers") from error


def _are_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_are_numbers, value))
    return value is None or type(value) in (int, float)


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _are_plain(value: Any) -> bool:
    """Whether a value consists of texts, finite numbers, booleans and nulls, in lists and by name."""
    if isinstance(value, dict | list):
        return all(map(_are_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | bool) or _is_finite(value)


def _is_grid(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value consists of strings in nested tuples of a given shape."""
    if not shape:
        return isinstance(value, str)
    return isinstance(value, tuple) and len(value) == shape[0] and all(_is_grid(one, shape[1:]) for one in value)


def _quantity(value: Any) -> Quantity:
    if not isinstance(value, dict) or set(value) != {"name", "unit", "meaning"}:
        raise ValueError(f"a quantity has a name, a unit and a meaning, not {shown(value)}")
    return Quantity(**{name: _text(name, one) for name, one in value.items()})


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"its {name} should be a list, not {shown(value)}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"its {name} should be text, not {shown(value)}")
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _place(kind: str, name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise ValueError(f"there is no {kind} {name!r}: there are {', '.join(names)}")
    return list(names).index(name)


def _as_counted(quantity: Quantity, values: Float[np.ndarray, "..."]) -> np.ndarray:
    """Numbers for a table: those of what is counted as whole numbers, if they are."""
    is_whole = bool(np.isfinite(values).all() and (values == values.round()).all())
    return values.astype(int) if is_whole and quantity.unit in _COUNTED else values


def _some(n: int) -> list[int]:
    """Choose which of n columns a table shows: all of them, or a few evenly spaced ones."""
    return sorted({int(place) for place in np.linspace(0, n - 1, min(n, _COLUMNS_SHOWN)).round()})
