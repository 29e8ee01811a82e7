"""Run folders: settings, progress and results of a run. Every file is written completely or not at all.

`config.json` is written first and holds everything needed to repeat the run; a folder with other settings than the
requested ones is never modified. While a run learns, `progress.jsonl` grows by a line per step and `checkpoint/` holds
the state to resume from; it is removed once the subnetwork is written.

Whenever a run is killed, the same command resumes it and gives the same result. `progress.jsonl` is flushed to disk
before each checkpoint, which records the length and the digest of the lines before it. A process that writes to the
folder holds its lock (`locks.py`) and first removes what a killed process left unfinished.
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
    "max_steps": "the maximum number of steps was reached",
    "unstable": "every attempt was unstable: do not trust the result",
}
"""Why learning stopped, as a phrase."""
LEFT_OUT = "left_out.json"
"""File beside a run's analyses: the analyses that were left out, with reasons."""
RENAMED = {"exciting_tokens": "max_activating_tokens"}
"""Analyses that an earlier version wrote under another name: former name -> present name."""
_CHECKPOINT_SHARE = 0.02  # largest share of the learning time spent on checkpoints
_CHECKPOINT_SECONDS = 20.0  # shortest time between two checkpoints
_CHECKPOINT_SPEED = 2e8  # bytes per second, assumed until the first checkpoint has been timed


# --- the contents of a run's files ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelIdentity(Record):
    """Identifies the model of a run."""

    name: str | None = None
    """The name it was loaded by."""
    revision: str | None = None
    """Revision of a hub model."""
    weight_hash: str | None = None
    """Hash of its maskable weights."""
    dtype: str | None = None
    """Precision of its weights."""


@dataclass(frozen=True)
class CorpusIdentity(Record):
    """Identifies the text of a run."""

    source: str | None = None
    """Where it was read from, as a phrase."""
    fingerprint: str | None = None
    """Hash of its tokens."""
    tokenizer_hash: str | None = None
    """Hash of the tokenizer's vocabulary."""
    context_length: int | None = None
    """Tokens per sequence."""
    starts: str | None = field(default=None, compare=False)
    """What its sequences and documents begin with, as a phrase; the fingerprint covers it."""


@dataclass(frozen=True)
class TargetIdentity(Record):
    """Identifies the target of a run."""

    kind: str | None = None
    """Name of its class."""
    fingerprint: str | None = None
    """The target's own fingerprint, if it has one."""


@dataclass(frozen=True)
class RunSettings(Record):
    """The settings that determine a run's result; a run folder belongs to one such set."""

    model: ModelIdentity
    """The model."""
    corpus: CorpusIdentity
    """The text."""
    target: TargetIdentity
    """The target."""
    recipe: SparsifyConfig
    """How masks are learned."""
    within: str | None = None
    """Checksum of the subnetwork that the search was restricted to, if any."""


@dataclass(frozen=True)
class StepRecord(Record):
    """A step of learning, as recorded in `progress.jsonl`."""

    attempt: int
    """Number of the attempt (data order), from 0."""
    step: int
    """Number of the step, from 0."""
    cross_entropy: float
    """Cross-entropy from the target to the softly masked model, nats."""
    fraction: float
    """Share of the maskable weights that would be kept if learning ended now."""
    undecided: float
    """Share of the gates between 0.1 and 0.9."""
    due: float | None = None
    """Share of the gated weights that should be open by now; None if there is no share to reach."""
    above_zero: float | None = None
    """Share of the gated weights with a positive score."""
    penalty: float | None = None
    """Mean penalised gate."""
    sparsity_weight: float | int | None = None
    """The penalty's weight."""


@dataclass(frozen=True)
class Rollback(Record):
    """An explosion of the loss, and the state the run went back to."""

    attempt: int
    """Number of the attempt."""
    step: int
    """The step at which the loss exploded."""
    what: str
    """What happened, as a phrase."""
    back_to: int
    """The step that the run went back to."""
    learning_rate: float
    """The learning rate from that step on."""


