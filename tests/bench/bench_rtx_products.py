"""One product by weights in TensorRT-RTX, written in several ways, beside cuBLAS: time, error and kernels.

  bench_rtx_products.py --out CSV                       (on a GPU, beside TensorRT-RTX and torch)
  bench_rtx_products.py --build-only                    (anywhere: whether TensorRT-RTX builds every form)
  bench_rtx_products.py --table [--into FILE.md]        (the Markdown table of the results, also between FILE's marks)

The products are those of the ranking model of the end-to-end benchmark: [rows, 512] by [512, 2048] with a bias,
[rows, 1536] by [1536, 512] with a residual, and two of its towers, which nothing follows; in float16 and in bfloat16.
What `form` says:

  half       everything in the half type
  exported   a product of that type, then Cast to float32, bias or residual, Cast back
  wide       Casts to float32 in front of the product and one back, then float16 (rewrite/widen_accumulators.py); not of
             bfloat16, whose products add up in float32 as they are
  first      as wide (bfloat16: as half), then Cast, zeros, Cast back, then the half type
  last       as wide (bfloat16: as half), then the half type, then Cast, zeros, Cast back (rewrite/float_epilogues.py):
             what engines are built of
  cublas     torch.mm or addmm

Device time by CUDA events with a cold L2 cache. err is the relative Frobenius distance to the product in float64.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY)]

from bench_plugin import commit_of, gpu_name, put_between, read_rows, status_of, today, write_rows  # noqa: E402

from hstu_compile.tensorrt_api import tensorrt_api  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "rtx_products.csv"
BEGIN, END = "<!-- products benchmark: begin -->", "<!-- products benchmark: end -->"
FORMS = ("half", "exported", "wide", "first", "last")
CUBLAS = "cublas"
BIAS, RESIDUAL, NOTHING = "bias", "residual", ""
#: The element types, as ONNX and as numpy have them.
TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
#: Depth, width and what follows.
PRODUCTS = ((512, 2048, BIAS), (1536, 512, RESIDUAL), (512, 256, NOTHING), (256, 512, NOTHING))
ROWS = (69_648, 18_440, 1_281)
COLUMNS = (
    *("dtype", "rows", "depth", "width", "follows", "form", "status", "median_ms", "p90_ms", "cv", "repeats", "tflops"),
    *("err", "kernels", "version", "gpu", "commit", "date"),
)

Row = dict[str, Any]
Product = tuple[int, int, str]


def forms_of(dtype: str) -> tuple[str, ...]:
    """The ways to write a product of an element type."""
    return FORMS if dtype == "float16" else tuple(form for form in FORMS if form != "wide")


def weights_of(depth: int, width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a product whose results are O(1), and a bias, in a half type."""
    rng = np.random.default_rng(depth + width)
    weight = rng.standard_normal((depth, width)) / np.sqrt(depth)
    kind = helper.tensor_dtype_to_np_dtype(TYPES[dtype])
    return weight.astype(kind), rng.standard_normal(width).astype(kind)


