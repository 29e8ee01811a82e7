"""How the pages write components, tokens and lists of names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bigram_circuits.circuit import WEIGHT, Circuit
from bigram_circuits.masking.apply import Mask
from bigram_circuits.measures.words import listed
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


_UNITS = {"head": "heads", "neuron": "neurons", "attn": "attention outputs", "mlp": "MLP outputs", WEIGHT: "weights"}
IN_PLACE = {
    "zero": "the value 0",
    "mean": "their mean over the training text",
    "mean_by_position": "their mean over the training text at the same position",
    "resample": "their values in another sequence of the batch",
    "counterfactual": "their values in the paired counterfactual prompt",
}
"""What takes the place of nodes that are dropped."""


def unit_words(unit: str) -> str:
    """Nodes of a unit, in words: `heads`, `neurons`, `coordinates of blocks.0.hook_resid_post`."""
    return _UNITS.get(unit, f"coordinates of {unit}")


def asked_units(mask: Mask) -> str:
    """What could be kept or dropped: `weights`, or `heads and neurons`."""
    return listed([unit_words(unit) for unit in mask.by_unit()]) if isinstance(mask, Circuit) else mask.units


def dropped_words(mask: Mask) -> str:
    """What is done with the rest, as the end of `we keep some weights and ...`."""
    return f"give the rest {IN_PLACE[mask.replacement.kind]}" if isinstance(mask, Circuit) else "zero the rest"


def reader_of(run: Run) -> str:
    """Whose surprisals the target gives, as a phrase: `the bigram table`."""
    label, meaning = run.target_words
    by_kind = {"NGramTable": f"the {label} table", "ModelTarget": "the full model"}
    return by_kind.get(run.settings.target.kind or "", meaning)
