"""The interface of measures: what is minimised at the answers of a task.

To add one, add a module with a `MEASURE` to this folder; its name is the value of `--measure`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from bigram_circuits.tasks.answers import Answers

AtAnswers = Float[Tensor, "row place d_vocab"]
"""Log-probabilities at the places where answers are predicted."""


class Measure(ABC):
    """A cross-entropy at the answers of a task: what a mask should minimise."""

    meaning: ClassVar[str]
    """A phrase that completes "enough to reproduce ... the task", for example `the answers of`."""
    needs_wrong: ClassVar[bool] = False
    """Whether the task must have wrong answers."""
    needs_model: ClassVar[bool] = False
    """Whether it compares with the full model's distributions, `theirs`; they are None otherwise."""

    @abstractmethod
    def cross_entropy(self, log_probs: AtAnswers, answers: Answers, theirs: AtAnswers | None) -> Float[Tensor, " row"]:
        """Return what is minimised, in nats per answer; differentiable in `log_probs`, and at least 0."""

    @abstractmethod
    def agreement(self, log_probs: AtAnswers, answers: Answers, theirs: AtAnswers | None) -> Bool[Tensor, " row"]:
        """Return whether the model's most likely answer is the wanted one."""
