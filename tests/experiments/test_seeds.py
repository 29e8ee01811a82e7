"""One recipe with several seeds: every number against NumPy on the runs of the seeds, and folders that go on."""

import itertools
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.experiments import seeds as module
from bigram_circuits.experiments.seeds import kept_by
from bigram_circuits.learning.training import identity_of
from bigram_circuits.recipe import Inputs
from bigram_circuits.report import comparison as comparison_page
from bigram_circuits.report.outcome import command_line
from bigram_circuits.report.page import opening, page
from bigram_circuits.runs import RunFolder
from tests.conftest import D_VOCAB

TEXT = np.random.default_rng(0).integers(0, 12, (24, 16))
CORPUS = bc.Corpus.from_tokens(TEXT[:16], TEXT[16:])
TARGET = bc.count_ngrams(TEXT[:16], 2, d_vocab=D_VOCAB)
RECIPE = bc.SparsifyConfig(max_steps=12, batch_size=4, learning_rate=0.1, beta_growth=1.5, seed=3)
HOW = {"seeds": 3, "random_seeds": 2, "check_memory": "off"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds") / "run"
    bc.over_seeds(tiny_model, TARGET, CORPUS, RECIPE, run_dir=folder, **HOW)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return [bc.load_run(folder / "seeds" / f"seed-{seed}") for seed in (3, 4, 5)]


@pytest.fixture(scope="module")
def found(folder):
    return bc.load_seeds(folder, bc.load_run(folder))


def copied(folder, to):
    return shutil.copytree(folder, to / "run")


def masks_of(run):
    return np.concatenate([run.subnetwork[name].numpy().ravel() for name in run.subnetwork])


# --- the numbers ---


def test_every_number_is_that_of_the_seeds_own_run(found, runs):
    assert found.runs.names == ("seed 3", "seed 4", "seed 5")
    for run, column in zip(runs, found.runs.values.T, strict=True):
        row = dict(zip((one.name for one in found.runs.quantities), column, strict=True))
        measured = run.metrics
        for name in ("surprisal_correlation", "kl", "cross_entropy", "mean_surprisal", "top1_agreement", "kept"):
            assert row[name] == pytest.approx(measured["subnetwork"][name], abs=1e-12)
        loss = {name: measured[name]["mean_surprisal"] for name in ("full", "complement")}
        assert row["rise_without"] == pytest.approx(loss["complement"] - loss["full"])
        drawn = [one["mean_surprisal"] for one in measured["full_minus_random"]["seeds"]]
        assert row["rise_without_random"] == pytest.approx(np.mean(drawn) - loss["full"])
        drawn = measured["random"]["seeds"]
        assert row["r_of_random"] == pytest.approx(np.mean([one["surprisal_correlation"] for one in drawn]))
        assert row["cross_entropy_of_random"] == pytest.approx(np.mean([one["cross_entropy"] for one in drawn]))
        assert np.isnan(row["recovered"])  # the full model is worse than the empty one
        probs = TARGET.log_probs(torch.from_numpy(CORPUS.held_out)).exp().double().numpy()
        mean = probs.mean((0, 1))
        terms = np.where(probs > 0, probs * (np.log(np.where(probs > 0, probs, 1)) - np.log(mean + (mean == 0))), 0)
        assert row["context_told"] == pytest.approx(1 - row["kl"] / terms.sum(-1).mean(), rel=1e-4)


def test_intervals_are_those_of_a_bootstrap_over_sequences(found, runs, tiny_model):
    """Resampled by index, not by counts, so they agree as far as 1,000 resamples do."""
    run = runs[1]
    assert (found.runs.low[2, 1], found.runs.high[2, 1]) == pytest.approx(run.evaluation.interval("subnetwork"))
    losses = {}
    for name, mask in (("full", ~run.subnetwork.constant(False)), ("complement", ~run.subnetwork)):
        each = [bc.evaluate(tiny_model, mask, TARGET, one[None], controls=False) for one in CORPUS.held_out]
        losses[name] = np.array([one.subnetwork.mean_surprisal for one in each])
    rng = np.random.default_rng(1)
    difference = losses["complement"] - losses["full"]
    draws = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(4000)]
    at = found.runs.quantities.index(found.runs.quantity("rise_without")), 1
    low, high = np.quantile(draws, [0.025, 0.975])
    width = high - low
    assert found.runs.low[at] == pytest.approx(low, abs=0.1 * width)
    assert found.runs.high[at] == pytest.approx(high, abs=0.1 * width)


