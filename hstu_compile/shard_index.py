"""Folders that are checkpoints, and the index of what torch.distributed.checkpoint wrote. Level 1, no torch.

The index, `.metadata`, is a pickle, and torch reads it as one, which can run code. Here it is read as data.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hstu_compile.errors import CheckpointError
from hstu_compile.pickled_records import Global, MalformedPickleError, Record, RefusedGlobalError, read_records

INDEX = ".metadata"
SHARD_SUFFIX = ".distcp"
#: What Meta's DLRMv3 training writes: all that is not sharded in one file, and a folder of the sharded tables.
NON_SPARSE, SPARSE = "non_sparse.ckpt", "sparse"

# Corners are counted, 2 ** rank for each chunk; parameters have 1 to 3 dimensions.
_MAX_RANK = 8
_METADATA = "torch.distributed.checkpoint.metadata"
# In older versions of torch, TensorProperties and its enum were here.
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"
_RECORDS: frozenset[Global] = frozenset(
    {
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "TensorStorageMetadata"),
        (_OLD_METADATA, "TensorProperties"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
)
_MEMORY_FORMATS = ((_METADATA, "_MEM_FORMAT_ENCODING"), (_OLD_METADATA, "MEM_FORMAT_ENCODING"))
_PATH_CLASSES = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


def _size(sizes: Any = ()) -> tuple[int, ...]:
    """Stands in for torch.Size."""
    if not isinstance(sizes, tuple) or not all(_is_index(size) for size in sizes):
        raise ValueError("a size is not made of numbers of 0 and above")
    return sizes


def _nothing(*_: Any) -> None:
    """Stands in for what the index says and no reader needs: layouts, memory formats, where it was written."""


def _memory_format(owner: Any, name: Any) -> None:
    """Stands in for getattr, by which some versions of Python write the member of an enum."""
    if owner not in _MEMORY_FORMATS or not isinstance(name, str):
        raise RefusedGlobalError("builtins.getattr")


_CALLS: dict[Global, Callable[..., Any]] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _nothing,
    ("builtins", "getattr"): _memory_format,
    **dict.fromkeys(_MEMORY_FORMATS, _nothing),
    **{(module, name): _nothing for module in ("pathlib", "pathlib._local") for name in _PATH_CLASSES},
}


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclasses.dataclass(frozen=True)
class Part:
    """Bytes of one file of the folder: one thing that torch.save wrote.

    Attributes:
        file: name of the file, as the index gives it.
        offset: of the first byte.
        length: in bytes.
        transforms: what was done to the bytes, for instance compression; empty for nothing.
    """

    file: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A box of a tensor: its first element, its sizes, and its bytes; None where the index has none."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    part: Part | None


@dataclasses.dataclass(frozen=True)
class ShardedTensor:
    """A tensor that lies in chunks.

    Attributes:
        dtype: its name in torch.
        shape: of the whole.
        chunks: in the index's order.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def layout_problem(self) -> str | None:
        """Why the chunks are not the tensor, every element once; None if they are."""
        boxes = [(chunk.offsets, chunk.sizes) for chunk in self.chunks]
        rank = len(self.shape)
        if rank > _MAX_RANK:
            return f"it has {rank} dimensions"
        for offsets, sizes in boxes:
            if len(offsets) != rank or len(sizes) != rank:
                return f"a chunk at {list(offsets)} has not the {rank} dimensions of the tensor"
            if any(first + size > end for first, size, end in zip(offsets, sizes, self.shape, strict=True)):
                return f"a chunk at {list(offsets)} of {list(sizes)} lies outside of {list(self.shape)}"
        if _same_cover(boxes, self.shape):
            return None
        held, needed = sum(math.prod(sizes) for _, sizes in boxes), math.prod(self.shape)
        kind = "parts of it are missing" if held < needed else "chunks overlap"
        return f"{kind}: {len(boxes)} chunks hold {held} elements, {list(self.shape)} has {needed}"


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """What a folder holds.

    Attributes:
        tensors: by key.
        objects: what is no tensor, by key; None where the index has no bytes for it.
        paths: where each key was in the nested dict that was saved, for the keys that tell.
    """

    tensors: dict[str, ShardedTensor]
    objects: dict[str, Part | None]
    paths: dict[str, tuple[str | int, ...]]

    def path_of(self, key: str) -> tuple[str | int, ...]:
        """Where a key was; a key that does not tell was at the top."""
        return self.paths.get(key, (key,))


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder claims to be a checkpoint, be it whole or not."""
    if not path.is_dir():
        return False
    return any((path / name).exists() for name in (INDEX, NON_SPARSE, SPARSE)) or any(path.glob(f"*{SHARD_SUFFIX}"))


def read_index(folder: Path) -> ShardIndex:
    """Read `.metadata`.

    Raises:
        CheckpointError: HSTU-E101 if it is absent, damaged or contradicts itself, E102 if it names anything but the
            few classes that an index needs.
    """
    path = folder / INDEX
    if not path.is_file():
        names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
        unfinished = [name for name in names if name.endswith((f"{INDEX}.tmp", INDEX))]
        why = f"{folder} has no {INDEX}" + (f", only {', '.join(unfinished)}" if unfinished else "")
        fix = "copy the whole folder; it is written last, so without it the save did not end"
        raise CheckpointError("HSTU-E101", f"cannot read {folder}", why, fix)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            "HSTU-E101", f"cannot read {path}", error.strerror or str(error), "check the file's permissions"
        ) from error
    try:
        found = read_records(content, _RECORDS, _CALLS, [("torch", name) for name in _DTYPES])
        return _index_of(found)
    except RefusedGlobalError as error:
        raise CheckpointError(
            "HSTU-E102",
            f"{path} is refused: loading it could run code",
            f"the file names {error.name}; an index needs no more than torch.distributed.checkpoint's own records",
            "save with torch.distributed.checkpoint.save and its default planner, and use files that you trust",
        ) from error
    except MalformedPickleError as error:
        raise CheckpointError(
            "HSTU-E101",
            f"{path} is damaged, or not the index of a distributed checkpoint",
            str(error),
            "copy the folder again; torch.distributed.checkpoint.save writes it",
        ) from error


def _wrong(message: str) -> NoReturn:
    raise MalformedPickleError(message)


def _state(value: Any, kind: str) -> dict[Any, Any]:
    if not isinstance(value, Record) or value.kind != kind:
        _wrong(f"a {kind} is a {value.kind if isinstance(value, Record) else type(value).__name__}")
    if not isinstance(value.state, dict):
        _wrong(f"a {kind} has no fields")
    return value.state


def _sizes_in(state: dict[Any, Any], name: str, kind: str) -> tuple[int, ...]:
    value = state.get(name)
    # torch.Size became a tuple; a list is of older versions.
    if not isinstance(value, (tuple, list)) or not all(_is_index(size) for size in value):
        _wrong(f"{name} of a {kind} is not a list of sizes")
    return tuple(value)


def _index_of(found: Any) -> ShardIndex:
    state = _state(found, "Metadata")
    entries, places, planner = state.get("state_dict_metadata"), state.get("storage_data"), state.get("planner_data")
    if not isinstance(entries, dict) or not isinstance(places, dict):
        _wrong("it has no state_dict_metadata or no storage_data")
    parts: dict[tuple[str, tuple[int, ...] | None], Part] = {}
    for place, info in places.items():
        where = _place(place)
        if where in parts:
            _wrong(f"{where[0]} has two places for the same chunk")
        parts[where] = _part(info)
    tensors: dict[str, ShardedTensor] = {}
    objects: dict[str, Part | None] = {}
    for key, entry in entries.items():
        if not isinstance(key, str):
            _wrong("a key is no text")
        if isinstance(entry, Record) and entry.kind == "BytesStorageMetadata":
            objects[key] = parts.get((key, None))
        else:
            tensors[key] = _tensor(key, _state(entry, "TensorStorageMetadata"), parts)
    paths = {}
    for key, path in planner.items() if isinstance(planner, dict) else ():
        if isinstance(key, str) and isinstance(path, tuple) and path and all(_is_step(step) for step in path):
            paths[key] = path
    return ShardIndex(tensors, objects, paths)


def _is_step(step: Any) -> bool:
    return isinstance(step, str) or _is_index(step)


def _place(place: Any) -> tuple[str, tuple[int, ...] | None]:
    state = _state(place, "MetadataIndex")
    key = state.get("fqn")
    if not isinstance(key, str):
        _wrong("a place in storage_data has no key")
    return key, None if state.get("offset") is None else _sizes_in(state, "offset", "MetadataIndex")


def _part(info: Any) -> Part:
    state = _state(info, "_StorageInfo")
    file, offset, length = (state.get(name) for name in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not _is_index(offset) or not _is_index(length):
        _wrong("a place in storage_data has no file, offset and length")
    transforms = state.get("transform_descriptors") or ()
    if not isinstance(transforms, (list, tuple)) or not all(isinstance(each, str) for each in transforms):
        _wrong("transform_descriptors is not a list of names")
    assert isinstance(offset, int)
    assert isinstance(length, int)
    return Part(file, offset, length, tuple(transforms))


def _tensor(key: str, state: dict[Any, Any], parts: dict[tuple[str, tuple[int, ...] | None], Part]) -> ShardedTensor:
    properties, chunks = state.get("properties"), state.get("chunks")
    if not isinstance(properties, Record) or properties.kind != "TensorProperties" or not isinstance(chunks, list):
        _wrong(f"{key} has no properties or no chunks")
    values = properties.state
    dtype = values.get("dtype") if isinstance(values, dict) else values[0] if values else None
    if not isinstance(dtype, tuple) or len(dtype) != 2 or dtype[0] != "torch" or dtype[1] not in _DTYPES:
        _wrong(f"{key} has no dtype")
    boxes = []
    for chunk in chunks:
        box = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = (_sizes_in(box, name, "ChunkStorageMetadata") for name in ("offsets", "sizes"))
        boxes.append(Chunk(offsets, sizes, parts.get((key, offsets))))
    return ShardedTensor(dtype[1], _sizes_in(state, "size", "TensorStorageMetadata"), tuple(boxes))


def _same_cover(boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> bool:
    """Whether boxes cover a shape, every element once.

    Going from a box's corner outwards, the number of boxes that an element lies in changes by +1 or -1: by the signs
    of the inclusion-exclusion rule. Those signed corners determine the numbers everywhere, so the boxes are a cover if
    theirs are those of the whole. That takes time in proportion to the boxes, also where a file is made to take long.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    whole = ((0,) * len(shape), shape)
    for weight, (offsets, sizes) in [(-1, whole), *((1, box) for box in boxes)]:
        for picks in itertools.product((0, 1), repeat=len(shape)):
            corner = tuple(first + size * pick for first, size, pick in zip(offsets, sizes, picks, strict=True))
            corners[corner] += weight * (-1) ** sum(picks)
    return not any(corners.values())
