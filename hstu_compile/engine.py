"""Stage 4: an ONNX graph and its profiles to a serialised engine. Level 3.

Runs beside TensorRT 8.5 on Python 3.10 with nothing but onnx, numpy and click: no torch, no exporter.

Precision is in the graph. TensorRT >= 10 and TensorRT-RTX build strongly typed networks and take no precision flag.
TensorRT 8 is weakly typed: half graphs set the FP16 flag, and every layer that is float32 in the graph is pinned there.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
from onnx import TensorProto

from hstu_compile.artifacts import EngineArtifact, EngineKernel, Precision, Profile
from hstu_compile.environment import Backend
from hstu_compile.errors import EngineError, UsageError
from hstu_compile.files import write_whole
from hstu_compile.plan_kernels import kernels_of_layers, kernels_of_plan
from hstu_compile.rewrite.float_epilogues import FloatEpilogues
from hstu_compile.rewrite.lower_tensorrt8 import lowered_for_tensorrt8
from hstu_compile.rewrite.merge_duplicates import MergeDuplicates
from hstu_compile.rewrite.narrow_adds import NarrowAdds
from hstu_compile.rewrite.narrow_residuals import NarrowResiduals
from hstu_compile.rewrite.widen_accumulators import WidenAccumulators
from hstu_compile.table_files import is_external, read_model, table_names, tensor_bytes, with_products_inside
from hstu_compile.tensorrt_api import LogCapture, PluginKey, TensorRtApi, tensorrt_api, tf32_override_off
from hstu_compile.trt_options import EngineOptions

# (phase, fraction 0..1); phases come from TensorRT.
Progress = Callable[[str, float], None]

_STANDARD = ("", "ai.onnx")
_MAX_MESSAGES = 50
_POOLS = {"workspace": "WORKSPACE", "tacticSharedMem": "TACTIC_SHARED_MEMORY", "tacticDram": "TACTIC_DRAM"}
# Input and output of a kernel of int8 operands, in the names of TensorRT 8.
_EIGHT_BIT_KERNEL = re.compile(r"_i8(i8|i32|f16|f32)_")
# Operands of float32, which may be multiplied as TF32: sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n.
_FLOAT32_KERNEL = re.compile(r"_f32f32_(tf32|f32)")
_PRECISIONS = {
    **{"Half": "fp16", "FP16": "fp16", "BFloat16": "bf16", "BF16": "bf16", "Float": "fp32", "FP32": "fp32"},
    **{"Int8": "int8", "INT8": "int8", "FP8": "fp8", "Float8": "fp8"},
}
_KINDS = ("plugin", "fp32", "fp16", "bf16", "int8", "fp8", "other")
# The least compute capability with float8.
_FP8_CAPABILITY = (8, 9)


def graph_precision(model: onnx.ModelProto) -> Precision:
    """Type of the graph's weights: the half type if any weight has one, else fp32."""
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    if TensorProto.BFLOAT16 in kinds:
        return "bf16"
    return "fp16" if TensorProto.FLOAT16 in kinds else "fp32"


def quantized_products(model: onnx.ModelProto) -> dict[str, str]:
    """Products of two dequantised operands: name to int8 or fp8."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    codes = {n.output[0]: kinds.get(n.input[0], 0) for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return {
        node.name: "fp8" if codes[node.input[1]] == TensorProto.FLOAT8E4M3FN else "int8"
        for node in model.graph.node
        if node.op_type == "MatMul" and all(name in codes for name in node.input)
    }


def plugin_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes of a custom domain, which a plugin or a local function must serve."""
    return [node for node in model.graph.node if node.domain not in _STANDARD]


def plugin_key(node: onnx.NodeProto) -> PluginKey:
    """What the parser looks this node's plugin up by: its attributes, else version "1" and the node's domain."""
    text = {a.name: a.s.decode() for a in node.attribute if a.name in ("plugin_version", "plugin_namespace")}
    return PluginKey(node.op_type, text.get("plugin_version", "1"), text.get("plugin_namespace", node.domain))


