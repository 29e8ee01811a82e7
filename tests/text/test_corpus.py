import json
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import bigram_circuits as bc
from bigram_circuits.text import corpus as module
from bigram_circuits.text.corpus import batch_of, document_position, in_order


def story(number: int) -> str:
    """A document whose every passage of a few bytes names it."""
    return " ".join(f"<{number}>" for _ in range(20 + number % 7))


STORIES = [story(number) for number in range(120)]


@pytest.fixture
def load(tokenizer):
    def load(source, **options):
        return bc.load_corpus(source, **{"tokenizer": tokenizer, "context_length": 16, "held_out": 0.25} | options)

    return load


def numbers_in(tokens, tokenizer) -> set[str]:
    """The numbers of the stories that an array of tokens was cut from."""
    text = tokenizer.decode(tokens.reshape(-1).tolist())
    return {word.strip("<>") for word in text.replace("<|endoftext|>", " ").split() if word[0] + word[-1] == "<>"}


def same(first, second) -> bool:
    return np.array_equal(first.train, second.train) and np.array_equal(first.held_out, second.held_out)


# --- sources ---


def write_jsonl(path, column="text", texts=STORIES):
    path.write_text("\n\n".join(json.dumps({column: text, "other": 1}) for text in texts), encoding="utf-8")
    return path


def write_parquet(path, column="text", texts=STORIES):
    pq.write_table(pa.table({"other": range(len(texts)), column: texts}), path)
    return path


def test_records_of_every_format_give_the_corpus_of_the_list_of_their_texts(load, tmp_path):
    expected = load(STORIES)
    halves = tmp_path / "halves"
    halves.mkdir()
    (halves / "notes.csv").write_text("no,text")
    first = write_jsonl(halves / "a.jsonl", texts=STORIES[:50])
    second = write_parquet(halves / "b.parquet", texts=STORIES[50:])
    sources = {
        "jsonl": write_jsonl(tmp_path / "all.jsonl"),
        "parquet": write_parquet(tmp_path / "all.parquet"),
        "name of a file": str(tmp_path / "all.jsonl"),
        "folder": halves,
        "paths": [first, second],
        "dataset": datasets.Dataset.from_dict({"text": STORIES}),
        "streamed dataset": datasets.Dataset.from_dict({"text": STORIES}).to_iterable_dataset(),
        "generator of str": (text for text in STORIES),
        "with empty documents": ["", *STORIES, " \n"],
    }
    for name, source in sources.items():
        assert same(load(source), expected), name
        assert load(STORIES).documents == expected.documents
    for source in (write_jsonl(tmp_path / "c.jsonl", "body"), write_parquet(tmp_path / "c.parquet", "body")):
        assert same(load(source, text_column="body"), expected)


def test_a_text_file_is_cut_into_passages_at_blank_lines_that_together_are_the_file(load, tmp_path, tokenizer):
    paragraphs = [f"paragraph {number}\n" * 30 + "\n" for number in range(60)]
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(paragraphs).encode())  # with a byte order mark
    corpus = load(path, context_length=8)
    assert sum(corpus.documents) == 10
    pieces = {
        part: tokenizer.decode(getattr(corpus, part).reshape(-1).tolist()).split("<|endoftext|>")[1:]
        for part in ("train", "held_out")
    }
    for passages in pieces.values():
        assert all(2_000 <= len(passage) < 2_500 and passage.endswith("\n\n") for passage in passages[:-1])
    whole = load(path, held_out=0.0, context_length=8)
    assert "".join(paragraphs).startswith(tokenizer.decode(whole.train.reshape(-1).tolist(), skip_special_tokens=True))


def test_a_text_without_line_ends_is_cut_too(load, tmp_path, tokenizer):
    path = tmp_path / "line.txt"
    path.write_text("".join(f"{number} " for number in range(10_000)))
    corpus = load(path)
    assert sum(corpus.documents) == 7  # of at most 8,000 characters


