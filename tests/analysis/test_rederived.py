"""Numbers of the analyses, worked out a second time, plainly."""

import json
import math

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.ablation import _Replace
from bigram_circuits.analysis.components import coordinates, parse
from bigram_circuits.analysis.sufficiency import log_p_of_fall
from bigram_circuits.measures import results, statistics
from bigram_circuits.models.activations import residual_streams
from bigram_circuits.tasks.task import as_task, batches
from tests.conftest import D_VOCAB


@pytest.fixture(scope="module")
def half(tiny_model):
    generator = torch.Generator().manual_seed(1)
    shapes = bc.Subnetwork.full(tiny_model).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def target():
    return bc.count_ngrams(np.random.default_rng(1).integers(0, D_VOCAB, (2000, 32)), d_vocab=D_VOCAB)


def losses(logits, tokens):
    log_probs = logits.double().log_softmax(-1)[:, :-1]
    return -log_probs.gather(2, torch.from_numpy(tokens)[:, 1:, None])[..., 0].numpy()


def test_mean_ablation_is_a_hook_that_writes_the_mean(tiny_model, random_tokens):
    """Of L0H1 alone, over all sequences and positions."""
    inputs = torch.from_numpy(random_tokens)
    seen = {}
    with torch.no_grad():
        tiny_model.run_with_hooks(
            inputs, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: seen.update(z=z.clone()))]
        )
        mean = seen["z"][:, :, 1].mean((0, 1))

        def write(z, hook):
            z = z.clone()
            z[:, :, 1] = mean
            return z

        changed = tiny_model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.attn.hook_z", write)])
        before = losses(tiny_model(inputs), random_tokens).mean()
    found = analysis.ablate(tiny_model, "L0H1", random_tokens, by="mean", seeds=0)
    after = losses(changed, random_tokens).mean()
    assert found.get("loss")["L0H1"] == pytest.approx(after, rel=1e-6)
    assert found.get("rise_in_loss")["L0H1"] == pytest.approx(after - before, abs=1e-6)


def test_intervals_are_paired_bootstraps_over_sequences(tiny_model, half, target, random_tokens):
    found = analysis.ablate(tiny_model, "L0.mlp", half, random_tokens, by="weights", target=target, seeds=0)
    inputs = torch.from_numpy(random_tokens)
    with torch.no_grad():
        before = losses(tiny_model(inputs), random_tokens)
        kept = ~parse("L0.mlp", tiny_model)[0].weights(bc.Subnetwork.empty(tiny_model))
        with bc.masked(tiny_model, kept):
            after = losses(tiny_model(inputs), random_tokens)
    theirs = target.surprisal(random_tokens).double().numpy()
    rng = np.random.default_rng(0)
    n = len(random_tokens)
    rises, changes = [], []
    for _ in range(1000):
        rows = np.repeat(np.arange(n), rng.multinomial(n, np.full(n, 1 / n)))
        rises.append(after[rows].mean() - before[rows].mean())
        y = theirs[rows].ravel()
        used = np.isfinite(y)
        r = [np.corrcoef(x[rows].ravel()[used], y[used])[0, 1] for x in (after, before)]
        changes.append(r[0] - r[1])
    for quantity, draws in (("rise_in_loss", rises), ("change_in_r", changes)):
        at = [one.name for one in found.quantities].index(quantity)
        assert found.low[at, 0] == pytest.approx(np.quantile(draws, 0.025), abs=1e-5)
        assert found.high[at, 0] == pytest.approx(np.quantile(draws, 0.975), abs=1e-5)


def test_the_lens_of_a_layer_is_read_from_the_stream_after_that_block(any_model, target, random_tokens):
    """`embed` is before block 0, `0` after it, and so on; its r is numpy's, its interval the loop's."""
    found = analysis.logit_lens(any_model, random_tokens, target=target)
    inputs, streams = torch.from_numpy(random_tokens), {}

    def keep(name):
        return lambda value, hook: streams.update({name: value.clone()})

    points = {"embed": "blocks.0.hook_resid_pre", "0": "blocks.0.hook_resid_post", "1": "blocks.1.hook_resid_post"}
    with torch.no_grad():
        any_model.run_with_hooks(inputs, fwd_hooks=[(point, keep(name)) for name, point in points.items()])
    theirs = target.surprisal(random_tokens).double().numpy()
    used = np.isfinite(theirs)
    for place, name in enumerate(found.points):
        with torch.no_grad():
            x = losses(any_model.unembed(any_model.ln_final(streams[name])), random_tokens)
        r = np.corrcoef(x[used], theirs[used])[0, 1]
        assert found.get("surprisal_correlation")[place] == pytest.approx(r, abs=1e-5)
        rng, n, draws = np.random.default_rng(0), len(random_tokens), []
        for _ in range(1000):
            rows = np.repeat(np.arange(n), rng.multinomial(n, np.full(n, 1 / n)))
            draws.append(x[rows].mean())
        ends = found.interval("mean_surprisal")[:, place]
        assert ends == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-5)


