"""A CUDA graph: work of a stream, recorded once and launched as one. Level 3.

TensorRT's rule is that a context must not change between the recording of a graph and its last launch. One context
serves every shape here (TensorRT 8.5 has no second one for the same profile), so a graph must not read what the context
keeps on the host: shapes that a layer uses as numbers are copied from there to the device in every pass. `CudaGraph`
finds such copies and lets them read a snapshot instead. What it cannot detach it names in `bound_by`, and the session
replays such a graph only while its context still serves the same shapes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from hstu_compile.errors import EngineError
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime._recording_gate import GATE

# CUstreamCaptureMode: other threads may allocate meanwhile.
_CAPTURE_THREAD_LOCAL = 1
# CUgraphNodeType.
_KERNEL, _MEMCPY, _MEMSET, _EMPTY, _WAIT_EVENT, _EVENT_RECORD = 0, 1, 2, 5, 6, 7
_SELF_CONTAINED = frozenset({_KERNEL, _MEMSET, _EMPTY, _WAIT_EVENT, _EVENT_RECORD})
# CUmemorytype, and the attribute that asks for it.
_HOST, _UNIFIED = 1, 4
_ATTRIBUTE_MEMORY_TYPE = 2


class _End(ctypes.Structure):
    """One side of CUDA_MEMCPY3D."""

    _fields_ = (
        ("x_in_bytes", ctypes.c_size_t),
        ("y", ctypes.c_size_t),
        ("z", ctypes.c_size_t),
        ("lod", ctypes.c_size_t),
        ("memory_type", ctypes.c_uint),
        ("host", ctypes.c_void_p),
        ("device", ctypes.c_uint64),
        ("array", ctypes.c_void_p),
        ("reserved", ctypes.c_void_p),
        ("pitch", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class Memcpy3D(ctypes.Structure):
    """CUDA_MEMCPY3D of cuda.h (version 2 of its layout, the only one on 64 bits)."""

    _fields_ = (
        ("source", _End),
        ("target", _End),
        ("width_in_bytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
    )


class CudaGraph:
    """What `enqueue` puts on the driver's stream, ready to be launched. The driver's context is current in every call.

    Nothing that is recorded runs. The caller has run the same work before, so that nothing is loaded, allocated or
    decided for the first time here. No session of this process enqueues a pass meanwhile (`GATE`), so neither this nor
    `close` may be called where one does.

    Args:
        driver: whose stream is recorded; it has no work waiting.
        enqueue: puts the work on the stream, from this thread; it does not enter the gate.

    Attributes:
        num_nodes: kernels, copies and fills in the graph.
        bound_by: why the graph also depends on memory of the host that may change; "" if it does not.

    Raises:
        EngineError: HSTU-E404 if the work cannot be recorded, with the reason; or whatever `enqueue` raises. The stream
            is out of capture then.
    """

    def __init__(self, driver: CudaDriver, enqueue: Callable[[], None]) -> None:
        self._driver = driver
        self._executable = ctypes.c_void_p()
        self._snapshots: list[int] = []
        with GATE.recording():
            graph = _recorded(driver, enqueue)
            try:
                nodes = self._nodes(graph)
                self.num_nodes = len(nodes)
                self.bound_by = "; ".join(dict.fromkeys(filter(None, map(self._detach, nodes))))
                driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
            except BaseException:
                self._free_snapshots()
                raise
            finally:
                # The executable keeps what it needs of it.
                driver.call("cuGraphDestroy", graph)

    def _nodes(self, graph: ctypes.c_void_p) -> list[ctypes.c_void_p]:
        count = ctypes.c_size_t()
        self._driver.call("cuGraphGetNodes", graph, None, ctypes.byref(count))
        if not count.value:
            raise EngineError(
                "HSTU-E404",
                "nothing was recorded",
                "the engine put no work on the stream that it was given",
                "run without CUDA graphs: cuda_graphs=0",
            )
        nodes = (ctypes.c_void_p * count.value)()
        self._driver.call("cuGraphGetNodes", graph, nodes, ctypes.byref(count))
        return [ctypes.c_void_p(node) for node in nodes]

    def _detach(self, node: ctypes.c_void_p) -> str:
        """Let a node depend on nothing that the host changes; why it still does, or ""."""
        kind = ctypes.c_int()
        self._driver.call("cuGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value in _SELF_CONTAINED:
            return ""
        if kind.value != _MEMCPY:
            return f"a node of type {kind.value}"
        copy = Memcpy3D()
        self._driver.call("cuGraphMemcpyNodeGetParams", node, ctypes.byref(copy))
        if self._on_host(copy.target):
            return "a copy to the host"
        if not self._on_host(copy.source):
            return ""
        start = copy.source.host if copy.source.memory_type == _HOST else copy.source.device
        if copy.height > 1 or copy.depth > 1 or not start or not copy.width_in_bytes:
            return "a copy from the host that is no plain run of bytes"
        width = int(copy.width_in_bytes)
        snapshot = self._driver.allocate_pinned(width)
        self._snapshots.append(snapshot)
        ctypes.memmove(snapshot, start + copy.source.x_in_bytes, width)
        copy.source.memory_type, copy.source.host, copy.source.device = _HOST, snapshot, 0
        copy.source.x_in_bytes = 0
        if status := self._driver.status("cuGraphMemcpyNodeSetParams", node, ctypes.byref(copy)):
            return f"a copy from the host that cannot be changed (CUDA error {status})"
        return ""

    def _on_host(self, end: _End) -> bool:
        if end.memory_type != _UNIFIED:
            return bool(end.memory_type == _HOST)
        kind = ctypes.c_uint()
        status = self._driver.status(
            "cuPointerGetAttribute", ctypes.byref(kind), _ATTRIBUTE_MEMORY_TYPE, ctypes.c_uint64(end.device)
        )
        # The driver does not know memory that only the host has.
        return status != 0 or kind.value == _HOST

    def launch(self) -> None:
        """Enqueue all of it on the stream, as one."""
        self._driver.call("cuGraphLaunch", self._executable, self._driver.stream_handle)

    def close(self) -> None:
        """Free it; nothing of it is running. A second call does nothing."""
        if self._executable.value:
            with GATE.recording():
                self._driver.call("cuGraphExecDestroy", self._executable)
            self._executable = ctypes.c_void_p()
        self._free_snapshots()

    def _free_snapshots(self) -> None:
        while self._snapshots:
            self._driver.free_pinned(self._snapshots.pop())


def _recorded(driver: CudaDriver, enqueue: Callable[[], None]) -> ctypes.c_void_p:
    graph = ctypes.c_void_p()
    driver.call("cuStreamBeginCapture_v2", driver.stream_handle, _CAPTURE_THREAD_LOCAL)
    try:
        enqueue()
    except BaseException:
        # Also a capture that was invalidated has to be ended, or the stream would stay unusable.
        driver.status("cuStreamEndCapture", driver.stream_handle, ctypes.byref(graph))
        if graph.value:
            driver.status("cuGraphDestroy", graph)
        raise
    driver.call("cuStreamEndCapture", driver.stream_handle, ctypes.byref(graph))
    return graph
