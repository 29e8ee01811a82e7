"""A run's folder: what was asked, how it went, what came out. Every file appears whole or not at all.

`config.json` is written first and says everything needed to run it again; a folder whose settings differ from the ones
asked for is never touched. While a run learns, `progress.jsonl` grows by a line a step and `checkpoint/` holds
the state to continue from; it is removed when the subnetwork is there.

Whenever a run is killed, the same command continues it to the same result. What a checkpoint needs is on the disk
before the checkpoint is, and it vouches for it: it knows how much of `progress.jsonl` came before, and its digest.
Who writes holds the folder's lock (`locks.py`), and first clears away what a killed process left half done.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigram_circuits.evaluation import Evaluation, SoftHardGap
from bigram_circuits.measures import html
from bigram_circuits.measures.results import Result, load_result
from bigram_circuits.measures.words import rounded
from bigram_circuits.recipe import Inputs, SparsifyConfig
from bigram_circuits.storage.files import (
    cannot_write,
    checked_json,
    damaged,
    is_leftover,
    read_checked_json,
    recover_folder,
    remove_leftovers,
    whole_file,
    write_text,
)
from bigram_circuits.storage.locks import holder, is_lock, lock_folder
from bigram_circuits.storage.records import parse_json, shown
from bigram_circuits.storage.typed import Record, from_json, to_json
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
RENAMED = {"exciting_tokens": "max_activating_tokens"}
"""Analyses that an earlier version wrote under another name, and what they are called now."""
_CHECKPOINT_SHARE = 0.02  # of the time spent learning, at most, goes into checkpoints
_CHECKPOINT_SECONDS = 20.0  # between two checkpoints, at least
_CHECKPOINT_SPEED = 2e8  # bytes a second, as long as no checkpoint was written that could be timed


# --- what the files of a run hold -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelIdentity(Record):
    """What tells a run's model from others."""

    name: str | None = None
    """As it was loaded."""
    revision: str | None = None
    """Of a hub model."""
    weight_hash: str | None = None
    """Hash of its maskable weights."""
    dtype: str | None = None
    """Precision of its weights."""


@dataclass(frozen=True)
class CorpusIdentity(Record):
    """What tells a run's text from others."""

    source: str | None = None
    """What was read, in words."""
    fingerprint: str | None = None
    """Hash of its tokens."""
    tokenizer_hash: str | None = None
    """Hash of the tokenizer's vocabulary."""
    context_length: int | None = None
    """Tokens in a sequence."""


@dataclass(frozen=True)
class TargetIdentity(Record):
    """What tells a run's target from others."""

    kind: str | None = None
    """Name of its class."""
    fingerprint: str | None = None
    """Its own, if it has one."""


@dataclass(frozen=True)
class RunSettings(Record):
    """What decides a run's result; a run's folder is tied to it."""

    model: ModelIdentity
    """The model."""
    corpus: CorpusIdentity
    """The text."""
    target: TargetIdentity
    """The target."""
    recipe: SparsifyConfig
    """How masks are learned."""
    within: str | None = None
    """Checksum of the subnetwork that was looked inside, if any."""


@dataclass(frozen=True)
class StepRecord(Record):
    """A step of learning, as `progress.jsonl` holds it."""

    attempt: int
    """Which data order, from 0."""
    step: int
    """From 0."""
    cross_entropy: float
    """From the target to the softly masked model, nats."""
    fraction: float
    """Of the maskable weights, those that would be kept if learning ended now."""
    undecided: float
    """Share of the gates between 0.1 and 0.9."""
    due: float | None = None
    """Share of the gated weights that should be open by now; None without a share to reach."""
    above_zero: float | None = None
    """Share of the gated weights with a positive score."""
    penalty: float | None = None
    """Mean penalised gate."""
    sparsity_weight: float | int | None = None
    """The penalty's weight."""


@dataclass(frozen=True)
class Rollback(Record):
    """An explosion of the loss, and what was done about it."""

    attempt: int
    """In which attempt."""
    step: int
    """At which step."""
    what: str
    """What happened, in words."""
    back_to: int
    """The step that the run went back to."""
    learning_rate: float
    """The learning rate from there on."""


