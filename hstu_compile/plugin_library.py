"""Finds headers, builds and loads the TensorRT plugin libraries of HstuAttention and HstuNorm. Level 2.

Input: kernel variants, architectures and TensorRT headers. Output: a `PluginLibrary`, two shared objects in the user's
cache under a hash of everything they were made from. Importing this module imports neither torch, triton nor tensorrt.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from hstu_compile.errors import InternalError, PluginError
from hstu_compile.plugins.kernels.hopper.compile import usable_nvcc
from hstu_compile.plugins.kernels.hopper.variants import HOPPER_ARCH, HopperVariant
from hstu_compile.plugins.kernels.norm_variants import NormVariant, default_norm_variants, norm_tasks
from hstu_compile.plugins.kernels.variants import ARCHS, KernelVariant, default_variants, hopper_variants_of

SELF_REGISTERING = "libhstu_trt_plugin.so"
VERSION_COMPATIBLE = "libhstu_trt_plugin_vc.so"
SUPPORTED_MAJORS = (8, 10, 11)

#: Distribution names under which TensorRT's Python package is published, by any of which pip may have installed it.
TENSORRT_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11", "nvidia-tensorrt")

Progress = Callable[[str, int, int], None]
#: Whether a library gets the Hopper kernels: where they fit and nvcc is there, in any case, or not.
HopperChoice = Literal["auto", "require", "off"]

_SDK_FOLDERS = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)
_CUDA_FOLDERS = ("/usr/local/cuda/include", "/opt/cuda/include")
#: Python packages that carry cuda_runtime_api.h with everything it includes, and where.
_CUDA_PACKAGES = (("triton", "backends/nvidia/include"), ("nvidia", "cu13/include"), ("nvidia", "cuda_runtime/include"))
_VERSION_LINE = re.compile(r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)(?:_ENTERPRISE)? +(\d+)")
_SOURCE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".map", ".txt", ".yaml", ".py"}
_LOG_LINES = 40


@dataclasses.dataclass(frozen=True)
class TensorRtHeaders:
    """A folder of TensorRT headers.

    Attributes:
        include_dir: folder of NvInfer.h.
        version: (major, minor, patch) read from NvInferVersion.h.
        origin: where it was found, for messages.
    """

    include_dir: Path
    version: tuple[int, int, int]
    origin: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.version))} in {self.include_dir} ({self.origin})"


@dataclasses.dataclass(frozen=True)
class PluginBuildRequest:
    """What to build.

    Attributes:
        variants: attention kernels to put in; empty takes the default set.
        norm_variants: norm kernels to put in; None takes the default set where `variants` is empty too, else none.
        archs: compute capabilities to compile for, as 10 * major + minor; empty takes all of `ARCHS`.
        with_ptx: also put in PTX, which newer GPUs compile when the library is loaded.
        hopper: "auto" puts the Hopper kernels in where they fit and nvcc is found, and says why where not; "require"
            fails without them; "off" leaves them out.
        hopper_variants: which ones; None takes those of the `variants` that are aligned.
        tensorrt_include_dir: folder of NvInfer.h; None searches (`find_tensorrt_headers`).
        cuda_include_dir: folder of cuda_runtime_api.h; None searches (`find_cuda_headers`).
        runtime_version: version of the TensorRT that will load the library; None takes the installed Python package's,
            or believes the headers when there is none.
        cache_dir: where libraries and kernels are kept; None is $XDG_CACHE_HOME/hstu-compile.
        jobs: compiler processes; None is one per usable core.
    """

    variants: tuple[KernelVariant, ...] = ()
    norm_variants: tuple[NormVariant, ...] | None = None
    archs: tuple[int, ...] = ()
    with_ptx: bool = True
    hopper: HopperChoice = "auto"
    hopper_variants: tuple[HopperVariant, ...] | None = None
    tensorrt_include_dir: Path | None = None
    cuda_include_dir: Path | None = None
    runtime_version: str | None = None
    cache_dir: Path | None = None
    jobs: int | None = None


@dataclasses.dataclass(frozen=True)
class HopperKernels:
    """The Hopper kernels of a library, or why it has none.

    Attributes:
        variants: kernels inside.
        nvcc: release of their compiler, "13.0"; None when there are none.
        note: why there are none, in one sentence with a fix where there is one; None when there are some.
    """

    variants: tuple[HopperVariant, ...]
    nvcc: str | None
    note: str | None

    def __str__(self) -> str:
        """One line for a screen."""
        if self.note is not None:
            return f"no Hopper kernels, Hopper GPUs run the portable ones: {self.note}"
        return f"{len(self.variants)} Hopper kernels, by nvcc {self.nvcc}"

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON."""
        return {"variants": [dataclasses.asdict(v) for v in self.variants], "nvcc": self.nvcc, "note": self.note}


