"""Observables pulled back: against gradients of Hugging Face's own modules, and exactly where everything is linear."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.models.activations import NotShownError
from tests.architectures import CONFIGS
from tests.conftest import D_VOCAB, planted_circuit, save_tiny
from tests.models.test_native import module

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (3, 10))
PAIR = (70, 80)
HEAD, D_HEAD = 3, {"llama": 8, "gemma2": 8}
LLAMA = {
    "blocks": "model.layers", "final": "model.norm", "ln1": "input_layernorm", "ln2": "post_attention_layernorm",
    "v": "self_attn.v_proj", "o": "self_attn.o_proj",
}  # fmt: skip
WHERE = {
    "gpt2": {
        "blocks": "transformer.h", "final": "transformer.ln_f", "ln1": "ln_1", "ln2": "ln_2", "v": "attn.c_attn",
        "o": "attn.c_proj",
    },
    "gpt_neox": {
        "blocks": "gpt_neox.layers", "final": "gpt_neox.final_layer_norm", "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm", "v": "attention.query_key_value", "o": "attention.dense",
    },
    "llama": LLAMA,
    "olmo": LLAMA,
    "gemma2": LLAMA | {
        "ln2": "pre_feedforward_layernorm", "ln1_post": "post_attention_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    },
}  # fmt: skip


def ov(name: str, block: nn.Module, where: dict[str, str]) -> torch.Tensor:
    """W_V W_O of a head, [d_model, d_model], from the parameters of a Hugging Face block."""
    v, o = (block.get_submodule(where[key]).weight.double() for key in "vo")
    d, size = 24, D_HEAD.get(name, 6)
    head = slice(HEAD * size, (HEAD + 1) * size)
    if name == "gpt2":  # Conv1D: [in, out], queries, keys and values side by side
        return v[:, 2 * d :][:, head] @ o[head]
    if name == "gpt_neox":  # for each head its query, key and value
        return v.view(4, 3, size, d)[HEAD, 2].T @ o[:, head].T
    group = slice(HEAD // 2 * size, (HEAD // 2 + 1) * size)  # 4 heads share 2 values
    return v[group].T @ o[:, head].T


def linear_norm(norm: nn.Module, read: torch.Tensor, x: torch.Tensor, name: str, *, scaled: bool) -> torch.Tensor:
    centred = name in ("gpt2", "gpt_neox", "olmo")
    read, x = (one - one.mean(-1, keepdim=True) if centred else one for one in (read, x))
    scale = (
        read.square().mean(-1, keepdim=True) + getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5))
    ).sqrt()
    gain = getattr(norm, "weight", None)
    gain = 1.0 if gain is None else gain + 1 if name == "gemma2" else gain
    return x * gain / (scale if scaled else 1)


def what_parts_read(plain: nn.Module, name: str) -> dict[nn.Module, torch.Tensor]:
    """The input of every norm and of the second MLP of a Hugging Face model, [pos, d_model]."""
    where, read = WHERE[name], dict[nn.Module, torch.Tensor]()
    blocks = plain.get_submodule(where["blocks"])
    watched = [plain.get_submodule(where["final"]), blocks[1].mlp]
    watched += [block.get_submodule(where[key]) for block in blocks for key in where if key.startswith("ln")]
    handles = [
        one.register_forward_pre_hook(lambda part, given: read.__setitem__(part, given[0][0].detach()))
        for one in watched
    ]
    plain(torch.as_tensor(TEXT[:1]))
    for handle in handles:
        handle.remove()
    return read


def expected(plain: nn.Module, name: str, norms: str, read: dict[nn.Module, torch.Tensor]) -> np.ndarray:
    """The gradient of the difference of logits along L0H3 (from 2 to 7) and L1.mlp, by Hugging Face's modules."""
    where = WHERE[name]
    blocks = plain.get_submodule(where["blocks"])

    def through(part: nn.Module, change: torch.Tensor, at: int = 7) -> torch.Tensor:
        base = read[part][at]
        if part is blocks[1].mlp or norms == "true":
            return part((base + change)[None, None])[0, 0] - part(base[None, None])[0, 0]
        if norms == "ignored":
            return change
        return linear_norm(part, base, change, name, scaled=norms == "frozen")

    start = torch.zeros(24, dtype=torch.float64, requires_grad=True)
    change = through(blocks[0].get_submodule(where["ln1"]), start, 2) @ ov(name, blocks[0], where)
    if "ln1_post" in where:
        change = through(blocks[0].get_submodule(where["ln1_post"]), change)
    change = through(blocks[1].get_submodule(where["ln2"]), change)
    change = through(blocks[1].mlp, change)
    if "ln2_post" in where:
        change = through(blocks[1].get_submodule(where["ln2_post"]), change)
    change = through(plain.get_submodule(where["final"]), change)
    logits = plain.get_output_embeddings()(change[None])[0]
    return torch.autograd.grad(logits[PAIR[0]] - logits[PAIR[1]], start)[0].numpy()


