"""A run survives: kills, damage, two processes at once, a loss that explodes, memory and disks that are full."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import bigram_circuits as bc
from bigram_circuits import cli, runs
from bigram_circuits.evaluation import Evaluation, SoftHardGap
from bigram_circuits.learning import learner, training
from bigram_circuits.measures.statistics import Faithfulness
from bigram_circuits.runs import RunFolder
from bigram_circuits.runs import folder as run_folder
from bigram_circuits.storage.files import checked_json, read_checked_json, write_text
from bigram_circuits.storage.locks import LOCK, FolderInUseError
from bigram_circuits.storage.typed import to_json
from tests.folders import flips, held_folder, names_in

ROOT = Path(__file__).parents[1]
RECIPE = bc.SparsifyConfig(learning_rate=0.05, beta_growth=1.1, max_steps=20, batch_size=8, retries=0)


@pytest.fixture(scope="module", autouse=True)
def only_steps():
    """Only the steps ask the target, so that its calls can be counted: no forecast of memory, no soft-hard gap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "forecast_memory", lambda *_, **__: None)
        patch.setattr(training, "soft_hard_gap", lambda *_: SoftHardGap(1.0, 1.0))
        yield


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return bc.load_corpus(["abcabdabe" * 40, "cabbadab" * 40] * 8, tokenizer=tokenizer, context_length=16)


@pytest.fixture(scope="module")
def bigrams(corpus):
    return bc.count_ngrams(corpus.train, 2, d_vocab=257)


@pytest.fixture(scope="module")
def expected(tiny_model, bigrams, corpus):
    return bc.find_subnetwork(tiny_model, bigrams, corpus, RECIPE)


class Acting:
    """The bigram target; at some calls something happens to the loss."""

    d_vocab, fingerprint = 257, "the same"

    def __init__(self, target, action=lambda call, loss: loss):
        self.target, self.action, self.calls = target, action, 0

    def cross_entropy(self, logits, tokens):
        self.calls += 1
        return self.action(self.calls, self.target.cross_entropy(logits, tokens))

    def surprisal(self, tokens):
        return self.target.surprisal(tokens)


# --- kills ---


