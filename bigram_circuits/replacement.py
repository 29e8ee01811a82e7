"""What stands for a node that a circuit drops.

A gate g replaces the value x of a node by g x + (1 - g) x', where x' is

- `zero`: 0;
- `mean`: the mean of x over the positions of a text, in the full model;
- `mean_by_position`: the mean of x over the sequences of a text at the same position, in the full model;
- `resample`: the value at the same position of another sequence of the batch, in the full model;
- `counterfactual`: the value at the same position of a paired prompt, in the full model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Integer

from bigram_circuits.recipe import REPLACEMENTS
from bigram_circuits.text.known import KnownSequences

Means = Mapping[str, Float[np.ndarray, "..."]]
"""Mean activation by hook point, [width] or [position, width], with all axes after the position flattened; float32."""
OF_A_TEXT = ("mean", "mean_by_position")
"""The replacements that are means over a text."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts, and a counterfactual for each of them: another prompt, aligned position by position."""

    known: KnownSequences
    """The prompts."""
    others: Integer[np.ndarray, "prompt position"]
    """Their counterfactuals."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """A way to replace the values of nodes; made by `replaced` and `find_circuit`.

    Example:
        >>> averaged = bc.replaced(model, circuit, "mean", text=text)
        >>> print(averaged.replacement.kind)
        mean
    """

    kind: str = "zero"
    """One of `REPLACEMENTS`."""
    means: Means = field(default_factory=dict, repr=False)
    """For means: the values by hook point."""
    seed: int = 0
    """For `resample`: seed of the pairs of sequences."""
    pairs: Pairs | None = field(default=None, repr=False)
    """For `counterfactual`: the pairs of prompts; None if they are not known, as for a circuit that was read from a
    file."""

    @property
    def smallest_batch(self) -> int:
        """The fewest sequences that a forward pass may have."""
        return 2 if self.kind == "resample" else 1

    def __post_init__(self) -> None:
        if self.kind not in REPLACEMENTS:
            raise ValueError(f"replace must be one of {', '.join(REPLACEMENTS)}, not {self.kind!r}")
