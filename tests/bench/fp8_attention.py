"""How far attention with e4m3 operands is from float64, simulated on a CPU, beside float16 and bfloat16; not a test.

Inputs are rounded to float16 first: that is what a kernel is given. `normal` has q, k and v of mean 0 and variance 1;
`coherent` is the attention benchmark's, with means that most rows share; `outliers` is `normal` with one value in a
thousand 32 times as large. 64 queries are taken of each N, the first, the last, and evenly between. rms: root mean
square of all differences over that of the float64 values; worst: largest difference in a row over the row's root mean
square.

Run: python tests/bench/fp8_attention.py [--output FILE]     (a few minutes on one core)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]

from bench_plugin import commit_of, today, write_rows  # noqa: E402
from fp8_forms import FORMS, attention, exact_attention  # noqa: E402

from hstu_compile.compare import row_error, whole_error  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "fp8_attention.csv"
DIMS = (64, 128, 256)
LENGTHS = (256, 1024, 2048, 4096, 8192)
INPUTS = ("normal", "coherent", "outliers")
NUM_QUERIES = 64
COLUMNS = ("inputs", "D", "N", "form", "rms", "worst", "torch", "commit", "date", "command")


def drawn(inputs: str, length: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [N, D] float64, each a number of float16; the same arguments give the same bits."""
    rng = np.random.default_rng([INPUTS.index(inputs), length, dim])
    means = {"coherent": (0.0, dim**-0.5, 1.0)}.get(inputs, (0.0, 0.0, 0.0))
    tensors = []
    for mean in means:
        values = rng.standard_normal((length, dim)) + mean
        if inputs == "outliers":
            values = np.where(rng.random((length, dim)) < 1e-3, 32.0 * values, values)
        tensors.append(torch.from_numpy(values).half().double())
    return tensors[0], tensors[1], tensors[2]


def rows() -> Iterator[dict[str, Any]]:
    """All forms of all cases."""
    facts = {"torch": torch.__version__, "commit": commit_of(), "date": today(), "command": "fp8_attention.py"}
    for inputs in INPUTS:
        for dim in DIMS:
            for length in LENGTHS:
                q, k, v = drawn(inputs, length, dim)
                positions = torch.linspace(0, length - 1, NUM_QUERIES).long()
                alpha = dim**-0.5
                exact = exact_attention(q[positions], k, v, alpha, positions).numpy()
                for form in FORMS:
                    found = attention(q[positions], k, v, form, alpha, positions).numpy()
                    rms, worst = whole_error([found], [exact]), row_error(found, exact).error
                    case = {"inputs": inputs, "D": dim, "N": length, "form": form.name}
                    yield {**case, "rms": rms, "worst": worst, **facts}
                print(f"{inputs} D={dim} N={length}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    with torch.inference_mode():
        write_rows(arguments.output, COLUMNS, rows())
    return 0


if __name__ == "__main__":
    sys.exit(main())
