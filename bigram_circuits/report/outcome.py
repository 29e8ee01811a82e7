"""Sections about the outcome: controls, attempts to refute it, training, and how to reproduce it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bigram_circuits.evaluation import ZERO_RULE, Evaluation, SoftHardGap
from bigram_circuits.experiments.falsification import load_falsification
from bigram_circuits.experiments.seeds import Seeds
from bigram_circuits.experiments.verdicts import free_name
from bigram_circuits.measures.conditions import CONDITIONS, condition_of, label_of
from bigram_circuits.measures.results import Curves, Effects
from bigram_circuits.measures.words import flat, listed, percent, rounded, sentence, span
from bigram_circuits.names import is_in_memory
from bigram_circuits.recipe import Request, StudyOptions
from bigram_circuits.report import figures
from bigram_circuits.report.blocks import Block, Chart, Code, Content, Numbers
from bigram_circuits.report.facts import Row, control_rows, of_seeds
from bigram_circuits.report.results import Results, result_table
from bigram_circuits.report.sections import section
from bigram_circuits.report.words import spaced
from bigram_circuits.runs import PolishRecord, Run


@section("controls", "Does it beat its controls?")
def controls(run: Run, results: Results) -> Content:
    """Faithfulness of the subnetwork and of every control, with the verdict."""
    evaluation = run.evaluation
    if evaluation is None:
        return Content(["This run was not evaluated, so there are no controls to compare it with."])
    rows, says, noun = control_rows(evaluation), [evaluation.verdict], evaluation.noun
    if evaluation.mask_capacity:
        says.append(evaluation.mask_capacity.says)
    if evaluation.positions and evaluation.used is not None:
        used, n = evaluation.used, evaluation.positions
        says.append(f"Zero-probability rule: {ZERO_RULE}: {used:,} of {n:,} held-out positions ({percent(used / n)}).")
    says += _loss_words(evaluation)
    blocks: list[Block] = []
    if len(rows) > 1 and evaluation.by_loss:
        ends = [evaluation.interval(row.name, "cross_entropy") for row in rows]
        losses = [(row.condition, row.numbers.cross_entropy, *pair) for row, pair in zip(rows, ends, strict=True)]
        figure = figures.controls(losses, "cross-entropy from the target (nats)")
        blocks.append(Chart(f"Cross-entropy from the target: {noun} and controls", _BY_LOSS, figure))
    elif len(rows) > 1:
        words = f"{_closest(rows, noun)} {_INTERVALS}".strip()
        figure = figures.controls([(row.condition, row.r, *row.ends) for row in rows], "r with the target's surprisals")
        blocks.append(Chart(f"r with the target: {noun} and controls", words, figure))
    blocks += [
        _control_table(rows, evaluation),
        Numbers("Glossary of rows and columns", ["name", "meaning"], _glossary(rows)),
    ]
    advantage = [[_label(name, noun), *ends] for name, ends in evaluation.advantage.items()]
    if advantage:
        caption = f"r of the {noun} minus r of each control: 95% paired bootstrap intervals"
        if evaluation.by_loss:
            caption = f"Cross-entropy of each control minus that of the {noun}: 95% paired bootstrap intervals"
        blocks.append(Numbers(caption, ["control", "low", "high"], advantage))
    seeds = [
        [_label(f"{name} {seed}", noun), *(getattr(numbers, key) for key in _COLUMNS)]
        for name, group in of_seeds(evaluation).items()
        for seed, numbers in enumerate(group)
    ]
    if seeds:
        blocks.append(Numbers("Random controls, seed by seed", ["", *_COLUMNS.values()], seeds))
    return Content(says, blocks)


_MOST_STEPS = 60  # rows of the training table
_BY_LOSS = "The correlation with the target is undefined, since it is sure of every answer. Error bars: 95% intervals."
_INTERVALS = "Error bars: 95% bootstrap intervals over sequences; for random controls, the range over seeds."
_COLUMNS = {
    "surprisal_correlation": "r",
    "cross_entropy": "cross-entropy",
    "kl": "KL",
    "mean_surprisal": "loss",
    "top1_agreement": "top-1",
}
_MEANINGS = {name: one.meaning for name, one in CONDITIONS.items()} | {
    "r": "Pearson correlation of the model's surprisals with the target's",
    "cross-entropy, KL": "from the target's distribution to the model's, in nats",
    "loss": "the masked model's next-token loss, in nats",
    "top-1": "share of positions where model and target have the same most likely token",
}
_NOT_ROWS = ("r", "cross-entropy, KL", "loss", "top-1")


def _label(name: str, noun: str) -> str:
    """The label of a row, which may end in a seed."""
    whole, _, seed = name.rpartition(" ")
    return label_of(f"{condition_of(whole, noun)} {seed}" if seed.isdigit() else condition_of(name, noun))


def _control_table(rows: Sequence[Row], evaluation: Evaluation) -> Numbers:
    r, *others = _COLUMNS.values()
    columns = ["", r, "interval", *others, f"{evaluation.units} kept", "fraction"]
    table = []
    for row in rows:
        r, *others = (getattr(row.numbers, key) for key in _COLUMNS)
        table.append([label_of(row.condition), r, span(*row.ends), *others, row.numbers.kept, row.numbers.fraction])
    return Numbers(f"{evaluation.noun.capitalize()} and controls", columns, table, is_open=True)


def _glossary(rows: Sequence[Row]) -> list[list[str]]:
    names = {row.condition for row in rows}
    return [[label_of(name), meaning] for name, meaning in _MEANINGS.items() if name in names or name in _NOT_ROWS]


def _closest(rows: Sequence[Row], noun: str) -> str:
    own, *others = rows
    known = [row for row in others if not math.isnan(row.r)]
    if math.isnan(own.r) or not known:
        return ""
    best = max(known, key=lambda row: row.r)
    return (
        f"The {noun} has r = {rounded(own.r)}; the best of the others, {label_of(best.condition)}, {rounded(best.r)}."
    )


def _loss_words(evaluation: Evaluation) -> list[str]:
    """The model's loss with everything, without what was found, and without as much at random, with intervals."""
    rows = {name: numbers.mean_surprisal for name, numbers in evaluation.rows()}
    parts = []
    for name, words in _LOSSES.items():
        if name in rows:
            ends = span(*evaluation.interval(name, "mean_surprisal"))
            told = words.format(noun=evaluation.noun, units=evaluation.units)
            parts.append(f"{rounded(rows[name], 2)} nats{f' (95% interval {ends})' if ends else ''} {told}")
    return [f"The model's loss is {listed(parts)}."] if len(parts) > 1 else []


