"""Bring a graph down to what TensorRT 8.5's ONNX parser reads: opset 17, no int64 data, no LayerNormalization.

Level 3; plain onnx protobuf, so that it runs beside TensorRT 8 on Python 3.10 with onnx 1.16. Applied by the engine
stage only: the model that ships stays opset 20. Facts about the parser are those of onnx-tensorrt's 8.5 sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.artifacts import OnnxGraph, PassRecord, Precision
from hstu_compile.errors import RewriteError
from hstu_compile.rewrite._pass import Pass, PassResult, apply_passes
from hstu_compile.rewrite.inline_native_body import InlineNativeBody
from hstu_compile.rewrite.merge_duplicates import MergeDuplicates
from hstu_compile.rewrite.narrow_adds import NarrowAdds
from hstu_compile.rewrite.project_by_convolution import ProjectByConvolution
from hstu_compile.rewrite.prune_last_layer import ROW_OFFSETS
from hstu_compile.rewrite.spell_out_sigmoid import SpellOutSigmoid

HIGHEST_OPSET, LOWERED_OPSET, LOWERED_IR = 20, 17, 8
MAX_TOP_K = 3840  # ITopKLayer's limit
_INT32 = np.iinfo(np.int32)
_STANDARD = ("", "ai.onnx")

# Operators that mean the same at opset 17 and 20 and that the 8.5 parser takes as they are.
_UNCHANGED = frozenset(
    (
        "Abs",
        "Add",
        "And",
        "Ceil",
        "Concat",
        "Conv",
        "Cos",
        "CumSum",
        "Div",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "Log",
        "MatMul",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Range",
        "Reciprocal",
        "Relu",
        "Reshape",
        "Sigmoid",
        "Sign",
        "Sin",
        "Slice",
        "Softmax",
        "Softplus",
        "Sqrt",
        "Sub",
        "Tanh",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Where",
    )
)
# At opset 18 (20 for Max and Min) their axes moved from an attribute to an input.
_AXES_MOVED = frozenset(
    (
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSumSquare",
    )
)
# Those that leave a value as it is when they reduce over that value alone.
_IDENTITY_OF_ONE = frozenset(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"))
# Attributes that appeared after opset 17, with the value that changes nothing.
_NEW_ATTRIBUTES: dict[str, tuple[str, Any]] = {
    "Cast": ("saturate", 1),
    "ScatterND": ("reduction", b"none"),
    "ScatterElements": ("reduction", b"none"),
}
_CAST_TYPES = frozenset(
    (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL)
)
_INTEGERS = frozenset((TensorProto.INT32, TensorProto.INT64))

# Which inputs of an operator share the type of its data; their outputs have it too, except for comparisons.
_DATA_FIRST = frozenset(
    (
        "Abs",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Neg",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Sign",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
_DATA_ALL = frozenset(
    (
        "Add",
        "Clip",
        "Concat",
        "Div",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Sub",
    )
)
_COMPARISONS = frozenset(
    (
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
    )
)
_TYPE_FREE = frozenset(
    (
        "Cast",
        "Shape",
        "Size",
    )
)


def _refuse(what: str, problems: Sequence[str], fix: str) -> RewriteError:
    return RewriteError("HSTU-E302", what, "; ".join(problems), fix, {"problems": list(problems)})


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _drop_attribute(node: onnx.NodeProto, name: str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def _opset(model: onnx.ModelProto) -> int:
    return next((int(entry.version) for entry in model.opset_import if entry.domain in _STANDARD), 0)


class _Graph:
    """What the passes ask of a graph: constants, inferred types and shapes, and new names."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {i.name: i for i in self.graph.initializer}
        self._made: dict[tuple[str, str, bytes], str] = {}
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self._values = {v.name: v.type.tensor_type for v in [*inferred.value_info, *inferred.input, *inferred.output]}
        self._names = set(self.constants) | set(self._values)
        self._names |= {name for node in self.graph.node for name in (*node.input, *node.output)}

    def elem_type(self, name: str) -> int:
        """ONNX element type; 0 where it is not known."""
        if name in self.constants:
            return int(self.constants[name].data_type)
        return int(self._values[name].elem_type) if name in self._values else 0

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Sizes, None for a dynamic one; None where not even the rank is known."""
        if name in self.constants:
            return tuple(self.constants[name].dims)
        if name not in self._values or not self._values[name].HasField("shape"):
            return None
        return tuple(d.dim_value if d.HasField("dim_value") else None for d in self._values[name].shape.dim)

    def array(self, name: str) -> NDArray[Any] | None:
        """Value of a constant, or None."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def fresh(self, base: str) -> str:
        """A value name that is not in use."""
        name, number = base, 0
        while name in self._names:
            number += 1
            name = f"{base}_{number}"
        self._names.add(name)
        return name

    def constant(self, value: Any, dtype: type[np.generic] = np.int64) -> str:
        """Name of an initializer with this value; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, str(array.shape), array.tobytes())
        if key not in self._made:
            name = self.fresh("lowered_constant")
            tensor = numpy_helper.from_array(array, name)
            self.graph.initializer.append(tensor)
            self.constants[name] = tensor
            self._made[key] = name
        return self._made[key]

    def replace_nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Put these nodes in place of all of the graph's."""
        kept = list(nodes)
        del self.graph.node[:]
        self.graph.node.extend(kept)


