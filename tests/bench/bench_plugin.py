"""Attention of ragged sequences: the plugin in TensorRT against its padded native body, the Triton kernel and PyTorch.

H = 4, float16, causal, 65,536 tokens, lengths uniform in 10 to 100 % of N. Every row is first compared with the float64
oracle. Device time by CUDA events; peak_mib is the memory beyond the inputs. The backends need two Pythons, so each run
writes parts, and a last step merges them:

  bench_plugin.py --parts DIR --backends plugin native_padded --plugin-library LIB   (beside TensorRT, no torch needed)
  bench_plugin.py --parts DIR --backends native_rtx                                  (beside TensorRT-RTX)
  bench_plugin.py --parts DIR --backends triton eager                                (beside torch)
  bench_plugin.py --merge DIR [--csv FILE]             (anywhere; rows that DIR lacks stay in the CSV as they are)
  bench_plugin.py --table [--csv FILE] [--into FILE]   (the Markdown table, with ratios; also between FILE's marks)

Without --parts, --merge or --table nothing is measured: the results that are committed come from a GPU.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hstu_compile.environment import Backend

REPOSITORY = Path(__file__).resolve().parents[2]
if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

BACKENDS = ("plugin", "native_padded", "native_rtx", "triton", "eager")
#: Backends of TensorRT, and the flavour each runs in.
TENSORRT_BACKENDS: dict[str, Backend] = {
    "plugin": "tensorrt",
    "native_padded": "tensorrt",
    "native_rtx": "tensorrt-rtx",
}
LENGTHS = (256, 1024, 2048, 4096, 8192)
DIMS = (64, 128)
COLUMNS = (
    "case",
    "backend",
    "status",
    "median_ms",
    "p90_ms",
    "cv",
    "repeats",
    "tflops",
    "peak_mib",
    "used_mib",
    "max_err",
    "err_bound",
    "build_s",
    "gpu",
    "versions",
    "commit",
    "date",
    "command",
)
RESULTS = Path(__file__).parent / "results" / "plugin.csv"
BASELINE = "native_rtx"
#: Columns of the Markdown table; the CSV has every backend.
SHOWN = ("plugin", "native_rtx", "triton", "eager")
BEGIN, END = "<!-- plugin benchmark: begin -->", "<!-- plugin benchmark: end -->"
_NO_MEMORY = re.compile(r"out ?of ?memory|cudaErrorMemoryAllocation", re.IGNORECASE)

Row = dict[str, Any]


def commit_of() -> str:
    """HSTU_COMMIT, or what git says, or unknown."""
    if os.environ.get("HSTU_COMMIT"):
        return os.environ["HSTU_COMMIT"]
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def today() -> str:
    """Of the measurement, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def gpu_name() -> str:
    """Name and driver, as nvidia-smi tells them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0].replace(", ", ", driver ")


def clocks() -> str:
    """Power limit and the SM clock's maximum, as nvidia-smi tells them; nothing here locks clocks."""
    query = ["nvidia-smi", "--query-gpu=power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    limit, _, fastest = (done.stdout.strip().splitlines() or [""])[0].partition(", ")
    return f"power limit {limit}, SM clock up to {fastest}, not locked" if fastest else "unknown"


def measured_row(case: Any, output: Any, time_it: Callable[[], dict[str, Any]], memory: Callable[[], Row]) -> Row:
    """Check the output, then time: a wrong result gets no time."""
    from attention_workload import check_rows

    error, bound, is_right = check_rows(case, output)
    if not is_right:
        return {"status": "wrong result", "max_err": error, "err_bound": bound}
    timing = time_it()
    tflops = case.flop / timing["median_ms"] / 1e9
    return {"status": "ok", "max_err": error, "err_bound": bound, **timing, "tflops": tflops, **memory()}


def attention_graph(case: Any, *, static: bool = False) -> Any:
    """An ONNX model of one attention node with its native body, as the exporter writes it.

    Args:
        case: what it computes.
        static: fix L and B at the case's. TensorRT-RTX exchanges kernels of dynamic shapes while it runs, once
            specialised ones are compiled; with fixed shapes it has them from the start.
    """
    import numpy as np
    import onnx
    from attention_workload import NUM_HEADS
    from onnx import TensorProto, helper, numpy_helper

    from hstu_compile.artifacts import OnnxGraph
    from hstu_compile.op_schema import attention_contract
    from hstu_compile.rewrite import apply_passes
    from hstu_compile.rewrite.attach_native_body import AttachNativeBody

    contract = attention_contract()
    zeros = ("contextual_seq_len", "max_attn_len", "min_full_attn_seq_len", "silu")
    zeros += ("has_num_targets", "has_contextual_seq_lens", "has_scaling_seq_lens")
    attributes: dict[str, Any] = {
        **dict.fromkeys(zeros, 0),
        "alpha": case.alpha,
        "scaling_seq_len": float(case.max_len),
        "max_query_len": case.max_len,
        "max_seq_len": case.max_len,
        "target_group_size": 1,
        "pos_bias": int(case.has_bias),
        "time_bias": int(case.has_bias),
    }
    rename = {"q_offsets": "offsets", "k_offsets": "offsets"}
    names = [rename.get(each.name, each.name) for each in contract.present_inputs(attributes)]
    node = helper.make_node(
        contract.name,
        names,
        ["out"],
        name="attention",
        domain=contract.namespace,
        **attributes,
        plugin_version=contract.version,
        plugin_namespace=contract.namespace,
    )
    half = [NUM_HEADS, case.dim]
    rows: int | str = len(case.q) if static else "L"
    bounds: int | str = len(case.offsets) if static else "B_plus_1"
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [rows, *half]) for name in ("q", "k", "v")]
    inputs.append(helper.make_tensor_value_info("offsets", TensorProto.INT32, [bounds]))
    # The engine stage reads a graph's precision off its weights, and attention has none of its own.
    weights = [numpy_helper.from_array(np.zeros(1, np.float16), "precision")]
    if case.has_bias:
        for name in ("row_timestamps", "col_timestamps"):
            inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, [rows]))
        tables = {"pos_table": case.pos_table, "ts_table": case.ts_table, "ts_thresholds": case.thresholds}
        weights += [numpy_helper.from_array(values, name) for name, values in tables.items()]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT16, [rows, *half])]
    graph = helper.make_graph([node], "attention", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(contract.namespace, int(contract.version))]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    *_, attached = apply_passes(OnnxGraph("attention", model, "fp16", (), ()), (AttachNativeBody(1),))
    return attached.model


