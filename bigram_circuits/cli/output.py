"""What the command line prints: lines for people, one JSON object for machines, and what the package logs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigram_circuits.storage.terminal import printable

LEVELS = ("debug", "info", "warning", "error")
"""The levels of `--log-level`."""
_NAMES = {logging.DEBUG: "debug", logging.INFO: "note", logging.WARNING: "warning", logging.ERROR: "error"}
_NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


class FailedError(Exception):
    """A command that failed in a way that its user can mend, or was interrupted."""

    def __init__(
        self, reason: str, code: int = 1, *, by: str = "bigram-circuits: error", result: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(reason)
        self.result = result or {}
        """What there is all the same."""
        self.code = code
        """The exit code."""
        self.line = f"{by}: {reason}"
        """The line for stderr."""


# --- one of several processes ---


def are_several() -> bool:
    """Whether several processes were started together (`torchrun`)."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process is the first, or only, one of those that were started together."""
    return not are_several() or os.environ.get("RANK", "0") == "0"


def says_why() -> bool:
    """Whether this process, which ends in an error, is the one that says so: of several, the first that ends."""
    if not are_several():
        return True
    from bigram_circuits.learning.ranks import is_first_to_end

    return is_first_to_end()


# --- for people ---


def tell(text: object) -> None:
    """Print text in which names and words from files cannot command the terminal."""
    print(printable(str(text)), flush=True)


def complain(line: str) -> None:
    """Print a line to stderr."""
    print(printable(line), file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# --- for machines ---


def answer(result: Mapping[str, Any]) -> str:
    """A result as one JSON object, in ASCII, on one line."""
    return json.dumps(to_json(result), allow_nan=False)


def to_json(value: Any) -> Any:
    """JSON values of a result: paths are absolute, numbers that are not finite are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return os.path.abspath(value)
    if hasattr(value, "to_json"):
        return to_json(value.to_json())
    if dataclasses.is_dataclass(value):
        return {one.name: to_json(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    return value


# --- what comes beside the result ---


class _Lines(logging.Handler):
    """Shows what the package logs as single lines on stderr, and keeps its warnings."""

    def __init__(self, shown: int) -> None:
        super().__init__()
        self.shown = shown
        self.warned: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if record.levelno >= logging.WARNING:
            self.warned.append(message)
        if record.levelno >= self.shown:
            complain(f"bigram-circuits: {_NAMES.get(record.levelno, record.levelname.lower())}: {message}")


@contextmanager
def arranged(level: str | None, *, quiet: bool, as_json: bool) -> Iterator[list[str]]:
    """Within the `with` block, output goes where it belongs; yields the list that warnings are collected in.

    What the package logs from `level` on (by default `info`, if quiet `error`) and its warnings are lines on stderr.
    Progress is not shown if quiet. With `as_json`, nothing is printed to stdout.
    """
    lines = _Lines(getattr(logging, (level or ("error" if quiet else "info")).upper()))
    logger, shown = logging.getLogger("bigram_circuits"), warnings.showwarning
    before = logger.level

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("bigram_circuits."):
            logger.warning("%s", message)
        elif not quiet:
            shown(message, category, *where, **more)

    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(_silent())
        if as_json:  # also what other libraries print
            beside = stack.enter_context(open(os.devnull, "w")) if quiet else sys.stderr
            stack.enter_context(contextlib.redirect_stdout(beside))
        logger.addHandler(lines)
        logger.setLevel(min(lines.shown, logging.WARNING))
        warnings.showwarning = show
        try:
            yield lines.warned
        finally:
            warnings.showwarning = shown
            logger.setLevel(before)
            logger.removeHandler(lines)


@contextmanager
def _silent() -> Iterator[None]:
    """Within the `with` block, neither the package nor the libraries that fetch its files show progress."""
    from bigram_circuits.progress import silenced

    before = {name: os.environ.get(name) for name in _NO_BARS}
    os.environ.update(_NO_BARS)
    try:
        with silenced():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
