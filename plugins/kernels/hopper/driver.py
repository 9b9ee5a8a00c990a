"""The CUDA driver as the Hopper kernel's launcher needs it: modules, tensor maps, launches.

Level: kernels; imports neither torch nor triton.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

#: CUtensorMapDataType and the other enumerations of cuda.h.
TENSOR_MAP_TYPES = {"float16": 6, "bfloat16": 9}
_INTERLEAVE_NONE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_FILL_ZERO = 0
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
#: cuTensorMapEncodeTiled wants its result aligned to this.
_MAP_ALIGNMENT = 64
_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4


class TensorMap(ctypes.Structure):
    """A CUtensorMap, opaque."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


class AttentionParameters(ctypes.Structure):
    """``AttentionParameters`` of parameters.cuh, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "q_offsets", "k_offsets", "num_targets")),
        *((name, ctypes.c_void_p) for name in ("contextual_seq_lens", "scaling_seq_lens", "progress")),
        ("alpha", ctypes.c_float),
        ("scaling_seq_len", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("lq", "lk", "batch", "heads", "dv", "target_group_size")),
        *((name, ctypes.c_int32) for name in ("contextual_seq_len", "max_attn_len", "min_full_attn_seq_len")),
        *((name, ctypes.c_void_p) for name in ("row_timestamps", "col_timestamps", "ts_thresholds")),
        *((name, ctypes.c_void_p) for name in ("ts_table", "pos_table")),
        *((name, ctypes.c_int32) for name in ("num_buckets", "ts_heads", "pos_table_len", "pos_heads")),
        ("cache_offsets", ctypes.c_void_p),
        ("lc", ctypes.c_int32),
    )


class _LaunchAttribute(ctypes.Structure):
    """A CUlaunchAttribute that says how many blocks a cluster has: an 8-byte head, and 64 bytes of value."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("cluster", ctypes.c_uint * 3),
        ("rest", ctypes.c_uint * 13),
    )


class _LaunchConfig(ctypes.Structure):
    """A CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuModuleLoadData.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p)
    library.cuModuleGetFunction.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_char_p)
    library.cuFuncSetAttribute.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    library.cuLaunchKernelEx.argtypes = (
        ctypes.POINTER(_LaunchConfig),
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_void_p,
    )
    library.cuTensorMapEncodeTiled.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint32),
        *(ctypes.c_int,) * 4,
    )
    return library


def _check(result: int, what: str) -> None:
    if result != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: CUDA error {result} ({(text.value or b'unknown').decode()})")


def load_kernel(image: bytes, name: str, shared_bytes: int) -> ctypes.c_void_p:
    """Load a cubin into the current context and return its function; both stay for the life of the process.

    Args:
        image: the cubin.
        name: of the function.
        shared_bytes: dynamic shared memory that its launches take.

    Raises:
        RuntimeError: the driver refuses the image (made for another GPU, or by a newer CUDA) or the memory.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), "loading the Hopper attention kernel")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
    result = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
    _check(result, f"asking for {shared_bytes} bytes of shared memory")
    return function


@functools.lru_cache(maxsize=1024)
def tensor_map(address: int, dtype: str, shape: tuple[int, int, int], box_rows: int) -> TensorMap:
    """Describe a contiguous [rows, heads, columns] tensor for copies of [box_rows, 1, 64] boxes, 128-byte swizzled.

    Args:
        address: of the first element, 16-byte aligned.
        dtype: "float16" or "bfloat16".
        shape: rows, heads, columns; columns a multiple of 8. Rows or columns outside are copied as zero.
        box_rows: rows of a box, at most 256.

    Returns:
        The description, shared by all who ask for the same.

    Raises:
        RuntimeError: the driver refuses the tensor.
    """
    rows, heads, columns = shape
    storage = (ctypes.c_uint8 * (ctypes.sizeof(TensorMap) + _MAP_ALIGNMENT))()
    start = ctypes.addressof(storage)
    aligned = start + -start % _MAP_ALIGNMENT
    result = _driver().cuTensorMapEncodeTiled(
        aligned,
        TENSOR_MAP_TYPES[dtype],
        3,
        address,
        (ctypes.c_uint64 * 3)(columns, heads, max(rows, 1)),
        (ctypes.c_uint64 * 2)(columns * 2, heads * columns * 2),
        (ctypes.c_uint32 * 3)(64, 1, box_rows),
        (ctypes.c_uint32 * 3)(1, 1, 1),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _L2_PROMOTION_256B,
        _FILL_ZERO,
    )
    _check(result, f"describing a tensor of shape {shape}")
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, ctypes.sizeof(TensorMap)))


def launch(
    function: ctypes.c_void_p,
    grid: int,
    cluster: int,
    threads: int,
    shared_bytes: int,
    stream: int,
    arguments: Sequence[ctypes.Structure],
) -> None:
    """Launch a kernel whose arguments are structs; they are copied before this returns.

    Args:
        function: of the kernel.
        grid: blocks, whole clusters of them.
        cluster: blocks of a cluster; 1 where the kernel knows of none.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        stream: address of the CUstream.
        arguments: of the kernel, in order.

    Raises:
        RuntimeError: the driver refuses the launch.
    """
    # The driver reads a tensor map's 128 bytes wherever they lie; only the encoder wants them aligned.
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
    attribute = _LaunchAttribute(id=_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster=(cluster, 1, 1))
    config = _LaunchConfig(
        grid=(grid, 1, 1),
        block=(threads, 1, 1),
        shared_bytes=shared_bytes,
        stream=stream,
        attributes=ctypes.pointer(attribute),
        num_attributes=int(cluster > 1),
    )
    result = _driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
    _check(result, "launching the Hopper attention kernel")
