"""Cut a graph at every attention into segments, for a runtime that takes no plugins. Level 3.

Input: a rewritten `OnnxGraph`. Output: a `SegmentedGraph`: segment, attention, norm, segment, ... in the order of the
layers. Attentions are computed by kernels, and so are the norms of cases 8 and 9; everything else is in a segment.

The rule of what runs where:

1. A node runs in the segment of the first that needs it, and never before an attention, or a norm of case 9, that it
   depends on. So index arithmetic of the last layer, and the whole tower of the candidates, run where they are read,
   and only what they are made of crosses.
2. What follows from sizes and constants alone is computed anew in every segment that reads it: it may be the shape of
   something there, which a runtime must know on the host, and it reads no memory.
3. So is a view (Reshape, Squeeze, Unsqueeze, Identity) and a Cast to a type that is no smaller, unless a kernel
   reads it: the value that it is made of crosses in its place, which takes no more bytes, and the segment's compiler
   fuses it with the reader.
4. A node that reads a large constant (an embedding table) runs where the first such node does, so that no table is in
   two engines, unless a cut lies in between.
5. Everything else is computed once and crosses, if a later segment or kernel reads it.
6. A size that is also that of a graph input's axis is read there, since an input is everywhere.
7. q, k and v that are columns of a tensor are not made: the tensor crosses, attentions read its columns where they lie,
   and a segment that needs others (the gate of a norm that is not by case 8) slices them itself, as by case 3. Only
   if no more bytes cross than without, or the tensor is what a product ends in: its kernel writes it whole anyway, and
   slices would be kernels that copy. They may live longer, and where keys and values are outputs, more crosses.
8. A norm of an attention's output (`following_norms` says which) is no segment's: its kernel runs right behind the
   attention. It reads the attention's output itself, which then lives until there, and its gate by case 7 or, where
   the gate is no column, as a tensor that crosses.
9. So is a norm of the towers in front of the first layer, and that layer's own norm of their sum (`tower_norms` says
   which, and of what type the result is). The graph is cut there too; those with as many cuts in a row in front of them
   run between the same two segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import Crossing, KernelCall, OnnxGraph, SegmentedGraph, Step, TensorSpec
from hstu_compile.axis_sizes import AxisSize, axis_size
from hstu_compile.errors import RewriteError
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.op_schema import is_attention, node_attributes
from hstu_compile.rewrite._column_views import ColumnViews, named_inputs
from hstu_compile.rewrite.following_norms import VIEWS, following_norms
from hstu_compile.rewrite.tower_norms import tower_norms
from hstu_compile.table_files import tensor_bytes

# Constants from this size on are in one segment only, if possible.
_LARGE_BYTES = 1 << 20

# What computes sizes, and tensors that follow from sizes.
_SIZE_OPERATORS = VIEWS | {
    "Add",
    "Cast",
    "Clip",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Div",
    "Expand",
    "Gather",
    "Max",
    "Min",
    "Mod",
    "Mul",
    "Range",
    "Shape",
    "Size",
    "Slice",
    "Sub",
}


_PRODUCTS = frozenset({"MatMul", "Gemm"})
_EPILOGUES = frozenset({"Add", "Cast", "Mul", "Sigmoid"})


@dataclasses.dataclass
class _Placement:
    """Where each node of a graph runs.

    Attributes:
        repeated: nodes that run in every segment that reads them.
        segments: of each node that somebody needs, the segments that it runs in: exactly one unless it is repeated.
        depth: of each node, and of each value by name, the number of cuts in a row that it depends on.
    """

    repeated: frozenset[int]
    segments: dict[int, frozenset[int]]
    depth: dict[str, int]


def segmented_from_onnx(graph: OnnxGraph) -> SegmentedGraph:
    """Cut a graph at its attentions.

    Args:
        graph: as it ships: every intermediate value that could cross has a recorded type. It is not changed.

    Raises:
        RewriteError: HSTU-E303, if a tensor that would have to cross has no known type or shape.
    """
    plain = _Cut(graph)
    if not (sources := [source for source in plain.column_views.sources if plain.can_cross(source)]):
        return plain.result()
    viewed = _Cut(graph, sources)
    paying = {
        source
        for source in sources
        if plain.ends_a_product(source) or viewed.row_bytes(source) <= plain.row_bytes(source)
    }
    return _Cut(graph, paying).result()


class _Cut:
    """One graph being cut. Nodes are meant by their place in the graph.

    Args:
        graph: the graph.
        sources: tensors whose columns kernels read where they lie (case 7).
    """

    def __init__(self, graph: OnnxGraph, sources: Collection[str] = ()) -> None:
        self.graph, self.proto, self.sources = graph, graph.model.graph, sources
        known = tensor_specs([*self.proto.value_info, *self.proto.input, *self.proto.output])
        self.specs = {spec.name: spec for spec in known}
        self.inputs = {spec.name for spec in graph.inputs}
        self.outputs = {spec.name for spec in graph.outputs}
        initializers = {tensor.name: tensor for tensor in self.proto.initializer}
        self.norms = following_norms(self.proto)
        towers = tower_norms(self.proto)
        nodes = [each for node in self.proto.node for each in towers.get(node.output[0], (node,))]
        for name, (made, *widened) in towers.items():
            if widened:
                stored, dtype = made.output[0], self.specs[made.input[0]].dtype
                self.specs[stored] = dataclasses.replace(self.specs[name], name=stored, dtype=dtype)
        self.column_views = ColumnViews(nodes, self.norms, initializers, self.specs, self.outputs)
        rewritten = self.column_views.reading(sources)
        self.views = rewritten.views
        self.nodes = [self._sized_by_input(node) for node in rewritten.nodes]
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.constants = initializers | {tensor.name: tensor for tensor in rewritten.constants}
        in_towers = {made.output[0] for made, *_ in towers.values()}
        # Kernels with a segment in front of them.
        self.cuts = [i for i, n in enumerate(self.nodes) if is_attention(n) or not in_towers.isdisjoint(n.output)]
        # The norms right behind each of them, which is meant by its place.
        self.followers: dict[int, list[int]] = {i: [] for i in self.cuts}
        for name, norm in self.norms.items():
            self.followers[self.producer[norm.attention]].append(self.producer[name])
        self.kernels = {i for cut, norms in self.followers.items() for i in (cut, *norms)}
        self.read_by_kernel = {name for i in self.kernels for name in self.nodes[i].input}
        self.placement = self._placed()

    def result(self) -> SegmentedGraph:
        """All segments, calls, and what crosses between them."""
        groups = self._groups()
        by_depth: dict[int, list[int]] = {}
        for i in self.cuts:
            by_depth.setdefault(self._depth_of(i), []).append(i)
        order = list(groups)
        steps: list[Step] = []
        calls: list[KernelCall] = []
        for depth in sorted({*groups, *by_depth}):
            if depth in groups:
                steps.append(Step("segment", order.index(depth)))
            for cut in by_depth.get(depth, []):
                for i in (cut, *self.followers[cut]):
                    steps.append(Step("kernel", len(calls)))
                    calls.append(self._call(i))
        gives = self._gives(groups)
        segments = [self._segment(number, groups[depth], gives[depth]) for number, depth in enumerate(order)]
        whole = SegmentedGraph(
            name=self.graph.name,
            precision=self.graph.precision,
            inputs=self.graph.inputs,
            outputs=self.graph.outputs,
            segments=tuple(segments),
            calls=tuple(calls),
            steps=tuple(steps),
            crossing=(),
            constants={
                name: np.ascontiguousarray(numpy_helper.to_array(self.constants[name]))
                for call in calls
                for name in call.inputs.values()
                if name in self.constants
            },
        )
        return dataclasses.replace(whole, crossing=self._crossing(whole))

    def can_cross(self, name: str) -> bool:
        """Whether the type and shape of a value are known well enough."""
        try:
            self._spec(name)
        except RewriteError:
            return False
        return True

    def ends_a_product(self, source: str) -> bool:
        """Whether a value is a product, or made of one and of constants by operators that its kernel takes in."""
        products, wanted, seen = 0, [source], {source}
        while wanted:
            name = wanted.pop()
            if name in self.constants:
                continue
            node = self.nodes[self.producer[name]] if name in self.producer else None
            if node is None or node.op_type not in _PRODUCTS | _EPILOGUES:
                return False
            if node.op_type in _PRODUCTS:
                products += 1
                continue
            wanted += [each for each in node.input if each and each not in seen]
            seen.update(node.input)
        return products == 1

    def row_bytes(self, source: str) -> int:
        """Bytes per row that cross, of a tensor [rows, width] and of what is its columns."""
        counts = {source: int(self.specs[source].shape[1])}
        for node in self.nodes:
            for name in node.output:
                columns = self.column_views.columns.get(name)
                if columns is not None and columns.source == source:
                    counts[name] = columns.count
                elif node.op_type in VIEWS and node.input[0] in counts:
                    counts[name] = counts[node.input[0]]
        crossing = {name for names in self._gives(self._groups()).values() for name in names}
        return sum(counts[name] * self._itemsize(name) for name in crossing.intersection(counts))

    def _groups(self) -> dict[int, list[int]]:
        """The nodes of every segment by its depth, all ascending."""
        groups: dict[int, list[int]] = {}
        for i, where in self.placement.segments.items():
            for segment in where:
                groups.setdefault(segment, []).append(i)
        return {depth: sorted(groups[depth]) for depth in sorted(groups)}

    def _gives(self, groups: Mapping[int, Sequence[int]]) -> dict[int, list[str]]:
        """What crosses out of every segment, by its depth."""
        wanted = {name for nodes in groups.values() for name in self._read_in(nodes)}
        wanted |= self.read_by_kernel | self.outputs
        return {depth: [name for name in self._made_in(nodes) if name in wanted] for depth, nodes in groups.items()}

    def _sized_by_input(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Let an axis' size be read off an input of the graph (case 6), so that nothing crosses for its size alone."""
        if node.op_type != "Shape" or node.input[0] not in self.specs:
            return node
        rank = len(self.specs[node.input[0]].shape)
        given = {a.name: a.i for a in node.attribute}
        start, stop, _ = slice(given.get("start", 0), given.get("end", rank)).indices(rank)
        if stop - start != 1 or any(node.input[0] == spec.name for spec in self.graph.inputs):
            return node
        wanted = self._axis(node.input[0], start)
        for spec in self.graph.inputs:
            for axis in range(len(spec.shape)):
                if wanted is not None and self._axis(spec.name, axis) == wanted:
                    return helper.make_node(
                        "Shape", [spec.name], list(node.output), name=node.name, start=axis, end=axis + 1
                    )
        return node

    def _axis(self, name: str, axis: int) -> AxisSize | None:
        """A dynamic axis' size; None if it is fixed, or not recorded."""
        size = self.specs[name].shape[axis]
        return axis_size(size) if isinstance(size, str) else None

    def _depth_of(self, i: int) -> int:
        return max((self.depth[name] for name in self.nodes[i].input if name), default=0)

    def _placed(self) -> _Placement:
        # Nodes are in topological order: inputs are known when a node is reached.
        self.depth = dict.fromkeys((*self.inputs, *self.constants), 0)
        for i, node in enumerate(self.nodes):
            depth = self._depth_of(i) + (i in self.cuts)
            self.depth |= {name: depth for name in node.output if name}
        repeated = self._repeated()
        placement = _Placement(repeated, self._homes(repeated, {}), self.depth)
        readers: dict[str, list[int]] = {}
        for i in placement.segments:
            for name in dict.fromkeys(self.nodes[i].input):
                if name in self.constants and tensor_bytes(self.constants[name]) >= _LARGE_BYTES:
                    readers.setdefault(name, []).append(i)
        pinned: dict[int, int] = {}
        for group in readers.values():
            first = min(min(placement.segments[i]) for i in group)
            for i in group:
                pinned[i] = min(pinned.get(i, first), max(first, self._depth_of(i)))
        return dataclasses.replace(placement, segments=self._homes(repeated, pinned)) if pinned else placement

    def _repeated(self) -> frozenset[int]:
        """Cases 2, 3 and 7. What makes an output of the graph is computed once: the output has one place."""
        sizes: set[int] = set()
        views: set[int] = set()
        columns = {name for name, each in self.column_views.columns.items() if each.source in self.sources}
        for i, node in enumerate(self.nodes):
            if i in self.kernels or not self.outputs.isdisjoint(node.output):
                continue
            if node.op_type in _SIZE_OPERATORS and all(self._is_size(name, sizes, node) for name in node.input if name):
                sizes.add(i)
            elif self.read_by_kernel.isdisjoint(node.output) and (
                self._is_view(node, sizes) or not columns.isdisjoint(node.output)
            ):
                views.add(i)
        # A size that a kernel reads has to be in memory; there is none in our graphs, and it is then computed once.
        return frozenset(i for i in sizes if self.read_by_kernel.isdisjoint(self.nodes[i].output)) | frozenset(views)

    def _is_size(self, name: str, sizes: set[int], reader: onnx.NodeProto) -> bool:
        if name in self.constants:
            return tensor_bytes(self.constants[name]) < _LARGE_BYTES
        return bool(reader.op_type in ("Shape", "Size") or self.producer.get(name) in sizes)

    def _is_view(self, node: onnx.NodeProto, sizes: set[int]) -> bool:
        if not node.input or node.input[0] in self.constants:
            return False
        source, *rest = node.input
        if any(name not in self.constants and self.producer.get(name) not in sizes for name in rest):
            return False
        if node.op_type in VIEWS:
            return True
        if node.op_type != "Cast":
            return False
        return self._itemsize(node.output[0]) >= self._itemsize(source)

    def _itemsize(self, name: str) -> int:
        """Bytes of an element."""
        return int(helper.tensor_dtype_to_np_dtype(_element_type(self._spec(name).dtype)).itemsize)

    def _homes(self, repeated: frozenset[int], pinned: dict[int, int]) -> dict[int, frozenset[int]]:
        """The segments of every node that is needed, from the readers back (cases 1 and 4)."""
        needed: dict[str, set[int]] = {}
        found: dict[int, frozenset[int]] = {}
        # What a norm reads is there when its attention runs.
        behind = {i: self._depth_of(cut) for cut, norms in self.followers.items() for i in norms}
        for i, node in reversed(list(enumerate(self.nodes))):
            where = {segment for name in node.output for segment in needed.get(name, ())}
            if i in self.kernels:
                runs_in = {behind[i] if i in behind else self._depth_of(i)}
            elif i in repeated:
                runs_in = where
            else:
                if not self.outputs.isdisjoint(node.output):
                    where = where or {self._depth_of(i)}
                runs_in = {min(min(where), pinned.get(i, min(where)))} if where else set()
            if runs_in and i not in self.kernels:
                found[i] = frozenset(runs_in)
            for name in node.input:
                needed.setdefault(name, set()).update(runs_in)
        return found

    def _made_in(self, nodes: Iterable[int]) -> list[str]:
        """What a segment can give: a repeated value never crosses."""
        return [n for i in nodes if i not in self.placement.repeated for n in self.nodes[i].output if n]

    def _read_in(self, nodes: Sequence[int]) -> list[str]:
        """What a segment reads and does not make, in the order of the first reader."""
        made = {name for i in nodes for name in self.nodes[i].output}
        read = dict.fromkeys(name for i in nodes for name in self.nodes[i].input if name)
        return [name for name in read if name not in made and name not in self.constants]

    def _segment(self, number: int, nodes: Sequence[int], gives: Sequence[str]) -> OnnxGraph:
        source = self.graph.model
        copies = [onnx.NodeProto.FromString(self.nodes[i].SerializeToString()) for i in nodes]
        read = {name for node in copies for name in node.input}
        inside = {name for node in copies for name in node.output}
        name = f"{self.graph.name}_segment_{number}"
        body = helper.make_graph(
            copies,
            name,
            [self._info(each) for each in self._read_in(nodes)],
            [self._info(each) for each in gives],
            [tensor for name, tensor in self.constants.items() if name in read],
            value_info=[info for info in self.proto.value_info if info.name in inside.difference(gives)],
        )
        model = onnx.ModelProto()
        model.CopyFrom(source)
        model.graph.CopyFrom(body)
        called = {(node.domain, node.op_type, node.overload) for node in copies}
        kept = [f for f in source.functions if (f.domain, f.name, f.overload) in called]
        del model.functions[:]
        model.functions.extend(kept)
        inputs, outputs = tensor_specs(model.graph.input), tensor_specs(model.graph.output)
        return OnnxGraph(name, model, self.graph.precision, inputs, outputs, self.graph.passes, self.graph.folder)

    def _info(self, name: str) -> onnx.ValueInfoProto:
        spec = self._spec(name)
        return helper.make_tensor_value_info(name, _element_type(spec.dtype), spec.shape)

    def _spec(self, name: str) -> TensorSpec:
        """Type and shape of a tensor at a segment's end. The graph's own inputs and outputs keep their axes' names."""
        spec = self.specs.get(name)
        if spec is None or spec.dtype == "undefined":
            raise _unknown(name, "its type is not recorded in the graph")
        if name in self.inputs or name in self.outputs:
            return spec
        shape: list[int | str] = []
        for size in spec.shape:
            expression = axis_size(size) if isinstance(size, str) else None
            if size == 0 or (isinstance(size, str) and expression is None):
                raise _unknown(name, f"its shape {list(spec.shape)} does not say how long an axis is")
            if expression is None:
                shape.append(size)
            else:
                shape.append(str(expression) if expression.terms else expression.constant)
        return dataclasses.replace(spec, shape=tuple(shape))

    def _call(self, i: int) -> KernelCall:
        node, output = self.nodes[i], self.nodes[i].output[0]
        attributes, inputs = node_attributes(node), named_inputs(node)
        return KernelCall(node.op_type, node.name, attributes, inputs, output, self.views.get(output, {}))

    def _crossing(self, whole: SegmentedGraph) -> tuple[Crossing, ...]:
        last: dict[str, int] = {}
        for number, step in enumerate(whole.steps):
            last |= dict.fromkeys(whole.reads(step), number)
        last |= dict.fromkeys(self.outputs, len(whole.steps) - 1)
        return tuple(
            Crossing(self._spec(name), number, last[name])
            for number, step in enumerate(whole.steps)
            for name in whole.writes(step)
        )


def _element_type(dtype: str) -> int:
    """ONNX type of a `TensorSpec`'s."""
    special = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
    return special.get(dtype) or TensorProto.DataType.Value(dtype.upper())


def _unknown(name: str, why: str) -> RewriteError:
    return RewriteError(
        "HSTU-E303",
        f"the graph cannot be cut: {name} would have to cross from one segment to another",
        why,
        "report this with `hstu-compile env` and the .onnx of --keep-intermediates",
        {"tensor": name},
    )
