"""Which kernels to compile: one :class:`KernelVariant` per set of compile-time switches.

Level: kernels, pure Python, imports neither triton nor torch, so that a build can be planned without them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hstu_compile.plugins.kernels.hopper.variants import HopperVariant, hopper_variants_for
from hstu_compile.plugins.kernels.tiles import TileConfig, tile_configs

#: Architectures that get a cubin, as compute capability major * 10 + minor.
ARCHS = (80, 86, 89, 90, 100, 120)
#: The PTX that covers every other GPU is for this capability: see kernels/README.md.
PTX_ARCH = 80
#: ``HstuKernelImage::dtype``.
DTYPE_CODES = {"float32": 0, "float16": 1, "bfloat16": 2}


@dataclass(frozen=True, order=True)
class KernelVariant:
    """Compile-time switches of one kernel, before its tile is chosen.

    Attributes:
        dtype: of q, k, v and out: "float32", "float16" or "bfloat16".
        block_dqk: padded query and key head dim, a power of two in [16, 256]; block_dv the same for values.
        aligned: pointers are 16-byte aligned and Dqk and Dv are multiples of 16.
        pos_bias: the position bias is compiled in; time_bias likewise.
        timestamp_bits: 64 or 32; 0 without a time bias.
        mask_kind: 0 = plain causal (no targets, context or window), 1 = every mask.
        has_cache: keys lie in two segments, cached and new rows; a kernel without runs no node that has a cache, and
            one with runs no node that has none.
    """

    dtype: str
    block_dqk: int
    block_dv: int
    aligned: bool
    pos_bias: bool
    time_bias: bool
    timestamp_bits: int
    mask_kind: int
    has_cache: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no kernel is compiled for."""
        if self.dtype not in DTYPE_CODES:
            raise ValueError(f"kernel dtype must be one of {sorted(DTYPE_CODES)}, got {self.dtype!r}")
        legal_blocks = (16, 32, 64, 128, 256)
        if self.block_dqk not in legal_blocks or self.block_dv not in legal_blocks:
            raise ValueError(f"padded head dims must be in {legal_blocks}, got {self.block_dqk} and {self.block_dv}")
        if self.timestamp_bits not in ((32, 64) if self.time_bias else (0,)):
            raise ValueError(
                "timestamp_bits must be 32 or 64 with a time bias and 0 without, "
                f"got {self.timestamp_bits} with time_bias={self.time_bias}"
            )
        if self.mask_kind not in (0, 1):
            raise ValueError(f"mask_kind must be 0 (plain causal) or 1 (every mask), got {self.mask_kind}")


@dataclass(frozen=True)
class CompileTask:
    """One kernel to compile: a variant, its tile and its capability; ``is_ptx`` asks for PTX text."""

    variant: KernelVariant
    tile: TileConfig
    arch: int
    is_ptx: bool


def padded_dim(dim: int) -> int:
    """Return the power of two, at least 16, that holds a head dim.

    >>> [padded_dim(d) for d in (1, 16, 25, 50, 128, 200)]
    [16, 16, 32, 64, 128, 256]

    Raises:
        ValueError: if dim is not in [1, 256].
    """
    if not 1 <= dim <= 256:
        raise ValueError(f"head dim must be in [1, 256], got {dim}")
    return max(16, 1 << (dim - 1).bit_length())


