"""The KV cache: against a byte map in which nothing is clever, and under threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hstu_compile.errors import InternalError, RequestError
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime.kv_cache import KvCache, KvEntry, KvLease, KvWant
from hstu_compile.runtime.kv_layout import KvLayout
from hstu_compile.runtime.kv_store import KvBlocks, KvRows, whole_rows
from hstu_compile.runtime.resident import DevicePool, HostPool, MemoryPool, Region, ResidentTensor
from tests.fake_cuda import FakeCuda

# Blocks of 1 to 3 units of 256 bytes: an entry takes 4 units (up to 25 rows) to 10 (up to 60 rows).
LAYOUT = KvLayout(num_layers=2, num_heads=1, attention_dim=3, linear_dim=5, dtype="float16")
UNIT = 256
VERSION = "a" * 64
PATIENCE_S = 20.0


def fill(pool: MemoryPool, entry: KvEntry, number: int) -> None:
    for index, tensor in enumerate(entry.tensors.values()):
        pool.write(np.full(tensor.shape, number % 500 * 4 + index, np.float16), tensor)


def assert_filled(pool: MemoryPool, entry: KvEntry, number: int) -> None:
    for index, tensor in enumerate(entry.tensors.values()):
        np.testing.assert_array_equal(pool.read(tensor), np.float16(number % 500 * 4 + index))


def want(key: Any, rows: int = 10, validity: bytes = b"v") -> KvWant:
    return KvWant(key, rows, validity)


def small_cache(units: int) -> tuple[HostPool, KvCache]:
    pool = HostPool(units * UNIT)
    return pool, KvCache(KvBlocks(pool, LAYOUT), VERSION)


def outcomes(cache: KvCache, *wants: KvWant) -> list[str]:
    """Check out and publish, as a request does."""
    found: list[str] = []
    while len(found) < len(wants):
        with cache.checkout(wants[len(found) :], VERSION) as lease:
            for entry in lease:
                if entry.outcome != "hit":
                    lease.publish(entry)
            found += [entry.outcome for entry in lease]
    return found


class SpyCondition(threading.Condition):
    """Counts the threads that went to sleep, so that a test need not guess with timers."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeps = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.sleeps.release()
        return super().wait(timeout)

    def forget(self) -> None:
        while self.sleeps.acquire(blocking=False):
            pass

    def await_sleeper(self) -> None:
        assert self.sleeps.acquire(timeout=PATIENCE_S), "no thread waits"


def spied(cache: KvCache) -> SpyCondition:
    spy = SpyCondition()
    cache._changed = spy
    return spy


