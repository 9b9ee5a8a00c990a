"""Which norm kernels to compile: one :class:`NormVariant` per set of compile-time switches, and how each is tiled.

Level: kernels, pure Python, imports neither triton nor torch, so that a build can be planned without them.
"""

from __future__ import annotations

from dataclasses import dataclass

from hstu_compile.plugins.kernels.variants import DTYPE_CODES, PTX_ARCH, check_archs

#: Widest segment, in columns: 8192 numbers are 16 a thread of the largest block.
MAX_WIDTH = 8192
_MIN_BLOCK = 16
#: Width up to which a program's loads are one 16-byte vector of halves a thread: 128 threads of 8 numbers.
_NUMBERS = 1024


@dataclass(frozen=True, order=True)
class NormVariant:
    """Compile-time switches of one norm kernel.

    Attributes:
        input_type: of x and gate: "float32", "float16" or "bfloat16".
        output_type: of out, likewise.
        block: padded width of a segment, a power of two in [16, 8192].
        aligned: pointers are 16-byte aligned and the width of a segment is a multiple of 16.
        activation: 0 the normed rows, 1 times gate, 2 the rows times the sigmoid of the normed rows.
        gate_silu: with activation 1, SiLU of gate takes its place.
        concat: with activation 1, what stands in front of the result: 0 nothing, 1 gate and rows, 2 gate and normed
            rows.
    """

    input_type: str
    output_type: str
    block: int
    aligned: bool
    activation: int
    gate_silu: bool
    concat: int

    def __post_init__(self) -> None:
        """Refuse values that no kernel is compiled for."""
        for name in (self.input_type, self.output_type):
            if name not in DTYPE_CODES:
                raise ValueError(f"the type of a norm kernel must be one of {sorted(DTYPE_CODES)}, got {name!r}")
        if not _MIN_BLOCK <= self.block <= MAX_WIDTH or self.block & (self.block - 1):
            raise ValueError(
                f"the padded width must be a power of two from {_MIN_BLOCK} to {MAX_WIDTH}, got {self.block}"
            )
        if self.activation not in (0, 1, 2) or self.concat not in (0, 1, 2):
            raise ValueError(f"activation and concat must be 0, 1 or 2, got {self.activation} and {self.concat}")
        if self.activation != 1 and (self.gate_silu or self.concat):
            raise ValueError(f"gate_silu and concat go with activation 1, got activation {self.activation}")


@dataclass(frozen=True)
class NormTile:
    """How a norm kernel divides its work.

    Attributes:
        segments: of one program, a power of two.
        num_warps: of one program.
    """

    segments: int
    num_warps: int


def norm_tile(block: int) -> NormTile:
    """Return the tile of a padded width.

    Norms are bound by memory at large R and by the launch at small R, so what counts is full vectors, enough bytes on
    the way and programs for every SM: a scoring pass of 256 rows of 512 has 128 programs for 132 SMs.  Up to 1024
    columns a program takes 1024 numbers with 4 warps, 8 a thread.  Beyond, it is one segment with 8 numbers a thread as
    long as a block's 16 warps allow (4096 columns), then 16: more warps would leave room for one block an SM only.

    >>> [norm_tile(block) for block in (16, 512, 2048, 8192)]  # doctest: +NORMALIZE_WHITESPACE
    [NormTile(segments=64, num_warps=4), NormTile(segments=2, num_warps=4), NormTile(segments=1, num_warps=8),
     NormTile(segments=1, num_warps=16)]
    """
    if block <= _NUMBERS:
        return NormTile(_NUMBERS // block, 4)
    return NormTile(1, min(16, block // 256))


@dataclass(frozen=True)
class NormTask:
    """One norm kernel to compile: a variant, its tile and its capability; ``is_ptx`` asks for PTX text."""

    variant: NormVariant
    tile: NormTile
    arch: int
    is_ptx: bool


def norm_variant(
    input_type: str,
    output_type: str,
    width: int,
    *,
    num_groups: int = 1,
    activation: int = 0,
    gate_silu: bool = False,
    concat: int = 0,
) -> NormVariant:
    """Return the kernel that one node needs.

    Args:
        input_type: of x and gate; output_type of out.
        width: columns of a row, in [1, 8192].
        num_groups: divides it.
        activation: of the contract, as are gate_silu and concat; without meaning for other activations they are
            ignored.

    Raises:
        ValueError: if a value is out of range.
    """
    if not 1 <= width <= MAX_WIDTH or num_groups < 1 or width % num_groups:
        raise ValueError(f"a norm's width must be in [1, {MAX_WIDTH}] and its groups divide it: {width}, {num_groups}")
    segment = width // num_groups
    is_gate = activation == 1
    return NormVariant(
        input_type=input_type,
        output_type=output_type,
        block=max(_MIN_BLOCK, 1 << (segment - 1).bit_length()),
        aligned=segment % 16 == 0,
        activation=activation,
        gate_silu=is_gate and gate_silu,
        concat=concat if is_gate else 0,
    )


def default_norm_variants() -> tuple[NormVariant, ...]:
    """Return the norms of a library that is built for no model in particular, beside `default_variants`.

    Half precision at the published widths: rankers of width 512 with MLPs of 256, and retrieval models of width 50.
    """
    ranking = [
        norm_variant("float16", output, width, activation=activation)
        for width in (256, 512)
        for output, activation in (("float16", 0), ("float16", 2), ("float32", 0))
    ]
    return (
        *ranking,
        norm_variant("float16", "float16", 512, activation=1, gate_silu=True, concat=1),
        norm_variant("float16", "float16", 50),
        norm_variant("float16", "float16", 50, activation=1),
    )


def norm_tasks(variants: tuple[NormVariant, ...], archs: tuple[int, ...], *, with_ptx: bool) -> tuple[NormTask, ...]:
    """Return every kernel of ``variants``: one per architecture, and one as PTX.

    Raises:
        ValueError: if an architecture is not one of ``ARCHS``.
    """
    check_archs(archs)
    tasks = []
    for variant in dict.fromkeys(variants):
        tile = norm_tile(variant.block)
        tasks += [NormTask(variant, tile, arch, is_ptx=False) for arch in dict.fromkeys(archs)]
        if with_ptx:
            tasks.append(NormTask(variant, tile, PTX_ARCH, is_ptx=True))
    return tuple(tasks)
