"""Compute the last layer only for the rows that somebody reads: its other rows are nobody's input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.op_schema import attention_contract, is_attention, node_attributes
from hstu_compile.rewrite._last_layer import PASS_NAME, LastLayer, refuse
from hstu_compile.rewrite._pass import Pass, PassResult

# Query offsets of a layer with one row per sequence; made by this pass alone.
ROW_OFFSETS = f"{PASS_NAME}/row_offsets"

# Suffix of what is computed once more, for the consumed rows alone.
_CONSUMED = "/consumed"

#: Behind the names of constants that lost columns: those of all rows keep v and k, those of the consumed rows u and q.
COLUMN_PARTS = ("/vk", "/uq")


@dataclasses.dataclass(frozen=True)
class RowSelection:
    """Which rows of the last activation are read: the last ones of each sequence, sequence by sequence, in order.

    The graph gathers them by an index of its own; the selection says how that index divides among the sequences, which
    the graph cannot show.

    Attributes:
        max_query_len: most selected rows of one sequence, at least 1.
        offsets: graph input [B + 1] int32 -- sequence b owns the selected rows offsets[b] to offsets[b + 1] - 1. None:
            one row per sequence, its last; an empty sequence reads a zero row.
    """

    max_query_len: int = 1
    offsets: str | None = None

    def __post_init__(self) -> None:
        if self.max_query_len < 1:
            raise ValueError(f"max_query_len is {self.max_query_len}; it must be at least 1")
        if self.offsets is None and self.max_query_len != 1:
            raise ValueError(f"max_query_len is {self.max_query_len} without offsets; one row per sequence means 1")


class PruneLastLayer(Pass):
    """Gather the consumed rows before the last layer instead of behind it.

    u, q, attention, norm, gate, projection and residual are computed for these rows alone, k and v for every row. Each
    operator between works row by row, so the numbers are those of the full layer. The packed projection becomes two,
    u|q and v|k, with columns of the same weights; the queries get offsets and a length bound of their own.

    From then on the tap `layer_n` holds only the consumed rows, in the order of the gather: a check against the eager
    model gathers its reference in the same way. The taps before it keep every row.

    Cases: 1. the gather reads the activation; 2. it reads the activation with a zero row appended: an index behind the
    last row still reads zeros, because an output bias would move the row; 3. a time bias: the timestamps of the
    queries are gathered as well; 4. the gathered rows are a graph output, whose name an Identity keeps; 5. the number
    of rows of layer_n is read: it is that of layer_{n-1}.

    Runs after `detach_taps` and `name_dims`, before `annotate_attention` and `attach_native_body`.
    """

    name = PASS_NAME

    def __init__(self, num_layers: int, selection: RowSelection) -> None:
        self._num_layers = num_layers
        self._selection = selection

    @property
    def _query_offsets(self) -> str:
        return self._selection.offsets or ROW_OFFSETS

    def requires(self, model: onnx.ModelProto) -> None:
        nodes = [node for node in model.graph.node if is_attention(node)]
        self.expect(PassResult({"attention": len(nodes)}), "attention", self._num_layers)
        inputs = [value.name for value in model.graph.input]
        if self._selection.offsets is not None and self._selection.offsets not in inputs:
            refuse(f"the offsets {self._selection.offsets} are no graph input; inputs: {', '.join(inputs)}")

    def call(self, model: onnx.ModelProto) -> PassResult:
        if self._is_pruned(model):
            return PassResult({"attention": 0, "projections": 0})
        layer = LastLayer(model.graph, self._num_layers)
        _Pruning(model.graph, layer, self._selection, self._query_offsets).run()
        return PassResult({"attention": 1, "projections": 1})

    def ensures(self, model: onnx.ModelProto, result: PassResult) -> None:
        self.expect(PassResult({"attention": int(self._is_pruned(model))}), "attention", 1)

    def _is_pruned(self, model: onnx.ModelProto) -> bool:
        """Whether the queries of the last layer are the selected rows."""
        *_, last = (node for node in model.graph.node if is_attention(node))
        return bool(last.input[3] == self._query_offsets)


class _Pruning:
    """The change: new nodes in front of the layer, its nodes on one side or both, the gather gone."""

    def __init__(self, graph: onnx.GraphProto, layer: LastLayer, selection: RowSelection, offsets: str) -> None:
        self.graph, self.layer, self.selection, self.offsets = graph, layer, selection, offsets
        self.values = layer.values
        self.consumed = layer.rows + _CONSUMED
        self.index = layer.gather.input[1]
        self.renamed = {layer.rows: self.consumed}
        for i in layer.shared - {layer.split}:
            self.renamed |= {name: name + _CONSUMED for name in self.values.nodes[i].output}
        parts = range(len(layer.sizes))
        self.parts = {True: layer.consumed_parts, False: [p for p in parts if p not in layer.consumed_parts]}
        self.touched: list[str] = []

    def run(self) -> None:
        """Rewrite the graph in place."""
        layer, nodes = self.layer, self.values.nodes
        attributes = node_attributes(nodes[layer.attention])
        if self.selection.max_query_len > attributes["max_query_len"]:
            refuse(
                f"max_query_len {self.selection.max_query_len} of the selection exceeds that of the layer, "
                f"{attributes['max_query_len']}"
            )
        first = min(layer.on_all | layer.on_consumed)
        early = self._early(first, attributes)
        for i in layer.row_counts:  # case 5
            nodes[i].input[0] = layer.rows
        order = [*nodes[:first], *(nodes[i] for i in early), *self._head(attributes)]
        for i in range(first, len(nodes)):
            if i not in layer.removed and i not in early:
                order += self._rewritten(i)
        self._replace_nodes(order)
        self._drop_unread()

    def _early(self, first: int, attributes: dict[str, Any]) -> list[int]:
        """Nodes behind the layer's first one that the new nodes in front of it depend on."""
        layer = self.layer
        ends = set(layer.row_counts)
        wanted = [self.index, self.values.nodes[layer.attention].input[4]]
        if layer.zero_row is not None:
            wanted.append(layer.zero_row)
        if attributes["time_bias"]:
            wanted.append(self._row_timestamps(attributes)[1])
        needed = self.values.above(wanted, lambda i: () if i in ends else self.values.nodes[i].input)
        if needed & (layer.on_all | layer.on_consumed | layer.removed):
            refuse(f"the index of {layer.gather.name}, the offsets or the timestamps depend on the last layer")
        return sorted(i for i in needed if i >= first)

    def _head(self, attributes: dict[str, Any]) -> list[onnx.NodeProto]:
        """The gathered rows, their timestamps (case 3) and their offsets."""
        layer = self.layer
        head = self._gathered(layer.rows, self.consumed, layer.zero_row)
        if attributes["time_bias"]:
            place, times = self._row_timestamps(attributes)
            zero = None
            if layer.zero_row is not None:
                kind = helper.tensor_dtype_to_np_dtype(self.values.element_type(times))
                zero = self._initializer("zero_timestamp", np.zeros(1, kind))
            gathered = f"{PASS_NAME}/row_timestamps"
            head += self._gathered(times, gathered, zero)
            self.values.nodes[layer.attention].input[place] = gathered
        if self.selection.offsets is None:
            head += self._one_row_each()
        return head

    def _row_timestamps(self, attributes: dict[str, Any]) -> tuple[int, str]:
        names = [each.name for each in attention_contract().present_inputs(attributes)]
        place = names.index("row_timestamps")
        return place, self.values.nodes[self.layer.attention].input[place]

    def _gathered(self, rows: str, result: str, zero_row: str | None) -> list[onnx.NodeProto]:
        """Rows by the gather's index; with a zero row (case 2) an index behind the last row reads it."""
        kind, shape = self.values.element_type(rows), self.values.row_shape(rows)
        nodes, source = [], rows
        if zero_row is not None:
            source = f"{result}/source"
            nodes.append(helper.make_node("Concat", [rows, zero_row], [source], name=source, axis=0))
            self._describe(source, kind, None, shape)
        nodes.append(helper.make_node("Gather", [source, self.index], [result], name=result, axis=0))
        self._describe(result, kind, self.layer.row_dim, shape)
        return nodes

    def _one_row_each(self) -> list[onnx.NodeProto]:
        """Offsets 0..B."""
        of_keys = self.values.nodes[self.layer.attention].input[4]
        first_axis = self._initializer("first_axis", np.zeros(1, np.int64))
        zero, one = self._initializer("0", np.array(0)), self._initializer("1", np.array(1))
        size, count, numbers = (f"{PASS_NAME}/{name}" for name in ("offsets_shape", "num_offsets", "numbers"))
        dim = self.values.types[of_keys].shape.dim[0]
        self._describe(size, TensorProto.INT64, 1, ())
        self._describe(count, TensorProto.INT64)
        self._describe(numbers, TensorProto.INT64, dim, ())
        self._describe(self.offsets, TensorProto.INT32, dim, ())
        return [
            helper.make_node("Shape", [of_keys], [size], name=size),
            helper.make_node("Squeeze", [size, first_axis], [count], name=count),
            helper.make_node("Range", [zero, count, one], [numbers], name=numbers),
            helper.make_node("Cast", [numbers], [self.offsets], name=self.offsets, to=TensorProto.INT32),
        ]

    def _rewritten(self, i: int) -> list[onnx.NodeProto]:
        """What stands in the place of node i."""
        layer, node = self.layer, self.values.nodes[i]
        if i in layer.shared:
            twin = onnx.NodeProto.FromString(node.SerializeToString())
            twin.name = node.name + _CONSUMED
            return [self._side(i, node, consumed=False), self._side(i, twin, consumed=True)]
        if i in layer.on_consumed:
            self._read_consumed(node)
            self._set_rows(node.output)
            if i == layer.attention:
                self._limit_queries(node)
        else:
            self._rename(node.input, {layer.gather.output[0]: layer.out})
        return [node, *self._closing()] if layer.out in node.output else [node]

    def _side(self, i: int, node: onnx.NodeProto, *, consumed: bool) -> onnx.NodeProto:
        """A shared node for one side; from the projection on with that side's columns."""
        layer = self.layer
        width = None
        if i in layer.packed or i == layer.projection:
            width = sum(layer.sizes[part] for part in self.parts[consumed])
            self._take_columns(i, node, consumed)
        if i == layer.split:
            kept = [node.output[part] for part in self.parts[consumed]]
            del node.output[:]
            node.output.extend(kept)
        if consumed:
            self._read_consumed(node)
            for old in list(node.output):
                name = self.renamed.get(old, old)
                if name != old:
                    shape = self.values.row_shape(old)
                    shape = shape if width is None else (width,)
                    self._describe(name, self.values.element_type(old), layer.row_dim, shape)
            self._rename(node.output, self.renamed)
            self._set_rows(node.output)
        elif width is not None and i != layer.split:
            self.values.types[node.output[0]].shape.dim[1].dim_value = width
        return node

    def _take_columns(self, i: int, node: onnx.NodeProto, consumed: bool) -> None:
        """Constants as wide as the projection lose the other side's columns; a Split gets its side's sizes."""
        layer = self.layer
        for place, name in enumerate(node.input):
            array = self.values.constant(name)
            if array is None:
                continue
            if i == layer.split:
                part = array[self.parts[consumed]]
            elif array.size > 1:
                bounds = np.cumsum([0, *layer.sizes])
                columns = [np.arange(bounds[p], bounds[p + 1]) for p in self.parts[consumed]]
                part = array[..., np.concatenate(columns)]
            else:
                continue
            node.input[place] = self._initializer(f"{name}{COLUMN_PARTS[consumed]}", part)
            self.touched.append(name)

    def _limit_queries(self, node: onnx.NodeProto) -> None:
        node.input[3] = self.offsets
        for attribute in node.attribute:
            if attribute.name == "max_query_len":
                attribute.i = self.selection.max_query_len

    def _closing(self) -> list[onnx.NodeProto]:
        """Behind the node that computes layer_n: zero what stands for no row (case 2), keep an output's name (4)."""
        layer = self.layer
        nodes = []
        if layer.zero_row is not None:
            nodes += self._zeroed()
        if layer.gather.output[0] in self.values.outputs:
            name = layer.gather.output[0]
            nodes.append(helper.make_node("Identity", [layer.out], [name], name=f"{PASS_NAME}/{name}"))
        return nodes

    def _zeroed(self) -> list[onnx.NodeProto]:
        layer = self.layer
        kind, shape = self.values.element_type(layer.out), self.values.row_shape(layer.out)
        wide, count, column, is_row = (f"{PASS_NAME}/{name}" for name in ("unmasked", "num_rows", "index", "is_row"))
        producer = self.values.nodes[self.values.producer[layer.out]]
        self._rename(producer.output, {layer.out: wide})
        self._describe(wide, kind, layer.row_dim, shape)
        index, nodes = self.index, []
        if self.values.element_type(index) != TensorProto.INT64:
            index = f"{PASS_NAME}/index_int64"
            nodes.append(helper.make_node("Cast", [self.index], [index], name=index, to=TensorProto.INT64))
            self._describe(index, TensorProto.INT64, layer.row_dim, ())
        self._describe(count, TensorProto.INT64, 1, ())
        self._describe(column, TensorProto.INT64, layer.row_dim, (1,))
        self._describe(is_row, TensorProto.BOOL, layer.row_dim, (1,))
        second_axis = self._initializer("second_axis", np.ones(1, np.int64))
        zero = self._initializer("zero", np.zeros((), helper.tensor_dtype_to_np_dtype(kind)))
        return [
            *nodes,
            helper.make_node("Shape", [layer.rows], [count], name=count, start=0, end=1),
            helper.make_node("Unsqueeze", [index, second_axis], [column], name=column),
            helper.make_node("Less", [column, count], [is_row], name=is_row),
            helper.make_node("Where", [is_row, wide, zero], [layer.out], name=f"{PASS_NAME}/{layer.out}"),
        ]

    def _read_consumed(self, node: onnx.NodeProto) -> None:
        self._rename(node.input, self.renamed)

    @staticmethod
    def _rename(names: Any, renamed: dict[str, str]) -> None:
        for place, name in enumerate(names):
            names[place] = renamed.get(name, name)

    def _set_rows(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.values.types and self.values.types[name].shape.dim:
                self.values.types[name].shape.dim[0].CopyFrom(self.layer.row_dim)

    def _describe(self, name: str, kind: int, rows: Any = None, shape: tuple[int, ...] | None = None) -> None:
        """Value info; `rows` is a size, the dimension of another value, or None where it has no name."""
        info = self.graph.value_info.add(name=name)
        tensor = info.type.tensor_type
        tensor.elem_type = kind
        tensor.shape.SetInParent()
        if shape is None:
            return
        first = tensor.shape.dim.add()
        if isinstance(rows, int):
            first.dim_value = rows
        elif rows is not None:
            first.CopyFrom(rows)
        for size in shape:
            tensor.shape.dim.add(dim_value=size)

    def _initializer(self, name: str, array: NDArray[Any]) -> str:
        full = name if "/" in name else f"{PASS_NAME}/{name}"
        if full not in {tensor.name for tensor in self.graph.initializer}:
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), full))
        return full

    def _replace_nodes(self, order: list[onnx.NodeProto]) -> None:
        gone = {name for i in self.layer.removed for name in self.values.nodes[i].output}
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        infos = [info for info in self.graph.value_info if info.name not in gone]
        kept = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in infos]
        del self.graph.value_info[:]
        self.graph.value_info.extend(kept)

    def _drop_unread(self) -> None:
        """Remove replaced constants that nothing reads any more, and a Cast that made one."""
        waiting = list(self.touched)
        while waiting:
            name = waiting.pop()
            if any(name in node.input for node in self.graph.node):
                continue
            for node in [node for node in self.graph.node if name in node.output]:
                waiting += node.input
                self.graph.node.remove(node)
            for field in (self.graph.initializer, self.graph.value_info):
                for tensor in [tensor for tensor in field if tensor.name == name]:
                    field.remove(tensor)
