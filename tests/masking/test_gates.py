import dataclasses
import math

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.masking import gates as gates_module
from bigram_circuits.masking import gates as module
from bigram_circuits.masking.gates import group_gates
from bigram_circuits.masking.methods.continuous_sparsification import ContinuousSparsification, soft_gate, temperature
from bigram_circuits.masking.methods.hard_concrete import HardConcrete, hard_concrete, probability_open
from bigram_circuits.masking.methods.straight_through import StraightThrough, kept_share

UNITS = [
    "weight", "neuron", "head", "block", {"attn": "head", "mlp": "weight"}, {"attn": "block", "mlp": "neuron"},
    {"attn": "weight"},
]  # fmt: skip


# --- formulas ---


def test_temperature_grows_geometrically_and_does_not_overflow():
    assert temperature(0, first=2.0, growth=1.5) == 2.0
    assert temperature(3, first=2.0, growth=1.5) == pytest.approx(2 * 1.5**3)
    assert temperature(10**6, first=1.0, growth=1.9) == 1e30
    assert temperature(10**6, first=1.0, growth=1.0) == 1.0


def test_soft_gate_hardens_to_the_hard_gate():
    scores = torch.tensor([-0.3, -1e-3, 1e-3, 2.0])
    torch.testing.assert_close(soft_gate(scores, 2.0), 1 / (1 + torch.exp(-2 * scores)))
    assert torch.equal(soft_gate(scores, 1e9).round(), module.hard_gate(scores).float())


def test_hard_concrete_has_the_distribution_that_its_penalty_states():
    for score in (-2.0, 0.0, 1.5):
        scores = torch.full((200_000,), score)
        sampled = hard_concrete(scores, torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)))
        assert ((sampled >= 0) & (sampled <= 1)).all()
        expected = 1 / (1 + math.exp(2 / 3 * math.log(0.1 / 1.1) - score))
        assert probability_open(scores[:1]).item() == pytest.approx(expected)
        assert (sampled > 0).float().mean().item() == pytest.approx(expected, abs=5e-3)
        # P(gate <= 1/2) = sigmoid(-s): the binary concrete's distribution function at its middle
        assert (sampled <= 0.5).float().mean().item() == pytest.approx(1 / (1 + math.exp(score)), abs=5e-3)


def test_the_share_of_straight_through_falls_to_its_target():
    assert kept_share(0, target=0.01, steps=100) == 1.0
    assert kept_share(25, target=0.01, steps=100) == pytest.approx(0.1)
    assert kept_share(50, target=0.01, steps=100) == kept_share(99, target=0.01, steps=100) == pytest.approx(0.01)


# --- the objective and its gradient, by the plain formulas ---


def plainly(gates, name, step):
    """(soft, penalised) of all gates, with a graph back to the returned scores."""
    scores = gates.scores.flat().detach().clone().requires_grad_()
    moved = scores - gates.threshold
    if name in ("soft", "hard"):
        soft = torch.sigmoid(temperature(step if name == "soft" else 1, first=2.0, growth=1.5) * moved)
        return scores, soft if name == "soft" else (moved > 0).float() + (soft - soft.detach()), soft
    if name == "hard concrete":
        return scores, hard_concrete(moved, gates._uniform.flat()), probability_open(moved)
    finite = scores.masked_fill(scores.isinf(), 0.0)
    places = sorted({(group.place.start, group.place.stop) for group in gates.groups})  # matrices may share gates
    is_open = torch.cat([gates.hard(slice(*place)) for place in places]).float()
    return scores, is_open + (finite - finite.detach()), is_open


METHODS = {
    "soft": (ContinuousSparsification, {"beta_start": 2.0, "beta_growth": 1.5}),
    "hard": (ContinuousSparsification, {"beta_start": 2.0, "beta_growth": 1.5, "soft_steps": 1, "steps": 4}),
    "hard concrete": (HardConcrete, {"seed": 5}),
    "straight through": (StraightThrough, {"target": 3000, "steps": 4}),
}