def killed(folder, *arguments):
    command = [sys.executable, "-m", "tests.killed", str(folder), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_run_killed_at_random_moments_ends_in_the_same_mask(tmp_path):
    assert killed(tmp_path, "random", 2, 0)["kills"] == 2


def test_a_run_killed_before_any_access_to_its_folder_ends_in_the_same_mask(tmp_path):
    made = killed(tmp_path, "every", 29)
    assert made["accesses"] > 100
    assert made["kills"] > 5


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_in_the_same_mask(tmp_path):
    assert killed(tmp_path, "random", 20, 1)["kills"] == 20


@pytest.mark.slow
def test_a_run_killed_before_each_access_to_its_folder_ends_in_the_same_mask(tmp_path):
    made = killed(tmp_path, "every", 1)
    assert made["kills"] == made["accesses"]


@pytest.fixture
def ending():
    """The signal that ends a run."""
    return signal.SIGTERM


@pytest.fixture
def stopped(tiny_model, bigrams, corpus, tmp_path, ending):
    """The folder of a run that was interrupted after step 12 of 20."""

    def interrupt(call, loss):
        if call == 12:
            os.kill(os.getpid(), ending)
        return loss

    with pytest.raises(KeyboardInterrupt, match="interrupted after step 12 of at most 20; its state is kept in"):
        bc.find_subnetwork(tiny_model, Acting(bigrams, interrupt), corpus, RECIPE, run_dir=tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def goes_on(tiny_model, bigrams, corpus, expected):
    """Continue a run to its end; gives how many steps that took."""

    def call(folder):
        target = Acting(bigrams)
        found = bc.find_subnetwork(tiny_model, target, corpus, RECIPE, run_dir=folder)
        assert found.subnetwork == expected.subnetwork
        assert found.history == expected.history
        assert bc.load_run(folder).history == expected.history
        assert names_in(folder) == ["config.json", "progress.jsonl", "subnetwork.safetensors", "training.json"]
        return target.calls

    return call


def test_sigterm_keeps_the_state_and_what_was_killed_half_done_is_cleared_away(stopped, goes_on):
    for name in (".config.json.abcd1234", ".progress.jsonl.a_b_c_d_", "checkpoint/.state.safetensors.01234567"):
        (stopped / name).write_text("half of")
    with (stopped / "progress.jsonl").open("ab") as file:  # after the checkpoint; a power loss may leave anything
        file.write(b'{"attempt": 0, "step": 12, "cross\0\0\0\0\n{}\n')
    assert goes_on(stopped) == 8


@pytest.mark.parametrize("ending", [signal.SIGHUP, signal.SIGINT])
def test_a_closed_terminal_and_ctrl_c_keep_the_state_too(stopped, goes_on):
    assert goes_on(stopped) == 8


def test_a_closed_terminal_that_is_to_be_ignored_is_ignored(tiny_model, bigrams, corpus, expected):
    def hang_up(call, loss):
        os.kill(os.getpid(), signal.SIGHUP)
        return loss

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        assert bc.find_subnetwork(tiny_model, Acting(bigrams, hang_up), corpus, RECIPE).history == expected.history
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_in_which_only_the_first_file_was_begun_is_taken(goes_on, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.abcd1234").write_text("{")
    (tmp_path / "run" / LOCK).write_text("")
    assert goes_on(tmp_path / "run") == 20


def test_a_checkpoint_that_a_kill_left_beside_the_subnetwork_is_removed(stopped, goes_on, tmp_path):
    shutil.copytree(stopped / "checkpoint", tmp_path / "copy")
    goes_on(stopped)
    shutil.copytree(tmp_path / "copy", stopped / "checkpoint")
    with RunFolder(stopped).lock():
        assert not (stopped / "checkpoint").exists()


def test_a_checkpoint_of_version_0_1_0_still_continues(stopped, goes_on):
    """It has the length and the digest of the lines before it, not the lines, and names no run."""
    config = read_checked_json(stopped / "config.json")
    del config["signature"]
    write_text(stopped / "config.json", checked_json(config | {"format": "bigram_circuits.run/1"}))
    path = stopped / "checkpoint" / "state.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"])
    lines = bytes(tensors.pop("progress.jsonl").tolist())
    assert lines == (stopped / "progress.jsonl").read_bytes()
    del state["run"]
    state = json.dumps(state | {"progress": to_json(run_folder._Progress(lines).state())})
    save_file(tensors, path, {"state": state, "checksum": run_folder._checksum(state, tensors)})
    assert goes_on(stopped) == 8


def test_a_checkpoint_without_a_checksum_or_of_another_run_is_not_used(stopped, goes_on, caplog, tmp_path):
    path = stopped / "checkpoint" / "state.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    state = json.loads(metadata["state"])
    other = json.dumps(state | {"run": "0" * 32})
    deep, wrong = metadata["state"].replace('"step": 12', '"step": ' + "[" * 9_999), json.dumps(state | {"step": 1e9})
    few = {name: tensor for name, tensor in tensors.items() if name != "progress.jsonl"}
    said = {
        "of another run": (tensors, other), "nested too deeply": (tensors, deep), "a whole number": (tensors, wrong),
        "it has no checksum|does not match its": (tensors, None), "does not match it": (few, metadata["state"]),
    }  # fmt: skip
    for words, (kept, state) in said.items():
        about = (
            {"state": metadata["state"]}
            if state is None
            else {"state": state, "checksum": run_folder._checksum(state, kept)}
        )
        save_file(kept, path, about)
        with pytest.raises(ValueError, match="is damaged") as told:
            RunFolder(stopped).read_checkpoint()
        assert "\n" not in str(told.value)
        assert state is None or re.search(words, str(told.value))
    assert goes_on(stopped) == 20
    assert "learning starts over" in caplog.text


@pytest.mark.parametrize("wrong", ["shape", "dtype", "name", "steps"])
def test_a_sealed_checkpoint_of_other_gates_is_one_line(tiny_model, bigrams, corpus, stopped, wrong):
    path = stopped / "checkpoint" / "state.safetensors"
    with safe_open(path, "pt") as file:
        tensors, state = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["state"]  # noqa: SIM118
    if wrong == "shape":
        tensors["scores"] = tensors["scores"][1:].clone()
    elif wrong == "dtype":
        tensors["adam.exp_avg"] = tensors["adam.exp_avg"].int()
    elif wrong == "name":
        tensors["adam.more"] = tensors.pop("adam.exp_avg_sq")
    else:
        state = state.replace('"step": 12', '"step": -12')
    save_file(tensors, path, {"state": state, "checksum": run_folder._checksum(state, tensors)})
    if wrong == "steps":
        with pytest.raises(ValueError, match="is damaged: its steps cannot be"):
            RunFolder(stopped).read_checkpoint()
        return
    with pytest.raises(ValueError, match="the checkpoint does not hold the state of these") as told:
        bc.find_subnetwork(tiny_model, Acting(bigrams), corpus, RECIPE, run_dir=stopped)
    assert "\n" not in str(told.value)


def test_other_versions_are_noted(stopped, goes_on, caplog, monkeypatch):
    now = runs.versions() | {"torch": "9.0"}
    monkeypatch.setattr(run_folder, "versions", lambda: now)
    assert goes_on(stopped) == 8
    assert re.search(r"this run was started with other versions \(torch 9\.0, then \S+\)", caplog.text)


# --- damage ---


def test_a_damaged_checkpoint_is_not_used(stopped, goes_on, caplog, tmp_path):
    path = stopped / "checkpoint" / "state.safetensors"
    for _ in flips(path):
        with pytest.raises(ValueError, match=r"state.safetensors' is damaged"):
            RunFolder(stopped).read_checkpoint()
    path.write_bytes(path.read_bytes()[:-7])
    assert goes_on(stopped) == 20
    err = caplog.text
    assert "state.safetensors' is damaged" in err
    assert "learning starts over and will find the same subnetwork" in err


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "sparse"])
def test_progress_that_is_not_what_came_before_the_checkpoint_is_set_aside_and_the_run_goes_on(
    stopped, goes_on, caplog, damage
):
    path = stopped / "progress.jsonl"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "sparse":
        path.write_bytes(b"")
        os.truncate(path, 3 << 30)
    else:
        path.write_bytes(data[:-40] if damage == "cut" else data.replace(b'"step": 3', b'"step": 4'))
    aside = stopped / "progress.damaged-1.jsonl"
    changed = None if damage in ("gone", "sparse") else path.read_bytes()
    with pytest.raises(AssertionError, match=r"progress.damaged-1.jsonl") if damage != "gone" else nullcontext():
        assert goes_on(stopped) == 8  # it lists the folder last
    assert aside.exists() is (damage != "gone")
    assert changed is None or aside.read_bytes() == changed
    assert damage == "gone" or "set aside as 'progress.damaged-1.jsonl'" in caplog.text
    aside.unlink(missing_ok=True)
    assert goes_on(stopped) == 0


