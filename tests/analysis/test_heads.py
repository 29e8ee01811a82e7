"""Scores of attention heads, against Hugging Face's attention patterns and NumPy."""

import numpy as np
import pytest
import torch
from scipy.special import erf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.tasks import builtin
from tests.conftest import TINY_CONFIGS


@pytest.mark.parametrize("architecture", list(TINY_CONFIGS))
def test_scores_are_means_of_attention(tiny_folders, architecture):
    model = bc.load_model(tiny_folders[architecture], device="cpu")
    found = analysis.head_scores(model, prompts=3, period=5, seed=1)
    tokens = analysis.repeated_random_tokens(model, prompts=3, period=5, seed=1).tokens
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders[architecture], attn_implementation="eager")
    with torch.no_grad():
        layers = plain(torch.from_numpy(tokens.astype(np.int64)), output_attentions=True).attentions
    for layer, attention in enumerate(attention.numpy() for attention in layers):
        for name, back in (("induction", 4), ("duplicate_token", 5), ("previous_token", 1), ("first_position", None)):
            to = [
                [attention[:, head, at, 0 if back is None else at - back] for at in range(6, 11)] for head in range(4)
            ]
            np.testing.assert_allclose(found.get(name, "full")[layer], np.mean(to, (1, 2)), rtol=1e-4)


def test_the_reference_model_has_an_induction_circuit(reference_model):
    found = analysis.head_scores(reference_model, prompts=4)
    assert found.get("previous_token", "full")[2, 2] > 0.9
    assert found.get("induction", "full")[3, 3] > 0.9


def test_scores_of_a_subnetwork(tiny_model):
    found = analysis.head_scores(tiny_model, bc.Subnetwork.empty(tiny_model), prompts=2, period=4)
    assert found.conditions == ("full", "subnetwork", "complement", "random")
    with pytest.raises(ValueError, match="period must be"):
        analysis.head_scores(tiny_model, period=1)


# --- with words: what heads copy, and the successors that they write ---

LISTS = {"days": range(7), "months": range(7, 19), "numbers": range(19, 31)}  # token ids of `word_tokenizer`


def word_tokenizer():
    """Whole words as tokens, the ordinals first; fewer than the tiny models' 257."""
    words = [word for name in LISTS for word in builtin._WORDS_IN_ORDER[name]]
    words += [*builtin._OWNERS, *builtin._THINGS, "has", "a", ".", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module", params=list(TINY_CONFIGS))
def with_words(request, tiny_folders):
    """A model whose tokens are words, and the plain one."""
    model = bc.load_model(tiny_folders[request.param], device="cpu")
    model.tokenizer = word_tokenizer()
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders[request.param], attn_implementation="eager")
    return model, plain


def test_retrieval_is_where_the_strongest_attention_is(with_words):
    model, plain = with_words
    found = analysis.retrieval_scores(model, prompts=9, pairs=3, seed=2)
    task = analysis.earlier_value(model, prompts=9, pairs=3, seed=2)
    with torch.no_grad():
        layers = plain(torch.from_numpy(task.tokens.astype(np.int64)), output_attentions=True).attentions
    ends = task.ends
    for layer, attention in enumerate(attention.numpy() for attention in layers):
        for head in range(4):
            looked = [task.tokens[row, attention[row, head, ends[row] - 1].argmax()] for row in range(9)]
            right = np.mean([one == task.tokens[row, ends[row]] for row, one in enumerate(looked)])
            assert found.get("retrieval")[layer, head] == pytest.approx(right)
    assert found.notes["chance"] == pytest.approx(1 / ends[0])
    assert (found.notes["scored"], found.notes["left_out"]) == (9, 0)
    assert f"{1 / ends[0]:.3f}" in found.quantities[0].meaning


def test_answers_of_several_tokens_are_copied_token_by_token(reference_model):
    found = analysis.retrieval_scores(reference_model, prompts=8)
    assert found.notes["scored"] > 8
    assert found.get("retrieval")[3, 3] > 20 * found.notes["chance"]  # the induction head
    assert found.get("retrieval")[2, 2] == 0  # the head that looks at the previous token


