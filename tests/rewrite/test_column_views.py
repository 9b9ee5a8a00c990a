"""q, k and v as columns of one tensor: which are read where they lie, and where that does not pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import ColumnView, OnnxGraph, SegmentedGraph
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.rewrite.attach_native_body import native_body
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.runtime.schedule_file import schedule_from_text, schedule_text
from hstu_compile.runtime.segmented_onnx_session import SegmentedOnnxSession
from tests.attention_cases import build_case
from tests.oracle import Array
from tests.rewrite.attention_graphs import OPSET, attention_node, contract_attributes

HEADS, DIM = 2, 8
WIDE = HEADS * DIM
NAMES = ("u", "v", "q", "k")
LENGTHS = [3, 0, 5]

Nodes = list[onnx.NodeProto]


def split(names: Sequence[str] = NAMES, sizes: Sequence[int] = (WIDE,) * 4) -> Nodes:
    return [
        helper.make_node("Constant", [], ["sizes"], value_ints=list(sizes)),
        helper.make_node("Split", ["uvqk", "sizes"], [f"{name}_columns" for name in names], axis=1, name="split"),
    ]


def split_evenly() -> Nodes:
    return [helper.make_node("Split", ["uvqk"], [f"{name}_columns" for name in NAMES], axis=-1, num_outputs=4)]


def sliced() -> Nodes:
    nodes = [helper.make_node("Constant", [], ["last"], value_ints=[-1])]
    for number, name in enumerate(NAMES):
        # The end of the last lies far beyond the tensor's.
        end = (number + 1) * WIDE if number < 3 else 2**60
        nodes += [
            helper.make_node("Constant", [], [f"{name}_begin"], value_ints=[number * WIDE]),
            helper.make_node("Constant", [], [f"{name}_end"], value_ints=[end]),
            helper.make_node("Slice", ["uvqk", f"{name}_begin", f"{name}_end", "last"], [f"{name}_raw"], name=name),
            helper.make_node("Identity", [f"{name}_raw"], [f"{name}_columns"]),
        ]
    return nodes


def silu(name: str, kind: str = "Sigmoid") -> Nodes:
    """`name`_active = `name`_columns, activated."""
    return [
        helper.make_node(kind, [f"{name}_columns"], [f"{name}_weight"]),
        helper.make_node("Mul", [f"{name}_columns", f"{name}_weight"], [f"{name}_active"]),
    ]


def graph_of(
    columns: Nodes,
    *,
    active: Mapping[str, str] | None = None,
    reads_u: bool = True,
    outputs: Sequence[str] = ("y",),
    projected: bool = True,
    width: int = 4 * WIDE,
) -> tuple[OnnxGraph, list[dict[str, Array]]]:
    """Of x [L, width]: uvqk -> u, v, q, k, with `active` of them activated -> attention -> y = attention * u."""
    active = active or {}
    case = build_case(LENGTHS, num_heads=HEADS, dqk=DIM, dv=DIM, seed=5)
    attributes = contract_attributes(case)
    source = helper.make_node("Neg", ["x"], ["uvqk"], name="projection")
    heads = helper.make_node("Constant", [], ["heads"], value_ints=[-1, HEADS, DIM])
    flat = helper.make_node("Constant", [], ["flat"], value_ints=[-1, WIDE])
    value = {name: f"{name}_active" if name in active else f"{name}_columns" for name in NAMES}
    reshaped = [helper.make_node("Reshape", [value[name], "heads"], [name], name=f"view_{name}") for name in "qkv"]
    nodes = [
        *([source] if projected else []),
        heads,
        flat,
        *columns,
        *(node for name, kind in active.items() for node in silu(name, kind)),
        *reshaped,
        attention_node(attributes, "a", q_offsets="offsets", k_offsets="offsets"),
        helper.make_node("Reshape", ["a", "flat"], ["a_flat"]),
        helper.make_node("Mul", ["a_flat", value["u"]] if reads_u else ["a_flat", "a_flat"], ["y"], name="gate"),
    ]
    # As the passes leave a graph: constants are initializers.
    constants = [node for node in nodes if node.op_type == "Constant"]
    tensors = [
        numpy_helper.from_array(np.array(node.attribute[0].ints, np.int64), node.output[0]) for node in constants
    ]
    shapes = {"uvqk": ["L", width], "y": ["L", WIDE], "a": ["L", HEADS, DIM]}
    shapes |= {name: ["L", HEADS, DIM] for name in "qkv"} | {f"{name}_columns": ["L", WIDE] for name in NAMES}
    shapes |= {f"{name}_{kind}": ["L", WIDE] for name in active for kind in ("active", "weight")}
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    given = "x" if projected else "uvqk"
    body = helper.make_graph(
        [node for node in nodes if node.op_type != "Constant"],
        "projected",
        [
            helper.make_tensor_value_info(given, TensorProto.FLOAT, ["L", width]),
            helper.make_tensor_value_info("offsets", TensorProto.INT32, ["B_plus_1"]),
        ],
        [infos[name] for name in outputs],
        tensors,
        value_info=[info for name, info in infos.items() if name not in (*outputs, given)],
    )
    contract = attention_node(attributes)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(contract.domain, 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=10, functions=[native_body(attributes, 0, OPSET)])
    rng = np.random.default_rng(7)
    rows = sum(LENGTHS)
    feeds: list[dict[str, Array]] = [
        {given: rng.standard_normal((rows, width)).astype(np.float32), "offsets": case.q_offsets},
        {given: np.zeros((0, width), np.float32), "offsets": np.zeros(2, np.int32)},
    ]
    return OnnxGraph("projected", model, "fp32", tensor_specs(body.input), tensor_specs(body.output)), feeds


def checked_cut(graph: OnnxGraph, feeds: list[dict[str, Array]]) -> SegmentedGraph:
    """The cut, which gives the bits of the graph in one piece and can be written and read."""
    cut = segmented_from_onnx(graph)
    for segment in cut.segments:
        onnx.checker.check_model(segment.model, full_check=True)
    with OnnxRuntimeSession(graph.model) as whole, SegmentedOnnxSession(cut) as session:
        for given in feeds:
            expected, found = whole.run(given), session.run(given)
            for name, values in expected.items():
                assert values.any() or not values.size
                np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert schedule_from_text(schedule_text(cut), "text").calls == cut.calls
    return cut


def crossing(cut: SegmentedGraph) -> set[str]:
    return {each.spec.name for each in cut.crossing}


@pytest.mark.parametrize("columns", [split, split_evenly, sliced])
def test_columns_are_read_where_they_lie_however_they_are_written(columns: Callable[[], Nodes]) -> None:
    cut = checked_cut(*graph_of(columns()))
    assert crossing(cut) == {"uvqk", "a", "y"}
    (call,) = cut.calls
    assert [call.inputs[name] for name in "qkv"] == ["uvqk"] * 3
    assert call.views == {
        name: ColumnView(column, 4 * WIDE, (HEADS, DIM)) for name, column in (("v", 16), ("q", 32), ("k", 48))
    }
    assert [node.op_type for node in cut.segments[0].model.graph.node] == ["Neg"]
    assert [node.op_type for node in cut.segments[1].model.graph.node if node.op_type == "Slice"] == ["Slice"]


def test_silu_of_the_gate_is_computed_where_it_is_read() -> None:
    cut = checked_cut(*graph_of(split(), active={"u": "Sigmoid"}))
    assert crossing(cut) == {"uvqk", "a", "y"}
    kinds = [[node.op_type for node in segment.model.graph.node] for segment in cut.segments]
    assert [each.count("Sigmoid") for each in kinds] == [0, 1]


def test_columns_of_a_graphs_input_are_read_there() -> None:
    cut = checked_cut(*graph_of(split(), projected=False))
    assert crossing(cut) == {"a", "y"}
    assert set(cut.calls[0].views) == {"q", "k", "v"}


def test_a_tensor_that_crosses_anyway_is_read_in_place() -> None:
    cut = checked_cut(*graph_of(split(), reads_u=False, outputs=("y", "uvqk")))
    assert crossing(cut) == {"uvqk", "a", "y"}
    assert set(cut.calls[0].views) == {"q", "k", "v"}


def test_an_output_is_read_itself_and_the_others_too_where_all_cross_anyway() -> None:
    cut = checked_cut(*graph_of(split(), outputs=("y", "k", "uvqk")))
    assert cut.calls[0].inputs["k"] == "k"
    assert set(cut.calls[0].views) == {"q", "v"}


@pytest.mark.parametrize(
    ("graph", "made"),
    [
        # Twice the bytes of k would cross.
        (graph_of(split(), outputs=("y", "k")), {"u_columns", "q", "k", "v"}),
        # Those of u would, which nobody reads.
        (graph_of(split(), reads_u=False), {"q", "k", "v"}),
        # q is no column any more.
        (graph_of(split(), active={"q": "Sigmoid"}), {"u_columns", "q", "k", "v"}),
        # 16 bytes off: a copy can be read in vectors and the columns cannot.
        (graph_of(split(("rest", *NAMES), (4, *(WIDE,) * 4)), width=4 * WIDE + 4), {"u_columns", "q", "k", "v"}),
        # So are their rows.
        (graph_of(split((*NAMES, "rest"), (*(WIDE,) * 4, 4)), width=4 * WIDE + 4), {"u_columns", "q", "k", "v"}),
    ],
    ids=["output", "nobody-reads-u", "active-q", "first-column", "row-stride"],
)
def test_where_it_does_not_pay_columns_are_made(
    graph: tuple[OnnxGraph, list[dict[str, Array]]], made: set[str]
) -> None:
    cut = checked_cut(*graph)
    assert cut.calls[0].views == {}
    assert crossing(cut) == {*made, "a", "y"}


@pytest.mark.parametrize("lacking", ["type", "rows"])
def test_a_graph_that_does_not_say_what_its_columns_are_of_is_cut_as_ever(lacking: str) -> None:
    graph, feeds = graph_of(split())
    infos = {info.name: info for info in graph.model.graph.value_info}
    if lacking == "type":
        graph.model.graph.value_info.remove(infos["uvqk"])
    else:
        infos["uvqk"].type.tensor_type.shape.dim[0].Clear()
    assert crossing(checked_cut(graph, feeds)) == {"u_columns", "q", "k", "v", "a", "y"}
