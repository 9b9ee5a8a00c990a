"""Plugin libraries that several tests share: built once, kept in pytest's cache under their content hash."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from hstu_compile.errors import PluginError
from hstu_compile.plugin_library import (
    KernelsLibrary,
    PluginBuildRequest,
    PluginLibrary,
    build_kernels_library,
    build_plugin_library,
    find_cuda_headers,
    find_tensorrt_headers,
    read_tensorrt_version,
)
from hstu_compile.plugins.kernels.norm_variants import norm_variant
from hstu_compile.plugins.kernels.variants import hopper_variants_of, variants_for

#: The attention kernels of the CPU tests: no bias, without and with a cache, and the research model's two biases.
SMALL_VARIANTS = (
    *variants_for("float16", 16, 16),
    *variants_for("float16", 16, 16, has_cache=True),
    *variants_for("float16", 16, 16, pos_bias=True, time_bias=True),
)
#: The Hopper kernels that fit them, those with shared tiles but the plainest left to slow tests: nvcc takes 15 seconds
#: for the one with biases and 5 for the one with a cache.
SMALL_HOPPER = tuple(
    variant
    for variant in hopper_variants_of(SMALL_VARIANTS)
    if not (variant.shares and (variant.timestamp_bits or variant.has_cache))
)
#: The norm kernels of the CPU tests: one of a layer's output, one of each other activation.
SMALL_NORMS = (
    norm_variant("float16", "float16", 48, activation=1, gate_silu=True, concat=1),
    norm_variant("float16", "float16", 48),
    norm_variant("float16", "float16", 48, activation=2),
)


def plugin_cache(config: pytest.Config) -> Path:
    """Return a folder that outlives the test run; libraries in it are found by content."""
    assert config.cache is not None
    return config.cache.mkdir("hstu-plugin")


def small_library(config: pytest.Config, include_dir: Path | None = None) -> PluginLibrary:
    """Build the library with `SMALL_VARIANTS` and `SMALL_NORMS` for sm_90, against headers given or found.

    Skips by name where triton or the headers are not installed.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the kernels cannot be compiled")
    if include_dir is None:
        try:
            include_dir = find_tensorrt_headers().include_dir
        except PluginError as error:
            pytest.skip(f"no TensorRT headers: {error.why}")
    version = ".".join(map(str, read_tensorrt_version(include_dir)))
    return build_plugin_library(
        PluginBuildRequest(
            variants=SMALL_VARIANTS,
            hopper_variants=SMALL_HOPPER,
            norm_variants=SMALL_NORMS,
            archs=(90,),
            with_ptx=False,
            tensorrt_include_dir=include_dir,
            runtime_version=version,
            cache_dir=plugin_cache(config),
        )
    )


def small_kernels_library(config: pytest.Config) -> KernelsLibrary:
    """Build the library of attention kernels with `SMALL_VARIANTS` for sm_90.

    Skips by name where triton or CUDA's headers are not installed.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: the kernels cannot be compiled")
    try:
        cuda = find_cuda_headers()
    except PluginError as error:
        pytest.skip(f"no CUDA headers: {error.why}")
    return build_kernels_library(
        PluginBuildRequest(
            variants=SMALL_VARIANTS,
            hopper_variants=SMALL_HOPPER,
            archs=(90,),
            with_ptx=False,
            cuda_include_dir=cuda,
            cache_dir=plugin_cache(config),
        )
    )


def headers_of_major(major: int) -> Path:
    """Return headers of a major version, named by HSTU_TEST_TENSORRT<major>_INCLUDE_DIR; skips without them."""
    variable = f"HSTU_TEST_TENSORRT{major}_INCLUDE_DIR"
    candidates = [os.environ.get(variable), os.environ.get("TENSORRT_INCLUDE_DIR")]
    for candidate in filter(None, candidates):
        if read_tensorrt_version(Path(candidate))[0] == major:
            return Path(candidate)
    pytest.skip(f"no TensorRT {major} headers: set {variable} to the include folder of a TensorRT {major} release")
