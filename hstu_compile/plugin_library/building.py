"""Builds a library of compiled kernels into the user's cache, under a hash of everything it is made from."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hstu_compile.errors import PluginError
from hstu_compile.files import file_sha256
from hstu_compile.plugin_library.build_request import KernelSet, PluginBuildRequest, Progress, default_cache_dir
from hstu_compile.plugin_library.headers import find_cuda_headers
from hstu_compile.plugin_library.toolchain import Toolchain, find_toolchain, run_tool, source_dir, triton_version
from hstu_compile.plugins.kernels.norm_variants import norm_tasks

_SOURCE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".map", ".txt", ".yaml", ".py"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one kind of library is made of.

    Attributes:
        target: what CMake builds.
        files: what is kept of that; those that the target does not make are not missed.
        kernels: what goes in.
        headers: files beside our sources and CUDA's that decide its bytes.
        definitions: CMake's cache variables that it needs beside those of every library.
        facts: of this kind alone, for the manifest.
    """

    target: str
    files: tuple[str, ...]
    kernels: KernelSet
    headers: tuple[Path, ...] = ()
    definitions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BuiltFolder:
    """A folder of the cache with the recipe's files, and the hash that it is kept under."""

    path: Path
    content_hash: str


def build_recipe(recipe: Recipe, request: PluginBuildRequest, progress: Progress | None) -> BuiltFolder:
    """Build a library, or take it from the cache when nothing it is made of has changed.

    Safe when several processes build at once (they wait for the one that builds) and when a build is interrupted (a
    library appears in the cache only when it is complete).

    Args:
        recipe: what to build.
        request: for CUDA's headers, the cache and the number of jobs.
        progress: called with (stage, done, total); stages are "kernels" and "library". Not called on a cache hit.

    Raises:
        PluginError: HSTU-E501 if a tool or header is missing or a compiler fails.
    """
    cuda_headers = find_cuda_headers(request.cuda_include_dir)
    tools = find_toolchain()
    content_hash = _content_hash(recipe, cuda_headers, tools)
    cache_dir = request.cache_dir or default_cache_dir()
    store = cache_dir / "plugins"
    target = store / content_hash[:32]
    if _is_complete(target):
        return BuiltFolder(target, content_hash)
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
                    _build_into(work, recipe, cuda_headers, tools, cache_dir / "kernels", request.jobs, progress)
                    os.rename(work / "out", target)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise PluginError(
            "HSTU-E501",
            "the library cannot be written",
            f"{error.filename or store}: {error.strerror}",
            "make the folder writable, free disk space, or set XDG_CACHE_HOME to another one",
            {"cache_dir": str(cache_dir)},
        ) from error
    return BuiltFolder(target, content_hash)


def _content_hash(recipe: Recipe, cuda_headers: Path, tools: Toolchain) -> str:
    """Return the hash of everything that decides the bytes of the library."""
    content = hashlib.sha256()
    root = source_dir()
    sources = [p for p in root.rglob("*") if p.suffix in _SOURCE_SUFFIXES and "__pycache__" not in p.parts]
    for path in [*sorted(sources), *sorted(recipe.headers)]:
        name = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        content.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    compiler = subprocess.run([tools.compiler, "--version"], capture_output=True, text=True, check=False).stdout
    kernels = recipe.kernels
    options = {
        "target": recipe.target,
        "variants": sorted(map(repr, kernels.variants)),
        "norms": sorted(map(repr, kernels.norm_variants)),
        "archs": sorted(kernels.archs),
        "with_ptx": kernels.with_ptx,
        "hopper": [sorted(map(repr, kernels.hopper.variants)), kernels.hopper.nvcc],
        "cuda": file_sha256(cuda_headers / "cuda.h"),
        "compiler": compiler,
        "triton": triton_version(),
    }
    content.update(json.dumps(options, sort_keys=True).encode())
    return content.hexdigest()


