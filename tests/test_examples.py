"""The examples in docstrings: every public function and class has one, and all of them run, on a tiny model.

`docs/api.md` says what the names in them stand for; here they stand for the same of a tiny random model, and of bytes.
"""

import doctest
import inspect
import math
import re
from pathlib import Path

import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis

PUBLIC = {name: getattr(bc, name) for name in bc.__all__} | {name: getattr(analysis, name) for name in analysis.__all__}
WITHOUT = {"Model": "an alias of Any, for annotations", "TASKS": "a dictionary", "analysis": "a module"}
NOT_RUN = {
    **dict.fromkeys(("load_published", "pull_subnetwork", "push_subnetwork"), "needs the hub"),
    **dict.fromkeys(("greater_than", "indirect_object", "successor_scores"), "needs a hub model's tokenizer"),
    "WandB": "needs a Weights & Biases account",
    "IndexTarget": "needs an index",
    "load_dictionary": "needs a folder that SAELens wrote",
    "exciting_tokens": "is deprecated, so that it warns",
    "find_path": "is the former name of sparsity_path",
    **dict.fromkeys(("analyze", "Analyses"), "takes half a minute"),
    **dict.fromkeys(("falsify", "Falsification"), "takes many rounds of learning"),
    **dict.fromkeys(("find_ladder", "load_ladder", "write_ladder", "Ladder"), "learns six masks"),
    **dict.fromkeys(("reproduce", "load_reproduction", "Reproduction"), "takes many rounds of learning"),
    "study": "is run by the tests of README and index.md",
    **dict.fromkeys(("sweep", "load_sweep", "merge_sweeps", "Sweep", "SweepRun"), "makes runs"),
    **dict.fromkeys(("forecast_sweep", "SweepForecast"), "makes runs"),
}
"""Examples that are only compiled; the tests of these functions run them on less."""
EXAMPLES = {name: inspect.getdoc(value) or "" for name, value in PUBLIC.items() if name not in WITHOUT}

pytestmark = pytest.mark.usefixtures("one_thread")


def parsed(name):
    return doctest.DocTestParser().get_examples(EXAMPLES[name], name)


@pytest.fixture(scope="module")
def names(tmp_path_factory, tiny_model):
    """The names that examples may use, and a folder to run them in that holds a run."""
    folder = tmp_path_factory.mktemp("examples")
    corpus = bc.load_corpus("reference", tokenizer=tiny_model.tokenizer, max_tokens=8_000, context_length=32)
    target = bc.count_ngrams(corpus.train, d_vocab=tiny_model.cfg.d_vocab)
    config = bc.SparsifyConfig(target_fraction=0.05, max_steps=2)
    width = tiny_model.cfg.d_model
    latents = torch.randn(width, 64), torch.zeros(64), torch.randn(64, width), torch.zeros(width)
    given = {
        "bc": bc, "analysis": analysis, "torch": torch, "math": math,
        "model": tiny_model, "corpus": corpus, "target": target, "text": corpus.held_out[:8], "config": config,
        "found": bc.find_subnetwork(tiny_model, target, corpus, config, run_dir=folder / "runs" / "short"),
        "circuit": bc.Circuit.full(tiny_model, "head").drop("L1H0"),
        "task": analysis.repeated_random_tokens(tiny_model, prompts=8, period=8),
        "dictionary": bc.Dictionary("standard", *latents),
    }  # fmt: skip
    return folder, given


def test_every_public_function_and_class_has_an_example():
    assert [name for name in EXAMPLES if not re.search(r"^Example:$", EXAMPLES[name], re.MULTILINE)] == []
    assert [name for name in EXAMPLES if not parsed(name)] == []
    assert set(NOT_RUN) <= set(EXAMPLES)
    for name in NOT_RUN:
        compile("".join(one.source for one in parsed(name)), name, "exec")


def test_the_names_in_them_are_explained(names):
    explained = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    for name in names[1]:
        assert re.search(rf"^({name} = |import .*\b{name}$|from .* import {name}$)", explained, re.MULTILINE), name


@pytest.mark.usefixtures("no_forecast")
@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - set(NOT_RUN)))
def test_they_run_and_give_what_they_show(name, names, monkeypatch, capsys):
    folder, given = names
    monkeypatch.chdir(folder)
    namespace = dict(given)
    for one in parsed(name):
        exec(compile(one.source, name, "single" if one.want else "exec"), namespace)
        printed = capsys.readouterr().out
        assert not one.want or printed == one.want, one.source


def completed(value):
    """What completion offers after a dot."""
    return {name for name in dir(value) if not name.startswith("_")}


def test_completion_offers_public_names_alone(names):
    given = names[1]
    assert completed(bc) == set(bc.__all__)
    assert completed(analysis) == set(analysis.__all__)
    subnetwork, circuit, found = given["found"].subnetwork, given["circuit"], given["found"]
    lens = analysis.logit_lens(given["model"], subnetwork, text="import os")
    evaluation = bc.evaluate(given["model"], subnetwork, given["target"], given["text"], controls=False)
    for value in (subnetwork, circuit, found, lens, evaluation, given["corpus"], given["target"], given["config"]):
        own = {name for kind in type(value).__mro__ for name in vars(kind)} | set(getattr(value, "__dict__", {}))
        assert completed(value) <= own
        assert not completed(value) & {"annotations", "Any", "np", "torch"}
    assert {"only", "add_head", "save", "fraction"} <= completed(subnetwork)
    assert not completed(subnetwork) & {"keep_head", "more_metadata", "file_format", "constant", "units_here"}
    assert {"keep", "drop", "nodes", "edges"} <= completed(circuit)
    assert not completed(circuit) & {"asked", "places", "more_metadata", "noun"}
    assert {"get", "only", "plot", "to_dataframe"} <= completed(lens)
    assert not completed(lens) & {"axes", "kinds"}
    assert "upgraded" not in completed(evaluation) | completed(given["config"])
