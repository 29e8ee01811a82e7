"""Whole jobs as one function each, from names to files.

`study` finds a subnetwork, evaluates it, analyses it, tries to refute it, and writes its page; `reproduce` measures a
paper's numbers again. `bigram-circuits find` and `bigram-circuits reproduce` call them with the options given.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from bigram_circuits.analysis.suite import analyze
from bigram_circuits.environment import runs_folder
from bigram_circuits.evaluation import evaluate
from bigram_circuits.experiments.faithfulness_curves import (
    METHODS,
    SIZES,
    FaithfulnessCurves,
    check_choices,
    faithfulness_curves,
)
from bigram_circuits.experiments.falsification import falsify
from bigram_circuits.experiments.ladder import Ladder, find_ladder
from bigram_circuits.experiments.reproduced import Reproduction, load_reproduction, start_reproduction
from bigram_circuits.experiments.reproduction import reproduce_model
from bigram_circuits.experiments.seeds import over_seeds
from bigram_circuits.experiments.sparsity_path import SubnetworkPath, sparsity_path
from bigram_circuits.learning.callbacks import Callback
from bigram_circuits.learning.found import Found
from bigram_circuits.learning.inputs import check_inputs, warn_of
from bigram_circuits.learning.memory import forecast_memory
from bigram_circuits.learning.names import name_of_target, names_of
from bigram_circuits.learning.ranks import Ranks, alone, current_ranks, refuse_several
from bigram_circuits.learning.training import find_mask, identity_of, run_settings, with_pairs
from bigram_circuits.masking.candidates import Candidates
from bigram_circuits.models.activations import check_length, shorter_than_context
from bigram_circuits.models.identity import check_is, same_text
from bigram_circuits.models.loading import full_name, is_local, load_model
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import in_use
from bigram_circuits.names import is_in_memory, short_name
from bigram_circuits.paper import PAPERS, ROWS, Paper
from bigram_circuits.progress import note
from bigram_circuits.recipe import (
    DTYPES,
    NOT_FOR_CURVES,
    NOT_FOR_LADDER,
    NOT_FOR_REPRODUCE,
    Inputs,
    Request,
    SparsifyConfig,
)
from bigram_circuits.report.curves import write_curves
from bigram_circuits.report.ladder import write_ladder
from bigram_circuits.report.page import write_report
from bigram_circuits.runs import InputCheck, Run, RunFolder, RunSettings, load_run
from bigram_circuits.storage.locks import lock_folder
from bigram_circuits.targets.base import Target, target_of
from bigram_circuits.targets.next_token import NextTokenTarget
from bigram_circuits.targets.ngram import IndexTarget
from bigram_circuits.tasks.rows import load_task
from bigram_circuits.tasks.target import TaskTarget
from bigram_circuits.tasks.task import refuse_unable
from bigram_circuits.text.corpus import DEFAULT_CONTEXT_LENGTH, Corpus, load_corpus
from bigram_circuits.text.indexes import full_path


@dataclass(frozen=True)
class Subjects:
    """The model, text and target of a study, and their names."""

    model: Model
    """A hooked model."""
    corpus: Corpus
    """Masks are learned on its training part and measured on its held-out part."""
    target: Any
    """The target to be reproduced."""
    inputs: Inputs | None
    """The names of all three; None if one of them has none."""

    @classmethod
    def load(cls, inputs: Inputs, device: str | None = None) -> Subjects:
        """Load model and text and make the target, from their names."""
        model = load_named(inputs, device)
        if inputs.task is not None:
            return subjects_of_task(inputs, model)
        corpus = corpus_of(inputs, inputs.corpus, model)
        return cls(model, corpus, target_named(inputs, model, corpus), inputs)


@overload
def study(  # pyright: ignore[reportOverlappingOverload]
    model: Model | str | Path = "reference",
    corpus: Any = "reference",
    *,
    sparsity_weights: Sequence[float | int],
    **options: Any,
) -> SubnetworkPath: ...
@overload
def study(model: Model | str | Path = "reference", corpus: Any = "reference", **options: Any) -> Run: ...
def study(
    model: Model | str | Path = "reference",
    corpus: Any = "reference",
    *,
    target: Any = "ngram",
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    fresh: bool = False,
    sharded: bool = False,
    callbacks: Sequence[Callback] = (),
    tell: Callable[[str], None] | None = None,
    on_folder: Callable[[Path], None] | None = None,
    **options: Any,
) -> Run | SubnetworkPath:
    """Find a subnetwork, evaluate and analyse it, try to refute it if asked, and write its page.

    This is what `bigram-circuits find` does. In a process group (`torchrun`) all processes learn together; then the
    first one goes on alone, and the others return the run as it is then, without its evaluation. They must all see its
    folder.

    Args:
        model: `"reference"`, a hub id, a folder, or a model from `load_model`.
        corpus: `"reference"`, a file, folder or dataset, anything that `load_corpus` reads, or a `Corpus`.
        target: A name (`ngram`, `model`, `next-token`, `induced`), or any target.
        out: The run folder; by default one under `runs/` (or `BIGRAM_CIRCUITS_RUNS`), named after model and settings.
        device: Device to load the model to; by default as `load_model`.
        fresh: Start over if this run was started or finished before.
        sharded: As for `find_subnetwork`.
        callbacks: As for `find_subnetwork`.
        tell: Called with lines of text that report progress and results, for example `print`.
        on_folder: Called with the folder, once it is known.
        **options: The options of `bigram-circuits find`, by name: those of `SparsifyConfig` (`sparsity_weight`,
            `target_fraction`, `max_steps`, ...), `recipe`, `sparsity_weights`, `order`, `task`, `measure`, `force`,
            `index`, `revision`, `dtype`, `context_length`, `max_tokens`, `text_column`, `held_out`, `bos`, `unchecked`,
            `seeds`, `random_seeds`, `analysis`, `falsify`, `falsify_seeds`, `check_memory`.

    Returns:
        The `Run`, read from its folder; with `sparsity_weights`, the `SubnetworkPath`. With several `seeds`, it is the
        run that represents them (`over_seeds`), and `load_seeds(run.path)` says how much they differ.

    Raises:
        ValueError: If an option does not exist or has a value that is not allowed, model, text and target do not
            fit together, the full model is not shown to do the task, or several processes are to learn several masks.
        OSError: If something cannot be loaded, or the folder cannot be written.
        MemoryError: If learning cannot fit the device.

    Example:
        >>> run = bc.study("reference", "reference", max_steps=3, max_tokens=20_000, analysis=False, out="runs/study")
        >>> print(run.evaluation)
    """
    started = time.monotonic()
    if options.get("sparsity_weights") is not None or options.get("seeds", 1) != 1:
        refuse_several("a path or a study of several seeds")
    request, subjects = _requested(model, corpus, target, current_ranks().own_device(device), options)
    return study_of(
        request, subjects, out=out, fresh=fresh, sharded=sharded, callbacks=callbacks, tell=tell, on_folder=on_folder,
        started=started,
    )  # fmt: skip


def study_of(
    request: Request,
    subjects: Subjects,
    *,
    out: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    sharded: bool = False,
    callbacks: Sequence[Callback] = (),
    tell: Callable[[str], None] | None = None,
    on_folder: Callable[[Path], None] | None = None,
    started: float | None = None,
) -> Run | SubnetworkPath:
    """`study`, with its options as a request, and model, text and target as they are; `started` is by the clock
    `time.monotonic`, if it was before.
    """
    started, ranks = time.monotonic() if started is None else started, current_ranks()
    say = tell if tell and ranks.is_first else (lambda line: None)
    with in_use(subjects.model, "study"):  # nobody edits its weights meanwhile
        if request.options.sparsity_weights is not None:
            return _path(request, subjects, out, callbacks, say, on_folder)
        folder = _study(request, subjects, out, fresh, callbacks, say, on_folder, ranks, sharded)
    say(f"{time.monotonic() - started:.0f} s in total; files in {folder.path}/: {', '.join(folder.files())}")
    say(f"the page to look at: {folder.path / 'report.html'}")
    return load_run(folder.path)


def _requested(
    model: Any, corpus: Any, target: Any, device: str | None, options: Mapping[str, Any]
) -> tuple[Request, Subjects]:
    """All options, and the model, text and target that they name or that were given.

    Raises:
        ValueError: As `study`.
        OSError: As `study`.
    """
    names, options = {"model": model, "corpus": corpus, "target": target}, dict(options)
    if options.get("index") is not None:
        options["index"] = full_path(options["index"])
    if options.get("task") is not None:
        if not isinstance(corpus, str) or not isinstance(target, str):
            raise ValueError("a task brings its own text and target: leave corpus and target out")
        options["task"] = os.path.abspath(Path(options["task"]).expanduser())
    named = {name: str(value) for name, value in names.items() if isinstance(value, str | Path)}
    if isinstance(model, str | Path):
        named["model"] = full_name(model)
    if "corpus" in named and corpus != "reference" and Path(corpus).expanduser().exists():
        named["corpus"] = os.path.abspath(Path(corpus).expanduser())
    request = Request.of(**named, **options)
    return request, _subjects(request.inputs, request.config, names, set(named), device)


def _study(
    request: Request,
    subjects: Subjects,
    out: str | os.PathLike[str] | None,
    fresh: bool,
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
    on_folder: Callable[[Path], None] | None,
    ranks: Ranks,
    sharded: bool,
) -> RunFolder:
    """Find one subnetwork, examine it and write its page; returns the run's folder."""
    settings, several = run_settings(subjects.model, subjects.target, subjects.corpus, request.config), ()
    if request.options.seeds > 1:
        several = ("seeds", request.options.seeds)
    path = Path(out or default_folder(subjects.model, settings, *several))
    if on_folder is not None:
        on_folder(path)
    checked = ranks.first_does(
        lambda: None if RunFolder(path).is_finished and not fresh else _checked(request, subjects)
    )
    if several:
        request = _over_seeds(request, subjects, path, fresh, checked, callbacks, say)
        settings, fresh = replace(settings, recipe=request.config), False

    def begin() -> str | None:
        """Open the folder, and say what is going to be done."""
        folder = RunFolder.open(path, settings, resume=not fresh, rebuild=subjects.inputs, checked=checked)
        if not several:
            _introduce(request, subjects, folder, say)
            if checked:
                warn_of(checked)
        return folder.id

    folder, begun = RunFolder(path), ranks.first_does(begin)
    if not all(ranks.gather(folder.id == begun)):
        raise ValueError(f"not all processes see the run's folder {str(path)!r}: it must be on a disk that they share")
    with folder.lock() if ranks.is_first else nullcontext():
        found = find_mask(
            subjects.model, subjects.target, subjects.corpus, request.config, run_dir=folder.path,
            callbacks=callbacks, check_memory=request.options.check_memory, sharded=sharded,
        )  # fmt: skip
        if not ranks.is_first:
            return folder
        try:
            with alone():
                _examine(request, subjects, folder, found, say)
        except KeyboardInterrupt:
            kept = f"the {found.mask.noun} is saved in {str(folder.path)!r}; rerun the command to go on"
            raise KeyboardInterrupt(f"interrupted while evaluating or analysing; {kept}") from None
    for line in _in_the_end(found):
        say(line)
    return folder


