"""Run every benchmark at a size of seconds, only to see that it runs: `python benchmarks/smoke.py [NAME ...]`.

Each has an option `--smoke` for this, which uses the tiny model and the short text that are made here. The numbers that
it prints then mean nothing.
"""

import argparse
import contextlib
import io
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

NOT_ALONE = {"smoke", "quality_models", "start", "pages"}
"""Modules without a benchmark of their own, and `start.py`, which `cost.py` runs."""

SHAPE = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_model(folder: Path) -> Path:
    """Save a GPT-NeoX with random weights and a byte tokenizer, and return its folder."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from tests.conftest import byte_tokenizer

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        **SHAPE, intermediate_size=32, max_position_embeddings=128, bos_token_id=256, eos_token_id=256
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_text(folder: Path) -> Path:
    """Write a text with some regularity, and return its path."""
    path = folder / "text.txt"
    path.write_text("".join(f"line {n} of a small text\n" + "\n" * (n % 7 == 0) for n in range(1500)))
    return path


def find_options(folder: Path) -> list[str]:
    """Return arguments for `bigram-circuits find` on a tiny model and text, made in this folder."""
    folder.mkdir(exist_ok=True)
    words = f"--corpus {write_text(folder)} --max-tokens 8000 --context-length 32 --steps 4 --batch-size 4"
    return [str(save_model(folder)), *words.split(), "--random-seeds", "1"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = sorted({path.stem for path in FOLDER.glob("*.py")} - NOT_ALONE)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all if not given")
    failed = 0
    for name in parser.parse_args().names or names:
        before, said = os.times(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                failed += bool(import_module(name).main(["--smoke"]))
        except Exception:
            failed += 1
            print(f"{said.getvalue()}\n{traceback.format_exc()}", file=sys.stderr)
        seconds = sum(os.times()[:4]) - sum(before[:4])
        print(f"{name}: {seconds:.1f} s of CPU", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
