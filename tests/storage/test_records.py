"""Tensor files: what safetensors would let through is refused too, in one clean line."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from bigram_circuits.storage.records import count_tensors, read_tensors

ONE = '{"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}'


def write(path, header, data=b"\1\2"):
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (f'{{"a": {ONE}, "a": {ONE}}}', "it names 'a' twice"),
        (f'{{"__metadata__": {{"x": "1", "x": "2"}}, "a": {ONE}}}', "it names 'x' twice"),
        (f'{{"a": {ONE[:-1]}, "more": 1}}}}', "the tensor 'a' should have a dtype, a shape and data_offsets, not"),
        (f'{{"a": {ONE.replace("U8", "I8")}}}', "the tensor 'a' has dtype 'I8', not one of BOOL"),
        (f'{{"a": {ONE.replace("U8", "BOOL")}}}', "the tensor 'a' holds values other than 0 and 1"),
        (f'{{"a": {ONE.replace("2],", "2" + ", 1" * 32 + "],", 1)}}}', "the tensor 'a' has an invalid shape"),
        (f'{{"a": {ONE.replace("[0, 2]", "[0, 1]")}}}', "header"),
        (f'{{"a": {ONE}, "b": {ONE}}}', "invalid offset"),
        (f'{{"__metadata__": {{"x": 1}}, "a": {ONE}}}', "expected a string"),
        ("[]", "its header is a list"),
    ],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_header_that_does_not_make_sense_is_refused(tmp_path, header, said, mapped):
    write(tmp_path / "x", header)
    with pytest.raises(ValueError, match=f"x' is wrong: .*{re.escape(said)}"):
        read_tensors(tmp_path / "x", "is wrong", mapped=mapped)


def test_a_name_with_control_characters_is_shown_without_them(tmp_path):
    name = json.dumps("\x1b[31m\u2028red\n")
    write(tmp_path / "x", f'{{"b": {ONE}, {name}: {ONE}}}')
    with pytest.raises(ValueError, match="is wrong") as error:
        read_tensors(tmp_path / "x", "is wrong")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_come_back_whatever_their_order_and_alignment(tmp_path, mapped):
    arrays = {
        "z": np.arange(3, dtype=np.uint8),
        "none": np.zeros((0, 4), np.float32),
        "a": np.arange(6.0).reshape(2, 3),
        "one": np.array(7, np.int32),
        "flags": np.array([[True], [False]]),
    }
    save_file(arrays, tmp_path / "x", {"what": "é"})
    read, metadata = read_tensors(tmp_path / "x", "is wrong", mapped=mapped)
    assert metadata == {"what": "é"}
    assert count_tensors(tmp_path / "x") == len(read) == len(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, strict=True)