@dataclass(frozen=True)
class Outcome(Record):
    """How learning ended."""

    stopped_because: str
    """`decided` (few gates were undecided), `max_steps`, and, after the last retry, `unstable`."""
    seconds: float = math.nan
    """Time spent learning."""
    attempts: int = 1
    """How many data orders were tried."""
    soft_hard: SoftHardGap | None = None
    """Cross-entropy with the last soft gates, and with the mask made of them; None if it was not noted."""
    rollbacks: tuple[Rollback, ...] = ()
    """Each time the loss was not finite or exploded. The abandoned steps are not in the history."""

    @property
    def why(self) -> str:
        """Why learning stopped, in words."""
        return STOPS[self.stopped_because]

    def __post_init__(self) -> None:
        if self.stopped_because not in STOPS:
            raise ValueError(f"stopped_because should be one of {', '.join(STOPS)}, not {shown(self.stopped_because)}")


@dataclass(frozen=True)
class _Config(Record):
    """The contents of `config.json`."""

    format: str
    settings: RunSettings
    rebuild: Inputs | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str | None = None


@dataclass(frozen=True)
class _ProgressState(Record):
    """How long `progress.jsonl` is, in bytes, and its digest."""

    size: int
    digest: str


@dataclass(frozen=True)
class _CheckpointState(Record):
    """What a checkpoint's header says."""

    step: int
    attempt: int
    seconds: float
    rollbacks: tuple[Rollback, ...] = ()
    good_step: int | None = None
    progress: _ProgressState | None = None


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
    rollbacks: tuple[Rollback, ...] = ()
    """Where the loss exploded in this attempt, and what was done."""
    good_step: int | None = None
    """The step of the last good state, whose tensors are named `good.`; None: there is none but the attempt's start."""

    def state(self, progress: _ProgressState | None) -> _CheckpointState:
        """All but the tensors, with what came before it in `progress.jsonl`."""
        return _CheckpointState(self.step, self.attempt, self.seconds, self.rollbacks, self.good_step, progress)