def most(model: bc.Model) -> bc.Subnetwork:
    """A random seven tenths of the weights."""
    draw, shapes = torch.Generator().manual_seed(0), bc.Subnetwork.full(model).shapes
    return bc.Subnetwork({key: torch.rand(shape, generator=draw) < 0.7 for key, shape in shapes.items()})


@pytest.mark.parametrize("name", list(WHERE))
def test_a_direction_is_the_gradient_along_the_path(tmp_path, name):
    folder = save_tiny(tmp_path, CONFIGS[name]())
    model = bc.load_model(folder, device="cpu")
    masks = most(model).to_huggingface(model)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    for subnetwork in (None, most(model)):
        if subnetwork is not None:
            for key, parameter in plain.named_parameters():
                parameter.data *= masks.get(key, 1.0)
        read = what_parts_read(plain, name)
        for norms in ("frozen", "linear", "ignored", "true"):
            wanted = expected(plain, name, norms, read)
            found = analysis.pulled_back(
                model, PAIR, subnetwork, TEXT[0], through=["L1.mlp", "L0H3"], norms=norms, position=(2, 7, 7)
            )
            np.testing.assert_allclose(found.vector, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max(), err_msg=norms)
            assert (found.through, found.before, found.positions) == (("L0H3", "L1.mlp"), 0, 1)


# --- where everything is linear, it is exact ---


@pytest.fixture(scope="module")
def without_norms():
    """Attention alone, no norms: for given patterns, the logits are linear in the embeddings."""
    return bc.load_model(module(attn_only=True, normalization_type=None))


def test_without_norms_a_direction_is_the_head_s_own_contribution(without_norms):
    model, tokens = without_norms, torch.arange(3, 12)
    seen = analysis.attention_patterns(model, tokens, heads=[(1, 2)]).get("attention", "full L1H2")
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[None])
    written = analysis.logit_attribution(model, tokens, answer=5, wrong=7, by="head")
    contribution = written.get("contribution")[written.rows.index("L1H2"), 2]
    found = {
        norms: analysis.pulled_back(model, (5, 7), tokens, through="L1H2", norms=norms)
        for norms in ("frozen", "linear", "ignored", "true")
    }
    bias = model.blocks[1].attn.v.original_component.bias.detach().view(4, -1)[2]
    bias = bias @ model.blocks[1].attn.o.original_component.weight.detach().T.reshape(4, -1, 24)[2]
    constant = float(bias @ (model.W_U[:, 5] - model.W_U[:, 7]).detach())
    for direction in found.values():
        assert direction.agreement == pytest.approx(1, abs=1e-6)
        along = direction.value(cache["blocks.1.hook_resid_pre"][0]).numpy()
        assert float(seen[-1] @ along) + constant == pytest.approx(contribution, abs=1e-4)
    free = analysis.pulled_back(model, (5, 7), through="L1H2", norms="linear")
    np.testing.assert_allclose(free.vector, found["frozen"].vector, atol=1e-6)
    effect = analysis.norm_effect(model, (5, 7), np.array([[1, 2, 3], [4, 5, 6]]), through=["L0H0", "L1H2"])
    assert effect.values == pytest.approx(np.ones((3, 4)), abs=1e-5)


