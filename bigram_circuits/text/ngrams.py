"""The n-gram distribution of a corpus, as a frozen table of sparse rows.

P(next | context) is the maximum-likelihood estimate, with backoff for unseen contexts only (Chang and Bergen 2025): an
unseen context gets the distribution of the next shorter context, down to the unigram distribution, while a seen context
gives probability 0 to every token never seen after it. Only the tokens seen after a context are stored, and
the loss against logits is computed from these sparse rows:

    CE = logsumexp(logits) - sum over v with P(v) > 0 of P(v) * logits[v]
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from bigram_circuits.storage.arrays import bytes_of, release_pages
from bigram_circuits.storage.files import whole_file
from bigram_circuits.storage.records import (
    check_content,
    check_header,
    read_tensors,
    seal_tensors,
    shown,
    write_tensors,
)
from bigram_circuits.text.coding import MOST_ENTRIES, table_bits

_GATHERED_AT_ONCE = 1 << 17  # row entries gathered from the logits at once, to fit in the CPU cache
_LOGITS_AT_ONCE = 1 << 20  # logits exponentiated at once: 4 MiB of float32
_FORMAT = "bigram_circuits.text.ngrams/1"
_CHECKED_AT_ONCE = 1 << 22  # entries checked at once when a table is loaded
_SUM_MAY_MISS = 1e-4  # a row of float32 probabilities sums to 1 up to this
_ENTROPY_MAY_MISS = 1e-3  # nats
_VERIFIED_BYTES = 1 << 28  # tables up to this size are fully verified on loading, which takes half a second

Tokens = Integer[Tensor, "batch pos"] | Integer[np.ndarray, "batch pos"]


@dataclass(frozen=True, eq=False)
class Level:
    """Sparse rows of P(next | context) for contexts of one length."""

    contexts: Integer[Tensor, " context"]
    """int64 keys of the contexts seen, sorted; the empty context has the single key 0."""
    offsets: Integer[Tensor, " context_and_end"]
    """int64: row i of `tokens` and `probs` is `offsets[i]` to `offsets[i + 1]`."""
    tokens: Integer[Tensor, " entry"]
    """int32 next tokens, sorted within a row."""
    probs: Float[Tensor, " entry"]
    """float32 probabilities; every row sums to 1."""
    entropy: Float[Tensor, " context"]
    """float32 entropy of each row, in nats."""
    top: Integer[Tensor, " context"]
    """int32 most likely next token of each row (the lowest id among ties)."""


LEVEL_DTYPES = {
    "contexts": np.int64,
    "offsets": np.int64,
    "tokens": np.int32,
    "probs": np.float32,
    "entropy": np.float32,
    "top": np.int32,
}
"""Types of the arrays of a level, as stored in a file."""


def size_in(metadata: Mapping[str, str], name: str) -> int:
    """Read an integer of at least 1 from a file's header."""
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text)):
        raise ValueError(f"its {name} is {shown(text)}, not an integer of at least 1")
    return int(text)


def _check_sizes(level: Mapping[str, np.ndarray], index: int) -> None:
    """Raise ValueError unless the arrays of a level have consistent shapes and dtypes; their contents are not read."""
    n_contexts, n_entries = len(level["contexts"].reshape(-1)), len(level["tokens"].reshape(-1))
    sizes = {"offsets": n_contexts + 1, "tokens": n_entries, "probs": n_entries}
    for name, array in level.items():
        wanted = (sizes.get(name, n_contexts),)
        if array.shape != wanted or array.dtype != LEVEL_DTYPES[name]:
            raise ValueError(
                f"level_{index}.{name} is {array.dtype} {shown(array.shape)} but should be "
                f"{np.dtype(LEVEL_DTYPES[name])} {wanted}"
            )
    if n_contexts == 0 or (level["offsets"][0], level["offsets"][-1]) != (0, n_entries):
        raise ValueError(f"the offsets of level_{index} do not match its {n_entries} entries")


