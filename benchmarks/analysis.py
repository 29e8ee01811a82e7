"""Time and peak memory of `bigram-circuits analyze` on a run of the reference model: `python benchmarks/analysis.py`.

The run is made first, unless an existing run folder is given. `--gpt2` takes random weights of GPT-2 small's shape and
a short text. `logit_lens.py` measures the logit lens against the forward pass.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from smoke import find_options, write_text
from step import save_model

COMMAND = [sys.executable, "-m", "bigram_circuits.cli"]
GOAL = 60
"""Seconds, for GPT-2 small's shape."""
SHORT = ["--tokens", "500"]
"""For a short text: tokens to measure layers on."""


def gpt2_options(folder: Path) -> list[str]:
    """Return arguments for `bigram-circuits find` on random weights of GPT-2 small's shape, made in this folder."""
    save_model("gpt2", folder / "gpt2")
    words = f"--corpus {write_text(folder)} --max-tokens 4000 --context-length 32 --steps 4 --batch-size 4"
    return [str(folder / "gpt2"), *words.split(), "--random-seeds", "1"]


def analyze(run: Path, options: Sequence[str]) -> tuple[str, float, float]:
    """Analyse a run; return what was printed, seconds, and peak memory in GiB."""
    code = "import resource, sys; from bigram_circuits import cli; code = cli.main(sys.argv[1:]); "
    code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    started = time.perf_counter()
    command = [sys.executable, "-c", code, "analyze", str(run), *options]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    story, peak = result.stdout.rsplit("peak", 1)
    return story, seconds, int(peak) / 1024**2


def find(options: Sequence[str], run: Path) -> None:
    """Make a run without analyses."""
    command = [*COMMAND, "find", *options, "--no-analysis", "--out", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(*, smoke: bool = False) -> list[tuple[str, float, float, str]]:
    """Return rows of (what, measured, goal, unit)."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        find(find_options(Path(folder) / "smoke") if smoke else gpt2_options(Path(folder)), run)
        _, seconds, _ = analyze(run, SHORT)
    return [("`analyze` on GPT-2 small's shape, a text of 4,000 tokens", seconds, GOAL, "s")]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the command's output, then its time and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--gpt2", action="store_true", help="random weights of GPT-2 small's shape")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = arguments.run.resolve() if arguments.run else folder / "run"
        if not run.exists():
            smoke_or_reference = find_options(folder / "smoke") if arguments.smoke else []
            find(gpt2_options(folder) if arguments.gpt2 else smoke_or_reference, run)
        story, seconds, peak = analyze(run, SHORT if arguments.smoke or arguments.gpt2 else [])
    print(story)
    print(f"analyze: {seconds:.0f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
