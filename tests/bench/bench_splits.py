"""What sharing a tile of queries among 1, 2, 4 or 8 blocks costs on a Hopper GPU, of launches with few tiles.

  bench_splits.py [--csv FILE] [--budget SECONDS]     (needs the GPU; torch and nvcc)

Each launch is captured GRAPH_CALLS times in one CUDA graph, and the splits of a case replay in turn. An output is first
compared with float64; a wrong one is a row without a time. `chosen` is what `chosen_split` takes, whose constants come
from here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

import torch
from attention_grid import NUM_HEADS, Case
from attention_reference import HSTU, Inputs, draw, judge, make_sample
from attention_worker import GRAPH_CALLS, Clock, captured
from bench_attention import common_facts
from bench_plugin import write_rows

from hstu_compile.plugins.kernels.hopper.launch import hstu_attention_hopper
from hstu_compile.plugins.kernels.hopper.variants import SPLITS, can_share, chosen_split

RESULTS = Path(__file__).parent / "results" / "attention_splits.csv"
COLUMNS = ("case", "split", "status", "median_us", "chosen", "max_err", "err_bound", "gpu", "commit", "date")
DTYPE = "bf16"


def split_cases() -> Iterator[Case]:
    """Launches with fewer tiles than the GPU has SMs, causal and with candidates."""
    for dim in (128, 64, 256):
        for n in (256, 512, 1024, 2048, 4096):
            yield Case(f"split_B1_N{n}", DTYPE, dim, (n,))
        yield Case("split_B2_N1024", DTYPE, dim, (1024,) * 2)
        yield Case("split_B4_N1024", DTYPE, dim, (1024,) * 4)
        for cached, asked in ((1024, 256), (2048, 64), (4096, 64), (4096, 256), (4096, 512), (16_384, 256)):
            yield Case(f"split_B1_k{cached}_t{asked}", DTYPE, dim, (cached + asked,), targets=asked, queries=asked)
        for batch in (2, 4, 8):
            yield Case(f"split_B{batch}_k4096_t256", DTYPE, dim, (4096 + 256,) * batch, targets=256, queries=256)


def caller(inputs: Inputs, split: int) -> Callable[[], torch.Tensor]:
    """The kernel with a split of ours."""
    case = inputs.case
    return lambda: hstu_attention_hopper(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.q_offsets,
        inputs.k_offsets,
        **inputs.keywords(),
        alpha=case.alpha,
        scaling_seq_len=float(case.max_len),
        split=split,
    )


def rows_of(case: Case, clock: Clock) -> list[dict[str, Any]]:
    """Check and time every split of a case."""
    inputs = draw(case, clock.device)
    sample = make_sample(inputs, HSTU)
    lq, lk = sum(case.query_lengths), sum(case.lengths)
    multiprocessors = torch.cuda.get_device_properties(clock.device).multi_processor_count
    chosen = chosen_split(case.dim, lq, lk, len(case.lengths), NUM_HEADS, multiprocessors)
    facts = common_facts(case.name, "ours") | {"case": case.name, "chosen": chosen}
    rows, replays = {}, {}
    for split in SPLITS:
        if split > 1 and not can_share(case.dim, is_accurate=False, has_bias=False):
            continue
        replay, output = captured(caller(inputs, split))
        output.fill_(torch.nan)
        replay()
        torch.cuda.synchronize()
        error, bound, wrong = judge(output, sample, None)
        rows[split] = facts | {"split": split, "max_err": error, "err_bound": bound, "status": wrong or "ok"}
        if not wrong:
            replays[str(split)] = replay
    for name, (times, _) in clock.interleaved(replays, cold=False).items():
        rows[int(name)]["median_us"] = 1e3 * statistics.median(times) / GRAPH_CALLS
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 if an output was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--budget", type=float, default=120.0, help="seconds; later cases are left out")
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    clock = Clock(torch.device("cuda"))
    clock.gemm_tflops(torch.bfloat16)
    rows: list[dict[str, Any]] = []
    for case in split_cases():
        if time.monotonic() - started > arguments.budget:
            print(f"{case.name} and what follows: left out, {arguments.budget:.0f} s are over")
            break
        rows += rows_of(case, clock)
        times = {row["split"]: round(row.get("median_us", 0.0), 1) for row in rows if row["case"] == case.name}
        print(f"{case.name}: {times}, chosen {rows[-1]['chosen']}", flush=True)
        write_rows(arguments.csv, COLUMNS, rows)
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
