"""PyTorch face of the Triton attention kernel: the fast path on a GPU, and on CPU under Triton's interpreter.

Level: kernels; imports torch and triton.  ``TRITON_INTERPRET=1`` must be set before triton is first imported to run on
CPU.
"""

from __future__ import annotations

import torch

from hstu_compile.plugins.kernels.hstu_attention import hstu_attention
from hstu_compile.plugins.kernels.tiles import TileConfig, tile_configs
from hstu_compile.plugins.kernels.variants import ARCHS, padded_dim

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _config_of(q: torch.Tensor, v: torch.Tensor, *, pos_bias: bool, time_bias: bool) -> TileConfig:
    arch = 80
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        arch = max((a for a in ARCHS if a <= 10 * major + minor), default=80)
    return tile_configs(
        arch, _DTYPES[q.dtype], padded_dim(q.shape[2]), padded_dim(v.shape[2]), pos_bias=pos_bias, time_bias=time_bias
    )[0]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"hstu_attention_triton: {message}")


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x [L, H, D] itself where each row is contiguous, as a slice of the columns of [L, W] is; else a copy."""
    width = x.shape[1] * x.shape[2]
    if x.shape[0] > 1 and x.stride(0) >= width and x[0].is_contiguous():
        return x
    return x.contiguous()


def hstu_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    *,
    num_targets: torch.Tensor | None = None,
    contextual_seq_lens: torch.Tensor | None = None,
    scaling_seq_lens: torch.Tensor | None = None,
    row_timestamps: torch.Tensor | None = None,
    col_timestamps: torch.Tensor | None = None,
    pos_table: torch.Tensor | None = None,
    ts_table: torch.Tensor | None = None,
    ts_thresholds: torch.Tensor | None = None,
    k_cached: torch.Tensor | None = None,
    v_cached: torch.Tensor | None = None,
    cache_offsets: torch.Tensor | None = None,
    alpha: float,
    scaling_seq_len: float,
    target_group_size: int = 1,
    contextual_seq_len: int = 0,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
    config: TileConfig | None = None,
    mask_kind: int | None = None,
) -> torch.Tensor:
    """Return HSTU attention [Lq, H, Dv] in q's dtype; one launch, no synchronisation, no data-dependent host work.

    Args:
        q: [Lq, H, Dqk] float32, float16 or bfloat16; k [Lk, H, Dqk] and v [Lk, H, Dv] the same dtype.  Rows that are
            not contiguous are copied; they may lie in a wider tensor.
        q_offsets: [B + 1] int32; k_offsets likewise.  Checked on the device: invalid offsets give zeros.
        num_targets: [B] int32 -- candidates at each tail, clamped to the length; contextual_seq_lens [B] int32;
            scaling_seq_lens [B] float32.  When given, the last two replace the attributes.
        row_timestamps: [Lq] int64 or int32, seconds; col_timestamps [Lc + Lk], of the joined keys, and ts_thresholds
            [num_buckets] the same type; ts_table [1 or H, num_buckets + 1] float32.  All four or none.
        pos_table: [1 or H, 2 * pos_table_len - 1] float32.
        k_cached: [Lc, H, Dqk] like k -- keys in front of those of k; v_cached [Lc, H, Dv] and cache_offsets [B + 1]
            int32 with it.  All three or none.
        alpha: multiplier of the products; the other attributes as in the contract.
        config: tile configuration; None takes the first tactic of the device.
        mask_kind: 0 or 1 forces a variant of the kernel; None picks 0 where the mask is plain causal.

    Raises:
        ValueError: shapes, dtypes or devices that contradict each other, head dims beyond 256, or a bias given in part.
    """
    _require(
        q.dim() == k.dim() == v.dim() == 3, f"q, k, v must be [L, H, D], got {q.dim()}, {k.dim()}, {v.dim()} dimensions"
    )
    num_heads, dqk, dv = q.shape[1], q.shape[2], v.shape[2]
    _require(
        tuple(k.shape[1:]) == (num_heads, dqk) and tuple(v.shape[:2]) == (k.shape[0], num_heads),
        f"shapes do not agree: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}",
    )
    _require(1 <= dqk <= 256 and 1 <= dv <= 256, f"head dims must be in [1, 256], got Dqk={dqk}, Dv={dv}")
    _require(
        q.dtype in _DTYPES and k.dtype == v.dtype == q.dtype,
        f"q, k, v must share float32, float16 or bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}",
    )
    batch = q_offsets.numel() - 1
    _require(
        batch >= 0 and k_offsets.numel() == batch + 1,
        f"offsets must be [B + 1], got {q_offsets.numel()} and {k_offsets.numel()}",
    )
    _require(target_group_size >= 1, f"target_group_size must be at least 1, got {target_group_size}")
    times = (row_timestamps, col_timestamps, ts_table, ts_thresholds)
    time_bias = ts_table is not None
    _require(
        all(t is not None for t in times) or all(t is None for t in times),
        "row_timestamps, col_timestamps, ts_table and ts_thresholds go together",
    )
    cache = (k_cached, v_cached, cache_offsets)
    _require(
        all(t is not None for t in cache) or all(t is None for t in cache),
        "k_cached, v_cached and cache_offsets go together",
    )
    num_cached = 0 if k_cached is None else k_cached.shape[0]
    for name, tensor, kinds, shape in (
        ("q_offsets", q_offsets, (torch.int32,), (batch + 1,)),
        ("k_offsets", k_offsets, (torch.int32,), (batch + 1,)),
        ("num_targets", num_targets, (torch.int32,), (batch,)),
        ("contextual_seq_lens", contextual_seq_lens, (torch.int32,), (batch,)),
        ("scaling_seq_lens", scaling_seq_lens, (torch.float32,), (batch,)),
        ("row_timestamps", row_timestamps, (torch.int64, torch.int32), (q.shape[0],)),
        ("col_timestamps", col_timestamps, (torch.int64, torch.int32), (num_cached + k.shape[0],)),
        ("ts_thresholds", ts_thresholds, (torch.int64, torch.int32), None),
        ("pos_table", pos_table, (torch.float32,), None),
        ("ts_table", ts_table, (torch.float32,), None),
        ("k_cached", k_cached, (q.dtype,), (num_cached, num_heads, dqk)),
        ("v_cached", v_cached, (q.dtype,), (num_cached, num_heads, dv)),
        ("cache_offsets", cache_offsets, (torch.int32,), (batch + 1,)),
    ):
        if tensor is None:
            continue
        _require(tensor.dtype in kinds, f"{name} must be one of {[str(kind) for kind in kinds]}, got {tensor.dtype}")
        _require(
            shape is None or tuple(tensor.shape) == shape, f"{name} must have shape {shape}, got {tuple(tensor.shape)}"
        )
        _require(tensor.device == q.device, f"{name} is on {tensor.device}, q on {q.device}")
    num_buckets = 0
    if row_timestamps is not None and col_timestamps is not None and ts_table is not None and ts_thresholds is not None:
        num_buckets = ts_thresholds.numel()
        _require(
            row_timestamps.dtype == col_timestamps.dtype == ts_thresholds.dtype,
            "row_timestamps, col_timestamps and ts_thresholds must share a type, got "
            f"{row_timestamps.dtype}, {col_timestamps.dtype}, {ts_thresholds.dtype}",
        )
        _require(
            ts_table.shape[0] in (1, num_heads) and ts_table.shape[1] == num_buckets + 1,
            f"ts_table must be [1 or {num_heads}, {num_buckets + 1}], got {tuple(ts_table.shape)}",
        )
    if pos_table is not None:
        _require(
            pos_table.dim() == 2 and pos_table.shape[0] in (1, num_heads) and pos_table.shape[1] % 2 == 1,
            f"pos_table must be [1 or {num_heads}, odd], got {tuple(pos_table.shape)}",
        )
    out = torch.empty((q.shape[0], num_heads, dv), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if mask_kind is None:
        is_general = (
            num_targets is not None or contextual_seq_lens is not None or contextual_seq_len > 0 or max_attn_len > 0
        )
        mask_kind = int(is_general)

    def pointer(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        # An empty tensor has a null data pointer: what the kernel takes for "absent".
        return torch.empty(0, dtype=dtype, device=q.device) if tensor is None else tensor.contiguous()

    time_type = torch.int64 if row_timestamps is None else row_timestamps.dtype
    tile = config or _config_of(q, v, pos_bias=pos_table is not None, time_bias=time_bias)
    grid = (q.shape[0] // tile.block_m + batch + 1, num_heads)
    q, k, v = _with_whole_rows(q), _with_whole_rows(k), _with_whole_rows(v)
    hstu_attention[grid](
        q,
        k,
        v,
        out,
        q_offsets.contiguous(),
        k_offsets.contiguous(),
        pointer(num_targets, torch.int32),
        pointer(contextual_seq_lens, torch.int32),
        pointer(scaling_seq_lens, torch.float32),
        pointer(row_timestamps, time_type),
        pointer(col_timestamps, time_type),
        pointer(pos_table, torch.float32),
        pointer(ts_table, torch.float32),
        pointer(ts_thresholds, time_type),
        pointer(k_cached, q.dtype),
        pointer(v_cached, q.dtype),
        pointer(cache_offsets, torch.int32),
        float(alpha),
        float(scaling_seq_len),
        q.shape[0],
        k.shape[0],
        num_cached,
        batch,
        num_heads,
        dqk,
        dv,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        0 if pos_table is None else (pos_table.shape[1] + 1) // 2,
        0 if pos_table is None else pos_table.shape[0],
        0 if ts_table is None else ts_table.shape[0],
        num_buckets,
        target_group_size,
        contextual_seq_len,
        max_attn_len,
        min_full_attn_seq_len,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_DQK=padded_dim(dqk),
        BLOCK_DV=padded_dim(dv),
        POS_BIAS=int(pos_table is not None),
        TIME_BIAS=int(time_bias),
        MASK_KIND=mask_kind,
        HAS_CACHE=int(cache_offsets is not None),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