def layer_norm(x, weight, bias, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x, weight, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


class Gpt2:
    def __init__(self, w):
        self.w, self.embedding, self.unembedding = w, w["transformer.wte.weight"], w["transformer.wte.weight"].T

    def norm(self, name, x):
        return layer_norm(x, self.w[f"transformer.{name}.weight"], self.w[f"transformer.{name}.bias"])

    def final(self, x):
        return self.norm("ln_f", x)

    def mlp(self, x):
        at = "transformer.h.0.mlp"
        h = self.norm("h.0.ln_2", x) @ self.w[f"{at}.c_fc.weight"] + self.w[f"{at}.c_fc.bias"]
        h = h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
        return h @ self.w[f"{at}.c_proj.weight"] + self.w[f"{at}.c_proj.bias"]

    def head(self, layer, head, x):
        at, mine = f"transformer.h.{layer}.attn", slice(6 * head, 6 * head + 6)
        value = (
            self.norm(f"h.{layer}.ln_1", x) @ self.w[f"{at}.c_attn.weight"][:, 48:] + self.w[f"{at}.c_attn.bias"][48:]
        )
        return value[:, mine] @ self.w[f"{at}.c_proj.weight"][mine]


class Neox:
    def __init__(self, w):
        self.w, self.embedding, self.unembedding = w, w["gpt_neox.embed_in.weight"], w["lm_head.weight"].T

    def norm(self, name, x):
        return layer_norm(x, self.w[f"gpt_neox.{name}.weight"], self.w[f"gpt_neox.{name}.bias"])

    def final(self, x):
        return self.norm("final_layer_norm", x)

    def mlp(self, x):
        at = "gpt_neox.layers.0.mlp"
        h = self.norm("layers.0.post_attention_layernorm", x) @ self.w[f"{at}.dense_h_to_4h.weight"].T
        h = h + self.w[f"{at}.dense_h_to_4h.bias"]
        h = h * (1 + erf(h / np.sqrt(2))) / 2
        return h @ self.w[f"{at}.dense_4h_to_h.weight"].T + self.w[f"{at}.dense_4h_to_h.bias"]

    def head(self, layer, head, x):
        at, rows = f"gpt_neox.layers.{layer}.attention", slice(18 * head + 12, 18 * head + 18)  # query, key, value
        value = self.norm(f"layers.{layer}.input_layernorm", x) @ self.w[f"{at}.query_key_value.weight"][rows].T
        value = value + self.w[f"{at}.query_key_value.bias"][rows]
        return value @ self.w[f"{at}.dense.weight"][:, 6 * head : 6 * head + 6].T


class Llama:
    def __init__(self, w):
        self.w, self.embedding, self.unembedding = w, w["model.embed_tokens.weight"], w["lm_head.weight"].T

    def final(self, x):
        return rms_norm(x, self.w["model.norm.weight"])

    def mlp(self, x):
        at, read = "model.layers.0.mlp", rms_norm(x, self.w["model.layers.0.post_attention_layernorm.weight"])
        gate = read @ self.w[f"{at}.gate_proj.weight"].T
        return (gate / (1 + np.exp(-gate)) * (read @ self.w[f"{at}.up_proj.weight"].T)) @ self.w[
            f"{at}.down_proj.weight"
        ].T

    def head(self, layer, head, x):
        at, group = f"model.layers.{layer}.self_attn", head // 2
        read = rms_norm(x, self.w[f"model.layers.{layer}.input_layernorm.weight"])
        value = read @ self.w[f"{at}.v_proj.weight"][6 * group : 6 * group + 6].T
        return value @ self.w[f"{at}.o_proj.weight"][:, 6 * head : 6 * head + 6].T


@pytest.mark.parametrize("through_mlp", [True, False])
def test_successors_by_the_weights_alone(with_words, through_mlp):
    model, plain = with_words
    found = analysis.successor_scores(model, through_mlp=through_mlp)
    weights = {name: value.double().numpy() for name, value in plain.state_dict().items()}
    by_hand = {"gpt2": Gpt2, "gpt_neox": Neox, "llama": Llama}[plain.config.model_type](weights)
    for layer in range(2):
        for head in range(4):
            right = []
            for name, ids in LISTS.items():
                read = by_hand.embedding[ids]
                if through_mlp and layer > 0:
                    read = by_hand.mlp(read)
                logits = by_hand.final(by_hand.head(layer, head, read)) @ by_hand.unembedding[:, ids]
                following = np.roll(np.arange(len(ids)), -1)
                hits = logits.argmax(1) == following
                right += hits.tolist() if name != "numbers" else hits[:-1].tolist()  # nothing follows twelve
            assert found.get("successor")[layer, head] == pytest.approx(np.mean(right))
    assert found.notes["ordinals"] == {"days": 7, "months": 12, "numbers": 11}
    assert found.notes["chance"] == pytest.approx((7 / 7 + 12 / 12 + 11 / 12) / 30)


def test_a_successor_head_has_score_1(tiny_folders):
    """The values of head 2 in block 0 map each day's normalised embedding to the next day, which only it writes."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_folders["gpt_neox"])
    block, days = plain.gpt_neox.layers[0], torch.arange(7)
    with torch.no_grad():
        code = torch.linalg.qr(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)))[0]
        read = block.input_layernorm(plain.gpt_neox.embed_in.weight[days])
        value = slice(18 * 2 + 12, 18 * 2 + 18)
        block.attention.query_key_value.weight[value] = torch.linalg.lstsq(
            read, torch.eye(7)[:, 1:].roll(-1, 0)
        ).solution.T
        block.attention.query_key_value.bias[value] = 0
        block.attention.dense.weight[:, 12:18] = code
        plain.lm_head.weight[:7] = torch.cat([-code.sum(1)[None], code.T])
    model = bc.load_model(plain, tokenizer=word_tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin, "_WORDS_IN_ORDER", {"days": builtin._WORDS_IN_ORDER["days"]})
        found = analysis.successor_scores(model).get("successor")
    assert found[0, 2] >= 6 / 7  # for the last one it writes nothing
    assert np.delete(found.ravel(), 2).max() < 6 / 7


def test_scores_of_words_in_subnetworks(with_words):
    model, _ = with_words
    empty = bc.Subnetwork.empty(model)
    for scores in (analysis.successor_scores, analysis.retrieval_scores):
        found = scores(model, empty)
        assert found.conditions == ("full", "subnetwork", "complement", "random")
        assert np.array_equal(found.values[0, 0], found.values[0, 2])


def test_what_words_cannot_be_scored_with(tiny_model):
    def refused(call, words):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)

    refused(lambda: analysis.successor_scores(tiny_model), "fewer than 3 days, months or numbers")
    refused(lambda: analysis.retrieval_scores(tiny_model), "more than the model's 64")
    refused(lambda: analysis.retrieval_scores(tiny_model, pairs=1), "pairs must be 2 to 20")
    refused(lambda: analysis.successor_scores("gpt2"), "a str is not a model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "tokenizer", None)
        refused(lambda: analysis.successor_scores(tiny_model), "no tokenizer")
        refused(lambda: analysis.retrieval_scores(tiny_model), "no tokenizer")
