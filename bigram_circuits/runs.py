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
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigram_circuits.measures import html
from bigram_circuits.storage.files import (
    cannot_write,
    checked_json,
    is_leftover,
    read_checked_json,
    recover_folder,
    remove_leftovers,
    whole_file,
    write_text,
)
from bigram_circuits.storage.locks import LOCK, holder, lock_folder
from bigram_circuits.subnetwork import Subnetwork

_ORDERS = {1: "unigram", 2: "bigram", 3: "trigram"}
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
    rollbacks: Sequence[Mapping[str, Any]] = ()
    """Where the loss exploded in this attempt, and what was done."""
    good_step: int | None = None
    """The step of the last good state, whose tensors are named `good.`; None: there is none but the attempt's start."""


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
        wanted = json.loads(json.dumps(settings))
        is_there = _check_settings(path, wanted)
        folder = cls(path)
        if is_there and resume:
            return folder
        with folder.lock():
            if _check_settings(path, wanted):  # again: another process may have been faster
                if not resume:
                    folder._clear()
                return folder
            created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            record = {"format": _FORMAT, "created": created, "settings": wanted, "rebuild": rebuild}
            write_text(path / "config.json", checked_json(record | {"versions": versions()}))
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

    def history(self) -> list[dict[str, Any]]:
        """The records in `progress.jsonl`; a last line that was cut short is left out."""
        return _read_lines(self.path / "progress.jsonl")

    def begin_progress(self, records: list[dict[str, Any]]) -> None:
        """Start `progress.jsonl` with these records: those before a checkpoint, or none."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_text(self._progress_path, text)
        self._progress = _Progress(text.encode())

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to `progress.jsonl`."""
        if self._progress is None:
            self.begin_progress(self.history())  # a last line that was cut short goes
            assert self._progress is not None
        line = (json.dumps(record) + "\n").encode()
        with cannot_write(self._progress_path), self._progress_path.open("ab") as file:
            file.write(line)
        self._progress.add(line)

    @property
    def _progress_path(self) -> Path:
        return self.path / "progress.jsonl"

    def _sync_progress(self) -> dict[str, Any] | None:
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

    def rewind(self, checkpoint: Checkpoint, records: list[dict[str, Any]]) -> None:
        """Go back to an earlier state, before which there were these first records of `progress.jsonl`."""
        before = _Progress("".join(json.dumps(record) + "\n" for record in records).encode())
        self._sync_progress()
        self._write_checkpoint(checkpoint, before.state())  # killed here, it vouches for the first records alone
        self.begin_progress(records)

    def _write_checkpoint(self, checkpoint: Checkpoint, progress: dict[str, Any] | None) -> None:
        started = time.monotonic()
        fields = ("step", "attempt", "seconds", "rollbacks", "good_step")
        state = json.dumps({name: getattr(checkpoint, name) for name in fields} | {"progress": progress})
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

    def _read_checkpoint(self) -> tuple[Checkpoint, dict[str, Any] | None] | None:
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
            state = json.loads(metadata["state"])
            progress = state.pop("progress", None)
            return Checkpoint(tensors, **state), progress
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error

    def take_up(self) -> tuple[Checkpoint | None, list[dict[str, Any]]]:
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

    def _records_before(self, checkpoint: Checkpoint | None, progress: dict[str, Any] | None) -> list[dict[str, Any]]:
        if checkpoint is None:
            return []
        if progress is None:  # written by a version that did not note it
            place = (checkpoint.attempt, checkpoint.step)
            return [record for record in self.history() if (record["attempt"], record["step"]) < place]
        before = self._progress_path.read_bytes()[: progress["size"]] if self._progress_path.is_file() else b""
        if _Progress(before).state() != progress:
            raise ValueError(f"{str(self._progress_path)!r} is damaged: it is not what came before the checkpoint")
        return [json.loads(line) for line in before.splitlines()]

    def _note_other_versions(self) -> None:
        then, now = _read_config(self.path).get("versions") or {}, versions()
        other = [f"{name} {now[name]}, then {then[name]}" for name in now if then.get(name, now[name]) != now[name]]
        if other:
            print(
                f"note: this run was begun with other versions ({'; '.join(other)}): "
                "its last bits may not be those of a run without interruption",
                file=sys.stderr,
            )

    # --- the end ---

    def finish(self, subnetwork: Subnetwork, outcome: Mapping[str, Any]) -> None:
        """Write the subnetwork and how the learning ended, then remove the checkpoint."""
        write_text(self.path / "training.json", checked_json(dict(outcome) | {"progress": self._sync_progress()}))
        subnetwork.save(self.path / "subnetwork.safetensors")
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    @property
    def is_finished(self) -> bool:
        """Whether the subnetwork was found."""
        return (self.path / "subnetwork.safetensors").is_file()

    def outcome(self) -> dict[str, Any]:
        """What `finish` wrote about how the learning ended."""
        return {name: value for name, value in self._read_outcome().items() if name != "progress"}

    def _read_outcome(self) -> dict[str, Any]:
        remedy = f"`find` with --fresh and --out {self.path} learns the subnetwork again"
        return read_checked_json(self.path / "training.json", remedy)

    def check_progress(self) -> None:
        """Check that `progress.jsonl`, if it is there, is what `finish` saw.

        Raises:
            ValueError: If it is not.
        """
        noted = self._read_outcome().get("progress")  # older runs have none
        if noted and self._progress_path.is_file() and _Progress(self._progress_path.read_bytes()).state() != noted:
            raise ValueError(
                f"{str(self._progress_path)!r} is damaged: its lines are not those the run wrote; without the file, "
                "the run is read without its history"
            )

    def files(self) -> list[str]:
        """Names of the files in the folder, but for the lock."""
        return sorted(path.name for path in self.path.iterdir() if path.name != LOCK)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write `metrics.json`."""
        write_text(self.path / "metrics.json", checked_json(metrics))


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
        from bigram_circuits.measures.results import load_result

        files = sorted((self.path / "analysis").glob("*.json"))
        return {RENAMED.get(path.stem, path.stem): load_result(path) for path in files if path.name != LEFT_OUT}

    @property
    def left_out(self) -> dict[str, str]:
        """What `analyze` left out because this model does not show it, with the reason."""
        path = self.path / "analysis" / LEFT_OUT
        left_out = read_checked_json(path) if path.is_file() else {}
        return {RENAMED.get(name, name): reason for name, reason in left_out.items()}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.subnetwork!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows: what was asked, how it ended, and the answer."""
        model, corpus = ((self.settings.get(part) or {}) for part in ("model", "corpus"))
        reason = self.outcome.get("stopped_because")
        asked = f"Model: {model.get('name')}. Text: {corpus.get('source')}."
        ended = f"Stopped after {len(self.history):,} steps: {STOPS.get(str(reason), reason)}"
        return html.summary(f"Run in {self.path}", [asked, f"{ended}.", self._answer()], self.subnetwork._repr_html_())

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
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{str(path)!r} holds no run: it has no config.json")
    record = _read_config(path)
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
    metrics = path / "metrics.json"
    remedy = f"remove it, and `evaluate {path}` writes it again"
    return Run(
        path=path,
        settings=record["settings"],
        rebuild=record.get("rebuild"),
        versions=record.get("versions") or {},
        subnetwork=subnetwork,
        outcome=outcome,
        metrics=read_checked_json(metrics, remedy) if metrics.is_file() else None,
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


def _check_settings(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a folder holds the run that is wanted; False if it may become it."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file, but a run needs a folder")
    if (path / "config.json").is_file():
        there = _read_config(path).get("settings")
        if there != wanted:
            raise ValueError(f"{str(path)!r} holds another run ({_difference(there, wanted)}): choose another folder")
        return True
    if path.is_dir() and not all(one.name == LOCK or is_leftover(one) for one in path.iterdir()):
        raise ValueError(f"{str(path)!r} is not empty and holds no run: choose another folder")
    return False


def _read_config(path: Path) -> dict[str, Any]:
    config = path / "config.json"
    remedy = "choose another folder, or remove this one and run again"
    record = read_checked_json(config, remedy)
    if record.get("format") != _FORMAT:  # for example a model's folder
        raise ValueError(
            f"{str(config)!r} is not that of a run (its format is {record.get('format')!r}, not {_FORMAT!r}): "
            "choose another folder"
        )
    if not isinstance(record.get("settings"), dict):
        raise ValueError(f"{str(config)!r} is damaged: it has no settings; {remedy}")
    return record


class _Progress:
    """How long `progress.jsonl` is, and its digest, as it grows."""

    def __init__(self, data: bytes) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._size = 0
        self.add(data)

    def add(self, data: bytes) -> None:
        self._hash.update(data)
        self._size += len(data)

    def state(self) -> dict[str, Any]:
        return {"size": self._size, "digest": self._hash.hexdigest()}


def _checksum(state: str, tensors: Mapping[str, Tensor]) -> str:
    """Of a checkpoint: all its bits."""
    digest = hashlib.blake2b(state.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
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


def model_words(run: Run) -> str:
    """The name of a run's model."""
    name = (run.rebuild or {}).get("model", {}).get("name") or (run.settings.get("model") or {}).get("name")
    name = str(name or run.subnetwork.model_name or "a model")
    return "the reference model" if name == "reference" else name


def target_words(run: Run) -> tuple[str, str]:
    """The target's name, and what it is."""
    kind = (run.rebuild or {}).get("target") or (run.settings.get("target") or {}).get("kind") or "target"
    if kind == "ngram":
        order = _ORDERS.get((run.rebuild or {}).get("order", 2), "n-gram")
        return order, f"the {order} probabilities of the text"
    named = {
        "model": ("self-faithful", "the model's own predictions"),
        "next-token": ("next-token", "the actual next token"),
        "induced": ("induced bigram", "the bigram that the model itself induces"),
    }
    return named.get(kind, (str(kind), f"the target {kind}"))
