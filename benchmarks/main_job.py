"""Time, by parts, and peak memory of `bigram-circuits find` with no argument: `python benchmarks/main_job.py`."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoke import find_options

ENDS = {"model  ": "importing and loading", "Verdict": "learning and evaluation", "what the blocks do": "analyses"}
"""The first words of the line that is printed when a part has ended, and the part."""
GOALS = {"importing and loading": 8, "learning": 18, "evaluation": 12, "analyses": 17, "page": 3, "all": 60}
"""Seconds."""


def find(*, smoke: bool) -> tuple[dict[str, float], dict[str, Any], str]:
    """Run the job; return the seconds of its parts, its metrics, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*find_options(Path(folder) / "smoke"), "--no-analysis"] if smoke else []
        command = [sys.executable, "-u", "-m", "bigram_circuits.cli", "find", *options, "--out", "run"]
        parts, lines = dict[str, float](), []
        began = last = time.perf_counter()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                part = next((part for words, part in ENDS.items() if line.startswith(words)), None)
                if part is not None and part not in parts:
                    parts[part], last = time.perf_counter() - last, time.perf_counter()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        parts |= {"page": time.perf_counter() - last, "all": time.perf_counter() - began}
        metrics = json.loads((Path(folder) / "run" / "metrics.json").read_text())
        parts["learning"] = json.loads((Path(folder) / "run" / "training.json").read_text())["seconds"]
    parts["evaluation"] = parts.pop("learning and evaluation") - parts["learning"]
    return {part: parts.get(part, 0.0) for part in GOALS}, metrics, "".join(lines)


def measure(*, smoke: bool = False) -> list[tuple[str, float, float, str]]:
    """Return rows of (what, measured, goal, unit)."""
    parts, _, _ = find(smoke=smoke)
    return [(f"`find` on the reference model, {part}", seconds, GOALS[part], "s") for part, seconds in parts.items()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    parts, metrics, printed = find(smoke=parser.parse_args(argv).smoke)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    print(printed)
    found, full = metrics["subnetwork"], metrics["full"]
    rise = metrics["complement"]["mean_surprisal"] - full["mean_surprisal"]
    random_rise = metrics["full_minus_random"]["mean"]["mean_surprisal"] - full["mean_surprisal"]
    print(", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items()) + f"; peak memory {peak:.2f} GiB")
    print(f"r {found['surprisal_correlation']:.4f} at {100 * found['fraction']:.2f}% of the weights")
    print(f"full model's r {full['surprisal_correlation']:.4f}")
    times = f"{rise / random_rise:.0f} times" if random_rise else "which is nothing"
    print(f"loss without it +{rise:.3f} nats, without a random one +{random_rise:.3f}: {times}")


if __name__ == "__main__":
    main()
