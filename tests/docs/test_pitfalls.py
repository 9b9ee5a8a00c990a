"""What docs/pitfalls.md says of ONNX Runtime on a CPU, so that the page changes when the runtime does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "pitfalls.md").read_text(encoding="utf-8")
#: Versions that docs/pitfalls.md speaks of.
VERSION = ".".join(onnxruntime.__version__.split(".")[:2])
requires_named_version = pytest.mark.skipif(
    VERSION not in ("1.31", "1.32"),
    reason=f"docs/pitfalls.md speaks of ONNX Runtime 1.31 and 1.32; this is {onnxruntime.__version__}",
)


def run(operator: str, x: NDArray[Any], *constants: int) -> NDArray[Any]:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    names = [f"c{index}" for index in range(len(constants))]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *names], ["y"])],
        "one_node",
        [helper.make_tensor_value_info("x", kind, [None])],
        [helper.make_tensor_value_info("y", kind, [None])],
        [helper.make_tensor(name, kind, [], [value]) for name, value in zip(names, constants, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [y] = session.run(None, {"x": x})
    return np.asarray(y)


@requires_named_version
def test_clip_and_max_of_int64_read_the_lower_half_until_1_32():
    assert "in ONNX Runtime 1.31; 1.32 looks at all of them" in PAGE
    assert "`Max(2147483648, 0)` is 0" in PAGE
    values = np.array([2**31, 7], np.int64)
    expected = [0, 7] if VERSION == "1.31" else [2**31, 7]
    assert run("Max", values, 0).tolist() == expected
    assert run("Clip", values, 0, 2**40).tolist() == expected


@requires_named_version
def test_sigmoid_far_below_zero_is_not_relatively_accurate():
    x = np.array([-8, -16, -18], np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    error = np.abs(run("Sigmoid", x) - exact)
    assert error.max() < 2**-23
    near, far, gone = error / exact
    assert 1e-4 < near < 3e-4
    assert 0.3 < far < 0.6
    assert gone == 1


@requires_named_version
def test_a_rounding_in_front_of_a_product_is_left_out_unless_a_reshape_stands_between() -> None:
    assert "A rounding to float16 in front of a product is left out" in PAGE
    float32, float16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    x = np.full((1, 8), 1 + 2.0**-12, np.float32)  # float16 has nothing between 1 and 1 + 2**-10
    found = {}
    for between in ([], [helper.make_node("Reshape", ["h", "shape"], ["r"])]):
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["x"], ["h"], to=float16),
                *between,
                helper.make_node("MatMul", ["r" if between else "h", "w"], ["p"]),
                helper.make_node("Cast", ["p"], ["y"], to=float32),
            ],
            "product",
            [helper.make_tensor_value_info("x", float32, ["L", 8])],
            [helper.make_tensor_value_info("y", float32, ["L", 1])],
            [
                helper.make_tensor("w", float16, [8, 1], np.full(8, 1024, np.float16)),
                helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [0, -1]),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        [y] = session.run(None, {"x": x})
        found[bool(between)] = float(y[0, 0])
    assert found == {False: 8194.0, True: 8192.0}
