"""The geometry of the residual stream: where it points, how layers rotate it, and how similar layers are.

*Cosine*: between the residual stream and the embedding of the current token, and the unembedding vectors of the actual
next token, the target's most likely one, and the model's own prediction. Each has a baseline: the same cosines with
the tokens of other positions (a shift within the batch), which reveals a direction shared by all residual streams.

*Rotation*: a real matrix rotates the plane of a pair of complex eigenvalues r exp(+-i a) by the angle a. For the affine
maps from each layer to the output and to the input (see `affine`), the median of |a| over all eigenvalues is reported;
a positive real eigenvalue has angle 0, a negative one 180 degrees.

*Covariance similarity*: linear centred kernel alignment (CKA; Kornblith et al. 2019, arXiv 1905.00414),

    CKA(X, Y) = HSIC(XX', YY') / sqrt(HSIC(XX', XX') HSIC(YY', YY')),

which for centred X, Y is |X'Y|^2 / (|X'X| |Y'Y|), a normalised norm of their cross-covariance. HSIC is estimated
without bias (Song et al. 2012) on batches of tokens and averaged over them (Nguyen et al. 2021, arXiv 2010.15327): the
biased estimate for independent activations grows with d_model / tokens, whereas this one has mean 0, and no covariance
matrix is stored.

Or the *Frobenius cosine of covariances* without their top singular dimension, as Chang and Bergen 2025 measure it,
after Belrose et al. 2023 (arXiv 2303.08112): with S = X'X / n = sum_k s_k v_k v_k' of centred X and T of centred Y,

    <S - s_1 v_1 v_1', T - t_1 w_1 w_1'> / (|S - s_1 v_1 v_1'| |T - t_1 w_1 w_1'|),

each without its own first component, which a few directions of extreme variance would otherwise decide. CKA compares
how the same tokens lie to each other, whatever the basis; this compares in which directions of the residual stream
activations vary, whatever the tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.affine import AffineMaps, check_maps, fit_affine_lens
from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.conditions import (
    Batch,
    Conditions,
    check_arguments,
    checked_text,
    conditions,
    layer_names,
    observe,
    reduced_to,
)
from bigram_circuits.analysis.prompts import is_prompt, position_names, prompt_tokens
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.masking.apply import Mask, MaskLike
from bigram_circuits.measures.conditions import own_of
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Maps, curves_from_sums
from bigram_circuits.models.activations import (
    NotShownError,
    check_predicts_tokens,
    check_tokens,
    residual_streams,
)
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, uses_model
from bigram_circuits.targets.base import Target
from bigram_circuits.text.corpus import spread, token_array

_DIRECTIONS = (
    Quantity("current_embedding", "", "mean cosine with the embedding of the current token"),
    Quantity("next_unembedding", "", "mean cosine with the unembedding vector of the actual next token"),
    Quantity("predicted_unembedding", "", "mean cosine with the unembedding vector of the model's most likely token"),
    Quantity("target_unembedding", "", "mean cosine with the unembedding vector of the target's most likely token"),
)
_BASELINES = tuple(
    Quantity(f"{one.name}_baseline", "", f"{one.meaning}, with the token of another position") for one in _DIRECTIONS
)
COSINE_QUANTITIES = _DIRECTIONS + _BASELINES

ROTATION_QUANTITIES = (
    Quantity("output_angle", "degrees", "median absolute angle of the eigenvalues of the map to the last layer"),
    Quantity("input_angle", "degrees", "median absolute angle of the eigenvalues of the map to the embedding"),
    Quantity("output_complex", "share", "eigenvalues of the map to the last layer that are not real"),
    Quantity("input_complex", "share", "eigenvalues of the map to the embedding that are not real"),
)

_CKA = Quantity("cka", "", "linear CKA, unbiased: 1 for the same geometry, 0 for unrelated ones")
_COVARIANCE_COSINE = Quantity(
    "covariance_cosine", "", "Frobenius cosine of covariances without their top singular dimension: 1 for the same one"
)
_CONSTANT = 1e-12  # of the mean square of the activations: a covariance below this is rounding


# --- cosine ---


@usual_order
@uses_model
def cosine_to_unembedding(
    model: Model, subnetwork: MaskLike | None = None, target: Any = None, text: Any = None, *, seed: int = 0
) -> Curves | Maps:
    """Cosine between the residual stream and (un)embedding vectors, by layer; for a prompt, by layer and position.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        target: A target with `top1(tokens)`, for example an `NGramTable`: also the direction of its prediction.
        text: A `Corpus` (its held-out part) or token ids [sequence, position]; or a prompt (`str`, token ids
            [position]), which gives a matrix [layer, position] for each direction.
        seed: Seed of the matched random subnetwork.

    Returns:
        `Curves` [quantity, condition, layer] with 95% intervals over sequences, and baselines: the same with the tokens
        of other positions. Or, for a prompt, `Maps` [quantity, condition, layer, position] without baselines.
        Quantities of the next token are nan at a prompt's last position, those of the target are nan without a target.

    Raises:
        ValueError: If the text is empty or has another shape, the target has another vocabulary, or the model's
            embeddings do not have the width of its residual stream.

    Example:
        >>> curves = bc.cosine_to_unembedding(model, found, target, text)
        >>> curves.plot()  # by layer
    """
    subnetwork, target = check_arguments(model, subnetwork, target=target, seed=seed)
    _check_widths(model)
    named = conditions(subnetwork, seed=seed)
    if is_prompt(text):
        return _prompt_cosines(model, prompt_tokens(model, text), named, target)
    tokens = checked_text(model, text)
    watching = {name: CosineSums(model, target) for name in named}
    observe(model, tokens, named, lambda name: [watching[name]], what="cosines")
    return cosine_curves(model, watching, {"tokens": int(tokens.size), "random_seed": seed})


def _check_widths(model: Model) -> None:
    widths = (model.W_E.shape[1], model.W_U.shape[0])
    if widths != (model.cfg.d_model, model.cfg.d_model):
        raise NotShownError(
            f"a cosine needs vectors of the same width, but this model's residual stream has {model.cfg.d_model}, its "
            f"embedding {widths[0]} and its unembedding {widths[1]}"
        )


def cosine_curves(model: Model, sums: Mapping[str, CosineSums], notes: Mapping[str, Any]) -> Curves:
    """The curves of the sums that `CosineSums` accumulated, by condition."""
    rows = {name: one.rows() for name, one in sums.items()}

    def statistic(added: Float[np.ndarray, "... layer column"]) -> Float[np.ndarray, "... quantity layer"]:
        return np.moveaxis(added[..., :-1] / added[..., -1:], -1, -2)

    return curves_from_sums(
        "Cosine of the residual stream with (un)embeddings", COSINE_QUANTITIES, "layer", layer_names(model), rows,
        statistic, notes,
    )  # fmt: skip


class CosineSums:
    """An observer that accumulates cosines and their baselines by sequence and layer."""

    def __init__(self, model: Model, target: Any = None) -> None:
        self._directions = _Directions(model, target)
        self._rows: list[Float[np.ndarray, "sequence layer column"]] = []

    def rows(self) -> Float[np.ndarray, "sequence layer column"]:
        """Sums by sequence: four cosines, their four baselines, and the number of positions."""
        return np.concatenate(self._rows)

    def add(self, batch: Batch) -> None:
        """Add a batch; all positions except the last of each sequence count."""
        residual = _unit(batch.residual[:, :, :-1].float())
        directions = self._directions.of(batch.tokens, batch.logits)[:, :, :-1]
        # baseline: the token of another position, as far away as possible within the batch
        rows = directions.flatten(1, 2)
        others = rows.roll(rows.shape[1] // 2, 1).view(directions.shape)
        cosines = [
            torch.linalg.vecdot(residual, direction).sum(-1) for group in (directions, others) for direction in group
        ]
        count = torch.full_like(cosines[0], residual.shape[2])
        self._rows.append(torch.stack([*cosines, count], -1).transpose(0, 1).double().cpu().numpy())


class _Directions:
    """The unit vectors that a batch's residual streams are compared with."""

    def __init__(self, model: Model, target: Target | None) -> None:
        check_predicts_tokens(model)
        _check_widths(model)
        self._embedding, self._unembedding = model.W_E.detach(), model.W_U.detach().T
        self._target = target

    def of(
        self, tokens: Integer[Tensor, "batch pos"], logits: Float[Tensor, "batch pos d_vocab"]
    ) -> Float[Tensor, "direction batch pos d_model"]:
        """Unit vectors in the order of `_DIRECTIONS`; those of the last position have no next token: leave them out."""
        following = torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)
        found = [
            self._embedding[tokens],
            self._unembedding[following],
            self._unembedding[logits.argmax(-1)],
        ]
        top = None if self._target is None else self._target.top1(tokens)
        if top is None:
            found.append(torch.full_like(found[0], torch.nan))
        else:
            top = top.to(tokens)
            if top.shape != tokens.shape:  # a target that makes no prediction at the last position
                top = torch.cat([top, tokens[:, top.shape[1] :]], 1)
            found.append(self._unembedding[top])
        return torch.stack([_unit(one.float()) for one in found])


