"""Apply a subnetwork, or gates that are being learned, to a live model, and remove it again.

Masks are torch parametrizations of the leaf modules whose weights the forward pass reads, so hooks, `run_with_cache`,
`generate` and the canonical weights all see the masked model, while the weights themselves stay untouched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.edges import edges_replaced
from bigram_circuits.masking.gates import Gates
from bigram_circuits.masking.nodes import nodes_replaced
from bigram_circuits.masking.replacing import make_replacement
from bigram_circuits.models.edges import EdgeSite, edges_exposed
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import NodeSite, node_sites
from bigram_circuits.models.products import MOST_KEPT
from bigram_circuits.models.state import in_use, parameters_frozen, uses_model
from bigram_circuits.models.weights import WeightGate, WeightSite, weight_sites
from bigram_circuits.replacement import Replacement
from bigram_circuits.subnetwork import Subnetwork, SubnetworkLike, as_subnetwork

Site: TypeAlias = NodeSite | EdgeSite
"""A hook point whose nodes, or whose readers' edges, can be replaced."""
Mask: TypeAlias = Subnetwork | Circuit
"""What `masked` can reduce a model to."""

if TYPE_CHECKING:

    class HasCircuit(Protocol):
        """Holds a circuit, such as a `FoundCircuit`."""

        @property
        def circuit(self) -> Circuit:
            """The circuit."""
            ...

    MaskLike: TypeAlias = SubnetworkLike | Circuit | HasCircuit
else:
    MaskLike = Any  # beartype need not look for the attribute: `as_mask` does


def as_mask(given: Any) -> Mask:
    """Return a subnetwork or circuit, or the one that a `FoundSubnetwork`, `FoundCircuit` or `Run` holds.

    Raises:
        ValueError: If it is none of these.
    """
    found = given if isinstance(given, Circuit) else getattr(given, "circuit", None)
    return found if isinstance(found, Circuit) else as_subnetwork(given)


@contextmanager
def masked(
    model: Model, subnetwork: MaskLike, *, replace: str | None = None, text: Any = None, seed: int = 0
) -> Iterator[Any]:
    """Within the `with` block, every weight outside `subnetwork` is 0; afterwards the model is restored bit for bit.

    Of a `Circuit`, the value of every node that it does not keep is replaced (`replace`); nodes of other units are as
    they were. Of edges, every reader reads what the writers of its kept edges write, and a replacement from the others.

    Within the block, only the calling thread can use this model in functions of this package; another thread waits up
    to half a minute for the end of the block.

    Args:
        model: From `load_model`.
        subnetwork: The weights to keep: a `Subnetwork`, or something that holds one, such as a `FoundSubnetwork`. Or
            the nodes to keep: a `Circuit`, or what holds one, such as a `FoundCircuit`.
        replace: What takes the place of a circuit's nodes, as for `replaced`; by default what the circuit says.
        text: As for `replaced`.
        seed: As for `replaced`.

    Raises:
        ValueError: If the subnetwork's names or shapes do not match the model's, the model is already masked, or it is
            in compatibility mode; or if `replace` is unknown or lacks its text.
        RuntimeError: If another thread keeps the model masked.

    Example:
        >>> with bc.masked(model, found):
        ...     logits, cache = model.run_with_cache("import os")
        >>> cache["blocks.0.hook_resid_post"].shape  # [batch, pos, d_model]
    """
    kept = as_mask(subnetwork)
    with in_use(model, "masked", block=True):
        kept.check_fits(model)
        if replace is not None and isinstance(kept, Circuit):
            kept = replaced(model, kept, replace, text=text, seed=seed)
        with reduced(model, kept):
            yield model


@contextmanager
def reduced(model: Model, kept: Mask) -> Iterator[None]:
    """`masked` for a mask that was checked."""
    if isinstance(kept, Circuit):
        masks = dict(kept.items())
        sites = [site for site in circuit_sites(model, kept) if not masks[site.name].all()]
        weights = reduced(model, kept.masked_weights(model)) if kept.masks_weights else nullcontext()
        with weights, sites_replaced(model, sites, masks.__getitem__, kept.replacement):
            yield
        return

    def mask(site: WeightSite) -> nn.Module:
        return _Mask(site.to_stored(kept[site.name]).contiguous().to(site.original.device))

    with _parametrized(model, mask):
        yield


