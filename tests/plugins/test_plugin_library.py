"""Finding headers, building, caching and loading the plugin libraries."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from hstu_compile.errors import PluginError
from hstu_compile.plugin_library import (
    SELF_REGISTERING,
    VERSION_COMPATIBLE,
    HopperChoice,
    PluginBuildRequest,
    PluginLibrary,
    build_plugin_library,
    build_request,
    building,
    find_cuda_headers,
    find_tensorrt_headers,
    headers,
    load_plugin_library,
    toolchain,
)
from hstu_compile.plugins.kernels.hopper.compile import usable_nvcc
from tests.plugins.conformance.libraries import SMALL_HOPPER, small_library


def write_headers(folder: Path, major: int, minor: int, *, enterprise: bool = False) -> Path:
    """Make a folder that looks like TensorRT's headers: in 10.14 the numbers moved behind other names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("TRT_MAJOR_ENTERPRISE", "TRT_MINOR_ENTERPRISE") if enterprise else ("NV_TENSORRT_MAJOR", "NV_TENSORRT_MINOR")
    )
    lines = [f"#define {name} {value} //!< version" for name, value in zip(names, (major, minor), strict=True)]
    if enterprise:
        lines += ["#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE", "#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE"]
    (folder / "NvInferVersion.h").write_text("\n".join(lines) + "\n#define NV_TENSORRT_PATCH 3\n")
    (folder / "NvInfer.h").write_text("// TensorRT\n")
    return folder


@pytest.fixture
def no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without TensorRT headers of any origin."""
    for name in ("TENSORRT_INCLUDE_DIR", "TENSORRT_ROOT", "TRT_ROOT", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(headers, "_SDK_FOLDERS", ())
    monkeypatch.setattr(headers, "_CUDA_FOLDERS", ())
    monkeypatch.setattr(headers, "_package_folder", lambda *_: None)


@pytest.mark.parametrize("enterprise", [False, True])
def test_the_version_is_read_in_both_spellings(tmp_path: Path, *, enterprise: bool) -> None:
    headers = find_tensorrt_headers(write_headers(tmp_path, 10, 14, enterprise=enterprise))
    assert headers.version == (10, 14, 3)


def test_headers_are_searched_in_the_documented_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_sdk: None
) -> None:
    packaged, sdk = write_headers(tmp_path / "packaged", 10, 14), write_headers(tmp_path / "sdk" / "include", 10, 3)
    named = write_headers(tmp_path / "named", 10, 9)
    monkeypatch.setattr(headers, "_package_folder", lambda *_: packaged)
    assert find_tensorrt_headers().origin == "kernel-lens package"
    monkeypatch.setenv("TENSORRT_ROOT", str(sdk.parent))
    assert find_tensorrt_headers().include_dir == sdk
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(named))
    assert find_tensorrt_headers().include_dir == named
    assert find_tensorrt_headers(packaged).include_dir == packaged


def test_a_named_folder_without_headers_is_an_error_and_no_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(PluginError, match=r"NvInferVersion\.h: No such file") as caught:
        find_tensorrt_headers()
    assert caught.value.code == "HSTU-E501"


def test_no_headers_at_all_names_every_place_and_the_package(no_sdk: None) -> None:
    with pytest.raises(PluginError, match="pip install --no-deps kernel-lens") as caught:
        find_tensorrt_headers()
    assert "TENSORRT_INCLUDE_DIR (not set)" in caught.value.why
    with pytest.raises(PluginError, match=r"cuda_runtime_api\.h"):
        find_cuda_headers()


def test_headers_of_another_major_than_the_runtime_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError) as caught:
        find_tensorrt_headers(write_headers(tmp_path, 10, 14), "11.4.0")
    assert caught.value.code == "HSTU-E502"
    assert "10.14.3" in caught.value.why
    assert "the runtime is 11.4.0" in caught.value.why
    assert "release/11.x" in caught.value.fix


def test_headers_of_another_minor_are_taken(tmp_path: Path) -> None:
    assert find_tensorrt_headers(write_headers(tmp_path, 10, 14), "10.3.0").version[:2] == (10, 14)


@pytest.mark.parametrize(("major", "minor"), [(7, 2), (8, 4), (9, 3), (12, 0)])
def test_unsupported_headers_are_refused(tmp_path: Path, major: int, minor: int) -> None:
    with pytest.raises(PluginError, match=r"supported: 8\.5, 8\.6, 10, 11") as caught:
        find_tensorrt_headers(write_headers(tmp_path, major, minor))
    assert caught.value.code == "HSTU-E502"


class FakeBuild:
    """Stands in for the compilers: writes what they would write, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.fail: BaseException | None = None

    def __call__(self, work: Path, *_: Any) -> None:
        """Write `out` in two steps, failing between them when told to."""
        self.count += 1
        out = work / "out"
        out.mkdir()
        (out / SELF_REGISTERING).write_bytes(b"library")
        if self.fail is not None:
            raise self.fail
        digest = building.file_sha256(out / SELF_REGISTERING)
        (out / "manifest.json").write_text(f'{{"files": {{"{SELF_REGISTERING}": "{digest}"}}}}')


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> FakeBuild:
    fake = FakeBuild()
    monkeypatch.setattr(building, "_build_into", fake)
    monkeypatch.setattr(building, "triton_version", lambda: "3.6.0")
    return fake


