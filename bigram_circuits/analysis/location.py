"""Where in a model the kept weights are: by layer, matrix, head and MLP neuron, and what the neurons respond to.

Two numbers describe a location: its `density` (the share of its weights that is kept) and its `share_of_kept` (the
share of all kept weights that is there). With equal densities, larger locations have a larger share of the kept
weights.

A matched random subnetwork keeps as many weights in every matrix, so it is the same by layer and by matrix; by head and
by neuron it differs, and is the control. How unevenly the kept MLP weights are spread over neurons is shown by a Lorenz
curve (Lorenz 1905): the share of them in the k densest neurons. Its Gini coefficient is twice the area between the
curve and the diagonal: 0 if all neurons keep the same, near 1 if one keeps everything. A small random subnetwork is
uneven too, so only the difference from it is meaningful.

Of a circuit, nodes are counted in place of weights: by layer and kind, and one by one as heads and neurons.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.conditions import (
    Conditions,
    check_arguments,
    check_of_weights,
    checked_text,
    conditions,
    reduced_to,
)
from bigram_circuits.analysis.prompts import token_words
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.circuit import Circuit
from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.measures.conditions import condition_of
from bigram_circuits.measures.quantities import COUNT, Quantity
from bigram_circuits.measures.results import Curves, Effects, Maps
from bigram_circuits.measures.statistics import check_seed
from bigram_circuits.models.activations import NotShownError, batch_size_for, record
from bigram_circuits.models.model import Model
from bigram_circuits.models.nodes import UNITS
from bigram_circuits.models.state import uses_model
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.names import (
    ATTENTION_MATRICES,
    COMPONENTS,
    MLP_MATRICES,
    PartName,
    WeightName,
    in_block,
    neuron_label,
)
from bigram_circuits.progress import progress
from bigram_circuits.subnetwork import Count, Subnetwork
from bigram_circuits.text.corpus import in_order

_MIN_COUNT = 5  # occurrences of a token in a text
_DENSITY = Quantity("density", "share", "Share of the weights there that are kept.")
_SHARE = Quantity("share_of_kept", "share", "Share of all kept weights that are there.")
_OF_NODES = (
    Quantity("density", "share", "Share of the nodes there that are kept."),
    Quantity("share_of_kept", "share", "Share of all kept nodes that are there."),
)


def by_layer(subnetwork: MaskLike) -> Maps:
    """Density and share of the kept weights, by layer and component (attention, MLP); of kept nodes, by kind.

    Example:
        >>> analysis.by_layer(found).plot("density")  # of attention and MLP, by layer
    """
    subnetwork = as_mask(subnetwork)
    if isinstance(subnetwork, Circuit):
        kinds = tuple(subnetwork.by_unit())
        return _counts_map(subnetwork, subnetwork.by_place(), "unit", kinds, "Kept nodes by layer and kind")
    counts = subnetwork.by_component()
    return _counts_map(subnetwork, counts, "component", COMPONENTS, "Kept weights by layer and component")


def by_matrix(subnetwork: MaskLike) -> Maps:
    """Density and share of the kept weights, by layer and weight matrix.

    Example:
        >>> analysis.by_matrix(found).to_dataframe()
    """
    subnetwork = check_of_weights(subnetwork, "by_matrix")
    counts = {}
    for name, count in subnetwork.by_weight().items():
        weight = WeightName.parse(name)
        counts[weight.layer, weight.matrix] = count
    there = {matrix for _, matrix in counts}
    matrices = tuple(matrix for matrix in (*ATTENTION_MATRICES, *MLP_MATRICES) if matrix in there)
    return _counts_map(subnetwork, counts, "matrix", matrices, "Kept weights by layer and matrix")


def by_head(subnetwork: MaskLike, *, seed: int = 0) -> Maps:
    """Density and share of the kept weights, by layer and attention head, with a matched random subnetwork.

    With grouped queries, W_K and W_V belong to no single head and are left out of the heads' counts. Of a circuit, the
    density of a head is 1 if it is kept, and 0 if not.

    Raises:
        ValueError: If the subnetwork has no attention, or the seed is below 0.

    Example:
        >>> analysis.by_head(found).plot()  # beside a matched random subnetwork
    """
    check_seed(seed)
    subnetwork = as_mask(subnetwork)
    both = {
        subnetwork.noun: subnetwork,
        condition_of("random", subnetwork.noun): subnetwork.random_like(seed=seed),
    }
    maps = []
    for one in both.values():
        counts = _nodes_of(one, "head") if isinstance(one, Circuit) else one.by_head()
        if not counts:
            raise NotShownError(f"this {one.noun} has no attention heads")
        heads = range(1 + max(head for _, head in counts))
        named = {(layer, str(head)): count for (layer, head), count in counts.items()}
        maps.append(_counts_map(one, named, "head", tuple(map(str, heads)), f"Kept {one.units} by layer and head"))
    values = np.concatenate([one.values for one in maps], axis=1)
    first = maps[0]
    return Maps(
        first.title, first.quantities, first.row_axis, first.rows, first.column_axis, first.columns,
        tuple(both), values, notes={"seed": seed},
    )  # fmt: skip


def by_neuron(subnetwork: MaskLike) -> Maps:
    """Density and share of the kept MLP weights, by layer and neuron: its columns of W_in and W_gate, row of W_out.

    Of a circuit, the density of a neuron is 1 if it is kept, and 0 if not.

    Example:
        >>> densest = analysis.by_neuron(found).get("density", "subnetwork").max()
    """
    subnetwork = as_mask(subnetwork)
    if isinstance(subnetwork, Circuit):
        found = _nodes_of(subnetwork, "neuron")
        if not found:
            raise NotShownError("this circuit has no neurons")
        named = {(layer, str(index)): count for (layer, index), count in found.items()}
        columns = tuple(map(str, range(1 + max(index for _, index in found))))
        return _counts_map(subnetwork, named, "neuron", columns, "Kept nodes by layer and neuron")
    counts = neuron_counts(subnetwork)
    kept = sum(int(of.sum()) for of in counts.values())
    wide = max(len(of[0]) for of in counts.values())
    values = np.full((2, 1, len(counts), wide), np.nan)
    for row, (layer, of) in enumerate(counts.items()):
        values[0, 0, row, : of.shape[1]] = of.sum(0) / _neuron_size(subnetwork, layer)
        values[1, 0, row, : of.shape[1]] = of.sum(0) / kept if kept else np.nan
    share = Quantity("share_of_kept", "share", "Share of all kept MLP weights that are this neuron's.")
    return Maps(
        title="Kept MLP weights by neuron",
        quantities=(_DENSITY, share),
        row_axis="layer",
        rows=tuple(map(str, counts)),
        column_axis="neuron",
        columns=tuple(map(str, range(wide))),
        conditions=("subnetwork",),
        values=values,
    )


def concentration(
    subnetwork: MaskLike, *, layers: Sequence[int] | None = None, points: int = 101, seed: int = 0
) -> Curves:
    """How concentrated the kept MLP weights are in few neurons: a Lorenz curve, with a matched random subnetwork's.

    Args:
        subnetwork: A subnetwork of any model.
        layers: The layers whose neurons count; by default all.
        points: Number of points of the curve.
        seed: Seed of the matched random subnetwork.

    Returns:
        The share of the kept MLP weights in the k densest neurons, against k / number of neurons; Gini coefficients
        are in `notes["gini"]`.

    Raises:
        ValueError: If no MLP weight is kept there, a layer does not exist, or there are fewer than two points.

    Example:
        >>> curve = analysis.concentration(found, layers=[0])
        >>> print(curve.notes["gini"])
    """
    check_seed(seed)
    subnetwork = check_of_weights(subnetwork, "concentration")
    if points < 2:
        raise ValueError(f"a curve needs at least 2 points, not {points}")
    x = np.linspace(0, 1, points)
    both = {"subnetwork": subnetwork, "random": subnetwork.random_like(seed=seed)}
    values, gini, chosen = np.empty((1, 2, points)), {}, []
    for row, (name, one) in enumerate(both.items()):
        counts = neuron_counts(one)
        chosen = list(counts) if layers is None else [int(layer) for layer in layers]
        if not chosen:
            raise ValueError("concentration needs at least one layer")
        if missing := [layer for layer in chosen if layer not in counts]:
            raise ValueError(f"there is no layer {missing[0]}: layers are 0 to {max(counts)}")
        kept = np.sort(np.concatenate([counts[layer].sum(0) for layer in chosen]))[::-1]
        if kept.sum() == 0:
            raise NotShownError(f"the subnetwork ({subnetwork.lineage}) keeps no MLP weight there")
        curve = np.concatenate([[0.0], np.cumsum(kept) / kept.sum()])
        at = np.linspace(0, 1, len(curve))
        values[0, row] = np.interp(x, at, curve)
        gini[name] = 2 * float(np.trapezoid(curve, at)) - 1
    return Curves(
        title="Kept MLP weights in the densest neurons",
        quantities=(Quantity("share_of_kept", "share", "Share of the kept MLP weights in the densest neurons."),),
        axis="share_of_neurons",
        points=tuple(x.tolist()),
        conditions=tuple(both),
        values=values,
        low=np.full(values.shape, np.nan),
        high=np.full(values.shape, np.nan),
        notes={"gini": gini, "layers": chosen, "seed": seed},
    )


def whole_neurons(subnetwork: MaskLike, *, threshold: float | int = 0.5, most: int = 100, seed: int = 0) -> Effects:
    """The MLP neurons that are kept entirely or nearly so: the densest ones, densest first.

    Args:
        subnetwork: A subnetwork of any model.
        threshold: The smallest density to list.
        most: Maximum number of neurons to list. `notes` says how many reach the threshold in total, and in a matched
            random subnetwork.
        seed: Seed of the matched random subnetwork.

    Returns:
        Neurons named `L0N12`, with their overall density and that in each matrix.

    Raises:
        ValueError: If the threshold is not a share, or `most` is below 1.

    Example:
        >>> analysis.whole_neurons(found, threshold=0.1, most=5).to_dataframe()
    """
    check_seed(seed)
    subnetwork = check_of_weights(subnetwork, "whole_neurons")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a share from 0 to 1, not {threshold}")
    if most < 1:
        raise ValueError(f"most must be at least 1, not {most}")
    counts, random = neuron_counts(subnetwork), neuron_counts(subnetwork.random_like(seed=seed))
    reach = {
        name: sum(int((c.sum(0) >= threshold * _neuron_size(subnetwork, layer)).sum()) for layer, c in of.items())
        for name, of in (("subnetwork", counts), ("random", random))
    }
    listed = []
    for layer, of in counts.items():
        widths = np.array(list(_widths(subnetwork, layer).values()))
        densities = np.concatenate([of.sum(0, keepdims=True) / widths.sum(), of / widths[:, None]])
        listed += [(neuron_label(layer, int(i)), densities[:, i]) for i in np.flatnonzero(densities[0] >= threshold)]
    listed = sorted(listed, key=lambda item: -item[1][0])[:most]
    matrices = list(_widths(subnetwork, next(iter(counts))))
    values = np.array([numbers for _, numbers in listed]).T.reshape(1 + len(matrices), len(listed))
    in_each = (Quantity(f"density_{one}", "share", f"Share of its weights in {one} that are kept.") for one in matrices)
    return Effects(
        title="Densest neurons",
        quantities=(Quantity("density", "share", "Share of the neuron's weights that are kept."), *in_each),
        subject="neuron",
        names=tuple(name for name, _ in listed),
        values=values,
        low=np.full(values.shape, np.nan),
        high=np.full(values.shape, np.nan),
        notes={"threshold": threshold, "neurons_that_reach_it": reach, "seed": seed},
    )


@usual_order
@uses_model
def max_activating_tokens(
    model: Model,
    neurons: Sequence[tuple[int, int]],
    subnetwork: MaskLike | None = None,
    tokens: Any = None,
    *,
    k: int = 10,
    min_count: int = _MIN_COUNT,
    seed: int = 0,
) -> Maps:
    """The current tokens that activate neurons most: mean activation by current token over a text.

    Args:
        model: From `load_model`.
        neurons: (layer, neuron) pairs.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        tokens: Token ids [sequence, position], or a `Corpus` (its held-out part).
        k: Number of tokens to list for each neuron.
        min_count: Tokens with fewer occurrences in the text are left out.
        seed: Seed of the matched random subnetwork.

    Returns:
        `Maps` whose rows are neurons (`L0N12`), whose columns are ranks from 1, and whose cells hold a token with its
        mean activation (`hook_post`: what W_out reads), its number of occurrences, and how far this mean lies above the
        neuron's mean over all positions, in standard deviations. Empty where the text has fewer such tokens.

    Raises:
        ValueError: If there is no such neuron, no text, or no token occurs often enough.

    Example:
        >>> analysis.max_activating_tokens(model, [(0, 17)], tokens=text, k=3).to_dataframe()
    """
    subnetwork, _ = check_arguments(model, subnetwork, seed=seed)
    array = checked_text(model, tokens)
    d_mlp = {site.layer: site.shape[0] for site in weight_sites(model) if site.matrix == "W_out"}
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in neurons):
        raise ValueError(f"neurons must be (layer, neuron) pairs, not {neurons!r}")
    if not d_mlp:
        raise NotShownError("this model has no MLP, so it has no neurons")
    for layer, index in neurons:
        if layer not in d_mlp:
            raise ValueError(f"there is no layer {layer}: layers are 0 to {max(d_mlp)}")
        if not 0 <= index < d_mlp[layer]:
            raise ValueError(f"there is no neuron {index} in layer {layer}: it has neurons 0 to {d_mlp[layer] - 1}")
    if not neurons or k < 1:
        raise ValueError(
            f"max-activating tokens need at least one neuron and k of at least 1, not {len(neurons)} and {k}"
        )
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, not {min_count}")
    by_name = conditions(subnetwork, seed=seed)
    return _max_activating(model, neurons, array, by_name, k=k, min_count=min_count, seed=seed)


def _max_activating(
    model: Model,
    neurons: Sequence[tuple[int, int]],
    array: Integer[np.ndarray, "sequence position"],
    by_name: Conditions,
    *,
    k: int,
    min_count: int,
    seed: int,
) -> Maps:
    """`max_activating_tokens` on checked arguments."""
    counts = np.bincount(array.ravel(), minlength=model.cfg.d_vocab)
    common = np.flatnonzero(counts >= min_count)
    if len(common) == 0:
        raise NotShownError(f"no token occurs {min_count} times in these {array.size} tokens: give more text")
    values = np.full((3, len(by_name), len(neurons), k), np.nan)
    words = [[[""] * k for _ in neurons] for _ in by_name]
    with progress(total=len(by_name) * len(array), desc="activations", unit="sequence") as bar:
        for c, (name, condition) in enumerate(by_name.items()):
            bar.set_postfix_str(name, refresh=False)
            with torch.inference_mode(), reduced_to(model, condition, array.size):
                sums, squares = _sums_by_token(model, neurons, array, bar.update)
            mean = sums.sum(1) / array.size
            sd = np.sqrt(np.maximum(squares / array.size - mean**2, 0))
            by_token = sums[:, common] / counts[common]
            for n in range(len(neurons)):
                best = np.argsort(-by_token[n], kind="stable")[:k]
                chosen = common[best]
                values[0, c, n, : len(best)] = by_token[n, best]
                values[1, c, n, : len(best)] = counts[chosen]
                if sd[n] > 0:
                    values[2, c, n, : len(best)] = (by_token[n, best] - mean[n]) / sd[n]
                words[c][n][: len(best)] = token_words(model, chosen.tolist())
    return Maps(
        title="Max-activating tokens",
        quantities=(
            Quantity("mean_activation", "", "Mean activation of the neuron where this is the current token."),
            COUNT,
            Quantity("deviations", "", "Mean activation minus the mean over all positions, in standard deviations."),
        ),
        row_axis="neuron",
        rows=tuple(neuron_label(layer, index) for layer, index in neurons),
        column_axis="rank",
        columns=tuple(str(rank + 1) for rank in range(k)),
        conditions=tuple(by_name),
        values=values,
        text=tuple(tuple(tuple(row) for row in of) for of in words),
        notes={"tokens": int(array.size), "min_count": min_count, "seed": seed},
    )


def exciting_tokens(*args: Any, **options: Any) -> Maps:
    """The former name of `max_activating_tokens`; deprecated.

    Example:
        >>> analysis.exciting_tokens(model, [(0, 17)], tokens=text)  # rather: max_activating_tokens
    """
    warnings.warn("exciting_tokens is called max_activating_tokens now", DeprecationWarning, stacklevel=2)
    return max_activating_tokens(*args, **options)


def _nodes_of(circuit: Circuit, unit: str) -> dict[tuple[int, int], Count]:
    """By layer and index, the nodes of a unit: whether each is kept."""
    masks = {layer: circuit[in_block(layer, UNITS[unit])] for layer, of in circuit.by_place() if of == unit}
    return {
        (layer, index): Count(int(kept), 1) for layer, mask in masks.items() for index, kept in enumerate(mask.tolist())
    }


def neuron_counts(subnetwork: Subnetwork) -> dict[int, Integer[np.ndarray, "matrix neuron"]]:
    """Number of weights kept of every MLP neuron, by layer: rows are W_in, W_gate (if there is one) and W_out.

    Raises:
        ValueError: If the subnetwork has no MLP.
    """
    counts: dict[int, list[np.ndarray]] = {}
    weights = [WeightName.parse(name) for name in subnetwork]
    for layer in sorted({weight.layer for weight in weights if weight.component == "mlp"}):
        for matrix in _widths(subnetwork, layer):
            mask = subnetwork[str(WeightName(layer, "mlp", matrix))]
            counts.setdefault(layer, []).append(mask.sum(1 if matrix == "W_out" else 0).numpy())
    if not counts:
        raise NotShownError("this subnetwork has no MLP weights")
    return {layer: np.stack(rows) for layer, rows in counts.items()}


def _widths(subnetwork: Subnetwork, layer: int) -> dict[str, int]:
    """Number of weights of one neuron in each matrix of a layer's MLP."""
    shapes = subnetwork.shapes
    names = {matrix: str(WeightName(layer, "mlp", matrix)) for matrix in MLP_MATRICES}
    return {m: shapes[name][1 if m == "W_out" else 0] for m, name in names.items() if name in shapes}


