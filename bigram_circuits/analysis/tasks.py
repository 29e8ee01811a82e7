"""Small tasks that make their own prompts for any tokenizer, and a model's ability to do them.

A task is token ids and the places where a prediction is scored. There are five, each with a known mechanism:
repeated random tokens (induction heads: Olsson et al. 2022, arXiv 2209.11895), ordered sequences (successor heads:
Gould et al. 2023, arXiv 2312.09230), a value listed earlier (retrieval), greater-than (Hanna et al. 2023, arXiv
2305.00586) and indirect object identification (Wang et al. 2022, arXiv 2211.00593).

Prompts start as documents do in a corpus: with the BOS that the tokenizer puts there itself, or else with its
end-of-text token, if it has one. Shorter prompts are padded with it on the right, where no prediction is scored; a
causal model's earlier predictions do not depend on it. Answers of several tokens are scored token by token, so most
tasks work with any tokenizer; otherwise an error says why not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bigram_circuits.analysis.conditions import check_seed
from bigram_circuits.measures import statistics
from bigram_circuits.models.activations import (
    NotShownError,
    batch_size_for,
    check_predicts_tokens,
    check_tokens,
    n_outputs,
    predicts_tokens,
)
from bigram_circuits.models.model import Model
from bigram_circuits.models.state import check_model, uses_model
from bigram_circuits.text.corpus import token_array
from bigram_circuits.text.tokenizers import template_of

COLUMNS = (*statistics.COLUMNS[:6], "places", "surprisal", "log_odds")
"""Sums over one prompt. The first six are `statistics.correlation_sums` with a target's surprisals (0 without one);
`places` scored predictions, their `surprisal`, and `log_odds` of right against wrong (0 if a task has no wrong)."""

Hooks = Callable[[int, slice], Sequence[tuple[str, Callable[..., Any]]]]
"""(batch index, rows of the task) -> forward hooks for this batch, as `run_with_hooks` takes them."""

_WORDS_IN_ORDER = {
    "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "months": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    ),
    "numbers": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
}  # fmt: skip
_CYCLES = ("days", "months")  # lists whose first word follows the last
_OWNERS = (
    "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack", "Kate", "Leo", "Maria", "Nick",
    "Olivia", "Paul", "Rose", "Sam", "Tom", "Victor",
)  # fmt: skip
_THINGS = (
    "lamp", "spoon", "kite", "book", "chair", "drum", "clock", "hat", "boat", "ring", "cup", "map", "bell", "coat",
    "shoe", "key", "rope", "flag", "box", "pen",
)  # fmt: skip
_NOUNS = (
    "war", "siege", "journey", "famine", "reign", "trial", "revolt", "drought", "project", "voyage", "dispute", "truce",
)  # fmt: skip
_NAMES = (
    "Mary", "John", "James", "Robert", "Michael", "William", "David", "Richard", "Joseph", "Thomas",
    "Charles", "Daniel", "Matthew", "Mark", "Paul", "Steven", "Andrew", "Kevin", "Brian", "George", "Edward",
    "Ronald", "Jason", "Jeff", "Ryan", "Jacob", "Gary", "Eric", "Peter", "Scott", "Simon", "Frank", "Jack",
    "Adam", "Henry", "Alice", "Anna", "Emma", "Sarah", "Laura", "Lisa", "Jane", "Kate", "Susan", "Linda",
    "Julie", "Rachel", "Maria", "Helen", "Ruth", "Amy", "Tom", "Sam", "Max", "Dan", "Ben",
)  # fmt: skip
_PLACES = ("store", "park", "school", "station", "garden", "library", "office", "beach")
_OBJECTS = ("drink", "ball", "book", "ticket", "flower", "letter", "map", "coat")
_IOI_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "After {a} and {b} came to the {place}, {s} handed a {thing} to",
    "While {a} and {b} were at the {place}, {s} passed a {thing} to",
)
_FEWEST_NAMES = 6


@dataclass(frozen=True)
class Task:
    """Prompts, and the predictions in them that are scored.

    Two quantities are measured: the loss, which is the mean surprisal (nats) of the correct tokens at scored places;
    and, if wrong tokens are given, the log odds, log P(right) - log P(wrong), which for one right and one wrong token
    is the logit difference.
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

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ends(self) -> Integer[np.ndarray, " prompt"]:
        """The last scored position of every prompt; later tokens have no effect."""
        return self.scored.shape[1] - 1 - self.scored[:, ::-1].argmax(1)

    def __repr__(self) -> str:
        return (
            f"Task({self.name!r}: {len(self)} prompts of {self.tokens.shape[1]} tokens, {int(self.scored.sum()):,} "
            f"scored places, chance {self.chance:.3f} nats)"
        )


