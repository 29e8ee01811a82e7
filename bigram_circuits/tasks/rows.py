"""Tasks from rows that anyone can write: JSON lines, dictionaries or a data frame.

A row has a `prompt` and its `answer`, and, if wanted, `wrong` answers (one or a list) and a `counterfactual` prompt of
as many tokens with its `counterfactual_answer`. What a row says wrongly is an error; what a tokenizer cannot express is
left out, with a warning that counts.
"""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bigram_circuits.recipe import name_of_file
from bigram_circuits.storage.records import is_text, opened, parse_json, shown
from bigram_circuits.tasks.task import Row, Task, filled, padded
from bigram_circuits.text.corpus import hash_of_tokenizer
from bigram_circuits.text.tokenizers import template_of, unknown_token, words_without_token

_FIELDS = tuple(one.name for one in fields(Row))
_PAIR = ("counterfactual", "counterfactual_answer")


class TaskWarning(UserWarning):
    """Some rows of a task are not what they seem, or are left out.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", bc.TaskWarning)  # refuse a task with rows that the tokenizer cannot express
    """


def load_task(path_or_rows: Any, *, tokenizer: Any, name: str | None = None, bos: str | None = None) -> Task:
    """Read a task: prompts with the answers that a model should give.

    An answer is what the tokenizer writes for it after the prompt. It may have several tokens, which are then scored
    one by one, each after the right ones before it (so that the probability of the answer is their product). Where
    there are `wrong` answers, or several correct ones, each must be a single token. A leading space belongs to the
    answer: `"prompt": "The capital of France is"`, `"answer": " Paris"`.

    Args:
        path_or_rows: A file of JSON lines; or a list of dictionaries or a pandas data frame with the same fields:
            `prompt`, `answer` (a list if several are correct) and, in all rows or in none, `wrong` (one answer or a
            list) and `counterfactual` (a prompt of as many tokens) with `counterfactual_answer`.
        tokenizer: A Hugging Face tokenizer, for example `model.tokenizer`.
        name: Name of the task; by default that of the file.
        bos: By default prompts start as documents do in a corpus: with the BOS that the tokenizer puts there itself,
            or else with its end-of-text token, if it has one. `"none"`: with nothing.

    Returns:
        A `Task` of the rows that the tokenizer can express. A `TaskWarning` says how many it cannot, how many are
        there twice (and kept once), and in how many it would write prompt and answer together in other tokens than
        one after the other, as happens if the space stands at the end of the prompt.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not JSON, or a row lacks a field, has an unknown one, an empty prompt or answer, or an
            answer that is also wrong; the message says which row. If the tokenizer can express none of the rows.

    Example:
        >>> rows = [{"prompt": "list value list", "answer": " value"}, {"prompt": "list name list", "answer": " name"}]
        >>> task = bc.load_task(rows, tokenizer=model.tokenizer)  # or the path of a file of JSON lines
    """
    if tokenizer is None or not callable(tokenizer):
        what = type(tokenizer).__name__
        raise ValueError(f"a task needs a Hugging Face tokenizer, such as model.tokenizer, not {what}")
    if bos not in (None, "none"):
        raise ValueError(f"bos of a task must be 'none', or left out for what documents start with, not {bos!r}")
    is_path = isinstance(path_or_rows, str | os.PathLike)
    records = _lines(Path(path_or_rows).expanduser()) if is_path else _items(path_or_rows)
    rows = [(where, _row(record, where)) for where, record in records]
    if not rows:
        raise ValueError(f"there are no rows in {str(path_or_rows)!r}" if is_path else "there are no rows")
    _check_alike(rows)
    if name is None:
        name = name_of_file(str(path_or_rows)) if is_path else "rows"
    return _task(name, rows, tokenizer, () if bos == "none" else template_of(tokenizer).start)


# --- rows, whatever the tokenizer ---


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file of JSON lines, and where they are."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"line {number} of {str(path)!r}"
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                try:
                    yield where, parse_json(line)
                except ValueError as error:
                    raise ValueError(f"{where} is not JSON: {error}") from error


def _items(rows: Any) -> Iterator[tuple[str, Any]]:
    """The records of a list or a data frame, and where they are."""
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        rows = rows.to_dict("records")
    if not isinstance(rows, Sequence):
        raise ValueError(f"a task is read from a file, a list of rows or a data frame, not {type(rows).__name__}")
    return ((f"row {number}", record) for number, record in enumerate(rows, start=1))


