"""A task is token ids and the places where a prediction is scored; what a model does there, and whether it can do it.

Shorter prompts are padded on the right, where no prediction is scored; a causal model's earlier predictions do not
depend on it. So the tokenizer's own side of padding does not matter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bigram_circuits.measures import statistics
from bigram_circuits.models.activations import (
    batch_size_for,
    check_predicts_tokens,
    check_tokens,
    lean_forward,
    n_outputs,
    predicts_tokens,
)
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, uses_model
from bigram_circuits.recipe import HELD_OUT_ROWS
from bigram_circuits.storage.files import write_text
from bigram_circuits.tasks.answers import Answers, is_preferred, log_total
from bigram_circuits.text.corpus import Corpus, document_position, fingerprint_of, token_array

COLUMNS = (*statistics.COLUMNS[:6], "places", "surprisal", "preferred", "log_odds")
"""Sums over one prompt. The first six are `statistics.correlation_sums` with a target's surprisals (0 without one);
`places` scored predictions, their `surprisal`, and, if a task has wrong tokens (else 0), whether a right one is
`preferred` to them, and the `log_odds` of right against wrong."""

Hooks = Callable[[int, slice], Sequence[tuple[str, Callable[..., Any]]]]
"""(batch index, rows of the task) -> forward hooks for this batch, as `run_with_hooks` takes them."""


@dataclass(frozen=True)
class Row:
    """A prompt and its answer, as text."""

    prompt: str
    """What the model reads."""
    answer: tuple[str, ...]
    """What comes next, with its leading space if it has one; of several, which are single tokens, each is correct."""
    wrong: tuple[str, ...] = ()
    """Answers to contrast it with, which are single tokens."""
    counterfactual: str | None = None
    """Another prompt of as many tokens."""
    counterfactual_answer: str | None = None
    """Its answer, of as many tokens."""

    def to_json(self) -> dict[str, Any]:
        """Convert to the fields of a line that `load_task` reads."""
        record: dict[str, Any] = {"prompt": self.prompt}
        record["answer"] = self.answer[0] if len(self.answer) == 1 else list(self.answer)
        if self.wrong:
            record["wrong"] = self.wrong[0] if len(self.wrong) == 1 else list(self.wrong)
        if self.counterfactual is not None:
            record |= {"counterfactual": self.counterfactual, "counterfactual_answer": self.counterfactual_answer}
        return record


@dataclass(frozen=True)
class Task:
    """Prompts, and the predictions in them that are scored.

    The loss is the mean surprisal (nats) of the correct tokens at scored places; if wrong tokens are given, the log
    odds are log P(right) - log P(wrong), which for one right and one wrong token is the logit difference.

    Example:
        >>> task = bc.load_task([{"prompt": "import os, sys", "answer": " import"}], tokenizer=model.tokenizer)
        >>> print(len(task.tokens), task.chance)
    """

    name: str
    """Name of the task, for example `repeated random tokens`."""
    tokens: Integer[np.ndarray, "prompt position"]
    """Token ids, including the answers."""
    scored: Bool[np.ndarray, "prompt position"]
    """True where the prediction of this token, made one position earlier, is scored; never at position 0."""
    chance: float
    """Loss of guessing among the candidates, nats per scored place."""
    right: Integer[np.ndarray, "prompt right"] | None = None
    """Token ids that all count as correct at a prompt's one scored place, padded with -1; the surprisal is then that of
    the set. None: only the actual token is correct."""
    wrong: Integer[np.ndarray, "prompt wrong"] | None = None
    """Token ids that the right ones are contrasted with, padded with -1; None if there is no contrast."""
    counterfactual: Integer[np.ndarray, "prompt position"] | None = None
    """For every prompt another one with its answer, position by position like `tokens`; None if there are none."""
    rows: tuple[Row, ...] | None = None
    """The prompts as text; None if they were made of token ids."""
    tokenizer_hash: str = "none"
    """Hash of the tokenizer's vocabulary, as in `Corpus`; `none` for token ids that come from elsewhere."""

    def __post_init__(self) -> None:
        if self.tokens.size == 0 or self.tokens.shape != self.scored.shape:
            raise ValueError(
                f"the tokens of the task {self.name!r} have shape {self.tokens.shape} and scored has "
                f"{self.scored.shape}: both should be [prompt, position], with at least one prompt"
            )
        places = self.scored.sum(1)
        if self.scored[:, 0].any() or not places.all():
            raise ValueError(
                f"every prompt of the task {self.name!r} needs a scored place, and none at position 0, "
                f"which no prediction precedes"
            )
        contrast = [ids for ids in (self.right, self.wrong) if ids is not None]
        if contrast and (places != 1).any():
            raise ValueError(f"right and wrong in the task {self.name!r} need exactly one scored place per prompt")
        if any(len(ids) != len(self.tokens) or (ids < 0).all(1).any() for ids in contrast):
            raise ValueError(f"right and wrong in the task {self.name!r} need at least one token id for every prompt")
        if self.counterfactual is not None and self.counterfactual.shape != self.tokens.shape:
            raise ValueError(
                f"the counterfactuals of the task {self.name!r} have shape {self.counterfactual.shape}, but should "
                f"have that of its tokens, {self.tokens.shape}"
            )
        if self.rows is not None and len(self.rows) != len(self.tokens):
            raise ValueError(f"the task {self.name!r} has {len(self.tokens)} prompts, but {len(self.rows)} rows")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ends(self) -> Integer[np.ndarray, " prompt"]:
        """The last scored position of every prompt; later tokens have no effect."""
        return self.scored.shape[1] - 1 - self.scored[:, ::-1].argmax(1)

    @cached_property
    def answers(self) -> Answers:
        """Where its answers are predicted, and which tokens are right and wrong there."""
        return Answers.of(self.tokens, self.scored, self.right, self.wrong)

    @property
    def preferred_by_chance(self) -> float:
        """Share of the prompts in which guessing among right and wrong tokens gives a right one; nan without wrong."""
        if self.wrong is None:
            return math.nan
        n_wrong = (self.wrong >= 0).sum(1)
        n_right = 1 if self.right is None else (self.right >= 0).sum(1)
        return float((n_right / (n_right + n_wrong)).mean())

    def select(self, prompts: Integer[np.ndarray, " chosen"]) -> Task:
        """Some of its prompts, in the order given; `chance` stays that of all."""
        arrays = {
            name: None if (value := getattr(self, name)) is None else value[prompts]
            for name in ("tokens", "scored", "right", "wrong", "counterfactual")
        }
        rows = None if self.rows is None else tuple(self.rows[index] for index in prompts.tolist())
        return replace(self, rows=rows, **arrays)

    def distinct(self) -> Task:
        """Each of its prompts once: the first of those with the same tokens."""
        _, first = np.unique(self.tokens, axis=0, return_index=True)
        return self.select(np.sort(first))

    def split(self, held_out: float | int = HELD_OUT_ROWS, seed: int = 0) -> tuple[Task, Task]:
        """Split into a training and a held-out part, which share no prompt.

        A prompt is held out if the hash of its text (of its tokens, if it is not text) falls below the share, so more
        rows in a file move none of the others. The held-out part has at least one.

        Args:
            held_out: Share of the prompts to hold out, above 0 and below 1.
            seed: Seed that selects them.

        Raises:
            ValueError: If the share is out of range, or one of the parts would be empty.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is a share of the prompts, above 0 and below 1, not {held_out}")
        at = np.array([document_position(key, str(seed)) for key in self._keys()])
        is_held_out = at < max(held_out, np.nextafter(at.min(), 1.0))
        if is_held_out.all():
            raise ValueError(
                f"all of the {len(self)} prompts of the task {self.name!r} would be held out, and none is left to "
                f"learn from: give more prompts, or a smaller held_out than {held_out}"
            )
        return self.select(np.flatnonzero(~is_held_out)), self.select(np.flatnonzero(is_held_out))

    def _keys(self) -> Iterator[str]:
        """What tells a prompt from others: its text, or else its tokens before the answer."""
        if self.rows is not None:
            return (row.prompt for row in self.rows)
        first = self.scored.argmax(1)
        return (str(ids[:end].tolist()) for ids, end in zip(self.tokens, first.tolist(), strict=True))

    def corpus(self, held_out: float | int = HELD_OUT_ROWS, seed: int = 0) -> Corpus:
        """A corpus whose sequences are the prompts with their answers, to learn masks on and to measure them.

        Shorter ones are padded on the right. Only with a `TaskTarget` is padding not counted as text.

        Args:
            held_out: As for `split`.
            seed: As for `split`.

        Raises:
            ValueError: As `split`.
        """
        train, rest = (np.ascontiguousarray(part.tokens, dtype=np.int32) for part in self.split(held_out, seed))
        counts = (len(train), len(rest))
        return Corpus(train, rest, f"task {self.name}", counts, fingerprint_of(train, rest), self.tokenizer_hash)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prompts as JSON lines that `load_task` reads.

        Raises:
            ValueError: If they were made of token ids, and are not text.
            OSError: If the file cannot be written.
        """
        if self.rows is None:
            raise ValueError(f"the prompts of the task {self.name!r} are token ids, which cannot be written as text")
        write_text(path, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in self.rows))

    def __repr__(self) -> str:
        return (
            f"Task({self.name!r}: {len(self)} prompts of {self.tokens.shape[1]} tokens, {int(self.scored.sum()):,} "
            f"scored places, chance {self.chance:.3f} nats)"
        )


