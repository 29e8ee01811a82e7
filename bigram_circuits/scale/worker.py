"""What a job does: it takes runs of a sweep, one after another, until none is left that nobody works on.

A run is taken by locking its folder (`storage/locks.py`), which ends with the process that holds it. Whatever a run
raises is recorded as its reason in one line, and the job goes on with the next one.
"""

from __future__ import annotations

import _thread
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from submitit.core.utils import DelayedSubmission

from bigram_circuits.learning.memory import is_out_of_memory, less_memory
from bigram_circuits.recipe import Request
from bigram_circuits.scale.folder import DONE, FAILED, LEARNING, RunState, SweepFolder, is_alive
from bigram_circuits.scale.shared import Shared, keys_of
from bigram_circuits.scale.spec import PlannedRun
from bigram_circuits.storage.locks import FolderInUseError, lock_folder
from bigram_circuits.storage.terminal import printable
from bigram_circuits.workflow import study_of

_LOOKED_AT = 1.0  # seconds between two looks whether the call that started this process is still there
_GRACE = 20.0  # seconds to write a checkpoint, once it is gone


@dataclass(frozen=True)
class Worker:
    """The work of a job, as it is sent there."""

    folder: str
    """The sweep's folder."""
    names: tuple[str, ...] | None = None
    """Names of the runs to do; None: whatever is left."""
    number: int = 0
    """Number of the worker, from 0; each begins with other runs."""
    workers: int = 1
    """Number of workers."""
    threads: int | None = None
    """Threads of PyTorch; None: as they are."""
    device: str | None = None
    """Device of the models; None: CUDA if available, else the CPU."""
    command: str | None = None
    """Identifies the call of `sweep` that started it."""
    parent: tuple[int, float] | None = None
    """The process of that call and when it began, if the work is to end with it."""
    most_starts: int | None = None
    """How often that call starts a run that ends without an error, since its process was killed."""

    def __call__(self) -> int:
        """Do runs until none is left; returns how many were done here."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.parent is not None:
            threading.Thread(target=_end_with, args=self.parent, daemon=True).start()
        folder = SweepFolder(self.folder)
        shared = Shared(folder.shared, self.device)
        wanted = [one for one in folder.runs if self.names is None or one.name in self.names]
        left = in_order([(one, one.request) for one in wanted])
        turn = len(left) * self.number // max(1, self.workers)
        left, done = [*left[turn:], *left[:turn]], 0
        while left:
            place = max(range(len(left)), key=lambda at: shared.is_loaded(left[at][1].inputs))  # the first of these
            done += self._do(*left.pop(place), folder, shared)
        return done

    def checkpoint(self) -> DelayedSubmission:
        """What submitit starts again, after a time limit or a pre-emption: the run resumes itself."""
        return DelayedSubmission(self)

    def _do(self, run: PlannedRun, request: Request, folder: SweepFolder, shared: Shared) -> bool:
        """Do a run, unless it is done, has failed, or another process is at it."""
        before = folder.state(run.name)
        if before is not None and before.status != LEARNING:
            return False
        try:
            with lock_folder(folder.run(run.name)):
                before = folder.state(run.name)
                if before is not None and before.status != LEARNING:
                    return False
                return self._do_locked(run, request, folder, shared, before)
        except FolderInUseError:
            return False

    def _do_locked(
        self, run: PlannedRun, request: Request, folder: SweepFolder, shared: Shared, before: RunState | None
    ) -> bool:
        again = before is not None and before.command == self.command
        state = RunState(
            LEARNING, worker=os.getpid(), since=psutil.Process().create_time(), host=platform.node(),
            job=_slurm_job(), command=self.command, starts=before.starts + 1 if before and again else 1,
        )  # fmt: skip
        ended = replace(state, worker=None, since=None)
        if self.most_starts is not None and state.starts > self.most_starts:
            why = f"its process ended {self.most_starts} times without an error: it was killed, or memory ran out"
            folder.write_state(run.name, replace(ended, status=FAILED, reason=why, starts=self.most_starts))
            return False
        folder.write_state(run.name, state)
        started = time.monotonic()
        print(f"\n{run.name}: started", flush=True)
        try:
            subjects = shared.subjects(request.inputs)
            study_of(request, subjects, out=folder.run(run.name), tell=_tell)
        except Exception as error:
            traceback.print_exc()
            ended = replace(ended, status=FAILED, reason=reason_of(error))
        except BaseException:  # interrupted: this process goes on, but not with this run
            folder.forget(run.name)
            raise
        else:
            ended = replace(ended, status=DONE)
        ended = replace(ended, seconds=time.monotonic() - started)
        folder.write_state(run.name, ended)
        print(f"{run.name}: {ended.status} after {ended.seconds:.1f} s", flush=True)
        return ended.status == DONE


def in_order(runs: Sequence[tuple[PlannedRun, Request]]) -> list[tuple[PlannedRun, Request]]:
    """The runs in an order in which those with the same model, text and target follow each other."""
    places: dict[Any, int] = {}
    for _, request in runs:
        for key in keys_of(request.inputs):
            places.setdefault(key, len(places))
    return sorted(runs, key=lambda one: [places[key] for key in keys_of(one[1].inputs)])


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    line = printable(" ".join(str(error).split())) or type(error).__name__
    if is_out_of_memory(error) and "--batch-size" not in line:
        return f"out of memory: {less_memory(error)} ({line[:200]})"
    return line if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {line}"


def _slurm_job() -> str | None:
    """The SLURM job that this is in, as `squeue` shows it; None outside of one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _end_with(process: int, since: float) -> None:
    """End this process once another one is gone: as if by Ctrl-C, so that learning writes a checkpoint."""
    while is_alive(process, since):
        time.sleep(_LOOKED_AT)
    print("the command that started this has ended: so does this", file=sys.stderr, flush=True)
    _thread.interrupt_main()
    time.sleep(_GRACE)
    os._exit(1)


def _tell(line: str) -> None:
    print(printable(line), flush=True)