@contextlib.contextmanager
def workers(count: int) -> Iterator[list[concurrent.futures.ThreadPoolExecutor]]:
    """Threads that each do one thing after the other: a thread may hold one lease."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(concurrent.futures.ThreadPoolExecutor(1)) for _ in range(count)]


def growing(key: Any, rows: int, validity: bytes) -> KvWant:
    """A want that extends shorter entries of the same validity."""
    return KvWant(key, rows, validity, lambda known, of: known < rows and of == validity)


@dataclasses.dataclass(eq=False)
class ModelEntry:
    want: KvWant
    start: int
    units: int
    number: int
    base: ModelEntry | None = None
    pins: set[int] = dataclasses.field(default_factory=set)
    is_ready: bool = False
    is_indexed: bool = True


class Model:
    """The documented behaviour over a list that names the owner of every unit."""

    def __init__(self, units: int) -> None:
        self.owner: list[ModelEntry | None] = [None] * units
        self.recent: list[ModelEntry] = []  # indexed entries, least recently asked for first
        self.counts = {"hit": 0, "miss": 0, "stale": 0, "extended": 0, "eviction": 0}
        self.made = 0

    def live(self) -> list[ModelEntry]:
        return list(dict.fromkeys(entry for entry in self.owner if entry is not None))

    def find(self, key: Any) -> ModelEntry | None:
        return next((entry for entry in self.recent if entry.want.key == key), None)

    def run_of(self, units: int, is_free: Callable[[ModelEntry | None], bool]) -> int | None:
        starts = range(len(self.owner) - units + 1)
        return next((at for at in starts if all(map(is_free, self.owner[at : at + units]))), None)

    def free_if_unused(self, entry: ModelEntry) -> None:
        if not entry.is_indexed and not entry.pins:
            self.owner = [None if owner is entry else owner for owner in self.owner]

    def drop(self, entry: ModelEntry) -> None:
        self.recent.remove(entry)
        entry.is_indexed = False
        self.free_if_unused(entry)

    def touch(self, entry: ModelEntry) -> None:
        self.recent.remove(entry)
        self.recent.append(entry)

    @staticmethod
    def is_beginning(entry: ModelEntry, each: KvWant) -> bool:
        return entry.want == each or (
            each.extends is not None and entry.want.rows < each.rows and entry.want.validity == each.validity
        )

    def checkout(self, worker: int, wants: list[KvWant]) -> list[tuple[str, ModelEntry]]:
        for each in wants:
            entry = self.find(each.key)
            if entry is not None and self.is_beginning(entry, each):
                self.touch(entry)
        granted: list[tuple[str, ModelEntry]] = []
        for each in wants:
            if any(each.key == entry.want.key for _, entry in granted):
                break
            found = self.find(each.key)
            related = found is not None and self.is_beginning(found, each)
            if related and not found.is_ready:
                break
            if related and found.want == each:
                outcome, entry = "hit", found
            else:
                units = LAYOUT.entry_bytes(each.rows) // UNIT
                if self.run_of(units, lambda owner: owner is None or not owner.pins) is None:
                    break
                outcome, base = "miss" if found is None else "stale", None
                if (
                    related
                    and self.run_of(units, lambda o, kept=found: o is None or not (o.pins or o is kept)) is not None
                ):
                    outcome, base = "extended", found
                    base.pins.add(worker)
                if found is not None:
                    self.drop(found)
                while (start := self.run_of(units, lambda owner: owner is None)) is None:
                    self.drop(next(entry for entry in self.recent if not entry.pins))
                    self.counts["eviction"] += 1
                self.made += 1
                entry = ModelEntry(each, start, units, self.made, base)
                self.owner[start : start + units] = [entry] * units
                self.recent.append(entry)
            entry.pins.add(worker)
            granted.append((outcome, entry))
        for outcome, _ in granted:
            self.counts[outcome] += 1
        return granted

    def release(self, worker: int) -> None:
        for entry in self.live():
            if worker in entry.pins:
                entry.pins.remove(worker)
                if entry.is_indexed and not entry.is_ready:
                    self.drop(entry)
                else:
                    self.free_if_unused(entry)


WANTS = st.builds(
    lambda make, *parts: make(*parts),
    st.sampled_from([want, growing]),
    st.integers(0, 5),
    st.sampled_from([0, 10, 25, 26, 45, 60]),
    st.sampled_from([b"a", b"b"]),
)


class CacheMachine(RuleBasedStateMachine):
    """Three threads check out, fill, publish, invalidate and release; at most one of them waits."""

    UNITS = 23

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.cache = small_cache(self.UNITS)
        self.spy = spied(self.cache)
        probe = self.pool.allocate(0)
        assert probe is not None
        self.base = self.pool.tensor(probe, 0, (1,), "int8").address
        self.pool.free(probe)
        self.model = Model(self.UNITS)
        self.stack = contextlib.ExitStack()
        self.threads = self.stack.enter_context(workers(3))
        self.leases: dict[int, tuple[KvLease, list[tuple[str, ModelEntry]]]] = {}
        self.waiting: tuple[int, list[KvWant], concurrent.futures.Future[KvLease]] | None = None

    def _idle(self) -> list[int]:
        busy = {self.waiting[0]} if self.waiting else set()
        return [worker for worker in range(3) if worker not in self.leases and worker not in busy]

    def _granted(self, worker: int, lease: KvLease, expected: list[tuple[str, ModelEntry]]) -> None:
        self.leases[worker] = (lease, expected)
        assert [entry.outcome for entry in lease] == [outcome for outcome, _ in expected]
        for entry, (outcome, modelled) in zip(lease, expected, strict=True):
            assert KvWant(entry.key, entry.rows, entry.validity) == modelled.want
            assert list(entry.tensors) == ["k_0", "v_0", "k_1", "v_1"]
            if modelled.want.rows:
                assert entry.tensors["k_0"].address - self.base == modelled.start * UNIT
            assert entry.tensors["v_1"].shape == (modelled.want.rows, 1, 5)
            assert (entry.base is None) == (outcome != "extended")
            if outcome != "hit":
                fill(self.pool, entry, modelled.number)

    def _wake(self) -> None:
        """Grant the waiting thread what it can have after the last step."""
        if self.waiting is None:
            return
        worker, wants, future = self.waiting
        if expected := self.model.checkout(worker, wants):
            self.waiting = None
            self._granted(worker, future.result(PATIENCE_S), expected)
        else:
            assert not future.done()

    @precondition(lambda self: self._idle() and self.waiting is None)
    @rule(wants=st.lists(WANTS, min_size=1, max_size=4), data=st.data())
    def checkout(self, wants: list[KvWant], data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self._idle()))
        expected = self.model.checkout(worker, wants)
        self.spy.forget()
        future = self.threads[worker].submit(self.cache.checkout, wants, VERSION)
        if expected:
            self._granted(worker, future.result(PATIENCE_S), expected)
        else:
            self.spy.await_sleeper()
            self.waiting = (worker, wants, future)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        lease, expected = self.leases[data.draw(st.sampled_from(sorted(self.leases)))]
        index = data.draw(st.integers(0, len(lease) - 1))
        entry = expected[index][1]
        if entry.is_ready:
            with pytest.raises(ValueError, match="was published before"):
                lease.publish(lease[index])
        else:
            entry.is_ready = True
            lease.publish(lease[index])
            self._wake()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.leases)))
        lease, _ = self.leases.pop(worker)
        self.model.release(worker)
        lease.close()
        self._wake()

    @rule(key=st.integers(0, 5))
    def invalidate(self, key: int) -> None:
        entry = self.model.find(key)
        if entry is not None:
            self.model.drop(entry)
        assert self.cache.invalidate(key) == (entry is not None)
        self._wake()

    @rule()
    def clear(self) -> None:
        for entry in list(self.model.recent):
            self.model.drop(entry)
        self.cache.clear()
        self._wake()

    @invariant()
    def leased_content_is_intact(self) -> None:
        for lease, expected in self.leases.values():
            for entry, (_, modelled) in zip(lease, expected, strict=True):
                assert_filled(self.pool, entry, modelled.number)
                if entry.base is not None:
                    assert modelled.base is not None
                    assert (entry.base.rows, entry.base.validity) == (modelled.base.want.rows, entry.validity)
                    assert_filled(self.pool, entry.base, modelled.base.number)

    @invariant()
    def the_figures_add_up(self) -> None:
        stats, live = self.cache.stats, self.model.live()
        assert stats.used_bytes == sum(entry.units for entry in live) * UNIT
        assert stats.used_bytes <= stats.capacity_bytes == self.UNITS * UNIT
        assert stats.entries == len(live)
        found = {"hit": stats.hits, "miss": stats.misses, "stale": stats.stale, "eviction": stats.evictions}
        assert {**found, "extended": stats.extended} == self.model.counts

    def teardown(self) -> None:
        while self.leases:
            _, (lease, _) = self.leases.popitem()
            lease.close()
            if self.waiting and self.waiting[2].done():
                self.leases[self.waiting[0]] = (self.waiting[2].result(), [])
                self.waiting = None
        if self.waiting:
            self.waiting[2].result(PATIENCE_S).close()
        self.cache.clear()
        assert self.cache.stats.used_bytes == self.cache.stats.entries == self.pool.used_bytes == 0
        whole = self.pool.allocate(self.UNITS * UNIT)
        assert whole is not None
        self.stack.close()


CacheMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_layout_counts_bytes_and_aligns_blocks(dtype: str) -> None:
    layout = KvLayout(num_layers=3, num_heads=2, attention_dim=5, linear_dim=7, dtype=dtype)
    itemsize = 4 if dtype == "float32" else 2
    assert layout.bytes_per_row == 3 * 2 * (5 + 7) * itemsize
    assert layout.entry_bytes(0) == 6 * 256
    rows = 100
    sizes = [-(-rows * 2 * width * itemsize // 256) * 256 for width in (5, 7)]
    assert layout.entry_bytes(rows) == 3 * sum(sizes)
    with HostPool(layout.entry_bytes(rows)) as pool:
        region = pool.allocate(layout.entry_bytes(rows))
        assert region is not None
        tensors = layout.tensors(pool, region, rows)
        assert list(tensors) == ["k_0", "v_0", "k_1", "v_1", "k_2", "v_2"]
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert [tensor.shape for tensor in tensors.values()] == [(100, 2, 5), (100, 2, 7)] * 3
        starts = [tensor.address for tensor in tensors.values()]
        assert [b - a for a, b in itertools.pairwise(starts)] == [*sizes, *sizes, sizes[0]]


def test_the_least_recently_asked_for_is_evicted_first() -> None:
    _, cache = small_cache(12)
    assert outcomes(cache, want(1), want(2), want(3)) == ["miss"] * 3
    assert outcomes(cache, want(1)) == ["hit"]
    assert outcomes(cache, want(4)) == ["miss"]
    assert outcomes(cache, want(1), want(3), want(4)) == ["hit"] * 3
    assert outcomes(cache, want(2)) == ["miss"]
    assert outcomes(cache, want(1)) == ["miss"]
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.stale, stats.evictions, stats.entries) == (4, 6, 0, 3, 3)


def test_what_a_call_is_about_to_hit_is_not_evicted_for_its_other_users() -> None:
    _, cache = small_cache(12)
    outcomes(cache, want(1), want(2), want(3))
    assert outcomes(cache, want(4), want(1)) == ["miss", "hit"]
    assert outcomes(cache, want(2)) == ["miss"]


def test_another_validity_or_length_is_stale() -> None:
    _, cache = small_cache(12)
    assert outcomes(cache, want(1), want(1, validity=b"w"), want(1, rows=9, validity=b"w")) == [
        "miss",
        "stale",
        "stale",
    ]
    assert outcomes(cache, want(1, rows=9, validity=b"w")) == ["hit"]
    assert cache.stats.entries == 1


def test_fragments_are_joined_by_evicting_more_of_the_oldest() -> None:
    """Three holes of 4 units do not hold 10 units; the entries between them go although 12 units are free."""
    _, cache = small_cache(24)
    outcomes(cache, *(want(key) for key in range(6)))
    for key in (0, 2, 4):
        cache.invalidate(key)
    assert cache.stats.used_bytes == 12 * UNIT
    assert outcomes(cache, want("long", rows=60)) == ["miss"]
    assert cache.stats.evictions == 1
    assert outcomes(cache, want(3), want(5)) == ["hit", "hit"]


def test_nothing_is_evicted_for_what_still_would_not_fit() -> None:
    _, cache = small_cache(12)
    outcomes(cache, want(1), want(2))
    with cache.checkout([want(2), want("long", rows=60)], VERSION) as lease:
        assert [entry.key for entry in lease] == [2]
    assert cache.stats.evictions == 0
    assert outcomes(cache, want(1)) == ["hit"]


class _CountedRegion(Region):
    """Counts how often it is looked at, in all."""

    looks = 0

    def __getattribute__(self, name: str) -> Any:
        _CountedRegion.looks += name in ("offset", "nbytes")
        return super().__getattribute__(name)


class _CountedStore(KvBlocks):
    """Of entries whose places lie in counted regions."""

    def __init__(self, pool: MemoryPool) -> None:
        super().__init__(pool, LAYOUT)
        self._real: dict[Region, Region] = {}

    def allocate(self, rows: int) -> Region | None:
        if (region := super().allocate(rows)) is None:
            return None
        counted = _CountedRegion(region.offset, region.nbytes)
        self._real[counted] = region
        return counted

    def free(self, region: Region) -> None:
        super().free(self._real.pop(region))

    def tensors(self, region: Region, rows: int) -> dict[str, ResidentTensor]:
        return super().tensors(self._real[region], rows)


def test_a_miss_does_not_look_at_every_entry_of_a_large_cache() -> None:
    looks = []
    for users in (10, 300):
        cache = KvCache(_CountedStore(HostPool(users * 4 * UNIT)), VERSION)
        outcomes(cache, *(want(user) for user in range(users)))
        before = _CountedRegion.looks
        assert outcomes(cache, want("new"), want(users - 1)) == ["miss", "hit"]
        assert cache.stats.evictions == 1
        looks.append(_CountedRegion.looks - before)
    assert looks[0] == looks[1] > 0


def test_an_error_while_filling_frees_the_memory_and_forgets_the_entry() -> None:
    pool, cache = small_cache(12)

    def fail_after_the_second() -> None:
        with cache.checkout([want(1), want(2)], VERSION) as lease:
            lease.publish(lease[1])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_the_second()
    assert pool.used_bytes == 4 * UNIT
    assert outcomes(cache, want(1), want(2)) == ["miss", "hit"]


@pytest.mark.parametrize("rows", [10, 25, 60])
def test_an_error_while_memory_is_divided_loses_none_of_it(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Of a hit beside it, of an absent user, and of one whose shorter entry is held as a base meanwhile."""
    pool, cache = small_cache(20)
    assert outcomes(cache, growing("ann", 8, b"a"), want("ben")) == ["miss", "miss"]

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pool, "tensor", fail)
        for call in ([growing("ann", rows, b"a")], [want("ben"), growing("ann", rows, b"a")], [want("eve", rows)]):
            with pytest.raises(MemoryError):
                cache.checkout(call, VERSION)
    assert outcomes(cache, want("ben"), growing("ann", 8, b"a")) == ["hit", "miss"]
    cache.clear()
    assert cache.stats.used_bytes == cache.stats.entries == pool.used_bytes == 0


