"""Every analysis on every architecture: what must hold for each, and which models an analysis refuses, in one line.

Refused, because a lens reads logits from the residual stream with a final norm and W_U alone:
- `opt` here has the build of OPT-350m: norms after each part and none at the end, a projection before the unembedding,
  and embeddings narrower than the residual stream, which therefore have no cosine with it either.
- `openai_gpt` (GPT-1) has no final norm either, and its last block's residual stream is not shown.
"""

import numpy as np
import pytest
import torch
from transformers import OPTConfig

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.conditions import reduced_to
from bigram_circuits.measures.statistics import surprisals
from bigram_circuits.models.activations import readout, record, residual_streams
from tests.architectures import CONFIGS, each
from tests.conftest import D_VOCAB, save_tiny

OPT_125M = OPTConfig(
    vocab_size=D_VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=40,
    max_position_embeddings=64, word_embed_proj_dim=24, pad_token_id=0,
)  # fmt: skip
NAMES = [*CONFIGS, "opt_125m"]
NO_LENS = {"opt": "with a final norm and W_U alone", "openai_gpt": "exposes its residual stream at 2 of the 3 points"}
NO_COSINE = {"opt": "needs vectors of the same width", "openai_gpt": NO_LENS["openai_gpt"]}
NO_STREAMS = {"openai_gpt": NO_LENS["openai_gpt"]}
NO_ATTRIBUTION = {"opt": NO_LENS["opt"], "openai_gpt": r"does not reach the activation blocks\.1\.hook_resid_post"}

NO_EXPLANATION = {
    "opt": "block 0 of this model does not add what its attention and MLP write",
    "openai_gpt": "does not reach the activation blocks.0.hook_resid_post",
}

RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, D_VOCAB, (6, 8))
PROMPT = torch.from_numpy(TOKENS[0])
TARGET = bc.count_ngrams(RANDOM.integers(0, D_VOCAB, (2000, 32)), d_vocab=D_VOCAB)
PARTS = ["L0H1", "L1N[1,5]", "L0.attn", "L1.mlp"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=each(NAMES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, tmp_path_factory):
    config = CONFIGS[name]() if name in CONFIGS else OPT_125M
    loaded = bc.load_model(save_tiny(tmp_path_factory.mktemp(name), config), device="cpu")
    before = bc.weight_hash(loaded), hooks_on(loaded), len(list(loaded.modules()))
    yield loaded
    assert (bc.weight_hash(loaded), hooks_on(loaded), len(list(loaded.modules()))) == before
    assert not loaded.training


def hooks_on(model):
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in model.hook_dict.values())


@pytest.fixture(scope="module")
def half(model):
    generator = torch.Generator().manual_seed(1)
    shapes = bc.Subnetwork.full(model).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})


