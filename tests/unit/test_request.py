"""Requests: legal ones pass unchanged, every fault is named with its place and value."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hstu_compile.errors import RequestError
from hstu_compile.runtime.request import RequestLimits, check_request, feeds_from_npz

LIMITS = RequestLimits(num_items=100, num_ratings=6, max_batch=4, max_seq_len=10)


def legal() -> dict[str, NDArray[Any]]:
    return {
        "item_ids": np.array([1, 2, 3, 100, 0], np.int32),
        "timestamps": np.array([10, 20, 20, 5, 6], np.int64),
        "seq_offsets": np.array([0, 3, 3, 5], np.int32),
        "request_timestamps": np.array([20, 0, 7], np.int64),
        "ratings": np.array([0, 5, 1, 2, 3], np.int32),
    }


def refused(code: str, match: str, **changes: Any) -> RequestError:
    feeds = {**legal(), **changes}
    with pytest.raises(RequestError, match=match) as caught:
        check_request({name: array for name, array in feeds.items() if array is not None}, LIMITS)
    assert caught.value.code == code
    assert caught.value.context["problems"]
    return caught.value


@given(
    lengths=st.lists(st.integers(0, 10), min_size=1, max_size=4),
    dtype=st.sampled_from([np.int16, np.int32, np.int64, np.uint64]),
    data=st.data(),
)
def test_a_legal_request_passes_with_the_models_dtypes(lengths: list[int], dtype: Any, data: st.DataObject) -> None:
    total = sum(lengths)
    ids = data.draw(st.lists(st.integers(0, 100), min_size=total, max_size=total))
    times = [sorted(data.draw(st.lists(st.integers(0, 2**14), min_size=n, max_size=n))) for n in lengths]
    feeds = {
        "item_ids": np.array(ids, dtype),
        "timestamps": np.array([t for row in times for t in row], dtype),
        "seq_offsets": np.cumsum([0, *lengths]).astype(dtype),
        "request_timestamps": np.array([row[-1] if row else 0 for row in times], dtype),
        "ratings": np.zeros(total, dtype),
    }
    checked = check_request(feeds, LIMITS)
    assert {name: str(array.dtype) for name, array in checked.items()} == {
        "item_ids": "int32",
        "timestamps": "int64",
        "seq_offsets": "int32",
        "request_timestamps": "int64",
        "ratings": "int32",
    }
    for name, array in checked.items():
        np.testing.assert_array_equal(array, feeds[name])
        assert not np.shares_memory(array, feeds[name])


@given(st.integers(0, 4), st.sampled_from([-1, 101, 2**31 - 1, -(2**31)]))
def test_an_id_outside_the_vocabulary_is_named(index: int, value: int) -> None:
    ids = legal()["item_ids"]
    ids[index] = value
    refused("HSTU-E703", rf"item_ids outside 0\.\.100 at index {index} \({value}\)", item_ids=ids)


@pytest.mark.parametrize(
    ("code", "match", "changes"),
    [
        ("HSTU-E701", "timestamps is missing", {"timestamps": None}),
        ("HSTU-E701", "ratings is missing", {"ratings": None}),
        ("HSTU-E701", "'colour' is not an input", {"colour": np.zeros(1)}),
        ("HSTU-E701", r"item_ids has rank 2, shape \[1, 5\]", {"item_ids": np.ones((1, 5), np.int32)}),
        ("HSTU-E701", "item_ids cannot be read as an array", {"item_ids": [[1], [2, 3]]}),
        ("HSTU-E701", "item_ids has masked values", {"item_ids": np.ma.masked_less([1, 2, 3, 4, 5], 2)}),
        (
            "HSTU-E705",
            "sequence 2: times from -9223372036854775808 to 50 are further apart",
            {"timestamps": np.array([-(2**63), 20, 30, -(2**63), 6]), "request_timestamps": np.array([-5, 0, 50])},
        ),
        ("HSTU-E701", "item_ids is float64", {"item_ids": np.ones(5)}),
        ("HSTU-E701", r"values 1\.\.1099511627776; int32", {"item_ids": np.array([1, 2, 3, 4, 2**40])}),
        ("HSTU-E701", "timestamps holds NaN or infinity at index 2", {"timestamps": np.array([1, 2, np.nan, 3, 4])}),
        ("HSTU-E701", "timestamps has 4 entries and item_ids has 5", {"timestamps": np.arange(4)}),
        ("HSTU-E701", "request_timestamps has 2 entries for 3", {"request_timestamps": np.array([50, 50])}),
        ("HSTU-E702", "seq_offsets has 1 entries", {"seq_offsets": np.array([0])}),
        ("HSTU-E702", "starts at 1", {"seq_offsets": np.array([1, 3, 3, 5])}),
        ("HSTU-E702", "descends at sequence 1, from 4 to 3", {"seq_offsets": np.array([0, 4, 3, 5])}),
        ("HSTU-E702", "ends at 4, and there are 5", {"seq_offsets": np.array([0, 3, 3, 4])}),
        ("HSTU-E703", r"ratings outside 0\.\.5 at index 4 \(6\)", {"ratings": np.array([0, 1, 2, 3, 6])}),
        (
            "HSTU-E705",
            "sequence 0 goes back in time at event 2: 20 then 19",
            {"timestamps": np.array([10, 20, 19, 5, 6])},
        ),
        (
            "HSTU-E705",
            "sequence 2 is asked at 5, before its last event at 6",
            {"request_timestamps": np.array([20, 0, 5])},
        ),
    ],
)
def test_a_fault_is_refused_with_its_place(code: str, match: str, changes: dict[str, Any]) -> None:
    refused(code, match, **changes)


def test_sizes_beyond_the_profile_are_refused() -> None:
    lengths = [11, 0, 1, 0, 0]
    offsets = np.cumsum([0, *lengths])
    error = refused(
        "HSTU-E704",
        "5 sequences; at most 4 fit; sequence 0 has 11 events; at most 10 fit",
        item_ids=np.ones(12, np.int32),
        timestamps=np.arange(12),
        seq_offsets=offsets,
        request_timestamps=np.full(5, 99),
        ratings=np.zeros(12, np.int32),
    )
    assert "split the batch" in error.fix


def test_a_step_back_between_two_sequences_is_legal() -> None:
    check_request(legal(), LIMITS)


def test_all_faults_are_told_at_once() -> None:
    error = refused(
        "HSTU-E703",
        "fault",
        item_ids=np.array([1, 2, 3, 4, 500]),
        timestamps=np.array([30, 20, 20, 5, 6]),
        request_timestamps=np.array([0, 0, 0]),
    )
    assert [p["code"] for p in error.context["problems"]] == ["HSTU-E703", "HSTU-E705", "HSTU-E705", "HSTU-E705"]


def test_a_model_without_ratings_refuses_them() -> None:
    with pytest.raises(RequestError, match="'ratings' is not an input"):
        check_request(legal(), RequestLimits(100, 0, 4, 10))


def test_npz_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    np.savez(path, **legal())
    for name, array in feeds_from_npz(path).items():
        np.testing.assert_array_equal(array, legal()[name])


def unreadable(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "in.npz"
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"item_ids": [1]}))
    elif kind == "objects":
        np.savez(path, item_ids=np.array([{}], dtype=object))
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "truncated":
        np.savez(path, **legal())
        path.write_bytes(path.read_bytes()[:100])
    elif kind in CLAIMED_SHAPES:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<i4", "fortran_order": False, "shape": CLAIMED_SHAPES[kind]}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("item_ids.npy", header.getvalue())
    elif kind != "missing":
        np.savez_compressed(path, **legal())
        content = bytearray(path.read_bytes())
        local = content.index(b"PK\x03\x04")
        data = local + 30 + content[local + 26] + content[local + 28]
        central = content.index(b"PK\x01\x02")
        # A flag, a method, a version of the archive's directory, and the bits that start the compressed data.
        place, value = {
            "encrypted": (central + 8, content[central + 8] | 1),
            "unknown compression": (central + 10, 99),
            "newer zip": (central + 6, 200),
            "damaged stream": (data, 0xFF),
        }[kind]
        content[place] = value
        path.write_bytes(content)
    return path


CLAIMED_SHAPES = {"larger than memory": (10**14,), "larger than an integer": (10**25,)}


@pytest.mark.parametrize(
    "kind",
    [
        *("missing", "text", "empty", "pickle", "objects", "npy", "truncated", *CLAIMED_SHAPES),
        *("encrypted", "unknown compression", "newer zip", "damaged stream"),
    ],
)
def test_a_file_that_is_not_plain_arrays_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RequestError, match="cannot be read as feeds") as caught:
        feeds_from_npz(unreadable(tmp_path, kind))
    assert caught.value.code == "HSTU-E706"
