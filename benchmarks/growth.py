"""How the time and memory of mask-learning steps and of counting grow with size: `python benchmarks/growth.py`.

One size is doubled at a time: the width, depth, batch size or vocabulary of a model of Pythia's architecture with
random weights, or the number of tokens that are counted. Each point runs in its own process on the CPU. The table gives
time, memory and the exponent, which is 1 where doubling the size doubles the cost. `--plot FILE.html` draws them all.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import in_own_process_of, masked_steps, save_model

BASE = {"hidden_size": 256, "num_hidden_layers": 4, "batch": 8, "vocab_size": 8192, "tokens": 4_000_000}
SIZES = {
    "hidden_size": ("width", (128, 256, 512, 1024)),
    "num_hidden_layers": ("depth", (2, 4, 8, 16)),
    "batch": ("sequences in a batch", (4, 8, 16, 32)),
    "vocab_size": ("vocabulary", (4096, 8192, 16_384, 32_768)),
    "tokens": ("tokens counted", (2_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000)),
}
SMOKE_BASE = {"hidden_size": 16, "num_hidden_layers": 2, "batch": 2, "vocab_size": 257, "tokens": 4_000}
SMOKE_SIZES = {"batch": ("sequences in a batch", (2, 4)), "tokens": ("tokens counted", (2_000, 4_000))}
EXPONENTS = {"hidden_size": 2, "num_hidden_layers": 1, "batch": 1, "vocab_size": 1, "tokens": 1}
"""Largest exponents to expect: the number of weights grows with the square of the width; all else grows linearly."""


def peak_gigabytes() -> float:
    """Return the peak memory of this process so far, in GB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1e6


def measure_point(size: dict[str, int], what: str) -> dict[str, float]:
    """Measure one point in this process: seconds and GB."""
    import bigram_circuits as bc

    if what == "tokens":
        rng = np.random.default_rng(0)
        tokens = (size["vocab_size"] * rng.random((size["tokens"] // 128, 128), dtype=np.float32) ** 3).astype(np.int32)
        before = peak_gigabytes()
        started = time.perf_counter()
        bc.count_ngrams(tokens, 2, d_vocab=size["vocab_size"])
        return {"seconds": time.perf_counter() - started, "gigabytes": peak_gigabytes() - before}
    from transformer_lens.model_bridge import TransformerBridge  # noqa: F401 (so that importing it is not counted)

    shape = {name: size[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    with tempfile.TemporaryDirectory() as folder:
        save_model("pythia-70m", Path(folder), **shape)
        before = peak_gigabytes()
        steps = masked_steps(folder, size["batch"], "cpu", torch.float32, 4, lambda: None)
    return {"seconds": float(np.median(steps)), "gigabytes": peak_gigabytes() - before}


def measure(plot: Path | None = None, *, smoke: bool = False) -> list[tuple[str, float, float, str]]:
    """Return rows of (what, exponent of the last doublings, goal, unit); print the table and draw the plot."""
    rows, curves = [], {}
    print(f"{'':<24}{'size':>12}{'seconds':>10}{'exponent':>10}{'GB':>8}{'exponent':>10}")
    for what, (title, sizes) in (SMOKE_SIZES if smoke else SIZES).items():
        points: list[dict[str, Any]] = []
        for size in sizes:
            if smoke:
                points.append(measure_point(SMOKE_BASE | {what: size}, what))
            else:
                points.append(in_own_process_of(__file__, "--point", json.dumps(BASE | {what: size}), what))
            cells = []
            for name in ("seconds", "gigabytes"):
                last = points[-2:]
                grown = math.log2(last[-1][name] / last[0][name]) if len(last) == 2 and not smoke else math.nan
                cells += [f"{points[-1][name]:.3f}", "" if math.isnan(grown) else f"{grown:.2f}"]
            print(f"{title:<24}{size:>12,}{cells[0]:>10}{cells[1]:>10}{cells[2]:>8}{cells[3]:>10}", flush=True)
        curves[title] = (sizes, points)
        doublings = math.log2(sizes[-1] / sizes[0])
        for name in ("seconds", "gigabytes"):
            exponent = math.nan if smoke else math.log2(points[-1][name] / points[0][name]) / doublings
            rows.append((f"{name} against {title}", exponent, EXPONENTS[what] + 0.2, "exponent"))
    if plot:
        draw(curves, plot)
    return rows


def draw(curves: dict[str, tuple[tuple[int, ...], list[dict[str, Any]]]], path: Path) -> None:
    """Plot time and memory against size, each relative to the first point of its line, on logarithmic axes."""
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=("time", "memory"), shared_yaxes=True)
    for title, (sizes, points) in curves.items():
        for column, name in enumerate(("seconds", "gigabytes"), start=1):
            figure.add_scatter(
                x=[size / sizes[0] for size in sizes], y=[point[name] / points[0][name] for point in points],
                name=title, legendgroup=title, showlegend=column == 1, row=1, col=column, mode="lines+markers",
                line_color=f"hsl({360 * list(curves).index(title) / len(curves):.0f}, 60%, 45%)",
            )  # fmt: skip
    figure.update_xaxes(type="log", title="size, over the first", dtick=math.log10(2))
    figure.update_yaxes(type="log", dtick=math.log10(2))
    figure.update_yaxes(title="cost, over the first", col=1)
    figure.update_layout(template="plotly_white", width=900, height=420, margin={"l": 60, "r": 20, "t": 40, "b": 50})
    figure.write_html(path, include_plotlyjs=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.point:
        print(json.dumps(measure_point(json.loads(arguments.point[0]), arguments.point[1])))
        return
    for what, measured, goal, unit in measure(arguments.plot, smoke=arguments.smoke):
        print(f"{what}: {unit} {measured:.2f}, goal {goal:g}: {'met' if measured <= goal else 'MISSED'}")


if __name__ == "__main__":
    main()
