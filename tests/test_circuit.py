"""Circuits: sets of nodes, applied through hooks, compared with plain Hugging Face hooks and with weight masks."""

import pickle

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.models.loading import plain_of
from bigram_circuits.recipe import REPLACEMENTS
from bigram_circuits.tasks.task import Task

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


OTHERS = torch.randint(0, 257, (3, 12), generator=torch.Generator().manual_seed(4))


def donor_tokens(replace):
    """What the full model reads where activations of it take the place of others."""
    if replace.startswith("mean"):
        return torch.from_numpy(TEXT)
    if replace == "counterfactual":
        return OTHERS
    order = np.random.default_rng(0).permutation(len(TOKENS))
    return TOKENS[[int(order[np.flatnonzero(order == row)[0] - 1]) for row in range(len(TOKENS))]]


def plain_logits(model, circuit, replace):
    """The logits of the plain model with the inputs of its output matrices replaced by pre-hooks."""
    plain = plain_of(model).model
    parts = next(parts for name, parts in PARTS.items() if name.replace("_", "") in type(plain).__name__.lower())
    seen, handles = {}, []

    def add(path, hook):
        handles.append(plain.get_submodule(path).register_forward_pre_hook(hook))

    with torch.no_grad():
        if replace != "zero":
            for pattern in parts:
                for path in (pattern.format(layer) for layer in range(2)):
                    add(path, lambda module, inputs, path=path: seen.__setitem__(path, inputs[0]))
            plain(donor_tokens(replace))
            for handle in handles:
                handle.remove()
        for layer in range(2):
            for pattern, point in zip(parts, ("attn.hook_z", "mlp.hook_post"), strict=True):
                path, kept = pattern.format(layer), circuit[f"blocks.{layer}.{point}"]

                def change(module, inputs, path=path, kept=kept):
                    (x,) = inputs
                    inside = kept.repeat_interleave(x.shape[-1] // len(kept))
                    other = torch.zeros_like(x) if replace == "zero" else seen[path]
                    if replace == "mean":
                        other = other.double().mean((0, 1)).to(x).expand_as(x)
                    if replace == "mean_by_position":
                        other = other.double().mean(0).to(x).expand_as(x)
                    return (torch.where(inside, x, other),)

                add(path, change)
        found = plain(TOKENS).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture
def pairs():
    scored = np.zeros(TOKENS.shape, dtype=bool)
    scored[:, -1] = True
    return Task("pairs", TOKENS.numpy(), scored, 1.0, counterfactual=OTHERS.numpy())


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_replaced_nodes_are_what_plain_hooks_make_of_them(any_model, some, replace, pairs):
    whole = logits(any_model)
    text = {"mean": TEXT, "mean_by_position": TEXT, "counterfactual": pairs}.get(replace)
    expected = plain_logits(any_model, some, replace)
    with bc.masked(any_model, some, replace=replace, text=text):
        found = logits(any_model)
        any_model.reset_hooks()
        assert torch.equal(logits(any_model), found)
        seen = []  # the passes of the full model that a replacement needs are nobody else's
        any_model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x))])
        assert len(seen) == 1
        if replace == "mean_by_position":
            with pytest.raises(ValueError, match="knows 12 positions, but there is a sequence of 13"):
                any_model(torch.zeros(3, 13, dtype=torch.long))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, whole, atol=1e-2)
    assert torch.equal(logits(any_model), whole)
    again = bc.replaced(any_model, some, replace, text=text)
    with bc.masked(any_model, ~~pickle.loads(pickle.dumps(again))):
        assert torch.equal(logits(any_model), found)


def test_the_full_model_can_be_asked_while_nodes_are_replaced(any_model):
    """A target that compares with the full model sees it, not the masked one."""
    whole = bc.ModelTarget(any_model).log_probs(TOKENS)
    with bc.masked(any_model, bc.Circuit.empty(any_model), replace="resample"):
        assert torch.equal(bc.ModelTarget(any_model).log_probs(TOKENS), whole)


def test_means_leave_padding_out(any_model):
    tokens, scored = TEXT.copy(), np.zeros(TEXT.shape, dtype=bool)
    tokens[3:, 7:] = 0
    scored[:3, 11], scored[3:, 6] = True, True
    task = Task("padded", tokens, scored, 1.0)
    found = bc.replaced(any_model, bc.Circuit.empty(any_model, "neuron"), "mean", text=task).replacement.means
    each = any_model.run_with_cache(torch.from_numpy(tokens))[1]["blocks.1.mlp.hook_post"].detach().numpy()
    expected = np.concatenate([each[:3].reshape(-1, 40), each[3:, :7].reshape(-1, 40)]).mean(0)
    assert np.allclose(found["blocks.1.mlp.hook_post"], expected, atol=1e-6)


def test_generation_sees_every_position(any_model):
    circuit = bc.replaced(any_model, bc.Circuit.empty(any_model), "mean_by_position", text=TEXT)
    with bc.masked(any_model, circuit):
        written = any_model.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False, verbose=False)
        for end in range(4, 8):
            assert any_model(written[:, :end]).argmax(-1)[0, -1] == written[0, end]


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


def test_a_hook_point_of_a_unit_stands_for_the_unit(any_model):
    one = bc.Circuit.empty(any_model, ("blocks.1.attn.hook_z", "blocks.0.hook_mlp_out")).keep("L1H2")
    assert (one.shapes, one.nodes) == ({"blocks.0.hook_mlp_out": (1,), "blocks.1.attn.hook_z": (4,)}, ("L1H2",))
    with bc.masked(any_model, one):
        by_name = logits(any_model)
    whole = bc.Circuit.full(any_model, ("head", "mlp")).drop("L0.mlp", "L1H0", "L1H1", "L1H3")
    with bc.masked(any_model, whole):
        assert torch.equal(logits(any_model), by_name)
    with pytest.raises(ValueError, match=r"name the nodes of blocks\.1\.attn\.hook_z twice"):
        bc.Circuit.full(any_model, ("head", "blocks.1.attn.hook_z"))


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
        (
            {"replace": "nothing"},
            "replace must be one of zero, .* counterfactual, not 'nothing'",
        ),
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