@dataclass(frozen=True)
class Ability:
    """Whether a model can do a task at all."""

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

    @property
    def able(self) -> bool:
        """Whether the entire interval of the loss lies below chance."""
        return self.interval[1] < self.chance

    def __str__(self) -> str:
        low, high = self.interval
        verdict = "the model can do it" if self.able else "the model is NOT shown to do it"
        odds = "" if math.isnan(self.log_odds) else f", log odds of right against wrong {self.log_odds:.2f}"
        return f"{self.task}: loss {self.loss:.2f} ({low:.2f} to {high:.2f}), chance {self.chance:.2f}{odds}: {verdict}"


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
    """Compare a model on a task with guessing; raises ValueError if a surprisal is not finite."""
    check_model(model)
    if not isinstance(task, Task):
        raise ValueError(f"ability is measured on a Task, not on a {type(task).__name__}")
    checked_task(model, task)
    sums = measure(model, task)
    whole = sums.sum(0)
    odds = float(per_place(whole, "log_odds")) if task.wrong is not None else math.nan
    interval = statistics.interval(per_place(statistics.bootstrap(sums), "surprisal"))
    return Ability(task.name, float(per_place(whole, "surprisal")), interval, task.chance, odds)


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
        bar: A progress bar to advance by the prompts done.

    Raises:
        ValueError: If a surprisal is not finite.
    """
    rows = []
    with torch.inference_mode():
        for index, part in enumerate(batches(len(task), batch_size_for(model, task.tokens.shape[1]), smallest)):
            tokens = torch.from_numpy(np.asarray(task.tokens[part]).astype(np.int64)).to(model.cfg.device)
            logits = model(tokens) if hooks is None else model.run_with_hooks(tokens, fwd_hooks=[*hooks(index, part)])
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
    surprisal, log_odds = x.sum(1), torch.zeros_like(x[:, 0])
    if task.right is not None or task.wrong is not None:
        places = scored.double().argmax(1)
        each = torch.arange(len(x), device=x.device)
        log_probs = logits[each, places].double().log_softmax(-1)
        own = tokens[each, places + 1][:, None]
        right = own if task.right is None else torch.from_numpy(task.right[part].astype(np.int64)).to(own)
        surprisal = -_log_total(log_probs, right)
        if task.wrong is not None:
            log_odds = -surprisal - _log_total(log_probs, torch.from_numpy(task.wrong[part].astype(np.int64)).to(own))
    columns = torch.stack([scored.sum(1).double(), surprisal, log_odds], 1)
    return torch.cat([pairs, columns], 1).cpu().numpy()


def _log_total(
    log_probs: Float[Tensor, "batch d_vocab"], ids: Integer[Tensor, "batch candidate"]
) -> Float[Tensor, " batch"]:
    """Log probability of a set of tokens; ids of -1 are padding."""
    return log_probs.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf).logsumexp(1)


# --- the tasks ---


def repeated_random_tokens(
    model: Model, *, prompts: int = 64, period: int = 24, length: int | None = None, seed: int = 0
) -> Task:
    """A block of random tokens, repeated: the task of induction heads (Olsson et al. 2022).

    All tokens after the first of the second block are scored: from there on, the previous token and its successor have
    been seen before. Ids are drawn from all but the special ones, each at most once per block; from all, and without a
    start token, if the model has no tokenizer.

    Args:
        model: From `load_model`.
        prompts: Number of prompts.
        period: Tokens in the block.
        length: Random tokens in a prompt, without the start token; by default two blocks.
        seed: Seed of the random tokens.

    Raises:
        ValueError: If the prompt does not fit the context, the block is longer than the vocabulary or shorter than 2,
            or there is nothing to score.
    """
    name = "repeated random tokens"
    length = 2 * period if length is None else length
    ids = _ordinary_ids(model)
    if not 2 <= period <= len(ids):
        kind = ValueError if period < 2 else NotShownError
        raise kind(f"period must be 2 to {len(ids)}, the number of tokens to draw from, not {period}")
    if length < period + 2:
        raise ValueError(f"length must be at least period + 2 = {period + 2}, so that a token is scored, not {length}")
    _check_prompts(prompts, seed)
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(prompts):
        block = rng.choice(ids, period, replace=False)
        rows.append((np.resize(block, length).tolist(), length - period - 1))
    return _task(model, name, rows, chance=math.log(len(ids)))


def ordered_sequences(model: Model, *, prompts: int = 64, shown: Sequence[int] = (3, 4, 5), seed: int = 0) -> Task:
    """Continue a sequence of days, months or numbers: the task of successor heads (Gould et al. 2023).

    `Monday, Tuesday, Wednesday,` -> ` Thursday`; all tokens of the answer are scored. Chance is guessing among the
    words of the list. There are fewer prompts than requested if there are not enough distinct ones.

    Args:
        model: From `load_model`.
        prompts: Maximum number of prompts.
        shown: Numbers of words shown.
        seed: Seed of the choice and order of the prompts.

    Raises:
        ValueError: If there is no tokenizer, the prompts do not fit the context, or `shown` is not 1 to 11.
    """
    _check_prompts(prompts, seed)
    if not shown or min(shown) < 1 or max(shown) > 11:
        raise ValueError(f"shown must be numbers of words from 1 to 11, not {tuple(shown)}")
    texts = []
    for name, words in _WORDS_IN_ORDER.items():
        for count in shown:
            starts = len(words) if name in _CYCLES else len(words) - count
            for start in range(starts):
                run = [words[(start + k) % len(words)] for k in range(count + 1)]
                for between in (",", ""):
                    texts.append((f"{between} ".join(run[:-1]) + between, f" {run[-1]}", len(words)))
    chosen = np.random.default_rng(seed).permutation(len(texts))[:prompts]
    return _text_task(model, "ordered sequences", [texts[index] for index in chosen])


def earlier_value(model: Model, *, prompts: int = 64, pairs: int = 4, seed: int = 0) -> Task:
    """People and their things, one of whom is mentioned again: retrieval from the context.

    `Tom has a lamp. Anna has a kite. ... Tom has a` -> ` lamp`; all tokens of the answer are scored. Chance is guessing
    among the things listed.

    Args:
        model: From `load_model`.
        prompts: Number of prompts.
        pairs: Number of people (and things) listed, 2 to 20.
        seed: Seed of the prompts.

    Raises:
        ValueError: If there is no tokenizer, the prompts do not fit the context, or `pairs` is out of range.
    """
    _check_prompts(prompts, seed)
    if not 2 <= pairs <= len(_OWNERS):
        raise ValueError(f"pairs must be 2 to {len(_OWNERS)}, not {pairs}")
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(prompts):
        owners = [_OWNERS[index] for index in rng.permutation(len(_OWNERS))[:pairs]]
        things = [_THINGS[index] for index in rng.permutation(len(_THINGS))[:pairs]]
        listed = " ".join(f"{owner} has a {thing}." for owner, thing in zip(owners, things, strict=True))
        asked = int(rng.integers(pairs))
        texts.append((f"{listed} {owners[asked]} has a", f" {things[asked]}", pairs))
    return _text_task(model, "earlier value", texts)


def greater_than(model: Model, *, prompts: int = 64, seed: int = 0) -> Task:
    """A year and the first two digits of a later one, to be completed with a greater number (Hanna et al. 2023).

    `The war lasted from the year 1732 to the year 17` -> `33` to `99`. All two-digit tokens above the year are right,
    all others wrong: the loss is the surprisal of the set of right tokens, and the log odds are log P(above) -
    log P(not above). (Hanna et al. use the difference of the two probabilities.)

    Args:
        model: From `load_model`.
        prompts: Number of prompts.
        seed: Seed of the prompts.

    Raises:
        ValueError: If there is no tokenizer, it does not split years into two tokens of two digits, or the prompts do
            not fit the context.
    """
    name, tokenizer = "greater-than", _tokenizer(model)
    _check_prompts(prompts, seed)
    years = _split_years(tokenizer)
    digits = {pair: last for (_, pair), last in years.items()}
    rng = np.random.default_rng(seed)
    usable = [(century, pair) for century, pair in years if min(digits) < pair < max(digits)]
    if not usable:
        raise NotShownError(
            f"no prompts for {name!r}: this tokenizer does not split years (1732) into two tokens (17, 32)"
        )
    rows, right, wrong, chances = [], [], [], []
    for _ in range(prompts):
        century, pair = usable[int(rng.integers(len(usable)))]
        noun = _NOUNS[int(rng.integers(len(_NOUNS)))]
        above = [last for other, last in digits.items() if other > pair]
        below = [last for other, last in digits.items() if other <= pair]
        text = f"The {noun} lasted from the year {century}{pair:02d} to the year {century}"
        rows.append(([*_encode(tokenizer, text), above[int(rng.integers(len(above)))]], 1))
        right.append(above)
        wrong.append(below)
        chances.append(math.log((len(above) + len(below)) / len(above)))
    return _task(model, name, rows, chance=float(np.mean(chances)), right=_filled(right), wrong=_filled(wrong))


def indirect_object(model: Model, *, prompts: int = 64, seed: int = 0) -> Task:
    """Indirect object identification: one of two people gives something to the other (Wang et al. 2022).

    `When Mary and John went to the store, John gave a drink to` -> ` Mary`, against ` John`. In half of the prompts
    the giver is named first. Chance is guessing between the two.

    Args:
        model: From `load_model`.
        prompts: Number of prompts.
        seed: Seed of the prompts.

    Raises:
        ValueError: If there is no tokenizer, fewer than 6 of the names used here are single tokens, or the prompts do
            not fit the context.
    """
    name, tokenizer = "indirect object", _tokenizer(model)
    _check_prompts(prompts, seed)
    before = len(_encode(tokenizer, "gave it to"))
    names = [one for one in _NAMES if len(_encode(tokenizer, f"gave it to {one}")) == before + 1]
    if len(names) < _FEWEST_NAMES:
        raise NotShownError(
            f"no prompts for {name!r}: only {len(names)} of {len(_NAMES)} names are single tokens of this tokenizer, "
            f"and {_FEWEST_NAMES} are needed"
        )
    rng = np.random.default_rng(seed)
    texts, wrong = [], []
    for index in range(prompts):
        receiver, giver = (names[k] for k in rng.choice(len(names), 2, replace=False))
        first, second = (receiver, giver) if index % 2 == 0 else (giver, receiver)
        words = {"place": _PLACES[rng.integers(len(_PLACES))], "thing": _OBJECTS[rng.integers(len(_OBJECTS))]}
        template = _IOI_TEMPLATES[rng.integers(len(_IOI_TEMPLATES))]
        text = template.format(a=first, b=second, s=giver, **words)
        texts.append((text, f" {receiver}", 2))
        wrong.append([_encode(tokenizer, f"{text} {giver}")[-1]])
    return _text_task(model, name, texts, wrong=_filled(wrong))


TASKS: dict[str, Callable[..., Task]] = {
    "repeated_random_tokens": repeated_random_tokens,
    "ordered_sequences": ordered_sequences,
    "earlier_value": earlier_value,
    "greater_than": greater_than,
    "indirect_object": indirect_object,
}
"""The tasks by name."""


def _tokenizer(model: Model) -> Any:
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise NotShownError("this model has no tokenizer, but a task needs one to make its prompts")
    return tokenizer


def _ordinary_ids(model: Model) -> Integer[np.ndarray, " token"]:
    """The ids of all tokens but the special ones; of all if there is no tokenizer."""
    ids, tokenizer = np.arange(model.cfg.d_vocab), model.tokenizer
    return ids if tokenizer is None else np.setdiff1d(ids[: len(tokenizer)], tokenizer.all_special_ids)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _check_prompts(prompts: int, seed: int) -> None:
    if prompts < 1:
        raise ValueError(f"a task needs at least 1 prompt, not {prompts}")
    check_seed(seed)


def _split_years(tokenizer: Any) -> dict[tuple[int, int], int]:
    """(century, two digits) -> id of the digits, for every year that is the century's token plus one more token."""
    start = _encode(tokenizer, "the year")
    found = {}
    for century in range(11, 20):
        head = _encode(tokenizer, f"the year {century}")
        if len(head) != len(start) + 1:
            continue
        for pair in range(100):
            ids = _encode(tokenizer, f"the year {century}{pair:02d}")
            if len(ids) == len(head) + 1 and ids[:-1] == head:
                found[century, pair] = ids[-1]
    return found