@pytest.fixture
def request_(tmp_path: Path, fake_build: FakeBuild) -> PluginBuildRequest:
    headers, cuda = write_headers(tmp_path / "trt", 10, 14), tmp_path / "cuda"
    (cuda / "crt").mkdir(parents=True)
    for name in ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h"):
        (cuda / name).write_text("")
    return PluginBuildRequest(
        tensorrt_include_dir=headers, cuda_include_dir=cuda, runtime_version="10.14", cache_dir=tmp_path / "cache"
    )


def test_the_same_request_is_built_once(request_: PluginBuildRequest, fake_build: FakeBuild) -> None:
    first, second = build_plugin_library(request_), build_plugin_library(request_)
    assert first == second
    assert fake_build.count == 1
    assert first.self_registering.read_bytes() == b"library"
    assert first.version_compatible is None


def test_other_options_or_headers_are_another_library(request_: PluginBuildRequest, fake_build: FakeBuild) -> None:
    first = build_plugin_library(request_)
    assert request_.tensorrt_include_dir is not None
    (request_.tensorrt_include_dir / "NvInferRuntime.h").write_text("// changed\n")
    second = build_plugin_library(request_)
    third = build_plugin_library(PluginBuildRequest(**{**vars(request_), "archs": (90,)}))
    assert len({first.content_hash, second.content_hash, third.content_hash}) == 3
    assert fake_build.count == 3


def test_the_hopper_kernels_and_their_compiler_decide_which_library_it_is(
    request_: PluginBuildRequest, fake_build: FakeBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    def library(choice: HopperChoice, release: tuple[int, int]) -> PluginLibrary:
        monkeypatch.setattr(build_request, "usable_nvcc", lambda: (Path("nvcc"), release))
        return build_plugin_library(PluginBuildRequest(**{**vars(request_), "hopper": choice}))

    auto = library("auto", (13, 0))
    assert library("require", (13, 0)) == auto
    assert fake_build.count == 1
    assert auto.hopper.nvcc == "13.0"
    others = [library("auto", (12, 9)), library("off", (13, 0))]
    assert len({each.content_hash for each in (auto, *others)}) == 3
    assert others[1].hopper.variants == ()


@pytest.mark.timeout(300)  # it may be the first that needs the library, and then waits for nvcc
def test_a_library_tells_of_its_hopper_kernels(request: pytest.FixtureRequest) -> None:
    library = small_library(request.config)
    manifest = json.loads((library.self_registering.parent / "manifest.json").read_text())
    assert manifest["hopper"] == library.hopper.to_dict()
    if library.hopper.nvcc is None:
        with pytest.raises(RuntimeError) as caught:
            usable_nvcc()
        assert library.hopper.variants == ()
        assert library.hopper.note is not None
        assert str(caught.value) in library.hopper.note
        return
    assert manifest["hopper"]["variants"] == [dataclasses.asdict(each) for each in SMALL_HOPPER]
    kernels = {(each["block_dim"], each["shares"], each["has_cache"]) for each in manifest["hopper"]["variants"]}
    assert kernels == {(64, False, False), (64, True, False), (64, False, True)}
    assert b"hstu_attention_sm90" in library.self_registering.read_bytes()


def test_a_damaged_library_is_built_again(request_: PluginBuildRequest, fake_build: FakeBuild) -> None:
    library = build_plugin_library(request_)
    library.self_registering.write_bytes(b"libr")
    assert build_plugin_library(request_).self_registering.read_bytes() == b"library"
    assert fake_build.count == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PluginError("HSTU-E501", "what", "why", "fix")])
def test_an_interrupted_build_leaves_nothing_that_looks_like_a_library(
    request_: PluginBuildRequest, fake_build: FakeBuild, error: BaseException
) -> None:
    fake_build.fail = error
    with pytest.raises(type(error)):
        build_plugin_library(request_)
    assert request_.cache_dir is not None
    assert [p.name for p in (request_.cache_dir / "plugins").iterdir() if p.suffix != ".lock"] == []
    fake_build.fail = None
    assert build_plugin_library(request_).self_registering.exists()


def test_remains_of_a_killed_build_are_cleared_away(request_: PluginBuildRequest, fake_build: FakeBuild) -> None:
    library = build_plugin_library(request_)
    store = library.self_registering.parent
    shutil.rmtree(store)
    remains = store.parent / f".{store.name}.building" / "out"
    remains.mkdir(parents=True)
    (remains / "half").write_bytes(b"")
    assert build_plugin_library(request_).self_registering.read_bytes() == b"library"
    assert not remains.parent.exists()


def test_builds_at_the_same_time_wait_for_one_another(request_: PluginBuildRequest, fake_build: FakeBuild) -> None:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(build_plugin_library(request_))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(set(results)) == 1
    assert fake_build.count == 1


