"""Analyses of circuits: nodes in place of weights, compared with plain computations on masks and logits."""

from itertools import combinations, product

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.components import matched_counts, random_within
from bigram_circuits.experiments.comparison import compare
from bigram_circuits.learning.found import FoundCircuit
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.tasks.task import Task
from tests.conftest import D_VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (6, 8))
CORPUS = bc.Corpus.from_tokens(TEXT, TEXT[::-1])
TARGET = bc.count_ngrams(TEXT, d_vocab=D_VOCAB)
CONFIG = bc.SparsifyConfig(max_steps=2, batch_size=4)
CONDITIONS = ("full", "circuit", "complement", "random nodes")


@pytest.fixture(scope="module")
def circuit(tiny_model):
    """Two of four heads, and some neurons; the others have their mean."""
    some = bc.Circuit.full(tiny_model).random_like() - bc.Circuit.empty(tiny_model).keep("L0H0", "L1H1")
    few = bc.Circuit({name: mask & (torch.arange(len(mask)) < 12) for name, mask in some.items()})
    return bc.replaced(tiny_model, few, "mean", text=TEXT).named("few")


@pytest.fixture(scope="module")
def task():
    scored = np.zeros(TEXT.shape, dtype=bool)
    scored[:, -1] = True
    return Task("last tokens", TEXT, scored, 5.0)


def held(circuit):
    return FoundCircuit(circuit, [], CONFIG, "decided", 1.0)


def mean_loss(model, kept, task):
    """Mean surprisal of the scored tokens, from the logits alone."""
    with bc.masked(model, kept) if kept is not None else torch.no_grad(), torch.no_grad():
        logits = model(torch.from_numpy(task.tokens)).double().numpy()
    logits = logits - logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(len(task.tokens))
    return -float(log_probs[rows, -2, task.tokens[:, -1]].mean())


def test_conditions_are_named_after_the_circuit_and_measured_as_it_masks(tiny_model, circuit, task):
    found = analysis.measure_task(tiny_model, task, held(circuit))
    assert found.names == CONDITIONS
    masks = (None, circuit, ~circuit, circuit.random_like(seed=0))
    for name, kept in zip(CONDITIONS, masks, strict=True):
        assert found.get("loss")[name] == pytest.approx(mean_loss(tiny_model, kept, task), abs=1e-5)
    assert masks[3].replacement.kind == "mean"
    lens = analysis.logit_lens(tiny_model, held(circuit), TARGET, TEXT)  # in order, without a warning
    assert lens.conditions == CONDITIONS
    assert [trace.name for trace in lens.plot("kl").data if trace.name][-1] == "matched random nodes"
    assert analysis.covariance_similarity(tiny_model, circuit, TEXT).conditions == (
        "full", "circuit", "full (rows) and circuit",
    )  # fmt: skip
    for of in (analysis.cosine_to_unembedding, analysis.passages):
        assert set(CONDITIONS) <= set(of(tiny_model, circuit, TARGET, TEXT).conditions)
    assert analysis.head_scores(tiny_model, circuit, prompts=2, period=4).conditions == CONDITIONS
    assert analysis.logit_attribution(tiny_model, circuit, TEXT[0]).conditions == CONDITIONS


def test_ablating_a_node_is_ablating_its_activation(tiny_model, task):
    zero, empty = bc.Circuit.empty(tiny_model), {}
    mean = bc.replaced(tiny_model, zero, "mean", text=task)
    for by, like in (("zero", zero), ("mean", mean)):
        for label in ("L0H1", "L1N7"):
            one = analysis.ablate(tiny_model, like.keep(label), tokens=task, seeds=0)
            other = analysis.ablate(tiny_model, label, tokens=task, by=by, seeds=0)
            assert one.notes["by"] == {f"empty | {label}": by}
            empty[by, label] = one.values
            assert np.allclose(one.values, other.values, atol=1e-5, equal_nan=True)
    assert not np.allclose(empty["zero", "L0H1"], empty["mean", "L0H1"], atol=1e-4)


