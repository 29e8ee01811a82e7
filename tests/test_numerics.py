"""Precision, the gap between soft gates and the mask made of them, and statistics that are undefined."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.overlap import jaccard
from bigram_circuits.evaluation import GAP_MATTERS, SoftHardGap, soft_hard_gap
from bigram_circuits.masking.gates import group_gates
from bigram_circuits.masking.methods.continuous_sparsification import ContinuousSparsification
from bigram_circuits.measures import statistics
from bigram_circuits.text.corpus import batch_of
from tests.conftest import D_VOCAB

# --- float32 and bfloat16: the bounds that docs/gpu.md states ---

BOUNDS = {
    "surprisal_correlation": 0.001, "cross_entropy": 0.01, "kl": 0.01, "mean_surprisal": 0.01, "top1_agreement": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def narrow_model():
    return bc.load_model("reference", device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_bfloat16_agrees_with_float32_within_the_bounds_stated(reference_model, narrow_model, reference_corpus, share):
    table = bc.count_ngrams(reference_corpus.train[:500], 2, d_vocab=reference_model.cfg.d_vocab)
    generator = torch.Generator().manual_seed(0)
    shapes = bc.Subnetwork.full(reference_model).shapes
    some = bc.Subnetwork({name: torch.rand(shape, generator=generator) < share for name, shape in shapes.items()})
    text = reference_corpus.held_out[:16]
    wide, narrow = (
        bc.evaluate(model, some, table, text, controls=False).subnetwork for model in (reference_model, narrow_model)
    )
    for name, bound in BOUNDS.items():
        assert getattr(narrow, name) == pytest.approx(getattr(wide, name), abs=bound), name


# --- soft gates and the hard mask ---


def gates_of(model, scores, step, growth=1.1):
    gates = ContinuousSparsification(group_gates(bc.weight_sites(model), {"attn": "weight", "mlp": "weight"}),
                                     beta_growth=growth)  # fmt: skip
    with torch.no_grad():
        gates.scores.flat().copy_(scores)
    masks = gates.masks()
    return gates, bc.Subnetwork({site.name: site.from_stored(masks[site.name]) for site in bc.weight_sites(model)})


@pytest.fixture(scope="module")
def table(random_tokens):
    return bc.count_ngrams(random_tokens, 2, d_vocab=D_VOCAB)


def test_the_gap_between_soft_gates_and_mask_is_measured_on_one_batch(any_model, table, random_tokens):
    tokens = batch_of(random_tokens, 4, step=0)
    total = bc.Subnetwork.full(any_model).total
    scores = torch.randn(total, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    gates, mask = gates_of(any_model, scores, 0)
    undecided = soft_hard_gap(any_model, gates, mask, table, tokens, step=0)
    decided = soft_hard_gap(any_model, gates, mask, table, tokens, step=400)
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())
    with torch.no_grad(), bc.masked(any_model, mask):
        hard = table.cross_entropy(any_model(tokens), tokens).mean().item()
    assert undecided.hard == decided.hard == pytest.approx(hard, abs=1e-6)
    assert undecided.gap == undecided.hard - undecided.soft
    assert abs(decided.gap) < 1e-4 < abs(undecided.gap)
    assert decided.warning is None
    for module in any_model.modules():  # the gates are gone, and nothing of them is left to learn
        assert not hasattr(module, "parametrizations")


def test_a_gap_that_matters_is_warned_about():
    assert SoftHardGap(2.0, 2.0 + 0.9 * GAP_MATTERS).warning is None
    assert "0.500 above that of the soft gates" in str(SoftHardGap(2.0, 2.5).warning)
    assert "0.500 below that of the soft gates" in str(SoftHardGap(2.0, 1.5).warning)


# --- undefined, not 0 and not an exception; nothing over infinities ---


@given(x=st.floats(-50, 50), n=st.integers(2, 20), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_the_correlation_of_a_constant_is_undefined(x, n, seed):
    varied = torch.from_numpy(np.random.default_rng(seed).exponential(3, (1, n)))
    same = torch.full_like(varied, x)
    for pair in ((same, varied), (varied, same), (same, same)):
        sums = np.pad(statistics.correlation_sums(*pair).numpy(), ((0, 0), (0, 6)), constant_values=1.0)
        assert math.isnan(statistics.correlation(sums.sum(0)))
        assert statistics.faithfulness(sums, 0, 1).to_json()["surprisal_correlation"] is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nothing_is_correlated_with_infinities(wrong):
    x, y = torch.rand(2, 5, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    bad = x.clone()
    bad[1, 2] = wrong
    with pytest.raises(ValueError, match="a model's surprisal is not finite"):
        statistics.correlation_sums(bad, y)
    if math.isnan(wrong):
        with pytest.raises(ValueError, match="a target's surprisal is NaN"):
            statistics.correlation_sums(x, bad)
    else:  # the zero-probability rule
        sums = statistics.correlation_sums(x, bad)
        assert sums[:, 0].tolist() == [5, 4]
        assert sums.isfinite().all()


class Infinite:
    """A target that is surprised without end."""

    def cross_entropy(self, logits, tokens):
        return torch.full(tokens.shape, math.inf)

    def surprisal(self, tokens):
        return torch.zeros(tokens.shape[0], tokens.shape[1] - 1)


def test_an_infinite_cross_entropy_is_an_error(tiny_model, random_tokens):
    with pytest.raises(ValueError, match="the target's cross-entropy is not finite"):
        bc.evaluate(tiny_model, bc.Subnetwork.full(tiny_model), Infinite(), random_tokens, controls=False)


def test_analyses_give_undefined_numbers_for_constants(tiny_model, random_tokens):
    """A target that is surprised alike by every token."""
    constant = bc.NGramTable.from_probs(torch.full((D_VOCAB, D_VOCAB), 1 / D_VOCAB))
    found = analysis.logit_lens(tiny_model, random_tokens, target=constant)
    assert np.isnan(found.get("surprisal_correlation")).all()
    assert np.isfinite(found.get("kl")).all()
    changed = analysis.ablate(tiny_model, ["L0.attn"], random_tokens, target=constant, seeds=1)
    assert math.isnan(changed.get("change_in_r")["L0.attn"])
    assert math.isfinite(changed.get("rise_in_loss")["L0.attn"])
    empty = bc.Subnetwork.empty(tiny_model)
    assert math.isnan(jaccard(empty, empty))
    assert math.isnan(analysis.linear_cka(torch.ones(8, 3), torch.rand(8, 3)))
    measured = bc.evaluate(tiny_model, empty, constant, random_tokens, seeds=1)
    assert measured.to_json()["subnetwork"]["surprisal_correlation"] is None
    assert measured.by_loss  # it is judged by its cross-entropy instead
    ends = measured.to_json()["advantage"]["full"]
    gap = measured.full.cross_entropy - measured.subnetwork.cross_entropy
    assert ends[0] <= gap <= ends[1]


def test_numbers_written_to_files_are_finite_or_none(tiny_model, random_tokens, tmp_path):
    constant = bc.NGramTable.from_probs(torch.full((D_VOCAB, D_VOCAB), 1 / D_VOCAB))
    analysis.logit_lens(tiny_model, random_tokens, target=constant).save(tmp_path / "lens.json")
    text = (tmp_path / "lens.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
