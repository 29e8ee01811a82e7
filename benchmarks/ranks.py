"""Two processes that learn one mask against one process: `python benchmarks/ranks.py [--steps N]`.

One process with two threads (or `--threads`), and `torchrun` with two processes of one thread each, over gloo, learn
with the same recipe, and so on the same batches. Printed are the share of the kept weights that differ, by how much r
differs on held-out text, and the median time of a step, from one call of a callback to the next; each way runs alone,
one after the other. CPU times are those of whole processes, loading included: they are less noisy than wall times on a
machine that others use too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import bigram_circuits as bc

GOALS = {"weights": 0.001, "r": 0.001}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = {"one process": [], "two processes": TORCHRUN}
"""How Python is started."""
MAX_TOKENS, HELD_OUT = 2_000_000, 20_000


class Clock:
    """A callback that notes when each step has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, record: object) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def on_end(self, found: object) -> None:
        """Nothing ends here."""


def inputs(options: argparse.Namespace) -> tuple[bc.Model, bc.NGramTable, bc.Corpus]:
    """The model, target and text of a comparison."""
    model = bc.load_model(options.model, device="cpu")
    corpus = bc.load_corpus(options.corpus, tokenizer=model.tokenizer, max_tokens=options.max_tokens)
    return model, bc.count_ngrams(corpus.train, 2, d_vocab=model.cfg.d_vocab), corpus


def learn(options: argparse.Namespace) -> None:
    """Learn, in one process or as one of several, and leave the run and its times in a folder."""
    model, target, corpus = inputs(options)
    recipe, clock = bc.SparsifyConfig(max_steps=options.steps, batch_size=options.batch_size), Clock()
    bc.find_subnetwork(model, target, corpus, recipe, run_dir=options.learn, callbacks=[clock], check_memory="off")
    if os.environ.get("RANK", "0") == "0":
        (options.learn / "times").write_text(json.dumps(np.diff(clock.times).tolist()))


def compare(options: argparse.Namespace, folder: Path) -> bool:
    """Learn both ways, and print how the results differ; returns whether the goals are reached."""
    masks, given = {}, [f"--model={options.model}", f"--corpus={options.corpus}", f"--max-tokens={options.max_tokens}"]
    for name, start in WAYS.items():
        place = folder / name.replace(" ", "-")
        place_of = [f"--learn={place}", f"--steps={options.steps}", f"--batch-size={options.batch_size}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = os.environ | {"OMP_NUM_THREADS": "1" if start else str(options.threads)}
        subprocess.run([sys.executable, *start, __file__, *given, *place_of], check=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times = np.array(json.loads((place / "times").read_text()))
        masks[name] = bc.Subnetwork.load(place / "subnetwork.safetensors")
        print(
            f"{name}: {1000 * np.median(times):.0f} ms a step (median of {len(times)}; fastest tenth "
            f"{1000 * np.quantile(times, 0.1):.0f}), {cpu:.0f} s of CPU in all, {masks[name].kept:,} weights kept",
            flush=True,
        )
    one, two = masks.values()
    kept = max(one.kept, 1)
    differ = sum(int((one[name] ^ two[name]).sum()) for name in one) / kept
    model, target, corpus = inputs(options)
    r = [
        bc.evaluate(model, mask, target, corpus.held_out[: options.held_out], controls=False).subnetwork
        for mask in (one, two)
    ]
    by = abs(r[0].surprisal_correlation - r[1].surprisal_correlation)
    print(f"weights that one keeps and the other does not: {100 * differ:.3f}% of those kept (goal: at most 0.1%)")
    print(f"r: {r[0].surprisal_correlation:.4f} and {r[1].surprisal_correlation:.4f} (goal: at most 0.001 apart)")
    return differ <= GOALS["weights"] and not by > GOALS["r"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--corpus", default="reference")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="sequences of held-out text, at most")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="threads of the one process")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few steps, only to see that it runs")
    parser.add_argument("--learn", type=Path, metavar="FOLDER", help="learn only, into this folder: what is started")
    options = parser.parse_args(arguments)
    if options.learn is not None:
        learn(options)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.smoke:
            from smoke import save_model, write_text

            options.model, options.corpus = save_model(folder / "model"), write_text(folder)
            options.max_tokens, options.steps, options.batch_size = 20_000, 4, 5
        return 0 if compare(options, folder) or options.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
