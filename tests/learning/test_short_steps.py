"""Steps that see only the beginnings of sequences: which these are by default, what they see, and what they refuse."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.recipe import SHORT_UNTIL, SparsifyConfig
from bigram_circuits.storage.typed import from_json, to_json
from tests.learning.test_training import QUICK, corpus, target

__all__ = ["corpus", "target"]  # fixtures

SHORT = dataclasses.replace(QUICK, short_until=0.5, short_length=6, beta_growth=1.1, max_steps=20)


class Seen(bc.Target):
    """A target that remembers the shapes of what it is asked about."""

    def __init__(self, table):
        self.table, self.d_vocab, self.shapes = table, table.d_vocab, []
        self.fingerprint, self.context_length = table.fingerprint, table.context_length

    def cross_entropy(self, logits, tokens):
        assert logits.shape[:2] == tokens.shape
        self.shapes.append(tuple(tokens.shape))
        return self.table.cross_entropy(logits, tokens)

    def surprisal(self, tokens):
        return self.table.surprisal(tokens)


def test_short_steps_see_the_beginnings_of_the_sequences_that_they_would_see_anyway(tiny_model, target, corpus):
    seen, whole = Seen(target), Seen(target)
    found = bc.find_subnetwork(tiny_model, seen, corpus, SHORT, check_memory="off")
    all_whole = dataclasses.replace(SHORT, short_until=0)
    bc.find_subnetwork(tiny_model, whole, corpus, all_whole, check_memory="off")
    n = len(found.history)
    assert n > 10
    assert seen.shapes[:n] == [(8, 6)] * 10 + [(8, 32)] * (n - 10)
    assert set(whole.shapes) == {(8, 32)}


def test_the_loss_of_a_short_step_is_that_of_the_plain_model_on_the_beginnings(tiny_model, target, corpus):
    nothing_learned = dataclasses.replace(SHORT, max_steps=1, short_until=1, first_score=40, sparsity_weight=0.0)
    found = bc.find_subnetwork(tiny_model, target, corpus, nothing_learned)  # every gate is 1
    rows = np.random.default_rng((0, 0)).permutation(len(corpus.train))[:8]
    tokens = torch.from_numpy(corpus.train[rows][:, :6].astype(np.int64))
    with torch.no_grad():
        logits = tiny_model.original_model(tokens).logits.double()
    probs = target.log_probs(tokens).exp().double()
    expected = -(probs * logits.log_softmax(-1)).sum(-1).mean().item()
    assert found.history[0].cross_entropy == pytest.approx(expected, rel=1e-5)


def test_learning_does_not_end_before_it_saw_whole_sequences(tiny_model, target, corpus):
    fast = dataclasses.replace(SHORT, beta_growth=1.9, short_until=0.75)
    assert len(bc.find_subnetwork(tiny_model, target, corpus, dataclasses.replace(fast, short_until=0)).history) < 15
    assert len(bc.find_subnetwork(tiny_model, target, corpus, fast).history) == 16


class Interrupt:
    """Sends Ctrl-C after a number of steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step(self, record):
        if record.step + 1 == self.steps:
            os.kill(os.getpid(), signal.SIGINT)

    def on_end(self, found):
        pass


@pytest.mark.parametrize("steps", [4, 13])
def test_a_run_that_was_interrupted_among_short_or_whole_steps_ends_in_the_same_mask(
    tiny_model, target, corpus, tmp_path, steps
):
    straight = bc.find_subnetwork(tiny_model, target, corpus, SHORT)

    with pytest.raises(KeyboardInterrupt):
        bc.find_subnetwork(tiny_model, target, corpus, SHORT, run_dir=tmp_path, callbacks=[Interrupt(steps)])
    resumed = bc.find_subnetwork(tiny_model, target, corpus, SHORT, run_dir=tmp_path)
    assert resumed.history == straight.history
    assert resumed.subnetwork.checksum == straight.subnetwork.checksum


BIGRAM = {"context_length": 1, "positions": "rotary"}


@pytest.mark.parametrize(
    ("options", "of", "share"),
    [
        ({}, BIGRAM, SHORT_UNTIL),
        ({"target_fraction": 0.1}, BIGRAM, SHORT_UNTIL),
        ({}, BIGRAM | {"context_length": 2}, SHORT_UNTIL),
        ({"short_length": 7}, BIGRAM | {"context_length": 2}, 0),  # it looks back too far
        ({}, BIGRAM | {"context_length": None}, 0),
        ({}, BIGRAM | {"positions": "standard"}, 0),
        ({}, BIGRAM | {"positions": "alibi"}, 0),
        ({"granularity": "head"}, BIGRAM, 0),
        ({"granularity": {"attn": "head", "mlp": "weight"}}, BIGRAM, 0),
        ({"units": ("head",)}, BIGRAM, 0),
        ({"hard_from": 0.5}, BIGRAM, 0),
        ({"method": "hard_concrete"}, BIGRAM, 0),
        ({"short_until": 0.25}, BIGRAM | {"context_length": None, "positions": "standard"}, 0.25),
        ({"short_until": 0}, BIGRAM, 0),
    ],
)
def test_there_are_short_steps_by_default_only_where_they_are_known_to_cost_nothing(options, of, share):
    config = SparsifyConfig(**options).with_short_steps(**of)
    assert config.short_until == share
    assert config.short_steps == round(share * config.max_steps)


def test_targets_say_how_far_they_look_back(tiny_model, corpus, target):
    assert [bc.count_ngrams(corpus.train, order, d_vocab=257).context_length for order in (1, 2, 3)] == [0, 1, 2]
    assert bc.InducedTarget(tiny_model, corpus.train).context_length == 1
    assert bc.ModelTarget(tiny_model).context_length is bc.NextTokenTarget().context_length is None


def test_published_and_earlier_recipes_have_no_short_steps():
    assert SparsifyConfig.paper().short_until == 0
    earlier = to_json(SparsifyConfig(seed=3))
    del earlier["short_until"], earlier["short_length"]
    assert from_json(SparsifyConfig, earlier).short_until == 0


def test_short_steps_are_refused_where_they_would_miss_what_is_learned(tiny_model, corpus, target):
    far = Seen(target)
    far.positions = slice(6, None)
    with pytest.raises(ValueError, match=r"^short_until: the target is defined at none of the first short_length=6 "):
        bc.find_subnetwork(tiny_model, far, corpus, SHORT)
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip("abcd", "bcda", strict=True)]
    task = bc.load_task(rows, tokenizer=tiny_model.tokenizer)
    with pytest.raises(ValueError, match=r"^short_until: short steps may not see the answers of a task; leave it out$"):
        bc.find_subnetwork(tiny_model, bc.TaskTarget(task), task.corpus(), SHORT)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, True])
def test_a_share_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^short_until must be from 0 to 1, not"):
        SparsifyConfig(short_until=wrong)
