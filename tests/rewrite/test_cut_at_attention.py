"""Cutting a graph at its attentions: the numbers, what crosses, what is computed twice, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import ColumnView, KernelCall, OnnxGraph, SegmentedGraph, is_tap
from hstu_compile.errors import EngineError, RewriteError
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.model.attention import AttentionAttrs, hstu_attention
from hstu_compile.op_schema import contract_of
from hstu_compile.rewrite.cut_at_attention import _Cut, segmented_from_onnx
from hstu_compile.rewrite.following_norms import following_norms
from hstu_compile.runtime._bfloat16 import storage_dtype
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.runtime.segmented_onnx_session import SegmentedOnnxSession
from tests.attention_cases import build_case
from tests.oracle import Array
from tests.rewrite.attention_graphs import attention_model, attention_node, contract_attributes, feeds_of
from tests.segmented_cases import Case, ranking_case, retrieval_case, rounding_what_kernels_make

# Heavy operators: one that ran in two segments would cost its time twice.
_HEAVY = ("MatMul", "HstuNorm", "LayerNormalization", "Sigmoid", "ScatterND", "TopK", "ReduceSum", "Where")

RETRIEVAL = ("retrieval", "prefill", "append")
RANKING = ("packed", "prefill", "score")


def assert_equal_to_the_bit(case: Case) -> None:
    taps = [name for name in case.served.taps if is_tap(name)]
    rounded = rounding_what_kernels_make(case)
    with OnnxRuntimeSession(rounded, taps=taps) as whole, SegmentedOnnxSession(case.cut, taps=taps) as cut:
        compared = 0
        for feeds in case.feeds:
            expected, found = whole.run(feeds), cut.run(feeds)
            assert set(found) == set(expected)
            for name, values in expected.items():
                assert values.dtype == found[name].dtype
                np.testing.assert_array_equal(found[name], values, err_msg=name)
                compared += int(np.count_nonzero(values))
        assert compared > 100, "nothing but zeros was compared"


@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval_in_segments_equals_the_whole_graph_to_the_bit(name: str) -> None:
    assert_equal_to_the_bit(retrieval_case(name, "fp16"))


@pytest.mark.parametrize("name", RANKING)
def test_ranking_in_segments_equals_the_whole_graph_to_the_bit(name: str) -> None:
    assert_equal_to_the_bit(ranking_case(name, "bf16"))


def test_every_row_and_unfused_norms_equal_the_whole_graph_to_the_bit() -> None:
    assert_equal_to_the_bit(retrieval_case("retrieval", "fp32", prune=False, fuse_norms=False))


def all_cases() -> list[Case]:
    return [*(retrieval_case(name, "fp16") for name in RETRIEVAL), *(ranking_case(name, "bf16") for name in RANKING)]


def layer_calls(case: Case) -> list[KernelCall]:
    """The calls behind those of the norms in front of the first layer."""
    calls = list(case.cut.calls)
    return calls[[call.operator for call in calls].index("HstuAttention") :]


def test_there_is_one_segment_more_than_layers_and_three_more_where_there_are_towers() -> None:
    with_towers = [ranking_case(name, "bf16") for name in ("packed", "prefill")]
    for case in all_cases():
        layers = case.served.num_attention
        assert [call.operator for call in layer_calls(case)] == ["HstuAttention", "HstuNorm"] * layers
        # Norms of both towers at each of their two depths, the one of their sum, and none where rows are few, behind
        # cached ones.
        towers = "skk" * 2 + "sk" if any(case is each for each in with_towers) else ""
        assert "".join(step.kind[0] for step in case.cut.steps) == towers + "skk" * layers + "s"
    unfused = retrieval_case("retrieval", "fp32", prune=False, fuse_norms=False)
    assert [call.operator for call in unfused.cut.calls] == ["HstuAttention"] * unfused.served.num_attention


def test_nothing_heavy_is_computed_twice_and_nothing_is_lost() -> None:
    for case in all_cases():
        whole = Counter(node.op_type for node in case.whole.model.graph.node)
        cut = Counter(node.op_type for each in case.cut.segments for node in each.model.graph.node)
        cut.update(call.operator for call in case.cut.calls)
        assert {kind: cut[kind] for kind in _HEAVY} == {kind: whole[kind] for kind in _HEAVY}, case.served.name
        assert cut["HstuAttention"] == whole["HstuAttention"]
        inside = {node.op_type for each in case.cut.segments for node in each.model.graph.node}
        assert "HstuAttention" not in inside


def test_every_segment_is_valid_onnx_and_reads_what_was_made_before() -> None:
    for case in all_cases():
        for segment in case.cut.segments:
            onnx.checker.check_model(segment.model, full_check=True)
        assert_schedule(case.cut)


def assert_schedule(cut: SegmentedGraph) -> None:
    present = {spec.name for spec in cut.inputs} | set(cut.constants)
    spans = {each.spec.name: each for each in cut.crossing}
    for number, step in enumerate(cut.steps):
        assert present.issuperset(cut.reads(step))
        for name in cut.reads(step):
            if name in spans:
                assert spans[name].first < number <= spans[name].last
        for name in cut.writes(step):
            assert spans[name].first == number
        present |= set(cut.writes(step))
    assert present.issuperset(spec.name for spec in cut.outputs)
    assert set(spans) == {name for step in cut.steps for name in cut.writes(step)}


def test_a_layer_hands_on_the_residual_the_projection_and_what_the_next_attention_reads() -> None:
    cut = retrieval_case("retrieval", "fp32", prune=False, fuse_norms=False).cut
    # What is alive while the first attention runs.
    alive = [each for each in cut.crossing if each.first < 1 < each.last]
    rows = [each.spec for each in alive if len(each.spec.shape) > 1]
    assert sorted(spec.shape for spec in rows) == [("L", 32), ("L", 200)]
    others = {each.spec.name for each in alive} - {spec.name for spec in rows}
    read_by_next = set(cut.calls[1].inputs.values())
    by_the_answers = {spec.name for spec in cut.segments[-1].inputs}
    assert others <= read_by_next | by_the_answers
    assert len(others) <= 3, others


def test_a_pruned_last_layer_reads_only_consumed_rows_behind_its_attention() -> None:
    cut = retrieval_case("retrieval", "fp16").cut
    final = cut.segments[-1]
    assert {spec.shape[0] for spec in final.inputs if spec.dtype == "float16"} == {"B"}


def test_an_embedding_table_is_in_one_segment() -> None:
    for case in all_cases():
        tables = Counter(
            tensor.name
            for segment in case.cut.segments
            for tensor in segment.model.graph.initializer
            if "embedding.weight" in tensor.name or ".tables." in tensor.name
        )
        assert set(tables.values()) <= {1}, tables


def test_the_eager_operator_in_place_of_the_kernel_gives_the_same_within_float32s_rounding() -> None:
    case = retrieval_case("retrieval", "fp32", prune=False, fuse_norms=False)
    segments = [OnnxRuntimeSession(each.model) for each in case.cut.segments]
    for feeds in case.feeds:
        with OnnxRuntimeSession(case.whole.model) as whole:
            expected = whole.run(feeds)["user_embeddings"]
        values: dict[str, Array] = {**feeds, **case.cut.constants}
        for step in case.cut.steps:
            if step.kind == "segment":
                session = segments[step.index]
                values |= session.run({spec.name: values[spec.name] for spec in session.inputs})
                continue
            call = case.cut.calls[step.index]
            given = {name: torch.from_numpy(np.array(values[tensor])) for name, tensor in call.inputs.items()}
            for name, view in call.views.items():
                columns = given[name][:, view.column : view.column + math.prod(view.dims)]
                given[name] = columns.unflatten(1, view.dims)
            fields = AttentionAttrs.__dataclass_fields__
            attrs = {name: value for name, value in call.attributes.items() if name in fields and name != "silu"}
            values[call.output] = hstu_attention(
                *(given.pop(name) for name in ("q", "k", "v", "q_offsets", "k_offsets")),
                AttentionAttrs(**attrs),
                **given,
            ).numpy()
        # Unit vectors; both sides sum at most 20 products of O(1) in float32, in another order.
        np.testing.assert_allclose(values["user_embeddings"], expected, rtol=0, atol=2e-6)


def hand_built(outputs: tuple[str, ...]) -> tuple[OnnxGraph, dict[str, Array]]:
    """q, k, v -> a and b side by side -> c, which reads a as its queries."""
    case = build_case([3, 0, 5], num_heads=2, dqk=8, dv=8, seed=3)
    attributes = contract_attributes(case)
    nodes = [
        attention_node(attributes, "a"),
        attention_node(attributes, "b", v="k"),
        attention_node(attributes, "c", q="a", v="b"),
    ]
    model = attention_model(case, nodes)
    kept = [value for value in model.graph.output if value.name in outputs]
    infos = [value for value in model.graph.output if value.name not in outputs]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    model.graph.value_info.extend(infos)
    graph = OnnxGraph("hand", model, "fp32", tensor_specs(model.graph.input), tensor_specs(model.graph.output))
    return graph, feeds_of(case)


def test_attentions_side_by_side_and_back_to_back_need_no_segment_between_them() -> None:
    graph, _ = hand_built(("a", "c"))
    cut = segmented_from_onnx(graph)
    assert not cut.segments
    assert [cut.calls[step.index].output for step in cut.steps] == ["a", "b", "c"]
    spans = {each.spec.name: (each.first, each.last) for each in cut.crossing}
    assert spans == {"a": (0, 2), "b": (1, 2), "c": (2, 2)}
    assert_schedule(cut)


def test_inputs_are_bound_by_their_names_in_the_contract() -> None:
    for case in all_cases():
        nodes = {node.output[0]: node for node in case.whole.model.graph.node}
        for call in case.cut.calls:
            node = nodes[call.output.removesuffix("/stored")]
            assert call.operator == node.op_type
            wanted = [each.name for each in contract_of(call.operator).present_inputs(call.attributes)]
            assert list(call.inputs) == wanted
            own = {name: tensor for name, tensor in call.inputs.items() if name not in call.views}
            assert own.items() <= dict(zip(wanted, node.input, strict=True)).items()


def test_no_attention_has_its_queries_keys_and_values_copied_but_where_keys_and_values_are_outputs() -> None:
    # The widths of u, v, q and k.
    for case, widths in (
        (retrieval_case("retrieval", "fp16"), (50, 50, 50, 50)),
        *((ranking_case(name, "bf16"), (14, 14, 10, 10)) for name in ("packed", "score")),
        (ranking_case("packed", "bf16", prune=False, fuse_norms=False), (14, 14, 10, 10)),
    ):
        first, *others = (call for call in case.cut.calls if call.operator == "HstuAttention")
        u, v, q, _ = widths
        assert {name: (view.column, view.row_stride) for name, view in first.views.items()} == {
            "v": (u, sum(widths)),
            "q": (u + v, sum(widths)),
            "k": (u + v + q, sum(widths)),
        }
        assert all(set(call.views) == {"q", "k", "v"} for call in others)
        made = [each.spec for each in case.cut.crossing if len(each.spec.shape) == 3]
        assert {spec.name for spec in made} == {call.output for call in (first, *others)}
    for case in (retrieval_case("prefill", "fp16"), retrieval_case("append", "fp16"), ranking_case("prefill", "bf16")):
        outputs = {spec.name for spec in case.cut.outputs}
        for call in case.cut.calls:
            if call.operator == "HstuNorm":
                continue
            # The projection is written whole; as slices, queries would be copied.
            assert set(call.views) == {"q"}
            assert outputs.issuperset((call.inputs["k"], call.inputs["v"]))


def test_a_projection_ends_a_product_and_what_is_summed_or_gathered_does_not() -> None:
    cut = _Cut(ranking_case("prefill", "bf16").whole)
    (projection,) = (source for source in cut.column_views.sources if cut.can_cross(source))
    assert cut.ends_a_product(projection)
    nodes = {node.op_type: node.output[0] for node in cut.nodes}
    assert cut.ends_a_product(nodes["MatMul"])
    for name in ("layer_0", nodes["Gather"], nodes["Concat"], nodes["HstuNorm"], cut.graph.inputs[0].name):
        assert not cut.ends_a_product(name), name


def test_reading_columns_in_place_leaves_the_bytes_that_cross_as_they_are() -> None:
    for case, before, after in (
        (retrieval_case("retrieval", "fp16"), (23, 1496), (18, 1496)),
        (retrieval_case("retrieval", "fp32", prune=False, fuse_norms=False), (18, 2424), (12, 2424)),
        (ranking_case("packed", "bf16"), (31, 704), (26, 704)),
        (ranking_case("packed", "bf16", prune=False, fuse_norms=False), (20, 336), (14, 336)),
    ):
        plain, viewed = _Cut(case.whole).result(), case.cut
        assert (counted(plain), counted(viewed)) == (before, after), case.served.name


def counted(cut: SegmentedGraph) -> tuple[int, int]:
    """Tensors that cross, and the bytes of a row of each that has columns."""
    specs = [each.spec for each in cut.crossing]
    rows = [spec for spec in specs if len(spec.shape) > 1]
    nbytes = sum(math.prod(spec.shape[1:]) * storage_dtype(spec.dtype).itemsize for spec in rows)  # type: ignore[arg-type]
    return len(specs), nbytes


def test_an_attention_with_a_cache_reads_the_graphs_inputs_where_they_are() -> None:
    cut = retrieval_case("append", "fp16").cut
    attentions = [call for call in cut.calls if call.operator == "HstuAttention"]
    for number, call in enumerate(attentions):
        assert call.attributes["has_cache"] == 1
        assert (call.inputs["k_cached"], call.inputs["v_cached"]) == (f"k_{number}", f"v_{number}")
    made = {name for step in cut.steps for name in cut.writes(step)}
    assert not any(name.startswith(("k_", "v_")) for name in made), "cached rows were copied"


def test_a_graph_without_attention_is_one_segment() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["L", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["L", 4])
    model = helper.make_model(helper.make_graph([helper.make_node("Neg", ["x"], ["y"], name="neg")], "g", [x], [y]))
    cut = segmented_from_onnx(OnnxGraph("g", model, "fp32", tensor_specs([x]), tensor_specs([y])))
    assert len(cut.segments) == 1
    assert not cut.calls


def test_the_cut_leaves_the_graph_alone() -> None:
    case = retrieval_case("retrieval", "fp16")
    before = case.whole.model.SerializeToString(deterministic=True)
    again = segmented_from_onnx(case.whole)
    assert case.whole.model.SerializeToString(deterministic=True) == before
    assert [each.model.SerializeToString(deterministic=True) for each in again.segments] == [
        each.model.SerializeToString(deterministic=True) for each in case.cut.segments
    ]


@pytest.mark.parametrize("damage", ["type", "axis"])
def test_a_tensor_that_would_cross_without_a_known_type_or_shape_is_refused(damage: str) -> None:
    case = retrieval_case("retrieval", "fp16")
    model = onnx.ModelProto()
    model.CopyFrom(case.whole.model)
    info = next(info for info in model.graph.value_info if info.name == "layer_0")
    if damage == "type":
        model.graph.value_info.remove(info)
    else:
        info.type.tensor_type.shape.dim[0].Clear()
    with pytest.raises(RewriteError, match=r"HSTU-E303.*layer_0") as caught:
        segmented_from_onnx(OnnxGraph("retrieval", model, "fp16", case.whole.inputs, case.whole.outputs))
    assert ("type is not recorded" if damage == "type" else "how long an axis is") in str(caught.value)


def test_a_tap_that_nothing_computes_is_refused() -> None:
    with pytest.raises(EngineError, match=r"HSTU-E404.*\n.*layer_9"):
        SegmentedOnnxSession(retrieval_case("retrieval", "fp16").cut, taps=["layer_9"])


def test_a_norm_behind_an_attention_reads_its_output_and_the_gates_columns_and_ends_its_life() -> None:
    for case, widths, parts in (
        (retrieval_case("retrieval", "fp16"), (50, 200), 1),
        (ranking_case("packed", "bf16"), (14, 48), 3),
    ):
        attention, norm, *_ = layer_calls(case)
        inner, projected = widths
        assert norm.inputs["x"] == attention.output
        assert norm.inputs["gate"] == attention.inputs["q"]
        assert norm.views == {"x": ColumnView(0, inner, (inner,)), "gate": ColumnView(0, projected, (inner,))}
        assert case.cut.constants.keys() >= {norm.inputs["scale"]}
        assert case.cut.spec(norm.output).shape[1:] == (parts * inner,)
        spans = {each.spec.name: (each.first, each.last) for each in case.cut.crossing}
        at = spans[attention.output][0]
        assert spans[attention.output] == (at, at + 1), "the attention's output lives until its norm has run"
        assert spans[norm.output] == (at + 1, at + 2)


def test_a_gate_that_is_an_output_crosses_as_a_tensor_of_its_own() -> None:
    case = ranking_case("packed", "bf16")
    model = onnx.ModelProto()
    model.CopyFrom(case.whole.model)
    norm = layer_calls(case)[1]
    node = next(node for node in model.graph.node if list(node.output) == [norm.output])
    gate = node.input[-1]
    model.graph.output.append(next(info for info in model.graph.value_info if info.name == gate))
    graph = dataclasses.replace(case.whole, model=model, outputs=tensor_specs(model.graph.output))
    call = next(each for each in segmented_from_onnx(graph).calls if each.output == norm.output)
    assert call.inputs["gate"] == gate
    assert "gate" not in call.views


@pytest.mark.parametrize("damage", ["gate", "scale", "width", "rows"])
def test_a_norm_that_waits_for_more_than_its_attention_stays_in_its_segment(damage: str) -> None:
    case = ranking_case("packed", "bf16")
    model = onnx.ModelProto()
    model.CopyFrom(case.whole.model)
    first, second = (layer_calls(case)[place] for place in (1, 3))
    nodes = {node.output[0]: node for node in model.graph.node}
    node = nodes[second.output]
    assert set(following_norms(model.graph)) == {first.output, second.output}
    if damage == "gate":  # what the attention itself made
        node.input[-1] = node.input[0]
    elif damage == "scale":  # which a node computes
        scale = node.input[1]
        node.input[1] = "computed"
        model.graph.node.insert(0, helper.make_node("Identity", [scale], ["computed"]))
    elif damage == "width":  # of groups that are not the attention's rows
        node.input[1] = "ones"
        model.graph.initializer.append(numpy_helper.from_array(np.ones(7, np.float32), "ones"))
    else:  # of which the attention's are part
        source = node.input[0]
        node.input[0] = "doubled"
        model.graph.node.insert(
            list(model.graph.node).index(node), helper.make_node("Concat", [source, source], ["doubled"], axis=0)
        )
    assert set(following_norms(model.graph)) == {first.output}