def refused(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def logits_of(model, kept=None):
    with torch.no_grad(), reduced_to(model, kept):
        return model(torch.from_numpy(TOKENS))


def test_the_last_layer_of_the_logit_lens_is_the_model(name, model, half):
    calls = [
        lambda: analysis.logit_lens(model, half, TOKENS, target=TARGET),
        lambda: analysis.logit_lens(model, half, PROMPT),
        lambda: analysis.logit_lens(model, "the cat"),
    ]
    if name in NO_LENS:
        for call in calls:
            refused(call, NO_LENS[name])
        return
    corpus, prompt, text = (call() for call in calls)
    for condition, kept in (("full", None), ("subnetwork", half), ("complement", ~half)):
        last = {quantity.name: corpus.get(quantity.name, condition)[-1] for quantity in corpus.quantities}
        assert last["kl"] == pytest.approx(0, abs=1e-5)
        assert last["output_correlation"] == pytest.approx(1, abs=1e-6)
        assert last["top1_agreement"] == 1
        logits = logits_of(model, kept)
        own = surprisals(logits, torch.from_numpy(TOKENS))
        assert last["mean_surprisal"] == pytest.approx(own.mean().item(), rel=1e-5)
        theirs = TARGET.surprisal(TOKENS)
        used = torch.isfinite(theirs)
        r = np.corrcoef(own[used].numpy(), theirs[used].numpy())[0, 1]
        assert last["surprisal_correlation"] == pytest.approx(r, abs=1e-5)
        np.testing.assert_allclose(prompt.get("kl", condition)[-1], 0, atol=1e-5)
        np.testing.assert_allclose(prompt.get("probability", condition)[-1], logits[0].softmax(-1).amax(-1), rtol=1e-4)
    assert (corpus.get("kl")[:-1] > 1e-4).all()
    assert corpus.points == prompt.rows == ("embed", "0", "1")
    assert len(text.columns) == len(model.to_tokens("the cat")[0])


def test_the_affine_lens_is_the_model_at_the_last_layer_and_finds_the_input_at_the_first(name, model, half):
    def call():
        return analysis.affine_lens(model, np.tile(TOKENS, (2, 1)), target=TARGET, alpha=1e-6)

    if name in NO_LENS:
        refused(call, NO_LENS[name])
        return
    found = call()
    for condition in found.conditions:
        assert found.get("output_correlation", condition)[-1] == pytest.approx(1, abs=1e-3)
        assert found.get("kl", condition)[-1] == pytest.approx(0, abs=1e-3)
        recalls = [found.get(f"recall_at_{k}", condition) for k in (1, 5, 10)]
        assert (np.diff(recalls, axis=0) >= 0).all()
    assert np.isfinite(found.get("kl")).all()


def test_the_fit_of_the_affine_maps_is_numpy_s_ridge(name, model, half):
    """On the model's own streams, with the intercept and the penalty as rows of a least-squares problem."""
    if name in NO_STREAMS:
        refused(lambda: analysis.fit_affine_lens(model, TOKENS), NO_STREAMS[name])
        return
    maps = analysis.fit_affine_lens(model, half, TOKENS, alpha=0.5)
    for condition, kept in (("full", None), ("subnetwork", half)):
        with torch.no_grad(), reduced_to(model, kept):
            streams = residual_streams(model, torch.from_numpy(TOKENS))[0].flatten(1, 2).double().numpy()
        embedded = model.W_E.detach()[TOKENS.ravel()].double().numpy()
        for layer in (0, 1):
            for wanted, weight, bias in (
                (streams[-1], maps[condition].output_weight[layer], maps[condition].output_bias[layer]),
                (embedded, maps[condition].input_weight[layer], maps[condition].input_bias[layer]),
            ):
                predicted = streams[layer] @ weight.double().numpy() + bias.double().numpy()
                np.testing.assert_allclose(predicted, ridge(streams[layer], wanted, 0.5), atol=2e-3, rtol=2e-3)


def ridge(x, y, alpha):
    """Fitted values of ridge regression with an intercept that is not penalised."""
    penalty = np.concatenate([np.zeros((x.shape[1], 1)), np.sqrt(alpha) * np.eye(x.shape[1])], 1)
    rows = np.concatenate([np.ones((len(x), 1)), x], 1)
    solution = np.linalg.lstsq(
        np.concatenate([rows, penalty]), np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None
    )[0]
    return rows @ solution


def test_cosines_are_those_of_torch(name, model, half):
    calls = [
        lambda: analysis.cosine_to_unembedding(model, half, TOKENS, target=TARGET),
        lambda: analysis.cosine_to_unembedding(model, half, PROMPT, target=TARGET),
    ]
    if name in NO_COSINE:
        for call in calls:
            refused(call, NO_COSINE[name])
        return
    corpus, prompt = (call() for call in calls)
    tokens = torch.from_numpy(TOKENS)
    for condition, kept in (("full", None), ("complement", ~half)):
        with torch.no_grad(), reduced_to(model, kept):
            streams, logits = residual_streams(model, tokens)
            wanted = {
                "current_embedding": model.W_E[tokens],
                "predicted_unembedding": model.W_U.T[logits.argmax(-1)],
                "target_unembedding": model.W_U.T[TARGET.top1(tokens)],
            }
        for quantity, vectors in wanted.items():
            cosine = torch.cosine_similarity(streams, vectors[None], dim=-1)
            np.testing.assert_allclose(corpus.get(quantity, condition), cosine[:, :, :-1].mean((1, 2)), atol=1e-5)
            np.testing.assert_allclose(prompt.get(quantity, condition), cosine[:, 0], atol=1e-5)


def test_the_last_layer_does_not_turn_and_is_like_itself(name, model, half):
    if name in NO_STREAMS:
        refused(lambda: analysis.layer_rotations(model, half, TOKENS), NO_STREAMS[name])
        refused(lambda: analysis.covariance_similarity(model, half, TOKENS), NO_STREAMS[name])
        return
    turned = analysis.layer_rotations(model, half, TOKENS, alpha=1e-6)
    np.testing.assert_allclose(turned.get("output_angle")[-1], 0, atol=1)
    assert turned.get("output_angle")[0] > 1
    assert np.isnan(turned.get("input_angle")).all() == (name == "opt")  # its embedding is narrower
    alike = analysis.covariance_similarity(model, half, TOKENS)
    for condition in ("full", "subnetwork"):
        matrix = alike.get("cka", condition)
        np.testing.assert_allclose(np.diagonal(matrix), 1, atol=1e-5)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-5)
    assert alike.get("cka", "full (rows) and subnetwork")[0, 0] == pytest.approx(1, abs=1e-5)


