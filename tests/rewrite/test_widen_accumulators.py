"""Products of float16 matrices ask for float32 sums, keep their results, and TensorRT-RTX takes the Casts in."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import Profile
from hstu_compile.engine import engine_from_onnx
from hstu_compile.rewrite.widen_accumulators import WidenAccumulators
from tests.rewrite.attention_graphs import run_onnx
from tests.unit.test_engine import RTX

HALF, WIDE, BRAIN = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16


def product(kind: int = HALF, width: int = 64) -> onnx.ModelProto:
    """(x w + b) w2, x once more by w."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((width, width)), "b": rng.standard_normal(width)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="first"),
        helper.make_node("Add", ["p", "b"], ["s"], name="sum"),
        helper.make_node("MatMul", ["s", "w"], ["o"], name="second"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "products",
        [value("x", kind, ["R", width])],
        [value("o", kind, ["R", width])],
        [
            numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(kind)), name)
            for name, array in constants.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_every_product_reads_widened_operands_and_rounds_its_sums_once() -> None:
    model = product()
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float16)
    assert WidenAccumulators().call(model).counts == {"products": 2}
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == [
        *("Cast", "Cast", "MatMul", "Cast", "Add"),
        *("Cast", "MatMul", "Cast"),
    ]
    constants = {each.name: numpy_helper.to_array(each).astype(np.float64) for each in model.graph.initializer}
    rows = (x @ constants["w"]).astype(np.float16) + constants["b"].astype(np.float16)
    expected = rows.astype(np.float64) @ constants["w"]
    found = run_onnx(model, {"x": x})["o"].astype(np.float64)
    # One rounding of the result, and of intermediate sums that lie at the border between two float16.
    np.testing.assert_allclose(found, expected, rtol=2.0**-10, atol=2.0**-10 * np.abs(expected).max())
    assert np.abs(expected).max() > 100
    assert not WidenAccumulators().call(model).modified


@pytest.mark.parametrize("kind", [WIDE, BRAIN])
def test_other_types_stay(kind: int) -> None:
    assert not WidenAccumulators().call(product(kind)).modified


def test_products_of_quantised_operands_stay() -> None:
    model = product()
    codes = numpy_helper.from_array(np.ones((64, 64), np.int8), "codes")
    scale = numpy_helper.from_array(np.array(0.5, np.float16), "scale")
    model.graph.initializer.extend([codes, scale])
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["codes", "scale"], ["dq"], name="dq"))
    model.graph.node[1].input[1] = "dq"
    assert WidenAccumulators().call(model).counts == {"products": 1}
    assert list(model.graph.node[1].input) == ["x", "dq"]


@RTX
def test_tensorrt_rtx_adds_up_in_float32_and_keeps_operands_of_sixteen_bits() -> None:
    profile = Profile("p", {"x": (1, 64)}, {"x": (8, 64)}, {"x": (16, 64)})
    plan = engine_from_onnx(product(), backend="tensorrt-rtx", profiles=[profile]).plan.decode("latin-1")
    found = re.findall(r'fully_connected=\{[^\n]*? input=\{"(\S+)" "(\S+)"[^\n]*?accumulation_type=(\d)', plan)
    assert [kind for *_, kind in found] == ["2", "2"], found
    assert "__myl_Cast" not in plan
