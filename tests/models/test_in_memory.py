"""Models that are objects in memory: hooked without a change to them, without copies, and without files."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, GPT2Model, PreTrainedTokenizerFast

import bigram_circuits as bc
from bigram_circuits.experiments.controls import with_random_blocks, with_shuffled_blocks
from bigram_circuits.models.loading import is_local
from tests.architectures import CONFIGS
from tests.conftest import UNFIT_INPUTS, byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(3))
SHARED = ("gpt2", "llama", "gemma2", "opt", "phi3", "gpt_bigcode")
INTERLEAVED = ("gpt_neox", "bloom", "falcon_alibi")  # fused query-key-value matrices, head by head
ARRAYS = np.random.default_rng(0).integers(0, 257, (48, 16))


def make(name: str, **options):
    """A Hugging Face model that was never saved, with weights that all matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(plain):
    """What a plain Hugging Face model computes, in eval mode, whatever mode it is in."""
    training = [module for module in plain.modules() if module.training]
    plain.eval()
    with torch.no_grad():
        found = plain(TOKENS.to(plain.device)).logits
    for module in training:
        module.training = True
    return found


def storages(tensors):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("name", [*SHARED, *INTERLEAVED])
def test_hooking_and_masking_an_object_leave_it_as_it_was(name, tmp_path):
    plain = make(name).train()
    next(plain.parameters()).requires_grad_(False)
    layers = plain.get_input_embeddings()
    layers.eval()
    bits = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    flags = {key: (parameter.requires_grad, id(parameter)) for key, parameter in plain.named_parameters()}
    modes = {key: (module.training, type(module)) for key, module in plain.named_modules()}
    config, expected = copy.deepcopy(plain.config), logits(plain)

    model = bc.load_model(plain, tokenizer=byte_tokenizer())
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), expected, atol=1e-5)
    with bc.masked(model, bc.Subnetwork.empty(model)):
        assert torch.equal(logits(plain), expected)
        assert not torch.allclose(model(TOKENS), expected, atol=1e-2)
    model.eval()

    assert {key: (module.training, type(module)) for key, module in plain.named_modules()} == modes
    assert {key: (one.requires_grad, id(one)) for key, one in plain.named_parameters()} == flags
    assert plain.config.to_dict() == config.to_dict()
    state = plain.state_dict()
    assert list(state) == list(bits)
    assert all(torch.equal(state[key], bits[key]) for key in bits)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")), expected)
    loss = plain(TOKENS, labels=TOKENS).loss
    loss.backward()  # it can be trained on
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", [*SHARED, *INTERLEAVED])
def test_no_weights_are_copied(name):
    plain = make(name)
    own = storages((*plain.parameters(), *plain.buffers()))
    model = bc.load_model(plain, tokenizer=byte_tokenizer())
    new = {
        place: size
        for place, size in storages((*model.original_model.parameters(), *model.original_model.buffers())).items()
        if place not in own
    }
    added = sum(new.values())
    if name in SHARED:
        assert added <= 0.1 * sum(own.values())
    else:  # queries, keys and values are parts of an interleaved matrix, which no view can be
        d_model, kept = model.cfg.d_model, model.cfg.n_layers * 4
        assert added <= kept * 3 * d_model * (d_model + 1) + 0.1 * sum(own.values())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_it_is_the_model_that_it_would_be_from_a_folder(name, tmp_path):
    plain = make(name)
    plain.save_pretrained(tmp_path / "saved")
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    here, there = (
        bc.load_model(plain, tokenizer=byte_tokenizer()),
        bc.load_model(tmp_path / "saved", device="cpu"),
    )
    assert bc.weight_hash(here) == bc.weight_hash(there)
    assert here.cfg.tokenizer_prepends_bos == there.cfg.tokenizer_prepends_bos
    assert torch.equal(here.to_tokens("some text"), there.to_tokens("some text"))
    subnetwork = bc.Subnetwork.full(here).random_like(seed=0)
    subnetwork.save(tmp_path / "mask.safetensors")
    assert bc.Subnetwork.load(tmp_path / "mask.safetensors", there) == subnetwork
    assert bc.weight_sites(here)[0].weight.dtype == torch.float32


