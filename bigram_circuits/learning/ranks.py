"""Several processes that learn one mask together, data parallel: those of a `torch.distributed` process group.

Every process (a *rank*) holds the whole model and all gates. Of each batch it takes its own sequences; the gradients
are added up before the optimizer's step, so all ranks take the same step: that of one process with the whole batch, up
to the order of floating-point sums. What decides how the run goes on (the loss, how many gates are undecided, whether
somebody pressed Ctrl-C) is agreed upon once per step. Only the first rank writes files, prints and calls callbacks.

Tensors on a GPU are added up by the process group itself (NCCL, if it is made here); all others, and what the ranks
tell each other, by a second group over gloo. With gloo, sums are in the same order whenever there are as many ranks;
with NCCL they are as long as it chooses the same algorithm, which `NCCL_ALGO=Ring` fixes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Integer, Shaped
from torch import Tensor

_T = TypeVar("_T")
_PATIENCE = timedelta(days=1)  # while the first rank counts text or polishes; a rank that has ended is noticed at once
_STORE_PATIENCE = timedelta(seconds=10)
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@dataclass(frozen=True)
class Ranks:
    """This process among those that learn together; by default it is alone."""

    rank: int = 0
    """Its number, from 0."""
    size: int = 1
    """Number of processes."""
    group: Any = None
    """Their gloo group; None if there is only one."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def rows(self, batch: Integer[Tensor, "batch pos"]) -> Integer[Tensor, "own pos"]:
        """This rank's sequences of a batch: the ranks' numbers of sequences differ by at most one.

        Raises:
            ValueError: If there are fewer sequences than ranks.
        """
        if len(batch) < self.size:
            raise ValueError(
                f"a batch of {len(batch)} sequences cannot be divided among {self.size} processes: start fewer, or "
                "give a larger batch_size or more text"
            )
        return batch[self.rank * len(batch) // self.size : (self.rank + 1) * len(batch) // self.size]

    def add_up(self, values: Shaped[Tensor, "..."]) -> None:
        """Replace a tensor, in place, by the sum over ranks; it then has the same bits on all of them."""
        if self.size > 1:
            with _all_are_there():
                dist.all_reduce(values, group=self.group if values.device.type == "cpu" else None)

    def gather(self, value: _T) -> list[_T]:
        """One value of each rank, in their order, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _all_are_there():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def first_does(self, work: Callable[[], _T]) -> _T:
        """Do something on the first rank alone, and return what it returns on every rank.

        An exception, Ctrl-C included, is raised on every rank.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                with alone():
                    told[0] = work()
            except (Exception, KeyboardInterrupt) as error:
                told[1] = error
        with _all_are_there():
            dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def tensors_of_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first rank's tensors, on the CPU, on every rank."""
        if self.size == 1:
            return dict(tensors)
        like = self.first_does(lambda: {name: (one.shape, one.dtype) for name, one in tensors.items()})
        found = {}
        for name, (shape, dtype) in like.items():
            found[name] = tensors[name].contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            with _all_are_there():
                dist.broadcast(found[name].reshape(-1).view(torch.uint8), src=0, group=self.group)
        return found

    def own_device(self, device: str | None) -> str | None:
        """The device to load a model to: of several GPUs, the one with this rank's number on its machine."""
        if self.size == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
            return device
        return f"cuda:{_local_rank()}"


def current_ranks() -> Ranks:
    """The processes that learn together with this one: those of the process group.

    If there is no process group, but the environment of `torchrun`, one is made: gloo for the CPU, NCCL for GPUs.

    Raises:
        ConnectionError: If another process has ended.
        ValueError: If the environment names no process group.
    """
    if _ALONE.get() or not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if not is_one_of_several():
            return Ranks()
        on_gpus = torch.cuda.is_available()
        if on_gpus:
            torch.cuda.set_device(_local_rank())
        with _all_are_there():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    if dist.get_world_size() == 1:
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), _gloo_group(dist.group.WORLD))


@contextmanager
def alone() -> Iterator[None]:
    """Within the block, this process learns on its own, whatever process group there is."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def refuse_several(what: str) -> None:
    """Refuse work that several processes would do at the same time, and write to the same files.

    Raises:
        ValueError: If this process is one of several that learn together.
    """
    if current_ranks().size > 1:
        raise ValueError(f"{what} learns several masks, which several processes cannot divide: start one process")


def is_one_of_several() -> bool:
    """Whether this process was started as one of several, as by `torchrun`."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_first_to_end() -> bool:
    """Whether no other process that was started together with this one has called this before.

    The one that says why all of them end; the others end for the same reason, or because it did.
    """
    if not is_one_of_several():
        return True
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # there is no store that outlives the processes
        return os.environ["RANK"] == "0"
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, timeout=_STORE_PATIENCE)  # pyright: ignore[reportPrivateImportUsage]
        key = f"bigram_circuits/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return store.compare_set(key, "", os.environ["RANK"]).decode() == os.environ["RANK"]
    except (RuntimeError, KeyError, ValueError):
        return True


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@lru_cache(maxsize=1)
def _gloo_group(world: Any) -> Any:
    """A group of all processes for what they tell each other; made once, by all of them."""
    with _all_are_there():
        return dist.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def _all_are_there() -> Iterator[None]:
    """Within the block, that another process has ended is a `ConnectionError`."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConnectionError(
            f"another process of this run has ended, or cannot be reached; its own message says why ({reason})"
        ) from error
