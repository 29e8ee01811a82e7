"""Time and memory of importing and applying a mask on a large model: `python benchmarks/large_mask.py`.

The model has the shape of Llama 3.2 1B (16 blocks, width 2,048, grouped queries, gated MLPs), random weights, and a
byte tokenizer. For each step, its time and the process's peak memory so far, relative to the weights, are printed.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bigram_circuits as bc

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.conftest import byte_tokenizer


def save_model(folder: Path, layers: int, width: int = 2048, d_vocab: int = 128_256) -> None:
    config = LlamaConfig(
        vocab_size=d_vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        head_dim=width // 32, intermediate_size=4 * width, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def memory() -> tuple[float, float]:
    """Return the current memory of this process, without pages of mapped files, and its peak memory, in GB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # this process only writes the model
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.write:
        save_model(arguments.write, arguments.layers)
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            save_model(Path(folder), layers=1, width=64, d_vocab=257)
        else:
            command = [sys.executable, __file__, "--write", folder, "--layers", str(arguments.layers)]
            subprocess.run(command, check=True)  # apart, so that its memory is not counted here
        model = bc.load_model(folder, device="cpu")
        sites = bc.weight_sites(model)
        total = sum(site.size for site in sites)
        weights = sum(p.numel() * p.element_size() for p in model.original_model.parameters()) / 1e9
        print(f"{total:,} maskable weights; all weights {weights:.2f} GB in float32", flush=True)

        def report(what: str, started: float) -> None:
            now, peak = memory()
            print(
                f"{what:<28} {time.perf_counter() - started:6.1f} s   memory {now:5.2f} GB, peak {peak:5.2f} GB "
                f"= {peak / weights:.2f} x the weights",
                flush=True,
            )

        report("model loaded", time.perf_counter())
        started = time.perf_counter()
        layout = bc.huggingface_layout(model)
        report("layout traced", started)
        generator = torch.Generator().manual_seed(0)
        masks = {name: torch.rand(shape, generator=generator) < 0.01 for name, shape in layout.shapes.items()}
        report("masks made (not counted)", time.perf_counter())
        started = begun = time.perf_counter()
        subnetwork = bc.Subnetwork.from_huggingface(masks, model)
        report("imported", started)
        started = time.perf_counter()
        with bc.masked(model, subnetwork):
            report("applied", started)
            started = time.perf_counter()
            with torch.inference_mode():
                model(torch.zeros(1, 8, dtype=torch.long))
            report("forward pass of 8 tokens", started)
        print(f"import, apply and forward pass: {time.perf_counter() - begun:.1f} s")
        started = time.perf_counter()
        assert all(torch.equal(mask, masks[name]) for name, mask in subnetwork.to_huggingface(model).items())
        report("exported, and equal", started)
        path = Path(folder) / "mask.safetensors"
        started = time.perf_counter()
        subnetwork.save(path)
        report("saved", started)
        print(f"mask file: {path.stat().st_size / 1e6:.1f} MB, {8 * path.stat().st_size / total:.4f} bits a weight")


if __name__ == "__main__":
    main()
