"""Session on TensorRT 8.5 to 11 and TensorRT-RTX: one context, one stream, buffers that only grow. Level 3."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import EngineError, PluginError, RequestError, UsageError
from hstu_compile.runtime._bfloat16 import storage_dtype, values_of_bits
from hstu_compile.runtime._cuda import CudaDriver, DeviceBuffers, host_array
from hstu_compile.runtime._feeds import matched_feeds
from hstu_compile.runtime._resident_io import Feeds, check_residents, check_target, split_feeds
from hstu_compile.runtime.resident import DevicePool, DeviceTensor, ResidentTensor
from hstu_compile.tensorrt_api import PluginKey, TensorRtApi, tf32_override_off

# What setTensorAddress asks for.
_ADDRESS_ALIGNMENT = 256
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


class _OutputShape(NamedTuple):
    """What the engine writes, and its leading part that the caller asked for."""

    written: tuple[int, ...]
    asked: tuple[int, ...]


class TensorRtSession:
    """An engine, ready to run.

    TensorRT 8 engines take timestamps as int32; int64 feeds are converted where every value fits.

    Profiles start at 1 row, because builders refuse empty tensors. An input of 0 rows (a batch without events, without
    candidates, without cached rows) whose profile starts at 1 is therefore fed one row of zeros. The offsets, which
    are fed as they are, give that row to no sequence. Our graphs give rows of no sequence no influence, and put them
    last; outputs lose the rows that it added. A batch without sequences stays refused: its offsets have 1 entry, and
    the profile starts at 2.

    Args:
        api: the backend.
        plan: serialised engine.
        plugin_library: library with the plugin, or None.
        driver: CUDA; None opens device 0.
        allow_tf32: False for a TensorRT-RTX engine that was built without TF32.

    Raises:
        EngineError: HSTU-E401 without a GPU, E404 if the engine cannot be loaded.
        PluginError: HSTU-E503 if the engine asks for a plugin that is not registered.
    """

    def __init__(
        self,
        api: TensorRtApi,
        plan: bytes,
        plugin_library: Path | None = None,
        driver: CudaDriver | None = None,
        *,
        allow_tf32: bool = True,
    ) -> None:
        if api.is_rtx and plugin_library is not None:
            raise UsageError(
                "HSTU-E901",
                "TensorRT-RTX takes no plugins",
                f"{plugin_library} was given",
                "leave the plugin out, or use --runtime tensorrt",
            )
        self.name = f"{api.backend} {api.version}"
        self._api, self._lock, self._closed = api, threading.Lock(), False
        self._driver = driver or CudaDriver()
        self._buffers = DeviceBuffers(self._driver)
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        try:
            if plugin_library is not None:
                api.load_plugins(plugin_library, [ATTENTION_PLUGIN])
            tf32 = tf32_override_off(api.is_rtx and not allow_tf32)
            with self._driver.current(), api.capture() as log, tf32:
                self._load(plan, log)
            self._describe()
        except BaseException:
            self.close()
            raise

    def _load(self, plan: bytes, log: Any) -> None:
        try:
            self._runtime = self._api.trt.Runtime(self._api.logger)
        except TypeError as error:  # pybind's way of saying that the factory returned null
            raise EngineError(
                "HSTU-E401", f"{self.name} does not start", log.tail(), "check the driver with `hstu-compile env`"
            ) from error
        self._engine = self._runtime.deserialize_cuda_engine(plan)
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
                f"{self.name} cannot load the engine",
                log.tail(),
                "rebuild it on this machine: hstu-compile engine model.onnx",
                {"version": self._api.version, "engine_bytes": len(plan)},
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(
                "HSTU-E404",
                f"{self.name} cannot create an execution context",
                log.tail(),
                "free GPU memory, or rebuild with a smaller --max-batch",
            )

    def _describe(self) -> None:
        engine, mode = self._engine, self._api.trt.TensorIOMode
        inputs, outputs = [], []
        self._range: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            dtype = _DTYPES[engine.get_tensor_dtype(name).name]
            shape = tuple("?" if size < 0 else int(size) for size in engine.get_tensor_shape(name))
            if engine.get_tensor_mode(name) == mode.INPUT:
                inputs.append(TensorSpec(name, dtype, shape))
                low, _, high = engine.get_tensor_profile_shape(name, 0)
                self._range[name] = tuple(map(int, low)), tuple(map(int, high))
            else:
                outputs.append(TensorSpec(name, dtype, shape))
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._dtypes = {spec.name: spec.dtype for spec in (*inputs, *outputs)}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session.run`.

        Raises:
            RequestError: HSTU-E701 or E704, before anything is enqueued.
            EngineError: HSTU-E404 if TensorRT or CUDA fails.
        """
        return self.run_resident(feeds, {})

    def run_resident(self, feeds: Feeds, outputs: Mapping[str, ResidentTensor]) -> dict[str, NDArray[Any]]:
        """See `Session.run_resident`. The engine reads and writes resident tensors at their own addresses.

        The session waits for its stream before it returns, so that sessions and pools on other streams see the result.

        Raises:
            RequestError: HSTU-E701 or E704, before anything is enqueued.
            EngineError: HSTU-E404 if TensorRT or CUDA fails.
        """
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
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed")
            with self._driver.current(), self._api.capture() as log:
                computed = self._output_shapes(shapes, empty, log)
                for name, target in outputs.items():
                    check_target(name, computed[name].asked, target, self.outputs)
                with self._driver.synchronised():
                    results = self._enqueue(arrays, residents, outputs, computed, log)
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

    def _inferred(self, shapes: Mapping[str, tuple[int, ...]], log: Any) -> dict[str, tuple[int, ...]]:
        """Set the input shapes; the shape of every output."""
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._failed(f"it refused {name} of shape {list(shape)}", log)
        inferred = {}
        for spec in self.outputs:
            shape = tuple(int(size) for size in self._context.get_tensor_shape(spec.name))
            if any(size < 0 for size in shape):
                raise self._failed(f"the shape {list(shape)} of {spec.name} does not follow from the inputs", log)
            inferred[spec.name] = shape
        return inferred

    def _enqueue(
        self,
        arrays: Mapping[str, NDArray[Any]],
        residents: Mapping[str, ResidentTensor],
        targets: Mapping[str, ResidentTensor],
        computed: Mapping[str, _OutputShape],
        log: Any,
    ) -> dict[str, NDArray[Any]]:
        """Run the engine; arrays for the outputs without a target, which hold their content after `synchronise`."""
        driver = self._driver
        for name, array in arrays.items():
            address = self._buffers.address(name, array.nbytes)
            if array.nbytes:
                driver.upload(array, address)
            self._bind(name, address, log)
        for name, tensor in residents.items():
            self._bind(name, tensor.address, log)
        results = {}
        fetched: list[tuple[int, NDArray[Any] | ResidentTensor]] = []
        for name, shape in computed.items():
            target = targets.get(name)
            if target is not None and target.nbytes and shape.written == shape.asked:
                self._bind(name, target.address, log)
                continue
            written_bytes = math.prod(shape.written) * storage_dtype(self._dtypes[name]).itemsize
            address = self._buffers.address(name, written_bytes)
            self._bind(name, address, log)
            if target is None:
                results[name] = host_array(shape.asked, self._dtypes[name])
            wanted = results[name] if target is None else target
            if wanted.nbytes:
                fetched.append((address, wanted))
        if not self._context.execute_async_v3(driver.stream):
            raise self._failed("enqueueing failed", log)
        for address, wanted in fetched:
            if isinstance(wanted, ResidentTensor):
                driver.copy(address, wanted.address, wanted.nbytes)
            else:
                driver.download(address, wanted)
        return results

    def _bind(self, name: str, address: int, log: Any) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._failed(f"it refused the address {address:#x} of {name}", log)

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
                # Their order matters: a context must not outlive its engine, nor an engine its runtime.
                self._context = None
                self._engine = None
                self._runtime = None
                self._buffers.close()
            self._driver.close()

    def __enter__(self) -> TensorRtSession:
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
