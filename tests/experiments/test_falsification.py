"""Attempts to refute a finding: what a control is, and that it refutes what it should and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.experiments import falsification
from bigram_circuits.experiments.controls import (
    RenamedTarget,
    with_random_blocks,
    with_shuffled_blocks,
)
from bigram_circuits.experiments.falsification import (
    Falsification,
    _sizes_kept,
    falsify,
    load_falsification,
)
from bigram_circuits.experiments.seeds import overlaps_of
from bigram_circuits.experiments.verdicts import size_ratio
from bigram_circuits.report.page import page
from bigram_circuits.runs import RunFolder
from bigram_circuits.targets.base import kl_of_best_constant
from tests.conftest import D_VOCAB, TINY_CONFIGS, byte_tokenizer
from tests.example_runs import make_run, measured

TEXT = np.random.default_rng(0).integers(0, 12, (24, 16))
CORPUS = bc.Corpus.from_tokens(TEXT[:16], TEXT[16:])
TARGET = bc.count_ngrams(TEXT[:16], 2, d_vocab=D_VOCAB)
RECIPE = bc.SparsifyConfig(max_steps=3, batch_size=4)


# --- the nonsense target ---


def test_a_renamed_target_is_the_target_with_its_tokens_renamed():
    target = bc.count_ngrams(np.arange(60).reshape(6, 10) % 7, 2, d_vocab=7)
    renamed = RenamedTarget(target, 7, seed=3)
    s = renamed.name_of
    tokens = torch.tensor([[0, 3, 5, 1]])
    logits = torch.randn(1, 4, 7)
    table = target.log_probs(torch.arange(7)[:, None]).exp()[:, 0]  # P[x, y]
    wanted = table[s][:, s]  # P'(y | x) = P(s(y) | s(x))
    log_q = logits.log_softmax(-1)
    torch.testing.assert_close(renamed.cross_entropy(logits, tokens), -(wanted[tokens] * log_q).sum(-1))
    torch.testing.assert_close(renamed.log_probs(tokens).exp(), wanted[tokens])
    torch.testing.assert_close(renamed.entropy(tokens), torch.special.entr(wanted[tokens]).sum(-1))
    torch.testing.assert_close(renamed.surprisal(tokens), -wanted[tokens[:, :-1], tokens[:, 1:]].log())
    assert (wanted[tokens].gather(-1, renamed.top1(tokens)[..., None])[..., 0] == wanted[tokens].amax(-1)).all()
    assert sorted(s.tolist()) == list(range(7))
    assert renamed.fingerprint != RenamedTarget(target, 7, seed=4).fingerprint


def test_a_renamed_target_knows_what_its_target_knows():
    renamed = RenamedTarget(bc.NextTokenTarget(), D_VOCAB)
    assert renamed.positions == slice(0, -1)
    tokens = torch.tensor([[1, 2, 3]])
    assert renamed.cross_entropy(torch.zeros(1, 3, D_VOCAB), tokens).shape == (1, 2)
    torch.testing.assert_close(renamed.top1(tokens), tokens[:, 1:])  # the actual next token, whatever its name

    class Least:
        cross_entropy, surprisal = TARGET.cross_entropy, TARGET.surprisal

    assert RenamedTarget(Least(), D_VOCAB).entropy(tokens) is None
    assert RenamedTarget(Least(), D_VOCAB).top1(tokens) is None
    with pytest.raises(ValueError, match="vocabulary of 257"):
        RenamedTarget(TARGET, 300)


def test_the_best_constant_is_the_mean_of_the_targets_distributions():
    tokens = torch.from_numpy(TEXT)
    probs = TARGET.log_probs(tokens).exp()
    mean = probs.mean((0, 1))
    by_hand = torch.where(probs > 0, probs * (probs.log() - mean.log()), 0.0).sum(-1).mean()
    assert kl_of_best_constant(TARGET, TEXT) == pytest.approx(float(by_hand), rel=1e-4)
    rare = RenamedTarget(TARGET, D_VOCAB)
    assert rare.log_probs(tokens).exp().sum(-1).allclose(torch.ones(TEXT.shape), atol=1e-5)
    assert np.isnan(kl_of_best_constant(bc.NextTokenTarget(), TEXT))


# --- the model that learned nothing ---


def test_only_the_blocks_are_reinitialised(tiny_model):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    other = with_random_blocks(tiny_model, seed=1)
    trained, untrained = dict(tiny_model.named_parameters()), dict(other.named_parameters())
    assert trained.keys() == untrained.keys()
    for site in bc.weight_sites(tiny_model):
        other_site = next(one for one in bc.weight_sites(other) if one.name == site.name)
        assert not torch.equal(site.weight, other_site.weight)
    assert torch.equal(tiny_model.W_E, other.W_E)
    assert torch.equal(tiny_model.W_U, other.W_U)
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    again, third = with_random_blocks(tiny_model, seed=1), with_random_blocks(tiny_model, seed=2)
    assert bc.weight_hash(again) == bc.weight_hash(other) != bc.weight_hash(third)
    assert other(torch.tensor([[1, 2]])).isfinite().all()


def test_a_model_that_learned_nothing_is_what_hugging_face_makes(any_model):
    other = with_random_blocks(any_model, seed=3, everything=True)
    torch.manual_seed(3)
    plain = AutoModelForCausalLM.from_config(any_model.original_model.config)
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(other(tokens), plain.eval()(tokens).logits)
    blocks = with_random_blocks(any_model, seed=3)  # its blocks have the same new weights
    sites = zip(bc.weight_sites(blocks), bc.weight_sites(other), strict=True)
    assert all(torch.equal(one.weight, same.weight) for one, same in sites)
    assert "everything re-initialised (seed 3)" in other.cfg.model_name


def test_shuffled_blocks_have_the_same_entries_in_other_places(any_model):
    before = {name: value.clone() for name, value in any_model.state_dict().items()}
    other = with_shuffled_blocks(any_model, seed=1)
    sites = {site.name: site.weight for site in bc.weight_sites(other)}
    for site in bc.weight_sites(any_model):
        mine, theirs = site.weight.flatten(), sites[site.name].flatten()
        assert not torch.equal(mine, theirs)
        assert torch.equal(mine.sort().values, theirs.sort().values)
    state = any_model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    vectors = [name for name, value in state.items() if value.ndim < 2]
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in vectors if "rotary" not in name)
    assert torch.equal(any_model.W_E, other.W_E)
    assert bc.weight_hash(with_shuffled_blocks(any_model, seed=1)) == bc.weight_hash(other)
    assert bc.weight_hash(with_shuffled_blocks(any_model, seed=2)) != bc.weight_hash(other)
    assert "with shuffled blocks (seed 1)" in other.cfg.model_name


# --- the whole ---


@pytest.fixture(scope="module")
def tried(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("falsify")
    found = bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE).subnetwork
    args = {"found": found, "sizes": [2 * found.fraction], "seeds": 2, "run_dir": folder}
    return falsify(tiny_model, TARGET, CORPUS, RECIPE, **args), args, found


def test_every_attempt_is_a_run_and_is_measured(tried, tiny_model):
    result, args, found = tried
    folder = args["run_dir"]
    blocks, everything = "re-initialised blocks", "everything re-initialised"
    of_its_size = (
        "found",
        blocks,
        everything,
        "shuffled blocks",
        "nonsense target",
        "seed 1",
        "seed 2",
        f"{blocks}, seed 1",
        f"{blocks}, seed 2",
    )
    free = ("trained, no penalty", f"{blocks}, no penalty", f"{everything}, no penalty")
    assert result.controls.names == (*of_its_size, *free)
    assert {name: result.controls.get("fraction")[name] for name in of_its_size} == dict.fromkeys(
        of_its_size, found.fraction
    )
    sizes = [found.kept, 2 * found.kept]
    assert result.curves.points == tuple(size / found.total for size in sizes)
    assert result.curves.conditions == ("trained", blocks, everything)
    for condition in ("trained", blocks):
        np.testing.assert_array_equal(result.curves.get("fraction", condition), result.curves.points)
    at = sizes.index(found.kept)
    assert np.isnan(result.curves.get("kl", everything)).tolist() == [place != at for place in range(len(sizes))]
    folders = {f"{name} at {found.kept} weights" for name in of_its_size[1:]} | set(free)
    folders |= {f"{name} at {size} weights" for name in ("trained", blocks) for size in sizes if size != found.kept}
    folders = {name.replace(",", "").replace(" ", "-") for name in folders}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == folders | {"stricter"}
    for name in folders:
        assert bc.load_run(folder / name).subnetwork.total == found.total
        if "weights" in name:
            assert bc.load_run(folder / name).subnetwork.kept == int(name.split("-")[-2])
    own = bc.evaluate(tiny_model, found, TARGET, CORPUS.held_out, controls=False).subnetwork
    assert result.controls.get("kl")["found"] == own.kl == result.curves.get("kl", "trained")[at]
    seed = bc.load_run(folder / f"seed-2-at-{found.kept}-weights").subnetwork
    measured = bc.evaluate(tiny_model, seed, TARGET, CORPUS.held_out, controls=False).subnetwork
    assert result.controls.get("kl")["seed 2"] == measured.kl
    expected = bc.overlap(found, seed, by="component")
    assert result.seeds.get("intersection")["found, seed 2: all"] == expected.get("intersection")["all"]
    constant = kl_of_best_constant(TARGET, CORPUS.held_out)
    assert result.controls.get("context_told")["found"] == pytest.approx(1 - own.kl / constant)
    kl = [result.controls.get("kl")[name] for name in ("found", "seed 1", "seed 2")]
    assert result.spread.get("mean")["kl"] == pytest.approx(np.mean(kl))
    assert result.spread.get("sd")["kl"] == pytest.approx(np.std(kl, ddof=1))
    assert result.spread.get("highest")["kl"] == max(kl)


def sums_by_hand(model, subnetwork, sequence):
    """CE of the target to the masked model, and the pairs of surprisals of actual next tokens, of one sequence."""
    tokens = torch.from_numpy(sequence)[None]
    with torch.inference_mode(), bc.masked(model, subnetwork):
        log_q = model(tokens)[0].double().log_softmax(-1).numpy()
    p = TARGET.log_probs(tokens)[0].double().exp().numpy()
    following = np.arange(len(sequence) - 1), sequence[1:]
    used = p[following] > 0
    return -(p * log_q).sum(1), -log_q[following][used], -np.log(p[following][used])


def test_gaps_are_those_of_plain_numpy(tried, tiny_model):
    result, args, found = tried
    folder = args["run_dir"]
    name, rng = f"re-initialised-blocks-at-{found.kept}-weights", np.random.default_rng(5)
    other, control = with_random_blocks(tiny_model, seed=0), bc.load_run(folder / name).subnetwork
    trained = [sums_by_hand(tiny_model, found, one) for one in TEXT[16:]]
    untrained = [sums_by_hand(other, control, one) for one in TEXT[16:]]

    def gaps(places):
        own, its = (
            [np.concatenate([of[place][k] for place in places]) for k in range(3)] for of in (trained, untrained)
        )
        return its[0].mean() - own[0].mean(), np.corrcoef(own[1:])[0, 1] - np.corrcoef(its[1:])[0, 1]

    kl, r = gaps(range(len(trained)))
    assert result.gaps.get("kl_gap")["re-initialised blocks"] == pytest.approx(kl, abs=1e-5)
    assert result.gaps.get("r_gap")["re-initialised blocks"] == pytest.approx(r, abs=1e-4)
    told = kl / kl_of_best_constant(TARGET, CORPUS.held_out)
    assert result.gaps.get("context_told_gap")["re-initialised blocks"] == pytest.approx(told, abs=1e-4)
    draws = np.array([gaps(rng.integers(0, len(trained), len(trained))) for _ in range(1000)])
    for q, drawn in enumerate(draws.T):
        ends = result.gaps.low[q, 0], result.gaps.high[q, 0]
        assert ends == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.3 * np.std(drawn))


def test_what_was_done_is_not_done_again(tried, tiny_model, monkeypatch):
    result, args, _ = tried
    folder = args["run_dir"]
    monkeypatch.setattr("bigram_circuits.learning.training._attempt", lambda *_: pytest.fail("it learned again"))
    again = falsify(tiny_model, TARGET, CORPUS, RECIPE, **args)
    np.testing.assert_array_equal(again.controls.values, result.controls.values)
    read = load_falsification(folder)
    assert read is not None
    assert str(read) == str(result)
    assert load_falsification(folder / "nowhere") is None


def test_a_planted_circuit_stands(tmp_path):
    planted = bc.plant_bigram("gpt2", d_vocab=8, n_layers=1, folder=tmp_path / "planted")
    recipe = bc.SparsifyConfig(max_steps=20, batch_size=4, retries=0)
    args = planted.model, planted.target, planted.corpus, recipe
    result = falsify(*args, found=planted.circuit, sizes=[planted.circuit.fraction], seeds=2, stricter=False)
    assert result.stricter is None
    assert result.curves.points == (planted.circuit.fraction,)
    assert result.controls.get("context_told")["seed 1"] > 0.999  # so the recipe finds what is there
    assert result.verdict == "No control refutes or weakens the finding."
    told = result.gaps.quantities.index(result.gaps.quantity("context_told_gap"))
    low = dict(zip(result.gaps.names, result.gaps.low[told], strict=True))
    assert min(low[name] for name in ("re-initialised blocks", "everything re-initialised", "nonsense target")) > 0.9
    assert low["shuffled blocks"] > 0.5  # some of the planted weights fall into useful places
    assert result.size_ratio == (1, np.inf)
    assert "need more than 1.0 times its weights. The result depends on trained blocks" in result.says[0]


def test_untrained_blocks_are_refuted_by_blocks_that_are_the_same(tmp_path):
    recipe = replace(RECIPE, max_steps=1, target_fraction=0.1)
    torch.manual_seed(recipe.seed)
    plain = AutoModelForCausalLM.from_config(TINY_CONFIGS["llama"])
    plain.save_pretrained(tmp_path / "untrained")
    byte_tokenizer().save_pretrained(tmp_path / "untrained")
    untrained = bc.load_model(tmp_path / "untrained", device="cpu")
    found = bc.find_subnetwork(untrained, TARGET, CORPUS, recipe).subnetwork
    result = falsify(untrained, TARGET, CORPUS, recipe, found=found, sizes=[0.1], seeds=2, stricter=False)
    names = ("re-initialised blocks", "everything re-initialised")
    assert result.refuted[:2] == names
    for name in names:
        assert [result.gaps.get(gap)[name] for gap in ("kl_gap", "r_gap", "context_told_gap")] == [0, 0, 0]
    assert result.size_ratio == pytest.approx((1, 1))
    assert "need 1.0 times its weights" in result.says[0]


def test_sizes_at_equal_kl_are_interpolated_over_log_size(tried):
    curves, points = tried[0].curves, (0.01, 0.02, 0.04)
    values = np.full((len(curves.quantities), 3, 3), np.nan)
    names = [one.name for one in curves.quantities]
    values[names.index("fraction"), 1] = points

    def ratio(own, losses):
        values[names.index("cross_entropy"), 0, 1] = own
        values[names.index("cross_entropy"), 1] = losses
        return size_ratio(replace(curves, points=points, values=values, low=values, high=values), 0.02)

    assert ratio(2.0, [4.0, 3.0, 1.0]) == pytest.approx((2**0.5,) * 2)  # half way from once to twice
    assert ratio(2.0, [4.0, 2.0, 1.0]) == pytest.approx((1, 1))
    assert ratio(0.5, [4.0, 2.0, 1.0]) == (2, np.inf)
    assert ratio(5.0, [4.0, 2.0, 1.0]) == (0, 0.5)


def test_results_of_the_first_version_are_read(tried, tmp_path):
    result = replace(tried[0], curves=None, gaps=None, stricter=None)
    former = {"re-initialised blocks": "blocks initialised anew"}
    names = tuple(former.get(name, name) for name in result.controls.names)
    replace(result, controls=replace(result.controls, names=names)).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"controls.json", "seeds.json", "spread.json"}
    read = load_falsification(tmp_path)
    assert (read.says, read.verdict, read.size_ratio) == (result.says, result.verdict, None)
    assert "compared at one penalty, not at one size" in read.says[0]


def changed(result, name, **values):
    """A result with other numbers for one attempt."""
    controls = result.controls
    numbers = controls.values.copy()
    for key, value in values.items():
        numbers[[one.name for one in controls.quantities].index(key), controls.names.index(name)] = value
    return replace(result, controls=replace(controls, values=numbers))


def with_gap(result, name, value, low, key="context_told_gap"):
    """A result with another gap, whose interval begins at `low`."""
    gaps = result.gaps
    at = [one.name for one in gaps.quantities].index(key), gaps.names.index(name)
    values, lows = gaps.values.copy(), gaps.low.copy()
    values[at], lows[at] = value, low
    return replace(result, gaps=replace(gaps, values=values, low=lows))


def test_the_gap_and_its_interval_decide(tried):
    result = changed(tried[0], "found", context_told=0.9)
    for name in ("re-initialised blocks", "everything re-initialised", "shuffled blocks", "nonsense target"):
        for seed in (1, 2):
            result = with_gap(result, f"re-initialised blocks, seed {seed}", 0.1, 0.05)
        for told, low, verdict in (
            (0.85, -0.001, f"REFUTED by: {name}"), (0.85, 0.0, f"REFUTED by: {name}"),
            (0.85, 0.001, f"Weakened by: {name}"), (0.44, 0.001, ""),
        ):  # fmt: skip
            other = with_gap(changed(result, name, context_told=told), name, 0.9 - told, low)
            assert (name in other.refuted) == verdict.startswith("REFUTED")
            judged = {one.control: one.finding for one in other.judged}
            assert judged[name] == {"R": "refuted", "W": "weakened"}.get(verdict[:1], "stands")
        unknown = with_gap(changed(result, name, context_told=np.nan), name, np.nan, np.nan)
        assert name in with_gap(unknown, name, 0.1, -0.1, "kl_gap").refuted
        assert name not in with_gap(unknown, name, 0.1, 0.01, "kl_gap").refuted


def test_a_seed_without_a_gap_weakens(tried):
    name = "re-initialised blocks"
    result = with_gap(changed(changed(tried[0], "found", context_told=0.9), name, context_told=0.1), name, 0.8, 0.7)
    for value, finding in ((0.1, "stands"), (-0.1, "weakened")):
        other = result
        for seed in (1, 2):
            other = with_gap(other, f"{name}, seed {seed}", value, np.nan)
        assert other.judged[0].finding == finding


def test_without_gaps_a_control_that_does_as_well_with_as_few_weights_refutes(tried):
    result = replace(changed(tried[0], "found", context_told=0.9, fraction=0.02, cross_entropy=2.0), gaps=None)
    for name in ("re-initialised blocks", "nonsense target"):
        good = changed(result, name, context_told=0.88, fraction=0.03)
        assert name in good.refuted
        assert f"REFUTED by: {name}" in str(good)
        for values, verdict in (
            ({"context_told": 0.88, "fraction": 0.05}, f"Weakened by: {name}"),  # with more than twice the weights
            ({"context_told": 0.5, "fraction": 0.02}, f"Weakened by: {name}"),  # much of it
            ({"context_told": 0.3, "fraction": 0.02}, ""),
            ({"context_told": 0.9, "fraction": 0.0}, ""),
        ):
            other = changed(result, name, **values)
            assert name not in other.refuted
            assert (verdict in other.verdict) if verdict else (name not in other.verdict)
        unknown = changed(changed(result, "found", context_told=np.nan), name, context_told=np.nan, fraction=0.02)
        assert name in changed(unknown, name, cross_entropy=2.01).refuted
        assert name not in changed(unknown, name, cross_entropy=2.5).refuted


def test_a_finding_that_tells_nothing_is_refuted_by_all_that_is_no_worse(tried):
    name, result = "nonsense target", replace(tried[0], gaps=None)
    result = changed(changed(result, "found", context_told=-0.2, fraction=0.02), name, fraction=0.02)
    assert name in changed(result, name, context_told=0.5).refuted
    assert name in changed(result, name, context_told=-0.2).refuted
    assert name not in changed(result, name, context_told=-0.3).verdict


def test_a_target_without_a_context_is_judged_by_its_cross_entropy(tiny_model, monkeypatch):
    unigram = bc.count_ngrams(TEXT[:16], 1, d_vocab=D_VOCAB)
    assert abs(kl_of_best_constant(unigram, CORPUS.held_out)) < 1e-4
    full = bc.Subnetwork.full(tiny_model)
    found = bc.FoundSubnetwork(full, [], RECIPE, "decided", 0.0, None)
    monkeypatch.setattr(falsification, "find_mask", lambda *args, **options: found)
    for make in ("with_random_blocks", "with_shuffled_blocks"):
        monkeypatch.setattr(falsification, make, lambda *args, **options: tiny_model)
    result = falsify(tiny_model, unigram, CORPUS, RECIPE, found=full, seeds=2, stricter=False)
    assert np.isnan(list(result.controls.get("context_told").values())).all()
    assert "% of the weights (cross-entropy 5." in result.says[0]
    assert result.refuted[:2] == ("re-initialised blocks", "everything re-initialised")


def test_without_a_size_straight_through_masks_are_not_learned(tiny_model, monkeypatch):
    recipe = replace(RECIPE, method="straight_through", target_fraction=0.5)
    full = bc.Subnetwork.full(tiny_model)
    recipes = []

    def find(model, target, corpus, config, **options):
        recipes.append(config)
        return bc.FoundSubnetwork(full, [], config, "decided", 0.0, None)

    monkeypatch.setattr(falsification, "find_mask", find)
    for make in ("with_random_blocks", "with_shuffled_blocks"):
        monkeypatch.setattr(falsification, make, lambda *args, **options: tiny_model)
    result = falsify(tiny_model, TARGET, CORPUS, recipe, found=full, seeds=2, stricter=False)
    assert not any("no penalty" in name for name in result.controls.names)
    assert not any("ceiling" in one for one in result.says)
    assert {one.target_fraction for one in recipes} == {0.5, 1.0}  # twice the full model there is not


def test_the_page_tells_what_refutes_it(tried, tmp_path):
    run = make_run(tmp_path / "run", metrics=measured())
    assert "Not attempted" in page(run)
    found = changed(replace(tried[0], stricter=None), "found", context_told=0.9)
    found = with_gap(changed(found, "re-initialised blocks", context_told=0.9), "re-initialised blocks", 0.0, -0.1)
    found.save(run.path / "falsify")
    with pytest.raises(ValueError, match=r"controls.json' does not belong to this run: it is of another subnetwork"):
        page(run)
    replace(found, of=RunFolder(run.path).origin()).save(run.path / "falsify")
    told = page(run)
    assert "But it is REFUTED by its own controls (1 of the checks below failed)." in told
    assert "Yes: with untrained layers it recovers 90% of what the context tells" in told
    assert "Untrained blocks can be masked to do as well" in told
    assert "The ceiling, without a penalty on kept weights: on the trained model, " in told
    assert "KL by size: trained and untrained weights" in told
    assert "The gap at equal size" in told
    assert "Not attempted" not in told


def test_seeds_that_share_no_more_than_chance_refute(tried):
    result = tried[0]
    assert "other seeds" not in result.refuted
    seeds = result.seeds
    logs = seeds.values.copy()
    logs[[one.name for one in seeds.quantities].index("log10_p"), seeds.names.index("seed 1, seed 2: all")] = -0.1
    by_chance = Falsification(result.controls, replace(seeds, values=logs), result.spread)
    assert by_chance.refuted[-1] == "other seeds"
    assert "accident of the seed" in by_chance.says[-1]


def test_a_seed_that_keeps_nothing_is_told(tiny_model):
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    overlaps = overlaps_of({"found": some, "seed 1": bc.Subnetwork.empty(tiny_model)})
    assert overlaps.names == ()
    assert overlaps.notes["kept_nothing"] == ["seed 1"]
    assert overlaps_of({"found": some, "seed 1": some}).get("jaccard")["found, seed 1: all"] == 1


def test_default_sizes_are_half_once_and_twice_of_what_the_recipe_can_drop(tiny_model):
    full, first = bc.Subnetwork.full(tiny_model), replace(RECIPE, layers=(0,))
    n = full.total
    assert _sizes_kept(tiny_model, RECIPE, full, None) == [n // 2, n]  # there are not twice as many
    assert _sizes_kept(tiny_model, first, full, None) == [n // 2 + n // 4, n]  # layer 1 stays whole
    some = full.drop_layer(1)
    assert _sizes_kept(tiny_model, RECIPE, some, None) == [some.kept // 2, some.kept, 2 * some.kept]
    assert _sizes_kept(tiny_model, RECIPE, some, [0.2]) == sorted([round(0.2 * n), some.kept])


def test_bad_input(tiny_model):
    full = bc.Subnetwork.full(tiny_model)
    with pytest.raises(ValueError, match="at least 2 other seeds, not 1"):
        falsify(tiny_model, TARGET, CORPUS, RECIPE, found=full, seeds=1)
    for sizes in ([0.0, 0.5], [1.5], [-0.1], [float("nan")], [1e-9]):
        with pytest.raises(ValueError, match="sizes must be shares of the weights, above 0 and at most 1, not"):
            falsify(tiny_model, TARGET, CORPUS, RECIPE, found=full, sizes=sizes)
    with pytest.raises(ValueError, match="sizes must differ, not"):
        falsify(tiny_model, TARGET, CORPUS, RECIPE, found=full, sizes=[0.5, 0.1, 0.5])
    with pytest.raises(ValueError, match=r"above 0.5 and at most 1, not \[0.2\]"):
        falsify(tiny_model, TARGET, CORPUS, replace(RECIPE, layers=(0,)), found=full, sizes=[0.2])
    with pytest.raises(ValueError, match="the subnetwork keeps 0 weights, none of those that the recipe can drop"):
        falsify(tiny_model, TARGET, CORPUS, RECIPE, found=bc.Subnetwork.empty(tiny_model))
    with pytest.raises(ValueError, match="needs the methods"):
        falsify(tiny_model, 3, CORPUS, RECIPE, found=full)