@dataclass(frozen=True)
class Outcome(Record):
    """How learning ended."""

    stopped_because: str
    """`decided` (few gates were undecided), `max_steps`, and, after the last retry, `unstable`."""
    seconds: float = math.nan
    """Time spent learning, in seconds."""
    attempts: int = 1
    """Number of data orders tried."""
    soft_hard: SoftHardGap | None = None
    """Cross-entropy with the last soft gates and with the mask made of them; None if it was not recorded."""
    rollbacks: tuple[Rollback, ...] = ()
    """Every time the loss was not finite or exploded. The abandoned steps are not in the history."""

    @property
    def why(self) -> str:
        """Why learning stopped, as a phrase."""
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
    """Length in bytes and digest of `progress.jsonl`."""

    size: int
    digest: str


@dataclass(frozen=True)
class _CheckpointState(Record):
    """The contents of a checkpoint's header."""

    step: int
    attempt: int
    seconds: float
    rollbacks: tuple[Rollback, ...] = ()
    good_step: int | None = None
    progress: _ProgressState | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run during learning."""

    tensors: Mapping[str, Tensor]
    """The gates' scores and the optimizer's moments."""
    step: int
    """Steps done."""
    attempt: int
    """Number of the attempt (data order), from 0."""
    seconds: float
    """Time spent learning so far, in seconds."""
    rollbacks: tuple[Rollback, ...] = ()
    """The rollbacks of this attempt."""
    good_step: int | None = None
    """The step of the last good state, whose tensor names start with `good.`; None: only the attempt's start."""

    def state(self, progress: _ProgressState | None) -> _CheckpointState:
        """The header: everything except the tensors, with the state of `progress.jsonl`."""
        return _CheckpointState(self.step, self.attempt, self.seconds, self.rollbacks, self.good_step, progress)


