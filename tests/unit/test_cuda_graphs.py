"""CUDA graphs of a TensorRT session: what is recorded, what is replayed, what ends it. Played by fakes."""

from __future__ import annotations

import ctypes
import itertools
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hstu_compile.errors import EngineError, UsageError
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime._cuda_graph import CudaGraph, Memcpy3D
from hstu_compile.runtime._ranking_feeds import among_all_rows
from hstu_compile.runtime.graph_cache import GraphCache, GraphStats
from hstu_compile.runtime.session import open_session
from hstu_compile.runtime.tensorrt_session import TensorRtSession
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import open_fake
from tests.unit.test_resident_sessions import (
    HEADS,
    WIDTH,
    int32,
    prefill_engine,
    prefill_feeds,
    score_engine,
    tensor_in,
)


def feeds_of(*lengths: int, seed: int = 0) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(1, 100, sum(lengths)).astype(np.int32)
    return {
        "item_ids": ids,
        "timestamps": np.arange(len(ids)),
        "seq_offsets": np.cumsum([0, *lengths]).astype(np.int32),
    }


def asked(session: TensorRtSession, feeds: dict[str, Any]) -> None:
    """Ask once and check the answer."""
    offsets = feeds["seq_offsets"]
    expected = [float(feeds["item_ids"][a:b].sum()) for a, b in itertools.pairwise(offsets)]
    assert session.run(feeds)["sums"].tolist() == expected


def counted(session: TensorRtSession) -> GraphStats:
    stats = session.graph_stats
    assert stats is not None
    return stats


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    cuda = FakeCuda()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield cuda
    assert not cuda.memory
    assert not cuda.pinned
    assert not cuda.graphs
    assert not cuda.executables
    assert not cuda.streams
    assert cuda.depth == cuda.contexts == 0


def test_the_second_call_records_and_the_third_replays_with_its_own_inputs(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=2) as session:
        for seed in range(6):
            asked(session, feeds_of(2, 3, seed=seed))
            assert counted(session).captures == (seed >= 1)
        assert counted(session) == GraphStats(captures=1, replays=4, kept=1)
        assert cuda.launches == 4


def test_a_session_without_graphs_records_nothing(cuda: FakeCuda) -> None:
    with open_fake(cuda) as session:
        for _ in range(4):
            asked(session, feeds_of(2, 3))
        assert session.graph_stats is None
        assert cuda.launches == 0


def test_other_shapes_and_other_splits_of_equal_shapes(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=4) as session:
        for seed, lengths in enumerate([(2, 3), (3, 2), (5, 0), (1, 4)]):
            asked(session, feeds_of(*lengths, seed=seed))
        assert counted(session) == GraphStats(captures=1, replays=2, kept=1), "offsets are data, not shapes"
        for lengths in ((1, 1), (4, 1), (5,), (2, 2, 1)):
            asked(session, feeds_of(*lengths))
        assert counted(session).captures == 1


def test_an_empty_input_is_not_the_input_of_one_row_that_stands_for_it(cuda: FakeCuda) -> None:
    with open_fake(cuda, score_engine(), cuda_graphs=4) as session:
        keys = np.ones((1, HEADS, WIDTH), np.float16)
        for _ in range(4):
            feeds = {"candidate_offsets": int32(0, 0), "cache_offsets": int32(0, 1), "item_id": int32(), "k_0": keys}
            assert session.run(feeds)["preds"].shape == (0, 1)
            one = {"candidate_offsets": int32(0, 1), "cache_offsets": int32(0, 1), "item_id": int32(7), "k_0": keys}
            assert session.run(one)["preds"].tolist() == [[7.0]]
        assert counted(session).captures == 2
        assert counted(session).replays == 4


def test_interleaved_shapes_replay_each_its_own_graph(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=3) as session:
        for seed in range(12):
            asked(session, feeds_of(*((2, 3), (1,), (4, 0, 1))[seed % 3], seed=seed))
        assert counted(session) == GraphStats(captures=3, replays=6, kept=3)


def test_the_least_recently_replayed_graph_goes(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=2) as session:
        for lengths in ((1,), (1,), (2,), (2,), (1,), (3,), (3,)):
            asked(session, feeds_of(*lengths))
        assert counted(session) == GraphStats(captures=3, replays=1, evictions=1, kept=2)
        assert len(cuda.executables) == 2
        asked(session, feeds_of(1, seed=5))
        assert counted(session).replays == 2, "the graph that was replayed last was evicted"
        asked(session, feeds_of(2, seed=6))
        assert counted(session).replays == 2, "an evicted graph was replayed"


