"""Quality for a given time: compare mask-learning recipes on small models of other architectures and texts.

    python benchmarks/quality.py --models MODELS --data TEXTS --results results.jsonl --plot quality.html

Each run learns a bigram subnetwork with a recipe, a sparsity weight or target fraction, and a seed, and measures it on
a fixed part of the held-out text. It adds one line to the results, and runs that have a line there are not repeated.
The table, the comparison with the published recipe, and the figure are made from all lines. `--label` labels the lines
of a recipe under development; `--report` only makes the report.

MODELS is the folder for the small models, which are trained once. TEXTS contains `tinyshakespeare/input.txt`,
`wikitext-2/valid.txt` and `wikitext-2/test.txt`.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import quality_models
import torch
from quality_models import MODELS, OUTSIDE, Subject, load
from smoke import write_text
from torch.optim.optimizer import register_optimizer_step_post_hook

import bigram_circuits as bc
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.models.identity import weight_hash
from bigram_circuits.recipe import EFFORTS

RECIPES: dict[str, Callable[..., bc.SparsifyConfig]] = {
    "paper": lambda **size: bc.SparsifyConfig.paper(retries=0, **size),
    "ours": lambda **size: bc.SparsifyConfig(**size),
    "polished": lambda **size: bc.SparsifyConfig(polish=4, **size),
    "thorough": lambda **size: bc.SparsifyConfig(**EFFORTS["thorough"], **size),
}
"""Settings by recipe name, as functions of the size (a sparsity weight or a target fraction) and the seed."""

FEWER_STEPS = 50
"""Speed-ups over the published recipe at which ours should be at least as good."""


# --- runs ------------------------------------------------------------------------------------------------------------


def run(subject: Subject, config: bc.SparsifyConfig, budgets: Iterable[int], sequences: int) -> dict[str, Any]:
    """Learn a subnetwork and measure it, also as it would have been after fewer steps."""
    tokens = spread_out(subject.corpus.held_out, sequences)
    started, cpu_started = time.perf_counter(), time.process_time()
    with watched(budgets) as taken:
        found = bc.find_subnetwork(subject.model, subject.target, subject.corpus, config)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    early = [
        {"steps": step} | measure(subject, as_subnetwork(subject.model, config, scores), tokens)
        for step, scores in taken.scores.items()
        if step < len(found.history) == taken.steps  # no step was taken again
    ]
    return {
        "steps": taken.steps,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "stopped_because": found.stopped_because,
        "rollbacks": len(found.rollbacks),
        **measure(subject, found.subnetwork, tokens),
        "full": measure(subject, bc.Subnetwork.full(subject.model), tokens),
        "soft_hard_gap": None if found.gap is None else found.gap.gap,
        "stopped_early": early,
    }


def spread_out(tokens: np.ndarray, count: int) -> np.ndarray:
    """Select that many evenly spaced sequences, so that they come from as many passages as possible."""
    return tokens[np.linspace(0, len(tokens) - 1, min(count, len(tokens))).astype(int)]


def measure(subject: Subject, subnetwork: bc.Subnetwork, tokens: np.ndarray) -> dict[str, Any]:
    one = bc.evaluate(subject.model, subnetwork, subject.target, tokens, controls=False).subnetwork
    return {
        "kept": one.kept,
        "fraction": one.fraction,
        "r": one.surprisal_correlation,
        "kl": one.kl,
        "ce": one.cross_entropy,
        "loss": one.mean_surprisal,
        "top1": one.top1_agreement,
    }


@dataclass
class Steps:
    """Counts optimizer steps over all attempts, and records the gates' scores after some of them."""

    steps: int = 0
    scores: dict[int, torch.Tensor] = field(default_factory=dict)


@contextmanager
def watched(budgets: Iterable[int]) -> Iterator[Steps]:
    """Within the `with` block, count the steps of any optimizer, and record the scores after the given steps."""
    taken, wanted = Steps(), set(budgets)

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        taken.steps += 1
        if taken.steps in wanted:
            taken.scores[taken.steps] = optimizer.param_groups[0]["params"][0].detach().clone()

    handle = register_optimizer_step_post_hook(note)
    try:
        yield taken
    finally:
        handle.remove()


