"""Passages: surprisals are the model's own, and what was expected is what it predicted one token before."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis import next_tokens, passages
from bigram_circuits.analysis.prompts import token_word


def test_surprisals_and_expectations_are_the_models(tiny_model, random_tokens):
    target = bc.count_ngrams(random_tokens[:3], 2, d_vocab=257)
    some = bc.Subnetwork.full(tiny_model).drop_layer(1)
    found = passages(tiny_model, random_tokens, some, target=target, count=2, length=10)
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
    found = next_tokens(tiny_model, prompts, some, target=target, top_k=3)
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