@contextmanager
def masks_exchanged(model: Model) -> Iterator[Callable[[Subnetwork | None], None]]:
    """Within the `with` block, a function reduces the model to one subnetwork after another, or to none with None.

    Each time, only the matrices are masked anew whose masks differ from those before: in a sweep over parts, few do.
    Nobody may edit weights meanwhile.
    """
    sites, gates = weight_sites(model), dict[str, _Mask]()
    sizes = itertools.accumulate(site.original.nbytes for site in sites)
    keeping = {site.name for site, size in zip(sites, sizes, strict=True) if size <= MOST_KEPT}
    bits: dict[str, np.ndarray] = {}

    def unmasked(site: WeightSite) -> nn.Module:
        gates[site.name] = gate = _Mask(torch.ones(1, dtype=torch.bool))
        gate.active = False
        return gate

    def exchange(kept: Subnetwork | None) -> None:
        if kept is not None:
            kept.check_fits(model)
        counts = {} if kept is None else kept.by_name()
        for site in sites:
            gate = gates[site.name]
            gate.active = site.name in counts and counts[site.name].kept < counts[site.name].total
            if not gate.active or kept is None:
                continue
            packed = kept.packed(site.name)
            if site.name not in bits or not np.array_equal(bits[site.name], packed):
                gate.mask = site.to_stored(kept[site.name]).contiguous().to(site.original.device)
                gate.kept = gate.gate(site.original.detach()) if site.name in keeping else None
                bits[site.name] = packed

    with in_use(model, "masks_exchanged", block=True), _parametrized(model, unmasked):
        yield exchange


def circuit_sites(model: Model, circuit: Circuit) -> list[Site]:
    """The hook points of the nodes and edges of a circuit that fits the model."""
    nodes = [site for site in node_sites(model, circuit.asked) if site.name in circuit] if circuit.asked else []
    return [*nodes, *circuit.edge_sites]


@contextmanager
def sites_replaced(
    model: Model, sites: Sequence[Site], gate: Callable[[str], Tensor], replacement: Replacement
) -> Iterator[None]:
    """Within the `with` block, nodes and edges of these sites are replaced as far as their gates are closed.

    If there is any site of edges, `gate` is asked for those of all.
    """
    nodes = [site for site in sites if isinstance(site, NodeSite)]
    with ExitStack() as stack:
        if nodes:
            stack.enter_context(nodes_replaced(model, nodes, gate, replacement))
        if len(nodes) < len(sites):
            stack.enter_context(edges_replaced(model, gate, replacement))
        yield


@contextmanager
def gates_applied(
    model: Model, sites: Sequence[Site], gate: Callable[[str], Tensor], replacement: Replacement
) -> Iterator[None]:
    """`sites_replaced`, where no parameter of the model receives a gradient."""
    with (
        in_use(model, "gates_applied", block=True),
        parameters_frozen(model),
        sites_replaced(model, sites, gate, replacement),
    ):
        yield


@uses_model
def replaced(model: Model, circuit: Any, replace: str, *, text: Any = None, seed: int = 0) -> Circuit:
    """The same nodes, with something else in the place of those that are dropped.

    Args:
        model: From `load_model`.
        circuit: A `Circuit`, or what holds one.
        replace: `zero`; `mean`, over the positions of `text`; `mean_by_position`, over its sequences, at the same
            position; `resample`, the value in another sequence of the same batch; or `counterfactual`, the value in the
            paired prompt. All but zero are values in the full model.
        text: For means: token ids [sequence, position], a corpus (its held-out part), or a task (its prompts, without
            padding). For `counterfactual`: a task whose rows have counterfactuals.
        seed: Seed of the pairs of `resample`.

    Raises:
        ValueError: If there is no such replacement, it lacks its text, or it is no circuit of this model.

    Example:
        >>> averaged = bc.replaced(model, circuit, "mean", text=text)
        >>> with bc.masked(model, averaged):
        ...     logits = model("import os")
    """
    given = as_mask(circuit)
    if not isinstance(given, Circuit):
        raise ValueError("a Subnetwork has no nodes to replace: give a Circuit")
    given.check_fits(model)
    with edges_exposed(model) if given.edge_sites else nullcontext():
        return given.with_replacement(make_replacement(model, given.replaced_points, replace, text, seed))


