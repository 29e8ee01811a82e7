import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.learning import training
from bigram_circuits.learning.learner import Learner
from bigram_circuits.learning.schedules import has_fallen, head_start, is_unstable, share_due
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.runs import folder as run_folder
from tests.folders import names_in


@pytest.fixture(scope="module")
def corpus(tokenizer):
    """Text in which the next letter depends on the current one."""
    rng = np.random.default_rng(0)
    following = {letter: rng.choice(list("abcdefgh"), 3) for letter in "abcdefgh"}
    documents = []
    for _ in range(60):
        letters = ["a"]
        for _ in range(200):
            letters.append(str(rng.choice(following[letters[-1]])))
        documents.append("".join(letters))
    return bc.load_corpus(documents, tokenizer=tokenizer, context_length=32, held_out=0.2)


@pytest.fixture(scope="module")
def target(corpus):
    return bc.count_ngrams(corpus.train, 2, d_vocab=257)


QUICK = bc.SparsifyConfig(
    sparsity_weight=1.0, learning_rate=0.05, beta_growth=1.1, max_steps=40, batch_size=8, retries=0
)


def test_it_learns_what_is_kept_and_leaves_the_model_bit_identical(any_model, target, corpus):
    before = {name: tensor.clone() for name, tensor in any_model.state_dict().items()}
    found = bc.find_subnetwork(any_model, target, corpus, QUICK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in any_model.state_dict().items())
    learned = bc.evaluate(any_model, found.subnetwork, target, corpus.held_out, seeds=2)
    assert learned.full is not None
    assert learned.subnetwork.kl < min(random.kl for random in learned.random)
    assert learned.subnetwork.kl < learned.full.kl
    assert found.stopped_because in ("decided", "max_steps")
    assert [record["step"] for record in found.history] == list(range(len(found.history)))
    assert found.history[-1]["undecided"] < found.history[0]["undecided"]


def test_a_larger_sparsity_weight_keeps_less(tiny_model, target, corpus):
    few = bc.find_subnetwork(tiny_model, target, corpus, dataclasses.replace(QUICK, sparsity_weight=30.0))
    many = bc.find_subnetwork(tiny_model, target, corpus, dataclasses.replace(QUICK, sparsity_weight=0.0))
    assert few.subnetwork.kept < 0.5 * many.subnetwork.kept


@pytest.mark.parametrize("fraction", [0.013, 0.3])
def test_a_target_fraction_is_reached_exactly(tiny_model, target, corpus, fraction):
    found = bc.find_subnetwork(tiny_model, target, corpus, dataclasses.replace(QUICK, target_fraction=fraction))
    assert found.subnetwork.kept == round(fraction * found.subnetwork.total)
    weights = [record["sparsity_weight"] for record in found.history]
    assert weights[0] == 1.0
    assert len(set(weights)) > 2


def test_hard_gates_are_the_mask(tiny_model, target, corpus):
    soft, hard = (
        bc.find_subnetwork(tiny_model, target, corpus, dataclasses.replace(QUICK, hard_from=share, beta_growth=None))
        for share in (1.0, 0.3)
    )
    assert hard.gap.soft == hard.gap.hard != soft.gap.hard  # what was learned is what is kept
    assert len(hard.history) == QUICK.max_steps
    assert (soft.stopped_because, hard.stopped_because) == ("decided", "planned")
    assert hard.why == "its planned steps were done, with hard gates from step 12 on"
    final = hard.history[-1]
    assert final.fraction == pytest.approx(hard.subnetwork.fraction, abs=1e-3)
    exact = dataclasses.replace(QUICK, hard_from=0.3, target_fraction=0.05)
    subnetwork = bc.find_subnetwork(tiny_model, target, corpus, exact).subnetwork
    assert subnetwork.kept == round(0.05 * subnetwork.total)


def test_the_same_seed_gives_the_same_mask_and_another_seed_another(tiny_model, target, corpus):
    first, again = (bc.find_subnetwork(tiny_model, target, corpus, QUICK) for _ in range(2))
    other = bc.find_subnetwork(tiny_model, target, corpus, dataclasses.replace(QUICK, seed=1))
    assert first.subnetwork == again.subnetwork
    assert first.history == again.history
    assert first.subnetwork != other.subnetwork


def test_a_run_folder_holds_the_run(tiny_model, target, corpus, tmp_path):
    found = bc.find_subnetwork(tiny_model, target, corpus, QUICK, run_dir=tmp_path / "run")
    assert names_in(tmp_path / "run") == [
        "config.json", "progress.jsonl", "subnetwork.safetensors", "training.json",
    ]  # fmt: skip
    run = bc.load_run(tmp_path / "run")
    assert run.subnetwork == found.subnetwork
    assert run.history == found.history
    assert run.settings.recipe == QUICK
    assert run.settings["model"]["weight_hash"] == bc.weight_hash(tiny_model)
    again = bc.find_subnetwork(tiny_model, target, corpus, QUICK, run_dir=tmp_path / "run")
    assert again.subnetwork == found.subnetwork
    assert again.history == found.history
    fresh = bc.find_subnetwork(tiny_model, target, corpus, QUICK, run_dir=tmp_path / "run", resume=False)
    assert fresh.subnetwork == found.subnetwork
    with pytest.raises(ValueError, match=r"holds another run \(its recipe.seed is 0, not 5\)"):
        bc.find_subnetwork(tiny_model, target, corpus, dataclasses.replace(QUICK, seed=5), run_dir=tmp_path / "run")
    assert bc.load_run(tmp_path / "run").subnetwork == found.subnetwork


