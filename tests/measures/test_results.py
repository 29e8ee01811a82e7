"""Results keep their numbers through tables, pictures and JSON."""

import json

import numpy as np
import pytest

from bigram_circuits.measures.plots import STYLE
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Effects, Maps, curves_from_sums, load_result
from bigram_circuits.report.figures import dressed

QUANTITIES = (Quantity("kl", "nats", "a divergence"), Quantity("r", "", "a correlation"))
NOTHING = np.full((2, 2, 3), np.nan)


@pytest.fixture
def curves():
    values = np.arange(12.0).reshape(2, 2, 3)
    low, high = values.copy() - 1, values.copy() + 1
    low[1] = high[1] = values[1, 1, 2] = np.nan
    return Curves("A lens", QUANTITIES, "layer", ("embed", "0", "1"), ("full", "subnetwork"), values, low, high)


@pytest.fixture
def maps():
    values = np.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
    text = ((("a", "<b>"), ("c", "d")), (("e", "f"), ("g", "h")))
    return Maps("A map", QUANTITIES[:1], "layer", ("0", "1"), "position", ("x", "y"), ("full", "random"), values, text)


@pytest.fixture
def effects():
    values = np.array([[0.1, 0.9, np.nan], [1.0, 2.0, 3.0]])
    low, high = values - 0.1, values + 0.1
    return Effects("An ablation", QUANTITIES, "head", ("0.0", "0.1", "1.0"), values, low, high, notes={"seeds": 3})


@pytest.mark.parametrize("kind", ["curves", "maps", "effects"])
def test_json_gives_back_the_same(kind, request, tmp_path):
    result = request.getfixturevalue(kind)
    result.save(tmp_path / "result.json")
    assert "NaN" not in (tmp_path / "result.json").read_text()
    again = load_result(tmp_path / "result.json")
    assert type(again) is type(result)
    assert again.to_json() == result.to_json()
    np.testing.assert_array_equal(again.values, result.values)
    assert again.quantities == result.quantities
    assert again.to_dataframe().equals(result.to_dataframe())


@pytest.mark.parametrize("kind", ["curves", "maps", "effects"])
def test_pictures_show_the_numbers(kind, request):
    result = request.getfixturevalue(kind)
    figure = result.plot()
    assert figure.layout.title.text == f"{result.title}: KL"
    drawn = [np.asarray(trace.z if kind == "maps" else trace.y, dtype=float) for trace in figure.data]
    for wanted in result.values[0] if kind != "effects" else result.values[:1]:
        assert any(one.shape == wanted.shape and np.array_equal(one, wanted, equal_nan=True) for one in drawn)
    with pytest.raises(ValueError, match="there is no quantity 'x': there are kl"):
        result.plot("x")


def test_a_quantity_without_intervals_has_no_band(curves):
    assert len(curves.plot("kl").data) == 4
    assert len(curves.plot("r").data) == 2
    assert list(curves.to_dataframe().columns) == ["condition", "layer", "kl", "kl_low", "kl_high", "r"]


def test_lines_are_found_by_name(curves):
    np.testing.assert_array_equal(curves.get("kl", "subnetwork"), [3, 4, 5])
    np.testing.assert_array_equal(curves.interval("kl", "subnetwork"), [[2, 3, 4], [4, 5, 6]])
    with pytest.raises(ValueError, match="there is no condition 'empty': there are full, subnetwork"):
        curves.get("kl", "empty")


def test_the_largest_effects_come_first(effects):
    assert effects.top(5) == [("0.1", 0.9), ("0.0", 0.1)]
    assert effects.top(1, "r") == [("1.0", 3.0)]
    assert "0.900" in str(effects)


def test_a_matrix_of_layers_by_layers_has_two_columns_of_layers(maps):
    square = Maps("CKA", QUANTITIES[:1], "layer", ("0", "1"), "layer", ("0", "1"), ("full", "random"), maps.values)
    assert list(square.to_dataframe().columns) == ["condition", "layer_1", "layer_2", "kl"]
    assert list(maps.to_dataframe().columns) == ["condition", "layer", "position", "kl", "text"]


def test_intervals_come_from_resampled_sequences():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(3, 1, (400, 2)), np.ones((400, 2))], -1)
    found = curves_from_sums(
        "x",
        QUANTITIES[:1],
        "layer",
        ("0", "1"),
        {"full": rows},
        lambda sums: (sums[..., :1] / sums[..., 1:]).swapaxes(-1, -2),
        {},
    )
    np.testing.assert_allclose(found.get("kl"), rows[..., 0].mean(0))
    width = found.interval("kl")[1] - found.interval("kl")[0]
    np.testing.assert_allclose(width, 2 * 1.96 / 20, rtol=0.15)


