"""A subnetwork: an immutable set of a model's maskable weights.

Masks are bit-packed (one bit per weight, in memory and on disk), so set algebra and counts are byte operations.
Reading a mask returns a new tensor, so changing it does not change the subnetwork.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from bigram_circuits.measures import html
from bigram_circuits.models.identity import check_is, same_model, weight_hash
from bigram_circuits.models.layouts import huggingface_layout
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import in_use
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import ATTENTION_MATRICES, MLP_MATRICES, PartName, WeightName, short_name
from bigram_circuits.storage.files import whole_file
from bigram_circuits.storage.records import (
    HEADER,
    check_header,
    header_checksum,
    is_shape,
    parse_json,
    read_tensors,
    shown,
    write_tensors,
)
from bigram_circuits.storage.terminal import printable

_FORMAT = "bigram_circuits.subnetwork/1"
_METADATA = ("format", "shapes", "model_name", "weight_hash", "lineage", "kept", "total", "checksum")
_RANDOM_BLOCK = 1 << 20  # weights drawn at once
_LAYERS_SHOWN = 16  # rows of the table in a notebook


class Count(NamedTuple):
    """How many of a number of weights are kept."""

    kept: int
    total: int

    @property
    def fraction(self) -> float:
        """Kept / total."""
        return self.kept / self.total


Parts: TypeAlias = Mapping[int, Iterable[int]] | Iterable[tuple[int, int]]
"""Heads or neurons: (layer, index) pairs, or layer -> indices."""


class Subnetwork(Mapping[str, Tensor]):
    """An immutable mapping from canonical weight names to boolean masks, True where a weight is kept.

    `a & b`, `a | b`, `a - b` and `~a` are set operations on subnetworks of the same shapes; `==` compares the masks.
    """

    def __init__(
        self,
        masks: Mapping[str, Bool[Tensor, "..."]],
        *,
        model_name: str | None = None,
        weight_hash: str | None = None,
        lineage: str = "masks",
    ) -> None:
        """Pack masks given by canonical name.

        Raises:
            ValueError: If there are none, one is not boolean, a name is not that of a weight matrix, or a shape cannot
                be that of this matrix beside the others.

        `lineage` describes where the subnetwork came from; operations extend it (`bigram | L5H1`).
        """
        if not masks:
            raise ValueError("a subnetwork needs at least one weight matrix")
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"the mask of {name} has dtype {mask.dtype} but should be torch.bool")
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        _check_shapes(shapes)
        packed = {name: np.packbits(mask.numpy(force=True)) for name, mask in masks.items()}
        self._set(shapes, packed, model_name, weight_hash, lineage)

    def _set(
        self, shapes: Any, packed: dict[str, np.ndarray], model_name: str | None, weight_hash: str | None, lineage: str
    ) -> None:
        for bits in packed.values():
            bits.setflags(write=False)
        self._shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(dict(shapes))
        self._packed: Mapping[str, np.ndarray] = MappingProxyType(packed)
        self._counts = {name: int(np.bitwise_count(bits).sum()) for name, bits in packed.items()}
        self._model_name = model_name
        self._weight_hash = weight_hash
        self._lineage = lineage

    @classmethod
    def _from_packed(
        cls, shapes: Any, packed: dict[str, np.ndarray], model_name: str | None, weight_hash: str | None, lineage: str
    ) -> Subnetwork:
        subnetwork = cls.__new__(cls)
        subnetwork._set(shapes, packed, model_name, weight_hash, lineage)
        return subnetwork

    def _derived(self, packed: dict[str, np.ndarray], lineage: str) -> Subnetwork:
        """Build a subnetwork of the same model with other masks."""
        return self._from_packed(self._shapes, packed, self.model_name, self.weight_hash, lineage)

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickle: a copy in another process is as immutable as this one."""
        rest = (self._model_name, self._weight_hash, self._lineage)
        return type(self)._from_packed, (dict(self._shapes), dict(self._packed), *rest)

    def __copy__(self) -> Subnetwork:
        return self

    def __deepcopy__(self, memo: Any) -> Subnetwork:
        return self

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
            lineage = f"magnitude like {_operand(like.lineage)}"
            return cls(masks, model_name=model.cfg.model_name, weight_hash=weight_hash(model), lineage=lineage)

    def random_like(self, seed: int = 0) -> Subnetwork:
        """Draw a matched random subnetwork: uniform, with exactly as many weights in every matrix as this one."""
        packed = {}
        for index, (name, shape) in enumerate(self._shapes.items()):
            rng = np.random.default_rng((seed, index))
            size = int(np.prod(shape))
            packed[name] = np.packbits(_random_mask(rng, size, self._counts[name]))
        return self._derived(packed, f"random {seed} like {_operand(self.lineage)}")

    # --- a mapping ---

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        shape = self._shapes[name]
        bits = np.unpackbits(self._packed[name], count=int(np.prod(shape)))
        return torch.from_numpy(bits.view(bool)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical shape of every weight matrix."""
        return self._shapes

    @property
    def model_name(self) -> str | None:
        """Name of the model that the subnetwork was made for, if known."""
        return self._model_name

    @property
    def weight_hash(self) -> str | None:
        """`weight_hash` of the model that the subnetwork was made for, if known."""
        return self._weight_hash

    @property
    def lineage(self) -> str:
        """Description of where it came from: `bigram | L5H1`. Saved in the file; ignored by `==`."""
        return self._lineage

    def named(self, lineage: str) -> Subnetwork:
        """Return the same subnetwork with a name of your choice as its lineage."""
        return self._derived(dict(self._packed), lineage)

    # --- set algebra ---

    def __and__(self, other: Subnetwork) -> Subnetwork:
        return self._combine(other, "&", np.bitwise_and)

    def __or__(self, other: Subnetwork) -> Subnetwork:
        return self._combine(other, "|", np.bitwise_or)

    def __sub__(self, other: Subnetwork) -> Subnetwork:
        return self._combine(other, "-", lambda ours, theirs: ours & ~theirs)

    def __invert__(self) -> Subnetwork:
        packed = {}
        for name, bits in self._packed.items():
            flipped = ~bits
            unused = -int(np.prod(self._shapes[name])) % 8  # padding bits in the last byte
            if unused:
                flipped[-1] &= (0xFF << unused) & 0xFF
            packed[name] = flipped
        return self._derived(packed, f"~{_operand(self.lineage)}")

    def _combine(
        self, other: Subnetwork, sign: str, operation: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> Subnetwork:
        if not isinstance(other := getattr(other, "subnetwork", other), Subnetwork):
            return NotImplemented
        _check_same_shapes(self._shapes, other._shapes, "the other subnetwork")
        packed = {name: operation(bits, other._packed[name]) for name, bits in self._packed.items()}
        lineage = f"{_operand(self.lineage, sign)} {sign} {_operand(other.lineage)}"
        hash_of_both = self.weight_hash if same_model(self.weight_hash, other.weight_hash) else None
        return self._from_packed(self._shapes, packed, self.model_name, hash_of_both, lineage)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Subnetwork):
            return NotImplemented
        return dict(self._shapes) == dict(other._shapes) and all(
            np.array_equal(bits, other._packed[name]) for name, bits in self._packed.items()
        )

    def __hash__(self) -> int:
        return hash(tuple((name, self._packed[name].tobytes()) for name in sorted(self._packed)))

    @property
    def checksum(self) -> str:
        """Hash of all masks: equal exactly when the subnetworks are equal."""
        return _checksum(self._packed)

    # --- counts ---

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(self._counts.values())

    @property
    def total(self) -> int:
        """Number of maskable weights."""
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    @property
    def fraction(self) -> float:
        """Kept / total, 0 to 1."""
        return self.kept / self.total

    def by_weight(self) -> dict[str, Count]:
        """Count kept weights by weight matrix (canonical name)."""
        return {name: Count(self._counts[name], int(np.prod(shape))) for name, shape in self._shapes.items()}

    def by_component(self) -> dict[tuple[int, str], Count]:
        """Count kept weights by (layer, `"attn"` or `"mlp"`)."""
        counts: dict[tuple[int, str], Count] = {}
        for name, count in self.by_weight().items():
            weight = WeightName.parse(name)
            place = weight.layer, weight.component
            before = counts.get(place, Count(0, 0))
            counts[place] = Count(before.kept + count.kept, before.total + count.total)
        return counts

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

    def table(self) -> str:
        """Format where the kept weights are, by layer and component: share of all kept, and share kept there."""
        counts, kept = self.by_component(), max(self.kept, 1)
        components = sorted({component for _, component in counts})
        lines = ["where the kept weights are (share of them; in brackets, share of the component that is kept)"]
        lines.append(f"{'layer':<8}" + "".join(f"{component:>20}" for component in components))
        for layer in sorted({layer for layer, _ in counts}):
            here = [counts.get((layer, component)) for component in components]
            cells = [f"{100 * one.kept / kept:.1f}% ({100 * one.fraction:.2f}%)" if one else "" for one in here]
            lines.append(f"{layer:<8}" + "".join(f"{cell:>20}" for cell in cells))
        totals = [sum(n.kept for (_, c), n in counts.items() if c == component) for component in components]
        lines.append(f"{'all':<8}" + "".join(f"{f'{100 * total / kept:.1f}%':>20}" for total in totals))
        return "\n".join(lines)

    def __repr__(self) -> str:
        of = f" of {short_name(self.model_name)}" if self.model_name else ""
        words = f"{self.lineage}: {self.kept:,} of {self.total:,} weights, {100 * self.fraction:.3g}%{of}"
        return f"Subnetwork({printable(words)})"

    def _repr_html_(self) -> str:
        """Build the notebook view: how many weights are kept, and where."""
        counts = self.by_component()
        components = sorted({component for _, component in counts})
        rows = [
            [str(layer), *(_words(counts.get((layer, component))) for component in components)]
            for layer in sorted({layer for layer, _ in counts})
        ]
        of = f" of {short_name(self.model_name)}" if self.model_name else ""
        says = f"{self.kept:,} of {self.total:,} weights kept ({100 * self.fraction:.3g}%){of}"
        table = html.table(["layer", *components], html.shortened(rows, _LAYERS_SHOWN), "Weights kept by layer")
        return html.summary(f"Subnetwork: {self.lineage}", [says], table)

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
        return self._derived(packed, f"{_operand(self.lineage, sign)} {sign} {what.short}")

    # --- models and files ---

    def check_fits(self, model: Model) -> None:
        """Raise ValueError unless all names and shapes match the model's."""
        _check_same_shapes(self._shapes, {site.name: site.shape for site in weight_sites(model)}, "the model")

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: a bit-packed uint8 tensor per weight matrix, and everything else as metadata.

        Its bytes are a function of the subnetwork, its name and the model's: saved again, the file is the same.
        """
        metadata = {
            "format": _FORMAT,
            "shapes": json.dumps(dict(self._shapes)),
            "model_name": self.model_name or "",
            "weight_hash": self.weight_hash or "",
            "lineage": self.lineage,
            "kept": str(self.kept),
            "total": str(self.total),
            "checksum": self.checksum,
        }
        with whole_file(path) as temporary:
            write_tensors(temporary, self._packed, metadata | {HEADER: header_checksum(self._packed, metadata)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model | None = None, *, follow_links: bool = True) -> Subnetwork:
        """Load and check a file written by `save`.

        Args:
            path: The file.
            model: The model it must have been made for; None: any.
            follow_links: Whether the file may be a symbolic link.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file is not a subnetwork or has another format version; if its names, shapes, counts or
                checksums are inconsistent; or, with `model`, if it was made for other shapes or other weights.
        """
        if os.path.isdir(path):
            raise ValueError(f"{str(path)!r} is a folder: give the subnetwork.safetensors in it")
        packed, metadata = read_tensors(path, "is not a subnetwork file", follow=follow_links)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} has format {shown(metadata.get('format'))}, but {_FORMAT!r} is needed")
        try:
            loaded = cls._from_file(packed, metadata)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
        if model is not None:
            loaded.check_fits(model)
            check_is(model, loaded.weight_hash, f"{str(path)!r} was made for {loaded.model_name!r}")
        return loaded

    @classmethod
    def _from_file(cls, packed: dict[str, np.ndarray], metadata: Mapping[str, str]) -> Subnetwork:
        check_header(packed, metadata, set(_METADATA))
        missing = [name for name in _METADATA if name not in metadata]
        if missing:
            raise ValueError(f"its header lacks its {missing[0]}")
        shapes = _shapes_of(metadata["shapes"])
        wanted = {name: (-(-math.prod(shape) // 8),) for name, shape in shapes.items()}
        if any(bits.dtype != np.uint8 for bits in packed.values()) or (
            {name: bits.shape for name, bits in packed.items()} != wanted
        ):
            raise ValueError("its tensors do not match the names and shapes in its header")
        packed = {name: packed[name] for name in shapes}
        for name, shape in shapes.items():
            unused = -math.prod(shape) % 8
            if packed[name][-1] & ((1 << unused) - 1):
                raise ValueError(f"the mask of {name} has bits after its last weight")
        if metadata["checksum"] != _checksum(packed):
            raise ValueError("its masks do not match their checksum")
        made_for = metadata["model_name"] or None, metadata["weight_hash"] or None
        loaded = cls._from_packed(shapes, packed, *made_for, metadata["lineage"])
        if (str(loaded.kept), str(loaded.total)) != (metadata["kept"], metadata["total"]):
            raise ValueError(
                f"it should keep {shown(metadata['kept'])} of {shown(metadata['total'])} weights, "
                f"but keeps {loaded.kept} of {loaded.total}"
            )
        return loaded


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


def _shapes_of(text: str) -> dict[str, tuple[int, ...]]:
    """Parse the shapes in a file's header."""
    shapes = parse_json(text)
    if not isinstance(shapes, dict) or not shapes or not all(is_shape(shape) for shape in shapes.values()):
        raise ValueError("the shapes in its header are not shapes by name")
    found = {name: tuple(shape) for name, shape in shapes.items()}
    _check_shapes(found)
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


def _random_mask(rng: np.random.Generator, size: int, kept: int) -> np.ndarray:
    """Choose exactly `kept` of `size` uniformly, block by block, so that temporary memory does not grow with the size.

    The number chosen within a block is hypergeometric; the choice within it is uniform.
    """
    mask = np.zeros(size, dtype=bool)
    left = kept
    for start in range(0, size, _RANDOM_BLOCK):
        block = min(_RANDOM_BLOCK, size - start)
        rest = size - start - block
        here = int(rng.hypergeometric(left, size - start - left, block)) if rest else left
        mask[start + rng.choice(block, here, replace=False, shuffle=False)] = True
        left -= here
    return mask


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


def _words(count: Count | None) -> str:
    """Format a count as a table cell."""
    return f"{count.kept:,} ({100 * count.fraction:.2f}%)" if count else ""


def _operand(lineage: str, sign: str = "") -> str:
    """Format a lineage as an operand: in brackets if it has operators other than `sign` (the operator to its right)."""
    outside = lineage
    while outside != (outside := re.sub(r"[(\[][^()\[\]]*[)\]]", "", outside)):
        pass  # remove bracketed parts, which need no further brackets
    signs = {part for part in outside.split() if part in ("&", "|", "-")}
    return lineage if signs <= {sign} else f"({lineage})"


def _as_bool_tensor(name: str, mask: Any) -> Tensor:
    if isinstance(mask, np.ndarray) and mask.dtype == np.bool_:
        return torch.from_numpy(np.require(mask, requirements=["C", "W"]))
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return mask.detach().cpu()
    kind = f"dtype {mask.dtype}" if isinstance(mask, np.ndarray | Tensor) else f"type {type(mask).__name__}"
    raise ValueError(f"the mask of {name!r} has {kind} but should be a boolean array or tensor")


def _checksum(packed: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(packed):
        digest.update(name.encode() + packed[name].tobytes())
    return digest.hexdigest()


def _check_same_shapes(ours: Mapping[str, Any], theirs: Mapping[str, Any], whose: str) -> None:
    for name in (*ours, *theirs):
        mine, other = ours.get(name), theirs.get(name)
        if mine != other:
            raise ValueError(f"{name} has shape {mine} in this subnetwork, but {other} in {whose}")
