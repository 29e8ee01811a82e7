"""Continuous sparsification (Savarese, Silva, Maire 2020, arXiv 1912.04427): sigmoid(beta * s), with a growing beta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.masking.gates import GateGroup, Gates
from bigram_circuits.recipe import SparsifyConfig

_GROWS = 1e5  # total factor by which beta grows over `max_steps`, if the recipe gives no growth


def temperature(step: int, *, first: float, growth: float) -> float:
    """Return beta at a step: `first * growth ** step`, capped at 1e30 (by then every gate is decided)."""
    if math.log(first) + step * math.log(growth) > math.log(1e30):
        return 1e30
    return first * growth**step


def soft_gate(scores: Float[Tensor, " gate"], beta: float) -> Float[Tensor, " gate"]:
    """Return sigmoid(beta * s), which is also the penalised value."""
    return (beta * scores).sigmoid_()


class ContinuousSparsification(Gates):
    """Soft gates sigmoid(beta * s), with beta growing at every step."""

    learning_rate = 2e-2

    def __init__(
        self, groups: Sequence[GateGroup], *, beta_start: float = 1.0, beta_growth: float = 1.0, **start: Any
    ) -> None:
        super().__init__(groups, **start)
        self._beta_start, self._beta_growth = beta_start, beta_growth

    @classmethod
    def from_config(
        cls, groups: Sequence[GateGroup], config: SparsifyConfig, *, seed: int, wanted: int | None, **start: Any
    ) -> ContinuousSparsification:
        """Build the gates with the recipe's growth of beta, or by default a growth fitted to its number of steps."""
        growth = _GROWS ** (1 / config.max_steps) if config.beta_growth is None else config.beta_growth
        return cls(groups, beta_start=float(config.beta_start), beta_growth=float(growth), **start)

    def refresh(self, step: int) -> None:
        """Set beta for a step."""
        self.steepness = temperature(step, first=self._beta_start, growth=self._beta_growth)

    def soft(self, place: slice) -> Float[Tensor, " gate"]:
        """Return sigmoid(beta * s)."""
        return soft_gate(self._shifted(place), self.steepness)

    def slope(self, place: slice) -> Float[Tensor, " gate"]:
        """Return beta * soft * (1 - soft)."""
        soft = self.soft(place)
        return torch.addcmul(soft, soft, soft, value=-1, out=soft).mul_(self.steepness)

    def penalised(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the soft gates themselves."""
        return self.soft(place)


METHOD = ContinuousSparsification
