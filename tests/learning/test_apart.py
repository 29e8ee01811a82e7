"""Masks learned apart from others: the price of an overlap, what it changes, and what else depends on it."""

import math
import os
import signal

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis.overlap import jaccard
from bigram_circuits.learning import memory, training
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.masking.gates import group_gates
from bigram_circuits.masking.methods.continuous_sparsification import ContinuousSparsification
from bigram_circuits.masking.methods.hard_concrete import HardConcrete, hard_concrete
from bigram_circuits.masking.methods.straight_through import StraightThrough
from bigram_circuits.runs import RunSettings, run_id
from tests.conftest import D_VOCAB
from tests.learning.test_training import StopsAt

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = np.random.default_rng(0).integers(0, 12, (24, 16))
CORPUS = bc.Corpus.from_tokens(TEXT[:16], TEXT[16:])
TARGET = bc.count_ngrams(TEXT[:16], 2, d_vocab=D_VOCAB)
METHODS = ("continuous_sparsification", "hard_concrete", "straight_through")


def recipe(**changes):
    return bc.SparsifyConfig(
        **({"max_steps": 6, "short_until": 0, "batch_size": 4, "target_fraction": 0.2, "retries": 0} | changes)
    )


def find(model, config=None, **options):
    return bc.find_subnetwork(model, TARGET, CORPUS, config or recipe(), check_memory="off", **options)


# --- the price ---


SOFT = {
    "continuous sparsification": lambda scores, gates: torch.sigmoid(1.5 * (scores - gates.threshold)),
    "hard concrete": lambda scores, gates: hard_concrete(scores - gates.threshold, gates._uniform.flat().double()),
    "straight through": lambda scores, gates: scores,  # its slope is 1
}


@pytest.mark.parametrize("units", [{"attn": "weight", "mlp": "weight"}, {"attn": "head", "mlp": "neuron"}], ids=str)
@pytest.mark.parametrize("name", SOFT)
def test_its_gradient_is_that_of_finite_differences_of_the_formula(tiny_model, name, units):
    """overlap weight * mean over weights of soft gate * times kept, summed by hand over the weights of every gate."""
    generator = torch.Generator().manual_seed(0)
    groups = group_gates(bc.weight_sites(tiny_model), units)
    times = {
        group.site.name: torch.randint(0, 3, group.site.original.shape, generator=generator).double()
        for group in groups
    }
    kind, how = {
        "continuous sparsification": (ContinuousSparsification, {"beta_start": 1.5}),
        "hard concrete": (HardConcrete, {"seed": 5}),
        "straight through": (StraightThrough, {"target": 3000, "steps": 4}),
    }[name]
    with_price, without = (
        kind(groups, times_kept=times if priced else None, overlap_weight=7.0, **how) for priced in (True, False)
    )
    scores = torch.randn(len(with_price.scores), generator=generator)
    for gates in (with_price, without):
        with torch.no_grad():
            gates.scores.flat().copy_(scores)
        gates.threshold = 0.1
        gates.refresh(0)
        gates.penalise(3.0)
    found = (with_price.gradient.flat() - without.gradient.flat()).double()

    total = torch.zeros(len(scores), dtype=torch.float64)  # how often the weights of each gate are kept
    for group in groups:
        own, kept = total[group.place], times[group.site.name]
        if group.unit == "weight":
            own += kept.flatten()
        else:
            along = kept.sum(1) if group.site.stored_axes.startswith(("(", "d_mlp")) else kept.sum(0)
            own += along.view(group.count, -1).sum(1)

    def price(at, step):
        moved = scores.double()
        moved[at] += step
        return 7.0 * (SOFT[name](moved, with_price) * total).sum() / with_price.n_weights

    for at in torch.randperm(len(scores), generator=generator)[:12].tolist():
        by_hand = (price(at, 1e-5) - price(at, -1e-5)) / 2e-5
        torch.testing.assert_close(found[at], by_hand, rtol=1e-3, atol=1e-9)
    assert found.abs().max() > 1e-4


def test_a_shared_key_value_head_counts_for_all_its_queries(tiny_folders):
    model = bc.load_model(tiny_folders["llama"], device="cpu")  # four query heads, two key-value heads
    full = bc.Subnetwork.full(model)
    config = recipe(granularity="head", target_fraction=None)
    apart = training._apart([full.drop_head(0, 0)], 1.0, config)
    gates, _ = Candidates(model, config).gates(config, 0, None, apart)
    share = gates._times_kept[:4].tolist()
    assert share[2:] == [1.0, 1.0]
    assert 0 < share[0] < share[1] <= 1  # its own keys and values are kept for the other head of its group


# --- what it changes ---


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("method", METHODS)
def test_a_price_lowers_the_overlap_and_an_infinite_one_ends_it(tiny_model, method, granularity):
    changes = {"granularity": {"mlp": granularity}, "layers": (0,), "target_fraction": 0.83, "learning_rate": 0.2}
    config = recipe(method=method, **changes)
    gated = Candidates(tiny_model, config).droppable
    first = find(tiny_model, config).subnetwork
    found = {
        weight: find(tiny_model, config, apart_from=[first], overlap_weight=weight).subnetwork
        for weight in (0, 1e5, math.inf)
    }
    assert found[0] == first
    for weight in (1e5, math.inf):
        assert found[weight].kept == first.kept  # neurons are of one size
    if method != "hard_concrete":  # whose gates are often clipped, so that six steps move them little
        assert jaccard(found[1e5] & gated, first & gated) < 0.5
    assert (found[math.inf] & first & gated).kept == 0
    assert found[math.inf].lineage == "found apart from 1 other"


