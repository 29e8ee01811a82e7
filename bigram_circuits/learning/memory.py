"""Predict peak memory before learning starts.

What a step holds is counted, not guessed: a forward pass over one sequence and one over two show how many bytes are
kept for the backward pass, by sequence (`torch.autograd.graph.saved_tensors_hooks`). To this come the gates and the
masked weights. The factors are fitted to the peaks of whole runs on the CPU (`python benchmarks/memory.py`); the one
for what is kept is above 1 because of the backward pass's own tensors and of memory that is freed but not given back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Integer

from bigram_circuits.learning.learner import make_gates
from bigram_circuits.masking.apply import gated
from bigram_circuits.masking.gates import group_gates
from bigram_circuits.models.activations import lean_forward, recomputed
from bigram_circuits.models.model import Model
from bigram_circuits.models.weights import WeightSite, weight_sites
from bigram_circuits.recipe import CHECKS_OF_MEMORY, METHODS, SparsifyConfig
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.targets.base import Target, as_target
from bigram_circuits.text.corpus import Corpus

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
    scores: int = 0
    """Of `gates`, what scores, gradient, moments and the method itself take: counted, with no fitted factor."""
    total: int | None = None
    """All the memory of the device, or of the container; None if not known."""

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

    @property
    def certainly_too_small(self) -> bool:
        """Whether no other process's memory could make room.

        That is so where what is held now, and what scores, gradient and moments take, which is counted and not fitted,
        exceed all the memory of the device.
        """
        return self.total is not None and self.held + self.scores > self.total

    def check(self, mode: str = "strict") -> None:
        """Act on a forecast that does not fit.

        Args:
            mode: `"strict"` raises; `"warn"` raises only if the device is `certainly_too_small`, and else warns and
                goes on, since the forecast may be wrong and memory may become free; `"off"` does nothing.

        Raises:
            MemoryError: Saying what would fit.
        """
        if self.fits or mode == "off":
            return
        if mode == "warn" and not self.certainly_too_small:
            warnings.warn(f"{self.shortage}; going on, since a forecast can be wrong", MemoryWarning, stacklevel=3)
            return
        raise MemoryError(self.shortage)

    @property
    def shortage(self) -> str:
        """What is lacking, and what would fit, in words."""
        short = (
            f"learning needs about {_gigabytes(self.needed)} more on {self.device}, which has {_gigabytes(self.free)}"
        )
        if self.largest_batch:
            return (
                f"{short}: a batch_size of {self.largest_batch} would fit instead of {self.batch_size} "
                "(--batch-size), or shorter sequences (--context-length), or dtype bfloat16 (--dtype)"
            )
        return (
            f"{short}: not even a batch of one would fit; mask fewer layers (--layers), whole heads and neurons "
            "(--granularity), load the model as bfloat16 (--dtype), or take a device with more memory"
        )

    def __str__(self) -> str:
        return (
            f"about {_gigabytes(self.peak)} at its peak on {self.device}: {_gigabytes(self.held)} held now, "
            f"{_gigabytes(self.gates)} for gates, {_gigabytes(self.per_sequence * self.batch_size)} for "
            f"{self.batch_size} sequences"
        )


class MemoryWarning(UserWarning):
    """Learning may not fit the device's memory."""


LESS_MEMORY = "use --low-memory, a smaller --batch-size, a shorter --context-length, --dtype bfloat16, or --device cpu"
"""What to change when memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device is used up."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "unable to allocate")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def forecast_memory(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    within: Subnetwork | None = None,
    mode: str | None = None,
) -> MemoryForecast:
    """How much memory `find_subnetwork` would take at its peak, from two forward passes over a sequence or two.

    Args:
        model: As for `find_subnetwork`.
        target: The same.
        corpus: The same.
        config: The same.
        within: The same.
        mode: Also act on it: see `MemoryForecast.check`. `"off"` makes no forecast of sequences.

    Raises:
        ValueError: If model, target and recipe do not fit together, or there is no such mode.
        MemoryError: As `mode` says.
    """
    if mode not in (None, *CHECKS_OF_MEMORY):
        raise ValueError(f"check_memory must be one of {', '.join(CHECKS_OF_MEMORY)}, not {mode!r}")
    config = config or SparsifyConfig()
    target = as_target(target, model.cfg.d_vocab)
    counted = _count_gates(weight_sites(model), config)
    if mode == "off":
        return counted
    if counted.fits:  # if not, nor would the passes that count the rest
        one, two = (_kept(model, target, corpus.train[[0] * rows], config, within) for rows in (1, 2))
        counted = replace(counted, per_sequence=round(_OF_KEPT * max(two - one, 0)))
    if mode is not None:
        counted.check(mode)
    return counted


def _count_gates(sites: Sequence[WeightSite], config: SparsifyConfig) -> MemoryForecast:
    """What gates, optimizer and masked weights will take, beside what there is."""
    groups = group_gates(sites, config.unit_of, config.layers)
    device = groups[0].site.original.device
    sizes = [group.site.size * group.site.original.element_size() for group in groups]
    masked = max(sizes) * _MATRICES if config.low_memory else sum(sizes)
    n_gates = max(group.start + group.count for group in groups)
    scores = ((_PER_GATE_LOW if config.low_memory else _PER_GATE) + METHODS[config.method].scratch) * n_gates
    held, free = memory_of(device)
    return MemoryForecast(
        str(device),
        held,
        scores + round(_OF_MASKED * masked),
        0,
        config.batch_size,
        free,
        scores,
        all_memory_of(device),
    )


def all_memory_of(device: torch.device | str) -> int:
    """All the memory of a device in bytes; on the CPU at most what the container allows."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min([psutil.virtual_memory().total, *_container_limits()])


def _container_limits() -> list[int]:
    texts = [path.read_text().strip() for path in map(Path, _CGROUP_LIMITS) if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def memory_of(device: torch.device | str) -> tuple[int, int]:
    """Bytes held on a device now, and bytes that it can still give. On the CPU: by this process, to this process."""
    device = torch.device(device)
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        return allocated, torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated
    held = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    return held, min([free, *(max(0, limit - held) for limit in _container_limits())])


def _kept(
    model: Model,
    target: Target,
    tokens: Integer[np.ndarray, "row position"],
    config: SparsifyConfig,
    within: Subnetwork | None,
) -> int:
    """Bytes kept for the backward pass of some sequences."""
    gates = make_gates(weight_sites(model), config, config.seed, within)[0]
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # or a node that keeps its own output would be kept alive by it, for good

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with gated(model, gates), lean_forward(model), recomputed(model) if config.low_memory else nullcontext(), hooks:
        batch = torch.from_numpy(np.ascontiguousarray(tokens)).long().to(gates.scores.device)
        gates.refresh(0)
        loss = target.cross_entropy(model(batch), batch).mean()
        size = sum(kept.values())
        del loss
    return size


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
