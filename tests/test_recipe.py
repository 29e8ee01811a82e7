"""Options: each is defined once, and Python, command line, JSON and the printed command agree on it."""

import dataclasses
import json
import math
import re
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.recipe import (
    EFFORTS,
    METHODS,
    PARTS,
    RECIPES,
    TARGETS,
    Inputs,
    Request,
    StudyOptions,
    options_of,
    spelled,
)

OPTIONS = {name: option for part in PARTS for name, option in options_of(part).items()}
OTHER = {  # for every option a value that is not its default
    "model": "some/folder",
    "revision": "step1000",
    "dtype": "bfloat16",
    "unchecked": True,
    "corpus": "texts with spaces/",
    "context_length": 64,
    "max_tokens": 9_000,
    "text_column": "body of it",
    "held_out": 0.2,
    "bos": "document",
    "target": "next-token",
    "order": 3,
    "index": "pile.idx",
    "task": "rows with spaces.jsonl",
    "measure": "kl",
    "force": True,
    "method": "hard_concrete",
    "granularity": {"attn": "head", "mlp": "weight"},
    "layers": (0, 2),
    "units": ("head", "blocks.1.hook_resid_pre"),
    "replace": "mean_by_position",
    "sparsity_weight": 0.1 + 0.2,
    "target_fraction": 0.01,
    "learning_rate": 1e-4,
    "weight_decay": 0.5,
    "second_moment_decay": 0.9,
    "first_score": -0.25,
    "beta_start": 2.0,
    "beta_growth": 1.01,
    "hard_from": 0.5,
    "along_path": True,
    "max_steps": 7,
    "batch_size": 3,
    "short_until": 0.25,
    "short_length": 9,
    "stop_undecided": 0.02,
    "recovery_steps": 9,
    "retries": 0,
    "polish": 2,
    "worst_case": 1,
    "low_memory": True,
    "seed": 11,
    "recipe": "paper",
    "effort": "thorough",
    "sparsity_weights": (1.0, 2.5),
    "seeds": 4,
    "random_seeds": 5,
    "analysis": False,
    "falsify": True,
    "falsify_seeds": 2,
    "check_memory": "off",
}


def parsed(command: str) -> Request:
    """What the command line makes of a command."""
    program, *words = shlex.split(command)
    assert program == "bigram-circuits"
    arguments = cli.parser().parse_args(words)
    given = {name: getattr(arguments, name) for name in OPTIONS}
    return Request.of(**{name: value for name, value in given.items() if value is not None})


def test_every_field_is_an_option_and_has_another_value_here():
    fields = {one.name for part in PARTS for one in dataclasses.fields(part)}
    assert fields == OPTIONS.keys() == OTHER.keys()
    flags = [flag for option in OPTIONS.values() for flag in option.flags]
    assert len(set(flags)) == len(flags)


@pytest.mark.parametrize("name", OTHER)
def test_the_command_of_an_option_is_read_as_it_was_asked(name):
    with_task = {"task": OTHER["task"]} if name in ("measure", "force") else {}
    of_nodes = {"units": OTHER["units"]} if name == "replace" else {}
    asked = Request.of(**with_task, **of_nodes, **{name: OTHER[name]})
    assert parsed(asked.command()) == asked
    assert OTHER[name] in (getattr(asked.inputs, name, None), getattr(asked.config, name, None)) or hasattr(
        asked.options, name
    )
    plain = Request.of()
    assert plain.command() == "bigram-circuits find"
    if name == "recipe":
        assert asked.config == bc.SparsifyConfig.paper()
    else:
        assert asked != plain


LEFT_OUT = ("index", "sparsity_weights", "effort", "polish", "task", "measure", "force", "units", "replace")
"""Options that do not go with the others."""


def test_the_command_of_all_options_at_once_is_read_as_it_was_asked():
    values = {name: value for name, value in OTHER.items() if name not in LEFT_OUT}
    asked = Request.of(**values)
    read = parsed(asked.command())
    assert (read.inputs, read.config) == (asked.inputs, asked.config)
    assert dataclasses.replace(read.options, recipe="paper") == asked.options  # which recipe it starts from is free
    assert asked.command().startswith("bigram-circuits find some/folder --revision step1000 ")


