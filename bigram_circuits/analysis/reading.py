"""Texts, token by token: the surprisal of each token and the most likely tokens in its place, and the tokens after
which the target is reproduced best and worst.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from bigram_circuits.analysis.prompts import prompt_tokens, token_word, token_words
from bigram_circuits.analysis.registry import Subject, in_suite
from bigram_circuits.masking.apply import MaskLike
from bigram_circuits.measures.conditions import own_of
from bigram_circuits.measures.quantities import COUNT, Quantity
from bigram_circuits.measures.results import Maps
from bigram_circuits.models.activations import NotShownError, check_predicts_tokens
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.targets.base import PlacedTarget, entropy, target_of
from bigram_circuits.text.corpus import spread

_PASSAGES, _LENGTH = 4, 64  # number of passages, and tokens in each
_MOST, _MIN_COUNT = 10, 20  # number of best and worst tokens, and the fewest occurrences of one
_TOP_K = 3  # number of most likely tokens named
_SURPRISAL = (Quantity("surprisal", "nats", "Surprisal of the token; undefined for the first, and at probability 0."),)

_BY_TOKEN = (
    Quantity("kl", "nats", "KL(target || model), mean over the positions where this is the current token."),
    COUNT,
)

_Words = tuple[tuple[str, ...], ...]


@usual_order
@uses_model
def passages(
    model: Model,
    subnetwork: MaskLike | None = None,
    target: Any = None,
    text: Any = None,
    *,
    count: int = _PASSAGES,
    length: int = _LENGTH,
    top_k: int = _TOP_K,
    seed: int = 0,
) -> Maps:
    """Surprisal of every token of some passages, and the most likely tokens in its place, under each condition.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        target: If it has `log_probs(tokens)`, as an `NGramTable` has, it is shown beside them as `target`.
        text: A `Corpus` (its held-out part) or token ids [sequence, position].
        count: Number of passages, spread over the text.
        length: Tokens in each, from the beginning of a sequence.
        top_k: Number of most likely tokens to list.
        seed: Seed of the matched random subnetwork.

    Returns:
        `Maps` [surprisal, condition, passage, position]. The text of a cell is the token itself, then a line for each
        of the most likely tokens with its probability.

    Raises:
        ValueError: If a number is below 1, or the text is not token ids of this model.

    Example:
        >>> analysis.passages(model, found, target, text, count=1, length=16).to_dataframe()
    """
    if min(count, length, top_k) < 1:
        raise ValueError(f"count, length and top_k must be at least 1, not {count}, {length} and {top_k}")
    subnetwork, target = check_arguments(model, subnetwork, target=target, seed=seed)
    array = checked_text(model, text)
    chosen = spread(array, count * array.shape[1])[:, :length]
    return _passages(model, chosen, conditions(subnetwork, seed=seed), target, top_k, seed)


def _passages(
    model: Model,
    chosen: Integer[np.ndarray, "passage position"],
    named: Conditions,
    target: Any,
    top_k: int,
    seed: int,
) -> Maps:
    """`passages` for chosen token ids."""
    check_predicts_tokens(model)
    tokens = torch.from_numpy(chosen.astype(np.int64)).to(model.cfg.device)
    shown: dict[str, tuple[Float[np.ndarray, "passage pos"], _Words]] = {}
    with torch.no_grad():
        for name, kept in named.items():
            with reduced_to(model, kept):
                log_probs = model(tokens).float().log_softmax(-1)
            shown[name] = _shown(model, tokens, log_probs, top_k)
        theirs = None if target is None else target.log_probs(tokens)
        if theirs is not None:
            shown["target"] = _shown(model, tokens, theirs.float(), top_k)
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


@usual_order
@uses_model
def next_tokens(
    model: Model,
    subnetwork: MaskLike | None = None,
    target: Any = None,
    prompts: Sequence[str] = (),
    *,
    top_k: int = 4,
    seed: int = 0,
) -> Maps:
    """The most likely next tokens after each of several prompts, under each condition.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        target: If it has `log_probs(tokens)`, as an `NGramTable` has, it is shown beside them as `target`.
        prompts: Texts, for example single words.
        top_k: Number of tokens to list.
        seed: Seed of the matched random subnetwork.

    Returns:
        `Maps` [probability, condition, prompt, rank]; the text of a cell is the token.

    Raises:
        ValueError: If there is no prompt, one has no tokens, or `top_k` is not from 1 to the size of the vocabulary.

    Example:
        >>> analysis.next_tokens(model, found, target, ["import", " self"], top_k=3).to_dataframe()
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts should be a list of texts, not {prompts!r}")
    check_predicts_tokens(model)
    if not 1 <= top_k <= model.cfg.d_vocab:
        raise ValueError(f"top_k must be from 1 to {model.cfg.d_vocab}, not {top_k}")
    subnetwork, target = check_arguments(model, subnetwork, target=target, seed=seed)
    rows = [prompt_tokens(model, prompt) for prompt in prompts]
    found: dict[str, Float[Tensor, "prompt d_vocab"]] = {}
    with torch.no_grad():
        for name, kept in conditions(subnetwork, seed=seed).items():
            with reduced_to(model, kept):
                found[name] = torch.stack([model(row)[0, -1].float().log_softmax(-1) for row in rows])
        theirs = [] if target is None else [target.log_probs(row) for row in rows]
        if theirs and not any(one is None for one in theirs):
            found["target"] = torch.stack([one[0, -1].float() for one in theirs])
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
    model: Model, tokens: Integer[Tensor, "passage pos"], log_probs: Float[Tensor, "passage pos d_vocab"], top_k: int
) -> tuple[Float[np.ndarray, "passage pos"], _Words]:
    """Surprisals, and the text of every cell; the tokens likely at a position are predicted at the one before."""
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


