"""Run folders: settings, progress and results of a run. Every file is written completely or not at all.

`config.json` is written first and holds everything needed to repeat the run; a folder with other settings than the
requested ones is never modified. While a run learns, `progress.jsonl` grows by a line per step and `checkpoint/` holds
the state to resume from; it is removed once the subnetwork is written. All files name the run and the masks that they
are of (`storage/origin.py`), so files of different runs cannot be mixed. None is opened through a symbolic link.

Whenever a run is killed, the same command resumes it and gives the same result. A checkpoint also holds the lines of
`progress.jsonl` before it, so a history that is damaged or was removed is written again. A process that writes to the
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
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigram_circuits.evaluation import Evaluation, SoftHardGap
from bigram_circuits.measures import html
from bigram_circuits.measures.results import Result, load_result_and_origin
from bigram_circuits.measures.words import rounded
from bigram_circuits.models.identity import how_models_differ, same_text
from bigram_circuits.names import short_name
from bigram_circuits.recipe import Inputs, SparsifyConfig
from bigram_circuits.storage.files import (
    cannot_write,
    check_guards,
    checked_json,
    damaged,
    is_leftover,
    read_checked_json,
    recover_folder,
    remove_leftovers,
    whole_file,
    whole_folder,
    write_text,
)
from bigram_circuits.storage.locks import holder, is_lock, lock_folder
from bigram_circuits.storage.origin import Origin, is_signed, sign
from bigram_circuits.storage.records import (
    check_no_link,
    checksum_of,
    opened,
    parse_record,
    regular_size,
    shown,
)
from bigram_circuits.storage.terminal import printable
from bigram_circuits.storage.typed import Record, from_json, to_json
from bigram_circuits.subnetwork import Subnetwork

_FORMAT = "bigram_circuits.run/2"
_FORMER = "bigram_circuits.run/1"  # of version 0.1.0, whose files do not name the run that they are of
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
_CORE = ("config.json", "training.json", "progress.jsonl", "subnetwork.safetensors")
_OURS = (
    *_CORE, "metrics.json", "report.html", "checkpoint", "checkpoint/state.safetensors", "analysis", ".analysis.new",
    ".analysis.old", "falsify",
)  # fmt: skip
_PROGRESS = "progress.jsonl"  # also the name of its lines in a checkpoint
_LARGEST_CONFIG = 1 << 24  # bytes of a `config.json` of somebody else
_LARGEST_PROGRESS = 1 << 26  # bytes of `progress.jsonl` that are read: some 250,000 steps
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
    """Its `weight_hash`."""
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
    signature: str | None = None

    def signed(self) -> _Config:
        """The same with the signature of this user on this machine."""
        return replace(self, signature=sign(self._unsigned()))

    @property
    def is_ours(self) -> bool:
        """Whether this user made it on this machine."""
        return is_signed(self._unsigned(), self.signature)

    def _unsigned(self) -> dict[str, Any]:
        return replace(self, signature=None).to_json()


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
    """Only in checkpoints of version 0.1.0: later ones hold the lines themselves."""
    run: str | None = None


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

    def state(self, run: str | None) -> _CheckpointState:
        """The header: everything except the tensors, with the run that it is of."""
        return _CheckpointState(self.step, self.attempt, self.seconds, self.rollbacks, self.good_step, run=run)


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
            ValueError: If the folder holds a run with other settings, files that are not a run, or symbolic links.
            OSError: If it cannot be written.
        """
        path = Path(path)
        check_links(path)
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
            config = _Config(_FORMAT, settings, rebuild, versions(), created).signed()
            write_text(path / "config.json", checked_json(config.to_json()))
        return folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Within the block, no other process writes to the folder; leftovers of killed processes are removed first.

        Raises:
            FolderInUseError: If another process is writing to the folder; the message says which.
            ValueError: If a file of the run is a symbolic link.
        """
        check_links(self.path)
        with lock_folder(self.path):
            recover_folder(self.path / "analysis")
            for place in (self.path, self.path / "checkpoint", self.path / "analysis"):
                remove_leftovers(place)
            if self.is_finished:
                shutil.rmtree(self.path / "checkpoint", ignore_errors=True)
            yield

    @property
    def id(self) -> str | None:
        """The checksum of `config.json`, which the other files repeat; None before it is written."""
        path = self.path / "config.json"
        return checksum_of(path, follow=False) if path.is_file() else None

    def origin(self, text: CorpusIdentity | None = None) -> Origin:
        """What the files of this run are of: the run, its masks if they were found, and the text measured on."""
        text = text or CorpusIdentity()
        masks = self.subnetwork().checksum if self.is_finished else None
        return Origin(self.id, masks, text.fingerprint, text.source)

    def subnetwork(self) -> Subnetwork:
        """The subnetwork that `finish` wrote."""
        return Subnetwork.load(self.path / "subnetwork.safetensors", follow_links=False)

    def _clear(self) -> None:
        check_guards(self.path)
        for name in ("subnetwork.safetensors", "metrics.json", "training.json", "progress.jsonl", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("checkpoint", "analysis", "falsify"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    # --- progress ---

    def history(self) -> list[StepRecord]:
        """The records in `progress.jsonl`, without a truncated last line.

        Raises:
            ValueError: If the file is damaged, or larger than any run makes it.
        """
        if not self._progress_path.is_file():
            return []
        with damaged(self._progress_path, ""):
            return _records(self._read_progress())

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
        check_guards(self._progress_path)
        if not self._progress_path.exists():
            self._restore_progress()
        with cannot_write(self._progress_path), self._open_progress(os.O_WRONLY | os.O_APPEND) as file:
            file.write(line)
        self._progress.add(line)

    @property
    def _progress_path(self) -> Path:
        return self.path / _PROGRESS

    def _open_progress(self, flags: int) -> Any:
        """Open `progress.jsonl`, which exists, for writing, without following a link."""
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        return os.fdopen(os.open(self._progress_path, flags), "ab" if flags & os.O_APPEND else "rb+")

    def _read_progress(self, size: int = _LARGEST_PROGRESS) -> bytes:
        """The first bytes of `progress.jsonl`; raises ValueError if it has more than any run writes."""
        if regular_size(self._progress_path, follow=False) > _LARGEST_PROGRESS:
            raise ValueError(f"it has more than the {_LARGEST_PROGRESS:,} bytes that are read")
        with opened(self._progress_path, follow=False) as file:
            return file.read(size)

    def _sync_progress(self) -> _Progress | None:
        """Flush `progress.jsonl` to disk, restored first if somebody changed or removed it; returns its state."""
        if self._progress is None:
            if not self._progress_path.is_file():
                return None
            self._progress = _Progress(self._read_progress())
        check_guards(self._progress_path)
        size = self._progress_path.lstat().st_size if self._progress_path.exists() else None
        if size != self._progress.size:
            self._restore_progress()
        with cannot_write(self._progress_path), self._open_progress(os.O_RDWR) as file:
            os.fsync(file.fileno())
        return self._progress

    def _restore_progress(self) -> None:
        """Write `progress.jsonl` as this process has written it, after somebody changed or removed it."""
        assert self._progress is not None
        if not self._set_aside_progress("it was changed while the run was at work; it is written again"):
            print(f"note: {str(self._progress_path)!r} was removed while the run was at work", file=sys.stderr)
        write_text(self._progress_path, self._progress.data.decode())

    def _set_aside_progress(self, why: str) -> bool:
        """Rename a damaged `progress.jsonl`, with a note; False if there is none."""
        if not self._progress_path.exists():
            return False
        number = 1
        while os.path.lexists(aside := self.path / f"progress.damaged-{number}.jsonl"):
            number += 1
        with cannot_write(aside):
            self._progress_path.rename(aside)
        print(f"note: {str(self._progress_path)!r} is set aside as {aside.name!r}: {why}", file=sys.stderr)
        return True

    # --- checkpoints ---

    def checkpoint_is_due(self, size: int = 0) -> bool:
        """Whether enough time has passed that writing a checkpoint of `size` bytes now costs little of it."""
        now = time.monotonic()
        cost = size / _CHECKPOINT_SPEED if self._checkpoint_cost is None else self._checkpoint_cost
        is_cheap = self._spent + cost <= _CHECKPOINT_SHARE * (now - self._opened)
        return is_cheap and now - self._last_checkpoint > _CHECKPOINT_SECONDS

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint by this one, taken after every record in `progress.jsonl`."""
        progress = self._sync_progress()
        self._write_checkpoint(checkpoint, bytes(progress.data) if progress else b"")

    def rewind(self, checkpoint: Checkpoint, records: Sequence[StepRecord]) -> None:
        """Roll back to an earlier state, preceded by these records of `progress.jsonl`."""
        before = "".join(map(_line, records)).encode()
        self._sync_progress()
        self._write_checkpoint(checkpoint, before)  # if killed here, the checkpoint still matches these records
        self.begin_progress(records)

    def _write_checkpoint(self, checkpoint: Checkpoint, progress: bytes) -> None:
        started = time.monotonic()
        state = json.dumps(checkpoint.state(self.id).to_json())
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        tensors[_PROGRESS] = torch.from_numpy(np.frombuffer(bytearray(progress), np.uint8))
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
            ValueError: If it is damaged, or of another run.
        """
        found = self._read_checkpoint()
        return found and found[0]

    def _read_checkpoint(self) -> tuple[Checkpoint, bytes] | None:
        """The checkpoint, with the bytes of `progress.jsonl` before it."""
        path = self._checkpoint_path
        if not path.is_file():
            return None
        try:
            regular_size(path, follow=False)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            if metadata.get("checksum") != _checksum(metadata.get("state", ""), tensors):
                raise ValueError("its contents do not match its checksum")
            state = _CheckpointState.from_json(parse_record(metadata["state"]))
            if state.run != self.id and not (state.run is None and _read_config(self.path).format == _FORMER):
                raise ValueError("it is of another run")
            if min(state.step, state.attempt, state.good_step or 0, state.step - (state.good_step or 0)) < 0:
                raise ValueError("its steps cannot be")
            progress = tensors.pop(_PROGRESS, None)
            before = self._progress_before(state.progress) if progress is None else progress.numpy().tobytes()
            found = Checkpoint(tensors, state.step, state.attempt, state.seconds, state.rollbacks, state.good_step)
            return found, before
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} is damaged: {printable(' '.join(str(error).split()))[:300]}") from error

    def _progress_before(self, state: _ProgressState | None) -> bytes:
        """The lines before a checkpoint that does not hold them, from `progress.jsonl`."""
        before = self._read_progress(state.size) if state and self._progress_path.is_file() else b""
        if state is None or _Progress(before).state() != state:
            raise ValueError(f"{str(self._progress_path)!r} does not match it")
        return before

    def take_up(self) -> tuple[Checkpoint | None, list[StepRecord]]:
        """The state to resume from, and the records before it; later records are removed.

        If `progress.jsonl` is damaged, it is set aside and written again; if the checkpoint is, the run starts over. A
        note on stderr says so.
        """
        try:
            checkpoint, before = self._read_checkpoint() or (None, b"")
            records = _records(before)
            if checkpoint and [one.step for one in records if one.attempt == checkpoint.attempt] != [
                *range(checkpoint.step)
            ]:
                raise ValueError(f"{str(self._checkpoint_path)!r} is damaged: its records are not those of its steps")
        except ValueError as error:
            print(f"note: {error}; learning starts over and will find the same subnetwork", file=sys.stderr)
            check_guards(self._checkpoint_path)
            shutil.rmtree(self._checkpoint_path.parent)
            checkpoint, before, records = None, b"", []
        if checkpoint:
            self._note_other_versions()
            if not self._progress_starts_with(before):
                self._set_aside_progress("it is damaged; the run goes on from its checkpoint")
        self.begin_progress(records)
        return checkpoint, records

    def _progress_starts_with(self, before: bytes) -> bool:
        try:
            return self._read_progress(len(before)) == before
        except (FileNotFoundError, ValueError):
            return False

    def _note_other_versions(self) -> None:
        then, now = _read_config(self.path).versions, versions()
        other = [f"{name} {now[name]}, then {then[name]}" for name in now if then.get(name, now[name]) != now[name]]
        if other:
            print(
                f"note: this run was started with other versions ({printable('; '.join(other))}): "
                "its result may differ in the last bits from that of an uninterrupted run",
                file=sys.stderr,
            )

    # --- the end ---

    def finish(self, subnetwork: Subnetwork, outcome: Outcome) -> None:
        """Write the outcome and the subnetwork, then remove the checkpoint."""
        progress = self._sync_progress()
        of = Origin(self.id, subnetwork.checksum)
        record = outcome.to_json() | {"progress": to_json(progress and progress.state()), "of": of.to_json()}
        write_text(self.path / "training.json", checked_json(record))
        subnetwork.save(self.path / "subnetwork.safetensors")
        check_guards(self.path)
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether the subnetwork was found."""
        return (self.path / "subnetwork.safetensors").is_file()

    def outcome(self) -> Outcome:
        """The outcome that `finish` wrote."""
        return self._read_outcome()[0]

    def found(self) -> tuple[Subnetwork, Outcome]:
        """The subnetwork and the outcome that `finish` wrote.

        Raises:
            ValueError: If a file is damaged, or settings, subnetwork and outcome are not of the same run.
        """
        subnetwork, (outcome, _, of) = self.subnetwork(), self._read_outcome()
        is_former = _read_config(self.path).format == _FORMER
        remedy = "put back the config.json, subnetwork.safetensors and training.json that were written together"
        _check_origin(self.path / "training.json", of, self.id, subnetwork, is_former, remedy)
        return subnetwork, outcome

    def _read_outcome(self) -> tuple[Outcome, _ProgressState | None, Origin | None]:
        path = self.path / "training.json"
        remedy = f"`find` with --fresh and --out {self.path} learns the subnetwork again"
        record = read_checked_json(path, remedy)
        with damaged(path, remedy):
            progress = from_json(_ProgressState | None, record.pop("progress", None), "progress")
            of = from_json(Origin | None, record.pop("of", None), "of")
            return Outcome.from_json(record), progress, of

    def check_progress(self) -> None:
        """Check that `progress.jsonl`, if present, is unchanged since `finish`.

        Raises:
            ValueError: If it has changed.
        """
        noted = self._read_outcome()[1]
        if noted and self._progress_path.is_file():
            with damaged(self._progress_path, "remove the file to read the run without its history"):
                if _Progress(self._read_progress()).state() != noted:
                    raise ValueError("its lines are not those that the run wrote")

    def files(self) -> list[str]:
        """Names of the files in the folder, except the lock."""
        return sorted(path.name for path in self.path.iterdir() if not is_lock(path))

    def write_evaluation(self, evaluation: Evaluation, text: CorpusIdentity | None = None) -> None:
        """Write `metrics.json`; `text` is the text whose held-out part it was measured on, if that is known."""
        record = evaluation.to_json() | {"of": self.origin(text).to_json()}
        write_text(self.path / "metrics.json", checked_json(record))

    def evaluation(self) -> Evaluation | None:
        """The evaluation that `write_evaluation` wrote; None if there is none.

        Raises:
            ValueError: If the file is damaged.
        """
        found = self._read_evaluation()
        return found and found[0]

    def _read_evaluation(self) -> tuple[Evaluation, Origin | None] | None:
        path = self.path / "metrics.json"
        if not path.is_file():
            return None
        remedy = f"remove it, and `evaluate {self.path}` writes it again"
        record = read_checked_json(path, remedy)
        with damaged(path, remedy):
            of = from_json(Origin | None, record.pop("of", None), "of")
            return Evaluation.from_json(record), of


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
    """One record for each training step; empty if it was not read."""
    created: str | None = None
    """When the run began, in UTC (ISO 8601); None if it was not recorded."""
    id: str | None = None
    """Checksum of `config.json`, which the run's other files repeat."""
    evaluated_on: CorpusIdentity | None = None
    """The text that it was evaluated on; None if it was not evaluated, or this was not recorded."""
    made_here: bool = False
    """Whether it was made by this user on this machine; the names in a run from elsewhere are not opened unasked."""
    is_former: bool = False
    """Whether version 0.1.0 made it, whose files do not name the run that they are of."""

    def check_origin(self, path: str | os.PathLike[str], of: Origin | None, remedy: str) -> None:
        """Check that a file of the run's folder is of this run, and not of another one of the same model.

        Raises:
            ValueError: If it is of another run or does not say; with `remedy`, which says what to do.
        """
        _check_origin(Path(path), of, self.id, self.subnetwork, self.is_former, remedy)

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The contents of `metrics.json`: `evaluation` as JSON values."""
        return None if self.evaluation is None else self.evaluation.to_json()

    @property
    def analyses(self) -> dict[str, Result]:
        """The results of `analyze` by name (`logit_lens`, ...); empty if it was not analysed.

        Raises:
            ValueError: If one of them is damaged, or of another run.
        """
        return {name: result for name, (result, _) in self._read_analyses().items()}

    @property
    def analysed_on(self) -> CorpusIdentity | None:
        """The text that it was analysed on; None if it was not analysed, or this was not recorded."""
        texts = {_text_of(of) for _, of in self._read_analyses().values()} - {None}
        return texts.pop() if len(texts) == 1 else None

    def _read_analyses(self) -> dict[str, tuple[Result, Origin | None]]:
        folder = self.path / "analysis"
        check_no_link(folder)
        found = {}
        for path in sorted(folder.glob("*.json")):
            if path.name != LEFT_OUT:
                result, of = load_result_and_origin(path, follow=False)
                self.check_origin(path, of, self._again)
                found[RENAMED.get(path.stem, path.stem)] = result, of
        return found

    @property
    def _again(self) -> str:
        return f"`analyze {self.path}` writes it again"

    @property
    def left_out(self) -> dict[str, str]:
        """The analyses that `analyze` left out because the model does not support them, with reasons."""
        path = self.path / "analysis" / LEFT_OUT
        if not path.is_file():
            return {}
        record = read_checked_json(path, self._again)
        with damaged(path, self._again):
            of = from_json(Origin | None, record.pop("of", None), "of")
            left_out: Mapping[str, str] = from_json(Mapping[str, str], record)
        self.check_origin(path, of, self._again)
        return {str(RENAMED.get(name, name)): reason for name, reason in left_out.items()}

    @property
    def model_words(self) -> str:
        """The name of its model, as a phrase."""
        name = (self.rebuild and self.rebuild.model) or self.settings.model.name or self.subnetwork.model_name
        return "the reference model" if name == "reference" else short_name(name or "a model")

    @property
    def target_words(self) -> tuple[str, str]:
        """The name of its target and a phrase that describes it."""
        if self.rebuild is not None:
            kind, order = self.rebuild.kind_of_target, self.rebuild.order
            return kind.label(order), kind.meaning(order)
        kind = self.settings.target.kind or "target"
        return kind, f"the target {kind}"

    def __repr__(self) -> str:
        return f"Run({printable(str(self.path))!r}: {self.subnetwork!r})"

    def _repr_html_(self) -> str:
        """HTML for notebooks: the inputs, how learning ended, and the result."""
        asked = f"Model: {short_name(self.settings.model.name or 'unknown')}. Text: {self.settings.corpus.source}."
        ended = f"Stopped after {len(self.history):,} steps: {self.outcome.why}."
        shown = self.subnetwork._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return html.summary(f"Run in {self.path}", [asked, ended, self._answer()], shown)

    def _answer(self) -> str:
        """How faithful the subnetwork is, as a sentence."""
        if self.evaluation is None:
            return "It was not evaluated."
        r = rounded(self.evaluation.subnetwork.surprisal_correlation)
        return f"Correlation with the target's surprisals: {r}. {self.evaluation.verdict}"


def load_run(folder: str | os.PathLike[str], *, history: bool = True) -> Run:
    """Read a finished run.

    Nothing is written, so the folder may be read-only.

    Args:
        folder: Its folder.
        history: Read the training records too; a comparison of many runs does without them.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no run.
        ValueError: If the run is not finished, a file is damaged, of another run or a symbolic link, or it has another
            format.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{str(path)!r} holds no run: it has no config.json")
    check_links(path)
    config = _read_config(path)
    files = RunFolder(path)
    if not files.is_finished:
        who = holder(path)
        raise ValueError(
            f"the run in {str(path)!r} is not finished: "
            + (f"wait for {who}, or, if that has ended, " if who else "")
            + "run the same command again to continue it"
        )
    subnetwork, outcome = files.found()
    files.check_progress()
    measured = files._read_evaluation()  # pyright: ignore[reportPrivateUsage]
    run = Run(
        path=path,
        settings=config.settings,
        rebuild=config.rebuild,
        versions=config.versions,
        subnetwork=subnetwork,
        outcome=outcome,
        evaluation=measured and measured[0],
        history=files.history() if history else [],
        created=config.created,
        id=files.id,
        evaluated_on=measured and _text_of(measured[1]),
        made_here=config.is_ours,
        is_former=config.format == _FORMER,
    )
    if measured:
        remedy = f"`evaluate {path}` writes it again once it is removed"
        run.check_origin(path / "metrics.json", measured[1], remedy)
        own = measured[0].subnetwork
        if (own.kept, own.total) != (run.subnetwork.kept, run.subnetwork.total):
            raise ValueError(
                f"{str(path / 'metrics.json')!r} does not belong to this run: it is of a subnetwork that keeps "
                f"{own.kept:,} of {own.total:,} weights; {remedy}"
            )
    return run