class RunFolder:
    """A folder that is being written by a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = self._last_checkpoint = time.monotonic()
        self._checkpoint_cost: float | None = None  # of the last one, in seconds
        self._spent = 0.0  # on all of them
        self._progress: _Progress | None = None  # what is in progress.jsonl, once this process has written to it

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        settings: RunSettings,
        *,
        resume: bool = True,
        rebuild: Inputs | None = None,
    ) -> RunFolder:
        """Make the folder of a run, or take up the one that is there if it was made with the same settings.

        Args:
            path: The folder.
            settings: What decides the result: model, corpus, target and recipe.
            resume: False removes what a run with the same settings left there.
            rebuild: How to make model, corpus and target again from names, if they can be.

        Raises:
            ValueError: If the folder holds a run with other settings, or files that are not a run.
            OSError: If it cannot be written.
        """
        path = Path(path)
        is_there = _check_settings(path, settings)
        folder = cls(path)
        if is_there and resume:
            return folder
        with folder.lock():
            if _check_settings(path, settings):  # again: another process may have been faster
                if not resume:
                    folder._clear()
                return folder
            created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            config = _Config(_FORMAT, settings, rebuild, versions(), created)
            write_text(path / "config.json", checked_json(config.to_json()))
        return folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Within the block, no other process writes here; what a killed one left half done is cleared away first.

        Raises:
            FolderInUseError: If another process is writing here; the message says which.
        """
        with lock_folder(self.path):
            recover_folder(self.path / "analysis")
            for place in (self.path, self.path / "checkpoint", self.path / "analysis"):
                remove_leftovers(place)
            if self.is_finished:
                shutil.rmtree(self.path / "checkpoint", ignore_errors=True)
            yield

    def _clear(self) -> None:
        for name in ("subnetwork.safetensors", "metrics.json", "training.json", "progress.jsonl", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("checkpoint", "analysis", "falsify"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    # --- progress ---

    def history(self) -> list[StepRecord]:
        """The records in `progress.jsonl`; a last line that was cut short is left out."""
        return _read_lines(self.path / "progress.jsonl")

    def begin_progress(self, records: Sequence[StepRecord]) -> None:
        """Start `progress.jsonl` with these records: those before a checkpoint, or none."""
        text = "".join(map(_line, records))
        write_text(self._progress_path, text)
        self._progress = _Progress(text.encode())

    def log(self, record: StepRecord) -> None:
        """Append a record to `progress.jsonl`."""
        if self._progress is None:
            self.begin_progress(self.history())  # a last line that was cut short goes
            assert self._progress is not None
        line = _line(record).encode()
        with cannot_write(self._progress_path), self._progress_path.open("ab") as file:
            file.write(line)
        self._progress.add(line)

    @property
    def _progress_path(self) -> Path:
        return self.path / "progress.jsonl"

    def _sync_progress(self) -> _ProgressState | None:
        """Have `progress.jsonl` on the disk; returns its digest and size."""
        if self._progress is None:
            if not self._progress_path.is_file():
                return None
            self._progress = _Progress(self._progress_path.read_bytes())
        with cannot_write(self._progress_path), self._progress_path.open("rb+") as file:
            os.fsync(file.fileno())
        return self._progress.state()

    # --- checkpoints ---

    def checkpoint_is_due(self, size: int = 0) -> bool:
        """Whether so much time has passed that all checkpoints, with one of `size` bytes now, cost little of it."""
        now = time.monotonic()
        cost = size / _CHECKPOINT_SPEED if self._checkpoint_cost is None else self._checkpoint_cost
        is_cheap = self._spent + cost <= _CHECKPOINT_SHARE * (now - self._opened)
        return is_cheap and now - self._last_checkpoint > _CHECKPOINT_SECONDS

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint by this one, which comes after all that is in `progress.jsonl`."""
        self._write_checkpoint(checkpoint, self._sync_progress())

    def rewind(self, checkpoint: Checkpoint, records: Sequence[StepRecord]) -> None:
        """Go back to an earlier state, before which there were these first records of `progress.jsonl`."""
        before = _Progress("".join(map(_line, records)).encode())
        self._sync_progress()
        self._write_checkpoint(checkpoint, before.state())  # killed here, it vouches for the first records alone
        self.begin_progress(records)

    def _write_checkpoint(self, checkpoint: Checkpoint, progress: _ProgressState | None) -> None:
        started = time.monotonic()
        state = json.dumps(checkpoint.state(progress).to_json())
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        with whole_file(self._checkpoint_path) as temporary:
            save_file(tensors, temporary, {"state": state, "checksum": _checksum(state, tensors)})
        self._last_checkpoint = time.monotonic()
        self._checkpoint_cost = self._last_checkpoint - started
        self._spent += self._checkpoint_cost

    @property
    def _checkpoint_path(self) -> Path:
        return self.path / "checkpoint" / "state.safetensors"

    def read_checkpoint(self) -> Checkpoint | None:
        """The state to continue from, if there is one.

        Raises:
            ValueError: If it is damaged.
        """
        found = self._read_checkpoint()
        return found and found[0]

    def _read_checkpoint(self) -> tuple[Checkpoint, _ProgressState | None] | None:
        """With what it says about `progress.jsonl`."""
        path = self._checkpoint_path
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            if "checksum" in metadata and metadata["checksum"] != _checksum(metadata["state"], tensors):
                raise ValueError("its contents do not agree with its checksum")
            state = _CheckpointState.from_json(parse_json(metadata["state"]))
            found = Checkpoint(tensors, state.step, state.attempt, state.seconds, state.rollbacks, state.good_step)
            return found, state.progress
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error

    def take_up(self) -> tuple[Checkpoint | None, list[StepRecord]]:
        """The state to continue from, and the progress made before it. What came after it is removed.

        If one of them is damaged, this says so, and the run starts over.
        """
        try:
            found = self._read_checkpoint()
            checkpoint, progress = found or (None, None)
            records = self._records_before(checkpoint, progress)
        except ValueError as error:
            print(f"note: {error}; learning starts over, and ends in the same subnetwork", file=sys.stderr)
            shutil.rmtree(self._checkpoint_path.parent)
            checkpoint, records = None, []
        if checkpoint:
            self._note_other_versions()
        self.begin_progress(records)
        return checkpoint, records

    def _records_before(self, checkpoint: Checkpoint | None, progress: _ProgressState | None) -> list[StepRecord]:
        if checkpoint is None:
            return []
        if progress is None:  # written by a version that did not note it
            place = (checkpoint.attempt, checkpoint.step)
            return [record for record in self.history() if (record.attempt, record.step) < place]
        before = self._progress_path.read_bytes()[: progress.size] if self._progress_path.is_file() else b""
        if _Progress(before).state() != progress:
            raise ValueError(f"{str(self._progress_path)!r} is damaged: it is not what came before the checkpoint")
        return [StepRecord.from_json(parse_json(line)) for line in before.splitlines()]

    def _note_other_versions(self) -> None:
        then, now = _read_config(self.path).versions, versions()
        other = [f"{name} {now[name]}, then {then[name]}" for name in now if then.get(name, now[name]) != now[name]]
        if other:
            print(
                f"note: this run was begun with other versions ({'; '.join(other)}): "
                "its last bits may not be those of a run without interruption",
                file=sys.stderr,
            )

    # --- the end ---

    def finish(self, subnetwork: Subnetwork, outcome: Outcome) -> None:
        """Write the subnetwork and how the learning ended, then remove the checkpoint."""
        record = outcome.to_json() | {"progress": to_json(self._sync_progress())}
        write_text(self.path / "training.json", checked_json(record))
        subnetwork.save(self.path / "subnetwork.safetensors")
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether the subnetwork was found."""
        return (self.path / "subnetwork.safetensors").is_file()

    def outcome(self) -> Outcome:
        """What `finish` wrote about how the learning ended."""
        return self._read_outcome()[0]

    def _read_outcome(self) -> tuple[Outcome, _ProgressState | None]:
        path = self.path / "training.json"
        remedy = f"`find` with --fresh and --out {self.path} learns the subnetwork again"
        record = read_checked_json(path, remedy)
        with damaged(path, remedy):
            progress = from_json(_ProgressState | None, record.pop("progress", None), "progress")
            return Outcome.from_json(record), progress

    def check_progress(self) -> None:
        """Check that `progress.jsonl`, if it is there, is what `finish` saw.

        Raises:
            ValueError: If it is not.
        """
        noted = self._read_outcome()[1]  # older runs have none
        if noted and self._progress_path.is_file() and _Progress(self._progress_path.read_bytes()).state() != noted:
            raise ValueError(
                f"{str(self._progress_path)!r} is damaged: its lines are not those the run wrote; without the file, "
                "the run is read without its history"
            )

    def files(self) -> list[str]:
        """Names of the files in the folder, but for the lock."""
        return sorted(path.name for path in self.path.iterdir() if not is_lock(path))

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write `metrics.json`."""
        write_text(self.path / "metrics.json", checked_json(evaluation.to_json()))

    def evaluation(self) -> Evaluation | None:
        """What `write_evaluation` wrote; None if it was not evaluated.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.path / "metrics.json"
        if not path.is_file():
            return None
        remedy = f"remove it, and `evaluate {self.path}` writes it again"
        record = read_checked_json(path, remedy)
        with damaged(path, remedy):
            return Evaluation.from_json(record)


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    path: Path
    """The folder."""
    settings: RunSettings
    """What was asked: model, corpus, target and recipe."""
    rebuild: Inputs | None
    """Model, text and target by name; None for a run made in Python from objects."""
    versions: Mapping[str, str]
    """Of Python and the packages that matter."""
    subnetwork: Subnetwork
    """What was found."""
    outcome: Outcome
    """How the learning ended."""
    evaluation: Evaluation | None
    """How faithful it is, with its controls; None if it was not evaluated."""
    history: list[StepRecord]
    """One record a training step."""

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The contents of `metrics.json`: `evaluation` as JSON values."""
        return None if self.evaluation is None else self.evaluation.to_json()

    @property
    def analyses(self) -> dict[str, Result]:
        """What `analyze` wrote about it, by name (`logit_lens`, ...); empty if nothing did."""
        files = sorted((self.path / "analysis").glob("*.json"))
        return {RENAMED.get(path.stem, path.stem): load_result(path) for path in files if path.name != LEFT_OUT}

    @property
    def left_out(self) -> dict[str, str]:
        """What `analyze` left out because this model does not show it, with the reason."""
        path = self.path / "analysis" / LEFT_OUT
        left_out = read_checked_json(path) if path.is_file() else {}
        return {RENAMED.get(name, name): reason for name, reason in left_out.items()}

    @property
    def model_words(self) -> str:
        """The name of its model, in words."""
        name = (self.rebuild and self.rebuild.model) or self.settings.model.name or self.subnetwork.model_name
        return "the reference model" if name == "reference" else str(name or "a model")

    @property
    def target_words(self) -> tuple[str, str]:
        """Its target's name, and what it is, in words."""
        if self.rebuild is not None:
            kind, order = self.rebuild.kind_of_target, self.rebuild.order
            return kind.label(order), kind.meaning(order)
        kind = self.settings.target.kind or "target"
        return kind, f"the target {kind}"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.subnetwork!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows: what was asked, how it ended, and the answer."""
        asked = f"Model: {self.settings.model.name}. Text: {self.settings.corpus.source}."
        ended = f"Stopped after {len(self.history):,} steps: {self.outcome.why}."
        shown = self.subnetwork._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return html.summary(f"Run in {self.path}", [asked, ended, self._answer()], shown)

    def _answer(self) -> str:
        """In words: how faithful it is."""
        if self.evaluation is None:
            return "It was not evaluated."
        r = rounded(self.evaluation.subnetwork.surprisal_correlation)
        return f"Correlation with the target's surprisals: {r}. {self.evaluation.verdict}"


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read a finished run.

    Raises:
        FileNotFoundError: If there is no such folder, or no run in it.
        ValueError: If the run did not finish, or was written in another format.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{str(path)!r} holds no run: it has no config.json")
    config = _read_config(path)
    run = RunFolder(path)
    if not run.is_finished:
        who = holder(path)
        raise ValueError(
            f"the run in {str(path)!r} is not finished: "
            + (f"wait for {who}, or, if that is gone, " if who else "")
            + "give the same command again to continue it"
        )
    subnetwork = Subnetwork.load(path / "subnetwork.safetensors")
    outcome = run.outcome()
    run.check_progress()
    return Run(
        path=path,
        settings=config.settings,
        rebuild=config.rebuild,
        versions=config.versions,
        subnetwork=subnetwork,
        outcome=outcome,
        evaluation=run.evaluation(),
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


def _check_settings(path: Path, wanted: RunSettings) -> bool:
    """Whether a folder holds the run that is wanted; False if it may become it."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file, but a run needs a folder")
    if (path / "config.json").is_file():
        there = _read_config(path).settings
        if there != wanted:
            raise ValueError(
                f"{str(path)!r} holds another run ({_difference(there.to_json(), wanted.to_json())}): "
                f"choose another folder"
            )
        return True
    if path.is_dir() and not all(is_lock(one) or is_leftover(one) for one in path.iterdir()):
        raise ValueError(f"{str(path)!r} is not empty and holds no run: choose another folder")
    return False


def _read_config(path: Path) -> _Config:
    config = path / "config.json"
    remedy = "choose another folder, or remove this one and run again"
    record = read_checked_json(config, remedy)
    if record.get("format") != _FORMAT:  # for example a model's folder
        raise ValueError(
            f"{str(config)!r} is not that of a run (its format is {record.get('format')!r}, not {_FORMAT!r}): "
            "choose another folder"
        )
    with damaged(config, remedy):
        return _Config.from_json(record)


class _Progress:
    """How long `progress.jsonl` is, and its digest, as it grows."""

    def __init__(self, data: bytes) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._size = 0
        self.add(data)

    def add(self, data: bytes) -> None:
        self._hash.update(data)
        self._size += len(data)

    def state(self) -> _ProgressState:
        return _ProgressState(self._size, self._hash.hexdigest())


def _checksum(state: str, tensors: Mapping[str, Tensor]) -> str:
    """Of a checkpoint: all its bits."""
    digest = hashlib.blake2b(state.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _line(record: StepRecord) -> str:
    return json.dumps(record.to_json()) + "\n"


def _read_lines(path: Path) -> list[StepRecord]:
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [
            StepRecord.from_json(parse_json(line)) for line in lines[:-1]
        ]  # what follows the last line end was cut short
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def _difference(there: Any, wanted: Any, at: str = "") -> str:
    """The first setting that differs, in words."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in (*there, *wanted):
            if there.get(key) != wanted.get(key):
                return _difference(there.get(key), wanted.get(key), f"{at}.{key}" if at else key)
    return f"its {at or 'settings'} is {there!r}, asked for was {wanted!r}"