# --- by current token ---


@usual_order
@uses_model
def faithfulness_by_token(
    model: Model,
    subnetwork: MaskLike | None = None,
    target: Any = None,
    text: Any = None,
    *,
    most: int = _MOST,
    min_count: int = _MIN_COUNT,
    top_k: int = _TOP_K,
    seed: int = 0,
) -> Maps:
    """The tokens after which the target is reproduced best and worst, and the predictions after them.

    Tokens are ordered by KL(target || subnetwork), or KL(target || full model) if there is no subnetwork.

    Args:
        model: From `load_model`.
        subnetwork: If given, also measured: the subnetwork, its complement, and a matched random one.
        target: The target to be reproduced; it must have an entropy. If it has `log_probs(tokens)`, as an `NGramTable`
            has, its predictions are also shown, as `target`.
        text: A `Corpus` (its held-out part) or token ids [sequence, position].
        most: Maximum number of best tokens, and of worst tokens.
        min_count: Tokens with fewer occurrences in the text are left out.
        top_k: Number of most likely next tokens to list.
        seed: Seed of the matched random subnetwork.

    Returns:
        `Maps` [kl and count, condition, best or worst, rank]. The text of a cell is the token, then a line for each of
        the most likely next tokens with its probability, averaged over positions.

    Raises:
        ValueError: If a number is below 1, no token is frequent enough, the target has no entropy, or subnetwork,
            target and text do not fit the model.

    Example:
        >>> analysis.faithfulness_by_token(model, found, target, text, most=3, min_count=5).to_dataframe()
    """
    if min(most, min_count, top_k) < 1:
        raise ValueError(f"most, min_count and top_k must be at least 1, not {most}, {min_count} and {top_k}")
    subnetwork, _ = check_arguments(model, subnetwork, seed=seed)
    array = checked_text(model, text)
    target = target_of(target, model)  # None is not allowed here
    by_name = conditions(subnetwork, seed=seed)
    return _by_token(model, array, by_name, target, most=most, min_count=min_count, top_k=top_k, seed=seed)


