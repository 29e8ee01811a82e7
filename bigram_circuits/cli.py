"""The command line: parsing and wiring only. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METHODS = ("continuous_sparsification", "hard_concrete", "straight_through")

_EPILOG = """examples:
  bigram-circuits find                                    the bigram subnetwork of the reference model
  bigram-circuits find EleutherAI/pythia-70m --corpus wikitext:wikitext-2-raw-v1
  bigram-circuits find ./my_model --corpus texts/ --sparsity-weight 5 --out runs/mine
  bigram-circuits find --falsify                          and try to refute what was found
  bigram-circuits evaluate runs/mine
  bigram-circuits analyze runs/mine
  bigram-circuits report runs/mine
  bigram-circuits compare runs/mine runs/other
  bigram-circuits hooks reference
  bigram-circuits import-published subnetwork_dict_lambda1e1.pickle --model EleutherAI/pythia-70m --out mask.safetensors
  bigram-circuits export runs/mine --out my_masked_model
  bigram-circuits checkpoints EleutherAI/pythia-70m"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 the work failed or was interrupted, 2 the arguments are wrong."""
    arguments = _parser().parse_args(argv)
    try:
        with _terminated_like_ctrl_c():
            return arguments.command(arguments)
    except KeyboardInterrupt as stop:
        return _say(str(stop) or "interrupted; what the run had written stays, and the same command goes on", 1)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = _one_line(error)
        if isinstance(error, MemoryError | RuntimeError):
            from bigram_circuits.learning.training import LESS_MEMORY, is_out_of_memory

            if not is_out_of_memory(error):
                raise
            line = line if LESS_MEMORY in line else f"out of memory: {LESS_MEMORY} ({line[:200]})"
        if arguments.traceback:
            raise
        return _say(f"error: {line}", 1)


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Within the block, SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("terminated; what the run had written stays, and the same command goes on")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str, code: int) -> int:
    print(f"bigram-circuits: {line}", file=sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    from bigram_circuits import __version__

    parser = argparse.ArgumentParser(
        prog="bigram-circuits",
        description="Find and understand subnetworks of transformer language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    shared.add_argument("--traceback", action="store_true", help="show where an error arose")

    find = commands.add_parser(
        "find", parents=[shared], help="find a subnetwork, evaluate and analyse it, save the run"
    )
    find.set_defaults(command=_find)
    find.add_argument(
        "model", nargs="?", default="reference", help="'reference', a hub id, or a folder (default: reference)"
    )
    find.add_argument("--revision", metavar="R", help="revision of a hub model, for example step1000")
    find.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the model's weights"
    )
    find.add_argument(
        "--corpus", default="reference", metavar="SOURCE", help="'reference', a file or folder of text, or a dataset"
    )
    find.add_argument("--context-length", type=_whole(2), metavar="N", help="tokens in a sequence (default: 128)")
    find.add_argument("--max-tokens", type=_whole(1), metavar="N", help="read at most so much of the corpus")
    find.add_argument(
        "--order", type=int, choices=(1, 2, 3), default=2, help="of the n-gram target (default: 2, bigrams)"
    )
    find.add_argument(
        "--target",
        choices=("ngram", "model", "next-token", "induced"),
        default="ngram",
        help="the n-gram table, the full model's own distribution, the next token, or the model's induced bigram",
    )
    size = find.add_mutually_exclusive_group()
    size.add_argument("--sparsity-weights", type=_numbers, metavar="X,Y,..", help="nested subnetworks, and one curve")
    size.add_argument("--sparsity-weight", type=_number(0.0), metavar="X", help="penalty on kept weights (default: 10)")
    size.add_argument(
        "--target-fraction", type=_number(0.0), metavar="X", help="keep exactly this share of the weights"
    )
    find.add_argument("--method", choices=METHODS, help="how masks are learned (default: continuous_sparsification)")
    find.add_argument(
        "--granularity", type=_granularity, metavar="G", help="weight, neuron, head, block; or attn=head,mlp=weight"
    )
    find.add_argument("--layers", type=_layers, metavar="I,J,..", help="mask only these layers")
    find.add_argument("--recipe", choices=("default", "paper"), default="default", help="ours, or the published one")
    find.add_argument("--steps", type=_whole(1), metavar="N", help="at most so many training steps")
    find.add_argument("--batch-size", type=_whole(1), metavar="N", help="sequences in a step")
    find.add_argument("--learning-rate", type=_number(0.0), metavar="X", help="of the masks' scores")
    find.add_argument("--low-memory", action="store_true", help="take less memory, and more time")
    find.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the data order (default: 0)")
    find.add_argument(
        "--random-seeds", type=_whole(1), default=3, metavar="N", help="matched random controls (default: 3)"
    )
    find.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the run's folder (default: one under runs/, by settings)"
    )
    find.add_argument("--no-analysis", action="store_true", help="stop when the subnetwork is evaluated")
    find.add_argument(
        "--falsify", action="store_true",
        help="also try to refute it: untrained blocks, a nonsense target, 3 other seeds (5 times the learning)",
    )  # fmt: skip
    find.add_argument("--fresh", action="store_true", help="start over if this run was begun or finished before")

    evaluate = commands.add_parser("evaluate", parents=[shared], help="evaluate a finished run again")
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument("run", type=Path, help="the run's folder")
    evaluate.add_argument(
        "--random-seeds", type=_whole(1), default=3, metavar="N", help="matched random controls (default: 3)"
    )

    analyze = commands.add_parser(
        "analyze", parents=[shared], help="look inside a finished run: lenses, geometry, ablations, where it is"
    )
    analyze.set_defaults(command=_analyze)
    analyze.add_argument("run", type=Path, help="the run's folder")
    analyze.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the random controls (default: 0)")
    analyze.add_argument("--tokens", type=_whole(1), metavar="N", help="measure layers on so many (default: 20480)")

    report = commands.add_parser("report", parents=[shared], help="write a finished run's page, report.html")
    report.set_defaults(command=_report)
    report.add_argument("run", type=Path, help="the run's folder")

    compare = commands.add_parser(
        "compare", parents=[shared], help="write the page that sets several runs or subnetworks of a model side by side"
    )
    compare.set_defaults(command=_compare)
    compare.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run's folder, a path's, or a subnetwork's file; two or more",
    )
    compare.add_argument(
        "--out", type=Path, default="comparison.html", metavar="FILE", help="the page (default: comparison.html)"
    )

    hooks = commands.add_parser("hooks", parents=[shared], help="list a model's activation points and maskable weights")
    hooks.set_defaults(command=_hooks)
    hooks.add_argument("model", nargs="?", default="reference", help="'reference', a hub id, or a folder")
    hooks.add_argument("--revision", metavar="R", help="revision of a hub model")

    _add_exchange(commands, shared)
    return parser


