"""Time and peak memory of `bigram-circuits find` with no argument: `python benchmarks/main_job.py`."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from smoke import find_options


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    smoke = parser.parse_args(argv).smoke
    with tempfile.TemporaryDirectory() as folder:
        options = [*find_options(Path(folder) / "smoke"), "--no-analysis"] if smoke else []
        started = time.perf_counter()
        command = [sys.executable, "-m", "bigram_circuits.cli", "find", *options, "--out", "run"]
        result = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
        print(result.stdout)
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
        learned = json.loads((Path(folder) / "run" / "training.json").read_text())["seconds"]
    found, full = metrics["subnetwork"], metrics["full"]
    rise = metrics["complement"]["mean_surprisal"] - full["mean_surprisal"]
    random_rise = metrics["full_minus_random"]["mean"]["mean_surprisal"] - full["mean_surprisal"]
    print(f"{seconds:.0f} s in all, {learned:.0f} s of it learning; peak memory {peak:.2f} GiB")
    print(f"r {found['surprisal_correlation']:.4f} at {100 * found['fraction']:.2f}% of the weights")
    print(f"full model's r {full['surprisal_correlation']:.4f}")
    times = f"{rise / random_rise:.0f} times" if random_rise else "which is nothing"
    print(f"loss without it +{rise:.3f} nats, without a random one +{random_rise:.3f}: {times}")


if __name__ == "__main__":
    main()
