"""Read a pickled dict of boolean NumPy arrays by interpreting its opcodes here; nothing is ever unpickled.

A pickle is a program for a small stack machine. This machine knows only the opcodes, and the five names of NumPy and of
the standard library, with which a dict of boolean arrays is written (protocols 2 to 5, NumPy before and after 2.0). It
reads every byte once, in order, does at once what it has read, and refuses everything else. What it can be made to do
is bounded:

- the number of opcodes, and with it the stack, the memo, and the number of objects;
- the bytes of strings read, of bytes made from strings, and of array elements, each by the size of the file;
- nesting: a tuple may hold tuples, but those hold only atoms, and the only keys of a dict are short strings, so that
  hashing, comparing and formatting are cheap.
"""

from __future__ import annotations

import math
import mmap
import os
from collections import Counter
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.storage.records import shown

_MOST_OPERATIONS = 200_000  # masks of 48 blocks need about 10,000
_LONGEST_NAME = 1024  # characters of a key, of a module's or a function's name
_MOST_AXES = 32
_SPARE = 1 << 20  # bytes of names and the like


def read_boolean_arrays(path: str | os.PathLike[str], *, most: int) -> dict[str, Any]:
    """Read a pickled dict from names to boolean arrays.

    Args:
        path: The file.
        most: Maximum number of array elements.

    Returns:
        The dict; its values should be arrays, but may be strings, numbers, tuples or dicts too.

    Raises:
        ValueError: If the file is not such a pickle, is damaged, or exceeds a bound; the message is one line.
    """
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _Machine(data, most).run()
    if type(found) is not dict:
        raise ValueError("it is not a dict with names as keys")
    return {name: value.array if isinstance(value, _Array) else value for name, value in found.items()}


class _Known(Enum):
    """What a pickle may refer to by name, and the boolean dtype that it makes with one of these."""

    NDARRAY = auto()
    DTYPE = auto()
    RECONSTRUCT = auto()
    FROM_BUFFER = auto()
    ENCODE = auto()
    BOOL = auto()


_NAMES = {
    ("numpy", "ndarray"): _Known.NDARRAY,
    ("numpy", "dtype"): _Known.DTYPE,
    ("numpy.core.multiarray", "_reconstruct"): _Known.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Known.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _Known.FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _Known.FROM_BUFFER,
    ("_codecs", "encode"): _Known.ENCODE,  # bytes, in protocol 2
}


