"""TransformerLens' own models (`boot_native`), with and without MLP, norms, rotary embeddings and causal attention.

What holds for Hugging Face models must hold for them: hooks and masks agree, lenses end at the logits, attributions add
up, copies differ only where they should.
"""

import numpy as np
import pytest
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native import NativeModel, initialize_native_model

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.models.activations import NotShownError

pytestmark = pytest.mark.usefixtures("one_thread")

D_VOCAB = 37
SIZES = {"n_layers": 2, "d_model": 24, "d_head": 6, "n_heads": 4, "n_ctx": 16, "d_vocab": D_VOCAB, "d_mlp": 40}
PLAIN = {**SIZES, "act_fn": "gelu", "seed": 0, "initializer_range": 0.3}
KINDS = {
    "LN": {"output_logits_soft_cap": 5.0, "attn_scores_soft_cap": 5.0},
    "attention only": {"attn_only": True, "normalization_type": None},
    "LNPre": {"normalization_type": "LNPre", "act_fn": "solu_ln"},
    "RMS": {
        "normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "n_key_value_heads": 2,
        "positional_embedding_type": "rotary", "rotary_dim": 4,
    },
    "bidirectional": {"attention_dir": "bidirectional", "d_head": 5, "final_rms": True},
    "values": {"d_vocab_out": 11},
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, D_VOCAB, (6, 12))


def module(**options):
    cfg = TransformerBridgeConfig(**PLAIN | {"normalization_type": "LN"} | options)
    plain = NativeModel(cfg)
    initialize_native_model(plain, cfg)
    with torch.no_grad():
        for parameter in plain.parameters():  # also biases and norms
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return plain.eval()


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def plain(kind):
    return module(**KINDS[kind])


@pytest.fixture(scope="module")
def model(plain):
    loaded = bc.load_model(plain)
    before = bc.weight_hash(loaded)
    yield loaded
    assert bc.weight_hash(loaded) == before


@pytest.fixture(scope="module")
def half(model):
    generator = torch.Generator().manual_seed(1)
    shapes = bc.Subnetwork.full(model).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS))


def test_it_computes_what_the_plain_module_does_masked_or_not(kind, plain, model, half):
    torch.testing.assert_close(logits_of(model), logits_of(plain), atol=1e-5, rtol=1e-5)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    try:
        for name, mask in half.to_huggingface(model).items():
            plain.state_dict()[name].mul_(mask)
        with bc.masked(model, half):
            # the tensors are shared, so the plain module's are masked twice
            torch.testing.assert_close(logits_of(model), logits_of(plain), atol=1e-5, rtol=1e-5)
    finally:
        plain.load_state_dict(state)
    assert ("mlp" in {component for _, component in half.by_component()}) == ("attention only" not in kind)
    with pytest.raises(ValueError, match=r"has no W_out|there is no neuron 99"):
        half.add_neurons(0, [99])


def test_a_mask_is_found_and_evaluated(kind, model):
    corpus = bc.Corpus.from_tokens(TOKENS, TOKENS[::-1])
    target = bc.ModelTarget(model)
    config = bc.SparsifyConfig(max_steps=2, batch_size=2, granularity="block")
    found = bc.find_subnetwork(model, target, corpus, config, check_memory="off").subnetwork
    measured = bc.evaluate(model, found, target, TOKENS, seeds=1)
    assert measured.full.kl == pytest.approx(0, abs=1e-6)
    assert np.isnan(measured.full.mean_surprisal) == (kind == "values")
    warned = "\n".join(bc.check_inputs(model, target, corpus).warnings)
    assert ("attends to later tokens" in warned) == (kind == "bidirectional")


def test_hooks_masks_lenses_and_attributions_agree(kind, model, half):
    if kind == "values":
        for call in (
            lambda: analysis.logit_lens(model, half, TOKENS),
            lambda: analysis.cosine_to_unembedding(model, half, TOKENS),
            lambda: analysis.logit_attribution(model, half, TOKENS[0]),
            lambda: analysis.ablate(model, "heads", half, TOKENS),
            lambda: analysis.passages(model, half, None, TOKENS),
        ):
            with pytest.raises(NotShownError, match="11 outputs are not the 37 tokens that it reads"):
                call()
        return
    parts = ["L0H1", "L1.attn"] if "attention only" in kind else ["L0H1", "L1.attn", "L1N[1,5]", "L0.mlp"]
    by_hooks = analysis.ablate(model, parts, half, TOKENS, by="zero", seeds=0)
    masks = dict(bc.Subnetwork.full(model))
    for name, rows, part in (("blocks.0.attn.W_O", [1], "L0H1"), ("blocks.1.mlp.W_out", [1, 5], "L1N[1,5]")):
        if part in parts:
            changed = {**masks, name: masks[name].clone()}
            changed[name][rows] = False
            alone = bc.evaluate(model, bc.Subnetwork(changed), bc.NextTokenTarget(), TOKENS, controls=False).subnetwork
            assert by_hooks.get("loss")[part] == pytest.approx(alone.mean_surprisal, rel=1e-5)
    lens = analysis.logit_lens(model, half, TOKENS)
    assert lens.get("kl", "subnetwork")[-1] == pytest.approx(0, abs=1e-5)
    found = analysis.logit_attribution(model, half, TOKENS[0], answer=3, by="head")
    assert ("L0.mlp" in found.rows) == ("attention only" not in kind)
    with torch.no_grad():
        raw = model.unembed.original_component(model.ln_final(analysis_stream(model)))[0, -1, 3]
    assert found.get("contribution", "full").sum(0)[0] == pytest.approx(raw.item(), abs=1e-4)


