"""The forecast of memory: what it counts, and what it says of what does not fit."""

from dataclasses import replace

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits.learning import memory
from bigram_circuits.learning.memory import MemoryForecast, MemoryWarning, memory_of
from tests.conftest import D_VOCAB

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (8, 32))
CORPUS = bc.Corpus.from_tokens(TEXT, TEXT[:2])
TARGET = bc.count_ngrams(TEXT, 2, d_vocab=D_VOCAB)
ROOM = MemoryForecast("cpu", held=10**9, gates=10**9, per_sequence=10**8, batch_size=32, free=8 * 10**9)


def forecast(model, **options):
    return bc.forecast_memory(model, TARGET, CORPUS, bc.SparsifyConfig(**options))


def test_a_sequence_takes_what_its_length_and_the_model_say(tiny_model):
    whole = forecast(tiny_model)
    half = bc.Corpus.from_tokens(TEXT[:, :16], TEXT[:2, :16])
    shorter = bc.forecast_memory(tiny_model, TARGET, half)
    assert 1.9 < whole.per_sequence / shorter.per_sequence < 3  # attention grows faster than the length
    assert whole.gates == shorter.gates
    assert forecast(tiny_model, batch_size=64).per_sequence == whole.per_sequence
    assert forecast(tiny_model, batch_size=64).needed > forecast(tiny_model, batch_size=8).needed


def test_gates_take_what_their_number_says(tiny_model):
    n = sum(site.size for site in bc.weight_sites(tiny_model))
    assert forecast(tiny_model).gates == 24 * n
    assert forecast(tiny_model, method="hard_concrete").gates == 28 * n
    tied = forecast(tiny_model, granularity={"attn": "head", "mlp": "neuron"}).gates
    assert 8 * n < tied < 9 * n
    assert forecast(tiny_model, layers=(0,)).gates < 24 * n


def test_a_single_sequence_is_enough_to_count(tiny_model):
    one = bc.Corpus.from_tokens(TEXT[:1], TEXT[:1])
    assert bc.forecast_memory(tiny_model, TARGET, one).per_sequence == forecast(tiny_model).per_sequence


def test_counting_leaves_the_model_as_it_was(tiny_model):
    before = bc.weight_hash(tiny_model)
    required = [parameter.requires_grad for parameter in tiny_model.parameters()]
    forecast(tiny_model)
    assert bc.weight_hash(tiny_model) == before
    assert [parameter.requires_grad for parameter in tiny_model.parameters()] == required
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_what_fits_is_let_through_and_the_rest_is_told_what_would():
    ROOM.check()
    assert ROOM.needed == 60_000_000 + 10**9 + 32 * 10**8
    assert ROOM.peak == ROOM.needed + 10**9
    with pytest.raises(
        MemoryError, match=r"about 11\.1 GB more on cpu, which has 8\.0 GB: a batch_size of 69 would fit"
    ):
        replace(ROOM, batch_size=100).check()
    with pytest.raises(MemoryError, match="not even a batch of one would fit; mask fewer layers"):
        replace(ROOM, free=10**9).check()
    assert "about 5.3 GB at its peak on cpu: 1.0 GB in use now, 1.0 GB for gates, 3.2 GB for 32" in str(ROOM)


def test_learning_is_refused_before_it_begins(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "memory_of", lambda device: (10**9, 10**6))
    monkeypatch.setattr(memory, "_kept", lambda *_: pytest.fail("there is no room to try"))
    config, refused = bc.SparsifyConfig(max_steps=2), r"learning needs about 0\.1 GB more on cpu, which has 0\.0 GB"
    with pytest.raises(MemoryError, match=refused):
        bc.find_subnetwork(tiny_model, TARGET, CORPUS, config, run_dir=tmp_path / "run", check_memory="strict")
    assert not (tmp_path / "run" / "subnetwork.safetensors").exists()
    with pytest.warns(MemoryWarning, match=refused):  # by default it says so and goes on: memory may become free
        assert bc.find_subnetwork(tiny_model, TARGET, CORPUS, config).history
    monkeypatch.setattr(memory, "all_memory_of", lambda device: 10**9 + 1)
    with pytest.raises(MemoryError, match=refused):  # no other process's memory could make room
        bc.find_subnetwork(tiny_model, TARGET, CORPUS, config)
    assert bc.find_subnetwork(tiny_model, TARGET, CORPUS, config, check_memory="off").history
    with pytest.raises(ValueError, match="check_memory must be one of strict, warn, off, not 'maybe'"):
        bc.find_subnetwork(tiny_model, TARGET, CORPUS, config, check_memory="maybe")


def test_certainly_too_small_counts_only_what_is_counted():
    assert not replace(ROOM, scores=10**9, total=2 * 10**9).certainly_too_small
    assert replace(ROOM, scores=10**9, total=2 * 10**9 - 1).certainly_too_small
    assert not replace(ROOM, free=0, total=None).certainly_too_small


def test_a_container_limit_counts(monkeypatch, tmp_path):
    held, free = memory_of("cpu")
    assert 10**7 < held < free + held
    limit = tmp_path / "memory.max"
    limit.write_text(f"{held + 10**6}\n")
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (str(limit),))
    assert memory_of("cpu")[1] < 10**8
    limit.write_text("max\n")
    assert memory_of("cpu")[1] > 10**8
