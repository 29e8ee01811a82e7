"""Hostile and damaged files: one clear error, and never a crash, a hang, code run, much memory or a wrong mask."""

import ast
import builtins
import dataclasses
import io
import json
import os
import pickle
import shutil
import socket
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import bigram_circuits as bc
from bigram_circuits.analysis.affine import AffineMaps
from bigram_circuits.experiments.sparsity_path import load_path_runs
from bigram_circuits.measures.results import load_result
from bigram_circuits.published import import_published, read_masks
from bigram_circuits.storage.records import (
    CONTENT,
    HEADER,
    parse_json,
    read_tensors,
    seal_tensors,
    sealed,
    unsealed,
    write_tensors,
)
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.text import ngrams
from bigram_circuits.text.ngrams import NGramTable

from . import fuzzing
from .architectures import CONFIGS
from .conftest import save_tiny

PACKAGE = Path(bc.__file__).parent
LOADERS = {
    "subnetwork": Subnetwork.load,
    "table": NGramTable.load,
    "maps": AffineMaps.load,
    "result": load_result,
    "atlas": bc.load_atlas,
    "masks": read_masks,
}


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    return {kind.name: kind for kind in fuzzing.kinds(tmp_path_factory.mktemp("hostile") / "files")}


CASES = {
    "subnetwork": 500, "n-gram table": 500, "affine maps": 300, "result": 500, "atlas": 300, "path": 60,
    "run: config.json": 60,
    "run: training.json": 60, "run: metrics.json": 60, "run: progress.jsonl": 60, "run: subnetwork.safetensors": 60,
    "checkpoint": 60,
    "published pickle": 500, "published npz": 200, "published safetensors": 200, "corpus: corpus.txt": 30,
    "corpus: corpus.jsonl": 100, "corpus: corpus.parquet": 200, "corpus: tokens.npy": 20, "model: config.json": 12,
    "model: tokenizer.json": 12, "model: tokenizer_config.json": 12, "model: model.safetensors": 12,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if name not in fuzzing.NOT_YET])
def test_spoiled_files_are_loaded_as_they_were_or_refused_in_one_line(all_kinds, name):
    assert set(CASES) == set(all_kinds)
    report = fuzzing.run_kind(all_kinds[name], CASES[name], seed=1)
    assert report.failures == []
    assert report.refused > 0


# --- every artefact has a checksum ---


@pytest.fixture
def artefacts(tmp_path):
    """A file of every kind of ours."""
    tokens = np.random.default_rng(0).integers(0, 20, (20, 12))
    fuzzing.some_subnetwork().save(tmp_path / "subnetwork")
    bc.count_ngrams(tokens, 2, d_vocab=20).save(tmp_path / "table")
    fuzzing.some_maps().save(tmp_path / "maps")
    fuzzing.some_results()[0].save(tmp_path / "result")
    fuzzing.some_atlas().save(tmp_path / "atlas")
    (tmp_path / "masks.safetensors").write_bytes(fuzzing.published_files(tmp_path)["safetensors"][0])
    return {name: tmp_path / ("masks.safetensors" if name == "masks" else name) for name in LOADERS}


CONTENTS = {
    "subnetwork": fuzzing.subnetwork_content,
    "table": fuzzing.table_content,
    "maps": fuzzing.maps_content,
    "result": fuzzing.result_content,
    "atlas": fuzzing.atlas_content,
    "masks": fuzzing.masks_content,
}


def test_no_single_bit_of_a_subnetwork_file_can_flip_unnoticed(tmp_path):
    path = tmp_path / "some.safetensors"
    Subnetwork({"blocks.0.mlp.W_in": torch.arange(15).view(3, 5) < 4}, model_name="m", weight_hash="ab").save(path)
    whole, data = fuzzing.subnetwork_content(Subnetwork.load(path)), path.read_bytes()
    same = 0
    for at in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                assert fuzzing.subnetwork_content(Subnetwork.load(path)) == whole
                same += 1
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert "some.safetensors" in str(error)  # noqa: PT017
    assert same < 20  # letters of \u escapes and the like


@pytest.mark.parametrize("kind", list(LOADERS))
def test_a_bit_anywhere_in_a_file_of_ours_is_noticed(artefacts, kind):
    path, rng = artefacts[kind], np.random.default_rng(0)
    whole, data = CONTENTS[kind](LOADERS[kind](path)), bytearray(path.read_bytes())
    for at in rng.choice(len(data), 150, replace=False):
        data[at] ^= 1 << (bit := int(rng.integers(8)))
        path.write_bytes(data)
        try:
            assert CONTENTS[kind](LOADERS[kind](path)) == whole
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
        data[at] ^= 1 << bit


