"""Named boolean masks of a model, as an immutable value: set algebra, counts, lineage, and a file with checks.

Masks are bit-packed (one bit per unit, in memory and on disk), so set algebra and counts are byte operations. Reading
a mask returns a new tensor, so changing it does not change the value.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from bigram_circuits.measures import html
from bigram_circuits.models.identity import check_is, same_model
from bigram_circuits.models.model import Model
from bigram_circuits.names import short_name
from bigram_circuits.storage.files import whole_file
from bigram_circuits.storage.records import (
    HEADER,
    check_header,
    header_checksum,
    is_shape,
    parse_json,
    read_tensors,
    shown,
    write_tensors,
)
from bigram_circuits.storage.terminal import printable

_METADATA = ("format", "shapes", "model_name", "weight_hash", "lineage", "kept", "total", "checksum")
_RANDOM_BLOCK = 1 << 20  # units drawn at once
_LAYERS_SHOWN = 16  # rows of a notebook's table


M = TypeVar("M", bound="BitMasks")


class Count(NamedTuple):
    """How many of a number of units are kept.

    Example:
        >>> count = found.subnetwork.by_component()[0, "mlp"]
        >>> print(count.kept, count.total, count.fraction)
    """

    kept: int
    total: int

    @property
    def fraction(self) -> float:
        """Kept / total."""
        return self.kept / self.total


class BitMasks(Mapping[str, Tensor]):
    """An immutable mapping from names to boolean masks, True where a unit is kept.

    `a & b`, `a | b`, `a - b` and `~a` are set operations on masks of the same shapes; `==` compares the masks. A
    subclass says what the names and units are.
    """

    noun: ClassVar[str]
    """What it is called in messages, also the attribute of an object that holds one: `subnetwork`."""
    units: ClassVar[str]
    """What its units are called: `weights`."""
    file_format: ClassVar[str]
    """The format of its file, with a version."""
    more_metadata: ClassVar[tuple[str, ...]] = ()
    """Keys of its file's metadata besides those of all masks."""
    _not_offered: ClassVar[frozenset[str]] = frozenset(
        {
            "by_place",
            "constant",
            "file_format",
            "more_metadata",
            "noun",
            "packed",
            "place_of",
            "units_here",
            "with_parts_of",
        }
    )
    """What completion leaves out: names for this package's other modules, and former names."""

    def __init__(
        self,
        masks: Mapping[str, Bool[Tensor, "..."]],
        *,
        model_name: str | None = None,
        weight_hash: str | None = None,
        lineage: str = "masks",
    ) -> None:
        """Pack masks given by name.

        Raises:
            ValueError: If there are none, one is not boolean, or a name or shape cannot be that of a mask.

        `lineage` describes where they came from; operations extend it (`bigram | L5H1`).
        """
        if not masks:
            raise ValueError(f"a {self.noun} needs at least one mask")
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"the mask of {name} has dtype {mask.dtype} but should be torch.bool")
        shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
        self._check_shapes(shapes)
        packed = {name: np.packbits(mask.numpy(force=True)) for name, mask in masks.items()}
        self._set(shapes, packed, model_name, weight_hash, lineage)

    @classmethod
    @abstractmethod
    def _check_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless all names and shapes can be those of one model."""

    @abstractmethod
    def check_fits(self, model: Model) -> None:
        """Raise ValueError unless all names and shapes match the model's."""

    def _check_same_shapes(self, theirs: Mapping[str, Any], whose: str) -> None:
        for name in (*self._shapes, *theirs):
            mine, other = self._shapes.get(name), theirs.get(name)
            if mine != other:
                raise ValueError(f"{name} has shape {mine} in this {self.noun}, but {other} in {whose}")

    def _set(
        self, shapes: Any, packed: dict[str, np.ndarray], model_name: str | None, weight_hash: str | None, lineage: str
    ) -> None:
        for bits in packed.values():
            bits.setflags(write=False)
        self._shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(dict(shapes))
        self._packed: Mapping[str, np.ndarray] = MappingProxyType(packed)
        self._counts = {name: int(np.bitwise_count(bits).sum()) for name, bits in packed.items()}
        self._model_name = model_name
        self._weight_hash = weight_hash
        self._lineage = lineage

    @classmethod
    def _from_packed(
        cls: type[M],
        shapes: Any,
        packed: dict[str, np.ndarray],
        model_name: str | None,
        weight_hash: str | None,
        lineage: str,
    ) -> M:
        masks = cls.__new__(cls)
        masks._set(shapes, packed, model_name, weight_hash, lineage)
        return masks

    def _derived(self: M, packed: dict[str, np.ndarray], lineage: str) -> M:
        """Build masks of the same model with other bits."""
        return self._inherit(self._from_packed(self._shapes, packed, self.model_name, self.weight_hash, lineage))

    def _inherit(self: M, made: M) -> M:
        """Give masks derived from these what they have besides masks: nothing, unless a subclass says so."""
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Support pickle: a copy in another process is as immutable as this one."""
        rest = (self._model_name, self._weight_hash, self._lineage)
        return type(self)._from_packed, (dict(self._shapes), dict(self._packed), *rest)

    def __copy__(self: M) -> M:
        return self

    def __deepcopy__(self: M, memo: Any) -> M:
        return self

    def random_like(self: M, seed: int = 0) -> M:
        """Draw matched random masks: uniform, with exactly as many kept under every name as here."""
        packed = {}
        for index, (name, shape) in enumerate(self._shapes.items()):
            rng = np.random.default_rng((seed, index))
            size = int(np.prod(shape))
            packed[name] = np.packbits(_random_mask(rng, size, self._counts[name]))
        return self._derived(packed, f"random {seed} like {operand(self.lineage)}")

    # --- a mapping ---

    def __getitem__(self, name: str) -> Bool[Tensor, "..."]:
        shape = self._shapes[name]
        bits = np.unpackbits(self._packed[name], count=int(np.prod(shape)))
        return torch.from_numpy(bits.view(bool)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def packed(self, name: str) -> Integer[np.ndarray, " byte"]:
        """One mask as bits, eight to a byte; not to be written to."""
        return self._packed[name]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every mask."""
        return self._shapes

    @property
    def model_name(self) -> str | None:
        """Name of the model that it was made for, if known."""
        return self._model_name

    @property
    def weight_hash(self) -> str | None:
        """`weight_hash` of the model that it was made for, if known."""
        return self._weight_hash

    @property
    def lineage(self) -> str:
        """Description of where it came from: `bigram | L5H1`. Saved in the file; ignored by `==`."""
        return self._lineage

    def named(self: M, lineage: str) -> M:
        """Return the same masks with a name of your choice as its lineage."""
        return self._derived(dict(self._packed), lineage)

    # --- set algebra ---

    def __and__(self: M, other: Any) -> M:
        return self._combine(other, "&", np.bitwise_and)

    def __or__(self: M, other: Any) -> M:
        return self._combine(other, "|", np.bitwise_or)

    def __sub__(self: M, other: Any) -> M:
        return self._combine(other, "-", lambda ours, theirs: ours & ~theirs)

    def __invert__(self: M) -> M:
        packed = {}
        for name, bits in self._packed.items():
            flipped = ~bits
            unused = -int(np.prod(self._shapes[name])) % 8  # padding bits in the last byte
            if unused:
                flipped[-1] &= (0xFF << unused) & 0xFF
            packed[name] = flipped
        return self._derived(packed, f"~{operand(self.lineage)}")

    def _combine(self, other: Any, sign: str, operation: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Any:
        if not isinstance(other := getattr(other, self.noun, other), type(self)):
            return NotImplemented
        self._check_same_shapes(other._shapes, f"the other {self.noun}")
        packed = {name: operation(bits, other._packed[name]) for name, bits in self._packed.items()}
        lineage = f"{operand(self.lineage, sign)} {sign} {operand(other.lineage)}"
        hash_of_both = self.weight_hash if same_model(self.weight_hash, other.weight_hash) else None
        return self._inherit(self._from_packed(self._shapes, packed, self.model_name, hash_of_both, lineage))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BitMasks):
            return NotImplemented
        return dict(self._shapes) == dict(other._shapes) and all(
            np.array_equal(bits, other._packed[name]) for name, bits in self._packed.items()
        )

    def __hash__(self) -> int:
        return hash(tuple((name, self._packed[name].tobytes()) for name in sorted(self._packed)))

    @property
    def checksum(self) -> str:
        """Hash of all masks: equal exactly when the masks are."""
        return _checksum(self._packed)

    def with_parts_of(self: M, other: BitMasks, names: Collection[str]) -> M:
        """Return these masks, but under some names those of other masks of the same shapes."""
        self._check_same_shapes(other._shapes, f"the other {self.noun}")
        packed = {name: (other if name in names else self)._packed[name] for name in self}
        return self._derived(packed, f"{operand(self.lineage)} with parts of {operand(other.lineage)}")

    def constant(self: M, value: bool) -> M:
        """Return masks of the same shapes that keep everything, or nothing."""
        whole = {name: np.packbits(np.full(int(np.prod(shape)), value)) for name, shape in self._shapes.items()}
        return self._derived(whole, "full" if value else "empty")

    # --- counts ---

    @property
    def kept(self) -> int:
        """Number of units kept."""
        return sum(self._counts.values())

    @property
    def total(self) -> int:
        """Number of all units."""
        return sum(int(np.prod(shape)) for shape in self._shapes.values())

    @property
    def fraction(self) -> float:
        """Kept / total, 0 to 1."""
        return self.kept / self.total

    @property
    def units_here(self) -> str:
        """What the units of these masks are called, where a subclass tells more than one kind."""
        return self.units

    def by_name(self) -> dict[str, Count]:
        """Count kept units by name: of weight matrices or hook points."""
        return {name: Count(self._counts[name], int(np.prod(shape))) for name, shape in self._shapes.items()}

    @abstractmethod
    def place_of(self, name: str) -> tuple[int, str]:
        """Return the layer of a mask, and what its units are of: a component, or a kind of node or reader."""

    def by_place(self) -> dict[tuple[int, str], Count]:
        """Count kept units by layer and what they are of."""
        counts: dict[tuple[int, str], Count] = {}
        for name, count in self.by_name().items():
            before = counts.get(place := self.place_of(name), Count(0, 0))
            counts[place] = Count(before.kept + count.kept, before.total + count.total)
        return counts

    def table(self) -> str:
        """Format where the kept units are, by layer and what they are of: share of all kept, and share kept there."""
        counts, kept = self.by_place(), max(self.kept, 1)
        columns = sorted({column for _, column in counts})
        lines = [f"where the kept {self.units_here} are (share of them; in brackets, share kept there)"]
        lines.append(f"{'layer':<8}" + "".join(f"{column:>20}" for column in columns))
        for layer in sorted({layer for layer, _ in counts}):
            here = [counts.get((layer, column)) for column in columns]
            cells = [f"{100 * one.kept / kept:.1f}% ({100 * one.fraction:.2f}%)" if one else "" for one in here]
            lines.append(f"{layer:<8}" + "".join(f"{cell:>20}" for cell in cells))
        totals = [sum(n.kept for (_, c), n in counts.items() if c == column) for column in columns]
        lines.append(f"{'all':<8}" + "".join(f"{f'{100 * total / kept:.1f}%':>20}" for total in totals))
        return "\n".join(lines)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in self._not_offered]

    def __repr__(self) -> str:
        of = f" of {short_name(self.model_name)}" if self.model_name else ""
        words = f"{self.lineage}: {self.kept:,} of {self.total:,} {self.units_here}, {100 * self.fraction:.3g}%{of}"
        return f"{type(self).__name__}({printable(words)})"

    def _repr_html_(self) -> str:
        """Build the notebook view: how many units are kept, and where."""
        counts = self.by_place()
        columns = sorted({column for _, column in counts})
        rows = [
            [str(layer), *(_words(counts.get((layer, column))) for column in columns)]
            for layer in sorted({layer for layer, _ in counts})
        ]
        of = f" of {short_name(self.model_name)}" if self.model_name else ""
        says = f"{self.kept:,} of {self.total:,} {self.units_here} kept ({100 * self.fraction:.3g}%){of}"
        title = f"{self.units_here.capitalize()} kept by layer"
        table = html.table(["layer", *columns], html.shortened(rows, _LAYERS_SHOWN), title)
        return html.summary(f"{type(self).__name__}: {self.lineage}", [says], table)

    # --- files ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: a bit-packed uint8 tensor per mask, and everything else as metadata.

        Its bytes are a function of the masks, their name and the model's: saved again, the file is the same.
        """
        metadata = {
            "format": self.file_format,
            "shapes": json.dumps(dict(self._shapes)),
            "model_name": self.model_name or "",
            "weight_hash": self.weight_hash or "",
            "lineage": self.lineage,
            "kept": str(self.kept),
            "total": str(self.total),
            "checksum": self.checksum,
        }
        arrays, more = self._besides()
        arrays, metadata = {**self._packed, **arrays}, {**metadata, **more}
        with whole_file(path) as temporary:
            write_tensors(temporary, arrays, metadata | {HEADER: header_checksum(arrays, metadata)})

    def _besides(self) -> tuple[Mapping[str, np.ndarray], Mapping[str, str]]:
        """What a file holds besides masks, arrays and metadata: nothing, unless a subclass says so."""
        return {}, {}

    @classmethod
    def load(cls: type[M], path: str | os.PathLike[str], model: Model | None = None, *, follow_links: bool = True) -> M:
        """Load and check a file written by `save`.

        Args:
            path: The file.
            model: The model it must have been made for; None: any.
            follow_links: Whether the file may be a symbolic link.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file is of another kind or has another format version; if its names, shapes, counts or
                checksums are inconsistent; or, with `model`, if it was made for other shapes or other weights.
        """
        if os.path.isdir(path):
            raise ValueError(f"{str(path)!r} is a folder: give the {cls.noun}.safetensors in it")
        packed, metadata = read_tensors(path, f"is not a {cls.noun} file", follow=follow_links)
        if metadata.get("format") != cls.file_format:
            raise ValueError(
                f"{str(path)!r} has format {shown(metadata.get('format'))}, but {cls.file_format!r} is needed"
            )
        try:
            loaded = cls._from_file(packed, metadata)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
        if model is not None:
            loaded.check_fits(model)
            check_is(model, loaded.weight_hash, f"{str(path)!r} was made for {loaded.model_name!r}")
        return loaded

    @classmethod
    def _from_file(cls: type[M], arrays: dict[str, np.ndarray], metadata: Mapping[str, str]) -> M:
        check_header(arrays, metadata, {*_METADATA, *cls.more_metadata})
        missing = [name for name in (*_METADATA, *cls.more_metadata) if name not in metadata]
        if missing:
            raise ValueError(f"its header lacks its {missing[0]}")
        shapes = cls._shapes_of(metadata["shapes"])
        wanted = {name: (-(-math.prod(shape) // 8),) for name, shape in shapes.items()}
        packed = {name: arrays[name] for name in shapes if name in arrays}
        if any(bits.dtype != np.uint8 for bits in packed.values()) or (
            {name: bits.shape for name, bits in packed.items()} != wanted
        ):
            raise ValueError("its tensors do not match the names and shapes in its header")
        cls._check_shapes(shapes)
        for name, shape in shapes.items():
            unused = -math.prod(shape) % 8
            if packed[name][-1] & ((1 << unused) - 1):
                raise ValueError(f"the mask of {name} has bits after the last of its {cls.units}")
        if metadata["checksum"] != _checksum(packed):
            raise ValueError("its masks do not match their checksum")
        made_for = metadata["model_name"] or None, metadata["weight_hash"] or None
        loaded = cls._from_packed(shapes, packed, *made_for, metadata["lineage"])
        if (str(loaded.kept), str(loaded.total)) != (metadata["kept"], metadata["total"]):
            raise ValueError(
                f"it should keep {shown(metadata['kept'])} of {shown(metadata['total'])} {cls.units}, "
                f"but keeps {loaded.kept} of {loaded.total}"
            )
        loaded._read_besides({name: array for name, array in arrays.items() if name not in shapes}, metadata)
        return loaded

    def _read_besides(self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
        """Take what a file holds besides masks; raises ValueError if that is something else."""
        if arrays:
            raise ValueError("its tensors do not match the names and shapes in its header")

    @classmethod
    def _shapes_of(cls, text: str) -> dict[str, tuple[int, ...]]:
        """Parse the shapes in a file's header."""
        shapes = parse_json(text)
        if not isinstance(shapes, dict) or not shapes or not all(is_shape(shape) for shape in shapes.values()):
            raise ValueError("the shapes in its header are not shapes by name")
        return {name: tuple(shape) for name, shape in shapes.items()}


