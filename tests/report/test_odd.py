"""Pages about results that are valid but odd: a page never shows a traceback, and says what it leaves out."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from bigram_circuits.experiments.comparison import compare
from bigram_circuits.experiments.stricter import StricterTests
from bigram_circuits.measures.results import Curves, Effects, Maps, Scatter, load_result
from bigram_circuits.report import comparison as comparison_page
from bigram_circuits.report.blocks import Chart
from bigram_circuits.report.page import SECTIONS, page
from bigram_circuits.report.refuting import checks
from bigram_circuits.report.results import Results
from bigram_circuits.report.sections import LEFT_OUT
from bigram_circuits.runs import StepRecord
from bigram_circuits.subnetwork import Subnetwork
from tests.example_runs import (
    HOSTILE,
    Elements,
    make_run,
    measured,
    results,
    save_result,
    save_stricter,
    stricter,
    without_libraries,
)

LONG = "very long " * 2000


def numbers_as(result, value):
    fields = [name for name in ("values", "low", "high") if hasattr(result, name)]
    return replace(result, **{name: np.full_like(getattr(result, name), value) for name in fields})


def axes_of(result):
    return {
        Curves: ("points", "conditions"),
        Maps: ("rows", "columns", "conditions"),
        Effects: ("names",),
        Scatter: ("names",),
    }[type(result)]


def cut(result, axis, count):
    """The result with `count` of the entries along an axis."""
    place = type(result).axes.index(axis)
    fields = [name for name in ("values", "low", "high") if hasattr(result, name)]
    changed = {name: np.take(getattr(result, name), range(count), axis=place) for name in fields}
    changed[axis] = getattr(result, axis)[:count]
    text = getattr(result, "text", None)
    if text is not None and axis == "conditions":
        changed["text"] = text[:count]
    elif text is not None and axis == "rows":
        changed["text"] = tuple(of[:count] for of in text)
    elif text is not None:
        changed["text"] = tuple(tuple(row[:count] for row in of) for of in text)
    return replace(result, **changed)


def shortest(count):
    def change(result):
        for axis in axes_of(result):
            if len(getattr(result, axis)) > count:
                result = cut(result, axis, count)
        return result

    return change


def renamed(word):
    """Every name along an axis is this word and a number; every cell of text is the word."""

    def change(result):
        names = {axis: tuple(f"{word}{n}" for n in range(len(getattr(result, axis)))) for axis in axes_of(result)}
        if getattr(result, "text", None) is not None:
            names["text"] = tuple(tuple(tuple(word for _ in row) for row in of) for of in result.text)
        quantities = tuple(replace(one, unit=word, meaning=word) for one in result.quantities)
        return replace(result, title=word or "untitled", quantities=quantities, **names)

    return change


def of_one_name(result):
    return replace(result, **{axis: ("same",) * len(getattr(result, axis)) for axis in axes_of(result)})


ODD = {
    "all undefined": lambda one: numbers_as(one, math.nan),
    "all zero": lambda one: numbers_as(one, 0.0),
    "all infinite": lambda one: numbers_as(one, math.inf),
    "all minus infinity": lambda one: numbers_as(one, -math.inf),
    "huge": lambda one: numbers_as(one, 1e308),
    "nothing along any axis": shortest(0),
    "one of everything": shortest(1),
    "control characters": renamed("\x1b[31m\x00\u202e\n\n"),
    "very long names": renamed(LONG),
    "empty names": renamed(""),
    "the same name": of_one_name,
    "markup": renamed('<a href="javascript:alert(1)">x</a>&lt;b&gt;%{x}'),
    "odd notes": lambda one: replace(one, notes=dict.fromkeys(one.notes, "many")),
    "another kind": lambda one: next(other for other in results().values() if type(other) is not type(one)),
}


def strict(told, which):
    """What a page's script reads, by the rules of JSON, which has no NaN and no infinity."""
    text = re.search(rf'<script type="application/json" id="{which}">(.*?)</script>', told, re.DOTALL).group(1)
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the {which}"))


