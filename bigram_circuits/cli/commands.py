"""What each command does. Its result is a mapping, which `--json` prints; `docs/command-line.md` says what is in it.

Heavy modules are imported when a command needs them.
"""

from __future__ import annotations

import argparse
import errno
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigram_circuits.cli.output import FailedError, is_first, tell
from bigram_circuits.recipe import NOT_FOR_CURVES, NOT_FOR_LADDER, NOT_FOR_REPRODUCE, PARTS, Request, options_of

Result = Mapping[str, Any]
"""What a command computed: values that can be written as JSON (`output.to_json`), among them paths."""


def find(arguments: argparse.Namespace) -> Result:
    """Find a subnetwork or a circuit."""
    given = _given(arguments)
    try:
        Request.of(**given)
    except ValueError as error:  # reported before anything heavy is loaded
        raise FailedError(str(error), 2) from error
    from bigram_circuits.experiments.sparsity_path import load_path_runs
    from bigram_circuits.runs import Run
    from bigram_circuits.workflow import study

    folders: list[Path] = []
    found = study(
        **given,
        out=arguments.out,
        device=arguments.device,
        fresh=arguments.fresh,
        sharded=arguments.sharded,
        tell=tell,
        on_folder=folders.append,
    )
    if not is_first():  # of several processes, one evaluates
        return {}
    if isinstance(found, Run):
        return _of_run(found)
    (folder,) = folders
    return {"folder": folder, "runs": [run.path for run in load_path_runs(folder)], "path": found}


def _of_run(run: Any) -> Result:
    """The result of a run: what is in its folder."""
    from bigram_circuits.experiments.falsification import load_falsification
    from bigram_circuits.experiments.seeds import load_seeds

    parts: dict[str, Any] = {}
    if (tried := load_falsification(run.path / "falsify", run)) is not None:
        parts["falsification"] = {"verdict": tried.verdict, "refuted": tried.refuted, "says": tried.says}
    if (seeds := load_seeds(run.path, run)) is not None:
        parts["seeds"] = {"representative": seeds.representative, "runs": seeds.runs, "spread": seeds.spread}
    return {
        "folder": run.path,
        "page": run.path / "report.html",
        "mask": _of_mask(run.mask, run.path / f"{run.mask.noun}.safetensors"),
        "outcome": run.outcome,
        "cautions": run.cautions,
        "metrics": run.metrics,
        **_of_analyses(run),
        **parts,
    }


def _of_mask(mask: Any, file: Path) -> Result:
    return {"kind": mask.noun, "kept": mask.kept, "total": mask.total, "fraction": mask.fraction, "file": file}


def _of_analyses(run: Any) -> Result:
    files = sorted((run.path / "analysis").glob("*.json"))
    return {
        "analyses": {file.stem: file for file in files if file.stem != "left_out"},
        "left_out": run.left_out,
    }


def curves(arguments: argparse.Namespace) -> Result:
    """Compare circuits of several sizes, chosen in several ways."""
    given = _given(arguments, NOT_FOR_CURVES)
    own = {name: value for name in ("sizes", "methods", "draws") if (value := getattr(arguments, name)) is not None}
    from bigram_circuits.workflow import curves

    folders: list[Path] = []
    found = curves(**given, **own, out=arguments.out, device=arguments.device, tell=tell, on_folder=folders.append)
    (folder,) = folders
    return {
        "folder": folder, "page": folder / "curves.html", "curves": found.curves, "areas": found.areas,
        "left_out": found.left_out,
    }  # fmt: skip


def ladder(arguments: argparse.Namespace) -> Result:
    """Find the n-gram ladder."""
    given = _given(arguments, NOT_FOR_LADDER)
    from bigram_circuits.workflow import ladder

    folders: list[Path] = []
    found = ladder(**given, out=arguments.out, device=arguments.device, tell=tell, on_folder=folders.append)
    (folder,) = folders
    return {"folder": folder, "page": folder / "ladder.html", "ladder": found}


