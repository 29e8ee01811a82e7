"""Masks and gates of edges, compared with plain Hugging Face models that are computed edge by edge."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits.masking.edges import edges_replaced
from bigram_circuits.masking.effects import node_effects, strongest
from bigram_circuits.masking.replacing import make_replacement, partners
from bigram_circuits.models.activations import NotShownError, lean_forward, recomputed
from bigram_circuits.models.edges import edge_layout, edges_exposed
from bigram_circuits.models.loading import plain_of
from bigram_circuits.tasks.task import Task
from tests.architectures import CONFIGS
from tests.masking.explicit_edges import explicit

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(0, 257, (3, 8), generator=torch.Generator().manual_seed(3))
TEXT = np.random.default_rng(0).integers(0, 257, (4, 8))
ZERO = bc.Replacement()
FLAGS = ("use_attn_in", "use_split_qkv_input", "use_attn_result", "use_hook_mlp_in")


def logits(model):
    with torch.no_grad():
        return model(TOKENS)


def plain_logits(model, *args, **kwargs):
    with torch.no_grad():
        return explicit(plain_of(model).model, TOKENS, *args, **kwargs)[0]


def some_edges(model, seed=0, share=0.5):
    rng = np.random.default_rng(seed)
    full = bc.Circuit.full(model, "edge")
    return full.drop(*(label for label in full.edges if rng.random() > share))


def gate_of(circuit):
    kept = set(circuit.edges)
    return lambda label: float(label in kept)


def test_the_explicit_model_is_the_plain_one(any_model):
    with torch.no_grad():
        assert torch.allclose(plain_logits(any_model), plain_of(any_model).model(TOKENS).logits, atol=1e-5)


def test_all_edges_are_the_model(any_model):
    whole = logits(any_model)
    for gate in (torch.ones, lambda *shape: torch.ones(*shape, dtype=torch.bool)):
        gates = {site.name: gate(*site.shape) for site in bc.edge_sites(any_model)}
        with edges_replaced(any_model, gates.__getitem__, ZERO):
            assert torch.allclose(logits(any_model), whole, atol=1e-5)
    with bc.masked(any_model, bc.Circuit.full(any_model, "edge")):
        assert torch.equal(logits(any_model), whole)
    assert torch.equal(logits(any_model), whole)


def test_no_edges_are_what_no_writer_owns(any_model):
    with bc.masked(any_model, bc.Circuit.empty(any_model, "edge")):
        found = logits(any_model)
    assert torch.allclose(found, plain_logits(any_model, lambda label: 0.0), atol=1e-5)
    assert torch.allclose(found, found[:1, :1].expand_as(found), atol=1e-6)  # nothing of the tokens is left


@pytest.mark.parametrize("replace", ["zero", "mean", "mean_by_position", "resample"])
def test_replaced_edges_are_what_the_explicit_model_makes_of_them(any_model, replace):
    plain, whole, circuit = plain_of(any_model).model, logits(any_model), some_edges(any_model)
    with torch.no_grad():
        if replace == "resample":
            others = explicit(plain, TOKENS[partners(len(TOKENS), 1)])[1]
        else:
            others = explicit(plain, torch.from_numpy(TEXT))[1]
            axes = (0, 1) if replace == "mean" else (0,)
            others = {writer: out.mean(axes).expand_as(out[:1]) for writer, out in others.items()}
    others = {} if replace == "zero" else others
    text = TEXT if "mean" in replace else None
    with bc.masked(any_model, circuit, replace=replace, text=text, seed=1):
        found = logits(any_model)
    assert torch.allclose(found, plain_logits(any_model, gate_of(circuit), others), atol=1e-5)
    assert not torch.allclose(found, whole, atol=1e-2)
    assert torch.equal(logits(any_model), whole)


def test_each_kind_of_edge_alone(any_model):
    whole, full = logits(any_model), bc.Circuit.full(any_model, "edge")
    head = "L1KV1" if "L1KV1" in str(full.edges) else "L1H1"
    ends = ("embed->L0H2.q", f"L0H3->{head}.k", f"L0.mlp->{head}.v", "L0H1->L1.mlp", "L1H0->logits", "embed->logits")
    for label in ends:
        circuit = full.drop(label)
        assert circuit.kept == full.total - 1
        with bc.masked(any_model, circuit):
            found = logits(any_model)
        assert torch.allclose(found, plain_logits(any_model, gate_of(circuit)), atol=1e-5)
        assert not torch.allclose(found, whole, atol=1e-5), label


def test_soft_gates_and_their_gradients(any_model):
    sites, rng = bc.edge_sites(any_model), torch.Generator().manual_seed(0)
    gates = {site.name: torch.rand(site.shape, generator=rng).requires_grad_() for site in sites}
    by_label = {
        site.label(reader, writer): gates[site.name][reader, writer]
        for site in sites
        for reader in range(site.shape[0])
        for writer in range(site.shape[1])
    }
    direction = torch.randn(3, 8, 257, generator=rng)
    with torch.no_grad():
        others = explicit(plain_of(any_model).model, TOKENS[partners(len(TOKENS), 0)])[1]
    wanted = explicit(plain_of(any_model).model, TOKENS, by_label.__getitem__, others)[0]
    gradients = torch.autograd.grad((wanted * direction).sum(), list(gates.values()))
    with edges_replaced(any_model, gates.__getitem__, bc.Replacement("resample")), lean_forward(any_model):
        found = any_model(TOKENS)
        mine = torch.autograd.grad((found * direction).sum(), list(gates.values()))
    assert torch.allclose(found, wanted, atol=1e-5)
    for one, other in zip(mine, gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)
        assert one.abs().max() > 1e-3


def test_all_edges_out_of_a_head_are_its_node(any_model):
    """A head of which nobody reads anything writes 0: what is left of its attention is the bias, which is no head's."""
    full = bc.Circuit.full(any_model, "edge")
    for head in ("L0H2", "L1H1"):
        circuit = full.drop(*(label for label in full.edges if label.startswith(f"{head}->")))
        with bc.masked(any_model, circuit):
            by_edges = logits(any_model)
        with bc.masked(any_model, bc.Circuit.full(any_model).drop(head)):
            by_nodes = logits(any_model)
        assert torch.allclose(by_edges, by_nodes, atol=1e-5)
        assert not torch.allclose(by_edges, logits(any_model), atol=1e-3)