def test_a_buffer_that_moves_takes_the_graphs_with_it(cuda: FakeCuda) -> None:
    engine = score_engine(most_candidates=4000)
    keys = np.ones((1, HEADS, WIDTH), np.float16)

    def ask(session: TensorRtSession, count: int, factor: int) -> None:
        ids = np.arange(count, dtype=np.int32) * factor
        feeds = {"candidate_offsets": int32(0, count), "cache_offsets": int32(0, 1), "item_id": ids, "k_0": keys}
        assert session.run(feeds)["preds"][:, 0].tolist() == ids.tolist()

    with open_fake(cuda, engine, cuda_graphs=2) as session:
        for factor in range(3):
            ask(session, 3, factor)
        ask(session, 4000, 2)
        assert counted(session) == GraphStats(captures=1, replays=1, evictions=1, kept=0)
        for factor in range(3, 6):
            ask(session, 3, factor)
        assert counted(session) == GraphStats(captures=2, replays=2, evictions=1, kept=1)


def test_a_failing_capture_is_told_once_and_never_tried_again_for_the_key(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=2) as session:
        asked(session, feeds_of(2, 3))
        cuda.capture_status = 901
        with pytest.warns(RuntimeWarning, match=r"stays without a CUDA graph: .*cuStreamEndCapture failed.*\(901\)"):
            asked(session, feeds_of(2, 3, seed=1))
        cuda.capture_status = 0
        for seed in range(4):
            asked(session, feeds_of(2, 3, seed=seed))
        assert counted(session) == GraphStats(failures=1)
        for seed in range(3):
            asked(session, feeds_of(4, seed=seed))
        assert counted(session) == GraphStats(captures=1, replays=1, failures=1, kept=1)


def test_an_engine_that_refuses_to_be_recorded_still_serves(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=2, captures=False) as session:
        asked(session, feeds_of(2, 3))
        with pytest.warns(RuntimeWarning, match="enqueueing failed"):
            asked(session, feeds_of(2, 3, seed=1))
        assert not cuda.recording, "the stream was left in capture"
        for seed in range(3):
            asked(session, feeds_of(2, 3, seed=seed))
        assert counted(session) == GraphStats(failures=1)


def test_a_graph_that_reads_the_contexts_memory_is_found_out_and_kept_to_its_shapes(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=3, stateful=True) as session:
        for seed in range(3):
            asked(session, feeds_of(2, 3, seed=seed))
        asked(session, feeds_of(1))
        assert counted(session).replays == 1
        with pytest.warns(RuntimeWarning, match="only while the same shapes follow one another"):
            asked(session, feeds_of(2, 3, seed=5))
        assert counted(session).replays == 1
        asked(session, feeds_of(2, 3, seed=6))
        assert counted(session).replays == 2
        asked(session, feeds_of(1))
        asked(session, feeds_of(2, 3, seed=7))
        assert counted(session).replays == 2, "replayed after other shapes"
        assert counted(session).failures == 1


def test_a_graph_that_cannot_be_detached_from_the_host_is_kept_to_its_shapes(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=3, node_kind=3) as session:
        asked(session, feeds_of(2, 3))
        with pytest.warns(RuntimeWarning, match="only while the same shapes follow one another: .* a node of type 3"):
            asked(session, feeds_of(2, 3, seed=1))
        for seed in range(3):
            asked(session, feeds_of(2, 3, seed=seed))
        assert counted(session).replays == 3
        for seed in range(4):
            asked(session, feeds_of(*((1,), (2, 3))[seed % 2], seed=seed))
        assert counted(session) == GraphStats(captures=2, replays=3, kept=2)


def test_a_graph_that_gives_another_answer_is_dropped(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=3) as session:
        for seed in range(2):
            asked(session, feeds_of(2, 3, seed=seed))
        for nodes in cuda.executables.values():
            nodes.clear()
        with pytest.warns(RuntimeWarning, match="the graph gave another answer"):
            asked(session, feeds_of(2, 3, seed=1))
        for seed in range(3):
            asked(session, feeds_of(2, 3, seed=seed))
        assert counted(session) == GraphStats(captures=1, failures=1)