def _add_exchange(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The commands that take masks from elsewhere or give them away."""
    imported = commands.add_parser(
        "import-published", parents=[shared], help="read masks by Hugging Face name, as the paper's are published"
    )
    imported.set_defaults(command=_import_published)
    imported.add_argument("file", type=Path, help="a released .pickle, or .npz or .safetensors with the same names")
    imported.add_argument("--model", required=True, help="'reference', a hub id, or a folder")
    imported.add_argument("--revision", metavar="R", help="revision of a hub model")
    imported.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the subnetwork")

    export = commands.add_parser("export", parents=[shared], help="write a run's masked model as a Hugging Face folder")
    export.set_defaults(command=_export)
    export.add_argument("run", type=Path, help="the run's folder")
    export.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER",
        help="a new folder for the model; or a name ending in .npz or .safetensors, for the masks alone",
    )  # fmt: skip

    checkpoints = commands.add_parser("checkpoints", parents=[shared], help="list a model's training checkpoints")
    checkpoints.set_defaults(command=_checkpoints)
    checkpoints.add_argument("model", help="a hub id such as EleutherAI/pythia-70m, or a family such as pythia")


# --- find ---


def _find(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    config = _config(arguments)
    from bigram_circuits.analysis.suite import analyze
    from bigram_circuits.evaluation import evaluate
    from bigram_circuits.experiments.falsification import falsify
    from bigram_circuits.learning.training import find_subnetwork, forecast_memory, run_settings
    from bigram_circuits.models.loading import load_model
    from bigram_circuits.report.page import write_report
    from bigram_circuits.runs import STOPS, RunFolder
    from bigram_circuits.text.corpus import load_corpus

    model = load_model(arguments.model, revision=arguments.revision, device=arguments.device, dtype=arguments.dtype)
    corpus = load_corpus(
        arguments.corpus,
        tokenizer=model.tokenizer,
        context_length=arguments.context_length,
        max_tokens=arguments.max_tokens,
    )
    target = _target(arguments.target, arguments.order, model, corpus)
    settings = run_settings(model, target, corpus, config)
    out = arguments.out or _default_folder(arguments.model, settings)
    rebuild = {
        "model": {"name": arguments.model, "revision": arguments.revision, "dtype": arguments.dtype},
        "corpus": {
            "source": arguments.corpus,
            "context_length": arguments.context_length,
            "max_tokens": arguments.max_tokens,
        },
        "target": arguments.target,
        "order": arguments.order,
    }
    if arguments.sparsity_weights:
        return _find_path(arguments, model, corpus, target, config, rebuild)
    folder = RunFolder.open(out, settings, resume=not arguments.fresh, rebuild=rebuild)
    print(f"model   {arguments.model}: {model.cfg.n_layers} blocks, d_model {model.cfg.d_model}, {model.cfg.device}")
    print(f"text    {corpus!r}")
    print(f"target  {target!r}")
    print(f"run     {out}{' (found before; --fresh starts over)' if folder.is_finished else ''}", flush=True)
    if not folder.is_finished:
        print(f"memory  {forecast_memory(model, target, corpus, config)}", flush=True)
    with folder.lock():
        found = find_subnetwork(model, target, corpus, config, run_dir=out)
        try:
            evaluation = evaluate(model, found.subnetwork, target, corpus.held_out, seeds=arguments.random_seeds)
            folder.write_metrics(evaluation.to_json())
            print(f"\n{evaluation}\n\n{_where(found.subnetwork)}\n", flush=True)
            if not arguments.no_analysis:
                analyses = analyze(model, found.subnetwork, target, corpus)
                analyses.save(out / "analysis")
                print(f"{analyses}\n")
            if arguments.falsify:
                print(f"{falsify(model, target, corpus, config, found=found.subnetwork, run_dir=out / 'falsify')}\n")
            report = write_report(out)
        except KeyboardInterrupt:
            kept = f"the subnetwork is kept in {str(out)!r}, and the same command goes on"
            raise KeyboardInterrupt(f"interrupted while evaluating or analysing; {kept}") from None
    print(
        f"learned in {found.seconds:.0f} s and {len(found.history)} steps; stopped because "
        f"{STOPS[found.stopped_because]}"
    )
    if found.rollbacks:
        print(
            f"the loss exploded {len(found.rollbacks)} times, and the run went back each time (training.json); "
            f"learning rate at the end {found.rollbacks[-1]['learning_rate']:g}"
        )
    if found.gap:
        print(
            f"on the last batch: cross-entropy {found.gap.soft:.3f} nats with soft gates, {found.gap.hard:.3f} with "
            "the mask"
        )
        if found.gap.warning:
            print(f"WARNING: {found.gap.warning}")
    print(f"{time.monotonic() - started:.0f} s in all; files in {out}/: {', '.join(folder.files())}")
    print(f"the page to look at: {report}")
    return 0


def _config(arguments: argparse.Namespace) -> Any:
    """The recipe; a value it refuses is a wrong argument."""
    from bigram_circuits.learning.training import SparsifyConfig

    changes: dict[str, Any] = {"seed": arguments.seed}
    options = {
        "sparsity_weight": arguments.sparsity_weight,
        "target_fraction": arguments.target_fraction,
        "max_steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "method": arguments.method,
        "granularity": arguments.granularity,
        "layers": arguments.layers,
        "low_memory": arguments.low_memory or None,
    }
    changes |= {name: value for name, value in options.items() if value is not None}
    try:
        return SparsifyConfig.paper(**changes) if arguments.recipe == "paper" else SparsifyConfig(**changes)
    except ValueError as error:
        raise SystemExit(_say(f"error: {error}", 2)) from error


def _default_folder(model: str, settings: Any) -> Path:
    """One folder for one set of settings, so that the same command continues the same run."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-.") or "model"
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    return Path("runs") / f"{name}-{digest}"


