"""The table against a dictionary: slow, obvious, and written from the definition."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import bigram_circuits as bc
from bigram_circuits.text import counting, ngrams, sorted_counts
from bigram_circuits.text.counting import NGramCounter

D_VOCAB = 6
texts = st.tuples(st.integers(1, 8), st.integers(3, 9)).flatmap(
    lambda shape: arrays(np.int32, shape, elements=st.integers(0, D_VOCAB - 2))  # the last token is never seen
)
queries = arrays(np.int64, (3, 7), elements=st.integers(0, D_VOCAB - 1))
orders = st.sampled_from([1, 2, 3])


class Dictionary:
    """P(next | longest context seen) from nested dictionaries."""

    def __init__(self, tokens, order):
        self.order = order
        self.counts = defaultdict(Counter)
        for row in tokens.tolist():
            for end in range(len(row)):
                for length in range(min(order - 1, end) + 1):
                    self.counts[tuple(row[end - length : end])][row[end]] += 1

    def row(self, before) -> dict[int, float]:
        for length in range(min(self.order - 1, len(before)), -1, -1):
            if (context := tuple(before[len(before) - length :])) in self.counts:
                counts = self.counts[context]
                return {token: count / counts.total() for token, count in counts.items()}
        raise AssertionError("the empty context is always seen")

    def probs(self, tokens) -> torch.Tensor:
        dense = torch.zeros(*tokens.shape, D_VOCAB, dtype=torch.float64)
        for i, row in enumerate(tokens.tolist()):
            for position in range(len(row)):
                for token, prob in self.row(row[: position + 1]).items():
                    dense[i, position, token] = prob
        return dense


def assert_same_table(first, second):
    assert first.fingerprint == second.fingerprint
    for ours, theirs in zip(first.levels, second.levels, strict=True):
        for name in ngrams.Level.__annotations__:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def dense_cross_entropy(logits, probs):
    return -(probs.to(logits) * logits.log_softmax(-1)).sum(-1)


@given(text=texts, tokens=queries, order=orders)
def test_probabilities_are_those_of_a_dictionary(text, tokens, order):
    table = bc.count_ngrams(text, order, d_vocab=D_VOCAB)
    expected = Dictionary(text, order).probs(tokens)
    log_probs = table.log_probs(tokens)
    torch.testing.assert_close(log_probs.exp().double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(tokens.shape))
    following = torch.from_numpy(tokens)[:, 1:, None]
    assert torch.equal(table.surprisal(tokens), -log_probs[:, :-1].gather(2, following).squeeze(2))
    torch.testing.assert_close(table.entropy(tokens).double(), torch.special.entr(expected).sum(-1))
    assert torch.equal(table.top1(tokens), expected.argmax(-1))  # of equals, the lowest


@given(text=texts, order=orders)
def test_the_table_is_that_of_a_plain_count_to_the_last_bit(text, order):
    table, counts = bc.count_ngrams(text, order, d_vocab=D_VOCAB), Dictionary(text, order).counts
    for length, level in enumerate(table.levels):
        rows = sorted((context, sorted(row.items())) for context, row in counts.items() if len(context) == length)
        totals = [sum(count for _, count in row) for _, row in rows]
        keys = [sum(token * D_VOCAB**place for place, token in enumerate(reversed(context))) for context, _ in rows]
        assert level.contexts.tolist() == keys
        assert level.offsets.tolist() == list(itertools.accumulate((len(row) for _, row in rows), initial=0))
        assert level.tokens.tolist() == [token for _, row in rows for token, _ in row]
        probs = [count / total for (_, row), total in zip(rows, totals, strict=True) for _, count in row]
        assert level.probs.tolist() == torch.tensor(probs, dtype=torch.float64).float().tolist()
        assert level.top.tolist() == [min(row, key=lambda entry: (-entry[1], entry[0]))[0] for _, row in rows]


@given(text=texts, order=orders, chunk=st.integers(1, 20), memory=st.sampled_from([1, 100, 1000, 4000]))
def test_streamed_counts_are_whole_counts(text, order, chunk, memory):
    whole = bc.count_ngrams(text, order, d_vocab=D_VOCAB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "_TOKENS_AT_ONCE", chunk)
        patch.setattr(sorted_counts, "_MERGED_AT_ONCE", chunk)
        patch.setattr(sorted_counts, "_REDUCED_AT_ONCE", chunk)
        assert_same_table(bc.count_ngrams(text, order, d_vocab=D_VOCAB, memory=memory), whole)
    counter = NGramCounter(order, D_VOCAB)
    for row in text[::-1]:  # in any order
        counter.add(row[None])
    assert_same_table(counter.freeze(), whole)


def test_backoff_goes_to_the_longest_context_seen():
    text = np.array([[0, 1, 2, 0, 1, 3]])
    table = bc.count_ngrams(text, 3, d_vocab=D_VOCAB)
    unigram = [2 / 6, 2 / 6, 1 / 6, 1 / 6, 0, 0]
    after_1, after_2 = [0, 0, 1 / 2, 1 / 2, 0, 0], [1, 0, 0, 0, 0, 0]
    cases = {
        (0, 1): after_1,  # the trigram's own row
        (1, 2): after_2,
        (4, 1): after_1,  # 4 1 was never seen, 1 was
        (2, 1): after_1,  # both seen, never in this order
        (1, 3): unigram,  # seen, but nothing follows 3
        (4, 5): unigram,
    }
    for context, expected in cases.items():
        assert table.log_probs(np.array([context]))[0, 1].exp().tolist() == pytest.approx(expected), context
    first = table.log_probs(np.array([[1], [4]])).exp()  # position 0: a trigram's context does not fit
    assert first[0, 0].tolist() == pytest.approx(after_1)
    assert first[1, 0].tolist() == pytest.approx(unigram)


def test_a_token_never_seen_after_a_seen_context_has_infinite_surprisal_and_is_not_backed_off():
    table = bc.count_ngrams(np.array([[0, 1, 0, 1, 2]]), 2, d_vocab=D_VOCAB)
    assert table.surprisal(np.array([[0, 2, 1, 5]])).tolist() == [
        [math.inf, pytest.approx(math.log(5 / 2)), math.inf]  # 0 was seen; 2 was not seen before anything; 1 was seen
    ]


@given(text=texts, tokens=queries, order=orders, seed=st.integers(0, 99), gathered=st.sampled_from([1, 7, 1 << 22]))
def test_cross_entropy_and_its_gradient_are_the_dense_formulas(text, tokens, order, seed, gathered):
    table = bc.count_ngrams(text, order, d_vocab=D_VOCAB)
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(3, 7, D_VOCAB, generator=generator)).requires_grad_()
    weights = torch.rand(3, 7, generator=generator)  # every position's gradient has a factor of its own
    expected = dense_cross_entropy(logits, Dictionary(text, order).probs(tokens))
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "_GATHERED_AT_ONCE", gathered)
        actual = table.cross_entropy(logits, tokens)
        (gradient,) = torch.autograd.grad((actual * weights).sum(), logits)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_a_token_is_not_found_in_the_row_of_the_next_context():
    table = bc.count_ngrams(np.array([[0, 1], [2, 3], [4, 5]]), 2, d_vocab=D_VOCAB)
    assert table.surprisal(np.array([[0, 1], [0, 3], [2, 5], [4, 5], [2, 1]])).flatten().tolist() == [
        0.0, math.inf, math.inf, 0.0, math.inf,
    ]  # fmt: skip


def test_cross_entropy_less_entropy_is_kl():
    rng = np.random.default_rng(0)
    table = bc.count_ngrams(rng.integers(0, D_VOCAB, (30, 9)), 2, d_vocab=D_VOCAB)
    tokens, logits = rng.integers(0, D_VOCAB, (3, 7)), torch.randn(3, 7, D_VOCAB)
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), table.log_probs(tokens), log_target=True, reduction="none")
    torch.testing.assert_close(table.cross_entropy(logits, tokens) - table.entropy(tokens), kl.nan_to_num(0.0).sum(-1))
    own = table.log_probs(tokens).clamp(min=-100.0)
    torch.testing.assert_close(table.cross_entropy(own, tokens), table.entropy(tokens))


def test_the_gradient_works_in_bfloat16_through_a_view_and_leaves_the_logits_alone():
    rng = np.random.default_rng(1)
    table = bc.count_ngrams(rng.integers(0, D_VOCAB, (9, 9)), 2, d_vocab=D_VOCAB)
    tokens = rng.integers(0, D_VOCAB, (3, 7))
    for dtype in (torch.bfloat16, torch.float32):
        stored = torch.randn(D_VOCAB, 7, 3).to(dtype).requires_grad_()
        before = stored.detach().clone()
        logits = stored.permute(2, 1, 0)
        table.cross_entropy(logits, tokens).mean().backward()
        assert torch.equal(stored.detach(), before)
        assert stored.grad.dtype == dtype
        reference = before.float().requires_grad_()
        probs = table.log_probs(tokens).exp()
        dense_cross_entropy(reference.permute(2, 1, 0), probs).mean().backward()
        assert (stored.grad.float() - reference.grad).abs().max() < (4e-4 if dtype is torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("order", [2, 3])
def test_a_vocabulary_whose_keys_need_64_bits_counts_alike(order):
    """Ids spread over 2 million: a dictionary over the small ids, mapped."""
    rng = np.random.default_rng(2)
    d_vocab = 2_000_000
    ids = np.sort(rng.choice(d_vocab, D_VOCAB, replace=False))
    ids[-1] = d_vocab - 1
    text, tokens = rng.integers(0, D_VOCAB, (20, 12)), rng.integers(0, D_VOCAB, (4, 9))
    small = bc.count_ngrams(text, order, d_vocab=D_VOCAB)
    big = bc.count_ngrams(ids[text], order, d_vocab=d_vocab)
    assert torch.equal(small.surprisal(tokens), big.surprisal(ids[tokens]))
    assert torch.equal(torch.from_numpy(ids)[small.top1(tokens)], big.top1(ids[tokens]))
    assert int(counting._keys(ids[text], order, d_vocab).max()) == max(
        sum(int(token) * d_vocab**place for place, token in enumerate(reversed(gram)))
        for row in ids[text]
        for gram in zip(*(row[start:] for start in range(order)), strict=False)
    )


def test_a_table_can_not_be_counted_over_a_vocabulary_too_large_for_64_bits():
    with pytest.raises(ValueError, match="cannot count 3-grams over a vocabulary of 3000000"):
        NGramCounter(3, 3_000_000)
