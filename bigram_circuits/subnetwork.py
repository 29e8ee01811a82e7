"""A subnetwork: an immutable set of a model's maskable weights.

Masks are bit-packed (one bit per weight, in memory and on disk), so set algebra and counts are byte operations.
Reading a mask returns a new tensor, so changing it does not change the subnetwork.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bigram_circuits.bitmasks import BitMasks, Count, operand
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.layouts import huggingface_layout
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import in_use
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import ATTENTION_MATRICES, MLP_MATRICES, PartName, WeightName
from bigram_circuits.storage.records import (
    shown,
)

_LAYERS_SHOWN = 16  # rows of the table in a notebook


Parts: TypeAlias = Mapping[int, Iterable[int]] | Iterable[tuple[int, int]]
"""Heads or neurons: (layer, index) pairs, or layer -> indices."""


class Subnetwork(BitMasks):
    """An immutable mapping from canonical weight names to boolean masks, True where a weight is kept.

    `a & b`, `a | b`, `a - b` and `~a` are set operations on subnetworks of the same shapes; `==` compares the masks.

    Example:
        >>> everything = bc.Subnetwork.full(model)
        >>> small = everything.only(layers=[0]) - everything.only(heads=[(0, 1)])
        >>> small.save("small.safetensors")
        >>> bc.Subnetwork.load("small.safetensors", model) == small
        True
    """

    noun = "subnetwork"
    units = "weights"
    file_format = "bigram_circuits.subnetwork/1"
    _not_offered = BitMasks._not_offered | {"keep_head", "keep_layer", "keep_neurons"}

    # --- constructors from a model ---

    @classmethod
    def full(cls, model: Model) -> Subnetwork:
        """Keep all maskable weights of a model."""
        return cls._constant(model, True, "full")

    @classmethod
    def empty(cls, model: Model) -> Subnetwork:
        """Keep no maskable weight: only embeddings, unembedding, normalisation and biases remain."""
        return cls._constant(model, False, "empty")

    @classmethod
    def _constant(cls, model: Model, value: bool, lineage: str) -> Subnetwork:
        masks = {site.name: torch.full(site.shape, value, device="cpu") for site in weight_sites(model)}
        return cls(masks, model_name=model.cfg.model_name, weight_hash=weight_hash(model), lineage=lineage)

    @classmethod
    def magnitude(cls, model: Model, like: SubnetworkLike) -> Subnetwork:
        """Keep the weights of largest absolute value, in every weight matrix as many as `like` keeps there.

        Ties at the threshold are resolved in canonical order.
        """
        like = as_subnetwork(like)
        with in_use(model, "Subnetwork.magnitude"):
            like.check_fits(model)
            masks = {}
            for site in weight_sites(model):
                size = site.weight.float().abs().flatten().cpu().numpy()
                masks[site.name] = torch.from_numpy(_largest(size, like._counts[site.name])).view(site.shape)
            lineage = f"magnitude like {operand(like.lineage)}"
            return cls(masks, model_name=model.cfg.model_name, weight_hash=weight_hash(model), lineage=lineage)

    # --- counts ---

    def by_weight(self) -> dict[str, Count]:
        """Count kept weights by weight matrix (canonical name)."""
        return self.by_name()

    def by_component(self) -> dict[tuple[int, str], Count]:
        """Count kept weights by (layer, `"attn"` or `"mlp"`)."""
        return self.by_place()

    def by_head(self) -> dict[tuple[int, int], Count]:
        """Count kept weights by (layer, head), in the head's slices of W_Q, W_O and, where unshared, W_K and W_V."""
        counts: dict[tuple[int, int], Count] = {}
        for name in self:
            weight = WeightName.parse(name)
            layer = weight.layer
            if weight.matrix not in ATTENTION_MATRICES or self._shapes[name][0] != self._n_heads(layer):
                continue
            mask = self[name]
            for head, kept in enumerate(mask.flatten(1).sum(1).tolist()):
                before = counts.get((layer, head), Count(0, 0))
                counts[layer, head] = Count(before.kept + kept, before.total + mask[head].numel())
        return counts

    def place_of(self, name: str) -> tuple[int, str]:
        """Return the layer and component of a weight matrix."""
        weight = WeightName.parse(name)
        return weight.layer, weight.component

    # --- edits: each returns a new subnetwork ---

    def only(
        self,
        *,
        layers: int | Iterable[int] = (),
        heads: Parts = (),
        neurons: Parts = (),
    ) -> Subnetwork:
        """Return the part of this subnetwork that lies in the given parts of the model; it keeps nothing else.

        Args:
            layers: Indices of blocks.
            heads: Attention heads as (layer, head) pairs, or as layer -> heads; including W_K and W_V if a group of
                heads shares them.
            neurons: MLP neurons as (layer, neuron) pairs, or as layer -> neurons: columns of W_in and W_gate, rows of
                W_out.

        Raises:
            ValueError: If no part is given, or one does not exist.
        """
        nothing = self._derived({name: np.zeros_like(bits) for name, bits in self._packed.items()}, "")
        inside, names = nothing, []
        for layer in [layers] if isinstance(layers, int) else layers:
            inside = inside.add_layer(layer)
            names.append(PartName("layer", layer).short)
        for layer, group in _by_layer(heads).items():
            for head in group:
                inside = inside.add_head(layer, head)
                names.append(PartName("head", layer, (head,)).short)
        for layer, group in _by_layer(neurons).items():
            inside = inside.add_neurons(layer, group)
            names.append(PartName("neurons", layer, tuple(group)).short)
        if not names:
            raise ValueError("only() needs the parts to keep: layers=, heads= or neurons=")
        return self & inside.named(" | ".join(names))

    def add_head(self, layer: int, head: int) -> Subnetwork:
        """Return a copy with all weights of an attention head, including W_K and W_V if its group shares them."""
        return self._edit_head(layer, head, True)

    def drop_head(self, layer: int, head: int) -> Subnetwork:
        """Return a copy without the weights of an attention head; with grouped queries, the shared W_K and W_V stay."""
        return self._edit_head(layer, head, False)

    def add_neurons(self, layer: int, indices: Sequence[int]) -> Subnetwork:
        """Return a copy with all weights of MLP neurons: columns of W_in and W_gate, rows of W_out."""
        return self._edit_neurons(layer, indices, True)

    def drop_neurons(self, layer: int, indices: Sequence[int]) -> Subnetwork:
        """Return a copy without the weights of MLP neurons."""
        return self._edit_neurons(layer, indices, False)

    def add_layer(self, layer: int) -> Subnetwork:
        """Return a copy with all maskable weights of a block."""
        return self._edit_layer(layer, True)

    def drop_layer(self, layer: int) -> Subnetwork:
        """Return a copy without the maskable weights of a block."""
        return self._edit_layer(layer, False)

    def keep_head(self, layer: int, head: int) -> Subnetwork:
        """Return what `add_head` returns, of which this is the former name; see `only` to keep nothing else."""
        return self.add_head(layer, head)

    def keep_neurons(self, layer: int, indices: Sequence[int]) -> Subnetwork:
        """Return what `add_neurons` returns, of which this is the former name; see `only` to keep nothing else."""
        return self.add_neurons(layer, indices)

    def keep_layer(self, layer: int) -> Subnetwork:
        """Return what `add_layer` returns, of which this is the former name; see `only` to keep nothing else."""
        return self.add_layer(layer)

    def _edit_head(self, layer: int, head: int, value: bool) -> Subnetwork:
        n_heads = self._n_heads(layer)
        if not 0 <= head < n_heads:
            raise ValueError(f"there is no head {head} in layer {layer}: it has heads 0 to {n_heads - 1}")
        changed = {}
        for name in self._of_layer(layer):
            if WeightName.parse(name).matrix in ATTENTION_MATRICES:
                here = self._shapes[name][0]  # fewer than n_heads where queries are grouped
                if here == n_heads or value:
                    changed[name] = self[name]
                    changed[name][head * here // n_heads] = value
        return self._with(changed, PartName("head", layer, (head,)), value)

    def _edit_neurons(self, layer: int, indices: Sequence[int], value: bool) -> Subnetwork:
        d_mlp = self._rows_of(layer, "W_out")
        wrong = [index for index in indices if not 0 <= index < d_mlp]
        if wrong:
            raise ValueError(f"there is no neuron {wrong[0]} in layer {layer}: it has neurons 0 to {d_mlp - 1}")
        changed = {}
        for name in self._of_layer(layer):
            matrix = WeightName.parse(name).matrix
            if matrix in MLP_MATRICES:
                changed[name] = self[name]
                view = changed[name] if matrix == "W_out" else changed[name].T
                view[torch.as_tensor(list(indices), dtype=torch.long, device="cpu")] = value
        return self._with(changed, PartName("neurons", layer, tuple(indices)), value)

    def _edit_layer(self, layer: int, value: bool) -> Subnetwork:
        changed = {name: torch.full(self._shapes[name], value, device="cpu") for name in self._of_layer(layer)}
        return self._with(changed, PartName("layer", layer), value)

    def _of_layer(self, layer: int) -> list[str]:
        layers = {name: WeightName.parse(name).layer for name in self}
        if layer not in layers.values():
            raise ValueError(f"there is no layer {layer}: layers are 0 to {max(layers.values())}")
        return [name for name, at in layers.items() if at == layer]

    def _n_heads(self, layer: int) -> int:
        return self._rows_of(layer, "W_Q")

    def _rows_of(self, layer: int, matrix: str) -> int:
        for name in self._of_layer(layer):
            if WeightName.parse(name).matrix == matrix:
                return self._shapes[name][0]
        raise ValueError(f"layer {layer} of this subnetwork has no {matrix}")

    def _with(self, changed: Mapping[str, Tensor], what: PartName, kept: bool) -> Subnetwork:
        packed = {name: np.packbits(changed[name].numpy()) if name in changed else self._packed[name] for name in self}
        sign = "|" if kept else "-"
        return self._derived(packed, f"{operand(self.lineage, sign)} {sign} {what.short}")

    # --- models and files ---

    def check_fits(self, model: Model) -> None:
        """Raise ValueError unless all names and shapes match the model's."""
        self._check_same_shapes({site.name: site.shape for site in weight_sites(model)}, "the model")

    @classmethod
    def _check_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless every name is canonical and all shapes can be those of one model's matrices."""
        _check_shapes(shapes)

    def to_huggingface(self, model: Model) -> dict[str, Tensor]:
        """Convert to boolean masks by Hugging Face parameter name, in the shapes of the model's checkpoint.

        Every parameter that holds maskable weights is included; embeddings, norms and biases are not (all kept).
        """
        self.check_fits(model)
        return huggingface_layout(model).to_huggingface(self)

    @classmethod
    def from_huggingface(cls, masks: Mapping[str, Any], model: Model) -> Subnetwork:
        """Build a subnetwork of `model` from boolean masks (torch or numpy) by Hugging Face parameter name.

        Masks of embeddings, norms and biases are optional and must keep everything.

        Raises:
            ValueError: If a parameter with maskable weights is missing, a name is unknown, a shape or type is wrong,
                or the mask of a parameter that is never masked drops something.
        """
        tensors = {name: _as_bool_tensor(name, mask) for name, mask in masks.items()}
        canonical = huggingface_layout(model).from_huggingface(tensors)
        return cls(canonical, model_name=model.cfg.model_name, weight_hash=weight_hash(model))


if TYPE_CHECKING:

    class HasSubnetwork(Protocol):
        """An object that holds a subnetwork, for example a `FoundSubnetwork` or a `Run`."""

        @property
        def subnetwork(self) -> Subnetwork:
            """The subnetwork."""
            ...

    SubnetworkLike: TypeAlias = Subnetwork | HasSubnetwork
    """What public functions take as a subnetwork: one, or something that holds one."""
else:
    SubnetworkLike = Any


def as_subnetwork(given: Any) -> Subnetwork:
    """Return a subnetwork, or the one that a `FoundSubnetwork` or `Run` holds; all enter public functions through here.

    Raises:
        ValueError: If it is neither.
    """
    found = given if isinstance(given, Subnetwork) else getattr(given, "subnetwork", None)
    if not isinstance(found, Subnetwork):
        raise ValueError(
            f"a {type(given).__name__} is no subnetwork: pass a Subnetwork, for example from Subnetwork.load, or what "
            f"find_subnetwork or load_run returned"
        )
    return found


def _by_layer(parts: Parts) -> dict[int, list[int]]:
    """Indices by layer."""
    found: dict[int, list[int]] = {}
    pairs: Any = parts
    if isinstance(parts, Mapping):
        pairs = [(layer, index) for layer, indices in parts.items() for index in indices]
    for layer, index in pairs:
        found.setdefault(layer, []).append(index)
    return found


_AXES = {
    "W_Q": "head d_model d_head", "W_K": "group d_model d_head", "W_V": "group d_model d_head",
    "W_O": "head d_head d_model", "W_in": "d_model d_mlp", "W_gate": "d_model d_mlp", "W_out": "d_mlp d_model",
}  # fmt: skip
_OF_COMPONENT = {"attn": ATTENTION_MATRICES, "mlp": MLP_MATRICES}


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless every name is canonical and all shapes can be those of one model's matrices."""
    sizes: dict[tuple[int | None, str], tuple[int, str]] = {}  # (layer, axis) -> size, and the matrix that has it
    for name, shape in shapes.items():
        weight = WeightName.parse(name)
        if str(weight) != name or weight.matrix not in _OF_COMPONENT.get(weight.component, ()):
            raise ValueError(f"{shown(name)} is not the name of a weight matrix, such as 'blocks.0.attn.W_Q'")
        axes = _AXES[weight.matrix].split()
        if len(shape) != len(axes) or min(shape) < 1:
            raise ValueError(f"{name} has shape {shape}, but its axes are {', '.join(axes)}")
        for axis, size in zip(axes, shape, strict=True):
            place = None if axis == "d_model" else weight.layer, axis
            known, where = sizes.setdefault(place, (size, name))
            if known != size:
                raise ValueError(f"{name} has shape {shape}, but {axis} is {known} in {where}")
    for layer in {layer for layer, _ in sizes if layer is not None}:
        heads, groups = sizes.get((layer, "head")), sizes.get((layer, "group"))
        if heads and groups and heads[0] % groups[0]:
            raise ValueError(f"{groups[1]} has {groups[0]} heads, which {heads[0]} query heads cannot share evenly")


def _largest(values: np.ndarray, kept: int) -> np.ndarray:
    """Select the `kept` largest values, with NaN largest of all; of ties at the threshold, the first."""
    if kept == 0:
        return np.zeros(len(values), dtype=bool)
    threshold = np.partition(values, len(values) - kept)[len(values) - kept]
    if np.isnan(threshold):
        mask, equal = np.zeros(len(values), dtype=bool), np.isnan(values)
    else:
        mask, equal = ~(values <= threshold), values == threshold
    mask[np.flatnonzero(equal)[: kept - int(mask.sum())]] = True
    return mask


def _as_bool_tensor(name: str, mask: Any) -> Tensor:
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        return torch.from_numpy(np.require(mask, requirements=["C", "W"]))
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return mask.detach().cpu()
    kind = f"dtype {mask.dtype}" if isinstance(mask, np.ndarray | Tensor) else f"type {type(mask).__name__}"
    raise ValueError(f"the mask of {name!r} has {kind} but should be a boolean array or tensor")
