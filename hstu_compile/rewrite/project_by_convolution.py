"""Products with a constant matrix as 1x1 convolutions, for a TensorRT 8 that has no cuBLAS."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hstu_compile.errors import InternalError
from hstu_compile.rewrite._pass import Pass, PassResult

_STANDARD = ("", "ai.onnx")
_AXES = "project_by_convolution/axes"


class ProjectByConvolution(Pass):
    """MatMul(x [L, K], constant [K, N]) becomes Conv of x [L, K, 1, 1] with weights [N, K, 1, 1].

    TensorRT 8 compiles a MatMul that its graph compiler has fused with its neighbours only through cuBLASLt, and stops
    with "could not find any implementation" where that library is absent. Convolutions have kernels of their own and
    are left out of such fusions. The sums are the same.

    A constant row that is added next becomes the convolution's bias, and rows that are added then are added to its
    result in four axes, where TensorRT 8 can fuse the addition: it does not see through the Squeeze. A fused sum in
    half precision is rounded once, separate ones once each: before that last rounding, which may then go the other way,
    the difference is at most half a unit in the last place of each sum that is no longer rounded.

    Cases: 1. right operand an initializer of rank 2, left operand of rank 2; 2. its one reader adds a constant [N] of
    its type; 3. the one reader of that adds rows [L, N]; 4. of two projections that are added to each other, the first
    takes the sum in; 5. any other MatMul stays.
    """

    name = "project_by_convolution"

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = model.graph
        finder = _Finder(graph)
        found: dict[str, _Projection] = {}
        for node in graph.node:
            each = finder.projection(node)
            if each is not None:
                if each.last in found:
                    each = each.without_rows()
                found[each.last] = each
        absorbed = {name for each in found.values() for name in each.absorbed}
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            output = node.output[0]
            if output in found:
                nodes += _convolution(graph, found[output])
            elif output not in absorbed:
                nodes.append(node)
        if found:
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del graph.node[:]
            graph.node.extend(copies)
        counts = {"projections": len(found)}
        counts["biases"] = sum(each.bias is not None for each in found.values())
        counts["sums"] = sum(each.rows is not None for each in found.values())
        return PassResult(counts)


@dataclasses.dataclass(frozen=True)
class _Projection:
    """A product and the additions behind it.

    Attributes:
        node: the MatMul.
        kernel: its constant.
        bias: name of the constant row that is added, or None.
        rows: name of the rows that are added, or None.
        absorbed: outputs of the product and of the additions.
    """

    node: onnx.NodeProto
    kernel: onnx.TensorProto
    bias: str | None
    rows: str | None
    absorbed: tuple[str, ...]

    @property
    def last(self) -> str:
        """Output of the last node."""
        return self.absorbed[-1]

    def without_rows(self) -> _Projection:
        """The same, but for the addition of rows."""
        return dataclasses.replace(self, rows=None, absorbed=self.absorbed[:-1])


class _Finder:
    """Who reads a value, and what is known of it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
        self.outputs = {value.name for value in graph.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def rank(self, name: str) -> int:
        """Axes of a value; 0 where they are not recorded."""
        known = name in self.types and self.types[name].HasField("shape")
        return len(self.types[name].shape.dim) if known else 0

    def projection(self, node: onnx.NodeProto) -> _Projection | None:
        """The projection that starts at a node, if one does."""
        kernel = self.weights.get(node.input[1]) if node.op_type == "MatMul" and node.domain in _STANDARD else None
        if kernel is None or len(kernel.dims) != 2 or self.rank(node.output[0]) != 2:
            return None
        chain, bias, rows = [node.output[0]], None, None
        if (step := self._addition(chain[-1])) is not None:
            output, other = step
            constant = self.weights.get(other)
            if constant is not None and list(constant.dims) == [kernel.dims[1]] and self._same_type(constant, kernel):
                bias = other
                chain.append(output)
        if (step := self._addition(chain[-1])) is not None:
            output, other = step
            if other not in self.weights and self._fits(other, output, kernel):
                rows = other
                chain.append(output)
        return _Projection(node, kernel, bias, rows, tuple(chain))

    def _addition(self, name: str) -> tuple[str, str] | None:
        """Output and other term of the addition that alone reads a value."""
        readers = self.readers.get(name, [])
        if name in self.outputs or len(readers) != 1 or readers[0].op_type != "Add":
            return None
        left, right = readers[0].input
        return (readers[0].output[0], right if left == name else left) if left != right else None

    @staticmethod
    def _same_type(one: onnx.TensorProto, other: onnx.TensorProto) -> bool:
        return bool(one.data_type == other.data_type)

    def _fits(self, other: str, output: str, kernel: onnx.TensorProto) -> bool:
        """Whether a term is rows of the projection's type and of its sum's shape."""
        if self.rank(other) != 2 or self.rank(output) != 2 or self.types[other].elem_type != kernel.data_type:
            return False
        return bool(self.types[other].shape.dim[0] == self.types[output].shape.dim[0]) and (
            self.types[other].shape.dim[1].dim_value == kernel.dims[1]
        )


def _convolution(graph: onnx.GraphProto, found: _Projection) -> list[onnx.NodeProto]:
    node, kernel = found.node, found.kernel
    prefix = node.name or node.output[0]
    filters = f"{kernel.name}/filters"
    known = {tensor.name for tensor in graph.initializer}
    if filters not in known:
        matrix = numpy_helper.to_array(kernel)
        if matrix.dtype not in (np.float32, np.float16):
            raise InternalError(f"{node.name} multiplies by {matrix.dtype}, which TensorRT 8 does not have")
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix.T)[:, :, None, None], filters))
    if _AXES not in known:
        graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), _AXES))
    image, result = f"{prefix}/image", f"{prefix}/result"
    operands = [image, filters, *([found.bias] if found.bias is not None else [])]
    nodes = [
        helper.make_node("Unsqueeze", [node.input[0], _AXES], [image], name=image),
        helper.make_node("Conv", operands, [result], name=f"{prefix}/convolution", kernel_shape=[1, 1]),
    ]
    if found.rows is not None:
        term, total = f"{prefix}/term", f"{prefix}/sum"
        nodes += [
            helper.make_node("Unsqueeze", [found.rows, _AXES], [term], name=term),
            helper.make_node("Add", [result, term], [total], name=total),
        ]
        result = total
    return [*nodes, helper.make_node("Squeeze", [result, _AXES], [found.last], name=prefix)]