def test_copies_around_a_pass_are_made_anew_in_every_replay(cuda: FakeCuda) -> None:
    with (
        open_fake(cuda, score_engine(), cuda_graphs=2) as session,
        session.memory_pool(8192) as pool,
    ):
        entries = [tensor_in(pool, (3, HEADS, WIDTH), "float16") for _ in range(5)]
        staged = tensor_in(pool, (3, HEADS, WIDTH), "float16")
        target, kept = (tensor_in(pool, (1, 1), "float32") for _ in range(2))
        for index, entry in enumerate(entries):
            pool.write(np.full(entry.shape, index + 1, np.float16), entry)
        for index, entry in enumerate(entries):
            feeds = {"item_id": int32(2), "candidate_offsets": int32(0, 1), "cache_offsets": int32(0, 3), "k_0": staged}
            assert (
                session.run_resident(feeds, {"preds": target}, before=[(entry, staged)], after=[(target, kept)]) == {}
            )
            assert pool.read(kept).tolist() == pool.read(target).tolist() == [[6.0 * (index + 1)]]
        assert counted(session) == GraphStats(captures=1, replays=3, kept=1)
        with pytest.raises(ValueError, match="cannot be copied"):
            session.run_resident(feeds, {}, before=[(entries[0], kept)])


def test_one_graph_serves_users_of_every_length_among_the_rows_of_a_whole_cache(cuda: FakeCuda) -> None:
    with open_fake(cuda, score_engine(), cuda_graphs=2) as session, session.memory_pool(8192) as pool:
        rows = tensor_in(pool, (12, HEADS, WIDTH), "float16")
        values = np.full(rows.shape, np.nan, np.float16)
        users = [(0, 1), (1, 4), (6, 6), (7, 12), (2, 9)]
        for number, (first, end) in enumerate(users):
            others = values.copy()
            others[first:end] = number + 1
            pool.write(others, rows)
            packed = {
                "item_id": int32(2, 3),
                "candidate_offsets": int32(0, 2),
                "cache_offsets": int32(0, end - first),
                "request_timestamps": int32(9),
            }
            feeds = among_all_rows(packed, [first])
            assert feeds.pop("request_timestamps").tolist() == [9, 9]
            total = float((number + 1) * (end - first))
            answer = session.run_resident({**feeds, "k_0": rows}, {})["preds"]
            assert answer.tolist() == [[2 * total], [3 * total]]
        assert counted(session) == GraphStats(captures=1, replays=3, kept=1)


def test_another_address_is_another_graph(cuda: FakeCuda) -> None:
    with open_fake(cuda, prefill_engine(), cuda_graphs=4) as session, session.memory_pool(4096) as pool:
        targets = [tensor_in(pool, (5, HEADS, WIDTH), "float16") for _ in range(2)]
        for step in range(8):
            target = targets[step % 2]
            session.run_resident(prefill_feeds([step, 2], [3]), {"k_0": target})
            assert pool.read(target)[:, 0, 0].tolist() == [10, step, 2, 11, 3]
        assert counted(session) == GraphStats(captures=2, replays=4, kept=2)


def test_threads_get_their_own_answers(cuda: FakeCuda) -> None:
    with open_fake(cuda, cuda_graphs=2) as session:
        failures: list[BaseException] = []

        def serve(seed: int) -> None:
            try:
                for turn in range(40):
                    asked(session, feeds_of(*((2, 3), (1,), (4, 4))[turn % 3], seed=100 * seed + turn))
            except BaseException as error:  # shown by the main thread
                failures.append(error)

        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert counted(session).replays > 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt-rtx"])
