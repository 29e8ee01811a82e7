"""Sequences that are told by their token ids, padded or not."""

from __future__ import annotations

import numpy as np
from jaxtyping import Integer
from torch import Tensor


class KnownSequences:
    """Finds sequences among known ones, which may be padded on the right, or cut where only padding follows."""

    def __init__(
        self, tokens: Integer[np.ndarray, "sequence position"], ends: Integer[np.ndarray, " sequence"]
    ) -> None:
        """Take token ids, and for each sequence its last position that counts."""
        self.tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        self._ends = (ends + 1).tolist()
        self._lengths = sorted(set(self._ends), reverse=True)
        self._row = {self.tokens[row, :end].tobytes(): row for row, end in enumerate(self._ends)}

    def find(
        self, tokens: Integer[Tensor, "batch pos"] | Integer[np.ndarray, "batch pos"]
    ) -> Integer[np.ndarray, " batch"]:
        """The index of each sequence, the last of equal ones; -1 where it is none of the known ones."""
        array = tokens.numpy(force=True) if isinstance(tokens, Tensor) else tokens
        return np.array([self._find(ids) for ids in array.astype(np.int32)], dtype=np.int64)

    def _find(self, ids: Integer[np.ndarray, " pos"]) -> int:
        for length in self._lengths:
            row = self._row.get(ids[:length].tobytes()) if length <= len(ids) else None
            if row is not None and np.array_equal(ids[length:], self.tokens[row, length : len(ids)]):
                return row
        return -1
