"""Try a model repository without a container: the tritonserver of the nvidia-pytriton wheel. Level 5; no torch.

    python -m hstu_compile.serving.local_server REPOSITORY [options of tritonserver]

The wheel is used as a box of binaries: tritonserver, the Python backend and a stub process for each version of Python.
Its Python code is not imported, so its own requirements are not needed. It has no TensorRT backend.

Its stubs are built against NumPy 1: under NumPy 2 every tensor holds its first value as often as it is long. They embed
the Python of the environment whose `bin` is first on PATH, and ignore PYTHONPATH. So the server gets an environment of
its own, made of NumPy 1 and, behind it, what is on PYTHONPATH and everything that this environment has.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hstu_compile.errors import EngineError, HstuCompileError

#: Where `make env` installs the NumPy that the Python backend needs, if this Python has a newer one.
SERVER_NUMPY = Path(sys.prefix) / "triton-numpy"
_LAUNCHER = "launch.sh"


@dataclasses.dataclass(frozen=True)
class Installation:
    """What of the wheel a server needs.

    Attributes:
        binary: tritonserver.
        backend: folder of the Python backend.
        stub: the process that embeds a Python of this interpreter's version.
        libraries: shared libraries of all of them.
    """

    binary: Path
    backend: Path
    stub: Path
    libraries: Path


def find_installation() -> Installation | str:
    """The installed server, or what is missing for one."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return "tritonserver is not installed: pip install --no-deps nvidia-pytriton==0.7.0 (`make env` does it)"
    root = Path(spec.submodule_search_locations[0]) / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = Installation(
        root / "bin" / "tritonserver",
        root / "backends" / "python",
        root / "python_backend_stubs" / version / "triton_python_backend_stub",
        root.parent.parent / "nvidia_pytriton.libs",
    )
    if lacking := [str(path) for path in dataclasses.astuple(found) if not path.exists()]:
        return f"tritonserver is not installed whole: no {', '.join(lacking)}"
    if _numpy_is_too_new() and not (SERVER_NUMPY / "numpy").is_dir():
        return (
            "NumPy 1 for tritonserver's Python backend is not installed: pip install --no-deps --target "
            f"{SERVER_NUMPY} 'numpy<2' (`make env` does it)"
        )
    return found


def _numpy_is_too_new() -> bool:
    return int(np.__version__.partition(".")[0]) > 1


def copy_backend(found: Installation, folder: Path) -> Path:
    """A backend directory in `folder` whose Python backend has the stub of this interpreter's version."""
    target = folder / "backends" / "python"
    shutil.copytree(found.backend, target, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(found.stub, target)
    return target.parent


def make_python(folder: Path) -> Path:
    """An environment of this interpreter with NumPy 1 in front of what it finds here; returns its `bin`."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").symlink_to(Path(sys.base_prefix) / "bin" / version)
    (folder / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n", encoding="utf-8")
    folders = [SERVER_NUMPY] if _numpy_is_too_new() else []
    folders += [Path(each).absolute() for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    # addsitedir reads the .pth files there as well: hstu_compile may be an editable installation.
    installed = sysconfig.get_path("purelib")
    lines = [*map(str, folders), f"import site; site.addsitedir({installed!r})", ""]
    (packages / "server.pth").write_text("\n".join(lines), encoding="utf-8")
    return folder / "bin"


def server_environment(found: Installation, python_bin: Path) -> dict[str, str]:
    """Environment variables of a server whose Python backend uses that Python."""
    environment = dict(os.environ)
    # The stub is linked to libpython, which need not be where the loader looks; a runtime's libraries may be there.
    places = [str(found.libraries), sysconfig.get_config_var("LIBDIR"), environment.get("LD_LIBRARY_PATH")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, places))
    environment["PATH"] = f"{python_bin}:{environment.get('PATH', '')}"
    return environment


def launch(repository: Path, arguments: Sequence[str]) -> int:
    """Run the repository's launch.sh with a tritonserver on PATH, until it ends or this process is told to.

    The server listens on loopback unless the arguments say otherwise.

    Returns:
        The server's exit code.

    Raises:
        EngineError: HSTU-E401 without a server, HSTU-E404 without a launch.sh.
    """
    found = find_installation()
    if isinstance(found, str):
        raise EngineError("HSTU-E401", "there is no tritonserver", found, "install it, or use a Triton container")
    launcher = repository / _LAUNCHER
    if not launcher.is_file():
        raise EngineError(
            "HSTU-E404",
            f"{repository} is no model repository of ours",
            f"it has no {_LAUNCHER}",
            f"hstu-compile triton BUNDLE -o {repository}",
        )
    with tempfile.TemporaryDirectory(prefix="hstu-triton-") as name:
        folder = Path(name)
        python_bin = make_python(folder / "python")
        command = shlex.join([str(found.binary), f"--backend-directory={copy_backend(found, folder)}"])
        program = python_bin / "tritonserver"
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        loopback = [f"--{service}-address=127.0.0.1" for service in ("http", "grpc", "metrics")]
        server = subprocess.Popen(
            ["bash", str(launcher), *loopback, *arguments], env=server_environment(found, python_bin)
        )
        # The folder must outlive the server: both ways to end this one wait for that one.
        signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        try:
            return server.wait()
        except KeyboardInterrupt:
            return server.wait()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m hstu_compile.serving.local_server REPOSITORY [options of tritonserver]")
    try:
        sys.exit(launch(Path(sys.argv[1]), sys.argv[2:]))
    except HstuCompileError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a program's message
        sys.exit(error.exit_code)
