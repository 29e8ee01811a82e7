"""Time and peak memory of `bigram-circuits analyze` on a run of the reference model: `python benchmarks/analysis.py`.

The run is made first, unless an existing run folder is given. `logit_lens.py` measures the logit lens against the
forward pass.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from smoke import find_options

COMMAND = [sys.executable, "-m", "bigram_circuits.cli"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the command's output, then its time and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run.resolve() if arguments.run else Path(folder) / "run"
        if not run.exists():
            options = find_options(Path(folder) / "smoke") if arguments.smoke else []
            command = [*COMMAND, "find", *options, "--no-analysis", "--out", run]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        code = "import resource, sys; from bigram_circuits import cli; code = cli.main(sys.argv[1:]); "
        code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        started = time.perf_counter()
        command = [sys.executable, "-c", code, "analyze", str(run), *(["--tokens", "500"] if arguments.smoke else [])]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
    story, peak = result.stdout.rsplit("peak", 1)
    print(story)
    print(f"analyze: {seconds:.0f} s, peak memory {int(peak) / 1024**2:.2f} GiB")


if __name__ == "__main__":
    main()
