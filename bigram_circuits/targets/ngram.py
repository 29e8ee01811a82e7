"""The n-gram table of the training text as a target."""

from __future__ import annotations

from bigram_circuits.targets.base import TargetKind
from bigram_circuits.text.counting import count_ngrams

_ORDERS = {1: "unigram", 2: "bigram", 3: "trigram"}


TARGET = TargetKind(
    make=lambda model, corpus, order: count_ngrams(corpus.train, order, d_vocab=model.cfg.d_vocab),
    label=_ORDERS.__getitem__,
    meaning=lambda order: f"the {_ORDERS[order]} probabilities of the text",
    kind="NGramTable",
    uses_order=True,
)
