"""Ablations: hooks do what masks do, controls are matched, and nothing is left behind."""

import math

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis import ablation
from bigram_circuits.analysis.ablation import WAYS, ablate, mean_activations, stochastic_ablation
from bigram_circuits.analysis.components import coordinates, matched_counts, parse, random_coordinates, random_within
from bigram_circuits.models.weights import weight_sites
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.tasks.builtin import TASKS
from bigram_circuits.tasks.task import Task, as_task
from tests.conftest import D_VOCAB


@pytest.fixture(scope="module")
def half(tiny_model):
    return ~random_within(Subnetwork.full(tiny_model), dict.fromkeys(Subnetwork.full(tiny_model), 300), 5)


@pytest.fixture(scope="module")
def target(random_tokens):
    return bc.count_ngrams(random_tokens, order=2, d_vocab=D_VOCAB)


def logits_of(model, tokens, hooks=()):
    with torch.no_grad():
        return model.run_with_hooks(torch.from_numpy(tokens), fwd_hooks=list(hooks))


def hooks_for(model, text, by="zero", tokens=None, seed=0):
    task = as_task(tokens, D_VOCAB)
    (part,) = parse(text, model)
    chosen = coordinates(model, part)
    means = mean_activations(model, task, chosen) if by == "mean" else {}
    return ablation._Replace(chosen, by, means, task, seed)(0, slice(0, len(tokens)))


# --- the language ---


def test_sweeps_name_every_part(tiny_model):
    assert [part.name for part in parse("heads", tiny_model)] == [f"L{i}H{h}" for i in range(2) for h in range(4)]
    assert [part.name for part in parse(["attns", "mlps"], tiny_model)] == ["L0.attn", "L1.attn", "L0.mlp", "L1.mlp"]
    assert [part.name for part in parse("layers", tiny_model)] == ["L0", "L1"]
    (part,) = parse("L1H2 + L0N[1, 5]+L0", tiny_model)
    assert [(one.kind, one.layer, one.indices) for one in part.components] == [
        ("head", 1, (2,)), ("neurons", 0, (1, 5)), ("attn", 0, ()), ("mlp", 0, ()),
    ]  # fmt: skip
    assert parse("L0N5", tiny_model)[0].components[0].indices == (5,)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("head", "cannot read 'head'"),
        ("", "cannot read ''"),
        ("head 1.x", "say 'L2H3'"),
        ("L1H2 + heads", "stands for several parts"),
        ("L1H2 +", "cannot read"),
        ("L0N[]", "names no neuron"),
        ("L7H0", "no layer 7: layers are 0 to 1"),
        ("L1H4", "no head 4 in layer 1: it has heads 0 to 3"),
        ("L0N[1,40]", "no neuron 40 in layer 0: it has neurons 0 to 39"),
        ("L2.mlp", "no layer 2"),
        ("subnetwork", "pass subnetwork="),
        ([], "no part of the model"),
        (3, "from a int"),
        ([3], "from a int"),
        (["L0.mlp", "L0.mlp"], "two parts are called 'L0.mlp'"),
        ({"a": "heads"}, "stands for 8"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tiny_model, what, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace("[", r"\[")) as caught:
        parse(what, tiny_model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "nothing"}, "by must be one of zero"),
        ({"seeds": -1}, "seeds must be"),
        ({"what": "subnetwork", "by": "zero"}, "by='weights'"),
        ({"tokens": np.zeros((1, 8), dtype=int), "by": "resample"}, "only one"),
        ({"tokens": np.zeros(8, dtype=int)}, "sequence, position"),
        ({"target": 3}, "a target needs"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(tiny_model, half, random_tokens, options, words):
    options = {"what": "L0.mlp", "tokens": random_tokens, "subnetwork": half} | options
    with pytest.raises(ValueError, match=words) as caught:
        ablate(tiny_model, **options)
    assert "\n" not in str(caught.value)


# --- hooks and masks ---


@pytest.mark.parametrize("head", [0, 3])
def test_zeroing_a_head_is_masking_its_output_matrix(any_model, random_tokens, head):
    masks = dict(Subnetwork.full(any_model))
    masks["blocks.1.attn.W_O"][head] = False
    with bc.masked(any_model, Subnetwork(masks)):
        expected = logits_of(any_model, random_tokens)
    found = logits_of(any_model, random_tokens, hooks_for(any_model, f"L1H{head}", tokens=random_tokens))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits_of(any_model, random_tokens), atol=1e-3)