def test_a_circuit_is_ablated_in_the_model_and_within_another(tiny_model, circuit, task):
    part = circuit & circuit.random_like(seed=4) | circuit.constant(False).keep(circuit.nodes[0])
    found = analysis.ablate(tiny_model, {"part": part, "all": "circuit"}, circuit, task, seeds=2)
    base = {None: mean_loss(tiny_model, None, task), "in": mean_loss(tiny_model, circuit, task)}
    rises = mean_loss(tiny_model, ~part, task) - base[None], mean_loss(tiny_model, circuit - part, task) - base["in"]
    assert found.get("rise_in_loss")["part"] == pytest.approx(rises[0], abs=1e-5)
    assert found.get("rise_in_loss_in_circuit")["part"] == pytest.approx(rises[1], abs=1e-5)
    alone = mean_loss(tiny_model, circuit.constant(False), task) - base["in"]
    assert found.get("rise_in_loss_in_circuit")["all"] == pytest.approx(alone, abs=1e-5)
    drawn = [random_within(circuit, matched_counts(part, circuit), seed) for seed in range(2)]
    random = np.mean([mean_loss(tiny_model, circuit - one, task) for one in drawn]) - base["in"]
    assert found.get("random_rise_in_circuit")["part"] == pytest.approx(random, abs=1e-5)
    activations = analysis.ablate(tiny_model, "L0.mlp", circuit, task, seeds=0)
    assert activations.get("rise_in_loss_in_circuit")["L0.mlp"] != 0
    thinned = analysis.stochastic_ablation(tiny_model, circuit, TARGET, task, shares=(0, 1), draws=1)
    assert thinned.conditions == ("circuit", "random nodes")
    assert thinned.get("loss", "circuit") == pytest.approx([base[None], base["in"]], abs=1e-5)


