"""Time and memory of a step of mask learning, over those of a dense step: `python benchmarks/step.py`.

A dense step is forward, backward and fused AdamW for the weight matrices that would be masked, of the plain Hugging
Face model on the same batch. A step of mask learning is one of `find_subnetwork` itself, everything included: from one
call of the target to the next. Times are medians of steps taken in turns in one process; memory is the highest of a
process of its own (`VmHWM`, so on Linux only), with and without what it held before it loaded the model. Weights are
random: they do not change the cost.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bigram_circuits as bc

GOALS = {"time": 1.10, "memory": 1.25, "memory, low": 0.8}
SHAPES = {"reference": 16, "gpt2": 4, "pythia-70m": 8}
"""Sequences in a batch, of 128 tokens."""
TITLES = {"reference": "reference, 16 x 128", "gpt2": "GPT-2 small, 4 x 128", "pythia-70m": "Pythia-70M, 8 x 128"}
LENGTH = 128
WAYS = ("dense", "masked")


def save_model(kind: str, folder: Path, **size: int) -> None:
    """A model of a known shape with random weights, and a byte tokenizer."""
    import transformers as hf

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.conftest import byte_tokenizer

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "reference":
        model = hf.AutoModelForCausalLM.from_pretrained(bc.models.REFERENCE_FOLDER, dtype=torch.float32)
    elif kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**ends))
    else:
        shape = dict(vocab_size=50_304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8) | size
        model = hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(**shape, intermediate_size=4 * shape["hidden_size"], **ends, dtype=torch.float32)
        )
    model.save_pretrained(folder)
    tokenizer = (
        hf.AutoTokenizer.from_pretrained(bc.models.REFERENCE_FOLDER) if kind == "reference" else byte_tokenizer()
    )
    tokenizer.save_pretrained(folder)


def some_tokens(d_vocab: int, rows: int) -> np.ndarray:
    return (np.random.default_rng(0).zipf(1.3, size=(rows, LENGTH)) % d_vocab).astype(np.int32)


def dense_step(folder: str, batch_size: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """One step of training the weight matrices of the plain model, as a function to call."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    kept_frozen = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and id(parameter) not in kept_frozen and "wpe" not in name
        parameter.requires_grad_(matrix)
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(matrices, lr=1e-6, fused=True)
    tokens = torch.from_numpy(some_tokens(model.config.vocab_size, batch_size)).long().to(device)

    def step() -> None:
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


class Timed:
    """A target that notes when it was asked for a loss."""

    def __init__(self, target: bc.NGramTable) -> None:
        self.target, self.d_vocab, self.times = target, target.d_vocab, []

    def cross_entropy(self, logits: Any, tokens: Any) -> Any:
        self.times.append(time.perf_counter())
        return self.target.cross_entropy(logits, tokens)

    def surprisal(self, tokens: Any) -> Any:
        return self.target.surprisal(tokens)


def masked_steps(
    folder: str, batch_size: int, device: str, dtype: torch.dtype, **recipe: Any
) -> Callable[[int], list[float]]:
    """Some steps of mask learning, as a function of their number that gives the seconds of each."""
    model = bc.load_model(folder, device=device, dtype=dtype)
    tokens = some_tokens(model.cfg.d_vocab, max(64, 2 * batch_size))
    corpus, table = bc.Corpus.from_tokens(tokens, tokens[:4]), bc.count_ngrams(tokens, 2, d_vocab=model.cfg.d_vocab)

    def steps(number: int) -> list[float]:
        target = Timed(table)
        config = bc.SparsifyConfig(batch_size=batch_size, max_steps=number + 1, retries=0, **recipe)
        bc.find_subnetwork(model, target, corpus, config)
        learning = target.times[2:-2]  # without the forecast of memory before, and soft against hard after
        assert len(learning) == number + 1, f"the target was asked {len(target.times)} times"
        return list(np.diff(learning))

    return steps


def measure_time(folder: str, batch_size: int, device: str, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, in turns."""
    dense, masked = (make(folder, batch_size, device, dtype) for make in (dense_step, masked_steps))
    taken: dict[str, list[float]] = {"dense": [], "masked": []}
    dense()
    masked(1)
    for _ in range(rounds):
        taken["masked"] += masked(3)
        for _ in range(3):
            started = time.perf_counter()
            dense()
            taken["dense"].append(time.perf_counter() - started)
    return taken


def measure_memory(way: str, folder: str, batch_size: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """GB held at most by this process (on a GPU: allocated), and before the model was loaded."""
    import transformers  # noqa: F401

    def highest() -> float:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 1e6

    before = highest()
    if way == "dense":
        step = dense_step(folder, batch_size, device, dtype)
        for _ in range(4):
            step()
    else:
        masked_steps(folder, batch_size, device, dtype, **({"low_memory": True} if way == "low memory" else {}))(3)
    if device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated() / 1e9, "before": 0.0}
    return {"peak": highest(), "before": before}


def in_own_process(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(kinds: list[str], rounds: int = 5, device: str = "cpu", dtype: str = "float32") -> list[tuple]:
    """Rows of (what, measured, goal, unit), printed as they come."""
    rows: list[tuple] = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            save_model(kind, Path(folder))
            run = [folder, str(SHAPES[kind]), device, dtype]
            taken = in_own_process("--time", str(rounds), *run)
            dense, masked = (float(np.median(taken[way])) for way in ("dense", "masked"))
            print(f"{TITLES[kind]}: dense step {dense:.3f} s, mask-learning step {masked:.3f} s", flush=True)
            rows.append((f"step time, {TITLES[kind]}", masked / dense, GOALS["time"], "x"))
            held = {way: in_own_process("--memory", way, *run) for way in WAYS}
            for way in WAYS:
                peak, before = held[way]["peak"], held[way]["before"]
                print(f"  {way:<12} peak {peak:.2f} GB, {peak - before:.2f} GB of it since the imports", flush=True)
            own = {way: held[way]["peak"] - held[way]["before"] for way in WAYS}
            rows.append((f"memory, {TITLES[kind]}", own["masked"] / own["dense"], GOALS["memory"], "x"))
            rows.append(
                (f"memory with low_memory, {TITLES[kind]}", own["low memory"] / own["dense"], GOALS["memory, low"], "x")
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5, help="of three steps of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time or arguments.memory:
        first, folder, batch_size, device, dtype = arguments.time or arguments.memory
        run = (folder, int(batch_size), device, getattr(torch, dtype))
        print(json.dumps(measure_time(*run, int(first)) if arguments.time else measure_memory(first, *run)))
        return
    for what, measured, goal, unit in measure(arguments.shapes, arguments.rounds, arguments.device, arguments.dtype):
        met = "met" if measured <= goal else "NOT met"
        print(f"{what:<50}{measured:>7.2f} {unit}  goal {goal:.2f}  {met}")


if __name__ == "__main__":
    main()