def test_a_published_entry_survives_its_lease_and_an_invalidated_one_lives_as_long_as_its_lease() -> None:
    pool, cache = small_cache(12)
    with cache.checkout([want(1)], VERSION) as lease:
        fill(pool, lease[0], 1)
        assert cache.invalidate(1)
        lease.publish(lease[0])
        assert not cache.invalidate(1)
        assert pool.used_bytes == 4 * UNIT
        assert_filled(pool, lease[0], 1)
    assert pool.used_bytes == 0
    assert outcomes(cache, want(1)) == ["miss"]


def test_a_key_that_appears_twice_ends_the_lease() -> None:
    _, cache = small_cache(12)
    with cache.checkout([want(1), want(2), want(1), want(3)], VERSION) as lease:
        assert [entry.key for entry in lease] == [1, 2]
        assert [entry.key for entry in lease[1:]] == [2]


def test_a_user_larger_than_the_budget_is_refused_with_both_sizes() -> None:
    _, cache = small_cache(10)
    outcomes(cache, want(1))
    with pytest.raises(RequestError) as caught:
        cache.checkout([want(1), want("u7", rows=90), want(2)], VERSION)
    assert caught.value.code == "HSTU-E707"
    size = LAYOUT.entry_bytes(90)
    assert caught.value.what == "the KV cache is too small for user 'u7'"
    assert caught.value.why == f"90 rows of 32 bytes take {size} bytes with their padding; the budget is 2560 bytes"
    assert f"at least {size} bytes" in caught.value.fix
    assert outcomes(cache, want(1)) == ["hit"]