def as_subnetwork(model: Any, config: bc.SparsifyConfig, scores: torch.Tensor) -> bc.Subnetwork:
    """Build the mask that a run would have ended with, given these scores."""
    candidates = Candidates(model, config)
    gates, wanted = candidates.gates(config, config.seed, None)
    with torch.no_grad():
        gates.scores.flat().copy_(scores)
    return candidates.mask(gates, wanted, None)


def run_all(arguments: argparse.Namespace) -> None:
    """Do all runs of the grid that have no line in the results yet: all sizes, recipes and models before more seeds."""
    sizes = [{"sparsity_weight": weight} for weight in arguments.weights]
    sizes += [{"target_fraction": fraction} for fraction in arguments.fractions]
    subjects = {name: load(name, arguments.models, arguments.data) for name in arguments.on}
    for seed, name, recipe, size in itertools.product(arguments.seeds, subjects, arguments.recipes, sizes):
        config = RECIPES[recipe](**size, seed=seed)
        asked = {
            "label": arguments.label or recipe,
            "model": name,
            "weight_hash": weight_hash(subjects[name].model),
            "corpus": subjects[name].corpus.fingerprint,
            "config": json.loads(json.dumps(asdict(config))),
            "sequences": arguments.sequences,
        }
        if any(asked.items() <= line.items() for line in read(arguments.results)):
            continue
        line = asked | run(subjects[name], config, arguments.budgets, arguments.sequences)
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(table(frame([line])), flush=True)


# --- what came out ---------------------------------------------------------------------------------------------------


def read(results: Path) -> list[dict[str, Any]]:
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line.strip()]


def frame(lines: list[dict[str, Any]]) -> pd.DataFrame:
    """Build one row per run; of runs with the same model, label, size and seed, only the last is kept."""
    rows = []
    for line in lines:
        config, target = line["config"], line["config"]["target_fraction"]
        size = f"weight {config['sparsity_weight']:g}" if target is None else f"fraction {target:g}"
        rows.append({"size": size, "seed": config["seed"], **line})
    key = ["model", "label", "size", "seed"]
    runs = pd.DataFrame(rows).drop_duplicates(key, keep="last")
    return runs.sort_values(["model", "label", "fraction"], ascending=[True, False, True], ignore_index=True)


HEAD = (
    f"{'model':<11}{'recipe':<14}{'size set by':<16}{'seed':>4}{'steps':>8}{'seconds':>9}{'CPU s':>8}  {'stopped':<11}"
    f"{'kept':>8}{'share':>9}{'r':>8}{'KL':>8}{'CE':>8}"
)


def table(runs: pd.DataFrame) -> str:
    return "\n".join(
        f"{run.model:<11}{run.label:<14}{run.size:<16}{run.seed:>4}{run.steps:>8,}{run.seconds:>9.1f}"
        f"{run.cpu_seconds:>8.1f}  {run.stopped_because:<11}{run.kept:>8,}{100 * run.fraction:>8.2f}%{run.r:>8.4f}"
        f"{run.kl:>8.4f}{run.ce:>8.4f}"
        for run in runs.itertuples()
    )


def early_table(runs: pd.DataFrame) -> str:
    """Format how the published recipe's hard masks do after fewer steps than it takes; means over seeds."""
    lines = [f"{'model':<11}{'size set by':<16}{'steps':>8}{'share':>9}{'r':>8}{'KL':>9}{'seeds':>7}"]
    for (model, size), group in runs[runs.label == "paper"].groupby(["model", "size"], sort=False):
        early = pd.DataFrame(itertools.chain.from_iterable(group.stopped_early))
        for steps, at in early.groupby("steps") if len(early) else ():
            lines.append(
                f"{model:<11}{size:<16}{steps:>8,}{100 * at.fraction.mean():>8.2f}%{at.r.mean():>8.4f}"
                f"{at.kl.mean():>9.4f}{len(at):>7}"
            )
    return "\n".join(lines)


