"""Cost of a logit lens over a corpus, relative to the forward pass and its unembedding products.

`python benchmarks/logit_lens.py` runs the reference model and a random model of GPT-2 small's shape. Times are medians
of interleaved repetitions; ratios are of adjacent runs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import bigram_circuits as bc
from bigram_circuits.analysis import conditions, lens
from bigram_circuits.models.activations import readout, residual_streams
from bigram_circuits.models.loading import REFERENCE_FOLDER


def passes(model, tokens: torch.Tensor) -> None:
    """Run the forward pass, and one product with the unembedding for every layer."""
    streams, _ = residual_streams(model, tokens)
    for layer in streams:
        for rows in layer.flatten(0, 1).split(4096):
            readout(model, rows)


def whole(model, tokens: torch.Tensor, sums) -> None:
    """Run the same, with all statistics that the lens accumulates."""
    sums.add(conditions.Batch(tokens, *residual_streams(model, tokens)))


def compare(name: str, model, tokens: torch.Tensor, repetitions: int) -> None:
    """Print the two times and their ratio."""
    target = bc.count_ngrams(tokens.numpy(), 2, d_vocab=model.cfg.d_vocab)
    times: dict[str, list[float]] = {"passes": [], "lens": []}
    with torch.inference_mode():
        for _ in range(repetitions + 1):  # the first warms up
            for kind in times:
                started = time.perf_counter()
                if kind == "passes":
                    passes(model, tokens)
                else:
                    whole(model, tokens, lens.LensSums(model, target))
                times[kind].append(time.perf_counter() - started)
    plain, full = (statistics.median(one[1:]) for one in times.values())
    print(f"{name}: forward and unembedding {plain:.3f} s, logit lens {full:.3f} s: {full / plain:.2f} times")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    smoke = parser.parse_args(argv).smoke
    rows, repetitions = ((1, 1), (1, 1)) if smoke else ((32, 4), (9, 3))
    rng = np.random.default_rng(0)
    model = bc.load_model("reference", device="cpu")
    compare("reference model, 32 x 128", model, torch.from_numpy(rng.integers(0, 1024, (rows[0], 128))), repetitions[0])
    size = {"n_layer": 1, "n_embd": 24, "n_head": 2, "vocab_size": 1024} if smoke else {}
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **size)).save_pretrained(folder)
        for file in REFERENCE_FOLDER.glob("tokenizer*"):
            (type(file)(folder) / file.name).write_bytes(file.read_bytes())
        model = bc.load_model(folder, device="cpu")
    compare(
        "GPT-2 small's shape, 4 x 128",
        model,
        torch.from_numpy(rng.integers(0, model.cfg.d_vocab, (rows[1], 128))),
        repetitions[1],
    )


if __name__ == "__main__":
    main()
