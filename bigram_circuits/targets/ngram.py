"""n-gram probabilities as a target: of the training text, counted, or of a corpus in an index, looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.targets.base import Target, TargetKind
from bigram_circuits.text.counting import count_ngrams, level_of_counts
from bigram_circuits.text.indexes import Context, Followers, Index, full_path, open_index
from bigram_circuits.text.ngrams import Level, NGramTable

_CACHE_BYTES = 1 << 30
_ORDERS = {1: "unigram", 2: "bigram", 3: "trigram"}
_FROM = {1: "without looking at the text before it", 2: "from the current one", 3: "from the last two"}
_COUNTED = {
    1: "how often each token occurs", 2: "counts of which token follows which",
    3: "counts of which token follows which two",
}  # fmt: skip


def _order(order: int) -> str:
    return _ORDERS.get(order, f"{order}-gram")


class IndexTarget(Target):
    """P(next | previous `order - 1` tokens) over a corpus in an index, of any order, for any text.

    The same probabilities, with the same backoff, as an `NGramTable` counted on that corpus as one sequence; but only
    the rows of a batch's contexts are fetched, and kept for the next batches. The index is one of tokengrams or
    infini-gram, whose token ids must be those of the model's tokenizer: an index does not say which they are of.

    In a tokengrams index, documents follow each other without a break, so some n-grams span two of them. infini-gram
    ends each with a mark, which is never predicted.

    Example:
        >>> pile = bc.IndexTarget("pile.idx", d_vocab=model.cfg.d_vocab, order=3)
        >>> found = bc.find_subnetwork(model, pile, corpus)
    """

    d_vocab: int

    def __init__(
        self, path: str | Path, *, d_vocab: int, order: int = 2, cache_bytes: int = _CACHE_BYTES, **options: Any
    ) -> None:
        """Open an index.

        Args:
            path: A tokengrams index (`NAME.idx` or `NAME.bin`, or a folder of such pairs), a folder that infini-gram
                has indexed, or `"infini-gram:NAME"` for an index on infini-gram's public service, which refuses
                contexts that it does not count exactly (those seen more than about a thousand times).
            d_vocab: Size of the model's vocabulary: `model.cfg.d_vocab`.
            order: Number of tokens in an n-gram, at least 1. With a high order, each position gets its longest context
                that occurs in the corpus.
            cache_bytes: How much memory rows may take; when it is full, they are dropped and fetched again.
            **options: Of `open_index`.

        Raises:
            FileNotFoundError: If there is no such index.
            ValueError: If it is no index, its files do not belong together, the order is below 1, or the library that
                reads it is not installed.
        """
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"order must be a whole number of at least 1, not {order!r}")
        self.d_vocab, self.order = d_vocab, order  # pyright: ignore[reportIncompatibleVariableOverride]
        self._index: Index = open_index(path, d_vocab, **options)
        self._limit, self._options = cache_bytes, options
        self._forget()
        self.context_length = order - 1
        self.path = full_path(path)
        """Where the index is."""
        self.fingerprint = f"{self._index.fingerprint} {order} {d_vocab}"

    def __reduce__(self) -> Any:  # the index is opened again wherever a copy is made
        own = {"d_vocab": self.d_vocab, "order": self.order, "cache_bytes": self._limit, **self._options}
        return partial(IndexTarget, self.path, **own), ()

    def __repr__(self) -> str:
        return f"IndexTarget(order={self.order}, d_vocab={self.d_vocab:,}: {self._index.description})"

    def log_probs(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Return log P(next | context ending at each position), dense: for inspection, not for training."""
        return self._table(tokens).log_probs(tokens)

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """Return -log P(actual next token) at all positions but the last; inf where that probability is 0."""
        return self._table(tokens).surprisal(tokens)

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """Return the entropy of the distribution at each position, in nats."""
        return self._table(tokens).entropy(tokens)

    def top1(self, tokens: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "batch pos"]:
        """Return the most likely next token at each position."""
        return self._table(tokens).top1(tokens)

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """Return CE(P(. | context), softmax(logits)) at each position in nats; differentiable in `logits`."""
        return self._table(tokens).cross_entropy(logits, tokens)

    # --- rows ---

    def _forget(self) -> None:
        self._resolved: dict[Context, Context] = {}  # a context -> its longest end that was seen
        self._rows: dict[Context, _Row] = {}
        self._taken = 0
        self._last: tuple[Tensor, _TableOfBatch] | None = None

    def _table(self, tokens: Integer[Tensor, "batch pos"]) -> _TableOfBatch:
        """The rows of a batch, as a table of it alone."""
        own = tokens.to("cpu", torch.long)
        if self._last is not None and torch.equal(self._last[0], own):
            return self._last[1]
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.d_vocab:
            raise ValueError(
                f"tokens run from {int(tokens.min())} to {int(tokens.max())}, but this index is read over a vocabulary "
                f"of {self.d_vocab}"
            )
        contexts = _contexts(tokens, self.order - 1)
        if self._taken > self._limit:
            self._forget()
        self._fetch(sorted(set(contexts) - self._resolved.keys()))
        used = {context: at for at, context in enumerate(sorted({self._resolved[one] for one in contexts}))}
        rows = torch.tensor([used[self._resolved[one]] for one in contexts], dtype=torch.long)
        level = _joined([self._rows[context] for context in used])
        table = _TableOfBatch(1, self.d_vocab, (level,), rows.view(tokens.shape).to(tokens.device))
        self._last = own.clone(), table
        return table

    def _fetch(self, contexts: Sequence[Context]) -> None:
        """Find each context's longest end that was seen (an end of a context that was seen was seen, too)."""
        seen = {one: (-1, len(one) + 1) for one in contexts}  # tokens of an end that was seen, and of one that was not
        asked = {one: len(one) for one in contexts}  # the full context first, then the middle of what is left
        while asked:
            ends = {one[len(one) - n :] for one, n in asked.items()}
            new = sorted(end for end in ends if end not in self._rows)
            found = dict(zip(new, self._index.following(new), strict=True)) if new else {}
            self._keep({end: row for end, row in found.items() if len(row[0])})
            for one, n in asked.items():
                low, high = seen[one]
                seen[one] = (n, high) if one[len(one) - n :] in self._rows else (low, n)
            asked = {one: (low + high) // 2 for one, (low, high) in seen.items() if high - low > 1}
        for one, (low, _) in seen.items():
            if low < 0:
                raise ValueError(f"{self._index.description} holds no tokens of a vocabulary of {self.d_vocab}")
            self._resolved[one] = one[len(one) - low :]
            self._taken += 100 + 16 * len(one)

    def _keep(self, found: dict[Context, Followers]) -> None:
        if not found:
            return
        level = level_of_counts(list(found.values()), self.d_vocab)
        for row, context in enumerate(found):
            part = slice(int(level.offsets[row]), int(level.offsets[row + 1]))
            self._rows[context] = _Row(
                level.tokens[part].clone(),
                level.probs[part].clone(),
                level.entropy[row].clone(),
                level.top[row].clone(),
            )
            self._taken += 8 * (part.stop - part.start) + 500


@dataclass(frozen=True)
class _Row:
    """One row of a table."""

    tokens: Integer[Tensor, " entry"]
    probs: Float[Tensor, " entry"]
    entropy: Float[Tensor, ""]
    top: Integer[Tensor, ""]


@dataclass(frozen=True, eq=False)
class _TableOfBatch(NGramTable):
    """The rows of a batch alone, and which of them each position has."""

    at: Integer[Tensor, "batch pos"]

    def _rows(self, tokens: Integer[Tensor, "batch pos"]) -> tuple[Integer[Tensor, " flat"], Integer[Tensor, " flat"]]:
        rows = self.at[:, : tokens.shape[1]].to(tokens.device).reshape(-1)
        return torch.zeros_like(rows), rows


def _contexts(tokens: Integer[Tensor, "batch pos"], length: int) -> list[Context]:
    """The `length` tokens up to each position, or those that there are, of all positions one after the other."""
    return [tuple(row[max(0, end - length) : end]) for row in tokens.tolist() for end in range(1, len(row) + 1)]


def _joined(rows: Sequence[_Row]) -> Level:
    lengths = torch.tensor([0, *(len(row.tokens) for row in rows)], dtype=torch.long)
    return Level(
        contexts=torch.arange(len(rows)),
        offsets=lengths.cumsum(0),
        tokens=torch.cat([row.tokens for row in rows]),
        probs=torch.cat([row.probs for row in rows]),
        entropy=torch.stack([row.entropy for row in rows]),
        top=torch.stack([row.top for row in rows]),
    )


TARGET = TargetKind(
    make=lambda model, corpus, order: count_ngrams(corpus.train, order, d_vocab=model.cfg.d_vocab),
    label=_order,
    meaning=lambda order: f"the {_order(order)} probabilities of the text",
    kind="NGramTable",
    does=lambda order: f"predict the next token {_FROM.get(order, f'from the last {order - 1}')}",
    like=lambda order: _COUNTED.get(order, f"counts of which token follows which {order - 1}"),
    uses_order=True,
)
