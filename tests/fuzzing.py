"""Hostile and damaged files, made by a seed: examples of every kind of file, ways to spoil them, and what must hold.

A case is one spoiled file that is loaded. It passes if what is loaded equals what was written, or if loading raises one
of the errors allowed, in one line that names the file. It fails if anything else is raised, if a file of ours is
accepted with other content, if it takes too long, takes much memory, or does what reading a file never needs
(starts a program, connects, removes a file).
"""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bigram_circuits as bc
from bigram_circuits.analysis.affine import AffineMaps
from bigram_circuits.experiments.sparsity_path import load_path_runs
from bigram_circuits.explanations.explanation import load_atlas
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Effects, Maps, load_result
from bigram_circuits.published import read_masks
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.runs import (
    Checkpoint,
    CorpusIdentity,
    ModelIdentity,
    RunFolder,
    RunSettings,
    StepRecord,
    TargetIdentity,
)
from bigram_circuits.storage.records import CONTENT, HEADER, header_checksum, sealed
from bigram_circuits.storage.typed import to_json
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.text.ngrams import Level, NGramTable

NOT_YET: tuple[str, ...] = ()
"""Kinds whose readers are not hardened yet."""
SECONDS = 5.0  # a case may take
GROWTH = 1 << 28  # bytes the process may grow by in a case
ADDRESSES = 1 << 31  # bytes more that the process may ask for at all
LONGEST_MESSAGE = 1_000
ALLOWED = (ValueError, FileNotFoundError, OSError, IsADirectoryError)  # exactly: none of their other kinds
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "subprocess.Popen",
             "socket.connect", "socket.getaddrinfo", "shutil.rmtree", "ctypes.dlopen", "webbrowser.open")  # fmt: skip
WORDS = [
    b"", b"\0", b"\xff" * 8, b"../../../../etc/passwd", b"/etc/passwd", b"NaN", b"Infinity", b"-1", b"1e999", b"null",
    b"true", b"[" * 2_000, b'{"a":' * 500, b'"', b"\\ud800", b"9" * 5_000, b"18446744073709551616", b"__metadata__",
    b"checksum", b"data_offsets", b"format", b"kept", b"PK\x03\x04", b"PAR1", b"\x80\x04\x95", b"cos\nsystem\n",
    b"\r\n", b"\n", b"\xef\xbb\xbf", b"\x93NUMPY", b"(2147483647, 2147483647)", b"<|endoftext|>",
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "a\nb", "\0", "../../etc/passwd", "/dev/zero", "x" * 5_000, [], {}, [[]], [1, 2, 3], [None], {"a": 1}, ["x", 1],
    [[1], [1, 2]], "1", "\ud800",
]  # fmt: skip


class TooSlowError(BaseException):
    """Raised by the alarm."""


@dataclass
class Kind:
    """One kind of file."""

    name: str
    file: str
    """Its name, or that of the one that is spoiled in a folder."""
    examples: list[bytes]
    """Valid ones."""
    load: Callable[[Path], Any]
    """Load it from a folder; gives values that can be compared."""
    spoilers: list[Callable[[random.Random, bytes], bytes]]
    """Ways of its own to spoil it."""
    folder: Path
    """Where it is written; may hold other files."""
    is_ours: bool = True
    """Written with a checksum: other content is never accepted, unless the checksum was forged too."""
    seal_is_optional: bool = False
    """Others write such files without a checksum, so one that has lost it cannot be told from those."""
    share: float = 1.0
    """Of the cases."""
    forgers: list[Callable[[random.Random, bytes], bytes]] = field(default_factory=list)
    """Ways to spoil it that then write a right checksum."""


@dataclass
class Report:
    """What came of the cases of a kind."""

    name: str
    cases: int = 0
    identical: int = 0
    different: int = 0
    """Accepted with other content: only of files without a checksum, or with a forged one."""
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0


# --- ways to spoil any file ---


def _at(rng: random.Random, data: bytes) -> int:
    return rng.randrange(len(data) + 1) if rng.random() < 0.6 else rng.randrange(min(len(data), 400) + 1)


