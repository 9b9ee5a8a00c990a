"""Stage 2: the eager model to an ONNX graph with every attention as one node. Level 3.

Input: a `ServedGraph` in its final precision. Output: an `OnnxGraph` (opset 20, IR 10) whose intermediate values
`layer_0` .. `layer_n` are the residual stream, so that any runtime can be compared with the eager model layer by layer.
Large tables leave the graph here, before there is an ONNX message that would have to hold them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import values as onnxscript_values

from hstu_compile.artifacts import OnnxGraph, Precision
from hstu_compile.errors import ExportError, HstuCompileError
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.op_schema import attention_contract, register_onnx_schema
from hstu_compile.plugins.kernels.hopper.variants import silu_code
from hstu_compile.served import ServedGraph
from hstu_compile.table_files import MESSAGE_BYTES, TableFiles, is_large_table, is_multiplied, table_names

OPSET = 20
_ITEM_VECTORS = "item_vectors"

TORCH_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


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
    silu: str = "fast",
    k_cached: Any = None,
    v_cached: Any = None,
    cache_offsets: Any = None,
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
        "k_cached": k_cached,
        "v_cached": v_cached,
        "cache_offsets": cache_offsets,
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
        "silu": silu_code(silu),
        "has_num_targets": int(num_targets is not None),
        "has_contextual_seq_lens": int(contextual_seq_lens is not None),
        "has_scaling_seq_lens": int(scaling_seq_lens is not None),
        "pos_bias": int(pos_table is not None),
        "time_bias": int(ts_table is not None),
        "has_cache": int(cache_offsets is not None),
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


def _move_tables(model: ir.Model, weights: Collection[str], tables: TableFiles) -> None:
    """Put large tables into files, and their names in the tables' place; `weights` are the model's parameters."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        readers = [(use.node.op_type, use.idx) for use in value.uses()]
        if is_large_table(tensor.nbytes, readers, is_weight=name in weights):
            # The exporter transposes the item vectors, and names what it makes itself.
            known_as = _ITEM_VECTORS if is_multiplied(readers) else name
            file, shape = tables.add(known_as, _numbers(tensor)), ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                file, None, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=tables.folder
            )


def _numbers(tensor: ir.TensorProtocol) -> memoryview:
    """A tensor's bytes where they lie; only of one that does not lie row by row are they copied."""
    raw = tensor.raw
    array: NDArray[Any]
    if isinstance(raw, torch.Tensor):
        array = raw.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        array = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return array.data


def _require_one_message(name: str, model: ir.Model) -> None:
    """Refuse a graph that no ONNX message can hold, before one is made of it."""
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    inside = sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, ir.ExternalTensor))
    if inside > MESSAGE_BYTES:
        raise ExportError(
            "HSTU-E201",
            f"the graph {name} is too large for one ONNX file",
            f"its weights without the large tables are {inside} bytes, and one file holds {MESSAGE_BYTES}",
            "build with --fp16 or --bf16, which halve them",
            {"bytes": inside},
        )


def exported_from_served(served: ServedGraph, precision: Precision, tables: TableFiles | None = None) -> OnnxGraph:
    """Trace one graph of a model.

    Args:
        served: its module is in evaluation mode and already cast to `precision`.
        precision: its type.
        tables: takes the large tables; None leaves them in the graph.

    Returns:
        The graph as exported, taps still among its outputs.

    Raises:
        ExportError: HSTU-E201, with the exporter's message, or if the graph without its tables is too large.
        BundleError: HSTU-E802, if a table's file cannot be written.
    """
    register_onnx_schema()
    try:
        with _quiet():
            program = torch.onnx.export(
                served.module,
                args=tuple(each.example for each in served.inputs),
                dynamo=True,
                input_names=[each.name for each in served.inputs],
                output_names=[*served.outputs, *served.taps],
                # One tuple inside another: the module takes its inputs as *values.
                dynamic_shapes=(tuple({0: each.axis} for each in served.inputs),),
                custom_translation_table={torch.ops.hstu.hstu_attention.default: _translate_attention},
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            if tables is not None:
                _move_tables(program.model, {name for name, _ in served.module.named_parameters()}, tables)
            _require_one_message(served.name, program.model)
            proto = program.model_proto
    except HstuCompileError:
        raise
    except Exception as error:
        raise ExportError(
            "HSTU-E201",
            f"the graph {served.name} could not be traced to ONNX",
            f"{type(error).__name__}: {error}",
            "check the versions of torch and onnxscript with `hstu-compile env` against README",
        ) from error
    return OnnxGraph(
        name=served.name,
        model=proto,
        precision=precision,
        inputs=tensor_specs(proto.graph.input),
        outputs=tensor_specs(proto.graph.output),
        folder=tables.folder if tables is not None and table_names(proto) else None,
    )
