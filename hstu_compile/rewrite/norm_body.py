"""The body of native operators of hstu::HstuNorm. Level 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from hstu_compile.op_schema import norm_contract
from hstu_compile.rewrite._function_builder import FunctionBuilder

#: ONNX's code of each type, in the order of the contract's codes.
ELEMENT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def norm_body(attributes: Mapping[str, Any], width: int, opset: int, overload: str = "") -> onnx.FunctionProto:
    """The function for one set of attributes: the operators that the exporter writes, one for one.

    Args:
        attributes: the contract's attributes.
        width: columns of a row.
        opset: ONNX opset of the model.
        overload: ONNX function overload; empty for the first.
    """
    contract = norm_contract()
    builder = FunctionBuilder()
    return builder.function(
        contract.namespace,
        contract.name,
        [each.name for each in contract.present_inputs(attributes)],
        _output(builder, attributes, width),
        [attribute.name for attribute in contract.attributes] + ["plugin_version", "plugin_namespace"],
        opset,
        overload,
    )


def _output(b: FunctionBuilder, a: Mapping[str, Any], width: int) -> str:
    element, result = ELEMENT_TYPES[a["input_type"]], ELEMENT_TYPES[a["output_type"]]

    def wide(name: str) -> str:
        return name if element == TensorProto.FLOAT else b.cast(name, TensorProto.FLOAT)

    def rounded(name: str, to: int) -> str:
        return name if to == TensorProto.FLOAT else b.cast(name, to)

    value = wide("x")
    if a["has_shift"]:
        value = b.op("Add", value, "shift")
    normed = _normed(b, a, value, width)
    if a["activation"] == 2:
        return rounded(b.op("Mul", value, b.op("Sigmoid", normed)), result)
    if a["activation"] == 0:
        return rounded(normed, result)
    gate = "gate"
    if a["gate_silu"]:
        raw = wide(gate)
        gate = rounded(b.op("Mul", raw, b.op("Sigmoid", raw)), element)
    gated = rounded(b.op("Mul", wide(gate), normed), result)
    if a["concat"] == 0:
        return gated
    middle = value if a["concat"] == 1 else normed
    # The rows themselves are of the result's type already, unless something was added to them.
    same = a["concat"] == 1 and not a["has_shift"] and element == result
    parts = (
        gate if element == result else rounded(wide(gate), result),
        "x" if same else rounded(middle, result),
        gated,
    )
    return b.op("Concat", *parts, axis=1)


def _normed(b: FunctionBuilder, a: Mapping[str, Any], value: str, width: int) -> str:
    bias = ("bias",) if a["has_bias"] else ()
    if a["num_groups"] == 1:
        return b.op("LayerNormalization", value, "scale", *bias, axis=-1, epsilon=a["epsilon"], stash_type=1)
    group = width // a["num_groups"]
    grouped = b.op("Reshape", value, b.ints(-1, a["num_groups"], group), allowzero=1)
    ones = b.constant(np.ones(group), np.float32)
    grouped = b.op("LayerNormalization", grouped, ones, axis=-1, epsilon=a["epsilon"], stash_type=1)
    normed = b.op("Mul", b.op("Reshape", grouped, b.ints(-1, width), allowzero=1), "scale")
    return b.op("Add", normed, *bias) if bias else normed
