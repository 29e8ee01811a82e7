import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from bigram_circuits.measures.html import shown
from bigram_circuits.measures.quantities import SURPRISAL_CORRELATION
from bigram_circuits.measures.results import Scatter
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.report.blocks import Chart, Content
from bigram_circuits.report.outcome import command_line
from bigram_circuits.report.page import SECTIONS, opening, page, sections, write_report
from bigram_circuits.report.sections import LEFT_OUT, Sections
from bigram_circuits.runs import RunFolder
from bigram_circuits.storage.files import checked_json
from tests.example_runs import (
    HOSTILE,
    Elements,
    hostile_atlas,
    make_run,
    measured,
    numbers,
    predicted,
    quantities,
    results,
    without_libraries,
)  # fmt: skip


def seen(name, result):
    """The numbers that a page has to tell; of an attention pattern, those at or before a position."""
    values = (
        result.values[~np.isnan(result.values)] if name != "attention" else result.values[0][:, *np.tril_indices(3)]
    )
    return values.ravel()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / 'it\'s "a" <b>run & more'
    return make_run(folder, metrics=measured(), found=results(), name=f"model {HOSTILE}", atlas=hostile_atlas())


@pytest.fixture(scope="module")
def told(run):
    return page(run)


@pytest.fixture(scope="module")
def elements(told):
    return Elements(without_libraries(told))


# --- one file, no network ---


def test_the_page_is_one_file_in_the_runs_folder(run):
    before = {path.name for path in run.path.iterdir()}
    path = write_report(run)
    assert path == run.path / "report.html"
    assert {path.name for path in run.path.iterdir()} == before | {"report.html"}
    assert path.stat().st_size < 10e6
    assert write_report(run.path, run.path / "other.html").read_text() == path.read_text()
    (run.path / "other.html").unlink()


def test_the_page_asks_for_nothing_from_anywhere(told, elements):
    rest = without_libraries(told).replace("'http://www.w3.org/2000/svg'", "")  # a name, which nobody opens
    assert "http://" not in rest
    assert "https://" not in rest
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", rest)
    for tag, attributes in elements.tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#"), tag
    policy = next(one["content"] for one in elements.named("meta") if "http-equiv" in one)
    assert "default-src 'none'" in policy


def test_no_model_library_is_loaded(run):
    code = "import sys; from bigram_circuits.report.page import write_report; write_report(sys.argv[1]);"
    code += "print([name for name in ('transformer_lens', 'transformers', 'datasets') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- what it says ---


def test_every_number_of_the_results_and_the_metrics_is_in_the_tables(run, elements):
    there = np.array(sorted(set(elements.values)))
    for name, result in run.analyses.items():
        for value in () if isinstance(result, Scatter) else seen(name, result):  # of points, only the fit is told
            assert value in there
    for name in ("subnetwork", "full", "empty", "complement", "magnitude"):
        assert set(run.metrics[name].values()) - {14} <= set(there)
    for seed in run.metrics["random"]["seeds"]:
        assert seed["kl"] in there


def test_every_result_is_named_and_every_chart_is_told_in_words(run, elements):
    text = " ".join(elements.text)
    for name in run.analyses:
        assert name in text
    charts = [attributes for attributes in elements.named("div") if "data-figure" in attributes]
    assert len(charts) >= len(run.analyses) - 4  # two of them are tables, and two are views of tokens
    assert all(chart["aria-label"].strip() and chart["role"] == "img" for chart in charts)
    assert [int(chart["data-figure"]) for chart in charts] == list(range(len(charts)))


def test_the_first_screen_has_question_answer_numbers_and_picture(run, told, elements):
    assert re.search(
        r"<h1>Which few weights of .* are enough to predict the next token from the current one\?</h1>", told
    )
    answer = re.search(r'<p class="answer">(.*?)</p>', told, re.S).group(1)
    assert "2 of 14 weights (14.3%) are nearly enough: with only these, the model's predictions agree well with" in (
        answer.replace("&#39;", "'")
    )
    header = told[: told.index("</header>")]
    values = re.findall(r"<dd>(.*?)</dd>", header)
    own, random = run.evaluation.subnetwork, run.evaluation.random
    rise = run.evaluation.complement.mean_surprisal - run.evaluation.full.mean_surprisal
    mean = sum(one.surprisal_correlation for one in random) / len(random)
    assert values == ["14.3%", f"{own.surprisal_correlation:.2f}", f"{mean:.2f}", f"{rise:+.2f}"]
    measured = re.findall(r'<dt><abbr title="(.*?)" tabindex="0">', header)
    assert len(measured) == len(values)
    assert re.findall(r'<dd class="spread">(.*?)</dd>', header) == ["over text 0.901 to 0.923"]
    assert "All numbers are of one seed; another gives others (bigram-circuits find --seeds 5" in told
    assert header.count("<svg") == 1
    assert 'href="#circuit"' in header
    text = " ".join(elements.text)
    assert "Verdict: fairly sparse (14.3% of the weights); largely sufficient: r = 0.912" in text
    assert re.search(r"Begun on 20\d\d-\d\d-\d\d at .* UTC with bigram_circuits \d", told)


