"""Keeps the recording of a CUDA graph apart from passes of other sessions. Level 3; private to the runtime.

While one thread instantiated a graph and another let an engine of TensorRT-RTX 1.6.1 enqueue a pass, on streams of
their own, the driver (580.159.04) ended the process with a segmentation fault: in four of five processes within 75
seconds, and in none of seven with the two kept apart (tests/gpu/results/graph_recording.csv).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class RecordingGate:
    """Several threads may enqueue at a time; whoever records is alone. Neither may be begun inside the other.

    Who waits to record goes first: passes would keep a busy service from ever recording.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._enqueueing = self._waiting = 0
        self._recording = False

    @contextlib.contextmanager
    def enqueueing(self) -> Iterator[None]:
        """A `with` block in which an engine puts work on a stream."""
        with self._changed:
            self._changed.wait_for(lambda: not self._recording and not self._waiting)
            self._enqueueing += 1
        try:
            yield
        finally:
            with self._changed:
                self._enqueueing -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """A `with` block in which a graph is recorded and made, or is freed."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._recording and not self._enqueueing)
                self._recording = True
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._recording = False
                self._changed.notify_all()


#: Of the process, as the driver is.
GATE = RecordingGate()
