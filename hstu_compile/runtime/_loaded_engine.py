"""One engine and its execution context: what is loaded, its shapes, addresses and enqueueing. Private. Level 3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import EngineError, PluginError
from hstu_compile.tensorrt_api import PluginKey, TensorRtApi

ATTENTION_PLUGIN = PluginKey("HstuAttention", "1", "hstu")

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_PLUGIN_MISSING = re.compile(
    r"plugin.*(not find|not found|cannot find|could not find|creator)|(find|found|creator).*plugin", re.I
)


def started_runtime(api: TensorRtApi, name: str, log: Any) -> Any:
    """TensorRT's object that engines are loaded by.

    Raises:
        EngineError: HSTU-E401 if it does not start.
    """
    try:
        return api.trt.Runtime(api.logger)
    except TypeError as error:  # pybind's way of saying that the factory returned null
        raise EngineError(
            "HSTU-E401", f"{name} does not start", log.tail(), "check the driver with `hstu-compile env`"
        ) from error


class LoadedEngine:
    """An engine with one execution context. The driver's context is current in every call.

    Args:
        api: the backend.
        runtime: of `started_runtime`; it outlives the engine.
        plan: serialised engine.
        name: of the session, for messages.
        log: of the load.
        settled: for TensorRT-RTX: the context compiles the kernels of new shapes when it first runs them, and not on
            another thread meanwhile, so a pass that ran once can be recorded, and its numbers stay; and it computes in
            the memory of `compute_in`, not in its own.

    Attributes:
        inputs: what the engine reads, in its order.
        outputs: what it writes, in its order.
        ranges: least and greatest shape of every input.

    Raises:
        EngineError: HSTU-E404 if the engine cannot be loaded.
        PluginError: HSTU-E503 if it asks for a plugin that is not registered.
    """

    def __init__(
        self, api: TensorRtApi, runtime: Any, plan: bytes, name: str, log: Any, *, settled: bool = False
    ) -> None:
        self._name = name
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            if any(_PLUGIN_MISSING.search(line) for line in log.lines):
                raise PluginError(
                    "HSTU-E503",
                    "the engine asks for a plugin that is not registered",
                    log.tail(),
                    "pass the plugin library that was built for this TensorRT, for instance with --plugins",
                    {"plugin": str(ATTENTION_PLUGIN)},
                )
            raise EngineError(
                "HSTU-E404",
                f"{name} cannot load the engine",
                log.tail(),
                "rebuild it on this machine: hstu-compile engine model.onnx",
                {"version": api.version, "engine_bytes": len(plan)},
            )
        self._context = self._engine.create_execution_context(*((_settled(api, self._engine),) if settled else ()))
        if self._context is None:
            raise EngineError(
                "HSTU-E404",
                f"{name} cannot create an execution context",
                log.tail(),
                "free GPU memory, or rebuild with a smaller --max-batch",
            )
        self._memory: tuple[int, int] | None = None
        inputs, outputs = [], []
        self.ranges: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for tensor in map(self._engine.get_tensor_name, range(self._engine.num_io_tensors)):
            dtype = _DTYPES[self._engine.get_tensor_dtype(tensor).name]
            shape = tuple("?" if size < 0 else int(size) for size in self._engine.get_tensor_shape(tensor))
            if self._engine.get_tensor_mode(tensor) == api.trt.TensorIOMode.INPUT:
                inputs.append(TensorSpec(tensor, dtype, shape))
                low, _, high = self._engine.get_tensor_profile_shape(tensor, 0)
                self.ranges[tensor] = tuple(map(int, low)), tuple(map(int, high))
            else:
                outputs.append(TensorSpec(tensor, dtype, shape))
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    @property
    def activation_bytes(self) -> int:
        """Device memory that a pass of any legal shapes computes in."""
        return int(self._engine.device_memory_size_v2)

    def compute_in(self, address: int, size_bytes: int) -> None:
        """Use this memory, which other engines may use while this one does not run. 256-byte aligned."""
        self._memory = address, size_bytes

    def inferred(self, shapes: Mapping[str, tuple[int, ...]], log: Any) -> dict[str, tuple[int, ...]]:
        """Set the shape of every input; the shape of every output."""
        for spec in self.inputs:
            if not self._context.set_input_shape(spec.name, shapes[spec.name]):
                raise self._failed(f"it refused {spec.name} of shape {list(shapes[spec.name])}", log)
        found = {}
        for spec in self.outputs:
            shape = tuple(int(size) for size in self._context.get_tensor_shape(spec.name))
            if any(size < 0 for size in shape):
                raise self._failed(f"the shape {list(shape)} of {spec.name} does not follow from the inputs", log)
            found[spec.name] = shape
        return found

    def bind(self, addresses: Mapping[str, int], log: Any) -> None:
        """Set the address of every input and output; `addresses` may name other tensors as well."""
        if self._memory is not None:
            # After the shapes: the context divides its memory anew for them.
            self._context.update_device_memory_size_for_shapes()
            self._context.set_device_memory(*self._memory)
        for spec in (*self.inputs, *self.outputs):
            if not self._context.set_tensor_address(spec.name, addresses[spec.name]):
                raise self._failed(f"it refused the address {addresses[spec.name]:#x} of {spec.name}", log)

    def execute(self, stream: int, log: Any) -> None:
        """Enqueue a pass."""
        if not self._context.execute_async_v3(stream):
            raise self._failed("enqueueing failed", log)

    def is_capturable(self, stream: int) -> bool:
        """Whether TensorRT-RTX lets a pass of the shapes that are set be recorded."""
        return bool(self._context.is_stream_capturable(stream))

    def _failed(self, what: str, log: Any) -> EngineError:
        return EngineError(
            "HSTU-E404",
            f"{self._name} could not run the engine",
            f"{what}\n    {log.tail()}",
            "check the versions with `hstu-compile env`; rebuild the engine on this machine",
        )

    def close(self) -> None:
        """Let go of both; a context must not outlive its engine."""
        self._context = None
        self._engine = None


def _settled(api: TensorRtApi, engine: Any) -> Any:
    """A runtime configuration of TensorRT-RTX under which nothing changes once a shape has run.

    LAZY, its default, compiles kernels for a new shape on a thread of its own, and some later pass runs those: one that
    was recorded before stays with the slower ones, a replay is compared with a plain pass of other kernels, and answers
    change in their last bits while a service runs. EAGER compiles in the first pass of a shape and waits for it. NONE,
    which promises not to, was measured to wait as long (tests/gpu/results/fused.json). The engine's own CUDA graphs are
    off: these passes are recorded together with the kernels between them.
    """
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = api.trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.cuda_graph_strategy = api.trt.CudaGraphStrategy.DISABLED
    config.set_execution_context_allocation_strategy(api.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return config
