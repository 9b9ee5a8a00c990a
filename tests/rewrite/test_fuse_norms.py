"""Norms and their neighbours as one operator: the same bits, counted, and nothing that somebody else reads is taken."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import OnnxGraph, Precision
from hstu_compile.calibration.ranking_batches import prefill_arrays, ranking_batch, score_arrays
from hstu_compile.op_schema import is_norm, node_attributes, register_onnx_schema
from hstu_compile.rewrite import PruneLastLayer, RowSelection, apply_passes, export_passes
from hstu_compile.rewrite.annotate_attention import AnnotateAttention
from hstu_compile.rewrite.attach_native_body import AttachNativeBody
from hstu_compile.rewrite.detach_taps import DetachTaps
from hstu_compile.rewrite.fuse_norms import FuseNorms
from hstu_compile.rewrite.merge_duplicates import MergeDuplicates
from hstu_compile.served import ServedGraph, prefill_graph
from tests.dlrm_reference import DlrmForm
from tests.exported_models import MICRO_BATCH, request_batch, small_config, traced_ranking, traced_retrieval, with_layer
from tests.oracle import Array
from tests.rewrite.attention_graphs import run_onnx
from tests.segmented_cases import WIDE_FORM

register_onnx_schema()

FORMS = {"layer": WIDE_FORM, "group": DlrmForm(group_norm=True)}
RETRIEVAL = {
    "research": small_config(),
    "concat_ua, affine": with_layer(
        small_config(), uvqk_bias=True, input_norm_affine=True, output_norm_affine=True, output_concat="u_norm_gated"
    ),
}
#: Of each graph: norms alone, with a gate, with a swish.
COUNTS = {
    ("layer", "packed"): (6, 2, 4),
    ("layer", "prefill"): (4, 1, 2),
    ("layer", "score"): (6, 2, 4),
    ("group", "packed"): (6, 2, 4),
    ("group", "prefill"): (4, 1, 2),
    ("group", "score"): (6, 2, 4),
    ("research", "retrieval"): (2, 2, 0),
    ("concat_ua, affine", "retrieval"): (2, 2, 0),
}
#: Each is traced, for seconds, some of them for other tests as well. These have between them every form and graph; the
#: rest repeats them, and bfloat16, whose fused graphs builds of every run verify.
QUICK = (
    ("layer", "packed", "fp16"),
    ("layer", "prefill", "fp16"),
    ("group", "score", "fp16"),
    ("research", "retrieval", "fp32"),
    ("concat_ua, affine", "retrieval", "fp16"),
)


def real_graphs(*precisions: Precision) -> list[Any]:
    """Every model, graph and precision; those that are not quick as slow tests."""
    return [
        pytest.param(*each, precision, marks=[] if (*each, precision) in QUICK else pytest.mark.slow)
        for each in COUNTS
        for precision in precisions
        # NumPy has no bfloat16 for the cached keys of a scoring pass.
        if (each[1], precision) != ("score", "bf16")
    ]


def traced(model: str, graph: str, precision: Precision) -> tuple[Any, ServedGraph, OnnxGraph]:
    if model in FORMS:
        return traced_ranking(FORMS[model], precision, graph)
    return traced_retrieval(RETRIEVAL[model], precision, graph)


@functools.cache
def served(model: str, graph: str, precision: Precision) -> tuple[ServedGraph, OnnxGraph, dict[str, Array]]:
    """A graph, as exported and stripped of its taps, with inputs."""
    made, found, exported = traced(model, graph, precision)
    if model in FORMS:
        packed = ranking_batch("drawn", made.config, [0, 6, 20, 1], [3, 2, 4, 1], seed=2).arrays
        if graph == "packed":
            feeds = packed
        elif graph == "prefill":
            feeds = prefill_arrays(made.config, packed)
        else:
            half = np.float16 if precision == "fp16" else np.float32
            prefill = prefill_graph(made)
            cached = prefill.run(prefill_arrays(made.config, packed))
            cached = {name: cached[name].astype(half) for name in prefill.outputs}
            feeds = score_arrays(made.config, packed, cached, MICRO_BATCH)
    else:
        feeds = request_batch((0, 7, 20, 1))
        feeds["item_ids"] = feeds["item_ids"] % 40 + 1
    count = found.num_attention
    *_, graph_of = apply_passes(exported, (DetachTaps(found.taps), AnnotateAttention(count), AttachNativeBody(count)))
    return found, graph_of, feeds


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@pytest.mark.parametrize(("model", "graph", "precision"), real_graphs("fp32", "fp16"))
def test_every_norm_of_a_real_graph_is_fused_and_no_bit_of_any_result_or_tap_changes(
    model: str, graph: str, precision: Precision
) -> None:
    found, before, feeds = served(model, graph, precision)
    fused = copied(before.model)
    step = FuseNorms(found.taps)
    assert tuple(step.call(fused).counts.values()) == COUNTS[model, graph]
    onnx.checker.check_model(fused, full_check=True)
    assert not any(node.op_type == "LayerNormalization" for node in fused.graph.node)
    expected, actual = (run_onnx(each, feeds, found.taps) for each in (before.model, fused))
    assert set(found.taps) < set(expected)
    for name, value in expected.items():
        assert value.size
        np.testing.assert_array_equal(actual[name].view(np.uint8), value.view(np.uint8), err_msg=name)


@pytest.mark.parametrize(("model", "graph", "precision"), real_graphs("fp32", "fp16", "bf16"))
def test_inlined_and_merged_the_graph_is_the_one_that_was(model: str, graph: str, precision: Precision) -> None:
    """What a runtime without the plugin builds: operator for operator what it built before the pass."""
    found, before, _ = served(model, graph, precision)
    fused, plain = copied(before.model), copied(before.model)
    FuseNorms(found.taps).call(fused)
    kinds = []
    for each in (plain, fused):
        inlined = onnx.inliner.inline_local_functions(each)
        MergeDuplicates().call(inlined)
        kinds.append(Counter(n.op_type for n in inlined.graph.node if n.op_type not in ("Constant", "Identity")))
    if model == "group":
        kinds[0]["Reshape"] = kinds[1]["Reshape"]  # the body goes back to rows before the factors, not behind them
    assert kinds[0] == kinds[1]


def test_a_second_run_changes_nothing() -> None:
    found, before, _ = served("layer", "packed", "fp16")
    fused = copied(before.model)
    FuseNorms(found.taps).call(fused)
    again = copied(fused)
    assert not FuseNorms(found.taps).call(again).modified
    assert again == fused


def test_in_half_precision_a_layer_is_a_norm_and_a_gate_in_half_memory_with_the_silu_inside() -> None:
    for model, graph, groups in (("layer", "packed", 1), ("group", "score", 2)):
        found, before, _ = served(model, graph, "fp16")
        fused = copied(before.model)
        FuseNorms(found.taps).call(fused)
        attributes = [node_attributes(node) for node in fused.graph.node if is_norm(node)]
        if graph == "packed":
            assert sum(each["input_type"] == 1 for each in attributes) == len(attributes)
            shifted = [each["activation"] for each in attributes if each["has_shift"]]
            assert shifted.count(2) == 4  # every MLP adds the bias of its projection in front of its norm
        gates = [each for each in attributes if each["activation"] == 1]
        wanted = {"gate_silu": 1, "concat": 1, "num_groups": groups, "input_type": 1, "output_type": 1}
        wanted |= {"has_shift": 0, "has_bias": 1}
        assert len(gates) == 2
        assert all(wanted.items() <= each.items() for each in gates)


@pytest.mark.parametrize(
    ("model", "graph", "norms"),
    # Candidates' rows take seconds more, and differ in what selects them, which is tested with the pruning.
    [("research", "retrieval", 3), pytest.param("layer", "packed", 7, marks=pytest.mark.slow)],
)
def test_norms_are_fused_behind_pruning_whose_rows_are_split(model: str, graph: str, norms: int) -> None:
    found, before, feeds = served(model, graph, "fp32")
    selection = RowSelection(found.max_candidates, "candidate_offsets") if graph == "packed" else RowSelection()
    passes = export_passes(found.num_attention, found.taps, selection)
    names = [step.name for step in passes]
    assert names.index(PruneLastLayer.name) < names.index(FuseNorms.name)
    *_, last = apply_passes(traced(model, graph, "fp32")[2], passes)
    assert {record.name: record.counts for record in last.passes}["fuse_norms"]["norms"] == norms
    expected = run_onnx(before.model, feeds)
    for name, value in run_onnx(last.model, feeds).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


# --- Small graphs -----------------------------------------------------------------------------------------------------

WIDTH = 6


def small_model_of(nodes: list[onnx.NodeProto], outputs: dict[str, int], **columns: int) -> onnx.ModelProto:
    """Rows x and gate [R, 6] in half precision, x32 in float32; scale, bias and shift as constants."""
    rng = np.random.default_rng(3)
    half, wide = TensorProto.FLOAT16, TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info(name, kind, ["R", WIDTH])
        for name, kind in (("x", half), ("gate", half), ("x32", wide))
    ]
    constants = [
        numpy_helper.from_array(rng.normal(1, 0.3, WIDTH).astype(np.float32), name)
        for name in ("scale", "bias", "shift")
    ]
    values = [
        helper.make_tensor_value_info(name, kind, ["R", columns.get(name, WIDTH)]) for name, kind in outputs.items()
    ]
    graph = helper.make_graph(nodes, "norm", inputs, values, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def node(op_type: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=output, **attributes)


def layer_norm(x: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return node("LayerNormalization", f"{x} scale bias", output, axis=-1, epsilon=1e-5, **attributes)


TO_WIDE, TO_HALF = {"to": TensorProto.FLOAT}, {"to": TensorProto.FLOAT16}
SWISH = [
    node("Cast", "x", "xw", **TO_WIDE),
    node("Add", "shift xw", "v", **{}),
    layer_norm("v", "n"),
    node("Sigmoid", "n", "s"),
    node("Mul", "s v", "y"),
    node("Cast", "y", "out", **TO_HALF),
]
GATE = [
    node("Cast", "gate", "gw", **TO_WIDE),
    node("Sigmoid", "gw", "gs"),
    node("Mul", "gw gs", "gm"),
    node("Cast", "gm", "u", **TO_HALF),
    node("Cast", "x", "xw", **TO_WIDE),
    layer_norm("xw", "n"),
    node("Cast", "u", "uw", **TO_WIDE),
    node("Mul", "uw n", "y"),
    node("Cast", "y", "yh", **TO_HALF),
    node("Concat", "u x yh", "out", axis=1),
]


def fused_of(model: onnx.ModelProto, taps: tuple[str, ...] = ()) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """A fused copy that gives the same bits, and the attributes of its norms."""
    fused = copied(model)
    FuseNorms(taps).call(fused)
    rng = np.random.default_rng(5)
    rows = {name: rng.normal(0, 2, (9, WIDTH)).astype(np.float16) for name in ("x", "gate")}
    feeds = {**rows, "x32": rows["x"].astype(np.float32) * 1.001}
    after = run_onnx(fused, feeds)
    for name, value in run_onnx(model, feeds).items():
        np.testing.assert_array_equal(after[name].view(np.uint8), value.view(np.uint8), err_msg=name)
    return fused, [node_attributes(each) for each in fused.graph.node if is_norm(each)]


def test_the_whole_swish_is_one_node() -> None:
    fused, (attributes,) = fused_of(small_model_of(SWISH, {"out": TensorProto.FLOAT16}))
    assert len(fused.graph.node) == 1
    assert list(fused.graph.node[0].input) == ["x", "shift", "scale", "bias"]
    assert attributes == pytest.approx(
        {
            "epsilon": 1e-5,
            "num_groups": 1,
            "activation": 2,
            "gate_silu": 0,
            "concat": 0,
            "input_type": 1,
            "output_type": 1,
            "has_shift": 1,
            "has_bias": 1,
        }
    )
    assert {info.name for info in fused.graph.value_info} == set()


def test_the_whole_gate_is_one_node() -> None:
    fused, (attributes,) = fused_of(small_model_of(GATE, {"out": TensorProto.FLOAT16}, out=3 * WIDTH))
    assert len(fused.graph.node) == 1
    assert list(fused.graph.node[0].input) == ["x", "scale", "bias", "gate"]
    assert (attributes["activation"], attributes["gate_silu"], attributes["concat"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("tap", "nodes", "found"),
    [
        ("v", 2, {"has_shift": 0, "activation": 2, "input_type": 0, "output_type": 1}),
        ("n", 4, {"has_shift": 0, "activation": 0, "input_type": 0, "output_type": 0}),
        ("s", 3, {"has_shift": 0, "activation": 0, "input_type": 0, "output_type": 0}),
        ("y", 2, {"has_shift": 1, "activation": 2, "input_type": 1, "output_type": 0}),
    ],
)
def test_a_value_that_is_a_tap_or_an_output_stays(tap: str, nodes: int, found: dict[str, int]) -> None:
    half, wide = TensorProto.FLOAT16, TensorProto.FLOAT
    tapped, (as_tap,) = fused_of(small_model_of(SWISH, {"out": half}), (tap,))
    _, (as_output,) = fused_of(small_model_of(SWISH, {"out": half, tap: wide}))
    assert tap in {name for each in tapped.graph.node for name in each.output}
    assert as_tap == as_output
    assert found.items() <= as_tap.items()
    if tap in ("v", "y"):
        assert sum(not is_norm(each) for each in tapped.graph.node) == nodes - (tap == "y")


@pytest.mark.parametrize(
    ("tap", "kind", "found"),
    [
        ("u", "half", {"activation": 1, "gate_silu": 0, "concat": 1}),
        ("gm", "wide", {"activation": 1, "gate_silu": 0, "concat": 1}),
        ("n", "wide", {"activation": 0, "output_type": 0}),
        ("y", "wide", {"activation": 1, "gate_silu": 0, "concat": 0, "output_type": 0}),
        ("yh", "half", {"activation": 1, "gate_silu": 0, "concat": 0, "output_type": 1}),
    ],
)
def test_a_gate_ends_where_somebody_else_reads(tap: str, kind: str, found: dict[str, int]) -> None:
    half, wide = TensorProto.FLOAT16, TensorProto.FLOAT
    model = small_model_of(GATE, {"out": half, tap: half if kind == "half" else wide}, out=3 * WIDTH)
    _, (attributes,) = fused_of(model)
    assert found.items() <= attributes.items()


def test_a_shift_per_row_and_a_gate_that_is_a_constant_are_not_taken_in() -> None:
    nodes = [
        node("Cast", "x", "xw", **TO_WIDE),
        node("Add", "x32 xw", "v"),
        layer_norm("v", "n"),
        node("Mul", "shift n", "out"),
    ]
    _, (attributes,) = fused_of(small_model_of(nodes, {"out": TensorProto.FLOAT}))
    wanted = {"has_shift": 0, "activation": 0, "input_type": 0}
    assert wanted.items() <= attributes.items()


@pytest.mark.parametrize("silu", [True, False])
def test_a_gate_in_float32_keeps_shifted_rows_in_float32(silu: bool) -> None:
    """The operator's gate is of the type of its rows: taken in at half precision, the gate would be rounded to it."""
    gate = [node("Sigmoid", "x32", "gs"), node("Mul", "x32 gs", "u")] if silu else []
    nodes = [
        *gate,
        node("Cast", "x", "xw", **TO_WIDE),
        node("Add", "xw shift", "v"),
        layer_norm("v", "n"),
        node("Mul", f"{'u' if silu else 'x32'} n", "out"),
    ]
    _, (attributes,) = fused_of(small_model_of(nodes, {"out": TensorProto.FLOAT}))
    wanted = {"activation": 1, "gate_silu": int(silu), "has_shift": 1, "input_type": 0, "output_type": 0}
    assert wanted.items() <= attributes.items()


