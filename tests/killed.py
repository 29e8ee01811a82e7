"""Runs that are killed: a process that has loaded everything forks one child for each life of a run, and kills it.

`python -m tests.killed FOLDER random KILLS SEED` kills `find` at random moments of its whole life.
`python -m tests.killed FOLDER every STRIDE` kills the writing of a run before each access to its folder in turn.
Either prints one JSON record. It is a process of its own since only one without threads can be forked safely.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import bigram_circuits as bc
from bigram_circuits import cli, runs, workflow
from bigram_circuits.analysis.location import by_layer
from bigram_circuits.analysis.suite import Analyses
from bigram_circuits.learning import learner, training
from bigram_circuits.runs import folder as run_folder
from bigram_circuits.storage.origin import Origin
from tests.conftest import TINY_CONFIGS, save_tiny
from tests.folders import names_in

ACCESSES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime"}


def child(work: Callable[[], object], log: Path) -> int:
    """Fork a process that does some work with its output in a file; gives its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float | None = None) -> int:
    """Wait for a child, for so many seconds at most, then kill it; gives its exit code, -9 if it was killed."""
    if seconds is not None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finished(work: Callable[[], object], log: Path) -> None:
    code = ended(child(work, log))
    assert code == 0, f"exit code {code}: {log.read_text()[-3000:]}"


def result(folder: Path) -> tuple[str, list[runs.StepRecord], tuple]:
    """What a finished run must end in, however often it was killed; and nothing else may lie in its folder."""
    run = bc.load_run(folder)
    names = set(names_in(folder))
    expected = {"config.json", "progress.jsonl", "subnetwork.safetensors", "training.json", "metrics.json", "analysis"}
    assert names - {"report.html"} == expected, names
    assert set(run.analyses) == {"by_layer"}
    assert run.metrics is not None
    return run.subnetwork.checksum, run.history, (run.outcome.rollbacks, run.outcome.stopped_because)


def stage(folder: Path) -> str:
    """How far a run was when it was killed."""
    if (folder / "report.html").exists():
        return "after the report"
    for name in ("analysis", "metrics.json", "subnetwork.safetensors", "training.json"):
        if (folder / name).exists():
            return f"after {name}"
    if (folder / "checkpoint").is_dir():
        names = os.listdir(folder / "checkpoint")
        return "while a checkpoint was written" if any(name[0] == "." for name in names) else "between checkpoints"
    return "before the first checkpoint" if (folder / "config.json").exists() else "before config.json"


def often() -> None:
    """Checkpoints at every step, states to go back to at every fifth, and a loss that once explodes."""
    run_folder._CHECKPOINT_SECONDS, run_folder._CHECKPOINT_SHARE = 0.0, 1e9
    learner._GOOD_EVERY = 3


def explode_once_at(history: list[runs.StepRecord], step: int) -> None:
    """Let the loss explode at a step of this history; a lower rate leads to another loss there."""
    value, explosion = history[step]["cross_entropy"], training.explosion

    def explodes(record, *rest):
        return "the loss is 99" if record["cross_entropy"] == value else explosion(record, *rest)

    training.explosion = explodes


def small_analysis(model, subnetwork, *_, **__) -> Analyses:
    of = Origin(subnetwork=subnetwork.checksum)
    return Analyses({"by_layer": by_layer(subnetwork)}, {"induction": "not looked at"}, of)


def at_random_moments(folder: Path, kills: int, seed: int) -> dict:
    """Kill `find`, from loading to the report, at random moments of its life."""
    save_tiny(folder / "model", TINY_CONFIGS["gpt_neox"])
    (folder / "text.txt").write_text("".join(f"line {n} of a small text\n" + "\n" * (n % 7 == 0) for n in range(1500)))
    options = ["--steps", "50", "--batch-size", "4", "--context-length", "32", "--random-seeds", "1"]
    command = ["find", folder / "model", "--corpus", folder / "text.txt", "--max-tokens", "20000", *options]
    log = folder / "log"
    workflow.analyze = small_analysis

    def find(name: str) -> Callable[[], None]:
        def work() -> None:
            code = cli.main([*map(str, command), "--out", str(folder / name)])
            assert code == 0, code

        return work

    finished(find("probe"), log)
    often()
    explode_once_at(bc.load_run(folder / "probe").history, 20)
    started = time.monotonic()
    finished(find("whole"), log)
    life = time.monotonic() - started
    expected = result(folder / "whole")
    assert len(expected[2][0]) == 1
    rng = random.Random(seed)
    stages: Counter[str] = Counter()
    done = 0
    while sum(stages.values()) < kills:
        run = folder / f"run-{done}"
        code = ended(child(find(run.name), log), rng.uniform(0, life))
        assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
        if code:
            stages[stage(run)] += 1
        if code == 0 or (run / "subnetwork.safetensors").exists() or sum(stages.values()) == kills:
            finished(find(run.name), log)
            assert result(run) == expected
            done += 1
    return {"kills": sum(stages.values()), "stages": stages, "runs": done, "seconds": round(life, 2)}


def before_every_access(folder: Path, stride: int) -> dict:
    """Kill a run before its n-th access to its folder, for every n of a stride, and let the same work finish it."""
    save_tiny(folder / "model", TINY_CONFIGS["gpt_neox"])
    model = bc.load_model(folder / "model", device="cpu")
    corpus = bc.load_corpus(["abcab" * 200, "cabba" * 200] * 4, tokenizer=model.tokenizer, context_length=16)
    target = bc.count_ngrams(corpus.train, 2, d_vocab=257)
    config = bc.SparsifyConfig(learning_rate=0.05, beta_growth=1.1, max_steps=6, batch_size=4)
    log = folder / "log"

    def work(name: str, kill_at: int | None = None, count: Path | None = None) -> Callable[[], None]:
        def accessed(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in ACCESSES and any(isinstance(one, str | Path) and place in str(one) for one in arguments):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        def do() -> None:
            sys.addaudithook(accessed)
            found = bc.find_subnetwork(model, target, corpus, config, run_dir=folder / name)
            run = runs.RunFolder(folder / name)
            with run.lock():
                run.write_evaluation(bc.evaluate(model, found.subnetwork, target, corpus.held_out, controls=False))
                small_analysis(model, found.subnetwork).save(folder / name / "analysis")
            if count:
                count.write_text(str(seen))

        seen, place = 0, f"/{name}/"
        return do

    finished(work("probe"), log)
    often()
    explode_once_at(bc.load_run(folder / "probe").history, 4)
    finished(work("whole", count=folder / "count"), log)
    expected = result(folder / "whole")
    assert [one.back_to for one in expected[2][0]] == [3]
    accesses = int((folder / "count").read_text())
    moments = range(1, accesses + 1, stride)
    for moment in moments:
        name = f"run-{moment}"
        assert ended(child(work(name, moment), log)) == -signal.SIGKILL, log.read_text()[-3000:]
        finished(work(name), log)
        assert result(folder / name) == expected, moment
    return {"accesses": accesses, "kills": len(moments)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, what, *numbers = sys.argv[1:]
    made = {"random": at_random_moments, "every": before_every_access}[what](Path(where), *map(int, numbers))
    print(json.dumps(made))
