"""The formulas of the masking methods, and the gates that they harden.

A gate governs one weight, or is tied over all weights of a neuron, a head or a block. While a mask is learned, a weight
is multiplied by its gate's soft value; what is kept in the end are the weights whose hard gate is open. A method says
how the soft value comes from the gate's score, what is penalised, and when a gate is decided:

- **Continuous sparsification** (Savarese, Silva, Maire 2020, arXiv 1912.04427).
- **Hard concrete** (Louizos, Welling, Kingma 2018, arXiv 1712.01312).
- **Straight-through top-k** (Bengio, Leonard, Courville 2013, arXiv 1308.3432; the k highest scores as in Ramanujan et
  al. 2020, arXiv 1911.13299).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from bigram_circuits.sites import WeightSite

# --- continuous sparsification: sigmoid(beta * s), hardened by a growing beta ---------------------------------------


def temperature(step: int, *, first: float, growth: float) -> float:
    """The factor beta at a step: `first * growth ** step`, at most 1e30 (by then every gate is decided)."""
    if math.log(first) + step * math.log(growth) > math.log(1e30):
        return 1e30
    return first * growth**step


def soft_gate(scores: Float[Tensor, " gate"], beta: float) -> Float[Tensor, " gate"]:
    """sigmoid(beta * s); it is also what is penalised."""
    return torch.sigmoid(beta * scores)


def hard_gate(scores: Float[Tensor, " gate"]) -> Bool[Tensor, " gate"]:
    """Open where s > 0: the limit of `soft_gate` as beta grows, and the median of `hard_concrete` above one half."""
    return scores > 0


def undecided(soft: Float[Tensor, " gate"]) -> tuple[int, int]:
    """(gates between 0.1 and 0.9, gates above 0.9): the paper stops when the first is under 1% of the second."""
    kept = int((soft > 0.9).sum())
    return int((soft > 0.1).sum()) - kept, kept


# --- hard concrete: a stretched, clipped binary concrete variable -----------------------------------------------------

CONCRETE_TEMPERATURE, STRETCH_LOW, STRETCH_HIGH = 2 / 3, -0.1, 1.1


def hard_concrete(scores: Float[Tensor, " gate"], uniform: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """A sample of the gate: clip(sigmoid((log u - log(1 - u) + s) / 2/3) * (1.1 + 0.1) - 0.1, 0, 1), u in (0, 1)."""
    concrete = torch.sigmoid((uniform.log() - (1 - uniform).log() + scores) / CONCRETE_TEMPERATURE)
    return (concrete * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def probability_open(scores: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """P(gate > 0) = sigmoid(s - 2/3 * log(0.1 / 1.1)): the expected L0 norm, which is what is penalised."""
    return torch.sigmoid(scores - CONCRETE_TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH))


# --- straight-through top-k: the hard gate forward, the identity backward ---------------------------------------------


def straight_through(hard: Bool[Tensor, " gate"], scores: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """1 where the gate is open, else 0; the gradient with respect to the scores is that of the identity."""
    finite = scores.masked_fill(scores.isinf(), 0.0)
    return hard.to(scores.dtype) + (finite - finite.detach())


def kept_share(step: int, *, target: float, steps: int) -> float:
    """The share kept at a step: from 1 down to `target` in equal factors over the first half of the steps."""
    return target ** min(1.0, step / max(1, steps // 2))


# --- which weights a gate governs ------------------------------------------------------------------------------------


UNITS = {"weight": ("attn", "mlp"), "neuron": ("mlp",), "head": ("attn",), "block": ("attn", "mlp")}
"""The units a gate may govern, and the components that have them."""


@dataclass(frozen=True)
class Tie:
    """The gates that govern a weight matrix: a stretch of all gates, and how each is spread over the weights."""

    site: WeightSite
    """The weight matrix."""
    unit: str
    """`weight`, `neuron` (a row of W_out with a column of W_in and W_gate), `head` or `block` (all matrices of it)."""
    start: int
    """The first of its gates; matrices of one head, neuron or block have the same gates."""
    count: int
    """Number of its gates."""

    def spread(self, gates: Shaped[Tensor, " gate"]) -> Shaped[Tensor, "..."]:
        """The gate of every weight, in the stored layout, or a shape that broadcasts to it.

        With grouped queries a gate governs a query head. Its key and value head is shared by a group; the gate of these
        is the largest of the group's: they are kept as long as one head of the group is.
        """
        own = gates[self.start : self.start + self.count]
        if self.unit == "weight":
            return own.view(self.site.original.shape)
        if self.unit == "block":
            return own.view(1, 1)
        along_rows = self.site.stored_axes.startswith(("(", "d_mlp"))
        if self.unit == "head":
            heads = self.site.shape[0]
            width = max(self.site.original.shape[0 if along_rows else 1] // heads, 1)
            if heads != self.count:
                own = own.view(heads, self.count // heads).amax(1)
            own = own.repeat_interleave(width)
        return own[:, None] if along_rows else own[None, :]


def tie_gates(
    sites: Sequence[WeightSite], granularity: Mapping[str, str], layers: Sequence[int] | None = None
) -> tuple[Tie, ...]:
    """Lay out the gates of all sites whose component is in `granularity` and whose layer is in `layers` (None: all).

    Raises:
        ValueError: If there is nothing to gate, or no such layer.
    """
    last = max(site.layer for site in sites)
    wrong = [layer for layer in layers or () if not 0 <= layer <= last]
    if wrong:
        raise ValueError(f"there is no layer {wrong[0]}: layers are 0 to {last}")
    ties: list[Tie] = []
    stretches: dict[tuple[int, str], tuple[int, int]] = {}
    end = 0
    for site in sites:
        unit = granularity.get(site.component)
        if unit is None or (layers is not None and site.layer not in layers):
            continue
        place = (site.layer, site.component)
        if unit == "weight" or place not in stretches:
            count = {"weight": site.size, "block": 1, "head": site.shape[0], "neuron": site.shape[-1]}[unit]
            stretches[place] = (end, count)
            end += count
        ties.append(Tie(site, unit, *stretches[place]))
    if not ties:
        raise ValueError(f"nothing to mask: granularity {dict(granularity)} and layers {layers} leave no weights")
    return tuple(ties)


# --- the gates of a model --------------------------------------------------------------------------------------------


class Gates(nn.Module, ABC):
    """One score for each gate, all in one flat parameter, and the soft gates that a method makes of them.

    `refresh(step)` computes all soft gates at once, with a graph back to the scores; `soft[name]` is then the gate of
    every weight of a matrix. So a training step computes each soft gate once, however often the weight is read.
    """

    def __init__(
        self,
        ties: Sequence[Tie],
        *,
        first_score: float = 0.0,
        within: Mapping[str, Bool[Tensor, "..."]] | None = None,
    ) -> None:
        """Start every gate at `first_score`, but drop for good what is outside.

        A weight that is exactly 0, or not in `within` (masks by name, stored layout), starts and stays dropped; so does
        a tied gate all of whose weights are.
        """
        super().__init__()
        self.ties = tuple(ties)
        self.n_weights = sum(tie.site.size for tie in ties)
        n_gates = max(tie.start + tie.count for tie in ties)
        alive = torch.zeros(n_gates, device=ties[0].site.original.device)
        for tie in ties:
            usable = tie.site.original != 0
            if within is not None:
                usable &= within[tie.site.name].to(usable.device)
            alive[tie.start : tie.start + tie.count] += _governs_any(tie, usable)
        scores = torch.full_like(alive, first_score).masked_fill_(alive == 0, -torch.inf)
        self.scores = nn.Parameter(scores)
        self.threshold = 0.0  # a gate is open above it; moved by `aim`
        self.soft: dict[str, Tensor] = {}
        self._single = all(tie.unit == "weight" for tie in ties)

    @abstractmethod
    def soft_gates(self, step: int) -> Float[Tensor, " gate"]:
        """The soft value of every gate at a step."""

    @abstractmethod
    def penalised(self, step: int) -> Float[Tensor, " gate"]:
        """What the penalty averages, by gate."""

    @abstractmethod
    def undecided(self, step: int) -> tuple[int, int]:
        """(gates not decided yet, gates decided to stay open)."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the weight matrices that are gated."""
        return frozenset(tie.site.name for tie in self.ties)

    def refresh(self, step: int) -> Float[Tensor, ""]:
        """Compute all soft gates; returns the penalty: the mean of what is penalised over all gated weights."""
        gates = self.soft_gates(step)
        self.soft = {tie.site.name: tie.spread(gates) for tie in self.ties}
        return self.mean_over_weights(self.penalised(step))

    def aim(self, wanted: int) -> None:
        """Move the threshold so that the open gates are those of highest score that govern at most `wanted` weights."""
        scores = self.scores.detach()
        wanted = min(wanted, int(scores.isfinite().sum())) if self._single else wanted
        if self._single and 0 < wanted < len(scores) and scores.device.type == "cpu":
            place = len(scores) - wanted  # a partition is several times faster here than finding the highest
            below, above = (
                float(edge) for edge in np.partition(scores.numpy(), (place - 1, place))[place - 1 : place + 1]
            )
        else:
            chosen = self.highest(wanted)
            below = scores[~chosen].max().item() if not chosen.all() else -math.inf
            above = scores[chosen].min().item() if chosen.any() else math.inf
        if math.isfinite(below) and math.isfinite(above):
            self.threshold = (below + above) / 2
        else:  # all that can be open is, or nothing is
            self.threshold = above - 1.0 if math.isfinite(above) else below + 1.0

    def n_above_zero(self) -> int:
        """Number of gated weights whose score is above 0: those that would be kept without a target."""
        return self._governed(hard_gate(self.scores.detach()))

    def mean_over_weights(self, gates: Float[Tensor, " gate"]) -> Float[Tensor, ""]:
        """Mean over the gated weights of a value by gate."""
        if self._single:
            return gates.mean()
        total = torch.zeros((), device=gates.device)
        for tie in self.ties:
            total = total + tie.spread(gates).mean() * tie.site.size
        return total / self.n_weights

    def hard_gates(self) -> Bool[Tensor, " gate"]:
        """Whether each gate is open, once learning is over."""
        return hard_gate(self.scores.detach() - self.threshold)

    def n_kept(self) -> int:
        """Number of gated weights that are kept."""
        return self._governed(self.hard_gates())

    def masks(self, wanted: int | None = None) -> dict[str, Bool[Tensor, "..."]]:
        """The hard gate of every gated weight, by name, in stored layout.

        With `wanted`, the gates with the highest scores that together govern at most so many weights: exactly so many
        where a gate governs one weight.
        """
        hard = self.hard_gates() if wanted is None else self.highest(wanted)
        shapes = {tie.site.name: tie.site.original.shape for tie in self.ties}
        return {tie.site.name: tie.spread(hard.float()).bool().expand(shapes[tie.site.name]) for tie in self.ties}

    def highest(self, wanted: int) -> Bool[Tensor, " gate"]:
        """The gates of highest score that together govern at most `wanted` weights."""
        scores = self.scores.detach()
        possible = int(scores.isfinite().sum())
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        if self._single:
            if wanted > possible:
                raise ValueError(f"cannot keep {wanted} weights: only {possible} are neither 0 nor excluded")
            chosen[scores.topk(wanted, sorted=False).indices] = True
            return chosen
        order = scores.argsort(descending=True, stable=True)[:possible]
        low, high = 0, possible  # the longest prefix that fits, by bisection: what is kept grows with the prefix
        while low < high:
            middle = (low + high + 1) // 2
            if self._governed(torch.zeros_like(chosen).index_fill_(0, order[:middle], True)) <= wanted:
                low = middle
            else:
                high = middle - 1
        chosen[order[:low]] = True
        return chosen

    def _governed(self, chosen: Bool[Tensor, " gate"]) -> int:
        """Number of weights that the chosen gates govern."""
        if self._single:
            return int(chosen.sum())
        return round(self.mean_over_weights(chosen.double()).item() * self.n_weights)


