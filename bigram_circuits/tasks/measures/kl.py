"""The full model's own distribution where the answer is predicted, right or wrong."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from bigram_circuits.tasks.answers import Answers
from bigram_circuits.tasks.measures.base import AtAnswers, Measure


class _KL(Measure):
    """Cross-entropy from the full model's distributions, the sum over the answer's tokens; minus their entropy, KL."""

    meaning = "the model's own predictions at the answers of"
    needs_model = True

    def cross_entropy(self, log_probs: AtAnswers, answers: Answers, theirs: AtAnswers | None) -> Float[Tensor, " row"]:
        assert theirs is not None, "it needs the model"
        return answers.cross_entropy(theirs, log_probs)

    def agreement(self, log_probs: AtAnswers, answers: Answers, theirs: AtAnswers | None) -> Bool[Tensor, " row"]:
        assert theirs is not None, "it needs the model"
        same = log_probs.argmax(-1) == theirs.argmax(-1)
        return (same | (answers.places < 0)).all(1)


MEASURE = _KL()
