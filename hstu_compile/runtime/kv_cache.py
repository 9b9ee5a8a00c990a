"""Cached keys and values of users, in memory of a fixed size. Level 3; no torch.

An entry is what a prefill computed for one user: `k_i` and `v_i` of every layer. Entries are evicted in the order in
which they were last asked for, never while a lease holds them.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import TracebackType
from typing import Literal, overload

from hstu_compile.errors import InternalError, RequestError
from hstu_compile.runtime.kv_store import KvStore
from hstu_compile.runtime.resident import Region, ResidentTensor

Outcome = Literal["hit", "miss", "stale", "extended"]


@dataclasses.dataclass(frozen=True)
class KvWant:
    """One user's entry, as a request needs it.

    Attributes:
        key: the user.
        rows: cached rows: contextual tokens and history; may be 0.
        validity: digest of everything that the keys and values depend on. An entry with another one is of no use,
            unless `extends` says otherwise.
        extends: of an entry's rows and validity, whether it is what this one begins with. None: no entry is.

    Raises:
        ValueError: for a negative number of rows.
    """

    key: Hashable
    rows: int
    validity: bytes
    extends: Callable[[int, bytes], bool] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ValueError(f"an entry of {self.rows} rows")

    def begins_with(self, other: KvWant) -> bool:
        """Whether the other's entry is this one, or the beginning of it."""
        return self == other or (self.extends is not None and self.extends(other.rows, other.validity))


@dataclasses.dataclass(frozen=True)
class KvStats:
    """Counters since the cache was made, and what it holds now.

    Attributes:
        hits: leased entries that were published with the wanted validity.
        misses: leased entries that were absent.
        stale: leased entries that were present with another validity, and were dropped.
        evictions: entries dropped to make room.
        entries: entries that hold memory now, also those being filled or dropped while a lease still holds them.
        used_bytes: of the budget, by these entries.
        capacity_bytes: the budget.
        extended: leased entries of which the beginning was published, and replaces it.
    """

    hits: int
    misses: int
    stale: int
    evictions: int
    entries: int
    used_bytes: int
    capacity_bytes: int
    extended: int = 0


class KvEntry:
    """One user's keys and values inside a lease.

    Attributes:
        key: the user.
        rows: cached rows.
        validity: what the content depends on.
        tensors: `k_0`, `v_0`, `k_1`, ...: [rows, H, attention_dim] and [rows, H, linear_dim].
        region: of the store, that they lie in.
        outcome: "hit": the content is there, and must not be written. "miss", "stale", "extended": the lease's holder
            fills the tensors and calls `KvLease.publish`.
        base: of an extended entry, the one that it begins with, in the same lease; None otherwise.
    """

    def __init__(self, slot: _Slot, outcome: Outcome, base: KvEntry | None = None) -> None:
        self._slot, self.base = slot, base
        self.key, self.rows, self.validity = slot.want.key, slot.want.rows, slot.want.validity
        self.tensors, self.region, self.outcome = slot.tensors, slot.region, outcome


class KvLease(Sequence[KvEntry]):
    """Entries that stay in place until the lease is closed; use it as a context manager.

    On the way out, also by an exception, entries that were to be filled and were not published are freed.
    """

    def __init__(self, cache: KvCache, entries: Sequence[KvEntry]) -> None:
        self._cache, self._entries = cache, tuple(entries)
        self._thread = threading.get_ident()
        self._closed = False

    @overload
    def __getitem__(self, index: int) -> KvEntry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[KvEntry, ...]: ...
    def __getitem__(self, index: int | slice) -> KvEntry | tuple[KvEntry, ...]:
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    def publish(self, entry: KvEntry) -> None:
        """Say that a missing entry's tensors are complete: from now on other leases may find it.

        An entry that was invalidated, or replaced by one of another validity, since it was leased stays usable inside
        this lease and is not found by others.

        Raises:
            ValueError: if the entry is a hit, was published before, or belongs to another lease.
            RuntimeError: if the lease is closed.
        """
        self._cache._publish(self, entry)

    def close(self) -> None:
        """Let go of the entries. A second call does nothing."""
        self._cache._release(self)

    def __enter__(self) -> KvLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclasses.dataclass(eq=False)
class _Slot:
    """An entry's memory. In the index while others may find it or wait for it; freed when neither indexed nor pinned.

    Attributes:
        want: what it was made for.
        region: its memory.
        tensors: inside the region.
        pins: leases that hold it.
        ready: published.
        indexed: whether the index leads to it.
    """

    want: KvWant
    region: Region
    tensors: Mapping[str, ResidentTensor]
    pins: int = 0
    ready: bool = False
    indexed: bool = True


