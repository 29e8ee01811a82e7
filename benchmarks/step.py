"""Time and memory of a mask-learning step relative to a dense step: `python benchmarks/step.py`.

A dense step is forward, backward and fused AdamW for the weight matrices that would be masked, with the plain Hugging
Face model on the same batch. A mask-learning step is one of `find_subnetwork` itself with everything included, timed
from one call of a callback to the next. Times are medians of alternating steps in one process; memory is the peak of a
separate process (`VmHWM`, so on Linux only), with and without what it held before loading the model. Weights are
random, which does not change the cost.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bigram_circuits as bc
from bigram_circuits.cli.allocator import return_freed_memory
from bigram_circuits.models.loading import REFERENCE_FOLDER

GOALS = {"time": 1.10, "memory": 1.25, "memory, low": 0.8}
SHAPES = {"reference": 16, "gpt2": 4, "pythia-70m": 8, "smoke": 2}
"""Number of sequences in a batch, of 128 tokens each."""
TITLES = {
    "reference": "reference, 16 x 128", "gpt2": "GPT-2 small, 4 x 128", "pythia-70m": "Pythia-70M, 8 x 128",
    "smoke": "tiny, 2 x 128",
}  # fmt: skip
LENGTH = 128
WAYS = ("dense", "masked", "low memory")


PYTHIA_70M = {"vocab_size": 50_304, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
SMOKE = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2}


def save_model(kind: str, folder: Path, **size: int) -> None:
    """Build a model of a known shape with random weights and a byte tokenizer; `size` overrides sizes of Pythia-70M."""
    import transformers as hf

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.conftest import byte_tokenizer

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "reference":
        model = hf.AutoModelForCausalLM.from_pretrained(REFERENCE_FOLDER, dtype=torch.float32)
        tokenizer = hf.AutoTokenizer.from_pretrained(REFERENCE_FOLDER)
    else:
        tokenizer = byte_tokenizer()
        shape = PYTHIA_70M | (SMOKE if kind == "smoke" else {}) | size
        neox = hf.GPTNeoXConfig(**shape, intermediate_size=4 * shape["hidden_size"], **ends)
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**ends)) if kind == "gpt2" else hf.GPTNeoXForCausalLM(neox)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def some_tokens(d_vocab: int, rows: int) -> np.ndarray:
    return (np.random.default_rng(0).zipf(1.3, size=(rows, LENGTH)) % d_vocab).astype(np.int32)


def dense_steps(
    folder: str, batch_size: int, device: str, dtype: torch.dtype
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return functions that take a training step for the weight matrices of the plain model.

    The loss of the first is that of the next tokens; of the second, that which masks are learned with.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    vocabulary = model.config.vocab_size
    tokens = torch.from_numpy(some_tokens(vocabulary, batch_size)).long().to(device)
    bigrams = bc.count_ngrams(some_tokens(vocabulary, max(64, 2 * batch_size)), 2, d_vocab=vocabulary)
    return train_dense(model, tokens), train_dense(model, tokens, bigrams)


def train_dense(model: Any, tokens: torch.Tensor, target: Any = None) -> Callable[[], None]:
    """Return a function that takes one training step for the weight matrices of a plain model.

    Its loss is that of the next tokens, as Hugging Face computes it, or the cross-entropy from a target.
    """
    kept_frozen = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and id(parameter) not in kept_frozen and "wpe" not in name
        parameter.requires_grad_(matrix)
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(matrices, lr=1e-6, fused=True)

    def step() -> None:
        if target is None:
            loss = model(tokens, labels=tokens).loss
        else:
            loss = target.cross_entropy(model(tokens).logits, tokens).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


class Pace:
    """A callback that records the time of each step but the first, and calls a function in between."""

    def __init__(self, between: Callable[[], None]) -> None:
        self.between = between
        self.steps: list[float] = []
        self._last: float | None = None

    def on_step(self, record: Any) -> None:
        """Take the time since the last call."""
        if self._last is not None:
            self.steps.append(time.perf_counter() - self._last)
        self.between()
        self._last = time.perf_counter()

    def on_end(self, found: Any) -> None:
        """Nothing is left to do."""


def masked_steps(
    folder: str,
    batch_size: int,
    device: str,
    dtype: torch.dtype,
    number: int,
    between: Callable[[], None],
    **recipe: Any,
) -> list[float]:
    """Time individual mask-learning steps, in seconds, excluding a function called in between."""
    model = bc.load_model(folder, device=device, dtype=dtype)
    tokens = some_tokens(model.cfg.d_vocab, max(64, 2 * batch_size))
    corpus, target = bc.Corpus.from_tokens(tokens, tokens[:4]), bc.count_ngrams(tokens, 2, d_vocab=model.cfg.d_vocab)
    pace = Pace(between)
    config = bc.SparsifyConfig(
        batch_size=batch_size, max_steps=number + 1, retries=0, stop_undecided=0, short_until=0, **recipe
    )
    bc.find_subnetwork(model, target, corpus, config, callbacks=[pace], check_memory="off")
    assert len(pace.steps) == number, f"{len(pace.steps) + 1} steps were taken"
    return pace.steps


def measure_time(folder: str, batch_size: int, device: str, dtype: torch.dtype, number: int) -> dict[str, list[float]]:
    """Time mask-learning and dense steps, the latter with either loss, in alternation, in seconds."""
    steps = dict(zip(("dense", "dense, same loss"), dense_steps(folder, batch_size, device, dtype), strict=True))
    taken: dict[str, list[float]] = {name: [] for name in steps}

    def between() -> None:
        for name, step in steps.items():
            started = time.perf_counter()
            with torch.enable_grad():
                step()
            taken[name].append(time.perf_counter() - started)

    masked = masked_steps(folder, batch_size, device, dtype, number, between)
    return {name: seconds[1:] for name, seconds in taken.items()} | {"masked": masked}


def measure_memory(way: str, folder: str, batch_size: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Return this process's peak memory in GB (on a GPU: allocated), and its memory before the model was loaded."""
    from transformer_lens.model_bridge import TransformerBridge  # noqa: F401 (as learning does, so as not to count it)

    def highest() -> float:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 1e6

    before = highest()
    if way == "low memory":
        return_freed_memory()  # as the command line does
    if way == "dense":
        step, _ = dense_steps(folder, batch_size, device, dtype)
        for _ in range(4):
            step()
    else:
        masked_steps(folder, batch_size, device, dtype, 3, lambda: None, low_memory=way == "low memory")
    if device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated() / 1e9, "before": 0.0}
    return {"peak": highest(), "before": before}