def _check_origin(
    path: Path, of: Origin | None, run: str | None, subnetwork: Subnetwork, is_former: bool, remedy: str
) -> None:
    """Raise ValueError unless a file says that it is of this run and subnetwork; one of 0.1.0 need not say it."""
    try:
        if of is not None:
            of.check(run, subnetwork.checksum)
        if not is_former and (of is None or of.subnetwork is None):
            raise ValueError("it does not say which run it is of")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not belong to this run: {error}; {remedy}") from error


def _text_of(of: Origin | None) -> CorpusIdentity | None:
    return None if of is None or of.text is None else CorpusIdentity(of.source, of.text)


def run_id(folder: str | os.PathLike[str]) -> str | None:
    """The checksum of the `config.json` of the run in a folder; None if it holds no run that can be read."""
    try:
        _read_config(Path(folder))
    except (OSError, ValueError):
        return None
    return RunFolder(Path(folder)).id


def copy_run(run: Run, folder: str | os.PathLike[str], *, with_evaluation: bool = False) -> RunFolder:
    """Copy a finished run to a new folder, without its analyses and, if not asked for, without its evaluation.

    Raises:
        ValueError: If the folder is not empty.
        OSError: If it cannot be written.
    """
    names = (*_CORE, "metrics.json") if with_evaluation else _CORE
    with whole_folder(folder, replace=False) as fresh:
        for name in names:
            if (run.path / name).is_file():
                with opened(run.path / name, follow=False) as source, (fresh / name).open("xb") as copy:
                    shutil.copyfileobj(source, copy)
    return RunFolder(Path(folder))


