"""Cost of `evaluate` with all controls, relative to the forward passes it needs: `python benchmarks/evaluation.py`.

The baseline runs the same batches under every condition (the subnetwork and its controls) without measuring anything.
It is run on the reference model with its held-out text, and, for a large vocabulary, on a random model of GPT-2 small's
shape with few tokens. Times are medians of interleaved repetitions.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import bigram_circuits as bc
from bigram_circuits.models.activations import batch_size_for
from bigram_circuits.models.loading import REFERENCE_FOLDER
from bigram_circuits.text.corpus import in_order, spread

GOAL = 1.2


def conditions(model: Any, subnetwork: bc.Subnetwork, seeds: int) -> list[bc.Subnetwork | None]:
    """Return the subnetworks that `evaluate` runs the model with; None means all weights."""
    random = [subnetwork.random_like(seed=seed) for seed in range(seeds)]
    controls = [bc.Subnetwork.empty(model), ~subnetwork, bc.Subnetwork.magnitude(model, like=subnetwork)]
    return [None, subnetwork, *controls, *random, *(~one for one in random)]


def forward_seconds(model: Any, every: list[bc.Subnetwork | None], tokens: np.ndarray) -> float:
    """Time the forward passes alone, in seconds."""
    total = 0.0
    for one in every:
        with torch.inference_mode(), nullcontext() if one is None else bc.masked(model, one):
            started = time.perf_counter()
            for batch in in_order(tokens, batch_size_for(model, tokens.shape[1])):
                model(batch)
            total += time.perf_counter() - started
    return total


def ratio(
    name: str, model: Any, target: Any, tokens: np.ndarray, repeats: int, seeds: int
) -> tuple[str, float, float, str]:
    """Return the median ratio of evaluation time to forward-pass time, with this many random controls."""
    generator = torch.Generator().manual_seed(0)
    shapes = bc.Subnetwork.full(model).shapes
    masks = {site: torch.rand(shape, generator=generator) < 0.05 for site, shape in shapes.items()}
    subnetwork = bc.Subnetwork(masks)
    every = conditions(model, subnetwork, seeds)
    model(torch.from_numpy(tokens[:1].astype(np.int64)))
    plain, whole = [], []
    for _ in range(repeats):
        plain.append(forward_seconds(model, every, tokens))
        started = time.perf_counter()
        bc.evaluate(model, subnetwork, target, tokens, seeds=seeds)
        whole.append(time.perf_counter() - started)
    print(
        f"{name}, {tokens.size:,} tokens, {len(every)} conditions: forward passes {statistics.median(plain):.2f} s, "
        f"evaluate {statistics.median(whole):.2f} s"
    )
    found = statistics.median(one / other for one, other in zip(whole, plain, strict=True))
    return f"evaluating {name}, against its forward passes", found, GOAL, "x"


def measure(repeats: int = 3, *, smoke: bool = False) -> list[tuple[str, float, float, str]]:
    """Return rows of (what, measured, goal, unit)."""
    repeats, rows_of_gpt2 = (1, 1) if smoke else (repeats, 8)
    rows: list[tuple[str, float, float, str]] = []
    if not smoke:
        model = bc.load_model("reference", device="cpu")
        corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
        target = bc.count_ngrams(corpus.train, 2, d_vocab=model.cfg.d_vocab)
        rows = [ratio("the reference model", model, target, spread(corpus.held_out, 1 << 13), repeats, seeds=3)]
    size = {"n_layer": 1, "n_embd": 24, "n_head": 2, "vocab_size": 1024} if smoke else {}
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **size)).save_pretrained(folder)
        for file in REFERENCE_FOLDER.glob("tokenizer*"):
            (type(file)(folder) / file.name).write_bytes(file.read_bytes())
        model = bc.load_model(folder, device="cpu")
    rng = np.random.default_rng(0)
    tokens = (model.cfg.d_vocab * rng.random((2000, 128)) ** 3).astype(np.int64)
    target = bc.count_ngrams(tokens, 2, d_vocab=model.cfg.d_vocab)
    return [*rows, ratio("GPT-2 small's shape", model, target, tokens[:rows_of_gpt2], repeats, seeds=1)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    for what, measured, goal, unit in measure(arguments.repeats, smoke=arguments.smoke):
        print(f"{what}: {measured:.3f} {unit}, goal {goal:g} {unit}: {'met' if measured <= goal else 'MISSED'}")


if __name__ == "__main__":
    main()
