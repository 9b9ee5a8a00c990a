"""Encode growing histories: each event once, as long as the history that is known is what the new one begins with.

Level 3; no torch. `RetrievalSession` joins three graphs of one model and a KV cache on their device. The same class
serves ONNX Runtime and TensorRT.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from hstu_compile.errors import BundleError
from hstu_compile.runtime._calls_in_flight import CallsInFlight
from hstu_compile.runtime._resident_io import Copies
from hstu_compile.runtime._retrieval_feeds import (
    KnownBeginning,
    append_feeds,
    clean_rows,
    history_feeds,
    input_names,
    validity_of,
)
from hstu_compile.runtime._session_arguments import check_choice, checked_budget, checked_staging
from hstu_compile.runtime.bucketed_session import BucketStats, bucket_stats, has_buckets, resident_rows
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.kv_cache import KvCache, KvEntry, KvLease, KvStats, KvWant
from hstu_compile.runtime.kv_layout import KvLayout
from hstu_compile.runtime.kv_store import KvBlocks
from hstu_compile.runtime.m_falcon import default_staged_rows
from hstu_compile.runtime.resident import MemoryPool, Region, ResidentTensor
from hstu_compile.runtime.retrieval_request import (
    CheckedHistory,
    Reason,
    RetrievalRequest,
    RetrievalResult,
    Reuse,
    Truncation,
    checked_histories,
)
from hstu_compile.runtime.retrieval_spec import RetrievalSpec
from hstu_compile.runtime.session import Session

OverBudget = Literal["refuse", "uncached"]
_Outputs = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class RetrievalStats:
    """Counters since the session was made.

    Attributes:
        requests: answered.
        encoded: events that went through the layers.
        reused: events that did not, because their keys and values were known.
        append_passes: runs of `append`.
        prefill_passes: runs of `prefill`.
        uncached_passes: runs of `retrieval`.
        whole: requests whose whole history was encoded, by the `RetrievalResult.reason`.
        staging_bytes: memory beside the cache's budget: for passes of several users, for new rows, and for all passes
            with CUDA graphs.
        cache: the KV cache's counters.
        graphs: CUDA graphs of the three sessions together.
        buckets: of each graph that has buckets, by its name.
    """

    requests: int
    encoded: int
    reused: int
    append_passes: int
    prefill_passes: int
    uncached_passes: int
    whole: Mapping[str, int]
    staging_bytes: int
    cache: KvStats
    graphs: GraphStats
    buckets: Mapping[str, BucketStats]


@dataclasses.dataclass(frozen=True, eq=False)
class _Pending:
    """A request on its way through the cache."""

    index: int
    history: CheckedHistory
    want: KvWant
    beginning: KnownBeginning


@dataclasses.dataclass(frozen=True, eq=False)
class _Leased:
    """A request and the entry that its history's keys and values are, or are going to be, in."""

    pending: _Pending
    entry: KvEntry

    @property
    def history(self) -> CheckedHistory:
        return self.pending.history

    @property
    def known(self) -> KvEntry:
        """The entry that holds what is reused."""
        return self.entry if self.entry.base is None else self.entry.base

    @property
    def kept(self) -> int:
        """Rows that are reused."""
        return clean_rows(self.known.rows)

    @property
    def new_rows(self) -> int:
        return self.history.num_events - self.kept