def test_another_model_is_refused() -> None:
    _, cache = small_cache(10)
    outcomes(cache, want(1))
    with pytest.raises(RequestError, match=f"model version {VERSION}, and {'b' * 64} asks") as caught:
        cache.checkout([want(1)], "b" * 64)
    assert caught.value.code == "HSTU-E708"
    assert cache.stats.hits == 0


def test_misuse_of_leases_is_refused() -> None:
    pool, cache = small_cache(12)
    outcomes(cache, want(1))
    with pytest.raises(ValueError, match="a checkout of nothing"):
        cache.checkout([], VERSION)
    with pytest.raises(ValueError, match="an entry of -1 rows"):
        want(1, rows=-1)
    other = KvCache(KvBlocks(HostPool(12 * UNIT), LAYOUT), VERSION)
    with cache.checkout([want(1), want(2)], VERSION) as lease, other.checkout([want(2)], VERSION) as foreign:
        with pytest.raises(RuntimeError, match="already holds a lease"):
            cache.checkout([want(3)], VERSION)
        with pytest.raises(ValueError, match="user 1 was published before"):
            lease.publish(lease[0])
        with pytest.raises(ValueError, match="user 2 belongs to another lease"):
            lease.publish(foreign[0])
    lease.close()
    with pytest.raises(RuntimeError, match="the lease is closed"):
        lease.publish(lease[1])
    assert pool.used_bytes == 4 * UNIT
    taken = pool.allocate(5 * UNIT)
    with pytest.raises(InternalError, match="not the only user of its store"):
        cache.checkout([want(2), want(3)], VERSION)
    assert taken is not None
    pool.free(taken)
    cache.clear()
    assert pool.used_bytes == 0, "entries that were pinned before the error were not let go"


