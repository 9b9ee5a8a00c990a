"""Index arithmetic on jagged batches, in operations that every ONNX runtime has (no NonZero, no scatter).

Level 1. A jagged batch of B sequences packs its rows into one axis of length L; `seq_offsets` [B + 1] holds the bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def sequence_index(seq_offsets: Tensor, num_rows: int) -> Tensor:
    """Sequence that owns each row.

    Args:
        seq_offsets: [B + 1] int -- ascending, first element 0.
        num_rows: L; rows at or beyond seq_offsets[B] get B - 1.

    Returns:
        [L] int64 in 0..B - 1.
    """
    rows = torch.arange(num_rows, device=seq_offsets.device)
    ends = seq_offsets[1:].to(torch.int64)
    index = (ends[None, :] <= rows[:, None]).to(torch.int64).sum(dim=1)
    return torch.minimum(index, torch.full_like(index, seq_offsets.shape[0] - 2))


def with_zero_row(rows: Tensor) -> Tensor:
    """Append one zero row, so that index L reads zeros: [L, ...] -> [L + 1, ...]. Works for L = 0."""
    return torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))])


def padded_from_jagged(rows: Tensor, offsets: Tensor, max_len: int) -> Tensor:
    """[L, ...] -> [B, max_len, ...], zeros behind each sequence; rows outside every sequence never appear."""
    starts, lengths = offsets[:-1].to(torch.int64), (offsets[1:] - offsets[:-1]).to(torch.int64)
    steps = torch.arange(max_len, device=rows.device)
    index = torch.where(steps[None, :] < lengths[:, None], starts[:, None] + steps[None, :], rows.shape[0])
    padded = with_zero_row(rows).index_select(0, index.reshape(-1))
    return padded.view(-1, max_len, *rows.shape[1:])


def jagged_from_padded(padded: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    """[B, max_len, ...] -> [L, ...]; rows outside every sequence are zero."""
    batch, max_len = padded.shape[:2]
    owner = sequence_index(offsets, num_rows)
    rows = torch.arange(num_rows, device=padded.device)
    step = rows - offsets.to(torch.int64).index_select(0, owner)
    inside = (step < max_len) & (rows < offsets[-1])
    index = torch.where(inside, owner * max_len + step, batch * max_len)
    return with_zero_row(padded.reshape(batch * max_len, *padded.shape[2:])).index_select(0, index)


class JoinedRows(NamedTuple):
    """The rows of two jagged tensors joined sequence by sequence, first the one's, then the other's.

    Attributes:
        offsets: [B + 1] int -- bounds of the joined rows.
        places: [La + Lb] int64 -- of each joined row, its place in the two tensors one behind the other.
    """

    offsets: Tensor
    places: Tensor


def joined_rows(first_offsets: Tensor, second_offsets: Tensor, num_first: int, num_second: int) -> JoinedRows:
    """Put each sequence's rows of the first tensor in front of its rows of the second.

    Args:
        first_offsets: [B + 1] int -- bounds in the first tensor, [num_first, ...].
        second_offsets: [B + 1] int -- bounds in the second, [num_second, ...].
        num_first: rows of the first tensor, those outside all sequences included.
        num_second: rows of the second tensor, likewise.

    Notes:
        Joined rows at or beyond offsets[B] have a legal place, which means nothing.
    """
    offsets = first_offsets + second_offsets
    owner = sequence_index(offsets, num_first + num_second)
    rows = torch.arange(num_first + num_second, device=offsets.device)
    step = rows - offsets.to(torch.int64).index_select(0, owner)
    first_len = (first_offsets[1:] - first_offsets[:-1]).to(torch.int64).index_select(0, owner)
    places = torch.where(
        step < first_len,
        first_offsets.to(torch.int64).index_select(0, owner) + step,
        num_first + second_offsets.to(torch.int64).index_select(0, owner) + step - first_len,
    ).clamp(0, num_first + num_second - 1)
    return JoinedRows(offsets, places)
