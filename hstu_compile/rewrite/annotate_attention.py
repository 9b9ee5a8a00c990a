"""Record type and shape of every attention output, which no generic shape inference knows."""

from __future__ import annotations

import onnx

from hstu_compile.op_schema import is_attention, node_attributes
from hstu_compile.rewrite._pass import Pass, PassResult


class AnnotateAttention(Pass):
    """Check every attention node against the contract and write the value info of its output.

    Type is that of v, shape [rows of q, heads, width of v].
    """

    name = "annotate_attention"

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers

    def requires(self, model: onnx.ModelProto) -> None:
        nodes = [node for node in model.graph.node if is_attention(node)]
        self.expect(PassResult({"attention": len(nodes)}), "attention", self._num_layers)
        for node in nodes:
            node_attributes(node)

    def call(self, model: onnx.ModelProto) -> PassResult:
        # Keys and values of a prefill are outputs of the graph as well.
        infos = {info.name: info for info in (*model.graph.output, *model.graph.value_info)}
        written = 0
        for node in model.graph.node:
            if not is_attention(node):
                continue
            known = infos.get(node.output[0])
            if known is not None and known.type.tensor_type.elem_type:
                continue
            q, v = infos[node.input[0]], infos[node.input[2]]
            out = model.graph.value_info.add(name=node.output[0]) if known is None else known
            out.type.CopyFrom(v.type)
            out.type.tensor_type.shape.dim[0].CopyFrom(q.type.tensor_type.shape.dim[0])
            written += 1
        return PassResult({"attention": written})
