"""Products with a constant matrix as 1x1 convolutions, for a TensorRT 8 that has no cuBLAS."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hstu_compile.errors import InternalError
from hstu_compile.rewrite._pass import Pass, PassResult

_STANDARD = ("", "ai.onnx")


class ProjectByConvolution(Pass):
    """MatMul(x [L, K], constant [K, N]) becomes Conv of x [L, K, 1, 1] with weights [N, K, 1, 1].

    TensorRT 8 compiles a MatMul that its graph compiler has fused with its neighbours only through cuBLASLt, and stops
    with "could not find any implementation" where that library is absent. Convolutions have kernels of their own and
    are left out of such fusions. The sums are the same.

    Cases: 1. right operand an initializer of rank 2, left operand of rank 2; 2. any other MatMul stays.
    """

    name = "project_by_convolution"

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = model.graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*graph.value_info, *graph.input, *graph.output)
            if value.type.tensor_type.HasField("shape")
        }
        nodes: list[onnx.NodeProto] = []
        projected = 0
        for node in graph.node:
            kernel = weights.get(node.input[1]) if node.op_type == "MatMul" and node.domain in _STANDARD else None
            if kernel is None or len(kernel.dims) != 2 or ranks.get(node.output[0]) != 2:
                nodes.append(node)
                continue
            nodes += self._convolution(graph, node, kernel)
            projected += 1
        if projected:
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del graph.node[:]
            graph.node.extend(copies)
        return PassResult({"projections": projected})

    @staticmethod
    def _convolution(graph: onnx.GraphProto, node: onnx.NodeProto, kernel: onnx.TensorProto) -> list[onnx.NodeProto]:
        prefix = node.name or node.output[0]
        filters, axes = f"{kernel.name}/filters", "project_by_convolution/axes"
        known = {tensor.name for tensor in graph.initializer}
        if filters not in known:
            matrix = numpy_helper.to_array(kernel)
            if matrix.dtype not in (np.float32, np.float16):
                raise InternalError(f"{node.name} multiplies by {matrix.dtype}, which TensorRT 8 does not have")
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix.T)[:, :, None, None], filters))
        if axes not in known:
            graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), axes))
        image, result = f"{prefix}/image", f"{prefix}/result"
        return [
            helper.make_node("Unsqueeze", [node.input[0], axes], [image], name=image),
            helper.make_node("Conv", [image, filters], [result], name=f"{prefix}/convolution", kernel_shape=[1, 1]),
            helper.make_node("Squeeze", [result, axes], [node.output[0]], name=prefix),
        ]
