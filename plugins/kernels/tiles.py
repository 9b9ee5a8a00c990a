"""Tile configurations of the attention kernel: the plugin's tactics, one short list per (dtype, head dims, architecture).

Level: kernels, pure Python, imports neither triton nor torch.
"""

from dataclasses import dataclass

#: Dynamic shared memory one block may use, bytes, by compute capability (CUDA C++ programming guide, table of technical specifications).
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


_HALF_SMALL = (
    TileConfig(1, 64, 64, 4, 3, "short ragged sequences waste least at 64 rows; three blocks of 4 warps share an SM"),
    TileConfig(2, 128, 64, 8, 3, "long sequences: 128 rows halve the reads of k and v; 4 warps hold 64 rows each (one wgmma group)"),
)
_HALF_128 = (
    TileConfig(1, 64, 64, 4, 2, "64 x 128 sums are 64 registers a thread; two stages leave room for two blocks on 100 KiB"),
    TileConfig(2, 128, 64, 8, 2, "long sequences: half the reads of k and v; 96 KiB, still one block where shared memory is 99 KiB"),
)
_HALF_256 = (
    TileConfig(1, 64, 32, 4, 2, "64 x 256 sums fill 128 registers a thread; 32 keys keep q, k and v under 99 KiB"),
    TileConfig(2, 128, 32, 8, 2, "long sequences: half the reads of k and v at the same registers a thread"),
)
_HALF_256_SMALL_SHARED = (
    TileConfig(1, 64, 32, 4, 2, "64 x 256 sums fill 128 registers a thread; 32 keys keep q, k and v under 99 KiB"),
    TileConfig(2, 32, 32, 4, 2, "half the sums in registers where 99 KiB hold one 64-row block only"),
)
_FLOAT_SMALL = (
    TileConfig(1, 32, 32, 4, 2, "IEEE float32 has no tensor cores: small tiles keep operands in registers"),
    TileConfig(2, 64, 32, 4, 2, "long sequences: half the reads of k and v"),
)
_FLOAT_LARGE = (TileConfig(1, 32, 32, 4, 1, "two stages of float32 rows of 256 would pass 99 KiB"),)


def tile_configs(arch: int, dtype: str, block_dqk: int, block_dv: int) -> tuple[TileConfig, ...]:
    """Return the tactics for one architecture, best guess for short sequences first.

    Args:
        arch: compute capability as an integer (80, 86, 89, 90, 100, 120).
        dtype: "float32", "float16" or "bfloat16".
        block_dqk: padded query dim, a power of two in [16, 256]; block_dv likewise.
    """
    widest = max(block_dqk, block_dv)
    if dtype == "float32":
        return _FLOAT_SMALL if widest <= 128 else _FLOAT_LARGE
    if widest <= 64:
        return _HALF_SMALL
    if widest <= 128:
        return _HALF_128
    return _HALF_256 if SHARED_LIMIT[arch] > 101_376 else _HALF_256_SMALL_SHARED
