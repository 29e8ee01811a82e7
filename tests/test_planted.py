"""On a model with a planted bigram circuit, the whole set of analyses shows it where it is, and nowhere else."""

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits import analysis


@pytest.fixture(scope="module")
def analyses(planted):
    model, subnetwork, tokens = planted
    corpus = bc.Corpus.from_tokens(tokens[:48], tokens[48:])
    target = bc.count_ngrams(tokens, 2, d_vocab=model.cfg.d_vocab)
    return bc.analyze(model, subnetwork, target, corpus)


def test_everything_is_measured_except_what_the_model_cannot_do(analyses):
    assert set(analyses.results) == {
        "logit_lens", "affine_lens", "cosine", "rotations", "covariance", "prompt_lens", "prompt_cosine", "attribution",
        "passages", "faithful_tokens",
        "by_layer", "by_head", "concentration", "whole_neurons", "max_activating_tokens", "ablation_components",
        "ablation_heads", "stochastic_ablation", "overlap_magnitude", "unit_effects", "predicted_effects",
        "neuron_map", "neurons_used",
    }  # fmt: skip
    assert list(analyses.left_out) == ["attention", "induction"]  # no head is kept, and there are too few tokens


def test_the_first_mlp_is_what_is_needed(analyses):
    rises = analyses.results["ablation_components"].get("rise_in_loss")
    assert rises["L0.mlp"] > 0.3
    assert all(abs(rise) < 0.05 for name, rise in rises.items() if name != "L0.mlp")
    inside = analyses.results["ablation_components"].get("rise_in_loss_in_subnetwork")
    assert inside["L0.mlp"] == pytest.approx(rises["L0.mlp"], rel=0.2)
    assert all(abs(rise) < 0.05 for rise in analyses.results["ablation_heads"].get("rise_in_loss").values())


def test_the_first_mlp_writes_the_prediction_with_and_without_the_rest(analyses):
    attribution = analyses.results["attribution"]
    for name in ("full", "subnetwork"):
        contributions = dict(zip(attribution.rows, attribution.get("contribution", name)[:, 0], strict=True))
        assert max(contributions, key=lambda row: contributions[row]) == "L0.mlp"
    without = attribution.get("contribution", "complement")[attribution.rows.index("L0.mlp"), 0]
    assert abs(without) < 0.1 * contributions["L0.mlp"]


def test_it_is_found_where_it_is(analyses, planted):
    where = analyses.results["by_layer"].get("share_of_kept", "subnetwork")
    assert where[0, 1] == 1
    assert where.sum() == 1
    n = planted[0].cfg.d_vocab
    neurons = {int(name.removeprefix("L0N")) for name in analyses.results["whole_neurons"].names}
    assert neurons <= set(range(n))
    tokens = analyses.results["max_activating_tokens"]
    for row, name in enumerate(tokens.rows):  # neuron j was planted to fire for token j
        token = int(name.removeprefix("L0N"))
        assert tokens.text[0][row][0] == analysis.prompts.token_word(planted[0], token)


def test_taking_away_the_rest_at_random_does_not_hurt_it(analyses):
    stochastic = analyses.results["stochastic_ablation"]
    assert (stochastic.get("surprisal_correlation", "subnetwork") > 0.9).all()
    assert not stochastic.get("surprisal_correlation", "random")[-1] > 0.5  # undefined: it predicts every token alike
    overlap = analyses.results["overlap_magnitude"]
    assert overlap.get("jaccard")["all"] > 0.5
    assert overlap.get("log10_p")["all"] < -100


def test_added_to_nothing_it_is_enough_and_random_weights_are_not(planted):
    model, subnetwork, tokens = planted
    found = bc.sufficiency(model, bc.Subnetwork.empty(model), {"planted": subnetwork}, tokens[:16])
    fall = found.get("fall_in_loss")["planted"]
    assert fall > 0.3
    assert abs(found.get("random_fall")["planted"]) < 0.1 * fall
    assert found.get("p")["planted"] < 1e-6
    assert found.get("loss")["planted"] == pytest.approx(found.notes["loss_of_full"], abs=0.05)


def test_the_residual_stream_keeps_its_geometry_where_nothing_happens(analyses):
    similarity = analyses.results["covariance"].get("cka", "subnetwork")
    np.testing.assert_allclose(similarity[1:, 1:], 1, atol=1e-4)  # the later blocks of the subnetwork are empty
    assert similarity[0, 1] < 0.99