def _governs_any(tie: Tie, usable: Bool[Tensor, "..."]) -> Float[Tensor, " gate"]:
    """1 for each gate of a tie that governs a usable weight: where the sum over these has a gradient."""
    if tie.unit == "weight":
        return usable.flatten().float()
    gates = torch.zeros(tie.start + tie.count, device=usable.device, requires_grad=True)
    (gradient,) = torch.autograd.grad((tie.spread(gates) * usable).sum(), gates)
    return (gradient[tie.start :] > 0).float()


class ContinuousSparsification(Gates):
    """Soft gates sigmoid(beta * s), with beta growing at every step."""

    def __init__(
        self, ties: Sequence[Tie], *, beta_start: float = 1.0, beta_growth: float = 1.0, **start: object
    ) -> None:
        super().__init__(ties, **start)  # type: ignore[arg-type]
        self._beta: Callable[[int], float] = lambda step: temperature(step, first=beta_start, growth=beta_growth)
        self._soft = torch.zeros(0)

    def soft_gates(self, step: int) -> Float[Tensor, " gate"]:
        """sigmoid(beta * s)."""
        self._soft = soft_gate(self.scores - self.threshold, self._beta(step))
        return self._soft

    def penalised(self, step: int) -> Float[Tensor, " gate"]:
        """The soft gates themselves."""
        return self._soft

    def undecided(self, step: int) -> tuple[int, int]:
        """Soft gates from 0.1 to 0.9, and above."""
        return undecided(self._soft.detach())


