"""Builds the library of the kernels without TensorRT, for hosts that run them between engines of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hstu_compile.plugin_library.build_request import HopperKernels, PluginBuildRequest, Progress, resolve_kernels
from hstu_compile.plugin_library.building import Recipe, build_recipe
from hstu_compile.plugins.kernels.norm_variants import NormVariant
from hstu_compile.plugins.kernels.variants import KernelVariant

KERNELS_LIBRARY = "libhstu_attention_kernels.so"


@dataclasses.dataclass(frozen=True)
class KernelsLibrary:
    """A built library with the interface of plugins/api/hstuAttentionKernels.h.

    Attributes:
        path: the library; linked to neither TensorRT nor CUDA.
        variants: attention kernels inside.
        norm_variants: norm kernels inside.
        archs: compute capabilities inside.
        with_ptx: whether PTX for other GPUs is inside.
        hopper: its Hopper kernels, or why it has none.
        content_hash: of sources, tools and options.
    """

    path: Path
    variants: tuple[KernelVariant, ...]
    norm_variants: tuple[NormVariant, ...]
    archs: tuple[int, ...]
    with_ptx: bool
    hopper: HopperKernels
    content_hash: str

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON, with the file's name for its path."""
        return {
            "file": self.path.name,
            "variants": [dataclasses.asdict(variant) for variant in self.variants],
            "norm_variants": [dataclasses.asdict(variant) for variant in self.norm_variants],
            "archs": list(self.archs),
            "with_ptx": self.with_ptx,
            "hopper": self.hopper.to_dict(),
            "content_hash": self.content_hash,
        }


def build_kernels_library(request: PluginBuildRequest, progress: Progress | None = None) -> KernelsLibrary:
    """Build the kernels' library, or take it from the cache; see `build_recipe`.

    Args:
        request: what to build. Norm kernels are those that it names, none where it names none; what it says of
            TensorRT is not read.
        progress: called with (stage, done, total); stages are "kernels" and "library". Not called on a cache hit.

    Raises:
        PluginError: HSTU-E501 if a tool or CUDA's headers are missing or a compiler fails.
    """
    kernels = resolve_kernels(request, norm_variants=request.norm_variants or ())
    recipe = Recipe(target="hstu_attention_kernels", files=(KERNELS_LIBRARY,), kernels=kernels)
    built = build_recipe(recipe, request, progress)
    return KernelsLibrary(
        path=built.path / KERNELS_LIBRARY,
        variants=kernels.variants,
        norm_variants=kernels.norm_variants,
        archs=kernels.archs,
        with_ptx=kernels.with_ptx,
        hopper=kernels.hopper,
        content_hash=built.content_hash,
    )