class RetrievalSession:
    """Answers growing histories of many users on one device. Safe to use from several threads.

    `encode` takes whole histories. Where the cached one is what a history begins with, `append` encodes the new events
    and, once more, the one before them; otherwise `prefill` encodes all of it, and the result says why. Which rows may
    be reused is `RetrievalSpec.cache_rule`; the digest of the events decides, so a reuse is never approximate.

    More new events than the graph takes (`max_append`) are a `prefill`. Threads only meet in the cache's bookkeeping,
    in the staging memory, and inside the sessions, which run one call at a time.

    A user's old rows are copied to where the longer history will lie, and stay until the new ones are there: two
    threads that ask for one user never see half of an update. Device memory is the cache's budget plus the staging
    memory, both allocated here, plus the sessions' own.

    Args:
        spec: the model's facts.
        retrieval: the graph from whole histories to answers. The session owns it, and the next two.
        prefill: the graph that gives keys and values as well.
        append: the graph that extends them.
        kv_budget_bytes: memory for cached keys and values; what a user takes is `entry_bytes`. A user whose history
            grows needs room for both lengths for a moment.
        staging_rows: rows that passes of several users may have in all. None means as many as make a pass worth its
            start, 8192 or one user of full length, but neither more than `max_batch` users have nor than the budget
            holds.
        truncation: a history over the limit: "refuse" raises HSTU-E704; "keep_last" drops the oldest events, and the
            result says how many. Such a history is encoded as a whole whenever it grows: every position has moved.
        over_budget: a user whose keys and values alone exceed the budget: "refuse" raises HSTU-E707; "uncached" answers
            without the cache, and the result says so.

    Raises:
        BundleError: HSTU-E803 if a graph's inputs are not those of the specification.
        EngineError: HSTU-E404 if the memory cannot be had.
        UsageError: HSTU-E901 for arguments that have no meaning.
    """

    def __init__(
        self,
        spec: RetrievalSpec,
        retrieval: Session,
        prefill: Session,
        append: Session,
        *,
        kv_budget_bytes: int,
        staging_rows: int | None = None,
        truncation: Truncation = "refuse",
        over_budget: OverBudget = "refuse",
    ) -> None:
        check_choice("truncation", truncation, get_args(Truncation))
        check_choice("over_budget", over_budget, get_args(OverBudget))
        kv_budget_bytes = checked_budget(kv_budget_bytes, type(self).__name__)
        staging_rows = checked_staging(staging_rows)
        for role, session in (("retrieval", retrieval), ("prefill", prefill), ("append", append)):
            _check_inputs(role, session, spec)
        self.spec = spec
        self._retrieval, self._prefill, self._append = retrieval, prefill, append
        self._truncation, self._over_budget = truncation, over_budget
        self._layout = KvLayout(spec.num_layers, spec.num_heads, spec.attention_dim, spec.linear_dim, spec.kv_dtype)
        if staging_rows is None:
            affordable = self._layout.rows_within(kv_budget_bytes)
            staging_rows = default_staged_rows(spec.max_seq_len, spec.max_batch, affordable)
        self._staged_rows, most_new = staging_rows, spec.max_append + 1
        # One user's new rows have to fit, whatever the staging memory is cut down to.
        self._new_rows = max(most_new, min(staging_rows, spec.max_batch * most_new))
        self._counts: collections.Counter[str] = collections.Counter()
        self._whole: collections.Counter[str] = collections.Counter()
        self._counting, self._staging_lock = threading.Lock(), threading.Lock()
        self._calls = CallsInFlight()
        with contextlib.ExitStack() as opened:
            self._pool = opened.enter_context(append.memory_pool(kv_budget_bytes))
            sizes = [self._layout.entry_bytes(rows) for rows in (self._staged_rows, self._new_rows)]
            self._staging = opened.enter_context(append.memory_pool(sum(sizes)))
            self._rows_region, self._new_region = (_whole(self._staging, size) for size in sizes)
            self._memory = opened.pop_all()
        self._cache = KvCache(KvBlocks(self._pool, self._layout), spec.model_version)

    @property
    def runtime(self) -> str:
        """Runtime and version."""
        return self._retrieval.name

    def entry_bytes(self, num_events: int) -> int:
        """Bytes of the budget that a user with a history of that length takes."""
        return self._layout.entry_bytes(num_events)

    def encode(self, requests: Sequence[RetrievalRequest], *, cache: bool = True) -> list[RetrievalResult]:
        """User embeddings, and the best items where the model lists them.

        Args:
            requests: any number, of any users; the same user may appear more than once.
            cache: False encodes every history as a whole, and keeps nothing.

        Returns:
            One result per request, in their order.

        Raises:
            RequestError: HSTU-E701 to E705 with every fault of every request, before anything is run; E707 for a user
                that the budget cannot hold.
            RuntimeError: if the session is closed.
        """
        with self._calls:
            return self._encode(requests, cache)

    def _encode(self, requests: Sequence[RetrievalRequest], cache: bool) -> list[RetrievalResult]:
        checked = checked_histories(requests, self.spec, self._truncation)
        answers: list[RetrievalResult | None] = [None] * len(checked)
        waiting: list[_Pending] = []
        uncached: list[tuple[int, CheckedHistory, Reason]] = []
        for index, history in enumerate(checked):
            size = self._layout.entry_bytes(history.num_events)
            if not cache:
                uncached.append((index, history, "not_asked"))
            elif self._over_budget == "uncached" and size > self._pool.capacity_bytes:
                uncached.append((index, history, "over_budget"))
            else:
                beginning = KnownBeginning(history, self.spec)
                validity = validity_of(history, history.num_events, self.spec)
                want = KvWant(history.user, history.num_events, validity, beginning)
                waiting.append(_Pending(index, history, want, beginning))
        while waiting:
            with self._cache.checkout([each.want for each in waiting], self.spec.model_version) as lease:
                leased = [_Leased(each, entry) for each, entry in zip(waiting, lease, strict=False)]
                waiting = waiting[len(leased) :]
                self._encode_leased(leased, lease, answers)
        self._encode_uncached(uncached, answers)
        found = [answer for answer in answers if answer is not None]
        with self._counting:
            self._counts["requests"] += len(found)
            for history, answer in zip(checked, found, strict=True):
                self._counts["encoded"] += answer.encoded
                self._counts["reused"] += history.num_events - answer.encoded
                if answer.reason:
                    self._whole[answer.reason] += 1
        return found

    def invalidate(self, user: str | int) -> bool:
        """Forget a user's keys and values; True if there were any.

        An `encode` that is using them ends as if it had come before; one that starts later does not find them.
        """
        return self._cache.invalidate(user)

    def clear(self) -> None:
        """Forget every user."""
        self._cache.clear()

    def stats(self) -> RetrievalStats:
        """Counters."""
        kv = self._cache.stats
        with self._counting:
            counts, whole = self._counts.copy(), dict(self._whole)
        return RetrievalStats(
            requests=counts["requests"],
            encoded=counts["encoded"],
            reused=counts["reused"],
            append_passes=counts["append_passes"],
            prefill_passes=counts["prefill_passes"],
            uncached_passes=counts["uncached_passes"],
            whole=whole,
            staging_bytes=self._staging.capacity_bytes,
            cache=kv,
            graphs=self._graph_stats(),
            buckets=bucket_stats({"retrieval": self._retrieval, "prefill": self._prefill, "append": self._append}),
        )

    def _graph_stats(self) -> GraphStats:
        each = [session.graph_stats for session in (self._retrieval, self._prefill, self._append)]
        return sum((stats for stats in each if stats is not None), GraphStats())

    def close(self) -> None:
        """Refuse further calls, wait for those that are encoding, and free the memory and the three sessions.

        A second call does nothing.

        Raises:
            RuntimeError: if this thread is encoding, as a signal's handler may be.
        """
        if not self._calls.close():
            return
        self._memory.close()
        for session in (self._retrieval, self._prefill, self._append):
            session.close()

    def __enter__(self) -> RetrievalSession:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _count(self, name: str) -> None:
        with self._counting:
            self._counts[name] += 1

    def _encode_leased(self, leased: Sequence[_Leased], lease: KvLease, answers: list[RetrievalResult | None]) -> None:
        extended = [each for each in leased if each.entry.outcome in ("hit", "extended")]
        for batch in self._passes(extended, [each.kept for each in extended], [each.new_rows for each in extended]):
            outputs = self._run_append(batch)
            for row, each in enumerate(batch):
                if each.entry.outcome == "extended":
                    lease.publish(each.entry)
                reuse: Reuse = "hit" if each.entry.outcome == "hit" else "appended"
                answers[each.pending.index] = _result(outputs, row, each.history, reuse, "", each.new_rows)
        absent = [each for each in leased if each.entry.outcome in ("miss", "stale")]
        for batch in self._passes(absent, [each.entry.rows for each in absent], [0] * len(absent)):
            outputs = self._run_prefill(batch)
            for row, each in enumerate(batch):
                lease.publish(each.entry)
                missed: Reuse = "miss" if each.entry.outcome == "miss" else "stale"
                answers[each.pending.index] = _result(
                    outputs, row, each.history, missed, _reason(each), each.history.num_events
                )

    def _passes(
        self, leased: Sequence[_Leased], rows: Sequence[int], new_rows: Sequence[int]
    ) -> Iterator[list[_Leased]]:
        """Users who go through a graph together: within the profile, and with the rows that the staging memory has."""
        batch: list[_Leased] = []
        staged = new = 0
        for each, its_rows, its_new in zip(leased, rows, new_rows, strict=True):
            crowded = staged + its_rows > self._staged_rows or new + its_new > self._new_rows
            if batch and (crowded or len(batch) == self.spec.max_batch):
                yield batch
                batch, staged, new = [], 0, 0
            batch.append(each)
            staged, new = staged + its_rows, new + its_new
        if batch:
            yield batch

    def _run_append(self, batch: Sequence[_Leased]) -> _Outputs:
        """Encode the new rows, and put those of extended entries behind a copy of the known ones."""
        feeds = append_feeds([each.history for each in batch], [each.kept for each in batch], self.spec)
        first = self.spec.cached_names()[0]
        with self._staging_lock:
            known = [{name: rows.rows(0, each.kept) for name, rows in each.known.tensors.items()} for each in batch]
            cached: Mapping[str, ResidentTensor] = known[0]
            before: Copies = ()
            if not self._in_place([each.kept for each in batch], self._append):
                rows = resident_rows(self._append, first, sum(each.kept for each in batch), self._staged_rows)
                cached = self._staged(self._rows_region, rows)
                before = [(one, place) for place, one in _side_by_side(cached, known)]
            rows = sum(each.new_rows for each in batch)
            rows = resident_rows(self._append, f"new_{first}", rows, self._new_rows, feeds)
            new = self._staged(self._new_region, rows)
            outputs = self._append.run_resident(
                {**feeds, **cached},
                {f"new_{name}": rows for name, rows in new.items()},
                before=before,
                after=_moves(batch, known, new),
            )
        self._count("append_passes")
        return outputs

    def _run_prefill(self, batch: Sequence[_Leased]) -> _Outputs:
        """Encode whole histories to where their entries lie."""
        feeds = history_feeds([each.history for each in batch], self.spec)
        entries, rows = [each.entry.tensors for each in batch], [each.entry.rows for each in batch]
        if self._in_place(rows, self._prefill):
            outputs = self._prefill.run_resident(feeds, entries[0])
        else:
            with self._staging_lock:
                padded = resident_rows(self._prefill, self.spec.cached_names()[0], sum(rows), self._staged_rows, feeds)
                staged = self._staged(self._rows_region, padded)
                outputs = self._prefill.run_resident(feeds, staged, after=list(_side_by_side(staged, entries)))
        self._count("prefill_passes")
        return outputs

    def _in_place(self, rows: Sequence[int], session: Session) -> bool:
        """Whether a pass of users with so many rows uses the cache where it lies.

        A CUDA graph knows the addresses that it was recorded with, and every user lies elsewhere: with graphs a user's
        rows go through the staging memory, where equal shapes are at equal places. In buckets they go there too, where
        there is room for padding.
        """
        staged = session.graph_stats is not None or has_buckets(session)
        return len(rows) == 1 and not (staged and 0 < rows[0] <= self._staged_rows)

    def _staged(self, region: Region, rows: int) -> dict[str, ResidentTensor]:
        """Blocks of that many rows in the staging memory, whose lock the caller holds."""
        return self._layout.tensors(self._staging, region, rows)

    def _encode_uncached(
        self, uncached: Sequence[tuple[int, CheckedHistory, Reason]], answers: list[RetrievalResult | None]
    ) -> None:
        for start in range(0, len(uncached), self.spec.max_batch):
            batch = uncached[start : start + self.spec.max_batch]
            outputs = self._retrieval.run(history_feeds([history for _, history, _ in batch], self.spec))
            self._count("uncached_passes")
            for row, (index, history, reason) in enumerate(batch):
                answers[index] = _result(outputs, row, history, "off", reason, history.num_events)


