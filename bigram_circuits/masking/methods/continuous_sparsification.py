"""Continuous sparsification (Savarese, Silva, Maire 2020, arXiv 1912.04427): sigmoid(beta * s), with a growing beta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bigram_circuits.masking.gates import Gates, Tie


def temperature(step: int, *, first: float, growth: float) -> float:
    """The factor beta at a step: `first * growth ** step`, at most 1e30 (by then every gate is decided)."""
    if math.log(first) + step * math.log(growth) > math.log(1e30):
        return 1e30
    return first * growth**step


def soft_gate(scores: Float[Tensor, " gate"], beta: float) -> Float[Tensor, " gate"]:
    """sigmoid(beta * s); it is also what is penalised."""
    return (beta * scores).sigmoid_()


class ContinuousSparsification(Gates):
    """Soft gates sigmoid(beta * s), with beta growing at every step."""

    def __init__(
        self, ties: Sequence[Tie], *, beta_start: float = 1.0, beta_growth: float = 1.0, **start: object
    ) -> None:
        super().__init__(ties, **start)  # type: ignore[arg-type]
        self._beta: Callable[[int], float] = lambda step: temperature(step, first=beta_start, growth=beta_growth)

    def refresh(self, step: int) -> None:
        """Set beta."""
        self.steepness = self._beta(step)

    def soft(self, place: slice) -> Float[Tensor, " gate"]:
        """sigmoid(beta * s)."""
        return soft_gate(self._shifted(place), self.steepness)

    def slope(self, place: slice) -> Float[Tensor, " gate"]:
        """Beta * soft * (1 - soft)."""
        soft = self.soft(place)
        return torch.addcmul(soft, soft, soft, value=-1, out=soft).mul_(self.steepness)

    def penalised(self, place: slice) -> Float[Tensor, " gate"]:
        """The soft gates themselves."""
        return self.soft(place)
