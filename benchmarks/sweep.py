"""What a sweep costs beyond its runs, and whether it survives: `python benchmarks/sweep.py [--kill 10]`.

A sweep of runs that differ in the seed is done by processes on this machine, and its time is compared with the sum of
what its runs took, divided by the workers. With `--kill`, another one is done while its command and its workers are
killed with SIGKILL at random moments, the command being started again each time; it must end with the same masks, and
every run must have been done once. With `--page`, copies of one run with random masks are put into a sweep of that
many, and table and page are written.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
from smoke import save_model, write_text

import bigram_circuits as bc
from bigram_circuits.runs import RunFolder, copy_run
from bigram_circuits.scale.folder import DONE, RunState, SweepFolder
from bigram_circuits.scale.results import read_sweep, write_results
from bigram_circuits.scale.spec import read_spec


def write_spec(folder: Path, runs: int, steps: int) -> Path:
    save_model(folder / "model")
    write_text(folder)
    path = folder / "spec.toml"
    path.write_text(
        f'model = "model"\ncorpus = "text.txt"\nmax_tokens = 8000\ncontext_length = 64\nbatch_size = 16\n'
        f"max_steps = {steps}\nstop_undecided = 0\nrandom_seeds = 1\nanalysis = false\n[grid]\n"
        f"seed = {list(range(runs))}\n"
    )
    return path


def command(spec: Path, out: Path, workers: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "bigram_circuits.cli",
        "sweep",
        str(spec),
        "--out",
        str(out),
        "--workers",
        str(workers),
    ]


def start(spec: Path, out: Path, workers: int) -> subprocess.Popen:
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command(spec, out, workers), stdout=log, stderr=log, start_new_session=True)


def masks(out: Path) -> dict[str, str]:
    return {one.name: one.load().subnetwork.checksum for one in bc.load_sweep(out).runs}


def measure(spec: Path, out: Path, workers: int) -> dict[str, str]:
    """Time a sweep, and print it beside what its runs took."""
    started, clock = time.monotonic(), time.time()
    assert start(spec, out, workers).wait() == 0, out.with_suffix(".log").read_text()
    took = time.monotonic() - started
    found = bc.load_sweep(out)
    own = [one.seconds for one in found.runs]
    first = min((out / "states").iterdir(), key=lambda path: path.stat().st_mtime).stat().st_mtime - clock
    last = max(path.stat().st_mtime for path in (out / "states").iterdir()) - clock
    print(
        f"{len(own)} runs of {sum(own) / len(own):.1f} s, {workers} workers: {took:.1f} s, "
        f"{took / (sum(own) / workers):.3f} times their sum divided by the workers ({sum(own) / workers:.1f} s); the "
        f"first run ended after {first:.1f} s, the last {took - last:.1f} s before the end",
        flush=True,
    )
    return masks(out)


def kill_often(spec: Path, out: Path, workers: int, kills: int, seed: int, pause: float) -> dict[str, str]:
    """Do a sweep while its processes are killed; returns its masks."""
    rng, done, process = random.Random(seed), 0, start(spec, out, workers)
    while done < kills or process.poll() is None:
        if process.poll() is not None:
            if done < kills and (out / "sweep.json").is_file() and bc.load_sweep(out).is_done:
                print(f"it was done after {done} kills", flush=True)
                break
            process = start(spec, out, workers)
        if done == kills:
            process.wait()
            continue
        time.sleep(rng.uniform(0.2, 1.8) * pause)
        if process.poll() is not None:
            continue
        what = rng.choice(("command", "worker", "all"))
        parent = psutil.Process(process.pid)
        workers_of = [one for one in parent.children(recursive=True) if "submitit.core._submit" in one.cmdline()]
        chosen = {"command": [parent], "worker": workers_of[:1], "all": [parent, *workers_of]}[what]
        for one in chosen:
            one.send_signal(signal.SIGKILL)
        if not chosen:
            continue
        done += 1
        ended = len(list((out / "states").glob("*.json"))) if (out / "states").is_dir() else 0
        print(f"kill {done:>2}: {what} ({ended} runs started)", flush=True)
        if parent in chosen:
            process.wait()
    assert process.returncode in (0, -signal.SIGKILL), out.with_suffix(".log").read_text()
    assert start(spec, out, workers).wait() == 0, out.with_suffix(".log").read_text()
    found = bc.load_sweep(out)
    assert len(found.done) == len(found.runs), str(found)
    times = Counter(
        name
        for path in (out / "logs").glob("*.out")
        for name in re.findall(r"^(\S+): done after", path.read_text(), re.M)
    )
    print(f"{len(found.done)} runs done; how often each was: {sorted(Counter(times.values()).items())}")
    assert set(times) == {one.name for one in found.runs}
    assert set(times.values()) == {1}, "a run was done twice"
    return masks(out)


def measure_page(run: Path, root: Path, n: int) -> None:
    """Copy a run with other masks and seeds, and write table and page."""
    source = bc.load_run(run)
    options = {"max_steps": 1, "grid": {"seed": list(range(n))}}
    folder = SweepFolder(root)
    folder.path.mkdir()
    folder.extend(read_spec(options).runs, {})
    for number, one in enumerate(folder.runs):
        copied = copy_run(source, folder.run(one.name), with_evaluation=True)
        mask = source.subnetwork.random_like(seed=number)
        settings = replace(source.settings, recipe=replace(source.settings.recipe, seed=number))
        for name in ("config.json", "training.json", "subnetwork.safetensors", "metrics.json"):
            (copied.path / name).unlink()
        again = RunFolder.open(folder.run(one.name) / "new", settings, rebuild=source.rebuild)
        again.begin_progress(source.history)
        again.finish(mask, source.outcome)
        again.write_evaluation(source.evaluation, source.settings.corpus)
        for path in again.path.iterdir():
            path.rename(copied.path / path.name)
        again.path.rmdir()
        folder.write_state(one.name, RunState(DONE, seconds=1.0))
    started = time.monotonic()
    found = read_sweep(folder)
    read = time.monotonic() - started
    written = write_results(found)
    took = time.monotonic() - started - read
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.2f} MB" for path in written)
    print(f"{n} runs: read in {read:.1f} s, table and page written in {took:.1f} s: {sizes}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000, help="steps of each run")
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="also kill command and workers so often")
    parser.add_argument("--kill-seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=15.0, help="mean time between two kills, in seconds")
    parser.add_argument("--page", type=int, default=0, metavar="N", help="also write table and page of so many runs")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.runs, arguments.steps, arguments.page, arguments.workers = 2, 4, 3, 1
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        spec = write_spec(root, arguments.runs, arguments.steps)
        expected = measure(spec, root / "whole", arguments.workers)
        if arguments.kill:
            seed, pause = arguments.kill_seed, arguments.pause
            found = kill_often(spec, root / "killed", arguments.workers, arguments.kill, seed, pause)
            assert found == expected, "another mask"
            print(f"after {arguments.kill} kills, the masks of all {len(found)} runs are the same")
        if arguments.page:
            name = bc.load_sweep(root / "whole").runs[0].path
            measure_page(name, root / "many", arguments.page)


if __name__ == "__main__":
    main()
