"""Learning under an adversary: what it opens, whose gradients are whose, and runs that are resumed bit for bit."""

import os
import signal

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.learning import memory
from bigram_circuits.masking.apply import gate_values, opened
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.masking.gates import Adversary
from bigram_circuits.masking.parted import Parted
from tests.conftest import D_VOCAB
from tests.learning.test_training import StopsAt

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (24, 16))
CORPUS = bc.Corpus.from_tokens(TEXT[:16], TEXT[16:])
IDS = torch.from_numpy(TEXT[:4])
UNITS = {"weights": {"granularity": "weight"}, "heads and neurons": {"granularity": {"attn": "head", "mlp": "neuron"}}}


def recipe(**changes):
    return bc.SparsifyConfig(**({"max_steps": 6, "batch_size": 4, "retries": 0, "worst_case": 1} | changes))


@pytest.fixture(params=UNITS)
def attacked(request, tiny_model):
    """Candidates and gates with random scores, under an adversary that does not climb."""
    config = recipe(**UNITS[request.param])
    candidates = Candidates(tiny_model, config)
    gates, _ = candidates.gates(config, seed=0, within=None)
    with torch.no_grad():
        gates.scores.flat().add_(torch.randn(len(gates.scores), generator=torch.Generator().manual_seed(1)))
    gates.refresh(0)
    gates.adversary = Adversary(gates.scores)
    gates.adversary.begin(seed=3)
    gates.adversary.is_climbing = False
    return candidates, gates


def loss(model):
    return model(IDS, return_type="loss")


def opened_by(gates, scores, values):
    """By matrix: s + (1 - s) a in its stored layout, by plain operations."""
    soft = torch.sigmoid(scores)
    mixed = soft + (1 - soft) * values
    groups = gates.groups
    return {one.site.name: one.spread(mixed[one.place]).expand(one.site.original.shape) for one in groups}


def test_a_gate_is_open_as_far_as_scores_and_adversary_say(tiny_model, attacked):
    candidates, gates = attacked
    full = bc.Subnetwork.full(tiny_model)
    with torch.no_grad(), candidates.applied(gates):
        found = loss(tiny_model)
    by_hand = opened_by(gates, gates.scores.flat().detach(), gates.adversary.values.flat())
    with torch.no_grad(), opened(tiny_model, full, gate_values(tiny_model, full) | by_hand):
        assert float(loss(tiny_model)) == pytest.approx(float(found), abs=1e-5)
    gates.adversary = None
    with torch.no_grad(), candidates.applied(gates):
        assert abs(loss(tiny_model) - found) > 1e-3


def test_gradients_are_the_scores_or_the_adversarys(tiny_model, attacked):
    """Both equal those of the same loss with gates made by plain operations."""
    candidates, gates = attacked
    full = bc.Subnetwork.full(tiny_model)
    scores = gates.scores.flat().detach().clone().requires_grad_()
    values = gates.adversary.values.flat().clone().requires_grad_()
    soft = torch.sigmoid(scores)
    mixed = soft + (1 - soft) * values
    spread = {
        group.site.name: group.spread(mixed[group.place]).expand(group.site.original.shape) for group in gates.groups
    }
    with opened(tiny_model, full, gate_values(tiny_model, full) | spread):
        by_scores, by_values = torch.autograd.grad(loss(tiny_model), [scores, values])

    with candidates.applied(gates):
        gates.gradient.flat().zero_()
        loss(tiny_model).backward()
        assert torch.allclose(gates.gradient.flat(), by_scores, atol=1e-6, rtol=1e-3)
        before, kept = gates.adversary.values.flat().clone(), gates.gradient.flat().clone()
        gates.adversary.is_climbing = True
        loss(tiny_model).backward()
        gates.adversary.climb()
    assert torch.equal(gates.gradient.flat(), kept)  # a climbing adversary leaves them alone
    sure = by_values.abs() > 1e-7  # elsewhere rounding decides the sign
    wanted = (before + 0.25 * by_values.sign()).clamp(0, 1)
    assert torch.allclose(gates.adversary.values.flat()[sure], wanted[sure])
    assert sure.float().mean() > 0.5


def test_it_begins_anew_at_every_step(tiny_model):
    adversary = Adversary(Parted([torch.zeros(1000)]))
    adversary.begin(4)
    first = adversary.values.flat().clone()
    assert 0.45 < first.mean() < 0.55
    adversary.begin(5)
    assert not torch.equal(adversary.values.flat(), first)
    adversary.begin(4)
    assert torch.equal(adversary.values.flat(), first)


@pytest.mark.parametrize("method", ["continuous_sparsification", "straight_through"])
def test_a_run_is_resumed_bit_for_bit(tiny_model, tmp_path, method):
    config = recipe(worst_case=2, target_fraction=0.5, method=method)

    def find(stop_at=-1, **options):
        target = StopsAt(bc.ModelTarget(tiny_model), stop_at, lambda: os.kill(os.getpid(), signal.SIGINT))
        return bc.find_subnetwork(tiny_model, target, CORPUS, config, check_memory="off", **options)

    whole = find()
    other = bc.find_subnetwork(tiny_model, bc.ModelTarget(tiny_model), CORPUS, recipe(worst_case=0), check_memory="off")
    assert [one.cross_entropy for one in whole.history] != [one.cross_entropy for one in other.history]
    with pytest.raises(KeyboardInterrupt):
        find(8, run_dir=tmp_path)  # in the third step, while the adversary climbs
    again = find(run_dir=tmp_path)
    assert again.subnetwork == whole.subnetwork
    assert [one.cross_entropy for one in again.history] == [one.cross_entropy for one in whole.history]


def test_nodes_and_edges_are_learned_under_it_too(tiny_model):
    target = bc.ModelTarget(tiny_model)
    for units in ("head", "edge"):
        found = bc.find_circuit(tiny_model, target, CORPUS, recipe(max_steps=2), units=units, check_memory="off")
        assert found.circuit.kept < found.circuit.total


def test_its_memory_is_counted(tiny_model):
    with_it, without = (
        memory.forecast_memory(tiny_model, bc.ModelTarget(tiny_model), CORPUS, recipe(worst_case=k), mode="off")
        for k in (1, 0)
    )
    n_gates = bc.Subnetwork.full(tiny_model).total
    assert with_it.scores - without.scores == 8 * n_gates


def test_masks_withstand_more():
    """On a planted circuit whose distractors reach the output: the worst case after learning under it, and without."""
    planted = bc.plant_bigram(d_vocab=6, successors=2, n_layers=1, distractors=0.3, seed=1)
    target = bc.ModelTarget(planted.model)
    left = {}
    for k in (0, 1):
        config = bc.SparsifyConfig(target_fraction=0.3, max_steps=60, batch_size=8, worst_case=k)
        found = bc.find_subnetwork(planted.model, target, planted.corpus, config, check_memory="off")
        curves = bc.worst_case_ablation(planted.model, found, target, planted.corpus, (0, 20), 1)
        left[k] = curves.get("kl", "worst case")[1]
    assert left[1] < 0.7 * left[0], left
