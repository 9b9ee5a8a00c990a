"""A cut graph on fakes: engines that compute their segment in ONNX Runtime, kernels that compute the native body."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hstu_compile.artifacts import Crossing, KernelCall, OnnxGraph, Schedule, SegmentedGraph, TensorSpec
from hstu_compile.axis_sizes import axis_size
from hstu_compile.runtime._bfloat16 import bits_of_values, storage_dtype, values_of_bits
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime.attention_kernels import Launch, Placed, Shape
from hstu_compile.runtime.fused_session import FusedSession
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.runtime.segmented_onnx_session import kernel_model
from hstu_compile.tensorrt_api import TensorRtApi
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import Arrays, FakeEngine, fake_tensorrt

_TRT_TYPES = {"int32": "INT32", "int64": "INT64", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
_LARGEST = 4096


def _dims(spec: TensorSpec, dynamic: int) -> Shape:
    return tuple(size if isinstance(size, int) else dynamic for size in spec.shape)


def _sizes(specs: tuple[TensorSpec, ...], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Every axis of the specs by its normalised name."""
    found: dict[str, int] = {}
    for spec in specs:
        for axis, size in zip(spec.shape, shapes[spec.name], strict=True):
            if isinstance(axis, str):
                expression = axis_size(axis)
                assert expression is not None
                assert found.setdefault(str(expression), size) == size, f"{axis} has two sizes"
                if len(expression.terms) == 1:
                    name, factor = expression.terms[0]
                    found.setdefault(name, (size - expression.constant) // factor)
    return found


def segment_engine(segment: OnnxGraph) -> FakeEngine:
    """The segment as an engine; shapes follow from the names of its axes."""
    session = OnnxRuntimeSession(segment.model)

    def infer(shapes: dict[str, Shape]) -> dict[str, Shape]:
        sizes = _sizes(segment.inputs, shapes)
        found = {}
        for spec in segment.outputs:
            dims = []
            for axis in spec.shape:
                if isinstance(axis, int):
                    dims.append(axis)
                    continue
                expression = axis_size(axis)
                assert expression is not None
                dims.append(sizes[str(expression)] if str(expression) in sizes else expression.at(sizes))
            found[spec.name] = tuple(dims)
        return found

    def compute(arrays: Arrays) -> Arrays:
        return session.run({spec.name: arrays[spec.name] for spec in session.inputs})

    return FakeEngine(
        # Offsets have two entries at least, everything else one row.
        inputs={
            spec.name: (_TRT_TYPES[spec.dtype], _dims(spec, 2 if "offsets" in spec.name else 1), _dims(spec, _LARGEST))
            for spec in segment.inputs
        },
        outputs={spec.name: (_TRT_TYPES[spec.dtype], _dims(spec, -1)) for spec in segment.outputs},
        infer=infer,
        compute=compute,
    )


@dataclasses.dataclass
class FakeKernels:
    """`Kernels` on the memory of a `FakeCuda`.

    Attributes:
        workspace: bytes that every attention asks for, and fills when it runs.
        opened: kernels that were not closed.
        launches: enqueued, while not recording.
        found: last byte of the first attention's workspace when it runs, where there is one.
        skips: kernels, when recorded, do nothing: what a broken graph would do.
    """

    graph: SegmentedGraph
    cuda: FakeCuda
    workspace: int = 0
    opened: int = 0
    launches: int = 0
    skips: bool = False
    found: list[int] = dataclasses.field(default_factory=list)
    name: str = "fake kernels"

    def prepare(self, call: KernelCall, tensors: Mapping[str, TensorSpec]) -> Any:
        assert set(tensors) == {*call.inputs, "out"}
        self.opened += 1
        return _FakeKernel(self, call, tensors)


class _FakeKernel:
    def __init__(self, kernels: FakeKernels, call: KernelCall, tensors: Mapping[str, TensorSpec]) -> None:
        # What the kernel is given is its inputs themselves, wherever they lie.
        own = {name: dataclasses.replace(tensors[name], name=f"its own {name}") for name in call.views}
        self._kernels, self._types = kernels, {n: spec.dtype for n, spec in tensors.items()}
        self._is_first = call.output == kernels.graph.calls[0].output
        self._call = dataclasses.replace(
            call, inputs=call.inputs | {name: spec.name for name, spec in own.items()}, views={}
        )
        crossing = (*kernels.graph.crossing, *(Crossing(spec, 0, 0) for spec in own.values()))
        self._session = OnnxRuntimeSession(
            kernel_model(dataclasses.replace(kernels.graph, crossing=crossing), self._call)
        )

    def workspace_bytes(self, shapes: Mapping[str, Shape]) -> int:
        assert set(shapes) == set(self._call.inputs)
        return self._kernels.workspace if self._call.operator == "HstuAttention" else 0

    def _at(self, place: Placed, dtype: str) -> Any:
        stored, width = storage_dtype(dtype), math.prod(place.shape[1:])
        if not math.prod(place.shape):
            return np.empty(place.shape, stored)
        stride = place.row_stride or width
        count = (place.shape[0] - 1) * stride + width
        self._kernels.cuda.require_device(place.address, count * stored.itemsize)
        memory = np.frombuffer((ctypes.c_uint8 * (count * stored.itemsize)).from_address(place.address), stored)
        rows = np.lib.stride_tricks.as_strided(
            memory, (place.shape[0], width), (stride * stored.itemsize, stored.itemsize)
        )
        return rows.reshape(place.shape) if stride == width else rows.copy().reshape(place.shape)

    def enqueue(self, launch: Launch, stream: int) -> None:
        kernels = self._kernels
        recording = stream in kernels.cuda.recording
        kernels.launches += not recording

        def work() -> None:
            if recording and kernels.skips:
                return
            if launch.workspace_bytes:
                kernels.cuda.require_device(launch.workspace, launch.workspace_bytes)
                if self._is_first:
                    kernels.found.append(ctypes.string_at(launch.workspace + launch.workspace_bytes - 1, 1)[0])
                ctypes.memset(launch.workspace, 0xAB, launch.workspace_bytes)
            given = {}
            for name, place in launch.inputs.items():
                array = self._at(place, self._types[name]).copy()
                given[self._call.inputs[name]] = values_of_bits(array) if self._types[name] == "bfloat16" else array
            (result,) = self._session.run({spec.name: given[spec.name] for spec in self._session.inputs}).values()
            target = self._at(launch.output, self._types["out"])
            target[...] = bits_of_values(result) if self._types["out"] == "bfloat16" else result

        kernels.cuda.enqueue(stream, work)

    def close(self) -> None:
        self._kernels.opened -= 1


def fused_session(
    graph: SegmentedGraph,
    cuda: FakeCuda,
    kernels: FakeKernels | None = None,
    *,
    schedule: Schedule | None = None,
    cuda_graphs: int = 0,
    graph_budget_bytes: int | None = None,
    **settings: Any,
) -> FusedSession:
    """A session over the graph, by another schedule than its own if one is given.

    `settings` are those of `fake_tensorrt`.
    """
    engines = {f"segment {i}".encode(): segment_engine(each) for i, each in enumerate(graph.segments)}
    api = TensorRtApi("tensorrt-rtx", fake_tensorrt(engines, cuda, **settings))  # type: ignore[arg-type]
    kernels = kernels or FakeKernels(graph, cuda)
    return FusedSession(
        api,
        schedule or graph,
        list(engines),
        kernels,
        CudaDriver(cuda),
        cuda_graphs=cuda_graphs,
        graph_budget_bytes=graph_budget_bytes,
    )
