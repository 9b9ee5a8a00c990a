"""`hstu-compile plugin build`: compile the plugin library on its own. Level 5, without torch at import."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hstu_compile.engine_stage import load_onnx
from hstu_compile.files import writing_to
from hstu_compile.graph_plugin import plugin_request_of
from hstu_compile.plugin_library import (
    HopperChoice,
    PluginBuildRequest,
    build_plugin_library,
    installed_tensorrt_version,
)


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
        PluginError: HSTU-E501 or E502.
        BundleError: HSTU-E802, if `output` cannot be written.
    """
    request = (
        plugin_request_of([load_onnx(model) for model in models], tensorrt_version or installed_tensorrt_version())
        if models
        else PluginBuildRequest(runtime_version=tensorrt_version)
    )
    archs = tuple(int(capability.replace(".", "")) for capability in capabilities)
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