def test_of_two_norms_that_gate_each_other_one_takes_the_product_in() -> None:
    nodes = [layer_norm("x32", "n"), node("Neg", "x32", "m"), layer_norm("m", "k"), node("Mul", "n k", "out")]
    model = small_model_of(nodes, {"out": TensorProto.FLOAT})
    fused, (attributes,) = fused_of(model)
    assert attributes["activation"] == 1
    assert Counter(each.op_type for each in fused.graph.node)["LayerNormalization"] == 1
    assert FuseNorms().call(copied(model)).counts == {"norms": 0, "gates": 1, "swishes": 0}


def test_shifted_rows_that_are_also_the_gate_stay_for_it() -> None:
    nodes = [node("Add", "x32 shift", "v"), layer_norm("v", "n"), node("Mul", "v n", "out")]
    fused, (attributes,) = fused_of(small_model_of(nodes, {"out": TensorProto.FLOAT}))
    assert attributes["activation"] == 1
    assert [each.op_type for each in fused.graph.node if not is_norm(each)] == ["Add"]


def test_rows_multiplied_with_themselves_are_no_gate() -> None:
    nodes = [layer_norm("x32", "n"), node("Mul", "n n", "out")]
    _, (attributes,) = fused_of(small_model_of(nodes, {"out": TensorProto.FLOAT}))
    assert attributes["activation"] == 0


