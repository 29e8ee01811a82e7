"""Replace the values of nodes through hooks: of those that a circuit drops, or as far as gates are closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bigram_circuits.masking.replacing import Replacer
from bigram_circuits.models.interventions import intervened
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import NodeSite
from bigram_circuits.replacement import Replacement

Gate = Callable[[str], Bool[Tensor, " node"] | Float[Tensor, " node"]]
"""Name of a hook point -> one value per node: whether it is kept, or its soft gate."""


@contextmanager
def nodes_replaced(model: Model, sites: Sequence[NodeSite], gate: Gate, replacement: Replacement) -> Iterator[None]:
    """Within the `with` block, the value of every node is replaced as far as its gate is closed.

    Args:
        model: From `load_model`.
        sites: The hook points, from `node_sites`.
        gate: Asked for the gates of a hook point in every forward pass.
        replacement: What takes the place of a node.
    """
    replacer = Replacer(model, replacement, [site.name for site in sites])
    with replacer.ready(), intervened(model, [(site.name, _replacing(site, gate, replacer)) for site in sites]):
        yield


def _replacing(site: NodeSite, gate: Gate, replacer: Replacer) -> Callable[..., Tensor]:
    def hook(value: Tensor, hook: Any) -> Tensor:
        given = gate(site.name)
        here = site.spread(given).view(value.shape[2:]).to(value.device)
        other = replacer.at(site.name, value)
        if given.dtype == torch.bool:
            return torch.where(here, value, other)
        here = here.to(value.dtype)
        return value * here if replacer.is_zero else other + here * (value - other)

    return hook