@dataclasses.dataclass(frozen=True)
class PluginLibrary:
    """A built plugin.

    Attributes:
        self_registering: for dlopen, LD_PRELOAD, polygraphy --plugins, trtexec --staticPlugins, Triton's plugins=.
        version_compatible: for IPluginRegistry::loadLibrary and trtexec --dynamicPlugins; None for TensorRT 8.5, which
            has no such call.
        trt_version: version of the headers, "10.14.1"; the library serves this major version only.
        variants: attention kernels inside.
        norm_variants: norm kernels inside.
        archs: compute capabilities inside.
        with_ptx: whether PTX for other GPUs is inside.
        hopper: its Hopper kernels, or why it has none.
        content_hash: of sources, headers, tools and options.
    """

    self_registering: Path
    version_compatible: Path | None
    trt_version: str
    variants: tuple[KernelVariant, ...]
    norm_variants: tuple[NormVariant, ...]
    archs: tuple[int, ...]
    with_ptx: bool
    hopper: HopperKernels
    content_hash: str


def default_cache_dir() -> Path:
    """Return the user's cache folder: $XDG_CACHE_HOME/hstu-compile, or ~/.cache/hstu-compile."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hstu-compile"


def read_tensorrt_version(include_dir: Path) -> tuple[int, int, int]:
    """Read (major, minor, patch) from a folder's NvInferVersion.h.

    Raises:
        PluginError: HSTU-E501 if the folder has no such header or the header names no version.
    """
    path = include_dir / "NvInferVersion.h"
    try:
        found = dict(reversed(_VERSION_LINE.findall(path.read_text(encoding="utf-8", errors="replace"))))
    except OSError as error:
        raise PluginError(
            "HSTU-E501",
            "TensorRT headers cannot be read",
            f"{path}: {error.strerror}",
            "set TENSORRT_INCLUDE_DIR to the folder that has NvInfer.h and NvInferVersion.h",
            {"include_dir": str(include_dir)},
        ) from error
    if not {"MAJOR", "MINOR"} <= set(found):
        raise PluginError(
            "HSTU-E501",
            "TensorRT headers name no version",
            f"{path} defines neither NV_TENSORRT_MAJOR nor TRT_MAJOR_ENTERPRISE as a number",
            "set TENSORRT_INCLUDE_DIR to the headers of a TensorRT release",
            {"include_dir": str(include_dir)},
        )
    return int(found["MAJOR"]), int(found["MINOR"]), int(found.get("PATCH", 0))


def installed_tensorrt_version() -> str | None:
    """Return the version of the installed TensorRT Python package without importing it; None if there is none."""
    for name in TENSORRT_DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def find_tensorrt_headers(include_dir: Path | None = None, runtime_version: str | None = None) -> TensorRtHeaders:
    """Find TensorRT's headers: the argument or TENSORRT_INCLUDE_DIR, an installed SDK, the kernel-lens package.

    Args:
        include_dir: folder to take; it then must have the headers.
        runtime_version: version of the TensorRT that will load the library, "10.14.1"; None skips the check.

    Raises:
        PluginError: HSTU-E501 if there are none, HSTU-E502 if their major version is not supported or not the
            runtime's.
    """
    headers = _locate_tensorrt_headers(include_dir)
    major = headers.version[0]
    if major not in SUPPORTED_MAJORS or headers.version < (8, 5, 0):
        raise PluginError(
            "HSTU-E502",
            "the TensorRT headers are not of a supported version",
            f"found {headers}; supported: 8.5, 8.6, 10, 11",
            "set TENSORRT_INCLUDE_DIR to the headers of the TensorRT that will load the plugin",
            {"headers": str(headers)},
        )
    if runtime_version is not None and int(runtime_version.split(".")[0]) != major:
        wanted = runtime_version.split(".")[0]
        raise PluginError(
            "HSTU-E502",
            "the TensorRT headers and the TensorRT runtime are different major versions",
            f"the headers are {headers}; the runtime is {runtime_version}. Their interfaces differ: a library built "
            "from one would crash in the other",
            f"set TENSORRT_INCLUDE_DIR to TensorRT {wanted} headers (folder `include` of branch release/{wanted}.x of "
            "github.com/NVIDIA/TensorRT, or of the TensorRT SDK)",
            {"headers": str(headers), "runtime_version": runtime_version},
        )
    return headers


def _locate_tensorrt_headers(include_dir: Path | None) -> TensorRtHeaders:
    if include_dir is not None:
        return TensorRtHeaders(include_dir, read_tensorrt_version(include_dir), "given")
    if os.environ.get("TENSORRT_INCLUDE_DIR"):
        named = Path(os.environ["TENSORRT_INCLUDE_DIR"])
        return TensorRtHeaders(named, read_tensorrt_version(named), "TENSORRT_INCLUDE_DIR")
    roots = [Path(os.environ[name]) / "include" for name in ("TENSORRT_ROOT", "TRT_ROOT") if os.environ.get(name)]
    for folder in [*roots, *map(Path, _SDK_FOLDERS)]:
        if (folder / "NvInfer.h").is_file():
            return TensorRtHeaders(folder, read_tensorrt_version(folder), "installed SDK")
    packaged = _package_folder("kernel_lens", "include/tensorrt", "NvInfer.h")
    if packaged is not None:
        return TensorRtHeaders(packaged, read_tensorrt_version(packaged), "kernel-lens package")
    searched = ", ".join(["TENSORRT_INCLUDE_DIR (not set)", *map(str, roots), *_SDK_FOLDERS, "package kernel-lens"])
    raise PluginError(
        "HSTU-E501",
        "no TensorRT headers were found",
        f"NvInfer.h is in none of: {searched}",
        "pip install --no-deps kernel-lens (headers of TensorRT 10.14), or set TENSORRT_INCLUDE_DIR",
    )


def find_cuda_headers(include_dir: Path | None = None) -> Path:
    """Find the folder of cuda.h and cuda_runtime_api.h: the argument, CUDA_HOME, a toolkit, a Python package.

    Triton's own wheel, which compiles the kernels, carries them; so no CUDA toolkit is needed.

    Raises:
        PluginError: HSTU-E501 if there are none.
    """
    if include_dir is not None:
        candidates = [include_dir]
    else:
        homes = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        candidates = [*homes, *map(Path, _CUDA_FOLDERS)]
    for folder in candidates:
        if _has_cuda_headers(folder):
            return folder
    if include_dir is None:
        for package, subfolder in _CUDA_PACKAGES:
            packaged = _package_folder(package, subfolder, "cuda_runtime_api.h")
            if packaged is not None and _has_cuda_headers(packaged):
                return packaged
    packages = [f"package {package}" for package, _ in _CUDA_PACKAGES] if include_dir is None else []
    raise PluginError(
        "HSTU-E501",
        "no CUDA headers were found",
        f"cuda_runtime_api.h, cuda.h and crt/host_defines.h are not together in any of: "
        f"{', '.join([*map(str, candidates), *packages])}",
        "pip install 'hstu-compile[plugin]' (Triton carries them), or set CUDA_HOME",
    )


def _has_cuda_headers(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("cuda_runtime_api.h", "cuda.h", "crt/host_defines.h"))


def _package_folder(package: str, subfolder: str, header: str) -> Path | None:
    """Return `subfolder` of an installed package if it has the header; the package is not imported."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        folder = Path(location) / subfolder
        if (folder / header).is_file():
            return folder
    return None


