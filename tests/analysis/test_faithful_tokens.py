"""Faithfulness by token: KL and mean predictions are those of a slow, obvious loop over positions."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis import faithfulness_by_token
from bigram_circuits.analysis.prompts import token_word

TEXT = np.random.default_rng(0).integers(0, 12, (12, 16))
TARGET = bc.count_ngrams(TEXT, 2, d_vocab=257)


def by_hand(model, target):
    """KL and the model's mean prediction, by current token."""
    tokens = torch.from_numpy(TEXT)
    with torch.no_grad():
        logits = model(tokens)
    kl = (target.cross_entropy(logits, tokens) - target.entropy(tokens)).double()
    probs = logits.softmax(-1)
    return {int(v): (kl[tokens == v].mean().item(), probs[tokens == v].mean(0)) for v in tokens.unique()}


@pytest.mark.parametrize("target", [TARGET, "model"])
def test_it_is_what_a_loop_over_the_positions_finds(tiny_model, target):
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    if target == "model":
        target = bc.ModelTarget(tiny_model)
    found = faithfulness_by_token(tiny_model, TEXT, some, target=target, most=3, min_count=2)
    assert found.conditions == ("full", "subnetwork", "complement", "random", "target")
    with bc.masked(tiny_model, some):
        masked = by_hand(tiny_model, target)
    order = sorted(masked, key=lambda token: masked[token][0])
    chosen = [*order[:3], *order[::-1][:3]]
    np.testing.assert_allclose(
        found.get("kl", "subnetwork").ravel(), [masked[token][0] for token in chosen], rtol=1e-4, atol=1e-6
    )
    full = by_hand(tiny_model, target)
    np.testing.assert_allclose(found.get("kl", "full").ravel(), [full[t][0] for t in chosen], rtol=1e-4, atol=1e-6)
    assert found.get("count", "full").ravel().tolist() == [(token == TEXT).sum() for token in chosen]
    assert (found.get("kl", "target") == 0).all()
    worst = found.text[1][1][0].split("\n")
    mean = masked[chosen[3]][1]
    best = int(mean.argmax())
    assert worst[0] == token_word(tiny_model, chosen[3])
    assert worst[1] == f"{token_word(tiny_model, best)} {100 * mean[best]:.0f}%"
    assert len(worst) == 4


def test_what_the_target_says_follows_a_token_is_shown(tiny_model):
    found = faithfulness_by_token(tiny_model, TEXT, target=TARGET, most=1, min_count=2, top_k=1)
    assert found.conditions == ("full", "target")
    word, expected = found.text[1][0][0].split("\n")
    token = next(t for t in range(12) if token_word(tiny_model, t) == word)
    probs = TARGET.log_probs(torch.tensor([[token]])).exp()[0, 0]
    assert expected == f"{token_word(tiny_model, int(probs.argmax()))} {100 * probs.max():.0f}%"


def test_the_actual_next_token_is_a_target_too(tiny_model):
    found = faithfulness_by_token(tiny_model, TEXT, target=bc.NextTokenTarget(), most=2, min_count=2)
    assert found.conditions == ("full",)
    assert found.get("count").sum() <= TEXT[:, :-1].size
    assert (found.get("kl") > 0).all()


def test_few_tokens_are_never_both_best_and_worst(tiny_model):
    found = faithfulness_by_token(tiny_model, TEXT % 3, target=TARGET, most=10, min_count=2)
    assert found.columns == ("1",)
    assert found.text[0][0][0].split("\n")[0] != found.text[0][1][0].split("\n")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most": 0}, "at least 1, not 0, 20 and 3"),
        ({"min_count": 1000}, "no token occurs 1000 times in these 192 tokens"),
        ({"target": bc.count_ngrams(TEXT, 2, d_vocab=20)}, "vocabulary of 20"),
        ({"target": 3}, "needs the methods"),
    ],
)
def test_bad_input(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        faithfulness_by_token(tiny_model, TEXT, **({"target": TARGET} | options))


def test_a_target_that_does_not_know_its_entropy_is_refused(tiny_model):
    class NoEntropy:
        cross_entropy = TARGET.cross_entropy
        surprisal = TARGET.surprisal

    with pytest.raises(ValueError, match="NoEntropy has no method entropy"):
        faithfulness_by_token(tiny_model, TEXT, target=NoEntropy())
