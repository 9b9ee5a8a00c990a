"""Device time and memory of a TensorRT engine, by CUDA events and without torch."""

from __future__ import annotations

import ctypes
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from hstu_compile.runtime._cuda import CudaDriver, DeviceBuffers, host_array
from hstu_compile.runtime._cuda_graph import CudaGraph
from hstu_compile.runtime._feeds import matched_feeds
from hstu_compile.runtime.tensorrt_session import TensorRtSession
from hstu_compile.tensorrt_api import TensorRtApi

WARM_UP_MS = 200.0
MEASURE_MS = 500.0
FEWEST, MOST = 20, 500
_MIB = 2.0**20


def repeats_for(single_ms: float, budget_ms: float) -> int:
    """How often to run something that takes `single_ms` to fill `budget_ms`, within [FEWEST, MOST]."""
    return int(min(MOST, max(FEWEST, budget_ms / max(single_ms, 1e-3))))


def summary_of(samples_ms: list[float]) -> dict[str, Any]:
    """Median, p90 and coefficient of variation of device times."""
    ordered = sorted(samples_ms)
    return {
        "median_ms": statistics.median(ordered),
        "p90_ms": ordered[math.ceil(0.9 * len(ordered)) - 1],
        "cv": statistics.pstdev(ordered) / statistics.fmean(ordered),
        "repeats": len(ordered),
    }


