"""A run's folder: what was asked, how it went, what came out. Every file appears whole or not at all.

`config.json` is written first and says everything needed to run it again; a folder whose settings differ from the ones
asked for is never touched. While a run learns, `progress.jsonl` grows by a line a step and `checkpoint/` holds
the state to continue from; it is removed when the subnetwork is there.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigram_circuits import markup
from bigram_circuits.files import whole_file, write_text
from bigram_circuits.subnetwork import Subnetwork

_FORMAT = "bigram_circuits.run/1"
_PACKAGES = ("bigram_circuits", "torch", "transformer_lens", "transformers", "tokenizers", "numpy")
STOPS = {
    "decided": "nearly all gates were decided",
    "max_steps": "the most steps allowed were done",
    "unstable": "it stayed unstable in every attempt: do not trust it",
}
"""Why learning stopped, in words."""
LEFT_OUT = "left_out.json"
"""Beside the analyses of a run: those that the model does not show, with the reasons."""
_CHECKPOINT_SHARE = 0.02  # of the time spent learning, at most, goes into checkpoints
_CHECKPOINT_SECONDS = 20.0  # between two checkpoints, at least


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run that is learning."""

    tensors: Mapping[str, Tensor]
    """The gates' scores and the optimizer's moments."""
    step: int
    """Steps done."""
    attempt: int
    """Which data order, from 0."""
    seconds: float
    """Time spent learning so far."""


