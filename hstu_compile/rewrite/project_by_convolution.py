"""Products with a constant matrix as 1x1 convolutions, for TensorRT 8: quantised ones, and all without cuBLAS."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

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

    A quantised product, Mul(MatMul(DQ(Q(x)), DQ(codes)), factors), becomes Conv(DQ(Q(x)), DQ(Q(weights))), from which
    TensorRT 8 makes an int8 convolution. A convolution has a scale for each filter, which takes its column's factor in,
    exactly: the scale of the matrix is a power of two. The parser reads scales as float32 whatever they are and
    dequantises to float32 alone: x is cast in front and the sum behind. The weights are given as the numbers that the
    codes stand for, whose quantisation gives the same codes: an int8 constant is nothing that the parser promises to
    take.

    Cases: 1. right operand an initializer of rank 2, left operand of rank 2; 2. its one reader adds a constant [N] of
    its type; 3. the one reader of that adds rows [L, N]; 4. of two projections that are added to each other, the first
    takes the sum in; 5. both operands dequantised from int8, the weight by one scale, and the one reader of the product
    multiplies with a constant [N]; 6. any other MatMul stays.
    """

    name = "project_by_convolution"

    def __init__(self, *, quantized_only: bool = False) -> None:
        self._quantized_only = quantized_only

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = model.graph
        finder = _Finder(graph)
        found: dict[str, _Projection] = {}
        for node in graph.node:
            each = finder.projection(node)
            if each is not None and (each.quantized is not None or not self._quantized_only):
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
            _drop_unread(graph, finder.dequantized)
        counts = {"projections": len(found)}
        counts["biases"] = sum(each.bias is not None for each in found.values())
        counts["sums"] = sum(each.rows is not None for each in found.values())
        if quantized := sum(each.quantized is not None for each in found.values()):
            counts["quantized"] = quantized
        return PassResult(counts)


@dataclasses.dataclass(frozen=True)
class _Quantized:
    """The operands of a quantised product.

    Attributes:
        rows: the activation before its quantisation.
        result: the product behind the factors of its columns.
        input_scale: of the activation.
        scales: [N] float32 of the weight.
    """

    rows: str
    result: str
    input_scale: np.float32
    scales: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class _Projection:
    """A product and the additions behind it.

    Attributes:
        node: the MatMul.
        kernel: its constant; of a quantised product the codes.
        kind: ONNX element type of the operands and the sum.
        quantized: None for a product of floats.
        bias: name of the constant row that is added, or None.
        rows: name of the rows that are added, or None.
        absorbed: outputs of the product, of the factors behind it and of the additions.
    """

    node: onnx.NodeProto
    kernel: onnx.TensorProto
    kind: int
    quantized: _Quantized | None
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
        self.producers = {name: node for node in graph.node for name in node.output}
        self.dequantized: set[str] = set()
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
        if node.op_type != "MatMul" or node.domain not in _STANDARD:
            return None
        kernel, quantized = self.weights.get(node.input[1]), None
        if kernel is None and (found := self._quantized(node)) is not None:
            kernel, quantized = found
        if kernel is None or len(kernel.dims) != 2 or self.rank(node.output[0]) != 2:
            return None
        kind = kernel.data_type if quantized is None else self.types[node.output[0]].elem_type
        chain, bias, rows = [node.output[0]], None, None
        if quantized is not None:
            chain.append(quantized.result)
        if (step := self._only_reader(chain[-1], "Add")) is not None:
            output, other = step
            constant = self.weights.get(other)
            if constant is not None and list(constant.dims) == [kernel.dims[1]] and constant.data_type == kind:
                bias = other
                chain.append(output)
        if (step := self._only_reader(chain[-1], "Add")) is not None:
            output, other = step
            if other not in self.weights and self._fits(other, output, kernel, kind):
                rows = other
                chain.append(output)
        if quantized is not None:
            self.dequantized.update(node.input)
        return _Projection(node, kernel, kind, quantized, bias, rows, tuple(chain))

    def _quantized(self, node: onnx.NodeProto) -> tuple[onnx.TensorProto, _Quantized] | None:
        """The codes of a product's weight and the rest of what makes its result: case 5."""
        left, right = (self.producers.get(name) for name in node.input)
        if left is None or right is None or {left.op_type, right.op_type} != {"DequantizeLinear"}:
            return None
        rounding, codes = self.producers.get(left.input[0]), self.weights.get(right.input[0])
        scale, scales = (self.weights.get(each.input[1]) for each in (left, right))
        if rounding is None or rounding.op_type != "QuantizeLinear" or codes is None or scale is None or scales is None:
            return None
        if codes.data_type != TensorProto.INT8 or rounding.input[1] != left.input[1]:
            return None
        scaling = self._only_reader(node.output[0], "Mul")
        factors = None if scaling is None else self.weights.get(scaling[1])
        if scale.dims or scales.dims or scaling is None or factors is None or list(factors.dims) != [codes.dims[1]]:
            return None
        per_column = numpy_helper.to_array(factors).astype(np.float32) * np.float32(numpy_helper.to_array(scales))
        input_scale = np.float32(numpy_helper.to_array(scale))
        return codes, _Quantized(rounding.input[0], scaling[0], input_scale, per_column)

    def _only_reader(self, name: str, operator: str) -> tuple[str, str] | None:
        """Output and other operand of the addition or multiplication that alone reads a value."""
        readers = self.readers.get(name, [])
        if name in self.outputs or len(readers) != 1 or readers[0].op_type != operator:
            return None
        left, right = readers[0].input
        return (readers[0].output[0], right if left == name else left) if left != right else None

    def _fits(self, other: str, output: str, kernel: onnx.TensorProto, kind: int) -> bool:
        """Whether a term is rows of the projection's type and of its sum's shape."""
        if self.rank(other) != 2 or self.rank(output) != 2 or self.types[other].elem_type != kind:
            return False
        return bool(self.types[other].shape.dim[0] == self.types[output].shape.dim[0]) and (
            self.types[other].shape.dim[1].dim_value == kernel.dims[1]
        )