def _over_seeds(
    request: Request,
    subjects: Subjects,
    path: Path,
    fresh: bool,
    checked: InputCheck | None,
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
) -> Request:
    """Learn with several seeds; returns the request for the run that represents them, which is then in the folder."""
    _introduce(request, subjects, RunFolder(path), say)
    if checked:
        warn_of(checked)
    found = over_seeds(
        subjects.model, subjects.target, subjects.corpus, request.config, seeds=request.options.seeds, run_dir=path,
        resume=not fresh, random_seeds=request.options.random_seeds, rebuild=subjects.inputs, callbacks=callbacks,
        check_memory=request.options.check_memory, checked=checked, tell=say,
    )  # fmt: skip
    say(f"\n{found}\n\nwhat follows is of seed {found.representative}")
    return replace(request, config=replace(request.config, seed=found.representative))


def _checked(request: Request, subjects: Subjects) -> InputCheck:
    """What may be wrong with the inputs.

    Raises:
        ValueError: If nothing is held out, so that a study would end in an error, or the full model is not shown to do
            the task.
    """
    if not len(subjects.corpus.held_out):
        raise ValueError(
            f"the held-out part of the corpus {subjects.corpus.source!r} is empty, but a study measures on it: hold "
            "out some of the text, or use find_subnetwork alone"
        )
    checked = check_inputs(subjects.model, subjects.target, subjects.corpus, request.config)
    if checked.ability is not None and not request.inputs.force:
        refuse_unable(checked.ability, "--force")
    return checked