def compare(runs: pd.DataFrame, label: str) -> pd.DataFrame:
    """For each size of the published recipe, interpolate another recipe's curve at the same fraction, on a log axis.

    A curve consists of the runs of one seed. The result has means and standard deviations over the seeds whose curve
    reaches the fraction; `seeds` gives their numbers (the published recipe's, the other's).
    """
    rows = []
    for (model, size), group in runs[runs.label == "paper"].groupby(["model", "size"], sort=False):
        fraction = math.exp(np.log(group.fraction).mean())  # the geometric mean
        others = runs[(runs.model == model) & (runs.label == label)]
        curves = [curve.sort_values("fraction") for _, curve in others.groupby("seed")]
        ours = {
            name: np.array([at_fraction(curve, name, fraction) for curve in curves])
            for name in ("r", "kl", "steps", "cpu_seconds")
        }
        ours = {name: values[~np.isnan(values)] for name, values in ours.items()}
        row = {"model": model, "size": size, "fraction": fraction, "seeds": len(group), "ours_seeds": len(ours["r"])}
        for name, values in ours.items():
            theirs = group[name].to_numpy()
            for who, some in (("paper", theirs), ("ours", values)):
                row[f"{who}_{name}"] = some.mean() if len(some) else math.nan
                row[f"{who}_{name}_sd"] = some.std(ddof=1) if len(some) > 1 else math.nan
        rows.append(row)
    compared = pd.DataFrame(rows)
    if len(compared):
        compared["steps_ratio"] = compared.paper_steps / compared.ours_steps
    return compared


def at_fraction(curve: pd.DataFrame, name: str, fraction: float) -> float:
    return float(np.interp(math.log(fraction), np.log(curve.fraction), curve[name], left=math.nan, right=math.nan))


def comparison_table(compared: pd.DataFrame) -> str:
    def spread(row: Any, name: str, digits: int) -> str:
        value, deviation = getattr(row, name), getattr(row, f"{name}_sd")
        return f"{value:.{digits}f}" + ("" if math.isnan(deviation) else f" sd {deviation:.{digits}f}")

    lines = [
        f"{'model':<11}{'size set by':<14}{'seeds':<7}{'share':>8}  {'paper r':<18}{'ours r':<18}{'paper KL':<18}"
        f"{'ours KL':<18}{'steps':>7}{'ours':>6}{'ratio':>7}{'CPU s':>8}{'ours':>7}  verdict"
    ]
    for row in compared.itertuples():
        lines.append(
            f"{row.model:<11}{row.size:<14}{f'{row.seeds}, {row.ours_seeds}':<7}{100 * row.fraction:>7.2f}%  "
            f"{spread(row, 'paper_r', 4):<18}{spread(row, 'ours_r', 4):<18}{spread(row, 'paper_kl', 4):<18}"
            f"{spread(row, 'ours_kl', 4):<18}{row.paper_steps:>7,.0f}{row.ours_steps:>6,.0f}{row.steps_ratio:>7.0f}"
            f"{row.paper_cpu_seconds:>8.0f}{row.ours_cpu_seconds:>7.1f}  {verdict(row)}"
        )
    return "\n".join(lines)


def verdict(row: Any) -> str:
    if row.ours_seeds == 0:
        return "ours has no runs on both sides of this fraction"
    against = []
    if row.ours_r < row.paper_r:
        against.append(f"r lower by {row.paper_r - row.ours_r:.4f}")
    if row.ours_kl > row.paper_kl:
        against.append(f"KL higher by {row.ours_kl - row.paper_kl:.4f}")
    if row.steps_ratio < FEWER_STEPS:
        against.append(f"only {row.steps_ratio:.0f} times fewer steps")
    return (
        "NO: " + ", ".join(against) if against else f"yes: as good or better, {row.steps_ratio:.0f} times fewer steps"
    )


def plot(runs: pd.DataFrame, path: Path) -> None:
    """Plot r (top) and KL (bottom) against the fraction kept; a column per model, a line per recipe."""
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    models, labels = list(runs.model.unique()), list(runs.label.unique())
    titles = [f"{model}: whole model's r {runs[runs.model == model].full.iloc[-1]['r']:.3f}" for model in models]
    figure = make_subplots(2, len(models), shared_xaxes=True, column_titles=titles, vertical_spacing=0.06)
    for (model, label), group in runs.groupby(["model", "label"], sort=False):
        means = group.groupby("size").agg({"fraction": "mean", "r": "mean", "kl": "mean"}).sort_values("fraction")
        steps, seconds = (group[name].agg(["min", "max"]) for name in ("steps", "seconds"))
        name = (
            f"{model}, {label}: {steps['min']:,.0f} to {steps['max']:,.0f} steps, "
            f"{seconds['min']:,.0f} to {seconds['max']:,.0f} s"
        )
        style = {"color": qualitative.D3[labels.index(label) % 10]}
        said = [
            f"{run.size}, seed {run.seed}: {run.steps:,} steps, {run.seconds:,.0f} s, stopped: {run.stopped_because}"
            for run in group.itertuples()
        ]
        for row, quantity in enumerate(("r", "kl"), start=1):
            place = {"row": row, "col": models.index(model) + 1, "legendgroup": name}
            figure.add_scatter(
                x=means.fraction, y=means[quantity], mode="lines", line=style, name=name, hoverinfo="skip",
                showlegend=row == 1, **place,
            )  # fmt: skip
            figure.add_scatter(
                x=group.fraction, y=group[quantity], mode="markers", marker=style, text=said, name=label,
                showlegend=False, **place,
            )  # fmt: skip
    figure.update_xaxes(type="log", dtick="D2", tickformat=".1~%")
    figure.update_xaxes(title="share of the maskable weights kept", row=2)
    figure.update_yaxes(title="r with the bigram surprisals", row=1, col=1)
    figure.update_yaxes(title="KL from the bigram, nats", row=2, col=1)
    figure.update_layout(
        title="Bigram subnetworks by recipe: a point for each run, lines through the means over seeds",
        template="plotly_white", height=850, legend={"orientation": "h", "y": -0.12},
    )  # fmt: skip
    figure.write_html(path)


