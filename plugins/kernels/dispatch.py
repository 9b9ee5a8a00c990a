"""Which kernel computes HSTU attention on a GPU for PyTorch. Level: kernels; imports torch."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from hstu_compile.plugins.kernels.hopper.compile import usable_nvcc
from hstu_compile.plugins.kernels.hopper.launch import hstu_attention_hopper, why_not
from hstu_compile.plugins.kernels.hopper.variants import MOST_TIME_HEADS, Silu, check_silu
from hstu_compile.plugins.kernels.launch import hstu_attention_triton


@functools.cache
def _can_compile() -> bool:
    """Whether the Hopper kernel can be compiled here; says why not, once."""
    try:
        usable_nvcc()
    except RuntimeError as error:
        warnings.warn(f"HSTU attention runs its portable kernel, slower on this GPU: {error}", stacklevel=2)
        return False
    return True


def hstu_attention_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    *,
    ts_table: torch.Tensor | None = None,
    silu: Silu = "fast",
    k_cached: torch.Tensor | None = None,
    v_cached: torch.Tensor | None = None,
    cache_offsets: torch.Tensor | None = None,
    **given: Any,
) -> torch.Tensor:
    """Return HSTU attention [Lq, H, Dv] in q's dtype, by the Hopper kernel where it takes the tensors.

    Args:
        q: as in ``hstu_attention_triton``, like everything else.
        k: likewise; v, q_offsets, k_offsets too.
        ts_table: [1 or H, num_buckets + 1] float32.
        silu: error that SiLU may have; the portable kernel's is always accurate.
        k_cached: [Lc, H, Dqk] like k; v_cached [Lc, H, Dv] and cache_offsets [B + 1] int32 with it.
        given: the other inputs and the attributes.

    Raises:
        ValueError: no such silu; or what the chosen kernel refuses.
    """
    check_silu(silu)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    has_few_tables = ts_table is None or ts_table.shape[0] <= MOST_TIME_HEADS
    cache = {"k_cached": k_cached, "v_cached": v_cached, "cache_offsets": cache_offsets}
    present: dict[str, Any] = {name: tensor for name, tensor in cache.items() if tensor is not None}
    present_rows = (x for x in (k_cached, v_cached) if x is not None and x.shape[0] > 0)
    fits = why_not(q, k, v, *(x.contiguous() for x in present_rows)) is None and has_few_tables
    inputs = (q, k, v, q_offsets, k_offsets)
    if fits and _can_compile():
        return hstu_attention_hopper(*inputs, ts_table=ts_table, silu=silu, **(present | given))
    return hstu_attention_triton(*inputs, ts_table=ts_table, **(present | given))
