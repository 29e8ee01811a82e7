"""Counting bigrams, and the sparse loss, at GPT-2's vocabulary: `python benchmarks/counting.py`.

Counting runs on one core, against `numpy.unique` of the same keys as int64. The loss (forward and backward) runs
against the unembedding matrix product that makes its logits, in the same process and with the same threads.
Token ids are drawn from a Zipf distribution, which is close to that of words.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from bigram_circuits import count_ngrams

D_VOCAB = 50_257


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


def counting(millions: int, repeats: int) -> None:
    tokens = zipf_tokens(millions * 1_000_000 // 128)
    ours = seconds(lambda: count_ngrams(tokens, 2, d_vocab=D_VOCAB), repeats)

    def plain() -> None:
        keys = tokens[:, :-1].astype(np.int64) * D_VOCAB + tokens[:, 1:]
        np.unique(keys, return_counts=True)

    unique = seconds(plain, repeats)
    table = count_ngrams(tokens, 2, d_vocab=D_VOCAB)
    print(f"counting {tokens.size / 1e6:.0f} million tokens, {table.n_entries:,} distinct bigrams, table included")
    print(f"  count_ngrams  {tokens.size / ours / 1e6:6.1f} million tokens a second")
    print(f"  numpy.unique  {tokens.size / unique / 1e6:6.1f} million tokens a second, no table")
    print(f"  ratio         {unique / ours:6.2f}")


def loss(d_model: int, repeats: int) -> None:
    table = count_ngrams(zipf_tokens(80_000), 2, d_vocab=D_VOCAB)
    tokens = torch.from_numpy(zipf_tokens(32, seed=1))
    residual = torch.randn(32, 128, d_model)
    unembedding = torch.randn(d_model, D_VOCAB) / d_model**0.5
    logits = (residual @ unembedding).requires_grad_()
    product = seconds(lambda: residual @ unembedding, repeats)
    forward = seconds(lambda: table.cross_entropy(logits.detach(), tokens), repeats)

    def both() -> None:
        logits.grad = None
        table.cross_entropy(logits, tokens).mean().backward()

    forward_backward = seconds(both, repeats)
    print(f"loss of 32 x 128 tokens over {D_VOCAB:,}, d_model {d_model}, {table.n_entries:,} distinct bigrams")
    print(f"  unembedding product           {product:.3f} s")
    print(f"  loss                          {forward:.3f} s; ratio {forward / product:.2f}")
    print(f"  loss and gradient of logits   {forward_backward:.3f} s; ratio {forward_backward / product:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=32, help="tokens to count")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    counting(arguments.millions, arguments.repeats)
    torch.set_num_threads(threads)
    loss(arguments.d_model, arguments.repeats)


if __name__ == "__main__":
    main()
