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
from pathlib import Path

CONFIGURATIONS = {  # model, batch, context, method, dtype, granularity
    "reference, batch 32": ("reference", 32, 128, "continuous_sparsification", "float32", "weight"),
    "reference, batch 8": ("reference", 8, 128, "continuous_sparsification", "float32", "weight"),
    "reference, hard concrete": ("reference", 32, 64, "hard_concrete", "float32", "weight"),
    "Llama shape, straight through, bfloat16": ("llama", 8, 64, "straight_through", "bfloat16", "weight"),
    "Llama shape, heads and neurons": ("llama", 4, 128, "continuous_sparsification", "float32", "head,neuron"),
    "Pythia-70M shape": ("pythia-70m", 8, 128, "continuous_sparsification", "float32", "weight"),
    "GPT-2 small shape": ("gpt2", 4, 128, "continuous_sparsification", "float32", "weight"),
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
    else:
        config = hf.LlamaConfig(
            vocab_size=8_000, hidden_size=768, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4,
            intermediate_size=2048, **ends,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def measure(name: str, folder: str) -> None:
    """Print the predicted and the measured peak memory as JSON."""
    import numpy as np

    import bigram_circuits as bc

    kind, batch_size, length, method, dtype, granularity = CONFIGURATIONS[name]
    model = bc.load_model(kind if kind == "reference" else folder, dtype=dtype, device="cpu")
    d_vocab = model.cfg.d_vocab
    rows = max(64, 2 * batch_size)
    tokens = (np.random.default_rng(0).zipf(1.3, size=(rows, length)) % d_vocab).astype(np.int32)
    corpus, target = bc.Corpus.from_tokens(tokens, tokens[:4]), bc.count_ngrams(tokens, 2, d_vocab=d_vocab)
    units = granularity if granularity == "weight" else {"attn": "head", "mlp": "neuron"}
    share = 0.05 if method == "straight_through" else None
    recipe = bc.SparsifyConfig(
        method=method, batch_size=batch_size, max_steps=3, granularity=units, target_fraction=share
    )
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory is counted from here
    forecast = bc.forecast_memory(model, target, corpus, recipe)
    bc.find_subnetwork(model, target, corpus, recipe)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"forecast": forecast.peak, "measured": int(status["VmHWM"].split()[0]) * 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    if arguments.save:
        save_model(arguments.save[0], Path(arguments.save[1]))
        return
    print(f"{'configuration':<42}{'forecast, GB':>14}{'measured, GB':>14}{'ratio':>8}")
    for name, (kind, *_) in CONFIGURATIONS.items():
        if arguments.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if kind != "reference":
                subprocess.run([sys.executable, __file__, "--save", kind, folder], check=True, capture_output=True)
            command = [sys.executable, __file__, "--measure", name, folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        forecast, measured = found["forecast"] / 1e9, found["measured"] / 1e9
        print(f"{name:<42}{forecast:>14.2f}{measured:>14.2f}{forecast / measured:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
