"""Dictionaries inside a model: exact where nothing is changed, by formula where it is, and nothing is left behind."""

import threading

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.models.activations import lean_forward, recomputed
from bigram_circuits.models.nodes import node_sites
from bigram_circuits.models.splicing import _ends

D_MODEL, D_SAE, D_MLP = 24, 30, 40  # of the tiny models
POINT, FEATURES = "blocks.0.hook_resid_post", "blocks.0.hook_resid_post.features"

pytestmark = pytest.mark.usefixtures("one_thread")


def a_dictionary(d_in=D_MODEL, d_out=None, seed=0, **more):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_in, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, d_out or d_in), "b_dec": (d_out or d_in,)}
    return bc.Dictionary(
        "standard", **{name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}, **more
    )


@pytest.fixture(scope="module")
def tokens(random_tokens):
    return torch.from_numpy(random_tokens)[:2]


class Codebook(torch.nn.Module):
    """Any object will do: the nearest of some vectors as a one-hot, whose norm is kept. Its weights are its own."""

    def __init__(self):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.randn(7, D_MODEL, generator=torch.Generator().manual_seed(0)))

    def encode(self, x):
        return torch.nn.functional.one_hot((x @ self.vectors.T).argmax(-1), 7) * x.norm(dim=-1, keepdim=True)

    def decode(self, f):
        return f @ self.vectors


PLACES = {
    POINT: a_dictionary(),
    "blocks.1.hook_resid_pre": a_dictionary(normalize_activations="layer_norm"),
    "blocks.1.mlp.hook_post": a_dictionary(D_MLP),
    "blocks.0.attn.hook_z": a_dictionary(subtract_b_dec=True),
    "blocks.1.hook_attn_out": Codebook(),
    ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"): a_dictionary(seed=1),
    ("blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"): a_dictionary(seed=2),
}


def state(model):
    return (
        list(model.hook_dict), list(model.state_dict()), [name for name, _ in model.named_modules()],
        bc.weight_hash(model), len(list(model.parameters())),
        [(name, len(point.fwd_hooks), sorted(vars(point))) for name, point in model.hook_dict.items()],
    )  # fmt: skip


@pytest.mark.parametrize("place", list(PLACES), ids=str)
def test_untouched_latents_give_the_activation_bit_for_bit(any_model, tokens, place):
    before, logits = state(any_model), any_model(tokens)
    name = f"{place if isinstance(place, str) else place[1]}.features"
    with bc.spliced(any_model, {place: PLACES[place]}) as model:
        assert model is any_model
        assert torch.equal(model(tokens), logits)
        assert list(model.state_dict()) == before[1]
        assert [one for one, _ in model.named_modules()] == before[2]
        assert (bc.weight_hash(model), len(list(model.parameters()))) == before[3:5]
        again, cache = model.run_with_cache(tokens)
        assert torch.equal(again, logits)
        assert cache[name].shape == (2, 16, 7 if isinstance(PLACES[place], Codebook) else D_SAE)
        for multiply in (lambda f, hook: f * 1, lambda f, hook: f.clone()):  # another tensor with the same values
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, multiply)]), logits)
    assert state(any_model) == before
    assert torch.equal(any_model(tokens), logits)


def numpy_latents(x, dictionary):
    return np.maximum(x @ dictionary.W_enc.numpy() + dictionary.b_enc.numpy(), 0)


