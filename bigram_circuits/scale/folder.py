"""The folder of a sweep: which runs it has, and how far each is.

`sweep.json` lists the runs, and `runs/NAME/` is an ordinary run's folder. `states/NAME.json` says what became of it: a
worker writes it when it starts the run and when that is done or has failed, while it holds the lock of the run's
folder. A worker that was killed has released that lock, so its run is free again, and is resumed from its checkpoint.
Nothing in here is an absolute path but for the names of models and texts, so a folder can be moved.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from bigram_circuits.scale.spec import PlannedRun
from bigram_circuits.storage.files import checked_json, damaged, is_leftover, read_checked_json, write_text
from bigram_circuits.storage.locks import is_lock
from bigram_circuits.storage.origin import is_ours, signed
from bigram_circuits.storage.records import shown
from bigram_circuits.storage.typed import Record, from_json

FORMAT = "bigram_circuits.sweep/1"
DONE, FAILED, LEARNING, QUEUED, WAITING = "done", "failed", "learning", "queued", "waiting"
STATUSES = (DONE, LEARNING, QUEUED, WAITING, FAILED)
"""What can be said of a run, in the order in which it is told."""
_SQUEUE = ("squeue", "--me", "--noheader", "--array", "--format=%i")


@dataclass(frozen=True)
class RunState(Record):
    """What became of a run, as its worker wrote it."""

    status: str
    """`learning`, `done` or `failed`."""
    reason: str | None = None
    """Of a failed run: why, in one line."""
    seconds: float | None = None
    """Of an ended run: seconds from the start of its work to its end, the last time it was started."""
    worker: int | None = None
    """Process that works on it."""
    since: float | None = None
    """When that process began, in seconds: others may have had its number."""
    host: str | None = None
    """Machine that this process is on."""
    job: str | None = None
    """Its SLURM job, if it is one."""
    command: str | None = None
    """Identifies the call of `sweep` that it was started by."""
    starts: int = 1
    """How often it was started by that call."""

    @property
    def is_at_work(self) -> bool:
        """Whether its worker is still there; of a SLURM job on another machine, whether it may be."""
        if self.status != LEARNING or self.worker is None:
            return False
        if self.host != platform.node():
            return self.job is not None
        return is_alive(self.worker, self.since)


def is_alive(process: int, since: float | None) -> bool:
    """Whether a process of this machine, that began then, is still there."""
    try:
        return psutil.Process(process).create_time() == since
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class SweepRecord(Record):
    """The contents of `sweep.json`."""

    format: str
    runs: tuple[PlannedRun, ...]
    slurm: Mapping[str, Any] = field(default_factory=dict)
    signature: str | None = None

    def signed(self) -> SweepRecord:
        """The same with the signature of this user on this machine."""
        return signed(self)

    @property
    def is_ours(self) -> bool:
        """Whether this user made it on this machine."""
        return is_ours(self)


@dataclass(frozen=True)
class SubmittedJobs(Record):
    """The contents of `logs/submitted.json`."""

    jobs: Mapping[str, str] = field(default_factory=dict)
    """Name of a run -> its SLURM job: `12_3` is the fourth of array 12."""


class SweepFolder:
    """The folder of a sweep."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def logs(self) -> Path:
        """The folder of what jobs print."""
        return self.path / "logs"

    @property
    def shared(self) -> Path:
        """The folder of what several runs use."""
        return self.path / "shared"

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.path / "runs" / name

    def _state_path(self, name: str) -> Path:
        return self.path / "states" / f"{name}.json"

    # --- the list of runs ---

    @property
    def exists(self) -> bool:
        """Whether it holds a sweep."""
        return (self.path / "sweep.json").is_file()

    @cached_property
    def record(self) -> SweepRecord:
        """The list of its runs.

        Raises:
            FileNotFoundError: If it holds no sweep.
            ValueError: If that is damaged.
        """
        path = self.path / "sweep.json"
        if not self.exists:
            raise FileNotFoundError(f"{str(self.path)!r} holds no sweep: it has no sweep.json")
        remedy = "the same command with another --out writes it again, and --merge takes over the runs"
        found = read_checked_json(path, remedy)
        if found.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} has format {shown(found.get('format'))}, but {FORMAT!r} is needed")
        with damaged(path, remedy):
            record = SweepRecord.from_json(found)
            for one in record.runs:
                if Path(one.name).name != one.name or one.name.startswith("."):
                    raise ValueError(f"{shown(one.name)} cannot be the name of a run")
        return record

    @property
    def runs(self) -> tuple[PlannedRun, ...]:
        """Its runs."""
        return self.record.runs

    def write(self, runs: Iterable[PlannedRun], slurm: Mapping[str, Any]) -> None:
        """Write the list of its runs, and the parameters of SLURM jobs; call this only while its lock is held."""
        self.__dict__["record"] = SweepRecord(FORMAT, tuple(runs), slurm).signed()
        write_text(self.path / "sweep.json", checked_json(self.record.to_json()))

    def extend(self, wanted: Sequence[PlannedRun], slurm: Mapping[str, Any]) -> None:
        """Add runs to those that are there, or make the list; call this only while its lock is held.

        Raises:
            ValueError: If it has a run that is not wanted, or it holds something else than a sweep.
        """
        if not self.exists:
            if not all(is_lock(one) or is_leftover(one) for one in self.path.iterdir()):
                raise ValueError(f"{str(self.path)!r} is not empty and holds no sweep: choose another folder (--out)")
            return self.write(wanted, slurm)
        asked = {one.key: one for one in wanted}
        gone = [one for one in self.runs if one.key not in asked]
        if gone:
            raise ValueError(
                f"{str(self.path)!r} holds another sweep: {len(gone)} of its {len(self.runs)} runs, such as "
                f"{gone[0].name}, are not in this one; add them, or choose another folder (--out)"
            )
        known = {one.key for one in self.runs}
        there = [replace(asked[one.key], name=one.name) for one in self.runs]
        return self.write([*there, *(one for one in wanted if one.key not in known)], slurm)

    # --- what became of them ---

    def state(self, name: str) -> RunState | None:
        """What became of a run; None if it was not started, or its folder is gone.

        Raises:
            ValueError: If the record is damaged.
        """
        path = self._state_path(name)
        try:
            found = read_checked_json(path, "remove it, and the same command looks at the run again")
        except FileNotFoundError:
            return None
        with damaged(path, "remove it, and the same command looks at the run again"):
            state = RunState.from_json(found)
        return None if state.status == DONE and not (self.run(name) / "config.json").is_file() else state

    def write_state(self, name: str, state: RunState) -> None:
        """Say what became of a run; call this only while the lock of its folder is held."""
        write_text(self._state_path(name), checked_json(state.to_json()))

    def forget(self, name: str) -> None:
        """Remove what is said of a run, so that it is tried again."""
        self._state_path(name).unlink(missing_ok=True)

    def statuses(self) -> dict[str, tuple[str, RunState | None]]:
        """Every run's status, and its state if it has one."""
        states = {one.name: self.state(one.name) for one in self.runs}
        queued = self._queued({name for name, one in states.items() if one is None or one.status == LEARNING})
        return {name: (_status(one, queued.get(name)), one) for name, one in states.items()}

    # --- jobs of SLURM ---

    @property
    def jobs(self) -> dict[str, str]:
        """The SLURM jobs of runs, by name: those that were submitted last."""
        path = self.logs / "submitted.json"
        if not path.is_file():
            return {}
        remedy = "remove it, and the same command submits what is not done"
        found = read_checked_json(path, remedy)
        with damaged(path, remedy):
            return dict(from_json(SubmittedJobs, found).jobs)

    def write_jobs(self, jobs: Mapping[str, str]) -> None:
        """Record the SLURM jobs of runs."""
        write_text(self.logs / "submitted.json", checked_json(SubmittedJobs(jobs).to_json()))

    def _queued(self, names: Iterable[str]) -> dict[str, bool]:
        """Of runs with a SLURM job: whether SLURM still has it. Where that cannot be asked, it is believed to."""
        jobs = {name: job for name, job in self.jobs.items() if name in names}
        if not jobs:
            return {}
        with suppress(OSError, subprocess.SubprocessError):
            asked = subprocess.run(_SQUEUE, capture_output=True, text=True, timeout=60, check=True)
            there = set(asked.stdout.split())
            return {name: job in there for name, job in jobs.items()}
        return dict.fromkeys(jobs, True)


def _status(state: RunState | None, is_queued: bool | None) -> str:
    """The status of a run."""
    if state is not None and state.status in (DONE, FAILED):
        return state.status
    if state is not None and state.is_at_work and (state.job is None or is_queued is not False):
        return LEARNING
    return QUEUED if is_queued else WAITING
