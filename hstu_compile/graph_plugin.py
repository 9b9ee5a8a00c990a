"""Which kernels a graph's attention nodes need from the plugin library. Level 3."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from hstu_compile.errors import InternalError
from hstu_compile.op_schema import is_attention, node_attributes
from hstu_compile.plugin_library import PluginBuildRequest
from hstu_compile.plugins.kernels.variants import KernelVariant, variants_for

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}

# Any of them makes the mask more than causal, which takes the general kernel.
_GENERAL_MASK = ("has_num_targets", "has_contextual_seq_lens", "contextual_seq_len", "max_attn_len")


def plugin_request_of(model: onnx.ModelProto, runtime_version: str | None = None) -> PluginBuildRequest:
    """The smallest plugin library that runs a graph, for every architecture.

    Args:
        model: graph with attention nodes and value infos.
        runtime_version: of the TensorRT that will load the library; its major version decides headers and whether
            timestamps are int64 (TensorRT 8 has none). None means TensorRT 10 or later.

    Raises:
        InternalError: if an attention input has no static head count and width.
    """
    infos = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.input)}
    is_tensorrt8 = runtime_version is not None and runtime_version.startswith("8.")
    variants: dict[KernelVariant, None] = {}
    for node in model.graph.node:
        if not is_attention(node):
            continue
        attributes = node_attributes(node)
        q, v = infos[node.input[0]], infos[node.input[2]]
        dims = (q.shape.dim[2].dim_value, v.shape.dim[2].dim_value)
        if not all(dims) or q.elem_type not in _DTYPES:
            raise InternalError(f"attention node {node.name} has no static head width or a type that no kernel has")
        for variant in variants_for(
            _DTYPES[q.elem_type],
            *dims,
            pos_bias=attributes["pos_bias"] == 1,
            time_bias=attributes["time_bias"] == 1,
            timestamp_bits=32 if is_tensorrt8 else 64,
            mask_kinds=(1,) if any(attributes[name] for name in _GENERAL_MASK) else (0,),
        ):
            variants[variant] = None
    return PluginBuildRequest(variants=tuple(variants), runtime_version=runtime_version)
