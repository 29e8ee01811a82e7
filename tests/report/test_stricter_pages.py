"""The stricter tests on the page of a run and on that of a comparison: what each outcome is told as."""

import math

import pytest

from bigram_circuits.experiments.comparison import compare
from bigram_circuits.experiments.stricter import StricterTests
from bigram_circuits.report.blocks import Chart
from bigram_circuits.report.compared_stricter import stricter as compared_section
from bigram_circuits.report.page import opening, sections
from bigram_circuits.report.refuting import checks
from bigram_circuits.report.results import Results
from bigram_circuits.report.sections import SECTIONS
from tests.example_runs import compared, make_run, measured, save_stricter, some_rivals, stricter, worst_case

COMMANDS = {
    "worst_case": "bigram-circuits worst-case RUN",
    "rivals": "bigram-circuits rivals RUN",
    "same_function": "bigram-circuits same-function RUN OTHER",
}
ELSE = (
    "the full model does something else than the target: over the empty mask it gains -1.000 nats, and the mask 2.000"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("stricter") / "run", metrics=measured())


def check_of(run, tests, key):
    return next(one for one in checks(run, Results({}, stricter=tests)) if one.key == key)


def section_of(run, tests, key):
    return next(one for one in SECTIONS if one.key == key)(run, Results({}, stricter=tests))


@pytest.mark.parametrize(
    ("curves", "outcome", "answer", "left"),
    [
        (worst_case((0.8, 0.76, 0.74)), "passed", "Nothing much: set as badly as 20 steps", "leave 92.5% of"),
        (worst_case((0.8, 0.76, 0.56)), "in doubt", "A part is lost: set as badly as 20 steps", "leave 70.0% of"),
        (worst_case((0.8, 0.7, -2.0)), "failed", "It breaks: set as badly as 20 steps", "leave 0.00% of"),
        (worst_case((0.8, 0.1), (0, 4)), "failed", "It breaks: set as badly as 4 steps", "leave 12.5% of"),
        (worst_case((0.8, 0.4, 0.2), forced=True), "not applicable", "It means nothing here: the full", ": 25.0% of"),
        (worst_case((math.nan,) * 3), "passed", "Nothing much", "leave 100.0% of"),
    ],
)
def test_the_worst_case_is_judged_by_what_is_left(run, curves, outcome, answer, left):
    """Of the mask's own 80%; without a share of the context, of its gain in cross-entropy, which here stays."""
    check = check_of(run, StricterTests(curves), "worst_case")
    assert check.asked == "What if the dropped weights are not exactly absent?"
    assert (check.outcome, check.says[: len(answer)], check.command) == (outcome, answer, "")
    assert left in check.says


def test_what_was_left_out_does_not_apply_and_what_was_not_tried_has_a_command(run):
    left_out = StricterTests(left_out={"worst_case": ELSE, "rivals": "the recipe polishes"})
    check = check_of(run, left_out, "worst_case")
    says = "It means nothing here: the full model does something else than the target."
    assert (check.outcome, check.says, check.command) == ("not applicable", says, "")
    assert section_of(run, left_out, "worst_case").says == [f"The test means nothing here: {ELSE}."]
    assert check_of(run, left_out, "rivals").says == "The recipe polishes."
    assert section_of(run, left_out, "rivals").says == ["Left out: the recipe polishes."]
    for key, command in COMMANDS.items():
        check, section = check_of(run, StricterTests(), key), section_of(run, StricterTests(), key)
        assert (check.outcome, check.command) == ("not tried", command)
        assert section.says[0].startswith(f"Not tried: {command}")


def test_rivals_put_the_choice_in_doubt_and_no_more(run):
    check = check_of(run, StricterTests(rivals=some_rivals(run.mask)), "rivals")
    assert check.asked == "Could other weights do the same?"
    assert (check.outcome, check.says) == (
        "in doubt",
        "Yes: 1 other mask of this size recovers 98.0% of what these do, with 12.5% of the weights in common. These "
        "are enough, but so are others: in doubt is which weights are kept.",
    )
    none = check_of(run, StricterTests(rivals=some_rivals(run.mask, (1.0, 0.7, 0.5))), "rivals")
    assert none.outcome == "passed"
    assert none.says.startswith("No rival: masks with less in common do worse. The best of them, ")
    unclear = check_of(run, StricterTests(rivals=some_rivals(run.mask, (1.0, 0.95, 0.5))), "rivals")
    assert (unclear.outcome, unclear.says.split(":")[0]) == ("in doubt", "Undecided")


