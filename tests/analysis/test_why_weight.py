"""What single weights serve: on planted bigrams, where it is known, and against NumPy."""

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.why_weight import predicate_of
from tests.conftest import D_VOCAB, planted_circuit

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (6, 10))


@pytest.fixture(scope="module")
def planted():
    return planted_circuit("gpt2", distractors=0.0)


def test_the_weights_of_a_planted_neuron_serve_its_token(planted):
    """Without W_in[j, j], neuron j is silent and all logits after token j are 0, and after other tokens as before."""
    text = planted.corpus.train[:40]
    tested = text[1::2]
    for token in (3, 11):
        found = analysis.why_weight(
            planted.model, ("blocks.0.mlp.W_in", (token, token)), planted.circuit, planted.target, text
        )
        assert found.scores.names == (f"blocks.0.mlp.W_in[{token}, {token}]",)
        assert found.verdicts == ("serves",)
        (predicate,) = found.predicates
        assert [share for _, share in predicate] == pytest.approx([1.0], abs=1e-4)
        p = planted.probs[token].numpy()
        rise = np.log(len(p)) + (p * np.log(p)).sum()  # CE of the uniform distribution, less the entropy
        share = (tested == token).mean()
        scores = found.to_dataframe().iloc[0]
        assert scores["effect"] == pytest.approx(rise * share, rel=1e-4)
        assert scores["recovery"] == pytest.approx(1, abs=1e-4)
        assert scores["inverse"] == pytest.approx(0, abs=1e-4)
        assert scores["positions"] == pytest.approx(share)
        assert scores["beaten"] > 0.8  # a random set may be the token itself
        assert scores["random_recovery"] < 0.3


def test_one_successor_of_two_tokens(planted):
    """Weights that write a successor: each serves the token of its neuron; given together, one row each."""
    writes = [(int(row), int(column)) for row, column in planted.circuit["blocks.0.mlp.W_out"].nonzero()[[0, 50]]]
    found = analysis.why_weight(
        planted.model,
        [("blocks.0.mlp.W_out", place) for place in writes],
        planted.circuit,
        planted.target,
        planted.corpus,
    )
    words = analysis.prompts.token_words(planted.model, [row for row, _ in writes])
    assert [[word for word, _ in predicate] for predicate in found.predicates] == [[word] for word in words]
    assert found.scores.values[1] == pytest.approx(1, abs=1e-3)
    assert len(found) == 2


def test_a_weight_that_does_nothing_has_no_effect(planted):
    found = analysis.why_weight(planted.model, ("blocks.1.mlp.W_in", (0, 0)), planted.target, planted.corpus.train[:8])
    assert found.verdicts == ("no effect",)
    assert found.predicates == ((),)
    assert found.scores.get("effect") == {"blocks.1.mlp.W_in[0, 0]": 0.0}
    assert np.isnan(found.scores.values[[1, 2, 4, 5]]).all()
    assert "no effect" in found._repr_html_()


def test_a_weight_that_does_harm(planted):
    """Where the target is the opposite of the planted bigram, its weights are harmful."""
    probs = planted.probs.roll(5, 0)
    target = bc.NGramTable.from_probs(probs)
    found = analysis.why_weight(
        planted.model, ("blocks.0.mlp.W_in", (3, 3)), planted.circuit, target, planted.corpus.train[:24]
    )
    assert found.verdicts == ("harms",)
    assert found.scores.values[0, 0] < 0
    assert np.isnan(found.scores.values[1, 0])