def flip(rng: random.Random, data: bytes) -> bytes:
    spoiled = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5]) if data else 0):
        spoiled[min(_at(rng, data), len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: _at(rng, data)]


def insert(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + rng.choice([rng.randbytes(rng.randrange(1, 9)), rng.choice(WORDS)]) + data[at:]


def delete(rng: random.Random, data: bytes) -> bytes:
    at = _at(rng, data)
    return data[:at] + data[at + rng.choice([1, 1, 2, 8, 100]) :]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    at, word = _at(rng, data), rng.choice([rng.choice(WORDS), rng.randbytes(4), bytes(8), b"\xff" * 4])
    return data[:at] + word + data[at + len(word) :]


def number(rng: random.Random, data: bytes) -> bytes:
    """A binary number of 4 or 8 bytes is made extreme."""
    at, value = _at(rng, data), rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**9])
    return data[:at] + (word := value.to_bytes(8, "little")[: rng.choice([4, 8])]) + data[at + len(word) :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start, end = sorted((_at(rng, data), _at(rng, data)))
    return data[:end] + data[start:end] * rng.choice([1, 1, 3]) + data[end:]


def splice(rng: random.Random, data: bytes) -> bytes:
    first, second = _at(rng, data), _at(rng, data)
    return data[:first] + data[second:]


ANY = [flip, flip, flip, cut, insert, delete, overwrite, number, repeat, splice]

# --- JSON ---


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [node for key in keys for node in _nodes(value[key])]


def spoil_values(rng: random.Random, record: Any) -> Any:
    nodes = _nodes(record)
    for _ in range(rng.choice([1, 1, 2])):
        container, key = rng.choice(nodes)
        how = rng.randrange(6)
        if key not in (container if isinstance(container, dict) else range(len(container))):
            continue
        if how < 3:
            container[key] = rng.choice(VALUES)
        elif how == 3:
            del container[key]
        elif how == 4:
            other, place = rng.choice(nodes)
            if (isinstance(other, dict) and place in other) or (isinstance(other, list) and place < len(other)):
                container[key] = json.loads(json.dumps(other[place]))
        elif isinstance(container, dict):
            container[rng.choice(["", "x", "checksum", "format", "../x", "__class__", *container])] = container.pop(key)
        else:
            container.append(container[key])
    return record


def json_values(rng: random.Random, data: bytes) -> bytes:
    return json.dumps(spoil_values(rng, json.loads(data))).encode()


def json_deep(rng: random.Random, data: bytes) -> bytes:
    text, deep = data.decode(), rng.choice(["[" * 100_000, '{"a":' * 50_000, "[" * 900 + "]" * 900])
    at = text.find(":", _at(rng, data)) + 1
    return (text[:at] + deep + text[at:]).encode() if rng.random() < 0.7 else deep.encode()


def json_twice(rng: random.Random, data: bytes) -> bytes:
    text = data.decode().strip()
    record = json.loads(text)
    return (text[:-1] + f", {json.dumps(rng.choice(list(record)))}: {json.dumps(rng.choice(VALUES))}}}").encode()


def json_forged(rng: random.Random, data: bytes) -> bytes:
    record = spoil_values(rng, {key: value for key, value in json.loads(data).items() if key != "checksum"})
    return json.dumps(sealed(record)).encode()


JSON = [json_values, json_values, json_deep, json_twice]


def lines_values(rng: random.Random, data: bytes) -> bytes:
    lines = data.splitlines() or [b"{}"]
    at = rng.randrange(len(lines))
    lines[at] = rng.choice([json_values, json_deep, json_twice])(rng, lines[at])
    return b"\n".join(lines) + b"\n"


# --- tensor files ---


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def header_values(rng: random.Random, data: bytes) -> bytes:
    header, body = _parts(data)
    return _joined(spoil_values(rng, header), body)


def header_tensors(rng: random.Random, data: bytes) -> bytes:
    """A tensor gets another type, shape, place or name, with a header that is otherwise right."""
    header, body = _parts(data)
    name = rng.choice([key for key in header if key != "__metadata__"])
    tensor, how = header[name], rng.randrange(6)
    if how == 0:
        tensor["dtype"] = rng.choice(["BOOL", "U8", "I8", "I16", "F8_E4M3", "BF16", "F32", "I64", "C64", "X", "F4"])
    elif how == 1:
        huge = [2**32, 2**32, 2**32]
        tensor["shape"] = rng.choice([tensor["shape"][::-1], [1, *tensor["shape"]], [2**63], huge, [0, 2**62], [-1]])
    elif how == 2:
        begin, end = tensor["data_offsets"]
        places = [[end, begin], [begin, end + 1], [0, 2**63], [begin - 1, end - 1], [0, len(body)], [begin, begin]]
        tensor["data_offsets"] = rng.choice(places)
    elif how == 3:
        header[rng.choice(["../../x", "", "x" * 2_000, "\0", "blocks.0.attn.W_Q"])] = header.pop(name)
    elif how == 4:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    else:
        metadata = header["__metadata__"]
        key = rng.choice(list(metadata))
        metadata[key] = rng.choice(["", "-1", "1", "{}", "9" * 5_000, "[" * 100_000, "NaN", metadata[key][:-1], "x\n"])
    return _joined(header, body)


def header_sizes(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([2**63, 2**64 - 1, 2**32, 0, 1, len(data), len(data) - 7, 10**8]).to_bytes(8, "little") + data[8:]


def header_text(rng: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    return _joined(rng.choice([json_deep, json_twice, flip, delete, insert])(rng, data[8 : 8 + size]), data[8 + size :])


def tensors_forged(rng: random.Random, data: bytes) -> bytes:
    """Shapes, metadata or content are changed, and the checksums made right again."""
    from bigram_circuits.storage.records import content_checksum, read_tensors

    way = rng.choice([header_tensors, header_values, body_bytes])
    spoiled = way(rng, data)
    place = Path(_forging) / "forged"
    place.write_bytes(spoiled)
    try:
        arrays, metadata = read_tensors(place, "is wrong")
        header, body = _parts(spoiled)
    except ValueError:
        return spoiled
    if CONTENT in metadata:
        metadata[CONTENT] = content_checksum(arrays)
    if "kept" in metadata and rng.random() < 0.7:
        from bigram_circuits.bitmasks import _checksum

        metadata["checksum"] = _checksum(arrays)
        if rng.random() < 0.5:
            metadata["kept"] = str(sum(int(np.bitwise_count(bits.view(np.uint8)).sum()) for bits in arrays.values()))
    metadata[HEADER] = header_checksum(arrays, metadata)
    header["__metadata__"] = metadata
    return _joined(header, body)


def body_bytes(rng: random.Random, data: bytes) -> bytes:
    header, body = _parts(data)
    return _joined(header, rng.choice([flip, lambda rng, data: number(rng, data)[: len(data)]])(rng, body))


_forging = "/tmp"
TENSORS = [header_values, header_tensors, header_tensors, header_sizes, header_text, body_bytes]

# --- pickles, zip files ---


class Calls:
    """Pickled, a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


ATTACKS = [
    b"cos\nsystem\n(S'exit'\ntR", b"cbuiltins\neval\n(S'1'\ntR", b"cbuiltins\nopen\n(S'x'\nS'w'\ntR", b"}]Q",
    b"]" * 500,
    b"cnumpy\nload\n(S'x'\ntR", b"csubprocess\nPopen\n(S'x'\ntR", b"\x8e" + struct.pack("<Q", 2**60), b"(" * 500,
    b"X\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f1", b"\x82\x01", b"h\x07", b"0" * 20, b"2" * 500,
]  # fmt: skip


def operations(rng: random.Random, data: bytes) -> bytes:
    """An operation of a pickle is replaced, removed, repeated, or one that does harm is put before it."""
    places = [place for _, _, place in pickletools.genops(data)]
    index = rng.randrange(len(places) - 1)
    start, end = places[index], places[index + 1]
    how = rng.randrange(5)
    if how == 0:
        other = rng.randrange(len(places) - 1)
        return data[:start] + data[places[other] : places[other + 1]] + data[end:]
    if how == 1:
        return data[:start] + data[end:]
    if how == 2:
        return data[:end] + data[start:end] * rng.choice([1, 2, 50]) + data[end:]
    if how == 3:
        return data[:start] + rng.choice(ATTACKS) + data[start:]
    return data[:start] + bytes([rng.choice(pickletools.opcodes).code.encode("latin1")[0]]) + data[start + 1 :]


def members(rng: random.Random, data: bytes) -> bytes:
    """A zip file is written again with an array changed: its checksums are right."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        content = {name: file.read(name) for name in file.namelist()}
    name, how, made = rng.choice(list(content)), rng.randrange(6), io.BytesIO()
    if how == 0:
        content[name] = rng.choice(ANY)(rng, content[name])
    elif how == 1:
        shape = rng.choice(["(99999999999,)", "(-1,)", "()", "(2**40,)", "(True,)", "(1e3,)", "('x',)", "(2, 2"])
        header = (
            f"{{'descr': '{rng.choice(['|b1', '|O', '<f8', '<U9', '|V8'])}', 'fortran_order': 0, 'shape': {shape}}}\n"
        )
        content[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + b"\0" * 30
    elif how == 2:
        content[rng.choice(["../../../x.npy", "/absolute/x.npy", "", "orig_model_name.npy", "x"])] = content.pop(name)
    elif how == 3:
        np.save(held := io.BytesIO(), np.zeros(1 << 22, dtype=bool))  # a bomb: 4 MiB in 4 KiB
        content[name] = held.getvalue()
    elif how == 4:
        np.save(held := io.BytesIO(), np.array([Calls(os.system, "exit")], dtype=object), allow_pickle=True)
        content[name] = held.getvalue()
    else:
        content[name] = b""
    with zipfile.ZipFile(made, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        for key, value in content.items():
            file.writestr(key, value)
    return made.getvalue()


# --- examples ---


def _plain(array: Any) -> Any:
    return array.dtype.str, array.shape, array.tobytes()


def subnetwork_content(subnetwork: Subnetwork) -> Any:
    about = subnetwork.model_name, subnetwork.weight_hash, subnetwork.lineage, repr(subnetwork), subnetwork.by_weight()
    return about, [(name, _plain(mask.numpy())) for name, mask in subnetwork.items()]


def table_content(table: NGramTable) -> Any:
    tokens = np.arange(min(12, table.d_vocab))[None]
    table.surprisal(tokens), table.entropy(tokens), table.top1(tokens)
    tensors = [_plain(getattr(level, name).numpy()) for level in table.levels for name in Level.__annotations__]
    return table.order, table.d_vocab, tensors


def result_content(result: Any) -> Any:
    str(result)
    return json.dumps(result.to_json())


def atlas_content(atlas: Any) -> Any:
    """With everything that shows it: what is accepted can be shown."""
    atlas.to_html(), atlas.to_dataframe(), atlas._repr_html_()
    return json.dumps(atlas.to_json())


def maps_content(maps: AffineMaps) -> Any:
    tensors = [
        _plain(getattr(maps, f"{end}_{part}").numpy()) for end in ("output", "input") for part in ("weight", "bias")
    ]
    return tensors, maps.weight_hash, maps.condition, maps.tokens, maps.alpha


def run_content(run: Any) -> Any:
    record = run.settings, run.rebuild, run.versions, run.outcome, run.metrics, run.history
    return json.dumps(to_json(record)), subnetwork_content(run.subnetwork)


def path_content(runs: Any) -> Any:
    return [(run_content(replace(run, evaluation=None)), json.dumps(run.metrics)) for run in runs]


def masks_content(found: Any) -> Any:
    masks, made_for = found
    return made_for, sorted((name, _plain(mask)) for name, mask in masks.items())


def some_masks(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"attn.W_Q": (2, 6, 3), "attn.W_O": (2, 3, 6), "mlp.W_in": (6, 5), "mlp.W_out": (5, 6)}
    return {
        f"blocks.{layer}.{name}": torch.rand(shape, generator=generator) < 0.4
        for layer in range(2)
        for name, shape in shapes.items()
    }


def some_subnetwork(seed: int = 0) -> Subnetwork:
    return Subnetwork(some_masks(seed), model_name="some/model", weight_hash="ab12", lineage="bigram | L0H1")


def some_results() -> list[Any]:
    rng, quantities = np.random.default_rng(0), (Quantity("kl", "nats", "a"), Quantity("loss", "", "b"))
    values = rng.random((2, 2, 3))
    values[0, 0, 0] = np.nan
    conditions = ("full", "subnetwork")
    maps = rng.random((2, 2, 2, 3))
    words = (((("a", "b", "c"),) * 2),) * 2
    return [
        Curves(
            "C", quantities, "layer", ("0", 1, 0.5), conditions, values, values - 1, values + 1, notes={"tokens": 3}
        ),
        Maps(
            "M", quantities, "layer", ("0", "1"), "position", ("a", "b", "c"), conditions, maps, words, notes={"n": [1]}
        ),
        Effects("E", quantities, "head", ("0.0", "0.1", "1.0"), values[0], values[0] - 1, values[0] + 1),
    ]


def some_atlas() -> Any:
    from tests.explanations.examples import atlas

    return atlas((" of", " in"), neurons=(3, 2, 2, 0), listed=7, most_edges=9, n_paths=3)


def some_maps() -> AffineMaps:
    torch.manual_seed(0)
    shapes = (3, 4, 4), (3, 4), (3, 4, 4), (3, 4)
    return AffineMaps(
        *(torch.randn(shape) for shape in shapes), weight_hash="ab12", condition="full", tokens=9, alpha=1.0
    )


def saved(value: Any, folder: Path, name: str = "made") -> bytes:
    value.save(folder / name)
    return (folder / name).read_bytes()


def published_files(folder: Path) -> dict[str, list[bytes]]:
    from safetensors.numpy import save

    from bigram_circuits.storage.records import seal_tensors

    masks = {f"h.{index}.weight": np.random.default_rng(index).random((6, 4)) < 0.5 for index in range(3)}
    masks["h.0.weight"] = np.asfortranarray(masks["h.0.weight"])
    pickles = [pickle.dumps({"orig_model_name": "some/model", **masks}, protocol) for protocol in (2, 3, 4, 5)]
    zips = []
    for write in (np.savez, np.savez_compressed):
        write(held := io.BytesIO(), orig_model_name=np.array("some/model"), **masks)
        zips.append(held.getvalue())
    whole = {name: np.ascontiguousarray(mask) for name, mask in masks.items()}
    tensors = save(whole, seal_tensors(whole, {"orig_model_name": "some/model"}))
    return {"pickle": pickles, "npz": zips, "safetensors": [tensors]}


def some_run(folder: Path) -> None:
    from tests.example_runs import make_run

    shutil.rmtree(folder, ignore_errors=True)
    measured = ("surprisal_correlation", "cross_entropy", "kl", "mean_surprisal", "top1_agreement")
    numbers = dict.fromkeys(measured, 0.5) | {"kept": 2, "total": 14, "fraction": 1 / 7}
    make_run(folder, metrics={"subnetwork": numbers, "full": numbers, "verdict": "fine"})


def some_checkpoint(folder: Path) -> None:
    """A run that learns, with a checkpoint after two steps."""
    settings = RunSettings(ModelIdentity("m"), CorpusIdentity("text"), TargetIdentity("NGramTable"), SparsifyConfig())
    run = RunFolder.open(folder, settings)
    for step in range(2):
        run.log(StepRecord(0, step, cross_entropy=1.0, fraction=0.5, undecided=1.0))
    scores = torch.linspace(-1, 1, 20)
    tensors = {
        "scores": scores,
        "adam.exp_avg": scores / 2,
        "adam.exp_avg_sq": scores**2,
        "adam.step": torch.tensor(2.0),
    }
    run.write_checkpoint(Checkpoint(tensors, step=2, attempt=0, seconds=0.5))


def checkpoint_content(checkpoint: Any) -> Any:
    tensors = sorted((name, _plain(tensor.numpy())) for name, tensor in checkpoint.tensors.items())
    return tensors, repr(replace(checkpoint, tensors={}))


def some_path(folder: Path) -> bytes:
    kept, numbers, masks = 0, {}, ""
    for weight in (1, 5):
        some_run(folder / f"weight-{weight}")
        (folder / f"weight-{weight}" / "metrics.json").unlink()
        subnetwork = bc.load_run(folder / f"weight-{weight}").subnetwork
        kept, masks = subnetwork.kept, subnetwork.checksum
        measured = ("surprisal_correlation", "cross_entropy", "kl", "mean_surprisal", "top1_agreement")
        numbers = dict.fromkeys(measured, 0.25) | {"kept": kept, "total": 14, "fraction": kept / 14}
    points = [{"sparsity_weight": weight, "faithfulness": 0.5, "subnetwork": masks, **numbers} for weight in (1, 5)]
    return json.dumps(sealed({"points": points, "cpr": 0.5, "cmd": 0.5, "empty": numbers, "full": numbers})).encode()


def kinds(folder: Path, *, with_models: bool = True) -> list[Kind]:
    """All kinds, with examples made below a folder."""
    from tests.conftest import byte_tokenizer

    global _forging
    made = folder / "made"
    made.mkdir(parents=True)
    _forging = str(made)
    tokens = np.random.default_rng(0).integers(0, 20, (20, 12))
    tables = [saved(bc.count_ngrams(tokens, order, d_vocab=20), made) for order in (1, 2, 3)]
    tokenizer = byte_tokenizer()

    def place(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    found = [
        Kind("subnetwork", "subnetwork.safetensors", [saved(some_subnetwork(seed), made) for seed in range(3)],
             lambda at: subnetwork_content(Subnetwork.load(at / "subnetwork.safetensors")), TENSORS,
             place("subnetwork"), share=3, forgers=[tensors_forged]),
        Kind("n-gram table", "table.safetensors", tables,
             lambda at: table_content(NGramTable.load(at / "table.safetensors")), TENSORS, place("table"), share=3,
             forgers=[tensors_forged]),
        Kind("affine maps", "maps.safetensors", [saved(some_maps(), made)],
             lambda at: maps_content(AffineMaps.load(at / "maps.safetensors")), TENSORS, place("maps"), share=2,
             forgers=[tensors_forged]),
        Kind("result", "result.json", [saved(result, made) for result in some_results()],
             lambda at: result_content(load_result(at / "result.json")), JSON, place("result"), share=3,
             forgers=[json_forged]),
        Kind("atlas", "atlas.json", [saved(some_atlas(), made)],
             lambda at: atlas_content(load_atlas(at / "atlas.json")), JSON, place("atlas"), share=2,
             forgers=[json_forged]),
    ]  # fmt: skip
    path = place("path")
    found.append(Kind("path", "path.json", [some_path(path)], lambda at: path_content(load_path_runs(at)), JSON, path,
                      share=0.5, forgers=[json_forged]))  # fmt: skip
    for file in ("config.json", "training.json", "metrics.json", "progress.jsonl", "subnetwork.safetensors"):
        run = place(f"run {file}")
        some_run(run)
        ways = TENSORS if file.endswith("tensors") else [lines_values] if file.endswith("l") else JSON
        forgers = [tensors_forged] if ways is TENSORS else [json_forged] if ways is JSON else []
        found.append(Kind(f"run: {file}", file, [(run / file).read_bytes()], lambda at: run_content(bc.load_run(at)),
                          ways, run, share=0.8, forgers=forgers))  # fmt: skip
    checkpoint, begun = "checkpoint/state.safetensors", place("begun")
    some_checkpoint(begun)
    found.append(Kind("checkpoint", checkpoint, [(begun / checkpoint).read_bytes()],
                      lambda at: checkpoint_content(RunFolder(at).read_checkpoint()), TENSORS, begun))  # fmt: skip
    for suffix, examples in published_files(made).items():
        file = f"masks.{suffix}"
        ways = {"pickle": [operations] * 8, "npz": [members] * 2, "safetensors": TENSORS}[suffix]
        found.append(Kind(f"published {suffix}", file, examples,
                          lambda at, file=file: masks_content(read_masks(at / file, most=1 << 20)), ways,
                          place(suffix), is_ours=suffix == "safetensors",
                          seal_is_optional=True, share=2))  # fmt: skip

    def corpus(name: str) -> Callable[[Path], Any]:
        def load(at: Path) -> Any:
            read = bc.load_corpus(at / name, tokenizer=tokenizer, context_length=8, held_out=0.3)
            return read.train.tobytes(), read.held_out.tobytes()

        return load

    texts = [f"text {n} grüßt " * 4 for n in range(12)]
    plain = "\n\n".join(texts * 12).encode()
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode() + b"\n"
    array = io.BytesIO()
    np.save(array, tokens)
    for name, examples, ways, share in [
        ("corpus.txt", [plain], [], 0.3),
        ("corpus.jsonl", [lines], [lines_values] * 4, 0.8),
        ("corpus.parquet", parquet_files(texts), [], 1.5),
        ("tokens.npy", [array.getvalue()], [], 0.3),
    ]:
        found.append(
            Kind(f"corpus: {name}", name, examples, corpus(name), ways, place(name), is_ours=False, share=share)
        )
    if with_models:
        found += model_kinds(folder)
    return found


def parquet_files(texts: list[str]) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for options in ({}, {"compression": "zstd", "write_page_checksum": True}, {"use_dictionary": False}):
        pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), held := io.BytesIO(), **options)
        files.append(held.getvalue())
    return files


def model_kinds(folder: Path) -> list[Kind]:
    from tests.conftest import TINY_CONFIGS, save_tiny

    found = []
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        at = folder / f"model {file}"
        save_tiny(at, TINY_CONFIGS["gpt_neox"])
        ways = TENSORS[:-1] if file.endswith("tensors") else JSON

        def load(at: Path) -> Any:
            model = bc.load_model(at, device="cpu")
            return model.cfg.d_vocab, len(model.tokenizer)

        found.append(Kind(f"model: {file}", file, [(at / file).read_bytes()], load, ways, at, is_ours=False, share=0.1))
    return found


# --- running ---

_forbidden: list[str] = []
_watching = False


def _watch(event: str, arguments: Any) -> None:
    if _watching and event in FORBIDDEN:
        _forbidden.append(f"{event} {str(arguments)[:80]}")


def _alarm(*_: Any) -> None:
    raise TooSlowError


def run_kind(kind: Kind, cases: int, seed: int = 0, *, growth: int = GROWTH) -> Report:
    """So many cases of a kind, in this process."""
    global _watching
    if not getattr(run_kind, "hooked", False):
        sys.addaudithook(_watch)
        run_kind.hooked = True  # type: ignore[attr-defined]
    path, report, rng = kind.folder / kind.file, Report(kind.name), random.Random(f"{seed} {kind.name}")
    expected = []
    for example in kind.examples:
        path.write_bytes(example)
        try:
            expected.append(kind.load(kind.folder))
        except ValueError:  # a kind that is always refused
            expected.append(None)
    signal.signal(signal.SIGALRM, _alarm)
    started = time.monotonic()
    for case in range(cases):
        index = rng.randrange(len(kind.examples))
        forged = bool(kind.forgers) and rng.random() < 0.2
        ways = kind.forgers if forged else ANY + kind.spoilers
        data = kind.examples[index]
        for _ in range(1 if forged or rng.random() < 0.8 else 2):
            way = rng.choice(ways)
            try:
                data = way(rng, data)
            except Exception:
                data = flip(rng, data)  # it was too spoiled already for this way
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, problem = time.monotonic(), None
        del _forbidden[:]
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        _watching = True
        try:
            content = kind.load(kind.folder)
            same = content == expected[index]
            if same:
                report.identical += 1
            elif kind.is_ours and not forged and not (kind.seal_is_optional and b"_checksum" not in data):
                problem = "was accepted with other content"
            else:
                report.different += 1
        except TooSlowError:
            problem = f"took more than {SECONDS} s"
        except BaseException as error:
            _watching = False
            message = str(error)
            if type(error) not in ALLOWED:
                problem = f"{type(error).__name__}: {message[:200]!r}"
            elif "\n" in message or len(message) > LONGEST_MESSAGE:
                problem = f"a message of {len(message)} characters: {message[:200]!r}"
            elif kind.folder.name not in message:
                problem = f"a message that names no file: {message[:200]!r}"
            elif isinstance(error, KeyboardInterrupt):
                raise
            report.refused += problem is None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            _watching = False
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if _forbidden:
            problem = f"did {_forbidden[0]}"
        elif grown > growth and problem is None:
            problem = f"grew by {grown >> 20} MiB"
        report.slowest = max(report.slowest, time.monotonic() - began)
        report.cases += 1
        if problem is not None:
            report.failures.append(f"case {case} ({way.__name__}): {problem}")
    report.seconds = time.monotonic() - started
    path.write_bytes(kind.examples[0])
    gc.collect()
    return report


def run_apart(kind: Kind, cases: int, seed: int = 0, *, patience: float = 3_600) -> Report:
    """The same in a process of its own, whose memory is bounded: a crash or a hang of that process is a failure."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            bound = pages * resource.getpagesize() + ADDRESSES
            resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say
            report = run_kind(kind, cases, seed)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(report, pipe)
            code = 0
        except BaseException:
            with os.fdopen(write, "wb") as pipe:
                failed = Report(kind.name, cases, failures=[f"the harness failed: {traceback.format_exc()}"])
                pickle.dump(failed, pipe)
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    if not sent:
        kept = kind.folder.parent / f"crashed {kind.file}"
        shutil.copy(kind.folder / kind.file, kept)
        return Report(kind.name, cases, failures=[f"the process ended with status {status}: see {str(kept)!r}"])
    return pickle.loads(sent)


def shares(found: list[Kind], cases: int) -> Counter[str]:
    """How many cases each kind gets."""
    whole = sum(kind.share for kind in found)
    return Counter({kind.name: max(1, round(cases * kind.share / whole)) for kind in found})
