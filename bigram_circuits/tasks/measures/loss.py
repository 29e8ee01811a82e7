"""The surprisal of the right answer."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from bigram_circuits.tasks.answers import Answers
from bigram_circuits.tasks.measures.base import AtAnswers, Measure


class _Loss(Measure):
    """-log P(answer | prompt), the sum over its tokens; the answer is given if each of them is the most likely one."""

    meaning = "the answers of"

    def cross_entropy(self, log_probs: AtAnswers, answers: Answers, theirs: AtAnswers | None) -> Float[Tensor, " row"]:
        return -answers.log_prob(log_probs)

    def agreement(self, log_probs: AtAnswers, answers: Answers, theirs: AtAnswers | None) -> Bool[Tensor, " row"]:
        return answers.is_first(log_probs)


MEASURE = _Loss()