def test_runtimes_without_graphs_of_ours_refuse_them(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api = type("Api", (), {"is_rtx": True, "backend": runtime})()
    monkeypatch.setattr("hstu_compile.tensorrt_api.tensorrt_api", lambda _: api)
    with pytest.raises(UsageError, match="CUDA graphs") as caught:
        open_session(runtime, onnx=None, engine=b"", cuda_graphs=4)
    assert caught.value.code == "HSTU-E901"


def test_a_negative_number_of_graphs_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot keep -1 CUDA graphs"):
        open_fake(FakeCuda(), cuda_graphs=-1)


class Kept:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_the_cache_forgets_passes_that_never_come_again_but_not_the_refused() -> None:
    cache: GraphCache[Kept] = GraphCache(1)
    cache.refuse("bad")
    assert not cache.is_due("often")
    assert not any(cache.is_due(index) for index in range(10))
    assert not cache.is_due("often"), "remembered for longer than the cache is large"
    assert not cache.is_due("bad")
    assert cache.is_due("often")
    first, second = Kept(), Kept()
    cache.keep("often", first)
    assert not cache.is_due("often")
    cache.keep("other", second)
    assert (first.closed, second.closed, cache.find("often"), cache.find("other")) == (1, 0, None, second)
    cache.refuse("other")
    assert second.closed == 1
    assert cache.stats == GraphStats(captures=2, evictions=1, failures=2)


def test_the_cache_keeps_to_its_budget_by_dropping_what_was_used_longest_ago() -> None:
    cache: GraphCache[Kept] = GraphCache(9, budget_bytes=100)
    kept = {name: Kept() for name in "abcd"}
    cache.keep("a", kept["a"], 40)
    cache.keep("b", kept["b"], 40)
    cache.find("a")
    cache.keep("c", kept["c"], 60)
    assert [kept[name].closed for name in "abc"] == [0, 1, 0]
    assert cache.stats == GraphStats(captures=3, evictions=1, kept=2, kept_bytes=100)
    cache.refuse("c")
    assert cache.stats.kept_bytes == 40
    cache.keep("d", kept["d"], 500)
    assert (kept["a"].closed, kept["d"].closed) == (1, 0), "a graph that is larger than the budget is kept alone"
    cache.clear()
    assert cache.stats.kept_bytes == 0


def memcpy(source: int, target: int, size: int, kinds: tuple[int, int]) -> Memcpy3D:
    copy = Memcpy3D()
    copy.source.memory_type, copy.target.memory_type = kinds
    copy.source.host = source if kinds[0] == 1 else None
    copy.source.device = source
    copy.target.device = target
    copy.width_in_bytes, copy.height, copy.depth = size, 1, 1
    return copy


@pytest.mark.parametrize("kind", [1, 4])
def test_a_copy_from_the_host_reads_what_was_there_when_it_was_recorded(cuda: FakeCuda, kind: int) -> None:
    driver = CudaDriver(cuda)
    host = (ctypes.c_uint8 * 4)(1, 2, 3, 4)
    with driver.current():
        place = driver.allocate(256)
        node = memcpy(ctypes.addressof(host), place, 4, (kind, 2))

        def enqueue() -> None:
            cuda.enqueue(driver.stream, lambda: ctypes.memmove(place, host, 4) and None, node)

        graph = CudaGraph(driver, enqueue)
        assert (graph.num_nodes, graph.bound_by) == (1, "")
        host[:] = [9, 9, 9, 9]
        result = np.zeros(4, np.uint8)
        with driver.synchronised():
            graph.launch()
            driver.download(place, result)
        assert result.tolist() == [1, 2, 3, 4]
        graph.close()
        graph.close()
        driver.free(place)
    driver.close()


@pytest.mark.parametrize(
    ("kinds", "reason"), [((2, 1), "a copy to the host"), ((4, 4), "a copy to the host"), ((2, 2), ""), ((2, 4), "")]
)
def test_what_a_graph_is_bound_by(cuda: FakeCuda, kinds: tuple[int, int], reason: str) -> None:
    driver = CudaDriver(cuda)
    host = (ctypes.c_uint8 * 4)()
    with driver.current():
        place = driver.allocate(256)
        target = ctypes.addressof(host) if reason else place + 128
        node = memcpy(place, target, 4, kinds)
        graph = CudaGraph(driver, lambda: cuda.enqueue(driver.stream, lambda: None, node) and None)
        assert graph.bound_by == reason
        graph.close()
        driver.free(place)
    driver.close()


def test_a_recording_without_work_is_refused(cuda: FakeCuda) -> None:
    driver = CudaDriver(cuda)
    with driver.current(), pytest.raises(EngineError, match="put no work on the stream"):
        CudaGraph(driver, lambda: None)
    driver.close()


def test_a_driver_without_a_call_says_which() -> None:
    driver = CudaDriver(FakeCuda())
    with pytest.raises(EngineError, match="no CUDA call cuGraphFly"):
        driver.call("cuGraphFly")


def test_the_copy_descriptor_has_the_layout_of_the_drivers_header() -> None:
    assert ctypes.sizeof(Memcpy3D) == 200
    offsets = {name: getattr(type(Memcpy3D().source), name).offset for name in ("memory_type", "host", "device")}
    assert offsets == {"memory_type": 32, "host": 40, "device": 48}
    assert (Memcpy3D.target.offset, Memcpy3D.width_in_bytes.offset) == (88, 176)
