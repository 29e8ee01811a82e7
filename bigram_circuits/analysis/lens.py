"""Lenses: what the residual stream after each block would predict, for the full model and a subnetwork.

The *logit lens* (nostalgebraist 2020) reads the residual stream of every layer through the model's own final norm and
unembedding. The *affine* or *tuned lens* (Belrose et al. 2023, arXiv 2303.08112) maps it first (see `affine`).

Over a corpus, one row of sums per sequence and layer is kept; intervals are bootstrapped from these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.affine import (
    RECALLS,
    AffineMaps,
    RecallSums,
    check_maps,
    fit_affine_lens,
    refine_affine_lens,
)
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
from bigram_circuits.analysis.prompts import is_prompt, position_names, prompt_tokens, token_words
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.masking.apply import MaskLike
from bigram_circuits.measures import statistics
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Maps, curves_from_sums
from bigram_circuits.models.activations import (
    NotShownError,
    check_predicts_tokens,
    check_tokens,
    lens_log_probs,
    readout,
    residual_streams,
    rows_at_once,
)
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, uses_model
from bigram_circuits.text.corpus import Corpus, token_array

_LOGITS_IN_CACHE = 1 << 18  # read repeatedly, so they should fit a cache: 1 MiB
_TOP_K = 5  # number of most likely tokens named
_PAIRS = 6  # columns of statistics.correlation_sums

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
    Quantity("probability", "share", "probability of the lens's most likely token"),
    Quantity("next_rank", "", "rank of the actual next token; the most likely token has rank 0"),
    Quantity("next_probability", "share", "probability of the actual next token"),
    Quantity("entropy", "nats", "entropy of the lens's distribution"),
    Quantity("kl", "nats", "KL from the model's output, under the same condition, to the lens"),
)


# --- the logit lens ---


@usual_order
@uses_model
def logit_lens(
    model: Model,
    subnetwork: MaskLike | None = None,
    target: Any = None,
    text: Any = None,
    *,
    maps: Mapping[str, AffineMaps] | None = None,
    top_k: int = _TOP_K,
    seed: int = 0,
) -> Maps | Curves:
    """The logit lens on a prompt, or its means over a corpus.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        target: For a corpus: also r of the lens with this target's surprisals by layer, for example an `NGramTable`.
        text: A prompt (`str`, or token ids [position]), for every layer and position. Or a `Corpus` (its held-out part)
            or token ids [sequence, position], for means by layer.
        maps: Affine maps by condition, from `fit_affine_lens`: the tuned lens instead of the logit lens.
        top_k: For a prompt: number of most likely tokens listed in the text of each cell, one per line.
        seed: Seed of the matched random subnetwork.

    Returns:
        For a prompt, `Maps` [quantity, condition, layer, position] with the most likely tokens as text
        (`PROMPT_QUANTITIES`; those of the actual next token are nan at the last position). For a corpus, `Curves`
        [quantity, condition, layer] with 95% intervals (`LENS_QUANTITIES`; r with the target is nan without a target).

    Raises:
        ValueError: If the text is empty or of another shape, the maps are not the model's, or the model's logits are
            not its final norm and unembedding applied to the last residual stream.

    Example:
        >>> bc.logit_lens(model, found, text="import os").plot()  # the most likely tokens, by layer and position
        >>> bc.logit_lens(model, found, target, text).plot("surprisal_correlation")  # means over a text, by layer
    """
    check_readout(model)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    subnetwork, target = check_arguments(model, subnetwork, target=target, seed=seed)
    named = conditions(subnetwork, seed=seed)
    check_maps(model, maps, named)
    if is_prompt(text):
        return _prompt_lens(model, prompt_tokens(model, text), named, maps, top_k)
    tokens = checked_text(model, text)
    watching = {name: LensSums(model, target, None if maps is None else maps[name]) for name in named}
    observe(model, tokens, named, lambda name: [watching[name]], what="logit lens")
    title = "Logit lens" if maps is None else "Affine lens"
    return lens_curves(title, model, watching, {"tokens": int(tokens.size), "random_seed": seed})


def lens_curves(title: str, model: Model, sums: Mapping[str, LensSums], notes: Mapping[str, Any]) -> Curves:
    """The curves of the sums that `LensSums` accumulated, by condition."""
    rows = {name: one.rows() for name, one in sums.items()}
    return curves_from_sums(title, LENS_QUANTITIES, "layer", layer_names(model), rows, _lens_statistics, notes)


def _lens_statistics(sums: Float[np.ndarray, "... layer column"]) -> Float[np.ndarray, "... quantity layer"]:
    with_target, with_output = sums[..., :_PAIRS], sums[..., _PAIRS : 2 * _PAIRS]
    count = with_output[..., :1]  # every output surprisal is finite
    means = sums[..., 2 * _PAIRS :] / count
    curves = [statistics.correlation(with_target), statistics.correlation(with_output), *np.moveaxis(means, -1, 0)]
    return np.stack(curves, axis=-2)


class LensSums:
    """An observer that accumulates the sums of the lens's statistics by sequence and layer."""

    def __init__(self, model: Model, target: Any = None, maps: AffineMaps | None = None) -> None:
        """Start from zero; with `maps`, the residual stream is mapped first."""
        check_predicts_tokens(model)
        self._model, self._target, self._maps = model, target, maps
        self._rows: list[Float[np.ndarray, "sequence layer column"]] = []

    def rows(self) -> Float[np.ndarray, "sequence layer column"]:
        """Sums by sequence: six for r with the target, six for r with the output, then the readings."""
        return np.concatenate(self._rows)

    def add(self, batch: Batch) -> None:
        """Add a batch; all positions except the last of each sequence count, since they have a next token."""
        tokens, n_sequences = batch.tokens, len(batch.tokens)
        following = tokens[:, 1:].reshape(-1)
        own = statistics.surprisals(batch.logits, tokens).double()
        theirs = torch.full_like(own, torch.inf) if self._target is None else self._target.surprisal(tokens).to(own)
        residual = batch.residual[:, :, :-1].flatten(1, 2)
        logits = batch.logits[:, :-1].flatten(0, 1)
        size = rows_at_once(logits.shape[-1])
        readings = torch.cat(
            [self._read(residual[:, at : at + size], logits[at : at + size], following[at : at + size])
             for at in range(0, len(following), size)], dim=1,
        ).double()  # fmt: skip
        readings = readings.unflatten(1, (n_sequences, -1))  # [layer, sequence, position, reading]
        sums = [
            torch.cat([statistics.correlation_sums(layer[..., 0], y) for y in (theirs, own)] + [layer.sum(1)], 1)
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
    """The output distribution that a lens is compared with."""

    probs: Float[Tensor, "row d_vocab"]
    """softmax of the model's logits."""
    entropy: Float[Tensor, " row"]
    """Entropy of these, nats."""
    top: Integer[Tensor, " row"]
    """Most likely tokens."""

    @classmethod
    def of(cls, logits: Float[Tensor, "row d_vocab"]) -> Reference:
        """From logits, or log-probabilities."""
        wide = logits.float()
        probs = wide.softmax(-1)
        entropy = wide.logsumexp(-1) - torch.linalg.vecdot(probs, wide)
        return cls(probs, entropy, wide.argmax(-1))

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three fields as columns, for each row."""
        return self.probs, self.entropy, self.top


def readings(
    logits: Float[Tensor, "row d_vocab"], following: Integer[Tensor, " row"], reference: Reference
) -> tuple[Float[Tensor, " row"], ...]:
    """Surprisal of the next token, entropy, KL from the reference, agreement with it, and reciprocal rank, per row.

    KL(p || q) = lse(z) - <p, z> - H(p), where z are the logits of q, so no second distribution is stored.
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
    model: Model,
    tokens: Integer[Tensor, "one position"],
    named: Conditions,
    maps: Mapping[str, AffineMaps] | None,
    top_k: int,
) -> Maps:
    check_predicts_tokens(model)
    values, texts = [], []
    following = torch.cat([tokens[0, 1:], tokens[0, :1]])  # the last one is overwritten: it has no next token
    for name, subnetwork in named.items():
        lens = None if maps is None else maps[name].to_output
        with reduced_to(model, subnetwork), torch.no_grad():
            found = lens_log_probs(model, tokens, lens)
            output = Reference.of(model(tokens)[0])
        layers, words = [], []
        for log_probs in found[:, 0]:
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


