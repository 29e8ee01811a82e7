"""Texts, token by token: surprisals and expectations are the model's; sums by token are what a loop finds."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis import faithfulness_by_token, next_tokens, passages
from bigram_circuits.analysis.prompts import token_word

TEXT = np.random.default_rng(0).integers(0, 12, (12, 16))
TARGET = bc.count_ngrams(TEXT, 2, d_vocab=257)


def test_surprisals_and_expectations_are_the_models(tiny_model, random_tokens):
    target = bc.count_ngrams(random_tokens[:3], 2, d_vocab=257)
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    found = passages(tiny_model, some, random_tokens, target=target, count=2, length=10)
    assert found.conditions == ("full", "subnetwork", "complement", "random", "target")
    tokens = torch.from_numpy(random_tokens[[0, 5], :10])
    with torch.no_grad():
        plain = tiny_model(tokens).log_softmax(-1)
        with bc.masked(tiny_model, some):
            masked = tiny_model(tokens).log_softmax(-1)
    for name, log_probs in (("full", plain), ("subnetwork", masked)):
        wanted = -log_probs[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        np.testing.assert_allclose(found.get("surprisal", name)[:, 1:], wanted, rtol=1e-5)
        assert np.isnan(found.get("surprisal", name)[:, 0]).all()
    lines = found.text[0][1][4].split("\n")
    assert lines[0] == token_word(tiny_model, int(tokens[1, 4]))
    best = plain[1, 3].exp()
    assert lines[1] == f"{token_word(tiny_model, int(best.argmax()))} {100 * best.max():.0f}%"
    assert len(lines) == 4
    surprisal = target.surprisal(tokens)
    shown = found.get("surprisal", "target")[:, 1:]
    assert (np.isnan(shown) == surprisal.isinf().numpy()).all()
    np.testing.assert_allclose(shown[surprisal.isfinite()], surprisal[surprisal.isfinite()], rtol=1e-5)
    assert "Infinity" not in str(found.to_json())


def test_without_a_subnetwork_or_a_target_there_is_the_full_model(tiny_model, random_tokens):
    found = passages(tiny_model, random_tokens, target=bc.NextTokenTarget(), count=9, length=99)
    assert found.conditions == ("full",)
    assert found.values.shape == (1, 1, 6, 16)
    with pytest.raises(ValueError, match="at least 1, not 0, 64 and 3"):
        passages(tiny_model, random_tokens, count=0)
    with pytest.raises(ValueError, match="token ids must be 0 to 256"):
        passages(tiny_model, random_tokens + 200)
    with pytest.raises(ValueError, match="vocabulary of 5"):
        passages(tiny_model, random_tokens, target=bc.count_ngrams(random_tokens % 5, 2, d_vocab=5))


def test_next_tokens_are_the_most_likely_after_each_prompt(tiny_model, random_tokens):
    target = bc.count_ngrams(random_tokens, 2, d_vocab=257)
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    prompts = ["a", "longer"]
    found = next_tokens(tiny_model, some, prompts, target=target, top_k=3)
    assert found.conditions == ("full", "subnetwork", "complement", "random", "target")
    assert (found.rows, found.columns) == (("a", "longer"), ("1", "2", "3"))
    for row, prompt in enumerate(prompts):
        tokens = tiny_model.to_tokens(prompt)
        with torch.no_grad(), bc.masked(tiny_model, some):
            probs = tiny_model(tokens)[0, -1].softmax(-1)
        for name, wanted in (("subnetwork", probs), ("target", target.log_probs(tokens)[0, -1].exp())):
            top = wanted.topk(3)
            np.testing.assert_allclose(found.get("probability", name)[row], top.values, rtol=1e-5)
        shown = found.text[1][row]
        assert list(shown) == [token_word(tiny_model, int(token)) for token in probs.topk(3).indices]
    assert next_tokens(tiny_model, prompts).conditions == ("full",)
    for wrong in ("a", []):
        with pytest.raises(ValueError, match="a list of texts"):
            next_tokens(tiny_model, wrong)
    with pytest.raises(ValueError, match="from 1 to 257, not 0"):
        next_tokens(tiny_model, prompts, top_k=0)


# --- by current token ---


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
    found = faithfulness_by_token(tiny_model, some, TEXT, target=target, most=3, min_count=2)
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

    with pytest.raises(ValueError, match="needs the target's entropy, but NoEntropy has none"):
        faithfulness_by_token(tiny_model, TEXT, target=NoEntropy())
