"""Which Hopper kernels exist, and the tile of each. Level: kernels, pure Python."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

#: Compute capability that the kernels are for, as 10 * major + minor; the code is specific to it (sm_90a).
HOPPER_ARCH = 90
#: C++ type of each dtype.
ELEMENT_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
#: Padded head dims: the tensor copies fill what lies beyond the real one with zeros.
BLOCK_DIMS = (64, 128, 256)
#: Head dims must be multiples of this, and tensors 16-byte aligned, or the tensor copies cannot address rows.
DIM_MULTIPLE = 8
#: Columns of one product instruction.
_STEP = 16
#: Bytes of the schedule, the barriers and the tiles' descriptions, rounded up; the source asserts that they fit.
_BOOKKEEPING_BYTES = 256 * (8 + 4 + 36) + 768
#: Heads with a time table of their own that a block has room for.
MOST_TIME_HEADS = 8
#: Per cell of bias.cuh two thresholds, a bucket, and two values per head; the thresholds that make it; and a flag.
_TIME_TABLE_BYTES = 248 * 4 * (3 + 2 * MOST_TIME_HEADS) + 256 * 4 + 8
#: The struct of a block's memory ends at a multiple of this.
_ALIGNMENT = 1024


#: How SiLU is computed; the errors are derived in silu.cuh. "fast" adds up to 2^-12 of the weight that the score's
#: magnitude has, half of what float16 rounds it by; "accurate" a few times 2^-23 of the weight itself.
Silu = Literal["fast", "accurate"]
SILU_FORMS: tuple[Silu, ...] = get_args(Silu)


class Turns(enum.IntEnum):
    """When a warpgroup that multiplies lets the next one begin, so that one multiplies while another computes SiLU."""

    #: They do not wait for each other.
    NONE = 0
    #: When its products have been issued.
    PRODUCTS = 1
    #: When its scores are there; only then are the values multiplied.
    SCORES = 2


@dataclass(frozen=True)
class HopperTile:
    """How one kernel divides its work.

    Attributes:
        warpgroups: that multiply, 64 query rows each.
        block_n: keys of a step.
        stages: key and value tiles that are copied ahead.
        turns: of the warpgroups.
        held_steps: of the queries' columns, 16 a step, those that stay in registers.
        reason: why these numbers.
    """

    warpgroups: int
    block_n: int
    stages: int
    turns: Turns
    held_steps: int
    reason: str


@dataclass(frozen=True, order=True)
class HopperVariant:
    """Compile-time switches of one kernel.

    Attributes:
        dtype: "float16" or "bfloat16".
        block_dim: padded head dim of queries, keys and values, one of ``BLOCK_DIMS``.
        plain_causal: no targets, no contextual prefix, no window; else every mask of the contract.
        shares: the blocks of a cluster share a tile of query rows; a launch says how many. For those with fewer tiles
            than the GPU has SMs.
        pos_bias: adds the position bias.
        timestamp_bits: of the timestamps of a time bias, 32 or 64; 0 without one.
        is_accurate: SiLU by an exponential and a reciprocal instead of a tanh.
        has_cache: a sequence's first keys and values lie in two tensors of their own.
    """

    dtype: str
    block_dim: int
    plain_causal: bool
    shares: bool = False
    pos_bias: bool = False
    timestamp_bits: int = 0
    is_accurate: bool = False
    has_cache: bool = False

    def __post_init__(self) -> None:
        """Refuse what no kernel is compiled for."""
        if self.dtype not in ELEMENT_TYPES:
            raise ValueError(f"dtype must be one of {sorted(ELEMENT_TYPES)}, got {self.dtype!r}")
        if self.block_dim not in BLOCK_DIMS:
            raise ValueError(f"block_dim must be one of {BLOCK_DIMS}, got {self.block_dim}")
        has_bias = self.pos_bias or self.timestamp_bits > 0
        if self.shares and not can_share(self.block_dim, is_accurate=self.is_accurate, has_bias=has_bias):
            raise ValueError(f"no tiles are shared at block_dim {self.block_dim} with an accurate SiLU or a bias")
        if self.timestamp_bits not in (0, 32, 64):
            raise ValueError(f"timestamp_bits must be 0, 32 or 64, got {self.timestamp_bits}")


# Gains are those in NOTES.md: an H100, bf16, 4 heads, 65,536 tokens (results/attention_versions.csv).
_TILES = {
    64: HopperTile(
        2, 128, 4, Turns.SCORES, 4, "SiLU takes as long as the products: turns until scores are there gain 10 %"
    ),
    128: HopperTile(
        2, 128, 2, Turns.PRODUCTS, 8, "64 + 64 + 32 + 32 registers of sums, scores, weights and queries of 232"
    ),
    256: HopperTile(
        2,
        64,
        2,
        Turns.NONE,
        4,
        "128 registers of sums leave 32 + 16 + 16 for scores, weights and queries; turns lose 4 %",
    ),
}


def tile_of(variant: HopperVariant) -> HopperTile:
    """Return the tile that a variant is compiled with."""
    tile = _TILES[variant.block_dim]
    if variant.is_accurate:
        # The powers and reciprocals in flight need the registers: with held queries these kernels spill at head dims 64
        # and 128.
        return replace(tile, held_steps=0, reason="no registers for what the tanh's tile holds")
    # What biases are looked up with, what blocks exchange and what finds rows outside a cache needs the registers.
    is_wide, is_widest = variant.block_dim > 64, variant.block_dim > 128
    needs_registers = (
        variant.timestamp_bits > 0
        or (variant.shares and is_wide)
        or ((variant.has_cache or variant.pos_bias) and is_widest)
    )
    return replace(tile, held_steps=0) if needs_registers else tile


def can_share(block_dim: int, *, is_accurate: bool, has_bias: bool) -> bool:
    """Return whether there is a kernel whose blocks share tiles: not where it would spill.

    >>> can_share(256, is_accurate=False, has_bias=False), can_share(256, is_accurate=True, has_bias=False)
    (True, False)
    """
    return block_dim < BLOCK_DIMS[-1] or not (is_accurate or has_bias)


def query_buffers(variant: HopperVariant) -> int:
    """Return how many query tiles lie in shared memory at once: one where registers or shared memory hold no other."""
    holds_queries = tile_of(variant).held_steps * _STEP == variant.block_dim
    return 2 if variant.block_dim <= 128 and not variant.shares and not holds_queries else 1


def shared_bytes(variant: HopperVariant) -> int:
    """Return the dynamic shared memory of a block, in bytes."""
    tile = tile_of(variant)
    block_m = 64 * tile.warpgroups
    rows = query_buffers(variant) * block_m + 2 * tile.stages * tile.block_n
    times = _TIME_TABLE_BYTES if variant.timestamp_bits else 0
    used = rows * variant.block_dim * 2 + times + _BOOKKEEPING_BYTES
    return -(-used // _ALIGNMENT) * _ALIGNMENT


def block_dim_of(dqk: int, dv: int) -> int | None:
    """Return the padded head dim that holds both, or None where the portable kernel has to do.

    >>> block_dim_of(96, 96), block_dim_of(25, 25), block_dim_of(64, 128)
    (128, None, 128)
    """
    if dqk % DIM_MULTIPLE or dv % DIM_MULTIPLE or not 1 <= max(dqk, dv) <= BLOCK_DIMS[-1]:
        return None
    return next(dim for dim in BLOCK_DIMS if dim >= max(dqk, dv))


def check_silu(silu: str) -> None:
    """Refuse a form of SiLU that does not exist.

    Raises:
        ValueError: naming those that do.
    """
    if silu not in SILU_FORMS:
        raise ValueError(f"silu must be one of {', '.join(SILU_FORMS)}, got {silu!r}")


def silu_code(silu: str) -> int:
    """Return a form of SiLU as the contract's attribute has it.

    Raises:
        ValueError: naming the forms that there are.

    >>> silu_code("fast"), silu_code("accurate")
    (0, 1)
    """
    check_silu(silu)
    return int(silu == "accurate")


def hopper_variants_for(
    dtype: str,
    dqk: int,
    dv: int,
    *,
    plain_causal: bool = False,
    pos_bias: bool = False,
    time_bias: bool = False,
    timestamp_bits: int = 64,
    silu: Silu = "fast",
    has_cache: bool = False,
) -> tuple[HopperVariant, ...]:
    """Return the Hopper kernels that one model can use: none for float32 or for head dims they cannot address.

    Args:
        dtype: of the engine's attention: "float32", "float16" or "bfloat16".
        dqk: query and key head dim; dv the same for values.
        plain_causal: the model has no targets, contextual prefix or window.
        pos_bias: the model adds a position bias; time_bias likewise.
        timestamp_bits: 64 or 32; ignored without a time bias.
        silu: "fast" or "accurate".
        has_cache: the model reads cached keys.

    Raises:
        ValueError: silu is neither.
    """
    check_silu(silu)
    dim = block_dim_of(dqk, dv)
    if dim is None or dtype not in ELEMENT_TYPES:
        return ()
    bits = timestamp_bits if time_bias else 0
    is_accurate = silu == "accurate"
    sharing = (False, True) if can_share(dim, is_accurate=is_accurate, has_bias=pos_bias or time_bias) else (False,)
    return tuple(
        HopperVariant(dtype, dim, plain_causal, shares, pos_bias, bits, is_accurate, has_cache) for shares in sharing
    )


#: Blocks of a cluster that share a tile. Eight are as many as a launch may ask for of every GPU.
SPLITS = (1, 2, 4, 8)
#: The part of the SMs that clusters of more than two are taken to find: a cluster lies in one GPC, whose 16 or 18 SMs
#: hold whole ones only, and some GPCs may have fewer. Of an H100's 132 SMs, 28 clusters of 4 and 14 of 8.
_USED_BY_CLUSTERS = 7 / 8
#: What the first exchange of a launch costs beside a launch without clusters, in key tiles of the head dim 128. For two
#: blocks measured (results/attention_versions.csv: 2.8 us, a key tile takes 1.25 us); for four and eight what they send
#: more, half and three quarters of it, at the speed that two blocks reach.
_EXCHANGE = {2: 2.2, 4: 2.6, 8: 3.0}
#: What each further tile of a cluster costs, measured with two blocks: an exchange that its next tile waits for, and an
#: imbalance that is larger where sequences are taken one after the other.
_NEXT_TILE, _NEXT_TILE_OF_MANY_SEQUENCES = 4, 8
#: A split has to save as many key tiles: fewer are within what the model gets wrong.
_LEAST_GAIN = 1.0


def resident_clusters(split: int, multiprocessors: int) -> int:
    """Return how many clusters of so many blocks a GPU runs at once, a block an SM; one without a split is a cluster.

    >>> [resident_clusters(split, 132) for split in SPLITS]
    [132, 66, 28, 14]
    """
    used = multiprocessors if split <= 2 else int(multiprocessors * _USED_BY_CLUSTERS)
    return max(used // split, 1)


def chosen_split(
    block_dim: int, lq: int, lk: int, batch: int, heads: int, multiprocessors: int, max_seq_len: int | None = None
) -> int:
    """Return by how many blocks each tile of a launch is shared, from what the host knows without the offsets.

    The time of a launch, in key tiles: the longest tile's, or if that is more the mean work of a cluster, or as many of
    the shortest tiles as one cluster is given; and what is exchanged. Every sequence is taken to be as long as the mean
    one.

    Args:
        block_dim: padded head dim.
        lq: rows of q; lk those of all keys, cached ones included.
        batch: sequences; heads that each has.
        multiprocessors: of the GPU.
        max_seq_len: most keys of a sequence with queries; None where all keys are of these. A cache that is given whole
            has rows of others, and sequences without queries that own them.

    >>> chosen_split(128, 256, 4352, 1, 4, 132), chosen_split(128, 8 * 256, 8 * 4352, 8, 4, 132)
    (8, 2)
    >>> chosen_split(128, 1024, 1024, 1, 4, 132), chosen_split(128, 8192, 8192, 1, 4, 132)
    (2, 1)
    >>> chosen_split(128, 40, 10**6, 2, 4, 132), chosen_split(128, 40, 10**6, 2, 4, 132, max_seq_len=300)
    (8, 1)
    """
    block_m, block_n = 64 * _TILES[block_dim].warpgroups, _TILES[block_dim].block_n
    sequences = max(batch, 1)
    tiles = -(-lq // block_m) * heads
    longest = min(lk / sequences, math.inf if max_seq_len is None else max_seq_len) / block_n
    # Causal: a sequence's last query tile sees all keys, every tile before it fewer.
    shortest = max(longest - max(lq / sequences - block_m, 0) / block_n, 1.0)
    mean = (longest + shortest) / 2
    further = _NEXT_TILE if sequences == 1 else _NEXT_TILE_OF_MANY_SEQUENCES

    def cost(split: int) -> float:
        clusters = resident_clusters(split, multiprocessors)
        rounds = -(-tiles // clusters)
        steps = max(math.ceil(longest / split), tiles * mean / (clusters * split), rounds * shortest / split)
        if split == 1:
            return steps
        # At 256 columns a key tile, of 64 keys, takes as long as one of 128, and there is twice as much to exchange.
        sent = max(block_dim / 128, 1.0)
        return steps + sent * (_EXCHANGE[split] + (rounds - 1) * further)

    best = 1
    for split in SPLITS[1:]:
        if cost(split) <= cost(best) - _LEAST_GAIN:
            best = split
    return best
