"""Straight-through top-k: the hard gate forward, the identity backward.

Bengio, Leonard, Courville 2013 (arXiv 1308.3432); the k highest scores as in Ramanujan et al. 2020 (arXiv 1911.13299).
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
    """The share kept at a step: from 1 down to `target` in equal factors over the first half of the steps."""
    return target ** min(1.0, step / max(1, steps // 2))


class StraightThrough(Gates):
    """The gates of highest score are open; their number falls to the target over the first half of the steps."""

    learning_rate = 1e-2
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
        """With as many weights as are wanted in the end."""
        assert wanted is not None, "the config was checked"
        return cls(groups, target=wanted, steps=config.max_steps, **start)

    def refresh(self, step: int) -> None:
        """Choose the open gates."""
        usable = int(self.scores.isfinite().sum()) if self._single else self.n_weights
        share = kept_share(step, target=self._target / self.n_weights, steps=self._steps)
        wanted = max(self._target, min(round(share * self.n_weights), usable))
        self._open, self._step = self.highest(wanted), step

    def soft(self, place: slice) -> Float[Tensor, " gate"]:
        """1 or 0."""
        return self._open[place].float()

    def slope(self, place: slice) -> Float[Tensor, " gate"]:
        """That of the identity, open or not; 0 for what is dropped for good."""
        return self.scores.detach()[place].isfinite().float()

    def penalised(self, place: slice) -> Float[Tensor, " gate"]:
        """The open gates: their number is given, so this has no gradient."""
        return self.soft(place)

    def undecided(self, between: int, above: int) -> tuple[int, int]:
        """All gates until the last step, since the scores go on competing; and the open ones."""
        return (0 if self._step == self._steps - 1 else len(self._open)), above

    def hard_gates(self) -> Bool[Tensor, " gate"]:
        """The gates of highest score, as many as in the last step."""
        return self._open

    def n_kept(self) -> int:
        """Number of gated weights that are kept."""
        return self._governed(self._open)


METHOD = StraightThrough
