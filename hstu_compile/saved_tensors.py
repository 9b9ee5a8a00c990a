"""Read what torch.save wrote, without trusting it. Level 1.

Only tensors and plain containers are read (weights_only), nothing in a file is executed, and a file cannot claim more
bytes than it has.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from hstu_compile.errors import CheckpointError

_PICKLE_PROTOCOL = b"\x80"
_ZIP = b"PK\x03\x04"
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+)")


class FilePart(io.RawIOBase):
    """Bytes `offset` to `offset + length` of an open file, as a file of their own; what is read is not copied.

    Attributes:
        length: in bytes.
    """

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self.length = file, offset, length
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position, from the part's begin."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` from the begin, the position or the end."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if at < 0:
            raise OSError("position before the begin of the part")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the position on; 0 at the part's end."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view[: max(0, self.length - self._at)])  # type: ignore[attr-defined]
        self._at += count
        return int(count)


def load_saved(source: Path | FilePart, name: str) -> Any:
    """The object in a file or part of one.

    Args:
        source: what torch.save wrote.
        name: what messages call it.

    Returns:
        Tensors on the CPU and plain containers.

    Raises:
        CheckpointError: HSTU-E101 if it cannot be read, E102 if it names classes or functions that tensors do not need.
    """
    try:
        with warnings.catch_warnings():
            # What torch notes about pickle protocols is part of the refusal or of no interest.
            warnings.simplefilter("ignore")
            _check_records(source)
            if isinstance(source, FilePart):
                source.seek(0)
            return torch.load(cast(IO[bytes], source), map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(
            "HSTU-E101", f"cannot read {name}", error.strerror or str(error), "check the file's permissions"
        ) from error
    except Exception as error:  # A damaged file makes the unpickler fail in whatever operation the damage leads to.
        text = str(error)
        if (refused := _REFUSED_GLOBAL.search(text)) and (_is_pickle_or_zip(source) or "is blocked" in text):
            raise CheckpointError(
                "HSTU-E102",
                f"{name} is refused: loading it could run code",
                f"the file names {refused[1]}; only tensors and plain containers are read",
                "save tensors only: torch.save({'model_state_dict': model.state_dict()}, path)",
            ) from error
        raise CheckpointError(
            "HSTU-E101",
            f"{name} is truncated or not a PyTorch checkpoint",
            _reason(error),
            "copy the file again, and check that torch.load(path, weights_only=True) reads it",
        ) from error


def _begin(source: Path | FilePart, count: int) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(count)
    source.seek(0)
    return source.read(count) or b""


def _check_records(source: Path | FilePart) -> None:
    """Refuse an archive whose records, unpacked, are larger than it is: torch.save never compresses."""
    if _begin(source, len(_ZIP)) != _ZIP:
        if isinstance(source, FilePart):
            raise ValueError("it is not an archive of torch.save")
        return  # The older format, which torch reads to the end.
    with zipfile.ZipFile(source) as archive:
        records = archive.infolist()
    size = source.stat().st_size if isinstance(source, Path) else source.length
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > size:
        raise ValueError(f"its records are compressed, or claim more than its {size} bytes")


def _is_pickle_or_zip(source: Path | FilePart) -> bool:
    """Whether torch.save can have written the file: a text file may hold what reads as the name of a function."""
    return _begin(source, 1) == _PICKLE_PROTOCOL or zipfile.is_zipfile(source)


def _reason(error: Exception) -> str:
    """The unpickler's own reason, without its advice to load the file unsafely."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it is not a pickle of tensors and plain containers"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
