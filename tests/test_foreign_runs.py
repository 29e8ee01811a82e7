"""Runs from elsewhere: of other runs' files, of links, of names that are not the user's, of another text, read-only."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.evaluation import Evaluation
from bigram_circuits.experiments.comparison import compare
from bigram_circuits.learning import training
from bigram_circuits.report.page import page
from bigram_circuits.runs import CorpusIdentity, RunFolder
from bigram_circuits.storage.files import checked_json, read_checked_json, write_text
from bigram_circuits.storage.origin import is_signed, sign
from bigram_circuits.subnetwork import Subnetwork
from bigram_circuits.workflow import reopen
from tests.conftest import UNFIT_INPUTS
from tests.example_runs import curves, make_run, measured, without_libraries
from tests.fuzzing import some_atlas

pytestmark = UNFIT_INPUTS
RECIPE = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.3}


def masks(kept):
    return Subnetwork({"blocks.0.mlp.W_in": torch.arange(14).view(2, 7) < kept}, model_name="model/x")


def fresh(folder, **options):
    """A run that was evaluated and analysed; its numbers are those of a subnetwork that keeps 2 of 14."""
    found = {"logit_lens": curves("surprisal_correlation", "kl")}
    given = {"metrics": measured(), "found": found, "subnetwork": masks(2), "atlas": some_atlas()}
    return make_run(folder, **(given | options))


def read(folder):
    """Everything that a run's folder holds."""
    run = bc.load_run(folder)
    return run, run.analyses, run.left_out, run.atlas


# --- files of different runs ---


