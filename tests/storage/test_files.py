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
        assert repr(read) == repr(record)  # white space
    assert noticed > 50
    for text in (json.dumps(record), checked_json(record).replace('"checksum"', '"checksun"')):
        write_text(path, text)
        with pytest.raises(ValueError, match="is damaged: it has no checksum"):
            read_checked_json(path)


def test_nothing_is_written_removed_or_read_through_a_symbolic_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("file", ".file.json.abcd1234"):
        (elsewhere / name).write_text("mine")
    (tmp_path / "file").symlink_to(elsewhere / "file")
    (tmp_path / "new").symlink_to(elsewhere / "new")
    for name in ("file", "new"):
        write_text(tmp_path / name, "ours")  # takes the place of the link
        assert not (tmp_path / name).is_symlink()
    (tmp_path / "folder").symlink_to(elsewhere)
    files.remove_leftovers(tmp_path / "folder")
    with pytest.raises(ValueError, match="folder' is a symbolic link"), whole_folder(tmp_path / "folder"):
        pass
    (tmp_path / "link.json").symlink_to(elsewhere / "record.json")
    write_text(elsewhere / "record.json", checked_json({"a": 1}))
    with pytest.raises(ValueError, match=r"link.json' is a symbolic link, which is not followed: replace it by"):
        read_checked_json(tmp_path / "link.json")
    assert read_checked_json(tmp_path / "link.json", follow=True) == {"a": 1}
    assert names_in(elsewhere) == [".file.json.abcd1234", "file", "record.json"]
    assert (elsewhere / "file").read_text() == "mine"


def test_a_guard_is_asked_before_anything_below_its_folder_is_written(tmp_path):
    def refuse():
        raise OSError("no longer mine")

    (tmp_path / "run").mkdir()
    write_text(tmp_path / "run" / "a", "before")
    with files.guarded((tmp_path / "run").resolve(), refuse):
        for name in ("run/a", "run/b/c", "run/../run/d"):
            with pytest.raises(OSError, match="no longer mine"):
                write_text(tmp_path / name, "after")
        with pytest.raises(OSError, match="no longer mine"), whole_folder(tmp_path / "run" / "analysis"):
            pass
        write_text(tmp_path / "beside", "")
    assert names_in(tmp_path / "run") == ["a"]
    assert (tmp_path / "run" / "a").read_text() == "before"


def test_the_writers_own_word_for_a_full_disk_is_understood(tmp_path):
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(OSError, match=r"cannot write .*x.safetensors': No space left") as told,
        whole_file(tmp_path / "x.safetensors"),
    ):
        raise SafetensorError(words)
    assert told.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == []
