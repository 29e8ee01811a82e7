"""Files and folders appear whole or not at all, and damage in a record is noticed."""

import errno
import json
import os

import pytest
from safetensors import SafetensorError

from bigram_circuits.storage import files
from bigram_circuits.storage.files import checked_json, read_checked_json, whole_file, whole_folder, write_text
from tests.folders import flips, names_in


def test_a_file_and_its_name_are_on_the_disk_when_it_is_there(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(first, *rest, name=name, real=real):
            done.append((name, "folder" if name == "fsync" and os.path.isdir(f"/dev/fd/{first}") else "file"))
            return real(first, *rest)

        monkeypatch.setattr(os, name, noted)
    write_text(tmp_path / "file.txt", "text")
    assert done == [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]


@pytest.mark.parametrize(
    ("there", "left"), [("new", None), ("old", "old"), ("new old", "new"), ("now new", "now"), ("now old", "now")]
)
def test_a_folder_whose_replacing_was_killed_is_whole_again(tmp_path, there, left):
    for name in there.split():
        folder = tmp_path / ("analysis" if name == "now" else f".analysis.{name}")
        folder.mkdir()
        (folder / "who").write_text(name)
    files.recover_folder(tmp_path / "analysis")
    assert names_in(tmp_path) == (["analysis"] if left else [])
    if left:
        assert (tmp_path / "analysis" / "who").read_text() == left


def test_a_folder_whose_making_fails_leaves_what_was_there(tmp_path):
    with whole_folder(tmp_path / "analysis") as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "analysis") as fresh:  # noqa: PT012
        (fresh / "b").write_text("2")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == ["analysis"]
    assert names_in(tmp_path / "analysis") == ["a"]


def test_a_folder_that_must_be_new_takes_the_place_of_nothing_but_an_empty_one(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "parent/new"):
        with whole_folder(tmp_path / name, replace=False) as fresh:
            (fresh / "a").write_text("1")
        assert names_in(tmp_path / name) == ["a"]
    with pytest.raises(ValueError, match="there' is not empty"), whole_folder(tmp_path / "there", replace=False):
        pass
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "late", replace=False):  # noqa: PT012
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "b").write_text("of somebody else")
    assert names_in(tmp_path / "late") == ["b"]
    assert names_in(tmp_path) == ["late", "parent", "there"]


def test_a_flipped_bit_in_a_record_is_noticed(tmp_path):
    path = tmp_path / "metrics.json"
    record = {"r": 0.123456789, "none": None, "nested": {"b": [1, 2.5], "a": "é"}, "nan": float("nan")}
    write_text(path, checked_json(record))
    whole = read_checked_json(path)
    assert repr(whole) == repr(record)
    noticed = 0
    for _ in flips(path, 1000):
        try:
            read = read_checked_json(path)
        except ValueError as error:
            noticed += str(path) in str(error)
            continue
        read = {name: value for name, value in read.items() if name in record or '"checksum"' in path.read_text()}
        assert repr(read) == repr(record)  # white space, or another name of the checksum
    assert noticed > 50
    write_text(path, json.dumps(record))
    assert repr(read_checked_json(path)) == repr(record)


def test_the_writers_own_word_for_a_full_disk_is_understood(tmp_path):
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(OSError, match=r"cannot write .*x.safetensors': No space left") as told,
        whole_file(tmp_path / "x.safetensors"),
    ):
        raise SafetensorError(words)
    assert told.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == []
