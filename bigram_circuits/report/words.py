"""How the pages write components, tokens and lists of names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bigram_circuits.runs import Run

_COMPONENTS = {"attn": "attention", "mlp": "MLP"}


def spaced(name: str) -> str:
    """The name of a quantity or a setting, with spaces."""
    return name.replace("_", " ")


def spoken(token: str) -> str:
    """A token in quotes, with its spaces shown as dots."""
    return f"“{token.replace(' ', '·')}”"


def spoken_tokens(tokens: Sequence[str]) -> str:
    """Tokens side by side."""
    return "  ".join(map(spoken, tokens))


def predictions(cell: str) -> str:
    """The most likely tokens in a cell: its first line is the actual token, each of the others ends in a percentage."""
    pairs = [line.rsplit(" ", 1) for line in cell.split("\n")[1:]]
    return ", ".join(f"{spoken(pair[0])} {pair[-1]}" for pair in pairs)


def component_words(part: str) -> str:
    """The kind of a component, `attn` or `mlp`, in words."""
    return _COMPONENTS.get(part, part)


def component_name(name: str) -> str:
    """A component by its short name: `blocks.0.attn` as `L0.attn`."""
    return re.sub(r"^blocks\.(\d+)\.", r"L\1.", name)


def reader_of(run: Run) -> str:
    """Whose surprisals the target gives, as a phrase: `the bigram table`."""
    label, meaning = run.target_words
    by_kind = {"NGramTable": f"the {label} table", "ModelTarget": "the full model"}
    return by_kind.get(run.settings.target.kind or "", meaning)