def test_changed_latents_add_what_their_change_decodes_to(any_model, tokens):
    dictionary = a_dictionary()
    with torch.no_grad():
        _, cache = any_model.run_with_cache(tokens)
        x = cache[POINT].numpy()
        latents = numpy_latents(x, dictionary)
        written = x - latents[..., 3:5] @ dictionary.W_dec.numpy()[3:5] + 2 * dictionary.W_dec.numpy()[9]
        wanted = any_model.run_with_hooks(tokens, fwd_hooks=[(POINT, lambda value, hook: torch.from_numpy(written))])

    def change(f, hook):
        assert hook.name == FEATURES
        np.testing.assert_allclose(f, latents, rtol=1e-4, atol=1e-5)
        f = f.clone()
        f[..., 3:5] = 0
        f[..., 9] += 2
        return f

    with bc.spliced(any_model, {POINT: dictionary}) as model, torch.no_grad():
        found = model.run_with_hooks(tokens, fwd_hooks=[(FEATURES, change)])
        assert (found - any_model(tokens)).abs().max() > 0.05
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_transcoder_writes_where_it_does_not_read(tiny_model, tokens):
    dictionary = a_dictionary(seed=3)
    place = ("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out")
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(tokens)
        less = numpy_latents(cache[place[0]].numpy(), dictionary) @ dictionary.W_dec.numpy()
        out = torch.from_numpy(cache[place[1]].numpy() - less)
        wanted = tiny_model.run_with_hooks(tokens, fwd_hooks=[(place[1], lambda value, hook: out)])
        with bc.spliced(tiny_model, {place: dictionary}) as model:
            hooks = [(f"{place[1]}.features", lambda f, hook: torch.zeros_like(f))]
            torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), wanted, rtol=1e-4, atol=1e-4)
            with pytest.raises(RuntimeError, match=r"reaches blocks.1.hook_mlp_out, but not blocks.1.ln2.hook_out"):
                model.hook_dict[place[1]](torch.zeros(1, 2, D_MODEL))


def test_dictionaries_that_share_a_hook_point(tiny_model, tokens):
    """Two transcoders read what an autoencoder at the same hook point has written, whatever their order."""
    at, first, second = "blocks.0.ln2.hook_out", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"
    coders = {(at, second): a_dictionary(seed=5), (at, first): a_dictionary(seed=6), at: a_dictionary(seed=7)}
    logits = tiny_model(tokens)
    with bc.spliced(tiny_model, coders) as model, torch.no_grad():
        assert torch.equal(model(tokens), logits)
        with model.hooks(fwd_hooks=[(f"{at}.features", lambda f, hook: f * 3)]):
            _, cache = model.run_with_cache(tokens)
    for name in (first, second):
        latents = numpy_latents(cache[at].numpy(), coders[at, name])
        np.testing.assert_allclose(cache[f"{name}.features"], latents, rtol=1e-4, atol=1e-4)
    outer, inner = bc.spliced(tiny_model, {(at, first): a_dictionary()}), bc.spliced(tiny_model, {at: a_dictionary()})
    with outer, pytest.raises(ValueError, match="an enclosing `with` block reads at"), inner:
        pass


# --- as nodes ---


