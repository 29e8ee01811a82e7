"""The mean loss in pieces: value and gradient as from all logits at once, and nothing that looks is passed by."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.models import logits
from bigram_circuits.models.logits import mean_cross_entropy
from tests.conftest import D_VOCAB

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (5, 16))
TOKENS = torch.from_numpy(TEXT)
TARGET = bc.count_ngrams(TEXT, 2, d_vocab=D_VOCAB)


@pytest.fixture
def in_pieces(monkeypatch):
    """Two sequences in a piece."""
    monkeypatch.setattr(logits, "_AT_ONCE", 2 * 16 * D_VOCAB)


class Noting:
    """A target that notes how many sequences it was given at a time."""

    def __init__(self):
        self.rows = []

    def cross_entropy(self, logits, tokens):
        self.rows.append(len(logits))
        return TARGET.cross_entropy(logits, tokens)


def gradient(model, of):
    gates = Candidates(model, bc.SparsifyConfig()).gates(bc.SparsifyConfig(), 0, None)[0]
    with bc.gated(model, gates):
        gates.refresh(0)
        value = of()
        value.backward()
    return value.item(), gates.gradient.flat()


def test_value_and_gradient_are_those_of_all_logits_at_once(any_model, in_pieces):
    target = Noting()
    whole, expected = gradient(any_model, lambda: TARGET.cross_entropy(any_model(TOKENS), TOKENS).mean())
    value, found = gradient(any_model, lambda: 3 * mean_cross_entropy(any_model, target, TOKENS))
    assert target.rows == [2, 2, 1]
    assert any_model not in logits._OTHERWISE
    assert value == pytest.approx(3 * whole, rel=1e-6)
    torch.testing.assert_close(found, 3 * expected, rtol=1e-4, atol=1e-7)


def test_value_is_that_of_the_plain_model(any_model, in_pieces):
    plain = AutoModelForCausalLM.from_pretrained(any_model.cfg.model_name).eval()
    with torch.no_grad():
        log_probs = plain(TOKENS).logits.double().log_softmax(-1)
        expected = -(TARGET.log_probs(TOKENS).double().exp() * log_probs).sum(-1).mean()
        assert mean_cross_entropy(any_model, TARGET, TOKENS).item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_fits_one_piece_is_computed_as_ever(tiny_model):
    target = Noting()
    with torch.no_grad():
        expected = TARGET.cross_entropy(tiny_model(TOKENS), TOKENS).mean()
        assert torch.equal(mean_cross_entropy(tiny_model, target, TOKENS), expected)
    assert target.rows == [5]


@pytest.mark.parametrize("name", ["unembed.hook_in", "unembed.hook_out"])
def test_hooks_see_all_and_change_the_result(any_model, in_pieces, name):
    seen = []

    def double(value, hook):
        seen.append(tuple(value.shape[:2]))
        return 2 * value

    with torch.no_grad():
        with any_model.hooks(fwd_hooks=[(name, double)]):
            value = mean_cross_entropy(any_model, TARGET, TOKENS)
            expected = TARGET.cross_entropy(any_model(TOKENS), TOKENS).mean()
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        assert value.item() != pytest.approx(mean_cross_entropy(any_model, TARGET, TOKENS).item(), rel=1e-4)
    assert seen == [(5, 16)] * 2


def test_a_hook_on_the_output_sees_all_logits(tiny_model, in_pieces):
    shapes = []
    handle = tiny_model.register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    with torch.no_grad():
        mean_cross_entropy(tiny_model, TARGET, TOKENS)
    handle.remove()
    assert shapes == [(5, 16, D_VOCAB)]


def test_a_model_that_changes_its_logits_otherwise_is_found_out(tiny_folders, in_pieces, monkeypatch):
    model, target = bc.load_model(tiny_folders["gpt_neox"], device="cpu"), Noting()
    usual = model.original_model.forward

    def halved(*args, **kwargs):
        output = usual(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(model.original_model, "forward", halved)
    with torch.no_grad():
        expected = TARGET.cross_entropy(model(TOKENS), TOKENS).mean().item()
        for _ in range(2):
            assert mean_cross_entropy(model, target, TOKENS).item() == pytest.approx(expected, rel=1e-6)
    assert model in logits._OTHERWISE
    assert target.rows == [2, 2, 1] * 2


def test_the_model_is_left_as_it_was(tiny_model, in_pieces, monkeypatch):
    monkeypatch.setattr(tiny_model.original_model, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mean_cross_entropy(tiny_model, TARGET, TOKENS)
    assert "forward" not in vars(tiny_model.unembed)