class StopsAt:
    """The bigram target; at one step it does something."""

    d_vocab = 257
    fingerprint = "the same"
    context_length = 1

    def __init__(self, target, step, action):
        self.target, self.step, self.action, self.calls = target, step, action, 0

    def cross_entropy(self, logits, tokens):
        self.calls += 1
        if self.calls == self.step:
            self.action()
        return self.target.cross_entropy(logits, tokens)

    def surprisal(self, tokens):
        return self.target.surprisal(tokens)


@pytest.mark.parametrize("hard_from", [1.0, 0.3])
def test_an_interrupted_run_continues_to_the_same_mask(tiny_model, target, corpus, tmp_path, monkeypatch, hard_from):
    recipe = dataclasses.replace(QUICK, hard_from=hard_from)
    monkeypatch.setattr(training, "forecast_memory", lambda *_, **__: None)  # so that steps are counted
    expected = bc.find_subnetwork(tiny_model, target, corpus, recipe)
    stopping = StopsAt(target, 17, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="after step 17 of at most 40; its state is kept in"):
        bc.find_subnetwork(tiny_model, stopping, corpus, recipe, run_dir=tmp_path)
    with pytest.raises(ValueError, match="is not finished: run the same command again"):
        bc.load_run(tmp_path)
    never = StopsAt(target, 10_000, lambda: None)
    found = bc.find_subnetwork(tiny_model, never, corpus, recipe, run_dir=tmp_path)
    assert never.calls == len(expected.history) - 17 + 2  # and two for the soft-hard gap
    assert found.subnetwork == expected.subnetwork
    assert found.history == expected.history
    assert not (tmp_path / "checkpoint").exists()


def test_a_killed_run_continues_from_its_last_checkpoint(tiny_model, target, corpus, tmp_path, monkeypatch):
    expected = bc.find_subnetwork(tiny_model, target, corpus, QUICK)
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SHARE", 1e9)

    def die():
        raise SystemError("killed")

    with pytest.raises(SystemError):
        bc.find_subnetwork(tiny_model, StopsAt(target, 21, die), corpus, QUICK, run_dir=tmp_path)
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"attempt": 0, "step": 20, "cross_')  # what a kill in the middle of a write leaves
    found = bc.find_subnetwork(tiny_model, StopsAt(target, 10_000, die), corpus, QUICK, run_dir=tmp_path)
    assert found.subnetwork == expected.subnetwork
    assert found.history == expected.history
    assert [json.loads(line)["step"] for line in (tmp_path / "progress.jsonl").read_text().splitlines()] == [
        record["step"] for record in expected.history
    ]