def filled(rows: Sequence[Sequence[int]], padding: int = -1) -> Integer[np.ndarray, "row longest"]:
    """Rows of ids as an array, padded on the right."""
    array = np.full((len(rows), max(map(len, rows))), padding, dtype=np.int32)
    for row, ids in enumerate(rows):
        array[row, : len(ids)] = ids
    return array


def padded(
    rows: Sequence[tuple[Sequence[int], int]], start: Sequence[int]
) -> tuple[Integer[np.ndarray, "row position"], Bool[np.ndarray, "row position"]]:
    """Token ids and scored places, from (ids, number of last ids that are scored) and what comes before each row."""
    tokens = filled([[*start, *ids] for ids, _ in rows], start[-1] if start else 0)
    scored = np.zeros(tokens.shape, dtype=bool)
    for row, (ids, count) in enumerate(rows):
        end = len(start) + len(ids)
        scored[row, end - count : end] = True
    return tokens, scored


@dataclass(frozen=True)
class Ability:
    """Whether a model can do a task at all.

    Example:
        >>> able = analysis.ability(model, analysis.repeated_random_tokens(model, prompts=4, period=8))
        >>> print(able.loss, able.chance, able.able)
    """

    task: str
    """Name of the task."""
    loss: float
    """Mean surprisal of the correct tokens, nats per scored place."""
    interval: tuple[float, float]
    """95% interval of the loss, from a bootstrap over prompts."""
    chance: float
    """Loss of guessing among the candidates, nats per scored place."""
    log_odds: float
    """Mean log odds of right against wrong, nats; nan if the task has no wrong tokens."""
    preferred: float = math.nan
    """Share of prompts in which the most likely of right and wrong tokens is a right one; nan without wrong tokens."""
    preferred_interval: tuple[float, float] = (math.nan, math.nan)
    """95% interval of this share."""
    preferred_by_chance: float = math.nan
    """This share for guessing among right and wrong tokens."""

    @property
    def able(self) -> bool:
        """Whether it beats guessing: the interval of the loss lies below chance, or that of `preferred` above."""
        return self.interval[1] < self.chance or self.preferred_interval[0] > self.preferred_by_chance

    def __str__(self) -> str:
        low, high = self.interval
        verdict = "the model can do it" if self.able else "the model is NOT shown to do it"
        odds = ""
        if not math.isnan(self.log_odds):
            odds = (
                f", log odds of right against wrong {self.log_odds:.2f}, right preferred in {100 * self.preferred:.0f}%"
                f" (guessing {100 * self.preferred_by_chance:.0f}%)"
            )
        return f"{self.task}: loss {self.loss:.2f} ({low:.2f} to {high:.2f}), chance {self.chance:.2f}{odds}: {verdict}"


