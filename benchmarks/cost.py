"""Every figure of docs/cost.md in one run: `python benchmarks/cost.py` (about half an hour on two cores).

It runs the benchmarks in this folder, each of which also runs on its own: time and memory of a step (`step.py`),
time of a step for nodes and edges (`nodes.py`), counting (`counting.py`), evaluation (`evaluation.py`), the whole
`find` by parts (`main_job.py`), `analyze` on a large model (`analysis.py`), start-up (`start.py`), and how cost grows
(`growth.py`). Quality for a given time (`quality.py`) takes hours and is not included. Nothing else should
run on the machine meanwhile.
"""

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import analysis
import counting
import evaluation
import growth
import main_job
import nodes
import start
import step
import torch

PARTS: dict[str, Callable[..., list[tuple[str, float, float, str]]]] = {
    "start": start.measure,
    "step": step.measure,
    "nodes": nodes.measure,
    "counting": counting.measure,
    "evaluation": evaluation.measure,
    "find": main_job.measure,
    "analyze": analysis.measure,
    "growth": growth.measure,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks, then print all rows as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write the table to a file")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    rows = [row for part in arguments.parts for row in PARTS[part](smoke=arguments.smoke)]
    versions = ", ".join(f"{name} {__import__(name).__version__}" for name in ("torch", "transformers", "numpy"))
    lines = [f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}", ""]
    lines += [f"{torch.get_num_threads()} threads", "", "| what | measured | goal | |", "|---|---|---|---|"]
    for what, measured, goal, unit in rows:
        lines.append(f"| {what} | {measured:.2f} {unit} | {goal:g} | {'met' if measured <= goal else 'missed'} |")
    print("\n".join(lines))
    if arguments.table:
        arguments.table.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
