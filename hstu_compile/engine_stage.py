"""The engine stage on its own: an .onnx file to an .engine file, on the machine that serves. Level 5, without torch.

With attention fused, to a schedule and an engine a segment; the kernels that run between them are the bundle's.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from hstu_compile.artifacts import OnnxGraph, Profile, SegmentedGraph
from hstu_compile.config import Attention
from hstu_compile.engine import engine_from_onnx, graph_precision
from hstu_compile.environment import choose_backend
from hstu_compile.errors import EngineError, UsageError
from hstu_compile.files import write_whole
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.graph_limits import read_limits
from hstu_compile.op_schema import attention_contract
from hstu_compile.plan_kernels import joined_kernels, kernel_facts
from hstu_compile.profiles import check_counts, graph_profiles
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.runtime.open_fused import FUSED_BACKEND
from hstu_compile.runtime.schedule_file import fused_files, schedule_text
from hstu_compile.segment_engines import engines_from_segments
from hstu_compile.table_files import read_model
from hstu_compile.trt_options import EngineOptions


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """What to build.

    Attributes:
        model: the .onnx file.
        output: the .engine file.
        backend: auto, tensorrt or tensorrt-rtx.
        max_batch: most sequences.
        opt_batch: typical number.
        max_seq_len: longest history; None reads it from the attention nodes.
        opt_seq_len: typical history; None is half of the longest.
        options: of the builder; explicit shapes replace the four numbers above.
        attention: "fused" cuts the graph at its attentions; files are then named after the stem of `output`.
    """

    model: Path
    output: Path
    backend: str
    max_batch: int
    opt_batch: int
    max_seq_len: int | None
    opt_seq_len: int | None
    options: EngineOptions
    attention: Attention = "auto"


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file; its large tables stay in the files beside it.

    Raises:
        EngineError: HSTU-E402, if it is not one, or a file that it names is not in its folder.
    """
    try:
        return read_model(path)
    except Exception as error:  # protobuf raises its own undocumented types on damaged files
        raise EngineError(
            "HSTU-E402",
            f"{path} cannot be read as an ONNX model",
            f"{type(error).__name__}: {error}",
            "pass the model.onnx of a bundle",
        ) from error


def profiles_of(request: EngineRequest, model: onnx.ModelProto | None = None) -> tuple[Profile, ...]:
    """Shape ranges of the request.

    Raises:
        UsageError: HSTU-E901, if a number is below 1.
        EngineError: HSTU-E405, if they contradict each other or what the graph was exported for.
    """
    check_counts(
        {
            "--max-batch": request.max_batch,
            "--opt-batch": request.opt_batch,
            "--max-seq-len": request.max_seq_len,
            "--opt-seq-len": request.opt_seq_len,
        }
    )
    explicit = request.options.explicit_profile()
    if explicit is not None:
        return (explicit,)
    model = model if model is not None else load_onnx(request.model)
    limits = read_limits(model)
    exported = limits.max_seq_len if limits is not None else None
    longest = request.max_seq_len if request.max_seq_len is not None else exported
    if limits is None or longest is None or longest > limits.max_seq_len:
        raise EngineError(
            "HSTU-E405",
            f"--max-seq-len {longest} cannot be used",
            f"the graph was exported for sequences of up to {exported} events"
            if exported is not None
            else "the graph has no attention node to read the longest sequence from",
            "build the bundle again with a larger --max-seq-len, or pass a smaller one here",
        )
    sizes = limits.sizes(
        request.max_batch,
        request.opt_batch,
        longest,
        request.opt_seq_len,
        has_kernels=bool(request.options.plugins) or request.attention == "fused",
    )
    return graph_profiles(limits.graph, tensor_specs(model.graph.input), sizes)


def require_one_engine(request: EngineRequest) -> None:
    """Refuse to name the trtexec command of a graph that is cut: trtexec takes graphs in one piece.

    Raises:
        UsageError: HSTU-E901.
    """
    if request.attention == "fused":
        raise UsageError(
            "HSTU-E901",
            "--dry-run and --attention fused exclude each other",
            "no trtexec command cuts a graph at its attentions",
            "leave --dry-run out; `hstu-compile build --attention fused --dry-run` says what would be built",
        )