def test_a_cache_that_cannot_be_written_is_a_clear_error(request_: PluginBuildRequest, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(PluginError, match="XDG_CACHE_HOME") as caught:
        build_plugin_library(PluginBuildRequest(**{**vars(request_), "cache_dir": blocked}))
    assert caught.value.code == "HSTU-E501"


def test_missing_tools_are_all_named(
    request_: PluginBuildRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(PluginError, match=r"cmake, g\+\+, ninja or make") as caught:
        build_plugin_library(request_)
    assert caught.value.code == "HSTU-E501"


def test_a_compiler_error_is_shown(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="no such option") as caught:
        toolchain.run_tool([sys.executable, "-c", "raise SystemExit('no such option')"], "CMake")
    assert caught.value.code == "HSTU-E501"


def test_a_result_without_all_kernels_is_refused(
    request_: PluginBuildRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(building, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr("hstu_compile.plugins.kernels.aot.compile_variants", lambda *_, **__: [])
    without_norms = PluginBuildRequest(**{**vars(request_), "norm_variants": ()})  # they would be compiled, for seconds
    with pytest.raises(PluginError, match="kernels are missing from the result"):
        build_plugin_library(without_norms)


def test_a_missing_library_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="cannot open shared object file") as caught:
        load_plugin_library(tmp_path / "libnone.so")
    assert caught.value.code == "HSTU-E504"


def test_a_library_without_its_tensorrt_says_which_one_is_missing(request: pytest.FixtureRequest) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here: the library loads")
    with pytest.raises(PluginError, match=r"libnvinfer\.so\.\d+: cannot open shared object file") as caught:
        load_plugin_library(small_library(request.config).self_registering)
    assert caught.value.code == "HSTU-E504"
    assert "LD_LIBRARY_PATH" in caught.value.fix


def test_importing_the_module_imports_no_framework() -> None:
    code = "import sys, hstu_compile.plugin_library; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hstu_compile.plugin_library" in done.stdout.split()
    assert {"torch", "triton", "tensorrt"} & set(done.stdout.split()) == set()


def exported(library: Path) -> list[str]:
    """Return the names of the symbols that a library defines for others."""
    lines = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return sorted(line.split()[-1] for line in lines.splitlines())


def needed(library: Path) -> list[str]:
    """Return the libraries that a library is linked to."""
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"NEEDED.*\[(.*)\]", text)


def test_the_libraries_export_and_need_exactly_what_is_intended(request: pytest.FixtureRequest) -> None:
    library = small_library(request.config)
    major = library.trt_version.split(".")[0]
    entry = "getCreators" if int(major) >= 10 else "getPluginCreators"
    assert library.version_compatible is not None
    assert library.version_compatible.name == VERSION_COMPATIBLE
    assert exported(library.self_registering) == []
    assert exported(library.version_compatible) == [entry, "setLoggerFinder"]
    assert f"libnvinfer.so.{major}" in needed(library.self_registering)
    system = r"(libc|libm|libdl|libpthread|ld-linux-.*)\.so\.\d+"
    others = {*needed(library.self_registering), *needed(library.version_compatible)} - {f"libnvinfer.so.{major}"}
    assert [name for name in others if not re.fullmatch(system, name)] == []


def test_the_libraries_name_no_path_of_the_machine_that_built_them(request: pytest.FixtureRequest) -> None:
    library = small_library(request.config)
    content = library.self_registering.read_bytes()
    for folder in {str(Path.home()), str(library.self_registering.parent), str(Path(building.__file__).parents[1])}:
        assert folder == "/" or folder.encode() not in content


def test_both_adapters_compile_without_a_warning_against_the_headers(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    library = small_library(request.config)
    if int(library.trt_version.split(".")[0]) < 10:
        pytest.skip("the headers found are TensorRT 8's: they have no IPluginV3")
    source, build = toolchain.source_dir(), tmp_path / "build"
    table = tmp_path / "kernelImages.cpp"
    table.write_text('#include "hstuKernelImages.h"\n')
    tools = toolchain.find_toolchain()
    definitions = {
        "CMAKE_MAKE_PROGRAM": tools.make_program,
        "Python3_EXECUTABLE": sys.executable,
        "HSTU_TENSORRT_INCLUDE_DIR": str(find_tensorrt_headers().include_dir),
        "HSTU_CUDA_INCLUDE_DIR": str(find_cuda_headers()),
        "HSTU_KERNEL_SOURCES": str(table),
        "HSTU_CHECK_V2": "ON",
    }
    command = [tools.cmake, "-S", str(source), "-B", str(build), "-G", tools.generator]
    subprocess.run([*command, *(f"-D{k}={v}" for k, v in definitions.items())], check=True, capture_output=True)
    jobs = str(len(os.sched_getaffinity(0)))
    targets = ["--target", "hstu_check_v2"]
    done = subprocess.run(
        [tools.cmake, "--build", str(build), "--parallel", jobs, *targets], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "warning" not in done.stdout
    for operator in ("Attention", "Norm"):
        assert any(build.rglob(f"hstu{operator}PluginV2.cpp.o"))
    # The newer adapter is in the library, which is compiled with the same flags: a warning is an error.
    assert library.version_compatible is not None
