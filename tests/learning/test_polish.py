"""Polishing drops what costs nothing and re-admits what helps, by losses that are computed here without the package."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.learning import polish as polishing
from bigram_circuits.learning import training
from bigram_circuits.masking.apply import switched
from tests.conftest import planted_circuit

PLANT = {"d_vocab": 8, "successors": 2, "distractors": 0.3, "n_layers": 1}
WEIGHT = 1.0  # of the penalty; at it, every planted weight is worth its price

pytestmark = pytest.mark.usefixtures("one_thread", "no_forecast")


@pytest.fixture(scope="module")
def circuit():
    return planted_circuit("gpt2", **PLANT)


def polished(circuit, subnetwork, **options):
    options = {"sparsity_weight": WEIGHT, "sequences": 16} | options
    return bc.polish(circuit.model, subnetwork, circuit.target, circuit.corpus, **options)


def one_of(circuit, name, place):
    """The subnetwork of a single weight."""
    masks = {key: torch.zeros(shape, dtype=torch.bool) for key, shape in circuit.circuit.shapes.items()}
    masks[name][tuple(place)] = True
    return bc.Subnetwork(masks)


def some(circuit, subnetwork, count, seed=0):
    """A few weights of a subnetwork, chosen at random, as subnetworks of one weight each."""
    rng = np.random.default_rng(seed)
    places = [(name, place) for name, mask in subnetwork.items() for place in mask.nonzero().tolist()]
    return [one_of(circuit, *places[index]) for index in rng.choice(len(places), count, replace=False)]


def union(first, others):
    for one in others:
        first = first | one
    return first


def plain_loss(circuit, plain, subnetwork):
    """Cross-entropy on all bigrams alike, by plain Hugging Face with the masked weights written into its parameters."""
    kept, weights = subnetwork.to_huggingface(circuit.model), dict(plain.named_parameters())
    with torch.no_grad():
        whole = {name: weights[name].clone() for name in kept}
        for name, mask in kept.items():
            weights[name].mul_(mask)
        n = circuit.model.cfg.d_vocab
        logits = plain(torch.arange(n)[:, None]).logits[:, 0].double().numpy()
        for name, weight in whole.items():
            weights[name].copy_(weight)
    log_probs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    log_probs -= logits.max(1, keepdims=True)
    return -(circuit.probs.numpy() * log_probs).sum(1).mean()


def test_distractors_are_dropped_and_no_planted_weight_is(circuit):
    start = union(circuit.circuit, some(circuit, ~circuit.circuit, 12))
    found = polished(circuit, start)
    assert found.subnetwork == circuit.circuit
    assert found.dropped == start - circuit.circuit
    assert found.readmitted.kept == 0
    assert found.subnetwork.lineage.startswith("polished (planted | ")
    assert found.subnetwork.weight_hash == circuit.circuit.weight_hash
    assert found.record.dropped == 12
    assert found.record.measured == found.measured > 0


def test_planted_weights_that_were_removed_are_readmitted(circuit):
    missing = some(circuit, circuit.circuit, 3)
    start = circuit.circuit - union(missing[0], missing[1:])
    found = polished(circuit, start)
    assert found.subnetwork == circuit.circuit
    assert found.readmitted == union(missing[0], missing[1:])
    assert found.after < found.before


def test_a_circuit_of_kl_0_stays_as_it_is(circuit):
    for same_size in (False, True):
        found = polished(circuit, circuit.circuit, same_size=same_size)
        assert found.subnetwork == circuit.circuit
        assert found.before == found.after


def test_at_the_same_size_distractors_are_exchanged_for_what_is_missing(circuit):
    missing, extra = some(circuit, circuit.circuit, 3), some(circuit, ~circuit.circuit, 3)
    start = union(circuit.circuit - union(missing[0], missing[1:]), extra)
    found = polished(circuit, start, same_size=True)
    assert found.subnetwork.kept == start.kept
    assert found.subnetwork == circuit.circuit


@pytest.mark.parametrize("same_size", [False, True])
@pytest.mark.parametrize("most", [1, 40])
def test_it_is_never_worse_on_its_objective_and_always_the_same(circuit, same_size, most):
    start = bc.Subnetwork.full(circuit.model).random_like().only(layers=0)
    start = union(circuit.circuit - some(circuit, circuit.circuit, 1, seed=1)[0], some(circuit, start, 30))
    found, again = (polished(circuit, start, same_size=same_size, most=most, passes=2) for _ in range(2))
    assert found == again
    price = 0.0 if same_size else WEIGHT / start.total
    assert found.after + price * found.subnetwork.kept <= found.before + price * start.kept
    assert found.subnetwork == (start - found.dropped) | found.readmitted
    if same_size:
        assert found.subnetwork.kept == start.kept


def test_what_it_drops_and_readmits_is_what_plain_hugging_face_says_pays(tmp_path):
    circuit = bc.plant_bigram("gpt2", **PLANT, folder=tmp_path)
    missing = some(circuit, circuit.circuit, 1)[0]
    start = union(circuit.circuit - missing, some(circuit, ~circuit.circuit, 8))
    found = polished(circuit, start)
    plain, price = AutoModelForCausalLM.from_pretrained(tmp_path), WEIGHT / start.total
    loss = plain_loss(circuit, plain, found.subnetwork)
    assert loss < plain_loss(circuit, plain, start)
    for name, mask in found.subnetwork.items():
        for place in mask.nonzero().tolist():  # no weight kept could be dropped for its price
            without = plain_loss(circuit, plain, found.subnetwork - one_of(circuit, name, place))
            assert without - loss > price
    for name, mask in found.dropped.items():
        for place in mask.nonzero().tolist():  # none that was dropped would pay again
            assert loss - plain_loss(circuit, plain, found.subnetwork | one_of(circuit, name, place)) < price
    assert found.readmitted == missing


def test_the_gradient_of_a_switch_is_weight_times_gradient_also_where_it_is_0(circuit):
    site = next(site for site in bc.weight_sites(circuit.model) if site.name == "blocks.0.mlp.W_out")
    switches = torch.randint(0, 2, site.original.shape, generator=torch.Generator().manual_seed(0)).float()
    switches.requires_grad_()
    tokens = torch.arange(8)[None]
    before = site.original.clone()
    with switched(circuit.model, {site.name: switches}):
        circuit.model(tokens).logsumexp(-1).sum().backward()
    assert torch.equal(site.original, before)
    assert switches.grad is not None
    eps = 1e-2
    for place in ((0, 9), (3, 12), (11, 2)):
        sums = []
        for step in (eps, -eps):
            moved = switches.detach().clone()
            moved[place] += step
            with torch.no_grad(), switched(circuit.model, {site.name: moved}):
                sums.append(circuit.model(tokens).double().logsumexp(-1).sum().item())
        assert switches.grad[place].item() == pytest.approx((sums[0] - sums[1]) / (2 * eps), abs=2e-3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sparsity_weight": -1.0}, "sparsity_weight must be a number of at least 0"),
        ({"passes": 0}, "passes must be a whole number of at least 1, not 0"),
        ({"most": 0}, "most must be"),
        ({"sequences": 0}, "sequences must be"),
    ],
)
def test_bad_input_is_named(circuit, wrong, says):
    with pytest.raises(ValueError, match=says):
        polished(circuit, circuit.circuit, **wrong)


def test_what_does_not_fit_is_refused(circuit):
    other = planted_circuit("gpt2", **(PLANT | {"d_vocab": 12}))
    with pytest.raises(ValueError, match="has shape"):
        polished(circuit, other.circuit)
    with pytest.raises(ValueError, match="has shape"):
        polished(circuit, circuit.circuit, within=other.circuit)
    with pytest.raises(ValueError, match="vocabulary of 12"):
        bc.polish(circuit.model, circuit.circuit, other.target, circuit.corpus)


def test_nothing_outside_of_within_is_readmitted(circuit):
    missing = some(circuit, circuit.circuit, 2)
    start = circuit.circuit - union(missing[0], missing[1:])
    found = polished(circuit, start, within=circuit.circuit - missing[1])
    assert found.subnetwork == circuit.circuit - missing[1]


# --- at the end of learning ---

QUICK = bc.SparsifyConfig(sparsity_weight=2.0, max_steps=30, beta_growth=1.2, batch_size=4, retries=0, polish=2)


@pytest.fixture
def few(monkeypatch):
    """So that polishing takes little time."""
    monkeypatch.setattr(training, "_MOST_MEASURED", 40)


@pytest.mark.usefixtures("few")
def test_a_recipe_can_polish_and_the_run_says_what_it_changed(circuit, tmp_path):
    plain = bc.find_subnetwork(
        circuit.model, circuit.target, circuit.corpus, dataclasses.replace(QUICK, polish=0)
    ).subnetwork
    found = bc.find_subnetwork(circuit.model, circuit.target, circuit.corpus, QUICK, run_dir=tmp_path)
    assert found.polish is not None
    assert found.polish.after + 2.0 * found.subnetwork.fraction < found.polish.before + 2.0 * plain.fraction
    assert found.subnetwork.kept == plain.kept - found.polish.dropped + found.polish.readmitted
    run = bc.load_run(tmp_path)
    assert run.subnetwork == found.subnetwork
    assert run.outcome.polish == found.polish
    assert "polish" in run.subnetwork.lineage


@pytest.mark.usefixtures("few")
def test_a_polished_mask_has_the_target_fraction_and_its_layers(circuit):
    config = dataclasses.replace(QUICK, target_fraction=0.5, granularity={"attn": "weight"})
    found = bc.find_subnetwork(circuit.model, circuit.target, circuit.corpus, config).subnetwork
    assert found.kept == round(0.5 * found.total)
    assert found["blocks.0.mlp.W_in"].all()


@pytest.mark.usefixtures("few")
def test_a_run_interrupted_while_it_is_polished_is_resumed_to_the_same_mask(circuit, tmp_path, monkeypatch):
    expected = bc.find_subnetwork(circuit.model, circuit.target, circuit.corpus, QUICK)
    measure, calls = polishing._Search.measure, []

    def interrupted(search):
        calls.append(search)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(search)

    with monkeypatch.context() as patch:
        patch.setattr(polishing._Search, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt, match="while the mask was polished; the same command continues the run"):
            bc.find_subnetwork(circuit.model, circuit.target, circuit.corpus, QUICK, run_dir=tmp_path)
    with pytest.raises(ValueError, match="is not finished"):
        bc.load_run(tmp_path)
    found = bc.find_subnetwork(circuit.model, circuit.target, circuit.corpus, QUICK, run_dir=tmp_path)
    assert found.subnetwork == expected.subnetwork
    assert found.polish == expected.polish


@pytest.mark.usefixtures("few")
def test_heads_that_share_a_gate_stay_as_learned(circuit):
    config = dataclasses.replace(QUICK, granularity={"attn": "head", "mlp": "weight"})
    found, plain = (
        bc.find_subnetwork(circuit.model, circuit.target, circuit.corpus, one).subnetwork
        for one in (config, dataclasses.replace(config, polish=0))
    )
    assert all(torch.equal(found[name], plain[name]) for name in found if ".attn." in name)
    assert found != plain


def test_masks_that_are_not_polished_count_in_the_loss(circuit):
    start = circuit.circuit | some(circuit, ~circuit.circuit, 1)[0]
    tokens = torch.from_numpy(circuit.corpus.train[:4])
    with torch.no_grad(), bc.masked(circuit.model, start):
        loss = circuit.target.cross_entropy(circuit.model(tokens), tokens).mean().item()
    found = polishing.polish_on(
        circuit.model, start, circuit.target, tokens, {"blocks.0.mlp.W_out"}, 0.0, False, None, 1, 5, 0, lambda: None
    )
    assert found.before == pytest.approx(loss, rel=1e-6)
    assert all(torch.equal(found.subnetwork[name], start[name]) for name in start if name != "blocks.0.mlp.W_out")


def test_only_gates_of_single_weights_can_be_polished():
    with pytest.raises(
        ValueError, match="polish changes single weights, but granularity 'neuron' has no gates of them"
    ):
        bc.SparsifyConfig(granularity="neuron", polish=1)
    with pytest.raises(ValueError, match="polish must be a whole number of at least 0"):
        bc.SparsifyConfig(polish=-1)
