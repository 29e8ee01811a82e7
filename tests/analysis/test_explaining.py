"""Explanations: what they add up to, against forward passes written by hand, and that they find planted paths."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.analysis.observables import observable
from bigram_circuits.analysis.prompts import token_word, token_words
from bigram_circuits.masking.apply import masked
from bigram_circuits.models.norms import frozen_norm
from tests.architectures import CONFIGS
from tests.conftest import D_VOCAB, save_tiny

PROMPT = [5, 70, 9, 201, 33]
ANSWER = 17

pytestmark = pytest.mark.usefixtures("one_thread")


def half(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = bc.Subnetwork.full(model).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})


# --- against forward passes written by hand ---


class ByHand:
    """The frozen forward pass of a Hugging Face model, from its parameters alone."""

    def __init__(self, folder, masks):
        plain = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        self.p = {name: value.detach() for name, value in plain.named_parameters()}
        for name, mask in masks.items():
            self.p[name] = self.p[name] * mask
        self.cfg = plain.config
        self.watched = {}

    def watch(self, name, value):
        value.retain_grad()
        self.watched[name] = value
        return value

    def flows(self, answer):
        """Gradient times value of everything watched, from the logit of an answer at the last position."""
        logits = self.logits()
        logits[-1, answer].backward()
        return float(logits[-1, answer].detach()), {name: one.detach() * one.grad for name, one in self.watched.items()}

    def attend(self, q, k, v):
        """z of every head [pos, head, d_head]; the pattern is frozen."""
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        causal = torch.ones(scores.shape[-2:]).triu(1).bool()
        pattern = scores.masked_fill(causal, -math.inf).softmax(-1).detach()
        return torch.einsum("hqk,khd->qhd", pattern, v)


class GPT2(ByHand):
    def norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + self.cfg.layer_norm_epsilon).sqrt().detach()
        return centred / scale * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def logits(self):
        p, n_heads = self.p, self.cfg.n_head
        token = self.watch("token", p["transformer.wte.weight"][PROMPT].requires_grad_())
        position = self.watch("position", p["transformer.wpe.weight"][: len(PROMPT)].requires_grad_())
        x = token + position
        for i in range(self.cfg.n_layer):
            name = f"transformer.h.{i}"
            read = self.norm(x, f"{name}.ln_1")
            qkv = read @ p[f"{name}.attn.c_attn.weight"] + p[f"{name}.attn.c_attn.bias"]
            q, k, v = (part.view(len(PROMPT), n_heads, -1) for part in qkv.chunk(3, -1))
            z = self.watch(f"z{i}", self.attend(q, k, v))
            x = x + z.flatten(1) @ p[f"{name}.attn.c_proj.weight"] + p[f"{name}.attn.c_proj.bias"]
            before = self.norm(x, f"{name}.ln_2") @ p[f"{name}.mlp.c_fc.weight"] + p[f"{name}.mlp.c_fc.bias"]
            slope = (torch.nn.functional.gelu(before, approximate="tanh") / before).detach()
            after = self.watch(f"a{i}", before * slope)
            x = x + after @ p[f"{name}.mlp.c_proj.weight"] + p[f"{name}.mlp.c_proj.bias"]
        return self.norm(x, "transformer.ln_f") @ p["transformer.wte.weight"].T


class Llama(ByHand):
    def norm(self, x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + self.cfg.rms_norm_eps).sqrt().detach()
        return x / scale * self.p[f"{name}.weight"]

    def rotated(self, x):
        d = x.shape[-1]
        theta = self.cfg.rope_parameters["rope_theta"]
        angles = torch.arange(len(PROMPT))[:, None].double() / theta ** (torch.arange(0, d, 2).double() / d)
        cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
        return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

    def logits(self):
        p, cfg = self.p, self.cfg
        group = cfg.num_attention_heads // cfg.num_key_value_heads
        x = self.watch("token", p["model.embed_tokens.weight"][PROMPT].requires_grad_())
        for i in range(cfg.num_hidden_layers):
            name = f"model.layers.{i}"
            read = self.norm(x, f"{name}.input_layernorm")
            q, k, v = (
                (read @ p[f"{name}.self_attn.{c}_proj.weight"].T).view(len(PROMPT), -1, cfg.head_dim) for c in "qkv"
            )
            k, v = (one.repeat_interleave(group, 1) for one in (k, v))
            z = self.watch(f"z{i}", self.attend(self.rotated(q), self.rotated(k), v))
            x = x + z.flatten(1) @ p[f"{name}.self_attn.o_proj.weight"].T
            read = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (read @ p[f"{name}.mlp.{one}_proj.weight"].T for one in ("gate", "up"))
            share = (torch.nn.functional.silu(gate) * up / 2).detach()
            after = self.watch(f"a{i}", gate * (share / gate).detach() + up * (share / up).detach())
            x = x + after @ p[f"{name}.mlp.down_proj.weight"].T
        return self.norm(x, "model.norm") @ p["lm_head.weight"].T


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def by_hand(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = save_tiny(tmp_path_factory.mktemp(request.param), CONFIGS[request.param]())
    model = bc.load_model(folder, device="cpu")
    kept = half(model)
    made = {"gpt2": GPT2, "llama": Llama}[request.param](folder, kept.to_huggingface(model))
    return model, kept, made


def test_flows_are_gradient_times_value_of_the_frozen_model(by_hand):
    model, kept, made = by_hand
    value, flows = made.flows(ANSWER)
    explanation = bc.explain(model, kept, PROMPT, ANSWER, nodes=1000, edges=10**6)
    assert explanation.value == pytest.approx(value, abs=1e-5)
    nodes = {node.key: node for node in explanation.nodes}
    seen = 0
    for name, of in flows.items():
        if name in ("token", "position"):
            wanted = {f"{name}@{p}": float(one.sum()) for p, one in enumerate(of)}
        else:
            letter = {"z": "H", "a": "N"}[name[0]]
            by_unit = of.sum(-1) if letter == "H" else of
            wanted = {
                f"L{name[1:]}{letter}{unit}@{p}": float(by_unit[p, unit])
                for p in range(len(PROMPT)) for unit in range(by_unit.shape[1])
            }  # fmt: skip
        for key, flow in wanted.items():
            if key in nodes:
                assert nodes[key].flow == pytest.approx(flow, abs=1e-5), key
                seen += 1
            else:
                assert flow == 0, key
    assert seen > 200
    inputs = sum(float(flows[name].sum()) for name in ("token", "position") if name in flows)
    biases = nodes["bias"].flow if "bias" in nodes else 0.0
    assert inputs + biases == pytest.approx(value, abs=1e-5)
    assert isinstance(made, GPT2) == (abs(biases) > 1e-3)  # Llama has no biases


def test_edges_add_up_to_nodes_and_terms_and_paths_to_the_logit(by_hand):
    model, kept, _ = by_hand
    explanation = bc.explain(model, kept, PROMPT, ANSWER, nodes=1000, edges=10**6, paths=50)
    with torch.no_grad(), masked(model, kept):
        logits = model(torch.tensor([PROMPT]))[0, -1]
    assert explanation.value == pytest.approx(float(logits[ANSWER]), abs=1e-5)
    assert math.fsum(explanation.terms.values()) == pytest.approx(explanation.value, abs=1e-4)
    into, out = ({node.key: 0.0 for node in explanation.nodes} for _ in range(2))
    for edge in explanation.edges:
        into[edge.target] += edge.flow
        out[edge.source] += edge.flow
    for node in explanation.nodes:
        if node.kind != "answer":
            assert out[node.key] == pytest.approx(node.flow, abs=1e-5), node.key
        if node.kind in ("neuron", "head", "answer"):
            assert into[node.key] == pytest.approx(node.flow, abs=1e-5), node.key
            assert abs(node.unseen) < 1e-5
    listed = math.fsum(path.value for path in explanation.paths)
    assert listed + explanation.left_out == pytest.approx(explanation.value, abs=1e-5)
    assert 0 < explanation.left_out_share < 1
    sizes = [abs(path.value) for path in explanation.paths]
    assert sizes == sorted(sizes, reverse=True)
    assert all(path.nodes[-1] == "answer" and path.nodes[0].split("@")[0] in ("token", "position", "bias")
               for path in explanation.paths)  # fmt: skip


def test_what_is_not_listed_is_unseen(by_hand):
    model, kept, _ = by_hand
    whole = {node.key: node for node in bc.explain(model, kept, PROMPT, ANSWER, nodes=1000, edges=10**6).nodes}
    part = bc.explain(model, kept, PROMPT, ANSWER, nodes=6, edges=12)
    assert len(part.edges) == 12
    assert [node.kind in ("neuron", "head") for node in part.nodes].count(True) == 6
    for node in part.nodes:
        assert node.flow == pytest.approx(whole[node.key].flow, abs=1e-6)
        into = sum(edge.flow for edge in part.edges if edge.target == node.key)
        if node.kind in ("neuron", "head", "answer"):
            assert into + node.unseen == pytest.approx(node.flow, abs=1e-6)
    largest = sorted(
        (node for node in whole.values() if node.kind in ("neuron", "head")), key=lambda one: -abs(one.flow)
    )
    assert {node.key for node in largest[:6]} == {node.key for node in part.nodes if node.kind in ("neuron", "head")}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_in_16_bits_rounding_is_a_term(name, tmp_path):
    folder = save_tiny(tmp_path / name, CONFIGS[name]())
    whole, rounded = (bc.load_model(folder, device="cpu", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    kept = half(whole)
    precise = bc.explain(whole, kept, PROMPT, ANSWER)
    found = bc.explain(rounded, kept, PROMPT, ANSWER)
    assert found.value == pytest.approx(precise.value, abs=0.05)
    assert math.fsum(found.terms.values()) == pytest.approx(found.value, abs=1e-4)
    assert "L0 rounding" in found.terms
    assert not any("rounding" in term for term in precise.terms)


# --- planted circuits ---


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_paths_of_a_planted_circuit_are_the_planted_ones(architecture, layers):
    planted = bc.plant_bigram(architecture, d_vocab=12, successors=3, layers=layers)
    for token in (0, 7):
        explanation = bc.explain(planted.model, planted.circuit, [token])
        best = int(planted.probs[token].argmax())
        assert explanation.answer == f"logit of '{token_word(planted.model, best)}'"
        through = tuple(f"L{layer}N{token}@0" for layer in range(layers))
        units = [node for node in explanation.nodes if node.kind in ("neuron", "head")]
        assert {node.key for node in units if abs(node.flow) > 1e-4} == set(through)  # others are rounding
        strongest = max((path for path in explanation.paths if path.nodes[0] == "token@0"), key=lambda one: one.value)
        assert strongest.nodes == ("token@0", *through, "answer")
        of_neurons = [path for path in explanation.paths if len(path.nodes) > 2 and abs(path.value) > 1e-4]
        assert all(set(path.nodes[1:-1]) <= set(through) for path in of_neurons)
        assert explanation.left_out_share < 1e-4


def test_in_the_full_model_a_planted_path_is_among_distractors():
    planted = bc.plant_bigram("gpt2", d_vocab=12, successors=3, distractors=0.3)
    explanation = bc.explain(planted.model, None, [7], paths=40)
    assert explanation.mask == "full model"
    assert len([node for node in explanation.nodes if node.kind == "neuron"]) > 10
    assert "L0N7" in [path.labels[1] for path in explanation.paths]


def test_the_tokens_of_a_planted_neuron_are_its_token_and_its_successors():
    planted = bc.plant_bigram("llama", d_vocab=12, successors=3)
    explanation = bc.explain(planted.model, planted.circuit, [7])
    known = explanation.units["L0N7"]
    assert known.drives[0][0] == token_word(planted.model, 7)
    assert known.drives[1][1] < 1e-3 * known.drives[0][1]
    best = planted.probs[7].topk(3).indices.tolist()
    assert [word for word, _ in known.promotes[:3]] == token_words(planted.model, best)


# --- circuits of nodes ---


def test_nodes_that_a_circuit_replaces_begin_paths(by_hand):
    model, _, _ = by_hand
    text = np.random.default_rng(0).integers(0, D_VOCAB, (8, 8))
    circuit = bc.Circuit.full(model, ("head", "neuron")).drop("L0H1", *(f"L1N{i}" for i in range(20)))
    circuit = bc.replaced(model, circuit, "mean", text=text)
    explanation = bc.explain(model, circuit, PROMPT, ANSWER, nodes=1000, edges=10**6)
    with torch.no_grad(), masked(model, circuit):
        value = float(model(torch.tensor([PROMPT]))[0, -1, ANSWER])
    assert explanation.value == pytest.approx(value, abs=1e-5)
    kinds = {node.label: node.kind for node in explanation.nodes}
    assert kinds["L0H1"] == kinds["L1N3"] == "replaced"
    assert kinds["L0H0"] == "head"
    replaced = {node.key for node in explanation.nodes if node.kind == "replaced"}
    assert not replaced & {edge.target for edge in explanation.edges}
    sources = [node for node in explanation.nodes if node.kind in ("token", "position", "bias", "replaced")]
    assert sum(node.flow for node in sources) == pytest.approx(value, abs=1e-4)


def test_a_circuit_of_edges_is_refused(by_hand):
    model, _, _ = by_hand
    with pytest.raises(ValueError, match=r"explain its nodes, circuit\.to_nodes\(\)"):
        bc.explain(model, bc.Circuit.full(model, "edge"), PROMPT)


# --- what is asked ---


def test_differences_and_observables(by_hand):
    model, kept, _ = by_hand
    one, other = (bc.explain(model, kept, PROMPT, token) for token in (ANSWER, 40))
    both = bc.explain(model, kept, PROMPT, ANSWER, wrong=40)
    assert both.value == pytest.approx(one.value - other.value, abs=1e-5)
    same = bc.explain(model, kept, PROMPT, observable(model, (ANSWER, 40)))
    assert same.value == pytest.approx(both.value, abs=1e-5)
    assert [path.nodes for path in same.paths[:5]] == [path.nodes for path in both.paths[:5]]
    middle = bc.explain(model, kept, PROMPT, ANSWER, position=2)
    alone = bc.explain(model, kept, PROMPT[:3], ANSWER)
    assert middle.position == 2
    assert middle.value == pytest.approx(alone.value, abs=1e-5)
    assert [path.nodes for path in middle.paths[:5]] == [path.nodes for path in alone.paths[:5]]


def test_by_default_it_explains_what_the_masked_model_predicts(by_hand):
    model, kept, _ = by_hand
    explanation = bc.explain(model, kept, PROMPT)
    with torch.no_grad(), masked(model, kept):
        probs = model(torch.tensor([PROMPT]))[0, -1].softmax(-1)
    assert explanation.predictions[0][1] == pytest.approx(float(probs.max()), abs=1e-6)
    assert explanation.answer.endswith(f"'{explanation.predictions[0][0]}'")
    assert explanation.mask == f"{kept.kept:,} of {kept.total:,} weights ({100 * kept.fraction:.1f}%)"


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((PROMPT, 999), {}, "there is no token 999: ids are 0 to 256"),
        ((PROMPT,), {"position": 5}, "there is no position 5 in a prompt of 5 tokens"),
        ((PROMPT, 3), {"wrong": 3}, "answer and wrong are the same token"),
        ((PROMPT,), {"nodes": 0}, "nodes, edges and paths must be at least 1, not 0, 300 and 20"),
        (([],), {}, "a prompt is one sequence of tokens"),
    ],
)
def test_what_cannot_be_explained(by_hand, arguments, options, words):
    model, kept, _ = by_hand
    with pytest.raises(ValueError, match=words) as caught:
        bc.explain(model, kept, *arguments, **options)
    assert "\n" not in str(caught.value)


# --- norms ---


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "olmo"])
def test_a_frozen_norm_is_its_linear_part(name, tmp_path):
    model = bc.load_model(save_tiny(tmp_path / name, CONFIGS[name]()), device="cpu")
    generator = torch.Generator().manual_seed(0)
    whole, part, direction = torch.randn(3, 4, 24, generator=generator)
    norm = frozen_norm(model, model.blocks[0].ln1, whole)
    with torch.no_grad():
        true = model.blocks[0].ln1.original_component(whole)
    constant = 0.0 if norm.bias is None else norm.bias
    assert torch.allclose(norm.of(whole) + constant, true, atol=1e-5)
    assert torch.allclose(norm.of(part) + norm.of(whole - part), norm.of(whole), atol=1e-5)
    assert torch.allclose((norm.of(part) * direction).sum(-1), (part * norm.pulled_back(direction)).sum(-1), atol=1e-5)
    assert torch.allclose(norm.at(part).scale, frozen_norm(model, model.blocks[0].ln1, part).scale)
