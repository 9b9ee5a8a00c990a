"""Find the last layer of a graph, and check that some of its rows can be computed alone. Private to the passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from hstu_compile.artifacts import TAP_PREFIX
from hstu_compile.errors import RewriteError
from hstu_compile.op_schema import is_attention

PASS_NAME = "prune_last_layer"

_ELEMENTWISE = {"Cast", "Add", "Sub", "Mul", "Div", "Sigmoid"}


def refuse(why: str) -> NoReturn:
    raise RewriteError(
        "HSTU-E301",
        f"pass {PASS_NAME} changed 0 of 1 attention",
        why,
        "report this with `hstu-compile env` and the .onnx of --keep-intermediates",
        {"pass": PASS_NAME, "kind": "attention", "expected": 1, "found": 0},
    )


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


class GraphValues:
    """Who makes and who reads each value, and what is known of it. Nodes are meant by their place in the graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.consumers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(i)
        self.outputs = {value.name for value in graph.output}
        self.types = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}

    def above(self, names: Iterable[str], inputs: Callable[[int], Iterable[str]] | None = None) -> set[int]:
        """Nodes that the values depend on; `inputs` narrows which inputs of a node count."""
        found: set[int] = set()
        waiting = list(names)
        while waiting:
            node = self.producer.get(waiting.pop())
            if node is not None and node not in found:
                found.add(node)
                waiting += self.nodes[node].input if inputs is None else inputs(node)
        return found

    def below(self, name: str) -> set[int]:
        """Nodes that depend on the value."""
        reached = {name}
        found: set[int] = set()
        for i, node in enumerate(self.nodes):
            if not reached.isdisjoint(node.input):
                found.add(i)
                reached |= set(node.output)
        return found

    def element_type(self, name: str) -> int:
        if name not in self.types or not self.types[name].elem_type:
            refuse(f"the type of {name} is not recorded in the graph")
        return int(self.types[name].elem_type)

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Sizes of all axes behind the first."""
        node = self.nodes[self.producer[name]] if name in self.producer else None
        if node is not None and is_attention(node):
            return self.row_shape(node.input[2])  # not annotated yet
        dims = self.types[name].shape.dim if name in self.types else []
        if not dims or any(dim.dim_value < 1 for dim in dims[1:]):
            refuse(f"the size of one row of {name} is not recorded in the graph")
        return tuple(dim.dim_value for dim in dims[1:])

    def constant(self, name: str) -> NDArray[Any] | None:
        """Value of an initializer or of its Cast, which the exporter does not fold when it is large."""
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.nodes[self.producer[name]] if name in self.producer else None
        if node is None or node.op_type != "Cast" or node.input[0] not in self.initializers:
            return None
        array = numpy_helper.to_array(self.initializers[node.input[0]])
        return array.astype(helper.tensor_dtype_to_np_dtype(_attribute(node, "to")))


class LastLayer:
    """The parts of the last layer, found and checked; nothing is changed here.

    Attributes:
        rows: layer_{n-1}, all rows.
        out: layer_n.
        gather: the one node that takes rows from layer_n.
        zero_row: value [1, D] that is appended to layer_n before the gather, or None.
        row_counts: nodes that read the number of rows of layer_n.
        attention: the attention node.
        on_all: nodes that k and v depend on.
        on_consumed: nodes that layer_n depends on other than through k and v.
        projection: the packed projection, u|v|q|k.
        packed: nodes from the projection to the split.
        split: the node that takes the projection apart.
    """

    def __init__(self, graph: onnx.GraphProto, num_layers: int) -> None:
        self.values = values = GraphValues(graph)
        self.rows, self.out = f"{TAP_PREFIX}{num_layers - 1}", f"{TAP_PREFIX}{num_layers}"
        for name in (self.rows, self.out):
            if name not in values.producer:
                refuse(f"no node computes {name}")
        self._find_tail()
        inside = values.below(self.rows)
        attention = [i for i in values.above([self.out]) & inside if is_attention(values.nodes[i])]
        if len(attention) != 1:
            refuse(f"{len(attention)} attention nodes lie between {self.rows} and {self.out}, not one")
        self.attention = attention[0]
        node = values.nodes[self.attention]
        if node.input[3] != node.input[4]:
            refuse(f"{node.name} has queries with offsets {node.input[3]} of their own already")
        self.on_all = values.above(node.input[1:3]) & inside
        self.on_consumed = values.above([self.out], self._query_inputs) & inside
        self._find_projection()
        self._check_rows()
        self._check_readers()

    @property
    def shared(self) -> set[int]:
        """Nodes on both sides, which are computed twice."""
        return self.on_all & self.on_consumed

    def _query_inputs(self, node: int) -> Iterable[str]:
        names = list(self.values.nodes[node].input)
        return names[:1] + names[3:] if node == self.attention else names

    def _find_tail(self) -> None:
        values = self.values
        if self.out in values.outputs:
            refuse(f"{self.out} is a graph output: every row of it is read")
        readers = values.consumers.get(self.out, [])
        self.row_counts = [i for i in readers if self._counts_rows(values.nodes[i])]
        tail = [i for i in readers if i not in self.row_counts]
        self.zero_row: str | None = None
        self.removed = set(tail)
        if len(tail) == 1 and values.nodes[tail[0]].op_type == "Concat":
            self.zero_row = self._appended_zero_row(values.nodes[tail[0]])
            tail = values.consumers.get(values.nodes[tail[0]].output[0], [])
            self.removed |= set(tail)
        gather = values.nodes[tail[0]] if len(tail) == 1 else None
        if gather is None or gather.op_type != "Gather" or _attribute(gather, "axis", 0) != 0:
            found = ", ".join(f"{values.nodes[i].op_type} {values.nodes[i].name}" for i in tail) or "nobody"
            refuse(f"{self.out} must be read by one Gather of rows; it is read by {found}")
        self.gather = gather
        dims = values.types[gather.output[0]].shape.dim if gather.output[0] in values.types else []
        if len(dims) != 2:
            refuse(f"{gather.name} must gather [rows, D]; its result has {len(dims)} axes")
        self.row_dim = dims[0]

    @staticmethod
    def _counts_rows(node: onnx.NodeProto) -> bool:
        return node.op_type == "Shape" and _attribute(node, "start", 0) == 0 and _attribute(node, "end") == 1

    def _appended_zero_row(self, concat: onnx.NodeProto) -> str:
        zero = concat.input[1] if len(concat.input) == 2 and concat.input[0] == self.out else ""
        width = self.values.row_shape(self.out)[0]
        array = self.values.constant(zero)
        maker = self.values.producer.get(zero)
        if maker is not None and self.values.nodes[maker].op_type == "ConstantOfShape":
            node = self.values.nodes[maker]
            shape, value = self.values.constant(node.input[0]), _attribute(node, "value")
            fill = numpy_helper.to_array(value) if value is not None else np.zeros(1, np.float32)
            array = None if shape is None else np.broadcast_to(fill, shape.tolist())
        is_row = array is not None and array.shape == (1, width) and not array.astype(np.float32).any()
        if _attribute(concat, "axis") != 0 or not is_row or len(self.values.consumers[concat.output[0]]) != 1:
            refuse(f"{concat.name} must append one zero row to {self.out} for one Gather, and does not")
        return zero

    def _find_projection(self) -> None:
        values, nodes = self.values, self.values.nodes
        splits = [i for i in self.shared if nodes[i].op_type == "Split"]
        products = [i for i in self.shared if nodes[i].op_type == "MatMul"]
        if len(splits) != 1 or len(products) != 1:
            refuse(
                f"queries and keys must share one MatMul and one Split; they share {len(products)} and {len(splits)}"
            )
        self.projection, self.split = products[0], splits[0]
        product, split = nodes[self.projection], nodes[self.split]
        self.packed = self.shared & values.below(product.output[0])
        weight, sizes = values.constant(product.input[1]), values.constant(split.input[1])
        if weight is None or sizes is None or weight.ndim != 2 or weight.shape[1] != sizes.sum():
            refuse(f"{product.name} and {split.name} must have constant weights and sizes of one width")
        self.width, self.sizes = int(weight.shape[1]), [int(size) for size in sizes]
        if values.row_shape(split.input[0]) != (self.width,) or _attribute(split, "axis", 0) not in (1, -1):
            refuse(f"{split.name} must take apart the {self.width} columns of the projection")
        self.consumed_parts = []
        for part, name in enumerate(split.output):
            readers = set(values.consumers.get(name, []))
            if readers & self.on_all and readers & self.on_consumed:
                refuse(f"part {part} of {split.name} is read by queries and keys")
            if not readers & self.on_all:
                self.consumed_parts.append(part)
        for i in sorted(self.packed - {self.split}):
            if nodes[i].op_type not in _ELEMENTWISE:
                refuse(f"{nodes[i].op_type} {nodes[i].name} mixes the columns of the packed projection")
            for name in nodes[i].input:
                constant = values.constant(name)
                if constant is not None and constant.size != 1 and constant.shape[-1] != self.width:
                    refuse(f"{name} of {nodes[i].name} is not as wide as the packed projection")

    def _check_rows(self) -> None:
        """Every node on the consumed rows must work row by row."""
        made = {self.rows, *(name for i in self.on_consumed for name in self.values.nodes[i].output)}
        for i in sorted(self.on_consumed - {self.attention}):
            node = self.values.nodes[i]
            if problem := self._row_problem(node, made):
                refuse(f"{node.op_type} {node.name} cannot be computed for some rows alone: {problem}")

    def _row_problem(self, node: onnx.NodeProto, made: Collection[str]) -> str | None:
        values = self.values
        rank = 1 + len(values.row_shape(node.output[0]))
        others = [name for name in node.input if name and name not in made]
        constants = {name: values.constant(name) for name in others}
        if unknown := [name for name, value in constants.items() if value is None]:
            return f"{', '.join(unknown)} is neither constant nor of this layer"
        if node.op_type in _ELEMENTWISE:
            tall = [name for name, value in constants.items() if value.ndim >= rank and value.shape[0] != 1]  # type: ignore[union-attr]
            return f"{tall[0]} has rows of its own" if tall else None
        if node.op_type == "MatMul":
            return None if others == [node.input[1]] and rank == 2 else "it is no projection of rows"
        if node.op_type == "LayerNormalization":
            return None if _attribute(node, "axis", -1) % rank else "it norms over the rows"
        if node.op_type in ("Split", "Concat"):
            taken = others[:1] if node.op_type == "Concat" else []
            return None if _attribute(node, "axis", 0) % rank and not taken else "it acts on the rows"
        if node.op_type == "Reshape":
            shape = constants.get(node.input[1])
            kept = shape is not None and shape[0] == -1
            same = math.prod(values.row_shape(node.input[0])) == math.prod(values.row_shape(node.output[0]))
            return None if kept and same else "it does not keep the rows"
        return "the operator is not known to work row by row"

    def _check_readers(self) -> None:
        """No value that loses rows or columns may be read by anything else."""
        nodes = self.values.nodes
        for i in sorted((self.on_consumed - self.shared) | self.packed):
            names = [nodes[i].output[part] for part in self.consumed_parts] if i == self.split else nodes[i].output
            for name in names:
                strangers = set(self.values.consumers.get(name, [])) - self.on_consumed - self.on_all
                if name == self.out:
                    strangers -= self.removed | set(self.row_counts)
                if strangers or name in self.values.outputs:
                    who = ", ".join(nodes[j].name for j in sorted(strangers)) or "the caller of the graph"
                    refuse(f"{name} of the last layer is also read by {who}")
