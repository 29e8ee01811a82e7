"""What a user gets wrong is answered in one line that says what came and what was wanted."""

import re
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bigram_circuits as bc

STORIES = [f"the story of {number} " * 5 for number in range(40)]


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def written(path, content):
    path.write_bytes(content)
    return path


# name of the mistake: (what makes the source, the error, what its one line says)
WRONG_SOURCES = {
    "encoding": (
        lambda folder: written(folder / "latin.txt", "Grüße".encode("latin-1")), ValueError,
        ["latin.txt", "not UTF-8", "0xfc"],
    ),
    "encoding of JSON lines": (
        lambda folder: written(folder / "latin.jsonl", '{"text": "Grüße"}'.encode("latin-1")), ValueError,
        ["latin.jsonl", "not UTF-8", "0xfc"],
    ),
    "no such path": (lambda folder: folder / "nothing.txt", FileNotFoundError, ["nothing.txt"]),
    "no such file name": (lambda folder: "nothing.txt", FileNotFoundError, ["nothing.txt"]),
    "no such folder": (lambda folder: str(folder / "nothing"), FileNotFoundError, ["nothing"]),
    "no such path in a list": (
        lambda folder: [written(folder / "a.txt", b"text"), folder / "b.txt"], FileNotFoundError, ["b.txt"]
    ),
    "JSON without the field": (
        lambda folder: written(folder / "a.jsonl", b'{"text": "fine"}\n{"body": "x"}\n'), ValueError,
        ["line 2", "a.jsonl", "['body']", "'text'"],
    ),
    "JSON with a number for text": (
        lambda folder: written(folder / "a.jsonl", b'{"text": 3}\n'), ValueError, ["line 1", "a.jsonl", "text field"]
    ),
    "JSON that is a list": (
        lambda folder: written(folder / "a.jsonl", b"[1]\n"), ValueError, ["line 1", "a.jsonl", "list", "'text'"]
    ),
    "no JSON": (
        lambda folder: written(folder / "a.jsonl", b'{"text": "fine"}\nplain words\n'), ValueError,
        ["line 2", "a.jsonl", "not JSON"],
    ),
    "no Parquet": (lambda folder: written(folder / "a.parquet", b"x" * 99), ValueError, ["a.parquet", "not a Parquet"]),
    "Parquet without the column": (
        lambda folder: parquet(folder / "a.parquet", body=["x"]), ValueError, ["a.parquet", "['body']", "'text'"]
    ),
    "Parquet of numbers": (
        lambda folder: parquet(folder / "a.parquet", text=[1, 2]), ValueError, ["a.parquet", "'text'", "int"]
    ),
    "dataset without the column": (
        lambda folder: datasets.Dataset.from_dict({"body": ["x"]}), ValueError, ["record 0", "['body']", "'text'"]
    ),
    "all splits of a dataset": (
        lambda folder: datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": STORIES})), ValueError,
        ["DatasetDict", "'train'"],
    ),
    "folder without text": (
        lambda folder: written(folder / "a.bin", b"\x00\x01" * 99).parent, ValueError,
        ["holds no text", ".jsonl", ".txt", "a.bin (binary"],
    ),
    "empty list": (lambda folder: [], ValueError, ["0 documents", "0 tokens"]),
    "empty file": (lambda folder: written(folder / "a.txt", b""), ValueError, ["a.txt", "0 tokens"]),
    "blank documents": (lambda folder: ["", "  \n"], ValueError, ["0 tokens"]),
    "one token": (lambda folder: ["a"], ValueError, ["training part", "16 tokens"]),
    "one document for two parts": (lambda folder: ["a" * 500], ValueError, ["training part", "0 tokens", "held_out"]),
    "text instead of a name": (lambda folder: "Once upon a time\n" * 500, ValueError, ["Once upon", "list of str"]),
    "empty name": (lambda folder: "", ValueError, ["''"]),
    "number": (lambda folder: 5, ValueError, ["int", "list of str"]),
    "paths and texts together": (lambda folder: ["some text", Path("a.txt")], ValueError, ["record 1", "Path"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG_SOURCES)
def test_a_wrong_source_is_answered_in_one_line(tmp_path, tokenizer, mistake):
    make, kind, words = WRONG_SOURCES[mistake]
    with pytest.raises(kind) as caught:
        bc.load_corpus(make(tmp_path), tokenizer=tokenizer, context_length=16)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_length": 1}, "context_length must be at least 2 tokens, not 1"),
        ({"context_length": 0}, "not 0"),
        ({"held_out": 1.0}, "from 0 to below 1, not 1.0"),
        ({"held_out": -0.1}, "not -0.1"),
        ({"held_out": float("nan")}, "not nan"),
        ({"max_tokens": 31}, "one sequence in each part (32), not 31"),
        ({"tokenizer": None}, "tokenizer is None"),
        ({"context_length": 5_000}, "one sequence is 5000 tokens"),
        ({"held_out": 0.999}, "held_out than 0.999"),
    ],
)
def test_an_option_out_of_range_is_answered_in_one_line(tokenizer, options, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        bc.load_corpus(STORIES, **{"tokenizer": tokenizer, "context_length": 16} | options)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_at_once(tokenizer, no_network, capfd):
    with pytest.raises(
        ValueError, match=r"neither a file or folder here nor a dataset that could be loaded \("
    ) as caught:
        bc.load_corpus("nobody/nothing", tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # no talk of retries


def test_a_name_that_is_neither_here_nor_a_dataset_is_answered_in_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"neither a file or folder here nor a dataset .*Couldn't reach the hub\)$"):
        bc.load_corpus("nobody/nothing", tokenizer=tokenizer)


def test_a_dataset_is_streamed_by_its_name_and_configuration(tokenizer, monkeypatch):
    asked = []

    def stream(path, configuration, *, split, streaming):
        asked.append((path, configuration, split, streaming))
        return datasets.Dataset.from_dict({"text": STORIES}).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    corpus = bc.load_corpus("some/name:small", tokenizer=tokenizer, context_length=16)
    assert asked == [("some/name", "small", "train", True)]
    assert corpus.fingerprint == bc.load_corpus(STORIES, tokenizer=tokenizer, context_length=16).fingerprint
    assert corpus.sample == ""
    sample = bc.load_corpus("some/name:small", tokenizer=tokenizer, context_length=16, max_tokens=1_000)
    assert sample.sample == "its first 1,000 tokens"
    assert repr(sample).startswith("Corpus('some/name:small', its first 1,000 tokens: ")


def test_a_shuffled_stream_is_read_in_its_order_and_says_so(tokenizer):
    stream = datasets.Dataset.from_dict({"text": STORIES, "n": [*range(len(STORIES))]}).to_iterable_dataset()
    shuffled = stream.shuffle(seed=7, buffer_size=20)
    texts = [record["text"] for record in shuffled]
    assert texts != STORIES
    corpus = bc.load_corpus(shuffled, tokenizer=tokenizer, context_length=16, max_tokens=2_000)
    same = bc.load_corpus(texts, tokenizer=tokenizer, context_length=16, max_tokens=2_000)
    assert corpus.fingerprint == same.fingerprint
    assert corpus.source == "dataset IterableDataset, shuffled in a buffer of 20 with seed 7"
    assert (corpus.sample, same.sample) == ("its first 2,000 tokens",) * 2
    assert "shuffled" in bc.load_corpus(shuffled.take(30), tokenizer=tokenizer, context_length=16).source
    assert "shuffled" not in bc.load_corpus(stream, tokenizer=tokenizer, context_length=16).source


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gpt2", r"tokenizer is the name 'gpt2', but should be a tokenizer: model.tokenizer, or transformers.AutoTok"),
        (Path("folder"), "tokenizer is the name 'folder'"),
        (3, "tokenizer is a int, but should be a tokenizer, such as model.tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        bc.load_corpus(["some text"] * 9, tokenizer=given)
