"""A run survives: kills, damage, two processes at once, a loss that explodes, memory and disks that are full."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import bigram_circuits as bc
from bigram_circuits import cli, runs
from bigram_circuits.evaluation import SoftHardGap
from bigram_circuits.learning import learner, training
from bigram_circuits.runs import RunFolder
from bigram_circuits.storage import files, locks
from bigram_circuits.storage.files import checked_json, read_checked_json, whole_file, whole_folder, write_text
from bigram_circuits.storage.locks import LOCK, FolderInUseError, lock_folder

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


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- kills ---


def killed(folder, *arguments):
    command = [sys.executable, "-m", "tests.killed", str(folder), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_run_killed_at_random_moments_ends_in_the_same_mask(tmp_path):
    assert killed(tmp_path, "random", 3, 0)["kills"] == 3


def test_a_run_killed_before_any_access_to_its_folder_ends_in_the_same_mask(tmp_path):
    made = killed(tmp_path, "every", 17)
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
def stopped(tiny_model, bigrams, corpus, tmp_path):
    """The folder of a run that was interrupted after step 12 of 20."""

    def interrupt(call, loss):
        if call == 12:
            os.kill(os.getpid(), signal.SIGTERM)
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


def test_a_checkpoint_of_an_earlier_version_still_continues(stopped, goes_on):
    path = stopped / "checkpoint" / "state.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"])
    save_file(tensors, path, {"state": json.dumps({key: state[key] for key in ("step", "attempt", "seconds")})})
    config = json.loads((stopped / "config.json").read_text())
    del config["checksum"]
    write_text(stopped / "config.json", json.dumps(config))
    assert goes_on(stopped) == 8


def test_other_versions_are_noted(stopped, goes_on, capfd):
    config = read_checked_json(stopped / "config.json")
    config["versions"]["torch"] = "1.0"
    write_text(stopped / "config.json", checked_json(config))
    assert goes_on(stopped) == 8
    assert re.search(r"note: this run was begun with other versions \(torch \S+, then 1\.0\)", capfd.readouterr().err)


# --- damage ---


def flips(path, count=25):
    """Write the file with one bit flipped, many times over, in turn."""
    data, rng = path.read_bytes(), random.Random(0)
    for place in rng.sample(range(len(data)), min(count, len(data))):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(7)]) + data[place + 1 :])
        yield place
    path.write_bytes(data)


def test_a_flipped_bit_in_a_record_is_noticed(tmp_path):
    path = tmp_path / "metrics.json"
    record = {"r": 0.123456789, "none": None, "nested": {"b": [1, 2.5], "a": "é"}, "nan": float("nan")}
    write_text(path, checked_json(record))
    whole = read_checked_json(path)
    assert repr(whole) == repr(record)
    noticed = 0
    for _ in flips(path, 1000):
        try:
            read = read_checked_json(path)
        except ValueError as error:
            noticed += str(path) in str(error)
            continue
        read = {name: value for name, value in read.items() if name in record or '"checksum"' in path.read_text()}
        assert repr(read) == repr(record)  # white space, or another name of the checksum
    assert noticed > 50
    write_text(path, json.dumps(record))
    assert repr(read_checked_json(path)) == repr(record)


def test_a_damaged_checkpoint_is_not_used(stopped, goes_on, capfd, tmp_path):
    path = stopped / "checkpoint" / "state.safetensors"
    for _ in flips(path):
        with pytest.raises(ValueError, match=r"state.safetensors' is damaged"):
            RunFolder(stopped).read_checkpoint()
    path.write_bytes(path.read_bytes()[:-7])
    assert goes_on(stopped) == 20
    err = capfd.readouterr().err
    assert "state.safetensors' is damaged" in err
    assert "learning starts over, and ends in the same subnetwork" in err


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_progress_that_is_not_what_came_before_the_checkpoint_starts_over(stopped, goes_on, capfd, damage):
    path = stopped / "progress.jsonl"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-40] if damage == "cut" else data.replace(b'"step": 3', b'"step": 4'))
    assert goes_on(stopped) == 20
    assert "progress.jsonl' is damaged" in capfd.readouterr().err


def test_a_damaged_file_of_a_finished_run_is_named_with_what_to_do(goes_on, tmp_path):
    folder = tmp_path / "run"
    goes_on(folder)
    RunFolder(folder).write_metrics({"subnetwork": {"kept": 1234}})
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
    with pytest.raises(ValueError, match=r"progress.jsonl' is damaged: .*without the file"):
        bc.load_run(folder)
    (folder / "progress.jsonl").unlink()
    assert bc.load_run(folder).history == []


# --- whole files and folders ---


def test_a_file_and_its_name_are_on_the_disk_when_it_is_there(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(first, *rest, name=name, real=real):
            done.append((name, "folder" if name == "fsync" and os.path.isdir(f"/dev/fd/{first}") else "file"))
            return real(first, *rest)

        monkeypatch.setattr(os, name, noted)
    write_text(tmp_path / "file.txt", "text")
    assert done == [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]


@pytest.mark.parametrize(
    ("there", "left"), [("new", None), ("old", "old"), ("new old", "new"), ("now new", "now"), ("now old", "now")]
)
def test_a_folder_whose_replacing_was_killed_is_whole_again(tmp_path, there, left):
    for name in there.split():
        folder = tmp_path / ("analysis" if name == "now" else f"analysis.{name}")
        folder.mkdir()
        (folder / "who").write_text(name)
    files.recover_folder(tmp_path / "analysis")
    assert names_in(tmp_path) == (["analysis"] if left else [])
    if left:
        assert (tmp_path / "analysis" / "who").read_text() == left


def test_a_folder_whose_making_fails_leaves_what_was_there(tmp_path):
    with whole_folder(tmp_path / "analysis") as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "analysis") as fresh:  # noqa: PT012
        (fresh / "b").write_text("2")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == ["analysis"]
    assert names_in(tmp_path / "analysis") == ["a"]


# --- the lock ---

HOLDS = """
import sys, time
from bigram_circuits.storage.locks import FolderInUseError, lock_folder
try:
    with lock_folder(sys.argv[1]):
        print("mine", flush=True)
        sys.stdin.read()
