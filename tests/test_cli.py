import html
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import bigram_circuits as bc
from bigram_circuits import cli, workflow
from bigram_circuits.analysis.prompts import start_of_text
from bigram_circuits.runs import RunFolder
from bigram_circuits.storage.files import checked_json, write_text
from scripts.state_numbers import NUMBERS, measured
from tests.conftest import UNFIT_INPUTS
from tests.example_runs import HOSTILE, hostile_atlas
from tests.folders import names_in

pytestmark = UNFIT_INPUTS
COMMAND = [sys.executable, "-m", "bigram_circuits.cli"]


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run a command in an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def text(tmp_path):
    """A file of text that a byte model can learn something of in a few steps."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} of a small text\n" + "\n" * (n % 7 == 0) for n in range(1500)))
    return path


@pytest.fixture
def quick(tiny_folders, text):
    """Arguments of a run of a few seconds."""
    options = ["--steps", "12", "--batch-size", "4", "--context-length", "32", "--random-seeds", "1", "--no-analysis"]
    options += ["--check-memory", "off"]  # the forecast takes longer than these steps; the main job is told one
    return ["find", tiny_folders["gpt_neox"], "--corpus", text, "--max-tokens", "10000", *options]


# --- the main job, as a new user does it ---


WHOLE = pytest.param((), id="whole", marks=pytest.mark.slow)
"""No argument at all, as `make run` does it: minutes, and therefore a step of its own in .ci/run."""
SHORTER = pytest.param(
    (
        "--beta-growth", "1.038", "--short-until", "0", "--batch-size", "8", "--context-length", "64",
        "--max-tokens", "60000", "--held-out", "0.1", "--random-seeds", "1",
    ),
    id="shorter",
)  # fmt: skip
"""Fewer and smaller steps, less and shorter text, and smaller samples for the analyses."""
SMALLER_SAMPLES = """
import functools, importlib, sys
from bigram_circuits import cli, workflow
workflow.analyze = functools.partial(workflow.analyze, tokens=2_000, sweep_tokens=250, fit_tokens=4_000)
importlib.import_module("bigram_circuits.analysis.sufficiency")._PERIOD = 8
importlib.import_module("bigram_circuits.analysis.suite").TOKENS_EXPLAINED = 24
sys.exit(cli.main())
"""


@pytest.fixture(scope="module", params=[SHORTER, WHOLE])
def main_job(tmp_path_factory, request):
    """`bigram-circuits find` in an empty folder."""
    folder = tmp_path_factory.mktemp("main_job")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    command = [sys.executable, "-c", SMALLER_SAMPLES] if request.param else COMMAND
    result = subprocess.run([*command, "find", *request.param], cwd=folder, capture_output=True, text=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert result.returncode == 0, result.stderr[-2000:]
    assert "warning" not in result.stderr  # its inputs fit
    (run_folder,) = (folder / "runs").iterdir()
    return bc.load_run(run_folder), result.stdout, max(before, peak) * 1024


def test_the_main_job_finds_the_bigram_subnetwork(main_job):
    run, _, _ = main_job
    found, full = run.metrics["subnetwork"], run.metrics["full"]
    assert found["surprisal_correlation"] >= 0.95
    assert found["fraction"] <= 0.10
    assert full["surprisal_correlation"] < found["surprisal_correlation"] - 0.1
    for control in ("random", "full_minus_random"):
        assert run.metrics[control]["mean"]["surprisal_correlation"] < found["surprisal_correlation"] - 0.1
    assert run.metrics["magnitude"]["surprisal_correlation"] < found["surprisal_correlation"] - 0.1
    rise = run.metrics["complement"]["mean_surprisal"] - full["mean_surprisal"]
    random_rise = run.metrics["full_minus_random"]["mean"]["mean_surprisal"] - full["mean_surprisal"]
    assert rise > 5 * random_rise
    assert run.outcome["stopped_because"] == "decided"
    assert run.cautions == ()


def test_its_weights_are_in_the_first_mlp_and_hardly_in_attention(main_job):
    counts = main_job[0].subnetwork.by_component()
    assert max(counts, key=lambda place: counts[place].kept) == (0, "mlp")
    attention = sum(count.kept for (_, component), count in counts.items() if component == "attn")
    assert attention < 0.1 * main_job[0].subnetwork.kept


def test_it_prints_what_the_files_hold(main_job):
    run, out, _ = main_job
    for name in ("subnetwork", "full", "empty", "complement", "random", "full - random", "magnitude", "Verdict"):
        assert re.search(rf"^{name}", out, re.MULTILINE), name
    assert f"{run.metrics['subnetwork']['surprisal_correlation']:.3f}" in out
    assert f"{run.subnetwork.kept:,}" in out
    assert "where the kept weights are" in out
    assert re.search(
        r"files in runs/reference-\w+/: analysis, config.json, metrics.json, progress.jsonl, report.html, subn", out
    )


@pytest.mark.parametrize("main_job", [WHOLE], indirect=True)
def test_it_measures_the_numbers_that_the_readme_and_the_docs_state(main_job):
    """docs/numbers.json, from which `scripts/state_numbers.py` writes the pages; tests/test_docs.py compares those."""
    stated, found = json.loads(NUMBERS.read_text()), measured(main_job[0])
    assert found["kept"] == pytest.approx(stated["kept"], rel=0.1)
    assert found["steps"] == pytest.approx(stated["steps"], rel=0.1)
    for name, row in found["r"].items():
        assert row == pytest.approx(stated["r"][name], abs=0.01)
        assert found["kl"][name] == pytest.approx(stated["kl"][name], rel=0.1)
        assert found["loss"][name] == pytest.approx(stated["loss"][name], rel=0.03)
    for name in ("full", "subnetwork", "complement", "random"):
        np.testing.assert_allclose(found[f"lens_{name}"], stated[f"lens_{name}"], atol=0.03)
    for key, tolerance in (("rise", 0.3), ("random_rise", 0.02), ("in_first_mlp", 0.05), ("in_attention", 0.03)):
        assert found[key] == pytest.approx(stated[key], abs=tolerance)
    for name in ("L2H2", "L3H3", "both"):
        assert found["induction"][name]["fall"] == pytest.approx(stated["induction"][name]["fall"], abs=1.0)
    assert found["largest"]["shared"] == pytest.approx(stated["largest"]["shared"], rel=0.15)
    assert found["explained"]["value"] == pytest.approx(stated["explained"]["value"], abs=0.3)


def test_its_analyses_tell_the_story_of_the_paper(main_job):
    """The first block turns the current token into the next, in the full model and in the subnetwork alike."""
    run, out, _ = main_job
    found = run.analyses
    lens, affine, cosine = found["logit_lens"], found["affine_lens"], found["cosine"]
    for name in ("full", "subnetwork"):
        r = lens.get("surprisal_correlation", name)
        assert r[1] > r[0] + 0.3  # one block makes it a prediction
        assert np.diff(r).argmax() == 0
        assert np.diff(cosine.get("target_unembedding", name)).argmax() == 0
        assert np.diff(cosine.get("current_embedding", name)).argmin() == 0
        assert (
            cosine.get("target_unembedding", name)[1:] > 3 * cosine.get("target_unembedding_baseline", name)[1:]
        ).all()
    full, alone = (lens.get("surprisal_correlation", name) for name in ("full", "subnetwork"))
    assert full[-1] < full[1] - 0.03  # later blocks of the full model go beyond the bigram,
    assert alone[-1] > alone[1] + 0.1  # the subnetwork's do not
    assert (affine.get("surprisal_correlation", "subnetwork")[1:] > 0.9).all()
    assert (lens.get("surprisal_correlation", "random") < 0.4).all()
    assert (lens.get("surprisal_correlation", "complement")[1:] < full[1:]).all()
    assert found["ablation_components"].top(1)[0][0] == "L0.mlp"
    assert re.search(r"r with the target \(logit lens\) changes most in block 0 \(full: .*block 0 \(subnetwork", out)
    for words in ("logit lens: r with the target's surprisals", "current token", "L0.mlp", "repeated random tokens"):
        assert words in out


def test_one_head_added_to_the_subnetwork_makes_it_continue_repetitions(main_job):
    induction = main_job[0].analyses["induction"]
    (head, fall), *_ = induction.top(1)
    assert fall > 0.3
    assert induction.get("random_fall")[head] < 0.2 * fall
    assert induction.get("p")[head] < 0.001


def test_it_stays_within_two_gigabytes(main_job):
    assert main_job[2] < 2e9


# --- small runs ---


def test_find_evaluate_and_find_again(run, quick):
    code, out, err = run(*quick, "--out", "mine")
    assert (code, err) == (0, "")
    assert names_in(Path("mine")) == [
        "config.json", "metrics.json", "progress.jsonl", "report.html", "subnetwork.safetensors", "training.json",
    ]  # fmt: skip
    assert "the page to look at: mine/report.html" in out
    metrics = Path("mine/metrics.json").read_text()
    assert json.loads(metrics)["random"]["seeds"][0]["seed"] == 0
    code, again, err = run("evaluate", "mine", "--random-seeds", "1")
    assert (code, err) == (0, "")
    assert Path("mine/metrics.json").read_text() == metrics
    table = again[: again.index("Verdict")]
    assert table in out
    code, out, err = run(*quick, "--out", "mine")
    assert code == 0
    assert "found before" in out
    assert Path("mine/metrics.json").read_text() == metrics


def test_the_same_command_uses_the_same_folder_and_another_one_another(run, quick):
    assert run(*quick)[0] == run(*quick)[0] == run(*quick, "--seed", "3")[0] == 0
    assert len(list(Path("runs").iterdir())) == 2


def test_target_fraction_and_recipes(run, quick):
    code, _, _ = run(*quick, "--target-fraction", "0.05", "--out", "a")
    assert code == 0
    run_a = bc.load_run("a")
    assert run_a.subnetwork.kept == round(0.05 * run_a.subnetwork.total)
    assert run(*quick, "--recipe", "paper", "--order", "3", "--out", "b")[0] == 0
    assert bc.load_run("b").settings["recipe"]["learning_rate"] == 5e-5


def test_methods_granularities_and_targets(run, quick):
    mixed = ["--granularity", "attn=head,mlp=weight", "--layers", "0,1", "--method", "hard_concrete"]
    assert run(*quick, *mixed, "--target", "model", "--out", "a")[0] == 0
    recipe = bc.load_run("a").settings["recipe"]
    assert recipe["granularity"] == {"attn": "head", "mlp": "weight"}
    assert (recipe.layers, recipe.method) == ((0, 1), "hard_concrete")
    code, out, err = run("evaluate", "a", "--random-seeds", "1")
    assert (code, err) == (0, "")
    assert "Verdict" in out
    assert (
        run(*quick, "--method", "straight_through", "--target-fraction", "0.1", "--target", "induced", "--out", "b")[0]
        == 0
    )
    assert run(*quick, "--granularity", "neuron", "--target", "next-token", "--out", "c")[0] == 0


def test_a_path_of_sparsity_weights(run, quick):
    code, out, err = run(*quick, "--sparsity-weights", "1,10,100", "--out", "path")
    assert (code, err) == (0, "")
    assert names_in(Path("path")) == ["path.json", "weight-1", "weight-10", "weight-100"]
    assert re.search(r"CPR\) -?\d\.\d{3}", out)
    assert run("evaluate", "path/weight-10", "--random-seeds", "1")[0] == 0


def test_hooks_lists_points_and_weights(run, tiny_folders):
    code, out, _ = run("hooks", tiny_folders["llama"])
    assert code == 0
    assert re.search(r"blocks\.0\.hook_out +batch pos d_model +batch pos 24 += blocks\.0\.hook_resid_post", out)
    assert re.search(r"blocks\.1\.attn\.W_K +head d_model d_head +2 24 6", out)


# --- mistakes: one line, exit code 1 or 2, nothing written ---


@pytest.fixture
def refused(run):
    def call(*arguments, code, said):
        before = sorted(Path().rglob("*"))
        got, _, err = run(*arguments)
        assert got == code, err
        assert said in err
        assert "Traceback" not in err
        if code == 1:
            assert err.count("\n") == 1, err
        assert sorted(Path().rglob("*")) == before

    return call


def test_wrong_arguments(refused):
    refused("find", "--sparsity-weight", "-3", code=2, said="'-3' is not a number of at least 0")
    refused("find", "--sparsity-weights", "1,2", "--target-fraction", "0.1", code=2, said="cannot be combined with")
    refused("find", "--target", "bigram", code=2, said="invalid choice: 'bigram'")
    refused("find", "--check-memory", "maybe", code=2, said="invalid choice: 'maybe'")
    refused("find", "--target-fraction", "1.5", code=2, said="target_fraction must be above 0 and at most 1, not 1.5")
    refused("find", "--granularity", "word", code=2, said="granularity must be one of weight, neuron, head, block")
    refused("find", "--granularity", "attn=neuron", code=2, said="granularity of attn must be one of")
    refused("find", "--sparsity-weights", "5", code=2, said="'5' is not a list of at least two different numbers")
    refused("find", "--method", "straight_through", code=2, said="say how many with target_fraction")
    refused("find", "--layers", "one", code=2, said="'one' is not a whole number")
    refused("find", "--steps", "0", code=2, said="'0' is not a whole number of at least 1")
    refused("find", "--order", "4", code=2, said="order must be 1, 2 or 3 (or more with an index), not 4")
    refused("dance", code=2, said="invalid choice: 'dance'")
    refused("analyse", "runs/mine", code=2, said="did you mean analyze?")
    refused("find", "--target", "ngrams", code=2, said="did you mean ngram?")
    refused("find", "--sparsityweight=5", code=2, said="--sparsityweight=5; did you mean --sparsity-weight?")
    refused("evaluate", "runs/mine", "--random-seed2", "1", code=2, said="did you mean --random-seeds?")
    refused("find", "--xyzzy", code=2, said="unrecognized arguments: --xyzzy\n")
    refused(code=2, said="required")


def test_things_that_are_not_there(refused, tiny_folders, tmp_path):
    refused("find", "./nowhere", code=1, said=f"there is no model folder {os.path.abspath('nowhere')!r}")
    refused("find", tiny_folders["gpt2"], "--corpus", "missing.txt", code=1, said="no file or folder 'missing.txt'")
    refused("evaluate", "nothing", code=1, said="holds no run")
    refused("hooks", tmp_path, code=1, said="has no config.json")


def test_what_the_model_does_not_have_is_said_before_the_text_is_read(refused, tiny_folders, monkeypatch, text):
    monkeypatch.setattr(workflow, "load_corpus", lambda *_, **__: pytest.fail("the text is read"))
    model = tiny_folders["gpt2"]
    refused("find", model, "--corpus", text, "--layers", "9", code=1, said="there is no layer 9: layers are 0 to 1")
    refused("find", model, "--layers", "0,9", "--out", "mine", code=1, said="there is no layer 9")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda", "the device 'cuda' is not here: PyTorch finds no CUDA device; use cpu (--device cpu)"),
        ("cuda:3", "the device 'cuda:3' is not here"),
        ("gpu", "there is no device 'gpu': use cpu, cuda, or cuda:1"),
    ],
)
def test_a_device_that_is_not_here(refused, tiny_folders, monkeypatch, device, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused("hooks", tiny_folders["gpt2"], "--device", device, code=1, said=said)


def test_a_model_whose_weights_are_nan_is_not_told_to_try_float32(refused, tiny_folders, text, tmp_path, quick):
    model = AutoModelForCausalLM.from_pretrained(tiny_folders["gpt_neox"])
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    for file in tiny_folders["gpt_neox"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "nan")
    with pytest.raises(ValueError, match=r"its weights hold NaN or infinity .*layers\.1\.mlp.* are damaged") as error:
        bc.study(tmp_path / "nan", text, context_length=16, max_tokens=20_000, max_steps=2, analysis=False)
    assert "float32" not in str(error.value)


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C"}]
)
def test_output_in_a_legacy_encoding(environment):
    script = "import sys; from bigram_circuits import cli; from bigram_circuits.cli import commands; "
    script += "commands.checkpoints = lambda _: print('Größe ▁the → …') or {}; "
    script += "sys.argv[1:] = ['checkpoints', 'ñ→']; cli.run()"
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"the" in done.stdout


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [("2>&1 | head -n 1 >&2", 1, ""), (">&-", 0, ""), ("> /dev/full", 1, "No space left on device")],
)
def test_output_that_nobody_reads(redirection, code, said):
    program = "from bigram_circuits import cli; from bigram_circuits.cli import commands; "
    program += "commands.checkpoints = lambda _: [print(n) for n in range(100_000)] and {}; "
    command = f'{sys.executable} -c "{program}cli.run()" checkpoints pythia'
    script = f"{{ ( {command}; echo code $? >&3 ) {redirection}; }} 3>&1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert f"code {code}" in done.stdout
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert said in done.stderr


def test_no_network(run, no_network, tiny_folders):
    code, _, err = run("find", "EleutherAI/pythia-70m")
    assert code == 1
    assert err.count("\n") == 1
    assert "cannot reach the model hub" in err
    code, _, err = run("find", tiny_folders["gpt2"], "--corpus", "some:dataset")
    assert code == 1
    assert err.count("\n") == 1
    assert "'some:dataset' is neither a file or folder here nor a dataset that could be loaded" in err


def test_text_that_cannot_be_used(refused, tiny_folders, tmp_path):
    model = tiny_folders["gpt2"]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes("déjà vu\n".encode("latin-1") * 500)
    refused("find", model, "--corpus", "empty.txt", code=1, said="'empty.txt'")
    refused("find", model, "--corpus", "one.txt", code=1, said="'one.txt'")
    refused("find", model, "--corpus", "latin.txt", code=1, said="is not UTF-8 text (byte 0xe9")


def test_an_output_folder_that_cannot_be_used(run, refused, quick, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    refused(*quick, "--out", "file", code=1, said="'file' is a file, but a run needs a folder")
    refused(*quick, "--out", "full", code=1, said="'full' is not empty and holds no run")
    refused(*quick, "--out", "/proc/nowhere/run", code=1, said="cannot write '/proc/nowhere/run/")
    assert run(*quick, "--out", "mine")[0] == 0
    refused(*quick, "--out", "mine", "--seed", "9", code=1, said="'mine' holds another run (its recipe.seed is 0")


def test_a_mask_of_another_model(run, refused, quick, tiny_folders):
    assert run(*quick, "--out", "mine")[0] == 0
    refused("evaluate", "mine", "--model", tiny_folders["gpt2"], code=1, said="was made with")


def test_a_run_made_from_objects_is_evaluated_in_python(refused, tiny_model, tokenizer, tmp_path):
    corpus = bc.load_corpus(["some text " * 40] * 2 + ["other text " * 40] * 2, tokenizer=tokenizer, context_length=16)
    target = bc.count_ngrams(corpus.train, d_vocab=257)
    bc.find_subnetwork(tiny_model, target, corpus, bc.SparsifyConfig(max_steps=2), run_dir=tmp_path / "mine")
    asks = "was made in Python from objects, which have no names: say with --model M and --corpus SOURCE where to read"
    refused("evaluate", "mine", code=1, said=asks)
    refused("analyze", "mine", code=1, said=asks)


def test_a_run_made_in_python_of_named_things_is_one_of_the_command_line(
    run, refused, tiny_folders, tmp_path, monkeypatch
):
    """Model and text were loaded by name: all of them are recorded, and checked when they are loaded again."""
    Path("text.txt").write_text("\n\n".join(f"passage {n}: some text of it, and more " * 60 for n in range(24)))
    model = bc.load_model(os.path.relpath(tiny_folders["gpt_neox"]), device="cpu")
    corpus = bc.load_corpus("text.txt", tokenizer=model.tokenizer, context_length=16, held_out=0.2, max_tokens=20_000)
    config, target = bc.SparsifyConfig(max_steps=2), bc.count_ngrams(corpus.train, order=3, d_vocab=257)
    found = bc.find_subnetwork(model, target, corpus, config, run_dir="mine", check_memory="off")
    own = bc.evaluate(model, found, target, corpus.held_out, seeds=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("evaluate", "../mine", "--random-seeds", "1")[0] == 0
    again = bc.load_run("../mine")
    assert repr(again.evaluation.subnetwork) == repr(own.subnetwork)
    assert (again.rebuild.order, again.rebuild.context_length, again.rebuild.held_out) == (3, 16, 0.2)
    assert run("report", "../mine")[0] == 0
    # what cannot be made again from names is refused when it is tried
    other = bc.count_ngrams(corpus.held_out, d_vocab=257)
    bc.find_subnetwork(model, other, corpus, config, run_dir="other", check_memory="off")
    refused("evaluate", "other", code=1, said="cannot be made again from its names")
    nameless = bc.RenamedTarget(target, 257)
    bc.find_subnetwork(model, nameless, corpus, config, run_dir="third", check_memory="off")
    refused("evaluate", "third", code=1, said="with the target RenamedTarget, which has no name: go on in Python")


def test_a_context_length_beyond_the_model_is_refused_before_tokenising(refused, tiny_folders, monkeypatch):
    monkeypatch.setattr("bigram_circuits.workflow.load_corpus", lambda *_, **__: pytest.fail("it was tokenised"))
    said = "sequences of 65 tokens are longer than this model's context of 64: give a --context-length of at most that"
    refused("find", str(tiny_folders["gpt2"]), "--context-length", "65", "--out", "long", code=1, said=said)
    assert not Path("long").exists()


def test_ctrl_c_says_what_was_kept_and_the_same_command_continues(quick, tmp_path):
    arguments = [str(argument) for argument in quick]
    arguments[arguments.index("--steps") + 1] = "2000"
    command = [*COMMAND, *arguments, "--learning-rate", "1e-6", "--out", "mine"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    progress = tmp_path / "mine" / "progress.jsonl"
    deadline = time.monotonic() + 120
    while not (progress.exists() and progress.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert re.search(r"interrupted after step \d+ of at most 2000; its state is kept in 'mine'", last)
    assert (tmp_path / "mine" / "checkpoint" / "state.safetensors").exists()
    assert "Traceback" not in err


def test_help_needs_no_heavy_import():
    script = "import sys; from bigram_circuits.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'transformer_lens', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.rstrip().endswith("[]")


def test_the_installed_command_answers():
    command = Path(sys.executable).with_name("bigram-circuits")
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("bigram-circuits 0.")
    assert shutil.which(command) is not None
    assert os.access(command, os.X_OK)


def test_find_tries_to_refute_what_it_found(run, quick):
    fast = ["--steps", "3", "--falsify", "--falsify-seeds", "2"]
    code, out, _ = run(*quick, "--out", "mine", "--no-analysis", *fast)
    assert code == 0
    assert "re-initialised blocks" in out
    tried = bc.load_falsification("mine/falsify")
    assert tried.verdict in out
    assert tried.controls.get("kl")["found"] == bc.load_run("mine").metrics["subnetwork"]["kl"]
    attempts = {path.name for path in Path("mine/falsify").iterdir() if path.is_dir()}
    kept = bc.load_run("mine").subnetwork.kept
    assert {"trained-no-penalty", *(f"{name}-at-{kept}-weights" for name in ("nonsense-target", "seed-2"))} < attempts
    assert len(attempts) == 16
    assert set(tried.stricter.same) >= {"seed-1", "seed-2"}
    assert tried.stricter.rivals.masks[0] == bc.load_run("mine").mask
    assert tried.says[0].split(";")[0] in html.unescape(Path("mine/report.html").read_text())


def test_the_mask_of_a_run_is_tested_harder(run, refused, quick):
    found = [*quick, "--target", "model", "--target-fraction", "0.2", "--steps", "2"]
    assert run(*found, "--out", "mine")[0] == run(*found, "--seed", "1", "--out", "other")[0] == 0
    refused("worst-case", "mine", "--budgets", "0", code=2, said="'0' is not a list of numbers of steps, as in 0,1,4")
    refused("worst-case", "mine", "--against", "modl", code=2, said="did you mean model?")
    refused("rivals", "mine", "--k", "1", code=2, said="'1' is not a whole number of at least 2")
    refused("same-function", "mine", code=2, said="the following arguments are required: other_run")
    refused("same-function", "mine", "nowhere", code=1, said="'nowhere' holds no run")
    code, out, _ = run("worst-case", "mine", "--budgets", "1", "--starts", "1", "--against", "model")
    assert code == 0
    assert re.search(r"^worst case +\d", out, re.MULTILINE)
    code, out, _ = run("rivals", "mine", "--k", "2", "--overlap-weight", "5")
    assert code == 0
    assert "weight 5: rival 1" in out
    code, out, _ = run("same-function", "mine", "other", "--tokens", "64", "--out", "copy")
    assert code == 0
    assert "files in copy/falsify/stricter/\nthe page to look at: copy/report.html" in out
    tests = bc.load_stricter("mine/falsify/stricter", bc.load_run("mine"))
    assert tests.worst_case.points == (0, 1)
    assert "against" not in tests.worst_case.notes  # it is what the mask was learned for
    assert tests.rivals.masks[0] == bc.load_run("mine").mask
    assert bc.load_stricter("copy/falsify/stricter", bc.load_run("copy")).same["other"].says in out
    earlier = Path(__file__).parent / "data" / "run-0.1.0"
    refused("same-function", "mine", earlier, code=1, said="is of another model")


@pytest.mark.slow
def test_a_worst_case_that_says_nothing_is_refused(run, refused, quick):
    run(*quick, "--steps", "2", "--target-fraction", "0.5", "--out", "mine")
    refused("worst-case", "mine", code=1, said="ask for the model's own predictions (ModelTarget, --against model)")
    code, out, _ = run("worst-case", "mine", "--budgets", "1", "--starts", "1", "--force")
    assert code == 0
    assert "so this says nothing about what was dropped" in out
    assert run("worst-case", "mine", "--budgets", "1", "--starts", "1", "--against", "model")[0] == 0
    assert bc.load_stricter("mine/falsify/stricter").worst_case.notes["against"] == "model"


def test_analyze_writes_every_result(run, quick):
    run(*quick, "--out", "mine")
    Path("mine/analysis").mkdir()
    Path("mine/analysis/old.json").write_text("{}")
    code, out, err = run("analyze", "mine", "--tokens", "400")
    assert code == 0
    assert "analysing" in err or not err  # a progress bar, on a slow machine
    names = {path.stem for path in Path("mine/analysis").iterdir()}
    assert names >= {"logit_lens", "affine_lens", "cosine", "rotations", "covariance", "ablation_heads", "by_layer"}
    assert "old" not in names
    assert "induction" not in names
    assert "cannot continue repeated random tokens" in out
    assert not Path("mine/.analysis.new").exists()
    assert run("report", "mine")[:2] == (0, "mine/report.html\n")
    assert "<h1" in Path("mine/report.html").read_text()
    analyses = bc.load_run("mine").analyses
    assert {*analyses, "left_out", "atlas"} == names
    assert bc.load_run("mine").atlas.explanations
    assert ", atlas\n" in out
    assert "induction" in bc.load_run("mine").left_out
    lens = analyses["logit_lens"]
    assert lens.table("surprisal_correlation") in out
    assert all(result.plot() is not None and len(result.to_dataframe()) for result in analyses.values())
    assert run("analyze", "nowhere")[0] == 1


# --- explain ---


@pytest.fixture(scope="module")
def finished(tiny_folders, tmp_path_factory):
    """A run of a tiny model, not analysed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text("".join(f"line {n} of a small text\n" + "\n" * (n % 7 == 0) for n in range(300)))
    bc.study(
        tiny_folders["gpt_neox"], folder / "text.txt", out=folder / "run", context_length=16, analysis=False,
        random_seeds=1, check_memory="off", max_steps=3, batch_size=4, device="cpu",
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def with_atlas(finished, tmp_path):
    """A copy of it with an atlas, in which a token is markup."""
    copy = shutil.copytree(finished, tmp_path / "with atlas")
    made = hostile_atlas()
    made.save(copy / "analysis" / "atlas.json", RunFolder(copy).origin(bc.load_run(copy).settings.corpus))
    return copy, made


def test_explain_a_token(run, finished, tiny_folders):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    code, out, err = run("explain", finished, "--token", "f")
    assert (code, err) == (0, "")
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    kept = bc.load_run(finished).subnetwork
    (number,) = model.tokenizer("f", add_special_tokens=False)["input_ids"]
    expected = bc.explain(model, kept, [*start_of_text(model), number])
    assert out == f"{expected}\n\nthe page to look at: explanation.html\n"
    assert Path("explanation.html").read_text() == expected.to_html()
    assert names_in(Path()) == ["explanation.html"]
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert number > 9
    assert run("explain", finished, "--token", number, "--out", "again.html")[1].startswith(f"{expected}\n")


def test_explain_a_prompt_an_answer_and_the_full_model(run, finished, tiny_folders):
    prompt = ["--prompt", "line 1", "--position", "-2", "--answer", "i", "--wrong", "n"]
    code, out, err = run("explain", finished, *prompt, "--out", "a.html", "--graph", "a.json")
    assert (code, err) == (0, "")
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    kept = bc.load_run(finished).subnetwork
    expected = bc.explain(model, kept, "line 1", "i", wrong="n", position=-2)
    assert out == f"{expected}\n\nthe graph: a.json\nthe page to look at: a.html\n"
    assert "The logit of 'i' minus logit of 'n' is" in out
    assert Path("a.html").read_text() == expected.to_html()
    graph = json.loads(Path("a.json").read_text())
    assert graph["metadata"]["prompt_tokens"] == list(expected.prompt)
    assert len(graph["links"]) == len(expected.edges)
    code, out, err = run("explain", finished, *prompt, "--full")
    assert (code, err) == (0, "")
    assert out.startswith(f"{bc.explain(model, None, 'line 1', 'i', wrong='n', position=-2)}\n")
    assert "with only" not in out


def test_explain_without_a_prompt_is_the_atlas(run, with_atlas):
    folder, made = with_atlas
    code, out, err = run("explain", folder)
    assert (code, err) == (0, "")
    assert out == f"{made.title}\nthe page to look at: explanation.html\n"
    text = Path("explanation.html").read_text()
    assert text == bc.load_run(folder).atlas.to_html()
    assert HOSTILE not in text
    assert html.escape(HOSTILE) in text


def test_what_cannot_be_explained(refused, finished, with_atlas):
    explain = "explain", finished
    refused(*explain, code=1, said="has no atlas: give --prompt or --token, or `analyze` it first")
    refused("explain", "nowhere", code=1, said="'nowhere' holds no run")
    refused(*explain, "--token", "of", code=1, said="'of' is 2 tokens, but one is needed: give the id of one of [")
    refused(*explain, "--prompt", "", code=1, said="the prompt is empty")
    refused(
        *explain, "--prompt", "abc", "--position", "7", code=1, said="there is no position 7 in a prompt of 3 tokens"
    )
    refused(*explain, "--prompt", "abc", "--position", "one", code=2, said="invalid int value: 'one'")
    refused(*explain, "--token", "a", "--prompt", "b", code=2, said="not allowed with argument")
    refused(*explain, "--token", "a", "--model", "./nowhere", code=1, said="there is no model folder")
    for options in (["--answer", "a"], ["--wrong", "a"], ["--full"], ["--graph", "a.json"], ["--position", "0"]):
        said = f"{options[0]} is for one prompt: give --prompt or --token"
        refused(*explain, *options, code=1, said=said)
        refused("explain", with_atlas[0], *options, code=1, said=said)


def test_where_an_explanation_cannot_be_written_nothing_is(refused, finished, with_atlas, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    token = "explain", finished, "--token", "a"
    refused("explain", with_atlas[0], "--out", "folder", code=1, said="'folder' is a folder: name a file in it")
    for option, other in (("--out", "--graph"), ("--graph", "--out")):
        refused(*token, option, "folder", other, "good", code=1, said="'folder' is a folder: name a file in it")
    refused(*token, "--graph", "file/a", code=1, said="cannot write 'file/a'")
    refused(*token, "--out", "same", "--graph", "same", code=1, said="--out and --graph are both 'same'")


def test_an_atlas_that_could_not_be_made_says_why(refused, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    of = RunFolder(copy).origin(bc.load_run(copy).settings.corpus)
    record = {"atlas": "this model has no readout", "of": of.to_json()}
    write_text(copy / "analysis" / "left_out.json", checked_json(record))
    refused("explain", copy, code=1, said="has no atlas (this model has no readout): give --prompt or --token")


def test_an_explanation_of_another_model_is_refused(refused, finished, tiny_folders):
    refused("explain", finished, "--token", "a", "--model", tiny_folders["gpt2"], code=1, said="was made with")