class RunFolder:
    """A folder that is being written by a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_checkpoint = time.monotonic()
        self._checkpoint_cost = 0.0

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        resume: bool = True,
        rebuild: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Make the folder of a run, or take up the one that is there if it was made with the same settings.

        Args:
            path: The folder.
            settings: What decides the result, as JSON values: model, corpus, target and recipe.
            resume: False removes what a run with the same settings left there.
            rebuild: How to make model, corpus and target again from names, if they can be.

        Raises:
            ValueError: If the folder holds a run with other settings, or files that are not a run.
            OSError: If it cannot be written.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{str(path)!r} is a file, but a run needs a folder")
        config = path / "config.json"
        wanted = json.loads(json.dumps(settings))
        if config.is_file():
            record = _read_json(config)
            if record.get("format") != _FORMAT:  # for example a model's folder
                raise ValueError(f"{str(config)!r} is not that of a run ({_FORMAT}): choose another folder")
            there = record.get("settings")
            if there != wanted:
                raise ValueError(
                    f"{str(path)!r} holds another run ({_difference(there, wanted)}): choose another folder"
                )
            folder = cls(path)
            if not resume:
                folder._clear()
            return folder
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(f"{str(path)!r} is not empty and holds no run: choose another folder")
        record = {"format": _FORMAT, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "settings": wanted}
        record |= {"rebuild": rebuild, "versions": versions()}
        write_text(config, json.dumps(record, indent=2) + "\n")
        return cls(path)

    def _clear(self) -> None:
        for name in ("subnetwork.safetensors", "metrics.json", "training.json", "progress.jsonl", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("checkpoint", "analysis", "falsify"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    # --- progress ---

    def history(self) -> list[dict[str, Any]]:
        """The records in `progress.jsonl`; a last line that was cut short is left out."""
        return _read_lines(self.path / "progress.jsonl")

    def begin_progress(self, records: list[dict[str, Any]]) -> None:
        """Start `progress.jsonl` with these records: those before a checkpoint, or none."""
        write_text(self.path / "progress.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to `progress.jsonl`."""
        with (self.path / "progress.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    # --- checkpoints ---

    def checkpoint_is_due(self) -> bool:
        """Whether enough time has passed that a checkpoint costs a small share of it."""
        pause = max(_CHECKPOINT_SECONDS, self._checkpoint_cost / _CHECKPOINT_SHARE)
        return time.monotonic() - self._last_checkpoint > pause

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint by this one."""
        started = time.monotonic()
        metadata = {"step": checkpoint.step, "attempt": checkpoint.attempt, "seconds": checkpoint.seconds}
        with whole_file(self.path / "checkpoint" / "state.safetensors") as temporary:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
            save_file(tensors, temporary, {"state": json.dumps(metadata)})
        self._last_checkpoint = time.monotonic()
        self._checkpoint_cost = self._last_checkpoint - started

    def read_checkpoint(self) -> Checkpoint | None:
        """The state to continue from, if there is one."""
        path = self.path / "checkpoint" / "state.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return Checkpoint(tensors, **state)

    # --- the end ---

    def finish(self, subnetwork: Subnetwork, outcome: Mapping[str, Any]) -> None:
        """Write the subnetwork and how the learning ended, then remove the checkpoint."""
        write_text(self.path / "training.json", json.dumps(outcome, indent=2) + "\n")
        subnetwork.save(self.path / "subnetwork.safetensors")
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether the subnetwork was found."""
        return (self.path / "subnetwork.safetensors").is_file()

    def outcome(self) -> dict[str, Any]:
        """What `finish` wrote about how the learning ended."""
        return _read_json(self.path / "training.json")

    def files(self) -> list[str]:
        """Names of the files in the folder."""
        return sorted(path.name for path in self.path.iterdir())

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`."""
        write_text(self.path / "metrics.json", json.dumps(metrics, indent=2) + "\n")


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    path: Path
    """The folder."""
    settings: dict[str, Any]
    """What was asked: model, corpus, target and recipe."""
    rebuild: dict[str, Any] | None
    """How to make model, corpus and target again; None for a run made in Python from objects."""
    versions: dict[str, str]
    """Of Python and the packages that matter."""
    subnetwork: Subnetwork
    """What was found."""
    outcome: dict[str, Any]
    """How the learning ended: `stopped_because`, `seconds`, `attempts`."""
    metrics: dict[str, Any] | None
    """The contents of `metrics.json`; None if it was not evaluated."""
    history: list[dict[str, Any]]
    """One record a training step."""

    @property
    def analyses(self) -> dict[str, Any]:
        """What `analyze` wrote about it, by name (`logit_lens`, ...); empty if nothing did."""
        from bigram_circuits.results import load_result

        files = sorted((self.path / "analysis").glob("*.json"))
        return {path.stem: load_result(path) for path in files if path.name != LEFT_OUT}

    @property
    def left_out(self) -> dict[str, str]:
        """What `analyze` left out because this model does not show it, with the reason."""
        path = self.path / "analysis" / LEFT_OUT
        return _read_json(path) if path.is_file() else {}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.subnetwork!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows: what was asked, how it ended, and the answer."""
        model, corpus = ((self.settings.get(part) or {}) for part in ("model", "corpus"))
        reason = self.outcome.get("stopped_because")
        asked = f"Model: {model.get('name')}. Text: {corpus.get('source')}."
        ended = f"Stopped after {len(self.history):,} steps: {STOPS.get(str(reason), reason)}"
        return markup.summary(
            f"Run in {self.path}", [asked, f"{ended}.", self._answer()], self.subnetwork._repr_html_()
        )

    def _answer(self) -> str:
        """In words: how faithful it is."""
        if self.metrics is None:
            return "It was not evaluated."
        r = self.metrics["subnetwork"].get("surprisal_correlation")
        words = "undefined" if r is None else f"{r:.3f}"
        return f"Correlation with the target's surprisals: {words}. {self.metrics.get('verdict', '')}".strip()


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read a finished run.

    Raises:
        FileNotFoundError: If there is no such folder, or no run in it.
        ValueError: If the run did not finish, or was written in another format.
    """
    path = Path(folder)
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{str(path)!r} holds no run: it has no config.json")
    record = _read_json(config)
    if record.get("format") != _FORMAT:
        raise ValueError(f"{str(config)!r} has format {record.get('format')!r}, but {_FORMAT!r} is needed")
    run = RunFolder(path)
    if not run.is_finished:
        raise ValueError(f"the run in {str(path)!r} is not finished: give the same command again to continue it")
    metrics = path / "metrics.json"
    return Run(
        path=path,
        settings=record["settings"],
        rebuild=record["rebuild"],
        versions=record["versions"],
        subnetwork=Subnetwork.load(path / "subnetwork.safetensors"),
        outcome=run.outcome(),
        metrics=_read_json(metrics) if metrics.is_file() else None,
        history=run.history(),
    )


def versions() -> dict[str, str]:
    """Versions of Python, the machine and the packages that decide a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found | {"threads": str(torch.get_num_threads())}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1]]  # what follows the last line end was cut short
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def _difference(there: Any, wanted: Any, at: str = "") -> str:
    """The first setting that differs, in words."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in (*there, *wanted):
            if there.get(key) != wanted.get(key):
                return _difference(there.get(key), wanted.get(key), f"{at}.{key}" if at else key)
    return f"its {at or 'settings'} is {there!r}, asked for was {wanted!r}"
