"""Tile configurations of the attention kernel, which are the tactics of the plugin.

Level: kernels, pure Python, imports neither triton nor torch.
"""

from dataclasses import dataclass, replace

#: Dynamic shared memory one block may use, bytes, by compute capability (CUDA C++ programming guide, table of technical
#: specifications).
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclass(frozen=True)
class TileConfig:
    """One way to tile the kernel.

    Attributes:
        tactic: id shown to TensorRT, from 1, unique in one list.
        block_m: query rows of a program.
        block_n: key rows of a loop step.
        num_warps: warps of a block.
        num_stages: depth of the load pipeline of the loop over whole key tiles.
        reason: why this configuration is in the list.
    """

    tactic: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reason: str


# Half precision without a time bias: the loop over whole key tiles is pipelined.
_HALF_64 = (
    TileConfig(
        1, 64, 64, 4, 3, "short ragged sequences waste least at 64 rows; 24 KiB a stage leaves several blocks on an SM"
    ),
    TileConfig(
        2,
        128,
        64,
        8,
        3,
        "long sequences: 128 rows halve the reads of k and v; 4 warps hold 64 rows each (one wgmma group)",
    ),
)
_HALF_128_WGMMA = (
    TileConfig(
        1, 64, 64, 4, 2, "80 KiB at 235 registers: two blocks share an SM; operands of wgmma stay in shared memory"
    ),
    TileConfig(2, 128, 64, 8, 2, "long sequences: 128 rows halve the reads of k and v; 96 KiB, two blocks share an SM"),
)
_HALF_128_MMA = (
    TileConfig(1, 64, 32, 4, 3, "mma.sync keeps operands in registers: 64 keys spill, 32 do not"),
    TileConfig(2, 128, 32, 8, 3, "long sequences: 128 rows halve the reads of k and v at the same registers a thread"),
)
_HALF_256_WGMMA = (
    TileConfig(1, 64, 32, 8, 2, "64 x 256 sums spill with 4 warps; with 8, 96 KiB let two blocks share an SM"),
    TileConfig(2, 128, 32, 8, 2, "long sequences: half the reads of k and v, 128 KiB, one block an SM"),
)
_HALF_256_MMA = (
    TileConfig(
        1,
        64,
        32,
        8,
        2,
        "8 warps halve the 64 x 256 sums to 64 registers a thread beside the operands of mma.sync; fits 99 KiB",
    ),
    TileConfig(
        2,
        32,
        32,
        4,
        2,
        "short sequences: the same registers a thread with half the rows, two blocks where 99 KiB hold one",
    ),
)
# With a time bias the loop is not pipelined and 64-bit distances double the registers of a score tile: 32 keys do not
# spill.
_HALF_TIME = (
    TileConfig(
        1,
        64,
        32,
        4,
        2,
        "the search over 64 x 64 distances spills 90 to 360 bytes a thread with 4 warps; 64 x 32 does not",
    ),
    TileConfig(2, 128, 32, 8, 2, "long sequences: 128 rows halve the reads of k and v at the same registers a thread"),
)
_HALF_TIME_256 = (
    TileConfig(1, 64, 32, 8, 2, "8 warps halve the 64 x 256 sums to 64 registers a thread beside the distances"),
    TileConfig(2, 32, 32, 4, 2, "short sequences: the same registers a thread with half the rows"),
)
# Float32 multiplies on the CUDA cores (IEEE, no TF32): operands live in registers, so tiles are small.
_FLOAT_NARROW = (
    TileConfig(1, 32, 32, 4, 2, "small tiles keep the operands in registers and use all SMs early"),
    TileConfig(2, 64, 32, 8, 2, "long sequences: half the reads of k and v at the same registers a thread"),
)
_FLOAT_WIDE = (
    TileConfig(
        1,
        16,
        16,
        4,
        2,
        "the product over 128 or 256 dims is unrolled: 32 x 32 spills up to 6 KiB a thread, 16 x 16 nothing",
    ),
    TileConfig(2, 32, 16, 8, 1, "long sequences: half the reads of k and v at the same registers a thread"),
)


def tile_configs(
    arch: int, dtype: str, block_dqk: int, block_dv: int, *, pos_bias: bool, time_bias: bool
) -> tuple[TileConfig, ...]:
    """Return the tactics for one architecture; the first is the default.

    Args:
        arch: compute capability as an integer (80, 86, 89, 90, 100, 120).
        dtype: "float32", "float16" or "bfloat16".
        block_dqk: padded query dim, a power of two in [16, 256]; block_dv likewise.
        pos_bias: the kernel computes a position bias; time_bias likewise.
    """
    widest = max(block_dqk, block_dv)
    # sm_90 and sm_100 multiply from shared memory (wgmma, tcgen05), the others from registers (mma.sync).
    from_shared = arch in (90, 100)
    if dtype == "float32":
        return _FLOAT_NARROW if widest <= 64 else _FLOAT_WIDE
    if time_bias:
        return _HALF_TIME if widest <= 128 else _HALF_TIME_256
    if widest <= 64:
        configs: tuple[TileConfig, ...] = _HALF_64
    elif widest <= 128:
        configs = _HALF_128_WGMMA if from_shared else _HALF_128_MMA
    else:
        configs = _HALF_256_WGMMA if from_shared else _HALF_256_MMA
    if pos_bias:
        # The pipeline also stages the gathered table entries, 4 bytes a score: 128 x 64 with three stages passes 99
        # KiB.
        stages = 2 if widest <= 128 or from_shared else 1
        configs = tuple(replace(config, num_stages=min(config.num_stages, stages)) for config in configs)
    return configs
