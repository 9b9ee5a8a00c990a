"""Make one hstu::HstuNorm of each layer norm and the elementwise operators around it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.op_schema import norm_contract
from hstu_compile.rewrite._last_layer import GraphValues
from hstu_compile.rewrite._pass import Pass, PassResult
from hstu_compile.rewrite.norm_body import ELEMENT_TYPES, norm_body

_STANDARD = ("", "ai.onnx")
_CODES: dict[int, int] = {int(element): code for code, element in enumerate(ELEMENT_TYPES)}
_NONE, _GATE, _SWISH = 0, 1, 2
_WITH_ROWS, _WITH_NORMED = 1, 2


class FuseNorms(Pass):
    """Replace LayerNormalization and its neighbours by one HstuNorm node with a body of the same operators.

    TensorRT 8 has no LayerNormalization and runs each norm as five or six kernels, with conversions between half
    precision and float32 around them; the plugin is one kernel. Every other runtime inlines the body, which computes
    the same numbers to the bit: it is the operators that were there.

    What is taken in, around a norm of rows [R, D] in float32:
    1. before it: the Cast to float32, and a constant of D columns that is added behind it (the bias of a projection);
    2. the group norm's Reshape to groups, and behind it its Mul, Add and Reshape back;
    3. behind it: Sigmoid and Mul with the rows, SwishLayerNorm; or
    4. Mul with a gate, whose SiLU is taken in where nothing else reads it, and Concat of gate, rows and result or of
       gate, normed rows and result;
    5. the Cast of the result.
    A value that somebody else reads, a graph output or a tap ends the pattern there. A norm of another rank, axis or
    type, one wider than the contract allows, and one whose scale is computed stays as it is.

    Runs after prune_last_layer, which knows these operators and not HstuNorm, and before the engine stage.
    """

    name = "fuse_norms"

    def __init__(self, tap_names: Iterable[str] = ()) -> None:
        self._tap_names = frozenset(tap_names)

    def call(self, model: onnx.ModelProto) -> PassResult:
        contract = norm_contract()
        finder = _Finder(model.graph, self._tap_names)
        matches = [norm for i in range(len(finder.nodes)) if (norm := finder.norm_at(i)) is not None]
        # Where two norms are multiplied, each is the other's gate: the last takes the product in, the other stays.
        found = list({norm.last: norm for norm in matches}.values())
        opset = next(o.version for o in model.opset_import if o.domain in _STANDARD)
        overloads: dict[tuple[Any, ...], str] = {}
        made: dict[int, onnx.NodeProto] = {}
        for norm in found:
            key = (*sorted(norm.attributes.items()), norm.width if norm.attributes["num_groups"] > 1 else 0)
            if key not in overloads:
                overloads[key] = f"v{len(overloads)}" if overloads else ""
                model.functions.append(norm_body(norm.attributes, norm.width, opset, overloads[key]))
            made[norm.last] = self._node(norm, overloads[key])
        if found:
            model.graph.initializer.extend(finder.expanded.values())
            self._replace(model.graph, made, {i for norm in found for i in norm.touched})
            if all(each.domain != contract.namespace for each in model.opset_import):
                model.opset_import.append(helper.make_opsetid(contract.namespace, int(contract.version)))
        kinds = Counter(("norms", "gates", "swishes")[norm.attributes["activation"]] for norm in found)
        return PassResult({kind: kinds[kind] for kind in ("norms", "gates", "swishes")})

    @staticmethod
    def _node(norm: _Norm, overload: str) -> onnx.NodeProto:
        contract = norm_contract()
        node = helper.make_node(
            contract.name,
            [norm.inputs[each.name] for each in contract.present_inputs(norm.attributes)],
            [norm.output],
            name=norm.name,
            domain=contract.namespace,
            **norm.attributes,
            plugin_version=contract.version,
            plugin_namespace=contract.namespace,
        )
        if overload:
            node.overload = overload
        return node

    def _replace(self, graph: onnx.GraphProto, made: dict[int, onnx.NodeProto], touched: set[int]) -> None:
        """Put the new nodes where the last of what they replace was, and drop what nobody reads any more."""
        needed = {value.name for value in graph.output} | self._tap_names
        kept: list[onnx.NodeProto] = []
        dropped: set[str] = set()
        for index, node in reversed(list(enumerate(graph.node))):
            if index in made:
                node = made[index]
            elif index in touched and needed.isdisjoint(node.output):
                dropped.update(node.output)
                continue
            kept.append(node)
            needed.update(node.input)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        del graph.node[:]
        graph.node.extend(copies)
        infos = [info for info in graph.value_info if info.name not in dropped]
        del graph.value_info[:]
        graph.value_info.extend(infos)


@dataclasses.dataclass(frozen=True)
class _Norm:
    """One match.

    Attributes:
        name: of the LayerNormalization.
        inputs: value of each input of the contract.
        output: value that the last node of the pattern makes.
        attributes: the contract's.
        width: columns of a row.
        touched: places of the nodes of the pattern.
        last: place of the node that makes the output.
    """

    name: str
    inputs: dict[str, str]
    output: str
    attributes: dict[str, Any]
    width: int
    touched: frozenset[int]
    last: int


class _Finder:
    """Looks at a graph around each LayerNormalization; changes nothing."""

    def __init__(self, graph: onnx.GraphProto, taps: frozenset[str]) -> None:
        self.values = GraphValues(graph)
        self.nodes = self.values.nodes
        self.fixed = self.values.outputs | taps
        self.expanded: dict[str, TensorProto] = {}

    def norm_at(self, place: int) -> _Norm | None:
        """The norm whose LayerNormalization is at this place, with as much around it as fits; None if it stays."""
        node = self.nodes[place]
        if node.op_type != "LayerNormalization" or node.domain not in _STANDARD or any(node.output[1:]):
            return None
        pattern = _Pattern(self, place)
        return pattern.norm() if pattern.is_legal() else None

    def maker(self, name: str, op_type: str) -> int | None:
        """Place of the node that makes the value, if it is of this operator."""
        place = self.values.producer.get(name)
        if place is None or self.nodes[place].op_type != op_type or self.nodes[place].domain not in _STANDARD:
            return None
        return place

    def readers(self, name: str) -> list[int]:
        return self.values.consumers.get(name, [])

    def only_reader(self, name: str, op_type: str) -> int | None:
        """Place of the one node that reads the value, if it is of this operator and nobody else may ask for it."""
        readers = self.readers(name)
        if len(readers) != 1 or name in self.fixed:
            return None
        node = self.nodes[readers[0]]
        return readers[0] if node.op_type == op_type and node.domain in _STANDARD else None

    def type_of(self, name: str) -> int:
        """ONNX element type, 0 where it is not recorded."""
        if name in self.values.initializers:
            return int(self.values.initializers[name].data_type)
        return int(self.values.types[name].elem_type) if name in self.values.types else 0

    def dims(self, name: str) -> tuple[int, ...]:
        """Extents of a value, 0 for one that varies; empty where they are not recorded."""
        if name not in self.values.types:
            return ()
        return tuple(dim.dim_value for dim in self.values.types[name].shape.dim)

    def is_row(self, name: str, width: int) -> bool:
        """Whether a value is a constant of float32 [width]."""
        array = self.values.constant(name)
        return array is not None and array.dtype == np.float32 and array.shape == (width,)

    def widened(self, name: str) -> tuple[str, int | None]:
        """The half-precision value behind a Cast to float32, and the Cast's place; else the value itself."""
        cast = self.maker(name, "Cast")
        if cast is not None and self.type_of(name) == TensorProto.FLOAT:
            source = self.nodes[cast].input[0]
            if self.type_of(source) in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
                return source, cast
        return name, None

    def per_column(self, name: str, groups: int, group: int) -> str | None:
        """Name of a constant [groups * group] with each group's factor of `name`, [1, groups, 1], in its columns."""
        array = self.values.constant(name)
        if array is None or array.dtype != np.float32 or array.shape != (1, groups, 1):
            return None
        expanded = f"{name}_columns"
        self.expanded[expanded] = numpy_helper.from_array(np.repeat(array.ravel(), group), expanded)
        return expanded


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


