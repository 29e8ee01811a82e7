"""One writer for a folder: another process or thread is refused, a killed one stops nobody."""

import errno
import json
import os
import re
import threading

import pytest

from bigram_circuits.storage.locks import LOCK, FolderInUseError, lock_folder
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


def test_the_lock_of_a_killed_process_stops_nobody(held, capfd):
    process, folder = held
    process.kill()
    process.wait()
    assert (folder / LOCK).exists()
    with lock_folder(folder):
        pass
    assert re.search(rf"note: .*process {process.pid} .*, which has ended; continuing", capfd.readouterr().err)


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
def test_without_flock_the_lock_of_a_process_of_this_machine_that_is_gone_is_taken_over(tmp_path, capfd):
    with held_folder(tmp_path, "soft") as gone:
        assert len(refusals_elsewhere(tmp_path)) == 1
    assert (tmp_path / ".lock.soft").exists()
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert re.search(rf"note: .*process {gone.pid} .*, which has ended; continuing", capfd.readouterr().err)


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


def test_a_folder_that_cannot_be_locked_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write '.*lock\.json': (Not a directory|File exists)"):
        lock_folder(tmp_path / "file").__enter__()
