"""Gates that are being learned: one score per gate, over single weights or entire neurons, heads or blocks.

While a mask is learned, each weight is multiplied by the soft value of its gate; the final mask keeps the weights whose
hard gate is open. The masking method (`methods/`) defines how the soft value follows from the score, what is penalised,
and when a gate counts as decided.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from bigram_circuits.masking.parted import Parted
from bigram_circuits.models.edges import EdgeSite
from bigram_circuits.models.nodes import NodeSite
from bigram_circuits.models.weights import WeightSite
from bigram_circuits.recipe import SparsifyConfig


def hard_gate(scores: Float[Tensor, " gate"]) -> Bool[Tensor, " gate"]:
    """Return True where s > 0: the limit of `soft_gate` as beta grows; for `hard_concrete`, a median above 1/2."""
    return scores > 0


UNDECIDED, DECIDED = 0.1, 0.9
"""A gate is undecided between these two values; the paper stops once undecided gates are under 1% of those above."""


# --- which weights a gate governs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """Places that are gated one by one and are no weights: the nodes of a hook point, or the edges to it."""

    of: NodeSite | EdgeSite
    """The nodes of a hook point, or the edges to it."""
    original: Float[Tensor, "..."] = field(repr=False, compare=False)
    """Ones, in the shape of the mask."""
    cost: int = 1
    """What each counts towards the size of a mask."""

    @property
    def name(self) -> str:
        """The hook point."""
        return self.of.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the mask."""
        return tuple(self.original.shape)

    @property
    def size(self) -> int:
        """What all of them count."""
        return self.original.numel() * self.cost


@dataclass(frozen=True)
class GateGroup:
    """The gates of one weight matrix or hook point: a contiguous range of all gates, and how each is broadcast."""

    site: WeightSite | Slots
    """The weight matrix, or the nodes."""
    unit: str
    """What one gate governs: a `weight`, a `neuron` (a row of W_out and a column of W_in and W_gate), a `head`, a
    `block` (all matrices of a block's attention or MLP), or a `node`, which need not count as one weight."""
    start: int
    """Index of the first gate; the matrices of a head, neuron or block share their gates."""
    count: int
    """Number of gates."""

    @property
    def place(self) -> slice:
        """The range of these gates among all gates."""
        return slice(self.start, self.start + self.count)

    def spread(self, own: Shaped[Tensor, " own"]) -> Shaped[Tensor, "..."]:
        """Expand one value per gate to the weights, in the stored layout or a shape that broadcasts to it.

        With grouped-query attention a gate governs a query head. A key and value head is shared by a group of query
        heads and takes the largest of their gates, so it is kept as long as any head of the group is.
        """
        if self.unit in ("weight", "node"):
            return own.view(self.site.original.shape)
        if self.unit == "block":
            return own.view(1, 1)
        assert isinstance(self.site, WeightSite), "of a node, the gate is the mask"
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
        ValueError: If there is nothing to gate, or a layer does not exist.
    """
    last = max(site.layer for site in sites)
    wrong = [layer for layer in layers or () if not 0 <= layer <= last]
    if wrong:
        raise ValueError(f"there is no layer {wrong[0]}: layers are 0 to {last}")
    _check_has(granularity, {site.component for site in sites})
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


def _check_has(granularity: Mapping[str, str], components: set[str]) -> None:
    """Raise ValueError if a unit is of a component that the model lacks; one unit for both may be of either alone."""
    lacking = [component for component in granularity if component not in components]
    if lacking and not (components & set(granularity) and len(set(granularity.values())) == 1):
        what = {"attn": "attention", "mlp": "MLP"}[lacking[0]]
        raise ValueError(f"this model has no {what}, but granularity {dict(granularity)} needs one")


_SEEDS_OF_DEVICES = 1_000_000_007  # between the seeds of the devices of one model


# --- what opens closed gates again -----------------------------------------------------------------------------------


class Adversary:
    """A value a from 0 to 1 for every gate, which opens it further: from s to s + (1 - s) a.

    What is learned under it withstands whatever becomes of that which it drops (`worst_case_ablation`). At every step
    of learning it begins anew, at random, and goes up the loss by the sign of its gradient (Madry et al. 2018, arXiv
    1706.06083); what is learned goes down the loss that it has found.
    """

    step = 0.25
    """How far it moves at a time."""

    def __init__(self, scores: Parted) -> None:
        """Start with an adversary that opens nothing."""
        self.values = scores.like(torch.zeros_like)
        """a, by gate."""
        self.is_climbing = False
        """Whether gradients are its own, and not the scores'."""
        self.pull = scores.like(torch.zeros_like)
        """The sum of the gradients noted since it last climbed."""

    def begin(self, seed: int) -> None:
        """Draw a uniformly from 0 to 1, and climb from there."""
        draw_uniformly(self.values, 0.0, 1.0, seed)
        self.is_climbing = True

    def opens(self, soft: Float[Tensor, " gate"], place: slice) -> Float[Tensor, " gate"]:
        """Return s + (1 - s) a for a range of gates; `soft` is overwritten."""
        return soft.lerp_(torch.ones_like(soft), self.values[place].to(soft))

    def left(self, slope: Float[Tensor, " gate"], place: slice) -> Float[Tensor, " gate"]:
        """Return the slope of a range of gates' values by the scores, given that of s; `slope` is overwritten."""
        return slope.mul_(1 - self.values[place])

    def feel(self, of_value: Float[Tensor, " gate"], place: slice) -> None:
        """Note a gradient by the values of a range of gates."""
        self.pull[place].add_(of_value)

    def climb(self) -> None:
        """Go up the gradients noted since the last time: by the sign of each, within 0 and 1."""
        for values, pull in zip(self.values.tensors, self.pull.tensors, strict=True):
            values.add_(pull.sign_(), alpha=self.step).clamp_(0, 1)
            pull.zero_()