def refuse_unable(able: Ability, how: str) -> None:
    """Raise ValueError if a model is not shown to do a task; `how` says how to go on in spite of it."""
    if not able.able:
        raise ValueError(
            f"{able}: a subnetwork of a model that cannot do a task explains nothing; give another task or model, or "
            f"go on in spite of it ({how})"
        )


def as_task(tokens: Any, d_vocab: int) -> Task:
    """A task unchanged, or text (an array, a tensor, or a corpus: its held-out part) with every prediction scored.

    Raises:
        ValueError: If it is neither a task nor a text, or too short.
    """
    if isinstance(tokens, Task):
        return tokens
    array = token_array(tokens)
    scored = np.ones(array.shape, dtype=bool)
    scored[:, 0] = False
    return Task("text", array, scored, math.log(d_vocab))


def checked_task(model: Model, tokens: Any) -> Task:
    """A task, or text as one; raises ValueError if the model cannot read its token ids or lengths.

    Where a model's outputs are no tokens, only a task that says which outputs are right can be scored.
    """
    check_model(model)
    task = as_task(tokens, model.cfg.d_vocab)
    check_tokens(model, task.tokens)
    for ids in (task.right, task.wrong):
        if ids is not None and ids.max() >= n_outputs(model):
            what = "token ids" if predicts_tokens(model) else "ids of its outputs"
            raise ValueError(f"{what} must be 0 to {n_outputs(model) - 1} for this model, but there is {ids.max()}")
    if task.right is None:
        check_predicts_tokens(model)
    return task


