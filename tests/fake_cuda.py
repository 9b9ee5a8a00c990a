"""libcuda on host memory. Asynchronous work is kept until its stream is synchronised, so that a missing wait shows."""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from hstu_compile.runtime._cuda_graph import Memcpy3D

_ALIGNMENT = 256


@dataclasses.dataclass
class Node:
    """A node of a graph: its CUgraphNodeType, what it does, and its parameters if it is a copy."""

    kind: int
    work: Callable[[], None]
    copy: Memcpy3D | None = None


class FakeCuda:
    """Addresses are those of ctypes buffers. Device work outside every live allocation fails the test.

    Attributes:
        allocations: calls of cuMemAlloc that succeeded.
        enqueued: asynchronous calls.
        uploaded_bytes: by copies from the host.
        contexts: retained primary contexts that were not released.
        pinned: page-locked host memory.
        recording: nodes of streams that are being captured.
        graphs: graphs that were not destroyed.
        executables: instantiated graphs that were not destroyed.
        launches: of graphs.
        capture_status: what ending a capture says; 0 is success.
        graph_bytes: device memory that an instantiated graph takes.
    """

    def __init__(self, most_bytes: int = 2**20) -> None:
        self.memory: dict[int, tuple[Any, int]] = {}
        self.allocations = self.enqueued = self.contexts = self.uploaded_bytes = 0
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.pinned: dict[int, Any] = {}
        self.recording: dict[int, list[Node]] = {}
        self.recorders: dict[int, int] = {}
        self.graphs: dict[int, list[Node]] = {}
        self.executables: dict[int, list[Node]] = {}
        self.launches = 0
        self.capture_status = 0
        self.graph_bytes = 0
        self._most_bytes = most_bytes
        self._next_handle = 1000
        self._next_stream = 1
        self._thread = threading.local()
        self._lock = threading.RLock()

    @property
    def depth(self) -> int:
        """Contexts on this thread's stack."""
        return getattr(self._thread, "depth", 0)

    def enqueue(self, stream: int, work: Callable[[], None], copy: Memcpy3D | None = None) -> int:
        """Add work; `copy` describes it if it is a copy, for a capture's sake."""
        with self._lock:
            if stream in self.recording:
                assert self.recorders[stream] == threading.get_ident(), "another thread's work entered a capture"
                self.recording[stream].append(Node(0, work) if copy is None else Node(1, work, copy))
                return 0 if self.depth else 201
            self.enqueued += 1
            self.streams[stream].append(work)
        return 0 if self.depth else 201

    def require_device(self, address: int, size: int) -> None:
        inside = any(a <= address and address + size <= a + held for a, (_, held) in self.memory.items())
        assert inside, f"{size} bytes at {address:#x} are outside every allocation"

    def _finish(self, stream: int) -> None:
        with self._lock:
            pending, self.streams[stream] = self.streams[stream], []
            for work in pending:
                work()

    def cuInit(self, flags: int) -> int:  # noqa: N802 - libcuda's name
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802 - libcuda's name
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802 - libcuda's name
        self.contexts += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:  # noqa: N802 - libcuda's name
        self.contexts -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802 - libcuda's name
        self._thread.depth = self.depth + 1
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802 - libcuda's name
        self._thread.depth = self.depth - 1
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:  # noqa: N802 - libcuda's name
        with self._lock:
            stream._obj.value = self._next_stream
            self.streams[self._next_stream] = []
            self._next_stream += 1
        return 0 if self.depth else 201

    def cuStreamDestroy_v2(self, stream: Any) -> int:  # noqa: N802 - libcuda's name
        self._finish(stream.value)
        del self.streams[stream.value]
        return 0 if self.depth else 201

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802 - libcuda's name
        if stream.value in self.recording:
            return 900
        self._finish(stream.value)
        return 0 if self.depth else 201

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802 - libcuda's name
        if size.value > self._most_bytes:
            return 2
        buffer = ctypes.create_string_buffer(size.value + _ALIGNMENT)
        start = -(-ctypes.addressof(buffer) // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            address._obj.value = start
            self.memory[start] = (buffer, size.value)
            self.allocations += 1
        return 0 if self.depth else 201

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802 - libcuda's name
        total._obj.value = 2**40
        free._obj.value = 2**40 - self.graph_bytes * len(self.executables)
        return 0 if self.depth else 201

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802 - libcuda's name
        with self._lock:
            # As the driver does: nothing that was enqueued loses its memory.
            for stream in list(self.streams):
                self._finish(stream)
            del self.memory[address.value]
        return 0 if self.depth else 201

    def cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        self.uploaded_bytes += size.value
        return self._copy(target.value, source.value, size.value, stream.value, device=[target.value])

    def cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        return self._copy(target.value, source.value, size.value, stream.value, device=[source.value])

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        return self._copy(target.value, source.value, size.value, stream.value, device=[source.value, target.value])

    def cuMemAllocHost_v2(self, address: Any, size: Any) -> int:  # noqa: N802 - libcuda's name
        buffer = ctypes.create_string_buffer(size.value)
        with self._lock:
            address._obj.value = ctypes.addressof(buffer)
            self.pinned[ctypes.addressof(buffer)] = buffer
        return 0 if self.depth else 201

    def cuMemFreeHost(self, address: Any) -> int:  # noqa: N802 - libcuda's name
        with self._lock:
            for stream in list(self.streams):
                self._finish(stream)
            del self.pinned[address.value]
        return 0 if self.depth else 201

    def cuMemsetD8Async(self, address: Any, value: Any, size: Any, stream: Any) -> int:  # noqa: N802
        self.require_device(address.value, size.value)
        start, byte, length = address.value, value.value, size.value
        return self.enqueue(stream.value, lambda: ctypes.memset(start, byte, length) and None)

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:  # noqa: N802 - libcuda's name
        assert mode == 1, "a capture that forbids other threads to allocate"
        assert not self.streams[stream.value], "work was waiting when the capture began"
        self.recording[stream.value] = []
        self.recorders[stream.value] = threading.get_ident()
        return 0 if self.depth else 201

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:  # noqa: N802 - libcuda's name
        nodes = self.recording.pop(stream.value)
        if self.capture_status:
            return self.capture_status
        graph._obj.value = self._handle()
        self.graphs[graph._obj.value] = nodes
        return 0 if self.depth else 201

    def cuGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> int:  # noqa: N802 - libcuda's name
        held = self.graphs[graph.value]
        if nodes is not None:
            assert len(nodes) == count._obj.value
            for index in range(len(nodes)):
                # A handle is never null.
                nodes[index] = 1 + index
            self._inspected = held
        count._obj.value = len(held)
        return 0

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:  # noqa: N802 - libcuda's name
        kind._obj.value = self._inspected[node.value - 1].kind
        return 0

    def cuGraphMemcpyNodeGetParams(self, node: Any, copy: Any) -> int:  # noqa: N802 - libcuda's name
        described = self._inspected[node.value - 1].copy
        assert described is not None
        ctypes.memmove(ctypes.addressof(copy._obj), ctypes.addressof(described), ctypes.sizeof(Memcpy3D))
        return 0

    def cuGraphMemcpyNodeSetParams(self, node: Any, copy: Any) -> int:  # noqa: N802 - libcuda's name
        changed = Memcpy3D()
        ctypes.memmove(ctypes.addressof(changed), ctypes.addressof(copy._obj), ctypes.sizeof(Memcpy3D))
        source, target, width = changed.source.host, changed.target.device, changed.width_in_bytes
        assert changed.source.memory_type == 1
        assert changed.source.x_in_bytes == 0
        place = self._inspected[node.value - 1]
        place.copy, place.work = changed, lambda: ctypes.memmove(target, source, width) and None
        return 0

    def cuPointerGetAttribute(self, value: Any, attribute: int, address: Any) -> int:  # noqa: N802
        assert attribute == 2
        if any(start <= address.value < start + size for start, (_, size) in self.memory.items()):
            value._obj.value = 2
            return 0
        return 1

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        executable._obj.value = self._handle()
        self.executables[executable._obj.value] = list(self.graphs[graph.value])
        return 0 if self.depth else 201

    def cuGraphDestroy(self, graph: Any) -> int:  # noqa: N802 - libcuda's name
        del self.graphs[graph.value]
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:  # noqa: N802 - libcuda's name
        del self.executables[executable.value]
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:  # noqa: N802 - libcuda's name
        self.launches += 1
        for node in self.executables[executable.value]:
            self.enqueue(stream.value, node.work)
        return 0 if self.depth else 201

    def _handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    def _copy(self, target: int, source: int, size: int, stream: int, device: list[int]) -> int:
        for address in device:
            self.require_device(address, size)
        return self.enqueue(stream, lambda: ctypes.memmove(target, source, size) and None)

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802 - libcuda's name
        text._obj.value = b"out of memory"
        return 0
