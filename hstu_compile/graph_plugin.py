"""Which kernels a graph's attention and norm nodes need from the plugin library. Level 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypedDict

import onnx
from onnx import TensorProto

from hstu_compile.errors import InternalError
from hstu_compile.op_schema import is_attention, is_norm, node_attributes
from hstu_compile.plugin_library import PluginBuildRequest
from hstu_compile.plugins.kernels.hopper.variants import SILU_FORMS, HopperVariant, hopper_variants_for
from hstu_compile.plugins.kernels.norm_variants import NormVariant, norm_variant
from hstu_compile.plugins.kernels.variants import DTYPE_CODES, KernelVariant, variants_for
from hstu_compile.rewrite.following_norms import following_norms
from hstu_compile.rewrite.tower_norms import tower_norms

_DTYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}

# Any of them makes the mask more than causal, which takes the general kernel.
_GENERAL_MASK = ("has_num_targets", "has_contextual_seq_lens", "contextual_seq_len", "max_attn_len")


def plugin_request_of(models: Sequence[onnx.ModelProto], runtime_version: str | None = None) -> PluginBuildRequest:
    """The smallest plugin library that runs these graphs, for every architecture.

    Args:
        models: graphs with attention and norm nodes and value infos.
        runtime_version: of the TensorRT that will load the library; its major version decides headers and whether
            timestamps are int64 (TensorRT 8 has none). None means TensorRT 10 or later.

    Raises:
        InternalError: if an attention input has no static head count and width, or a norm's rows no width.
    """
    norms = [norm for model in models for norm in _norms_of(model, filter(is_norm, model.graph.node))]
    nodes = [node for model in models for node in _nodes_of(model, runtime_version)]
    return PluginBuildRequest(
        variants=tuple(dict.fromkeys(variant for node in nodes for variant in node.portable)),
        hopper_variants=tuple(dict.fromkeys(variant for node in nodes for variant in node.hopper)),
        norm_variants=tuple(dict.fromkeys(norms)),
        runtime_version=runtime_version,
    )


def kernels_request_of(models: Sequence[onnx.ModelProto]) -> PluginBuildRequest:
    """The smallest library of kernels that runs between the segments of graphs that are cut, for every architecture.

    It has those of the attentions, of the norms that follow them directly, and of those of the towers and of their sum
    in front of the first layer. Other norms stay in the segments, whose compiler fuses them with what surrounds them.

    Args:
        models: as for `plugin_request_of`.

    Raises:
        InternalError: see `plugin_request_of`.
    """
    norms: list[NormVariant] = []
    for model in models:
        following = following_norms(model.graph)
        nodes = [node for node in model.graph.node if node.output[0] in following]
        norms += _norms_of(model, [*nodes, *(norm for norm, *_ in tower_norms(model.graph).values())])
    return dataclasses.replace(plugin_request_of(models), norm_variants=tuple(dict.fromkeys(norms)))


def _norms_of(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> Iterator[NormVariant]:
    """The kernel of each of some norm nodes of a model; its scale says how wide the rows are."""
    widths = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 1}
    for value in model.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 1:
            widths[value.name] = dims[0].dim_value
    names = {code: name for name, code in DTYPE_CODES.items()}
    for node in nodes:
        attributes = node_attributes(node)
        scale = node.input[1 + attributes["has_shift"]]
        if not widths.get(scale):
            raise InternalError(f"norm node {node.name}: the width of {scale} is not recorded in the graph")
        yield norm_variant(
            names[attributes["input_type"]],
            names[attributes["output_type"]],
            widths[scale],
            num_groups=attributes["num_groups"],
            activation=attributes["activation"],
            gate_silu=attributes["gate_silu"] == 1,
            concat=attributes["concat"],
        )


class _Bias(TypedDict):
    pos_bias: bool
    time_bias: bool
    timestamp_bits: int


class _Node(NamedTuple):
    """The kernels that one attention node can run."""

    portable: tuple[KernelVariant, ...]
    hopper: tuple[HopperVariant, ...]


def _nodes_of(model: onnx.ModelProto, runtime_version: str | None) -> Iterator[_Node]:
    infos = {
        value.name: value.type.tensor_type
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
    }
    is_tensorrt8 = runtime_version is not None and runtime_version.startswith("8.")
    for node in model.graph.node:
        if not is_attention(node):
            continue
        attributes = node_attributes(node)
        q, v = infos[node.input[0]], infos[node.input[2]]
        dims = (q.shape.dim[2].dim_value, v.shape.dim[2].dim_value)
        if not all(dims) or q.elem_type not in _DTYPES:
            raise InternalError(f"attention node {node.name} has no static head width or a type that no kernel has")
        has_cache = attributes["has_cache"] == 1
        is_plain = not any(attributes[name] for name in _GENERAL_MASK)
        dtype = _DTYPES[q.elem_type]
        bias: _Bias = {
            "pos_bias": attributes["pos_bias"] == 1,
            "time_bias": attributes["time_bias"] == 1,
            "timestamp_bits": 32 if is_tensorrt8 else 64,
        }
        silu = SILU_FORMS[attributes["silu"]]
        yield _Node(
            variants_for(dtype, *dims, **bias, mask_kinds=(0,) if is_plain else (1,), has_cache=has_cache),
            hopper_variants_for(dtype, *dims, **bias, plain_causal=is_plain, silu=silu, has_cache=has_cache),
        )