def test_the_direct_path_is_the_embedding_s_contribution(without_norms):
    written = analysis.logit_attribution(without_norms, [4, 9], answer=5)
    direct = analysis.pulled_back(without_norms, 5, through=(), norms="linear")
    assert (direct.before, direct.through, direct.name) == (2, (), "'5'")
    terms = dict(zip(written.rows, written.get("contribution")[:, 0], strict=True))
    embedding = without_norms.W_E[9].detach() + without_norms.pos_embed.W_pos[1].detach()
    assert float(direct.value(embedding)) == pytest.approx(
        sum(terms[name] for name in ("embed", "pos_embed") if name in terms), abs=1e-5
    )
    np.testing.assert_allclose(direct.vector, without_norms.W_U[:, 5].detach().numpy(), atol=1e-6)


def test_a_planted_bigram_is_read_from_its_direction():
    planted = planted_circuit("gpt2", distractors=0.0)
    for token in (3, 11):
        found = analysis.pulled_back(planted.model, token, planted.circuit, planted.corpus.train[:8], through="L0.mlp")
        before = set(planted.probs[:, token].topk(4).indices.tolist())
        table = found.to_dataframe()
        assert set(table["id"][:4]) == before
        assert [word for word, _ in found.top_tokens(4)] == list(table["token"][:4])
        assert table["value"][0] == pytest.approx(table["cosine"][0] * np.linalg.norm(found.vector))


# --- parts add up ---


def test_neurons_add_up_to_their_mlp(tiny_model):
    options = {"position": 4, "norms": "true"}
    whole = analysis.pulled_back(tiny_model, PAIR, TEXT[0], through="L1.mlp", **options)
    parts = ["L1N[" + ",".join(map(str, range(start, 40, 2))) + "]" for start in (0, 1)]
    total = sum(analysis.pulled_back(tiny_model, PAIR, TEXT[0], through=part, **options).vector for part in parts)
    np.testing.assert_allclose(total, whole.vector, atol=1e-6)
    single = analysis.pulled_back(tiny_model, PAIR, TEXT[0], through="L1N3", position=4, norms="ignored")
    assert single.through == ("L1N3",)


def test_without_positions_it_is_the_mean_over_them(tiny_model):
    few = TEXT[:2, :4]
    at = [
        analysis.pulled_back(tiny_model, PAIR, row, through=["L0H3", "L1.mlp"], position=place).vector
        for row in few
        for place in range(4)
    ]
    found = analysis.pulled_back(tiny_model, PAIR, few, through=["L0H3", "L1.mlp"])
    np.testing.assert_allclose(found.vector, np.mean(at, 0), atol=1e-6)
    cosines = [one @ found.vector / np.linalg.norm(one) / np.linalg.norm(found.vector) for one in at]
    assert (found.agreement, found.positions) == (pytest.approx(np.mean(cosines), abs=1e-6), 8)
    some = analysis.pulled_back(tiny_model, PAIR, TEXT, through="L0.mlp", max_tokens=15)
    assert some.positions == 10


