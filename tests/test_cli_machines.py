"""The command line for machines: JSON, quiet, log levels, options from a file, the environment, completion."""

import json
import logging
import re
import shutil
import subprocess
import sys
import typing
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import bigram_circuits as bc
from bigram_circuits import cli, environment
from bigram_circuits.cli.config import read_config
from bigram_circuits.cli.output import FailedError, to_json
from bigram_circuits.learning.inputs import InputWarning
from bigram_circuits.progress import note, progress
from bigram_circuits.runs import RunFolder
from tests.conftest import UNFIT_INPUTS
from tests.example_runs import hostile_atlas

pytestmark = UNFIT_INPUTS
COMMANDS = next(action.choices for action in cli.parser()._actions if action.choices)
QUICK = ["--steps", "2", "--batch-size", "4", "--context-length", "16", "--random-seeds", "1", "--no-analysis"]
PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()


def words(*arguments):
    return [str(argument) for argument in arguments]


def documented(command):
    """The fields that the page on the command line lists for a command's result."""
    (row,) = re.findall(rf"^\| `{command}` \| (.*) \|$", PAGE, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run a command in an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        try:
            code = cli.main(words(*arguments))
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def answered(run):
    """Run a command with `--json`; gives the object, which must be all of stdout, be finite and be documented."""

    def call(*arguments, code=0):
        got, out, err = run(*arguments, "--json")
        assert got == code, err
        found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert out.count("\n") == 1
        frame = {"command": arguments[0], "version": bc.__version__, "ok": code == 0, "exit_code": code}
        assert frame.items() <= found.items()
        own = found.keys() - frame.keys() - {"warnings"}
        assert own == {"error"} if code else own <= documented(arguments[0])
        return found

    return call


@pytest.fixture(scope="module")
def finished(tiny_folders, tmp_path_factory):
    """The folder of a run of a tiny model, with its model and text beside it."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(tiny_folders["gpt_neox"], folder / "model")
    (folder / "text.txt").write_text("".join(f"line {n} of a small text\n" + "\n" * (n % 7 == 0) for n in range(300)))
    find = ["find", folder / "model", "--corpus", folder / "text.txt", *QUICK, "--target", "model", "--device", "cpu"]
    for name, seed in (("run", 0), ("other", 1)):
        assert cli.main(words(*find, "--target-fraction", "0.2", "--seed", seed, "--out", folder / name)) == 0
    made = hostile_atlas()
    made.save(folder / "run" / "analysis" / "atlas.json", RunFolder(folder / "run").origin(None))
    return folder


# --- JSON ---

FAILING = {
    "find": ["find", "./nowhere"],
    "curves": ["curves", "./nowhere"],
    "ladder": ["ladder", "./nowhere"],
    "reproduce": ["reproduce", "chang-bergen-2025", "--model", "./nowhere"],
    "import-published": ["import-published", "nowhere.npz", "--model", "reference", "--out", "mask.safetensors"],
    "export": ["export", "nowhere", "--out", "there"],
    "same-function": ["same-function", "nowhere", "there"],
    "compare": ["compare", "nowhere", "there"],
    "hooks": ["hooks", "./nowhere"],
    "checkpoints": ["checkpoints", "./nowhere"],
    "completion": ["completion", "fish"],
}
"""A command that cannot work; of those that are not here, with a run that is not there."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_in_json_why_it_failed(command, answered, run):
    arguments = FAILING.get(command, [command, "nowhere"])
    code = run(*arguments)[0]
    assert code in (1, 2)
    assert answered(*arguments, code=code)["error"]


def test_every_command_returns_a_result_that_is_documented():
    for name, command in COMMANDS.items():
        assert typing.get_type_hints(command.get_default("command"))["return"] == Mapping[str, typing.Any], name
        assert documented(name)


def test_a_run_in_json(answered, run, finished, monkeypatch, tmp_path):
    monkeypatch.setenv("BIGRAM_CIRCUITS_RUNS", str(tmp_path / "mine"))
    found = answered("find", finished / "model", "--corpus", finished / "text.txt", *QUICK)
    folder = Path(found["folder"])
    again = bc.load_run(folder)
    assert folder.parent == tmp_path / "mine"
    assert found["metrics"] == json.loads(json.dumps(again.metrics))
    assert found["page"] == str(folder / "report.html")
    assert (found["mask"]["kept"], found["mask"]["kind"]) == (again.subnetwork.kept, "subnetwork")
    assert Path(found["mask"]["file"]).is_file()
    assert found["outcome"]["attempts"] >= 1
    code, out, err = run("evaluate", folder, "--json", "--random-seeds", "1")
    assert (code, json.loads(out)["metrics"]) == (0, found["metrics"])
    assert "Verdict" in err


def test_the_other_commands_in_json(answered, finished, tmp_path):
    copy, other = shutil.copytree(finished / "run", tmp_path / "copy"), finished / "other"
    assert Path(answered("report", copy)["page"]).read_text().startswith("<!")
    token = answered("explain", copy, "--token", "a", "--graph", "g.json")
    assert token["explanation"]["prompt"][-1] == "a"
    assert all(Path(token[name]).is_file() for name in ("page", "graph"))
    compared = answered("compare", copy, other, "--csv", "t.csv")
    masks = [bc.load_run(one).subnetwork for one in (copy, other)]
    assert [row["kept"] for row in compared["runs"]] == [mask.kept for mask in masks]
    assert compared["overlaps"][0]["intersection"] == (masks[0] & masks[1]).kept
    hooks = answered("hooks", finished / "model")
    assert sum(site["size"] for site in hooks["weights"]) == masks[0].total
    assert {"name", "axes", "shape", "aliases"} == hooks["points"][0].keys()
    written = answered("export", copy, "--out", "m.npz")
    assert sum(one.sum() for one in np.load(written["mask"]["file"]).values()) == masks[0].kept
    imported = answered("import-published", "m.npz", "--model", finished / "model", "--out", "m.safetensors")
    assert bc.Subnetwork.load(imported["mask"]["file"]) == masks[0]
    same = answered("same-function", copy, other, "--tokens", "64")
    assert same["verdict"] == bc.load_stricter(copy / "falsify" / "stricter").same["other"].verdict
    worst = answered("worst-case", copy, "--budgets", "1", "--starts", "1", "--against", "model")
    assert worst["worst_case"]["points"] == [0, 1]
    assert answered("completion", "bash")["script"].count("complete") > 1
    assert "step143000" in answered("checkpoints", "pythia")["checkpoints"]


def test_numbers_that_are_not_finite_are_null():
    given = {"a": [np.float64("nan"), float("inf"), 1.5], "b": Path("x"), "c": ("y", True, None)}
    assert to_json(given) == {"a": [None, None, 1.5], "b": str(Path.cwd() / "x"), "c": ["y", True, None]}


def test_an_error_of_ours_has_a_traceback_and_is_json_too(run, monkeypatch):
    def broken(arguments):
        print("in between")
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(cli.arguments.commands, "checkpoints", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["checkpoints", "x", "--json"])


# --- what is shown ---


def test_quiet_leaves_errors_and_the_result(run, finished):
    code, out, err = run("explain", finished / "run", "--quiet")
    assert (code, err) == (0, "")
    assert out.endswith("\nthe page to look at: explanation.html\n")
    code, out, err = run("explain", finished / "run", "--quiet", "--json")
    assert (json.loads(out)["ok"], err) == (True, "")
    told = "bigram-circuits: debug: wrote 'explanation.html'\n"
    assert run("explain", finished / "run", "--quiet", "--log-level", "debug")[2] == told
    assert run("evaluate", "nowhere", "--quiet")[2].startswith("bigram-circuits: error: ")


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], ["note: two", "warning: three", "error: four", "warning: five"]),
        (["--log-level", "debug"], ["debug: one", "note: two", "warning: three", "error: four", "warning: five"]),
        (["--log-level", "warning"], ["warning: three", "error: four", "warning: five"]),
        (["--log-level", "error"], ["error: four"]),
        (["--quiet"], ["error: four"]),
    ],
)
def test_what_the_package_logs_is_shown_by_level(run, monkeypatch, options, shown):
    def logging_command(arguments):
        for level, line in zip((10, 20, 30, 40), ("one", "two", "three", "four\x1b[2J"), strict=True):
            note(line, level)
        with progress(1, desc="working", unit="step", delay=0, mininterval=0) as bar:
            bar.update()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("five", InputWarning, stacklevel=1)
        return {}

    monkeypatch.setattr(cli.arguments.commands, "checkpoints", logging_command)
    monkeypatch.setattr("bigram_circuits.progress._TIMING", {})
    monkeypatch.setattr("bigram_circuits.progress._DELAY", 0.0)
    logger = logging.getLogger("bigram_circuits")
    before = (logger.level, [*logger.handlers])
    _, out, err = run("checkpoints", "x", "--json", *options)
    assert json.loads(out)["warnings"] == ["three", r"four\x1b[2J", "five"]
    expected = [f"bigram-circuits: {line}" for line in shown]
    assert [line.removesuffix(r"\x1b[2J") for line in err.splitlines() if "circuits" in line] == expected
    assert ("working" in err) == (options != ["--quiet"])
    assert (logger.level, logger.handlers) == before


