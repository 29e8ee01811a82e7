import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.measures.statistics import Faithfulness
from bigram_circuits.models import activations


@pytest.fixture(scope="module")
def table(random_tokens):
    return bc.count_ngrams(random_tokens, 2, d_vocab=257)


@pytest.fixture(scope="module")
def some(tiny_model):
    return bc.Subnetwork.full(tiny_model).random_like().drop_layer(1).drop_neurons(0, [1, 2, 3])


def plain_numbers(model, subnetwork, table, tokens):
    """The definitions, written out on dense tensors."""
    with bc.masked(model, subnetwork), torch.no_grad():
        log_probs = model(tokens).double().log_softmax(-1)
    target = table.log_probs(tokens).double()
    own = -log_probs[:, :-1].gather(2, tokens[:, 1:, None]).flatten()
    theirs = -target[:, :-1].gather(2, tokens[:, 1:, None]).flatten()
    used = theirs.isfinite()
    cross_entropy = -(target.exp() * log_probs).sum(-1)
    entropy = -(target.exp() * target.clamp(min=-1e9)).sum(-1)
    return {
        "surprisal_correlation": np.corrcoef(own[used], theirs[used])[0, 1],
        "cross_entropy": cross_entropy.mean().item(),
        "kl": (cross_entropy - entropy).mean().item(),
        "mean_surprisal": own.mean().item(),
        "top1_agreement": (log_probs.argmax(-1) == target.argmax(-1)).double().mean().item(),
    }


def test_numbers_are_their_definitions(tiny_model, some, table, random_tokens):
    other = np.random.default_rng(1).integers(0, 257, size=(5, 16))
    other[:, ::2] = random_tokens[:5, ::2]
    other[:, 1::4] = random_tokens[:5, 1::4]  # some bigrams of the table, some not
    found = bc.evaluate(tiny_model, some, table, other, seeds=2)
    for name, subnetwork in {
        "subnetwork": some,
        "full": bc.Subnetwork.full(tiny_model),
        "empty": bc.Subnetwork.empty(tiny_model),
        "complement": ~some,
        "magnitude": bc.Subnetwork.magnitude(tiny_model, like=some),
    }.items():
        expected = plain_numbers(tiny_model, subnetwork, table, torch.from_numpy(other))
        measured = getattr(found, name)
        for key, value in expected.items():
            assert getattr(measured, key) == pytest.approx(value, abs=1e-5), (name, key)
        assert (measured.kept, measured.total) == (subnetwork.kept, subnetwork.total)
    for seed in range(2):
        random = some.random_like(seed=seed)
        expected = plain_numbers(tiny_model, random, table, torch.from_numpy(other))
        assert found.random[seed].kl == pytest.approx(expected["kl"], abs=1e-5)
        expected = plain_numbers(tiny_model, ~random, table, torch.from_numpy(other))
        assert found.full_minus_random[seed].kl == pytest.approx(expected["kl"], abs=1e-5)
    assert 0 < found.used < found.positions == 5 * 15


def test_batch_size_and_order_do_not_matter(tiny_model, some, table, random_tokens, monkeypatch):
    whole = bc.evaluate(tiny_model, some, table, random_tokens, controls=False).subnetwork
    monkeypatch.setattr(activations, "_TOKENS_AT_ONCE", 16)
    single = bc.evaluate(tiny_model, some, table, random_tokens, controls=False).subnetwork
    reverse = bc.evaluate(tiny_model, some, table, random_tokens[::-1].copy(), controls=False).subnetwork
    for key in ("surprisal_correlation", "cross_entropy", "kl", "mean_surprisal", "top1_agreement"):
        assert getattr(single, key) == pytest.approx(getattr(whole, key), rel=1e-5)
        assert getattr(reverse, key) == pytest.approx(getattr(whole, key), rel=1e-5)