def product_graph(depth: int, width: int, follows: str, form: str, dtype: str) -> onnx.ModelProto:
    """The product in a form: x [rows, depth] and, of a residual, r [rows, width] to y [rows, width], all of `dtype`."""
    weight, bias = weights_of(depth, width, dtype)
    kind = TYPES[dtype]
    constants = {"weight": weight, "bias": bias, "wide_bias": bias.astype(np.float32)}
    constants["zeros"] = np.zeros(width, np.float32)
    nodes: list[onnx.NodeProto] = []

    def added(node: onnx.NodeProto) -> str:
        nodes.append(node)
        node.output.append(f"t{len(nodes)}")
        return str(node.output[0])

    def node(kind: str, *read: str) -> str:
        return added(helper.make_node(kind, read, []))

    def wide(name: str) -> str:
        return added(helper.make_node("Cast", [name], [], to=TensorProto.FLOAT))

    def half(name: str) -> str:
        return added(helper.make_node("Cast", [name], [], to=kind))

    term = {BIAS: "bias", RESIDUAL: "r", NOTHING: ""}[follows]
    if form in ("half", "exported") or dtype == "bfloat16":
        value = node("MatMul", "x", "weight")
    else:
        value = half(node("MatMul", wide("x"), wide("weight")))
    if form == "first":
        value = half(node("Add", wide(value), "zeros"))
    if term and form == "exported":
        value = half(node("Add", wide(value), "wide_bias" if follows == BIAS else wide(term)))
    elif term:
        value = node("Add", value, term)
    if form == "last":
        value = half(node("Add", wide(value), "zeros"))
    nodes[-1].output[0] = "y"
    read = {name for each in nodes for name in each.input}
    shapes = {"x": depth, "r": width}
    graph = helper.make_graph(
        nodes,
        form,
        [helper.make_tensor_value_info(name, kind, ["rows", size]) for name, size in shapes.items() if name in read],
        [helper.make_tensor_value_info("y", kind, ["rows", width])],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in read],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def build(api: Any, model: onnx.ModelProto) -> bytes:
    """A plan, built as it is written: engine_from_onnx would write every product in the form "last".

    Raises:
        RuntimeError: TensorRT-RTX refuses it.
    """
    trt = api.trt
    with api.capture() as log:
        builder = trt.Builder(api.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        if not trt.OnnxParser(network, api.logger).parse(model.SerializeToString()):
            raise RuntimeError(log.tail())
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            profile.set_shape(tensor.name, *((rows, tensor.shape[1]) for rows in (1, ROWS[1], ROWS[0])))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError(log.tail())
    return bytes(plan)


class Bench:
    """Measures on the GPU.

    Args:
        api: of TensorRT-RTX.
    """

    def __init__(self, api: Any) -> None:
        import torch
        from end_to_end_clock import TorchClock

        self._api, self._torch = api, torch
        self._runtime = api.trt.Runtime(api.logger)
        # On the default stream TensorRT waits for each pass.
        torch.cuda.set_stream(torch.cuda.Stream())
        self._clock = TorchClock(torch.device("cuda"))

    def weights(self, product: Product, dtype: str) -> tuple[Any, Any]:
        """`weights_of` a product on the GPU."""
        torch = self._torch
        kind = getattr(torch, dtype)
        # float32 has every number of a half type, and torch takes no bfloat16 from numpy.
        return tuple(
            torch.from_numpy(array.astype(np.float32)).cuda().to(kind) for array in weights_of(*product[:2], dtype)
        )

    def operands(self, rows: int, depth: int, width: int, dtype: str) -> dict[str, Any]:
        """Rows of O(1), a residual, and a place for the result."""
        torch = self._torch
        kind = getattr(torch, dtype)
        generator = torch.Generator("cuda").manual_seed(rows)
        made = {
            name: torch.randn(rows, size, device="cuda", generator=generator).to(kind)
            for name, size in (("x", depth), ("r", width))
        }
        return made | {"y": torch.empty(rows, width, device="cuda", dtype=kind)}

    def plan(self, plan: bytes, operands: dict[str, Any]) -> Any:
        """A call that runs a plan on torch's stream."""
        engine = self._runtime.deserialize_cuda_engine(plan)
        config = engine.create_runtime_config()
        kinds = self._api.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        context = engine.create_execution_context(config)
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) == self._api.trt.TensorIOMode.INPUT:
                context.set_input_shape(name, tuple(operands[name].shape))
            context.set_tensor_address(name, operands[name].data_ptr())
        stream = self._torch.cuda.current_stream().cuda_stream

        def run(kept: Any = engine) -> None:
            if not context.execute_async_v3(stream):
                raise RuntimeError("TensorRT-RTX could not enqueue")

        return run

    def cublas(self, operands: dict[str, Any], weight: Any, bias: Any, follows: str) -> Any:
        """A call of torch's product."""
        torch, x, y = self._torch, operands["x"], operands["y"]
        if follows == NOTHING:
            return lambda: torch.mm(x, weight, out=y)
        return lambda: torch.addmm(bias if follows == BIAS else operands["r"], x, weight, out=y)

    def row(self, run: Any, operands: dict[str, Any], product: Product, weights: tuple[Any, Any]) -> Row:
        """Time, error and kernels of a call."""
        from end_to_end_clock import timed

        from hstu_compile.kernel_timeline import timeline_rows, traced

        depth, width, follows = product
        torch, x = self._torch, operands["x"]
        weight, bias = (each.double() for each in weights)
        expected = x.double() @ weight
        if follows:
            expected += bias if follows == BIAS else operands["r"].double()
        operands["y"].zero_()
        run()
        error = float((operands["y"].double() - expected).norm() / expected.norm())
        measured = timed(self._clock.samples(run))
        kernels = [row["kernel"] for row in timeline_rows(traced(run, torch.cuda.synchronize))]
        tflops = 2.0 * len(x) * depth * width / measured["median_ms"] / 1e9
        measured.pop("p99_ms")
        return measured | {"tflops": tflops, "err": error, "kernels": "; ".join(kernels[:-2])}


