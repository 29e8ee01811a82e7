"""Observers of learning: any object with `on_step` and `on_end`.

    found = find_subnetwork(model, target, corpus, callbacks=[TensorBoard("logs/first"), WandB(project="circuits")])

Callbacks receive records and cannot change what is learned. An exception in a callback ends the run like any other
exception: the checkpoint is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from bigram_circuits.learning.found import Found
from bigram_circuits.runs import StepRecord

_NOT_LOGGED = ("attempt", "step")


@runtime_checkable
class Callback(Protocol):
    """The methods that `find_subnetwork` calls.

    Example:
        >>> class Printer:
        ...     def on_step(self, record):
        ...         print(record.step, record.cross_entropy)
        ...     def on_end(self, found):
        ...         print(found)
        >>> isinstance(Printer(), bc.Callback)
        True
    """

    def on_step(self, record: StepRecord) -> None:
        """Called after every step."""
        ...

    def on_end(self, found: Found) -> None:
        """Called when learning is done, but not if it is interrupted."""
        ...


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raise ValueError unless every callback has both methods."""
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ValueError(f"a callback needs the methods on_step and on_end; {type(callback).__name__} lacks one")


def tell_step(callbacks: Sequence[Callback], record: StepRecord) -> None:
    """Call every callback's `on_step`."""
    for callback in callbacks:
        callback.on_step(record)


def tell_end(callbacks: Sequence[Callback], found: Found) -> None:
    """Call every callback's `on_end`."""
    for callback in callbacks:
        callback.on_end(found)


class TensorBoard:
    """Log the numbers of every step to TensorBoard, by attempt. Needs the package `tensorboard`.

    Example:
        >>> bc.find_subnetwork(model, target, corpus, config, callbacks=[bc.TensorBoard("logs/first")])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Write to this folder. Raises ImportError, saying what to install, if TensorBoard is missing."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard is not installed: pip install 'bigram-circuits[loggers]'") from error
        self._writer = SummaryWriter(str(folder))

    def on_step(self, record: StepRecord) -> None:
        """Add a point to every curve."""
        for name, value in _numbers(record):
            self._writer.add_scalar(f"attempt {record.attempt}/{name}", value, record.step)

    def on_end(self, found: Found) -> None:
        """Log what was found, and close the file."""
        self._writer.add_text("found", f"{found.mask!r}; stopped because {found.why}")
        self._writer.close()


class WandB:
    """Log the numbers of every step to a Weights & Biases run. Needs the package `wandb`.

    Example:
        >>> bc.find_subnetwork(model, target, corpus, config, callbacks=[bc.WandB(project="circuits")])
    """

    def __init__(self, **options: Any) -> None:
        """Start a run with the options of `wandb.init`: `project`, `name`, `mode="offline"`, `dir` ...

        Raises ImportError, saying what to install, if wandb is missing.
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

    def on_end(self, found: Found) -> None:
        """Add the size of the mask to the summary, and finish the run."""
        self.run.summary.update(
            {"kept": found.mask.kept, "fraction": found.mask.fraction, "stopped": found.stopped_because}
        )
        self.run.finish()


def _numbers(record: StepRecord) -> Iterator[tuple[str, float]]:
    """The numbers of a step by name, without those that are None."""
    for name, value in record.to_json().items():
        if name not in _NOT_LOGGED and value is not None:
            yield name, value
