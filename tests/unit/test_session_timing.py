"""What a session is measured with; TensorRT and CUDA are fakes, the trace is synthetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hstu_compile.artifacts import Feed
from hstu_compile.errors import EngineError
from hstu_compile.kernel_timeline import Event, calls_of, device_events
from hstu_compile.session_timing import Latency, latency_of, time_request
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import open_fake
from tests.kernel_traces import call_at, trace_of

FEED = Feed(
    "two users",
    {
        "item_ids": np.array([4, 5, 6], np.int32),
        "timestamps": np.arange(3),
        "seq_offsets": np.array([0, 1, 3], np.int32),
    },
)


class Tracer:
    """In place of the profiler."""

    def __init__(self, *calls: list[Event]) -> None:
        self.calls, self.launches = calls, 0
        self.cuda: FakeCuda | None = None

    def __call__(self, run: Callable[[], Any], wait: Callable[[], Any]) -> list[list[Event]]:
        before = self.cuda.launches if self.cuda else 0
        run()
        wait()
        self.launches = self.cuda.launches - before if self.cuda else 0
        return calls_of(device_events(trace_of(*self.calls)))


def test_median_and_percentile_are_those_of_the_calls() -> None:
    samples = [float(value) for value in range(10, 0, -1)]
    assert latency_of(samples) == Latency(10, 5.5, 9.0)
    assert latency_of([3.0]) == Latency(1, 3.0, 3.0)


def test_plain_passes_launch_no_graph() -> None:
    cuda, tracer = FakeCuda(), Tracer(call_at(0.0), call_at(100_000.0))
    with open_fake(cuda) as session:
        found = time_request(session, FEED, "plain", 7, tracer)
    assert cuda.launches == 0
    assert (found.way, found.session, found.reason, found.warnings) == ("plain", "tensorrt 10.0.0", None, ())
    assert found.latency is not None
    assert found.latency.calls == 7
    assert 0 < found.latency.median_ms <= found.latency.p90_ms
    timeline = found.timeline
    assert timeline is not None
    assert (timeline.calls, timeline.launches, timeline.gaps_us, timeline.span_us) == (2, 4, 4.0, 46.0)
    assert timeline.kernels[0] == {
        "kernel": "nvjet_hsh_128x256",
        "kind": "product",
        "launches": 2,
        "us": 20.0,
        "share": pytest.approx(20 / 46),
    }


def test_every_replayed_call_that_is_measured_or_traced_launches_the_graph() -> None:
    cuda, tracer = FakeCuda(), Tracer(call_at(0.0))
    tracer.cuda = cuda
    with open_fake(cuda, cuda_graphs=1) as session:
        found = time_request(session, FEED, "replayed", 7, tracer)
        assert session.graph_stats is not None
        assert (session.graph_stats.captures, session.graph_stats.failures) == (1, 0)
        # After a warm-up of two calls as they are, one that is compared, and replays.
        assert session.graph_stats.replays >= 3 + 7 + 1
    assert found.latency is not None
    assert found.timeline is not None
    assert tracer.launches == 1


def test_what_cannot_be_recorded_is_no_replay() -> None:
    tracer = Tracer(call_at(0.0))
    with open_fake(FakeCuda(), cuda_graphs=1, captures=False) as session:
        found = time_request(session, FEED, "replayed", 4, tracer)
    assert (found.latency, found.timeline) == (None, None)
    assert found.reason is not None
    assert found.reason.startswith("0 of 4 calls were replays of a CUDA graph; a pass of tensorrt 10.0.0 stays without")
    assert len(found.warnings) == 1


def test_without_a_tracer_there_is_no_timeline() -> None:
    with open_fake(FakeCuda()) as session:
        found = time_request(session, FEED, "plain", 1, None)
    assert found.latency is not None
    assert found.timeline is None


def test_a_tracer_that_sees_nothing_is_an_error() -> None:
    with open_fake(FakeCuda()) as session, pytest.raises(EngineError, match="nothing ran on the GPU") as caught:
        time_request(session, FEED, "plain", 1, Tracer())
    assert caught.value.code == "HSTU-E406"
    assert "--no-timeline" in caught.value.fix
