import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.masking.apply import masks_exchanged
from bigram_circuits.masking.gates import group_gates
from bigram_circuits.masking.methods.continuous_sparsification import ContinuousSparsification


def snapshot(model):
    return {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, (_, value) in before.items():
        assert torch.equal(after[name], value), name


@pytest.fixture
def tokens(random_tokens):
    return torch.from_numpy(random_tokens)


@pytest.fixture
def half(any_model):
    full = bc.Subnetwork.full(any_model)
    generator = torch.Generator().manual_seed(1)
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in full.shapes.items()})


def test_sites_name_what_transformer_lens_names_with_real_key_value_heads(any_model):
    named = dict(any_model.tl_named_parameters())
    for site in bc.weight_sites(any_model):
        weight = named[site.name]
        if weight.shape != site.shape:  # TransformerLens repeats grouped keys and values
            assert site.name.endswith(("W_K", "W_V"))
            weight = weight[:: weight.shape[0] // site.shape[0]]
        assert torch.equal(site.weight, weight), site.name
        assert torch.equal(site.to_stored(site.weight), site.original)


def test_full_mask_is_the_model_bit_for_bit(any_model, tokens):
    expected = any_model(tokens)
    with bc.masked(any_model, bc.Subnetwork.full(any_model)):
        assert torch.equal(any_model(tokens), expected)


def test_masked_logits_are_those_of_a_hugging_face_model_with_zeroed_weights(any_model, half, tokens, tiny_folders):
    plain = AutoModelForCausalLM.from_pretrained(any_model.cfg.model_name, attn_implementation="eager").eval()
    with torch.no_grad():
        zero_in_hugging_face_model(plain, half)
        expected = plain(tokens).logits
    with bc.masked(any_model, half):
        torch.testing.assert_close(any_model(tokens), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(any_model(tokens), expected, atol=1e-2)


def zero_in_hugging_face_model(model, subnetwork):
    """Written out for each architecture, as a reference that shares nothing with the masking layer."""
    for name, mask in subnetwork.items():
        _, layer, component, matrix = name.split(".")
        head_rows = mask.permute(0, 2, 1).flatten(0, 1) if matrix in ("W_Q", "W_K", "W_V") else None
        if model.config.model_type == "gpt_neox":
            block = model.gpt_neox.layers[int(layer)]
            if head_rows is not None:
                fused = block.attention.query_key_value.weight.view(4, 3, 6, 24)
                fused["QKV".index(matrix[-1]) == torch.arange(3)[None, :].expand(4, 3)] *= mask.permute(0, 2, 1)
                continue
            leaf = {"W_O": block.attention.dense, "W_in": block.mlp.dense_h_to_4h, "W_out": block.mlp.dense_4h_to_h}
            leaf[matrix].weight *= mask.flatten(0, -2).T
        elif model.config.model_type == "gpt2":
            block = model.transformer.h[int(layer)]
            if head_rows is not None:
                start = 24 * "QKV".index(matrix[-1])
                block.attn.c_attn.weight[:, start : start + 24] *= head_rows.T
                continue
            leaf = {"W_O": block.attn.c_proj, "W_in": block.mlp.c_fc, "W_out": block.mlp.c_proj}
            leaf[matrix].weight *= mask.flatten(0, -2)
        else:
            block = model.model.layers[int(layer)]
            part = block.self_attn if component == "attn" else block.mlp
            names = {"W_Q": "q_proj", "W_K": "k_proj", "W_V": "v_proj", "W_O": "o_proj"}
            names |= {"W_in": "up_proj", "W_gate": "gate_proj", "W_out": "down_proj"}
            getattr(part, names[matrix]).weight *= head_rows if head_rows is not None else mask.flatten(0, -2).T


def test_leaving_restores_every_tensor_also_after_an_exception(any_model, half, tokens):
    before, modules = snapshot(any_model), [type(module) for module in any_model.modules()]

    def fail():
        with bc.masked(any_model, half):
            any_model(tokens)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert_untouched(any_model, before)
    assert [type(module) for module in any_model.modules()] == modules
    assert not any(module.training for module in any_model.modules())


def test_dropping_a_head_changes_only_that_head(any_model, tokens):
    subnetwork = bc.Subnetwork.full(any_model).drop_head(0, 2)
    _, whole = any_model.run_with_cache(tokens)
    with bc.masked(any_model, subnetwork):
        _, part = any_model.run_with_cache(tokens)
    before, after = whole["blocks.0.attn.hook_z"], part["blocks.0.attn.hook_z"]
    before, after = (z.view(*tokens.shape, 4, 6) for z in (before, after))
    grouped = subnetwork.shapes["blocks.0.attn.W_K"][0] != 4
    for head in range(4):
        same = torch.equal(before[:, :, head], after[:, :, head])
        assert same == (head != 2), f"head {head}"
    if not grouped:  # the head's own values are gone: what is left is their bias
        bias = dict(any_model.tl_named_parameters()).get("blocks.0.attn.b_V", torch.zeros(4, 6))[2]
        torch.testing.assert_close(after[:, :, 2], bias.expand_as(after[:, :, 2]))


def test_dropping_a_neuron_changes_only_that_neuron(any_model, tokens):
    _, whole = any_model.run_with_cache(tokens)
    with bc.masked(any_model, bc.Subnetwork.full(any_model).drop_neurons(1, [7])):
        _, part = any_model.run_with_cache(tokens)
    before, after = whole["blocks.1.mlp.hook_post"], part["blocks.1.mlp.hook_post"]
    changed = (before != after).flatten(0, 1).any(0)
    assert changed.nonzero().flatten().tolist() == [7]


def test_hooks_cache_and_generation_work_on_a_masked_model(any_model, half, tokens):
    seen = []
    with bc.masked(any_model, half):
        logits, cache = any_model.run_with_cache(tokens)
        hooked = any_model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.hook_out", lambda value, hook: seen.append(value))]
        )
        generated = any_model.generate(tokens[:1, :4], max_new_tokens=5, do_sample=False, verbose=False)
        first = any_model(generated[:, :4])[0, -1].argmax()
        weight = dict(any_model.tl_named_parameters())["blocks.0.mlp.W_in"]
    assert torch.equal(seen[0], cache["blocks.1.hook_out"])
    assert torch.equal(logits, hooked)
    assert generated.shape == (1, 9)
    assert generated[0, 4] == first
    assert torch.equal(weight == 0, ~half["blocks.0.mlp.W_in"])


def test_masking_twice_is_refused_and_leaves_the_first_mask(any_model, half, tokens):
    with bc.masked(any_model, half):
        expected = any_model(tokens)
        with pytest.raises(ValueError, match="masked already"), bc.masked(any_model, half):
            pass
        assert torch.equal(any_model(tokens), expected)


def test_a_mask_of_another_model_is_refused(any_model, reference_model):
    wrong = bc.Subnetwork({"blocks.0.attn.W_Q": torch.ones(4, 24, 6, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"blocks.0.attn.W_K has shape None in this subnetwork, but \(\d, 24, 6\)"):
        bc.masked(any_model, wrong).__enter__()


def weight_gates(model, **beta):
    return ContinuousSparsification(group_gates(bc.weight_sites(model), {"attn": "weight", "mlp": "weight"}), **beta)


def test_gates_multiply_weights_and_only_scores_get_gradients(any_model, tokens):
    before = snapshot(any_model)
    required = [parameter.requires_grad for parameter in any_model.parameters()]
    gates = weight_gates(any_model)
    with bc.gated(any_model, gates):
        gates.refresh(0)  # all gates one half
        halved = any_model(tokens)
        halved.square().mean().backward()
        gradients = gates.gradient.flat()
        assert gradients is not None
        assert (gradients != 0).float().mean() > 0.9
        assert all(parameter.grad is None for parameter in any_model.parameters())
        for site in bc.weight_sites(any_model):
            assert torch.equal(site.leaf.weight, 0.5 * site.original)
    assert_untouched(any_model, before)
    assert [parameter.requires_grad for parameter in any_model.parameters()] == required


def test_the_gradient_of_a_gate_is_the_change_of_the_loss(tiny_model, tokens):
    gates = weight_gates(tiny_model, beta_start=2.0)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(gates.scores), generator=generator)

    def loss():
        gates.refresh(0)
        return tiny_model(tokens).double().square().mean()

    with bc.gated(tiny_model, gates):
        loss().backward()  # nothing was there before: no penalty
        expected = (gates.gradient.flat() * direction).sum().item()
        with torch.no_grad():
            original = gates.scores.flat().clone()
            step = 1e-3
            gates.scores.flat().copy_(original + step * direction)
            above = loss()
            gates.scores.flat().copy_(original - step * direction)
            below = loss()
    assert expected == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-2)


def test_the_empty_subnetwork_is_embedding_final_norm_and_unembedding(tiny_folders, tokens):
    model = bc.load_model(tiny_folders["llama"], device="cpu")  # no biases: nothing else is left
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"])
    with bc.masked(model, bc.Subnetwork.empty(model)):
        expected = plain.lm_head(plain.model.norm(plain.model.embed_tokens(tokens)))
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-4)


def test_masks_that_are_exchanged_are_those_of_masked_and_leave_nothing(any_model, half, tokens):
    before, full = snapshot(any_model), bc.Subnetwork.full(any_model)
    ones = [half, half.add_head(0, 1), None, ~half, full, full.drop_head(1, 0), half, bc.Subnetwork.empty(any_model)]
    expected = []
    with torch.no_grad():
        for one in ones:
            with bc.masked(any_model, full if one is None else one):
                expected.append(any_model(tokens))
        with masks_exchanged(any_model) as exchange:
            for one, logits in zip(ones, expected, strict=True):
                exchange(one)
                assert torch.equal(any_model(tokens), logits)
            with pytest.raises(ValueError, match="masked already"), bc.masked(any_model, half):
                pass
            exchange(half)
            with pytest.raises(ValueError, match="has shape"):
                exchange(bc.Subnetwork({"blocks.0.attn.W_Q": torch.ones(1, 2, 3, dtype=torch.bool)}))
    assert_untouched(any_model, before)
