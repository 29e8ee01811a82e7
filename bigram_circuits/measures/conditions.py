"""The conditions that a model is measured under, with their labels and colours."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType

GREY = "#7A7A7A"
"""Readable on white and on the dark grey of notebooks alike: text of figures, and lines of the full model."""


@dataclass(frozen=True)
class Condition:
    """What of a model is kept: a set of weights, and all other maskable ones are 0, or a set of nodes."""

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
            Condition("complement", "complement", "the full model without what was found", "#D55E00"),
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
            Condition("circuit", "circuit", "the model with only the circuit's nodes, the others replaced", "#0072B2"),
            Condition("empty circuit", "empty circuit", "the model with all nodes of these units replaced", "#CC79A7"),
            Condition(
                "strongest nodes",
                "strongest nodes",
                "the nodes whose gates have the largest gradients, as many at every hook point as the circuit keeps",
                "#009E73",
            ),
            Condition(
                "random nodes",
                "matched random nodes",
                "random nodes, as many at every hook point as the circuit keeps: mean over seeds",
                "#999999",
            ),
            Condition(
                "full - random nodes",
                "full model without matched random nodes",
                "the full model without such random nodes: mean over seeds",
                "#999999",
            ),
        )
    }
)
"""Every condition, by name."""
COMPARED = ("full", "subnetwork", "complement", "random")
"""Conditions that an analysis compares, in this order, if a subnetwork is given; without one, only the first."""
OWN = ("subnetwork", "circuit")
"""The conditions of which one is what was found."""
_OF_A_CIRCUIT = {
    "subnetwork": "circuit", "empty": "empty circuit", "magnitude": "strongest nodes", "random": "random nodes",
    "full - random": "full - random nodes",
}  # fmt: skip
SINGLE = ("subnetwork", "full", "empty", "complement", "magnitude")
"""Conditions that an evaluation measures once."""
DRAWN = ("random", "full - random")
"""Conditions that an evaluation draws again for every seed."""


def condition_of(name: str, noun: str) -> str:
    """The condition of a `subnetwork` or of a `circuit` (the noun) that corresponds to one of a subnetwork."""
    return _OF_A_CIRCUIT.get(name, name) if noun == "circuit" else name


def compared(noun: str) -> tuple[str, ...]:
    """The conditions that an analysis of a `subnetwork` or a `circuit` compares, in this order."""
    return tuple(condition_of(name, noun) for name in COMPARED)


def own_of(names: Container[str]) -> str | None:
    """The condition that is what was found; None if it is not among these."""
    return next((name for name in OWN if name in names), None)


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