def test_checks_say_what_was_measured_and_what_was_not_tried(run):
    found = {check.asked: check for check in opening(run).checks}
    outcomes = {asked: (check.outcome, check.says) for asked, check in found.items()}
    assert outcomes["Would random or the largest weights do as well?"] == (
        "passed", "No: these reach an agreement of 0.91; random weights 0.11."
    )  # fmt: skip
    assert outcomes["Could the choice itself hold the answer?"] == (
        "in doubt", "Yes: the list of weights kept is 430,000 bits long, a table that predicts as well 271,612."
    )  # fmt: skip
    untried = {check.command for check in found.values() if check.outcome == "not tried"}
    assert untried == {
        "bigram-circuits find --falsify", "bigram-circuits find --seeds 5", "bigram-circuits worst-case RUN",
        "bigram-circuits rivals RUN", "bigram-circuits same-function RUN OTHER", "",
    }  # fmt: skip
    assert found["Did learning run long enough?"].says == "Its 2 steps are too few to tell."
    assert opening(run).tally == "3 passed, 1 in doubt, 7 not tried."
    keys = {one.key for one in sections(run)}
    assert {check.key for check in found.values()} <= keys


@pytest.mark.parametrize(
    ("change", "asked", "outcome", "says"),
    [
        ({"advantage": {"full": [0.5, 0.6], "random 0": [-0.1, 0.2]}}, "Would random", "failed", "Not excluded: "),
        ({"mask_capacity": {"mask_bits": 1.0, "table_bits": 100.0, "kl": 0.9}}, "Could the choice", "passed", "No: "),
        ({"mask_capacity": {"mask_bits": 50.0, "table_bits": 100.0, "kl": 0.9}}, "Could the choice", "in doubt", "Not"),
        ({"complement": numbers(0.31)}, "Can the model", "failed", "Yes: without them its loss rises by 0.01"),
    ],
)  # fmt: skip
def test_a_check_that_fails_is_told(tmp_path, change, asked, outcome, says):
    told = opening(make_run(tmp_path / "run", metrics=measured() | change))
    check = next(one for one in told.checks if one.asked.startswith(asked))
    assert (check.outcome, check.says[: len(says)]) == (outcome, says)
    assert ("It failed 1 of the checks below." in told.answer) == (outcome == "failed")


def test_without_a_circuit_the_picture_is_of_how_controls_compare(tmp_path):
    picture = opening(make_run(tmp_path / "run", metrics=measured())).picture
    assert isinstance(picture, Chart)
    names = [trace.name for trace in picture.figure.data]
    assert names == ["subnetwork", "full model", "largest weights", "matched random weights", "empty subnetwork"]
    assert opening(make_run(tmp_path / "bare")).picture is None


def test_a_check_that_cannot_be_made_is_left_out_and_the_others_stand(tmp_path):
    odd = Scatter("Odd", quantities("direct", "measured"), "neuron", ("a",), *np.zeros((3, 2, 1)), against="measured")
    told = opening(make_run(tmp_path / "run", metrics=measured(), found={"predicted_effects": odd}))
    check = next(one for one in told.checks if one.key == "predicts")
    assert (check.outcome, check.says) == ("not tried", f"{LEFT_OUT} (KeyError: 'direct').")
    assert len(told.checks) == 11


@pytest.mark.parametrize(
    ("r", "outcome", "says"), [(0.93, "passed", "Yes"), (0.5, "in doubt", "Roughly"), (0, "failed", "No")]
)
def test_whether_the_picture_predicts_is_told(tmp_path, r, outcome, says):
    told = opening(make_run(tmp_path / "run", found={"predicted_effects": predicted(r)}))
    check = next(one for one in told.checks if one.key == "predicts")
    assert (check.outcome, check.says.split(":")[0]) == (outcome, says)
    assert f"agree to {r:.2f}" in check.says


def test_columns_and_rows_of_tables_say_what_they_mean(told):
    assert f'<th scope="col" class="n"><abbr title="{SURPRISAL_CORRELATION.meaning}' in told.replace("&#x27;", "'")
    assert re.search(
        r'<th scope="row"><abbr title="The full model without what was found\."[^>]*>complement</abbr>', told
    )
    assert re.search(r'<abbr title="Lower end of the 95% interval of: what surprise is"[^>]*>surprise low</abbr>', told)


def test_numbers_are_shown_with_few_digits():
    assert [shown(value) for value in (0.96198, 12345.678, 3, 0.0, 1e-9, math.inf)] == [
        "0.9620", "12,345.7", "3", "0", "1.00e-09", "inf",
    ]  # fmt: skip


