"""What the analyses refuse: one line that says what came and what was wanted, for every public function."""

import inspect

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import analysis
from bigram_circuits.analysis.conditions import check_subnetwork
from bigram_circuits.analysis.prompts import _token_ids
from bigram_circuits.measures.statistics import check_seed
from tests.conftest import D_VOCAB, save_tiny

from .test_all_architectures import CONFIGS

TEXT = np.random.default_rng(0).integers(0, D_VOCAB, (6, 8))
OUTSIDE, BELOW = TEXT.copy(), TEXT.copy()
OUTSIDE[4, 5], BELOW[4, 5] = D_VOCAB, -1
LONG = np.zeros((4, 65), dtype=int)  # the tiny models' context is 64
OTHER_VOCABULARY = bc.count_ngrams(np.zeros((2, 8), dtype=int), d_vocab=D_VOCAB + 1)

# every analysis of a text, given a model and the text
OF_TEXT = {
    "logit_lens": lambda model, text, **options: analysis.logit_lens(model, text, **options),
    "affine_lens": lambda model, text, **options: analysis.affine_lens(model, text, **options),
    "fit_affine_lens": lambda model, text, **options: analysis.fit_affine_lens(model, text, **options),
    "refine_affine_lens": lambda model, text, **options: analysis.refine_affine_lens(
        model, fitted(model)["full"], text, steps=1, **options
    ),
    "cosine_to_unembedding": lambda model, text, **options: analysis.cosine_to_unembedding(model, text, **options),
    "layer_rotations": lambda model, text, **options: analysis.layer_rotations(model, text, **options),
    "covariance_similarity": lambda model, text, **options: analysis.covariance_similarity(model, text, **options),
    "ablate": lambda model, text, **options: analysis.ablate(model, "L0.mlp", text, **options),
    "stochastic_ablation": lambda model, text, **options: analysis.stochastic_ablation(
        model, half(model), counted(), text, **options
    ),
    "sufficiency": lambda model, text, **options: analysis.sufficiency(model, half(model), "L0.mlp", text, **options),
    "max_activating_tokens": lambda model, text, **options: analysis.max_activating_tokens(
        model, [(0, 1)], text, min_count=1, **options
    ),
    "faithfulness_by_token": lambda model, text, **options: analysis.faithfulness_by_token(
        model, text, target=counted(), min_count=1, **options
    ),
    "faithfulness_to": lambda model, text, **options: analysis.faithfulness_to(counted(), text, **options)(model),
    "pulled_back": lambda model, text, **options: analysis.pulled_back(model, 70, text=text, through="L0H1", **options),
    "norm_effect": lambda model, text, **options: analysis.norm_effect(model, 70, text=text, **options),
    "atlas": lambda model, text, **options: analysis.atlas(model, text, tokens=2, **options),
    "predicted_effects": lambda model, text, **options: analysis.predicted_effects(
        model, text, tokens=2, neurons=2, **options
    ),
    "neuron_map": lambda model, text, **options: analysis.neuron_map(model, text, tokens=2, **options),
    "neurons_used": lambda model, text, **options: analysis.neurons_used(model, text, tokens=2, **options),
    "unit_effects": lambda model, text, **options: analysis.unit_effects(model, counted(), text, most=2, **options),
    "why_weight": lambda model, text, **options: analysis.why_weight(model, 1, counted(), text, draws=2, **options),
}
OF_PROMPT = {
    "logit_lens": lambda model, prompt: analysis.logit_lens(model, prompt),
    "cosine_to_unembedding": lambda model, prompt: analysis.cosine_to_unembedding(model, prompt),
    "logit_attribution": lambda model, prompt: analysis.logit_attribution(model, prompt),
    "attention_patterns": lambda model, prompt: analysis.attention_patterns(model, prompt),
    "explain": lambda model, prompt: analysis.explain(model, prompt),
}


def fitted(model):
    return analysis.fit_affine_lens(model, TEXT)


def half(model):
    return bc.Subnetwork.full(model).random_like().drop_layer(1)


def counted():
    return bc.count_ngrams(TEXT, d_vocab=D_VOCAB)


