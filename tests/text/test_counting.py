"""Counters that are merged, stored and spilled, against `collections.Counter` of everything at once."""

import copy
import os
import pickle
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import bigram_circuits as bc
from bigram_circuits.storage.arrays import mapped_from
from bigram_circuits.text import counting, sorted_counts
from bigram_circuits.text.counting import NGramCounter

D_VOCAB = 7
orders = st.sampled_from([1, 2, 3])
shards = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 9)).flatmap(
        lambda shape: arrays(np.int32, shape, elements=st.integers(0, D_VOCAB - 1))
    ),
    max_size=4,
)
long_enough = arrays(np.int32, (2, 4), elements=st.integers(0, D_VOCAB - 1))


def plain(texts, order):
    """The counts of all n-grams of each length."""
    rows = [tuple(row) for text in texts for row in text.tolist()]
    return [Counter(row[at : at + n] for row in rows for at in range(len(row) - n + 1)) for n in range(1, order + 1)]


def check(table, texts, d_vocab=D_VOCAB):
    """The table is that of the plain counts, except that a context is not followed at the end of a sequence."""
    for n, (level, grams) in enumerate(zip(table.levels, plain(texts, table.order), strict=True), start=1):
        rows = {}
        for gram, count in sorted(grams.items()):
            rows.setdefault(gram[:-1], []).append((gram[-1], count))
        assert level.contexts.tolist() == [
            sum(token * d_vocab ** (n - 2 - place) for place, token in enumerate(row)) for row in rows
        ]
        assert level.offsets.diff().tolist() == [len(row) for row in rows.values()]
        assert level.tokens.tolist() == [token for row in rows.values() for token, _ in row]
        probs = [count / sum(times for _, times in row) for row in rows.values() for _, count in row]
        assert level.probs.tolist() == np.array(probs, np.float32).tolist()
        assert level.top.tolist() == [min(row, key=lambda one: (-one[1], one[0]))[0] for row in rows.values()]
        entropy = [-sum(count * np.log(count) for _, count in row) for row in rows.values()]
        totals = np.array([sum(count for _, count in row) for row in rows.values()])
        np.testing.assert_allclose(level.entropy.numpy(), np.array(entropy) / totals + np.log(totals), atol=1e-6)


@settings(max_examples=40)
@given(texts=shards, last=long_enough, order=orders, memory=st.sampled_from([300, 2000, 1 << 30]))
def test_merged_counts_are_whole_counts(texts, last, order, memory):
    texts = [*texts, last]
    whole = NGramCounter(order, D_VOCAB, memory=memory)
    for number, text in enumerate(texts):
        counter = NGramCounter(order, D_VOCAB)
        counter.add(text)
        before = counter.freeze().fingerprint if text.size and text.shape[1] >= order else None
        whole.merge(pickle.loads(pickle.dumps(counter)) if number % 2 else counter)
        assert before is None or counter.freeze().fingerprint == before
    check(whole.freeze(), texts)
    check(bc.count_ngrams(iter(texts), order, d_vocab=D_VOCAB, memory=memory), texts)


def zipf(rows, d_vocab, seed=0, length=32):
    return (np.random.default_rng(seed).zipf(1.3, (rows, length)) % d_vocab).astype(np.int32)


@pytest.mark.parametrize(("order", "d_vocab"), [(2, 300), (3, 300), (2, 100_000)])
def test_counts_beyond_the_budget_go_to_files_and_come_back(order, d_vocab, monkeypatch):
    """Including files that are merged to files."""
    monkeypatch.setattr(sorted_counts, "_MERGED_AT_ONCE", 500)
    monkeypatch.setattr(sorted_counts, "_FILES_TO_MERGE", 3)
    text = zipf(200, d_vocab)
    counter = NGramCounter(order, d_vocab, memory=1 << 13)
    for rows in np.split(text, 40):
        counter.add(rows)
    tiers = counter._counts[-1]._stored
    assert len(tiers) > 1
    assert all(mapped_from(run.keys) is not None for tier in tiers for run in tier)
    assert all(len(tier) < 3 for tier in tiers)
    table = counter.freeze()
    check(table, [text], d_vocab)
    counter.add(text)  # it goes on
    check(counter.freeze(), [text, text], d_vocab)
    unlimited = bc.count_ngrams(text, order, d_vocab=d_vocab)
    assert unlimited.fingerprint == table.fingerprint