# --- the registry of sections ---


def test_every_registered_section_is_on_the_page_and_in_its_contents(run, told, elements):
    kinds = list(SECTIONS)
    assert [one.key for one in sections(run)] == [one.key for one in kinds]
    assert [one["id"] for one in elements.named("section")] == [one.key for one in kinds]
    links = [one["href"] for one in elements.named("a")]
    assert links[-len(kinds) :] == [f"#{one.key}" for one in kinds]
    assert {*links} == {f"#{one.key}" for one in kinds}
    for one in kinds:
        assert elements.text.count(one.heading) == 2, one.key
        assert one.tell.__doc__, one.key
    assert [one.key for one in kinds][-2:] == ["other", "again"]
    opened = [one for one in elements.named("details") if one.get("class") == "part" and "open" in one]
    assert len(opened) == 5


def test_a_new_section_stands_where_others_do():
    registry = Sections({"First": ("a",), "Second": ("...", "y"), "Third": ("z",)}, opened=("a",))
    for key in ("z", "b", "a", "y", "c"):
        registry.add(key, f"Heading of {key}")(lambda: Content(["says"]))
    found = [(one.group, one.key, one.is_open) for one in registry]
    second = [("Second", key, False) for key in ("b", "c", "y")]
    assert found == [("First", "a", True), *second, ("Third", "z", False)]
    assert next(iter(registry))().heading == "Heading of a"
    with pytest.raises(ValueError, match="section 'b' is already registered"):
        registry.add("b", "again")(lambda: Content())


# --- what comes from data is text ---


def test_words_from_data_are_never_markup(run, told, elements):
    assert len(elements.named("script")) == 7
    assert without_libraries(told).count("<script>") == 4  # two libraries and what draws
    assert "alert('" not in re.sub(r"<script.*?</script>", "", without_libraries(told), flags=re.S)
    assert any(HOSTILE in words for words in elements.text)
    assert str(run.path) in elements.text
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', told, re.S).group(1)
    assert "<" not in figures
    assert len(json.loads(figures)) > 10


# --- what is not there ---


def test_a_run_that_was_neither_evaluated_nor_analysed_gives_a_page(tmp_path):
    told = page(make_run(tmp_path / "run"))
    assert "was not evaluated" in told
    assert "was not analysed" in told
    assert "Not measured: what ablations cost" in told
    assert "2 of 14" in told


def test_what_the_model_does_not_show_is_told_with_the_reason(tmp_path):
    found = {name: result for name, result in results().items() if name not in ("attribution", "by_head")}
    left_out = {"attribution": "it has <no> readout", "by_head": "it has no heads"}
    run = make_run(tmp_path / "run", found=found)
    of = RunFolder(run.path).origin().to_json()
    (run.path / "analysis" / "left_out.json").write_text(checked_json(left_out | {"of": of}))
    text = " ".join(Elements(without_libraries(page(run))).text)
    assert "Left out: attribution: it has <no> readout." in text
    assert "Left out: by head: it has no heads." in text
    assert "Not measured: direct logit attribution" not in text
    assert set(run.analyses) == set(found)


def test_controls_are_optional(tmp_path):
    metrics = measured() | dict.fromkeys(("full", "empty", "complement", "magnitude", "random", "full_minus_random"))
    metrics |= {"advantage": {}, "subnetwork": numbers(0.5) | {"surprisal_correlation": None}}
    assert "undefined" in page(make_run(tmp_path / "run", metrics=metrics))


@pytest.mark.parametrize("name", sorted(results()))
def test_a_result_alone_and_without_a_number_gives_a_page(tmp_path, name):
    from dataclasses import replace

    result = results()[name]
    empty = {
        key: np.full_like(getattr(result, key), np.nan) for key in ("values", "low", "high") if hasattr(result, key)
    }
    assert result.title in page(make_run(tmp_path / "run", found={name: replace(result, **empty)}))


def test_a_damaged_result_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / "analysis").mkdir()
    (run.path / "analysis" / "logit_lens.json").write_text("{")
    with pytest.raises(ValueError, match=r"logit_lens\.json"):
        write_report(run)
    assert not (run.path / "report.html").exists()


# --- how to do it again ---


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (SparsifyConfig(), ""),
        (SparsifyConfig(sparsity_weight=5.0, layers=(0, 2), seed=3), " --layers 0,2 --sparsity-weight 5 --seed 3"),
        (SparsifyConfig(low_memory=True, beta_growth=1.5), " --beta-growth 1.5 --low-memory"),
        (SparsifyConfig.paper(granularity={"mlp": "neuron"}), " --granularity mlp=neuron --recipe paper"),
    ],
)
def test_the_command_makes_the_same_recipe(tmp_path, recipe, options):
    command = command_line(make_run(tmp_path / "run", recipe=recipe))
    assert command == f"bigram-circuits find model/x --corpus 'some texts' --context-length 64{options}"


