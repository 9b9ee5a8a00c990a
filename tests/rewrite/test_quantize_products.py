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
from hstu_compile.graph_facts import graph_facts
from hstu_compile.model.fake_quantization import fake_quantized, product_weights
from hstu_compile.model.families import HstuModel
from hstu_compile.quantized import QuantizationPlan, SiteScales, levels_of, quantized_weight, rounded_to_grid
from hstu_compile.rewrite import RowSelection, apply_passes, export_passes, quantized_sites
from hstu_compile.rewrite.lower_tensorrt8 import lowered_for_tensorrt8
from hstu_compile.rewrite.quantize_products import QuantizeProducts
from hstu_compile.runtime.session import open_session
from hstu_compile.served import ServedGraph, served_graphs
from tests.calibrated_models import quantization_plan
from tests.exported_models import (
    TOP_K,
    ranking_model,
    research_model,
    small_config,
    small_model,
    traced_ranking,
    traced_research,
    traced_retrieval,
)
from tests.segmented_cases import WIDE_FORM

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
    # The graphs are traced for other tests as well; the models are of this test alone, which hooks into their products.
    if request.param == "retrieval":
        _, _, exported = traced_research("fp16")
        exact, model = research_model("fp32"), research_model("fp16")
        requests = [batch.arrays for batch in retrieval_batches(model.config, 8, 8, 1 << 20)]
        selection = RowSelection()
    else:
        _, _, exported = traced_ranking(WIDE_FORM, "fp16", "packed")
        exact, model = ranking_model(WIDE_FORM), ranking_model(WIDE_FORM, torch.float16)  # type: ignore[assignment]
        requests = [batch.arrays for batch in ranking_batches(model.config, 8, 4, 1 << 20)]  # type: ignore[arg-type]
        selection = RowSelection(model.config.max_candidates, "candidate_offsets")  # type: ignore[attr-defined]
    return Case(exact, model, served_graphs(model, TOP_K)[0], exported, selection, requests)


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
    for what in (kind, "column_factors"):
        complete = constants(whole.model)[f"{last}/{what}"]
        parts = [constants(pruned.model)[f"{last}{part}/{what}"] for part in ("/vk", "/uq")]
        sizes = [part.dims[-1] for part in parts]
        assert sum(sizes) == complete.dims[-1]
        columns = {bytes(c) for c in np.atleast_2d(raw(complete)).T}
        if what == kind:
            assert {bytes(c) for part in parts for c in np.atleast_2d(raw(part)).T} == columns
    # A part may have another common scale; what a column's codes are multiplied with is the same.
    complete, *parts = (
        column_scales(g.model, f"{last}{part}") for g, part in ((whole, ""), (pruned, "/vk"), (pruned, "/uq"))
    )
    assert sorted(complete) == sorted(np.concatenate(parts))


def column_scales(model: onnx.ModelProto, weight: str) -> np.ndarray:
    """[outputs] what the graph multiplies the codes of each column with, in front of the product and behind it."""
    common, factors = (
        numpy_helper.to_array(constants(model)[f"{weight}/{what}"]) for what in ("scale", "column_factors")
    )
    assert common.dtype == factors.dtype == np.float16
    assert common.shape == ()
    return factors.astype(np.float64) * float(common)


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
        per_column = column_scales(model, name)
        np.testing.assert_array_equal(per_column, expected.scales)
        assert (per_column > 0).all()
        assert np.isfinite(per_column).all()
        scale = numpy_helper.to_array(held[f"{name}/input_scale"])
        assert scale.dtype == np.float16
        assert float(scale) == scales.input_scale > 0
        assert name not in held, "the weight is stored as codes alone"
    zero = held[f"{kind}_zero"]
    assert (list(zero.dims), zero.data_type, zero.raw_data) == ([], CODE_TYPES[kind], b"\0")


@KINDS
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_nothing_that_is_stored_per_column_stands_in_front_of_a_product(
    case: Case, kind: Quantization, alpha: float | None
) -> None:
    """TensorRT-RTX would round the sums of codes to float16 before it scales them: infinite from 65520 on."""
    graph = case.rewritten(case.plan(kind, smooth_alpha=alpha)).model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers = {name: [each for each in graph.node if name in each.input] for name in producers}
    described = {value.name: value.type.tensor_type for value in graph.value_info}
    products = [n for n in graph.node if n.op_type == "MatMul" and n.input[1].endswith("/dequantized")]
    assert products
    for node in products:
        operands = [producers[name] for name in node.input]
        assert [operand.op_type for operand in operands] == ["DequantizeLinear"] * 2
        assert not any(held[name].dims for operand in operands for name in operand.input[1:])
        assert not any(operand.attribute for operand in operands), "an axis means scales for each column"
        [scaling] = readers[node.output[0]]
        assert scaling.op_type == "Mul"
        factors = held[scaling.input[1]]
        assert list(factors.dims) == [held[operands[1].input[0]].dims[1]]
        product = described[node.output[0]]
        assert product.elem_type == TensorProto.FLOAT16
        assert product.shape.dim[-1].dim_value == factors.dims[0]
        # No activation can bring a sum beyond float16, before or behind the factors.
        codes = levels(held[operands[1].input[0]])
        scale, common = (float(numpy_helper.to_array(held[each.input[1]])) for each in operands)
        worst = np.where(codes > 0, 1.0, -1.0).T * (128 if kind == "int8" else 448)  # of each column its own
        sums = np.einsum("nk,kn->n", worst, codes) * scale * common
        with np.errstate(over="ignore"):
            assert np.isfinite(sums.astype(np.float16)).all()
            assert np.isfinite((sums * numpy_helper.to_array(factors)).astype(np.float16)).all()