_LOSSES = {
    "full": "with all {units}",
    "complement": "without the {noun}",
    "full - random": "without as many random {units} (mean over seeds)",
}


@section("refuted", "Attempts to refute it")
def refuted(run: Run, results: Results) -> Content:
    """Untrained weights at equal size, a nonsense target and other seeds: what `falsify` found."""
    tried = load_falsification(run.path / "falsify", run)
    if tried is None:
        return Content(["Not attempted: bigram-circuits find --falsify tries to refute the finding."])
    first = [*_by_size(tried.curves, tried.controls, run.mask.units), *_gap_tables(tried.gaps)] or _bars(tried.controls)
    tables = [
        result_table(tried.controls, "every attempt"), result_table(tried.spread, "spread over seeds"),
        result_table(tried.seeds, "overlap between seeds"),
    ]  # fmt: skip
    tables += [result_table(tried.curves, "every size")] if tried.curves else []
    return Content([tried.verdict, *tried.says], [*first, *tables])


_BY_SIZE = "Bands: 95% bootstrap intervals over sequences. Open circles: without a penalty on kept {}."


def _by_size(curves: Curves | None, controls: Effects, units: str) -> list[Block]:
    """KL and r by size, for trained and untrained weights, with their ends without a penalty."""
    if curves is None:
        return []
    charts: list[Block] = []
    for name, key in {"KL": "kl", "r": "surprisal_correlation"}.items():
        known = {one for one in curves.conditions if not np.isnan(curves.get(key, one)).all()}
        values, shares = controls.get(key), controls.get("fraction")
        ends = {
            one: (shares[end], values[end])
            for one in curves.conditions
            if one in known and (end := free_name(one)) in values and not math.isnan(values[end])
        }
        if known:
            title = f"{name} by size: trained and untrained weights"
            charts.append(Chart(title, _BY_SIZE.format(units), figures.by_size(curves, key, ends, units)))
    return charts


