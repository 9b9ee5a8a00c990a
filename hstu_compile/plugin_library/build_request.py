"""What to build a library from: kernels and architectures, and the tools that are there for them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from hstu_compile.errors import PluginError
from hstu_compile.plugins.kernels.hopper.compile import usable_nvcc
from hstu_compile.plugins.kernels.hopper.variants import HOPPER_ARCH, HopperVariant
from hstu_compile.plugins.kernels.norm_variants import NormVariant
from hstu_compile.plugins.kernels.variants import ARCHS, KernelVariant, default_variants, hopper_variants_of

Progress = Callable[[str, int, int], None]
#: Whether a library gets the Hopper kernels: where they fit and nvcc is there, in any case, or not.
HopperChoice = Literal["auto", "require", "off"]


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


def default_cache_dir() -> Path:
    """Return the user's cache folder: $XDG_CACHE_HOME/hstu-compile, or ~/.cache/hstu-compile."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hstu-compile"


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


@dataclasses.dataclass(frozen=True)
class KernelSet:
    """The kernels of one library; the attributes are those of a request, with every default taken."""

    variants: tuple[KernelVariant, ...]
    norm_variants: tuple[NormVariant, ...]
    archs: tuple[int, ...]
    with_ptx: bool
    hopper: HopperKernels


def resolve_kernels(request: PluginBuildRequest, norm_variants: tuple[NormVariant, ...]) -> KernelSet:
    """Take the defaults for what a request leaves open.

    Args:
        request: what was asked for.
        norm_variants: norm kernels of the library, which its kind decides.

    Raises:
        PluginError: HSTU-E501 if Hopper kernels are required and cannot be built.
    """
    variants = request.variants or default_variants()
    archs = request.archs or ARCHS
    wanted = hopper_variants_of(variants) if request.hopper_variants is None else request.hopper_variants
    hopper = plan_hopper_kernels(request.hopper, wanted, archs)
    return KernelSet(variants, norm_variants, archs, request.with_ptx, hopper)
