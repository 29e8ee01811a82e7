"""How short a message a table is: against messages priced one by one, in plain Python, on tiny vocabularies."""

import math

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.text import ngrams

TOKENS = np.random.default_rng(3).choice(5, (30, 12), p=[0.4, 0.3, 0.15, 0.1, 0.05])
TOKENS[:, 1::2] = (TOKENS[:, ::2] * 2 + TOKENS[:, 1::2] // 3) % 5  # so that the context tells something


def plain_rounded(p, b, d_vocab):
    if b == 32:
        return p
    lowest = math.log(d_vocab) * (1 if b <= 4 else 2)
    step = lowest / (2**b - 1) if b else 1.0
    return math.exp(-step * min(max(round(-math.log(p) / step), 0), 2**b - 1))


def plain_row(own, unigram, j, b):
    """Bits and KL of a context that names `j` successors; half of the contexts are taken to have a row."""
    if j == 0:
        return 1.0, (own[own > 0] * np.log(own[own > 0] / unigram[own > 0])).sum()
    named = np.argsort(-own, kind="stable")[:j]
    rest = [v for v in range(len(own)) if v not in named]
    bits = 1 + 2 * (j.bit_length() - 1) + 1 + 1 + b * j
    bits += -math.log2(math.factorial(j) * math.prod(unigram[v] for v in named))
    told = unigram.copy()
    told[named] = [plain_rounded(own[v], b, len(own)) for v in named]
    if own[rest].sum() > 1e-7:
        bits += b
        told[rest] *= plain_rounded(own[rest].sum(), b, len(own)) / unigram[rest].sum()
    else:
        told[rest] = 0.0
    told /= told.sum()
    return bits, (own[own > 0] * np.log(own[own > 0] / told[own > 0])).sum()


@pytest.fixture(scope="module")
def table():
    return bc.count_ngrams(TOKENS, 2, d_vocab=5)


@pytest.fixture(scope="module")
def messages(table):
    """[bits, KL] of every message there is, by b: each number of successors of each context."""
    probs = table.log_probs(torch.arange(5)[:, None])[:, 0].double().exp().numpy()
    unigram = np.bincount(TOKENS.ravel(), minlength=5) / TOKENS.size
    found = {}
    for b in (0, 1, 2, 3, 4, 6):
        total = np.zeros((1, 2))
        for own, weight in zip(probs, unigram, strict=True):
            row = np.array([plain_row(own, unigram, j, b) for j in range((own > 0).sum() + 1)]) * [1, weight]
            total = (total[:, None] + row).reshape(-1, 2)
        found[b] = total
    return found


def test_it_is_the_shortest_of_all_messages_up_to_a_row(table, messages):
    """No message is shorter, and none on the lower hull of one b is as short; in between it may miss a few bits."""
    every = np.concatenate(list(messages.values()))
    alone = every[every[:, 0].argmin(), 1]  # the unigram distribution, which costs nothing
    limits, hull = np.linspace(every[:, 1].min(), alone, 40)[:-1], 0
    for limit in limits:
        shortest = every[every[:, 1] <= limit + 1e-6, 0].min()
        assert shortest - 1e-3 <= table.message_bits(float(limit)) <= shortest + 20
    for of_b in messages.values():
        for mu in np.geomspace(1e-4, 0.1, 12):
            bits, kl = of_b[(of_b @ [mu, 1]).argmin()]
            assert table.message_bits(float(kl) + 1e-6) <= bits + 1e-3
            hull += 5 < bits < of_b[:, 0].max()
    assert hull > 30


def test_a_larger_kl_never_takes_more_bits(table):
    for one in (table, bc.count_ngrams(TOKENS, 1, d_vocab=5), bc.count_ngrams(TOKENS, 3, d_vocab=5)):
        bits = [one.message_bits(float(kl)) for kl in np.concatenate([[0.0], np.geomspace(1e-4, 3, 10), [math.inf]])]
        assert bits == sorted(bits, reverse=True)
        assert bits[0] > bits[5] > bits[-1] == 0.0


@pytest.mark.parametrize("n", [4, 64])
def test_one_successor_of_each_context_is_a_closed_form(n):
    """Each costs its name, log2 n bits, and 3 more: that it has a row, that j is 1, that no mass is left."""
    table = bc.NGramTable.from_probs(torch.eye(n, dtype=torch.float64).roll(1, 1))
    assert table.message_bits(1e-9) == pytest.approx(n * (math.log2(n) + 3))
    half = table.message_bits(math.log(n) / 2)  # half of the contexts are as good as unknown
    assert half == pytest.approx(n / 2 * (math.log2(n) + 3) + n / 2)
    assert table.message_bits(math.log(n) + 1e-6) == 0.0


def test_without_loss_it_is_the_full_table_at_most(table):
    rows = [(int(size), math.comb(5, int(size))) for size in table.levels[1].offsets.diff()]
    full = sum(math.log2(sets) + 32 * size + 2 * (size.bit_length() - 1) + 1 + 2 for size, sets in rows)
    assert table.message_bits(0.0) <= full + 1e-6
    assert table.message_bits(0.0) > 20 * sum(size for size, _ in rows)


def test_unigrams_back_off_to_a_uniform_distribution():
    uniform = bc.count_ngrams(np.arange(8)[None], 1, d_vocab=8)
    assert uniform.message_bits(1e-6) == 0.0
    sharp = bc.count_ngrams(np.array([[3] * 8]), 1, d_vocab=8)
    # log2 8 for the token; that there is a row (share 1/2), that j is 1, that no mass is left
    assert sharp.message_bits(1e-6) == pytest.approx(3 + 3)


def test_trigrams_that_are_bigrams_in_disguise_cost_hardly_more_than_bigrams():
    rng = np.random.default_rng(0)
    chain = np.zeros((400, 30), int)
    for place in range(1, 30):  # the next token is a function of the current one and a coin
        chain[:, place] = (chain[:, place - 1] * 3 + rng.integers(0, 2, 400) + 1) % 16
    bigrams, trigrams = (bc.count_ngrams(chain, order, d_vocab=16) for order in (2, 3))
    assert 0 < trigrams.message_bits(0.25) < 1.5 * bigrams.message_bits(0.2)


def test_a_unigram_without_a_token_that_follows_is_no_obstacle():
    probs = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    table = bc.NGramTable.from_probs(probs, unigram=torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert math.isfinite(table.message_bits(0.01))


def test_bad_input_is_refused_and_large_tables_are_not_measured(table, monkeypatch):
    for kl in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"at least 0 nats per position, not {kl}"):
            table.message_bits(kl)
    monkeypatch.setattr(ngrams, "MOST_ENTRIES", 3)
    assert table.message_bits(0.1) is None