@pytest.mark.parametrize("kind", list(LOADERS))
@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_file_of_ours_without_its_checksum_is_refused(artefacts, kind, how):
    """Masks by parameter name are also written by others, without any checksum: only a part of one is refused."""
    path = artefacts[kind]
    whole = CONTENTS[kind](LOADERS[kind](path))
    json_keys = ["checksum"]
    keys = {"result": json_keys, "atlas": json_keys, "subnetwork": [HEADER]}.get(kind, [HEADER, CONTENT])
    if keys is json_keys:
        metadata, tensors = json.loads(path.read_text()), {}
    else:
        with safe_open(path, framework="np") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118

    def write(metadata):
        path.write_text(json.dumps(metadata)) if keys is json_keys else save_file(tensors, path, metadata)

    for key in keys:
        changed = {name: value for name, value in metadata.items() if name != key}
        if how == "renamed":
            changed[key[:-1] + "n"] = metadata[key]
        write(changed)
        with pytest.raises(ValueError, match=r"checksum|unknown|field"):
            LOADERS[kind](path)
    if how == "removed" and kind == "masks":
        write({name: value for name, value in metadata.items() if name not in keys})
        assert CONTENTS[kind](LOADERS[kind](path)) == whole


def test_a_large_table_is_checked_at_its_header_and_read_through_when_asked(artefacts, monkeypatch):
    path = artefacts["table"]
    monkeypatch.setattr(ngrams, "_VERIFIED_BYTES", 0)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the tokens or probabilities
    path.write_bytes(data)
    assert NGramTable.load(path).order == 2
    with pytest.raises(ValueError, match="is damaged: its checksum does not match its contents"):
        NGramTable.load(path, verify=True)
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="table'"):
        NGramTable.load(path)


def test_a_loaded_table_stays_in_its_file(artefacts):
    arrays, _ = read_tensors(artefacts["table"], "is no table", mapped=True)
    table = NGramTable.load(artefacts["table"])
    for name, array in arrays.items():
        level, field = name.removeprefix("level_").split(".")
        assert isinstance(array.base, np.memmap)
        np.testing.assert_array_equal(array, getattr(table.levels[int(level)], field).numpy())


def test_a_checksum_is_that_of_the_values_and_not_of_how_they_are_written():
    record = sealed({"b": (1, 2.0), "a": {"x": None, "y": float("inf")}})
    assert unsealed(parse_json(json.dumps(record, indent=3, sort_keys=True))) == {
        "b": [1, 2.0],
        "a": {"x": None, "y": float("inf")},
    }
    for changed in ({"b": [1, 2]}, {"a": {"x": 0, "y": float("inf")}}, {"c": 1}, {"checksum": None}):
        with pytest.raises(ValueError, match="it is damaged: its checksum"):
            unsealed({**record, **changed})


# --- valid checksums of what cannot be ---


def forge(table, **changed):
    """A table with other tensors in its last level, sealed."""
    levels = list(table.levels)
    levels[-1] = dataclasses.replace(levels[-1], **changed)
    return dataclasses.replace(table, levels=tuple(levels))


def test_a_sealed_table_whose_rows_are_no_distributions_is_refused(tmp_path):
    table = bc.count_ngrams(np.random.default_rng(0).integers(0, 20, (20, 12)), 2, d_vocab=20)
    level = table.levels[-1]
    row = slice(int(level.offsets[0]), int(level.offsets[1]))
    assert row.stop - row.start > 2
    swapped, half, same, top, entropy = (
        one.clone() for one in (level.tokens, level.probs, level.tokens, level.top, level.entropy)
    )
    swapped[row.start : row.start + 2] = level.tokens[row.start : row.start + 2].flip(0)
    half[row] /= 2
    same[row.start + 1] = same[row.start]
    top[0] = next(token for token in range(20) if token not in level.tokens[row])
    entropy[0] += 0.5
    for changed, said in (
        ({"tokens": swapped}, "tokens of a row of level_1 are not in order"),
        ({"tokens": same}, "tokens of a row of level_1 are not in order"),
        ({"probs": half}, "probabilities of a row of level_1 do not sum to 1"),
        ({"top": top}, "a top token of level_1 is not the most likely one"),
        ({"entropy": entropy}, "an entropy of level_1 is not that of its row"),
    ):
        forge(table, **changed).save(tmp_path / "table")
        with pytest.raises(ValueError, match=f"table' is damaged: .*{said}"):
            NGramTable.load(tmp_path / "table")