def test_memory_stays_within_the_budget_while_the_counts_do_not():
    budget = 1 << 21
    counter = NGramCounter(2, 1 << 20, memory=budget)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    for _ in range(40):
        counter.add(rng.integers(0, 1 << 20, (100, 128), dtype=np.int32))  # nearly all are distinct
    table = counter.freeze()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.n_entries * 12 > 2.5 * budget
    pieces = 100 * (1 << 18)  # what is in hand at once, whatever the budget
    assert peak < budget + pieces


def test_keys_come_in_order_once(monkeypatch):
    monkeypatch.setattr(sorted_counts, "_MERGED_AT_ONCE", 50)
    rng = np.random.default_rng(1)
    counts, expected = sorted_counts.SortedCounts(np.uint64, 4_000), Counter()
    for size in (10, 3000, 500, 1):
        keys = rng.integers(0, 1 << 62, 900)[rng.integers(0, 900, size)].astype(np.uint64)
        counts.add(keys)
        expected.update(keys.tolist())
    pieces = [*sorted_counts.merged(counts.runs())]
    assert len(pieces) > 5
    keys, times = (np.concatenate(part) for part in zip(*pieces, strict=True))
    assert keys.tolist() == sorted(expected)
    assert dict(zip(keys.tolist(), times.tolist(), strict=True)) == expected
    assert [*sorted_counts.merged([])] == []


def test_more_occurrences_than_32_bits_hold_are_counted():
    most = np.iinfo(np.uint32).max
    run = sorted_counts.Run(np.array([3, 5], np.uint32), np.array([most - 1, 1], np.uint32), most)
    counts = sorted_counts.SortedCounts(np.uint32, 1 << 20)
    for _ in range(3):
        counts.add_run(run)
    found = counts.all()
    assert found.counts.tolist() == [3 * (most - 1), 3]
    assert found.total == 3 * most


# --- in files ---


@pytest.mark.parametrize("memory", [400, 1 << 30])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_saved_counter_is_the_same(tmp_path, order, memory):
    text, more = zipf(8, 20), zipf(8, 20, seed=1)
    counter = NGramCounter(order, 20, memory=memory)
    counter.add(text)
    counter.save(tmp_path / "counts")
    counter.add(more)  # not in the file
    again = NGramCounter.load(tmp_path / "counts", memory=memory)
    assert (again.order, again.d_vocab, again.memory) == (order, 20, memory)
    check(again.freeze(), [text], 20)
    again.save(tmp_path / "counts")  # over the file that it reads
    again.merge(NGramCounter.load(tmp_path / "counts"))
    check(again.freeze(), [text, text], 20)
    check(counter.freeze(), [text, more], 20)
    again.save(tmp_path / "a")
    for how in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        how(again).save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_counter_can_be_saved_and_merged(tmp_path):
    NGramCounter(2, 5).save(tmp_path / "counts")
    counter = NGramCounter.load(tmp_path / "counts")
    with pytest.raises(ValueError, match="the text has no 2-gram"):
        counter.freeze()
    counter.add(np.array([[1, 2]]))
    assert counter.freeze().n_entries == 1


@pytest.mark.parametrize("memory", [400, 1 << 30])
def test_a_table_written_by_freezing_is_the_one_that_is_saved(tmp_path, memory):
    text = zipf(20, 60)
    table = bc.count_ngrams(text, 3, d_vocab=60)
    table.save(tmp_path / "saved")
    frozen = bc.count_ngrams(text, 3, d_vocab=60, memory=memory, out=tmp_path / "frozen")
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "frozen").read_bytes()
    assert frozen.fingerprint == table.fingerprint
    bc.NGramTable.load(tmp_path / "frozen", verify=True).save(tmp_path / "again")
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "again").read_bytes()


def damaged_counters(folder: Path):
    from bigram_circuits.storage.records import seal_tensors, write_tensors

    def write(name, metadata=(), **arrays):
        given = {
            "keys_1": np.array([4], np.uint32), "counts_1": np.array([1], np.uint32),
            "keys_2": np.array([3, 9], np.uint32), "counts_2": np.array([2, 1], np.uint32),
        }  # fmt: skip
        given |= arrays
        given = {name: array for name, array in given.items() if array is not None}
        meta = {"format": "bigram_circuits.text.counting/1", "order": "2", "d_vocab": "5", **dict(metadata)}
        write_tensors(folder / name, given, seal_tensors(given, meta))
        return folder / name

    NGramCounter.load(write("good"))
    yield write("a", {"format": "other"}), "has format 'other', but"
    yield write("b", keys_2=np.array([9, 3], np.uint32)), "its 2-grams are not in order or outside the vocabulary"
    yield write("c", keys_2=np.array([3, 25], np.uint32)), "its 2-grams are not in order or outside the vocabulary"
    yield write("d", keys_2=np.array([3, 9], np.uint64)), "its 2-grams are uint64 with counts of uint32"
    yield write("e", counts_2=np.array([0, 1], np.uint32)), "it counts a 2-gram 0 times"
    yield write("f", counts_2=np.array([1], np.uint32)), r"have shape \(2,\), their counts \(1,\)"
    yield write("g", keys_1=None), "it has a missing or unknown tensor: 'keys_1'"
    yield write("h", {"order": "4"}), "order must be 1, 2 or 3, not 4"
    yield write("i", {"d_vocab": "five"}), "its d_vocab is 'five', not an integer"
    bad = write("j").read_bytes()
    (folder / "j").write_bytes(bad[:-1] + bytes([bad[-1] ^ 1]))
    yield folder / "j", "its checksum does not match its contents"
    (folder / "k").write_bytes(b"nothing")
    yield folder / "k", "holds no counts of n-grams"
    yield folder, "is a folder, but the counts of n-grams are one file"