def test_two_threads_that_miss_one_user_compute_it_once() -> None:
    pool, cache = small_cache(12)
    spy = spied(cache)
    with workers(1) as (thread,):
        with cache.checkout([want(1)], VERSION) as first:
            second = thread.submit(cache.checkout, [want(1), want(2)], VERSION)
            spy.await_sleeper()
            fill(pool, first[0], 5)
            first.publish(first[0])
            lease = second.result(PATIENCE_S)
            assert [entry.outcome for entry in lease] == ["hit", "miss"]
            assert_filled(pool, lease[0], 5)
        lease.close()


def test_a_thread_that_waits_for_a_user_computes_it_when_the_other_gives_up() -> None:
    _, cache = small_cache(12)
    spy = spied(cache)
    with workers(1) as (thread,):
        with cache.checkout([want(1)], VERSION):
            second = thread.submit(cache.checkout, [want(1)], VERSION)
            spy.await_sleeper()
        lease = second.result(PATIENCE_S)
        assert lease[0].outcome == "miss"
        lease.publish(lease[0])
        lease.close()
    assert outcomes(cache, want(1)) == ["hit"]


@pytest.mark.parametrize("forget", [lambda cache: cache.invalidate(1), lambda cache: cache.clear()])
def test_a_thread_that_waits_for_a_user_who_is_forgotten_computes_it_at_once(forget: Callable[[KvCache], Any]) -> None:
    pool, cache = small_cache(12)
    spy = spied(cache)
    with workers(1) as (thread,):
        with cache.checkout([want(1)], VERSION) as outdated:
            second = thread.submit(cache.checkout, [want(1)], VERSION)
            spy.await_sleeper()
            forget(cache)
            lease = second.result(PATIENCE_S)
            assert lease[0].outcome == "miss"
            fill(pool, outdated[0], 1)
            fill(pool, lease[0], 2)
            assert_filled(pool, outdated[0], 1)
            outdated.publish(outdated[0])
        lease.publish(lease[0])
        lease.close()
    with cache.checkout([want(1)], VERSION) as found:
        assert found[0].outcome == "hit"
        assert_filled(pool, found[0], 2)


