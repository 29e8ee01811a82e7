"""A circuit: an immutable set of a model's nodes (heads, neurons, attention and MLP outputs, ...) or of its edges."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from bigram_circuits.bitmasks import BitMasks, Count, operand
from bigram_circuits.models.edges import EdgeLayout, EdgeSite, edge_place, edge_sites
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import UNITS, node_sites
from bigram_circuits.models.state import in_use
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import PartName, WeightName, head_label, in_block, neuron_label
from bigram_circuits.replacement import Replacement
from bigram_circuits.storage.records import CONTENT, check_content, content_checksum, shown
from bigram_circuits.subnetwork import Subnetwork, SubnetworkLike, as_subnetwork

_POINT = re.compile(r"[A-Za-z_][\w.]*")
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_NODE = re.compile(r"(?P<point>[\w.]+)\[(?P<index>\d+)\]")
_MOST_NAMED = 8  # labels in a lineage
_MEAN = "mean."  # before a hook point's name, the name of its means in a file
WEIGHT = "weight"
"""The unit of single weights."""
EDGE = "edge"
"""The unit of edges."""
_UNIT_AT = {point: unit for unit, point in UNITS.items()}


class Circuit(BitMasks):
    """An immutable mapping from hook points to boolean masks of their nodes or edges, True where one is kept.

    `a & b`, `a | b`, `a - b` and `~a` are set operations on circuits over the same nodes; `==` compares the masks. A
    circuit says what takes the place of the nodes that it drops (`replacement`); the result of an operation has that of
    the first circuit.

    It may also hold masks of weight matrices, by their canonical names (`units="weight"`), and masks [reader, writer]
    of edges, by the hook point of their readers (`units="edge"`): what a part of the model writes to the residual
    stream, into what another one reads (`edge_sites`).

    Example:
        >>> some = bc.Circuit.full(model, "head").drop("L1H0")
        >>> some.save("circuit.safetensors")
        >>> bc.Circuit.load("circuit.safetensors", model) == some
        True
        >>> (~some).nodes
        ('L1H0',)
    """

    noun = "circuit"
    units = "nodes"
    file_format = "bigram_circuits.circuit/1"
    more_metadata = ("replace", "seed")
    _not_offered = BitMasks._not_offered | {"asked", "places", "replaced_points"}

    _replacement = Replacement()

    @property
    def replacement(self) -> Replacement:
        """What takes the place of the nodes that are dropped; zero unless `replaced` or `find_circuit` made it."""
        return self._replacement

    def with_replacement(self, replacement: Replacement) -> Circuit:
        """The same nodes, with something else in the place of those that are dropped."""
        made = self.named(self.lineage)
        made._replacement = replacement
        return made

    def _inherit(self, made: Any) -> Any:
        made._replacement = self._replacement
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickle: a copy in another process is as immutable as this one."""
        make, arguments = super().__reduce__()
        return _unpickled, (make, arguments, self._replacement)

    def _besides(self) -> tuple[Mapping[str, np.ndarray], Mapping[str, str]]:
        arrays = {_MEAN + name: mean for name, mean in self._replacement.means.items()}
        metadata = {"replace": self._replacement.kind, "seed": str(self._replacement.seed)}
        return arrays, metadata | ({CONTENT: content_checksum(arrays)} if arrays else {})

    def _read_besides(self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
        if arrays:
            check_content(arrays, metadata)
        means = {name.removeprefix(_MEAN): array for name, array in arrays.items()}
        counts = {name: shape[0] for name, shape in self._shapes.items() if len(shape) == 1}
        counts |= {source.name: len(source.writers) for source in self._layout.sources} if self._layout else {}
        for name, mean in means.items():
            nodes = counts.get(name, 0)
            if not nodes or mean.dtype != np.float32 or mean.ndim not in (1, 2) or mean.shape[-1] % nodes:
                raise ValueError(f"the mean of {name} does not match the names and shapes in its header")
        if not metadata["seed"].isdecimal():
            raise ValueError(f"its seed is {shown(metadata['seed'])}, not a whole number")
        self._replacement = Replacement(metadata["replace"], means, int(metadata["seed"]))

    @classmethod
    def full(cls, model: Model, units: str | Iterable[str] = ("head", "neuron")) -> Circuit:
        """Keep all nodes of these units (see `node_sites`), all edges (`"edge"`), or all weights (`"weight"`)."""
        return cls._constant(model, units, True, "full")

    @classmethod
    def empty(cls, model: Model, units: str | Iterable[str] = ("head", "neuron")) -> Circuit:
        """Keep none of the nodes of these units."""
        return cls._constant(model, units, False, "empty")

    @classmethod
    def _constant(cls, model: Model, units: str | Iterable[str], value: bool, lineage: str) -> Circuit:
        wanted = [units] if isinstance(units, str) else list(units)
        with in_use(model, "Circuit"):
            masks, nodes = {}, [unit for unit in wanted if unit not in (WEIGHT, EDGE)]
            if nodes or not wanted:
                masks = {site.name: torch.full((site.count,), value) for site in node_sites(model, nodes)}
            if EDGE in wanted:
                masks |= {site.name: torch.full(site.shape, value) for site in edge_sites(model)}
            if WEIGHT in wanted:
                masks |= {site.name: torch.full(site.shape, value) for site in weight_sites(model)}
            return cls(masks, model_name=model.cfg.model_name, weight_hash=weight_hash(model), lineage=lineage)

    @classmethod
    def touched_by(cls, subnetwork: SubnetworkLike, model: Model) -> Circuit:
        """The heads and neurons of which a subnetwork keeps any weight that writes to the residual stream."""
        kept = as_subnetwork(subnetwork)
        kept.check_fits(model)
        masks = {}
        for name, mask in Circuit.full(model).items():
            layer, unit = _place(name)
            matrix = f"blocks.{layer}.attn.W_O" if unit == "head" else f"blocks.{layer}.mlp.W_out"
            masks[name] = kept[matrix].flatten(1).any(1) & mask
        lineage = f"nodes of {operand(kept.lineage)}"
        return cls(masks, model_name=kept.model_name, weight_hash=kept.weight_hash, lineage=lineage)

    def weights(self, model: Model) -> Subnetwork:
        """The weights that the kept heads and neurons own: all others are dropped, and what has no node here is kept.

        Of weight matrices that are masked here, these weights are kept.

        With grouped queries, a key and value head is kept as long as a query head of its group is.

        Raises:
            ValueError: If a node is neither a head nor a neuron, or the circuit does not fit the model.
        """
        self.check_fits(model)
        masks, empty = dict(self.masked_weights(model).items()), Subnetwork.empty(model)
        for name, mask in self.items():
            layer, unit = _place(name)
            if unit == WEIGHT:
                continue
            component = {"head": "attn", "neuron": "mlp"}.get(unit)
            if component is None:
                raise ValueError(f"the nodes of {name} own no weights: only heads and neurons do")
            kept, owned = mask.nonzero().flatten().tolist(), empty
            if unit == "neuron":
                owned = empty.add_neurons(layer, kept)
            else:
                for head in kept:
                    owned = owned.add_head(layer, head)
            inside = [weight for weight in masks if weight.startswith(in_block(layer, component))]
            masks |= {weight: masks[weight] & owned[weight] for weight in inside}
        lineage = f"weights of {operand(self.lineage)}"
        return Subnetwork(masks, model_name=self.model_name, weight_hash=self.weight_hash, lineage=lineage)

    def masked_weights(self, model: Model) -> Subnetwork:
        """The masks of weight matrices that it holds; matrices without one are kept whole."""
        masks = {name: self.get(name, mask) for name, mask in Subnetwork.full(model).items()}
        return Subnetwork(masks, model_name=self.model_name, weight_hash=self.weight_hash, lineage=self.lineage)

    def with_weights(self, weights: Subnetwork) -> Circuit:
        """The same nodes, with other masks of the weight matrices that it masks."""
        masks = {name: weights[name] if WeightName.is_one(name) else mask for name, mask in self.items()}
        made = type(self)(
            masks, model_name=self.model_name, weight_hash=self.weight_hash,
            lineage=f"{operand(self.lineage)}, weights of {operand(weights.lineage)}",
        )  # fmt: skip
        return self._inherit(made)

    @property
    def masks_weights(self) -> bool:
        """Whether it holds masks of weight matrices."""
        return any(_place(name)[1] == WEIGHT for name in self)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Labels of the nodes that are kept: `L0H3`, `L0N711`, `L0.attn`, `L0.mlp`, `blocks.0.hook_resid_post[5]`."""
        return tuple(
            _label(name, index)
            for name, mask in self.items()
            if mask.ndim == 1
            for index in mask.nonzero().flatten().tolist()
        )

    @property
    def edges(self) -> tuple[str, ...]:
        """Labels of the edges that are kept: `embed->L0.mlp`, `L0H3->L1H2.k`, `L3.mlp->logits`."""
        return tuple(
            site.label(reader, writer)
            for site in self.edge_sites
            for reader, writer in self[site.name].nonzero().tolist()
        )

    @property
    def edge_sites(self) -> tuple[EdgeSite, ...]:
        """The readers of its edges, in the order of the forward pass; none if it has no edges."""
        return self._layout.sites if self._layout else ()

    @functools.cached_property
    def _layout(self) -> EdgeLayout | None:
        shapes = {name: shape for name, shape in self._shapes.items() if _is_of_edges(name, shape)}
        return EdgeLayout.of_shapes(shapes) if shapes else None

    @property
    def replaced_points(self) -> tuple[str, ...]:
        """The hook points whose values are replaced: those of its nodes, and of the writers of its edges."""
        nodes = tuple(name for name, shape in self._shapes.items() if len(shape) == 1)
        return nodes + (tuple(source.name for source in self._layout.sources) if self._layout else ())

    def to_nodes(self) -> Circuit:
        """The heads and MLPs that lie on a path of kept edges from `embed` to `logits`.

        A path enters a head by its query, key or value. A key-value head is a part of every head of its group.

        Raises:
            ValueError: If the circuit has no edges.
        """
        if self._layout is None:
            raise ValueError("this circuit has no edges: its nodes are .nodes")
        masks: dict[str, torch.Tensor] = {}
        on_path = self._layout.on_path({site.name: self[site.name] for site in self.edge_sites})
        for source in self._layout.sources[1:]:
            unit = "head" if source.heads else "mlp"
            masks[in_block(source.layer, UNITS[unit])] = torch.tensor([writer in on_path for writer in source.writers])
        lineage = f"nodes of {operand(self.lineage)}"
        return Circuit(masks, model_name=self.model_name, weight_hash=self.weight_hash, lineage=lineage)

    def keep(self, *labels: str) -> Circuit:
        """Return a copy that also keeps the nodes or edges of these labels.

        Raises:
            ValueError: If a label is not that of a node or edge here.
        """
        return self._edit(labels, True)

    def drop(self, *labels: str) -> Circuit:
        """Return a copy without the nodes or edges of these labels.

        Raises:
            ValueError: If a label is not that of a node or edge here.
        """
        return self._edit(labels, False)

    def _edit(self, labels: Iterable[str], value: bool) -> Circuit:
        masks = dict(self.items())
        names = list(labels)
        for label in names:
            name, index = self._find(label)
            masks[name][index] = value
        sign = "|" if value else "-"
        shown_names = names if len(names) <= _MOST_NAMED else [f"{len(names)} {self.units_here}"]
        lineage = f" {sign} ".join([operand(self.lineage, sign), *shown_names]) if names else self.lineage
        made = type(self)(masks, model_name=self.model_name, weight_hash=self.weight_hash, lineage=lineage)
        return self._inherit(made)

    def _find(self, label: str) -> tuple[str, int | tuple[int, int]]:
        """The hook point and index of a label."""
        if self._layout is not None and "->" in label:
            name, reader, writer = self._layout.find(label)
            return name, (reader, writer)
        part, node = PartName.parse(label), _NODE.fullmatch(label)
        if part is not None and part.kind != "layer" and len(part.indices) <= 1:
            unit = part.kind.removesuffix("s")
            name, index = f"blocks.{part.layer}.{UNITS[unit]}", part.indices[0] if part.indices else 0
        elif node is not None:
            name, index = node["point"], int(node["index"])
        else:
            raise ValueError(f"{shown(label)} is not the label of a node, such as L0H3, L0N711, L0.attn or L0.mlp")
        if name not in self or index >= self.shapes[name][0]:
            raise ValueError(f"this circuit is over other nodes than {label}")
        return name, index

    def by_layer(self) -> dict[int, Count]:
        """Count kept nodes by layer, edges by their reader's; -1 is before the first block, `logits` after the last."""
        return self._by(lambda place: place[0])

    def by_unit(self) -> dict[str, Count]:
        """Count kept nodes by unit: `head`, `neuron`, `attn`, `mlp`, or the name of a hook point.

        Edges are counted by what they are read for: `q`, `k`, `v`, `mlp` or `logits`.
        """
        return self._by(lambda place: place[1])

    def place_of(self, name: str) -> tuple[int, str]:
        """Return layer and unit of a hook point's nodes, or layer and kind of the reader of edges."""
        readers = {site.name: (site.layer, site.kind) for site in self.edge_sites}
        return readers[name] if name in readers else _place(name)

    @property
    def places(self) -> dict[str, tuple[int, str]]:
        """Layer and unit of the nodes of every hook point; layer -1 is before the first block."""
        return {name: _place(name) for name in self}

    def _by(self, part: Callable[[tuple[int, str]], Any]) -> dict[Any, Count]:
        """Add up the counts by place that agree in a part of it."""
        counts: dict[Any, Count] = {}
        for place, count in self.by_place().items():
            before = counts.get(part(place), Count(0, 0))
            counts[part(place)] = Count(before.kept + count.kept, before.total + count.total)
        return counts

    @property
    def units_here(self) -> str:
        """`edges` if it is over edges alone, else `nodes`."""
        return "edges" if len(self.edge_sites) == len(self) else self.units

    @property
    def asked(self) -> tuple[str, ...]:
        """The units, and other hook points, of its nodes, as `node_sites` takes them: without weights and edges."""
        nodes = (name for name, shape in self._shapes.items() if len(shape) == 1)
        return tuple(dict.fromkeys(_place(name)[1] for name in nodes))

    def check_fits(self, model: Model) -> None:
        """Raise ValueError unless the model has these hook points, with as many nodes or edges, and these matrices."""
        there: dict[str, tuple[int, ...]] = {}
        if self.asked:
            there = {site.name: (site.count,) for site in node_sites(model, self.asked)}
        if self.edge_sites:
            there |= {site.name: site.shape for site in edge_sites(model)}
        if self.masks_weights:
            there |= {site.name: site.shape for site in weight_sites(model)}
        self._check_same_shapes({name: there.get(name) for name in self}, "the model")

    @classmethod
    def _check_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if not _POINT.fullmatch(name):
                raise ValueError(f"{shown(name)} is not the name of a hook point, such as 'blocks.0.attn.hook_z'")
            if WeightName.is_one(name) or _is_of_edges(name, shape):
                continue
            if len(shape) != 1 or shape[0] < 1:
                raise ValueError(f"the nodes of {name} have shape {shape}, but should be a list")
        if edges := {name: shape for name, shape in shapes.items() if _is_of_edges(name, shape)}:
            EdgeLayout.of_shapes(edges)


def _is_of_edges(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and edge_place(name) is not None


def _unpickled(make: Any, arguments: Any, replacement: Replacement) -> Circuit:
    return make(*arguments).with_replacement(replacement)


def _place(name: str) -> tuple[int, str]:
    """Layer and unit of a hook point's nodes, or of a matrix's weights; the hook point's own name if it is no unit."""
    found = _IN_BLOCK.fullmatch(name)
    if found is None:
        return -1, name
    if WeightName.is_one(name):
        return int(found[1]), WEIGHT
    return int(found[1]), _UNIT_AT.get(found[2], name)


def place_label(name: str) -> str:
    """The label of all nodes of a hook point, or weights of a matrix: `L0 heads`, `L0 neurons`, `L0.mlp`."""
    layer, unit = _place(name)
    if unit == name:
        return name
    return PartName(unit, layer).label if unit in ("attn", "mlp") else f"L{layer} {unit}s"


def _label(name: str, index: int) -> str:
    layer, unit = _place(name)
    if unit == "head":
        return head_label(layer, index)
    if unit == "neuron":
        return neuron_label(layer, index)
    return PartName(unit, layer).label if unit in UNITS else f"{name}[{index}]"
