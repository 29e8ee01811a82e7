"""The still picture of a circuit at the top of a run's page."""

import itertools
import math
import re
from collections import Counter
from dataclasses import replace

import pytest

from bigram_circuits.explanations.explanation import Atlas
from bigram_circuits.explanations.words import clearest
from bigram_circuits.report.page import opening, page
from bigram_circuits.report.sketch import sketch_of
from tests.example_runs import Elements, make_run, without_libraries
from tests.explanations.examples import atlas, example, prompt_example


@pytest.mark.parametrize("made", [example(), prompt_example()], ids=["bigram", "prompt"])
def test_the_strongest_nodes_are_drawn_and_no_box_lies_on_another(made):
    sketch = sketch_of(made, made.units)
    boxes = [(node.x, node.y, node.x + node.width, node.y + node.height) for node in sketch.nodes]
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert all(left >= 0 and right <= sketch.width and bottom <= sketch.height for left, _, right, bottom in boxes)
    columns = Counter(node.x for node in sketch.nodes)
    assert max(columns.values()) <= 4
    assert len(columns) == len(sketch.columns)
    assert [name for _, name in sketch.columns][:: len(columns) - 1] == ["in", "out"]
    labels = {node.label for node in sketch.nodes}
    assert "biases" not in labels
    strongest = max((one for one in made.nodes if one.kind in ("neuron", "head")), key=lambda node: abs(node.flow))
    assert strongest.label in labels


def test_edges_are_as_wide_as_their_flow_and_coloured_by_its_sign():
    made = example()
    sketch = sketch_of(made, made.units)
    shown = {node.label for node in sketch.nodes} | {"answer"}
    keys = {node.key for node in made.nodes if node.label in shown or node.kind == "answer"}
    flows = sorted(
        (edge.flow for edge in made.edges if {edge.source, edge.target} <= keys), key=lambda flow: -abs(flow)
    )
    drawn = [flow for flow in flows if abs(flow) >= 0.03 * abs(flows[0])]
    assert [edge.raises for edge in sketch.edges] == [flow > 0 for flow in drawn]
    assert [edge.width for edge in sketch.edges] == [max(0.8, round(12 * abs(f / drawn[0]), 1)) for f in drawn]


def test_the_token_that_is_shown_is_one_of_letters_with_a_likely_answer():
    def after(token, following, probability):
        return replace(example(), prompt=(token,), predictions=((following, probability),))

    many = [after(",", " the", 0.9), after(" the", " the", 0.9), after(" of", " the", 0.1), after(" in", " the", 0.3)]
    assert clearest(Atlas("All", tuple(many), (4, 3, 2, 1))) is many[3]
    assert clearest(Atlas("None", tuple(many[:3]), (4, 3, 2))) is many[0]


def test_odd_explanations_are_drawn():
    made = example()
    odd = replace(made, nodes=tuple(replace(node, flow=math.nan) for node in made.nodes), predictions=())
    assert len(sketch_of(odd, {}).nodes) > 2
    answer = tuple(node for node in made.nodes if node.kind == "answer")
    assert [node.label for node in sketch_of(replace(made, nodes=answer, edges=(), paths=()), {}).nodes] == ["' the'"]


def test_a_run_with_an_atlas_has_it_at_the_top(tmp_path):
    made = atlas(listed=10, most_edges=20)
    run = make_run(tmp_path / "run", atlas=made)
    told = page(run)
    header = told[: told.index("</header>")]
    assert header.count("<svg") == 1
    assert 'href="#circuit"' in header
    says = opening(run).picture.says
    assert says.startswith(f"After {clearest(made).prompt[-1]!r}")
    assert re.search(r"L\dN\d+ is neuron \d+ of layer \d\.$", says)
    assert next(one["id"] for one in Elements(without_libraries(told)).named("section")) == "circuit"
