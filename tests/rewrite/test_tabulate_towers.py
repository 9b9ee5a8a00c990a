"""Tables of what towers make of embeddings: the same answers but for a rounding, and fewer products."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hstu_compile import pipeline
from hstu_compile.artifacts import Precision
from hstu_compile.compare import whole_error
from hstu_compile.errors import UsageError
from hstu_compile.fused_plan import fused_plan
from hstu_compile.graph_plugin import kernels_request_of
from hstu_compile.op_schema import register_onnx_schema
from hstu_compile.rewrite import tabulate_towers
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.rewrite.tabulate_towers import TabulateTowers
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from tests.exported_models import ranking_config
from tests.oracle import Array
from tests.segmented_cases import WIDE_FORM, evaluated, ranking_case

register_onnx_schema()

#: Of all values of an output: what the rounding of two summands to a half type becomes in two layers.
MOST = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 2e-2}


def count_of(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


# Of traces that other tests read as well, but for float32.
GRAPHS: tuple[tuple[str, Precision], ...] = (("packed", "fp16"), ("prefill", "bf16"), ("score", "bf16"))


@pytest.mark.parametrize(
    ("name", "precision"), [*GRAPHS, pytest.param("packed", "fp32", marks=pytest.mark.slow, id="packed-fp32")]
)
def test_a_ranking_graph_answers_as_with_its_towers(name: str, precision: Precision) -> None:
    case, without = ranking_case(name, precision, tabulate=True), ranking_case(name, precision)
    (record,) = [record for record in case.whole.passes if record.name == "tabulate_towers"]
    assert (record.counts["tables"], record.counts["constants"]) == (2, 0)
    fewer = count_of(without.whole.model.graph) - count_of(case.whole.model.graph)
    assert (fewer["MatMul"], fewer["HstuNorm"]) == (4, 4)
    with OnnxRuntimeSession(case.whole.model) as tabulated, OnnxRuntimeSession(without.whole.model) as computed:
        for feeds in case.feeds:
            found, expected = tabulated.run(feeds), computed.run(feeds)
            for key, array in expected.items():
                assert whole_error([found[key]], [array]) <= MOST[precision], key
                if np.any(array):
                    assert whole_error([0.9 * found[key]], [array]) > MOST[precision]


def test_a_second_call_finds_nothing() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(ranking_case("packed", "fp16", tabulate=True).whole.model)
    before = model.SerializeToString(deterministic=True)
    assert not TabulateTowers(evaluated).call(model).modified
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(("name", "precision"), GRAPHS)
def test_the_plan_of_a_fused_build_is_that_of_the_graph(name: str, precision: Precision) -> None:
    whole = ranking_case(name, precision, tabulate=True).whole
    plan = fused_plan(ranking_config(WIDE_FORM), (name,), precision, "fast", tabulate_towers=True)
    request = kernels_request_of([whole.model])
    assert (plan.kernels, plan.norm_kernels) == (request.variants, request.norm_variants)
    assert plan.segments == {name: len(segmented_from_onnx(whole).segments)}


def test_a_build_that_was_asked_for_tables_and_has_none_is_refused() -> None:
    without, tabulated = (ranking_case("packed", "fp16", tabulate=tabulate).whole for tabulate in (False, True))
    pipeline._require_tabulated([without, tabulated])
    with pytest.raises(UsageError, match=r"HSTU-E901[\s\S]*--tabulate-towers finds no tower[\s\S]*leave it out"):
        pipeline._require_tabulated([without])


# --- small graphs -----------------------------------------------------------------------------------------------------

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3) - 5
WEIGHT = np.array([[1, -2], [3, 1], [0, 2]], np.float32)
BIAS = np.array([0.5, -1], np.float32)


def small_graph(*nodes: onnx.NodeProto, outputs: dict[str, int], **constants: Array) -> onnx.ModelProto:
    """Nodes behind rows "x" [N, 3] that "i" [N] looks up in TABLE; outputs by name and width."""
    arrays = {"table": TABLE, "w": WEIGHT, "b": BIAS, **constants}
    looked_up = helper.make_node("Gather", ["table", "i"], ["x"])
    graph = helper.make_graph(
        [looked_up, *nodes],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["N"]) for name in ("i", "j")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name, width in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model)
    return inferred


PRODUCT = helper.make_node("MatMul", ["x", "w"], ["p"])
BIASED = helper.make_node("Add", ["b", "p"], ["y"])


def tabulated(model: onnx.ModelProto, **settings: Any) -> tuple[dict[str, int], onnx.ModelProto]:
    """The counts, and the graph, which is valid and answers as before."""
    feeds = {"i": np.array([3, 0, 0, 1]), "j": np.array([2, 2, 1, 0])}
    before = OnnxRuntimeSession(model).run(feeds)
    counts = TabulateTowers(evaluated, **settings).call(model).counts
    onnx.checker.check_model(model, full_check=True)
    for name, array in OnnxRuntimeSession(model).run(feeds).items():
        np.testing.assert_array_equal(array, before[name])
    return counts, model


def test_rows_of_a_table_are_looked_up_where_they_were_computed() -> None:
    counts, model = tabulated(small_graph(PRODUCT, BIASED, outputs={"y": 2}))
    assert counts == {"tables": 1, "constants": 0, "nodes": 2}
    (node,) = model.graph.node
    (table,) = model.graph.initializer
    assert (node.op_type, list(node.input), list(node.output)) == ("Gather", [table.name, "i"], ["y"])
    np.testing.assert_array_equal(numpy_helper.to_array(table), TABLE @ WEIGHT + BIAS)


def test_rows_that_others_read_as_well_stay() -> None:
    counts, model = tabulated(
        small_graph(PRODUCT, BIASED, helper.make_node("Relu", ["x"], ["z"]), outputs={"y": 2, "z": 3})
    )
    assert counts["tables"] == 1
    assert {tensor.name for tensor in model.graph.initializer} == {"table", "y/rows"}


def test_histories_and_candidates_of_one_table_are_joined_behind_the_look_up() -> None:
    joined = [
        helper.make_node("Gather", ["table", "j"], ["x2"]),
        helper.make_node("Concat", ["x", "x2"], ["c"], axis=0),
        helper.make_node("MatMul", ["c", "w"], ["p"]),
    ]
    model = small_graph(*joined, BIASED, outputs={"y": 2})
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "M"
    counts, model = tabulated(model)
    assert counts["tables"] == 1
    assert count_of(model.graph) == {"Gather": 2, "Concat": 1}


def test_rows_of_two_tables_stay_computed() -> None:
    joined = [
        helper.make_node("Gather", ["other", "j"], ["x2"]),
        helper.make_node("Concat", ["x", "x2"], ["c"], axis=0),
        helper.make_node("MatMul", ["c", "w"], ["y"]),
    ]
    model = small_graph(*joined, outputs={"y": 2}, other=TABLE[::-1].copy())
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "M"
    assert not any(tabulated(model)[0].values())


def test_a_tap_is_looked_up_and_what_follows_is_computed() -> None:
    counts, model = tabulated(small_graph(PRODUCT, BIASED, outputs={"y": 2}), tap_names=("p",))
    assert counts == {"tables": 1, "constants": 0, "nodes": 1}
    assert [(node.op_type, node.output[0]) for node in model.graph.node] == [("Gather", "p"), ("Add", "y")]


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Add", ["x", "per_row"], ["y"]),
        helper.make_node("Mul", ["x", "x"], ["y"]),
        helper.make_node("Softmax", ["x"], ["y"], axis=0),
        helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT),
    ],
    ids=["another row for each", "its own square", "over all rows", "no product"],
)
def test_what_is_no_function_of_a_row_and_constants_or_no_work_stays(node: onnx.NodeProto) -> None:
    model = small_graph(node, outputs={"y": 3}, per_row=np.ones((4, 3), np.float32))
    assert not any(tabulated(model)[0].values())


def test_a_product_of_constants_is_a_constant() -> None:
    nodes = [helper.make_node("MatMul", ["table", "w"], ["p"]), helper.make_node("Gather", ["p", "i"], ["y"])]
    counts, model = tabulated(small_graph(*nodes, outputs={"y": 2}))
    assert counts == {"tables": 0, "constants": 1, "nodes": 2}
    assert [node.op_type for node in model.graph.node] == ["Gather"]


def test_a_table_that_is_a_file_stays() -> None:
    model = small_graph(PRODUCT, BIASED, outputs={"y": 2})
    table = model.graph.initializer[0]
    assert table.name == "table"
    table.ClearField("raw_data")
    table.data_location = TensorProto.EXTERNAL
    table.external_data.add(key="location", value="table.bin")
    assert not TabulateTowers(evaluated).call(model).modified


def test_a_table_that_would_be_as_large_as_those_that_are_files_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    large = small_graph(PRODUCT, BIASED, outputs={"y": 2})
    monkeypatch.setattr(tabulate_towers, "TABLE_BYTES", 4 * 2 * 4)
    assert not any(tabulated(large)[0].values())
    monkeypatch.setattr(tabulate_towers, "TABLE_BYTES", 4 * 2 * 4 + 1)
    assert tabulated(large)[0]["tables"] == 1
