"""Match feeds to what a session declares: names, ranks, dtypes. Private to the sessions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import RequestError
from hstu_compile.runtime._bfloat16 import bits_of_values

_limits = functools.cache(np.iinfo)


def array_of(given: object) -> NDArray[Any] | str:
    """What was given as an array, or why it is none, as the end of a sentence.

    >>> array_of([1, 2]), array_of([[1], [2, 3]])[:24]
    (array([1, 2]), 'cannot be read as an arr')
    """
    if type(given) is np.ndarray:
        return given
    if np.ma.is_masked(given):
        # np.asarray would take what lies under the mask for values.
        return "has masked values, and a model has no absent ones"
    try:
        return np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, and tensors that are not plain host memory
        return f"cannot be read as an array: {error}"


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
    if array.dtype.kind not in "iu" or wanted.kind not in "iu":
        return None
    if array.size and not np.can_cast(array.dtype, wanted):
        limits = _limits(wanted)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
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
        array = array_of(feeds[name])
        if isinstance(array, str):
            problems.append(f"{name} {array}")
            continue
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