def test_a_damaged_counter_is_refused(tmp_path):
    for path, said in damaged_counters(tmp_path):
        with pytest.raises(ValueError, match=said):
            NGramCounter.load(path)


def test_a_counter_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        NGramCounter.load(tmp_path / "none")


def test_a_disk_without_room_is_said(monkeypatch):
    counter = NGramCounter(2, 50, memory=1)
    monkeypatch.setattr(tempfile, "tempdir", "/dev/full/none")
    with pytest.raises(OSError, match=r"cannot write a temporary file in '/dev/full/none' \(TMPDIR names the folder\)"):
        counter.add(zipf(9, 50))


# --- in other processes ---


def test_processes_count_what_one_counts(tmp_path, monkeypatch):
    """Tokens in memory, of a file and of parts of a file; shards of several shapes."""
    monkeypatch.setattr(counting, "_TOKENS_APART", 2_000)
    text = zipf(300, 500)
    np.save(tmp_path / "tokens.npy", text)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")[100:]
    shards = [mapped[:90], torch.from_numpy(zipf(70, 500, seed=1, length=20)), text[:100, ::2], mapped[90:], text[:0]]
    found = bc.count_ngrams(iter(shards), 3, d_vocab=500, workers=2, memory=1 << 16)
    check(found, [np.asarray(shard) for shard in shards], 500)
    assert not [*Path(tempfile.gettempdir()).glob("bigram_circuits_*/*")] or os.environ.get("PYTEST_XDIST_WORKER")


def test_tokens_are_handed_over_by_the_file_they_are_in(tmp_path):
    text = np.arange(600, dtype=np.int16).reshape(50, 12)
    np.save(tmp_path / "tokens.npy", text)
    for mode, is_ours in (("r", False), ("r+", False), ("c", True)):  # changes of a copy on write are in memory
        mapped = np.load(tmp_path / "tokens.npy", mmap_mode=mode)
        for part in (mapped, mapped[7:30], np.asarray(mapped)[3:4]):
            handed = counting._in_file(part, str(tmp_path))
            assert handed.is_ours is is_ours
            assert np.array_equal(handed.tokens(), part)
    for part in (text, text[:, ::3], np.load(tmp_path / "tokens.npy", mmap_mode="r")[:, 2:]):
        handed = counting._in_file(part, str(tmp_path))
        assert handed.is_ours
        assert np.array_equal(handed.tokens(), part)


# --- what is refused ---


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tokens": [[1, 2], [3, 4]]}, r"tokens are of type list but should be an array of ids \[sequence, position\]"),
        ({"tokens": [np.array([1, 2])]}, r"tokens are int64 \(2,\) but should be an array of ids"),
        ({"tokens": [np.zeros((2, 2))]}, r"tokens are float64 \(2, 2\) but should be an array of ids"),
        ({"tokens": "text"}, "tokens have type str but should be an array of ids .*, or an iterable of these"),
        ({"tokens": []}, "the text has no 2-gram"),
        ({"workers": 0}, "workers must be at least 1 process, not 0"),
        ({"memory": 0}, "memory must be at least 1 byte, not 0"),
    ],
)
def test_what_cannot_be_counted_is_said(given, said):
    with pytest.raises(ValueError, match=said):
        bc.count_ngrams(**{"tokens": np.array([[1, 2]]), "d_vocab": 5, **given})


def test_counts_of_another_kind_are_not_merged():
    for other in (NGramCounter(3, 5), NGramCounter(2, 6)):
        with pytest.raises(ValueError, match=r"over a vocabulary of . cannot be merged into those of 2-grams over 5"):
            NGramCounter(2, 5).merge(other)
