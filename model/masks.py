"""Which key a query may see: the one mask of all HSTU families. True means the pair is valid. Level 1."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_attn_mask(
    query_pos: Tensor,
    key_pos: Tensor,
    key_len: Tensor,
    num_targets: Tensor,
    contextual_seq_len: Tensor,
    *,
    target_group_size: int = 1,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
) -> Tensor:
    """Valid (query, key) pairs of padded sequences, by absolute position.

    Args:
        query_pos: [B, Nq, 1] int -- absolute row of each query; negative rows see nothing.
        key_pos: [1, 1, Nk] int -- absolute row of each key.
        key_len: [B, 1, 1] int -- rows in each sequence, targets included.
        num_targets: [B, 1, 1] int -- candidates at the tail, 0..key_len.
        contextual_seq_len: [B, 1, 1] int -- prefix rows that see the whole history.
        target_group_size: targets of one group see each other causally.
        max_attn_len: window in positions, inclusive; 0 is off. Candidates count as one position behind the history.
        min_full_attn_seq_len: the last positions that ignore the window.

    Returns:
        [B, Nq, Nk] bool.
    """
    history = key_len - num_targets
    causal = key_pos <= query_pos
    sees_history = causal & (key_pos < history)
    both_targets = (query_pos >= history) & (key_pos >= history)
    # Floor division of the negative differences outside `both_targets` is harmless: they are masked there.
    query_group = torch.div(query_pos - history, target_group_size, rounding_mode="floor")
    key_group = torch.div(key_pos - history, target_group_size, rounding_mode="floor")
    base = sees_history | (both_targets & causal & (query_group == key_group))
    if max_attn_len > 0:
        shift = (contextual_seq_len - 1).clamp(min=0)

        def position(row: Tensor) -> Tensor:
            return torch.where(row < contextual_seq_len, 0, torch.minimum(row, history) - shift)

        query_position = position(query_pos)
        near = query_position - position(key_pos) <= max_attn_len
        if min_full_attn_seq_len > 0:
            near = near | (query_position >= history - shift - min_full_attn_seq_len)
        base = base & near
    is_context = query_pos < contextual_seq_len
    context = (key_pos < history) | (key_pos == query_pos)
    inside = (query_pos >= 0) & (query_pos < key_len) & (key_pos < key_len)
    return torch.where(is_context, context, base) & inside
