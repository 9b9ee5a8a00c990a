"""Running bfloat16 graphs in float32: every rounding stays where it was, and other graphs are not touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from hstu_compile.rewrite.widen_bf16 import WidenBf16
from hstu_compile.runtime.session import open_session
from tests.exported_models import TAPS, TOP_K, exported_graph, request_batch, research_model
from tests.tolerances import UNIT_ROUNDOFF


def elementwise_chain() -> onnx.ModelProto:
    """Y = sigmoid(x * w) * x + w, every step in bfloat16; float32 at the borders."""
    bf16 = TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=bf16),
        helper.make_node("Mul", ["x16", "w"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["s"]),
        helper.make_node("Mul", ["s", "x16"], ["m"]),
        helper.make_node("Add", ["m", "w"], ["r"]),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
    ]
    weight = torch.linspace(-3, 3, 64).to(torch.bfloat16)
    tensor = helper.make_tensor("w", bf16, [64], weight.view(torch.int16).numpy().tobytes(), raw=True)
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["L", 64])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["L", 64])],
            [tensor],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def test_every_rounding_is_the_one_that_torch_makes() -> None:
    x = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32) * 3
    with open_session("onnxruntime", onnx=elementwise_chain()) as session:
        actual = session.run({"x": x})["y"]
    weight = torch.linspace(-3, 3, 64).to(torch.bfloat16)
    half = torch.from_numpy(x).to(torch.bfloat16)
    expected = (torch.sigmoid(half * weight) * half + weight).float().numpy()
    # Sigmoid itself differs by one float32 step between libraries, which moves a bfloat16 rounding once in a while.
    assert np.mean(actual != expected) < 0.002
    scale = np.maximum(np.abs(expected), np.abs(weight.float().numpy()))
    assert (np.abs(actual - expected) <= 4 * UNIT_ROUNDOFF["bfloat16"] * scale).all()
    plain = torch.from_numpy(x)
    unrounded = (torch.sigmoid(plain * weight.float()) * plain + weight.float()).numpy()
    assert np.mean(actual != unrounded) > 0.9, "no rounding took place"


def test_the_model_equals_torch_within_bfloat16_rounding() -> None:
    feeds = request_batch((5, 0, 24, 1))
    with open_session("onnxruntime", onnx=exported_graph("bf16", top_k=TOP_K), taps=TAPS) as session:
        actual = session.run(feeds)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with torch.no_grad():
        exact = research_model("fp32").layer_activations(**tensors)
        eager = research_model("bf16").layer_activations(**tensors)
    for name, reference, half in zip(TAPS, exact, eager, strict=True):
        assert actual[name].dtype == np.float32
        bits = actual[name].view(np.uint32) & 0xFFFF
        assert not bits.any(), f"{name} holds values that bfloat16 cannot"
        error = np.abs(actual[name] - reference.numpy()).max()
        eager_error = (half.float() - reference).abs().max().item()
        assert eager_error > 0
        assert error <= 2 * eager_error


def test_a_second_run_and_other_precisions_change_nothing() -> None:
    model = exported_graph("bf16", top_k=TOP_K)
    first = WidenBf16().call(model)
    assert first.counts["constants"] > 0
    assert first.counts["rounded"] > 0
    kinds = {t.data_type for t in model.graph.initializer}
    assert TensorProto.BFLOAT16 not in kinds
    widened = model.SerializeToString()
    assert not WidenBf16().call(model).modified
    assert model.SerializeToString() == widened
    precisions: list[Any] = ["fp16", "fp32"]
    for precision in precisions:
        other = exported_graph(precision, top_k=TOP_K)
        before = other.SerializeToString()
        assert not WidenBf16().call(other).modified
        assert other.SerializeToString() == before


def test_an_unknown_type_is_refused() -> None:
    model = elementwise_chain()
    model.graph.node.append(helper.make_node("Mystery", ["r"], ["z"], domain="custom", name="odd"))
    model.opset_import.append(helper.make_opsetid("custom", 1))
    with pytest.raises(Exception, match="Mystery odd"):
        WidenBf16().call(model)