def _words(count: Count | None) -> str:
    """Format a count as a table cell."""
    return f"{count.kept:,} ({100 * count.fraction:.2f}%)" if count else ""


def _random_mask(rng: np.random.Generator, size: int, kept: int) -> np.ndarray:
    """Choose exactly `kept` of `size` uniformly, block by block, so that temporary memory does not grow with the size.

    The number chosen within a block is hypergeometric; the choice within it is uniform.
    """
    mask = np.zeros(size, dtype=bool)
    left = kept
    for start in range(0, size, _RANDOM_BLOCK):
        block = min(_RANDOM_BLOCK, size - start)
        rest = size - start - block
        here = int(rng.hypergeometric(left, size - start - left, block)) if rest else left
        mask[start + rng.choice(block, here, replace=False, shuffle=False)] = True
        left -= here
    return mask


def operand(lineage: str, sign: str = "") -> str:
    """Format a lineage as an operand: in brackets if it has operators other than `sign` (the operator to its right)."""
    outside = lineage
    while outside != (outside := re.sub(r"[(\[][^()\[\]]*[)\]]", "", outside)):
        pass  # remove bracketed parts, which need no further brackets
    signs = {part for part in outside.split() if part in ("&", "|", "-")}
    return lineage if signs <= {sign} else f"({lineage})"


def _checksum(packed: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(packed):
        digest.update(name.encode() + packed[name].tobytes())
    return digest.hexdigest()