def test_zeroing_neurons_is_masking_their_rows(any_model, random_tokens):
    masks = dict(Subnetwork.full(any_model))
    masks["blocks.0.mlp.W_out"][[1, 5]] = False
    with bc.masked(any_model, Subnetwork(masks)):
        expected = logits_of(any_model, random_tokens)
    found = logits_of(any_model, random_tokens, hooks_for(any_model, "L0N[1,5]", tokens=random_tokens))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_head_or_neuron_without_its_activation_is_one_without_its_weights(any_model, random_tokens):
    parts = ["L0H1 + L1H3", "L0N[1,5]"]
    losses = [ablate(any_model, parts, random_tokens, by=by, seeds=0).get("loss") for by in ("zero", "weights")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_zeroing_everything_leaves_the_embedding(any_model, random_tokens):
    hooks = hooks_for(any_model, "L0 + L1", tokens=random_tokens)
    streams = []
    names = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post")
    logits_of(
        any_model, random_tokens, [*hooks, *((name, lambda x, hook: streams.append(x.clone())) for name in names)]
    )
    assert torch.equal(*streams)


def test_weights_of_a_head_are_those_that_drop_head_drops(any_model):
    full = Subnetwork.full(any_model)
    empty = Subnetwork.empty(any_model)
    (head,) = parse("L1H2", any_model)
    assert ~head.weights(empty) == full.drop_head(1, 2)
    assert head.weights(empty, shared=True) == Subnetwork.empty(any_model).keep_head(1, 2)
    (both,) = parse("L0.mlp + L1N[3]", any_model)
    assert both.weights(empty).by_component()[0, "mlp"].fraction == 1
    assert both.weights(empty).by_component()[0, "attn"].kept == 0
    (layer,) = parse("L1", any_model)
    assert ~layer.weights(empty) == full.drop_layer(1)


def test_mean_ablation_of_a_constant_changes_nothing(tiny_model):
    tokens = np.full((3, 8), 5)  # rotary positions: equal tokens have equal activations everywhere
    found = ablate(tiny_model, ["L0H1", "L1N[2,3]", "L0.mlp", "L1"], tokens, by="mean", seeds=1)
    assert max(abs(rise) for rise in found.get("rise_in_loss").values()) < 1e-5
    zeroed = ablate(tiny_model, ["L0.mlp"], tokens, by="zero", seeds=0)
    assert abs(zeroed.get("rise_in_loss")["L0.mlp"]) > 1e-3


def test_means_are_over_sequences_and_positions(any_model, random_tokens):
    name = "blocks.1.attn.hook_z"
    means = mean_activations(any_model, as_task(random_tokens, D_VOCAB), [name])[name]
    with torch.no_grad():
        _, cache = any_model.run_with_cache(torch.from_numpy(random_tokens))
    torch.testing.assert_close(means, cache[name].double().mean((0, 1)).flatten(), atol=1e-6, rtol=1e-5)


def test_means_leave_out_what_comes_after_the_last_answer(tiny_model):
    task = TASKS["ordered_sequences"](tiny_model, prompts=4, shown=(1, 2))
    means = mean_activations(tiny_model, task, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(torch.from_numpy(task.tokens.astype(np.int64)))
    stream = cache["blocks.0.hook_resid_pre"]
    rows = torch.cat([stream[row, : end + 1] for row, end in enumerate(task.ends)])
    torch.testing.assert_close(means, rows.double().mean(0), atol=1e-6, rtol=1e-5)


def test_resampled_activations_are_another_sequences_and_seeded(tiny_model, random_tokens):
    runs = [
        logits_of(tiny_model, random_tokens, hooks_for(tiny_model, "L0.mlp", "resample", random_tokens, seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    kept = {}
    hooks = hooks_for(tiny_model, "L1.mlp", "resample", random_tokens)
    name, replace = hooks[0]

    def keep_both(value, hook):
        kept["before"], kept["after"] = value.clone(), replace(value, hook)
        return kept["after"]

    logits_of(tiny_model, random_tokens, [(name, keep_both)])
    for row in range(len(random_tokens)):
        others = [torch.equal(kept["after"][row], kept["before"][k]) for k in range(len(random_tokens)) if k != row]
        assert sum(others) == 1
    equal = ablate(tiny_model, "L0H1", np.repeat(random_tokens[:1], 4, 0), by="resample", seeds=0)
    assert equal.get("rise_in_loss")["L0H1"] == pytest.approx(0, abs=1e-6)


# --- controls ---


def test_random_coordinates_are_as_many(any_model):
    (part,) = parse("L0H1 + L0H3 + L1N[0,7,9]", any_model)
    chosen, drawn = coordinates(any_model, part), random_coordinates(coordinates(any_model, part), 0)
    assert {name: int(mask.sum()) for name, mask in chosen.items()} == {
        "blocks.0.attn.hook_z": 12,
        "blocks.1.mlp.hook_post": 3,
    }
    assert {name: int(mask.sum()) for name, mask in drawn.items()} == {n: int(m.sum()) for n, m in chosen.items()}
    assert not torch.equal(drawn["blocks.0.attn.hook_z"], chosen["blocks.0.attn.hook_z"])
    assert random_coordinates(coordinates(any_model, parse("L0.mlp", any_model)[0]), 0) is None


def test_random_within_draws_from_the_pool_alone(half):
    counts = {name: 10 + index for index, name in enumerate(half)}
    drawn = random_within(half, counts, 3)
    assert {name: count.kept for name, count in drawn.by_weight().items()} == counts
    assert (drawn - half).kept == 0
    assert drawn == random_within(half, counts, 3) != random_within(half, counts, 4)
    with pytest.raises(ValueError, match="cannot draw"):
        random_within(~half, {next(iter(half)): 301})
    assert matched_counts(half, half) is None
    assert matched_counts(half - drawn, half) == {n: half.by_weight()[n].kept - counts[n] for n in half}


def test_there_is_no_matched_random_part_of_what_is_whole(tiny_model, half, random_tokens):
    found = ablate(tiny_model, ["L0.mlp", "L0H1"], random_tokens, seeds=1)
    assert math.isnan(found.get("random_rise")["L0.mlp"])
    assert math.isnan(found.get("excess")["L0.mlp"])
    assert not math.isnan(found.get("excess")["L0H1"])
    found = ablate(tiny_model, ["L0", "subnetwork", "random", "L0H0"], half, random_tokens, by="weights", seeds=1)
    missing = {name for name, value in found.get("random_rise").items() if math.isnan(value)}
    assert missing == {"L0", "random"}
    inside = found.get("random_rise_in_subnetwork")
    assert {name for name, value in inside.items() if math.isnan(value)} == {"L0", "subnetwork", "random"}


# --- what comes out ---


@pytest.mark.parametrize("by", WAYS)
def test_intervals_contain_the_point_and_numbers_add_up(tiny_model, half, target, random_tokens, by):
    found = ablate(tiny_model, ["L0H1", "L1N[3,4]"], half, random_tokens, by=by, target=target, seeds=2)
    for quantity in ("rise_in_loss", "excess", "change_in_r", "rise_in_loss_in_subnetwork", "excess_in_subnetwork"):
        at = found.quantities.index(found.quantity(quantity))
        assert (found.low[at] <= found.values[at] + 1e-9).all()
        assert (found.values[at] <= found.high[at] + 1e-9).all()
    for end, base in (("", "full"), ("_in_subnetwork", "subnetwork")):
        for name in found.names:
            rise = found.get(f"rise_in_loss{end}")[name]
            assert rise == pytest.approx(found.get(f"excess{end}")[name] + found.get(f"random_rise{end}")[name])
            assert rise == pytest.approx(found.get(f"loss{end}")[name] - found.notes["loss_before"][base])
    assert found.notes["by"] == dict.fromkeys(found.names, by)
    assert "L0H1" in str(found)


def test_losses_are_those_of_evaluate(tiny_model, half, target, random_tokens):
    found = ablate(tiny_model, ["subnetwork", "complement"], half, random_tokens, target=target, seeds=0)
    known = bc.evaluate(tiny_model, half, target, random_tokens, seeds=1)
    loss, change = found.get("loss"), found.get("change_in_r")
    names = {"subnetwork": known.complement, "complement": known.subnetwork}
    for name, condition in names.items():
        assert loss[name] == pytest.approx(condition.mean_surprisal, rel=1e-5)
        change_in_r = condition.surprisal_correlation - known.full.surprisal_correlation
        assert change[name] == pytest.approx(change_in_r, abs=1e-4)
    assert found.get("loss_in_subnetwork")["subnetwork"] == pytest.approx(known.empty.mean_surprisal, rel=1e-5)
    assert found.get("rise_in_loss_in_subnetwork")["complement"] == 0


def test_a_subnetwork_goes_by_its_lineage_and_a_mapping_by_its_keys(tiny_model, half, random_tokens):
    named = half.named("mine")
    assert ablate(tiny_model, [named, "L0.mlp"], random_tokens, seeds=0).names == ("mine", "L0.mlp")
    assert ablate(tiny_model, {"this": named}, random_tokens, seeds=0).names == ("this",)
    assert ablate(tiny_model, named, random_tokens, seeds=0).notes["by"] == {"mine": "weights"}


def test_a_task_with_wrong_tokens_has_log_odds(tiny_model):
    tokens = np.random.default_rng(0).integers(1, 257, (4, 6))
    scored = np.zeros((4, 6), dtype=bool)
    scored[:, 4] = True
    task = Task("pairs", tokens, scored, 1.0, wrong=np.full((4, 1), 9))
    found = ablate(tiny_model, "mlps", task, seeds=0)
    assert not np.isnan(found.values[found.quantities.index(found.quantity("change_in_log_odds"))]).any()


@pytest.mark.parametrize("kind", ["head", "neurons"])
@pytest.mark.parametrize("by", ["zero", "weights"])
def test_a_planted_part_is_ranked_first(tiny_folders, random_tokens, kind, by):
    model = bc.load_model(tiny_folders["gpt2"], device="cpu")
    matrix = "blocks.1.attn.W_O" if kind == "head" else "blocks.1.mlp.W_out"
    with torch.no_grad():
        for site in weight_sites(model):
            if site.name.endswith(("W_O", "W_out")):
                size = torch.full(site.shape, 0.01)
                if site.name == matrix:
                    size[2] = 20
                site.original.mul_(site.to_stored(size))
    what = "heads" if kind == "head" else [f"L1N{index}" for index in range(6)]
    with torch.no_grad():  # a text that the model itself would write, so that its planted part helps
        tokens = torch.from_numpy(random_tokens[:, :1])
        torch.manual_seed(0)
        for _ in range(12):
            probs = model(tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probs, 1)], 1)
    found = ablate(model, what, tokens.numpy(), by=by, seeds=1)
    assert found.top(1)[0][0] == ("L1H2" if kind == "head" else "L1N2")


@pytest.mark.parametrize("by", WAYS)
def test_nothing_is_left_behind(any_model, random_tokens, by):
    def state():
        hooks = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in any_model.hook_dict.values())
        weights = {name: value.clone() for name, value in any_model.state_dict().items()}
        return hooks, weights, len(list(any_model.modules()))

    class Broken:
        def cross_entropy(self, logits, tokens):
            raise RuntimeError("broken")

        surprisal = cross_entropy

    class Late(Broken):
        def surprisal(self, tokens):
            raise RuntimeError("broken")

    before = state()
    ablate(any_model, ["L0H1"], random_tokens, by=by, seeds=1)
    with pytest.raises(RuntimeError, match="broken"):
        ablate(any_model, ["L0H1"], random_tokens, by=by, seeds=1, target=Late())
    after = state()
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])