def engine_from_onnx(
    model: Path | onnx.ModelProto,
    *,
    backend: Backend,
    profiles: Sequence[Profile],
    plugin_library: Path | None = None,
    options: EngineOptions | None = None,
    on_progress: Progress | None = None,
    part_of: Precision | None = None,
    folder: Path | None = None,
) -> EngineArtifact:
    """Build an engine.

    With a plugin library every attention and norm node becomes one plugin layer. Without one, the native bodies that
    the graph carries are built instead.

    Args:
        model: the graph, or its file. It is not changed.
        backend: tensorrt or tensorrt-rtx.
        profiles: shape ranges; one optimisation profile each.
        plugin_library: library with the plugin, for real TensorRT only.
        options: builder settings.
        on_progress: called while TensorRT >= 10 builds.
        part_of: precision of the graph that this one is a segment of, for TensorRT-RTX: the segment is built like the
            others, whatever its own weights are, and so that a pass can be recorded together with other work.
        folder: where the files of the large tables are that a graph in memory names; a file's are beside it.

    Returns:
        The engine. `layers` counts, as the inspector shows them: total, plugin, and fp32, fp16, bf16, int8, fp8, other
        by the type of a layer's first output; of a graph with quantised products also these, as
        `quantized_products`, and the layers that compute with operands of eight bits, as `eight_bit_layers`. Where no
        GPU is there to load the engine, the parsed network is counted, and `messages` says so.

    Raises:
        EngineError: HSTU-E401 backend absent; E402 refused by parser or builder; E403 fewer plugin layers than
            such nodes; E405 profiles do not fit the graph's inputs.
        PluginError: HSTU-E503 or E504.
        RewriteError: HSTU-E302, if TensorRT 8 cannot take the graph.
        UsageError: HSTU-E901, if an option does not exist in this backend; E906, if a GPU that the engine is for lacks
            a type of the graph.
    """
    options = options or EngineOptions()
    api = tensorrt_api(backend)
    if api.is_rtx and (plugin_library is not None or options.plugins):
        raise UsageError(
            "HSTU-E901",
            "TensorRT-RTX takes no plugins",
            f"{plugin_library or options.plugins[0]} was given; a registered plugin makes its parser end the process",
            "leave the plugin out, or use --backend tensorrt",
        )
    if plugin_library is not None and options.profiling_verbosity == "none":
        raise UsageError(
            "HSTU-E901",
            "--profilingVerbosity none hides the layers",
            "the number of plugin layers in the engine could not be checked",
            "use --profilingVerbosity layer_names_only or detailed",
        )
    started = time.perf_counter()
    proto = _loaded(model)
    folder = model.parent if isinstance(model, Path) else folder
    precision = part_of or graph_precision(proto)
    wanted = plugin_nodes(proto) if plugin_library is not None else []
    products = quantized_products(proto)
    if "fp8" in products.values():
        _require_fp8(options)
    with api.capture() as log:
        proto = _prepared(proto, folder, api, precision, plugin_library, options)
        build = _Build(api, log, proto, folder, precision, options, on_progress)
        plan, network_layers = build.run(profiles)
        with tf32_override_off(api.is_rtx and build.is_float32):
            layers, kernels, notes = _inspected(
                api, log, plan, options, network_layers, {node.name for node in wanted}, is_half=precision != "fp32"
            )
    if products:
        layers["quantized_products"] = len(products)
        if layers["eight_bit_layers"] < len(products):
            notes.append(
                f"{layers['eight_bit_layers']} layers compute with operands of eight bits, and the graph has "
                f"{len(products)} quantised products: the builder left the others in another type, or fused them"
            )
    else:
        del layers["eight_bit_layers"]
    if wanted and layers["plugin"] < len(wanted):
        kinds = Counter(node.op_type for node in wanted)
        raise EngineError(
            "HSTU-E403",
            f"the engine has {layers['plugin']} plugin layers",
            f"the graph has {' and '.join(f'{n} {kind}' for kind, n in kinds.items())} nodes; "
            "each must be one plugin layer",
            "rebuild with --exportLayerInfo layers.json and look for what took the missing nodes",
            {"plugin_layers": layers["plugin"], "nodes": [node.name for node in wanted]},
        )
    return EngineArtifact(
        plan=plan,
        backend=backend,
        version=api.version,
        compute_capabilities=options.compute_capabilities,
        profiles=tuple(profiles),
        layers=layers,
        messages=tuple((notes + log.warnings)[:_MAX_MESSAGES]),
        seconds=time.perf_counter() - started,
        kernels=kernels,
    )


