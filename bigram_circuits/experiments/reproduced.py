"""A paper's numbers beside ours, as a value: a table that is printed, written to a folder and read back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bigram_circuits.evaluation import ZERO_RULE
from bigram_circuits.measures import html
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.names import short_name
from bigram_circuits.paper import DEGREES, LAMBDA, PAPERS, ROWS, SHARE, TIMES, WEIGHTS
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.runs import CorpusIdentity
from bigram_circuits.storage.files import checked_json, damaged, is_leftover, read_checked_json, write_text
from bigram_circuits.storage.locks import is_lock
from bigram_circuits.storage.typed import Record

Number = float | int | None

_FILE, _TABLE = "reproduction.json", "reproduction.md"
_COLUMNS = ("model", "row", "quantity", "theirs", "ours", "difference")


@dataclass(frozen=True)
class ReproducedNumber(Record):
    """One number of a paper, measured again."""

    row: str
    """The row of `paper.ROWS`."""
    quantity: str
    """Name of the quantity, one of the row's."""
    theirs: Number
    """What the paper reports; None where it reports nothing."""
    ours: Number
    """What was measured; None where it is undefined."""

    @property
    def difference(self) -> Number:
        """Ours minus theirs; None if one of them is missing."""
        return None if self.theirs is None or self.ours is None else self.ours - self.theirs

    @property
    def words(self) -> str:
        """What it is."""
        return self._quantity.meaning

    def shown(self, value: Number, *, signed: bool = False) -> str:
        """Format a value of this quantity; empty for None."""
        return "" if value is None else _format(value, self._quantity.unit, "+" if signed else "")

    @property
    def _quantity(self) -> Quantity:
        return next(one for one in ROWS[self.row] if one.name == self.quantity)


@dataclass(frozen=True)
class ReproducedModel(Record):
    """The numbers of one model."""

    name: str
    """Its name in the paper, or else the name that it was loaded by."""
    weight_hash: str
    """Hash of its weights."""
    text: CorpusIdentity
    """The text that was counted, learned from and measured on."""
    numbers: tuple[ReproducedNumber, ...] = ()
    """The numbers, in the order of `paper.ROWS`."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """The rows that could not be measured, with reasons."""

    def get(self, quantity: str, row: str | None = None) -> Number:
        """Return our value of a quantity; `row` tells those of `sweep` and `released` apart.

        Raises:
            ValueError: If it was not measured.
        """
        found = [one for one in self.numbers if one.quantity == quantity and row in (None, one.row)]
        if not found:
            there = ", ".join(one.quantity for one in self.numbers)
            raise ValueError(f"there is no number {quantity!r} of {self.name!r}: there are {there or 'none'}")
        return found[0].ours

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows that were measured."""
        return tuple(dict.fromkeys(one.row for one in self.numbers))