def tensorrt_feeds(case: Any) -> dict[str, Any]:
    """Inputs of `attention_graph` for a case."""
    feeds = {"q": case.q, "k": case.k, "v": case.v, "offsets": case.offsets}
    if case.has_bias:
        feeds |= {"row_timestamps": case.row_times, "col_timestamps": case.col_times}
    return feeds


def tensorrt_rows(backend: str, case: Any, library: Path | None) -> Row:
    """Build an engine for exactly this case's shapes, check and time it."""
    from device_timing import EngineRunner

    from hstu_compile.artifacts import Profile
    from hstu_compile.engine import engine_from_onnx
    from hstu_compile.tensorrt_api import tensorrt_api

    flavour = TENSORRT_BACKENDS[backend]
    api = tensorrt_api(flavour)
    feeds = tensorrt_feeds(case)
    shapes = {name: tuple(values.shape) for name, values in feeds.items()}
    plugin = library if backend == "plugin" else None
    engine = engine_from_onnx(
        attention_graph(case, static=api.is_rtx),
        backend=flavour,
        profiles=[Profile("case", shapes, shapes, shapes)],
        plugin_library=plugin,
    )
    row: Row = {"build_s": engine.seconds, "versions": f"{flavour} {api.version}"}
    if backend == "plugin" and engine.layers["plugin"] != 1:
        raise RuntimeError(f"the engine has {engine.layers['plugin']} plugin layers, not 1")
    with EngineRunner(api, engine.plan, plugin) as runner:
        runner.set_inputs(feeds)
        return row | measured_row(case, runner.run()["out"], runner.time, runner.memory)


