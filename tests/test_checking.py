"""Types and shapes are checked when tests run."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation

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
        with pytest.raises(jaxtyping.TypeCheckError, match="scores"):
            soft_gate(wrong, 1.0)


def test_shapes_are_found_in_aliases_and_unions():
    def bare(x: "PLACES | None"): ...

    found = checked(bare, typechecker=beartype)
    found(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        found(torch.zeros(2, 2, dtype=torch.int64))


def test_a_wrong_field_is_an_error():
    with pytest.raises(jaxtyping.TypeCheckError, match="attempts"):
        Outcome("decided", attempts="one")