@dataclass(frozen=True)
class Reproduction(Record):
    """A paper's numbers beside ours: the result of `reproduce`.

    Example:
        >>> again = bc.load_reproduction("runs/chang-bergen-2025")
        >>> print(again.to_markdown())
    """

    paper: str
    """Name of the paper."""
    recipe: SparsifyConfig
    """How masks were learned; `sparsity_weight` is replaced by each lambda."""
    sparsity_weights: tuple[float | int, ...]
    """The lambdas, in increasing order."""
    models: tuple[ReproducedModel, ...] = ()
    """The models that were measured."""
    unreachable: Mapping[str, str] = field(default_factory=dict)
    """The models that could not be loaded, with reasons."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no number at all."""
        return not any(model.numbers for model in self.models)

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each number: model, row, quantity, theirs, ours, difference."""
        import pandas as pd

        rows = [
            (model.name, one.row, one.quantity, one.theirs, one.ours, one.difference)
            for model in self.models
            for one in model.numbers
        ]
        return pd.DataFrame(rows, columns=list(_COLUMNS)).astype(dict.fromkeys(_COLUMNS[3:], float))

    def to_markdown(self) -> str:
        """The table in Markdown, with the notes as a list."""
        lines = ["| model | quantity | theirs | ours | difference |", "|---|---|--:|--:|--:|"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in self._cells()]
        return "\n".join([f"# {PAPERS[self.paper].title}: theirs and ours", "", *lines, "", *self._bullets()]) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `reproduction.json`, which `load_reproduction` reads, and the Markdown table to a folder."""
        write_text(Path(folder) / _FILE, checked_json(self.to_json()))
        write_text(Path(folder) / _TABLE, self.to_markdown())

    def __str__(self) -> str:
        rows = [("", "theirs", "ours", "difference")]
        for name, words, theirs, ours, difference in self._cells():
            rows += [("", "", "", ""), (name, "", "", "")] if name else []
            rows.append((f"  {words}", theirs, ours, difference))
        wide = [max(len(row[at]) for row in rows) for at in range(4)]
        lines = [f"{PAPERS[self.paper].title}: theirs, ours, and the difference"]
        for words, *numbers in rows:
            cells = [f"{one:>{width + 2}}" for one, width in zip(numbers, wide[1:], strict=True)]
            lines.append(f"{words:<{wide[0]}}{''.join(cells)}".rstrip())
        return "\n".join([*lines, "", *self.says])

    def _repr_html_(self) -> str:
        """HTML for notebooks: the same table and its notes."""
        columns, title = ["model", "quantity", "theirs", "ours", "difference"], PAPERS[self.paper].title
        return html.summary(
            f"{title}: theirs and ours", [], html.table(columns, self._cells(), title), html.small(self.says)
        )

    @property
    def says(self) -> tuple[str, ...]:
        """How it was measured, and what was not, a sentence each."""
        config, paper = self.recipe, PAPERS[self.paper]
        texts = dict.fromkeys(str(model.text.source) for model in self.models)
        return (
            f"Recipe: at most {config.max_steps:,} steps of {config.batch_size} sequences, learning rate "
            f"{'of the method' if config.learning_rate is None else f'{config.learning_rate:g}'}, seed {config.seed}; "
            f"lambda {_listed(self.sparsity_weights)}.",
            *(f"Text: {text}; the paper used another." for text in texts),
            f"The sparse subnetwork is the smallest whose r is at most {paper.margin:g} below that of lambda 0.",
            f"r: {ZERO_RULE}.",
            *(
                f"{model.name}: {row} left out: {reason}"
                for model in self.models
                for row, reason in model.left_out.items()
            ),
            *(f"{name}: could not be loaded: {reason}" for name, reason in self.unreachable.items()),
        )

    def _bullets(self) -> list[str]:
        return [f"- {line}" for line in self.says]

    def _cells(self) -> list[tuple[str, str, str, str, str]]:
        """The cells of each number; a model is named in its first line only."""
        return [
            (
                "" if at else short_name(model.name), one.words, one.shown(one.theirs), one.shown(one.ours),
                one.shown(one.difference, signed=True),
            )
            for model in self.models
            for at, one in enumerate(model.numbers)
        ]  # fmt: skip

    def with_model(self, changed: ReproducedModel) -> Reproduction:
        """The same with a model added or replaced."""
        others = [one for one in self.models if not is_same(one, changed)]
        at = next((at for at, one in enumerate(self.models) if is_same(one, changed)), len(others))
        models = (*others[:at], changed, *others[at:])
        unreachable = {name: reason for name, reason in self.unreachable.items() if name != changed.name}
        return replace(self, models=models, unreachable=unreachable)


def is_same(one: ReproducedModel, other: ReproducedModel) -> bool:
    """Whether both are of the same model under the same name."""
    return (one.name, one.weight_hash) == (other.name, other.weight_hash)


def _listed(weights: Sequence[float | int]) -> str:
    return ", ".join(f"{one:g}" for one in weights)


def _format(value: float | int, unit: str, sign: str) -> str:
    if unit == SHARE:
        return f"{100 * value:{sign}.{3 if abs(value) < 0.01 else 2 if abs(value) < 0.1 else 1}f}%"
    return f"{value:{sign}{ {WEIGHTS: ',d', LAMBDA: 'g', TIMES: '.2f', DEGREES: '.1f'}.get(unit, '.3f') }}"


def load_reproduction(folder: str | os.PathLike[str]) -> Reproduction:
    """Read the result that `reproduce` wrote to a folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.

    Example:
        >>> again = bc.load_reproduction("runs/chang-bergen-2025")
        >>> again.to_dataframe()
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no reproduction: it has no {_FILE}")
    remedy = "remove it, and `reproduce` with the same options measures again what it held"
    record = read_checked_json(path, remedy)
    with damaged(path, remedy):
        found = Reproduction.from_json(record)
        if found.paper not in PAPERS:
            raise ValueError(f"there is no paper {found.paper!r}")
        for model in found.models:
            for one in model.numbers:
                if one.quantity not in [known.name for known in ROWS.get(one.row, ())]:
                    raise ValueError(f"there is no quantity {one.quantity!r} in a row {one.row!r}")
    return found


def start_reproduction(folder: Path, wanted: Reproduction) -> None:
    """Start a result in a folder, unless one with the same settings is there.

    Raises:
        ValueError: If the folder holds a reproduction with other settings, or something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file, but a folder is needed")
    if (folder / _FILE).is_file():
        there = load_reproduction(folder)
        if (how := _how_they_differ(there, wanted)) is not None:
            raise ValueError(f"{str(folder)!r} holds another reproduction ({how}): choose another folder")
        return
    if folder.is_dir() and not all(is_lock(one) or is_leftover(one) for one in folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and holds no reproduction: choose another folder")
    wanted.save(folder)


def _how_they_differ(there: Reproduction, wanted: Reproduction) -> str | None:
    """The first setting that differs, as a phrase; None if none does."""
    settings = [
        {"paper": one.paper, "sparsity_weights": _listed(one.sparsity_weights)} | one.recipe.to_json()
        for one in (there, wanted)
    ]
    name = next((name for name in settings[0] if settings[0][name] != settings[1][name]), None)
    return None if name is None else f"its {name} is {settings[0][name]}, not {settings[1][name]}"
