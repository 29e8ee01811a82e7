"""A spec of tiny runs, and sweeps of it."""

import pytest
from transformers import GPTNeoXConfig

import bigram_circuits as bc
from tests.conftest import save_tiny

SMALL = GPTNeoXConfig(
    vocab_size=257, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    max_position_embeddings=32,
)  # fmt: skip

SPEC = """model = "model"
corpus = "text.txt"
max_tokens = 6000
context_length = 16
batch_size = 2
max_steps = 2
random_seeds = 1
analysis = false
check_memory = "off"
"""
GRID = SPEC + "[grid]\nseed = [0, 1]\nsparsity_weight = [1, 10]\n"


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder with a model and a text, for specs that name them."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny(folder / "model", SMALL)
    (folder / "text.txt").write_text("".join(f"line {n} of a small text\n" + "\n" * (n % 7 == 0) for n in range(400)))
    (folder / "spec.toml").write_text(GRID)
    return folder


@pytest.fixture(scope="session")
def swept(project):
    """A sweep of four runs that are done. Tests leave it as it is, and take a copy to change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigram_circuits.workflow.warn_of", lambda checked: None)
        return bc.sweep(project / "spec.toml", out=project / "swept", launcher="debug")
