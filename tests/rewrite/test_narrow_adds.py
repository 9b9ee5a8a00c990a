"""Sums of half-precision values stay half-precision: no bit changes, and nothing that is really float32 is narrowed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.rewrite.narrow_adds import NarrowAdds
from tests.rewrite.attention_graphs import run_onnx

HALF, WIDE = TensorProto.FLOAT16, TensorProto.FLOAT


def node(op_type: str, inputs: str, output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=output, **attributes)


def small_graph(nodes: list[onnx.NodeProto], outputs: dict[str, int]) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(name, kind, ["R", 4]) for name, kind in (("a", HALF), ("b", HALF), ("w", WIDE))
    ]
    values = [helper.make_tensor_value_info(name, kind, ["R", 4]) for name, kind in outputs.items()]
    constants = [
        numpy_helper.from_array(np.array([1.5, -0.25, 65504.0, 2.0**-24], np.float32), "exact"),
        numpy_helper.from_array(np.array([0.1, 0.2, 0.3, 0.4], np.float32), "inexact"),
        numpy_helper.from_array(np.array([1.0, 1.0, 1.0, 70000.0], np.float32), "large"),
    ]
    graph = helper.make_graph(nodes, "sums", inputs, values, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


SUM = [
    node("Cast", "a", "aw", to=WIDE),
    node("Cast", "b", "bw", to=WIDE),
    node("Add", "aw bw", "s"),
    node("Cast", "s", "out", to=HALF),
]


def bias(name: str) -> list[onnx.NodeProto]:
    return [SUM[0], node("Add", f"aw {name}", "s"), SUM[3]]


def every_half() -> dict[str, np.ndarray]:
    """Every float16 beside a random one, NaN, infinities and subnormals included."""
    a = np.arange(2**16, dtype=np.uint16).view(np.float16)
    b = np.random.default_rng(0).permutation(a)
    return {"a": a.reshape(-1, 4), "b": b.reshape(-1, 4), "w": np.zeros((2**14, 4), np.float32)}


@pytest.mark.parametrize("nodes", [SUM, bias("exact")], ids=["rows", "constant"])
def test_a_sum_of_half_values_is_one_node_and_keeps_every_bit(nodes: list[onnx.NodeProto]) -> None:
    model = small_graph(nodes, {"out": HALF})
    feeds = every_half()
    before = run_onnx(model, feeds)["out"]
    assert NarrowAdds().call(model).counts == {"adds": 1}
    onnx.checker.check_model(model, full_check=True)
    assert [each.op_type for each in model.graph.node] == ["Add"]
    with np.errstate(all="ignore"):
        other = feeds["b"] if nodes is SUM else np.array([1.5, -0.25, 65504.0, 2.0**-24], np.float16)
        narrow = feeds["a"] + other  # NumPy's float16 sum is rounded once
    numbers = ~np.isnan(before)
    np.testing.assert_array_equal(np.isnan(narrow), ~numbers)
    np.testing.assert_array_equal(narrow[numbers].view(np.uint16), before[numbers].view(np.uint16))
    after = run_onnx(model, feeds)["out"]
    np.testing.assert_array_equal(after[numbers].view(np.uint16), before[numbers].view(np.uint16))


def test_sums_of_bfloat16_values_are_narrowed_to_bfloat16() -> None:
    half = TensorProto.BFLOAT16
    nodes = [*SUM[:3], node("Cast", "s", "out", to=half)]
    model = small_graph(nodes, {"out": half})
    for value in model.graph.input:
        if value.name in ("a", "b"):
            value.type.tensor_type.elem_type = half
    assert NarrowAdds().call(model).counts == {"adds": 1}
    onnx.checker.check_model(model, full_check=True)
    assert [(each.op_type, list(each.input)) for each in model.graph.node] == [("Add", ["a", "b"])]
    # A constant that bfloat16 lacks (65504 has 11 bits) stays.
    mixed = small_graph([SUM[0], node("Add", "aw exact", "s"), nodes[3]], {"out": half})
    mixed.graph.input[0].type.tensor_type.elem_type = half
    assert not NarrowAdds().call(mixed).modified


def test_a_second_run_reports_nothing() -> None:
    model = small_graph(SUM, {"out": HALF})
    NarrowAdds().call(model)
    assert not NarrowAdds().call(model).modified


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        (bias("inexact"), {"out": HALF}),
        (bias("large"), {"out": HALF}),
        ([node("Add", "w exact", "s"), SUM[3]], {"out": HALF}),
        ([SUM[0], node("Add", "aw w", "s"), SUM[3]], {"out": HALF}),
        (SUM, {"out": HALF, "s": WIDE}),
        ([*SUM, node("Neg", "s", "other")], {"out": HALF, "other": WIDE}),
        (SUM[:3], {"s": WIDE}),
        ([*SUM[:3], node("Cast", "s", "out", to=TensorProto.BFLOAT16)], {"out": TensorProto.BFLOAT16}),
    ],
    ids=["inexact constant", "constant beyond half", "float32 rows", "one float32 term", "sum is an output",
         "sum is read elsewhere", "no rounding", "rounded to another type"],
)  # fmt: skip
def test_a_sum_that_is_really_float32_stays(nodes: list[onnx.NodeProto], outputs: dict[str, int]) -> None:
    model = small_graph(nodes, outputs)
    before = model.SerializeToString()
    assert not NarrowAdds().call(model).modified
    assert model.SerializeToString() == before


def test_a_widened_value_that_somebody_else_reads_is_kept_for_them() -> None:
    model = small_graph([*SUM, node("Neg", "aw", "other")], {"out": HALF, "other": WIDE})
    feeds = every_half()
    before = run_onnx(model, feeds)
    assert NarrowAdds().call(model).modified
    assert sorted(each.op_type for each in model.graph.node) == ["Add", "Cast", "Neg"]
    np.testing.assert_array_equal(run_onnx(model, feeds)["other"], before["other"])
