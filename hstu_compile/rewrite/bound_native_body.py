"""Shrink the padding of the attention's native body to what given requests need, for a check on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from hstu_compile.op_schema import attention_contract, is_attention, node_attributes
from hstu_compile.rewrite._pass import Pass, PassResult
from hstu_compile.rewrite.attach_native_body import AttachNativeBody

# Scores of one attention in float32 beyond which the padding is cut to the requests'.
AFFORDABLE_BYTES = 1 << 28

# Graph inputs whose lengths add up to the rows of a sequence.
_OFFSETS = ("seq_offsets", "candidate_offsets", "cache_offsets")


class BoundNativeBody(Pass):
    """Lower max_query_len and max_seq_len of every attention node and write its native body anew.

    The body pads every sequence to these attributes, whatever its length: an engine for histories of 16,384 events
    would take gigabytes for one of a hundred. On sequences that fit, the smaller body computes the same numbers.

    Cases: 1. a node is padded further than needed; 2. no node is: nothing.
    """

    name = "bound_native_body"

    def __init__(self, longest: int) -> None:
        self._longest = longest

    def call(self, model: onnx.ModelProto) -> PassResult:
        contract, bounded = attention_contract(), 0
        nodes = [node for node in model.graph.node if is_attention(node)]
        for node in nodes:
            for attribute in node.attribute:
                if attribute.name in ("max_query_len", "max_seq_len") and attribute.i > self._longest:
                    attribute.i = self._longest
                    bounded += 1
        if bounded:
            ours = (contract.namespace, contract.name)
            kept = [function for function in model.functions if (function.domain, function.name) != ours]
            del model.functions[:]
            model.functions.extend(kept)
            AttachNativeBody(len(nodes)).call(model)
        return PassResult({"bounds": bounded})


def affordable(
    model: onnx.ModelProto, feeds: Sequence[Mapping[str, NDArray[Any]]], contextual_len: int
) -> onnx.ModelProto:
    """The graph that a CPU can run on these requests: the model itself, or a copy with smaller padding.

    Args:
        model: with native bodies.
        feeds: requests.
        contextual_len: rows in front of every history.
    """
    batch = max((len(feed[name]) - 1 for feed in feeds for name in _OFFSETS if name in feed), default=1)
    if _padded_bytes(model, batch) <= AFFORDABLE_BYTES:
        return model
    bounded = onnx.ModelProto()
    bounded.CopyFrom(model)
    BoundNativeBody(max(_longest_sequence(feed, contextual_len) for feed in feeds)).call(bounded)
    return bounded


def _longest_sequence(feeds: Mapping[str, NDArray[Any]], contextual_len: int) -> int:
    """Most rows of one sequence in a request: history, candidates, cached rows and contextual tokens together."""
    present = [int(np.diff(feeds[name]).max(initial=0)) for name in _OFFSETS if name in feeds]
    return max(1, sum(present) + contextual_len)


def _padded_bytes(model: onnx.ModelProto, batch: int) -> int:
    """Bytes of one float32 tensor of attention scores, of which the native body holds several at once."""
    types = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.input)}
    sizes = [0]
    for node in model.graph.node:
        if is_attention(node):
            attributes, heads = node_attributes(node), types[node.input[0]].shape.dim[1].dim_value
            sizes.append(4 * batch * heads * attributes["max_query_len"] * attributes["max_seq_len"])
    return max(sizes)
