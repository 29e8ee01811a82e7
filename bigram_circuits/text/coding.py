"""How short a message a table of n-grams can be: the cheapest code found whose KL is small enough.

The message names, for every context, its most likely successors and their rounded probabilities; the rest of a row is
the back-off distribution, scaled to the mass that is left. How many successors a context gets trades bits for nats: at
a price `mu` in nats per bit, every context takes the number that costs it least, so successors go to where they explain
most. A search over `mu` finds the shortest message for a KL. Only sparse rows are computed with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Integer

if TYPE_CHECKING:
    from bigram_circuits.text.ngrams import Level, NGramTable

_PRECISIONS = (3, 4, 2, 6, 1, 8, 0, 12, 32)  # bits of a probability, likely ones first; 32: a float32, as it is
_FLOAT = 32
_MU = (-40.0, 3.0)  # log2 of the price, in nats per bit: all successors of any context, none of any
_HALVINGS = 12
_BIGRAM_KL = 0.2  # nats: how exact the bigrams are that a table of trigrams may fall back on
_LEAST = 1e-9  # stands for probabilities that the back-off distribution lacks


MOST_ENTRIES = 1 << 23
"""Tables with more n-grams are not measured: 5 million take 1.4 GB and about 20 seconds."""


def table_bits(table: NGramTable, kl: float) -> float:
    """Return the bits of the shortest message found that gives a table up to a KL; see `NGramTable.message_bits`."""
    return min(bits + _of_level(rows, kl) for bits, rows in _fallbacks(table))


@dataclass(frozen=True)
class _Rows:
    """The rows of a level, each sorted by probability, and what does not depend on the precision of probabilities."""

    d_vocab: int
    n_contexts: int  # that the decoder has to expect: d_vocab ** (order - 1)
    lengths: Integer[np.ndarray, " row"]  # successors of each row
    weight: Float[np.ndarray, " row"]  # frequency of its context
    empty_kl: Float[np.ndarray, " row"]  # if none of its successors is named
    starts: Integer[np.ndarray, " row"]  # first entry of each row
    row: Integer[np.ndarray, " entry"]
    entry: Integer[np.ndarray, " entry"]  # its place in the level
    # the following are of the message that names the entries of the row up to and including this one
    named: Integer[np.ndarray, " entry"]  # how many
    complete: Bool[np.ndarray, " entry"]  # whether no successor is left over
    prob: Float[np.ndarray, " entry"]  # of this entry alone
    left: Float[np.ndarray, " entry"]  # mass of the others
    fallback_left: Float[np.ndarray, " entry"]  # their mass in the back-off distribution
    unexplained: Float[np.ndarray, " entry"]  # their sum of P log(P / back-off)
    names: Float[np.ndarray, " entry"]  # bits of the set of successors


def _up_to(
    values: Float[np.ndarray, " entry"], starts: Integer[np.ndarray, " row"], lengths: Integer[np.ndarray, " row"]
) -> Float[np.ndarray, " entry"]:
    """Sum from the first entry of the row to each."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return sums[1:] - np.repeat(sums[starts], lengths)


