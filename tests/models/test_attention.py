"""The fused kernel: used where nothing looks, with the same gradients; and where something looks, not used."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.models.activations import lean_forward, recomputed
from tests.conftest import D_VOCAB

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, D_VOCAB, (3, 24)))
TARGET = bc.count_ngrams(TOKENS.numpy(), 2, d_vocab=D_VOCAB)
INSIDE = ["hook_attn_scores", "hook_pattern"]


@pytest.fixture
def fused(monkeypatch):
    """The number of calls of the kernel."""
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def noting(*args, **kwargs):
        calls.append(args[0].shape)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    return calls


def gradient(model):
    gates = Candidates(model, bc.SparsifyConfig()).gates(bc.SparsifyConfig(), 0, None)[0]
    with bc.gated(model, gates):
        gates.refresh(0)
        TARGET.cross_entropy(model(TOKENS), TOKENS).mean().backward()
    return gates.gradient.flat()


def test_gradients_are_those_of_attention_step_by_step(any_model, fused):
    expected = gradient(any_model)
    assert not fused
    with lean_forward(any_model):
        torch.testing.assert_close(gradient(any_model), expected, rtol=1e-4, atol=1e-7)
        assert len(fused) == 2
        with recomputed(any_model):
            torch.testing.assert_close(gradient(any_model), expected, rtol=1e-4, atol=1e-7)
    assert len(fused) == 6
    assert all(getattr(block.attn, "_pattern", None) is None for block in any_model.blocks)


@pytest.mark.parametrize("point", INSIDE)
def test_hooks_inside_fire_and_change_the_result(any_model, fused, point):
    seen = []

    def halve(value, hook):
        seen.append(tuple(value.shape[-2:]))
        return value / 2

    hooks = [(f"blocks.1.attn.{point}", halve)]
    with torch.no_grad():
        expected = any_model.run_with_hooks(TOKENS, fwd_hooks=hooks)
        with lean_forward(any_model):
            found = any_model.run_with_hooks(TOKENS, fwd_hooks=hooks)  # added when the block is entered already
            assert len(fused) == 1  # the other layer's
            unchanged = any_model(TOKENS)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, unchanged, atol=1e-4)
    assert seen == [(24, 24)] * 2


@pytest.mark.parametrize("name", ["q.hook_out", "k.hook_out", "v.hook_out", "o.hook_in", "hook_in", "hook_out"])
def test_hooks_around_fire_and_change_the_result(any_model, fused, name):
    seen = []

    def double(value, hook):
        seen.append(value.shape)
        return 2 * value

    hooks = [(f"blocks.0.attn.{name}", double)]
    with torch.no_grad():
        expected = any_model.run_with_hooks(TOKENS, fwd_hooks=hooks)
        with lean_forward(any_model):
            torch.testing.assert_close(any_model.run_with_hooks(TOKENS, fwd_hooks=hooks), expected)
            assert not torch.allclose(any_model(TOKENS), expected, atol=1e-4)
    assert len(fused) == 4
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_rotations_that_are_looked_at_are_seen(tiny_model, fused):
    seen = []
    hooks = [("blocks.0.attn.hook_cos", lambda value, hook: seen.append(value.shape))]
    with torch.no_grad(), lean_forward(tiny_model):
        tiny_model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_exception_inside_leaves_the_model_as_it_was(tiny_folders, name, monkeypatch):
    model = bc.load_model(tiny_folders[name], device="cpu")
    config = model.original_model.config
    usual = config._attn_implementation
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError), lean_forward(model):
        model(TOKENS)
    assert config._attn_implementation == usual
    assert not any("forward" in vars(block.attn) for block in model.blocks)
