"""The command line: parsing only. Heavy modules are imported when a command needs them."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from bigram_circuits.paper import PAPERS, ROWS
from bigram_circuits.recipe import (
    NAMES,
    NOT_FOR_CURVES,
    NOT_FOR_LADDER,
    NOT_FOR_REPRODUCE,
    NUMBER,
    NUMBERS,
    PARTS,
    SHARES,
    STEPS,
    Inputs,
    Option,
    Request,
    SparsifyConfig,
    options_of,
    whole,
)
from bigram_circuits.storage.terminal import printable, signals_handled

_EPILOG = """examples:
  bigram-circuits find                                    the bigram subnetwork of the reference model
  bigram-circuits find EleutherAI/pythia-70m --corpus wikitext:wikitext-2-raw-v1
  bigram-circuits find ./my_model --corpus texts/ --sparsity-weight 5 --out runs/mine
  bigram-circuits find --falsify                          also try to refute the finding
  bigram-circuits find ./my_model --task capitals.jsonl   which weights answer these prompts?
  bigram-circuits evaluate runs/mine
  bigram-circuits analyze runs/mine
  bigram-circuits report runs/mine
  bigram-circuits compare runs/mine runs/other
  bigram-circuits worst-case runs/mine                    what is left if an adversary opens what was dropped?
  bigram-circuits rivals runs/mine                        do other weights of the same number do the same?
  bigram-circuits same-function runs/mine runs/other      do two masks compute the same?
  bigram-circuits curves ./my_model --task capitals.jsonl --unit head --replace mean
  bigram-circuits ladder --out runs/ladder                unigram, bigram, trigram, induction: what each adds
  bigram-circuits reproduce chang-bergen-2025 --model EleutherAI/pythia-70m --corpus texts/
  bigram-circuits hooks reference
  bigram-circuits import-published subnetwork_dict_lambda1e1.pickle --model EleutherAI/pythia-70m --out mask.safetensors
  bigram-circuits export runs/mine --out my_masked_model
  bigram-circuits checkpoints EleutherAI/pythia-70m"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 success, 1 failure or interruption, 2 wrong arguments."""
    if not _is_first():
        os.environ["TQDM_DISABLE"] = "1"
    arguments = _parse(argv)
    try:
        _check_alone(arguments)
        with _terminated_like_ctrl_c(), _warnings_in_a_line():
            return arguments.command(arguments)
    except KeyboardInterrupt as stop:
        return _say(str(stop) or "interrupted; files already written are kept; rerun the command to go on", 1)
    except BrokenPipeError:
        raise  # nobody reads on: see `run`
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = _one_line(error)
        if isinstance(error, MemoryError | RuntimeError):
            from bigram_circuits.learning.memory import is_out_of_memory, less_memory

            if not is_out_of_memory(error):
                raise
            if "--batch-size" not in line:
                line = f"out of memory: {less_memory(error)} ({line[:200]})"
        if arguments.traceback:
            raise
        return _say(f"error: {line}", 1)


