"""Nested subnetworks, or circuits, of several sizes, and one curve of faithfulness by size.

They are found from the largest to the smallest, each inside the one before (a dropped weight is never considered
again), so a smaller subnetwork is always contained in a larger one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.evaluation import Evaluation, evaluate
from bigram_circuits.learning.callbacks import Callback
from bigram_circuits.learning.found import FoundCircuit, FoundSubnetwork
from bigram_circuits.learning.ranks import refuse_several
from bigram_circuits.learning.training import find_mask
from bigram_circuits.measures.statistics import Faithfulness, mean_over_log_size
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.recipe import Inputs, SparsifyConfig
from bigram_circuits.runs import Run, load_run
from bigram_circuits.storage.files import checked_json, damaged, read_checked_json, remove_leftovers, write_text
from bigram_circuits.storage.locks import lock_folder
from bigram_circuits.storage.records import check_no_link
from bigram_circuits.storage.typed import Record
from bigram_circuits.text.corpus import Corpus

_FILE = "path.json"


@dataclass(frozen=True)
class SubnetworkPath:
    """Nested subnetworks from the largest to the smallest, with their faithfulness on held-out text.

    Example:
        >>> path = bc.sparsity_path(model, target, corpus, bc.SparsifyConfig(max_steps=1, batch_size=4), [1.0, 100.0])
        >>> path.to_dataframe()  # size and faithfulness of each, from the largest to the smallest
    """

    found: tuple[FoundSubnetwork | FoundCircuit, ...]
    """The subnetwork, or circuit, found at each sparsity weight."""
    measured: tuple[Faithfulness, ...]
    """The faithfulness of each."""
    empty: Faithfulness
    """The empty subnetwork: the zero of the scale."""
    full: Faithfulness
    """The full model."""

    @property
    def faithfulness(self) -> tuple[float, ...]:
        """1 - KL / KL of the empty subnetwork, for each: 1 if the target is reproduced, 0 if no better than empty."""
        return tuple(1 - one.kl / self.empty.kl for one in self.measured)

    @property
    def cpr(self) -> float:
        """Mean faithfulness over log10(fraction), from the smallest subnetwork to the largest."""
        return self._over_sizes(np.array(self.faithfulness))

    @property
    def cmd(self) -> float:
        """Mean distance of faithfulness from 1 over log10(fraction)."""
        return self._over_sizes(np.abs(1 - np.array(self.faithfulness)))

    def _over_sizes(self, values: np.ndarray) -> float:
        return mean_over_log_size(np.array([one.fraction for one in self.measured]), values)

    def to_json(self) -> dict[str, Any]:
        """The contents of `path.json`."""
        points = tuple(
            _Point(
                **vars(one),
                sparsity_weight=found.config.sparsity_weight,
                faithfulness=faithful,
                subnetwork=found.mask.checksum,
            )
            for found, one, faithful in zip(self.found, self.measured, self.faithfulness, strict=True)
        )
        return _File(points, self.cpr, self.cmd, self.empty, self.full).to_json()

    def to_dataframe(self) -> Any:
        """A pandas table with a row for each subnetwork."""
        import pandas as pd

        weights = [found.config.sparsity_weight for found in self.found]
        table = pd.DataFrame([asdict(one) for one in self.measured], index=pd.Index(weights, name="sparsity_weight"))
        return table.assign(faithfulness=self.faithfulness)

    def __str__(self) -> str:
        lines = [f"{'sparsity weight':>15}{'kept':>12}{'share':>9}{'r':>8}{'KL':>8}{'faithfulness':>14}"]
        for found, one, faithful in zip(self.found, self.measured, self.faithfulness, strict=True):
            lines.append(
                f"{found.config.sparsity_weight:>15g}{one.kept:>12,}{100 * one.fraction:>8.2f}%"
                f"{one.surprisal_correlation:>8.3f}{one.kl:>8.3f}{faithful:>14.3f}"
            )
        lines.append("faithfulness: 1 - KL / KL of the empty subnetwork")
        lines.append(f"mean over log size: faithfulness (CPR) {self.cpr:.3f}, distance from 1 (CMD) {self.cmd:.3f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Point(Faithfulness):
    """One subnetwork of a path, as `path.json` holds it."""

    sparsity_weight: float | int
    faithfulness: float = math.nan
    subnetwork: str | None = None
    """Checksum of its masks; version 0.1.0 did not record it."""

    @property
    def folder(self) -> str:
        """Name of its run folder."""
        return _folder_of(self.sparsity_weight)

    def evaluation(self, ends: _File) -> Evaluation:
        """Its evaluation, with the empty subnetwork and the full model as controls."""
        own = Faithfulness(**{one.name: getattr(self, one.name) for one in fields(Faithfulness)})
        return Evaluation(own, full=ends.full, empty=ends.empty)


@dataclass(frozen=True)
class _File(Record):
    """The contents of `path.json`."""

    points: tuple[_Point, ...]
    cpr: float
    cmd: float
    empty: Faithfulness
    full: Faithfulness


def _folder_of(weight: float | int) -> str:
    return f"weight-{weight:g}"


@uses_model
def sparsity_path(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig,
    sparsity_weights: Sequence[float | int],
    *,
    run_dir: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    check_memory: str = "warn",
    rebuild: Inputs | None = None,
) -> SubnetworkPath:
    """Find nested subnetworks, or circuits, along increasing sparsity weights, and measure each on held-out text.

    Args:
        model: From `load_model`.
        target: A target that has an entropy, so that KL and faithfulness are defined.
        corpus: Masks are learned on its training part and measured on its held-out part.
        config: The recipe; its `sparsity_weight` is replaced by each in turn. With `units`, circuits are found.
        sparsity_weights: At least two different ones; taken from the smallest (largest subnetwork) to the largest.
        run_dir: A folder for the path: one run folder for each sparsity weight, and `path.json`.
        callbacks: As for `find_subnetwork`.
        check_memory: As for `find_subnetwork`.
        rebuild: Names of model, text and target, recorded in the run folders for the command line.

    Raises:
        ValueError: If there are fewer than two different sparsity weights, or `config` sets `target_fraction`.
        OSError: If another process is writing to `run_dir`, or it cannot be written.

    Example:
        >>> path = bc.sparsity_path(model, target, corpus, bc.SparsifyConfig(max_steps=1, batch_size=4), [1.0, 100.0])
        >>> [one.subnetwork.kept for one in path.found]
    """
    refuse_several("sparsity_path")
    weights = sorted(set(sparsity_weights))
    if len(weights) < 2:
        raise ValueError(f"a path needs at least two different sparsity weights, not {list(sparsity_weights)}")
    if config.target_fraction is not None:
        raise ValueError("a path varies sparsity_weight: leave out target_fraction")
    how: dict[str, Any] = {"rebuild": rebuild, "callbacks": callbacks, "check_memory": check_memory}
    if run_dir is None:
        return _along(weights, model, target, corpus, config, None, how)
    with lock_folder(run_dir):
        remove_leftovers(Path(run_dir))
        path = _along(weights, model, target, corpus, config, Path(run_dir), how)
        write_text(Path(run_dir) / _FILE, checked_json(path.to_json()))
    return path


def _along(
    weights: Sequence[float | int], model: Model, target: Any, corpus: Corpus, config: SparsifyConfig,
    run_dir: Path | None, how: Mapping[str, Any],
) -> SubnetworkPath:  # fmt: skip
    found: list[FoundSubnetwork | FoundCircuit] = []
    within = None
    for weight in weights:
        folder = None if run_dir is None else run_dir / _folder_of(weight)
        if folder is not None:
            check_no_link(folder)
        recipe = replace(config, sparsity_weight=weight)
        found.append(find_mask(model, target, corpus, recipe, run_dir=folder, within=within, **how))
        within = found[-1].mask
    ends = [found[0].mask.constant(value) for value in (False, True)]
    measured = [
        evaluate(model, mask, target, corpus.held_out, controls=False).subnetwork
        for mask in (*ends, *(one.mask for one in found))
    ]
    return SubnetworkPath(tuple(found), tuple(measured[2:]), empty=measured[0], full=measured[1])


find_path = sparsity_path
"""The former name of `sparsity_path`."""


def is_path(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder was written by `sparsity_path`."""
    return (Path(folder) / _FILE).is_file()


