"""What each Hopper kernel takes of an SM, as the assembler says: registers, spilled bytes, shared memory, threads.

  hopper_resources.py [--csv FILE]     (needs nvcc, no GPU; minutes on two cores)

is_serialized: the assembler's remark that products wait for each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]

from bench_plugin import write_rows  # noqa: E402

from hstu_compile.plugins.kernels.hopper.compile import compile_hopper, resource_report  # noqa: E402
from hstu_compile.plugins.kernels.hopper.variants import (  # noqa: E402
    BLOCK_DIMS,
    SILU_FORMS,
    HopperVariant,
    hopper_variants_for,
)

RESULTS = Path(__file__).parent / "results" / "hopper_resources.csv"


def all_variants() -> list[HopperVariant]:
    """Every kernel that a model can ask for."""
    found = [
        variant
        for dtype in ("bfloat16", "float16")
        for dim in BLOCK_DIMS
        for is_causal in (False, True)
        for pos_bias in (False, True)
        for bits in (0, 32, 64)
        for silu in SILU_FORMS
        for variant in hopper_variants_for(
            dtype,
            dim,
            dim,
            plain_causal=is_causal,
            pos_bias=pos_bias,
            time_bias=bits > 0,
            timestamp_bits=bits or 64,
            silu=silu,
        )
    ]
    return list(dict.fromkeys(found))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    rows = resource_report(compile_hopper(all_variants()))
    write_rows(arguments.csv, tuple(rows[0]), rows)
    print(f"{arguments.csv}: {len(rows)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
