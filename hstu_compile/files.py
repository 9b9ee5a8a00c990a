"""Write files and folders whole or not at all, and digest them. Level 1."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from hstu_compile.errors import BundleError, UsageError

_BLOCK = 1 << 20


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


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends, and is removed if it fails.

    What was there stays until then. A link to a file stays a link.

    Raises:
        BundleError: HSTU-E802, with the system's message, or if something is there that is no regular file: renaming
            would put a file in the place of a device or a pipe.
    """
    temporary: str | None = None
    with writing_to(path):
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "something is there that is not a regular file")
        path = Path(os.path.realpath(path))
        try:
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(descriptor, "wb") as file:
                yield file
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            temporary = None
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file by `whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def check_not_input(output: Path, inputs: Iterable[Path]) -> None:
    """Refuse, before any work, an output that is what the command reads, or lies inside a folder that it reads.

    Raises:
        UsageError: HSTU-E901.
    """
    real = Path(os.path.realpath(output))
    for each in inputs:
        read = Path(os.path.realpath(each))
        if real == read or (read.is_dir() and read in real.parents):
            raise UsageError(
                "HSTU-E901",
                f"{output} is not written",
                f"the command reads {each}, and would change it",
                "choose another file for the output",
            )


def check_new_folder(path: Path, marker: str, force: bool) -> None:
    """Refuse, before any work, a folder that must not be replaced.

    Args:
        path: where it is to be.
        marker: name of the file by which a folder is known to be of the same kind.
        force: whether one of the same kind may be replaced.

    Raises:
        BundleError: HSTU-E801 if something is there that `force` does not cover.
    """
    if not path.is_symlink() and not path.exists():
        return
    if path.is_symlink() or not (path / marker).is_file():
        why = f"it has no {marker}, so hstu-compile did not write it"
        raise BundleError("HSTU-E801", f"{path} exists", why, "choose another -o DIR")
    if not force:
        raise BundleError("HSTU-E801", f"{path} exists", "it would be overwritten", "pass --force, or another -o DIR")


@contextlib.contextmanager
def new_folder(path: Path, marker: str, force: bool) -> Iterator[Path]:
    """A folder that becomes `path` when the block ends, and is removed if it fails; what was there stays until then.

    Args:
        path: where it is to be; its parent exists or is made.
        marker: see `check_new_folder`; the block writes it.
        force: likewise.

    Raises:
        BundleError: HSTU-E801 if something is there that `force` does not cover, E802 if the folder cannot be written.
    """
    path = path.absolute()
    check_new_folder(path, marker, force)
    folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    replaced = folder.with_suffix(".old")
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            yield folder
            # Once more: somebody else may have made it since.
            check_new_folder(path, marker, force)
            if path.exists():
                os.rename(path, replaced)
            os.rename(folder, path)
        finally:
            if replaced.exists() and not path.exists():
                os.rename(replaced, path)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def sha256_of(file: BinaryIO, offset: int = 0, length: int | None = None) -> str:
    """Hexadecimal sha256 of an open file's bytes, a mebibyte in memory at a time.

    Args:
        file: open for reading.
        offset: of the first byte.
        length: how many; None reads to the end, which also ends what is shorter than asked for.
    """
    digest = hashlib.sha256()
    file.seek(offset)
    left = length
    while block := file.read(_BLOCK if left is None else min(left, _BLOCK)):
        digest.update(block)
        left = None if left is None else left - len(block)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return sha256_of(file)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
