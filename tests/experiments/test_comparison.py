import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits import cli
from bigram_circuits.analysis.overlap import overlap
from bigram_circuits.evaluation import Evaluation
from bigram_circuits.experiments.comparison import MOST_PAIRED, compare, differing_settings, leaders, not_dominated
from bigram_circuits.experiments.sparsity_path import load_path_runs
from bigram_circuits.measures.results import Curves
from bigram_circuits.measures.statistics import holm
from bigram_circuits.measures.words import percent, rounded
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.report import compared_figures
from bigram_circuits.report.compared_words import COMPARISON_SECTIONS
from bigram_circuits.report.comparison import opening, page, write_comparison
from bigram_circuits.runs import RunFolder
from bigram_circuits.storage.files import checked_json
from bigram_circuits.subnetwork import Subnetwork
from tests.example_runs import (
    HOSTILE,
    Elements,
    curves,
    make_run,
    measured,
    numbers,
    without_libraries,
)

OF_A_LAYER = {"attn.W_Q": (2, 8, 20), "mlp.W_in": (8, 40), "mlp.W_out": (40, 8)}
SHAPES = {f"blocks.{layer}.{name}": shape for layer in range(2) for name, shape in OF_A_LAYER.items()}


def drawn(share, seed, *, of="model/x", hashed="ab12", shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(shape, generator=generator) < share for name, shape in shapes.items()}
    return Subnetwork(masks, model_name=of, weight_hash=hashed, lineage=f"drawn {seed}")