class DropNativeBody(Pass):
    """Remove the local functions of the plugin's operators, so that a parser has nothing but the plugin to take.

    Cases: 1. functions of a custom domain: removed, and their overload names with them (IR 10); 2. none: nothing.
    """

    name = "drop_native_body"

    def call(self, model: onnx.ModelProto) -> PassResult:
        kept = [f for f in model.functions if f.domain in _STANDARD]
        dropped = len(model.functions) - len(kept)
        del model.functions[:]
        model.functions.extend(kept)
        for node in model.graph.node:
            if node.domain not in _STANDARD and node.overload:
                node.ClearField("overload")
        return PassResult({"functions": dropped})


class FoldConstants(Pass):
    """Constant nodes become initializers, because the parser wants axes and the like as weights.

    Cases: 1. Constant with a tensor, int(s) or float(s); 2. ConstantOfShape of a constant shape.
    """

    name = "fold_constants"

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = _Graph(model)
        kept, counts = [], {"constants": 0, "filled": 0}
        for node in graph.graph.node:
            tensor = self._value(node, graph)
            if tensor is None:
                kept.append(node)
                continue
            counts["constants" if node.op_type == "Constant" else "filled"] += 1
            tensor.name = node.output[0]
            graph.graph.initializer.append(tensor)
            graph.constants[tensor.name] = tensor
        graph.replace_nodes(kept)
        return PassResult(counts)

    @staticmethod
    def _value(node: onnx.NodeProto, graph: _Graph) -> TensorProto | None:
        if node.domain not in _STANDARD:
            return None
        if node.op_type == "Constant":
            attribute = node.attribute[0]
            value = helper.get_attribute_value(attribute)
            if attribute.name == "value":
                copy = TensorProto()
                copy.CopyFrom(value)
                return copy
            dtype = {
                "value_int": np.int64,
                "value_ints": np.int64,
                "value_float": np.float32,
                "value_floats": np.float32,
            }
            if attribute.name not in dtype:
                raise _refuse(
                    "TensorRT 8 cannot take this graph",
                    [f"{_label(node)} holds {attribute.name}"],
                    "export the model again, or use TensorRT >= 10",
                )
            return numpy_helper.from_array(np.asarray(value, dtype[attribute.name]))
        if node.op_type == "ConstantOfShape" and (shape := graph.array(node.input[0])) is not None:
            value = _attribute(node, "value")
            fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
            return numpy_helper.from_array(np.full(tuple(shape), fill[0], fill.dtype))
        return None


