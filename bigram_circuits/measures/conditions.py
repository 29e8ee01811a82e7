"""The conditions that a model is measured under, with their labels and colours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GREY = "#7A7A7A"
"""Readable on white and on the dark grey of notebooks alike: text of figures, and lines of the full model."""


@dataclass(frozen=True)
class Condition:
    """A set of weights that a model is run with; all other maskable weights are 0."""

    name: str
    """Its key in results and files, for example `full`."""
    label: str
    """Its name in the report."""
    meaning: str
    """A description in one sentence."""
    colour: str
    """Colour of its lines and bars, from the colour-blind-safe palette of Okabe and Ito."""


CONDITIONS: Mapping[str, Condition] = MappingProxyType(
    {
        one.name: one
        for one in (
            Condition("subnetwork", "subnetwork", "the model with only the subnetwork's weights", "#0072B2"),
            Condition("full", "full model", "the full model", GREY),
            Condition(
                "empty",
                "empty subnetwork",
                "the model without any maskable weight: embeddings, normalisation and biases remain",
                "#CC79A7",
            ),
            Condition("complement", "complement", "the full model without the subnetwork's weights", "#D55E00"),
            Condition(
                "magnitude",
                "largest weights",
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
                "full model without matched random weights",
                "the full model without such random weights: mean over seeds",
                "#999999",
            ),
        )
    }
)
"""Every condition, by name."""
COMPARED = ("full", "subnetwork", "complement", "random")
"""Conditions that an analysis compares, in this order, if a subnetwork is given; without one, only the first."""
SINGLE = ("subnetwork", "full", "empty", "complement", "magnitude")
"""Conditions that an evaluation measures once."""
DRAWN = ("random", "full - random")
"""Conditions that an evaluation draws again for every seed."""


def label_of(name: str) -> str:
    """Return a condition's name in the report, also at the start of a name (`random 0`); others are unchanged."""
    for known in sorted(CONDITIONS, key=len, reverse=True):
        if name == known or name.startswith(f"{known} "):
            return CONDITIONS[known].label + name[len(known) :]
    return name


def colour_of(name: str) -> str | None:
    """Return a condition's colour, also for names that begin with one (`random 0`, `full L0H1`); None for others."""
    known = CONDITIONS.get(name) or CONDITIONS.get(name.split()[0] if name.split() else "")
    return known.colour if known else None