def _gap_tables(gaps: Effects | None) -> list[Block]:
    """What the trained model is ahead of each control of the same size."""
    if gaps is None:
        return []
    columns, rows = ["control", "kept"], [[name, percent(of)] for name, of in gaps.get("fraction").items()]
    for words, key in {"KL": "kl_gap", "r": "r_gap", "information": "context_told_gap"}.items():
        at = gaps.quantities.index(gaps.quantity(key))
        columns.append(f"gap in {words} (95%)")
        for row, value, low, high in zip(rows, gaps.values[at], gaps.low[at], gaps.high[at], strict=True):
            row.append(f"{rounded(value)} ({span(low, high)})")
    return [Numbers("The gap at equal size: positive where the trained model does better", columns, rows, is_open=True)]


def _bars(controls: Effects) -> list[Block]:
    """The results of versions that did not compare at equal size."""
    shown = {"KL": "kl", "r": "surprisal_correlation", "share of weights kept": "fraction"}
    known = {name: controls.get(key) for name, key in shown.items()}
    return [
        Chart(
            f"{name} of the finding and of every attempt",
            "",
            figures.bars(controls.names, {name: list(values.values())}, name),
        )
        for name, values in known.items()
        if not all(math.isnan(value) for value in values.values())
    ]


@section("training", "How it was found")
def training(run: Run, results: Results) -> Content:
    """Training curves, why learning stopped, and what hardening the gates changed."""
    steps, outcome = run.history, run.outcome
    if not steps:
        return Content([*_input_words(run), "The folder holds no record of the training steps."])
    last = run.last_attempt
    first, end = last[0], last[-1]
    took = f"{rounded(outcome.seconds, 0)} seconds"
    took = f" and {took}" if outcome.attempts == 1 else f", in the last of {outcome.attempts} attempts ({took} in all)"
    says = (
        f"The masks were learned in {len(last):,} steps{took}; learning stopped because {run.why}. "
        f"Cross-entropy went from {rounded(first.cross_entropy, 2)} to {rounded(end.cross_entropy, 2)} nats, "
        f"the share of {run.mask.units} kept from {percent(first.fraction)} to {percent(end.fraction)}."
    )
    every = max(1, math.ceil(len(steps) / _MOST_STEPS))
    shown = [one.to_json() for place, one in enumerate(steps) if place % every == 0 or one is steps[-1]]
    caption = "All steps" if every == 1 else f"One step in {every}, and the last"
    words = f"Cross-entropy, share of {run.mask.units} kept and share of gates undecided, by step."
    chart = Chart("Training", words, figures.training(steps, run.mask.units))
    table = Numbers(caption, [spaced(name) for name in shown[0]], [[*one.values()] for one in shown])
    went_back = [
        f"At step {one.step} {one.what}: the run was rolled back to step {one.back_to}, with learning rate "
        f"{one.learning_rate:g}."
        for one in outcome.rollbacks
    ]
    ended = [*_gap_words(outcome.soft_hard), *_polish_words(outcome.polish, run.mask.units)]
    ended += [f"Warning: {caution}." for caution in run.cautions]
    return Content([*_input_words(run), says, _recipe_words(run), *went_back, *ended], [chart, table])


