"""Apply a circuit to a live model: hooks replace the value of every node that is not kept.

A gate g replaces the value x of a node by g x + (1 - g) x', where x' is

- `zero`: 0;
- `mean`: the mean of x over a text, in the model as it is, at every position alike;
- `resample`: the node's value in another sequence of the same batch, at the same position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bigram_circuits.circuit import Circuit
from bigram_circuits.models.activations import batch_size_for, check_tokens
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import NodeSite, node_sites
from bigram_circuits.models.state import in_use, uses_model
from bigram_circuits.text.corpus import in_order, token_array

REPLACEMENTS = ("zero", "mean", "resample")
"""The values of `replace`."""

Means = dict[str, Float[Tensor, " width"]]
"""Mean activation by hook point, heads flattened, float64 on the CPU."""


@contextmanager
def circuit_applied(model: Model, circuit: Circuit, replace: str, text: Any, seed: int) -> Iterator[Any]:
    """`masked` for a circuit; see there."""
    if replace not in REPLACEMENTS:
        raise ValueError(f"replace must be one of {', '.join(REPLACEMENTS)}, not {replace!r}")
    if replace == "mean" and text is None:
        raise ValueError("replace='mean' needs a text to average over: give text= (token ids, or a corpus)")
    with in_use(model, "masked", block=True):
        circuit.check_fits(model)
        sites = [site for site in node_sites(model, circuit.asked) if not bool(circuit[site.name].all())]
        means = mean_values(model, text, sites) if replace == "mean" else {}
        hooks = [
            (site.name, _replacing(site, circuit[site.name], replace, means.get(site.name), seed)) for site in sites
        ]
        with model.hooks(fwd_hooks=hooks):
            yield model


@uses_model
def mean_values(model: Model, text: Any, sites: Sequence[NodeSite]) -> Means:
    """Mean activations at hook points over all positions of a text.

    Args:
        model: From `load_model`.
        text: Token ids [sequence, position], or a corpus: its held-out part.
        sites: From `node_sites`.
    """
    tokens: Integer[np.ndarray, "sequence position"] = token_array(text)
    check_tokens(model, tokens)
    totals = {site.name: torch.zeros(site.width, dtype=torch.float64) for site in sites}

    def adding(name: str) -> Callable[..., None]:
        def add(value: Tensor, hook: Any) -> None:
            totals[name] += value.flatten(2).double().sum((0, 1)).cpu()

        return add

    with torch.inference_mode():
        for batch in in_order(tokens, batch_size_for(model, tokens.shape[1])):
            hooks = [(site.name, adding(site.name)) for site in sites]
            model.run_with_hooks(batch.to(model.cfg.device), fwd_hooks=hooks)
    return {name: total / tokens.size for name, total in totals.items()}


def _replacing(
    site: NodeSite, kept: Bool[Tensor, " node"], replace: str, mean: Float[Tensor, " width"] | None, seed: int
) -> Callable[..., Tensor]:
    """A forward hook that replaces the values of the nodes that are not kept."""
    inside = site.spread(kept)

    def hook(value: Tensor, hook: Any) -> Tensor:
        flat = value.flatten(2)
        if mean is not None:
            other = mean.to(flat).expand_as(flat)
        elif replace == "resample":
            other = flat[partners(len(flat), seed).to(flat.device)]
        else:
            other = torch.zeros_like(flat)
        return torch.where(inside.to(flat.device), flat, other).view(value.shape)

    return hook


def partners(n: int, seed: int) -> Integer[Tensor, " n"]:
    """For each of n sequences another one, paired at random in one cycle.

    Raises:
        ValueError: If there is only one sequence.
    """
    if n < 2:
        raise ValueError("resampling takes activations from another sequence, but there is only one")
    order = np.random.default_rng(seed).permutation(n)
    partner = torch.empty(n, dtype=torch.long)
    partner[torch.from_numpy(order)] = torch.from_numpy(np.roll(order, 1))
    return partner