def variants_for(
    dtype: str,
    dqk: int,
    dv: int,
    *,
    pos_bias: bool = False,
    time_bias: bool = False,
    timestamp_bits: int = 64,
    mask_kinds: tuple[int, ...] = (1,),
    has_cache: bool = False,
) -> tuple[KernelVariant, ...]:
    """Return the variants that one model needs.

    Args:
        dtype: of the engine's attention: "float32", "float16" or "bfloat16".
        dqk: query and key head dim, in [1, 256]; dv the same for values.
        pos_bias: the model adds a position bias; time_bias likewise.
        timestamp_bits: 64, or 32 where the runtime has no int64 (TensorRT 8); ignored without a time bias.
        mask_kinds: (1,) runs every mask; (0,) is the smaller kernel of models without targets, context and window.
        has_cache: of graphs that read cached keys.

    Raises:
        ValueError: if a value is out of range.
    """
    return tuple(
        KernelVariant(
            dtype=dtype,
            block_dqk=padded_dim(dqk),
            block_dv=padded_dim(dv),
            aligned=dqk % 16 == 0 and dv % 16 == 0,
            pos_bias=pos_bias,
            time_bias=time_bias,
            timestamp_bits=timestamp_bits if time_bias else 0,
            mask_kind=kind,
            has_cache=has_cache,
        )
        for kind in mask_kinds
    )


def default_variants() -> tuple[KernelVariant, ...]:
    """Return the variants of a library that is built for no model in particular.

    Half precision at the head dims of the published configurations, every mask: ranking models without a bias at 64 and
        128, and
    retrieval models with position and time bias at 64 (padded from 25 or 50, hence without alignment).  Anything else
    is one ``variants_for`` away; a library for every combination would be 300 variants.
    """
    return (
        *variants_for("float16", 128, 128),
        *variants_for("bfloat16", 128, 128),
        *variants_for("float16", 64, 64),
        *variants_for("float16", 50, 50, pos_bias=True, time_bias=True),
    )


def hopper_variants_of(variants: Iterable[KernelVariant]) -> tuple[HopperVariant, ...]:
    """Return the Hopper kernels that run, on compute capability 9.0, what these portable kernels run; each once.

    There are none for float32.  A portable kernel knows its padded head dims only.  One that is not aligned is for head
    dims that are no multiples of 16, of which most are no multiples of 8 either, so it gets none: who knows the head
    dims asks ``hopper_variants_for``.
    """
    found: dict[HopperVariant, None] = {}
    for variant in variants:
        if variant.aligned:
            fitting = hopper_variants_for(
                variant.dtype,
                variant.block_dqk,
                variant.block_dv,
                plain_causal=variant.mask_kind == 0,
                pos_bias=variant.pos_bias,
                time_bias=variant.time_bias,
                timestamp_bits=variant.timestamp_bits,
                has_cache=variant.has_cache,
            )
            found.update(dict.fromkeys(fitting))
    return tuple(found)


def _tiles_of(variant: KernelVariant, arch: int) -> tuple[TileConfig, ...]:
    return tile_configs(
        arch,
        variant.dtype,
        variant.block_dqk,
        variant.block_dv,
        pos_bias=variant.pos_bias,
        time_bias=variant.time_bias,
    )


def check_archs(archs: Iterable[int]) -> None:
    """Refuse a capability without kernels.

    Raises:
        ValueError: naming every one that is not in ``ARCHS``.
    """
    if unknown := sorted(set(archs) - set(ARCHS)):
        raise ValueError(f"no kernels for compute capability {unknown}; choose from {ARCHS}")


def compile_tasks(
    variants: tuple[KernelVariant, ...], archs: tuple[int, ...], *, with_ptx: bool = True
) -> tuple[CompileTask, ...]:
    """Return every kernel of ``variants``: one per architecture and tactic, and the first tactic as PTX.

    Raises:
        ValueError: if an architecture is not one of ``ARCHS``.
    """
    check_archs(archs)
    tasks = []
    for variant in dict.fromkeys(variants):
        for arch in dict.fromkeys(archs):
            tasks += [CompileTask(variant, tile, arch, is_ptx=False) for tile in _tiles_of(variant, arch)]
        if with_ptx:
            # The first tactic on the smallest shared memory runs on every GPU.
            tasks.append(CompileTask(variant, _tiles_of(variant, 86)[0], PTX_ARCH, is_ptx=True))
    return tuple(tasks)