def _given(arguments: argparse.Namespace, left_out: Collection[str] = ()) -> dict[str, Any]:
    """The options of `find` that were given, to a command that has all or all but some."""
    names = [name for part in PARTS for name in options_of(part) if name not in left_out]
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def reproduce(arguments: argparse.Namespace) -> Result:
    """Measure a paper's numbers again."""
    given = _given(arguments, NOT_FOR_REPRODUCE)
    from bigram_circuits.workflow import reproduce

    folders: list[Path] = []
    result = reproduce(
        arguments.paper, arguments.models, rows=arguments.rows, released=arguments.released, recipe=arguments.recipe,
        sparsity_weights=arguments.sparsity_weights, out=arguments.out, device=arguments.device, tell=tell,
        on_folder=folders.append, **given,
    )  # fmt: skip
    if result.is_empty:
        raise FailedError("nothing could be measured")
    (folder,) = folders
    return {"folder": folder, "table": folder / "reproduction.md", "reproduction": result}


def sweep(arguments: argparse.Namespace) -> Result:
    """Make many runs."""
    from bigram_circuits.scale.folder import SweepFolder
    from bigram_circuits.scale.forecast import forecast_sweep
    from bigram_circuits.scale.results import read_sweep, write_results
    from bigram_circuits.scale.sweeps import asked_for, default_folder, merge_sweeps, sweep

    spec, out = arguments.spec, arguments.out
    if arguments.dry_run:
        forecast = forecast_sweep(spec, out=out, workers=arguments.workers, device=arguments.device)
        tell(forecast)
        return {"forecast": forecast}
    if arguments.merge is not None:
        found = merge_sweeps(out or spec, *arguments.merge, tell=tell)
    elif arguments.status:
        found = read_sweep(SweepFolder(out or (spec if spec.is_dir() else default_folder(spec, asked_for(spec)))))
        tell(found)
        if found.is_done:
            tell("\n".join(f"written: {path}" for path in write_results(found)))
    else:
        found = sweep(
            spec, out=out, launcher=arguments.launcher, workers=arguments.workers, device=arguments.device, tell=tell
        )
    result = {"folder": found.path, "table": found.path / "table.csv" if found.is_done else None, "runs": found.runs}
    if found.failed:
        raise FailedError(f"{len(found.failed):,} of {len(found.runs):,} runs failed", result=result)
    return result


@contextmanager
def _run_to_write(path: Path) -> Iterator[Any]:
    """Lock the folder of a finished run, so that only one process at a time writes results to it."""
    from bigram_circuits.runs import RunFolder, load_run

    load_run(path)  # a folder without a finished run is left alone
    folder = RunFolder(path)
    with folder.lock():
        yield folder


@contextmanager
def _reopened(arguments: argparse.Namespace, *, with_evaluation: bool) -> Iterator[tuple[Any, Any, Any]]:
    """A run, its model, text and target, and the locked folder to write to: its own, or a copy of it."""
    from bigram_circuits.runs import copy_run, load_run
    from bigram_circuits.storage.files import check_new_folder
    from bigram_circuits.workflow import reopen

    names: dict[str, Any] = {name: getattr(arguments, name) for name in ("model", "corpus", "task", "index")}
    if arguments.out is None:
        with _run_to_write(arguments.run) as folder:
            run, of = reopen(arguments.run, arguments.device, **names)
            yield run, of, folder
        return
    load_run(arguments.run)
    check_new_folder(arguments.out)
    run, of = reopen(arguments.run, arguments.device, another_text=True, **names)
    folder = copy_run(run, arguments.out, with_evaluation=with_evaluation)
    with folder.lock():
        yield run, of, folder


def evaluate(arguments: argparse.Namespace) -> Result:
    """Evaluate a finished run again."""
    from bigram_circuits.evaluation import evaluate
    from bigram_circuits.learning.training import identity_of
    from bigram_circuits.report.page import write_report

    with _reopened(arguments, with_evaluation=False) as (run, of, folder):
        seeds = arguments.random_seeds
        evaluation = evaluate(of.model, run.mask, of.target, of.corpus.held_out, seeds=seeds)
        folder.write_evaluation(evaluation, identity_of(of.corpus))
        page = write_report(folder.path)
        tell(f"{evaluation}\n\n{run.mask.table()}\n\nthe page to look at: {page}")
    return {"folder": folder.path, "page": page, "metrics": evaluation}