def _check_rows(level: Mapping[str, np.ndarray], index: int, d_vocab: int) -> None:
    """Raise ValueError unless every row of a level is a valid sparse distribution with its entropy and top token."""
    contexts, offsets = level["contexts"], level["offsets"]
    if contexts[0] < 0 or contexts[-1] >= d_vocab**index or (contexts[1:] <= contexts[:-1]).any():
        raise ValueError(f"the contexts of level_{index} are not in order or outside the vocabulary")
    if (offsets[1:] <= offsets[:-1]).any():
        raise ValueError(f"the rows of level_{index} are not in order")
    for name in ("tokens", "top"):
        if level[name].min() < 0 or level[name].max() >= d_vocab:
            raise ValueError(f"level_{index}.{name} has ids outside the vocabulary of {d_vocab}")
    first = 0
    while first < len(contexts):  # as many whole rows at a time as fit, and at least one
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _CHECKED_AT_ONCE, side="right")) - 1)
        _check_some_rows(level, index, first, last)
        first = last
    for array in level.values():
        release_pages(array)


def _check_some_rows(level: Mapping[str, np.ndarray], index: int, first: int, last: int) -> None:
    """Check the rows `first` to `last` (excluded) of a level."""
    begin, end = int(level["offsets"][first]), int(level["offsets"][last])
    starts = level["offsets"][first:last] - begin
    tokens, probs = level["tokens"][begin:end], level["probs"][begin:end].astype(np.float64)
    rises = tokens[1:] > tokens[:-1]
    rises[starts[1:] - 1] = True  # from one row to the next
    if not rises.all():
        raise ValueError(f"the tokens of a row of level_{index} are not in order")
    if not (probs.min() > 0 and probs.max() <= 1):
        raise ValueError(f"level_{index} holds values that are not probabilities")
    if not (np.abs(np.add.reduceat(probs, starts) - 1) < _SUM_MAY_MISS).all():
        raise ValueError(f"the probabilities of a row of level_{index} do not sum to 1")
    entropy = np.add.reduceat(-probs * np.log(probs), starts)
    if not (np.abs(entropy - level["entropy"][first:last]) < _ENTROPY_MAY_MISS).all():
        raise ValueError(f"an entropy of level_{index} is not that of its row")
    likeliest = np.maximum.reduceat(probs, starts)
    lengths = np.diff(np.append(starts, end - begin))
    is_top = (probs == np.repeat(likeliest, lengths)) & (tokens == np.repeat(level["top"][first:last], lengths))
    if not np.logical_or.reduceat(is_top, starts).all():
        raise ValueError(f"a top token of level_{index} is not the most likely one of its row")


def _level_of(rows: Float[Tensor, "context d_vocab"]) -> Level:
    """Build a level from dense rows of probabilities, for contexts 0, 1, 2, ..."""
    sums = rows.sum(1)
    if (rows < 0).any() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-6):
        raise ValueError("probabilities must be at least 0, and every row must sum to 1")
    context, token = rows.nonzero(as_tuple=True)
    lengths = (rows > 0).sum(1)
    return Level(
        contexts=torch.arange(len(rows), device=rows.device),
        offsets=torch.cat([torch.zeros(1, dtype=torch.long, device=rows.device), lengths.cumsum(0)]),
        tokens=token.int(),
        probs=rows[context, token].float(),
        entropy=torch.special.entr(rows).sum(1).float(),
        top=rows.argmax(1).int(),
    )