def test_a_user_being_filled_ends_a_lease_that_has_others() -> None:
    _, cache = small_cache(12)
    with workers(1) as (thread,), cache.checkout([want(1)], VERSION):
        lease = thread.submit(cache.checkout, [want(2), want(1), want(3)], VERSION).result(PATIENCE_S)
        assert [entry.key for entry in lease] == [2]
        lease.close()


def test_the_newer_of_two_validities_is_the_one_that_stays() -> None:
    pool, cache = small_cache(12)
    with workers(1) as (thread,):
        with cache.checkout([want(1, validity=b"old")], VERSION) as first:
            lease = thread.submit(cache.checkout, [want(1, validity=b"new")], VERSION).result(PATIENCE_S)
            assert lease[0].outcome == "stale"
            lease.publish(lease[0])
            first.publish(first[0])
            lease.close()
        assert pool.used_bytes == 4 * UNIT
    assert outcomes(cache, want(1, validity=b"new")) == ["hit"]


def test_memory_is_given_in_the_order_in_which_it_was_asked_for() -> None:
    """A long history is not overtaken for ever by short ones."""
    _, cache = small_cache(12)
    spy = spied(cache)
    with workers(2) as (long, short):
        with cache.checkout([want(1)], VERSION):
            first = long.submit(cache.checkout, [want("long", rows=60)], VERSION)
            spy.await_sleeper()
            second = short.submit(cache.checkout, [want(2)], VERSION)
            spy.await_sleeper()
            assert not second.done(), "8 units are free, and somebody has waited longer for them"
        lease = first.result(PATIENCE_S)
        assert not second.done()
        lease.close()
        second.result(PATIENCE_S).close()