def test_edges_together_with_nodes_and_weights(any_model):
    full = bc.Circuit.full(any_model, ("edge", "head", "weight"))
    assert full.by_unit().keys() == {"head", "q", "k", "v", "mlp", "logits", "weight"}
    circuit = full.drop("L0H1", "L0H0->logits")
    edges = bc.Circuit.full(any_model, "edge")
    edges = edges.drop("L0H0->logits", *(label for label in edges.edges if label.startswith("L0H1->")))
    with bc.masked(any_model, edges):
        wanted = logits(any_model)
    with bc.masked(any_model, circuit):
        assert torch.allclose(logits(any_model), wanted, atol=1e-5)


def test_counterfactual_prompts(any_model):
    rng, circuit = np.random.default_rng(0), some_edges(any_model)
    others, scored = rng.integers(0, 257, TOKENS.shape), np.zeros(TOKENS.shape, dtype=bool)
    scored[:, -1] = True
    task = Task("pairs", TOKENS.numpy(), scored, 5.0, counterfactual=others)
    with bc.masked(any_model, circuit, replace="counterfactual", text=task):
        found = logits(any_model)
    with torch.no_grad():
        instead = explicit(plain_of(any_model).model, torch.from_numpy(others))[1]
    assert torch.allclose(found, plain_logits(any_model, gate_of(circuit), instead), atol=1e-5)


def test_effects_add_up_and_evaluation_counts_edges(tiny_model):
    circuit = bc.replaced(tiny_model, some_edges(tiny_model), "resample")
    target = bc.NextTokenTarget()
    scores = node_effects(tiny_model, circuit, target, TEXT, steps=16)
    assert {name: tuple(score.shape) for name, score in scores.items()} == dict(circuit.shapes)
    evaluation = bc.evaluate(tiny_model, circuit, target, TEXT, seeds=1)
    assert evaluation.units == "edges"
    rise = evaluation.empty.cross_entropy - evaluation.full.cross_entropy
    assert sum(float(score.sum()) for score in scores.values()) == pytest.approx(rise, abs=0.05 * abs(rise))
    chosen = strongest(scores, circuit)
    assert chosen.by_place() == circuit.by_place()


