"""The library of attention kernels without TensorRT: what it launches, what it refuses, how it is built and kept."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hstu_compile.errors import PluginError
from hstu_compile.files import file_sha256
from hstu_compile.plugin_library import (
    KERNELS_LIBRARY,
    KernelsLibrary,
    PluginBuildRequest,
    build_kernels_library,
    build_plugin_library,
    building,
    find_cuda_headers,
    toolchain,
)
from hstu_compile.plugins import generate_contract
from hstu_compile.plugins.kernels.hopper.variants import HopperVariant, chosen_split, resident_clusters, tile_of
from hstu_compile.plugins.kernels.norm_variants import norm_variant
from hstu_compile.plugins.kernels.tiles import tile_configs
from hstu_compile.plugins.kernels.variants import variants_for
from hstu_compile.runtime.attention_kernels import KernelLibrary
from tests.plugins.conformance import kernels_probe
from tests.plugins.conformance.libraries import small_kernels_library
from tests.plugins.test_plugin_library import exported, needed

ROOT = Path(generate_contract.__file__).parent
PROGRAMS = Path(__file__).parent / "conformance"
SYMBOLS = [
    *(f"hstuAttention{name}" for name in ("Create", "Destroy", "Enqueue", "KernelsApiVersion", "KernelsBuildId")),
    "hstuAttentionWorkspace",
    *(f"hstuNorm{name}" for name in ("Create", "Destroy", "Enqueue")),
]
WARNINGS = ["-std=c++17", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
# Without the checks of every pointer, which take a third of the compiler's time: the address sanitizer stops at what is
# no object.
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=alignment,null,object-size,vptr",
    "-fno-sanitize-recover=undefined",
    "-g1",
]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    # The first test that needs the library also waits for nvcc, where the cache lacks kernels.
    pytest.mark.timeout(300),
]


def cuda_headers() -> Path:
    try:
        return find_cuda_headers()
    except PluginError as error:
        pytest.skip(f"no CUDA headers: {error.why}")


@pytest.fixture(scope="module")
def includes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Where the library's sources find headers; none of TensorRT's is among them."""
    generated = tmp_path_factory.mktemp("generated")
    for operator in ("hstuAttention", "hstuNorm"):
        name = f"{operator}Plugin/{operator[0].upper()}{operator[1:]}_PluginConfig.yaml"
        header = generate_contract.header_from_contract(yaml.safe_load((ROOT / name).read_text("utf-8")))
        (generated / f"{operator}Contract.h").write_text(header)
    folders = ("api", "common", "hstuAttentionPlugin", "hstuNormPlugin", "kernels/hopper")
    own = [generated, *(ROOT / name for name in folders)]
    return [*(f"-I{path}" for path in own), "-isystem", str(cuda_headers())]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, includes: list[str]) -> Path:
    """A folder with a libcuda.so.1 that records."""
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    sources = [str(PROGRAMS / name) for name in ("fakeDriver.cpp", "launchRecord.cpp")]
    subprocess.run(["g++", *WARNINGS, *includes, "-shared", "-fPIC", *sources, "-o", str(library)], check=True)
    return library.parent


def test_the_interface_launches_what_the_plugin_launches_and_refuses_by_name(
    driver: Path, includes: list[str], tmp_path: Path
) -> None:
    ours = [ROOT / "api" / name for name in ("hstuAttentionKernels.cpp", "kernelArguments.cpp")]
    folders = (("hstuAttentionPlugin", "hstuAttention[!P]*.cpp"), ("hstuNormPlugin", "hstuNorm[!P]*.cpp"))
    core = [path for folder, names in (*folders, ("common", "*.cpp")) for path in (ROOT / folder).glob(names)]
    programs = [PROGRAMS / name for name in ("attentionKernels.cpp", "normKernels.cpp")]
    # In one translation unit, a third of the compiler's time: each by itself is compiled for the library.
    whole = tmp_path / "library.cpp"
    whole.write_text("".join(f'#include "{path}"\n' for path in (*ours, *sorted(core))))
    sources = [str(path) for path in (*programs, whole)]
    program = tmp_path / "attentionKernels"
    subprocess.run(["g++", *WARNINGS, *SANITIZE, *includes, *sources, "-o", str(program), "-ldl"], check=True)
    environment = {"LD_LIBRARY_PATH": str(driver)}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> KernelsLibrary:
    return small_kernels_library(request.config)


