"""The nodes of a hooked model: places in the computation whose value a hook can replace.

| unit | node | hook point |
|---|---|---|
| `head` | an attention head's z, before W_O | `blocks.i.attn.hook_z`, one head's slice |
| `neuron` | an MLP neuron's activation, which W_out reads | `blocks.i.mlp.hook_post`, one coordinate |
| `attn`, `mlp` | what it adds to the residual stream | `blocks.i.hook_attn_out`, `blocks.i.hook_mlp_out` |

A hook point of these, named as such, stands for its unit in that block. Any other hook point with an activation
[batch, pos, d] can be named, for example `blocks.1.hook_resid_post`: each of its coordinates is a node. So are the
latents of a dictionary within `spliced`: `blocks.1.hook_resid_post.features`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bigram_circuits.models.activations import NotShownError, record
from bigram_circuits.models.interventions import hook_point
from bigram_circuits.models.model import Model
from bigram_circuits.names import in_block

UNITS = {"head": "attn.hook_z", "neuron": "mlp.hook_post", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
"""Hook point of each unit, within a block."""
_HEADS, _WHOLE = ("head",), ("attn", "mlp")


@dataclass(frozen=True)
class NodeSite:
    """The nodes of one hook point."""

    name: str
    """The hook point, for example `blocks.0.attn.hook_z`."""
    unit: str
    """`head`, `neuron`, `attn`, `mlp`, or `coordinate` for a hook point that was named."""
    count: int
    """Number of nodes."""
    width: int
    """Size of a position's activation, with heads flattened."""

    def spread(self, values: Shaped[Tensor, " node"]) -> Shaped[Tensor, " width"]:
        """One value for every number of a position's activation, from one for every node."""
        return values.repeat_interleave(self.width // self.count)


def node_sites(model: Model, units: str | Iterable[str] = ("head", "neuron")) -> tuple[NodeSite, ...]:
    """List the hook points whose nodes have these units, in the order of blocks.

    Args:
        model: From `load_model`.
        units: `head`, `neuron`, `attn`, `mlp`, or names of hook points; one, or several.

    Raises:
        ValueError: If there are none, one is named twice, or no hook point has that name (the nearest are named).
        NotShownError: If the model has no such node, or its forward pass does not reach the hook point.
    """
    wanted = [units] if isinstance(units, str) else list(units)
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"units must be different ones of {', '.join(UNITS)}, or names of hook points, not {wanted}")
    named = [(_unit_at(name) or unit, name) for unit in wanted for name in _points(model, unit)]
    twice = [name for place, (_, name) in enumerate(named) if name in [other for _, other in named[:place]]]
    if twice:
        raise ValueError(f"units {', '.join(wanted)} name the nodes of {twice[0]} twice")
    tokens = torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device)
    with torch.inference_mode():
        seen, _ = record(model, tokens, [name for _, name in named])
    sites = [_site(unit, name, seen[name]) for unit, name in named]
    return tuple(sorted(sites, key=lambda site: (layer_of_point(site.name), wanted.index(_asked(site, wanted)))))


def _unit_at(name: str) -> str | None:
    """The unit whose nodes a hook point has, if it is that of one."""
    point = name.removeprefix(in_block(max(layer_of_point(name), 0), ""))
    return next((unit for unit, its in UNITS.items() if its == point), None)


def _points(model: Model, unit: str) -> Sequence[str]:
    """The hook points of a unit."""
    if unit in UNITS:
        there = [in_block(layer, UNITS[unit]) for layer in range(model.cfg.n_layers)]
        there = [name for name in there if hook_point(model, name) is not None]
        if not there:
            raise NotShownError(f"this model has no nodes of the unit {unit!r}")
        return there
    if hook_point(model, unit) is None:
        near = difflib.get_close_matches(unit, [*UNITS, *model.hook_dict], 3)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(f"{unit!r} is neither a unit ({', '.join(UNITS)}) nor a hook point of this model{hint}")
    return [unit]


def _site(unit: str, name: str, value: Float[Tensor, "..."]) -> NodeSite:
    shape = tuple(value.shape)
    if len(shape) < 3 or shape[:2] != (1, 2):
        raise NotShownError(f"the activation {name} has the axes {list(shape)}, not [batch, pos, ...]")
    width = value[0, 0].numel()
    if unit in _WHOLE:
        return NodeSite(name, unit, 1, width)
    if unit in _HEADS:
        return NodeSite(name, unit, shape[2], width)
    return NodeSite(name, unit if unit in UNITS else "coordinate", width, width)


def _asked(site: NodeSite, wanted: Sequence[str]) -> str:
    return site.unit if site.unit in wanted else site.name


def layer_of_point(name: str) -> int:
    """The block of a hook point; -1 before the blocks."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else -1
