"""libcuda on host memory. Asynchronous work is kept until its stream is synchronised, so that a missing wait shows."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

_ALIGNMENT = 256


class FakeCuda:
    """Addresses are those of ctypes buffers. Device work outside every live allocation fails the test.

    Attributes:
        allocations: calls of cuMemAlloc that succeeded.
        enqueued: asynchronous calls.
        contexts: retained primary contexts that were not released.
    """

    def __init__(self, most_bytes: int = 2**20) -> None:
        self.memory: dict[int, tuple[Any, int]] = {}
        self.allocations = self.enqueued = self.contexts = 0
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self._most_bytes = most_bytes
        self._next_stream = 1
        self._thread = threading.local()
        self._lock = threading.RLock()

    @property
    def depth(self) -> int:
        """Contexts on this thread's stack."""
        return getattr(self._thread, "depth", 0)

    def enqueue(self, stream: int, work: Callable[[], None]) -> int:
        with self._lock:
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

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802 - libcuda's name
        with self._lock:
            # As the driver does: nothing that was enqueued loses its memory.
            for stream in list(self.streams):
                self._finish(stream)
            del self.memory[address.value]
        return 0 if self.depth else 201

    def cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        return self._copy(target.value, source.value, size.value, stream.value, device=[target.value])

    def cuMemcpyDtoHAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        return self._copy(target.value, source.value, size.value, stream.value, device=[source.value])

    def cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> int:  # noqa: N802
        return self._copy(target.value, source.value, size.value, stream.value, device=[source.value, target.value])

    def _copy(self, target: int, source: int, size: int, stream: int, device: list[int]) -> int:
        for address in device:
            self.require_device(address, size)
        return self.enqueue(stream, lambda: ctypes.memmove(target, source, size) and None)

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802 - libcuda's name
        text._obj.value = b"out of memory"
        return 0
