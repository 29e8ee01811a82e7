"""What the command line prints."""

from __future__ import annotations

import sys

from bigram_circuits.storage.terminal import printable


def say(line: str, code: int) -> int:
    """Print a line to stderr, in the name of the program; returns the exit code."""
    print(printable(f"bigram-circuits: {line}"), file=sys.stderr)
    return code


def tell(text: object) -> None:
    """Print text in which names and words from files cannot command the terminal."""
    print(printable(str(text)), flush=True)


def one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
