"""Models for the tests: tiny random ones in Hugging Face folders, and the reference model."""

import shutil
from importlib import import_module
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import get_session
from hypothesis import settings
from playwright.sync_api import sync_playwright
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import bigram_circuits as bc

settings.register_profile("tests", deadline=None, max_examples=60)  # a busy machine is no failure
settings.load_profile("tests")

D_VOCAB = 257  # the bytes and the end of a text

TINY_CONFIGS = {
    "gpt_neox": GPTNeoXConfig(
        vocab_size=D_VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(vocab_size=D_VOCAB, n_embd=24, n_layer=2, n_head=4, n_inner=40, n_positions=64),
    "llama": LlamaConfig(
        vocab_size=D_VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=64,
    ),
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; id 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {character: index for index, character in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_tiny(folder: Path, config) -> Path:
    torch.manual_seed(0)
    for key in ("bos_token_id", "eos_token_id"):
        setattr(config, key, 0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # weights of a size at which every one of them matters to the logits
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """A hub that refuses every connection: really, on this machine, through whatever library is used for it."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def hub_response(status: int):
    """An answer of the hub, of the library that huggingface_hub uses."""
    http = import_module(type(get_session()).__module__.partition(".")[0])
    return http.Response(status, request=http.Request("GET", "https://hub.invalid"))


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium. Tests that look at pages are skipped where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny random models by architecture."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, config) for name, config in TINY_CONFIGS.items()}


@pytest.fixture(scope="session", params=list(TINY_CONFIGS))
def any_model(request, tiny_folders):
    """Each tiny architecture in turn. Tests leave it as they found it."""
    return bc.load_model(tiny_folders[request.param], device="cpu")


@pytest.fixture(scope="session")
def tiny_model(tiny_folders):
    """A tiny GPT-NeoX."""
    return bc.load_model(tiny_folders["gpt_neox"], device="cpu")


@pytest.fixture(scope="session")
def reference_model():
    return bc.load_model("reference", device="cpu")


@pytest.fixture(scope="session")
def reference_corpus(reference_model):
    return bc.load_corpus("reference", tokenizer=reference_model.tokenizer)


@pytest.fixture(scope="session")
def random_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, D_VOCAB, size=(6, 16))


N_PLANTED = 24  # tokens of the planted model


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """A GPT-NeoX whose first MLP computes a known bigram, the weights that do it, and text drawn from that bigram.

    The residual stream has two halves. The embedding writes which token it is into the first; neuron j of the first
    MLP fires for token j and writes its row of logits into the second, which the unembedding reads. All other weights
    are small noise.
    """
    n, width = N_PLANTED, 3 * N_PLANTED
    config = GPTNeoXConfig(
        vocab_size=n, hidden_size=width, num_hidden_layers=3, num_attention_heads=4, intermediate_size=2 * n,
        max_position_embeddings=64, hidden_act="relu", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    rows = torch.randn(n, n)
    rows = 8 * (rows - rows.mean(1, keepdim=True)) / rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.03)
            elif "norm" not in name:
                parameter.zero_()
        eye = torch.eye(n)
        model.gpt_neox.embed_in.weight.copy_(torch.cat([eye, torch.zeros(n, width - n)], 1))
        model.get_output_embeddings().weight.copy_(
            torch.cat([torch.zeros(n, n), eye, torch.zeros(n, width - 2 * n)], 1)
        )
        mlp = model.gpt_neox.layers[0].mlp
        mlp.dense_h_to_4h.weight[:n, :n] += eye
        mlp.dense_h_to_4h.bias.fill_(-2.0)
        mlp.dense_4h_to_h.weight[n : 2 * n, :n] += rows.T / 4
    folder = tmp_path_factory.mktemp("planted")
    model.save_pretrained(folder)
    byte_tokenizer_of(n).save_pretrained(folder)
    hooked = bc.load_model(folder, device="cpu")
    masks = {name: torch.zeros(mask.shape, dtype=torch.bool) for name, mask in bc.Subnetwork.empty(hooked).items()}
    masks["blocks.0.mlp.W_in"][:n, :n] = torch.eye(n, dtype=torch.bool)
    masks["blocks.0.mlp.W_out"][:n, n : 2 * n] = True
    subnetwork = bc.Subnetwork(masks, model_name=str(folder), weight_hash=bc.weight_hash(hooked), lineage="planted")
    with torch.no_grad(), bc.masked(hooked, subnetwork):
        probs = hooked(torch.arange(n)[:, None])[:, 0].double().softmax(-1).numpy()
    rng = np.random.default_rng(0)
    tokens = np.zeros((64, 32), dtype=np.int64)
    tokens[:, 0] = rng.integers(0, n, 64)
    for place in range(1, 32):
        tokens[:, place] = [rng.choice(n, p=probs[current]) for current in tokens[:, place - 1]]
    return hooked, subnetwork, tokens


def byte_tokenizer_of(n: int) -> PreTrainedTokenizerFast:
    """One token for each of the first n - 1 small letters; id 0 ends a text."""
    vocabulary = {"<|endoftext|>": 0} | {chr(ord("a") + index): index + 1 for index in range(n - 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