def _are_several() -> bool:
    """Whether several processes were started together (`torchrun`)."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _is_first() -> bool:
    """Whether this process is the first, or only, one of those that were started together."""
    return not _are_several() or os.environ.get("RANK", "0") == "0"


def _check_alone(arguments: argparse.Namespace) -> None:
    """Raise ValueError if several processes were started for a command that is the work of one."""
    if _are_several() and arguments.command is not _find:
        raise ValueError("only `find` works in several processes: start this command without torchrun")


@contextmanager
def _terminated_like_ctrl_c() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP act like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("terminated; files already written are kept; rerun the command to go on")

    with signals_handled(stop):
        yield


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Within the block, warnings of this package are single lines on stderr; others are unchanged."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("bigram_circuits."):
            _say(f"warning: {message}", 0)
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def _say(line: str, code: int) -> int:
    if _is_heard(code):
        print(printable(f"bigram-circuits: {line}"), file=sys.stderr)
    return code


def _is_heard(code: int) -> bool:
    """Whether this process may print on stderr: of several that end in an error, the first; else the one that leads."""
    if not code or not _are_several():
        return _is_first()
    from bigram_circuits.learning.ranks import is_first_to_end

    return is_first_to_end()


def _tell(text: object) -> None:
    """Print text in which names and words from files cannot command the terminal."""
    print(printable(str(text)), flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- the parser ---

_SEEDS = whole(0).read
_COUNT = whole(1).read


class _Parser(argparse.ArgumentParser):
    """A parser whose errors suggest what may have been meant."""

    def error(self, message: str) -> NoReturn:
        """Print the message with a suggestion, if there is one, and exit with code 2."""
        wrong = re.match(r"argument .*: invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            message += _suggestion(wrong[1], [choice.strip("'") for choice in wrong[2].split(", ")])
        if not _is_heard(2):
            self.exit(2)
        super().error(message)


def _suggestion(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        flags = sorted(set(re.findall(r"(?<!\S)--[a-z][a-z-]+", arguments.parser.format_help())))
        message = f"unrecognized arguments: {' '.join(unknown)}{_suggestion(word, flags)}"
        arguments.parser.error(message)
    return arguments


def _parser() -> argparse.ArgumentParser:
    from bigram_circuits import __version__

    parser = _Parser(
        prog="bigram-circuits",
        description="Find and understand subnetworks of transformer language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if available)")
    shared.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    _add_find(commands, shared)
    _add_curves(commands, shared)
    _add_ladder(commands, shared)
    _add_reproduce(commands, shared)
    _add_work_on_runs(commands, shared)
    _add_stricter(commands, shared)
    _add_exchange(commands, shared)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _add_find(commands: Any, shared: argparse.ArgumentParser) -> None:
    """`find`, whose options are the fields of the dataclasses in `recipe.py`."""
    find = commands.add_parser(
        "find", parents=[shared], help="find a subnetwork, evaluate and analyse it, save the run",
        usage="bigram-circuits find [MODEL] [OPTION ...]",
    )  # fmt: skip
    find.set_defaults(command=_find)
    _add_options(find)
    find.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the run's folder (default: one under runs/, named by settings)"
    )
    find.add_argument("--fresh", action="store_true", help="start over if this run was started or finished before")
    find.add_argument(
        "--sharded", action="store_true",
        help="with torchrun: divide weights, scores and moments among the processes, not the batch alone",
    )  # fmt: skip


def _add_ladder(commands: Any, shared: argparse.ArgumentParser) -> None:
    """`ladder`, with those options of `find` that it does not set itself."""
    ladder = commands.add_parser(
        "ladder", parents=[shared], help="find masks for unigram, bigram, trigram and induction, and what each adds",
        usage="bigram-circuits ladder [MODEL] [OPTION ...]",
    )  # fmt: skip
    ladder.set_defaults(command=_ladder)
    _add_options(ladder, NOT_FOR_LADDER)
    ladder.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="the folder of runs and page; the same command goes on there (default: one under runs/)",
    )  # fmt: skip


def _add_curves(commands: Any, shared: argparse.ArgumentParser) -> None:
    """`curves`, with those options of `find` that it does not set itself."""
    curves = commands.add_parser(
        "curves", parents=[shared], help="choose circuits of several sizes in several ways, and compare how faithful "
        "they are", usage="bigram-circuits curves [MODEL] [OPTION ...]",
    )  # fmt: skip
    curves.set_defaults(command=_curves)
    _add_options(curves, NOT_FOR_CURVES)
    curves.add_argument(
        "--sizes", type=SHARES.read, metavar=SHARES.metavar, help="shares of the nodes to keep (default: 0.02 to 0.5)"
    )
    curves.add_argument(
        "--methods", type=NAMES.read, metavar=NAMES.metavar,
        help="ways of choosing: learned, integrated, attribution, patching, random (default: all)",
    )  # fmt: skip
    curves.add_argument("--draws", type=_COUNT, metavar="N", help="number of random draws (default: 5)")
    curves.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="the folder of circuits and page; the same command goes on there (default: one under runs/)",
    )  # fmt: skip


def _add_reproduce(commands: Any, shared: argparse.ArgumentParser) -> None:
    """`reproduce`, with those options of `find` that a paper does not set."""
    reproduce = commands.add_parser(
        "reproduce", parents=[shared], help="measure a paper's numbers again: theirs, ours, and the difference"
    )
    reproduce.set_defaults(command=_reproduce)
    reproduce.add_argument("paper", choices=list(PAPERS), metavar="PAPER", help=f"the paper: {', '.join(PAPERS)}")
    reproduce.add_argument(
        "--model", nargs="+", action="extend", metavar="M",
        help="the paper's names, hub ids, folders, or NAME=FOLDER for a model of the paper in a folder (default: all "
        "models of the paper)",
    )  # fmt: skip
    reproduce.add_argument("--rows", nargs="+", choices=list(ROWS), help="rows to measure (default: all but released)")
    reproduce.add_argument("--released", action="store_true", help="also measure the masks that its authors released")
    reproduce.add_argument(
        "--recipe", choices=["ours", "paper"], default="ours",
        help="how masks are learned; the paper's takes hours for each (default: ours)",
    )  # fmt: skip
    reproduce.add_argument(
        "--sparsity-weights", type=NUMBERS.read, metavar=NUMBERS.metavar,
        help="the sweep of lambda; 0 is always among them (default: the paper's)",
    )  # fmt: skip
    _add_options(reproduce, NOT_FOR_REPRODUCE)
    reproduce.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="the folder of numbers and runs; the same command goes on there (default: one under runs/)",
    )  # fmt: skip


def _add_options(command: Any, left_out: Collection[str] = ()) -> None:
    """Add the options of `find`, but for some."""
    for part in PARTS:
        group = command.add_argument_group("how masks are learned") if part is SparsifyConfig else command
        for name, option in options_of(part).items():
            if name not in left_out:
                _add_option(group, name, option, part.__dataclass_fields__[name].default)


def _add_option(group: Any, name: str, option: Option, default: Any) -> None:
    """Add the option of a field. An option that is not given is None; the field's default then applies."""
    if option.kind is None:
        group.add_argument(
            *option.flags, dest=name, action="store_const", const=not default, default=None, help=option.help
        )
        return
    help = f"{option.help} (default: {option.says or (option.kind.write(default) if default is not None else 'none')})"
    settings: dict[str, Any] = {"type": option.kind.read, "help": help.replace("%", "%%"), "default": None}
    choices = None if option.choices is None else list(option.choices())
    settings |= {"metavar": option.kind.metavar} if choices is None else {"choices": choices}
    if not option.flag.startswith("-"):
        group.add_argument(name, nargs="?", **settings | {"metavar": name.upper()})
        return
    group.add_argument(*option.flags, dest=name, **settings)


