"""Every public value can be copied and sent to another process, and is as immutable there."""

import copy
import dataclasses
import multiprocessing
import operator
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.experiments.comparison import compare
from bigram_circuits.runs import load_run
from bigram_circuits.scale.forecast import RunForecast
from tests.conftest import D_VOCAB
from tests.explanations.examples import atlas, example

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (6, 8))
CONFIG = bc.SparsifyConfig(max_steps=1, granularity={"mlp": "neuron"})

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def values(tiny_model, tmp_path_factory):
    """One of each public type of value."""
    folder = tmp_path_factory.mktemp("run") / "run"
    corpus = bc.Corpus.from_tokens(TEXT, TEXT[::-1].copy())
    target = bc.count_ngrams(TEXT, d_vocab=D_VOCAB)
    _ = target.fingerprint, target.surprisal(torch.from_numpy(TEXT))  # what is computed once
    found = bc.find_subnetwork(tiny_model, target, corpus, CONFIG, run_dir=folder, check_memory="off")
    kept = found.subnetwork
    evaluation = bc.evaluate(tiny_model, kept, target, TEXT, seeds=1)
    maps = analysis.fit_affine_lens(tiny_model, tokens=TEXT)
    lens = analysis.logit_lens(tiny_model, kept, target, TEXT)
    neurons = analysis.whole_neurons(kept, threshold=0)
    task = analysis.repeated_random_tokens(tiny_model, prompts=2, period=4)
    dictionary = bc.Dictionary("standard", torch.eye(24), torch.zeros(24), torch.eye(24), torch.zeros(24))
    of_nodes = {"units": "head", "config": bc.SparsifyConfig(max_steps=1, batch_size=2), "check_memory": "off"}
    circuit = bc.find_circuit(tiny_model, target, corpus, **of_nodes)
    curves = bc.faithfulness_curves(
        tiny_model, bc.ModelTarget(tiny_model), corpus, **of_nodes, sizes=(0.5,), methods=("random",)
    )
    listed = [
        kept, found, evaluation, evaluation.subnetwork, found.gap, found.history[0], load_run(folder), CONFIG, corpus,
        target, bc.NextTokenTarget(),
        bc.IndexTarget("infini-gram:some_index", d_vocab=D_VOCAB),
        bc.InducedTarget(tiny_model, TEXT), bc.RenamedTarget(target, D_VOCAB),
        bc.forecast_memory(tiny_model, target, corpus, CONFIG, mode="off"), maps["full"], lens,
        bc.check_inputs(tiny_model, target, corpus, CONFIG), bc.could_mask_hold_it(kept, target, 0.1),
        bc.polish(tiny_model, kept, target, corpus, passes=1, most=2, sequences=2),
        neurons, analysis.by_layer(kept),
        analysis.Analyses({"logit_lens": lens}, {}), task, analysis.ability(tiny_model, task),
        kept.by_weight()["blocks.0.attn.W_Q"], bc.activation_points(tiny_model)[0], bc.huggingface_layout(tiny_model),
        compare({"one": kept, "other": ~kept}),
        bc.Falsification(neurons, neurons, neurons), bc.SameFunction(neurons, neurons, neurons, lens),
        bc.Seeds(neurons, neurons, neurons, neurons, kept, neurons, 0, {"seed 0": kept}),
        bc.Reproduction("chang-bergen-2025", CONFIG, (0, 1.0)),
        bc.Circuit.full(tiny_model), bc.Replacement("resample"), circuit, curves,
        bc.Circuit.full(tiny_model, "edge").edge_sites[0],
        example(listed=8), atlas(listed=8), dictionary, analysis.feature_tokens(tiny_model, dictionary),
        analysis.why_weight(tiny_model, 1, target, TEXT, draws=2), bc.observable(tiny_model, 5),
        analysis.pulled_back(tiny_model, 5, TEXT, through="L0H1"),
        bc.Rivals((kept, ~kept), neurons, neurons), bc.StricterTests(lens, left_out={"rivals": "none"}),
        bc.Ladder(
            "m", "h", load_run(folder).settings.corpus, CONFIG, analysis.ability(tiny_model, task), (), (), ()
        ),
        bc.Sweep(folder.parent, (bc.SweepRun("run", folder, {"seed": 0}, "done"),)),
        bc.SweepRun("run", folder, {"seed": 0}, "done"), RunForecast("run", 1, 1.0, "measured"),
        bc.SweepForecast((RunForecast("run", 1, 1.0, "measured"),), 2, 0),
        bc.SubnetworkPath((found,), (evaluation.subnetwork,), evaluation.subnetwork, evaluation.subnetwork),
    ]  # fmt: skip
    return {type(one).__name__: one for one in listed}


def content(value):
    """A value down to its numbers, comparable with ==."""
    if isinstance(value, torch.Tensor):
        return ("tensor", str(value.dtype), value.tolist())
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), repr(value.tolist()))
    if isinstance(value, bc.Subnetwork | bc.Circuit):
        return (value.checksum, value.lineage, value.model_name, value.weight_hash, dict(value.shapes))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [content(getattr(value, one.name)) for one in dataclasses.fields(value)]
    if isinstance(value, dict):
        return [(repr(key), content(one)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [content(one) for one in value]
    if hasattr(value, "__dict__") and not callable(value):
        return content(vars(value))
    return repr(value)


COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", list(COPIES))
def test_a_copy_is_the_same(values, how):
    for name, value in values.items():
        again = COPIES[how](value)
        assert type(again) is type(value), name
        assert content(again) == content(value), name


@pytest.mark.parametrize("how", list(COPIES))
def test_a_copy_of_a_subnetwork_is_immutable(values, how):
    kept = values["Subnetwork"]
    again = COPIES[how](kept)
    assert again == kept
    assert hash(again) == hash(kept)
    assert (again.lineage, again.kept, again.by_head()) == (kept.lineage, kept.kept, kept.by_head())
    with pytest.raises(TypeError):
        again._packed["blocks.0.attn.W_Q"] = np.zeros(1, np.uint8)
    with pytest.raises(ValueError, match="read-only"):
        again._packed["blocks.0.attn.W_Q"][0] = 1
    with pytest.raises(TypeError):
        again.shapes["x"] = (1,)
    with pytest.raises(AttributeError):
        again.lineage = "x"
    assert again & ~kept == kept - kept


def test_every_public_type_is_here(values):
    not_values = {
        "Callback",
        "InputWarning",
        "Model",
        "NGramCounter",
        "Planted",
        "PlantedAttention",
        "TensorBoard",
        "Target",
        "TaskTarget",  # it may hold a model
        "TaskWarning",
        "WandB",
        "WeightSite",
    }
    as_others = {"ModelTarget"}  # it holds a model
    classes = {name for name in dir(bc) if isinstance(getattr(bc, name), type)}
    assert classes - not_values - as_others - set(values) == set()
    assert {
        "Curves",
        "Effects",
        "Maps",
        "Task",
        "Ability",
        "AffineMaps",
        "Analyses",
        "Atlas",
        "Comparison",
        "Explanation",
    } <= set(values)


@pytest.mark.parametrize("start", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_pool_of_processes_works_with_them(values, start):
    kept = values["Subnetwork"]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as pool:
        assert list(pool.map(operator.invert, [kept, ~kept])) == [~kept, kept]
        assert pool.submit(operator.attrgetter("subnetwork.kept"), values["FoundSubnetwork"]).result() == kept.kept
