"""The terminal that a process runs in: what is shown there, and the signals that come from it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_ENDING = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


def printable(text: str) -> str:
    r"""Return text in which all characters that are not printable, except line breaks, are escapes such as `\x1b`.

    What comes from a file is shown in a terminal like this: there, control characters would be commands.
    """
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)


@contextmanager
def signals_handled(handler: Callable[..., Any], *more: signal.Signals) -> Iterator[None]:
    """Within the `with` block, SIGTERM, SIGHUP (a closed terminal) and `more` call a handler; main thread only.

    A SIGHUP that is ignored stays so: `nohup` asks for that.
    """
    chosen = [number for number in (*_ENDING, *more) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in chosen}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
