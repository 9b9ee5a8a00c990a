"""Our writer of protobuf text, against protobuf's own reader and Triton's message."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_compile.serving import pbtxt as module
from hstu_compile.serving.pbtxt import Word, pbtxt

text_format = pytest.importorskip("google.protobuf.text_format", reason="protobuf is not installed")
model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")


def parsed(text: str):
    return text_format.Parse(text, model_config.ModelConfig())


def test_doctest():
    assert doctest.testmod(module).failed == 0


@given(st.text())
def test_every_string_comes_back(text: str):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return
    assert parsed(pbtxt({"name": text})).name == text


@given(st.lists(st.integers(-1, 2**63 - 1), max_size=4), st.booleans())
def test_numbers_booleans_and_repeated_fields_come_back(dims: list[int], ragged: bool):
    message = {"input": [{"name": "x", "dims": dims, "allow_ragged_batch": ragged}] * 2}
    fields = parsed(pbtxt(message)).input
    assert [(list(each.dims), each.allow_ragged_batch) for each in fields] == [(dims, ragged)] * 2


def test_words_maps_and_empty_messages_come_back():
    message = {
        "instance_group": [{"kind": Word("KIND_CPU")}],
        "parameters": [{"key": "a", "value": {"string_value": 'a "quoted"\nline'}}],
        "input": [{"name": "x", "reshape": {}}],
    }
    config = parsed(pbtxt(message))
    assert config.instance_group[0].kind == model_config.ModelInstanceGroup.Kind.KIND_CPU
    assert config.parameters["a"].string_value == 'a "quoted"\nline'
    assert config.input[0].HasField("reshape")


def test_a_value_that_no_field_holds_is_refused():
    with pytest.raises(TypeError, match="no protobuf field holds a float"):
        pbtxt({"name": 1.5})  # type: ignore[dict-item]
