"""q, k and v that are columns of one tensor, found and read where they lie. Level 3; private to `cut_at_attention`.

A projection makes one tensor `uvqk` [rows, width]; the graph splits it and reshapes q, k and v to [rows, heads, dim],
which a kernel can do without by a column and a row stride.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from hstu_compile.artifacts import ColumnView, TensorSpec
from hstu_compile.op_schema import attention_contract, is_attention, node_attributes

# Keep every element where it is in row-major order.
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity"})

# What kernels may read as columns; cached keys and values are contiguous.
_STRIDED = ("q", "k", "v")
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
    """A graph's nodes, of which attentions read some inputs as columns.

    Attributes:
        nodes: in the order of the graph's. An attention reads the tensor in place of its columns.
        constants: that the nodes read beside the graph's.
        views: of each attention by the name of its output, the columns that it reads, by the contract's names.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    views: dict[str, dict[str, ColumnView]]


class ColumnViews:
    """The columns that the attentions of a graph could read where they lie.

    Args:
        nodes: of the graph, in its order.
        constants: of the graph.
        specs: type and shape of its values, as far as they are recorded.
        outputs: names of its outputs, which are made whatever reads their columns.
    """

    def __init__(
        self,
        nodes: Sequence[onnx.NodeProto],
        constants: Mapping[str, onnx.TensorProto],
        specs: Mapping[str, TensorSpec],
        outputs: Collection[str],
    ) -> None:
        self._nodes, self._specs = nodes, specs
        self.columns: dict[str, Columns] = {}  #: by the value's name
        self._viewed: dict[str, str] = {}
        for node in nodes:
            sliced = zip(node.output, sliced_columns(node, constants, specs), strict=False)
            self.columns |= {name: columns for name, columns in sliced if name}
            if node.op_type in VIEWS:
                self._viewed[node.output[0]] = node.input[0]
        self._found: dict[str, dict[str, tuple[str, ColumnView]]] = {}
        for node in nodes:
            if is_attention(node):
                names = [each.name for each in attention_contract().present_inputs(node_attributes(node))]
                read = dict(zip(names, node.input, strict=True))
                views = {name: self._view(read[name]) for name in _STRIDED if read[name] not in outputs}
                self._found[node.output[0]] = {name: view for name, view in views.items() if view is not None}

    @property
    def sources(self) -> frozenset[str]:
        """Tensors whose columns some attention could read."""
        return frozenset(source for views in self._found.values() for source, _ in views.values())

    def reading(self, sources: Collection[str]) -> RewrittenNodes:
        """The nodes where attentions read the columns of these tensors.

        What was split off them is sliced off, so that each slice can be made where it is read.
        """
        nodes: list[onnx.NodeProto] = []
        constants: list[onnx.TensorProto] = []
        views: dict[str, dict[str, ColumnView]] = {}
        for node in self._nodes:
            if is_attention(node):
                chosen = {n: each for n, each in self._found[node.output[0]].items() if each[0] in sources}
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

    def _view(self, name: str) -> tuple[str, ColumnView] | None:
        """The tensor that a value [rows, heads, dim] is columns of, and which."""
        spec = self._specs.get(name)
        while name in self._viewed and name not in self.columns:
            name = self._viewed[name]
        columns = self.columns.get(name)
        if columns is None or spec is None or len(spec.shape) != 3:
            return None
        source = self._specs[columns.source]
        _, heads, dim = spec.shape
        width = source.shape[_AXIS]
        if not isinstance(heads, int) or not isinstance(dim, int) or not isinstance(width, int):
            return None
        alignment = math.gcd(columns.count, _LARGEST_ALIGNMENT)
        is_aligned = columns.first % alignment == 0 and width % alignment == 0
        if heads * dim != columns.count or source.dtype != spec.dtype or not is_aligned:
            return None
        return columns.source, ColumnView(columns.first, width, heads, dim)


def _with_inputs(attention: onnx.NodeProto, changed: Mapping[str, str]) -> onnx.NodeProto:
    """The attention with other tensors as these inputs, by the contract's names."""
    if not changed:
        return attention
    names = [each.name for each in attention_contract().present_inputs(node_attributes(attention))]
    copy = onnx.NodeProto()
    copy.CopyFrom(attention)
    for index, name in enumerate(names):
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
