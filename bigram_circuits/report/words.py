"""How the pages write components, tokens and lists of names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from bigram_circuits.circuit import WEIGHT, Circuit
from bigram_circuits.explanations.words import MEANINGS
from bigram_circuits.masking.apply import Mask
from bigram_circuits.measures.conditions import CONDITIONS
from bigram_circuits.measures.quantities import (
    CROSS_ENTROPY,
    FRACTION,
    KL,
    MEAN_SURPRISAL,
    SURPRISAL_CORRELATION,
    TOP1_AGREEMENT,
)
from bigram_circuits.measures.words import listed, sentence

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


COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "r": SURPRISAL_CORRELATION.meaning,
        "KL": KL.meaning,
        "cross-entropy": CROSS_ENTROPY.meaning,
        "loss": MEAN_SURPRISAL.meaning,
        "top-1": TOP1_AGREEMENT.meaning,
        "fraction": FRACTION.meaning,
        "kept": "How many are kept.",
        "weights kept": "How many weights are kept.",
        "nodes kept": "How many nodes are kept.",
        "share of all kept": "Of all that is kept, the share that is here.",
        "undecided": "Share of the gates that are neither open nor closed.",
        "loss without it rises by (nats)": "How much further from the target the masked model is without it.",
        "share of information lost": "That rise, as a share of what the context tells about the next token.",
        "slope (1: the right size)": "How much is measured for every logit that is predicted.",
        "95% interval of the slope": "From a bootstrap over tokens.",
        "gap in KL (95%)": "KL of the control minus that of the trained model, with its 95% interval.",
        "gap in r (95%)": "r of the trained model minus that of the control, with its 95% interval.",
        "gap in information (95%)": "Share of what the context tells: of the trained model minus that of the control.",
        "bits of the mask": "Bits of the shortest description found of which are kept.",
        "bits of a table as good": "Bits of the shortest message found with a table that predicts as well.",
        "ratio": "Bits of the mask over those of the table: below 0.1, it cannot have memorised it.",
        "r of random": "The same with as many random ones in their place.",
        "KL of random": "The same with as many random ones in their place.",
        "r of full model": "The same for the full model.",
        "KL of full model": "The same for the full model.",
        "of": "How many there are to choose from.",
        "interval": "95% bootstrap interval over held-out sequences; of random controls, the range over seeds.",
        "95% interval": "From a bootstrap: how far the number would move with other text of this kind.",
        "interval of r": "95% bootstrap interval over held-out sequences.",
        "low": "Lower end of the 95% interval.",
        "high": "Upper end of the 95% interval.",
        "shared": "How many both keep.",
        "expected": "How many both would keep by chance, with as many in every matrix or at every hook point.",
        "times chance": "Shared over expected: 1 is what chance gives.",
        "p (Holm)": "Probability of sharing as many by chance, corrected for the number of comparisons.",
        "log10 p": "Its decimal logarithm, also where the probability is too small to write.",
        "of first": "Share of what the first keeps that the second keeps too.",
        "of second": "Share of what the second keeps that the first keeps too.",
        "Jaccard": "Shared over what either keeps: 1 if they are the same.",
        **{name: MEANINGS[name] for name in ("driven by", "raises", "lowers")},
        "occurrences": "How often the token occurs in the held-out text.",
        "previous token": "Mean attention to the token before.",
        "itself": "Mean attention to the token itself.",
        "first token": "Mean attention to the first token of the sequence.",
        **{one.label: sentence(one.meaning) for one in CONDITIONS.values()},
    }
)
"""What columns and rows of tables mean, in a sentence, wherever they stand; results bring the rest with them."""
