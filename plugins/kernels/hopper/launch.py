"""PyTorch face of the Hopper attention kernel.

Level: kernels; imports torch. Semantics are those of ``hstu_attention_triton`` (../launch.py), which takes what this
refuses.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from hstu_compile.plugins.kernels.hopper.compile import KERNEL_NAME, HopperImage, compile_hopper
from hstu_compile.plugins.kernels.hopper.driver import (
    AttentionParameters,
    TensorMap,
    launch,
    load_kernel,
    tensor_map,
)
from hstu_compile.plugins.kernels.hopper.variants import (
    HOPPER_ARCH,
    MOST_TIME_HEADS,
    SPLITS,
    HopperVariant,
    Silu,
    block_dim_of,
    can_share,
    check_silu,
    chosen_split,
    resident_clusters,
)

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_ALIGNMENT = 16
#: Compiled kernels are kept here, in the user's cache folder as the plugin's are; None compiles each once a process.
cache_dir: Path | None = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hstu-compile" / "hopper"


def why_not(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *cached: torch.Tensor) -> str | None:
    """Return why the kernel cannot take these tensors; None if it can.

    Args:
        q: as in ``hstu_attention_hopper``; k and v too.
        cached: k_cached and v_cached, where there are any.
    """
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != divmod(HOPPER_ARCH, 10):
        return "the tensors are not on a GPU of compute capability 9.0"
    if q.dtype not in _DTYPES:
        return f"q, k and v are {q.dtype}; the kernel takes float16 and bfloat16"
    if block_dim_of(q.shape[2], v.shape[2]) is None:
        return f"head dims must be multiples of 8 up to 256, got {q.shape[2]} and {v.shape[2]}"
    if any(tensor.data_ptr() % _ALIGNMENT for tensor in (q, k, v, *cached)):
        return f"q, k, v and what is cached must start at multiples of {_ALIGNMENT} bytes"
    return None


@functools.cache
def _kernel(variant: HopperVariant, device: int) -> tuple[HopperImage, ctypes.c_void_p]:
    # A function belongs to the context of one device.
    image = compile_hopper([variant], cache_dir)[0]
    return image, load_kernel(image.data, KERNEL_NAME, image.shared_bytes)


def _new_progress(device: int) -> torch.Tensor:
    return torch.zeros(2, dtype=torch.int32, device=torch.device("cuda", device))


@functools.cache
def _kept_progress(device: int, stream: int) -> torch.Tensor:
    # The kernel leaves its counters at zero, so launches that follow one another share them; streams do not.
    del stream
    return _new_progress(device)


def _progress(device: int, stream: int) -> torch.Tensor:
    # What a graph records is not done yet: counters that are cleared in a graph are no use outside of it.
    return _new_progress(device) if torch.cuda.is_current_stream_capturing() else _kept_progress(device, stream)


def hstu_attention_hopper(
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
    split: int | None = None,
    silu: Silu = "fast",
) -> torch.Tensor:
    """Return HSTU attention [Lq, H, Dv] in q's dtype; one launch, no synchronisation, fit for a CUDA graph.

    Args:
        q: [Lq, H, Dqk] float16 or bfloat16, made contiguous if it is not; k [Lk, H, Dqk] and v [Lk, H, Dv] the same.
        q_offsets: [B + 1] int32; k_offsets likewise. Checked on the device: invalid offsets give zeros.
        num_targets: [B] int32; contextual_seq_lens [B] int32; scaling_seq_lens [B] float32. The last two replace the
            attributes.
        row_timestamps: [Lq] int64 or int32, seconds; col_timestamps [Lc + Lk], of the joined keys, and ts_thresholds
            [num_buckets] the same type; ts_table [1 or H, num_buckets + 1] float32, of at most 8 heads. All four or
            none.
        pos_table: [1 or H, 2 * pos_table_len - 1] float32.
        k_cached: [Lc, H, Dqk] like k -- keys in front of those of k; v_cached [Lc, H, Dv] and cache_offsets [B + 1]
            int32 with it. All three or none.
        alpha: multiplier of the products; the other attributes as in the contract.
        split: blocks that share a tile of query rows, one of ``SPLITS``; None chooses by the shapes.
        silu: "fast" or "accurate"; silu.cuh has the error of each.

    Raises:
        ValueError: tensors that the kernel does not take, in the words of ``why_not``; no such silu or split.
        RuntimeError: the kernel does not compile, or the driver refuses it.
    """
    check_silu(silu)
    if split not in (None, *SPLITS):
        raise ValueError(f"hstu_attention_hopper: split must be one of {SPLITS} or None, got {split}")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    cache = (k_cached, v_cached, cache_offsets)
    has_cache = k_cached is not None
    if any((tensor is not None) != has_cache for tensor in cache):
        raise ValueError("hstu_attention_hopper: k_cached, v_cached and cache_offsets go together")
    # Without cached rows there is nothing to copy, but a tensor map wants an address.
    lc = 0 if k_cached is None else k_cached.shape[0]
    cached_keys, cached_values = (tensor.contiguous() if tensor is not None and lc else q for tensor in cache[:2])
    reason = why_not(q, k, v, *((cached_keys, cached_values) if lc else ()))
    if reason is not None:
        raise ValueError(f"hstu_attention_hopper: {reason}. Fix: call hstu_attention_triton, which takes them")
    (lq, heads, dqk), lk, dv = q.shape, k.shape[0], v.shape[2]
    if tuple(k.shape[1:]) != (heads, dqk) or tuple(v.shape[:2]) != (lk, heads):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"hstu_attention_hopper: shapes do not agree: {shapes}")
    for name, tensor, shape in (("k_cached", k_cached, (lc, heads, dqk)), ("v_cached", v_cached, (lc, heads, dv))):
        if tensor is not None and (
            tuple(tensor.shape) != shape or tensor.dtype != q.dtype or tensor.device != q.device
        ):
            raise ValueError(
                f"hstu_attention_hopper: {name} must be {shape} {q.dtype} on {q.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    batch = q_offsets.numel() - 1
    times = (row_timestamps, col_timestamps, ts_table, ts_thresholds)
    if any(tensor is None for tensor in times) and any(tensor is not None for tensor in times):
        raise ValueError(
            "hstu_attention_hopper: row_timestamps, col_timestamps, ts_table and ts_thresholds go together"
        )
    time_type = torch.int64 if row_timestamps is None else row_timestamps.dtype
    time_heads = 0 if ts_table is None else ts_table.shape[0]
    buckets = 0 if ts_thresholds is None else ts_thresholds.numel()
    pos_heads, entries = (0, 1) if pos_table is None else tuple(pos_table.shape)
    if time_type not in (torch.int64, torch.int32) or time_heads not in (0, 1, heads) or time_heads > MOST_TIME_HEADS:
        raise ValueError(
            f"hstu_attention_hopper: timestamps must be int64 or int32 and ts_table's heads 1 or {heads}, at most "
            f"{MOST_TIME_HEADS}; got {time_type} and {time_heads}. Fix: for more heads, call hstu_attention_triton"
        )
    if pos_heads not in (0, 1, heads) or entries % 2 == 0:
        raise ValueError(f"hstu_attention_hopper: pos_table must be [1 or {heads}, odd], got [{pos_heads}, {entries}]")
    for name, tensor, dtype, size in (
        ("q_offsets", q_offsets, torch.int32, batch + 1),
        ("k_offsets", k_offsets, torch.int32, batch + 1),
        ("cache_offsets", cache_offsets, torch.int32, batch + 1),
        ("num_targets", num_targets, torch.int32, batch),
        ("contextual_seq_lens", contextual_seq_lens, torch.int32, batch),
        ("scaling_seq_lens", scaling_seq_lens, torch.float32, batch),
        ("row_timestamps", row_timestamps, time_type, lq),
        ("col_timestamps", col_timestamps, time_type, lc + lk),
        ("ts_thresholds", ts_thresholds, time_type, buckets),
        ("ts_table", ts_table, torch.float32, time_heads * (buckets + 1)),
        ("pos_table", pos_table, torch.float32, pos_heads * entries),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.numel() != size or tensor.device != q.device):
            raise ValueError(
                f"hstu_attention_hopper: {name} must be [{size}] {dtype} on {q.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    out = torch.empty((lq, heads, dv), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    is_plain = num_targets is None and contextual_seq_lens is None and contextual_seq_len == 0 and max_attn_len == 0
    dim = block_dim_of(dqk, dv)
    assert dim is not None
    dtype_name = _DTYPES[q.dtype]
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    bits = 0 if row_timestamps is None else time_type.itemsize * 8
    has_bias = bits > 0 or pos_table is not None
    can_split = can_share(dim, is_accurate=silu == "accurate", has_bias=has_bias)
    chosen = split or (chosen_split(dim, lq, lc + lk, batch, heads, multiprocessors) if can_split else 1)
    variant = HopperVariant(
        dtype_name, dim, is_plain, chosen > 1, pos_table is not None, bits, silu == "accurate", has_cache
    )
    image, function = _kernel(variant, q.device.index)
    stream = torch.cuda.current_stream(q.device).cuda_stream

    # A copy that were freed before the launch could be what the next allocation is given.
    copies: list[torch.Tensor] = []

    def address(tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        copies.append(tensor.contiguous())
        return copies[-1].data_ptr()

    parameters = AttentionParameters(
        out=out.data_ptr(),
        q_offsets=address(q_offsets),
        k_offsets=address(k_offsets),
        num_targets=address(num_targets),
        contextual_seq_lens=address(contextual_seq_lens),
        scaling_seq_lens=address(scaling_seq_lens),
        progress=_progress(q.device.index, stream).data_ptr(),
        alpha=alpha,
        scaling_seq_len=scaling_seq_len,
        lq=lq,
        lk=lk,
        batch=batch,
        heads=heads,
        dv=dv,
        target_group_size=target_group_size,
        contextual_seq_len=contextual_seq_len,
        max_attn_len=max_attn_len,
        min_full_attn_seq_len=min_full_attn_seq_len,
        row_timestamps=address(row_timestamps),
        col_timestamps=address(col_timestamps),
        ts_thresholds=address(ts_thresholds),
        ts_table=address(ts_table),
        pos_table=address(pos_table),
        num_buckets=buckets,
        ts_heads=time_heads,
        pos_table_len=(entries + 1) // 2,
        pos_heads=pos_heads,
        cache_offsets=address(cache_offsets),
        lc=lc,
    )
    # Without keys there is nothing to copy, but a tensor map wants an address.
    keys, values = (k, v) if lk else (q, q)
    queries_map = tensor_map(q.data_ptr(), dtype_name, (lq, heads, dqk), image.block_m)

    def maps(k: torch.Tensor, v: torch.Tensor, rows: int) -> tuple[TensorMap, TensorMap]:
        shapes = ((k, (rows, heads, dqk)), (v, (rows, heads, dv)))
        first, second = (tensor_map(x.data_ptr(), dtype_name, shape, image.tile.block_n) for x, shape in shapes)
        return first, second

    cached_maps = maps(cached_keys, cached_values, lc) if has_cache else ()
    arguments = (queries_map, *maps(keys, values, lk), parameters, *cached_maps)
    most_tiles = (lq // image.block_m + batch) * heads
    clusters = max(1, min(resident_clusters(chosen, multiprocessors), most_tiles))
    launch(function, clusters * chosen, chosen, image.threads, image.shared_bytes, stream, arguments)
    return out
