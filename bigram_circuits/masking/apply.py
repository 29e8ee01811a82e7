"""Apply a subnetwork, or gates that are being learned, to a live model, and remove it again.

Masks are torch parametrizations of the leaf modules whose weights the forward pass reads, so hooks, `run_with_cache`,
`generate` and the canonical weights all see the masked model, while the weights themselves stay untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bigram_circuits.masking.gates import Gates
from bigram_circuits.models.model import Model
from bigram_circuits.models.weights import WeightGate, WeightSite, weight_sites
from bigram_circuits.subnetwork import Subnetwork


@contextmanager
def masked(model: Model, subnetwork: Subnetwork) -> Iterator[Any]:
    """Within the `with` block, every weight outside `subnetwork` is 0; afterwards the model is restored bit for bit.

    Raises:
        ValueError: If the subnetwork's names or shapes do not match the model's, or the model is already masked.
    """
    subnetwork.check_fits(model)

    def mask(site: WeightSite) -> nn.Module:
        return _Mask(site.to_stored(subnetwork[site.name]).contiguous().to(site.original.device))

    with _parametrized(model, mask):
        yield model


@contextmanager
def gated(model: Model, gates: Gates) -> Iterator[Any]:
    """Within the `with` block, every gated weight is multiplied by its soft gate (`gates.gate`).

    Call `gates.refresh(...)` before each forward pass. Only the gates' scores receive gradients: all model parameters
    are frozen within the block, and get back their `requires_grad` afterwards.
    """
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        with _parametrized(model, lambda site: _Gate(gates, site.name) if site.name in gates.names else None):
            yield model
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


@contextmanager
def _parametrized(model: Model, make: Callable[[WeightSite], nn.Module | None]) -> Iterator[None]:
    sites = weight_sites(model)
    if any(parametrize.is_parametrized(site.leaf, "weight") for site in sites):
        raise ValueError("the model is masked already: leave that `with` block first, or combine subnetworks with &")
    training = model.training
    done: list[WeightSite] = []
    try:
        for site in sites:
            parametrization = make(site)
            if parametrization is None:
                continue
            # `unsafe` skips a trial call; our parametrizations preserve shape and dtype
            parametrize.register_parametrization(site.leaf, "weight", parametrization, unsafe=True)
            done.append(site)
            site.leaf.train(training)  # new modules start in training mode
        yield
    finally:
        for site in done:
            parametrize.remove_parametrizations(site.leaf, "weight", leave_parametrized=False)


class _Mask(WeightGate):
    """The weight where the mask is True, 0 elsewhere (even if the weight is not finite)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def gate(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)  # type: ignore[arg-type]


class _Gate(WeightGate):
    """The weight times its soft gate."""

    def __init__(self, gates: Gates, name: str) -> None:
        super().__init__()
        self._gated = lambda weight: gates.gate(name, weight)  # a closure, so that the gates do not become a submodule

    def gate(self, weight: Tensor) -> Tensor:
        return self._gated(weight)