def test_the_model_is_left_as_it_was(tiny_model, some, table, random_tokens):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    bc.evaluate(tiny_model, some, table, random_tokens, seeds=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


def test_json_holds_every_condition_and_no_nan(tiny_model, some, table, random_tokens):
    result = bc.evaluate(tiny_model, some, table, random_tokens, seeds=2).to_json()
    text = json.dumps(result, allow_nan=False)
    assert {"subnetwork", "full", "empty", "complement", "random", "full_minus_random", "magnitude"} <= set(result)
    assert {"zero_rule", "intervals"} <= set(json.loads(text))
    keys = {
        "surprisal_correlation",
        "cross_entropy",
        "kl",
        "mean_surprisal",
        "top1_agreement",
        "kept",
        "total",
        "fraction",
    }
    assert set(result["subnetwork"]) == set(result["random"]["mean"]) == set(result["random"]["std"]) == keys
    assert [row["seed"] for row in result["random"]["seeds"]] == [0, 1]
    low, high = result["intervals"]["subnetwork"]["cross_entropy"]
    assert low < result["subnetwork"]["cross_entropy"] < high


class Uniform:
    """A target with the two methods that are needed, and no more; its surprisal is constant."""

    def cross_entropy(self, logits, tokens):
        return logits.logsumexp(-1) - logits.mean(-1)

    def surprisal(self, tokens):
        return torch.full((tokens.shape[0], tokens.shape[1] - 1), math.log(257))


def test_any_object_with_the_two_methods_is_a_target(tiny_model, some, random_tokens):
    found = bc.evaluate(tiny_model, some, Uniform(), random_tokens)
    assert math.isnan(found.subnetwork.surprisal_correlation)  # a constant correlates with nothing
    assert math.isnan(found.subnetwork.kl)  # this target cannot tell its entropy
    assert found.subnetwork.cross_entropy > math.log(257)
    assert "undefined" in found.verdict
    assert found.to_json()["subnetwork"]["kl"] is None
    assert "undef." in str(found)


def test_a_subnetwork_that_beats_nothing_is_said_to(tiny_model, some, table, random_tokens):
    assert "NOT shown to be above" in bc.evaluate(tiny_model, some, table, random_tokens).verdict


def test_the_table_prints_every_condition(tiny_model, some, table, random_tokens):
    found = bc.evaluate(tiny_model, some, table, random_tokens)
    for name in ("subnetwork", "full", "empty", "complement", "random", "full - random", "magnitude", "Verdict"):
        assert f"\n{name}" in "\n" + str(found)
    assert list(found.to_dataframe().index) == [name for name, _ in found.rows()]


def test_bad_input_is_refused(tiny_model, some, table, random_tokens, reference_model):
    with pytest.raises(ValueError, match=r"vocabulary of 300, but the model's is 257"):
        bc.evaluate(tiny_model, some, bc.count_ngrams(random_tokens, 2, d_vocab=300), random_tokens)
    with pytest.raises(ValueError, match=r"held-out tokens have shape \(0, 16\)"):
        bc.evaluate(tiny_model, some, table, random_tokens[:0])
    with pytest.raises(ValueError, match="needs the methods cross_entropy and surprisal"):
        bc.evaluate(tiny_model, some, object(), random_tokens)
    with pytest.raises(ValueError, match="at least 1 seed"):
        bc.evaluate(tiny_model, some, table, random_tokens, seeds=0)
    with pytest.raises(ValueError, match="in this subnetwork, but"):
        bc.evaluate(tiny_model, bc.Subnetwork.empty(reference_model), table, random_tokens)


def test_logits_that_are_not_finite_are_an_error(tiny_folders, some, table, random_tokens):
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    with torch.no_grad():
        model.W_E[5] = torch.nan
    random_tokens = random_tokens.copy()
    random_tokens[0, 0] = 5
    with pytest.raises(ValueError, match="not finite"):
        bc.evaluate(model, some, table, random_tokens)


def graded(fraction, r, rise, random_rise, width=0.002):
    """An evaluation with these numbers, and controls that it beats."""

    def one(r, loss, kept):
        return Faithfulness(r, 1.0, 0.5, loss, 0.5, int(np.nan_to_num(kept) * 1000), 1000, kept)

    return bc.Evaluation(
        one(r, 4.0, fraction), full=one(0.6, 3.0, 1.0), complement=one(0.4, 3.0 + rise, 1 - fraction),
        random=(one(0.2, 9.0, fraction),), full_minus_random=(one(0.6, 3.0 + random_rise, 1 - fraction),),
        intervals={"subnetwork": {"surprisal_correlation": (r - width, r + width)}},
        advantage={"full": (0.1, 0.2), "random 0": (0.1, 0.2)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0.0188, 0.962, 3.69, 0.02), ("sparse (1.88% of the weights); sufficient: r = 0.962 (95% interval 0.960 to",
                                       "necessary: without it the model's loss rises by 3.69 nats, 184 times as much")),
        ((0.33, 0.82, 6.0, 3.0), ("NOT sparse (33.0%", "only partly sufficient: r = 0.820",
                                  "hardly necessary: ", "rises by 6.00 nats, only 2.0 times as much")),
        ((0.15, 0.91, 2.0, 0.4), ("fairly sparse", "largely sufficient", "fairly necessary: ", "nats, 5.0 times as")),
        ((0.02, 0.5, 0.05, 0.0), ("NOT sufficient", "NOT necessary: ", "rises by 0.05 nats, without as many")),
        ((0.02, 0.5, -0.05, 0.1), ("NOT necessary: ", "falls by 0.05 nats")),
        ((0.02, 0.5, math.nan, 0.1), ("whether the model needs it was not measured",)),
    ],
)  # fmt: skip
def test_the_verdict_is_graded(numbers, words):
    verdict = graded(*numbers).verdict
    assert verdict.startswith("Verdict: ")
    for part in words:
        assert part in verdict
    if "NOT sparse" not in words[0]:
        assert "NOT sparse" not in verdict


def test_a_full_model_and_an_odd_one_have_verdicts():
    assert "NOT sparse (100.0%" in graded(1.0, 0.6, 5.0, 5.0).verdict
    odd = graded(math.nan, -7.0, math.inf, 1.0)
    assert "of unknown sparsity" in odd.verdict
    assert "was not measured" in replace(odd, full_minus_random=()).verdict
