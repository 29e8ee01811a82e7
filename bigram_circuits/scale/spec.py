"""What a sweep is asked to do: runs as a grid or a list, from TOML or a mapping, each checked before any starts."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from bigram_circuits.models.loading import full_name, is_local
from bigram_circuits.recipe import ANY_NUMBER, NUMBER, PARTS, Option, Request, options_of
from bigram_circuits.storage.records import opened, shown
from bigram_circuits.storage.typed import Record

GRID, RUN, SLURM = "grid", "run", "slurm"
_LARGEST = 1 << 24  # bytes of a spec that are read
_LONGEST_NAME, _LONGEST_VALUE = 80, 24  # characters
OPTIONS: Mapping[str, Option] = {name: one for part in PARTS for name, one in options_of(part).items()}
"""The options of a run, by name."""


@dataclass(frozen=True)
class PlannedRun(Record):
    """One run of a sweep: which it is, and what it is asked for."""

    name: str
    """The name of its folder: the settings that vary, and a hash of all."""
    key: str
    """A hash of its settings; paths count as they are written, so that it stays the same where folders are moved."""
    options: Mapping[str, Any]
    """The options that were given, as in the spec."""
    base: str
    """The folder that relative paths in them start from."""

    @property
    def request(self) -> Request:
        """What it is asked for, with absolute paths.

        Raises:
            ValueError: If an option does not exist, or a value is not allowed.
        """
        return _request(_resolved(self.options, Path(self.base)))


@dataclass(frozen=True)
class Spec:
    """What a sweep is asked for."""

    runs: tuple[PlannedRun, ...]
    """Its runs, in the order of the spec; none twice."""
    slurm: Mapping[str, Any]
    """Parameters of SLURM jobs, by submitit's names."""
    name: str
    """What its folder is called by default."""


def read_spec(spec: Mapping[str, Any] | str | os.PathLike[str]) -> Spec:
    """Read what a sweep is asked for, and check every run.

    Args:
        spec: A TOML file, or a mapping with the same contents: options that all runs share, by name, `grid` (lists of
            values; every combination is a run), `run` (tables, each a run), and `slurm`. Paths are relative to the
            file, or to the working directory.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not TOML, there are no runs, or an option is not allowed; the message says of which run.
    """
    base = Path.cwd()
    name = "sweep"
    if not isinstance(spec, Mapping):
        path = Path(spec).expanduser()
        base, name = path.absolute().parent, path.stem
        spec = _read_toml(path)
    common = {key: value for key, value in spec.items() if key not in (GRID, RUN, SLURM)}
    slurm = spec.get(SLURM, {})
    if not isinstance(slurm, Mapping):
        raise ValueError(f"{SLURM} must be a table of parameters, not {shown(slurm)}")
    wanted = [*_grid(spec.get(GRID), common), *_list(spec.get(RUN), common)]
    if GRID not in spec and RUN not in spec:
        wanted = [common]
    return Spec(_planned(wanted, base), dict(slurm), name)


def _read_toml(path: Path) -> dict[str, Any]:
    with opened(path) as file:
        text = file.read(_LARGEST + 1)
    try:
        if len(text) > _LARGEST:
            raise ValueError(f"it has more than the {_LARGEST:,} bytes that are read")
        return tomllib.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a TOML file: it is not UTF-8 text") from error
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a TOML file: {' '.join(str(error).split())}") from error


