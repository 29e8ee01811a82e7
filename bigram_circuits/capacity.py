"""Could the mask itself hold the answer? The bits of a mask beside those of a table as good as the subnetwork.

A mask is a message: whoever chose it could have written a table of n-grams into it, whatever the weights are, if it has
bits enough. Masks over random weights that do a task are known as supermasks (Zhou et al. 2019, arXiv 1905.01067;
Ramanujan et al. 2020, arXiv 1911.13299).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from bigram_circuits.masking.apply import Mask, MaskLike, as_mask
from bigram_circuits.names import ATTENTION_MATRICES, WeightName
from bigram_circuits.storage.typed import Record
from bigram_circuits.targets.base import Target
from bigram_circuits.text.coding import MOST_ENTRIES

FAR_FEWER = 0.1
"""Below this ratio of bits a mask cannot have memorised a table. The table's code is only the shortest one found: other
precisions and codes for the names of successors change its length by a fifth, and a table in another form (of low rank,
say) may be a few times shorter. A factor of 10 leaves room for that."""


@dataclass(frozen=True)
class MaskCapacity(Record):
    """How many bits a mask has, and how many a table needs that is as close to the target as the subnetwork is.

    Example:
        >>> capacity = bc.could_mask_hold_it(found, target, kl=0.5)
        >>> print(capacity.mask_bits, capacity.table_bits)
    """

    mask_bits: float
    """Bits of the shortest description found of the mask."""
    table_bits: float
    """Bits of the shortest message found that gives the table up to `kl`; an upper bound on what is needed."""
    kl: float
    """KL from the table that the message may have, nats per position."""

    @property
    def ratio(self) -> float:
        """`mask_bits` / `table_bits`; infinite if the table needs no bits."""
        return self.mask_bits / self.table_bits if self.table_bits else math.inf

    @property
    def is_far_fewer(self) -> bool:
        """Whether the mask has far fewer bits than the table, so that it cannot have memorised it."""
        return self.ratio < FAR_FEWER

    @property
    def says(self) -> str:
        """Whether the mask could hold the table, with the numbers, in a sentence."""
        if not self.table_bits:
            return (
                f"Could the mask itself hold the answer? There is none to hold: the unigram distribution (of unigrams: "
                f"the uniform one) alone has a KL of at most {self.kl:.3f} nats."
            )
        numbers = (
            f"it has {self.mask_bits:,.0f} bits, and a table with a KL of {self.kl:.3f} nats was written in "
            f"{self.table_bits:,.0f} (ratio {f'{self.ratio:,.0f}' if self.ratio >= 10 else f'{self.ratio:.2g}'})"
        )
        word, why = next(words for most, *words in _GRADES if self.ratio < most)
        return f"Could the mask itself hold the answer? {word}: {numbers}{why}."


_GRADES = (
    (FAR_FEWER, "No", ", far too few to have memorised it: the rest comes from the weights"),
    (1.0, "NOT excluded", ", fewer, but not by a factor of 10, and a shorter code may exist"),
    (math.inf, "Yes", ": it could have memorised the table, whatever the weights hold, so that there is such a mask "
                      "shows nothing by itself"),
)  # fmt: skip
"""Ratios below which they hold, the answer, and what follows."""


def could_mask_hold_it(subnetwork: MaskLike, table: Any, kl: float) -> MaskCapacity:
    """Count the bits of a mask, and those of a table of n-grams that is as good as the subnetwork.

    A mask keeps k of the n weights of a matrix: one of C(n, k) choices, so log2 C(n, k) bits, and log2(n + 1) for k
    itself. If it keeps entire neurons or heads, or weights in a few of them only, it is shorter to name those units
    first: for the matrices of an attention layer or MLP that share their units, log2 C(units, those with kept weights)
    and log2(units + 1), and then the weights kept within these, as before. (With grouped queries, key-value heads are
    units of their own.) Each of these groups of matrices takes the shorter description, and a bit to tell which.

    The table's message is that of `NGramTable.message_bits`. It is only the shortest found, so it bounds what is needed
    from above. What it gets for nothing, the unigram distribution, makes it shorter: a "no" is on the safe side.

    Args:
        subnetwork: A `Subnetwork` or `Circuit`, or something that holds one. The masks of a circuit's nodes, one for
            every hook point, are described like a matrix by its k alone.
        table: An `NGramTable` of order 1, 2 or 3.
        kl: The subnetwork's KL from the table, nats per position, as `evaluate` measures it on held-out text; at least
            0. The table's own is a mean over the contexts of the counted text.

    Raises:
        ValueError: If `table` is no n-gram table, or has more than 2**23 n-grams, or `kl` is negative or NaN.

    Example:
        >>> capacity = bc.could_mask_hold_it(found, target, kl=0.5)
        >>> print(capacity.says)
    """
    found = capacity(as_mask(subnetwork), table, kl) if isinstance(table, Target) else None
    if found is None:
        raise ValueError(
            f"a table's bits can be counted for an NGramTable of at most {MOST_ENTRIES:,} n-grams, not for {table!r}"
        )
    return found


def capacity(subnetwork: Mask, target: Target, kl: float) -> MaskCapacity | None:
    """Return what `could_mask_hold_it` does; None for targets whose bits cannot be counted."""
    table_bits = target.message_bits(kl)
    return None if table_bits is None else MaskCapacity(mask_bits(subnetwork), table_bits, float(kl))


def mask_bits(subnetwork: Mask) -> float:
    """Return the bits of the shortest description found of a mask; see `could_mask_hold_it`."""
    groups: dict[tuple[int, str, int], list[str]] = {}
    nodes = 0.0
    for name, shape in subnetwork.shapes.items():
        if not WeightName.is_one(name):
            nodes += _choice_bits(math.prod(shape), int(subnetwork[name].sum()))
            continue
        weight = WeightName.parse(name)
        units = shape[0] if _units_first(weight) else shape[1]
        groups.setdefault((weight.layer, weight.component, units), []).append(name)
    return nodes + sum(1 + _group_bits(subnetwork, names) for names in groups.values())


def _group_bits(subnetwork: Mask, names: list[str]) -> float:
    """Return the bits of the masks of matrices that share their units."""
    masks = [_by_unit(WeightName.parse(name), subnetwork[name]) for name in names]
    kept = [int(mask.sum()) for mask in masks]
    alone = sum(_choice_bits(mask.numel(), k) for mask, k in zip(masks, kept, strict=True))
    used = torch.stack([mask.any(1) for mask in masks]).any(0)
    n_used = int(used.sum())
    within = sum(_choice_bits(n_used * mask.shape[1], k) for mask, k in zip(masks, kept, strict=True))
    return min(alone, _choice_bits(len(used), n_used) + within)


def _choice_bits(n: int, k: int) -> float:
    """Return log2 C(n, k), exact up to rounding, plus log2(n + 1) for k."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return max(ways, 0.0) / math.log(2) + math.log2(n + 1)


def _units_first(weight: WeightName) -> bool:
    """Whether the first axis of a matrix is that of its heads or neurons; it is the last of W_in and W_gate."""
    return weight.matrix in (*ATTENTION_MATRICES, "W_out")


def _by_unit(weight: WeightName, mask: Bool[Tensor, "..."]) -> Bool[Tensor, "unit weight"]:
    return mask.flatten(1) if _units_first(weight) else mask.T
