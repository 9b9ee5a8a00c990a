"""Times of the end-to-end benchmark, for torch's stream and for a driver's: the L2 cache is cold before each call.

Device time is between two events around a call; a flush of the L2 cache before it, which takes the GPU longer than a
graph's launch takes the host, lets the host run ahead. What the host enqueues kernel by kernel has its waits inside.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from device_timing import summary_of

if TYPE_CHECKING:
    from hstu_compile.runtime._cuda import CudaDriver

#: Larger than any GPU's L2 cache.
FLUSH_BYTES = 256 * 2**20
#: Milliseconds, and the least and most calls.
WARM_UP_MS, MEASURE_MS, FEWEST, MOST = 60.0, 200.0, 20, 200

Row = dict[str, Any]
Samples = Callable[[int], list[float]]


def count_for(single_ms: float, budget_ms: float, fewest: int = FEWEST) -> int:
    """How often to call what takes so long, within its limits."""
    return int(min(MOST, max(fewest, budget_ms / max(single_ms, 1e-3))))


def timed(samples: Samples) -> Row:
    """Warm up, then measure for a fixed time: median_ms, p90_ms, p99_ms, cv, repeats."""
    single = statistics.median(samples(3))
    samples(count_for(single, WARM_UP_MS, fewest=3))
    measured = samples(count_for(single, MEASURE_MS))
    ordered = sorted(measured)
    return summary_of(measured) | {"p99_ms": ordered[max(0, math.ceil(0.99 * len(ordered)) - 1)]}


def call_times(call: Callable[[], Any]) -> Row:
    """call_median_ms and call_p90_ms: host arrays to host arrays, by the host's clock."""

    def samples(count: int) -> list[float]:
        measured = []
        for _ in range(count):
            started = time.perf_counter()
            call()
            measured.append(1e3 * (time.perf_counter() - started))
        return measured

    summary = timed(samples)
    return {"call_median_ms": summary["median_ms"], "call_p90_ms": summary["p90_ms"]}


def host_samples(run: Callable[[], Any]) -> Samples:
    """Milliseconds of calls on a CPU, where there are no events."""

    def samples(count: int) -> list[float]:
        measured = []
        for _ in range(count):
            started = time.perf_counter()
            run()
            measured.append(1e3 * (time.perf_counter() - started))
        return measured

    return samples


class TorchClock:
    """Device times on torch's current stream.

    Args:
        device: the GPU, or the CPU to try the program without one.
    """

    def __init__(self, device: Any) -> None:
        import torch

        self._is_gpu = device.type == "cuda"
        self._flushed = torch.empty(FLUSH_BYTES if self._is_gpu else 0, dtype=torch.uint8, device=device)

    def samples(self, run: Callable[[], Any]) -> Samples:
        """How to measure a call so many times."""
        import torch

        if not self._is_gpu:
            return host_samples(run)

        def measure(count: int) -> list[float]:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
            for start, end in zip(events[::2], events[1::2], strict=True):
                self._flushed.zero_()
                start.record()
                run()
                end.record()
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in zip(events[::2], events[1::2], strict=True)]

        return measure

    def gemm_tflops(self, dtype: Any) -> float | None:
        """What an 8192 x 8192 x 8192 product reaches here and now, which brings the GPU's clocks up. None on a CPU."""
        import torch

        if not self._is_gpu:
            return None
        n = 8192
        left, right = (torch.randn((n, n), dtype=dtype, device="cuda") for _ in range(2))
        out = torch.empty_like(left)
        samples = self.samples(lambda: torch.mm(left, right, out=out))
        samples(20)
        return 2.0 * n**3 / statistics.median(samples(20)) / 1e9


class DriverClock:
    """Device times on a driver's stream, without torch.

    Args:
        driver: whose stream.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        with driver.current():
            self._flushed = driver.allocate(FLUSH_BYTES)

    def samples(self, enqueue: Callable[[], Any]) -> Samples:
        """How to measure what a function enqueues so many times."""
        driver = self._driver

        def measure(count: int) -> list[float]:
            with driver.current():
                events = [ctypes.c_void_p() for _ in range(2 * count)]
                for event in events:
                    driver.call("cuEventCreate", ctypes.byref(event), 0)
                try:
                    for start, end in zip(events[::2], events[1::2], strict=True):
                        driver.fill(self._flushed, 0, FLUSH_BYTES)
                        driver.call("cuEventRecord", start, driver.stream_handle)
                        enqueue()
                        driver.call("cuEventRecord", end, driver.stream_handle)
                    driver.synchronise()
                    return [self._elapsed(*pair) for pair in zip(events[::2], events[1::2], strict=True)]
                finally:
                    for event in events:
                        driver.call("cuEventDestroy_v2", event)

        return measure

    def _elapsed(self, start: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        elapsed = ctypes.c_float()
        self._driver.call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return float(elapsed.value)

    def close(self) -> None:
        """Free its memory."""
        with self._driver.current():
            self._driver.free(self._flushed)
