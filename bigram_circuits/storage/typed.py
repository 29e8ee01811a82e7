"""Convert frozen dataclasses to JSON values and back, with type checks on reading.

JSON has no NaN: NaN is written as null, and null is read as NaN where a float is expected. A missing field takes its
default, so that files of earlier versions can be read; an unknown field is an error.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

R = TypeVar("R", bound="Record")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_LARGEST = 2**63  # no file of ours holds larger integers


class Record:
    """A frozen dataclass whose fields can also be read by name, as in `record["step"]`."""

    def __getitem__(self, name: str) -> Any:
        if name not in _hints(type(self)):
            raise KeyError(name)
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name != "upgraded"]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {name: to_json(getattr(self, name)) for name in _hints(type(self))}

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Convert the JSON fields of an earlier version to those of this one."""
        return values

    @classmethod
    def from_json(cls: type[R], value: Any) -> R:
        """Read back what `to_json` returned. Raises ValueError with a message that reads on after `is damaged:`."""
        return from_json(cls, value)


def to_json(value: Any) -> Any:
    """Convert a value to JSON values."""
    if isinstance(value, Record):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_json(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def from_json(kind: Any, value: Any, what: str = "it") -> Any:
    """Read a JSON value as an instance of `kind`: a dataclass, number, string, tuple, mapping, or a union of these.

    Raises:
        ValueError: If the value has another type; the message says where, what was found and what was expected.
    """
    return _read(kind, value, what)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, by name."""
    hints = typing.get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind) if one.init}


@cache
def _required(kind: Any) -> set[str]:
    """Return the fields of a dataclass that have no default."""
    return {one.name for one in dataclasses.fields(kind) if one.default is one.default_factory is dataclasses.MISSING}


def _read(kind: Any, value: Any, what: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, what)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, what)
    if origin is tuple:
        return _tuple(arguments, value, what)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _wrong(what, "values by name", value)
        return {name: _read(arguments[1], one, f"{what}.{name}") for name, one in value.items()}
    if kind is Any:
        return value
    return _plain(kind, value, what)


def _plain(kind: Any, value: Any, what: str) -> Any:
    if kind is float:
        if value is None:
            return math.nan
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
        raise _wrong(what, "a number", value)
    if kind is int:
        if type(value) is int and abs(value) < _LARGEST:
            return value
        raise _wrong(what, "a whole number", value)
    names = {str: "text", bool: "true or false", type(None): "null"}
    if kind in names and type(value) is kind:
        return value
    raise _wrong(what, names.get(kind, str(kind)), value)


def _one_of(kinds: tuple[Any, ...], value: Any, what: str) -> Any:
    """Read a value as the first type of a union that fits: null as None if allowed, and 1 as int before float."""
    if value is None and type(None) in kinds:
        return None
    ordered = sorted((kind for kind in kinds if kind is not type(None)), key=lambda kind: kind is float)
    if float in kinds and int in kinds and type(value) is float:
        ordered = [float, *(kind for kind in ordered if kind not in (int, float))]
    errors = []
    for kind in ordered:
        try:
            return _read(kind, value, what)
        except ValueError as error:
            errors.append(error)
    raise errors[ordered.index(float) if float in ordered else 0]  # "a number" tells more than "a whole number"


def _tuple(arguments: tuple[Any, ...], value: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(what, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_read(arguments[0], one, f"{what}[{place}]") for place, one in enumerate(value))
    if len(value) != len(arguments):
        raise _wrong(what, f"a list of {len(arguments)}", value)
    return tuple(_read(kind, one, what) for kind, one in zip(arguments, value, strict=True))


def _dataclass(kind: Any, value: Any, what: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(what, "values by name", value)
    value = kind.upgraded(value) if issubclass(kind, Record) else value
    hints = _hints(kind)
    unknown = set(value) - set(hints)
    if unknown:
        raise ValueError(f"{what} has the unknown field {shown(min(unknown))}")
    missing = _required(kind) - set(value)
    if missing:
        raise ValueError(f"{what} lacks the field {shown(min(missing))}")
    prefix = "" if what == "it" else f"{what}."
    return kind(**{name: _read(hints[name], one, f"{prefix}{name}") for name, one in value.items()})


def shown(value: Any) -> str:
    """Format a value for an error message: in quotes, on one line, and cut short."""
    return _SHORT.repr(value)


def _wrong(what: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{what} should be {wanted}, not {shown(value)}")
