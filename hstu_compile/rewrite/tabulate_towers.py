"""Look up what a tower makes of a table's rows, which is computed once, when the graph is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import TensorSpec
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.op_schema import is_norm
from hstu_compile.rewrite._pass import Pass, PassResult
from hstu_compile.table_files import TABLE_BYTES, is_external

#: Runs a graph without inputs; what its only output is, in float32 where the graph says bfloat16.
Evaluate = Callable[[onnx.ModelProto], NDArray[Any]]

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})


class TabulateTowers(Pass):
    """Replace a chain of products and norms on rows of a constant table by a table of its results.

    A ranking model's towers turn each looked-up embedding by two products and two norms into what is added up. All of
    that is a function of the row, and there are as many rows as items, not as many as events. So it is computed for
    every row of the table once, by ONNX Runtime, and the graph looks up the result.

    Cases: 1. rows that a Gather takes from a constant matrix, or a Concat of such rows of one matrix, and behind them
    nodes that treat each row by itself and read nothing else but constants (MatMul, HstuNorm, Add, Mul, Cast); 2. the
    same nodes on a constant: what they make is a constant; 3. a chain without a product or norm stays, as does one on a
    table that is a file, and one whose results would be a table of that size; 4. a value that is a graph output or a
    tap ends a chain, and is looked up itself.

    A table is stored in the type of the rows that it is made of. Where the chain ends in float32, a Cast follows the
    look-up: that is one rounding to the half type of each summand of the first residual, which is rounded to that type
    when it is a sum.

    Runs after fuse_norms, which makes one node of each norm and what surrounds it.

    Args:
        evaluate: computes the tables.
        tap_names: values that stay.
    """

    name = "tabulate_towers"

    def __init__(self, evaluate: Evaluate, tap_names: Iterable[str] = ()) -> None:
        self._evaluate, self._tap_names = evaluate, frozenset(tap_names)

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = _Graph(model, self._tap_names)
        counts = {"tables": 0, "constants": 0, "nodes": 0}
        made: dict[_Rows, TensorProto] = {}
        replaced: dict[str, list[onnx.NodeProto]] = {}
        for value in graph.ends():
            rows = graph.rows[value]
            if rows not in made:
                made[rows] = self._table(graph, value, rows)
            table = made[rows]
            if rows.is_gathered:
                replaced[value] = graph.looked_up(value, table)
            else:
                replaced[value] = []
                graph.constant(value, table)
        counts["tables"] = sum(rows.is_gathered for rows in made)
        counts["constants"] = len(made) - counts["tables"]
        if made:
            before = len(model.graph.node)
            graph.replace(replaced, [table for rows, table in made.items() if rows.is_gathered])
            counts["nodes"] = before - len(model.graph.node)
        return PassResult(counts)

    def _table(self, graph: _Graph, value: str, rows: _Rows) -> TensorProto:
        """What the chain makes of every row."""
        found = np.asarray(self._evaluate(graph.chain_model(value, rows)))
        stored = graph.stored_type(value, rows)
        return numpy_helper.from_array(found.astype(helper.tensor_dtype_to_np_dtype(stored)), f"{value}/rows")


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Where the rows of a value come from.

    Attributes:
        table: the constant matrix.
        chain: nodes that each row has gone through, by their places in the graph.
        is_gathered: rows are looked up; else the value is a constant.
    """

    table: str
    chain: tuple[int, ...] = ()
    is_gathered: bool = True


