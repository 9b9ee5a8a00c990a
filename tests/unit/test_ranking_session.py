"""Ranking sessions: scores depend on the request alone, never on the split, the packing, the cache or its neighbours.

Everything runs against a small float64 model (`ranking_fakes.py`) in two families: Meta's, anchored at the query, and
one with relative biases, whose cached histories outlive a query.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hstu_compile.errors import BundleError, RequestError, UsageError
from hstu_compile.runtime._ranking_feeds import validity_of
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingPolicy, RankingRequest, RankingResult, checked_requests
from hstu_compile.runtime.ranking_spec import ContextualFeature, IdFeature, RankingSpec
from tests.ranking_cases import (
    ROLES,
    Served,
    assert_same,
    chosen,
    differs,
    replaced,
    requests,
)
from tests.ranking_fakes import FakeGraph, FakeModel, spec_of
from tests.ranking_requests import NOW, request_of

# Rule, divisor, whether candidates count towards a contextual feature's minimum.
VARIANTS = {
    "meta": spec_of(scaling="batch"),
    "meta-pinned": spec_of(),
    "prefix": spec_of("prefix", counts_candidates=False),
    "prefix-batch": spec_of("prefix", scaling="batch", history_action=None),
}
every_variant = pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())
pinned = pytest.mark.parametrize("spec", [VARIANTS["meta-pinned"], VARIANTS["prefix"]], ids=["meta-pinned", "prefix"])
SPEC = VARIANTS["meta-pinned"]
# Of each of up to four variants.
few = settings(max_examples=15, deadline=None)


def in_one_pass(spec: RankingSpec, request: RankingRequest) -> RankingResult:
    """The request's answer from the model itself, with no session and nobody beside it."""
    preds, logits = FakeModel(spec).answer(request.history, request.context, request.candidates)
    return RankingResult(preds.astype(np.float32), logits.astype(np.float32), "off", 0)


