"""Straight-through top-k: the hard gate in the forward pass, the identity in the backward pass.

Straight-through estimator: Bengio, Leonard, Courville 2013 (arXiv 1308.3432). Top-k scores: Ramanujan et al. 2020
(arXiv 1911.13299).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bigram_circuits.masking.gates import GateGroup, Gates
from bigram_circuits.recipe import SparsifyConfig


def kept_share(step: int, *, target: float, steps: int) -> float:
    """Return the share kept at a step: it falls geometrically from 1 to `target` over the first half of the steps."""
    return target ** min(1.0, step / max(1, steps // 2))


class StraightThrough(Gates):
    """Keeps the highest-scoring gates open; their number falls to the target over the first half of the steps."""

    learning_rate = 1.0
    scratch = 16

    def __init__(self, groups: Sequence[GateGroup], *, target: int, steps: int, **start: Any) -> None:
        super().__init__(groups, **start)
        self._target, self._steps, self._step = target, steps, 0
        self._open = torch.ones_like(self.scores, dtype=torch.bool, requires_grad=False)

    @classmethod
    def check_config(cls, config: SparsifyConfig) -> None:
        """Raise ValueError unless the recipe says how many weights to keep."""
        if config.target_fraction is None:
            raise ValueError("straight_through keeps the highest scores: say how many with target_fraction")

    @classmethod
    def from_config(
        cls, groups: Sequence[GateGroup], config: SparsifyConfig, *, seed: int, wanted: int | None, **start: Any
    ) -> StraightThrough:
        """Build the gates, with `wanted` as the final number of weights."""
        assert wanted is not None, "the config was checked"
        return cls(groups, target=wanted, steps=config.max_steps, **start)

    def optimizer(self, config: SparsifyConfig, rate: float, decay: float) -> torch.optim.Optimizer:
        """Build gradient descent with momentum 0.9.

        A score is then the sum of what its weight contributed (weight x gradient) so far, so that scores of weights
        that matter more are higher. AdamW would move every score at the same speed. Only the ranks of the scores count,
        so the learning rate does not matter.
        """
        return torch.optim.SGD([self.scores], lr=rate, momentum=0.9)

    def refresh(self, step: int) -> None:
        """Select the gates that are open at a step."""
        usable = int(self.scores.isfinite().sum()) if self._single else self.n_weights
        share = kept_share(step, target=self._target / self.n_weights, steps=self._steps)
        wanted = max(self._target, min(round(share * self.n_weights), usable))
        self._open, self._step = self.highest(wanted), step

    def soft(self, place: slice) -> Float[Tensor, " gate"]:
        """Return 1 for open gates, 0 for closed ones."""
        return self._open[place].float()

    def slope(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the slope of the identity, 1, for open and closed gates alike; 0 for gates that can never open."""
        return self.scores.detach()[place].isfinite().float()

    def penalised(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the open gates; their number is fixed by the schedule, so there is nothing to differentiate."""
        return self.soft(place)

    @property
    def settles_at(self) -> int:
        """The step from which as many gates are open as in the end."""
        return self._steps // 2

    @property
    def is_hard(self) -> bool:
        """True: the gates of every step are a mask."""
        return True

    def undecided(self, between: int, above: int) -> tuple[int, int]:
        """Count all gates as undecided until the last step, since the scores keep competing; then none."""
        return (0 if self._step == self._steps - 1 else len(self._open)), above

    def hard_gates(self) -> Bool[Tensor, " gate"]:
        """Return the gates that were open in the last step."""
        return self._open

    def n_kept(self) -> int:
        """Return the number of gated weights that are kept."""
        return self._governed(self._open)


METHOD = StraightThrough