def _subjects(
    inputs: Inputs, config: SparsifyConfig, given: dict[str, Any], named: set[str], device: str | None
) -> Subjects:
    """Model, text and target: loaded if given by name, taken as they are if given as objects.

    Raises:
        ValueError: If the recipe asks for layers or units that the model does not have, or they do not fit together.
    """
    model = given["model"]
    if "model" in named:
        model = load_named(inputs, device)
    Candidates(model, config)  # raises an error before the text, which may take long to read
    if inputs.task is not None:
        found = subjects_of_task(inputs, model)
        return found if "model" in named else replace(found, inputs=None)
    corpus = given["corpus"] if isinstance(given["corpus"], Corpus) else corpus_of(inputs, given["corpus"], model)
    target = given["target"]
    if "target" in named:
        target = target_named(inputs, model, corpus)
    if named != given.keys():
        return Subjects(model, corpus, target, names_of(model, target_of(target, model), corpus))
    return Subjects(model, corpus, target, inputs)


def target_named(inputs: Inputs, model: Model, corpus: Corpus) -> Any:
    """The target that a study's options name: an index looked up, or the text counted."""
    if inputs.index is not None:
        return IndexTarget(inputs.index, d_vocab=model.cfg.d_vocab, order=inputs.order)
    return inputs.kind_of_target.make(model, corpus, inputs.order)


def subjects_of_task(inputs: Inputs, model: Model) -> Subjects:
    """The subjects of a study on a task, read from its file."""
    task = load_task(inputs.task, tokenizer=model.tokenizer, bos=inputs.bos)
    check_length(model, task.tokens.shape[1], "give shorter prompts")
    target = TaskTarget(task, inputs.measure, model=model)
    return Subjects(model, task.corpus(inputs.share_held_out), target, inputs)


