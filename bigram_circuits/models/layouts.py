"""Map canonical weights to Hugging Face parameters, element by element, for any architecture, by tracing.

A checkpoint stores the same weights under other names and in other shapes: queries, keys and values may be fused into
one matrix (as three blocks, or head by head), gate and input matrices may be fused, and any of them may be transposed.
Instead of a table for each architecture, the mapping is observed:

1. Build a model of the same configuration with one block, a tiny vocabulary and the real widths, and number all its
   parameters' elements consecutively, in float64.
2. Load it as any model is loaded, and read each canonical weight: the numbers say where its elements came from.
3. Every canonical weight must come from one parameter, at `offset + sum of stride * coordinate` (where heads are
   grouped, with one coordinate for the group and one within it), and together the weights must cover each such
   parameter exactly once. This is checked for every element. Only the offset and strides are kept, so converting a
   mask is one strided copy.
4. The other blocks must have the same parameter names, up to the block number, and the same shapes. This is checked
   against the real configuration.

The parameters of TransformerLens' own models (`boot_native`) are mapped in the same way.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ref

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from bigram_circuits.models.hooking import hook
from bigram_circuits.models.model import Model
from bigram_circuits.models.native import build, is_native
from bigram_circuits.models.state import memo, usual_torch
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import WeightName

_TRACED_VOCABULARY = 16
_TRACED_CONTEXT = 2
_SHOWN = 3  # names listed in an error message


@dataclass(frozen=True)
class Place:
    """The location of a canonical weight within a Hugging Face parameter."""

    parameter: str
    """Name in the state dict."""
    shape: tuple[int, ...]
    """Canonical shape."""
    sizes: tuple[int, ...]
    """The canonical shape with its first axis split into (groups, heads in a group): some checkpoints group heads."""
    offset: int
    """Offset of the first canonical element in the flattened parameter."""
    strides: tuple[int, ...]
    """Strides in the flattened parameter, along each axis of `sizes`."""

    def view(self, parameter: Tensor) -> Tensor:
        """View this weight within a contiguous parameter (or its mask), with the axes of `sizes`."""
        return parameter.as_strided(self.sizes, self.strides, parameter.storage_offset() + self.offset)


@dataclass(frozen=True)
class Layout:
    """The mapping between one model's canonical weights and its Hugging Face parameters.

    Example:
        >>> layout = bc.huggingface_layout(model)
        >>> layout.places["blocks.0.mlp.W_in"]  # where the weight is in the Hugging Face model
    """

    places: Mapping[str, Place] = field(repr=False)
    """Location of each canonical weight, by canonical name."""
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Shape of every parameter that holds maskable weights."""
    others: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Shape of every other state dict entry (embeddings, norms, biases), which are never masked."""

    def to_huggingface(self, masks: Mapping[str, Bool[Tensor, "..."]]) -> dict[str, Bool[Tensor, "..."]]:
        """Convert masks by canonical name to masks of every Hugging Face parameter that holds maskable weights.

        Raises:
            ValueError: If a canonical weight is missing, unknown, or has the wrong shape.
        """
        _check_names(masks, self.places, "canonical name")
        found = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        for name, place in self.places.items():
            mask = masks[name]
            if tuple(mask.shape) != place.shape:
                raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)} but should have {place.shape}")
            place.view(found[place.parameter]).copy_(mask.view(place.sizes))
        return found

    def from_huggingface(self, masks: Mapping[str, Bool[Tensor, "..."]]) -> dict[str, Bool[Tensor, "..."]]:
        """Convert masks by Hugging Face name to masks by canonical name (views where possible).

        Masks of embeddings, norms and biases are optional and must be all True.

        Raises:
            ValueError: If a parameter with maskable weights is missing, a name is unknown, a shape or type is wrong,
                or the mask of a parameter that is never masked drops something.
        """
        extra = {name: mask for name, mask in masks.items() if name in self.others and name not in self.shapes}
        wanted = {name: mask for name, mask in masks.items() if name not in extra}
        _check_names(wanted, self.shapes, "Hugging Face name")
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"the mask of {name} has dtype {mask.dtype} but should be torch.bool")
            shape = self.others[name] if name in extra else self.shapes[name]
            if tuple(mask.shape) != shape:
                raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)} but should have {shape}")
        for name, mask in extra.items():
            if not mask.all():
                raise ValueError(
                    f"the mask of {name} drops {int((~mask).sum())} of {mask.numel()} weights, but embeddings, norms "
                    f"and biases are always kept"
                )
        contiguous = {name: mask.contiguous() for name, mask in wanted.items()}
        return {
            name: place.view(contiguous[place.parameter]).reshape(place.shape) for name, place in self.places.items()
        }


@usual_torch()
def huggingface_layout(model: Model) -> Layout:
    """Trace how a model's weights are laid out in its Hugging Face parameters; costs about as much as one block.

    Raises:
        ValueError: If the model cannot be masked, or the trace finds weights that are computed, mixed or left over.

    Example:
        >>> layout = bc.huggingface_layout(model)
        >>> print(layout.places["blocks.0.mlp.W_in"])
    """
    known, key = memo(), ("layout", ref(model))
    if known is None:
        return _layout_of(model)
    if key not in known:
        known[key] = _layout_of(model)
    return known[key]


def _layout_of(model: Model) -> Layout:
    sites = weight_sites(model)
    traced = _trace(model)
    state = _state_shapes(model)
    places: dict[str, Place] = {}
    for site in sites:
        pattern = traced.get(str(replace(WeightName.parse(site.name), layer=0)))
        if pattern is None or pattern.shape != site.shape:
            raise _untraceable(
                model,
                f"{site.name} has shape {site.shape}, unlike that of the first block, {pattern and pattern.shape}",
            )
        name = re.sub(r"(^|\.)0\.", rf"\g<1>{site.layer}.", pattern.parameter, count=1)
        if name not in state:
            raise _untraceable(model, f"{site.name} should be in {name}, but there is no such parameter")
        places[site.name] = replace(pattern, parameter=name)
    held: dict[str, int] = {}
    for place in places.values():
        held[place.parameter] = held.get(place.parameter, 0) + math.prod(place.shape)
    for name, size in held.items():
        if size != math.prod(state[name]):
            raise _untraceable(model, f"{name} has {math.prod(state[name])} elements, but {size} are maskable weights")
    shapes = {name: state[name] for name in held}
    return Layout(places, shapes, {name: shape for name, shape in state.items() if name not in held})


# --- tracing ---


def _trace(model: Model) -> dict[str, Place]:
    """Locate the first block's weights."""
    small, starts = _numbered_model(model)
    covered: dict[str, Tensor] = {}
    places = {}
    for site in weight_sites(hook(small, tokenizer=None, name="traced", check=False)):
        place = _place(model, site.name, site.weight, starts)
        if place.parameter not in covered:
            covered[place.parameter] = torch.zeros(len(starts[place.parameter]), dtype=torch.bool)
        elements = covered[place.parameter]
        before = int(elements.sum())
        place.view(elements).fill_(True)
        if int(elements.sum()) != before + math.prod(place.shape):
            raise _untraceable(model, f"{site.name} has elements of {place.parameter} that are used twice")
        places[site.name] = place
    for name, elements in covered.items():
        if not elements.all():
            raise _untraceable(model, f"{int((~elements).sum())} elements of {name} are in no maskable weight")
    return places