except FolderInUseError as error:
    print(error, flush=True)
"""


def start_holder(folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], **pipes)


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds."""
    process = start_holder(tmp_path / "run")
    assert process.stdout.readline() == "mine\n"
    yield process, tmp_path / "run"
    process.kill()
    process.communicate()


def test_a_second_writer_is_told_who_the_first_is(held):
    process, folder = held
    with pytest.raises(
        FolderInUseError, match=rf"run' is being written by process {process.pid} on .* since 20"
    ) as told:
        lock_folder(folder).__enter__()
    assert "wait until it is done, or choose another folder" in str(told.value)
    record = json.loads((folder / LOCK).read_text())
    assert (record["process"], record["command"].split()[0]) == (process.pid, "-c")
    process.communicate("")
    assert not (folder / LOCK).exists()
    with lock_folder(folder):
        assert json.loads((folder / LOCK).read_text())["process"] == os.getpid()
    assert names_in(folder) == []


def test_the_lock_of_a_killed_process_stops_nobody(held, capfd):
    process, folder = held
    process.kill()
    process.wait()
    assert (folder / LOCK).exists()
    with lock_folder(folder):
        pass
    assert re.search(rf"note: .*process {process.pid} .*, which is gone; going on", capfd.readouterr().err)


def test_of_processes_that_start_at_the_same_instant_exactly_one_runs(tmp_path):
    for turn in range(3):
        processes = [start_holder(tmp_path / f"run-{turn}") for _ in range(4)]
        said = [process.stdout.readline() for process in processes]
        assert said.count("mine\n") == 1
        assert sum("is being written by" in line for line in said) == 3
        for process in processes:
            process.communicate("")
        assert not (tmp_path / f"run-{turn}" / LOCK).exists()


def test_a_lock_is_released_on_exceptions_nests_and_keeps_other_threads_out(tmp_path):
    told = []

    def other():
        try:
            lock_folder(tmp_path).__enter__()
        except FolderInUseError as error:
            told.append(error)

    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path), lock_folder(tmp_path):  # noqa: PT012
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        _ = 1 / 0
    assert len(told) == 1
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("flock", [True, None])
def test_where_the_kernel_cannot_tell_the_heartbeat_does(tmp_path, monkeypatch, alive, flock):
    monkeypatch.setattr(locks, "_PATIENCE", 0.4)
    monkeypatch.setattr(locks, "_SETTLED", 0.01)
    monkeypatch.setattr(locks, "_flock", lambda handle: flock)
    elsewhere = {"host": "elsewhere", "boot": "another", "process": 7, "started": "2025-01-01T00:00:00Z"}
    (tmp_path / LOCK).write_text(json.dumps(elsewhere))
    over = threading.Event()
    heart = threading.Thread(target=lambda: [os.utime(tmp_path / LOCK) for _ in iter(lambda: over.wait(0.02), True)])
    if alive:
        heart.start()
    try:
        if alive:
            with pytest.raises(FolderInUseError, match="process 7 on 'elsewhere'"):
                lock_folder(tmp_path).__enter__()
        else:
            with lock_folder(tmp_path):
                assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    finally:
        over.set()
        if alive:
            heart.join()