def _row(record: Any, where: str) -> Row:
    """A record as a row, checked."""
    if isinstance(record, Row):
        record = record.to_json()
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} should be fields by name, not {shown(record)}")
    values = {key: value for key, value in record.items() if not _is_missing(value)}
    for key in values:
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key), _FIELDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where} has the unknown field {shown(key)}: there are {', '.join(_FIELDS)}{hint}")
    for key in ("prompt", "answer"):
        if key not in values:
            raise ValueError(f"{where} has no {key}")
    if (_PAIR[0] in values) != (_PAIR[1] in values):
        given, needed = _PAIR if _PAIR[0] in values else _PAIR[::-1]
        raise ValueError(f"{where} has a {given} without a {needed}: they come together")
    texts = {key: _texts(values[key], where, key) for key in values}
    answer, wrong = texts["answer"], texts.get("wrong", ())
    both = set(answer) & set(wrong)
    if both:
        raise ValueError(f"{where} has {shown(min(both))} both as answer and as wrong")
    if texts.get(_PAIR[0]) == texts["prompt"]:
        raise ValueError(f"{where} has a counterfactual that is the prompt itself")
    other, other_answer = (texts[key][0] if key in texts else None for key in _PAIR)
    return Row(texts["prompt"][0], answer, wrong, other, other_answer)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _texts(value: Any, where: str, key: str) -> tuple[str, ...]:
    """The texts of a field; only answers may be several."""
    several = key in ("answer", "wrong")
    value = value.tolist() if isinstance(value, np.ndarray) else value
    found = list(value) if several and isinstance(value, list | tuple) else [value]
    if not found or not all(isinstance(one, str) for one in found):
        kind = "a text or a list of texts" if several else "a text"
        raise ValueError(f"{where}: {key} should be {kind}, not {shown(value)}")
    for one in found:
        if not one or (key in ("prompt", _PAIR[0]) and not one.strip()):
            raise ValueError(f"{where} has an empty {key}")
        if not is_text(one):
            raise ValueError(f"{where}: {key} contains an unpaired surrogate")
    return tuple(dict.fromkeys(found))


def _check_alike(rows: Sequence[tuple[str, Row]]) -> None:
    """Raise ValueError if some rows have a field that others lack."""
    first, one = rows[0]
    for where, row in rows:
        for key in ("wrong", "counterfactual"):
            if bool(getattr(row, key)) != bool(getattr(one, key)):
                has, lacks = (where, first) if getattr(row, key) else (first, where)
                raise ValueError(f"{has} has a field {key} and {lacks} has none: give it in all rows, or in none")


# --- rows as tokens ---