def load_named(inputs: Inputs, device: str | None = None) -> Model:
    """Load the model that a study's options name."""
    return load_model(
        inputs.model, revision=inputs.revision, device=device, dtype=inputs.dtype, check=not inputs.unchecked
    )


def corpus_of(inputs: Inputs, source: Any, model: Model) -> Corpus:
    """Read the text of a study from a source, cut and split as its options say."""
    length = inputs.context_length
    if length is None:
        length = shorter_than_context(model, DEFAULT_CONTEXT_LENGTH)
    check_length(model, length, "give a --context-length of at most that")
    corpus = load_corpus(
        source, tokenizer=model.tokenizer, context_length=length, max_tokens=inputs.max_tokens,
        held_out=inputs.share_held_out, text_column=inputs.text_column, bos=inputs.bos,
    )  # fmt: skip
    reading = corpus.reading if current_ranks().is_first else None
    if reading is not None and (len(reading.read) > 1 or reading.skipped):
        note(f"{corpus.source}: {reading}", logging.INFO)
    return corpus


def default_folder(model: Model, settings: RunSettings, *more: Any) -> Path:
    """The default folder for these settings: the same command always continues the same run."""
    name = short_name(str(model.cfg.model_name)).rsplit("/", 1)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    settings = replace(  # hashes tell model and text, whatever names found them
        settings,
        model=replace(settings.model, name=None, revision=None),
        corpus=replace(settings.corpus, source=None),
    )
    text = json.dumps([settings.to_json(), *more], sort_keys=True)
    return runs_folder() / f"{name}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _introduce(request: Request, subjects: Subjects, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Report model, text, target, run folder and memory forecast."""
    model, found_before = subjects.model, folder.is_finished
    cfg = model.cfg
    say(f"model   {cfg.model_name}: {cfg.n_layers} blocks, d_model {cfg.d_model}, {cfg.device}")
    say(f"text    {subjects.corpus!r}")
    say(f"target  {subjects.target!r}")
    say(f"run     {folder.path}{' (found before; --fresh starts over)' if found_before else ''}")
    if not found_before and request.options.check_memory != "off":
        say(f"memory  {forecast_memory(model, subjects.target, subjects.corpus, request.config)}")


def _examine(request: Request, subjects: Subjects, folder: RunFolder, found: Found, say: Callable[[str], None]) -> None:
    """Evaluate, analyse and try to refute, as requested, and write the page."""
    model, target, corpus, options = subjects.model, subjects.target, subjects.corpus, request.options
    evaluation = folder.evaluation() if options.seeds > 1 else None  # measured with those of the other seeds
    if evaluation is None:
        evaluation = evaluate(model, found.mask, target, corpus.held_out, seeds=options.random_seeds)
        folder.write_evaluation(evaluation, identity_of(corpus))
    say(f"\n{evaluation}\n\n{found.mask.table()}\n")
    if options.analysis:
        analyses = analyze(model, found.mask, target, corpus)
        analyses.save(folder.path / "analysis")
        say(f"{analyses}\n")
    write_report(folder.path)
    if options.falsify:
        tried = falsify(
            model, target, corpus, request.config,
            found=found.mask, seeds=options.falsify_seeds, run_dir=folder.path / "falsify",
        )  # fmt: skip
        say(f"{tried}\n")
        write_report(folder.path)


def _in_the_end(found: Found) -> list[str]:
    """Lines that summarise how learning went."""
    lines = [f"learned in {found.seconds:.0f} s and {len(found.history)} steps; stopped because {found.why}"]
    if found.rollbacks:
        lines.append(
            f"rollbacks after the loss exploded: {len(found.rollbacks)} (see training.json); "
            f"learning rate at the end {found.rollbacks[-1].learning_rate:g}"
        )
    if found.gap:
        lines.append(
            f"on the last batch: cross-entropy {found.gap.soft:.3f} nats with soft gates, {found.gap.hard:.3f} with "
            "the mask"
        )
    return [*lines, *(f"WARNING: {caution}" for caution in found.cautions)]


def _path(
    request: Request,
    subjects: Subjects,
    out: str | os.PathLike[str] | None,
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
    on_folder: Callable[[Path], None] | None,
) -> SubnetworkPath:
    """Find nested subnetworks: a folder with one run for each weight of the penalty, and the curve."""
    weights = request.options.sparsity_weights or ()
    settings = run_settings(subjects.model, subjects.target, subjects.corpus, request.config)
    folder = Path(out or default_folder(subjects.model, settings, list(weights)))
    say(f"path    {folder}")
    if on_folder is not None:
        on_folder(folder)
    warn_of(_checked(request, subjects))
    path = sparsity_path(
        subjects.model, subjects.target, subjects.corpus, request.config, weights, run_dir=folder,
        rebuild=subjects.inputs, callbacks=callbacks, check_memory=request.options.check_memory,
    )  # fmt: skip
    say(f"\n{path}\n\nfiles in {folder}/: {', '.join(sorted(file.name for file in folder.glob('[!.]*')))}")
    return path


