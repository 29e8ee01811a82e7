"""How much each node or edge contributes to a target, by the gradient of its gate.

With all gates g between the replaced values (0) and the model as it is (1), the score of a node is

    - the mean over a of  d CE / d g  at g = a for all gates,  a = (k - 1/2) / steps  for k = 1 .. steps

the integrated gradient of its gate (Sundararajan, Taly, Yan 2017, arXiv 1703.01365), with the midpoint rule. As `steps`
grows, the scores sum to CE with all nodes replaced minus CE of the model. With one step at g = 1 it is attribution
patching (Nanda 2023), a linear estimate of what replacing this node alone does; of edges, these are EAP-IG (Hanna et
al. 2024, arXiv 2403.17806) and edge attribution patching (Syed et al. 2023, arXiv 2310.10348).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import circuit_sites, gates_applied
from bigram_circuits.models.activations import batch_size_for, check_tokens, lean_forward
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.text.corpus import in_order

Scores = Mapping[str, Float[Tensor, "..."]]
"""Scores by hook point, in the shape of a circuit's masks."""


@uses_model
def node_effects(
    model: Model,
    circuit: Circuit,
    target: Any,
    tokens: Integer[np.ndarray, "sequence position"],
    *,
    steps: int | None = None,
) -> Scores:
    """Scores of all nodes or edges at a circuit's hook points: what each contributes to the target, nats per position.

    Args:
        model: From `load_model`.
        circuit: Its hook points are scored, with its replacement; which nodes it keeps does not matter.
        target: A target that was checked.
        tokens: Token ids.
        steps: Points of the path from all nodes replaced to none; None: the gradient in the model as it is alone.

    Raises:
        ValueError: If `steps` is not positive, or the circuit does not fit the model.

    Example:
        >>> scores = bc.node_effects(model, circuit, target, text)
        >>> scores["blocks.0.attn.hook_z"]  # a number for every head of block 0
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    check_tokens(model, tokens)
    circuit.check_fits(model)
    sites = circuit_sites(model, circuit)
    gates = {site.name: torch.ones(circuit.shapes[site.name], device=model.cfg.device) for site in sites}
    total = {name: torch.zeros_like(gate, dtype=torch.float64) for name, gate in gates.items()}
    points = [1.0] if steps is None else [(k + 0.5) / steps for k in range(steps)]
    for gate in gates.values():
        gate.requires_grad_(True)
    with gates_applied(model, sites, gates.__getitem__, circuit.replacement), lean_forward(model):
        for batch in in_order(tokens, max(2, batch_size_for(model, tokens.shape[1]))):
            ids = batch.to(model.cfg.device)
            for point in points:
                with torch.no_grad():
                    for gate in gates.values():
                        gate.fill_(point)
                loss = target.cross_entropy(model(ids), ids).mean(1).sum()
                found = torch.autograd.grad(loss, list(gates.values()))
                for name, gradient in zip(gates, found, strict=True):
                    total[name] -= gradient.double() / (len(points) * len(tokens))
    return {name: score.float().cpu() for name, score in total.items()}


def strongest(scores: Scores, like: Circuit) -> Circuit:
    """The nodes of the highest scores, as many at every hook point as a circuit keeps there."""
    masks = dict(like.items())
    for name, score in scores.items():
        chosen = torch.zeros(score.numel(), dtype=torch.bool)
        chosen[score.flatten().argsort(descending=True, stable=True)[: int(masks[name].sum())]] = True
        masks[name] = chosen.view(score.shape)
    origin: dict[str, Any] = {"model_name": like.model_name, "weight_hash": like.weight_hash}
    made = Circuit(masks, **origin, lineage=f"strongest like ({like.lineage})")
    return made.with_replacement(like.replacement)
