"""Predict peak memory before learning starts.

The memory of a step is measured, not guessed, and at small sizes: forward and backward passes over two sequences, over
three, and over two of twice the length, up to 64 tokens, record every tensor that is made and freed. The size of each
is constant or linear in the batch, and constant, linear or quadratic in the length, which the three sizes tell; so the
record of a whole batch of any length follows, and with it the peak. What a process takes beyond its tensors is a
factor, fitted to the peaks of complete runs on the CPU (`python benchmarks/memory.py`): the C library does not return
all memory that is freed.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Integer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.models.activations import check_tokens, lean_forward, recomputed
from bigram_circuits.models.logits import mean_cross_entropy
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import uses_model
from bigram_circuits.recipe import CHECKS_OF_MEMORY, METHODS, SparsifyConfig
from bigram_circuits.targets.base import PlacedTarget, Target, target_of
from bigram_circuits.text.corpus import Corpus

_PER_GATE, _PER_GATE_LOW = 16, 8  # bytes: score, its gradient, two moments
_PER_GATE_APART = 4  # bytes: how many other masks keep it
_PER_GATE_ATTACKED, _PER_GATE_ATTACKED_LOW = 8, 4  # bytes: the adversary's value, its gradient
_HEAP = 1 << 25  # bytes of the largest tensor whose memory the C library keeps when it is freed
_RETAINED, _RETAINED_LOW = 2.0, 2.8  # times such tensors of a step, on the CPU; the latter with low memory
_FIXED = 60_000_000  # bytes
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_LONGEST = 64  # tokens of the longest sequence that is tried


@dataclass(frozen=True)
class MemoryForecast:
    """Predicted peak memory of learning, in bytes.

    Example:
        >>> forecast = bc.forecast_memory(model, target, corpus, config)
        >>> print(f"{forecast.needed / 1e9:.1f} GB; fits: {forecast.fits}")
    """

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "unable to allocate")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def less_memory(error: BaseException) -> str:
    """What to change after an error of `is_out_of_memory`: another device only if it was not the CPU's memory."""
    smaller = "use --low-memory, a smaller --batch-size, a shorter --context-length"
    is_gpu = isinstance(error, torch.OutOfMemoryError) or "cuda" in str(error).lower()
    return f"{smaller}, --dtype bfloat16, or --device cpu" if is_gpu else f"{smaller}, or --dtype bfloat16"


@uses_model
def forecast_memory(
    model: Model,
    target: Any,
    corpus: Corpus,
    config: SparsifyConfig | None = None,
    *,
    within: MaskLike | None = None,
    apart_from: Sequence[MaskLike] = (),
    mode: str | None = None,
    candidates: Candidates | None = None,
) -> MemoryForecast:
    """Predict the peak memory of `find_subnetwork` from passes over a few short sequences.

    Args:
        model: As for `find_subnetwork`.
        target: As for `find_subnetwork`.
        corpus: As for `find_subnetwork`.
        config: As for `find_subnetwork`.
        within: As for `find_subnetwork`.
        apart_from: As for `find_subnetwork`.
        mode: If given, also check the forecast: see `MemoryForecast.check`. `"off"` skips the passes.
        candidates: What the recipe gates, if that is known; by default nodes are replaced by zero.

    Raises:
        ValueError: If model, target and recipe do not fit together, or there is no such mode.
        MemoryError: If it does not fit, depending on `mode`.

    Example:
        >>> forecast = bc.forecast_memory(model, target, corpus, config)
        >>> print(forecast.fits, forecast.largest_batch)
    """
    if mode not in (None, *CHECKS_OF_MEMORY):
        raise ValueError(f"check_memory must be one of {', '.join(CHECKS_OF_MEMORY)}, not {mode!r}")
    config = config or SparsifyConfig()
    target = target_of(target, model)
    within = None if within is None else as_mask(within)
    check_tokens(model, corpus.train)
    candidates = candidates or Candidates(model, config)
    counted = _count_gates(candidates, config, is_apart=bool(apart_from))
    if mode == "off":
        return counted
    if counted.fits:  # otherwise the passes would not fit either
        one, more, whole = _peaks(model, target, corpus.train, config, candidates, within)
        rest = config.batch_size - 1
        per_sequence = (whole - one) / rest if rest else more - one
        counted = replace(
            counted,
            gates=counted.scores + round(max(one - per_sequence, 0)),
            per_sequence=round(max(per_sequence, 0)),
        )
    if mode is not None:
        counted.check(mode)
    return counted


