"""Quantisation around products: as many as planned, the planned integers, and the numbers of the eager reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from hstu_compile.artifacts import OnnxGraph
from hstu_compile.calibration.batches import retrieval_batches
from hstu_compile.calibration.ranking_batches import ranking_batches
from hstu_compile.compare import whole_error
from hstu_compile.config import Quantization
from hstu_compile.errors import InternalError, RewriteError
from hstu_compile.export import exported_from_served
from hstu_compile.graph_facts import graph_facts
from hstu_compile.model.fake_quantization import fake_quantized, product_weights
from hstu_compile.model.families import HstuModel
from hstu_compile.quantized import QuantizationPlan, quantized_weight
from hstu_compile.rewrite import RowSelection, apply_passes, export_passes, quantized_sites
from hstu_compile.rewrite.lower_tensorrt8 import lowered_for_tensorrt8
from hstu_compile.rewrite.quantize_products import QuantizeProducts
from hstu_compile.runtime.session import open_session
from hstu_compile.served import ServedGraph, served_graphs
from tests.calibrated_models import quantization_plan
from tests.dlrm_reference import DlrmForm
from tests.exported_models import ranking_model, research_model

FORM = DlrmForm(additional=("movie_category",), contextual=(("user_id", 1, 20),))
KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])
CODE_TYPES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of one family, its first graph as exported in float16, and requests to it."""

    exact: HstuModel
    model: HstuModel
    served: ServedGraph
    exported: OnnxGraph
    selection: RowSelection
    requests: list[dict[str, Any]]

    def plan(self, kind: Quantization, **options: Any) -> QuantizationPlan:
        return quantization_plan(self.exact, self.requests, kind, **options)

    def rewritten(self, plan: QuantizationPlan | None, *, prune: bool = True, fuse: bool = True) -> OnnxGraph:
        selection = self.selection if prune else None
        passes = export_passes(
            self.served.num_attention, self.served.taps, selection, fuse_norms=fuse, quantization=plan
        )
        *_, last = apply_passes(self.exported, passes)
        return last

    def counts(self, graph: OnnxGraph) -> dict[str, int]:
        return next(record.counts for record in graph.passes if record.name == QuantizeProducts.name)


