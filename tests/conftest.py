"""Models for the tests: tiny random ones in Hugging Face folders, and the reference model."""

import gc
import os
import shutil
from functools import cache
from importlib import import_module
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.utils import get_session
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import tests.checking  # noqa: F401 (decorates the functions of the package, which is imported after it)

# isort: split
import bigram_circuits as bc

settings.register_profile("tests", deadline=None, max_examples=60)  # a busy machine is no failure
settings.load_profile("tests")

UNFIT_INPUTS = pytest.mark.filterwarnings("ignore::bigram_circuits.InputWarning")
"""For tests of whole studies of untrained models and deliberately small texts, which `study` warns of."""

LONGEST = ("test_cli.py", "test_docs.py", "test_notebooks.py", "test_survival.py", "test_ranks.py")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """What was imported stays: the garbage collector, which takes 0.3 s to look through it, need not do so again."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session", autouse=True)
def small_samples():
    """An atlas of 12 tokens instead of 200 with every analysis, and few tokens traced through neurons.

    The whole is made by the slow tests of the main job, in a process of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigram_circuits.analysis.suite.TOKENS_EXPLAINED", 12)
        patch.setattr("bigram_circuits.analysis.neurons._TOKENS", 8)
        patch.setattr("bigram_circuits.analysis.prediction._TOKENS", 8)
        patch.setattr("bigram_circuits.analysis.prediction._REMOVALS", 8 * 40)
        patch.setattr("bigram_circuits.analysis.units._RANKED_ON", 8)
        patch.setattr(import_module("bigram_circuits.analysis.sufficiency"), "_PERIOD", 8)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory):
    """The key by which runs of this user are known lies in a folder of the tests, also for processes they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


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
    """A part of the reference text: all of it takes several seconds to read."""
    return bc.load_corpus("reference", tokenizer=reference_model.tokenizer, max_tokens=150_000)


@pytest.fixture(scope="session")
def random_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, D_VOCAB, size=(6, 16))


@cache
def planted_circuit(architecture: str, **options) -> bc.Planted:
    """A model with a planted circuit; tests leave it as they found it."""
    return bc.plant_bigram(architecture, **options)


@pytest.fixture(scope="session")
def planted():
    """A GPT-NeoX whose first MLP computes a known bigram, the weights that do it, and text drawn from that bigram."""
    found = planted_circuit("neox", distractors=0.04, n_layers=3)
    return found.model, found.circuit, found.corpus.train[:64]


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, without a window."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        assert not os.environ.get("CI"), "the pages must be tested here, but there is no Chromium: install chromium"
        pytest.skip("no Chromium on this machine: install the package chromium to test the pages")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        window = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield window
        window.close()


@pytest.fixture(scope="module")
def no_forecast():
    """Learning asks for no forecast of memory, which takes longer than a few steps of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigram_circuits.learning.training.forecast_memory", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Matrices this small take longer to share out than to multiply."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