# --- the n-gram ladder ---


def ladder(
    model: Model | str | Path = "reference",
    corpus: Any = "reference",
    *,
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
    tell: Callable[[str], None] | None = None,
    on_folder: Callable[[Path], None] | None = None,
    **options: Any,
) -> Ladder:
    """Find masks for unigram, bigram, trigram and induction, and write the ladder's page.

    This is what `bigram-circuits ladder` does; `find_ladder` says what is found. The same call goes on where it was
    interrupted.

    Args:
        model: As for `study`.
        corpus: As for `study`.
        out: The folder of the ladder; by default one under `runs/`, named after model and settings.
        device: Device to load the model to; by default as `load_model`.
        callbacks: As for `find_subnetwork`.
        tell: Called with lines of text that report progress and results, for example `print`.
        on_folder: Called with the folder, once it is known.
        **options: As for `study`, except those in `NOT_FOR_LADDER`.

    Raises:
        ValueError: If an option does not exist or has a value that is not allowed, or model and text do not fit.
        OSError: If something cannot be loaded, or the folder cannot be written.
        MemoryError: If learning cannot fit the device.
    """
    wrong = next((name for name in options if name in NOT_FOR_LADDER), None)
    if wrong is not None:
        raise ValueError(f"a ladder has no option {wrong!r}: it has targets of its own, and their sizes are not fixed")
    given = {"corpus": str(corpus)} if isinstance(corpus, str | Path) else {}
    given |= {"model": full_name(model)} if isinstance(model, str | Path) else {}
    request, say = Request.of(**given, **options), tell or (lambda line: None)
    loaded = load_named(request.inputs, device) if isinstance(model, str | Path) else model
    with in_use(loaded, "ladder"):  # nobody edits its weights meanwhile
        text = corpus if isinstance(corpus, Corpus) else corpus_of(request.inputs, corpus, loaded)
        settings = run_settings(loaded, NextTokenTarget(), text, request.config)
        folder = Path(out or default_folder(loaded, settings, "ladder"))
        say(f"model   {loaded.cfg.model_name}: {loaded.cfg.n_layers} blocks, d_model {loaded.cfg.d_model}")
        say(f"text    {text!r}")
        say(f"ladder  {folder}")
        if on_folder is not None:
            on_folder(folder)
        bigram = request.inputs.kind_of_target.make(loaded, text, 2)
        warn_of(_checked(request, Subjects(loaded, text, bigram, None)))
        found = find_ladder(
            loaded, text, request.config, run_dir=folder, callbacks=callbacks, check_memory=request.options.check_memory
        )
    page = write_ladder(found, folder / "ladder.html")
    say(f"\n{found}\n\nthe page to look at: {page}")
    return found


# --- circuits, chosen in several ways ---


def curves(
    model: Model | str | Path = "reference",
    corpus: Any = "reference",
    *,
    target: Any = "ngram",
    sizes: Sequence[float | int] = SIZES,
    methods: Sequence[str] = METHODS,
    draws: int = 5,
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
    tell: Callable[[str], None] | None = None,
    on_folder: Callable[[Path], None] | None = None,
    **options: Any,
) -> FaithfulnessCurves:
    """Choose circuits of several sizes in several ways, measure how faithful they are, and write their page.

    This is what `bigram-circuits curves` does; `faithfulness_curves` says what is measured. The same call goes on where
    it was interrupted: circuits that were learned are not learned again.

    Args:
        model: As for `study`.
        corpus: As for `study`.
        target: As for `study`.
        sizes: As for `faithfulness_curves`.
        methods: As for `faithfulness_curves`.
        draws: Number of random draws.
        out: The folder of circuits and page; by default one under `runs/`, named after model and settings.
        device: Device to load the model to; by default as `load_model`.
        callbacks: As for `find_circuit`.
        tell: Called with lines of text that report progress and results, for example `print`.
        on_folder: Called with the folder, once it is known.
        **options: As for `study`, except those in `NOT_FOR_CURVES`; `units` are heads and neurons by default.

    Raises:
        ValueError: As `faithfulness_curves`; if an option does not exist or has a value that is not allowed, or the
            full model is not shown to do the task.
        OSError: If something cannot be loaded, or the folder cannot be written.
        MemoryError: If learning cannot fit the device.
    """
    wrong = next((name for name in options if name in NOT_FOR_CURVES), None)
    if wrong is not None:
        raise ValueError(f"curves have no option {wrong!r}: they have sizes and measures of their own")
    check_choices(methods, sizes, draws)
    options = {"units": ("head", "neuron"), "target_fraction": sizes[0]} | options
    request, subjects = _requested(model, corpus, target, device, options)
    say = tell or (lambda line: None)
    with in_use(subjects.model, "curves"):  # nobody edits its weights meanwhile
        settings = run_settings(
            subjects.model, target_of(subjects.target, subjects.model), subjects.corpus, request.config
        )
        folder = Path(out or default_folder(subjects.model, settings, "curves", list(sizes), list(methods), draws))
        cfg = subjects.model.cfg
        say(f"model   {cfg.model_name}: {cfg.n_layers} blocks, d_model {cfg.d_model}, {cfg.device}")
        say(f"text    {subjects.corpus!r}")
        say(f"target  {subjects.target!r}")
        say(f"curves  {folder}")
        if on_folder is not None:
            on_folder(folder)
        warn_of(_checked(request, subjects))
        with lock_folder(folder):
            found = faithfulness_curves(
                subjects.model, subjects.target, subjects.corpus, request.config, sizes=sizes, methods=methods,
                seeds=draws, run_dir=folder, callbacks=callbacks, check_memory=request.options.check_memory,
            )  # fmt: skip
            page = write_curves(found, folder / "curves.html")
    say(f"\n{found}\n\nthe page to look at: {page}")
    return found