def analysis_stream(model):
    _, cache = model.run_with_cache(torch.from_numpy(TOKENS[:1]))
    return cache["blocks.1.hook_resid_post"]


def test_copies_differ_only_where_they_should(model):
    for copied in (bc.with_random_blocks(model), bc.with_shuffled_blocks(model)):
        assert torch.equal(copied.W_E, model.W_E)
        assert torch.equal(copied.W_U, model.W_U)
        for mine, theirs in zip(bc.weight_sites(model), bc.weight_sites(copied), strict=True):
            assert not torch.equal(mine.weight, theirs.weight)
    for mine, theirs in zip(bc.weight_sites(model), bc.weight_sites(copied), strict=True):
        assert torch.equal(mine.weight.flatten().sort()[0], theirs.weight.flatten().sort()[0])


def test_masks_are_exported_and_a_model_is_not(model, half, tmp_path):
    bc.export_masks(model, half, tmp_path / "masks.safetensors")
    assert bc.import_published(tmp_path / "masks.safetensors", model) == half
    with pytest.raises(ValueError, match="is not a Hugging Face model") as caught:
        bc.export_huggingface(model, half, tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_bridge_of_the_users_is_the_same_model(kind):
    cfg = TransformerBridgeConfig(**PLAIN | {"normalization_type": "LN"} | KINDS[kind])
    bridge = TransformerBridge.boot_native(cfg)
    same = bc.load_model(bridge)
    assert same is bridge
    plain = NativeModel(cfg)
    initialize_native_model(plain, cfg)
    assert bc.same_model(bc.weight_hash(bridge), bc.weight_hash(bc.load_model(plain)))
    copied = bc.with_shuffled_blocks(bridge)  # there is no plain model: it is built again
    assert torch.equal(copied.W_E, bridge.W_E)
    other = bc.load_model(module(**KINDS[kind]))
    assert not bc.same_model(bc.weight_hash(bridge), bc.weight_hash(other))


def test_settings_that_logits_depend_on_are_part_of_the_identity():
    hashes = {
        bc.weight_hash(bc.load_model(module(**options)))
        for options in ({}, {"act_fn": "relu"}, {"attention_dir": "bidirectional"}, {"eps": 1e-3})
    }
    assert len(hashes) == 4


def test_tasks_without_a_tokenizer_draw_from_all_tokens():
    model = bc.load_model(module(attn_only=True))
    task = analysis.repeated_random_tokens(model, prompts=4, period=6)
    assert task.tokens.shape == (4, 12)
    assert (task.tokens[:, :6] == task.tokens[:, 6:]).all()
    assert np.isfinite(analysis.ability(model, task).loss)
    with pytest.raises(ValueError, match="no tokenizer"):
        analysis.earlier_value(model)
    with pytest.raises(ValueError, match="no tokenizer: give token ids instead of text"):
        analysis.logit_lens(model, "the cat")
    with pytest.raises(ValueError, match="tokenizer is None, but text needs one"):
        bc.load_corpus(["a text"], tokenizer=model.tokenizer)


def test_analyses_of_a_model_without_mlps_are_left_out_with_the_reason():
    model = bc.load_model(module(attn_only=True))
    half = bc.Subnetwork.full(model).drop_head(0, 1)
    corpus = bc.Corpus.from_tokens(TOKENS, TOKENS[::-1])
    found = bc.analyze(model, half, bc.count_ngrams(TOKENS, d_vocab=D_VOCAB), corpus)
    for name in ("concentration", "whole_neurons", "max_activating_tokens"):
        assert found.left_out[name] == "this subnetwork has no MLP weights"
    assert {"ablation_components", "ablation_heads", "attribution", "logit_lens", "attention"} <= set(found.results)
    assert set(found.results["ablation_components"].names) == {"L0.attn", "L1.attn"}
    for part, said in (("L0.mlp", "layer 0 of this model has no MLP"), ("mlps", "none of the parts 'mlps'")):
        with pytest.raises(ValueError, match=said):
            analysis.ablate(model, part, tokens=TOKENS)
    whole = analysis.ablate(model, "L0", tokens=TOKENS, seeds=0).get("rise_in_loss")["L0"]
    assert whole == analysis.ablate(model, "L0.attn", tokens=TOKENS, seeds=0).get("rise_in_loss")["L0.attn"]
