"""Finds headers, builds and loads the libraries of plugins/. Level 2.

Input: kernel variants, architectures and, for the plugins, TensorRT headers. Output: shared objects in the user's cache
under a hash of everything they were made from. Importing this package imports neither torch, triton nor tensorrt.
"""

from __future__ import annotations

from hstu_compile.plugin_library.build_request import (
    HopperChoice,
    HopperKernels,
    PluginBuildRequest,
    Progress,
    default_cache_dir,
    plan_hopper_kernels,
)
from hstu_compile.plugin_library.headers import (
    SUPPORTED_MAJORS,
    TENSORRT_DISTRIBUTIONS,
    TensorRtHeaders,
    find_cuda_headers,
    find_tensorrt_headers,
    installed_tensorrt_version,
    read_tensorrt_version,
)
from hstu_compile.plugin_library.kernels import KERNELS_LIBRARY, KernelsLibrary, build_kernels_library
from hstu_compile.plugin_library.loading import load_plugin_library
from hstu_compile.plugin_library.plugin import (
    SELF_REGISTERING,
    VERSION_COMPATIBLE,
    PluginLibrary,
    build_plugin_library,
)

__all__ = [
    "KERNELS_LIBRARY",
    "SELF_REGISTERING",
    "SUPPORTED_MAJORS",
    "TENSORRT_DISTRIBUTIONS",
    "VERSION_COMPATIBLE",
    "HopperChoice",
    "HopperKernels",
    "KernelsLibrary",
    "PluginBuildRequest",
    "PluginLibrary",
    "Progress",
    "TensorRtHeaders",
    "build_kernels_library",
    "build_plugin_library",
    "default_cache_dir",
    "find_cuda_headers",
    "find_tensorrt_headers",
    "installed_tensorrt_version",
    "load_plugin_library",
    "plan_hopper_kernels",
    "read_tensorrt_version",
]