def test_the_spread_is_numpys(found, runs):
    r = np.array([run.evaluation.subnetwork.surprisal_correlation for run in runs])
    rise = np.array([run.evaluation.necessity[0] for run in runs])
    for name, values in (("surprisal_correlation", r), ("rise_without", rise)):
        wanted = [values.mean(), np.sqrt(((values - values.mean()) ** 2).sum() / 2), values.min(), values.max()]
        assert [found.spread.get(key)[name] for key in ("mean", "sd", "lowest", "highest")] == pytest.approx(wanted)
        assert found.range(name) == pytest.approx((values.min(), values.max()))


def test_the_core_is_what_all_keep_and_is_measured_alone(found, runs, tiny_model):
    every = np.stack([masks_of(run) for run in runs])
    core = np.concatenate([found.core[name].numpy().ravel() for name in found.core])
    assert (core == every.all(0)).all()
    alone = bc.evaluate(tiny_model, found.core, TARGET, CORPUS.held_out, seeds=2)
    assert found.alone.get("kl")["core"] == pytest.approx(alone.subnetwork.kl)
    assert found.alone.get("rise_without")["core"] == pytest.approx(alone.necessity[0])
    times = Counter(every.sum(0).tolist())
    assert found.kept_by.get("found") == {str(j): times[j] for j in range(4)}
    both = found.overlaps.get("intersection")["seed 3, seed 4: all"]
    assert both == (every[0] & every[1]).sum()


def test_the_representative_is_the_median(found, runs, folder):
    losses = {seed: run.evaluation.subnetwork.cross_entropy for seed, run in zip((3, 4, 5), runs, strict=True)}
    assert losses[found.representative] == np.median(list(losses.values()))
    run = bc.load_run(folder)
    assert run.settings.recipe.seed == found.representative
    own = folder / "seeds" / f"seed-{found.representative}"
    for name in ("config.json", "progress.jsonl", "training.json", "subnetwork.safetensors", "metrics.json"):
        assert (folder / name).read_bytes() == (own / name).read_bytes()
    assert found.why in str(found)


def test_what_chance_gives_is_the_sum_over_all_cases():
    """Every matrix, every subset of seeds: the units expected to be kept by exactly these."""
    shapes = {"blocks.0.attn.W_Q": (1, 4, 2), "blocks.0.attn.W_O": (1, 2, 4), "blocks.0.mlp.W_in": (4, 5)}
    rng = np.random.default_rng(0)
    masks = [
        bc.Subnetwork({name: torch.from_numpy(rng.random(shape) < share) for name, shape in shapes.items()})
        for share in (0.1, 0.5, 0.9, 0.3)
    ]
    expected = np.zeros(5)
    for name in shapes:
        sizes = [int(one[name].sum()) for one in masks]
        n = masks[0][name].numel()
        for chosen in itertools.product((0, 1), repeat=4):
            chance = np.prod([k / n if yes else 1 - k / n for k, yes in zip(sizes, chosen, strict=True)])
            expected[sum(chosen)] += n * chance
    told = kept_by(masks)
    assert list(told.get("expected").values()) == pytest.approx(expected.tolist())
    draws = np.zeros(5)
    for draw in range(100):
        again = [one.random_like(seed=1000 * draw + place) for place, one in enumerate(masks)]
        draws += list(kept_by(again).get("found").values())
    assert draws / 100 == pytest.approx(expected, abs=0.9)
    assert draws.sum() / 100 == masks[0].total


# --- folders ---


def test_it_is_read_back_as_it_was_measured_also_from_another_place(found, folder, tmp_path, tiny_model):
    moved = copied(folder, tmp_path)
    again = bc.load_seeds(moved, bc.load_run(moved))
    assert str(again) == str(found)
    assert again.core == found.core
    assert again.masks == found.masks
    assert again.of == found.of
    nothing = replace(RECIPE, max_steps=1)
    with pytest.raises(ValueError, match="holds another run"):
        bc.over_seeds(tiny_model, TARGET, CORPUS, nothing, run_dir=moved, **HOW)
    done = bc.over_seeds(tiny_model, TARGET, CORPUS, RECIPE, run_dir=moved, callbacks=[Never()], **HOW)
    assert str(done) == str(found)


def interrupted(*_):
    raise KeyboardInterrupt


class Never(bc.Callback):
    def on_step(self, record):
        pytest.fail("it was learned again")


class Stop(bc.Callback):
    """Interrupts the second seed half way."""

    steps = 0

    def on_step(self, record):
        self.steps += 1
        if self.steps == RECIPE.max_steps + 5:
            raise KeyboardInterrupt


