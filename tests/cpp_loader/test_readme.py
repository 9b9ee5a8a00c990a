"""The sample's README: its commands are run as typed, its exit codes are the program's."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from hstu_compile.plugin_library import find_cuda_headers
from tests.cpp_loader import toolchain
from tests.cpp_loader.conftest import Loader
from tests.cpp_loader.rtx_headers import headers_version

README = (toolchain.SAMPLE / "README.md").read_text("utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


# The warnings of an optimising compiler, which are errors, take twice the time.
@pytest.mark.parametrize("build_type", ["Debug", pytest.param("", marks=pytest.mark.slow, id="default")])
def test_the_commands_run_as_typed(tmp_path: Path, headers10: Path, fakes10: Path, build_type: str) -> None:
    """In a folder that looks like the repository; libnvinfer and the driver are fakes, the bundles theirs."""
    (tmp_path / "samples").mkdir()
    shutil.copytree(toolchain.SAMPLE, tmp_path / "samples" / "cpp_loader")
    (tmp_path / "plugins").mkdir()
    shutil.copytree(toolchain.KERNELS_API, tmp_path / "plugins" / "api")
    plain = Loader(fakes10, headers_version(headers10))
    for name, family in (("readme", "retrieval"), ("ranking", "ranking")):
        plain.bundle(tmp_path / name, family).rename(tmp_path / f"{name}.hstu")
        (tmp_path / "build").mkdir(exist_ok=True)
        (tmp_path / f"{name}.hstu").rename(tmp_path / "build" / f"{name}.hstu")
    environment = {**os.environ, "TENSORRT_INCLUDE_DIR": str(headers10), "LD_LIBRARY_PATH": str(fakes10)}
    environment["CUDA_HOME"] = str(find_cuda_headers().parent)
    # What CMake takes unless a command says otherwise.
    environment["CMAKE_BUILD_TYPE"] = build_type
    assert len(commands()) == 6
    for command in commands():
        words = shlex.split(command)
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip()
    assert len((tmp_path / "build" / "cpp_loader" / "rows.csv").read_text().splitlines()) == 1 + 4


def test_exit_codes_are_those_of_the_program(loader10: Loader) -> None:
    header = (toolchain.SAMPLE / "include" / "hstu" / "error.hpp").read_text("utf-8")
    codes = {int(code) for code in re.findall(r"^    k[A-Z_]+ = (\d+),", header, re.MULTILINE)}
    stated = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert stated == codes | {0}
    usage = loader10.run("--help").stdout.partition("exit codes:")[2]
    assert {int(code) for code in re.findall(r"\b(\d+) [a-zT]", usage)} == stated


def test_every_option_of_the_readme_exists(loader10: Loader) -> None:
    usage = loader10.run("--help").stdout
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", "\n".join([*commands(), *re.findall(r"`([^`]+)`", README)])))
    ours = {option for option in named if option not in ("--attention", "--backend", "--build")}
    assert ours, "the README names no option"
    assert [option for option in sorted(ours) if option not in usage and option != "--help"] == []


def test_every_header_is_in_the_table_and_in_the_umbrella() -> None:
    headers = {path.name for path in (toolchain.SAMPLE / "include" / "hstu").glob("*.hpp")}
    umbrella = (toolchain.SAMPLE / "include" / "hstu_bundle.hpp").read_text("utf-8")
    assert set(re.findall(r'#include "hstu/(\w+\.hpp)"', umbrella)) == headers
    assert set(re.findall(r"`(\w+\.hpp)`", README)) - {"hstu_bundle.hpp"} == headers - {"error.hpp"}
