"""Files and folders are recognised by content; everything is read as it should be, or refused in words."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import bigram_circuits as bc
from bigram_circuits.text import sources
from bigram_circuits.text.formats import recognised
from bigram_circuits.text.sources import open_source

TEXTS = [f"the story of {number}, \u00e9 " * 4 for number in range(30)]
LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(TEXTS))


def table(delimiter=",", **options) -> str:
    written = io.StringIO()
    rows = csv.writer(written, delimiter=delimiter, **options)
    rows.writerow(["id", "text"])
    rows.writerows(enumerate(TEXTS))
    return written.getvalue()


def zstandard(data: bytes, frames: int = 1) -> bytes:
    size = len(data) // frames + 1
    codec = pa.Codec("zstd")
    return b"".join(codec.compress(data[at : at + size], asbytes=True) for at in range(0, len(data), size))


def arrow(*, stream: bool) -> bytes:
    sink = pa.BufferOutputStream()
    rows = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), sink)
    return sink.getvalue().to_pybytes()


def texts_in(source, text_column="text") -> list[str]:
    return [text for _, text in open_source(source, text_column).documents]


RECORDS = {  # file name -> content; all hold the same documents
    "a.jsonl": LINES.encode(),
    "a.JSONL": LINES.encode(),
    "a.ndjson": LINES.encode(),
    "a.jsonlines": LINES.encode(),
    "a.json": LINES.encode(),
    "list.json": json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "strings.json": json.dumps(TEXTS).encode(),
    "a.txt": LINES.encode(),
    "a": LINES.encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.JSONL.GZ": gzip.compress(LINES.encode()[:999]) + gzip.compress(LINES.encode()[999:]),
    "gz": gzip.compress(LINES.encode()),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
    "a.jsonl.zst": zstandard(LINES.encode()),
    "frames.ndjson.zst": zstandard(LINES.encode(), frames=3),
    "skippable.jsonl.zst": b"\x5a\x2a\x4d\x18\x04\0\0\0abcd" + zstandard(LINES.encode(), frames=2),
    "a.csv": table().encode(),
    "quoted.CSV": table(quoting=csv.QUOTE_ALL).encode(),
    "semicolon.csv": table(";").encode(),
    "a.tsv": table("\t").encode(),
    "a.csv.gz": gzip.compress(table().encode()),
    "marked.csv": table().encode("utf-8-sig"),
    "utf-16.jsonl": LINES.encode("utf-16"),
    "utf-16.csv": table().encode("utf-16"),
    "utf-32.jsonl": LINES.encode("utf-32"),
    "a.parquet": parquet(),
    "parquet": parquet(),
    "a.arrow": arrow(stream=True),
    "file.arrow": arrow(stream=False),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_recognised_whatever_the_file_is_called(tmp_path, name):
    (tmp_path / name).write_bytes(RECORDS[name])
    assert texts_in(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.txt", str.encode),
        ("a.TXT", str.encode),
        ("notes", str.encode),
        ("a.py", str.encode),
        ("utf-8.txt", lambda text: text.encode("utf-8-sig")),
        ("utf-16.txt", lambda text: text.encode("utf-16")),
        ("utf-16-be.txt", lambda text: b"\xfe\xff" + text.encode("utf-16-be")),
        ("a.txt.gz", lambda text: gzip.compress(text.encode())),
        ("a.txt.zst", lambda text: zstandard(text.encode())),
    ],
)
def test_prose_is_read_as_it_is(tmp_path, name, encode):
    prose = "{curly} brackets, [square] ones, \u00e9, and\r\n" * 50
    (tmp_path / name).write_bytes(encode(prose))
    assert "".join(texts_in(tmp_path / name)) == prose.replace("\r\n", "\n")


@pytest.mark.parametrize(
    "row",
    [
        '{"text": "fine", "other": {"a": 1, "a": 2}}',
        '{"text": "fine", "other": NaN}',
        '{"text": "fine", "other": [1, "two", null]}',
        '{"text": "fine", "other": "\\ud800"}',
        f'{{"other": 1{"0" * 9_999}, "text": "fine"}}',
        f'{{"other": {"[" * 90}{"]" * 90}, "text": "fine"}}',
        '{"text": null, "other": "left out"}\n{"text": "fine"}',
    ],
)
def test_another_field_may_hold_anything(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "first", "other": 1}}\n{row}\n')
    assert texts_in(tmp_path / "a.jsonl") == ["first", "fine"]


def test_a_folder_is_read_by_content_and_says_what_it_left_out(tmp_path, tokenizer):
    files = {
        "a.jsonl": LINES.encode(),
        "b.jsonl.gz": gzip.compress(LINES.encode()),
        "sub/c.TXT": b"prose\n" * 20,
        "sub/d.CSV": table().encode(),
        "README.md": b"# What this is",
        "LICENSE": b"Do what you want",
        "state.json": b'{"fingerprint": "ab"}',
        "image.png": b"\x89PNG\r\n\x1a\n\x00\x00",
        "train.bin": np.arange(5_000, dtype=np.uint16).tobytes(),
        ".git/HEAD": b"ref: refs/heads/main",
        ".ipynb_checkpoints/a.txt": b"old",
        "._a.jsonl": b"\x00\x05\x16\x07",
        "sub/__pycache__/x.txt": b"no",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert texts_in(tmp_path) == [*TEXTS, *TEXTS, "prose\n" * 20, *TEXTS]
    corpus = bc.load_corpus(tmp_path, tokenizer=tokenizer, context_length=16)
    assert corpus.reading is not None
    assert [one.path.name for one in corpus.reading.read] == ["a.jsonl", "b.jsonl.gz", "c.TXT", "d.CSV"]
    reasons = dict(corpus.reading.skipped)
    assert {name for name, why in reasons.items() if why == "hidden"} == {
        ".git", ".ipynb_checkpoints", "._a.jsonl", "sub/__pycache__",
    }  # fmt: skip
    assert reasons["README.md"] == reasons["LICENSE"] == "describes the records"
    assert reasons["state.json"] == "one record without 'text'"
    assert reasons["image.png"].startswith("binary")
    assert reasons["train.bin"] == "binary (give token ids to Corpus.from_tokens)"
    words = str(corpus.reading)
    assert words.startswith("4 files read (2 of JSON lines, 1 of text, 1 of CSV), 9 skipped: ")
    assert "and 4 more" in words
    assert "\n" not in words


def test_in_a_folder_of_prose_a_readme_is_prose(tmp_path):
    for name in ("README.md", "a.md"):
        (tmp_path / name).write_text(f"{name} has words")
    assert texts_in(tmp_path) == ["README.md has words", "a.md has words"]


def test_links_to_folders_are_not_followed_and_odd_names_are_escaped(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "a\n\x1b[31m.bin").write_bytes(b"\x00")
    reading = open_source(tmp_path, "text").reading
    assert reading is not None
    assert len(reading.read) == 1
    assert "loop (a link to a folder)" in str(reading)
    assert r"'a\n\x1b[31m.bin' (binary" in str(reading)


def saved(folder: Path, name: str, save) -> Path:
    save(folder / name)
    return folder / name


def written(folder: Path, name: str, content: bytes | str) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


NO_TEXT = {  # what is given: (how it is made, what its one line says)
    "a NumPy array": (
        lambda at: saved(at, "a.npy", lambda path: np.save(path, np.arange(9))), ["NumPy", "from_tokens"]
    ),
    "arrays in a zip": (lambda at: saved(at, "a.npz", lambda path: np.savez(path, a=np.arange(9))), ["a zip archive"]),
    "tensors": (
        lambda at: saved(at, "a.safetensors", lambda path: save_file({"a": torch.zeros(9)}, path)),
        ["safetensors", "Corpus.from_tokens"],
    ),
    "a pickle": (lambda at: saved(at, "a.pt", lambda path: torch.save([1], path)), ["a zip archive"]),
    "16-bit tokens": (
        lambda at: written(at, "a.bin", np.arange(9_000, dtype=np.uint16).tobytes()), ["binary", "Corpus.from_tokens"]
    ),
    "large 16-bit tokens": (
        lambda at: written(at, "a.bin", np.arange(257, 65_000, 3, dtype=np.uint16).tobytes()), ["binary"]
    ),
    "UTF-16 without a mark": (lambda at: written(at, "a.txt", "words".encode("utf-16-le")), ["a.txt", "iconv"]),
    "UTF-16 in the wrong order": (
        lambda at: written(at, "a.txt", b"\xff\xfe\x00\xd8\x41\x00"), ["a.txt", "not UTF-16", "iconv"]
    ),
    "Latin-1": (lambda at: written(at, "a", "Gr\u00fc\u00dfe, ".encode("latin-1") * 9), ["not UTF-8", "0xfc", "iconv"]),
    "a PDF": (lambda at: written(at, "a.pdf", b"%PDF-1.7 words"), ["a PDF"]),
    "packed Parquet": (lambda at: written(at, "a.parquet.gz", gzip.compress(parquet())), ["packed Parquet", "unpack"]),
    "a cut gzip file": (lambda at: written(at, "a.jsonl.gz", gzip.compress(LINES.encode())[:-20]), ["gzip", "damaged"]),
    "a cut Zstandard file": (
        lambda at: written(at, "a.txt.zst", zstandard(LINES[:-9].encode())[:-9]), ["a.txt.zst", "Zstandard", "damaged"]
    ),
    "a cut bzip2 file": (lambda at: written(at, "a.txt.bz2", bz2.compress(b"words " * 99)[:-9]), ["bzip2", "damaged"]),
    "a cut xz file": (lambda at: written(at, "a.txt.xz", lzma.compress(b"words " * 99)[:-9]), ["xz", "damaged"]),
    "a damaged gzip file": (lambda at: written(at, "a.gz", b"\x1f\x8b" + b"x" * 50), ["gzip", "damaged"]),
    "a cut Arrow file": (lambda at: written(at, "a.arrow", arrow(stream=False)[:300]), ["a.arrow", "damaged"]),
    "a cut row": (lambda at: written(at, "a.jsonl", LINES[:-40]), ["line 30 of", "a.jsonl", "not JSON"]),
    "a row that names its text twice": (
        lambda at: written(at, "a.jsonl", '{"text": "a", "text": "b"}'), ["line 1", "names 'text' twice"]
    ),
    "a list with a number": (lambda at: written(at, "a.json", '[{"text": "a"}, {"text": 3}]'), ["record 1", "a int"]),
    "a table without the column": (lambda at: written(at, "a.csv", "a,b\n1,2\n"), ["a.csv", "['a', 'b']", "'text'"]),
    "a row with too many cells": (
        lambda at: written(at, "a.csv", "id,text\n1,fine\n2,a,b\n"), ["line 3", "a.csv", "3 cells", "2 columns"]
    ),
    "a table with an open quote": (lambda at: written(at, "a.csv", 'id,text\n1,"never ends\n'), ["a.csv", "not a row"]),
    "a folder of binary files": (lambda at: written(at, "a.bin", b"\x00" * 99).parent, ["no text", "a.bin (binary"]),
    "a folder of hidden files": (lambda at: written(at, ".a.txt", b"words").parent, ["no text", ".a.txt (hidden)"]),
    "a dictionary": (lambda at: {"text": TEXTS}, ["dict", "'text'"]),
    "what a tokenizer returns": (lambda at: {"input_ids": [[1, 2]]}, ["dict", "'input_ids'"]),
    "a set": (lambda at: set(TEXTS), ["set", "no order"]),
    "an array of ids": (lambda at: np.zeros((2, 9), np.int64), ["ndarray", "Corpus.from_tokens"]),
    "a tensor of ids": (lambda at: torch.zeros(2, 9), ["Tensor", "Corpus.from_tokens"]),
    "a frame without the column": (lambda at: pd.DataFrame({"body": TEXTS}), ["no columns 'text'", "body"]),
    "a frame with two such columns": (
        lambda at: pd.DataFrame([["a", "b"]], columns=["text", "text"]), ["DataFrame", "2 columns 'text'"]
    ),
    "a column of numbers": (lambda at: pd.Series([1, 2]), ["Series", "Corpus.from_tokens"]),
    "a column with a number": (lambda at: pd.DataFrame({"text": ["a", 3]}), ["record 1", "'text'", "int"]),
    "an open file": (lambda at: io.StringIO("words\nwords"), ["open file", "path"]),
    "bytes": (lambda at: [b"words"], ["record 0", "bytes"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", NO_TEXT)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, mistake):
    make, words = NO_TEXT[mistake]
    with pytest.raises(ValueError, match=r".") as caught:
        texts_in(make(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "source",
    [
        pd.DataFrame({"id": range(30), "text": TEXTS}),
        pd.DataFrame({"id": range(31), "text": [*TEXTS, None]}),
        pd.Series([TEXTS[0], float("nan"), *TEXTS[1:]]),
        pd.Series([*TEXTS, pd.NA], dtype="string"),
        pa.table({"id": range(30), "text": TEXTS}),
        pa.record_batch({"text": TEXTS}),
        pa.chunked_array([TEXTS[:9], TEXTS[9:]]),
        np.array(TEXTS),
        datasets.Dataset.from_dict({"text": TEXTS, "id": range(30)}),
        [{"text": text} for text in TEXTS],
        [*[{"text": text} for text in TEXTS], {"text": None}],
        tuple(TEXTS),
    ],
    ids=lambda source: type(source).__name__,
)
def test_tables_columns_and_lists_give_their_texts(source):
    assert texts_in(source) == TEXTS


def test_other_columns_of_a_dataset_are_not_decoded():
    features = datasets.Features({"text": datasets.Value("string"), "sound": datasets.Value("binary")})
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "sound": [b"broken"] * len(TEXTS)}, features=features)
    dataset.set_transform(lambda rows: rows if "sound" not in rows else pytest.fail("it was decoded"))
    assert texts_in(dataset) == TEXTS


def test_generators_give_their_texts():
    assert texts_in(text for text in TEXTS) == TEXTS
    assert texts_in(({"body": text} for text in TEXTS), "body") == TEXTS


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="not a regular file"):
        open_source(tmp_path / "pipe.txt", "text")
    (tmp_path / "a.txt").write_text("words")
    opened = open_source(tmp_path, "text")
    assert opened.reading is not None
    assert opened.reading.skipped == (("pipe.txt", "not a regular file"),)


def test_a_long_first_record_is_recognised_without_reading_it_whole(tmp_path):
    (tmp_path / "a.txt").write_text(json.dumps({"text": "x" * 200_000}))
    assert recognised(tmp_path / "a.txt").kind == "JSON lines"


# --- long documents ---

LONG = "".join(f"line {number} of a long book\r\n{chr(10) * (number % 9 == 0)}" for number in range(2_000))


@pytest.fixture
def long_ones_are_short(monkeypatch):
    monkeypatch.setattr(sources, "_LONG_DOCUMENT", 30_000)
    assert len(LONG) > 30_000


def test_a_long_document_has_the_same_tokens_whatever_file_it_comes_from(tmp_path, tokenizer, long_ones_are_short):
    (tmp_path / "a.txt").write_bytes(LONG.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": LONG}))
    pq.write_table(pa.table({"text": [LONG]}), tmp_path / "a.parquet")
    options = {"tokenizer": tokenizer, "context_length": 32, "max_tokens": 40_000}
    expected = bc.load_corpus(tmp_path / "a.txt", **options)
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", [LONG]):
        assert bc.load_corpus(source, **options).fingerprint == expected.fingerprint


def test_no_more_than_a_piece_of_a_long_document_is_tokenised_at_once(tokenizer, long_ones_are_short):
    longest = []

    class Watched:
        def __call__(self, texts, **options):
            if isinstance(texts, list):
                longest.append(max(map(len, texts)))
            return tokenizer(texts, **options)

        def __len__(self):
            return len(tokenizer)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    corpus = bc.load_corpus([LONG], tokenizer=Watched(), context_length=32, held_out=0.0)
    assert max(longest) <= 8_000
    text = tokenizer.decode(corpus.train.reshape(-1).tolist()).replace("<|endoftext|>", "")
    assert LONG.replace("\r\n", "\n").startswith(text)  # nothing is lost, added or reordered where it is cut


def test_a_document_of_ordinary_length_stays_whole(tokenizer):
    document = "a line of a book\n\n" * 1_000
    corpus = bc.load_corpus([document], tokenizer=tokenizer, context_length=32, held_out=0.0)
    assert corpus.documents == (1, 0)
    assert corpus.train.reshape(-1).tolist() == [0, *tokenizer(document)["input_ids"]][: corpus.train.size]