def _reason(leased: _Leased) -> Reason:
    """Why nothing of what is known could be reused."""
    if leased.entry.outcome == "miss":
        return "absent"
    # The cache asked, was told that the entry may be extended, and had no room for both.
    return leased.pending.beginning.obstacle or "no_room"


def _result(
    outputs: Mapping[str, NDArray[Any]], row: int, history: CheckedHistory, cache: Reuse, reason: Reason, encoded: int
) -> RetrievalResult:
    top_items, top_scores = (
        outputs[name][row].copy() if name in outputs else None for name in ("top_items", "top_scores")
    )
    # A copy: a row must not keep the whole pass alive.
    embedding = outputs["user_embeddings"][row].copy()
    return RetrievalResult(embedding, top_items, top_scores, cache, reason, encoded, history.truncated)


def _whole(pool: MemoryPool, nbytes: int) -> Region:
    region = pool.allocate(nbytes)
    assert region is not None  # the pool is new and of this size
    return region


def _side_by_side(
    staged: Mapping[str, ResidentTensor], parts: Sequence[Mapping[str, ResidentTensor]]
) -> Iterator[tuple[ResidentTensor, ResidentTensor]]:
    """(rows of the staging memory, block of a part), for every block of every part."""
    start = 0
    for part in parts:
        stop = start
        for name, block in part.items():
            stop = start + block.shape[0]
            yield staged[name].rows(start, stop), block
        start = stop


