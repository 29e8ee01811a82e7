"""Frozen dataclasses as JSON: they come back as they were, and anything else is refused in one line."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigram_circuits.storage.typed import Record, from_json, to_json


@dataclass(frozen=True)
class Inner(Record):
    number: float
    count: int = 3


@dataclass(frozen=True)
class Outer(Record):
    name: str
    inner: Inner
    many: tuple[Inner, ...] = ()
    pair: tuple[int, str] | None = None
    by_name: Mapping[str, float] = field(default_factory=dict)
    either: float | int | None = None
    flag: bool = False


INNER = st.builds(Inner, st.floats(allow_infinity=False), st.integers(-(2**62), 2**62))
OUTER = st.builds(
    Outer, st.text(), INNER, st.lists(INNER, max_size=3).map(tuple),
    st.none() | st.tuples(st.integers(0, 9), st.text()),
    st.dictionaries(st.text(), st.floats(allow_infinity=False), max_size=3),
    st.none() | st.integers(0, 9) | st.floats(0, 9), st.booleans(),
)  # fmt: skip


@given(OUTER)
def test_what_was_written_comes_back(outer):
    back = Outer.from_json(json.loads(json.dumps(outer.to_json())))
    assert repr(back) == repr(outer)  # nan is not equal to itself


def test_what_is_undefined_is_null():
    assert Inner(math.nan).to_json() == {"number": None, "count": 3}
    assert math.isnan(Inner.from_json({"number": None}).number)
    assert to_json([math.nan, (1, 2)]) == [None, [1, 2]]


def test_fields_are_read_by_name_too():
    assert Inner(1.5)["number"] == 1.5
    with pytest.raises(KeyError):
        Inner(1.5)["from_json"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "it should be values by name, not 3"),
        ({"name": "a"}, "it lacks the field 'inner'"),
        ({"name": "a", "inner": {"number": 1}, "more": 1}, "it has the unknown field 'more'"),
        ({"name": 3, "inner": {"number": 1}}, "name should be text, not 3"),
        ({"name": "a", "inner": {"number": "1"}}, "inner.number should be a number, not '1'"),
        ({"name": "a", "inner": {"number": True}}, "inner.number should be a number, not True"),
        ({"name": "a", "inner": {"number": 1, "count": 1.0}}, "inner.count should be a whole number, not 1.0"),
        ({"name": "a", "inner": {"number": 1, "count": 2**70}}, "inner.count should be a whole number, not"),
        ({"name": "a", "inner": {"number": 1}, "many": {}}, "many should be a list, not {}"),
        ({"name": "a", "inner": {"number": 1}, "many": [{}]}, r"many\[0\] lacks the field 'number'"),
        ({"name": "a", "inner": {"number": 1}, "pair": [1]}, r"pair should be a list of 2, not \[1\]"),
        ({"name": "a", "inner": {"number": 1}, "by_name": [1]}, r"by_name should be values by name, not \[1\]"),
        ({"name": "a", "inner": {"number": 1}, "flag": 1}, "flag should be true or false, not 1"),
        ({"name": "a", "inner": {"number": math.inf}}, "inner.number should be a number, not inf"),
        ({"name": "a", "inner": {"number": math.nan}}, "inner.number should be a number, not nan"),
        ({"name": "a", "inner": {"number": 10**400}}, "inner.number should be a number, not 1000"),
        ({"name": "a", "inner": {"number": 1}, "either": 10**400}, "either should be a number, not 1000"),
    ],
)
def test_what_is_something_else_is_said(value, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        Outer.from_json(value)


def test_a_union_takes_the_type_that_fits():
    assert type(from_json(float | int, 1)) is int
    assert type(from_json(float | int, 1.0)) is float
    assert from_json(str | Mapping[str, str], {"a": "b"}) == {"a": "b"}