def _unit(vectors: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def _prompt_cosines(model: Model, tokens: Integer[Tensor, "one position"], named: Any, target: Any) -> Maps:
    directions, values = _Directions(model, target), []
    for subnetwork in named.values():
        with torch.no_grad(), reduced_to(model, subnetwork):
            residual, logits = residual_streams(model, tokens)
        cosines = torch.einsum("lpd,qpd->qlp", _unit(residual[:, 0].float()), directions.of(tokens, logits)[:, 0])
        cosines[1, :, -1] = torch.nan  # there is no next token
        values.append(cosines.double().cpu().numpy())
    return Maps(
        "Cosine of the residual stream with (un)embeddings", _DIRECTIONS, "layer", layer_names(model), "position",
        position_names(model, tokens), tuple(named), np.stack(values, 1),
    )  # fmt: skip


# --- rotation ---


def rotation_angles(matrix: Float[Tensor, "*layer d d"]) -> Float[Tensor, "*layer d"]:
    """Absolute angles of all eigenvalues in degrees, 0 to 180; on the CPU."""
    return torch.linalg.eigvals(matrix.detach().cpu().double()).angle().abs().rad2deg()


@usual_order
@uses_model
def layer_rotations(
    model: Model,
    subnetwork: MaskLike | None = None,
    text: Any = None,
    *,
    maps: Mapping[str, AffineMaps] | None = None,
    alpha: float = 1.0,
    seed: int = 0,
) -> Curves:
    """How far each layer's affine maps rotate: median eigenvalue angles, by layer.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        text: The text to fit maps on: a `Corpus` (its training part), or token ids [sequence, position].
        maps: Maps by condition, fitted before, instead of a text.
        alpha: Ridge penalty of the maps.
        seed: Seed of the matched random subnetwork.

    Returns:
        `Curves` [quantity, condition, layer] (`ROTATION_QUANTITIES`), without intervals. The last layer's map to the
        output is the identity, up to the penalty. If the embedding does not have the width of the residual stream, the
        map to it has no eigenvalues, and its numbers are nan.

    Raises:
        ValueError: If there is neither text nor maps, or the maps were not fitted on this model.

    Example:
        >>> bc.layer_rotations(model, found, text).plot()  # degrees, by layer
    """
    check_model(model)
    if maps is None:
        if text is None:
            raise ValueError("rotations need a text to fit affine maps on, or maps=")
        maps = fit_affine_lens(model, subnetwork, text, alpha=alpha, seed=seed)
    elif not maps:
        raise ValueError("maps= holds no affine maps")
    else:
        check_maps(model, maps, dict.fromkeys(maps))
    return rotation_curves(model, maps)


def rotation_curves(model: Model, maps: Mapping[str, AffineMaps]) -> Curves:
    """The curves of maps that were fitted on this model, by condition."""
    values = np.stack([_rotations(one) for one in maps.values()], 1)
    nothing = np.full_like(values, np.nan)
    notes = {"fitted_on": next(iter(maps.values())).tokens, "alpha": next(iter(maps.values())).alpha}
    return Curves(
        "Rotation of the affine maps", ROTATION_QUANTITIES, "layer", layer_names(model), tuple(maps), values, nothing,
        nothing, notes=notes,
    )  # fmt: skip


def _rotations(maps: AffineMaps) -> Float[np.ndarray, "quantity layer"]:
    angles, shares = [], []
    for matrices in (maps.output_weight, maps.input_weight):
        if matrices.shape[1] != matrices.shape[2]:
            angles.append(torch.full((len(matrices),), torch.nan, dtype=torch.float64))
            shares.append(angles[-1])
            continue
        angle = rotation_angles(matrices)
        angles.append(angle.quantile(0.5, dim=-1))
        shares.append(((angle > 0) & (angle < 180)).double().mean(-1))
    return torch.stack([*angles, *shares]).numpy()


# --- covariance similarity ---


def unbiased_hsic(
    grams: Float[Tensor, "a token token"], others: Float[Tensor, "b token token"]
) -> Float[Tensor, "a b"]:
    """The unbiased estimate of HSIC between each pair of Gram matrices (Song et al. 2012, equation 5)."""
    n = grams.shape[-1]
    ours, theirs = (one * (1 - torch.eye(n, dtype=one.dtype, device=one.device)) for one in (grams, others))
    product = torch.einsum("aij,bij->ab", ours, theirs)
    rows, other_rows = ours.sum(2), theirs.sum(2)
    means = torch.outer(rows.sum(1), other_rows.sum(1)) / ((n - 1) * (n - 2))
    return (product + means - 2 / (n - 2) * rows @ other_rows.T) / (n * (n - 3))


def linear_cka(x: Float[Tensor, "token d_x"], y: Float[Tensor, "token d_y"]) -> float:
    """Unbiased linear CKA of two sets of activations over the same tokens; nan if one of them is constant.

    Raises:
        ValueError: If there are fewer than 4 tokens, or the numbers of tokens differ.

    Example:
        >>> import torch
        >>> x = torch.randn(50, 8)
        >>> round(analysis.linear_cka(x, x.flip(1)), 3)  # nor does a rotation or reflection
        1.0
    """
    if len(x) < 4:
        raise ValueError(f"CKA needs at least 4 tokens, not {len(x)}")
    if len(x) != len(y):
        raise ValueError(f"CKA compares activations over the same tokens, but there are {len(x)} and {len(y)}")
    gram_x, gram_y = (_gram(one[None].double()) for one in (x, y.to(x.device)))
    both = torch.cat([gram_x, gram_y])
    return float(_ratio(unbiased_hsic(both, both))[0, 1])


def covariance_cosine(x: Float[Tensor, "token_x d"], y: Float[Tensor, "token_y d"]) -> float:
    """Frobenius cosine of the covariances of two sets of activations, each without its top singular dimension.

    The formula is at the top of this module. nan if one of them varies in at most one direction.

    Raises:
        ValueError: If there are fewer than 2 tokens in one of them.

    Example:
        >>> import torch
        >>> x = torch.randn(50, 8)
        >>> round(analysis.covariance_cosine(x, 2 * x), 3)  # a scale does not matter
        1.0
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a covariance needs at least 2 tokens, not {min(len(x), len(y))}")
    both = [_moments(one[None].double()) for one in (x, y.to(x.device))]
    return float(_cosines(torch.cat([_without_top(*one) for one in both]))[0, 1])


@usual_order
@uses_model
def covariance_similarity(
    model: Model,
    subnetwork: MaskLike | None = None,
    text: Any = None,
    *,
    measure: str = "cka",
    max_tokens: int = 1 << 13,
    tokens_at_once: int = 512,
) -> Maps:
    """Similarity between layers: within the full model, within the subnetwork, and between the two.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, and the full model against it.
        text: A `Corpus` (its held-out part) or token ids [sequence, position].
        measure: `"cka"` (`linear_cka`), or `"covariance_cosine"` (the function of that name), the measure of Chang and
            Bergen 2025.
        max_tokens: Use at most this many tokens, evenly spread over the text.
        tokens_at_once: Tokens per estimate of CKA; more give less noise, at a cost that grows with the square for each
            layer. A covariance is always that of all tokens.

    Returns:
        `Maps` [1, condition, layer, layer] of the measure. Conditions: `full`; with a subnetwork also `subnetwork`, and
        `full (rows) and subnetwork`. A layer whose activations are the same for all tokens is nan.

    Raises:
        ValueError: If there is no such measure, there are fewer than 4 tokens in all or per estimate, or the model
            cannot read a token or a sequence of this length.

    Example:
        >>> bc.covariance_similarity(model, found, text).plot()  # layer by layer: 1 where they have the same geometry
    """
    subnetwork, _ = check_arguments(model, subnetwork)
    if measure not in _MEASURES:
        raise ValueError(f"measure must be one of {', '.join(_MEASURES)}, not {measure!r}")
    if tokens_at_once < 4:
        raise ValueError(f"tokens_at_once must be at least 4, not {tokens_at_once}")
    tokens = spread(token_array(text), max_tokens)
    if tokens.size < 4:
        raise NotShownError(f"a similarity of layers needs at least 4 tokens, not {tokens.size}")
    check_tokens(model, tokens)
    named = {"full": None} if subnetwork is None else {"full": None, subnetwork.noun: subnetwork}
    return _MEASURES[measure](model, tokens, named, tokens_at_once)


def _by_cka(
    model: Model, tokens: Integer[np.ndarray, "sequence position"], named: Conditions, tokens_at_once: int
) -> Maps:
    sums = covariance_sums(
        tokens, named.get(own_of(named) or ""), max_tokens=int(tokens.size), tokens_at_once=tokens_at_once
    )
    observe(model, tokens, named, lambda name: [sums[name]], what="covariances")
    return covariance_maps(model, sums)


def _by_covariance_cosine(
    model: Model, tokens: Integer[np.ndarray, "sequence position"], named: Conditions, tokens_at_once: int
) -> Maps:
    sums = {name: MomentSums() for name in named}
    observe(model, tokens, named, lambda name: [sums[name]], what="covariances")
    similarity, own = _cosines(torch.cat([_without_top(*one.freeze()) for one in sums.values()])), own_of(sums)
    notes = {"tokens": int(tokens.size), "formula": "Frobenius cosine of covariances without the top dimension"}
    return _similarity_maps(
        model, "Covariance similarity (Frobenius cosine)", _COVARIANCE_COSINE, similarity, notes, own
    )


_MEASURES = {"cka": _by_cka, "covariance_cosine": _by_covariance_cosine}
"""The measures of `covariance_similarity`."""


def covariance_sums(
    tokens: Integer[np.ndarray, "sequence position"],
    subnetwork: Mask | None,
    *,
    max_tokens: int = 1 << 13,
    tokens_at_once: int = 512,
) -> dict[str, CovarianceSums]:
    """Observers for `full` and, if given, what is kept, to be shown a text of at least 4 tokens in this order.

    They use at most `max_tokens` of it, evenly spread.
    """
    make = functools.partial(CovarianceSums, tokens, max_tokens=max_tokens, tokens_at_once=tokens_at_once)
    full = make(keep=subnetwork is not None)
    return {"full": full} | ({} if subnetwork is None else {subnetwork.noun: make(full=full)})


class CovarianceSums:
    """An observer that accumulates HSIC between layers over some sequences of a text, for the model or a subnetwork.

    Gram matrices of the full model are kept until those of the subnetwork have been compared with them: at most
    `max_tokens` x `tokens_at_once` numbers for each layer.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, "sequence position"],
        *,
        max_tokens: int,
        tokens_at_once: int,
        keep: bool = False,
        full: CovarianceSums | None = None,
    ) -> None:
        """Prepare for a text.

        Args:
            tokens: Token ids [sequence, position] of the text that will be shown.
            max_tokens: Use at most this many of them, evenly spread.
            tokens_at_once: Tokens per estimate.
            keep: For the full model: keep Gram matrices for the sums of a subnetwork.
            full: For a subnetwork: the sums of the full model, which kept its Gram matrices.
        """
        n_sequences, length = tokens.shape
        self._chosen = torch.zeros(n_sequences, dtype=torch.bool)
        self._chosen[spread(np.arange(n_sequences)[:, None], max_tokens // length or 1)[:, 0]] = True
        self._at_once = max(-(-4 // length), tokens_at_once // length)
        self._keep, self._full = keep, full
        self._kept: list[Float[Tensor, "layer token token"]] = []
        self._waiting = torch.empty(0)
        self.hsic = torch.tensor(0.0, dtype=torch.float64)
        self.notes = {"tokens": 0, "tokens_at_once": tokens_at_once}

    def add(self, batch: Batch) -> None:
        """Add a batch."""
        here, self._chosen = self._chosen.tensor_split([len(batch.tokens)])
        picked = batch.residual[:, here.to(batch.residual.device)].float()
        self._waiting = torch.cat([self._waiting, picked], 1) if self._waiting.numel() else picked
        while self._waiting.shape[1] >= self._at_once:
            self._add(self._waiting[:, : self._at_once])
            self._waiting = self._waiting[:, self._at_once :]
        if not len(self._chosen) and self._waiting[0, ..., 0].numel() >= 4:  # the last tokens of the text
            self._add(self._waiting)

    def _add(self, residual: Float[Tensor, "layer sequence position d_model"]) -> None:
        grams = _gram(residual.flatten(1, 2))
        if self._keep:
            self._kept.append(grams)
            return
        if self._full is not None:
            grams = torch.cat([self._full._kept.pop(0), grams])
        self.hsic = self.hsic + unbiased_hsic(grams, grams).double() * grams.shape[2]
        self.notes["tokens"] += grams.shape[2]


def covariance_maps(model: Model, sums: Mapping[str, CovarianceSums]) -> Maps:
    """The result of `covariance_similarity`, from observers that have seen all of their text."""
    last = list(sums.values())[-1]
    notes = last.notes | {"formula": "linear CKA, unbiased HSIC"}
    return _similarity_maps(model, "Covariance similarity (linear CKA)", _CKA, _ratio(last.hsic), notes, own_of(sums))


def _similarity_maps(
    model: Model, title: str, quantity: Quantity, similarities: Float[Tensor, "a a"], notes: Mapping[str, Any],
    own: str | None,
) -> Maps:  # fmt: skip
    """Panels of a matrix whose rows and columns are the full model's layers, then, if there is one, those of `own`."""
    similarity, n_layers = similarities.cpu().numpy(), model.cfg.n_layers + 1
    panels = {"full": similarity[:n_layers, :n_layers]}
    if own is not None:
        panels[own] = similarity[n_layers:, n_layers:]
        panels[f"full (rows) and {own}"] = similarity[:n_layers, n_layers:]
    names = layer_names(model)
    return Maps(
        title, (quantity,), "layer", names, "layer", names, tuple(panels), np.stack(list(panels.values()))[None],
        notes=notes,
    )  # fmt: skip


def _gram(x: Float[Tensor, "layer token d"]) -> Float[Tensor, "layer token token"]:
    """Gram matrices of centred rows, scaled so that their products neither overflow nor lose precision."""
    centred = x - x.mean(1, keepdim=True)
    scale = centred.square().mean((1, 2), keepdim=True).sqrt()
    constant = scale <= 1e-6 * x.square().mean((1, 2), keepdim=True).sqrt()
    unit = torch.where(constant, 0, centred / torch.where(constant, 1, scale))
    return unit @ unit.transpose(1, 2) / x.shape[2]


def _ratio(hsic: Float[Tensor, "a a"]) -> Float[Tensor, "a a"]:
    own = hsic.diagonal()
    known = torch.where(own > 0, own, torch.nan)
    return hsic / torch.outer(known, known).sqrt()


class MomentSums:
    """An observer that accumulates mean and covariance of every layer's residual stream.

    Sums are relative to the first batch's means, so that centring loses no precision.
    """

    def __init__(self) -> None:
        self._n = 0
        self._shift: Tensor | None = None

    def add(self, batch: Batch) -> None:
        """Add a batch."""
        x = batch.residual.flatten(1, 2)
        if self._shift is None:
            self._shift = x.double().mean(1, keepdim=True)
            self._sum = torch.zeros_like(self._shift[:, 0])
            self._products = torch.zeros(len(x), x.shape[2], x.shape[2], dtype=torch.float64, device=x.device)
        for layer, rows in enumerate(x):  # one layer in float64 at a time
            moved = rows.double() - self._shift[layer]
            self._products[layer] += moved.T @ moved
            self._sum[layer] += moved.sum(0)
        self._n += x.shape[1]

    def freeze(self) -> tuple[Float[Tensor, "layer d"], Float[Tensor, "layer d d"]]:
        """Mean and covariance by layer."""
        assert self._shift is not None, "no text was added"
        moved = self._sum / self._n
        covariance = self._products / self._n - moved[:, :, None] * moved[:, None]
        return self._shift[:, 0] + moved, covariance


def _moments(x: Float[Tensor, "layer token d"]) -> tuple[Float[Tensor, "layer d"], Float[Tensor, "layer d d"]]:
    """Mean and covariance of the rows."""
    centred = x - x.mean(1, keepdim=True)
    return x.mean(1), centred.transpose(1, 2) @ centred / x.shape[1]


def _without_top(mean: Float[Tensor, "layer d"], covariance: Float[Tensor, "layer d d"]) -> Float[Tensor, "layer d d"]:
    """Covariances without their largest principal component; nan where nothing but rounding is left."""
    variances, directions = torch.linalg.eigh(covariance)
    top = directions[..., -1]
    rest = covariance - variances[:, -1, None, None] * top[:, :, None] * top[:, None]
    size = mean.square().sum(1) + covariance.diagonal(dim1=1, dim2=2).sum(1)
    constant = torch.linalg.matrix_norm(rest) <= _CONSTANT * size
    return torch.where(constant[:, None, None], torch.nan, rest)


def _cosines(matrices: Float[Tensor, "a d d"]) -> Float[Tensor, "a a"]:
    """Frobenius cosine of each pair of matrices."""
    unit = _unit(matrices.flatten(1))
    return unit @ unit.T


# --- steps of `analyze` ---


@in_suite("prompt_cosine")
def _(subject: Subject) -> Maps:
    _check_widths(subject.model)
    return _prompt_cosines(subject.model, subject.prompt_tokens, subject.conditions, subject.target)