@pytest.mark.parametrize("name", ["lock.json", "progress.jsonl", "checkpoint", "both locks", "another's lines"])
def test_what_is_removed_or_written_by_others_while_a_run_is_at_work_does_not_stop_it(
    tiny_model, bigrams, corpus, expected, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SHARE", 1e9)
    folder = tmp_path / "run"

    def act(call, loss):
        if call == 9:
            if name == "another's lines":
                with (folder / "progress.jsonl").open("a") as file:
                    file.write('{"attempt": 0, "step"')
            elif name == "checkpoint":
                shutil.rmtree(folder / "checkpoint")
            elif name == "both locks":
                (folder / "lock.json").unlink()
                (folder / ".lock").unlink()
            else:
                (folder / name).unlink()
        return loss

    with pytest.raises(FolderInUseError, match="was taken over") if name == "both locks" else nullcontext():
        bc.find_subnetwork(tiny_model, Acting(bigrams, act), corpus, RECIPE, run_dir=folder)
    found = bc.find_subnetwork(tiny_model, Acting(bigrams), corpus, RECIPE, run_dir=folder)
    assert found.subnetwork == expected.subnetwork
    assert bc.load_run(folder).history == expected.history


def test_a_folder_that_is_removed_while_a_run_is_at_work_ends_it_in_a_line(tiny_model, bigrams, corpus, tmp_path):
    def act(call, loss):
        if call == 5:
            shutil.rmtree(tmp_path / "run")
        return loss

    with pytest.raises(OSError, match="run' was removed while this process was writing it"):
        bc.find_subnetwork(tiny_model, Acting(bigrams, act), corpus, RECIPE, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    bc.find_subnetwork(tiny_model, Acting(bigrams), corpus, RECIPE, run_dir=tmp_path / "run")
    assert bc.load_run(tmp_path / "run").outcome.attempts == 1


def test_a_damaged_file_of_a_finished_run_is_named_with_what_to_do(goes_on, tmp_path):
    folder = tmp_path / "run"
    goes_on(folder)
    kept, total = (found := bc.load_run(folder).subnetwork).kept, found.total
    RunFolder(folder).write_evaluation(Evaluation(Faithfulness(0.5, 1.0, 0.5, 2.0, 0.5, kept, total, kept / total)))
    remedies = {"config.json": "choose another", "training.json": "--fresh", "metrics.json": "writes it again"}
    for name, remedy in remedies.items():
        data = (folder / name).read_text()
        digit = max(re.finditer(r"\d", data[: data.index("checksum")]), key=lambda found: found.start()).start()
        changed = data[:digit] + str(9 - int(data[digit])) + data[digit + 1 :]
        for wrong in (changed, data[: len(data) // 2], "[]"):
            (folder / name).write_text(wrong)
            with pytest.raises(ValueError, match=f"{name}' is damaged: .*{remedy}"):
                bc.load_run(folder)
        (folder / name).write_text(data)
    (folder / "progress.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"progress.jsonl' is damaged: .*remove the file"):
        bc.load_run(folder)
    (folder / "progress.jsonl").unlink()
    assert bc.load_run(folder).history == []


# --- the lock ---


def test_a_folder_that_another_process_writes_is_left_alone(tiny_model, bigrams, corpus, tmp_path):
    with held_folder(tmp_path) as process, pytest.raises(FolderInUseError, match=f"process {process.pid}"):
        bc.find_subnetwork(tiny_model, bigrams, corpus, RECIPE, run_dir=tmp_path)
    assert names_in(tmp_path) == [LOCK]


def test_results_are_not_written_into_a_folder_that_another_process_writes(goes_on, tmp_path, capfd):
    folder = tmp_path / "run"
    goes_on(folder)
    with held_folder(folder) as process:
        before = names_in(folder)
        for command in ("evaluate", "analyze", "report"):
            assert cli.main([command, str(folder)]) == 1
            err = capfd.readouterr().err
            assert f"is being written by process {process.pid}" in err
            assert err.count("\n") == 1
        assert names_in(folder) == before
        (folder / "subnetwork.safetensors").unlink()
        assert cli.main(["report", str(folder)]) == 1
        assert f"is not finished: wait for process {process.pid} on" in capfd.readouterr().err


# --- a loss that explodes ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e3])
def test_a_loss_that_explodes_once_goes_back_and_lowers_the_rate(
    tiny_model, bigrams, corpus, expected, monkeypatch, tmp_path, caplog, value
):
    monkeypatch.setattr(learner, "_GOOD_EVERY", 5)
    target = Acting(bigrams, lambda call, loss: loss * value if call == 13 else loss)
    found = bc.find_subnetwork(tiny_model, target, corpus, RECIPE, run_dir=tmp_path)
    assert target.calls == 13 + 10
    (rollback,) = found.rollbacks
    assert {key: rollback[key] for key in ("attempt", "step", "back_to", "learning_rate")} == {
        "attempt": 0, "step": 12, "back_to": 10, "learning_rate": 0.025,
    }  # fmt: skip
    assert found.history[:10] == expected.history[:10]
    assert found.history[12] != expected.history[12]
    assert [record["step"] for record in found.history] == list(range(20))
    run = bc.load_run(tmp_path)
    assert (run.history, run.outcome.rollbacks) == (found.history, (rollback,))
    assert bc.find_subnetwork(tiny_model, target, corpus, RECIPE, run_dir=tmp_path).rollbacks == found.rollbacks
    assert "at step 12: back to step 10, with learning rate 0.025" in caplog.text


def test_a_gradient_that_is_not_finite_goes_back_too(tiny_model, bigrams, corpus):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.nan

    target = Acting(bigrams, lambda call, loss: Poison.apply(loss) if call == 20 else loss)
    found = bc.find_subnetwork(tiny_model, target, corpus, RECIPE)
    assert [one["what"] for one in found.rollbacks] == ["the gradient is not finite"]
    assert target.calls == 40


def test_when_no_lower_rate_helps_it_says_what_to_change(tiny_model, bigrams, corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(learner, "_GOOD_EVERY", 5)
    target = Acting(bigrams, lambda call, loss: loss * torch.nan if call in (8, 11, 19, 22, 30) else loss)
    with pytest.raises(ValueError, match=r"learning rates from 0\.05 down to 0\.003125: try a much lower .*--lr"):
        bc.find_subnetwork(tiny_model, target, corpus, RECIPE, run_dir=tmp_path)
    checkpoint = RunFolder(tmp_path).read_checkpoint()
    assert [one["back_to"] for one in checkpoint.rollbacks] == [
        5,
        0,
        5,
        0,
    ]  # the last good state first, and if that leads there again, the start
    assert not (tmp_path / "subnetwork.safetensors").exists()


def test_a_run_that_went_back_continues_to_the_same_mask(tiny_model, bigrams, corpus, monkeypatch, tmp_path):
    """Interrupted anywhere before or after it: the state to go back to is in the checkpoint."""
    monkeypatch.setattr(learner, "_GOOD_EVERY", 5)
    value = bc.find_subnetwork(tiny_model, bigrams, corpus, RECIPE).history[13]["cross_entropy"]
    explosion = training.explosion
    monkeypatch.setattr(
        training, "explosion",
        lambda record, *rest: "it explodes" if record["cross_entropy"] == value else explosion(record, *rest),
    )  # fmt: skip
    whole = bc.find_subnetwork(tiny_model, Acting(bigrams), corpus, RECIPE)
    assert len(whole.rollbacks) == 1
    for stop in (3, 5, 7, 12, 13, 15, 22):

        def interrupt(call, loss, stop=stop):
            if call == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return loss

        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            bc.find_subnetwork(tiny_model, Acting(bigrams, interrupt), corpus, RECIPE, run_dir=folder)
        found = bc.find_subnetwork(tiny_model, Acting(bigrams), corpus, RECIPE, run_dir=folder)
        assert found.subnetwork == whole.subnetwork, stop
        assert (found.history, list(found.rollbacks)) == (whole.history, list(whole.rollbacks))


# --- memory and disk ---


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_says_what_to_change_and_the_run_goes_on(
    tiny_model, bigrams, corpus, monkeypatch, tmp_path, goes_on, error
):
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SHARE", 1e9)

    def fail(call, loss):
        if call == 9:
            raise error
        return loss

    last = "--dtype bfloat16, or --device cpu" if "CUDA" in str(error) else "or --dtype bfloat16"
    said = (
        "out of memory while learning: use --low-memory, a smaller --batch-size, a shorter --context-length, "
        rf"{last}; .* \("
    )
    with pytest.raises(MemoryError, match=said) as told:
        bc.find_subnetwork(tiny_model, Acting(bigrams, fail), corpus, RECIPE, run_dir=tmp_path / "run")
    assert "\n" not in str(told.value)
    assert "the same command continues the run" in str(told.value)
    assert goes_on(tmp_path / "run") == 12


def test_other_errors_are_not_taken_for_memory(tiny_model, bigrams, corpus):
    def fail(call, loss):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        bc.find_subnetwork(tiny_model, Acting(bigrams, fail), corpus, RECIPE)


def test_the_command_says_in_one_line_that_memory_ran_out(monkeypatch, capfd):
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr("bigram_circuits.cli.commands.hooks", fail)
    assert cli.main(["hooks"]) == 1
    err = capfd.readouterr().err
    assert re.match(r"bigram-circuits: error: out of memory: use --low-memory, a smaller .*2\.00 GiB", err)
    assert err.count("\n") == 1


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_later(
    tiny_model, bigrams, corpus, monkeypatch, tmp_path, goes_on
):
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(run_folder, "_CHECKPOINT_SHARE", 1e9)
    folder = tmp_path / "run"
    for call, (module, name) in enumerate(
        [(os, "fsync"), (os, "replace"), (run_folder, "save_file"), (os, "fsync")], 1
    ):
        with monkeypatch.context() as patch:

            def act(calls, loss, call=call, module=module, name=name, patch=patch):
                if calls == 2:
                    patch.setattr(module, name, full)
                return loss

            with pytest.raises(OSError, match=r"cannot write '.*': No space left on device; free some space") as told:
                bc.find_subnetwork(tiny_model, Acting(bigrams, act), corpus, RECIPE, run_dir=folder)
        assert told.value.errno == errno.ENOSPC
        assert names_in(folder) == ["checkpoint", "config.json", "progress.jsonl"]
        assert names_in(folder / "checkpoint") == ["state.safetensors"]
    assert goes_on(folder) < 20


# --- little text ---


def test_fewer_sequences_than_a_batch_and_more_steps_than_text_just_work(tiny_model, bigrams, corpus):
    few = dataclasses.replace(corpus, train=corpus.train[:3])
    found = bc.find_subnetwork(tiny_model, bigrams, few, dataclasses.replace(RECIPE, max_steps=7))
    assert len(found.history) == 7
    with pytest.raises(ValueError, match="the training part of the corpus is empty"):
        bc.find_subnetwork(tiny_model, bigrams, dataclasses.replace(corpus, train=corpus.train[:0]), RECIPE)
