"""Match feeds to what a session declares: names, ranks, dtypes. Private to the sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import RequestError
from hstu_compile.runtime._bfloat16 import bits_of_values


def converted(array: NDArray[Any], dtype: str) -> NDArray[Any] | None:
    """The array as `dtype` is held, or None if that would change a value or its kind.

    A bfloat16 input takes float32 values that bfloat16 holds exactly.

    >>> converted(np.array([1, 2**40]), "int32") is None
    True
    """
    if dtype == "bfloat16":
        return bits_of_values(array) if array.dtype == np.float32 else None
    wanted = np.dtype(dtype)
    if array.dtype == wanted:
        return array
    if not np.issubdtype(array.dtype, np.integer) or not np.issubdtype(wanted, np.integer):
        return None
    limits = np.iinfo(wanted)
    if array.size and (int(array.min()) < limits.min or int(array.max()) > limits.max):
        return None
    return array.astype(wanted)


def matched_feeds(feeds: Mapping[str, NDArray[Any]], inputs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    """Contiguous arrays for every input, in its dtype.

    Raises:
        RequestError: HSTU-E701, listing everything that does not match.
    """
    expected = {spec.name: spec for spec in inputs}
    problems = [f"{name} is missing" for name in expected if name not in feeds]
    problems += [f"{name} is not an input" for name in feeds if name not in expected]
    matched = {}
    for name, spec in expected.items():
        if name not in feeds:
            continue
        array = np.asarray(feeds[name])
        if array.ndim != len(spec.shape):
            problems.append(f"{name} has rank {array.ndim}, not {len(spec.shape)}")
            continue
        cast = converted(array, spec.dtype)
        if cast is None:
            span = f" with values {array.min()}..{array.max()}" if array.size and array.dtype.kind in "iu" else ""
            problems.append(f"{name} is {array.dtype}{span}, and {spec.dtype} cannot hold it unchanged")
            continue
        matched[name] = np.ascontiguousarray(cast)
    if problems:
        raise RequestError(
            "HSTU-E701",
            "the feeds do not match the model's inputs",
            "; ".join(problems),
            "inputs: " + ", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in inputs),
            {"problems": problems},
        )
    return matched
