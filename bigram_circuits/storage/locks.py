"""One writer for a folder: the file `.lock` in it is locked, and `lock.json` says who holds it.

The lock is filelock's `flock`. The kernel gives it to one process only and releases it when that process ends, however
it ends, so a folder whose writer was killed stays usable. `.lock` is empty and remains: to remove a lock file can let
two processes in. `lock.json` is removed when its writer is done; one that is left over tells who was killed.

Where the file system has no `flock`, filelock's `SoftFileLock` is used, for which the existence of `.lock.soft` is the
lock. A killed process leaves that file. The next one takes it over if the process it names ran on this machine and is
gone. It cannot look at the processes of another machine: then the folder counts as in use, and the error says which
file to remove if the process is known to be gone.
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
"""Name of the file that describes the holder."""
_FLOCK, _SOFT = ".lock", ".lock.soft"
_PATIENCE = 0.2  # seconds: whoever has just taken the lock has then written who it is
_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_LARGEST = 1 << 16  # bytes of `lock.json` that are read


class FolderInUseError(OSError):
    """Another process is writing the folder."""


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, this thread alone writes the folder, which is made if needed. Blocks may be nested.

    Raises:
        FolderInUseError: If another process, or another thread, is writing it; the message says which.
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
    """Describe the process that holds, or last held, a folder's lock; None if there is none."""
    record = _read(Path(folder))
    return None if record is None else _describe(record)


def is_lock(path: Path) -> bool:
    """Whether a file in a folder belongs to its lock."""
    return path.name == LOCK or path.name.startswith(_FLOCK)


def _acquire(place: Path, shown: str) -> BaseFileLock:
    """Take the lock; a singleton is re-entrant within a thread."""
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
    """Within the block, `lock.json` describes this process; a note says whose lock was taken over, if any."""
    before = _read(place)
    if before:
        print(f"note: {shown!r} was being written by {_describe(before)}, which is gone; going on", file=sys.stderr)
    write_text(place / LOCK, json.dumps(_this_process(), indent=2) + "\n")
    try:
        yield
    finally:
        (place / LOCK).unlink(missing_ok=True)


def _read(place: Path) -> dict[str, Any] | None:
    """What `lock.json` says, empty if it makes no sense; None if there is none."""
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