def _moves(
    batch: Sequence[_Leased], known: Sequence[Mapping[str, ResidentTensor]], new: Mapping[str, ResidentTensor]
) -> Copies:
    """Known and new rows to where the longer histories lie; those of a hit are there already."""
    moves: list[tuple[ResidentTensor, ResidentTensor]] = []
    start = 0
    for each, rows in zip(batch, known, strict=True):
        stop = start + each.new_rows
        if each.entry.outcome == "extended":
            for name, target in each.entry.tensors.items():
                moves.append((rows[name], target.rows(0, each.kept)))
                moves.append((new[name].rows(start, stop), target.rows(each.kept, each.entry.rows)))
        start = stop
    return moves


def _check_inputs(role: str, session: Session, spec: RetrievalSpec) -> None:
    expected, found = input_names(spec)[role], {tensor.name for tensor in session.inputs}
    if expected != found:
        lacking, extra = sorted(expected - found), sorted(found - expected)
        problems = [f"it does not take {', '.join(lacking)}"] if lacking else []
        problems += [f"it takes {', '.join(extra)} besides"] if extra else []
        raise BundleError(
            "HSTU-E803",
            f"the graph {role} does not belong to the manifest's retrieval entry",
            "; ".join(problems),
            "build the bundle again",
            {"lacking": lacking, "extra": extra},
        )