def _text_task(
    model: Model,
    name: str,
    texts: Sequence[tuple[str, str, int]],
    wrong: Integer[np.ndarray, "prompt wrong"] | None = None,
) -> Task:
    """Make a task from (prompt, answer, number of candidates); the chance loss of an answer is log(candidates)."""
    tokenizer = _tokenizer(model)
    rows = []
    for text, answer, _ in texts:
        prompt, whole = _encode(tokenizer, text), _encode(tokenizer, text + answer)
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise NotShownError(f"no prompts for {name!r}: this tokenizer does not separate {answer!r} from {text!r}")
        rows.append((whole, len(whole) - len(prompt)))
    chance = sum(math.log(candidates) for _, _, candidates in texts) / sum(count for _, count in rows)
    return _task(model, name, rows, chance=chance, wrong=wrong)


def _task(
    model: Model,
    name: str,
    rows: Sequence[tuple[list[int], int]],
    *,
    chance: float,
    right: Integer[np.ndarray, "prompt right"] | None = None,
    wrong: Integer[np.ndarray, "prompt wrong"] | None = None,
) -> Task:
    """Make a task from (token ids, number of last tokens that are scored), with the start token prepended."""
    start = [] if model.tokenizer is None else list(template_of(model.tokenizer).start)
    length = len(start) + max(len(ids) for ids, _ in rows)
    if length > model.cfg.n_ctx:
        raise NotShownError(f"the prompts of {name!r} have {length} tokens, more than the model's {model.cfg.n_ctx}")
    tokens = np.full((len(rows), length), start[-1] if start else 0, dtype=np.int32)
    tokens[:, : len(start)] = start
    scored = np.zeros((len(rows), length), dtype=bool)
    for row, (ids, count) in enumerate(rows):
        end = len(start) + len(ids)
        tokens[row, len(start) : end] = ids
        scored[row, end - count : end] = True
    return Task(name, tokens, scored, chance, right, wrong)


def _filled(rows: Sequence[Sequence[int]]) -> Integer[np.ndarray, "row longest"]:
    """Rows of ids as an array, padded with -1."""
    filled = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    for row, ids in enumerate(rows):
        filled[row, : len(ids)] = ids
    return filled