def _require_fp8(options: EngineOptions) -> None:
    """Refuse GPUs without float8 among those that the engine is for."""
    lacking = [
        each for each in options.compute_capabilities if tuple(map(int, each.split(".", maxsplit=1))) < _FP8_CAPABILITY
    ]
    if lacking:
        raise UsageError(
            "HSTU-E906",
            f"an fp8 graph cannot be built for --computeCapabilities {','.join(lacking)}",
            "such GPUs have no float8; it starts with 8.9",
            "leave them out, or build the bundle with --int8",
            {"compute_capabilities": lacking},
        )


def _loaded(model: Path | onnx.ModelProto) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        return read_model(model)
    except Exception as error:  # protobuf raises its own types, which differ between versions
        raise EngineError(
            "HSTU-E402",
            f"{model} cannot be read as ONNX",
            f"{type(error).__name__}: {error}",
            "pass the model.onnx that hstu-compile wrote",
            {"path": str(model)},
        ) from error


def _with_products_inside(proto: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    try:
        return with_products_inside(proto, folder)
    except (OSError, ValueError) as error:
        raise EngineError(
            "HSTU-E402",
            "TensorRT 8 cannot take the vectors of all items",
            str(error),
            "build the bundle without --top-k, or use TensorRT 10 or newer",
        ) from error


def _prepared(
    proto: onnx.ModelProto,
    folder: Path | None,
    api: TensorRtApi,
    precision: Precision,
    plugin_library: Path | None,
    options: EngineOptions,
) -> onnx.ModelProto:
    """Load plugins, and leave the parser exactly one way to take each custom node."""
    keys = list(dict.fromkeys(plugin_key(node) for node in plugin_nodes(proto)))
    for library in options.plugins:
        api.load_plugins(library, [])
    if plugin_library is not None:
        api.load_plugins(plugin_library, keys)
    bodies = {(function.domain, function.name) for function in proto.functions}
    native = plugin_library is None
    bare = [node for node in plugin_nodes(proto) if (node.domain, node.op_type) not in bodies]
    if bare and api.is_rtx:
        raise EngineError(
            "HSTU-E402",
            "TensorRT-RTX cannot take this graph",
            f"{bare[0].op_type} {bare[0].name} has no native body, and TensorRT-RTX takes no plugins",
            "export the model with hstu-compile, which attaches a native body",
            {"nodes": [node.name for node in bare]},
        )
    if bare and native:
        api.require_creators(dict.fromkeys(plugin_key(node) for node in bare), None)
    if api.is_tensorrt8:
        # It may write products as convolutions, and so other weights.
        inside = _with_products_inside(proto, folder)
        return lowered_for_tensorrt8(inside, precision, native=native, has_cublas=_cublas_works())[0]
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if native:
        # Inlined here and not by the parser: a creator that something else registered in this process must not decide
        # what is built, and the layers can share what their bodies have in common.
        copy = onnx.inliner.inline_local_functions(copy)
        MergeDuplicates().call(copy)
        NarrowAdds().call(copy)
        if api.is_rtx:
            NarrowResiduals().call(copy)
            FloatEpilogues().call(copy)
        WidenAccumulators().call(copy)
        return copy
    # TensorRT 10.0 to 10.6 may prefer the local function to the plugin.
    del copy.functions[:]
    return copy


def _cublas_works() -> bool:
    """Whether a real cuBLAS answers; a stand-in that only satisfies the loader does not."""
    for name in ("libcublas.so.12", "libcublas.so.11"):
        try:
            version = ctypes.c_int(0)
            if ctypes.CDLL(name).cublasGetProperty(0, ctypes.byref(version)) == 0 and version.value > 0:
                return True
        except (OSError, AttributeError):
            continue
    return False


@contextlib.contextmanager
def _interrupts_to(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C ask the monitor to stop the build.

    Python's own handler would raise inside the monitor's methods, and TensorRT's frames above them are noexcept.
    Without a monitor (TensorRT 8) Python's handler runs when the builder returns, as ever.
    """
    if monitor is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        monitor.failure = KeyboardInterrupt()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class _Build:
    """One run of the builder."""

    def __init__(
        self,
        api: TensorRtApi,
        log: LogCapture,
        proto: onnx.ModelProto,
        folder: Path | None,
        precision: Precision,
        options: EngineOptions,
        on_progress: Progress | None,
    ) -> None:
        self.api, self.trt, self.log, self.folder = api, api.trt, log, folder
        self.proto, self.precision, self.options, self.on_progress = proto, precision, options, on_progress
        self.is_quantized = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)

    def run(self, profiles: Sequence[Profile]) -> tuple[bytes, dict[str, int]]:
        """The serialised engine, and the layers of the network as it was parsed."""
        trt = self.trt
        try:
            builder = trt.Builder(self.api.logger)
        except TypeError as error:  # pybind's way of saying that the factory returned null
            raise EngineError(
                "HSTU-E401",
                f"the {self.api.backend} builder does not start",
                self.log.tail(),
                "TensorRT needs an NVIDIA driver and GPU to build; TensorRT-RTX (--backend tensorrt-rtx) does not",
            ) from error
        flags = trt.NetworkDefinitionCreationFlag
        flag = flags.EXPLICIT_BATCH if self.api.is_tensorrt8 else flags.STRONGLY_TYPED
        network = builder.create_network(1 << int(flag))
        parser = trt.OnnxParser(network, self.api.logger)
        self._parse(parser, network)
        config = builder.create_builder_config()
        cache = self._configure(config, network)
        for profile in profiles:
            self._add_profile(builder, config, network, profile)
        monitor = self._monitor(config)
        with _interrupts_to(monitor), tf32_override_off(self.api.is_rtx and self.is_float32):
            plan = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.failure is not None:
            raise monitor.failure
        if plan is None:
            raise EngineError(
                "HSTU-E402",
                f"{self.api.backend} {self.api.version} could not build the engine",
                self.log.tail(),
                f"read the messages above; {self._way_out()}",
            )
        if cache is not None and self.options.timing_cache is not None:
            write_whole(self.options.timing_cache, bytes(config.get_timing_cache().serialize()))
        return bytes(plan), _network_layers(network)

    def _way_out(self) -> str:
        """What may help: of the causes that a builder's messages name, nearly all are memory."""
        ways = ["a smaller --max-batch or --max-seq-len needs less GPU memory"]
        if self.options.memory_pools:
            pools = ", ".join(f"{pool} to {size} bytes" for pool, size in self.options.memory_pools)
            ways.append(f"--memPoolSize limits {pools}, and a larger one, or none, leaves more to the kernels")
        # An engine holds its tables.
        nbytes = sum(tensor_bytes(tensor) for tensor in self.proto.graph.initializer if is_external(tensor))
        if nbytes:
            ways.append(
                f"its tables are {nbytes} bytes, and `build --embeddings external` leaves those of a ranking model out"
            )
        return "; ".join(ways)

    def _parse(self, parser: Any, network: Any) -> None:
        beside: tuple[str, ...] = ()
        if self.folder is not None and table_names(self.proto):
            # Tells the parser where the files of the tables are; nothing of that name is read.
            beside = (str(self.folder.absolute() / "model.onnx"),)
        parsed = parser.parse(self.proto.SerializeToString(), *beside)
        if parsed and network.num_layers > 0:
            return
        problems = [self._parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise EngineError(
            "HSTU-E402",
            f"the ONNX parser of {self.api.backend} {self.api.version} refused the graph",
            "\n    ".join(problems or ["no error was reported, and the network is empty"])
            + f"\n    log: {self.log.tail()}",
            "check the graph with `hstu-compile inspect`; a plugin that is missing is named above",
            {"parser_errors": problems},
        )

    def _parser_error(self, error: Any) -> str:
        index = error.node()
        nodes = self.proto.graph.node
        if hasattr(error, "node_name") and error.node_name():
            place = f"{error.node_operator()} {error.node_name()}"
        elif 0 <= index < len(nodes):
            place = f"{nodes[index].op_type} {nodes[index].name or nodes[index].output[0]}"
        else:
            place = f"node {index}"
        return f"{place}: {error.desc()} ({error.code()}, {error.func()})"

    def _configure(self, config: Any, network: Any) -> Any:
        """Set every option; returns the timing cache in use, or None."""
        trt, options = self.trt, self.options
        verbosity = (options.profiling_verbosity or "detailed").upper()
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, verbosity)
        self._set(config, "builder_optimization_level", options.builder_optimization_level, "builderOptimizationLevel")
        self._set(config, "max_aux_streams", options.max_aux_streams, "maxAuxStreams")
        for pool, size in options.memory_pools:
            config.set_memory_pool_limit(self._member(trt.MemoryPoolType, _POOLS[pool], "memPoolSize"), size)
        if options.hardware_compatibility is not None:
            name = {"none": "NONE", "ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}
            levels = getattr(trt, "HardwareCompatibilityLevel", None)
            level = self._member(levels, name[options.hardware_compatibility], "hardwareCompatibilityLevel")
            self._set(config, "hardware_compatibility_level", level, "hardwareCompatibilityLevel")
        if options.version_compatible:
            config.set_flag(self._member(trt.BuilderFlag, "VERSION_COMPATIBLE", "versionCompatible"))
        self._set_tf32(config)
        if self.api.is_tensorrt8:
            self._set_weak_types(config, network)
        self._set_compute_capabilities(config)
        return self._set_timing_cache(config)

    @property
    def is_float32(self) -> bool:
        """Whether float32 products must not be rounded to TF32."""
        return self.options.no_tf32 or self.precision == "fp32"

    def _set_tf32(self, config: Any) -> None:
        # float32 graphs are promised to agree with eager float32, which TF32's 10-bit mantissa does not. In half graphs
        # the only float32 products are those of the native attention body, on half-valued operands that TF32 represents
        # exactly (fp16 has the same 10 bits, bf16 fewer), so TF32 tensor cores change nothing there but the speed.
        if self.is_float32:
            config.clear_flag(self.trt.BuilderFlag.TF32)

    def _set_weak_types(self, config: Any, network: Any) -> None:
        trt = self.trt
        if not _cublas_works():
            config.set_tactic_sources(0)
            # Keeps the graph compiler from asking for the library that is not there.
            preview = getattr(trt, "PreviewFeature", None)
            for name in ("DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805", "FASTER_DYNAMIC_SHAPES_0805"):
                if hasattr(preview, name):
                    config.set_preview_feature(getattr(preview, name), True)
        if self.precision != "fp16":
            return
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        if self.is_quantized:
            config.set_flag(trt.BuilderFlag.INT8)
        pin_types(trt, network, is_quantized=self.is_quantized)

    def _set_compute_capabilities(self, config: Any) -> None:
        wanted = self.options.compute_capabilities
        if not wanted:
            return
        if not hasattr(config, "set_compute_capability"):
            raise UsageError(
                "HSTU-E901",
                "--computeCapabilities cannot be used",
                f"{self.api.backend} {self.api.version} builds for the GPU that it runs on",
                "use --backend tensorrt-rtx, or leave --computeCapabilities out",
            )
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            name = "SM" + capability.replace(".", "")
            config.set_compute_capability(self._member(self.trt.ComputeCapability, name, "computeCapabilities"), index)

    def _set_timing_cache(self, config: Any) -> Any:
        path = self.options.timing_cache
        if path is None:
            return None
        if self.api.is_rtx:
            raise UsageError(
                "HSTU-E901",
                "--timingCacheFile cannot be used",
                "TensorRT-RTX times nothing while it builds; its timing cache does nothing",
                "leave --timingCacheFile out",
            )
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise EngineError(
                "HSTU-E405", f"the timing cache {path} cannot be read", str(error), "remove it or name another file"
            ) from error
        before = len(self.log.lines)
        cache = config.create_timing_cache(content)
        # TensorRT turns a file that it cannot read into an empty cache, and only logs that it did.
        unread = any("deserialize timing cache" in line for line in self.log.lines[before:])
        if cache is None or unread or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise EngineError(
                "HSTU-E405",
                f"the timing cache {path} cannot be used",
                f"it is not a cache of {self.api.backend} {self.api.version} on this GPU\n    {self.log.tail()}",
                "name another file with --timingCacheFile, one per TensorRT version and GPU",
                {"path": str(path)},
            )
        return cache

    def _member(self, enum: Any, name: str, option: str) -> Any:
        """An enum member, or a UsageError that lists the ones there are."""
        members = [] if enum is None else list(enum.__members__)
        if name not in members:
            raise UsageError(
                "HSTU-E901",
                f"--{option} {name} cannot be used",
                f"{self.api.backend} {self.api.version} has {', '.join(members) or 'no such setting'}",
                f"leave --{option} out or choose one of these",
                {"option": option},
            )
        return enum.__members__[name]

    def _set(self, config: Any, attribute: str, value: Any, option: str) -> None:
        if value is None:
            return
        if not hasattr(config, attribute):
            raise UsageError(
                "HSTU-E901",
                f"--{option} cannot be used",
                f"{self.api.backend} {self.api.version} has no such setting",
                f"leave --{option} out, or use a newer TensorRT",
                {"option": option},
            )
        setattr(config, attribute, value)

    def _add_profile(self, builder: Any, config: Any, network: Any, profile: Profile) -> None:
        inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
        problems = [f"{name} is not an input" for name in profile.opt if name not in inputs]
        for name, shape in inputs.items():
            if -1 not in shape:
                continue
            if name not in profile.opt:
                problems.append(f"{name} {list(shape)} has dynamic sizes and no range")
                continue
            for kind, given in (("min", profile.min[name]), ("opt", profile.opt[name]), ("max", profile.max[name])):
                fits = len(given) == len(shape) and all(a in (-1, b) for a, b in zip(shape, given, strict=True))
                if not fits:
                    problems.append(f"{name} is {list(shape)}, and its {kind} shape {list(given)} does not fit")
        if problems:
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items())
            raise EngineError(
                "HSTU-E405",
                f"profile {profile.name} does not fit the graph",
                "; ".join(problems) + f"\n    Inputs: {listed}",
                "give min, opt and max shapes for every input with dynamic sizes",
                {"inputs": {name: list(shape) for name, shape in inputs.items()}},
            )
        made = builder.create_optimization_profile()
        for name in profile.opt:
            made.set_shape(name, profile.min[name], profile.opt[name], profile.max[name])
        if config.add_optimization_profile(made) < 0:
            raise EngineError(
                "HSTU-E405",
                f"{self.api.backend} refused profile {profile.name}",
                self.log.tail(),
                "keep min <= opt <= max, and sizes that fit this GPU",
            )

    def _monitor(self, config: Any) -> Any:
        """Report progress, and let Ctrl-C stop the build, where this TensorRT can tell how far it is."""
        if not hasattr(config, "progress_monitor") or not hasattr(self.trt, "IProgressMonitor"):
            return None
        report, trt = self.on_progress, self.trt

        class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self.failure: BaseException | None = None
                self.totals: dict[str, int] = {}

            def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
                self.totals[phase] = max(num_steps, 1)

            def phase_finish(self, phase: str) -> None:
                self.totals.pop(phase, None)

            def step_complete(self, phase: str, step: int) -> bool:
                # Nothing may be raised through TensorRT's frames, which are noexcept: it would end the process.
                try:
                    if report is not None and phase in self.totals:
                        report(phase, min(1.0, (step + 1) / self.totals[phase]))
                except BaseException as error:
                    self.failure = error
                return self.failure is None

        monitor = Monitor()
        config.progress_monitor = monitor
        return monitor


def _count(kinds: Sequence[str], eight_bit: int) -> dict[str, int]:
    return {"total": len(kinds), **{kind: kinds.count(kind) for kind in _KINDS}, "eight_bit_layers": eight_bit}


def pin_types(trt: Any, network: Any, *, is_quantized: bool) -> None:
    """Fix the types that TensorRT 8 may not choose, in a network of half precision that obeys them.

    Args:
        trt: the module.
        network: as parsed.
        is_quantized: whether the graph has quantised products.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    # With the FP16 flag the builder may compute any layer in half. What the graph has in float32 (LayerNorm,
    # normalisation, counts) is there because half is not enough for it.
    skipped = {trt.LayerType.CONSTANT, trt.LayerType.SHAPE, trt.LayerType.PLUGIN_V2, trt.LayerType.IDENTITY}
    if is_quantized:
        # Their types follow from the quantisation around them; the convolutions that are float32 in the file are
        # those of quantised operands, and pinned to float32 they would be computed in it.
        skipped |= {trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE, trt.LayerType.CONVOLUTION}
        # A Cast to half reads each of them. Told so, 8.5.3.1 makes an int8 kernel that scales its sums in float32 and
        # writes half. Told nothing, it takes none of its kernels from int8 to another type ("All of the candidates
        # were removed").
        for layer in _eight_bit_layers(layers):
            layer.set_output_type(0, trt.DataType.HALF)
    for layer in layers:
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        if layer.type in skipped or any(output.is_shape_tensor for output in outputs):
            continue
        if outputs[0].dtype == trt.DataType.FLOAT:
            layer.precision = trt.DataType.FLOAT
            layer.set_output_type(0, trt.DataType.FLOAT)


def _eight_bit_layers(layers: Sequence[Any]) -> list[Any]:
    """Products and convolutions of a parsed network whose both operands are dequantised."""
    dequantized = {layer.get_output(0).name for layer in layers if layer.type.name == "DEQUANTIZE"}
    found = []
    for layer in layers:
        if layer.type.name in ("MATRIX_MULTIPLY", "CONVOLUTION"):
            operands = [layer.get_input(i) for i in range(2)]
            if all(each is not None and each.name in dequantized for each in operands):
                found.append(layer)
    return found


def _network_layers(network: Any) -> dict[str, int]:
    """Layers of a parsed network by kind; in a strongly typed network these are the types that will run."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = []
    for layer in layers:
        dtype = layer.get_output(0).dtype.name if layer.num_outputs else ""
        names = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
        kinds.append("plugin" if "PLUGIN" in layer.type.name else names.get(dtype, "other"))
    return _count(kinds, len(_eight_bit_layers(layers)))


def layer_kind(layer: dict[str, Any] | str, plugin_names: set[str]) -> str:
    """plugin, fp32, fp16, bf16, int8, fp8 or other, from one entry of the inspector's JSON.

    Args:
        layer: an object, or only the name at verbosity layer_names_only.
        plugin_names: names of the graph's plugin nodes.
    """
    if isinstance(layer, str):
        return "plugin" if any(name and name in layer for name in plugin_names) else "other"
    if "plugin" in str(layer.get("LayerType", "")).lower():
        return "plugin"
    outputs = layer.get("Outputs", [])
    return _tensor_kind(outputs[0]) if outputs else "other"


def _tensor_kind(tensor: dict[str, Any]) -> str:
    """fp32, fp16, bf16, int8, fp8 or other, from a tensor of the inspector's JSON."""
    # TensorRT <= 10 writes "Format/Datatype": "Row major linear FP16 format"; 11 has a field of its own.
    text = str(tensor.get("Datatype") or tensor.get("Format/Datatype", ""))
    match = re.search(rf"\b({'|'.join(_PRECISIONS)})\b", text)
    return _PRECISIONS[match[1]] if match else "other"


def computes_in_eight_bits(layer: dict[str, Any] | str) -> bool:
    """Whether a layer of the inspector's JSON reads operands of eight bits to compute with them.

    Conversions and copies do not count, nor does what widens them again and nothing else. Of an engine with dynamic
    shapes TensorRT 8 says no types; then the name of the kernel does, such as sm80_xmma_..._i8f16_i8i32_f32_...
    """
    if isinstance(layer, str):
        return False
    copies = ("reformat", "noop", "cast", "dequantize", "constant", "shuffle")
    if any(word in str(layer.get("LayerType", "")).lower() for word in copies):
        return False
    by_type = any(_tensor_kind(tensor) in ("int8", "fp8") for tensor in layer.get("Inputs", []))
    return by_type or _EIGHT_BIT_KERNEL.search(str(layer.get("TacticName", ""))) is not None


def computes_in_float32(layer: dict[str, Any] | str) -> bool:
    """Whether a product or convolution of the inspector's JSON has a kernel with float32 operands, by its name."""
    if isinstance(layer, str):
        return False
    kind = str(layer.get("LayerType", "")).lower()
    is_product = any(word in kind for word in ("conv", "gemm", "matrixmultiply"))
    return is_product and _FLOAT32_KERNEL.search(str(layer.get("TacticName", ""))) is not None


def _inspected(
    api: TensorRtApi,
    log: LogCapture,
    plan: bytes,
    options: EngineOptions,
    network_layers: dict[str, int],
    plugin_names: set[str],
    *,
    is_half: bool,
) -> tuple[dict[str, int], tuple[EngineKernel, ...] | None, list[str]]:
    """Layer counts of the engine, its kernels, and notes on where they come from. Writes --exportLayerInfo."""
    named = kernels_of_plan(plan) if api.is_rtx else None
    engine = _loaded_engine(api, plan)
    if engine is None:
        if options.export_layer_info is not None or not api.is_rtx:
            raise EngineError(
                "HSTU-E404",
                "the engine that was just built cannot be loaded for inspection",
                log.tail(),
                "leave --exportLayerInfo out, or build on a machine with a GPU",
            )
        return network_layers, named, ["the engine cannot be loaded here; layers are those of the parsed network"]
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(api.trt.LayerInformationFormat.JSON)
    if options.export_layer_info is not None:
        write_whole(options.export_layer_info, text.encode())
    entries = json.loads(text).get("Layers", [])
    kinds = [layer_kind(entry, plugin_names) for entry in entries]
    kernels = named if api.is_rtx else kernels_of_layers(entries)
    widened = sum(map(computes_in_float32, entries)) if is_half else 0
    notes = [f"{widened} products of this half-precision graph are computed by float32 or TF32 kernels"]
    return _count(kinds, sum(map(computes_in_eight_bits, entries))), kernels, notes if widened else []


def _loaded_engine(api: TensorRtApi, plan: bytes) -> Any:
    """The engine just built, or None where it cannot be loaded (TensorRT-RTX without a GPU)."""
    try:
        runtime = api.trt.Runtime(api.logger)
    except TypeError:  # pybind's way of saying that the factory returned null
        return None
    return runtime.deserialize_cuda_engine(plan)