@pytest.mark.parametrize(
    ("agreements", "outcome", "says"),
    [
        ((0.95, 0.92), "passed", "Yes: m0 and m1; {} at least 92.0%."),
        ((0.95, 0.5), "in doubt", "In part: m0 does; {} only 50.0% (m1)."),
        ((-0.5,), "in doubt", "No: {} only 0.00% (m0)."),
    ],
)
def test_whether_others_compute_the_same_is_told(run, agreements, outcome, says):
    other = run.mask.random_like(seed=0)
    same = {f"m{at}": compared(run.mask, other, one) for at, one in enumerate(agreements)}
    check = check_of(run, StricterTests(same=same), "same_function")
    told = says.format("of what either takes from the context, the other tells")
    assert (check.outcome, check.says) == (outcome, told)


def test_sections_have_the_numbers(run):
    tests = stricter(run.mask)
    found = {key: section_of(run, tests, key) for key in COMMANDS}
    chart, table = found["worst_case"].blocks[:2]
    assert [one.name for one in chart.figure.data if one.name] == [
        "worst case", "steps at random", "same gates elsewhere",
    ]  # fmt: skip
    assert list(chart.figure.data[1].x) == ["0", "4", "20"]
    assert table.rows[2][:2] == ["20", "0.750 (0.740\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}0.760)"]
    assert table.rows[2][4:] == ["83.3%", "0.500"]
    chart, masks, cores = found["rivals"].blocks[:3]
    assert list(chart.figure.data[0].x) == [1.0, 0.125, 0.25]
    assert list(chart.figure.data[0].y) == [1.0, 0.98, 0.5]
    assert [row[1] for row in masks.rows] == ["this one", "a rival", "does worse"]
    assert [bool(row[2]) for row in cores.rows] == [True, False, False, False]
    verdicts, splices, chart = found["same_function"].blocks[:3]
    assert [row[1:4] for row in verdicts.rows] == [
        ["other weights, same function", "95.0%", "95.0%"], ["other function", "50.0%", "50.0%"],
    ]  # fmt: skip
    assert len(splices.rows) == 4
    assert [one.name for one in chart.figure.data if one.name] == ["&lt;b&gt;seed-1", "rival-1"]


def test_a_chart_that_falls_far_is_cut(run):
    chart = section_of(run, StricterTests(worst_case((0.8, 0.7, -9.0))), "worst_case").blocks[0]
    assert isinstance(chart, Chart)
    assert chart.figure.layout.yaxis.range[0] == -1.05
    assert chart.says.endswith("The chart is cut off below; the table has all.")


def test_the_page_reads_them_from_the_folder_of_the_run(tmp_path):
    run = make_run(tmp_path / "run", metrics=measured())
    save_stricter(run.path, stricter(run.mask))
    outcomes = {one.key: one.outcome for one in opening(run).checks}
    assert [outcomes[key] for key in COMMANDS] == ["in doubt", "in doubt", "in doubt"]
    told = {one.key: one for one in sections(run)}
    assert all(told[key].blocks and told[key].group == "How faithful it is" for key in COMMANDS)


def test_a_comparison_says_what_is_known_of_each_and_of_pairs(tmp_path):
    a, b = (make_run(tmp_path / name, metrics=measured()) for name in "ab")
    other = make_run(tmp_path / "c", metrics=measured(), subnetwork=a.mask.random_like(seed=0))
    commands = "; ".join(
        f"{what} ({COMMANDS[key]})"
        for what, key in {
            "the worst case of a and c": "worst_case", "rivals of a and c": "rivals",
            "whether two of them compute the same": "same_function",
        }.items()
    )  # fmt: skip
    content = compared_section(compare([a, other]))
    assert (content.says, content.blocks) == ([f"Not tried: {commands}."], [])
    save_stricter(a.path, StricterTests(worst_case(), some_rivals(a.mask), {"x": compared(a.mask, other.mask, 0.7)}))
    save_stricter(b.path, StricterTests(worst_case((0.8, 0.7, -2.0), forced=True)))
    save_stricter(other.path, StricterTests(left_out={"worst_case": ELSE, "rivals": "the recipe polishes"}))
    content = compared_section(compare([a, b, other]))
    assert content.says[0] == f"Not tried: rivals of b ({COMMANDS['rivals']})."
    each, pairs = content.blocks
    assert [row[:3] for row in each.rows] == [
        ["a", "83.3% after 20 steps", "1, sharing 12.5%"],
        ["b", "0.00% after 20 steps, but it does something else than the full model", "not tried"],
        ["c", "means nothing: does something else than the full model", "left out"],
    ]
    assert [row[:4] for row in pairs.rows] == [["a", "c", "other function", "70.0%"]]


def test_only_pairs_of_the_very_masks_are_shown(tmp_path):
    """A comparison with another mask of the same name is not one of these two."""
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", subnetwork=a.mask.random_like(seed=0))
    save_stricter(a.path, StricterTests(same={"b": compared(a.mask, ~a.mask)}))
    assert not compared_section(compare([a, b])).blocks
