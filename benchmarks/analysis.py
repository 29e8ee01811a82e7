"""Time and peak memory of `bigram-circuits analyze` on a run of the reference model: `python benchmarks/analysis.py`.

The run is made first, unless an existing run folder is given. `logit_lens.py` measures the logit lens against the
forward pass.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "bigram_circuits.cli"]


def main() -> None:
    """Print the command's output, then its time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(folder) / "run"
        if not run.exists():
            subprocess.run([*COMMAND, "find", "--no-analysis", "--out", run], check=True, stdout=subprocess.DEVNULL)
        code = "import resource, sys; from bigram_circuits import cli; code = cli.main(sys.argv[1:]); "
        code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        started = time.perf_counter()
        command = [sys.executable, "-c", code, "analyze", str(run)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
    story, peak = result.stdout.rsplit("peak", 1)
    print(story)
    print(f"analyze: {seconds:.0f} s, peak memory {int(peak) / 1024**2:.2f} GiB")


if __name__ == "__main__":
    main()
