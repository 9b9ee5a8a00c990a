"""bfloat16 for NumPy, which lacks it: held as its 16 bits, computed with as float32. Level 3; private to runtime."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray


@functools.cache
def storage_dtype(dtype: str) -> np.dtype[Any]:
    """NumPy's type for the elements of a tensor: uint16 for the bits of a bfloat16."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def values_of_bits(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 that each bit pattern stands for, exactly.

    >>> values_of_bits(np.array([0x3F80, 0xC040], np.uint16)).tolist()
    [1.0, -3.0]
    """
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bits_of_values(values: NDArray[np.float32]) -> NDArray[np.uint16] | None:
    """The bit pattern of each float32, or None if bfloat16 cannot hold one of them exactly.

    >>> bits_of_values(np.array([1.0, 1.001], np.float32)) is None
    True
    """
    wide = np.ascontiguousarray(values).view(np.uint32)
    return None if (wide & 0xFFFF).any() else (wide >> 16).astype(np.uint16)