@pytest.fixture(scope="module")
def other_half(tmp_path_factory):
    """A subnetwork of a model of other shapes."""
    model = bc.load_model(save_tiny(tmp_path_factory.mktemp("other"), CONFIGS["codegen"]()), device="cpu")
    return half(model)


def refused(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- text ---


@pytest.mark.parametrize("name", list(OF_TEXT))
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (OUTSIDE, "token ids must be 0 to 256 for this model, but there is 257"),
        (BELOW, "token ids must be 0 to 256 for this model, but there is -1"),
        (LONG, "sequences of 65 tokens are longer than this model's context of 64"),
        (TEXT[:, :1], r"shape \(6, 1\) but should be \[sequence, position\]"),
        (TEXT[:0], r"shape \(0, 8\) but should be \[sequence, position\]"),
        (TEXT[None], r"shape \(1, 6, 8\) but should be \[sequence, position\]"),
        (TEXT / 2, "dtype float64 but should be integer ids"),
        (torch.zeros(4, 8, dtype=torch.bfloat16), "dtype float64 but should be integer ids"),
        (TEXT > 3, "dtype bool but should be integer ids"),
        (3, "type int but should be"),
        (None, "type NoneType but should be|need a text"),
    ],
)
def test_text(tiny_model, name, text, words):
    refused(lambda: OF_TEXT[name](tiny_model, text), words)


@pytest.mark.parametrize("name", list(OF_PROMPT))
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty"),
        ("a" * 65, "longer than this model's context of 64"),
        ([1, D_VOCAB], "token ids must be 0 to 256 for this model, but there is 257"),
        ([-1, 2], "token ids must be 0 to 256 for this model, but there is -1"),
        (torch.tensor([1, 300]), "there is 300"),
        (np.zeros(0, dtype=int), r"one sequence of tokens, .* not \[1, 0\]"),
    ],
)
def test_prompts(tiny_model, name, prompt, words):
    refused(lambda: OF_PROMPT[name](tiny_model, prompt), words)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([1.5, 2.0], "dtype float32 but should be integer ids"),
        (np.array([True, False]), "dtype bool but should be integer ids"),
        (["a", "b"], "a text or the token ids of one sequence, not the list"),
        ([[1, 2], [3]], "a text or the token ids of one sequence, not the list"),
        (3.5, "dtype float32 but should be integer ids"),
        (None, "a text or the token ids of one sequence, not the NoneType"),
    ],
)
def test_prompts_that_are_none(prompt, words):
    refused(lambda: _token_ids(prompt), words)


def test_text_without_a_tokenizer(tiny_folders):
    model = bc.load_model(tiny_folders["gpt_neox"], device="cpu")
    model.tokenizer = None
    refused(lambda: analysis.logit_lens(model, "abc"), "this model has no tokenizer")
    refused(lambda: analysis.logit_attribution(model, [1, 2], answer="a"), "this model has no tokenizer")
    assert analysis.logit_lens(model, [1, 2]).columns == ("0: 1", "1: 2")
    for task in analysis.TASKS.values():
        if task is not analysis.repeated_random_tokens:  # its prompts are drawn, not written
            refused(lambda task=task: task(model), "no tokenizer")


def test_too_little_text(tiny_model):
    refused(lambda: analysis.affine_lens(tiny_model, TEXT[:3]), "at least 4 sequences")
    refused(lambda: analysis.covariance_similarity(tiny_model, TEXT[:1, :3]), "at least 4 tokens, not 3")
    refused(
        lambda: analysis.max_activating_tokens(tiny_model, [(0, 1)], TEXT, min_count=1000), "no token occurs 1000 times"
    )
    refused(lambda: analysis.ablate(tiny_model, "L0.mlp", TEXT[:1], by="resample"), "another sequence")
    refused(lambda: analysis.linear_cka(torch.zeros(3, 2), torch.zeros(3, 2)), "at least 4 tokens")
    refused(lambda: analysis.covariance_cosine(torch.zeros(1, 2), torch.zeros(3, 2)), "at least 2 tokens, not 1")
    refused(lambda: analysis.covariance_similarity(tiny_model, TEXT, measure="r"), "measure must be one of cka")


