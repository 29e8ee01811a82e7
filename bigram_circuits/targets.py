"""What a subnetwork is asked to reproduce: the protocol that every target follows, and targets made from a model.

An `NGramTable` is a target. So is any object with `cross_entropy` and `surprisal`; KL and top-1 agreement are reported
for targets that also have `entropy` and `top1`. A target may speak about some positions only: `cross_entropy` gives
[batch, n] for the n positions it has an opinion on, and `entropy` and `top1` are then about the same positions, which
`positions` names (all, if there is no such attribute).
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor
from tqdm.auto import tqdm

from bigram_circuits.corpus import in_order
from bigram_circuits.sites import full_weights, weight_hash

_LOGITS_AT_ONCE = 1 << 20  # copies of logits are made in pieces of 4 MiB
_TOKENS_AT_ONCE = 1 << 11  # in one forward pass when fitting


@runtime_checkable
class Target(Protocol):
    """A distribution over the next token, at every position or at some."""

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch n"]:
        """CE from the target's distribution to softmax(logits), nats; differentiable in `logits`."""
        ...

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """-log P(actual next token), nats; inf where that probability is 0 or the target has no opinion."""
        ...


class NextTokenTarget:
    """The actual next token: all probability on it. The CE is a language model's own loss.

    Its surprisal is 0 everywhere, so a correlation with it is undefined. It says nothing about the last position.
    """

    positions = slice(0, -1)
    fingerprint = "next token"

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos_minus_1"]:
        """-log softmax(logits) of the actual next token."""
        following = tokens[:, 1:].to(logits.device, torch.long)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), following.flatten(), reduction="none"
        )
        return loss.view(following.shape)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """0: the actual next token has probability 1."""
        return torch.zeros(tokens[:, 1:].shape, device=tokens.device)

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """0."""
        return self.surprisal(tokens)

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos_minus_1"]:
        """The actual next token."""
        return tokens[:, 1:].long()


class ModelTarget:
    """A model's own distribution over the next token: what optimal pruning asks for.

    The model may be the one that is being masked: for the target it runs on all its weights.
    """

    def __init__(self, model: Any) -> None:
        """Take a model from `load_model`."""
        self.model = model
        self.d_vocab = model.cfg.d_vocab
        self.fingerprint = f"model {weight_hash(model)}"
        self._last: tuple[Tensor, Tensor] | None = None

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """log softmax of the full model's logits; that of the last batch is remembered."""  # noqa: D403
        if self._last is None or not torch.equal(self._last[0], tokens):
            with torch.inference_mode(False), torch.no_grad(), full_weights(self.model):
                log_probs = self.model(tokens.clone()).float().log_softmax(-1)
            self._last = (tokens, log_probs)
        return self._last[1]

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """CE from the full model's distribution to softmax(logits)."""
        return -(self.log_probs(tokens).exp() * logits.float().log_softmax(-1)).sum(-1)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """The full model's surprisal of the actual next token."""
        following = tokens[:, 1:, None].long()
        return -self.log_probs(tokens)[:, :-1].gather(2, following).squeeze(2)

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """Entropy of the full model's distribution."""
        log_probs = self.log_probs(tokens)
        return -(log_probs.exp() * log_probs).sum(-1)

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"]:
        """The full model's most likely token."""
        return self.log_probs(tokens).argmax(-1)