def _input_words(run: Run) -> list[str]:
    """What was found of model, text and target before learning; nothing if they were not checked."""
    checked = run.checked
    if checked is None:
        return []
    facts = []
    if checked.contexts:
        found = checked.contexts
        facts.append(
            f"the training text has {found.contexts:,} contexts of {found.order}-grams, {found.once:,} of them only "
            f"once; {percent(found.held_out_once)} of the held-out positions have one of these, and "
            f"{percent(found.held_out_unseen)} a context that it does not have"
        )
    if checked.ability:
        facts.append(f"the full model on the task {checked.ability}")
    if checked.losses:
        facts.append(
            f"on a few held-out sequences, the model's next-token loss was {rounded(checked.losses[0], 2)} nats, that "
            f"of the training text's token frequencies {rounded(checked.losses[1], 2)}"
        )
    return [*map(sentence, facts), *(f"Warning before learning: {line}." for line in checked.warnings)]


def _recipe_words(run: Run) -> str:
    """Every setting of the recipe that is set and has a meaning, as a sentence."""
    without = set() if run.settings.recipe.units else {"replace"}
    settings = [
        f"{spaced(name)} {spaced(value)}"
        for name, value in flat(run.settings.recipe.to_json())
        if value != "not set" and name not in without
    ]
    return f"Settings: {', '.join(settings)}."


def _gap_words(gap: SoftHardGap | None) -> list[str]:
    """What hardening the gates changed."""
    if gap is None:
        return []
    return [
        f"On the last batch, the cross-entropy was {rounded(gap.soft)} nats with the soft gates and "
        f"{rounded(gap.hard)} nats with the binary mask."
    ]


def _polish_words(polish: PolishRecord | None, units: str) -> list[str]:
    """What polishing changed."""
    if polish is None:
        return []
    return [
        f"Then the mask was polished: {polish.dropped:,} {units} were dropped and {polish.readmitted:,} re-admitted. "
        f"Its cross-entropy on some of the training text went from {rounded(polish.before)} to "
        f"{rounded(polish.after)} nats."
    ]


@section("again", "How to reproduce it")
def again(run: Run, results: Results) -> Content:
    """The command, settings, versions, results and files of the run."""
    lines = [["folder", str(run.path)], ["lineage", run.mask.lineage], *flat(run.settings.to_json())]
    files = sorted(path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file())
    sizes = [[name, (run.path / name).stat().st_size] for name in files if not name.endswith("report.html")]
    listing = [[name, f"{type(result).__name__}: {result.title}"] for name, result in results.by_name.items()]
    blocks: list[Block] = []
    command = command_line(run, results.seeds)
    if command:
        blocks.append(Code("This command reproduces it:", command))
    versions = [["begun", run.created or "not recorded"], *([*pair] for pair in run.versions.items())]
    blocks.append(Numbers("Settings and hashes", ["setting", "value"], lines, is_open=True))
    blocks.append(Numbers("Date and versions", ["package", "version"], versions, is_open=True))
    if listing:
        blocks.append(Numbers("Results in analysis/", ["name", "result"], listing))
    blocks.append(Numbers("Files", ["file", "bytes"], sizes))
    return Content([] if command else [_why_no_command(run)], blocks)


def command_line(run: Run, several: Seeds | None = None) -> str | None:
    """The `bigram-circuits find` command that reproduces a run, and the other seeds; None if no command can."""
    settings = run.settings
    if run.rebuild is None or is_in_memory(run.rebuild.model) or settings.within is not None or settings.apart_from:
        return None
    recipe, options = run.settings.recipe, StudyOptions()
    if run.evaluation and run.evaluation.random:
        options = replace(options, random_seeds=len(run.evaluation.random))
    if several is not None:
        recipe, options = replace(recipe, seed=several.seeds[0]), replace(options, seeds=len(several.seeds))
    return Request(run.rebuild, recipe, options).command()


def _why_no_command(run: Run) -> str:
    if run.rebuild is None:
        return "This run was made in Python from objects, so no command reproduces it; its settings are below."
    if is_in_memory(run.rebuild.model):
        return "This run was made in Python with a model in memory, so no command reproduces it; settings are below."
    if run.settings.apart_from:
        return f"This {run.mask.noun} was learned apart from others, so no single command reproduces it."
    return f"This run looked only inside another {run.mask.noun}, so no single command reproduces it."