def test_a_gate_in_another_order_of_the_concat_ends_before_it() -> None:
    nodes = [*GATE[:-1], node("Concat", "x u yh", "out", axis=1)]
    _, (attributes,) = fused_of(small_model_of(nodes, {"out": TensorProto.FLOAT16}, out=3 * WIDTH))
    assert (attributes["activation"], attributes["gate_silu"], attributes["concat"]) == (1, 0, 0)


def test_gate_normed_rows_and_result_are_one_node() -> None:
    nodes = [*GATE[:-1], node("Cast", "n", "nh", **TO_HALF), node("Concat", "u nh yh", "out", axis=1)]
    fused, (attributes,) = fused_of(small_model_of(nodes, {"out": TensorProto.FLOAT16}, out=3 * WIDTH))
    assert len(fused.graph.node) == 1
    assert (attributes["activation"], attributes["gate_silu"], attributes["concat"]) == (1, 1, 2)


@pytest.mark.parametrize("case", ["axis 0", "a mean that is read", "half statistics", "a computed scale", "too wide"])
def test_a_norm_of_another_kind_stays(case: str) -> None:
    wide = TensorProto.FLOAT
    if case == "axis 0":
        nodes = [
            node("Transpose", "x32", "t"),
            node("LayerNormalization", "t one", "u", axis=0),
            node("Transpose", "u", "out"),
        ]
    elif case == "a mean that is read":
        norm = layer_norm("x32", "out")
        norm.output.append("mean")
        nodes = [norm, node("Add", "mean mean", "twice")]
    elif case == "half statistics":
        nodes = [
            node("Cast", "scale", "sh", **TO_HALF),
            node("LayerNormalization", "x sh", "h", axis=-1),
            node("Cast", "h", "out", **TO_WIDE),
        ]
    elif case == "a computed scale":
        nodes = [node("Add", "scale bias", "sum"), node("LayerNormalization", "x32 sum", "out", axis=-1)]
    else:
        nodes = [
            node("Concat", " ".join(["x32"] * 1366), "long", axis=1),
            node("LayerNormalization", "long ones", "out", axis=-1),
        ]
    outputs = {"out": wide} if case != "a mean that is read" else {"out": wide, "twice": wide}
    columns = {"too wide": {"out": 1366 * WIDTH}, "a mean that is read": {"twice": 1}}.get(case, {})
    model = small_model_of([], {}, **columns)
    if case == "axis 0":
        model.graph.initializer.append(numpy_helper.from_array(np.ones((WIDTH, 9), np.float32), "one"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1366 * WIDTH, np.float32), "ones"))
    model.graph.node.extend(nodes)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, kind, ["R", columns.get(name, WIDTH)]) for name, kind in outputs.items()
    )
    before = copied(model)
    assert not FuseNorms().call(model).modified
    assert model == before


def test_norms_alike_share_one_function_and_others_get_an_overload() -> None:
    found, before, _ = served("layer", "packed", "fp16")
    fused = copied(before.model)
    FuseNorms(found.taps).call(fused)
    functions = [f for f in fused.functions if f.name == "HstuNorm"]
    kinds = {tuple(sorted(node_attributes(each).items())) for each in fused.graph.node if is_norm(each)}
    assert len(functions) == len(kinds) == len({f.overload for f in functions})