def _where(subnetwork: Any) -> str:
    """Where the kept weights are, by layer and component: share of all kept weights, and of the component's own."""
    counts = subnetwork.by_component()
    components = sorted({component for _, component in counts})
    lines = ["where the kept weights are (share of them; in brackets, share of the component that is kept)"]
    lines.append(f"{'layer':<8}" + "".join(f"{component:>20}" for component in components))
    for layer in sorted({layer for layer, _ in counts}):
        cells = [
            f"{100 * counts[layer, c].kept / max(subnetwork.kept, 1):.1f}% ({100 * counts[layer, c].fraction:.2f}%)"
            for c in components
        ]
        lines.append(f"{layer:<8}" + "".join(f"{cell:>20}" for cell in cells))
    totals = [sum(n.kept for (_, c), n in counts.items() if c == component) for component in components]
    shares = [f"{100 * total / max(subnetwork.kept, 1):.1f}%" for total in totals]
    lines.append(f"{'all':<8}" + "".join(f"{share:>20}" for share in shares))
    return "\n".join(lines)


def _find_path(
    arguments: argparse.Namespace, model: Any, corpus: Any, target: Any, config: Any, rebuild: dict[str, Any]
) -> int:
    """`find --sparsity-weights`: a folder with a run for each, and the curve."""
    from bigram_circuits.experiments.sparsity_path import find_path
    from bigram_circuits.learning.training import run_settings

    settings = run_settings(model, target, corpus, config) | {"weights": arguments.sparsity_weights}
    out = arguments.out or _default_folder(arguments.model, settings)
    print(f"path    {out}", flush=True)
    path = find_path(model, target, corpus, config, arguments.sparsity_weights, run_dir=out, rebuild=rebuild)
    print(f"\n{path}\n\nfiles in {out}/: {', '.join(sorted(file.name for file in out.glob('[!.]*')))}")
    return 0