def test_the_effect_of_norms(tiny_model):
    """Against the directions themselves; the final norm alone has the Jacobian (I - xx^T/n) / scale, x normalised."""
    effect = analysis.norm_effect(tiny_model, PAIR, TEXT)
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(torch.from_numpy(TEXT))
    x = cache["blocks.1.hook_resid_post"].double().flatten(0, 1).numpy()
    x = x - x.mean(1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    d = (tiny_model.W_U[:, PAIR[0]] - tiny_model.W_U[:, PAIR[1]]).detach().double().numpy()
    linear = d * tiny_model.ln_final.weight.detach().double().numpy()
    linear = linear - linear.mean()
    true = linear - (x @ linear)[:, None] * x
    cosines = true @ linear / np.linalg.norm(true, axis=1) / np.linalg.norm(linear)
    ratio = np.linalg.norm(linear) / np.linalg.norm(true, axis=1)
    assert effect.names == ("frozen", "linear", "ignored", "average")
    assert effect.get("cosine")["frozen"] == pytest.approx(cosines.mean(), abs=1e-4)
    assert effect.get("cosine")["linear"] == pytest.approx(effect.get("cosine")["frozen"], abs=1e-4)
    assert effect.get("cosine_5_percent")["frozen"] == pytest.approx(np.quantile(cosines, 0.05), abs=1e-4)
    assert effect.get("length_ratio")["frozen"] == pytest.approx(ratio.mean(), rel=1e-3)
    ignored = true @ d / np.linalg.norm(true, axis=1) / np.linalg.norm(d)
    assert effect.get("cosine")["ignored"] == pytest.approx(ignored.mean(), abs=1e-4)
    assert effect.low[0, 0] < cosines.mean() < effect.high[0, 0]
    assert np.isnan(analysis.norm_effect(tiny_model, PAIR, TEXT[0]).low).all()


# --- observables and coupling ---


def test_observables(tiny_model):
    logits = torch.randn(2, 3, D_VOCAB, generator=torch.Generator().manual_seed(0))
    one, pair = bc.observable(tiny_model, "a"), bc.observable(tiny_model, ("a", "b"), name="a or b")
    a, b = (tiny_model.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ab")
    assert torch.equal(one.value(logits), logits[..., a])
    assert torch.allclose(pair.value(logits), logits[..., a] - logits[..., b])
    mapped = bc.observable(tiny_model, {"a": 2, b: -0.5})
    assert torch.allclose(mapped.value(logits), 2 * logits[..., a] - 0.5 * logits[..., b])
    vector = bc.observable(tiny_model, torch.arange(D_VOCAB))
    assert torch.allclose(vector.value(logits[0]), logits[0] @ torch.arange(D_VOCAB).float())
    names = [item.name for item in (one, pair, mapped, vector, bc.observable(tiny_model, pair))]
    assert names == ["'a'", "a or b", "2 'a' + -0.5 'b'", "weights of 256 tokens", "a or b"]
    assert repr(pair) == "Observable(a or b; 2 tokens with a weight)"


def test_coupling_is_what_one_value_says_of_another(tiny_model):
    """On a sphere on which one value is known, by sampling; and against NumPy."""
    text = {"text": TEXT, "through": "L0.mlp"}
    a, b = analysis.pulled_back(tiny_model, 70, **text), analysis.pulled_back(tiny_model, 80, **text)
    found = analysis.coupling(a, b)
    wanted = a.vector @ b.vector / (a.vector @ a.vector)
    assert found.get("coupling", "all")[0, 1] == pytest.approx(wanted)
    assert found.get("cosine", "all")[1, 0] == pytest.approx(wanted * a.norm / b.norm)
    assert np.diagonal(found.get("coupling", "all")) == pytest.approx([1, 1])
    draw = np.random.default_rng(0).standard_normal((20_000, 24))
    unit = a.vector / a.norm
    draw -= np.outer(draw @ unit, unit)
    draw = 5 * draw / np.linalg.norm(draw, axis=1, keepdims=True) + 3 * unit  # the value of a is 3 |a|
    assert (draw @ b.vector).mean() / (3 * a.norm) == pytest.approx(wanted, abs=0.02 * b.norm / a.norm)
    of_logits = analysis.coupling(bc.observable(tiny_model, 70), bc.observable(tiny_model, PAIR))
    assert of_logits.get("cosine", "all")[0, 1] == pytest.approx(0.5**0.5)
    assert found.to_dataframe().shape == (4, 5)


def test_it_is_shown(tiny_model):
    found = analysis.pulled_back(tiny_model, PAIR, TEXT, through=["L0H3", "L1.mlp"])
    assert found.name == f"{bc.observable(tiny_model, PAIR).name} through L0H3 L1.mlp"
    assert repr(found).startswith(f"Direction({found.name}; before block 0, norms frozen; ")
    page = found._repr_html_()
    assert "Mean of 30 positions" in page
    lowest = found.top_tokens(1, inhibiting=True)[0]
    assert lowest[1] == found.cosines.min()
    assert lowest[1] == found.to_dataframe()["cosine"].iloc[-1]
    embeddings = tiny_model.W_E.detach().double().numpy()
    cosines = embeddings @ found.vector / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(found.vector)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-6)


# --- what is refused ---


def test_errors(tiny_model, tmp_path):
    def back(through="L0H3", what=PAIR, **options):
        return lambda: analysis.pulled_back(tiny_model, what, **{"text": TEXT, "through": through} | options)

    one = analysis.pulled_back(tiny_model, 70, through="L0H3", norms="linear")
    a = tiny_model.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    for call, words in (
        (lambda: bc.observable(tiny_model, (5, 5)), "answer and wrong are the same token"),
        (lambda: bc.observable(tiny_model, 999), "there is no token 999"),
        (lambda: bc.observable(tiny_model, {5: 1.0, "a": 1.0, a: 2.0}), "the token 'a' has two weights"),
        (lambda: bc.observable(tiny_model, {5: float("nan")}), "257 finite weights here, not all 0; .* 1 not finite"),
        (lambda: bc.observable(tiny_model, np.ones(5)), r"257 finite weights here, not all 0; these are \(5,\)"),
        (lambda: bc.observable(tiny_model, np.zeros(D_VOCAB)), "0 of them not 0"),
        (lambda: bc.observable(tiny_model, {}), "0 of them not 0"),
        (lambda: bc.observable(tiny_model, object()), "weights by token, or 257 weights, not a object"),
        (lambda: bc.observable("gpt2", 5), "a str is not a model"),
        (lambda: analysis.pulled_back("gpt2", 5, TEXT), "a str is not a model"),
        (back(norms="free"), "norms must be one of frozen, linear, ignored, true, not 'free'"),
        (back(["L0H1 + L0H2"]), "not L0H1 \\+ L0H2"),
        (back("L1.attn"), "a path leads through heads, .* not L1.attn"),
        (back("L7H0"), "there is no layer 7"),
        (back(["L0H3", "L0H1"]), "no path leads through both L0H3 and L0H1"),
        (back(["L0.mlp", "L0N3"]), "no path leads through both"),
        (back(["L0H3", "L0.mlp"]), "no path leads to blocks.0.hook_mlp_out from what its block's attention writes"),
        (back(text=None), "need a text; heads with norms='linear' or 'ignored' do not"),
        (back("L0.mlp", text=None, norms="linear"), "MLPs, .* need a text"),
        (back(position=3), "a position is one of a prompt"),
        (back(text=TEXT[0], position=10), "there is no position 10 in a prompt of 10 tokens"),
        (back(text=TEXT[0], position=(3,)), r"2 positions are needed, .* not \[3\]"),
        (back(text=TEXT[0], position=(5, 3)), "L0H3 cannot write at 3 what it reads later, at 5"),
        (back("L0.mlp", text=TEXT[0], position=(3, 5)), "L0.mlp writes where it reads"),
        (back(max_tokens=0), "at least 1 token must be used, not 0"),
        (back(subnetwork=bc.Circuit.full(tiny_model)), "a direction that is pulled back is of weights"),
        (lambda: one.top_tokens(0), "k must be at least 1, not 0"),
        (lambda: analysis.coupling(one), "at least two directions, not 1"),
        (lambda: analysis.coupling(one, one), "two directions are called"),
        (
            lambda: analysis.coupling(one, bc.observable(tiny_model, 5)),
            "the same space, not Directions of 24 numbers and",
        ),
        (lambda: analysis.norm_effect(tiny_model, 5), "type NoneType but should be"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_models_of_another_build_are_refused(tmp_path, tiny_folders):
    opt = bc.load_model(save_tiny(tmp_path, CONFIGS["opt"]()), device="cpu")
    model = bc.load_model(tiny_folders["gpt2"], device="cpu")
    for point, through, words in (
        ("blocks.1.hook_out", "L0H0", "block 1 does not add what its attention and MLP write"),
        ("blocks.0.attn.hook_z", "L0H0", "z of L0H0 is not the mean of its values"),
        ("blocks.0.ln1.hook_out", "L0H0", "blocks.0.ln1 is not the norm it seems to be"),
        ("ln_final.hook_out", (), "ln_final is not the norm it seems to be"),
    ):
        model.reset_hooks()
        model.hook_dict[point].add_hook(lambda value, hook: value * 2)
        with pytest.raises(NotShownError, match=words):
            analysis.pulled_back(model, 5, TEXT, through=through)
    with pytest.raises(NotShownError, match="with a final norm and W_U alone"):
        analysis.pulled_back(opt, 5, TEXT, through="L0H0")