@pytest.mark.parametrize("at_once", [1, 7, 1 << 22])
def test_tables_are_checked_in_parts_of_any_size(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(ngrams, "_CHECKED_AT_ONCE", at_once)
    for order in (1, 2, 3):
        table = bc.count_ngrams(np.random.default_rng(order).integers(0, 20, (40, 30)), order, d_vocab=20)
        table.save(tmp_path / "table")
        assert NGramTable.load(tmp_path / "table").fingerprint == table.fingerprint
        half = table.levels[-1].probs.clone()
        half[-1] /= 2
        forge(table, probs=half).save(tmp_path / "table")
        with pytest.raises(ValueError, match=r"do not sum to 1|is not the most likely|is not that of its row"):
            NGramTable.load(tmp_path / "table")


@pytest.mark.parametrize("name", ["table", "maps", "masks", "result", "atlas"])
def test_the_same_contents_are_the_same_bytes(tmp_path, name):
    tokens = np.random.default_rng(0).integers(0, 20, (20, 12))
    made = {
        "table": lambda path: bc.count_ngrams(tokens, 2, d_vocab=20).save(path),
        "maps": lambda path: fuzzing.some_maps().save(path),
        "masks": lambda path: write_tensors(
            path, {f"h.{n}": tokens > n for n in range(9)}, seal_tensors({f"h.{n}": tokens > n for n in range(9)}, {})
        ),
        "result": lambda path: fuzzing.some_results()[1].save(path),
        "atlas": lambda path: fuzzing.some_atlas().save(path),
    }  # fmt: skip
    for copy in ("a", "b"):
        made[name](tmp_path / copy)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"notes": {"loss": float("nan")}}, {"notes": {"loss": 10**400}}, {"notes": {"a": [float("inf")]}},
        {"notes": []},
        {"points": [10**400, 1, 2]}, {"points": [float("nan"), 1, 2]}, {"points": [True, 1, 2]},
        {"points": [None, 1, 2]},
        {"values": "x"}, {"values": [[1, "x"]]}, {"values": 10**400}, {"low": [[[1.0]]]}, {"title": 7}, {"axis": ["x"]},
        {"conditions": "full"}, {"conditions": [1, 2]}, {"quantities": [{"name": 1, "unit": "", "meaning": ""}]},
        {"of": 7}, {"of": {"run": 7}}, {"of": {"other": "x"}}, {"title": "\ud800"}, {"kind": ["Curves"]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_sealed_result_of_other_types_is_refused(tmp_path, changed):
    record = fuzzing.some_results()[0].to_json() | changed
    (tmp_path / "result").write_text(json.dumps(sealed(record)))
    with pytest.raises(ValueError, match="result' ") as told:
        load_result(tmp_path / "result")
    assert "\n" not in str(told.value)


def changed_at(record, place, value):
    """A record of JSON values with another value at a place, a path of keys."""
    *before, last = place
    for key in before:
        record = record[key]
    record[last] = value


FIRST = ("explanations", 0)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("title",), 7, "title should be text"),
        (("counts",), [1], "it has 2 explanations but 1 counts"),
        (("counts", 0), 1e3, "a whole number"),
        ((*FIRST, "value"), 10**400, "should be a number"),
        ((*FIRST, "value"), float("inf"), "should be a number"),
        ((*FIRST, "prompt"), [], "position should be one of a prompt of 0 tokens"),
        ((*FIRST, "position"), 1, "position should be one of a prompt of 1 tokens, not 1"),
        ((*FIRST, "nodes", 0, "position"), -2, "is at -2 of 1 positions"),
        ((*FIRST, "nodes", 0, "kind"), "<b>", "the kind of a node should be one of token, .*, not '<b>'"),
        ((*FIRST, "nodes", 0, "kind"), "answer", "one of them the answer"),
        ((*FIRST, "edges", 0, "source"), "x" * 9999, "an edge joins 'xxx[^ ]*', which is no node"),
        ((*FIRST, "paths", 0, "labels"), [], "a path should have a label for each of its nodes"),
        ((*FIRST, "paths", 0), None, "should be values by name"),
        (("units", "L0N1"), {"drives": [["a", "b"]]}, "should be a number"),
        (("other",), 1, "it has the unknown field 'other'"),
    ],
)  # fmt: skip
def test_a_sealed_atlas_of_what_cannot_be_is_refused(tmp_path, place, value, said):
    record = json.loads(json.dumps(fuzzing.some_atlas().to_json()))
    changed_at(record, place, value)
    (tmp_path / "atlas").write_text(json.dumps(sealed({"format": "bigram_circuits.atlas/1", "atlas": record})))
    with pytest.raises(ValueError, match=rf"atlas' is not an atlas that can be read: .*{said}") as told:
        bc.load_atlas(tmp_path / "atlas")
    assert "\n" not in str(told.value)