def _by_token(
    model: Model,
    array: Integer[np.ndarray, "sequence position"],
    by_name: Conditions,
    target: Any,
    *,
    most: int,
    min_count: int,
    top_k: int,
    seed: int,
) -> Maps:
    """`faithfulness_by_token` on checked arguments."""
    if isinstance(target, PlacedTarget):
        raise NotShownError("the target is defined at some places of a sequence, not after every token")
    check_predicts_tokens(model)
    if target.entropy(torch.from_numpy(array[:1].astype(np.int64))) is None:
        raise NotShownError(f"KL needs the target's entropy, but {target.kind} has none")
    counts = np.bincount(_current(array, target).ravel(), minlength=model.cfg.d_vocab)
    frequent = np.flatnonzero(counts >= min_count)
    if len(frequent) == 0:
        raise NotShownError(f"no token occurs {min_count} times in these {array.size} tokens: give more text")

    first = own_of(by_name) or "full"
    ranked = _SumsByToken(model, target, frequent)
    observe(model, array, {first: by_name[first]}, lambda name: [ranked], what="ranking tokens")
    order = frequent[np.argsort(ranked.mean_kl(), kind="stable")]
    most = min(most, max(1, len(order) // 2))
    chosen = np.concatenate([order[:most], order[::-1][:most]])
    sums = {name: _SumsByToken(model, target, chosen, probabilities=True) for name in by_name}
    observe(model, array, by_name, lambda name: [sums[name]], what="tokens")
    shown = {name: (of.mean_kl(), of.words(top_k)) for name, of in sums.items()}
    if sums[first].of_target is not None:
        shown["target"] = (np.zeros(len(chosen)), sums[first].words(top_k, of_target=True))

    kl = np.stack([values for values, _ in shown.values()])
    both = np.stack([kl, np.broadcast_to(counts[chosen], kl.shape)])
    return Maps(
        title="Tokens after which the target is reproduced best and worst",
        quantities=_BY_TOKEN,
        row_axis="tokens",
        rows=("best", "worst"),
        column_axis="rank",
        columns=tuple(str(rank + 1) for rank in range(most)),
        conditions=tuple(shown),
        values=both.reshape(2, len(shown), 2, most),
        text=tuple((tuple(words[:most]), tuple(words[most:])) for _, words in shown.values()),
        notes={"tokens": int(array.size), "min_count": min_count, "frequent": len(frequent), "random_seed": seed},
    )


class _SumsByToken:
    """An observer that accumulates KL and probabilities by current token, for chosen tokens."""

    def __init__(
        self, model: Model, target: Any, chosen: Integer[np.ndarray, " token"], *, probabilities: bool = False
    ) -> None:
        d_vocab, device = model.cfg.d_vocab, model.cfg.device
        self.model, self.target, self.chosen = model, target, chosen
        self.row = torch.full((d_vocab,), len(chosen), device=device)  # the last row is for all other tokens
        self.row[torch.from_numpy(chosen).to(device)] = torch.arange(len(chosen), device=device)
        self.counts, self.kl = (torch.zeros(len(chosen) + 1, dtype=torch.float64) for _ in range(2))
        size = (len(chosen), d_vocab)
        self.of_model = torch.zeros(size, dtype=torch.float32, device=device) if probabilities else None
        self.of_target = torch.zeros(size, dtype=torch.float32, device=device) if probabilities else None

    def add(self, batch: Batch) -> None:
        """Add a batch."""
        current = _current(batch.tokens, self.target)
        cross_entropy = self.target.cross_entropy(batch.logits, batch.tokens)
        kl = cross_entropy - entropy(self.target, batch.tokens, cross_entropy.shape[1]).to(cross_entropy)
        rows = self.row[current.flatten()]
        self.kl.index_add_(0, rows.cpu(), kl.flatten().cpu().double())
        self.counts += torch.bincount(rows.cpu(), minlength=len(self.counts))
        if self.of_model is None:
            return
        wanted = (rows < len(self.chosen)).nonzero()[:, 0]
        positions = self.target.positions
        logits = batch.logits[:, positions].flatten(0, 1)[wanted]
        self.of_model.index_add_(0, rows[wanted], logits.float().softmax(-1))
        log_probs = None if self.of_target is None else self.target.log_probs(batch.tokens)
        if self.of_target is None or log_probs is None:
            self.of_target = None  # it has no log_probs
            return
        self.of_target.index_add_(0, rows[wanted], log_probs[:, positions].flatten(0, 1)[wanted].float().exp())

    def mean_kl(self) -> Float[np.ndarray, " token"]:
        """Mean KL by token."""
        return (self.kl / self.counts)[:-1].numpy()

    def words(self, top_k: int, *, of_target: bool = False) -> list[str]:
        """For each token: the token and its most likely next tokens."""
        sums = self.of_target if of_target else self.of_model
        assert sums is not None, "probabilities were not accumulated"
        mean: Float[Tensor, "token d_vocab"] = sums / self.counts[:-1, None].to(sums)
        top = mean.topk(min(top_k, mean.shape[1]))
        return [
            "\n".join([word, *(f"{one} {100 * share:.0f}%" for one, share in zip(following, shares, strict=True))])
            for word, following, shares in zip(
                token_words(self.model, self.chosen.tolist()),
                (token_words(self.model, ids) for ids in top.indices.tolist()),
                top.values.tolist(),
                strict=True,
            )
        ]


def _current(tokens: Any, target: Any) -> Any:
    """The tokens at the positions for which the target makes predictions."""
    return tokens[:, target.positions]


# --- steps of `analyze` ---


@in_suite("passages")
def _(subject: Subject) -> Maps:
    chosen = subject.sample(_PASSAGES * subject.corpus.held_out.shape[1])[:, :_LENGTH]
    return _passages(subject.model, chosen, subject.conditions, subject.target, _TOP_K, subject.seed)


_WORD_TOKENS = 1 << 13  # of held-out text


@in_suite("faithful_tokens")
def _(subject: Subject) -> Maps:
    return _by_token(
        subject.model, subject.sample(_WORD_TOKENS), subject.conditions, subject.target, most=_MOST,
        min_count=_MIN_COUNT, top_k=_TOP_K, seed=subject.seed,
    )  # fmt: skip