def check_readout(model: Model) -> None:
    """Raise NotShownError unless final norm and unembedding of the last residual stream yield the logits."""
    check_model(model)
    tokens = torch.arange(min(4, model.cfg.d_vocab), device=model.cfg.device)[None]
    with torch.no_grad():
        streams, logits = residual_streams(model, tokens)
        ours = readout(model, streams[-1])
    worst, spread = (ours - logits).abs().max().item(), (logits - logits.mean(-1, keepdim=True)).abs().max().item()
    if not worst <= 0.1 * spread:
        raise NotShownError(
            f"a lens reads the residual stream through the final norm and the unembedding, but for this model the "
            f"result differs from its logits by up to {worst:.3g} (their spread is {spread:.3g})"
        )


# --- the affine lens ---


@usual_order
@uses_model
def affine_lens(
    model: Model,
    subnetwork: MaskLike | None = None,
    target: Any = None,
    text: Any = None,
    *,
    maps: Mapping[str, AffineMaps] | None = None,
    alpha: float = 1.0,
    refine_steps: int = 0,
    seed: int = 0,
) -> Curves:
    """The affine lens over a corpus: what each layer predicts after the map, and how much of its input it retains.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one, with own maps.
        target: If given, also r of the lens with this target's surprisals by layer.
        text: A `Corpus`: maps are fitted on its training part and measured on its held-out part. Or token ids
            [sequence, position]: maps are fitted on the first three quarters of the sequences, measured on the rest.
        maps: Maps fitted before; then none are fitted, and all token ids are measured on.
        alpha: Ridge penalty of the maps.
        refine_steps: Steps of KL training after the ridge fit.
        seed: Seed of the matched random subnetwork.

    Returns:
        `Curves` [quantity, condition, layer] with 95% intervals: `LENS_QUANTITIES`, and `recall_at_1`, `_5`, `_10`,
        the share of positions whose current token is among the k nearest to the predicted embedding, by dot product.

    Raises:
        ValueError: If there is too little text, or maps are not the model's.

    Example:
        >>> lens = bc.affine_lens(model, found, target, corpus.train[:12])
        >>> lens.plot("recall_at_1")  # is the current token still to be found?
    """
    check_readout(model)
    subnetwork, target = check_arguments(model, subnetwork, target=target, seed=seed)
    named = conditions(subnetwork, seed=seed)
    if refine_steps < 0:
        raise ValueError(f"refine_steps must be 0 or more, not {refine_steps}")
    fit_on, held_out = _two_parts(text, split=maps is None)
    check_tokens(model, held_out)
    check_maps(model, maps, named)
    fitted = maps
    if fitted is None:
        fitted = fit_affine_lens(model, subnetwork, fit_on, alpha=alpha, seed=seed)
        if refine_steps:
            fitted = {
                name: refine_affine_lens(model, fitted[name], one, fit_on, steps=refine_steps)
                for name, one in named.items()
            }
    lenses = {name: LensSums(model, target, fitted[name]) for name in named}
    recalls = {name: RecallSums(model, fitted[name]) for name in named}
    observe(model, held_out, named, lambda name: [lenses[name], recalls[name]], what="affine lens")
    notes = {"fitted_on": fitted["full"].tokens, "tokens": int(held_out.size), "alpha": alpha, "random_seed": seed}
    return affine_curves(model, lenses, recalls, notes | {"refine_steps": refine_steps})


