"""What this machine has: versions, GPU, loaded libraries; and which backend `auto` means here. Level 0, stdlib only.

Every probe is guarded: the report is most needed where something is broken.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from hstu_compile.errors import EngineError

Backend = Literal["tensorrt", "tensorrt-rtx"]

# Distribution names under which each package is published; the first that is installed is reported.
_DISTRIBUTIONS = {
    "hstu-compile": ("hstu-compile",),
    "torch": ("torch",),
    "triton": ("triton",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "nvidia-tensorrt"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "polygraphy": ("polygraphy",),
    "numpy": ("numpy",),
    "click": ("click",),
}

# Import names in the order in which they are tried. TensorRT-RTX's bindings also ship alone, without the package that
# re-exports them, and then need the package of libraries imported first.
_MODULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "tensorrt": (("tensorrt",),),
    "tensorrt-rtx": (("tensorrt_rtx",), ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")),
}

_INSTALL = {
    "tensorrt": "pip install 'hstu-compile[gpu]' (TensorRT 10 or 11; needs a GPU), or TensorRT 8.5/8.6 on Python 3.10",
    "tensorrt-rtx": "pip install 'hstu-compile[rtx]', which builds engines without a GPU",
}

_LIBRARIES = ("libnvinfer", "libtensorrt_rtx", "libcudart", "libcuda", "libcublas")
_LIBRARY_FILE = re.compile(r"(" + "|".join(_LIBRARIES) + r")\.so[.\d]*$")
_PROBE_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class BackendChoice:
    """The backend that `--backend` means here, and why. `onnx` means: no engine."""

    name: Literal["tensorrt", "tensorrt-rtx", "onnx"]
    reason: str


def import_backend(backend: str) -> ModuleType:
    """The Python module of a backend.

    Raises:
        EngineError: HSTU-E401, with what was tried and what to install.
    """
    failures = []
    for names in _MODULES[backend]:
        try:
            modules = [importlib.import_module(name) for name in names]
        except Exception as error:  # a broken native library raises OSError, RuntimeError or worse
            failures.append(f"import {' + '.join(names)}: {type(error).__name__}: {error}")
            continue
        if all(hasattr(modules[-1], name) for name in ("Builder", "OnnxParser", "Runtime")):
            return modules[-1]
        failures.append(f"import {' + '.join(names)}: the module has no engine builder")
    raise EngineError(
        "HSTU-E401",
        f"the backend {backend} cannot be imported",
        "; ".join(failures),
        _INSTALL[backend],
        {"backend": backend},
    )


def gpu_visible() -> bool:
    """Whether the CUDA driver sees a device in this process (CUDA_VISIBLE_DEVICES is respected)."""
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


def gpu_name() -> str | None:
    """Name of the first GPU that the CUDA driver shows to this process, the one that sessions use; None without one."""
    import ctypes

    name, device = ctypes.create_string_buffer(256), ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        found = (
            driver.cuInit(0) == 0
            and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
            and driver.cuDeviceGetName(name, len(name), device) == 0
        )
    except (OSError, AttributeError):
        return None
    return name.value.decode("utf-8", errors="replace") if found else None


def choose_backend(
    requested: str,
    *,
    load: Callable[[str], ModuleType] = import_backend,
    has_gpu: Callable[[], bool] = gpu_visible,
) -> BackendChoice:
    """Resolve `auto`: TensorRT where it can be imported and a GPU is visible, else TensorRT-RTX, else no engine.

    Args:
        requested: auto, tensorrt, tensorrt-rtx or onnx.
        load: imports a backend or raises EngineError.
        has_gpu: whether a GPU is visible.

    Raises:
        EngineError: HSTU-E401, if a backend is named that is absent, or that needs a GPU where none is visible.
    """
    if requested == "onnx":
        return BackendChoice("onnx", "--backend onnx: no engine is built")
    if requested == "tensorrt-rtx":
        load("tensorrt-rtx")
        return BackendChoice("tensorrt-rtx", "--backend tensorrt-rtx")
    if requested == "tensorrt":
        load("tensorrt")
        if not has_gpu():
            raise EngineError(
                "HSTU-E401",
                "the backend tensorrt cannot build here",
                "TensorRT times kernels while it builds, and no GPU is visible",
                "run this on the machine that serves, or use --backend tensorrt-rtx, which builds without a GPU",
                {"backend": "tensorrt"},
            )
        return BackendChoice("tensorrt", "--backend tensorrt")
    if requested != "auto":
        raise EngineError(
            "HSTU-E401",
            f"there is no backend {requested!r}",
            f"{requested!r} is not one of auto, tensorrt, tensorrt-rtx, onnx",
            "choose one of these with --backend",
            {"backend": requested},
        )
    reasons = []
    try:
        load("tensorrt")
        if has_gpu():
            return BackendChoice("tensorrt", "TensorRT can be imported and a GPU is visible")
        reasons.append("TensorRT can be imported but no GPU is visible")
    except EngineError as error:
        reasons.append(f"TensorRT is absent ({error.why})")
    try:
        load("tensorrt-rtx")
        return BackendChoice("tensorrt-rtx", f"{reasons[0]}; TensorRT-RTX builds without a GPU")
    except EngineError as error:
        reasons.append(f"TensorRT-RTX is absent ({error.why})")
    return BackendChoice("onnx", "; ".join(reasons))


def loaded_libraries() -> dict[str, list[str]]:
    """NVIDIA libraries mapped into this process: soname stem to file paths."""
    found: dict[str, list[str]] = {}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        path = line.partition("/")[1] + line.partition("/")[2]
        match = _LIBRARY_FILE.match(path.rpartition("/")[2])
        if match and path not in found.setdefault(match[1], []):
            found[match[1]].append(path)
    return found


def installed_libraries() -> dict[str, list[str]]:
    """The same libraries as the dynamic loader's cache, LD_LIBRARY_PATH and installed wheels offer them."""
    found: dict[str, set[str]] = {}
    folders = [Path(p) for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p]
    for entry in sys.path:
        site = Path(entry)
        if site.name in ("site-packages", "dist-packages"):
            folders += [*site.glob("tensorrt*_libs"), *site.glob("tensorrt"), *site.glob("nvidia/*/lib")]
    candidates = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    if ldconfig := shutil.which("ldconfig") or shutil.which("ldconfig", path="/sbin:/usr/sbin"):
        cache = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
        candidates += [Path(line.rpartition("=> ")[2]) for line in cache.stdout.splitlines() if "=> " in line]
    for file in candidates:
        if match := _LIBRARY_FILE.match(file.name):
            found.setdefault(match[1], set()).add(str(file))
    return {name: sorted(paths) for name, paths in sorted(found.items())}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name, distributions in _DISTRIBUTIONS.items():
        versions[name] = None
        for distribution in distributions:
            try:
                versions[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            if distribution != name:
                versions[name] = f"{versions[name]} ({distribution})"
            break
    return versions


def _cpu() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))):
        model = match[1].strip()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model, "cores": usable}


