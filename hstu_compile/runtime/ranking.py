"""Score candidates with M-FALCON: encode each history once, then its candidates in micro-batches. Level 3; no torch.

`RankingSession` joins three graphs of one model, a KV cache on their device, and the schedule. The same class serves
ONNX Runtime and TensorRT.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from hstu_compile.errors import BundleError, RequestError, UsageError
from hstu_compile.runtime._calls_in_flight import CallsInFlight
from hstu_compile.runtime._jagged import joined
from hstu_compile.runtime._packed_pieces import packed_passes
from hstu_compile.runtime._ranking_feeds import (
    among_all_rows,
    input_names,
    packed_feeds,
    prefill_feeds,
    rows_of,
    score_feeds,
    validity_of,
)
from hstu_compile.runtime._resident_io import Copies
from hstu_compile.runtime._session_arguments import check_choice, checked_budget, checked_staging
from hstu_compile.runtime.bucketed_session import BucketStats, bucket_stats, has_buckets, resident_rows
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.kv_cache import KvCache, KvEntry, KvLease, KvStats, KvWant
from hstu_compile.runtime.kv_layout import KvLayout
from hstu_compile.runtime.kv_store import KvBlocks, KvRows, KvStore, whole_rows
from hstu_compile.runtime.m_falcon import PassLimits, Piece, default_staged_rows, micro_batches
from hstu_compile.runtime.ranking_request import (
    Arrays,
    CacheUse,
    CheckedRequest,
    RankingPolicy,
    RankingRequest,
    RankingResult,
    checked_requests,
)
from hstu_compile.runtime.ranking_spec import RankingSpec
from hstu_compile.runtime.resident import MemoryPool, ResidentTensor
from hstu_compile.runtime.session import Session

OverBudget = Literal["refuse", "packed"]


@dataclasses.dataclass(frozen=True)
class RankingStats:
    """Counters since the session was made.

    Attributes:
        requests: answered.
        candidates: scored, over all passes.
        prefill_passes: runs of `prefill`.
        score_passes: runs of `score`.
        packed_passes: runs of `packed`.
        staging_bytes: memory beside the cache's budget, for passes whose keys and values are copied.
        scores_in_place: whether `score` reads the keys and values of all users of a pass where they lie in the cache.
            False: those of several users are copied to the staging memory first, with CUDA graphs also those of one.
        cache: the KV cache's counters.
        graphs: CUDA graphs of the three sessions together.
        buckets: of each graph that has buckets, by its name.
    """

    requests: int
    candidates: int
    prefill_passes: int
    score_passes: int
    packed_passes: int
    staging_bytes: int
    scores_in_place: bool
    cache: KvStats
    graphs: GraphStats
    buckets: Mapping[str, BucketStats]


class _Group:
    """Requests that share one user's keys and values: their candidates are scored as one sequence."""

    def __init__(self, want: KvWant) -> None:
        self.want = want
        self.indices: list[int] = []
        self.requests: list[CheckedRequest] = []

    def add(self, index: int, request: CheckedRequest) -> None:
        self.indices.append(index)
        self.requests.append(request)

    @property
    def head(self) -> CheckedRequest:
        """Any of the requests: they differ in nothing but their candidates."""
        return self.requests[0]

    def candidates(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        return joined([request.candidates for request in self.requests], names)


class RankingSession:
    """Scores candidates of many users on one device. Safe to use from several threads.

    `score` looks for each user's cached keys and values, runs `prefill` for those that are absent or outdated (several
    users per pass), then `score` in micro-batches (several users per pass). Threads only meet in the cache's
    bookkeeping, in the staging memory, and inside the sessions, which run one call at a time.

    Where the graph `score` takes the cache's tensors whole, as an engine with the plugin does, every pass reads the
    cache where it lies. Then neither addresses nor shapes know whose keys and values are read, and with CUDA graphs all
    passes of as many candidates and users are replays of one. Elsewhere a pass of one user reads the cache where it
    lies, and one of several a copy in the staging memory; with CUDA graphs, all read the staging memory.

    A user's entry is reused only where the model's cache rule allows (`RankingSpec.cache_rule`): the digest of all that
    the entry depends on decides, so a reuse is never approximate. With `scaling` "batch" every request is its own
    batch: the divisor is its own history, candidates and contextual tokens, whoever is scored beside it.

    Device memory is the cache's budget plus the staging memory, both allocated here, plus the sessions' own.

    Args:
        spec: the model's facts.
        packed: the graph that scores history and candidates in one pass. The session owns it, and the next two.
        prefill: the graph from history to keys and values; None for a model built without --m-falcon.
        score: the graph that scores candidates against keys and values; goes with `prefill`.
        kv_budget_bytes: memory for cached keys and values; what a user takes is `entry_bytes`.
        staging_rows: rows that passes of several users may have in all. None means as many as make a pass worth its
            start, 8192 or one user of full length, but neither more than `max_batch` users have nor than the budget
            holds: memory beside the budget is at most that of one pass.
        policy: what to do with histories that are too long and ids that are unknown.
        over_budget: a user whose keys and values alone exceed the budget: "refuse" raises HSTU-E707; "packed" scores
            without the cache, and the result says so.

    Raises:
        BundleError: HSTU-E803 if a graph's inputs are not those of the specification.
        EngineError: HSTU-E404 if the memory cannot be had.
        UsageError: HSTU-E901 for arguments that do not go together.

    Warns:
        RuntimeWarning: if the cache has more rows than `score` takes as one tensor, so that passes make copies.
    """

    def __init__(
        self,
        spec: RankingSpec,
        packed: Session,
        prefill: Session | None = None,
        score: Session | None = None,
        *,
        kv_budget_bytes: int = 0,
        staging_rows: int | None = None,
        policy: RankingPolicy | None = None,
        over_budget: OverBudget = "refuse",
    ) -> None:
        if (prefill is None) != (score is None):
            raise UsageError(
                "HSTU-E901",
                "prefill and score go together",
                "only one of the two graphs was given",
                "give both, or neither",
            )
        check_choice("over_budget", over_budget, get_args(OverBudget))
        if score is not None:
            kv_budget_bytes = checked_budget(kv_budget_bytes, type(self).__name__)
        staging_rows = checked_staging(staging_rows)
        _check_policy(policy)
        for role, session in (("packed", packed), ("prefill", prefill), ("score", score)):
            if session is not None:
                _check_inputs(role, session, spec)
        self.spec, self.policy = spec, policy or RankingPolicy()
        self._packed, self._prefill, self._score, self._over_budget = packed, prefill, score, over_budget
        self._layout = KvLayout(spec.num_layers, spec.num_heads, spec.attention_dim, spec.linear_dim, spec.kv_dtype)
        if staging_rows is None:
            longest = spec.contextual_len + spec.max_history_len
            affordable = self._layout.rows_within(kv_budget_bytes)
            staging_rows = default_staged_rows(longest, spec.max_batch, affordable)
        self._limits = self._score_limits = PassLimits(spec.micro_batch, spec.max_batch, staging_rows)
        self._counts: collections.Counter[str] = collections.Counter()
        self._counting, self._staging_lock = threading.Lock(), threading.Lock()
        self._calls = CallsInFlight()
        self._pools: list[MemoryPool] = []
        self._all_rows: KvRows | None = None
        if score is None:
            return
        try:
            self._store = self._store_of(score, kv_budget_bytes)
            self._staging = self._pool_of(score, self._layout.entry_bytes(self._limits.staged_rows))
            region = self._staging.allocate(self._staging.capacity_bytes)
            assert region is not None  # the pool is new and of this size
            self._staging_region = region
        except BaseException:
            self._close_pools()
            raise
        self._cache = KvCache(self._store, spec.model_version)

    def _store_of(self, score: Session, kv_budget_bytes: int) -> KvStore:
        pool = self._pool_of(score, kv_budget_bytes)
        if not takes_all_rows(score, self.spec, whole_rows(self._layout, pool.capacity_bytes)):
            return KvBlocks(pool, self._layout)
        self._all_rows = rows = KvRows(pool, self._layout)
        # What is not copied side by side needs no memory.
        self._score_limits = dataclasses.replace(self._limits, staged_rows=rows.capacity_rows)
        return rows

    def _pool_of(self, session: Session, capacity_bytes: int) -> MemoryPool:
        pool = session.memory_pool(capacity_bytes)
        self._pools.append(pool)
        return pool

    @property
    def runtime(self) -> str:
        """Runtime and version."""
        return self._packed.name

    def entry_bytes(self, num_events: int) -> int:
        """Bytes of the budget that a user with a history of that length takes."""
        rows = self.spec.contextual_len + num_events
        return self._layout.entry_bytes(rows) if self._score is None else self._store.entry_bytes(rows)

    def score(self, requests: Sequence[RankingRequest], *, cache: bool = True) -> list[RankingResult]:
        """Score each request's candidates after its history.

        Args:
            requests: any number, of any users; the same user may appear more than once.
            cache: False scores by `score_packed`.

        Returns:
            One result per request, in their order.

        Raises:
            RequestError: HSTU-E701 to E705 with every fault of every request, before anything is run; E707 for a user
                that the budget cannot hold.
            UsageError: HSTU-E901 if the model was built without --m-falcon and `cache` is asked for.
            RuntimeError: if the session is closed.
        """
        if not cache:
            return self.score_packed(requests)
        if self._score is None:
            raise _lacks_m_falcon("score with the cache")
        with self._calls:
            return self._score_cached(requests)

    def _score_cached(self, requests: Sequence[RankingRequest]) -> list[RankingResult]:
        checked = checked_requests(requests, self.spec, self.policy)
        answers = _Answers(checked, len(self.spec.tasks))
        without_cache = []
        groups: dict[KvWant, _Group] = {}
        for index, request in enumerate(checked):
            if not request.num_candidates:
                continue
            rows = rows_of(request, self.spec)
            if self._over_budget == "packed" and self._store.entry_bytes(rows) > self._store.capacity_bytes:
                without_cache.append(index)
                continue
            want = KvWant(request.user, rows, validity_of(request, self.spec))
            groups.setdefault(want, _Group(want)).add(index, request)
        # First: a split that gives no answer is refused before anything is run.
        self._run_packed(without_cache, answers)
        waiting = list(groups.values())
        while waiting:
            with self._cache.checkout([group.want for group in waiting], self.spec.model_version) as lease:
                leased, waiting = waiting[: len(lease)], waiting[len(lease) :]
                self._encode(leased, lease)
                self._score_leased(leased, lease, answers)
        self._count(requests=len(checked))
        return answers.results()

    def score_packed(self, requests: Sequence[RankingRequest]) -> list[RankingResult]:
        """Score each request's history and candidates in one forward pass, without the cache.

        More candidates than the profile takes are split over passes. The graph reads the anchor, and whether
        contextual features are long enough, from the candidates it is given; so each part ends with the request's last
        candidate where query times differ, and is as long as the profile allows.

        Returns:
            As `score` does; `cache` is "off".

        Raises:
            RequestError: as `score`; HSTU-E704 also where no split gives the same answer: with `scaling` "batch", whose
                divisor counts the candidates of a pass.
            RuntimeError: if the session is closed.
        """
        with self._calls:
            checked = checked_requests(requests, self.spec, self.policy)
            answers = _Answers(checked, len(self.spec.tasks))
            self._run_packed([index for index, request in enumerate(checked) if request.num_candidates], answers)
            self._count(requests=len(checked))
            return answers.results()

    def append(self, user: str | int, history: Arrays) -> None:
        """Extend a user's cached history by new events; refused by every cache rule so far.

        Send the longer history with the next request: it is encoded once, and the outdated entry is dropped.

        Raises:
            RequestError: HSTU-E709, saying why.
        """
        reason = {
            "request": "positions count back from the query and time buckets are anchored at it, so a new event "
            "changes the keys and values of every older one",
            "prefix": "the bundle has no graph that encodes new events against cached ones",
        }[self.spec.cache_rule]
        count = max((len(values) for values in history.values()), default=0)
        raise RequestError(
            "HSTU-E709",
            f"the cached history of user {user!r} cannot be extended by {count} events",
            reason,
            "send the longer history with the next request; it is encoded again, once",
            {"user": user, "cache_rule": self.spec.cache_rule},
        )

    def invalidate(self, user: str | int) -> bool:
        """Forget a user's keys and values; True if there were any.

        A `score` that is using them ends as if it had come before; one that starts later does not find them.
        """
        return self._score is not None and self._cache.invalidate(user)

    def clear(self) -> None:
        """Forget every user."""
        if self._score is not None:
            self._cache.clear()

    def stats(self) -> RankingStats:
        """Counters."""
        if self._score is None:
            kv, staging_bytes = KvStats(0, 0, 0, 0, 0, 0, 0), 0
        else:
            kv, staging_bytes = self._cache.stats, self._staging.capacity_bytes
        with self._counting:
            counts = self._counts.copy()
        return RankingStats(
            requests=counts["requests"],
            candidates=counts["candidates"],
            prefill_passes=counts["prefill_passes"],
            score_passes=counts["score_passes"],
            packed_passes=counts["packed_passes"],
            staging_bytes=staging_bytes,
            scores_in_place=self._all_rows is not None,
            cache=kv,
            graphs=self._graph_stats(),
            buckets=bucket_stats({"packed": self._packed, "prefill": self._prefill, "score": self._score}),
        )

    def _graph_stats(self) -> GraphStats:
        sessions = (self._packed, self._prefill, self._score)
        each = [session.graph_stats for session in sessions if session is not None]
        return sum((stats for stats in each if stats is not None), GraphStats())

    def close(self) -> None:
        """Refuse further calls, wait for those that are scoring, and free the memory and the three sessions.

        A second call does nothing.

        Raises:
            RuntimeError: if this thread is scoring, as a signal's handler may be.
        """
        if not self._calls.close():
            return
        self._close_pools()
        for session in (self._packed, self._prefill, self._score):
            if session is not None:
                session.close()

    def __enter__(self) -> RankingSession:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _close_pools(self) -> None:
        while self._pools:
            self._pools.pop().close()

    def _count(self, **changes: int) -> None:
        with self._counting:
            self._counts.update(changes)

    def _encode(self, groups: Sequence[_Group], lease: KvLease) -> None:
        """Fill the leased entries that are not there yet."""
        absent = []
        for group, entry in zip(groups, lease, strict=True):
            if entry.outcome == "hit":
                continue
            if entry.rows:
                absent.append((group, entry))
            else:
                lease.publish(entry)
        for batch in self._prefill_batches(absent):
            requests = [group.head for group, _ in batch]
            entries = [entry for _, entry in batch]
            if self._used_in_place(entries, self._prefill):
                self._run_prefill(requests, entries[0].tensors)
            else:
                with self._staging_lock:
                    staged = self._staged(self._prefill, entries, prefill_feeds(requests, self.spec))
                    self._run_prefill(requests, staged, after=list(_side_by_side(staged, entries)))
            for _, entry in batch:
                lease.publish(entry)

    def _prefill_batches(self, absent: Sequence[tuple[_Group, KvEntry]]) -> Iterator[list[tuple[_Group, KvEntry]]]:
        """Runs of users that fit one pass and the staging memory."""
        batch: list[tuple[_Group, KvEntry]] = []
        rows = 0
        for group, entry in absent:
            if batch and (len(batch) == self._limits.sequences or rows + entry.rows > self._limits.staged_rows):
                yield batch
                batch, rows = [], 0
            batch.append((group, entry))
            rows += entry.rows
        if batch:
            yield batch

    def _run_prefill(
        self, requests: Sequence[CheckedRequest], outputs: Mapping[str, ResidentTensor], after: Copies = ()
    ) -> None:
        assert self._prefill is not None  # checked where scoring starts
        self._prefill.run_resident(prefill_feeds(requests, self.spec), outputs, after=after)
        self._count(prefill_passes=1)

    def _used_in_place(self, entries: Sequence[KvEntry], session: Session | None) -> bool:
        """Whether a pass is given an entry's own tensors.

        A CUDA graph knows the addresses that it was recorded with, and every user lies elsewhere: with graphs a user's
        rows go through the staging memory, where equal shapes are at equal places. The copy of 42 MB (4096 rows of 5
        layers in fp16) takes an H100 0.11 ms; the launches that it saves, 0.5 ms. In buckets they go there too, where
        there is room for padding.
        """
        if len(entries) > 1:
            return False
        replays = session is not None and (session.graph_stats is not None or has_buckets(session))
        return not replays or not 0 < entries[0].rows <= self._limits.staged_rows

    def _score_leased(self, groups: Sequence[_Group], lease: KvLease, answers: _Answers) -> None:
        candidates = [group.candidates(self.spec.candidate_names) for group in groups]
        totals = [part[self.spec.candidate_time].shape[0] for part in candidates]
        joint = [_Rows(total, len(self.spec.tasks)) for total in totals]
        passes = micro_batches(totals, [entry.rows for entry in lease], self._score_limits)
        for _, run in itertools.groupby(enumerate(passes), lambda numbered: _alone(*numbered)):
            self._score_run([pieces for _, pieces in run], groups, lease, candidates, joint)
        for group, entry, rows in zip(groups, lease, joint, strict=True):
            assert entry.outcome != "extended"  # no request here extends an entry
            start = 0
            for place, (index, request) in enumerate(zip(group.indices, group.requests, strict=True)):
                # Only the group's first request found the entry as it was; the others found what that one left.
                answers.cache[index] = "hit" if place else entry.outcome
                answers.rows[index].put(rows.arrays, start, slice(0, request.num_candidates))
                start += request.num_candidates

    def _score_run(
        self,
        passes: Sequence[Sequence[Piece]],
        groups: Sequence[_Group],
        lease: KvLease,
        candidates: Sequence[dict[str, NDArray[Any]]],
        joint: Sequence[_Rows],
    ) -> None:
        """Passes that read the same entries: these are staged once, if at all."""
        if self._all_rows is not None:
            passes = [self._as_they_lie(pieces, lease) for pieces in passes]
        entries = [lease[piece.sequence] for piece in passes[0]]
        with contextlib.ExitStack() as held:
            cached, before = self._cached_rows(entries, held)
            for pieces in passes:
                feeds = score_feeds(
                    [groups[piece.sequence].head for piece in pieces],
                    [_cut(candidates[piece.sequence], piece) for piece in pieces],
                    self.spec,
                )
                if self._all_rows is not None:
                    feeds = among_all_rows(feeds, [self._all_rows.first_row(entry.region) for entry in entries])
                outputs = self._run_score(feeds, cached, before)
                before = ()
                start = 0
                for piece in pieces:
                    joint[piece.sequence].put(outputs, start, slice(piece.start, piece.stop))
                    start += piece.num_candidates

    def _as_they_lie(self, pieces: Sequence[Piece], lease: KvLease) -> list[Piece]:
        """In the order of their entries in the cache."""
        return sorted(pieces, key=lambda piece: lease[piece.sequence].region.offset)

    def _cached_rows(
        self, entries: Sequence[KvEntry], held: contextlib.ExitStack
    ) -> tuple[Mapping[str, ResidentTensor], Copies]:
        """Keys and values that passes of these users read, and the copies before the first of them.

        Args:
            entries: of the users.
            held: takes the lock of the staging memory, if that is used.
        """
        if self._all_rows is not None:
            return self._all_rows.tensors_of_all, ()
        if self._used_in_place(entries, self._score):
            return entries[0].tensors, ()
        held.enter_context(self._staging_lock)
        staged = self._staged(self._score, entries)
        return staged, [(block, rows) for rows, block in _side_by_side(staged, entries)]

    def _run_score(
        self, feeds: dict[str, NDArray[Any]], cached: Mapping[str, ResidentTensor], before: Copies
    ) -> dict[str, NDArray[Any]]:
        assert self._score is not None  # checked where scoring starts
        outputs = self._score.run_resident({**feeds, **cached}, {}, before=before)
        self._count(score_passes=1, candidates=int(feeds["candidate_offsets"][-1]))
        return outputs

    def _staged(
        self, session: Session | None, entries: Sequence[KvEntry], feeds: Arrays | None = None
    ) -> dict[str, ResidentTensor]:
        """Blocks of the entries' rows, or of their bucket's, in the staging memory, whose lock the caller holds."""
        rows, most = sum(entry.rows for entry in entries), self._limits.staged_rows
        rows = resident_rows(session, self.spec.cached_names()[0], rows, most, feeds)
        return self._layout.tensors(self._staging, self._staging_region, rows)

    def _run_packed(self, indices: Sequence[int], answers: _Answers) -> None:
        chosen = [answers.requests[index] for index in indices]
        for parts in packed_passes(chosen, self.spec):
            outputs = self._packed.run(
                packed_feeds(
                    [chosen[part.sequence] for part in parts],
                    [_taken(chosen[part.sequence].candidates, part.taken) for part in parts],
                    self.spec,
                )
            )
            self._count(packed_passes=1, candidates=sum(len(part.taken) for part in parts))
            start = 0
            for part in parts:
                answers.rows[indices[part.sequence]].put(outputs, start, slice(part.start, part.stop))
                start += len(part.taken)


class _Rows:
    """Predictions and logits of some candidates, filled piece by piece."""

    def __init__(self, num_candidates: int, num_tasks: int) -> None:
        self.arrays = {name: np.full((num_candidates, num_tasks), np.nan, np.float32) for name in ("preds", "logits")}

    def put(self, outputs: Arrays, start: int, target: slice) -> None:
        """Take the rows that begin at `start`, as many as the target has."""
        for name, array in self.arrays.items():
            array[target] = outputs[name][start : start + target.stop - target.start]


class _Answers:
    """What has been computed of each request so far."""

    def __init__(self, requests: Sequence[CheckedRequest], num_tasks: int) -> None:
        self.requests = requests
        self.rows = [_Rows(request.num_candidates, num_tasks) for request in requests]
        self.cache: list[CacheUse] = ["off"] * len(requests)

    def results(self) -> list[RankingResult]:
        return [
            RankingResult(rows.arrays["preds"], rows.arrays["logits"], cache, request.truncated)
            for request, rows, cache in zip(self.requests, self.rows, self.cache, strict=True)
        ]


def _alone(number: int, pieces: Sequence[Piece]) -> tuple[str, int]:
    """Equal for passes that follow one another and read one and the same user alone."""
    return ("user", pieces[0].sequence) if len(pieces) == 1 else ("pass", number)


def _cut(candidates: Arrays, piece: Piece) -> dict[str, NDArray[Any]]:
    return {name: array[piece.start : piece.stop] for name, array in candidates.items()}


def _taken(candidates: Arrays, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
    return {name: array[indices] for name, array in candidates.items()}


def _side_by_side(
    staged: Mapping[str, ResidentTensor], entries: Sequence[KvEntry]
) -> Iterator[tuple[ResidentTensor, ResidentTensor]]:
    """(rows of the staging memory, block of an entry), for every block of every entry."""
    start = 0
    for entry in entries:
        for name, block in entry.tensors.items():
            yield staged[name].rows(start, start + entry.rows), block
        start += entry.rows


class HasProfile(Protocol):
    """What can tell the sizes that it takes: a session, for one."""

    def most_rows(self, name: str) -> int | None:
        """See `Session.most_rows`."""


def takes_all_rows(score: HasProfile, spec: RankingSpec, rows: int) -> bool:
    """Whether the cache may be given to `score` as tensors of so many rows.

    A profile with twice as many sequences as there are users was made for that; see `among_all_rows`. Without one the
    graph may be run by gathering rows, which costs as much as there are.

    Warns:
        RuntimeWarning: if it may not, only because there are too many rows.
    """
    sequences = score.most_rows("candidate_offsets")
    most = [score.most_rows(name) for name in spec.cached_names()]
    known = [each for each in most if each is not None]
    if sequences is None or len(known) < len(most) or sequences <= 2 * spec.max_batch:
        return False
    if rows > min(known):
        warnings.warn(
            f"keys and values are copied before each pass: the KV cache has {rows} rows, and the engine of score takes "
            f"{min(known)} as one tensor; a smaller kv_budget_bytes is read in place",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True


def _check_inputs(role: str, session: Session, spec: RankingSpec) -> None:
    expected, found = set(input_names(spec)[role]), {tensor.name for tensor in session.inputs}
    if expected != found:
        lacking, extra = sorted(expected - found), sorted(found - expected)
        raise BundleError(
            "HSTU-E803",
            f"the graph {role} does not belong to the manifest's ranking entry",
            "; ".join(
                text
                for names, text in (
                    (lacking, f"it does not take {', '.join(lacking)}"),
                    (extra, f"it takes {', '.join(extra)} besides"),
                )
                if names
            ),
            "build the bundle again",
            {"lacking": lacking, "extra": extra},
        )


def _check_policy(policy: object) -> None:
    if policy is not None and not isinstance(policy, RankingPolicy):
        raise UsageError(
            "HSTU-E901",
            "the policy is no RankingPolicy",
            f"{policy!r} is a {type(policy).__name__}",
            "pass RankingPolicy(truncation='keep_last'), for instance",
        )


def _lacks_m_falcon(what: str) -> UsageError:
    return UsageError(
        "HSTU-E901",
        f"this model cannot {what}",
        "it was built without --m-falcon and has no graphs prefill and score",
        "build it with --m-falcon micro-batch=N, or use score_packed",
    )
