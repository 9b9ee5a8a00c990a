"""Engine bytes, latency and throughput of float16, INT8 and FP8 at DLRMv3's sizes, 1k to 64k tokens, in one run.

The packed graph of a ranking model (D 512, 4 heads, 128/128, 5 layers), histories of 1024 events and 16 candidates
each; a token is an event. Of each type an engine is built, compared with the reference of its bundle and timed: device
time by CUDA events, inputs on the device, caches warm. What cannot be built, does not run or is wrong is a row.

Prepare (any machine, no GPU; minutes):  bench_calibration.py --prepare WORK
Run (GPU):  bench_calibration.py --run WORK --backend tensorrt-rtx --out calibration.csv
            bench_calibration.py --run WORK --backend tensorrt --plugin LIBRARY --out calibration.csv
Put a run's rows into a table:  bench_calibration.py --merge RUN.csv --out calibration.csv
Without a GPU: --prepare WORK --tiny, then --run WORK --backend tensorrt-rtx --build-only.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]

KINDS = ("fp16", "int8", "fp8")
EVENTS, CANDIDATES = 1024, 16
USERS = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = (
    *(
        "backend",
        "version",
        "kind",
        "tokens",
        "users",
        "status",
        "engine_bytes",
        "eight_bit_layers",
        "quantized_products",
    ),
    *("median_ms", "p90_ms", "cv", "repeats", "tokens_per_s", "max_err", "err_bound", "note", "gpu", "commit", "date"),
    "command",
)


def prepare(work: Path, kinds: Sequence[str], *, tiny: bool) -> None:
    """A checkpoint, its calibration table, a bundle per kind with references, and the requests to time."""
    from m_falcon_prepare import save_checkpoint
    from m_falcon_workload import DLRM_V3, TINY

    from hstu_compile.calibration.ranking_batches import ranking_batch
    from hstu_compile.checkpoint import config_from_file, spec_from_checkpoint
    from hstu_compile.model.ranking_config import RankingConfig
    from hstu_compile.npz import save_npz
    from tests.calibrated_models import calibration_table

    save_checkpoint(work, TINY if tiny else DLRM_V3)
    checkpoint, config = work / "ckpt.pt", work / "config.json"
    table = work / "calibration.json"
    calibration_table(checkpoint, config).save(table)
    program = str(Path(sys.executable).with_name("hstu-compile"))
    limits = ("--max-seq-len", EVENTS, "--max-candidates", CANDIDATES, "--max-batch", USERS[-1], "--opt-batch", 2)
    for kind in kinds:
        quantised = () if kind == "fp16" else ("--calib", table)
        command = (program, "build", checkpoint, "--config", config, f"--{kind}", *quantised, *limits)
        words = [*map(str, command), "--backend", "onnx", "-o", str(work / kind), "--force"]
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    model = spec_from_checkpoint(checkpoint, config_from_file(config)).config
    assert isinstance(model, RankingConfig)
    for users in USERS:
        batch = ranking_batch("timed", model, [EVENTS] * users, [CANDIDATES] * users, users)
        save_npz(work / f"requests-{users}.npz", batch.arrays)


def build(work: Path, kind: str, backend: str, plugin: Path | None) -> tuple[Path, dict[str, Any]]:
    """The engine's file and what the command says of it.

    Raises:
        RuntimeError: with the command's message.
    """
    engine = work / f"{kind}-{backend}.engine"
    command = [sys.executable, "-m", "hstu_compile", "engine", str(work / kind / "model.onnx"), "-o", str(engine)]
    command += ["--backend", backend, "--max-batch", str(USERS[-1]), "--opt-batch", str(USERS[-1]), "--json"]
    command += ["--opt-seq-len", str(EVENTS), *(["--plugins", str(plugin)] if plugin is not None else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    facts: dict[str, Any] = json.loads(done.stdout)
    return engine, facts


def checked(work: Path, kind: str, engine: Path, backend: str, plugin: Path | None) -> tuple[float, float, str]:
    """Error, bound and name of the tensor nearest to, or farthest beyond, its bound, on the bundle's own feeds."""
    from hstu_compile.recheck import stored_reference
    from hstu_compile.runtime.session import open_session
    from hstu_compile.session_check import check_session

    manifest = json.loads((work / kind / "manifest.json").read_text(encoding="utf-8"))
    reference = stored_reference(work / kind, manifest["graphs"][0])
    with open_session(backend, engine=engine, plugin_library=plugin) as session:
        result = check_session(session, kind, reference, "fp16", lambda *_: None)
    worst = max(result.tensors, key=lambda row: row.error / row.bound)
    return worst.error, worst.bound, f"{worst.tensor} of '{worst.feed}' {worst.detail}".rstrip()


