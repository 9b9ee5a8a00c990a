"""The few CUDA driver calls that a session needs, by ctypes over libcuda.

The driver library is wherever a GPU is, unlike libcudart, which lives inside whichever wheel brought it. TensorRT uses
the device's primary context; so does this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.errors import EngineError
from hstu_compile.runtime._bfloat16 import storage_dtype

_NON_BLOCKING_STREAM = 1


class CudaDriver:
    """One device's primary context and one stream.

    Args:
        library: libcuda as ctypes sees it; None loads it.
        device: ordinal among the visible devices.

    Raises:
        EngineError: HSTU-E401 without a driver or device.
    """

    def __init__(self, library: Any = None, device: int = 0) -> None:
        self._ordinal = device
        try:
            self._lib = ctypes.CDLL("libcuda.so.1") if library is None else library
        except OSError as error:
            raise _no_gpu(str(error)) from error
        self._context, self._device = ctypes.c_void_p(), ctypes.c_int()
        self._stream = ctypes.c_void_p()
        for call, arguments in (
            ("cuInit", (0,)),
            ("cuDeviceGet", (ctypes.byref(self._device), device)),
            ("cuDevicePrimaryCtxRetain", (ctypes.byref(self._context), self._device)),
        ):
            if status := self.status(call, *arguments):
                raise _no_gpu(f"{call}: {self._message(status)}")
        with self.current():
            self.call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING_STREAM)

    def _message(self, status: int) -> str:
        text = ctypes.c_char_p()
        known = self._lib.cuGetErrorString(status, ctypes.byref(text)) == 0 and text.value
        return f"{text.value.decode()} ({status})" if known and text.value else f"CUDA error {status}"

    def status(self, name: str, *arguments: Any) -> int:
        """Call the driver; its status, 0 for success, as it is."""
        return int(getattr(self._lib, name)(*arguments))

    def call(self, name: str, *arguments: Any) -> None:
        """Call the driver, whose context is current.

        Raises:
            EngineError: HSTU-E404 with the driver's words if it does not return success, or has no such call.
        """
        try:
            status = self.status(name, *arguments)
        except AttributeError as error:
            raise EngineError(
                "HSTU-E404", f"the driver has no CUDA call {name}", str(error), "update the driver", {"call": name}
            ) from error
        if status:
            raise EngineError(
                "HSTU-E404",
                f"the CUDA call {name} failed",
                self._message(status),
                "free GPU memory (a smaller batch, another process), or check the driver with `hstu-compile env`",
                {"call": name, "status": status},
            )

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current on this thread; TensorRT and every method below need it."""
        self.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    @property
    def stream_handle(self) -> ctypes.c_void_p:
        """Handle of the stream, as `call` takes it."""
        return self._stream

    @property
    def stream(self) -> int:
        """Handle of the stream, as TensorRT takes it."""
        return int(self._stream.value or 0)

    def allocate(self, size_bytes: int) -> int:
        """Device memory; an address aligned to at least 256 bytes. Freed by `free`."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        return int(address.value)

    def free(self, address: int) -> None:
        """Give memory of `allocate` back."""
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def free_bytes(self) -> int:
        """Device memory that nobody has taken."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return int(free.value)

    def allocate_pinned(self, size_bytes: int) -> int:
        """Page-locked host memory, which copies reach without a stop on the way. Freed by `free_pinned`."""
        address = ctypes.c_void_p()
        self.call("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        return int(address.value or 0)

    def free_pinned(self, address: int) -> None:
        """Give memory of `allocate_pinned` back."""
        self.call("cuMemFreeHost", ctypes.c_void_p(address))

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a contiguous array to the device, ordered on the stream; keep it alive until `synchronise`."""
        source = ctypes.c_void_p(array.ctypes.data)
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes), self._stream)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copy from the device into a contiguous array; complete after `synchronise`."""
        target = ctypes.c_void_p(array.ctypes.data)
        self.call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes), self._stream)

    def copy(self, source: int, target: int, size_bytes: int) -> None:
        """Copy within the device, ordered on the stream."""
        self.call(
            "cuMemcpyDtoDAsync_v2",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(size_bytes),
            self._stream,
        )

    def fill(self, address: int, value: int, size_bytes: int) -> None:
        """Set bytes of device memory, ordered on the stream."""
        self.call(
            "cuMemsetD8Async",
            ctypes.c_uint64(address),
            ctypes.c_ubyte(value),
            ctypes.c_size_t(size_bytes),
            self._stream,
        )

    def synchronise(self) -> None:
        """Wait for the stream."""
        self.call("cuStreamSynchronize", self._stream)

    @contextlib.contextmanager
    def synchronised(self) -> Iterator[None]:
        """Wait for the stream on the way out, also after an error, because its work may use the caller's memory."""
        try:
            yield
        except BaseException:
            # The error on its way out says more than a second one from the wait.
            with contextlib.suppress(EngineError):
                self.synchronise()
            raise
        self.synchronise()

    def sibling(self) -> CudaDriver:
        """Another stream of the same device and context, which is closed on its own."""
        return CudaDriver(self._lib, self._ordinal)

    def close(self) -> None:
        """Destroy the stream and release the context."""
        if self._stream.value:
            with self.current():
                self.call("cuStreamDestroy_v2", self._stream)
            self._stream = ctypes.c_void_p()
            self.call("cuDevicePrimaryCtxRelease_v2", self._device)


class DeviceBuffers:
    """Named device buffers that only grow, so that a steady stream of requests allocates nothing."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._held: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def address(self, name: str, size_bytes: int) -> int:
        """Address of at least `size_bytes` under this name; the content of a buffer that had to grow is lost."""
        with self._lock:
            address, held = self._held.get(name, (0, 0))
            # TensorRT wants a real address even for a tensor without elements.
            wanted = max(size_bytes, 1)
            if held < wanted:
                if address:
                    del self._held[name]
                    self._driver.free(address)
                address = self._driver.allocate(wanted)
                self._held[name] = (address, wanted)
            return address

    def close(self) -> None:
        """Free everything."""
        with self._lock:
            for address, _ in self._held.values():
                self._driver.free(address)
            self._held.clear()


class DeviceBuffer:
    """One block of device memory that only grows, in powers of two, so that it seldom moves."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver, self._held = driver, 0
        self.address = 0

    def holds(self, size_bytes: int) -> bool:
        """Whether `reserve` would leave the memory where it is."""
        return size_bytes <= self._held

    def reserve(self, size_bytes: int) -> None:
        """Hold at least that much. Nothing is using the memory, whose content is lost if it moves."""
        if self.holds(size_bytes):
            return
        self.close()
        held = 1 << max(0, size_bytes - 1).bit_length()
        self.address, self._held = self._driver.allocate(held), held

    def close(self) -> None:
        """Free it. A second call does nothing."""
        if self.address:
            address, self.address, self._held = self.address, 0, 0
            self._driver.free(address)


def host_array(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """An uninitialised array that `download` can fill; bfloat16 is held as its 16 bits."""
    return np.empty(shape, storage_dtype(dtype))


def _no_gpu(why: str) -> EngineError:
    return EngineError(
        "HSTU-E401",
        "no GPU can be used",
        why,
        "run on a machine with an NVIDIA GPU and driver, or use --runtime onnxruntime",
    )