class _Graph:
    """A graph, and which of its values are made of a table's rows."""

    def __init__(self, model: onnx.ModelProto, tap_names: frozenset[str]) -> None:
        self._model = model
        graph = model.graph
        self._nodes = list(graph.node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer if not is_external(tensor)}
        # The exporter leaves values whose type it does not say.
        typed = [each for each in (*graph.value_info, *graph.output) if each.type.tensor_type.elem_type]
        self._specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in tensor_specs(typed)}
        self._types = {each.name: each.type.tensor_type.elem_type for each in typed}
        self._kept = {output.name for output in graph.output} | tap_names
        self._producers = {name: index for index, node in enumerate(self._nodes) for name in node.output}
        self.rows: dict[str, _Rows] = {}
        #: The operand of a chain's node that has the rows.
        self._operands: dict[int, str] = {}
        for index, node in enumerate(self._nodes):
            if len(node.output) == 1 and (rows := self._rows_of(index, node)) is not None:
                self.rows[node.output[0]] = rows

    def _rows_of(self, index: int, node: onnx.NodeProto) -> _Rows | None:
        spec = self._specs.get(node.output[0])
        if spec is None or len(spec.shape) != 2 or not isinstance(spec.shape[1], int):
            return None
        axis = next((each.i for each in node.attribute if each.name == "axis"), 0)
        if node.op_type == "Gather":
            looks_up = axis == 0 and self._is_table(node.input[0]) and node.input[1] not in self._constants
            return _Rows(node.input[0]) if looks_up else None
        if node.op_type == "Concat":
            (first, *others) = {self.rows.get(name) for name in node.input}
            return first if axis == 0 and not others and first is not None and first.is_gathered else None
        return self._through(index, node)

    def _through(self, index: int, node: onnx.NodeProto) -> _Rows | None:
        """The rows of a node that treats each by itself."""
        if node.op_type not in ("MatMul", "Add", "Mul", "Cast") and not is_norm(node):
            return None
        places = (0, 1) if node.op_type in ("Add", "Mul") else (0,)
        for place in places:
            name = node.input[place]
            others = [each for other, each in enumerate(node.input) if other != place and each]
            before = self.rows.get(name) if name not in self._kept else None
            if before is None and self._is_table(name):
                before = _Rows(name, is_gathered=False)
            if before is None or not all(self._is_alike_for_rows(each, node) for each in others):
                continue
            self._operands[index] = name
            return dataclasses.replace(before, chain=(*before.chain, index))
        return None

    def _is_table(self, name: str) -> bool:
        tensor = self._constants.get(name)
        return tensor is not None and len(tensor.dims) == 2 and tensor.data_type in _FLOATS

    def _is_alike_for_rows(self, name: str, node: onnx.NodeProto) -> bool:
        """Whether an operand beside the rows is a constant that is the same for each of them."""
        tensor = self._constants.get(name)
        if tensor is None:
            return False
        return len(tensor.dims) == 2 if node.op_type == "MatMul" else math.prod(tensor.dims[:-1]) == 1

    def ends(self) -> list[str]:
        """The last value of every chain that is worth a table."""
        return [
            value
            for value, rows in self.rows.items()
            if any(self._nodes[index].op_type == "MatMul" or is_norm(self._nodes[index]) for index in rows.chain)
            and self._table_bytes(value, rows) < TABLE_BYTES
            and self._is_wanted(value)
        ]

    def _is_wanted(self, value: str) -> bool:
        """Whether a value is read by more than the next node of its chain."""
        readers = [index for index, node in enumerate(self._nodes) if value in node.input]
        return value in self._kept or not all(self._goes_on(index, value) for index in readers)

    def _goes_on(self, index: int, value: str) -> bool:
        node = self._nodes[index]
        return node.output[0] in self.rows and (node.op_type == "Concat" or self._operands.get(index) == value)

    def stored_type(self, value: str, rows: _Rows) -> int:
        """The type of the results: no wider than the table's."""
        wanted, given = self._types[value], self._constants[rows.table].data_type
        return int(given if rows.is_gathered and wanted == TensorProto.FLOAT else wanted)

    def _table_bytes(self, value: str, rows: _Rows) -> int:
        width = self._specs[value].shape[1]
        assert isinstance(width, int)  # _rows_of
        size = np.dtype(helper.tensor_dtype_to_np_dtype(self.stored_type(value, rows))).itemsize
        return int(self._constants[rows.table].dims[0]) * width * size

    def chain_model(self, value: str, rows: _Rows) -> onnx.ModelProto:
        """A graph without inputs that computes the chain on the whole table."""
        nodes: list[onnx.NodeProto] = []
        made = rows.table
        for index in rows.chain:
            node = onnx.NodeProto.FromString(self._nodes[index].SerializeToString())
            # Between two nodes of a chain there may be a Concat, and before the first there is a Gather.
            node.input[list(node.input).index(self._operands[index])] = made
            made = node.output[0]
            nodes.append(node)
        read = {name for node in nodes for name in node.input}
        output = helper.make_tensor_value_info(made, self._types[value], None)
        graph = helper.make_graph(
            nodes, "rows", [], [output], [tensor for name, tensor in self._constants.items() if name in read]
        )
        model = helper.make_model(
            graph,
            functions=self._model.functions,
            opset_imports=self._model.opset_import,
            ir_version=self._model.ir_version,
        )
        assert isinstance(model, onnx.ModelProto)
        return model

    def looked_up(self, value: str, table: TensorProto) -> list[onnx.NodeProto]:
        """Nodes that make a value of the rows of its table."""
        nodes: list[onnx.NodeProto] = []
        wanted = self._types[value]
        made = self._structure(value, value, table, nodes)
        if table.data_type == wanted:
            nodes[-1].output[0] = value
        else:
            nodes.append(helper.make_node("Cast", [made], [value], name=f"{value}/widened", to=wanted))
            self._describe(made, value, table)
        return nodes

    def _structure(self, name: str, value: str, table: TensorProto, nodes: list[onnx.NodeProto]) -> str:
        """The Gathers, and the Concats of them, that a value was made of, on another table."""
        index = self._producers[name]
        node = self._nodes[index]
        if index in self._operands:
            return self._structure(self._operands[index], value, table, nodes)
        new = onnx.NodeProto.FromString(node.SerializeToString())
        new.name = new.output[0] = f"{value}/{node.output[0]}"
        if node.op_type == "Gather":
            new.input[0] = table.name
        else:
            for place, each in enumerate(node.input):
                new.input[place] = self._structure(each, value, table, nodes)
                self._describe(new.input[place], each, table)
        nodes.append(new)
        return str(new.output[0])

    def _describe(self, name: str, like: str, table: TensorProto) -> None:
        """Write down the type of a new value with the rows of another one."""
        shape = [self._specs[like].shape[0], table.dims[1]]
        self._model.graph.value_info.append(helper.make_tensor_value_info(name, table.data_type, shape))

    def constant(self, value: str, table: TensorProto) -> None:
        """Make a value a constant."""
        tensor = TensorProto.FromString(table.SerializeToString())
        tensor.name = value
        self._model.graph.initializer.append(tensor)

    def replace(self, replaced: Mapping[str, list[onnx.NodeProto]], tables: Iterable[TensorProto]) -> None:
        """Put new nodes in the places of values, and drop what nobody reads any more."""
        graph = self._model.graph
        graph.initializer.extend(tables)
        nodes: list[onnx.NodeProto] = []
        for node in self._nodes:
            new = replaced.get(node.output[0]) if node.output else None
            nodes += [node] if new is None else new
        needed, kept = set(self._kept), []
        for node in reversed(nodes):
            if needed.isdisjoint(node.output):
                continue
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            needed |= _read_by(node)
        del graph.node[:]
        graph.node.extend(reversed(kept))
        made = {name for node in kept for name in node.output}
        infos = [info for info in graph.value_info if info.name in made]
        del graph.value_info[:]
        graph.value_info.extend(infos)
        read = [tensor for tensor in graph.initializer if tensor.name in needed]
        copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in read]
        del graph.initializer[:]
        graph.initializer.extend(copies)


def _read_by(node: onnx.NodeProto) -> set[str]:
    """Also what the bodies of its attributes read."""
    found = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            found.update(*(_read_by(each) for each in graph.node), (output.name for output in graph.output))
    return found
