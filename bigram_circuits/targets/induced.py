"""The bigram distribution that a model itself induces."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.models.activations import check_tokens, n_outputs, predicts_tokens
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import in_use
from bigram_circuits.models.weights import full_weights
from bigram_circuits.progress import steps
from bigram_circuits.targets.base import Target, TargetKind
from bigram_circuits.text.corpus import in_order, token_array

_LOGITS_AT_ONCE = 1 << 20  # logits are copied in chunks of 4 MiB
_TOKENS_AT_ONCE = 1 << 11  # tokens per forward pass when fitting


class InducedTarget(Target):
    """A model's induced bigram: its prediction given the current token, averaged over contexts.

    P(next | current) is the mean of softmax(logits) over all positions of a text whose token is `current`; a token
    that is not in the text (or not among the `max_contexts` most frequent) gets the mean over all positions. Comparing
    it with the text's bigram table separates the model's statistics from those of the corpus.

    The table is made once: it does not follow later changes of the model's weights.

    Example:
        >>> induced = bc.InducedTarget(model, text)
        >>> bc.evaluate(model, found, induced, text, controls=False)
    """

    d_vocab: int
    context_length = 1

    def __init__(
        self, model: Model, tokens: Integer[np.ndarray, "sequence position"], *, max_contexts: int | None = None
    ) -> None:
        """Run the full model once over `tokens`, usually `corpus.train`.

        Raises:
            ValueError: If `tokens` is empty or not token ids that the model can read, or the table of contexts x
                vocabulary would take more than 2 GB.
        """
        if tokens.size == 0:
            raise ValueError("an induced bigram needs text: there are no tokens")
        tokens = token_array(tokens)
        check_tokens(model, tokens)
        with in_use(model, "InducedTarget"):
            self._make(model, tokens, max_contexts)

    def _make(self, model: Model, tokens: Integer[np.ndarray, "sequence position"], max_contexts: int | None) -> None:
        self.d_vocab = n_outputs(model)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.over_tokens = predicts_tokens(model)
        n_tokens = model.cfg.d_vocab
        counts = np.bincount(np.asarray(tokens).ravel(), minlength=n_tokens)
        contexts = np.argsort(-counts, kind="stable")[: min(int((counts > 0).sum()), max_contexts or n_tokens)]
        size = 4 * len(contexts) * self.d_vocab
        if size > 2e9:
            raise ValueError(
                f"the induced bigram of {len(contexts)} contexts over {self.d_vocab} tokens takes {size / 1e9:.1f} GB, "
                f"more than 2: give max_contexts={int(2e9 / 4 / self.d_vocab)} or fewer"
            )
        device = model.cfg.device
        self._row = torch.full((n_tokens,), len(contexts), dtype=torch.long, device=device)
        self._row[torch.from_numpy(contexts).to(device)] = torch.arange(len(contexts), device=device)
        self._probs = self._fit(model, np.asarray(tokens), len(contexts))
        self.fingerprint = f"induced {weight_hash(model)} {len(contexts)} {int(counts.sum())}"

    def _fit(
        self, model: Model, tokens: Integer[np.ndarray, "sequence position"], n: int
    ) -> Float[Tensor, "row d_vocab"]:
        """Average the model's predictions by row; the last row is the mean over all positions."""
        totals = torch.zeros(n + 1, self.d_vocab, dtype=torch.float32, device=self._row.device)
        counts = torch.zeros(n + 1, dtype=torch.float32, device=self._row.device)
        batch_size = max(1, _TOKENS_AT_ONCE // tokens.shape[1])
        n_batches = math.ceil(len(tokens) / batch_size)
        batches = steps(in_order(tokens, batch_size), n_batches, desc="averaging predictions", unit="batch")
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
        """Return log P(next | current), dense: for inspection."""
        return self._probs[self._row[tokens.long()]].log()

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """Return CE(induced bigram, softmax(logits)) in nats."""
        rows, flat = self._row[tokens.flatten().long()], logits.flatten(0, 1)
        pieces = zip(*(x.split(max(1, _LOGITS_AT_ONCE // self.d_vocab)) for x in (rows, flat)), strict=True)
        losses = [part.float().logsumexp(-1) - (self._probs[row] * part.float()).sum(-1) for row, part in pieces]
        return torch.cat(losses).view(tokens.shape)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """Return -log P(actual next token) in nats; inf if the model's outputs are no tokens."""
        if not self.over_tokens:
            return torch.full(tokens[:, 1:].shape, torch.inf, dtype=torch.float32, device=tokens.device)
        return -self._probs[self._row[tokens[:, :-1].long()], tokens[:, 1:].long()].log()

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """Return the entropy of the induced bigram in nats."""
        return torch.special.entr(self._probs).sum(-1)[self._row[tokens.long()]]

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"]:
        """Return the most likely next tokens."""
        return self._probs.argmax(-1)[self._row[tokens.long()]]


TARGET = TargetKind(
    make=lambda model, corpus, order: InducedTarget(model, corpus.train),
    label=lambda order: "induced bigram",
    meaning=lambda order: "the bigram that the model itself induces",
    kind="InducedTarget",
    does=lambda order: "predict the next token as the whole model does, from the current one alone",
    like=lambda order: "those of the whole model at the current token, whatever precedes it",
)