class InducedTarget:
    """A model's own induced bigram: its mean prediction given the current token, over contexts.

    P(next | current) is the mean of softmax(logits) over all positions of a text whose token is `current`; a token
    that is not in the text (or not among the `max_contexts` most frequent) gets the mean over all positions. Against
    the bigram table of the text it tells the model's statistics from the corpus's.
    """

    def __init__(
        self, model: Any, tokens: Integer[np.ndarray, "sequence position"], *, max_contexts: int | None = None
    ) -> None:
        """Run the full model once over `tokens`, usually `corpus.train`.

        Raises:
            ValueError: If there is no text, or the table of contexts x vocabulary would take more than 2 GB.
        """
        if tokens.size == 0:
            raise ValueError("an induced bigram needs text: there are no tokens")
        self.d_vocab = model.cfg.d_vocab
        counts = np.bincount(np.asarray(tokens).ravel(), minlength=self.d_vocab)
        contexts = np.argsort(-counts, kind="stable")[: min(int((counts > 0).sum()), max_contexts or self.d_vocab)]
        size = 4 * len(contexts) * self.d_vocab
        if size > 2e9:
            raise ValueError(
                f"the induced bigram of {len(contexts)} contexts over {self.d_vocab} tokens takes {size / 1e9:.1f} GB, "
                f"more than 2: give max_contexts={int(2e9 / 4 / self.d_vocab)} or fewer"
            )
        device = model.cfg.device
        self._row = torch.full((self.d_vocab,), len(contexts), device=device)
        self._row[torch.from_numpy(contexts).to(device)] = torch.arange(len(contexts), device=device)
        self._probs = self._fit(model, np.asarray(tokens), len(contexts))
        self.fingerprint = f"induced {weight_hash(model)} {len(contexts)} {int(counts.sum())}"

    def _fit(
        self, model: Any, tokens: Integer[np.ndarray, "sequence position"], n: int
    ) -> Float[Tensor, "row d_vocab"]:
        """Mean predictions by row; the last row is the mean over all positions."""
        totals = torch.zeros(n + 1, self.d_vocab, device=self._row.device)
        counts = torch.zeros(n + 1, device=self._row.device)
        batch_size = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
        batches = tqdm(in_order(tokens, batch_size), total=math.ceil(len(tokens) / batch_size), delay=2, leave=False)
        batches.set_description("averaging predictions", refresh=False)
        with torch.no_grad(), full_weights(model):
            for batch in batches:
                row = self._row[batch.to(self._row.device)].flatten()
                probs = model(batch.to(self._row.device)).float().softmax(-1).flatten(0, 1)
                totals.index_add_(0, row, probs)
                counts.index_add_(0, row, torch.ones_like(row, dtype=torch.float32))
        totals[-1] = totals.sum(0)
        counts[-1] = counts.sum()
        return totals / counts[:, None]

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """log P(next | current), dense: for looking at."""  # noqa: D403
        return self._probs[self._row[tokens.long()]].log()

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """CE from the induced bigram to softmax(logits)."""
        rows, flat = self._row[tokens.flatten().long()], logits.flatten(0, 1)
        pieces = zip(*(x.split(max(1, _LOGITS_AT_ONCE // self.d_vocab)) for x in (rows, flat)), strict=True)
        losses = [part.float().logsumexp(-1) - (self._probs[row] * part.float()).sum(-1) for row, part in pieces]
        return torch.cat(losses).view(tokens.shape)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """-log P(actual next token)."""
        return -self._probs[self._row[tokens[:, :-1].long()], tokens[:, 1:].long()].log()

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """Entropy of the induced bigram."""
        return torch.special.entr(self._probs).sum(-1)[self._row[tokens.long()]]

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"]:
        """Its most likely next token."""
        return self._probs.argmax(-1)[self._row[tokens.long()]]


def check_target(target: Any, d_vocab: int) -> None:
    """Raise ValueError unless `target` follows the protocol and, where it has a vocabulary, has the model's."""
    if not isinstance(target, Target):
        raise ValueError(f"a target needs the methods cross_entropy and surprisal; {type(target).__name__} lacks one")
    theirs = getattr(target, "d_vocab", d_vocab)
    if theirs != d_vocab:
        raise ValueError(
            f"the target was counted over a vocabulary of {theirs}, but the model's is {d_vocab}: "
            f"count it again with d_vocab={d_vocab}"
        )


def entropy(target: Any, tokens: Integer[Tensor, "batch pos"], n: int) -> Float[Tensor, "batch n"]:
    """The target's entropy at the n positions it speaks about, nats; nan if the target cannot tell."""
    if hasattr(target, "entropy"):
        return target.entropy(tokens)
    return torch.full((len(tokens), n), torch.nan, device=tokens.device)


def top1_agreement(
    target: Any, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"], n: int
) -> Float[Tensor, "batch n"]:
    """1 where logits and target have the same most likely token, at the n positions; nan if the target cannot tell."""
    if not hasattr(target, "top1"):
        return torch.full((len(tokens), n), torch.nan, device=tokens.device)
    ours = logits.argmax(-1)[:, getattr(target, "positions", slice(None))]
    return (ours == target.top1(tokens)).float()


def describe(target: Any) -> dict[str, Any]:
    """What tells this target from another, as JSON values: its kind, and its fingerprint if it has one."""
    return {"kind": type(target).__name__, "fingerprint": getattr(target, "fingerprint", None)}
