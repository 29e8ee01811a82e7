"""Gates that are being learned: one score each, over single weights or whole neurons, heads and blocks.

While a mask is learned, a weight is multiplied by the soft value of its gate; what is kept in the end are the weights
whose hard gate is open. How the soft value comes from the score, what is penalised, and when a gate counts as decided
is up to the masking method (`methods/`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from bigram_circuits.models.weights import WeightSite
from bigram_circuits.recipe import SparsifyConfig


def hard_gate(scores: Float[Tensor, " gate"]) -> Bool[Tensor, " gate"]:
    """Open where s > 0: the limit of `soft_gate` as beta grows, and the median of `hard_concrete` above one half."""
    return scores > 0


UNDECIDED, DECIDED = 0.1, 0.9
"""A gate is undecided between these two; the paper stops when such gates number less than 1% of those above."""


# --- which weights a gate governs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateGroup:
    """The gates that govern a weight matrix: a stretch of all gates, and how each is spread over the weights."""

    site: WeightSite
    """The weight matrix."""
    unit: str
    """`weight`, `neuron` (a row of W_out with a column of W_in and W_gate), `head` or `block` (all matrices of it)."""
    start: int
    """The first of its gates; matrices of one head, neuron or block have the same gates."""
    count: int
    """Number of its gates."""

    @property
    def place(self) -> slice:
        """Where its gates are among all gates."""
        return slice(self.start, self.start + self.count)

    def spread(self, own: Shaped[Tensor, " own"]) -> Shaped[Tensor, "..."]:
        """From a value for each of its gates: that of every weight, in the stored layout or a shape that broadcasts.

        With grouped queries a gate governs a query head. Its key and value head is shared by a group; the gate of these
        is the largest of the group's: they are kept as long as one head of the group is.
        """
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


def group_gates(
    sites: Sequence[WeightSite], granularity: Mapping[str, str], layers: Sequence[int] | None = None
) -> tuple[GateGroup, ...]:
    """Lay out the gates of all sites whose component is in `granularity` and whose layer is in `layers` (None: all).

    Raises:
        ValueError: If there is nothing to gate, or no such layer.
    """
    last = max(site.layer for site in sites)
    wrong = [layer for layer in layers or () if not 0 <= layer <= last]
    if wrong:
        raise ValueError(f"there is no layer {wrong[0]}: layers are 0 to {last}")
    groups: list[GateGroup] = []
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
        groups.append(GateGroup(site, unit, *stretches[place]))
    if not groups:
        raise ValueError(f"nothing to mask: granularity {dict(granularity)} and layers {layers} leave no weights")
    return tuple(groups)


# --- the gates of a model --------------------------------------------------------------------------------------------

_AT_ONCE = {"cpu": 1 << 20}  # gates in one piece: what stays in the processor's cache
_AT_ONCE_ELSEWHERE = 1 << 24  # float32 counts exactly only up to 2**24
_SAMPLED = 1 << 22  # scores that a threshold is found from, of more


class Gates(nn.Module, ABC):
    """One score for each gate, all in one flat parameter, and the soft gates that a method makes of them.

    A training step is `refresh(step)`, `penalise(sparsity_weight)`, and the forward and backward pass of a model in
    which every weight is replaced by `gate(name, weight)`. For the backward pass nothing is kept but weights and
    scores: soft gates are computed anew, and what they make of the gradient is added to `scores.grad` where it lies.
    """

    learning_rate: ClassVar[float]
    """AdamW's, where the recipe gives none."""
    scratch: ClassVar[int] = 0
    """What the method holds besides scores, gradient and moments: bytes for each gate."""
    steepness = 1.0
    """What is penalised is a logistic function of the score: its slope is this times value * (1 - value)."""

    def __init__(
        self,
        groups: Sequence[GateGroup],
        *,
        first_score: float = 0.0,
        within: Mapping[str, Bool[Tensor, "..."]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start every gate at `first_score`, but drop for good what is outside.

        A weight that is exactly 0, or not in `within` (masks by name, stored layout), starts and stays dropped; so does
        a tied gate all of whose weights are. `dtype` is that of the scores and their gradient.
        """
        super().__init__()
        self.groups = tuple(groups)
        self.n_weights = sum(group.site.size for group in groups)
        n_gates = max(group.start + group.count for group in groups)
        scores = torch.full((n_gates,), -torch.inf, dtype=dtype, device=groups[0].site.original.device)
        for group in groups:
            usable = group.site.original != 0
            if within is not None:
                usable &= within[group.site.name].to(usable.device)
            scores[group.place].masked_fill_(_governs_any(group, usable), first_score)
        self.scores = nn.Parameter(scores)
        self.threshold = 0.0  # a gate is open above it; moved by `set_threshold`
        self._group_of = {group.site.name: group for group in groups}
        self._single = all(group.unit == "weight" for group in groups)

    @classmethod
    def check_config(cls, config: SparsifyConfig) -> None:
        """Raise ValueError if a recipe lacks what the method needs."""

    @classmethod
    @abstractmethod
    def from_config(
        cls, groups: Sequence[GateGroup], config: SparsifyConfig, *, seed: int, wanted: int | None, **start: Any
    ) -> Gates:
        """The gates of a recipe.

        Args:
            groups: What they govern.
            config: The recipe.
            seed: Of the attempt.
            wanted: How many gated weights to keep in the end; None: as many as turn out.
            **start: As for the constructor.
        """

    @abstractmethod
    def refresh(self, step: int) -> None:
        """Set the soft gates to a step."""

    @abstractmethod
    def soft(self, place: slice) -> Float[Tensor, " gate"]:
        """The soft values of some gates, as a new tensor."""

    @abstractmethod
    def slope(self, place: slice) -> Float[Tensor, " gate"]:
        """The derivative of some soft values with respect to their scores, as a new tensor."""

    @abstractmethod
    def penalised(self, place: slice) -> Float[Tensor, " gate"]:
        """What the penalty averages, for some gates, as a new tensor: from 0 to 1."""

    def undecided(self, between: int, above: int) -> tuple[int, int]:
        """(gates not decided yet, gates decided to stay open), if so many are penalised from 0.1 to 0.9, and above."""
        return between, above

    @property
    def names(self) -> frozenset[str]:
        """Names of the weight matrices that are gated."""
        return frozenset(self._group_of)

    def gate(self, name: str, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A weight matrix, in stored layout, times its soft gates; only `scores` gets a gradient."""
        group = self._group_of[name]
        if group.unit == "weight":
            return _GatedWeight.apply(self.scores, weight, self, group.place)
        soft: Tensor = _SoftGates.apply(self.scores, self, group.place)
        return weight * group.spread(soft).to(weight.dtype)

    @torch.no_grad()
    def penalise(self, sparsity_weight: float) -> tuple[float, int, int]:
        """Set `scores.grad` to the gradient of the penalty, to which the backward pass then adds that of the loss.

        The penalty is `sparsity_weight` times the mean over all gated weights of what is penalised.

        Returns:
            That mean; the number of gates that are not decided yet; and of those that are decided to stay open.
        """
        gradient = _gradient(self.scores)
        sums = []
        for place, groups in self._pieces():
            value, slope = self.penalised(place), gradient[place]
            total, share = _over_weights(value, groups)
            sums.append(torch.stack([total, *(_above(value, edge).sum() for edge in (UNDECIDED, DECIDED))]))
            torch.addcmul(value, value, value, value=-1, out=slope)
            slope *= self.steepness * sparsity_weight / self.n_weights
            if share is not None:
                slope *= share
        total, beyond, above = torch.stack(sums).double().sum(0).tolist()
        return total / self.n_weights, *self.undecided(int(beyond - above), int(above))

    def set_threshold(self, wanted: int) -> None:
        """Move the threshold so that the open gates are those of highest score that govern at most `wanted` weights.

        Where there are more than some million gates of single weights it is found from a sample of them, evenly spaced.
        """
        scores = self.scores.detach()
        if self._single and len(scores) > _SAMPLED:
            every = -(-len(scores) // _SAMPLED)
            scores, wanted = scores[::every], wanted // every
        wanted = min(wanted, int(scores.isfinite().sum())) if self._single else wanted
        if self._single and 0 < wanted < len(scores):
            at = len(scores) - wanted  # a partition is several times faster than finding the highest
            ordered = np.partition(scores.float().cpu().numpy(), (at - 1, at))
            below, above = float(ordered[at - 1]), float(ordered[at])
        else:
            chosen = self.highest(wanted)
            below = scores[~chosen].max().item() if not chosen.all() else -math.inf
            above = scores[chosen].min().item() if chosen.any() else math.inf
        if math.isfinite(below) and math.isfinite(above):
            self.threshold = (below + above) / 2
        else:  # all that can be open is, or nothing is
            self.threshold = above - 1.0 if math.isfinite(above) else below + 1.0

    def n_kept(self) -> int:
        """Number of gated weights that are kept."""
        return self._n_above(self.threshold)

    def n_above_zero(self) -> int:
        """Number of gated weights whose score is above 0: those that would be kept without a target."""
        return self._n_above(0.0)

    def hard_gates(self) -> Bool[Tensor, " gate"]:
        """Whether each gate is open, once learning is over."""
        return hard_gate(self.scores.detach() - self.threshold)

    def masks(self, wanted: int | None = None) -> dict[str, Bool[Tensor, "..."]]:
        """The hard gate of every gated weight, by name, in stored layout.

        With `wanted`, the gates with the highest scores that together govern at most so many weights: exactly so many
        where a gate governs one weight.
        """
        hard = self.hard_gates() if wanted is None else self.highest(wanted)
        return {
            group.site.name: group.spread(hard[group.place].float()).bool().expand(group.site.original.shape)
            for group in self.groups
        }

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

    def _shifted(self, place: slice) -> Float[Tensor, " gate"]:
        """Scores less the threshold."""
        scores = self.scores.detach()[place].float()
        return scores - self.threshold if self.threshold else scores

    def _pieces(self) -> Iterator[tuple[slice, list[GateGroup]]]:
        """All gates, in pieces of bounded size where each governs one weight; else with the groups that share them."""
        at_once = _AT_ONCE.get(self.scores.device.type, _AT_ONCE_ELSEWHERE)
        stretches: dict[tuple[int, int], list[GateGroup]] = {}
        for group in self.groups:
            stretches.setdefault((group.start, group.start + group.count), []).append(group)
        if self._single:
            stretches = {(0, len(self.scores)): list(self.groups)}
        for (start, end), groups in stretches.items():
            if groups[0].unit == "weight":
                yield from ((slice(at, min(at + at_once, end)), []) for at in range(start, end, at_once))
            else:
                yield slice(start, end), groups

    def _n_above(self, threshold: float) -> int:
        """Number of gated weights that are governed by gates with a score above a threshold."""
        return self._over_weights(lambda place: _above(self.scores.detach()[place], threshold))

    def _governed(self, chosen: Bool[Tensor, " gate"]) -> int:
        """Number of weights that the chosen gates govern."""
        return self._over_weights(lambda place: chosen[place].float())

    def _over_weights(self, of: Callable[[slice], Float[Tensor, " gate"]]) -> int:
        """The sum over weights of whole numbers by gate."""
        sums = [_over_weights(of(place), groups)[0] for place, groups in self._pieces()]
        return round(torch.stack(sums).double().sum().item())


def _over_weights(
    values: Float[Tensor, " gate"], groups: Sequence[GateGroup]
) -> tuple[Float[Tensor, ""], Float[Tensor, " gate"] | None]:
    """The sum over weights of a value by gate, and its gradient: how many weights count for each (None: one)."""
    if not groups:
        return values.sum(), None
    with torch.enable_grad():
        own = values.detach().double().requires_grad_()
        total = torch.stack([group.spread(own).mean() * group.site.size for group in groups]).sum()
        (share,) = torch.autograd.grad(total, own)
    return total.detach(), share


def _above(values: Float[Tensor, " gate"], edge: float) -> Float[Tensor, " gate"]:
    """1 where a value is above an edge, else 0: as numbers, which are summed faster than truth values."""
    return torch.gt(values, edge, out=torch.empty_like(values, dtype=torch.float32))


def _governs_any(group: GateGroup, usable: Bool[Tensor, "..."]) -> Bool[Tensor, " gate"]:
    """Whether each gate of a group governs a usable weight: where the sum over these has a gradient."""
    if group.unit == "weight":
        return usable.flatten()
    gates = torch.zeros(group.count, device=usable.device, requires_grad=True)
    (gradient,) = torch.autograd.grad((group.spread(gates) * usable).sum(), gates)
    return gradient > 0


# --- gated weights, and their gradient ---


def _gradient(scores: nn.Parameter) -> Float[Tensor, " gate"]:
    """The scores' gradient, which is made once and then written over."""
    if scores.grad is None:
        scores.grad = torch.zeros_like(scores)
    return scores.grad


class _GatedWeight(torch.autograd.Function):
    """weight * soft gate, of single weights. Nothing of the weights' size is kept but the weight itself."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, gates: Gates, place: slice) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.gates, ctx.place = gates, place
        return gates.soft(place).view(weight.shape).to(weight.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        (weight,) = ctx.saved_tensors
        from_weight = grad_outputs[0].reshape(-1) * weight.reshape(-1)
        _gradient(ctx.gates.scores)[ctx.place].addcmul_(ctx.gates.slope(ctx.place), from_weight)
        return None, None, None, None


class _SoftGates(torch.autograd.Function):
    """The soft values of gates that govern many weights each."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, gates: Gates, place: slice) -> Tensor:
        ctx.gates, ctx.place = gates, place
        return gates.soft(place)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        _gradient(ctx.gates.scores)[ctx.place] += ctx.gates.slope(ctx.place).mul_(grad_outputs[0])
        return None, None, None


# --- the methods ---
