"""Sparse products: the logits of dense ones to float rounding, used where they should be and nowhere else."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

import bigram_circuits as bc
from bigram_circuits.masking import apply
from bigram_circuits.models import products
from bigram_circuits.models.products import masked_once
from bigram_circuits.models.weights import full_weights
from tests.conftest import save_tiny

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 257, (9, 64)))  # more than two pieces
MANY = 1 << 20
CONFIGS = {
    "linear": GPTNeoXConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    ),
    "conv1d": GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


@pytest.fixture
def model(folder):
    return bc.load_model(folder, device="cpu")


@pytest.fixture
def few(model):
    generator = torch.Generator().manual_seed(0)
    full = bc.Subnetwork.full(model)
    masks = {name: torch.rand(shape, generator=generator) < 0.03 for name, shape in full.shapes.items()}
    masks["blocks.1.mlp.W_in"][:] = True  # one that stays dense
    masks["blocks.0.attn.W_V"][:] = False
    return bc.Subnetwork(masks)


@pytest.fixture
def used(monkeypatch):
    """Counts the products with a sparse matrix."""
    shapes, plain = [], products._product

    def counted(matrix, rows):
        shapes.append(matrix.shape)
        return plain(matrix, rows)

    monkeypatch.setattr(products, "_product", counted)
    return shapes


needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products are MKL's")


@needs_mkl
def test_logits_are_those_of_the_plain_model_with_zeroed_weights(model, few, folder, used, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bc.export_huggingface(model, few, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        expected = plain(TOKENS).logits
        with bc.masked(model, few), masked_once(model, MANY):
            found = model(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(used) == 3 * (
        12 - 2
    )  # three pieces; all matrices but that which is not sparse and that of which nothing is kept
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(site.leaf) for site in bc.weight_sites(model))


@needs_mkl
def test_hooks_and_the_full_model_inside_are_as_before(model, few, used):
    with torch.inference_mode():
        full = model(TOKENS)
        halved = [("blocks.0.mlp.hook_post", lambda value, hook: value / 2)]
        with bc.masked(model, few):
            masked, hooked = model(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=halved)
            with masked_once(model, MANY):
                torch.testing.assert_close(model.run_with_hooks(TOKENS, fwd_hooks=halved), hooked)
                done = len(used)
                with full_weights(model):  # as for values of the full model that replace nodes
                    assert torch.equal(model(TOKENS), full)
                assert len(used) == done
                torch.testing.assert_close(model(TOKENS), masked)
                assert len(used) > done
    assert not torch.allclose(full, masked, atol=1e-3)
    assert not torch.allclose(hooked, masked, atol=1e-6)


def test_few_tokens_gradients_and_unmasked_models_have_dense_products(model, few, used):
    with bc.masked(model, few):
        with masked_once(model, 100), torch.inference_mode():
            model(TOKENS)
        with masked_once(model, MANY):
            model(TOKENS).sum().backward()
            with torch.inference_mode():
                model(TOKENS[:1, :8])
    with masked_once(model, MANY), torch.inference_mode():
        model(TOKENS)
    assert used == []


@pytest.fixture
def gated(monkeypatch):
    """Counts how often a weight is masked."""
    masked, plain = [], apply._Mask.gate

    def counted(gate, weight):
        masked.append(weight.shape)
        return plain(gate, weight)

    monkeypatch.setattr(apply._Mask, "gate", counted)
    return masked


def test_weights_are_masked_once_and_logits_are_the_same_bit_for_bit(model, few, gated):
    dense = ~few
    n = len(bc.weight_sites(model))
    with torch.inference_mode(), bc.masked(model, dense):
        expected = model(TOKENS)
        gated.clear()
        with masked_once(model):
            assert torch.equal(model(TOKENS), expected)
            assert torch.equal(model(TOKENS), expected)
            assert len(gated) == n
            with full_weights(model):
                full = model(TOKENS)
        gated.clear()
        assert torch.equal(model(TOKENS), expected)
        assert len(gated) == n
    with torch.inference_mode():
        assert torch.equal(model(TOKENS), full)


def test_no_more_is_kept_than_the_bound(model, few, gated, monkeypatch):
    sites = bc.weight_sites(model)
    monkeypatch.setattr(products, "MOST_KEPT", sites[0].original.nbytes + sites[1].original.nbytes)
    with torch.inference_mode(), bc.masked(model, ~few):
        expected = model(TOKENS)
        with masked_once(model):
            gated.clear()
            assert torch.equal(model(TOKENS), expected)
    assert len(gated) == len(sites) - 2


def test_gradients_come_from_weights_masked_anew(model, few):
    weight = bc.weight_sites(model)[0].original
    with bc.masked(model, few):
        model(TOKENS[:1]).sum().backward()
        expected, weight.grad = weight.grad, None
        with masked_once(model):
            model(TOKENS[:1]).sum().backward()
    assert expected.any()
    assert torch.equal(weight.grad, expected)


def test_a_sweep_masks_only_the_matrices_that_differ_and_only_once(model, few, gated):
    names = [site.name for site in bc.weight_sites(model)]
    masks = {name: few[name] for name in few}
    other = bc.Subnetwork(masks | {names[0]: ~few[names[0]]})
    expected = []
    for kept in (few, other, few):
        with torch.inference_mode(), bc.masked(model, kept):
            expected.append(model(TOKENS))
    gated.clear()
    with torch.inference_mode(), apply.masks_exchanged(model) as exchange:
        for index, kept in enumerate((few, other, few)):
            exchange(kept)
            for _ in range(2):
                assert torch.equal(model(TOKENS), expected[index])
        exchange(None)
        full = model(TOKENS)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS), full)
    partly = [name for name in names if not few[name].all()]
    assert len(gated) == len(partly) + 2


@needs_mkl
def test_an_evaluation_is_that_of_dense_products(model, few, used, monkeypatch):
    text = np.tile(TOKENS.numpy(), (10, 1))
    target = bc.count_ngrams(text, d_vocab=257)
    found = bc.evaluate(model, few, target, text, seeds=1)
    assert used
    monkeypatch.setattr(products, "_LEAST_TOKENS", 10 * MANY)
    dense = bc.evaluate(model, few, target, text, seeds=1)
    for (name, one), (_, other) in zip(found.rows(), dense.rows(), strict=True):
        assert one.cross_entropy == pytest.approx(other.cross_entropy, rel=1e-6), name
        assert one.kl == pytest.approx(other.kl, rel=1e-5), name