def report(arguments: argparse.Namespace) -> None:
    lines = [line for line in read(arguments.results) if line["model"] in arguments.on]
    if not lines:
        print("there are no results yet")
        return
    runs = frame(lines)
    for model, group in runs.groupby("model"):
        full, losses = group.full.iloc[-1], arguments.models / str(model) / "losses.json"
        print(f"{model}: whole model's r {full['r']:.4f}, KL {full['kl']:.4f}; {full['kept']:,} maskable weights")
        if losses.exists():
            said = {name: round(value, 3) for name, value in json.loads(losses.read_text()).items()}
            print(f"held-out loss, nats per token: {said}")
    print(f"\n{HEAD}\n{table(runs)}\n\nThe published recipe's mask, had it been stopped early:\n{early_table(runs)}")
    for label in runs.label.unique():
        compared = compare(runs, label)
        if label != "paper" and not compared.empty:
            print(f"\nThe published recipe against {label!r} at the same fraction:\n{comparison_table(compared)}")
    if arguments.plot:
        plot(runs, arguments.plot)
        print(f"\nfigure: {arguments.plot}")


def smoke(arguments: argparse.Namespace, folder: Path) -> None:
    """Train a model for a few steps on a short text, learn a mask with either recipe, and report on both."""
    (folder / "tinyshakespeare").mkdir()
    write_text(folder).rename(folder / "tinyshakespeare" / "input.txt")
    arguments.models = arguments.data = folder
    arguments.results, arguments.plot = folder / "results.jsonl", folder / "quality.html"
    arguments.on, arguments.weights, arguments.budgets, arguments.sequences = ["gpt2"], [1.0, 10.0], [2], 4
    steps, quality_models.STEPS = quality_models.STEPS, 3
    recipes = dict(RECIPES)
    try:
        for name, recipe in recipes.items():
            RECIPES[name] = lambda recipe=recipe, **size: replace(recipe(**size), max_steps=4, polish=0)
        run_all(arguments)
        report(arguments)
    finally:
        quality_models.STEPS = steps
        RECIPES.update(recipes)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument(
        "--models",
        type=Path,
        required="--smoke" not in (argv or sys.argv),
        help="folder of the small models; made if not there",
    )
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", help="folder of the texts")
    parser.add_argument(
        "--results",
        type=Path,
        required="--smoke" not in (argv or sys.argv),
        help="file to append to, and to report from",
    )
    parser.add_argument("--plot", type=Path, help="write a figure to this HTML file")
    known = [*MODELS, *OUTSIDE, "reference"]
    parser.add_argument("--on", nargs="+", default=list(MODELS), choices=known, help="models")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--label", help="name of these runs in the results; the recipe's if not given")
    parser.add_argument("--weights", nargs="*", type=float, default=[1.0, 10.0, 50.0], help="sparsity weights")
    parser.add_argument("--fractions", nargs="*", type=float, default=[], help="target fractions")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sequences", type=int, default=128, help="held-out sequences to measure on")
    parser.add_argument(
        "--budgets", nargs="*", type=int, default=[100, 300, 1000, 3000], help="steps after which to measure early"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            smoke(arguments, Path(folder))
        return
    if not arguments.report:
        run_all(arguments)
    report(arguments)


if __name__ == "__main__":
    main()
