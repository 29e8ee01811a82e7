"""How the work of a sweep is started: on this machine, in this process, or as an array of SLURM jobs, by submitit."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from submitit import DebugExecutor, LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from bigram_circuits.progress import progress
from bigram_circuits.scale.folder import DONE, FAILED, LEARNING, QUEUED, STATUSES, WAITING, SweepFolder
from bigram_circuits.scale.worker import Worker
from bigram_circuits.storage.records import shown
from bigram_circuits.storage.terminal import printable

LAUNCHERS = ("local", "slurm", "debug")
"""Where runs are done: on this machine in processes, on a cluster, or in this process, one after another."""
_POLLED = 0.25  # seconds between two looks at the runs
_LONGEST_END = 5.0  # seconds that a process may take to end, once nothing is left
_FOREVER = 60 * 24 * 365  # minutes
_MOST_STARTS = 3  # of a run whose process is killed, by one call
_MOST_IDLE = 3  # processes in a row that end before they start a run
_MINUTES = 240  # of a SLURM job, unless the spec says otherwise
_TIME_OUTS = 50  # of a SLURM job, after each of which it is started again and its run resumes
_UNITS = {"cpus": "cpus_per_task", "gpus": "gpus_per_node", "parallel": "array_parallelism"}


def default_workers(device: str | None, n_runs: int) -> int:
    """How many runs are done at a time on this machine: one for each GPU, else one for every four cores, at least 2."""
    n = len(_gpus(device)) or min(_cores(), max(2, _cores() // 4))
    return max(1, min(n, n_runs))


def run_here(folder: SweepFolder, device: str | None) -> None:
    """Do all runs in this process."""
    executor = DebugExecutor(folder.logs)
    executor.submit(Worker(str(folder.path.absolute()), device=device)).result()


# --- processes on this machine ---


def run_in_processes(folder: SweepFolder, workers: int, device: str | None) -> None:
    """Do all runs in so many processes, and wait. One that is killed is replaced.

    Raises:
        RuntimeError: If processes end before they start a run.
    """
    pool = _Pool(folder, workers, device)
    total = len(folder.runs)
    try:
        with progress(total, desc="sweep", unit="run") as bar:
            while True:
                ended = pool.ended_before()
                counts = Counter(status for status, _ in folder.statuses().values())
                bar.update(counts[DONE] + counts[FAILED] - bar.n)
                bar.set_postfix_str(words_of(counts), refresh=False)
                left = counts[WAITING] + counts[QUEUED]
                if not left and not counts[LEARNING]:
                    break
                pool.start(min(workers, left + counts[LEARNING]) if left else 0, ended)
                time.sleep(_POLLED)
        pool.tidy()
    except KeyboardInterrupt:
        kept = "what is done is kept, and processes write a checkpoint; rerun the command to go on"
        raise KeyboardInterrupt(f"interrupted; {kept}") from None


def words_of(counts: Mapping[str, int]) -> str:
    """How many runs have each status."""
    return ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if counts.get(status))


class _Pool:
    """The processes that do the runs: jobs of submitit's local executor."""

    def __init__(self, folder: SweepFolder, workers: int, device: str | None) -> None:
        self._folder = folder
        self._gpus = _gpus(device)
        me = psutil.Process()
        self._worker = {
            "folder": str(folder.path.absolute()), "workers": workers, "threads": max(1, _cores() // workers),
            "device": "cuda" if self._gpus else device, "command": secrets.token_hex(8),
            "parent": (me.pid, me.create_time()), "most_starts": _MOST_STARTS,
        }  # fmt: skip
        self._jobs: dict[int, Any] = {}  # by number
        self._idle = 0  # processes that ended and had started nothing, one after another

    def ended_before(self) -> set[int]:
        """Numbers of the jobs that have ended; to be asked before looking at the runs."""
        return {number for number, job in self._jobs.items() if job.done()}

    def start(self, wanted: int, ended: set[int]) -> None:
        """Start processes until there are so many."""
        for number in ended:
            job = self._jobs.pop(number)
            if self._has_started(job):
                self._idle = 0
            else:
                self._idle += 1
                if self._idle >= _MOST_IDLE:
                    raise RuntimeError(f"processes of the sweep end before they start a run: {_last_line(job)}")
        for number in range(self._worker["workers"]):
            if len(self._jobs) < wanted and number not in self._jobs:
                self._jobs[number] = self._submit(number)

    def _submit(self, number: int) -> Any:
        executor = LocalExecutor(self._folder.logs)
        options: dict[str, Any] = {"timeout_min": _FOREVER}
        if self._gpus:
            options |= {"gpus_per_node": 1, "visible_gpus": (self._gpus[number % len(self._gpus)],)}
        executor.update_parameters(**options)
        return executor.submit(Worker(number=number, **self._worker))

    def _has_started(self, job: Any) -> bool:
        """Whether a job that ended had started a run, or found nothing left."""
        with suppress(OSError):
            return job.paths.result_pickle.is_file() or ": started\n" in job.paths.stdout.read_text(errors="replace")
        return False

    def tidy(self) -> None:
        """Wait until the processes have ended, and remove what was sent to them."""
        until = time.monotonic() + _LONGEST_END
        for job in self._jobs.values():
            while not job.done() and time.monotonic() < until:
                time.sleep(_POLLED / 4)
            if job.done():
                for path in (job.paths.submitted_pickle, job.paths.result_pickle):
                    path.unlink(missing_ok=True)


def _last_line(job: Any) -> str:
    lines = [line.strip() for line in (job.stderr() or "").splitlines() if line.strip()]
    return printable(lines[-1])[:300] if lines else f"see {job.paths.stderr}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(device: str | None) -> list[int]:
    """The GPUs of this machine that may be used, by number."""
    if device not in (None, "cuda"):
        return [int(device.removeprefix("cuda:"))] if device.startswith("cuda:") else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "")
    if visible and all(one.isdigit() for one in visible.split(",")):
        return [int(one) for one in visible.split(",")][: torch.cuda.device_count()]
    return list(range(torch.cuda.device_count()))


