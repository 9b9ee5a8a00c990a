"""Values of a request as new arrays of the model's types, or why they are none. Level 3; private to the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.runtime._faults import indices, whole_numbers
from hstu_compile.runtime._feeds import array_of, converted

#: Takes the text of one fault under HSTU-E701.
Add = Callable[[str], None]


def array_or_fault(name: str, given: object, add: Add) -> NDArray[Any] | None:
    """The values as an array, perhaps the caller's own; None if they are none, which is noted."""
    array = array_of(given)
    if isinstance(array, str):
        add(f"{name} {array}")
        return None
    return array


def integers(name: str, given: object, dtype: str, add: Add) -> NDArray[Any] | None:
    """Values [n] as a new contiguous array of an integer type; None if that would change one, which is noted."""
    array = array_or_fault(name, given, add)
    if array is None:
        return None
    if array.ndim != 1:
        add(f"{name} has rank {array.ndim}, shape {list(array.shape)}; it must have rank 1")
        return None
    cast = converted(whole_numbers(array), dtype)
    if cast is not None:
        # The caller may change an array meanwhile, and must not change what was checked.
        return cast.copy() if np.may_share_memory(cast, array) else cast
    if array.dtype.kind == "f" and not (finite := np.isfinite(array)).all():
        add(f"{name} holds NaN or infinity {indices(~finite)}")
    else:
        span = f" with values {array.min()}..{array.max()}" if array.size and array.dtype.kind in "iuf" else ""
        add(f"{name} is {array.dtype}{span}; {dtype} cannot hold it unchanged")
    return None


def too_far_apart(first: Any, last: Any) -> str:
    """Why two times cannot be in one request, `first` being the earlier; "" if they can.

    Models take differences of times as int64, which would wrap without a word: a marker of an absent time, as NaT is,
    would pass for one long after all others.

    >>> too_far_apart(np.int64(0), np.int64(2**63 - 1)), too_far_apart(-1, 2**63 - 1)
    ('', 'times from -1 to 9223372036854775807 are further apart than int64 counts seconds')
    """
    first, last = int(first), int(last)
    if last - first < 2**63:
        return ""
    return f"times from {first} to {last} are further apart than int64 counts seconds"
