"""Gates in several parts, as on several devices, are those of one part: scores, gradients, thresholds, checkpoints."""

import os
import signal

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.masking import gates as module
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.masking.parted import Parted
from tests.conftest import D_VOCAB
from tests.learning.test_training import StopsAt

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (24, 16))
CORPUS = bc.Corpus.from_tokens(TEXT[:16], TEXT[16:])
METHODS = ("continuous_sparsification", "hard_concrete", "straight_through")


@pytest.fixture
def in_parts(monkeypatch):
    """Makes a part of every weight matrix, or of what shares gates, as if each was on another device."""

    def split():
        monkeypatch.setattr(
            module, "_devices", lambda groups, _: [(torch.device("cpu"), b - a) for a, b in module._stretches(groups)]
        )

    yield split
    monkeypatch.undo()


def test_a_range_is_a_view_of_its_part():
    whole = torch.arange(10.0)
    numbers = Parted([whole[:4].clone(), whole[4:9].clone(), whole[9:].clone()])
    assert len(numbers) == 10
    assert list(numbers.places) == [slice(0, 4), slice(4, 9), slice(9, 10)]
    assert torch.equal(numbers.flat(), whole)
    for place in (slice(0, 4), slice(5, 8), slice(9, 10), slice(9, None)):
        assert torch.equal(numbers[place], whole[place])
    numbers[slice(5, 8)].zero_()
    assert numbers.flat().tolist() == [0, 1, 2, 3, 4, 0, 0, 0, 8, 9]
    assert torch.equal(numbers.split(whole)[slice(5, 8)], whole[5:8])
    numbers.copy_(whole)
    assert torch.equal(numbers.copied(), whole)
    with pytest.raises(AssertionError, match="cross the end of a part, 4"):
        numbers[3:5]


@pytest.mark.parametrize(
    "granularity", ["weight", {"attn": "head", "mlp": "neuron"}, {"attn": "block", "mlp": "weight"}]
)
@pytest.mark.parametrize("method", METHODS)
def test_parts_are_penalised_counted_and_chosen_as_a_whole(tiny_model, in_parts, method, granularity):
    config = bc.SparsifyConfig(method=method, granularity=granularity, target_fraction=0.6, max_steps=4)
    others = (bc.Subnetwork.full(tiny_model).random_like(3),)
    tokens, found = torch.from_numpy(TEXT[:2]), []
    for several in (False, True):
        if several:
            in_parts()
        candidates = Candidates(tiny_model, config)
        gates, wanted = candidates.gates(config, 0, None, bc.learning.training._apart(others, 2.0, config))
        assert (len(gates.scores.tensors) > 3) == several
        noise = torch.randn(len(gates.scores), generator=torch.Generator().manual_seed(1))
        gates.scores.copy_(gates.scores.copied().detach() + noise)
        if method != "straight_through":
            gates.set_threshold(wanted)
        gates.refresh(1)
        penalty = gates.penalise(3.0)
        with candidates.applied(gates):
            bc.ModelTarget(tiny_model).cross_entropy(tiny_model(tokens), tokens).mean().backward()
        counts = gates.n_possible, gates.n_kept(), gates.n_above_zero(), gates.is_finite
        found.append((penalty, gates.gradient.copied(), counts, gates.threshold, gates.masks(wanted), gates.masks()))
    (penalty, gradient, *rest, exact, hard), (again, same, *others, exact_again, hard_again) = found
    assert penalty == (pytest.approx(again[0], rel=1e-6), *again[1:])
    torch.testing.assert_close(gradient, same, rtol=1e-5, atol=1e-8)
    assert rest == others
    assert all(
        torch.equal(exact[name], exact_again[name]) and torch.equal(hard[name], hard_again[name]) for name in hard
    )


def test_a_nan_in_any_part_is_seen(tiny_model, in_parts):
    in_parts()
    gates, _ = Candidates(tiny_model, bc.SparsifyConfig()).gates(bc.SparsifyConfig(), 0, None)
    assert gates.is_finite
    gates.scores.tensors[2].detach()[1] = torch.nan
    assert not gates.is_finite


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_one_part_goes_on_in_several_and_back(tiny_model, tmp_path, in_parts, method):
    config = bc.SparsifyConfig(method=method, target_fraction=0.5, max_steps=6, batch_size=2, retries=0)

    def find(stop_at=-1):
        target = StopsAt(bc.ModelTarget(tiny_model), stop_at, lambda: os.kill(os.getpid(), signal.SIGINT))
        run = {} if stop_at is None else {"run_dir": tmp_path}
        return bc.find_subnetwork(tiny_model, target, CORPUS, config, check_memory="off", **run)

    whole = find(None)
    with pytest.raises(KeyboardInterrupt):
        find(2)
    in_parts()
    with pytest.raises(KeyboardInterrupt):
        find(2)
    again = find()
    assert [one.step for one in again.history] == list(range(6))
    np.testing.assert_allclose(*([one.cross_entropy for one in found.history] for found in (whole, again)), rtol=1e-5)
    assert (whole.subnetwork & again.subnetwork).kept >= 0.999 * whole.subnetwork.kept
