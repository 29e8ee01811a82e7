"""Predict peak memory before learning starts.

The memory of a step is measured, not guessed: forward passes over one sequence and over two show how many bytes each
sequence saves for the backward pass (`torch.autograd.graph.saved_tensors_hooks`). The gates and the masked weights are
added. The factors are fitted to the peaks of complete runs on the CPU (`python benchmarks/memory.py`); the factor for
saved tensors is above 1 because the backward pass allocates its own and because freed memory is not always returned.
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
from bigram_circuits.models.activations import check_tokens, lean_forward, recomputed
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.models.weights import WeightSite, weight_sites
from bigram_circuits.recipe import CHECKS_OF_MEMORY, METHODS, SparsifyConfig
from bigram_circuits.subnetwork import Subnetwork, SubnetworkLike, as_subnetwork
from bigram_circuits.targets.base import Target, as_target
from bigram_circuits.text.corpus import Corpus

_PER_GATE, _PER_GATE_LOW = 16, 8  # bytes: score, its gradient, two moments
_OF_MASKED = 2.0  # times the size of the masked weights, or with low memory
_MATRICES = 8  # times the size of the largest matrix: those of a block, and the gradient of one
_OF_KEPT = 2.3  # times what a sequence saves for its backward pass
_FIXED = 60_000_000  # bytes
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class MemoryForecast:
    """Predicted peak memory of learning, in bytes."""

    device: str
    """The device: `cpu`, `cuda:0`."""
    held: int
    """Memory in use now, including the model; on the CPU, by the whole process."""
    gates: int
    """Memory that gates, optimizer and masked weights will take."""
    per_sequence: int
    """Memory that each sequence of a batch will take."""
    batch_size: int
    """Sequences in a batch."""
    free: int
    """Memory still available on the device."""
    scores: int = 0
    """The part of `gates` for scores, gradient, moments and the method's buffers: exact, without a fitted factor."""
    total: int | None = None
    """Total memory of the device or container; None if unknown."""

    @property
    def needed(self) -> int:
        """Memory needed beyond what is in use now."""
        return _FIXED + self.gates + self.per_sequence * self.batch_size

    @property
    def peak(self) -> int:
        """Peak memory."""
        return self.held + self.needed

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory."""
        return self.needed <= self.free

    @property
    def largest_batch(self) -> int:
        """The largest batch that fits; 0 if none does."""
        return max(0, (self.free - _FIXED - self.gates) // max(self.per_sequence, 1))

    @property
    def certainly_too_small(self) -> bool:
        """Whether learning could not fit even if every other process freed its memory.

        True where the memory in use now plus that of scores, gradient and moments (exact, not fitted) exceeds the
        total memory of the device.
        """
        return self.total is not None and self.held + self.scores > self.total

    def check(self, mode: str = "strict") -> None:
        """Act on a forecast that does not fit.

        Args:
            mode: `"strict"` raises; `"warn"` raises only if the device is `certainly_too_small`, and otherwise warns
                and goes on, since the forecast may be wrong and memory may be freed; `"off"` does nothing.

        Raises:
            MemoryError: If it does not fit; the message says what would.
        """
        if self.fits or mode == "off":
            return
        if mode == "warn" and not self.certainly_too_small:
            warnings.warn(f"{self.shortage}; going on, since the forecast may be wrong", MemoryWarning, stacklevel=3)
            return
        raise MemoryError(self.shortage)

    @property
    def shortage(self) -> str:
        """How much memory is missing and what would fit, as a sentence."""
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
            "(--granularity), load the model as bfloat16 (--dtype), or use a device with more memory"
        )

    def __str__(self) -> str:
        return (
            f"about {_gigabytes(self.peak)} at its peak on {self.device}: {_gigabytes(self.held)} in use now, "
            f"{_gigabytes(self.gates)} for gates, {_gigabytes(self.per_sequence * self.batch_size)} for "
            f"{self.batch_size} sequences"
        )


class MemoryWarning(UserWarning):
    """Learning may not fit the device's memory."""


LESS_MEMORY = "use --low-memory, a smaller --batch-size, a shorter --context-length, --dtype bfloat16, or --device cpu"
"""What to change when memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "unable to allocate")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


@uses_model
def forecast_memory(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    within: SubnetworkLike | None = None,
    mode: str | None = None,
) -> MemoryForecast:
    """Predict the peak memory of `find_subnetwork` from forward passes over one sequence and over two.

    Args:
        model: As for `find_subnetwork`.
        target: As for `find_subnetwork`.
        corpus: As for `find_subnetwork`.
        config: As for `find_subnetwork`.
        within: As for `find_subnetwork`.
        mode: If given, also check the forecast: see `MemoryForecast.check`. `"off"` skips the forward passes.

    Raises:
        ValueError: If model, target and recipe do not fit together, or there is no such mode.
        MemoryError: If it does not fit, depending on `mode`.
    """
    if mode not in (None, *CHECKS_OF_MEMORY):
        raise ValueError(f"check_memory must be one of {', '.join(CHECKS_OF_MEMORY)}, not {mode!r}")
    config = config or SparsifyConfig()
    target = as_target(target, model.cfg.d_vocab)
    within = None if within is None else as_subnetwork(within)
    check_tokens(model, corpus.train)
    counted = _count_gates(weight_sites(model), config)
    if mode == "off":
        return counted
    if counted.fits:  # otherwise the forward passes would not fit either
        one, two = (_kept(model, target, corpus.train[[0] * rows], config, within) for rows in (1, 2))
        counted = replace(counted, per_sequence=round(_OF_KEPT * max(two - one, 0)))
    if mode is not None:
        counted.check(mode)
    return counted


def _count_gates(sites: Sequence[WeightSite], config: SparsifyConfig) -> MemoryForecast:
    """A forecast for gates, optimizer and masked weights alone, with the memory in use and available."""
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
    """Total memory of a device in bytes; on the CPU, no more than the container allows."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min([psutil.virtual_memory().total, *_container_limits()])


def _container_limits() -> list[int]:
    texts = [path.read_text().strip() for path in map(Path, _CGROUP_LIMITS) if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def memory_of(device: torch.device | str) -> tuple[int, int]:
    """Bytes in use on a device, and bytes available; on the CPU, in use by this process."""
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
    """Bytes saved for the backward pass of some sequences."""
    gates = make_gates(weight_sites(model), config, config.seed, within)[0]
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that saves its own output would otherwise never be freed

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