def check_links(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError if a file or folder of a run is a symbolic link; the run's folder itself may be one."""
    for name in _OURS:
        check_no_link(Path(folder) / name)


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
        if (how := _how_runs_differ(there, wanted)) is not None:
            raise ValueError(f"{str(path)!r} holds another run ({how}): choose another folder")
        return True
    if path.is_dir() and not all(is_lock(one) or is_leftover(one) for one in path.iterdir()):
        raise ValueError(f"{str(path)!r} is not empty and holds no run: choose another folder")
    return False


def _read_config(path: Path) -> _Config:
    config = path / "config.json"
    remedy = "choose another folder, or remove this one and run again"
    try:
        record = read_checked_json(config, remedy)
    except ValueError:
        if not _is_foreign(config):
            raise
        record = {}
    if record.get("format") not in (_FORMAT, _FORMER):
        raise ValueError(
            f"{str(config)!r} does not belong to a run (its format is {shown(record.get('format'))}, not {_FORMAT!r}): "
            "choose another folder"
        )
    with damaged(config, remedy):
        return _Config.from_json(record)


def _is_foreign(config: Path) -> bool:
    """Whether a `config.json` is a valid record without a checksum and of no format of ours: for example a model's."""
    try:
        with opened(config, follow=False) as file:
            record = parse_record(file.read(_LARGEST_CONFIG))
    except ValueError:
        return False
    return isinstance(record, dict) and "checksum" not in record and record.get("format") not in (_FORMAT, _FORMER)


class _Progress:
    """The contents of `progress.jsonl` as it grows."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    @property
    def size(self) -> int:
        return len(self.data)

    def add(self, data: bytes) -> None:
        self.data += data

    def state(self) -> _ProgressState:
        return _ProgressState(len(self.data), hashlib.blake2b(self.data, digest_size=16).hexdigest())


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


def _records(data: bytes) -> list[StepRecord]:
    """Read the lines of `progress.jsonl`; text after the last line end is a truncated line, and left out."""
    return [StepRecord.from_json(parse_record(line)) for line in data.split(b"\n")[:-1]]


def _how_runs_differ(there: RunSettings, wanted: RunSettings) -> str | None:
    """The first setting that differs, as a phrase; None if none does.

    A model is told by its hash and a text by its fingerprint, not by the names that found them. Hashes are compared by
    `how_models_differ`.
    """
    ours, theirs = wanted.model, there.model
    if ours.weight_hash and theirs.weight_hash:
        how = how_models_differ(theirs.weight_hash, ours.weight_hash)
        if how is not None:
            return f"its model is another, {how}"
        there = replace(there, model=replace(ours, dtype=theirs.dtype))
    if there.corpus.fingerprint:
        there = replace(there, corpus=replace(there.corpus, source=wanted.corpus.source))
    if same_text(there.target.fingerprint, wanted.target.fingerprint):
        there = replace(there, target=replace(there.target, fingerprint=wanted.target.fingerprint))
    return None if there == wanted else _difference(there.to_json(), wanted.to_json())


def _difference(there: Any, wanted: Any, at: str = "") -> str:
    """The first setting that differs, as a phrase."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in (*there, *wanted):
            if there.get(key) != wanted.get(key):
                return _difference(there.get(key), wanted.get(key), f"{at}.{key}" if at else key)
    return f"its {at or 'settings'} is {there!r}, not {wanted!r}"