class _Pattern:
    """Grows from one LayerNormalization to all that the operator takes in."""

    def __init__(self, finder: _Finder, place: int) -> None:
        self.finder, self.place, self.node = finder, place, finder.nodes[place]
        self.touched = {place}
        self.last = place
        self.value = self.node.input[0]  # the rows, before groups are made of them
        self.normed = self.node.output[0]
        self.scale = self.node.input[1]
        self.bias = self.node.input[2] if len(self.node.input) > 2 else ""
        self.groups = 1

    def is_legal(self) -> bool:
        """Whether the norm is one of rows in float32 that the contract allows; finds the groups on the way."""
        finder, dims = self.finder, self.finder.dims(self.value)
        if finder.type_of(self.value) != TensorProto.FLOAT or len(dims) not in (2, 3):
            return False
        if _attribute(self.node, "axis", -1) not in (-1, len(dims) - 1) or _attribute(self.node, "stash_type", 1) != 1:
            return False
        if len(dims) == 3 and not self._find_groups(*dims[1:]):
            return False
        self.width = finder.dims(self.value)[-1]
        limit = next(a.max for a in norm_contract().attributes if a.name == "num_groups")
        assert limit is not None
        constants = [self.scale, *([self.bias] if self.bias else [])]
        known = all(name in finder.expanded or finder.is_row(name, self.width) for name in constants)
        return 1 <= self.width <= limit and known

    def _find_groups(self, groups: int, group: int) -> bool:
        """Take in what makes a group norm of a layer norm: Reshape, [norm], Mul, Add, Reshape."""
        finder = self.finder
        before = finder.maker(self.value, "Reshape")
        ones = finder.values.constant(self.scale)
        if before is None or self.bias or ones is None or (ones != 1).any() or groups < 1 or group < 1:
            return False
        rows = finder.nodes[before].input[0]
        if finder.dims(rows)[1:] != (groups * group,) or finder.only_reader(self.value, "LayerNormalization") is None:
            return False
        steps, name, factors = [before], self.normed, []
        for op_type in ("Mul", "Add"):
            place = finder.only_reader(name, op_type)
            if place is None:
                return False
            other = next((each for each in finder.nodes[place].input if each != name), "")
            factor = finder.per_column(other, groups, group)
            if factor is None:
                return False
            factors.append(factor)
            steps.append(place)
            name = finder.nodes[place].output[0]
        after = finder.only_reader(name, "Reshape")
        if after is None or finder.dims(finder.nodes[after].output[0])[1:] != (groups * group,):
            return False
        self.scale, self.bias = factors
        self.touched.update((*steps, after))
        self.value, self.normed, self.last = rows, finder.nodes[after].output[0], after
        self.groups = groups
        return True

    def norm(self) -> _Norm:
        """The match, as large as it gets."""
        attributes = {
            "epsilon": float(_attribute(self.node, "epsilon", 1e-5)),
            "num_groups": self.groups,
            "activation": _NONE,
            "gate_silu": 0,
            "concat": 0,
        }
        inputs = {"scale": self.scale, "bias": self.bias}
        output = self.normed
        source, _ = self.finder.widened(self.value)
        element = self.finder.type_of(source)
        # A gate is as wide in memory as the rows, so what is behind a norm depends on what is in front of it.
        swish = self._swish()
        gate = None if swish is not None else _Gate.of(self, source, element)
        if swish is not None:
            output, attributes["activation"] = swish, _SWISH
        elif gate is not None:
            inputs["gate"], output = gate.input, gate.output
            attributes |= {"activation": _GATE, "gate_silu": int(gate.has_silu), "concat": gate.concat}
            self.touched |= gate.touched
            self.last = gate.last
        shift = self._shift()
        source, cast = self.finder.widened(self.value)
        if gate is not None and self.finder.type_of(source) != element:
            source, cast = self.value, None  # behind the addition there were half-precision rows, the gate is float32
        if cast is not None:
            self.touched.add(cast)
        inputs["x"] = source
        if shift:
            inputs["shift"] = shift
        output = self._rounded(output)
        attributes |= {
            "input_type": _CODES[self.finder.type_of(source)],
            "output_type": _CODES[self.finder.type_of(output)],
            "has_shift": int(bool(shift)),
            "has_bias": int(bool(self.bias)),
        }
        return _Norm(self.node.name, inputs, output, attributes, self.width, frozenset(self.touched), self.last)

    def _shift(self) -> str:
        """Take in the addition of a constant row, if nothing but this pattern reads the sum."""
        finder = self.finder
        add = finder.maker(self.value, "Add")
        if add is None or self.value in finder.fixed or not set(finder.readers(self.value)) <= self.touched:
            return ""
        left, right = finder.nodes[add].input
        for rows, shift in ((left, right), (right, left)):
            if finder.is_row(shift, self.width) and len(finder.dims(rows)) == 2:
                self.touched.add(add)
                self.value = rows
                return str(shift)
        return ""

    def _swish(self) -> str | None:
        """Take in rows * sigmoid(normed rows); its value."""
        finder = self.finder
        sigmoid = finder.only_reader(self.normed, "Sigmoid")
        if sigmoid is None:
            return None
        gate = finder.nodes[sigmoid].output[0]
        product = finder.only_reader(gate, "Mul")
        if product is None or set(finder.nodes[product].input) != {gate, self.value}:
            return None
        self.touched.update((sigmoid, product))
        self.last = product
        return str(finder.nodes[product].output[0])

    def _rounded(self, output: str) -> str:
        """Take in the Cast of the result to a half type, if nobody reads it before."""
        finder = self.finder
        cast = finder.only_reader(output, "Cast") if finder.type_of(output) == TensorProto.FLOAT else None
        if cast is None or _attribute(finder.nodes[cast], "to") not in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            return output
        self.touched.add(cast)
        self.last = cast
        return str(finder.nodes[cast].output[0])


