import os
import pickle
import pickletools
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import published
from bigram_circuits.published import import_published, load_published, read_masks
from bigram_circuits.storage import pickles
from tests.conftest import hub_response


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox"])
def model(request, tiny_folders):
    return bc.load_model(tiny_folders[request.param], device="cpu")


@pytest.fixture(scope="module")
def neox(tiny_folders):
    return bc.load_model(tiny_folders["gpt_neox"], device="cpu")


def half_of(model):
    generator = torch.Generator().manual_seed(5)
    shapes = bc.Subnetwork.full(model).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})


def as_arrays(model, subnetwork):
    return {name: mask.numpy() for name, mask in subnetwork.to_huggingface(model).items()}


def write(tmp_path, content, name="mask.pickle"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return path


def pickled_by(version, value, protocol):
    """A pickle as numpy before or after 2.0 writes it: they differ in the name of one module."""
    content = pickle.dumps(value, protocol)
    old, new = b"numpy.core.", b"numpy._core."
    assert new in content
    if version == "old":
        if protocol >= 4:  # the length of a name comes before it, and that of a frame: without frames, as one may
            content = pickletools.optimize(content)
            for part in (b"multiarray", b"numeric"):
                long, short = new + part, old + part
                content = content.replace(bytes([0x8C, len(long)]) + long, bytes([0x8C, len(short)]) + short)
            content = without_frames(content)
        else:
            content = content.replace(new, old)
        assert new not in content
    return content


def without_frames(content):
    """A frame's length need not be right if there are no frames."""
    assert content[2] == 0x95
    return content[:2] + content[11:]


# --- what is right ---


@pytest.mark.parametrize("version", ["old", "new"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_numpy_and_protocol(neox, tmp_path, version, protocol):
    half = half_of(neox)
    masks = as_arrays(neox, half)
    masks = {name: np.asfortranarray(mask) if "dense" in name else mask for name, mask in masks.items()}
    path = write(tmp_path, pickled_by(version, {"orig_model_name": "some/model", **masks}, protocol))
    read, name = read_masks(path)
    assert name == "some/model"
    assert all(np.array_equal(read[key], mask) for key, mask in masks.items())
    assert import_published(path, neox) == half


@pytest.mark.parametrize("ending", [".pickle", ".pkl", ".npz", ".safetensors"])
def test_every_kind_of_file_gives_the_same_subnetwork(model, tmp_path, ending):
    half = half_of(model)
    path = tmp_path / f"mask{ending}"
    if ending in (".npz", ".safetensors"):
        bc.export_masks(model, half, path)
    else:
        write(tmp_path, as_arrays(model, half), path.name)
    subnetwork = import_published(path, model)
    assert subnetwork == half
    assert subnetwork.weight_hash == bc.weight_hash(model)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_it_gives_what_the_ordinary_loader_gives(tmp_path, protocol):
    rng = np.random.default_rng(protocol)
    three = rng.random((3, 4, 5)) < 0.5
    masks = {
        "matrix": rng.random((40, 30)) < 0.5,
        "by columns": np.asfortranarray(rng.random((4, 7)) < 0.5),
        "a part of one": three[:, ::2],
        "axes in another order": three.transpose(1, 0, 2),
        "long": rng.random(70_000) < 0.5,  # outside of a frame
        "a single number": np.array(True),
        "read only": np.frombuffer(b"\0\1", dtype=bool),
        "ünïcode\n": np.ones(300, bool),
    }
    if protocol > 2:  # which writes no bytes by a call
        masks["empty"] = np.zeros((0, 3), bool)
    content = {"orig_model_name": "gpt2", **masks, **{f"h.{n}.weight": rng.random((3, 2)) < 0.5 for n in range(300)}}
    content["twice"] = content["matrix"]
    path = write(tmp_path, pickle.dumps(content, protocol))
    trusted = pickle.loads(path.read_bytes())
    read, made_for = read_masks(path)
    assert made_for == trusted.pop("orig_model_name")
    assert list(read) == list(trusted)
    for key, mask in trusted.items():
        assert (read[key].dtype, read[key].shape) == (mask.dtype, mask.shape), key
        assert read[key].flags.f_contiguous == mask.flags.f_contiguous, key
        np.testing.assert_array_equal(read[key], mask, key)


# --- what is hostile: refused in one line, and nothing runs ---


class Calls:
    """Pickled, a call of a function; unpickled by the ordinary reader, it is made."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def operations(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def frame(content):
    return b"\x95" + struct.pack("<Q", len(content)) + content


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


RECONSTRUCT = name("numpy._core.multiarray", "_reconstruct")
NDARRAY = name("numpy", "ndarray")
EMPTY = RECONSTRUCT + NDARRAY + b"K\x00\x85C\x01b\x87R"
BOOL = name("numpy", "dtype") + text("b1") + b"\x89\x88\x87R"
# the last object, also object 0 of the memo, holds the one before twice, and so on
GRAPH = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60
# what follows the outer frame is data to a reader that goes on, and operations to one that starts the inner frame there
FRAME_IN_FRAME = b"\x80\x04" + frame(b"\x95" + struct.pack("<Q", 10) + b"C\x0a") + b"Nr\xff\xff\xff\x0f0}..."
HOSTILE = {
    "system": lambda mark: pickle.dumps({"w": Calls(os.system, f"touch {mark}")}),
    "open": lambda mark: pickle.dumps({"w": Calls(open, str(mark), "w")}),
    "eval": lambda mark: pickle.dumps({"w": Calls(eval, f"open({str(mark)!r}, 'w')")}),
    "getattr": lambda mark: pickle.dumps({"w": Calls(getattr, "text", "upper")}),
    "numpy load": lambda mark: operations(name("numpy", "load"), text(str(mark)), b"\x85R"),
    "numpy memmap": lambda mark: pickle.dumps({"w": Calls(np.memmap, str(mark), "u1", "w+", 0, (3,))}),
    "a dotted name": lambda mark: (
        b"\x80\x04" + text("numpy") + text("ndarray.tofile") + b"\x93" + text(str(mark)) + b"\x85R."
    ),
    "a protocol 0 pickle": lambda mark: b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
    "INST": lambda mark: b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.",
    "object array": lambda mark: pickle.dumps({"w": np.array([Calls(os.system, f"touch {mark}")], dtype=object)}),
    "object dtype with bytes": lambda mark: operations(
        EMPTY, b"(K\x01K\x01\x85", name("numpy", "dtype"), text("O8"), b"\x89\x88\x87R", b"\x89C\x08" + b"\1" * 8, b"tb"
    ),
    "ndarray itself": lambda mark: operations(NDARRAY, b"K\x05\x85\x85R"),
    "another class to reconstruct": lambda mark: operations(RECONSTRUCT, BOOL, b"K\x00\x85C\x01b\x87R"),
    "a changed function": lambda mark: operations(RECONSTRUCT, b"}", text("__defaults__"), b"K\x01\x85s", b"b"),
    "a changed dtype": lambda mark: operations(NDARRAY, b"N}", text("_make"), NDARRAY, b"s\x86b"),
    "too few bytes": lambda mark: operations(EMPTY, b"(K\x01J\xff\xff\xff\x7f\x85", BOOL, b"\x89C\x01\x01tb"),
    "a negative shape": lambda mark: operations(EMPTY, b"(K\x01J\xff\xff\xff\xff\x85", BOOL, b"\x89C\x01\x01tb"),
    "not 0 or 1": lambda mark: operations(EMPTY, b"(K\x01K\x01\x85", BOOL, b"\x89C\x01\x02tb"),
    "a dtype as data": lambda mark: operations(EMPTY, b"(K\x01K\x00\x85", BOOL, b"\x89", BOOL, b"tb"),
    "float array": lambda mark: pickle.dumps({"w": np.zeros(3)}),
    "integer array": lambda mark: pickle.dumps({"w": np.zeros(3, dtype=np.int8)}),
    "structured array": lambda mark: pickle.dumps({"w": np.zeros(3, dtype=[("a", "b1")])}),
    "a list": lambda mark: pickle.dumps([True]),
    "a number": lambda mark: pickle.dumps({"w": 3}),
    "a dict in it": lambda mark: pickle.dumps({"w": {"x": np.zeros(3, dtype=bool)}}),
    "a key that is no name": lambda mark: pickle.dumps({3: np.zeros(3, dtype=bool)}),
    "a name that is none": lambda mark: pickle.dumps({"orig_model_name": 3}),
    "an extension": lambda mark: operations(b"\x82\x01"),
    "a persistent id": lambda mark: operations(text("x"), b"Q"),
    "deep": lambda mark: operations(b"]" * 150_000),
    "deep, of what is allowed": lambda mark: operations(b")" + b"\x85" * 150_000),
    "a huge memo": lambda mark: operations(b"}r\xff\xff\xff\x7f"),
    "a huge string": lambda mark: operations(b"X\xff\xff\xff\x7f" + b"x"),
    "huge bytes": lambda mark: b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "a huge frame": lambda mark: b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "a huge number": lambda mark: operations(b"\x8b\xff\xff\xff\x7f1"),
    "a repeat without end": lambda mark: operations(b"h\x07"),
    "a frame in a frame": lambda mark: FRAME_IN_FRAME,
    "an operation across the end of a frame": lambda mark: b"\x80\x04" + frame(b"}C\x08xx") + b"x" * 6 + b"0.",
    "a graph of tuples as a key": lambda mark: operations(GRAPH, b"}h\x00Ns"),
    "a graph of tuples in a dtype": lambda mark: operations(GRAPH, name("numpy", "dtype"), b"h\x00\x85R"),
    "a graph of tuples as a dtype's arguments": lambda mark: operations(GRAPH, name("numpy", "dtype"), b"h\x00R"),
    "a graph of tuples as a shape": lambda mark: operations(GRAPH, EMPTY, b"(K\x01h\x00", BOOL, b"\x89C\x01\x01tb"),
    "a graph of tuples as a state": lambda mark: operations(GRAPH, EMPTY, b"h\x00b"),
    "a graph of tuples as a name": lambda mark: b"\x80\x04" + GRAPH + b"h\x00" + text("ndarray") + b"\x93.",
    "a dict in itself": lambda mark: operations(b"}q\x00", text("w"), b"h\x00s"),
    "an array in itself": lambda mark: operations(EMPTY, b"q\x00(K\x01h\x00", BOOL, b"\x89C\x01\x01tb"),
    "a huge product of sizes": lambda mark: operations(
        EMPTY, b"(K\x01(" + b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f" * 15_000 + b"t", BOOL, b"\x89C\x01\x01tb"
    ),
    "a number of 255 bytes": lambda mark: operations(b"\x8a\xff" + b"\x7f" * 255),
    "too many axes": lambda mark: operations(EMPTY, b"(K\x01(" + b"K\x01" * 33 + b"t", BOOL, b"\x89C\x01\x01tb"),
    "many arrays of the same bytes": lambda mark: operations(
        b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20), b"q\x00", BOOL, b"q\x01}(",
        b"".join(text(str(n)) + EMPTY + b"(K\x01J\0\0\x10\0\x85h\x01\x89h\x00tb" for n in range(1000)), b"u",
    ),
    "a long key again and again": lambda mark: operations(
        b"}(", b"".join(text("k" * (1 << 20)) + b"q" + bytes([n]) for n in (0, 1)), b"h\x00Nh\x01N" * 4_000, b"u"
    ),
    "one name twice": lambda mark: operations(b"}(", text("w"), EMPTY, text("w"), EMPTY, b"u"),
    "a long name of a model": lambda mark: pickle.dumps({"orig_model_name": "m" * 5000}),
    "more after its end": lambda mark: pickle.dumps({"w": np.zeros(3, dtype=bool)}) + b"x",
    "more than one object": lambda mark: operations(b"}}"),
    "an item of what is not there": lambda mark: operations(b"}(", text("w"), b"s"),
    "a mark that is not there": lambda mark: operations(b"}u"),
    "half an item": lambda mark: operations(b"}(", text("w"), b"u"),
    "a protocol that does not exist": lambda mark: b"\x80\x06}.",
    "a line without end": lambda mark: operations(b"c" + b"x" * 5000),
    "an array built twice": lambda mark: operations(
        b"}", text("w"), EMPTY, (b"(K\x01K\x01\x85" + BOOL + b"\x89C\x01\x01tb") * 2, b"s"
    ),
    "axes that are not there": lambda mark: operations(
        name("numpy._core.numeric", "_frombuffer"), b"(C\x01\x01", BOOL, b"K\x01\x85", text("K"), b"K\x05\x85tR"
    ),
    "nothing": lambda mark: b"",
    "no pickle": lambda mark: b"not a pickle at all",
    "cut short": lambda mark: pickle.dumps({"w": np.zeros(300, dtype=bool)})[:-40],
}  # fmt: skip


@pytest.mark.parametrize("attack", list(HOSTILE))
def test_a_hostile_pickle_is_refused_in_one_line_and_runs_nothing(tmp_path, attack):
    mark = tmp_path / "ran"
    path = write(tmp_path, HOSTILE[attack](mark))
    with pytest.raises(ValueError, match=r"mask\.pickle' is not a file of masks: ") as error:
        read_masks(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert not mark.exists()


def test_a_pickle_of_too_many_operations_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "_MOST_OPERATIONS", 1000)
    with pytest.raises(ValueError, match="the pickle has more than 1,000 opcodes"):
        read_masks(write(tmp_path, operations(b"N" * 2000)))


TIMED = """
import resource, sys, time
from pathlib import Path
from bigram_circuits.storage.pickles import read_boolean_arrays
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
for path in map(Path, sys.argv[1:]):
    started = time.process_time()
    try:
        read_boolean_arrays(path, most=1 << 32)
    except ValueError:
        pass
    assert time.process_time() - started < 0.9, path.name
assert peak() - before < 1 << 26, f"{peak() - before:,} bytes"
"""


def test_no_attack_takes_long_or_much_memory(tmp_path):
    """In a process of its own, where nothing else checks types or takes memory."""
    contents = {name: attack(tmp_path / "ran") for name, attack in HOSTILE.items()}
    contents["very many"] = operations(b"N" * 300_000)
    files = [write(tmp_path, content, f"{name}.pickle") for name, content in contents.items()]
    done = subprocess.run([sys.executable, "-c", TIMED, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_attacks_are_real(tmp_path):
    mark = tmp_path / "ran"
    pickle.loads(HOSTILE["open"](mark))["w"].close()
    assert mark.exists()


@pytest.mark.parametrize("damage", ["no zip", "object", "cut"])
def test_a_hostile_or_damaged_npz(tmp_path, damage):
    path = tmp_path / "mask.npz"
    np.savez(path, w=np.array([Calls(os.system, "false")], dtype=object) if damage == "object" else np.zeros(9, bool))
    if damage == "no zip":
        path.write_bytes(b"nothing")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"mask\.npz' is not a file of masks: ") as error:
        read_masks(path)
    assert "\n" not in str(error.value)


def test_a_damaged_safetensors_file(tmp_path):
    with pytest.raises(ValueError, match="is not a file of masks"):
        read_masks(write(tmp_path, b"nothing of the kind", "mask.safetensors"))


# --- bad input ---


def test_a_file_that_is_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_masks(tmp_path / "mask.pickle")
    with pytest.raises(ValueError, match=r"should be a \.pickle, \.npz or \.safetensors file"):
        read_masks(write(tmp_path, b"", "mask.bin"))


def masks_of(neox):
    return as_arrays(neox, bc.Subnetwork.full(neox))


QKV = "gpt_neox.layers.1.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda masks: masks.pop(QKV), f"missing by Hugging Face name: {QKV}"),
        (lambda masks: masks.update(wrong=np.ones(3, bool)), "unknown by Hugging Face name: wrong"),
        (lambda masks: masks.update({QKV: masks[QKV][:24]}), r"has shape \(24, 24\) but should have \(72, 24\)"),
        (lambda masks: masks.update({QKV: masks[QKV].T}), r"has shape \(24, 72\) but should have \(72, 24\)"),
        (lambda masks: masks.update({QKV: masks[QKV].astype(np.uint8)}), "has dtype uint8 but should be a boolean"),
        (lambda masks: masks.update({QKV: [True]}), "has type list but should be a boolean"),
        (
            lambda masks: masks.update({"gpt_neox.embed_in.weight": np.arange(257 * 24).reshape(257, 24) > 1}),
            r"gpt_neox.embed_in.weight drops 2 of 6168 weights, but embeddings, norms and biases are always kept",
        ),
        (
            lambda masks: masks.update({"gpt_neox.embed_in.weight": np.ones(3, bool)}),
            r"gpt_neox.embed_in.weight has shape \(3,\) but should have \(257, 24\)",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name(neox, change, said):
    masks = masks_of(neox)
    change(masks)
    with pytest.raises(ValueError, match=said) as error:
        bc.Subnetwork.from_huggingface(masks, neox)
    assert "\n" not in str(error.value)


def test_a_mask_of_what_is_never_masked_may_be_given_if_it_keeps_all(neox):
    masks = masks_of(neox) | {"gpt_neox.embed_in.weight": np.ones((257, 24), bool)}
    assert bc.Subnetwork.from_huggingface(masks, neox) == bc.Subnetwork.full(neox)


def test_masks_of_another_architecture_or_width(tiny_folders, neox, reference_model, tmp_path):
    gpt2 = bc.load_model(tiny_folders["gpt2"])
    with pytest.raises(ValueError, match=r"mask\.pickle': the masks do not fit the model: unknown"):
        import_published(write(tmp_path, masks_of(gpt2)), neox)
    with pytest.raises(ValueError, match=r"do not fit|should have"):
        import_published(write(tmp_path, masks_of(neox)), reference_model)


def test_a_mask_made_for_another_model_is_refused_where_names_can_be_compared(neox, tmp_path, monkeypatch):
    path = write(tmp_path, {"orig_model_name": "openai-community/gpt2", **masks_of(neox)})
    import_published(path, neox)  # a folder may hold any model
    for ours, refused in [("gpt2", False), ("openai-community/gpt2", False), ("EleutherAI/pythia-70m", True)]:
        monkeypatch.setattr(neox.cfg, "model_name", ours)
        if refused:
            with pytest.raises(ValueError, match="was made for the model 'openai-community/gpt2', but this model is"):
                import_published(path, neox)
        else:
            import_published(path, neox)


# --- from the hub (a stand-in for it) ---


@pytest.fixture
def hub(monkeypatch, neox, tmp_path):
    """A hub with masks of one model: lambda 1 keeps all, 10 half, 100 none."""
    import huggingface_hub

    half = half_of(neox)
    kept = {"1": bc.Subnetwork.full(neox), "1e1": half, "1e2": bc.Subnetwork.empty(neox)}
    spelled = {"1": "1", "1e1": "lambda1e1", "1e2": "lambda1e2"}  # with and without the word
    files = {f"subnetwork_dict_{spelled[key]}.pickle": value for key, value in kept.items()}
    asked = []

    def model_info(self, repo_id, *, revision=None, timeout=None):
        asked.append(repo_id)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in [*files, "README.md"]])

    def download(repo_id, filename, *, revision=None):
        content = {"orig_model_name": "EleutherAI/pythia-70m", **as_arrays(neox, files[filename])}
        return str(write(tmp_path, content, filename))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return kept, asked


def test_released_masks_by_lambda(hub, neox):
    kept, asked = hub
    assert load_published("EleutherAI/pythia-70m", model=neox) == kept["1e2"]  # the sparsest, if none is named
    for sparsity in (10, 10.0, "1e1", "lambda1e1"):
        assert load_published("EleutherAI/pythia-70m", sparsity, model=neox) == kept["1e1"]
    assert set(asked) == {"tylerachang/bigram-subnetworks-pythia-70m"}
    load_published("openai-community/gpt2", 1, model=neox)
    assert asked[-1] == "tylerachang/bigram-subnetworks-gpt2-small"


def test_a_lambda_that_was_not_released(hub, neox):
    with pytest.raises(ValueError, match=r"has no mask of lambda 7: it has 1, 10, 100"):
        load_published("EleutherAI/pythia-70m", 7, model=neox)
    with pytest.raises(ValueError, match="sparsity should be a lambda such as 10"):
        load_published("EleutherAI/pythia-70m", "many", model=neox)


def test_the_model_is_loaded_if_it_is_not_given(hub, neox, monkeypatch):
    monkeypatch.setattr(published, "load_model", lambda name: neox if name == "EleutherAI/pythia-70m" else None)
    assert load_published("EleutherAI/pythia-70m", 10) == hub[0]["1e1"]


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("RepositoryNotFoundError", "there is no repository 'tylerachang/bigram-subnetworks-none' on the hub$"),
        ("HfHubHTTPError", r"the hub refused the repository .* \(HTTP 404\)"),
    ],
)
def test_what_the_hub_says_is_said_in_one_line(monkeypatch, neox, raised, said):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_, **__):
        raise getattr(errors, raised)("long\ntext", response=hub_response(404))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(OSError, match=said) as error:
        load_published("someone/none", model=neox)
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_said_in_one_line_at_once(no_network, neox, capfd, caplog):
    started = time.monotonic()
    for ask in (load_published, bc.pull_subnetwork):
        with pytest.raises(OSError, match="cannot reach the model hub for the repository") as error:
            ask("someone/none", model=neox)
        assert "\n" not in str(error.value)
    assert time.monotonic() - started < 10  # retries would take half a minute
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