@pytest.mark.parametrize("replace", ["zero", "mean", "resample"])
def test_latents_are_nodes_of_circuits(tiny_model, tokens, replace):
    dictionary = a_dictionary()
    with bc.spliced(tiny_model, {POINT: dictionary}) as model:
        (site,) = node_sites(model, FEATURES)
        assert (site.name, site.unit, site.count) == (FEATURES, "coordinate", D_SAE)
        (point,) = (one for one in bc.activation_points(model) if one.name == FEATURES)
        assert (point.axes, point.shape) == (("batch", "pos", "feature"), ("batch", "pos", D_SAE))
        circuit = bc.Circuit.full(model, [FEATURES, "head"])
        logits = model(tokens)
        with bc.masked(model, circuit, replace=replace, text=tokens):
            assert torch.equal(model(tokens), logits)
        dropped = circuit.drop(f"{FEATURES}[3]", f"{FEATURES}[8]")
        _, cache = model.run_with_cache(tokens)
        latents = cache[FEATURES].detach()
        other = {"zero": torch.zeros(()), "mean": latents.mean((0, 1)), "resample": latents.flip(0)}[replace]
        wanted = torch.where(dropped[FEATURES], latents, other)
        with bc.masked(model, dropped, replace=replace, text=tokens):
            _, cache = model.run_with_cache(tokens)
            torch.testing.assert_close(cache[FEATURES], wanted)
            stream = sum(cache[f"blocks.0.{name}"] for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out"))
            written = stream + (wanted - latents) @ dictionary.W_dec
            torch.testing.assert_close(cache[POINT], written, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"neither a unit .* nor a hook point of this model; the nearest are"):
        bc.masked(tiny_model, dropped).__enter__()


def test_circuits_of_latents_are_learned_and_evaluated(tiny_model, random_tokens):
    corpus, name = bc.Corpus.from_tokens(random_tokens, random_tokens[::-1].copy()), FEATURES
    config = bc.SparsifyConfig(max_steps=3, batch_size=2, target_fraction=0.5)
    with bc.spliced(tiny_model, {POINT: a_dictionary()}) as model:
        target = bc.ModelTarget(model)
        found = bc.find_circuit(model, target, corpus, config, units=name, check_memory="off")
        assert (list(found.circuit), found.circuit.kept) == ([name], D_SAE // 2)
        learned, full = (
            bc.evaluate(model, circuit, target, random_tokens, controls=False).subnetwork.kl
            for circuit in (found.circuit, bc.Circuit.full(model, name))
        )
    assert learned > 1e-4 > abs(full)


def test_gradients_reach_gates_and_earlier_layers(tiny_model, tokens):
    """Also where blocks are computed again in the backward pass; in numbers, by differences."""
    place, name = ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"), "blocks.1.hook_mlp_out.features"

    def gated(early, late):
        return tiny_model.hooks([(FEATURES, lambda f, hook: f * early), (name, lambda f, hook: f * late)])

    def loss():
        return tiny_model(tokens).log_softmax(-1)[..., 7].mean()

    with bc.spliced(tiny_model, {POINT: a_dictionary(), place: a_dictionary(seed=1)}):
        gates = [torch.full((D_SAE,), 0.7, requires_grad=True) for _ in range(2)]
        with gated(*gates):
            found = torch.autograd.grad(loss(), gates)
            with recomputed(tiny_model), lean_forward(tiny_model):
                again = torch.autograd.grad(loss(), gates)
        for one, other in zip(found, again, strict=True):
            torch.testing.assert_close(one, other)
        for which in range(2):
            latent = int(found[which].abs().argmax())
            ends = []
            for step in (-0.05, 0.05):
                moved = [gate.detach().clone() for gate in gates]
                moved[which][latent] += step
                with gated(*moved):
                    ends.append(loss().item())
            assert (ends[1] - ends[0]) / 0.1 == pytest.approx(found[which][latent].item(), rel=0.05)


def test_a_gradient_of_seen_latents_is_that_of_what_they_write(tiny_model, tokens):
    dictionary, seen = a_dictionary(), {}
    tiny_model.original_model.requires_grad_(True)
    with bc.spliced(tiny_model, {POINT: dictionary}) as model:
        hooks = [(FEATURES, lambda f, hook: seen.update(f=f)), (POINT, lambda x, hook: seen.update(x=x))]
        logit = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1, 5]
    of_latents, of_stream = torch.autograd.grad(logit, [seen["f"], seen["x"]])
    torch.testing.assert_close(of_latents, of_stream @ dictionary.W_dec.T)


# --- inside and afterwards ---


def test_blocks_can_be_nested_and_combined_with_masks(tiny_model, tokens):
    half = bc.Subnetwork.full(tiny_model).random_like().drop_layer(1)
    with bc.masked(tiny_model, half):
        masked = tiny_model(tokens)
    before = state(tiny_model)
    second = {"blocks.1.hook_resid_pre": a_dictionary(seed=4)}
    with bc.spliced(tiny_model, {POINT: a_dictionary()}), bc.masked(tiny_model, half), bc.spliced(tiny_model, second):
        assert torch.equal(tiny_model(tokens), masked)
        tiny_model.reset_hooks(including_permanent=True)
        zero = [(FEATURES, lambda f, hook: f * 0)]
        assert not torch.equal(tiny_model.run_with_hooks(tokens, fwd_hooks=zero), masked)
    assert state(tiny_model) == before


def test_a_model_is_restored_after_an_exception(tiny_model, tokens):
    before, logits = state(tiny_model), tiny_model(tokens)

    class Unlucky(Codebook):
        left = 1

        def encode(self, x):
            self.left -= 1
            if self.left < 0:
                raise ZeroDivisionError("within the forward pass")
            return super().encode(x)

    with pytest.raises(ZeroDivisionError), bc.spliced(tiny_model, {POINT: Unlucky()}):
        tiny_model(tokens)
    with pytest.raises(KeyboardInterrupt), bc.spliced(tiny_model, {POINT: a_dictionary()}):
        raise KeyboardInterrupt
    assert state(tiny_model) == before
    assert torch.equal(tiny_model(tokens), logits)


def test_16_bits_stay_16_bits(tiny_folders, tokens):
    model = bc.load_model(tiny_folders["llama"], device="cpu", dtype="bfloat16")
    logits = model(tokens)
    with bc.spliced(model, {POINT: a_dictionary()}):
        assert torch.equal(model(tokens), logits)
        changed = model.run_with_hooks(tokens, fwd_hooks=[(FEATURES, lambda f, hook: f * 0)])
    assert changed.dtype == torch.bfloat16
    assert not torch.equal(changed, logits)


def test_another_thread_waits(tiny_model, tokens):
    order = []

    def work():
        bc.Circuit.full(tiny_model)
        order.append("other")

    thread = threading.Thread(target=work)
    with bc.spliced(tiny_model, {POINT: a_dictionary()}):
        thread.start()
        thread.join(0.2)
        order.append("block")
    thread.join(30)
    assert order == ["block", "other"]


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_names_of_transformerlens_2(tiny_folders, architecture):
    """Those that SAELens' folders have: each is a hook point here, or an alias of one."""
    model = bc.load_model(tiny_folders[architecture], device="cpu")
    for name in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post"):
        with bc.spliced(model, {f"blocks.1.{name}": a_dictionary(D_MLP if name == "mlp.hook_post" else D_MODEL)}):
            assert f"blocks.1.{name}.features" in model.hook_dict


# --- what does not fit ---


class OfShape:
    """A dictionary whose latents or reconstructions have some shape."""

    def __init__(self, latents, written):
        self.latents, self.written = latents, written

    def encode(self, x):
        return torch.zeros(self.latents)

    def decode(self, f):
        return torch.zeros(self.written)


@pytest.mark.parametrize(
    ("dictionaries", "words"),
    [
        ({}, "dictionaries should be a dictionary by hook point"),
        ({"blocks.0.hook_resid_past": a_dictionary()}, f"not a hook point of this model; the nearest are {POINT}"),
        ({(POINT, "nowhere"): a_dictionary()}, "'nowhere' is not a hook point of this model"),
        ({POINT: torch.zeros(3)}, "a dictionary has encode and decode, but a Tensor has not"),
        ({POINT: a_dictionary(7)}, "does not fit this model: this dictionary reads activations of width 7, not 24"),
        ({POINT: a_dictionary(24, 7)}, r"writes activations of shape \[1, 2, 7\], but there are \[1, 2, 24\]"),
        ({POINT: OfShape((2, 9), (1, 2, 24))}, r"as \[2, 9\], but should as \[1, 2, d_sae\]"),
        ({"blocks.0.mlp.hook_post": Codebook()}, "does not fit this model: .*"),
        ({"blocks.0.attn.hook_pattern": a_dictionary()}, r"has the axes \[1, 4, 2, 2\], not \[batch, pos, ...\]"),
        ({("blocks.1.hook_mlp_out", POINT): a_dictionary()}, "is reached after blocks.0.hook_resid_post"),
        ({"blocks.0.hook_mlp_in": a_dictionary()}, "use_hook_mlp_in"),
        ({"blocks.1.ln2.hook_in": OfShape((1, 2, 3), (1, 2, 24)), POINT: OfShape(3, 3)}, r"as \[3\]"),
        ({POINT: a_dictionary(), "blocks.0.hook_out": a_dictionary()}, "there can be only one dictionary at blocks.0."),
    ],
)
def test_what_does_not_fit(tiny_model, dictionaries, words):
    before = state(tiny_model)
    with pytest.raises(ValueError, match=words) as caught, bc.spliced(tiny_model, dictionaries):
        pass
    assert "\n" not in str(caught.value)
    assert state(tiny_model) == before


def test_what_does_not_fit_a_model_that_is_spliced(tiny_model):
    first, second = (bc.spliced(tiny_model, {POINT: a_dictionary()}) for _ in range(2))
    with first, pytest.raises(ValueError, match="only one dictionary"), second:
        pass
    with pytest.raises(ValueError, match=r"a hook point, or a pair of two, not \('a',\)"):
        _ends(("a",))
    with pytest.raises(ValueError, match="a str is not a model"), bc.spliced("gpt2", {POINT: a_dictionary()}):
        pass


def test_a_hook_point_whose_value_nothing_reads(tiny_model):
    deaf = tiny_model.hooks(fwd_hooks=[("blocks.1.hook_in", lambda x, hook: torch.ones_like(x))])
    words = f"the logits do not depend on what a hook writes at {POINT}"
    with deaf, pytest.raises(ValueError, match=words), bc.spliced(tiny_model, {POINT: a_dictionary()}):
        pass