def test_an_atlas_of_huge_and_undefined_numbers_is_shown(tmp_path):
    record = json.loads(json.dumps(fuzzing.some_atlas().to_json()))
    for value in (1.7976931348623157e308, None):
        for path in record["explanations"][0]["paths"]:
            path["value"] = value
        for name in ("value", "left_out", "left_out_share"):
            record["explanations"][0][name] = value
        for node in record["explanations"][0]["nodes"]:
            node["flow"] = value
        (tmp_path / "atlas").write_text(json.dumps(sealed({"format": "bigram_circuits.atlas/1", "atlas": record})))
        fuzzing.atlas_content(bc.load_atlas(tmp_path / "atlas"))


# --- the nastiest single files ---


@pytest.mark.parametrize("kind", list(LOADERS))
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        (2**63).to_bytes(8, "little"),
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b"\xff\xfe" * 100,
        b"9" * 100_000,
        b'{"format": 1, "format": 1}',
        b'{"format": "bigram_circuits.result/1", "kind": ["Curves"]}',
        pickle.dumps({"w": fuzzing.Calls(os.system, "exit 3")}),
    ],
    ids=range(13),
)
def test_what_is_no_such_file_is_refused_in_one_line(tmp_path, kind, data):
    path = tmp_path / ("x.safetensors" if kind == "masks" else "x")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x(\.safetensors)?' ") as error:
        LOADERS[kind](path)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize("kind", list(LOADERS))
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path, kind):
    (tmp_path / "pipe.safetensors").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "pipe.safetensors")  # who opens it waits for somebody to write
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero"):
        with pytest.raises(ValueError, match=f"{name}.safetensors' is (a folder|not a regular file)"):
            LOADERS[kind](tmp_path / f"{name}.safetensors")
    for path in (tmp_path / "loop.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(OSError, match=r"none|loop"):
            LOADERS[kind](path)


def tensors(header, body=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "U8", "shape": [2**62, 4], "data_offsets": [0, 2**64]},
        {"dtype": "U8", "shape": [2**32, 2**32], "data_offsets": [0, 0]},
        {"dtype": "U8", "shape": [-1], "data_offsets": [0, -1]},
        {"dtype": "U8", "shape": [1] * 65, "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        {"dtype": "U8", "shape": None, "data_offsets": [0, 1]},
        [],
    ],
)
@pytest.mark.parametrize("kind", ["subnetwork", "table", "maps", "masks"])
def test_absurd_shapes_are_refused_before_anything_is_allocated(tmp_path, kind, tensor):
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensors({"../../w": tensor}, b"\1"))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x\.safetensors' ") as error:
        LOADERS[kind](path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert "\n" not in str(error.value)


def test_a_zip_bomb_is_not_unpacked(tiny_model, tmp_path):
    bomb = io.BytesIO()
    np.save(bomb, np.zeros(1 << 26, dtype=bool))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("a.npy", "b.npy"):
            file.writestr(name, bomb.getvalue())
    assert (tmp_path / "bomb.npz").stat().st_size < 1 << 18
    tracemalloc.start()
    with pytest.raises(ValueError, match="it unpacks to 134,217,984 bytes, but there can be"):
        import_published(tmp_path / "bomb.npz", tiny_model)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_header_that_promises_more_than_the_archive_has_allocates_nothing(tmp_path):
    header = "{'descr': '|b1', 'fortran_order': False, 'shape': (4000000000,)}\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + b"\1")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"'a\.npy' of shape \(4000000000,\) has"):
        read_masks(tmp_path / "x.npz")
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_pickle_that_uses_one_long_text_again_and_again_is_refused(tmp_path):
    text = "\1" * (1 << 20)
    encode = b"c_codecs\nencode\n"
    call = encode + b"h\x00X\x06\x00\x00\x00latin1\x86R"
    path = tmp_path / "x.pickle"
    path.write_bytes(b"\x80\x02X" + struct.pack("<I", len(text)) + text.encode() + b"q\x00" + call * 500 + b"}.")
    tracemalloc.start()
    with pytest.raises(ValueError, match="makes more bytes than the file has"):
        read_masks(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_names_in_a_file_are_never_paths(tmp_path, tiny_model):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    names = ("../../out", str(tmp_path / "out"), "../out.npy/../../out")
    masks = {name: np.ones((2, 3), bool) for name in names}
    with zipfile.ZipFile(inside / "x.npz", "w") as file:
        for name, mask in masks.items():
            np.save(held := io.BytesIO(), mask)
            file.writestr(f"{name}.npy", held.getvalue())
    (inside / "x.pickle").write_bytes(pickle.dumps(masks))
    save_file(masks, inside / "x.safetensors")
    for suffix in ("npz", "pickle", "safetensors"):
        assert set(read_masks(inside / f"x.{suffix}")[0]) == set(masks)
        with pytest.raises(ValueError, match="unknown"):
            import_published(inside / f"x.{suffix}", tiny_model)
    with pytest.raises(ValueError, match="is not the name of a weight matrix"):
        Subnetwork({name: torch.from_numpy(mask) for name, mask in masks.items()})
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a", "b", "x.npz", "x.pickle", "x.safetensors",
    ]  # fmt: skip


def test_a_path_finds_its_runs_by_number_only(all_kinds):
    kind = all_kinds["path"]
    record = unsealed(json.loads(kind.examples[0]))
    record["points"][0]["sparsity_weight"] = "../../elsewhere"
    (kind.folder / "path.json").write_text(json.dumps(sealed(record)))
    with pytest.raises(ValueError, match=r"path\.json' is damaged"):
        load_path_runs(kind.folder)


# --- models ---


@pytest.fixture
def model_folder(tiny_folders, tmp_path):
    return Path(shutil.copytree(tiny_folders["gpt_neox"], tmp_path / "model"))


def change(path, **values):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


@pytest.mark.parametrize("model_type", ["gpt_neox", "bert", "own"])
def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(model_folder, monkeypatch, model_type):
    ran = model_folder / "ran"
    (model_folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change(model_folder / "config.json", model_type=model_type, auto_map=dict.fromkeys(names, "evil.Evil"))
    change(model_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("somebody was asked"))
    if model_type == "gpt_neox":
        bc.load_model(model_folder, device="cpu")  # as the library knows it
    else:
        with pytest.raises(ValueError, match="cannot load the model"):
            bc.load_model(model_folder, device="cpu")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, but with these weights it is at most \d\d$"),
        ({"hidden_size": 2**62}, "hidden_size is"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": "many"}, "vocab_size should be a number, not 'many'"),
        ({"intermediate_size": 10**400}, "intermediate_size is"),
        ({"hidden_size": None}, "cannot load the model"),
        ({"num_labels": 10**8}, r"num_labels is 100000000, but with these weights it is at most [\d,]+$"),
        ({"text_config": {"num_labels": 10**8}}, "num_labels is 100000000"),
        ({"max_position_embeddings": 10**8}, "a max_position_embeddings of 100,000,000 is more than a context can be"),
        (
            {"vocab_size": 60_000},
            "a vocab_size of 60,000 by a hidden_size of 24 is more than its weight files hold",
        ),
    ],
)
def test_absurd_sizes_of_a_model(model_folder, values, said):
    change(model_folder / "config.json", **values)
    with pytest.raises(ValueError, match=said) as error:
        bc.load_model(model_folder, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "codegen", "mpt", "gpt_neo"])
