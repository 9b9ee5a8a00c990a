"""Requests of the graph append: whole histories cut so that nothing is lost, doubled or too fresh."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hstu_compile.calibration.append_batches import append_arrays, most_cached_rows
from hstu_compile.calibration.batches import retrieval_batch, retrieval_batches
from tests.exported_models import small_config

LENGTHS = [9, 5, 0, 1, 2, 7]
# New events of each user, as many as there are up to 4, none, one, in turn: and the one before them once more.
COMPUTED = [5, 1, 0, 1, 1, 2]
CONFIG = small_config(preprocessor="rated", item_embedding_dim=24, num_ratings=5)


def test_every_event_is_cached_or_computed_and_the_last_one_is_computed() -> None:
    whole = retrieval_batch("drawn", CONFIG, LENGTHS, seed=1).arrays
    total = sum(LENGTHS)
    key_values = {"k_0": np.arange(total * 2).reshape(total, 2, 1), "v_0": np.arange(total).reshape(total, 1, 1)}
    found = append_arrays(CONFIG, whole, key_values, 4, top_k=3)
    assert np.diff(found["seq_offsets"]).tolist() == COMPUTED
    assert (np.diff(found["seq_offsets"]) + np.diff(found["cache_offsets"])).tolist() == LENGTHS
    np.testing.assert_array_equal(found["request_timestamps"], whole["request_timestamps"])

    def part(user: int, name: str, offsets: str) -> np.ndarray:
        return found[name][found[offsets][user] : found[offsets][user + 1]]

    for user in range(len(LENGTHS)):
        of_user = slice(whole["seq_offsets"][user], whole["seq_offsets"][user + 1])
        for name in ("item_ids", "timestamps"):
            joined = np.concatenate([part(user, f"cached_{name}", "cache_offsets"), part(user, name, "seq_offsets")])
            np.testing.assert_array_equal(joined, whole[name][of_user])
        np.testing.assert_array_equal(
            part(user, "ratings", "seq_offsets"), whole["ratings"][of_user][LENGTHS[user] - COMPUTED[user] :]
        )
        kept = slice(of_user.start, of_user.stop - COMPUTED[user])
        for name, rows in key_values.items():
            np.testing.assert_array_equal(part(user, name, "cache_offsets"), rows[kept])
    assert {found[name].dtype.name for name in ("seq_offsets", "cache_offsets", "item_ids")} == {"int32"}


@pytest.mark.parametrize(("time_bias", "top_k"), [("none", 0), ("next", 0), ("none", 3)])
def test_only_what_the_graph_takes_is_told_of_cached_events(time_bias: str, top_k: int) -> None:
    timeless = {"time_bias": "none", "num_time_buckets": 0, "time_bucket_divisor": 1.0}
    config = small_config(2, timeless if time_bias == "none" else None)
    found = append_arrays(config, retrieval_batch("drawn", config, LENGTHS, seed=1).arrays, {}, 4, top_k)
    assert ("cached_timestamps" in found) == (time_bias == "next")
    assert ("cached_item_ids" in found) == bool(top_k)
    assert "ratings" not in found


def test_batches_have_no_more_rows_than_may_be_stored() -> None:
    config = small_config(2)
    assert most_cached_rows(config) == (1 << 24) // (8 * 2 * 2 * 50)
    wide = dataclasses.replace(config, num_layers=1 << 12)
    rows = most_cached_rows(wide)
    assert rows < config.max_seq_len * 2
    for limit in (rows, 13, 2):
        batches = retrieval_batches(config, 64, 8, 1 << 24, seed=0, max_rows=limit)
        assert [batch.name for batch in batches][2] == ("longest" if limit >= 20 else f"{limit} events")
        assert all(batch.lengths.sum() <= limit for batch in batches)
    unlimited = retrieval_batches(config, 64, 8, 1 << 24, seed=0)
    assert max(batch.lengths.sum() for batch in unlimited) > rows
    assert [len(batch.lengths) for batch in unlimited] == [1, 8, 2, 64]
