"""Calls of a session that are under way, so that closing it waits for them. Level 3; private to the runtime.

The memory that a session's graphs read and write together is freed when it is closed. A pass on a GPU that is still
running would go on writing there, into memory that somebody else may have by then.
"""

from __future__ import annotations

import threading


class CallsInFlight:
    """Each call is a `with` block of this object, in any thread; `close` waits for them and lets no further one begin.

    Raises:
        RuntimeError: at the beginning of a call, if `close` was called before.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._threads: dict[int, int] = {}
        self._closed = self._told = False

    def __enter__(self) -> None:
        with self._changed:
            thread = threading.get_ident()
            # Before the look at `_closed`: a signal's handler that closes the session between the two is refused.
            self._threads[thread] = self._threads.get(thread, 0) + 1
            if self._closed:
                self._leave(thread)
                raise RuntimeError("the session is closed")

    def __exit__(self, *exc_info: object) -> None:
        with self._changed:
            self._leave(threading.get_ident())

    def _leave(self, thread: int) -> None:
        if self._threads[thread] > 1:
            self._threads[thread] -= 1
            return
        del self._threads[thread]
        if self._closed:
            self._changed.notify_all()

    def close(self) -> bool:
        """Let no further call begin, and wait until none is under way.

        Returns:
            Whether it is on the caller to free what the calls used: True once.

        Raises:
            RuntimeError: if this thread is in a call, as a signal's handler may be: it would wait for itself.
        """
        with self._changed:
            if threading.get_ident() in self._threads:
                raise RuntimeError("this thread is in a call of the session; close it when the call has returned")
            self._closed = True
            self._changed.wait_for(lambda: not self._threads)
            first, self._told = not self._told, True
            return first
