"""What a sweep has found so far, as a value: its runs, their numbers in one table, and pages that compare them."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigram_circuits.evaluation import Evaluation
from bigram_circuits.experiments.comparison import compare
from bigram_circuits.measures.quantities import FAITHFULNESS
from bigram_circuits.measures.words import rounded
from bigram_circuits.names import short_name
from bigram_circuits.progress import note
from bigram_circuits.report.comparison import write_comparison
from bigram_circuits.runs import Run, RunFolder, load_run
from bigram_circuits.runs.contents import read_config
from bigram_circuits.scale.folder import DONE, FAILED, WAITING, SweepFolder
from bigram_circuits.scale.launching import words_of
from bigram_circuits.scale.spec import OPTIONS, settings_of
from bigram_circuits.storage.files import whole_file, write_text

_COUNTS = ("kept", "total", "fraction")
_MOST_LISTED = 40  # runs in the text of a sweep


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep, and how far it is.

    Example:
        >>> run = bc.load_sweep("runs/sweep").runs[0]
        >>> print(run.status, run.settings["seed"], run.load().subnetwork)
    """

    name: str
    """The name of its folder."""
    path: Path
    """Its folder."""
    settings: Mapping[str, Any] = field(repr=False)
    """Every option by name, also those that were not given; what has parts is as on the command line."""
    status: str
    """`done`, `learning`, `queued` (a SLURM job that has not begun), `waiting` or `failed`."""
    reason: str | None = None
    """Why it failed, in one line; None if it did not."""
    seconds: float | None = None
    """Seconds that it took, from the start of its work to its end; None before."""
    job: str | None = None
    """The SLURM job that it was given to."""

    def load(self) -> Run:
        """The run, as `load_run` reads it.

        Raises:
            FileNotFoundError: If it was not started.
            ValueError: If it is not finished, or damaged.
        """
        return load_run(self.path)


