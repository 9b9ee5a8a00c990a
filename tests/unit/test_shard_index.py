"""The index of a folder of shards: read as data, whatever is in it."""

from __future__ import annotations

import itertools
import os
import pathlib
import pickle
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what an index holds, and no public name has
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from hstu_compile.distributed_checkpoint import ShardFolder
from hstu_compile.errors import CheckpointError
from hstu_compile.pickled_records import MalformedPickleError, RefusedGlobalError, read_records
from hstu_compile.shard_index import Chunk, ShardedTensor, read_index
from tests.sharded_checkpoints import read_metadata, row_wise, save_shares, write_metadata


def saved(folder: Path) -> Path:
    state = {("model", "a"): torch.arange(12.0).reshape(4, 3), ("model", "b"): torch.ones(5)}
    return save_shares(folder / "ckpt", row_wise(state, 2))


def refusal(folder: Path, code: str, *seen: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_index(folder)
    assert caught.value.code == code, str(caught.value)
    for text in seen:
        assert text in str(caught.value), f"{text!r} is not in: {caught.value}"
    return caught.value


# --- What plain data is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, False, 0, -1, 255, 256, 65536, -(2**31), 2**31, 2**62, -(2**62), 1.5, float("inf")],
        ["", "a", "\u00e4\u20ac", "x" * 300, "x" * 70_000],
        {"a": {"b": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}, 3: "c"},
        [list(range(3000)), {str(index): index for index in range(3000)}],
        [["shared"]] * 3,
    ],
    ids=["None", "numbers", "texts", "nested", "long", "shared"],
)
def test_plain_data_is_what_pickle_reads(value: Any, protocol: int) -> None:
    assert read_records(pickle.dumps(value, protocol), (), {}) == value


