"""Rivals: of a planted circuit that is unique there are none, of one with twins the twins; and what is made of them."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis.overlap import overlap
from bigram_circuits.targets.base import kl_of_best_constant
from tests.conftest import D_VOCAB, planted_circuit

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = np.random.default_rng(0).integers(0, 12, (24, 16))
CORPUS = bc.Corpus.from_tokens(TEXT[:16], TEXT[16:])
TARGET = bc.count_ngrams(TEXT[:16], 2, d_vocab=D_VOCAB)
QUICK = bc.SparsifyConfig(max_steps=2, batch_size=4, target_fraction=0.2, retries=0)


def planted_rivals(unique, **options):
    made = planted_circuit("gpt2", d_vocab=6, successors=2, n_layers=1, distractors=0.05, unique=unique)
    recipe = bc.SparsifyConfig(
        sparsity_weight=10.0,
        max_steps=150,
        beta_growth=1.04,
        first_score=0.7,
        learning_rate=0.05,
        batch_size=8,
        retries=0,
    )
    found = bc.rivals(
        made.model, made.target, made.corpus, 2, config=recipe, first=made.circuit, check_memory="off", **options
    )
    return made, found


@pytest.fixture(scope="module")
def of_twins():
    return planted_rivals(unique=False, overlap_weight=10.0)


# --- what is planted ---


@pytest.mark.parametrize(("architecture", "layers"), [("gpt2", 1), ("llama", 2)])
def test_each_copy_and_every_mixture_computes_the_same(architecture, layers):
    made = planted_circuit(architecture, d_vocab=8, layers=layers, distractors=0.3, unique=False)
    first, twin = made.solutions
    assert first == made.circuit
    assert (first & twin).kept == 0
    assert first.kept == twin.kept
    mixture = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in first.shapes.items()}
    for name, mask in mixture.items():
        if ".mlp." in name:
            along = mask if name.endswith("W_out") else mask.T  # a row for every neuron; the twin of neuron j is 8 + j
            ours, theirs = (one[name] if name.endswith("W_out") else one[name].T for one in (first, twin))
            even = torch.arange(len(along)) % 2 == 0
            along |= (ours & even[:, None]) | (theirs & ~even[:, None])
    mixture = bc.Subnetwork(mixture)
    tokens = torch.arange(8)[:, None]
    for mask in (first, twin, mixture):
        assert made.is_solution(mask)
        with torch.no_grad(), bc.masked(made.model, mask):
            predicted = made.model(tokens)[:, 0].double().softmax(-1)
        torch.testing.assert_close(predicted, made.probs, atol=1e-6, rtol=1e-5)
    for mask in (first | twin, first.random_like(), bc.Subnetwork.empty(made.model), ~first):
        assert not made.is_solution(mask)
    halves = dict(first.items()) | {"blocks.0.mlp.W_in": twin["blocks.0.mlp.W_in"]}
    assert not made.is_solution(bc.Subnetwork(halves))  # as large, but no neuron is whole
    with torch.no_grad(), bc.masked(made.model, first | twin):
        both = (made.model(tokens)[:, 0].double().softmax(-1) - made.probs).abs().max()
    assert 0.01 < both < 0.1  # normalisation undoes most of what is written twice


def test_a_unique_circuit_is_the_only_solution():
    made = planted_circuit("gpt2", d_vocab=6, successors=2, n_layers=1, distractors=0.05, unique=True)
    assert made.solutions == (made.circuit,)
    assert made.is_solution(made.circuit)
    with pytest.raises(ValueError, match="d_mlp must be at least the number of planted neurons, 16"):
        bc.plant_bigram(d_vocab=8, d_mlp=12, unique=False)


# --- what is found ---


def test_the_rival_of_a_circuit_with_twins_is_the_twins(of_twins):
    made, found = of_twins
    first, rival = found.masks
    assert first == made.circuit
    assert rival == made.solutions[1]
    assert found.rivals == ("weight 10: rival 1",)
    assert re.match(r"Rivals: 2 masks of 18 weights that have 0% of these in common do the same", found.verdict)
    rows = found.cores.to_dataframe().set_index("condition")
    assert list(rows.kept) == [0, first.total, first.total - 36, first.total]
    assert rows.recovered["weight 10: core alone"] == pytest.approx(0, abs=0.02)
    assert rows.kl["weight 10: without the core"] == pytest.approx(rows.kl["full"])


def test_a_unique_circuit_has_no_rival():
    made, found = planted_rivals(unique=True, overlap_weight=math.inf)
    assert (found.masks[1] & made.circuit).kept == 0
    assert found.rivals == ()
    assert found.verdict.startswith("No rival: masks with less in common do worse. The best of them, weight inf: rival")


def test_the_numbers_are_those_of_evaluate_and_overlap(of_twins):
    made, found = of_twins
    table = found.to_dataframe().set_index("mask")
    constant = kl_of_best_constant(made.target, made.corpus.held_out)
    told = {}
    for name, mask in zip(table.index, found.masks, strict=True):
        alone = bc.evaluate(made.model, mask, made.target, made.corpus.held_out, controls=False).subnetwork
        assert table.surprisal_correlation[name] == pytest.approx(alone.surprisal_correlation)
        assert table.kl[name] == pytest.approx(alone.kl, abs=1e-9)
        told[name] = 1 - alone.kl / constant
        assert table.context_told[name] == pytest.approx(told[name])
        assert table.recovered[name] == pytest.approx(told[name] / told["first"])
        assert table.recovered_low[name] <= table.recovered[name] + 1e-9
        shared = overlap(mask, found.masks[0])
        assert table.jaccard[name] == shared.get("jaccard")["all"]
        assert table.log10_p[name] == shared.get("log10_p")["all"]
        assert table.times_chance[name] == pytest.approx(
            shared.get("intersection")["all"] / shared.get("expected")["all"]
        )
    assert table.kl_gap["first"] == table.r_gap["first"] == 0


def test_several_weights_and_masks_each_apart_from_all_before(tiny_model, tmp_path):
    config = dataclasses.replace(QUICK, granularity={"mlp": "weight"}, target_fraction=0.65)
    found = bc.rivals(tiny_model, TARGET, CORPUS, 3, (0, math.inf), config=config, run_dir=tmp_path, check_memory="off")
    names = ("first", "weight 0: rival 1", "weight 0: rival 2", "weight inf: rival 1", "weight inf: rival 2")
    assert found.measured.names == names
    assert len({mask.kept for mask in found.masks}) == 1
    mlp = bc.Subnetwork({name: torch.full(shape, ".mlp." in name) for name, shape in found.masks[0].shapes.items()})
    first, *_, fourth, fifth = (mask & mlp for mask in found.masks)
    assert (first & fourth).kept == (first & fifth).kept == (fourth & fifth).kept == 0
    assert found.measured.get("jaccard")["weight inf: rival 1"] == 0  # attention, which is kept, does not count
    seeds = [bc.load_run(tmp_path / folder).settings.recipe.seed for folder in ("first", "weight-inf-rival-2")]
    assert seeds == [0, 2]
    settings = bc.load_run(tmp_path / "weight-inf-rival-2").settings
    assert settings.apart_from == tuple(found.masks[at].checksum for at in (0, 3))
    assert found.cores.names[-1] == "full"
    assert len(found.cores.names) == 7
    again = bc.rivals(tiny_model, TARGET, CORPUS, 3, (0, math.inf), config=config, run_dir=tmp_path, check_memory="off")
    assert again.masks == found.masks
    read = bc.load_rivals(tmp_path)
    assert (read.masks, str(read), read.verdict) == (found.masks, str(found), found.verdict)
    assert read.of == found.of
    found.masks[1].save(tmp_path / "mask-0.subnetwork.safetensors")
    with pytest.raises(ValueError, match=r"mask-0.subnetwork.safetensors' is another mask than the one measured"):
        bc.load_rivals(tmp_path)


def test_of_a_task_the_fall_of_the_loss_is_what_counts(tiny_model):
    task = bc.analysis.repeated_random_tokens(tiny_model, prompts=8, period=4)
    first = bc.Circuit.full(tiny_model, "head").drop("L0H0", "L1H3")
    config = bc.SparsifyConfig(units="head", method="straight_through", max_steps=2, batch_size=4, target_fraction=0.5)
    target = bc.TaskTarget(task)
    found = bc.rivals(tiny_model, target, task.corpus(), 2, 1.0, config=config, first=first, check_memory="off")
    loss = found.measured.get("cross_entropy")
    empty = bc.evaluate(
        tiny_model, bc.Circuit.empty(tiny_model, "head"), target, task.corpus().held_out, controls=False
    ).subnetwork.cross_entropy
    wanted = (empty - loss["weight 1: rival 1"]) / (empty - loss["first"])
    found_share = found.measured.get("recovered")["weight 1: rival 1"]
    assert found_share == pytest.approx(wanted) if empty > loss["first"] else math.isnan(found_share)
    assert {type(mask) for mask in found.masks} == {bc.Circuit}
    assert [mask.kept for mask in found.masks] == [6, 6]


# --- what is shown ---


def test_it_is_shown_as_text_picture_and_page(of_twins):
    _, found = of_twins
    assert str(found).startswith("Rivals of a subnetwork of 18 weights\nmask")
    assert found.verdict in str(found)
    assert found.verdict in found._repr_html_()
    figure = found.plot()
    assert set(figure.data[0].x) == {0.0, 1.0}  # by overlap
    found.plot("surprisal_correlation")


@pytest.mark.parametrize(
    ("low", "high", "jaccard", "said"),
    [
        (0.96, 0.99, 0.3, "Rivals: 2 masks"), (0.96, 0.99, 0.97, "No rival: what is found is an earlier mask again"),
        (0.9, 0.94, 0.3, "No rival: masks with less in common do worse"), (0.9, 0.97, 0.3, "Undecided: of weight 10"),
        (math.nan, math.nan, 0.3, "Undecided"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_interval_and_the_overlap(of_twins, low, high, jaccard, said):
    _, found = of_twins
    values, lows, highs = (part.copy() for part in (found.measured.values, found.measured.low, found.measured.high))
    lows[0, 1], highs[0, 1] = low, high
    values[found._place("most_jaccard"), 1] = jaccard
    measured = dataclasses.replace(found.measured, values=values, low=lows, high=highs)
    assert dataclasses.replace(found, measured=measured).verdict.startswith(said)


# --- what is wrong ---


def test_bad_input(tiny_model, tmp_path):
    full = bc.Subnetwork.full(tiny_model)
    for how, said in (
        ({"k": 1}, "k counts the first mask too, so it is at least 2, not 1"),
        ({"overlap_weight": -1.0}, "overlap_weight must be a number of at least 0, or several different ones"),
        ({"overlap_weight": (1.0, 1)}, "or several different ones"),
        ({"overlap_weight": ()}, "or several different ones"),
        ({"size": 0.1, "first": full}, "rivals have the size of the first mask: give size or first, not both"),
        ({"config": dataclasses.replace(QUICK, polish=1)}, "rivals are not polished"),
        ({"first": bc.Circuit.full(tiny_model)}, "first should be a Subnetwork, as what is found, not a Circuit"),
        ({"first": bc.Subnetwork.empty(tiny_model)}, "keeps none of the weights that the recipe can drop"),
        (
            {"first": bc.Circuit.full(tiny_model, "head"), "config": bc.SparsifyConfig(units="head", replace="mean")},
            "the recipe replaces nodes by mean, the first circuit by zero",
        ),
        ({"first": full, "overlap_weight": math.inf}, "cannot keep 8448: only 0 that may be kept are in none of the 1"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            bc.rivals(tiny_model, TARGET, CORPUS, **({"config": QUICK, "check_memory": "off"} | how))
        assert "\n" not in str(error.value)
    assert bc.load_rivals(tmp_path) is None
