import numpy as np
import pytest
import torch

import bigram_circuits as bc


@pytest.fixture
def tokens(random_tokens):
    return torch.from_numpy(random_tokens)


@pytest.fixture
def logits(tokens):
    return torch.randn(*tokens.shape, 257, generator=torch.Generator().manual_seed(0), requires_grad=True)


def dense_numbers(log_probs, logits, tokens):
    return {
        "cross_entropy": -(log_probs.exp() * logits.log_softmax(-1)).sum(-1),
        "surprisal": -log_probs[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2),
        "entropy": -(log_probs.exp() * log_probs).sum(-1),
        "top1": log_probs.argmax(-1),
    }


def assert_is(target, expected, logits, tokens):
    torch.testing.assert_close(target.cross_entropy(logits, tokens), expected["cross_entropy"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(target.surprisal(tokens), expected["surprisal"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(target.entropy(tokens), expected["entropy"], atol=1e-4, rtol=1e-4)
    assert torch.equal(target.top1(tokens), expected["top1"])
    (ours,) = torch.autograd.grad(target.cross_entropy(logits, tokens).sum(), logits)
    (theirs,) = torch.autograd.grad(expected["cross_entropy"].sum(), logits, retain_graph=True)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_model_target_is_the_full_models_distribution_also_while_it_is_masked(any_model, tokens, logits):
    with torch.no_grad():
        log_probs = any_model(tokens).log_softmax(-1)
    expected = dense_numbers(log_probs, logits, tokens)
    assert_is(bc.ModelTarget(any_model), expected, logits, tokens)
    with bc.masked(any_model, bc.Subnetwork.empty(any_model)):
        masked_logits = any_model(tokens)
        assert_is(bc.ModelTarget(any_model), expected, logits, tokens)
        assert torch.equal(any_model(tokens), masked_logits)  # the mask is on again
        assert not torch.allclose(masked_logits.log_softmax(-1), log_probs)


def test_the_full_model_reproduces_itself_exactly(tiny_model, tokens):
    full = bc.evaluate(tiny_model, bc.Subnetwork.full(tiny_model), bc.ModelTarget(tiny_model), tokens, controls=False)
    assert full.subnetwork.surprisal_correlation == pytest.approx(1, abs=1e-6)
    assert full.subnetwork.kl == pytest.approx(0, abs=1e-5)
    assert full.subnetwork.top1_agreement == 1


def test_the_next_token_target_is_the_language_models_loss(tiny_model, tokens, logits):
    target = bc.NextTokenTarget()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert target.cross_entropy(logits, tokens).mean().item() == pytest.approx(expected.item(), rel=1e-5)
    found = bc.evaluate(tiny_model, bc.Subnetwork.full(tiny_model), target, tokens, controls=False).subnetwork
    assert found.cross_entropy == pytest.approx(found.mean_surprisal, rel=1e-5)
    assert found.kl == found.cross_entropy
    assert np.isnan(found.surprisal_correlation)
    best = tiny_model(tokens)[:, :-1].argmax(-1)
    assert found.top1_agreement == pytest.approx((best == tokens[:, 1:]).float().mean().item())


def test_the_induced_bigram_is_the_mean_prediction_given_the_token(tiny_model, tokens, logits):
    small = tokens % 20  # so that tokens recur
    with torch.no_grad():
        probs = tiny_model(small).softmax(-1)
    table = probs.flatten(0, 1).mean(0).repeat(257, 1)
    for token in range(20):
        table[token] = probs[small == token].mean(0)
    target = bc.InducedTarget(tiny_model, small.numpy())
    assert_is(target, dense_numbers(table[small].log(), logits, small), logits, small)
    with bc.masked(tiny_model, bc.Subnetwork.empty(tiny_model)):  # fitted on the full model all the same
        again = bc.InducedTarget(tiny_model, small.numpy())
    torch.testing.assert_close(again.log_probs(small), target.log_probs(small))
    torch.testing.assert_close(target.log_probs(torch.tensor([[200]]))[0, 0].exp(), table[200])
    few = bc.InducedTarget(tiny_model, small.numpy(), max_contexts=1)
    most = int(torch.bincount(small.flatten()).argmax())
    other = (most + 1) % 20
    torch.testing.assert_close(few.log_probs(torch.tensor([[most, other]]))[0].exp(), table[[most, 200]])


def test_an_induced_bigram_too_large_for_memory_is_refused(tiny_model, random_tokens, monkeypatch):
    with pytest.raises(ValueError, match="there are no tokens"):
        bc.InducedTarget(tiny_model, random_tokens[:0])
    for size in ("d_vocab", "d_vocab_out"):
        monkeypatch.setattr(tiny_model.cfg, size, 10**7)
    with pytest.raises(ValueError, match="GB, more than 2: give max_contexts="):
        bc.InducedTarget(tiny_model, random_tokens)


@pytest.mark.parametrize("kind", ["model", "next", "induced"])
def test_a_subnetwork_can_be_learned_for_every_target(tiny_model, random_tokens, kind):
    corpus = bc.Corpus.from_tokens(np.tile(random_tokens, (4, 1)), random_tokens)
    target = {
        "model": lambda: bc.ModelTarget(tiny_model),
        "next": bc.NextTokenTarget,
        "induced": lambda: bc.InducedTarget(tiny_model, corpus.train),
    }[kind]()
    config = bc.SparsifyConfig(sparsity_weight=0.3, max_steps=40, batch_size=8, learning_rate=0.1, beta_growth=1.1)
    found = bc.find_subnetwork(tiny_model, target, corpus, config).subnetwork
    learned = bc.evaluate(tiny_model, found, target, corpus.held_out)
    assert learned.subnetwork.cross_entropy < min(random.cross_entropy for random in learned.random)
