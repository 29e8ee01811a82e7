"""Whether a run was too short, told from the records of its steps."""

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits.evaluation import SoftHardGap
from bigram_circuits.report.page import page
from bigram_circuits.runs import Outcome, StepRecord, cautions, why_stopped
from bigram_circuits.runs.ending import lost_in_hardening, too_short
from tests.example_runs import make_run, measured


def history(losses, *, undecided=0.0, fraction=0.05):
    """Records of steps with these cross-entropies; as much undecided, and kept, at every step."""
    return [StepRecord(0, step, float(loss), fraction, undecided) for step, loss in enumerate(losses)]


def noisy(losses, seed=0):
    return np.asarray(losses) + np.random.default_rng(seed).normal(0, 0.02, len(losses))


FLAT = noisy(np.full(200, 3.0))
DECIDED = Outcome("decided", 1.0, soft_hard=SoftHardGap(3.0, 3.01))


def test_a_run_that_ended_where_it_had_long_been_says_nothing():
    assert cautions(history(FLAT), DECIDED, bc.SparsifyConfig()) == ()
    assert (
        cautions(history(noisy(3 + 2 * 0.95 ** np.arange(200))), DECIDED, bc.SparsifyConfig()) == ()
    )  # as a good run falls
    assert (
        cautions(history(noisy(np.linspace(2.5, 3.2, 200))), Outcome("decided"), bc.SparsifyConfig()) == ()
    )  # and as a penalised one rises
    rough = np.random.default_rng(1).normal(3.0, 0.5, 200)  # batches that differ much
    assert too_short(history(rough), DECIDED, 400) is None


def test_a_cross_entropy_that_still_falls():
    falls = noisy(np.linspace(6, 4, 200))
    fall = falls[160:180].mean() - falls[180:].mean()
    assert too_short(history(falls), DECIDED, 400) == (
        f"the run was too short for its model: the cross-entropy was still falling, by {fall:.2f} nats in the last 40 "
        "steps; try more steps (--max-steps, here 400; or --effort thorough)"
    )
    assert "in the last 20 steps" in too_short(history(falls[::5]), DECIDED, 80)  # at least 10 steps are averaged
    assert "in the last 16 steps" in too_short(history(falls[:160:10]), DECIDED, 40)
    assert too_short(history(falls[:3]), DECIDED, 3) is None


@pytest.mark.parametrize(("stopped", "undecided", "said"), [
    ("max_steps", 0.02, True), ("max_steps", 0.004, False), ("decided", 0.02, False),
])  # fmt: skip
def test_gates_that_are_undecided_when_there_are_no_more_steps(stopped, undecided, said):
    found = too_short(history(FLAT, undecided=undecided), Outcome(stopped), 200)
    assert (found is not None) == said
    if said:
        assert "it ended with 2.00% of the gates undecided; try more steps (--max-steps, here 200; or " in found


def test_why_learning_stopped_says_from_when_gates_were_hard(tmp_path):
    hard = bc.SparsifyConfig(max_steps=4000, hard_from=0.3)
    said = "its planned steps were done, with hard gates from step 1,200 on"
    assert why_stopped(Outcome("planned"), hard) == said
    assert why_stopped(Outcome("decided"), hard) == "nearly all gates were decided"
    assert why_stopped(Outcome("planned"), bc.SparsifyConfig()) == "its planned steps were done"  # straight-through
    run = make_run(tmp_path / "run", metrics=measured(), recipe=hard, stopped="planned")
    assert f"Stopped after 2 steps: {said}." in run._repr_html_()
    assert f"learning stopped because {said}." in page(run)


def test_what_hardening_lost_is_told_with_the_best_soft_gates():
    rising = history(noisy(3 + np.abs(np.linspace(-1, 0.3, 200))), undecided=0.4)
    lost = Outcome("decided", soft_hard=SoftHardGap(3.3, 3.31))
    means = [np.mean([record.cross_entropy for record in rising[at : at + 10]]) for at in range(191)]
    said = lost_in_hardening(rising, lost)
    assert said.startswith(
        f"hardening cost {3.31 - min(means):.2f} nats: the mask's cross-entropy is 3.31, that of the "
    )
    assert f"was {min(means):.2f} around step {int(np.argmin(means)) + 9}, with 40.0% of them undecided" in said
    assert cautions(rising, lost, bc.SparsifyConfig()) == (said,)
    assert cautions(rising, lost, bc.SparsifyConfig(hard_from=0.3)) == ()  # soft gates were not what was learned
    assert lost_in_hardening(history(FLAT), DECIDED) is None
    assert lost_in_hardening(rising, Outcome("decided")) is None
    sudden = Outcome("decided", soft_hard=SoftHardGap(3.0, 3.5))  # the gap's own warning says more
    assert cautions(rising, sudden, bc.SparsifyConfig()) == (sudden.soft_hard.warning,)


def test_the_page_and_the_results_say_it(tmp_path):
    falls = history(noisy(np.linspace(6, 4, 40)))
    run = make_run(tmp_path / "short", metrics=measured(), steps=falls)
    (said,) = run.cautions
    told = page(run)
    assert told.count("he run was too short for its model: ") == 2  # below the verdict, and in how it was found
    assert f"Warning: {said}." in told
    assert said[1:] in run._repr_html_()
    found = bc.FoundSubnetwork(run.subnetwork, falls, run.settings.recipe, "decided", 1.0)
    assert found.cautions == run.cautions
    assert said[1:] in found._repr_html_()


def test_a_run_without_the_records_says_nothing(tmp_path):
    run = make_run(tmp_path / "run", metrics=measured(), steps=history(noisy(np.linspace(6, 4, 40))))
    (run.path / "progress.jsonl").unlink()
    old = bc.load_run(run.path)
    assert old.history == []
    assert old.cautions == ()
    assert old.checked is None
    assert "too short" not in page(old)
    assert "before learning" not in page(old)