@pytest.mark.parametrize("turn", range(4))
def test_odd_results_leave_out_their_sections_and_no_more(tmp_path, turn):
    """Every kind of oddness falls on several results, and in each turn on others."""
    run = make_run(tmp_path / "run", metrics=measured())
    refused = []
    for place, (name, result) in enumerate(results().items()):
        how = list(ODD)[(place + 4 * turn) % len(ODD)]
        path = save_result(run.path, name, ODD[how](result))
        try:
            load_result(path)
        except ValueError as error:  # a refusal on load, in one line that names the file
            refused.append(str(error))
            path.unlink()
    assert len(refused) < 8
    assert all("/run/analysis/" in line and "\n" not in line for line in refused)
    texts = [page(run), *([comparison_page.page(compare([run, run]))] if turn == 0 else [])]
    for text in texts:
        strict(text, "figures")
        strict(text, "views")
        assert "Traceback" not in text
    told = Elements(without_libraries(texts[0])).text
    assert all(one.heading in told for one in SECTIONS if one.key != "other")


def test_odd_stricter_tests_leave_out_their_sections_and_no_more(tmp_path):
    run = make_run(tmp_path / "run", metrics=measured())
    kinds = [one for one in SECTIONS if one.key in ("worst_case", "rivals", "same_function")]
    made, parts = stricter(run.mask), ("overlap", "behaviour", "splices", "streams")
    for change in list(ODD.values())[:-1]:
        same = {
            name: replace(one, **{part: change(getattr(one, part)) for part in parts})
            for name, one in made.same.items()
        }
        rivals = replace(made.rivals, measured=change(made.rivals.measured), cores=change(made.rivals.cores))
        found = Results({}, stricter=StricterTests(change(made.worst_case), rivals, same))
        for section in [kind(run, found) for kind in kinds]:
            assert section.says
            for block in section.blocks:
                assert not isinstance(block, Chart) or json.dumps(block.drawn(), allow_nan=False)
        assert len(checks(run, found)) == 11


def test_no_section_is_left_out_of_an_ordinary_page(tmp_path):
    runs = [make_run(tmp_path / name, metrics=measured(), found=results()) for name in "ab"]
    for run in runs:
        save_stricter(run.path, stricter(run.mask))
    assert LEFT_OUT not in page(runs[0])
    assert LEFT_OUT not in comparison_page.page(compare(runs))


def test_a_section_that_fails_says_why_and_the_others_stand(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", metrics=measured(), found=results())

    def fails(*subject):
        raise IndexError(f"index 7 is out of {HOSTILE}\nbounds")

    kind = next(one for one in SECTIONS if one.key == "layers")
    monkeypatch.setitem(SECTIONS._by_key, "layers", replace(kind, tell=fails))
    text = " ".join(Elements(without_libraries(page(run))).text)
    assert f"{LEFT_OUT} (IndexError: index 7 is out of {HOSTILE} bounds)." in text
    assert "Where the kept weights are" in text


def masks(kept, layers=1, parts=("attn.W_Q", "mlp.W_in")):
    shapes = {"attn.W_Q": (3, 2, 2), "mlp.W_in": (2, 6)}
    return {f"blocks.{layer}.{part}": torch.full(shapes[part], kept) for layer in range(layers) for part in parts}


@pytest.mark.parametrize(
    ("kept", "parts"), [(False, ("attn.W_Q", "mlp.W_in")), (True, ("attn.W_Q",)), (False, ("mlp.W_in",))]
)
def test_subnetworks_of_nothing_and_of_everything_get_pages(tmp_path, kept, parts):
    subnetwork = Subnetwork(masks(kept, parts=parts), model_name=LONG, lineage="\x1b[2J")
    runs = [
        make_run(
            tmp_path / name,
            metrics=measured(),
            subnetwork=subnetwork,
            found={"by_head": results()["by_head"]} if name == "a" else None,
        )
        for name in "ab"
    ]
    for told in (page(runs[0]), page(runs[1]), comparison_page.page(compare(runs))):
        assert LEFT_OUT not in told
        strict(told, "figures")
    assert "\x1b" not in str(compare({"\x1b[2J": runs[0], "b": runs[1]}))


def test_a_history_of_undefined_numbers_is_drawn(tmp_path):
    steps = [StepRecord(0, step, math.nan, math.nan, math.nan) for step in range(3)]
    told = page(make_run(tmp_path / "run", steps=steps))
    assert LEFT_OUT not in told
    strict(told, "figures")


def test_a_folder_whose_name_is_not_text_gets_a_page(tmp_path):
    folder = tmp_path / b"run-\xff".decode("utf-8", "surrogateescape")
    told = page(make_run(folder))
    assert "run-" in told
    told.encode()
