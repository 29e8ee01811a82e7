"""Files, wrong input and the memory of n-gram tables."""

import inspect
import re
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import bigram_circuits as bc
from bigram_circuits.text import ngrams
from bigram_circuits.text.counting import NGramCounter
from bigram_circuits.text.ngrams import NGramTable

D_VOCAB = 50


@pytest.fixture
def text():
    return np.random.default_rng(0).integers(0, D_VOCAB - 10, (40, 16))


@pytest.fixture(params=[1, 2, 3])
def table(request, text):
    return bc.count_ngrams(text, request.param, d_vocab=D_VOCAB)


class Sizes(TorchDispatchMode):
    """Notes the size of every block of memory that a tensor is made in."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = max(storage.nbytes(), self.made.get(storage.data_ptr(), 0))
        return result

    def larger_than(self, size, known=()) -> int:
        return sum(made >= size for pointer, made in self.made.items() if pointer not in known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_makes_no_tensor_of_the_logits_size_but_the_gradient(monkeypatch, dtype):
    d_vocab = 5_000
    monkeypatch.setattr(ngrams, "_GATHERED_AT_ONCE", 1 << 14)
    monkeypatch.setattr(ngrams, "_LOGITS_AT_ONCE", 1 << 14)
    text = np.random.default_rng(0).integers(0, d_vocab, (8, 64))
    table = bc.count_ngrams(text, 2, d_vocab=d_vocab)
    logits = torch.randn(8, 64, d_vocab, dtype=dtype, requires_grad=True)
    size, known = 2 * logits.numel(), {logits.untyped_storage().data_ptr()}
    with Sizes() as forward:
        loss = table.cross_entropy(logits, text).sum()
    assert forward.larger_than(size / 10, known) == 0
    with Sizes() as backward:
        loss.backward()
    # in bfloat16 the gradient is made in float32, then rounded
    assert backward.larger_than(size / 10, known) == (1 if dtype is torch.float32 else 2)


def test_counting_makes_nothing_of_the_size_of_all_pairs():
    d_vocab = 1 << 20  # squared: a million million
    table = bc.count_ngrams(np.array([[0, d_vocab - 1, 5, 0, 5]]), 2, d_vocab=d_vocab)
    assert [len(level.tokens) for level in table.levels] == [3, 4]


def test_a_counter_holds_distinct_n_grams_whatever_the_length_of_the_text():
    counter, rng = NGramCounter(2, D_VOCAB, memory=1 << 19), np.random.default_rng(0)
    tracemalloc.start()
    held = []
    for _ in range(200):
        counter.add(rng.integers(0, D_VOCAB, (500, 20)))
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(held) < counter.memory  # of keys and counts of everything: 10 times as much
    assert counter.freeze().n_entries == D_VOCAB**2


def test_numpy_and_torch_tokens_of_any_integer_type_give_the_same(table, text):
    rng = np.random.default_rng(3)
    tokens, logits = rng.integers(0, D_VOCAB, (3, 7)), torch.randn(3, 7, D_VOCAB)
    for kind in (np.int16, np.int32, np.int64):
        assert bc.count_ngrams(text.astype(kind), table.order, d_vocab=D_VOCAB).fingerprint == table.fingerprint
    for other in (torch.from_numpy(tokens), torch.from_numpy(tokens.astype(np.int32)), tokens.astype(np.int16)):
        for method in (table.surprisal, table.log_probs, table.entropy, table.top1):
            assert torch.equal(method(tokens), method(other))
        assert torch.equal(table.cross_entropy(logits, tokens), table.cross_entropy(logits, other))
    counted = bc.count_ngrams(torch.from_numpy(text), table.order, d_vocab=D_VOCAB)
    assert counted.fingerprint == table.fingerprint


def test_counting_leaves_the_text_as_it_was(text):
    text.setflags(write=False)
    bc.count_ngrams(text, 3, d_vocab=D_VOCAB)


def test_a_sequence_of_one_token_has_a_distribution_but_no_surprisal(table):
    assert table.surprisal(np.array([[3], [4]])).shape == (2, 0)
    assert table.log_probs(np.array([[3], [4]])).shape == (2, 1, D_VOCAB)


def test_n_grams_do_not_run_across_sequences():
    table = bc.count_ngrams(np.array([[0, 1], [2, 3]]), 2, d_vocab=4)
    assert table.n_entries == 2
    assert table.surprisal(np.array([[1, 2]])).item() == pytest.approx(np.log(4))  # 1 is followed by nothing


def test_save_and_load_give_the_same_table(table, tmp_path):
    table.save(tmp_path / "new" / "table.safetensors")
    loaded = NGramTable.load(tmp_path / "new" / "table.safetensors")
    assert (loaded.order, loaded.d_vocab, repr(loaded)) == (table.order, table.d_vocab, repr(table))
    for ours, theirs in zip(table.levels, loaded.levels, strict=True):
        for name in ngrams.Level.__annotations__:
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
            assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert loaded.fingerprint == table.fingerprint


def test_the_fingerprint_changes_with_text_order_and_vocabulary(text):
    tables = [bc.count_ngrams(text, order, d_vocab=D_VOCAB) for order in (1, 2, 3)]
    tables += [bc.count_ngrams(text[:-1], 2, d_vocab=D_VOCAB), bc.count_ngrams(text, 2, d_vocab=D_VOCAB + 1)]
    assert len({table.fingerprint for table in tables}) == 5


def test_loading_something_else_says_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError):
        NGramTable.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        NGramTable.load(tmp_path)
    (tmp_path / "text").write_text("no table")
    with pytest.raises(ValueError, match="is not an n-gram table"):
        NGramTable.load(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "other", {"format": "bigram_circuits.text.ngrams/99"})
    with pytest.raises(
        ValueError, match=r"has format 'bigram_circuits.text.ngrams/99', but 'bigram_circuits.text.ngrams/1'"
    ):
        NGramTable.load(tmp_path / "other")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="has format None"):
        NGramTable.load(tmp_path / "plain")


@pytest.mark.parametrize("wrong", [-1, D_VOCAB])
def test_a_token_outside_the_vocabulary_is_named(table, wrong):
    tokens = np.array([[1, wrong, 2]])
    with pytest.raises(ValueError, match=rf"token id {wrong} is outside the vocabulary of {D_VOCAB}"):
        bc.count_ngrams(tokens, 2, d_vocab=D_VOCAB)
    for method in (table.surprisal, table.log_probs, table.entropy, table.top1):
        with pytest.raises(ValueError, match=f"over a vocabulary of {D_VOCAB}"):
            method(tokens)


@pytest.mark.parametrize("shape", [(3, 7, D_VOCAB + 1), (3, 6, D_VOCAB), (2, 7, D_VOCAB)])
def test_logits_of_another_vocabulary_or_other_positions_are_refused(table, shape):
    wanted = re.escape(f"logits have shape {shape} but should have shape (3, 7, {D_VOCAB})")
    cross_entropy = inspect.unwrap(NGramTable.cross_entropy)  # past the annotations' own check of the positions
    with pytest.raises(ValueError, match=wanted):
        cross_entropy(table, torch.zeros(shape), np.zeros((3, 7), np.int64))


def test_text_without_an_n_gram_and_orders_unknown_are_refused(text):
    with pytest.raises(ValueError, match="has no 3-gram: every sequence is shorter than 3 tokens"):
        bc.count_ngrams(text[:, :2], 3, d_vocab=D_VOCAB)
    with pytest.raises(ValueError, match="has no 1-gram"):
        bc.count_ngrams(text[:0], 1, d_vocab=D_VOCAB)
    for order in (0, 4):
        with pytest.raises(ValueError, match=f"order must be 1, 2 or 3, not {order}"):
            NGramCounter(order, D_VOCAB)
