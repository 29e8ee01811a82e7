"""How much memory learning will take, told before it takes it.

What a step holds is counted, not guessed: a forward pass over one sequence and one over two show how many bytes are
kept for the backward pass, by sequence (`torch.autograd.graph.saved_tensors_hooks`). To this come the gates and the
masked weights. The factors are fitted to the peaks of whole runs on the CPU (`python benchmarks/memory.py`); the one
for what is kept is above 1 because of the backward pass's own tensors and of memory that is freed but not given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Integer

from bigram_circuits.masking.apply import gated
from bigram_circuits.masking.gates import Gates, Tie
from bigram_circuits.models.activations import lean_forward, recomputed

_PER_GATE, _PER_GATE_LOW = 16, 8  # bytes: score, its gradient, two moments
_OF_MASKED = 2.0  # times the masked weights, or in low memory
_MATRICES = 8  # the largest matrix, so often: those of a block, and the gradient of one
_OF_KEPT = 2.3  # times what a sequence's backward pass keeps
_FIXED = 60_000_000  # bytes
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class MemoryForecast:
    """What learning will hold at its peak, in bytes."""

    device: str
    """Where: `cpu`, `cuda:0`."""
    held: int
    """What is held now, the model included: on the CPU by the whole process."""
    gates: int
    """What gates, optimizer and masked weights will take."""
    per_sequence: int
    """What each sequence of a batch will take."""
    batch_size: int
    """Sequences in a batch."""
    free: int
    """What the device can still give."""

    @property
    def needed(self) -> int:
        """What will be taken beyond what is held."""
        return _FIXED + self.gates + self.per_sequence * self.batch_size

    @property
    def peak(self) -> int:
        """The most that will be held."""
        return self.held + self.needed

    @property
    def fits(self) -> bool:
        """Whether the device has that much."""
        return self.needed <= self.free

    @property
    def largest_batch(self) -> int:
        """The largest batch that fits; 0 if none does."""
        return max(0, (self.free - _FIXED - self.gates) // max(self.per_sequence, 1))

    def check(self) -> None:
        """Raise MemoryError, saying what would fit, if it does not fit."""
        if self.fits:
            return
        short = (
            f"learning needs about {_gigabytes(self.needed)} more on {self.device}, which has {_gigabytes(self.free)}"
        )
        if self.largest_batch:
            raise MemoryError(
                f"{short}: a batch_size of {self.largest_batch} would fit instead of {self.batch_size} "
                "(--batch-size), or shorter sequences (--context-length), or dtype bfloat16 (--dtype)"
            )
        raise MemoryError(
            f"{short}: not even a batch of one would fit; mask fewer layers (--layers), whole heads and neurons "
            "(--granularity), load the model as bfloat16 (--dtype), or take a device with more memory"
        )

    def __str__(self) -> str:
        return (
            f"about {_gigabytes(self.peak)} at its peak on {self.device}: {_gigabytes(self.held)} held now, "
            f"{_gigabytes(self.gates)} for gates, {_gigabytes(self.per_sequence * self.batch_size)} for "
            f"{self.batch_size} sequences"
        )


def forecast(
    model: Any,
    target: Any,
    tokens: Integer[np.ndarray, "sequence position"],
    ties: Sequence[Tie],
    make_gates: Callable[[], Gates],
    batch_size: int,
    low_memory: bool,
    scratch: int,
) -> MemoryForecast:
    """The forecast for gates laid out as `ties`; `make_gates` makes them when there is room to try.

    `scratch` is what the method needs besides, in bytes for each gate.
    """
    device = ties[0].site.original.device
    sizes = [tie.site.size * tie.site.original.element_size() for tie in ties]
    masked = max(sizes) * _MATRICES if low_memory else sum(sizes)
    n_gates = max(tie.start + tie.count for tie in ties)
    gates = ((_PER_GATE_LOW if low_memory else _PER_GATE) + scratch) * n_gates + round(_OF_MASKED * masked)
    held, free = memory_of(device)
    counted = MemoryForecast(str(device), held, gates, 0, batch_size, free)
    if not counted.fits:  # nor would the passes that count the rest
        return counted
    one, two = (_kept(model, target, tokens[[0] * rows], make_gates(), low_memory) for rows in (1, 2))
    return replace(counted, per_sequence=round(_OF_KEPT * max(two - one, 0)))


def memory_of(device: torch.device | str) -> tuple[int, int]:
    """Bytes held on a device now, and bytes that it can still give. On the CPU: by this process, to this process."""
    device = torch.device(device)
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        return allocated, torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated
    held = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    for path in map(Path, _CGROUP_LIMITS):
        limit = path.read_text().strip() if path.is_file() else "max"
        if limit.isdigit():
            free = min(free, max(0, int(limit) - held))
    return held, free


def _kept(model: Any, target: Any, tokens: Integer[np.ndarray, "row position"], gates: Gates, low_memory: bool) -> int:
    """Bytes kept for the backward pass of some sequences."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # or a node that keeps its own output would be kept alive by it, for good

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with gated(model, gates), lean_forward(model), recomputed(model) if low_memory else nullcontext(), hooks:
        batch = torch.from_numpy(np.ascontiguousarray(tokens)).long().to(gates.scores.device)
        gates.refresh(0)
        loss = target.cross_entropy(model(batch), batch).mean()
        size = sum(kept.values())
        del loss
    return size


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
