from __future__ import annotations

import onnx

from hstu_compile.rewrite.strip_metadata import StripMetadata
from tests.exported_models import text_of


def owners_with_metadata(model: onnx.ModelProto) -> int:
    graph = model.graph
    owners = [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    return sum(bool(owner.metadata_props) or bool(owner.doc_string) for owner in owners)


def test_every_owner_is_stripped_and_counted(exported: onnx.ModelProto) -> None:
    before = owners_with_metadata(exported)
    assert before > len(exported.graph.node) // 2
    assert StripMetadata().call(exported).counts == {"stripped": before}
    assert owners_with_metadata(exported) == 0


def test_stack_traces_with_paths_are_gone(exported: onnx.ModelProto) -> None:
    assert "/" in text_of(exported)
    StripMetadata().call(exported)
    assert "/" not in text_of(exported)
    assert ".py" not in text_of(exported)


def test_a_second_run_reports_nothing(exported: onnx.ModelProto) -> None:
    StripMetadata().call(exported)
    assert not StripMetadata().call(exported).modified


def test_functions_and_their_nodes_are_stripped(exported: onnx.ModelProto) -> None:
    StripMetadata().call(exported)
    node = onnx.helper.make_node("Identity", ["x"], ["y"], doc_string="traced at line 3")
    function = onnx.helper.make_function("local", "f", ["x"], ["y"], [node], [onnx.helper.make_opsetid("", 20)])
    function.doc_string = "from a file"
    exported.functions.append(function)
    assert StripMetadata().call(exported).counts == {"stripped": 2}


def test_nothing_but_metadata_changes(exported: onnx.ModelProto) -> None:
    before = [(node.op_type, list(node.input), list(node.output)) for node in exported.graph.node]
    StripMetadata().call(exported)
    assert [(node.op_type, list(node.input), list(node.output)) for node in exported.graph.node] == before