def torch_rows(backend: str, case: Any) -> Row:
    """Run one of the two PyTorch forms, check and time it."""
    import torch
    import triton
    from device_timing import MEASURE_MS, WARM_UP_MS, repeats_for, summary_of

    from hstu_compile.model.attention import AttentionAttrs, hstu_attention
    from hstu_compile.plugins.kernels.launch import hstu_attention_triton

    def on_gpu(values: Any) -> torch.Tensor:
        return torch.from_numpy(values).cuda()

    q, k, v, offsets = (on_gpu(values) for values in (case.q, case.k, case.v, case.offsets))
    bias: dict[str, Any] = {}
    if case.has_bias:
        bias = {
            "row_timestamps": on_gpu(case.row_times),
            "col_timestamps": on_gpu(case.col_times),
            "pos_table": on_gpu(case.pos_table),
            "ts_table": on_gpu(case.ts_table),
            "ts_thresholds": on_gpu(case.thresholds),
        }
    scale = float(case.max_len)
    attrs = AttentionAttrs(case.alpha, scale, case.max_len, case.max_len)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            if backend == "triton":
                return hstu_attention_triton(q, k, v, offsets, offsets, **bias, alpha=case.alpha, scaling_seq_len=scale)
            return hstu_attention(q, k, v, offsets, offsets, attrs, **bias)

    def samples(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
        for start, end in zip(events[::2], events[1::2], strict=True):
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(events[::2], events[1::2], strict=True)]

    def time_it() -> dict[str, Any]:
        single = sorted(samples(5))[2]
        samples(repeats_for(single, WARM_UP_MS))
        return summary_of(samples(repeats_for(single, MEASURE_MS)))

    versions = {"versions": f"torch {torch.__version__}, triton {triton.__version__}"}
    torch.cuda.synchronize()
    free_before, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        output = run().float().cpu().numpy()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError as error:
        return versions | {"status": f"out of memory: {str(error)[:160]}"}
    memory = {
        "peak_mib": (torch.cuda.max_memory_allocated() - held) / 2**20,
        "used_mib": (free_before - torch.cuda.mem_get_info()[0]) / 2**20,
    }
    return versions | measured_row(case, output, time_it, lambda: memory)


def run_case(backend: str, max_len: int, dim: int, has_bias: bool, library: Path | None) -> Row:
    """One row; what a backend cannot do is a row too."""
    from attention_workload import workload

    case = workload(max_len, dim, has_bias)
    row: Row = {"case": case.name, "backend": backend, "gpu": gpu_name(), "commit": commit_of(), "date": today()}
    row["command"] = (
        f"bench_plugin.py --parts DIR --backends {backend} --n {max_len} --dims {dim} --bias {int(has_bias)}"
    )
    try:
        if backend in TENSORRT_BACKENDS:
            return row | tensorrt_rows(backend, case, library)
        return row | torch_rows(backend, case)
    except Exception as error:
        return row | {"status": status_of(error)}


def status_of(error: Exception) -> str:
    """Why there is no time: "not built", "out of memory" (an allocation failed) or "error", and the last reason given.

    TensorRT's log ends with what stopped it, but its warnings may follow: the last line of severity ERROR counts.
    PyTorch's compiler ends with how to learn more.
    """
    # Our own messages carry the log in `why`; `fix` is advice, and names memory whatever happened.
    reason = str(getattr(error, "why", error))
    lines = [" ".join(line.split()) for line in reason.splitlines() if line.strip()]
    lines = [line for line in lines if "TORCHDYNAMO_VERBOSE" not in line]
    errors = [line for line in lines if line.startswith(("[ERROR]", "[INTERNAL_ERROR]"))]
    last = (errors or lines or [type(error).__name__])[-1][:300]
    code = getattr(error, "code", "")
    if _NO_MEMORY.search(" ".join(errors) if errors else reason) or _NO_MEMORY.search(type(error).__name__):
        return f"out of memory: {last}"
    kind = "not built" if code == "HSTU-E402" else "error"
    return f"{kind}: {code or type(error).__name__}: {last}"


def part_name(backend: str, max_len: int, dim: int, has_bias: bool) -> str:
    """File of one row."""
    return f"{backend}-d{dim}-bias{int(has_bias)}-n{max_len}.json"