def draw_uniformly(numbers: Parted, low: float, high: float, seed: int) -> None:
    """Overwrite a number for every gate by draws from a uniform distribution; every device draws its own."""
    generators: dict[torch.device, torch.Generator] = {}
    for part in numbers.tensors:
        if part.device not in generators:
            own = seed + len(generators) * _SEEDS_OF_DEVICES
            generators[part.device] = torch.Generator(part.device).manual_seed(own)
        part.uniform_(low, high, generator=generators[part.device])


# --- the gates of a model --------------------------------------------------------------------------------------------

_AT_ONCE = {"cpu": 1 << 20}  # gates processed at once, to fit in the CPU cache
_AT_ONCE_ELSEWHERE = 1 << 24  # float32 counts exactly only up to 2**24
_SAMPLED = 1 << 22  # about how many scores a threshold is estimated from, if there are more


class Gates(ABC):
    """One score per gate, and the soft gates that a masking method computes from them.

    Scores are in the order of the gates, in a flat parameter for every device of the model: usually one.

    A training step consists of `refresh(step)`, `penalise(sparsity_weight)`, and the forward and backward pass of a
    model whose gated weights are replaced by `gate(name, weight)`. Only weights and scores are stored for the backward
    pass: soft gates are recomputed, and their gradients are accumulated in the `grad` of the scores in place.
    """

    learning_rate: ClassVar[float]
    """The optimizer's learning rate if the recipe gives none."""
    scratch: ClassVar[int] = 0
    """Bytes per gate that the method needs besides scores, gradient and Adam's moments."""
    ends_hard: ClassVar[bool] = False
    """Whether the gates of the last steps are the mask itself, whatever the recipe says."""
    steepness = 1.0
    """Slope factor of the penalised value, a logistic function of the score: steepness * value * (1 - value)."""

    def __init__(
        self,
        groups: Sequence[GateGroup],
        *,
        first_score: float = 0.0,
        within: Mapping[str, Bool[Tensor, "..."]] | None = None,
        times_kept: Mapping[str, Shaped[Tensor, "..."]] | None = None,
        overlap_weight: float = 0.0,
        dtype: torch.dtype = torch.float32,
        by_block: bool = False,
    ) -> None:
        """Start every gate at `first_score`, except those that can never open.

        A weight that is exactly 0, or not in `within` (masks by name, in stored layout), is dropped from the start for
        good; so is a shared gate if all its weights are. `times_kept` says how many other masks keep each weight, by
        name and in stored layout: `penalise` then also charges `overlap_weight` (nats) for them, and if that is
        infinite, every gate of a weight that another mask keeps is dropped from the start. `dtype` is that of the
        scores and their gradient. `by_block` makes a part of the scores of every block.
        """
        self.groups = tuple(groups)
        self.n_weights = sum(group.site.size for group in groups)
        scores = Parted(
            [
                torch.full((count,), -torch.inf, dtype=dtype, device=device)
                for device, count in _devices(groups, by_block)
            ]
        )
        for group in groups:
            usable = group.site.original != 0
            if within is not None:
                usable &= within[group.site.name].to(usable.device)
            own = scores[group.place]
            own.masked_fill_(_governs_any(group, usable).to(own.device), first_score)
        self._overlap_weight, self._times_kept = overlap_weight, None
        if times_kept is not None:
            of_gates = _mean_over_governed(self.groups, times_kept, scores)
            if math.isinf(overlap_weight):
                for own, times in zip(scores.tensors, of_gates.tensors, strict=True):
                    own.masked_fill_(times > 0, -torch.inf)
            else:
                self._times_kept = of_gates
        self.scores = Parted([nn.Parameter(own) for own in scores.tensors])
        """What is learned."""
        self.threshold = 0.0  # gates are open above it; changed by `set_threshold`
        self.adversary: Adversary | None = None
        """What opens closed gates while masks are learned to withstand it; None: nothing does."""
        self._group_of = {group.site.name: group for group in groups}
        self._single = all(group.unit == "weight" or group.site.size == group.count for group in groups)

    @classmethod  # noqa: B027 (most methods have nothing to check)
    def check_config(cls, config: SparsifyConfig) -> None:
        """Raise ValueError if a recipe lacks an option that the method needs."""

    @classmethod
    @abstractmethod
    def from_config(
        cls, groups: Sequence[GateGroup], config: SparsifyConfig, *, seed: int, wanted: int | None, **start: Any
    ) -> Gates:
        """Build the gates that a recipe asks for.

        Args:
            groups: The gate groups, from `group_gates`.
            config: The recipe.
            seed: Seed of the attempt.
            wanted: Number of gated weights to keep in the end; None leaves it to the penalty.
            **start: Keyword arguments of the constructor.
        """

    def optimizer(self, config: SparsifyConfig, rate: float, decay: float) -> torch.optim.Optimizer:
        """Build the optimizer of the scores: AdamW with a recipe's weight decay.

        Args:
            config: The recipe.
            rate: The learning rate.
            decay: AdamW's beta_2.
        """
        return torch.optim.AdamW(
            self.scores.tensors, lr=rate, weight_decay=config.weight_decay, betas=(0.9, decay), fused=True
        )

    @abstractmethod
    def refresh(self, step: int) -> None:
        """Update the soft gates for a training step."""

    @abstractmethod
    def soft(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the soft values of a range of gates, as a new tensor."""

    @abstractmethod
    def slope(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the derivative of each soft value with respect to its score, as a new tensor."""

    @abstractmethod
    def penalised(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the value, from 0 to 1, that the penalty averages over weights, as a new tensor."""

    def undecided(self, between: int, above: int) -> tuple[int, int]:
        """Return the numbers of undecided gates and of gates decided to stay open.

        `between` and `above` count the penalised values from 0.1 to 0.9 and above 0.9; a method may count differently.
        """
        return between, above

    @property
    def settles_at(self) -> int:
        """The step from which a jump of the loss counts as one: earlier steps prepare the gates."""
        return 0

    @property
    def is_hard(self) -> bool:
        """Whether the gates of the step set by `refresh` are the mask itself, 0 or 1, and not soft."""
        return False

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate at a step."""
        return 1.0

    @property
    def names(self) -> frozenset[str]:
        """Names of the weight matrices and hook points that are gated."""
        return frozenset(self._group_of)

    @property
    def sites(self) -> list[NodeSite | EdgeSite]:
        """The hook points whose nodes are gated, or the edges to which are."""
        return [group.site.of for group in self.groups if isinstance(group.site, Slots)]

    def gate(self, name: str, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Multiply a weight matrix, in stored layout, by its soft gates; only `scores` receives a gradient."""
        group = self._group_of[name]
        if group.unit == "weight":
            return _GatedWeight.apply(self.scores.holding(group.place), weight, self, group.place)
        soft: Tensor = _SoftGates.apply(self.scores.holding(group.place), self, group.place)
        return weight * group.spread(soft).to(weight)

    def of_nodes(self, name: str) -> Float[Tensor, "..."]:
        """Return the soft gates of a hook point's nodes, or of the edges to it, in the shape of their mask."""
        group = self._group_of[name]
        soft: Tensor = _SoftGates.apply(self.scores.holding(group.place), self, group.place)
        return group.spread(soft)

    @torch.no_grad()
    def penalise(self, sparsity_weight: float) -> tuple[float, int, int]:
        """Set the scores' `grad` to that of the penalty; the backward pass then adds the gradient of the loss.

        The penalty is `sparsity_weight` times the mean of `penalised` over all gated weights; and, apart from other
        masks, the overlap weight times the mean over all gated weights of soft gate times the number of those masks
        that keep what the gate governs (a mean, if it governs several weights).

        Returns:
            The first mean, the number of undecided gates, and the number of gates decided to stay open.
        """
        gradient = self.gradient
        sums = []
        for place, groups in self._pieces():
            value, slope = self.penalised(place), gradient[place]
            total, share = _over_weights(value, groups)
            sums.append(torch.stack([total, *(_above(value, edge).sum() for edge in (UNDECIDED, DECIDED))]))
            torch.addcmul(value, value, value, value=-1, out=slope)
            slope *= self.steepness * sparsity_weight / self.n_weights
            if self._times_kept is not None:
                of_overlap = self.slope(place).mul_(self._times_kept[place])
                slope.add_(of_overlap, alpha=self._overlap_weight / self.n_weights)
            if share is not None:
                slope *= share
        total, beyond, above = self.scores.add_up(_sum(sums)).tolist()
        return total / self.n_weights, *self.undecided(int(beyond - above), int(above))

    def set_threshold(self, wanted: int) -> None:
        """Set the threshold so that the open gates are the highest-scoring ones that govern at most `wanted` weights.

        With several million gates of single weights, it is estimated from an evenly spaced sample of them.
        """
        every = -(-len(self.scores) // _SAMPLED) if self._single else 1
        scores, wanted = self.scores.sample(every).detach(), wanted // every
        if self._single:
            wanted = min(wanted, int(scores.isfinite().sum()))
            at = len(scores) - wanted  # a partition is several times faster than topk
            ordered = np.partition(scores.float().cpu().numpy(), (max(at - 1, 0), min(at, len(scores) - 1)))
            below = float(ordered[at - 1]) if at else -math.inf
            above = float(ordered[at]) if wanted else math.inf
        else:
            chosen = self.highest(wanted)
            below = scores[~chosen].max().item() if not chosen.all() else -math.inf
            above = scores[chosen].min().item() if chosen.any() else math.inf
        if math.isfinite(below) and math.isfinite(above):
            self.threshold = (below + above) / 2
        else:  # every gate that can open is open, or none is
            self.threshold = above - 1.0 if math.isfinite(above) else below + 1.0

    @property
    def n_possible(self) -> int:
        """Number of gated weights whose gate can open."""
        return self._over_weights(lambda place: self.scores[place].detach().isfinite().float())

    def n_kept(self) -> int:
        """Return the number of gated weights that are kept."""
        return self._n_above(self.threshold)

    def n_above_zero(self) -> int:
        """Return the number of gated weights with a score above 0, which would be kept if no size were targeted."""
        return self._n_above(0.0)

    def hard(self, place: slice) -> Bool[Tensor, " gate"]:
        """Return whether each of a range of gates is open once learning has ended."""
        return hard_gate(self.scores[place].detach() - self.threshold)

    def masks(self, wanted: int | None = None) -> dict[str, Bool[Tensor, "..."]]:
        """Return the hard gate of every gated weight, by name, in stored layout.

        With `wanted`, open the highest-scoring gates that together govern at most that many weights: exactly that many
        if each gate governs a single weight.
        """
        hard = self.hard if wanted is None else self.highest(wanted).__getitem__
        return {
            group.site.name: group.spread(hard(group.place).float()).bool().expand(group.site.original.shape)
            for group in self.groups
        }

    def highest(self, wanted: int) -> Bool[Tensor, " gate"]:
        """Select the highest-scoring gates that together govern at most `wanted` weights."""
        scores = self.scores.flat().detach()
        possible = int(scores.isfinite().sum())
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        if self._single:
            if wanted > possible:
                raise ValueError(f"cannot keep {wanted} weights: only {possible} are neither 0 nor excluded")
            chosen[scores.topk(wanted, sorted=False).indices] = True
            return chosen
        order = scores.argsort(descending=True, stable=True)[:possible]
        low, high = 0, possible  # bisect for the longest prefix that fits: the kept weights grow with it
        while low < high:
            middle = (low + high + 1) // 2
            if self._governed(torch.zeros_like(chosen).index_fill_(0, order[:middle], True)) <= wanted:
                low = middle
            else:
                high = middle - 1
        chosen[order[:low]] = True
        return chosen

    def value(self, place: slice) -> Float[Tensor, " gate"]:
        """Return how far a range of gates is open in the forward pass: softly, and as far as the adversary opens it."""
        soft = self.soft(place)
        return soft if self.adversary is None else self.adversary.opens(soft, place)

    def add_gradient(self, place: slice, of_value: Float[Tensor, " gate"]) -> None:
        """Add the gradient of a range of gates' values to the scores' gradient, or to that of a climbing adversary."""
        if self.adversary is not None and self.adversary.is_climbing:
            self.adversary.feel(of_value, place)
            return
        slope = self.slope(place)
        if self.adversary is not None:
            slope = self.adversary.left(slope, place)
        self.gradient[place].addcmul_(slope, of_value)

    @property
    def gradient(self) -> Parted:
        """The scores' `grad`, which is allocated once and then reused."""
        return self.scores.gradient()

    @property
    def is_finite(self) -> bool:
        """Whether no score is NaN, as scores become after a gradient that is not finite."""
        return not any(scores.detach().sum().isnan() for scores in self.scores.tensors)

    def _shifted(self, place: slice) -> Float[Tensor, " gate"]:
        """Return the scores minus the threshold."""
        scores = self.scores[place].detach().float()
        return scores - self.threshold if self.threshold else scores

    def _pieces(self) -> Iterator[tuple[slice, list[GateGroup]]]:
        """Yield all gates: in chunks of bounded size if each gates one weight, else with the groups that share them."""
        stretches = _stretches(self.groups)
        if self._single:
            stretches = {(place.start, place.stop): [] for place in self.scores.places}
        for (start, end), groups in stretches.items():
            if self._single or groups[0].unit == "weight":
                at_once = _AT_ONCE.get(self.scores[start:end].device.type, _AT_ONCE_ELSEWHERE)
                yield from ((slice(at, min(at + at_once, end)), []) for at in range(start, end, at_once))
            else:
                yield slice(start, end), groups

    def _n_above(self, threshold: float) -> int:
        """Return the number of weights whose gate's score is above a threshold."""
        return self._over_weights(lambda place: _above(self.scores[place].detach(), threshold))

    def _governed(self, chosen: Bool[Tensor, " gate"]) -> int:
        """Return the number of weights that the chosen gates govern."""
        return self._over_weights(lambda place: chosen[place].float())

    def _over_weights(self, of: Callable[[slice], Float[Tensor, " gate"]]) -> int:
        """Sum an integer-valued function of the gate over all weights."""
        sums = [_over_weights(of(place), groups)[0] for place, groups in self._pieces()]
        return round(self.scores.add_up(_sum(sums)).item())


def _stretches(groups: Sequence[GateGroup]) -> dict[tuple[int, int], list[GateGroup]]:
    """The groups of every range of gates, by its first gate and its end, in the order of the gates."""
    stretches: dict[tuple[int, int], list[GateGroup]] = {}
    for group in groups:
        stretches.setdefault((group.start, group.start + group.count), []).append(group)
    return stretches


def _devices(groups: Sequence[GateGroup], by_block: bool) -> list[tuple[torch.device, int]]:
    """The device of the weights that gates govern, and the number of gates in a row whose weights are there.

    With `by_block`, of the weights of every block.
    """
    parts: list[tuple[torch.device, int]] = []
    last = None
    for (start, end), sharing in _stretches(groups).items():
        site = sharing[0].site
        place = (site.original.device, site.layer if by_block and isinstance(site, WeightSite) else None)
        count = end - start
        if parts and place == last:
            count += parts.pop()[1]
        parts.append((place[0], count))
        last = place
    return parts


def _sum(pieces: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
    """Sum tensors of one shape, which may be on several devices, in float64."""
    return torch.stack([one.to(pieces[0].device) for one in pieces]).double().sum(0)


def _over_weights(
    values: Float[Tensor, " gate"], groups: Sequence[GateGroup]
) -> tuple[Float[Tensor, ""], Float[Tensor, " gate"] | None]:
    """Sum a per-gate value over weights; also return its gradient, the number of weights per gate (None: one each)."""
    if not groups:
        return values.sum(), None
    with torch.enable_grad():
        own = values.detach().double().requires_grad_()
        total = torch.stack([group.spread(own).mean() * group.site.size for group in groups]).sum()
        (share,) = torch.autograd.grad(total, own)
    return total.detach(), share


def _above(values: Float[Tensor, " gate"], edge: float) -> Float[Tensor, " gate"]:
    """Return 1.0 where a value is above an edge, else 0.0; floats are summed faster than booleans."""
    return torch.gt(values, edge, out=torch.empty_like(values, dtype=torch.float32))


def _governs_any(group: GateGroup, usable: Bool[Tensor, "..."]) -> Bool[Tensor, " gate"]:
    """Return whether each gate governs a usable weight, that is, where the sum over usable weights has a gradient."""
    if group.unit == "weight":
        return usable.flatten()
    with torch.inference_mode(False), torch.enable_grad():
        gates = torch.zeros(group.count, dtype=torch.float32, device=usable.device, requires_grad=True)
        (gradient,) = torch.autograd.grad((group.spread(gates) * usable).sum(), gates)
    return gradient > 0


def _mean_over_governed(
    groups: Sequence[GateGroup], numbers: Mapping[str, Shaped[Tensor, "..."]], like: Parted
) -> Parted:
    """Return the mean of a number over the weights that each gate governs; heads share key-value heads equally.

    Float32, in the parts of `like`; the numbers are by name, in stored layout.
    """
    total, governed = (like.like(lambda one: torch.zeros_like(one, dtype=torch.float32)) for _ in range(2))
    for group in groups:
        number = numbers[group.site.name].to(total[group.place])
        if group.unit == "weight":
            total[group.place].copy_(number.flatten())
            governed[group.place].fill_(1.0)
            continue
        with torch.inference_mode(False), torch.enable_grad():
            own = torch.zeros(group.count, dtype=torch.float32, device=number.device, requires_grad=True)
            each = group.spread(own).expand(number.shape)
            for sums, factor in ((total, number), (governed, torch.ones_like(number))):
                sums[group.place].add_(torch.autograd.grad((each * factor).sum(), own, retain_graph=True)[0])
    for sums, counts in zip(total.tensors, governed.tensors, strict=True):
        sums.div_(counts)
    return total


# --- gated weights, and their gradient ---


class _GatedWeight(torch.autograd.Function):
    """weight * soft gate, one gate per weight; saves only the weight itself for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, gates: Gates, place: slice) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.gates, ctx.place = gates, place
        return gates.value(place).view(weight.shape).to(weight.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        (weight,) = ctx.saved_tensors
        ctx.gates.add_gradient(ctx.place, grad_outputs[0].reshape(-1) * weight.reshape(-1))
        return None, None, None, None


class _SoftGates(torch.autograd.Function):
    """Soft values of gates that govern many weights each."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, gates: Gates, place: slice) -> Tensor:
        ctx.gates, ctx.place = gates, place
        return gates.value(place)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        ctx.gates.add_gradient(ctx.place, grad_outputs[0])
        return None, None, None