def run_engine_stage(request: EngineRequest) -> dict[str, Any]:
    """Build the engine, or those of the segments, and write each file whole or not at all.

    Returns:
        Facts about the engine: output, backend, version, bytes, seconds, layers, kernels (None where the backend does
        not tell what it launches, and which of that only copies), compute_capabilities, messages; with
        attention fused `output` is the schedule, and `engines` are the segments' files.

    Raises:
        EngineError, PluginError: see `engine_from_onnx`.
        RewriteError: HSTU-E303, if the graph cannot be cut.
        UsageError: HSTU-E901, if the backend does not run segments.
        BundleError: HSTU-E802, if the file cannot be written.
    """
    if request.attention == "fused":
        return _run_fused_stage(request)
    model = load_onnx(request.model)
    profiles = profiles_of(request, model)
    choice = choose_backend(request.backend)
    if choice.name == "onnx":
        raise EngineError(
            "HSTU-E401",
            "no engine builder is available",
            choice.reason,
            "pip install 'hstu-compile[gpu]' on a GPU machine, or 'hstu-compile[rtx]'",
        )
    plugin = request.options.plugins[0] if request.options.plugins else None
    engine = engine_from_onnx(
        model,
        backend=choice.name,
        profiles=profiles,
        plugin_library=plugin,
        options=request.options,
        folder=request.model.parent,
    )
    write_whole(request.output, engine.plan)
    return {
        "output": str(request.output),
        "backend": engine.backend,
        "reason": choice.reason,
        "attention": "plugin" if plugin is not None else "native body (no plugin library was given)",
        "version": engine.version,
        "bytes": len(engine.plan),
        "seconds": engine.seconds,
        "layers": engine.layers,
        "kernels": kernel_facts(engine.kernels),
        "compute_capabilities": list(engine.compute_capabilities),
        "messages": list(engine.messages),
    }


def _run_fused_stage(request: EngineRequest) -> dict[str, Any]:
    if request.backend not in ("auto", FUSED_BACKEND):
        raise UsageError(
            "HSTU-E901",
            f"--attention fused and --backend {request.backend} exclude each other",
            "TensorRT takes our plugin, which runs the same kernels inside one engine",
            f"leave --attention out, or pass --backend {FUSED_BACKEND}",
        )
    model = load_onnx(request.model)
    (profile,) = profiles_of(request, model)
    choice = choose_backend(FUSED_BACKEND)
    graph = model.graph
    cut = segmented_from_onnx(
        OnnxGraph(
            request.output.stem,
            model,
            graph_precision(model),
            tensor_specs(graph.input),
            tensor_specs(graph.output),
            folder=request.model.parent,
        )
    )
    engines = engines_from_segments(cut, profile, request.options)
    schedule, names = fused_files(request.output.stem, len(engines))
    for name, engine in zip(names, engines, strict=True):
        write_whole(request.output.with_name(name), engine.plan)
    # Last: who finds a schedule finds its engines.
    write_whole(request.output.with_name(schedule), schedule_text(cut).encode("utf-8"))
    layers: Counter[str] = Counter()
    for engine in engines:
        layers.update(engine.layers)
    return {
        "output": str(request.output.with_name(schedule)),
        "engines": [str(request.output.with_name(name)) for name in names],
        "backend": engines[0].backend,
        "reason": choice.reason,
        "attention": f"fused: {_described_calls(cut)} between {len(engines)} engines",
        "version": engines[0].version,
        "bytes": sum(len(engine.plan) for engine in engines),
        "seconds": sum(engine.seconds for engine in engines),
        "layers": dict(layers),
        "kernels": kernel_facts(joined_kernels(engines)),
        "compute_capabilities": list(engines[0].compute_capabilities),
        "messages": [line for engine in engines for line in engine.messages],
    }


def _described_calls(cut: SegmentedGraph) -> str:
    """How many attentions and norms kernels compute."""
    attentions = sum(call.operator == attention_contract().name for call in cut.calls)
    norms = len(cut.calls) - attentions
    return f"{attentions} attentions" + (f" and {norms} norms" if norms else "")