def run(
    work: Path, kinds: Sequence[str], backend: str, plugin: Path | None, *, build_only: bool
) -> list[dict[str, Any]]:
    """The rows of one backend, in the types given."""
    from bench_plugin import commit_of, gpu_name
    from device_timing import EngineRunner

    from hstu_compile.tensorrt_api import tensorrt_api

    api = tensorrt_api(backend)
    common = {
        "backend": backend,
        "version": api.version,
        "gpu": "" if build_only else gpu_name(),
        "commit": commit_of(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": f"bench_calibration.py --run WORK --backend {backend}",
    }
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        row: dict[str, Any] = {**common, "kind": kind}
        try:
            engine, facts = build(work, kind, backend, plugin)
            layers = facts["layers"]
            row |= {"engine_bytes": facts["bytes"], "status": "built"}
            row |= {name: layers.get(name, 0) for name in ("eight_bit_layers", "quantized_products")}
            if build_only:
                rows.append(row)
                continue
            row["max_err"], row["err_bound"], where = checked(work, kind, engine, backend, plugin)
            if row["max_err"] > row["err_bound"]:
                rows.append({**row, "status": "wrong", "note": where})
                continue
            with EngineRunner(api, engine.read_bytes(), plugin) as runner:
                for users in USERS:
                    rows.append(
                        {
                            **row,
                            "tokens": users * EVENTS,
                            "users": users,
                            **timed(runner, work, users, is_tensorrt8=api.is_tensorrt8),
                        }
                    )
        except Exception as error:  # a row says what a backend cannot do; the others are still measured
            rows.append({**row, "status": "error", "note": f"{type(error).__name__}: {error}"[-300:]})
    return rows


def timed(runner: Any, work: Path, users: int, *, is_tensorrt8: bool) -> dict[str, Any]:
    """Device time of one request batch."""
    from hstu_compile.runtime._feeds import converted

    try:
        with np.load(work / f"requests-{users}.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if is_tensorrt8:
            arrays = {
                name: converted(array, "int32") if array.dtype == np.int64 else array for name, array in arrays.items()
            }
        runner.set_inputs(arrays)
        time = runner.time()
    except Exception as error:  # out of memory is a row, too
        return {"status": "error", "note": f"{type(error).__name__}: {error}"[-300:]}
    return {"status": "ok", **time, "tokens_per_s": round(1e3 * users * EVENTS / time["median_ms"])}


def merged(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows in place of what the file has of their backends and types."""
    kept, replaced = [], {(row["backend"], row["kind"]) for row in rows}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if (row["backend"], row["kind"]) not in replaced]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="WORK")
    parser.add_argument("--tiny", action="store_true", help="of --prepare: small sizes, to try the script")
    parser.add_argument("--run", type=Path, metavar="WORK")
    parser.add_argument("--backend", choices=("tensorrt", "tensorrt-rtx"))
    parser.add_argument("--plugin", type=Path, help="plugin library, for tensorrt")
    parser.add_argument("--build-only", action="store_true", help="of --run: stop after the builds and write nothing")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--merge", type=Path, metavar="CSV", help="put its rows into --out, and measure nothing")
    parser.add_argument("--out", type=Path, help="CSV that the rows go into")
    arguments = parser.parse_args(argv)
    if arguments.prepare is not None:
        arguments.prepare.mkdir(parents=True, exist_ok=True)
        prepare(arguments.prepare.resolve(), arguments.kinds, tiny=arguments.tiny)
    if arguments.merge is not None:
        if arguments.out is None:
            parser.error("--merge needs --out")
        with arguments.merge.open(newline="", encoding="utf-8") as file:
            merged(arguments.out, list(csv.DictReader(file)))
    if arguments.run is None:
        return 0
    if arguments.backend is None or (arguments.out is None and not arguments.build_only):
        parser.error("--run needs --backend, and --out or --build-only")
    plugin = arguments.plugin.resolve() if arguments.plugin is not None else None
    rows: list[dict[str, Any]] = []
    for kind in arguments.kinds:
        # Each type is kept when it is measured: what comes after may run out of time.
        found = run(arguments.run.resolve(), [kind], arguments.backend, plugin, build_only=arguments.build_only)
        for row in found:
            print({name: value for name, value in row.items() if name not in ("command", "commit")}, flush=True)
        if not arguments.build_only:
            merged(arguments.out, found)
        rows += found
    return 0 if all(row["status"] in ("ok", "built") for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