def affine_curves(
    model: Model, lenses: Mapping[str, LensSums], recalls: Mapping[str, RecallSums], notes: Mapping[str, Any]
) -> Curves:
    """The curves of the sums that `LensSums` and `RecallSums` accumulated, by condition."""
    rows = {name: np.concatenate([lenses[name].rows(), recalls[name].rows()], -1) for name in lenses}
    width = len(RECALLS) + 1

    def statistics(sums: Float[np.ndarray, "... layer column"]) -> Float[np.ndarray, "... quantity layer"]:
        recall = np.moveaxis(sums[..., -width:-1] / sums[..., -1:], -1, -2)
        return np.concatenate([_lens_statistics(sums[..., :-width]), recall], axis=-2)

    found = tuple(
        Quantity(f"recall_at_{k}", "share", f"positions with the current token among the {k} nearest to the map")
        for k in RECALLS
    )
    return curves_from_sums(
        "Affine lens", LENS_QUANTITIES + found, "layer", layer_names(model), rows, statistics, notes
    )


def _two_parts(
    text: Any, *, split: bool
) -> tuple[Integer[np.ndarray, "a position"], Integer[np.ndarray, "b position"]]:
    """The sequences to fit on, and those to measure on."""
    if isinstance(text, Corpus):
        return (token_array(text.train) if split else text.train), token_array(text)
    tokens = token_array(text)
    if not split:
        return tokens, tokens
    if len(tokens) < 4:
        raise ValueError(f"an affine lens needs at least 4 sequences, to fit on and to measure on, not {len(tokens)}")
    cut = 3 * len(tokens) // 4
    return tokens[:cut], tokens[cut:]


# --- steps of `analyze` ---


@in_suite("prompt_lens")
def _(subject: Subject) -> Maps:
    check_readout(subject.model)
    return _prompt_lens(subject.model, subject.prompt_tokens, subject.conditions, None, _TOP_K)