def plan_hopper_kernels(choice: HopperChoice, wanted: tuple[HopperVariant, ...], archs: Sequence[int]) -> HopperKernels:
    """Decide which Hopper kernels a library gets.

    Args:
        choice: of the request.
        wanted: those that its attention nodes can use.
        archs: its compute capabilities.

    Raises:
        PluginError: HSTU-E501 if they are required and there are none.
    """
    if choice == "off":
        return HopperKernels((), None, "left out on request")
    if HOPPER_ARCH not in archs:
        note = f"the library is not for sm_{HOPPER_ARCH}"
    elif not wanted:
        note = "no attention node fits them; they take float16 and bfloat16, and head dims that are multiples of 8"
    else:
        try:
            _, (major, minor) = usable_nvcc()
            return HopperKernels(wanted, f"{major}.{minor}", None)
        except RuntimeError as error:
            note = str(error)
    if choice == "require":
        raise PluginError(
            "HSTU-E501",
            "the Hopper kernels are required and cannot be built",
            note,
            "see the cause, or build without requiring them: `--hopper auto` says what is missing and goes on",
            {"archs": list(archs), "variants": [repr(variant) for variant in wanted]},
        )
    return HopperKernels((), None, note)


def build_plugin_library(request: PluginBuildRequest, progress: Progress | None = None) -> PluginLibrary:
    """Build the plugin libraries, or take them from the cache when nothing they are made of has changed.

    Safe when several processes build at once (they wait for the one that builds) and when a build is interrupted (a
    library appears in the cache only when it is complete).

    Args:
        request: what to build.
        progress: called with (stage, done, total); stages are "kernels" and "library". Not called on a cache hit.

    Raises:
        PluginError: HSTU-E501 if a tool or header is missing or a compiler fails, HSTU-E502 if the headers are not of
            the runtime's version.
    """
    runtime_version = request.runtime_version or installed_tensorrt_version()
    headers = find_tensorrt_headers(request.tensorrt_include_dir, runtime_version)
    cuda_headers = find_cuda_headers(request.cuda_include_dir)
    tools = _find_tools()
    variants = request.variants or default_variants()
    norm_variants = request.norm_variants
    if norm_variants is None:
        norm_variants = () if request.variants else default_norm_variants()
    archs = request.archs or ARCHS
    wanted = hopper_variants_of(variants) if request.hopper_variants is None else request.hopper_variants
    hopper = plan_hopper_kernels(request.hopper, wanted, archs)
    content_hash = _content_hash(request, headers, cuda_headers, tools, variants, norm_variants, archs, hopper)
    cache_dir = request.cache_dir or default_cache_dir()
    store = cache_dir / "plugins"
    target = store / content_hash[:32]

    def described() -> PluginLibrary:
        vc = target / VERSION_COMPATIBLE
        version = ".".join(map(str, headers.version))
        return PluginLibrary(
            self_registering=target / SELF_REGISTERING,
            version_compatible=vc if vc.exists() else None,
            trt_version=version,
            variants=variants,
            norm_variants=norm_variants,
            archs=archs,
            with_ptx=request.with_ptx,
            hopper=hopper,
            content_hash=content_hash,
        )

    if _is_complete(target):
        return described()
    try:
        store.mkdir(parents=True, exist_ok=True)
        with _exclusive(store / f"{target.name}.lock"):
            if not _is_complete(target):
                # Only a holder of the lock makes these names, so what is there was left by an interrupted build.
                shutil.rmtree(target, ignore_errors=True)
                work = store / f".{target.name}.building"
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                try:
                    _build_into(
                        work,
                        request,
                        headers,
                        cuda_headers,
                        tools,
                        variants,
                        norm_variants,
                        archs,
                        hopper,
                        cache_dir,
                        progress,
                    )
                    os.rename(work / "out", target)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise PluginError(
            "HSTU-E501",
            "the plugin library cannot be written",
            f"{error.filename or store}: {error.strerror}",
            "make the folder writable, free disk space, or set XDG_CACHE_HOME to another one",
            {"cache_dir": str(cache_dir)},
        ) from error
    return described()


