"""Finds the headers of TensorRT and of CUDA."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

from hstu_compile.errors import PluginError

SUPPORTED_MAJORS = (8, 10, 11)

#: Distribution names under which TensorRT's Python package is published, by any of which pip may have installed it.
TENSORRT_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11", "nvidia-tensorrt")

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
