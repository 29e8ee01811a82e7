"""What holds for every model and every mask, tried on random ones."""

import copy
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigram_circuits as bc
from bigram_circuits.measures.quantities import MEASURED
from bigram_circuits.models import activations
from tests.conftest import TINY_CONFIGS, save_tiny

N_TOKENS = 257
TABLE = bc.count_ngrams(np.random.default_rng(0).integers(0, N_TOKENS, (100, 32)), 2, d_vocab=N_TOKENS)
KINDS = st.sampled_from(sorted(TINY_CONFIGS))
SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0])
few = settings(max_examples=15)


@cache
def model_of(kind: str):
    with tempfile.TemporaryDirectory() as folder:
        return bc.load_model(save_tiny(Path(folder), copy.deepcopy(TINY_CONFIGS[kind])), device="cpu")


def random_subnetwork(kind: str, seed: int, share: float) -> bc.Subnetwork:
    generator = torch.Generator().manual_seed(seed)
    shapes = bc.Subnetwork.full(model_of(kind)).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < share for name, shape in shapes.items()})


def tokens_of(seed: int, rows: int = 4, length: int = 10) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, N_TOKENS, (rows, length)))


@torch.no_grad()
def logits_of(model, tokens, subnetwork=None):
    if subnetwork is None:
        return model(tokens)
    with bc.masked(model, subnetwork):
        return model(tokens)


@few
@given(kind=KINDS, seed=SEEDS)
def test_the_full_mask_is_the_model_bit_for_bit(kind, seed):
    model, tokens = model_of(kind), tokens_of(seed)
    assert torch.equal(logits_of(model, tokens), logits_of(model, tokens, bc.Subnetwork.full(model)))


@few
@given(kind=KINDS, seed=SEEDS, share=SHARES)
def test_a_mask_is_the_model_with_these_weights_set_to_zero_and_leaves_no_trace(kind, seed, share):
    """Also of the empty mask: embeddings, norms and biases are what is left."""
    model, tokens, subnetwork = model_of(kind), tokens_of(seed), random_subnetwork(kind, seed, share)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = logits_of(model, tokens)
    masked = logits_of(model, tokens, subnetwork)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model, tokens), whole)
    with torch.no_grad():
        saved = [(site, site.original.clone()) for site in bc.weight_sites(model)]
        try:
            for site, original in saved:
                site.original.copy_(torch.where(site.to_stored(subnetwork[site.name]), original, 0.0))
            assert torch.equal(logits_of(model, tokens), masked)
        finally:
            for site, original in saved:
                site.original.copy_(original)


@settings(max_examples=25)
@given(kind=KINDS, seeds=st.tuples(SEEDS, SEEDS, SEEDS), shares=st.tuples(SHARES, SHARES, SHARES))
def test_set_algebra(kind, seeds, shares):
    a, b, c = (random_subnetwork(kind, *pair) for pair in zip(seeds, shares, strict=True))
    full, empty = bc.Subnetwork.full(model_of(kind)), bc.Subnetwork.empty(model_of(kind))
    assert ~~a == a
    assert (a | ~a, a & ~a) == (full, empty)
    assert (a & b, a | b) == (b & a, b | a)
    assert (a & b) & c == a & (b & c)
    assert (a | b) | c == a | (b | c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (b & c) == (a | b) & (a | c)
    assert ~(a & b) == ~a | ~b
    assert (a & (a | b), a | (a & b)) == (a, a)
    assert a - b == a & ~b
    assert (a & full, a | empty, a & empty, a | full) == (a, a, empty, full)
    # counts
    assert (a | b).kept + (a & b).kept == a.kept + b.kept
    assert a.kept + (~a).kept == a.total == full.kept
    assert (a - b).kept + (a & b).kept == a.kept == sum(int(mask.sum()) for mask in a.values())
    assert sum(count.kept for count in a.by_component().values()) == a.kept
    assert a.random_like(1).by_weight() == a.by_weight()
    # each as torch says
    for name in a:
        assert torch.equal((a & b)[name], a[name] & b[name])
        assert torch.equal((a | b)[name], a[name] | b[name])
        assert torch.equal((~a)[name], ~a[name])


@few
@given(kind=KINDS, seed=SEEDS, share=SHARES)
def test_files_and_other_layouts_give_back_the_same(kind, seed, share):
    model, subnetwork = model_of(kind), random_subnetwork(kind, seed, share)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"
        subnetwork.save(path)
        loaded = bc.Subnetwork.load(path, model)
    assert loaded == subnetwork
    assert (loaded.kept, loaded.total, loaded.checksum) == (subnetwork.kept, subnetwork.total, subnetwork.checksum)
    assert bc.Subnetwork.from_huggingface(subnetwork.to_huggingface(model), model) == subnetwork


@few
@given(kind=KINDS, seed=SEEDS, share=SHARES, layer=st.integers(0, 1), head=st.integers(0, 3))
def test_a_head_is_local(kind, seed, share, layer, head):
    """Dropping a head changes its own output, and in that layer no other head's."""
    model, tokens, subnetwork = model_of(kind), tokens_of(seed), random_subnetwork(kind, seed, share)
    kept, dropped = subnetwork.keep_head(layer, head), subnetwork.drop_head(layer, head)
    assert (kept & dropped == dropped, kept | dropped == kept) == (True, True)
    assert dropped & subnetwork == dropped
    name = f"blocks.{layer}.attn.hook_z"
    found = []
    for one in (subnetwork, dropped):
        with bc.masked(model, one), torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=[name])
            found.append(cache[name].reshape(*tokens.shape, 4, -1))
    others = [place for place in range(4) if place != head]
    assert torch.equal(found[0][:, :, others], found[1][:, :, others])
    for layer_name in subnetwork:
        if f"blocks.{layer}.attn" not in layer_name:
            assert torch.equal(subnetwork[layer_name], dropped[layer_name])
    n_heads = 4
    for matrix in ("W_Q", "W_O"):
        mask, before = dropped[f"blocks.{layer}.attn.{matrix}"], subnetwork[f"blocks.{layer}.attn.{matrix}"]
        assert mask.shape[0] == n_heads
        assert not mask[head].any()
        assert torch.equal(mask[others], before[others])


