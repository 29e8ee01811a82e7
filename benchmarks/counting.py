"""Counting bigrams, loading tables, and the sparse loss, at GPT-2's vocabulary: `python benchmarks/counting.py`.

Counting on one core, including building the full table, is compared with NumPy's in-place sort of the same precomputed
keys, and with `numpy.unique` of them as int64. A table is loaded memory-mapped from an existing file. The loss (forward
and backward) is compared with the unembedding matrix product that computes its logits, in the same process and with the
same threads. Token ids are drawn from a Zipf distribution, which is close to that of words. Times are medians of
interleaved repetitions.

With `--billions`, so many billions of tokens are generated shard by shard (a vocabulary of 50,000; Zipf-distributed,
seven of ten one of eight successors of the token before) and counted in a process of its own, whose peak memory is that
of all its parts: Python, PyTorch, the generator and the counts (with workers, that of the largest process).
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bigram_circuits import NGramTable, count_ngrams
from bigram_circuits.text.ngrams import Level

D_VOCAB = 50_257
LARGE_VOCAB = 50_000
SHARD = 1 << 24  # tokens
MOST_FOR_UNIQUE = 32  # million tokens; more would take long


def zipf_tokens(n_sequences: int, length: int = 128, seed: int = 0) -> np.ndarray:
    cumulative = np.cumsum(1 / np.arange(1, D_VOCAB + 1))
    draws = np.random.default_rng(seed).random((n_sequences, length)) * cumulative[-1]
    return np.searchsorted(cumulative, draws).astype(np.int32).clip(0, D_VOCAB - 1)


def seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def elapsed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def counting(millions: int, repeats: int) -> list[tuple[str, float, float, str]]:
    """Return the ratio of counting time to sorting time; print both, and the time of `numpy.unique`."""
    tokens = zipf_tokens(millions * 1_000_000 // 128)
    keys = (tokens[:, :-1].astype(np.uint32) * np.uint32(D_VOCAB) + tokens[:, 1:].astype(np.uint32)).reshape(-1)
    times: dict[str, list[float]] = {"count_ngrams": [], "numpy's sort": [], "numpy.unique": []}
    for _ in range(repeats):
        times["count_ngrams"].append(elapsed(lambda: count_ngrams(tokens, 2, d_vocab=D_VOCAB)))
        copy = keys.copy()
        times["numpy's sort"].append(elapsed(copy.sort))
        del copy
        if millions > MOST_FOR_UNIQUE:
            continue
        wide = keys.astype(np.int64)
        times["numpy.unique"].append(elapsed(lambda wide=wide: np.unique(wide, return_counts=True)))
        del wide
    seconds = {name: float(np.median(of)) for name, of in times.items() if of}
    n_entries = count_ngrams(tokens, 2, d_vocab=D_VOCAB).n_entries
    print(f"counting {tokens.size / 1e6:.0f} million tokens, {n_entries:,} distinct bigrams")
    for name, of in seconds.items():
        print(f"  {name:<13} {of:.3f} s, {tokens.size / of / 1e6:.1f} million tokens a second")
    if "numpy.unique" in seconds:
        times_unique = seconds["count_ngrams"] / seconds["numpy.unique"]
        print(f"  count_ngrams against numpy.unique: {times_unique:.2f} times its time")
    ratio = float(np.median(np.divide(times["count_ngrams"], times["numpy's sort"])))
    return [(f"counting {millions} million bigrams, against a sort of their keys", ratio, 2.5, "x")]


def loading(millions: int, repeats: int) -> tuple[str, float, float, str]:
    """Time the loading of a table with this many bigrams, in identical rows."""
    n = millions * 1_000_000
    offsets = torch.linspace(0, n, D_VOCAB + 1, dtype=torch.float64).long()
    lengths = offsets.diff()
    rows = Level(
        contexts=torch.arange(D_VOCAB),
        offsets=offsets,
        tokens=torch.cat([torch.arange(int(longest), dtype=torch.int32) for longest in lengths]),
        probs=(1 / lengths).float().repeat_interleave(lengths),
        entropy=lengths.double().log().float(),
        top=torch.zeros(D_VOCAB, dtype=torch.int32),
    )
    first = NGramTable.from_probs(torch.eye(1)).levels[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        NGramTable(order=2, d_vocab=D_VOCAB, levels=(first, rows)).save(path)
        del rows
        times = [elapsed(lambda: NGramTable.load(path)) for _ in range(repeats)]
    return f"loading a table of {n:,} distinct bigrams", float(np.median(times)), millions / 100, "s"


def measure(millions: int = 32, repeats: int = 5, *, smoke: bool = False) -> list[tuple[str, float, float, str]]:
    """Return rows of (what, measured, goal, unit), measured on one core."""
    millions, repeats, sizes = (1, 1, (1,)) if smoke else (millions, repeats, (20, 100))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    beyond = [] if smoke else counting(4 * millions, 1)  # beyond what is sorted at once
    rows = [*counting(millions, repeats), *beyond, *(loading(size, repeats) for size in sizes)]
    torch.set_num_threads(threads)
    return rows


def shards(n_tokens: int) -> Iterator[np.ndarray]:
    """Yield generated tokens [sequence, position], the last shard smaller."""
    rng = np.random.default_rng(0)
    cumulative = np.cumsum(1 / np.arange(1, LARGE_VOCAB + 1))
    zipf = np.searchsorted(cumulative, rng.random(1 << 20) * cumulative[-1]).astype(np.int32)
    successors = zipf[rng.integers(0, len(zipf), (LARGE_VOCAB, 8))].reshape(-1)
    for start in range(0, n_tokens, SHARD):
        rows = min(SHARD, n_tokens - start) // 128
        columns = np.empty((128, rows), np.int32)
        columns[0] = zipf[rng.integers(0, len(zipf), rows, dtype=np.uint32)]
        for before, after in itertools.pairwise(columns):
            draws = rng.integers(0, 10 << 20, rows, dtype=np.uint32)
            of = draws & (len(zipf) - 1)
            after[:] = np.where(draws < 7 << 20, successors[before * 8 + (of & 7)], zipf[of])
        yield np.ascontiguousarray(columns.T)


def large(n_tokens: int, workers: int) -> None:
    """Count generated tokens, and print the numbers as JSON."""
    generating = 0.0

    def timed() -> Iterator[np.ndarray]:
        nonlocal generating
        source = shards(n_tokens)
        while True:
            started = time.perf_counter()
            shard = next(source, None)
            generating += time.perf_counter() - started
            if shard is None:
                return
            yield shard

    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        table = count_ngrams(timed(), 2, d_vocab=LARGE_VOCAB, workers=workers, out=path)
        took = time.perf_counter() - started
        size = path.stat().st_size
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak = 1024 * max(int(status["VmHWM"].split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    own = sum(os.times()[:2])
    print(json.dumps([table.n_entries, size, took, generating, peak, own]))


def counting_apart(n_tokens: int, workers: int) -> list[tuple[str, float, float, str]]:
    """Return the peak memory of a process that counts generated tokens; print it, and the time."""
    command = [sys.executable, __file__, "--tokens", str(n_tokens), "--workers", str(workers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    n_entries, size, took, generating, peak, own = json.loads(done.stdout)
    print(
        f"counting {n_tokens:,} generated tokens, {n_entries:,} distinct bigrams, a table of {size / 1e9:.2f} GB\n"
        f"  {took:.0f} s with {workers} workers, of which {generating:.0f} s generate; {own:.0f} s of CPU in this one"
    )
    return [(f"peak memory of counting {n_tokens:,} tokens", peak / 1e9, 2.0, "GB")]


def loss(d_model: int, repeats: int, counted: int = 80_000, rows: int = 32) -> None:
    table = count_ngrams(zipf_tokens(counted), 2, d_vocab=D_VOCAB)
    tokens = torch.from_numpy(zipf_tokens(rows, seed=1))
    residual = torch.randn(rows, 128, d_model)
    unembedding = torch.randn(d_model, D_VOCAB) / d_model**0.5
    logits = (residual @ unembedding).requires_grad_()
    product = seconds(lambda: residual @ unembedding, repeats)
    forward = seconds(lambda: table.cross_entropy(logits.detach(), tokens), repeats)

    def both() -> None:
        logits.grad = None
        table.cross_entropy(logits, tokens).mean().backward()

    forward_backward = seconds(both, repeats)
    print(f"loss of {rows} x 128 tokens over {D_VOCAB:,}, d_model {d_model}, {table.n_entries:,} distinct bigrams")
    print(f"  unembedding product           {product:.3f} s")
    print(f"  loss                          {forward:.3f} s; ratio {forward / product:.2f}")
    print(f"  loss and gradient of logits   {forward_backward:.3f} s; ratio {forward_backward / product:.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the rows, then the cost of the loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=32, help="tokens to count")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    parser.add_argument("--billions", type=float, help="count so many billions of generated tokens instead")
    parser.add_argument("--workers", type=int, default=1, help="processes that count these")
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.tokens is not None:
        large(arguments.tokens, arguments.workers)
        return
    if arguments.billions is not None:
        rows = counting_apart(round(arguments.billions * 1e9), arguments.workers)
    else:
        rows = measure(arguments.millions, arguments.repeats, smoke=arguments.smoke)
    if arguments.smoke:
        rows += counting_apart(1_000_000, 1)
    for what, measured, goal, unit in rows:
        print(f"{what}: {measured:.3f} {unit}, goal {goal:g} {unit}: {'met' if measured <= goal else 'MISSED'}")
    if arguments.smoke:
        loss(8, 1, counted=100, rows=1)
    elif arguments.billions is None:
        loss(arguments.d_model, arguments.repeats)


if __name__ == "__main__":
    main()
