"""Write answers as an .npz. Level 2."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.files import write_whole


def save_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name, whole or not at all.

    Raises:
        BundleError: HSTU-E802, if the file cannot be written; a file that was there stays as it was.
    """
    content = io.BytesIO()
    np.savez(content, **dict(arrays))  # type: ignore[arg-type]
    write_whole(path, content.getvalue())
