"""Every figure of docs/cost.md in one run: `python benchmarks/cost.py` (about half an hour on two cores).

It runs the benchmarks in this folder, each of which also runs on its own: time and memory of a step (`step.py`), its
tensors against the least bytes (`floor.py`), time of a step for nodes and edges (`nodes.py`), time to a decided mask
(`deciding.py`), counting (`counting.py`), evaluation (`evaluation.py`), start-up (`start.py`), how cost grows
(`growth.py`), `analyze` on a large model (`analysis.py`), and the whole `find` by parts (`main_job.py`). Quality for a
given time (`quality.py`) takes hours and is not included. Nothing else should run on the machine meanwhile.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import analysis
import counting
import deciding
import evaluation
import floor
import growth
import main_job
import nodes
import start
import step
import torch

PARTS: dict[str, Callable[..., list[tuple[str, float, float, str]]]] = {
    "start": start.measure,
    "step": step.measure,
    "floor": floor.measure,
    "nodes": nodes.measure,
    "deciding": deciding.measure,
    "counting": counting.measure,
    "evaluation": evaluation.measure,
    "growth": growth.measure,
    "analyze": analysis.measure,
    "find": main_job.measure,
}


BEGIN, END = "<!-- measured -->\n", "<!-- end of what was measured -->"
"""What is written into a page goes between these marks."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmarks, then print all rows as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write the table into a page, between its marks")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    rows = []
    for part in arguments.parts:
        began = time.monotonic()
        rows += PARTS[part](smoke=arguments.smoke)
        print(f"{part}: measured in {time.monotonic() - began:.0f} s", flush=True)
    versions = ", ".join(f"{name} {__import__(name).__version__}" for name in ("torch", "transformers", "numpy"))
    lines = [f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}", ""]
    lines += [f"{torch.get_num_threads()} threads", "", "| what | measured | goal | |", "|---|---|---|---|"]
    for what, measured, goal, unit in rows:
        number = f"{measured:.{2 if abs(measured) >= 0.1 else 3}f} {unit}".strip()
        lines.append(f"| {what} | {number} | {goal:.3g} | {'met' if measured <= goal else 'missed'} |")
    print("\n".join(lines))
    if arguments.page:
        before, _, rest = arguments.page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        arguments.page.write_text("\n".join([before + BEGIN, *lines, "", END + after]))


if __name__ == "__main__":
    main()
