"""Many clients that ask a tritonserver at the same time, each over a connection of its own."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from http.client import HTTPException

from triton_client import Arrays, Body, Client, Refusal
from triton_questions import Question

_START_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        model: in the repository.
        body: as it is sent.
        question: what it asks; None for a request that must be refused.
        keyed: whether it has a user key.
    """

    model: str
    body: Body
    question: Question | None = None
    keyed: bool = False


@dataclasses.dataclass(frozen=True)
class Answered:
    """What became of a job.

    Attributes:
        job: the request.
        answer: outputs, the refusal, or what broke.
        seconds: as the client saw it.
    """

    job: Job
    answer: Arrays | Refusal | Exception
    seconds: float


class Asking:
    """Clients in threads; each sends every n-th job and waits for the answer before the next.

    Args:
        port: of the server's HTTP service.
        jobs: the requests.
        clients: how many.
        seconds: after which nobody sends anything more.
    """

    def __init__(self, port: int, jobs: Sequence[Job], clients: int, seconds: float) -> None:
        self._port, self._jobs = port, jobs
        self._end = time.monotonic() + seconds
        self._over = threading.Event()
        # All are connected before anyone asks: otherwise the first may be done when the last one begins.
        self._together = threading.Barrier(clients, timeout=_START_SECONDS)
        self._answered: list[list[Answered]] = [[] for _ in range(clients)]
        self._broken: list[str] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        try:
            with Client(self._port) as client:
                client.get("/health/live")
                self._together.wait()
                for job in self._jobs[number :: len(self._threads)]:
                    if self._over.is_set() or time.monotonic() > self._end:
                        return
                    started = time.perf_counter()
                    answer: Arrays | Refusal | Exception
                    try:
                        answer = client.ask(job.model, job.body)
                    except (OSError, HTTPException, ValueError, KeyError) as error:
                        answer = error
                    self._answered[number].append(Answered(job, answer, time.perf_counter() - started))
                    if isinstance(answer, Exception):
                        return
        except Exception as error:  # whatever ends a client, the others still have something to say
            self._broken.append(f"client {number}: {type(error).__name__}: {error}")
            self._together.abort()

    @property
    def done(self) -> int:
        """Jobs that have ended."""
        return sum(map(len, self._answered))

    def stop(self) -> None:
        """Let each finish its request, close its connection, and ask nothing more."""
        self._over.set()

    def join(self) -> list[Answered]:
        """Wait for all.

        Raises:
            RuntimeError: naming the clients that did not even start, or that hang.
        """
        for thread in self._threads:
            thread.join(max(0.0, self._end - time.monotonic()) + 2 * _START_SECONDS)
        hanging = sum(thread.is_alive() for thread in self._threads)
        if self._broken or hanging:
            raise RuntimeError(f"{hanging} clients hang; {'; '.join(self._broken) or 'none broke'}")
        return [each for of_client in self._answered for each in of_client]
