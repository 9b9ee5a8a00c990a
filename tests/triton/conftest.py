"""One real server for all tests of this folder; models are loaded into it by the tests that ask them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hstu_compile.serving.local_server import Installation, find_installation
from tests.triton.models import ServedModel, build_ranking, build_retrieval
from tests.triton.server import TritonServer


@pytest.fixture(scope="session")
def triton_installation() -> Installation:
    """The installed binaries; skips by name without them."""
    found = find_installation()
    if isinstance(found, str):
        pytest.skip(found)
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed (extra triton-client)")
    return found


def built_once(
    name: str, build: Callable[[Path], ServedModel], tmp_path_factory: pytest.TempPathFactory
) -> ServedModel:
    """What `build` makes in a folder that all worker processes of this run share: the first makes it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / f"triton-{name}"
    with (root / f"triton-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        return build(folder)


@pytest.fixture(scope="session")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A retrieval bundle, built once per run."""
    return built_once("retrieval", build_retrieval, tmp_path_factory)


@pytest.fixture(scope="session")
def ranking(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A ranking bundle, built once per run."""
    return built_once("ranking", build_ranking, tmp_path_factory)


@pytest.fixture(scope="session")
def triton_server(
    triton_installation: Installation, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A running server without models: put a model into `repository`, then `load` it."""
    with TritonServer(triton_installation, tmp_path_factory.mktemp("triton")) as server:
        yield server