def save_levels(path: str | os.PathLike[str], d_vocab: int, levels: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Write the arrays of a table's levels, named as in `Level`, as `NGramTable.save` does."""
    arrays = {f"level_{index}.{name}": array for index, level in enumerate(levels) for name, array in level.items()}
    metadata = {"format": _FORMAT, "order": str(len(levels)), "d_vocab": str(d_vocab)}
    with whole_file(path) as temporary:
        write_tensors(temporary, arrays, seal_tensors(arrays, metadata))


@dataclass(frozen=True, eq=False)
class NGramTable:
    """P(next | previous `order - 1` tokens) as sparse rows, with backoff for unseen contexts.

    A target for `find_subnetwork` and `evaluate`. Where fewer tokens precede a position than the order needs, the
    longest available context is used. Results are in nats, on the device of the arguments.

    Example:
        >>> target.save("bigrams.safetensors")
        >>> again = bc.NGramTable.load("bigrams.safetensors")
        >>> print(again.n_entries)
    """

    order: int
    """Number of tokens in an n-gram: 1, 2 or 3."""
    d_vocab: int
    """Size of the vocabulary."""
    levels: tuple[Level, ...]
    """Level i holds the contexts of i tokens."""

    @classmethod
    def from_probs(
        cls, probs: Float[Tensor, "d_vocab d_vocab"], unigram: Float[Tensor, " d_vocab"] | None = None
    ) -> NGramTable:
        """Build a bigram table from known probabilities instead of counts.

        Args:
            probs: P(next | current); rows must sum to 1.
            unigram: P(next); the mean of all rows by default. It is never used for backoff, as every token has a row.

        Raises:
            ValueError: If a probability is negative or a row does not sum to 1.
        """
        bigram = probs.double()
        first = bigram.mean(0) if unigram is None else unigram.double()
        levels = tuple(_level_of(rows) for rows in (first[None], bigram))
        return cls(order=2, d_vocab=len(bigram), levels=levels)

    positions = slice(None)  # it makes a prediction at every position
    over_tokens = True
    kind = "NGramTable"

    @property
    def context_length(self) -> int:
        """The number of last tokens that a distribution depends on."""
        return self.order - 1

    @property
    def n_entries(self) -> int:
        """Number of distinct n-grams of the full order."""
        return len(self.levels[-1].tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the full table: equal exactly when all rows are equal."""
        digest = hashlib.blake2b(f"{self.order} {self.d_vocab}".encode(), digest_size=16)
        for level in self.levels:
            for tensor in (level.contexts, level.offsets, level.tokens, level.probs):
                for data in bytes_of(tensor.cpu().numpy()):
                    digest.update(data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        contexts = len(self.levels[-1].contexts)
        return (
            f"NGramTable(order={self.order}, d_vocab={self.d_vocab:,}: {self.n_entries:,} {self.order}-grams "
            f"of {contexts:,} contexts)"
        )

    def log_probs(self, tokens: Tokens) -> Float[Tensor, "batch pos d_vocab"]:
        """Return log P(next | context ending at each position), dense: for inspection, not for training."""
        tokens = self._checked(tokens)
        position, token, prob = self._entries(self._rows(tokens))
        dense = torch.full((tokens.numel(), self.d_vocab), -torch.inf, dtype=torch.float32, device=tokens.device)
        dense[position, token] = prob.log()
        return dense.view(*tokens.shape, self.d_vocab)

    def surprisal(self, tokens: Tokens) -> Float[Tensor, "batch pos_minus_1"]:
        """Return -log P(actual next token) at all positions but the last; inf where that probability is 0."""
        tokens = self._checked(tokens)
        following = tokens[:, 1:]
        return -self._prob(self._rows(tokens[:, :-1]), following.reshape(-1)).log().view(following.shape)

    def entropy(self, tokens: Tokens) -> Float[Tensor, "batch pos"]:
        """Return the entropy of the distribution at each position; KL is the cross-entropy minus this entropy."""
        return self._per_row(tokens, "entropy")

    def top1(self, tokens: Tokens) -> Integer[Tensor, "batch pos"]:
        """Return the most likely next token at each position."""
        return self._per_row(tokens, "top").long()

    def cross_entropy(self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Tokens) -> Float[Tensor, "batch pos"]:
        """Return CE(P(. | context), softmax(logits)) at each position from the sparse rows; differentiable in `logits`.

        Raises:
            ValueError: If the logits do not have the tokens' shape plus an axis of this table's vocabulary size.
        """
        tokens = self._checked(tokens)
        if logits.shape != (*tokens.shape, self.d_vocab):
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} but should have shape {(*tokens.shape, self.d_vocab)}, "
                f"given tokens {tuple(tokens.shape)} and a table counted over a vocabulary of {self.d_vocab}"
            )
        rows = self._rows(tokens.to(logits.device))
        flat = logits.reshape(-1, self.d_vocab).contiguous()
        return _SparseCrossEntropy.apply(flat, self, rows).view(tokens.shape)

    def message_bits(self, kl: float) -> float | None:
        """Return the bits of the shortest message found that gives this table up to a KL.

        The message gets the vocabulary and the unigram distribution, to which it backs off, for nothing. (For order 1,
        the back-off is a uniform distribution.) It gives some contexts a row: their j most likely successors, with
        probabilities of b bits; other tokens share the mass that is left, in proportion to the back-off distribution.
        Each context is charged for

        - whether it has a row: -log2(s) bits, or -log2(1 - s) if not, with s half the share of contexts that were seen;
        - j, in Elias' gamma code: 2 floor(log2 j) + 1 bits;
        - the set of successors: -log2 of the probability of drawing it in j draws from the back-off distribution, j!
          times the product of their probabilities; fewer bits than log2 C(V, j), which is charged for order 1;
        - whether any mass is left: 1 bit;
        - each probability, and the mass that is left: b bits for one of 2**b values, evenly spaced in the log from 1 to
          1 / V (1 / V**2 for b > 4), or a float32. Rows are normalised by whoever reads them.

        Every context has its own j: those that minimise KL + mu * bits. For each mu, no other choice with a KL as small
        takes fewer bits, be it one j for all contexts or the pairs that gain most. mu goes in steps of 1%; between two
        steps, contexts change one by one until the KL is reached. Of all b (0 to 12, or 32) the shortest message is
        taken, or the full table in float32 if that is shorter. With order 3, the message may also write bigrams first,
        at 0.2 nats, and back off to them.

        Args:
            kl: KL in nats per position, averaged over contexts by their frequency in the counted text (estimated by
                that of the shorter n-grams), from 0 to infinity. A larger one never takes more bits.

        Returns:
            The bits; 0 if the back-off distribution alone has this KL. None if there are more than 2**23 n-grams, which
            would take gigabytes of memory.

        Raises:
            ValueError: If `kl` is negative or NaN.
        """
        if math.isnan(kl) or kl < 0:
            raise ValueError(f"kl should be at least 0 nats per position, not {kl}")
        return table_bits(self, kl) if self.n_entries <= MOST_ENTRIES else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as one safetensors file, with checksums; a memory-mapped table is copied piece by piece."""
        levels = [{name: getattr(level, name).cpu().numpy() for name in LEVEL_DTYPES} for level in self.levels]
        save_levels(path, self.d_vocab, levels)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool | None = None) -> NGramTable:
        """Load a table written by `save`; it is memory-mapped, so rows are read from the file as they are needed.

        Args:
            path: The file.
            verify: Whether to read the full table and check every row and the content checksum. By default this is
                done for tables up to 256 MiB; for larger ones only the header, its checksum and all sizes are checked.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not an n-gram table, or is damaged.
        """
        if os.path.isdir(path):
            raise ValueError(f"{str(path)!r} is a folder, but an n-gram table is one file")
        arrays, metadata = read_tensors(path, "is not an n-gram table", mapped=True)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} has format {shown(metadata.get('format'))}, but {_FORMAT!r} is needed")
        try:
            check_header(arrays, metadata, {"format", "order", "d_vocab"})
            order, d_vocab = size_in(metadata, "order"), size_in(metadata, "d_vocab")
            if order > 3 or d_vocab**order > 2**63:
                raise ValueError(f"it counts {order}-grams over a vocabulary of {d_vocab}")
            wanted = {f"level_{index}.{name}" for index in range(order) for name in LEVEL_DTYPES}
            if set(arrays) != wanted:
                raise ValueError(f"it has a missing or unknown tensor: {shown(min(set(arrays) ^ wanted))}")
            levels = [{name: arrays[f"level_{index}.{name}"] for name in LEVEL_DTYPES} for index in range(order)]
            for index, level in enumerate(levels):
                _check_sizes(level, index)
            if verify or (verify is None and sum(array.nbytes for array in arrays.values()) <= _VERIFIED_BYTES):
                check_content(arrays, metadata)
                for index, level in enumerate(levels):
                    _check_rows(level, index, d_vocab)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
        tensors = tuple(Level(**{name: torch.from_numpy(array) for name, array in level.items()}) for level in levels)
        return cls(order=order, d_vocab=d_vocab, levels=tensors)

    # A row is addressed by (level, index within that level); `_rows` returns both for every position, flattened.

    def _checked(self, tokens: Any) -> Integer[Tensor, "batch pos"]:
        tensor = tokens if isinstance(tokens, Tensor) else torch.from_numpy(np.asarray(tokens))
        if tensor.ndim != 2:
            raise ValueError(f"tokens have shape {tuple(tensor.shape)} but should be [batch, pos]")
        if tensor.numel() and (int(tensor.min()) < 0 or int(tensor.max()) >= self.d_vocab):
            raise ValueError(
                f"tokens run from {int(tensor.min())} to {int(tensor.max())}, but this table was counted over a "
                f"vocabulary of {self.d_vocab}"
            )
        return tensor.long()

    def _rows(self, tokens: Integer[Tensor, "batch pos"]) -> tuple[Integer[Tensor, " flat"], Integer[Tensor, " flat"]]:
        """Find the longest seen context at each position: its level and its row in that level."""
        level = torch.zeros_like(tokens)
        row = torch.zeros_like(tokens)
        key = torch.zeros_like(tokens)
        for length in range(1, self.order):
            # the key of the last `length` tokens; earlier positions keep their shorter context
            older = torch.zeros_like(tokens)
            older[:, length - 1 :] = tokens[:, : tokens.shape[1] - length + 1]
            key = key + older * self.d_vocab ** (length - 1)
            contexts = self._on(length, "contexts", tokens.device)
            index = torch.searchsorted(contexts, key).clamp(max=len(contexts) - 1)
            seen = contexts[index] == key
            seen[:, : length - 1] = False
            level = torch.where(seen, length, level)
            row = torch.where(seen, index, row)
        return level.reshape(-1), row.reshape(-1)

    def _entries(
        self, rows: tuple[Integer[Tensor, " flat"], Integer[Tensor, " flat"]]
    ) -> tuple[Integer[Tensor, " entry"], Integer[Tensor, " entry"], Float[Tensor, " entry"]]:
        """Return all entries of the given rows: (index into the given rows, next token, probability)."""
        level, row = rows
        parts = []
        for number in range(self.order):
            position = (level == number).nonzero().squeeze(1)
            if len(position) == 0:
                continue
            offsets = self._on(number, "offsets", row.device)
            start, end = offsets[row[position]], offsets[row[position] + 1]
            lengths = end - start
            first = lengths.cumsum(0) - lengths
            entry = torch.arange(int(lengths.sum()), device=row.device) + (start - first).repeat_interleave(lengths)
            parts.append(
                (
                    position.repeat_interleave(lengths),
                    self._on(number, "tokens", row.device)[entry].long(),
                    self._on(number, "probs", row.device)[entry],
                )
            )
        if not parts:  # no rows requested
            return level, level, torch.zeros(0, dtype=torch.float32, device=level.device)
        if len(parts) == 1:  # the usual case: no context in the batch needs backoff
            return parts[0]
        position, token, prob = (torch.cat(part) for part in zip(*parts, strict=True))
        return position, token, prob

    def _entry_chunks(self, rows: tuple[Integer[Tensor, " flat"], Integer[Tensor, " flat"]]) -> Any:
        """Yield the entries of consecutive rows in chunks of bounded size (at least one row each).

        Each chunk is (index into the given rows, index into the flattened logits [flat, d_vocab], probability).
        """
        level, row = rows
        lengths = torch.zeros_like(row)
        for number in range(self.order):
            offsets = self._on(number, "offsets", row.device)
            here = level == number
            lengths[here] = (offsets[row[here] + 1]) - offsets[row[here]]
        stretch = lengths.cumsum(0) // _GATHERED_AT_ONCE
        bounds = [0, *(torch.unique_consecutive(stretch, return_counts=True)[1].cumsum(0).tolist())]
        for start, end in itertools.pairwise(bounds):
            position, token, prob = self._entries((level[start:end], row[start:end]))
            position += start
            yield position, token.add_(position, alpha=self.d_vocab), prob

    def _prob(
        self, rows: tuple[Integer[Tensor, " flat"], Integer[Tensor, " flat"]], following: Integer[Tensor, " flat"]
    ) -> Any:
        """Look up P(following | row), by binary search for the token within each row, for all rows at once."""
        level, row = rows
        result = torch.zeros(len(row), dtype=torch.float32, device=row.device)
        for number in range(self.order):
            here = (level == number).nonzero().squeeze(1)
            if len(here) == 0:
                continue
            offsets = self._on(number, "offsets", row.device)
            tokens = self._on(number, "tokens", row.device)
            low, end = offsets[row[here]], offsets[row[here] + 1]
            high = end.clone()
            wanted = following[here]
            for _ in range(int((high - low).max()).bit_length()):
                middle = (low + high) // 2
                below = tokens[middle.clamp(max=len(tokens) - 1)] < wanted
                searching = low < high
                low = torch.where(searching & below, middle + 1, low)
                high = torch.where(searching & ~below, middle, high)
            found = (low < end) & (tokens[low.clamp(max=len(tokens) - 1)] == wanted)
            result[here[found]] = self._on(number, "probs", row.device)[low[found]]
        return result

    def _per_row(self, tokens: Tokens, name: str) -> Tensor:
        tokens = self._checked(tokens)
        level, row = self._rows(tokens)
        stacked = torch.stack(
            [
                self._on(n, name, tokens.device)[row.clamp(max=len(self.levels[n].contexts) - 1)]
                for n in range(self.order)
            ]
        )
        return stacked.gather(0, level[None]).view(tokens.shape)

    def _on(self, number: int, name: str, device: torch.device) -> Tensor:
        """Return a level's tensor on a device, copying it there at most once."""
        tensor = getattr(self.levels[number], name)
        if tensor.device == device:
            return tensor
        copies: dict[Any, Tensor] = self.__dict__.setdefault("_copies", {})
        key = (number, name, device)
        if key not in copies:
            copies[key] = tensor.to(device)
        return copies[key]


class _SparseCrossEntropy(torch.autograd.Function):
    """logsumexp(logits) - sum of P * logits over a row's entries; gradient softmax(logits) - P, in one buffer."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, table: NGramTable, rows: tuple[Tensor, Tensor]) -> Tensor:
        rows_at_once = max(1, _LOGITS_AT_ONCE // logits.shape[1])  # logsumexp copies its input
        lse = torch.cat([part.float().logsumexp(-1) for part in logits.split(rows_at_once)])
        expected = torch.zeros_like(lse)
        for position, place, prob in table._entry_chunks(rows):  # pyright: ignore[reportPrivateUsage]
            expected.index_add_(0, position, logits.view(-1).index_select(0, place).float().mul_(prob))
        ctx.save_for_backward(logits, lse)
        ctx.table, ctx.rows = table, rows
        return lse - expected

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad = logits.to(torch.float32, copy=True).sub_(lse[:, None]).exp_()
        for _, place, prob in ctx.table._entry_chunks(ctx.rows):
            grad.view(-1).scatter_add_(0, place, prob.neg())
        grad *= grad_output[:, None]
        return grad.to(logits.dtype), None, None
