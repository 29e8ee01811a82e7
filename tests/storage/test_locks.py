"""One writer for a folder: another process or thread is refused, a killed one stops nobody."""

import errno
import json
import logging
import os
import re
import shutil
import threading

import pytest

from bigram_circuits.storage.files import write_text
from bigram_circuits.storage.locks import LOCK, FolderInUseError, holder, lock_folder
from tests.folders import held_folder, names_in, start_holder


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds."""
    with held_folder(tmp_path / "run") as process:
        yield process, tmp_path / "run"


def refusals_elsewhere(folder):
    """What another thread is told that asks for the lock: nothing if it gets it."""
    told = []

    def other():
        try:
            with lock_folder(folder):
                pass
        except FolderInUseError as error:
            told.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    return told


def test_a_second_writer_is_told_who_the_first_is(held):
    process, folder = held
    with pytest.raises(
        FolderInUseError, match=rf"run' is being written by process {process.pid} on .* since 20"
    ) as told:
        lock_folder(folder).__enter__()
    assert "wait until it is done, or choose another folder" in str(told.value)
    record = json.loads((folder / LOCK).read_text())
    assert (record["process"], record["command"].split()[0]) == (process.pid, "-c")
    process.communicate("")
    assert not (folder / LOCK).exists()
    with lock_folder(folder):
        assert json.loads((folder / LOCK).read_text())["process"] == os.getpid()
    assert names_in(folder) == []


def test_the_lock_of_a_killed_process_stops_nobody(held, caplog):
    caplog.set_level(logging.INFO)
    process, folder = held
    process.kill()
    process.wait()
    assert (folder / LOCK).exists()
    with lock_folder(folder):
        pass
    assert re.search(rf"was being written by process {process.pid} .*, which has ended; continuing", caplog.text)


def test_of_processes_that_start_at_the_same_instant_exactly_one_runs(tmp_path):
    for turn in range(3):
        processes = [start_holder(tmp_path / f"run-{turn}") for _ in range(4)]
        said = [process.stdout.readline() for process in processes]
        assert said.count("mine\n") == 1
        assert sum("is being written by" in line for line in said) == 3
        for process in processes:
            process.communicate("")
        assert not (tmp_path / f"run-{turn}" / LOCK).exists()


def test_a_lock_is_released_on_exceptions_nests_and_keeps_other_threads_out(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path), lock_folder(tmp_path):  # noqa: PT012
        assert len(refusals_elsewhere(tmp_path)) == 1
        _ = 1 / 0
    assert refusals_elsewhere(tmp_path) == []
    assert names_in(tmp_path) == []


def refusing_flock(error_number):
    def flock(handle, operation):
        raise OSError(error_number, os.strerror(error_number))

    return flock


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_flock(request, monkeypatch):
    """A file system that has no flock."""
    monkeypatch.setattr("fcntl.flock", refusing_flock(request.param))


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_lock_is_a_file_that_exists(tmp_path):
    with lock_folder(tmp_path), lock_folder(tmp_path):
        assert (tmp_path / ".lock.soft").exists()
        assert "process" in json.loads((tmp_path / LOCK).read_text())
        (told,) = refusals_elsewhere(tmp_path)
        assert f"process {os.getpid()} on" in told
        assert f"if that process is gone, remove '{tmp_path / '.lock.soft'}'" in told
    assert not (tmp_path / ".lock.soft").exists()
    assert names_in(tmp_path) == []


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_lock_of_a_process_of_this_machine_that_is_gone_is_taken_over(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with held_folder(tmp_path, "soft") as gone:
        assert len(refusals_elsewhere(tmp_path)) == 1
    assert (tmp_path / ".lock.soft").exists()
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert re.search(rf"was being written by process {gone.pid} .*, which has ended; continuing", caplog.text)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_lock_of_another_machine_stays_until_it_is_removed(tmp_path):
    (tmp_path / ".lock.soft").write_text("7\nelsewhere\n")
    record = {"host": "elsewhere", "process": 7, "started": "2025-01-01T00:00:00Z", "command": ""}
    (tmp_path / LOCK).write_text(json.dumps(record))
    with pytest.raises(FolderInUseError, match=r"process 7 on 'elsewhere'.*gone, remove '.*\.lock\.soft'"):
        lock_folder(tmp_path).__enter__()
    (tmp_path / ".lock.soft").unlink()
    with lock_folder(tmp_path):
        pass


# --- a holder that is no longer alone ---


def write(folder):
    write_text(folder / "file.txt", "ours")


def test_a_holder_that_was_taken_over_writes_nothing_more(tmp_path):
    other = {"host": "elsewhere", "process": 7, "started": "2025-01-01T00:00:00Z", "command": "find"}
    with lock_folder(tmp_path):
        write(tmp_path)
        (tmp_path / LOCK).write_text(json.dumps(other))
        with pytest.raises(
            FolderInUseError, match=r"was taken over by process 7 on 'elsewhere' .*: this process stops"
        ):
            write_text(tmp_path / "deep" / "file.txt", "late")
    assert names_in(tmp_path) == ["file.txt", LOCK]  # not ours to remove
    assert json.loads((tmp_path / LOCK).read_text()) == other


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_a_holder_whose_description_is_removed_signs_again(tmp_path, monkeypatch, soft, damage):
    if soft:
        monkeypatch.setattr("fcntl.flock", refusing_flock(errno.ENOLCK))
    with lock_folder(tmp_path):
        (tmp_path / LOCK).unlink()
        if damage == "damaged":
            (tmp_path / LOCK).write_text("[" * 100_000)
        write(tmp_path)
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert names_in(tmp_path) == ["file.txt"]


def test_two_processes_with_the_lock_removed_between_them_do_not_both_write(tmp_path):
    with lock_folder(tmp_path):
        (tmp_path / ".lock").unlink()
        (tmp_path / LOCK).unlink()
        with held_folder(tmp_path) as process, pytest.raises(FolderInUseError, match=f"over by process {process.pid}"):
            write(tmp_path)
    assert not (tmp_path / "file.txt").exists()


def test_a_folder_that_is_removed_under_its_holder_stays_removed(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="run' was removed while this process was writing it"), lock_folder(folder):  # noqa: PT012
        shutil.rmtree(folder)
        write(folder)
    assert not folder.exists()
    with lock_folder(folder):
        write(folder)
    assert names_in(folder) == ["file.txt"]


# --- what may lie where the lock should ---


@pytest.mark.parametrize("name", [LOCK, ".lock", ".lock.soft"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_lock_that_is_a_link_is_refused_and_not_followed(tmp_path, name, dangling):
    folder, target = tmp_path / "run", tmp_path / "target"
    folder.mkdir()
    if not dangling:
        target.write_text("mine")
    (folder / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"{name}' is a symbolic link"):
        lock_folder(folder).__enter__()
    assert target.exists() is not dangling
    assert dangling or target.read_text() == "mine"


def test_what_is_in_a_lock_cannot_command_the_terminal_or_stop_the_reader(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    evil = {"host": "\x1b[2J", "process": "\x1b]0;title\x07", "started": ["\u202e"], "command": "a\nb\x1b[31m" * 999}
    for text in (json.dumps(evil), "[" * 60_000, '{"a":' * 10_000, "\ud800", "9" * 60_000, "NaN", "[]", '{"host": {}}'):
        (tmp_path / LOCK).write_bytes(text.encode("utf-8", "surrogatepass"))
        words = holder(tmp_path)
        assert words.isprintable()
        assert len(words) < 10_000
        with lock_folder(tmp_path):
            pass
        assert all(record.getMessage().isprintable() for record in caplog.records)
    os.mkfifo(tmp_path / LOCK)
    assert "another process" in holder(tmp_path)
    with lock_folder(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_folder_that_cannot_be_locked_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write '.*lock\.json': (Not a directory|File exists)"):
        lock_folder(tmp_path / "file").__enter__()