def test_an_interrupted_call_goes_on_and_finds_the_same(found, folder, tiny_model, tmp_path, monkeypatch):
    place = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        bc.over_seeds(tiny_model, TARGET, CORPUS, RECIPE, run_dir=place, callbacks=[Stop()], **HOW)
    assert {one.name for one in place.iterdir() if one.name[0] != "."} == {"seeds"}
    assert bc.load_seeds(place) is None
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE, run_dir=place)
    (place / "seeds" / "mine.txt").write_text("mine")
    with monkeypatch.context() as patch:  # killed between the results and the copy
        patch.setattr(RunFolder, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bc.over_seeds(tiny_model, TARGET, CORPUS, RECIPE, run_dir=place, **HOW)
    assert not (place / "config.json").exists()
    bc.over_seeds(tiny_model, TARGET, CORPUS, RECIPE, run_dir=place, callbacks=[Never()], **HOW)
    again = bc.load_seeds(place, bc.load_run(place))
    assert again.masks == found.masks
    assert str(again) == str(found)
    assert (place / "seeds" / "mine.txt").read_text() == "mine"


def test_another_number_of_controls_is_measured_and_nothing_learned(folder, tmp_path, tiny_model):
    moved = copied(folder, tmp_path)
    how = HOW | {"random_seeds": 1}
    bc.over_seeds(tiny_model, TARGET, CORPUS, RECIPE, run_dir=moved, callbacks=[Never()], **how)
    assert len(bc.load_run(moved).evaluation.random) == 1
    assert bc.load_seeds(moved, bc.load_run(moved)) is not None


def test_starting_over_removes_what_was_measured(folder, tmp_path, tiny_model):
    moved = copied(folder, tmp_path)
    (moved / "mine.txt").write_text("mine")
    (moved / "report.html").write_text("old")
    learned = []

    class Count(bc.Callback):
        def on_end(self, found):
            learned.append(found)

    how = HOW | {"seeds": 2}
    with pytest.raises(ValueError, match="is of seeds 3 to 5, not 3 to 4: choose another folder"):
        bc.over_seeds(tiny_model, TARGET, CORPUS, RECIPE, run_dir=moved, **how)
    again = bc.over_seeds(
        tiny_model, TARGET, CORPUS, RECIPE, run_dir=moved, resume=False, callbacks=[Count()], **how
    )  # fmt: skip
    assert len(learned) == 2
    assert not (moved / "report.html").exists()
    assert (moved / "mine.txt").read_text() == "mine"
    losses = again.runs.get("cross_entropy")
    assert losses[f"seed {again.representative}"] == min(losses.values())  # the lower of two
    assert "the lower of the two middle ones" in again.why


def test_what_does_not_belong_is_refused(folder, tmp_path, tiny_model):
    moved = copied(folder, tmp_path)
    run, other = bc.load_run(moved), moved / "seeds" / "seed-4"
    (moved / "seeds" / "runs.json").write_text((moved / "seeds" / "spread.json").read_text())
    with pytest.raises(ValueError, match="is damaged"):
        bc.load_seeds(moved)
    shutil.copy(folder / "seeds" / "runs.json", moved / "seeds" / "runs.json")
    shutil.copy(moved / "seeds" / "seed-3" / "subnetwork.safetensors", other / "subnetwork.safetensors")
    with pytest.raises(ValueError, match="holds other masks than those that were measured; `find` with the same"):
        bc.load_seeds(moved)
    with pytest.raises(ValueError, match="does not belong to this run"):
        bc.load_seeds(folder, replace(run, id="another"))
    one = tmp_path / "one"
    bc.find_subnetwork(tiny_model, TARGET, CORPUS, RECIPE, run_dir=one)
    with pytest.raises(ValueError, match="holds the run of one seed, not of 3: choose another folder"):
        bc.over_seeds(tiny_model, TARGET, CORPUS, RECIPE, run_dir=one, **HOW)
    shutil.rmtree(other)
    (moved / "elsewhere").mkdir()
    other.symlink_to(moved / "elsewhere")
    with pytest.raises(ValueError, match="is a symbolic link"):
        bc.load_seeds(moved)


# --- pages ---


def test_the_page_says_the_spread_of_every_headline_number(found, folder):
    run = bc.load_run(folder)
    marks = {mark.what: mark.spread for mark in opening(run).marks}
    low, high = found.range("surprisal_correlation")
    ends = run.evaluation.interval("subnetwork")
    agreement = f"over 3 seeds {low:.3f} to {high:.3f}; over text {ends[0]:.3f} to {ends[1]:.3f}"
    assert marks["agreement (1 is perfect)"] == agreement
    low, high = found.range("rise_without")
    assert marks["rise in loss without them"].startswith(f"over 3 seeds {low:+.3f} to {high:+.3f}; over text ")
    low, high = found.range("r_of_random")
    assert marks["agreement of random weights"].startswith(f"over 3 seeds {low:.3f} to {high:.3f}; over text ")
    low, high = found.range("fraction")
    assert marks[f"of the weights kept ({run.mask.kept})"] == f"over 3 seeds {100 * low:.2f}% to {100 * high:.2f}%"
    told = page(run)
    for number in (found.core.kept, found.kept_by.get("expected")["2"], found.alone.get("kl")["core"]):
        assert f"{number:,}" in told or f"{number:,.1f}" in told or f"{number:.3f}" in told
    check = next(one for one in opening(run).checks if one.asked == "Do other seeds find the same weights?")
    shares = [found.overlaps.get("jaccard")[f"{pair}: all"] for pair in found.overlaps.notes["pairs"]]
    assert check.key == "seeds"
    assert f"{100 * min(shares):.0f}% to {100 * max(shares):.0f}%" in check.says
    named = replace(run, rebuild=Inputs())
    assert "--seed 3 --seeds 3" in command_line(named, found)
    moved = replace(run, evaluated_on=replace(run.settings.corpus, fingerprint="another"))
    assert "seeds" not in opening(moved).marks[1].spread  # they were measured on another text


def test_a_comparison_uses_the_seeds_that_are_there(found, folder, runs, tiny_model, tmp_path):
    recipe = replace(RECIPE, sparsity_weight=0.0)
    for seed in (3, 4):
        place = tmp_path / f"free-{seed}"
        bc.find_subnetwork(tiny_model, TARGET, CORPUS, replace(recipe, seed=seed), run_dir=place)
        run = RunFolder(place)
        text = bc.evaluate(tiny_model, bc.load_run(place), TARGET, CORPUS.held_out, seeds=1)
        run.write_evaluation(text, identity_of(CORPUS))
    compared = bc.compare([folder, tmp_path / "free-3", tmp_path / "free-4"])
    own, free = compared.repetitions
    assert (own.members, own.seeds) == (("run",), 3)
    assert (free.members, free.seeds) == (("free-3", "free-4"), 2)
    assert own.spreads["kl"].deviation == np.std([run.evaluation.subnetwork.kl for run in runs], ddof=1)
    both = [bc.load_run(tmp_path / f"free-{seed}") for seed in (3, 4)]
    assert free.spreads["rise_without"].mean == pytest.approx(np.mean([one.evaluation.necessity[0] for one in both]))
    shared = (masks_of(both[0]) & masks_of(both[1])).sum() / (masks_of(both[0]) | masks_of(both[1])).sum()
    assert free.pairs("jaccard") == pytest.approx([shared])
    told = comparison_page.page(compared)
    assert f"{own.spreads['kl'].low:.3f} to {own.spreads['kl'].high:.3f}" in told
    check = next(one for one in comparison_page.opening(compared).checks if "other seeds" in one.asked)
    lowest, highest = own.spreads["surprisal_correlation"].low, own.spreads["surprisal_correlation"].high
    assert f"run {lowest:.3f} to {highest:.3f} and free-3 and 1 of other seeds" in check.says
    again = bc.compare({f"seed {place}": run for place, run in enumerate(runs)})
    assert [one.seeds for one in again.repetitions] == [3]
    assert again.repetitions[0].spreads == own.spreads


# --- odd ones ---


def test_seeds_that_keep_nothing_are_said_to(tiny_model):
    recipe = replace(RECIPE, sparsity_weight=1e6)
    found = bc.over_seeds(tiny_model, TARGET, CORPUS, recipe, **HOW | {"seeds": 2})
    assert found.core.kept == 0
    assert found.judged.finding == "refuted"
    assert "seeds that keep nothing: seed 3, seed 4" in str(found)
    assert found.kept_by.get("found")["0"] == found.core.total


def test_nodes_have_seeds_too(tiny_model):
    recipe = bc.SparsifyConfig(max_steps=2, batch_size=4, units="head", target_fraction=0.5, method="straight_through")
    found = bc.over_seeds(tiny_model, TARGET, CORPUS, recipe, **HOW | {"seeds": 2})
    a, b = (set(one.nodes) for one in found.masks.values())
    assert set(found.core.nodes) == a & b
    assert "nodes kept" in str(found).lower()
    assert module.CORE in str(found)


@pytest.mark.parametrize("seeds", [1, 0, True])
def test_a_spread_needs_two_seeds(tiny_model, seeds):
    with pytest.raises(ValueError, match="a spread needs at least 2 seeds, not"):
        bc.over_seeds(tiny_model, TARGET, CORPUS, RECIPE, seeds=seeds)