def _neuron_size(subnetwork: Subnetwork, layer: int) -> int:
    return sum(_widths(subnetwork, layer).values())


def _counts_map(
    subnetwork: Mask, counts: dict[tuple[int, str], Count], axis: str, columns: tuple[str, ...], title: str
) -> Maps:
    layers = sorted({layer for layer, _ in counts})
    values = np.full((2, 1, len(layers), len(columns)), np.nan)
    for (layer, column), count in counts.items():
        at = (0, layers.index(layer), columns.index(column))
        values[(0, *at)] = count.fraction
        values[(1, *at)] = count.kept / subnetwork.kept if subnetwork.kept else math.nan
    return Maps(
        title=title,
        quantities=(_DENSITY, _SHARE) if subnetwork.noun == "subnetwork" else _OF_NODES,
        row_axis="layer",
        rows=tuple(map(str, layers)),
        column_axis=axis,
        columns=columns,
        conditions=(subnetwork.noun,),
        values=values,
        notes={"kept": subnetwork.kept, "total": subnetwork.total},
    )


def _sums_by_token(
    model: Model,
    neurons: Sequence[tuple[int, int]],
    tokens: Integer[np.ndarray, "sequence position"],
    advance: Callable[[int], Any],
) -> tuple[Float[np.ndarray, "neuron d_vocab"], Float[np.ndarray, " neuron"]]:
    """Sums of activations by current token, and of their squares over all positions."""
    points = {layer: in_block(layer, "mlp.hook_post") for layer in sorted({layer for layer, _ in neurons})}
    device = model.cfg.device
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    sums = torch.zeros(len(neurons), model.cfg.d_vocab, dtype=dtype, device=device)
    squares = torch.zeros(len(neurons), dtype=dtype, device=device)
    for cpu_batch in in_order(tokens, batch_size_for(model, tokens.shape[1])):
        batch = cpu_batch.to(device)
        seen, _ = record(model, batch, list(points.values()))
        activations = torch.stack([seen[points[layer]][..., n].flatten() for layer, n in neurons])
        activations = activations.to(dtype)
        sums.index_add_(1, batch.flatten(), activations)
        squares += activations.pow(2).sum(1)
        advance(len(batch))
    return sums.cpu().double().numpy(), squares.cpu().double().numpy()