def test_who_waits_for_a_user_does_not_keep_others_from_memory() -> None:
    """Queued for memory, then overtaken by a thread that fills the very user: the place in the queue is given up."""
    _, cache = small_cache(14)
    spy = spied(cache)
    with workers(3) as (first, second, third):
        with cache.checkout([want(1, rows=60)], VERSION):
            filling = first.submit(cache.checkout, [want("x", rows=60)], VERSION)
            spy.await_sleeper()
            waiting = second.submit(cache.checkout, [want("x", rows=60)], VERSION)
            spy.await_sleeper()
            other = third.submit(cache.checkout, [want("y")], VERSION)
            spy.await_sleeper()
        lease = filling.result(PATIENCE_S)
        other.result(PATIENCE_S).close()
        assert not waiting.done()
        lease.publish(lease[0])
        lease.close()
        hit = waiting.result(PATIENCE_S)
        assert hit[0].outcome == "hit"
        hit.close()


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_threads_hammer_a_small_cache(on_device: bool) -> None:
    cuda = FakeCuda()
    pool: MemoryPool = DevicePool(40 * UNIT, CudaDriver(cuda)) if on_device else HostPool(40 * UNIT)
    cache = KvCache(KvBlocks(pool, LAYOUT), VERSION)
    leased: list[list[str]] = [[] for _ in range(4)]

    def serve(worker: int) -> None:
        rng = np.random.default_rng(worker)
        for _ in range(60):
            wants = [
                want(int(key), rows=[10, 30, 60][key % 3], validity=bytes([version]))
                for key, version in zip(rng.integers(0, 8, 3), rng.integers(0, 2, 3), strict=True)
            ]
            while wants:
                with contextlib.suppress(ZeroDivisionError), cache.checkout(wants, VERSION) as lease:
                    wants = wants[len(lease) :]
                    leased[worker] += [entry.outcome for entry in lease]
                    for entry in lease:
                        content = entry.key * 2 + entry.validity[0]
                        if entry.outcome != "hit":
                            if rng.random() < 0.1:
                                raise ZeroDivisionError
                            fill(pool, entry, content)
                            lease.publish(entry)
                        assert_filled(pool, entry, content)
                    assert pool.used_bytes <= pool.capacity_bytes
            if rng.random() < 0.1:
                cache.invalidate(int(rng.integers(0, 8)))

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(serve, worker) for worker in range(4)]:
            future.result(60)
    stats, found = cache.stats, [outcome for each in leased for outcome in each]
    assert (stats.hits, stats.misses, stats.stale) == tuple(found.count(each) for each in ("hit", "miss", "stale"))
    assert min(stats.hits, stats.misses, stats.stale, stats.evictions) > 0
    assert stats.used_bytes == pool.used_bytes
    cache.clear()
    assert pool.used_bytes == cache.stats.entries == 0
    if on_device:
        assert cuda.allocations == 1
    pool.close()


# --- Entries that begin with another ----------------------------------------------------------------------------------


def test_a_longer_entry_keeps_the_shorter_one_until_the_lease_ends() -> None:
    pool, cache = small_cache(12)
    with cache.checkout([growing("u", 10, b"a")], VERSION) as lease:
        assert (lease[0].outcome, lease[0].base) == ("miss", None)
        fill(pool, lease[0], 1)
        lease.publish(lease[0])
    with cache.checkout([growing("u", 25, b"a")], VERSION) as lease:
        base = lease[0].base
        assert (lease[0].outcome, lease[0].rows) == ("extended", 25)
        assert base is not None
        assert (base.rows, base.outcome) == (10, "hit")
        fill(pool, lease[0], 2)
        assert_filled(pool, base, 1)
        with pytest.raises(ValueError, match="belongs to another lease"):
            lease.publish(base)
        lease.publish(lease[0])
        assert cache.stats.used_bytes == 8 * UNIT
    assert cache.stats.used_bytes == 4 * UNIT
    assert outcomes(cache, growing("u", 25, b"a"), growing("u", 45, b"b"), want("u", 10, b"a")) == [
        "hit",
        "stale",
        "stale",
    ]
    assert (cache.stats.extended, cache.stats.stale, cache.stats.misses) == (1, 2, 1)


def test_two_entries_of_a_user_that_do_not_fit_together_are_not_joined() -> None:
    _, cache = small_cache(7)
    assert outcomes(cache, growing("u", 10, b"a"), growing("u", 25, b"a")) == ["miss", "stale"]
    with cache.checkout([growing("u", 26, b"a")], VERSION) as lease:
        assert (lease[0].outcome, lease[0].base) == ("stale", None)


