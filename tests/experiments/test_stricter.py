"""The stricter tests together: what is made, kept and made again, what is left out, and what it does to a verdict."""

from dataclasses import replace

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits.experiments import stricter
from bigram_circuits.experiments.verdicts import judge_functions, judge_worst_case
from bigram_circuits.experiments.worst_case import AGAINST, judged_steps, worst_case_left
from bigram_circuits.text.corpus import spread
from tests.conftest import D_VOCAB

pytestmark = pytest.mark.usefixtures("one_thread", "no_forecast")
TEXT = np.random.default_rng(0).integers(0, 12, (20, 12))
CORPUS = bc.Corpus.from_tokens(TEXT[:12], TEXT[12:])
RECIPE = bc.SparsifyConfig(max_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def tried(tiny_model, tmp_path_factory):
    """All tests of half of a tiny model's weights, for its own predictions."""
    target, run = bc.ModelTarget(tiny_model), tmp_path_factory.mktemp("stricter") / "run"
    found = bc.Subnetwork.full(tiny_model).drop_layer(1).random_like(seed=0)
    others = {"seed-1": found, "seed-2": ~found, "seed-3": bc.Subnetwork.empty(tiny_model)}
    given = {"found": found, "others": others, "rivals": 1, "budgets": (0, 2), "starts": 1, "most_tokens": 48}
    given["run_dir"] = run / stricter.FOLDER
    return bc.stricter_tests(tiny_model, target, CORPUS, RECIPE, **given), given, target


def test_each_test_is_the_one_that_its_function_makes(tried, tiny_model):
    result, given, target = tried
    worst = bc.worst_case_ablation(tiny_model, given["found"], target, CORPUS, (0, 2), 1)
    np.testing.assert_array_equal(result.worst_case.values, worst.values)
    assert result.rivals.masks[0] == given["found"]
    assert len(result.rivals.masks) == 2
    text = spread(CORPUS.held_out, 48)
    assert text.shape == (4, 12)
    other = bc.same_function(tiny_model, given["found"], given["others"]["seed-2"], target, text)
    np.testing.assert_array_equal(result.same["seed-2"].behaviour.values, other.behaviour.values)
    assert result.same["seed-1"].verdict == "same weights"
    assert result.left_out == {"seed-3": "it keeps no weights"}
    is_rival = bool(result.rivals.rivals)
    assert set(result.same) == {"seed-1", "seed-2"} | ({"rival-1"} if is_rival else set())


def test_what_was_made_is_not_made_again(tried, tiny_model, monkeypatch):
    result, given, target = tried
    read = bc.load_stricter(given["run_dir"])
    assert str(read) == str(result)
    monkeypatch.setattr(stricter, "worst_case_ablation", lambda *_: pytest.fail("it ascended again"))
    monkeypatch.setattr("bigram_circuits.learning.training._attempt", lambda *_: pytest.fail("it learned again"))
    monkeypatch.setattr(stricter, "same_function", lambda *_: result.same["seed-1"])
    again = bc.stricter_tests(tiny_model, target, CORPUS, RECIPE, **given)
    np.testing.assert_array_equal(again.worst_case.values, result.worst_case.values)
    with pytest.raises(pytest.fail.Exception, match="it ascended again"):
        bc.stricter_tests(tiny_model, target, CORPUS, RECIPE, **{**given, "budgets": (0, 3)})


def test_what_says_nothing_is_left_out_with_the_reason(tiny_model):
    full, target = bc.Subnetwork.full(tiny_model), bc.ModelTarget(tiny_model)
    result = bc.stricter_tests(tiny_model, target, CORPUS, replace(RECIPE, polish=1), found=full)
    assert (result.worst_case, result.rivals, result.same) == (None, None, {})
    n = full.total
    assert result.left_out["worst_case"] == f"the mask keeps all {n:,} weights: there is nothing to open"
    assert "polishes" in result.left_out["rivals"]
    assert result.says[0].startswith("Left out: worst case: the mask keeps all")
    assert result
    assert not bc.StricterTests()


def with_left(curves, left):
    """The curves of a mask of whose information a share is left after the last step."""
    values = curves.values.copy()
    values[0] = [[0.5, 0.5 * left]] * len(curves.conditions)
    return replace(curves, values=values)


def test_any_folder_may_be_given(tried, tiny_model, tmp_path, monkeypatch):
    """Also one that is named relative to here, and in no run."""
    _, given, target = tried
    monkeypatch.chdir(tmp_path)
    changed = given | {"run_dir": "harder", "rivals": 0, "others": {}, "budgets": (0, 1)}
    made = bc.stricter_tests(tiny_model, target, CORPUS, RECIPE, **changed)
    assert bc.load_stricter("harder").says == made.says


@pytest.mark.parametrize(("left", "finding"), [(0.95, "stands"), (0.7, "weakened"), (0.1, "weakened")])
def test_a_mask_that_loses_in_the_worst_case_is_weakened(tried, left, finding):
    curves = with_left(tried[0].worst_case, left)
    assert worst_case_left(curves)[judged_steps(curves)] == pytest.approx(left)
    assert judge_worst_case(curves).finding == finding
    for note, said in (({"forced": True}, "so this says nothing"), ({AGAINST: "model"}, "the full model's own")):
        noted = replace(curves, notes={**curves.notes, **note})
        assert judge_worst_case(noted) is None
        assert said in bc.StricterTests(noted).says[0]


def test_rivals_and_other_functions_weaken(tried):
    result = tried[0]
    assert judge_functions({"a-run": result.same["seed-1"]}) is None
    same = judge_functions({"seed-1": result.same["seed-1"]})
    assert (same.finding, same.says[:57]) == ("stands", "Of 1 other seed, none compute another function (least agr")
    other = judge_functions(result.same)
    assert other.finding == "weakened"
    assert "Of 2 other seeds, 1 computes another function" in other.says
    measured = result.rivals.measured
    at = measured.quantities.index(measured.quantity("most_jaccard"))
    values = measured.values.copy()
    values[at, 1] = 0.1
    for recovered, finding in ((0.99, "weakened"), (0.5, "stands")):
        ends = np.full_like(values, recovered)
        rivals = replace(result.rivals, measured=replace(measured, values=values, low=ends, high=ends))
        (judged,) = bc.StricterTests(rivals=rivals).judged
        assert judged.finding == finding
        assert ("and so is something else" in judged.says) == (finding == "weakened")


def test_bad_input(tiny_model):
    args = tiny_model, bc.ModelTarget(tiny_model), CORPUS, RECIPE
    full = bc.Subnetwork.full(tiny_model)
    with pytest.raises(ValueError, match="rivals must be a number of masks, 0 or more, not -1"):
        bc.stricter_tests(*args, found=full, rivals=-1)
    with pytest.raises(ValueError, match=r"budgets must contain 0, the mask itself, and another .*, not \(4,\)"):
        bc.stricter_tests(*args, found=full, budgets=(4,))
    with pytest.raises(ValueError, match="is no subnetwork"):
        bc.stricter_tests(*args, found=3)


def test_learning_for_the_worst_case_is_warned_of_where_the_model_does_something_else(tiny_model):
    bigram = bc.count_ngrams(CORPUS.train, 2, d_vocab=D_VOCAB)
    robust = replace(RECIPE, worst_case=1)

    def said(target, recipe):
        return [one for one in bc.check_inputs(tiny_model, target, CORPUS, recipe).warnings if "--worst-case" in one]

    (line,) = said(bigram, robust)
    kl = bc.evaluate(tiny_model, bc.Subnetwork.full(tiny_model), bigram, CORPUS.held_out, controls=False).subnetwork.kl
    assert f"its KL is {kl:.2f} nats" in line
    assert said(bigram, RECIPE) == said(bc.ModelTarget(tiny_model), robust) == []
    assert said(bc.NextTokenTarget(), robust) == []
    with pytest.raises(ValueError, match="which undoes what worst_case learns"):
        replace(robust, polish=1)
