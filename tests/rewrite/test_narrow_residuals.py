"""A residual is added to a biased product in float16; what is float32, or of bfloat16, or read elsewhere stays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hstu_compile.rewrite.narrow_residuals import NarrowResiduals

HALF, WIDE, BRAIN = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16
WIDTH = 32


def node(op_type: str, inputs: str, output: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=output, **attributes)


def graph_of(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str] = ("o",), kind: int = HALF) -> onnx.ModelProto:
    """Nodes over x and r of a half type, f of float32, a weight, and biases that float16 has and has not."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(helper.tensor_dtype_to_np_dtype(kind))
    bias = rng.standard_normal(WIDTH).astype(np.float16).astype(np.float32)
    constants = {"w": weight, "b": bias, "inexact": bias + np.float32(1e-6)}
    read = {name for each in nodes for name in each.input}
    kinds = {"x": kind, "r": kind, "f": WIDE}
    graph = helper.make_graph(
        list(nodes),
        "residuals",
        [helper.make_tensor_value_info(name, each, ["R", WIDTH]) for name, each in kinds.items() if name in read],
        [helper.make_tensor_value_info(name, kind, ["R", WIDTH]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in read],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def layer(
    first: str = "pw b", second: str = "s rw", kind: int = HALF, residual: str = "r", **replaced: onnx.NodeProto
) -> list[onnx.NodeProto]:
    """X w + b + r as PyTorch's exporter writes it: widened, added, rounded once."""
    nodes = {
        "p": node("MatMul", "x w", "p"),
        "pw": node("Cast", "p", "pw", to=WIDE),
        "s": node("Add", first, "s"),
        "rw": node("Cast", residual, "rw", to=WIDE),
        "t": node("Add", second, "t"),
        "o": node("Cast", "t", "o", to=kind),
    }
    return list((nodes | replaced).values())


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal((40, WIDTH)).astype(np.float16) for name in "xr"}


def run_as_written(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> np.ndarray:
    """Its output o, node by node, each rounded to its type: ONNX Runtime leaves roundings between additions out."""
    names = {value.name for value in model.graph.input}
    (found,) = ReferenceEvaluator(model).run(["o"], {name: array for name, array in given.items() if name in names})
    return np.asarray(found)


@pytest.mark.parametrize("first", ["pw b", "b pw"])
@pytest.mark.parametrize("second", ["s rw", "rw s"])
def test_the_sum_is_rounded_once_more_and_nothing_else_changes(first: str, second: str) -> None:
    model = graph_of(layer(first, second))
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    given = feeds()
    before = run_as_written(model, given)
    assert NarrowResiduals().call(model).counts == {"residuals": 1}
    onnx.checker.check_model(model, full_check=True)
    assert [each.op_type for each in model.graph.node] == ["MatMul", "Add", "Add"]
    assert model.graph.node[-1].output == ["o"]
    after = run_as_written(model, given)
    product = run_as_written(graph_of([node("MatMul", "x w", "o")]), given)
    biased = (product.astype(np.float32) + constants["b"]).astype(np.float16)
    np.testing.assert_array_equal(after, (biased.astype(np.float32) + given["r"]).astype(np.float16))
    # Half a unit of what is rounded once more, and half a unit of the result.
    unit = np.spacing(np.maximum(np.abs(biased), np.abs(before))).astype(np.float64)
    assert (np.abs(after.astype(np.float64) - before) <= unit).all()
    assert (after != before).any()  # else this test could not fail
    assert not NarrowResiduals().call(model).modified


LEFT_ALONE = {
    "bfloat16": graph_of(layer(kind=BRAIN), kind=BRAIN),
    "a bias that float16 has not": graph_of(layer("pw inexact")),
    "a residual of float32": graph_of(layer(second="s f")[:3] + layer(second="s f")[4:]),
    "a sum that is read elsewhere": graph_of([*layer(), node("Cast", "s", "o2", to=HALF)], ("o", "o2")),
    "a result that is read in float32": graph_of(
        [*layer(), node("Relu", "t", "u"), node("Cast", "u", "o2", to=HALF)], ("o", "o2")
    ),
    "no product": graph_of(layer(p=node("Relu", "x", "p"))),
    "no bias": graph_of([*layer()[:2], *layer(second="pw rw")[3:]]),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case: str) -> None:
    model = LEFT_ALONE[case]
    onnx.checker.check_model(model, full_check=True)
    before = model.SerializeToString(deterministic=True)
    assert not NarrowResiduals().call(model).modified
    assert model.SerializeToString(deterministic=True) == before


def test_two_layers_in_a_row() -> None:
    """The residual of the second is the result of the first."""
    second = [
        node(
            e.op_type,
            " ".join(f"{n}2" if n in ("p", "pw", "s", "rw", "t") else n for n in e.input),
            f"{e.output[0]}2",
            **{a.name: a.i for a in e.attribute},
        )
        for e in layer(residual="o")
    ]
    second[0].input[0] = "o"
    model = graph_of([*layer(), *second], ("o2",))
    assert NarrowResiduals().call(model).counts == {"residuals": 2}
    onnx.checker.check_model(model, full_check=True)
    assert [each.op_type for each in model.graph.node] == ["MatMul", "Add", "Add"] * 2
