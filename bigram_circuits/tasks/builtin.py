"""The built-in tasks, which make their own prompts for any tokenizer.

There are five, each with a known mechanism: repeated random tokens (induction heads: Olsson et al. 2022, arXiv
2209.11895), ordered sequences (successor heads: Gould et al. 2023, arXiv 2312.09230), a value listed earlier
(retrieval), greater-than (Hanna et al. 2023, arXiv 2305.00586) and indirect object identification (Wang et al. 2022,
arXiv 2211.00593).

Prompts start as documents do in a corpus: with the BOS that the tokenizer puts there itself, or else with its
end-of-text token, if it has one. Answers of several tokens are scored token by token, so most tasks work with any
tokenizer; otherwise an error says why not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from bigram_circuits.measures.statistics import check_seed
from bigram_circuits.models.activations import NotShownError
from bigram_circuits.models.model import Model
from bigram_circuits.tasks.task import Row, Task, filled, padded
from bigram_circuits.text.corpus import hash_of_tokenizer
from bigram_circuits.text.tokenizers import template_of

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
_FEWEST_ORDINALS = 3  # of two words, a random choice would be right half of the time


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

    Example:
        >>> repeats = analysis.repeated_random_tokens(model, prompts=4, period=8)
        >>> repeats.tokens.shape  # a start token, and twice a block of 8
        (4, 17)
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
    return _task(model, name, rows, math.log(len(ids)))


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

    Example:
        >>> numbers = analysis.ordered_sequences(model, prompts=4)
        >>> print(numbers.rows[0])
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
                    texts.append((Row(f"{between} ".join(run[:-1]) + between, (f" {run[-1]}",)), len(words)))
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

    Example:
        >>> retrieval = analysis.earlier_value(model, prompts=4, pairs=2)
        >>> print(analysis.ability(model, retrieval))
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
        texts.append((Row(f"{listed} {owners[asked]} has a", (f" {things[asked]}",)), pairs))
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

    Example:
        >>> years = analysis.greater_than(bc.load_model("gpt2"), prompts=16)
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
    rows, texts, right, wrong, chances = [], [], [], [], []
    for _ in range(prompts):
        century, pair = usable[int(rng.integers(len(usable)))]
        noun = _NOUNS[int(rng.integers(len(_NOUNS)))]
        above = [other for other in digits if other > pair]
        below = [other for other in digits if other <= pair]
        text = f"The {noun} lasted from the year {century}{pair:02d} to the year {century}"
        texts.append(Row(text, _two_digits(above), _two_digits(below)))
        right.append([digits[other] for other in above])
        wrong.append([digits[other] for other in below])
        rows.append(([*_encode(tokenizer, text), right[-1][int(rng.integers(len(above)))]], 1))
        chances.append(math.log((len(above) + len(below)) / len(above)))
    return _task(model, name, rows, float(np.mean(chances)), right=right, wrong=wrong, rows=texts)


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

    Example:
        >>> names = analysis.indirect_object(bc.load_model("gpt2"), prompts=16)
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
        texts.append((Row(text, (f" {receiver}",), (f" {giver}",)), 2))
        wrong.append(_encode(tokenizer, f"{text} {giver}")[-1])
    return _text_task(model, name, texts, wrong)


def single_token_ordinals(model: Model) -> dict[str, tuple[list[int], list[tuple[int, int]]]]:
    """The words of each list of `ordered_sequences` that are single tokens, and which of them follows which.

    Returns:
        For each list (`days`, `months`, `numbers`) with at least 3 such words, a word and its successor among them, the
        token ids, and (word, successor) as places among them. Words have their leading space.

    Raises:
        NotShownError: If there is no tokenizer, or no such list.
    """
    tokenizer, found = _tokenizer(model), {}
    for name, words in _WORDS_IN_ORDER.items():
        known = {word: ids[0] for word in words if len(ids := _encode(tokenizer, f" {word}")) == 1}
        known = {word: index for word, index in known.items() if index != tokenizer.unk_token_id}
        places = {word: place for place, word in enumerate(known)}
        followed = words if name in _CYCLES else words[:-1]
        pairs = [(word, words[(place + 1) % len(words)]) for place, word in enumerate(followed)]
        between = [(places[one], places[other]) for one, other in pairs if one in known and other in known]
        if between and len(known) >= _FEWEST_ORDINALS:
            found[name] = list(known.values()), between
    if not found:
        raise NotShownError(
            f"fewer than {_FEWEST_ORDINALS} days, months or numbers, one of them the successor of another, are single "
            f"tokens of this tokenizer"
        )
    return found


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


def _two_digits(numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{number:02d}" for number in numbers)


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


def _text_task(model: Model, name: str, rows: Sequence[tuple[Row, int]], wrong: Sequence[int] | None = None) -> Task:
    """Make a task from (row, number of candidates) and a wrong token for each, if there is one.

    The chance loss of an answer is log(candidates).
    """
    tokenizer, ids = _tokenizer(model), []
    for row, _ in rows:
        answer = row.answer[0]
        prompt, whole = _encode(tokenizer, row.prompt), _encode(tokenizer, row.prompt + answer)
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise NotShownError(
                f"no prompts for {name!r}: this tokenizer does not separate {answer!r} from {row.prompt!r}"
            )
        ids.append((whole, len(whole) - len(prompt)))
    chance = sum(math.log(candidates) for _, candidates in rows) / sum(count for _, count in ids)
    contrast = None if wrong is None else [[token] for token in wrong]
    return _task(model, name, ids, chance, wrong=contrast, rows=[row for row, _ in rows])


def _task(
    model: Model,
    name: str,
    ids: Sequence[tuple[list[int], int]],
    chance: float,
    *,
    right: Sequence[Sequence[int]] | None = None,
    wrong: Sequence[Sequence[int]] | None = None,
    rows: Sequence[Row] | None = None,
) -> Task:
    """Make a task from (token ids, number of last tokens that are scored), with the start token prepended."""
    tokenizer = model.tokenizer
    tokens, scored = padded(ids, () if tokenizer is None else template_of(tokenizer).start)
    if tokens.shape[1] > model.cfg.n_ctx:
        raise NotShownError(
            f"the prompts of {name!r} have {tokens.shape[1]} tokens, more than the model's {model.cfg.n_ctx}"
        )
    return Task(
        name, tokens, scored, chance,
        right=None if right is None else filled(right), wrong=None if wrong is None else filled(wrong),
        rows=None if rows is None else tuple(rows),
        tokenizer_hash="none" if tokenizer is None else hash_of_tokenizer(tokenizer),
    )  # fmt: skip
