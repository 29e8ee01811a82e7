"""Two processes that learn together: `torchrun --nproc-per-node 2 -m tests.ranked FOLDER`.

Each rank writes what it saw to `rank0.json` or `rank1.json` in the folder; `tests/learning/test_ranks.py` looks at it.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

import bigram_circuits as bc
from bigram_circuits.learning.ranks import alone, current_ranks
from bigram_circuits.models.model import Model
from tests.conftest import TINY_CONFIGS, byte_tokenizer, save_tiny

QUICK = bc.SparsifyConfig(sparsity_weight=1.0, learning_rate=0.05, max_steps=12, batch_size=5, retries=0)
"""Five sequences: two for one rank and three for the other."""
RECIPES = {
    "plain": QUICK,
    "fraction": dataclasses.replace(QUICK, target_fraction=0.1),
    "attacked": dataclasses.replace(QUICK, worst_case=2),
    "neurons": dataclasses.replace(QUICK, granularity="neuron"),
}


def text() -> bc.Corpus:
    """A short text in which the next letter depends on the current one."""
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list("abcd"), 200, p=[0.4, 0.3, 0.2, 0.1])) for _ in range(20)]
    return bc.load_corpus(documents, tokenizer=byte_tokenizer(), context_length=16, held_out=0.2)


class Stopper:
    """Sends itself a signal, or fails, after a step; only on the rank that is given."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step(self, record) -> None:
        if record.step == self.after:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_end(self, found) -> None:
        pass