def test_the_library_adds_no_handlers(caplog):
    assert logging.getLogger("bigram_circuits").handlers == []
    note("of a run")
    assert caplog.record_tuples == [("bigram_circuits", logging.WARNING, "of a run")]


# --- options from a file ---


def test_options_from_a_file(finished, monkeypatch, tmp_path):
    folder = tmp_path / "settings"
    folder.mkdir()
    (folder / "text.txt").write_text("a text")
    file = folder / "mine.toml"
    file.write_text(
        'model = "./m"\ncorpus = "text.txt"\nsparsity_weight = 5\nlayers = [0, 1]\nunits = ["head", "neuron"]\n'
        'replace = "mean"\nanalysis = false\nout = "mine"\ndevice = "cpu"\nfresh = true\nmax_steps = 7\n'
    )
    arguments = cli.arguments.parse(["find", "--config", str(file), "--max-steps", "9", "--seed", "3"])
    assert (arguments.model, arguments.corpus) == (str(folder / "m"), str(folder / "text.txt"))
    assert (arguments.out, arguments.device, arguments.fresh) == (folder / "mine", "cpu", True)
    assert (arguments.sparsity_weight, arguments.layers, arguments.units) == (5, (0, 1), ("head", "neuron"))
    assert (arguments.max_steps, arguments.seed, arguments.analysis) == (9, 3, False)
    file.write_text(
        'granularity = { attn = "head" }\nmodels = ["a/b", "Pythia-70M=./m"]\nsparsity_weights = [1, 2.5]\n'
    )
    arguments = cli.arguments.parse(["reproduce", "chang-bergen-2025", "--config", str(file)])
    assert arguments.models == ["a/b", f"Pythia-70M={folder / 'm'}"]
    assert (arguments.granularity, arguments.sparsity_weights) == ({"attn": "head"}, (1, 2.5))
    file.write_text("sizes = [0.1, 1]\ndraws = 2\n")
    arguments = cli.arguments.parse(["curves", "--config", str(file), "--draws", "3"])
    assert (arguments.sizes, arguments.draws, arguments.methods) == ((0.1, 1), 3, None)


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        (
            "find",
            "sparsity_wieght = 5",
            "'mine.toml': there is no option 'sparsity_wieght'; did you mean sparsity_weight?",
        ),
        ("find", 'sparsity_weight = "5"', "'mine.toml': sparsity_weight should be a number, not '5'"),
        ("find", "max_steps = 5.0", "'mine.toml': max_steps should be a whole number, not 5.0"),
        ("find", "max_steps = 0", "max_steps must be a whole number of at least 1, not 0"),
        ("find", "out = 3", "'mine.toml': out should be text, not 3"),
        ("find", "[recipe]\nmax_steps = 5", "'mine.toml': recipe should be text, not {'max_steps': 5}"),
        ("find", "draws = 3", "'mine.toml': there is no option 'draws'"),
        ("find", "json = true", "'mine.toml': there is no option 'json'"),
        ("ladder", "target_fraction = 0.1", "'mine.toml': there is no option 'target_fraction'"),
        ("curves", "draws = true", "'mine.toml': draws should be a whole number, not True"),
        ("find", "layers = [", "'mine.toml': Invalid value (at end of document)"),
        ("find", "a = " + "[" * 5000, "'mine.toml': "),
    ],
)
def test_what_a_file_cannot_say(run, tmp_path, command, text, said):
    (tmp_path / "mine.toml").write_text(text)
    code, out, err = run(command, "--config", "mine.toml")
    assert (code, out) == (2, "")
    assert err.startswith(f"bigram-circuits: error: {said}")
    assert err.count("\n") == 1


