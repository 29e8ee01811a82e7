"""One writer per folder: the file `.lock` in it is locked, and `lock.json` says which process holds the lock.

The lock is filelock's `flock`. The kernel grants it to one process at a time and releases it when that process ends,
however it ends, so a folder whose writer was killed stays usable. `.lock` is empty and is never removed, because
removing a lock file could let two processes in. `lock.json` is removed when the writer is done; a leftover one names
the process that was killed.

Where the file system has no `flock`, filelock's `SoftFileLock` is used: the existence of `.lock.soft` is the lock. A
killed process leaves that file behind. The next process takes it over if the one it names ran on this machine and is
gone. Processes on other machines cannot be checked: then the folder counts as in use, and the error says which file to
remove if that process is known to be gone.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from bigram_circuits.storage.files import cannot_write, write_text

LOCK = "lock.json"
"""Name of the file that describes the process holding the lock."""
_FLOCK, _SOFT = ".lock", ".lock.soft"
_PATIENCE = 0.2  # seconds: long enough for a process that has just taken the lock to write `lock.json`
_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_LARGEST = 1 << 16  # at most this many bytes of `lock.json` are read


class FolderInUseError(OSError):
    """Another process is writing the folder."""


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder's lock within the `with` block; creates the folder if needed. Re-entrant within a thread.

    Raises:
        FolderInUseError: If another process or thread is writing the folder; the message says which process.
        OSError: If the folder cannot be written.
    """
    place = Path(folder).resolve()
    with cannot_write(Path(folder) / LOCK):
        place.mkdir(parents=True, exist_ok=True)
        lock = _acquire(place, str(folder))
    try:
        if lock.lock_counter > 1:  # nested
            yield
        else:
            with _signed(place, str(folder)):
                yield
    finally:
        lock.release()


def holder(folder: str | os.PathLike[str]) -> str | None:
    """Describe the process that holds, or was killed while holding, a folder's lock; None if there is none."""
    record = _read(Path(folder))
    return None if record is None else _describe(record)


def is_lock(path: Path) -> bool:
    """Whether a file in a folder belongs to its lock."""
    return path.name == LOCK or path.name.startswith(_FLOCK)


def _acquire(place: Path, shown: str) -> BaseFileLock:
    """Acquire the lock; as a singleton it is re-entrant within a thread."""
    try:
        try:
            lock = FileLock(place / _FLOCK, timeout=_PATIENCE, is_singleton=True, fallback_to_soft=False)
            lock.acquire()
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            lock = SoftFileLock(place / _SOFT, timeout=_PATIENCE, is_singleton=True)
            lock.acquire()
    except Timeout as timeout:
        remedy = "wait until it is done, or choose another folder"
        if Path(timeout.lock_file).name == _SOFT:
            remedy += f"; if that process is gone, remove {timeout.lock_file!r}"
        who = _describe(_read(place) or {})
        raise FolderInUseError(errno.EWOULDBLOCK, f"{shown!r} is being written by {who}: {remedy}") from timeout
    return lock


@contextmanager
def _signed(place: Path, shown: str) -> Iterator[None]:
    """Within the `with` block, `lock.json` describes this process; print a note if a dead process's lock was taken."""
    before = _read(place)
    if before:
        print(f"note: {shown!r} was being written by {_describe(before)}, which has ended; continuing", file=sys.stderr)
    write_text(place / LOCK, json.dumps(_this_process(), indent=2) + "\n")
    try:
        yield
    finally:
        (place / LOCK).unlink(missing_ok=True)


def _read(place: Path) -> dict[str, Any] | None:
    """Read `lock.json`: an empty dict if it is invalid, None if it does not exist."""
    try:
        with (place / LOCK).open("rb") as file:
            record = json.loads(file.read(_LARGEST))
    except OSError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _this_process() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
    return {
        "host": platform.node(),
        "process": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command[:1000],
    }


def _describe(record: dict[str, Any]) -> str:
    if not record:
        return "another process"
    command = f" ({record['command']})" if record.get("command") else ""
    return f"process {record.get('process')} on {record.get('host')!r} since {record.get('started')}{command}"
