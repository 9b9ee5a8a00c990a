"""launch.sh refuses what tritonserver would only log, and passes on the rest."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hstu_compile.serving.repository import RepositoryRequest, write_repository
from tests.triton_bundles import write_bundle

GCC = shutil.which("gcc")
SOURCES = {
    "good": "int hstu_loaded(void) { return 1; }",
    "other": "int hstu_loaded(void) { return 2; }",
    # What a plugin built for another TensorRT is: a symbol that no library of this machine has.
    "bad": "void absent_symbol(void); void hstu_loaded(void) { absent_symbol(); }",
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Shared objects that can and cannot be loaded."""
    if GCC is None:
        pytest.skip("gcc is not installed")
    folder = tmp_path_factory.mktemp("libraries")
    found = {}
    for name, source in SOURCES.items():
        (folder / f"{name}.c").write_text(source)
        command = [GCC, "-shared", "-fPIC", "-o", folder / name, folder / f"{name}.c"]
        subprocess.run(command, check=True)
        found[name] = (folder / name).read_bytes()
    found["text"] = b"not a library"
    return found


def add_model(repository: Path, name: str, plugin: bytes | None = None, engine: str | None = "tensorrt") -> Path:
    bundle = write_bundle(repository.parent / f"{name}.hstu", engine=engine, plugin=plugin)
    write_repository(RepositoryRequest(bundle, repository, "tensorrt", name, checked=False))
    return repository / name


def launch(repository: Path, *arguments: str, server: bool = True) -> subprocess.CompletedProcess[str]:
    """Run launch.sh beside a tritonserver that prints what it is given, one argument a line."""
    programs = repository.parent / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / "tritonserver"
    if server:
        program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        program.chmod(0o755)
    else:
        program.unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin"}
    return subprocess.run(
        [repository / "launch.sh", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_plugins_of_all_models_are_given_to_the_server_once_each(tmp_path: Path, libraries: dict[str, bytes]):
    repository = tmp_path / "models"
    for name, library in (("a", "good"), ("b", "good"), ("c", "other")):
        add_model(repository, name, libraries[library])
    done = launch(repository, "--http-port=9000")
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            f"--model-repository={repository}",
            f"--backend-config=tensorrt,plugins={repository}/a/libhstu_trt_plugin.so;{repository}/c/libhstu_trt_plugin.so",
            "--http-port=9000",
        ],
    )


def test_a_repository_without_plugins_is_started_without_them(tmp_path: Path):
    repository = tmp_path / "models"
    bundle = write_bundle(tmp_path / "a.hstu")
    write_repository(RepositoryRequest(bundle, repository))
    (repository / "someone_elses").mkdir()
    done = launch(repository)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"--model-repository={repository}"])


@pytest.mark.parametrize(("library", "said"), [("bad", "absent_symbol"), ("text", "invalid ELF header|file too short")])
def test_a_plugin_that_cannot_be_loaded_stops_the_start(
    tmp_path: Path, libraries: dict[str, bytes], library: str, said: str
):
    repository = tmp_path / "models"
    add_model(repository, "a", libraries[library])
    done = launch(repository)
    assert (done.returncode, done.stdout) == (5, "")
    assert "error[HSTU-E504] launch:" in done.stderr
    assert any(part in done.stderr for part in said.split("|"))
    assert "hstu-compile plugin build" in done.stderr


def test_an_altered_plugin_is_refused_before_it_is_loaded(tmp_path: Path, libraries: dict[str, bytes]):
    repository = tmp_path / "models"
    library = add_model(repository, "a", libraries["good"]) / "libhstu_trt_plugin.so"
    library.write_bytes(libraries["other"])
    done = launch(repository)
    assert (done.returncode, done.stdout) == (8, "")
    assert "error[HSTU-E803] launch:" in done.stderr
    assert "libhstu_trt_plugin.so: FAILED" in done.stderr


def test_an_edited_configuration_is_no_damage(tmp_path: Path):
    repository = tmp_path / "models"
    config = add_model(repository, "a") / "config.pbtxt"
    config.write_text(config.read_text() + "# edited\n")
    assert launch(repository).returncode == 0


def test_a_model_without_an_engine_says_how_to_build_one(tmp_path: Path):
    repository = tmp_path / "models"
    add_model(repository, "a", engine=None)
    done = launch(repository)
    assert done.returncode == 5
    assert "error[HSTU-E404] launch:" in done.stderr
    assert f"hstu-compile engine {repository}/a/model.onnx -o {repository}/a/1/model.plan" in done.stderr


def test_a_path_that_the_server_would_split_is_refused(tmp_path: Path, libraries: dict[str, bytes]):
    repository = tmp_path / "my models"
    add_model(repository, "a", libraries["good"])
    done = launch(repository)
    assert done.returncode == 5
    assert "which separate libraries" in done.stderr


def test_a_checked_engine_is_started_as_three_models_and_needs_all_of_them(tmp_path: Path, libraries: dict[str, bytes]):
    repository = tmp_path / "models"
    bundle = write_bundle(tmp_path / "a.hstu", engine="tensorrt", plugin=libraries["good"])
    write_repository(RepositoryRequest(bundle, repository))
    done = launch(repository)
    assert (done.returncode, done.stdout.splitlines()[1:]) == (
        0,
        [f"--backend-config=tensorrt,plugins={repository}/a_engine/libhstu_trt_plugin.so"],
    )
    shutil.rmtree(repository / "a_check")
    done = launch(repository)
    assert (done.returncode, done.stdout) == (8, "")
    assert "error[HSTU-E803] launch:" in done.stderr
    assert "it asks a_check, which is missing" in done.stderr


def test_no_server_is_said(tmp_path: Path):
    repository = tmp_path / "models"
    add_model(repository, "a")
    done = launch(repository, server=False)
    assert done.returncode == 5
    assert "error[HSTU-E401] launch: there is no tritonserver" in done.stderr
