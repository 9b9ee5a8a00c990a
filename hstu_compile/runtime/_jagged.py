"""Several sequences in one array, one after the other. Private to the runtime's sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


def offsets_of(lengths: Sequence[int] | NDArray[Any]) -> NDArray[np.int32]:
    """[n + 1]: the cumulative sum with a 0 in front."""
    return np.cumsum([0, *lengths], dtype=np.int32)


def joined(parts: Sequence[Arrays], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Each feature's values of all parts, one after the other; of a single part, its own arrays."""
    if len(parts) == 1:
        return {name: parts[0][name] for name in names}
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
