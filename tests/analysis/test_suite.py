"""The whole set of analyses: what a model does not show is left out with its reason; wrong arguments are errors."""

from importlib import import_module

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits.analysis import analyze, conditions, covariance_similarity, layer_by_layer, logit_lens, suite
from bigram_circuits.models import activations
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.storage.files import read_checked_json
from bigram_circuits.targets import base
from tests.architectures import CONFIGS
from tests.conftest import D_VOCAB, save_tiny

TOKENS = np.random.default_rng(0).integers(0, D_VOCAB, (24, 16))
CORPUS = bc.Corpus.from_tokens(TOKENS[:16], TOKENS[16:])
TARGET = bc.count_ngrams(TOKENS, 2, d_vocab=D_VOCAB)


@pytest.mark.parametrize("name", ["opt", "openai_gpt"])
def test_what_a_model_does_not_show_is_left_out_with_the_reason(name, tmp_path):
    model = bc.load_model(save_tiny(tmp_path / name, CONFIGS[name]()), device="cpu")
    some = bc.Subnetwork.full(model).drop_layer(1)
    found = analyze(model, some, TARGET, CORPUS)
    assert {"layer by layer", "prompt_lens", "attribution", "induction"} <= set(found.left_out)
    assert {"by_layer", "ablation_components", "ablation_heads", "stochastic_ablation"} <= set(found.results)
    assert f"left out: attribution: {found.left_out['attribution']}" in str(found)
    found.save(tmp_path / "analysis")
    written = read_checked_json(tmp_path / "analysis" / "left_out.json")
    assert written == {**found.left_out, "of": found.of.to_json()}
    assert {path.stem for path in (tmp_path / "analysis").iterdir()} == {*found.results, "left_out"}


def test_only_what_is_not_shown_is_left_out(tiny_model, monkeypatch):
    def planted(error):
        def step(subject):
            raise error

        return step

    monkeypatch.setattr(suite, "analyses", lambda: {"planted": planted(NotShownError("it has no such thing"))})
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    assert analyze(tiny_model, some, TARGET, CORPUS).left_out == {"planted": "it has no such thing"}
    monkeypatch.setattr(suite, "analyses", lambda: {"planted": planted(ValueError("a mistake in the analysis"))})
    with pytest.raises(ValueError, match="a mistake in the analysis"):
        analyze(tiny_model, some, TARGET, CORPUS)


def test_layers_measured_together_are_those_measured_alone(tiny_model):
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    together = layer_by_layer(tiny_model, some, TARGET, CORPUS)
    alone = logit_lens(tiny_model, some, CORPUS, target=TARGET)
    np.testing.assert_array_equal(together["logit_lens"].values, alone.values)
    shared, covariance = together["covariance"], covariance_similarity(tiny_model, some, CORPUS)
    assert (shared.conditions, shared.notes) == (covariance.conditions, covariance.notes)
    np.testing.assert_allclose(shared.values, covariance.values, atol=1e-6)
    full = layer_by_layer(tiny_model, CORPUS)["covariance"]
    np.testing.assert_allclose(full.values, covariance.values[:, :1], atol=1e-6)
    fewer = layer_by_layer(tiny_model, some, TARGET, CORPUS, tokens=32)
    assert fewer["cosine"].notes["tokens"] == 32


def test_fewer_tokens_for_layers_are_fewer_for_each_ablation(tiny_model, monkeypatch):
    seen = []
    monkeypatch.setattr(suite, "_run", lambda of, subject: seen.append(subject) or suite.Analyses({}, {}, of))
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    for options in ({}, {"tokens": 500}, {"tokens": 500, "sweep_tokens": 700}):
        analyze(tiny_model, some, TARGET, CORPUS, **options)
    assert [(one.tokens, one.sweep_tokens) for one in seen] == [(20480, 3072), (500, 500), (500, 700)]


def test_wrong_arguments_are_errors_and_not_left_out(tiny_model):
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    with pytest.raises(ValueError, match="vocabulary of 5"):
        analyze(tiny_model, some, bc.count_ngrams(TOKENS % 5, 2, d_vocab=5), CORPUS)
    with pytest.raises(ValueError, match="token ids must be 0 to 256"):
        analyze(tiny_model, some, TARGET, bc.Corpus.from_tokens(TOKENS[:16], TOKENS[16:] + 200))
    with pytest.raises(ValueError, match=r"shape \(0, 16\)"):
        analyze(tiny_model, some, TARGET, bc.Corpus.from_tokens(TOKENS, TOKENS[:0]))
    with pytest.raises(ValueError, match="a seed must be a whole number"):
        analyze(tiny_model, some, TARGET, CORPUS, seed=-1)
    with pytest.raises(ValueError, match="at least 1 token must be used, not 0"):
        analyze(tiny_model, some, TARGET, CORPUS, sweep_tokens=0)


def test_arguments_are_checked_at_the_door_alone(tiny_model, monkeypatch):
    checked = []
    for name, home in (("target_of", base), ("check_tokens", activations)):
        real = getattr(home, name)
        for module in {conditions, suite, *(import_module(step.__module__) for step in suite.analyses().values())}:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *a, name=name, real=real: checked.append(name) or real(*a))
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    analyze(tiny_model, some, TARGET, bc.Corpus.from_tokens(TOKENS, TOKENS))
    assert checked == ["target_of", "check_tokens", "check_tokens"]  # of both parts of the text
