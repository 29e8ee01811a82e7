"""Start-up times of new processes: `python benchmarks/start.py`. Medians, with all files in the page cache."""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

JOBS = (
    ("bigram-circuits --help", ["-m", "bigram_circuits.cli", "--help"], 1.0),
    ("import bigram_circuits", ["-c", "import bigram_circuits"], 0.5),
    ("reference model ready", ["-c", "import bigram_circuits as bc; bc.load_model('reference', device='cpu')"], 8.0),
)


def seconds(arguments: list[str]) -> float:
    """Time one process from start to exit, in seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(repeats: int = 5, *, smoke: bool = False) -> list[tuple[str, float, float, str]]:
    """Return rows of (what, measured, goal, unit)."""
    rows = []
    for what, arguments, goal in JOBS:
        if not smoke:
            seconds(arguments)  # so that files are in memory
        times = [seconds(arguments) for _ in range(1 if smoke else repeats)]
        rows.append((what, statistics.median(times), goal, "s"))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    for what, measured, goal, unit in measure(arguments.repeats, smoke=arguments.smoke):
        print(f"{what}: {measured:.3f} {unit}, goal {goal:g} {unit}: {'met' if measured <= goal else 'MISSED'}")


if __name__ == "__main__":
    main()
