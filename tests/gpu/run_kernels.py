"""The attention kernels on a real GPU against the float64 oracle, and the eager model that uses the Triton one.

The whole grid of tests/attention_cases.py (masks, biases, head dims, hostile device data) and the conformance program's
cases of several tiles, in float32, float16 and bfloat16, with every tile of this GPU where sequences are long. Outputs
start as NaN, so a row that was not written shows; every case runs twice and must give the same bits.
Usage: python run_kernels.py JOB OUT [--workers 12]        (JSON in OUT/kernels.json; exit 0 if every check passed)
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent)]

from checks import Checks  # noqa: E402
from references import leave_one_out, prepared_model  # noqa: E402

from hstu_compile.compare import error_bound, row_error  # noqa: E402
from hstu_compile.plugins.kernels.hopper.compile import compile_hopper  # noqa: E402
from hstu_compile.plugins.kernels.hopper.variants import (  # noqa: E402
    ELEMENT_TYPES,
    HOPPER_ARCH,
    MOST_TIME_HEADS,
    SPLITS,
    hopper_variants_for,
)
from hstu_compile.plugins.kernels.tiles import TileConfig, tile_configs  # noqa: E402
from hstu_compile.plugins.kernels.variants import ARCHS, padded_dim  # noqa: E402
from tests.attention_cases import attention_grid, with_dtype  # noqa: E402
from tests.oracle import ELEMENT_INPUTS, AttentionCase, attention_error, oracle_of  # noqa: E402
from tests.oracle import error_bound as attention_bound  # noqa: E402
from tests.plugins.conformance.prepare_conformance import large_cases  # noqa: E402

DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class KernelRun:
    """One case with one tile of the Triton kernel; None is the launcher's own choice. Or with a split of Hopper's."""

    case: AttentionCase
    tile: TileConfig | None
    hopper_split: int = 0

    @property
    def name(self) -> str:
        """For the list of checks."""
        if self.hopper_split:
            return f"{self.case.name} {self.case.dtype}, Hopper kernel, split {self.hopper_split}"
        tile = "" if self.tile is None else f", tile {self.tile.block_m}x{self.tile.block_n}"
        return f"{self.case.name} {self.case.dtype}{tile}"


def kernel_output(run: KernelRun) -> np.ndarray[Any, Any]:
    """Output [Lq, H, Dv] as float32, from a buffer that was NaN before."""
    import torch

    from hstu_compile.plugins.kernels import launch
    from hstu_compile.plugins.kernels.hopper.launch import hstu_attention_hopper

    case, dtype = run.case, getattr(torch, run.case.dtype)
    attributes = {
        field.name: getattr(case.attrs, field.name)
        for field in dataclasses.fields(case.attrs)
        if field.name not in ("pos_table_len", "silu")
    }

    def on_gpu(values: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).cuda()

    inputs = {name: None if values is None else on_gpu(values) for name, values in case.optional_inputs().items()}
    for name in ELEMENT_INPUTS:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].to(dtype)
    q, k, v = (on_gpu(values).to(dtype) for values in (case.q, case.k, case.v))
    shape = (q.shape[0], q.shape[1], v.shape[2])
    allocate = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        made: torch.Tensor = allocate(*size, **options)
        return made.fill_(float("nan")) if size == (shape,) else made

    torch.empty = poisoned  # type: ignore[assignment]
    try:
        tensors = (q, k, v, on_gpu(case.q_offsets), on_gpu(case.k_offsets))
        if run.hopper_split:
            given = {name: values for name, values in inputs.items() if values is not None}
            out = hstu_attention_hopper(*tensors, **given, **attributes, split=run.hopper_split, silu=case.attrs.silu)
        else:
            out = launch.hstu_attention_triton(*tensors, **inputs, **attributes, config=run.tile)
    finally:
        torch.empty = allocate
    torch.cuda.synchronize()
    result: np.ndarray[Any, Any] = out.float().cpu().numpy()
    return result


def measured(run: KernelRun) -> dict[str, Any]:
    """Errors of one run against the oracle, in a worker process."""
    try:
        first, second = kernel_output(run), kernel_output(run)
        report = attention_error(first, oracle_of(run.case), run.case.dtype)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[-1500:]}
    bound = attention_bound(run.case.dtype)
    return {
        "componentwise": report.componentwise,
        "componentwise_bound": bound.componentwise,
        "rms": report.rms,
        "rms_bound": bound.rms,
        "where": report.where,
        "is_deterministic": first.tobytes() == second.tobytes(),
    }


def all_runs(arch: int) -> list[KernelRun]:
    """Every case in every dtype with the default tile, and long sequences with every other tile."""
    runs = [KernelRun(with_dtype(case, dtype), None) for case in attention_grid() for dtype in DTYPES]
    for case in large_cases():
        for dtype in DTYPES:
            tiles = tile_configs(
                arch,
                dtype,
                padded_dim(case.q.shape[2]),
                padded_dim(case.v.shape[2]),
                pos_bias=case.pos_table is not None,
                time_bias=case.ts_table is not None,
            )
            runs += [KernelRun(with_dtype(case, dtype), tile) for tile in tiles]
    return runs


def hopper_runs() -> list[KernelRun]:
    """Every case that the Hopper kernel takes, with every split; compiled here, for all workers."""
    runs, wanted = [], set()
    for case in (*attention_grid(), *large_cases()):
        if case.ts_table is not None and case.ts_table.shape[0] > MOST_TIME_HEADS:
            continue
        for dtype in ELEMENT_TYPES:
            variants = hopper_variants_for(
                dtype,
                case.q.shape[2],
                case.v.shape[2],
                pos_bias=case.pos_table is not None,
                time_bias=case.ts_table is not None,
                timestamp_bits=64 if case.row_timestamps is None else 8 * case.row_timestamps.dtype.itemsize,
                has_cache=case.cache_offsets is not None,
            )
            wanted |= {*variants, *(dataclasses.replace(variant, plain_causal=True) for variant in variants)}
            if variants:
                splits = SPLITS if any(variant.shares for variant in variants) else SPLITS[:1]
                runs += [KernelRun(with_dtype(case, dtype), None, split) for split in splits]
    from hstu_compile.plugins.kernels.hopper.launch import cache_dir

    compile_hopper(sorted(wanted), cache_dir)
    return runs


def check_kernels(checks: Checks, arch: int, workers: int, *, is_hopper_alone: bool) -> None:
    """The grid, compiled and run by several processes at once."""
    runs = [] if is_hopper_alone else all_runs(arch)
    if arch == HOPPER_ARCH:
        runs += hopper_runs()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(measured, run) for run in runs]
        for run, future in zip(runs, futures, strict=True):
            with checks.check(run.name) as check:
                check.facts |= future.result()
                check.passed = (
                    "error" not in check.facts
                    and check.facts["componentwise"] <= check.facts["componentwise_bound"]
                    and check.facts["rms"] <= check.facts["rms_bound"]
                    and check.facts["is_deterministic"]
                )


def check_comparison(checks: Checks) -> None:
    """The comparison must refuse a wrong kernel, or a green run means nothing."""
    case = with_dtype(next(iter(large_cases())), "float16")
    right = kernel_output(KernelRun(case, None))
    result, bound = oracle_of(case), attention_bound("float16")
    for name, wrong in {
        "zeros": right * 0,
        "0.9x": right * np.float32(0.9),
        "shifted": np.roll(right, 1, axis=0),
    }.items():
        with checks.check(f"the comparison refuses {name}") as check:
            check.passed = attention_error(wrong, result, "float16").componentwise > bound.componentwise


def check_eager_model(checks: Checks, job: Path) -> None:
    """The eager model on the GPU, where attention is the Triton kernel, against stored float64 outputs."""
    import torch

    from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
    from hstu_compile.export import TORCH_DTYPES
    from hstu_compile.plugins.kernels import dispatch

    folder = job / "checkpoints"
    launches: list[str] = []

    kernels = {name: getattr(dispatch, name) for name in ("hstu_attention_hopper", "hstu_attention_triton")}

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            launches.append(name)
            return kernels[name](*arguments, **options)

        return call

    for name in kernels:
        setattr(dispatch, name, counted(name))
    torch.backends.cuda.matmul.allow_tf32 = False
    for family, checkpoint, precisions in (
        ("research", folder / "ckpt.pt", ("fp32", "fp16", "bf16")),
        ("deep", folder / "deep.pt", ("fp32", "fp16")),
    ):
        config = config_from_file(folder / "config.json") if family == "research" else None
        spec = spec_from_checkpoint(checkpoint, config)
        for precision in precisions:
            with checks.check(f"eager model on the GPU: {family} {precision}") as check, torch.inference_mode():
                stored = prepared_model(job, f"{family}-{precision}")
                model = model_from_spec(spec, TORCH_DTYPES[stored.precision]).cuda()
                launches.clear()
                worst = 0.0
                for feed, exact in zip(stored.reference.feeds, stored.reference.exact, strict=True):
                    arguments = {name: torch.from_numpy(values).cuda() for name, values in feed.arrays.items()}
                    users = model(**arguments).float().cpu().numpy()
                    worst = max(worst, row_error(users, exact["user_embeddings"]).error)
                bound = error_bound(stored.reference.eager_error["user_embeddings"], stored.precision)
                chosen = "hstu_attention_triton" if precision == "fp32" else "hstu_attention_hopper"
                expected = [chosen] * (stored.num_layers * len(stored.reference.feeds))
                check.facts |= {"worst": worst, "bound": bound, "kernel": chosen, "kernel_launches": len(launches)}
                check.passed = worst <= bound and launches == expected
    with checks.check("eager model on the GPU: leave-one-out user embeddings of fp32") as check, torch.inference_mode():
        spec = spec_from_checkpoint(folder / "ckpt.pt", config_from_file(folder / "config.json"))
        model, stored_users = model_from_spec(spec).cuda(), leave_one_out(job)
        users = [
            model(**{name: torch.from_numpy(values).cuda() for name, values in feeds.items()}).cpu().numpy()
            for feeds in stored_users.batches
        ]
        error = row_error(np.concatenate(users), stored_users.eager_users.astype(np.float64)).error
        check.facts |= {"worst": error, "bound": 2 * error_bound(0.0, "fp32")}
        check.passed = error <= check.facts["bound"]
    for name, kernel in kernels.items():
        setattr(dispatch, name, kernel)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only-hopper", action="store_true", help="the Hopper kernel's cases; needs no JOB contents")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile and run kernels")
    arguments = parser.parse_args(argv)
    import torch
    import triton

    major, minor = torch.cuda.get_device_capability()
    arch = max((a for a in ARCHS if a <= 10 * major + minor), default=80)
    checks = Checks("kernels")
    checks.facts |= {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    path = arguments.out.resolve() / "kernels.json"
    with checks.check("the comparison's checks could be made") as check:
        check_comparison(checks)
        check.passed = True
    checks.write(path)
    if not arguments.only_hopper:
        with checks.check("the eager model's checks could be made") as check:
            check_eager_model(checks, arguments.job.resolve())
            check.passed = True
        checks.write(path)
    check_kernels(checks, arch, arguments.workers, is_hopper_alone=arguments.only_hopper)
    return checks.write(path)


if __name__ == "__main__":
    sys.exit(main())