def test_an_extension_waits_for_its_beginning_to_be_published() -> None:
    _, cache = small_cache(12)
    spy = spied(cache)
    with workers(1) as (other,):
        lease = cache.checkout([growing("u", 10, b"a")], VERSION)
        future = other.submit(cache.checkout, [growing("u", 25, b"a")], VERSION)
        spy.await_sleeper()
        lease.publish(lease[0])
        extended = future.result(PATIENCE_S)
        assert extended[0].outcome == "extended"
        lease.close()
        extended.close()
    assert cache.stats.entries == 0  # given up: what it replaced is gone as well


def test_room_is_not_made_by_evicting_a_beginning() -> None:
    _, cache = small_cache(16)
    assert outcomes(cache, growing("old", 10, b"a"), want("b"), want("c"), want("d")) == ["miss"] * 4
    assert outcomes(cache, want("e"), growing("old", 25, b"a")) == ["miss", "extended"]


@pytest.mark.parametrize("nbytes", [1024, 1025, 1535, 1536, 5000, 123_456])
def test_rows_within_some_bytes_are_the_most_that_fit(nbytes: int) -> None:
    rows = LAYOUT.rows_within(nbytes)
    assert LAYOUT.entry_bytes(rows) <= nbytes < LAYOUT.entry_bytes(rows + 1)
    assert LAYOUT.rows_within(LAYOUT.entry_bytes(1) - 1) == 0


class TestRows:
    """Entries that are ranges of rows of one tensor per layer and side."""

    # Rows of 6 and 10 bytes: 128 of them are a multiple of 256 bytes of both.
    STEP = 128

    def test_entries_are_the_same_rows_of_every_tensor(self) -> None:
        with HostPool(LAYOUT.bytes_per_row * self.STEP * 5 + 999) as pool:
            rows = KvRows(pool, LAYOUT)
            assert (rows.step, rows.capacity_rows) == (self.STEP, 5 * self.STEP)
            assert rows.capacity_rows == whole_rows(LAYOUT, pool.capacity_bytes)
            assert {name: each.shape for name, each in rows.tensors_of_all.items()} == {
                name: (640, 1, width) for name, width in {"k_0": 3, "v_0": 5, "k_1": 3, "v_1": 5}.items()
            }
            cache = KvCache(rows, VERSION)
            with cache.checkout([want(1, 129), want(2, 128), want(3, 0), want(4, 10)], VERSION) as lease:
                assert [rows.first_row(entry.region) for entry in lease] == [0, 256, 384, 512]
                for number, entry in enumerate(lease):
                    fill(pool, entry, number + 1)
                    lease.publish(entry)
                    assert all(each.address % 256 == 0 for each in entry.tensors.values())
                    for name, tensor in entry.tensors.items():
                        whole, first = rows.tensors_of_all[name], rows.first_row(entry.region)
                        np.testing.assert_array_equal(pool.read(whole)[first : first + entry.rows], pool.read(tensor))
                for number, entry in enumerate(lease):
                    assert_filled(pool, entry, number + 1)
            assert cache.stats.used_bytes == cache.stats.capacity_bytes == rows.capacity_bytes == 640 * 32
            # 129 rows need two steps in one piece: those of users 2 and 3 lie side by side.
            cache.invalidate(3)
            assert outcomes(cache, want(1, 129), want(5, 200)) == ["hit", "miss"]
            assert cache.stats.evictions == 1
            assert outcomes(cache, want(4, 10), want(1, 129)) == ["hit", "hit"]
            cache.clear()
            assert cache.stats.used_bytes == 0

    def test_a_budget_without_room_for_one_step_refuses_every_user(self) -> None:
        with HostPool(LAYOUT.bytes_per_row * self.STEP - 1) as pool:
            rows = KvRows(pool, LAYOUT)
            assert (rows.capacity_rows, rows.tensors_of_all) == (0, {})
            with pytest.raises(RequestError, match=r"(?s)too small for user 1\b.*10 rows") as caught:
                KvCache(rows, VERSION).checkout([want(1)], VERSION)
            assert caught.value.code == "HSTU-E707"

    def test_a_pool_that_somebody_else_uses_is_refused(self) -> None:
        with HostPool(LAYOUT.bytes_per_row * self.STEP * 2) as pool:
            pool.allocate(1)
            with pytest.raises(ValueError, match="not the only user of its pool"):
                KvRows(pool, LAYOUT)