def analyze(arguments: argparse.Namespace) -> Result:
    """Analyse a finished run."""
    from bigram_circuits.analysis.suite import analyze
    from bigram_circuits.report.page import write_report
    from bigram_circuits.runs import load_run

    with _reopened(arguments, with_evaluation=True) as (run, of, folder):
        options = {} if arguments.tokens is None else {"tokens": arguments.tokens}
        analyses = analyze(of.model, run.mask, of.target, of.corpus, seed=arguments.seed, **options)
        analyses.save(folder.path / "analysis")
        written = [*analyses.results, *(["atlas"] if analyses.atlas else [])]
        tell(f"{analyses}\n\nfiles in {folder.path / 'analysis'}/: {', '.join(written)}")
        page = write_report(folder.path)
        tell(f"the page to look at: {page}")
        return {"folder": folder.path, "page": page, **_of_analyses(load_run(folder.path))}


def worst_case(arguments: argparse.Namespace) -> Result:
    """Let an adversary open what a run's mask drops."""
    from dataclasses import replace

    from bigram_circuits.experiments.stricter import StricterTests
    from bigram_circuits.experiments.worst_case import AGAINST, BUDGETS, worst_case_ablation, worst_case_words
    from bigram_circuits.targets.model import ModelTarget

    with _reopened(arguments, with_evaluation=True) as (run, of, folder):
        by_model = arguments.against == "model"
        target = ModelTarget(of.model) if by_model else of.target
        curves = worst_case_ablation(
            of.model, run.mask, target, of.corpus, arguments.budgets or BUDGETS, arguments.starts, seed=arguments.seed,
            force=arguments.force,
        )  # fmt: skip
        if by_model and not isinstance(of.target, ModelTarget):
            curves = replace(curves, notes={**curves.notes, AGAINST: "model"})
        tell(f"{curves.table('kl')}\n\n{worst_case_words(curves)}")
        written = _write_stricter(StricterTests(worst_case=curves), of, folder)
    return {**written, "says": worst_case_words(curves), "worst_case": curves}


def rivals(arguments: argparse.Namespace) -> Result:
    """Learn masks of a run's size with as little in common."""
    from bigram_circuits.experiments.rivals import rivals
    from bigram_circuits.experiments.stricter import RIVALS_FOLDER, StricterTests

    options = {} if arguments.overlap_weight is None else {"overlap_weight": arguments.overlap_weight}
    with _reopened(arguments, with_evaluation=True) as (run, of, folder):
        found = rivals(
            of.model, of.target, of.corpus, arguments.k, config=run.settings.recipe, first=run.mask,
            run_dir=folder.path / RIVALS_FOLDER, **options,
        )  # fmt: skip
        tell(found)
        written = _write_stricter(StricterTests(rivals=found), of, folder)
    return {
        **written, "verdict": found.verdict, "rivals": found.rivals, "measured": found.measured, "cores": found.cores
    }  # fmt: skip


def same_function(arguments: argparse.Namespace) -> Result:
    """Compare what the masks of two runs compute."""
    from bigram_circuits.experiments.same_function import same_function
    from bigram_circuits.experiments.stricter import MOST_TOKENS, StricterTests
    from bigram_circuits.learning.training import with_pairs
    from bigram_circuits.runs import load_run
    from bigram_circuits.text.corpus import spread

    other, path = load_run(arguments.other), str(arguments.other)
    mine = load_run(arguments.run)
    if other.settings.model.weight_hash != mine.settings.model.weight_hash:
        raise ValueError(
            f"the run in {path!r} is of another model ({other.settings.model.name}) than that in "
            f"{str(arguments.run)!r} ({mine.settings.model.name}): two masks of one model can be compared"
        )
    if type(other.mask) is not type(mine.mask):
        raise ValueError(
            f"the run in {path!r} found a {other.mask.noun}, that in {str(arguments.run)!r} a {mine.mask.noun}: "
            "masks of the same kind can be compared"
        )
    with _reopened(arguments, with_evaluation=True) as (run, of, folder):
        text = spread(of.corpus.held_out, arguments.tokens or MOST_TOKENS)
        found = same_function(of.model, run.mask, with_pairs(other.mask, of.target), of.target, text)
        tell(found)
        written = _write_stricter(StricterTests(same={arguments.other.resolve().name: found}), of, folder)
    tables = {"overlap": found.overlap, "behaviour": found.behaviour, "splices": found.splices}
    return {**written, "verdict": found.verdict, "says": found.says, **tables, "streams": found.streams}


