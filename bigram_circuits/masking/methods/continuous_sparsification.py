"""Continuous sparsification (Savarese, Silva, Maire 2020, arXiv 1912.04427): sigmoid(beta * s), with a growing beta.

As published, the gates harden because beta grows without bound. Fractional gates act as free scales, though, and part
of what they have learned is lost when they become 0 or 1. With `hard_from`, gates are soft only for the first part of a
run, with a small beta. After that they are exactly 0 or 1 in the forward pass, and gradients pass straight through them
with the slope of the soft gate (Bengio, Leonard, Courville 2013, arXiv 1308.3432), while the learning rate falls to 0:
what is learned then is the mask itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.masking.gates import GateGroup, Gates
from bigram_circuits.recipe import SparsifyConfig

_GROWS = 1e5  # total factor by which beta grows over `max_steps` if the gates stay soft, to the power of
_SHORT = 2 / 3  # if there are short steps, which are cheap,
_GROWS_SOFT = 5.0  # or until they become hard, if the recipe gives no growth


def temperature(step: int, *, first: float, growth: float) -> float:
    """Return beta at a step: `first * growth ** step`, capped at 1e30 (by then every gate is decided)."""
    if math.log(first) + step * math.log(growth) > math.log(1e30):
        return 1e30
    return first * growth**step


def soft_gate(scores: Float[Tensor, " gate"], beta: float) -> Float[Tensor, " gate"]:
    """Return sigmoid(beta * s), which is also the penalised value."""
    return (beta * scores).sigmoid_()


class ContinuousSparsification(Gates):
    """Soft gates sigmoid(beta * s) with a growing beta, then hard gates s > 0 whose slope is that of the soft ones."""

    learning_rate = 2e-2

    def __init__(
        self,
        groups: Sequence[GateGroup],
        *,
        beta_start: float = 1.0,
        beta_growth: float = 1.0,
        soft_steps: int | None = None,
        steps: int = 1,
        **start: Any,
    ) -> None:
        """Start with soft gates, which are hard after `soft_steps` of `steps` steps; None: never."""
        super().__init__(groups, **start)
        self._beta_start, self._beta_growth = beta_start, beta_growth
        self._steps, self._soft_steps = steps, soft_steps
        self._hard = self._is_last = False

    @classmethod
    def from_config(
        cls, groups: Sequence[GateGroup], config: SparsifyConfig, *, seed: int, wanted: int | None, **start: Any
    ) -> ContinuousSparsification:
        """Build the gates with the recipe's growth of beta, or by default a growth fitted to its number of steps."""
        soft_steps = config.soft_steps
        if config.beta_growth is not None:
            growth = config.beta_growth
        elif soft_steps is None:
            growth = _GROWS ** ((_SHORT if config.short_steps else 1) / config.max_steps)
        else:
            growth = _GROWS_SOFT ** (1 / soft_steps)
        return cls(
            groups,
            beta_start=float(config.beta_start),
            beta_growth=float(growth),
            soft_steps=soft_steps,
            steps=config.max_steps,
            **start,
        )

    @property
    def settles_at(self) -> int:
        """The step from which the gates are hard."""
        return self._soft_steps or 0

    @property
    def is_hard(self) -> bool:
        """Whether the gates of the step set by `refresh` are the mask itself."""
        return self._hard

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate: 1 while gates are soft, then a cosine that falls to 0."""
        if self._soft_steps is None or step < self._soft_steps:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - self._soft_steps) / max(1, self._steps - self._soft_steps)))

    def refresh(self, step: int) -> None:
        """Set beta for a step, and whether the gates are hard."""
        self._hard = self._soft_steps is not None and step >= self._soft_steps
        self._is_last = step == self._steps - 1
        grown = self._soft_steps if self._hard and self._soft_steps is not None else step
        self.steepness = temperature(grown, first=self._beta_start, growth=self._beta_growth)

    def soft(self, place: slice) -> Float[Tensor, " gate"]:
        """Return sigmoid(beta * s), or 1 where s > 0 and 0 elsewhere once gates are hard."""
        return self._shifted(place).gt(0).float() if self._hard else self.penalised(place)

    def slope(self, place: slice) -> Float[Tensor, " gate"]:
        """Return beta * soft * (1 - soft), also once gates are hard."""
        soft = self.penalised(place)
        return torch.addcmul(soft, soft, soft, value=-1, out=soft).mul_(self.steepness)

    def penalised(self, place: slice) -> Float[Tensor, " gate"]:
        """Return sigmoid(beta * s)."""
        return soft_gate(self._shifted(place), self.steepness)

    def undecided(self, between: int, above: int) -> tuple[int, int]:
        """Count undecided gates by their soft value; hard gates are all decided when the last step is done."""
        return (0, max(above, 1)) if self._hard and self._is_last else (between, above)


METHOD = ContinuousSparsification
