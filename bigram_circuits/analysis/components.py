"""A small language for parts of a model.

    L2H3                     one attention head (layer 2, head 3)
    L0N5, L0N[1,5,7]         MLP neurons of a layer
    L1.attn, L0.mlp          a block's whole attention, or whole MLP
    L2                       both
    L1H2 + L0.mlp            several at once
    heads, attns, mlps, layers    each of them in turn
    subnetwork, complement, random    the weights of a subnetwork, all others, a matched random set
    circuit, complement, random       the same of the nodes of a circuit

The older spellings `head 2.3`, `neurons 0.[1,5,7]`, `attn 1` and `layer 2` are also accepted (see `names`).

A part can also be a `Subnetwork`, a set of weights, or a `Circuit`, a set of nodes. The activation of a head is its z
(before W_O), that of a neuron is what W_out reads, and that of an attention or MLP is what it adds to the residual
stream, including biases. Biases do not belong to heads or neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from bigram_circuits.bitmasks import BitMasks
from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import Mask
from bigram_circuits.measures.conditions import OWN
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import UNITS
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import COMPONENTS, PartName, WeightName, head_label, in_block, layer_of, neuron_label
from bigram_circuits.subnetwork import Subnetwork

M = TypeVar("M", bound=BitMasks)

_SWEEPS = ("heads", "attns", "mlps", "layers")
_OF_SUBNETWORK = (*OWN, "complement", "random")
_ALLOWED = (
    "say 'L2H3' for a head, 'L0N5' or 'L0N[1,5,7]' for neurons, 'L1.attn', 'L1.mlp', or 'L1' for both, several joined "
    "by ' + ', 'heads', 'attns', "
    "'mlps' or 'layers' for each in turn, 'subnetwork', 'circuit', 'complement' or 'random', or give a Subnetwork or a "
    "Circuit"
)


@dataclass(frozen=True)
class Part:
    """A part of a model that can be ablated, or added to a subnetwork."""

    name: str
    """For example `L1H2 + L0.mlp`."""
    components: tuple[PartName, ...] = ()
    """The heads, neurons, attentions and MLPs it consists of."""
    subnetworks: tuple[Subnetwork, ...] = ()
    """The sets of weights it consists of; with any, only weights and no activations can be ablated."""
    circuits: tuple[Circuit, ...] = ()
    """The sets of nodes it consists of, over the same nodes; with any, only nodes can be ablated."""

    def weights(self, empty: Subnetwork, *, shared: bool = False) -> Subnetwork:
        """All its weights, under its name, added to the empty subnetwork of the model.

        `shared`: including the W_K and W_V that a head shares with its group.
        """
        chosen = empty
        for component in self.components:
            chosen |= _weights(component, empty, shared=shared)
        for subnetwork in self.subnetworks:
            chosen |= subnetwork
        return chosen.named(self.name)

    def nodes(self, like: Circuit) -> Circuit:
        """All its nodes, under its name, among those of a circuit, with its replacement.

        An attention is all of its heads, and an MLP all of its neurons, unless the circuit has it as one node.

        Raises:
            ValueError: If it is a set of weights, or not made of the circuit's nodes.
        """
        if self.subnetworks:
            raise ValueError(f"{self.name!r} is a set of weights, and cannot be joined with a circuit, a set of nodes")
        chosen = like.constant(False)
        for component in self.components:
            chosen = chosen.keep(*_labels(component, like))
        for circuit in self.circuits:
            chosen |= circuit
        return chosen.named(self.name)


def parse(what: Any, model: Model, subnetwork: Mask | None = None) -> tuple[Part, ...]:
    """The parts named by `what`: a string, a `Subnetwork` or `Circuit`, a sequence of these, or them by name.

    Raises:
        ValueError: If a string cannot be parsed, a layer, head or neuron does not exist, a subnetwork does not fit the
            model or is named but not given, or two parts have the same name.
    """
    sizes = _sizes(model)
    what = _held(what)
    if isinstance(what, Subnetwork | Circuit) or not isinstance(what, Mapping):
        items: Iterable[Any] = [what] if isinstance(what, str | Subnetwork | Circuit) else what
        if not isinstance(items, Sequence):
            raise ValueError(f"cannot read a part of a model from a {type(what).__name__}: {_ALLOWED}")
        parts = [part for item in items for part in _read(item, sizes, model, subnetwork)]
    else:
        parts = []
        for name, item in what.items():
            found = _read(item, sizes, model, subnetwork)
            if len(found) != 1:
                raise ValueError(f"{name!r} should be one part of a model, but {item!r} stands for {len(found)}")
            parts.append(replace(found[0], name=str(name)))
    if not parts and what:
        raise NotShownError(f"this model has none of the parts {what!r}")
    if not parts:
        raise ValueError(f"no part of the model is named: {_ALLOWED}")
    names = [part.name for part in parts]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two parts are called {twice!r}: give a part once, and name subnetworks with .named(...)")
    return tuple(parts)


@dataclass(frozen=True)
class _Sizes:
    """The number of heads and of neurons, by layer; a layer without attention or MLP has no entry."""

    heads: Mapping[int, int]
    neurons: Mapping[int, int]

    @property
    def layers(self) -> list[int]:
        """The layers with weights to mask."""
        return sorted({*self.heads, *self.neurons})

    def parts(self, kind: str) -> list[PartName]:
        """Every `head`, `attn`, `mlp` or `layer` of the model."""
        if kind == "head":
            return [PartName("head", layer, (index,)) for layer, count in self.heads.items() for index in range(count)]
        there = {"attn": self.heads, "mlp": self.neurons, "layer": self.layers}
        return [PartName(kind, layer) for layer in there[kind]]

    def whole(self, name: PartName) -> tuple[PartName, ...]:
        """The attention and MLP of a layer; any other part unchanged."""
        if name.kind != "layer":
            return (name,)
        return tuple(part for kind in COMPONENTS for part in self.parts(kind) if part.layer == name.layer)

    def check(self, what: str, name: PartName) -> None:
        if name.layer not in self.layers:
            raise ValueError(f"{what!r}: there is no layer {name.layer}: layers are 0 to {self.layers[-1]}")
        if name.kind == "layer":
            return
        kind, counts = ("attention", self.heads) if name.kind in ("head", "attn") else ("MLP", self.neurons)
        if name.layer not in counts:
            raise ValueError(f"{what!r}: layer {name.layer} of this model has no {kind}")
        count = counts[name.layer]
        wrong = next((index for index in name.indices if index >= count), None)
        if wrong is not None:
            one = name.kind.removesuffix("s")
            raise ValueError(
                f"{what!r}: there is no {one} {wrong} in layer {name.layer}: it has {one}s 0 to {count - 1}"
            )


def _sizes(model: Model) -> _Sizes:
    first: dict[str, dict[int, int]] = {matrix: {} for matrix in ("W_Q", "W_out")}
    for site in weight_sites(model):
        if site.matrix in first:
            first[site.matrix][site.layer] = site.shape[0]
    return _Sizes(first["W_Q"], first["W_out"])


def _held(item: Any) -> Any:
    """The subnetwork or circuit of a `FoundSubnetwork`, a `FoundCircuit` or a `Run`; anything else as it is."""
    return next(
        (held for kind in (Subnetwork, Circuit) if isinstance(held := getattr(item, kind.noun, None), kind)), item
    )


def _of_masks(name: str, masks: Iterable[Mask], components: Iterable[PartName] = ()) -> Part:
    found = tuple(masks)
    circuits = tuple(one for one in found if isinstance(one, Circuit))
    subnetworks = tuple(one for one in found if isinstance(one, Subnetwork))
    return Part(name, tuple(components), subnetworks, circuits)


def _read(item: Any, sizes: _Sizes, model: Model, subnetwork: Mask | None) -> list[Part]:
    if isinstance(item := _held(item), Subnetwork | Circuit):
        item.check_fits(model)
        return [_of_masks(item.lineage, [item])]
    if not isinstance(item, str):
        raise ValueError(f"cannot read a part of a model from a {type(item).__name__}: {_ALLOWED}")
    text = " ".join(item.split())
    if text in _SWEEPS:
        return [Part(name.label, sizes.whole(name)) for name in sizes.parts(text.removesuffix("s"))]
    components: list[PartName] = []
    masks: list[Mask] = []
    labels: list[str] = []
    for term in (term.strip() for term in text.split("+")):
        if term in _OF_SUBNETWORK:
            if subnetwork is None:
                raise ValueError(f"{item!r} needs a subnetwork: pass subnetwork=")
            if term in OWN and term != subnetwork.noun:
                raise ValueError(f"{item!r}: what was given is a {subnetwork.noun}")
            subnetwork.check_fits(model)
            sets = {subnetwork.noun: lambda: subnetwork, "complement": lambda: ~subnetwork}
            masks.append(sets.get(term, lambda: subnetwork.random_like(seed=0))())
            labels.append(term)
        else:
            name = _named(term, item, sizes)
            components += sizes.whole(name)
            labels.append(name.label)
    return [_of_masks(" + ".join(labels), masks, components)]


def _named(term: str, whole: str, sizes: _Sizes) -> PartName:
    found = PartName.parse(term)
    if found is None:
        problem = f"{term!r} stands for several parts and cannot be joined" if term in _SWEEPS else _ALLOWED
        raise ValueError(f"cannot read {whole!r} as a part of a model: {problem}")
    if found.kind == "neurons" and not found.indices:
        raise ValueError(f"cannot read {whole!r} as a part of a model: it names no neuron, as in 'L0N[1,5,7]'")
    sizes.check(whole, found)
    return found


def _weights(name: PartName, empty: Subnetwork, *, shared: bool) -> Subnetwork:
    """The weights of a part; `shared`: including the W_K and W_V that a head shares with its group."""
    if name.kind == "head":
        index = name.indices[0]
        return empty.add_head(name.layer, index) if shared else ~(~empty).drop_head(name.layer, index)
    if name.kind == "neurons":
        return empty.add_neurons(name.layer, name.indices)
    return Subnetwork(
        {weight: torch.full(shape, WeightName.parse(weight).part == name) for weight, shape in empty.shapes.items()},
        model_name=empty.model_name,
        weight_hash=empty.weight_hash,
    )


def _labels(name: PartName, like: Circuit) -> list[str]:
    """The labels of a part's nodes in a circuit."""
    if name.kind == "head" or (name.kind in COMPONENTS and in_block(name.layer, UNITS[name.kind]) in like):
        return [name.label]
    if name.kind == "neurons":
        return [neuron_label(name.layer, index) for index in name.indices]
    unit, label = {"attn": ("head", head_label), "mlp": ("neuron", neuron_label)}[name.kind]
    count = like.shapes.get(in_block(name.layer, UNITS[unit]), (0,))[0]
    return [label(name.layer, index) for index in range(count)] or [name.label]


