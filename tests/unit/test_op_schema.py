from __future__ import annotations

import math
from typing import Any

import onnx
import pytest
from onnx import helper

from hstu_compile.errors import InternalError
from hstu_compile.op_schema import attention_contract, is_attention, node_attributes, register_onnx_schema
from tests.attention_cases import build_case
from tests.rewrite.attention_graphs import attention_model, attention_node, contract_attributes

LEGAL: dict[str, Any] = {
    "alpha": 1.0,
    "scaling_seq_len": 8.0,
    "max_query_len": 4,
    "max_seq_len": 8,
    "target_group_size": 1,
    "contextual_seq_len": 0,
    "max_attn_len": 0,
    "min_full_attn_seq_len": 0,
    "silu": 0,
    "has_num_targets": 0,
    "has_contextual_seq_lens": 0,
    "has_scaling_seq_lens": 0,
    "pos_bias": 0,
    "time_bias": 0,
    "has_cache": 0,
}


def test_the_contract_names_the_attributes_used_here() -> None:
    assert [attribute.name for attribute in attention_contract().attributes] == list(LEGAL)
    assert attention_contract().problems(LEGAL) == []


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("alpha", math.nan, "alpha is nan; it must be finite"),
        ("alpha", math.inf, "alpha is inf; it must be finite"),
        ("alpha", "1", "alpha is '1'; it must be a number"),
        ("scaling_seq_len", 0.0, "scaling_seq_len is 0.0; it must be greater than 0"),
        ("max_seq_len", 0, "max_seq_len is 0; the minimum is 1"),
        ("max_seq_len", 2**20 + 1, "max_seq_len is 1048577; the maximum is 1048576"),
        ("max_attn_len", 1.0, "max_attn_len is 1.0; it must be an integer"),
        ("pos_bias", True, "pos_bias is True; it must be an integer"),
        ("time_bias", 2, "time_bias is 2; the maximum is 1"),
        ("silu", 2, "silu is 2; the maximum is 1"),
    ],
)
def test_an_illegal_attribute_is_named_with_its_value_and_range(name: str, value: Any, problem: str) -> None:
    (found,) = attention_contract().problems({**LEGAL, name: value})
    assert found.startswith(problem)


def test_all_problems_are_listed_at_once() -> None:
    attributes = {name: value for name, value in LEGAL.items() if name != "alpha"} | {"pos_bias": -1}
    assert attention_contract().problems(attributes) == ["alpha is missing", "pos_bias is -1; the minimum is 0"]


def test_only_present_inputs_are_listed_in_order() -> None:
    contract = attention_contract()
    always = ["q", "k", "v", "q_offsets", "k_offsets"]
    assert [each.name for each in contract.present_inputs(LEGAL)] == always
    some = [each.name for each in contract.present_inputs({**LEGAL, "has_num_targets": 1, "pos_bias": 1})]
    assert some == [*always, "num_targets", "pos_table"]
    switches = (
        "has_num_targets",
        "has_contextual_seq_lens",
        "has_scaling_seq_lens",
        "pos_bias",
        "time_bias",
        "has_cache",
    )
    everything = contract.present_inputs({**LEGAL, **dict.fromkeys(switches, 1)})
    assert everything == contract.inputs


def test_node_attributes_reads_back_what_a_node_stores() -> None:
    case = build_case([5, 9], num_targets=[1, 2], time_bias="shared", seed=1)
    attributes = contract_attributes(case)
    assert node_attributes(attention_node(attributes)) == pytest.approx(attributes)


def test_a_node_from_before_the_cache_has_none() -> None:
    attributes = {name: value for name, value in LEGAL.items() if name != "has_cache"}
    assert attention_contract().problems(attributes) == []
    assert node_attributes(attention_node({**LEGAL}))["has_cache"] == 0
    node = attention_node({**LEGAL})
    node.attribute.remove(next(a for a in node.attribute if a.name == "has_cache"))
    assert node_attributes(node) == LEGAL
    assert attention_contract().present_inputs(attributes) == attention_contract().present_inputs(LEGAL)


def test_a_node_outside_the_contract_is_a_bug_that_names_the_node() -> None:
    with pytest.raises(InternalError, match=r"node node_out breaks the contract.*max_seq_len is 0"):
        node_attributes(attention_node({**LEGAL, "max_seq_len": 0}))


def test_only_the_contracts_operator_is_attention() -> None:
    node = attention_node(LEGAL)
    assert is_attention(node)
    node.domain = ""
    assert not is_attention(node)


def model_with(change: str) -> onnx.ModelProto:
    case = build_case([5, 9], seed=1)
    node = attention_node(contract_attributes(case))
    if change == "attribute with a default missing":
        node.attribute.remove(next(a for a in node.attribute if a.name == "has_cache"))
    elif change == "missing attribute":
        node.attribute.remove(next(a for a in node.attribute if a.name == "alpha"))
    elif change == "missing input":
        del node.input[4:]
    elif change == "wrong attribute type":
        next(a for a in node.attribute if a.name == "alpha").CopyFrom(helper.make_attribute("alpha", 1))
    return attention_model(case, [node])


@pytest.mark.parametrize("change", ["nothing", "attribute with a default missing"])
def test_a_registered_schema_accepts_a_node_of_the_contract(change: str) -> None:
    register_onnx_schema()
    onnx.checker.check_model(model_with(change))


@pytest.mark.parametrize("change", ["missing attribute", "missing input", "wrong attribute type"])
def test_a_registered_schema_rejects_a_node_outside_the_contract(change: str) -> None:
    register_onnx_schema()
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model_with(change))


def test_registering_twice_does_nothing() -> None:
    register_onnx_schema()
    register_onnx_schema()
