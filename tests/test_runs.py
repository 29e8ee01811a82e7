import json
import os
from dataclasses import replace

import pytest
import torch

from bigram_circuits.evaluation import Evaluation, SoftHardGap
from bigram_circuits.measures.statistics import Faithfulness
from bigram_circuits.recipe import Inputs, SparsifyConfig
from bigram_circuits.runs import (
    Checkpoint,
    CorpusIdentity,
    ModelIdentity,
    Outcome,
    Rollback,
    RunFolder,
    RunSettings,
    StepRecord,
    TargetIdentity,
    load_run,
)
from bigram_circuits.runs import folder as run_folder
from bigram_circuits.storage.files import whole_file, write_text
from bigram_circuits.subnetwork import Subnetwork

SETTINGS = RunSettings(
    ModelIdentity("m", weight_hash="ab"), CorpusIdentity("text"), TargetIdentity("NGramTable"),
    SparsifyConfig(max_steps=10, layers=(1, 2), granularity={"mlp": "neuron"}),
)  # fmt: skip
INPUTS = Inputs(model="m", max_tokens=9)


def record(step, attempt=0):
    return StepRecord(attempt, step, cross_entropy=1 / (step + 1), fraction=0.5, undecided=1.0)


FAITHFUL = Faithfulness(0.5, 1.0, 0.25, 2.0, 0.75, kept=2, total=6, fraction=1 / 3)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    return RunFolder.open(tmp_path / "run", SETTINGS, rebuild=INPUTS)


@pytest.fixture
def subnetwork():
    return Subnetwork({"blocks.0.mlp.W_in": torch.arange(6).view(2, 3) < 2}, model_name="m")


# --- whole files ---


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_whose_writing_fails_leaves_what_was_there_and_nothing_else(tmp_path, before):
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == ([] if before is None else ["file.txt"])
    assert before is None or path.read_text() == before


def test_a_file_appears_only_when_it_is_whole_with_the_usual_permissions(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert names_in(path.parent) == ["file.txt"]
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/below.txt") as caught:
        write_text(tmp_path / "file" / "below.txt", "text")
    assert "\n" not in str(caught.value)


# --- opening ---


def test_a_new_folder_says_everything_needed_to_run_again(folder, tmp_path):
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"] == json.loads(json.dumps(SETTINGS.to_json()))
    assert config["rebuild"] == INPUTS.to_json()
    assert {"python", "torch", "numpy", "transformers", "threads"} <= set(config["versions"])
    assert folder.files() == ["config.json"]
    assert not folder.is_finished


def test_the_same_settings_take_up_a_folder_and_others_never_touch_it(folder, tmp_path):
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert RunFolder.open(tmp_path / "run", SETTINGS).path == folder.path
    other = replace(SETTINGS, recipe=replace(SETTINGS.recipe, seed=1))
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"holds another run \(its recipe.seed is 0, not 1\)"):
            RunFolder.open(tmp_path / "run", other, resume=resume)
    with pytest.raises(ValueError, match=r"its within is None, not 'ab'"):
        RunFolder.open(tmp_path / "run", replace(SETTINGS, within="ab"))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_folder_with_foreign_files_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        RunFolder.open(tmp_path, SETTINGS, resume=False)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"config.json' does not belong to a run .*choose another folder"):
        RunFolder.open(tmp_path, SETTINGS, resume=False)
    (tmp_path / "config.json").write_text('{"format": "bigram')
    with pytest.raises(ValueError, match=r"config.json' is damaged"):
        RunFolder.open(tmp_path, SETTINGS)
    assert names_in(tmp_path) == ["config.json", "notes.txt"]