def _write_stricter(found: Any, of: Any, folder: Any) -> Result:
    """Write the outcome of a stricter test into a run's folder, and its page again."""
    from bigram_circuits.experiments.stricter import FOLDER
    from bigram_circuits.learning.training import identity_of
    from bigram_circuits.report.page import write_report

    found.save(folder.path / FOLDER, folder.origin(identity_of(of.corpus)))
    page = write_report(folder.path)
    tell(f"\nfiles in {folder.path / FOLDER}/\nthe page to look at: {page}")
    return {"folder": folder.path, "page": page}


def explain(arguments: argparse.Namespace) -> Result:
    """Write the page of a prediction, or of a run's atlas."""
    from bigram_circuits.runs import load_run

    run = load_run(arguments.run)
    if arguments.prompt is None and arguments.token is None:
        return _explain_all(arguments, run)
    from bigram_circuits.analysis import explain
    from bigram_circuits.analysis.prompts import start_of_text, token_id
    from bigram_circuits.explanations.graph_files import export_graph
    from bigram_circuits.measures.html import check_no_folder
    from bigram_circuits.workflow import check_model, inputs_of, load_named

    for path in filter(None, (arguments.out, arguments.graph)):
        check_no_folder(path)  # before the other file is written
    if arguments.out == arguments.graph:
        raise ValueError(f"--out and --graph are both {str(arguments.out)!r}: name two files")
    model = load_named(inputs_of(run, model=arguments.model, only_model=True), arguments.device)
    check_model(run, model)
    answer, wrong = (None if one is None else _token(one) for one in (arguments.answer, arguments.wrong))
    prompt = arguments.prompt
    if prompt is None:
        prompt = [*start_of_text(model), token_id(model, _token(arguments.token))]
    mask = None if arguments.full else run.mask
    position = -1 if arguments.position is None else arguments.position
    found = explain(model, mask, prompt, answer, wrong=wrong, position=position)
    tell(f"{found}\n")
    if arguments.graph is not None:
        tell(f"the graph: {export_graph(found, arguments.graph)}")
    found.to_html(arguments.out)
    tell(f"the page to look at: {arguments.out}")
    return {"page": arguments.out, "graph": arguments.graph, "explanation": found}


def _explain_all(arguments: argparse.Namespace, run: Any) -> Result:
    """The page of a run's atlas."""
    given = [name for name in ("answer", "wrong", "position", "graph") if getattr(arguments, name) is not None]
    given += [name for name in ("full",) if getattr(arguments, name)]
    if given:
        raise ValueError(f"--{given[0]} is for one prompt: give --prompt or --token")
    atlas = run.atlas
    if atlas is None:
        reason = run.left_out.get("atlas")
        raise ValueError(
            f"the run in {str(run.path)!r} has no atlas ({reason}): give --prompt or --token"
            if reason
            else f"the run in {str(run.path)!r} has no atlas: give --prompt or --token, or `analyze` it first"
        )
    atlas.to_html(arguments.out)
    tell(f"{atlas.title}\nthe page to look at: {arguments.out}")
    return {"page": arguments.out, "graph": None, "atlas": run.path / "analysis" / "atlas.json"}


def _token(text: str) -> str | int:
    """A token given by its id or its text."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) > 1 else text


def report(arguments: argparse.Namespace) -> Result:
    """Write a run's page."""
    from bigram_circuits.report.page import write_report

    if arguments.out is not None:  # the run is only read
        page = write_report(arguments.run, arguments.out)
        tell(page)
        return {"page": page}
    try:
        with _run_to_write(arguments.run):
            page = write_report(arguments.run)
            tell(page)
            return {"page": page}
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OSError(error.errno, f"{error.strerror}: write the page to another place with --out FILE") from error


