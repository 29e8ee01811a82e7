"""The program: a command from its words to its exit code."""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bigram_circuits.cli.arguments import parse
from bigram_circuits.cli.output import one_line, say
from bigram_circuits.storage.terminal import signals_handled


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 success, 1 failure or interruption, 2 wrong arguments."""
    arguments = parse(argv)
    try:
        with _terminated_like_ctrl_c(), _warnings_in_a_line():
            return arguments.command(arguments)
    except KeyboardInterrupt as stop:
        return say(str(stop) or "interrupted; files already written are kept; rerun the command to go on", 1)
    except BrokenPipeError:
        raise  # nobody reads on: see `run`
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = one_line(error)
        if isinstance(error, MemoryError | RuntimeError):
            from bigram_circuits.learning.memory import is_out_of_memory, less_memory

            if not is_out_of_memory(error):
                raise
            if "--batch-size" not in line:
                line = f"out of memory: {less_memory(error)} ({line[:200]})"
        if arguments.traceback:
            raise
        return say(f"error: {line}", 1)


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP act like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("terminated; files already written are kept; rerun the command to go on")

    with signals_handled(stop):
        yield


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Within the block, warnings of this package are single lines on stderr; others are unchanged."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("bigram_circuits."):
            say(f"warning: {message}", 0)
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def _silence() -> None:
    """Discard further output, also what is still buffered."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run() -> None:
    """Entry point of the command `bigram-circuits`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in an encoding that lacks a character, a question mark stands for it
            stream.reconfigure(errors="replace")
    try:
        try:
            code = main()
        except SystemExit as stop:  # from the parser
            code = stop.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # a closed pipe (`| head`) needs no message
        _silence()
        code = 1
    except OSError as error:  # a full disk
        say(f"error: cannot write the output: {error.strerror}", 1)
        _silence()
        code = 1
    sys.exit(code)