@dataclass(frozen=True)
class _Ids:
    """A row as token ids."""

    row: Row
    prompt: list[int]
    answers: list[list[int]]
    wrong: list[list[int]]
    other: tuple[list[int], list[int]] | None
    is_joined: bool
    """Whether the tokenizer would write prompt and answer, one text, in other tokens."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.answers[0]


class _Inexpressible(Exception):  # noqa: N818 (it is counted, and never seen by the caller)
    """A tokenizer cannot express a row, for a reason."""


def _task(name: str, rows: Sequence[tuple[str, Row]], tokenizer: Any, start: Sequence[int]) -> Task:
    """The task of the rows that a tokenizer can express."""
    found: dict[tuple[int, ...], tuple[str, _Ids]] = {}
    left_out: list[str] = []
    twice: list[str] = []
    unknown = unknown_token(tokenizer)
    for where, row in rows:
        try:
            ids = _ids(row, tokenizer, unknown, bool(start))
        except _Inexpressible as reason:
            left_out.append(f"{where}: {reason}")
            continue
        earlier, same = found.setdefault(tuple(ids.tokens), (where, ids))
        if same.row != row:
            raise ValueError(f"{earlier} and {where} have the same prompt and answer, but differ in other fields")
        if same is not ids:
            twice.append(f"{where}, which is {earlier}")
    if not found:
        raise ValueError(f"the tokenizer cannot express any of the {len(rows)} rows, for example {left_out[0]}")
    joined = [f"{where}: {_boundary(ids.row)}" for where, ids in found.values() if ids.is_joined]
    for examples, what in (
        (left_out, "cannot be expressed with this tokenizer and are left out"),
        (twice, "repeat another one and are left out"),
        (joined, "have an answer that the tokenizer would join to the prompt in other tokens than are scored: let the "
                 "answer begin with the space instead"),
    ):  # fmt: skip
        if examples:
            line = f"task {name}: {len(examples)} of {len(rows)} rows {what}, for example {examples[0]}"
            warnings.warn(line, TaskWarning, stacklevel=3)
    return _of_ids(name, [ids for _, ids in found.values()], tokenizer, start)


def _of_ids(name: str, rows: Sequence[_Ids], tokenizer: Any, start: Sequence[int]) -> Task:
    counts = [len(one.answers[0]) for one in rows]
    tokens, scored = padded([(one.tokens, count) for one, count in zip(rows, counts, strict=True)], start)
    right = wrong = others = None
    if any(len(one.answers) > 1 for one in rows):
        right = filled([[ids[0] for ids in one.answers] for one in rows])
    if rows[0].wrong:
        wrong = filled([[ids[0] for ids in one.wrong] for one in rows])
        candidates = [(len(one.answers), len(one.answers) + len(one.wrong)) for one in rows]
        chance = sum(math.log(among / n_right) for n_right, among in candidates) / len(rows)
    else:  # guessing among the answers, as often as each is right
        frequencies = np.array([*Counter(one.row.answer for one in rows).values()]) / len(rows)
        chance = float(-(frequencies * np.log(frequencies)).sum()) * len(rows) / sum(counts)
    if rows[0].other is not None:
        both = [(one.other[0] + one.other[1], count) for one, count in zip(rows, counts, strict=True) if one.other]
        others = padded(both, start)[0]
    texts = tuple(one.row for one in rows)
    return Task(name, tokens, scored, chance, right, wrong, others, texts, hash_of_tokenizer(tokenizer))


def _ids(row: Row, tokenizer: Any, unknown: int | None, has_start: bool) -> _Ids:
    """A row as token ids.

    Raises:
        _Inexpressible: If the tokenizer has no tokens for it, or other numbers of tokens than are needed.
    """
    prompt = _encode(tokenizer, row.prompt)
    if not prompt and not has_start:
        raise _Inexpressible(f"the prompt {row.prompt!r} has no tokens")
    pairs = [_after(tokenizer, row.prompt, prompt, text) for text in (*row.answer, *row.wrong)]
    answers, wrong = [ids for ids, _ in pairs[: len(row.answer)]], [ids for ids, _ in pairs[len(row.answer) :]]
    other = None
    if row.counterfactual is not None and row.counterfactual_answer is not None:
        ids = _encode(tokenizer, row.counterfactual)
        other = ids, _after(tokenizer, row.counterfactual, ids, row.counterfactual_answer)[0]
    for ids in (prompt, *answers, *wrong, *(other or ())):
        if unknown is not None and unknown in ids:
            words = words_without_token(tokenizer, " ".join([row.prompt, *row.answer, *row.wrong]))
            raise _Inexpressible(f"it has no token for {', '.join(map(repr, words)) or 'some of the text'}")
    for text, ids in zip((*row.answer, *row.wrong), (*answers, *wrong), strict=True):
        if not ids:
            raise _Inexpressible(f"the answer {text!r} has no tokens")
        if len(ids) > 1 and len(pairs) > 1:
            raise _Inexpressible(f"the answer {text!r} has {len(ids)} tokens, but only one can be contrasted")
    if {ids[0] for ids in answers} & {ids[0] for ids in wrong}:
        raise _Inexpressible("an answer and a wrong one are the same token")
    if other is not None:
        for what, ids, theirs in (("prompt", prompt, other[0]), ("answer", answers[0], other[1])):
            if len(ids) != len(theirs):
                raise _Inexpressible(
                    f"its {what} has {len(ids)} tokens and that of the counterfactual {len(theirs)}, but they should "
                    "be aligned token by token"
                )
    return _Ids(row, prompt, answers, wrong, other, any(is_joined for _, is_joined in pairs))


def _after(tokenizer: Any, prompt: str, prompt_ids: list[int], answer: str) -> tuple[list[int], bool]:
    """The ids of an answer after a prompt, and whether the tokenizer would write both together in other ones."""
    whole, n = _encode(tokenizer, prompt + answer), len(prompt_ids)
    if whole[:n] == prompt_ids and len(whole) > n:
        return whole[n:], False
    return _encode(tokenizer, answer), True


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _boundary(row: Row) -> str:
    return f"{row.prompt[-12:]!r} + {row.answer[0]!r}"