@dataclasses.dataclass(frozen=True)
class _Gate:
    """What is behind a norm whose result is multiplied with another value of the same shape.

    Attributes:
        input: the other value; with `has_silu`, what its SiLU was computed of.
        output: the last value taken in.
        has_silu: whether the SiLU of the other value is taken in.
        concat: 0, or which values stand in front of the result.
        touched: places of the nodes.
        last: place of the node that makes the output.
    """

    input: str
    output: str
    has_silu: bool
    concat: int
    touched: frozenset[int]
    last: int

    @classmethod
    def of(cls, pattern: _Pattern, rows: str, element: int) -> _Gate | None:
        """The gate behind a norm of `rows`, which are of type `element` in memory; None if there is none."""
        finder, normed = pattern.finder, pattern.normed
        if normed in finder.fixed:
            return None
        readers = [finder.nodes[i] for i in finder.readers(normed)]
        products = [node for node in readers if node.op_type == "Mul" and len(set(node.input)) == 2]
        if len(products) != 1 or len(readers) > 2:
            return None
        place = finder.values.producer[products[0].output[0]]
        wide = next(name for name in products[0].input if name != normed)
        gate, cast = finder.widened(wide)
        if finder.type_of(gate) != element or finder.dims(gate)[1:] != (pattern.width,):
            return None
        if gate in finder.values.initializers or finder.dims(gate)[0] != finder.dims(rows)[0]:
            return None
        touched = {place, *([cast] if cast is not None else [])}
        output, last = products[0].output[0], place
        rounding = finder.only_reader(output, "Cast") if element != TensorProto.FLOAT else None
        if rounding is not None and _attribute(finder.nodes[rounding], "to") == element:
            touched.add(rounding)
            output, last = finder.nodes[rounding].output[0], rounding
        concat, join = cls._concat(finder, gate, rows, normed, output, touched)
        if join is not None:
            touched.add(join)
            output, last = finder.nodes[join].output[0], join
        elif len(readers) == 2:
            return None  # somebody else reads the normed rows
        raw, silu = cls._silu(finder, gate, touched)
        return cls(raw or gate, output, raw is not None, concat, frozenset(touched | silu), last)

    @staticmethod
    def _concat(
        finder: _Finder, gate: str, rows: str, normed: str, gated: str, touched: set[int]
    ) -> tuple[int, int | None]:
        """Which Concat takes the result in, and its place. Adds what reads the normed rows for it to `touched`."""
        join = finder.only_reader(gated, "Concat")
        if join is None or finder.type_of(gated) != finder.type_of(gate):
            return 0, None
        node = finder.nodes[join]
        if len(node.input) != 3 or _attribute(node, "axis") not in (1, -1):
            return 0, None
        first, middle, third = node.input
        if first != gate or third != gated:
            return 0, None
        others = set(finder.readers(normed)) - touched
        if middle == rows and not others:
            return _WITH_ROWS, join
        reader = join
        if middle != normed:
            rounding = finder.maker(middle, "Cast")
            if rounding is None or finder.only_reader(middle, "Concat") != join:
                return 0, None
            reader = rounding
        if others != {reader}:
            return 0, None
        touched.add(reader)
        return _WITH_NORMED, join

    @staticmethod
    def _silu(finder: _Finder, gate: str, touched: set[int]) -> tuple[str | None, set[int]]:
        """What a gate is the SiLU of, and the nodes of that; None if it is none or somebody else reads it."""
        if gate in finder.fixed or not set(finder.readers(gate)) <= touched:
            return None, set()
        found: set[int] = set()
        wide = gate
        if finder.type_of(gate) != TensorProto.FLOAT:
            rounding = finder.maker(gate, "Cast")
            if rounding is None:
                return None, set()
            found.add(rounding)
            wide = finder.nodes[rounding].input[0]
        product = finder.maker(wide, "Mul")
        if product is None or wide in finder.fixed:
            return None, set()
        left, right = finder.nodes[product].input
        for value, other in ((left, right), (right, left)):
            sigmoid = finder.maker(other, "Sigmoid")
            if sigmoid is not None and finder.nodes[sigmoid].input[0] == value:
                raw, cast = finder.widened(value)
                if finder.type_of(raw) != finder.type_of(gate):
                    return None, set()
                found |= {product, sigmoid, *([cast] if cast is not None else [])}
                return raw, found
        return None, set()