def in_own_process_of(script: str, *arguments: str) -> Any:
    """Run a benchmark in a separate process and parse the JSON that it prints last."""
    done = subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(
    kinds: Sequence[str] = ("reference", "gpt2", "pythia-70m"), steps: int = 15, device: str = "cpu",
    dtype: str = "float32", *, smoke: bool = False,
) -> list[tuple]:  # fmt: skip
    """Return rows of (what, measured, goal, unit), and print each as it is measured."""
    rows: list[tuple] = []
    kinds, steps = (["smoke"], 2) if smoke else (kinds, steps)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            save_model(kind, Path(folder))
            run = [folder, str(SHAPES[kind]), device, dtype]
            here = (folder, SHAPES[kind], device, getattr(torch, dtype))
            taken = measure_time(*here, steps) if smoke else in_own_process_of(__file__, "--time", str(steps), *run)
            seconds = {way: float(np.median(some)) for way, some in taken.items()}
            said = ", ".join(f"{way} {some:.3f} s" for way, some in seconds.items())
            print(f"{TITLES[kind]}: steps {said}", flush=True)
            for way in ("dense", "dense, same loss"):
                rows.append((f"step / {way}, {TITLES[kind]}", seconds["masked"] / seconds[way], GOALS["time"], "x"))
            held = {
                way: measure_memory(way, *here) if smoke else in_own_process_of(__file__, "--memory", way, *run)
                for way in WAYS
            }
            for way in WAYS:
                peak, before = held[way]["peak"], held[way]["before"]
                print(f"  {way:<12} peak {peak:.2f} GB, {peak - before:.2f} GB of it since the imports", flush=True)
            own = {way: held[way]["peak"] - held[way]["before"] for way in WAYS}
            if smoke:  # this process has held more before
                own = dict.fromkeys(own, 1.0)
            rows.append((f"memory, {TITLES[kind]}", own["masked"] / own["dense"], GOALS["memory"], "x"))
            rows.append(
                (f"memory with low_memory, {TITLES[kind]}", own["low memory"] / own["dense"], GOALS["memory, low"], "x")
            )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["reference", "gpt2", "pythia-70m"])
    parser.add_argument("--steps", type=int, default=15, help="of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.time or arguments.memory:
        first, folder, batch_size, device, dtype = arguments.time or arguments.memory
        run = (folder, int(batch_size), device, getattr(torch, dtype))
        print(json.dumps(measure_time(*run, int(first)) if arguments.time else measure_memory(first, *run)))
        return
    run = (arguments.shapes, arguments.steps, arguments.device, arguments.dtype)
    for what, measured, goal, unit in measure(*run, smoke=arguments.smoke):
        met = "met" if measured <= goal else "NOT met"
        print(f"{what:<50}{measured:>7.2f} {unit}  goal {goal:.2f}  {met}")


if __name__ == "__main__":
    main()
