"""What a notebook shows of a value: its numbers as a small table, any name as text, no script and no colour."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import bigram_circuits as bc
from bigram_circuits.analysis import Analyses
from bigram_circuits.evaluation import Evaluation
from bigram_circuits.learning.found import FoundSubnetwork
from bigram_circuits.measures.conditions import label_of
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Effects, Maps
from bigram_circuits.measures.statistics import Faithfulness
from bigram_circuits.recipe import SparsifyConfig
from bigram_circuits.runs import CorpusIdentity, ModelIdentity, Outcome, Run, RunSettings, StepRecord, TargetIdentity
from bigram_circuits.subnetwork import Subnetwork

PACKAGE = Path(bc.__file__).parent
HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "br", "img"}


class Reader(HTMLParser):
    """Checks that elements are closed in order; keeps the tags, the attributes' names, the words and the rows."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.rows = [], set(), set(), [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def subnetwork(layers=2, name=HOSTILE):
    masks = {}
    for layer in range(layers):
        masks[f"blocks.{layer}.attn.W_Q"] = torch.zeros(2, 2, 6, dtype=torch.bool)
        masks[f"blocks.{layer}.mlp.W_in"] = torch.arange(10).view(2, 5) < 3
    return Subnetwork(masks, model_name=name, lineage=HOSTILE)


def quantities(*names):
    return tuple(Quantity(name, "nats", f"what {HOSTILE} is.") for name in names)


def curves(points=3):
    values = np.arange(2.0 * 2 * points).reshape(2, 2, points)
    names = tuple(range(points))
    return Curves(HOSTILE, quantities("kl", "r"), "layer", names, ("full", HOSTILE), values, values, values)


def maps(rows=2, columns=2, text=True):
    values = np.arange(2.0 * rows * columns).reshape(1, 2, rows, columns)
    words = tuple(tuple((f"{HOSTILE}\nmore",) * columns for _ in range(rows)) for _ in range(2)) if text else None
    names = tuple(map(str, range(rows))), tuple(map(str, range(columns)))
    return Maps(HOSTILE, quantities("p"), "layer", names[0], "position", names[1], ("full", "random"), values, words)


def effects(things=3):
    values = np.arange(2.0 * things).reshape(2, things)
    names = tuple(f"{HOSTILE} {n}" for n in range(things))
    low = np.stack([values[0] - 1, np.full(things, np.nan)])
    return Effects(HOSTILE, quantities("rise", "loss"), "head", names, values, low, low + 2)


def faithfulness(r=0.5):
    return Faithfulness(
        surprisal_correlation=r, cross_entropy=4.0, kl=0.25, mean_surprisal=5.0, top1_agreement=0.5, kept=6, total=68,
        fraction=6 / 68,
    )  # fmt: skip


def evaluation(controls=True):
    one, several = (faithfulness(), (faithfulness(0.25), faithfulness(0.5))) if controls else (None, ())
    pair = {"surprisal_correlation": (0.4, 0.6)}
    return Evaluation(
        faithfulness(), one, one, one, several, several, one, {"subnetwork": pair}, {"full": (0.1, 0.2)}, 100, 90
    )


def found():
    history = [StepRecord(0, 0, cross_entropy=4.25, fraction=0.5, undecided=1.0)]
    return FoundSubnetwork(subnetwork(), history, SparsifyConfig(), "decided", 12.3)


def run(evaluated=True):
    return Run(
        path=Path("runs") / "<b>first",
        settings=RunSettings(ModelIdentity(HOSTILE), CorpusIdentity(HOSTILE), TargetIdentity(), SparsifyConfig()),
        rebuild=None,
        versions={},
        mask=subnetwork(),
        outcome=Outcome("decided", 12.3),
        evaluation=evaluation() if evaluated else None,
        history=found().history * 7,
    )


def analyses():
    return Analyses({"a_lens": curves(), HOSTILE: effects()}, {"induction": f"it has no {HOSTILE}"})


