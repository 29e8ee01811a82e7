"""Learning which nodes are needed: the same loop, methods, sizes and resumption as for weights."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.masking.effects import node_effects, strongest
from bigram_circuits.tasks.task import Task

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("continuous_sparsification", "hard_concrete", "straight_through")


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 257, (24, 8))
    scored = np.zeros(tokens.shape, dtype=bool)
    scored[:, -1] = True
    return Task("pairs", tokens, scored, 5.0, counterfactual=rng.integers(0, 257, (24, 8)))


def recipe(**changes):
    return bc.SparsifyConfig(**({"max_steps": 4, "batch_size": 4, "target_fraction": 0.25, "seed": 1} | changes))


def find(model, task, **options):
    return bc.find_circuit(model, task, **({"check_memory": "off", "force": True} | options))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("replace", ["zero", "mean", "mean_by_position", "resample", "counterfactual"])
def test_sizes_are_exact_and_the_model_is_left_as_it_was(tiny_model, task, method, replace):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    found = find(tiny_model, task, config=recipe(method=method), units=["head", "neuron"], replace=replace)
    assert (found.circuit.kept, found.circuit.total) == (22, 88)
    assert found.circuit.replacement.kind == replace
    assert found.config.replace == replace
    assert len(found.history) == 4
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())
    tokens = torch.from_numpy(task.tokens[:3])
    with torch.no_grad():
        whole = tiny_model(tokens)
        with bc.masked(tiny_model, found) as model:
            assert not torch.allclose(model(tokens), whole, atol=1e-3)


def test_the_gradient_of_a_node_gate_is_that_of_finite_differences(tiny_model, task):
    """Of gates at 1: the attribution of each node, by one backward pass, against moving its gate alone."""
    target = bc.TaskTarget(task, "loss")
    for replace in ("zero", "counterfactual"):
        circuit = bc.replaced(tiny_model, bc.Circuit.full(tiny_model), replace, text=task)
        scores = node_effects(tiny_model, circuit, target, task.tokens)
        assert {name: tuple(score.shape) for name, score in scores.items()} == dict(circuit.shapes)
        at = "blocks.1.attn.hook_z"
        other = torch.from_numpy(task.counterfactual)
        with torch.no_grad():
            stand_in = tiny_model.run_with_cache(other)[1][at] * (replace == "counterfactual")
            ids = torch.from_numpy(task.tokens)
            full = tiny_model(ids).double().log_softmax(-1)
            for head in range(2):

                def moved(value, hook, head=head, x=stand_in, by=1e-2):
                    value = value.clone()
                    value[:, :, head] = (1 - by) * value[:, :, head] + by * x[:, :, head]
                    return value

                moved_log_probs = tiny_model.run_with_hooks(ids, fwd_hooks=[(at, moved)]).double().log_softmax(-1)
                answers = ids[:, -1:, None]
                rise = (full - moved_log_probs)[:, -2].gather(1, answers[:, :, 0]).mean() / 1e-2
                assert float(scores[at][head]) == pytest.approx(float(rise), abs=2e-2)


def test_integrated_effects_add_up(tiny_model, task):
    """Sundararajan et al.: the integrated gradients of all gates sum to the difference that all of them make."""
    target = bc.TaskTarget(task, "loss")
    circuit = bc.Circuit.full(tiny_model)
    scores = node_effects(tiny_model, circuit, target, task.tokens, steps=32)
    ends = [bc.evaluate(tiny_model, one, target, task.tokens, controls=False) for one in (~circuit, circuit)]
    difference = ends[0].subnetwork.cross_entropy - ends[1].subnetwork.cross_entropy
    assert sum(float(score.sum()) for score in scores.values()) == pytest.approx(difference, abs=5e-3)
    like = circuit.random_like() - bc.Circuit.empty(tiny_model).keep("L0H0", "L1N3")
    best = strongest(scores, like)
    assert {name: int(mask.sum()) for name, mask in best.items()} == {n: int(m.sum()) for n, m in like.items()}
    name = "blocks.1.attn.hook_z"
    few = strongest(scores, circuit.constant(False).keep("L1H0"))
    assert few.nodes == (f"L1H{int(scores[name].argmax())}",)


def test_scores_along_the_path_are_integrated_gradients(tiny_model, task):
    """While all gates are open: their mean gradients sum to the difference that all of them make."""
    config = recipe(method="straight_through", along_path=True, target_fraction=1.0, max_steps=64, units=("head",))
    candidates, target = Candidates(tiny_model, config), bc.TaskTarget(task, "loss")
    gates, wanted = candidates.gates(config, 0, None)
    assert wanted == gates.n_weights
    total, tokens, points = torch.zeros(gates.n_weights), torch.from_numpy(task.tokens), []
    with candidates.applied(gates):
        for step in range(64):
            gates.refresh(step)
            points.append(float(gates.soft(slice(0, 1))))
            if step < 32:
                assert gates.penalise(0.0)[0] == 1
                target.cross_entropy(tiny_model(tokens), tokens).mean(1).mean().backward()
                total -= gates.gradient.flat() / 32
    assert points[32:] == [1.0] * 32
    ordered = np.sort(points[:32])
    np.testing.assert_allclose(ordered, (np.arange(32) + 0.5) / 32, atol=0.03)
    full = bc.Circuit.full(tiny_model, "head")
    ends = [bc.evaluate(tiny_model, one, target, task.tokens, controls=False) for one in (~full, full)]
    difference = ends[0].subnetwork.cross_entropy - ends[1].subnetwork.cross_entropy
    assert float(total.sum()) == pytest.approx(difference, abs=5e-3)


def test_a_run_resumes_bit_for_bit_and_is_read_again(tiny_model, task, tmp_path):
    class Stop:
        def on_step(self, record):
            if record.step == 2:
                raise RuntimeError("stopped")

        def on_end(self, found):
            raise AssertionError("it was stopped")

    options = {"config": recipe(max_steps=6), "units": "head", "replace": "counterfactual"}
    whole = find(tiny_model, task, **options)
    with pytest.raises(RuntimeError, match="stopped"):
        find(tiny_model, task, run_dir=tmp_path / "run", callbacks=[Stop()], **options)
    resumed = find(tiny_model, task, run_dir=tmp_path / "run", **options)
    assert resumed.circuit == whole.circuit
    again = find(tiny_model, task, run_dir=tmp_path / "run", **options)
    assert (again.circuit, again.outcome) == (resumed.circuit, resumed.outcome)
    tokens = torch.from_numpy(task.tokens[:3])
    found = []
    for one in (resumed, again):
        with bc.masked(tiny_model, one) as model, torch.no_grad():
            found.append(model(tokens))
    assert torch.equal(*found)
    run = bc.load_run(tmp_path / "run")
    assert run.circuit == whole.circuit
    with pytest.raises(AttributeError, match="found a circuit, and no subnetwork"):
        run.subnetwork  # noqa: B018
    with pytest.raises(ValueError, match="weights alone cannot hold a circuit"):
        bc.export_huggingface(tiny_model, run, tmp_path / "out")
    with (
        pytest.raises(ValueError, match="needs the pairs of prompts, which a file does not hold"),
        bc.masked(tiny_model, run),
    ):
        pass
    with pytest.raises(ValueError, match=r"holds another run \(its recipe\.units"):
        find(tiny_model, task, run_dir=tmp_path / "run", **(options | {"units": "neuron"}))


def test_nodes_and_weights_in_one_run(tiny_model, task):
    config = recipe(granularity={"mlp": "weight"}, target_fraction=0.5, max_steps=6)
    found = find(tiny_model, task, config=config, units=("head", "weight"), replace="zero").circuit
    gated = Candidates(tiny_model, found_recipe := recipe(granularity={"mlp": "weight"}, units=("head", "weight")))
    attention = sum(site.size for site in bc.weight_sites(tiny_model) if site.component == "attn")
    costs = {group.site.name: group.site.size // group.count for group in gated.groups if group.unit == "node"}
    assert list(costs.values()) == [attention // 8, attention // 8]
    assert found_recipe.unit_of == {"mlp": "weight"}
    assert {"blocks.0.attn.hook_z", "blocks.0.mlp.W_in"} <= set(found)
    weights = found.masked_weights(tiny_model)
    assert weights["blocks.0.attn.W_Q"].all()
    assert not weights["blocks.0.mlp.W_in"].all()
    tokens = torch.from_numpy(task.tokens[:3])
    with bc.masked(tiny_model, found) as model, torch.no_grad():
        together = model(tokens)
    with bc.masked(tiny_model, found.weights(tiny_model)) as model, torch.no_grad():
        assert torch.allclose(together, model(tokens), atol=1e-5)


def test_within_a_circuit(tiny_model, task):
    bounds = bc.Circuit.full(tiny_model, "head").drop("L0H0", "L0H1", "L1H3")
    found = find(tiny_model, task, config=recipe(target_fraction=0.5), units="head", within=bounds)
    assert found.circuit - bounds == bounds.constant(False)
    assert found.circuit.lineage == "found within (full - L0H0 - L0H1 - L1H3)"


def test_layers_that_are_left_out_are_not_of_the_circuit(tiny_model, task):
    found = find(tiny_model, task, config=recipe(layers=(1,)), units=("head", "mlp"))
    assert set(found.circuit) == {"blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"}
    assert bc.evaluate(tiny_model, found, bc.TaskTarget(task), task.tokens, seeds=1).subnetwork.total == 5


def test_any_target_and_any_hook_point(tiny_model):
    rng = np.random.default_rng(0)
    corpus = bc.Corpus.from_tokens(rng.integers(0, 257, (12, 8)), rng.integers(0, 257, (4, 8)))
    target = bc.ModelTarget(tiny_model)
    found = find(tiny_model, target, corpus=corpus, config=recipe(), units="blocks.1.hook_resid_pre", replace="mean")
    assert found.circuit.total == tiny_model.cfg.d_model
    value = bc.evaluate(tiny_model, found, target, corpus.held_out, seeds=1)
    assert (value.units, value.full.kl) == ("nodes", pytest.approx(0, abs=1e-5))
    assert "of the nodes" in value.verdict
    again = type(value).from_json(value.to_json())
    assert again.units == "nodes"


def test_bad_input(tiny_model, task):
    calls = (
        (lambda: find(tiny_model, task, units="heads"), "'heads' is neither a unit"),
        (lambda: find(tiny_model, task, force=False), r"NOT shown to do it: .* go on in spite of it .force=True."),
        (lambda: find(tiny_model, task, units=()), "units must be different names"),
        (lambda: find(tiny_model, task, units="head", replace="noise"), "replace must be one of zero, mean"),
        (lambda: find(tiny_model, bc.ModelTarget(tiny_model)), "a target that is no task needs a corpus"),
        (
            lambda: find(tiny_model, Task("bare", task.tokens, task.scored, 5.0), replace="counterfactual"),
            "needs a task whose rows have counterfactuals, but the task 'bare' has none",
        ),
        (lambda: bc.SparsifyConfig(replace="mean"), r"replace='mean' is of nodes, .* give units \(--unit\)"),
        (lambda: bc.SparsifyConfig(units="head", granularity="head"), "granularity is of weights, but units head has"),
        (lambda: bc.SparsifyConfig(units="head", polish=1), "polish changes single weights alone"),
        (
            lambda: bc.find_subnetwork(tiny_model, bc.TaskTarget(task), task.corpus(), bc.SparsifyConfig(units="head")),
            "the recipe asks for nodes, units head: use find_circuit",
        ),
        (
            lambda: find(tiny_model, task, units="head", within=bc.Subnetwork.full(tiny_model)),
            "within should be a Circuit, as what is found, not a Subnetwork",
        ),
        (
            lambda: find(tiny_model, task, units=("blocks.1.hook_resid_pre", "weight")),
            "own no weights, so that they cannot be learned beside weights",
        ),
        (
            lambda: find(tiny_model, task, units="head", config=recipe(layers=(7,))),
            "nothing to mask: units .* and layers .7. leave no nodes",
        ),
        (lambda: bc.replaced(tiny_model, bc.Subnetwork.full(tiny_model), "zero"), "a Subnetwork has no nodes"),
    )
    for call, said in calls:
        with pytest.raises(ValueError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


# --- edges ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("replace", ["zero", "counterfactual"])
def test_edges_are_learned_to_exact_sizes(tiny_model, task, method, replace):
    before = bc.weight_hash(tiny_model)
    found = find(tiny_model, task, config=recipe(method=method), edges=True, replace=replace)
    total = bc.Circuit.full(tiny_model, "edge").total
    assert (found.circuit.kept, found.circuit.total) == (round(0.25 * total), total)
    assert len(found.circuit.edges) == found.circuit.kept
    assert (bc.weight_hash(tiny_model), found.config.units) == (before, ("edge",))
    value = bc.evaluate(tiny_model, found, bc.TaskTarget(task), task.tokens, seeds=1)
    assert value.full.cross_entropy != pytest.approx(value.subnetwork.cross_entropy)


def test_edges_and_nodes_in_one_run(tiny_model, task, tmp_path):
    found = find(tiny_model, task, config=recipe(), units=("edge", "neuron"), replace="mean", run_dir=tmp_path / "run")
    assert set(found.circuit.by_unit()) == {"q", "k", "v", "mlp", "logits", "neuron"}
    run = bc.load_run(tmp_path / "run")
    tokens, seen = torch.from_numpy(task.tokens[:3]), []
    for one in (found, run):
        with bc.masked(tiny_model, one) as model, torch.no_grad():
            seen.append(model(tokens))
    assert torch.equal(*seen)


def test_what_does_not_go_with_edges(tiny_model, task):
    for options, said in (
        ({"config": recipe(layers=(0,)), "edges": True}, "leave layers out"),
        ({"config": recipe(low_memory=True), "edges": True}, "leave low_memory out"),
        ({"units": "head", "edges": True}, "edges=True asks for edges alone: give units=.'head', 'edge'. for both"),
        ({"units": ("edge", "weight")}, "own no weights, so that they cannot be learned beside weights"),
    ):
        with pytest.raises(ValueError, match=said):
            find(tiny_model, task, **options)


def test_resampling_has_a_partner_in_every_batch(tiny_model, task, monkeypatch):
    """A single sequence that is left joins the batch before; a batch of one is never made."""
    monkeypatch.setattr("bigram_circuits.evaluation.batch_size_for", lambda model, length: 1)
    circuit = bc.replaced(tiny_model, bc.Circuit.empty(tiny_model, "head"), "resample")
    sizes = []
    tiny_model.add_hook("embed.hook_out", lambda x, hook: sizes.append(len(x)) if x.shape[1] == 8 else None)
    try:
        bc.evaluate(tiny_model, circuit, bc.TaskTarget(task), task.tokens[:5], controls=False)
    finally:
        tiny_model.reset_hooks()
    assert sizes == [2, 3]
