"""Session where a graph is cut at its attentions: engine, kernel, engine, ... on one stream, one CUDA graph a shape.

Level 3; no torch. For TensorRT-RTX, which takes no plugins. The tensors that cross from one step to the next lie in one
block of memory, planned once for every set of input shapes; nothing is decided or allocated between two launches.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from hstu_compile.artifacts import KernelCall, Schedule
from hstu_compile.errors import EngineError, UsageError
from hstu_compile.runtime._bfloat16 import storage_dtype
from hstu_compile.runtime._buffer_plan import BufferPlan, Lifetime, planned_buffers
from hstu_compile.runtime._cuda import CudaDriver, DeviceBuffer
from hstu_compile.runtime._gpu_session import GpuSession, Shapes
from hstu_compile.runtime._loaded_engine import LoadedEngine, started_runtime
from hstu_compile.runtime._mirrored import Layout
from hstu_compile.runtime.attention_kernels import Kernels, Launch, Placed, PreparedKernel, Shape
from hstu_compile.tensorrt_api import TensorRtApi

# Most sets of input shapes whose plan is remembered.
_REMEMBERED_PLANS = 256
# Sets of input shapes from which on somebody is told that each new one costs TensorRT-RTX time and memory.
_MANY_SETS = 64
_INT32_MAX = 2**31 - 1


class FusedSession(GpuSession):
    """Segments and kernels, ready to run; see `GpuSession` for empty inputs and CUDA graphs.

    Warns with a RuntimeWarning, once, when it has met 64 sets of input shapes: each costs TensorRT-RTX time and memory.

    Args:
        api: TensorRT-RTX.
        schedule: of the graph.
        plans: serialised engine of every segment, in the order of the segments.
        kernels: where the kernels come from.
        driver: CUDA; None opens device 0.
        allow_tf32: False for engines that were built without TF32.
        cuda_graphs: graphs that are kept, the least recently used goes first; 0 records none.
        graph_budget_bytes: device memory that the graphs may take together; None sets no limit.

    Raises:
        UsageError: HSTU-E901 for a negative number of graphs or bytes.
        EngineError: HSTU-E401 without a GPU, E404 if an engine cannot be loaded, or is not of this schedule.
        PluginError: HSTU-E505 if no kernel fits a call on this GPU.
    """

    def __init__(
        self,
        api: TensorRtApi,
        schedule: Schedule,
        plans: Sequence[bytes],
        kernels: Kernels,
        driver: CudaDriver | None = None,
        *,
        allow_tf32: bool = True,
        cuda_graphs: int = 0,
        graph_budget_bytes: int | None = None,
    ) -> None:
        if cuda_graphs < 0 or (graph_budget_bytes or 0) < 0:
            raise UsageError(
                "HSTU-E901",
                f"a session cannot keep {cuda_graphs} CUDA graphs in {graph_budget_bytes} bytes",
                "a number is negative",
                "pass cuda_graphs=0, and graph_budget_bytes=None for no limit",
            )
        self._schedule, self._plans, self._kernels = schedule, list(plans), kernels
        self._runtime: Any = None
        self._engines: list[LoadedEngine] = []
        self._prepared: list[PreparedKernel] = []
        self._constants: DeviceBuffer | None = None
        self._constant_offsets: Mapping[str, int] = {}
        # What the engines compute in: one runs at a time, so they share it.
        self._activations = 0
        # Shapes of every tensor for the inputs that the contexts are set to, and where what crosses lies then.
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._arena = BufferPlan({}, 0, 0)
        self._workspaces: list[int] = []
        self._launches: list[Launch] = []
        self._remembered: collections.OrderedDict[Hashable, tuple[BufferPlan, list[int]]] = collections.OrderedDict()
        self._sets_met = 0
        name = f"{api.backend} {api.version} with {kernels.name}"
        super().__init__(
            api,
            name,
            driver,
            allow_tf32=allow_tf32,
            cuda_graphs=cuda_graphs,
            graph_budget_bytes=graph_budget_bytes,
        )

    def _load(self, log: Any) -> None:
        schedule, plans, self._plans = self._schedule, self._plans, []
        wanted = sum(step.kind == "segment" for step in schedule.steps)
        if len(plans) != wanted:
            raise self._mismatch(f"it has {wanted} segments, and there are {len(plans)} engines")
        self._runtime = started_runtime(self._api, self.name, log)
        for plan in plans:
            self._engines.append(LoadedEngine(self._api, self._runtime, plan, self.name, log, settled=True))
        self._share_activations()
        self.inputs, self.outputs = schedule.inputs, schedule.outputs
        self._dtypes = {spec.name: spec.dtype for spec in (*schedule.inputs, *schedule.outputs)}
        self._dtypes |= {each.spec.name: each.spec.dtype for each in schedule.crossing}
        self._check_engines()
        self._range = {spec.name: self._range_of(spec.name, len(spec.shape)) for spec in schedule.inputs}
        self._rows_made = [schedule.row_of(call) for call in schedule.calls]
        for call in schedule.calls:
            tensors = {name: schedule.input_spec(call, name) for name in call.inputs}
            tensors["out"] = schedule.spec(call.output)
            self._prepared.append(self._kernels.prepare(call, tensors))
        self._upload_constants()

    def _share_activations(self) -> None:
        nbytes = max((engine.activation_bytes for engine in self._engines), default=0)
        if nbytes:
            self._activations = self._driver.allocate(nbytes)
            for engine in self._engines:
                engine.compute_in(self._activations, nbytes)

    def _check_engines(self) -> None:
        """Refuse engines of another schedule before one of them writes where it should not."""
        problems = []
        present = {spec.name for spec in self._schedule.inputs}
        for step in self._schedule.steps:
            if step.kind == "kernel":
                present.add(self._schedule.calls[step.index].output)
                continue
            engine = self._engines[step.index]
            for spec in (*engine.inputs, *engine.outputs):
                if self._dtypes.get(spec.name) != spec.dtype:
                    problems.append(f"segment {step.index} has {spec.name} {spec.dtype}")
            problems += [
                f"segment {step.index} reads {s.name} before it is made" for s in engine.inputs if s.name not in present
            ]
            present |= {spec.name for spec in engine.outputs}
        lacking = {spec.name for spec in self._schedule.outputs} - present
        problems += [f"no engine gives {name}" for name in sorted(lacking)]
        if problems:
            raise self._mismatch("; ".join(problems))

    def _mismatch(self, why: str) -> EngineError:
        return EngineError(
            "HSTU-E404",
            "the engines are not those of the schedule",
            why,
            "use the engines and the schedule of one bundle",
        )

    def _range_of(self, name: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What every engine that reads an input takes.

        What kernels alone read has no profile. An empty one gets a row like any other, since the sizes of all inputs
        with the same axis have to agree.
        """
        ranges = [engine.ranges[name] for engine in self._engines if name in engine.ranges]
        if not ranges:
            spec = self._schedule.spec(name)
            return (
                tuple(size if isinstance(size, int) else 1 for size in spec.shape),
                tuple(size if isinstance(size, int) else _INT32_MAX for size in spec.shape),
            )
        low = tuple(max(each[0][axis] for each in ranges) for axis in range(rank))
        high = tuple(min(each[1][axis] for each in ranges) for axis in range(rank))
        return low, high

    def _upload_constants(self) -> None:
        layout = Layout({name: array.nbytes for name, array in self._schedule.constants.items()})
        self._constants, self._constant_offsets = DeviceBuffer(self._driver), layout.offsets
        self._constants.reserve(layout.nbytes)
        with self._driver.synchronised():
            for name, array in self._schedule.constants.items():
                if array.nbytes:
                    self._driver.upload(array, self._constants.address + layout.offsets[name])

    def _unload(self) -> None:
        # Their order matters: an engine must not outlive its runtime.
        for kernel in self._prepared:
            kernel.close()
        for engine in self._engines:
            engine.close()
        self._prepared.clear()
        self._engines.clear()
        self._runtime = None
        if self._constants is not None:
            self._constants.close()
        if self._activations:
            address, self._activations = self._activations, 0
            self._driver.free(address)

    def _inferred(self, shapes: Shapes, log: Any) -> dict[str, tuple[int, ...]]:
        known = dict(shapes) | {name: array.shape for name, array in self._schedule.constants.items()}
        for step in self._schedule.steps:
            if step.kind == "segment":
                known |= self._engines[step.index].inferred(known, log)
            else:
                call = self._schedule.calls[step.index]
                # A kernel has a row of output for each row of its first input, q or x.
                rows = known[next(iter(call.inputs.values()))][0]
                known[call.output] = (rows, *self._rows_made[step.index])
        self._shapes = known
        self._arena, self._workspaces = self._planned_arena()
        return {spec.name: known[spec.name] for spec in self.outputs}

    def _planned_arena(self) -> tuple[BufferPlan, list[int]]:
        """Where what crosses lies, and the bytes of every kernel's workspace, for the shapes that are set."""
        key = tuple(self._shapes[spec.name] for spec in self.inputs)
        if (known := self._remembered.get(key)) is not None:
            self._remembered.move_to_end(key)
            return known
        served = {spec.name for spec in self.outputs}
        lives = [
            Lifetime(each.spec.name, self._nbytes(each.spec.name), each.first, each.last)
            for each in self._schedule.crossing
            if each.spec.name not in served
        ]
        workspaces = []
        for number, step in enumerate(self._schedule.steps):
            if step.kind == "kernel":
                call = self._schedule.calls[step.index]
                shapes = {name: _input_shape(call, name, self._shapes) for name in call.inputs}
                workspaces.append(self._prepared[step.index].workspace_bytes(shapes))
                if workspaces[-1]:
                    lives.append(Lifetime(_workspace(step.index), workspaces[-1], number, number))
        made = planned_buffers(lives), workspaces
        self._remembered[key] = made
        self._sets_met += 1
        if self._sets_met == _MANY_SETS:
            self._warn(
                f"{self.name} has met {_MANY_SETS} sets of input shapes; TensorRT-RTX compiles in the first pass of "
                "each, for up to a second, and host memory grows with each: open it with buckets=Buckets(), or with "
                "coarser ladders, so that requests share shapes"
            )
        while len(self._remembered) > _REMEMBERED_PLANS:
            self._remembered.popitem(last=False)
        return made

    def _nbytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * storage_dtype(self._dtypes[name]).itemsize

    def _scratch_bytes(self) -> int:
        return self._arena.nbytes

    def _bind_all(self, addresses: Mapping[str, int], log: Any) -> None:
        assert self._constants is not None  # loaded
        places = {name: self._constants.address + offset for name, offset in self._constant_offsets.items()}
        places |= {name: self._scratch.address + offset for name, offset in self._arena.offsets.items()}
        places |= addresses
        for engine in self._engines:
            engine.bind(places, log)
        self._launches = [
            Launch(
                inputs={name: self._placed_input(call, name, places) for name in call.inputs},
                output=Placed(places[call.output], self._shapes[call.output]),
                workspace=places.get(_workspace(index), 0),
                workspace_bytes=self._workspaces[index],
            )
            for index, call in enumerate(self._schedule.calls)
        ]

    def _placed_input(self, call: KernelCall, name: str, places: Mapping[str, int]) -> Placed:
        tensor, shape = call.inputs[name], _input_shape(call, name, self._shapes)
        if (view := call.views.get(name)) is None:
            return Placed(places[tensor], shape)
        offset = view.column * storage_dtype(self._dtypes[tensor]).itemsize
        return Placed(places[tensor] + offset, shape, view.row_stride)

    def _execute(self, log: Any) -> None:
        for step in self._schedule.steps:
            if step.kind == "segment":
                self._engines[step.index].execute(self._driver.stream, log)
            else:
                self._prepared[step.index].enqueue(self._launches[step.index], self._driver.stream)

    def _unrecordable(self) -> str:
        stuck = [i for i, engine in enumerate(self._engines) if not engine.is_capturable(self._driver.stream)]
        if not stuck:
            return ""
        return f"TensorRT-RTX says that segment {', '.join(map(str, stuck))} cannot be recorded on a stream"


def _input_shape(call: KernelCall, name: str, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of what a kernel reads as its input of this name in the contract."""
    shape = shapes[call.inputs[name]]
    view = call.views.get(name)
    return shape if view is None else (shape[0], *view.dims)


def _workspace(index: int) -> str:
    """The name of a kernel's workspace among the crossing tensors; no value of a graph has a newline."""
    return f"\nworkspace {index}"
