"""What tests of hstu_score have in common: its exit codes, an option, and how its answers are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

USAGE, ENGINE, DIFFERENT, REQUEST, BUNDLE, NO_GPU, GROWTH = 2, 5, 6, 7, 8, 9, 10
#: Compares, and measures nothing.
QUICK = ("--iterations", "0")


def stored(path: Path) -> dict[str, Any]:
    """The arrays of a .npz file, by name."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}
