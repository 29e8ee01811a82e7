"""Lenses: what the residual stream after each block would predict, for a subnetwork beside the full model.

The *logit lens* (nostalgebraist 2020) reads the residual stream of every layer through the model's own final norm and
unembedding. The *affine* or *tuned lens* (Belrose et al. 2023, arXiv 2303.08112) first maps it by an affine map that
was fitted to predict the last layer's residual stream; a second map predicts the current token's embedding, and so says
how much of the current token is left. Both maps come from normal equations (ridge, with intercept) in one pass over the
text: what is kept is d_model x d_model numbers for each layer, never the activations. `refine_affine_lens` then lowers
the KL from the model's output to the lens's, as the tuned lens does.

Over a corpus, one row of sums per sequence and layer is kept; intervals are bootstrapped from these.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import trange

from bigram_circuits import metrics
from bigram_circuits.analysis.conditions import (
    Batch,
    Conditions,
    check_seed,
    check_subnetwork,
    conditions,
    observe,
    reduced_to,
)
from bigram_circuits.analysis.prompts import is_prompt, position_names, prompt_tokens, token_words
from bigram_circuits.analysis.results import Curves, Maps, Quantity, curves_from_sums
from bigram_circuits.corpus import Corpus, batch_of, token_array
from bigram_circuits.files import whole_file
from bigram_circuits.models import check_model, check_tokens, readout, residual_streams
from bigram_circuits.sites import weight_hash
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets import check_target

_FORMAT = "bigram_circuits.affine_maps/1"
_LOGITS_AT_ONCE = 1 << 22  # 16 MiB of float32,
_ROWS_AT_ONCE = 256  # but never fewer rows than make the unembedding efficient
_LOGITS_IN_CACHE = 1 << 18  # read again and again while they are in a cache: 1 MiB
_RECALLS = (1, 5, 10)

_PAIRS = 6  # columns of metrics.correlation_sums
_READINGS = ("surprisal", "entropy", "kl", "agree", "reciprocal_rank")

LENS_QUANTITIES = (
    Quantity("surprisal_correlation", "", "Pearson r of the lens's surprisal of the actual next token with the "
             "target's, where the target's probability is above 0"),
    Quantity("output_correlation", "", "Pearson r of the lens's surprisal of the actual next token with that of the "
             "model's output, under the same condition"),
    Quantity("mean_surprisal", "nats", "mean surprisal of the actual next token under the lens"),
    Quantity("entropy", "nats", "mean entropy of the lens's distribution"),
    Quantity("kl", "nats", "mean KL from the model's output, under the same condition, to the lens"),
    Quantity("top1_agreement", "share", "positions where lens and output have the same most likely token"),
    Quantity("reciprocal_rank", "", "mean of 1 / (1 + rank of the actual next token), the most likely having rank 0"),
)  # fmt: skip

PROMPT_QUANTITIES = (
    Quantity("probability", "share", "of the lens's most likely token"),
    Quantity("next_rank", "", "rank of the actual next token; the most likely token has rank 0"),
    Quantity("next_probability", "share", "of the actual next token"),
    Quantity("entropy", "nats", "of the lens's distribution"),
    Quantity("kl", "nats", "from the model's output, under the same condition, to the lens"),
)


def layer_names(model: Any) -> tuple[str, ...]:
    """`embed`, then the blocks after which the residual stream is read: `0`, `1`, ..."""
    return ("embed", *map(str, range(model.cfg.n_layers)))


# --- the logit lens ---


def logit_lens(
    model: Any,
    text: Any,
    subnetwork: Subnetwork | None = None,
    *,
    target: Any = None,
    maps: Mapping[str, AffineMaps] | None = None,
    top_k: int = 5,
    seed: int = 0,
) -> Maps | Curves:
    """The logit lens on a prompt, or its means over a corpus.

    Args:
        model: From `load_model`.
        text: A prompt (`str`, or token ids [position]): every layer and position is shown. Or a `Corpus` (its held-out
            part), or token ids [sequence, position]: means by layer.
        subnetwork: Measure it, its complement and a matched random one beside the full model.
        target: For a corpus: the r of the lens with this target's surprisals by layer, for example an `NGramTable`.
        maps: Affine maps by condition, from `fit_affine_lens`: the tuned lens instead of the logit lens.
        top_k: For a prompt: how many of the most likely tokens `text` names in each cell, a line each.
        seed: Of the matched random subnetwork.

    Returns:
        For a prompt, `Maps` [quantity, condition, layer, position] with the most likely tokens as text
        (`PROMPT_QUANTITIES`; what concerns the actual next token is nan at the last position). For a corpus, `Curves`
        [quantity, condition, layer] with 95% intervals (`LENS_QUANTITIES`; r with the target is nan without one).

    Raises:
        ValueError: If the text is empty or of another shape, the maps are not the model's, or the model's logits are
            not its final norm and unembedding applied to the last residual stream.
    """
    _check_readout(model)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if target is not None:
        check_target(target, model.cfg.d_vocab)
    named = conditions(subnetwork, seed=seed)
    check_maps(model, maps, named)
    if is_prompt(text):
        return _prompt_lens(model, prompt_tokens(model, text), named, maps, top_k)
    tokens = token_array(text)
    watching = {name: LensSums(model, target, None if maps is None else maps[name]) for name in named}
    observe(model, tokens, named, lambda name: [watching[name]], what="logit lens")
    title = "Logit lens" if maps is None else "Affine lens"
    return lens_curves(title, model, watching, {"tokens": int(tokens.size), "random_seed": seed})


def lens_curves(title: str, model: Any, sums: Mapping[str, LensSums], notes: Mapping[str, Any]) -> Curves:
    """The curves of what `LensSums` added up, by condition."""
    rows = {name: one.rows() for name, one in sums.items()}
    return curves_from_sums(title, LENS_QUANTITIES, "layer", layer_names(model), rows, _lens_statistics, notes)


def _lens_statistics(sums: Float[np.ndarray, "... layer column"]) -> Float[np.ndarray, "... quantity layer"]:
    with_target, with_output = sums[..., :_PAIRS], sums[..., _PAIRS : 2 * _PAIRS]
    count = with_output[..., :1]  # every output surprisal is finite
    means = sums[..., 2 * _PAIRS :] / count
    curves = [metrics.correlation(with_target), metrics.correlation(with_output), *np.moveaxis(means, -1, 0)]
    return np.stack(curves, axis=-2)


class LensSums:
    """Adds up, for every sequence and layer, what the lens's statistics are made of; an observer."""

    def __init__(self, model: Any, target: Any = None, maps: AffineMaps | None = None) -> None:
        """With `maps`, the residual stream goes through them first."""
        self._model, self._target, self._maps = model, target, maps
        self._rows: list[Float[np.ndarray, "sequence layer column"]] = []

    def rows(self) -> Float[np.ndarray, "sequence layer column"]:
        """Sums of every sequence: six for r with the target, six for r with the output, then the readings."""
        return np.concatenate(self._rows)

    def add(self, batch: Batch) -> None:
        """Take in a batch. Positions with an actual next token count: all but the last of a sequence."""
        tokens, n_sequences = batch.tokens, len(batch.tokens)
        following = tokens[:, 1:].reshape(-1)
        own = metrics.surprisals(batch.logits, tokens).double()
        theirs = torch.full_like(own, torch.inf) if self._target is None else self._target.surprisal(tokens).to(own)
        residual = batch.residual[:, :, :-1].flatten(1, 2)
        logits = batch.logits[:, :-1].flatten(0, 1)
        size = max(_ROWS_AT_ONCE, _LOGITS_AT_ONCE // logits.shape[-1])
        readings = torch.cat(
            [self._read(residual[:, at : at + size], logits[at : at + size], following[at : at + size])
             for at in range(0, len(following), size)], dim=1,
        ).double()  # fmt: skip
        readings = readings.unflatten(1, (n_sequences, -1))  # [layer, sequence, position, reading]
        sums = [
            torch.cat([metrics.correlation_sums(layer[..., 0], y) for y in (theirs, own)] + [layer.sum(1)], 1)
            for layer in readings
        ]
        self._rows.append(torch.stack(sums, 1).cpu().numpy())

    def _read(
        self,
        residual: Float[Tensor, "layer row d_model"],
        output: Float[Tensor, "row d_vocab"],
        following: Integer[Tensor, " row"],
    ) -> Float[Tensor, "layer row reading"]:
        reference = Reference.of(output)
        layers = []
        for index, layer in enumerate(residual):
            mapped = layer if self._maps is None else self._maps.to_output(layer, index)
            layers.append(torch.stack(readings(readout(self._model, mapped), following, reference), -1))
        return torch.stack(layers)


@dataclass(frozen=True)
class Reference:
    """The distribution that a lens is compared with."""

    probs: Float[Tensor, "row d_vocab"]
    """softmax of the model's logits."""
    entropy: Float[Tensor, " row"]
    """Of these, nats."""
    top: Integer[Tensor, " row"]
    """Most likely token."""

    @classmethod
    def of(cls, logits: Float[Tensor, "row d_vocab"]) -> Reference:
        """From logits, or log-probabilities."""
        wide = logits.float()
        probs = wide.softmax(-1)
        entropy = wide.logsumexp(-1) - torch.linalg.vecdot(probs, wide)
        return cls(probs, entropy, wide.argmax(-1))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three, row by row."""
        return self.probs, self.entropy, self.top


def readings(
    logits: Float[Tensor, "row d_vocab"], following: Integer[Tensor, " row"], reference: Reference
) -> tuple[Float[Tensor, " row"], ...]:
    """Surprisal of the next token, entropy, KL from the reference, agreement with it, and reciprocal rank, per row.

    KL(p || q) = lse(z) - <p, z> - H(p), where z are the logits of q: no second distribution is stored.
    """
    size = max(1, _LOGITS_IN_CACHE // logits.shape[-1])
    parts = zip(*(one.split(size) for one in (logits, following, *reference.columns)), strict=True)
    return tuple(torch.cat(column) for column in zip(*(_readings(*part) for part in parts), strict=True))


def _readings(
    logits: Float[Tensor, "row d_vocab"],
    following: Integer[Tensor, " row"],
    probs: Float[Tensor, "row d_vocab"],
    entropy_of_reference: Float[Tensor, " row"],
    top: Integer[Tensor, " row"],
) -> tuple[Float[Tensor, " row"], ...]:
    wide = logits.float()
    highest = wide.amax(-1)
    exponentials = (wide - highest[:, None]).exp_()
    total = exponentials.sum(-1)
    lse = highest + total.log()
    entropy = lse - torch.linalg.vecdot(exponentials, wide) / total
    kl = lse - torch.linalg.vecdot(probs, wide) - entropy_of_reference
    of_next = wide.gather(1, following[:, None])
    rank = (wide > of_next).sum(-1)
    agree = (wide.gather(1, top[:, None])[:, 0] == highest).float()
    return lse - of_next[:, 0], entropy, kl, agree, 1 / (1 + rank)


def _prompt_lens(
    model: Any,
    tokens: Integer[Tensor, "one position"],
    named: Conditions,
    maps: Mapping[str, AffineMaps] | None,
    top_k: int,
) -> Maps:
    from transformer_lens.tools.analysis import logit_lens as lens_of_transformer_lens

    values, texts = [], []
    following = torch.cat([tokens[0, 1:], tokens[0, :1]])  # the last has no next token; its place is overwritten
    for name, subnetwork in named.items():
        lens = None if maps is None else maps[name].to_output
        with reduced_to(model, subnetwork), torch.no_grad():
            found = lens_of_transformer_lens(model, tokens, positions=None, return_type="log_probs", lens=lens)
            output = Reference.of(model(tokens)[0])
        layers, words = [], []
        for log_probs in found.values[:, 0]:
            surprisal, entropy, kl, _, reciprocal = readings(log_probs, following, output)
            rank, probability = (1 / reciprocal - 1).round(), (-surprisal).exp()
            rank[-1] = probability[-1] = torch.nan
            top = log_probs.topk(min(top_k, log_probs.shape[-1]))
            layers.append(torch.stack([top.values[:, 0].exp(), rank, probability, entropy, kl]))
            words.append(tuple("\n".join(token_words(model, ids)) for ids in top.indices.tolist()))
        values.append(torch.stack(layers, 1).double().cpu().numpy())
        texts.append(tuple(words))
    title = "Logit lens" if maps is None else "Affine lens"
    return Maps(
        title, PROMPT_QUANTITIES, "layer", layer_names(model), "position", position_names(model, tokens), tuple(named),
        np.stack(values, 1), tuple(texts), notes={"top_k": top_k},
    )  # fmt: skip


def _check_readout(model: Any) -> None:
    """Raise ValueError unless final norm and unembedding of the last residual stream give the model's logits."""
    check_model(model)
    tokens = torch.arange(min(4, model.cfg.d_vocab), device=model.cfg.device)[None]
    with torch.no_grad():
        streams, logits = residual_streams(model, tokens)
        ours = readout(model, streams[-1])
    worst, spread = (ours - logits).abs().max().item(), (logits - logits.mean(-1, keepdim=True)).abs().max().item()
    if not worst <= 0.1 * spread:
        raise ValueError(
            f"a lens reads the residual stream through the final norm and the unembedding, but for this model that "
            f"differs from its logits by up to {worst:.3g} (their spread is {spread:.3g})"
        )


# --- the affine lens ---


@dataclass(frozen=True)
class AffineMaps:
    """Affine maps from each layer's residual stream: to the last one's, and to the current token's embedding."""

    output_weight: Float[Tensor, "layer d_model d_model"]
    """Row vector times this, plus `output_bias`, predicts the residual stream that the final norm reads."""
    output_bias: Float[Tensor, "layer d_model"]
    """Intercepts."""
    input_weight: Float[Tensor, "layer d_model d_embed"]
    """Row vector times this, plus `input_bias`, predicts the current token's embedding."""
    input_bias: Float[Tensor, "layer d_embed"]
    """Intercepts."""
    weight_hash: str
    """Of the model they were fitted on."""
    condition: str
    """What the model was reduced to: a lineage, or `full`."""
    tokens: int
    """How many tokens they were fitted on."""
    alpha: float
    """Ridge penalty."""

    def to_output(self, residual: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """The predicted last residual stream, from that of entry `layer` (0: the embedding)."""
        return _affine(residual, self.output_weight[layer], self.output_bias[layer]).to(residual)

    def to_input(self, residual: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_embed"]:
        """The predicted embedding of the current token, float32."""
        return _affine(residual, self.input_weight[layer], self.input_bias[layer])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        names = ("output_weight", "output_bias", "input_weight", "input_bias")
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in names}
        about = {name: getattr(self, name) for name in ("weight_hash", "condition", "tokens", "alpha")}
        with whole_file(Path(path)) as temporary:
            save_file(tensors, temporary, {"format": _FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None) -> AffineMaps:
        """Read what `save` wrote; with `model`, check that they were fitted on it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or something else, or was fitted on another model.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} holds no affine maps: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} has format {metadata.get('format')!r}, but {_FORMAT!r} is needed")
        maps = cls(**tensors, **json.loads(metadata["about"]))
        if model is not None:
            check_maps(model, {"": maps}, {"": None})
        return maps


def _affine(rows: Float[Tensor, "*rows d"], weight: Float[Tensor, "d e"], bias: Float[Tensor, " e"]) -> Tensor:
    """In float32, whatever the precision of the rows."""
    return rows.float() @ weight.to(rows.device, torch.float32) + bias.to(rows.device, torch.float32)


class AffineFitter:
    """Adds up the normal equations of all layers' maps; an observer. `freeze` solves them.

    Everything is taken relative to the first batch's means, so that centring loses no digits.
    """

    def __init__(self, model: Any) -> None:
        self._embedding: Tensor = model.W_E.detach()
        self._n = 0
        self._shift: tuple[Tensor, Tensor] | None = None

    def add(self, batch: Batch) -> None:
        """Take in a batch of residual streams."""
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

    def freeze(self, model: Any, subnetwork: Subnetwork | None, alpha: float) -> AffineMaps:
        """Solve (X'X + alpha) W = X'Y for centred X and Y, layer by layer; the intercept is not penalised."""
        assert self._shift is not None, "no text was added"
        n, x, e = self._n, self._x, self._e
        outputs, inputs = [], []
        penalty = alpha * torch.eye(x.shape[1]).to(x)
        for layer in range(len(x)):
            xx = self._xx[layer] - torch.outer(x[layer], x[layer]) / n + penalty
            xy = self._xy[layer] - torch.outer(x[layer], x[-1]) / n
            xe = self._xe[layer] - torch.outer(x[layer], e) / n
            weight, failed = torch.linalg.solve_ex(xx, torch.cat([xy, xe], 1))
            if int(failed):
                raise ValueError(
                    f"there is no one affine map from layer {layer - 1 if layer else 'embed'}: its residual streams "
                    f"span fewer dimensions than it has; give an alpha above {alpha}, or more text"
                )
            outputs.append(weight[:, : x.shape[1]])
            inputs.append(weight[:, x.shape[1] :])
        to_output, to_input = torch.stack(outputs), torch.stack(inputs)
        x_mean, e_mean = self._shift[0][:, 0] + x / n, self._shift[1] + e / n
        return AffineMaps(
            output_weight=to_output.float(),
            output_bias=(x_mean[-1] - torch.einsum("ld,lde->le", x_mean, to_output)).float(),
            input_weight=to_input.float(),
            input_bias=(e_mean - torch.einsum("ld,lde->le", x_mean, to_input)).float(),
            weight_hash=weight_hash(model),
            condition="full" if subnetwork is None else subnetwork.lineage,
            tokens=n,
            alpha=alpha,
        )


def fit_affine_lens(
    model: Any,
    tokens: Any,
    subnetwork: Subnetwork | None = None,
    *,
    alpha: float = 1.0,
    max_tokens: int = 1 << 17,
    seed: int = 0,
) -> dict[str, AffineMaps]:
    """Fit both affine maps of every layer, for the full model and, where given, a subnetwork and its controls.

    Args:
        model: From `load_model`.
        tokens: Token ids [sequence, position] to fit on, or a `Corpus` (its training part).
        subnetwork: Fit also on its residual streams, its complement's and a matched random one's.
        alpha: Ridge penalty, at least 0.
        max_tokens: Use at most so many tokens, evenly spread over the text.
        seed: Of the matched random subnetwork.

    Returns:
        The maps by condition: `full`, `subnetwork`, `complement`, `random`.

    Raises:
        ValueError: If there is no text, alpha is below 0, or without a penalty there is no one map.
    """
    check_model(model)
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is a penalty of at least 0, not {alpha}")
    some = spread(token_array(tokens.train if isinstance(tokens, Corpus) else tokens), max_tokens)
    named = conditions(subnetwork, seed=seed)
    fitters = {name: AffineFitter(model) for name in named}
    observe(model, some, named, lambda name: [fitters[name]], what="fitting affine maps")
    return {name: fitter.freeze(model, named[name], float(alpha)) for name, fitter in fitters.items()}


def spread(
    tokens: Integer[np.ndarray, "sequence position"], max_tokens: int
) -> Integer[np.ndarray, "some_sequence position"]:
    """At most `max_tokens` tokens of a text: whole sequences, evenly spread over it."""
    if max_tokens < 1:
        raise ValueError(f"at least 1 token must be used, not {max_tokens}")
    wanted = min(len(tokens), max(1, max_tokens // tokens.shape[1]))
    return tokens[np.linspace(0, len(tokens) - 1, wanted).round().astype(int)]


def refine_affine_lens(
    model: Any,
    maps: AffineMaps,
    tokens: Any,
    subnetwork: Subnetwork | None = None,
    *,
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> AffineMaps:
    """Train the maps to the output further, on the KL from the model's output to the lens (Belrose et al. 2023).

    Adam on all layers at once, its learning rate going to 0 linearly. The maps to the input stay.

    Args:
        model: From `load_model`.
        maps: From `fit_affine_lens`, for the same condition.
        tokens: Token ids [sequence, position] to train on, or a `Corpus` (its training part).
        subnetwork: The condition: what the model is reduced to; None for the full model.
        steps: Of Adam.
        batch_size: Sequences in a step.
        learning_rate: At the start.
        seed: Of the data order.

    Raises:
        ValueError: If the maps were not fitted on this model, or a number is below what it can be.
    """
    check_model(model)
    check_subnetwork(subnetwork)
    check_seed(seed)
    if steps < 0 or batch_size < 1 or not learning_rate > 0:
        raise ValueError(
            f"refining needs steps of 0 or more, a batch_size of at least 1 and a learning_rate above 0, not {steps}, "
            f"{batch_size} and {learning_rate}"
        )
    check_maps(model, {"": maps}, {"": None})
    text = token_array(tokens.train if isinstance(tokens, Corpus) else tokens)
    check_tokens(model, text)
    device = model.cfg.device
    weight = maps.output_weight.detach().clone().to(device).requires_grad_()
    bias = maps.output_bias.detach().clone().to(device).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    with reduced_to(model, subnetwork):
        for step in trange(steps, desc="refining the lens", delay=2, leave=False):
            batch = batch_of(text, batch_size, step=step, seed=seed).to(device)
            with torch.no_grad():
                streams, logits = residual_streams(model, batch)
                output = Reference.of(logits.flatten(0, 1))
            optimizer.zero_grad(set_to_none=True)
            for layer, residual in enumerate(streams.flatten(1, 2)):  # one layer's graph at a time
                wide = readout(model, _affine(residual, weight[layer], bias[layer]).to(residual)).float()
                loss = (wide.logsumexp(-1) - torch.linalg.vecdot(output.probs, wide)).mean()
                gradients = torch.autograd.grad(loss, [weight, bias])
                for parameter, gradient in zip((weight, bias), gradients, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / steps)
            optimizer.step()
    return replace(maps, output_weight=weight.detach(), output_bias=bias.detach())


def affine_lens(
    model: Any,
    text: Any,
    subnetwork: Subnetwork | None = None,
    *,
    target: Any = None,
    maps: Mapping[str, AffineMaps] | None = None,
    alpha: float = 1.0,
    refine_steps: int = 0,
    seed: int = 0,
) -> Curves:
    """The affine lens over a corpus: what each layer predicts once it is mapped, and what it keeps of its input.

    Args:
        model: From `load_model`.
        text: A `Corpus`: maps are fitted on its training part and measured on its held-out part. Or token ids
            [sequence, position]: fitted on the first three quarters of the sequences, measured on the rest.
        subnetwork: Measure it, its complement and a matched random one beside the full model, each with its own maps.
        target: Also the r of the lens with this target's surprisals by layer.
        maps: Maps that were fitted before; then nothing is fitted, and token ids are all measured.
        alpha: Ridge penalty of the maps.
        refine_steps: Steps of KL training after the ridge fit.
        seed: Of the matched random subnetwork.

    Returns:
        `Curves` [quantity, condition, layer] with 95% intervals: `LENS_QUANTITIES`, and `recall_at_1`, `_5`, `_10`,
        the share of positions whose current token is among the k nearest to the map to the input, by dot product with
        the embedding.

    Raises:
        ValueError: If there is too little text, or maps are not the model's.
    """
    _check_readout(model)
    named = conditions(subnetwork, seed=seed)
    if target is not None:
        check_target(target, model.cfg.d_vocab)
    if refine_steps < 0:
        raise ValueError(f"refine_steps must be 0 or more, not {refine_steps}")
    fit_on, held_out = _two_parts(text, split=maps is None)
    if maps is None:
        maps = fit_affine_lens(model, fit_on, subnetwork, alpha=alpha, seed=seed)
        if refine_steps:
            maps = {
                name: refine_affine_lens(model, maps[name], fit_on, one, steps=refine_steps)
                for name, one in named.items()
            }
    check_maps(model, maps, named)
    fitted = maps
    lenses = {name: LensSums(model, target, fitted[name]) for name in named}
    recalls = {name: RecallSums(model, fitted[name]) for name in named}
    observe(model, held_out, named, lambda name: [lenses[name], recalls[name]], what="affine lens")
    notes = {"fitted_on": fitted["full"].tokens, "tokens": int(held_out.size), "alpha": alpha, "random_seed": seed}
    return affine_curves(model, lenses, recalls, notes | {"refine_steps": refine_steps})


def affine_curves(
    model: Any, lenses: Mapping[str, LensSums], recalls: Mapping[str, RecallSums], notes: Mapping[str, Any]
) -> Curves:
    """The curves of what `LensSums` and `RecallSums` added up, by condition."""
    rows = {name: np.concatenate([lenses[name].rows(), recalls[name].rows()], -1) for name in lenses}
    width = len(_RECALLS) + 1

    def statistics(sums: Float[np.ndarray, "... layer column"]) -> Float[np.ndarray, "... quantity layer"]:
        recall = np.moveaxis(sums[..., -width:-1] / sums[..., -1:], -1, -2)
        return np.concatenate([_lens_statistics(sums[..., :-width]), recall], axis=-2)

    found = tuple(
        Quantity(f"recall_at_{k}", "share", f"positions whose current token is among the {k} nearest to the map")
        for k in _RECALLS
    )
    return curves_from_sums(
        "Affine lens", LENS_QUANTITIES + found, "layer", layer_names(model), rows, statistics, notes
    )


class RecallSums:
    """Counts, for every sequence and layer, how often the map to the input finds the current token; an observer."""

    def __init__(self, model: Any, maps: AffineMaps) -> None:
        self._maps, self._embedding = maps, model.W_E.detach().float()
        self._rows: list[Float[np.ndarray, "sequence layer column"]] = []

    def rows(self) -> Float[np.ndarray, "sequence layer column"]:
        """Counts of every sequence: found within 1, 5 and 10, and positions."""
        return np.concatenate(self._rows)

    def add(self, batch: Batch) -> None:
        """Take in a batch."""
        current = batch.tokens.flatten()
        size = max(_ROWS_AT_ONCE, _LOGITS_AT_ONCE // len(self._embedding))
        layers = []
        for layer, residual in enumerate(batch.residual.flatten(1, 2)):
            ranks = []
            for at in range(0, len(current), size):
                scores = self._maps.to_input(residual[at : at + size], layer) @ self._embedding.T
                ranks.append((scores > scores.gather(1, current[at : at + size, None])).sum(-1))
            rank = torch.cat(ranks).view(batch.tokens.shape)
            counts = [(rank < k).sum(1) for k in _RECALLS]
            layers.append(torch.stack([*counts, torch.full_like(counts[0], rank.shape[1])], 1))
        self._rows.append(torch.stack(layers, 1).double().cpu().numpy())


def _two_parts(
    text: Any, *, split: bool
) -> tuple[Integer[np.ndarray, "a position"], Integer[np.ndarray, "b position"]]:
    """What to fit on, and what to measure on."""
    if isinstance(text, Corpus):
        return (token_array(text.train) if split else text.train), token_array(text)
    tokens = token_array(text)
    if not split:
        return tokens, tokens
    if len(tokens) < 4:
        raise ValueError(f"an affine lens needs at least 4 sequences, to fit on and to measure on, not {len(tokens)}")
    cut = 3 * len(tokens) // 4
    return tokens[:cut], tokens[cut:]


def check_maps(model: Any, maps: Mapping[str, AffineMaps] | None, named: Conditions) -> None:
    """Raise ValueError unless there are maps for every condition, fitted on this model and on that condition."""
    if maps is None:
        return
    if not isinstance(maps, Mapping):
        raise ValueError(
            f"maps must be affine maps by condition, as fit_affine_lens gives, not a {type(maps).__name__}"
        )
    for name, subnetwork in named.items():
        if name not in maps:
            raise ValueError(f"there are no affine maps for {name!r}: there are {', '.join(maps)}")
        if subnetwork is not None and maps[name].condition != subnetwork.lineage:
            raise ValueError(
                f"the affine maps for {name!r} were fitted on {maps[name].condition!r}, not on {subnetwork.lineage!r}"
            )
        if maps[name].weight_hash != (found := weight_hash(model)):
            raise ValueError(
                f"the affine maps were fitted on a model with weight hash {maps[name].weight_hash}, "
                f"but this one has weight hash {found}"
            )
