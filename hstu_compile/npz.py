"""Write answers as an .npz, whole or not at all. Level 2."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.errors import BundleError


def save_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name.

    Raises:
        BundleError: HSTU-E802, if the file cannot be written; a file that was there stays as it was.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **dict(arrays))  # type: ignore[arg-type]
        os.replace(temporary, path)
    except OSError as error:
        raise BundleError(
            "HSTU-E802", f"cannot write {path}", error.strerror or str(error), "choose a file that you can write"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
