"""Peak memory of tokenising and counting texts of growing size: `python benchmarks/corpus_memory.py`.

Each size runs in its own process, on artificial words that follow a Zipf distribution, with the reference tokenizer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WORK = """
import json, resource, sys, time
import bigram_circuits as bc
from transformers import AutoTokenizer
from bigram_circuits.models.loading import REFERENCE_FOLDER
tokenizer = AutoTokenizer.from_pretrained(REFERENCE_FOLDER)
started = time.perf_counter()
corpus = bc.load_corpus(sys.argv[1], tokenizer=tokenizer)
read = time.perf_counter()
table = bc.count_ngrams(corpus.train, 2, d_vocab=len(tokenizer))
counted = time.perf_counter()
for line in open("/proc/self/status"):
    if line.startswith(("RssAnon", "VmHWM")):
        name, value, _ = line.split()
        print(json.dumps({name: int(value) / 1024}))
print(json.dumps({"tokens": corpus.train.size, "read": read - started, "count": counted - read}))
"""


def write_text(path: Path, megabytes: int) -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(20_000)]
    share = 1 / np.arange(1, len(words) + 1)
    with path.open("w") as file:
        while file.tell() < megabytes * 1_000_000:
            for line in np.array(words)[rng.choice(len(words), (1000, 12), p=share / share.sum())]:
                file.write(" ".join(line) + ".\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    for megabytes in [1] if arguments.smoke else arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.txt"
            write_text(path, megabytes)
            started = time.perf_counter()
            result = subprocess.run([sys.executable, "-c", WORK, path], check=True, stdout=subprocess.PIPE, text=True)
            seconds = time.perf_counter() - started
        found = {key: value for line in result.stdout.splitlines() for key, value in json.loads(line).items()}
        print(
            f"{megabytes:5d} MB, {found['tokens'] / 1e6:6.1f} million training tokens: read {found['read']:.0f} s, "
            f"counted {found['count']:.1f} s, {seconds:.0f} s in all; memory at the end without mapped files "
            f"{found['RssAnon:']:.0f} MiB, peak with them {found['VmHWM:']:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