def test_a_change_of_any_tensor_is_another_model():
    plain = make("gpt2")
    before = bc.weight_hash(bc.load_model(plain, tokenizer=byte_tokenizer()))
    for name, parameter in plain.named_parameters():
        if ".h.1." in name:
            continue  # the same as .h.0.
        with torch.no_grad():
            old = parameter.view(-1)[0].clone()
            parameter.view(-1)[0] = torch.nextafter(old, torch.tensor(9.0))
            assert bc.weight_hash(bc.load_model(plain, tokenizer=None)) != before, name
            parameter.view(-1)[0] = old
    assert bc.weight_hash(bc.load_model(plain, tokenizer=None)) == before


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_exports_and_controls_are_made_from_memory(name, tmp_path, no_network):
    plain = make(name)
    plain.config._name_or_path = "somebody/fine-tuned"
    model = bc.load_model(plain, tokenizer=byte_tokenizer())
    assert model.cfg.model_name == "fine-tuned (in memory)"
    assert is_local(model.cfg.model_name)
    subnetwork = bc.Subnetwork.full(model).random_like(seed=0) - bc.Subnetwork.full(model).keep_layer(1)
    folder = bc.export_huggingface(model, subnetwork, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad(), bc.masked(model, subnetwork):
        assert torch.allclose(logits(exported), model(TOKENS), atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    assert bc.export_masks(model, subnetwork, tmp_path / "masks.npz").exists()

    random = with_random_blocks(model, seed=1)
    assert torch.equal(random.W_E, model.W_E)
    for mine, other in zip(bc.weight_sites(model), bc.weight_sites(random), strict=True):
        assert not torch.equal(mine.weight, other.weight)
    shuffled = with_shuffled_blocks(model, seed=1)
    for mine, other in zip(bc.weight_sites(model), bc.weight_sites(shuffled), strict=True):
        assert torch.equal(mine.weight.flatten().sort().values, other.weight.flatten().sort().values)
    assert torch.equal(logits(plain), logits(make(name)))


def test_training_the_object_goes_on_and_the_hooked_model_sees_it():
    plain = make("llama")
    model = bc.load_model(plain, tokenizer=byte_tokenizer())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(TOKENS, labels=TOKENS).loss.backward()
    before = bc.weight_hash(model)
    optimizer.step()
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), logits(plain), atol=1e-5)
    assert bc.weight_hash(model) != before


def test_a_model_without_a_tokenizer_takes_token_ids(tmp_path):
    model = bc.load_model(make("llama"))
    assert model.tokenizer is None
    corpus = bc.Corpus.from_tokens(ARRAYS[:32], ARRAYS[32:])
    table = bc.count_ngrams(corpus.train, 2, d_vocab=257)
    found = bc.find_subnetwork(model, table, corpus, bc.SparsifyConfig(max_steps=2), run_dir=tmp_path / "run")
    assert bc.evaluate(model, found.subnetwork, table, corpus.held_out, seeds=1).subnetwork.total > 0
    folder = bc.export_huggingface(model, found.subnetwork, tmp_path / "exported")
    assert not (folder / "tokenizer.json").exists()


@UNFIT_INPUTS
def test_a_run_of_a_model_in_memory_is_reopened_with_the_object_or_a_folder(tmp_path, capsys):
    from bigram_circuits import cli

    plain = make("gpt2")
    model = bc.load_model(plain, tokenizer=byte_tokenizer())
    (tmp_path / "text.txt").write_text(
        "".join(f"{n}: the value of the name of the list\n" * 9 + "\n" for n in range(40))
    )
    run = bc.study(
        model, tmp_path / "text.txt", max_steps=3, context_length=16, analysis=False, random_seeds=1,
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.rebuild.model == "GPT2LMHeadModel (in memory)"
    assert run.target_words[0] == "bigram"
    for command in ("evaluate", "analyze"):
        assert cli.main([command, str(tmp_path / "run")]) == 1
        assert "was an object in memory: say with --model M where to read it from" in capsys.readouterr().err
    plain.save_pretrained(tmp_path / "saved")
    byte_tokenizer().save_pretrained(tmp_path / "saved")
    again = ["--model", str(tmp_path / "saved"), "--device", "cpu"]
    assert cli.main(["evaluate", str(tmp_path / "run"), *again]) == 0
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The bigram subnetwork of GPT2LMHeadModel (in memory)" in page
    assert "made in Python with a model in memory, so no command reproduces it" in page


# --- kinds of objects ---


class Mine(GPT2LMHeadModel):
    """A model class of the user's."""


def fused(model):
    """A model as `merge_and_unload` leaves it: a low-rank change, added to a weight."""
    with torch.no_grad():
        weight = model.transformer.h[0].attn.c_proj.weight
        weight += torch.randn(24, 2) @ torch.randn(2, 24)
    return model


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: torch.compile(model, backend="eager"), id="compiled"),
        pytest.param(lambda model: (model.compile(backend="eager"), model)[1], id="compiled in place"),
        pytest.param(fused, id="adapter merged"),
        pytest.param(lambda model: model.half().float(), id="rounded"),
        pytest.param(lambda model: (model.activation_checkpointing_enable(), model.train())[1], id="checkpointing"),
        pytest.param(lambda model: model.requires_grad_(False), id="frozen"),
    ],
)
def test_an_object_may_be(change):
    given = change(make("gpt2"))
    plain = getattr(given, "_orig_mod", given)
    model = bc.load_model(given, tokenizer=byte_tokenizer())
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), logits(plain), atol=1e-5)
    assert not model.training


