"""The program: a command from its words to its exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bigram_circuits import __version__
from bigram_circuits.cli.allocator import return_freed_memory
from bigram_circuits.cli.arguments import parse
from bigram_circuits.cli.output import (
    FailedError,
    answer,
    are_several,
    arranged,
    complain,
    is_first,
    one_line,
    says_why,
)
from bigram_circuits.storage.terminal import signals_handled


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, 0 for success, 1 for failure or interruption; exits with 2 if the words
    are wrong.

    With `--json`, one JSON object is printed to stdout, and everything else to stderr.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in words  # also of arguments that cannot be parsed
    about: dict[str, Any] = {"command": next(iter(words), None), "version": __version__}
    warned: list[str] = []
    is_heard = is_first()
    try:
        arguments = parse(words)
        about["command"], as_json = arguments.command_name, arguments.json
        with arranged(arguments.log_level, quiet=arguments.quiet or not is_first(), as_json=as_json) as warned:
            result = _result(arguments)
        about |= {"ok": True, "exit_code": 0, "warnings": warned, **result}
    except FailedError as failed:
        if is_heard := says_why():
            complain(failed.line)
        about |= {**failed.result} | _failure(str(failed), failed.code, warned)
    except BrokenPipeError:
        raise  # nobody reads on: see `run`
    except Exception as error:  # a traceback follows
        if as_json:
            print(answer(about | _failure(f"{type(error).__name__}: {one_line(error)}", 1, warned)), flush=True)
        raise
    if as_json and is_heard:
        print(answer(about), flush=True)
    if about["exit_code"] == 2:
        raise SystemExit(2)  # as argparse does
    return about["exit_code"]


def _failure(reason: str, code: int, warned: Sequence[str]) -> dict[str, Any]:
    return {"ok": False, "exit_code": code, "warnings": warned, "error": reason}


def _result(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Run a command that was parsed; raises FailedError for what its user can mend."""
    if are_several() and arguments.command_name != "find":
        raise FailedError("only `find` works in several processes: start this command without torchrun")
    try:
        if getattr(arguments, "low_memory", None):
            return_freed_memory()
        with _terminated_like_ctrl_c():
            return arguments.command(arguments)
    except KeyboardInterrupt as stop:
        reason = str(stop) or "interrupted; files already written are kept; rerun the command to go on"
        raise FailedError(reason, by="bigram-circuits") from stop
    except BrokenPipeError:
        raise
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
        raise FailedError(line) from error


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
        except SystemExit as stop:  # from --help and --version
            code = stop.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # a closed pipe (`| head`) needs no message
        _silence()
        code = 1
    except OSError as error:  # a full disk
        complain(f"bigram-circuits: error: cannot write the output: {error.strerror}")
        _silence()
        code = 1
    sys.exit(code)
