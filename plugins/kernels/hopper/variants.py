"""Which Hopper kernels exist, and the tile of each. Level: kernels, pure Python."""

from __future__ import annotations

from dataclasses import dataclass

#: Compute capability that the kernels are for, as 10 * major + minor; the code is specific to it (sm_90a).
HOPPER_ARCH = 90
#: C++ type of each dtype.
ELEMENT_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
#: Padded head dims: the tensor copies fill what lies beyond the real one with zeros.
BLOCK_DIMS = (64, 128, 256)
#: Head dims must be multiples of this, and tensors 16-byte aligned, or the tensor copies cannot address rows.
DIM_MULTIPLE = 8
#: Bytes of the schedule, the barriers and the tiles' descriptions, rounded up; the source asserts that they fit.
_BOOKKEEPING_BYTES = 4096 + 768
#: A block's memory begins at a multiple of this, and its struct ends at one.
_ALIGNMENT = 1024


@dataclass(frozen=True)
class HopperTile:
    """How one kernel divides its work.

    Attributes:
        warpgroups: that multiply, 64 query rows each.
        block_n: keys of a step.
        stages: key and value tiles that are copied ahead.
        turns: warpgroups issue their products in turns.
        reason: why these numbers.
    """

    warpgroups: int
    block_n: int
    stages: int
    turns: bool
    reason: str


@dataclass(frozen=True, order=True)
class HopperVariant:
    """Compile-time switches of one kernel.

    Attributes:
        dtype: "float16" or "bfloat16".
        block_dim: padded head dim of queries, keys and values, one of ``BLOCK_DIMS``.
        plain_causal: no targets, no contextual prefix, no window; else every mask of the contract.
        split: blocks that share a tile of query rows, 1 or 2; 2 is for launches with fewer tiles than the GPU has SMs.
    """

    dtype: str
    block_dim: int
    plain_causal: bool
    split: int = 1

    def __post_init__(self) -> None:
        """Refuse what no kernel is compiled for."""
        if self.dtype not in ELEMENT_TYPES:
            raise ValueError(f"dtype must be one of {sorted(ELEMENT_TYPES)}, got {self.dtype!r}")
        if self.block_dim not in BLOCK_DIMS:
            raise ValueError(f"block_dim must be one of {BLOCK_DIMS}, got {self.block_dim}")
        if self.split not in ((1,) if self.block_dim == 256 else (1, 2)):
            # With 256 columns there is no room for the sums that the blocks exchange.
            raise ValueError(f"split must be 1, or 2 up to 128 columns, got {self.split} at {self.block_dim}")


# Times on an H100, bf16, 4 heads, 65,536 tokens; NOTES.md has all of them.
_TILES = {
    (64, 1): HopperTile(2, 128, 4, True, "three warpgroups gain 6 % at 8192 keys and lose 16 % at 1024, 30 % at 256"),
    (64, 2): HopperTile(2, 128, 4, True, "as without a split"),
    (128, 1): HopperTile(2, 128, 2, True, "64 + 64 + 32 registers of sums, scores and weights of 232"),
    (128, 2): HopperTile(2, 128, 2, True, "as without a split; one query buffer makes room for the exchange"),
    (256, 1): HopperTile(
        2, 64, 2, False, "128 registers of sums leave 32 + 16 for scores and weights; turns lose 1 to 8 %"
    ),
}


def tile_of(variant: HopperVariant) -> HopperTile:
    """Return the tile that a variant is compiled with."""
    return _TILES[variant.block_dim, variant.split]


def query_buffers(variant: HopperVariant) -> int:
    """Return how many query tiles lie in shared memory at once."""
    return 2 if variant.block_dim <= 128 and variant.split == 1 else 1


def shared_bytes(variant: HopperVariant) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    tile = tile_of(variant)
    block_m = 64 * tile.warpgroups
    rows = query_buffers(variant) * block_m + 2 * tile.stages * tile.block_n
    exchange = block_m * 2 * variant.block_dim // 4 * 4 if variant.split > 1 else 0
    used = rows * variant.block_dim * 2 + exchange + _BOOKKEEPING_BYTES
    return -(-used // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT - 1


def block_dim_of(dqk: int, dv: int) -> int | None:
    """Return the padded head dim that holds both, or None where the portable kernel has to do.

    >>> block_dim_of(96, 96), block_dim_of(25, 25), block_dim_of(64, 128)
    (128, None, 128)
    """
    if dqk % DIM_MULTIPLE or dv % DIM_MULTIPLE or not 1 <= max(dqk, dv) <= BLOCK_DIMS[-1]:
        return None
    return next(dim for dim in BLOCK_DIMS if dim >= max(dqk, dv))


def hopper_variants_for(dtype: str, dqk: int, dv: int, *, plain_causal: bool = False) -> tuple[HopperVariant, ...]:
    """Return the Hopper kernels that one model can use: none for float32 or for head dims they cannot address.

    Args:
        dtype: of the engine's attention: "float32", "float16" or "bfloat16".
        dqk: query and key head dim; dv the same for values.
        plain_causal: the model has no targets, contextual prefix or window.
    """
    dim = block_dim_of(dqk, dv)
    if dim is None or dtype not in ELEMENT_TYPES:
        return ()
    splits = (1, 2) if dim <= 128 else (1,)
    return tuple(HopperVariant(dtype, dim, plain_causal, split) for split in splits)


#: A launch with fewer tiles an SM than this is split: whole tiles would leave SMs idle at its end. Measured at head dim
#: 128 on 132 SMs: 144 tiles gain 10 %, 256 lose 12 %.
_LEAST_TILES_PER_SM = 1.5


def chosen_split(block_dim: int, lq: int, heads: int, multiprocessors: int) -> int:
    """Return into how many blocks each tile of a launch is split, from what the host knows without the offsets."""
    if block_dim > 128:
        return 1
    block_m = 64 * _TILES[block_dim, 1].warpgroups
    tiles = -(-lq // block_m) * heads
    return 2 if tiles < _LEAST_TILES_PER_SM * multiprocessors else 1
