"""Options from a TOML file: `sparsity_weight = 5`, by the names that they have in Python."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bigram_circuits.cli.output import FailedError
from bigram_circuits.recipe import PARTS, option_value, options_of
from bigram_circuits.storage.typed import from_json

_OWN: Mapping[str, Any] = {
    "out": str, "device": str, "fresh": bool, "sharded": bool, "sizes": tuple[float | int, ...],
    "methods": tuple[str, ...], "draws": int, "models": tuple[str, ...], "rows": tuple[str, ...], "released": bool,
}  # fmt: skip
"""The options of single commands that are no options of a study, with their types."""


def read_config(file: Path, there: Collection[str]) -> dict[str, Any]:
    """Read the options in a file.

    Args:
        file: The file. Names of files and folders in it are relative to its own folder.
        there: Names that the command knows.

    Raises:
        FailedError: If the file cannot be read, or holds something that is no option of the command, or a value of
            another type.
    """
    study = {name for part in PARTS for name in options_of(part)}
    known = sorted(name for name in there if name in study or name in _OWN)
    try:
        with file.open("rb") as opened:
            values = tomllib.load(opened)
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(f"there is no option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        typed = {
            name: option_value(name, value) if name in study else from_json(_OWN[name], value, name)
            for name, value in values.items()
        }
    except OSError as error:
        raise FailedError(f"cannot read {str(file)!r}: {error.strerror}", 2) from error
    except (ValueError, RecursionError) as error:
        raise FailedError(f"{str(file)!r}: {' '.join(str(error).split())}", 2) from error
    return {name: _placed(name, value, file.parent) for name, value in typed.items()}


def _placed(name: str, value: Any, folder: Path) -> Any:
    """The value of an option, from the folder that names of files are relative to."""
    if name == "models":
        return [_named_model(one, folder) for one in value]
    if name in ("out", "task") or (name in ("model", "corpus", "index") and _is_path(value, folder)):
        return str(folder / Path(value).expanduser())
    return value


def _named_model(value: str, folder: Path) -> str:
    """A model of `reproduce`: as others, or `NAME=FOLDER`."""
    name, equals, source = ("", "", value) if _is_path(value, folder) else value.rpartition("=")
    return f"{name}{equals}{_placed('model', source, folder)}"


def _is_path(name: str, folder: Path) -> bool:
    """Whether the name of a model or a text is that of a file or folder, not of something on the hub."""
    return name.startswith((".", "/", "~")) or (name != "reference" and (folder / name).exists())
