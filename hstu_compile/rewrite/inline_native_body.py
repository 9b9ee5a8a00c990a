"""Put native bodies in place of the nodes they belong to. Level 3; plain onnx protobuf."""

from __future__ import annotations

import onnx
import onnx.inliner

from hstu_compile.rewrite._pass import Pass, PassResult


class InlineNativeBody(Pass):
    """Put every local function's body in place of its calls.

    TensorRT 8 has no local functions, and the values inside one have no types that a pass could look up.

    Cases: 1. functions are called: inlined and removed; 2. none: nothing.
    """

    name = "inline_native_body"

    def call(self, model: onnx.ModelProto) -> PassResult:
        count = len(model.functions)
        if count:
            model.CopyFrom(onnx.inliner.inline_local_functions(model))
            del model.functions[:]
        return PassResult({"functions": count})
