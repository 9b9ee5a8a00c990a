"""The attention as one op of torch, hstu::hstu_attention: export keeps it as one node, a GPU runs it as one kernel.

Level 1. The one place of model/ that knows of the Triton kernel, and only when a tensor is on a GPU.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hstu_compile.model.attention import AttentionAttrs, hstu_attention


@torch.library.custom_op("hstu::hstu_attention", mutates_args=())
def hstu_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    num_targets: Tensor | None,
    contextual_seq_lens: Tensor | None,
    scaling_seq_lens: Tensor | None,
    row_timestamps: Tensor | None,
    col_timestamps: Tensor | None,
    pos_table: Tensor | None,
    ts_table: Tensor | None,
    ts_thresholds: Tensor | None,
    alpha: float,
    scaling_seq_len: float,
    max_query_len: int,
    max_seq_len: int,
    target_group_size: int,
    contextual_seq_len: int,
    max_attn_len: int,
    min_full_attn_seq_len: int,
    silu: str = "fast",
    k_cached: Tensor | None = None,
    v_cached: Tensor | None = None,
    cache_offsets: Tensor | None = None,
) -> Tensor:
    """`hstu_attention` with its attributes spelled out as the operator contract orders them."""
    attrs = AttentionAttrs(
        alpha,
        scaling_seq_len,
        max_query_len,
        max_seq_len,
        target_group_size,
        contextual_seq_len,
        max_attn_len,
        min_full_attn_seq_len,
        silu,
    )
    return hstu_attention(
        q,
        k,
        v,
        q_offsets,
        k_offsets,
        attrs,
        num_targets=num_targets,
        contextual_seq_lens=contextual_seq_lens,
        scaling_seq_lens=scaling_seq_lens,
        row_timestamps=row_timestamps,
        col_timestamps=col_timestamps,
        pos_table=pos_table,
        ts_table=ts_table,
        ts_thresholds=ts_thresholds,
        k_cached=k_cached,
        v_cached=v_cached,
        cache_offsets=cache_offsets,
    )


@hstu_attention_op.register_fake
def _fake_hstu_attention(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


# The op's arguments behind the offsets, in its order.
_OPTIONAL_INPUTS = (
    "num_targets",
    "contextual_seq_lens",
    "scaling_seq_lens",
    "row_timestamps",
    "col_timestamps",
    "pos_table",
    "ts_table",
    "ts_thresholds",
)

# Those behind the attributes, which a call may leave out.
_CACHE_INPUTS = ("k_cached", "v_cached", "cache_offsets")


@hstu_attention_op.register_kernel("cuda")
def _cuda_hstu_attention(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, *rest: Any) -> Tensor:
    """A fused kernel: jagged, without padding."""
    from hstu_compile.plugins.kernels.dispatch import hstu_attention_cuda

    num_attributes = len(dataclasses.fields(AttentionAttrs))
    inputs = dict(zip(_OPTIONAL_INPUTS, rest, strict=False))
    given = rest[len(_OPTIONAL_INPUTS) :]
    inputs |= dict(zip(_CACHE_INPUTS, given[num_attributes:], strict=False))
    attrs = dataclasses.asdict(AttentionAttrs(*given[:num_attributes]))
    # They bound the padded native body; the kernel needs no bounds.
    del attrs["max_query_len"], attrs["max_seq_len"]
    return hstu_attention_cuda(q, k, v, q_offsets, k_offsets, **inputs, **attrs)