@uses_model
def ability(model: Model, task: Task) -> Ability:
    """Compare a model on a task with guessing; raises ValueError if a surprisal is not finite.

    Example:
        >>> task = analysis.repeated_random_tokens(model, prompts=4, period=8)
        >>> print(analysis.ability(model, task))  # its loss, that of guessing, and whether it can do it
    """
    check_model(model)
    if not isinstance(task, Task):
        raise ValueError(f"ability is measured on a Task, not on a {type(task).__name__}")
    checked_task(model, task)
    sums = measure(model, task)
    whole = sums.sum(0)
    draws = statistics.bootstrap(sums)
    found = Ability(
        task.name, float(per_place(whole, "surprisal")), statistics.interval(per_place(draws, "surprisal")),
        task.chance, math.nan,
    )  # fmt: skip
    if task.wrong is None:
        return found
    return replace(
        found, log_odds=float(per_place(whole, "log_odds")), preferred=float(per_place(whole, "preferred")),
        preferred_interval=statistics.interval(per_place(draws, "preferred")),
        preferred_by_chance=task.preferred_by_chance,
    )  # fmt: skip


def per_place(sums: Float[np.ndarray, "... column"], name: str) -> Float[np.ndarray, "..."]:
    """The mean of a column per scored place, from rows of `COLUMNS` or sums of these."""
    return np.asarray(sums[..., COLUMNS.index(name)] / sums[..., COLUMNS.index("places")])


def measure(
    model: Model,
    task: Task,
    *,
    target: Any = None,
    hooks: Hooks | None = None,
    smallest: int = 1,
    within: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    bar: Any = None,
) -> Float[np.ndarray, "prompt column"]:
    """One row of sums (`COLUMNS`) for every prompt, from one pass in batches.

    Args:
        model: From `load_model`, masked or not.
        task: A checked task.
        target: A target with `surprisal`, whose surprisals at scored places are correlated with the model's
            (zero-probability rule: where they are finite).
        hooks: Makes forward hooks for every batch; they are removed afterwards.
        smallest: Smallest batch size, if there are enough prompts.
        within: Makes the context in which a batch, told by its index, passes through the model.
        bar: A progress bar to advance by the prompts done.

    Raises:
        ValueError: If a surprisal is not finite.
    """
    rows = []
    with torch.inference_mode(), lean_forward(model):
        for index, part in enumerate(batches(len(task), batch_size_for(model, task.tokens.shape[1]), smallest)):
            tokens = torch.from_numpy(np.asarray(task.tokens[part]).astype(np.int64)).to(model.cfg.device)
            with within(index):
                logits = (
                    model(tokens) if hooks is None else model.run_with_hooks(tokens, fwd_hooks=[*hooks(index, part)])
                )
            own = statistics.surprisals(logits, tokens) if predicts_tokens(model) else torch.zeros_like(tokens[:, 1:])
            rows.append(_batch_sums(logits, tokens, own.double(), task, part, target))
            if bar is not None:
                bar.update(len(tokens))
    return np.concatenate(rows)


def batches(n: int, size: int, smallest: int = 1) -> Iterator[slice]:
    """Slices of n rows, of nearly equal size, at most `size` and at least `smallest` (unless n is smaller)."""
    pieces = max(1, min(math.ceil(n / size), n // smallest))
    edges = [n * piece // pieces for piece in range(pieces + 1)]
    return (slice(start, stop) for start, stop in pairwise(edges))


def _batch_sums(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Integer[Tensor, "batch pos"],
    x: Float[Tensor, "batch pos_minus_1"],
    task: Task,
    part: slice,
    target: Any,
) -> Float[np.ndarray, "batch column"]:
    scored = torch.from_numpy(task.scored[part, 1:]).to(tokens.device)
    if not torch.isfinite(x[scored]).all():
        raise ValueError("the model's surprisal of a scored token is not finite (NaN or infinity in its logits)")
    x = torch.where(scored, x, 0.0)
    pairs = torch.zeros(len(x), 6, dtype=x.dtype, device=x.device)
    if target is not None:
        y = torch.where(scored, target.surprisal(tokens).to(x), torch.inf)
        pairs = statistics.correlation_sums(x, y)
    surprisal, preferred, log_odds = x.sum(1), torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    if task.right is not None or task.wrong is not None:
        places = scored.double().argmax(1)
        each = torch.arange(len(x), device=x.device)
        log_probs = logits[each, places].double().log_softmax(-1)
        own = tokens[each, places + 1][:, None]
        right = own if task.right is None else torch.from_numpy(task.right[part].astype(np.int64)).to(own)
        surprisal = -log_total(log_probs, right)
        if task.wrong is not None:
            wrong = torch.from_numpy(task.wrong[part].astype(np.int64)).to(own)
            preferred = is_preferred(log_probs, right, wrong).double()
            log_odds = -surprisal - log_total(log_probs, wrong)
    columns = torch.stack([scored.sum(1).double(), surprisal, preferred, log_odds], 1)
    return torch.cat([pairs, columns], 1).cpu().numpy()