def test_a_file_of_another_run_of_the_same_model_is_refused_with_what_to_do(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        other = Subnetwork({"blocks.0.mlp.W_in": torch.arange(14).view(2, 7) % 7 == seed}, model_name="model/x")
        run = make_run(
            tmp_path / name, metrics=measured(), subnetwork=other, recipe=bc.SparsifyConfig(seed=seed),
            found={"logit_lens": curves("surprisal_correlation", "kl")},
        )  # fmt: skip
    remedies = {
        "config.json": "put back", "training.json": "put back|progress", "subnetwork.safetensors": "put back",
        "metrics.json": "writes it again", "analysis": "writes it again",
    }  # fmt: skip
    for name, remedy in remedies.items():
        mixed = Path(shutil.copytree(tmp_path / "one", tmp_path / f"mixed {name}"))
        if name == "analysis":
            shutil.rmtree(mixed / name)
            shutil.copytree(tmp_path / "two" / name, mixed / name)
        else:
            shutil.copy(tmp_path / "two" / name, mixed / name)
        with pytest.raises(ValueError, match=remedy) as told:
            read(mixed)
        assert "\n" not in str(told.value)
        assert "does not belong to this run" in str(told.value)
    copied = Path(shutil.copytree(run.path, tmp_path / "copied"))
    assert bc.load_run(copied).subnetwork == run.subnetwork


def test_files_of_one_mask_in_two_runs_are_told_apart_too(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        fresh(tmp_path / name, recipe=bc.SparsifyConfig(seed=seed))
    for name in ("metrics.json", "training.json", "analysis/logit_lens.json", "analysis/atlas.json"):
        before = (tmp_path / "one" / name).read_bytes()
        shutil.copy(tmp_path / "two" / name, tmp_path / "one" / name)
        with pytest.raises(ValueError, match="does not belong to this run: it is of another run"):
            read(tmp_path / "one")
        (tmp_path / "one" / name).write_bytes(before)
    read(tmp_path / "one")


def test_find_does_not_take_a_mask_of_another_run_for_its_own(tiny_model, tmp_path):
    corpus = bc.load_corpus(["abcabdabe" * 40, "cabbadab" * 40] * 8, tokenizer=tiny_model.tokenizer, context_length=16)
    configs = {name: bc.SparsifyConfig(seed=seed, **RECIPE) for seed, name in enumerate(("one", "two"))}
    target = bc.count_ngrams(corpus.train, 2, d_vocab=257)
    for name, config in configs.items():
        bc.find_subnetwork(tiny_model, target, corpus, config, run_dir=tmp_path / name)
    shutil.copy(tmp_path / "two" / "subnetwork.safetensors", tmp_path / "one" / "subnetwork.safetensors")
    with pytest.raises(ValueError, match="does not belong to this run: it is of another subnetwork"):
        bc.find_subnetwork(tiny_model, target, corpus, configs["one"], run_dir=tmp_path / "one")


def test_a_seal_that_is_missing_or_says_nothing_is_refused(tmp_path):
    run = fresh(tmp_path / "run")
    files = ("config.json", "training.json", "metrics.json", "analysis/logit_lens.json", "analysis/atlas.json")
    for name in files:
        path = run.path / name
        before = path.read_text()
        path.write_text(before.replace('"checksum"', '"checksun"'))
        with pytest.raises(ValueError, match="it has no checksum"):
            read(run.path)
        if name != "config.json":
            record = json.loads(before)
            for key in ("of", "checksum"):
                del record[key]
            path.write_text(checked_json(record))
            with pytest.raises(ValueError, match="it does not say which run it is of"):
                read(run.path)
        path.write_text(before)
    data = (run.path / "subnetwork.safetensors").read_bytes()
    for key in (b'"header_checksum"', b'"checksum"'):
        (run.path / "subnetwork.safetensors").write_bytes(data.replace(key, key.replace(b"m", b"n")))
        with pytest.raises(ValueError, match="is damaged: its header"):
            bc.load_run(run.path)


def test_an_atlas_comes_back_and_a_damaged_one_is_named(tmp_path):
    run = fresh(tmp_path / "run")
    assert run.atlas == some_atlas()
    assert "logit_lens" in run.analyses
    assert "atlas" not in run.analyses
    path = run.path / "analysis" / "atlas.json"
    path.write_text(path.read_text().replace("GPT-2", "GPT-3"))
    for attempt in (lambda: run.atlas, lambda: page(run)):
        with pytest.raises(ValueError, match=r"analysis/atlas\.json' is not an atlas that can be read: .*checksum"):
            attempt()
    path.unlink()
    assert run.atlas is None


def test_metrics_of_another_number_of_weights_are_refused_even_without_a_name_of_their_run(tmp_path):
    run = Path(shutil.copytree(Path(__file__).parent / "data" / "run-0.1.0", tmp_path / "run"))
    record = read_checked_json(run / "metrics.json")
    record["subnetwork"]["kept"] += 1
    write_text(run / "metrics.json", checked_json(record))
    with pytest.raises(ValueError, match="it is of a subnetwork that keeps 238 of 448 weights"):
        bc.load_run(run)


# --- links, pipes and folders in a run's folder ---


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "training.json", "metrics.json", "progress.jsonl", "subnetwork.safetensors", "report.html",
        "lock.json", ".lock", ".lock.soft", "analysis", "analysis/logit_lens.json", "analysis/atlas.json",
        ".analysis.new", ".analysis.old", "falsify", "seeds", "checkpoint",
    ],
)  # fmt: skip
def test_a_link_in_a_run_s_folder_is_refused_and_what_it_leads_to_is_left_alone(tmp_path, name, capfd):
    run = fresh(tmp_path / "run")
    path, elsewhere = run.path / name, tmp_path / "elsewhere"
    if path.is_dir() or name in ("falsify", "seeds", "checkpoint", ".analysis.new", ".analysis.old"):
        elsewhere.mkdir()
        (elsewhere / ".state.safetensors.abcd1234").write_text("mine")
        shutil.rmtree(path, ignore_errors=True)
    else:
        elsewhere.write_bytes(path.read_bytes() if path.exists() else b"mine")
        path.unlink(missing_ok=True)
    before = sorted((one, one.read_bytes()) for one in [elsewhere, *elsewhere.rglob("*")] if one.is_file())
    path.symlink_to(elsewhere)
    assert cli.main(["report", str(run.path)]) == 1
    err = capfd.readouterr().err
    assert f"{name}' is a symbolic link, which is not followed: replace it by what it leads to" in err
    assert err.count("\n") == 1
    assert sorted((one, one.read_bytes()) for one in [elsewhere, *elsewhere.rglob("*")] if one.is_file()) == before
    assert path.is_symlink()


def test_a_link_to_nowhere_creates_nothing(tmp_path, capfd):
    run = fresh(tmp_path / "run")
    for name in ("report.html", "lock.json", ".lock", "analysis"):
        path = run.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to(tmp_path / "nowhere")
        assert cli.main(["report", str(run.path)]) == 1
        path.unlink()
    assert not (tmp_path / "nowhere").exists()


def test_a_run_s_folder_may_itself_be_a_link(tmp_path):
    fresh(tmp_path / "large disk" / "run")
    (tmp_path / "run").symlink_to(tmp_path / "large disk" / "run")
    assert cli.main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("what", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, what):
    run = fresh(tmp_path / "run")
    for name in ("config.json", "training.json", "metrics.json", "progress.jsonl", "subnetwork.safetensors",
                 "analysis/logit_lens.json", "analysis/left_out.json", "analysis/atlas.json", "lock.json",
                 "report.html"):  # fmt: skip
        path = run.path / name
        before = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        if what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        else:
            try:
                os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
            except PermissionError:
                pytest.skip("only root may make a device")
        if path.name in (
            "left_out.json",
            "atlas.json",
            "lock.json",
            "progress.jsonl",
            "metrics.json",
            "report.html",
        ):  # may be absent
            read(run.path)
        else:
            with pytest.raises((ValueError, OSError)) as told:
                read(run.path)
            assert "\n" not in str(told.value)
        path.rmdir() if what == "folder" else path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert bc.load_run(run.path).history == run.history