def test_a_short_batch_still_counts(tiny_model):
    """Sequences of 2, and 4 tokens at once: two sequences, not one that would be left out."""
    found = analysis.covariance_similarity(tiny_model, TEXT[:, :2], tokens_at_once=4)
    assert np.isfinite(np.diagonal(found.get("cka"))).all()


# --- models, subnetworks, targets ---


@pytest.mark.parametrize("name", [name for name in OF_TEXT if name != "refine_affine_lens"])
def test_what_is_no_model(tiny_model, name):
    known = half(tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "half", lambda _: known)
        refused(lambda: OF_TEXT[name]("gpt2", TEXT), "a str is not a model: pass one from load_model")
    for call in OF_PROMPT.values():
        refused(lambda call=call: call("gpt2", "abc"), "a str is not a model")


TAKING_SUBNETWORKS = [name for name in OF_TEXT if name not in ("stochastic_ablation", "sufficiency")]


@pytest.mark.parametrize("name", TAKING_SUBNETWORKS)
def test_the_subnetwork_of_another_model(tiny_model, other_half, name):
    refused(lambda: OF_TEXT[name](tiny_model, TEXT, subnetwork=other_half), "blocks.0.attn.W_Q")


def test_the_subnetwork_of_another_model_where_it_must_be_given(tiny_model, other_half):
    for call in (
        lambda: analysis.stochastic_ablation(tiny_model, other_half, counted(), TEXT),
        lambda: analysis.sufficiency(tiny_model, other_half, "L0.mlp", TEXT),
        lambda: analysis.ablate(tiny_model, other_half, TEXT),
        lambda: analysis.logit_attribution(tiny_model, other_half, "abc"),
        lambda: analysis.attention_patterns(tiny_model, other_half, "abc"),
        lambda: analysis.explain(tiny_model, other_half, "abc"),
        lambda: analysis.logit_lens(tiny_model, other_half, "abc"),
        lambda: analysis.cosine_to_unembedding(tiny_model, other_half, "abc"),
        lambda: analysis.overlap(half(tiny_model), other_half),
        lambda: analysis.overlaps([half(tiny_model), other_half]),
    ):
        refused(call, "blocks.0.attn.W_Q")


def test_what_is_no_subnetwork():
    check_subnetwork(None)
    refused(lambda: check_subnetwork("half.safetensors"), "a str is no subnetwork")
    refused(lambda: check_subnetwork({}), "a dict is no subnetwork")


@pytest.mark.parametrize("name", ["logit_lens", "affine_lens", "cosine_to_unembedding", "ablate"])
def test_targets(tiny_model, name):
    refused(lambda: OF_TEXT[name](tiny_model, TEXT, target=OTHER_VOCABULARY), "a vocabulary of 258, but the model's is")
    refused(lambda: OF_TEXT[name](tiny_model, TEXT, target=3), "a target needs the methods")


def test_targets_that_must_be_given(tiny_model):
    kept = half(tiny_model)
    refused(lambda: analysis.stochastic_ablation(tiny_model, kept, OTHER_VOCABULARY, TEXT), "vocabulary of 258")
    refused(lambda: analysis.faithfulness_to(OTHER_VOCABULARY, TEXT)(tiny_model), "vocabulary of 258")
    refused(lambda: analysis.faithfulness_to(target=3, tokens=TEXT), "int is neither")


def test_maps_of_something_else(tiny_model, tiny_folders):
    kept, maps = half(tiny_model), fitted(tiny_model)
    other = bc.load_model(tiny_folders["llama"], device="cpu")
    for call in (analysis.logit_lens, analysis.affine_lens, analysis.layer_rotations):
        refused(lambda call=call: call(other, TEXT, maps=maps), "fitted on another model than")
    for call in (analysis.logit_lens, analysis.affine_lens):
        refused(lambda call=call: call(tiny_model, kept, TEXT, maps=maps), "there are no affine maps for 'subnetwork'")
        refused(lambda call=call: call(tiny_model, TEXT, maps={}), "there are no affine maps for 'full'")
        of_kept = analysis.fit_affine_lens(tiny_model, kept, TEXT)
        refused(lambda call=call, m=of_kept: call(tiny_model, ~kept, TEXT, maps=m), "for 'subnetwork' were fitted on")
        refused(
            lambda call=call, m=of_kept: call(tiny_model, kept, TEXT, maps=m, seed=1), "for 'random' were fitted on"
        )
    refused(lambda: analysis.layer_rotations(tiny_model, maps={}), "no affine maps")
    refused(lambda: analysis.layer_rotations(tiny_model), "need a text")
    refused(lambda: analysis.refine_affine_lens(other, maps["full"], TEXT), "fitted on another model than")