def test_random_nodes_are_of_the_same_hook_points(circuit):
    drawn = random_within(circuit, {name: int(mask.sum()) // 2 for name, mask in circuit.items()}, 3)
    assert (drawn - circuit).kept == 0
    for name, mask in circuit.items():
        assert int(drawn[name].sum()) == int(mask.sum()) // 2
    assert drawn.replacement is circuit.replacement


def test_additions_are_nodes(tiny_model, circuit, task):
    added = {"head": "L0H0", "neurons": "L1N[30,31]", "mlp": "L0.mlp", "set": circuit.constant(False).keep("L1H1")}
    found = analysis.sufficiency(tiny_model, held(circuit), added, task, seeds=2)
    whole = circuit | circuit.constant(False).keep(
        *(f"L0N{index}" for index in range(len(circuit["blocks.0.mlp.hook_post"])))
    )
    after = {"head": circuit.keep("L0H0"), "neurons": circuit.keep("L1N30", "L1N31")}
    after |= {"mlp": whole, "set": circuit.keep("L1H1")}
    before = mean_loss(tiny_model, circuit, task)
    for name, kept in after.items():
        assert found.get("fall_in_loss")[name] == pytest.approx(before - mean_loss(tiny_model, kept, task), abs=1e-5)
        assert found.get("nodes_added")[name] == (kept - circuit).kept
    rest = ~circuit
    drawn = [random_within(rest, {"blocks.1.mlp.hook_post": 2}, seed) for seed in range(2)]
    random = before - np.mean([mean_loss(tiny_model, circuit | one, task) for one in drawn])
    assert found.get("random_fall")["neurons"] == pytest.approx(random, abs=1e-5)
    assert np.isnan(found.get("random_fall")["mlp"])  # there are no other neurons to draw


def test_the_overlap_of_circuits_is_that_of_all_pairs_of_circuits():
    """p by enumerating every circuit with as many nodes at every hook point."""
    rng, names = np.random.default_rng(1), ("blocks.0.attn.hook_z", "blocks.0.mlp.hook_post", "blocks.1.attn.hook_z")
    a, b = (
        {name: torch.from_numpy(rng.random(size) < 0.5) for name, size in zip(names, (4, 6, 4), strict=True)}
        for _ in "ab"
    )
    found = analysis.overlap(bc.Circuit(a), bc.Circuit(b), by="component")
    assert found.names == ("all", "L0 heads", "L0 neurons", "L1 heads")
    every = [
        [sum(bool(b[name][at]) for at in drawn) for drawn in combinations(range(len(a[name])), int(a[name].sum()))]
        for name in names
    ]
    both = [int((a[name] & b[name]).sum()) for name in names]
    sums = np.array([sum(one) for one in product(*every)])
    assert found.get("p")["all"] == pytest.approx((sums >= sum(both)).mean())
    assert found.get("expected")["all"] == pytest.approx(sums.mean())
    assert found.get("sd")["all"] == pytest.approx(sums.std())
    for label, counts, here in zip(found.names[1:], every, both, strict=True):
        assert 10 ** found.get("log10_p")[label] == pytest.approx((np.array(counts) >= here).mean())
    assert found.get("jaccard")["all"] == sum(both) / sum(int((a[name] | b[name]).sum()) for name in names)
    assert found.quantity("intersection").unit == "nodes"
    assert analysis.overlap(bc.Circuit(a), bc.Circuit(a)).names == ("all", *names)
    assert (
        analysis.overlaps([bc.Circuit(a), bc.Circuit(b)]).get("jaccard", "circuit")[0, 1] == found.get("jaccard")["all"]
    )


def test_where_nodes_are(circuit):
    by_layer, heads, neurons = analysis.by_layer(held(circuit)), analysis.by_head(circuit), analysis.by_neuron(circuit)
    assert by_layer.columns == ("head", "neuron")
    for layer in (0, 1):
        z, post = circuit[f"blocks.{layer}.attn.hook_z"].numpy(), circuit[f"blocks.{layer}.mlp.hook_post"].numpy()
        assert by_layer.get("density", "circuit")[layer].tolist() == [z.mean(), post.mean()]
        assert by_layer.get("share_of_kept", "circuit")[layer].tolist() == pytest.approx(
            [z.sum() / circuit.kept, post.sum() / circuit.kept]
        )
        assert heads.get("density", "circuit")[layer].tolist() == z.tolist()
        assert neurons.get("density", "circuit")[layer].tolist() == post.tolist()
    assert heads.get("density", "random nodes").sum() == heads.get("density", "circuit").sum()


def test_the_suite_says_what_it_leaves_out(tiny_model, circuit, task):
    """Other sequences donate here, and steps that look at one prompt alone have none."""
    of = bc.replaced(tiny_model, circuit, "resample")
    target, corpus = bc.TaskTarget(task), bc.Corpus.from_tokens(TEXT, TEXT[:4])
    found = analysis.analyze(tiny_model, of, target, corpus, tokens=32, sweep_tokens=32, fit_tokens=32)
    assert found.left_out["concentration"].startswith("concentration is of weights")
    assert "only one" in found.left_out["attribution"]
    measured = {"by_layer", "by_head", "task", "ablation_components", "stochastic_ablation", "overlap_magnitude"}
    assert measured <= found.results.keys()
    assert found.results["logit_lens"].conditions == CONDITIONS
    assert "(circuit: " in str(found)


def test_what_is_of_weights_or_mixed_is_refused_in_a_line(tiny_model, circuit, task):
    for of in (analysis.by_matrix, analysis.concentration, analysis.whole_neurons):
        with pytest.raises(NotShownError, match="is of weights; circuit"):
            of(circuit)
    weights = bc.Subnetwork.full(tiny_model).random_like()
    heads = bc.Circuit.full(tiny_model, "head")
    for call, words in (
        (lambda: analysis.overlap(circuit, weights), "a circuit and a subnetwork have no overlap"),
        (lambda: analysis.overlap(circuit, circuit, by="head"), "the overlap by head is of weights"),
        (lambda: analysis.ablate(tiny_model, circuit, tokens=task, by="zero"), "replaced as their circuit says"),
        (
            lambda: analysis.ablate(tiny_model, "L0H1", circuit, task, by="weights"),
            "cannot be ablated within a circuit",
        ),
        (lambda: analysis.ablate(tiny_model, circuit, weights, task), "cannot be ablated within a subnetwork"),
        (lambda: analysis.ablate(tiny_model, "subnetwork", circuit, task), "what was given is a circuit"),
        (lambda: analysis.sufficiency(tiny_model, heads, "L0.mlp", task), "over other nodes than L0.mlp"),
        (lambda: analysis.sufficiency(tiny_model, weights, circuit, task), "cannot be added to a subnetwork"),
        (lambda: analysis.sufficiency(tiny_model, circuit, weights, task), "cannot be joined with a circuit"),
        (lambda: compare([circuit, weights]), "compare those of one kind"),
        (lambda: compare([circuit, heads]), "over different nodes"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_circuits_over_training(tiny_model):
    recipe = bc.SparsifyConfig(max_steps=2, batch_size=4, units=("head", "neuron"), target_fraction=0.25)
    found = analysis.subnetworks_over_training({"now": tiny_model}, TARGET, CORPUS, recipe)
    assert found.curves.conditions == ("circuit", "full", "random nodes")
    (one,) = found.subnetworks.values()
    assert isinstance(one, bc.Circuit)
    assert found.curves.get("jaccard_with_last", "circuit")[0] == 1
    first = one["blocks.0.mlp.hook_post"].sum() / one.kept
    assert found.curves.get("share_in_first_mlp", "circuit")[0] == pytest.approx(float(first))
    measured = analysis.faithfulness_to(one, TARGET, TEXT)(tiny_model)
    assert tuple(measured) == CONDITIONS