# --- steps of `analyze` ---

_NEURONS_SHOWN = 12


@in_suite("by_layer")
def _(subject: Subject) -> Maps:
    return by_layer(subject.subnetwork)


@in_suite("by_head")
def _(subject: Subject) -> Maps:
    return by_head(subject.subnetwork, seed=subject.seed)


@in_suite("concentration")
def _(subject: Subject) -> Curves:
    return concentration(subject.subnetwork, seed=subject.seed)


@in_suite("whole_neurons")
def _(subject: Subject) -> Effects:
    return whole_neurons(subject.subnetwork, threshold=0, most=_NEURONS_SHOWN, seed=subject.seed)


@in_suite("max_activating_tokens")
def _(subject: Subject) -> Maps:
    """Max-activating tokens of the densest neurons; of a circuit, of the kept ones with the largest effects."""
    if isinstance(subject.subnetwork, Circuit):
        densest = subject.kept_nodes("neuron", _NEURONS_SHOWN)
    else:
        densest = whole_neurons(subject.subnetwork, threshold=0, most=_NEURONS_SHOWN, seed=subject.seed).names
    names = [PartName.parse(name) for name in densest]
    neurons = [(name.layer, name.indices[0]) for name in names if name is not None]
    if not neurons:
        raise NotShownError("the circuit keeps no neuron")
    text = subject.sample(subject.fit_tokens)
    return _max_activating(
        subject.model, neurons, text, subject.conditions, k=5, min_count=_MIN_COUNT, seed=subject.seed
    )
