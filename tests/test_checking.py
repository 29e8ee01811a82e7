"""Types and shapes are checked when tests run."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation, BeartypeCallHintReturnViolation

from bigram_circuits.masking.methods.continuous_sparsification import soft_gate, temperature
from bigram_circuits.names import WeightName
from bigram_circuits.runs import Outcome
from tests.checking import checked

PLACES = jaxtyping.Int[torch.Tensor, " place"]


def test_a_wrong_type_is_an_error():
    with pytest.raises(BeartypeCallHintParamViolation, match="step"):
        temperature("one", first=1.0, growth=1.1)
    with pytest.raises(BeartypeCallHintParamViolation, match="name"):
        WeightName.parse(3)


def test_a_wrong_shape_is_an_error():
    assert soft_gate(torch.zeros(3), 1.0).tolist() == [0.5] * 3
    for wrong in (torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(BeartypeCallHintParamViolation, match="scores"):
            soft_gate(wrong, 1.0)


def test_shapes_are_found_in_aliases_and_unions():
    def bare(x: "PLACES | None"): ...

    found = checked(bare, typechecker=beartype)
    found(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(BeartypeCallHintParamViolation, match="x"):
        found(torch.zeros(2, 2, dtype=torch.int64))


def test_lengths_agree_within_a_call_and_not_between_calls():
    def joined(x: "PLACES", y: "PLACES") -> "PLACES":
        return torch.cat([x, y]) if y[0] else x

    found, two, three = checked(joined, typechecker=beartype), torch.zeros(2).int(), torch.zeros(3).int()
    assert len(found(two, two)) == 2
    assert len(found(three, three)) == 3
    with pytest.raises(BeartypeCallHintParamViolation, match="y"):
        found(two, three)
    with pytest.raises(BeartypeCallHintReturnViolation, match="return"):
        found(two, two + 1)


def test_shapes_of_generators_are_checked():
    def each(x: "PLACES") -> "Iterator[int]":
        yield from x

    found = checked(each, typechecker=beartype)
    assert len(list(found(torch.zeros(2).int()))) == 2
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        found(torch.zeros(2, 2).int())


def test_a_wrong_field_is_an_error():
    with pytest.raises(BeartypeCallHintParamViolation, match="attempts"):
        Outcome("decided", attempts="one")
