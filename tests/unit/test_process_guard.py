"""The shell that notices that a model's process is gone, with processes of our own in the places of server and stub."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

STUB = """
import os, sys
from hstu_compile.serving.process_guard import ProcessGuard
guard = ProcessGuard("ranking", int(sys.argv[1]), sys.argv[2] == "stop")
if sys.argv[3] == "unload":
    guard.release()
    sys.exit()
print("watched", flush=True)
if sys.argv[3] == "hang":
    import time
    time.sleep(60)
sys.stdin.readline()
os.abort()
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def start_stub(server: int, stop: str, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STUB, str(server), stop, how]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def end_of(stub: subprocess.Popen[str]) -> str:
    """Let it end; what it and its guard print. Both hold standard error: reading to its end waits for both."""
    return stub.communicate("\n", timeout=60)[1]


def test_a_process_that_aborts_is_reported_and_the_server_goes_on(server: subprocess.Popen[bytes]) -> None:
    said = end_of(start_stub(server.pid, "report", "abort"))
    assert "error: the process of model ranking has ended; the server goes on without it" in said
    assert server.poll() is None


def test_the_server_is_told_to_end_where_that_is_wanted(server: subprocess.Popen[bytes]) -> None:
    said = end_of(start_stub(server.pid, "stop", "abort"))
    assert "error: the process of model ranking has ended; the server is told to end" in said
    assert server.wait(10) == -signal.SIGTERM


def test_a_model_that_is_unloaded_is_not_reported(server: subprocess.Popen[bytes]) -> None:
    stub = start_stub(server.pid, "stop", "unload")
    assert "error" not in end_of(stub)
    assert stub.returncode == 0
    assert server.poll() is None


def test_a_process_that_ends_after_its_server_is_not_reported(server: subprocess.Popen[bytes]) -> None:
    stub = start_stub(server.pid, "stop", "abort")
    assert stub.stdout is not None
    assert stub.stdout.readline() == "watched\n"
    server.kill()
    server.wait()
    assert "error: the process" not in end_of(stub)


def test_a_process_that_hangs_is_ended_after_its_server(server: subprocess.Popen[bytes]) -> None:
    stub = start_stub(server.pid, "report", "hang")
    assert stub.stdout is not None
    assert stub.stdout.readline() == "watched\n"
    # Not before: it lives as long as the server does.
    with pytest.raises(subprocess.TimeoutExpired):
        stub.wait(2)
    server.kill()
    server.wait()
    assert stub.wait(30) == -signal.SIGKILL
