"""Sections about the outcome: subnetwork and controls, attempts to refute it, training, how to do it again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bigram_circuits.evaluation import SoftHardGap
from bigram_circuits.experiments.falsification import load_falsification
from bigram_circuits.measures.words import flat, percent, rounded, span
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Block, Chart, Code, Content, Numbers
from bigram_circuits.report.measured import interval
from bigram_circuits.report.results import Results, result_table
from bigram_circuits.report.sections import section
from bigram_circuits.report.words import spaced
from bigram_circuits.runs import STOPS, Run


@section("controls", "Does it do the job better than chance would?")
def controls(run: Run, results: Results) -> Content:
    """How the subnetwork compares with its controls."""
    if run.metrics is None:
        return Content(["This run was not evaluated, so there are no controls to compare with."])
    metrics = run.metrics
    rows = list(_control_rows(metrics))
    says = [verdict_words(metrics)]
    rule = metrics.get("zero_rule")
    if rule:
        says.append(
            f"The zero-probability rule: {rule['rule']}. These are {rule['used']:,} of {rule['positions']:,} held-out "
            f"positions ({percent(rule['share'])})."
        )
    dots = [(name, value.get("surprisal_correlation"), low, high) for name, value, low, high in rows]
    columns = ["", "r", "interval of r", "cross-entropy", "KL", "own loss", "top-1", "weights kept", "share"]
    table = [
        [name, value.get("surprisal_correlation"), span(low, high),
         value.get("cross_entropy"), value.get("kl"), value.get("mean_surprisal"), value.get("top1_agreement"),
         value.get("kept"), value.get("fraction")]
        for name, value, low, high in rows
    ]  # fmt: skip
    blocks: list[Block] = []
    if len(rows) > 1:
        says_so = f"{_closest(rows)} {_INTERVALS}".strip()
        blocks.append(Chart("r with the target, subnetwork and controls", says_so, figures.controls(dots)))
    blocks.append(Numbers("Subnetwork and controls", columns, table, is_open=True))
    blocks.append(Numbers("What the rows and columns are", ["name", "what it is"], _glossary(rows)))
    if metrics.get("advantage"):
        pairs = [[name, *pair] for name, pair in metrics["advantage"].items()]
        caption = "r of the subnetwork less r of each control: 95% paired intervals"
        blocks.append(Numbers(caption, ["control", "low", "high"], pairs))
    seeds = [
        [f"{name} {one['seed']}", *(one.get(key) for key in _MEASURED)]
        for name, key_of in (("random", "random"), ("full - random", "full_minus_random"))
        for one in (metrics.get(key_of) or {}).get("seeds", [])
    ]
    if seeds:
        blocks.append(Numbers("Every random control by itself", ["", *map(spaced, _MEASURED)], seeds))
    return Content(says, blocks)


_MOST_STEPS = 60  # rows of the training table
_INTERVALS = "Intervals: 95%, bootstrap over sequences; for random weights, the lowest and the highest seed."
_MEASURED = ("surprisal_correlation", "cross_entropy", "kl", "mean_surprisal", "top1_agreement")
_MEANINGS = {
    "subnetwork": "the model with only the subnetwork's weights",
    "full": "the whole model",
    "empty": "the model with no maskable weight: embeddings, normalisation and biases remain",
    "complement": "the whole model without the subnetwork's weights",
    "magnitude": "the largest weights, as many in every matrix as the subnetwork keeps",
    "random": "as many weights in every matrix, drawn at random: mean over seeds",
    "full - random": "the whole model without as many random weights: mean over seeds",
    "r": "correlation of the model's surprisals with the target's",
    "cross-entropy, KL": "from the target, nats",
    "own loss": "the masked model's own next-token loss, nats",
    "top-1": "share of positions where model and target find the same token most likely",
}
_NOT_ROWS = ("r", "cross-entropy, KL", "own loss", "top-1")

_Row = tuple[str, Mapping[str, Any], float | None, float | None]


def _control_rows(metrics: Mapping[str, Any]) -> Iterator[_Row]:
    for name in ("subnetwork", "full", "complement", "magnitude"):
        if metrics.get(name):
            low, high = interval(metrics, name)
            yield name, metrics[name], low, high
    for name, key in (("random", "random"), ("full - random", "full_minus_random")):
        group = metrics.get(key)
        if group:
            known = [one["surprisal_correlation"] for one in group["seeds"] if one["surprisal_correlation"] is not None]
            low, high = (min(known), max(known)) if len(known) > 1 else (None, None)
            yield name, group["mean"], low, high
    if metrics.get("empty"):
        low, high = interval(metrics, "empty")
        yield "empty", metrics["empty"], low, high


def _glossary(rows: Sequence[_Row]) -> list[list[str]]:
    names = {name for name, *_ in rows}
    return [[name, meaning] for name, meaning in _MEANINGS.items() if name in names or name in _NOT_ROWS]


def _closest(rows: Sequence[_Row]) -> str:
    own = rows[0][1].get("surprisal_correlation")
    known = {name: value["surprisal_correlation"] for name, value, *_ in rows[1:] if _is_known(value)}
    if own is None or not known:
        return ""
    best = max(known, key=lambda name: known[name])
    return f"The subnetwork has r = {rounded(own)}; the highest of the others is {best}, with {rounded(known[best])}."


def _is_known(value: Mapping[str, Any]) -> bool:
    return value.get("surprisal_correlation") is not None


def verdict_words(metrics: Mapping[str, Any]) -> str:
    """The verdict; empty if there are no controls."""
    return str(metrics.get("verdict") or "")


@section("refuted", "Could it be refuted?")
def refuted(run: Run, results: Results) -> Content:
    """What `falsify` found."""
    tried = load_falsification(run.path / "falsify")
    if tried is None:
        return Content(["Nobody tried: `bigram-circuits find --falsify` does."])
    shown = {"KL": "kl", "r": "surprisal_correlation", "share kept": "fraction"}
    known = {name: tried.controls.get(key) for name, key in shown.items()}
    charts: list[Block] = [
        Chart(
            f"{name} of what was found, and of every attempt",
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
    """How the masks were learned."""
    history, outcome = run.history, run.outcome
    if not history:
        return Content(["The folder holds no record of the training steps."])
    why = STOPS.get(outcome.get("stopped_because", ""), outcome.get("stopped_because"))
    attempts = outcome.get("attempts", 1)
    tries = "one attempt" if attempts == 1 else f"{attempts} attempts"
    last = [record for record in history if record.get("attempt", 0) == history[-1].get("attempt", 0)]
    first, end = last[0], last[-1]
    seconds = rounded(outcome.get("seconds"), 0)
    says = (
        f"The masks were learned in {len(last):,} steps ({tries}, {seconds} seconds in all); it stopped because {why}. "
        f"Meanwhile the cross-entropy went from {rounded(first['cross_entropy'], 2)} to "
        f"{rounded(end['cross_entropy'], 2)} nats, and the share kept from {percent(first['fraction'])} to "
        f"{percent(end['fraction'])}."
    )
    gap = outcome.get("soft_hard")
    hardened = SoftHardGap(**gap) if gap else None
    lost = (
        f"On the last batch the cross-entropy was {rounded(hardened.soft)} nats with the soft gates, and is "
        f"{rounded(hardened.hard)} with the mask made of them."
        if hardened
        else ""
    )
    went_back = [
        f"At step {one['step']} {one['what']}: the run went back to step {one['back_to']}, with the learning rate "
        f"{one['learning_rate']:g}."
        for one in outcome.get("rollbacks", ())
    ]
    warning = f"Warning: {hardened.warning}." if hardened and hardened.warning else ""
    every = max(1, math.ceil(len(history) / _MOST_STEPS))
    shown = [record for place, record in enumerate(history) if place % every == 0 or record is history[-1]]
    columns = list(dict.fromkeys(key for record in shown for key in record))
    caption = "Every step" if every == 1 else f"Every {every}th step and the last one"
    table = Numbers(caption, [spaced(key) for key in columns], [[one.get(key) for key in columns] for one in shown])
    chart = Chart("Training", "Cross-entropy, share kept and undecided gates by step.", figures.training(history))
    return Content([says, *went_back, lost, warning], [chart, table])


@section("again", "How to do it again")
def again(run: Run, results: Results) -> Content:
    """The command, the settings, versions and files."""
    lines = [["folder", str(run.path)], ["lineage", run.subnetwork.lineage], *flat(run.settings)]
    files = sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file())
    sizes = [[name, (run.path / name).stat().st_size] for name in files if not name.endswith("report.html")]
    told = [[name, f"{type(result).__name__}: {result.title}"] for name, result in results.by_name.items()]
    blocks: list[Block] = []
    command = command_line(run)
    if command:
        blocks.append(Code("This command finds it again:", command))
    blocks.append(Numbers("Settings and hashes", ["setting", "value"], lines))
    blocks.append(Numbers("Versions", ["package", "version"], [[*pair] for pair in run.versions.items()]))
    if told:
        blocks.append(Numbers("Results in analysis/", ["name", "what it is"], told))
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
