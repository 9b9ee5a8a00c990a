"""What must hold for ranking sessions in buckets: mixed requests are answered as at exact shapes, whatever was evicted.

NumPy alone, as `graph_checks`. One session pads every pass to a bucket and replays a CUDA graph of it; the other runs
each at its own shapes and records none.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np
from checks import Checks
from ranking_checks import Open, PreparedBundle, difference, ranking_session

from hstu_compile.runtime.ladder import Buckets, Ladder
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_request import RankingRequest, RankingResult
from hstu_compile.runtime.ranking_spec import RankingSpec
from tests.ranking_requests import request_of

#: Far apart, so that nearly every pass is padded; more combinations than each graph of a bundle keeps CUDA graphs.
BUCKETS = Buckets(events=Ladder((32, 128, 512, 2048)), candidates=Ladder((3, 16, 64)), sequences=Ladder((1, 3, 8)))
USERS = 300
#: Full histories that the cache holds: fewer than there are users.
CACHED_USERS = 8
#: Of a call; most calls have one alone.
MOST_AT_ONCE = 4
#: Share of calls that are answered without the cache.
PACKED_SHARE = 0.3
#: What the comparison must notice: every answer a tenth too small.
TOO_SMALL = 0.9
#: Calls from one line of progress to the next.
_PROGRESS = 500


@dataclasses.dataclass(frozen=True)
class Call:
    """Requests that are made together, and how."""

    requests: tuple[RankingRequest, ...]
    is_packed: bool

    def answered(self, session: RankingSession) -> list[RankingResult]:
        """By either way of scoring."""
        return (session.score_packed if self.is_packed else session.score)(self.requests)


def mixed_calls(spec: RankingSpec, count: int) -> Iterator[Call]:
    """Calls of `count` requests in all: users come back, of any length from none to the longest, few of them often."""
    rng = np.random.default_rng(count)
    most, cap = spec.max_history_len, spec.max_candidates
    # Squared: many short histories, some of every length.
    events = np.rint(most * rng.uniform(0, 1, USERS) ** 2).astype(int)
    candidates = rng.integers(0, cap + 1, USERS)
    while count > 0:
        size = 1 if rng.uniform() < 0.5 else int(rng.integers(1, MOST_AT_ONCE + 1))
        size = min(size, spec.max_batch, count)
        users = np.minimum(rng.geometric(8 / USERS, size) - 1, USERS - 1)
        # A user is asked for once in a call: a cache entry has one owner at a time.
        users = np.unique(users)
        count -= len(users)
        requests = tuple(request_of(spec, f"user {user}", events[user], candidates[user], seed=user) for user in users)
        yield Call(requests, bool(rng.uniform() < PACKED_SHARE))


def check_buckets(
    checks: Checks, bundle: PreparedBundle, exact: Open, bucketed: Open, count: int, *, records: bool
) -> None:
    """`count` mixed requests in buckets and at exact shapes.

    Args:
        checks: takes the result.
        bundle: of the graphs.
        exact: opens a graph's session without buckets.
        bucketed: opens it with `BUCKETS`.
        count: requests.
        records: the bucketed sessions keep CUDA graphs, fewer than there are buckets.
    """
    with (
        checks.check(f"{bundle.name}: {count} mixed requests in buckets are answered as at exact shapes") as check,
        ranking_session(bundle.spec, exact, CACHED_USERS) as expected,
        ranking_session(bundle.spec, bucketed, CACHED_USERS) as session,
    ):
        worst, outcomes_differ, notices = 0.0, 0, True
        in_buckets, at_exact_shapes = _Timed(session), _Timed(expected)
        for number, call in enumerate(mixed_calls(bundle.spec, count)):
            found, wanted = in_buckets.answered(call), at_exact_shapes.answered(call)
            if number % _PROGRESS == 0:
                print(f"{number} calls, {in_buckets.seconds:.0f} and {at_exact_shapes.seconds:.0f} s", flush=True)
            outcomes_differ += [each.cache for each in found] != [each.cache for each in wanted]
            if any(len(each.logits) for each in wanted):
                worst = max(worst, difference(found, wanted))
                notices &= difference(_scaled(found, TOO_SMALL), wanted) > bundle.bound
        stats = session.stats()
        passes = {name: sum(each.passes.values()) for name, each in stats.buckets.items()}
        check.facts |= {
            "difference": worst,
            "bound": bundle.bound,
            "seconds_in_buckets": in_buckets.seconds,
            "seconds_at_exact_shapes": at_exact_shapes.seconds,
            "calls_whose_cache_outcomes_differ": outcomes_differ,
            "a_tenth_less_is_noticed": notices,
            "passes_in_buckets": passes,
            "buckets": {name: len(each.passes) for name, each in stats.buckets.items()},
            "passes_at_exact_shapes": {name: each.exact for name, each in stats.buckets.items()},
            "added_rows": {name: each.added_rows for name, each in stats.buckets.items()},
            "cache": stats.cache,
            "graphs": stats.graphs,
        }
        graphs = stats.graphs
        turned_over = not records or (
            graphs is not None and graphs.replays > 0 and graphs.evictions > 0 and not graphs.failures
        )
        check.passed = (
            worst <= bundle.bound
            and notices
            and not outcomes_differ
            and min(passes.values()) > 0
            and stats.cache.evictions > 0
            and turned_over
        )


class _Timed:
    """A session, and how long its calls took."""

    def __init__(self, session: RankingSession) -> None:
        self._session = session
        self.seconds = 0.0

    def answered(self, call: Call) -> list[RankingResult]:
        started = time.perf_counter()
        results = call.answered(self._session)
        self.seconds += time.perf_counter() - started
        return results


def _scaled(results: Sequence[RankingResult], factor: float) -> list[RankingResult]:
    return [dataclasses.replace(each, logits=each.logits * np.float32(factor)) for each in results]
