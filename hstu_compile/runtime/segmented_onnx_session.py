"""Session on ONNX Runtime over a graph that was cut at its attentions: what verifies the cut without a GPU. Level 3.

Every segment is a graph of its own, and so is every attention and norm between them, by its native body. So each tensor
that crosses does cross here, in its own type, and the numbers are those of the graph in one piece, but for roundings
that ONNX Runtime leaves out there (docs/pitfalls.md) and that of what a tower ends in (`rewrite.tower_norms`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import KernelCall, SegmentedGraph, TensorSpec
from hstu_compile.errors import EngineError
from hstu_compile.op_schema import attention_contract, contract_of
from hstu_compile.rewrite.attach_native_body import native_body
from hstu_compile.rewrite.norm_body import norm_body
from hstu_compile.runtime._host_session import HostSession
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession


class SegmentedOnnxSession(HostSession):
    """Segments and kernels in ONNX Runtime, one after the other, on CPU.

    Args:
        graph: the graph.
        taps: intermediate values to return besides the graph's outputs.

    Raises:
        EngineError: HSTU-E401 if ONNX Runtime is absent, E404 if it cannot load a segment, or no segment has a tap.
    """

    def __init__(self, graph: SegmentedGraph, *, taps: Sequence[str] = ()) -> None:
        self._graph, self._steps = graph, list[OnnxRuntimeSession]()
        where = _tap_segments(graph, taps)
        with contextlib.ExitStack() as opened:
            for step in graph.steps:
                if step.kind == "kernel":
                    session = OnnxRuntimeSession(kernel_model(graph, graph.calls[step.index]))
                else:
                    wanted = [name for name, segment in where.items() if segment == step.index]
                    segment = graph.segments[step.index]
                    session = OnnxRuntimeSession(segment.model, taps=wanted, folder=segment.folder)
                self._steps.append(opened.enter_context(session))
            self._opened = opened.pop_all()
        self.name = f"{max((step.name for step in self._steps), key=len)}, in segments"
        names = [spec.name for spec in graph.outputs]
        # A tap that is served as well is one output.
        names += [name for name in taps if name not in names]
        self.inputs, self.resident_inputs = _ends(graph.inputs, [s.inputs for s in self._steps]), graph.inputs
        self.outputs = _ends([_named(graph, name) for name in names], [s.outputs for s in self._steps])
        self.resident_outputs = tuple(_named(graph, spec.name, spec) for spec in self.outputs)

    def execute(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `HostSession.execute`."""
        values = dict(arrays)
        for session in self._steps:
            values |= session.execute({spec.name: values[spec.name] for spec in session.inputs})
        return {spec.name: values[spec.name] for spec in self.outputs}

    def close(self) -> None:
        """See `Session.close`."""
        self._opened.close()


def kernel_model(graph: SegmentedGraph, call: KernelCall) -> onnx.ModelProto:
    """What one kernel computes as a graph of its own: the node with its native body.

    Its inputs and its output have the names that they have in the graph; what is constant is inside, and so is the
    slicing of columns.

    Args:
        graph: that the call is of.
        call: of the kernel.
    """
    contract = contract_of(call.operator)
    source = graph.segments[0].model
    opset = next(o.version for o in source.opset_import if o.domain in ("", "ai.onnx"))
    fed = [name for name in dict.fromkeys(call.inputs.values()) if name not in graph.constants]
    constant = {name: graph.constants[name] for name in call.inputs.values() if name in graph.constants}
    views = [_view_nodes(call, name) for name in call.views]
    read = call.inputs | {name: _view_name(call, name) for name in call.views}
    node = helper.make_node(
        contract.name,
        list(read.values()),
        [call.output],
        name=call.name,
        domain=contract.namespace,
        **call.attributes,
        plugin_version=contract.version,
        plugin_namespace=contract.namespace,
    )
    body = helper.make_graph(
        [*(each for nodes, _ in views for each in nodes), node],
        call.name,
        [_value_info(graph.spec(name)) for name in fed],
        [_value_info(graph.spec(call.output))],
        [
            *(numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constant.items()),
            *(tensor for _, tensors in views for tensor in tensors),
        ],
    )
    return helper.make_model(
        body,
        opset_imports=list(source.opset_import),
        ir_version=source.ir_version,
        functions=[_body(call, constant, opset)],
    )


def _body(call: KernelCall, constants: Mapping[str, NDArray[Any]], opset: int) -> onnx.FunctionProto:
    if call.operator != attention_contract().name:
        return norm_body(call.attributes, len(constants[call.inputs["scale"]]), opset)
    buckets = len(constants[call.inputs["ts_thresholds"]]) if call.attributes["time_bias"] else 0
    return native_body(call.attributes, buckets, opset)


def _view_name(call: KernelCall, name: str) -> str:
    return f"{call.name}/{name}"


def _view_nodes(call: KernelCall, name: str) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """What makes an input of a kernel from the tensor whose columns it is, and the constants of that."""
    view, made = call.views[name], _view_name(call, name)
    parameters = {
        # 0: as many rows as there are.
        "rows": [0, view.row_stride],
        "first": [view.column],
        "end": [view.column + math.prod(view.dims)],
        "axis": [1],
        "shape": [0, *view.dims],
    }
    rows, first, end, axis, shape = (f"{made}/{each}" for each in parameters)
    nodes = [
        helper.make_node("Reshape", [call.inputs[name], rows], [f"{made}/row"], name=f"{made}/flatten"),
        helper.make_node("Slice", [f"{made}/row", first, end, axis], [f"{made}/columns"], name=f"{made}/slice"),
        helper.make_node("Reshape", [f"{made}/columns", shape], [made], name=f"{made}/reshape"),
    ]
    return nodes, [
        numpy_helper.from_array(np.array(values, np.int64), f"{made}/{each}") for each, values in parameters.items()
    ]


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    special = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
    kind = special.get(spec.dtype) or TensorProto.DataType.Value(spec.dtype.upper())
    return helper.make_tensor_value_info(spec.name, kind, spec.shape)


def _tap_segments(graph: SegmentedGraph, taps: Sequence[str]) -> dict[str, int]:
    """The segment that computes each tap."""
    found: dict[str, int] = {}
    for number, segment in enumerate(graph.segments):
        made = {name for node in segment.model.graph.node for name in node.output}
        found |= {name: number for name in taps if name in made and name not in found}
    if missing := [name for name in taps if name not in found]:
        raise EngineError(
            "HSTU-E404",
            "no segment has these intermediate values",
            f"{', '.join(missing)} are not computed by any node",
            "use the names layer_0 .. layer_n of a graph that hstu-compile exported",
            {"missing": missing},
        )
    return found


def _named(graph: SegmentedGraph, name: str, default: TensorSpec | None = None) -> TensorSpec:
    """An output of the graph by its name; a tap, which is none, keeps what ONNX Runtime says of it."""
    known = {spec.name: spec for spec in graph.outputs}
    return known.get(name) or default or TensorSpec(name, "", ())


def _ends(specs: Sequence[TensorSpec], sessions: Sequence[Sequence[TensorSpec]]) -> tuple[TensorSpec, ...]:
    """The specs as ONNX Runtime takes and gives them."""
    known = {spec.name: spec for each in sessions for spec in each}
    return tuple(known.get(spec.name, spec) for spec in specs)
