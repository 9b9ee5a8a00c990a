"""Give every dynamic axis one name: L events, B sequences, B_plus_1 offsets."""

from __future__ import annotations

import onnx

from hstu_compile.rewrite._pass import Pass, PassResult

_NAMES = {"B_plus_1 - 1": "B"}


class NameDims(Pass):
    """Rename axes that the exporter could only express through another one (`B_plus_1 - 1` is `B`)."""

    name = "name_dims"

    def call(self, model: onnx.ModelProto) -> PassResult:
        renamed = 0
        for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in _NAMES:
                    dim.dim_param = _NAMES[dim.dim_param]
                    renamed += 1
        return PassResult({"axes": renamed})