def test_text_is_tokenised_as_the_tokenizer_does_with_a_separator_before_every_document(load, tokenizer):
    corpus = load(["Grüße, 世界!"] * 4, held_out=0.0, context_length=2)
    expected = [0, *tokenizer("Grüße, 世界!")["input_ids"]] * 4
    assert corpus.train.reshape(-1).tolist() == expected[: len(expected) // 2 * 2]
    assert corpus.train.dtype == np.int32
    assert corpus.held_out.shape == (0, 2)


def test_the_reference_corpus_holds_out_the_same_documents_whatever_the_seed(tokenizer, monkeypatch):
    documents = [(f"topic/{number}", text) for number, text in enumerate(STORIES)]
    monkeypatch.setattr("bigram_circuits.text.reference.reference_documents", lambda: iter(documents))
    first, second = (bc.load_corpus(tokenizer=tokenizer, context_length=16, seed=seed) for seed in (0, 1))
    assert first.fingerprint == second.fingerprint
    held = {str(number) for number, (name, _) in enumerate(documents) if document_position(name) < 0.05}
    assert numbers_in(first.held_out, tokenizer) == held


# --- the split ---


@given(
    numbers=st.lists(st.integers(0, 30), min_size=12, max_size=60).filter(lambda them: len(set(them)) > 6),
    held_out=st.sampled_from([0.001, 0.1, 0.5]),
    seed=st.integers(0, 5),
)
def test_the_parts_share_no_document_also_with_duplicates_and_a_topped_up_held_out_part(
    load_session, tokenizer, numbers, held_out, seed
):
    stories = [story(number) for number in numbers]
    assume(max(document_position(text, str(seed)) for text in stories) >= held_out)  # or nothing is left to learn from
    corpus = load_session(stories, held_out=held_out, seed=seed)
    assert len(corpus.held_out) >= 1
    assert not numbers_in(corpus.train, tokenizer) & numbers_in(corpus.held_out, tokenizer)
    assert sum(corpus.documents) == len(numbers)


@pytest.fixture(scope="module")
def load_session(tokenizer):
    return lambda source, **options: bc.load_corpus(source, tokenizer=tokenizer, context_length=16, **options)


def test_documents_are_held_out_by_the_hash_of_their_text_in_about_the_share_asked_for(load, tokenizer):
    many = [f"{number}: " + "words " * 5 for number in range(2_000)]
    corpus = load(many, seed=3)
    held = {text for text in many if document_position(text, "3") < 0.25}
    assert corpus.documents == (2_000 - len(held), len(held))
    assert len(held) == pytest.approx(500, abs=80)  # 4 standard deviations
    whole = set(tokenizer.decode(corpus.held_out.reshape(-1).tolist()).split("<|endoftext|>")[1:-1])
    assert len(whole) >= len(held) - 1  # the last may be cut
    assert whole <= held


def test_the_fingerprint_tells_splits_and_lengths_apart_and_nothing_else(load):
    corpus = load(STORIES)
    assert corpus.fingerprint == load(list(STORIES)).fingerprint
    others = [load(STORIES, seed=1), load(STORIES, context_length=8), load(STORIES, held_out=0.5), load(STORIES[:-1])]
    fingerprints = {corpus.fingerprint, *(other.fingerprint for other in others)}
    assert len(fingerprints) == 5
    assert len({other.tokenizer_hash for other in (corpus, *others)}) == 1


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_max_tokens_bounds_both_parts_together_and_stops_reading(load, monkeypatch, held_out):
    monkeypatch.setattr(module, "_FIRST_CHARACTERS", 300)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 600)
    read = []
    corpus = load((read.append(text) or text for text in STORIES), max_tokens=500, held_out=held_out)
    assert 500 - 2 * 16 < corpus.train.size + corpus.held_out.size <= 500
    assert sum(corpus.documents) == 6  # the first stories, of 80 to 100 tokens, that 500 tokens reach into
    assert len(read) < 15


# --- large corpora ---


def test_a_large_corpus_lives_on_disk_with_the_same_content(load, monkeypatch):
    in_memory = load(STORIES)
    assert not isinstance(in_memory.train, np.memmap)
    monkeypatch.setattr(module, "_IN_MEMORY_BYTES", 2_000)
    on_disk = load(STORIES)
    assert isinstance(on_disk.train, np.memmap)
    assert isinstance(on_disk.held_out, np.memmap)
    assert not on_disk.train.flags.writeable
    assert same(in_memory, on_disk)
    assert in_memory.fingerprint == on_disk.fingerprint
    assert torch.equal(batch_of(on_disk.train, 4, step=3), batch_of(in_memory.train, 4, step=3))


def test_memory_does_not_grow_with_the_text(load, monkeypatch):
    monkeypatch.setattr(module, "_IN_MEMORY_BYTES", 40_000)
    monkeypatch.setattr(module, "_FIRST_CHARACTERS", 5_000)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 5_000)

    def peak(n_documents):
        tracemalloc.start()
        try:
            corpus = load(f"{number} " * 60 for number in range(n_documents))
            return tracemalloc.get_traced_memory()[1], 4 * (corpus.train.size + corpus.held_out.size)
        finally:
            tracemalloc.stop()

    (small, _), (large, size_of_tokens) = peak(800), peak(4_000)
    assert size_of_tokens > 4_000_000
    assert large < small + 0.1 * size_of_tokens


# --- batches ---


@given(n=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_visits_sequences_at_most_once_and_leaves_out_less_than_a_batch(n, batch_size, seed, epoch):
    tokens = np.arange(2 * n, dtype=np.int32).reshape(n, 2)
    size = min(n, batch_size)
    steps = range(epoch * (n // size), (epoch + 1) * (n // size))
    batches = {step: batch_of(tokens, batch_size, step=step, seed=seed) for step in steps}
    for step in reversed(steps):  # a pure function: in any order, the same
        assert torch.equal(batch_of(tokens, batch_size, step=step, seed=seed), batches[step])
    firsts = torch.cat(list(batches.values()))[:, 0].tolist()
    assert len(set(firsts)) == len(firsts) == n // size * size


def test_epochs_and_seeds_have_orders_of_their_own():
    tokens = np.arange(200, dtype=np.int32).reshape(100, 2)
    orders = [batch_of(tokens, 100, step=step, seed=seed) for step in (0, 1) for seed in (0, 1)]
    assert len({tuple(order[:, 0].tolist()) for order in orders}) == 4
    assert not torch.equal(orders[0], torch.from_numpy(tokens).long())
    assert orders[0].dtype == torch.int64


def test_in_order_gives_every_sequence_once_in_order(load):
    tokens = load(STORIES).train[:23]
    batches = list(in_order(tokens, 5))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert np.array_equal(torch.cat(batches).numpy(), tokens)


def test_there_is_no_batch_of_nothing():
    with pytest.raises(ValueError, match="no sequences"):
        batch_of(np.zeros((0, 4), np.int32), 2, step=0)
