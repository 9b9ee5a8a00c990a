"""Recordings of CUDA graphs keep apart from other sessions' passes: the driver ended processes where they did not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest

from hstu_compile.runtime._recording_gate import GATE, RecordingGate
from hstu_compile.runtime.tensorrt_session import TensorRtSession
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import open_fake

#: A thread that may go on has done so by then, and one that may not has had the time to be wrong.
_SOON = 0.2
#: Seconds after which a test has failed in place of hanging.
_LATE = 20.0

Section = Callable[[], AbstractContextManager[None]]


class Visit:
    """A section entered by a thread of its own, and left when told.

    Args:
        pool: of threads.
        section: of the gate.
    """

    def __init__(self, pool: ThreadPoolExecutor, section: Section) -> None:
        self.inside, self._leave = threading.Event(), threading.Event()
        self._done = pool.submit(self._visit, section)

    def _visit(self, section: Section) -> None:
        with section():
            self.inside.set()
            assert self._leave.wait(_LATE)

    def leave(self) -> None:
        """Let the thread leave the section, and see that it has."""
        self._leave.set()
        self._done.result(_LATE)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_passes_are_enqueued_side_by_side(pool: ThreadPoolExecutor) -> None:
    gate = RecordingGate()
    visits = [Visit(pool, gate.enqueueing) for _ in range(3)]
    assert all(visit.inside.wait(_LATE) for visit in visits)
    for visit in visits:
        visit.leave()


@pytest.mark.parametrize(
    ("first", "second"), [("enqueueing", "recording"), ("recording", "recording"), ("recording", "enqueueing")]
)
def test_a_recording_has_nobody_beside_it(pool: ThreadPoolExecutor, first: str, second: str) -> None:
    gate = RecordingGate()
    one = Visit(pool, getattr(gate, first))
    assert one.inside.wait(_LATE)
    other = Visit(pool, getattr(gate, second))
    assert not other.inside.wait(_SOON)
    one.leave()
    assert other.inside.wait(_LATE)
    other.leave()


def test_a_busy_service_comes_to_record(pool: ThreadPoolExecutor) -> None:
    gate = RecordingGate()
    running = Visit(pool, gate.enqueueing)
    assert running.inside.wait(_LATE)
    recording = Visit(pool, gate.recording)
    assert not recording.inside.wait(_SOON)
    late = Visit(pool, gate.enqueueing)
    assert not late.inside.wait(_SOON), "it came after who waits to record"
    running.leave()
    assert recording.inside.wait(_LATE)
    assert not late.inside.is_set()
    recording.leave()
    assert late.inside.wait(_LATE)
    late.leave()


@pytest.mark.parametrize("section", ["enqueueing", "recording"])
def test_an_error_leaves_the_gate_open(section: str) -> None:
    gate = RecordingGate()
    with pytest.raises(ValueError, match="inside"), getattr(gate, section)():
        raise ValueError("inside")
    with gate.recording():
        pass
    with gate.enqueueing():
        pass


def test_a_graph_is_freed_while_nobody_enqueues(pool: ThreadPoolExecutor) -> None:
    session = open_fake(FakeCuda(), cuda_graphs=1)
    for seed in range(2):
        asked(pool, session, seed).result(_LATE)
    enqueueing = Visit(pool, GATE.enqueueing)
    assert enqueueing.inside.wait(_LATE)
    closed = pool.submit(session.close)
    with pytest.raises(NotDone):
        closed.result(_SOON)
    enqueueing.leave()
    closed.result(_LATE)


def asked(pool: ThreadPoolExecutor, session: TensorRtSession, seed: int) -> Future[Any]:
    """A request whose answer is seed + 5."""
    feeds = {
        "item_ids": np.array([seed, 2, 3], np.int32),
        "timestamps": np.arange(3),
        "seq_offsets": np.array([0, 3], np.int32),
    }
    return pool.submit(lambda: session.run(feeds)["sums"].tolist())


def test_no_pass_is_enqueued_while_another_session_makes_a_graph(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What crashed on an H100: cuGraphInstantiate in one thread, an engine's enqueueing in another."""
    making, go_on, enqueued = threading.Event(), threading.Event(), threading.Event()
    cuda = FakeCuda()
    instantiate = cuda.cuGraphInstantiateWithFlags

    def slow(*arguments: Any) -> int:
        making.set()
        assert go_on.wait(_LATE)
        return instantiate(*arguments)

    with open_fake(cuda, cuda_graphs=1) as one, open_fake(cuda) as other, open_fake(cuda, cuda_graphs=1) as replaying:
        for session in (one, *[replaying] * 3):
            assert asked(pool, session, 1).result(_LATE) == [6.0]
        execute = other._execute

        def noted(log: Any) -> None:
            enqueued.set()
            execute(log)

        monkeypatch.setattr(other, "_execute", noted)
        monkeypatch.setattr(cuda, "cuGraphInstantiateWithFlags", slow)
        recorded = asked(pool, one, 10)
        assert making.wait(_LATE)
        plain = asked(pool, other, 20)
        assert not enqueued.wait(_SOON)
        assert asked(pool, replaying, 30).result(_LATE) == [35.0], "a replay waits for nobody"
        assert not enqueued.is_set()
        go_on.set()
        assert plain.result(_LATE) == [25.0]
        assert recorded.result(_LATE) == [15.0]
