"""What is lost without each neuron and head, and which tokens each serves.

A neuron is removed by setting its activation to 0 at every position, a head by setting its z to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.atlas import frequent_tokens
from bigram_circuits.analysis.conditions import check_arguments, checked_text, reduced_to
from bigram_circuits.analysis.explaining import taken_apart
from bigram_circuits.analysis.location import neuron_counts
from bigram_circuits.analysis.neurons import traced_tokens
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.analysis.unit_tokens import unit_tokens
from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import Mask, MaskLike
from bigram_circuits.masking.effects import node_effects
from bigram_circuits.measures import statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Effects
from bigram_circuits.models.activations import NotShownError, batch_size_for
from bigram_circuits.models.interventions import intervened
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import UNITS, layer_of_point, node_sites
from bigram_circuits.models.resuming import KnownPasses
from bigram_circuits.models.state import uses_model
from bigram_circuits.names import head_label, in_block, neuron_label
from bigram_circuits.progress import steps
from bigram_circuits.targets.base import PlacedTarget, Target, kl_of_best_constant, target_of
from bigram_circuits.text.corpus import in_order, spread

_RANKED_ON = 32  # frequent tokens


@usual_order
@uses_model
def unit_effects(
    model: Model,
    subnetwork: MaskLike | None = None,
    target: Any = None,
    text: Any = None,
    *,
    most: int = 64,
    tokens: int = 4096,
) -> Effects:
    """What each neuron and head of a subnetwork does for the target, and for which tokens.

    All of them are ranked by how much flows through them after the most frequent tokens (`neuron_map`); those with the
    most are then removed from the subnetwork, one at a time. For a task they are ranked by the gradients of their gates
    (`node_effects`).

    Args:
        model: From `load_model`, on its raw weights.
        subnetwork: What is kept; None for the full model.
        target: The target that it was learned for.
        text: A `Corpus` (its held-out part) or token ids [sequence, position].
        most: Number of neurons and heads to remove; the others are left out.
        tokens: At most so many tokens of the text are used, evenly spread.

    Returns:
        `Effects` by label (`L0N12`, `L1H3`), the largest rise first: `rise` of the cross-entropy from the target in
        nats, with a 95% paired bootstrap interval over sequences; `lost`, the same as a share of what the context tells
        about the next token under the target (nan if the target has no distribution). `notes["units"]` has, by label,
        the tokens that drive each, and those that it promotes and suppresses.

    Raises:
        ValueError: If a number is below 1, or subnetwork, target and text do not fit the model.
        NotShownError: If nothing of any neuron or head is kept, or the model cannot be taken apart (`explain`).

    Example:
        >>> units = analysis.unit_effects(model, found, target, text, most=3)
        >>> units.top(1)  # the neuron or head whose removal hurts most
    """
    if min(most, tokens) < 1:
        raise ValueError(f"most and tokens must be at least 1, not {most} and {tokens}")
    kept, _ = check_arguments(model, subnetwork)
    array = spread(checked_text(model, text), tokens)
    return _unit_effects(model, kept, target_of(target, model), array, most)


def _unit_effects(
    model: Model, kept: Mask | None, target: Target, array: Integer[np.ndarray, "sequence position"], most: int
) -> Effects:
    units = _kept_units(model, kept)
    strength, ranked_by = _strength(model, kept, target, array, units)
    chosen = sorted(units, key=lambda label: -strength[label])[:most]
    with reduced_to(model, kept):
        passes, rises = KnownPasses(model), []
        before = _cross_entropies(model, target, array, lambda batch: passes.first_pass())
        for label in steps(chosen, len(chosen), desc="removing units", unit="unit"):
            unit, layer, index = units[label]
            again = partial(passes.again, layer=layer)
            with intervened(model, [_removed(unit, layer, index)]):
                rises.append(_cross_entropies(model, target, array, again) - before)
    draws = statistics.bootstrap(np.stack(rises, 1)) / len(array)
    ends = np.quantile(draws, [0.025, 0.975], axis=0)
    told = kl_of_best_constant(target, array)
    rise = np.stack(rises, 1).mean(0)
    order = np.argsort(-rise, kind="stable")
    names = tuple(chosen[i] for i in order)
    values = np.stack([rise, rise / told])[:, order]
    with torch.no_grad(), taken_apart(model, kept) as apart:
        first = torch.from_numpy(array[:1, :1].astype(np.int64)).to(model.cfg.device)
        about = unit_tokens(model, next(apart([first])), names)
    return Effects(
        title="Neurons and heads: what is lost without each",
        quantities=_UNIT_QUANTITIES,
        subject="unit",
        names=names,
        values=values,
        low=np.stack([ends[0], ends[0] / told])[:, order],
        high=np.stack([ends[1], ends[1] / told])[:, order],
        notes={
            "units": {label: one.to_json() for label, one in about.items()},
            "kept_units": len(units),
            "ranked_by": ranked_by,
            "tokens": int(array.size),
            "information": told,
            "interval": "95%, paired bootstrap over sequences",
        },
    )


_UNIT_QUANTITIES = (
    Quantity("rise", "nats", "Rise of the cross-entropy from the target when it is removed from the subnetwork."),
    Quantity("lost", "share", "The same, as a share of what the context tells about the next token under the target."),
)


def _strength(
    model: Model,
    kept: Mask | None,
    target: Target,
    array: Integer[np.ndarray, "sequence position"],
    units: Mapping[str, tuple[str, int, int]],
) -> tuple[dict[str, float], str]:
    """By what units are ranked, largest first, and what that is."""
    if not isinstance(target, PlacedTarget):
        chosen, counts = frequent_tokens(model, array, _RANKED_ON)
        flows = traced_tokens(model, kept, chosen)
        means = np.average(np.abs(flows.values), axis=0, weights=counts)
        found = dict(zip(flows.labels, means.tolist(), strict=True))
        return {label: found.get(label, 0.0) for label in units}, "absolute flows after frequent tokens"
    with reduced_to(model, kept):
        scores = node_effects(model, Circuit.full(model, _units_there(model)), target, array)
    found = {label: float(scores[in_block(layer, UNITS[unit])][index]) for label, (unit, layer, index) in units.items()}
    return {label: abs(one) for label, one in found.items()}, "gradients of gates"


def _units_there(model: Model) -> list[str]:
    """`head` and `neuron`, as far as the model has them."""
    found = []
    for unit in ("head", "neuron"):
        try:
            node_sites(model, unit)
        except NotShownError:
            continue
        found.append(unit)
    if not found:
        raise NotShownError("this model shows neither heads nor neurons")
    return found


def _kept_units(model: Model, kept: Mask | None) -> dict[str, tuple[str, int, int]]:
    """Every neuron and head of which something is kept: label -> unit, layer, index."""
    label = {"head": head_label, "neuron": neuron_label}
    sites = node_sites(model, _units_there(model))
    every = [(site.unit, layer_of_point(site.name), index) for site in sites for index in range(site.count)]
    there = {label[unit](layer, index): (unit, layer, index) for unit, layer, index in every}
    if isinstance(kept, Circuit):
        masks = {name: mask for name, mask in kept.items() if mask.ndim == 1}
        points = {label: (in_block(layer, UNITS[unit]), index) for label, (unit, layer, index) in there.items()}
        there = {key: there[key] for key, (name, index) in points.items() if name not in masks or masks[name][index]}
    elif kept is not None:
        alive = {head_label(*head) for head, count in kept.by_head().items() if count.kept}
        for layer, counts in neuron_counts(kept).items():
            alive |= {neuron_label(layer, int(index)) for index in np.flatnonzero(counts.sum(0))}
        there = {key: one for key, one in there.items() if key in alive}
    if not there:
        raise NotShownError("nothing of any neuron or head is kept")
    return there


def _removed(unit: str, layer: int, index: int) -> tuple[str, Callable[..., Tensor]]:
    """A hook that sets a head's z or a neuron's activation to 0."""

    def hook(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, index] = 0
        return value

    return in_block(layer, UNITS[unit]), hook


def _cross_entropies(
    model: Model,
    target: Target,
    array: Integer[np.ndarray, "sequence position"],
    within: Callable[[int], AbstractContextManager[Any]],
) -> Float[np.ndarray, " sequence"]:
    """Mean cross-entropy of every sequence, from the target to the model as it is; each batch passes within a block."""
    found = []
    with torch.no_grad():
        for index, batch in enumerate(in_order(array, batch_size_for(model, array.shape[1]))):
            ids = batch.to(model.cfg.device)
            with within(index):
                logits = model(ids)
            found.append(target.cross_entropy(logits, ids).double().mean(1).cpu().numpy())
    return np.concatenate(found)


# --- a step of `analyze` ---

_UNITS_SHOWN, _UNIT_TOKENS = 24, 1 << 10


@in_suite("unit_effects")
def _(subject: Subject) -> Effects:
    text = subject.sample(min(_UNIT_TOKENS, subject.sweep_tokens))
    return _unit_effects(subject.model, subject.subnetwork, subject.target, text, _UNITS_SHOWN)
