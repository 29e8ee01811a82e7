"""Time of explanations, relative to a forward pass of the same masked model: `python benchmarks/explaining.py`.

The mask keeps 2% of the weights, drawn at random: the time does not depend on which. The unit is one forward pass on
the same prompt, without gradients; both are medians of alternating runs in one process. The atlas is of as many tokens
as there are, up to 200, and its time is stated for each of them. The page is that of the atlas; memory is the
highest resident memory of this process above what it held when the model was loaded (Linux), on CUDA the peak of what
torch allocated.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import save_model

import bigram_circuits as bc

GOALS = {"explain": 2.0, "atlas": 30.0, "page": 10.0}
"""Seconds for a token, seconds for 200 tokens, megabytes: of the reference model."""
TITLES = {"reference": "reference", "gpt2": "GPT-2 small", "smoke": "tiny"}
LENGTHS = (1, 20)
"""Tokens of a prompt."""


def median_times(number: int, works: Sequence[Callable[[], Any]], device: str) -> list[float]:
    """Median seconds of each of some works, which alternate."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(number + 1):
        for work, own in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            if device != "cpu":
                torch.cuda.synchronize()
            own.append(time.perf_counter() - started)
    return [float(np.median(own[1:])) for own in times]


def forward(model: Any, kept: bc.Subnetwork, prompt: torch.Tensor) -> torch.Tensor:
    """The logits of the masked model."""
    with torch.no_grad(), bc.masked(model, kept):
        return model(prompt)


def resident() -> float:
    """Megabytes that this process has at most held."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def measure(
    kinds: Sequence[str] = ("reference", "gpt2"), number: int = 5, device: str = "cpu", tokens: int = 200, *,
    smoke: bool = False,
) -> list[tuple[str, float, float | None, str]]:  # fmt: skip
    """Return rows of (what, measured, goal, unit), and print each as it is measured."""
    rows: list[tuple[str, float, float | None, str]] = []
    kinds, number, tokens = (["smoke"], 1, 4) if smoke else (kinds, number, tokens)

    def add(what: str, measured: float, goal: float | None, unit: str) -> None:
        rows.append((what, measured, goal, unit))
        print(f"{what:<52}{measured:>9.2f} {unit}", flush=True)

    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            save_model(kind, Path(folder))
            model = bc.load_model(folder, device=device)
            is_goal, title = kind == "reference", TITLES[kind]
            before = resident()
            kept = _two_percent(model)
            text = np.random.default_rng(0).zipf(1.3, size=(64, 128)) % model.cfg.d_vocab
            for length in LENGTHS:
                prompt = torch.from_numpy(text[:1, :length].astype(np.int64)).to(device)

                works = (partial(bc.explain, model, kept, prompt), partial(forward, model, kept, prompt))
                explained, unit = median_times(number, works, device)
                what = f"explain, {length} token{'s' * (length > 1)}, {title}"
                add(what, explained, GOALS["explain"] if is_goal and length == 1 else None, "s")
                add(f"  over a masked forward pass ({unit:.3f} s)", explained / unit, None, "x")
            started = time.perf_counter()
            atlas = bc.atlas(model, kept, text, tokens=tokens)
            seconds, count = time.perf_counter() - started, len(atlas.explanations)
            add(f"atlas of {count} tokens, {title}", seconds, GOALS["atlas"] if is_goal else None, "s")
            add("  for each token", seconds / count, None, "s")
            add(f"page of the atlas, {title}", len(atlas.to_html().encode()) / 1e6, GOALS["page"], "MB")
            peak = resident() - before if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
            add(f"memory, {title}", peak, None, "MiB")
    return rows


def _two_percent(model: Any) -> bc.Subnetwork:
    """A random subnetwork of 2% of the weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = bc.Subnetwork.full(model).shapes
    return bc.Subnetwork({name: torch.rand(shape, generator=generator) < 0.02 for name, shape in shapes.items()})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=TITLES, default=["reference", "gpt2"])
    parser.add_argument("--number", type=int, default=5, help="of runs of each")
    parser.add_argument("--tokens", type=int, default=200, help="of the atlas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    rows = measure(arguments.shapes, arguments.number, arguments.device, arguments.tokens, smoke=arguments.smoke)
    print()
    for what, measured, goal, unit in rows:
        if goal is not None:
            print(f"{what:<52}{measured:>9.2f} {unit}  goal {goal:.2f}  {'met' if measured <= goal else 'NOT met'}")


if __name__ == "__main__":
    main()
