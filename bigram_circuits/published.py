"""Import published masks: those of Chang and Bergen (2025, arXiv 2504.15471), and others in the same format.

The released files are pickles of a dict from Hugging Face parameter name to boolean numpy array, with one more key,
`orig_model_name`. Loading a pickle can run arbitrary code, so these files are never passed to numpy or the pickle
module: `storage/pickles.py` interprets the few operations that such a dict is written with, and refuses all others.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.models.loading import hub_errors, is_local, load_model
from bigram_circuits.models.model import Model
from bigram_circuits.storage.pickles import read_boolean_arrays
from bigram_circuits.storage.records import check_content, check_header, read_tensors, regular_size, shown
from bigram_circuits.subnetwork import Subnetwork

MODEL_KEY = "orig_model_name"
_ACCOUNT = "tylerachang"
_FILE = re.compile(r"subnetwork_dict_(?:lambda)?([0-9.e+-]+)\.pickle")
_MOST_UNPACKED = 1 << 32  # bytes that a compressed file may unpack to, if the model is not known
_LONGEST_NAME = 1024  # characters of a model name


def import_published(path: str | os.PathLike[str], model: Model) -> Subnetwork:
    """Import a subnetwork of `model` from a file of boolean masks by Hugging Face parameter name.

    Args:
        path: A released `.pickle` (also `.pkl`), or an `.npz` or `.safetensors` file with the same names.
        model: The model that the masks were made for, from `load_model`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged, holds anything but boolean masks, or was made for another model.

    Example:
        >>> bc.export_masks(model, found, "masks.npz")
        >>> bc.import_published("masks.npz", model) == found.subnetwork
        True
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

    Example:
        >>> subnetwork = bc.load_published("EleutherAI/pythia-70m", sparsity=10)
    """
    import huggingface_hub

    repository = f"{_ACCOUNT}/bigram-subnetworks-{_short(model_name)}"
    wanted = None if sparsity is None else _number(sparsity)
    with hub_errors("repository", repository, revision):
        # one request: that for the list of files alone is repeated for minutes if there is no network
        listed = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=10).siblings or []
        names = [file.rfilename for file in listed]
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
        ".pickle": lambda path: read_boolean_arrays(path, most=most),
        ".pkl": lambda path: read_boolean_arrays(path, most=most),
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
        if made_for is not None and len(made_for) > _LONGEST_NAME:
            raise ValueError(f"its {MODEL_KEY} has {len(made_for):,} characters")
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