@dataclasses.dataclass(frozen=True)
class _Tools:
    cmake: str
    compiler: str
    generator: str
    make_program: str


def _find_tools() -> _Tools:
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
            "the plugin library cannot be built here",
            f"not found on PATH or beside {sys.executable}: {', '.join(missing)}",
            "pip install 'hstu-compile[plugin]' for CMake and ninja, and install g++ from the system's packages",
            {"missing": missing},
        )
    return _Tools(cmake, compiler, "Ninja" if ninja else "Unix Makefiles", ninja or make or "")


def _source_dir() -> Path:
    """Return the folder of the plugin's sources."""
    spec = importlib.util.find_spec("hstu_compile.plugins")
    if spec is None or spec.origin is None:
        raise InternalError("the package hstu_compile.plugins was installed without its sources")
    return Path(spec.origin).parent


def _content_hash(
    request: PluginBuildRequest,
    headers: TensorRtHeaders,
    cuda_headers: Path,
    tools: _Tools,
    variants: Sequence[KernelVariant],
    norm_variants: Sequence[NormVariant],
    archs: Sequence[int],
    hopper: HopperKernels,
) -> str:
    """Return the hash of everything that decides the bytes of the libraries."""
    content = hashlib.sha256()
    root = _source_dir()
    sources = [p for p in root.rglob("*") if p.suffix in _SOURCE_SUFFIXES and "__pycache__" not in p.parts]
    for path in [*sorted(sources), *sorted(headers.include_dir.glob("NvInfer*.h"))]:
        name = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        content.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    compiler = subprocess.run([tools.compiler, "--version"], capture_output=True, text=True, check=False).stdout
    options = {
        "variants": sorted(map(repr, variants)),
        "norms": sorted(map(repr, norm_variants)),
        "archs": sorted(archs),
        "with_ptx": request.with_ptx,
        "hopper": [sorted(map(repr, hopper.variants)), hopper.nvcc],
        "cuda": hashlib.sha256((cuda_headers / "cuda.h").read_bytes()).hexdigest(),
        "compiler": compiler,
        "triton": _triton_version(),
    }
    content.update(json.dumps(options, sort_keys=True).encode())
    return content.hexdigest()


