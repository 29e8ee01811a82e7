"""What the commands are called with: the parser."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bigram_circuits.cli import commands
from bigram_circuits.cli.completion import SHELLS
from bigram_circuits.cli.config import read_config
from bigram_circuits.cli.output import LEVELS, FailedError, is_first
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
    SparsifyConfig,
    options_of,
    whole,
)

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
  bigram-circuits sweep SPEC.toml --workers 4             many runs: a grid or a list, in one folder with one table
  bigram-circuits reproduce chang-bergen-2025 --model EleutherAI/pythia-70m --corpus texts/
  bigram-circuits hooks reference
  bigram-circuits import-published subnetwork_dict_lambda1e1.pickle --model EleutherAI/pythia-70m --out mask.safetensors
  bigram-circuits export runs/mine --out my_masked_model
  bigram-circuits checkpoints EleutherAI/pythia-70m
  bigram-circuits completion bash > ~/.local/share/bash-completion/completions/bigram-circuits

exit codes:
  0  done
  1  failed or interrupted; one line on standard error says why
  2  wrong arguments"""


_SEEDS = whole(0).read
_COUNT = whole(1).read


class _Parser(argparse.ArgumentParser):
    """A parser whose errors suggest what may have been meant."""

    def error(self, message: str) -> NoReturn:
        """Print the usage, and raise FailedError with a suggestion, if there is one."""
        wrong = re.match(r"argument .*: invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            message += _suggestion(wrong[1], [choice.strip("'") for choice in wrong[2].split(", ")])
        if is_first():
            self.print_usage(sys.stderr)
        raise FailedError(message, 2, by=f"{self.prog}: error")


def _suggestion(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command; raises FailedError if they, or the file that `--config` names, are wrong."""
    program = parser()
    arguments, unknown = program.parse_known_args(argv)
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        flags = sorted(set(re.findall(r"(?<!\S)--[a-z][a-z-]+", arguments.parser.format_help())))
        message = f"unrecognized arguments: {' '.join(unknown)}{_suggestion(word, flags)}"
        arguments.parser.error(message)
    if getattr(arguments, "config", None) is not None:
        arguments.parser.set_defaults(**read_config(arguments.config, vars(arguments)))
        arguments = program.parse_args(argv)
    return arguments


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from bigram_circuits import __version__

    program = _Parser(
        prog="bigram-circuits",
        description="Find and understand subnetworks of transformer language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    program.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers: Any = program.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if available)")
    shared.add_argument("--json", action="store_true", help="print the result as one JSON object, and nothing else")
    shared.add_argument("--quiet", action="store_true", help="show no progress, notes and warnings")
    shared.add_argument(
        "--log-level", choices=LEVELS, help="show notes and warnings of this level and above (default: info)"
    )
    shared.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    _add_find(subparsers, shared)
    _add_curves(subparsers, shared)
    _add_ladder(subparsers, shared)
    _add_reproduce(subparsers, shared)
    _add_sweep(subparsers, shared)
    _add_work_on_runs(subparsers, shared)
    _add_stricter(subparsers, shared)
    _add_exchange(subparsers, shared)
    completion = subparsers.add_parser(
        "completion", parents=[shared], help="print a script that completes commands, options and file names in a shell"
    )
    completion.set_defaults(command=commands.completion, program=program, commands=subparsers.choices)
    completion.add_argument("shell", choices=SHELLS, help="the shell")
    for name, command in subparsers.choices.items():
        command.set_defaults(command_name=name, parser=command)
    return program


def _add_find(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """`find`, whose options are the fields of the dataclasses in `recipe.py`."""
    find = subparsers.add_parser(
        "find", parents=[shared], help="find a subnetwork, evaluate and analyse it, save the run",
        usage="bigram-circuits find [MODEL] [OPTION ...]",
    )  # fmt: skip
    find.set_defaults(command=commands.find)
    _add_options(find)
    find.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the run's folder (default: one under runs/, named by settings)"
    )
    find.add_argument("--fresh", action="store_true", help="start over if this run was started or finished before")
    find.add_argument(
        "--sharded", action="store_true",
        help="with torchrun: divide weights, scores and moments among the processes, not the batch alone",
    )  # fmt: skip


def _add_ladder(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """`ladder`, with those options of `find` that it does not set itself."""
    ladder = subparsers.add_parser(
        "ladder", parents=[shared], help="find masks for unigram, bigram, trigram and induction, and what each adds",
        usage="bigram-circuits ladder [MODEL] [OPTION ...]",
    )  # fmt: skip
    ladder.set_defaults(command=commands.ladder)
    _add_options(ladder, NOT_FOR_LADDER)
    ladder.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="the folder of runs and page; the same command goes on there (default: one under runs/)",
    )  # fmt: skip


def _add_curves(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """`curves`, with those options of `find` that it does not set itself."""
    curves = subparsers.add_parser(
        "curves", parents=[shared], help="choose circuits of several sizes in several ways, and compare how faithful "
        "they are", usage="bigram-circuits curves [MODEL] [OPTION ...]",
    )  # fmt: skip
    curves.set_defaults(command=commands.curves)
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


def _add_reproduce(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """`reproduce`, with those options of `find` that a paper does not set."""
    reproduce = subparsers.add_parser(
        "reproduce", parents=[shared], help="measure a paper's numbers again: theirs, ours, and the difference"
    )
    reproduce.set_defaults(command=commands.reproduce)
    reproduce.add_argument("paper", choices=list(PAPERS), metavar="PAPER", help=f"the paper: {', '.join(PAPERS)}")
    reproduce.add_argument(
        "--model", dest="models", nargs="+", action="extend", metavar="M",
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


def _add_sweep(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """`sweep`: many runs."""
    sweep = subparsers.add_parser(
        "sweep", parents=[shared], help="make many runs, on this machine or with SLURM, in one folder with one table"
    )
    sweep.set_defaults(command=commands.sweep)
    sweep.add_argument(
        "spec", type=Path, metavar="SPEC",
        help="a TOML file: options of find that all runs share, [grid], [[run]], [slurm]; or the folder of a sweep",
    )  # fmt: skip
    sweep.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="the sweep's folder; the same command goes on there (default: one under runs/, named like SPEC)",
    )  # fmt: skip
    sweep.add_argument(
        "--launcher", choices=["local", "slurm", "debug"], default="local",
        help="processes on this machine, an array of SLURM jobs, or this process (default: local)",
    )  # fmt: skip
    sweep.add_argument(
        "--workers", type=_COUNT, metavar="N",
        help="runs at a time (default: one for each GPU, else one for every four cores, at least two)",
    )  # fmt: skip
    instead = sweep.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="only list the runs, with memory and time forecast")
    instead.add_argument("--status", action="store_true", help="only say how far the runs are")
    instead.add_argument(
        "--merge", type=Path, nargs="+", metavar="OTHER", help="only copy the runs of other sweeps' folders into this"
    )


def _add_options(command: Any, left_out: Collection[str] = ()) -> None:
    """Add the options of `find`, but for some, and the file that may give them."""
    command.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="read options from this file, by their names in Python; those "
        "given here take precedence",
    )  # fmt: skip
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


def _add_work_on_runs(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """The commands that work on finished runs, and those that only read."""
    evaluate = subparsers.add_parser("evaluate", parents=[shared], help="evaluate a finished run again")
    evaluate.set_defaults(command=commands.evaluate)
    evaluate.add_argument("run", type=Path, help="the run's folder")
    _add_names(evaluate)
    _add_copy(evaluate)
    evaluate.add_argument(
        "--random-seeds", type=_COUNT, default=3, metavar="N", help="number of matched random controls (default: 3)"
    )

    analyze = subparsers.add_parser(
        "analyze", parents=[shared], help="analyse a finished run: lenses, geometry, ablations, location"
    )
    analyze.set_defaults(command=commands.analyze)
    analyze.add_argument("run", type=Path, help="the run's folder")
    _add_names(analyze)
    _add_copy(analyze)
    analyze.add_argument("--seed", type=_SEEDS, default=0, metavar="N", help="seed of the random controls (default: 0)")
    analyze.add_argument(
        "--tokens", type=_COUNT, metavar="N",
        help="tokens to measure layers on (default: 20480); with fewer than 3072, also each ablation",
    )  # fmt: skip

    explain = subparsers.add_parser(
        "explain", parents=[shared], help="write a page on how a run's mask comes from a token to its prediction"
    )
    explain.set_defaults(command=commands.explain)
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

    report = subparsers.add_parser("report", parents=[shared], help="write a finished run's page, report.html")
    report.set_defaults(command=commands.report)
    report.add_argument("run", type=Path, help="the run's folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the run's folder)")

    compare = subparsers.add_parser(
        "compare", parents=[shared], help="write a page that compares several runs, subnetworks or circuits of a model"
    )
    compare.set_defaults(command=commands.compare)
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

    hooks = subparsers.add_parser(
        "hooks", parents=[shared], help="list a model's activation points and maskable weights"
    )
    hooks.set_defaults(command=commands.hooks)
    hooks.add_argument("model", nargs="?", default="reference", help="'reference', a hub id, or a folder")
    hooks.add_argument("--revision", metavar="R", help="revision of a hub model")
    _add_unchecked(hooks)


def _add_stricter(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """The commands that test a finished run's mask harder."""
    worst = subparsers.add_parser(
        "worst-case", parents=[shared], help="let an adversary open what a run's mask drops, and measure what is left"
    )
    worst.set_defaults(command=commands.worst_case)
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

    rivals = subparsers.add_parser(
        "rivals", parents=[shared], help="learn masks of a run's size that do the same with as little in common"
    )
    rivals.set_defaults(command=commands.rivals)
    rivals.add_argument("run", type=Path, help="the run's folder")
    rivals.add_argument(
        "--k", type=whole(2).read, default=3, metavar="N", help="number of masks, with the run's own (default: 3)"
    )
    rivals.add_argument(
        "--overlap-weight", type=NUMBER.read, metavar=NUMBER.metavar,
        help="what it costs to share with earlier masks, in nats; 0 gives other seeds (default: 30)",
    )  # fmt: skip

    same = subparsers.add_parser(
        "same-function", parents=[shared], help="compare what the masks of two runs of one model compute"
    )
    same.set_defaults(command=commands.same_function)
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
    command.add_argument("--index", metavar="INDEX", help="where the index of its target is, likewise")


def _add_copy(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="write to a copy of the run in this new folder and leave the run as it is; the text may then be another",
    )  # fmt: skip


def _add_exchange(subparsers: Any, shared: argparse.ArgumentParser) -> None:
    """The commands that import and export masks."""
    imported = subparsers.add_parser(
        "import-published", parents=[shared], help="read masks by Hugging Face parameter name, as the paper's release"
    )
    imported.set_defaults(command=commands.import_published)
    imported.add_argument("file", type=Path, help="a released .pickle, or .npz or .safetensors with the same names")
    imported.add_argument("--model", required=True, help="'reference', a hub id, or a folder")
    imported.add_argument("--revision", metavar="R", help="revision of a hub model")
    _add_unchecked(imported)
    imported.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the subnetwork")

    export = subparsers.add_parser(
        "export", parents=[shared], help="write a run's masked model as a Hugging Face folder"
    )
    export.set_defaults(command=commands.export)
    export.add_argument("run", type=Path, help="the run's folder")
    export.add_argument("--model", metavar="M", help=_MODEL_AGAIN)
    export.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER",
        help="a new folder for the model, or a file name ending in .npz or .safetensors for the masks alone",
    )  # fmt: skip

    checkpoints = subparsers.add_parser("checkpoints", parents=[shared], help="list a model's training checkpoints")
    checkpoints.set_defaults(command=commands.checkpoints)
    checkpoints.add_argument("model", help="a hub id such as EleutherAI/pythia-70m, or a family such as pythia")