class Known:
    """A class whose objects are records."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("it was unpickled")


def test_objects_are_records_and_no_code_of_theirs_runs() -> None:
    record = read_records(pickle.dumps(Known([1])), [(__name__, "Known")], {})
    assert (record.kind, record.state) == ("Known", {"value": [1]})
    with pytest.raises(RefusedGlobalError, match="Known"):
        read_records(pickle.dumps(Known([1])), [], {})
    with pytest.raises(MalformedPickleError, match="EMPTY_SET"):
        read_records(pickle.dumps({1, 2}), [], {})


# --- An index that wants to run code ----------------------------------------------------------------------------------


class Bomb:
    """Unpickling it would create the file `fired`, or fetch a method."""

    def __init__(self, fired: Path, how: str) -> None:
        self.fired, self.how = fired, how

    def __reduce__(self) -> tuple[Any, ...]:
        command = f"touch {self.fired}"
        if self.how == "getattr":
            return getattr, (torch.Size, "count")
        if self.how == "eval":
            return eval, (f"__import__('os').system({command!r})",)
        if self.how == "nested":
            return torch.Size, ((Bomb(self.fired, "system"),),)
        return os.system, (command,)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("system", "posix.system"),
        ("nested", "posix.system"),
        ("eval", "builtins.eval"),
        ("getattr", "builtins.getattr"),
    ],
)
@pytest.mark.parametrize("where", ["whole", "planner", "entry", "storage", "meta", "size", "key"])
def test_index_that_names_code_runs_nothing(tmp_path: Path, how: str, name: str, where: str) -> None:
    folder, fired = saved(tmp_path), tmp_path / "fired"
    metadata: Any = read_metadata(folder)
    bomb, entry = Bomb(fired, how), metadata.state_dict_metadata["model.a"]
    if where == "whole":
        metadata = bomb
    elif where == "planner":
        metadata.planner_data = {"a": [({"b": bomb},)]}
    elif where == "entry":
        metadata.state_dict_metadata["model.a"] = bomb
    elif where == "storage":
        metadata.storage_data[next(iter(metadata.storage_data))] = bomb
    elif where == "meta":
        metadata.storage_meta.checkpoint_id = bomb
    elif where == "size":
        entry.size = bomb
    else:
        metadata.storage_data[bomb] = 1
    write_metadata(folder, metadata)
    refusal(folder, "HSTU-E102", str(folder / ".metadata"), "could run code", name)
    assert not fired.exists()


def test_torchs_own_reader_would_run_it(tmp_path: Path) -> None:
    """Without this the tests above would show nothing."""
    write_metadata(tmp_path / "ckpt", Bomb(tmp_path / "fired", "system"))
    assert pickle.loads((tmp_path / "ckpt" / ".metadata").read_bytes()) == 0  # noqa: S301, TID251
    assert (tmp_path / "fired").exists()


DEEP = b"\x85" * 100_000


@pytest.mark.parametrize(
    ("content", "code", "seen"),
    [
        (b"cos\nsystem\n(S'touch fired'\ntR.", "HSTU-E102", "os.system"),
        (b"(S'touch fired'\nios\nsystem\n.", "HSTU-E101", "STRING"),
        (b"(\x8c\x05touchios\nsystem\n.", "HSTU-E102", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x86R.", "HSTU-E102", "builtins.getattr"),
        (b"\x80\x04\x8c\x05torch\x8c\x04load\x93.", "HSTU-E102", "torch.load"),
        (b"\x80\x04\x8c\x05torch\x8c\x08\x1b[2J_foo\x93.", "HSTU-E102", "torch.\\x1b[2J_foo"),
        (b"\x80\x04\x8c\x05torch\x8c\x04Size\x93}b.", "HSTU-E101", "an operation on a Record has none"),
        (b"\x80\x04\x8c\x05torch\x8c\x04Size\x93)\x81.", "HSTU-E101", "Size is not made so"),
        (b"\x80\x04\x8c\x05torch\x8c\x07float32\x93)R.", "HSTU-E101", "float32 is not called so"),
        (b"\x80\x04\x8c\x05torch\x8c\x04Size\x93.", "HSTU-E101", "a Metadata is a tuple"),
        (b"\x80\x04\x8c\x05torch\x8c\x04Size\x93)\x85NR.", "HSTU-E101", "an operation on a _Named has none"),
        (b"\x80\x04K\x01K\x02\x93.", "HSTU-E101", "named by something else than text"),
        (b"\x80\x04P1\n.", "HSTU-E101", "PERSID"),
        (b"\x80\x04\x82\x01.", "HSTU-E101", "EXT1"),
        (b"\x80\x04})" + DEEP + b"K\x01s.", "HSTU-E101", "a tuple is the key of a dict"),
        (b"\x80\x04)" + DEEP + b".", "HSTU-E101", "a Metadata is a tuple"),
        (b"\x80\x04K\x01r\xff\xff\xff\xff.", "HSTU-E101", "a Metadata is a int"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "HSTU-E101", "bytes"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "HSTU-E101", "expected"),
        (b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".", "HSTU-E101", "more than 64 bits"),
        (b"\x80\x04\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20 + b".", "HSTU-E101", "LONG4"),
        (b"\x80\x04\x8c\x03\xed\xa0\x80.", "HSTU-E101", "surrogate"),
        (b"\x80\x04]\x94h\x00a.", "HSTU-E101", "a Metadata is a list"),
        (b"\x80\x04t.", "HSTU-E101", "IndexError"),
        (b"\x80\x04h\x05.", "HSTU-E101", "KeyError"),
        (b"\x80\x040.", "HSTU-E101", "POP"),
        (b"\x80\x04a.", "HSTU-E101", "lacks its operands"),
        (b"(.", "HSTU-E101", "in the middle"),
        (b".", "HSTU-E101", "in the middle"),
        (b"", "HSTU-E101", "exhausted"),
        (b'{"weight_map": {}}', "HSTU-E101", "opcode"),
    ],
    ids=itertools.count(),
)
def test_pickles_made_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, code: str, seen: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    assert "\x1b" not in str(refusal(tmp_path, code, seen))
    assert not (tmp_path / "fired").exists()


def test_damaged_index_is_refused_or_read(tmp_path: Path) -> None:
    original, rng = (saved(tmp_path) / ".metadata").read_bytes(), random.Random(3)
    refused = 0
    for number in range(800):
        content = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] ^= rng.randint(1, 255)
        if number % 5 == 0:
            del content[rng.randrange(len(content)) :]
        (tmp_path / ".metadata").write_bytes(content)
        try:
            read_index(tmp_path)
        except CheckpointError as error:
            refused += 1
            str(error).encode()
    assert refused > 350


# --- Other versions, and large ones -----------------------------------------------------------------------------------


def test_index_of_an_older_torch_has_fewer_fields(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    reference, metadata = read_index(folder), read_metadata(folder)
    for name in ("storage_meta", "version", "planner_data"):
        delattr(metadata, name)
    write_metadata(folder, metadata)
    index = read_index(folder)
    assert index.tensors == reference.tensors
    assert index.path_of("model.a") == ("model.a",)
    assert reference.path_of("model.a") == ("model", "a")


def test_two_classes_were_elsewhere_in_older_torch(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    reference, metadata = read_index(folder), read_metadata(folder)
    content = pickle.dumps(metadata, protocol=2)  # where every class is named in full
    here, there = b"ctorch.distributed.checkpoint.metadata\n", b"ctorch.distributed._shard.sharded_tensor.metadata\n"
    for old, new in (
        (b"TensorProperties\n", b"TensorProperties\n"),
        (b"_MEM_FORMAT_ENCODING\n", b"MEM_FORMAT_ENCODING\n"),
    ):
        assert here + old in content
        content = content.replace(here + old, there + new)
    (folder / ".metadata").write_bytes(content)
    assert read_index(folder) == reference


def test_python_3_11_2_writes_members_of_enums_by_getattr(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    reference, metadata = read_index(folder), read_metadata(folder)
    content = pickle.dumps(metadata, protocol=2)
    start = content.index(b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n")
    named_end = content.index(b"K\x00\x85", start)
    end = content.index(b"R", named_end)
    owner = content[start:named_end]
    called = b"cbuiltins\ngetattr\n" + owner + b"X\x17\x00\x00\x00TORCH_CONTIGUOUS_FORMAT\x86"
    (folder / ".metadata").write_bytes(content[:start] + called + content[end:])
    assert read_index(folder) == reference


def test_path_it_was_saved_to_is_of_no_interest(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    reference, metadata = read_index(folder), read_metadata(folder)
    assert metadata.storage_meta is not None
    for place in (pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("C:/a"), "s3://a", None):
        metadata.storage_meta.checkpoint_id = place
        write_metadata(folder, metadata)
        assert read_index(folder) == reference


def test_index_of_many_chunks_takes_seconds(tmp_path: Path) -> None:
    """Comparing every chunk with every other would take hours where a file is made to."""
    count = 5000
    chunks = [ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([1, 4])) for row in range(count)]
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([count, 4]), chunks)
    # All of them in the same bytes, which is refused as well.
    places = {MetadataIndex("t", chunk.offsets): _StorageInfo("__0_0.distcp", 0, 100) for chunk in chunks}
    write_metadata(tmp_path / "ckpt", Metadata({"t": entry}, {"t": ("t",)}, places))
    (tmp_path / "ckpt" / "__0_0.distcp").write_bytes(b"0" * 100)
    started = time.monotonic()
    folder = ShardFolder(tmp_path / "ckpt")
    assert folder.index.tensors["t"].layout_problem() is None
    with pytest.raises(CheckpointError, match="are those of t as well"):
        folder.tensors(["t"])
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("shape", "boxes", "problem"),
    [
        ((), [((), ())], None),
        ((), [], "missing"),
        ((), [((), ())] * 2, "overlap"),
        ((0, 3), [], None),
        ((0, 3), [((0, 0), (0, 3))], None),
        ((4,), [((0,), (4,)), ((4,), (0,))], None),
        ((4, 4), [((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 2), (2, 2))], None),
        # As many elements as the tensor: one row twice, another never.
        ((4, 4), [((0, 0), (2, 4)), ((1, 0), (2, 4))], "overlap"),
        # A pinwheel around a hole of one element.
        ((3, 3), [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1))], "missing"),
        ((3, 3), [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))], None),
        ((4,), [((0,), (5,))], "outside"),
        ((4,), [((0, 0), (4, 1))], "dimensions"),
        ((1,) * 9, [((0,) * 9, (1,) * 9)], "9 dimensions"),
    ],
    ids=itertools.count(),
)
def test_chunks_cover_a_tensor_exactly_once(shape: Any, boxes: Any, problem: str | None) -> None:
    found = ShardedTensor("float32", shape, tuple(Chunk(*box, None) for box in boxes)).layout_problem()
    assert found is None if problem is None else found is not None and problem in found


def test_cover_is_that_of_counting_every_element() -> None:
    rng = random.Random(11)
    verdicts = set()
    for _ in range(400):
        shape = tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 3)))
        counts, boxes = torch.zeros(shape), []
        for _ in range(rng.randint(1, 3)):
            offsets = tuple(rng.randrange(size) for size in shape)
            sizes = tuple(rng.randint(1, size - first) for first, size in zip(offsets, shape, strict=True))
            boxes.append(Chunk(offsets, sizes, None))
            counts[tuple(slice(a, a + b) for a, b in zip(offsets, sizes, strict=True))] += 1
        covered = bool((counts == 1).all())
        verdicts.add(covered)
        assert (ShardedTensor("float32", shape, tuple(boxes)).layout_problem() is None) is covered
    assert verdicts == {True, False}