def _is_complete(target: Path) -> bool:
    """Whether a cached library is all there, byte for byte."""
    try:
        manifest: dict[str, Any] = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        files: dict[str, str] = manifest["files"]
        return bool(files) and all(file_sha256(target / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock between processes and threads; the system drops it when the holder dies."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build_into(
    work: Path,
    recipe: Recipe,
    cuda_headers: Path,
    tools: Toolchain,
    kernel_cache: Path,
    jobs: int | None,
    progress: Progress | None,
) -> None:
    """Compile kernels and library under `work`, and leave what is kept in `work/out`."""
    kernel_source = _write_kernels(recipe.kernels, work / "kernelImages.cpp", kernel_cache, jobs, progress)
    if progress is not None:
        progress("library", 0, 1)
    build = work / "build"
    configure = [tools.cmake, "-S", str(source_dir()), "-B", str(build), "-G", tools.generator]
    definitions = {
        "CMAKE_MAKE_PROGRAM": tools.make_program,
        "CMAKE_CXX_COMPILER": tools.compiler,
        "Python3_EXECUTABLE": sys.executable,
        "HSTU_CUDA_INCLUDE_DIR": str(cuda_headers.resolve()),
        "HSTU_KERNEL_SOURCES": str(kernel_source),
        **recipe.definitions,
    }
    run_tool([*configure, *(f"-D{name}={value}" for name, value in definitions.items())], "CMake")
    parallel = str(jobs or len(os.sched_getaffinity(0)))
    compile_ = [tools.cmake, "--build", str(build), "--parallel", parallel, "--target", recipe.target]
    run_tool(compile_, "the C++ compiler")

    out = work / "out"
    out.mkdir()
    kept = [name for name in recipe.files if (build / name).exists()]
    for name in kept:
        shutil.move(build / name, out / name)
    kernels = recipe.kernels
    manifest = {
        **recipe.facts,
        "archs": list(kernels.archs),
        "with_ptx": kernels.with_ptx,
        "variants": [dataclasses.asdict(variant) for variant in kernels.variants],
        "norm_variants": [dataclasses.asdict(variant) for variant in kernels.norm_variants],
        "hopper": kernels.hopper.to_dict(),
        "files": {name: file_sha256(out / name) for name in kept},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if progress is not None:
        progress("library", 1, 1)


def _write_kernels(kernels: KernelSet, path: Path, cache: Path, jobs: int | None, progress: Progress | None) -> Path:
    """Compile kernels that the cache lacks, and write the table of all as C++; return its path.

    Raises:
        PluginError: HSTU-E501 if one cannot be compiled.
    """
    from hstu_compile.plugins.kernels.aot import compile_norms, compile_variants, write_cpp_source
    from hstu_compile.plugins.kernels.hopper.compile import compile_hopper

    num_norms = len(norm_tasks(kernels.norm_variants, kernels.archs, with_ptx=kernels.with_ptx))
    num_portable = 0

    def portable_progress(done: int, total: int) -> None:
        nonlocal num_portable
        num_portable = total
        kernel_progress(done)

    def kernel_progress(done: int) -> None:
        if progress is not None:
            progress("kernels", done, num_portable + num_norms + len(kernels.hopper.variants))

    try:
        images = compile_variants(
            kernels.variants, kernels.archs, cache, jobs, with_ptx=kernels.with_ptx, progress=portable_progress
        )
        norm_images = compile_norms(
            kernels.norm_variants,
            kernels.archs,
            cache,
            jobs,
            with_ptx=kernels.with_ptx,
            progress=lambda done, _: kernel_progress(num_portable + done),
        )
        compiled = {(image.variant, image.sm) for image in images if not image.is_ptx}
        missing = [(v, arch) for v in kernels.variants for arch in kernels.archs if (v, arch) not in compiled]
        if missing:
            raise RuntimeError(f"{len(missing)} kernels are missing from the result, the first is {missing[0]}")
        hopper_images = (
            compile_hopper(
                kernels.hopper.variants,
                cache,
                jobs=jobs,
                progress=lambda done, _: kernel_progress(num_portable + num_norms + done),
            )
            if kernels.hopper.variants
            else []
        )
        return write_cpp_source(images, path, hopper_images, norm_images)[0]
    except (ValueError, RuntimeError) as error:
        raise PluginError(
            "HSTU-E501",
            "the kernels cannot be compiled",
            str(error),
            "choose other variants or architectures (plugins/kernels/README.md has the list); where it was nvcc that "
            "failed, set HSTU_NVCC to another one, or build with `--hopper off`",
            {"archs": list(kernels.archs)},
        ) from error