class KvCache:
    """Least-recently-used cache of keys and values under a byte budget. Safe to use from several threads.

    Args:
        store: the memory; the cache is its only user. The pool below it is closed after the cache's last lease.
        model_version: of the model whose prefill fills it. Keys and values of another model mean nothing to this one.
    """

    def __init__(self, store: KvStore, model_version: str) -> None:
        self._store, self.model_version = store, model_version
        # Least recently asked for first.
        self._index: collections.OrderedDict[Hashable, _Slot] = collections.OrderedDict()
        # Those that leases hold: few beside the whole cache, and all that a search for room has to go around.
        self._held: set[_Slot] = set()
        self._entries = self._used_bytes = 0
        self._holders: set[int] = set()
        self._queue: collections.deque[object] = collections.deque()
        self._changed = threading.Condition()
        self._counts: collections.Counter[str] = collections.Counter()

    def checkout(self, wants: Sequence[KvWant], model_version: str) -> KvLease:
        """Lease the entries of the first wants, as many as there is room for, and at least one.

            while wants:
                with cache.checkout(wants, version) as lease:
                    ...  # prefill and publish the entries that are not hits; score with all of lease
                wants = wants[len(lease):]

        Room is made by evicting entries that no lease holds, least recently asked for first. Entries never move: if
        the free bytes lie in several holes, eviction goes on until one hole is large enough; nothing is evicted
        unless that leads to success. The lease ends before the first want that has to wait for another lease, either
        for memory or because another thread is filling the same entry, and before a key's second appearance. Only the
        first want waits; for the same entry until it is published (then it is a hit) or given up (then it is a miss).

        A want that `extends` the user's published entry gets a new one, and the old one as its `base`: it is replaced,
        and stays in place until the lease is closed. Where the two do not fit together, the old one is stale.

        Waiting cannot deadlock, because whoever waits holds nothing: a thread may hold one lease at a time. Those who
        wait for memory get it in the order in which they came.

        Raises:
            RequestError: HSTU-E707 if one of the entries is larger than the whole budget; E708 if the cache is of
                another model version. Nothing has changed then.
            RuntimeError: if this thread already holds a lease.
            ValueError: if `wants` is empty.
        """
        self._check(wants, model_version)
        thread, ticket = threading.get_ident(), object()
        with self._changed:
            if thread in self._holders:
                raise RuntimeError("this thread already holds a lease of the cache; close it first")
            try:
                while not (entries := self._granted(wants, ticket)):
                    self._changed.wait()
            finally:
                self._leave_queue(ticket)
            self._counts.update(entry.outcome for entry in entries)
            self._holders.add(thread)
            return KvLease(self, entries)

    def _check(self, wants: Sequence[KvWant], model_version: str) -> None:
        if not wants:
            raise ValueError("a checkout of nothing")
        if model_version != self.model_version:
            raise RequestError(
                "HSTU-E708",
                "the KV cache belongs to another model",
                f"it holds keys and values of model version {self.model_version}, and {model_version} asks for them",
                "make a cache for this bundle",
                {"cache": self.model_version, "model": model_version},
            )
        budget = self._store.capacity_bytes
        for want in wants:
            size = self._store.entry_bytes(want.rows)
            if size > budget:
                raise RequestError(
                    "HSTU-E707",
                    f"the KV cache is too small for user {want.key!r}",
                    f"{want.rows} rows of {self._store.bytes_per_row} bytes take {size} bytes with their padding; the "
                    f"budget is {budget} bytes",
                    f"give the cache at least {size} bytes, or keep fewer events of the history",
                    {"user": str(want.key), "rows": want.rows, "entry_bytes": size, "budget_bytes": budget},
                )

    def _granted(self, wants: Sequence[KvWant], ticket: object) -> list[KvEntry]:
        """Pin and return the entries of the longest prefix that needs no waiting; empty if the first has to wait."""
        # Room for one want must not be made by evicting what a later one is about to hit.
        for want in wants:
            if (slot := self._index.get(want.key)) and want.begins_with(slot.want):
                self._index.move_to_end(want.key)
        entries: dict[Hashable, KvEntry] = {}
        try:
            for want in wants:
                if want.key in entries or (entry := self._granted_one(want, ticket)) is None:
                    break
                entries[want.key] = entry
        except BaseException:
            for entry in entries.values():
                self._let_go(entry)
            raise
        return list(entries.values())

    def _granted_one(self, want: KvWant, ticket: object) -> KvEntry | None:
        slot = self._index.get(want.key)
        base = None
        if slot is not None and want.begins_with(slot.want):
            if not slot.ready:  # another lease fills it; whoever waits for that needs no memory of its own
                self._leave_queue(ticket)
                return None
            if slot.want == want:
                return self._pinned(slot, "hit")
            base = slot
        size = self._store.entry_bytes(want.rows)
        if base is not None and not self._can_fit(size, beside=base):
            base = None
        must_queue = bool(self._queue) and self._queue[0] is not ticket
        if must_queue or not self._can_fit(size):
            if ticket not in self._queue:  # `checkout` leaves the queue again if an earlier want was granted
                self._queue.append(ticket)
            return None
        known = None if base is None else self._pinned(base, "hit")
        try:
            if slot is not None:
                self._drop(slot)
            new = self._made(want)
        except BaseException:
            if known is not None:
                self._let_go(known)
            raise
        return self._pinned(new, "miss" if slot is None else "stale" if known is None else "extended", known)

    def _made(self, want: KvWant) -> _Slot:
        """A new slot, in the index and not yet pinned."""
        region = self._make_room(want.rows)
        try:
            new = _Slot(want, region, self._store.tensors(region, want.rows))
        except BaseException:
            # Nobody else knows of the region: it would be lost to the budget.
            self._store.free(region)
            raise
        self._index[want.key] = new
        self._entries += 1
        self._used_bytes += region.nbytes
        return new

    def _pinned(self, slot: _Slot, outcome: Outcome, base: KvEntry | None = None) -> KvEntry:
        slot.pins += 1
        self._held.add(slot)
        return KvEntry(slot, outcome, base)

    def _let_go(self, entry: KvEntry) -> None:
        self._unpin(entry._slot)
        if entry.base is not None:
            self._unpin(entry.base._slot)

    def _can_fit(self, size: int, beside: _Slot | None = None) -> bool:
        """Whether `size` bytes in one piece would be free if all that no lease holds, but `beside`, were evicted."""
        end = 0
        for start, stop in sorted(
            (slot.region.offset, slot.region.offset + slot.region.nbytes)
            for slot in (self._held if beside is None else {*self._held, beside})
        ):
            if start - end >= size:
                return True
            end = stop
        return self._store.capacity_bytes - end >= size

    def _make_room(self, rows: int) -> Region:
        while (region := self._store.allocate(rows)) is None:
            victim = next((slot for slot in self._index.values() if not slot.pins), None)
            if victim is None:
                raise InternalError("the KV cache is not the only user of its store")
            self._drop(victim)
            self._counts["eviction"] += 1
        return region

    def _drop(self, slot: _Slot) -> None:
        """Take a slot out of the index; free it unless a lease holds it."""
        del self._index[slot.want.key]
        slot.indexed = False
        self._free_if_unused(slot)

    def _unpin(self, slot: _Slot) -> None:
        slot.pins -= 1
        if not slot.pins:
            self._held.remove(slot)
        if slot.indexed and not slot.ready:
            self._drop(slot)
        else:
            self._free_if_unused(slot)

    def _free_if_unused(self, slot: _Slot) -> None:
        if not slot.indexed and not slot.pins:
            self._entries -= 1
            self._used_bytes -= slot.region.nbytes
            self._store.free(slot.region)

    def _leave_queue(self, ticket: object) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
            # The next in the queue may find room now.
            self._changed.notify_all()

    def _publish(self, lease: KvLease, entry: KvEntry) -> None:
        with self._changed:
            if lease._closed:
                raise RuntimeError("the lease is closed")
            if not any(entry is leased for leased in lease._entries):
                raise ValueError(f"the entry of user {entry.key!r} belongs to another lease")
            if entry._slot.ready:
                raise ValueError(f"the entry of user {entry.key!r} was published before")
            entry._slot.ready = True
            self._changed.notify_all()

    def _release(self, lease: KvLease) -> None:
        with self._changed:
            if lease._closed:
                return
            lease._closed = True
            for entry in lease._entries:
                self._let_go(entry)
            self._holders.discard(lease._thread)
            self._changed.notify_all()

    def invalidate(self, key: Hashable) -> bool:
        """Forget a user; True if there was an entry. Its memory is free once no lease holds it."""
        with self._changed:
            slot = self._index.get(key)
            if slot is not None:
                self._drop(slot)
                self._changed.notify_all()
            return slot is not None

    def clear(self) -> None:
        """Forget every user."""
        with self._changed:
            for slot in list(self._index.values()):
                self._drop(slot)
            self._changed.notify_all()

    @property
    def stats(self) -> KvStats:
        """Counters, taken at one moment."""
        with self._changed:
            return KvStats(
                hits=self._counts["hit"],
                misses=self._counts["miss"],
                stale=self._counts["stale"],
                evictions=self._counts["eviction"],
                entries=self._entries,
                used_bytes=self._used_bytes,
                capacity_bytes=self._store.capacity_bytes,
                extended=self._counts["extended"],
            )
