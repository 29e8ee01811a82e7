"""The registry of analyses: a module registers its own, and `analyze` needs to know nothing of it."""

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits.analysis import registry, suite
from bigram_circuits.analysis.registry import Subject, analyses, in_suite
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Effects
from tests.conftest import D_VOCAB

TOKENS = np.random.default_rng(0).integers(0, D_VOCAB, (24, 32))
CORPUS = bc.Corpus.from_tokens(TOKENS[:16], TOKENS[16:])
TARGET = bc.count_ngrams(TOKENS, 2, d_vocab=D_VOCAB)


@pytest.fixture
def alone(monkeypatch):
    """A registry in which there is nothing else."""
    monkeypatch.setattr(registry, "ANALYSES", {})
    monkeypatch.setattr(suite, "analyses", lambda: registry.ANALYSES)


def counted(subject: Subject) -> Effects:
    values = np.array([[float(subject.subnetwork.kept)]])
    none = np.full_like(values, np.nan)
    return Effects("Kept", (Quantity("kept", "weights", "Weights."),), "what", ("all",), values, none, none)


def test_what_is_registered_is_run_and_kept(alone, tiny_model):
    in_suite("kept")(counted)
    half = bc.Subnetwork.full(tiny_model).drop_layer(1)
    found = bc.analyze(tiny_model, half, TARGET, CORPUS)
    assert {name: result.get("kept")["all"] for name, result in found.results.items()} == {"kept": half.kept}


def test_what_was_measured_on_the_way_is_not_measured_again(alone, tiny_model):
    in_suite("together")(lambda subject: {"one": counted(subject), "two": counted(subject)})
    in_suite("two")(lambda subject: pytest.fail("it is there already"))
    found = bc.analyze(tiny_model, bc.Subnetwork.full(tiny_model), TARGET, CORPUS)
    assert list(found.results) == ["one", "two"]


def test_a_name_is_taken_once(alone):
    in_suite("kept")(counted)
    with pytest.raises(ValueError, match=f"there is an analysis 'kept' already, in {__name__}"):
        in_suite("kept")(counted)


def test_all_modules_are_found_in_order():
    steps = analyses()
    modules = [step.__module__.rpartition(".")[2] for step in steps.values()]
    assert modules == sorted(modules)
    assert {"ablation", "attribution", "layers", "location", "overlap", "sufficiency"} <= set(modules)
    names = list(steps)
    assert names.index("layer by layer") < names.index("covariance")


def test_samples_are_of_the_held_out_text(tiny_model):
    subject = Subject(tiny_model, bc.Subnetwork.full(tiny_model), TARGET, CORPUS, sweep_tokens=64)
    np.testing.assert_array_equal(subject.prompt, TOKENS[16, :16])
    np.testing.assert_array_equal(subject.sweep_text, TOKENS[[16, 23]])
    assert subject.sweep_text is subject.sweep_text
