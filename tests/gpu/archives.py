"""Archives of a job's files, each small enough to be carried alone; unpack.sh unpacks them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from pathlib import Path


def save_archive(path: Path, root: Path, files: Iterable[Path]) -> None:
    """Pack files under their names below a folder; the archive appears whole."""
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
        for file in files:
            archive.add(file, str(file.relative_to(root)))
    partial.replace(path)
    print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")
