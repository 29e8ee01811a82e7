"""Import published masks: those of Chang and Bergen (2025, arXiv 2504.15471), and others in the same format.

The released files are pickles of a dict from Hugging Face parameter name to boolean numpy array, with one more key,
`orig_model_name`. Loading a pickle can run arbitrary code, so these files are never passed to numpy or the plain pickle
module. `read_masks` first scans the file's opcodes and rejects any that such a dict does not need. Then the file is
loaded with stand-ins of our own for the few names that a boolean array refers to (in numpy before and after 2.0, pickle
protocols 2 to 5). The stand-ins check their arguments, and the pickle can call no function outside this module.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bigram_circuits.models.loading import hub_errors, is_local, load_model
from bigram_circuits.models.model import Model
from bigram_circuits.storage.records import check_content, check_header, read_tensors, regular_size, shown
from bigram_circuits.subnetwork import Subnetwork

MODEL_KEY = "orig_model_name"
_ACCOUNT = "tylerachang"
_FILE = re.compile(r"subnetwork_dict_(?:lambda)?([0-9.e+-]+)\.pickle")
_MOST_UNPACKED = 1 << 32  # bytes that a compressed file may unpack to, if the model is not known
_LONGEST_NAME = 1024  # characters of a model name
_MOST_OPERATIONS = 200_000  # pickle opcodes; masks of 48 blocks need about 10,000
_OPERATIONS = {  # pickle opcodes that a dict of arrays may use
    "PROTO",
    "FRAME",
    "STOP",
    "MARK",
    "MEMOIZE",
    "BINPUT",
    "LONG_BINPUT",
    "BINGET",
    "LONG_BINGET",
    "GLOBAL",
    "STACK_GLOBAL",
    "REDUCE",
    "BUILD",
    "EMPTY_DICT",
    "SETITEM",
    "SETITEMS",
    "EMPTY_TUPLE",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINBYTES",
    "BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}


def import_published(path: str | os.PathLike[str], model: Model) -> Subnetwork:
    """Import a subnetwork of `model` from a file of boolean masks by Hugging Face parameter name.

    Args:
        path: A released `.pickle` (also `.pkl`), or an `.npz` or `.safetensors` file with the same names.
        model: The model that the masks were made for, from `load_model`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged, holds anything but boolean masks, or was made for another model.
    """
    masks, made_for = read_masks(path, most=sum(parameter.numel() for parameter in model.parameters()))
    ours = str(model.cfg.model_name)
    if made_for is not None and _are_comparable(made_for, ours) and _short(made_for) != _short(ours):
        raise ValueError(f"{str(path)!r} was made for the model {made_for!r}, but this model is {ours!r}")
    try:
        return Subnetwork.from_huggingface(masks, model)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def load_published(
    model_name: str,
    sparsity: int | float | str | None = None,
    *,
    model: Model | None = None,
    revision: str | None = None,
) -> Subnetwork:
    """Download a model's released bigram subnetwork from the hub repository `tylerachang/bigram-subnetworks-<model>`.

    Args:
        model_name: A hub id, for example `"EleutherAI/pythia-70m"` or `"gpt2"`.
        sparsity: The lambda that it was found with, for example `10` or `"1e1"`; by default the largest one released,
            which gives the sparsest subnetwork and is the authors' own default.
        model: The model, if already loaded; otherwise it is loaded with `load_model`.
        revision: Revision of the mask repository.

    Raises:
        OSError: If the hub cannot be reached or has no masks of that model.
        ValueError: If there is no mask with this lambda, or the mask does not fit the model.
    """
    import huggingface_hub

    repository = f"{_ACCOUNT}/bigram-subnetworks-{_short(model_name)}"
    wanted = None if sparsity is None else _number(sparsity)
    with hub_errors("repository", repository, revision):
        names = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
        released = {float(found[1]): name for name in names if (found := _FILE.fullmatch(name))}
        if not released:
            raise ValueError(f"the repository {repository!r} holds no masks (subnetwork_dict_<lambda>.pickle)")
        chosen = max(released) if wanted is None else wanted
        if chosen not in released:
            there = ", ".join(f"{value:g}" for value in sorted(released))
            raise ValueError(f"{repository!r} has no mask of lambda {chosen:g}: it has {there}")
        path = huggingface_hub.hf_hub_download(repository, released[chosen], revision=revision)
    return import_published(path, load_model(model_name) if model is None else model)


def read_masks(path: str | os.PathLike[str], *, most: int = _MOST_UNPACKED) -> tuple[dict[str, np.ndarray], str | None]:
    """Read boolean masks by name, and the name of their model if the file gives one, without running code in the file.

    Args:
        path: The file.
        most: Maximum number of elements in a compressed file; anything larger is not unpacked.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it has another format, is damaged, or holds anything but boolean masks and that name.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], dict[str, Any]]] = {
        ".pickle": _read_pickle,
        ".pkl": _read_pickle,
        ".npz": lambda path: _read_npz(path, most),
        ".safetensors": _read_safetensors,
    }
    if path.suffix not in readers:
        raise ValueError(f"{str(path)!r} should be a .pickle, .npz or .safetensors file of masks")
    regular_size(path)
    try:
        masks = readers[path.suffix](path)
        made_for = masks.pop(MODEL_KEY, None)
        if isinstance(made_for, np.ndarray) and made_for.dtype.kind == "U" and made_for.ndim == 0:
            made_for = str(made_for)  # as .npz holds it
        if made_for is not None and not isinstance(made_for, str):
            raise ValueError(f"its {MODEL_KEY} is a {type(made_for).__name__}, not a name")
        for name, mask in masks.items():
            if isinstance(mask, np.ndarray) and mask.dtype == np.bool_ and _has_other_values(mask):
                raise ValueError(f"{shown(name)} holds values other than 0 and 1")
            if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
                kind = f"array of {mask.dtype}" if isinstance(mask, np.ndarray) else type(mask).__name__
                raise ValueError(f"{shown(name)} is a {kind}, not a boolean array")
    except (ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{str(path)!r} is not a file of masks: {reason}") from error
    return masks, made_for


def _has_other_values(mask: np.ndarray) -> bool:
    return bool(mask.size) and int(mask.view(np.uint8).max()) > 1


def _read_npz(path: Path, most: int) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            if len({member.filename for member in members}) < len(members):
                raise ValueError("it holds two arrays of one name")
            unpacked = sum(member.file_size for member in members)
            if unpacked > most + 4 * _LONGEST_NAME * (len(members) + 1):
                raise ValueError(f"it unpacks to {unpacked:,} bytes, but there can be {most:,} elements at most")
            return {member.filename.removesuffix(".npy"): _member(file, member) for member in members}
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # a damaged zip file can raise almost anything
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _member(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Read an array in a zip file, after checking its header against the member's size."""
    with file.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{shown(member.filename)} is an array in version {version} of its format")
        shape, is_fortran, dtype = read(stream)
        is_name = dtype.kind == "U" and shape == () and dtype.itemsize <= 4 * _LONGEST_NAME
        if dtype != np.bool_ and not is_name:
            raise ValueError(f"{shown(member.filename)} is an array of {dtype}, not a boolean array")
        size = math.prod(shape) * dtype.itemsize
        if any(type(n) is not int or n < 0 for n in shape) or size + stream.tell() != member.file_size:
            raise ValueError(f"{shown(member.filename)} of shape {shown(shape)} has {member.file_size} bytes in all")
        data = bytearray(stream.read())  # reading to the end makes zipfile verify the checksum
        if len(data) != size:
            raise ValueError(f"{shown(member.filename)} is cut short")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if is_fortran else "C")


def _read_safetensors(path: Path) -> dict[str, Any]:
    masks, metadata = read_tensors(path, "cannot be read")
    if any(key.endswith("_checksum") for key in metadata):  # otherwise written elsewhere, with other metadata
        check_header(masks, metadata, {MODEL_KEY})
        check_content(masks, metadata)
    made_for = metadata.get(MODEL_KEY)
    return masks | ({} if made_for is None else {MODEL_KEY: made_for})


# --- the restricted unpickler ---


def _read_pickle(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file:
        _check_operations(file, size)
        file.seek(0)
        try:
            found = _MaskUnpickler(file, size).load()
        except Exception as error:  # a damaged pickle can raise almost anything
            raise ValueError(f"{type(error).__name__}: {error}") from error
    if type(found) is not dict or any(type(name) is not str for name in found):
        raise ValueError("it is not a dict with names as keys")
    return {name: value.array if isinstance(value, _Array) else value for name, value in found.items()}


def _check_operations(file: BinaryIO | mmap.mmap, size: int) -> None:
    """Raise ValueError on opcodes that a dict of arrays does not need, and on arguments that would exhaust memory."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
        if operation.name not in _OPERATIONS:
            raise ValueError(f"the pickle uses the opcode {operation.name}, which masks do not need")
        if count >= _MOST_OPERATIONS:
            raise ValueError(f"the pickle has more than {_MOST_OPERATIONS:,} opcodes, far more than masks need")
        if operation.name == "LONG_BINPUT" and int(argument or 0) > _MOST_OPERATIONS:
            raise ValueError(f"the pickle stores a memo under the index {argument}, far more than masks need")
        if operation.name == "FRAME" and int(argument or 0) > size:
            raise ValueError(f"the pickle declares a frame of {argument} bytes, but the file has {size}")


class _MaskUnpickler(pickle.Unpickler):
    """Resolves the names that pickled boolean arrays refer to, to stand-ins that can only make boolean arrays.

    Their total output is limited to the size of the file, since a pickle can reuse one long string many times.
    """

    def __init__(self, file: Any, size: int) -> None:
        super().__init__(file)
        self._left = size
        self._encode = _StandIn(self._encoded)

    def _encoded(self, text: Any, encoding: Any) -> bytes:
        data = _encode(text, encoding)
        self._left -= len(data)
        if self._left < 0:
            raise pickle.UnpicklingError("it makes more bytes than the file has")
        return data

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed")
        return self._encode if name == "encode" else _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside the file, which is not allowed")


class _Array:
    """A boolean array while it is being unpickled."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array = np.zeros(0, dtype=bool)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _boolean(data, dtype, shape, "F" if is_fortran else "C")


class _DType:
    """Stand-in for the boolean dtype."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state, which adds nothing to the dtype's name."""


class _StandIn:
    """A function that a pickle may call but not modify."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it tries to change a function, which is not allowed")


def _boolean(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _DType) or type(data) not in (bytes, bytearray) or order not in ("C", "F"):
        raise pickle.UnpicklingError("it holds an array that is not boolean")
    if type(shape) is not tuple or any(type(size) is not int or size < 0 for size in shape):
        raise pickle.UnpicklingError("it holds an array with an invalid shape")
    if math.prod(shape) != len(data):
        raise pickle.UnpicklingError(f"it holds an array of shape {shape} with {len(data)} elements")
    elements = np.frombuffer(data, dtype=np.uint8)
    if elements.size and elements.max() > 1:
        raise pickle.UnpicklingError("it holds a boolean array with values other than 0 and 1")
    return elements.view(np.bool_).reshape(shape, order=order)


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> _Array:
    if kind is not _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError("it holds an array of an unexpected type")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    found = _Array()
    found.array = _boolean(data, dtype, shape, order)
    return found


def _dtype(code: Any, *_: Any) -> _DType:
    if code not in ("b1", "?", "bool"):
        raise pickle.UnpicklingError(f"it holds an array of type {str(code)[:20]!r}, not boolean")
    return _DType()


def _encode(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("it holds bytes in an unexpected form")
    return text.encode("latin1")


def _not_callable(*_: Any) -> Any:
    raise pickle.UnpicklingError("it makes an array in an unexpected way")


_NDARRAY = _StandIn(_not_callable)
_STAND_INS = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _StandIn(_dtype),
    ("_codecs", "encode"): _StandIn(_encode),  # bytes, in protocol 2
    **{(f"{core}.multiarray", "_reconstruct"): _StandIn(_reconstruct) for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _StandIn(_from_buffer) for core in ("numpy.core", "numpy._core")},
}


# --- names ---


def _short(name: str) -> str:
    """Return the last part of a model's name, as used in the names of the released repositories."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return "gpt2-small" if last == "gpt2" else last


def _are_comparable(*names: str) -> bool:
    """Whether all names are hub ids, since a local folder may hold any model."""
    return not any(is_local(name) for name in names)


def _number(sparsity: int | float | str) -> float:
    try:
        return float(str(sparsity).removeprefix("lambda"))
    except ValueError as error:
        raise ValueError(f"sparsity should be a lambda such as 10 or '1e1', not {sparsity!r}") from error