@dataclass(frozen=True)
class Sweep:
    """Many runs, in one folder.

    Example:
        >>> found = bc.load_sweep("runs/sweep")
        >>> print(found)
        >>> found.to_dataframe()[["name", "surprisal_correlation", "kl"]]
    """

    path: Path
    """The folder."""
    runs: tuple[SweepRun, ...]
    """Its runs, in the order of the spec."""

    @property
    def failed(self) -> tuple[SweepRun, ...]:
        """The runs that failed, each with its reason; the same call of `sweep` tries them again."""
        return tuple(one for one in self.runs if one.status == FAILED)

    @property
    def done(self) -> tuple[SweepRun, ...]:
        """The runs that are done."""
        return tuple(one for one in self.runs if one.status == DONE)

    @property
    def is_done(self) -> bool:
        """Whether every run is done or has failed."""
        return all(one.status in (DONE, FAILED) for one in self.runs)

    @property
    def differing(self) -> tuple[str, ...]:
        """The settings that differ between runs."""
        return tuple(name for name in OPTIONS if len({one.settings[name] for one in self.runs}) > 1)

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each run, whatever its status.

        Columns are its name, the settings that differ, status and reason; `seconds` (all of its work) and
        `learning_seconds`, `stopped_because`; the subnetwork's numbers with the ends of their 95% intervals
        (`kl`, `kl_low`, `kl_high`), those of each control (`kl_random`, `kl_full_minus_random`, a mean over draws), in
        nats where `Faithfulness` says so; then the settings that are the same for all, and the folder, relative to the
        sweep's. What is not known yet is missing.

        Raises:
            ValueError: If a file of a run is damaged.
        """
        import pandas as pd

        differing = self.differing
        rows = [_row(one, differing, self.path) for one in self.runs]
        columns = dict.fromkeys(name for row in rows for name in row)
        first = ["name", *differing, "status", "reason", "seconds"]
        last = [*(name for name in OPTIONS if name not in differing), "folder"]
        middle = [name for name in columns if name not in (*first, *last)]
        table = {name: _column([row.get(name) for row in rows]) for name in (*first, *middle, *last)}
        return pd.DataFrame(table)

    def __str__(self) -> str:
        counts = Counter(one.status for one in self.runs)
        lines = [f"{len(self.runs):,} runs in {self.path}: {words_of(counts)}"]
        width = max(len(one.name) for one in self.runs)
        listed = sorted(self.runs, key=lambda one: one.status == DONE) if len(self.runs) > _MOST_LISTED else self.runs
        for one in listed[:_MOST_LISTED]:
            lines.append(f"  {one.name:<{width}}  {one.status:<8}  {_told(one)}".rstrip())
        if len(listed) > _MOST_LISTED:
            lines.append(f"  and {len(listed) - _MOST_LISTED:,} more")
        return "\n".join(lines)


def _told(run: SweepRun) -> str:
    """What is known of a run, in a line."""
    if run.status == FAILED:
        return run.reason or ""
    if run.status != DONE:
        return f"job {run.job}" if run.job and run.status != WAITING else ""
    evaluation = RunFolder(run.path).evaluation()
    took = f"{run.seconds:.0f} s" if run.seconds is not None else ""
    if evaluation is None:
        return took
    own = evaluation.subnetwork
    return f"r {rounded(own.surprisal_correlation)}, KL {rounded(own.kl)}, {own.kept:,} kept, {took}"


def read_sweep(folder: SweepFolder) -> Sweep:
    """The runs of a sweep, and how far each is."""
    jobs = folder.jobs
    statuses = folder.statuses()
    runs = []
    for one in folder.runs:
        status, state = statuses[one.name]
        reason, seconds = (state.reason, state.seconds) if state else (None, None)
        settings, job = settings_of(one.request), jobs.get(one.name)
        runs.append(SweepRun(one.name, folder.run(one.name), settings, status, reason, seconds, job))
    return Sweep(folder.path, tuple(runs))


def _row(run: SweepRun, differing: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """What the table says of a run."""
    row = {"name": run.name, **run.settings, "status": run.status, "reason": run.reason, "seconds": run.seconds}
    row["folder"] = run.path.relative_to(folder).as_posix()
    if run.status != DONE:
        return row
    files = RunFolder(run.path)
    outcome, evaluation = files.outcome(), files.evaluation()
    row |= {"learning_seconds": outcome.seconds, "stopped_because": outcome.stopped_because}
    return row if evaluation is None else row | _numbers(evaluation)


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    """Every number of an evaluation, by the name of its column."""
    found: dict[str, Any] = {}
    for condition, values in evaluation.rows():
        ending = "" if condition == "subnetwork" else f"_{condition.replace(' - ', '_minus_')}"
        found |= {f"{name}{ending}": values[name] for name in _COUNTS if not ending or name == "kept"}
        for name in (one.name for one in FAITHFULNESS):
            found[f"{name}{ending}"] = values[name]
            if name in evaluation.intervals.get(condition, {}):
                found[f"{name}{ending}_low"], found[f"{name}{ending}_high"] = evaluation.interval(condition, name)
    return found


def _column(values: list[Any]) -> Any:
    """A column of one type, in which values may be missing; text if numbers and texts are mixed."""
    import pandas as pd

    kinds = {type(one) for one in values if one is not None}
    for dtype, allowed in (("boolean", {bool}), ("Int64", {int}), ("float64", {int, float})):
        if kinds and kinds <= allowed:
            return pd.Series(values, dtype=dtype)
    return pd.Series([None if one is None else str(one) for one in values], dtype="string")


def write_results(sweep: Sweep) -> list[Path]:
    """Write the table (CSV and Parquet) and, for each model, the page that compares its runs; returns the files."""
    frame = sweep.to_dataframe()
    written = [sweep.path / "table.csv", sweep.path / "table.parquet"]
    write_text(written[0], frame.to_csv(index=False))
    data = io.BytesIO()
    frame.to_parquet(data, index=False)
    with whole_file(written[1]) as temporary:
        temporary.write_bytes(data.getvalue())
    groups = _comparable(sweep)
    for name, runs in groups.items():
        path = sweep.path / (f"comparison-{name}.html" if len(groups) > 1 else "comparison.html")
        try:
            written.append(write_comparison(compare({one.name: one.path for one in runs}), path))
        except ValueError as error:
            note(f"note: no page compares the runs of {name}: {error}")
    return written


def _comparable(sweep: Sweep) -> dict[str, list[SweepRun]]:
    """The runs that are done and can be compared, two or more of one model, by its name."""
    groups: dict[Any, list[SweepRun]] = {}
    names: dict[Any, str] = {}
    for one in sweep.done:
        model = read_config(one.path).settings.model
        key = model.weight_hash, one.settings["units"]
        groups.setdefault(key, []).append(one)
        words = short_name(model.name or "model").rstrip("/").rsplit("/", 1)[-1], one.settings["revision"], key[1]
        names[key] = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(str(word) for word in words if word)).strip("-.")
    found: dict[str, list[SweepRun]] = {}
    for key, runs in groups.items():
        if len(runs) > 1:
            name, number = names[key] or "model", 2
            while name in found:
                name, number = f"{names[key]}-{number}", number + 1
            found[name] = runs
    return found