# --- the model's state ---


def test_the_hook_points_of_edges_are_reached_only_meanwhile(tiny_model):
    before = [getattr(tiny_model.cfg, flag) for flag in FLAGS]
    circuit = some_edges(tiny_model)
    whole = logits(tiny_model)

    def run():
        with bc.masked(tiny_model, circuit):
            assert all(getattr(block.attn.config, FLAGS[1]) for block in tiny_model.blocks)
            found = logits(tiny_model)
            tiny_model.reset_hooks()
            assert torch.equal(logits(tiny_model), found)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert [getattr(tiny_model.cfg, flag) for flag in FLAGS] == before
    assert not any(getattr(block.attn.config, FLAGS[1]) for block in tiny_model.blocks)
    assert torch.equal(logits(tiny_model), whole)


def test_the_users_own_flags_come_back(tiny_folders):
    model = bc.load_model(tiny_folders["llama"], device="cpu")
    model.set_use_attn_in(True)
    with edges_exposed(model):
        assert (model.cfg.use_attn_in, model.cfg.use_split_qkv_input) == (False, True)
    assert (model.cfg.use_attn_in, model.cfg.use_split_qkv_input) == (True, False)
    assert all(block.attn.config.use_attn_in for block in model.blocks)


def test_masked_twice_recomputed_or_of_another_shape(tiny_model):
    circuit = some_edges(tiny_model)
    with bc.masked(tiny_model, circuit), pytest.raises(ValueError, match="edges of this model are masked already"):
        bc.masked(tiny_model, circuit).__enter__()
    with lean_forward(tiny_model), recomputed(tiny_model), edges_replaced(tiny_model, circuit.__getitem__, ZERO):
        loss = tiny_model(TOKENS).sum()
        with pytest.raises(NotShownError, match="recomputed in the backward pass"):
            loss.backward()
    said = r"gates of blocks\.0\.attn\.hook_q_input have shape \(4, 2\), not \(4, 1\)"
    with edges_replaced(tiny_model, lambda name: torch.ones(4, 2), ZERO), pytest.raises(ValueError, match=said):
        tiny_model(TOKENS)
    for parameter in tiny_model.parameters():
        parameter.grad = None


def test_a_pass_of_the_full_model_within(tiny_model):
    """A replacement's means are of the full model, also when they are taken of a masked one."""
    circuit = some_edges(tiny_model)
    points = [source.name for source in edge_layout(tiny_model).sources]
    with edges_exposed(tiny_model):
        wanted = make_replacement(tiny_model, points, "mean", TEXT).means
    with bc.masked(tiny_model, circuit):
        found = make_replacement(tiny_model, points, "mean", TEXT).means
    assert all(np.array_equal(found[name], wanted[name]) for name in points)


# --- which models have edges ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma2", r"L0\.mlp does not read the sum .* cannot be split into heads"),
        ("phi", r"does not reach the activation blocks\.0\.hook_mlp_in"),
        ("gptj", r"cannot split the inputs of its attention \(AttentionBridge\)"),
    ],
)
def test_models_without_edges_say_why(name, said):
    model = bc.load_model(AutoModelForCausalLM.from_config(CONFIGS[name]()))
    with pytest.raises(NotShownError, match=f"this model has no edges: .*{said}") as error:
        bc.Circuit.full(model, "edge")
    assert "\n" not in str(error.value)
    assert not model.cfg.use_split_qkv_input


def test_half_precision(tiny_folders):
    model = bc.load_model(tiny_folders["gpt2"], device="cpu", dtype="bfloat16")
    gates = {site.name: torch.ones(site.shape) for site in bc.edge_sites(model)}
    whole = logits(model)
    with edges_replaced(model, gates.__getitem__, ZERO):
        assert torch.allclose(logits(model), whole, atol=0.1)
