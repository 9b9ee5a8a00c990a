"""Arrays that stay where a session computes, and the fixed pools that they live in. Level 3; no torch.

A session's `run_resident` reads and writes these without copying them through its caller. What a pool or a session did
is complete when the call returns: both wait for their stream. So one thread may let one session write a tensor, copy
it within the pool, and let another session (another stream of the same CUDA context) read it, without any
synchronisation of its own.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hstu_compile.errors import EngineError
from hstu_compile.runtime._bfloat16 import storage_dtype
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime._free_list import ALIGNMENT, FreeList, aligned


class ResidentTensor(abc.ABC):
    """A contiguous array in the memory of a session.

    Attributes:
        shape: sizes; a size may be 0.
        dtype: name of the element type, as in `TensorSpec`; "bfloat16" is held as uint16 bit patterns.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * storage_dtype(self.dtype).itemsize

    @property
    @abc.abstractmethod
    def address(self) -> int:
        """Of the first element, in the memory where the tensor lives."""

    @abc.abstractmethod
    def rows(self, start: int, stop: int) -> ResidentTensor:
        """The rows [start, stop) of the first axis, of the same memory.

        Raises:
            IndexError: unless 0 <= start <= stop <= shape[0].
        """

    def _checked_rows(self, start: int, stop: int) -> int:
        """Bytes before row `start`."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} are not inside a tensor of shape {list(self.shape)}")
        return start * math.prod(self.shape[1:]) * storage_dtype(self.dtype).itemsize


class HostTensor(ResidentTensor):
    """A tensor in host memory.

    Args:
        array: C-contiguous; uint16 if `dtype` is bfloat16.
        dtype: None means the array's own.

    Raises:
        ValueError: if the array is not contiguous or is not of that type.
    """

    def __init__(self, array: NDArray[Any], dtype: str | None = None) -> None:
        self.array = array
        self.shape = array.shape
        self.dtype = array.dtype.name if dtype is None else dtype
        if not array.flags.c_contiguous or array.dtype != storage_dtype(self.dtype):
            kind = "contiguous" if array.flags.c_contiguous else "not contiguous"
            raise ValueError(f"an array of {array.dtype}, {kind}, cannot be a tensor of {self.dtype}")

    @property
    def address(self) -> int:
        """See `ResidentTensor.address`."""
        return int(self.array.ctypes.data)

    def rows(self, start: int, stop: int) -> HostTensor:
        """See `ResidentTensor.rows`."""
        self._checked_rows(start, stop)
        return HostTensor(self.array[start:stop], self.dtype)


class DeviceTensor(ResidentTensor):
    """A tensor in CUDA memory that somebody else owns.

    Args:
        address: of the first element. TensorRT takes inputs and outputs at multiples of 256 only.
        shape: sizes.
        dtype: element type.
    """

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self._address, self.shape, self.dtype = address, shape, dtype

    @property
    def address(self) -> int:
        """See `ResidentTensor.address`."""
        return self._address

    def rows(self, start: int, stop: int) -> DeviceTensor:
        """See `ResidentTensor.rows`."""
        before = self._checked_rows(start, stop)
        return DeviceTensor(self._address + before, (stop - start, *self.shape[1:]), self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A block of a pool, until it is freed.

    Attributes:
        offset: bytes from the start of the pool, a multiple of 256.
        nbytes: bytes that the block takes: what was asked for, rounded up to a multiple of 256, at least 256.
    """

    offset: int
    nbytes: int


