import dataclasses
import math

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import gates as module
from bigram_circuits.gates import (
    ContinuousSparsification,
    StraightThrough,
    hard_concrete,
    kept_share,
    probability_open,
    soft_gate,
    straight_through,
    temperature,
    tie_gates,
    undecided,
)

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
    assert undecided(torch.tensor([0.05, 0.1, 0.2, 0.89, 0.95, 1.0])) == (2, 2)


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


def test_straight_through_is_hard_forward_and_the_identity_backward():
    scores = torch.tensor([0.3, -0.2, -torch.inf], requires_grad=True)
    gates = straight_through(torch.tensor([True, False, False]), scores)
    assert gates.tolist() == [1.0, 0.0, 0.0]
    (gates * torch.tensor([5.0, 7.0, 9.0])).sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [5.0, 7.0, 0.0]
    assert kept_share(0, target=0.01, steps=100) == 1.0
    assert kept_share(25, target=0.01, steps=100) == pytest.approx(0.1)
    assert kept_share(50, target=0.01, steps=100) == kept_share(99, target=0.01, steps=100) == pytest.approx(0.01)


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
        gates = ContinuousSparsification(tie_gates(sites, unit_of), beta_start=1.0)
        with bc.gated(any_model, gates):
            gates.refresh(0)
            any_model(tokens).square().mean().backward()
        assert gates.scores.grad is not None
        return gates, gates.scores.grad

    single, each = gradient({"attn": "weight", "mlp": "weight"})
    tied, together = gradient({"attn": "block", "mlp": "neuron"})
    for tie in tied.ties:
        same = [t for t in single.ties if (t.site.layer, t.site.component) == (tie.site.layer, tie.site.component)]
        by_weight = [t.site.from_stored(each[t.start : t.start + t.count].view(t.site.original.shape)) for t in same]
        if tie.unit == "block":
            expected = torch.stack([g.sum() for g in by_weight]).sum().view(1)
        else:
            expected = sum(
                g.sum(1) if t.site.name.endswith("W_out") else g.sum(0) for g, t in zip(by_weight, same, strict=True)
            )
        torch.testing.assert_close(together[tie.start : tie.start + tie.count], expected, atol=1e-5, rtol=1e-3)


def test_a_weight_that_is_zero_starts_and_stays_dropped(tiny_folders):
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    site = bc.weight_sites(model)[4]
    with torch.no_grad():
        site.original[0, :5] = 0
    gates = ContinuousSparsification(tie_gates(bc.weight_sites(model), {"mlp": "weight"}), first_score=0.5)
    optimizer = torch.optim.AdamW([gates.scores], lr=0.1, weight_decay=0.01)
    for step in range(3):
        optimizer.zero_grad()
        (-gates.refresh(step)).backward()
        optimizer.step()
    mask = gates.masks()[site.name]
    assert torch.equal(mask, site.original != 0)
    assert gates.n_kept() == gates.n_weights - 5
    with pytest.raises(ValueError, match=r"only \d+ are neither 0 nor excluded"):
        gates.masks(gates.n_weights)


def test_the_penalty_is_the_mean_over_weights_whatever_they_are_tied_by(any_model):
    sites = bc.weight_sites(any_model)
    gates = ContinuousSparsification(tie_gates(sites, {"attn": "head", "mlp": "neuron"}))
    with torch.no_grad():
        gates.scores.copy_(torch.randn(gates.scores.shape, generator=torch.Generator().manual_seed(0)))
    penalty = gates.refresh(0)
    spread = torch.cat([gates.soft[site.name].expand(site.original.shape).flatten() for site in sites])
    assert penalty.item() == pytest.approx(spread.mean().item(), rel=1e-5)
    assert gates.n_kept() == sum(int(mask.sum()) for mask in gates.masks().values())


@pytest.mark.parametrize("unit_of", [{"attn": "weight", "mlp": "weight"}, {"attn": "head", "mlp": "neuron"}], ids=str)
def test_the_threshold_opens_what_is_wanted_or_all_there_is(tiny_model, unit_of):
    sites = bc.weight_sites(tiny_model)
    within = bc.Subnetwork.full(tiny_model).drop_layer(1)
    stored = {site.name: site.to_stored(within[site.name]) for site in sites}
    gates = ContinuousSparsification(tie_gates(sites, unit_of), within=stored)
    noise = torch.randn(gates.scores.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gates.scores.add_(noise)  # what is outside stays at minus infinity
    for wanted in (0, 1000, within.kept, within.total):
        gates.aim(wanted)
        expected = min(wanted, within.kept)
        if "weight" in unit_of.values():
            assert gates.n_kept() == expected
        else:
            assert expected - 200 < gates.n_kept() <= expected


def test_straight_through_ends_with_its_number(tiny_model):
    gates = StraightThrough(tie_gates(bc.weight_sites(tiny_model), {"mlp": "weight"}), target=100, steps=10)
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
    with pytest.raises(ValueError, match=r"the weights that are not masked are already 0\.5 of all"):
        bc.find_subnetwork(tiny_model, target, corpus, dataclasses.replace(config))
