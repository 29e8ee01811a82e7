"""Hashes of weights: once within a call, anew outside of it."""

import pytest

import bigram_circuits as bc
from bigram_circuits.analysis import ablate, fit_affine_lens, sufficiency
from bigram_circuits.models import identity
from bigram_circuits.models.state import in_use


@pytest.fixture
def hashed(monkeypatch):
    """The models that were hashed, one entry for every time."""
    models, real = [], identity._hash_of
    monkeypatch.setattr(identity, "_hash_of", lambda model: models.append(model) or real(model))
    return models


def test_within_a_call_a_model_is_hashed_once(tiny_model, hashed):
    outside = bc.weight_hash(tiny_model)
    with in_use(tiny_model, "a test"):
        assert [bc.weight_hash(tiny_model), bc.Subnetwork.full(tiny_model).weight_hash] == [outside, outside]
        with in_use(tiny_model, "a test"):
            bc.weight_hash(tiny_model)
        bc.weight_hash(tiny_model)
    assert len(hashed) == 2
    bc.weight_hash(tiny_model)
    assert len(hashed) == 3


def test_an_edit_is_seen_after_the_call(tiny_folders, hashed):
    model = bc.load_model(tiny_folders["gpt2"], device="cpu")
    with in_use(model, "a test"):
        before = bc.weight_hash(model)
    weight = bc.weight_sites(model)[0].original.data
    value = weight[0, 0].item()
    weight[0, 0] += 1
    assert bc.weight_hash(model) != before
    weight[0, 0] = value
    assert bc.weight_hash(model) == before


@pytest.mark.parametrize("by", ["zero", "weights"])
def test_a_sweep_hashes_the_model_once_at_most(tiny_model, random_tokens, hashed, by):
    half = bc.Subnetwork.full(tiny_model).drop_layer(1)
    hashed.clear()
    ablate(tiny_model, "heads", half, random_tokens, by=by, seeds=1)
    assert len(hashed) == (0 if by == "zero" else 1)
    hashed.clear()
    sufficiency(tiny_model, half, "heads", random_tokens, seeds=1)
    assert len(hashed) == 0


def test_what_takes_many_conditions_hashes_the_model_once(tiny_model, random_tokens, hashed):
    half = bc.Subnetwork.full(tiny_model).drop_layer(1)
    target = bc.count_ngrams(random_tokens, 2, d_vocab=257)
    corpus = bc.Corpus.from_tokens(random_tokens, random_tokens)
    for measured in (
        lambda: fit_affine_lens(tiny_model, half, random_tokens),
        lambda: bc.affine_lens(tiny_model, half, random_tokens),
        lambda: bc.evaluate(tiny_model, half, target, random_tokens, seeds=1),
        lambda: bc.analyze(tiny_model, half, target, corpus),
    ):
        hashed.clear()
        measured()
        assert len(hashed) == 1
