"""The maskable weights of a hooked model: one canonical address each, and where the forward pass reads it.

A site is an attention or MLP weight matrix of a block, named as TransformerLens names it (`blocks.0.attn.W_Q`), in
TransformerLens' axes, with key and value heads counted once each (not repeated for grouped queries). It is read from
the leaf modules that the forward pass of a `TransformerBridge` really uses; fused query-key-value matrices that the
bridge has split are dead and are not sites.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ATTENTION = {
    "q": ("W_Q", "head d_model d_head", "(head d_head) d_model"),
    "k": ("W_K", "head d_model d_head", "(head d_head) d_model"),
    "v": ("W_V", "head d_model d_head", "(head d_head) d_model"),
    "o": ("W_O", "head d_head d_model", "d_model (head d_head)"),
}
_MLP = {
    "in": ("W_in", "d_model d_mlp", "d_mlp d_model"),
    "gate": ("W_gate", "d_model d_mlp", "d_mlp d_model"),
    "out": ("W_out", "d_mlp d_model", "d_model d_mlp"),
}


class WeightGate(nn.Module):
    """What masks put on a leaf module's weight, as a torch parametrization; `full_weights` switches it off."""

    active = True

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the forward pass sees it."""
        return self.gate(weight) if self.active else weight

    def gate(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        raise NotImplementedError


@contextmanager
def full_weights(model: nn.Module) -> Iterator[None]:
    """Within the block, a model that is masked or gated runs on all its weights."""
    gates = [module for module in model.modules() if isinstance(module, WeightGate) and module.active]
    for gate in gates:
        gate.active = False
    try:
        yield
    finally:
        for gate in gates:
            gate.active = True


@dataclass(frozen=True)
class WeightSite:
    """One maskable weight matrix."""

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
    def size(self) -> int:
        """Number of weights."""
        return self.original.numel()

    @property
    def original(self) -> Tensor:
        """The frozen weight as stored, [stored_axes], without any mask that is on it now."""
        if parametrize.is_parametrized(self.leaf, "weight"):
            return self.leaf.parametrizations["weight"].original  # type: ignore[index, return-value]
        return self.leaf.weight  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The frozen weight in canonical shape."""
        return self.from_stored(self.original.detach())

    def to_stored(self, canonical: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Rearrange a tensor of canonical shape as the leaf module stores it."""
        return rearrange(canonical, f"{self.axes} -> {self.stored_axes}")

    def from_stored(self, stored: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Rearrange a tensor from the leaf module's layout to canonical shape."""
        sizes = {"head": self.shape[0]} if "head" in self.axes.split() else {}
        return rearrange(stored, f"{self.stored_axes} -> {self.axes}", **sizes)


def weight_sites(model: Any) -> tuple[WeightSite, ...]:
    """Every maskable weight of a `TransformerBridge`, in the order of its blocks.

    Raises:
        ValueError: If the model has no blocks, or a block's attention or MLP is not made of plain weight matrices
            (mixtures of experts, state-space blocks): a model is masked whole or not at all.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None or len(blocks) == 0:
        raise ValueError(f"{type(model).__name__} has no transformer blocks to mask: pass a model from load_model")
    return tuple(site for layer, block in enumerate(blocks) for site in _block_sites(model, layer, block))


def weight_hash(model: Any) -> str:
    """A hash of all maskable weights: tells models and checkpoints apart, whatever precision they were loaded in.

    Weights are rounded to bfloat16 first, so one checkpoint hashes alike in float32 and in bfloat16.
    """
    digest = hashlib.blake2b(digest_size=16)
    for site in weight_sites(model):
        digest.update(f"{site.name} {site.shape}".encode())
        rounded = site.weight.to("cpu", torch.bfloat16).contiguous().view(torch.int16)
        digest.update(rounded.numpy().tobytes())
    return digest.hexdigest()


def _block_sites(model: Any, layer: int, block: nn.Module) -> Iterator[WeightSite]:
    for component, table in (("attn", _ATTENTION), ("mlp", _MLP)):
        part = getattr(block, component, None)
        for attribute, (matrix, axes, linear_axes) in table.items():
            leaf = getattr(getattr(part, attribute, None), "original_component", None)
            if leaf is None and attribute == "gate":
                continue  # a plain MLP
            name = f"blocks.{layer}.{component}.{matrix}"
            weight = None if leaf is None else getattr(leaf, "weight", None)
            if weight is None or weight.ndim != 2:
                kind = type(getattr(part, "original_component", part)).__name__
                raise ValueError(
                    f"this model cannot be masked: blocks.{layer}.{component} ({kind}) has no plain {matrix}"
                )
            yield _site(model, name, layer, component, axes, leaf, linear_axes)


def _site(model: Any, name: str, layer: int, component: str, axes: str, leaf: Any, linear_axes: str) -> WeightSite:
    outputs, inputs = leaf.weight.shape
    stored_axes = linear_axes
    if not isinstance(leaf, nn.Linear):  # Hugging Face's Conv1D stores [in, out]
        if not any(kind.__name__ == "Conv1D" for kind in type(leaf).__mro__):
            raise ValueError(f"this model cannot be masked: {name} is in a {type(leaf).__name__}, not a linear layer")
        outputs, inputs = inputs, outputs
        stored_axes = {
            "(head d_head) d_model": "d_model (head d_head)",
            "d_model (head d_head)": "(head d_head) d_model",
            "d_mlp d_model": "d_model d_mlp",
            "d_model d_mlp": "d_mlp d_model",
        }[linear_axes]
    if component == "mlp":
        shape = (inputs, outputs)
    else:
        over_heads, d_model = (inputs, outputs) if name.endswith("W_O") else (outputs, inputs)
        heads, remainder = divmod(over_heads, model.cfg.d_head)
        if remainder:
            raise ValueError(
                f"this model cannot be masked: {name} has {over_heads} rows, "
                f"not a multiple of d_head {model.cfg.d_head}"
            )
        d_head = model.cfg.d_head
        shape = (heads, d_head, d_model) if name.endswith("W_O") else (heads, d_model, d_head)
    return WeightSite(name, shape, axes, layer, component, leaf, stored_axes)
