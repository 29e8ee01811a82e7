"""Many runs from one description: started, gone on with, looked at, and merged."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bigram_circuits.environment import runs_folder
from bigram_circuits.runs.folder import check_links
from bigram_circuits.scale import launching
from bigram_circuits.scale.folder import DONE, FAILED, LEARNING, WAITING, SweepFolder
from bigram_circuits.scale.results import Sweep, read_sweep, write_results
from bigram_circuits.scale.spec import Spec, read_spec
from bigram_circuits.storage.files import whole_folder
from bigram_circuits.storage.locks import is_lock, lock_folder


def sweep(
    spec: Mapping[str, Any] | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    launcher: str = "local",
    workers: int | None = None,
    device: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> Sweep:
    """Make many runs, each as `study` does, in one folder with one table and a page that compares them.

    This is what `bigram-circuits sweep` does. The same call goes on where it was interrupted, and tries again what
    failed; more runs in the spec are added to those that are there.

    Args:
        spec: A TOML file, or a mapping: options of `study` that all runs share, by name; `grid`, lists of values, of
            which every combination is a run; `run`, a list of runs; `slurm`, parameters of SLURM jobs by submitit's
            names (`partition`, `time` in minutes, `mem`, `cpus_per_task`, `gpus_per_node`, `array_parallelism`, ...).
            Paths are relative to the file, or to the working directory. Or the folder of a sweep, to go on with it.
        out: The folder; by default one under `runs/` with the name of the file.
        launcher: `"local"`: processes on this machine, each of which takes one run after another. `"slurm"`: an array
            of SLURM jobs, one for each run; they are submitted, and the same call later says how far they are.
            `"debug"`: in this process.
        workers: Number of runs at a time. By default one for each GPU, else one for every four cores and at least two;
            for SLURM, its `array_parallelism`. Each process on this machine has its share of the cores.
        device: Device to load models to; by default CUDA if available, else the CPU.
        tell: Called with lines of text that report progress and results, for example `print`.

    Returns:
        The `Sweep`. Runs that failed are in its `failed`, with the reason.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If an option of a run is not allowed, the folder holds runs that are not in the spec, or there is no
            such launcher.
        OSError: If another process is at work on the folder (the message says which), it cannot be written, or SLURM
            does not take the jobs.
        RuntimeError: If processes end before they start a run.

    Example:
        >>> shared = {"max_steps": 2, "max_tokens": 20_000, "analysis": False, "random_seeds": 1}
        >>> found = bc.sweep({**shared, "grid": {"seed": [0, 1]}}, out="runs/sweep", launcher="debug")
        >>> print(len(found.done))
        2
    """
    started, say = time.monotonic(), tell or (lambda line: None)
    if launcher not in launching.LAUNCHERS:
        raise ValueError(f"launcher must be one of {', '.join(launching.LAUNCHERS)}, not {launcher!r}")
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(f"workers must be a whole number of at least 1, not {workers!r}")
    asked = asked_for(spec)
    parameters = launching.check_slurm(asked.slurm, workers)
    folder = SweepFolder(out or default_folder(spec, asked))
    with lock_folder(folder.path):
        folder.extend(asked.runs, asked.slurm)
        statuses = {name: status for name, (status, _) in folder.statuses().items()}
        for name in (name for name, status in statuses.items() if status == FAILED):
            folder.forget(name)
        left = [name for name, status in statuses.items() if status in (WAITING, FAILED)]
        done = sum(status == DONE for status in statuses.values())
        say(f"{len(statuses):,} runs in {folder.path}, {done:,} of them done before")
        if launcher == "slurm" and left:
            ids = launching.submit(folder, left, parameters, device)
            say(f"submitted {len(ids):,} jobs, {ids[0]} to {ids[-1]}; the same command says how far they are")
        elif launcher == "debug":
            launching.run_here(folder, device)
        elif launcher == "local" and done < len(statuses):
            n = workers or launching.default_workers(device, len(left))
            launching.run_in_processes(folder, n, device)
        found = read_sweep(folder)
        say(f"\n{found}\n")
        if found.is_done:
            for path in write_results(found):
                say(f"written: {path}")
            say(f"{time.monotonic() - started:.0f} s in total")
    return found


def asked_for(spec: Mapping[str, Any] | str | os.PathLike[str]) -> Spec:
    """What a sweep is asked for, by its spec or by its folder.

    Raises:
        FileNotFoundError: If there is no such file, or the folder holds no sweep.
        ValueError: As `read_spec`; or if the folder was not made here, so that the names in it are not opened.
    """
    if isinstance(spec, Mapping) or not Path(spec).is_dir():
        return read_spec(spec)
    record = SweepFolder(spec).record
    if not record.is_ours:
        raise ValueError(
            f"the sweep in {str(spec)!r} was not made by you on this machine, so the names in it are not opened: give "
            "the spec that it was made from, and this folder with --out"
        )
    return Spec(record.runs, record.slurm, Path(spec).name)


def default_folder(spec: Mapping[str, Any] | str | os.PathLike[str], asked: Spec) -> Path:
    """Where a sweep goes unless it is said: its folder, if the spec is one, or one under `runs/`."""
    if not isinstance(spec, Mapping) and Path(spec).is_dir():
        return Path(spec)
    return runs_folder() / asked.name


def load_sweep(folder: str | os.PathLike[str]) -> Sweep:
    """Read how far a sweep is. Nothing is written.

    Args:
        folder: Its folder.

    Raises:
        FileNotFoundError: If it holds no sweep.
        ValueError: If a file is damaged.

    Example:
        >>> found = bc.load_sweep("runs/sweep")
        >>> print([one.name for one in found.failed])
        []
    """
    return read_sweep(SweepFolder(folder))


def merge_sweeps(
    folder: str | os.PathLike[str], *others: str | os.PathLike[str], tell: Callable[[str], None] | None = None
) -> Sweep:
    """Take the runs of other sweeps into one, which is made if there is none; the others are left as they are.

    Runs that are done are copied, unless they are done here; runs that are not done are added to what is to be done.
    The table and the pages are then written again.

    Args:
        folder: The folder of the sweep that takes them.
        *others: The folders of the other sweeps.
        tell: Called with lines of text that report what was done.

    Raises:
        FileNotFoundError: If one of the others holds no sweep.
        ValueError: If `folder` holds something else than a sweep, or a file is damaged or a symbolic link.
        OSError: If another process is at work on `folder`, or it cannot be written.

    Example:
        >>> merged = bc.merge_sweeps("runs/both", "runs/sweep")
        >>> print(len(merged.runs))
        2
    """
    say = tell or (lambda line: None)
    into, sources = SweepFolder(folder), [SweepFolder(one) for one in others]
    records = [one.record for one in sources]  # errors come before anything is written
    with lock_folder(into.path):
        known = {one.key: one for one in into.runs} if into.exists else {}
        for record in records:
            for one in record.runs:
                known.setdefault(one.key, one)
        if not known:
            raise ValueError(f"{str(folder)!r} holds no sweep, and no other was given to take runs from")
        into.extend(tuple(known.values()), into.record.slurm if into.exists else records[0].slurm)
        statuses = {name: status for name, (status, _) in into.statuses().items()}
        for source in sources:
            copied = 0
            for one in source.runs:
                name, state = known[one.key].name, source.state(one.name)
                if state is not None and state.status == DONE and statuses[name] not in (DONE, LEARNING):
                    _copy(source.run(one.name), into.run(name))
                    into.write_state(name, replace(state, command=None, job=None))
                    statuses[name], copied = DONE, copied + 1
            say(f"{copied:,} of {len(source.runs):,} runs taken from {source.path}")
        found = read_sweep(into)
        say(f"\n{found}\n")
        for path in write_results(found):
            say(f"written: {path}")
    return found


def _copy(run: Path, to: Path) -> None:
    """Copy a run's folder, in the place of one that is not done."""
    check_links(run)
    with whole_folder(to) as fresh:
        shutil.copytree(run, fresh, symlinks=True, dirs_exist_ok=True, ignore=_locks)


def _locks(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if is_lock(Path(folder) / name)]
