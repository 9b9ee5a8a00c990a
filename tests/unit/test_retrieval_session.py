"""Retrieval sessions: an answer is that of one pass over the whole history, whatever was known of the user before."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_compile.errors import BundleError, RequestError, UsageError
from hstu_compile.runtime import _retrieval_feeds, retrieval
from hstu_compile.runtime.retrieval import RetrievalSession
from hstu_compile.runtime.retrieval_request import RetrievalRequest, RetrievalResult
from hstu_compile.runtime.retrieval_spec import RetrievalSpec
from tests.retrieval_cases import (
    MAX_APPEND,
    MAX_SEQ_LEN,
    ROLES,
    EagerGraph,
    Served,
    asked,
    assert_right,
    assert_wrong,
    config_of,
    edited,
    history_of,
    spec_of,
)

TIMELESS = {"time_bias": "none", "num_time_buckets": 0, "time_bucket_divisor": 1.0}
CONFIGS = {
    "research": config_of(),
    "rated": config_of(preprocessor="rated", item_embedding_dim=9, num_ratings=5),
    "own time": config_of(attention={"time_bias": "own"}, hour_encoding="additive"),
    "timeless": config_of(attention=TIMELESS),
    "window": config_of(attention={"max_attn_len": 3}),
}


def use(result: RetrievalResult) -> tuple[str, str, int]:
    return result.cache, result.reason, result.encoded


# --- Properties -------------------------------------------------------------------------------------------------------

# A user, how many events its history has by now, and how much later it is asked.
VISITS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, MAX_SEQ_LEN), st.sampled_from([0, 60, 10**7])), min_size=1, max_size=12
)


@pytest.mark.parametrize(
    ("name", "on_device", "cuda_graphs"),
    [*((name, False, 0) for name in CONFIGS), ("rated", True, 0), ("research", True, 4)],
)
@settings(max_examples=5, deadline=None)
@given(visits=VISITS, data=st.data())
def test_any_visits_in_any_calls_answer_as_one_pass(
    name: str, on_device: bool, cuda_graphs: int, visits: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    config = CONFIGS[name]
    served = Served(
        config,
        data.draw(st.sampled_from([0, 3])),
        users_in_cache=data.draw(st.sampled_from([1, 2.5, 8])),
        on_device=on_device,
        cuda_graphs=cuda_graphs,
        session_options={"staging_rows": data.draw(st.sampled_from([None, 0, 9]))},
    )
    histories = [history_of(user, num_ratings=config.num_ratings) for user in range(4)]
    requests = [asked(user, histories[user], events, later) for user, events, later in visits]
    with served.session:
        while requests:
            size = data.draw(st.integers(1, len(requests)))
            call, requests = requests[:size], requests[size:]
            for request, result in zip(call, served.session.encode(call), strict=True):
                assert_right(served, request, result)
                assert result.encoded <= len(request.events["item_ids"])
                assert bool(result.reason) == (result.cache in ("miss", "stale"))
        stats = served.session.stats()
        assert stats.encoded + stats.reused == sum(events for _, events, _ in visits)
        assert stats.requests == len(visits)
        assert stats.cache.used_bytes <= stats.cache.capacity_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_a_growing_history_encodes_each_event_once_and_its_last_twice(name: str) -> None:
    config = CONFIGS[name]
    served, history = Served(config), history_of(1, num_ratings=config.num_ratings)
    expected = [
        (3, ("miss", "absent", 3)),
        (3, ("hit", "", 1)),
        (4, ("appended", "", 2)),
        (8, ("appended", "", 5)),
        (8, ("hit", "", 1)),
        (9, ("appended", "", 2)),
    ]
    for events, wanted in expected:
        request = asked("ann", history, events, later=events * 1000)
        result = served.one(request)
        assert use(result) == wanted
        assert_right(served, request, result)
    assert served.calls("prefill") == [(3, 1)]
    assert served.calls("append") == [(1, 1), (2, 1), (5, 1), (1, 1), (2, 1)]
    assert served.calls("retrieval") == []
    stats = served.session.stats()
    assert (stats.encoded, stats.reused, dict(stats.whole)) == (14, 21, {"absent": 1})
    assert (stats.append_passes, stats.prefill_passes, stats.uncached_passes) == (5, 1, 0)
    assert (stats.cache.hits, stats.cache.extended, stats.cache.misses) == (2, 3, 1)


# --- What the comparison must notice ----------------------------------------------------------------------------------


def keep_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_retrieval_feeds, retrieval):
        monkeypatch.setattr(module, "clean_rows", lambda num_events: num_events)


def grown(served: Served) -> tuple[Served, RetrievalRequest, RetrievalResult]:
    """A history that grew by two events, and was asked for a minute after events that came a year apart."""
    history = history_of(2)
    history["timestamps"] = 1_400_000_000 + np.arange(MAX_SEQ_LEN) * 365 * 86400
    served.one(asked("ann", history, 9))
    request = asked("ann", history, 11)
    result = served.one(request)
    assert result.cache == "appended"
    return served, request, result


def test_a_last_row_that_is_not_computed_again_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_right(*grown(Served()))
    keep_the_last_row(monkeypatch)
    assert_wrong(*grown(Served()))


def test_only_a_row_that_knows_the_time_of_the_next_is_ever_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_the_last_row(monkeypatch)
    assert_right(*grown(Served(CONFIGS["timeless"])))
    assert_right(*grown(Served(CONFIGS["own time"])))


def test_a_digest_of_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_retrieval_feeds, "validity_of", lambda history, events, spec: b"always")
    monkeypatch.setattr(retrieval, "validity_of", lambda history, events, spec: b"always")
    served = Served()
    served.one(asked("ann", history_of(3), 9))
    request = asked("ann", history_of(4), 11)
    assert_wrong(served, request, served.one(request))


# --- What is not reused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", ["item_ids", "timestamps", "ratings"])
@pytest.mark.parametrize("place", [0, 4, 7])
def test_an_edited_event_is_encoded_again_with_all_others(feature: str, place: int) -> None:
    served, history = Served(CONFIGS["rated"]), history_of(5, num_ratings=5)
    served.one(asked("ann", history, 8))
    request = asked("ann", history, 10)
    values = request.events[feature].copy()
    values[place] = {"item_ids": values[place] % 40 + 1, "timestamps": values[place] - 1, "ratings": 4 - values[place]}[
        feature
    ]
    if np.array_equal(values, request.events[feature]):
        values[place] = 0
    changed = edited(request, **{feature: np.sort(values) if feature == "timestamps" else values})
    result = served.one(changed)
    assert use(result) == ("stale", "changed", 10)
    assert_right(served, changed, result)
    assert use(served.one(changed)) == ("hit", "", 1)


def test_a_shorter_history_is_another_history() -> None:
    served, history = Served(), history_of(6)
    served.one(asked("ann", history, 8))
    request = asked("ann", history, 7)
    result = served.one(request)
    assert use(result) == ("stale", "changed", 7)
    assert_right(served, request, result)


@pytest.mark.parametrize(
    ("added", "wanted"),
    [(MAX_APPEND, ("appended", "", MAX_APPEND + 1)), (MAX_APPEND + 1, ("stale", "too_many_new", 5 + MAX_APPEND + 1))],
)
def test_more_new_events_than_the_graph_takes_are_encoded_with_all_others(
    added: int, wanted: tuple[str, str, int]
) -> None:
    served, history = Served(), history_of(7)
    served.one(asked("ann", history, 5))
    request = asked("ann", history, 5 + added)
    result = served.one(request)
    assert use(result) == wanted
    assert_right(served, request, result)


def test_a_history_that_loses_its_oldest_events_is_encoded_as_a_whole() -> None:
    served, history = Served(session_options={"truncation": "keep_last"}), history_of(8, MAX_SEQ_LEN + 3)
    served.one(asked("ann", history, MAX_SEQ_LEN))
    for events in (MAX_SEQ_LEN + 1, MAX_SEQ_LEN + 3):
        request = asked("ann", history, events)
        result = served.one(request)
        assert use(result) == ("stale", "truncated", MAX_SEQ_LEN)
        assert result.truncated == events - MAX_SEQ_LEN
        assert_right(served, request, result)
        # The same events again are the same events, however many were dropped before them.
        again = served.one(asked("ann", history, events, later=99))
        assert (use(again), again.truncated) == (("hit", "", 1), events - MAX_SEQ_LEN)
    assert served.session.stats().whole == {"absent": 1, "truncated": 2}


def test_a_user_whose_old_and_new_rows_do_not_fit_together_is_encoded_as_a_whole() -> None:
    served, history = Served(users_in_cache=1), history_of(9)
    served.one(asked("ann", history, 15))
    request = asked("ann", history, 17)
    result = served.one(request)
    assert use(result) == ("stale", "no_room", 17)
    assert_right(served, request, result)


def test_an_evicted_or_forgotten_user_is_absent() -> None:
    served, history = Served(users_in_cache=1), history_of(10)
    request = asked("ann", history, 20)
    assert use(served.one(request)) == ("miss", "absent", 20)
    assert use(served.one(dataclasses.replace(request, user="bob"))) == ("miss", "absent", 20)
    assert use(served.one(request)) == ("miss", "absent", 20)
    assert served.session.stats().cache.evictions == 2
    assert served.session.invalidate("ann")
    assert not served.session.invalidate("ann")
    assert use(served.one(request)) == ("miss", "absent", 20)
    served.session.clear()
    assert use(served.one(request)) == ("miss", "absent", 20)


def test_a_cache_of_another_model_is_refused() -> None:
    served = Served()
    served.session._cache.model_version = "c" * 64
    with pytest.raises(RequestError) as caught:
        served.one(asked("ann", history_of(0), 5))
    assert caught.value.code == "HSTU-E708"


def test_without_the_cache_nothing_is_kept_and_nothing_is_read() -> None:
    served, history = Served(), history_of(11)
    request = asked("ann", history, 9)
    served.one(request)
    result = served.one(request, cache=False)
    assert use(result) == ("off", "not_asked", 9)
    assert_right(served, request, result)
    many = [dataclasses.replace(request, user=user) for user in range(7)]
    assert len(served.session.encode(many, cache=False)) == 7
    assert served.calls("retrieval") == [(9, 1), (27, 3), (27, 3), (9, 1)]
    assert served.session.stats().cache.entries == 1


def test_a_user_over_the_budget_is_refused_or_answered_without_it() -> None:
    history = history_of(12)
    request = asked("ann", history, 20)
    with pytest.raises(RequestError) as caught:
        Served(users_in_cache=0.5).one(request)
    assert caught.value.code == "HSTU-E707"
    served = Served(users_in_cache=0.5, session_options={"over_budget": "uncached"})
    small = asked("bob", history, 2)
    results = served.session.encode([request, small])
    assert [use(result) for result in results] == [("off", "over_budget", 20), ("miss", "absent", 2)]
    for each, result in zip((request, small), results, strict=True):
        assert_right(served, each, result)


# --- Passes -----------------------------------------------------------------------------------------------------------


def test_users_share_passes_up_to_the_profile_and_the_staging_memory() -> None:
    served = Served(session_options={"staging_rows": 20})
    histories = [history_of(user) for user in range(5)]
    first = [asked(user, histories[user], 8) for user in range(5)]
    assert [use(result) for result in served.session.encode(first)] == [("miss", "absent", 8)] * 5
    assert served.calls("prefill") == [(16, 2), (16, 2), (8, 1)]
    later = [asked(user, histories[user], 10) for user in range(4)] + [asked(4, histories[4], 8)]
    results = served.session.encode(later)
    assert [use(result) for result in results] == [("appended", "", 3)] * 4 + [("hit", "", 1)]
    # Seven known rows of each.
    assert served.calls("append") == [(6, 2), (6, 2), (1, 1)]
    for request, result in zip(later, results, strict=True):
        assert_right(served, request, result)


def test_users_with_many_new_rows_share_passes_up_to_the_memory_for_these() -> None:
    served = Served(session_options={"staging_rows": 9})
    histories = [history_of(user) for user in range(3)]
    served.session.encode([asked(user, histories[user], 1) for user in range(3)])
    later = [asked(user, histories[user], 5) for user in range(3)]
    # Nothing of one event is reused; nine new rows have room, two users' ten have not.
    results = served.session.encode(later)
    assert served.calls("append") == [(5, 1)] * 3
    for request, result in zip(later, results, strict=True):
        assert use(result) == ("appended", "", 5)
        assert_right(served, request, result)


def test_a_user_twice_in_one_call_comes_in_order() -> None:
    served, history = Served(), history_of(13)
    requests = [asked("ann", history, events) for events in (4, 6, 6, 5)]
    results = served.session.encode(requests)
    assert [use(result)[:2] for result in results] == [
        ("miss", "absent"),
        ("appended", ""),
        ("hit", ""),
        ("stale", "changed"),
    ]
    for request, result in zip(requests, results, strict=True):
        assert_right(served, request, result)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_users_without_history_are_zeros(on_device: bool) -> None:
    served = Served(on_device=on_device)
    nobody, history = asked("ann", history_of(14), 0), history_of(14)
    for wanted in (("miss", "absent", 0), ("hit", "", 0)):
        result = served.one(nobody)
        assert use(result) == wanted
        assert not result.user_embedding.any()
    one = asked("ann", history, 1)
    result = served.one(one)
    assert use(result) == ("appended", "", 1)
    assert_right(served, one, result)


def test_the_listed_items_know_the_whole_history() -> None:
    served, history = Served(top_k=40), history_of(15)
    for events in (8, 10, 10):
        result = served.one(asked("ann", history, events))
        assert result.top_items is not None
        assert result.top_scores is not None
        listed = set(result.top_items.tolist()) - {0}
        assert listed == set(range(1, 41)) - set(history["item_ids"][:events].tolist())
        assert (np.diff(result.top_scores) <= 0).all()
    plain = Served().one(asked("ann", history, 8))
    assert (plain.top_items, plain.top_scores) == (None, None)


def test_passes_of_equal_shapes_are_replayed_from_a_cuda_graph() -> None:
    served = Served(on_device=True, cuda_graphs=4, users_in_cache=12)
    histories = [history_of(user) for user in range(5)]
    for later in (60, 90):
        for user in range(5):
            request = asked(user, histories[user], 20, later)
            assert_right(served, request, served.one(request))
    graphs = served.session.stats().graphs
    assert graphs.replays > 0
    assert Served(on_device=True).session.stats().graphs.replays == 0


def test_a_failed_pass_leaves_nothing_half_done() -> None:
    served, history = Served(), history_of(16)
    served.one(asked("ann", history, 6))
    served.graphs["append"].failure = RuntimeError("the device fell off")
    with pytest.raises(RuntimeError, match="fell off"):
        served.one(asked("ann", history, 8))
    served.graphs["append"].failure = None
    request = asked("ann", history, 8)
    result = served.one(request)
    assert use(result) == ("miss", "absent", 8)
    assert_right(served, request, result)
    assert served.session.stats().cache.entries == 1


def test_closing_frees_the_memory_and_the_graphs() -> None:
    served = Served()
    served.session.close()
    served.session.close()
    assert all(graph.closed for graph in served.graphs.values())
    assert served.session.runtime == "eager retrieval"
    with pytest.raises(RuntimeError, match="the session is closed"):
        served.one(asked("ann", history_of(0), 5))


# --- What is refused --------------------------------------------------------------------------------------------------

GOOD = asked("ann", history_of(17), 5)
REFUSED: list[tuple[str, RetrievalRequest, str]] = [
    ("HSTU-E701", edited(GOOD, likes=[1]), "'likes' is not a feature of this model's events"),
    ("HSTU-E701", dataclasses.replace(GOOD, events={"item_ids": [1]}), "timestamps is missing"),
    ("HSTU-E701", edited(GOOD, item_ids=[[1, 2, 3, 4, 5]]), "item_ids has rank 2"),
    ("HSTU-E701", edited(GOOD, item_ids=[1.5] * 5), "item_ids is float64 with values 1.5..1.5; int32 cannot hold it"),
    ("HSTU-E701", edited(GOOD, item_ids=[1]), "features have different lengths: item_ids 1, timestamps 5"),
    ("HSTU-E701", dataclasses.replace(GOOD, user=True), "user is a bool, not a str or an int"),
    ("HSTU-E701", dataclasses.replace(GOOD, request_timestamp=1.5), "request_timestamp is a float, not an int"),  # type: ignore[arg-type]
    ("HSTU-E701", dataclasses.replace(GOOD, request_timestamp=2**63), "int64 cannot hold it"),
    ("HSTU-E701", edited(GOOD, item_ids=[[1], [2, 3]]), "item_ids cannot be read as an array"),
    ("HSTU-E701", edited(GOOD, item_ids=np.ma.masked_less([1, 2, 3, 4, 5], 2)), "item_ids has masked values"),
    ("HSTU-E701", edited(GOOD, timestamps=np.arange(5).astype("m8[s]")), "timestamps is timedelta64[s]"),
    ("HSTU-E701", dataclasses.replace(GOOD, events=None), "events is a NoneType, not a mapping"),  # type: ignore[arg-type]
    ("HSTU-E703", edited(GOOD, item_ids=[1, 41, 2, 3, -1]), "item_ids outside 0..40 at index 1 (41), 4 (-1)"),
    ("HSTU-E704", asked("ann", history_of(17, 21), 21), "21 events; at most 20 fit"),
    ("HSTU-E705", edited(GOOD, timestamps=[5, 4, 6, 7, 6]), "time goes back at event 1: 5 then 4, and at 1 more"),
    ("HSTU-E705", dataclasses.replace(GOOD, request_timestamp=3), "it is asked at 3, before its last event at"),
    ("HSTU-E705", edited(GOOD, timestamps=[-(2**63), 1, 2, 3, 4]), "times from -9223372036854775808 to "),
]


@pytest.mark.parametrize(("code", "request_", "text"), REFUSED, ids=[each[2][:30] for each in REFUSED])
def test_a_request_that_has_no_answer_is_refused_by_name(code: str, request_: RetrievalRequest, text: str) -> None:
    served = Served()
    with pytest.raises(RequestError) as caught:
        served.session.encode([GOOD, request_])
    assert caught.value.code == code
    assert text in caught.value.why
    assert "request 1 (user " in caught.value.why
    assert served.calls("prefill") == []


def test_ratings_outside_their_table_are_refused() -> None:
    history = history_of(17, num_ratings=5)
    with pytest.raises(RequestError, match=r"ratings outside 0\.\.4 at index 0 \(5\)"):
        Served(CONFIGS["rated"]).one(edited(asked("ann", history, 2), ratings=[5, 0]))


def test_every_fault_of_every_request_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        Served().session.encode([each for _, each, _ in REFUSED])
    assert caught.value.what == f"the request has {len(REFUSED)} faults"
    assert len(caught.value.context["problems"]) == len(REFUSED)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kv_budget_bytes": 0}, "the KV cache has no memory"),
        ({"kv_budget_bytes": 2e9}, "kv_budget_bytes is not a whole number"),
        ({"staging_rows": 1.5}, "staging_rows is not a whole number"),
        ({"staging_rows": -1}, "the staging memory cannot be negative"),
        ({"truncation": "keep_first"}, "there is no truncation choice 'keep_first'"),
        ({"over_budget": "packed"}, "there is no over_budget choice 'packed'"),
    ],
)
def test_arguments_without_meaning_are_refused(options: dict[str, Any], text: str) -> None:
    graphs = Served().graphs
    with pytest.raises(UsageError) as caught:
        RetrievalSession(spec_of(config_of()), *(graphs[role] for role in ROLES), **{"kv_budget_bytes": 1, **options})
    assert caught.value.what == text


def test_graphs_of_another_model_are_refused() -> None:
    graphs = Served(CONFIGS["rated"]).graphs
    with pytest.raises(BundleError, match="it takes ratings besides"):
        RetrievalSession(spec_of(config_of()), *(graphs[role] for role in ROLES), kv_budget_bytes=1)
    plain = Served().graphs
    wrong: list[EagerGraph] = [plain["retrieval"], plain["prefill"], plain["prefill"]]
    with pytest.raises(BundleError, match=r"the graph append does not belong .*\n.*it does not take cache_offsets"):
        RetrievalSession(spec_of(config_of()), *wrong, kv_budget_bytes=1)


# --- The specification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_items": 0}, "num_items is 0, not a positive integer"),
        ({"max_append": True}, "max_append is True, not a positive integer"),
        ({"max_append": 20}, "max_append 20 leaves no cached event of 20"),
        ({"top_k": -1}, "top_k is -1, not an integer >= 0"),
        ({"has_time_bias": "no"}, "has_time_bias is 'no', neither true nor false"),
        ({"kv_dtype": "int8"}, "kv_dtype is 'int8', not one of float32, float16, bfloat16"),
        ({"cache_rule": "request"}, "cache_rule is 'request'; only under 'prefix' is a history encoded in parts"),
        ({"model_version": "1"}, "model_version is '1', not a sha256"),
        ({"surplus": 1}, "RetrievalSpec has no surplus"),
    ],
    ids=str,
)
def test_a_manifest_entry_that_means_nothing_is_refused(changes: dict[str, Any], text: str) -> None:
    entry = spec_of(config_of(), top_k=3).to_dict()
    assert RetrievalSpec.from_manifest(entry) == spec_of(config_of(), top_k=3)
    with pytest.raises(BundleError) as caught:
        RetrievalSpec.from_manifest({**entry, **changes})
    assert caught.value.code == "HSTU-E803"
    assert text in caught.value.why
