"""Sections about the outcome: controls, attempts to refute it, training, and how to reproduce it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bigram_circuits.evaluation import ZERO_RULE, SoftHardGap
from bigram_circuits.experiments.falsification import load_falsification
from bigram_circuits.measures.words import flat, percent, rounded, span
from bigram_circuits.report import facts, figures
from bigram_circuits.report.blocks import Block, Chart, Code, Content, Numbers
from bigram_circuits.report.results import Results, result_table
from bigram_circuits.report.sections import section
from bigram_circuits.report.words import spaced
from bigram_circuits.runs import Run


@section("controls", "Does it beat its controls?")
def controls(run: Run, results: Results) -> Content:
    """Faithfulness of the subnetwork and of every control, with the verdict."""
    if not facts.is_evaluated(run):
        return Content(["This run was not evaluated, so there are no controls to compare it with."])
    rows, positions = facts.rows(run), facts.positions(run)
    says = [facts.verdict(run)]
    if positions:
        used, n = positions
        says.append(f"Zero-probability rule: {ZERO_RULE}: {used:,} of {n:,} held-out positions ({percent(used / n)}).")
    blocks: list[Block] = []
    if len(rows) > 1:
        words = f"{_closest(rows)} {_INTERVALS}".strip()
        dots = [(row.name, row.r, *row.ends) for row in rows]
        blocks.append(Chart("r with the target: subnetwork and controls", words, figures.controls(dots)))
    blocks += [_control_table(rows), Numbers("Glossary of rows and columns", ["name", "meaning"], _glossary(rows))]
    advantage = [[name, *ends] for name, ends in facts.advantage(run).items()]
    if advantage:
        caption = "r of the subnetwork minus r of each control: 95% paired bootstrap intervals"
        blocks.append(Numbers(caption, ["control", "low", "high"], advantage))
    seeds = [
        [f"{name} {seed}", *(getattr(numbers, key) for key in _COLUMNS)]
        for name in ("random", "full - random")
        for seed, numbers in facts.seeds(run, name).items()
    ]
    if seeds:
        blocks.append(Numbers("Random controls, seed by seed", ["", *_COLUMNS.values()], seeds))
    return Content(says, blocks)


_MOST_STEPS = 60  # rows of the training table
_INTERVALS = "Error bars: 95% bootstrap intervals over sequences; for random controls, the range over seeds."
_COLUMNS = {
    "surprisal_correlation": "r",
    "cross_entropy": "cross-entropy",
    "kl": "KL",
    "mean_surprisal": "loss",
    "top1_agreement": "top-1",
}
_MEANINGS = {
    "subnetwork": "the model with only the subnetwork's weights",
    "full": "the full model",
    "empty": "the model without any maskable weight: embeddings, normalisation and biases remain",
    "complement": "the full model without the subnetwork's weights",
    "magnitude": "the largest weights, as many in every matrix as the subnetwork keeps",
    "random": "random weights, as many in every matrix as the subnetwork keeps: mean over seeds",
    "full - random": "the full model without such random weights: mean over seeds",
    "r": "Pearson correlation of the model's surprisals with the target's",
    "cross-entropy, KL": "from the target's distribution to the model's, in nats",
    "loss": "the masked model's next-token loss, in nats",
    "top-1": "share of positions where model and target have the same most likely token",
}
_NOT_ROWS = ("r", "cross-entropy, KL", "loss", "top-1")


def _control_table(rows: Sequence[facts.Row]) -> Numbers:
    r, *others = _COLUMNS.values()
    columns = ["", r, "interval", *others, "weights kept", "fraction"]
    table = []
    for row in rows:
        r, *others = (getattr(row.numbers, key) for key in _COLUMNS)
        table.append([row.name, r, span(*row.ends), *others, row.numbers.kept, row.numbers.fraction])
    return Numbers("Subnetwork and controls", columns, table, is_open=True)


def _glossary(rows: Sequence[facts.Row]) -> list[list[str]]:
    names = {row.name for row in rows}
    return [[name, meaning] for name, meaning in _MEANINGS.items() if name in names or name in _NOT_ROWS]


def _closest(rows: Sequence[facts.Row]) -> str:
    own, *others = rows
    known = [row for row in others if not math.isnan(row.r)]
    if math.isnan(own.r) or not known:
        return ""
    best = max(known, key=lambda row: row.r)
    return f"The subnetwork has r = {rounded(own.r)}; the best of the others is {best.name}, with {rounded(best.r)}."


@section("refuted", "Attempts to refute it")
def refuted(run: Run, results: Results) -> Content:
    """The same recipe where it should fail, and with other seeds: what `falsify` found."""
    tried = load_falsification(run.path / "falsify")
    if tried is None:
        return Content(["Not attempted: bigram-circuits find --falsify tries to refute the finding."])
    shown = {"KL": "kl", "r": "surprisal_correlation", "share of weights kept": "fraction"}
    known = {name: tried.controls.get(key) for name, key in shown.items()}
    charts: list[Block] = [
        Chart(
            f"{name} of the finding and of every attempt",
            "",
            figures.bars(tried.controls.names, {name: list(values.values())}, name),
        )
        for name, values in known.items()
        if not all(math.isnan(value) for value in values.values())
    ]
    tables = [
        result_table(tried.controls, "every attempt"), result_table(tried.spread, "spread over seeds"),
        result_table(tried.seeds, "overlap between seeds"),
    ]  # fmt: skip
    return Content([tried.verdict, *tried.says], [*charts, *tables])


@section("training", "How it was found")
def training(run: Run, results: Results) -> Content:
    """Training curves, why learning stopped, and what hardening the gates changed."""
    steps = facts.steps(run)
    if not steps:
        return Content(["The folder holds no record of the training steps."])
    outcome = facts.outcome(run)
    last = [one for one in steps if one.attempt == steps[-1].attempt]
    first, end = last[0], last[-1]
    took = f"{rounded(outcome.seconds, 0)} seconds"
    took = f" and {took}" if outcome.attempts == 1 else f", in the last of {outcome.attempts} attempts ({took} in all)"
    says = (
        f"The masks were learned in {len(last):,} steps{took}; learning stopped because {outcome.reason}. "
        f"Cross-entropy went from {rounded(first.cross_entropy, 2)} to {rounded(end.cross_entropy, 2)} nats, "
        f"the share of weights kept from {percent(first.fraction)} to {percent(end.fraction)}."
    )
    every = max(1, math.ceil(len(steps) / _MOST_STEPS))
    names, rows = facts.step_table(run, every)
    caption = "All steps" if every == 1 else f"One step in {every}, and the last"
    words = "Cross-entropy, share of weights kept and share of gates undecided, by step."
    chart = Chart("Training", words, figures.training(steps))
    table = Numbers(caption, [spaced(name) for name in names], rows)
    return Content([says, *outcome.rollbacks, *_gap_words(outcome.gap)], [chart, table])


def _gap_words(gap: SoftHardGap | None) -> list[str]:
    """What hardening the gates changed."""
    if gap is None:
        return []
    says = (
        f"On the last batch, the cross-entropy was {rounded(gap.soft)} nats with the soft gates and "
        f"{rounded(gap.hard)} nats with the binary mask."
    )
    return [says, f"Warning: {gap.warning}."] if gap.warning else [says]


@section("again", "How to reproduce it")
def again(run: Run, results: Results) -> Content:
    """The command, settings, versions, results and files of the run."""
    lines = [["folder", str(run.path)], ["lineage", run.subnetwork.lineage], *flat(run.settings)]
    files = sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file())
    sizes = [[name, (run.path / name).stat().st_size] for name in files if not name.endswith("report.html")]
    listing = [[name, f"{type(result).__name__}: {result.title}"] for name, result in results.by_name.items()]
    blocks: list[Block] = []
    command = command_line(run)
    if command:
        blocks.append(Code("This command reproduces it:", command))
    blocks.append(Numbers("Settings and hashes", ["setting", "value"], lines))
    blocks.append(Numbers("Versions", ["package", "version"], [[*pair] for pair in run.versions.items()]))
    if listing:
        blocks.append(Numbers("Results in analysis/", ["name", "result"], listing))
    blocks.append(Numbers("Files", ["file", "bytes"], sizes))
    return Content([] if command else [_why_no_command(run)], blocks)


# --- the command that reproduces a run ---

_OPTIONS = {
    "sparsity_weight": "--sparsity-weight",
    "target_fraction": "--target-fraction",
    "method": "--method",
    "granularity": "--granularity",
    "layers": "--layers",
    "max_steps": "--steps",
    "batch_size": "--batch-size",
    "learning_rate": "--learning-rate",
    "seed": "--seed",
}


def command_line(run: Run) -> str | None:
    """The `bigram-circuits find` command that reproduces a run; None if no command can."""
    recipe = run.settings.get("recipe")
    if run.rebuild is None or not recipe or run.settings.get("within") is not None:
        return None
    options = _recipe_options(recipe)
    if options is None:
        return None
    model, corpus = run.rebuild["model"], run.rebuild["corpus"]
    given = {
        "--revision": model.get("revision"),
        "--dtype": None if model.get("dtype") == "float32" else model.get("dtype"),
        "--corpus": corpus.get("source"),
        "--context-length": corpus.get("context_length"),
        "--max-tokens": corpus.get("max_tokens"),
        "--target": run.rebuild.get("target"),
        "--order": run.rebuild.get("order") if run.rebuild.get("target") == "ngram" else None,
        **options,
    }
    seeds = len(((run.metrics or {}).get("random") or {}).get("seeds", [])) or 3
    if seeds != 3:
        given["--random-seeds"] = seeds
    words = ["bigram-circuits", "find", str(model["name"])]
    for name, value in given.items():
        words += [] if value is None else [name, str(value)]
    return shlex.join(words)


def _recipe_options(recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options that make a recipe; None if it has a setting that no option sets."""
    from bigram_circuits.learning.training import SparsifyConfig

    for name, base in (("default", SparsifyConfig()), ("paper", SparsifyConfig.paper())):
        changed = {key: recipe.get(key) for key, value in asdict(base).items() if recipe.get(key) != value}
        if set(changed) <= set(_OPTIONS) and None not in changed.values():
            if "target_fraction" in changed and "sparsity_weight" in changed:  # the command takes one of them
                return None
            named = {_OPTIONS[key]: _option(value) for key, value in changed.items()}
            return ({} if name == "default" else {"--recipe": name}) | named
    return None


def _option(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={one}" for key, one in value.items())
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _why_no_command(run: Run) -> str:
    if run.rebuild is None:
        return "This run was made in Python from objects, so no command reproduces it; its settings are below."
    if run.settings.get("within") is not None:
        return "This run looked only inside another subnetwork, so no single command reproduces it."
    return "Some of its settings can only be given in Python, so no command reproduces it; they are below."
