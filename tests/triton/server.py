"""A real tritonserver on loopback, of the nvidia-pytriton wheel: see hstu_compile.serving.local_server."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hstu_compile.serving.local_server import Installation, copy_backend, make_python, server_environment

START_SECONDS = 60.0
#: What the server itself waits for requests and models when it is told to stop.
DRAIN_SECONDS = 10
_SHARED_MEMORY = Path("/dev/shm")
_BIND_FAILURES = ("failed to start HTTP service", "failed to start GRPC service", "Socket '")


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class TritonServer:
    """A tritonserver process over a folder of models, which are loaded one by one by its repository API.

    Args:
        found: the binaries.
        folder: a new folder for the model repository, the backends and the log.
        arguments: further options of the command line.
        environment: further environment variables.
        explicit: load nothing at the start; `load` loads a model. False loads the whole repository.

    Attributes:
        repository: the model repository; copy models into it at any time.
        log_file: what the server and the models print.
    """

    def __init__(
        self,
        found: Installation,
        folder: Path,
        *,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        explicit: bool = True,
    ) -> None:
        self._found, self._folder, self._arguments = found, folder, tuple(arguments)
        self._more_environment, self._explicit = dict(environment or {}), explicit
        self.repository, self.log_file = folder / "repository", folder / "tritonserver.log"
        self.repository.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self.http_port = self.grpc_port = self.metrics_port = 0
        self._region = f"hstu_test_{secrets.token_hex(6)}"

    @property
    def shared_memory(self) -> list[Path]:
        """What the Python backend has in shared memory: one region for each model that is loaded."""
        return sorted(_SHARED_MEMORY.glob(f"{self._region}*"))

    @property
    def http_url(self) -> str:
        """Host and port, as tritonclient takes it."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Host and port, as tritonclient takes it."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Everything that was printed so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def start(self) -> TritonServer:
        """Start and wait until the server is ready.

        Raises:
            RuntimeError: with the end of the log, if it ends or does not become ready.
        """
        python = self._folder / "python"
        if not (self._folder / "backends").exists():
            copy_backend(self._found, self._folder)
            make_python(python)
        self._environment = server_environment(self._found, python / "bin") | self._more_environment
        for attempt in range(3):
            self._launch()
            try:
                self._wait_until_ready()
                return self
            except RuntimeError:
                self.stop()
                # Another process may have taken a port between the probe and the server's own bind.
                if attempt == 2 or not any(text in self.log() for text in _BIND_FAILURES):
                    raise
        raise AssertionError("unreachable")

    def command(self) -> list[str]:
        """What `start` runs."""
        return [str(self._found.binary), f"--model-repository={self.repository}", *self.options()]

    def options(self) -> list[str]:
        """Of the command line, without the repository."""
        return [
            f"--backend-directory={self._folder / 'backends'}",
            *(["--model-control-mode=explicit"] if self._explicit else []),
            *("--http-address=127.0.0.1", f"--http-port={self.http_port}"),
            *("--grpc-address=127.0.0.1", f"--grpc-port={self.grpc_port}"),
            *("--metrics-address=127.0.0.1", f"--metrics-port={self.metrics_port}"),
            f"--exit-timeout-secs={DRAIN_SECONDS}",
            f"--backend-config=python,shm-region-prefix-name={self._region}",
            *self._arguments,
        ]

    def _launch(self) -> None:
        self.http_port, self.grpc_port, self.metrics_port = free_port(), free_port(), free_port()
        with self.log_file.open("wb") as log:
            # A session of its own: what is left of it can be ended together, and Ctrl-C reaches pytest alone.
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"tritonserver ended with {self._process.returncode}:\n{self.log()[-4000:]}")
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://{self.http_url}/v2/health/ready", timeout=2) as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"tritonserver was not ready after {START_SECONDS:.0f} s:\n{self.log()[-4000:]}")

    def load(self, model: str) -> None:
        """Load a model of the repository, and wait until it serves.

        Raises:
            tritonclient.utils.InferenceServerException: with the server's message, if it cannot be loaded.
        """
        with http_client(self) as client:
            client.load_model(model)

    def send_signal(self, sig: int) -> None:
        """To the server's own process; `wait` tells how it ends."""
        assert self._process is not None
        self._process.send_signal(sig)

    def wait(self, seconds: float) -> int:
        """The exit code of a server that was told to end; what it started is left alone.

        Raises:
            subprocess.TimeoutExpired: if it still runs.
        """
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """End the server and every process that it started; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DRAIN_SECONDS + 20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        # A server that does not end by itself leaves it behind.
        for region in self.shared_memory:
            region.unlink(missing_ok=True)
        return code

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


@contextlib.contextmanager
def http_client(server: TritonServer, concurrency: int = 1) -> Iterator[Any]:
    """A tritonclient over HTTP with so many connections."""
    from tritonclient.http import InferenceServerClient

    client = InferenceServerClient(server.http_url, concurrency=concurrency)
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def grpc_client(server: TritonServer) -> Iterator[Any]:
    """A tritonclient over gRPC."""
    from tritonclient.grpc import InferenceServerClient

    client = InferenceServerClient(server.grpc_url)
    try:
        yield client
    finally:
        client.close()


def execution_counts(server: TritonServer, model: str) -> tuple[int, int]:
    """(requests answered, passes of the model) since it was loaded."""
    with http_client(server) as client:
        (stats,) = client.get_inference_statistics(model)["model_stats"]
    return int(stats["inference_count"]), int(stats["execution_count"])
