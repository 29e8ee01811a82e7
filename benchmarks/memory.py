"""Predicted and measured peak memory of mask learning: `python benchmarks/memory.py`.

Each configuration runs in its own process, on the CPU: first the prediction, then three learning steps, and finally
the peak memory of the process (`VmHWM`, so on Linux only). Models have random weights and a byte tokenizer; texts are
random tokens. `--only NAME` runs one configuration.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CONTINUOUS, HARD, STRAIGHT = "continuous_sparsification", "hard_concrete", "straight_through"
CONFIGURATIONS = {  # model, batch, context, method, dtype, granularity, low memory
    "reference, batch 32": ("reference", 32, 128, CONTINUOUS, "float32", "weight", False),
    "reference, batch 8": ("reference", 8, 128, CONTINUOUS, "float32", "weight", False),
    "reference, batch 32, low memory": ("reference", 32, 128, CONTINUOUS, "float32", "weight", True),
    "reference, hard concrete": ("reference", 32, 64, HARD, "float32", "weight", False),
    "small, 2 x 1,024": ("small", 2, 1024, CONTINUOUS, "float32", "weight", False),
    "small, 1 x 2,048": ("small", 1, 2048, CONTINUOUS, "float32", "weight", False),
    "small, 1 x 2,048, low memory": ("small", 1, 2048, CONTINUOUS, "float32", "weight", True),
    "Llama shape, straight through, bfloat16": ("llama", 8, 64, STRAIGHT, "bfloat16", "weight", False),
    "Llama shape, heads and neurons": ("llama", 4, 128, CONTINUOUS, "float32", "head,neuron", False),
    "Llama shape, low memory": ("llama", 4, 512, CONTINUOUS, "float32", "weight", True),
    "Pythia-70M shape": ("pythia-70m", 8, 128, CONTINUOUS, "float32", "weight", False),
    "Pythia-70M shape, low memory": ("pythia-70m", 8, 128, CONTINUOUS, "float32", "weight", True),
    "GPT-2 small shape": ("gpt2", 4, 128, CONTINUOUS, "float32", "weight", False),
    "GPT-2 small shape, low memory": ("gpt2", 4, 128, CONTINUOUS, "float32", "weight", True),
    "smoke": ("small", 1, 16, CONTINUOUS, "float32", "weight", False),
}


def save_model(kind: str, folder: Path) -> None:
    """Build a model of a known shape with random weights."""
    import transformers as hf

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.conftest import byte_tokenizer

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**ends))
    elif kind == "pythia-70m":
        config = hf.GPTNeoXConfig(
            vocab_size=50_304, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
            **ends,
        )  # fmt: skip
        model = hf.GPTNeoXForCausalLM(config)
    elif kind == "small":
        config = hf.GPTNeoXConfig(
            vocab_size=2_000, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024,
            **ends,
        )  # fmt: skip
        model = hf.GPTNeoXForCausalLM(config)
    else:
        config = hf.LlamaConfig(
            vocab_size=8_000, hidden_size=768, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4,
            intermediate_size=2048, **ends,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def measure(name: str, folder: str) -> dict[str, int]:
    """Return the predicted and the measured peak memory, and that of the prediction itself, in bytes."""
    import numpy as np

    import bigram_circuits as bc

    kind, batch_size, length, method, dtype, granularity, low_memory = CONFIGURATIONS[name]
    model = bc.load_model(kind if kind == "reference" else folder, dtype=dtype, device="cpu")
    d_vocab = model.cfg.d_vocab
    rows = max(4, 2 * batch_size)
    tokens = (np.random.default_rng(0).zipf(1.3, size=(rows, length)) % d_vocab).astype(np.int32)
    corpus, target = bc.Corpus.from_tokens(tokens, tokens[:4]), bc.count_ngrams(tokens, 2, d_vocab=d_vocab)
    units = granularity if granularity == "weight" else {"attn": "head", "mlp": "neuron"}
    share = 0.05 if method == "straight_through" else None
    recipe = bc.SparsifyConfig(
        method=method,
        batch_size=batch_size,
        max_steps=3,
        granularity=units,
        target_fraction=share,
        low_memory=low_memory,
    )
    forecast, forecasting = peak_of(lambda: bc.forecast_memory(model, target, corpus, recipe))
    _, learning = peak_of(lambda: bc.find_subnetwork(model, target, corpus, recipe, check_memory="off"))
    return {"forecast": forecast.peak, "forecasting": forecasting, "measured": learning}


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """Call a function; return what it returns, and the highest memory of this process meanwhile, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted from here
    result = work()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return result, int(status["VmHWM"].split()[0]) * 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    if arguments.save:
        save_model(arguments.save[0], Path(arguments.save[1]))
        return
    print(f"{'configuration':<42}{'forecast, GB':>14}{'measured, GB':>14}{'ratio':>8}{'forecasting, GB':>17}")
    for name, (kind, *_) in CONFIGURATIONS.items():
        if (name == "smoke") != arguments.smoke or arguments.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if arguments.smoke:
                save_model(kind, Path(folder))
                found = measure(name, folder)
                print(found)
                continue
            if kind != "reference":
                subprocess.run([sys.executable, __file__, "--save", kind, folder], check=True, capture_output=True)
            command = [sys.executable, __file__, "--measure", name, folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        forecast, measured = found["forecast"] / 1e9, found["measured"] / 1e9
        ratio, forecasting = forecast / measured, found["forecasting"] / 1e9
        print(f"{name:<42}{forecast:>14.2f}{measured:>14.2f}{ratio:>8.2f}{forecasting:>17.2f}", flush=True)


if __name__ == "__main__":
    main()