def run_group(arguments: argparse.Namespace) -> None:
    """The cases of one backend, head dim and bias in this process, shortest first, each written when it is done."""
    backend, dim, has_bias = arguments.backends[0], arguments.dims[0], bool(arguments.bias[0])
    for n in arguments.n:
        row = run_case(backend, n, dim, has_bias, arguments.plugin_library)
        (arguments.parts / part_name(backend, n, dim, has_bias)).write_text(json.dumps(row) + "\n", encoding="utf-8")
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def measure(arguments: argparse.Namespace) -> int:
    """Run every group of cases in a process of its own, so that one that fails or hangs takes no other with it."""
    parts: Path = arguments.parts.resolve()
    parts.mkdir(parents=True, exist_ok=True)
    groups = [
        (backend, dim, bias) for backend in arguments.backends for dim in arguments.dims for bias in arguments.bias
    ]
    lengths = sorted(arguments.n)
    started = time.perf_counter()
    for index, (backend, dim, bias) in enumerate(groups, start=1):
        left = arguments.budget - (time.perf_counter() - started)
        command = [sys.executable, str(Path(__file__).resolve()), "--parts", str(parts), "--one-group"]
        command += ["--backends", backend, "--dims", str(dim), "--bias", str(bias), "--n", *map(str, lengths)]
        if arguments.plugin_library is not None:
            command += ["--plugin-library", str(arguments.plugin_library.resolve())]
        failed = f"not run: the time budget of {arguments.budget:g} s was used up"
        if left > 5:
            limit = min(left, arguments.group_seconds)
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=parts, check=False)
                failed = f"error: exit {done.returncode}: {' '.join((done.stdout + done.stderr).split())[-300:]}"
            except subprocess.TimeoutExpired:
                failed = f"not run: its group was not finished in {limit:.0f} s"
        for n in lengths:
            show_row(parts / part_name(backend, n, dim, bool(bias)), (backend, n, dim, bool(bias)), failed)
        print(f"group {index} of {len(groups)}, {time.perf_counter() - started:.0f} s", flush=True)
    return 0


def show_row(path: Path, facts: tuple[str, int, int, bool], failed: str) -> None:
    """Print one row; where its process left none, write why."""
    if not path.exists():
        from attention_workload import workload

        backend, n, dim, has_bias = facts
        name = workload(n, dim, has_bias).name
        row = {"case": name, "backend": backend, "status": failed, "gpu": gpu_name(), "commit": commit_of()}
        row["date"] = today()
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    row = json.loads(path.read_text(encoding="utf-8"))
    shown = f"{row['median_ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s" if "median_ms" in row else ""
    print(f"{row['case']} {row['backend']}: {row['status']} {shown}", flush=True)


def merge(parts: Path, target: Path) -> int:
    """All parts into the CSV, in the order of cases and backends; a part replaces the row of its case and backend."""

    def order(row: Row) -> tuple[Any, ...]:
        facts = dict(pair.split("=") for pair in row["case"].split())
        return int(facts["D"]), facts["bias"], int(facts["N"]), BACKENDS.index(row["backend"])

    fresh = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(parts.rglob("*-n*.json"))]
    if not fresh:
        print(f"error: {parts} holds no parts; measure first, with --parts", file=sys.stderr)
        return 1
    rows = {(row["case"], row["backend"]): row for row in [*read_rows(target), *fresh]}
    write_rows(target, COLUMNS, sorted(rows.values(), key=order))
    print(f"{target}: {len(rows)} rows, {len(fresh)} of them new")
    return 0


