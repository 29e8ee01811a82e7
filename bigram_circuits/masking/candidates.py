"""What a mask is learned over: the weights and nodes that have gates, and those that are kept anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from bigram_circuits.circuit import EDGE, WEIGHT, Circuit
from bigram_circuits.masking.apply import Mask, Site, gated
from bigram_circuits.masking.gates import GateGroup, Gates, Slots, group_gates
from bigram_circuits.models.edges import EdgeSite, edge_sites
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import NodeSite, layer_of_point, node_sites
from bigram_circuits.models.weights import WeightSite, weight_sites
from bigram_circuits.recipe import METHODS, SparsifyConfig
from bigram_circuits.replacement import Replacement
from bigram_circuits.subnetwork import Subnetwork

OVERLAP_WEIGHT = 30.0
"""What it costs by default to keep what another mask keeps, nats."""


@dataclass(frozen=True)
class Apart:
    """The masks that another is learned apart from."""

    masks: tuple[Mask, ...]
    """The masks, at least one."""
    overlap_weight: float
    """Nats; infinite: nothing that one of them keeps may be kept."""


class Candidates:
    """The gated weights and nodes of a recipe on a model."""

    def __init__(self, model: Model, config: SparsifyConfig, replacement: Replacement | None = None) -> None:
        """Lay out the gates of a recipe; `replacement` is what takes the place of nodes, by default zero.

        Raises:
            ValueError: If the model lacks a unit or layer, or there is nothing to mask.
        """
        self._model, self._replacement = model, replacement or Replacement()
        self._is_circuit, units = config.units is not None, config.units or (WEIGHT,)
        self._weights: tuple[WeightSite, ...] = weight_sites(model) if WEIGHT in units else ()
        weights = group_gates(self._weights, config.unit_of, config.layers) if self._weights else ()
        nodes = _nodes(model, [unit for unit in units if unit not in (WEIGHT, EDGE)], config.layers)
        self.nodes: tuple[Site, ...] = (*nodes, *(_edges(model, config) if EDGE in units else ()))
        """The hook points whose nodes have gates, or the edges to which do."""
        slots = [_slots(model, site, bool(weights)) for site in self.nodes]
        self.groups = (*weights, *_groups(slots, max((group.place.stop for group in weights), default=0)))
        """The gates, by weight matrix and hook point."""
        self.gated_size = sum(group.site.size for group in self.groups)
        """The number of gated weights or nodes; where there are both, a node counts as the weights that it owns."""
        self.total = sum(site.size for site in (*self._weights, *slots))
        """The number of all weights and nodes that the mask is of, including those without a gate."""

    @property
    def device(self) -> torch.device:
        """The device that the model reads tokens on; the weights of later blocks may be on others."""
        return torch.device(self._model.cfg.device)

    @property
    def everything(self) -> Circuit:
        """The circuit of all nodes and edges that have gates, with their replacement."""
        masks = {site.name: torch.ones(_shape(site), dtype=torch.bool) for site in self.nodes}
        origin: dict[str, Any] = {"model_name": self._model.cfg.model_name, "weight_hash": weight_hash(self._model)}
        return Circuit(masks, **origin, lineage="full").with_replacement(self._replacement)

    @property
    def droppable(self) -> Mask:
        """All weights and nodes that have a gate."""
        gated = {group.site.name for group in self.groups}
        masks = {one.name: torch.full(one.shape, one.name in gated) for one in self._weights}
        masks |= {site.name: torch.ones(_shape(site), dtype=torch.bool) for site in self.nodes}
        origin: dict[str, Any] = {"model_name": self._model.cfg.model_name, "weight_hash": weight_hash(self._model)}
        return (Circuit if self._is_circuit else Subnetwork)(masks, **origin, lineage="droppable")

    def gates(
        self,
        config: SparsifyConfig,
        seed: int,
        within: Mask | None,
        apart: Apart | None = None,
        *,
        by_block: bool = False,
    ) -> tuple[Gates, int | None]:
        """The gates of a recipe, and the size of what is to stay open in the end (None if it is not fixed).

        `by_block` makes a part of the scores of every block.

        Raises:
            ValueError: If the size is below that of what has no gate, or above what masks that it is apart from leave.
        """
        wanted = None
        if config.target_fraction is not None:
            wanted = round(config.target_fraction * self.total) - (self.total - self.gated_size)
            if wanted < 0:
                raise ValueError(
                    f"target_fraction is {config.target_fraction}, but the weights without gates are already "
                    f"{(self.total - self.gated_size) / self.total:.4g} of all"
                )
        start: dict[str, Any] = {
            "first_score": float(config.first_score),
            "within": within and self._stored(within),
            **(self._times_kept(apart) if apart else {}),
            "dtype": torch.bfloat16 if config.low_memory else torch.float32,
            "by_block": by_block,
        }
        method = METHODS[config.method]
        gates = method.from_config(self.groups, config, seed=seed, wanted=wanted, **start)
        if apart and gates.n_possible < max(1, wanted or 0):
            raise ValueError(
                f"cannot keep {wanted or 'anything'}: only {gates.n_possible} that may be kept are in none of the "
                f"{len(apart.masks)} masks of apart_from"
            )
        return gates, wanted

    def applied(self, gates: Gates, *, on_any: bool = False) -> AbstractContextManager[Any]:
        """Within the `with` block, the model computes with these gates.

        `on_any` lets it read any sequences, at the same cost, where the replacement knows some prompts alone.
        """
        replacement = self._replacement
        if on_any and replacement.kind == "counterfactual":
            replacement = Replacement("resample")
        return gated(self._model, gates, replacement)

    def mask(self, gates: Gates, wanted: int | None, within: Mask | None, apart: Apart | None = None) -> Mask:
        """What gates that are open keep, and everything without a gate."""
        opened = gates.masks(wanted)
        masks = {
            site.name: site.from_stored(opened[site.name])
            if site.name in opened
            else torch.ones(site.shape, dtype=torch.bool)
            for site in self._weights
        }
        masks |= {site.name: opened[site.name] for site in self.nodes}
        bounds = "" if within is None else f" within ({within.lineage})"
        bounds += f" apart from {len(apart.masks)} other{'s' * (len(apart.masks) > 1)}" if apart else ""
        origin: dict[str, Any] = {
            "model_name": self._model.cfg.model_name,
            "weight_hash": weight_hash(self._model),
            "lineage": f"found{bounds}",
        }
        if not self._is_circuit:
            return Subnetwork(masks, **origin)
        return Circuit(masks, **origin).with_replacement(self._replacement)

    def check_covers(self, mask: Mask, what: str) -> None:
        """Raise ValueError unless a mask, the argument `what`, is of what is found, and has a part for all of it."""
        kind = Circuit if self._is_circuit else Subnetwork
        if not isinstance(mask, kind):
            raise ValueError(f"{what} should be a {kind.__name__}, as what is found, not a {type(mask).__name__}")
        mask.check_fits(self._model)
        searched = [site.name for site in (*self._weights, *self.nodes)]
        missing = [name for name in searched if name not in mask]
        if missing:
            raise ValueError(f"{what} has no mask of {missing[0]}, which is searched")

    def _times_kept(self, apart: Apart) -> dict[str, Any]:
        """The arguments of gates that say how many masks keep each weight and node, and what that costs."""
        times: dict[str, Tensor] = {}
        for mask in apart.masks:
            times = {name: one.float().add_(times.get(name, 0.0)) for name, one in self._stored(mask).items()}
        return {"times_kept": times, "overlap_weight": float(apart.overlap_weight)}

    def _stored(self, mask: Mask) -> Mapping[str, Bool[Tensor, "..."]]:
        """A mask of what is searched, in stored layout."""
        stored = {site.name: site.to_stored(mask[site.name]) for site in self._weights}
        return stored | {site.name: mask[site.name] for site in self.nodes}


def _nodes(model: Model, units: Sequence[str], layers: Sequence[int] | None) -> tuple[NodeSite, ...]:
    """The hook points of some units, in some layers (None: all)."""
    if not units:
        return ()
    sites = node_sites(model, units)
    if layers is None:
        return sites
    chosen = tuple(site for site in sites if layer_of_point(site.name) in layers)
    if not chosen:
        raise ValueError(f"nothing to mask: units {list(units)} and layers {list(layers)} leave no nodes")
    return chosen


def _edges(model: Model, config: SparsifyConfig) -> tuple[EdgeSite, ...]:
    """The readers of a model, to which all edges have gates."""
    for name, given in (("layers", config.layers is not None), ("low_memory", config.low_memory)):
        if given:
            raise ValueError(f"edges are learned together, with all activations kept: leave {name} out")
    return edge_sites(model)


def _shape(site: Site) -> tuple[int, ...]:
    """The shape of a mask."""
    return site.shape if isinstance(site, EdgeSite) else (site.count,)


def _slots(model: Model, site: Site, as_weights: bool) -> Slots:
    ones = torch.ones(_shape(site), dtype=torch.float32, device=model.cfg.device)
    return Slots(site, ones, _weights_owned(model, site) if as_weights else 1)


def _weights_owned(model: Model, site: Site) -> int:
    """How many weights each of the nodes owns, of a matrix that they share an equal part."""
    unit = site.unit if isinstance(site, NodeSite) else EDGE
    component = {"head": "attn", "attn": "attn", "neuron": "mlp", "mlp": "mlp"}.get(unit)
    if component is None:
        raise ValueError(f"the {unit}s of {site.name} own no weights, so that they cannot be learned beside weights")
    layer = layer_of_point(site.name)
    whole = sum(one.size for one in weight_sites(model) if (one.layer, one.component) == (layer, component))
    return max(1, whole // site.count)


def _groups(slots: Sequence[Slots], end: int) -> list[GateGroup]:
    groups = []
    for one in slots:
        groups.append(GateGroup(one, "node", end, one.original.numel()))
        end += one.original.numel()
    return groups
