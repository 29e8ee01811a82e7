"""One order of arguments everywhere, former orders with a warning; whatever holds a subnetwork is one."""

import inspect

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.experiments.comparison import compare
from bigram_circuits.learning.found import FoundSubnetwork
from tests.conftest import D_VOCAB

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (6, 8))
CORPUS = bc.Corpus.from_tokens(TEXT, TEXT[::-1])
TARGET = bc.count_ngrams(TEXT, d_vocab=D_VOCAB)
CONFIG = bc.SparsifyConfig(max_steps=1)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def kept(tiny_model):
    return bc.Subnetwork.full(tiny_model).random_like().drop_layer(1)


def held(subnetwork):
    return FoundSubnetwork(subnetwork, [], CONFIG, "decided", 1.0)


# function -> (arguments in the present order, without the model; in the former order; what is given by keyword there)
ORDERS = {
    "logit_lens": (("S", "T", TEXT), (TEXT, "S"), {"target": "T"}),
    "affine_lens": (("S", "T", TEXT), (TEXT, "S"), {"target": "T"}),
    "cosine_to_unembedding": (("S", "T", TEXT), (TEXT, "S"), {"target": "T"}),
    "layer_rotations": (("S", TEXT), (TEXT, "S"), {}),
    "covariance_similarity": (("S", TEXT), (TEXT, "S"), {}),
    "fit_affine_lens": (("S", TEXT), (TEXT, "S"), {}),
    "ablate": (("L0.mlp", "S", "T", TEXT), ("L0.mlp", TEXT, "S"), {"target": "T"}),
    "logit_attribution": (("S", "abc"), ("abc", "S"), {}),
    "attention_patterns": (("S", "abc"), ("abc", "S"), {}),
    "max_activating_tokens": (([(0, 1)], "S", CORPUS), ([(0, 1)], CORPUS, "S"), {}),
    "passages": (("S", "T", TEXT), (TEXT, "S"), {"target": "T"}),
    "next_tokens": (("S", "T", ["a", "b"]), (["a", "b"], "S"), {"target": "T"}),
    "faithfulness_by_token": (("S", "T", TEXT), (TEXT, "S"), {"target": "T"}),
    "layer_by_layer": (("S", "T", CORPUS), (CORPUS, "S", "T"), {}),
    "faithfulness_to": (("S", "T", TEXT), ("T", TEXT, "S"), {}),
}
OPTIONS = {"max_activating_tokens": {"min_count": 1}, "faithfulness_by_token": {"min_count": 1}, "ablate": {"seeds": 0}}


def called(name, model, arguments, keywords, kept):
    def given(value):
        return (
            kept
            if isinstance(value, str) and value == "S"
            else TARGET
            if isinstance(value, str) and value == "T"
            else value
        )

    first = () if name == "faithfulness_to" else (model,)
    options = OPTIONS.get(name, {}) | {key: given(value) for key, value in keywords.items()}
    found = getattr(analysis, name)(*first, *map(given, arguments), **options)
    return found(model) if name == "faithfulness_to" else found


def numbers(found):
    """All numbers of a result as text, so that nan is equal to nan."""
    if isinstance(found, dict):
        return "".join(numbers(one) for one in found.values())
    found = found.output_weight if isinstance(found, analysis.AffineMaps) else getattr(found, "values", found)
    return repr(found.tolist() if isinstance(found, np.ndarray | torch.Tensor) else found)


@pytest.mark.parametrize("name", list(ORDERS))
def test_the_former_order_works_and_says_the_present_one(tiny_model, kept, name):
    present, former, keywords = ORDERS[name]
    found = called(name, tiny_model, present, {}, held(kept))  # no warning, which would be an error here
    with pytest.warns(DeprecationWarning, match=f"^{name} takes its arguments in the order .*subnetwork.* now$"):
        earlier = called(name, tiny_model, former, keywords, kept)
    assert numbers(found) == numbers(earlier)
    parameters = list(inspect.signature(getattr(analysis, name)).parameters.values())
    positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    by_keyword = dict(zip(positional[name != "faithfulness_to" :], present, strict=True))
    assert numbers(called(name, tiny_model, (), by_keyword, kept)) == numbers(found)


