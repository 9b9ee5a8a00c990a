"""Tensors of a folder that torch.distributed.checkpoint wrote, without trusting it. Level 2.

torch's own reader unpickles the index, and everything that is no tensor, as the file wishes. So the index is read by
`shard_index`, and the parts it names by weights_only. Only what is asked for is read: a table that stays outside, or
the state of an optimizer, costs nothing.
"""

from __future__ import annotations

import itertools
import math
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hstu_compile.errors import CheckpointError
from hstu_compile.files import sha256_of
from hstu_compile.saved_tensors import FilePart, load_saved
from hstu_compile.shard_index import Chunk, Part, ShardedTensor, ShardIndex, read_index

_COPY_AGAIN = "copy the folder again, with all its files"


class ShardFolder:
    """A folder, opened: its index is read, its tensors are not.

    Attributes:
        path: the folder.
        index: what it holds.
    """

    def __init__(self, path: Path) -> None:
        """Read the index.

        Raises:
            CheckpointError: see `read_index`.
        """
        self.path = path
        self.index: ShardIndex = read_index(path)
        self._digests: dict[str, str] = {}

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of every part that was read, by what it is: key, first element and sizes of the chunk."""
        return dict(self._digests)

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Read whole tensors.

        Args:
            keys: those of the index.

        Returns:
            Each on the CPU, in its own dtype.

        Raises:
            CheckpointError: HSTU-E101 if a chunk is missing, twice there, not in its file or not what the index says,
                before any memory is taken that the files do not fill; E102 if a part names code.
        """
        found = {key: self.index.tensors[key] for key in keys}
        parts = []
        for key, tensor in found.items():
            if problem := tensor.layout_problem():
                raise self._damaged(key, problem)
            parts += [(key, self._checked(key, tensor, chunk)) for chunk in tensor.chunks if _holds_any(chunk)]
        self._check_apart(parts)
        return {key: self._tensor(key, tensor) for key, tensor in found.items()}

    def object(self, key: str) -> Any:
        """Read what is no tensor: plain containers alone.

        Raises:
            CheckpointError: HSTU-E101 if it is not there or damaged, E102 if it names code.
        """
        part = self.index.objects[key]
        if part is None:
            raise self._damaged(key, "the index does not say where it is")
        self._check_part(key, part)
        return self._loaded(key, key, part)

    def _damaged(self, key: str, why: str, fix: str = _COPY_AGAIN) -> CheckpointError:
        return CheckpointError("HSTU-E101", f"{key} cannot be read from {self.path}", why, fix)

    def _checked(self, key: str, tensor: ShardedTensor, chunk: Chunk) -> Part:
        if chunk.part is None:
            raise self._damaged(key, f"the index does not say where its chunk at {list(chunk.offsets)} is")
        self._check_part(key, chunk.part)
        needed = math.prod(chunk.sizes) * _dtype(tensor).itemsize
        if needed > chunk.part.length:
            raise self._damaged(
                key,
                f"its chunk at {list(chunk.offsets)} of {list(chunk.sizes)} {tensor.dtype} takes {needed} bytes, "
                f"{chunk.part.file} has {chunk.part.length} for it",
            )
        return chunk.part

    def _check_part(self, key: str, part: Part) -> None:
        # The names that torch writes are plain; a path could lead out of the folder.
        if part.file in ("", ".", "..") or any(sign in part.file for sign in ("/", "\\", "\0")):
            raise self._damaged(key, f"the index names the file {part.file!a}", "use files that you trust")
        if part.transforms:
            raise self._damaged(
                key,
                f"{part.file} was written with {', '.join(map(ascii, part.transforms))}, which is not read",
                "save the checkpoint without compression or other extensions of the writer",
            )
        try:
            status = (self.path / part.file).stat()
        except OSError as error:
            raise self._damaged(key, f"{part.file}: {error.strerror or error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise self._damaged(key, f"{part.file} is not a file")
        if part.offset + part.length > status.st_size:
            raise self._damaged(
                key,
                f"{part.file} has {status.st_size} bytes, the index needs {part.offset + part.length}: it is truncated",
            )

    def _check_apart(self, parts: list[tuple[str, Part]]) -> None:
        """Refuse parts that share bytes: a small file could claim to be many large tensors."""
        ordered = sorted(parts, key=lambda each: (each[1].file, each[1].offset))
        for (one, before), (other, after) in itertools.pairwise(ordered):
            if before.file == after.file and before.offset + before.length > after.offset:
                raise self._damaged(other, f"its bytes in {after.file} are those of {one} as well")

    def _tensor(self, key: str, tensor: ShardedTensor) -> Tensor:
        chunks = [chunk for chunk in tensor.chunks if _holds_any(chunk)]
        if len(chunks) == 1:
            return self._chunk(key, tensor, chunks[0])
        whole = torch.empty(tensor.shape, dtype=_dtype(tensor))
        for chunk in chunks:
            place = tuple(slice(first, first + size) for first, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = self._chunk(key, tensor, chunk)
        return whole

    def _chunk(self, key: str, tensor: ShardedTensor, chunk: Chunk) -> Tensor:
        assert chunk.part is not None  # `tensors` checked it
        name = f"{key} {list(chunk.offsets)} {list(chunk.sizes)}"
        loaded = self._loaded(key, name, chunk.part)
        expected = _dtype(tensor), torch.Size(chunk.sizes), torch.strided
        if not isinstance(loaded, Tensor) or (loaded.dtype, loaded.shape, loaded.layout) != expected:
            seen = f"{list(loaded.shape)} {loaded.dtype}" if isinstance(loaded, Tensor) else type(loaded).__name__
            raise self._damaged(
                key, f"its chunk in {chunk.part.file} is {seen}, the index says {list(chunk.sizes)} {tensor.dtype}"
            )
        return loaded.detach()

    def _loaded(self, key: str, name: str, part: Part) -> Any:
        path = self.path / part.file
        try:
            with path.open("rb") as file:
                self._digests[name] = sha256_of(file, part.offset, part.length)
                return load_saved(FilePart(file, part.offset, part.length), f"{path} ({key})")
        except OSError as error:
            raise self._damaged(key, f"{part.file}: {error.strerror or error}") from error


def _holds_any(chunk: Chunk) -> bool:
    return math.prod(chunk.sizes) > 0


def _dtype(tensor: ShardedTensor) -> torch.dtype:
    dtype = getattr(torch, tensor.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
