"""The formulas of the masking methods. One so far: continuous sparsification (Savarese, Silva, Maire 2020).

Continuous sparsification. Every gate has one real score s. While learning, a weight is multiplied by the soft gate
sigmoid(beta * s); beta grows geometrically, which turns the soft gate into the hard one, s > 0, that is used
ever after. The penalty is the mean soft gate over all maskable weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def temperature(step: int, *, first: float, growth: float) -> float:
    """The factor beta at a step: `first * growth ** step`, at most 1e30 (by then every gate is decided)."""
    if math.log(first) + step * math.log(growth) > math.log(1e30):
        return 1e30
    return first * growth**step


def soft_gate(scores: Float[Tensor, " gate"], beta: float) -> Float[Tensor, " gate"]:
    """sigmoid(beta * s)."""
    return torch.sigmoid(beta * scores)


def hard_gate(scores: Float[Tensor, " gate"]) -> Bool[Tensor, " gate"]:
    """Open where s > 0: the limit of the soft gate as beta grows."""
    return scores > 0


def undecided(soft: Float[Tensor, " gate"]) -> tuple[int, int]:
    """(gates between 0.1 and 0.9, gates above 0.9): the paper stops when the first is under 1% of the second."""
    kept = int((soft > 0.9).sum())
    return int((soft > 0.1).sum()) - kept, kept


class Gates(nn.Module):
    """One score for each weight of each named tensor, all in one flat parameter, and their soft gates.

    `refresh(beta)` computes the soft gates of all tensors at once, with a graph back to the scores; `soft[name]` is
    then a view. So a training step computes each soft gate once, however often the weight is read.
    """

    def __init__(self, stored: Mapping[str, Tensor], *, first_score: float = 0.0) -> None:
        """Take the frozen weights by name, in stored layout; a weight that is exactly 0 starts, and stays, dropped."""
        super().__init__()
        self._shapes = {name: weight.shape for name, weight in stored.items()}
        zero = torch.cat([(weight == 0).flatten() for weight in stored.values()])
        scores = torch.full(zero.shape, first_score, device=zero.device, dtype=torch.float32)
        self.scores = nn.Parameter(scores.masked_fill_(zero, -torch.inf))
        self.soft: dict[str, Tensor] = {}

    def refresh(self, beta: float) -> Float[Tensor, " gate"]:
        """Compute all soft gates; returns them flat."""
        soft = soft_gate(self.scores, beta)
        self.soft = self._views(soft)
        return soft

    def n_open(self) -> int:
        """Number of hard gates that are open."""
        return int(hard_gate(self.scores.detach()).sum())

    def hard(self, fraction: float | None = None) -> dict[str, Bool[Tensor, "..."]]:
        """The hard gates by name, in stored layout; with `fraction`, exactly that share of them, the highest scores."""
        scores = self.scores.detach()
        if fraction is None:
            return self._views(hard_gate(scores))
        wanted, possible = round(fraction * len(scores)), int(scores.isfinite().sum())
        if wanted > possible:
            raise ValueError(f"cannot keep {wanted} weights: only {possible} of {len(scores)} are not exactly 0")
        open_gates = torch.zeros_like(scores, dtype=torch.bool)
        open_gates[scores.topk(wanted, sorted=False).indices] = True
        return self._views(open_gates)

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
