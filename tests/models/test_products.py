"""Sparse products: the logits of dense ones to float rounding, used where they should be and nowhere else."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

import bigram_circuits as bc
from bigram_circuits.models import products
from bigram_circuits.models.products import sparse_products
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
        with bc.masked(model, few), sparse_products(model, MANY):
            found = model(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(used) == 3 * (12 - 1)  # three pieces; all matrices but the one that is not sparse
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
            with sparse_products(model, MANY):
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
        with sparse_products(model, 100), torch.inference_mode():
            model(TOKENS)
        with sparse_products(model, MANY):
            model(TOKENS).sum().backward()
            with torch.inference_mode():
                model(TOKENS[:1, :8])
    with sparse_products(model, MANY), torch.inference_mode():
        model(TOKENS)
    assert used == []


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