def _add_work_on_runs(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The commands that work on finished runs, and those that only read."""
    evaluate = commands.add_parser("evaluate", parents=[shared], help="evaluate a finished run again")
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument("run", type=Path, help="the run's folder")
    _add_names(evaluate)
    _add_copy(evaluate)
    evaluate.add_argument(
        "--random-seeds", type=_COUNT, default=3, metavar="N", help="number of matched random controls (default: 3)"
    )

    analyze = commands.add_parser(
        "analyze", parents=[shared], help="analyse a finished run: lenses, geometry, ablations, location"
    )
    analyze.set_defaults(command=_analyze)
    analyze.add_argument("run", type=Path, help="the run's folder")
    _add_names(analyze)
    _add_copy(analyze)
    analyze.add_argument("--seed", type=_SEEDS, default=0, metavar="N", help="seed of the random controls (default: 0)")
    analyze.add_argument("--tokens", type=_COUNT, metavar="N", help="tokens to measure layers on (default: 20480)")

    explain = commands.add_parser(
        "explain", parents=[shared], help="write a page on how a run's mask comes from a token to its prediction"
    )
    explain.set_defaults(command=_explain)
    explain.add_argument("run", type=Path, help="the run's folder")
    asked = explain.add_mutually_exclusive_group()
    asked.add_argument("--prompt", metavar="TEXT", help="explain what follows this text")
    asked.add_argument(
        "--token", metavar="TOKEN", help="explain what follows this token, by its text (' of') or id (default: of all "
        "tokens that the run's analysis has explained)",
    )  # fmt: skip
    explain.add_argument("--answer", metavar="TOKEN", help="the token to explain (default: what is predicted)")
    explain.add_argument("--wrong", metavar="TOKEN", help="explain by how much the answer's logit is above this one's")
    explain.add_argument(
        "--position", type=int, metavar="N", help="explain what follows this position (default: the last)"
    )
    explain.add_argument("--full", action="store_true", help="explain the full model instead of the masked one")
    explain.add_argument("--model", metavar="M", help=_MODEL_AGAIN)
    explain.add_argument(
        "--out", type=Path, default="explanation.html", metavar="FILE", help="the page (default: explanation.html)"
    )
    explain.add_argument(
        "--graph", type=Path, metavar="FILE", help="also write it as JSON for viewers of attribution graphs"
    )

    report = commands.add_parser("report", parents=[shared], help="write a finished run's page, report.html")
    report.set_defaults(command=_report)
    report.add_argument("run", type=Path, help="the run's folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the run's folder)")

    compare = commands.add_parser(
        "compare", parents=[shared], help="write a page that compares several runs, subnetworks or circuits of a model"
    )
    compare.set_defaults(command=_compare)
    compare.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN",
        help="the folder of a run or a path, or a subnetwork file; two or more",
    )  # fmt: skip
    compare.add_argument(
        "--out", type=Path, default="comparison.html", metavar="FILE", help="the page (default: comparison.html)"
    )
    compare.add_argument("--csv", type=Path, metavar="FILE", help="write the table of measurements there too")
    compare.add_argument(
        "--against", metavar="NAME",
        help="compute overlaps with this one alone (default: of every pair; of more than 32, with the first)",
    )  # fmt: skip

    hooks = commands.add_parser("hooks", parents=[shared], help="list a model's activation points and maskable weights")
    hooks.set_defaults(command=_hooks)
    hooks.add_argument("model", nargs="?", default="reference", help="'reference', a hub id, or a folder")
    hooks.add_argument("--revision", metavar="R", help="revision of a hub model")
    _add_unchecked(hooks)


def _add_stricter(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The commands that test a finished run's mask harder."""
    worst = commands.add_parser(
        "worst-case", parents=[shared], help="let an adversary open what a run's mask drops, and measure what is left"
    )
    worst.set_defaults(command=_worst_case)
    worst.add_argument("run", type=Path, help="the run's folder")
    worst.add_argument(
        "--budgets", type=STEPS.read, metavar=STEPS.metavar, help="steps of ascent (default: 0,1,4,20,80)"
    )
    worst.add_argument("--starts", type=_COUNT, default=3, metavar="N", help="starting points (default: 3)")
    worst.add_argument("--seed", type=_SEEDS, default=0, metavar="N", help="seed of starts and batches (default: 0)")
    worst.add_argument(
        "--against", choices=["target", "model"], default="target",
        help="what the adversary works against: the run's target, or the full model's predictions (default: target)",
    )  # fmt: skip
    worst.add_argument(
        "--force", action="store_true",
        help="go on although the full model does something else than the target, so that it says nothing of the mask",
    )  # fmt: skip

    rivals = commands.add_parser(
        "rivals", parents=[shared], help="learn masks of a run's size that do the same with as little in common"
    )
    rivals.set_defaults(command=_rivals)
    rivals.add_argument("run", type=Path, help="the run's folder")
    rivals.add_argument(
        "--k", type=whole(2).read, default=3, metavar="N", help="number of masks, with the run's own (default: 3)"
    )
    rivals.add_argument(
        "--overlap-weight", type=NUMBER.read, metavar=NUMBER.metavar,
        help="what it costs to share with earlier masks, in nats; 0 gives other seeds (default: 30)",
    )  # fmt: skip

    same = commands.add_parser(
        "same-function", parents=[shared], help="compare what the masks of two runs of one model compute"
    )
    same.set_defaults(command=_same_function)
    same.add_argument("run", type=Path, help="the run's folder, whose target and text are used")
    same.add_argument("other", type=Path, metavar="other_run", help="the folder of another run of the same model")
    same.add_argument(
        "--tokens", type=_COUNT, metavar="N", help="held-out tokens, at most, to compare on (default: 8192)"
    )
    for command in (worst, rivals, same):
        _add_names(command)
        _add_copy(command)


def _add_unchecked(command: argparse.ArgumentParser) -> None:
    """The option `--unchecked`, as `find` has it."""
    option = options_of(Inputs)["unchecked"]
    command.add_argument(*option.flags, action="store_true", help=option.help)


_MODEL_AGAIN = "where to read the run's model from (default: where it was; must be given for a run made elsewhere)"


def _add_names(command: argparse.ArgumentParser) -> None:
    """The options by which a run's model and text are named again."""
    command.add_argument("--model", metavar="M", help=_MODEL_AGAIN)
    command.add_argument(
        "--corpus", metavar="SOURCE",
        help="where to read its text from (default: where it was; must be given for a run made elsewhere)",
    )  # fmt: skip
    command.add_argument("--task", metavar="FILE", help="where to read its task from, likewise")


def _add_copy(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="write to a copy of the run in this new folder and leave the run as it is; the text may then be another",
    )  # fmt: skip


def _add_exchange(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The commands that import and export masks."""
    imported = commands.add_parser(
        "import-published", parents=[shared], help="read masks by Hugging Face parameter name, as the paper's release"
    )
    imported.set_defaults(command=_import_published)
    imported.add_argument("file", type=Path, help="a released .pickle, or .npz or .safetensors with the same names")
    imported.add_argument("--model", required=True, help="'reference', a hub id, or a folder")
    imported.add_argument("--revision", metavar="R", help="revision of a hub model")
    _add_unchecked(imported)
    imported.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the subnetwork")

    export = commands.add_parser("export", parents=[shared], help="write a run's masked model as a Hugging Face folder")
    export.set_defaults(command=_export)
    export.add_argument("run", type=Path, help="the run's folder")
    export.add_argument("--model", metavar="M", help=_MODEL_AGAIN)
    export.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER",
        help="a new folder for the model, or a file name ending in .npz or .safetensors for the masks alone",
    )  # fmt: skip

    checkpoints = commands.add_parser("checkpoints", parents=[shared], help="list a model's training checkpoints")
    checkpoints.set_defaults(command=_checkpoints)
    checkpoints.add_argument("model", help="a hub id such as EleutherAI/pythia-70m, or a family such as pythia")


# --- the commands ---


def _find(arguments: argparse.Namespace) -> int:
    options = {name: getattr(arguments, name) for part in PARTS for name in options_of(part)}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        Request.of(**given)
    except ValueError as error:  # reported before anything heavy is loaded
        raise SystemExit(_say(f"error: {error}", 2)) from error
    from bigram_circuits.workflow import study

    study(
        **given, out=arguments.out, device=arguments.device, fresh=arguments.fresh, sharded=arguments.sharded,
        tell=_tell,
    )  # fmt: skip
    return 0


def _curves(arguments: argparse.Namespace) -> int:
    given = _given(arguments, NOT_FOR_CURVES)
    own = {name: value for name in ("sizes", "methods", "draws") if (value := getattr(arguments, name)) is not None}
    from bigram_circuits.workflow import curves

    curves(**given, **own, out=arguments.out, device=arguments.device, tell=_tell)
    return 0


def _ladder(arguments: argparse.Namespace) -> int:
    given = _given(arguments, NOT_FOR_LADDER)
    from bigram_circuits.workflow import ladder

    ladder(**given, out=arguments.out, device=arguments.device, tell=_tell)
    return 0


def _given(arguments: argparse.Namespace, left_out: Collection[str]) -> dict[str, Any]:
    """The options of `find` that were given, to a command that has all but some."""
    names = [name for part in PARTS for name in options_of(part) if name not in left_out]
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _reproduce(arguments: argparse.Namespace) -> int:
    given = _given(arguments, NOT_FOR_REPRODUCE)
    from bigram_circuits.workflow import reproduce

    result = reproduce(
        arguments.paper, arguments.model, rows=arguments.rows, released=arguments.released, recipe=arguments.recipe,
        sparsity_weights=arguments.sparsity_weights, out=arguments.out, device=arguments.device, tell=_tell, **given,
    )  # fmt: skip
    return _say("error: nothing could be measured", 1) if result.is_empty else 0


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

    names: dict[str, Any] = {"model": arguments.model, "corpus": arguments.corpus, "task": arguments.task}
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


def _evaluate(arguments: argparse.Namespace) -> int:
    from bigram_circuits.evaluation import evaluate
    from bigram_circuits.learning.training import identity_of
    from bigram_circuits.report.page import write_report

    with _reopened(arguments, with_evaluation=False) as (run, of, folder):
        seeds = arguments.random_seeds
        evaluation = evaluate(of.model, run.mask, of.target, of.corpus.held_out, seeds=seeds)
        folder.write_evaluation(evaluation, identity_of(of.corpus))
        _tell(f"{evaluation}\n\n{run.mask.table()}\n\nthe page to look at: {write_report(folder.path)}")
    return 0


def _analyze(arguments: argparse.Namespace) -> int:
    from bigram_circuits.analysis.suite import analyze
    from bigram_circuits.report.page import write_report

    with _reopened(arguments, with_evaluation=True) as (run, of, folder):
        options = {} if arguments.tokens is None else {"tokens": arguments.tokens}
        analyses = analyze(of.model, run.mask, of.target, of.corpus, seed=arguments.seed, **options)
        analyses.save(folder.path / "analysis")
        written = [*analyses.results, *(["atlas"] if analyses.atlas else [])]
        _tell(f"{analyses}\n\nfiles in {folder.path / 'analysis'}/: {', '.join(written)}")
        _tell(f"the page to look at: {write_report(folder.path)}")
    return 0


def _worst_case(arguments: argparse.Namespace) -> int:
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
        _tell(f"{curves.table('kl')}\n\n{worst_case_words(curves)}")
        _write_stricter(StricterTests(worst_case=curves), of, folder)
    return 0


def _rivals(arguments: argparse.Namespace) -> int:
    from bigram_circuits.experiments.rivals import rivals
    from bigram_circuits.experiments.stricter import RIVALS_FOLDER, StricterTests

    options = {} if arguments.overlap_weight is None else {"overlap_weight": arguments.overlap_weight}
    with _reopened(arguments, with_evaluation=True) as (run, of, folder):
        found = rivals(
            of.model, of.target, of.corpus, arguments.k, config=run.settings.recipe, first=run.mask,
            run_dir=folder.path / RIVALS_FOLDER, **options,
        )  # fmt: skip
        _tell(found)
        _write_stricter(StricterTests(rivals=found), of, folder)
    return 0


def _same_function(arguments: argparse.Namespace) -> int:
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
        _tell(found)
        _write_stricter(StricterTests(same={arguments.other.resolve().name: found}), of, folder)
    return 0


def _write_stricter(found: Any, of: Any, folder: Any) -> None:
    """Write the outcome of a stricter test into a run's folder, and its page again."""
    from bigram_circuits.experiments.stricter import FOLDER
    from bigram_circuits.learning.training import identity_of
    from bigram_circuits.report.page import write_report

    found.save(folder.path / FOLDER, folder.origin(identity_of(of.corpus)))
    _tell(f"\nfiles in {folder.path / FOLDER}/\nthe page to look at: {write_report(folder.path)}")


def _explain(arguments: argparse.Namespace) -> int:
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
    _tell(f"{found}\n")
    if arguments.graph is not None:
        _tell(f"the graph: {export_graph(found, arguments.graph)}")
    found.to_html(arguments.out)
    _tell(f"the page to look at: {arguments.out}")
    return 0


def _explain_all(arguments: argparse.Namespace, run: Any) -> int:
    """The page of a run's atlas."""
    given = [name for name in ("answer", "wrong", "position", "graph") if getattr(arguments, name) is not None]
    given += [name for name in ("full",) if getattr(arguments, name)]
    if given:
        raise ValueError(f"--{given[0]} is for one prompt: give --prompt or --token")
    if run.atlas is None:
        reason = run.left_out.get("atlas")
        raise ValueError(
            f"the run in {str(run.path)!r} has no atlas ({reason}): give --prompt or --token"
            if reason
            else f"the run in {str(run.path)!r} has no atlas: give --prompt or --token, or `analyze` it first"
        )
    run.atlas.to_html(arguments.out)
    _tell(f"{run.atlas.title}\nthe page to look at: {arguments.out}")
    return 0


def _token(text: str) -> str | int:
    """A token given by its id or its text."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) > 1 else text


def _report(arguments: argparse.Namespace) -> int:
    from bigram_circuits.report.page import write_report

    if arguments.out is not None:  # the run is only read
        _tell(write_report(arguments.run, arguments.out))
        return 0
    try:
        with _run_to_write(arguments.run):
            _tell(write_report(arguments.run))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OSError(error.errno, f"{error.strerror}: write the page to another place with --out FILE") from error
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from bigram_circuits.experiments.comparison import compare
    from bigram_circuits.report.comparison import write_comparison

    comparison = compare(arguments.runs, against=arguments.against)
    page = write_comparison(comparison, arguments.out)
    _tell(f"{comparison}\n")
    if arguments.csv:
        _tell(f"the table: {comparison.to_csv(arguments.csv)}")
    _tell(f"the page to look at: {page}")
    return 0


def _hooks(arguments: argparse.Namespace) -> int:
    from bigram_circuits.models.activations import activation_points
    from bigram_circuits.models.loading import load_model
    from bigram_circuits.models.weights import weight_sites

    model = load_model(
        arguments.model, revision=arguments.revision, device=arguments.device, check=not arguments.unchecked
    )
    _tell("activation points (run_with_cache, run_with_hooks)")
    for point in activation_points(model):
        axes = "not reached" if point.axes is None else " ".join(point.axes)
        shape = "" if point.shape is None else " ".join(map(str, point.shape))
        also = f"  = {', '.join(point.aliases)}" if point.aliases else ""
        _tell(f"  {point.name:<36} {axes:<28} {shape:<24}{also}".rstrip())
    sites = weight_sites(model)
    _tell(f"\nmaskable weights ({sum(site.size for site in sites):,})")
    for site in sites:
        _tell(f"  {site.name:<36} {site.axes:<28} {' '.join(map(str, site.shape))}")
    return 0


def _import_published(arguments: argparse.Namespace) -> int:
    from bigram_circuits.models.loading import load_model
    from bigram_circuits.published import import_published, read_masks

    read_masks(arguments.file)  # errors in the file are reported before a model is loaded
    model = load_model(
        arguments.model, revision=arguments.revision, device=arguments.device, check=not arguments.unchecked
    )
    subnetwork = import_published(arguments.file, model)
    subnetwork.save(arguments.out)
    _tell(f"{subnetwork!r}\n\n{subnetwork.table()}\n\nwritten to {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
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
    _tell(f"{run.mask!r}\nwritten to {arguments.out}")
    return 0


def _checkpoints(arguments: argparse.Namespace) -> int:
    from bigram_circuits.models.loading import checkpoints

    _tell("\n".join(checkpoints(arguments.model)))
    return 0


def _silence() -> None:
    """Discard further output, also what is still buffered."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run() -> None:
    """Entry point of the command `bigram-circuits`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in an encoding that lacks a character, a question mark stands for it
            stream.reconfigure(errors="replace")
    try:
        try:
            code = main()
        except SystemExit as stop:  # from the parser
            code = stop.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # a closed pipe (`| head`) needs no message
        _silence()
        code = 1
    except OSError as error:  # a full disk
        _say(f"error: cannot write the output: {error.strerror}", 1)
        _silence()
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    run()