def _convolution(graph: onnx.GraphProto, found: _Projection) -> list[onnx.NodeProto]:
    node = found.node
    prefix = node.name or node.output[0]
    made = _Constants(graph)
    made.add(_AXES, np.array([2, 3], np.int64))
    image, result = f"{prefix}/image", f"{prefix}/result"
    rows = node.input[0] if found.quantized is None else found.quantized.rows
    nodes = [helper.make_node("Unsqueeze", [rows, _AXES], [image], name=image)]
    if found.quantized is None:
        operands = [image, _filters(made, found.node, found.kernel), *([found.bias] if found.bias is not None else [])]
        nodes.append(helper.make_node("Conv", operands, [result], name=f"{prefix}/convolution", kernel_shape=[1, 1]))
    else:
        nodes += _quantized_convolution(made, found, found.quantized, prefix, image, result)
    if found.rows is not None:
        term, total = f"{prefix}/term", f"{prefix}/sum"
        nodes += [
            helper.make_node("Unsqueeze", [found.rows, _AXES], [term], name=term),
            helper.make_node("Add", [result, term], [total], name=total),
        ]
        result = total
    return [*nodes, helper.make_node("Squeeze", [result, _AXES], [found.last], name=prefix)]


class _Constants:
    """Initializers of a graph, each name once."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._known = {tensor.name for tensor in graph.initializer}

    def add(self, name: str, array: NDArray[Any]) -> str:
        if name not in self._known:
            self._known.add(name)
            self._graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def array(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(next(tensor for tensor in self._graph.initializer if tensor.name == name))


def _filters(made: _Constants, node: onnx.NodeProto, kernel: onnx.TensorProto) -> str:
    """The matrix as [N, K, 1, 1]."""
    matrix = numpy_helper.to_array(kernel)
    if matrix.dtype not in (np.float32, np.float16):
        raise InternalError(f"{node.name} multiplies by {matrix.dtype}, which TensorRT 8 does not have")
    return made.add(f"{kernel.name}/filters", matrix.T[:, :, None, None])


def _quantized_convolution(
    made: _Constants, found: _Projection, quantized: _Quantized, prefix: str, image: str, result: str
) -> list[onnx.NodeProto]:
    """From the image to the sum in the type of the rows: case 5."""
    codes = numpy_helper.to_array(found.kernel)
    values = codes.T.astype(np.float32) * quantized.scales[:, None]
    filters = made.add(f"{prefix}/filters", values[:, :, None, None])
    per_channel = [
        made.add(f"{prefix}/filter_scales", quantized.scales),
        made.add(f"{prefix}/filter_zeros", np.zeros(len(quantized.scales), np.int8)),
    ]
    per_tensor = [
        made.add(f"{prefix}/image_scale", np.array(quantized.input_scale)),
        made.add(f"{prefix}/image_zero", np.array(0, np.int8)),
    ]
    wide, image_codes, operand = f"{prefix}/image_float32", f"{prefix}/image_int8", f"{prefix}/image_dequantized"
    filter_codes, kernel, total = f"{prefix}/filters_int8", f"{prefix}/filters_dequantized", f"{prefix}/float32"
    operands = [operand, kernel]
    if found.bias is not None:
        operands.append(made.add(f"{prefix}/bias_float32", made.array(found.bias).astype(np.float32)))
    return [
        helper.make_node("Cast", [image], [wide], name=wide, to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", [wide, *per_tensor], [image_codes], name=image_codes),
        helper.make_node("DequantizeLinear", [image_codes, *per_tensor], [operand], name=operand),
        helper.make_node("QuantizeLinear", [filters, *per_channel], [filter_codes], name=filter_codes, axis=0),
        helper.make_node("DequantizeLinear", [filter_codes, *per_channel], [kernel], name=kernel, axis=0),
        helper.make_node("Conv", operands, [total], name=f"{prefix}/convolution", kernel_shape=[1, 1]),
        helper.make_node("Cast", [total], [result], name=result, to=found.kind),
    ]


def _drop_unread(graph: onnx.GraphProto, candidates: set[str]) -> None:
    """Remove what computed these values and is read by nobody any more, and constants that nobody reads."""
    needed = {value.name for value in graph.output}
    waiting, kept = set(candidates), []
    for node in reversed(graph.node):
        if waiting & set(node.output) and needed.isdisjoint(node.output):
            waiting |= set(node.input)
            continue
        kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
        needed.update(node.input)
    if len(kept) == len(graph.node):
        return
    constants = [TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in needed]
    made = {name for node in kept for name in node.output}
    infos = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in graph.value_info if i.name in made]
    for field, values in ((graph.node, kept[::-1]), (graph.initializer, constants), (graph.value_info, infos)):
        del field[:]
        field.extend(values)
