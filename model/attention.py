"""The HSTU attention op on jagged tensors: attributes, and the eager reference in any float dtype. Level 1."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hstu_compile.model.jagged import jagged_from_padded, joined_rows, padded_from_jagged
from hstu_compile.model.masks import valid_attn_mask
from hstu_compile.model.rab import relative_attention_bias, time_buckets

# Scores of a batch beyond which it is computed in halves: 256 MiB in float32, of which a few are alive at once.
_MAX_SCORES = 1 << 26


@dataclasses.dataclass(frozen=True)
class AttentionAttrs:
    """Attributes of one hstu::HstuAttention node; meanings and ranges are the operator contract's.

    `silu`, "fast" or "accurate", is what a kernel may be off by; the eager reference is exact to rounding.
    """

    alpha: float
    scaling_seq_len: float
    max_query_len: int
    max_seq_len: int
    target_group_size: int = 1
    contextual_seq_len: int = 0
    max_attn_len: int = 0
    min_full_attn_seq_len: int = 0
    silu: str = "fast"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, scores and accumulation: float32 for the half types, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    attrs: AttentionAttrs,
    *,
    num_targets: Tensor | None = None,
    contextual_seq_lens: Tensor | None = None,
    scaling_seq_lens: Tensor | None = None,
    row_timestamps: Tensor | None = None,
    col_timestamps: Tensor | None = None,
    pos_table: Tensor | None = None,
    ts_table: Tensor | None = None,
    ts_thresholds: Tensor | None = None,
    k_cached: Tensor | None = None,
    v_cached: Tensor | None = None,
    cache_offsets: Tensor | None = None,
) -> Tensor:
    """out_i = sum_j valid(i, j) * SiLU(alpha * <q_i, k_j> + bias(i, j)) * v_j / scaling_seq_len.

    Queries are the suffix of the keys: row r of sequence b sits at position (Lk_b - Lq_b) + r. With a cache, the keys
    of a sequence are its cached rows followed by its rows of k, and Lk_b counts both.

    Args:
        q: [Lq, H, attention_dim] float.
        k: [Lk, H, attention_dim] float.
        v: [Lk, H, linear_dim] float.
        q_offsets: [B + 1] int -- first element 0, ascending, last element <= Lq.
        k_offsets: [B + 1] int -- the same for k and v.
        attrs: see the contract, plugins/hstuAttentionPlugin/HstuAttention_PluginConfig.yaml.
        num_targets: [B] int or None -- candidates at each tail.
        contextual_seq_lens: [B] int or None -- instead of attrs.contextual_seq_len.
        scaling_seq_lens: [B] float or None -- instead of attrs.scaling_seq_len.
        row_timestamps: [Lq] int64 seconds or None -- query side of the time difference.
        col_timestamps: [Lc + Lk] int64 seconds or None -- key side, in the order of the joined keys.
        pos_table: [1 or H, 2N - 1] float or None.
        ts_table: [1 or H, num_buckets + 1] float or None.
        ts_thresholds: [num_buckets] int64 or None -- from `time_bucket_thresholds`.
        k_cached: [Lc, H, attention_dim] or None -- keys in front of those of k.
        v_cached: [Lc, H, linear_dim] or None -- values, likewise.
        cache_offsets: [B + 1] int or None -- bounds of the cached rows; with k_cached and v_cached, or none of them.

    Returns:
        [Lq, H, linear_dim] in q's dtype. Rows without a valid key, and rows outside every sequence, are zero.

    Notes:
        Half inputs are accumulated in float32 and rounded once, at the end. Memory is O(H * Nq * Nk) of the longest
        sequence: a large batch is computed in halves.

    Raises:
        ValueError: a cache given in part, or a time table without what it needs.
    """
    dtype = compute_dtype(q.dtype)
    batch = q_offsets.shape[0] - 1
    if batch == 0 or q.shape[0] == 0:
        return q.new_zeros((q.shape[0], q.shape[1], v.shape[2]))
    if cache_offsets is not None or k_cached is not None or v_cached is not None:
        if cache_offsets is None or k_cached is None or v_cached is None:
            raise ValueError("k_cached, v_cached and cache_offsets go together")
        k_offsets, places = joined_rows(cache_offsets, k_offsets, k_cached.shape[0], k.shape[0])
        k = torch.cat([k_cached, k]).index_select(0, places)
        v = torch.cat([v_cached, v]).index_select(0, places)
    q_lengths, k_lengths = q_offsets[1:] - q_offsets[:-1], k_offsets[1:] - k_offsets[:-1]
    max_q, max_k = max(int(q_lengths.max()), 1), max(int(k_lengths.max()), 1)
    if batch > 1 and batch * q.shape[1] * max_q * max_k > _MAX_SCORES:
        halves = [(0, batch // 2), (batch // 2, batch)]
        parts = []
        for first, last in halves:
            queries = slice(int(q_offsets[first]), int(q_offsets[last]))
            keys = slice(int(k_offsets[first]), int(k_offsets[last]))
            parts.append(
                hstu_attention(
                    q[queries],
                    k[keys],
                    v[keys],
                    q_offsets[first : last + 1] - q_offsets[first],
                    k_offsets[first : last + 1] - k_offsets[first],
                    attrs,
                    num_targets=None if num_targets is None else num_targets[first:last],
                    contextual_seq_lens=None if contextual_seq_lens is None else contextual_seq_lens[first:last],
                    scaling_seq_lens=None if scaling_seq_lens is None else scaling_seq_lens[first:last],
                    row_timestamps=None if row_timestamps is None else row_timestamps[queries],
                    col_timestamps=None if col_timestamps is None else col_timestamps[keys],
                    pos_table=pos_table,
                    ts_table=ts_table,
                    ts_thresholds=ts_thresholds,
                )
            )
        tail = q.new_zeros((q.shape[0] - int(q_offsets[-1]), q.shape[1], v.shape[2]))
        return torch.cat([*parts, tail])
    column = (batch, 1, 1)
    key_len = k_lengths.to(torch.int64).view(column)
    query_pos = torch.arange(max_q, device=q.device)[None, :, None] + key_len - q_lengths.view(column)
    key_pos = torch.arange(max_k, device=q.device)[None, None, :]
    targets = torch.zeros_like(key_len) if num_targets is None else num_targets.to(torch.int64).view(column)
    targets = torch.minimum(targets.clamp(min=0), key_len)
    context = (
        torch.full_like(key_len, attrs.contextual_seq_len)
        if contextual_seq_lens is None
        else contextual_seq_lens.to(torch.int64).view(column)
    )
    valid = valid_attn_mask(
        query_pos,
        key_pos,
        key_len,
        targets,
        context,
        target_group_size=attrs.target_group_size,
        max_attn_len=attrs.max_attn_len,
        min_full_attn_seq_len=attrs.min_full_attn_seq_len,
    )
    buckets = None
    if ts_table is not None:
        if row_timestamps is None or col_timestamps is None or ts_thresholds is None:
            raise ValueError("a time table needs row_timestamps, col_timestamps and ts_thresholds")
        buckets = time_buckets(
            padded_from_jagged(row_timestamps, q_offsets, max_q),
            padded_from_jagged(col_timestamps, k_offsets, max_k),
            ts_thresholds,
        )
    bias = relative_attention_bias(query_pos, key_pos, key_len - targets, pos_table, buckets, ts_table)

    padded_q = padded_from_jagged(q, q_offsets, max_q).to(dtype).transpose(1, 2)
    padded_k = padded_from_jagged(k, k_offsets, max_k).to(dtype).transpose(1, 2)
    padded_v = padded_from_jagged(v, k_offsets, max_k).to(dtype).transpose(1, 2)
    scores = padded_q @ padded_k.transpose(2, 3) * attrs.alpha
    if bias is not None:
        scores = scores + bias.to(dtype)
    weights = torch.where(valid[:, None], torch.nn.functional.silu(scores), 0.0)
    divisor = attrs.scaling_seq_len if scaling_seq_lens is None else scaling_seq_lens.to(dtype).view(batch, 1, 1, 1)
    out = (weights @ padded_v / divisor).transpose(1, 2)
    return jagged_from_padded(out, q_offsets, q.shape[0]).to(q.dtype)
