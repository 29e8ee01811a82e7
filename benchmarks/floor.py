"""The least memory that learning a mask can take, and what it takes: `python benchmarks/floor.py`.

Of three ways to take the same steps: training the weight matrices (dense), learning a mask of them (masked), and that
with `low_memory`. What each must hold follows from the shapes (`floor`); what it holds is the peak of the bytes in
tensors: on a GPU what PyTorch has allocated, on the CPU counted tensor by tensor, so that what the C library keeps is
not in it (`step.py` measures that too). Weights are random; a step is one of `find_subnetwork` itself.

On a GPU, `python benchmarks/floor.py --device cuda --shapes pythia-1b --dtypes float32 bfloat16` takes a minute.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import LENGTH, train_dense

import bigram_circuits as bc
from bigram_circuits.learning.memory import _Record

sys.path.insert(0, str(Path(__file__).parents[1]))

WAYS = ("dense", "masked", "low memory")
GOAL = 1.15
SCORES = {"masked": 16, "low memory": 8}
"""Bytes for every gate: its score, the gradient of it, and the optimizer's moments."""
SHAPES: dict[str, tuple[dict[str, int], int]] = {  # of Pythia: sizes, and sequences in a batch
    "reference": ({"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}, 16),
    "pythia-70m": ({"vocab_size": 50_304, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}, 8),
    "pythia-1b": ({"vocab_size": 50_304, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}, 16),
    "smoke": ({"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}, 2),
}
STEPS = 3


def make_plain(kind: str, device: str, dtype: torch.dtype) -> Any:
    """Return a plain model of a shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "dtype": dtype}
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if kind == "gpt2":
                return GPT2LMHeadModel(GPT2Config(**ends)).eval()
            size = SHAPES[kind][0]
            return GPTNeoXForCausalLM(GPTNeoXConfig(**size, intermediate_size=4 * size["hidden_size"], **ends)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def sequences(kind: str) -> int:
    """Number of sequences in a batch."""
    return 4 if kind == "gpt2" else SHAPES[kind][1]


def floor(kind: str, plain: Any, way: str) -> int:
    """The bytes that a way must hold at once, at the start of its backward pass.

    - All weights. Of every masked weight: gradient and moments (dense), or score, gradient and moments; and the masked
      weights, which the backward pass needs: all of them, or with `low_memory` those of one matrix.
    - Of every token and block: what the backward pass of fused attention, norms and matrices needs: the inputs of two
      norms (one, if attention and MLP read the same), their outputs, queries, keys and values, the output of the heads,
      and the MLP before and after its nonlinearity. With `low_memory` of one block, and of the others their input.
    - Logits and their gradient: of all tokens (dense), or of as many as fill a piece.
    """
    size = {one.untyped_storage().data_ptr(): one.nbytes for one in plain.parameters()}
    width, depth = plain.config.hidden_size, plain.config.num_hidden_layers
    each = plain.dtype.itemsize
    masked = 12 * width**2 * depth
    norms = 1 if getattr(plain.config, "use_parallel_residual", False) else 2
    of_block = (norms + 2 + 3 + 1) * width + 2 * 4 * width
    activations = of_block + depth * width if way == "low memory" else depth * of_block
    tokens, vocabulary = sequences(kind) * LENGTH, plain.config.vocab_size
    logits = 2 * tokens * vocabulary * each
    total = sum(size.values()) + tokens * activations * each
    if way == "dense":
        return total + 3 * each * masked + logits
    kept = 4 * width**2 if way == "low memory" else masked
    return total + SCORES[way] * masked + kept * each + min(logits, 2 * PIECE)


PIECE = 1 << 24
"""Bytes of the logits that are computed at once."""


def take_steps(kind: str, plain: Any, way: str, device: str) -> None:
    """Take a few steps."""
    vocabulary = plain.config.vocab_size
    tokens = (np.random.default_rng(0).zipf(1.3, size=(64, LENGTH)) % vocabulary).astype(np.int32)
    if way == "dense":
        step = train_dense(plain, torch.from_numpy(tokens[: sequences(kind)]).long().to(device))
        for _ in range(STEPS):
            step()
        return
    model = bc.load_model(plain, check=False)
    corpus, target = bc.Corpus.from_tokens(tokens, tokens[:4]), bc.count_ngrams(tokens, 2, d_vocab=vocabulary)
    config = bc.SparsifyConfig(
        batch_size=sequences(kind),
        max_steps=STEPS,
        retries=0,
        low_memory=way == "low memory",
        stop_undecided=0,
        short_until=0,
    )
    forecast = bc.forecast_memory(model, target, corpus, config)
    print(f"  {way}: a forecast of {forecast.needed / 1e9:.2f} GB more than the model", flush=True)
    bc.find_subnetwork(model, target, corpus, config, check_memory="off")


def peak(work: Callable[[], None], device: str, held: int) -> int:
    """Call a function; return the most bytes in tensors meanwhile, of which those `held` were there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with _Record() if device == "cpu" else nullcontext() as record:
        work()
    return torch.cuda.max_memory_allocated() if record is None else held + record.peak


def measure_tensors(kind: str, device: str, dtype: str) -> dict[str, tuple[int, int]]:
    """Return by way the most bytes in tensors, and the least that it must hold."""
    found = {}
    for way in WAYS:
        plain = make_plain(kind, device, getattr(torch, dtype))
        held = sum({one.untyped_storage().data_ptr(): one.nbytes for one in plain.parameters()}.values())
        least = floor(kind, plain, way)
        found[way] = peak(lambda way=way, plain=plain: take_steps(kind, plain, way, device), device, held), least
        del plain
        gc.collect()
    return found


def measure(
    kinds: Sequence[str] = ("reference", "gpt2", "pythia-70m"), device: str = "cpu",
    dtypes: Sequence[str] = ("float32",), *, smoke: bool = False,
) -> list[tuple]:  # fmt: skip
    """Return rows of (what, measured, goal, unit), and print each as it is measured."""
    rows: list[tuple] = []
    for kind in ["smoke"] if smoke else kinds:
        for dtype in dtypes:
            print(f"{kind}, {sequences(kind)} x {LENGTH} tokens, {dtype}, {device}", flush=True)
            found = measure_tensors(kind, device, dtype)
            for way, (taken, least) in found.items():
                ratio = taken / found["dense"][0]
                print(f"  {way:<12}{taken / 1e9:>8.3f} GB, {taken / least:.2f} of the least, {ratio:.2f} of dense")
                rows.append((f"tensors over their least bytes, {kind}, {way}", taken / least, GOAL, "x"))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*SHAPES, "gpt2"]
    parser.add_argument("--shapes", nargs="+", choices=choices, default=["reference", "gpt2", "pythia-70m"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    measure(arguments.shapes, arguments.device, arguments.dtypes, smoke=arguments.smoke)


if __name__ == "__main__":
    main()