def test_what_is_no_result_is_told_in_one_line(tmp_path, curves):
    for text in ("{", "[]", '{"format": "other"}', json.dumps(curves.to_json() | {"kind": "Pie"})):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="not a result that can be read"):
            load_result(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        load_result(tmp_path / "nothing.json")


def test_some_conditions_can_be_chosen(curves, maps):
    assert curves.only("subnetwork", "full").conditions == ("subnetwork", "full")
    for result, one in ((curves, "subnetwork"), (maps, "random")):
        chosen = result.only(one)
        np.testing.assert_array_equal(chosen.get("kl", one), result.get("kl", one))
        assert chosen.to_dataframe().condition.unique().tolist() == [one]
        with pytest.raises(ValueError, match="there is no condition 'x'"):
            result.only("x")
    np.testing.assert_array_equal(
        curves.only("subnetwork").interval("kl", "subnetwork"), curves.interval("kl", "subnetwork")
    )
    assert maps.only("random").text == maps.text[1:]


def of_prompt(n, panels=1):
    words = tuple((tuple(f"<b>word{n}\nsecond" for n in range(n)),) * 2 for _ in range(panels))
    columns = tuple(f"{n}: a_token_that_is_long" for n in range(n))
    names, values = ("full", "subnetwork", "complement", "random")[:panels], np.full((1, panels, 2, n), 0.25)
    quantity = Quantity("probability", "share", "of a token")
    return Maps("A lens", (quantity,), "layer", ("0", "1"), "position", columns, names, values, words)


def test_figures_carry_their_own_style_and_nothing_of_plotly_s(curves, maps, effects):
    for figure in (curves.plot("kl"), maps.plot(), effects.plot("kl")):
        for shown in (figure, dressed(figure)):
            assert json.loads(shown.to_json())["layout"]["template"] == STYLE


def test_on_hover_numbers_have_names_units_and_few_digits(curves, maps, effects):
    says = [trace.hovertemplate for trace in curves.plot("kl").data if trace.name]
    assert says == [
        f"layer %{{x}}<br>KL %{{y:,.0f}} nats%{{customdata}}<extra>{name}</extra>"
        for name in ("full model", "subnetwork")
    ]
    assert list(curves.plot("kl").data[1].customdata) == [f" ({n - 1:.3f}\xa0to\xa0{n + 1:.3f})" for n in range(3)]
    assert maps.plot().data[0].hovertemplate == (
        "layer %{y}, position %{x}<br>%{customdata}<br>KL %{z:.3f} nats<extra>full model</extra>"
    )
    assert effects.plot("kl").data[0].hovertemplate == "%{x}<br>KL %{y:.3f} nats%{customdata}<extra></extra>"
    assert "probability %{z:.3~p}<extra>" in of_prompt(3).plot().data[0].hovertemplate


@pytest.mark.parametrize(("n", "panels", "letters"), [(4, 1, 9), (20, 1, 6), (20, 4, 6), (60, 1, 5), (5, 4, 6)])
def test_words_in_cells_fit_and_are_whole_on_hover(n, panels, letters):
    figure = of_prompt(n, panels).plot()
    shown, told = figure.data[0].text[0][-1], figure.data[0].customdata[0][-1]
    word = f"<b>word{n - 1}"
    expected = word if len(word) <= letters else word[: letters - 1] + "…"
    assert shown == expected.replace("<", "&lt;").replace(">", "&gt;")
    assert told == f"&lt;b&gt;word{n - 1}<br>second"
    assert (figure.layout.width is not None) == (n == 60)
    assert all(len(name) <= 14 for name in figure.layout.xaxis.ticktext)
    assert figure.layout.xaxis.tickangle == (None if n == 4 else -45)


def test_of_very_many_columns_some_have_labels():
    values = np.zeros((1, 1, 2, 500))
    columns = tuple(map(str, range(500)))
    figure = Maps("Neurons", QUANTITIES[:1], "layer", ("0", "1"), "neuron", columns, ("full",), values).plot()
    assert list(figure.layout.xaxis.ticktext[:3]) == ["0", "9", "18"]
    assert figure.layout.width is None


def test_what_is_counted_is_whole_in_tables():
    quantities = Quantity("kept", "weights", "counted"), Quantity("expected", "weights", "computed"), QUANTITIES[0]
    values = np.array([[3.0, 4.0], [2.5, 4.0], [1.0, 2.0]])
    table = Effects("Shared", quantities, "part", ("a", "b"), values, values * np.nan, values * np.nan).to_dataframe()
    assert table["kept"].tolist() == [3, 4]
    assert [str(table[name].dtype) for name in ("kept", "expected", "kl")] == ["int64", "float64", "float64"]
