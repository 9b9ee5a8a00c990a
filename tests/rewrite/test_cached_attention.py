"""Graphs that read a cache: cached and new keys are never joined, and what surrounds the operator knows its inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import torch

from hstu_compile.graph_plugin import plugin_request_of
from hstu_compile.op_schema import attention_contract, is_attention, node_attributes
from hstu_compile.rewrite.attach_native_body import AttachNativeBody
from hstu_compile.rewrite.bound_native_body import BoundNativeBody
from tests.attention_cases import build_case, with_cache
from tests.oracle import AttentionCase, check_attention, oracle_of
from tests.rewrite.attention_graphs import attention_model, attention_node, contract_attributes, feeds_of, run_onnx
from tests.segmented_cases import ranking_case, retrieval_case


def cached_graph(name: str) -> onnx.ModelProto:
    """The scoring graph of a ranker, or the appending graph of a retrieval model with both biases, as they ship."""
    case = ranking_case("score", "bf16") if name == "score" else retrieval_case("append", "fp16")
    return case.whole.model


def named_inputs(node: onnx.NodeProto) -> Mapping[str, str]:
    """Value of each input by its contract name."""
    present = attention_contract().present_inputs(node_attributes(node))
    return {each.name: value for each, value in zip(present, node.input, strict=True)}


@pytest.mark.parametrize("name", ["score", "append"])
def test_the_attention_reads_the_cache_where_it_lies_and_nothing_else_reads_it(name: str) -> None:
    graph = cached_graph(name).graph
    nodes = [node for node in graph.node if is_attention(node)]
    assert len(nodes) == 2
    offsets = "candidate_offsets" if name == "score" else "seq_offsets"
    for layer, node in enumerate(nodes):
        inputs = named_inputs(node)
        assert node_attributes(node)["has_cache"] == 1
        assert (inputs["k_cached"], inputs["v_cached"]) == (f"k_{layer}", f"v_{layer}")
        assert inputs["cache_offsets"] == "cache_offsets"
        assert inputs["q_offsets"] == inputs["k_offsets"] == offsets
        for cached in ("k_cached", "v_cached"):
            readers = [each.name for each in graph.node if inputs[cached] in each.input and each.op_type != "Shape"]
            assert readers == [node.name]


def test_the_joined_timestamps_are_one_value_of_all_layers() -> None:
    nodes = [node for node in cached_graph("append").graph.node if is_attention(node)]
    joined = {named_inputs(node)["col_timestamps"] for node in nodes}
    assert len(joined) == 1
    assert joined.isdisjoint({"timestamps", "cached_timestamps"})


@pytest.mark.parametrize("name", ["score", "append"])
def test_the_plugin_library_of_such_a_graph_holds_kernels_that_read_a_cache(name: str) -> None:
    request = plugin_request_of([cached_graph(name)])
    assert request.variants
    assert all(variant.has_cache for variant in request.variants)
    assert all(variant.has_cache for variant in request.hopper_variants)


def one_node_model(case: AttentionCase, *, drop: str = "") -> onnx.ModelProto:
    node = attention_node(contract_attributes(case))
    for attribute in [each for each in node.attribute if each.name == drop]:
        node.attribute.remove(attribute)
    model = attention_model(case, [node])
    AttachNativeBody(1).call(model)
    return model


def test_a_node_from_before_the_cache_keeps_its_body_and_its_result() -> None:
    case = build_case([9, 0, 17], num_targets=[2, 0, 5], time_bias="shared", seed=1)
    old = one_node_model(case, drop="has_cache")
    assert "has_cache" not in {attribute.name for attribute in old.graph.node[0].attribute}
    check_attention(run_onnx(old, feeds_of(case))["out"], oracle_of(case), case.dtype)
    BoundNativeBody(17).call(old)
    check_attention(run_onnx(old, feeds_of(case))["out"], oracle_of(case), case.dtype)


def test_a_bounded_body_still_reads_all_of_the_cache() -> None:
    case = with_cache(build_case([40, 33], query_lengths=[3, 2], time_bias="shared", seed=2), [37, 33])
    model = one_node_model(case)
    for attribute in model.graph.node[0].attribute:
        if attribute.name in ("max_query_len", "max_seq_len"):
            attribute.i = 4096
    assert BoundNativeBody(40).call(model).counts == {"bounds": 2}
    check_attention(run_onnx(model, feeds_of(case))["out"], oracle_of(case), case.dtype)


def test_the_comparison_used_here_sees_a_cache_of_another_user() -> None:
    case = with_cache(build_case([40, 40], query_lengths=[3, 2], seed=3), [37, 37])
    assert case.k_cached is not None
    swapped = feeds_of(case) | {"k_cached": np.roll(case.k_cached, 37, axis=0)}
    with pytest.raises(AssertionError, match="differs from the float64 oracle"):
        check_attention(run_onnx(one_node_model(case), swapped)["out"], oracle_of(case), case.dtype)


def test_a_cache_in_part_is_refused() -> None:
    from hstu_compile.model import AttentionAttrs, hstu_attention

    rows, offsets = torch.zeros(2, 1, 4), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="k_cached, v_cached and cache_offsets go together"):
        hstu_attention(rows, rows, rows, offsets, offsets, AttentionAttrs(1.0, 1.0, 2, 4), k_cached=rows, v_cached=rows)
