"""Write an ONNX function body operator by operator. Private to the passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class FunctionBuilder:
    """Collects nodes; every method returns the name of the value that it makes.

    Constants are shared by value, so that the body holds each number once.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}

    def _name(self, op_type: str) -> str:
        return f"{op_type.lower()}_{len(self.nodes)}"

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """One node with one output."""
        name = self._name(op_type)
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: type[np.generic] = np.int64) -> str:
        """A constant of any shape."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.constant(list(values))

    def cast(self, value: str, to: int) -> str:
        """Cast to an ONNX type."""
        return self.op("Cast", value, to=to)

    def unsqueeze(self, value: str, *axes: int) -> str:
        """Insert axes of size 1."""
        return self.op("Unsqueeze", value, self.ints(*axes))

    def function(
        self, domain: str, name: str, inputs: list[str], output: str, attributes: list[str], opset: int, overload: str
    ) -> onnx.FunctionProto:
        """The finished function, its one output renamed to `out`: an Identity would be a layer in every engine."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, value in enumerate(names):
                    if value == output:
                        names[index] = "out"
        function = helper.make_function(
            domain, name, inputs, ["out"], self.nodes, [helper.make_opsetid("", opset)], attributes
        )
        if overload:
            function.overload = overload
        return function
