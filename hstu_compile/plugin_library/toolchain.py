"""Finds and runs the tools that make a library of kernels that are compiled."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hstu_compile.errors import InternalError, PluginError

_LOG_LINES = 40


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """Programs by their paths, and CMake's name of the generator that goes with `make_program`."""

    cmake: str
    compiler: str
    generator: str
    make_program: str


def find_toolchain() -> Toolchain:
    """Find CMake, a C++ compiler and ninja or make; CMake and ninja also beside this Python, where pip puts them.

    Raises:
        PluginError: HSTU-E501 naming every tool that is missing.
    """
    beside = str(Path(sys.executable).parent)
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), beside])

    def find(*names: str) -> str | None:
        return next((path for path in (shutil.which(name, path=search) for name in names) if path), None)

    cmake, compiler = find("cmake"), find(*filter(None, [os.environ.get("CXX"), "g++", "c++"]))
    ninja, make = find("ninja"), find("make")
    missing = [
        name for name, found in (("cmake", cmake), ("g++", compiler), ("ninja or make", ninja or make)) if found is None
    ]
    if cmake is None or compiler is None or (ninja is None and make is None):
        raise PluginError(
            "HSTU-E501",
            "the library cannot be built here",
            f"not found on PATH or beside {sys.executable}: {', '.join(missing)}",
            "pip install 'hstu-compile[plugin]' for CMake and ninja, and install g++ from the system's packages",
            {"missing": missing},
        )
    return Toolchain(cmake, compiler, "Ninja" if ninja else "Unix Makefiles", ninja or make or "")


def source_dir() -> Path:
    """Return the folder of the libraries' sources."""
    spec = importlib.util.find_spec("hstu_compile.plugins")
    if spec is None or spec.origin is None:
        raise InternalError("the package hstu_compile.plugins was installed without its sources")
    return Path(spec.origin).parent


def triton_version() -> str:
    """Return Triton's version.

    Raises:
        PluginError: HSTU-E501 if it is not installed.
    """
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as error:
        raise PluginError(
            "HSTU-E501",
            "the kernels cannot be compiled here",
            "the package triton, which compiles them, is not installed",
            "pip install 'hstu-compile[plugin]', or build on another machine and copy the library: it needs no GPU",
        ) from error


def run_tool(command: Sequence[str], tool: str) -> None:
    """Run a build tool; its output is only shown when it fails.

    Args:
        command: program and arguments.
        tool: its name in the message.

    Raises:
        PluginError: HSTU-E501 with the end of the output if it fails.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-_LOG_LINES:])
        raise PluginError(
            "HSTU-E501",
            f"{tool} failed on the library",
            f"exit code {done.returncode}; the end of its output:\n{tail}",
            "check that the TensorRT and CUDA headers belong to releases; the full command is in the context",
            {"command": list(command)},
        )
