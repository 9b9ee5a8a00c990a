"""Synthetic traces of what runs on a GPU, as torch.profiler writes them."""

from __future__ import annotations

from typing import Any

from hstu_compile.kernel_timeline import Event


def event(name: str, start: float, duration: float, category: str = "kernel") -> Event:
    """What ran on the GPU, times in microseconds."""
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def trace_of(*calls: list[Event]) -> dict[str, Any]:
    """A Chrome trace of calls, and something of the host."""
    host = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.0, "dur": 5.0}
    return {"traceEvents": [host, *(each for call in calls for each in call)]}


def call_at(start: float, slower: float = 0.0) -> list[Event]:
    """Four launches of three kernels in 46 us, of which 4 are gaps and 6 an overlap."""
    return [
        event("nvjet_hsh_128x256", start, 10.0 + slower),
        event("hstu_attention_sm90", start + 14.0 + slower, 20.0),
        event("nvjet_hsh_128x256", start + 34.0 + slower, 10.0),
        # On another stream, at the same time.
        event("triton_poi_fused_silu", start + 40.0 + slower, 6.0),
    ]