def test_where_no_command_can_do_it_the_page_says_why(tmp_path):
    assert "made in Python from objects" in page(make_run(tmp_path / "a", rebuild=False))
    assert "inside another subnetwork" in page(make_run(tmp_path / "c", within="12ab"))


def test_an_analysis_of_an_earlier_version_is_read_under_its_name_of_now(tmp_path):
    found = results()
    found["exciting_tokens"] = found.pop("max_activating_tokens")
    run = make_run(tmp_path / "run", metrics=measured(), found=found)
    assert "max_activating_tokens" in run.analyses
    assert "exciting_tokens" not in run.analyses
    assert "maximally activating tokens" in page(run)


# --- what is computed, not assumed ---


def lens(full, subnetwork):
    from dataclasses import replace

    values = np.array([[full, subnetwork]])
    one = results()["logit_lens"]
    return replace(
        one, quantities=one.quantities[:1], points=("embed", "0", "1", "2"), conditions=("full", "subnetwork"),
        values=values, low=values, high=values,
    )  # fmt: skip


def test_the_layer_at_which_the_lens_rises_is_computed(tmp_path):
    run = make_run(tmp_path / "run", found={"logit_lens": lens([0.2, 0.7, 0.7, 0.6], [0.2, 0.25, 0.25, 0.9])})
    text = " ".join(Elements(without_libraries(page(run))).text)
    assert (
        "The r of the logit lens with the target's surprisals rises in the full model most at layer 0, the first, from "
        "0.20 to 0.70; in the subnetwork most at layer 2, the last, from 0.25 to 0.90."
    ) in text
    assert "(mostly at layer 2, the last)" in text
    flat = make_run(tmp_path / "flat", found={"logit_lens": lens([0.9, 0.6, 0.5, 0.4], [0.2, 0.2, 0.2, 0.2])})
    assert "rises in the full model at no layer; in the subnetwork at no layer" in page(flat)


@pytest.mark.parametrize(
    ("r", "words"),
    [
        (0.96, "are enough: with only these, the model's predictions agree closely with counts of which token"),
        (0.92, "are nearly enough: with only these, the model's predictions agree well with"),
        (0.82, "are only partly enough: with only these, the model's predictions agree only roughly with"),
        (0.5, "are NOT enough: with only these, the model's predictions do not agree well with"),
    ],
)
def test_the_answer_says_whether_they_are_enough(tmp_path, r, words):
    metrics = measured() | {"subnetwork": numbers(r)}
    run = make_run(tmp_path / "run", metrics=metrics, found={"by_head": results()["by_head"]})
    assert opening(run).answer.startswith(f"2 of 14 weights (14.3%) {words}")


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((5.0, 1.0, 1.2), "are enough: with only these, the model keeps 95.0% of what all weights gain over none."),
        ((5.0, 1.0, 0.5), "are enough: with only these, the model does better than with all weights."),
        ((5.0, 1.0, 6.0), "are NOT enough: with only these, the model does worse than without any weights."),
        ((1.0, 5.0, 1.0), "were chosen; whether they are enough is unknown, since the full model does no better than"),
    ],
)
def test_a_target_that_is_sure_is_answered_by_losses(tmp_path, losses, words):
    undefined = {"surprisal_correlation": None}
    names = ("empty", "full", "subnetwork")
    metrics = {name: numbers(0.5) | undefined | {"cross_entropy": of} for name, of in zip(names, losses, strict=True)}
    told = opening(make_run(tmp_path / "run", metrics=measured() | metrics))
    assert told.answer.startswith(f"2 of 14 weights (14.3%) {words}")
    assert [mark.value for mark in told.marks][1::2] == [f"{losses[2]:.2f}", f"{losses[1]:.2f}"]


def test_there_are_no_backticks_and_one_scheme_of_names(told, elements):
    text = " ".join(elements.text)
    assert "`" not in text
    assert "full - random" not in text
    assert "full model without matched random weights" in text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', told, re.S).group(1))
    names = {trace.get("name") for figure in figures for trace in figure["data"]} - {None}
    assert {"full model", "matched random weights"} <= names
    assert not {"full", "random", "magnitude"} & names


def test_the_settings_and_the_date_are_in_the_text(told, elements):
    text = " ".join(elements.text)
    assert "Settings: method continuous sparsification, granularity weight, sparsity weight 10.0" in text
    assert re.search(r"Begun on \d{4}-\d\d-\d\d at", text)
    opened = re.sub(r"<details>.*?</details>", "", told, flags=re.S)
    for caption in ("Settings and hashes", "Date and versions"):
        assert f'aria-label="{caption}"' in opened