def _triton_version() -> str:
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


def _is_complete(target: Path) -> bool:
    """Whether a cached library is all there, byte for byte."""
    try:
        manifest: dict[str, Any] = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        files: dict[str, str] = manifest["files"]
        return bool(files) and all(_sha256(target / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock between processes and threads; the system drops it when the holder dies."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build_into(
    work: Path,
    request: PluginBuildRequest,
    headers: TensorRtHeaders,
    cuda_headers: Path,
    tools: _Tools,
    variants: tuple[KernelVariant, ...],
    norm_variants: tuple[NormVariant, ...],
    archs: tuple[int, ...],
    hopper: HopperKernels,
    cache_dir: Path,
    progress: Progress | None,
) -> None:
    """Compile kernels and libraries under `work`, and leave what is kept in `work/out`."""
    from hstu_compile.plugins.kernels.aot import compile_norms, compile_variants, write_cpp_source
    from hstu_compile.plugins.kernels.hopper.compile import compile_hopper

    num_norms = len(norm_tasks(norm_variants, archs, with_ptx=request.with_ptx))
    num_portable = 0

    def portable_progress(done: int, total: int) -> None:
        nonlocal num_portable
        num_portable = total
        kernel_progress(done)

    def kernel_progress(done: int) -> None:
        if progress is not None:
            progress("kernels", done, num_portable + num_norms + len(hopper.variants))

    kernels = cache_dir / "kernels"
    try:
        images = compile_variants(
            variants, archs, kernels, request.jobs, with_ptx=request.with_ptx, progress=portable_progress
        )
        norm_images = compile_norms(
            norm_variants,
            archs,
            kernels,
            request.jobs,
            with_ptx=request.with_ptx,
            progress=lambda done, _: kernel_progress(num_portable + done),
        )
        compiled = {(image.variant, image.sm) for image in images if not image.is_ptx}
        missing = [(v, arch) for v in variants for arch in archs if (v, arch) not in compiled]
        if missing:
            raise RuntimeError(f"{len(missing)} kernels are missing from the result, the first is {missing[0]}")
        hopper_images = (
            compile_hopper(
                hopper.variants,
                kernels,
                jobs=request.jobs,
                progress=lambda done, _: kernel_progress(num_portable + num_norms + done),
            )
            if hopper.variants
            else []
        )
        kernel_source, _ = write_cpp_source(images, work / "kernelImages.cpp", hopper_images, norm_images)
    except (ValueError, RuntimeError) as error:
        raise PluginError(
            "HSTU-E501",
            "the kernels cannot be compiled",
            str(error),
            "choose other variants or architectures (plugins/kernels/README.md has the list); where it was nvcc that "
            "failed, set HSTU_NVCC to another one, or build with `--hopper off`",
            {"archs": list(archs)},
        ) from error
    if progress is not None:
        progress("library", 0, 1)
    build = work / "build"
    configure = [tools.cmake, "-S", str(_source_dir()), "-B", str(build), "-G", tools.generator]
    definitions = {
        "CMAKE_MAKE_PROGRAM": tools.make_program,
        "CMAKE_CXX_COMPILER": tools.compiler,
        "Python3_EXECUTABLE": sys.executable,
        "HSTU_TENSORRT_INCLUDE_DIR": str(headers.include_dir.resolve()),
        "HSTU_CUDA_INCLUDE_DIR": str(cuda_headers.resolve()),
        "HSTU_KERNEL_SOURCES": str(kernel_source),
    }
    _run([*configure, *(f"-D{name}={value}" for name, value in definitions.items())], "CMake")
    jobs = request.jobs or len(os.sched_getaffinity(0))
    _run([tools.cmake, "--build", str(build), "--parallel", str(jobs)], "the C++ compiler")

    out = work / "out"
    out.mkdir()
    kept = [name for name in (SELF_REGISTERING, VERSION_COMPATIBLE) if (build / name).exists()]
    for name in kept:
        shutil.move(build / name, out / name)
    manifest = {
        "trt_version": ".".join(map(str, headers.version)),
        "archs": list(archs),
        "with_ptx": request.with_ptx,
        "variants": [dataclasses.asdict(variant) for variant in variants],
        "norm_variants": [dataclasses.asdict(variant) for variant in norm_variants],
        "hopper": hopper.to_dict(),
        "files": {name: _sha256(out / name) for name in kept},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if progress is not None:
        progress("library", 1, 1)


def _run(command: Sequence[str], tool: str) -> None:
    """Run a build tool; its output is only shown when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-_LOG_LINES:])
        raise PluginError(
            "HSTU-E501",
            f"{tool} failed on the plugin library",
            f"exit code {done.returncode}; the end of its output:\n{tail}",
            "check that the TensorRT and CUDA headers belong to releases; the full command is in the context",
            {"command": list(command)},
        )


_loaded: dict[Path, ctypes.CDLL] = {}
_load_lock = threading.Lock()


def load_plugin_library(path: Path) -> ctypes.CDLL:
    """Load a self-registering plugin library with its symbols global; loading it again returns the same handle.

    TensorRT's Python package is imported first when it is installed: it brings libnvinfer, which the plugin names as a
    dependency, from a folder that the dynamic loader does not search.

    Raises:
        PluginError: HSTU-E504 if the file is missing or the dynamic loader refuses it.
    """
    resolved = Path(path).resolve()
    with _load_lock:
        if resolved in _loaded:
            return _loaded[resolved]
        if importlib.util.find_spec("tensorrt") is not None:
            importlib.import_module("tensorrt")
        try:
            library = ctypes.CDLL(str(resolved), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            needs_tensorrt = "libnvinfer" in str(error)
            raise PluginError(
                "HSTU-E504",
                f"the plugin library {resolved} cannot be loaded",
                str(error),
                "install the TensorRT that it was built for, or put the folder of its libnvinfer into LD_LIBRARY_PATH"
                if needs_tensorrt
                else "build it on this system with `hstu-compile plugin build`",
                {"library": str(resolved)},
            ) from error
        _loaded[resolved] = library
        return library
