"""Sweeps from their spec to their table: done, failed, gone on with, moved and merged."""

import json
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import psutil
import pytest

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.recipe import Request
from bigram_circuits.scale import launching
from bigram_circuits.scale.folder import DONE, FAILED, LEARNING, QUEUED, WAITING, RunState, SweepFolder
from bigram_circuits.scale.forecast import kind_of
from bigram_circuits.scale.shared import Shared
from bigram_circuits.scale.spec import read_spec
from bigram_circuits.storage.files import checked_json
from bigram_circuits.storage.locks import lock_folder
from bigram_circuits.workflow import Subjects
from tests.conftest import UNFIT_INPUTS
from tests.scale.conftest import GRID, SPEC
from tests.test_recipe import OTHER

pytestmark = [pytest.mark.usefixtures("one_thread"), UNFIT_INPUTS]


@pytest.fixture
def copied(project, swept, tmp_path):
    """The sweep and its spec, in another place."""
    for name in ("model", "swept"):
        shutil.copytree(project / name, tmp_path / name)
    for name in ("text.txt", "spec.toml"):
        shutil.copy2(project / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def nothing_learned(monkeypatch):
    """Runs that are done need no learning."""

    def no(*_, **__):
        raise AssertionError("a run was done again")

    monkeypatch.setattr("bigram_circuits.workflow.find_mask", no)


def test_every_run_is_what_study_finds(project, swept):
    assert [one.status for one in swept.runs] == [DONE] * 4
    (run,) = (one for one in swept.runs if (one.settings["seed"], one.settings["sparsity_weight"]) == (1, 1))
    options = {"max_tokens": 6000, "context_length": 16, "batch_size": 2, "max_steps": 2, "seed": 1}
    alone = bc.study(
        project / "model", project / "text.txt", **options, sparsity_weight=1.0, random_seeds=1, analysis=False,
        out=project / "alone",
    )  # fmt: skip
    found = run.load()
    assert found.subnetwork == alone.subnetwork
    assert found.history == alone.history
    assert found.metrics == alone.metrics
    assert found.settings == alone.settings
    assert found.rebuild == alone.rebuild
    assert found.made_here


def test_the_table_has_the_numbers_of_the_files(swept):
    table = pd.read_csv(swept.path / "table.csv")
    assert list(table.columns[:6]) == ["name", "sparsity_weight", "seed", "status", "reason", "seconds"]
    parquet = pd.read_parquet(swept.path / "table.parquet")
    assert list(parquet.columns) == list(table.columns)
    for (_, row), (_, other), run in zip(table.iterrows(), parquet.iterrows(), swept.runs, strict=True):
        metrics = json.loads((run.path / "metrics.json").read_text())
        training = json.loads((run.path / "training.json").read_text())
        own = metrics["subnetwork"]
        expected = {name: own[name] for name in ("kept", "total", "fraction")}
        for name in ("surprisal_correlation", "cross_entropy", "kl", "mean_surprisal", "top1_agreement"):
            expected[name] = own[name]
            low, high = metrics["intervals"]["subnetwork"].get(name, (None, None))
            expected |= {} if low is None else {f"{name}_low": low, f"{name}_high": high}
            for condition in ("full", "empty", "complement", "magnitude"):
                expected[f"{name}_{condition}"] = metrics[condition][name]
            for group in ("random", "full_minus_random"):
                expected[f"{name}_{group}"] = np.mean([seed[name] for seed in metrics[group]["seeds"]])
        expected |= {"learning_seconds": training["seconds"], "stopped_because": training["stopped_because"]}
        expected |= {"max_steps": 2, "layers": None, "status": "done", "folder": f"runs/{run.name}", "analysis": False}
        for name, value in expected.items():
            for found in (row[name], other[name]):
                if value is None:
                    assert pd.isna(found), name
                elif isinstance(value, float):
                    assert found == pytest.approx(value, nan_ok=True), name
                else:
                    assert found == value, name
    page = (swept.path / "comparison.html").read_text()
    assert all(run.name in page for run in swept.runs)


def test_it_says_how_far_it_is(swept):
    text = str(bc.load_sweep(swept.path))
    assert text.startswith(f"4 runs in {swept.path}: 4 done\n")
    assert all(f"{one.name}" in text for one in swept.runs)
    assert len(bc.load_sweep(swept.path).done) == 4
    with pytest.raises(FileNotFoundError, match=r"holds no sweep: it has no sweep\.json"):
        bc.load_sweep(swept.path / "runs")


def test_a_failed_run_is_listed_and_tried_again(project, tmp_path, capsys, monkeypatch):
    spec = tmp_path / "spec.toml"
    text = SPEC.replace('"model"', f'"{project}/model"').replace('"text.txt"', f'"{project}/text.txt"')
    spec.write_text(text + "[grid]\nlayers = [[0], [7]]\n")
    command = ["sweep", str(spec), "--out", str(tmp_path / "out"), "--launcher", "debug"]
    assert cli.main(command) == 1
    said = capsys.readouterr()
    assert "1 done, 1 failed" in said.out
    assert "there is no layer 7: layers are 0 to 0" in said.out
    assert said.err.endswith("bigram-circuits: error: 1 of 2 runs failed\n")
    found = bc.load_sweep(tmp_path / "out")
    assert [one.reason for one in found.failed] == ["there is no layer 7: layers are 0 to 0"]
    assert list(found.to_dataframe()["status"]) == [DONE, FAILED]
    tried = []
    monkeypatch.setattr("bigram_circuits.scale.worker.study_of", lambda request, *_, **__: tried.append(request))
    monkeypatch.setattr("bigram_circuits.scale.sweeps.write_results", lambda sweep: [])
    monkeypatch.setattr("bigram_circuits.scale.results._told", lambda run: "")
    bc.sweep(spec, out=tmp_path / "out", launcher="debug")
    assert [one.config.layers for one in tried] == [(7,)]
    assert cli.main(["sweep", str(spec), "--out", str(tmp_path / "out"), "--dry-run"]) == 0


def test_a_moved_sweep_goes_on(copied, nothing_learned, capsys):
    assert cli.main(["sweep", str(copied / "spec.toml"), "--out", str(copied / "swept"), "--launcher", "debug"]) == 0
    assert "4 runs in" in capsys.readouterr().out
    assert cli.main(["sweep", str(copied / "swept"), "--status"]) == 0
    assert "4 done" in capsys.readouterr().out
    assert cli.main(["sweep", str(copied / "swept"), "--launcher", "debug"]) == 0


def test_more_runs_are_added_and_fewer_are_an_error(copied, monkeypatch):
    tried = []
    monkeypatch.setattr("bigram_circuits.scale.worker.study_of", lambda request, *_, **__: tried.append(request))
    monkeypatch.setattr("bigram_circuits.scale.sweeps.write_results", lambda sweep: [])
    monkeypatch.setattr("bigram_circuits.scale.results._told", lambda run: "")
    (copied / "spec.toml").write_text(GRID.replace("[0, 1]", "[0, 1, 2]"))
    found = bc.sweep(copied / "spec.toml", out=copied / "swept", launcher="debug")
    assert [(one.config.seed, one.config.sparsity_weight) for one in tried] == [(2, 1), (2, 10)]
    assert len(found.runs) == 6
    (copied / "spec.toml").write_text(GRID.replace("[0, 1]", "[0]"))
    with pytest.raises(ValueError, match=r"holds another sweep: 4 of its 6 runs, such as .*seed-1.*, are not in this"):
        bc.sweep(copied / "spec.toml", out=copied / "swept", launcher="debug")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no sweep: choose another folder"):
        bc.sweep({"max_steps": 1}, out=tmp_path, launcher="debug")


def test_a_folder_in_use_is_left_alone(swept):
    hold = (
        "import sys; from bigram_circuits.storage.locks import lock_folder\n"
        "with lock_folder(sys.argv[1]): print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(swept.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        other.stdout.readline()
        with pytest.raises(OSError, match="is being written by process"):
            bc.sweep(swept.path, launcher="debug")
    finally:
        other.communicate(b"\n")


def test_names_in_a_sweep_of_somebody_else_are_not_opened(copied):
    path = copied / "swept" / "sweep.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    record["runs"][0]["options"]["corpus"] = "/etc/passwd"
    path.write_text(checked_json(record))
    with pytest.raises(ValueError, match="was not made by you on this machine, so the names in it are not opened"):
        bc.sweep(copied / "swept")


def test_damage_is_noticed(copied):
    path = copied / "swept" / "sweep.json"
    path.write_text(path.read_text().replace("seed", "sead"))
    with pytest.raises(ValueError, match=r"sweep.json' is damaged"):
        bc.load_sweep(copied / "swept")


def test_others_are_merged(copied, tmp_path, nothing_learned):
    def part(name, seeds):
        """A sweep that has some of the runs."""
        folder = SweepFolder(tmp_path / name)
        whole = SweepFolder(copied / "swept")
        with lock_folder(folder.path):
            folder.extend([one for one in whole.runs if one.options["seed"] in seeds], {})
            for one in folder.runs:
                shutil.copytree(whole.run(one.name), folder.run(one.name))
                folder.write_state(one.name, whole.state(one.name))
        return folder

    first, second = part("first", [0]), part("second", [0, 1])
    waiting = second.runs[-1]
    second.forget(waiting.name)
    expected = bc.load_sweep(copied / "swept")
    merged = bc.merge_sweeps(tmp_path / "first", tmp_path / "second")
    assert {one.name for one in merged.runs} == {one.name for one in expected.runs}
    assert [one.status for one in merged.runs if one.name != waiting.name] == [DONE] * 3
    assert {one.name for one in merged.runs if one.status == WAITING} == {waiting.name}
    again = bc.merge_sweeps(tmp_path / "new", tmp_path / "first", copied / "swept")
    assert [one.status for one in again.runs] == [DONE] * 4
    theirs = {one.name: one.load() for one in expected.runs}
    for one in again.runs:
        assert one.load().subnetwork == theirs[one.name].subnetwork
        assert one.load().metrics == theirs[one.name].metrics
    assert (tmp_path / "new" / "table.csv").is_file()
    assert len(first.runs) == 2  # what was read before the merge
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        bc.merge_sweeps(tmp_path / "new", tmp_path)


def test_what_is_shared_is_what_would_be_made_alone_and_made_once(project, swept, monkeypatch):
    (run, *_) = read_spec(project / "spec.toml").runs
    inputs = run.request.inputs
    expected = Subjects.load(inputs, "cpu")
    for name in ("corpus_of", "subjects_of_task"):
        monkeypatch.setattr(f"bigram_circuits.scale.shared.{name}", None)
    shared = Shared(swept.path / "shared", "cpu")
    found = shared.subjects(inputs)
    assert shared.is_loaded(inputs) == 3
    assert shared.subjects(inputs).model is found.model
    assert isinstance(found.corpus.train, np.memmap)
    for name in ("source", "documents", "fingerprint", "tokenizer_hash", "starts", "named", "without_token"):
        assert getattr(found.corpus, name) == getattr(expected.corpus, name), name
    assert np.array_equal(found.corpus.train, expected.corpus.train)
    assert np.array_equal(found.corpus.held_out, expected.corpus.held_out)
    assert found.target.fingerprint == expected.target.fingerprint


def test_a_text_that_was_changed_is_read_again_and_a_damaged_store_is_noticed(copied):
    (run, *_) = read_spec(copied / "spec.toml").runs
    inputs = run.request.inputs
    shared = Shared(copied / "shared", "cpu")
    before = shared.subjects(inputs).corpus
    (copied / "text.txt").write_text("more\n\n" * 100 + (copied / "text.txt").read_text())
    after = Shared(copied / "shared", "cpu").subjects(inputs).corpus
    assert before.fingerprint != after.fingerprint
    for path in (copied / "shared").glob("text-*/train.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="its tokens are not those that were written; remove its folder"):
        Shared(copied / "shared", "cpu").subjects(inputs)


def test_the_status_of_a_run_follows_its_process(copied, monkeypatch):
    folder = SweepFolder(copied / "swept")
    first, second, third, fourth = (one.name for one in folder.runs)
    me = psutil.Process()
    at_work = RunState(LEARNING, worker=me.pid, since=me.create_time(), host=platform.node())
    folder.write_state(first, at_work)
    folder.write_state(second, RunState(LEARNING, worker=me.pid, since=0.0, host=platform.node()))  # another process
    folder.write_state(third, RunState(LEARNING, worker=1, since=0.0, host="elsewhere", job="7_1"))
    folder.forget(fourth)
    folder.write_jobs({third: "7_1", fourth: "7_2"})

    def said(text, code=0):
        (copied / "squeue").write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
        (copied / "squeue").chmod(0o755)
        return [status for status, _ in folder.statuses().values()]

    monkeypatch.setenv("PATH", str(copied), prepend=os.pathsep)
    assert said("7_1\\n7_2\\n") == [LEARNING, WAITING, LEARNING, QUEUED]
    assert said("7_2\\n") == [LEARNING, WAITING, WAITING, QUEUED]
    assert said("") == [LEARNING, WAITING, WAITING, WAITING]
    assert said("", 1) == [LEARNING, WAITING, LEARNING, QUEUED]  # SLURM cannot be asked
    shutil.rmtree(folder.run(first))
    folder.write_state(first, RunState(DONE))
    assert said("")[0] == WAITING


def test_the_dry_run_says_what_it_rests_on(project, swept, tmp_path, capsys):
    assert cli.main(["sweep", str(project / "spec.toml"), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 runs to do, 0 done; ")
    assert said.count("learning alone: 2 steps of ") == 4
    assert not (tmp_path / "out").exists()
    forecast = bc.forecast_sweep(project / "spec.toml", out=swept.path)
    assert (forecast.runs, forecast.done) == ((), 4)
    spec = project / "more.toml"
    spec.write_text(GRID + "[[run]]\nseed = 5\n")
    forecast = bc.forecast_sweep(spec, out=swept.path, workers=3)
    (one,) = forecast.runs
    took = {run.name: run.seconds for run in swept.runs}
    assert one.basis.startswith("as ")
    assert one.seconds == took[one.basis.split()[1]]
    assert one.memory > 1e8
    assert forecast.seconds == one.seconds / 3
    assert list(forecast.to_dataframe()["name"]) == [one.name]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"launcher": "cloud"}, "launcher must be one of local, slurm, debug, not 'cloud'"),
        ({"workers": 0}, "workers must be a whole number of at least 1, not 0"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(given, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        bc.sweep({"max_steps": 1}, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_workers_share_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(launching, "_cores", lambda: 16)
    assert launching.default_workers("cpu", 100) == 4
    assert launching.default_workers("cpu", 3) == 3
    monkeypatch.setattr(launching, "_cores", lambda: 2)
    assert launching.default_workers("cpu", 100) == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launching.default_workers(None, 100) == 8
    assert launching.default_workers("cuda:3", 100) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert launching._gpus("cuda") == [4, 6]
    assert launching._gpus("cpu") == []


@pytest.mark.slow
def test_processes_on_this_machine_do_the_same(project, swept, tmp_path):
    found = bc.sweep(project / "spec.toml", out=tmp_path / "out", workers=2)
    assert [one.status for one in found.runs] == [DONE] * 4
    for one, other in zip(found.runs, swept.runs, strict=True):
        assert one.load().subnetwork == other.load().subnetwork
        assert one.load().metrics == other.load().metrics
    logs = [path.read_text() for path in (tmp_path / "out" / "logs").glob("*.out")]
    assert sum(text.count(": done after ") for text in logs) == 4


@pytest.mark.parametrize("option", ["short_until", "short_length"])
def test_runs_with_other_steps_are_of_another_kind(option):
    """A forecast for one would not hold for the other."""
    assert kind_of(Request.of()) == kind_of(Request.of(seed=3))
    assert kind_of(Request.of(**{option: OTHER[option]})) != kind_of(Request.of())