@pytest.fixture(scope="module", params=["retrieval", "ranking"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "retrieval":
        exact, model = research_model("fp32"), research_model("fp16")
        requests = [batch.arrays for batch in retrieval_batches(model.config, 8, 8, 1 << 20)]
        selection = RowSelection()
    else:
        exact, model = ranking_model(FORM), ranking_model(FORM, torch.float16)  # type: ignore[assignment]
        requests = [batch.arrays for batch in ranking_batches(model.config, 8, 4, 1 << 20)]  # type: ignore[arg-type]
        selection = RowSelection(model.config.max_candidates, "candidate_offsets")  # type: ignore[attr-defined]
    served = served_graphs(model)[0]
    return Case(exact, model, served, exported_from_served(served, "fp16"), selection, requests)


def constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


@KINDS
def test_count_equals_the_plan_and_a_second_run_counts_nothing(case: Case, kind: Quantization) -> None:
    plan = case.plan(kind)
    graph = case.rewritten(plan, prune=False)
    assert case.counts(graph) == {"products": len(plan.sites), "folded": 0, "scaled": 0}
    assert quantized_sites(graph.model, plan) == set(plan.sites)
    before = graph.model.SerializeToString(deterministic=True)
    assert not QuantizeProducts(plan).call(graph.model).modified
    assert graph.model.SerializeToString(deterministic=True) == before
    counted = graph_facts(graph.model)["precision_counts"]
    assert counted[f"MatMul {kind}"] == len(plan.sites)


@KINDS
def test_pruning_splits_one_product_into_two_of_the_same_integers(case: Case, kind: Quantization) -> None:
    plan = case.plan(kind)
    whole, pruned = case.rewritten(plan, prune=False), case.rewritten(plan)
    assert case.counts(pruned)["products"] == len(plan.sites) + 1
    last = f"model.layers.{case.model.config.num_layers - 1}.uvqk_weight"
    for what in (kind, "scales"):
        complete = constants(whole.model)[f"{last}/{what}"]
        parts = [constants(pruned.model)[f"{last}{part}/{what}"] for part in ("/vk", "/uq")]
        sizes = [part.dims[-1] for part in parts]
        assert sum(sizes) == complete.dims[-1]
        columns = {bytes(c) for c in np.atleast_2d(raw(complete)).T}
        assert {bytes(c) for part in parts for c in np.atleast_2d(raw(part)).T} == columns


def raw(tensor: TensorProto) -> np.ndarray:
    width = {TensorProto.FLOAT16: np.uint16}.get(tensor.data_type, np.uint8)
    return np.frombuffer(tensor.raw_data, width).reshape(tuple(tensor.dims))


@KINDS
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_graph_holds_the_integers_of_the_reference_and_usable_scales(
    case: Case, kind: Quantization, alpha: float | None
) -> None:
    plan = case.plan(kind, smooth_alpha=alpha)
    model = case.rewritten(plan, prune=False).model
    weights, held = product_weights(case.exact), constants(model)
    for site, scales in plan.sites.items():
        expected = quantized_weight(weights[site].matrix, kind, scales.smoothing)
        name = f"model.{scales.weight_name}"
        assert held[f"{name}/{kind}"].data_type == CODE_TYPES[kind]
        assert held[f"{name}/{kind}"].raw_data == expected.codes.tobytes()
        per_column = numpy_helper.to_array(held[f"{name}/scales"])
        assert per_column.dtype == np.float16
        np.testing.assert_array_equal(per_column.astype(np.float32), expected.scales)
        assert (per_column > 0).all()
        assert np.isfinite(per_column).all()
        scale = numpy_helper.to_array(held[f"{name}/input_scale"])
        assert scale.dtype == np.float16
        assert float(scale) == scales.input_scale > 0
        assert name not in held, "the weight is stored as codes alone"
    zeros = [tensor for name, tensor in held.items() if name.endswith(("/zeros", "_zero"))]
    assert len(zeros) == len(plan.sites) + 1
    assert not any(any(tensor.raw_data) for tensor in zeros)


@KINDS
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_onnxruntime_gives_the_numbers_of_the_reference(case: Case, kind: Quantization, alpha: float | None) -> None:
    plan = case.plan(kind, smooth_alpha=alpha)
    assert_equals_reference(case, plan, case.rewritten(plan).model)


@pytest.mark.parametrize("fuse", [True, False])
def test_smoothing_goes_into_norms_that_reach_a_product_linearly(case: Case, fuse: bool) -> None:
    plan = case.plan("int8", smooth_alpha=0.5)
    graph = case.rewritten(plan, fuse=fuse)
    counts = case.counts(graph)
    layers = case.model.config.num_layers
    # Of each layer the input norm, once more for the pruned rows; gated outputs where they are one operator with their
    # norm and nothing is concatenated.
    gated = layers if fuse and case.model.config.layer.output_concat == "gated" else 0
    assert counts["folded"] == layers + 1 + gated
    assert counts["folded"] + counts["scaled"] == counts["products"] == len(plan.sites) + 1
    assert (
        sum(tensor.name.endswith("/inverse_smoothing") for tensor in graph.model.graph.initializer)
        == (counts["scaled"])
    )
    assert_equals_reference(case, plan, graph.model)


def assert_equals_reference(case: Case, plan: QuantizationPlan, model: onnx.ModelProto) -> None:
    """Within twice the error of eager float16 with the same rounding, and nearer to that than to no quantisation."""
    main = case.served.outputs[-1]
    doubled = type(case.exact)(case.exact.config)  # type: ignore[arg-type]
    doubled.load_state_dict(case.exact.state_dict())
    exact_graph = served_graphs(doubled.eval().requires_grad_(False).cast(torch.float64))[0]
    with fake_quantized(doubled, plan), fake_quantized(case.model, plan):
        exact = [exact_graph.run(arrays)[main] for arrays in case.requests]
        eager = [case.served.run(arrays)[main] for arrays in case.requests]
    plain = [exact_graph.run(arrays)[main] for arrays in case.requests]
    with open_session("onnxruntime", onnx=model) as session:
        actual = [session.run(arrays)[main] for arrays in case.requests]
    assert whole_error(actual, exact) <= 2 * whole_error(eager, exact)
    assert whole_error(actual, exact) < whole_error(actual, plain)


def test_products_that_stay_are_not_touched(case: Case) -> None:
    kept = "layers.0.uvqk"
    plan = case.plan("int8", keep=[kept])
    model = case.rewritten(plan).model
    assert "model.layers.0.uvqk_weight" in constants(model)
    assert quantized_sites(model, plan) == set(plan.sites)
    assert kept not in plan.sites


def test_a_constant_that_is_read_otherwise_is_refused(case: Case) -> None:
    plan = case.plan("int8")
    model = case.rewritten(None, prune=False).model
    name = "model.layers.0.uvqk_weight"
    model.graph.node.append(onnx.helper.make_node("Transpose", [name], ["transposed"]))
    wanted = len(plan.sites)
    with pytest.raises(RewriteError, match=f"changed {wanted} of {wanted + 1} products"):
        QuantizeProducts(plan).call(model)


def test_a_float32_graph_is_a_bug_of_ours() -> None:
    exact = research_model("fp32")
    requests = [batch.arrays for batch in retrieval_batches(exact.config, 4, 4, 1 << 20)]
    plan = quantization_plan(exact, requests, "int8")
    served = served_graphs(exact)[0]
    passes = export_passes(served.num_attention, served.taps, quantization=plan)
    with pytest.raises(InternalError, match="quantised graphs are float16"):
        list(apply_passes(exported_from_served(served, "fp32"), passes))


@pytest.mark.parametrize("has_cublas", [True, False])
def test_tensorrt_8_gets_convolutions_with_quantisation_on_both_operands(case: Case, has_cublas: bool) -> None:
    plan = case.plan("int8", smooth_alpha=0.5)
    graph = case.rewritten(plan, prune=case.served.name == "packed")
    lowered, records = lowered_for_tensorrt8(graph.model, "fp16", native=True, has_cublas=has_cublas)
    wanted = case.counts(graph)["products"]
    counts = {record.name: record.counts for record in records}["project_by_convolution"]
    assert counts["quantized"] == wanted
    producers = {name: node for node in lowered.graph.node for name in node.output}
    held = constants(lowered)
    found = 0
    for node in (node for node in lowered.graph.node if node.op_type == "Conv"):
        operands = [producers.get(name) for name in node.input[:2]]
        if operands[1] is None:
            assert not has_cublas
            continue
        found += 1
        for operand in operands:
            assert operand is not None
            assert operand.op_type == "DequantizeLinear"
            rounding = producers[operand.input[0]]
            assert rounding.op_type == "QuantizeLinear"
            # What the parser of TensorRT 8.5 insists on, and what it reads wrongly otherwise.
            for each in (operand, rounding):
                assert len(each.input) == 3
                assert held[each.input[1]].data_type == TensorProto.FLOAT
                assert held[each.input[2]].data_type == TensorProto.INT8
                assert list(held[each.input[1]].dims) == list(held[each.input[2]].dims)
        weights = producers[operands[1].input[0]]  # type: ignore[union-attr]
        assert [a.i for a in weights.attribute if a.name == "axis"] == [0]
        steps = numpy_helper.to_array(held[weights.input[0]])[:, :, 0, 0].T / numpy_helper.to_array(
            held[weights.input[1]]
        )
        assert np.array_equal(steps, np.rint(steps)), "its quantisation must give the codes back"
    assert found == wanted
    unread = set(held) - {name for node in lowered.graph.node for name in node.input}
    assert not {name for name in unread if "/int8" in name or "/zeros" in name}
    inputs = {value.name: value.type.tensor_type.elem_type for value in lowered.graph.input}
    exact = [run(graph.model, arrays) for arrays in case.requests]
    narrowed = [
        {name: a.astype(np.int32) if inputs[name] == TensorProto.INT32 else a for name, a in arrays.items()}
        for arrays in case.requests
    ]
    actual = [run(lowered, arrays) for arrays in narrowed]
    # The same integers; sums that are rounded once instead of twice may put a value on the other side of a step.
    assert whole_error(actual, exact) <= 0.05


def run(model: onnx.ModelProto, arrays: dict[str, Any]) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    main = session.get_outputs()[0].name
    return np.asarray(session.run([main], arrays)[0], np.float64)


def test_tensorrt_8_refuses_float8_by_name(case: Case) -> None:
    graph = case.rewritten(case.plan("fp8"), prune=False)
    with pytest.raises(RewriteError, match="tensors are float8e4m3fn"):
        lowered_for_tensorrt8(graph.model, "fp16", native=True)


def test_tensorrt_8_refuses_scales_that_its_parser_would_misread(case: Case) -> None:
    graph = case.rewritten(case.plan("int8"), prune=False)
    [product, *_] = (
        node for node in graph.model.graph.node if node.op_type == "MatMul" and "/dequantized" in node.input[1]
    )
    product.input[0], product.input[1] = product.input[1], product.input[0]
    # Operands that no convolution can be made of: their scales would stay float16.
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    with pytest.raises(RewriteError, match="its scale is not float32"):
        lowered_for_tensorrt8(model, "fp16", native=True)
