"""Norms of the towers and of their sum, in front of the first layer, as kernels' calls: where they run, what stays."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
from onnx import TensorProto, helper

from hstu_compile.artifacts import OnnxGraph, Precision, SegmentedGraph
from hstu_compile.fused_plan import fused_plan
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.op_schema import is_norm, node_attributes
from hstu_compile.rewrite import RowSelection, apply_passes, export_passes
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.rewrite.tower_norms import tower_norms
from tests.exported_models import traced_ranking
from tests.segmented_cases import WIDE_FORM, ranking_case, retrieval_case

_FLOAT32, _BFLOAT16 = 0, 2
_SWISH = 2


def packed() -> onnx.ModelProto:
    """A graph with two towers in front of its layers."""
    model = onnx.ModelProto()
    model.CopyFrom(ranking_case("packed", "bf16").whole.model)
    return model


def cut_of(model: onnx.ModelProto) -> SegmentedGraph:
    inputs, outputs = tensor_specs(model.graph.input), tensor_specs(model.graph.output)
    return segmented_from_onnx(OnnxGraph("packed", model, "bf16", inputs, outputs))


def places(cut: SegmentedGraph) -> dict[str, int]:
    """The number of segments in front of each call, by what it makes."""
    found, segments = {}, 0
    for step in cut.steps:
        segments += step.kind == "segment"
        if step.kind == "kernel":
            found[cut.calls[step.index].output] = segments
    return found


def test_the_norms_at_one_depth_share_one_cut() -> None:
    cut = ranking_case("packed", "bf16").cut
    calls = [call for call in cut.calls if places(cut)[call.output] <= 3]
    assert [call.operator for call in calls] == ["HstuNorm"] * 5
    assert [places(cut)[call.output] for call in calls] == [1, 1, 2, 2, 3]
    assert [call.attributes["activation"] for call in calls] == [_SWISH, _SWISH, 0, 0, 0]
    assert not any(call.views for call in calls)
    inside = [[node.op_type for node in segment.model.graph.node] for segment in cut.segments]
    assert inside[1] == ["MatMul"] * 2, "between the norms of two towers are their products"
    # In front of the second layer, which is the last and has one of the rows that are consumed as well, and behind it.
    assert [kinds.count("HstuNorm") for kinds in inside] == [0, 0, 0, 0, 2, 4]


@pytest.mark.parametrize(("name", "precision"), [("packed", "bf16"), ("packed", "fp16"), ("prefill", "bf16")])
def test_the_first_layers_norm_reads_the_residual_that_crosses_anyway_and_rounds_nothing_more(
    name: str, precision: Precision
) -> None:
    case = ranking_case(name, precision)
    norm = case.cut.calls[4]
    (node,) = (each for each in case.whole.model.graph.node if norm.output in each.output)
    assert norm.inputs["x"] == "layer_0"
    assert norm.attributes == node_attributes(node), "as the graph has it, types included"
    half = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    assert [case.cut.spec(each).dtype for each in ("layer_0", norm.output)] == [half, half]
    gathers, projects = ([each.op_type for each in case.cut.segments[number].model.graph.node] for number in (2, 3))
    assert {"Gather", "Concat"} <= set(gathers)
    assert "HstuNorm" not in gathers + projects
    assert projects.count("MatMul") == 1
    assert "Gather" not in projects
    (span,) = (each for each in case.cut.crossing if each.spec.name == "layer_0")
    readers = [number for number, step in enumerate(case.cut.steps) if "layer_0" in case.cut.reads(step)]
    assert len(readers) == 2, "by its norm, and as the residual by the next layer's sum"
    assert span.last == readers[-1]


def test_the_first_layers_norms_of_all_rows_and_of_those_consumed_share_one_cut() -> None:
    """A model of one layer: it is the last one too, and asks for few rows."""
    model, served, traced = traced_ranking(dataclasses.replace(WIDE_FORM, num_layers=1), "fp16", "packed")
    selection = RowSelection(served.max_candidates, "candidate_offsets")
    *_, whole = apply_passes(traced, export_passes(served.num_attention, served.taps, selection))
    cut = segmented_from_onnx(dataclasses.replace(whole, outputs=tensor_specs(whole.model.graph.output)))
    found = places(cut)
    assert [call.inputs["x"] for call in cut.calls if found[call.output] == 3] == ["layer_0", "layer_0/consumed"]
    assert len(cut.segments) == fused_plan(model.config, ("packed",), "fp16", "fast").segments["packed"]


def test_what_a_tower_ends_in_crosses_in_half_precision_and_is_widened_where_it_is_read() -> None:
    case = ranking_case("packed", "bf16")
    nodes = {node.output[0]: node for node in case.whole.model.graph.node}
    ends = [call for call in case.cut.calls if call.output.endswith("/stored")]
    assert len(ends) == 2
    for call in ends:
        name = call.output.removesuffix("/stored")
        assert node_attributes(nodes[name])["output_type"] == _FLOAT32
        assert call.attributes == node_attributes(nodes[name]) | {"output_type": _BFLOAT16}
        assert case.cut.spec(call.output).dtype == "bfloat16"
        widened = [(n.op_type, list(n.input)) for n in case.cut.segments[2].model.graph.node if name in n.output]
        assert widened == [("Cast", [call.output])]


def test_graphs_without_towers_and_those_of_few_rows_are_cut_at_layers_only() -> None:
    for name in ("retrieval", "prefill", "append"):
        assert not tower_norms(retrieval_case(name, "fp16").whole.model.graph)
    assert not tower_norms(ranking_case("score", "bf16").whole.model.graph)


def test_a_tower_of_another_depth_adds_no_cut() -> None:
    """One tower loses its first norm: its last has no norm in front of it, and runs where the other's first does."""
    model = packed()
    first = next(node for node in model.graph.node if is_norm(node))
    (last,) = (name for name, (norm, *_) in tower_norms(model.graph).items() if depends(model, norm, first.output[0]))
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == first.output[0]:
                node.input[index] = first.input[0]
    cut = cut_of(model)
    found = places(cut)
    assert found[f"{last}/stored"] == 1
    assert sorted(found.values())[:4] == [1, 1, 2, 3]
    assert len(cut.segments) == len(ranking_case("packed", "bf16").cut.segments)


