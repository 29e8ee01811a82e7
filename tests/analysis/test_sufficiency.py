"""Sufficiency: what was taken out and is put back restores everything; random additions are matched."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from bigram_circuits.analysis.components import random_within
from bigram_circuits.analysis.sufficiency import log_p_of_fall, random_additions, sufficiency
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.tasks.builtin import TASKS
from bigram_circuits.tasks.task import Task


@pytest.fixture(scope="module")
def third(tiny_model):
    full = Subnetwork.full(tiny_model)
    return random_within(full, {name: count.total // 3 for name, count in full.by_weight().items()}, 5)


def test_a_head_put_back_restores_the_loss(any_model):
    task = TASKS["repeated_random_tokens"](any_model, prompts=6, period=8)
    base = Subnetwork.full(any_model).drop_head(1, 2)
    found = sufficiency(any_model, base, ["L1H2", "L1H1"], task, seeds=2)
    loss = found.get("loss")
    assert loss["L1H2"] == found.notes["loss_of_full"]
    assert loss["L1H1"] == found.notes["loss_of_base"] != found.notes["loss_of_full"]
    assert found.get("weights_added") == {"L1H2": (~base).kept, "L1H1": 0}
    assert found.get("fall_in_loss")["L1H1"] == 0
    assert found.get("p")["L1H1"] == 1
    assert math.isnan(found.get("random_fall")["L1H2"])  # nothing else is left to add


def test_the_sweep_has_every_head_and_adds_up(tiny_model, third):
    task = TASKS["repeated_random_tokens"](tiny_model, prompts=6, period=8)
    found = sufficiency(tiny_model, third, "heads", task, seeds=2)
    assert found.names == tuple(f"L{layer}H{head}" for layer in range(2) for head in range(4))
    for name in found.names:
        fall = found.get("fall_in_loss")[name]
        assert fall == pytest.approx(found.get("excess")[name] + found.get("random_fall")[name])
        assert fall == pytest.approx(found.notes["loss_of_base"] - found.get("loss")[name])
    for quantity in (0, 1):
        assert (found.low[quantity] <= found.values[quantity] + 1e-9).all()
        assert (found.values[quantity] <= found.high[quantity] + 1e-9).all()
    assert ((found.values[-1] >= 0) & (found.values[-1] <= 1)).all()
    assert len(found.top(3)) == 3
    own = sufficiency(tiny_model, third, third.keep_head(0, 1).named("by hand"), task, seeds=0)
    assert own.get("loss")["by hand"] == pytest.approx(found.get("loss")["L0H1"], abs=1e-12)


def test_random_additions_are_matched_in_every_matrix(any_model):
    full = Subnetwork.full(any_model)
    base = random_within(full, {name: count.total // 3 for name, count in full.by_weight().items()}, 5)
    head = Subnetwork.empty(any_model).keep_head(1, 2)
    drawn = random_additions(base, head, 3)
    assert len(set(drawn)) == 3
    for random in drawn:
        assert (random & base).kept == 0
        assert random.by_weight() == (head - base).by_weight()
    assert random_additions(base, full, 3) == []
    assert random_additions(base, base, 3) == []


def test_names_and_mappings(tiny_model, third, random_tokens):
    additions = {"one": "L0H1 + L1.mlp", "other": ~third}
    found = sufficiency(tiny_model, third, additions, random_tokens, seeds=1)
    assert found.names == ("one", "other")
    assert found.get("loss")["other"] == found.notes["loss_of_full"]
    assert (
        sufficiency(tiny_model, third, "complement", random_tokens, seeds=0).get("loss")["complement"]
        == (found.notes["loss_of_full"])
    )


def test_a_contrast_is_reported(tiny_model, third):
    tokens = np.random.default_rng(0).integers(1, 257, (4, 6))
    scored = np.zeros((4, 6), dtype=bool)
    scored[:, 4] = True
    task = Task("pairs", tokens, scored, 1.0, wrong=np.full((4, 1), 9))
    found = sufficiency(tiny_model, third, "mlps", task, seeds=0)
    assert all(not math.isnan(value) for value in found.get("rise_in_log_odds").values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"added": "L9H0"}, "no layer 9"),
        ({"added": "everything"}, "cannot read 'everything'"),
        ({"added": []}, "no part"),
        ({"seeds": -1}, "seeds must be"),
        ({"task": "repeated"}, "type str"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(tiny_model, third, random_tokens, options, words):
    options = {"base": third, "added": "heads", "task": random_tokens} | options
    with pytest.raises(ValueError, match=words) as caught:
        sufficiency(tiny_model, **options)
    assert "\n" not in str(caught.value)


def test_p_is_that_of_the_normal_distribution():
    differences = np.array([1.0, 2.0, 3.0, -1.0])
    z = differences.mean() / (differences.std(ddof=1) / 2)
    assert log_p_of_fall(differences) == pytest.approx(norm.logsf(z))
    assert log_p_of_fall(np.zeros(3)) == 0
    assert log_p_of_fall(np.ones(3)) == -math.inf
    assert math.isnan(log_p_of_fall(np.ones(1)))
