"""A block of device memory with a page-locked twin on the host, and how a pass's tensors lie in it. Level 3."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime._free_list import aligned

_SMALLEST = 4096


class Layout:
    """Tensors side by side, each at a multiple of 256 bytes. Equal sizes in equal order lie at equal places.

    Args:
        sizes: bytes of each tensor; 0 is legal, and takes a place all the same: TensorRT wants a real address.

    Attributes:
        offsets: where each begins.
        nbytes: of all.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name, size in sizes.items():
            self.offsets[name] = self.nbytes
            self.nbytes += aligned(size)


class MirroredBuffer:
    """Memory that only grows, in powers of two, so that it seldom moves and then takes at most twice what was asked.

    One copy brings all of a pass's small tensors over, and a page-locked twin lets it run beside the host.
    """

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._pinned = 0
        self.address = 0
        self.host: NDArray[np.uint8] = np.empty(0, np.uint8)

    def holds(self, size_bytes: int) -> bool:
        """Whether `reserve` would leave the memory where it is."""
        return bool(self.address) and size_bytes <= self.host.size

    def reserve(self, size_bytes: int) -> None:
        """Hold at least that much. Nothing is using the memory, whose content is lost if it moves."""
        if self.holds(size_bytes):
            return
        self.close()
        held = max(_SMALLEST, 1 << max(0, size_bytes - 1).bit_length())
        self.address = self._driver.allocate(held)
        self._pinned = self._driver.allocate_pinned(held)
        self.host = np.ctypeslib.as_array((ctypes.c_uint8 * held).from_address(self._pinned))

    def place(self, offset: int, array: NDArray[np.generic]) -> None:
        """Write an array to the host's side."""
        self.host[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def taken(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        """A copy of a tensor on the host's side."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self.host[offset : offset + size].view(dtype).reshape(shape).copy()

    def upload(self, size_bytes: int) -> None:
        """Copy the first bytes to the device, ordered on the stream."""
        if size_bytes:
            self._driver.upload(self.host[:size_bytes], self.address)

    def download(self, size_bytes: int) -> None:
        """Copy the first bytes to the host, ordered on the stream."""
        if size_bytes:
            self._driver.download(self.address, self.host[:size_bytes])

    def close(self) -> None:
        """Free both sides. A second call does nothing."""
        self.host = np.empty(0, np.uint8)
        if self.address:
            address, self.address = self.address, 0
            self._driver.free(address)
        if self._pinned:
            pinned, self._pinned = self._pinned, 0
            self._driver.free_pinned(pinned)
