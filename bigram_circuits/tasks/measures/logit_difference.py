"""The choice between right and wrong answers."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bigram_circuits.tasks.answers import Answers
from bigram_circuits.tasks.measures.base import AtAnswers, Measure


class _LogitDifference(Measure):
    """-log P(right | right or wrong), which is softplus(-d) of the difference d in log-probability, or in logits.

    It falls as the difference grows, but at most to 0: a mask gains little by making a large difference larger.
    """

    meaning = "the choice between right and wrong answers of"
    needs_wrong = True

    def cross_entropy(self, log_probs: AtAnswers, answers: Answers, theirs: AtAnswers | None) -> Float[Tensor, " row"]:
        return torch.nn.functional.softplus(-answers.log_odds(log_probs))

    def agreement(self, log_probs: AtAnswers, answers: Answers, theirs: AtAnswers | None) -> Bool[Tensor, " row"]:
        return answers.is_preferred(log_probs)


MEASURE = _LogitDifference()
