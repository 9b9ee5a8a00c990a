"""Collect every fault of a request before refusing it, and the checks that all kinds of requests share.

Private to the runtime's request checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.errors import RequestError

MOST_NAMED = 5


class Faults:
    """Faults in the order in which they were found.

    Args:
        fixes: what helps, by error code.
    """

    def __init__(self, fixes: Mapping[str, str]) -> None:
        self._fixes = fixes
        self.found: list[tuple[str, str]] = []

    def add(self, code: str, text: str) -> None:
        """Note one fault."""
        self.found.append((code, text))

    def raise_if_any(self) -> None:
        """Refuse the request under the first fault's code, naming all of them."""
        if not self.found:
            return
        code = self.found[0][0]
        codes = dict.fromkeys(each for each, _ in self.found)
        raise RequestError(
            code,
            f"the request has {len(self.found)} fault{'s' if len(self.found) > 1 else ''}",
            "; ".join(text for _, text in self.found),
            "; ".join(self._fixes[each] for each in codes),
            {"problems": [{"code": each, "problem": text} for each, text in self.found]},
        )


def whole_numbers(array: NDArray[Any]) -> NDArray[Any]:
    """An empty array of any number type is an empty integer array: np.array([]) is float64."""
    return array.astype(np.int64) if array.size == 0 and array.dtype.kind in "fiu" else array


def indices(mask: NDArray[np.bool_]) -> str:
    """The first few indices at which the mask is set."""
    hits = np.flatnonzero(mask)
    more = f" and {hits.size - MOST_NAMED} more" if hits.size > MOST_NAMED else ""
    return f"at index {', '.join(map(str, hits[:MOST_NAMED]))}{more}"


def where(mask: NDArray[np.bool_], values: NDArray[Any]) -> str:
    """The first few indices at which the mask is set, with their values."""
    hits = np.flatnonzero(mask)
    more = f" and {hits.size - MOST_NAMED} more" if hits.size > MOST_NAMED else ""
    return f"at index {', '.join(f'{i} ({values[i]})' for i in hits[:MOST_NAMED])}{more}"


def check_offsets(name: str, offsets: NDArray[Any], num_rows: int, what: str, faults: Faults) -> bool:
    """Whether offsets [B + 1] divide `num_rows` rows of `what` into sequences; notes under HSTU-E702 why not."""
    before = len(faults.found)
    if offsets.shape[0] < 2:
        faults.add("HSTU-E702", f"{name} has {offsets.shape[0]} entries; one sequence needs two")
        return False
    if offsets[0] != 0:
        faults.add("HSTU-E702", f"{name} starts at {offsets[0]}, not at 0")
    descents = np.diff(offsets.astype(np.int64)) < 0
    if descents.any():
        first = int(np.flatnonzero(descents)[0])
        faults.add(
            "HSTU-E702",
            f"{name} descends at sequence {first}, from {offsets[first]} to {offsets[first + 1]}"
            + (f", and at {descents.sum() - 1} more" if descents.sum() > 1 else ""),
        )
    if offsets[-1] != num_rows:
        faults.add("HSTU-E702", f"{name} ends at {offsets[-1]}, and there are {num_rows} {what}")
    return len(faults.found) == before
