"""The n-gram table of the training text as a target."""

from __future__ import annotations

from bigram_circuits.targets.base import TargetKind
from bigram_circuits.text.counting import count_ngrams

_ORDERS = {1: "unigram", 2: "bigram", 3: "trigram"}
_FROM = {1: "without looking at the text before it", 2: "from the current one", 3: "from the last two"}
_COUNTED = {
    1: "how often each token occurs", 2: "counts of which token follows which",
    3: "counts of which token follows which two",
}  # fmt: skip


TARGET = TargetKind(
    make=lambda model, corpus, order: count_ngrams(corpus.train, order, d_vocab=model.cfg.d_vocab),
    label=_ORDERS.__getitem__,
    meaning=lambda order: f"the {_ORDERS[order]} probabilities of the text",
    kind="NGramTable",
    does=lambda order: f"predict the next token {_FROM[order]}",
    like=_COUNTED.__getitem__,
    uses_order=True,
)
