"""A task as a target for masks: what is wanted of a model at the answers, and nowhere else."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.model import Model
from bigram_circuits.recipe import MEASURES
from bigram_circuits.targets.base import PlacedTarget, Target
from bigram_circuits.targets.model import ModelTarget
from bigram_circuits.targets.next_token import NextTokenTarget
from bigram_circuits.tasks.answers import Answers
from bigram_circuits.tasks.measures.base import AtAnswers, Measure
from bigram_circuits.tasks.task import Task
from bigram_circuits.text.corpus import Corpus
from bigram_circuits.text.known import KnownSequences


class TaskTarget(PlacedTarget):
    """The answers of a task as a target. Its sequences are the task's rows, from `task.corpus()`.

    What is minimised, in nats per answer, and when an answer counts as given (`top1_agreement`):

    - `loss`: -log P(answer), the sum over its tokens; each of them is the most likely one.
    - `logit_difference`: -log(P(right) / P(right or wrong)) = softplus(-d), d the logit difference; a right token is
      more likely than every wrong one.
    - `kl`: cross-entropy from the full model's distribution (KL plus its entropy), the sum over the answer's tokens;
      each is the full model's most likely one.

    With `loss` and `logit_difference` a mask may do better than the model, and then explains more than the model does;
    `kl` asks for what the model does, mistakes included. A correlation of surprisals is defined for `kl` alone.

    Example:
        >>> answers = bc.TaskTarget(task)
        >>> bc.evaluate(model, found, answers, task.corpus().held_out, controls=False)
    """

    def __init__(self, task: Any, measure: str = "loss", *, model: Model | None = None) -> None:
        """Take a `Task` and a measure, one of `MEASURES`; `kl` needs the full model.

        Raises:
            ValueError: If there is no such measure, it needs wrong answers and the task has none, it needs a model, or
                two prompts of the task have the same tokens.
        """
        if not isinstance(task, Task):
            raise ValueError(f"a TaskTarget is made of a Task, such as load_task returns, not of {type(task).__name__}")
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, not {measure!r}")
        self.task: Task = task
        self.measure = measure
        self.most_places = int(task.scored.sum(1).max())
        self._measure: Measure = MEASURES[measure]
        if self._measure.needs_wrong and task.wrong is None:
            raise ValueError(f"the measure {measure} needs wrong answers, but the task {task.name!r} has none")
        if self._measure.needs_model and model is None:
            raise ValueError(f"the measure {measure} compares with the full model: give it as model=")
        self._full = ModelTarget(model) if model is not None and self._measure.needs_model else None
        self._asked = np.arange(len(task))  # the row whose answer is asked for in each row
        self._known = KnownSequences(task.tokens, task.ends)
        found = self._rows_of(self._known.tokens)
        if not np.array_equal(found, np.arange(len(task))):
            row = int((found != np.arange(len(task))).argmax())
            raise ValueError(f"prompts {row} and {found[row]} of the task {task.name!r} have the same tokens")

    @property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A hash of tokens, answers and measure, and, for `kl`, of the model's weights as they are now."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self._known.tokens, self.task.scored, self.task.right, self.task.wrong, self._asked):
            digest.update(
                b"none" if array is None else repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()
            )
        full = "" if self._full is None else f" {self._full.fingerprint}"
        return f"task {self.measure} {digest.hexdigest()}{full}"

    def task_of(self, tokens: Integer[np.ndarray, "sequence position"]) -> Task:
        """The rows of the task that a text consists of, for example `corpus.held_out`.

        Raises:
            ValueError: If a sequence is none of them.
        """
        return self.task.select(self._rows_of(tokens))

    def unpadded(self, corpus: Corpus) -> Corpus:
        """The sequences of the length that is most common in the held-out part, without padding.

        If the training part has none of a length that the held-out part has, the corpus as it is.

        Raises:
            ValueError: If a sequence is not a row of the task.
        """
        parts = [np.asarray(part) for part in (corpus.train, corpus.held_out)]
        ends = [self.task.ends[self._rows_of(part)] + 1 for part in parts]
        common = Counter(ends[1][np.isin(ends[1], ends[0])].tolist()).most_common(1)
        if not common:
            return corpus
        length = common[0][0]
        train, held_out = (part[end == length, :length] for part, end in zip(parts, ends, strict=True))
        return replace(corpus, train=train, held_out=held_out, documents=(len(train), len(held_out)))

    # --- the target ---

    def cross_entropy(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch 1"]:
        """Return what the measure minimises, in nats per answer."""
        answers, theirs = self._wanted(tokens, logits.device)
        return self._measure.cross_entropy(answers.read(logits), answers, theirs)[:, None]

    def agreement(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch 1"]:
        """Return 1 where the model's answer is the wanted one, else 0."""
        answers, theirs = self._wanted(tokens, logits.device)
        return self._measure.agreement(answers.read(logits), answers, theirs)[:, None].float()

    def entropy(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch 1"]:
        """Return the entropy of the full model's distributions for `kl`, in nats per answer; 0 for other measures."""
        answers, theirs = self._wanted(tokens, tokens.device)
        if theirs is None:
            return torch.zeros(len(tokens), 1, dtype=torch.float32, device=tokens.device)
        return answers.cross_entropy(theirs, theirs)[:, None]

    def surprisal(self, tokens: Integer[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_minus_1"]:
        """Return the full model's surprisal of the answer's tokens for `kl`, else 0; inf at all other positions."""
        if self._full is None:
            own = torch.zeros(tokens[:, 1:].shape, dtype=torch.float32, device=tokens.device)
        else:
            own = self._full.surprisal(tokens)
        return torch.where(self.counted(tokens), own, torch.inf)

    def counted(self, tokens: Integer[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos_minus_1"]:
        """Return True where a token of the answer is predicted."""
        scored = self.task.scored[self._rows_of(tokens), 1 : tokens.shape[1]]
        return torch.from_numpy(scored).to(tokens.device)

    def read(
        self, logits: Float[Tensor, "batch pos d_vocab"], tokens: Integer[Tensor, "batch pos"]
    ) -> Float[Tensor, "place d_vocab"]:
        """Return the logits where answers are predicted, of all rows one after the other."""
        return logits[:, :-1][self.counted(tokens).to(logits.device)]

    def nonsense(self, seed: int) -> TaskTarget:
        """The answers dealt to the prompts at random, among those of as many tokens: nothing in a prompt tells them."""
        other = TaskTarget(self.task, self.measure, model=None if self._full is None else self._full.model)
        rng, counts = np.random.default_rng(seed), self.task.scored.sum(1)
        for count in np.unique(counts):
            rows = np.flatnonzero(counts == count)
            other._asked[rows] = rng.permutation(rows)
        return other

    def everywhere(self) -> Target:
        """The full model's distribution for `kl`, else the next token, at every position."""
        return NextTokenTarget() if self._full is None else self._full

    def __repr__(self) -> str:
        return f"TaskTarget({self.task!r}, {self.measure!r})"

    # --- rows ---

    def _rows_of(
        self, tokens: Integer[Tensor, "batch pos"] | Integer[np.ndarray, "batch pos"]
    ) -> Integer[np.ndarray, " batch"]:
        """The rows of the task that sequences are, padded or not."""
        rows = self._known.find(tokens)
        if (rows < 0).any():
            raise NotShownError(
                f"the target is defined on the prompts of the task {self.task.name!r} alone, but there is another "
                "sequence: use task.corpus(), or a part of it"
            )
        return rows

    def _wanted(self, tokens: Integer[Tensor, "batch pos"], device: torch.device) -> tuple[Answers, AtAnswers | None]:
        """Where the answers of sequences are predicted, with the answers asked for, and the full model's there."""
        rows = self._rows_of(tokens)
        asked = torch.from_numpy(self._asked[rows])
        own, wanted = (self.task.answers.at(index, device) for index in (torch.from_numpy(rows), asked))
        theirs = None
        if self._full is not None:
            others = torch.from_numpy(self._known.tokens[asked.numpy()].astype(np.int64)).to(tokens.device)
            same = bool((asked.numpy() == rows).all())
            theirs = wanted.read(self._full.log_probs(tokens if same else others).to(device))
        return Answers(own.places, wanted.right, wanted.wrong), theirs