def test_a_cosine_is_with_the_token_of_its_own_position_and_the_next_of_the_next(tiny_model):
    """On a prompt with a start token put before it, and without."""
    with_start = tiny_model.to_tokens("abcd", prepend_bos=True)[0]
    without = tiny_model.to_tokens("abcd", prepend_bos=False)[0]
    assert len(with_start) == len(without) + 1
    for tokens in (with_start, without):
        found = analysis.cosine_to_unembedding(tiny_model, tokens)
        assert len(found.columns) == len(tokens)
        with torch.no_grad():
            streams, _ = residual_streams(tiny_model, tokens[None])
        for place in range(len(tokens) - 1):
            for quantity, vector in (
                ("current_embedding", tiny_model.W_E[tokens[place]]),
                ("next_unembedding", tiny_model.W_U[:, tokens[place + 1]]),
            ):
                wanted = torch.cosine_similarity(streams[1, 0, place], vector, dim=0).item()
                assert found.get(quantity)[1, place] == pytest.approx(wanted, abs=1e-5)
    text = analysis.cosine_to_unembedding(tiny_model, "abcd")
    assert len(text.columns) == len(tiny_model.to_tokens("abcd")[0])


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_resampling_never_pairs_a_sequence_with_itself(tiny_model, n, size):
    tokens = np.random.default_rng(n).integers(0, D_VOCAB, (n, 6))
    task = as_task(tokens, D_VOCAB)
    (part,) = parse("L0.mlp", tiny_model)
    for seed in range(3):
        for index, rows in enumerate(batches(n, size, smallest=2)):
            inside = len(range(n)[rows])
            assert inside >= 2
            replace = _Replace(coordinates(tiny_model, part), "resample", {}, task, seed)
            ((_, hook),) = replace(index, rows)
            width = tiny_model.cfg.d_model
            value = torch.arange(inside).float()[:, None, None].expand(inside, 6, width).contiguous()
            partner = hook(value, None)[:, 0, 0].long().tolist()
            assert sorted(partner) == list(range(inside))
            assert all(other != own for own, other in enumerate(partner))


def test_random_controls_have_as_many_weights_in_every_matrix(half):
    for seed in range(3):
        assert half.random_like(seed=seed).by_weight() == half.by_weight()


# --- what is undefined ---


def whole(result):
    """It can be written as strict JSON and read again, tabulated and drawn."""
    back = results.result_from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    np.testing.assert_array_equal(back.values, result.values)
    assert len(str(result)) > 0
    for quantity in result.quantities:
        json.dumps(json.loads(result.plot(quantity.name).to_json()), allow_nan=False)
    return result


def test_one_sequence_has_no_p_and_intervals_of_no_width(tiny_model, half):
    tokens = np.random.default_rng(0).integers(0, D_VOCAB, (1, 12))
    found = whole(analysis.sufficiency(tiny_model, half, "attns", tokens, seeds=1))
    assert all(math.isnan(p) for p in found.get("p").values())
    np.testing.assert_allclose(found.low[0], found.values[0])
    np.testing.assert_allclose(found.high[0], found.values[0])
    assert math.isnan(log_p_of_fall(np.array([1.0])))
    whole(analysis.ablate(tiny_model, ["L0.mlp", "L0H1"], tokens, seeds=0))
    whole(analysis.logit_lens(tiny_model, half, tokens))


def test_p_is_never_0(tiny_model, half):
    tokens = np.repeat(np.random.default_rng(0).integers(0, D_VOCAB, (1, 12)), 4, 0)  # no spread at all
    found = whole(analysis.sufficiency(tiny_model, half, "attns", tokens, seeds=0))
    assert all(0 < p <= 1 for p in found.get("p").values())


def test_holm_leaves_out_what_is_undefined():
    adjusted = statistics.holm([math.log(0.01), math.nan, math.log(0.03)])
    np.testing.assert_allclose(np.exp(adjusted), [0.02, math.nan, 0.03])
    assert np.isnan(statistics.holm([math.nan])).all()
    assert statistics.holm([]) == []


def test_what_is_constant_or_missing_is_nan_and_stays_readable(tiny_model, half, target):
    empty = bc.Subnetwork.empty(tiny_model)
    tokens = np.full((4, 8), 5)
    lens = whole(analysis.logit_lens(tiny_model, empty, tokens, target=target))
    assert np.isnan(lens.get("output_correlation")).all()  # every surprisal is the same
    assert np.isnan(whole(analysis.covariance_similarity(tiny_model, tokens)).values).any()
    whole(analysis.cosine_to_unembedding(tiny_model, empty, tokens))
    whole(analysis.cosine_to_unembedding(tiny_model, half, "abc"))
    whole(analysis.logit_lens(tiny_model, half, "abc"))
    whole(analysis.max_activating_tokens(tiny_model, [(0, 1)], empty, tokens))
    whole(analysis.stochastic_ablation(tiny_model, half, target, tokens, shares=(0, 1), draws=1))
    for one in (
        analysis.by_layer(empty),
        analysis.by_matrix(empty),
        analysis.by_head(empty),
        analysis.by_neuron(empty),
    ):
        whole(one)
    whole(analysis.concentration(half, layers=[0, 1]))
    whole(analysis.attention_patterns(tiny_model, "abc", heads=[(1, 2)]))


def test_the_rank_of_the_next_token_is_a_whole_number(tiny_model):
    ranks = analysis.logit_lens(tiny_model, torch.arange(40)).get("next_rank")[:, :-1]
    assert (ranks == ranks.round()).all()


def test_tokens_that_read_the_same_are_told_apart(tiny_model):
    """Two bytes that are no character on their own."""
    found = analysis.logit_attribution(tiny_model, "abc", answer=250, wrong=251)
    assert len(set(found.columns)) == 3
    assert found.values.shape[-1] == 3
    assert len(found.notes["logits"]["full"]) == 2
    np.testing.assert_allclose(found.values[..., 2], found.values[..., 0] - found.values[..., 1])
