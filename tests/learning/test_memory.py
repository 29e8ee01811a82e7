"""The forecast of memory: what it counts, and what it says of what does not fit."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.learning import memory
from bigram_circuits.learning.memory import MemoryForecast, MemoryWarning, memory_of
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.models.activations import lean_forward, recomputed
from bigram_circuits.replacement import Replacement
from bigram_circuits.targets.base import as_target
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
    assert 1.8 < whole.per_sequence / shorter.per_sequence < 3  # attention grows faster than the length
    assert whole.gates == pytest.approx(shorter.gates, rel=0.2)
    larger = forecast(tiny_model, batch_size=64)
    assert larger.per_sequence == pytest.approx(whole.per_sequence, rel=0.2)
    assert larger.needed > whole.needed
    assert forecast(tiny_model, low_memory=True).per_sequence < whole.per_sequence


@pytest.mark.parametrize(
    ("low_memory", "units"), [(False, None), (True, None), (False, ("head", "neuron")), (False, ("edge",))]
)
def test_it_follows_every_tensor_to_sizes_that_it_does_not_try(any_model, monkeypatch, low_memory, units):
    for name, value in {"_RETAINED": 1, "_RETAINED_LOW": 1, "_LONGEST": 16}.items():
        monkeypatch.setattr(memory, name, value)
    config = bc.SparsifyConfig(batch_size=5, low_memory=low_memory, units=units)
    candidates = Candidates(any_model, config, Replacement("resample"))
    tokens = np.full((5, 48), 7)  # all alike, because a table has more to do for some tokens
    *_, predicted = memory._peaks(any_model, as_target(TARGET, D_VOCAB), tokens, config, candidates, None)
    gates = candidates.gates(config, 0, None)[0]
    assert not gates.gradient.flat().any()  # allocated before
    lean = recomputed(any_model) if low_memory else nullcontext()
    with candidates.applied(gates), lean_forward(any_model), lean, memory._Record() as record:
        gates.refresh(0)
        TARGET.cross_entropy(any_model(torch.from_numpy(tokens)), torch.from_numpy(tokens)).mean().backward()
    taken = np.cumsum([record.sizes[tensor] * (1 if made else -1) for tensor, made in record.events])
    assert predicted == pytest.approx(taken.max(), rel=0.05)


def test_it_holds_little_itself_at_a_long_context(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.cfg, "n_ctx", 1 << 15)
    long = bc.Corpus.from_tokens(np.zeros((1, 1 << 15), int), np.zeros((1, 1 << 15), int))
    held = psutil.Process().memory_info().rss
    assert bc.forecast_memory(tiny_model, TARGET, long).per_sequence > 10**10  # what such a sequence would take
    assert psutil.Process().memory_info().rss - held < 10**8


def test_gates_take_what_their_number_says(tiny_model):
    n = sum(site.size for site in bc.weight_sites(tiny_model))

    def counted(**options):
        config = bc.SparsifyConfig(**options)
        return memory._count_gates(Candidates(tiny_model, config), config)

    assert counted().scores == 16 * n
    assert counted(low_memory=True).scores == 8 * n
    assert counted(method="hard_concrete").scores == 20 * n
    assert counted(granularity={"attn": "head", "mlp": "neuron"}).scores < 2 * n
    assert counted(layers=(0,)).scores == 8 * n
    assert forecast(tiny_model).gates > 20 * n  # and the masked weights


def test_a_single_sequence_is_enough_to_count(tiny_model):
    one = bc.Corpus.from_tokens(TEXT[:1], TEXT[:1])
    assert bc.forecast_memory(tiny_model, TARGET, one).per_sequence == pytest.approx(
        forecast(tiny_model).per_sequence, rel=0.05
    )


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
    monkeypatch.setattr(memory, "_peaks", lambda *_: pytest.fail("there is no room to try"))
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


@pytest.mark.parametrize(
    ("own", "limits", "least"),
    [
        ("0::/a/b", {"memory.max": 9, "a/memory.max": 5, "a/b/memory.max": 7}, 5),
        ("0::/a/b", {"a/b/memory.max": 7, "c/memory.max": 1}, 7),
        ("0::/", {"memory.max": 3}, 3),
        ("0::/host/name", {"memory.max": 3}, 3),  # the path is the host's, which is not seen inside
        ("4:cpu,memory:/a", {"memory/memory.limit_in_bytes": 9, "memory/a/memory.limit_in_bytes": 6}, 6),
        ("4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": 6, "unified/memory.max": 4}, 4),
        ("4:cpu:/a", {"memory/memory.limit_in_bytes": 9}, None),
        ("0::/../..", {"memory.max": 3}, 3),
        ("0::/a", {"a/memory.max": "max"}, None),
    ],
)
def test_the_smallest_limit_of_the_control_groups_around_this_process_counts(monkeypatch, tmp_path, own, limits, least):
    for path, limit in limits.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{limit if limit == 'max' else limit * 10**9}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=10**13, available=10**13))
    held, free = memory_of("cpu")
    assert memory.all_memory_of("cpu") == (10**13 if least is None else least * 10**9)
    assert free == (10**13 if least is None else least * 10**9 - held)


def test_without_control_groups_the_machine_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "none")
    assert memory.all_memory_of("cpu") == memory.psutil.virtual_memory().total
    held, free = memory_of("cpu")
    assert 10**7 < held < free + held