def levels(codes: TensorProto) -> np.ndarray:
    """[inputs, outputs] float64."""
    kind: Quantization = "int8" if codes.data_type == TensorProto.INT8 else "fp8"
    stored = np.frombuffer(codes.raw_data, np.int8 if kind == "int8" else np.uint8)
    return levels_of(stored, kind).reshape(tuple(codes.dims))


@KINDS
def test_one_product_of_large_sums_and_unlike_columns_in_onnxruntime(kind: Quantization) -> None:
    """Sums of codes far beyond float16, columns whose scales are 2**12 apart, and one of zeros, against float64."""
    rng = np.random.default_rng(5)
    inputs, outputs, rows = 512, 24, 16
    matrix = rng.uniform(0.2, 1, (inputs, outputs)) * np.exp2(-rng.integers(0, 13, outputs).astype(np.float64))
    matrix[:, 3], matrix[:, :2] = 0, 1
    matrix = matrix.astype(np.float16)
    scale = 0.0546875
    plan = QuantizationPlan(kind, {"layers.0.uvqk": SiteScales("w", scale, quantized_weight(matrix, kind).scales)}, {})
    value = lambda name, shape: onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)  # noqa: E731
    nodes = [onnx.helper.make_node("MatMul", ["x", "model.w"], ["y"], name="product")]
    ends = [value("x", ["R", inputs])], [value("y", ["R", outputs])]
    constant = numpy_helper.from_array(matrix, "model.w")
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", *ends, [constant]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    assert QuantizeProducts(plan).call(model).counts["products"] == 1
    onnx.checker.check_model(model, full_check=True)
    x = (scale * rng.integers(64, 128, (rows, inputs))).astype(np.float16)
    integers = rounded_to_grid(x.astype(np.float64) / scale, kind)
    quantized = quantized_weight(matrix, kind)
    assert (integers @ levels_of(quantized.codes, kind)).max() > 40 * 65504
    expected = scale * integers @ quantized.values()
    actual = run(model, {"x": x})
    assert (actual[:, 3] == 0).all()
    # Two roundings to float16, and float32's sum of 512 terms.
    np.testing.assert_allclose(actual, expected, rtol=2 * 2.0**-11 + 512 * 2.0**-24, atol=2.0**-24)


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
    main = "user_embeddings" if case.served.name == "retrieval" else case.served.outputs[-1]
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
    _, served, exported = traced_retrieval(small_config(), "fp32")
    exact = small_model(small_config())
    requests = [batch.arrays for batch in retrieval_batches(exact.config, 4, 4, 1 << 20)]
    plan = quantization_plan(exact, requests, "int8")
    passes = export_passes(served.num_attention, served.taps, quantization=plan)
    with pytest.raises(InternalError, match="quantised graphs are float16"):
        list(apply_passes(exported, passes))


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
    found, lowered_scales = 0, []
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
        assert not any("/column_factors" in name for name in node.input), "filters have scales of their own"
        weights = producers[operands[1].input[0]]  # type: ignore[union-attr]
        assert [a.i for a in weights.attribute if a.name == "axis"] == [0]
        steps = numpy_helper.to_array(held[weights.input[0]])[:, :, 0, 0].T / numpy_helper.to_array(
            held[weights.input[1]]
        )
        assert np.array_equal(steps, np.rint(steps)), "its quantisation must give the codes back"
        lowered_scales.append(numpy_helper.to_array(held[weights.input[1]]))
    assert found == wanted
    unread = set(held) - {name for node in lowered.graph.node for name in node.input}
    assert not {name for name in unread if "/int8" in name or "/scale" in name or "/column_factors" in name}
    # Each filter has its column's scale, to the bit.
    weights_of = {
        tensor.name.removesuffix("/int8") for tensor in graph.model.graph.initializer if "/int8" in tensor.name
    }
    expected = [column_scales(graph.model, name).astype(np.float32) for name in weights_of]
    assert {scales.tobytes() for scales in lowered_scales} == {scales.tobytes() for scales in expected}
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
