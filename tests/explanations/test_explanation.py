"""Explanations as values: to JSON and back, as frames, figures and text; the examples are what they say."""

import json
from dataclasses import replace

import numpy as np
import pytest

from bigram_circuits.explanations.explanation import Explanation, load_atlas
from bigram_circuits.explanations.words import number, share_words
from tests.explanations.examples import atlas, example, prompt_example


@pytest.fixture(scope="module")
def made():
    return example(neurons=(9, 6, 4, 3), most_edges=40)


def test_the_examples_are_decompositions(made):
    for one in (made, prompt_example()):
        assert sum(one.terms.values()) == pytest.approx(one.value)
        for node in one.nodes:
            entering = [edge.flow for edge in one.edges if edge.target == node.key]
            if node.kind not in ("token", "position", "bias"):
                assert sum(entering) + node.unseen == pytest.approx(node.flow)
        assert sum(path.value for path in one.paths) + one.left_out == pytest.approx(one.value)


def test_json_and_back(made):
    assert Explanation.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_paths_as_a_frame(made):
    frame = made.to_dataframe()
    assert list(frame.columns) == ["path", "value", "share"]
    assert list(frame.value) == [path.value for path in made.paths]
    assert list(frame.path) == [" -> ".join(path.labels) for path in made.paths]
    assert frame.path[0].startswith("' of' -> L")
    assert frame.share.sum() == pytest.approx(1 - made.left_out_share)
    assert (frame.share / frame.value.abs()).std() == pytest.approx(0)
    assert len(replace(made, paths=(), left_out_share=1.0).to_dataframe()) == 0


def test_terms_as_a_frame(made):
    frame = made.terms_frame()
    assert dict(zip(frame.part, frame.value, strict=True)) == made.terms
    assert (frame.value.abs().diff()[1:] <= 0).all()


def test_the_figure_has_a_bar_for_every_path_with_its_sign(made):
    figure = made.plot()
    (bars,) = figure.data
    np.testing.assert_allclose(bars.x, [path.value for path in made.paths[: len(bars.x)]])
    assert figure.layout.xaxis.title.text == "added to the logit of ' the'"
    assert figure.layout.yaxis.ticktext[0] == " → ".join(made.paths[0].labels)
    colours = {value < 0: colour for value, colour in zip(bars.x, bars.marker.color, strict=True)}
    assert len(colours) == len(set(colours.values())) == 2


def test_in_words(made):
    first = "After ' of', GPT-2 small with only 924,639 of 84,934,656 weights (1.09%) predicts ' the' (31%)."
    listed = sum(path.value for path in made.paths)
    second = f"The logit of ' the' is 9.60: 20 paths add up to {number(listed)} of it"
    assert str(made).startswith(f"{first}\n{second}")
    assert made._repr_html_().count("<tr>") == 1 + 12
    assert str(replace(made, mask="full model")).startswith("After ' of', GPT-2 small predicts ' the' (31%).")
    assert "no path is listed" in str(replace(made, paths=()))
    assert (number(0.001), number(-12.34), number(float("nan"))) == ("1.0e-03", "-12.3", "undefined")
    assert (share_words(0.314), share_words(0.012), share_words(None)) == ("31%", "1.2%", "undefined")


def test_an_atlas_as_a_frame():
    small = atlas(neurons=(5, 4, 3, 2), listed=12, most_edges=20)
    frame = small.to_dataframe()
    assert list(frame.token) == [" of", " in", " to", " United", " New"]
    assert list(frame["count"]) == [1000, 999, 998, 997, 996]
    assert list(frame.prediction[:2]) == [" the", " a"]
    kinds = [[node.kind for node in one.nodes] for one in small.explanations]
    assert list(frame.neurons) == [one.count("neuron") for one in kinds]
    assert frame.strongest_path[0] == " -> ".join(small.explanations[0].paths[0].labels)
    assert frame.adds[1] == small.explanations[1].paths[0].value
    assert small._repr_html_().count("<tr>") == 1 + 5


def test_an_atlas_is_saved_and_loaded(tmp_path):
    small = atlas((" of", " in"), neurons=(5, 4, 3, 2), listed=12, most_edges=20)
    path = tmp_path / "atlas.json"
    small.save(path)
    assert load_atlas(path) == small
    path.write_text(path.read_text().replace("GPT-2", "GPT-3"))
    with pytest.raises(ValueError, match=r"atlas.json' is not an atlas that can be read: "):
        load_atlas(path)
    replace(small, counts=(1,)).save(path)
    with pytest.raises(ValueError, match="it has 2 explanations but 1 counts"):
        load_atlas(path)
    with pytest.raises(FileNotFoundError):
        load_atlas(tmp_path / "none.json")