def test_every_analysis_of_a_model_takes_its_arguments_in_one_order():
    order = ["model", "subnetwork", "target", "text"]
    texts = {"text", "tokens", "corpus", "prompt", "prompts", "task"}
    for name in ("evaluate", *analysis.__all__):
        function = getattr(bc if name == "evaluate" else analysis, name)
        if not inspect.isfunction(function) or name in ("subnetworks_over_training", "ability", "measure_task"):
            continue
        parameters = inspect.signature(function).parameters.values()
        positional = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        names = ["text" if one in texts else one for one in positional]
        known = [one for one in names if one in order]
        assert known == [one for one in order if one in known], (name, names)


def test_what_is_left_out_needs_no_place(tiny_model, kept):
    whole = numbers(analysis.logit_lens(tiny_model, text=TEXT))
    assert (
        numbers(analysis.logit_lens(tiny_model, TEXT)) == numbers(analysis.logit_lens(tiny_model, None, TEXT)) == whole
    )
    assert numbers(analysis.ablate(tiny_model, "L0.mlp", TEXT, seeds=0)) == numbers(
        analysis.ablate(tiny_model, "L0.mlp", None, None, TEXT, seeds=0)
    )
    with_target = analysis.logit_lens(tiny_model, TARGET, TEXT)
    assert numbers(with_target) == numbers(analysis.logit_lens(tiny_model, target=TARGET, text=TEXT))


def test_arguments_that_cannot_be_told_apart_are_refused(tiny_model, kept):
    for call in (
        lambda: analysis.logit_lens(tiny_model, TEXT, TEXT),
        lambda: analysis.logit_lens(tiny_model, kept, kept),
        lambda: analysis.logit_lens(tiny_model, kept, TARGET, TEXT, 3),
        lambda: analysis.logit_lens(tiny_model, kept, subnetwork=kept),
    ):
        with pytest.raises(TypeError, match="logit_lens takes model, subnetwork, target, text in this order"):
            call()


# --- what holds a subnetwork ---


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    bc.find_subnetwork(tiny_model, TARGET, CORPUS, CONFIG, run_dir=folder, check_memory="off")
    return bc.load_run(folder)


def test_found_subnetworks_and_runs_are_subnetworks(tiny_model, run, tmp_path):
    own = run.subnetwork
    for one in (held(own), run):
        assert repr(bc.evaluate(tiny_model, one, TARGET, TEXT, seeds=1)) == repr(
            bc.evaluate(tiny_model, own, TARGET, TEXT, seeds=1)
        )
        with bc.masked(tiny_model, one):
            pass
        assert numbers(analysis.overlap(one, ~own)) == numbers(analysis.overlap(own, ~own))
        assert analysis.overlap(~own, one).get("kept_b")["all"] == own.kept
        assert len(analysis.overlaps([one, ~own]).rows) == 2
        assert [item.subnetwork for item in compare({"a": one, "b": ~own}).items] == [own, ~own]
        assert bc.Subnetwork.magnitude(tiny_model, like=one).kept == own.kept
        assert own & one == own
        for of in (analysis.by_layer, analysis.by_matrix, analysis.by_head, analysis.by_neuron, analysis.concentration):
            assert numbers(of(one)) == numbers(of(own))
        assert analysis.whole_neurons(one, threshold=0).names == analysis.whole_neurons(own, threshold=0).names
        assert analysis.ablate(tiny_model, one, TEXT, seeds=0).names == (own.lineage,)
        assert analysis.sufficiency(tiny_model, one, "L0H1", TEXT, seeds=0).notes["base_weights"] == own.kept
        assert analysis.stochastic_ablation(tiny_model, one, TARGET, TEXT, shares=[1], draws=1).points == (1,)
        bc.export_masks(tiny_model, one, tmp_path / "masks.npz")
        within = bc.find_subnetwork(tiny_model, TARGET, CORPUS, CONFIG, within=one, check_memory="off")
        assert (within.subnetwork - own).kept == 0


def test_what_holds_none_is_refused(tiny_model):
    evaluation = bc.evaluate(tiny_model, bc.Subnetwork.full(tiny_model), TARGET, TEXT, controls=False)
    for wrong in (evaluation, "file.safetensors", None):  # an evaluation's `subnetwork` is its numbers
        for call in (
            lambda wrong=wrong: bc.evaluate(tiny_model, wrong, TARGET, TEXT),
            lambda wrong=wrong: bc.masked(tiny_model, wrong).__enter__(),
            lambda wrong=wrong: analysis.overlap(wrong, wrong),
            lambda wrong=wrong: bc.analyze(tiny_model, wrong, TARGET, CORPUS),
        ):
            with pytest.raises(ValueError, match=f"a {type(wrong).__name__} is no subnetwork: pass a Subnetwork"):
                call()