def _target(kind: str, order: int, model: Any, corpus: Any) -> Any:
    """The target of a run, from its names."""
    from bigram_circuits.targets.induced import InducedTarget
    from bigram_circuits.targets.model import ModelTarget
    from bigram_circuits.targets.next_token import NextTokenTarget
    from bigram_circuits.text.counting import count_ngrams

    if kind == "model":
        return ModelTarget(model)
    if kind == "induced":
        return InducedTarget(model, corpus.train)
    return NextTokenTarget() if kind == "next-token" else count_ngrams(corpus.train, order, d_vocab=model.cfg.d_vocab)


# --- evaluate, analyze, report, compare, hooks ---


def _evaluate(arguments: argparse.Namespace) -> int:
    from bigram_circuits.evaluation import evaluate
    from bigram_circuits.report.page import write_report

    with _run_to_write(arguments.run) as folder:
        model, subnetwork, target, corpus = _parts_of_run(arguments.run, arguments.device)
        evaluation = evaluate(model, subnetwork, target, corpus.held_out, seeds=arguments.random_seeds)
        folder.write_metrics(evaluation.to_json())
        print(f"{evaluation}\n\n{_where(subnetwork)}\n\nthe page to look at: {write_report(arguments.run)}")
    return 0


@contextmanager
def _run_to_write(path: Path) -> Iterator[Any]:
    """The folder of a finished run, locked, so that only one process at a time writes results to it."""
    from bigram_circuits.runs import RunFolder, load_run

    load_run(path)  # a folder that holds no finished run is not touched
    folder = RunFolder(path)
    with folder.lock():
        yield folder


