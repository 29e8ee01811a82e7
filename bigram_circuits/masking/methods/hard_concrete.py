"""Hard concrete gates (Louizos, Welling, Kingma 2018, arXiv 1712.01312): stretched and clipped binary variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.masking.gates import GateGroup, Gates, draw_uniformly
from bigram_circuits.recipe import SparsifyConfig

CONCRETE_TEMPERATURE, STRETCH_LOW, STRETCH_HIGH = 2 / 3, -0.1, 1.1


def hard_concrete(scores: Float[Tensor, " gate"], uniform: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """Sample the gates: clip(sigmoid((log u - log(1 - u) + s) / (2/3)) * (1.1 + 0.1) - 0.1, 0, 1), with u in (0, 1)."""
    return (_concrete(scores, uniform) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def hard_concrete_slope(scores: Float[Tensor, " gate"], uniform: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """Return the derivative of `hard_concrete` with respect to s: 0 where the sample is clipped."""
    concrete = _concrete(scores, uniform)
    stretched = concrete * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
    slope = concrete * (1 - concrete) * ((STRETCH_HIGH - STRETCH_LOW) / CONCRETE_TEMPERATURE)
    return slope.masked_fill_((stretched < 0) | (stretched > 1), 0)


def _concrete(scores: Float[Tensor, " gate"], uniform: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    return torch.sigmoid((uniform.logit() + scores) / CONCRETE_TEMPERATURE)


def probability_open(scores: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """Return P(gate > 0) = sigmoid(s - 2/3 * log(0.1 / 1.1)), whose sum is the expected L0 norm, which is penalised."""
    return torch.sigmoid(scores - CONCRETE_TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH))


class HardConcrete(Gates):
    """Sampled gates; the noise of each step is determined by the seed and the step."""

    learning_rate = 0.5
    scratch = 4

    def __init__(self, groups: Sequence[GateGroup], *, seed: int = 0, **start: Any) -> None:
        super().__init__(groups, **start)
        self._seed = seed
        self._uniform = self.scores.like(lambda one: torch.full_like(one, 0.5, dtype=torch.float32))

    @classmethod
    def from_config(
        cls, groups: Sequence[GateGroup], config: SparsifyConfig, *, seed: int, wanted: int | None, **start: Any
    ) -> HardConcrete:
        """Build the gates, with noise from the attempt's seed."""
        return cls(groups, seed=seed, **start)

    def refresh(self, step: int) -> None:
        """Draw the noise of a step."""
        draw_uniformly(self._uniform, 1e-6, 1 - 1e-6, self._seed * 1_000_003 + step)

    def soft(self, place: slice) -> Float[Tensor, " gate"]:
        """Sample a range of gates with the step's noise."""
        return hard_concrete(self._shifted(place), self._uniform[place])

    def slope(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the derivative of each sample: 0 where it is clipped."""
        return hard_concrete_slope(self._shifted(place), self._uniform[place])

    def penalised(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the probability that each gate is not 0."""
        return probability_open(self._shifted(place))


METHOD = HardConcrete
