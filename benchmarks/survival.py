"""Kill `bigram-circuits find` repeatedly and check that it ends with the same mask: `python benchmarks/survival.py`.

The command is started, killed with SIGKILL at a random moment between its start and its last file, and restarted, until
it has been killed often enough and has finished. Then the share of a full run's time spent on checkpoints is measured.
Options are passed to `find`, for example `--steps 40 gpt2 --corpus texts/`.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from smoke import find_options

import bigram_circuits as bc
from bigram_circuits.runs import RunFolder

START = (
    "from bigram_circuits import cli; from bigram_circuits.runs import folder; "
    "folder._CHECKPOINT_SECONDS = {}; folder._CHECKPOINT_SHARE = 1; cli.run()"
)


def find(options: list[str], folder: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", START.format(pause), "find", *options, "--no-analysis", "--out", str(folder)]
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def kill_often(options: list[str], kills: int, seed: int, pause: float, root: Path) -> None:
    started = time.monotonic()
    assert find(options, root / "whole", pause).wait() == 0, (root / "whole.log").read_text()
    life = time.monotonic() - started
    expected = bc.load_run(root / "whole")
    print(
        f"uninterrupted: {life:.0f} s, {len(expected.history)} steps, mask {expected.subnetwork.checksum}", flush=True
    )
    rng, done, finished = random.Random(seed), 0, 0
    while done < kills:
        folder = root / f"run-{finished}"
        process = find(options, folder, pause)
        try:
            process.wait(rng.uniform(0, life))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()
        if process.returncode:
            done += 1
            print(f"kill {done:>2}: {at(folder)}", flush=True)
        if process.returncode == 0 or (folder / "report.html").exists() or done == kills:
            assert find(options, folder, pause).wait() == 0, folder.with_suffix(".log").read_text()
            run = bc.load_run(folder)
            assert run.subnetwork == expected.subnetwork, "another mask"
            assert run.history == expected.history, "another history"
            assert run.metrics == expected.metrics, "other metrics"
            finished += 1
    print(f"{done} kills of {finished} runs: each ended in the same mask, history and metrics, bit for bit")


def at(folder: Path) -> str:
    """Describe how far a run got."""
    if not (folder / "config.json").exists():
        return "before config.json"
    steps = len(RunFolder(folder).history())
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    return f"after {steps} steps ({names})"


def measure_cost(root: Path) -> None:
    """Run the full recipe on the reference model, as `find` does, and print what its checkpoints cost."""
    sizes, times, write = [], [], RunFolder._write_checkpoint

    def timed(folder: RunFolder, *arguments: object) -> None:
        started = time.monotonic()
        write(folder, *arguments)
        times.append(time.monotonic() - started)
        sizes.append((folder.path / "checkpoint" / "state.safetensors").stat().st_size)

    RunFolder._write_checkpoint = timed
    model = bc.load_model("reference")
    corpus = bc.load_corpus("reference", tokenizer=model.tokenizer)
    target = bc.count_ngrams(corpus.train, 2, d_vocab=model.cfg.d_vocab)
    found = bc.find_subnetwork(model, target, corpus, run_dir=root / "cost")
    print(
        f"checkpoints: {len(times)} in {found.seconds:.0f} s of learning, {sum(times):.2f} s for all of them = "
        f"{100 * sum(times) / found.seconds:.2f}% of the time; at most {max(sizes, default=0) / 1e6:.1f} MB"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kill-seed", type=int, default=0)
    parser.add_argument(
        "--pause", type=float, default=1.0, help="seconds between checkpoints (in use: 20, and at most 2%% of the time)"
    )
    parser.add_argument("--no-cost", action="store_true", help="leave out the time that checkpoints take")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments, options = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:  # the cost of checkpoints is that of a whole run on the reference model
            arguments.kills, arguments.no_cost, options = 1, True, find_options(Path(folder) / "smoke")
        kill_often(options, arguments.kills, arguments.kill_seed, arguments.pause, Path(folder))
        if not arguments.no_cost:
            measure_cost(Path(folder))


if __name__ == "__main__":
    main()
