from __future__ import annotations

import onnx
import pytest
from onnx import helper

from hstu_compile.errors import RewriteError
from hstu_compile.rewrite.check_operators import CheckOperators

FORBIDDEN = {
    "NonZero": ("NonZero", ["x"], {}),
    "Compress": ("Compress", ["x", "x"], {}),
    "accumulating ScatterND": ("ScatterND", ["x", "x", "x"], {"reduction": "add"}),
    "foreign domain": ("FusedMatMul", ["x", "x"], {"domain": "com.microsoft"}),
}


def test_an_exported_graph_passes_unchanged(exported: onnx.ModelProto) -> None:
    before = exported.SerializeToString(deterministic=True)
    assert not CheckOperators().call(exported).modified
    assert exported.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("where", ["graph", "function"])
@pytest.mark.parametrize("kind", FORBIDDEN)
def test_an_operator_that_a_runtime_refuses_is_named(exported: onnx.ModelProto, kind: str, where: str) -> None:
    op_type, inputs, attributes = FORBIDDEN[kind]
    node = helper.make_node(op_type, inputs, ["y"], name="culprit", **attributes)
    if where == "graph":
        exported.graph.node.append(node)
    else:
        function = helper.make_function("hstu", "f", ["x"], ["y"], [node], [helper.make_opsetid("", 20)])
        exported.functions.append(function)
    with pytest.raises(RewriteError, match=f"culprit: {op_type}") as caught:
        CheckOperators().call(exported)
    assert caught.value.code == "HSTU-E302"


def test_all_offenders_are_listed_at_once(exported: onnx.ModelProto) -> None:
    for name in ("first", "second"):
        exported.graph.node.append(helper.make_node("NonZero", ["x"], [name], name=name))
    with pytest.raises(RewriteError, match="2 operators") as caught:
        CheckOperators().call(exported)
    assert "first: NonZero" in caught.value.why
    assert "second: NonZero" in caught.value.why


def test_a_scatter_that_overwrites_is_allowed(exported: onnx.ModelProto) -> None:
    exported.graph.node.append(helper.make_node("ScatterND", ["x", "x", "x"], ["y"], reduction="none"))
    assert not CheckOperators().call(exported).modified
