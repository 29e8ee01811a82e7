"""Fuzz the readers with seeded hostile and damaged files of every kind: `python benchmarks/fuzz.py --cases 100000`.

`tests/fuzzing.py` describes the cases and what must hold. Exits with status 1 if a case fails.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from tests.fuzzing import kinds, run_apart, run_kind, shares


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", help="only those whose names contain one of these words")
    parser.add_argument("--show", type=int, default=5, help="failures to show of every kind")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.cases, arguments.kinds = 40, ["subnetwork", "pickle", "result"]
    torch.set_num_threads(1)
    started, failed, totals = time.monotonic(), 0, [0, 0, 0, 0, 0]
    line = "{:<28}{:>8}{:>11}{:>11}{:>9}{:>10}{:>9}{:>10}"
    print(line.format("kind", "cases", "identical", "different", "refused", "failures", "seconds", "slowest"))
    with tempfile.TemporaryDirectory() as folder:
        found = kinds(Path(folder) / "files")
        found = [kind for kind in found if not arguments.kinds or any(word in kind.name for word in arguments.kinds)]
        wanted = shares(found, arguments.cases)
        for kind in found:
            run = run_kind if arguments.smoke else run_apart
            report = run(kind, wanted[kind.name], arguments.seed)
            numbers = [report.cases, report.identical, report.different, report.refused, len(report.failures)]
            totals = [total + number for total, number in zip(totals, numbers, strict=True)]
            times = f"{report.seconds:.1f}", f"{report.slowest:.2f}"
            print(line.format(kind.name, *numbers, *times), flush=True)
            for failure in report.failures[: arguments.show]:
                print(f"    {failure}", flush=True)
            failed += len(report.failures)
    print(line.format("all", *totals, f"{time.monotonic() - started:.1f}", ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