@contextmanager
def gated(model: Model, gates: Gates, replacement: Replacement | None = None) -> Iterator[Any]:
    """Within the `with` block, every gated weight is multiplied by its soft gate (`gates.gate`).

    Nodes and edges that are gated are replaced as far as their soft gates are closed.

    Call `gates.refresh(...)` before each forward pass. Only the gates' scores receive gradients: all model parameters
    are frozen within the block, and get back their `requires_grad` afterwards.

    Args:
        model: From `load_model`.
        gates: The gates.
        replacement: What takes the place of nodes; by default zero.

    Example:
        >>> from bigram_circuits.masking.candidates import Candidates
        >>> gates, _ = Candidates(model, config).gates(config, seed=0, within=None)
        >>> with bc.gated(model, gates):
        ...     gates.refresh(0)
        ...     loss = model("import os", return_type="loss")  # with soft gates, all half open
    """

    def gate(site: WeightSite) -> nn.Module | None:
        return _Gate(gates, site.name) if site.name in gates.names else None

    nodes = sites_replaced(model, gates.sites, gates.of_nodes, replacement or Replacement())
    with in_use(model, "gated", block=True), parameters_frozen(model), _parametrized(model, gate), nodes:
        yield model


@contextmanager
def switched(model: Model, switches: Mapping[str, Tensor]) -> Iterator[Any]:
    """Within the `with` block, every named weight matrix is multiplied by its switches, which the caller may change.

    Unlike `masked`, many masks can be tried within one block, by writing 0 and 1 into the switches; and unlike `gated`,
    the gradient of a switch is that of the loss itself: weight x gradient, also where the switch is 0.

    Args:
        model: From `load_model`. Its own parameters receive no gradients within the block.
        switches: A tensor by canonical name, in the stored layout and on the device of the weight; matrices that are
            not named are kept whole.
    """

    def switch(site: WeightSite) -> nn.Module | None:
        return _Switch(switches[site.name]) if site.name in switches else None

    with in_use(model, "switched", block=True), parameters_frozen(model), _parametrized(model, switch):
        yield model


def gate_values(model: Model, mask: Mask) -> dict[str, Tensor]:
    """A mask that fits the model as gates for `opened`: float32, 1 for what is kept and 0 for what is dropped.

    Of weights in their stored layout, of nodes and edges in the shape of the mask; all on the model's device.
    """
    if isinstance(mask, Circuit):
        weights = gate_values(model, mask.masked_weights(model)) if mask.masks_weights else {}
        names = {site.name for site in circuit_sites(model, mask)}
        return weights | {name: one.float().to(model.cfg.device) for name, one in mask.items() if name in names}
    return {site.name: site.to_stored(mask[site.name]).float().to(site.original.device) for site in weight_sites(model)}


@contextmanager
def opened(model: Model, like: Mask, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the `with` block, everything that a mask is of counts as far as its gate, from 0 to 1, is open.

    Weights are multiplied by their gates, nodes and edges replaced as far as these are closed. With gates of 0 and 1 it
    is `masked`. The caller may change the gates in place, and ask for their gradients, which are those of the loss
    itself; the model's own parameters receive none.

    Args:
        model: From `load_model`.
        like: A mask that fits the model: what has a gate, and what takes the place of nodes and edges.
        gates: From `gate_values`, or of the same names, shapes and devices.
    """
    sites = circuit_sites(model, like) if isinstance(like, Circuit) else []
    nodes = {site.name for site in sites}
    replacement = like.replacement if isinstance(like, Circuit) else Replacement()
    with (
        switched(model, {name: one for name, one in gates.items() if name not in nodes}),
        sites_replaced(model, sites, gates.__getitem__, replacement),
    ):
        yield


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
            kind = type(site.leaf)  # made for this leaf; TransformerLens tells by the name how a weight is stored
            kind.__name__ = kind.__mro__[1].__name__
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


class _Switch(WeightGate):
    """The weight times the value of its switch."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self._values = lambda: values  # a closure, so that the switches do not become a parameter

    def gate(self, weight: Tensor) -> Tensor:
        return weight * self._values().to(weight.dtype)


class _Gate(WeightGate):
    """The weight times its soft gate."""

    def __init__(self, gates: Gates, name: str) -> None:
        super().__init__()
        self._gated = lambda weight: gates.gate(name, weight)  # a closure, so that the gates do not become a submodule

    def gate(self, weight: Tensor) -> Tensor:
        return self._gated(weight)
