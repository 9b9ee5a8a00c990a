"""Recorded requests: how they divide into users, which are drawn, what is refused and what is warned about."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hstu_compile.calibration.batches import retrieval_batch
from hstu_compile.calibration.data_warnings import FEW_REQUESTS, data_warnings
from hstu_compile.calibration.ranking_batches import ranking_batch
from hstu_compile.calibration.recorded_requests import RecordedRequests, RequestFile, recorded_requests
from hstu_compile.calibration.request_layout import Arrays, request_layout
from hstu_compile.errors import CalibrationError
from hstu_compile.model.families import ModelConfig
from tests.dlrm_reference import DlrmForm
from tests.exported_models import ranking_config, small_config

RETRIEVAL = small_config()
RATED = small_config(preprocessor="rated", num_ratings=6, item_embedding_dim=24)
RANKING = ranking_config(DlrmForm(contextual=(("user_id", 1, 0), ("topics", 3, 0))))
EXTERNAL = ranking_config(DlrmForm(), external_embeddings=True)
CONFIGS = {"retrieval": RETRIEVAL, "rated": RATED, "ranking": RANKING, "external": EXTERNAL}


def batch_of(config: ModelConfig, lengths: list[int], seed: int = 0) -> Arrays:
    if hasattr(config, "num_items"):
        return retrieval_batch("", config, lengths, seed).arrays  # type: ignore[arg-type]
    counts = [(3 * index + 1) % 4 for index in range(len(lengths))]
    return ranking_batch("", config, lengths, counts, seed).arrays  # type: ignore[arg-type]


def file_of(arrays: Arrays, name: str = "a.npz") -> RequestFile:
    return RequestFile(name, f"sha of {name}", arrays)


def requests_of(config: ModelConfig, lengths: list[int], seed: int = 0) -> RecordedRequests:
    return recorded_requests([file_of(batch_of(config, lengths, seed))], config)


def users_of(config: ModelConfig, arrays: Arrays) -> list[dict[str, bytes]]:
    """Each user's own values, sliced one by one."""
    layout = request_layout(config)
    users = []
    for user in range(len(arrays["seq_offsets"]) - 1):
        own = {}
        for offsets, names in layout.jagged.items():
            for name in names:
                own[name] = arrays[name][arrays[offsets][user] : arrays[offsets][user + 1]].tobytes()
        for name, count in layout.per_user.items():
            own[name] = arrays[name][user * count : (user + 1) * count].tobytes()
        users.append(own)
    return users


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_taken_users_are_the_users(config: ModelConfig, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=6))
    requests = requests_of(config, lengths)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    feeds = requests.feeds(np.array(chosen))
    whole = users_of(config, batch_of(config, lengths))
    assert users_of(config, feeds) == [whole[user] for user in chosen]
    given_types = {name: array.dtype for name, array in batch_of(config, lengths).items()}
    assert {name: array.dtype for name, array in feeds.items()} == given_types


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_files_are_joined_in_order_and_an_empty_one_adds_nobody(config: ModelConfig) -> None:
    parts = [batch_of(config, [3, 0], 1), batch_of(config, [], 2), batch_of(config, [4], 3)]
    files = [file_of(arrays, f"{index}.npz") for index, arrays in enumerate(parts)]
    requests = recorded_requests(files, config)
    joined = [user for arrays in parts for user in users_of(config, arrays)]
    assert users_of(config, requests.feeds(np.arange(3))) == joined
    assert [data.requests for data in requests.provenance(np.array([2, 0]), 5)] == [2, 0, 1]
    assert [data.samples for data in requests.provenance(np.array([2, 0]), 5)] == [1, 0, 1]
    assert {data.seed for data in requests.provenance(np.array([2, 0]), 5)} == {5}
    assert requests.names(np.array([2, 1, 0])) == "requests 0 of 2.npz, 1 of 0.npz, 0 of 0.npz"
    assert requests.names(np.array([2])) == "request 0 of 2.npz"


def test_labels_in_the_file_are_left_alone() -> None:
    arrays = batch_of(RETRIEVAL, [3, 2])
    labelled = recorded_requests([file_of({**arrays, "target_ids": np.array([1, 2])})], RETRIEVAL)
    assert "target_ids" not in labelled.feeds(np.arange(2))