NUMBER = st.floats(0, 1e6, allow_subnormal=False)


@given(
    sparsity_weight=NUMBER, first_score=st.floats(-1e3, 1e3), seed=st.integers(0, 2**31),
    layers=st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
    granularity=st.sampled_from(["weight", "head", "neuron", "block", {"attn": "block"}]),
    paper=st.booleans(), low_memory=st.booleans(), learning_rate=st.none() | st.floats(1e-9, 10),
)  # fmt: skip
def test_any_recipe_is_asked_for_by_a_command(paper, **changes):
    config = (bc.SparsifyConfig.paper if paper else bc.SparsifyConfig)(**changes)
    asked = Request(Inputs(), config, StudyOptions())
    assert parsed(asked.command()).config == config


def test_former_spellings_stay():
    assert parsed("bigram-circuits find --steps 7 --learning-rate 0.5").config == bc.SparsifyConfig(
        max_steps=7, learning_rate=0.5
    )


@pytest.mark.parametrize("record", [bc.SparsifyConfig.paper(layers=(1, 2)), Inputs(max_tokens=9), StudyOptions()])
def test_options_come_back_from_json(record):
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


def test_a_file_that_lacks_an_option_of_today_has_its_default():
    values = bc.SparsifyConfig(seed=3).to_json()
    del values["low_memory"], values["second_moment_decay"]
    assert bc.SparsifyConfig.from_json(values) == bc.SparsifyConfig(seed=3)
    with pytest.raises(ValueError, match="it has the unknown field 'of_tomorrow'"):
        bc.SparsifyConfig.from_json(values | {"of_tomorrow": 1})
    with pytest.raises(ValueError, match="max_steps should be a whole number, not '7'"):
        bc.SparsifyConfig.from_json(values | {"max_steps": "7"})


def test_what_version_0_1_0_wrote_of_model_and_text_is_read():
    nested = {
        "model": {"name": "m", "revision": "step1", "dtype": "bfloat16"},
        "corpus": {"source": "t.txt", "context_length": 16, "max_tokens": None},
        "target": "model",
        "order": 2,
    }
    expected = Inputs("m", "step1", "bfloat16", corpus="t.txt", context_length=16, target="model", bos="earlier")
    assert Inputs.from_json(nested) == expected


def test_a_run_from_before_there_was_a_choice_keeps_its_text_and_a_new_one_its_choice():
    written = {"model": "m", "corpus": "t.txt", "context_length": 16}
    assert Inputs.from_json(written) == Inputs("m", corpus="t.txt", context_length=16, bos="earlier")
    for bos in (None, "sequence"):
        asked = Inputs("m", text_column="body", held_out=0.2, bos=bos)
        assert Inputs.from_json(json.loads(json.dumps(asked.to_json()))) == asked


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bos": "first"}, "bos must be one of sequence, document, none, earlier, not 'first'"),
        ({"held_out": 0}, "held_out must be a share of the documents, above 0 and below 1, not 0"),
        ({"held_out": 1.5}, "not 1.5"),
        ({"text_column": ""}, "text_column must be the name of a field, not ''"),
    ],
)
def test_mistakes_about_the_text_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Request.of(**options)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="there is no option 'stpes': there are along_path, analysis, batch_size"):
        Request.of(stpes=3)
    with pytest.raises(ValueError, match=r"there is no option 'sede': there are .*; did you mean seed\?$"):
        Request.of(sede=0)
    with pytest.raises(ValueError, match="target must be one of induced, model, next-token, ngram, not 'bigram'"):
        Request.of(target="bigram")
    with pytest.raises(ValueError, match="sparsity_weights cannot be combined with"):
        Request.of(sparsity_weights=(1, 2), target_fraction=0.1)
    with pytest.raises(ValueError, match="sparsity_weights must be at least two different numbers"):
        Request.of(sparsity_weights=(1, 1))
    with pytest.raises(ValueError, match="random_seeds must be a whole number of at least 1, not 0"):
        Request.of(random_seeds=0)
    with pytest.raises(ValueError, match=r"layers must be layers, whole numbers from 0, not \(0, -1\)"):
        bc.SparsifyConfig(layers=(0, -1))


