"""The loader's program and its fakes, for TensorRT 8 and 10, compiled once per session."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hstu_compile.errors import PluginError
from hstu_compile.plugin_library import KERNELS_LIBRARY, find_tensorrt_headers
from tests.cpp_loader import toolchain
from tests.cpp_loader.fake_bundle import write_bundle
from tests.cpp_loader.fake_fused import write_fused_bundle
from tests.cpp_loader.rtx_headers import headers_version, write_rtx_headers
from tests.plugins.conformance.libraries import headers_of_major

#: Sanitizers keep freed memory back and know no leak of a fake: what grows is not the program's.
SANITIZER = {"ASAN_OPTIONS": "quarantine_size_mb=1:detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


@dataclasses.dataclass(frozen=True)
class Loader:
    """hstu_score for one TensorRT, beside fakes of that TensorRT and of CUDA.

    Attributes:
        folder: of the program and the fakes.
        version: of the headers.
    """

    folder: Path
    version: tuple[int, int, int]

    @property
    def program(self) -> Path:
        return self.folder / "hstu_score"

    def run(self, *words: object, fakes: bool = True, **variables: object) -> subprocess.CompletedProcess[str]:
        """Run the program; `variables` are of the environment."""
        environment = {**os.environ, **SANITIZER, **{name: str(value) for name, value in variables.items()}}
        environment["LD_LIBRARY_PATH"] = str(self.folder) if fakes else ""
        command = [str(self.program), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)

    def report(self, *words: object, code: int = 0, **variables: object) -> dict[str, Any]:
        """Run with --json; the report of a run that must end with `code`."""
        done = self.run(*words, "--json", **variables)
        assert done.returncode == code, done.stdout + done.stderr
        content: dict[str, Any] = json.loads(done.stdout)
        return content

    def refusal(self, code: int, *words: object, **variables: object) -> str:
        """Run what must be refused with `code`; what it says, which names a cause and a fix."""
        done = self.run(*words, **variables)
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stderr.startswith("error["), done.stderr
        assert "\n  Why: " in done.stderr
        assert "\n  Fix: " in done.stderr
        return done.stderr

    def bundle(self, folder: Path, family: str, *, plugin: bool = True) -> Path:
        """A bundle for this TensorRT."""
        if self.version[0] < 8:
            return write_fused_bundle(folder / f"{family}.hstu", family, self.version, self.folder / KERNELS_LIBRARY)
        library = self.folder / "libfake_plugin.so" if plugin else None
        return write_bundle(folder / f"{family}.hstu", family, self.version, library)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test of a session compiles, in half a minute, or several on a machine that others use as well."""
    for item in items:
        if item.path.is_relative_to(toolchain.HERE):
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session", autouse=True)
def _compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")


def cache_of(config: pytest.Config) -> Path:
    """A folder that outlives the run; what is compiled is found there by its content."""
    assert config.cache is not None
    return config.cache.mkdir("hstu-cpp-loader")


def _loader(config: pytest.Config, include_dir: Path, options: Sequence[str]) -> Loader:
    def build(folder: Path) -> None:
        toolchain.build_fakes(folder, include_dir, *options)
        toolchain.build_program(folder, include_dir, *options)

    folder = toolchain.built(cache_of(config), include_dir, ["loader", *options], build)
    return Loader(folder, headers_version(include_dir))


@pytest.fixture(scope="session")
def loader8(request: pytest.FixtureRequest) -> Loader:
    return _loader(request.config, headers_of_major(8), ("-O0",))


@pytest.fixture(scope="session")
def headers10() -> Path:
    try:
        headers = find_tensorrt_headers()
    except PluginError as error:
        pytest.skip(f"no TensorRT headers: {error.why}")
    if headers.version[0] < 10:
        pytest.skip(f"no TensorRT 10 headers, found {headers}")
    return headers.include_dir


@pytest.fixture(scope="session")
def loader10(request: pytest.FixtureRequest, headers10: Path) -> Loader:
    """With the address and undefined-behaviour sanitizers."""
    return _loader(request.config, headers10, (*toolchain.SANITIZE, "-O0"))


@pytest.fixture(scope="session")
def headers_rtx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Headers of TensorRT-RTX where HSTU_TEST_TENSORRT_RTX_INCLUDE_DIR names them, else headers like them."""
    if named := os.environ.get("HSTU_TEST_TENSORRT_RTX_INCLUDE_DIR"):
        return Path(named)
    # A fixed place: what is compiled is found again by it.
    folder: Path = cache_of(request.config) / "rtx-headers"
    return write_rtx_headers(folder, request.getfixturevalue("headers10"))


@pytest.fixture(scope="session", params=["plain", pytest.param("sanitized", marks=pytest.mark.slow)])
def loader_rtx(request: pytest.FixtureRequest, headers_rtx: Path) -> Loader:
    """For TensorRT-RTX, without and with all checks of the sanitizers; its bundles are in segments."""
    checks = (*toolchain.SANITIZE, *toolchain.SANITIZE_POINTERS) if request.param == "sanitized" else ()
    return _loader(request.config, headers_rtx, (*checks, "-O0"))


@pytest.fixture(scope="session")
def fakes10(request: pytest.FixtureRequest, headers10: Path) -> Path:
    """Fakes without sanitizers, for programs that have none."""
    cache = cache_of(request.config)
    return toolchain.built(cache, headers10, ["fakes"], lambda folder: toolchain.build_fakes(folder, headers10, "-O0"))


@pytest.fixture(scope="session")
def readers(request: pytest.FixtureRequest, headers10: Path) -> Path:
    cache = cache_of(request.config)
    folder = toolchain.built(cache, headers10, ["readers"], lambda made: toolchain.build_readers(made, headers10))
    return folder / "readers"


@pytest.fixture(params=["loader8", "loader10"])
def loader(request: pytest.FixtureRequest) -> Loader:
    found: Loader = request.getfixturevalue(request.param)
    return found