@given(st.lists(st.integers(0, 20), min_size=2, max_size=60), st.integers(2, 30), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_a_sample_has_one_user_of_each_part_in_order_of_length(lengths: list[int], count: int, seed: int) -> None:
    requests = requests_of(RETRIEVAL, lengths)
    users = requests.sample(count, seed)
    drawn = np.array(lengths)[users]
    assert len(users) == len(set(users.tolist())) == min(count, len(lengths))
    assert (np.diff(drawn) >= 0).all()
    assert (requests.sample(count, seed) == users).all()
    ordered = sorted(lengths)
    for index, length in enumerate(drawn):
        low, high = (len(lengths) * each // len(users) for each in (index, index + 1))
        assert ordered[low] <= length <= ordered[high - 1]


def test_another_seed_draws_other_users() -> None:
    requests = requests_of(RETRIEVAL, [5] * 200)
    assert set(requests.sample(20, 0).tolist()) != set(requests.sample(20, 1).tolist())


def test_batches_hold_every_user_once_and_stay_within_bounds() -> None:
    config = small_config(attention={"max_seq_len": 2000, "pos_table_len": 2000}, num_positions=2000)
    lengths = [int(length) for length in np.random.default_rng(0).integers(0, 2001, 120)]
    requests = requests_of(config, lengths)
    users = requests.sample(1000, 0)
    batches = requests.batches(users)
    assert np.concatenate(batches).tolist() == users.tolist()
    heads = config.layer.attention.num_heads
    for batch in batches:
        longest = max(lengths[user] for user in batch)
        assert len(batch) == 1 or len(batch) * longest**2 * heads <= 1 << 22
        assert len(batch) == 1 or len(batch) * longest <= 1 << 14
    assert len(batches[0]) > 4 > len(batches[-1])


def test_a_request_to_a_model_that_divides_by_the_batch_is_its_own_batch() -> None:
    assert RANKING.scaling == "batch"
    requests = requests_of(RANKING, [3, 4, 5, 6])
    assert [len(batch) for batch in requests.batches(requests.sample(9, 0))] == [1, 1, 1, 1]
    fixed = dataclasses.replace(RANKING, scaling="fixed")
    requests = recorded_requests([file_of(batch_of(fixed, [3, 4, 5, 6]))], fixed)
    assert [len(batch) for batch in requests.batches(requests.sample(9, 0))] == [4]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"timestamps": None, "item_ids": None}, "missing: item_ids, timestamps"),
    "unknown": ({"clicks": np.arange(5)}, "not inputs of this model: clicks"),
    "float ids": ({"item_ids": np.array([1.0, 2.0, 3.0, 4.0, 5.0])}, "item_ids is float64; it must hold whole numbers"),
    "rank": ({"item_ids": np.ones((5, 2), np.int32)}, r"item_ids has shape \[5, 2\]; it must be \[n\]"),
    "large id": ({"item_ids": np.array([1, 2, 3, 4, 41])}, r"item_ids are 1\.\.41; allowed: 0\.\.40"),
    "negative id": ({"item_ids": np.array([-1, 2, 3, 4, 4])}, r"item_ids are -1\.\.4"),
    "huge": ({"timestamps": np.array([1, 2, 3, 4, 2**64 - 1], np.uint64)}, "timestamps are 1..18446744073709551615"),
    "short array": ({"timestamps": np.arange(4)}, "timestamps has 4 entries, and seq_offsets ends at 5"),
    "descending": ({"seq_offsets": np.array([0, 6, 5])}, "seq_offsets does not ascend from 0"),
    "late start": ({"seq_offsets": np.array([1, 2, 5])}, "seq_offsets does not ascend from 0"),
    "users": ({"request_timestamps": np.arange(3)}, "request_timestamps has 3 entries; 2 users need 2"),
    "long": (
        {
            "seq_offsets": np.array([0, 1, 25]),
            "item_ids": np.ones(25, np.int32),
            "timestamps": np.arange(25),
        },
        "user 1 has 24 events; the model takes at most 20",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_arrays_that_are_no_requests_are_refused(fault: str) -> None:
    changes, message = FAULTS[fault]
    arrays = {**batch_of(RETRIEVAL, [2, 3]), **changes}
    kept = {name: array for name, array in arrays.items() if array is not None}
    with pytest.raises(CalibrationError, match=message) as caught:
        recorded_requests([file_of(kept, "mine.npz")], RETRIEVAL)
    assert caught.value.code == "HSTU-E810"
    assert "mine.npz" in caught.value.why


def test_requests_to_another_family_are_recognised() -> None:
    with pytest.raises(CalibrationError, match=r"missing: item_ids(?s:.*)look like requests to a ranking model"):
        recorded_requests([file_of(batch_of(RANKING, [2, 3]))], RETRIEVAL)
    with pytest.raises(CalibrationError, match=r"missing: movie_id(?s:.*)look like requests to a retrieval model"):
        recorded_requests([file_of(batch_of(RETRIEVAL, [2, 3]))], RANKING)


def test_ids_in_the_place_of_rows_and_rows_that_are_not_finite_are_refused() -> None:
    arrays = batch_of(EXTERNAL, [2, 3])
    with pytest.raises(CalibrationError, match=r"movie_id has shape \[5\]; it must be \[n, 6\]"):
        recorded_requests([file_of({**arrays, "movie_id": np.arange(5)})], EXTERNAL)
    arrays["movie_id"][3, 2] = np.nan
    with pytest.raises(CalibrationError, match="movie_id holds 1 numbers that are NaN or infinite"):
        recorded_requests([file_of(arrays)], EXTERNAL)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_data_and_one_sample_are_refused(config: ModelConfig, count: int) -> None:
    arrays = batch_of(config, [3] * count)
    with pytest.raises(CalibrationError, match=f"has {count} request(?s:.*)at least 2 are needed") as caught:
        recorded_requests([file_of(arrays)], config)
    assert caught.value.code == "HSTU-E810"


def test_arrays_without_any_entry_are_no_data() -> None:
    arrays = {name: np.array([]) for name in batch_of(RETRIEVAL, [1])}
    with pytest.raises(CalibrationError, match="seq_offsets has 0 entries"):
        recorded_requests([file_of(arrays)], RETRIEVAL)


def test_the_same_file_twice_is_refused() -> None:
    file = file_of(batch_of(RETRIEVAL, [2, 3]))
    with pytest.raises(CalibrationError, match=r"a\.npz and b\.npz have the same content") as caught:
        recorded_requests([file, dataclasses.replace(file, name="b.npz")], RETRIEVAL)
    assert caught.value.code == "HSTU-E815"


def skewed(users: int, seed: int, vocabulary: int = 40) -> Arrays:
    """Histories of 20 events whose ids are as popular as 1 / rank."""
    arrays = batch_of(RETRIEVAL, [20] * users, seed)
    popularity = 1 / np.arange(1, vocabulary + 1)
    drawn = np.random.default_rng(seed).choice(vocabulary, 20 * users, p=popularity / popularity.sum()) + 1
    return {**arrays, "item_ids": drawn.astype(np.int32)}


def warned(arrays: Arrays) -> list[str]:
    return data_warnings(arrays, request_layout(RETRIEVAL))


def test_skewed_ids_with_ascending_times_are_not_warned_about() -> None:
    assert [warned(skewed(users, seed)) for users in (FEW_REQUESTS, 200) for seed in range(50)] == [[]] * 100


def test_uniform_ids_look_random_every_time() -> None:
    for users in (FEW_REQUESTS, 200):
        for seed in range(100):
            [warning] = warned(batch_of(RETRIEVAL, [20] * users, seed))
            assert "item_ids are spread evenly over 1..40" in warning


def test_too_few_events_tell_nothing_about_randomness() -> None:
    arrays = batch_of(RETRIEVAL, [1] * 60)
    assert warned(arrays) == []


def test_random_times_are_warned_about_and_counted() -> None:
    arrays = skewed(40, 0)
    times: NDArray[np.int64] = np.random.default_rng(0).permutation(arrays["timestamps"])
    inside = np.diff(times.reshape(40, 20), axis=1)
    [warning] = warned({**arrays, "timestamps": times})
    assert f"go back in {(inside < 0).sum()} of {inside.size} steps" in warning


def test_the_step_from_one_user_to_the_next_has_no_order() -> None:
    arrays = skewed(40, 0)
    assert (np.diff(arrays["timestamps"]) < 0).any()
    assert warned(arrays) == []


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_constant_data_are_warned_about(share: float) -> None:
    arrays = skewed(100, 0)
    same = arrays["item_ids"].reshape(100, 20).copy()
    same[: int(share * 100)] = same[0]
    [warning] = warned({**arrays, "item_ids": same.reshape(-1)})
    assert f"{int(share * 100)} of 100 requests have the same history" in warning
    ids = arrays["item_ids"].copy()
    ids[: int(0.6 * len(ids))] = 7
    [warning] = warned({**arrays, "item_ids": np.random.default_rng(0).permutation(ids)})
    assert "events have the id 7" in warning


def test_few_requests_are_warned_about() -> None:
    [warning] = warned(skewed(FEW_REQUESTS - 1, 0))
    assert "only 31 requests" in warning


def test_ranking_requests_are_tested_by_their_first_id() -> None:
    arrays = batch_of(RANKING, [20] * 100)
    [warning] = data_warnings(arrays, request_layout(RANKING))
    assert "movie_id are spread evenly" in warning
    external = batch_of(EXTERNAL, [20] * 100)
    assert data_warnings(external, request_layout(EXTERNAL)) == []