class _Array:
    """A boolean array; None until its elements are known."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray | None = None) -> None:
        self.array = array


class _Machine:
    """Interprets one pickle. Methods without an underscore are opcodes, called with an argument from `_OPERATIONS`."""

    def __init__(self, data: mmap.mmap, most: int) -> None:
        self._data, self._size, self._at, self._frame_end = data, len(data), 0, 0
        self._limit = min(self._size, most + _SPARE)
        self._spent: Counter[str] = Counter()
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Interpret the pickle, and return its object."""
        if self._read(1) != b"\x80" or not 2 <= self._number(1) <= 5:
            raise ValueError("it is not a pickle of protocol 2 to 5")
        for _ in range(_MOST_OPERATIONS):
            code = self._data[self._at : self._at + 1]
            self._at += 1
            if code == b".":
                return self._end()
            if not code:
                raise ValueError("the pickle is damaged: it has no end")
            if code not in _OPERATIONS:
                raise ValueError(
                    f"the pickle has the opcode 0x{code.hex()} at byte {self._at - 1:,}, which masks do not need"
                )
            operation, argument = _OPERATIONS[code]
            operation(self, argument)
        raise ValueError(f"the pickle has more than {_MOST_OPERATIONS:,} opcodes, far more than masks need")

    def _end(self) -> Any:
        if self._at != self._size:
            raise ValueError(f"the pickle ends at byte {self._at:,}, but the file has {self._size:,}")
        if len(self._stack) != 1 or self._marks:
            raise ValueError(f"the pickle leaves {len(self._stack)} objects, not one")
        return self._stack[0]

    # --- reading ---

    def _read(self, size: int) -> bytes:
        """Read the next bytes; nothing is allocated that the file does not hold."""
        end = self._at + size
        if end > self._size or self._at < self._frame_end < end:
            raise ValueError(f"the pickle is damaged: at byte {self._at:,}, it is cut short or leaves its frame")
        self._at = end
        return self._data[end - size : end]

    def _number(self, width: int) -> int:
        return int.from_bytes(self._read(width), "little")

    def _sized(self, width: int) -> bytes:
        """Read bytes that follow their own number, which takes `width` bytes."""
        size = self._number(width)
        if size > _LONGEST_NAME:
            self._spend("reads", size)
        return self._read(size)

    def _line(self) -> str:
        """Read a name up to the end of its line."""
        end = self._data.find(b"\n", self._at, self._at + _LONGEST_NAME)
        if end < 0:
            raise ValueError("the pickle is damaged: a name has no end")
        return self._read(end + 1 - self._at)[:-1].decode()

    def _spend(self, what: str, size: int) -> None:
        self._spent[what] += size
        if self._spent[what] > self._limit:
            raise ValueError(f"it {what} more bytes than the file has, or more elements than there can be")

    # --- the stack and the memo ---

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("the pickle is damaged: it takes an object that is not there")
        return self._stack.pop()

    def mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("the pickle is damaged: it goes back to a mark that is not there")
        start = self._marks.pop()
        values, self._stack[start:] = self._stack[start:], []
        return values

    def put(self, width: int | None) -> None:
        value = self._pop()
        index = len(self._memo) if width is None else self._number(width)
        if index > _MOST_OPERATIONS:
            raise ValueError(f"the pickle stores an object under the number {index:,}, far more than masks need")
        self._memo[index] = value
        self.push(value)

    def get(self, width: int) -> None:
        index = self._number(width)
        if index not in self._memo:
            raise ValueError(f"the pickle is damaged: it refers to object {index}, which is not there")
        self.push(self._memo[index])

    # --- atoms ---

    def whole(self, width: int) -> None:
        self.push(int.from_bytes(self._read(width), "little", signed=width == 4))

    def long(self, _: None) -> None:
        size = self._number(1)
        if size > 8:
            raise ValueError(f"it holds a number of {size} bytes")
        self.push(int.from_bytes(self._read(size), "little", signed=True))

    def text(self, width: int) -> None:
        self.push(self._sized(width).decode("utf-8"))

    def bytes_(self, width: int) -> None:
        self.push(self._sized(width))

    def byte_array(self, width: int) -> None:
        self.push(bytearray(self._sized(width)))

    def frame(self, width: int) -> None:
        if self._at <= self._frame_end:
            raise ValueError("the pickle is damaged: it has a frame inside a frame")
        size = self._number(width)
        self._frame_end = self._at + size
        if self._frame_end > self._size:
            raise ValueError(f"the pickle declares a frame of {size} bytes, but the file has {self._size}")

    # --- collections ---

    def tuple_(self, count: int | None) -> None:
        values = self._since_mark() if count is None else [self._pop() for _ in range(count)][::-1]
        for value in values:
            if type(value) is dict or (type(value) is tuple and any(type(part) in (tuple, dict) for part in value)):
                raise ValueError("it nests tuples or dicts more deeply than masks need")
        self.push(tuple(values))

    def dict_(self, _: None) -> None:
        self.push({})

    def set_items(self, count: int | None) -> None:
        values = self._since_mark() if count is None else [self._pop() for _ in range(count)][::-1]
        found = self._pop()
        if type(found) is not dict or len(values) % 2:
            raise ValueError("the pickle is damaged: it puts something into what is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str or len(key) > _LONGEST_NAME:
                raise ValueError(f"it is not a dict with names as keys: a key is a {type(key).__name__} or too long")
            if key in found:
                raise ValueError(f"it names {shown(key)} twice")
            found[key] = value
        self.push(found)

    # --- names and what is made with them ---

    def global_(self, _: None) -> None:
        self._refer(self._line(), self._line())

    def stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str or max(len(name), len(module)) > _LONGEST_NAME:
            raise ValueError("the pickle is damaged: it refers to something without a name")
        self._refer(module, name)

    def _refer(self, module: str, name: str) -> None:
        if (module, name) not in _NAMES:
            raise ValueError(f"it refers to {shown(f'{module}.{name}')}, which is not allowed")
        self.push(_NAMES[module, name])

    def reduce(self, _: None) -> None:
        arguments, function = self._pop(), self._pop()
        match function, arguments:
            case _Known.DTYPE, ("b1" | "?" | "bool", *rest) if len(rest) <= 2:
                made = _Known.BOOL
            case _Known.DTYPE, (str(code), *_):
                raise ValueError(f"it holds an array of type {shown(code)}, not boolean")
            case _Known.RECONSTRUCT, (_Known.NDARRAY, (0,), b"b"):
                made = _Array()
            case _Known.FROM_BUFFER, (data, dtype, shape, "C" | "F" as order):
                made = _Array(self._boolean(data, dtype, shape, order))
            case _Known.FROM_BUFFER, (data, dtype, shape, "K", tuple(axes)):
                made = _Array(_transposed(self._boolean(data, dtype, shape, "C"), axes))
            case _Known.ENCODE, (str(text), "latin1"):
                self._spend("makes", len(text))
                made = _latin1(text)
            case _:
                raise ValueError("it calls something in a way that boolean arrays do not need")
        self.push(made)

    def build(self, _: None) -> None:
        state, made = self._pop(), self._pop()
        match made, state:
            case _Known.BOOL, (3, "|", None, None, None, -1, -1, 0):
                pass  # which adds nothing to the dtype's name
            case _Array(array=None), (1, shape, dtype, bool(is_fortran), data):
                made.array = self._boolean(data, dtype, shape, "F" if is_fortran else "C")
            case _:
                raise ValueError("it changes something in a way that boolean arrays do not need")
        self.push(made)

    def _boolean(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        """Make an array from its bytes, one for each element."""
        if dtype is not _Known.BOOL or type(data) not in (bytes, bytearray):
            raise ValueError("it holds an array that is not boolean")
        if type(shape) is not tuple or len(shape) > _MOST_AXES or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError("it holds an array with an invalid shape")
        if math.prod(shape) != len(data):
            raise ValueError(f"it holds an array of shape {shown(shape)} with {len(data)} elements")
        self._spend("makes arrays of", len(data))
        elements = np.frombuffer(data, dtype=np.uint8)
        if elements.size and elements.max() > 1:
            raise ValueError("it holds a boolean array with values other than 0 and 1")
        return elements.view(np.bool_).reshape(shape, order=order)


def _transposed(array: np.ndarray, axes: tuple[Any, ...]) -> np.ndarray:
    if any(type(axis) is not int for axis in axes) or sorted(axes) != list(range(array.ndim)):
        raise ValueError("it holds an array with an invalid order of axes")
    return array.transpose(axes)


def _latin1(text: str) -> bytes:
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise ValueError("it holds bytes in an unexpected form") from error


_OPERATIONS: dict[bytes, tuple[Callable[[_Machine, Any], None], Any]] = {
    b"N": (_Machine.push, None),
    b"\x88": (_Machine.push, True),
    b"\x89": (_Machine.push, False),
    b"K": (_Machine.whole, 1),
    b"M": (_Machine.whole, 2),
    b"J": (_Machine.whole, 4),
    b"\x8a": (_Machine.long, None),
    b"\x8c": (_Machine.text, 1),
    b"X": (_Machine.text, 4),
    b"\x8d": (_Machine.text, 8),
    b"C": (_Machine.bytes_, 1),
    b"B": (_Machine.bytes_, 4),
    b"\x8e": (_Machine.bytes_, 8),
    b"\x96": (_Machine.byte_array, 8),
    b"\x95": (_Machine.frame, 8),
    b"(": (_Machine.mark, None),
    b")": (_Machine.tuple_, 0),
    b"\x85": (_Machine.tuple_, 1),
    b"\x86": (_Machine.tuple_, 2),
    b"\x87": (_Machine.tuple_, 3),
    b"t": (_Machine.tuple_, None),
    b"}": (_Machine.dict_, None),
    b"s": (_Machine.set_items, 2),
    b"u": (_Machine.set_items, None),
    b"q": (_Machine.put, 1),
    b"r": (_Machine.put, 4),
    b"\x94": (_Machine.put, None),
    b"h": (_Machine.get, 1),
    b"j": (_Machine.get, 4),
    b"c": (_Machine.global_, None),
    b"\x93": (_Machine.stack_global, None),
    b"R": (_Machine.reduce, None),
    b"b": (_Machine.build, None),
}
"""The opcodes that a dict of boolean arrays is written with."""
