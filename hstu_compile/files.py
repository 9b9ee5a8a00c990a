"""Write files whole or not at all. Level 1."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hstu_compile.errors import BundleError


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes to `path`, into BundleError HSTU-E802."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise BundleError(
            "HSTU-E802",
            f"cannot write {path}",
            error.strerror or str(error),
            "free some disk space" if full else "choose a place that you can write",
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file; one that was there stays as it was until the new one is complete.

    Raises:
        BundleError: HSTU-E802, with the system's message.
    """
    temporary: str | None = None
    with writing_to(path):
        try:
            descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            temporary = None
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
