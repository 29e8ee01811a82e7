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
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigram_circuits.circuit import Circuit
from bigram_circuits.evaluation import Evaluation
from bigram_circuits.masking.apply import Mask
from bigram_circuits.progress import note
from bigram_circuits.recipe import Inputs
from bigram_circuits.runs.contents import (
    FORMAT,
    FORMER,
    Checkpoint,
    CheckpointState,
    Config,
    CorpusIdentity,
    InputCheck,
    Outcome,
    ProgressState,
    RunSettings,
    StepRecord,
    how_runs_differ,
    read_config,
    versions,
)
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
    write_text,
)
from bigram_circuits.storage.locks import is_lock, lock_folder
from bigram_circuits.storage.origin import Origin
from bigram_circuits.storage.records import (
    check_no_link,
    checksum_of,
    opened,
    parse_record,
    regular_size,
)
from bigram_circuits.storage.terminal import printable
from bigram_circuits.storage.typed import from_json, to_json
from bigram_circuits.subnetwork import Subnetwork

MASKS = {kind.noun: kind for kind in (Subnetwork, Circuit)}
"""What a run may find: name of its file, without `.safetensors` -> the kind of mask in it."""
_MASK_FILES = tuple(f"{noun}.safetensors" for noun in MASKS)
CORE = ("config.json", "training.json", "progress.jsonl", *_MASK_FILES)
SEEDS = "seeds"
"""The folder in a run's folder that holds the runs of all seeds, if there are several; this run is one of them."""
_OURS = (
    *CORE, "metrics.json", "report.html", "checkpoint", "checkpoint/state.safetensors", "analysis", ".analysis.new",
    ".analysis.old", "falsify", SEEDS,
)  # fmt: skip
_COPIED = ("config.json", "training.json", "progress.jsonl", "metrics.json", *_MASK_FILES)  # in this order
_PROGRESS = "progress.jsonl"  # also the name of its lines in a checkpoint
_LARGEST_PROGRESS = 1 << 26  # bytes of `progress.jsonl` that are read: some 250,000 steps
_CHECKPOINT_SHARE = 0.02  # largest share of the learning time spent on checkpoints
_CHECKPOINT_SECONDS = 20.0  # shortest time between two checkpoints
_CHECKPOINT_SPEED = 2e8  # bytes per second, assumed until the first checkpoint has been timed


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
        checked: InputCheck | None = None,
    ) -> RunFolder:
        """Create the folder of a run, or reopen an existing one with the same settings.

        Args:
            path: The folder.
            settings: What determines the result: model, corpus, target and recipe.
            resume: False removes the files of an earlier run with the same settings.
            rebuild: Names from which model, corpus and target can be rebuilt, if there are any.
            checked: What was found of the inputs, if they were checked; recorded when the folder is created.

        Raises:
            ValueError: If the folder holds a run with other settings, files that are not a run, or symbolic links.
            OSError: If it cannot be written.
        """
        path = Path(path)
        check_links(path)
        is_there = check_settings(path, [settings])
        folder = cls(path)
        if is_there and resume:
            return folder
        with folder.lock():
            if check_settings(path, [settings]):  # again: another process may have created it meanwhile
                if not resume:
                    folder._clear()
                    shutil.rmtree(path / SEEDS, ignore_errors=True)
                return folder
            created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            config = Config(FORMAT, settings, rebuild, versions(), created, checked).signed()
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
        masks = self.mask().checksum if self.is_finished else None
        return Origin(self.id, masks, text.fingerprint, text.source)

    @property
    def mask_path(self) -> Path | None:
        """The file that `finish` wrote; None before."""
        there = [path for path in (self.path / name for name in _MASK_FILES) if path.is_file()]
        return there[0] if there else None

    def mask(self) -> Mask:
        """The subnetwork or circuit that `finish` wrote."""
        path = self.mask_path or self.path / _MASK_FILES[0]
        return MASKS[path.stem].load(path, follow_links=False)

    def _clear(self) -> None:
        check_guards(self.path)
        for name in (*_MASK_FILES, "metrics.json", "training.json", "progress.jsonl", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("checkpoint", "analysis", "falsify"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def discard(self) -> None:
        """Remove the run and, last, the runs of all seeds; call this only within `lock`."""
        self._clear()
        (self.path / "config.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / SEEDS, ignore_errors=True)

    def take(self, other: RunFolder) -> None:
        """Make this the folder of another, finished run: copy its files, the settings first and the masks last.

        What was measured of another run that was here before is removed. Call this only within `lock`.
        """
        if not self.is_finished or self.id != other.id:
            self._clear()
        for name in _COPIED:
            if (other.path / name).is_file():
                with opened(other.path / name, follow=False) as source, whole_file(self.path / name) as temporary:
                    temporary.write_bytes(source.read())

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
            note(f"{str(self._progress_path)!r} was removed while the run was at work")
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
        note(f"{str(self._progress_path)!r} is set aside as {aside.name!r}: {why}")
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
            state = CheckpointState.from_json(parse_record(metadata["state"]))
            if state.run != self.id and not (state.run is None and read_config(self.path).format == FORMER):
                raise ValueError("it is of another run")
            if min(state.step, state.attempt, state.good_step or 0, state.step - (state.good_step or 0)) < 0:
                raise ValueError("its steps cannot be")
            progress = tensors.pop(_PROGRESS, None)
            before = self._progress_before(state.progress) if progress is None else progress.numpy().tobytes()
            found = Checkpoint(tensors, state.step, state.attempt, state.seconds, state.rollbacks, state.good_step)
            return found, before
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} is damaged: {printable(' '.join(str(error).split()))[:300]}") from error

    def _progress_before(self, state: ProgressState | None) -> bytes:
        """The lines before a checkpoint that does not hold them, from `progress.jsonl`."""
        before = self._read_progress(state.size) if state and self._progress_path.is_file() else b""
        if state is None or _Progress(before).state() != state:
            raise ValueError(f"{str(self._progress_path)!r} does not match it")
        return before

    def take_up(self) -> tuple[Checkpoint | None, list[StepRecord]]:
        """The state to resume from, and the records before it; later records are removed.

        If `progress.jsonl` is damaged, it is set aside and written again; if the checkpoint is, the run starts over. A
        warning in the log says so.
        """
        try:
            checkpoint, before = self._read_checkpoint() or (None, b"")
            records = _records(before)
            if checkpoint and [one.step for one in records if one.attempt == checkpoint.attempt] != [
                *range(checkpoint.step)
            ]:
                raise ValueError(f"{str(self._checkpoint_path)!r} is damaged: its records are not those of its steps")
        except ValueError as error:
            note(f"{error}; learning starts over and will find the same subnetwork")
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
        then, now = read_config(self.path).versions, versions()
        other = [f"{name} {now[name]}, then {then[name]}" for name in now if then.get(name, now[name]) != now[name]]
        if other:
            note(
                f"this run was started with other versions ({'; '.join(other)}): its result may differ in the last "
                "bits from that of an uninterrupted run"
            )

    # --- the end ---

    def finish(self, mask: Mask, outcome: Outcome) -> None:
        """Write the outcome and the subnetwork or circuit, then remove the checkpoint."""
        progress = self._sync_progress()
        of = Origin(self.id, mask.checksum)
        record = outcome.to_json() | {"progress": to_json(progress and progress.state()), "of": of.to_json()}
        write_text(self.path / "training.json", checked_json(record))
        mask.save(self.path / f"{mask.noun}.safetensors")
        check_guards(self.path)
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether the subnetwork or circuit was found."""
        return self.mask_path is not None

    def outcome(self) -> Outcome:
        """The outcome that `finish` wrote."""
        return self.read_outcome()[0]

    def found(self) -> tuple[Mask, Outcome]:
        """The subnetwork or circuit and the outcome that `finish` wrote.

        Raises:
            ValueError: If a file is damaged, or settings, masks and outcome are not of the same run.
        """
        mask, (outcome, _, of) = self.mask(), self.read_outcome()
        is_former = read_config(self.path).format == FORMER
        remedy = f"put back the config.json, {mask.noun}.safetensors and training.json that were written together"
        check_belongs(self.path / "training.json", of, self.id, mask, is_former, remedy)
        return mask, outcome

    def read_outcome(self) -> tuple[Outcome, ProgressState | None, Origin | None]:
        """The contents of `training.json`: the outcome, the state of `progress.jsonl`, and what run they are of."""
        path = self.path / "training.json"
        remedy = f"`find` with --fresh and --out {self.path} learns the subnetwork again"
        record = read_checked_json(path, remedy)
        with damaged(path, remedy):
            progress = from_json(ProgressState | None, record.pop("progress", None), "progress")
            of = from_json(Origin | None, record.pop("of", None), "of")
            return Outcome.from_json(record), progress, of

    def check_progress(self) -> None:
        """Check that `progress.jsonl`, if present, is unchanged since `finish`.

        Raises:
            ValueError: If it has changed.
        """
        noted = self.read_outcome()[1]
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
        found = self.read_evaluation()
        return found and found[0]

    def read_evaluation(self) -> tuple[Evaluation, Origin | None] | None:
        """The contents of `metrics.json`: the evaluation, and what run and text it is of; None if there is no file."""
        path = self.path / "metrics.json"
        if not path.is_file():
            return None
        remedy = f"remove it, and `evaluate {self.path}` writes it again"
        record = read_checked_json(path, remedy)
        with damaged(path, remedy):
            of = from_json(Origin | None, record.pop("of", None), "of")
            return Evaluation.from_json(record), of


class _Progress:
    """The contents of `progress.jsonl` as it grows."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    @property
    def size(self) -> int:
        return len(self.data)

    def add(self, data: bytes) -> None:
        self.data += data

    def state(self) -> ProgressState:
        return ProgressState(len(self.data), hashlib.blake2b(self.data, digest_size=16).hexdigest())


def check_links(folder: str | os.PathLike[str]) -> None:
    """Raise ValueError if a file or folder of a run is a symbolic link; the run's folder itself may be one."""
    for name in _OURS:
        check_no_link(Path(folder) / name)


def check_settings(path: Path, wanted: Sequence[RunSettings], *beside: str) -> bool:
    """Whether a folder holds one of the wanted runs; False if it may be created there, beside what has these names.

    Raises:
        ValueError: If the folder holds another run, or anything else.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file, but a run needs a folder")
    if (path / "config.json").is_file():
        there = read_config(path).settings
        how = [how_runs_differ(there, one) for one in wanted]
        if None not in how:
            raise ValueError(f"{str(path)!r} holds another run ({how[0]}): choose another folder")
        return True
    if path.is_dir() and not all(is_lock(one) or is_leftover(one) or one.name in beside for one in path.iterdir()):
        raise ValueError(f"{str(path)!r} is not empty and holds no run: choose another folder")
    return False


def check_belongs(path: Path, of: Origin | None, run: str | None, mask: Mask, is_former: bool, remedy: str) -> None:
    """Raise ValueError unless a file says that it is of this run and mask; one of 0.1.0 need not say it."""
    try:
        if of is not None:
            of.check(run, mask.checksum)
        if not is_former and (of is None or of.subnetwork is None):
            raise ValueError("it does not say which run it is of")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not belong to this run: {error}; {remedy}") from error


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
