"""Analyses of a model in bfloat16 run, and agree with those in float32 as far as its 8 bits go."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.affine import AffineFitter, RecallSums
from bigram_circuits.analysis.conditions import Batch
from bigram_circuits.models.activations import residual_streams
from tests.architectures import CONFIGS
from tests.conftest import D_VOCAB, save_tiny

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, D_VOCAB, (12, 12))
TARGET = bc.count_ngrams(RANDOM.integers(0, D_VOCAB, (2000, 32)), d_vocab=D_VOCAB)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def models(request, tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp(request.param), CONFIGS[request.param]())
    wide = bc.load_model(folder, device="cpu")
    with torch.no_grad():  # the same weights, so that only the arithmetic differs
        for parameter in wide.parameters():
            parameter.copy_(parameter.bfloat16())
    narrow = bc.load_model(folder, device="cpu", dtype="bfloat16")
    assert narrow.W_U.dtype == torch.bfloat16
    return wide, narrow


@pytest.fixture(scope="module")
def half(models):
    generator = torch.Generator().manual_seed(1)
    shapes = bc.Subnetwork.full(models[0]).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})


def both(models, call):
    wide, narrow = (call(model) for model in models)
    assert type(wide) is type(narrow)
    return wide, narrow


def close(wide, narrow, quantity, atol):
    at = [one.name for one in wide.quantities].index(quantity)
    np.testing.assert_allclose(narrow.values[at], wide.values[at], atol=atol, err_msg=quantity)


def test_lenses(models, half):
    wide, narrow = both(models, lambda model: analysis.logit_lens(model, half, TOKENS, target=TARGET))
    for quantity, atol in (("mean_surprisal", 0.03), ("kl", 0.03), ("entropy", 0.03), ("surprisal_correlation", 0.05)):
        close(wide, narrow, quantity, atol)
    np.testing.assert_allclose(narrow.get("kl")[-1], 0, atol=1e-3)
    assert narrow.get("output_correlation")[-1] == pytest.approx(1, abs=1e-3)
    prompts = both(models, lambda model: analysis.logit_lens(model, half, torch.from_numpy(TOKENS[0])))
    close(*prompts, "kl", 0.1)
    close(*prompts, "probability", 0.02)
    assert (np.nan_to_num(prompts[1].get("next_rank")) % 1 == 0).all()
    affine = both(models, lambda model: analysis.affine_lens(model, half, TOKENS, alpha=0.1, target=TARGET))
    for quantity, atol in (("mean_surprisal", 0.1), ("kl", 0.1), ("recall_at_1", 0.1), ("recall_at_10", 0.15)):
        close(*affine, quantity, atol)


def test_the_affine_lens_is_refined_in_float32(models):
    for model in models:
        (maps,) = analysis.fit_affine_lens(model, TOKENS, alpha=0.1).values()
        refined = analysis.refine_affine_lens(model, maps, TOKENS, steps=5)
        assert refined.output_weight.dtype == maps.output_weight.dtype == torch.float32
        before, after = (
            analysis.logit_lens(model, TOKENS, maps={"full": one}).get("kl")[:-1].sum() for one in (maps, refined)
        )
        assert after < before


def test_recall_has_no_ties_that_bfloat16_makes(models):
    """Ranks of tokens are counted in float32: as by hand, from what the fitted maps give in float64."""
    model = models[1]
    (maps,) = analysis.fit_affine_lens(model, TOKENS, alpha=5.0).values()
    tokens = torch.from_numpy(TOKENS)
    with torch.inference_mode():
        streams, logits = residual_streams(model, tokens)
        counter = RecallSums(model, maps)
        counter.add(Batch(tokens, streams, logits))
        wanted = []
        for layer, stream in enumerate(streams.double()):
            predicted = stream @ maps.input_weight[layer].double() + maps.input_bias[layer].double()
            scores = predicted @ model.W_E.double().T
            ranks = (scores > scores.gather(2, tokens[..., None])).sum(-1)
            wanted.append([int((ranks < k).sum()) for k in (1, 5, 10)])
    np.testing.assert_allclose(counter.rows().sum(0)[:, :3], wanted, atol=1)


def test_geometry(models, half):
    cosines = both(models, lambda model: analysis.cosine_to_unembedding(model, half, TOKENS, target=TARGET))
    for quantity in ("current_embedding", "next_unembedding", "target_unembedding", "next_unembedding_baseline"):
        close(*cosines, quantity, 0.01)
    close(*both(models, lambda model: analysis.layer_rotations(model, TOKENS, alpha=0.1)), "output_angle", 5)
    close(*both(models, lambda model: analysis.covariance_similarity(model, half, TOKENS)), "cka", 0.03)


@pytest.mark.parametrize("by", ["zero", "mean", "resample", "weights"])
def test_ablation(models, by):
    parts = ["L0H1", "L1N[1,5]", "L1.attn", "L0.mlp"]
    wide, narrow = both(models, lambda model: analysis.ablate(model, parts, TOKENS, by=by, target=TARGET, seeds=0))
    close(wide, narrow, "loss", 0.03)
    close(wide, narrow, "rise_in_loss", 0.02)
    close(wide, narrow, "change_in_r", 0.03)


def test_what_is_enough(models, half):
    task = analysis.repeated_random_tokens(models[0], prompts=4, period=6)
    close(*both(models, lambda model: analysis.sufficiency(model, half, "attns", task, seeds=1)), "fall_in_loss", 0.05)
    way = both(models, lambda model: analysis.stochastic_ablation(model, half, TARGET, TOKENS, shares=(0, 1), draws=1))
    close(*way, "loss", 0.03)


@pytest.mark.parametrize("by", ["component", "head"])
def test_attribution(models, half, by):
    prompt = torch.from_numpy(TOKENS[0])
    wide, narrow = both(models, lambda model: analysis.logit_attribution(model, half, prompt, answer=80, by=by))
    assert wide.rows == narrow.rows
    close(wide, narrow, "contribution", 0.03)
    total = narrow.get("contribution").sum(0)
    assert total[0] == pytest.approx(next(iter(narrow.notes["logits"]["full"].values())), abs=0.03)


def test_attribution_in_float64(models, tmp_path):
    model = bc.load_model(models[0].cfg.model_name, device="cpu", dtype="float64")
    found = analysis.logit_attribution(model, torch.from_numpy(TOKENS[0]), answer=80)
    assert found.get("contribution").sum() == pytest.approx(
        next(iter(found.notes["logits"]["full"].values())), abs=1e-4
    )


def test_attention_and_max_activating_tokens(models, half):
    prompt = torch.from_numpy(TOKENS[0])
    close(*both(models, lambda model: analysis.attention_patterns(model, half, prompt)), "attention", 0.02)
    neurons = [(0, 1), (1, 2)]
    found = both(models, lambda model: analysis.max_activating_tokens(model, neurons, half, TOKENS, min_count=1, k=3))
    close(*found, "mean_activation", 0.05)


def test_sums_are_added_up_in_float64(models):
    """A mean over many tokens of one activation is that activation, not what 8 bits make of their sum."""
    model = models[1]
    fitter = AffineFitter(model)
    tokens = torch.full((64, 12), 5)
    with torch.inference_mode():
        streams, logits = residual_streams(model, tokens)
        for _ in range(3):
            fitter.add(Batch(tokens, streams[:, :, :1].expand_as(streams), logits))
    maps = fitter.freeze(model, None, 1.0)
    torch.testing.assert_close(maps.output_bias[0], streams[-1, 0, 0].float(), atol=1e-5, rtol=1e-5)
    assert maps.output_weight.abs().max() < 1e-6