class MemoryPool(Protocol):
    """One arena of a size that never changes, handed out in regions. Safe to use from several threads."""

    @property
    def capacity_bytes(self) -> int:
        """Size of the arena: the budget, rounded down to a multiple of 256."""

    @property
    def used_bytes(self) -> int:
        """Sum of the live regions' `nbytes`."""

    def allocate(self, nbytes: int) -> Region | None:
        """A region of at least `nbytes` (which may be 0), or None if no hole is large enough.

        Regions do not move, so None is possible although the free bytes would suffice in one piece. The content is
        whatever was there before.
        """

    def free(self, region: Region) -> None:
        """Give a region back; tensors in it must not be used any more.

        Raises:
            ValueError: if it is not a live region of this pool.
        """

    def tensor(self, region: Region, offset: int, shape: tuple[int, ...], dtype: str) -> ResidentTensor:
        """The tensor that starts `offset` bytes into a live region.

        Raises:
            ValueError: if it would not lie inside the region, or not at a multiple of its element size.
        """

    def copy(self, pairs: Sequence[tuple[ResidentTensor, ResidentTensor]]) -> None:
        """Copy each (source, target); all are complete on return.

        Both lie in memory of this pool's kind and device, of this pool or another, and do not overlap.

        Raises:
            ValueError: if a pair differs in shape or type, or is not of this pool's kind; nothing is copied then.
        """

    def write(self, array: NDArray[Any], target: ResidentTensor) -> None:
        """Fill a tensor from an array of its shape and storage type (`storage_dtype`); complete on return."""

    def read(self, source: ResidentTensor) -> NDArray[Any]:
        """A new array with the content, in its storage type."""

    def close(self) -> None:
        """Free the arena. A second call does nothing."""

    def __enter__(self) -> MemoryPool:
        """Return the pool."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pool."""


