"""Builds the two plugin libraries of one major version of TensorRT."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hstu_compile.plugin_library.build_request import HopperKernels, PluginBuildRequest, Progress, resolve_kernels
from hstu_compile.plugin_library.building import Recipe, build_recipe
from hstu_compile.plugin_library.headers import find_tensorrt_headers, installed_tensorrt_version
from hstu_compile.plugins.kernels.norm_variants import NormVariant, default_norm_variants
from hstu_compile.plugins.kernels.variants import KernelVariant

SELF_REGISTERING = "libhstu_trt_plugin.so"
VERSION_COMPATIBLE = "libhstu_trt_plugin_vc.so"


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


def build_plugin_library(request: PluginBuildRequest, progress: Progress | None = None) -> PluginLibrary:
    """Build the plugin libraries, or take them from the cache; see `build_recipe`.

    Args:
        request: what to build.
        progress: called with (stage, done, total); stages are "kernels" and "library". Not called on a cache hit.

    Raises:
        PluginError: HSTU-E501 if a tool or header is missing or a compiler fails, HSTU-E502 if the headers are not of
            the runtime's version.
    """
    runtime_version = request.runtime_version or installed_tensorrt_version()
    headers = find_tensorrt_headers(request.tensorrt_include_dir, runtime_version)
    norm_variants = request.norm_variants
    if norm_variants is None:
        norm_variants = () if request.variants else default_norm_variants()
    kernels = resolve_kernels(request, norm_variants)
    version = ".".join(map(str, headers.version))
    recipe = Recipe(
        target="hstu_plugins",
        files=(SELF_REGISTERING, VERSION_COMPATIBLE),
        kernels=kernels,
        headers=tuple(headers.include_dir.glob("NvInfer*.h")),
        definitions={"HSTU_TENSORRT_INCLUDE_DIR": str(headers.include_dir.resolve())},
        facts={"trt_version": version},
    )
    built = build_recipe(recipe, request, progress)
    version_compatible = built.path / VERSION_COMPATIBLE
    return PluginLibrary(
        self_registering=built.path / SELF_REGISTERING,
        version_compatible=version_compatible if version_compatible.exists() else None,
        trt_version=version,
        variants=kernels.variants,
        norm_variants=kernels.norm_variants,
        archs=kernels.archs,
        with_ptx=kernels.with_ptx,
        hopper=kernels.hopper,
        content_hash=built.content_hash,
    )