# --- numbers ---

NOTHING_RANDOM = (
    "covariance_similarity", "sufficiency", "pulled_back", "norm_effect", "atlas", "neuron_map", "unit_effects",
)  # fmt: skip
SEEDED = [name for name in OF_TEXT if name not in NOTHING_RANDOM]


@pytest.mark.parametrize("name", SEEDED)
def test_seeds_below_0(tiny_model, name):
    refused(lambda: OF_TEXT[name](tiny_model, TEXT, seed=-1), "a seed must be a whole number, 0 or more, not -1")


def test_seeds_below_0_elsewhere(tiny_model):
    kept = half(tiny_model)
    for call in (
        lambda: analysis.by_head(kept, seed=-1),
        lambda: analysis.concentration(kept, seed=-1),
        lambda: analysis.whole_neurons(kept, seed=-1),
        lambda: analysis.logit_attribution(tiny_model, kept, "abc", seed=-1),
        lambda: analysis.attention_patterns(tiny_model, kept, "abc", seed=-1),
        *(lambda task=task: task(tiny_model, seed=-1) for task in analysis.TASKS.values()),
    ):
        refused(call, "a seed must be a whole number, 0 or more, not -1")
    refused(lambda: check_seed(0.5), "not 0.5")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("logit_lens", {"top_k": 0}, "top_k must be at least 1, not 0"),
        ("affine_lens", {"alpha": -1.0}, "at least 0, not -1.0"),
        ("affine_lens", {"refine_steps": -1}, "refine_steps must be 0 or more, not -1"),
        ("fit_affine_lens", {"alpha": float("nan")}, "at least 0, not nan"),
        ("fit_affine_lens", {"max_tokens": 0}, "at least 1 token must be used, not 0"),
        ("refine_affine_lens", {"batch_size": 0}, "a batch_size of at least 1"),
        ("refine_affine_lens", {"learning_rate": -1.0}, "a learning_rate above 0"),
        ("layer_rotations", {"alpha": -1.0}, "at least 0, not -1.0"),
        ("covariance_similarity", {"max_tokens": -5}, "at least 1 token must be used, not -5"),
        ("covariance_similarity", {"tokens_at_once": 0}, "tokens_at_once must be at least 4, not 0"),
        ("ablate", {"seeds": -1}, "seeds must be 0 or more, not -1"),
        ("stochastic_ablation", {"draws": 0}, "draws must be at least 1, not 0"),
        ("stochastic_ablation", {"shares": (0, -0.5)}, "shares must be numbers from 0 to 1"),
        ("stochastic_ablation", {"shares": ()}, "shares must be numbers from 0 to 1"),
        ("sufficiency", {"seeds": -1}, "seeds must be 0 or more, not -1"),
        ("max_activating_tokens", {"k": 0}, "k of at least 1"),
    ],
)
def test_numbers(tiny_model, name, options, words):
    refused(lambda: OF_TEXT[name](tiny_model, TEXT, **options), words)


