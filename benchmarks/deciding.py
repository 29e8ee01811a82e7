"""Time to a decided mask, and its quality, with short steps and without: `python benchmarks/deciding.py`.

By default most steps see only the beginnings of sequences (`short_until`). The masks that come out differ in size, so
those of whole sequences alone are made with several sparsity weights, and compared at the size of the default's: r
linearly, KL on logarithmic axes, between the two nearest sizes. Both are measured on held-out text.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quality_models import OUTSIDE, load
from smoke import save_model, write_text

import bigram_circuits as bc
from bigram_circuits.text.corpus import spread

GOALS = {"seconds": 1 / 3, "kl": 1.0, "r": 0.0}
AROUND = (1.0, 0.5, 1.5)
"""What the sparsity weight is multiplied by for masks as large as the default's, a little larger, and smaller."""
HELD_OUT = 1 << 15
"""Tokens to measure on."""
SHARED = Path(__file__).resolve().parents[2] / "shared"


def learned(model: Any, target: Any, corpus: bc.Corpus, seed: int, **recipe: Any) -> dict[str, float]:
    """Learn a mask, and return its size, what it took, and how well it does."""
    started, cpu = time.perf_counter(), time.process_time()
    config = bc.SparsifyConfig(seed=seed, **recipe)
    found = bc.find_subnetwork(model, target, corpus, config, check_memory="off")
    took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    one = bc.evaluate(model, found, target, spread(corpus.held_out, HELD_OUT), controls=False).subnetwork
    return took | {
        "steps": len(found.history),
        "fraction": one.fraction,
        "r": one.surprisal_correlation,
        "kl": one.kl,
    }


def at_size(whole: Sequence[dict[str, float]], fraction: float) -> tuple[float, float]:
    """Return r and KL of masks of whole sequences at a size, on the line through the two nearest."""
    one, other = sorted(whole, key=lambda run: abs(math.log(run["fraction"] / fraction)))[:2]
    way = math.log(fraction / one["fraction"]) / math.log(other["fraction"] / one["fraction"])
    kl = math.exp((1 - way) * math.log(one["kl"]) + way * math.log(other["kl"]))
    return (1 - way) * one["r"] + way * other["r"], kl


def compare(
    name: str, model: Any, target: Any, corpus: bc.Corpus, seeds: int, weight: float = 10.0, **recipe: Any
) -> list[tuple]:
    """Return rows of (what, measured, goal, unit) for a model, and print each run."""
    gains: list[tuple[float, float, float]] = []
    for seed in range(seeds):
        short = learned(model, target, corpus, seed, sparsity_weight=weight, **recipe)
        print(f"{name}, seed {seed}, default: {described(short)}", flush=True)
        whole = []
        for factor in AROUND:
            run = learned(model, target, corpus, seed, sparsity_weight=factor * weight, short_until=0, **recipe)
            print(f"  whole sequences, sparsity weight {factor * weight:g}: {described(run)}", flush=True)
            whole.append(run)
        r, kl = at_size(whole, short["fraction"])
        gains.append((short["cpu"] / whole[0]["cpu"], short["kl"] / kl, r - short["r"]))
    means, spreads = np.mean(gains, axis=0), np.std(gains, axis=0, ddof=min(1, seeds - 1))
    if seeds > 1:
        print(f"  means and standard deviations over {seeds} seeds of the three ratios: {means}, {spreads}")
    words = ("time to a decided mask", "KL of it at equal size", "fall of r at equal size")
    units = ("x", "x", "")
    return [
        (f"{what}, {name}, over whole sequences", float(mean), goal, unit)
        for what, mean, goal, unit in zip(words, means, GOALS.values(), units, strict=True)
    ]


def described(run: dict[str, float]) -> str:
    """What a run took and found, in words."""
    return (
        f"{run['steps']:.0f} steps, {run['seconds']:.0f} s ({run['cpu']:.0f} of CPU), {100 * run['fraction']:.2f}%, "
        f"r {run['r']:.4f}, KL {run['kl']:.4f}"
    )


def measure(seeds: int = 1, *, smoke: bool = False) -> list[tuple]:
    """Return rows of (what, measured, goal, unit) for the reference model and, if it is there, an outside one."""
    if smoke:
        with tempfile.TemporaryDirectory() as folder:
            model = bc.load_model(save_model(Path(folder)), device="cpu")
            text = write_text(Path(folder))
            corpus = bc.load_corpus(text, tokenizer=model.tokenizer, max_tokens=8_000, context_length=32)
        target = bc.count_ngrams(corpus.train, 2, d_vocab=model.cfg.d_vocab)
        return compare("smoke", model, target, corpus, 1, weight=0.3, max_steps=8, batch_size=4)
    rows: list[tuple] = []
    for name in ("reference", *(name for name in OUTSIDE if (SHARED / "models" / name).exists())):
        subject = load(name, Path(), SHARED / "data")
        rows += compare(name, subject.model, subject.target, subject.corpus, seeds)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    for what, measured, goal, unit in measure(arguments.seeds, smoke=arguments.smoke):
        print(f"{what}: {measured:.3f} {unit}, goal {goal:.3g}: {'met' if measured <= goal else 'MISSED'}")


if __name__ == "__main__":
    main()
