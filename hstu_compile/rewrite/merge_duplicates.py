"""Compute once what several nodes compute alike."""

from __future__ import annotations

import onnx

from hstu_compile.rewrite._pass import Pass, PassResult

# Constants up to this size are compared by content; larger ones are weights, which an exporter shares by name.
_MAX_COMPARED_BYTES = 1 << 16


class MergeDuplicates(Pass):
    """Merge equal nodes and equal small initializers of a graph without functions.

    Every attention layer carries the same index, mask and time-bucket arithmetic in its body. Inlined, the layers can
    share it: for 8 layers that is most of the graph, and of the work per request outside the projections.

    Cases: 1. initializers with equal type, shape and bytes; 2. nodes with equal operator, attributes and (already
    merged) inputs. Nodes that produce graph outputs, have a body, or draw random numbers stay.
    """

    name = "merge_duplicates"

    def call(self, model: onnx.ModelProto) -> PassResult:
        graph = model.graph
        outputs = {value.name for value in graph.output}
        replaced: dict[str, str] = {}
        initializers = self._merge_initializers(graph, outputs, replaced)
        seen: dict[tuple[object, ...], onnx.NodeProto] = {}
        kept: list[onnx.NodeProto] = []
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = replaced.get(name, name)
            if self._must_stay(node, outputs):
                kept.append(node)
                continue
            twin = seen.setdefault(self._key(node), node)
            if twin is node:
                kept.append(node)
            else:
                replaced.update(zip(node.output, twin.output, strict=True))
        merged = len(graph.node) - len(kept)
        if merged:
            # Copies first: deleting the field frees the messages that `kept` points into.
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
            del graph.node[:]
            graph.node.extend(copies)
        if replaced:
            infos = [info for info in graph.value_info if info.name not in replaced]
            copied = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in infos]
            del graph.value_info[:]
            graph.value_info.extend(copied)
        return PassResult({"nodes": merged, "initializers": initializers})

    @staticmethod
    def _merge_initializers(graph: onnx.GraphProto, outputs: set[str], replaced: dict[str, str]) -> int:
        seen: dict[bytes, str] = {}
        doubles = []
        for tensor in graph.initializer:
            if tensor.ByteSize() > _MAX_COMPARED_BYTES or tensor.name in outputs:
                continue
            nameless = onnx.TensorProto()
            nameless.CopyFrom(tensor)
            nameless.name = ""
            twin = seen.setdefault(nameless.SerializeToString(deterministic=True), tensor.name)
            if twin != tensor.name:
                replaced[tensor.name] = twin
                doubles.append(tensor)
        for tensor in doubles:
            graph.initializer.remove(tensor)
        return len(doubles)

    @staticmethod
    def _must_stay(node: onnx.NodeProto, outputs: set[str]) -> bool:
        has_body = any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)
        return has_body or node.op_type.startswith("Random") or any(name in outputs for name in node.output)

    @staticmethod
    def _key(node: onnx.NodeProto) -> tuple[object, ...]:
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        return (node.domain, node.op_type, tuple(node.input), tuple(attributes), len(node.output))