def depends(model: onnx.ModelProto, node: onnx.NodeProto, name: str) -> bool:
    """Whether a node's rows are a product of this value."""
    producers = {made: each for each in model.graph.node for made in each.output}
    return name in producers[node.input[0]].input


def test_a_value_that_others_read_too_crosses_for_them() -> None:
    model = packed()
    before = ranking_case("packed", "bf16").cut
    made, rows = before.calls[0].output, before.calls[0].inputs["x"]
    served = onnx.ValueInfoProto()
    served.CopyFrom(next(each for each in model.graph.value_info if each.name == rows))
    served.name = "sum"
    model.graph.output.append(served)
    model.graph.node.append(helper.make_node("Add", [rows, made], [served.name]))
    cut = cut_of(model)
    spans = {each.spec.name: (each.first, each.last) for each in cut.crossing}
    last = len(cut.steps) - 1
    # Behind the two norms at the first depth is the second segment.
    assert (spans[rows], spans[made], spans[served.name]) == ((0, 3), (1, 3), (3, last))
    assert places(cut) == places(before)


@pytest.mark.parametrize("damage", ["sum", "scale", "weights", "width", "gate", "unread"])
def test_a_norm_that_is_no_towers_or_is_not_known_well_enough_stays_in_its_segment(damage: str) -> None:
    model = packed()
    graph = model.graph
    all_of_them = set(tower_norms(graph))
    assert len(all_of_them) == 5
    place, node = next((i, each) for i, each in enumerate(graph.node) if is_norm(each))
    infos = {info.name: info for info in (*graph.value_info, *graph.input)}
    if damage == "sum":  # whose rows are no product
        graph.node.insert(place, helper.make_node("Neg", [node.input[0]], ["negative"]))
        graph.node[place + 1].input[0] = "negative"
    elif damage == "scale":  # which a node computes
        scale = node.input[2]
        graph.node.insert(0, helper.make_node("Identity", [scale], ["computed"]))
        graph.node[place + 1].input[2] = "computed"
    elif damage == "weights":  # of a fixed number of rows
        infos[node.input[0]].type.tensor_type.shape.dim[0].dim_value = 1
    elif damage == "width":
        infos[node.output[0]].type.tensor_type.shape.dim[1].dim_param = "D"
    elif damage == "gate":  # that is another value
        next(each for each in node.attribute if each.name == "activation").i = 1
        node.input.append(node.input[0])
    else:  # by any layer
        for reader in graph.node:
            for index, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[index] = "nothing of it"
        shape = [1, infos[node.output[0]].type.tensor_type.shape.dim[1].dim_value]
        graph.initializer.append(helper.make_tensor("nothing of it", TensorProto.BFLOAT16, shape, [0.0] * shape[1]))
    assert set(tower_norms(graph)) == all_of_them - {node.output[0]}


def test_what_a_norm_makes_is_not_narrowed_where_it_is_served() -> None:
    model = packed()
    name = next(name for name, (_, *widened) in tower_norms(model.graph).items() if widened)
    model.graph.output.append(next(info for info in model.graph.value_info if info.name == name))
    assert [norm.output[0] for norm in tower_norms(model.graph)[name]] == [name]


@pytest.mark.parametrize("damage", ["wider", "norm", "towers"])
def test_a_norm_of_other_sums_and_one_that_stores_another_type_stay_in_their_segment(damage: str) -> None:
    model = packed()
    graph = model.graph
    towers = set(tower_norms(graph))
    (first,) = (node for node in graph.node if node.output[0] in towers and node.input[0] == "layer_0")
    towers.remove(first.output[0])
    if damage == "wider":  # as float32 it stays exact, and no kernel is planned that stores that
        next(each for each in first.attribute if each.name == "output_type").i = _FLOAT32
    elif damage == "norm":  # between the towers and it
        between = onnx.NodeProto()
        between.CopyFrom(first)
        between.output[0], first.input[0] = "normed", "normed"
        graph.node.insert(list(graph.node).index(first), between)
        named = onnx.ValueInfoProto()
        named.CopyFrom(next(info for info in graph.value_info if info.name == first.output[0]))
        named.name = "normed"
        graph.value_info.append(named)
        towers.add("normed")
    else:  # there are none: no rows are a product's
        for node in graph.node:
            if node.op_type == "MatMul":
                node.op_type = "Einsum"
        towers = set()
    assert set(tower_norms(graph)) == towers
