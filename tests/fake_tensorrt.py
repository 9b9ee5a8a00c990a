"""TensorRT's Python interface over engines that compute with NumPy on the memory of a `FakeCuda`."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.runtime._bfloat16 import bits_of_values, storage_dtype, values_of_bits
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime.tensorrt_session import TensorRtSession
from hstu_compile.tensorrt_api import TensorRtApi
from tests.fake_cuda import FakeCuda

Shape = tuple[int, ...]
Arrays = dict[str, NDArray[Any]]

_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}


@dataclasses.dataclass(frozen=True)
class FakeEngine:
    """An engine.

    Attributes:
        inputs: TensorRT's type, least and greatest shape of every input.
        outputs: TensorRT's type and declared shape, -1 where dynamic, of every output.
        infer: output shapes of input shapes.
        compute: outputs of inputs; bfloat16 is float32 here.
    """

    inputs: Mapping[str, tuple[str, Shape, Shape]]
    outputs: Mapping[str, tuple[str, Shape]]
    infer: Callable[[dict[str, Shape]], dict[str, Shape]]
    compute: Callable[[Arrays], Arrays]


def sums_engine(*, int64: bool = True) -> FakeEngine:
    """Per sequence, the sum of item_ids inside the offsets, as float32 [B]."""

    def compute(arrays: Arrays) -> Arrays:
        ids = arrays["item_ids"]
        return {"sums": np.array([ids[a:b].sum() for a, b in itertools.pairwise(arrays["seq_offsets"])], np.float32)}

    return FakeEngine(
        inputs={
            "item_ids": ("INT32", (1,), (8,)),
            "timestamps": ("INT64" if int64 else "INT32", (1,), (8,)),
            "seq_offsets": ("INT32", (2,), (5,)),
        },
        outputs={"sums": ("FLOAT", (-1,))},
        infer=lambda shapes: {"sums": (shapes["seq_offsets"][0] - 1,)},
        compute=compute,
    )


def fake_tensorrt(
    engine: FakeEngine | Mapping[bytes, FakeEngine],
    cuda: FakeCuda,
    *,
    loads: bool = True,
    log: str = "",
    int64: bool = True,
    runs: bool = True,
    captures: bool = True,
    stateful: bool = False,
    node_kind: int = 0,
) -> types.SimpleNamespace:
    """The module `tensorrt`, whose runtime loads `engine`, or nothing after writing `log`.

    Without `captures`, enqueueing fails while the stream is being recorded. With `stateful`, an engine reads its shapes
    from the context when it runs, also from a graph. In a graph it is a node of type `node_kind`: 0 is a kernel.
    Several engines are given by their plans.
    """
    if isinstance(engine, Mapping):
        modules = {plan: fake_tensorrt(each, cuda, loads=loads, captures=captures) for plan, each in engine.items()}
        return _of_several(modules)
    kind = types.SimpleNamespace
    types_of = {name: each[0] for name, each in (*engine.inputs.items(), *engine.outputs.items())}

    class ILogger:
        Severity = kind(VERBOSE=kind(name="VERBOSE"), ERROR=kind(name="ERROR"))

    class Context:
        def __init__(self, config: Any = None) -> None:
            self.shapes: dict[str, Shape] = {}
            self.addresses: dict[str, int] = {}
            self.memory, self.needs_memory = 0, False
            if config is not None:
                assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
                assert config.cuda_graph_strategy == "disabled"
                self.needs_memory = config.allocation == "user"

        def set_input_shape(self, name: str, shape: Shape) -> bool:
            _, low, high = engine.inputs[name]
            self.shapes[name] = tuple(shape)
            return all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return address != 0 and address % 256 == 0

        def get_tensor_shape(self, name: str) -> Shape:
            return engine.infer(self.shapes)[name]

        def at(self, addresses: dict[str, int], name: str, shape: Shape) -> NDArray[Any]:
            stored = storage_dtype(_NAMES[types_of[name]])
            nbytes = math.prod(shape) * stored.itemsize
            if not nbytes:
                return np.empty(shape, stored)
            cuda.require_device(addresses[name], nbytes)
            raw = (ctypes.c_uint8 * nbytes).from_address(addresses[name])
            return np.frombuffer(raw, stored).reshape(shape)

        def update_device_memory_size_for_shapes(self) -> int:
            assert set(self.shapes) == set(engine.inputs), "all shapes are set before"
            self.memory = 0
            return Engine.device_memory_size_v2

        def set_device_memory(self, address: int, size: int) -> None:
            assert size >= Engine.device_memory_size_v2
            cuda.require_device(address, size)
            self.memory = address

        def is_stream_capturable(self, stream: int) -> bool:
            return captures

        def require_apart(self) -> None:
            """What is written overlaps nothing else: a real engine writes while it still reads."""
            sizes = {name: math.prod(shape) for name, shape in (self.shapes | engine.infer(self.shapes)).items()}
            spans = {
                name: (address, address + sizes[name] * storage_dtype(_NAMES[types_of[name]]).itemsize)
                for name, address in self.addresses.items()
            }
            for name, other in itertools.permutations(spans, 2):
                if name in engine.outputs and sizes[name] and sizes[other]:
                    (start, stop), (other_start, other_stop) = spans[name], spans[other]
                    assert stop <= other_start or other_stop <= start, f"{name} is written over {other}"

        def execute_async_v3(self, stream: int) -> bool:
            assert set(self.addresses) == set(types_of), "an address is missing"
            assert self.memory or not self.needs_memory, "an engine without memory to compute in"

            self.require_apart()
            # A kernel's arguments are those of its launch, also in a graph that is launched much later.
            launched, addresses = dict(self.shapes), dict(self.addresses)

            def work() -> None:
                shapes_used = self.shapes if stateful else launched
                given = {name: self.at(addresses, name, shape).copy() for name, shape in shapes_used.items()}
                given = {n: values_of_bits(a) if types_of[n] == "BF16" else a for n, a in given.items()}
                shapes = engine.infer(shapes_used)
                for name, result in engine.compute(given).items():
                    assert result.shape == shapes[name], f"{name} is {result.shape}, inferred {shapes[name]}"
                    target = self.at(addresses, name, result.shape)
                    target[...] = bits_of_values(result) if types_of[name] == "BF16" else result

            recording = stream in cuda.recording
            cuda.enqueue(stream, work)
            if recording and node_kind:
                cuda.recording[stream][-1].kind = node_kind
            return runs and (captures or not recording)

    class Engine:
        num_io_tensors = len(types_of)
        device_memory_size_v2 = 1000

        def get_tensor_name(self, index: int) -> str:
            return list(types_of)[index]

        def get_tensor_dtype(self, name: str) -> Any:
            return kind(name=types_of[name])

        def get_tensor_mode(self, name: str) -> str:
            return "in" if name in engine.inputs else "out"

        def get_tensor_shape(self, name: str) -> Shape:
            if name in engine.outputs:
                return engine.outputs[name][1]
            _, low, high = engine.inputs[name]
            return tuple(a if a == b else -1 for a, b in zip(low, high, strict=True))

        def get_tensor_profile_shape(self, name: str, index: int) -> tuple[Shape, Shape, Shape]:
            _, low, high = engine.inputs[name]
            return low, high, high

        def create_runtime_config(self) -> Any:
            config = kind(allocation="static")
            config.set_execution_context_allocation_strategy = lambda value: setattr(config, "allocation", value)
            return config

        def create_execution_context(self, config: Any = None) -> Context:
            return Context(config)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            if log:
                self.logger.log(ILogger.Severity.ERROR, log)
            return Engine() if loads else None

    return kind(
        __version__="10.0.0",
        ILogger=type("ILogger", (ILogger,), {"__init__": lambda self: None}),
        Runtime=Runtime,
        TensorIOMode=kind(INPUT="in", OUTPUT="out"),
        DataType=kind(INT64=0) if int64 else kind(),
        DynamicShapesKernelSpecializationStrategy=kind(EAGER="eager"),
        CudaGraphStrategy=kind(DISABLED="disabled"),
        ExecutionContextAllocationStrategy=kind(USER_MANAGED="user"),
    )


def _of_several(modules: Mapping[bytes, types.SimpleNamespace]) -> types.SimpleNamespace:
    """One module whose runtime loads each plan's engine, and nothing for any other plan."""
    first = next(iter(modules.values()))

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            return modules[plan].Runtime(self.logger).deserialize_cuda_engine(plan) if plan in modules else None

    return types.SimpleNamespace(**{**vars(first), "Runtime": Runtime})


def open_fake(
    cuda: FakeCuda, engine: FakeEngine | None = None, *, cuda_graphs: int = 0, **settings: Any
) -> TensorRtSession:
    """A session on such a module; `settings` are those of `fake_tensorrt`."""
    engine = engine or sums_engine(int64=settings.get("int64", True))
    module: Any = fake_tensorrt(engine, cuda, **settings)
    return TensorRtSession(TensorRtApi("tensorrt", module), b"plan", driver=CudaDriver(cuda), cuda_graphs=cuda_graphs)