def test_a_folder_that_another_process_writes_is_left_alone(held, tiny_model, bigrams, corpus):
    process, folder = held
    with pytest.raises(FolderInUseError, match=f"process {process.pid}"):
        bc.find_subnetwork(tiny_model, bigrams, corpus, RECIPE, run_dir=folder)
    assert names_in(folder) == [LOCK]


def test_results_are_not_written_into_a_folder_that_another_process_writes(goes_on, tmp_path, capfd):
    folder = tmp_path / "run"
    goes_on(folder)
    process = start_holder(folder)
    assert process.stdout.readline() == "mine\n"
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
    process.communicate("")


# --- a loss that explodes ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e3])
def test_a_loss_that_explodes_once_goes_back_and_lowers_the_rate(
    tiny_model, bigrams, corpus, expected, monkeypatch, tmp_path, capfd, value
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
    assert (run.history, run.outcome["rollbacks"]) == (found.history, [rollback])
    assert bc.find_subnetwork(tiny_model, target, corpus, RECIPE, run_dir=tmp_path).rollbacks == found.rollbacks
    assert "at step 12: back to step 10, with learning rate 0.025" in capfd.readouterr().err


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
    with pytest.raises(ValueError, match=r"learning rates from 0\.05 down to 0\.003125: try float32 .*--lr"):
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
    monkeypatch.setattr(runs, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(runs, "_CHECKPOINT_SHARE", 1e9)

    def fail(call, loss):
        if call == 9:
            raise error
        return loss

    said = (
        "out of memory while learning: use --low-memory, a smaller --batch-size, a shorter --context-length, "
        "--dtype bfloat16"
    )
    with pytest.raises(MemoryError, match=said) as told:
        bc.find_subnetwork(tiny_model, Acting(bigrams, fail), corpus, RECIPE, run_dir=tmp_path / "run")
    assert "\n" not in str(told.value)
    assert "the same command continues it" in str(told.value)
    assert goes_on(tmp_path / "run") == 12


def test_other_errors_are_not_taken_for_memory(tiny_model, bigrams, corpus):
    def fail(call, loss):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        bc.find_subnetwork(tiny_model, Acting(bigrams, fail), corpus, RECIPE)


def test_the_command_says_in_one_line_that_memory_ran_out(monkeypatch, capfd):
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(cli, "_hooks", fail)
    assert cli.main(["hooks"]) == 1
    err = capfd.readouterr().err
    assert re.match(r"bigram-circuits: error: out of memory: use --low-memory, a smaller .*2\.00 GiB", err)
    assert err.count("\n") == 1


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_later(
    tiny_model, bigrams, corpus, monkeypatch, tmp_path, goes_on
):
    monkeypatch.setattr(runs, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(runs, "_CHECKPOINT_SHARE", 1e9)
    folder = tmp_path / "run"
    for call, (module, name) in enumerate([(os, "fsync"), (os, "replace"), (runs, "save_file"), (os, "fsync")], 1):
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


def test_the_writers_own_word_for_a_full_disk_is_understood(tmp_path):
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(OSError, match=r"cannot write .*x.safetensors': No space left") as told,
        whole_file(tmp_path / "x.safetensors"),
    ):
        raise SafetensorError(words)
    assert told.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == []


# --- little text ---


def test_fewer_sequences_than_a_batch_and_more_steps_than_text_just_work(tiny_model, bigrams, corpus):
    few = dataclasses.replace(corpus, train=corpus.train[:3])
    found = bc.find_subnetwork(tiny_model, bigrams, few, dataclasses.replace(RECIPE, max_steps=7))
    assert len(found.history) == 7
    with pytest.raises(ValueError, match="the training part of the corpus is empty"):
        bc.find_subnetwork(tiny_model, bigrams, dataclasses.replace(corpus, train=corpus.train[:0]), RECIPE)