# --- jobs of SLURM ---


def check_slurm(parameters: Mapping[str, Any], workers: int | None) -> dict[str, Any]:
    """The parameters of jobs by submitit's names, with what is left out.

    Raises:
        ValueError: If there is no such parameter.
    """
    given = {name.removeprefix("slurm_"): value for name, value in parameters.items()}
    given = {_UNITS.get(name, name): value for name, value in given.items()}
    known = SlurmExecutor._valid_parameters()  # pyright: ignore[reportPrivateUsage]
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"slurm has no parameter {unknown[0]!r}: there are {', '.join(sorted({*known, *_UNITS}))}")
    for name in ("time", "cpus_per_task", "gpus_per_node", "array_parallelism"):
        if name in given and (type(given[name]) is not int or given[name] < (name != "gpus_per_node")):
            unit = " of minutes" if name == "time" else ""
            raise ValueError(f"slurm.{name} must be a whole number{unit}, not {shown(given[name])}")
    if workers is not None:
        given["array_parallelism"] = workers
    more = {"requeue": True, **given.pop("additional_parameters", {})}
    return {"time": _MINUTES, "job_name": "sweep", **given, "additional_parameters": more}


def submit(folder: SweepFolder, names: Sequence[str], parameters: Mapping[str, Any], device: str | None) -> list[str]:
    """Submit an array of jobs, one for each of these runs; returns their ids.

    Raises:
        OSError: If SLURM is not here, or does not take them.
    """
    try:
        executor = SlurmExecutor(folder.logs.absolute(), max_num_timeout=_TIME_OUTS)
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "there is no SLURM on this machine: the command srun is missing") from error
    executor.update_parameters(**parameters)
    work = [Worker(str(folder.path.absolute()), (name,), device=device) for name in names]
    try:
        jobs = executor.submit_array(work)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no reason")
        raise OSError(errno.EIO, f"SLURM did not take the jobs: {printable(why)[:300]}") from error
    ids = [str(job.job_id) for job in jobs]
    folder.write_jobs({**folder.jobs, **dict(zip(names, ids, strict=True))})
    return ids


def log_of(folder: SweepFolder, job: str) -> Path:
    """Where a job of SLURM writes what it prints."""
    return folder.logs / f"{job}_0_log.out"
