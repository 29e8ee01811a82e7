"""Progress bars: a bar in a terminal or a notebook, a line now and then in a text log.

Work that ends early has succeeded: its bar ends full, whatever the estimate was. Only an exception leaves it short,
which a notebook shows in red.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import tqdm
import tqdm.auto

from bigram_circuits.storage.terminal import printable

_DELAY = 2.0  # seconds before a bar is shown
LINE_SECONDS = 20.0
"""Seconds between two lines of a text log."""
_LOGGER = logging.getLogger("bigram_circuits")
_silenced = False
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s after {elapsed}, {remaining} to go{postfix}"


@contextmanager
def progress(total: int | None = None, *, desc: str, unit: str, **options: Any) -> Iterator[Any]:
    """Within the `with` block, a tqdm bar on stderr: call `update(n)`, and `set_postfix_str` to name what is done.

    Args:
        total: Number of units; None if unknown.
        desc: What is being done.
        unit: What is counted.
        **options: More options of tqdm.
    """
    kind = _kind()
    options = _TIMING.get(kind, {"delay": _DELAY}) | ({"disable": True} if _silenced else {}) | options
    bar = kind(desc=desc, total=total, unit=unit, leave=False, **options)
    try:
        yield bar
        if bar.total is not None:
            bar.total = bar.n  # an early end is a success
    finally:
        bar.close()


def steps(items: Iterable[Any], total: int, *, desc: str, unit: str) -> Iterator[Any]:
    """Yield items, with a progress bar."""
    with progress(total, desc=desc, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def silenced() -> Iterator[None]:
    """Within the `with` block, no progress is shown."""
    global _silenced
    before, _silenced = _silenced, True
    try:
        yield
    finally:
        _silenced = before


def note(line: str, level: int = logging.WARNING) -> None:
    """Log a line to the logger `bigram_circuits`, above any bar, in characters that a terminal may be shown."""
    with tqdm.tqdm.external_write_mode(file=sys.stderr):
        _LOGGER.log(level, "%s", printable(line))


_Terminal: Any = tqdm.tqdm


class _Lines(_Terminal):
    """Writes whole lines, for a log."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def _kind() -> type[Any]:
    """The class of bars that fits where stderr goes."""
    in_notebook = any(cls.__module__ == "tqdm.notebook" for cls in tqdm.auto.tqdm.__mro__)
    return tqdm.auto.tqdm if in_notebook or sys.stderr.isatty() else _Lines


_TIMING: dict[type[Any], dict[str, Any]] = {
    _Lines: {"delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "bar_format": _LINE}
}
