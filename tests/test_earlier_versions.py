"""Folders that version 0.1.0 wrote, of a random model with one block: they load, and their pages are written."""

import shutil
from pathlib import Path

import pytest

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.experiments.sparsity_path import load_path_runs
from bigram_circuits.report.outcome import command_line

DATA = Path(__file__).parent / "data"


@pytest.fixture
def folder(tmp_path):
    """A copy that may be written to."""
    return shutil.copytree(DATA / "run-0.1.0", tmp_path / "run")


def test_a_run_is_read_as_today_s_types(folder):
    run = bc.load_run(folder)
    assert run.settings.recipe == bc.SparsifyConfig(
        sparsity_weight=0.0, learning_rate=0.1, max_steps=12, batch_size=4, low_memory=True, short_until=0,
        granularity={"attn": "head", "mlp": "weight"},
    )  # fmt: skip
    assert (run.rebuild.model, run.rebuild.corpus, run.rebuild.max_tokens) == ("model", "text.txt", 8000)
    assert run.evaluation.subnetwork.kept == run.subnetwork.kept == 237
    assert run.evaluation.subnetwork.kl == pytest.approx(4.71658, abs=1e-5)
    assert len(run.evaluation.random) == 2
    last = [record.step for record in run.history if record.attempt == run.outcome.attempts - 1]
    assert last == list(range(len(last)))
    assert run.outcome.soft_hard.hard == pytest.approx(run.history[-1].cross_entropy, abs=0.1)
    assert "max_activating_tokens" in run.analyses
    assert bc.load_falsification(folder / "falsify").controls.get("kl")["found"] == run.evaluation.subnetwork.kl


def test_its_metrics_are_written_again_as_they_were(folder):
    from bigram_circuits.runs import RunFolder
    from bigram_circuits.storage.files import read_checked_json

    before = read_checked_json(folder / "metrics.json")
    RunFolder(folder).write_evaluation(bc.load_run(folder).evaluation)
    after = read_checked_json(folder / "metrics.json")
    assert after.pop("of")["run"] == RunFolder(folder).id
    assert after.pop("verdict") and before.pop("verdict")  # noqa: PT018 (its wording may change)
    assert after == before


def test_its_page_is_written_and_names_the_command(folder, capsys):
    assert cli.main(["report", str(folder)]) == 0
    assert "model" in (folder / "report.html").read_text()
    command = command_line(bc.load_run(folder))
    assert command.startswith("bigram-circuits find model --corpus text.txt --context-length 16 --max-tokens 8000 ")
    assert "--low-memory" in command
    assert "--random-seeds 2" in command


def test_a_path_is_read_with_what_it_measured(tmp_path):
    runs = load_path_runs(shutil.copytree(DATA / "path-0.1.0", tmp_path / "path"))
    assert [run.path.name for run in runs] == ["weight-0.001", "weight-0.01"]
    assert all(run.evaluation.subnetwork.kept == run.subnetwork.kept for run in runs)
    assert cli.main(["compare", str(tmp_path / "path"), "--out", str(tmp_path / "page.html")]) == 0