# --- a paper's numbers again ---

REPRODUCE_RECIPES: Mapping[str, str] = {"ours": "default", "paper": "paper"}
"""The recipes of `reproduce`, as those of `study`."""
RELEASED = "released"
"""The row that is measured only if it is asked for."""


def reproduce(
    paper: str = "chang-bergen-2025",
    models: Sequence[Model | str | Path] | None = None,
    corpus: Any = "reference",
    *,
    rows: Sequence[str] | None = None,
    released: bool = False,
    recipe: str = "ours",
    sparsity_weights: Sequence[float | int] | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    tell: Callable[[str], None] | None = None,
    on_folder: Callable[[Path], None] | None = None,
    **options: Any,
) -> Reproduction:
    """Measure a paper's numbers again, and put theirs, ours and the difference side by side.

    This is what `bigram-circuits reproduce` does. What each row measures is said in `experiments/reproduction.py`.
    Every number is written to the folder when it is measured, and every subnetwork has a run's folder in it: the same
    call goes on where it was interrupted, and adds models and rows.

    Args:
        paper: Name of the paper, one of `paper.PAPERS`.
        models: The paper's names, hub ids, folders, `NAME=FOLDER` for a folder that holds a model of the paper, or
            models from `load_model`; by default all models of the paper. Theirs is empty for models that are not the
            paper's.
        corpus: As for `study`. The paper used other text, and r depends on it.
        rows: Names of rows, of `paper.ROWS`; by default all but `released`.
        released: Also measure the masks that the paper's authors released.
        recipe: `"ours"`, or `"paper"` (`SparsifyConfig.paper()`), which takes hours for each subnetwork.
        sparsity_weights: The sweep of lambda, by default the paper's; 0 is always among them.
        out: The folder; by default one under `runs/`, named after paper and settings.
        device: Device to load models to; by default as `load_model`.
        tell: Called with lines of text that report progress and results, for example `print`.
        on_folder: Called with the folder, once it is known.
        **options: As for `study`: those of `SparsifyConfig`, except `sparsity_weight` and `target_fraction`; `effort`,
            `dtype`, `context_length`, `max_tokens`, `text_column`, `held_out`, `bos`, `unchecked`, `check_memory`.

    Returns:
        All numbers in the folder. The models that could not be loaded from the hub in this call, and the rows that a
        model does not support, are named with the reason.

    Raises:
        ValueError: If paper, model, row or option does not exist, or the folder holds something else.
        FileNotFoundError: If a model folder does not exist.
        OSError: If the text cannot be read, or the folder cannot be written.
        MemoryError: If learning cannot fit the device.

    Example:
        >>> again = bc.reproduce(models=["EleutherAI/pythia-70m"], corpus="texts/", out="runs/chang-bergen-2025")
        >>> print(again.to_markdown())
    """
    of = PAPERS[_known("paper", paper, PAPERS)]
    chosen = [_known("row", row, ROWS) for row in (rows if rows is not None else set(ROWS) - {RELEASED})]
    chosen = [row for row in ROWS if row in chosen or (row == RELEASED and released)]
    asked = _asked_models(of, models)
    start = REPRODUCE_RECIPES[_known("recipe", recipe, REPRODUCE_RECIPES)]
    wrong = next((name for name in options if name in NOT_FOR_REPRODUCE), None)
    if wrong is not None:
        raise ValueError(f"reproduce has no option {wrong!r}: the paper sets it, or it is given in another form")
    sweep = of.sparsity_weights if sparsity_weights is None else sparsity_weights
    weights = tuple(sorted({0.0, *map(float, sweep)}))
    named = {"corpus": str(corpus)} if isinstance(corpus, str | Path) else {}
    request = Request.of(recipe=start, sparsity_weights=weights, **named, **options)
    say = tell or (lambda line: None)

    wanted = Reproduction(of.name, request.config, weights)
    folder = Path(out or _reproduction_folder(wanted, request.inputs, corpus))
    start_reproduction(folder, wanted)
    say(f"folder  {folder}")
    if on_folder is not None:
        on_folder(folder)
    with lock_folder(folder):
        result = replace(load_reproduction(folder), unreachable={})  # again: another process may have gone on meanwhile
        for name, source in asked:
            try:
                model = _load_asked(request.inputs, source, device)
            except OSError as error:
                reason = " ".join(str(error).split())
                result = replace(result, unreachable={**result.unreachable, name: reason})
                say(f"{name}: could not be loaded: {reason}")
                continue
            result = _reproduce(request, result, name, model, corpus, folder, chosen, say)
            del model
        result.save(folder)
    if not result.is_empty:
        say(f"\n{result}\n\nthe table as Markdown: {folder / 'reproduction.md'}")
    return result