def test_hard_gates_follow_soft_ones_and_the_rate_falls_to_zero(tiny_model):
    config = bc.SparsifyConfig(max_steps=10, hard_from=0.4)
    groups = group_gates(bc.weight_sites(tiny_model), config.unit_of)
    gates = ContinuousSparsification.from_config(groups, config, seed=0, wanted=None)
    everything = slice(0, len(gates.scores))
    betas, rates, hard = [], [], []
    with torch.no_grad():
        gates.scores.flat().copy_(torch.linspace(-1, 1, len(gates.scores)))
    for step in range(10):
        gates.refresh(step)
        betas.append(gates.steepness)
        rates.append(gates.rate(step))
        hard.append(set(gates.soft(everything).tolist()) == {0.0, 1.0})
    assert betas == pytest.approx([5 ** (min(step, 4) / 4) for step in range(10)])
    assert rates == pytest.approx([1.0] * 5 + [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(1, 6)])
    assert hard == [False] * 4 + [True] * 6
    assert gates.settles_at == 4
    assert gates.undecided(12, 5) == (0, 5)  # the last step is done
    assert torch.equal(gates.soft(everything).bool(), gates.hard(everything))
    short = bc.SparsifyConfig(max_steps=2, hard_from=0.1)  # all gates would be closed for good without a soft step
    assert ContinuousSparsification.from_config(groups, short, seed=0, wanted=None).settles_at == 1


@pytest.mark.parametrize("unit_of", [u for u in UNITS if isinstance(u, dict)] + [{"attn": "weight", "mlp": "weight"}])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at_once", [1 << 20, 1000])
def test_penalty_and_gradient_are_those_of_the_plain_formulas(any_model, name, unit_of, at_once, monkeypatch):
    method, how = METHODS[name]
    monkeypatch.setitem(module._AT_ONCE, "cpu", at_once)
    generator = torch.Generator().manual_seed(0)
    within = {
        site.name: torch.rand(site.original.shape, generator=generator) < 0.9 for site in bc.weight_sites(any_model)
    }
    gates = method(group_gates(bc.weight_sites(any_model), unit_of), within=within, **how)
    with torch.no_grad():
        gates.scores.flat().add_(torch.randn(len(gates.scores), generator=generator))
    if method is not StraightThrough:
        gates.threshold = 0.1
    gates.refresh(2)
    upstream = {group.site.name: torch.randn(group.site.original.shape, generator=generator) for group in gates.groups}
    mean, between, above = gates.penalise(7.0)
    loss = sum(
        (gates.gate(group.site.name, group.site.original.detach()) * upstream[group.site.name]).sum()
        for group in gates.groups
    )
    loss.backward()

    scores, soft, penalised = plainly(gates, name, 2)
    expected = sum(
        (group.spread(soft[group.place]) * group.site.original.detach() * upstream[group.site.name]).sum()
        for group in gates.groups
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    sizes = [group.spread(penalised[group.place]).mean() * group.site.size for group in gates.groups]
    penalty = sum(sizes) / gates.n_weights
    assert mean == pytest.approx(float(penalty.detach()), rel=1e-5)
    (expected + 7.0 * penalty).backward()
    torch.testing.assert_close(gates.gradient.flat(), scores.grad, rtol=1e-4, atol=1e-6)
    assert (gates.gradient.flat()[gates.scores.flat().isinf()] == 0).all()
    if method is not StraightThrough:
        assert between == int(((penalised > 0.1) & (penalised <= 0.9)).sum())
        assert above == int((penalised > 0.9).sum())
    assert gates.n_kept() == sum(int(mask.sum()) for mask in gates.masks().values())


def test_a_backward_pass_adds_to_the_gradient_that_is_there(any_model, random_tokens):
    tokens = torch.from_numpy(random_tokens)
    gates = ContinuousSparsification(group_gates(bc.weight_sites(any_model), {"attn": "weight", "mlp": "weight"}))
    with bc.gated(any_model, gates):
        gates.refresh(0)
        gates.penalise(3.0)
        penalty = gates.gradient.flat().clone()
        any_model(tokens).square().mean().backward()
        both = gates.gradient.flat().clone()
        gates.penalise(0.0)
        assert (gates.gradient.flat() == 0).all()
        any_model(tokens).square().mean().backward()
    torch.testing.assert_close(both, penalty + gates.gradient.flat())


# --- tied gates ---


def is_whole(subnetwork: bc.Subnetwork, unit: str) -> bool:
    """Whether every unit of the kind is kept or dropped as one, by the canonical masks."""
    for layer in (0, 1):
        masks = {name.split(".")[-1]: mask for name, mask in subnetwork.items() if name.startswith(f"blocks.{layer}.")}
        if unit == "head":
            own = [masks["W_Q"].flatten(1), masks["W_O"].flatten(1)]
            shared = [masks["W_K"].flatten(1), masks["W_V"].flatten(1)]
            heads, groups = len(own[0]), len(shared[0])
            query = torch.cat(own, 1)
            if not torch.equal(query.all(1), query.any(1)):
                return False
            needed = query.any(1).view(groups, heads // groups).any(1)
            if not all(torch.equal(m.all(1), needed) and torch.equal(m.any(1), needed) for m in shared):
                return False
        elif unit == "neuron":
            rows = torch.cat([masks["W_out"], masks["W_in"].T, *([masks["W_gate"].T] if "W_gate" in masks else [])], 1)
            if not torch.equal(rows.all(1), rows.any(1)):
                return False
        elif unit == "block":
            for component in (("W_Q", "W_K", "W_V", "W_O"), ("W_in", "W_gate", "W_out")):
                block = torch.cat([masks[name].flatten() for name in component if name in masks])
                if block.any() and not block.all():
                    return False
    return True


@pytest.fixture(scope="module")
def task(tokenizer):
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list("abcdefgh"), 150)) for _ in range(40)]
    corpus = bc.load_corpus(documents, tokenizer=tokenizer, context_length=32, held_out=0.2)
    return corpus, bc.count_ngrams(corpus.train, 2, d_vocab=257)