# --- the activations of a part, and matched random ones ---

Coordinates = Mapping[str, Bool[Tensor, " _"]]
"""Hook point -> mask of the activation's coordinates that are replaced."""


def coordinates(model: Model, part: Part) -> dict[str, Bool[Tensor, " _"]]:
    """The activations of a part: for every hook point, a mask of the coordinates (heads flattened) that belong to it.

    Raises:
        ValueError: If the part is a set of weights, which has no activations, or of nodes.
    """
    if part.circuits:
        raise ValueError(f"{part.name!r} has its own replacement, see `replaced`: leave by out")
    if part.subnetworks:
        raise ValueError(f"{part.name!r} is a set of weights, with no activation of its own: ablate it by='weights'")
    shapes = {site.name: site.shape for site in weight_sites(model)}
    found: dict[str, Tensor] = {}
    for component in part.components:
        layer = component.layer
        whose, matrix = ("attn", "W_O") if component.kind in ("head", "attn") else ("mlp", "W_out")
        *inputs, d_model = shapes[str(WeightName(layer, whose, matrix))]
        if component.kind in COMPONENTS:
            name, mask = in_block(layer, f"hook_{component.kind}_out"), torch.ones(d_model, dtype=torch.bool)
        else:
            name = in_block(layer, "attn.hook_z" if component.kind == "head" else "mlp.hook_post")
            mask = torch.zeros(inputs, dtype=torch.bool)
            mask[list(component.indices)] = True
        found[name] = mask.flatten() | found.get(name, torch.zeros(mask.numel(), dtype=torch.bool))
    return found