def test_tables_of_positions_are_not_larger_than_the_weights(tmp_path, name):
    folder = save_tiny(tmp_path / name, CONFIGS[name]())
    for size in (10**5, 10**8):
        for key in ("n_positions", "max_position_embeddings", "max_seq_len"):
            if key in json.loads((folder / "config.json").read_text()):
                change(folder / "config.json", **{key: size})
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"of 100,000(,000)? (by a hidden_size|is more than a context)"):
            bc.load_model(folder, device="cpu")
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("file", ["../../other.safetensors", "../other.safetensors", "sub/x.safetensors", "/x", 3])
def test_weights_outside_of_a_models_folder(model_folder, index, file):
    change(model_folder / index, weight_map={"a": "model.safetensors", "x": file})  # beside a decoy
    with pytest.raises(ValueError, match=rf"{index}' names weights outside of its folder"):
        bc.load_model(model_folder, device="cpu")


def test_weights_that_the_config_names_outside_of_the_folder(model_folder, tmp_path):
    shutil.move(model_folder / "model.safetensors", tmp_path / "other.safetensors")
    (model_folder / "decoy.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes())
    change(model_folder / "config.json", transformers_weights="../other.safetensors")
    with pytest.raises(ValueError, match="cannot load the model"):
        bc.load_model(model_folder, device="cpu")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_a_models_folder_is_refused_and_one_within_or_of_the_hub_s_cache_is_not(
    model_folder, tmp_path, file
):
    def link(to):
        (model_folder / file).unlink(missing_ok=True)
        (model_folder / file).symlink_to(to)

    shutil.copy(model_folder / file, tmp_path / "outside")
    shutil.copy(model_folder / file, model_folder / "inside")
    link(tmp_path / "outside")
    with pytest.raises(ValueError, match=rf"{file}' is a link to '.*/outside', outside of the model's folder: copy"):
        bc.load_model(model_folder, device="cpu")
    link("inside")
    bc.load_model(model_folder, device="cpu")
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "c0ffee"
    shutil.copytree(model_folder, snapshot)
    blobs.mkdir()
    (snapshot / file).unlink()
    shutil.copy(tmp_path / "outside", blobs / "abc")
    (snapshot / file).symlink_to(blobs / "abc")
    bc.load_model(snapshot, device="cpu")


def test_loading_from_this_machine_makes_no_connection(model_folder, all_kinds, monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"a connection: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    model = bc.load_model(model_folder, device="cpu")
    bc.load_model("reference", device="cpu")
    bc.export_huggingface(model, bc.Subnetwork.full(model), model_folder.parent / "exported")
    texts = [f"some text {number} " * 9 for number in range(9)]
    bc.load_corpus(texts, tokenizer=model.tokenizer, context_length=8)
    for name in ("subnetwork", "n-gram table", "result", "path", "published pickle", "corpus: corpus.jsonl"):
        kind = all_kinds[name]
        (kind.folder / kind.file).write_bytes(kind.examples[0])
        kind.load(kind.folder)


# --- the code ---


def calls():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path.relative_to(PACKAGE).as_posix(), node, ast.unparse(node.func)


def test_nothing_that_can_run_code_reads_a_file():
    forbidden = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads"}
    forbidden |= {"marshal.loads", "shelve.open", "joblib.load", "pickle.Unpickler", "yaml.load", "np.fromregex"}
    for path, node, name in calls():
        if name == "torch.load":  # restricted to tensors
            assert any(key.arg == "weights_only" and ast.unparse(key.value) == "True" for key in node.keywords)
            continue
        assert name not in forbidden, f"{path}:{node.lineno} calls {name}"
        if name == "subprocess.run":  # to ask SLURM for its queue
            assert ast.unparse(node.args[0]) == "_SQUEUE", f"{path}:{node.lineno} starts {ast.unparse(node.args[0])}"
            continue
        assert not name.startswith(("subprocess.", "cloudpickle.", "dill.")), f"{path}:{node.lineno} calls {name}"
        if name in ("np.load", "numpy.load"):
            assert any(key.arg == "allow_pickle" and ast.unparse(key.value) == "False" for key in node.keywords)
    for path in PACKAGE.rglob("*.py"):
        assert "Unpickler" not in path.read_text(), f"{path} runs pickles"


def test_code_that_comes_with_a_model_is_never_trusted():
    for path, node, _ in calls():
        for keyword in node.keywords:
            if keyword.arg == "trust_remote_code":
                assert ast.unparse(keyword.value) == "False", f"{path}:{node.lineno}"
    for path in PACKAGE.rglob("*.py"):
        assert "trust_remote_code=True" not in path.read_text()


def test_only_the_doors_to_the_hub_and_to_an_index_use_a_network():
    network = {"socket", "ssl", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "webbrowser"}
    doors = {"converted.py", "loading.py", "published.py", "sharing.py", "sources.py"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.partition(".")[0]
                assert top not in network or path.name == "indexes.py", f"{path.name} imports {name}"
                assert top not in ("huggingface_hub", "datasets") or path.name in doors, f"{path.name} imports {name}"
