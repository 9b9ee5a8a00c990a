"""Sigmoids spelled with an exponential: the same function, accurate where tanh cancels, halves left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hstu_compile.rewrite.lower_tensorrt8 import lowered_for_tensorrt8
from hstu_compile.rewrite.spell_out_sigmoid import SpellOutSigmoid
from tests.exported_models import NUM_LAYERS, TOP_K, exported_graph
from tests.rewrite.attention_graphs import run_onnx

X = np.concatenate([np.linspace(-30, 30, 6001), [-1000.0, -100.0, -88.0, 0.0, 100.0, 1000.0]]).astype(np.float32)


def model_of(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), kind: int = TensorProto.FLOAT) -> Any:
    def value(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, ["L"])

    graph = helper.make_graph(nodes, "g", [value("x")], [value(name) for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def exact_sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x.astype(np.float64)))


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("order", [("x", "s"), ("s", "x")], ids=["x*s", "s*x"])
def test_silu_is_one_quotient_with_an_error_relative_to_itself(order: tuple[str, str]) -> None:
    model = model_of(helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", list(order), ["y"]))
    assert SpellOutSigmoid().call(model).counts == {"silus": 1, "sigmoids": 0}
    onnx.checker.check_model(model, full_check=True)
    assert operators(model) == ["Neg", "Exp", "Add", "Div"]
    actual = run_onnx(model, {"x": X})["y"].astype(np.float64)
    expected = X * exact_sigmoid(X)
    inside = np.abs(X) <= 80  # beyond, SiLU itself is below the smallest normal float32
    # exp errs by a few units of roundoff (2**-24) and |x| units for the rounding of x, then an addition and a quotient.
    assert (
        np.abs(actual - expected)[inside] <= (6 + 3 * np.abs(X[inside])) * 2.0**-24 * np.abs(expected[inside])
    ).all()
    assert np.abs(actual - expected)[~inside].max() <= 1e-33
    # What it is for: computed as 0.5 + 0.5 * tanh, the same values lose all digits where x is far below 0.
    by_tanh = X * (np.float32(0.5) + np.float32(0.5) * np.tanh(np.float32(0.5) * X))
    far = (X < -15) & inside
    assert (np.abs(by_tanh - expected)[far] > 0.05 * np.abs(expected[far])).any()


def test_a_sigmoid_with_another_reader_keeps_its_name() -> None:
    model = model_of(
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["y"]),
        helper.make_node("Abs", ["s"], ["z"]),
        outputs=("y", "z"),
    )
    assert SpellOutSigmoid().call(model).counts == {"silus": 1, "sigmoids": 1}
    onnx.checker.check_model(model, full_check=True)
    assert operators(model) == ["Neg", "Exp", "Add", "Div", "Div", "Abs"]
    results = run_onnx(model, {"x": X})
    sigmoid = exact_sigmoid(X)
    assert (np.abs(results["z"] - sigmoid) <= 1e-5 * sigmoid + 1e-37).all()
    assert (np.abs(results["y"] - X * sigmoid) <= 1e-5 * np.abs(X * sigmoid) + 1e-33).all()


def test_a_sigmoid_that_is_an_output_is_spelled_out() -> None:
    model = model_of(helper.make_node("Sigmoid", ["x"], ["y"]))
    assert SpellOutSigmoid().call(model).counts == {"silus": 0, "sigmoids": 1}
    assert operators(model) == ["Neg", "Exp", "Add", "Div"]
    actual = run_onnx(model, {"x": X})["y"]
    assert (np.abs(actual - exact_sigmoid(X)) <= 1e-5 * exact_sigmoid(X) + 1e-37).all()


def test_a_product_with_another_value_is_not_silu() -> None:
    model = model_of(
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Mul", ["a", "s"], ["y"]),
    )
    assert SpellOutSigmoid().call(model).counts == {"silus": 0, "sigmoids": 1}
    expected = np.abs(X) * exact_sigmoid(X)
    assert (np.abs(run_onnx(model, {"x": X})["y"] - expected) <= 1e-5 * expected + 1e-33).all()


def test_half_sigmoids_stay() -> None:
    model = model_of(
        helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"]), kind=TensorProto.FLOAT16
    )
    untouched = model.SerializeToString()
    assert not SpellOutSigmoid().call(model).modified
    assert model.SerializeToString() == untouched


@pytest.mark.parametrize(("precision", "native"), [("fp32", False), ("fp32", True), ("fp16", False)])
def test_lowering_spells_out_every_sigmoid_of_a_float32_graph(precision: Any, native: bool) -> None:
    lowered, records = lowered_for_tensorrt8(exported_graph(precision, top_k=TOP_K), precision, native=native)
    counts = {record.name: record.counts for record in records}
    if precision == "fp32":
        # The native body has a SiLU of its own in each layer.
        assert counts["spell_out_sigmoid"] == {"silus": (2 if native else 1) * NUM_LAYERS, "sigmoids": 0}
        assert "Sigmoid" not in operators(lowered)
        assert not SpellOutSigmoid().call(lowered).modified
    else:
        assert "spell_out_sigmoid" not in counts
        assert operators(lowered).count("Sigmoid") == NUM_LAYERS