def _analyze(arguments: argparse.Namespace) -> int:
    from bigram_circuits.analysis.suite import analyze
    from bigram_circuits.report.page import write_report

    with _run_to_write(arguments.run):
        model, subnetwork, target, corpus = _parts_of_run(arguments.run, arguments.device)
        options = {} if arguments.tokens is None else {"tokens": arguments.tokens}
        analyses = analyze(model, subnetwork, target, corpus, seed=arguments.seed, **options)
        analyses.save(arguments.run / "analysis")
        print(f"{analyses}\n\nfiles in {arguments.run / 'analysis'}/: {', '.join(analyses.results)}")
        print(f"the page to look at: {write_report(arguments.run)}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from bigram_circuits.report.page import write_report

    with _run_to_write(arguments.run):
        print(write_report(arguments.run))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from bigram_circuits.experiments.comparison import compare
    from bigram_circuits.report.comparison import write_comparison

    comparison = compare(arguments.runs)
    page = write_comparison(comparison, arguments.out)
    print(f"{comparison}\n\nthe page to look at: {page}")
    return 0


def _parts_of_run(folder: Path, device: str | None) -> tuple[Any, Any, Any, Any]:
    """Model, subnetwork, target and corpus of a finished run, made again from its names."""
    from bigram_circuits.models.loading import load_model
    from bigram_circuits.runs import load_run
    from bigram_circuits.subnetwork import Subnetwork
    from bigram_circuits.text.corpus import load_corpus

    run = load_run(folder)
    if run.rebuild is None:
        raise ValueError(f"the run in {str(folder)!r} was made in Python from objects: evaluate or analyse it there")
    model = load_model(**run.rebuild["model"], device=device)
    corpus = load_corpus(**run.rebuild["corpus"], tokenizer=model.tokenizer)
    if corpus.fingerprint != run.settings["corpus"]["fingerprint"]:
        print(
            f"bigram-circuits: note: the text of {corpus.source!r} is not what the run was made on "
            f"(fingerprint {corpus.fingerprint}, then {run.settings['corpus']['fingerprint']})",
            file=sys.stderr,
        )
    target = _target(run.rebuild["target"], run.rebuild["order"], model, corpus)
    subnetwork = Subnetwork.load(run.path / "subnetwork.safetensors", model)
    return model, subnetwork, target, corpus


def _hooks(arguments: argparse.Namespace) -> int:
    from bigram_circuits.models.activations import activation_points
    from bigram_circuits.models.loading import load_model
    from bigram_circuits.models.weights import weight_sites

    model = load_model(arguments.model, revision=arguments.revision, device=arguments.device)
    print("activation points (run_with_cache, run_with_hooks)")
    for point in activation_points(model):
        axes = "not reached" if point.axes is None else " ".join(point.axes)
        shape = "" if point.shape is None else " ".join(map(str, point.shape))
        also = f"  = {', '.join(point.aliases)}" if point.aliases else ""
        print(f"  {point.name:<36} {axes:<28} {shape:<24}{also}".rstrip())
    sites = weight_sites(model)
    print(f"\nmaskable weights ({sum(site.size for site in sites):,})")
    for site in sites:
        print(f"  {site.name:<36} {site.axes:<28} {' '.join(map(str, site.shape))}")
    return 0


# --- import-published, export, checkpoints ---


def _import_published(arguments: argparse.Namespace) -> int:
    from bigram_circuits.models.loading import load_model
    from bigram_circuits.published import import_published, read_masks

    read_masks(arguments.file)  # what is wrong with the file is said before a model is loaded
    model = load_model(arguments.model, revision=arguments.revision, device=arguments.device)
    subnetwork = import_published(arguments.file, model)
    subnetwork.save(arguments.out)
    print(f"{subnetwork!r}\n\n{_where(subnetwork)}\n\nwritten to {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from bigram_circuits.models.loading import load_model
    from bigram_circuits.runs import load_run
    from bigram_circuits.sharing import export_huggingface, export_masks
    from bigram_circuits.storage.files import check_new_folder
    from bigram_circuits.subnetwork import Subnetwork

    run = load_run(arguments.run)
    if run.rebuild is None:
        raise ValueError(f"the run in {str(arguments.run)!r} was made in Python from objects: export it there")
    masks_alone = arguments.out.suffix in (".npz", ".safetensors")
    if not masks_alone:
        check_new_folder(arguments.out)
    model = load_model(**run.rebuild["model"], device=arguments.device)
    subnetwork = Subnetwork.load(run.path / "subnetwork.safetensors", model)
    (export_masks if masks_alone else export_huggingface)(model, subnetwork, arguments.out)
    print(f"{subnetwork!r}\nwritten to {arguments.out}")
    return 0


def _checkpoints(arguments: argparse.Namespace) -> int:
    from bigram_circuits.models.loading import checkpoints

    print("\n".join(checkpoints(arguments.model)))
    return 0


# --- argument types ---


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def _number(least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least:g}")
        return value

    return parse


def _numbers(text: str) -> list[float]:
    numbers = [_number(0.0)(part) for part in text.split(",")]
    if len(set(numbers)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of at least two different numbers, as in 1,10,100")
    return numbers


def _layers(text: str) -> tuple[int, ...]:
    return tuple(_whole(0)(part) for part in text.split(","))


def _granularity(text: str) -> str | dict[str, str]:
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    return {component: unit for component, _, unit in pairs}


def _silence() -> None:
    """A closed pipe (`| head`) is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    """Entry point of the command `bigram-circuits`."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    run()
