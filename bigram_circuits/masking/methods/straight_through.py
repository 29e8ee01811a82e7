"""Straight-through top-k: the hard gate in the forward pass, the identity in the backward pass.

Straight-through estimator: Bengio, Leonard, Courville 2013 (arXiv 1308.3432). Top-k scores: Ramanujan et al. 2020
(arXiv 1911.13299).

The gradient at open gates is blind to what is saturated: where attention is sharp, a query may shrink by half and
nothing changes, and where several gates are needed together, none of them has a gradient once one is closed. With
`along_path`, open gates are therefore multiplied by a point between 0 and 1, another one at every step, while their
number falls. What a score sums up is then, step by step, the integrated gradient (Sundararajan, Taly, Yan 2017, arXiv
1703.01365) along the path from everything closed to what is open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bigram_circuits.masking.gates import GateGroup, Gates
from bigram_circuits.recipe import SparsifyConfig

_GOLDEN = (5**0.5 - 1) / 2


def kept_share(step: int, *, target: float, steps: int) -> float:
    """Return the share kept at a step: it falls geometrically from 1 to `target` over the first half of the steps."""
    return target ** min(1.0, step / max(1, steps // 2))


def path_point(step: int) -> float:
    """Return where on the path from closed (0) to open gates (1) a step is: multiples of the golden ratio, modulo 1.

    They fill the interval evenly, however many there are.
    """
    return (step + 1) * _GOLDEN % 1.0


class StraightThrough(Gates):
    """Keeps the highest-scoring gates open; their number falls to the target over the first half of the steps."""

    learning_rate = 1.0
    scratch = 16
    ends_hard = True

    def __init__(
        self, groups: Sequence[GateGroup], *, target: int, steps: int, along_path: bool = False, **start: Any
    ) -> None:
        super().__init__(groups, **start)
        self._target, self._steps, self._step = target, steps, 0
        self._along_path, self._point = along_path, 1.0
        self._open = self.scores.like(lambda one: torch.ones_like(one, dtype=torch.bool))

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
        return cls(groups, target=wanted, steps=config.max_steps, along_path=config.along_path, **start)

    def optimizer(self, config: SparsifyConfig, rate: float, decay: float) -> torch.optim.Optimizer:
        """Build gradient descent with momentum 0.9.

        A score is then the sum of what its weight contributed (weight x gradient) so far, so that scores of weights
        that matter more are higher. AdamW would move every score at the same speed. Only the ranks of the scores count,
        so the learning rate does not matter.
        """
        return torch.optim.SGD(self.scores.tensors, lr=rate, momentum=0.9)

    def refresh(self, step: int) -> None:
        """Select the gates that are open at a step, and how far."""
        usable = self.n_possible if self._single else self.n_weights
        share = kept_share(step, target=self._target / self.n_weights, steps=self._steps)
        wanted = max(self._target, min(round(share * self.n_weights), usable))
        self._open, self._step = self.scores.split(self.highest(wanted)), step
        self._point = path_point(step) if self._along_path and step < self.settles_at else 1.0

    def soft(self, place: slice) -> Float[Tensor, " gate"]:
        """Return 1, or the point of the path, for open gates; 0 for closed ones."""
        return self._open[place].float().mul_(self._point)

    def slope(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the slope of the identity, 1, for open and closed gates alike; 0 for gates that can never open."""
        return self.scores[place].detach().isfinite().float()

    def penalised(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the open gates; their number is fixed by the schedule, so there is nothing to differentiate."""
        return self._open[place].float()

    @property
    def settles_at(self) -> int:
        """The step from which as many gates are open as in the end, and fully."""
        return self._steps // 2

    @property
    def is_hard(self) -> bool:
        """Whether the gates of the step set by `refresh` are a mask, and not a point of the path to it."""
        return self._point == 1.0

    def undecided(self, between: int, above: int) -> tuple[int, int]:
        """Count all gates as undecided until the last step, since the scores keep competing; then none."""
        return (0 if self._step == self._steps - 1 else len(self._open)), above

    def hard(self, place: slice) -> Bool[Tensor, " gate"]:
        """Return whether each of a range of gates was open in the last step."""
        return self._open[place]

    def n_kept(self) -> int:
        """Return the number of gated weights that are kept."""
        return self._over_weights(lambda place: self._open[place].float())


METHOD = StraightThrough