def test_a_file_in_place_of_a_folder_or_of_its_parent_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, but a run needs a folder"):
        RunFolder.open(tmp_path / "file", SETTINGS)
    with pytest.raises(OSError, match="cannot write"):
        RunFolder.open(tmp_path / "file" / "run", SETTINGS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_to_write_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot write"):
        RunFolder.open(tmp_path / "run", SETTINGS)


def test_an_empty_folder_is_taken(tmp_path):
    assert RunFolder.open(tmp_path, SETTINGS).files() == ["config.json"]


def test_starting_afresh_removes_what_the_run_left_and_keeps_other_files(folder, subnetwork, tmp_path):
    folder.write_checkpoint(Checkpoint({"scores": torch.zeros(2)}, step=1, attempt=0, seconds=0.5))
    folder.log(record(0))
    folder.write_evaluation(Evaluation(FAITHFUL))
    subnetwork.save(folder.path / "subnetwork.safetensors")
    for name in ("analysis/lens.json", "report.html", "notes.txt"):
        write_text(folder.path / name, "{}")
    afresh = RunFolder.open(tmp_path / "run", SETTINGS, resume=False)
    assert afresh.files() == ["config.json", "notes.txt"]
    assert afresh.read_checkpoint() is None
    assert afresh.history() == []


# --- progress and checkpoints ---


def test_progress_grows_by_lines_and_a_last_line_that_was_cut_is_left_out(folder):
    assert folder.history() == []
    records = [record(step) for step in range(3)]
    folder.begin_progress(records[:1])
    for one in records[1:]:
        folder.log(one)
    assert folder.history() == records
    path = folder.path / "progress.jsonl"
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1]) + 1):
        path.write_bytes(whole[:-cut])
        assert folder.history() == records[:2]
    folder.begin_progress(folder.history())
    folder.log(records[2])
    assert folder.history() == records


def test_a_checkpoint_comes_back_bit_for_bit_and_replaces_the_one_before(folder):
    assert folder.read_checkpoint() is None
    scores = torch.randn(7, 3)
    scores[0, 0] = -torch.inf
    tensors = {"scores": scores.T, "count": torch.tensor(3, dtype=torch.int64), "half": torch.ones(2).bfloat16()}
    for step in (1, 2):
        folder.write_checkpoint(Checkpoint(tensors, step=step, attempt=1, seconds=0.25))
    back = folder.read_checkpoint()
    assert (back.step, back.attempt, back.seconds) == (2, 1, 0.25)
    assert back.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back.tensors[name], tensor)
        assert back.tensors[name].dtype == tensor.dtype
    assert names_in(folder.path / "checkpoint") == ["state.safetensors"]


def test_checkpoints_are_due_so_seldom_that_they_cost_little(folder, monkeypatch):
    now = 1_000.0
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)
    folder = RunFolder(folder.path)
    now += 19
    assert not folder.checkpoint_is_due()
    now += 2
    assert folder.checkpoint_is_due()
    assert not folder.checkpoint_is_due(size=10**9)  # five seconds of writing after twenty
    folder.write_checkpoint(Checkpoint({"a": torch.zeros(1)}, 1, 0, 1.0))
    folder._checkpoint_cost = folder._spent = 3.0
    now += 278  # 299 in all, of which two would be 6
    assert not folder.checkpoint_is_due()
    now += 2
    assert folder.checkpoint_is_due()


# --- the end ---


def test_a_finished_run_is_read_as_it_was_written(folder, subnetwork, tmp_path):
    folder.log(record(0))
    folder.write_checkpoint(Checkpoint({"scores": torch.zeros(2)}, 1, 0, 0.5))
    with pytest.raises(ValueError, match="is not finished"):
        load_run(tmp_path / "run")
    outcome = Outcome("decided", 1.5, 2, SoftHardGap(1.0, 1.25), (Rollback(1, 5, "the loss is nan", 0, 0.5),))
    folder.finish(subnetwork, outcome)
    assert folder.files() == ["config.json", "progress.jsonl", "subnetwork.safetensors", "training.json"]
    run = load_run(tmp_path / "run")
    assert run.subnetwork == subnetwork
    assert (run.outcome, run.evaluation, run.metrics, run.history) == (outcome, None, None, [record(0)])
    assert (run.settings, run.rebuild) == (SETTINGS, INPUTS)
    evaluation = Evaluation(FAITHFUL, random=(FAITHFUL, FAITHFUL), intervals={"subnetwork": {"kl": (0.5, 1.0)}})
    folder.write_evaluation(evaluation)
    assert load_run(tmp_path / "run").evaluation == evaluation
    assert load_run(tmp_path / "run").metrics == evaluation.to_json()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_run(tmp_path)
