from __future__ import annotations

import numpy as np
import pytest

from hstu_compile.calibration.batches import RequestBatch, retrieval_batch, retrieval_batches, stratified_lengths
from hstu_compile.model.config import RetrievalConfig
from hstu_compile.runtime.request import RequestLimits, check_request
from tests.exported_models import small_config

RATED = small_config(preprocessor="rated", item_embedding_dim=24, num_ratings=5)


def limits_of(config: RetrievalConfig, max_batch: int = 64) -> RequestLimits:
    return RequestLimits(config.num_items, config.num_ratings, max_batch, config.max_seq_len)


@pytest.mark.parametrize("config", [small_config(), RATED], ids=["positional", "rated"])
@pytest.mark.parametrize("lengths", [[1], [0], [20, 0, 3], [0, 0]], ids=str)
def test_a_batch_is_a_legal_request_of_the_given_lengths(config: RetrievalConfig, lengths: list[int]) -> None:
    batch = retrieval_batch("drawn", config, lengths, seed=3)
    assert batch.lengths.tolist() == lengths
    checked = check_request(batch.arrays, limits_of(config))
    assert all(checked[name].dtype == array.dtype for name, array in batch.arrays.items())
    assert ("ratings" in batch.arrays) == config.has_ratings


def test_the_same_seed_gives_the_same_batch_and_another_seed_another() -> None:
    first, again, other = (retrieval_batch("drawn", small_config(), [9, 4], seed) for seed in (5, 5, 6))
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[name])
    assert (first.arrays["item_ids"] != other.arrays["item_ids"]).any()


def test_event_times_cover_seconds_to_months() -> None:
    batch = retrieval_batch("long", small_config(), [400], seed=1)
    gaps = np.diff(batch.arrays["timestamps"])
    assert gaps.min() < 60
    assert gaps.max() > 30 * 86400


@pytest.mark.parametrize(("count", "longest"), [(1, 1), (7, 200), (5, 3), (20, 20)])
def test_stratified_lengths_are_in_range_and_spread(count: int, longest: int) -> None:
    lengths = stratified_lengths(count, longest, seed=0)
    assert len(lengths) == count
    assert 1 <= min(lengths) <= max(lengths) <= longest
    strata = [min(count - 1, (length - 1) * count // longest) for length in sorted(lengths)]
    if longest >= count:
        assert strata == list(range(count))


def by_name(batches: list[RequestBatch]) -> dict[str, RequestBatch]:
    return {batch.name: batch for batch in batches}


def test_the_batches_of_a_profile_reach_its_edges() -> None:
    config = small_config()
    batches = by_name(retrieval_batches(config, max_batch=64, opt_batch=8, max_scores=1 << 24))
    assert batches["one event"].lengths.tolist() == [1]
    assert 0 in batches["mixed lengths"].lengths
    assert len(batches["mixed lengths"].lengths) == 8
    assert batches["longest"].lengths.tolist() == [20, 20]
    assert len(batches["most sequences"].lengths) == 64
    for batch in batches.values():
        check_request(batch.arrays, limits_of(config))


def test_a_profile_of_one_sequence_gets_batches_of_one_sequence() -> None:
    batches = retrieval_batches(small_config(), max_batch=1, opt_batch=1, max_scores=1 << 24)
    assert {len(batch.lengths) for batch in batches} == {1}
    assert max(int(batch.lengths.max()) for batch in batches) == 20


def test_a_profile_of_millions_of_sequences_does_not_take_the_memory_of_them() -> None:
    config = small_config(attention={"num_heads": 1})
    batches = retrieval_batches(config, max_batch=1 << 31, opt_batch=1 << 28, max_scores=1 << 24)
    # The model compares every row with the end of every sequence.
    assert max(len(batch.lengths) * int(batch.lengths.sum()) for batch in batches) <= 1 << 26
    assert len(batches[-1].lengths) > 2000


def test_batches_shrink_to_what_is_affordable_and_none_is_left_out() -> None:
    config = small_config()
    scores = config.layer.attention.num_heads * config.max_seq_len**2
    batches = retrieval_batches(config, max_batch=64, opt_batch=8, max_scores=3 * scores)
    assert [batch.name for batch in batches] == ["one event", "mixed lengths", "longest", "most sequences"]
    assert max(len(batch.lengths) for batch in batches) <= 3
    assert max(int(batch.lengths.max()) for batch in batches) == 20