def _fallbacks(table: NGramTable) -> Iterator[tuple[float, _Rows]]:
    """Yield the rows of the full order over each back-off distribution, with the bits that this distribution costs."""
    unigram, last, n = table.levels[0], table.levels[-1], table.d_vocab
    tokens = last.tokens.numpy(force=True)
    if table.order == 1:
        yield 0.0, _rows(table, last, np.ones(1), np.full(len(tokens), 1 / n), is_uniform=True)
        return
    of_token = np.zeros(n)
    of_token[unigram.tokens.numpy(force=True)] = unigram.probs.numpy(force=True)
    contexts = last.contexts.numpy(force=True)
    if table.order == 2:
        yield 0.0, _rows(table, last, of_token[contexts], of_token[tokens])
        return
    bigram = table.levels[1]
    firsts, of_bigram = bigram.contexts.numpy(force=True), bigram.probs.numpy(force=True)
    lengths = np.diff(bigram.offsets.numpy(force=True))
    keys = np.repeat(firsts, lengths) * n + bigram.tokens.numpy(force=True)
    weight = of_token[contexts // n] * _look_up(keys, of_bigram, contexts)
    yield 0.0, _rows(table, last, weight, of_token[tokens])
    fallback = of_token[bigram.tokens.numpy(force=True)]
    coded = _shortest(_rows(table, bigram, of_token[firsts], fallback), _BIGRAM_KL)
    if coded is not None:
        wanted = np.repeat(contexts % n, np.diff(last.offsets.numpy(force=True))) * n + tokens
        yield coded.bits, _rows(table, last, weight, _look_up(keys, coded.probs(fallback), wanted))


def _look_up(
    keys: Integer[np.ndarray, " key"], values: Float[np.ndarray, " key"], wanted: Integer[np.ndarray, " wanted"]
) -> Float[np.ndarray, " wanted"]:
    """Return the values of sorted keys; 0 for those that are missing."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)


def _rows(
    table: NGramTable,
    level: Level,
    weight: Float[np.ndarray, " row"],
    fallback: Float[np.ndarray, " entry"],
    *,
    is_uniform: bool = False,
) -> _Rows:
    offsets = level.offsets.numpy(force=True)
    lengths, row = np.diff(offsets), np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    prob, fallback = level.probs.numpy(force=True).astype(float), np.maximum(fallback, _LEAST)
    gain = prob * np.log(prob / fallback)
    total = np.add.reduceat(gain, offsets[:-1])
    order = np.lexsort((-prob, row))
    prob, fallback, gain, starts = prob[order], fallback[order], gain[order], offsets[:-1]
    named = np.arange(len(row)) - starts[row] + 1
    complete = named == lengths[row]
    factorial = _log2_factorials(table.d_vocab)
    if is_uniform:
        names = factorial[-1] - factorial[named] - factorial[table.d_vocab - named]
    else:
        names = _up_to(-np.log2(fallback), starts, lengths) - factorial[named]
    return _Rows(
        d_vocab=table.d_vocab,
        n_contexts=table.d_vocab ** (table.levels.index(level)),
        lengths=lengths,
        weight=weight,
        empty_kl=np.maximum(total, 0.0),
        starts=starts,
        row=row,
        entry=order,
        named=named,
        complete=complete,
        prob=prob,
        left=np.where(complete, 0.0, np.maximum(1 - _up_to(prob, starts, lengths), _LEAST)),
        fallback_left=np.maximum(1 - _up_to(fallback, starts, lengths), _LEAST),
        unexplained=np.where(complete, 0.0, total[row] - _up_to(gain, starts, lengths)),
        names=names,
    )


def _log2_factorials(n: int) -> Float[np.ndarray, " number"]:
    """Return log2 of 0!, 1!, ..., n!."""
    return np.concatenate([[0.0], np.cumsum(np.log2(np.arange(1, n + 1)))])


# --- the message of a level ---


def _of_level(rows: _Rows, kl: float) -> float:
    """Return the bits of the shortest message found with at most this KL."""
    if kl >= float(rows.weight @ rows.empty_kl):
        return 0.0  # the back-off distribution alone
    found = _shortest(rows, kl)
    return _in_full(rows) if found is None else min(found.bits, _in_full(rows))


def _in_full(rows: _Rows) -> float:
    """Return the bits of the full table: every row with all its successors and float32 probabilities."""
    factorial, empty, some = _log2_factorials(rows.d_vocab), *_flags(rows)
    sets = factorial[-1] - factorial[rows.lengths] - factorial[rows.d_vocab - rows.lengths]
    each = sets + _FLOAT * rows.lengths + _count_bits(rows.lengths) + some + 1
    return float(each.sum()) + empty * (rows.n_contexts - len(rows.lengths))


def _flags(rows: _Rows) -> tuple[float, float]:
    """Return the bits that tell that a context has no row, and that it has one, if half of the seen ones have one."""
    share = len(rows.lengths) / rows.n_contexts / 2
    return -math.log2(1 - share), -math.log2(share)


def _count_bits(n: Integer[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """Return the bits of positive integers in Elias' gamma code."""
    return 2 * np.floor(np.log2(n)) + 1


def _rounded(prob: Float[np.ndarray, " entry"], bits: int, d_vocab: int) -> Float[np.ndarray, " entry"]:
    """Return the log of probabilities, rounded to 2 ** bits values from 1 down, evenly spaced in the log.

    The lowest is 1 / d_vocab with up to 4 bits, its square with more.
    """
    logs = np.log(prob)
    if bits == _FLOAT:
        return logs
    step = (1 if bits <= 4 else 2) * math.log(d_vocab) / max(2**bits - 1, 1) or 1.0
    return -step * np.clip(np.round(-logs / step), 0, 2**bits - 1)


@dataclass(frozen=True)
class _Code:
    """What it costs, in bits and in nats, to name each entry with all before it in its row, at one precision."""

    rows: _Rows
    log_prob: Float[np.ndarray, " entry"]  # rounded
    left: Float[np.ndarray, " entry"]  # mass of all others, rounded
    norm: Float[np.ndarray, " entry"]  # by which both are divided
    kl: Float[np.ndarray, " entry"]  # of the row, times the frequency of its context
    bits: Float[np.ndarray, " entry"]
    empty_bits: float  # of a context without a row

    @classmethod
    def of(cls, rows: _Rows, precision: int) -> _Code:
        """Compute the costs with `precision` bits for a probability."""
        log_prob = _rounded(rows.prob, precision, rows.d_vocab)
        log_left = _rounded(np.where(rows.complete, 1.0, rows.left), precision, rows.d_vocab)
        left = np.where(rows.complete, 0.0, np.exp(log_left))
        norm = _up_to(np.exp(log_prob), rows.starts, rows.lengths) + left
        kl = _up_to(rows.prob * (np.log(rows.prob) - log_prob), rows.starts, rows.lengths) + np.log(norm)
        kl += rows.unexplained - rows.left * (log_left - np.log(rows.fallback_left))
        empty, some = _flags(rows)
        bits = rows.names + precision * (rows.named + ~rows.complete) + _count_bits(rows.named) + some + 1
        return cls(rows, log_prob, left, norm, rows.weight[rows.row] * np.maximum(kl, 0.0), bits, empty)

    def at(self, mu: float) -> _Message:
        """Return the cheapest message at a price in nats per bit."""
        rows, empty_kl = self.rows, self.rows.weight * self.rows.empty_kl
        cost = self.kl + mu * self.bits
        least = np.minimum.reduceat(cost, rows.starts)
        without = empty_kl + mu * self.empty_bits <= least
        last = np.flatnonzero((cost == least[rows.row]) & ~without[rows.row])
        return self._message(last[np.diff(rows.row[last], prepend=-1) > 0], mu)  # the first of equals

    def shortest(self, kl: float) -> _Message | None:
        """Return the shortest message found whose KL is at most `kl`; None if there is none.

        As the price rises bits fall and KL rises. On a fixed grid of prices, this is the message at the highest price
        whose KL is small enough, with as many rows as fit from the message at the next price, in a fixed order: so a
        larger `kl` never takes more bits. A single row needs no price.
        """
        if len(self.rows.starts) == 1:
            last = np.flatnonzero(self.kl <= kl)
            return self._message(last[self.bits[last].argsort()[:1]], 0.0) if len(last) else None
        low, high = _MU
        best, beyond = self.at(2.0**low), self.at(2.0**high)
        if best.kl > kl:
            return None
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            here = self.at(2.0**middle)
            if here.kl <= kl:
                low, best = middle, here
            else:
                high, beyond = middle, here
        return self._between(best, beyond, kl)

    def _between(self, best: _Message, beyond: _Message, kl: float) -> _Message:
        """Replace rows of a message by shorter ones, those that cost the least KL first, as long as `kl` allows."""
        rows = self.rows
        last = np.full((2, len(rows.starts)), -1)  # [message, row]: -1 without a row
        for mine, message in zip(last, (best, beyond), strict=True):
            mine[rows.row[message.last]] = message.last
        own = np.where(last < 0, rows.weight * rows.empty_kl, self.kl[last])
        differing = np.flatnonzero(last[0] != last[1])
        rise = (own[1] - own[0])[differing]
        order = rise.argsort(kind="stable")
        fitting = int(np.searchsorted(np.cumsum(rise[order]), kl - best.kl, side="right"))
        replaced = differing[order[:fitting]]
        last[0, replaced] = last[1, replaced]
        return self._message(last[0][last[0] >= 0], best.mu)

    def _message(self, last: Integer[np.ndarray, " chosen"], mu: float) -> _Message:
        empty_kl = self.rows.weight * self.rows.empty_kl
        bits = float(self.bits[last].sum()) + self.empty_bits * (self.rows.n_contexts - len(last))
        kl = float(self.kl[last].sum() + np.delete(empty_kl, self.rows.row[last]).sum())
        return _Message(self, last, bits, kl, mu)


@dataclass(frozen=True)
class _Message:
    """A choice of successors to name."""

    code: _Code
    last: Integer[np.ndarray, " chosen"]  # of every context that has a row, the last entry that is named
    bits: float
    kl: float
    mu: float

    def is_beaten_by(self, other: _Message, kl: float) -> bool:
        """Whether no message of this one's code has at most this KL and fewer bits than `other`.

        No message costs less at this price: its bits are at least (the least KL + mu * bits, minus its KL) / mu.
        """
        return self.kl + self.mu * self.bits - kl >= self.mu * other.bits

    def probs(self, fallback: Float[np.ndarray, " entry"]) -> Float[np.ndarray, " entry"]:
        """Return the probability that the message gives to every entry of the level."""
        code, rows = self.code, self.code.rows
        scale, named, norm = np.ones(len(rows.lengths)), np.zeros(len(rows.lengths), int), np.ones(len(rows.lengths))
        of = rows.row[self.last]
        scale[of] = code.left[self.last] / code.norm[self.last] / rows.fallback_left[self.last]
        named[of], norm[of] = rows.named[self.last], code.norm[self.last]
        probs = fallback * np.repeat(scale, rows.lengths)
        is_named = rows.named <= named[rows.row]
        probs[rows.entry[is_named]] = (np.exp(code.log_prob) / norm[rows.row])[is_named]
        return probs


def _shortest(rows: _Rows, kl: float) -> _Message | None:
    """Return the shortest message found with at most this KL, over all precisions; None if there is none."""
    best: _Message | None = None
    for precision in _PRECISIONS:
        code = _Code.of(rows, precision)
        if best is not None and best.mu and code.at(best.mu).is_beaten_by(best, kl):
            continue
        found = code.shortest(kl)
        if found is not None and (best is None or found.bits < best.bits):
            best = found
    return best
