"""One mask learned by several processes: the same as by one, up to the order of sums, and nobody left waiting."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.learning import training
from bigram_circuits.learning.ranks import Ranks, current_ranks
from bigram_circuits.runs import StepRecord
from tests.conftest import TINY_CONFIGS, save_tiny
from tests.ranked import RECIPES, SHARDED

TOGETHER = [*RECIPES, *SHARDED, "mean_by_position", "counterfactual"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ended(folder):
    """`tests.ranked` after it has ended, started by torchrun as two processes."""
    save_tiny(folder / "model", TINY_CONFIGS["gpt_neox"])
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return subprocess.run(
        [*start, "tests.ranked", folder],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seen(ended, folder):
    """What each of both processes saw."""
    files = [folder / "0.json", folder / "1.json"]
    assert all(file.is_file() for file in files), ended.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_find_what_one_finds(seen, name):
    """Of 5 sequences one takes 2 and the other 3; by weights, neurons, an attack, a task with its counterfactuals."""
    together, alone = seen[0][name]["together"], seen[0][name]["alone"]
    assert together == seen[1][name]["together"]  # to the last bit
    assert len(set(together["kept"]) ^ set(alone["kept"])) <= 0.001 * len(alone["kept"])
    assert len(together["history"]) == len(alone["history"])
    for one, other in zip(together["history"], alone["history"], strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], abs=1e-4)
        assert one["fraction"] == pytest.approx(other["fraction"], abs=1e-3)
    assert together["gap"] == pytest.approx(alone["gap"], abs=1e-4)


def test_only_the_first_process_calls_back(seen):
    assert seen[0]["watched"][1] == 2 * len(RECIPES)  # together and alone
    assert seen[1]["watched"] == [0, 0]


@pytest.mark.parametrize(("name", "run"), [("resumed", "resumed"), ("resumed sharded", "sharded")])
def test_a_run_goes_on_with_another_number_of_processes(seen, folder, name, run):
    """From one to two and to one again; SIGTERM in the second process stops both after the step, also a second one."""
    assert [line.partition(";")[0] for line in seen[0][name]["ended"]] == [
        "KeyboardInterrupt: interrupted after step 2 of at most 6",
        "KeyboardInterrupt: interrupted after step 4 of at most 6",
    ]
    assert seen[1][name]["ended"] == seen[0][name]["ended"][1:]
    assert [one[name]["steps"] for one in seen] == [4, 4]
    found, whole = seen[0][name]["found"], seen[0]["weights"]["alone"]
    assert len(set(found["kept"]) ^ set(whole["kept"])) <= 0.001 * len(whole["kept"])
    assert [one["step"] for one in found["history"]] == [one["step"] for one in whole["history"]]
    assert all(one[name]["again"] == found["kept"] for one in seen)  # both read the finished run
    assert len(bc.load_run(folder / run).history) == len(whole["history"])  # only one wrote it


@pytest.mark.parametrize("name", ["rolled back", "rolled back sharded"])
def test_a_loss_that_is_not_finite_in_one_process_rolls_both_back(seen, name):
    assert seen[0][name] == seen[1][name]
    assert len(seen[0][name]["rollbacks"]) == 1
    assert np.isfinite([one["cross_entropy"] for one in seen[0][name]["history"]]).all()


def test_sharded_learning_leaves_the_model_bit_for_bit(seen):
    assert seen[0]["left alone"]
    assert seen[1]["left alone"]


def test_what_cannot_be_divided_is_refused_by_all_in_a_line(seen):
    assert seen[0]["refused"] == seen[1]["refused"] == [
        "ValueError: a batch of 1 sequences cannot be divided among 2 processes: start fewer, or give a larger "
        "batch_size or more text",
        "ValueError: replace='resample' takes values from other sequences of the batch, which several processes "
        "divide: learn in one process, or choose another replacement",
        "ValueError: process 1 was given another run than process 0 (its recipe.seed is 0, not 1)",
        "ValueError: sharded learning is of single weights: leave sharded out, or granularity 'neuron'",
    ]  # fmt: skip


def test_find_speaks_once_and_leaves_evaluation_to_the_first_process(seen, folder):
    (code, out, _), other = seen[0]["command"], seen[1]["command"]
    assert (code, other) == (0, [0, "", ""])
    assert out.count("subnetwork  ") == out.count("learned in") == 1
    assert bc.load_run(folder / "command").evaluation is not None
    assert (folder / "command" / "report.html").is_file()


def test_an_error_in_one_process_ends_both(ended, seen, folder):
    assert ended.returncode == 1
    assert "ValueError: the target of one process fails" in ended.stderr
    assert (folder / "last").read_text().startswith("ConnectionError: another process of this run has ended")


# --- without other processes ---


def test_the_losses_of_all_ranks_add_up_to_the_mean_of_plain_pytorch(tiny_folders, tiny_model):
    tokens = torch.randint(1, 257, (5, 12), generator=torch.Generator().manual_seed(0))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_folders["gpt_neox"], dtype=torch.float32)
    with torch.no_grad():
        logits = plain(tokens).logits[:, :-1]
        whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        for size in (1, 2, 3, 5):
            parts = [Ranks(rank, size).rows(tokens) for rank in range(size)]
            assert torch.equal(torch.cat(parts), tokens)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            losses = [training._loss(tiny_model, bc.NextTokenTarget(), part, len(part) / 5) for part in parts]
            assert sum(losses).item() == pytest.approx(whole.item(), abs=1e-5)
    with pytest.raises(ValueError, match="a batch of 5 sequences cannot be divided among 6 processes"):
        Ranks(0, 6).rows(tokens)


def test_ranks_agree_on_what_any_of_them_has_met():
    def told(loss, *, finite=True, interrupted=False, undecided=3):
        record = StepRecord(0, 1, loss, 0.5, 0.25, None, 0.5, 0.5, 1.0)
        return training._Told(record, undecided, 4, False, finite, interrupted)

    agreed = training._agreed([told(1.0), told(0.5, finite=False, interrupted=True, undecided=5)])
    assert (agreed.record.cross_entropy, agreed.undecided) == (1.5, 3)
    assert (agreed.is_finite, agreed.is_interrupted) == (False, True)


def test_a_process_without_a_group_is_alone(monkeypatch):
    assert current_ranks() == Ranks()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert current_ranks() == Ranks()


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_commands_that_are_the_work_of_one_process_say_so_once(monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TQDM_DISABLE", "")
    assert cli.main(["checkpoints", "reference"]) == 1
    assert capsys.readouterr().err.count("only `find` works in several processes") == lines