def _gpus() -> list[dict[str, str]]:
    """GPUs as nvidia-smi lists them; none where it is not installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    fields = ("name", "compute_cap", "memory.total", "driver_version", "power.limit")
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    output = subprocess.run(query, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True).stdout
    return [dict(zip(fields, line.split(", "), strict=True)) for line in output.splitlines() if line]


def _probe(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # the report itself must never fail
        return {"error": f"{type(error).__name__}: {error}"}


def collect_environment() -> dict[str, Any]:
    """Facts about this machine that a bug report or a manifest needs; JSON-serialisable."""
    return {
        "python": _probe(platform.python_version),
        "executable": _probe(lambda: Path(sys.executable).name),
        "os": _probe(platform.platform),
        "cpu": _probe(_cpu),
        "packages": _probe(_versions),
        "gpus": _probe(_gpus),
        "gpu_visible": _probe(gpu_visible),
        "loaded_libraries": _probe(loaded_libraries),
        "installed_libraries": _probe(installed_libraries),
    }


def render_environment(environment: Mapping[str, Any]) -> str:
    """The report as text: one fact a line, nested facts indented."""
    lines: list[str] = []

    def write(name: str, value: Any, depth: int) -> None:
        indent = "  " * depth
        if isinstance(value, Mapping) and value:
            lines.append(f"{indent}{name}:")
            for key, inner in value.items():
                write(str(key), inner, depth + 1)
        elif isinstance(value, list) and value:
            lines.append(f"{indent}{name}:")
            for inner in value:
                if isinstance(inner, Mapping):
                    lines.append(f"{indent}  - " + ", ".join(f"{key} {item}" for key, item in inner.items()))
                else:
                    lines.append(f"{indent}  - {inner}")
        else:
            shown = "not installed" if value is None else "none" if value in ({}, []) else value
            lines.append(f"{indent}{name}: {shown}")

    for key, value in environment.items():
        write(key, value, 0)
    return "\n".join(lines)