def compare(arguments: argparse.Namespace) -> Result:
    """Write a page that compares several runs."""
    from bigram_circuits.experiments.comparison import compare
    from bigram_circuits.report.comparison import write_comparison

    comparison = compare(arguments.runs, against=arguments.against)
    page = write_comparison(comparison, arguments.out)
    tell(f"{comparison}\n")
    if arguments.csv:
        tell(f"the table: {comparison.to_csv(arguments.csv)}")
    tell(f"the page to look at: {page}")
    return {
        "page": page,
        "csv": arguments.csv,
        "runs": comparison.to_dataframe().to_dict("records"),
        "overlaps": [
            {"first": pair.first.name, "second": pair.second.name}
            | {name: pair.get(name) for name in ("intersection", "expected", "jaccard")}
            | {"p": pair.p()}
            for pair in comparison.pairs
        ],
    }


def hooks(arguments: argparse.Namespace) -> Result:
    """List a model's activation points and weights."""
    from bigram_circuits.models.activations import activation_points
    from bigram_circuits.models.loading import load_model
    from bigram_circuits.models.weights import weight_sites

    model = load_model(
        arguments.model, revision=arguments.revision, device=arguments.device, check=not arguments.unchecked
    )
    points, sites = activation_points(model), weight_sites(model)
    tell("activation points (run_with_cache, run_with_hooks)")
    for point in points:
        axes = "not reached" if point.axes is None else " ".join(point.axes)
        shape = "" if point.shape is None else " ".join(map(str, point.shape))
        also = f"  = {', '.join(point.aliases)}" if point.aliases else ""
        tell(f"  {point.name:<36} {axes:<28} {shape:<24}{also}".rstrip())
    tell(f"\nmaskable weights ({sum(site.size for site in sites):,})")
    for site in sites:
        tell(f"  {site.name:<36} {site.axes:<28} {' '.join(map(str, site.shape))}")
    weights = [{"name": site.name, "axes": site.axes.split(), "shape": site.shape, "size": site.size} for site in sites]
    return {"points": points, "weights": weights}


def import_published(arguments: argparse.Namespace) -> Result:
    """Read masks by Hugging Face parameter name."""
    from bigram_circuits.models.loading import load_model
    from bigram_circuits.published import import_published, read_masks

    read_masks(arguments.file)  # errors in the file are reported before a model is loaded
    model = load_model(
        arguments.model, revision=arguments.revision, device=arguments.device, check=not arguments.unchecked
    )
    subnetwork = import_published(arguments.file, model)
    subnetwork.save(arguments.out)
    tell(f"{subnetwork!r}\n\n{subnetwork.table()}\n\nwritten to {arguments.out}")
    return {"mask": _of_mask(subnetwork, arguments.out)}


def export(arguments: argparse.Namespace) -> Result:
    """Write a run's masked model, or its masks."""
    from bigram_circuits.runs import load_run
    from bigram_circuits.sharing import check_is_of_weights, export_huggingface, export_masks
    from bigram_circuits.storage.files import check_new_folder
    from bigram_circuits.workflow import check_model, inputs_of, load_named

    run = load_run(arguments.run)
    inputs = inputs_of(run, model=arguments.model, only_model=True)
    check_is_of_weights(run.mask)
    masks_alone = arguments.out.suffix in (".npz", ".safetensors")
    if not masks_alone:
        check_new_folder(arguments.out)
    model = load_named(inputs, arguments.device)
    check_model(run, model)
    (export_masks if masks_alone else export_huggingface)(model, run.mask, arguments.out)
    tell(f"{run.mask!r}\nwritten to {arguments.out}")
    return {"mask": _of_mask(run.mask, arguments.out)}


def checkpoints(arguments: argparse.Namespace) -> Result:
    """List a model's training checkpoints."""
    from bigram_circuits.models.loading import checkpoints

    names = checkpoints(arguments.model)
    tell("\n".join(names))
    return {"checkpoints": names}


def completion(arguments: argparse.Namespace) -> Result:
    """Print the completion script of a shell."""
    from bigram_circuits.cli.completion import script

    written = script(arguments.program, arguments.commands, arguments.shell)
    tell(written)
    return {"shell": arguments.shell, "script": written}
