"""Conditions, tokens and names as the pages write them."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_NAMED = 8  # in a sentence
_CONDITIONS = {"full": "whole model", "random": "matched random weights", "empty": "empty subnetwork"}


def condition_words(name: str) -> str:
    """The name of a condition as sentences use it."""
    return _CONDITIONS.get(name, name)


def spaced(name: str) -> str:
    """The name of a quantity or a setting, with spaces."""
    return name.replace("_", " ")


def spoken(token: str) -> str:
    """A token in quotes; a space in it is shown as a dot."""
    return f"“{token.replace(' ', '·')}”"


def spoken_tokens(tokens: Sequence[str]) -> str:
    """Tokens side by side."""
    return "  ".join(map(spoken, tokens))


def expected(cell: str) -> str:
    """What was expected, from the lines of a cell: its first is the token itself, the others end in a percentage."""
    pairs = [line.rsplit(" ", 1) for line in cell.split("\n")[1:]]
    return ", ".join(f"{spoken(pair[0])} {pair[-1]}" for pair in pairs)


def listed(names: Sequence[str], most: int = _MOST_NAMED) -> str:
    """Names in a sentence; of many, the first ones and how many more."""
    if len(names) > most + 1:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def sentence(words: str) -> str:
    """Words with a capital and a full stop; nothing if there are none."""
    return f"{words[:1].upper()}{words[1:]}." if words else ""
