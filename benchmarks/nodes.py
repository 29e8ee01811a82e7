"""Time of a step that learns node or edge masks, relative to the frozen model: `python benchmarks/nodes.py`.

The unit is one forward pass and one backward pass of the frozen model as `load_model` gives it, on the same batch, with
the loss of the same target, down to the embeddings: no weight has a gradient, as in learning. A step is one of
`find_circuit` itself with everything included, timed from one call of a callback to the next; it alternates with the
unit in one process, and both are medians. Resampled and counterfactual values come from another forward pass of the
full model, without gradients, which is timed by itself.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import SHAPES, TITLES, Pace, save_model, some_tokens

import bigram_circuits as bc
from bigram_circuits.models.activations import lean_forward
from bigram_circuits.targets.base import Target, target_of

GOALS = {"nodes": 1.3, "edges": 6.0}
UNITS = {"nodes": ("head", "neuron"), "edges": ("edge",)}
REPLACED = ("zero", "mean", "resample")
KINDS = {"reference": ("nodes", "edges"), "gpt2": ("nodes",), "smoke": ("nodes", "edges")}
"""What is gated on each shape."""


def frozen(model: Any, target: Target, tokens: torch.Tensor) -> Callable[[bool], float]:
    """Return a function that runs the frozen model forward and, if told so, backward to the embeddings: seconds."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def embedded(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value.detach().requires_grad_()

    def step(backward: bool) -> float:
        hooks = [("blocks.0.hook_resid_pre", embedded)] if backward else []
        with lean_forward(model), torch.set_grad_enabled(backward), model.hooks(fwd_hooks=hooks):
            started = time.perf_counter()
            loss = target.cross_entropy(model(tokens), tokens).mean()
            if backward:
                loss.backward()
            loss.item()
            return time.perf_counter() - started

    step(True)
    return step


def measure_steps(
    folder: str, kind: str, number: int, device: str, dtype: torch.dtype
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield what is gated, its replacement, and median seconds of steps and of the frozen model in between."""
    learned, plain = (bc.load_model(folder, device=device, dtype=dtype) for _ in range(2))
    batch_size = SHAPES[kind]
    tokens = some_tokens(learned.cfg.d_vocab, max(64, 2 * batch_size))
    corpus = bc.Corpus.from_tokens(tokens, tokens[:4])
    target = target_of(bc.count_ngrams(tokens, 2, d_vocab=learned.cfg.d_vocab), learned)
    batch = torch.from_numpy(tokens[:batch_size]).long().to(device)
    run = frozen(plain, target, batch)
    for what in KINDS[kind]:
        for replace in REPLACED:
            unit: list[float] = []
            forward: list[float] = []

            def between(unit: list[float] = unit, forward: list[float] = forward) -> None:
                unit.append(run(True))
                forward.append(run(False))

            pace = Pace(between)
            config = bc.SparsifyConfig(batch_size=batch_size, max_steps=number + 1, retries=0)
            bc.find_circuit(
                learned, target, corpus, config, units=UNITS[what], replace=replace, callbacks=[pace],
                check_memory="off",
            )  # fmt: skip
            times = {"step": pace.steps, "unit": unit[1:], "forward": forward[1:]}
            yield what, replace, {name: float(np.median(each)) for name, each in times.items()}


def measure(
    kinds: Sequence[str] = ("reference", "gpt2"), steps: int = 15, device: str = "cpu", dtype: str = "float32", *,
    smoke: bool = False,
) -> list[tuple]:  # fmt: skip
    """Return rows of (what, measured, goal, unit), and print each as it is measured."""
    rows: list[tuple] = []
    kinds, steps = (["smoke"], 2) if smoke else (kinds, steps)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            save_model(kind, Path(folder))
            for what, replace, seconds in measure_steps(folder, kind, steps, device, getattr(torch, dtype)):
                ratio, more = seconds["step"] / seconds["unit"], ""
                if replace == "resample":
                    ratio -= seconds["forward"] / seconds["unit"]
                    more = f", of which the other forward pass {seconds['forward']:.3f} s is not counted"
                print(
                    f"{TITLES[kind]}, {what}, {replace}: step {seconds['step']:.3f} s{more}, "
                    f"frozen model {seconds['unit']:.3f} s", flush=True,
                )  # fmt: skip
                rows.append((f"step of {what} ({replace}), {TITLES[kind]}", ratio, GOALS[what], "x"))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=KINDS, default=["reference", "gpt2"])
    parser.add_argument("--steps", type=int, default=15, help="of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    run = (arguments.shapes, arguments.steps, arguments.device, arguments.dtype)
    for what, measured, goal, unit in measure(*run, smoke=arguments.smoke):
        met = "met" if measured <= goal else "NOT met"
        print(f"{what:<50}{measured:>7.2f} {unit}  goal {goal:.2f}  {met}")


if __name__ == "__main__":
    main()