def load_path_runs(folder: str | os.PathLike[str]) -> list[Run]:
    """The runs of a path with its measurements, from the smallest sparsity weight (the largest subnetwork) on.

    Raises:
        FileNotFoundError: If there is no path in the folder, or one of its runs is missing.
        ValueError: If one of its files cannot be read.
    """
    if not is_path(folder):
        raise FileNotFoundError(f"{str(folder)!r} holds no path: it has no {_FILE}")
    runs = []
    for point in _read(Path(folder)).points:
        check_no_link(Path(folder) / point.folder)
        run = load_run(Path(folder) / point.folder, history=False)
        if not _is_of(point, run):
            raise ValueError(
                f"{str(run.path)!r} holds another run than the one that {_FILE} measured; `find` with the same "
                "--sparsity-weights writes it again"
            )
        runs.append(with_path_evaluation(run))
    return runs


def _is_of(point: _Point, run: Run) -> bool:
    """Whether a point of a path is of the subnetwork of a run."""
    return point.kept == run.mask.kept and (
        point.subnetwork == run.mask.checksum or (point.subnetwork is None and run.is_former)
    )


def with_path_evaluation(run: Run) -> Run:
    """A run with the evaluation of the path it belongs to, if any, unless the run has its own."""
    folder = run.path.absolute().parent
    if run.evaluation is not None or not is_path(folder):
        return run
    ends = _read(folder)
    for point in ends.points:
        if run.path.absolute().name == point.folder and _is_of(point, run):
            return replace(run, evaluation=point.evaluation(ends))
    return run


def _read(folder: Path) -> _File:
    path, remedy = folder / _FILE, "`find` with the same --sparsity-weights writes it again"
    record = read_checked_json(path, remedy)
    with damaged(path, remedy):
        return _File.from_json(record)