def test_a_file_that_cannot_be_read(run, tmp_path):
    for name in ("nowhere.toml", "."):
        code, _, err = run("find", "--config", name)
        assert (code, err.count("\n")) == (2, 1)
        assert f"cannot read {name!r}: " in err
    (tmp_path / "latin.toml").write_bytes(b"model = '\xe9'")
    with pytest.raises(FailedError, match=r"latin\.toml': .*codec can't decode"):
        read_config(tmp_path / "latin.toml", ["model"])


# --- the environment ---


def test_the_folder_of_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("BIGRAM_CIRCUITS_RUNS", raising=False)
    assert environment.runs_folder() == Path("runs")
    monkeypatch.setenv("BIGRAM_CIRCUITS_RUNS", "")
    assert environment.runs_folder() == Path("runs")
    monkeypatch.setenv("BIGRAM_CIRCUITS_RUNS", str(tmp_path / "mine"))
    assert environment.runs_folder() == tmp_path / "mine"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIGRAM_CIRCUITS_RUNS", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"^BIGRAM_CIRCUITS_RUNS should name a folder for runs, but .*file' is a file$"):
        environment.runs_folder()


def test_the_device_of_the_environment(run, finished, monkeypatch):
    monkeypatch.setenv("BIGRAM_CIRCUITS_DEVICE", "gpu")
    code, _, err = run("hooks", finished / "model")
    said = "BIGRAM_CIRCUITS_DEVICE: there is no device 'gpu': use cpu, cuda, or cuda:1 and the like"
    assert (code, err) == (1, f"bigram-circuits: error: {said}\n")
    assert run("hooks", finished / "model", "--device", "cpu")[0] == 0
    for name in ("cpu", ""):
        monkeypatch.setenv("BIGRAM_CIRCUITS_DEVICE", name)
        assert str(bc.load_model(finished / "model").cfg.device) == "cpu"


