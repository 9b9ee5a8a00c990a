"""`hstu-compile plugin build`: compile the plugin library on its own. Level 5, without torch at import."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hstu_compile.engine_stage import load_onnx
from hstu_compile.errors import UsageError
from hstu_compile.files import writing_to
from hstu_compile.graph_plugin import plugin_request_of
from hstu_compile.plugin_library import (
    HopperChoice,
    PluginBuildRequest,
    build_plugin_library,
    installed_tensorrt_version,
)
from hstu_compile.plugins.kernels.variants import ARCHS


def run_plugin_stage(
    models: Sequence[Path],
    output: Path | None,
    capabilities: Sequence[str],
    tensorrt_version: str | None,
    hopper: HopperChoice = "auto",
) -> dict[str, Any]:
    """Build the libraries, or take them from the cache.

    Args:
        models: graphs whose kernels are needed, in one library; none builds the default set.
        output: folder to copy the libraries to, or None.
        capabilities: GPU architectures such as "9.0"; empty means all.
        tensorrt_version: of the TensorRT that will load the library; None is the installed one.
        hopper: whether the Hopper kernels go in; see `PluginBuildRequest`.

    Returns:
        libraries (paths), trt_version, archs, with_ptx, variants, norm_variants, hopper (variants, nvcc, note, and the
        same in words),
        content_hash.

    Raises:
        UsageError: HSTU-E901, for an architecture without kernels, or a version that is no number.
        PluginError: HSTU-E501 or E502.
        BundleError: HSTU-E802, if `output` cannot be written.
    """
    archs = tuple(int(capability.replace(".", "")) for capability in capabilities)
    if unknown := [each for each, arch in zip(capabilities, archs, strict=True) if arch not in ARCHS]:
        raise UsageError(
            "HSTU-E901",
            f"--arch {unknown[0]} cannot be used",
            f"there are kernels for {', '.join(f'{arch // 10}.{arch % 10}' for arch in ARCHS)}",
            "pass one of them, or leave --arch out for all",
        )
    if tensorrt_version is not None and not re.fullmatch(r"\d{1,4}(\.\d{1,4}){0,3}", tensorrt_version, re.ASCII):
        raise UsageError(
            "HSTU-E901",
            f"--tensorrt-version {tensorrt_version} cannot be used",
            "it is not a version",
            "write it as 8.5.3, or leave it out for the installed TensorRT",
        )
    request = (
        plugin_request_of([load_onnx(model) for model in models], tensorrt_version or installed_tensorrt_version())
        if models
        else PluginBuildRequest(runtime_version=tensorrt_version)
    )
    library = build_plugin_library(dataclasses.replace(request, archs=archs, hopper=hopper))
    libraries = [path for path in (library.self_registering, library.version_compatible) if path is not None]
    if output is not None:
        with writing_to(output):
            output.mkdir(parents=True, exist_ok=True)
            libraries = [Path(shutil.copy2(path, output)) for path in libraries]
    return {
        "libraries": [str(path) for path in libraries],
        "trt_version": library.trt_version,
        "archs": list(library.archs),
        "with_ptx": library.with_ptx,
        "variants": [dataclasses.asdict(variant) for variant in library.variants],
        "norm_variants": [dataclasses.asdict(variant) for variant in library.norm_variants],
        "hopper": {**library.hopper.to_dict(), "summary": str(library.hopper)},
        "content_hash": library.content_hash,
    }
