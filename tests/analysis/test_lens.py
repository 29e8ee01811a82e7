"""Lenses: at the last layer they are the model; on affine layers the affine lens is exact; a planted circuit shows."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis import affine, lens
from bigram_circuits.analysis.affine import AffineFitter, AffineMaps, fit_affine_lens, refine_affine_lens
from bigram_circuits.analysis.conditions import Batch
from bigram_circuits.analysis.lens import affine_lens, logit_lens
from bigram_circuits.analysis.prompts import token_words
from bigram_circuits.measures import statistics
from bigram_circuits.models import activations
from bigram_circuits.models.activations import readout, residual_streams


@pytest.fixture(scope="module")
def half(tiny_model):
    return ~bc.Subnetwork.empty(tiny_model).keep_layer(0)


def test_the_last_layer_is_the_model_itself(any_model):
    tokens = torch.arange(5, 17)
    found = logit_lens(any_model, tokens, top_k=3)
    with torch.no_grad():
        probs = any_model(tokens[None])[0].softmax(-1).double()
    top = found.get("probability")[-1]
    np.testing.assert_allclose(top, probs.max(-1).values, atol=1e-6)
    np.testing.assert_allclose(
        found.get("next_probability")[-1][:-1], probs[:-1].gather(1, tokens[1:, None])[:, 0], atol=1e-6
    )
    np.testing.assert_allclose(found.get("kl")[-1], 0, atol=1e-5)
    np.testing.assert_allclose(found.get("entropy")[-1], torch.special.entr(probs).sum(-1), atol=1e-5)
    order = probs[:-1].argsort(dim=-1, descending=True, stable=True)
    ranks = (order == tokens[1:, None]).int().argmax(-1)
    np.testing.assert_allclose(found.get("next_rank")[-1][:-1], ranks)
    assert np.isnan(found.get("next_rank")[-1][-1])
    assert found.text is not None
    assert found.text[0][-1][0].split("\n")[0] == token_words(any_model, [int(probs[0].argmax())])[0]


def test_earlier_layers_go_through_the_final_norm_and_unembedding(any_model):
    tokens = torch.arange(5, 17)
    found = logit_lens(any_model, tokens)
    with torch.no_grad():
        streams, logits = residual_streams(any_model, tokens[None])
        by_hand = any_model.unembed(any_model.ln_final(streams[1]))[0].softmax(-1)
    np.testing.assert_allclose(found.get("probability")[1], by_hand.max(-1).values, atol=1e-6)
    torch.testing.assert_close(readout(any_model, streams[-1]), logits)


def test_means_over_a_corpus_are_those_of_the_formulas(tiny_model, random_tokens, half, monkeypatch):
    monkeypatch.setattr(activations, "_LOGITS_AT_ONCE", 257 * 7)
    monkeypatch.setattr(activations, "_ROWS_AT_ONCE", 1)
    target = bc.count_ngrams(random_tokens, 2, d_vocab=257)
    found = logit_lens(tiny_model, half, random_tokens, target=target)
    tokens = torch.from_numpy(random_tokens)
    for name, kept in {"full": None, "subnetwork": half, "complement": ~half}.items():
        with torch.no_grad(), lens.reduced_to(tiny_model, kept):
            streams, logits = residual_streams(tiny_model, tokens)
            log_probs = readout(tiny_model, streams)[:, :, :-1].log_softmax(-1).double()
        output = logits[:, :-1].log_softmax(-1).double()
        following = tokens[:, 1:]
        surprisal = -log_probs.gather(3, following[None, :, :, None].expand(3, -1, -1, -1))[..., 0]
        np.testing.assert_allclose(found.get("mean_surprisal", name), surprisal.mean((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(
            found.get("entropy", name), -(log_probs.exp() * log_probs).sum(-1).mean((1, 2)), rtol=1e-4
        )
        kl = (output.exp() * (output - log_probs)).sum(-1).mean((1, 2))
        np.testing.assert_allclose(found.get("kl", name), kl, atol=1e-5)
        agree = (log_probs.argmax(-1) == output.argmax(-1)).double().mean((1, 2))
        np.testing.assert_allclose(found.get("top1_agreement", name), agree)
        theirs = target.surprisal(tokens).double()
        r = [np.corrcoef(one.flatten(), theirs.flatten())[0, 1] for one in surprisal]
        np.testing.assert_allclose(found.get("surprisal_correlation", name), r, atol=1e-6)
        own = -output.gather(2, following[..., None])[..., 0]
        r = [np.corrcoef(one.flatten(), own.flatten())[0, 1] for one in surprisal]
        np.testing.assert_allclose(found.get("output_correlation", name), r, atol=1e-6)
    low, high = found.interval("mean_surprisal", "subnetwork")
    assert (low <= found.get("mean_surprisal", "subnetwork")).all()
    assert (found.get("mean_surprisal", "subnetwork") <= high).all()
    assert found.conditions == ("full", "subnetwork", "complement", "random")
    assert found.points == ("embed", "0", "1")


def test_without_a_target_only_its_correlation_is_undefined(tiny_model, random_tokens):
    found = logit_lens(tiny_model, random_tokens)
    assert np.isnan(found.get("surprisal_correlation")).all()
    assert np.isfinite(found.get("output_correlation")).all()
    assert found.get("output_correlation")[-1] == pytest.approx(1)


def test_a_planted_bigram_shows_after_the_first_block_and_only_with_its_weights(planted):
    model, subnetwork, tokens = planted
    target = bc.count_ngrams(tokens, 2, d_vocab=model.cfg.d_vocab)
    found = logit_lens(model, subnetwork, tokens, target=target)
    for name in ("full", "subnetwork"):
        r = found.get("surprisal_correlation", name)
        assert np.isnan(r[0])  # the embedding is orthogonal to the unembedding: every next token is alike
        assert (r[1:] > 0.9).all()
    for name in ("complement", "random"):
        assert not (np.abs(found.get("surprisal_correlation", name)) > 0.5).any()


def test_affine_maps_of_affine_layers_are_exact():
    rng = torch.Generator().manual_seed(0)
    d, n = 6, 400
    x = torch.randn(8, n // 8, d, generator=rng) * torch.tensor([1, 2, 3, 1, 1, 5.0]) + 10
    first, last = torch.randn(d, d, generator=rng), torch.randn(d, d, generator=rng)
    streams = torch.stack([x, x @ first + 1, (x @ first + 1) @ last - 3])

    class Model:
        W_E = torch.randn(30, d, generator=rng)

    fitter = AffineFitter(Model())
    tokens = torch.randint(0, 30, (8, n // 8), generator=rng)
    for part in (slice(0, 3), slice(3, 8)):
        fitter.add(Batch(tokens[part], streams[:, part], torch.zeros(*tokens[part].shape, 30)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(affine, "weight_hash", lambda model: "none")
        maps = fitter.freeze(Model(), None, 0.0)
        ridge = fitter.freeze(Model(), None, 5.0)
    torch.testing.assert_close(maps.output_weight[1], last, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(maps.output_weight[0], first @ last, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(maps.output_weight[2], torch.eye(d), rtol=1e-3, atol=1e-3)
    for layer in range(3):
        torch.testing.assert_close(maps.to_output(streams[layer], layer), streams[-1], rtol=1e-3, atol=0.05)
    # the same as ridge regression of centred data by hand
    flat, embedded = streams[0].flatten(0, 1).double(), Model.W_E[tokens.flatten()].double()
    centred = flat - flat.mean(0)
    wanted = torch.linalg.solve(centred.T @ centred + 5 * torch.eye(d), centred.T @ (embedded - embedded.mean(0)))
    torch.testing.assert_close(ridge.input_weight[0], wanted.float(), rtol=1e-4, atol=1e-5)
    predicted = flat.float() @ ridge.input_weight[0] + ridge.input_bias[0]
    torch.testing.assert_close(predicted.mean(0), embedded.float().mean(0), rtol=1e-4, atol=1e-4)


def test_the_affine_lens_of_a_model_whose_blocks_only_add_constants_is_its_output(tiny_model):
    tokens = np.random.default_rng(0).integers(0, 257, size=(80, 16))
    empty = bc.Subnetwork.empty(tiny_model)
    found = affine_lens(tiny_model, empty, tokens, alpha=1e-4)
    np.testing.assert_allclose(found.get("output_correlation", "subnetwork"), 1, atol=1e-3)
    np.testing.assert_allclose(found.get("kl", "subnetwork"), 0, atol=1e-3)
    assert found.get("kl", "full")[0] > 0.01  # the control: real blocks are not affine
    np.testing.assert_allclose(found.get("recall_at_1", "subnetwork"), found.get("recall_at_1", "subnetwork")[0])
    assert (found.get("recall_at_1") <= found.get("recall_at_5")).all()
    assert found.get("recall_at_10")[0] > 0.5 > 10 / 257


def test_recall_counts_the_tokens_that_are_nearest(tiny_model, random_tokens, monkeypatch):
    monkeypatch.setattr(activations, "_LOGITS_AT_ONCE", 257 * 5)
    monkeypatch.setattr(activations, "_ROWS_AT_ONCE", 1)
    maps = fit_affine_lens(tiny_model, random_tokens)
    found = affine_lens(tiny_model, random_tokens, maps=maps)
    tokens = torch.from_numpy(random_tokens)
    with torch.no_grad():
        streams, _ = residual_streams(tiny_model, tokens)
        scores = maps["full"].to_input(streams[2], 2) @ tiny_model.W_E.T
    nearest = scores.topk(5).indices
    share = (nearest == tokens[..., None]).any(-1).double().mean().item()
    assert found.get("recall_at_5")[2] == pytest.approx(share)


def test_training_on_kl_brings_the_lens_nearer_to_the_output(tiny_model):
    tokens = np.random.default_rng(0).integers(0, 257, size=(40, 16))
    ridge = fit_affine_lens(tiny_model, tokens)["full"]
    before = tiny_model.W_U.clone()
    better = refine_affine_lens(tiny_model, ridge, tokens, steps=30, learning_rate=1e-3)
    kl = [affine_lens(tiny_model, tokens, maps={"full": maps}).get("kl") for maps in (ridge, better)]
    assert (kl[1][:2] < kl[0][:2]).all()
    assert torch.equal(before, tiny_model.W_U)
    torch.testing.assert_close(better.input_weight, ridge.input_weight)
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_maps_are_saved_and_checked_when_loaded(tiny_model, any_model, random_tokens, half, tmp_path):
    maps = fit_affine_lens(tiny_model, half, random_tokens)
    assert list(maps) == ["full", "subnetwork", "complement", "random"]
    maps["subnetwork"].save(tmp_path / "maps.safetensors")
    again = AffineMaps.load(tmp_path / "maps.safetensors", tiny_model)
    assert again.condition == half.lineage
    for name in ("output_weight", "output_bias", "input_weight", "input_bias"):
        torch.testing.assert_close(getattr(again, name), getattr(maps["subnetwork"], name))
    if bc.weight_hash(any_model) != bc.weight_hash(tiny_model):
        with pytest.raises(ValueError, match="fitted on another model than"):
            AffineMaps.load(tmp_path / "maps.safetensors", any_model)
    with pytest.raises(FileNotFoundError, match="no file"):
        AffineMaps.load(tmp_path / "nothing")
    half.save(tmp_path / "subnetwork.safetensors")
    with pytest.raises(ValueError, match="format"):
        AffineMaps.load(tmp_path / "subnetwork.safetensors")
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(ValueError, match="holds no affine maps"):
        AffineMaps.load(tmp_path / "bad")


def test_a_tuned_lens_can_be_read_on_a_prompt(tiny_model, random_tokens):
    maps = fit_affine_lens(tiny_model, random_tokens, alpha=1e-6)
    found = logit_lens(tiny_model, "abcdef", maps=maps)
    plain = logit_lens(tiny_model, "abcdef")
    assert found.title == "Affine lens"
    np.testing.assert_allclose(found.get("probability")[-1], plain.get("probability")[-1], atol=1e-3)
    assert not np.allclose(found.get("probability")[0], plain.get("probability")[0])


def test_wrong_arguments_are_told_in_one_line(tiny_model, random_tokens, half):
    with pytest.raises(ValueError, match="empty"):
        logit_lens(tiny_model, "")
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\)"):
        logit_lens(tiny_model, np.zeros((2, 3, 4), dtype=int))
    with pytest.raises(ValueError, match="no affine maps for 'subnetwork'"):
        logit_lens(tiny_model, half, random_tokens, maps=fit_affine_lens(tiny_model, random_tokens))
    with pytest.raises(ValueError, match="at least 4 sequences"):
        affine_lens(tiny_model, random_tokens[:3])
    with pytest.raises(ValueError, match="at least 0, not -1"):
        fit_affine_lens(tiny_model, random_tokens, alpha=-1.0)
    with pytest.raises(ValueError, match="there is no quantity 'klx'"):
        logit_lens(tiny_model, random_tokens).get("klx")


def test_a_model_with_another_readout_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(lens, "readout", lambda model, residual: -readout(model, residual))
    with pytest.raises(ValueError, match="differs from its logits"):
        logit_lens(tiny_model, "abc")


def test_words_of_tokens_can_be_read(tiny_model):
    assert token_words(tiny_model, tiny_model.to_tokens("a")[0, -1:].tolist()) == ["a"]
    assert token_words(tiny_model, tiny_model.to_tokens("\n")[0, -1:].tolist()) == ["\u23ce"]


def test_the_weights_are_as_before(tiny_model, random_tokens, half):
    before = bc.weight_hash(tiny_model)
    logit_lens(tiny_model, half, random_tokens)
    affine_lens(tiny_model, half, random_tokens)
    assert bc.weight_hash(tiny_model) == before
    assert statistics.COLUMNS[:6] == ("used", "x", "y", "xx", "yy", "xy")
