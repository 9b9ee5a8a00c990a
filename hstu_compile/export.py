"""Stage 2: the eager model to an ONNX graph with every attention as one node. Level 3.

Input: a `RetrievalModel` in its final precision. Output: an `OnnxGraph` (opset 20, IR 10) whose intermediate values
`layer_0` .. `layer_n` are the residual stream, so that any runtime can be compared with the eager model layer by layer.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import onnx
import torch
from onnxscript import values as onnxscript_values
from torch import Tensor, nn

from hstu_compile.artifacts import TAP_PREFIX, OnnxGraph, Precision, TensorSpec
from hstu_compile.errors import ExportError
from hstu_compile.model.retrieval import RetrievalModel
from hstu_compile.op_schema import attention_contract, register_onnx_schema

OPSET = 20

TORCH_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

# Sizes of the traced example; the graph is dynamic in all of them.
_EXAMPLE_LENGTHS = (5, 3, 4)


class _ServedModel(nn.Module):
    """The outputs that are served, then the residual stream of every layer as taps."""

    item_vectors: Tensor

    def __init__(self, model: RetrievalModel, top_k: int) -> None:
        super().__init__()
        self.model, self.top_k = model, top_k
        if top_k:
            # Normalised once here: in the graph it would be work per request on the whole table.
            self.register_buffer("item_vectors", model.item_vectors().clone())

    def forward(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        seq_offsets: Tensor,
        request_timestamps: Tensor,
        ratings: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        activations = self.model.layer_activations(item_ids, timestamps, seq_offsets, request_timestamps, ratings)
        user_embeddings = self.model.user_embeddings(activations[-1], seq_offsets)
        outputs = [user_embeddings]
        if self.top_k:
            outputs += self.model.top_items(user_embeddings, self.item_vectors, item_ids, seq_offsets, self.top_k)
        return (*outputs, *activations)


def _translate_attention(
    q: Any,
    k: Any,
    v: Any,
    q_offsets: Any,
    k_offsets: Any,
    num_targets: Any,
    contextual_seq_lens: Any,
    scaling_seq_lens: Any,
    row_timestamps: Any,
    col_timestamps: Any,
    pos_table: Any,
    ts_table: Any,
    ts_thresholds: Any,
    alpha: float,
    scaling_seq_len: float,
    max_query_len: int,
    max_seq_len: int,
    target_group_size: int,
    contextual_seq_len: int,
    max_attn_len: int,
    min_full_attn_seq_len: int,
) -> Any:
    """Turn torch.ops.hstu.hstu_attention into one node: present inputs in order, every attribute stored."""
    contract = attention_contract()
    given = {
        "q": q,
        "k": k,
        "v": v,
        "q_offsets": q_offsets,
        "k_offsets": k_offsets,
        "num_targets": num_targets,
        "contextual_seq_lens": contextual_seq_lens,
        "scaling_seq_lens": scaling_seq_lens,
        "row_timestamps": row_timestamps,
        "col_timestamps": col_timestamps,
        "pos_table": pos_table,
        "ts_table": ts_table,
        "ts_thresholds": ts_thresholds,
    }
    attributes: dict[str, Any] = {
        "alpha": alpha,
        "scaling_seq_len": scaling_seq_len,
        "max_query_len": max_query_len,
        "max_seq_len": max_seq_len,
        "target_group_size": target_group_size,
        "contextual_seq_len": contextual_seq_len,
        "max_attn_len": max_attn_len,
        "min_full_attn_seq_len": min_full_attn_seq_len,
        "has_num_targets": int(num_targets is not None),
        "has_contextual_seq_lens": int(contextual_seq_lens is not None),
        "has_scaling_seq_lens": int(scaling_seq_lens is not None),
        "pos_bias": int(pos_table is not None),
        "time_bias": int(ts_table is not None),
    }
    if problems := contract.problems(attributes):
        raise ValueError("; ".join(problems))
    present = [given[each.name] for each in contract.present_inputs(attributes)]
    opset = onnxscript_values.Opset(contract.namespace, int(contract.version))
    op = getattr(opset, contract.name)
    return op(*present, **attributes, plugin_version=contract.version, plugin_namespace=contract.namespace)


@contextlib.contextmanager
def _quiet() -> Any:
    """Hold back the exporter's notes about packages that are not needed; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _example(model: RetrievalModel) -> dict[str, Tensor]:
    lengths = torch.tensor(_EXAMPLE_LENGTHS)
    total = int(lengths.sum())
    example = {
        "item_ids": torch.ones(total, dtype=torch.int32),
        "timestamps": torch.arange(total),
        "seq_offsets": torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32),
        "request_timestamps": torch.full((len(_EXAMPLE_LENGTHS),), total),
    }
    if model.config.has_ratings:
        example["ratings"] = torch.zeros(total, dtype=torch.int32)
    return example


def exported_from_model(model: RetrievalModel, precision: Precision, top_k: int = 0) -> OnnxGraph:
    """Trace the model.

    Args:
        model: in evaluation mode, already cast to `precision`.
        precision: its type.
        top_k: also output the K best unseen items; 0 leaves them out.

    Returns:
        The graph as exported, taps still among its outputs.

    Raises:
        ExportError: HSTU-E201, with the exporter's message.
    """
    register_onnx_schema()
    example = _example(model)
    axes = {"seq_offsets": {0: "B_plus_1"}, "request_timestamps": {0: "B"}}
    taps = [f"{TAP_PREFIX}{i}" for i in range(model.config.num_layers + 1)]
    served = ["user_embeddings", *(["top_items", "top_scores"] if top_k else [])]
    try:
        with _quiet():
            program = torch.onnx.export(
                _ServedModel(model, top_k).eval(),
                kwargs=example,
                dynamo=True,
                input_names=list(example),
                output_names=served + taps,
                dynamic_shapes={name: axes.get(name, {0: "L"}) for name in example},
                custom_translation_table={torch.ops.hstu.hstu_attention.default: _translate_attention},
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            proto = program.model_proto
    except Exception as error:
        raise ExportError(
            "HSTU-E201",
            "the model could not be traced to ONNX",
            f"{type(error).__name__}: {error}",
            "check the versions of torch and onnxscript with `hstu-compile env` against README",
        ) from error
    return OnnxGraph(
        model=proto,
        precision=precision,
        inputs=tensor_specs(proto.graph.input),
        outputs=tensor_specs(proto.graph.output),
    )


def tensor_specs(values: Any) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of ONNX value infos; dynamic axes by name."""
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_string(tensor.elem_type).removeprefix("TensorProto.").lower()
        shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        specs.append(TensorSpec(value.name, {"float": "float32", "double": "float64"}.get(dtype, dtype), shape))
    return tuple(specs)
