"""Columns of tensors that kernels read where they lie. Level 3; private to `cut_at_attention`.

A projection makes one tensor `uvqk` [rows, width]; the graph splits it and reshapes q, k and v to [rows, heads, dim],
which a kernel can do without by a column and a row stride. So can a norm without the copy of its gate, u, and without
the reshaping of the attention's output to its rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from hstu_compile.artifacts import ColumnView, TensorSpec
from hstu_compile.op_schema import contract_of, is_attention, node_attributes, strided_inputs
from hstu_compile.rewrite.following_norms import VIEWS, FollowingNorm

# Elements that a kernel reads at once, at most: what a copy of the columns is aligned to, the columns are too.
_LARGEST_ALIGNMENT = 16
_AXIS = 1


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of a tensor [rows, width].

    Attributes:
        source: the tensor.
        first: column, from 0.
        count: of columns.
    """

    source: str
    first: int
    count: int


def sliced_columns(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], specs: Mapping[str, TensorSpec]
) -> tuple[Columns, ...]:
    """The columns that each output of a Split or Slice is; none where a node is something else."""
    source = specs.get(node.input[0]) if node.input else None
    width = source.shape[_AXIS] if source is not None and len(source.shape) == 2 else None
    if source is None or not isinstance(width, int) or any(name and name not in constants for name in node.input[1:]):
        return ()
    given = [numpy_helper.to_array(constants[name]).ravel().tolist() if name else [] for name in node.input[1:]]
    if node.op_type == "Split":
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if axis not in (_AXIS, -1):
            return ()
        share = math.ceil(width / len(node.output))
        counts = given[0] if given else [min(share, width - share * i) for i in range(len(node.output))]
        return tuple(Columns(source.name, sum(counts[:i]), count) for i, count in enumerate(counts))
    if node.op_type == "Slice" and len(given) >= 3 and given[2] in ([_AXIS], [-1]) and given[3:] in ([], [[]], [[1]]):
        start, end, _ = slice(given[0][0], given[1][0]).indices(width)
        return (Columns(source.name, start, end - start),) if end > start else ()
    return ()


@dataclasses.dataclass(frozen=True)
class RewrittenNodes:
    """A graph's nodes, of which kernels read some inputs as columns.

    Attributes:
        nodes: in the order of the graph's. A kernel reads the tensor in place of its columns.
        constants: that the nodes read beside the graph's.
        views: of each kernel by the name of its output, the columns that it reads, by the contract's names.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    views: dict[str, dict[str, ColumnView]]


class ColumnViews:
    """The columns that the kernels of a graph could read where they lie.

    Args:
        nodes: of the graph, in its order.
        norms: those that kernels compute, by their outputs.
        constants: of the graph.
        specs: type and shape of its values, as far as they are recorded.
        outputs: names of its outputs, which are made whatever reads their columns.
    """

    def __init__(
        self,
        nodes: Sequence[onnx.NodeProto],
        norms: Mapping[str, FollowingNorm],
        constants: Mapping[str, onnx.TensorProto],
        specs: Mapping[str, TensorSpec],
        outputs: Collection[str],
    ) -> None:
        self._nodes, self._norms, self._specs = nodes, norms, specs
        self.columns: dict[str, Columns] = {}  #: by the value's name
        self._viewed: dict[str, str] = {}
        for node in nodes:
            sliced = zip(node.output, sliced_columns(node, constants, specs), strict=False)
            self.columns |= {name: columns for name, columns in sliced if name}
            if node.op_type in VIEWS:
                self._viewed[node.output[0]] = node.input[0]
        self._found: dict[str, dict[str, tuple[str, ColumnView]]] = {}
        for node in nodes:
            if self._is_kernel(node):
                read = named_inputs(node)
                strided = [name for name in strided_inputs(node.op_type) if name in read and read[name] not in outputs]
                views = {name: self._view(read[name]) for name in strided}
                self._found[node.output[0]] = {name: view for name, view in views.items() if view is not None}

    @property
    def sources(self) -> frozenset[str]:
        """Tensors whose columns some kernel could read."""
        return frozenset(source for views in self._found.values() for source, _ in views.values())

    def reading(self, sources: Collection[str]) -> RewrittenNodes:
        """The nodes where kernels read the columns of these tensors, and norms the attentions' outputs.

        What was split off them is sliced off, so that each slice can be made where it is read.
        """
        nodes: list[onnx.NodeProto] = []
        constants: list[onnx.TensorProto] = []
        views: dict[str, dict[str, ColumnView]] = {}
        for node in self._nodes:
            if self._is_kernel(node):
                chosen = {n: each for n, each in self._found[node.output[0]].items() if each[0] in sources}
                if (norm := self._norms.get(node.output[0])) is not None:
                    chosen["x"] = norm.attention, ColumnView(0, norm.width, (norm.width,))
                views[node.output[0]] = {name: view for name, (_, view) in chosen.items()}
                nodes.append(_with_inputs(node, {name: source for name, (source, _) in chosen.items()}))
            elif node.op_type == "Split" and node.input[0] in sources and node.output[0] in self.columns:
                for name in filter(None, node.output):
                    made, needed = _slice(self.columns[name], name)
                    nodes.append(made)
                    constants += needed
            else:
                nodes.append(node)
        return RewrittenNodes(tuple(nodes), tuple(constants), views)

    def _is_kernel(self, node: onnx.NodeProto) -> bool:
        return is_attention(node) or (len(node.output) == 1 and node.output[0] in self._norms)

    def _view(self, name: str) -> tuple[str, ColumnView] | None:
        """The tensor that a value [rows, heads, dim] or [rows, width] is columns of, and which."""
        spec = self._specs.get(name)
        while name in self._viewed and name not in self.columns:
            name = self._viewed[name]
        columns = self.columns.get(name)
        if columns is None or spec is None or len(spec.shape) not in (2, 3):
            return None
        source = self._specs[columns.source]
        dims = tuple(size for size in spec.shape[1:] if isinstance(size, int))
        width = source.shape[_AXIS]
        if len(dims) != len(spec.shape) - 1 or not isinstance(width, int):
            return None
        alignment = math.gcd(columns.count, _LARGEST_ALIGNMENT)
        is_aligned = columns.first % alignment == 0 and width % alignment == 0
        if math.prod(dims) != columns.count or source.dtype != spec.dtype or not is_aligned:
            return None
        return columns.source, ColumnView(columns.first, width, dims)


def named_inputs(node: onnx.NodeProto) -> dict[str, str]:
    """What a node of one of our operators reads, by the contract's names and in its order."""
    names = [each.name for each in contract_of(node.op_type).present_inputs(node_attributes(node))]
    return dict(zip(names, node.input, strict=True))


def _with_inputs(node: onnx.NodeProto, changed: Mapping[str, str]) -> onnx.NodeProto:
    """The node with other tensors as these inputs, by the contract's names."""
    if not changed:
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for index, name in enumerate(named_inputs(node)):
        if name in changed:
            copy.input[index] = changed[name]
    return copy


def _slice(columns: Columns, name: str) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """The node that makes a value of columns, and its constants."""
    parameters = {"first": columns.first, "end": columns.first + columns.count, "axis": _AXIS}
    constants = [
        numpy_helper.from_array(np.array([each], np.int64), f"{name}/{key}") for key, each in parameters.items()
    ]
    read = [columns.source, *(tensor.name for tensor in constants)]
    return onnx.helper.make_node("Slice", read, [name], name=f"{name}/slice"), constants