def test_every_mask_counts_and_within_still_holds(tiny_model):
    config = recipe(target_fraction=0.1)
    full = bc.Subnetwork.full(tiny_model)
    first, second = full.random_like(seed=0).drop_layer(1), full.drop_layer(0).drop_head(1, 0)
    within = full.drop_head(1, 0)
    apart_from, bounds = [first, second], {"within": within}
    with pytest.raises(ValueError, match="cannot keep 845: only 0 that may be kept are in none of the 2 masks"):
        find(tiny_model, config, apart_from=apart_from, overlap_weight=math.inf, **bounds)
    found = find(tiny_model, config, apart_from=apart_from[1:], overlap_weight=math.inf, **bounds).subnetwork
    assert found.kept == round(0.1 * full.total)
    assert (found - within).kept == (found & second).kept == 0
    assert found.lineage == f"found within ({within.lineage}) apart from 1 other"


@pytest.mark.parametrize("units", [("head", "neuron"), ("edge",)])
def test_nodes_and_edges(tiny_model, units):
    config = recipe(method="straight_through", units=units, target_fraction=0.25)
    how = {"check_memory": "off"}
    first = bc.find_circuit(tiny_model, TARGET, CORPUS, config, **how).circuit
    others = {
        weight: bc.find_circuit(tiny_model, TARGET, CORPUS, config, apart_from=[first], overlap_weight=weight, **how)
        for weight in (1e5, math.inf)
    }
    for other in others.values():
        assert other.circuit.kept == first.kept
        assert (other.circuit & first).kept == 0


# --- resuming, and the run's identity ---


@pytest.mark.parametrize("weight", [50.0, math.inf])
def test_an_interrupted_run_continues_to_the_same_mask(tiny_model, tmp_path, monkeypatch, weight):
    monkeypatch.setattr(training, "forecast_memory", lambda *_, **__: None)  # so that steps are counted
    first = find(tiny_model).subnetwork
    how = {"apart_from": [first], "overlap_weight": weight, "check_memory": "off"}
    expected = bc.find_subnetwork(tiny_model, TARGET, CORPUS, recipe(), **how)
    stopping = StopsAt(TARGET, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="after step 3 of at most 6"):
        bc.find_subnetwork(tiny_model, stopping, CORPUS, recipe(), run_dir=tmp_path, **how)
    never = StopsAt(TARGET, 10_000, lambda: None)
    found = bc.find_subnetwork(tiny_model, never, CORPUS, recipe(), run_dir=tmp_path, **how)
    assert found.subnetwork == expected.subnetwork != first
    assert found.history == expected.history


def test_the_masks_and_the_weight_belong_to_the_run(tiny_model, tmp_path):
    first = find(tiny_model).subnetwork
    found = find(tiny_model, run_dir=tmp_path, apart_from=[first], overlap_weight=20.0)
    settings = bc.load_run(tmp_path).settings
    assert (settings.apart_from, settings.overlap_weight) == ((first.checksum,), 20.0)
    assert RunSettings.from_json(settings.to_json()) == settings
    assert find(tiny_model, run_dir=tmp_path, apart_from=[first], overlap_weight=20.0).subnetwork == found.subnetwork
    for how, said in (
        ({"apart_from": [first], "overlap_weight": 21.0}, r"its overlap_weight is 20.0, not 21.0"),
        ({"apart_from": [first], "overlap_weight": math.inf}, r"its overlap_weight is 20.0, not None"),
        ({"apart_from": [~first], "overlap_weight": 20.0}, r"its apart_from is "),
        ({}, r"its apart_from is "),
    ):
        with pytest.raises(ValueError, match=said):
            find(tiny_model, run_dir=tmp_path, **how)


def test_a_run_of_its_own_has_the_settings_that_it_always_had(tiny_model, tmp_path):
    find(tiny_model, run_dir=tmp_path, apart_from=[], overlap_weight=5.0)
    settings = bc.load_run(tmp_path).settings
    assert "apart_from" not in settings.to_json()
    assert "overlap_weight" not in settings.to_json()
    assert settings.apart_from == ()
    assert run_id(tmp_path)
    find(tiny_model, run_dir=tmp_path)  # the same run


def test_the_forecast_counts_what_it_takes(tiny_model):
    config = recipe()
    n = Candidates(tiny_model, config).gated_size
    forecasts = [
        bc.forecast_memory(tiny_model, TARGET, CORPUS, config, apart_from=others, mode="off").scores
        for others in ([], [bc.Subnetwork.full(tiny_model)])
    ]
    gates, _ = Candidates(tiny_model, config).gates(
        config, 0, None, training._apart([bc.Subnetwork.full(tiny_model)], 1.0, config)
    )
    assert forecasts[1] - forecasts[0] == memory._PER_GATE_APART * n == gates._times_kept.flat().nbytes


def test_bad_input(tiny_model):
    full = bc.Subnetwork.full(tiny_model)
    heads = bc.Circuit.full(tiny_model, "head")
    for how, said in (
        (
            {"apart_from": [full], "overlap_weight": -1},
            "overlap_weight must be a number of at least 0, or math.inf, not",
        ),
        ({"apart_from": [full], "overlap_weight": math.nan}, "overlap_weight must be a number of at least 0"),
        ({"apart_from": [heads]}, "each mask of apart_from should be a Subnetwork, as what is found, not a Circuit"),
        ({"apart_from": [full], "config": recipe(polish=1)}, "polishing would share weights again: leave polish out"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            find(tiny_model, **how)
        assert "\n" not in str(error.value)