def read_rows(source: Path) -> list[Row]:
    """Rows of the CSV; none where there is no file."""
    if not source.exists():
        return []
    with source.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(target: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a CSV with these columns; of a float five digits, of an absent value nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {name: row.get(name, "") for name in columns}
            writer.writerow({name: f"{cell:.5g}" if isinstance(cell, float) else cell for name, cell in cells.items()})


def table_lines(rows: Iterable[Row]) -> list[str]:
    """Markdown: one line per case; time, TFLOP/s and memory of each backend, and ratios to the plugin's."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["backend"]] = row
    heads = ["plugin", *(f"{name} | {name} / plugin" for name in SHOWN[1:]), f"{BASELINE} MiB / plugin MiB"]
    lines = ["| case | " + " | ".join(heads) + " |", "|" + "---|" * (2 * len(SHOWN) + 1)]
    for case, found in cases.items():
        cells = [case, _cell(found.get("plugin"))]
        for name in SHOWN[1:]:
            cells += [_cell(found.get(name)), _ratio(found, "median_ms", name)]
        lines.append("| " + " | ".join([*cells, _ratio(found, "peak_mib", BASELINE)]) + " |")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return "not measured"
    if row["status"] != "ok":
        return str(row["status"]).split(":")[0]
    return f"{float(row['median_ms']):.3f} ({float(row['tflops']):.0f}, {float(row['peak_mib']):.0f})"


def _ratio(found: dict[str, Row], column: str, over: str) -> str:
    if any(found.get(name, {}).get("status") != "ok" for name in ("plugin", over)):
        return ""
    return f"{float(found[over][column]) / float(found['plugin'][column]):.1f}"


def table_text(rows: Sequence[Row]) -> str:
    """The Markdown table, with where it comes from and what is missing."""
    lines = [
        f"{column}: {'; '.join(sorted({row[column] for row in rows if row.get(column)}))}  "
        for column in ("gpu", "versions", "commit", "date")
    ]
    lines += [
        "",
        "H = 4, float16, causal, about 65,536 tokens, lengths uniform in 10 to 100 % of N. Cells: median device time",
        "in ms (TFLOP/s on the actual lengths, causal half; MiB beyond the inputs), warm, inputs larger than the L2",
        "cache. The plugin (TensorRT 8.5) takes int32 timestamps, as TensorRT 8 has no int64; the others take int64.",
        "native_rtx, the padded baseline, is the same ONNX's native body built for exactly these shapes by",
        "TensorRT-RTX on the same GPU. triton is launched from Python at every repeat, which shows in the shortest",
        "cases. A cell without a time: its reason is the CSV's status.",
    ]
    padded = [row for row in rows if row["backend"] == "native_padded"]
    refused = sum(row["status"].startswith("not built") for row in padded)
    if refused:
        lines += [
            f"TensorRT 8.5 could not build that body in {refused} of {len(padded)} cases tried: without cuBLAS",
            "it has no product of two activations.",
        ]
    cases = dict.fromkeys(row["case"] for row in rows)
    have = {(row["case"], row["backend"]) for row in rows}
    for name in SHOWN:
        missing = sum((case, name) not in have for case in cases)
        if missing:
            lines.append(f"{name}: {missing} of {len(cases)} cases were not measured.")
    return "\n".join([*lines, "", *table_lines(rows)]) + "\n"


def put_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what a file has between two marks.

    Raises:
        ValueError: if the file lacks the marks.
    """
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path} has no {begin} ... {end}")
    path.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, metavar="DIR", help="measure, and write one JSON per row here")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--n", type=int, nargs="+", default=list(LENGTHS), help="longest sequences")
    parser.add_argument("--dims", type=int, nargs="+", default=list(DIMS), help="head dims")
    parser.add_argument("--bias", type=int, nargs="+", choices=(0, 1), default=[0, 1], help="1: position and time bias")
    parser.add_argument("--plugin-library", type=Path, help="self-registering library for this TensorRT")
    parser.add_argument(
        "--budget", type=float, default=240.0, help="seconds for all cases; later ones are rows 'not run'"
    )
    parser.add_argument("--group-seconds", type=float, default=120.0, help="limit of one backend, dim and bias")
    parser.add_argument("--one-group", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--merge", type=Path, metavar="DIR", help="write the CSV from the parts under DIR")
    parser.add_argument("--table", action="store_true", help="print the Markdown table of the CSV")
    parser.add_argument("--into", type=Path, metavar="FILE", help="also put the table between this file's marks")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.one_group:
        run_group(arguments)
        return 0
    if arguments.parts is not None:
        return measure(arguments)
    if arguments.merge is not None:
        return merge(arguments.merge, arguments.csv)
    if arguments.table:
        text = table_text(read_rows(arguments.csv))
        if arguments.into is not None:
            put_between(arguments.into, BEGIN, END, text)
        print(text, end="")
        return 0
    print("bench_plugin.py measures on a GPU, with --parts; results/plugin.csv stays as it is")
    return 0


if __name__ == "__main__":
    sys.exit(main())
