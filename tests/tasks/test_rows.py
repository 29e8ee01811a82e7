"""Tasks from rows: what is read, what a tokenizer cannot express, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import bigram_circuits as bc
from bigram_circuits.tasks.builtin import indirect_object, ordered_sequences

WORDS = (
    "the",
    "capital",
    "of",
    "France",
    "Spain",
    "is",
    "Paris",
    "Madrid",
    "Rome",
    "a",
    "b",
    "big",
    "city",
    "one",
    "two",
)


def word_tokenizer():
    """A token for each word and for the space before it."""
    names = ["<s>", "<unk>", *WORDS, *(f"\u2581{word}" for word in WORDS), "\u2581"]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


ROWS = [
    {"prompt": "the capital of France is", "answer": " Paris", "wrong": [" Madrid", " Rome"]},
    {"prompt": "the capital of Spain is", "answer": " Madrid", "wrong": " Paris"},
    {"prompt": "the big city is", "answer": " Rome", "wrong": [" a"]},
]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_of(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(list(ids))).replace("\u2581", " ")


def test_a_file_a_list_and_a_frame_give_the_same_task(words, tmp_path):
    path = tmp_path / "capitals.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS))
    task = bc.load_task(path, tokenizer=words)
    assert (task.name, len(task)) == ("capitals", 3)
    assert text_of(words, task.tokens[0]) == "<s>the capital of France is Paris"
    assert text_of(words, task.tokens[2]) == "<s>the big city is Rome<s>"  # padded on the right
    assert task.scored.sum(1).tolist() == [1, 1, 1]
    assert text_of(words, task.tokens[task.scored]) == " Paris Madrid Rome"
    assert [text_of(words, ids[ids >= 0]) for ids in task.wrong] == [" Madrid Rome", " Paris", " a"]
    assert task.chance == pytest.approx((np.log(3) + 2 * np.log(2)) / 3)
    assert task.preferred_by_chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    for rows in (ROWS, pd.DataFrame(ROWS), task.rows):
        other = bc.load_task(list(rows) if not isinstance(rows, pd.DataFrame) else rows, tokenizer=words)
        assert other.name == "rows"
        assert np.array_equal(other.tokens, task.tokens)
        assert np.array_equal(other.wrong, task.wrong)


def test_what_is_saved_is_read_again(words, tmp_path, tiny_model):
    rows = [{"prompt": "a", "answer": [" one", " two"], "counterfactual": "b", "counterfactual_answer": " a"}]
    for task in (bc.load_task(ROWS, tokenizer=words), bc.load_task(rows, tokenizer=words)):
        task.save(tmp_path / "rows.jsonl")
        again = bc.load_task(tmp_path / "rows.jsonl", tokenizer=words)
        assert again.rows == task.rows
        for name in ("tokens", "scored", "right", "wrong", "counterfactual"):
            assert np.array_equal(getattr(again, name), getattr(task, name)), name
    built_in = ordered_sequences(tiny_model, prompts=5, shown=(2,))
    built_in.save(tmp_path / "days.jsonl")
    assert np.array_equal(bc.load_task(tmp_path / "days.jsonl", tokenizer=tiny_model.tokenizer).tokens, built_in.tokens)
    random = bc.analysis.repeated_random_tokens(tiny_model, prompts=2, period=4)
    with pytest.raises(ValueError, match="are token ids, which cannot be written as text"):
        random.save(tmp_path / "random.jsonl")


def test_answers_of_several_tokens_and_no_wrong_ones(tokenizer):
    task = bc.load_task([{"prompt": "ab", "answer": "cd"}, {"prompt": "x", "answer": "y"}], tokenizer=tokenizer)
    assert task.scored.tolist() == [[False, False, False, True, True], [False, False, True, False, False]]
    assert task.answers.places.tolist() == [[2, 3], [1, -1]]
    assert task.chance == pytest.approx(np.log(2) * 2 / 3)  # nats per token: two answers over three tokens
    assert (bc.load_task([{"prompt": "ab", "answer": "c"}], tokenizer=tokenizer, bos="none").tokens[0] > 0).all()


def test_rows_that_the_tokenizer_cannot_express_are_counted(words):
    rows = [*ROWS, {"prompt": "the capital of Norway is", "answer": " Oslo", "wrong": " Rome"}]
    with pytest.warns(bc.TaskWarning, match=r"1 of 4 rows cannot be expressed .* row 4: it has no token for 'Norway'"):
        assert len(bc.load_task(rows, tokenizer=words)) == 3
    with pytest.raises(ValueError, match=r"cannot express any of the 1 rows, for example row 1: it has no token"):
        bc.load_task(rows[3:], tokenizer=words)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"wrong": "xy"}, "the answer 'xy' has 2 tokens, but only one can be contrasted"),
        ({"answer": ["d", "ef"]}, "the answer 'ef' has 2 tokens"),
        ({"counterfactual": "abc", "counterfactual_answer": "d"}, "has 2 tokens and that of the counterfactual 3"),
        (
            {"counterfactual": "xy", "counterfactual_answer": "de"},
            "answer has 1 tokens and that of the counterfactual 2",
        ),
    ],
)
def test_numbers_of_tokens_must_fit(tokenizer, change, reason):
    with pytest.raises(ValueError, match=reason):
        bc.load_task([{"prompt": "ab", "answer": "c", **change}], tokenizer=tokenizer)


def test_a_space_at_the_end_of_the_prompt_is_warned_of(words):
    rows = [{"prompt": "the city is ", "answer": "Paris"}, {"prompt": "the city is", "answer": " Paris"}]
    with pytest.warns(bc.TaskWarning, match=r"1 of 2 rows have an answer .*'the city is ' \+ 'Paris'"):
        task = bc.load_task(rows, tokenizer=words)
    assert [text_of(words, ids) for ids in task.tokens[:, -2:]] == [" Paris", " Paris<s>"]


def test_rows_that_are_there_twice_count_once(words):
    with pytest.warns(bc.TaskWarning, match=r"1 of 4 rows repeat another one .* row 4, which is row 1"):
        assert len(bc.load_task([*ROWS, ROWS[0]], tokenizer=words)) == 3
    with pytest.raises(ValueError, match="row 1 and row 4 have the same prompt and answer, but differ"):
        bc.load_task([*ROWS, {**ROWS[0], "wrong": " a"}], tokenizer=words)


def test_counterfactuals_are_aligned(words):
    row = {**ROWS[0], "counterfactual": "the capital of Spain is", "counterfactual_answer": " Madrid"}
    task = bc.load_task([row], tokenizer=words)
    assert task.counterfactual.shape == task.tokens.shape
    assert text_of(words, task.counterfactual[0]) == "<s>the capital of Spain is Madrid"
    assert (task.counterfactual != task.tokens).sum() == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "b"}, "row 1 has no prompt"),
        ({"prompt": "a"}, "row 1 has no answer"),
        ({"prompt": "a", "answer": None}, "row 1 has no answer"),
        ({"prompt": " ", "answer": "b"}, "row 1 has an empty prompt"),
        ({"prompt": "a", "answer": ""}, "row 1 has an empty answer"),
        ({"prompt": "a", "answer": []}, r"row 1: answer should be a text or a list of texts, not \[\]"),
        ({"prompt": ["a"], "answer": "b"}, "row 1: prompt should be a text, not"),
        ({"prompt": "a", "answer": "b", "wrong": ["c", "b"]}, "row 1 has 'b' both as answer and as wrong"),
        ({"prompt": "a", "answer": "b", "wrogn": "c"}, "unknown field 'wrogn'.*did you mean wrong"),
        ({"prompt": "a", "answer": "b", "counterfactual": "c"}, "counterfactual without a counterfactual_answer"),
        ({"prompt": "a", "answer": "b", "counterfactual_answer": "c"}, "counterfactual_answer without a counterf"),
        ({"prompt": "a", "answer": "b", "counterfactual": "a", "counterfactual_answer": "c"}, "the prompt itself"),
        ({"prompt": "a", "answer": "\ud800"}, "unpaired surrogate"),
        ("a", "row 1 should be fields by name, not 'a'"),
    ],
)
def test_what_a_row_says_wrongly_is_refused(tokenizer, row, message):
    with pytest.raises(ValueError, match=message) as caught:
        bc.load_task([row], tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


def test_a_broken_line_is_named(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "a", "answer"\n')
    with pytest.raises(ValueError, match=r"line 3 of '.*rows.jsonl' is not JSON: "):
        bc.load_task(path, tokenizer=tokenizer)
    path.write_text("\n")
    with pytest.raises(ValueError, match="there are no rows in '"):
        bc.load_task(path, tokenizer=tokenizer)
    with pytest.raises(FileNotFoundError):
        bc.load_task(tmp_path / "none.jsonl", tokenizer=tokenizer)


def test_arguments_are_checked(tokenizer):
    rows = [{"prompt": "a", "answer": "b"}]
    for bad, message in (
        (lambda: bc.load_task(rows, tokenizer=None), "needs a Hugging Face tokenizer"),
        (lambda: bc.load_task(rows, tokenizer=tokenizer, bos="sequence"), "bos of a task must be 'none'"),
        (lambda: bc.load_task(3, tokenizer=tokenizer), "a list of rows or a data frame, not int"),
        (lambda: bc.load_task([], tokenizer=tokenizer), "there are no rows"),
        (lambda: bc.load_task([*rows, {**rows[0], "prompt": "c", "wrong": "d"}], tokenizer=tokenizer),
         "row 2 has a field wrong and row 1 has none"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            bad()


def test_more_rows_move_no_other_row_to_the_other_part(tokenizer):
    rows = [{"prompt": f"row {n}", "answer": str(n % 10)} for n in range(60)]
    whole, less = (bc.load_task(some, tokenizer=tokenizer) for some in (rows, rows[:40]))
    parts = [[{row.prompt for row in part.rows} for part in task.split(0.3, seed=1)] for task in (whole, less)]
    assert not parts[0][0] & parts[0][1]
    assert parts[1][0] < parts[0][0]
    assert parts[1][1] < parts[0][1]
    assert 8 < len(parts[0][1]) < 30
    assert parts[0][1] != {row.prompt for row in whole.split(0.3, seed=2)[1].rows}
    corpus = whole.corpus(0.3, seed=1)
    assert len(corpus.held_out) == len(parts[0][1]) == corpus.documents[1]
    assert len(corpus.train) + len(corpus.held_out) == 60
    one = less.split(1e-9)[1]
    assert len(one) == 1  # never empty
    with pytest.raises(ValueError, match="held_out is a share of the prompts"):
        whole.split(1)
    with pytest.raises(ValueError, match="none is left to learn from"):
        bc.load_task(rows[:1], tokenizer=tokenizer).split(0.5)


def test_prompts_without_text_are_split_by_their_tokens(tiny_model):
    task = bc.analysis.repeated_random_tokens(tiny_model, prompts=20, period=4)
    train, held_out = task.split()
    assert len(train) + len(held_out) == 20
    assert train.rows is None


def test_names_that_are_no_single_tokens_are_said(tiny_model):
    with pytest.raises(ValueError, match="names are single tokens"):
        indirect_object(tiny_model)