def _grid(grid: Any, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values in the grid."""
    if grid is None:
        return []
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(f"{GRID} must be a table of lists of values, not {shown(grid)}")
    for name, values in grid.items():
        if isinstance(values, str | Mapping) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{GRID}.{name} must be a list of values, as in [0, 1], not {shown(values)}")
    every: list[dict[str, Any]] = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [{**common, **one} for one in every]


def _list(runs: Any, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that are listed one by one."""
    if runs is None:
        return []
    is_list = isinstance(runs, Sequence) and not isinstance(runs, str)
    if not is_list or not runs or not all(isinstance(one, Mapping) for one in runs):
        raise ValueError(f"{RUN} must be a list of tables of options ([[{RUN}]]), not {shown(runs)}")
    tables = cast("Sequence[Mapping[str, Any]]", runs)
    return [{**common, **one} for one in tables]


def _planned(wanted: Sequence[Mapping[str, Any]], base: Path) -> tuple[PlannedRun, ...]:
    """The runs with their names, each once."""
    given = [{name: _plain(value) for name, value in one.items()} for one in wanted]
    varying = _varying(given)
    asked: dict[str, tuple[dict[str, Any], Request]] = {}
    for number, options in enumerate(given, start=1):
        try:
            request = _request(options)
            if request.options.sparsity_weights is not None:
                raise ValueError("sparsity_weights find a path in one run: vary sparsity_weight instead")
            _request(_resolved(options, base))
        except ValueError as error:
            words = ", ".join(f"{name}={options[name]}" for name in varying if name in options)
            raise ValueError(f"run {number} of {len(given)}{f' ({words})' if words else ''}: {error}") from error
        asked.setdefault(_key(request), (options, request))
    values = [settings_of(request) for _, request in asked.values()]
    differing = [name for name in OPTIONS if len({one[name] for one in values}) > 1]
    return tuple(
        PlannedRun(_name(settings, differing, key), key, options, str(base))
        for (key, (options, _)), settings in zip(asked.items(), values, strict=True)
    )


def _varying(given: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the options that do not have the same value in all."""
    names = dict.fromkeys(name for one in given for name in one)
    return [name for name in names if any(one.get(name) != given[0].get(name) for one in given)]


def _plain(value: Any) -> Any:
    """A value as TOML has it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _request(options: Mapping[str, Any]) -> Request:
    """Check options."""
    for name in ("model", "revision", "corpus", "target", "task"):
        if not isinstance(options.get(name), str | None):
            raise ValueError(f"{name} must be a name, since jobs read it on their own, not {shown(options[name])}")
    return Request.of(**{name: _as_field(name, one) for name, one in options.items()})


def _as_field(name: str, value: Any) -> Any:
    """A value as the field of an option holds it: lists are tuples, and a number is a float where it may be one."""
    if isinstance(value, list):
        return tuple(value)
    is_number = name in OPTIONS and OPTIONS[name].kind in (NUMBER, ANY_NUMBER)
    return float(value) if is_number and type(value) is int else value


def _resolved(options: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The options with absolute paths."""
    found = dict(options)
    for name in ("model", "corpus", "task", "index"):
        value = found.get(name)
        if isinstance(value, str) and value != "reference":
            there = base / Path(value).expanduser()
            if name == "model":
                found[name] = os.path.abspath(there) if is_local(value) or there.is_dir() else full_name(value)
            elif name == "task" or there.exists() or value.startswith(("./", "../", "/", "~")):
                found[name] = os.path.abspath(there)
    return found


def _key(request: Request) -> str:
    """A hash of what a run is asked for: of the shortest command that asks for it."""
    return hashlib.blake2b(request.command().encode(), digest_size=16).hexdigest()


def settings_of(request: Request) -> dict[str, Any]:
    """Every option of a request by name: a number, a switch, a text or None; what has parts as the command has it."""
    found = {}
    for part in (request.inputs, request.config, request.options):
        for one in fields(part):
            value, option = getattr(part, one.name), OPTIONS[one.name]
            is_plain = value is None or isinstance(value, bool | int | float | str)
            found[one.name] = value if is_plain or option.kind is None else option.kind.write(value)
    return found


def _name(settings: Mapping[str, Any], differing: Sequence[str], key: str) -> str:
    """The name of a run's folder."""
    words = []
    for name in differing:
        value, kind = settings[name], OPTIONS[name].kind
        if value is not None:
            text = value.rstrip("/") if isinstance(value, str) else str(value) if kind is None else kind.write(value)
            words.append(f"{name}-{text.rsplit('/', 1)[-1][:_LONGEST_VALUE]}")
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(words))[:_LONGEST_NAME].strip("-._")
    return f"{text or 'run'}-{key[:8]}"
