"""Edits by head, neuron and layer, counts by part, and files."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import bigram_circuits as bc
from bigram_circuits.subnetwork import Count, Subnetwork

MATRICES = {
    "attn.W_Q": (4, 5, 3), "attn.W_K": (2, 5, 3), "attn.W_V": (2, 5, 3), "attn.W_O": (4, 3, 5),
    "mlp.W_in": (5, 7), "mlp.W_gate": (5, 7), "mlp.W_out": (7, 5),
}  # fmt: skip


def constant(value, n_layers=2, **changed):
    matrices = MATRICES | {f"attn.{name}": shape for name, shape in changed.items()}
    return Subnetwork(
        {f"blocks.{layer}.{n}": torch.full(shape, value) for layer in range(n_layers) for n, shape in matrices.items()}
    )


full, empty = constant(True), constant(False)
seeds = st.integers(0, 1 << 30)


def random_one(seed):
    generator = torch.Generator().manual_seed(seed)
    return Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in full.shapes.items()})


def kept_by_name(subnetwork):
    return {name: count.kept for name, count in subnetwork.by_weight().items() if count.kept}


def test_a_kept_head_has_what_it_needs_and_a_dropped_one_leaves_what_it_shares():
    one = empty.keep_head(1, 3)
    assert kept_by_name(one) == {f"blocks.1.attn.{name}": 15 for name in ("W_Q", "W_K", "W_V", "W_O")}
    assert one["blocks.1.attn.W_K"][1].all()  # 4 query heads, 2 of keys and values
    dropped = ~full.drop_head(1, 3)
    assert kept_by_name(dropped) == {"blocks.1.attn.W_Q": 15, "blocks.1.attn.W_O": 15}
    assert one["blocks.1.attn.W_Q"][3].all()
    assert one["blocks.1.attn.W_O"][3].all()
    own = constant(False, W_K=(4, 5, 3), W_V=(4, 5, 3)).keep_head(0, 2)
    assert kept_by_name(own) == {f"blocks.0.attn.{name}": 15 for name in ("W_Q", "W_K", "W_V", "W_O")}
    assert all(own[f"blocks.0.attn.{name}"][2].all() for name in ("W_Q", "W_K", "W_V", "W_O"))


def test_kept_neurons_are_their_columns_in_and_rows_out():
    some = empty.keep_neurons(0, [1, 6])
    assert kept_by_name(some) == {f"blocks.0.mlp.{name}": 10 for name in ("W_in", "W_gate", "W_out")}
    assert some["blocks.0.mlp.W_in"][:, [1, 6]].all()
    assert some["blocks.0.mlp.W_gate"][:, [1, 6]].all()
    assert some["blocks.0.mlp.W_out"][[1, 6]].all()
    reordered = Subnetwork({name: empty[name] for name in reversed(list(empty))})  # whatever the order of the weights
    assert reordered.keep_neurons(0, [1, 6]) == some
    assert reordered.keep_head(1, 3) == empty.keep_head(1, 3)


@given(seed=seeds)
def test_only_keeps_what_is_there_and_nothing_else(seed):
    some = random_one(seed).named("some")
    assert some.only(layers=[1]) == some.only(layers=1) == some & empty.add_layer(1) == some.drop_layer(0)
    assert some.only(heads=[(1, 3)]) == some & empty.add_head(1, 3)
    assert some.only(neurons=[(0, 1), (0, 6)]) == some.only(neurons={0: [1, 6]}) == some & empty.add_neurons(0, [1, 6])
    several = some.only(layers=[0], heads={1: range(2)}, neurons=[(1, 5)])
    part = empty.add_layer(0).add_head(1, 0).add_head(1, 1).add_neurons(1, [5])
    assert several == some & part
    assert several - some == empty
    assert some.only(layers=range(2)) == some


def test_only_says_what_it_kept_and_what_is_wrong():
    some = full.named("found").drop_head(0, 0)
    assert some.only(layers=0, heads=[(1, 2)]).lineage == "(found - L0H0) & (L0 | L1H2)"
    assert full.named("found").only(neurons={0: [3, 4]}).lineage == "found & L0N[3,4]"
    for call, words in (
        (lambda: some.only(), r"only\(\) needs the parts to keep: layers=, heads= or neurons="),
        (lambda: some.only(layers=[2]), "no layer 2: layers are 0 to 1"),
        (lambda: some.only(heads=[(0, 4)]), "no head 4 in layer 0"),
        (lambda: some.only(neurons=[(1, 7)]), "no neuron 7 in layer 1"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_former_names_add_as_before():
    some = random_one(0)
    assert some.keep_layer(1) == some.add_layer(1)
    assert some.keep_head(1, 2) == some.add_head(1, 2)
    assert some.keep_neurons(0, [2]) == some.add_neurons(0, [2])


@given(seed=seeds, layer=st.integers(0, 1), head=st.integers(0, 3), neurons=st.lists(st.integers(0, 6)))
def test_edits_are_unions_and_differences_with_the_part(seed, layer, head, neurons):
    subnetwork = random_one(seed)
    parts = {"head": (layer, head), "neurons": (layer, neurons), "layer": (layer,)}
    for kind, arguments in parts.items():
        part = getattr(empty, f"keep_{kind}")(*arguments)
        lost = ~getattr(full, f"drop_{kind}")(*arguments)
        assert (lost - part).kept == 0
        assert (lost == part) == (kind != "head")  # a head shares its keys and values
        assert getattr(subnetwork, f"keep_{kind}")(*arguments) == subnetwork | part
        assert getattr(subnetwork, f"drop_{kind}")(*arguments) == subnetwork - lost


@given(seed=seeds)
def test_counts_by_component_and_head_add_up_to_the_whole(seed):
    subnetwork = random_one(seed)
    components = subnetwork.by_component()
    assert list(components) == [(0, "attn"), (0, "mlp"), (1, "attn"), (1, "mlp")]
    assert sum(count.kept for count in components.values()) == subnetwork.kept
    assert sum(count.total for count in components.values()) == subnetwork.total
    counts = subnetwork.by_weight()
    for (layer, _), kept in [((layer, head), count) for (layer, head), count in subnetwork.by_head().items()]:
        assert kept.total == 30, layer
    for layer in (0, 1):
        heads = [subnetwork.by_head()[layer, head].kept for head in range(4)]
        assert sum(heads) == counts[f"blocks.{layer}.attn.W_Q"].kept + counts[f"blocks.{layer}.attn.W_O"].kept
        assert heads == [(subnetwork & ~full.drop_head(layer, head)).kept for head in range(4)]
    assert Count(1, 4).fraction == 0.25


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda it: it.keep_head(0, 4), "no head 4 in layer 0: it has heads 0 to 3"),
        (lambda it: it.drop_head(0, -1), "no head -1"),
        (lambda it: it.keep_head(2, 0), "no layer 2: layers are 0 to 1"),
        (lambda it: it.keep_neurons(1, [0, 7]), "no neuron 7 in layer 1: it has neurons 0 to 6"),
        (lambda it: it.drop_neurons(1, [-1]), "no neuron -1"),
        (lambda it: it.drop_layer(-1), "no layer -1"),
    ],
)
def test_a_part_that_is_not_there_is_refused(edit, message):
    with pytest.raises(ValueError, match=message):
        edit(full)


def test_a_subnetwork_without_attention_or_mlp_says_so():
    mlp = Subnetwork({name: mask for name, mask in full.items() if ".mlp." in name})
    attention = Subnetwork({name: mask for name, mask in full.items() if ".attn." in name})
    assert mlp.by_head() == {}
    assert list(attention.by_component()) == [(0, "attn"), (1, "attn")]
    with pytest.raises(ValueError, match="layer 0 of this subnetwork has no W_Q"):
        mlp.keep_head(0, 0)
    with pytest.raises(ValueError, match="layer 1 of this subnetwork has no W_out"):
        attention.drop_neurons(1, [0])


# --- files ---


@pytest.fixture
def saved(tmp_path):
    subnetwork = Subnetwork(dict(random_one(0)), model_name="some/model", weight_hash="ab12")
    subnetwork.save(tmp_path / "new" / "subnetwork.safetensors")
    return subnetwork, tmp_path / "new" / "subnetwork.safetensors"


def rewrite(path, change):
    with safe_open(path, framework="np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def test_save_and_load_give_the_same_subnetwork_in_the_same_order(saved):
    subnetwork, path = saved
    loaded = Subnetwork.load(path)
    assert loaded == subnetwork
    assert list(loaded) == list(subnetwork)
    assert (loaded.model_name, loaded.weight_hash) == ("some/model", "ab12")
    assert path.stat().st_size < subnetwork.total / 8 + 4_000  # one bit a weight, and the header
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    Subnetwork(dict(subnetwork)).save(path)
    assert (Subnetwork.load(path).model_name, Subnetwork.load(path).weight_hash) == (None, None)


def flip_a_bit(metadata, tensors):
    tensors["blocks.0.mlp.W_in"][0] ^= 0x10


def lose_a_tensor(metadata, tensors):
    del tensors["blocks.0.mlp.W_in"]


def shorten_a_tensor(metadata, tensors):
    tensors["blocks.0.mlp.W_in"] = tensors["blocks.0.mlp.W_in"][:-1]


def widen_a_tensor(metadata, tensors):
    tensors["blocks.0.mlp.W_in"] = tensors["blocks.0.mlp.W_in"].astype("int64")


def change_a_shape(metadata, tensors):
    metadata["shapes"] = json.dumps(json.loads(metadata["shapes"]) | {"blocks.0.mlp.W_in": [50, 7]})


def change_the_total(metadata, tensors):
    metadata["total"] = "7"


@pytest.mark.parametrize(
    "change", [flip_a_bit, lose_a_tensor, shorten_a_tensor, widen_a_tensor, change_a_shape, change_the_total]
)
def test_a_damaged_file_is_refused(saved, change):
    rewrite(saved[1], change)
    with pytest.raises(ValueError, match=r"subnetwork.safetensors' is damaged"):
        Subnetwork.load(saved[1])


def test_a_file_that_is_something_else_is_refused(saved, tmp_path):
    rewrite(saved[1], lambda metadata, _: metadata.update(format="bigram_circuits.subnetwork/99"))
    with pytest.raises(ValueError, match=r"subnetwork/99', but 'bigram_circuits.subnetwork/1' is needed"):
        Subnetwork.load(saved[1])
    (tmp_path / "text").write_text("no subnetwork")
    with pytest.raises(ValueError, match="is not a subnetwork file"):
        Subnetwork.load(tmp_path / "text")
    with pytest.raises(ValueError, match="is a folder"):
        Subnetwork.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Subnetwork.load(tmp_path / "nothing")


def test_a_file_for_other_weights_is_refused_and_for_the_same_in_any_precision_taken(tiny_folders, tmp_path):
    path = tmp_path / "subnetwork.safetensors"
    model = bc.load_model(tiny_folders["llama"], device="cpu")
    made = Subnetwork.full(model).drop_layer(0)
    made.save(path)
    assert Subnetwork.load(path, model=model) == made
    assert Subnetwork.load(path, model=bc.load_model(tiny_folders["llama"], device="cpu", dtype="bfloat16")) == made
    with torch.no_grad():
        bc.weight_sites(model)[-1].original[0, 0] += 1.0
    with pytest.raises(ValueError, match=r"was made for .*, but .* is another model \(weights in float32 with hash"):
        Subnetwork.load(path, model=model)


def test_lineage_tells_how_a_subnetwork_was_made(tmp_path):
    bigram, other = random_one(0).named("bigram"), random_one(1).named("other")
    assert full.named("full").lineage == "full"
    assert bigram.keep_head(1, 2).lineage == "bigram | L1H2"
    assert bigram.keep_head(1, 2).keep_layer(0).lineage == "bigram | L1H2 | L0"
    assert bigram.keep_head(1, 2).drop_neurons(0, [3, 4]).lineage == "(bigram | L1H2) - L0N[3,4]"
    assert bigram.drop_neurons(0, range(6)).lineage == "bigram - L0N[6 of them]"
    assert ((bigram - other) & ~(bigram | other)).lineage == "(bigram - other) & ~(bigram | other)"
    assert (bigram - (other - bigram)).lineage == "bigram - (other - bigram)"
    assert bigram.random_like(seed=4).lineage == "random 4 like bigram"
    bigram.keep_head(1, 2).save(tmp_path / "some.safetensors")
    loaded = Subnetwork.load(tmp_path / "some.safetensors")
    assert loaded.lineage == "bigram | L1H2"
    assert loaded == bigram.keep_head(1, 2).named("anything")
    assert repr(loaded).startswith("Subnetwork(bigram | L1H2: ")