class NarrowInt64(Pass):
    """Timestamps as int32, because TensorRT 8 has no int64.

    Cases: 1. a graph input of int64 becomes int32 and everything computed from it follows, up to the plugin node,
    whose type S allows it; 2. int64 constants are saturated to int32's range (the parser would do so with a warning):
    a time-bucket threshold beyond int32 becomes 2**31 - 1, which no difference of timestamps in 0..2**31 - 2 reaches
    either; a slice end of "to the end" stays beyond every end.
    Indices and shapes stay int64 in the file, because ONNX demands it; the parser reads them as int32.
    """

    name = "narrow_int64"

    def call(self, model: onnx.ModelProto) -> PassResult:
        self.graph = _Graph(model)
        saturated = sum(self._saturate(tensor) for tensor in model.graph.initializer)
        self.narrowed: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        for value in model.graph.input:
            if value.type.tensor_type.elem_type == TensorProto.INT64 and value.name not in self.graph.constants:
                value.type.tensor_type.elem_type = TensorProto.INT32
                self.narrowed.add(value.name)
        inputs = len(self.narrowed)
        for node in list(model.graph.node):
            self._follow(node)
            self.nodes.append(node)
        self.graph.replace_nodes(self.nodes)
        for value in [*model.graph.value_info, *model.graph.output]:
            if value.name in self.narrowed:
                value.type.tensor_type.elem_type = TensorProto.INT32
        return PassResult({"inputs": inputs, "values": len(self.narrowed) - inputs, "saturated": saturated})

    @staticmethod
    def _saturate(tensor: TensorProto) -> bool:
        if tensor.data_type != TensorProto.INT64:
            return False
        array = numpy_helper.to_array(tensor)
        clamped = array.clip(_INT32.min, _INT32.max)
        if np.array_equal(array, clamped):
            return False
        tensor.CopyFrom(numpy_helper.from_array(clamped, tensor.name))
        return True

    def _follow(self, node: onnx.NodeProto) -> None:
        if not any(name in self.narrowed for name in node.input):
            return
        if node.domain not in _STANDARD:
            self._unify(node, range(len(node.input)))
            return
        if node.op_type in _TYPE_FREE:
            return
        if node.op_type in _DATA_FIRST:
            data: Iterable[int] = (0,)
        elif node.op_type in _DATA_ALL or node.op_type in _COMPARISONS:
            data = range(len(node.input))
        elif node.op_type == "Where":
            data = (1, 2)
        else:
            raise _refuse(
                "TensorRT 8 has no int64, and this operator cannot be narrowed to int32",
                [f"{_label(node)} reads {', '.join(n for n in node.input if n in self.narrowed)}"],
                "use TensorRT >= 10 or TensorRT-RTX",
            )
        positions = set(data)
        carries = any(node.input[i] in self.narrowed for i in positions)
        for index, name in enumerate(node.input):
            if index not in positions and name in self.narrowed:
                node.input[index] = self._cast(name, TensorProto.INT64)  # an index operand
        if carries:
            self._unify(node, sorted(positions))
            if node.op_type not in _COMPARISONS:
                self.narrowed.update(node.output)

    def _unify(self, node: onnx.NodeProto, positions: Iterable[int]) -> None:
        """Make every int64 operand at these positions int32."""
        for index in positions:
            name = node.input[index]
            if name in self.narrowed or self.graph.elem_type(name) != TensorProto.INT64:
                continue
            array = self.graph.array(name)
            if array is not None:
                node.input[index] = self.graph.constant(array.clip(_INT32.min, _INT32.max), np.int32)
            else:
                node.input[index] = self._cast(name, TensorProto.INT32)

    def _cast(self, name: str, to: int) -> str:
        output = self.graph.fresh(f"{name}_{TensorProto.DataType.Name(to).lower()}")
        self.nodes.append(helper.make_node("Cast", [name], [output], name=output, to=to))
        if to == TensorProto.INT32:
            self.narrowed.add(output)
        return output


