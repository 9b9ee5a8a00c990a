"""The local server says what is missing; that it serves is shown by tests/triton/test_sample.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_compile.errors import EngineError
from hstu_compile.serving import local_server
from hstu_compile.serving.local_server import Installation, find_installation, launch, make_python, server_environment


def test_without_the_wheel_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"(?s)HSTU-E401.*pip install --no-deps nvidia-pytriton"):
        launch(tmp_path, [])


def test_parts_of_the_wheel_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Spec:
        submodule_search_locations = (str(tmp_path / "pytriton"),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec())
    found = find_installation()
    assert isinstance(found, str)
    assert "not installed whole" in found
    assert f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}/" in found


def test_the_numpy_of_the_backend_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for part in ("bin/tritonserver", "backends/python", f"python_backend_stubs/{version}/triton_python_backend_stub"):
        (root / part).mkdir(parents=True)
    (tmp_path / "nvidia_pytriton.libs").mkdir()

    class Spec:
        submodule_search_locations = (str(tmp_path / "pytriton"),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec())
    monkeypatch.setattr(local_server, "SERVER_NUMPY", tmp_path / "numpy1")
    monkeypatch.setattr(local_server.np, "__version__", "1.26.4")
    assert isinstance(find_installation(), Installation), "this Python's own NumPy is the one that is needed"
    monkeypatch.setattr(local_server.np, "__version__", "2.1.0")
    found = find_installation()
    assert isinstance(found, str)
    assert f"--target {tmp_path / 'numpy1'} 'numpy<2'" in found
    (tmp_path / "numpy1" / "numpy").mkdir(parents=True)
    assert isinstance(find_installation(), Installation)


def test_a_folder_without_launch_sh_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_server, "find_installation", lambda: Installation(*[tmp_path] * 4))
    with pytest.raises(EngineError, match=r"(?s)HSTU-E404.*has no launch.sh.*hstu-compile triton BUNDLE -o"):
        launch(tmp_path, [])


def test_the_servers_python_has_its_numpy_in_front_of_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    numpy = tmp_path / "numpy1" / "numpy"
    numpy.mkdir(parents=True)
    (numpy / "__init__.py").write_text("__version__ = '1.x of the server'\n")
    monkeypatch.setattr(local_server, "SERVER_NUMPY", tmp_path / "numpy1")
    monkeypatch.setattr(local_server.np, "__version__", "2.1.0")
    python = make_python(tmp_path / "python") / "python3"
    code = "import numpy, click, hstu_compile; print(numpy.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1.x of the server"), done.stderr


def test_the_server_finds_what_pythonpath_and_the_loaders_path_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stub ignores the one; the other may be where TensorRT's libraries are."""
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / "only_there.py").write_text("NAME = 'carried'\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "absent"), str(tmp_path / "carried")]))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/runtime/lib")
    python = make_python(tmp_path / "python") / "python3"
    environment = server_environment(Installation(*[tmp_path] * 4), python.parent)
    assert environment["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(tmp_path)
    assert environment["LD_LIBRARY_PATH"].endswith(f"{os.pathsep}/opt/runtime/lib")
    del environment["PYTHONPATH"]
    command = [python, "-c", "import only_there; print(only_there.NAME)"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "carried"), done.stderr


def test_the_program_says_how_it_is_used_and_what_it_refuses(tmp_path: Path):
    program = [sys.executable, "-m", "hstu_compile.serving.local_server"]
    used = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (used.returncode, "usage: " in used.stderr) == (1, True)
    refused = subprocess.run([*program, tmp_path], capture_output=True, text=True, check=False)
    assert refused.returncode == EngineError.exit_code
    assert "Traceback" not in refused.stderr
    assert "error[HSTU-E40" in refused.stderr
