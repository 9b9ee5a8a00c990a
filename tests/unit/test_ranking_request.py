"""Ranking specifications and requests: legal ones pass, every fault is named, policies do what they say."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_compile.errors import BundleError, RequestError, UsageError
from hstu_compile.runtime.ranking_request import CheckedRequest, RankingPolicy, RankingRequest, checked_requests
from hstu_compile.runtime.ranking_spec import ContextualFeature, IdFeature, RankingSpec
from tests.ranking_cases import replaced, requests
from tests.ranking_fakes import spec_of
from tests.ranking_requests import NOW, request_of

SPEC = spec_of()
EXTERNAL = spec_of(
    history_ids=(IdFeature("movie_id", 50, external_dim=3),),
    candidate_ids=(IdFeature("item_movie_id", 50, external_dim=3),),
    contextual=(ContextualFeature("user_id", 30, 3, 2, 0),),
)


def legal(events: int = 5, candidates: int = 4) -> RankingRequest:
    request = request_of(SPEC, "ann", events, candidates)
    return replaced(request, context={"user_id": [7], "devices": [1, 2]})


def changed(part: str, **values: Any) -> RankingRequest:
    """The legal request with other features in one part; None takes a feature out."""
    merged = {**getattr(legal(), part), **values}
    return replaced(legal(), **{part: {name: value for name, value in merged.items() if value is not None}})


def checked(request: RankingRequest, spec: RankingSpec = SPEC, **policy: Any) -> CheckedRequest:
    return checked_requests([request], spec, RankingPolicy(**policy))[0]


def refused(code: str, match: str, request: RankingRequest, spec: RankingSpec = SPEC, **policy: Any) -> RequestError:
    with pytest.raises(RequestError, match=match) as caught:
        checked(request, spec, **policy)
    assert caught.value.code == code
    assert caught.value.context["problems"]
    return caught.value


class TestSpec:
    @pytest.mark.parametrize("spec", [SPEC, EXTERNAL, spec_of("prefix", scaling="batch", history_action=None)])
    def test_it_survives_the_manifest(self, spec: RankingSpec) -> None:
        assert RankingSpec.from_manifest(json.loads(json.dumps(spec.to_dict()))) == spec

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"history_ids": []}, "at least one id feature"),
            ({"tasks": []}, "tasks"),
            ({"tasks": ["like", "like"]}, "tasks"),
            ({"history_time": "movie_id"}, "must be different"),
            ({"candidate_time": "seq_offsets"}, "seq_offsets cannot name a feature"),
            ({"candidate_time": "k_0"}, "k_0 cannot name a feature"),
            ({"max_history_len": 0}, "max_history_len is 0"),
            ({"micro_batch": True}, "micro_batch is True"),
            ({"num_heads": "2"}, "num_heads is '2'"),
            ({"scaling": "mean"}, "scaling is 'mean'"),
            ({"scaling": 0}, "scaling is 0"),
            ({"scaling": float("nan")}, "scaling is nan"),
            ({"row_dtype": "float64"}, "row_dtype is 'float64'"),
            ({"kv_dtype": "int8"}, "kv_dtype is 'int8'"),
            ({"cache_rule": "always"}, "cache_rule is 'always'"),
            ({"model_version": "1.0"}, "model_version is '1.0'"),
            ({"history_ids": [{"name": "movie_id", "table_size": -1}]}, "table_size of movie_id is -1"),
            ({"history_ids": [{"name": "movie_id"}]}, "IdFeature lacks table_size"),
            ({"history_ids": [{"name": "m", "table_size": 2, "dim": 3}]}, "IdFeature has no dim"),
            ({"history_ids": 3}, "not iterable"),
            ({"contextual": [{"name": "u", "table_size": 2, "max_length": 0}]}, "max_length of u is 0"),
            ({"contextual": [{"name": "u", "table_size": 2, "min_history_len": -1}]}, "min_history_len of u is -1"),
            ({"surprise": 1}, "RankingSpec has no surprise"),
        ],
    )
    def test_an_unusable_manifest_entry_is_refused(self, changes: dict[str, Any], match: str) -> None:
        with pytest.raises(BundleError, match=match) as caught:
            RankingSpec.from_manifest({**SPEC.to_dict(), **changes})
        assert caught.value.code == "HSTU-E803"

    @pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RankingSpec)])
    def test_nothing_may_be_left_out(self, name: str) -> None:
        entry = SPEC.to_dict()
        del entry[name]
        with pytest.raises(BundleError, match=f"RankingSpec lacks {name}"):
            RankingSpec.from_manifest(entry)

    def test_derived_facts(self) -> None:
        assert SPEC.contextual_len == 3
        assert SPEC.has_minimum
        assert not spec_of(counts_candidates=False).has_minimum
        assert not spec_of(contextual=(ContextualFeature("u", 3),)).has_minimum
        assert SPEC.cached_names() == ["k_0", "v_0", "k_1", "v_1"]


class TestLegalRequests:
    @given(requests(SPEC), st.sampled_from([np.int32, np.int64, np.uint64]))
    def test_they_pass_with_the_models_dtypes_in_arrays_of_their_own(self, request: RankingRequest, dtype: Any) -> None:
        parts = {
            part: {name: np.asarray(values).astype(dtype) for name, values in getattr(request, part).items()}
            for part in ("history", "candidates")
        }
        request = replaced(request, **parts)
        found = checked(request)
        for part in ("history", "candidates", "context"):
            for name, values in getattr(request, part).items():
                array = getattr(found, part)[name]
                assert array.dtype == ("int64" if "time" in name else "int32")
                np.testing.assert_array_equal(array, values)
                assert not np.shares_memory(array, values)
        times = request.candidates["item_query_time"]
        assert found.num_events == len(request.history["movie_id"])
        assert found.num_candidates == len(times)
        assert found.request_timestamp == (times[-1] if len(times) else 0)
        assert found.truncated == 0

    def test_plain_lists_and_empty_arrays_pass(self) -> None:
        empty = {name: [] for name in SPEC.history_names}
        found = checked(replaced(legal(), history=empty, candidates={name: [] for name in SPEC.candidate_names}))
        assert found.num_events == found.num_candidates == 0
        assert found.history["movie_id"].dtype == np.int32

    def test_missing_contextual_values_are_absent(self) -> None:
        found = checked(changed("context", user_id=[], devices=[3]))
        np.testing.assert_array_equal(found.context["user_id"], [-1])
        np.testing.assert_array_equal(found.context["devices"], [3, -1])

    def test_a_numpy_integer_names_a_user(self) -> None:
        assert checked(replaced(legal(), user=np.int64(3))).user == 3

    def test_external_rows_pass(self) -> None:
        rows = np.arange(6, dtype=np.float16).reshape(2, 3)
        request = RankingRequest(
            1,
            {"movie_id": rows, "action_timestamp": [1, 2], "item_weights": [1, 1]},
            {"item_movie_id": rows, "item_query_time": [3, 3]},
            {"user_id": rows},
        )
        found = checked(request, EXTERNAL)
        for array in (found.history["movie_id"], found.candidates["item_movie_id"], found.context["user_id"]):
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, rows)


class TestFaults:
    @pytest.mark.parametrize(
        ("code", "match", "request_"),
        [
            ("HSTU-E701", "movie_id is missing in history", changed("history", movie_id=None)),
            ("HSTU-E701", "user_id is missing in context", changed("context", user_id=None)),
            ("HSTU-E701", "item_query_time is missing in cand", changed("candidates", item_query_time=None)),
            (
                "HSTU-E701",
                "'item_action_weights' is not a feature of the model's candidates",
                changed("candidates", item_action_weights=[1, 1, 1, 1]),
            ),
            ("HSTU-E701", r"genre has rank 2, shape \[5, 1\]", changed("history", genre=np.zeros((5, 1), int))),
            ("HSTU-E701", "genre is float64 with values 0.5", changed("history", genre=np.full(5, 0.5))),
            ("HSTU-E701", "genre is bool", changed("history", genre=np.zeros(5, bool))),
            ("HSTU-E701", "genre cannot be read as an array", changed("history", genre=[[1], [2, 3]])),
            ("HSTU-E701", "genre has masked values", changed("history", genre=np.ma.masked_less([0, 1, 2, 3, 4], 2))),
            ("HSTU-E701", "genre holds NaN or infinity at index 1", changed("history", genre=[1, np.nan, 2, 3, 4])),
            (
                "HSTU-E701",
                r"action_timestamp is timedelta64\[s\]",
                changed("history", action_timestamp=np.arange(5).astype("m8[s]")),
            ),
            ("HSTU-E701", "context is a NoneType, not a mapping", replaced(legal(), context=None)),
            (
                "HSTU-E705",
                "times from -9223372036854775808 to [0-9]+ are further apart",
                changed("history", action_timestamp=[-(2**63), 1, 2, 3, 4]),
            ),
            (
                "HSTU-E705",
                "times from -2 to 9223372036854775807 are further apart",
                replaced(
                    request_of(SPEC, "ann", 0, 2),
                    candidates={"item_movie_id": [0, 0], "item_query_time": [2**63 - 1, -2]},
                ),
            ),
            ("HSTU-E701", "int32 cannot hold it", changed("history", item_weights=np.full(5, 2**40))),
            ("HSTU-E701", "different lengths: movie_id 5, genre 4", changed("history", genre=[0] * 4)),
            ("HSTU-E701", "different lengths: item_movie_id 3", changed("candidates", item_movie_id=[0] * 3)),
            ("HSTU-E701", "devices has 3 values; it takes at most 2", changed("context", devices=[0, 0, 0])),
            ("HSTU-E701", "user is a float", replaced(legal(), user=1.5)),
            ("HSTU-E701", "user is a bool", replaced(legal(), user=True)),
            ("HSTU-E703", r"movie_id outside 0\.\.49 at index 1 \(50\)", changed("history", movie_id=[0, 50, 0, 0, 0])),
            (
                "HSTU-E703",
                r"item_movie_id outside 0\.\.49 at index 0 \(-1\)",
                changed("candidates", item_movie_id=[-1, 0, 0, 0]),
            ),
            ("HSTU-E703", r"user_id outside 0\.\.29 at index 0 \(30\)", changed("context", user_id=[30])),
            ("HSTU-E704", "13 events; at most 12 fit", request_of(SPEC, "ann", 13, 2)),
            (
                "HSTU-E705",
                "time goes back at event 2: 9 then 8, and at 1 more",
                changed("history", action_timestamp=[1, 9, 8, 10, 3]),
            ),
            (
                "HSTU-E705",
                r"query time before the last event \(20\) at index 1 \(19\)",
                replaced(
                    changed("history", action_timestamp=[1, 2, 3, 4, 20]),
                    candidates={"item_movie_id": [0, 0], "item_query_time": [20, 19]},
                ),
            ),
        ],
    )
    def test_each_is_named_with_its_place(self, code: str, match: str, request_: RankingRequest) -> None:
        error = refused(code, match, request_)
        assert f"request 0 (user {request_.user!r})" in error.why

    @pytest.mark.parametrize(
        ("rows", "match"),
        [
            (np.zeros((2, 4), np.float32), r"movie_id has shape \[2, 4\]; its embedding rows are \[n, 3\]"),
            (np.zeros(2, np.int32), r"shape \[2\]"),
            (np.zeros((2, 3), np.float64), "movie_id is float64; float32"),
            (np.zeros((2, 3), np.int8), "movie_id is int8; float32"),
            ([[1.0, 2.0], [1.0]], "movie_id cannot be read as an array"),
            (np.ma.masked_less(np.zeros((2, 3), np.float32), 1), "movie_id has masked values"),
            (np.array([[0, 0, 0], [0, np.nan, 0]], np.float32), "NaN or infinity in row 1"),
        ],
    )
    def test_external_rows(self, rows: Any, match: str) -> None:
        good = np.zeros((2, 3), np.float32)
        history = {"movie_id": rows, "action_timestamp": [1, 2], "item_weights": [1, 1]}
        candidates = {"item_movie_id": good, "item_query_time": [3, 3]}
        refused("HSTU-E701", match, RankingRequest(1, history, candidates, {"user_id": good}), EXTERNAL)

    def test_rows_of_a_wider_type_than_the_graphs_are_refused(self) -> None:
        half = dataclasses.replace(EXTERNAL, row_dtype="float16")
        rows = np.zeros((2, 3), np.float32)
        history = {"movie_id": rows, "action_timestamp": [1, 2], "item_weights": [1, 1]}
        candidates = {"item_movie_id": rows.astype(np.float16), "item_query_time": [3, 3]}
        request = RankingRequest(1, history, candidates, {"user_id": rows.astype(np.float16)})
        error = refused("HSTU-E701", "movie_id is float32; float16 cannot hold it", request, half)
        assert len(error.context["problems"]) == 1

    def test_an_absent_external_context_has_to_be_a_row(self) -> None:
        good = np.zeros((2, 3), np.float32)
        history = {"movie_id": good, "action_timestamp": [1, 2], "item_weights": [1, 1]}
        candidates = {"item_movie_id": good, "item_query_time": [3, 3]}
        request = RankingRequest(1, history, candidates, {"user_id": good[:1]})
        refused("HSTU-E701", "user_id has 1 values; it takes 2", request, EXTERNAL)

    def test_all_faults_of_all_requests_are_listed(self) -> None:
        broken = [changed("context", user_id=[30]), legal(), changed("history", genre=None)]
        with pytest.raises(RequestError) as caught:
            checked_requests(broken, SPEC, RankingPolicy())
        assert caught.value.code == "HSTU-E703"
        assert [problem["code"] for problem in caught.value.context["problems"]] == ["HSTU-E703", "HSTU-E701"]
        assert "request 2" in caught.value.why
        assert "request 1" not in caught.value.why

    def test_many_bad_ids_are_counted(self) -> None:
        refused(
            "HSTU-E703",
            r"at index 0 \(50\), .* and 2 more",
            replaced(legal(), candidates={"item_movie_id": [50] * 7, "item_query_time": [NOW] * 7}),
        )


class TestPolicies:
    @given(st.integers(13, 40))
    def test_keep_last_keeps_the_newest_events_and_says_how_many_went(self, events: int) -> None:
        request = request_of(SPEC, 1, events, 3)
        found = checked(request, truncation="keep_last")
        assert (found.num_events, found.truncated) == (12, events - 12)
        for name, values in request.history.items():
            np.testing.assert_array_equal(found.history[name], values[-12:])

    def test_truncation_hides_no_fault(self) -> None:
        request = request_of(SPEC, 1, 20, 3)
        request.history["movie_id"][0] = 77
        refused("HSTU-E703", r"at index 0 \(77\)", request, truncation="keep_last")

    def test_clamp_takes_the_nearest_id_and_leaves_absent_ones(self) -> None:
        request = replaced(
            changed("history", movie_id=[-5, 0, 49, 50, 2**31 - 1]), context={"user_id": [-3], "devices": [9, -1]}
        )
        found = checked(request, unknown_ids="clamp")
        np.testing.assert_array_equal(found.history["movie_id"], [0, 0, 49, 49, 49])
        np.testing.assert_array_equal(found.context["user_id"], [-3])
        np.testing.assert_array_equal(found.context["devices"], [4, -1])
        assert found.history["movie_id"].dtype == np.int32

    @pytest.mark.parametrize("changes", [{"truncation": "drop"}, {"unknown_ids": "zero"}])
    def test_another_policy_is_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match=next(iter(changes.values()))) as caught:
            RankingPolicy(**changes)
        assert caught.value.code == "HSTU-E901"