def probe(library: KernelsLibrary, driver: Path, driver_version: int) -> dict[str, Any]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "FAKE_CUDA_VERSION": str(driver_version)}
    environment["PYTHONPATH"] = str(PROGRAMS.parents[2])
    command = [sys.executable, str(PROGRAMS / "kernels_probe.py"), str(library.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


ROWS, BATCH, HEADS = kernels_probe.ROWS, kernels_probe.BATCH, kernels_probe.HEADS


def test_a_driver_older_than_the_hopper_kernels_gets_the_portable_one(library: KernelsLibrary, driver: Path) -> None:
    found = probe(library, driver, 11080)
    tile = tile_configs(90, "float16", 16, 16, pos_bias=False, time_bias=False)[0]
    launch = ["hstu_attention", [ROWS // tile.block_m + BATCH + 1, HEADS, 1], kernels_probe.STREAM, None]
    assert found["launches"] == [launch, launch], "one launch a layer, and none without rows"
    assert (found["waits"], found["left"]) == (0, 0)
    assert "HSTU-E505" in found["refused"]
    assert "this library has no kernel for float16, q/k head dim 200" in found["refused"]


def test_a_hopper_gpu_gets_the_hopper_kernels_with_counters_from_before(library: KernelsLibrary, driver: Path) -> None:
    if not library.hopper.variants:
        pytest.skip(library.hopper.note or "no Hopper kernels")
    found = probe(library, driver, 99000)
    split = chosen_split(64, ROWS, ROWS, BATCH, HEADS, 132)
    tile = tile_of(HopperVariant("float16", 64, True, shares=split > 1))
    clusters = min(resident_clusters(split, 132), (ROWS // (64 * tile.warpgroups) + BATCH) * HEADS)
    launch = ["hstu_attention_sm90", [split * clusters, 1, 1], kernels_probe.STREAM]
    assert found["launches"] == [[*launch, 0x100000], [*launch, 0x200000]]
    assert (found["waits"], found["held"], found["left"]) == (0, 2, 0), "a layer's counters are there before it runs"


def test_without_a_driver_the_reason_is_told(library: KernelsLibrary, tmp_path: Path) -> None:
    # Where there is a driver, a file that is none stands in its way.
    (tmp_path / "libcuda.so.1").write_bytes(b"no ELF")
    code = (
        "import sys; from pathlib import Path; from tests.plugins.conformance import kernels_probe as probe\n"
        "from hstu_compile.runtime.attention_kernels import KernelLibrary\n"
        "kernels = KernelLibrary(Path(sys.argv[1])); print(kernels.name); kernels.prepare(*probe.call_of(16))"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(PROGRAMS.parents[2])}
    command = [sys.executable, "-c", code, str(library.path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.stdout.startswith("kernels ")
    assert "HSTU-E505" in done.stderr
    assert "the CUDA driver is not usable" in done.stderr


def test_the_library_exports_the_interface_and_needs_the_c_library_alone(library: KernelsLibrary) -> None:
    assert exported(library.path) == SYMBOLS
    header = (ROOT / "api" / "hstuAttentionKernels.h").read_text()
    assert all(f" {name}(" in header or f"*{name}(" in header for name in SYMBOLS)
    allowed = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0"}
    assert {name for name in needed(library.path) if not name.startswith("ld-linux")} <= allowed
    content = library.path.read_bytes()
    for folder in {str(Path.home()), str(library.path.parent), str(ROOT.parent)} - {"/"}:
        assert folder.encode() not in content


def test_the_name_is_that_of_the_kernels(library: KernelsLibrary) -> None:
    assert re.fullmatch("kernels [0-9a-f]{16}", KernelLibrary(library.path).name)


def test_the_library_is_described_as_json(library: KernelsLibrary) -> None:
    manifest = json.loads((library.path.parent / "manifest.json").read_text())
    described = json.loads(json.dumps(library.to_dict()))
    assert described.pop("file") == KERNELS_LIBRARY
    assert described.pop("content_hash").startswith(library.path.parent.name)
    assert {**described, "files": manifest["files"]} == manifest
    assert list(manifest["files"]) == [KERNELS_LIBRARY]


class FakeBuild:
    """Stands in for the compilers; keeps the recipes."""

    def __init__(self) -> None:
        self.recipes: list[building.Recipe] = []

    def __call__(self, work: Path, recipe: building.Recipe, *_: Any) -> None:
        """Write what the recipe asks for."""
        self.recipes.append(recipe)
        out = work / "out"
        out.mkdir()
        for name in recipe.files:
            (out / name).write_bytes(b"library")
        files = {name: file_sha256(out / name) for name in recipe.files}
        (out / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> FakeBuild:
    fake = FakeBuild()
    monkeypatch.setattr(building, "_build_into", fake)
    monkeypatch.setattr(building, "triton_version", lambda: "3.6.0")
    return fake


def test_the_build_reads_nothing_of_tensorrt_and_has_the_norms_that_are_named(
    fake_build: FakeBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path / "absent"))
    plain = PluginBuildRequest(
        variants=variants_for("float16", 16, 16), archs=(90,), cuda_include_dir=cuda_headers(), cache_dir=tmp_path
    )
    norms = (norm_variant("float16", "float16", 48),)
    other = dataclasses.replace(plain, runtime_version="8.5", tensorrt_include_dir=tmp_path)
    first = build_kernels_library(plain)
    assert build_kernels_library(other) == first
    (recipe,) = fake_build.recipes
    assert recipe.kernels.norm_variants == first.norm_variants == ()
    assert (recipe.headers, dict(recipe.definitions)) == ((), {})
    assert first.path.read_bytes() == b"library"
    normed = build_kernels_library(dataclasses.replace(plain, norm_variants=norms))
    assert normed.path != first.path
    assert normed.norm_variants == fake_build.recipes[-1].kernels.norm_variants == norms
    with pytest.raises(PluginError, match="absent"):
        build_plugin_library(plain)


def test_other_kernels_architectures_or_ptx_are_another_library(fake_build: FakeBuild, tmp_path: Path) -> None:
    request = PluginBuildRequest(cuda_include_dir=cuda_headers(), cache_dir=tmp_path, hopper="off")
    changes: list[dict[str, Any]] = [
        {}, {"variants": variants_for("float16", 16, 16)}, {"archs": (90,)}, {"with_ptx": False}, {"jobs": 1}
    ]  # fmt: skip
    built = [build_kernels_library(dataclasses.replace(request, **change)) for change in changes]
    assert len({each.path for each in built}) == 4
    assert built[0] == built[-1], "how many compile at once changes nothing"
    assert [each.with_ptx for each in built[:4]] == [True, True, True, False]
    assert built[2].archs == (90,)


def test_cmake_builds_the_library_without_tensorrt_and_says_what_is_missing(tmp_path: Path) -> None:
    tools = toolchain.find_toolchain()
    build, table = tmp_path / "build", tmp_path / "kernelImages.cpp"
    table.write_text('#include "hstuKernelImages.h"\n')

    def configure(**definitions: str) -> str:
        """Return what CMake complains of, without its line breaks; nothing if it does not."""
        command = [tools.cmake, "-S", str(ROOT), "-B", str(build), "-G", tools.generator, "--fresh"]
        values = {"CMAKE_MAKE_PROGRAM": tools.make_program, "Python3_EXECUTABLE": sys.executable, **definitions}
        command += [f"-D{name}={value}" for name, value in values.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else " ".join(done.stderr.split())

    cuda = str(cuda_headers())
    given = {"HSTU_CUDA_INCLUDE_DIR": cuda, "HSTU_KERNEL_SOURCES": str(table)}
    assert "HSTU_CUDA_INCLUDE_DIR is '/absent', which has no cuda.h" in configure(HSTU_CUDA_INCLUDE_DIR="/absent")
    assert "HSTU_KERNEL_SOURCES is empty" in configure(HSTU_CUDA_INCLUDE_DIR=cuda)
    message = "HSTU_TENSORRT_INCLUDE_DIR is '/absent', which has no NvInferVersion.h"
    assert message in configure(**given, HSTU_TENSORRT_INCLUDE_DIR="/absent")
    assert configure(**given) == ""
    listed = subprocess.run(
        [tools.cmake, "--build", str(build), "--target", "help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "hstu_attention_kernels" in listed.stdout
    assert "hstu_trt_plugin" not in listed.stdout