class RunFolder:
    """The folder of a run, opened for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = self._last_checkpoint = time.monotonic()
        self._checkpoint_cost: float | None = None  # seconds that the last one took
        self._spent = 0.0  # seconds that all of them took
        self._progress: _Progress | None = None  # the state of progress.jsonl, once this process has written to it

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        settings: RunSettings,
        *,
        resume: bool = True,
        rebuild: Inputs | None = None,
    ) -> RunFolder:
        """Create the folder of a run, or reopen an existing one with the same settings.

        Args:
            path: The folder.
            settings: What determines the result: model, corpus, target and recipe.
            resume: False removes the files of an earlier run with the same settings.
            rebuild: Names from which model, corpus and target can be rebuilt, if there are any.

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
            if _check_settings(path, settings):  # again: another process may have created it meanwhile
                if not resume:
                    folder._clear()
                return folder
            created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            config = _Config(_FORMAT, settings, rebuild, versions(), created)
            write_text(path / "config.json", checked_json(config.to_json()))
        return folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Within the block, no other process writes to the folder; leftovers of killed processes are removed first.

        Raises:
            FolderInUseError: If another process is writing to the folder; the message says which.
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
        """The records in `progress.jsonl`, without a truncated last line."""
        return _read_lines(self.path / "progress.jsonl")

    def begin_progress(self, records: Sequence[StepRecord]) -> None:
        """Start `progress.jsonl` with these records: those before the checkpoint, or none."""
        text = "".join(map(_line, records))
        write_text(self._progress_path, text)
        self._progress = _Progress(text.encode())

    def log(self, record: StepRecord) -> None:
        """Append a record to `progress.jsonl`."""
        if self._progress is None:
            self.begin_progress(self.history())  # drops a truncated last line
            assert self._progress is not None
        line = _line(record).encode()
        with cannot_write(self._progress_path), self._progress_path.open("ab") as file:
            file.write(line)
        self._progress.add(line)

    @property
    def _progress_path(self) -> Path:
        return self.path / "progress.jsonl"

    def _sync_progress(self) -> _ProgressState | None:
        """Flush `progress.jsonl` to disk; returns its size and digest."""
        if self._progress is None:
            if not self._progress_path.is_file():
                return None
            self._progress = _Progress(self._progress_path.read_bytes())
        with cannot_write(self._progress_path), self._progress_path.open("rb+") as file:
            os.fsync(file.fileno())
        return self._progress.state()

    # --- checkpoints ---

    def checkpoint_is_due(self, size: int = 0) -> bool:
        """Whether enough time has passed that writing a checkpoint of `size` bytes now costs little of it."""
        now = time.monotonic()
        cost = size / _CHECKPOINT_SPEED if self._checkpoint_cost is None else self._checkpoint_cost
        is_cheap = self._spent + cost <= _CHECKPOINT_SHARE * (now - self._opened)
        return is_cheap and now - self._last_checkpoint > _CHECKPOINT_SECONDS

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint by this one, taken after every record in `progress.jsonl`."""
        self._write_checkpoint(checkpoint, self._sync_progress())

    def rewind(self, checkpoint: Checkpoint, records: Sequence[StepRecord]) -> None:
        """Roll back to an earlier state, preceded by these records of `progress.jsonl`."""
        before = _Progress("".join(map(_line, records)).encode())
        self._sync_progress()
        self._write_checkpoint(checkpoint, before.state())  # if killed here, the checkpoint still matches these records
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
        """The state to resume from, if there is one.

        Raises:
            ValueError: If it is damaged.
        """
        found = self._read_checkpoint()
        return found and found[0]

    def _read_checkpoint(self) -> tuple[Checkpoint, _ProgressState | None] | None:
        """The checkpoint, with the state of `progress.jsonl` that it recorded."""
        path = self._checkpoint_path
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            if "checksum" in metadata and metadata["checksum"] != _checksum(metadata["state"], tensors):
                raise ValueError("its contents do not match its checksum")
            state = _CheckpointState.from_json(parse_json(metadata["state"]))
            found = Checkpoint(tensors, state.step, state.attempt, state.seconds, state.rollbacks, state.good_step)
            return found, state.progress
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error

    def take_up(self) -> tuple[Checkpoint | None, list[StepRecord]]:
        """The state to resume from, and the records before it; later records are removed.

        If the checkpoint or the records are damaged, a note says so and the run starts over.
        """
        try:
            found = self._read_checkpoint()
            checkpoint, progress = found or (None, None)
            records = self._records_before(checkpoint, progress)
        except ValueError as error:
            print(f"note: {error}; learning starts over and will find the same subnetwork", file=sys.stderr)
            shutil.rmtree(self._checkpoint_path.parent)
            checkpoint, records = None, []
        if checkpoint:
            self._note_other_versions()
        self.begin_progress(records)
        return checkpoint, records

    def _records_before(self, checkpoint: Checkpoint | None, progress: _ProgressState | None) -> list[StepRecord]:
        if checkpoint is None:
            return []
        if progress is None:  # written by a version that did not record it
            place = (checkpoint.attempt, checkpoint.step)
            return [record for record in self.history() if (record.attempt, record.step) < place]
        before = self._progress_path.read_bytes()[: progress.size] if self._progress_path.is_file() else b""
        if _Progress(before).state() != progress:
            raise ValueError(f"{str(self._progress_path)!r} is damaged: it does not match the checkpoint")
        return [StepRecord.from_json(parse_json(line)) for line in before.splitlines()]

    def _note_other_versions(self) -> None:
        then, now = _read_config(self.path).versions, versions()
        other = [f"{name} {now[name]}, then {then[name]}" for name in now if then.get(name, now[name]) != now[name]]
        if other:
            print(
                f"note: this run was started with other versions ({'; '.join(other)}): "
                "its result may differ in the last bits from that of an uninterrupted run",
                file=sys.stderr,
            )

    # --- the end ---

    def finish(self, subnetwork: Subnetwork, outcome: Outcome) -> None:
        """Write the outcome and the subnetwork, then remove the checkpoint."""
        record = outcome.to_json() | {"progress": to_json(self._sync_progress())}
        write_text(self.path / "training.json", checked_json(record))
        subnetwork.save(self.path / "subnetwork.safetensors")
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether the subnetwork was found."""
        return (self.path / "subnetwork.safetensors").is_file()

    def outcome(self) -> Outcome:
        """The outcome that `finish` wrote."""
        return self._read_outcome()[0]

    def _read_outcome(self) -> tuple[Outcome, _ProgressState | None]:
        path = self.path / "training.json"
        remedy = f"`find` with --fresh and --out {self.path} learns the subnetwork again"
        record = read_checked_json(path, remedy)
        with damaged(path, remedy):
            progress = from_json(_ProgressState | None, record.pop("progress", None), "progress")
            return Outcome.from_json(record), progress

    def check_progress(self) -> None:
        """Check that `progress.jsonl`, if present, is unchanged since `finish`.

        Raises:
            ValueError: If it has changed.
        """
        noted = self._read_outcome()[1]  # None in older runs
        if noted and self._progress_path.is_file() and _Progress(self._progress_path.read_bytes()).state() != noted:
            raise ValueError(
                f"{str(self._progress_path)!r} is damaged: its lines are not those that the run wrote; remove the file "
                "to read the run without its history"
            )

    def files(self) -> list[str]:
        """Names of the files in the folder, except the lock."""
        return sorted(path.name for path in self.path.iterdir() if not is_lock(path))

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write `metrics.json`."""
        write_text(self.path / "metrics.json", checked_json(evaluation.to_json()))

    def evaluation(self) -> Evaluation | None:
        """The evaluation that `write_evaluation` wrote; None if there is none.

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
    """Model, corpus, target and recipe."""
    rebuild: Inputs | None
    """Names of model, text and target; None for a run made in Python from objects."""
    versions: Mapping[str, str]
    """Versions of Python and of the packages that matter."""
    subnetwork: Subnetwork
    """The subnetwork found."""
    outcome: Outcome
    """How learning ended."""
    evaluation: Evaluation | None
    """Its faithfulness and that of its controls; None if it was not evaluated."""
    history: list[StepRecord]
    """One record for each training step."""

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The contents of `metrics.json`: `evaluation` as JSON values."""
        return None if self.evaluation is None else self.evaluation.to_json()

    @property
    def analyses(self) -> dict[str, Result]:
        """The results of `analyze` by name (`logit_lens`, ...); empty if it was not analysed."""
        files = sorted((self.path / "analysis").glob("*.json"))
        return {RENAMED.get(path.stem, path.stem): load_result(path) for path in files if path.name != LEFT_OUT}

    @property
    def left_out(self) -> dict[str, str]:
        """The analyses that `analyze` left out because the model does not support them, with reasons."""
        path = self.path / "analysis" / LEFT_OUT
        left_out = read_checked_json(path) if path.is_file() else {}
        return {RENAMED.get(name, name): reason for name, reason in left_out.items()}

    @property
    def model_words(self) -> str:
        """The name of its model, as a phrase."""
        name = (self.rebuild and self.rebuild.model) or self.settings.model.name or self.subnetwork.model_name
        return "the reference model" if name == "reference" else str(name or "a model")

    @property
    def target_words(self) -> tuple[str, str]:
        """The name of its target and a phrase that describes it."""
        if self.rebuild is not None:
            kind, order = self.rebuild.kind_of_target, self.rebuild.order
            return kind.label(order), kind.meaning(order)
        kind = self.settings.target.kind or "target"
        return kind, f"the target {kind}"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.subnetwork!r})"

    def _repr_html_(self) -> str:
        """HTML for notebooks: the inputs, how learning ended, and the result."""
        asked = f"Model: {self.settings.model.name}. Text: {self.settings.corpus.source}."
        ended = f"Stopped after {len(self.history):,} steps: {self.outcome.why}."
        shown = self.subnetwork._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return html.summary(f"Run in {self.path}", [asked, ended, self._answer()], shown)

    def _answer(self) -> str:
        """How faithful the subnetwork is, as a sentence."""
        if self.evaluation is None:
            return "It was not evaluated."
        r = rounded(self.evaluation.subnetwork.surprisal_correlation)
        return f"Correlation with the target's surprisals: {r}. {self.evaluation.verdict}"


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read a finished run.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no run.
        ValueError: If the run is not finished, a file is damaged, or it has another format.
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
            + (f"wait for {who}, or, if that has ended, " if who else "")
            + "run the same command again to continue it"
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
    """Versions of Python, the platform and the packages that can affect a result."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found | {"threads": str(torch.get_num_threads())}


def _check_settings(path: Path, wanted: RunSettings) -> bool:
    """Whether a folder holds the wanted run; False if the run may be created there."""
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
            f"{str(config)!r} does not belong to a run (its format is {record.get('format')!r}, not {_FORMAT!r}): "
            "choose another folder"
        )
    with damaged(config, remedy):
        return _Config.from_json(record)


class _Progress:
    """Length and digest of `progress.jsonl` as it grows."""

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
    """Checksum of a checkpoint's header and tensors."""
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
        ]  # text after the last line end is a truncated line
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def _difference(there: Any, wanted: Any, at: str = "") -> str:
    """The first setting that differs, as a phrase."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in (*there, *wanted):
            if there.get(key) != wanted.get(key):
                return _difference(there.get(key), wanted.get(key), f"{at}.{key}" if at else key)
    return f"its {at or 'settings'} is {there!r}, not {wanted!r}"
