"""What a sweep will take, before it starts: the memory and the time of each run, and what these numbers rest on.

Runs that cost the same (one model, precision, length, batch and recipe of gates) are forecast once, on a little of the
text: memory as `forecast_memory` does, time from a few steps of learning, or from runs of the folder that are done.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigram_circuits.learning.memory import forecast_memory
from bigram_circuits.learning.training import find_mask
from bigram_circuits.recipe import Request
from bigram_circuits.runs import RunFolder, StepRecord
from bigram_circuits.scale.folder import DONE, SweepFolder
from bigram_circuits.scale.launching import default_workers
from bigram_circuits.scale.spec import PlannedRun
from bigram_circuits.scale.sweeps import asked_for, default_folder
from bigram_circuits.scale.worker import in_order, reason_of
from bigram_circuits.text.corpus import DEFAULT_CONTEXT_LENGTH
from bigram_circuits.workflow import Subjects

_STEPS = 4  # of learning that are timed, but for the first
_TOKENS, _BATCHES = 1 << 17, 16  # of the text that are read for a forecast, at least


@dataclass(frozen=True)
class RunForecast:
    """What a run will take, about.

    Example:
        >>> forecast = bc.forecast_sweep({"max_tokens": 20_000, "grid": {"seed": [0, 1]}})
        >>> print([one.name for one in forecast.runs])
    """

    name: str
    """The name of its folder."""
    memory: int | None
    """Peak memory of its process, or on its GPU, in bytes, as `forecast_memory` has it; None if it cannot be told."""
    seconds: float | None
    """Time it takes, in seconds; None if it cannot be told."""
    basis: str
    """What the time rests on, or why there is no forecast, as a phrase."""


@dataclass(frozen=True)
class SweepForecast:
    """What the runs of a sweep will take, about.

    Example:
        >>> forecast = bc.forecast_sweep({"max_tokens": 20_000, "grid": {"seed": [0, 1]}}, workers=2)
        >>> print(forecast)
        >>> print(forecast.to_dataframe())
    """

    runs: tuple[RunForecast, ...]
    """The runs that are not done, in the order of the spec."""
    workers: int
    """Number of runs at a time."""
    done: int
    """Number of runs that are done."""

    @property
    def seconds(self) -> float:
        """Time that those which can be told take together with so many workers, in seconds."""
        return sum(one.seconds for one in self.runs if one.seconds is not None) / self.workers

    @property
    def memory(self) -> int:
        """Memory of as many of the largest runs as there are workers, in bytes, of those which can be told."""
        return sum(sorted(one.memory for one in self.runs if one.memory is not None)[-self.workers :])

    def to_dataframe(self) -> Any:
        """A pandas table: a row for each run."""
        import pandas as pd

        return pd.DataFrame(
            [dataclasses.asdict(one) for one in self.runs], columns=["name", "memory", "seconds", "basis"]
        )

    def __str__(self) -> str:
        width = max((len(one.name) for one in self.runs), default=0)
        lines = [f"{len(self.runs):,} runs to do, {self.done:,} done; {self.workers} at a time"]
        for one in self.runs:
            lines.append(
                f"  {one.name:<{width}}  {_gigabytes(one.memory):>8}  {_duration(one.seconds):>10}  {one.basis}"
            )
        untold = sum(one.seconds is None for one in self.runs)
        if self.runs:
            least = f", and what {untold:,} runs take, which cannot be told" if untold else ""
            lines.append(f"about {_duration(self.seconds)} in total, with {_gigabytes(self.memory)} of memory{least}")
        return "\n".join(lines)


def forecast_sweep(
    spec: Mapping[str, Any] | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    device: str | None = None,
) -> SweepForecast:
    """Say what the runs of a sweep will take, without starting them: about how much memory, and about how long.

    This is what `bigram-circuits sweep SPEC --dry-run` does. Each distinct model is loaded, a little of its text read,
    and for each kind of run a few steps of learning are timed, on all cores of this machine. That is the time of
    learning with all of its steps; evaluation and analyses come on top, and learning may end earlier. If a run of the
    same kind is done in the folder, its own time is taken instead, which has all of that.

    Args:
        spec: As for `sweep`.
        out: As for `sweep`. It is only read.
        workers: As for `sweep`.
        device: As for `sweep`.

    Raises:
        FileNotFoundError: As `sweep`.
        ValueError: As `sweep`. What a single run would raise later is said in its `basis`.

    Example:
        >>> forecast = bc.forecast_sweep({"max_tokens": 20_000, "grid": {"seed": [0, 1]}})
        >>> print(forecast)
    """
    asked = asked_for(spec)
    folder = SweepFolder(out or default_folder(spec, asked))
    known: dict[str, str] = {}
    if folder.exists:
        statuses = folder.statuses()
        known = {one.key: one.name for one in folder.runs if statuses[one.name][0] == DONE}
    every = [(one, one.request) for one in asked.runs]
    left = [(one, request) for one, request in every if one.key not in known]
    of_done = {kind_of(request): known[one.key] for one, request in every if one.key in known}
    found = _forecasts(left, {kind: folder.run(name) for kind, name in of_done.items()}, folder, device)
    n = workers or default_workers(device, max(1, len(left)))
    return SweepForecast(tuple(found[one.name] for one, _ in left), n, len(every) - len(left))


def kind_of(request: Request) -> tuple[Any, ...]:
    """What the cost of a run depends on; runs of one kind cost the same."""
    inputs, config = request.inputs, request.config
    where = inputs.model, inputs.revision, inputs.dtype, inputs.corpus, inputs.context_length, inputs.target
    gates = config.method, str(config.granularity), config.layers, config.units, config.replace, config.target_fraction
    return (
        *where, inputs.order, inputs.index, inputs.task, inputs.measure, *gates, config.along_path, config.max_steps,
        config.batch_size, config.short_until, config.short_length, config.worst_case, config.low_memory, config.polish,
        request.options,
    )  # fmt: skip


def _forecasts(
    left: list[tuple[PlannedRun, Request]],
    done: Mapping[tuple[Any, ...], Path],
    folder: SweepFolder,
    device: str | None,
) -> dict[str, RunForecast]:
    """A forecast for each run, by name."""
    last: tuple[Any, Subjects] | None = None
    kinds: dict[tuple[Any, ...], tuple[int | None, float | None, str]] = {}
    found = {}
    for one, request in in_order(left):
        kind = kind_of(request)
        if kind not in kinds:
            try:
                inputs = _little_text(request)
                if last is None or last[0] != inputs:
                    last = None
                    last = inputs, Subjects.load(inputs, device)
                kinds[kind] = _forecast(request, last[1], folder, done.get(kind))
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                kinds[kind] = None, None, reason_of(error)
        found[one.name] = RunForecast(one.name, *kinds[kind])
    return found


def _little_text(request: Request) -> Any:
    """The inputs of a run, with little of its text."""
    inputs = request.inputs
    if inputs.task is not None:
        return inputs
    most = max(_TOKENS, _BATCHES * request.config.batch_size * (inputs.context_length or DEFAULT_CONTEXT_LENGTH))
    return dataclasses.replace(inputs, max_tokens=min(most, inputs.max_tokens or most))


def _forecast(
    request: Request, of: Subjects, folder: SweepFolder, done: Path | None
) -> tuple[int | None, float | None, str]:
    """Memory, time and what the latter rests on, of one kind of run."""
    config = request.config
    memory = forecast_memory(of.model, of.target, of.corpus, config)
    if done is not None:
        state = folder.state(done.name)
        if state is not None and state.seconds is not None:
            steps = len(RunFolder(done).history())
            return memory.peak, state.seconds, f"as {done.name} took, with {steps:,} steps"
    if not memory.fits:
        return memory.peak, None, "it does not fit this device"
    clock = _Clock()
    short = dataclasses.replace(config, max_steps=_STEPS, polish=0, retries=0)
    find_mask(of.model, of.target, of.corpus, short, callbacks=[clock], check_memory="off")
    step = clock.seconds_per_step
    if step is None:
        return memory.peak, None, "learning ended too early to time it"
    seeds = request.options.seeds
    words = f"learning alone: {config.max_steps:,} steps of {step:.3g} s{f', {seeds} seeds' if seeds > 1 else ''}"
    return memory.peak, step * config.max_steps * seeds, words


class _Clock:
    """A callback that times the steps after the first."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def on_step(self, record: StepRecord) -> None:
        """Note when a step ended."""
        self._times.append(time.monotonic())

    def on_end(self, found: Any) -> None:
        """Do nothing."""

    @property
    def seconds_per_step(self) -> float | None:
        """Mean time of the steps after the first; None if there were none."""
        n = len(self._times) - 1
        return (self._times[-1] - self._times[0]) / n if n > 0 else None


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
