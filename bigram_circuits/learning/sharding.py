"""Scores, moments and frozen weights of the blocks divided among processes: memory per process falls with their number.

PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps of every block a part of its weights and of their scores on
each rank. A block is gathered for its forward and its backward pass and freed again; the gradients of its scores are
added up over ranks, and each rank keeps those of its part. Embedding, unembedding and norms outside of blocks are whole
everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bigram_circuits.learning.ranks import Ranks
from bigram_circuits.masking.gates import Gates
from bigram_circuits.masking.parted import Parted
from bigram_circuits.models.model import Model
from bigram_circuits.models.plain import known_plain
from bigram_circuits.models.weights import WeightSite


class _Held(nn.Module):
    """A block and the scores of its weights, which FSDP gathers before it runs, and frees afterwards."""

    def __init__(self, block: nn.Module, run: Callable[..., Any], scores: Tensor) -> None:
        super().__init__()
        self.block, self.run = block, run
        self.scores = nn.Parameter(scores.detach())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class ShardedScores(Parted):
    """The scores of all gates, of which this process keeps a share of every block's.

    `tensors` are these shares. While a block is gathered, a range of its gates is a view of all of its scores.
    """

    is_whole = False

    def __init__(self, held: Sequence[Any], counts: Sequence[int], ranks: Ranks) -> None:
        """Take the scores that FSDP has divided; `counts` are those of each block."""
        self._held, self._ranks, self._counts = held, ranks, counts
        self._ends = list(accumulate(counts))
        local: list[DTensor] = [one.scores.detach() for one in held]
        self.tensors = tuple(nn.Parameter(one.to_local()) for one in local)

    @property
    def places(self) -> Iterator[slice]:
        """The range of this process's gates in every block."""
        return self._places(self._ranks.rank)

    @property
    def _here(self) -> Iterator[tuple[slice, Tensor]]:
        return zip(self.places, self.tensors, strict=True)

    @property
    def shares(self) -> Iterator[slice]:
        """The range of this process's gates within the gates of every block."""
        starts = (end - count for end, count in zip(self._ends, self._counts, strict=True))
        return (slice(place.start - at, place.stop - at) for place, at in zip(self.places, starts, strict=True))

    def _places(self, rank: int) -> Iterator[slice]:
        for end, count in zip(self._ends, self._counts, strict=True):
            share = -(-count // self._ranks.size)  # as FSDP divides
            yield slice(*(end - count + min(edge * share, count) for edge in (rank, rank + 1)))

    def __getitem__(self, place: slice) -> Shaped[Tensor, " gate"]:
        return self.range_of(place, self.tensors, lambda held: held.scores)

    def range_of(self, place: slice, own: Sequence[Tensor], of: Callable[[Any], Tensor]) -> Shaped[Tensor, " gate"]:
        """Return a range of gates: of a block that is gathered, from the whole, else from this process's shares."""
        part = self._part(place.start, place.stop)
        before = self._ends[part] - self._counts[part]
        if not isinstance(self._held[part].scores, DTensor):
            return of(self._held[part])[place.start - before : place.stop - before]
        before = list(self.places)[part].start
        assert before <= place.start, f"the gates from {place.start} are another process's"
        return own[part][place.start - before : place.stop - before]

    def holding(self, place: slice) -> Shaped[Tensor, " part"]:
        """Return the scores of the block in which a range of gates lies, as they are now."""
        return self._held[self._part(place.start, place.stop)].scores

    def gradient(self) -> Parted:
        """Return the gradients of this process's scores, or of a block's while it is gathered."""
        for held, own in zip(self._held, self.tensors, strict=True):
            if held.scores.grad is None:
                held.scores.grad = torch.zeros_like(held.scores)
            if isinstance(divided := held.scores.grad, DTensor):
                own.grad = divided.to_local()
        return _Gradients(self, [one.grad for one in self.tensors if one.grad is not None])

    def flat(self) -> Shaped[Tensor, " gate"]:
        """Return the scores of all processes, on the CPU; all of them have to ask."""
        return self.joined(self.copied(), everywhere=True)

    def sample(self, every: int) -> Shaped[Tensor, " gate"]:
        """Return every so-many-th score of all processes, in the order of the gates; all of them have to ask."""
        own = [one[-place.start % every :: every].detach().cpu() for place, one in self._here]
        told = self._ranks.gather(own)
        return torch.cat([each[part] for part in range(len(own)) for each in told])

    def copied(self) -> Shaped[Tensor, " own"]:
        """Return a copy of this process's scores in one tensor on the CPU."""
        return torch.cat([one.detach().cpu() for one in self.tensors])

    def split(self, flat: Shaped[Tensor, " gate"]) -> Parted:
        """Return the numbers of all gates by block."""
        parts = flat.split(list(self._counts))
        return Parted([part.to(one.device) for part, one in zip(parts, self.tensors, strict=True)])

    def own(self, flat: Shaped[Tensor, " gate"]) -> Shaped[Tensor, " own"]:
        """Return this process's share of the numbers of all gates."""
        return torch.cat([flat[place] for place in self.places])

    def joined(self, own: Shaped[Tensor, " own"], *, everywhere: bool = False) -> Shaped[Tensor, " gate"]:
        """Return the numbers of all gates from the shares of all processes, block by block.

        On the first process, or everywhere; elsewhere it is empty. All of them have to ask.
        """
        ranks, keep = self._ranks, everywhere or self._ranks.is_first
        shares = own.split([place.stop - place.start for place in self.places])
        whole = torch.empty(len(self) if keep else 0, dtype=own.dtype)
        for part, share in enumerate(shares):
            places = [list(self._places(rank))[part] for rank in range(ranks.size)]
            longest = places[0].stop - places[0].start
            padded = torch.zeros(longest, dtype=own.dtype)
            padded[: len(share)] = share
            found = [torch.empty_like(padded) for _ in places] if keep else None
            if everywhere:
                assert found is not None
                dist.all_gather(found, padded, group=ranks.group)
            else:
                dist.gather(padded, found, dst=0, group=ranks.group)
            for place, one in zip(places, found or (), strict=False):
                whole[place] = one[: place.stop - place.start]
        return whole

    def add_up(self, total: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the sum of all processes' sums over their gates."""
        total = total.cpu()
        self._ranks.add_up(total)
        return total


class _Gradients(Parted):
    """The gradients of `ShardedScores`."""

    def __init__(self, scores: ShardedScores, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self._scores = scores

    def __getitem__(self, place: slice) -> Shaped[Tensor, " gate"]:
        return self._scores.range_of(place, self.tensors, lambda held: held.scores.grad)


@contextmanager
def sharded(model: Model, gates: Gates, ranks: Ranks) -> Iterator[ShardedScores]:
    """Within the `with` block, each process keeps a share of every gated block's weights and scores.

    Enter it with the gates applied to the model (`gated`). Parameters of the plain model that share storage with those
    of a gated block are empty until it ends; then all are as before, bit for bit.

    Args:
        model: From `load_model`, with the gates applied.
        gates: Gates of single weights, with a part for every block.
        ranks: The processes.
    """
    layers = sorted({group.site.layer for group in gates.groups if isinstance(group.site, WeightSite)})
    blocks = [model.blocks[layer] for layer in layers]
    forwards = [block.__dict__.get("forward") for block in blocks]
    whole = [one.detach() for one in gates.scores.tensors]
    gates.scores = Parted(())
    mesh = init_device_mesh(whole[0].device.type, (ranks.size,))
    emptied = _Emptied(model, blocks)
    counts = [len(one) for one in whole]
    held: list[Any] = []
    for block in blocks:
        one: Any = fully_shard(_Held(block, block.forward, whole.pop(0)), mesh=mesh, reshard_after_forward=True)
        one.set_gradient_divide_factor(1.0)  # gradients are summed, since losses are shares of the batch's
        one.set_force_sum_reduction_for_comms(True)
        block.__dict__["forward"] = one
        held.append(one)
        emptied.empty(block)
    gates.scores = ShardedScores(held, counts, ranks)
    try:
        yield gates.scores
    finally:
        scores = gates.scores
        gates.scores = Parted([nn.Parameter(part) for part in scores.split(scores.flat()).tensors])
        for block, one, forward in zip(blocks, held, forwards, strict=True):
            one.unshard()
            emptied.fill(block)
            one.reshard()
            emptied.put_back(block)
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


class _Emptied:
    """The weights of blocks while FSDP keeps them: parameters without numbers, of the hooked model and the plain."""

    def __init__(self, model: Model, blocks: Sequence[nn.Module]) -> None:
        self._slots = {
            block: [
                (module, name, parameter)
                for module in block.modules()
                for name, parameter in _own(module).items()
                if parameter is not None
            ]
            for block in blocks
        }
        plain = known_plain(model)
        others = () if plain is None else plain.model.parameters()
        self._by_storage: dict[int, dict[int, _Placed]] = {}
        for one in (*model.parameters(), *others):
            storage = one.untyped_storage()
            places = self._by_storage.setdefault(storage.data_ptr(), {})
            places[id(one)] = _Placed(
                one, storage.nbytes() // one.element_size(), one.shape, one.stride(), int(one.storage_offset())
            )
        for module, name, parameter in (slot for slots in self._slots.values() for slot in slots):
            if not parameter.is_contiguous():  # which FSDP does not take
                copied = nn.Parameter(parameter.detach().contiguous(), requires_grad=parameter.requires_grad)
                _own(module)[name] = copied
        self._of = {
            block: {one.untyped_storage().data_ptr() for _, _, one in slots} for block, slots in self._slots.items()
        }

    def empty(self, block: nn.Module) -> None:
        """Free the weights of a block, which FSDP has copied."""
        for storage in self._of[block]:
            for placed in self._by_storage[storage].values():
                placed.parameter.data = placed.parameter.data.new_empty(0)

    def fill(self, block: nn.Module) -> None:
        """Give the weights of a gathered block back to the parameters that had them, which share them as before."""
        for storage in self._of[block]:
            sharing = list(self._by_storage[storage].values())
            numbers = sharing[0].parameter.data.new_empty(sharing[0].size)
            for placed in sharing:
                placed.parameter.data = numbers.as_strided(placed.shape, placed.stride, placed.offset)
        for module, name, parameter in self._slots[block]:
            gathered = _own(module)[name]
            assert gathered is not None, f"the block has no parameter {name} any more"
            parameter.data.copy_(gathered.detach())

    def put_back(self, block: nn.Module) -> None:
        """Put the parameters of a block into its modules again."""
        for module, name, parameter in self._slots[block]:
            _own(module)[name] = parameter


class _Placed(NamedTuple):
    """A parameter, and where in its storage it is."""

    parameter: nn.Parameter
    size: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _own(module: nn.Module) -> dict[str, Any]:
    """The parameters of a module by name, to be exchanged: by `setattr` a bridge would set them elsewhere."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]