def _count_gates(candidates: Candidates, config: SparsifyConfig, *, is_apart: bool = False) -> MemoryForecast:
    """A forecast for gates, optimizer and masked weights alone, with the memory in use and available."""
    groups = candidates.groups
    device = groups[0].site.original.device
    masked = sum(group.site.original.nbytes for group in groups)
    n_gates = max(group.start + group.count for group in groups)
    per_gate = (_PER_GATE_LOW if config.low_memory else _PER_GATE) + METHODS[config.method].scratch
    if config.worst_case:
        per_gate += _PER_GATE_ATTACKED_LOW if config.low_memory else _PER_GATE_ATTACKED
    scores = (per_gate + (_PER_GATE_APART if is_apart else 0)) * n_gates
    held, free = memory_of(device)
    return MemoryForecast(
        str(device),
        held,
        scores + (0 if config.low_memory else masked),
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
    """The memory limits of this process's control groups and of those around them, in bytes."""
    limits = []
    for line in _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.is_file() else ():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"  # versions 1 and 2
        for root in (_CGROUPS / "memory",) if controllers else (_CGROUPS, _CGROUPS / "unified"):
            own = root / group.lstrip("/")
            around = [own, *own.parents[: len(own.parts) - len(root.parts)]]
            texts = [(folder / name).read_text().strip() for folder in around if (folder / name).is_file()]
            limits += [int(text) for text in texts if text.isdigit()]
    return limits


def memory_of(device: torch.device | str) -> tuple[int, int]:
    """Bytes in use on a device, and bytes available; on the CPU, in use by this process."""
    device = torch.device(device)
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        return allocated, torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated
    held = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    return held, min([free, *(max(0, limit - held) for limit in _container_limits())])


# --- the tensors of a step ---


def _peaks(
    model: Model,
    target: Target,
    tokens: Integer[np.ndarray, "row position"],
    config: SparsifyConfig,
    candidates: Candidates,
    within: Mask | None,
) -> tuple[float, float, float]:
    """Predict the peak memory of a step in bytes, for one sequence, for two, and for a batch of this recipe."""
    if isinstance(target, PlacedTarget):
        target = target.everywhere()
    length = tokens.shape[1]
    part = min(length, _LONGEST) // 2
    flat = tokens.reshape(-1)
    piece = flat[np.linspace(0, flat.size - 1, part).astype(int)]  # repeated, so that data grow evenly too
    gates = candidates.gates(config, config.seed, within)[0]
    _ = gates.gradient  # allocated before, since it is counted with the scores
    records = []
    with (
        candidates.applied(gates, on_any=True),
        lean_forward(model),
        recomputed(model) if config.low_memory else nullcontext(),
    ):
        for shape in ((2, 1), (3, 1), (2, 2)):  # of one sequence, PyTorch makes views instead of copies
            batch = torch.from_numpy(np.tile(piece, shape)).long().to(candidates.device)
            gates.refresh(0)
            with _Record() as record:
                mean_cross_entropy(model, target, batch).backward()
            records.append(record)
    first, wider, longer = records
    sizes = np.array(first.sizes, dtype=np.float64)
    by_length = (length / part) ** np.log2(_ratios(first, longer)).round().clip(0, 2)
    by_rows = (np.log(_ratios(first, wider)) / np.log(1.5)).round().clip(0, 1)
    retained = _RETAINED_LOW if config.low_memory else _RETAINED
    peaks = []
    for rows in (1, 2, config.batch_size):
        taken = sizes * by_length * (rows / 2) ** by_rows
        if candidates.device.type == "cpu":
            taken *= np.where(taken <= _HEAP, retained, 1)
        changes = [taken[tensor] if is_made else -taken[tensor] for tensor, is_made in first.events]
        peaks.append(float(np.cumsum(changes).max()))
    return peaks[0], peaks[1], peaks[2]


class _Record(TorchDispatchMode):
    """Within the `with` block, records every tensor that is made: its size, by what, and when it is made and freed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.makers: list[str] = []
        self.events: list[tuple[int, bool]] = []
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(made):
            key = storage.data_ptr()
            if key not in given and key not in self._alive:  # otherwise a view of another tensor
                self._alive.add(key)
                self.events.append((len(self.sizes), True))
                weakref.finalize(storage, self._freed, key, len(self.sizes))
                self.sizes.append(storage.nbytes())
                self.makers.append(str(func))
        return made

    @property
    def peak(self) -> int:
        """The most bytes of these tensors that there were at once."""
        changes = [self.sizes[tensor] if is_made else -self.sizes[tensor] for tensor, is_made in self.events]
        return int(np.cumsum(changes).max(initial=0))

    def _freed(self, key: int, tensor: int) -> None:
        self._alive.discard(key)
        self.events.append((tensor, False))


def _ratios(one: _Record, other: _Record) -> np.ndarray:
    """Sizes of the same tensors in another record, over those in one; 1 for those that the other does not have.

    Records differ where something is done in chunks, whose number depends on the size, but not the size of one.
    """
    ratios = np.ones(len(one.sizes))
    for block in SequenceMatcher(None, one.makers, other.makers, autojunk=False).get_matching_blocks():
        here, there = slice(block.a, block.a + block.size), slice(block.b, block.b + block.size)
        ratios[here] = np.divide(other.sizes[there], one.sizes[here])
    return ratios


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.untyped_storage().nbytes()]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
