"""What a model can be reduced to when it is measured: the one table of conditions, with their labels and colours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Condition:
    """A set of weights that a model is run on."""

    name: str
    """Its key in results and files, for example `full`."""
    label: str
    """What the report calls it."""
    meaning: str
    """What it is, in a sentence."""
    colour: str
    """Of its lines and bars; from the palette of Okabe and Ito, which readers who see few colours can tell apart."""


CONDITIONS: Mapping[str, Condition] = MappingProxyType(
    {
        one.name: one
        for one in (
            Condition("subnetwork", "subnetwork", "the model with only the subnetwork's weights", "#0072B2"),
            Condition("full", "full model", "the full model", "#222222"),
            Condition(
                "empty",
                "empty subnetwork",
                "the model without any maskable weight: embeddings, normalisation and biases remain",
                "#CC79A7",
            ),
            Condition("complement", "complement", "the full model without the subnetwork's weights", "#D55E00"),
            Condition(
                "magnitude",
                "magnitude",
                "the largest weights, as many in every matrix as the subnetwork keeps",
                "#009E73",
            ),
            Condition(
                "random",
                "matched random weights",
                "random weights, as many in every matrix as the subnetwork keeps: mean over seeds",
                "#999999",
            ),
            Condition(
                "full - random",
                "full - random",
                "the full model without such random weights: mean over seeds",
                "#999999",
            ),
        )
    }
)
"""Every condition, by name."""
COMPARED = ("full", "subnetwork", "complement", "random")
"""What an analysis measures side by side where a subnetwork is given, in this order; without one, the first alone."""
SINGLE = ("subnetwork", "full", "empty", "complement", "magnitude")
"""What an evaluation measures once."""
DRAWN = ("random", "full - random")
"""What an evaluation draws anew for every seed."""


def label_of(name: str) -> str:
    """What the report calls a condition; a name that is none stays as it is."""
    return CONDITIONS[name].label if name in CONDITIONS else name


def colour_of(name: str) -> str | None:
    """A condition's colour, also of what begins with one (`random 0`, `full L0H1`); None for any other name."""
    known = CONDITIONS.get(name) or CONDITIONS.get(name.split()[0] if name.split() else "")
    return known.colour if known else None