class _Pool(abc.ABC):
    """What the pools share: which bytes are whose."""

    _kind: type[ResidentTensor]

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"a pool of {capacity_bytes} bytes")
        self._list = FreeList(capacity_bytes // ALIGNMENT * ALIGNMENT)
        self._live: set[Region] = set()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def capacity_bytes(self) -> int:
        return self._list.capacity

    @property
    def used_bytes(self) -> int:
        return self._list.used

    def allocate(self, nbytes: int) -> Region | None:
        with self._lock:
            self._require_open()
            size = aligned(nbytes)
            offset = self._list.take(size)
            if offset is None:
                return None
            region = Region(offset, size)
            self._live.add(region)
            return region

    def free(self, region: Region) -> None:
        with self._lock:
            self._require_live(region)
            self._live.remove(region)
            self._list.give_back(region.offset, region.nbytes)

    def tensor(self, region: Region, offset: int, shape: tuple[int, ...], dtype: str) -> ResidentTensor:
        with self._lock:
            self._require_open()
            self._require_live(region)
        itemsize = storage_dtype(dtype).itemsize
        nbytes = math.prod(shape) * itemsize
        if offset % itemsize or offset < 0 or min(shape, default=0) < 0 or offset + nbytes > region.nbytes:
            raise ValueError(
                f"{dtype} {list(shape)} at byte {offset} does not lie inside a region of {region.nbytes} bytes"
            )
        return self._view(region.offset + offset, shape, dtype)

    def copy(self, pairs: Sequence[tuple[ResidentTensor, ResidentTensor]]) -> None:
        self._require_open()
        for source, target in pairs:
            if (source.shape, source.dtype) != (target.shape, target.dtype):
                raise ValueError(
                    f"{source.dtype} {list(source.shape)} cannot be copied to {target.dtype} {list(target.shape)}"
                )
            self._require_kind(source)
            self._require_kind(target)
        self._copy([pair for pair in pairs if pair[0].nbytes])

    def write(self, array: NDArray[Any], target: ResidentTensor) -> None:
        self._require_open()
        self._require_kind(target)
        if array.shape != target.shape or array.dtype != storage_dtype(target.dtype):
            raise ValueError(
                f"an array of {array.dtype} {list(array.shape)} cannot fill {target.dtype} {list(target.shape)}"
            )
        if array.size:
            self._write(np.ascontiguousarray(array), target)

    def read(self, source: ResidentTensor) -> NDArray[Any]:
        self._require_open()
        self._require_kind(source)
        array = np.empty(source.shape, storage_dtype(source.dtype))
        if array.size:
            self._read(source, array)
        return array

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._release()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the pool is closed")

    def _require_live(self, region: Region) -> None:
        if region not in self._live:
            raise ValueError(f"{region} is not a live region of this pool")

    def _require_kind(self, tensor: ResidentTensor) -> None:
        if not isinstance(tensor, self._kind):
            raise ValueError(f"a {type(tensor).__name__} is not in the memory of a {type(self).__name__}")

    @abc.abstractmethod
    def _view(self, offset: int, shape: tuple[int, ...], dtype: str) -> ResidentTensor:
        """The tensor at a byte offset of the arena."""

    @abc.abstractmethod
    def _copy(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Copy tensors of the pool's kind that have elements."""

    @abc.abstractmethod
    def _write(self, array: NDArray[Any], target: Any) -> None:
        """Fill a tensor that has elements."""

    @abc.abstractmethod
    def _read(self, source: Any, array: NDArray[Any]) -> None:
        """Fill an array that has elements."""

    @abc.abstractmethod
    def _release(self) -> None:
        """Free the arena."""


class HostPool(_Pool):
    """A pool in host memory, for sessions whose feeds are host arrays.

    Args:
        capacity_bytes: budget; the arena is allocated at once.

    Raises:
        EngineError: HSTU-E404 if the machine has not that much.
    """

    _kind = HostTensor

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        try:
            unaligned = np.empty(self.capacity_bytes + ALIGNMENT, np.uint8)
        except (MemoryError, ValueError) as error:  # the latter beyond what NumPy can count
            raise EngineError(
                "HSTU-E404",
                f"the machine has no {self.capacity_bytes} bytes of memory",
                str(error),
                "make the budget smaller (a cache's is kv_budget_bytes), or free memory",
                {"capacity_bytes": self.capacity_bytes},
            ) from error
        skip = -unaligned.ctypes.data % ALIGNMENT
        self._arena: NDArray[np.uint8] | None = unaligned[skip : skip + self.capacity_bytes]

    def _view(self, offset: int, shape: tuple[int, ...], dtype: str) -> HostTensor:
        assert self._arena is not None  # a closed pool has no live regions to look into
        kind = storage_dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        return HostTensor(self._arena[offset : offset + nbytes].view(kind).reshape(shape), dtype)

    def _copy(self, pairs: Sequence[tuple[HostTensor, HostTensor]]) -> None:
        for source, target in pairs:
            target.array[...] = source.array

    def _write(self, array: NDArray[Any], target: HostTensor) -> None:
        target.array[...] = array

    def _read(self, source: HostTensor, array: NDArray[Any]) -> None:
        array[...] = source.array

    def _release(self) -> None:
        # Tensors that are still held keep the memory alive.
        self._arena = None


class DevicePool(_Pool):
    """A pool in CUDA memory: one cuMemAlloc of the whole budget, made here and freed by `close`.

    It uses a stream of its own and keeps the device's primary context alive, so it may outlive the session that made
    it.

    Args:
        capacity_bytes: budget.
        driver: CUDA; the pool owns it and closes it.

    Raises:
        EngineError: HSTU-E404 if the device has not that much memory free. Any method may raise it if CUDA fails.
    """

    _kind = DeviceTensor

    def __init__(self, capacity_bytes: int, driver: CudaDriver) -> None:
        super().__init__(capacity_bytes)
        self._driver = driver
        try:
            with driver.current():
                self._base = driver.allocate(self.capacity_bytes) if self.capacity_bytes else 0
        except BaseException:
            driver.close()
            raise

    def _view(self, offset: int, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        return DeviceTensor(self._base + offset, shape, dtype)

    def _copy(self, pairs: Sequence[tuple[DeviceTensor, DeviceTensor]]) -> None:
        with self._driver.current(), self._driver.synchronised():
            for source, target in pairs:
                self._driver.copy(source.address, target.address, source.nbytes)

    def _write(self, array: NDArray[Any], target: DeviceTensor) -> None:
        with self._driver.current(), self._driver.synchronised():
            self._driver.upload(array, target.address)

    def _read(self, source: DeviceTensor, array: NDArray[Any]) -> None:
        with self._driver.current(), self._driver.synchronised():
            self._driver.download(source.address, array)

    def _release(self) -> None:
        with self._driver.current():
            if self._base:
                self._driver.free(self._base)
        self._driver.close()