def _reproduce(
    request: Request,
    result: Reproduction,
    name: str,
    model: Any,
    corpus: Any,
    folder: Path,
    rows: Sequence[str],
    say: Callable[[str], None],
) -> Reproduction:
    """Measure the rows of a model that was loaded."""
    with in_use(model, "reproduce"):  # nobody edits its weights meanwhile
        text = corpus if isinstance(corpus, Corpus) else corpus_of(request.inputs, corpus, model)
        target = request.inputs.kind_of_target.make(model, text, 2)
        say(f"model   {name}: {model.cfg.n_layers} blocks, d_model {model.cfg.d_model}, {model.cfg.device}")
        say(f"text    {text!r}")
        warn_of(_checked(request, Subjects(model, text, target, None)))
        return reproduce_model(
            model, target, text, result, name, folder, rows=rows, check_memory=request.options.check_memory, tell=say
        )


def _load_asked(inputs: Inputs, source: Any, device: str | None) -> Model:
    """Load a model, or take the one that was given; raises OSError if that cannot be done."""
    if source is None:
        raise OSError("it has no name on the hub that is known here: give NAME=FOLDER")
    return load_named(replace(inputs, model=source), device) if isinstance(source, str) else source


def _asked_models(paper: Paper, models: Sequence[Model | str | Path] | None) -> list[tuple[str, Any]]:
    """Each model that is asked for: its name in the result, and the model, or the name to load it by if it has one."""
    if models is None:
        models = [one.name for one in paper.models]
    if isinstance(models, str | Path):
        models = [models]
    if not len(models):
        raise ValueError("no model is named")
    return [_asked_model(paper, one) for one in models]


def _asked_model(paper: Paper, given: Model | str | Path) -> tuple[str, Any]:
    if not isinstance(given, str | Path):
        name = str(given.cfg.model_name)
        known = paper.model_named(name)
        return (known.name if known else name), given
    name, source = None, str(given)
    if isinstance(given, str) and "=" in given and not Path(given).expanduser().exists():
        name, _, source = given.partition("=")
        if paper.model_named(name) is None:
            raise ValueError(_no_such("model of the paper", name, [one.name for one in paper.models]))
    if (isinstance(given, Path) or is_local(source)) and not Path(source).expanduser().is_dir():
        raise FileNotFoundError(f"there is no model folder {source!r}")
    known = paper.model_named(source if name is None else name)
    if name is None and known is not None and not is_local(source):
        return known.name, (known.hub[0] if known.hub else None)
    return (known.name if known else full_name(source)), full_name(source)


def _known(kind: str, name: str, known: Iterable[str]) -> str:
    if name not in (there := list(known)):
        raise ValueError(_no_such(kind, name, there))
    return name


def _no_such(kind: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=3)
    return f"there is no {kind} {name!r}: " + (
        f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
    )


def _reproduction_folder(wanted: Reproduction, inputs: Inputs, corpus: Any) -> Path:
    """The default folder for these settings: the same call always goes on with the same result."""
    source = corpus.fingerprint if isinstance(corpus, Corpus) else inputs.to_json()
    text = json.dumps([wanted.to_json(), source], sort_keys=True)
    return runs_folder() / f"{wanted.paper}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


# --- reopening a finished run ---


def reopen(
    folder: str | os.PathLike[str],
    device: str | None = None,
    *,
    model: str | None = None,
    corpus: str | None = None,
    task: str | None = None,
    index: str | None = None,
    another_text: bool = False,
) -> tuple[Run, Subjects]:
    """Load a finished run, and rebuild its model, text and target from their names.

    The subnetwork is checked against the model's weights, and the text against that of the run.

    Args:
        folder: The run's folder.
        device: Device to load the model to; by default as `load_model`.
        model: Where its model is to be read from instead.
        corpus: Where its text is to be read from instead.
        task: Where its task is to be read from instead.
        index: Where the index is that its target is looked up in.
        another_text: Whether the text may be another one than that of the run.

    Raises:
        ValueError: If the run was made from objects, names what may not be opened (`inputs_of`), its subnetwork belongs
            to other weights than the model's, or the text is another one.
        OSError: If something cannot be loaded.
    """
    run = load_run(folder)
    subjects = Subjects.load(inputs_of(run, model=model, corpus=corpus, task=task, index=index), device)
    if not another_text:
        check_text(run, subjects.corpus)
        check_target(run, target_of(subjects.target, subjects.model))
    check_model(run, subjects.model)
    return replace(run, mask=with_pairs(run.mask, subjects.target)), subjects


