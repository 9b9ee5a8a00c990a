"""Remove what tracing leaves behind: stack traces with file paths, module names, producer notes."""

from __future__ import annotations

from typing import Any

import onnx

from hstu_compile.rewrite._pass import Pass, PassResult


class StripMetadata(Pass):
    """Clear metadata_props and doc_string.

    Cases: 1. model, graph and functions; 2. nodes; 3. graph inputs, outputs, value infos and initializers.
    """

    name = "strip_metadata"

    def call(self, model: onnx.ModelProto) -> PassResult:
        owners: list[Any] = [model, model.graph, *model.functions]
        owners += [*model.graph.node, *(node for function in model.functions for node in function.node)]
        owners += [*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer]
        count = 0
        for owner in owners:
            has_props = hasattr(owner, "metadata_props") and len(owner.metadata_props) > 0
            if has_props or owner.doc_string:
                count += 1
            if has_props:
                del owner.metadata_props[:]
            owner.doc_string = ""
        return PassResult({"stripped": count})