class HardConcrete(Gates):
    """Sampled gates; the noise of a step is drawn from the seed and the step."""

    def __init__(self, ties: Sequence[Tie], *, seed: int = 0, **start: object) -> None:
        super().__init__(ties, **start)  # type: ignore[arg-type]
        self._seed = seed

    def soft_gates(self, step: int) -> Float[Tensor, " gate"]:
        """A sample of every gate."""
        generator = torch.Generator(self.scores.device).manual_seed(self._seed * 1_000_003 + step)
        uniform = torch.rand(self.scores.shape, generator=generator, device=self.scores.device)
        return hard_concrete(self.scores - self.threshold, uniform.clamp(1e-6, 1 - 1e-6))

    def penalised(self, step: int) -> Float[Tensor, " gate"]:
        """The probability that the gate is not 0."""
        return probability_open(self.scores - self.threshold)

    def undecided(self, step: int) -> tuple[int, int]:
        """Gates that are open with a probability from 0.1 to 0.9, and above."""
        return undecided(probability_open(self.scores.detach() - self.threshold))


class StraightThrough(Gates):
    """The gates of highest score are open; their number falls to the target over the first half of the steps."""

    def __init__(self, ties: Sequence[Tie], *, target: int, steps: int, **start: object) -> None:
        super().__init__(ties, **start)  # type: ignore[arg-type]
        self._share: Callable[[int], float] = lambda step: kept_share(step, target=target / self.n_weights, steps=steps)
        self._target, self._steps = target, steps
        self._open = torch.ones_like(self.scores, dtype=torch.bool)

    def soft_gates(self, step: int) -> Float[Tensor, " gate"]:
        """1 or 0, with the identity's gradient."""
        usable = int(self.scores.isfinite().sum()) if self._single else self.n_weights
        wanted = max(self._target, min(round(self._share(step) * self.n_weights), usable))
        self._open = self.highest(wanted)
        return straight_through(self._open, self.scores)

    def penalised(self, step: int) -> Float[Tensor, " gate"]:
        """The open gates: their number is given, so this has no gradient."""
        return self._open.float()

    def undecided(self, step: int) -> tuple[int, int]:
        """All gates until the last step, since the scores go on competing; and the open ones."""
        return (0 if step == self._steps - 1 else len(self._open)), int(self._open.sum())

    def hard_gates(self) -> Bool[Tensor, " gate"]:
        """The gates of highest score, as many as in the last step."""
        return self._open
