"""Session on TensorRT 8.5 to 11 and TensorRT-RTX: one engine, one context. Level 3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hstu_compile.errors import UsageError
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime._gpu_session import GpuSession, Shapes
from hstu_compile.runtime._loaded_engine import ATTENTION_PLUGIN, LoadedEngine, started_runtime
from hstu_compile.tensorrt_api import TensorRtApi


class TensorRtSession(GpuSession):
    """An engine, ready to run; see `GpuSession` for empty inputs and CUDA graphs.

    Args:
        api: the backend.
        plan: serialised engine.
        plugin_library: library with the plugin, or None.
        driver: CUDA; None opens device 0.
        allow_tf32: False for a TensorRT-RTX engine that was built without TF32.
        cuda_graphs: graphs that are kept, the least recently used goes first; 0 records none.

    Raises:
        UsageError: HSTU-E901 for a negative number of graphs, or graphs of TensorRT-RTX, which compiles kernels for new
            shapes while it runs and has CUDA graphs of its own.
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
        cuda_graphs: int = 0,
    ) -> None:
        if cuda_graphs < 0 or (cuda_graphs and api.is_rtx):
            raise UsageError(
                "HSTU-E901",
                f"{api.backend} cannot keep {cuda_graphs} CUDA graphs",
                "TensorRT-RTX compiles kernels while it runs" if api.is_rtx else "the number is negative",
                "pass cuda_graphs=0",
            )
        if api.is_rtx and plugin_library is not None:
            raise UsageError(
                "HSTU-E901",
                "TensorRT-RTX takes no plugins",
                f"{plugin_library} was given",
                "leave the plugin out, or use --runtime tensorrt",
            )
        self._plan, self._plugin_library = plan, plugin_library
        self._runtime: Any = None
        self._engine: LoadedEngine | None = None
        super().__init__(api, f"{api.backend} {api.version}", driver, allow_tf32=allow_tf32, cuda_graphs=cuda_graphs)

    def _load(self, log: Any) -> None:
        if self._plugin_library is not None:
            self._api.load_plugins(self._plugin_library, [ATTENTION_PLUGIN])
        plan, self._plan = self._plan, b""
        self._runtime = started_runtime(self._api, self.name, log)
        self._engine = engine = LoadedEngine(self._api, self._runtime, plan, self.name, log)
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._range = engine.ranges
        self._dtypes = {spec.name: spec.dtype for spec in (*engine.inputs, *engine.outputs)}

    def _unload(self) -> None:
        # Their order matters: an engine must not outlive its runtime.
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._runtime = None

    @property
    def _loaded(self) -> LoadedEngine:
        assert self._engine is not None  # a closed session is refused before this
        return self._engine

    def _inferred(self, shapes: Shapes, log: Any) -> dict[str, tuple[int, ...]]:
        return self._loaded.inferred(shapes, log)

    def _scratch_bytes(self) -> int:
        return 0

    def _bind_all(self, addresses: Mapping[str, int], log: Any) -> None:
        self._loaded.bind(addresses, log)

    def _execute(self, log: Any) -> None:
        self._loaded.execute(self._driver.stream, log)