def inputs_of(
    run: Run,
    *,
    model: str | None = None,
    corpus: str | None = None,
    task: str | None = None,
    index: str | None = None,
    only_model: bool = False,
) -> Inputs:
    """The names of a run's model and text, or task; those that are given replace them.

    Whatever name a run contains that was made elsewhere, it is not opened unless it is given again: it may be any file
    of this machine. Only what comes with the package is.

    Raises:
        ValueError: If the run was made from objects, or a name must be given again; the message says how.
        FileNotFoundError: If a file or folder that it was made with is no longer there.
    """
    given = {"model": model} if only_model else {"model": model, "corpus": corpus, "task": task, "index": index}
    if run.rebuild is None:
        return _named_now(run, {name: value for name, value in given.items() if name not in ("task", "index")})
    recorded = {name: getattr(run.rebuild, name) for name in given}
    if model is None and is_in_memory(recorded["model"]):
        raise ValueError(
            f"the model of the run in {str(run.path)!r} was an object in memory: say with --model M where to read it "
            f"from, or go on in Python"
        )
    unsaid = [name for name, value in given.items() if value is None and recorded[name] not in ("reference", None)]
    if unsaid and not run.made_here:
        again = " ".join(f"--{name} {shlex.quote(recorded[name])}" for name in unsaid)
        raise ValueError(
            f"the run in {str(run.path)!r} was not made by you on this machine, so the names in it are not opened: "
            f"if you want them to be, add {again}"
        )
    gone = [name for name in unsaid if os.path.isabs(recorded[name]) and not os.path.exists(recorded[name])]
    if gone:
        what = " and ".join(f"the {name} {recorded[name]!r}" for name in gone)
        raise FileNotFoundError(
            f"the run in {str(run.path)!r} was made with {what}, which {'is' if len(gone) == 1 else 'are'} no longer "
            f"there: say with {_options(gone)} where to read {'it' if len(gone) == 1 else 'them'} from"
        )
    inputs = replace(run.rebuild, **{name: value for name, value in given.items() if value is not None})
    return inputs if inputs.model == run.rebuild.model else replace(inputs, revision=None)


def _options(names: Sequence[str]) -> str:
    """The options that name these inputs of a run."""
    values = {"model": "M", "corpus": "SOURCE", "task": "FILE", "index": "INDEX"}
    return " and ".join(f"--{name} {values[name]}" for name in names)


def _named_now(run: Run, given: Mapping[str, str | None]) -> Inputs:
    """The names of a run that was made in Python from objects: as far as they are given."""
    settings, where = run.settings, f"the run in {str(run.path)!r} was made in Python from objects"
    target = name_of_target(settings.target.kind)
    if target is None and "corpus" in given:
        raise ValueError(
            f"{where}, with the target {settings.target.kind}, which has no name: go on in Python, for example with "
            f"evaluate(model, load_run({str(run.path)!r}), target, corpus.held_out)"
        )
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{where}, which have no names: say with {_options(missing)} where to read them from")
    names: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    dtype = str(settings.model.dtype).removeprefix("torch.")
    return Inputs(
        **names,
        dtype=dtype if dtype in DTYPES else Inputs.dtype,
        context_length=settings.corpus.context_length,
        target=target or Inputs.target,
    )


def check_target(run: Run, target: Target) -> None:
    """Raise ValueError unless a target is that of the run."""
    then = run.settings.target
    if then.kind is not None and (then.kind != target.kind or not same_text(then.fingerprint, target.fingerprint)):
        raise ValueError(
            f"the target that the run in {str(run.path)!r} was made with cannot be made again from its names (it would "
            f"be {target.kind} {target.fingerprint}, then {then.kind} {then.fingerprint}): go on in Python, for "
            f"example with evaluate(model, load_run({str(run.path)!r}), target, corpus.held_out)"
        )


def check_text(run: Run, corpus: Corpus) -> None:
    """Raise ValueError unless a text is that of the run: numbers of another one are not the run's."""
    then, now = run.settings.corpus.fingerprint, corpus.fingerprint
    if then != now:
        raise ValueError(
            f"the text {corpus.source!r} is not the one that the run in {str(run.path)!r} was made with (fingerprint "
            f"{now}, then {then}): give the text it was made with (--corpus), or write what is measured on this one to "
            "another folder (--out)"
        )


def check_model(run: Run, model: Model) -> None:
    """Raise ValueError unless `model` is the one that a run was made with, and its subnetwork fits."""
    with in_use(model, "check_model"):  # its hash is computed once
        settings = run.settings.model
        check_is(model, settings.weight_hash, f"the run in {str(run.path)!r} was made with {settings.name!r}")
        run.mask.check_fits(model)
