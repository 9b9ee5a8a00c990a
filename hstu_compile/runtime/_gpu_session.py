"""What sessions on a GPU share: feeds to answers on one stream, buffers, CUDA graphs of what recurs. Level 3.

A subclass says which engines run and where their tensors lie; it knows nothing of requests, copies or graphs.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import EngineError, PluginError, RequestError
from hstu_compile.runtime._bfloat16 import storage_dtype, values_of_bits
from hstu_compile.runtime._cuda import CudaDriver, DeviceBuffer
from hstu_compile.runtime._cuda_graph import CudaGraph
from hstu_compile.runtime._feeds import matched_feeds
from hstu_compile.runtime._mirrored import Layout, MirroredBuffer
from hstu_compile.runtime._recording_gate import GATE
from hstu_compile.runtime._resident_io import (
    Copies,
    Feeds,
    check_copies,
    check_residents,
    check_target,
    split_feeds,
)
from hstu_compile.runtime.graph_cache import GraphCache, GraphStats
from hstu_compile.runtime.resident import DevicePool, DeviceTensor, ResidentTensor
from hstu_compile.tensorrt_api import TensorRtApi, tf32_override_off

if TYPE_CHECKING:
    from typing_extensions import Self

# What setTensorAddress asks for.
_ADDRESS_ALIGNMENT = 256

Shapes = Mapping[str, tuple[int, ...]]


class _OutputShape(NamedTuple):
    """What the engine writes, and its leading part that the caller asked for."""

    written: tuple[int, ...]
    asked: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """How a pass of certain shapes lies in memory.

    Attributes:
        shapes: of the inputs.
        shape_key: the same, hashable.
        computed: of every output.
        incoming: places of the inputs that come from the host.
        outgoing: places of the outputs that are not written straight to their targets.
        fetched: of the outputs that go to the host: offset, shape, storage type.
        fetched_bytes: they lie in the first that many bytes.
        scratch_bytes: device memory for what lies between inputs and outputs.
    """

    shapes: dict[str, tuple[int, ...]]
    shape_key: Hashable
    computed: dict[str, _OutputShape]
    incoming: Layout
    outgoing: Layout
    fetched: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]
    fetched_bytes: int
    scratch_bytes: int


class _Memory(NamedTuple):
    """What one request reads and writes."""

    arrays: Mapping[str, NDArray[Any]]
    residents: Mapping[str, ResidentTensor]
    targets: Mapping[str, ResidentTensor]
    before: Copies
    after: Copies


class _Replay:
    """A recorded pass.

    Attributes:
        graph: the recording.
        plan: of the pass.
        proven: whether the context had served other shapes meanwhile, for each case that was compared with TensorRT's
            own enqueueing.
    """

    def __init__(self, graph: CudaGraph, plan: _Plan) -> None:
        self.graph, self.plan = graph, plan
        self.proven: set[bool] = set()

    def close(self) -> None:
        """Free the graph."""
        self.graph.close()


class GpuSession(abc.ABC):
    """A `Session` on one stream of a GPU.

    TensorRT 8 engines take timestamps as int32; int64 feeds are converted where every value fits.

    Profiles start at 1 row, because builders refuse empty tensors. An input of 0 rows (a batch without events, without
    candidates, without cached rows) whose profile starts at 1 is therefore fed one row of zeros. The offsets, which
    are fed as they are, give that row to no sequence. Our graphs give rows of no sequence no influence, and put them
    last; outputs lose the rows that it added. A batch without sequences stays refused: its offsets have 1 entry, and
    the profile starts at 2.

    With `cuda_graphs`, a pass whose shapes and addresses come a second time is run and then recorded, and from the
    third time on it is one launch instead of several hundred. Inputs from the host are copied into a buffer of the
    session before the launch, outside the graph and on its stream, and so are the copies `before` and `after` a pass.
    Resident tensors are read and written at their own addresses; whoever wants replays keeps these the same.

    Args:
        api: the backend.
        name: of the session.
        driver: CUDA; None opens device 0.
        allow_tf32: False for engines of TensorRT-RTX that were built without TF32.
        cuda_graphs: graphs that are kept, the least recently used goes first; 0 records none.
        graph_budget_bytes: device memory that the graphs may take together; None sets no limit.

    Raises:
        EngineError: HSTU-E401 without a GPU, E404 if an engine cannot be loaded.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(
        self,
        api: TensorRtApi,
        name: str,
        driver: CudaDriver | None,
        *,
        allow_tf32: bool,
        cuda_graphs: int,
        graph_budget_bytes: int | None = None,
    ) -> None:
        self.name = name
        self._api, self._lock, self._closed = api, threading.Lock(), False
        self._driver = driver or CudaDriver()
        self._incoming, self._outgoing = MirroredBuffer(self._driver), MirroredBuffer(self._driver)
        self._scratch = DeviceBuffer(self._driver)
        self._graphs: GraphCache[_Replay] | None = None
        if cuda_graphs:
            self._graphs = GraphCache(cuda_graphs, graph_budget_bytes)
        # Shapes of the last pass that the contexts themselves enqueued; None while they are being changed.
        self._context_shapes: Hashable = None
        self._all_bound = False
        self._warned: set[str] = set()
        # Least and greatest shape of every input, and the element type of every input and output.
        self._range: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._dtypes: dict[str, str] = {}
        try:
            tf32 = tf32_override_off(api.is_rtx and not allow_tf32)
            with self._driver.current(), api.capture() as log, tf32:
                self._load(log)
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _load(self, log: Any) -> None:
        """Load the engines; set `inputs`, `outputs`, `_range`, `_dtypes`. `_unload` follows, also after an error."""

    @abc.abstractmethod
    def _unload(self) -> None:
        """Let go of the engines."""

    @abc.abstractmethod
    def _inferred(self, shapes: Shapes, log: Any) -> dict[str, tuple[int, ...]]:
        """Set the input shapes; the shape of every output."""

    @abc.abstractmethod
    def _scratch_bytes(self) -> int:
        """Device memory that a pass of the shapes that are set needs between its inputs and its outputs."""

    @abc.abstractmethod
    def _bind_all(self, addresses: Mapping[str, int], log: Any) -> None:
        """Bind every input and output, and what lies in the scratch memory, for the shapes that are set."""

    @abc.abstractmethod
    def _execute(self, log: Any) -> None:
        """Enqueue a pass on the driver's stream."""

    def _unrecordable(self) -> str:
        """Why the pass that was just run cannot be recorded; "" if it can, as far as the runtime knows."""
        return ""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session.run`.

        Raises:
            RequestError: HSTU-E701 or E704, before anything is enqueued.
            EngineError: HSTU-E404 if TensorRT or CUDA fails.
        """
        return self.run_resident(feeds, {})

    def run_resident(
        self,
        feeds: Feeds,
        outputs: Mapping[str, ResidentTensor],
        *,
        before: Copies = (),
        after: Copies = (),
    ) -> dict[str, NDArray[Any]]:
        """See `Session.run_resident`. The engine reads and writes resident tensors at their own addresses.

        The session waits for its stream before it returns, so that sessions and pools on other streams see the result.

        Raises:
            RequestError: HSTU-E701 or E704, before anything is enqueued.
            EngineError: HSTU-E404 if TensorRT or CUDA fails.
        """
        check_copies((*before, *after), DeviceTensor)
        arrays, residents = split_feeds(feeds)
        check_residents(
            residents,
            outputs,
            inputs=self.inputs,
            outputs=self.outputs,
            kind=DeviceTensor,
            alignment=_ADDRESS_ALIGNMENT,
        )
        arrays = matched_feeds(arrays, [spec for spec in self.inputs if spec.name not in residents])
        shapes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in arrays.items()}
        shapes |= {name: tensor.shape for name, tensor in residents.items()}
        empty = [name for name, shape in shapes.items() if shape[:1] == (0,) and self._range[name][0][0] == 1]
        for name in empty:
            shapes[name] = (1, *shapes[name][1:])
            arrays[name] = np.zeros(shapes[name], storage_dtype(self._dtypes[name]))
            residents.pop(name, None)
        self._require_profile(shapes)
        key = self._key(shapes, empty, residents, outputs)
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed")
            with self._driver.current(), self._api.capture() as log:
                replay = self._replayable(key)
                plan = self._planned(arrays, outputs, shapes, empty, log) if replay is None else replay.plan
                for name, target in outputs.items():
                    check_target(name, plan.computed[name].asked, target, self.outputs)
                if replay is None:
                    self._reserve(plan)
                memory = _Memory(arrays, residents, outputs, before, after)
                with self._driver.synchronised():
                    self._enqueue(plan, memory, replay, key, log)
                results = {name: self._outgoing.taken(*place) for name, place in plan.fetched.items()}
                if replay is None and self._graphs is not None and self._graphs.is_due(key):
                    self._capture(self._graphs, key, plan, log)
        return {name: _readable(array, self._dtypes[name]) for name, array in results.items()}

    def _require_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        problems = []
        for name, shape in shapes.items():
            low, high = self._range[name]
            if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
                problems.append(f"{name} is {list(shape)}; the engine takes {list(low)} to {list(high)}")
        if problems:
            raise _outside_profile(problems)

    def _output_shapes(
        self, shapes: dict[str, tuple[int, ...]], empty: Sequence[str], log: Any
    ) -> dict[str, _OutputShape]:
        """Tell the context the input shapes, and learn those of the outputs.

        With every row of the inputs in `empty` an output grows by the same number of rows. So its rows without any
        follow from what the engine says of one row and of two: a prediction per candidate goes from 1 to 0, an
        embedding per sequence keeps its rows. Rows of no sequence are the last ones.
        """
        if not empty:
            return {name: _OutputShape(shape, shape) for name, shape in self._inferred(shapes, log).items()}
        if single := [name for name in empty if self._range[name][1][0] == 1]:
            raise _outside_profile([f"{name} is empty; the engine takes exactly 1 row" for name in single])
        two = self._inferred({**shapes, **{name: (2, *shapes[name][1:]) for name in empty}}, log)
        computed = {}
        for name, one in self._inferred(shapes, log).items():
            asked = (2 * one[0] - two[name][0], *one[1:]) if one else one
            if min(asked, default=0) < 0 or one[1:] != two[name][1:]:
                raise self._failed(
                    f"{name} is {list(one)} for 1 row of {', '.join(empty)}, {list(two[name])} for 2", log
                )
            computed[name] = _OutputShape(one, asked)
        return computed

    def _key(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        empty: Sequence[str],
        residents: Mapping[str, ResidentTensor],
        targets: Mapping[str, ResidentTensor],
    ) -> Hashable:
        """All that a recorded pass depends on, beside where the session's own buffers lie."""
        return (
            self._shape_key(shapes),
            tuple(empty),
            tuple(sorted((name, tensor.address) for name, tensor in residents.items())),
            tuple(sorted((name, tensor.address, tensor.shape) for name, tensor in targets.items())),
        )

    def _shape_key(self, shapes: Mapping[str, tuple[int, ...]]) -> Hashable:
        return tuple(shapes[spec.name] for spec in self.inputs)

    def _replayable(self, key: Hashable) -> _Replay | None:
        """The graph of a pass, unless it may only be launched while the context is at its shapes, and it is not."""
        replay = None if self._graphs is None else self._graphs.find(key)
        if replay is not None and replay.plan.shape_key != self._context_shapes and self._bound(replay):
            return None
        return replay

    def _bound(self, replay: _Replay) -> bool:
        return self._all_bound or bool(replay.graph.bound_by)

    def _planned(
        self,
        arrays: Mapping[str, NDArray[Any]],
        targets: Mapping[str, ResidentTensor],
        shapes: dict[str, tuple[int, ...]],
        empty: Sequence[str],
        log: Any,
    ) -> _Plan:
        """What the pass writes, and where its tensors lie in the session's buffers."""
        # From here to the end of the enqueueing, nobody knows what the context is set to.
        self._context_shapes = None
        computed = self._output_shapes(shapes, empty, log)
        sizes = {
            name: math.prod(shape.written) * storage_dtype(self._dtypes[name]).itemsize
            for name, shape in computed.items()
        }
        direct = [name for name, target in targets.items() if target.nbytes and computed[name].written == target.shape]
        # What goes to the host comes first, so that one copy brings it.
        order = [name for name in computed if name not in targets]
        fetched_bytes = Layout({name: sizes[name] for name in order}).nbytes
        order += [name for name in targets if name not in direct]
        outgoing = Layout({name: sizes[name] for name in order})
        return _Plan(
            shapes=dict(shapes),
            shape_key=self._shape_key(shapes),
            computed=computed,
            incoming=Layout({spec.name: arrays[spec.name].nbytes for spec in self.inputs if spec.name in arrays}),
            outgoing=outgoing,
            fetched={
                name: (outgoing.offsets[name], computed[name].asked, storage_dtype(self._dtypes[name]))
                for name in computed
                if name not in targets
            },
            fetched_bytes=fetched_bytes,
            scratch_bytes=self._scratch_bytes(),
        )

    def _reserve(self, plan: _Plan) -> None:
        """Make room for a pass. If a buffer moves, every graph goes, because it knows the old place."""
        needs: tuple[tuple[MirroredBuffer | DeviceBuffer, int], ...] = (
            (self._incoming, plan.incoming.nbytes),
            (self._outgoing, plan.outgoing.nbytes),
            (self._scratch, plan.scratch_bytes),
        )
        if all(buffer.holds(size) for buffer, size in needs):
            return
        if self._graphs is not None:
            self._graphs.clear()
        for buffer, size in needs:
            buffer.reserve(size)

    def _enqueue(self, plan: _Plan, memory: _Memory, replay: _Replay | None, key: Hashable, log: Any) -> None:
        """Everything of one pass, on one stream and without a wait; complete after `synchronise`."""
        for name, array in memory.arrays.items():
            self._incoming.place(plan.incoming.offsets[name], array)
        self._incoming.upload(plan.incoming.nbytes)
        self._copy(memory.before)
        if replay is None:
            self._run_context(plan, memory, log)
        elif self._graphs is not None:
            if (plan.shape_key != self._context_shapes) in replay.proven:
                replay.graph.launch()
                self._graphs.replayed()
            else:
                self._prove(self._graphs, key, replay, memory, log)
        for name, target in memory.targets.items():
            if name in plan.outgoing.offsets and target.nbytes:
                self._driver.copy(self._outgoing.address + plan.outgoing.offsets[name], target.address, target.nbytes)
        self._copy(memory.after)
        self._outgoing.download(plan.fetched_bytes)

    def _copy(self, copies: Copies) -> None:
        for source, target in copies:
            if source.nbytes:
                self._driver.copy(source.address, target.address, source.nbytes)

    def _run_context(self, plan: _Plan, memory: _Memory, log: Any) -> None:
        """Bind every tensor and let TensorRT enqueue; the context's shapes are set."""
        addresses = {name: self._incoming.address + offset for name, offset in plan.incoming.offsets.items()}
        addresses |= {name: tensor.address for name, tensor in memory.residents.items()}
        for name in plan.computed:
            held = plan.outgoing.offsets.get(name)
            addresses[name] = memory.targets[name].address if held is None else self._outgoing.address + held
        self._bind_all(addresses, log)
        self._execute_apart(log)
        self._context_shapes = plan.shape_key

    def _execute_apart(self, log: Any) -> None:
        """Enqueue a pass while no other session records one."""
        with GATE.enqueueing():
            self._execute(log)

    def _capture(self, graphs: GraphCache[_Replay], key: Hashable, plan: _Plan, log: Any) -> None:
        """Record the pass that was just run, for the next one of its key. Its answer is already fetched."""
        if why := self._unrecordable():
            graphs.refuse(key)
            self._warn(f"a pass of {self.name} stays without a CUDA graph: {why}")
            return
        free = self._driver.free_bytes()
        try:
            graph = CudaGraph(self._driver, lambda: self._execute(log))
        except (EngineError, PluginError) as error:
            graphs.refuse(key)
            # What a failed recording left behind in TensorRT must not fail the next request.
            with contextlib.suppress(EngineError, PluginError), self._driver.synchronised():
                self._execute_apart(log)
            self._warn(f"a pass of {self.name} stays without a CUDA graph: {error.what}: {error.why}")
            return
        # Whoever else allocates at this moment is counted too; a driver that had memory to spare counts nothing.
        graphs.keep(key, _Replay(graph, plan), max(0, free - self._driver.free_bytes()))
        if graph.bound_by:
            self._warn_bound(f"a graph has {graph.bound_by}")

    def _prove(self, graphs: GraphCache[_Replay], key: Hashable, replay: _Replay, memory: _Memory, log: Any) -> None:
        """Launch a graph, run the pass without it, and compare all that they wrote; what the latter wrote stays.

        Done when a graph is first launched, and when it is first launched although the context has served other shapes
        since it was recorded, which TensorRT gives no promise for.
        """
        foreign = replay.plan.shape_key != self._context_shapes
        replayed = self._written_by(replay.plan, memory, replay.graph.launch)
        self._context_shapes = None
        self._inferred(replay.plan.shapes, log)
        plain = self._written_by(replay.plan, memory, lambda: self._run_context(replay.plan, memory, log))
        if all(np.array_equal(one, other) for one, other in zip(replayed, plain, strict=True)):
            replay.proven.add(foreign)
            graphs.replayed()
        elif foreign:
            self._all_bound = True
            graphs.failed()
            self._warn_bound("a graph gave another answer after other shapes had been served")
        else:
            graphs.refuse(key)
            self._warn(f"a pass of {self.name} stays without a CUDA graph: the graph gave another answer")

    def _written_by(self, plan: _Plan, memory: _Memory, run: Callable[[], None]) -> list[NDArray[np.uint8]]:
        """The bytes of every output after `run`; what it did not write is 0xFF."""
        spans = [(self._outgoing.address, plan.outgoing.nbytes)]
        spans += [
            (target.address, target.nbytes)
            for name, target in memory.targets.items()
            if name not in plan.outgoing.offsets
        ]
        written = [np.empty(size, np.uint8) for _, size in spans if size]
        places = [address for address, size in spans if size]
        with self._driver.synchronised():
            for address, array in zip(places, written, strict=True):
                self._driver.fill(address, 0xFF, array.nbytes)
            # Also what an earlier pass left between the engines: a graph that skips a step must not find it there.
            if plan.scratch_bytes:
                self._driver.fill(self._scratch.address, 0xFF, plan.scratch_bytes)
            run()
            for address, array in zip(places, written, strict=True):
                self._driver.download(address, array)
        return written

    def _warn_bound(self, why: str) -> None:
        self._warn(f"CUDA graphs of {self.name} are replayed only while the same shapes follow one another: {why}")

    def _warn(self, text: str) -> None:
        """Once for each text."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def poison_outputs(self) -> None:
        """Fill the session's output buffer with 0xFF, so that a check sees what a pass does not write."""
        with self._lock, self._driver.current(), self._driver.synchronised():
            if self._outgoing.address:
                self._driver.fill(self._outgoing.address, 0xFF, self._outgoing.host.size)

    @property
    def graph_stats(self) -> GraphStats | None:
        """See `Session.graph_stats`."""
        return None if self._graphs is None else self._graphs.stats

    def most_rows(self, name: str) -> int:
        """See `Session.most_rows`; the first axis of the profile's greatest shape."""
        return self._range[name][1][0]

    def memory_pool(self, capacity_bytes: int) -> DevicePool:
        """See `Session.memory_pool`. Memory of the session's GPU, with a stream of its own."""
        return DevicePool(capacity_bytes, self._driver.sibling())

    def _failed(self, what: str, log: Any) -> EngineError:
        return EngineError(
            "HSTU-E404",
            f"{self.name} could not run the engine",
            f"{what}\n    {log.tail()}",
            "check the versions with `hstu-compile env`; rebuild the engine on this machine",
        )

    def close(self) -> None:
        """See `Session.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with self._driver.current():
                if self._graphs is not None:
                    self._graphs.clear()
                self._unload()
                self._incoming.close()
                self._outgoing.close()
                self._scratch.close()
            self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _outside_profile(problems: list[str]) -> RequestError:
    return RequestError(
        "HSTU-E704",
        "the request is outside the engine's profile",
        "; ".join(problems),
        "split the request, or rebuild with a larger --max-batch or --max-seq-len",
        {"problems": problems},
    )


def _readable(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """bfloat16 bits as float32, which holds them exactly; everything else as it is."""
    return values_of_bits(array) if dtype == "bfloat16" else array