def test_a_history_larger_than_any_run_writes_is_not_read(tmp_path):
    run = fresh(tmp_path / "run")
    os.truncate(run.path / "progress.jsonl", 3 << 30)
    with pytest.raises(ValueError, match="it has more than the 67,108,864 bytes that are read; remove the file"):
        bc.load_run(run.path)


# --- a folder that may only be read ---


def test_a_run_that_may_only_be_read_is_read_and_reported_on(tmp_path, capsys):
    run = fresh(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in [run.path, *run.path.rglob("*")]}
    for path in (run.path / "analysis", run.path):
        path.chmod(0o500)
    try:
        assert bc.load_run(run.path).history == run.history
        assert cli.main(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    finally:
        for path in (run.path, run.path / "analysis"):
            path.chmod(0o700)
    assert "subnetwork of model/x" in (tmp_path / "page.html").read_text()
    assert {path: path.stat().st_mtime_ns for path in [run.path, *run.path.rglob("*")]} == before  # root may write


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_where_the_page_can_go_is_said_if_the_folder_may_only_be_read(tmp_path, monkeypatch, capfd, error):
    run = fresh(tmp_path / "run")

    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert cli.main(["report", str(run.path)]) == 1
    assert "write the page to another place with --out FILE" in capfd.readouterr().err


# --- names in a run that somebody else made ---


@pytest.fixture(scope="module")
def own(tiny_folders, tmp_path_factory):
    """A run from the command line, of a local model and a local text."""
    folder = tmp_path_factory.mktemp("own")
    text = "".join(f"line {n} of a small text\n" + "\n" * (n % 7 == 0) for n in range(300))
    (folder / "text.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "forecast_memory", lambda *_, **__: None)
        bc.study(
            tiny_folders["gpt_neox"], folder / "text.txt", out=folder / "run", context_length=16, analysis=False,
            random_seeds=1, check_memory="off", **RECIPE,
        )  # fmt: skip
    return folder


@pytest.fixture
def copied(own, tmp_path):
    return Path(shutil.copytree(own / "run", tmp_path / "run"))


def evaluated(*arguments):
    return cli.main(["evaluate", *map(str, arguments), "--random-seeds", "1", "--device", "cpu"])


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Another machine, or another user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_one_s_own_run_goes_on_without_a_word_also_when_it_is_moved(own, copied):
    before = read_checked_json(copied / "metrics.json")
    assert bc.load_run(copied).made_here
    assert evaluated(copied) == 0
    assert read_checked_json(copied / "metrics.json") == before


@pytest.mark.usefixtures("elsewhere")
def test_nothing_that_somebody_else_s_run_names_is_opened_unless_it_is_said_again(
    own, copied, capfd, tmp_path, monkeypatch
):
    run = bc.load_run(copied)
    assert not run.made_here
    with monkeypatch.context() as patch:
        for name in ("workflow.load_model", "workflow.load_corpus", "models.loading.load_model"):
            patch.setattr(f"bigram_circuits.{name}", lambda *_, **__: pytest.fail("it was opened"))
        refused(copied, run, capfd, tmp_path)
    names = "--model", run.rebuild.model, "--corpus", own / "text.txt"
    assert evaluated(copied, *names) == 0
    assert evaluated(copied, *names[:2]) == 1
    assert bc.load_run(copied).evaluation.subnetwork == run.evaluation.subnetwork


def refused(copied, run, capfd, tmp_path):
    for command in ("evaluate", "analyze", "export", "explain"):
        more = {"export": ["--out", str(tmp_path / "exported")], "explain": ["--token", "a"]}.get(command, [])
        assert cli.main([command, str(copied), *more]) == 1
        err = capfd.readouterr().err
        assert (
            f"was not made by you on this machine, so the names in it are not opened: if you want them to be, add "
            f"--model {run.rebuild.model}" in err
        )
        assert ("--corpus" in err) == (command in ("evaluate", "analyze"))
        assert err.count("\n") == 1


def test_a_config_that_was_changed_is_not_one_s_own(own, copied):
    config = read_checked_json(copied / "config.json")
    config["rebuild"]["corpus"] = "/etc/passwd"
    write_text(copied / "config.json", checked_json(config))
    training = read_checked_json(copied / "training.json")
    training["of"]["run"] = RunFolder(copied).id
    write_text(copied / "training.json", checked_json(training))
    (copied / "metrics.json").unlink()
    assert not bc.load_run(copied).made_here
    with pytest.raises(ValueError, match=r"add .*--corpus /etc/passwd"):
        reopen(copied)


def test_names_that_are_not_letters_reach_neither_terminal_nor_shell(own, copied, capfd):
    config = read_checked_json(copied / "config.json")
    config["rebuild"]["corpus"] = "\x1b[2Ja'; rm -rf \u202e/"
    write_text(copied / "config.json", checked_json(config))
    training = read_checked_json(copied / "training.json")
    training["of"]["run"] = RunFolder(copied).id
    write_text(copied / "training.json", checked_json(training))
    (copied / "metrics.json").unlink()
    assert evaluated(copied) == 1
    err = capfd.readouterr().err
    assert err.removesuffix("\n").isprintable()
    assert "--corpus '" in err


def test_a_key_is_made_once_is_the_user_s_alone_and_is_needed_to_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    record = {"a": 1, "b": [None, "é"]}
    assert not is_signed(record, None)
    assert not is_signed(record, "0" * 32)
    signature = sign(record)
    key = tmp_path / "state" / "bigram_circuits" / "key"
    assert [path.name for path in key.parent.iterdir()] == ["key"]
    assert key.stat().st_mode & 0o777 == 0o600
    assert is_signed(record, signature)
    assert sign(record) == signature
    assert not is_signed({**record, "a": 2}, signature)
    key.write_bytes(b"short")
    assert not is_signed(record, signature)
    assert sign(record) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert sign(record) is None


# --- another text ---


def test_numbers_of_another_text_are_not_written_into_the_run(own, copied, capfd, tmp_path):
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    other = tmp_path / "other.txt"
    other.write_text("".join(f"quite another text, number {n * n}\n\n" for n in range(300)))
    assert evaluated(copied, "--corpus", other) == 1
    assert cli.main(["analyze", str(copied), "--corpus", str(other)]) == 1
    err = capfd.readouterr().err
    assert err.count("is not the one that the run in") == err.count("\n") == 2
    assert "or write what is measured on this one to another folder (--out)" in err
    assert {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()} == before
    out = tmp_path / "out"
    assert evaluated(copied, "--corpus", other, "--out", out) == 0
    assert {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()} == before
    run = bc.load_run(out)
    assert run.evaluated_on.source == str(other)
    assert run.evaluated_on.fingerprint != run.settings.corpus.fingerprint
    assert run.evaluation != bc.load_run(copied).evaluation
    said = without_libraries((out / "report.html").read_text())
    assert "evaluated on the held-out part of ANOTHER TEXT" in said
    assert str(other) in said
    assert "and evaluated on its held-out part" not in said
    assert "ANOTHER TEXT" not in without_libraries((copied / "report.html").read_text())
    assert evaluated(copied, "--out", out) == 1  # it is not empty


def test_a_text_that_was_changed_in_its_place_is_noticed_on_the_command_line_and_in_python(own, copied, capfd):
    text = own / "text.txt"
    before = text.read_text()
    text.write_text(before.replace("small", "large"))
    try:
        with pytest.raises(ValueError, match=r"holds another run \(its corpus.fingerprint is"):
            bc.study(bc.load_run(copied).rebuild.model, text, out=copied, context_length=16, **RECIPE)
        assert evaluated(copied) == 1
        assert "is not the one that the run in" in capfd.readouterr().err
    finally:
        text.write_text(before)


def test_the_page_says_which_text_analyses_are_of(tmp_path):
    run = fresh(tmp_path / "run")
    other = RunFolder(run.path).origin(CorpusIdentity("other.txt", "ff00"))
    run.analyses["logit_lens"].save(run.path / "analysis" / "logit_lens.json", other)
    assert "analysed on the held-out part of ANOTHER TEXT, other.txt" in page(bc.load_run(run.path))
    RunFolder(run.path).write_evaluation(run.evaluation)
    assert "Which text it was evaluated on was not recorded." in page(bc.load_run(run.path))


def test_numbers_of_other_texts_are_not_compared_as_of_one_task(tmp_path):
    one, two = (fresh(tmp_path / name) for name in ("one", "two"))
    evaluation = replace(two.evaluation, subnetwork=replace(two.evaluation.subnetwork, kl=1.0))
    RunFolder(two.path).write_evaluation(evaluation, CorpusIdentity("other.txt", "ff00"))
    items = compare([one.path, two.path]).items
    assert len({item.task for item in items}) == 2
    RunFolder(two.path).write_evaluation(Evaluation.from_json(measured()), one.settings.corpus)
    assert len({item.task for item in compare([one.path, two.path]).items}) == 1
