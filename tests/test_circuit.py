"""Circuits: sets of nodes, applied through hooks, compared with plain Hugging Face hooks and with weight masks."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.models.loading import plain_of

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(0, 257, (3, 12), generator=torch.Generator().manual_seed(3))
TEXT = np.random.default_rng(0).integers(0, 257, (6, 12))
UNITS = ("head", "neuron", "attn", "mlp", "blocks.1.hook_resid_pre")


def logits(model):
    with torch.no_grad():
        return model(TOKENS)


@pytest.fixture
def some(any_model):
    return bc.Circuit.full(any_model).random_like() - bc.Circuit.empty(any_model).keep("L0H0", "L1N3")


# --- theorems ---


def test_the_full_circuit_is_the_model_and_the_empty_one_has_none_of_its_nodes(any_model):
    whole = logits(any_model)
    for units in UNITS:
        with bc.masked(any_model, bc.Circuit.full(any_model, units)):
            assert torch.equal(logits(any_model), whole)
    with bc.masked(any_model, bc.Circuit.empty(any_model, ("attn", "mlp"))):
        alone = logits(any_model)
    embedding = any_model.run_with_cache(TOKENS)[1]["blocks.0.hook_resid_pre"]
    with torch.no_grad():
        assert torch.allclose(alone, any_model.unembed(any_model.ln_final(embedding)), atol=1e-5)
    assert torch.equal(logits(any_model), whole)


def test_heads_and_neurons_set_to_zero_are_the_weights_that_they_own_dropped(any_model, some):
    """Biases of W_in and W_V stay in a weight mask: its neurons are not 0, so they are compared without biases."""
    for leaf in (part for block in any_model.blocks for part in (block.attn.v, block.mlp)):
        for name, parameter in leaf.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
    for name in ("L0H1", "L1H3", "L0N2", "L1N39"):
        circuit = bc.Circuit.full(any_model).drop(name)
        with bc.masked(any_model, circuit):
            by_nodes = logits(any_model)
        with bc.masked(any_model, circuit.weights(any_model)):
            by_weights = logits(any_model)
        assert torch.allclose(by_nodes, by_weights, atol=1e-5)
        assert not torch.allclose(by_nodes, logits(any_model), atol=1e-3)
    with bc.masked(any_model, some):
        by_nodes = logits(any_model)
    with bc.masked(any_model, some.weights(any_model)):
        assert torch.allclose(by_nodes, logits(any_model), atol=1e-5)


@pytest.fixture
def any_model(request, tiny_folders):
    """A model of its own for every test: one of them changes biases."""
    return bc.load_model(tiny_folders[getattr(request, "param", "gpt2")], device="cpu")


def pytest_generate_tests(metafunc):
    if "any_model" in metafunc.fixturenames:
        metafunc.parametrize("any_model", ["gpt_neox", "gpt2", "llama"], indirect=True)


# --- against plain Hugging Face hooks ---

PARTS = {
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
}


def plain_logits(model, circuit, replace):
    """The logits of the plain model with the inputs of its output matrices replaced by pre-hooks."""
    plain = plain_of(model).model
    parts = next(parts for name, parts in PARTS.items() if name.replace("_", "") in type(plain).__name__.lower())
    seen, handles = {}, []

    def add(path, hook):
        handles.append(plain.get_submodule(path).register_forward_pre_hook(hook))

    def collecting(path):
        return lambda module, inputs: seen.setdefault(path, []).append(inputs[0].double())

    with torch.no_grad():
        if replace == "mean":
            for pattern in parts:
                for layer in range(2):
                    add(pattern.format(layer), collecting(pattern.format(layer)))
            plain(torch.from_numpy(TEXT))
            for handle in handles:
                handle.remove()
        for layer in range(2):
            for pattern, point in zip(parts, ("attn.hook_z", "mlp.hook_post"), strict=True):
                path, kept = pattern.format(layer), circuit[f"blocks.{layer}.{point}"]

                def change(module, inputs, path=path, kept=kept):
                    (x,) = inputs
                    inside = kept.repeat_interleave(x.shape[-1] // len(kept))
                    other = torch.zeros_like(x)
                    if replace == "mean":
                        other = torch.cat(seen[path]).mean((0, 1)).to(x).expand_as(x)
                    if replace == "resample":
                        order = np.random.default_rng(0).permutation(len(x))
                        other = x[[int(order[(np.flatnonzero(order == row)[0] - 1)]) for row in range(len(x))]]
                    return (torch.where(inside, x, other),)

                add(path, change)
        found = plain(TOKENS).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("replace", ["zero", "mean", "resample"])
def test_replaced_nodes_are_what_plain_hooks_make_of_them(any_model, some, replace):
    whole = logits(any_model)
    with bc.masked(any_model, some, replace=replace, text=TEXT if replace == "mean" else None):
        found = logits(any_model)
    assert torch.allclose(found, plain_logits(any_model, some, replace), atol=1e-5)
    assert not torch.allclose(found, whole, atol=1e-2)
    assert torch.equal(logits(any_model), whole)


# --- the value ---


def test_algebra_counts_and_labels(any_model):
    full = bc.Circuit.full(any_model)
    assert (full.kept, full.total) == (2 * 4 + 2 * 40, 88)
    one = bc.Circuit.empty(any_model).keep("L0H1", "L1N7")
    assert one.nodes == ("L0H1", "L1N7")
    assert (full - one).kept == 86
    assert (one | ~one) == full
    assert one & full == one
    assert one.by_unit() == {"head": (1, 8), "neuron": (1, 80)}
    assert one.by_layer() == {0: (1, 44), 1: (1, 44)}
    assert one.random_like(seed=1).by_unit() == one.by_unit()
    assert repr(one).startswith("Circuit(empty | L0H1 | L1N7: 2 of 88 nodes, 2.27% of ")
    other = bc.Circuit.empty(any_model, ("mlp", "blocks.1.hook_resid_pre")).keep("L0.mlp", "blocks.1.hook_resid_pre[5]")
    assert other.nodes == ("L0.mlp", "blocks.1.hook_resid_pre[5]")


def test_a_file_holds_it_and_knows_its_model(any_model, tiny_folders, tmp_path):
    circuit = bc.Circuit.full(any_model).drop("L1H2")
    circuit.save(tmp_path / "circuit.safetensors")
    again = bc.Circuit.load(tmp_path / "circuit.safetensors", any_model)
    assert again == circuit
    assert (again.lineage, again.weight_hash) == (circuit.lineage, bc.weight_hash(any_model))
    with pytest.raises(ValueError, match=r"has format .*circuit/1.*, but .*subnetwork/1"):
        bc.Subnetwork.load(tmp_path / "circuit.safetensors")
    bc.Subnetwork.full(any_model).save(tmp_path / "subnetwork.safetensors")
    with pytest.raises(ValueError, match=r"has format .*subnetwork/1.*, but .*circuit/1"):
        bc.Circuit.load(tmp_path / "subnetwork.safetensors")
    with torch.no_grad():
        bc.weight_sites(any_model)[0].original.mul_(2)
    with pytest.raises(ValueError, match=r"was made for .* is another model"):
        bc.Circuit.load(tmp_path / "circuit.safetensors", any_model)


def test_the_nodes_that_a_subnetwork_touches(any_model):
    kept = bc.Subnetwork.empty(any_model).add_head(0, 2).add_neurons(1, [4])
    assert bc.Circuit.touched_by(kept, any_model).nodes == ("L0H2", "L1N4")
    assert bc.Circuit.touched_by(bc.Subnetwork.full(any_model), any_model) == bc.Circuit.full(any_model)
    one = bc.Circuit.empty(any_model).keep("L0H2", "L1N4")
    assert one.weights(any_model) == kept


# --- bad input: one line each ---


def test_bad_input(any_model, tiny_model):
    full = bc.Circuit.full(any_model)
    calls = (
        (
            lambda: bc.Circuit.full(any_model, "heads"),
            "'heads' is neither a unit .*nearest are head",
        ),
        (lambda: bc.Circuit.full(any_model, "blocks.0.hook_resid_pst"), r"the nearest are blocks\.0\."),
        (lambda: bc.Circuit.full(any_model, ()), "units must be different ones of head, neuron"),
        (lambda: bc.Circuit.full(any_model, ("head", "head")), "units must be different ones"),
        (lambda: full.keep("L0H9"), "over other nodes than L0H9"),
        (lambda: full.keep("L0.mlp"), "over other nodes than L0.mlp"),
        (lambda: full.keep("the head"), "'the head' is not the label of a node, such as L0H3"),
        (lambda: bc.Circuit({"blocks.0.attn.hook_z": torch.ones(2, 2, dtype=torch.bool)}), "should be a list"),
        (lambda: bc.Circuit({"a b": torch.ones(2, dtype=torch.bool)}), "is not the name of a hook point"),
        (lambda: bc.Circuit.full(any_model, "mlp").weights(any_model), "own no weights: only heads and neurons do"),
    )
    for call, said in calls:
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert "\n" not in str(error.value)
    for options, said in (
        ({"replace": "nothing"}, "replace must be one of zero, mean, resample, not 'nothing'"),
        ({"replace": "mean"}, "replace='mean' needs a text to average over"),
    ):
        with pytest.raises(ValueError, match=said), bc.masked(any_model, full, **options):
            pass
    with (
        bc.masked(any_model, full.drop("L0H0"), replace="resample"),
        pytest.raises(ValueError, match="there is only one"),
    ):
        any_model(TOKENS[:1])
    larger = bc.Circuit({"blocks.0.attn.hook_z": torch.ones(5, dtype=torch.bool)})
    with (
        pytest.raises(ValueError, match=r"has shape .5,. in this circuit, but .4,. in the model"),
        bc.masked(any_model, larger),
    ):
        pass
