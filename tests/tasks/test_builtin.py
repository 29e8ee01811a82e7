"""Tasks: prompts that are what they should be, and errors where a tokenizer cannot express them."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bigram_circuits.measures import statistics
from bigram_circuits.targets.next_token import NextTokenTarget
from bigram_circuits.tasks import builtin
from bigram_circuits.tasks import task as module
from bigram_circuits.tasks.builtin import TASKS
from bigram_circuits.tasks.task import Task, ability, as_task, checked_task, measure, per_place


class Stand:
    """What a task asks of a model."""

    def __init__(self, tokenizer, n_ctx=256):
        self.tokenizer = tokenizer
        self.cfg = type("Cfg", (), {"d_vocab": 4096, "n_ctx": n_ctx})()


@pytest.fixture(scope="module")
def word_model():
    """A tokenizer of whole words, in which years are two tokens of two digits."""
    words = [*builtin._NAMES, *builtin._OWNERS, *builtin._THINGS, *builtin._PLACES, *builtin._OBJECTS, *builtin._NOUNS]
    words += [word for listed in builtin._WORDS_IN_ORDER.values() for word in listed]
    words += [f"{number:02d}" for number in range(100)] + list(",.")
    sentence = "When and went to the gave a it After came handed While were at passed The lasted from year has"
    words += sentence.split()
    vocabulary = {"<|endoftext|>": 0, "<unk>": 1}
    for word in words:
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    two_digits = pre_tokenizers.Split(pattern=Regex(r"\d\d"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), two_digits])
    return Stand(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>"))


def words_of(model, task, row):
    return model.tokenizer.convert_ids_to_tokens(task.tokens[row, 1 : task.ends[row] + 1].tolist())


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_known_words_and_depend_on_the_seed_alone(word_model, name):
    task = TASKS[name](word_model, prompts=10)
    again, other = TASKS[name](word_model, prompts=10), TASKS[name](word_model, prompts=10, seed=1)
    assert len(task) == 10
    assert (task.tokens[:, 0] == 0).all()
    assert 1 not in task.tokens or name == "repeated_random_tokens"
    assert np.array_equal(task.tokens, again.tokens)
    assert np.array_equal(task.scored, again.scored)
    assert task.tokens.shape != other.tokens.shape or not np.array_equal(task.tokens, other.tokens)
    assert task.chance > 0


def test_repeated_random_tokens_repeat(tiny_model):
    task = TASKS["repeated_random_tokens"](tiny_model, prompts=5, period=7, length=20)
    assert task.tokens.shape == (5, 21)
    text = task.tokens[:, 1:]
    assert np.array_equal(text[:, 7:], text[:, :-7])
    assert not np.isin(text, tiny_model.tokenizer.all_special_ids).any()
    assert all(len(set(row[:7])) == 7 for row in text.tolist())
    assert not task.scored[:, :9].any()
    assert task.scored[
        :, 9:
    ].all()  # the start token, a block of 7, and the first token of the second block come before
    assert task.chance == math.log(256)


def test_equal_prompts_count_once(tiny_model):
    task = builtin.repeated_random_tokens(tiny_model, prompts=6, period=4)
    twice = task.select(np.array([4, 0, 4, 2, 0, 5]))
    assert twice.distinct().tokens.tolist() == task.tokens[[4, 0, 2, 5]].tolist()
    assert task.distinct().tokens.tolist() == task.tokens.tolist()


def test_ordered_sequences_go_on(word_model):
    task = TASKS["ordered_sequences"](word_model, prompts=1000)
    lists = list(builtin._WORDS_IN_ORDER.values())
    for row in range(len(task)):
        words = [word for word in words_of(word_model, task, row) if word != ","]
        listed = next(one for one in lists if words[0] in one)
        places = [listed.index(word) for word in words]
        assert all((b - a) % len(listed) == 1 for a, b in pairwise(places))
    assert len({tuple(row) for row in task.tokens.tolist()}) == len(task) < 1000
    assert (task.scored.sum(1) == 1).all()


def test_answers_of_several_tokens_are_scored_whole(tiny_model):
    task = TASKS["ordered_sequences"](tiny_model, prompts=20, shown=(2,))
    for tokens, scored in zip(task.tokens, task.scored, strict=True):
        answer = tiny_model.tokenizer.decode(tokens[scored])
        assert answer.strip() in {word for listed in builtin._WORDS_IN_ORDER.values() for word in listed}
    assert task.chance < math.log(7)  # spread over the letters


def test_the_value_was_listed_with_its_owner(word_model):
    task = TASKS["earlier_value"](word_model, prompts=20, pairs=3)
    for row in range(len(task)):
        *listed, last = " ".join(words_of(word_model, task, row)).split(" . ")
        assert last in listed
        assert len(listed) == 3
    assert task.chance == pytest.approx(math.log(3))


def test_later_years_are_right(word_model):
    task = TASKS["greater_than"](word_model, prompts=20)
    for row in range(len(task)):
        words = words_of(word_model, task, row)
        century, start, answer = words[-2], int(words[7]), int(words[-1])
        assert words[6] == century
        assert answer > start
        right, wrong = (
            {int(x) for x in word_model.tokenizer.convert_ids_to_tokens(ids[ids >= 0].tolist())}
            for ids in (task.right[row], task.wrong[row])
        )
        assert right == set(range(start + 1, 100))
        assert wrong == set(range(start + 1))


def test_the_other_one_is_the_indirect_object(word_model):
    task = TASKS["indirect_object"](word_model, prompts=20)
    for row in range(len(task)):
        words = words_of(word_model, task, row)
        (wrong,) = word_model.tokenizer.convert_ids_to_tokens(task.wrong[row].tolist())
        assert words.count(wrong) == 2
        assert words.count(words[-1]) == 2  # where it was named, and as the answer
    assert task.chance == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("greater_than", {}, "does not split years"),
        ("indirect_object", {}, "only 0 of"),
        ("earlier_value", {}, "more than the model's 64"),
        ("earlier_value", {"pairs": 1}, "pairs must be"),
        ("ordered_sequences", {"shown": (12,)}, "shown must be"),
        ("repeated_random_tokens", {"period": 400}, "period must be 2 to 256"),
        ("repeated_random_tokens", {"length": 20}, "length must be at least"),
        ("repeated_random_tokens", {"length": 64}, "more than the model's 64"),
        ("repeated_random_tokens", {"prompts": 0}, "at least 1 prompt"),
    ],
)
def test_what_cannot_be_expressed_is_said(tiny_model, name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        TASKS[name](tiny_model, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "repeated_random_tokens"])
def test_a_task_of_text_needs_a_tokenizer(name):
    with pytest.raises(ValueError, match="no tokenizer"):
        TASKS[name](Stand(None))


def test_a_task_is_checked():
    tokens, scored = np.zeros((2, 3), dtype=int), np.array([[False, True, True], [False, False, True]])
    one = np.zeros((2, 1), dtype=int)
    assert Task("a", tokens, scored, 1.0).ends.tolist() == [2, 2]
    with pytest.raises(ValueError, match="needs a scored place"):
        Task("a", tokens, np.zeros((2, 3), dtype=bool), 1.0)
    with pytest.raises(ValueError, match="none at position 0"):
        Task("a", tokens, np.ones((2, 3), dtype=bool), 1.0)
    with pytest.raises(ValueError, match="exactly one scored place"):
        Task("a", tokens, scored, 1.0, wrong=one)
    with pytest.raises(ValueError, match="at least one token id"):
        Task("a", tokens, np.array([[False, True, False]] * 2), 1.0, wrong=one - 1)


def test_text_is_a_task_with_every_prediction_scored(tiny_model, random_tokens):
    task = as_task(random_tokens, tiny_model.cfg.d_vocab)
    sums = measure(tiny_model, task, target=NextTokenTarget())
    with torch.no_grad():
        logits = tiny_model(torch.from_numpy(random_tokens))
    expected = statistics.surprisals(logits, torch.from_numpy(random_tokens)).double().sum(1)
    np.testing.assert_allclose(sums[:, module.COLUMNS.index("surprisal")], expected, rtol=1e-5)
    assert (sums[:, module.COLUMNS.index("places")] == 15).all()
    assert (sums[:, 0] == 15).all()
    assert as_task(task, 5) is task


def test_padding_changes_nothing(any_model):
    task = TASKS["ordered_sequences"](any_model, prompts=6, shown=(1, 2))
    sums = measure(any_model, task)
    for row in range(len(task)):
        end = task.ends[row] + 1
        alone = Task("alone", task.tokens[row : row + 1, :end], task.scored[row : row + 1, :end], 1.0)
        np.testing.assert_allclose(measure(any_model, alone)[0], sums[row], rtol=1e-4)


def test_a_contrast_of_single_tokens_is_the_logit_difference(tiny_model):
    tokens = np.random.default_rng(0).integers(1, 257, (4, 6))
    scored = np.zeros((4, 6), dtype=bool)
    scored[:, 4] = True
    wrong = np.array([[7], [8], [9], [10]])
    sums = measure(tiny_model, Task("a", tokens, scored, 1.0, wrong=wrong))
    with torch.no_grad():
        logits = tiny_model(torch.from_numpy(tokens))[:, 3].numpy()
    rows = np.arange(4)
    np.testing.assert_allclose(
        sums[:, -1], logits[rows, tokens[:, 4]] - logits[rows, wrong[:, 0]], rtol=1e-4, atol=1e-5
    )
    right = np.concatenate([tokens[:, 4:5], np.full((4, 1), -1)], 1)
    np.testing.assert_allclose(measure(tiny_model, Task("a", tokens, scored, 1.0, right, wrong)), sums, rtol=1e-6)


def test_ability_compares_with_chance(tiny_model):
    task = TASKS["repeated_random_tokens"](tiny_model, prompts=8)
    found = ability(tiny_model, task)
    assert not found.able
    assert found.interval[0] <= found.loss <= found.interval[1]
    assert "NOT shown" in str(found)
    assert math.isnan(found.log_odds)
    assert found.loss == per_place(measure(tiny_model, task).sum(0), "surprisal")


def test_tokens_outside_the_vocabulary_are_refused(tiny_model):
    for text in (np.full((2, 4), 300), as_task(np.full((2, 4), 300), 257)):
        with pytest.raises(ValueError, match="token ids must be 0 to 256"):
            checked_task(tiny_model, text)


def test_batches_are_even():
    assert list(module.batches(5, 4, 2)) == [slice(0, 2), slice(2, 5)]
    assert list(module.batches(1, 4, 2)) == [slice(0, 1)]
    assert list(module.batches(3, 1, 2)) == [slice(0, 3)]
    assert list(module.batches(6, 3)) == [slice(0, 3), slice(3, 6)]