def test_straight_through_continues_with_the_momentum_of_its_checkpoint(
    tiny_model, target, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(training, "forecast_memory", lambda *_, **__: None)  # so that steps are counted
    config = dataclasses.replace(QUICK, method="straight_through", target_fraction=0.05, max_steps=16)
    expected = bc.find_subnetwork(tiny_model, target, corpus, config)
    stopping = StopsAt(target, 9, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        bc.find_subnetwork(tiny_model, stopping, corpus, config, run_dir=tmp_path)
    checkpoint = training.RunFolder(tmp_path).read_checkpoint()
    assert checkpoint is not None
    assert set(checkpoint.tensors) == {"scores", "sgd.momentum_buffer"}
    with pytest.raises(ValueError, match="the checkpoint does not hold the state of these"):
        Learner(Candidates(tiny_model, QUICK), QUICK, None, checkpoint)
    found = bc.find_subnetwork(tiny_model, StopsAt(target, 10_000, lambda: None), corpus, config, run_dir=tmp_path)
    assert found.subnetwork == expected.subnetwork
    assert found.stopped_because == expected.stopped_because == "planned"


def test_learning_goes_on_while_every_gate_is_open_or_the_share_is_not_due(tiny_model, target, corpus):
    high = dataclasses.replace(QUICK, first_score=3.0, max_steps=30)
    assert len(bc.find_subnetwork(tiny_model, target, corpus, high).history) > 1  # all gates are above 0.9 at step 0
    sharp = dataclasses.replace(QUICK, target_fraction=0.1, beta_start=1e4, max_steps=20, short_until=0)
    assert len(bc.find_subnetwork(tiny_model, target, corpus, sharp).history) == 7  # steps 0 to 6: 0.3 of 20


def test_a_first_score_counts_with_a_target_fraction_too():
    assert head_start(0, 1.5, 100) == 1.5
    assert head_start(15, 1.5, 100) == pytest.approx(0.75)
    assert head_start(30, 1.5, 100) == head_start(99, 1.5, 100) == head_start(0, 0.0, 100) == 0.0
    assert (has_fallen(29, 100), has_fallen(30, 100)) == (False, True)
    shares = [share_due(step, 0.01, 100) for step in (0, 15, 30, 99)]
    assert shares == pytest.approx([0.5, 0.5 * 0.02**0.5, 0.01, 0.01])


def test_the_gates_of_a_target_fraction_start_at_the_first_score(tiny_model):
    config = dataclasses.replace(QUICK, target_fraction=0.1, first_score=1.0)
    learner = Learner(Candidates(tiny_model, config), config)
    for step, gate in ((0, 1 / (1 + np.exp(-1))), (12, 0.5)):  # 12 is 0.3 of 40
        learner.harden(step, share_due(step, learner.share, 40))
        learner.gates.refresh(0)
        soft = learner.gates.soft(slice(0, 100))
        np.testing.assert_allclose(soft[soft > 0], gate, rtol=1e-6)


def test_nan_in_the_loss_is_an_error_and_nothing_is_kept_as_a_result(tiny_folders, target, corpus, tmp_path):
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    with torch.no_grad():
        model.W_E[:] = torch.nan
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        bc.find_subnetwork(model, target, corpus, QUICK, run_dir=tmp_path)
    assert not (tmp_path / "subnetwork.safetensors").exists()
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_an_unstable_run_is_tried_again_with_another_order(tiny_model, target, corpus, monkeypatch, tmp_path):
    verdicts = iter([True, True, False])
    monkeypatch.setattr(training, "is_unstable", lambda *_, **__: next(verdicts))
    config = dataclasses.replace(QUICK, retries=3, max_steps=5)
    found = bc.find_subnetwork(tiny_model, target, corpus, config, run_dir=tmp_path)
    assert {record["attempt"] for record in found.history} == {2}
    assert found.stopped_because == "max_steps"
    attempts = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [record["attempt"] for record in attempts] == [0] * 5 + [1] * 5 + [2] * 5
    assert attempts[0]["cross_entropy"] != attempts[5]["cross_entropy"]
    monkeypatch.setattr(training, "is_unstable", lambda *_, **__: True)
    assert bc.find_subnetwork(tiny_model, target, corpus, config).stopped_because == "unstable"


def test_what_counts_as_unstable():
    calm = [4.0] * 200
    assert not is_unstable(calm, 100)
    assert not is_unstable([5.0] * 3, 100)
    jump = calm.copy()
    jump[50:60] = [4.3] * 10
    assert not is_unstable(jump, 100)  # back at step 60 of 200
    assert is_unstable(jump, 150)  # too late
    assert is_unstable(calm[:150] + [4.3] * 50, 100)
    assert not is_unstable(calm[:150] + [4.2] * 50, 100)  # less than 0.25 nats
    assert is_unstable([0.4] * 50 + [0.51] * 50, 10)  # more than 25%
    noise = (0.1 + 0.03 * np.random.default_rng(0).standard_normal(100)).tolist()
    assert not is_unstable(noise, 20)  # a task that is solved: batches differ by more than 25%
    assert is_unstable([*noise, *[0.5] * 30], 20)


def test_the_papers_recipe():
    paper = bc.SparsifyConfig.paper(sparsity_weight=50.0)
    assert (paper.learning_rate, paper.weight_decay, paper.first_score) == (5e-5, 0.01, 0.0)
    assert (paper.beta_start, paper.beta_growth, paper.max_steps) == (1.0, 1.001, 15_000)
    assert (paper.batch_size, paper.stop_undecided, paper.retries, paper.recovery_steps) == (32, 0.01, 3, 100)
    assert paper.sparsity_weight == 50.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "magic"}, {"granularity": "word"}, {"sparsity_weight": -1.0}, {"sparsity_weight": float("nan")},
        {"learning_rate": 0.0}, {"target_fraction": 1.5}, {"target_fraction": 0.0}, {"beta_growth": 0.9},
        {"max_steps": 0}, {"batch_size": 0}, {"seed": -1}, {"retries": -1}, {"stop_undecided": 1.0},
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        bc.SparsifyConfig(**wrong)


def test_targets_and_corpora_that_do_not_fit_are_refused(tiny_model, corpus, random_tokens):
    with pytest.raises(ValueError, match="vocabulary of 300, but the model's is 257"):
        bc.find_subnetwork(tiny_model, bc.count_ngrams(random_tokens, 2, d_vocab=300), corpus)
    with pytest.raises(ValueError, match="needs the methods"):
        bc.find_subnetwork(tiny_model, "bigrams", corpus)
