"""Small ONNX models around hstu::HstuAttention, built by hand: no exporter takes part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from hstu_compile.op_schema import attention_contract
from hstu_compile.plugins.kernels.hopper.variants import silu_code
from tests.oracle import ELEMENT_INPUTS, Array, AttentionCase

OPSET = 20

ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def contract_attributes(case: AttentionCase, max_query_len: int = 0, max_seq_len: int = 0) -> dict[str, Any]:
    """The node's attributes for a case; a length bound of 0 is the case's own longest sequence."""
    attrs = case.attrs
    return {
        "alpha": attrs.alpha,
        "scaling_seq_len": attrs.scaling_seq_len,
        "max_query_len": max_query_len or longest(case.q_offsets),
        "max_seq_len": max_seq_len or longest(joined_offsets(case)),
        "target_group_size": attrs.target_group_size,
        "contextual_seq_len": attrs.contextual_seq_len,
        "max_attn_len": attrs.max_attn_len,
        "min_full_attn_seq_len": attrs.min_full_attn_seq_len,
        "silu": silu_code(attrs.silu),
        "has_num_targets": int(case.num_targets is not None),
        "has_contextual_seq_lens": int(case.contextual_seq_lens is not None),
        "has_scaling_seq_lens": int(case.scaling_seq_lens is not None),
        "pos_bias": int(case.pos_table is not None),
        "time_bias": int(case.ts_table is not None),
        "has_cache": int(case.cache_offsets is not None),
    }


def joined_offsets(case: AttentionCase) -> Array:
    """Bounds of the joined keys."""
    return case.k_offsets if case.cache_offsets is None else case.k_offsets.astype(np.int64) + case.cache_offsets


def longest(offsets: Array) -> int:
    """Longest row of plausible offsets, at least 1."""
    steps = np.diff(offsets.astype(np.int64))
    return int(np.clip(steps, 1, 128).max(initial=1))


def feeds_of(case: AttentionCase) -> dict[str, Array]:
    """Every input that the case has, by contract name, queries, keys and values in its dtype."""
    given = {name: getattr(case, name) for name in ("q", "k", "v", "q_offsets", "k_offsets")} | case.optional_inputs()
    present = {name: value for name, value in given.items() if value is not None}
    return {name: array.astype(case.dtype) if name in ELEMENT_INPUTS else array for name, array in present.items()}


def attention_node(attributes: Mapping[str, Any], output: str = "out", **renamed: str) -> onnx.NodeProto:
    """One node of the contract; `renamed` maps an input's contract name to a value name."""
    contract = attention_contract()
    inputs = [renamed.get(each.name, each.name) for each in contract.present_inputs(attributes)]
    return helper.make_node(
        contract.name,
        inputs,
        [output],
        name=f"node_{output}",
        domain=contract.namespace,
        **attributes,
        plugin_version=contract.version,
        plugin_namespace=contract.namespace,
    )


def attention_model(case: AttentionCase, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """A model whose nodes read the case's inputs; thresholds are an initializer, as in an exported graph."""
    arrays = feeds_of(case)
    element = ELEMENT_TYPES[case.dtype]
    values = []
    for name, array in arrays.items():
        if name != "ts_thresholds":
            kind = element if name in ELEMENT_INPUTS else helper.np_dtype_to_tensor_dtype(array.dtype)
            values.append(helper.make_tensor_value_info(name, kind, _axes(name, array)))
    outputs = [
        helper.make_tensor_value_info(node.output[0], element, ["Lq", case.q.shape[1], case.v.shape[2]])
        for node in nodes
    ]
    initializers = [] if case.ts_thresholds is None else [numpy_helper.from_array(case.ts_thresholds, "ts_thresholds")]
    graph = helper.make_graph(list(nodes), "attention", values, outputs, initializers)
    contract = attention_contract()
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(contract.namespace, int(contract.version))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _axes(name: str, array: Array) -> list[int | str]:
    ragged = {"q": "Lq", "row_timestamps": "Lq", "k": "Lk", "v": "Lk", "col_timestamps": "Lcol"}
    ragged |= {"k_cached": "Lc", "v_cached": "Lc"}
    first = ragged.get(name) or ("B_plus_1" if name.endswith("offsets") else "B")
    return [first, *array.shape[1:]] if not name.endswith("table") else list(array.shape)


def run_onnx(model: onnx.ModelProto, feeds: Mapping[str, Array], outputs: Sequence[str] = ()) -> dict[str, Array]:
    """Outputs of a model in ONNX Runtime on one thread; `outputs` may name intermediate values."""
    if outputs:
        known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
        exposed = onnx.ModelProto()
        exposed.CopyFrom(model)
        present = {value.name for value in exposed.graph.output}
        exposed.graph.output.extend(known[name] for name in outputs if name not in present)
        model = exposed
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = [value.name for value in session.get_outputs()]
    taken = {value.name: feeds[value.name] for value in session.get_inputs()}
    return dict(zip(wanted, session.run(wanted, taken), strict=True))
