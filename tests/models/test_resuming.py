"""Passes that begin at a later block: the same logits, on every architecture, and only where no one can tell."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.ablation import ablate
from bigram_circuits.models import resuming
from bigram_circuits.models.resuming import can_resume, outputs_recorded, resumed
from tests.architectures import CONFIGS
from tests.conftest import D_VOCAB, save_tiny

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, D_VOCAB, (4, 8)))

WITH_HOOKS = ("opt", "xglm")
"""Architectures whose blocks have hooks of TransformerLens' that look like a user's: whole passes are made for them."""

pytestmark = pytest.mark.usefixtures("one_thread")


def hook_counts(model):
    return [len(module._forward_hooks) for module in model.modules()], [
        "forward" in vars(module) for module in model.modules()
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_same_from_every_block_on(name, tmp_path):
    model = bc.load_model(save_tiny(tmp_path, CONFIGS[name]()), device="cpu")
    before = hook_counts(model)
    assert can_resume(model) == (name not in WITH_HOOKS)
    with torch.inference_mode():
        plain = model.original_model(TOKENS, use_cache=False).logits
        with outputs_recorded(model) as outputs:
            model(TOKENS)
        for first in range(len(outputs)):
            with resumed(model, outputs, first):
                torch.testing.assert_close(model(TOKENS), plain, rtol=1e-5, atol=1e-5)
        with outputs_recorded(model) as others:
            model(TOKENS.flip(0))
        with resumed(model, others, 1):
            assert not torch.allclose(model(TOKENS), plain, rtol=1e-5, atol=1e-5)
    assert hook_counts(model) == before


def test_a_block_that_reads_what_an_earlier_one_left_is_never_begun_at(tiny_folders):
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    left, first, second = {}, model.blocks[0].forward, model.blocks[1].forward

    def leaves(hidden, *args, **kwargs):
        left["it"] = hidden
        return first(hidden, *args, **kwargs)

    def reads(hidden, *args, **kwargs):
        return second(hidden + left.pop("it"), *args, **kwargs)

    assert can_resume(model)
    vars(model.blocks[0])["forward"] = leaves
    assert can_resume(model)
    vars(model.blocks[1])["forward"] = reads
    assert not can_resume(model)


def test_hooks_of_the_user_are_called_in_every_pass_and_change_the_result(tiny_model):
    text = TOKENS.numpy()
    calls = []

    def halve(value, hook):
        calls.append(hook.name)
        return value / 2

    without = ablate(tiny_model, "L1H0", tokens=text, seeds=0)
    tiny_model.add_hook("blocks.0.hook_resid_post", halve)
    try:
        assert not can_resume(tiny_model)
        found = ablate(tiny_model, "L1H0", tokens=text, seeds=0)
    finally:
        tiny_model.reset_hooks()
    assert len(calls) >= 2
    assert found.get("loss")["L1H0"] != without.get("loss")["L1H0"]


@pytest.mark.parametrize("by", ["zero", "mean", "resample", "weights"])
def test_ablations_are_the_same_as_with_whole_passes(any_model, by, monkeypatch):
    text = np.tile(TOKENS.numpy(), (3, 1))
    some = bc.Subnetwork.full(any_model).drop_head(0, 2).drop_neurons(1, [3])
    arguments = (any_model, ["heads", "mlps", "L1N[1,2] + L0H1"], some)
    hashed = bc.weight_hash(any_model)
    begun = []
    monkeypatch.setattr(resuming, "resumed", lambda *args: begun.append(args[2]) or resumed(*args))
    fast = ablate(*arguments, tokens=text, by=by, seeds=1)
    assert set(begun) == {1}
    monkeypatch.setattr(resuming, "can_resume", lambda model: False)
    slow = ablate(*arguments, tokens=text, by=by, seeds=1)
    assert np.array_equal(fast.values, slow.values, equal_nan=True)
    assert np.array_equal(fast.low, slow.low, equal_nan=True)
    assert bc.weight_hash(any_model) == hashed


def test_additions_are_the_same_as_with_whole_passes(any_model, monkeypatch):
    text = np.tile(TOKENS.numpy(), (3, 1))
    base = bc.Subnetwork.full(any_model).drop_head(0, 0).drop_head(1, 1).drop_head(0, 1).drop_head(1, 2)
    fast = bc.sufficiency(any_model, base, ["L0H0", "L1H1", "L1H2 + L0H1"], text, seeds=1)
    monkeypatch.setattr(resuming, "can_resume", lambda model: False)
    slow = bc.sufficiency(any_model, base, ["L0H0", "L1H1", "L1H2 + L0H1"], text, seeds=1)
    assert np.array_equal(fast.values, slow.values, equal_nan=True)


def test_what_is_lost_without_units_is_the_same_as_with_whole_passes(any_model, monkeypatch):
    text = np.tile(TOKENS.numpy(), (3, 1))
    kept = bc.Subnetwork.full(any_model).drop_head(0, 2).drop_neurons(1, [3])
    target = bc.count_ngrams(text, d_vocab=D_VOCAB)
    begun = []
    monkeypatch.setattr(resuming, "resumed", lambda *args: begun.append(args[2]) or resumed(*args))
    fast = analysis.unit_effects(any_model, kept, target, text, most=100)
    assert set(begun) == {1}
    begun.clear()
    predicted = analysis.predicted_effects(any_model, kept, text, tokens=3)
    assert set(begun) == {1}
    monkeypatch.setattr(resuming, "can_resume", lambda model: False)
    slow = analysis.unit_effects(any_model, kept, target, text, most=100)
    assert fast.names == slow.names
    assert np.array_equal(fast.values, slow.values)
    np.testing.assert_allclose(
        predicted.values, analysis.predicted_effects(any_model, kept, text, tokens=3).values, atol=1e-5
    )