def test_a_class_of_the_user_s():
    plain = Mine(CONFIGS["gpt2"]())
    model = bc.load_model(plain, tokenizer=byte_tokenizer())
    assert model.cfg.architecture == "GPT2LMHeadModel"
    with torch.no_grad():
        assert torch.allclose(model(TOKENS), logits(plain), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_its_precision_is_its_own_or_another_is_asked_for(dtype):
    plain = make("llama").to(dtype)
    assert bc.load_model(plain).cfg.dtype == dtype
    other = bc.load_model(plain, dtype="float32")
    assert other.cfg.dtype == torch.float32
    assert plain.dtype == dtype
    assert bc.weight_sites(other)[0].weight.dtype == torch.float32
    assert bc.same_model(bc.weight_hash(other), bc.weight_hash(bc.load_model(plain)))


def test_a_hooked_model_is_returned_as_it_is(tiny_model):
    assert bc.load_model(tiny_model) is tiny_model
    with pytest.raises(ValueError, match="a TransformerBridge is hooked already, with a tokenizer, device and dtype"):
        bc.load_model(tiny_model, dtype="bfloat16")


def test_a_folder_without_a_tokenizer_can_be_given_one(tmp_path):
    make("gpt2").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: .* or give load_model a tokenizer="):
        bc.load_model(tmp_path)
    assert bc.load_model(tmp_path, tokenizer=byte_tokenizer(), device="cpu").to_tokens("a").shape == (1, 2)


# --- bad objects: one line each ---


def on_meta():
    with torch.device("meta"):
        return make("gpt2")


def split():
    model = make("gpt2")
    model.transformer.h[1].to("meta")
    return model


def hooked():
    model = make("gpt2")
    model.transformer.h[0].register_forward_hook(lambda *_: None)
    return model


def dispatched():
    model = make("gpt2")
    model.transformer.h[0]._hf_hook = SimpleNamespace()
    return model


def pruned():
    model = make("gpt2")
    prune.random_unstructured(model.transformer.h[0].attn.c_proj, "weight", 0.5)
    return model


def parametrized():
    model = make("gpt2")
    parametrize.register_parametrization(model.transformer.h[0].attn.c_proj, "weight", nn.Identity())
    return model


def adapted():
    model = make("gpt2")
    model.transformer.h[0].attn.c_proj.lora_A = nn.Linear(24, 2, bias=False)
    return model


def peft():
    model = nn.Module()
    model.merge_and_unload = lambda: None
    return model


BAD = {
    "a number": (lambda: 3, "a int is not a model: give 'reference', a hub id, a folder, a Hugging Face causal"),
    "None": (lambda: None, "a NoneType is not a model"),
    "a module": (lambda: nn.Linear(2, 2), "a Linear is not a model"),
    "a pipeline": (lambda: SimpleNamespace(model=make("gpt2")), r"holds a model: pass its \.model, with tokenizer="),
    "without a head": (
        lambda: GPT2Model(CONFIGS["gpt2"]()),
        "a GPT2Model has no unembedding: load the",
    ),
    "parallel": (lambda: nn.DataParallel(make("gpt2")), r"a DataParallel wraps a model: pass model\.module"),
    "peft": (peft, r"has adapters beside its weights: pass model\.merge_and_unload\(\)"),
    "an adapter": (adapted, r"has an adapter beside its weights \(.*lora_A.*\): merge it first"),
    "meta": (on_meta, r"has no weights: transformer\.wte\.weight is on the meta device"),
    "split": (split, r"transformer\.h\.1\.\S+ is on the meta device"),
    "hooked": (hooked, r"has hooks of its own \(its module transformer\.h\.0 has hooked\.<locals>\.<lambda>\)"),
    "dispatched": (dispatched, r"its module transformer\.h\.0 has SimpleNamespace"),
    "pruned": (pruned, r"its module transformer\.h\.0\.attn\.c_proj has RandomUnstructured"),
    "parametrized": (parametrized, r"computed by a parametrization, in transformer\.h\.0\.attn\.c_proj"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_what_cannot_be_hooked_is_said_in_a_line(kind):
    bad, said = BAD[kind]
    with pytest.raises(ValueError, match=said) as error:
        bc.load_model(bad(), tokenizer=byte_tokenizer())
    assert "\n" not in str(error.value)


def test_options_that_do_not_fit_an_object():
    plain = make("gpt2")
    bare = byte_tokenizer().backend_tokenizer
    for options, said in (
        ({"revision": "step1"}, "revision='step1' is for models on the hub"),
        ({"dtype": "int8"}, "dtype must be a floating-point type"),
        ({"device": "nowhere"}, "there is no device 'nowhere'"),
        ({"tokenizer": bare}, r"tokenizer must be a Hugging Face tokenizer, not a Tokenizer .*tokenizer_object="),
    ):
        with pytest.raises(ValueError, match=said):
            bc.load_model(plain, **options)
    assert isinstance(byte_tokenizer(), PreTrainedTokenizerFast)
    with pytest.raises(ValueError, match="a GPT2LMHeadModel is not hooked: pass load_model"):
        bc.weight_sites(plain)
    with pytest.raises(ValueError, match=r"the model 'x \(in memory\)' was an object in memory: pass the object"):
        bc.load_model("x (in memory)")