class TestTheFakeItself:
    """What the properties below would not notice if the model ignored it."""

    @pytest.mark.parametrize("role", ["user_id", "devices"])
    def test_context_matters(self, role: str) -> None:
        request = request_of(SPEC, 0, 9, 3)
        served = Served(SPEC)
        base = served.one(replaced(request, context={"user_id": [1], "devices": [1, 1]}))
        context: dict[str, Any] = {"user_id": [1], "devices": [1, 1]}
        context[role] = [2] * len(context[role])
        assert differs(base, served.one(replaced(request, context=context)))

    @every_variant
    def test_history_order_and_times_matter(self, spec: RankingSpec) -> None:
        request, served = request_of(spec, 0, 9, 3), Served(spec)
        base = served.one(request)
        for name in ("movie_id", "action_timestamp"):
            other = {**request.history, name: np.sort(np.roll(request.history[name] // 2, 1))}
            assert differs(base, served.one(replaced(request, history=other)))

    def test_the_anchor_matters_to_meta(self) -> None:
        request, served = request_of(SPEC, 0, 9, 3), Served(SPEC)
        later = np.array(request.candidates["item_query_time"])
        later[-1] += 100_000
        other = served.one(replaced(request, candidates={**request.candidates, "item_query_time": later}))
        assert np.abs(served.one(request).logits[:-1] - other.logits[:-1]).max() > 1e-4

    def test_the_minimum_length_and_the_divisor_matter(self) -> None:
        for spec in (SPEC, spec_of(scaling="batch")):
            request = replaced(request_of(spec, 0, 6, 2), context={"user_id": [1], "devices": [1, 1]})
            served = Served(spec)
            assert differs(served.one(chosen(request, [1])), served.one(chosen(request, [1, 1])))


@every_variant
@few
@given(data=st.data())
def test_any_micro_batch_split_and_any_order_equals_one_pass(spec: RankingSpec, data: st.DataObject) -> None:
    request = data.draw(requests(spec, most_candidates=20, min_candidates=1))
    total = len(request.candidates[spec.candidate_time])
    # The last candidate is the anchor; it stays the last.
    order = [*data.draw(st.permutations(range(total - 1))), total - 1]
    served = Served(dataclasses.replace(spec, micro_batch=data.draw(st.integers(1, 21))))
    result, expected = served.one(chosen(request, order)), in_one_pass(spec, request)
    np.testing.assert_allclose(result.logits, expected.logits[order], rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.preds, expected.preds[order], rtol=0, atol=1e-6)
    assert len(served.calls("score")) == math.ceil(total / served.session.spec.micro_batch)


@every_variant
@few
@given(data=st.data())
def test_each_candidate_equals_scoring_it_alone(spec: RankingSpec, data: st.DataObject) -> None:
    """Alone, but for copies of the last candidate, which keep three things that belong to the request as a whole.

    These are the anchor, the number of candidates in the divisor, and whether a history is long enough.
    """
    request = data.draw(requests(spec, min_candidates=1))
    total = len(request.candidates[spec.candidate_time])
    together = Served(spec).one(request)
    for index in range(total):
        alone = Served(spec).one(chosen(request, [index] + [total - 1] * (total - 1)))
        np.testing.assert_allclose(alone.logits[0], together.logits[index], rtol=0, atol=1e-6)
        np.testing.assert_allclose(alone.preds[0], together.preds[index], rtol=0, atol=1e-6)


@pinned
@few
@given(data=st.data())
def test_appending_a_candidate_leaves_the_others_unchanged(spec: RankingSpec, data: st.DataObject) -> None:
    spec = dataclasses.replace(spec, counts_candidates=False)
    request = data.draw(requests(spec, min_candidates=2))
    total = len(request.candidates[spec.candidate_time])
    place = data.draw(st.integers(0, total - 2))
    served = Served(spec)
    without = [index for index in range(total) if index != place]
    np.testing.assert_allclose(
        served.one(request).logits[without], served.one(chosen(request, without)).logits, rtol=0, atol=1e-6
    )


@every_variant
@few
@given(data=st.data())
def test_cached_equals_uncached(spec: RankingSpec, data: st.DataObject) -> None:
    request, served = data.draw(requests(spec)), Served(spec)
    first, second = served.one(request), served.one(request)
    uncached = Served(dataclasses.replace(spec, max_candidates=11)).one(request, cache=False)
    assert uncached.cache == "off"
    if request.candidates[spec.candidate_time].size:
        assert (first.cache, second.cache) == ("miss", "hit")
        assert len(served.calls("prefill")) == 1
    for result in (first, second, uncached):
        assert_same(result, in_one_pass(spec, request))


@every_variant
@few
@given(data=st.data())
def test_any_packing_of_users_equals_each_alone(spec: RankingSpec, data: st.DataObject) -> None:
    batch = [replaced(r, user=f"u{i}") for i, r in enumerate(data.draw(st.lists(requests(spec), max_size=7)))]
    limits = {"micro_batch": data.draw(st.integers(1, 16)), "max_batch": data.draw(st.integers(1, 5))}
    rows = spec.contextual_len + spec.max_history_len
    served = Served(
        dataclasses.replace(spec, **limits),
        users_in_cache=data.draw(st.floats(1, 8)),
        staging_rows=data.draw(st.integers(0, 4 * rows)),
    )
    whole = Served(dataclasses.replace(spec, max_candidates=11, **limits))
    for results in (served.session.score(batch), served.session.score(batch), whole.session.score_packed(batch)):
        for request, result in zip(batch, results, strict=True):
            assert_same(result, in_one_pass(spec, request))


@every_variant
@few
@given(data=st.data())
def test_one_users_request_never_changes_anothers(spec: RankingSpec, data: st.DataObject) -> None:
    mine = replaced(data.draw(requests(spec, min_candidates=1)), user="mine")
    served = Served(spec, staging_rows=100)
    answers = []
    for _ in range(2):
        other = replaced(data.draw(requests(spec, min_candidates=1)), user="other")
        served.session.clear()
        answers.append(served.session.score([other, mine])[1])
    np.testing.assert_array_equal(answers[0].logits, answers[1].logits)


@every_variant
@few
@given(data=st.data())
def test_eviction_at_any_moment_changes_nothing(spec: RankingSpec, data: st.DataObject) -> None:
    users = [
        replaced(request_of(spec, 0, events, 3, seed), user=user)
        for user, (events, seed) in enumerate([(12, 1), (0, 2), (7, 3), (12, 4), (1, 5)])
    ]
    expected = [in_one_pass(spec, request) for request in users]
    served = Served(spec, users_in_cache=data.draw(st.sampled_from([1, 1.5, 2.6])))
    steps = st.one_of(
        st.lists(st.integers(0, 4), min_size=1, max_size=5),
        st.tuples(st.just("invalidate"), st.integers(0, 4)),
        st.just("clear"),
    )
    for step in data.draw(st.lists(steps, min_size=1, max_size=12)):
        if step == "clear":
            served.session.clear()
        elif isinstance(step, tuple):
            served.session.invalidate(step[1])
        else:
            for user, result in zip(step, served.session.score([users[user] for user in step]), strict=True):
                assert_same(result, expected[user])
        kv = served.session.stats().cache
        assert kv.used_bytes <= kv.capacity_bytes <= served.user_bytes * 2.6


class TestCacheValidity:
    def changes(self, request: RankingRequest) -> dict[str, RankingRequest]:
        """Requests of the same user that differ in one thing."""
        times = np.array(request.candidates["item_query_time"])
        times[-1] += 1
        history = {name: np.array(values) for name, values in request.history.items()}
        grown = {name: np.append(values, values[-1]) for name, values in history.items()}
        other_id = {**history, "genre": (history["genre"] + 1) % 6}
        return {
            "query time": replaced(request, candidates={**request.candidates, "item_query_time": times}),
            "new event": replaced(request, history=grown),
            "event": replaced(request, history=other_id),
            "action": replaced(request, history={**history, "item_weights": history["item_weights"] ^ 1}),
            "context": replaced(
                request, context={**request.context, "user_id": [(request.context["user_id"][0] + 1) % 30]}
            ),
            "candidates": chosen(request, [2, 2]),
            "fewer candidates": chosen(request, [2]),
        }

    @pytest.mark.parametrize(
        ("variant", "change", "outcome"),
        [
            ("meta-pinned", "query time", "stale"),
            ("meta-pinned", "new event", "stale"),
            ("meta-pinned", "event", "stale"),
            ("meta-pinned", "action", "stale"),
            ("meta-pinned", "context", "stale"),
            ("meta-pinned", "candidates", "hit"),
            ("meta-pinned", "fewer candidates", "stale"),  # 6 events and 1 candidate are fewer than 8
            ("meta", "query time", "stale"),
            ("meta", "candidates", "stale"),  # their number is in the divisor
            ("prefix", "query time", "hit"),
            ("prefix", "new event", "stale"),
            ("prefix", "event", "stale"),
            ("prefix", "context", "stale"),
            ("prefix", "fewer candidates", "hit"),
        ],
    )
    def test_an_entry_is_used_only_where_the_rule_allows(self, variant: str, change: str, outcome: str) -> None:
        spec = VARIANTS[variant]
        request = request_of(spec, 0, 6, 3)
        other = self.changes(request)[change]
        served = Served(spec)
        served.one(request)
        result = served.one(other)
        assert result.cache == outcome
        assert_same(result, in_one_pass(spec, other))

    def test_shifting_values_between_features_is_another_history(self) -> None:
        spec = spec_of(counts_candidates=False)
        times, tail = {"action_timestamp": [1, 2], "item_weights": [0, 0]}, request_of(spec, 0, 2, 1)
        served = Served(spec)
        served.one(replaced(tail, history={"movie_id": [1, 2], "genre": [2, 1], **times}))
        assert served.one(replaced(tail, history={"movie_id": [2, 1], "genre": [1, 2], **times})).cache == "stale"

    @pytest.mark.parametrize("row_dtype", ["float32", "float16"])
    @pytest.mark.parametrize("events", [0, 4])
    def test_embedding_rows_are_part_of_a_history(self, row_dtype: Any, events: int) -> None:
        external = ContextualFeature("user_id", 30, 3, 2, 0)
        history_ids = (IdFeature("movie_id", 50, 3),)
        spec = spec_of(history_ids=history_ids, contextual=(external,), row_dtype=row_dtype)

        def digest(request: RankingRequest) -> bytes:
            return validity_of(checked_requests([request], spec, RankingPolicy())[0], spec)

        request = request_of(spec, 0, events, 2)
        assert digest(request) == digest(replaced(request, user=1, history={**request.history}))
        parts = {"context": "user_id", **({"history": "movie_id"} if events else {})}
        for part, name in parts.items():
            values = getattr(request, part)
            assert digest(request) != digest(replaced(request, **{part: {**values, name: values[name] + 1}}))

    def test_invalidate_forgets_one_user(self) -> None:
        served = Served(SPEC)
        batch = [request_of(SPEC, user, 5, 2) for user in (0, 1)]
        served.session.score(batch)
        assert served.session.invalidate(0)
        assert not served.session.invalidate(0)
        assert not served.session.invalidate("nobody")
        assert [result.cache for result in served.session.score(batch)] == ["miss", "hit"]
        served.session.clear()
        assert [result.cache for result in served.session.score(batch)] == ["miss", "miss"]

    def test_another_model_versions_entries_are_refused(self) -> None:
        served = Served(SPEC)
        served.one(request_of(SPEC, 0, 5, 2))
        served.session.spec = dataclasses.replace(SPEC, model_version="cd" * 32)
        with pytest.raises(RequestError) as caught:
            served.one(request_of(SPEC, 0, 5, 2))
        assert caught.value.code == "HSTU-E708"

    @pytest.mark.parametrize("variant", ["meta", "prefix"])
    def test_appending_to_a_cached_history_is_refused_with_the_reason(self, variant: str) -> None:
        match = {"meta": "anchored at it", "prefix": "has no graph that encodes new events"}[variant]
        served = Served(VARIANTS[variant])
        with pytest.raises(RequestError, match=match) as caught:
            # Without times: any feature says how many events were meant.
            served.session.append(3, {"movie_id": [1, 2]})
        assert caught.value.code == "HSTU-E709"
        assert "user 3 cannot be extended by 2 events" in caught.value.what


class TestPasses:
    def test_users_share_prefill_and_score_passes(self) -> None:
        served = Served(spec_of(max_batch=8), staging_rows=100)
        batch = [request_of(SPEC, user, 4, m) for user, m in enumerate([6, 3, 1, 2])]
        served.session.score(batch)
        assert served.calls("prefill") == [(16, 4)]
        assert served.calls("score") == [(4, 1), (4, 2), (4, 3)]
        stats = served.session.stats()
        assert (stats.requests, stats.candidates, stats.prefill_passes, stats.score_passes) == (4, 12, 1, 3)

    def test_a_pass_of_one_user_reads_the_cache_where_it_lies(self) -> None:
        served = Served(SPEC, staging_rows=100)
        prefill, score = served.graphs["prefill"], served.graphs["score"]
        for user in (0, 1):
            served.one(request_of(SPEC, user, 4, 6))
        assert len(set(prefill.addresses)) == 2
        assert score.addresses == [prefill.addresses[0]] * 2 + [prefill.addresses[1]] * 2
        served.session.score([request_of(SPEC, user, 4, 1) for user in (0, 1)])
        assert score.addresses[-1] not in prefill.addresses[:2]

    def test_prefill_passes_end_at_the_batch_and_at_the_staging_memory(self) -> None:
        batch = [request_of(SPEC, user, 4, 1) for user in range(5)]
        served = Served(SPEC, staging_rows=100)
        served.session.score(batch)
        assert served.calls("prefill") == [(12, 3), (8, 2)]
        served = Served(SPEC, staging_rows=14)
        served.session.score(batch)
        assert served.calls("prefill") == [(8, 2), (8, 2), (4, 1)]

    def test_more_users_than_the_cache_holds_come_in_turns(self) -> None:
        served = Served(SPEC, users_in_cache=2)
        batch = [request_of(SPEC, user, 12, 2, seed=user) for user in range(5)]
        results = served.session.score(batch)
        for request, result in zip(batch, results, strict=True):
            assert_same(result, in_one_pass(SPEC, request))
        assert served.session.stats().cache.evictions == 3

    def test_memory_is_the_budget_and_the_staging_and_nothing_else(self) -> None:
        served = Served(SPEC, users_in_cache=2)
        before = served.session.stats()
        served.session.score([request_of(SPEC, user, 12, 9) for user in range(6)])
        after = served.session.stats()
        assert before.cache.capacity_bytes == after.cache.capacity_bytes == 2 * served.user_bytes
        # Of the three users that a pass takes the budget holds two.
        assert before.staging_bytes == after.staging_bytes
        assert served.user_bytes < before.staging_bytes <= before.cache.capacity_bytes

    def test_memory_beside_the_budget_is_one_pass_however_large_the_budget(self) -> None:
        served = Served(SPEC, users_in_cache=500)
        longest = SPEC.contextual_len + SPEC.max_history_len
        pass_bytes = served.session._layout.entry_bytes(SPEC.max_batch * longest)
        assert served.session.stats().staging_bytes == pass_bytes < 4 * served.user_bytes
        served.session.score([request_of(SPEC, user, 12, 9) for user in range(20)])
        assert served.session.stats().staging_bytes == pass_bytes

    def test_users_share_passes_by_default(self) -> None:
        """Room for one user of full length, as it was, took a pass of each graph for almost every user."""
        spec = spec_of(max_batch=16, micro_batch=64)
        longest = spec.contextual_len + spec.max_history_len
        batch = [request_of(spec, user, 4 + user % 9, 2, seed=user) for user in range(16)]
        narrow, default = Served(spec, staging_rows=longest), Served(spec)
        for served in (narrow, default):
            for request, result in zip(batch, served.session.score(batch), strict=True):
                assert_same(result, in_one_pass(spec, request))
        assert [len(default.calls(role)) for role in ("prefill", "score")] == [1, 1]
        assert all(len(narrow.calls(role)) >= 10 for role in ("prefill", "score"))


class TestCudaGraphs:
    """With graphs, equal shapes read and write at equal addresses."""

    @staticmethod
    def served(**options: Any) -> Served:
        return Served(SPEC, graph_stats=GraphStats(captures=1, replays=2, kept=1), **options)

    def test_users_of_equal_lengths_share_an_address_and_keep_their_answers(self) -> None:
        served = self.served()
        batch = [request_of(SPEC, user, 12, 3, seed=user) for user in range(3)]
        for request in (*batch, *reversed(batch)):
            assert_same(served.one(request), in_one_pass(SPEC, request))
        assert len(set(served.graphs["prefill"].addresses + served.graphs["score"].addresses)) == 1
        assert len(served.graphs["score"].addresses) == 6
        assert len(served.graphs["prefill"].addresses) == 3

    def test_without_graphs_every_user_is_read_where_it_lies(self) -> None:
        served = Served(SPEC)
        for user in range(3):
            served.one(request_of(SPEC, user, 12, 3))
        assert len(set(served.graphs["score"].addresses)) == 3
        assert served.graphs["score"].copied == [0] * 6

    def test_the_micro_batches_of_one_user_are_staged_once(self) -> None:
        served = self.served(staging_rows=100)
        blocks = 2 * SPEC.num_layers
        batch = [request_of(SPEC, user, 5, 9, seed=user) for user in range(2)]
        for request, result in zip(batch, served.session.score(batch), strict=True):
            assert_same(result, in_one_pass(SPEC, request))
        # Two full micro-batches of each user, then what is left of both: (before, after) of each pass.
        assert served.calls("score") == [(4, 1), (4, 1), (4, 1), (4, 1), (2, 2)]
        assert served.graphs["score"].copied == [blocks, 0, 0, 0, blocks, 0, 0, 0, 2 * blocks, 0]

    def test_a_user_that_the_staging_memory_cannot_hold_is_read_where_it_lies(self) -> None:
        served = self.served(staging_rows=7)
        batch = [request_of(SPEC, user, 12, 3, seed=user) for user in range(2)]
        for request in (*batch, *batch):
            assert_same(served.one(request), in_one_pass(SPEC, request))
        assert len(set(served.graphs["score"].addresses)) == 2

    def test_the_counters_of_the_three_sessions_are_added(self) -> None:
        assert self.served().session.stats().graphs == GraphStats(captures=3, replays=6, kept=3)
        assert Served(SPEC).session.stats().graphs == GraphStats()


class TestTheWholeCache:
    """A score graph that takes the cache's tensors whole reads every pass where it lies."""

    @every_variant
    @few
    @given(data=st.data())
    def test_answers_are_those_of_copied_rows_to_the_bit(self, spec: RankingSpec, data: st.DataObject) -> None:
        batches = data.draw(st.lists(st.lists(requests(spec), min_size=1, max_size=5), min_size=1, max_size=4))
        users = data.draw(st.permutations(range(5)))
        limits = {"micro_batch": data.draw(st.integers(1, 16)), "max_batch": data.draw(st.integers(1, 5))}
        spec = dataclasses.replace(spec, **limits)
        room = data.draw(st.sampled_from([2.2, 3.5, 50]))
        graphs = data.draw(st.sampled_from([None, GraphStats()]))
        whole = Served(spec, room, cache_rows=10_000, graph_stats=graphs)
        copied = Served(spec, room, staging_rows=0)
        assert whole.session.stats().scores_in_place
        assert not copied.session.stats().scores_in_place
        for batch in batches:
            batch = [replaced(request, user=users[i]) for i, request in enumerate(batch)]
            for request, one, other in zip(batch, *(s.session.score(batch) for s in (whole, copied)), strict=True):
                np.testing.assert_array_equal(one.logits, other.logits)
                assert_same(one, in_one_pass(spec, request))
            kv = whole.session.stats().cache
            assert kv.used_bytes <= kv.capacity_bytes <= whole.user_bytes * room
        assert sum(whole.graphs["score"].copied) == 0

    def test_every_user_is_a_pass_of_the_same_shapes_and_addresses(self) -> None:
        served = Served(SPEC, cache_rows=10_000, graph_stats=GraphStats())
        for events in (12, 0, 7, 1, 12, 5):
            request = request_of(SPEC, f"user of {events}", events, 4, seed=events)
            assert_same(served.one(request), in_one_pass(SPEC, request))
        assert len(set(served.graphs["score"].addresses)) == 1
        assert set(served.calls("score")) == {(4, 2)}, "a sequence in front of each user's, also of the first"

    def test_users_share_passes_without_staging_memory(self) -> None:
        spec = spec_of(max_batch=4, micro_batch=20)
        served = Served(spec, cache_rows=10_000, staging_rows=0)
        batch = [request_of(spec, user, 12 - user, 3, seed=user) for user in range(4)]
        # The cache holds them in another order than they are asked for.
        for asked in (batch[2:], batch, batch[::-1]):
            for request, result in zip(asked, served.session.score(asked), strict=True):
                assert_same(result, in_one_pass(spec, request))
        assert served.calls("score") == [(6, 4), (12, 8), (12, 8)]
        assert served.graphs["score"].copied == [0] * 6

    def test_a_cache_that_the_engine_cannot_take_whole_is_copied_and_said(self) -> None:
        fits = Served(SPEC, 10, cache_rows=10 * 32)
        assert fits.session.stats().scores_in_place
        with pytest.warns(RuntimeWarning, match="the KV cache has 320 rows, and the engine of score takes 319 as one"):
            served = Served(SPEC, 10, cache_rows=10 * 32 - 1)
        assert not served.session.stats().scores_in_place
        request = request_of(SPEC, 0, 5, 3)
        assert_same(served.one(request), in_one_pass(SPEC, request))

    def test_a_user_larger_than_the_budget_is_refused_or_packed(self) -> None:
        requests = [request_of(SPEC, 0, 1, 2), request_of(SPEC, 1, 12, 2)]
        spec = dataclasses.replace(SPEC, max_history_len=40)
        with pytest.raises(RequestError, match="too small for user 1") as caught:
            Served(spec, 0.5, cache_rows=10_000).session.score([request_of(spec, 1, 40, 2)])
        assert caught.value.code == "HSTU-E707"
        served = Served(SPEC, 0.5, cache_rows=10_000, over_budget="packed")
        for request, result in zip(requests, served.session.score(requests), strict=True):
            assert_same(result, in_one_pass(SPEC, request))


class TestPackedSplits:
    """Splitting candidates that do not fit the packed profile."""

    @pytest.mark.parametrize("rule", ["request", "prefix"])
    @few
    @given(data=st.data())
    def test_a_split_gives_the_answer_of_one_pass(self, rule: Any, data: st.DataObject) -> None:
        spec = spec_of(rule, max_candidates=data.draw(st.integers(2, 9)))
        request = data.draw(requests(spec, most_candidates=30, min_candidates=1))
        total, most = len(request.candidates[spec.candidate_time]), spec.max_candidates
        events = len(request.history[spec.history_time])
        assume((events + total >= 8) == (events + min(total, most) >= 8))
        served = Served(spec)
        (result,) = served.session.score_packed([request])
        assert_same(result, in_one_pass(spec, request))
        splits = 1 if total <= most else math.ceil(total / (most - 1))
        assert sum(sequences for _, sequences in served.calls("packed")) == splits

    def test_equal_query_times_need_no_anchor(self) -> None:
        spec = spec_of(max_candidates=1, counts_candidates=False)
        request = request_of(spec, 0, 9, 4)
        request = replaced(request, candidates={**request.candidates, "item_query_time": [NOW] * 4})
        served = Served(spec)
        (result,) = served.session.score_packed([request])
        assert_same(result, in_one_pass(spec, request))
        assert served.calls("packed") == [(3, 3), (1, 1)]

    @pytest.mark.parametrize(
        ("changes", "events", "match"),
        [
            ({"scaling": "batch"}, 9, "the divisor counts the candidates"),
            ({"max_candidates": 3}, 4, "counts the history as too short"),
            ({"max_candidates": 1}, 9, "the anchor, which is the last candidate, leaves no room"),
        ],
    )
    def test_a_split_that_would_change_the_scores_is_refused(
        self, changes: dict[str, Any], events: int, match: str
    ) -> None:
        spec = spec_of(**changes)
        request = request_of(spec, 0, events, 10)
        served = Served(spec)
        with pytest.raises(RequestError, match=match) as caught:
            served.session.score_packed([request])
        assert caught.value.code == "HSTU-E704"
        assert served.calls("packed") == []
        assert_same(served.one(request), in_one_pass(spec, request))

    def test_with_a_batch_divisor_requests_are_not_packed_together(self) -> None:
        spec = spec_of(scaling="batch")
        served = Served(spec)
        batch = [request_of(spec, user, 3 * user, 2 + user) for user in range(3)]
        for request, result in zip(batch, served.session.score_packed(batch), strict=True):
            assert_same(result, in_one_pass(spec, request))
        assert served.calls("packed") == [(2, 1), (3, 1), (4, 1)]


class TestUnusualRequests:
    def test_no_requests(self) -> None:
        assert Served(SPEC).session.score([]) == []

    def test_no_candidates_give_an_empty_result_and_run_nothing(self) -> None:
        served = Served(SPEC)
        first, second = served.session.score([request_of(SPEC, 0, 5, 0), request_of(SPEC, 1, 5, 2)])
        assert (first.preds.shape, first.logits.shape, first.cache) == ((0, 2), (0, 2), "off")
        assert second.preds.shape == (2, 2)
        assert served.calls("prefill") == [(5, 1)]
        (packed,) = served.session.score_packed([request_of(SPEC, 0, 5, 0)])
        assert packed.preds.shape == (0, 2)
        assert served.calls("packed") == []

    @every_variant
    def test_a_user_without_history(self, spec: RankingSpec) -> None:
        request = request_of(spec, 0, 0, 5)
        served = Served(spec)
        assert_same(served.one(request), in_one_pass(spec, request))
        assert served.one(request).cache == "hit"

    @every_variant
    def test_nothing_to_cache_at_all(self, spec: RankingSpec) -> None:
        spec = dataclasses.replace(spec, contextual=())
        batch = [request_of(spec, user, events, 3) for user, events in enumerate([0, 4, 0])]
        served = Served(spec)
        for _ in range(2):
            for request, result in zip(batch, served.session.score(batch), strict=True):
                assert_same(result, in_one_pass(spec, request))
        assert served.calls("prefill") == [(4, 1)]

    def test_a_user_twice_with_the_same_history_is_encoded_once(self) -> None:
        request, served = request_of(SPEC, 0, 6, 7), Served(SPEC)
        batch = [chosen(request, [0, 1, 2, 6]), request_of(SPEC, 1, 4, 2), chosen(request, [5, 4, 6])]
        results = served.session.score(batch)
        assert [result.cache for result in results] == ["miss", "miss", "hit"]
        assert sum(events for events, _ in served.calls("prefill")) == 10
        for each, result in zip(batch, results, strict=True):
            assert_same(result, in_one_pass(SPEC, each))

    def test_a_user_twice_with_two_histories_gets_both_answers(self) -> None:
        served = Served(SPEC)
        batch = [request_of(SPEC, 0, 6, 3), request_of(SPEC, 0, 7, 3), request_of(SPEC, 0, 6, 3)]
        results = served.session.score(batch)
        assert [result.cache for result in results] == ["miss", "stale", "hit"]
        for each, result in zip(batch, results, strict=True):
            assert_same(result, in_one_pass(SPEC, each))

    def test_a_long_history_is_refused_or_cut_and_reported(self) -> None:
        request = request_of(SPEC, 0, 17, 3)
        with pytest.raises(RequestError, match="17 events; at most 12 fit"):
            Served(SPEC).one(request)
        served = Served(SPEC, policy=RankingPolicy(truncation="keep_last"))
        kept = replaced(request, history={name: values[-12:] for name, values in request.history.items()})
        for result in (served.one(request), *served.session.score_packed([request])):
            assert result.truncated == 5
            assert_same(result, in_one_pass(SPEC, kept))
        assert served.one(kept).cache == "hit"
        assert served.one(kept).truncated == 0

    def test_one_bad_request_stops_the_call_before_anything_runs(self) -> None:
        served = Served(SPEC)
        bad = request_of(SPEC, 1, 5, 2)
        bad.history["genre"][3] = 6
        with pytest.raises(RequestError, match=r"request 1 \(user 1\): genre outside 0\.\.5 at index 3 \(6\)"):
            served.session.score([request_of(SPEC, 0, 5, 2), bad])
        assert served.calls("prefill") == []
        clamping = Served(SPEC, policy=RankingPolicy(unknown_ids="clamp"))
        clamped = replaced(bad, history={**bad.history, "genre": np.minimum(bad.history["genre"], 5)})
        assert_same(clamping.one(bad), in_one_pass(SPEC, clamped))


class TestBudget:
    def test_a_user_that_cannot_fit_is_refused_with_the_sizes(self) -> None:
        served = Served(SPEC, users_in_cache=0.5)
        with pytest.raises(RequestError, match=str(served.user_bytes)) as caught:
            served.session.score([request_of(SPEC, 0, 1, 2), request_of(SPEC, 1, 12, 2)])
        assert caught.value.code == "HSTU-E707"
        assert served.calls("prefill") == []

    def test_or_scored_without_the_cache_where_that_was_chosen(self) -> None:
        served = Served(SPEC, users_in_cache=0.5, over_budget="packed")
        batch = [request_of(SPEC, 0, 1, 2), request_of(SPEC, 1, 12, 2)]
        results = served.session.score(batch)
        assert [result.cache for result in results] == ["miss", "off"]
        for request, result in zip(batch, results, strict=True):
            assert_same(result, in_one_pass(SPEC, request))
        assert served.session.stats().packed_passes == 1


class TestFailures:
    @pytest.mark.parametrize("role", ["prefill", "score"])
    def test_a_failing_pass_leaves_no_half_entry(self, role: str) -> None:
        served = Served(SPEC, staging_rows=100)
        batch = [request_of(SPEC, user, 4, 2) for user in range(2)]
        served.graphs[role].failure = RuntimeError("the device fell off the bus")
        with pytest.raises(RuntimeError, match="fell off the bus"):
            served.session.score(batch)
        served.graphs[role].failure = None
        if role == "prefill":
            assert served.session.stats().cache.used_bytes == 0
        results = served.session.score(batch)
        assert [result.cache for result in results] == ["miss" if role == "prefill" else "hit"] * 2
        for request, result in zip(batch, results, strict=True):
            assert_same(result, in_one_pass(SPEC, request))


class TestConstruction:
    def graphs(self, spec: RankingSpec = SPEC) -> dict[str, Any]:
        return {role: FakeGraph(FakeModel(spec), role) for role in ROLES}

    @pytest.mark.parametrize(
        ("role", "other", "match"),
        [
            ("packed", spec_of(history_action=None), "packed .* does not take item_weights"),
            ("prefill", spec_of(scaling="batch"), "prefill .* takes scaling_seq_lens besides"),
            ("prefill", spec_of(counts_candidates=False), "prefill .* does not take num_candidates"),
            ("score", spec_of(candidate_time="other_time"), "score .* does not take item_query_time; it takes other"),
        ],
    )
    def test_a_graph_of_another_model_is_refused(self, role: str, other: RankingSpec, match: str) -> None:
        graphs = {**self.graphs(), role: self.graphs(other)[role]}
        with pytest.raises(BundleError, match="(?s)" + match) as caught:
            RankingSession(SPEC, **graphs, kv_budget_bytes=10_000)
        assert caught.value.code == "HSTU-E803"

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"prefill": None}, "prefill and score go together"),
            ({"kv_budget_bytes": 0}, "kv_budget_bytes is 0"),
            ({"over_budget": "ignore"}, "over_budget choice 'ignore'"),
            ({"staging_rows": -1}, "staging_rows is -1"),
            ({"kv_budget_bytes": 2e9}, r"2000000000.0 is a float(?s:.*)write int\(2000000000.0\)"),
            ({"kv_budget_bytes": True}, "True is a bool"),
            ({"staging_rows": "30"}, "'30' is a str"),
            ({"policy": "keep_last"}, "'keep_last' is a str(?s:.*)pass RankingPolicy"),
        ],
    )
    def test_arguments_that_do_not_go_together(self, arguments: dict[str, Any], match: str) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            RankingSession(SPEC, **{**self.graphs(), "kv_budget_bytes": 10_000, **arguments})
        assert caught.value.code == "HSTU-E901"

    def test_a_model_without_m_falcon_scores_packed_only(self) -> None:
        graph = self.graphs()["packed"]
        with RankingSession(SPEC, graph) as session:
            request = request_of(SPEC, 0, 5, 3)
            for results in (session.score([request], cache=False), session.score_packed([request])):
                assert_same(results[0], in_one_pass(SPEC, request))
            with pytest.raises(UsageError, match="built without --m-falcon"):
                session.score([request])
            assert not session.invalidate(0)
            session.clear()
            stats = session.stats()
            assert (stats.requests, stats.packed_passes, stats.staging_bytes, stats.cache.capacity_bytes) == (
                2,
                2,
                0,
                0,
            )
        assert graph.closed

    def test_candidates_that_no_split_answers_are_refused_before_anything_is_run(self) -> None:
        """Also where only one of the users is scored without the cache."""
        spec = spec_of(scaling="batch")
        served = Served(spec, users_in_cache=0.5, over_budget="packed")
        call = [request_of(spec, "short", 2, 3), request_of(spec, "long", 12, spec.max_candidates + 1)]
        with pytest.raises(RequestError, match="do not fit one packed pass") as caught:
            served.session.score(call)
        assert caught.value.code == "HSTU-E704"
        assert [served.calls(role) for role in ("packed", "prefill", "score")] == [[], [], []]
        assert served.session.stats().cache.misses == 0

    def test_close_frees_the_pools_and_the_sessions(self) -> None:
        graphs = self.graphs()
        session = RankingSession(SPEC, **graphs, kv_budget_bytes=10_000)
        session.close()
        session.close()
        assert all(graph.closed for graph in graphs.values())
        for options in ({}, {"cache": False}):
            with pytest.raises(RuntimeError, match="the session is closed"):
                session.score([request_of(SPEC, 0, 5, 3)], **options)
