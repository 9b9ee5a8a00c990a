"""Record what the exporter does not know of an attention: its output's type and shape, and the build's SiLU."""

from __future__ import annotations

import onnx

from hstu_compile.op_schema import is_attention, node_attributes
from hstu_compile.plugins.kernels.hopper.variants import Silu, silu_code
from hstu_compile.rewrite._pass import Pass, PassResult


class AnnotateAttention(Pass):
    """Check every attention node against the contract, write the value info of its output, and its attribute `silu`.

    1. Output: type is that of v, shape [rows of q, heads, width of v].
    2. `silu`: what the build was asked for.
    """

    name = "annotate_attention"

    def __init__(self, num_layers: int, silu: Silu = "fast") -> None:
        self._num_layers = num_layers
        self._silu = silu_code(silu)

    def requires(self, model: onnx.ModelProto) -> None:
        nodes = [node for node in model.graph.node if is_attention(node)]
        self.expect(PassResult({"attention": len(nodes)}), "attention", self._num_layers)
        for node in nodes:
            node_attributes(node)

    def call(self, model: onnx.ModelProto) -> PassResult:
        # Keys and values of a prefill are outputs of the graph as well.
        infos = {info.name: info for info in (*model.graph.output, *model.graph.value_info)}
        written = changed = 0
        for node in model.graph.node:
            if not is_attention(node):
                continue
            silu = next(attribute for attribute in node.attribute if attribute.name == "silu")
            changed += silu.i != self._silu
            silu.i = self._silu
            known = infos.get(node.output[0])
            if known is not None and known.type.tensor_type.elem_type:
                continue
            q, v = infos[node.input[0]], infos[node.input[2]]
            out = model.graph.value_info.add(name=node.output[0]) if known is None else known
            out.type.CopyFrom(v.type)
            out.type.tensor_type.shape.dim[0].CopyFrom(q.type.tensor_type.shape.dim[0])
            written += 1
        return PassResult({"attention": written, **({"silu": changed} if changed else {})})
