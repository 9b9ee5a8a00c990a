"""Put the bodies of local functions in the place of their calls, for runtimes whose parser does this wrongly."""

from __future__ import annotations

import onnx
import onnx.inliner

from hstu_compile.rewrite._pass import Pass, PassResult


class InlineFunctions(Pass):
    """Inline every local function, each call with the body of its own overload.

    TensorRT-RTX 1.6 takes local functions, but ignores `overload`: all layers get the first layer's body.
    """

    name = "inline_functions"

    def call(self, model: onnx.ModelProto) -> PassResult:
        bodies = {(function.domain, function.name, function.overload) for function in model.functions}
        calls = sum((node.domain, node.op_type, node.overload) in bodies for node in model.graph.node)
        if model.functions:
            model.CopyFrom(onnx.inliner.inline_local_functions(model))
        return PassResult({"calls": calls, "functions": len(bodies)})