@pytest.mark.usefixtures("no_forecast")
@pytest.mark.parametrize("granularity", UNITS, ids=str)
@pytest.mark.parametrize("method", ["continuous_sparsification", "hard_concrete", "straight_through"])
def test_every_method_keeps_units_whole_and_reaches_its_size(any_model, task, granularity, method):
    corpus, target = task
    config = bc.SparsifyConfig(
        method=method, granularity=granularity, target_fraction=0.75, max_steps=6, batch_size=4, learning_rate=0.2,
        beta_growth=1.5, retries=0,
    )  # fmt: skip
    found = bc.find_subnetwork(any_model, target, corpus, config).subnetwork
    wanted = round(0.75 * found.total)
    units = {granularity} if isinstance(granularity, str) else set(granularity.values())
    if units == {"weight"}:
        assert found.kept == wanted
    else:
        assert wanted * 0.5 < found.kept <= wanted
    for unit in units - {"weight"}:
        if isinstance(granularity, str) or len(granularity) == 2:
            assert unit == "block" or is_whole(found, unit)
    if granularity == "block":
        assert is_whole(found, "block")
    gated = set(config.unit_of)
    for (_, component), count in found.by_component().items():
        if component not in gated:
            assert count.kept == count.total


def test_only_the_chosen_layers_are_masked(tiny_model, task):
    corpus, target = task
    config = bc.SparsifyConfig(layers=(1,), sparsity_weight=1000.0, max_steps=30, learning_rate=0.1, retries=0)
    found = bc.find_subnetwork(tiny_model, target, corpus, config).subnetwork
    counts = found.by_component()
    assert counts[0, "attn"].fraction == counts[0, "mlp"].fraction == 1
    assert counts[1, "mlp"].fraction < 0.1


def test_nothing_outside_is_found(tiny_model, task):
    corpus, target = task
    within = bc.Subnetwork.full(tiny_model).drop_layer(1).drop_head(0, 2)
    for method in ("continuous_sparsification", "hard_concrete"):
        config = bc.SparsifyConfig(method=method, sparsity_weight=0.0, max_steps=4, retries=0)
        found = bc.find_subnetwork(tiny_model, target, corpus, config, within=within).subnetwork
        assert found.kept > 0
        assert (found - within).kept == 0


def test_a_tied_gate_gets_the_sum_of_its_weights_gradients(any_model, random_tokens):
    tokens = torch.from_numpy(random_tokens)
    sites = bc.weight_sites(any_model)

    def gradient(unit_of):
        gates = ContinuousSparsification(group_gates(sites, unit_of), beta_start=1.0)
        with bc.gated(any_model, gates):
            gates.refresh(0)
            any_model(tokens).square().mean().backward()
        return gates, gates.gradient.flat()

    single, each = gradient({"attn": "weight", "mlp": "weight"})
    tied, together = gradient({"attn": "block", "mlp": "neuron"})
    for group in tied.groups:
        same = [
            t for t in single.groups if (t.site.layer, t.site.component) == (group.site.layer, group.site.component)
        ]
        by_weight = [t.site.from_stored(each[t.start : t.start + t.count].view(t.site.original.shape)) for t in same]
        if group.unit == "block":
            expected = torch.stack([g.sum() for g in by_weight]).sum().view(1)
        else:
            expected = sum(
                g.sum(1) if t.site.name.endswith("W_out") else g.sum(0) for g, t in zip(by_weight, same, strict=True)
            )
        torch.testing.assert_close(together[group.start : group.start + group.count], expected, atol=1e-5, rtol=1e-3)


