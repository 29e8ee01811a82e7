"""Things that look on while a subnetwork is learned: any object with `on_step` and `on_end`.

    found = find_subnetwork(model, target, corpus, callbacks=[TensorBoard("logs/first"), WandB(project="circuits")])

Callbacks see records; what they do cannot change what is learned. An exception in one of them ends the run as any other
would: its checkpoint stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from bigram_circuits.learning.found import FoundSubnetwork
from bigram_circuits.runs import StepRecord

_NOT_LOGGED = ("attempt", "step")


@runtime_checkable
class Callback(Protocol):
    """What `find_subnetwork` calls."""

    def on_step(self, record: StepRecord) -> None:
        """After every step."""
        ...

    def on_end(self, found: FoundSubnetwork) -> None:
        """When learning is done; not where it is interrupted."""
        ...


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raise ValueError unless all have both methods."""
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ValueError(f"a callback needs the methods on_step and on_end; {type(callback).__name__} lacks one")


def tell_step(callbacks: Sequence[Callback], record: StepRecord) -> None:
    """Tell all of them about a step."""
    for callback in callbacks:
        callback.on_step(record)


def tell_end(callbacks: Sequence[Callback], found: FoundSubnetwork) -> None:
    """Tell all of them that learning is done."""
    for callback in callbacks:
        callback.on_end(found)


class TensorBoard:
    """Scalars for TensorBoard: the numbers of every step, by attempt. Needs the package `tensorboard`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Write to this folder. Raises ImportError, saying what to install, if there is no TensorBoard."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard is not installed: pip install 'bigram-circuits[loggers]'") from error
        self._writer = SummaryWriter(str(folder))

    def on_step(self, record: StepRecord) -> None:
        """Add a point to every curve."""
        for name, value in _numbers(record):
            self._writer.add_scalar(f"attempt {record.attempt}/{name}", value, record.step)

    def on_end(self, found: FoundSubnetwork) -> None:
        """Write what was found, and close the file."""
        self._writer.add_text("found", f"{found.subnetwork!r}; stopped because {found.why}")
        self._writer.close()


class WandB:
    """A run of Weights & Biases: the numbers of every step. Needs the package `wandb`."""

    def __init__(self, **options: Any) -> None:
        """Begin a run with the options of `wandb.init`: `project`, `name`, `mode="offline"`, `dir` ...

        Raises ImportError, saying what to install, if there is no wandb.
        """
        try:
            import wandb
        except ImportError as error:
            raise ImportError("wandb is not installed: pip install 'bigram-circuits[loggers]'") from error
        self.run = wandb.init(**options)

    def on_step(self, record: StepRecord) -> None:
        """Log the numbers of a step."""
        numbers = {f"attempt {record.attempt}/{name}": value for name, value in _numbers(record)}
        self.run.log({"step": record.step, **numbers})

    def on_end(self, found: FoundSubnetwork) -> None:
        """Note what was found, and finish the run."""
        self.run.summary.update(
            {"kept": found.subnetwork.kept, "fraction": found.subnetwork.fraction, "stopped": found.stopped_because}
        )
        self.run.finish()


def _numbers(record: StepRecord) -> Iterator[tuple[str, float]]:
    """The numbers of a step that are known, by name."""
    for name, value in record.to_json().items():
        if name not in _NOT_LOGGED and value is not None:
            yield name, value