@few
@given(kind=KINDS, seed=SEEDS, share=SHARES, layer=st.integers(0, 1), neuron=st.integers(0, 39))
def test_a_neuron_is_local(kind, seed, share, layer, neuron):
    """Dropping a neuron changes its own row of W_out and columns of W_in and W_gate, and no other activation there."""
    model, tokens, subnetwork = model_of(kind), tokens_of(seed), random_subnetwork(kind, seed, share)
    dropped = subnetwork.drop_neurons(layer, [neuron])
    assert subnetwork.keep_neurons(layer, [neuron]).drop_neurons(layer, [neuron]) == dropped
    name = f"blocks.{layer}.mlp.hook_post"
    found = []
    for one in (subnetwork, dropped):
        with bc.masked(model, one), torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=[name])
            found.append(cache[name])
    others = torch.arange(40) != neuron
    assert torch.equal(found[0][..., others], found[1][..., others])
    for matrix in subnetwork:
        mask, before = dropped[matrix], subnetwork[matrix]
        if not matrix.startswith(f"blocks.{layer}.mlp"):
            assert torch.equal(mask, before)
            continue
        mask, before = (mask, before) if matrix.endswith("W_out") else (mask.T, before.T)
        assert not mask[neuron].any()
        assert torch.equal(mask[others], before[others])


@settings(max_examples=8)
@given(kind=KINDS, seed=SEEDS, share=SHARES, at_once=st.sampled_from([10, 30, 2048]))
def test_an_evaluation_does_not_depend_on_batch_size_and_order(kind, seed, share, at_once):
    model, subnetwork, tokens = model_of(kind), random_subnetwork(kind, seed, share), tokens_of(seed, rows=7).numpy()
    order = np.random.default_rng(seed).permutation(len(tokens))

    def measured(text):
        return bc.evaluate(model, subnetwork, TABLE, text, controls=False).subnetwork

    whole = measured(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "_TOKENS_AT_ONCE", at_once)
        for other in (measured(tokens), measured(tokens[order])):
            for name in MEASURED:
                assert getattr(other, name) == pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("method", ["continuous_sparsification", "hard_concrete", "straight_through"])
@settings(max_examples=3)
@given(kind=KINDS, seed=st.integers(0, 999))
def test_the_same_seed_gives_the_same_mask_bit_for_bit(method, kind, seed):
    corpus = bc.Corpus.from_tokens(tokens_of(seed, rows=12).numpy(), tokens_of(seed + 1).numpy())
    config = bc.SparsifyConfig(method=method, target_fraction=0.1, max_steps=8, batch_size=4, retries=0, seed=seed)
    first, again = (bc.find_subnetwork(model_of(kind), TABLE, corpus, config) for _ in range(2))
    assert first.subnetwork == again.subnetwork
    assert first.subnetwork.checksum == again.subnetwork.checksum
    assert first.history == again.history
