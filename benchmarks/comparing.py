"""Time, memory and page size of comparing many runs: `python benchmarks/comparing.py` (some minutes).

The runs are made up: masks of the reference model's shapes, 400 training steps, an evaluation with controls and three
results by layer each. They differ in the seed and in their masks. For each number of runs, in a process of its own: the
time that `compare` and `write_comparison` take, the size of the page, and the process's peak memory.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.runs import StepRecord
from bigram_circuits.subnetwork import Subnetwork
from tests.example_runs import curves, make_run, measured

SHAPES = {"attn.W_Q": (8, 256, 32), "attn.W_O": (8, 32, 256), "mlp.W_in": (256, 1024), "mlp.W_out": (1024, 256)}
LAYERS, STEPS = 4, 400
MEASURE = """
import resource, sys, time
import bigram_circuits as bc
from pathlib import Path
from bigram_circuits.experiments.comparison import compare
started = time.perf_counter()
comparison = compare(sorted(Path(sys.argv[1]).iterdir()))
compared = time.perf_counter()
page = bc.write_comparison(comparison, Path(sys.argv[1] + ".html"))
written = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{compared - started:>12.1f}{written - compared:>12.1f}{page.stat().st_size / 1e6:>10.1f}{peak / 1e3:>12,.0f}")
"""


def subnetwork(seed: int) -> Subnetwork:
    """2% of the weights; a third of them are the same for every seed."""
    common, own = (np.random.default_rng(number) for number in (10**6, seed))
    masks = {
        f"blocks.{layer}.{name}": torch.from_numpy((common.random(shape) < 0.007) | (own.random(shape) < 0.013))
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    return Subnetwork(masks, model_name="model/x", weight_hash="ab12", lineage=f"seed {seed}")


def make(folder: Path, seed: int) -> None:
    kept, points = subnetwork(seed), ("embed", *map(str, range(LAYERS)))
    own = measured()
    own["subnetwork"] |= {"surprisal_correlation": 0.9 + seed % 50 / 1e3}
    steps = [StepRecord(0, step, 5 - step / STEPS, 0.5, 1 - step / STEPS) for step in range(STEPS)]
    found = {
        "logit_lens": curves("surprisal_correlation", points=points),
        "affine_lens": curves("surprisal_correlation", "recall_at_1", points=points),
        "cosine": curves("current_embedding", "target_unembedding", points=points),
    }
    make_run(folder, metrics=own, found=found, recipe=SparsifyConfig(seed=seed), subnetwork=kept, steps=steps)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark for each number of runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, nargs="+", default=[20, 80, 500])
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    counts = [2] if arguments.smoke else arguments.runs
    print(f"{'runs':>6}{'compare, s':>12}{'page, s':>12}{'page, MB':>10}{'peak, MB':>12}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            runs = Path(folder) / str(count)
            for seed in range(count):
                make(runs / f"run-{seed:04}", seed)
            done = subprocess.run([sys.executable, "-c", MEASURE, str(runs)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            print(f"{count:>6}{done.stdout}", end="", flush=True)


if __name__ == "__main__":
    main()
