"""The table of layer accuracy: its float64 arithmetic is the eager model's, and a wrong step shows in its own row."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from hstu_compile.compare import row_errors
from hstu_compile.rewrite.lower_tensorrt8 import lowered_for_tensorrt8
from tests.exported_models import NUM_LAYERS, exported_graph, request_batch, research_model
from tests.gpu.layer_taps import (
    FUNCTIONS,
    Float64Graph,
    accuracy_table,
    function_errors,
    function_model,
    layer_taps,
    tapped_model,
    with_tanh,
)
from tests.rewrite.attention_graphs import run_onnx

TENSORS = ["projection", "u", "v", "q", "k", "attention", "result"]


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return exported_graph("fp32")


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return request_batch((5, 0, 24, 1))


def test_the_float64_layers_are_those_of_the_eager_model(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    eager = research_model("fp32").cast(torch.float64)
    arguments = {name: torch.from_numpy(values) for name, values in feeds.items()}
    with torch.inference_mode():
        expected = [each.numpy() for each in eager.layer_activations(**arguments)]
    names = [taps.result for taps in layer_taps(model)]
    actual = Float64Graph(model, feeds).values(names, {"layer_0": expected[0]})
    assert len(names) == NUM_LAYERS
    for name, activation in zip(names, expected[1:], strict=True):
        # Not closer: the graph's epsilon is a float32 attribute, the eager model's is not.
        assert row_errors(actual[name], activation).max() < 1e-8


@pytest.mark.parametrize("spelling", ["sigmoid", "tanh"])
def test_right_values_have_small_errors_at_every_tap(
    spelling: str, model: onnx.ModelProto, feeds: dict[str, np.ndarray]
) -> None:
    tapped = tapped_model(with_tanh(model) if spelling == "tanh" else model)
    table = accuracy_table(model, feeds, run_onnx(tapped, feeds))
    assert [(row["layer"], row["tensor"]) for row in table] == [(i, t) for i in range(NUM_LAYERS) for t in TENSORS]
    for row in table:
        assert 0 < row["own_median"] <= row["own_worst"] < 1e-5, row
        assert row["total_median"] <= row["total_worst"] < 1e-4, row


def test_a_wrong_step_shows_in_its_own_error_and_in_all_later_totals(
    model: onnx.ModelProto, feeds: dict[str, np.ndarray]
) -> None:
    outputs = run_onnx(tapped_model(model), feeds)
    first = layer_taps(model)[0]
    u = slice(0, first.widths[0])
    outputs[first.silu][3, u] *= np.float32(1.001)
    table = {(row["layer"], row["tensor"]): row for row in accuracy_table(model, feeds, outputs)}
    assert table[0, "u"]["own_worst"] == pytest.approx(table[0, "u"]["total_worst"], rel=1e-3)
    assert table[0, "u"]["own_worst"] > 1e-3
    assert table[0, "u"]["own_worst_row"] == 3
    assert table[0, "v"]["own_worst"] < 1e-5
    # The gate reads u: what the layer made of the right u is not what float64 makes of the wrong one.
    assert table[0, "result"]["own_worst_row"] == 3
    assert table[0, "result"]["own_worst"] > 1e-5 > table[0, "result"]["total_worst"]


def test_the_control_has_no_sigmoid_left_for_the_lowering(model: onnx.ModelProto) -> None:
    lowered, records = lowered_for_tensorrt8(tapped_model(with_tanh(model)), "fp32", native=False, has_cublas=False)
    counts = {record.name: record.counts for record in records}
    assert counts["spell_out_sigmoid"] == {"silus": 0, "sigmoids": 0}
    assert [node.op_type for node in lowered.graph.node].count("Tanh") == NUM_LAYERS
    plain, _ = lowered_for_tensorrt8(tapped_model(model), "fp32", native=False, has_cublas=False)
    assert {value.name for value in plain.graph.output} == {value.name for value in lowered.graph.output}
    assert len(plain.graph.output) == 1 + 1 + 4 * NUM_LAYERS


def test_functions_are_measured_relative_to_their_values() -> None:
    x = np.linspace(-20, 20, 2000).astype(np.float32)
    exact = run_onnx(function_model(), {"x": x})
    right = function_errors(x, exact)
    assert set(right) == set(FUNCTIONS)
    assert right["exp"]["worst"] < 1e-5
    assert right["silu_by_exp"]["worst"] < 1e-5
    # Cancellation: whatever tanh is, this form has no digits left far below 0.
    assert right["silu_by_tanh"]["worst"] > 1e-2
    assert right["silu_by_tanh"]["worst_x"] < -10
    wrong = function_errors(x, {**exact, "tanh": exact["tanh"] * np.float32(1 + 1e-4)})
    assert wrong["tanh"]["median"] == pytest.approx(1e-4, rel=0.05)
    lowered, _ = lowered_for_tensorrt8(function_model(), "fp32", native=True)
    assert [node.op_type for node in lowered.graph.node] == [node.op_type for node in function_model().graph.node]
