"""Attempts to refute a finding: what a control is, and that it refutes what it should and nothing else."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.experiments.falsification import (
    Falsification,
    RenamedTarget,
    falsify,
    kl_of_best_constant,
    load_falsification,
    with_random_blocks,
)
from bigram_circuits.report.page import page
from bigram_circuits.runs import RunFolder
from bigram_circuits.storage.files import checked_json, read_checked_json, write_text
from tests.conftest import D_VOCAB
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


# --- the whole ---


@pytest.fixture(scope="module")
def tried(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("falsify")
    found = bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE).subnetwork
    return falsify(tiny_model, TARGET, CORPUS, RECIPE, found=found, seeds=2, run_dir=folder), folder, found


def test_every_attempt_is_a_run_and_is_measured(tried, tiny_model):
    result, folder, found = tried
    names = ("found", "re-initialised blocks", "nonsense target", "seed 1", "seed 2")
    assert result.controls.names == names
    for name in names[1:]:
        assert bc.load_run(folder / name.replace(" ", "-")).subnetwork.total == found.total
    own = bc.evaluate(tiny_model, found, TARGET, CORPUS.held_out, controls=False).subnetwork
    assert result.controls.get("kl")["found"] == own.kl
    seed = bc.load_run(folder / "seed-2").subnetwork
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


def test_what_was_done_is_not_done_again(tried, tiny_model, monkeypatch):
    result, folder, found = tried
    monkeypatch.setattr("bigram_circuits.learning.training._attempt", lambda *_: pytest.fail("it learned again"))
    again = falsify(tiny_model, TARGET, CORPUS, RECIPE, found=found, seeds=2, run_dir=folder)
    np.testing.assert_array_equal(again.controls.values, result.controls.values)
    read = load_falsification(folder)
    assert read is not None
    assert str(read) == str(result)
    assert load_falsification(folder / "nowhere") is None


def test_runs_under_the_former_name_are_taken_up(tried, tiny_model, tmp_path, monkeypatch):
    result, folder, found = tried
    shutil.copytree(folder, tmp_path / "old")
    run = (tmp_path / "old" / "re-initialised-blocks").rename(tmp_path / "old" / "blocks-initialised-anew")
    config = read_checked_json(run / "config.json")
    name = config["settings"]["model"]["name"]
    config["settings"]["model"]["name"] = name.replace("re-initialised blocks", "its blocks initialised anew")
    write_text(run / "config.json", checked_json(config | {"format": "bigram_circuits.run/1", "signature": None}))
    training = read_checked_json(run / "training.json")
    del training["of"]
    write_text(run / "training.json", checked_json(training))
    monkeypatch.setattr("bigram_circuits.learning.training._attempt", lambda *_: pytest.fail("it learned again"))
    again = falsify(tiny_model, TARGET, CORPUS, RECIPE, found=found, seeds=2, run_dir=tmp_path / "old")
    assert str(again) == str(result)
    names = tuple(name.replace("re-initialised blocks", "blocks initialised anew") for name in again.controls.names)
    replace(again.controls, names=names).save(tmp_path / "old" / "controls.json")
    assert str(load_falsification(tmp_path / "old")) == str(result)


def changed(result, name, **values):
    """A result with other numbers for one attempt."""
    controls = result.controls
    numbers = controls.values.copy()
    for key, value in values.items():
        numbers[[one.name for one in controls.quantities].index(key), controls.names.index(name)] = value
    return replace(result, controls=replace(controls, values=numbers))


def test_a_control_that_does_as_well_with_as_few_weights_refutes(tried):
    result = changed(tried[0], "found", context_told=0.9, fraction=0.02, cross_entropy=2.0)
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
    name = "nonsense target"
    result = changed(changed(tried[0], "found", context_told=-0.2, fraction=0.02), name, fraction=0.02)
    assert name in changed(result, name, context_told=0.5).refuted
    assert name in changed(result, name, context_told=-0.2).refuted
    assert name not in changed(result, name, context_told=-0.3).verdict


def test_a_target_without_a_context_is_judged_by_its_cross_entropy(tiny_model):
    unigram = bc.count_ngrams(TEXT[:16], 1, d_vocab=D_VOCAB)
    assert abs(kl_of_best_constant(unigram, CORPUS.held_out)) < 1e-4
    full = bc.Subnetwork.full(tiny_model)
    result = falsify(tiny_model, unigram, CORPUS, RECIPE, found=full, seeds=2)
    assert np.isnan(list(result.controls.get("context_told").values())).all()
    assert "reaches a cross-entropy of" in result.says[0]


def test_the_page_tells_what_refutes_it(tried, tmp_path):
    run = make_run(tmp_path / "run", metrics=measured())
    assert "Not attempted" in page(run)
    found = changed(tried[0], "found", context_told=0.9, fraction=0.5)
    found = changed(found, "re-initialised blocks", context_told=0.9, fraction=0.5)
    found.save(run.path / "falsify")
    with pytest.raises(ValueError, match=r"controls.json' does not belong to this run: it is of another subnetwork"):
        page(run)
    replace(found, of=RunFolder(run.path).origin()).save(run.path / "falsify")
    told = page(run)
    assert "REFUTED by its own controls: re-initialised blocks" in told
    assert "Untrained blocks can be masked to do as well" in told
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
    from bigram_circuits.experiments.falsification import _overlaps

    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    overlaps = _overlaps({"found": some, "seed 1": bc.Subnetwork.empty(tiny_model)})
    assert overlaps.names == ()
    assert overlaps.notes["kept_nothing"] == ["seed 1"]
    assert _overlaps({"found": some, "seed 1": some}).get("jaccard")["found, seed 1: all"] == 1


def test_bad_input(tiny_model):
    full = bc.Subnetwork.full(tiny_model)
    with pytest.raises(ValueError, match="at least 2 other seeds, not 1"):
        falsify(tiny_model, TARGET, CORPUS, RECIPE, found=full, seeds=1)
    with pytest.raises(ValueError, match="needs the methods"):
        falsify(tiny_model, 3, CORPUS, RECIPE, found=full)