def rows_of(api: Any, plans: dict[tuple[str, Product, str], bytes | str]) -> list[Row]:
    """A row for every type, product, number of rows and form."""
    bench, found = Bench(api), []
    for dtype, product in itertools.product(TYPES, PRODUCTS):
        weights = bench.weights(product, dtype)
        for rows in ROWS:
            operands = bench.operands(rows, *product[:2], dtype)
            for form in (CUBLAS, *forms_of(dtype)):
                row: Row = dict(zip(("depth", "width", "follows"), product, strict=True))
                row |= {"dtype": dtype, "rows": rows, "form": form}
                try:
                    if form == CUBLAS:
                        run = bench.cublas(operands, *weights, product[2])
                    elif isinstance(plan := plans[dtype, product, form], str):
                        raise RuntimeError(plan)
                    else:
                        run = bench.plan(plan, operands)
                    row |= {"status": "ok"} | bench.row(run, operands, product, weights)
                except Exception as error:
                    row["status"] = status_of(error)
                version = f"torch {bench._torch.__version__}" if form == CUBLAS else f"tensorrt-rtx {api.version}"
                found.append(row | {"version": version, "gpu": gpu_name(), "commit": commit_of(), "date": today()})
                print({key: row.get(key) for key in ("dtype", "rows", *COLUMNS[2:8], "err")}, flush=True)
    return found


def capability_of(kernels: str) -> str:
    """What the product's kernel is made for, by its name; "" where the name does not say."""
    return next((word for word in ("sm90", "sm80") if word in kernels), "")


def table_of(rows: Sequence[Row]) -> str:
    """What was measured with, then the tables of each element type that was."""
    facts = {name: ", ".join(dict.fromkeys(row[name] for row in rows)) for name in ("gpu", "version", "commit", "date")}
    lines = [f"{name}: {value}  " for name, value in facts.items()]
    for dtype in TYPES:
        if measured := [row for row in rows if row["dtype"] == dtype]:
            lines += ["", f"{dtype}:", "", *_times(dtype, measured), "", "Error, the largest of all rows:", ""]
            lines += _errors(dtype, measured)
    return "\n".join(lines) + "\n"


def _times(dtype: str, rows: Sequence[Row]) -> list[str]:
    """A line for each product and number of rows: ms, TFLOP/s and the kernel's capability of every form."""
    forms = (CUBLAS, *forms_of(dtype))
    lines = ["| product | rows |" + "".join(f" {form} |" for form in forms), "|---|---|" + "---|" * len(forms)]
    found = {(row["depth"], row["width"], row["rows"], row["form"]): row for row in rows}
    for depth, width, follows in PRODUCTS:
        for count in ROWS:
            cells = []
            for form in forms:
                row = found[str(depth), str(width), str(count), form]
                if row["status"] != "ok":
                    cells.append(row["status"])
                    continue
                capability = capability_of(row["kernels"])
                cells.append(f"{float(row['median_ms']):.4f} ({float(row['tflops']):.0f}, {capability})")
            lines.append(f"| {_name(depth, width, follows)} | {count:,} |" + "".join(f" {cell} |" for cell in cells))
    return lines


def _errors(dtype: str, rows: Sequence[Row]) -> list[str]:
    """A line for each product: the largest error of every form."""
    forms = (CUBLAS, *forms_of(dtype))
    lines = ["| product |" + "".join(f" {form} |" for form in forms), "|---|" + "---|" * len(forms)]
    for depth, width, follows in PRODUCTS:
        errors = [
            [float(row["err"]) for row in rows if _key(row) == (str(depth), str(width), form) and row["status"] == "ok"]
            for form in forms
        ]
        cells = "".join(f" {max(each):.1e} |" if each else " - |" for each in errors)
        lines.append(f"| {_name(depth, width, follows)} |{cells}")
    return lines


def _key(row: Row) -> tuple[str, str, str]:
    return row["depth"], row["width"], row["form"]


def _name(depth: int, width: int, follows: str) -> str:
    return f"{depth} x {width}" + (f", {follows}" if follows else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="CSV")
    parser.add_argument("--build-only", action="store_true", help="needs no GPU")
    parser.add_argument("--table", action="store_true", help=f"print {RESULTS.name} as Markdown")
    parser.add_argument("--into", type=Path, metavar="FILE", help="also put the table between this file's marks")
    arguments = parser.parse_args(argv)
    if arguments.table:
        text = table_of(read_rows(RESULTS))
        if arguments.into is not None:
            put_between(arguments.into, BEGIN, END, text)
        print(text, end="")
        return 0
    if arguments.out is None and not arguments.build_only:
        print("bench_rtx_products.py measures on a GPU, with --out")
        return 0
    api = tensorrt_api("tensorrt-rtx")
    plans: dict[tuple[str, Product, str], bytes | str] = {}
    for dtype, product in itertools.product(TYPES, PRODUCTS):
        for form in forms_of(dtype):
            try:
                plans[dtype, product, form] = build(api, product_graph(*product, form, dtype))
            except RuntimeError as error:
                plans[dtype, product, form] = status_of(error)
    failed = [key for key, plan in plans.items() if isinstance(plan, str)]
    print(f"{len(plans) - len(failed)} of {len(plans)} engines built", flush=True)
    if arguments.out is not None:
        rows = rows_of(api, plans)
        write_rows(arguments.out, COLUMNS, rows)
        return int(any(row["status"] != "ok" for row in rows))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
