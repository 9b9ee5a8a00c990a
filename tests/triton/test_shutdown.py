"""SIGTERM under load: what was accepted is answered, nothing hangs, and no process is left."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hstu_compile.serving.local_server import Installation
from tests.triton.clients import PROTOCOLS, Protocol, ask
from tests.triton.models import ServedModel, deploy
from tests.triton.processes import is_alive, stub_processes
from tests.triton.server import TritonServer, grpc_client, http_client
from tests.triton.workload import Question, questions

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

#: What the server waits for connections, requests and models; short where a test lets it pass.
DRAIN_SECONDS, SHORT_DRAIN_SECONDS = 20, 3
#: Of one request on a busy machine; a request that hangs takes the clients' limit of a minute.
MOST_SECONDS = 15.0
#: A stub looks every few seconds whether its server is there.
STUB_SECONDS = 20.0
CLIENTS = 8


@dataclasses.dataclass(frozen=True)
class Sent:
    """One request.

    Attributes:
        started: when, on the monotonic clock.
        ended: likewise.
        error: what was raised; None for an answer.
        fault: what is wrong with the answer.
    """

    started: float
    ended: float
    error: Exception | None
    fault: str | None


class Clients:
    """Threads that ask without a pause until they are told to stop, or are refused.

    Args:
        server: running.
        pool: what is asked.
        protocols: of the clients, by turns.
    """

    def __init__(self, server: TritonServer, pool: list[Question], protocols: tuple[Protocol, ...]) -> None:
        self._server, self._pool, self._enough = server, pool, threading.Event()
        self.sent: list[Sent] = []
        self._threads = [
            threading.Thread(target=self._ask, args=(number, protocols[number % len(protocols)]))
            for number in range(CLIENTS)
        ]

    def _ask(self, number: int, protocol: Protocol) -> None:
        rng = np.random.default_rng(number)
        with (http_client if protocol == "http" else grpc_client)(self._server) as client:
            while not self._enough.is_set():
                question = self._pool[int(rng.integers(len(self._pool)))]
                started, error, fault = time.monotonic(), None, None
                try:
                    fault = question.fault(ask(client, protocol, question.model, question.keyed()))
                except Exception as refused:
                    error = refused
                self.sent.append(Sent(started, time.monotonic(), error, fault))
                if error is not None:
                    return

    def start(self) -> None:
        """Start, and wait until all are being answered."""
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + 30
        while len(self.sent) < 10 * CLIENTS and time.monotonic() < deadline:
            time.sleep(0.02)

    def stop(self) -> None:
        """Let each finish its request and close its connection."""
        self._enough.set()

    def join(self) -> None:
        """Wait for all."""
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive()


@pytest.fixture
def start(
    triton_installation: Installation, retrieval: ServedModel, ranking: ServedModel, tmp_path: Path
) -> Iterator[Callable[[int], tuple[TritonServer, list[Question]]]]:
    """Starts a server of its own with both models."""
    started: list[TritonServer] = []

    def begin(drain_seconds: int) -> tuple[TritonServer, list[Question]]:
        arguments = [f"--exit-timeout-secs={drain_seconds}"]
        server = TritonServer(triton_installation, tmp_path, arguments=arguments).start()
        started.append(server)
        models = {deploy(server, model, model.name): model for model in (retrieval, ranking)}
        return server, questions(models, users=8)

    yield begin
    for server in started:
        server.stop(signal.SIGKILL)


def check_answers(sent: list[Sent], told: float) -> None:
    """Nothing was wrong, nothing hung, and all that was sent and answered before the signal went well."""
    assert [each.fault for each in sent if each.fault is not None] == []
    assert max(each.ended - each.started for each in sent) < MOST_SECONDS
    assert all(each.error is None for each in sent if each.ended < told)


def wait_for_stubs(stubs: dict[str, int]) -> None:
    deadline = time.monotonic() + STUB_SECONDS
    while any(map(is_alive, stubs.values())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [name for name, pid in stubs.items() if is_alive(pid)] == []


def test_sigterm_under_load_answers_or_refuses_and_ends_with_0(
    start: Callable[[int], tuple[TritonServer, list[Question]]],
) -> None:
    """Over gRPC clients go on asking; over HTTP they finish their request and close, as behind a load balancer."""
    server, pool = start(DRAIN_SECONDS)
    stubs = stub_processes(server.pid)
    assert len(stubs) == len(server.shared_memory) == 2
    http, grpc = (Clients(server, pool, (protocol,)) for protocol in PROTOCOLS)
    http.start()
    grpc.start()
    told = time.monotonic()
    server.send_signal(signal.SIGTERM)
    http.stop()
    code = server.wait(DRAIN_SECONDS + 10)
    seconds = time.monotonic() - told
    for clients in (http, grpc):
        clients.join()
        check_answers(clients.sent, told)
    # What an HTTP client had sent was answered, every time.
    assert [each.error for each in http.sent if each.error is not None] == []
    refusals = [str(each.error) for each in grpc.sent if each.error is not None]
    assert refusals, "nobody asked a server that is stopping"
    assert all("UNAVAILABLE" in text or "NOT_FOUND" in text or "CANCELLED" in text for text in refusals), refusals
    assert code == 0, server.log()[-3000:]
    assert seconds < DRAIN_SECONDS
    wait_for_stubs(stubs)
    assert server.shared_memory == []


def test_http_connections_that_stay_open_use_the_exit_timeout_up(
    start: Callable[[int], tuple[TritonServer, list[Question]]],
) -> None:
    """Why a server may end with 1: it waits for HTTP connections first, and has no time left for its models."""
    server, pool = start(SHORT_DRAIN_SECONDS)
    stubs = stub_processes(server.pid)
    question = pool[0]
    with http_client(server) as client:
        assert question.fault(ask(client, "http", question.model, question.keyed())) is None
        told = time.monotonic()
        server.send_signal(signal.SIGTERM)
        time.sleep(1)
        # Until then a connection that is open is served as ever.
        assert question.fault(ask(client, "http", question.model, question.keyed())) is None
        code = server.wait(SHORT_DRAIN_SECONDS + 20)
        seconds = time.monotonic() - told
    assert seconds >= SHORT_DRAIN_SECONDS
    assert code == 1
    log = server.log()
    assert f"Timeout {SHORT_DRAIN_SECONDS}: Found 1 HTTP service connections" in log
    assert "Timeout 0: Found 2 live models" in log
    assert "Exit timeout expired. Exiting immediately." in log
    wait_for_stubs(stubs)


# The clients keep the machine busy until the timeout. Every run has one connection that stays open, and SIGTERM under
# load.
@pytest.mark.slow
def test_http_clients_that_never_stop_asking_are_answered_until_the_timeout(
    start: Callable[[int], tuple[TritonServer, list[Question]]],
) -> None:
    server, pool = start(SHORT_DRAIN_SECONDS)
    stubs = stub_processes(server.pid)
    clients = Clients(server, pool, ("http",))
    clients.start()
    told = time.monotonic()
    server.send_signal(signal.SIGTERM)
    # Where a request runs at that moment, tritonserver 2.51 may even end by a fault of its own.
    assert server.wait(SHORT_DRAIN_SECONDS + 20) in (1, -signal.SIGSEGV, -signal.SIGABRT)
    clients.join()
    check_answers(clients.sent, told)
    cut = [each for each in clients.sent if each.error is not None]
    assert len(cut) == CLIENTS
    assert all(each.ended - told >= SHORT_DRAIN_SECONDS for each in cut)
    wait_for_stubs(stubs)


def test_models_end_with_a_server_that_is_killed(
    start: Callable[[int], tuple[TritonServer, list[Question]]],
) -> None:
    server, _ = start(DRAIN_SECONDS)
    stubs = stub_processes(server.pid)
    server.send_signal(signal.SIGKILL)
    assert server.wait(10) == -signal.SIGKILL
    wait_for_stubs(stubs)


def test_models_that_are_unloaded_first_leave_nothing_to_wait_for(
    start: Callable[[int], tuple[TritonServer, list[Question]]],
) -> None:
    """With HTTP connections that nobody closes, this ends clean; requests get a 4xx from then on."""
    from tritonclient.utils import InferenceServerException

    server, pool = start(SHORT_DRAIN_SECONDS)
    stubs = stub_processes(server.pid)
    question = pool[0]
    with http_client(server) as client:
        assert question.fault(ask(client, "http", question.model, question.keyed())) is None
        for model in stubs:
            client.unload_model(model)
        wait_for_stubs(stubs)
        with pytest.raises(InferenceServerException, match="unknown model") as refusal:
            ask(client, "http", question.model, question.keyed())
        assert refusal.value.status() in ("400", "404")
        server.send_signal(signal.SIGTERM)
        assert server.wait(SHORT_DRAIN_SECONDS + 20) == 0, server.log()[-3000:]
    assert server.shared_memory == []
