"""Affine maps of the residual stream: from each layer to the last layer, and to the current token's embedding.

The *affine* or *tuned lens* (Belrose et al. 2023, arXiv 2303.08112) reads a layer's residual stream through an affine
map fitted to predict the last layer's residual stream; a second map predicts the current token's embedding, and so
shows how much of the current token is still represented. Both are solved from normal equations (ridge, with intercept)
in one pass over the text: only d_model x d_model numbers per layer are stored, never the activations.
`refine_affine_lens` then lowers the KL from the model's output to the lens, as the tuned lens does.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.arguments import usual_order
from bigram_circuits.analysis.conditions import (
    Batch,
    Conditions,
    check_arguments,
    checked_text,
    conditions,
    observe,
    reduced_to,
)
from bigram_circuits.masking.apply import Mask, MaskLike
from bigram_circuits.models.activations import readout, residual_streams, rows_at_once
from bigram_circuits.models.identity import how_models_differ, weight_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, uses_model
from bigram_circuits.progress import steps as counted
from bigram_circuits.storage.files import whole_file
from bigram_circuits.storage.records import (
    check_content,
    check_header,
    parse_json,
    read_tensors,
    seal_tensors,
    shown,
    write_tensors,
)
from bigram_circuits.text.corpus import Corpus, batch_of, spread

_FORMAT = "bigram_circuits.affine_maps/1"
_TENSORS = ("output_weight", "output_bias", "input_weight", "input_bias")
RECALLS = (1, 5, 10)
"""The k of recall@k."""


@dataclass(frozen=True)
class AffineMaps:
    """Affine maps from each layer's residual stream to the last layer's, and to the current token's embedding.

    Example:
        >>> maps = analysis.fit_affine_lens(model, tokens=text)["full"]
        >>> maps.save("maps.safetensors")
        >>> again = analysis.AffineMaps.load("maps.safetensors", model)
    """

    output_weight: Float[Tensor, "layer d_model d_model"]
    """A row vector times this, plus `output_bias`, predicts the residual stream that the final norm reads."""
    output_bias: Float[Tensor, "layer d_model"]
    """Intercepts."""
    input_weight: Float[Tensor, "layer d_model d_embed"]
    """A row vector times this, plus `input_bias`, predicts the current token's embedding."""
    input_bias: Float[Tensor, "layer d_embed"]
    """Intercepts."""
    weight_hash: str
    """Weight hash of the model they were fitted on."""
    condition: str
    """The condition they were fitted on: a subnetwork's lineage, or `full`."""
    tokens: int
    """Number of tokens they were fitted on."""
    alpha: float
    """Ridge penalty."""

    def to_output(self, residual: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """Predict the last residual stream from that of entry `layer` (0: the embedding)."""
        return _affine(residual, self.output_weight[layer], self.output_bias[layer]).to(residual)

    def to_input(self, residual: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_embed"]:
        """Predict the embedding of the current token, in float32."""
        return _affine(residual, self.input_weight[layer], self.input_bias[layer])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with checksums."""
        arrays = {name: getattr(self, name).detach().cpu().numpy() for name in _TENSORS}
        about = {name: getattr(self, name) for name in ("weight_hash", "condition", "tokens", "alpha")}
        with whole_file(Path(path)) as temporary:
            write_tensors(temporary, arrays, seal_tensors(arrays, {"format": _FORMAT, "about": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Model | None = None) -> AffineMaps:
        """Read what `save` wrote; with `model`, check that they were fitted on it.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is damaged or holds something else, or the maps were fitted on another model.
        """
        arrays, metadata = read_tensors(path, "holds no affine maps")
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} has format {shown(metadata.get('format'))}, but {_FORMAT!r} is needed")
        try:
            check_header(arrays, metadata, {"format", "about"})
            check_content(arrays, metadata)
            _check_sizes(arrays)
            about = _about(metadata.get("about", ""))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
        maps = cls(**{name: torch.from_numpy(array) for name, array in arrays.items()}, **about)
        if model is not None:
            check_maps(model, {"": maps}, {"": None})
        return maps


def _check_sizes(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError unless these are the four tensors, with matching shapes."""
    if set(arrays) != set(_TENSORS):
        raise ValueError(f"it should hold {', '.join(_TENSORS)}, not {shown(sorted(arrays))}")
    shapes = [arrays[name].shape for name in _TENSORS]
    layers, d_model, d_embed = (*shapes[0][:2], shapes[2][-1] if shapes[2] else 0) if len(shapes[0]) == 3 else (0, 0, 0)
    wanted = [(layers, d_model, d_model), (layers, d_model), (layers, d_model, d_embed), (layers, d_embed)]
    if shapes != wanted or any(array.dtype.kind != "f" for array in arrays.values()):
        raise ValueError(f"its tensors do not fit together: their shapes are {', '.join(map(shown, shapes))}")


def _about(text: str) -> dict[str, Any]:
    """Read what a file's header says about its maps."""
    about = parse_json(text)
    kinds = {"weight_hash": (str,), "condition": (str,), "tokens": (int,), "alpha": (int, float)}
    if not isinstance(about, dict) or set(about) != set(kinds):
        raise ValueError(f"its header should say {', '.join(kinds)}, not {shown(about)}")
    wrong = [name for name, value in about.items() if type(value) not in kinds[name]]
    if wrong or not 0 <= about["tokens"] < 2**63 or not 0 <= about["alpha"] <= sys.float_info.max:
        raise ValueError(f"its header has values that are not possible: {shown(about)}")
    return {**about, "alpha": float(about["alpha"])}


def _affine(rows: Float[Tensor, "*rows d"], weight: Float[Tensor, "d e"], bias: Float[Tensor, " e"]) -> Tensor:
    """Apply an affine map in float32, whatever the precision of the rows."""
    return rows.float() @ weight.to(rows.device, torch.float32) + bias.to(rows.device, torch.float32)


class AffineFitter:
    """An observer that accumulates the normal equations of all layers' maps; `freeze` solves them.

    All sums are relative to the first batch's means, so that centring loses no precision.
    """

    def __init__(self, model: Model) -> None:
        self._embedding: Tensor = model.W_E.detach()
        self._n = 0
        self._shift: tuple[Tensor, Tensor] | None = None

    def add(self, batch: Batch) -> None:
        """Add a batch of residual streams."""
        x = batch.residual.flatten(1, 2).float()
        embedded = self._embedding[batch.tokens.flatten()].float()
        if self._shift is None:
            self._shift = x.mean(1, keepdim=True), embedded.mean(0)
            layers, d_model, d_embed = len(x), x.shape[2], embedded.shape[1]
            wide = {"dtype": torch.float64, "device": x.device}
            self._xx = torch.zeros(layers, d_model, d_model, **wide)
            self._xy = torch.zeros(layers, d_model, d_model, **wide)
            self._xe = torch.zeros(layers, d_model, d_embed, **wide)
            self._x, self._e = torch.zeros(layers, d_model, **wide), torch.zeros(d_embed, **wide)
        x, embedded = x - self._shift[0], embedded - self._shift[1]
        for layer, rows in enumerate(x):  # one layer's product at a time
            self._xx[layer] += rows.T @ rows
            self._xy[layer] += rows.T @ x[-1]
            self._xe[layer] += rows.T @ embedded
        self._x += x.sum(1)
        self._e += embedded.sum(0)
        self._n += x.shape[1]

    def freeze(self, model: Model, subnetwork: Mask | None, alpha: float) -> AffineMaps:
        """Solve (X'X + alpha) W = X'Y for centred X and Y, layer by layer; the intercept is not penalised."""
        assert self._shift is not None, "no text was added"
        n, x, e = self._n, self._x, self._e
        x_mean, e_mean = self._shift[0][:, 0] + x / n, self._shift[1] + e / n
        found: list[list[Tensor]] = [[], [], [], []]  # in the order of AffineMaps' fields
        penalty = alpha * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        for layer in range(len(x)):
            xx = self._xx[layer] - torch.outer(x[layer], x[layer]) / n + penalty
            xy = self._xy[layer] - torch.outer(x[layer], x[-1]) / n
            xe = self._xe[layer] - torch.outer(x[layer], e) / n
            weight, failed = torch.linalg.solve_ex(xx, torch.cat([xy, xe], 1))
            if int(failed):
                raise ValueError(
                    f"the affine map from layer {layer - 1 if layer else 'embed'} is not unique: its residual streams "
                    f"do not span all dimensions; use an alpha above {alpha}, or more text"
                )
            to_output, to_input = weight[:, : x.shape[1]], weight[:, x.shape[1] :]
            solved = (to_output, x_mean[-1] - x_mean[layer] @ to_output, to_input, e_mean - x_mean[layer] @ to_input)
            for rows, part in zip(found, solved, strict=True):
                rows.append(part.float())
        return AffineMaps(
            *(torch.stack(rows) for rows in found),
            weight_hash=weight_hash(model),
            condition="full" if subnetwork is None else subnetwork.lineage,
            tokens=n,
            alpha=alpha,
        )


@usual_order
@uses_model
def fit_affine_lens(
    model: Model,
    subnetwork: MaskLike | None = None,
    tokens: Any = None,
    *,
    alpha: float = 1.0,
    max_tokens: int = 1 << 17,
    seed: int = 0,
) -> dict[str, AffineMaps]:
    """Fit both affine maps of every layer, for the full model and, if given, a subnetwork and its controls.

    Args:
        model: From `load_model`.
        subnetwork: If given, also fit maps for the subnetwork, its complement, and a matched random one.
        tokens: Token ids [sequence, position] to fit on, or a `Corpus` (its training part).
        alpha: Ridge penalty, at least 0.
        max_tokens: Use at most this many tokens, evenly spread over the text.
        seed: Seed of the matched random subnetwork.

    Returns:
        The maps by condition: `full`, `subnetwork`, `complement`, `random`.

    Raises:
        ValueError: If there is no text, alpha is below 0, or a map is not unique without a penalty.

    Example:
        >>> maps = analysis.fit_affine_lens(model, found, text)
        >>> bc.logit_lens(model, found, text="import os", maps=maps).plot()  # the tuned lens of a prompt
    """
    check_model(model)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must be a penalty of at least 0, not {alpha}")
    subnetwork, _ = check_arguments(model, subnetwork, seed=seed)
    text = checked_text(model, tokens.train if isinstance(tokens, Corpus) else tokens)
    return fit_maps(model, spread(text, max_tokens), conditions(subnetwork, seed=seed), alpha)


def fit_maps(
    model: Model, some: Integer[np.ndarray, "sequence position"], named: Conditions, alpha: float | int
) -> dict[str, AffineMaps]:
    """`fit_affine_lens` on a checked text, for given conditions."""
    return {name: _fit(model, some, name, one, float(alpha)) for name, one in named.items()}


def _fit(
    model: Model, tokens: Integer[np.ndarray, "sequence position"], name: str, kept: Mask | None, alpha: float
) -> AffineMaps:
    """Fit one condition's maps; its normal equations are freed before the next condition's are accumulated."""
    fitter = AffineFitter(model)
    observe(model, tokens, {name: kept}, lambda _: [fitter], what="fitting affine maps")
    return fitter.freeze(model, kept, alpha)


@usual_order
@uses_model
def refine_affine_lens(
    model: Model,
    maps: AffineMaps,
    subnetwork: MaskLike | None = None,
    tokens: Any = None,
    *,
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> AffineMaps:
    """Train the maps to the output further to lower the KL from the model's output to the lens (Belrose et al. 2023).

    Uses Adam on all layers at once, with a learning rate that falls linearly to 0. The maps to the input are unchanged.

    Args:
        model: From `load_model`.
        maps: From `fit_affine_lens`, for the same condition.
        subnetwork: The condition: the weights that are kept; None for the full model.
        tokens: Token ids [sequence, position] to train on, or a `Corpus` (its training part).
        steps: Number of Adam steps.
        batch_size: Sequences per step.
        learning_rate: Initial learning rate.
        seed: Seed of the data order.

    Raises:
        ValueError: If the maps were not fitted on this model, or a number is too small.

    Example:
        >>> maps = analysis.fit_affine_lens(model, tokens=text)["full"]
        >>> maps = analysis.refine_affine_lens(model, maps, tokens=text, steps=2)
    """
    subnetwork, _ = check_arguments(model, subnetwork, seed=seed)
    if steps < 0 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"refining needs steps of 0 or more, a batch_size of at least 1 and a learning_rate above 0, not {steps}, "
            f"{batch_size} and {learning_rate}"
        )
    check_maps(model, {"": maps}, {"": None})
    text = checked_text(model, tokens.train if isinstance(tokens, Corpus) else tokens)
    device = model.cfg.device
    weight = maps.output_weight.detach().clone().to(device).requires_grad_()
    bias = maps.output_bias.detach().clone().to(device).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    with reduced_to(model, subnetwork):
        for step in counted(range(steps), steps, desc="refining the lens", unit="step"):
            batch = batch_of(text, batch_size, step=step, seed=seed).to(device)
            with torch.no_grad():
                streams, logits = residual_streams(model, batch)
                output = logits.flatten(0, 1).float().softmax(-1)
            optimizer.zero_grad(set_to_none=True)
            for layer, residual in enumerate(streams.flatten(1, 2)):  # one layer's graph at a time
                wide = readout(model, _affine(residual, weight[layer], bias[layer]).to(residual)).float()
                loss = (wide.logsumexp(-1) - torch.linalg.vecdot(output, wide)).mean()
                gradients = torch.autograd.grad(loss, [weight, bias])
                for parameter, gradient in zip((weight, bias), gradients, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / steps)
            optimizer.step()
    return replace(maps, output_weight=weight.detach(), output_bias=bias.detach())


class RecallSums:
    """An observer that counts, by sequence and layer, how often the map to the input finds the current token."""

    def __init__(self, model: Model, maps: AffineMaps) -> None:
        self._maps, self._embedding = maps, model.W_E.detach().float()
        self._rows: list[Float[np.ndarray, "sequence layer column"]] = []

    def rows(self) -> Float[np.ndarray, "sequence layer column"]:
        """Counts by sequence: current token among the 1, 5 and 10 nearest, and positions."""
        return np.concatenate(self._rows)

    def add(self, batch: Batch) -> None:
        """Add a batch."""
        current = batch.tokens.flatten()
        size = rows_at_once(len(self._embedding))
        layers = []
        for layer, residual in enumerate(batch.residual.flatten(1, 2)):
            ranks = []
            for at in range(0, len(current), size):
                scores = self._maps.to_input(residual[at : at + size], layer) @ self._embedding.T
                ranks.append((scores > scores.gather(1, current[at : at + size, None])).sum(-1))
            rank = torch.cat(ranks).view(batch.tokens.shape)
            counts = [(rank < k).sum(1) for k in RECALLS]
            layers.append(torch.stack([*counts, torch.full_like(counts[0], rank.shape[1])], 1))
        self._rows.append(torch.stack(layers, 1).double().cpu().numpy())


def check_maps(model: Model, maps: Mapping[str, AffineMaps] | None, named: Conditions) -> None:
    """Raise ValueError unless there are maps for every condition, fitted on this model under that condition."""
    if maps is None:
        return
    if not isinstance(maps, Mapping):
        raise ValueError(
            f"maps must be affine maps by condition, as fit_affine_lens gives, not a {type(maps).__name__}"
        )
    found = weight_hash(model)
    for name, subnetwork in named.items():
        if name not in maps:
            raise ValueError(f"there are no affine maps for {name!r}: there are {', '.join(maps)}")
        if subnetwork is not None and maps[name].condition != subnetwork.lineage:
            raise ValueError(
                f"the affine maps for {name!r} were fitted on {maps[name].condition!r}, not on {subnetwork.lineage!r}"
            )
        how = how_models_differ(maps[name].weight_hash, found)
        if how is not None:
            raise ValueError(f"the affine maps were fitted on another model than {model.cfg.model_name!r}: {how}")