def _place(model: Model, name: str, numbers: Float64[Tensor, "..."], starts: Mapping[str, range]) -> Place:
    """Locate a canonical weight from the numbers it holds, and check every element."""
    first = int(numbers.flatten()[0])
    parameter = next((key for key, its_numbers in starts.items() if first in its_numbers), None)
    if parameter is None:
        raise _untraceable(model, f"{name} is computed from its parameters, not read from one")
    along_first = numbers.flatten(1)[:, 0].long() - first
    group = _group(along_first)
    sizes = (len(along_first) // group, group, *numbers.shape[1:])
    strides = (
        int(along_first[group]) if sizes[0] > 1 else 0,
        int(along_first[1]) if group > 1 else 0,
        *(
            int(numbers.select(axis, 1).flatten()[0]) - first if numbers.shape[axis] > 1 else 0
            for axis in range(1, numbers.ndim)
        ),
    )
    rest = torch.zeros((), dtype=torch.float64)
    for stride, size in zip(strides[2:], sizes[2:], strict=True):
        rest = rest.unsqueeze(-1) + stride * torch.arange(size, dtype=torch.float64)
    for index, row in enumerate(numbers):  # row by row, to avoid a second copy of a large weight
        start = first + index // group * strides[0] + index % group * strides[1]
        if not torch.equal(row, start + rest):
            raise _untraceable(model, f"{name} is not a regular part of one parameter")
    if min(strides) < 0 or int(numbers[-1].max()) not in starts[parameter]:
        raise _untraceable(model, f"{name} is not within the parameter {parameter}, in its order")
    return Place(parameter, tuple(numbers.shape), sizes, first - starts[parameter].start, strides)


def _group(along: Tensor) -> int:
    """Number of elements before the step size first changes, if it divides the length; else the length itself."""
    steps = along.diff()
    other = (steps != steps[:1]).nonzero()
    group = int(other[0]) + 1 if len(other) else len(along)
    return group if len(along) % group == 0 else len(along)


def _numbered_model(model: Model) -> tuple[Any, dict[str, range]]:
    """Build a one-block plain model with the real widths and numbered elements; return it and the ranges."""
    small = (_small_native(model) if is_native(model.original_model) else _small_huggingface(model)).double()
    starts: dict[str, range] = {}
    end = 0
    for name, parameter in small.named_parameters():
        starts[name] = range(end, end + parameter.numel())
        parameter.requires_grad_(False)
        torch.arange(end, end + parameter.numel(), out=parameter.data.view(-1))
        end += parameter.numel()
    return small, starts


def _small_native(model: Model) -> Any:
    return build(
        model.original_model.cfg, n_layers=1, d_vocab=_TRACED_VOCABULARY, d_vocab_out=-1, n_ctx=_TRACED_CONTEXT
    )


def _small_huggingface(model: Model) -> Any:
    config = copy.deepcopy(model.original_model.config)
    n_layers = len(model.blocks)
    for key, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == n_layers:
            setattr(config, key, value[:1])  # has one entry per block
        if key.endswith("_token_id") and value is not None:
            setattr(config, key, 0)
    config.num_hidden_layers, config.vocab_size = 1, _TRACED_VOCABULARY
    return _on_meta(model, config).to_empty(device="cpu")


def _state_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in the state dict of the plain model behind a hooked one."""
    wrapped = model.original_model
    plain = build(wrapped.cfg) if is_native(wrapped) else _on_meta(model, wrapped.config)
    return {name: tuple(value.shape) for name, value in plain.state_dict().items() if isinstance(value, Tensor)}


def _on_meta(model: Model, config: Any) -> Any:
    """Build a model of this configuration on the meta device, without allocating its weights."""
    try:
        with torch.device("meta"):
            return type(model.original_model)(copy.deepcopy(config))
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, AssertionError) as error:
        raise _untraceable(model, f"no model can be built from its configuration ({type(error).__name__})") from error


def _untraceable(model: Model, why: str) -> ValueError:
    return ValueError(f"cannot trace the Hugging Face layout of {model.cfg.architecture}: {why}")


def _check_names(given: Mapping[str, Any], wanted: Mapping[str, Any], kind: str) -> None:
    unknown = [name for name in given if name not in wanted]
    missing = [name for name in wanted if name not in given]
    for names, what in ((unknown, "unknown"), (missing, "missing")):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            raise ValueError(
                f"the masks do not fit the model: {what} by {kind}: {shown} (the model has {len(wanted)} such "
                f"parameters, for example {next(iter(wanted))})"
            )