ALL = {
    "subnetwork": subnetwork,
    "evaluation": evaluation,
    "without controls": lambda: evaluation(controls=False),
    "found": found,
    "run": run,
    "run, not evaluated": lambda: run(evaluated=False),
    "curves": curves,
    "maps": maps,
    "effects": effects,
    "analyses": analyses,
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_what_is_shown_is_small_self_contained_and_names_are_text(make):
    value = make()
    html = value._repr_html_()
    reader = Reader(html)
    assert reader.tags <= {"div", "p", "strong", "small", "table", "thead", "tbody", "tr", "th", "td", "data"}
    assert reader.attributes <= {"aria-label", "scope", "class", "value"}  # no style, no handler, nothing to load
    assert "<script" not in html
    assert len(html) < 20_000
    if "evaluat" not in type(value).__name__.lower():
        assert HOSTILE in "".join(reader.words)
    assert "<div" not in repr(value)
    assert "<div" not in str(value)


def test_a_subnetwork_shows_what_is_kept_where():
    reader = Reader(subnetwork()._repr_html_())
    assert "6 of 68 weights kept (8.82%)" in "".join(reader.words)
    assert reader.rows == [["layer", "attn", "mlp"], *([str(n), "0 (0.00%)", "3 (30.00%)"] for n in range(2))]


def test_a_deep_model_is_shown_in_a_few_rows():
    rows = Reader(subnetwork(layers=48)._repr_html_()).rows
    assert len(rows) == 17
    assert [row[0] for row in rows[-3:]] == ["13", "… 33 more", "47"]


def test_an_evaluation_shows_the_table_that_is_printed_and_the_verdict():
    one = evaluation()
    reader = Reader(one._repr_html_())
    assert one.verdict in reader.words
    printed = [line for line in str(one).splitlines() if re.match(r"\S+( - \S+)? +[0-9u]", line)]
    assert len(printed) == len(reader.rows) - 1 == 7
    for row, line in zip(reader.rows[1:], printed, strict=True):
        assert line.startswith(row[0])
        assert row[2] in line
        assert row[-1] in line
    assert "sd 0.177, 2 seeds" in str(one)


def test_a_run_shows_how_it_ended_and_its_answer():
    words = " ".join(Reader(run()._repr_html_()).words)
    assert "Stopped after 7 steps: nearly all gates were decided." in words
    assert "surprisals: 0.500. Verdict:" in words
    assert "It was not evaluated." in " ".join(Reader(run(evaluated=False)._repr_html_()).words)


def test_what_was_found_shows_how_learning_ended():
    words = " ".join(Reader(found()._repr_html_()).words)
    assert "Stopped after 1 steps: nearly all gates were decided." in words


def test_curves_show_their_first_quantity_and_name_the_others():
    reader = Reader(curves()._repr_html_())
    assert reader.rows == [["layer", "0", "1", "2"], ["full", "0", "1", "2"], [HOSTILE, "3", "4", "5"]]
    assert "Also measured: r." in "".join(reader.words)


def test_of_many_points_some_are_shown_spread_evenly():
    head = Reader(curves(points=1000)._repr_html_()).rows[0]
    assert len(head) == 13
    assert (head[1], head[-1]) == ("0", "999")


def test_maps_show_words_or_numbers():
    assert Reader(maps()._repr_html_()).rows[1] == ["full", "0", HOSTILE, HOSTILE]
    assert Reader(maps(text=False)._repr_html_()).rows[-1] == ["random", "1", "6", "7"]
    assert len(Reader(maps(rows=100, columns=100)._repr_html_()).rows) == 13


def test_effects_show_the_interval_of_the_first_quantity():
    rows = Reader(effects(things=12)._repr_html_()).rows
    assert rows[0] == ["head", "rise", "loss", "95% interval of rise"]
    assert rows[2][1:] == ["1", "13", "0.000 to 2.000"]
    assert len(rows) == 13


def test_of_many_effects_the_largest_come_first():
    reader = Reader(effects(things=100)._repr_html_())
    assert [row[1] for row in reader.rows[1:4]] == ["99", "98", "97"]
    assert [row[1] for row in reader.rows[-2:]] == ["", "0"]
    assert "Sorted by the size of rise." in "".join(reader.words)
    assert "Sorted" not in effects(things=12)._repr_html_()


def test_an_evaluation_draws_every_row_with_its_interval():
    figure = evaluation().plot()
    assert list(figure.data[0].x) == [label_of(name) for name, _ in evaluation().rows()]
    assert figure.data[0].y[0] == 0.5
    assert figure.data[0].error_y.array[0] == pytest.approx(0.1)
    assert list(evaluation().plot("kl").data[0].y) == [0.25] * 7


def test_what_was_found_draws_how_it_was_learned():
    (first,) = found().history
    history = [first, dataclasses.replace(first, step=1)]
    learned = FoundSubnetwork(subnetwork(), history, SparsifyConfig(), "decided", 1.0)
    assert list(learned.plot().data[0].y) == [0.5, 0.5]
    assert list(learned.plot("cross_entropy").data[0].x) == [0, 1]


def test_analyses_show_names_and_what_was_left_out():
    reader = Reader(analyses()._repr_html_())
    assert reader.rows[1] == ["a_lens", HOSTILE, "kl, r"]
    assert f"Left out: induction: it has no {HOSTILE}" in reader.words


def test_every_progress_bar_is_made_in_one_place():
    using = [path.stem for path in PACKAGE.rglob("*.py") if re.search(r"\btqdm\b", path.read_text())]
    assert using == ["progress"]