def made(folder, subnetwork, *, r=None, random=True, analysed=0, width=0.01, **options):
    """A run with this subnetwork; evaluated if `r` is given, known to within `width`; analysed on so many tokens."""
    metrics = None
    if r is not None:
        own = numbers(r) | {"kl": 1 - r, "cross_entropy": 3 - r, "kept": subnetwork.kept}
        own |= {"fraction": subnetwork.fraction, "total": subnetwork.total}
        ends = {key: [own[key] - width, own[key] + width] for key in ("surprisal_correlation", "cross_entropy")}
        metrics = measured() | {"subnetwork": own} | ({} if random else {"random": None, "advantage": {}})
        metrics |= {"intervals": {"subnetwork": ends} if width else {}}
    names = ("surprisal_correlation", "recall_at_1", "current_embedding", "target_unembedding", "output_angle")
    found = (
        {name: curves(*names, tokens=analysed) for name in ("logit_lens", "affine_lens", "cosine")} if analysed else {}
    )
    return make_run(folder, metrics=metrics, found=found, subnetwork=subnetwork, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of one model: the second shares most with the first, the third is measured and no more."""
    folder = tmp_path_factory.mktemp("comparison")
    first, third = drawn(0.3, 0), drawn(0.5, 2)
    second = first & drawn(0.7, 1)
    recipe = SparsifyConfig(seed=7, target_fraction=0.25)
    return [
        made(folder / "one", first, r=0.95, analysed=200),
        made(folder / f"two {HOSTILE.replace('/', '|')}", second, r=0.9, recipe=recipe, analysed=1000),
        made(folder / "three", third, r=0.85, random=False),
    ]


@pytest.fixture(scope="module")
def comparison(runs):
    return compare({f"name {place} {HOSTILE}": run for place, run in enumerate(runs)} | {"alone": drawn(0.2, 3)})


@pytest.fixture(scope="module")
def told(comparison):
    return page(comparison)


@pytest.fixture(scope="module")
def elements(told):
    return Elements(without_libraries(told))


def text_of(page_text):
    return " ".join(Elements(without_libraries(page_text)).text)


# --- one file, no network ---


def test_the_page_is_one_file_that_is_replaced_whole(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "comparison.html").write_text("before")
    assert bc.write_comparison([run.path for run in runs]).name == "comparison.html"
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.html"]
    assert write_comparison(runs, "other.html").read_text() == (tmp_path / "comparison.html").read_text()
    with pytest.raises(ValueError, match="is a folder"):
        write_comparison(runs, tmp_path)


def test_the_page_asks_for_nothing_from_anywhere(told, elements):
    rest = without_libraries(told)
    assert "http://" not in rest
    assert "https://" not in rest
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", rest)
    assert all("src" not in attributes and attributes.get("href", "#")[0] == "#" for _, attributes in elements.tags)


def test_no_model_library_is_loaded(runs, tmp_path):
    code = "import sys, bigram_circuits as bc; bc.write_comparison(sys.argv[2:], sys.argv[1]);"
    code += "print([name for name in ('transformer_lens', 'transformers', 'datasets') if name in sys.modules])"
    command = [sys.executable, "-c", code, str(tmp_path / "page.html"), *(str(run.path) for run in runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the numbers ---


def test_the_overlaps_are_those_of_the_analysis(comparison, elements):
    items = comparison.items
    assert len(comparison.pairs) == 6
    logs, there = [], set(elements.values)
    for (a, b), pair in zip(itertools.combinations(items, 2), comparison.pairs, strict=True):
        expected = overlap(a.subnetwork, b.subnetwork, by="component")
        np.testing.assert_array_equal(pair.effects.values, expected.values)
        logs.append(expected.get("log10_p")["all"] * np.log(10))
        for stratum in expected.names:
            for quantity in ("intersection", "expected", "share_of_a_in_b", "share_of_b_in_a", "jaccard"):
                assert expected.get(quantity)[stratum] in there
    adjusted = np.exp(holm(logs))
    np.testing.assert_allclose([pair.p() for pair in comparison.pairs], adjusted, rtol=1e-9)
    assert {pair.p() for pair in comparison.pairs} <= there
    share = (items[0].subnetwork & items[1].subnetwork).kept / items[0].subnetwork.kept
    assert comparison.shares[0, 1] == share
    assert comparison.shares[1, 0] == 1  # all of the second is in the first
    assert np.isnan(comparison.shares.diagonal()).all()
    np.testing.assert_allclose(comparison.chances[0, 1], comparison.pairs[0].get("expected") / items[0].subnetwork.kept)


def test_p_values_of_components_are_adjusted_over_all_pairs(comparison):
    tested = [(pair, name) for pair in comparison.pairs for name in pair.effects.names if name != "all"]
    adjusted = holm([pair.effects.get("log10_p")[name] * np.log(10) for pair, name in tested])
    np.testing.assert_allclose([pair.log10_p[name] * np.log(10) for pair, name in tested], adjusted, atol=1e-9)


def test_what_was_measured_is_in_the_tables_and_the_opening(comparison, told, elements):
    there = set(elements.values)
    for one in comparison.items[:3]:
        own = one.evaluation.subnetwork
        assert {own[key] for key in ("surprisal_correlation", "kl", "cross_entropy", "mean_surprisal")} <= there
        assert {one.subnetwork.kept, one.subnetwork.fraction} <= there
        for count in one.subnetwork.by_component().values():
            assert {count.kept, count.fraction, count.kept / one.subnetwork.kept} <= there
    assert comparison.items[0].measured("kl", "random") in there
    text = " ".join(elements.text)
    kept = percent(comparison.items[0].subnetwork.fraction)
    assert f"agrees best with its target ({rounded(0.95)}; 1 is perfect), with {kept} of the weights" in text
    assert "0.940 to 0.960" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "4 subnetworks of model/x, compared" in text


def test_layer_curves_of_the_subnetworks_are_in_the_tables(comparison, elements):
    assert "Number of tokens measured: 200 for name 0" in " ".join(elements.text)
    for one in comparison.items[:2]:
        for name, quantity in (("logit_lens", "surprisal_correlation"), ("cosine", "current_embedding")):
            found = one.analyses[name]
            assert isinstance(found, Curves)
            assert set(found.get(quantity, "subnetwork").tolist()) <= set(elements.values)


def test_the_front_holds_those_that_nothing_dominates(tmp_path):
    shares = {"a": (0.1, 0.5), "b": (0.2, 0.9), "c": (0.3, 0.8), "d": (0.5, 0.95), "e": (0.5, 0.9)}
    named = {
        name: made(tmp_path / name, drawn(share, place), r=r) for place, (name, (share, r)) in enumerate(shares.items())
    }
    items = compare(named).items
    for quantity in ("surprisal_correlation", "kl"):
        front = [items[place].name for place in not_dominated(items, quantity, items[0].task)]
        slow = [
            one.name
            for one in items
            if not any(
                other is not one
                and other.subnetwork.fraction <= one.subnetwork.fraction
                and other.measured("kl") <= one.measured("kl")
                for other in items
            )
        ]
        assert front == slow
    text = text_of(page(compare(named)))
    assert "On the Pareto front for r: a, b and d. Dominated, with intervals that do not overlap: c." in text
    assert "Not told apart from the front by the intervals: e." in text
    noisy = {
        name: made(tmp_path / "noisy" / name, one.subnetwork, r=shares[name][1], width=0.1)
        for name, one in named.items()
    }
    text = text_of(page(compare(noisy)))
    assert "On the Pareto front for r: a, b and d. Not told apart from the front by the intervals: c and e." in text


# --- scatter is not a ranking ---


def test_only_intervals_that_do_not_overlap_are_ranked(tmp_path):
    recipes = {name: SparsifyConfig(sparsity_weight=weight) for name, weight in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    values = {"a": 0.95, "b": 0.945, "c": 0.9}

    def answered(width, names):
        runs = {
            name: made(tmp_path / str(width) / name, drawn(0.3, 0), r=values[name], width=width, recipe=recipes[name])
            for name in names
        }
        comparison = compare(runs)
        return comparison, re.search(r'<p class="answer">(.*?)</p>', page(comparison), re.S).group(1)

    comparison, answer = answered(0.001, "abc")
    assert leaders(comparison.items, "surprisal_correlation") == leaders(comparison.items, "kl") == ["a"]
    assert "a agrees best with its target (0.950; 1 is perfect), with 30" in answer
    assert outcomes(comparison)["Could it be the choice of text that puts one first?"] == "passed"
    comparison, answer = answered(0.01, "abc")
    assert leaders(comparison.items, "surprisal_correlation") == ["a", "b"]
    agree = "agree equally well with their target as far as the intervals tell"
    assert f"a and b {agree} (0.945 to 0.950; 1 is perfect); each keeps 30" in answer
    assert outcomes(comparison)["Could it be the choice of text that puts one first?"] == "in doubt"
    _, answer = answered(0.1, "abc")
    assert f"All 3 {agree} (0.900 to 0.950; 1 is perfect)" in answer
    comparison, answer = answered(0, "abc")
    assert leaders(comparison.items, "kl") == []
    assert "Some have no interval, so they cannot be ranked: agreement with the target" in answer
    assert "0.900 to 0.950" in answer


def outcomes(comparison):
    """What came of every check of a comparison, by its question."""
    return {check.asked: check.outcome for check in opening(comparison).checks}


def test_the_answer_names_the_best_and_its_size(tmp_path):
    shares = {"small": (0.1, 0.8), "large": (0.5, 0.95), "larger": (0.6, 0.949)}
    named = {
        name: made(tmp_path / name, drawn(share, place), r=r) for place, (name, (share, r)) in enumerate(shares.items())
    }
    kept = {name: percent(run.subnetwork.fraction) for name, run in named.items()}
    told = opening(compare(named))
    assert told.asked == "Which of these 3 subnetworks of model/x is best, and at what size?"
    assert told.answer == (
        "large and larger agree equally well with their target as far as the intervals tell (0.949 to 0.950; 1 is "
        f"perfect); the smallest of them, large, keeps {kept['large']} of the weights."
    )
    two = {name: named[name] for name in ("small", "large")}
    assert opening(compare(two)).answer == (
        f"large agrees best with its target (0.950; 1 is perfect), with {kept['large']} of the weights; the smallest, "
        f"small, keeps {kept['small']} and has 0.800."
    )
    assert told.picture is not None
    assert len(told.picture.figure.layout.annotations) == 0
    assert {check.key for check in told.checks} <= {one.key for one in COMPARISON_SECTIONS}
    found = outcomes(compare(named))
    assert found["Were they measured alike?"] == "passed"
    assert found["Would other seeds change it?"] == "not tried"


def test_runs_that_differ_only_in_the_seed_have_a_mean_and_a_spread(tmp_path):
    rs = (0.96, 0.962, 0.961)
    runs = [
        made(tmp_path / f"model-{seed:08x}", drawn(0.3, seed), r=r, recipe=SparsifyConfig(seed=seed))
        for seed, r in enumerate(rs)
    ]
    comparison = compare(runs)
    assert [one.name for one in comparison.items] == ["seed 0", "seed 1", "seed 2"]
    assert comparison.is_repetition
    spread = comparison.spread("surprisal_correlation")
    assert (spread.mean, spread.low, spread.high) == (pytest.approx(0.961), 0.96, 0.962)
    assert spread.deviation == pytest.approx(0.001)
    text = text_of(page(comparison))
    assert "How much does the subnetwork of model/x depend on the seed?" in text
    answer = (
        "Over 3 seeds, the agreement with the target (1 is perfect) is 0.961 on average, with a standard deviation of"
    )
    assert f"{answer} 0.001." in text
    assert "They differ only in the seed; mean: r 0.961 (sd 0.001)" in str(comparison)
    for word in ("ighest r", "owest KL", "Dominated", "Pareto", "overlap most"):
        assert word not in text
    other = made(tmp_path / "x", drawn(0.3, 9), recipe=SparsifyConfig(sparsity_weight=3.0))
    assert not compare([*runs, other]).is_repetition


def test_a_folder_named_by_a_hash_is_called_by_what_differs(tmp_path):
    weights = (1.0, 10.0, 10.0)
    names = ("m-0123abcd", "m-4567cdef", "mine")
    runs = [
        made(tmp_path / name, drawn(0.3, place), recipe=SparsifyConfig(sparsity_weight=weight))
        for place, (name, weight) in enumerate(zip(names, weights, strict=True))
    ]
    assert [one.name for one in compare(runs).items] == ["sparsity weight 1.0", "sparsity weight 10.0", "mine"]
    assert [one.name for one in compare({"a": runs[0], "b": runs[1]}).items] == ["a", "b"]
    again = made(tmp_path / "again" / "m-4567cdef", drawn(0.3, 3), recipe=SparsifyConfig(sparsity_weight=10.0))
    names = [one.name for one in compare([runs[0], runs[1], again]).items]
    assert names == ["sparsity weight 1.0", "sparsity weight 10.0", "sparsity weight 10.0 (2)"]
    same = [made(tmp_path / f"m-{place:08}", drawn(0.3, place)) for place in range(2)]
    assert [one.name for one in compare(same).items] == ["m-00000000", "m-00000001"]  # nothing differs


def test_names_are_of_one_line_and_distinct(tmp_path):
    one, two = drawn(0.3, 0).named("a\x1b[31m\nb\x00"), drawn(0.3, 1).named("a [31m b")
    comparison = compare([one, two])
    assert [item.name for item in comparison.items] == ["a [31m b", "a [31m b (2)"]
    assert "\x1b" not in str(comparison)
    long = [drawn(0.3, seed).named("x" * 500 + str(seed)) for seed in range(2)]
    assert len(set(compared_figures.short_names([item.name for item in compare(long).items]))) == 2


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.0177, 0.0183), [0.0176, 0.0178, 0.018, 0.0182, 0.0184]),
        ((0.01, 0.3), [0.01, 0.02, 0.05, 0.1, 0.2]),
        ((1e-6, 0.5), [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        ((0.02, 0.02), [0.018, 0.019, 0.02, 0.021, 0.022]),
    ],
)
def test_an_axis_has_ticks_whatever_its_range(values, ticks):
    found = compared_figures._log_ticks(values)
    assert len(found) > 1
    assert found == pytest.approx(ticks)


def test_the_axes_of_the_curve_have_ticks_within_their_range(tmp_path):
    runs = [made(tmp_path / str(seed), drawn(0.3, seed), r=0.96 + seed / 1000) for seed in range(3)]
    told = page(compare(runs))
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', told, re.S).group(1))
    layout = figures[1]["layout"]  # after the first screen's
    for axis in ("xaxis", "xaxis2", "yaxis", "yaxis2"):
        assert len(layout[axis]["tickvals"]) > 1
        assert len(set(layout[axis]["ticktext"])) == len(layout[axis]["ticktext"])


# --- tables to go on with ---


def test_a_comparison_is_a_table_and_a_csv_file(runs, tmp_path, monkeypatch, capsys):
    comparison = compare({"one": runs[0], "alone": drawn(0.2, 3), "two": runs[1]})
    frame = comparison.to_dataframe()
    assert list(frame["name"]) == ["one", "alone", "two"]
    assert list(frame["surprisal_correlation"])[::2] == [0.95, 0.9]
    assert np.isnan(frame["surprisal_correlation"][1])
    assert list(frame["surprisal_correlation_low"])[::2] == [0.94, 0.89]
    assert list(frame["recipe.seed"])[::2] == ["0", "7"]
    assert list(frame["kept"]) == [one.subnetwork.kept for one in comparison.items]
    again = pandas.read_csv(comparison.to_csv(tmp_path / "table.csv"))
    assert list(again["kl"])[::2] == pytest.approx([0.05, 0.1])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", str(runs[0].path), str(runs[1].path), "--csv", "mine.csv"]) == 0
    assert "mine.csv" in capsys.readouterr().out
    assert len(pandas.read_csv("mine.csv")) == 2


# --- many ---


def test_many_are_compared_with_one_and_the_page_says_what_it_leaves_out(tmp_path):
    many = [drawn(0.2, seed) for seed in range(MOST_PAIRED + 8)]
    comparison = compare(many)
    assert comparison.against == "drawn 0"
    assert [pair.first.name for pair in comparison.pairs] == ["drawn 0"] * (len(many) - 1)
    text = text_of(page(comparison))
    assert "Of 40 subnetworks, each is compared with one alone, drawn 0." in text
    assert "Left out: the map of all pairs" in text
    assert "Only 24 of the 40 are shown here" in text
    assert max(map(len, str(comparison).splitlines())) < 100
    chosen = compare(many[:4], against="drawn 2")
    assert {(pair.first.name, pair.second.name) for pair in chosen.pairs} == {
        ("drawn 2", f"drawn {seed}") for seed in (0, 1, 3)
    }
    with pytest.raises(ValueError, match="none of them is named 'x': they are drawn 0"):
        compare(many[:4], against="x")


def test_a_comparison_reads_no_training_records(tmp_path, monkeypatch):
    paths = [made(tmp_path / name, drawn(0.3, 0)).path for name in "ab"]
    monkeypatch.setattr(RunFolder, "history", lambda self: pytest.fail("read the training records"))
    assert len(compare(paths).items) == 2


def test_other_targets_are_not_ranked(tmp_path, runs):
    other = made(tmp_path / "other", drawn(0.4, 5), r=0.99, target="model")
    compared = compare([runs[0], other.path])
    assert differing_settings(compared.items) == {"target": ["bigram", "self-faithful"]}
    assert all(len(not_dominated(compared.items, "kl", one.task)) == 1 for one in compared.items)
    text = text_of(page(compared))
    assert "They were measured with different targets or texts, so none can be called the best." in text
    assert outcomes(compared)["Were they measured alike?"] == "failed"
    assert "values for different ones cannot be compared" in text


# --- what comes from data is text ---


def test_names_are_never_markup(told, elements):
    assert len(elements.named("script")) == 4
    assert "alert('" not in re.sub(r"<script.*?</script>", "", without_libraries(told), flags=re.S)
    assert any(HOSTILE in words for words in elements.text)
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', told, re.S).group(1)
    assert "<" not in figures
    names = {trace.get("name") for figure in json.loads(figures) for trace in figure["data"]} - {None}
    assert not any("<" in name for name in names)


def test_every_chart_is_told_in_words(elements):
    charts = [attributes for attributes in elements.named("div") if "data-figure" in attributes]
    assert len(charts) == 10  # the curve twice, two maps, the profiles, and five by layer
    assert all(chart["aria-label"].strip() for chart in charts)


# --- what differs, what is missing ---


def test_only_settings_that_differ_are_told(comparison, elements):
    differing = differing_settings(comparison.items)
    assert differing == {
        "recipe.target_fraction": ["not set", "0.25", "not set", None],
        "recipe.seed": ["0", "7", "0", None],
    }
    assert "The runs differ in target fraction and seed; all their other settings agree." in " ".join(elements.text)


def test_whether_the_masks_could_hold_the_answer_is_told(elements):
    assert " ".join(elements.text).count("Yes: it has 430,000 bits, and a table with a KL of 0.912 nats") == 3


def test_what_is_missing_is_said(elements):
    text = " ".join(elements.text)
    for words in (
        "Not evaluated, so without r, KL and losses: alone.",
        "Evaluated without controls, so without a verdict: name 2",
        "Not plotted, because nothing was measured or kept: alone.",
        "Without a random control: name 2",
        "Not measured layer by layer (bigram-circuits analyze RUN measures it): name 2",
    ):
        assert words in text


def test_subnetworks_alone_have_overlaps_and_profiles(tmp_path):
    drawn(0.3, 1).save(tmp_path / "file.safetensors")
    subnetworks = [drawn(0.2, 0), tmp_path / "file.safetensors", Subnetwork.load(tmp_path / "file.safetensors"),
                   drawn(0.0, 4)]  # fmt: skip
    compared = compare(subnetworks)
    assert [one.name for one in compared.items] == ["drawn 0", "file", "drawn 1", "drawn 4"]
    text = text_of(page(compared))
    for words in ("None of them was evaluated", "Empty, and so without overlaps: drawn 4.",
                  "Where the kept weights are", "Not measured layer by layer: drawn 0, file"):  # fmt: skip
        assert words in text
    assert "None of them was evaluated" in text_of(page(compare([drawn(0.0, 0), drawn(0.0, 1)])))


def test_undefined_numbers_give_a_page(tmp_path):
    run = made(tmp_path / "run", drawn(0.2, 0), r=0.5)
    undefined = run.metrics["subnetwork"] | {"surprisal_correlation": None, "kl": None}
    RunFolder(run.path).write_evaluation(Evaluation.from_json({"subnetwork": undefined}))
    assert "r and KL are undefined for all of them." in text_of(page(compare([run.path, drawn(0.3, 1)])))


# --- a path, names, errors ---


def test_a_path_counts_as_its_runs_with_what_it_measured(tmp_path, runs):
    large = drawn(0.5, 0)
    small = large & drawn(0.5, 1)
    made(tmp_path / "path" / "weight-1", large)
    made(tmp_path / "path" / "weight-10", small, within=large.checksum)
    points = [
        {
            "sparsity_weight": weight,
            **numbers(r),
            "kept": one.kept,
            "fraction": one.fraction,
            "subnetwork": one.checksum,
        }
        for weight, r, one in ((1.0, 0.9, large), (10.0, 0.8, small))
    ]
    record = {"points": points, "full": numbers(0.5), "empty": numbers(0.1), "cpr": None, "cmd": None}
    (tmp_path / "path" / "path.json").write_text(checked_json(record))
    compared = compare([tmp_path / "path", runs[0]])
    assert [one.name for one in compared.items] == ["weight-1", "weight-10", "one"]
    assert [one.measured("surprisal_correlation") for one in compared.items] == [0.9, 0.8, 0.95]
    assert compared.items[0].measured("surprisal_correlation", "full") == 0.5
    assert [pair.is_given for pair in compared.pairs] == [True, False, False]
    assert differing_settings(compared.items)["within"] == ["not set", "weight-1", "not set"]
    assert "their overlap is not a finding: weight-1 with weight-10." in text_of(page(compared))
    one = compare({"x": tmp_path / "path" / "weight-10", "y": runs[0]}).items[0]
    assert one.measured("kl") == points[1]["kl"]
    assert [one.name for one in compare({"p": tmp_path / "path"}).items] == ["p/weight-1", "p/weight-10"]
    (tmp_path / "path" / "path.json").write_text(checked_json({**record, "points": points[::-1]}))
    assert [run.path.name for run in load_path_runs(tmp_path / "path")] == ["weight-10", "weight-1"]
    swapped = [points[0], points[1] | {"subnetwork": large.checksum}]
    (tmp_path / "path" / "path.json").write_text(checked_json({**record, "points": swapped}))
    with pytest.raises(ValueError, match=r"weight-10' holds another run than the one that path\.json measured"):
        compare([tmp_path / "path"])
    (tmp_path / "path" / "path.json").write_text("{")
    with pytest.raises(ValueError, match=r"path\.json' is damaged"):
        compare([tmp_path / "path"])


def test_the_same_name_twice_is_made_distinct(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for seed, folder in enumerate(folders):
        made(folder, drawn(0.3, seed))
    assert [one.name for one in compare(folders).items] == ["a/run", "b/run"]
    same = compare([folders[0], folders[0], drawn(0.1, 3), drawn(0.1, 3)])
    assert [one.name for one in same.items] == ["run", "run (2)", "drawn 3", "drawn 3 (2)"]
    assert same.shares[0, 1] == 1


def test_other_models_are_refused_by_name(runs):
    reshaped = drawn(0.3, 0, shapes=SHAPES | {"blocks.1.mlp.W_in": (8, 41), "blocks.1.mlp.W_out": (41, 8)})
    with pytest.raises(ValueError, match=r"'a' and 'c' .*blocks\.1\.mlp\.W_in has shape \(8, 40\) in the one"):
        compare({"a": runs[0], "b": drawn(0.3, 0, hashed=None), "c": reshaped})
    with pytest.raises(ValueError, match=r"'b' and 'c' .*hash 'ab12', not 'ffff'"):
        compare({"a": drawn(0.3, 0, hashed=None), "b": drawn(0.3, 1), "c": drawn(0.3, 2, hashed="ffff")})


def test_fewer_than_two_and_other_things_are_refused(runs):
    for one in ([], [runs[0]], runs[0], runs[0].path, str(runs[0].path), drawn(0.2, 0)):
        with pytest.raises(ValueError, match=r"at least two runs or subnetworks, not \d"):
            compare(one)


# --- the command ---


def test_the_command_writes_the_page_and_prints_the_table(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = [str(run.path) for run in runs]
    assert cli.main(["compare", *folders]) == 0
    out = capsys.readouterr().out
    assert "the page to look at: comparison.html" in out
    assert str(compare(runs)) in out
    for words in ("[1] one", "0.950", "0.050", percent(runs[0].subnetwork.fraction), f"{runs[0].subnetwork.kept:,}"):
        assert words in out
    assert cli.main(["compare", *folders, "--out", "sub/mine.html"]) == 0
    assert (tmp_path / "sub" / "mine.html").read_text() == (tmp_path / "comparison.html").read_text()


def test_a_mistake_gets_one_line(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = {name: torch.ones((3,) * len(shape), dtype=torch.bool) for name, shape in SHAPES.items()}
    Subnetwork(other).save(tmp_path / "other.safetensors")
    run = str(runs[0].path)
    for arguments, said in (
        ([run], "at least two runs or subnetworks, not 1"),
        ([run, "nowhere"], "'nowhere' holds no run"),
        ([run, "other.safetensors"], "'one' and 'other' are of different models"),
        ([run, run, "--out", "."], "'.' is a folder"),
    ):
        assert cli.main(["compare", *arguments]) == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_the_marks_of_many_are_of_one_kind(tmp_path):
    n = 40
    names = [f"run {place} <b>" for place in range(n)]
    values = [0.9 + place / 1000 for place in range(n)]
    panel = compared_figures.Points("r", values, values, values, [0.2] * n, fronts=[[0, n - 1]], is_r=True)
    few = compared_figures.pareto(
        names[:10], [0.02] * 10, [replace(panel, values=values[:10], random=[None] * 10, fronts=())]
    )
    many = compared_figures.pareto(names, [0.02 + place / 1e4 for place in range(n)], [panel])
    assert len(few.data) == 10
    assert [trace.name for trace in many.data] == ["Pareto front", "matched random weights", "subnetworks"]
    assert many.data[2].customdata[3][0] == "run 3 &lt;b&gt;"
    assert len(many.data[2].x) == n
    assert many.layout.height < 500
