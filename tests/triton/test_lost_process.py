"""A request that ends the model's process in tritonserver 2.51: what the server says, and what the guard."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hstu_compile.serving.local_server import Installation
from hstu_compile.serving.samples import Sample
from hstu_compile.serving.settings import LostProcess, RuntimeSettings
from tests.triton.clients import ask
from tests.triton.models import ServedModel, deploy
from tests.triton.processes import is_alive, stub_processes
from tests.triton.raw_http import RawHttp, binary_request, encoded
from tests.triton.server import TritonServer, http_client

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

NAME, PATH = "retrieval", "/v2/models/retrieval/infer"
Start = Callable[..., TritonServer]
SAID = "error: the process of model retrieval has ended; "
#: A server never gets rid of a model whose process is lost, and waits for it in vain.
LOST_SECONDS, DRAIN_SECONDS = 3, 20


@pytest.fixture
def start(triton_installation: Installation, retrieval: ServedModel, tmp_path: Path) -> Iterator[Start]:
    """Starts a server of its own with the retrieval model."""
    started: list[TritonServer] = []

    def begin(lost_process: LostProcess, drain_seconds: int = LOST_SECONDS) -> TritonServer:
        server = TritonServer(triton_installation, tmp_path, arguments=[f"--exit-timeout-secs={drain_seconds}"]).start()
        started.append(server)
        deploy(server, retrieval, NAME, settings=RuntimeSettings(lost_process=lost_process))
        return server

    yield begin
    for server in started:
        server.stop(signal.SIGKILL)


def poisoned(sample: Sample) -> tuple[bytes, dict[str, str]]:
    """2^62 + 1 values of four bytes each: in 64 bits that is four bytes, which the server finds right."""
    head, tail = binary_request(sample)
    (ids,) = (entry for entry in head["inputs"] if entry["name"] == "item_ids")
    assert ids["shape"] == [1, 1]
    ids["shape"] = [1, 2**62 + 1]
    return encoded(head, tail)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_shape_that_overflows_ends_the_process_and_the_log_says_so(start: Start, retrieval: ServedModel) -> None:
    """If the first assertion fails, the server has learnt to count: take the entry out of docs/pitfalls.md."""
    server = start("report")
    (sample,) = retrieval.samples(1)
    raw = RawHttp(server)
    status, text, _ = raw.post(PATH, *poisoned(sample))
    assert (status, b"is not healthy" in text) == (500, True), text
    assert wait_for(lambda: SAID + "the server goes on without it" in server.log()), server.log()[-2000:]
    # The server does not know: it refuses every good request, and calls the model ready.
    assert raw.post(PATH, *encoded(*binary_request(sample)))[0] == 500
    raw.close()
    with http_client(server) as client:
        assert client.is_server_ready()
        assert client.is_model_ready(NAME)
        # Loaded again it answers.
        client.load_model(NAME)
        retrieval.check(ask(client, "http", NAME, sample), sample)


def test_a_server_that_shall_not_live_without_the_model_ends_with_an_error(
    start: Start, retrieval: ServedModel
) -> None:
    server = start("stop_server")
    (sample,) = retrieval.samples(1)
    raw = RawHttp(server)
    assert raw.post(PATH, *poisoned(sample))[0] == 500
    raw.close()
    assert server.wait(LOST_SECONDS + 20) != 0
    assert SAID + "the server is told to end" in server.log()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_by_itself_is_no_lost_process(start: Start, how: signal.Signals) -> None:
    server = start("stop_server", DRAIN_SECONDS)
    stubs = stub_processes(server.pid)
    server.send_signal(how)
    assert server.wait(DRAIN_SECONDS + 20) == (0 if how == signal.SIGTERM else -signal.SIGKILL)
    assert wait_for(lambda: not any(map(is_alive, stubs.values())))
    # The guard has had the time to say something.
    time.sleep(0.5)
    assert SAID not in server.log()


def test_a_process_that_is_killed_is_reported_and_an_unloaded_model_is_not(
    start: Start,
) -> None:
    server = start("report")
    with http_client(server) as client:
        client.unload_model(NAME)
        assert wait_for(lambda: not stub_processes(server.pid))
        time.sleep(0.5)
        assert SAID not in server.log()
        client.load_model(NAME)
    os.kill(stub_processes(server.pid)[NAME], signal.SIGKILL)
    assert wait_for(lambda: SAID in server.log())
