"""The maskable weights of a hooked model: a canonical name for each, and the module it is read from.

A site is an attention or MLP weight matrix of a block, with TransformerLens' name (`blocks.0.attn.W_Q`) and axes.
With grouped-query attention, each key and value head appears once, not repeated per query head. Weights are taken from
the leaf modules that the forward pass of a `TransformerBridge` actually uses; fused query-key-value matrices that the
bridge has split are no longer used and are not sites.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bigram_circuits.models.interventions import not_intervened
from bigram_circuits.models.model import Model
from bigram_circuits.models.quantised import check_layer
from bigram_circuits.models.state import in_use, memo
from bigram_circuits.names import COMPONENTS, WeightName, in_block

_ATTENTION = {
    "q": ("W_Q", "head d_model d_head", "(head d_head) d_model"),
    "k": ("W_K", "head d_model d_head", "(head d_head) d_model"),
    "v": ("W_V", "head d_model d_head", "(head d_head) d_model"),
    "o": ("W_O", "head d_head d_model", "d_model (head d_head)"),
}
_CONV1D = {  # from the axes of a linear layer's weight to those of a Conv1D's, which is transposed
    "(head d_head) d_model": "d_model (head d_head)",
    "d_model (head d_head)": "(head d_head) d_model",
    "d_mlp d_model": "d_model d_mlp",
    "d_model d_mlp": "d_mlp d_model",
}
_MLP = {
    "in": ("W_in", "d_model d_mlp", "d_mlp d_model"),
    "gate": ("W_gate", "d_model d_mlp", "d_mlp d_model"),
    "out": ("W_out", "d_mlp d_model", "d_model d_mlp"),
}

_LISTED = "weight_sites"  # their key in the memo; a model that is dropped during the call is not kept alive by it


class WeightGate(nn.Module, ABC):
    """A torch parametrization that masks a leaf module's weight; `full_weights` switches it off."""

    active = True
    kept: Tensor | None = None
    """The masked weight, where it is not made anew for every pass without gradients (`masked_once`)."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as the forward pass sees it."""
        if not self.active:
            return weight
        return self.gate(weight) if self.kept is None or torch.is_grad_enabled() else self.kept

    @abstractmethod
    def gate(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""


def gate_of(leaf: nn.Module) -> WeightGate | None:
    """What masks a leaf module's weight; None if nothing does."""
    if not parametrize.is_parametrized(leaf, "weight"):
        return None
    parametrizations = list(leaf.parametrizations["weight"])  # type: ignore[index]
    return parametrizations[0] if len(parametrizations) == 1 and isinstance(parametrizations[0], WeightGate) else None


@contextmanager
def full_weights(model: Model) -> Iterator[None]:
    """Within the `with` block, a masked or gated model runs with all its weights and nodes."""
    gates = [module for module in model.modules() if isinstance(module, WeightGate) and module.active]
    for gate in gates:
        gate.active = False
    try:
        with not_intervened(model):
            yield
    finally:
        for gate in gates:
            gate.active = True


@dataclass(frozen=True)
class WeightSite:
    """One maskable weight matrix.

    Example:
        >>> site = bc.weight_sites(model)[0]
        >>> print(site.name, site.axes, site.shape)
    """

    name: str
    """Canonical name, for example `blocks.0.attn.W_Q`."""
    shape: tuple[int, ...]
    """Canonical shape, in the order of `axes`."""
    axes: str
    """Names of the canonical axes: `head d_model d_head`, `head d_head d_model`, `d_model d_mlp` or `d_mlp d_model`."""
    layer: int
    """Index of the block."""
    component: str
    """`attn` or `mlp`."""
    leaf: nn.Module = field(repr=False, compare=False)
    """The module whose `weight` the forward pass reads."""
    stored_axes: str = field(repr=False, compare=False)
    """The axes of `leaf.weight`."""

    @property
    def matrix(self) -> str:
        """Name of the matrix within its component, for example `W_Q`."""
        return WeightName.parse(self.name).matrix

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.original.numel()

    @property
    def original(self) -> Tensor:
        """The frozen weight as stored (`stored_axes`), without any mask currently applied."""
        weight = _stored_weight(self.leaf)
        assert weight is not None, f"the leaf of {self.name} has no weight"
        return weight

    @property
    def weight(self) -> Tensor:
        """The frozen weight in canonical shape."""
        return self.from_stored(self.original.detach())

    def to_stored(self, canonical: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Rearrange a tensor from canonical shape to the leaf module's layout."""
        return rearrange(canonical, f"{self.axes} -> {self.stored_axes}")

    def from_stored(self, stored: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Rearrange a tensor from the leaf module's layout to canonical shape."""
        sizes = {"head": self.shape[0]} if "head" in self.axes.split() else {}
        return rearrange(stored, f"{self.stored_axes} -> {self.axes}", **sizes)


def weight_sites(model: Model) -> tuple[WeightSite, ...]:
    """List every maskable weight of a `TransformerBridge`, block by block; once within a call of a public function.

    Raises:
        ValueError: If the model cannot be masked as a whole: it has no blocks, none of them has an attention or MLP,
            one is not made of plain weight matrices that fit together, a block has further weight matrices (mixtures of
            experts, state-space and hybrid blocks), blocks share weights, or weights are quantised.

    Example:
        >>> sum(site.size for site in bc.weight_sites(model))  # the number of maskable weights
    """
    with in_use(model, "weight_sites", block=True):  # while no other thread is masking it
        known = memo()
        if known is None:
            return _weight_sites(model)
        listed: WeakKeyDictionary[Model, tuple[WeightSite, ...]] = known.setdefault(_LISTED, WeakKeyDictionary())
        if model not in listed:
            listed[model] = _weight_sites(model)
        return listed[model]


def _weight_sites(model: Model) -> tuple[WeightSite, ...]:
    blocks = getattr(model, "blocks", None)
    if blocks is None or len(blocks) == 0:
        raise ValueError(f"{type(model).__name__} has no transformer blocks to mask: pass a model from load_model")
    sites = tuple(site for layer, block in enumerate(blocks) for site in _block_sites(model, layer, block))
    if not sites:
        raise ValueError("this model cannot be masked: no block has an attention or an MLP")
    owners: dict[int, str] = {}
    for site in sites:
        if (other := owners.setdefault(id(site.original), site.name)) != site.name:
            raise ValueError(f"this model cannot be masked: {site.name} and {other} are one shared weight")
    return sites


def _block_sites(model: Model, layer: int, block: Any) -> list[WeightSite]:
    parts = {name: part for name in COMPONENTS if (part := getattr(block, name, None)) is not None}
    sites = [*(_attention_sites(model, layer, block) if "attn" in parts else ())]
    sites += _mlp_sites(layer, block) if "mlp" in parts else ()
    for component, part in parts.items():
        _check_nothing_is_left_out(in_block(layer, component), part, sites)
    _check_nothing_is_left_out(f"blocks.{layer}", block, sites, but=tuple(parts.values()))
    return sites


def _attention_sites(model: Model, layer: int, block: nn.Module) -> list[WeightSite]:
    found = _leaves(layer, block, "attn", _ATTENTION)
    sizes = {name: leaf.sizes for name, leaf in found.items()}  # (outputs, inputs)
    over_heads, d_model = sizes["W_O"][1], sizes["W_O"][0]
    heads = model.cfg.n_heads
    d_head = over_heads // heads  # not cfg.d_head, which falls back to d_model / n_heads
    where = f"this model cannot be masked: {in_block(layer, 'attn')}"
    if over_heads != heads * d_head:
        raise ValueError(f"{where}.W_O reads {over_heads} values, not a multiple of the {heads} heads")
    if sizes["W_Q"] != (over_heads, d_model):
        raise ValueError(
            f"{where}.W_Q is {_by(sizes['W_Q'])} (outputs by inputs), but {heads} heads of {d_head} "
            f"need {_by((over_heads, d_model))}"
        )
    groups, rest = divmod(sizes["W_K"][0], d_head)
    if sizes["W_V"] != sizes["W_K"] or sizes["W_K"][1] != d_model or rest or groups == 0 or heads % groups:
        raise ValueError(
            f"{where}.W_K is {_by(sizes['W_K'])} and W_V {_by(sizes['W_V'])} (outputs by inputs), which are not whole "
            f"heads of {d_head} shared evenly by {heads} query heads"
        )
    shapes = {
        "W_Q": (heads, d_model, d_head),
        "W_K": (groups, d_model, d_head),
        "W_V": (groups, d_model, d_head),
        "W_O": (heads, d_head, d_model),
    }
    return [leaf.site(shapes[name], layer, "attn") for name, leaf in found.items()]


def _mlp_sites(layer: int, block: nn.Module) -> list[WeightSite]:
    found = _leaves(layer, block, "mlp", _MLP)
    sizes = {name: leaf.sizes for name, leaf in found.items()}
    d_mlp, d_model = sizes["W_in"]
    if sizes["W_out"] != (d_model, d_mlp) or sizes.get("W_gate", sizes["W_in"]) != sizes["W_in"]:
        shown = ", ".join(f"{name} {_by(size)}" for name, size in sizes.items())
        raise ValueError(
            f"this model cannot be masked: the matrices of {in_block(layer, 'mlp')} do not fit together as neurons: "
            f"{shown} (outputs by inputs)"
        )
    return [
        leaf.site((d_mlp, d_model) if name == "W_out" else (d_model, d_mlp), layer, "mlp")
        for name, leaf in found.items()
    ]


@dataclass(frozen=True)
class _Leaf:
    """A leaf module under its canonical name, before the canonical shape is known."""

    name: str
    axes: str
    module: nn.Module
    stored_axes: str
    sizes: tuple[int, int]  # outputs, inputs

    def site(self, shape: tuple[int, ...], layer: int, component: str) -> WeightSite:
        return WeightSite(self.name, shape, self.axes, layer, component, self.module, self.stored_axes)


def _leaves(layer: int, block: nn.Module, component: str, table: dict[str, tuple[str, str, str]]) -> dict[str, _Leaf]:
    """Find the leaf modules of a block's attention or MLP, by canonical matrix name."""
    part = getattr(block, component, None)
    found: dict[str, _Leaf] = {}
    for attribute, (matrix, axes, linear_axes) in table.items():
        module = getattr(getattr(part, attribute, None), "original_component", None)
        if module is None and attribute == "gate":
            continue  # an MLP without a gate
        name = str(WeightName(layer, component, matrix))
        weight = None if module is None else _stored_weight(module)
        if module is not None:
            check_layer(name, module, weight)
        if weight is None or weight.ndim != 2:
            kind = type(getattr(part, "original_component", part)).__name__
            what = in_block(layer, component) + ("" if part is None else f" ({kind})")
            raise ValueError(f"this model cannot be masked: {what} has no plain {matrix}")
        outputs, inputs = weight.shape
        stored_axes = linear_axes
        if not isinstance(module, nn.Linear):  # Hugging Face's Conv1D stores [in, out]
            if not any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
                raise ValueError(
                    f"this model cannot be masked: {name} is in a {type(module).__name__}, not a linear layer"
                )
            outputs, inputs = inputs, outputs
            stored_axes = _CONV1D[linear_axes]
        assert module is not None
        found[matrix] = _Leaf(name, axes, module, stored_axes, (outputs, inputs))
    return found


def _stored_weight(module: nn.Module) -> Tensor | None:
    if parametrize.is_parametrized(module, "weight"):
        return module.parametrizations["weight"].original  # type: ignore[index, return-value]
    return getattr(module, "weight", None)


def _check_nothing_is_left_out(
    where: str, part: nn.Module, sites: list[WeightSite], but: tuple[nn.Module, ...] = ()
) -> None:
    """Raise ValueError if a module of a block has a weight matrix that is neither a site nor a norm's or embedding's.

    A fused matrix (query-key-value, or gate and up) stays listed after the bridge has split it; it is unused, so it is
    allowed.
    """
    known = {id(site.original) for site in sites} | {id(weight) for other in but for weight in other.parameters()}
    mine = {site.matrix: site.size for site in sites if site.name.startswith(where + ".")}
    together = (("W_Q", "W_K", "W_V"), ("W_in", "W_gate"))
    fused = [sum(mine[name] for name in names) for names in together if mine.keys() >= set(names)]
    for owner, _, name, weight in _other_matrices(part, known):
        if not but and weight.ndim == 2 and weight.numel() in fused:
            fused.remove(weight.numel())  # at most one fused matrix of each kind
            known.add(id(weight))
            continue
        path = re.sub(r"_?original_component\.?", "", f"{owner}.{name}").replace("..", ".")
        raise ValueError(
            f"this model cannot be masked: {where} has the weight {path} {_by(weight.shape)}, which is not one of "
            f"the query, key, value, output and MLP matrices"
        )


def _other_matrices(part: nn.Module, known: set[int]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Weight matrices within a module, but those of norms and embeddings and the known: owner's path, owner, name."""
    for path, module in part.named_modules():
        if isinstance(module, nn.Embedding) or "Norm" in type(module).__name__:
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim >= 2 and id(weight) not in known:
                yield path, module, name, weight


def fused_modules(model: Model, sites: Iterable[WeightSite]) -> list[nn.Module]:
    """The modules of matrices that the bridge has split (query-key-value, gate and up); they are listed, but unused."""
    known = {id(site.original) for site in sites}
    return [module for block in model.blocks for _, module, _, _ in _other_matrices(block, known)]


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))
