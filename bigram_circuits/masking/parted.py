"""A number for every gate, held in consecutive parts: each is on the device of the weights that its gates govern."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


class Parted:
    """A vector over all gates in one or several tensors, which may be on different devices.

    A range of gates (`vector[first:last]`) is a view of the part in which it lies; no range crosses the end of a part.

    Example:
        >>> from bigram_circuits.masking.parted import Parted
        >>> numbers = Parted([torch.zeros(3), torch.ones(2)])
        >>> numbers[slice(3, 5)].tolist()
        [1.0, 1.0]
    """

    is_whole = True
    """Whether all numbers are here, and none in another process."""

    def __init__(self, tensors: Sequence[Shaped[Tensor, " _"]]) -> None:
        """Join tensors in the order of their gates."""
        self.tensors = tuple(tensors)
        self._ends = list(accumulate(len(one) for one in self.tensors))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: slice) -> Shaped[Tensor, " gate"]:
        first, last, _ = place.indices(len(self))
        part = self._part(first, last)
        before = self._ends[part] - len(self.tensors[part])
        return self.tensors[part][first - before : last - before]

    def holding(self, place: slice) -> Shaped[Tensor, " part"]:
        """Return the part in which a range of gates lies."""
        return self.tensors[self._part(place.start, place.stop)]

    def _part(self, first: int, last: int) -> int:
        part = bisect_right(self._ends, first, hi=len(self._ends) - 1)
        assert last <= self._ends[part], f"the gates {first} to {last} cross the end of a part, {self._ends[part]}"
        return part

    @property
    def places(self) -> Iterator[slice]:
        """The range of gates of every part."""
        return (slice(end - len(one), end) for one, end in zip(self.tensors, self._ends, strict=True))

    def like(self, make: Callable[[Tensor], Tensor]) -> Parted:
        """Return another vector in the same parts, made from each of these without gradients."""
        return Parted([make(one.detach()) for one in self.tensors])

    def flat(self) -> Shaped[Tensor, " gate"]:
        """Return all numbers in one tensor: the only part itself, or a copy of several on the CPU."""
        if len(self.tensors) == 1:
            return self.tensors[0]
        return self.copied()

    def gradient(self) -> Parted:
        """Return the `grad` of every part, which is allocated once and then reused."""
        for one in self.tensors:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        return Parted([one.grad for one in self.tensors if one.grad is not None])

    def sample(self, every: int) -> Shaped[Tensor, " some"]:
        """Return every so-many-th number in one tensor."""
        return self.flat()[::every]

    def own(self, flat: Shaped[Tensor, " gate"]) -> Shaped[Tensor, " own"]:
        """Return what is kept here of numbers for all gates: all."""
        return flat

    def joined(self, own: Shaped[Tensor, " own"], *, everywhere: bool = False) -> Shaped[Tensor, " gate"]:
        """Return the numbers for all gates from what is kept here of them: all."""
        return own

    def add_up(self, total: Float[Tensor, "*of"]) -> Float[Tensor, "*of"]:
        """Return the sum over all gates, given that over those here."""
        return total

    def copied(self) -> Shaped[Tensor, " gate"]:
        """Return a copy of all numbers in one tensor on the CPU."""
        copy = torch.empty(len(self), dtype=self.tensors[0].dtype)
        for place, one in zip(self.places, self.tensors, strict=True):
            copy[place].copy_(one.detach())
        return copy

    def split(self, flat: Shaped[Tensor, " gate"]) -> Parted:
        """Return the numbers of one tensor in the parts of this vector, each on its device; views where they can be."""
        pieces = zip(self.places, self.tensors, strict=True)
        return Parted([flat[place].to(one.device) for place, one in pieces])

    def copy_(self, flat: Shaped[Tensor, " gate"]) -> None:
        """Overwrite all numbers with those of one tensor."""
        for place, one in zip(self.places, self.tensors, strict=True):
            one.detach().copy_(flat[place])
