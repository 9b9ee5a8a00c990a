"""Session on TensorRT 8.5 to 11 and TensorRT-RTX: one context, one stream, buffers that only grow. Level 3."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_compile.artifacts import TensorSpec
from hstu_compile.errors import EngineError, PluginError, RequestError, UsageError
from hstu_compile.profiles import EVENT_INPUTS
from hstu_compile.runtime._cuda import CudaDriver, DeviceBuffers, host_array
from hstu_compile.runtime._feeds import matched_feeds
from hstu_compile.tensorrt_api import PluginKey, TensorRtApi, tf32_override_off

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


class TensorRtSession:
    """An engine, ready to run.

    TensorRT 8 engines take timestamps as int32; int64 feeds are converted where every value fits. A batch without
    events (L = 0), which no engine's profile admits, is run with one event that belongs to no sequence: the graph
    gives rows outside every sequence no influence.

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

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See `Session.run`.

        Raises:
            RequestError: HSTU-E701 or E704, before anything is enqueued.
            EngineError: HSTU-E404 if TensorRT or CUDA fails.
        """
        arrays = self._within_profile(matched_feeds(feeds, self.inputs))
        with self._lock:
            if self._closed:
                raise RuntimeError("the session is closed")
            with self._driver.current(), self._api.capture() as log:
                return self._enqueue(arrays, log)

    def _within_profile(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        events = [name for name in EVENT_INPUTS if name in arrays]
        if events and all(arrays[name].shape == (0,) and self._range[name][0] == (1,) for name in events):
            arrays = {**arrays, **{name: np.zeros(1, arrays[name].dtype) for name in events}}
        problems = []
        for name, array in arrays.items():
            low, high = self._range[name]
            if not all(a <= size <= b for a, size, b in zip(low, array.shape, high, strict=True)):
                problems.append(f"{name} is {list(array.shape)}; the engine takes {list(low)} to {list(high)}")
        if problems:
            raise RequestError(
                "HSTU-E704",
                "the request is outside the engine's profile",
                "; ".join(problems),
                "split the request, or rebuild with a larger --max-batch or --max-seq-len",
                {"problems": problems},
            )
        return arrays

    def _enqueue(self, arrays: dict[str, NDArray[Any]], log: Any) -> dict[str, NDArray[Any]]:
        context, driver = self._context, self._driver
        for name, array in arrays.items():
            address = self._buffers.address(name, array.nbytes)
            driver.upload(array, address)
            if not context.set_input_shape(name, array.shape) or not context.set_tensor_address(name, address):
                raise self._failed(f"it refused {name} of shape {list(array.shape)}", log)
        results = {}
        for spec in self.outputs:
            shape = tuple(int(size) for size in context.get_tensor_shape(spec.name))
            if any(size < 0 for size in shape):
                raise self._failed(f"the shape {list(shape)} of {spec.name} does not follow from the inputs", log)
            results[spec.name] = host_array(shape, spec.dtype)
            if not context.set_tensor_address(spec.name, self._buffers.address(spec.name, results[spec.name].nbytes)):
                raise self._failed(f"it refused the buffer of {spec.name}", log)
        if not context.execute_async_v3(driver.stream):
            # The uploads read host memory that is about to be freed.
            driver.synchronise()
            raise self._failed("enqueueing failed", log)
        for name, result in results.items():
            if result.nbytes:
                driver.download(self._buffers.address(name, result.nbytes), result)
        driver.synchronise()
        return {spec.name: _readable(results[spec.name], spec.dtype) for spec in self.outputs}

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


def _readable(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """bfloat16 bits as float32, which holds them exactly; everything else as it is."""
    if dtype != "bfloat16":
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)