def test_places_that_do_not_exist(tiny_model):
    kept = half(tiny_model)
    for call, words in (
        (lambda: analysis.max_activating_tokens(tiny_model, [(9, 0)], TEXT), "there is no layer 9"),
        (lambda: analysis.max_activating_tokens(tiny_model, [(0, -1)], TEXT), "there is no neuron -1"),
        (lambda: analysis.max_activating_tokens(tiny_model, [], TEXT), "at least one neuron"),
        (
            lambda: analysis.max_activating_tokens(tiny_model, [(0, 1)], TEXT, min_count=0),
            "min_count must be at least 1",
        ),
        (lambda: analysis.attention_patterns(tiny_model, "abc", heads=[(0, -1)]), "there is no head -1 in layer 0"),
        (lambda: analysis.ablate(tiny_model, "L7.mlp", TEXT), "there is no layer 7"),
        (lambda: analysis.atlas(tiny_model, TEXT, tokens=0), "tokens must be at least 1, not 0"),
        (lambda: analysis.predicted_effects(tiny_model, TEXT, neurons=0), "tokens and neurons must be at least 1"),
        (lambda: analysis.neuron_map(tiny_model, TEXT, neurons=0), "tokens and neurons must be at least 1"),
        (lambda: analysis.neurons_used(tiny_model, TEXT, tokens=0), "tokens must be at least 1, not 0"),
        (lambda: analysis.unit_effects(tiny_model, counted(), TEXT, most=0), "most and tokens must be at least 1"),
        (lambda: analysis.ablate(tiny_model, [], TEXT), "no part of the model is named"),
        (lambda: analysis.sufficiency(tiny_model, kept, "L0H9", TEXT), "there is no head 9"),
        (lambda: analysis.concentration(kept, layers=[5]), "there is no layer 5"),
        (lambda: analysis.concentration(kept, layers=[]), "at least one layer"),
        (lambda: analysis.concentration(kept, points=1), "at least 2 points"),
        (lambda: analysis.whole_neurons(kept, most=0), "most must be at least 1"),
        (lambda: analysis.whole_neurons(kept, threshold=2), "a share from 0 to 1"),
        (lambda: analysis.overlap(kept, kept, by="layer"), "by must be one of"),
        (lambda: analysis.overlap(kept, bc.Subnetwork.empty(tiny_model)), "keeps no weight"),
        (lambda: analysis.overlaps([kept]), "at least two"),
        (lambda: analysis.trajectory([], lambda model: {"a": 1.0}), "at least one checkpoint"),
    ):
        refused(call, words)


# --- tasks ---


def test_tasks(tiny_model):
    for task in analysis.TASKS.values():
        refused(lambda task=task: task(tiny_model, prompts=0), "at least 1 prompt, not 0")
    refused(lambda: analysis.repeated_random_tokens(tiny_model, period=100), "more than the model's 64")
    refused(lambda: analysis.repeated_random_tokens(tiny_model, period=1), "period must be 2 to")
    refused(lambda: analysis.earlier_value(tiny_model, pairs=1), "pairs must be 2 to")
    refused(lambda: analysis.ordered_sequences(tiny_model, shown=(0,)), "words from 1 to 11")
    scored = np.zeros(TEXT.shape, dtype=bool)
    scored[:, 3] = True
    outside = analysis.Task("outside", TEXT, scored, 1.0, wrong=np.full((6, 1), D_VOCAB))
    refused(lambda: analysis.ability(tiny_model, outside), "but there is 257")
    refused(lambda: analysis.ability(tiny_model, analysis.Task("long", LONG, LONG == 1, 1.0)), "a scored place")
    refused(lambda: analysis.ability("gpt2", outside), "a str is not a model")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts should be a list of texts, not"),
        ("one text", {}, "prompts should be a list of texts, not 'one text'"),
        (["a"], {"top_k": 0}, "top_k must be from 1 to 257, not 0"),
        (["a"], {"top_k": 258}, "top_k must be from 1 to 257, not 258"),
        ([""], {}, "empty"),
        (["a"], {"target": OTHER_VOCABULARY}, "vocabulary of 258"),
    ],
)
def test_next_tokens(tiny_model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        analysis.next_tokens(tiny_model, prompts, **options)


def test_every_public_function_is_here():
    """A new analysis comes with its bad input."""
    text = inspect.getsource(inspect.getmodule(test_tasks))
    plain = {"by_layer", "by_matrix", "by_neuron", "indirect_object", "greater_than"}  # of a subnetwork; of any number
    in_their_own_tests = {
        "analyze",
        "coupling",
        "exciting_tokens",
        "feature_tokens",
        "head_scores",
        "layer_by_layer",
        "load_result",
        "measure_task",
        "next_tokens",
        "observable",
        "passages",
        "retrieval_scores",
        "subnetworks_over_training",
        "successor_scores",
    }
    functions = {name for name in analysis.__all__ if inspect.isfunction(getattr(analysis, name))}
    missing = {name for name in functions if f"analysis.{name}(" not in text} - plain - in_their_own_tests
    assert not missing
