"""Engines and kernels on one stream, played by fakes: answers, graphs, memory, refusals."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from hstu_compile.errors import EngineError, RequestError, UsageError
from hstu_compile.runtime._free_list import aligned
from hstu_compile.runtime.fused_session import FusedSession
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from tests.fake_cuda import FakeCuda
from tests.fused_fakes import FakeKernels, fused_session
from tests.oracle import Array
from tests.segmented_cases import Case, ranking_case, retrieval_case, rounding_what_kernels_make


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    cuda = FakeCuda(2**24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield cuda
    assert not cuda.memory
    assert not cuda.pinned
    assert not cuda.graphs
    assert not cuda.executables
    assert not cuda.streams
    assert cuda.depth == cuda.contexts == 0


@pytest.fixture(scope="module")
def retrieval() -> Case:
    return retrieval_case("retrieval", "fp16")


def answers(case: Case) -> list[dict[str, Array]]:
    with OnnxRuntimeSession(rounding_what_kernels_make(case)) as whole:
        return [whole.run(feeds) for feeds in case.feeds]


def assert_equal(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("name", ["retrieval", "append"])
def test_retrieval_equals_the_graph_in_one_piece_to_the_bit(cuda: FakeCuda, name: str) -> None:
    case = retrieval_case(name, "fp16")
    with fused_session(case.cut, cuda) as session:
        assert [spec.name for spec in session.inputs] == [spec.name for spec in case.whole.inputs]
        for feeds, expected in zip(case.feeds, answers(case), strict=True):
            assert_equal(session.run(feeds), expected)


def test_packed_ranking_in_bfloat16_equals_the_graph_in_one_piece_to_the_bit(cuda: FakeCuda) -> None:
    case = ranking_case("packed", "bf16")
    kernels = FakeKernels(case.cut, cuda, workspace=700)
    with fused_session(case.cut, cuda, kernels) as session:
        for feeds, expected in zip(case.feeds, answers(case), strict=True):
            assert_equal(session.run(feeds), expected)
        assert kernels.launches == len(case.feeds) * len(case.cut.calls)
    assert kernels.opened == 0


def test_the_whole_pass_is_one_graph_from_its_second_use_on(cuda: FakeCuda, retrieval: Case) -> None:
    kernels = FakeKernels(retrieval.cut, cuda, workspace=300)
    expected = answers(retrieval)
    with fused_session(retrieval.cut, cuda, kernels, cuda_graphs=4) as session:
        for _ in range(3):
            for feeds, wanted in zip(retrieval.feeds, expected, strict=True):
                assert_equal(session.run(feeds), wanted)
        launched = kernels.launches
        for feeds, wanted in zip(retrieval.feeds, expected, strict=True):
            assert_equal(session.run(feeds), wanted)
        stats = session.graph_stats
        assert stats is not None
        assert stats.failures == 0
        assert stats.captures == len({tuple(a.shape for a in feeds.values()) for feeds in retrieval.feeds})
        assert stats.replays > len(retrieval.feeds)
        assert kernels.launches - launched < len(retrieval.feeds) * len(retrieval.cut.calls)


def test_graphs_keep_to_their_memory_budget(cuda: FakeCuda, retrieval: Case) -> None:
    cuda.graph_bytes = 1000
    expected = answers(retrieval)
    by_shape = {tuple(a.shape for a in feeds.values()): i for i, feeds in enumerate(retrieval.feeds)}
    assert len(by_shape) >= 3
    with fused_session(retrieval.cut, cuda, cuda_graphs=9, graph_budget_bytes=2500) as session:
        for index in by_shape.values():
            for _ in range(3):
                assert_equal(session.run(retrieval.feeds[index]), expected[index])
            assert len(cuda.executables) <= 2
        stats = session.graph_stats
        assert stats is not None
        assert (stats.kept, stats.kept_bytes) == (2, 2000)
        assert stats.captures == len(by_shape)
        assert stats.evictions == len(by_shape) - 2


def test_a_graph_without_its_attention_is_found_out_before_it_answers(cuda: FakeCuda, retrieval: Case) -> None:
    kernels = FakeKernels(retrieval.cut, cuda, skips=True)
    expected = answers(retrieval)
    with fused_session(retrieval.cut, cuda, kernels, cuda_graphs=2) as session:
        feeds, wanted = retrieval.feeds[1], expected[1]
        for _ in range(2):
            assert_equal(session.run(feeds), wanted)
        with pytest.warns(RuntimeWarning, match="the graph gave another answer"):
            found = session.run(feeds)
        assert_equal(found, wanted)
        assert session.graph_stats == GraphStats(captures=1, failures=1)


def test_a_graph_is_compared_on_memory_that_holds_nothing_of_an_earlier_pass(cuda: FakeCuda, retrieval: Case) -> None:
    # Far more than all tensors take: its last byte is no tensor's.
    kernels = FakeKernels(retrieval.cut, cuda, workspace=2**20)
    with fused_session(retrieval.cut, cuda, kernels, cuda_graphs=2) as session:
        for _ in range(4):
            session.run(retrieval.feeds[1])
    left = 0xAB
    # Two plain passes; the replay that is compared and the plain pass beside it; a replay.
    assert kernels.found[1:] == [left, 0xFF, 0xFF, left]


def test_a_segment_that_cannot_be_recorded_runs_without_a_graph_and_says_so(cuda: FakeCuda, retrieval: Case) -> None:
    with fused_session(retrieval.cut, cuda, cuda_graphs=2, captures=False) as session:
        session.run(retrieval.feeds[1])
        with pytest.warns(RuntimeWarning, match="segment 0, 1, 2 cannot be recorded"):
            session.run(retrieval.feeds[1])
        assert_equal(session.run(retrieval.feeds[1]), answers(retrieval)[1])


def test_outputs_go_straight_to_their_targets_and_cached_rows_are_read_in_place(cuda: FakeCuda) -> None:
    case = retrieval_case("append", "fp16")
    feeds, expected = case.feeds[1], answers(case)[1]
    with fused_session(case.cut, cuda) as session, session.memory_pool(2**20) as pool:
        given = dict(feeds)
        for name in [name for name in feeds if name.startswith(("k_", "v_"))]:
            tensor = pool.tensor(pool.allocate(feeds[name].nbytes), 0, feeds[name].shape, "float16")
            pool.write(feeds[name], tensor)
            given[name] = tensor
        targets = {}
        for name in [name for name in expected if name.startswith("new_")]:
            array = expected[name]
            targets[name] = pool.tensor(pool.allocate(array.nbytes), 0, array.shape, "float16")
        found = session.run_resident(given, targets)
        found |= {name: pool.read(tensor) for name, tensor in targets.items()}
        assert_equal(found, expected)


def test_a_pass_allocates_nothing_once_its_shapes_are_known(cuda: FakeCuda, retrieval: Case) -> None:
    with fused_session(retrieval.cut, cuda) as session:
        for feeds in retrieval.feeds:
            session.run(feeds)
        before = cuda.allocations
        for feeds in retrieval.feeds:
            session.run(feeds)
        assert cuda.allocations == before


def test_what_crosses_takes_less_memory_than_all_of_it(cuda: FakeCuda, retrieval: Case) -> None:
    largest = max(retrieval.feeds, key=lambda feeds: feeds["item_ids"].size)
    with fused_session(retrieval.cut, cuda) as session:
        session.run(largest)
        served = {spec.name for spec in session.outputs}
        crossing = [each.spec.name for each in retrieval.cut.crossing if each.spec.name not in served]
        assert set(session._arena.offsets) == set(crossing)
        assert session._arena.nbytes == session._arena.least_nbytes
        assert session._arena.nbytes < sum(aligned(session._nbytes(name)) for name in crossing)


def test_a_request_beyond_a_segments_profile_is_refused_before_anything_runs(cuda: FakeCuda, retrieval: Case) -> None:
    with fused_session(retrieval.cut, cuda) as session:
        feeds = dict(retrieval.feeds[1])
        feeds["item_ids"] = np.ones(5000, np.int32)
        feeds["timestamps"] = np.arange(5000)
        enqueued = cuda.enqueued
        with pytest.raises(RequestError, match="HSTU-E704"):
            session.run(feeds)
        assert cuda.enqueued == enqueued


def test_engines_of_another_schedule_are_refused(cuda: FakeCuda, retrieval: Case) -> None:
    other = dataclasses.replace(retrieval.cut, segments=tuple(reversed(retrieval.cut.segments)))
    with pytest.raises(EngineError, match=r"HSTU-E404.*\n.*reads .* before it is made"):
        fused_session(other, cuda)
    fewer = dataclasses.replace(retrieval.cut, segments=retrieval.cut.segments[:-1])
    with pytest.raises(EngineError, match="it has 3 segments, and there are 2 engines"):
        fused_session(fewer, cuda)


def test_an_engine_that_cannot_be_loaded_leaves_nothing_behind(cuda: FakeCuda, retrieval: Case) -> None:
    with pytest.raises(EngineError, match=r"HSTU-E404.*cannot load the engine"):
        fused_session(retrieval.cut, cuda, loads=False)


def test_ever_new_shapes_are_told_of_once(cuda: FakeCuda, retrieval: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu_compile.runtime.fused_session._MANY_SETS", 3)
    one, two, three = list({tuple(a.shape for a in feeds.values()): feeds for feeds in retrieval.feeds}.values())[:3]
    # The fixture makes every warning an error.
    with fused_session(retrieval.cut, cuda) as session:
        for feeds in (one, two, one, two):
            session.run(feeds)
        with pytest.warns(RuntimeWarning, match=r"3 sets of input shapes.*buckets=Buckets\(\)"):
            session.run(three)
        for feeds in (one, two, three):
            session.run(feeds)


def test_a_negative_number_of_graphs_is_refused_before_a_gpu_is_touched(retrieval: Case) -> None:
    untouched = FakeCuda()
    kernels = FakeKernels(retrieval.cut, untouched)
    with pytest.raises(UsageError, match=r"HSTU-E901.*-1"):
        FusedSession(cast(Any, None), retrieval.cut, [], kernels, cuda_graphs=-1)
    with pytest.raises(UsageError, match=r"HSTU-E901.*2 CUDA graphs in -5 bytes"):
        FusedSession(cast(Any, None), retrieval.cut, [], kernels, cuda_graphs=2, graph_budget_bytes=-5)