# --- completion ---


def completed(script, *line):
    """What bash offers for the last word of a line."""
    given = " ".join(f"'{word}'" for word in line)
    program = (
        f'source "{script}"; COMP_WORDS=({given}); COMP_CWORD={len(line) - 1}; _shtab_bigram_circuits 2> /dev/null; '
    )
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=script.parent).stdout.split()


def test_bash_completes(run, tmp_path):
    code, out, err = run("completion", "bash")
    assert (code, err) == (0, "")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.txt").write_text("")
    script = tmp_path / "completion.bash"
    script.write_text(out)
    assert completed(script, "bigram-circuits", "comp") == ["compare", "completion"]
    assert completed(script, "bigram-circuits", "find", "--sparsity-w") == ["--sparsity-weight", "--sparsity-weights"]
    assert completed(script, "bigram-circuits", "find", "--target", "n") == ["next-token", "ngram"]
    assert completed(script, "bigram-circuits", "evaluate", "mi") == ["mine"]  # a run is a folder
    assert sorted(completed(script, "bigram-circuits", "find", "--corpus", "mi")) == ["mine", "mine.txt"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script(run, shell):
    code, out, _ = run("completion", shell)
    assert code == 0
    assert "worst-case" in out


# --- a run that was moved ---


def test_a_moved_run_works_or_says_which_option_to_give(run, finished, tmp_path):
    moved, other = (shutil.copytree(finished / name, tmp_path / f"moved {name}") for name in ("run", "other"))
    for command in (["report", moved], ["compare", moved, other], ["explain", moved], ["export", moved, "--out", "a"]):
        assert run(*command)[0] == 0, command  # model and text are where they were
    away = (finished / "model").rename(tmp_path / "model"), (finished / "text.txt").rename(tmp_path / "text.txt")
    try:
        both, model = ["--model", away[0], "--corpus", away[1]], ["--model", away[0]]
        of_both = r"/model' and the corpus .*, which are no longer there: say with --model M and --corpus SOURCE where"
        of_model = r"/model', which is no longer there: say with --model M where to read it from"
        for name in ("evaluate", "analyze", "worst-case", "rivals"):
            code, _, err = run(name, moved)
            assert (code, err.count("\n")) == (1, 1)
            assert re.search(of_both, err), err
        assert re.search(of_both, run("same-function", moved, other)[2])
        assert "corpus '" in run("evaluate", moved, *model)[2]
        assert run("evaluate", moved, *both, "--random-seeds", "1")[0] == 0
        for command in (["explain", moved, "--token", "a"], ["export", moved, "--out", "m.npz"]):
            assert re.search(of_model, run(*command)[2])
            assert run(*command, *model)[0] == 0
    finally:
        for path in away:
            path.rename(finished / path.name)


def test_importing_the_command_line_needs_no_heavy_module():
    script = "import sys, bigram_circuits.cli; print({'torch', 'numpy', 'shtab', 'tqdm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