@pytest.mark.parametrize("name", ["blocks.0.attn.W_V", "blocks.1.mlp.W_out"])
def test_numbers_are_those_of_numpy(any_model, name):
    """Losses with and without the weight from the masked models, everything else again."""
    target = bc.count_ngrams(TEXT, d_vocab=D_VOCAB)
    kept = bc.Subnetwork.full(any_model).random_like()
    shape = kept.shapes[name]
    index = tuple(int(at) for at in np.argwhere(np.ones(shape))[np.prod(shape) // 3])
    found = analysis.why_weight(any_model, (name, index), kept, target, TEXT, most=0.5)

    def losses(mask):
        with bc.masked(any_model, mask), torch.no_grad():
            log_probs = any_model(torch.from_numpy(TEXT)).log_softmax(-1).double().numpy()
        wanted = target.log_probs(torch.from_numpy(TEXT)).double().exp().numpy()
        return -(wanted * log_probs).sum(-1)

    masks = {key: kept[key].clone() for key in kept}
    masks[name][index] = False
    effects = losses(bc.Subnetwork(masks)) - losses(kept)
    chosen, tested = effects[::2], effects[1::2]
    by_token = {token: chosen[TEXT[::2] == token].sum() for token in np.unique(TEXT[::2])}
    positive = sorted(((value, token) for token, value in by_token.items() if value > 0), reverse=True)
    total, held, tokens = sum(value for value, _ in positive), 0.0, []
    for value, token in positive:
        if held >= 0.5 * total:
            break
        held, tokens = held + value, [*tokens, token]
    inside = np.isin(TEXT[1::2], tokens)
    assert found.scores.values[0, 0] == pytest.approx(tested.mean(), rel=1e-3, abs=1e-6)
    assert found.scores.values[3, 0] == pytest.approx(inside.mean())
    words = analysis.prompts.token_words(any_model, [int(token) for token in tokens])
    assert [word for word, _ in found.predicates[0]] == words
    if found.verdicts[0] == "serves":
        assert found.scores.values[1, 0] == pytest.approx(tested[inside].sum() / tested.sum(), rel=1e-2)


def test_the_strongest_weights(any_model):
    """By |weight x gradient| on every other sequence, from autograd on the weights themselves."""
    target = bc.count_ngrams(TEXT, d_vocab=D_VOCAB)
    found = analysis.why_weight(any_model, 3, target, TEXT, draws=2)
    logits = any_model(torch.from_numpy(TEXT[::2]))
    loss = target.cross_entropy(logits, torch.from_numpy(TEXT[::2])).sum()
    sites = bc.weight_sites(any_model)
    scores = {}
    for site, gradient in zip(sites, torch.autograd.grad(loss, [site.original for site in sites]), strict=True):
        product = site.from_stored(gradient * site.original.detach()).abs().numpy()
        for place in np.argsort(-product, axis=None)[:3]:
            index = tuple(int(at) for at in np.unravel_index(place, product.shape))
            scores[f"{site.name}[{', '.join(map(str, index))}]"] = product[index]
    assert list(found.scores.names) == sorted(scores, key=lambda name: -scores[name])[:3]


def test_predicates():
    tokens, shares = predicate_of(np.array([0.0, 3.0, -9.0, 1.0, 6.0]), 0.8)
    assert (tokens.tolist(), shares.tolist()) == ([4, 1], pytest.approx([0.6, 0.3]))
    assert predicate_of(np.array([0.0, 3.0, 1.0, 6.0]), 0.6)[0].tolist() == [3]
    assert predicate_of(np.array([0.0, 3.0, 1.0, 6.0]), 1.0)[0].tolist() == [3, 1, 2]
    assert predicate_of(np.array([0.0, -1.0]), 0.5)[0].tolist() == []


def test_it_is_shown(planted):
    found = analysis.why_weight(planted.model, 2, planted.circuit, planted.target, planted.corpus.train[:12], draws=5)
    table = found.to_dataframe()
    assert list(table["verdict"]) == ["serves", "serves"]
    assert {"recovery_low", "effect_high", "tokens"} <= set(table.columns)
    assert str(found).startswith("What single weights serve\n")
    assert found.plot().data
    assert "blocks.0.mlp.W_" in found._repr_html_()


def test_errors(planted):
    model, text = planted.model, planted.corpus.train[:8]

    def why(
        weight=("blocks.0.mlp.W_in", (3, 3)), subnetwork=planted.circuit, target=planted.target, text=text, **options
    ):
        return lambda: analysis.why_weight(model, weight, subnetwork, target, text, **options)

    for call, words in (
        (why(("blocks.0.mlp.W_up", (1, 1))), "there is no weight matrix 'blocks.0.mlp.W_up'"),
        (why(("blocks.0.mlp.W_in", (1, 999))), r"blocks.0.mlp.W_in has the shape .* and no weight \(1, 999\)"),
        (why(("blocks.0.mlp.W_in", (3,))), r"and no weight \(3,\)"),
        (why(("blocks.0.mlp.W_in", (3, 4))), r"blocks.0.mlp.W_in\[3, 4\] is not kept"),
        (why([("blocks.0.mlp.W_in", (3, 3))] * 2), "is asked for twice"),
        (why([]), "at least one weight"),
        (why(["L0N3"]), "a weight is given as its matrix and index, .* not 'L0N3'"),
        (why(0), "the number of weights must be from 1 to 120, the number kept, not 0"),
        (why(most=0), "most must be a share above 0, up to 1, not 0"),
        (why(draws=0), "draws must be at least 1, not 0"),
        (why(text=text[:3]), "4 sequences are needed, half of them to test on, not 3"),
        (why(target=None), "a target needs the methods"),
        (why(text=None), "type NoneType but should be"),
        (why(subnetwork=bc.Circuit.full(model)), "what a single weight serves is of weights"),
        (why(seed=-1), "a seed must be a whole number, 0 or more, not -1"),
        (lambda: analysis.why_weight("gpt2", 1, planted.target, text), "a str is not a model"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_targets_at_answers_alone_are_refused(tiny_model):
    task = bc.load_task([{"prompt": a, "answer": "c"} for a in "abde"], tokenizer=tiny_model.tokenizer)
    with pytest.raises(ValueError, match="some places of a sequence"):
        analysis.why_weight(tiny_model, 1, bc.TaskTarget(task), task.tokens)