def test_a_weight_that_is_zero_starts_and_stays_dropped(tiny_folders):
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    site = bc.weight_sites(model)[4]
    with torch.no_grad():
        site.original[0, :5] = 0
    gates = ContinuousSparsification(group_gates(bc.weight_sites(model), {"mlp": "weight"}), first_score=0.5)
    optimizer = torch.optim.AdamW([gates.scores.flat()], lr=0.1, weight_decay=0.01)
    for step in range(3):
        gates.refresh(step)
        gates.penalise(-1.0)
        optimizer.step()
    mask = gates.masks()[site.name]
    assert torch.equal(mask, site.original != 0)
    assert gates.n_kept() == gates.n_weights - 5
    with pytest.raises(ValueError, match=r"only \d+ are neither 0 nor excluded"):
        gates.masks(gates.n_weights)


@pytest.mark.parametrize("unit_of", [{"attn": "weight", "mlp": "weight"}, {"attn": "head", "mlp": "neuron"}], ids=str)
def test_the_threshold_opens_what_is_wanted_or_all_there_is(tiny_model, unit_of):
    sites = bc.weight_sites(tiny_model)
    within = bc.Subnetwork.full(tiny_model).drop_layer(1)
    stored = {site.name: site.to_stored(within[site.name]) for site in sites}
    gates = ContinuousSparsification(group_gates(sites, unit_of), within=stored)
    noise = torch.randn(len(gates.scores), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gates.scores.flat().add_(noise)  # what is outside stays at minus infinity
    for wanted in (0, 1000, within.kept, within.total):
        gates.set_threshold(wanted)
        expected = min(wanted, within.kept)
        if "weight" in unit_of.values():
            assert gates.n_kept() == expected
        else:
            assert expected - 200 < gates.n_kept() <= expected


def test_a_threshold_from_a_sample_is_near_what_is_wanted_down_to_one_and_up_to_all(tiny_model, monkeypatch):
    gates = ContinuousSparsification(group_gates(bc.weight_sites(tiny_model), {"mlp": "weight"}))
    every = 3
    monkeypatch.setattr(gates_module, "_SAMPLED", -(-len(gates.scores) // every))
    noise = torch.randn(len(gates.scores), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gates.scores.flat().copy_(noise)
    for wanted in (0, 1, every, 500, gates.n_weights - 1, gates.n_weights):
        gates.set_threshold(wanted)
        assert abs(gates.n_kept() - wanted) < 100


def test_straight_through_ends_with_its_number(tiny_model):
    gates = StraightThrough(group_gates(bc.weight_sites(tiny_model), {"mlp": "weight"}), target=100, steps=10)
    kept = []
    for step in range(10):
        gates.refresh(step)
        kept.append(gates.n_kept())
    assert kept[0] == gates.n_weights
    assert kept == sorted(kept, reverse=True)
    assert kept[5:] == [100] * 5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"granularity": {"attn": "neuron"}}, "granularity of attn must be one of weight, head, block, not 'neuron'"),
        ({"granularity": {"ln": "weight"}}, "a component of granularity must be one of attn, mlp, not 'ln'"),
        ({"granularity": {}}, "must name at least one component"),
        ({"method": "straight_through"}, "say how many with target_fraction"),
        ({"target_fraction": 0.0}, "target_fraction must be above 0 and at most 1, not 0.0"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        bc.SparsifyConfig(**wrong)


def test_layers_and_sizes_that_the_model_has_not_are_refused(tiny_model, task):
    corpus, target = task
    with pytest.raises(ValueError, match="there is no layer 7: layers are 0 to 1"):
        bc.find_subnetwork(tiny_model, target, corpus, bc.SparsifyConfig(layers=(7,)))
    config = bc.SparsifyConfig(layers=(0,), target_fraction=0.1)
    with pytest.raises(ValueError, match=r"the weights without gates are already 0\.5 of all"):
        bc.find_subnetwork(tiny_model, target, corpus, dataclasses.replace(config))