class DecomposeLayerNormalization(Pass):
    """LayerNormalization in float32 primitives: the 8.5 parser has no such operator.

    Cases: 1. float32 input; 2. half input: Cast to float32 and back, as stash_type says; 3. a scale of ones or a bias
    of zeros is left out; 4. outputs Mean or InvStdDev in use: refused.
    """

    name = "decompose_layer_normalization"

    def call(self, model: onnx.ModelProto) -> PassResult:
        self.opset = _opset(model)
        graph = _Graph(model)
        nodes: list[onnx.NodeProto] = []
        count = 0
        for node in graph.graph.node:
            if node.op_type == "LayerNormalization" and node.domain in _STANDARD:
                nodes += self._primitives(node, graph)
                count += 1
            else:
                nodes.append(node)
        graph.replace_nodes(nodes)
        return PassResult({"layer_normalization": count})

    def ensures(self, model: onnx.ModelProto, result: PassResult) -> None:
        left = sum(node.op_type == "LayerNormalization" for node in model.graph.node)
        self.expect(PassResult({"remaining": left}), "remaining", 0)

    def _primitives(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
        x, scale = node.input[0], node.input[1]
        bias = node.input[2] if len(node.input) > 2 else ""
        axis = _attribute(node, "axis", -1)
        if axis >= 0:
            shape = graph.shape(x)
            if shape is None:
                raise _refuse(
                    "LayerNormalization cannot be decomposed", [f"{_label(node)}: its rank is unknown"], _REPORT
                )
            axis -= len(shape)
        if any(node.output[1:]):
            raise _refuse(
                "LayerNormalization cannot be decomposed", [f"{_label(node)}: Mean or InvStdDev is used"], _REPORT
            )
        elem_type = graph.elem_type(x)
        prefix = node.name or node.output[0]
        nodes: list[onnx.NodeProto] = []

        def op(op_type: str, label: str, *inputs: str, **attributes: Any) -> str:
            name = graph.fresh(f"{prefix}/{label}")
            nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
            return name

        def wide(name: str, label: str) -> str:
            known = graph.elem_type(name) == TensorProto.FLOAT
            return name if known else op("Cast", label, name, to=TensorProto.FLOAT)

        axes = list(range(axis, 0))

        def mean(label: str, value: str) -> str:
            # The axes of ReduceMean are an attribute up to opset 17 and an input from 18.
            if self.opset > LOWERED_OPSET:
                return op("ReduceMean", label, value, graph.constant(axes), keepdims=1)
            return op("ReduceMean", label, value, axes=axes, keepdims=1)

        wide_x = wide(x, "input_fp32")
        centred = op("Sub", "centred", wide_x, mean("mean", wide_x))
        variance = mean("variance", op("Mul", "square", centred, centred))
        shifted = op("Add", "shifted", variance, graph.constant(_attribute(node, "epsilon", 1e-5), np.float32))
        result = op("Div", "normalised", centred, op("Sqrt", "deviation", shifted))
        ones, zeros = graph.array(scale), graph.array(bias) if bias else None
        if ones is None or not (ones == 1).all():
            result = op("Mul", "scaled", result, wide(scale, "scale_fp32"))
        if bias and (zeros is None or zeros.any()):
            result = op("Add", "biased", result, wide(bias, "bias_fp32"))
        if elem_type != TensorProto.FLOAT:
            op("Cast", "output", result, to=elem_type)
        nodes[-1].output[0] = node.output[0]
        return nodes


_REPORT = "report this with `hstu-compile env` and the .onnx, or use TensorRT >= 10"


class LowerToOpset17(Pass):
    """Opset 20 to 17 and IR 10 to 8, operator by operator, and around what the 8.5 parser gets wrong.

    Cases:
    1. reductions whose axes became an input: an attribute again.
    2. Shape with start or end: Shape then Slice (the 8.5 parser ignores both attributes without a word).
    3. Squeeze without axes: the axes of the inferred shape.
    4. Clip: Max and Min. The parser takes none of integers, and to one without an upper bound it gives FLT_MAX, which
    an engine with half-precision layers rounds to 65504.
    5. ReduceSum of integers: in float32, exact up to 2**24, the largest count a batch can reach here.
    6. CastLike: Cast.
    7. Split with num_outputs: without, where the axis divides evenly.
    8. attributes newer than opset 17: dropped at their neutral value.
    9. QuantizeLinear and DequantizeLinear: as they are, with scales in float32.
    Anything else that is not known to be the same is refused by name, as are bfloat16, float64, float8, other scales
    and TopK beyond 3840.
    """

    name = "lower_to_opset_17"

    def requires(self, model: onnx.ModelProto) -> None:
        if not LOWERED_OPSET <= _opset(model) <= HIGHEST_OPSET:
            raise _refuse(
                "TensorRT 8 cannot take this graph",
                [f"it is opset {_opset(model)}; opsets {LOWERED_OPSET} to {HIGHEST_OPSET} can be lowered"],
                f"export at opset {HIGHEST_OPSET}, as hstu-compile does",
            )

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = _Graph(model)
        self.problems = self._foreign_types(model, graph)
        counts: dict[str, int] = {}
        nodes: list[onnx.NodeProto] = []
        for node in graph.graph.node:
            lowered = self._lower(node, graph)
            if lowered is None:
                nodes.append(node)
            else:
                counts[node.op_type] = counts.get(node.op_type, 0) + 1
                nodes += lowered
        if self.problems:
            raise _refuse(
                "TensorRT 8 cannot take this graph",
                self.problems,
                "export with --fp16, --fp32 or --int8 (TensorRT 8 has no bfloat16 and no float8), or use "
                "TensorRT >= 10 or TensorRT-RTX",
            )
        graph.replace_nodes(nodes)
        return PassResult({**counts, **_declare_opset_17(model)})

    @staticmethod
    def _foreign_types(model: onnx.ModelProto, graph: _Graph) -> list[str]:
        named = [*graph.constants, *(v.name for v in [*model.graph.input, *model.graph.output])]
        problems = []
        for kind in (TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.FLOAT8E4M3FN):
            if found := [name for name in named if graph.elem_type(name) == kind]:
                problems.append(f"{len(found)} tensors are {TensorProto.DataType.Name(kind).lower()}, first {found[0]}")
        return problems

    def _lower(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        """The nodes that take this one's place, or None if it stays."""
        if node.domain not in _STANDARD or node.op_type in _UNCHANGED:
            return None
        handlers: dict[str, Callable[[onnx.NodeProto, _Graph], list[onnx.NodeProto] | None]] = {
            "Shape": self._shape,
            "Squeeze": self._squeeze,
            "Clip": self._clip,
            "ReduceSum": self._reduce_sum,
            "CastLike": self._cast_like,
            "Split": self._split,
            "TopK": self._top_k,
            "QuantizeLinear": self._quantize,
            "DequantizeLinear": self._quantize,
        }
        if node.op_type in _AXES_MOVED:
            return self._reduce(node, graph)
        if node.op_type in _NEW_ATTRIBUTES:
            return self._new_attribute(node)
        if node.op_type in handlers:
            return handlers[node.op_type](node, graph)
        if node.op_type != "ConstantOfShape":
            self.problems.append(f"{_label(node)}: no lowering to opset 17 is known for this operator")
        return None

    def _reduce(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        has_flag = any(a.name == "noop_with_empty_axes" for a in node.attribute)
        if len(node.input) == 1 and not has_flag:
            return None
        axes = graph.array(node.input[1]) if len(node.input) > 1 and node.input[1] else np.zeros(0, np.int64)
        if axes is None:
            self.problems.append(f"{_label(node)}: its axes are computed")
            return None
        if axes.size == 0 and _attribute(node, "noop_with_empty_axes", 0):
            if node.op_type not in _IDENTITY_OF_ONE:
                self.problems.append(f"{_label(node)}: it reduces over no axis")
                return None
            return [helper.make_node("Identity", node.input[:1], node.output, name=node.name)]
        _drop_attribute(node, "noop_with_empty_axes")
        del node.input[1:]
        if axes.size:
            node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in axes.ravel()]))
        return [node]

    def _reduce_sum(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        kind = graph.elem_type(node.input[0])
        if kind not in _INTEGERS:
            return None
        wide, summed = graph.fresh(f"{node.output[0]}_terms"), graph.fresh(f"{node.output[0]}_sum")
        reduce = onnx.NodeProto()
        reduce.CopyFrom(node)
        reduce.input[0], reduce.output[0] = wide, summed
        return [
            helper.make_node("Cast", node.input[:1], [wide], name=wide, to=TensorProto.FLOAT),
            reduce,
            helper.make_node("Cast", [summed], node.output, name=f"{node.output[0]}_back", to=kind),
        ]

    def _shape(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        if not node.attribute:
            return None
        start, end = _attribute(node, "start", 0), _attribute(node, "end")
        whole = graph.fresh(f"{node.output[0]}_whole")
        known = graph.shape(node.input[0])
        if start == 0 and (end is None or (known is not None and end >= len(known))):
            return [helper.make_node("Shape", node.input, node.output, name=node.name)]
        bounds = [graph.constant([start]), graph.constant([_INT32.max if end is None else end]), graph.constant([0])]
        return [
            helper.make_node("Shape", node.input, [whole], name=whole),
            helper.make_node("Slice", [whole, *bounds], node.output, name=node.name),
        ]

    def _squeeze(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        if len(node.input) > 1:
            return None
        shape = graph.shape(node.input[0])
        if shape is None or None in shape:
            self.problems.append(f"{_label(node)}: it has no axes, and the shape {shape} does not tell them")
            return None
        node.input.append(graph.constant([axis for axis, size in enumerate(shape) if size == 1]))
        return [node]

    def _clip(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        steps = [(op, bound) for op, bound in zip(("Max", "Min"), node.input[1:], strict=False) if bound]
        if not steps:
            return [helper.make_node("Identity", node.input[:1], node.output, name=node.name)]
        nodes, value = [], node.input[0]
        for index, (op, bound) in enumerate(steps):
            last = index == len(steps) - 1
            output = node.output[0] if last else graph.fresh(f"{node.output[0]}_{op.lower()}")
            nodes.append(helper.make_node(op, [value, bound], [output], name=output))
            value = output
        return nodes

    def _cast_like(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        kind = graph.elem_type(node.input[1])
        if kind == 0:
            self.problems.append(f"{_label(node)}: the type of {node.input[1]} is unknown")
            return None
        return [helper.make_node("Cast", node.input[:1], node.output, name=node.name, to=kind)]

    def _split(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        pieces = _attribute(node, "num_outputs")
        if pieces is None:
            return None
        shape, axis = graph.shape(node.input[0]), _attribute(node, "axis", 0)
        size = None if shape is None else shape[axis]
        if size is None or size % pieces:
            self.problems.append(f"{_label(node)}: axis {axis} of size {size} does not divide into {pieces}")
            return None
        _drop_attribute(node, "num_outputs")
        return [node]

    def _top_k(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        count = graph.array(node.input[1])
        if count is None or int(count.reshape(-1)[0]) > MAX_TOP_K:
            shown = "computed" if count is None else int(count.reshape(-1)[0])
            self.problems.append(f"{_label(node)}: K is {shown}; TensorRT takes a constant of at most {MAX_TOP_K}")
        return None

    def _quantize(self, node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto] | None:
        if len(node.input) == 3 and graph.elem_type(node.input[2]) == TensorProto.FLOAT8E4M3FN:
            return None  # refused by its type
        # The parser reads the bytes of a scale as float32, whatever type it has.
        if graph.elem_type(node.input[1]) != TensorProto.FLOAT or len(node.input) != 3:
            self.problems.append(f"{_label(node)}: its scale is not float32, or it has no zero point")
        return None

    def _new_attribute(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type == "Cast" and _attribute(node, "to") not in _CAST_TYPES:
            self.problems.append(
                f"{_label(node)}: casts to {TensorProto.DataType.Name(_attribute(node, 'to')).lower()}"
            )
            return None
        name, neutral = _NEW_ATTRIBUTES[node.op_type]
        value = _attribute(node, name)
        if value is None:
            return None
        if value != neutral:
            self.problems.append(f"{_label(node)}: {name} is {value!r}")
            return None
        _drop_attribute(node, name)
        return [node]


def _declare_opset_17(model: onnx.ModelProto) -> dict[str, int]:
    """Set opset and IR version, and clear the fields that IR 10 added."""
    counts = {"opset": 0, "ir_version": 0, "fields": 0}
    for entry in model.opset_import:
        if entry.domain in _STANDARD and entry.version != LOWERED_OPSET:
            entry.version = LOWERED_OPSET
            counts["opset"] += 1
    if model.ir_version > LOWERED_IR:
        model.ir_version = LOWERED_IR
        counts["ir_version"] = 1
    graph = model.graph
    for part in [graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info]:
        for name in ("metadata_props", "overload"):
            if name in part.DESCRIPTOR.fields_by_name and getattr(part, name):
                part.ClearField(name)
                counts["fields"] += 1
    return counts


def tensorrt8_passes(
    precision: Precision, *, native: bool, has_cublas: bool = True, quantized: bool = False
) -> tuple[Pass, ...]:
    """The passes in order.

    Args:
        precision: of the graph; float32 graphs keep their sigmoids from being computed with tanh, and
            float16 graphs lose conversions around sums.
        native: replace attention by its native body; otherwise it stays one node, for the plugin.
        has_cublas: without it, projections become convolutions.
        quantized: products are quantised; these become convolutions in any case.
    """
    first: tuple[Pass, ...] = (InlineNativeBody(), MergeDuplicates()) if native else (DropNativeBody(),)
    sigmoids: tuple[Pass, ...] = (SpellOutSigmoid(),) if precision == "fp32" else ()
    sums: tuple[Pass, ...] = (NarrowAdds(),) if precision == "fp16" else ()
    projections: tuple[Pass, ...] = ()
    if quantized or not has_cublas:
        projections = (ProjectByConvolution(quantized_only=has_cublas),)
    middle = (FoldConstants(), NarrowInt64(), DecomposeLayerNormalization())
    return (*first, *middle, *sigmoids, *sums, *projections, LowerToOpset17())


def lowered_for_tensorrt8(
    model: onnx.ModelProto, precision: Precision, *, native: bool, has_cublas: bool = True
) -> tuple[onnx.ModelProto, tuple[PassRecord, ...]]:
    """A lowered copy of the model, and what each pass did.

    Raises:
        RewriteError: HSTU-E302, naming what TensorRT 8 cannot take.
    """
    _refuse_pruned_retrieval(model)
    graph = OnnxGraph("lowered", model, precision, (), ())
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    passes = tensorrt8_passes(precision, native=native, has_cublas=has_cublas, quantized=quantized)
    passes[-1].requires(model)  # a foreign opset is refused before any pass reads its operators
    for step in apply_passes(graph, passes):
        graph = step
    if not native and not has_cublas:
        _refuse_products(graph.model)
    return graph.model, graph.passes


def _refuse_pruned_retrieval(model: onnx.ModelProto) -> None:
    """TensorRT 8.5.3.1 dies of a segmentation fault while it builds a graph with one last-layer row per sequence."""
    if any(name == ROW_OFFSETS for node in model.graph.node for name in node.output):
        raise _refuse(
            "TensorRT 8 cannot build this graph",
            ["its last layer was pruned to one row per sequence, which crashes the builder of TensorRT 8.5"],
            "build the bundle again with --no-prune",
        )


def _refuse_products(model: onnx.ModelProto) -> None:
    """Refuse what TensorRT 8 without cuBLAS has no implementation for, and would report as a nameless region."""
    products = [_label(node) for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    if products:
        raise _refuse(
            "TensorRT 8 cannot build this graph without cuBLAS",
            [f"{label} multiplies two computed tensors" for label in products],
            "put libcublas.so.11 and libcublasLt.so.11 on the library path, or use TensorRT >= 10",
        )