class EngineRunner:
    """One engine with its own context; inputs stay on the device between runs.

    Args:
        api: the backend.
        plan: serialised engine.
        plugin_library: library with the plugin, or None.

    Raises:
        RuntimeError: if the engine or its context cannot be created; the message ends with TensorRT's log.
    """

    def __init__(self, api: TensorRtApi, plan: bytes, plugin_library: Path | None) -> None:
        # Opening a session first names the tensors and turns every refusal into a message of ours.
        with TensorRtSession(api, plan, plugin_library) as session:
            self._inputs, self._outputs = session.inputs, session.outputs
            self._most_rows = {spec.name: session.most_rows(spec.name) for spec in session.inputs}
        self._lib = ctypes.CDLL("libcuda.so.1")
        self._driver = CudaDriver()
        self._buffers = DeviceBuffers(self._driver)
        self._hosts: dict[str, NDArray[Any]] = {}
        self._graph: CudaGraph | None = None
        with self._driver.current(), api.capture() as log:
            self._free_before = self._free_bytes()
            self._runtime = api.trt.Runtime(api.logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            self._context = None if self._engine is None else self._engine.create_execution_context()
            if self._context is None:
                raise RuntimeError(f"the engine's context cannot be created: {log.tail()}")
        self._api = api

    def _check(self, status: int, call: str) -> None:
        if status:
            raise RuntimeError(f"{call} failed with CUDA error {status}")

    def _free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._check(self._lib.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "cuMemGetInfo")
        return int(free.value)

    def set_inputs(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Upload one request and give every output a buffer of NaN bits, so that an unwritten element shows."""
        with self._driver.current(), self._api.capture() as log:
            self._drop_graph()
            for name, array in matched_feeds(feeds, self._inputs).items():
                address = self._buffers.address(name, array.nbytes)
                self._driver.upload(array, address)
                taken = self._context.set_input_shape(name, array.shape)
                if not taken or not self._context.set_tensor_address(name, address):
                    raise RuntimeError(f"TensorRT refused {name} of shape {list(array.shape)}: {log.tail()}")
                self._driver.synchronise()
            for spec in self._outputs:
                host = host_array(tuple(map(int, self._context.get_tensor_shape(spec.name))), spec.dtype)
                address = self._buffers.address(spec.name, host.nbytes)
                if host.nbytes:
                    self._driver.fill(address, 0xFF, host.nbytes)
                if not self._context.set_tensor_address(spec.name, address):
                    raise RuntimeError(f"TensorRT refused the buffer of {spec.name}: {log.tail()}")
                self._hosts[spec.name] = host

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._driver.stream):
            raise RuntimeError("TensorRT could not enqueue the engine")

    def _enqueue(self) -> None:
        if self._graph is None:
            self._execute()
        else:
            self._graph.launch()

    def record(self) -> int:
        """Run and time a CUDA graph from now on, until other inputs are set; how many nodes it has.

        Raises:
            EngineError: if the engine cannot be recorded.
        """
        with self._driver.current(), self._api.capture():
            self._drop_graph()
            self._execute()
            self._driver.synchronise()
            self._graph = CudaGraph(self._driver, self._execute)
            return self._graph.num_nodes

    def _drop_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            graph.close()

    def run(self) -> dict[str, NDArray[Any]]:
        """Fill the outputs with NaN bits, run once and copy them back."""
        with self._driver.current(), self._api.capture() as log:
            for name, host in self._hosts.items():
                if host.nbytes:
                    self._driver.fill(self._buffers.address(name, host.nbytes), 0xFF, host.nbytes)
            try:
                self._enqueue()
            except RuntimeError as error:
                raise RuntimeError(f"{error}: {log.tail()}") from error
            for name, host in self._hosts.items():
                if host.nbytes:
                    self._driver.download(self._buffers.address(name, host.nbytes), host)
            self._driver.synchronise()
        return dict(self._hosts)

    def time(self) -> dict[str, Any]:
        """Device time of one run (median_ms, p90_ms, cv, repeats): events around each enqueue, no wait between them."""
        return self._timed(self._enqueue)

    def most_rows(self, name: str) -> int:
        """Most entries of an input's first axis."""
        return self._most_rows[name]

    def time_copies(self, sizes: Sequence[int]) -> dict[str, Any]:
        """Device time of copying so many bytes each within the device, as `time` gives it."""
        with self._driver.current():
            sources = [self._buffers.address(f"source {number}", size) for number, size in enumerate(sizes)]
            targets = [self._buffers.address(f"target {number}", size) for number, size in enumerate(sizes)]

        def enqueue() -> None:
            for source, target, size in zip(sources, targets, sizes, strict=True):
                self._driver.copy(source, target, size)

        return self._timed(enqueue)

    def _timed(self, enqueue: Callable[[], None]) -> dict[str, Any]:
        with self._driver.current():
            single = statistics.median(self._samples(5, enqueue))
            self._samples(repeats_for(single, WARM_UP_MS), enqueue)
            return summary_of(self._samples(repeats_for(single, MEASURE_MS), enqueue))

    def _samples(self, count: int, enqueue: Callable[[], None]) -> list[float]:
        stream = ctypes.c_void_p(self._driver.stream)
        events = [ctypes.c_void_p() for _ in range(2 * count)]
        for event in events:
            self._check(self._lib.cuEventCreate(ctypes.byref(event), 0), "cuEventCreate")
        try:
            for start, end in zip(events[::2], events[1::2], strict=True):
                self._check(self._lib.cuEventRecord(start, stream), "cuEventRecord")
                enqueue()
                self._check(self._lib.cuEventRecord(end, stream), "cuEventRecord")
            self._driver.synchronise()
            samples = []
            for start, end in zip(events[::2], events[1::2], strict=True):
                elapsed = ctypes.c_float()
                self._check(self._lib.cuEventElapsedTime(ctypes.byref(elapsed), start, end), "cuEventElapsedTime")
                samples.append(float(elapsed.value))
            return samples
        finally:
            for event in events:
                self._lib.cuEventDestroy_v2(event)

    def memory(self) -> dict[str, float]:
        """MiB beyond the inputs: peak_mib = activations and workspace + outputs; used_mib = what the driver gave out.

        used_mib also holds inputs, weights and loaded kernels; it is cuMemGetInfo's difference since before the engine.
        """
        # TensorRT-RTX has the newer name only.
        newer = hasattr(self._engine, "device_memory_size_v2")
        scratch = self._engine.device_memory_size_v2 if newer else self._engine.device_memory_size
        outputs = sum(host.nbytes for host in self._hosts.values())
        with self._driver.current():
            used = self._free_before - self._free_bytes()
        return {"peak_mib": (scratch + outputs) / _MIB, "used_mib": used / _MIB}

    def close(self) -> None:
        """Free everything."""
        with self._driver.current():
            self._drop_graph()
            self._context = self._engine = self._runtime = None
            self._buffers.close()
        self._driver.close()

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