def random_coordinates(chosen: Coordinates, seed: int) -> dict[str, Bool[Tensor, " _"]] | None:
    """As many random coordinates of the same activations; None if all coordinates of one are chosen."""
    if any(bool(mask.all()) for mask in chosen.values()):
        return None
    drawn = {}
    for name, mask in chosen.items():
        rng = np.random.default_rng((seed, layer_of(name), name.endswith("post")))
        drawn[name] = torch.zeros(mask.shape, dtype=torch.bool)
        drawn[name][torch.from_numpy(rng.choice(mask.numel(), int(mask.sum()), replace=False))] = True
    return drawn


def random_within(pool: M, counts: Mapping[str, int], seed: int = 0) -> M:
    """Draw from what masks keep, uniformly: `counts[name]` weights or nodes of every name (0 if not named).

    Raises:
        ValueError: If the pool has fewer.
    """
    masks = {}
    for index, (name, (kept, _)) in enumerate(pool.by_name().items()):
        count = counts.get(name, 0)
        if not 0 <= count <= kept:
            raise ValueError(f"cannot draw {count} {pool.units} of {name} from {kept}")
        if count == kept:  # nothing is left to chance
            masks[name] = pool[name]
            continue
        mask = torch.zeros(pool.shapes[name], dtype=torch.bool)
        if count:
            there = np.flatnonzero(pool[name].numpy())
            drawn = np.random.default_rng((seed, index)).choice(there, count, replace=False, shuffle=False)
            mask.view(-1)[torch.from_numpy(drawn)] = True
        masks[name] = mask
    drawn = pool & type(pool)(masks, model_name=pool.model_name, weight_hash=pool.weight_hash)
    return drawn.named(f"random {seed} within [{pool.lineage}]")


def matched_counts(chosen: BitMasks, pool: BitMasks) -> dict[str, int] | None:
    """Numbers of weights or nodes chosen of every name; None if a draw of as many could only be the same."""
    counts = {name: count.kept for name, count in chosen.by_name().items()}
    there = {name: count.kept for name, count in pool.by_name().items()}
    return counts if any(0 < count < there[name] for name, count in counts.items()) else None
