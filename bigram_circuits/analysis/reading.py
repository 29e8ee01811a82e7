"""Texts, token by token: how surprising each token is, and what was expected in its place or is expected next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.analysis.conditions import conditions, reduced_to
from bigram_circuits.analysis.prompts import prompt_tokens, token_word, token_words
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Maps
from bigram_circuits.models.activations import check_tokens
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import check_target
from bigram_circuits.text.corpus import spread, token_array

_SURPRISAL = (Quantity("surprisal", "nats", "Surprisal of the token; undefined for the first, and at probability 0."),)

_Words = tuple[tuple[str, ...], ...]


def passages(
    model: Any,
    text: Any,
    subnetwork: Subnetwork | None = None,
    *,
    target: Any = None,
    count: int = 4,
    length: int = 64,
    top_k: int = 3,
    seed: int = 0,
) -> Maps:
    """Surprisal of every token of some passages, and what was expected in its place, under each condition.

    Args:
        model: From `load_model`.
        text: A `Corpus` (its held-out part) or token ids [sequence, position].
        subnetwork: Measure it, its complement and a matched random one beside the full model.
        target: If it has `log_probs(tokens)`, as an `NGramTable` has, it is shown beside them as `target`.
        count: How many passages, spread over the text.
        length: Tokens of each, from the beginning of a sequence.
        top_k: How many of the most likely tokens to name.
        seed: Of the matched random subnetwork.

    Returns:
        `Maps` [surprisal, condition, passage, position]. The words of a cell are the token itself, then a line for each
        of the most likely ones with its probability.

    Raises:
        ValueError: If a number is below 1, or the text is not token ids of this model.
    """
    if min(count, length, top_k) < 1:
        raise ValueError(f"count, length and top_k must be at least 1, not {count}, {length} and {top_k}")
    array = token_array(text)
    check_tokens(model, array)
    if target is not None:
        check_target(target, model.cfg.d_vocab)
    chosen = spread(array, count * array.shape[1])[:, :length].astype(np.int64)
    tokens = torch.from_numpy(chosen).to(model.cfg.device)
    shown: dict[str, tuple[Float[np.ndarray, "passage pos"], _Words]] = {}
    with torch.no_grad():
        for name, kept in conditions(subnetwork, seed=seed).items():
            with reduced_to(model, kept):
                log_probs = model(tokens).float().log_softmax(-1)
            shown[name] = _shown(model, tokens, log_probs, top_k)
        if target is not None and hasattr(target, "log_probs"):
            shown["target"] = _shown(model, tokens, target.log_probs(tokens).float(), top_k)
    return Maps(
        title="Passages",
        quantities=_SURPRISAL,
        row_axis="passage",
        rows=tuple(map(str, range(len(chosen)))),
        column_axis="position",
        columns=tuple(map(str, range(chosen.shape[1]))),
        conditions=tuple(shown),
        values=np.stack([values for values, _ in shown.values()])[None],
        text=tuple(words for _, words in shown.values()),
        notes={"top_k": top_k, "random_seed": seed},
    )


def next_tokens(
    model: Any,
    prompts: Sequence[str],
    subnetwork: Subnetwork | None = None,
    *,
    target: Any = None,
    top_k: int = 4,
    seed: int = 0,
) -> Maps:
    """The most likely next tokens after each of some prompts, under each condition.

    Args:
        model: From `load_model`.
        prompts: Texts, for example single words.
        subnetwork: Measure it, its complement and a matched random one beside the full model.
        target: If it has `log_probs(tokens)`, as an `NGramTable` has, it is shown beside them as `target`.
        top_k: How many tokens to name.
        seed: Of the matched random subnetwork.

    Returns:
        `Maps` [probability, condition, prompt, rank]; the words of a cell are the token.

    Raises:
        ValueError: If there is no prompt, one has no tokens, or `top_k` is not from 1 to the size of the vocabulary.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts should be a list of texts, not {prompts!r}")
    if not 1 <= top_k <= model.cfg.d_vocab:
        raise ValueError(f"top_k must be from 1 to {model.cfg.d_vocab}, not {top_k}")
    if target is not None:
        check_target(target, model.cfg.d_vocab)
    rows = [prompt_tokens(model, prompt) for prompt in prompts]
    found: dict[str, Float[Tensor, "prompt d_vocab"]] = {}
    with torch.no_grad():
        for name, kept in conditions(subnetwork, seed=seed).items():
            with reduced_to(model, kept):
                found[name] = torch.stack([model(row)[0, -1].float().log_softmax(-1) for row in rows])
        if target is not None and hasattr(target, "log_probs"):
            found["target"] = torch.stack([target.log_probs(row)[0, -1].float() for row in rows])
    tops = {name: log_probs.topk(top_k) for name, log_probs in found.items()}
    return Maps(
        title="Most likely next tokens",
        quantities=(Quantity("probability", "share", "Probability of the next token."),),
        row_axis="prompt",
        rows=tuple(prompts),
        column_axis="rank",
        columns=tuple(str(rank) for rank in range(1, top_k + 1)),
        conditions=tuple(tops),
        values=np.stack([top.values.exp().double().cpu().numpy() for top in tops.values()])[None],
        text=tuple(tuple(tuple(token_words(model, ids)) for ids in top.indices.tolist()) for top in tops.values()),
        notes={"random_seed": seed},
    )


def _shown(
    model: Any, tokens: Integer[Tensor, "passage pos"], log_probs: Float[Tensor, "passage pos d_vocab"], top_k: int
) -> tuple[Float[np.ndarray, "passage pos"], _Words]:
    """Surprisals, and the words of every cell; what is expected at a position is predicted at the one before."""
    surprisal = -log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].double()
    surprisal = torch.where(surprisal.isfinite(), surprisal, torch.nan)
    first = torch.full((len(tokens), 1), torch.nan, dtype=surprisal.dtype, device=surprisal.device)
    top = log_probs[:, :-1].topk(min(top_k, log_probs.shape[-1]))
    rows = []
    for ids, expected, probs in zip(tokens.tolist(), top.indices.tolist(), top.values.exp().tolist(), strict=True):
        cells = [token_word(model, ids[0])]
        for word, candidates, shares in zip(token_words(model, ids[1:]), expected, probs, strict=True):
            lines = [
                f"{one} {100 * share:.0f}%"
                for one, share in zip(token_words(model, candidates), shares, strict=True)
                if share > 0
            ]
            cells.append("\n".join([word, *lines]))
        rows.append(tuple(cells))
    return torch.cat([first, surprisal], 1).cpu().numpy(), tuple(rows)


# --- what `analyze` shows of it ---


@in_suite("passages")
def _(subject: Subject) -> Maps:
    return passages(
        subject.model, subject.corpus.held_out, subject.subnetwork, target=subject.target, seed=subject.seed
    )