def test_a_hook_that_fails_is_taken_off(tiny_model, random_tokens, monkeypatch):
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        ablate(tiny_model, "L0H1", random_tokens, seeds=0)
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())


# --- removing the rest at random ---


def test_the_way_leads_from_the_full_model_to_the_subnetwork(tiny_model, half, target, random_tokens):
    found = stochastic_ablation(tiny_model, half, target, random_tokens, shares=(0, 0.5, 1), draws=2)
    known = bc.evaluate(tiny_model, half, target, random_tokens, seeds=2)
    full, alone = known.full, known.subnetwork
    for condition in ("subnetwork", "random"):
        r, loss = found.get("surprisal_correlation", condition), found.get("loss", condition)
        assert r[0] == pytest.approx(full.surprisal_correlation, abs=1e-4)
        assert loss[0] == pytest.approx(full.mean_surprisal, rel=1e-5)
        low, high = found.interval("loss", condition)
        assert (low <= loss + 1e-9).all()
        assert (loss <= high + 1e-9).all()
        assert low[0] == high[0]
    assert found.get("loss", "subnetwork")[2] == pytest.approx(alone.mean_surprisal, rel=1e-5)
    random = np.mean([one.mean_surprisal for one in known.random])
    assert found.get("loss", "random")[2] == pytest.approx(random, rel=1e-5)
    with pytest.raises(ValueError, match="shares must be"):
        stochastic_ablation(tiny_model, half, target, random_tokens, shares=(0, 2))
    with pytest.raises(ValueError, match="draws must be"):
        stochastic_ablation(tiny_model, half, target, random_tokens, draws=0)