def test_ablating_by_hooks_is_ablating_by_masks_and_every_part_matters(model, half):
    found = {
        "zero": analysis.ablate(model, PARTS, half, TOKENS, by="zero", target=TARGET, seeds=1),
        "mean": analysis.ablate(model, PARTS, TOKENS, by="mean", seeds=0),
        "resample": analysis.ablate(model, PARTS, TOKENS, by="resample", seeds=0),
        "weights": analysis.ablate(model, PARTS, half, TOKENS, by="weights", seeds=0),
    }
    loss = surprisals(logits_of(model), torch.from_numpy(TOKENS)).mean().item()
    for by, result in found.items():
        assert result.notes["loss_before"]["full"] == pytest.approx(loss, rel=1e-5)
        for end in ("", "_in_subnetwork") if by in ("zero", "weights") else ("",):
            rises = result.get(f"rise_in_loss{end}")
            assert all(abs(rise) > 1e-6 for rise in rises.values()), (by, rises)
            assert all(np.isfinite(list(rises.values())))
    masks = dict(bc.Subnetwork.full(model))
    for layer_matrix, index in (("0.attn.W_O", [1]), ("1.mlp.W_out", [1, 5])):
        changed = {**masks, f"blocks.{layer_matrix}": masks[f"blocks.{layer_matrix}"].clone()}
        changed[f"blocks.{layer_matrix}"][index] = False
        masked_loss = surprisals(logits_of(model, bc.Subnetwork(changed)), torch.from_numpy(TOKENS)).mean()
        part = "L0H1" if "attn" in layer_matrix else "L1N[1,5]"
        assert found["zero"].get("loss")[part] == pytest.approx(masked_loss.item(), rel=1e-5)


def test_a_part_that_was_taken_out_is_sufficient_when_it_is_put_back(model):
    task = analysis.repeated_random_tokens(model, prompts=4, period=4)
    base = bc.Subnetwork.full(model).drop_neurons(1, [1, 5])
    found = analysis.sufficiency(model, base, ["L1N[1,5]", "L0.mlp"], task, seeds=1)
    assert found.get("loss")["L1N[1,5]"] == pytest.approx(found.notes["loss_of_full"], rel=1e-6)
    assert found.get("loss")["L0.mlp"] == found.notes["loss_of_base"]
    assert found.notes["loss_of_base"] != pytest.approx(found.notes["loss_of_full"], rel=1e-7)


@pytest.mark.parametrize("by", ["component", "head"])
def test_attributions_add_up_to_the_logits(name, model, half, by):
    def call():
        return analysis.logit_attribution(model, half, PROMPT, answer=80, wrong=70, by=by)

    if name in NO_ATTRIBUTION:
        refused(call, NO_ATTRIBUTION[name])
        return
    found = call()
    for condition, kept in (("full", None), ("subnetwork", half), ("complement", ~half)):
        with torch.no_grad(), reduced_to(model, kept):
            streams, logits = residual_streams(model, PROMPT[None])
            raw = model.unembed(model.ln_final(streams[-1]))[0, -1, [80, 70]]
            torch.testing.assert_close(readout(model, streams[-1]), logits, atol=1e-5, rtol=1e-5)
        added = found.get("contribution", condition).sum(0)
        np.testing.assert_allclose(added[:2], raw, atol=1e-4)
        assert added[2] == pytest.approx(float(raw[0] - raw[1]), abs=1e-4)


def test_explanations_add_up_to_the_logits_and_nothing_stays_whole(name, model, half):
    if name in NO_EXPLANATION:
        refused(lambda: bc.explain(model, half, PROMPT), NO_EXPLANATION[name])
        return
    found = bc.explain(model, half, PROMPT, 80, nodes=12, edges=10**5, paths=5)
    with torch.no_grad(), reduced_to(model, half):
        streams, _ = residual_streams(model, PROMPT[None])
        raw = float(model.unembed(model.ln_final(streams[-1]))[0, -1, 80])
    assert found.value == pytest.approx(raw, abs=1e-4)
    assert sum(found.terms.values()) == pytest.approx(raw, abs=1e-4)
    assert "whole" not in found.notes
    into = {node.key: node.unseen for node in found.nodes}
    for edge in found.edges:
        into[edge.target] += edge.flow
    for node in found.nodes:
        if node.kind in ("neuron", "head", "answer"):
            assert into[node.key] == pytest.approx(node.flow, abs=1e-4), node.key
    assert sum(path.value for path in found.paths) + found.left_out == pytest.approx(raw, abs=1e-4)


def test_attention_goes_backwards_and_its_shares_are_1(model, half):
    found = analysis.attention_patterns(model, half, PROMPT)
    assert len(found.conditions) == 4 * 2 * model.cfg.n_heads
    np.testing.assert_allclose(found.values.sum(-1), 1, atol=1e-5)
    assert (np.triu(found.values, 1) == 0).all()
    assert not np.allclose(found.get("attention", "full L1H0"), found.get("attention", "subnetwork L1H0"), atol=1e-4)


def test_the_tokens_that_excite_a_neuron_are_those_of_its_activations(model, half):
    found = analysis.max_activating_tokens(model, [(0, 1), (1, 2)], half, TOKENS, min_count=1, k=2)
    for condition, kept in (("full", None), ("subnetwork", half)):
        with torch.no_grad(), reduced_to(model, kept):
            seen, _ = record(model, torch.from_numpy(TOKENS), [f"blocks.{layer}.mlp.hook_post" for layer in (0, 1)])
        for row, (layer, neuron) in enumerate([(0, 1), (1, 2)]):
            activation = seen[f"blocks.{layer}.mlp.hook_post"][..., neuron].numpy().ravel()
            means = [activation[TOKENS.ravel() == token].mean() for token in np.unique(TOKENS)]
            wanted = sorted(means, reverse=True)[:2]
            np.testing.assert_allclose(found.get("mean_activation", condition)[row], wanted, atol=1e-5)