# --- the registries that options choose from ---


def test_methods_are_the_modules_of_their_folder():
    assert set(METHODS) == {"continuous_sparsification", "hard_concrete", "straight_through"}
    for name, method in METHODS.items():
        assert method.__module__.endswith(f"masking.methods.{name}")
        assert method.learning_rate > 0
    with pytest.raises(KeyError):
        METHODS["magic"]


def test_targets_are_the_modules_of_their_folder(tiny_model, tokenizer):
    assert set(map(spelled, TARGETS)) == {"ngram", "model", "next-token", "induced"}
    corpus = bc.load_corpus(
        [f"text {n} " * 40 for n in range(8)], tokenizer=tokenizer, context_length=16, held_out=0.25
    )
    for kind in TARGETS.values():
        target = kind.make(tiny_model, corpus, 2)
        assert math.isfinite(bc.evaluate(
            tiny_model, bc.Subnetwork.full(tiny_model), target, corpus.held_out, controls=False
        ).subnetwork.cross_entropy)  # fmt: skip
        assert kind.label(2)
        assert kind.meaning(2)


def test_an_effort_sets_the_options_that_are_not_given():
    assert set(EFFORTS) == {"quick", "normal", "thorough"}
    assert Request.of(effort="normal") == Request.of()
    steps = [Request.of(effort=name).config.max_steps for name in ("quick", "normal", "thorough")]
    assert steps == sorted(set(steps))
    own = Request.of(effort="thorough", max_steps=7)
    assert own.config == bc.SparsifyConfig(max_steps=7, hard_from=EFFORTS["thorough"]["hard_from"])
    assert parsed(own.command()).config == own.config
    with pytest.raises(ValueError, match="effort is an option of our own recipe, not of 'paper'"):
        Request.of(recipe="paper", effort="quick")
    with pytest.raises(ValueError, match="effort must be one of quick, normal, thorough, not 'hard'"):
        Request.of(effort="hard")


def test_recipes_are_their_names():
    assert RECIPES["default"]() == bc.SparsifyConfig()
    assert RECIPES["paper"]() == bc.SparsifyConfig.paper()


MISTAKEN = [
    ({"sparsity_weight": "10"}, r"sparsity_weight must be .*, not '10' \(a text: give sparsity_weight=10, without"),
    ({"learning_rate": "1e-2"}, r"learning_rate must be above 0, not '1e-2' \(a text: give learning_rate=1e-2"),
    ({"max_steps": "40"}, r"max_steps must be .*, not '40' \(a text"),
    ({"context_length": "64"}, r"context_length must be .*, not '64' \(a text"),
    ({"max_tokens": 2.5}, "max_tokens must be a whole number of at least 1, not 2.5$"),
    ({"random_seeds": "3"}, r"random_seeds must be .*, not '3' \(a text"),
    ({"sparsity_weights": "1,2"}, "sparsity_weights must be numbers of at least 0, not '1,2'$"),
    ({"sparsity_weights": ("1", "2")}, r"sparsity_weights must be numbers of at least 0, not \('1', '2'\)$"),
    ({"sparsity_weight": True}, "sparsity_weight must be .*, not True$"),
    ({"low_memory": "no"}, "low_memory must be True or False, not 'no'$"),
    ({"analysis": "no"}, "analysis must be True or False, not 'no'$"),
    ({"layers": "0,1"}, "layers must be layers, whole numbers from 0, not '0,1'$"),
    ({"layers": 1}, "layers must be layers, whole numbers from 0, not 1$"),
    ({"granularity": 3}, "granularity must be a unit, or a dict of units by component, not 3$"),
]


def test_values_of_another_type_are_refused_with_what_was_meant():
    """In a process without the checks of types that tests add."""
    script = f"""
from bigram_circuits.recipe import Request
for options in {[options for options, _ in MISTAKEN]}:
    try:
        print("accepted", Request.of(**options))
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    for line, (options, said) in zip(done.stdout.splitlines(), MISTAKEN, strict=True):
        assert re.match(said, line), options
