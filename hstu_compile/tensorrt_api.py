"""What building and running share of TensorRT: the module, its one logger, and the plugin registry. Level 2, no torch.

Abilities are probed with hasattr, never read off version strings: TensorRT-RTX 1.x is newer than TensorRT 8.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from hstu_compile.environment import import_backend, loaded_libraries
from hstu_compile.errors import PluginError

_LOG_TAIL = 40
_TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"


@dataclasses.dataclass(frozen=True)
class PluginKey:
    """What TensorRT looks a plugin up by."""

    name: str
    version: str
    namespace: str

    def __str__(self) -> str:
        return f"(name {self.name!r}, version {self.version!r}, namespace {self.namespace!r})"


@contextlib.contextmanager
def tf32_override_off(active: bool) -> Iterator[None]:
    """Hold NVIDIA_TF32_OVERRIDE at 0 while TensorRT-RTX builds or loads a float32 engine.

    TensorRT-RTX 1.6.1 rounds float32 products to TF32 even where the builder flag is cleared (row error 1.5e-3 on an
    H100 where float32 gives 4e-7); it heeds only this variable. It also refuses an engine that is loaded under another
    value than it was built with, so the variable is set for both, and for nothing else in the process.

    Args:
        active: False leaves the environment alone.
    """
    if not active:
        yield
        return
    previous = os.environ.get(_TF32_OVERRIDE)
    os.environ[_TF32_OVERRIDE] = "0"
    try:
        yield
    finally:
        if previous is None:
            del os.environ[_TF32_OVERRIDE]
        else:
            os.environ[_TF32_OVERRIDE] = previous


class LogCapture:
    """Messages that TensorRT logged while a `capture` block was open."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.lines: list[str] = []

    def add(self, severity: str, message: str) -> None:
        """Store one message; warnings once each."""
        self.lines.append(f"[{severity}] {message}")
        if severity == "WARNING" and message not in self.warnings:
            self.warnings.append(message)

    def tail(self, *, severities: tuple[str, ...] = ("INTERNAL_ERROR", "ERROR", "WARNING")) -> str:
        """The last messages of these severities, or of any if there are none."""
        chosen = [line for line in self.lines if line.startswith(tuple(f"[{s}]" for s in severities))]
        return "\n    ".join((chosen or self.lines)[-_LOG_TAIL:]) or "(TensorRT logged nothing)"


class TensorRtApi:
    """One backend in this process.

    TensorRT keeps the first logger that it is given for as long as the process lives, and warns when it is given
    another. So there is one logger per backend, never freed, and `capture` listens to it.
    """

    def __init__(self, backend: str, module: ModuleType) -> None:
        self.backend, self.trt = backend, module
        self._captures: list[LogCapture] = []
        self._lock = threading.Lock()
        self._libraries: set[str] = set()
        self.logger = self._make_logger()

    def _make_logger(self) -> Any:
        trt, captures, lock = self.trt, self._captures, self._lock

        class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity == trt.ILogger.Severity.VERBOSE:
                    return
                with lock:
                    for capture in captures:
                        capture.add(severity.name, message)

        return Logger()

    @contextlib.contextmanager
    def capture(self) -> Iterator[LogCapture]:
        """Collect what TensorRT logs inside the block (from any thread)."""
        capture = LogCapture()
        with self._lock:
            self._captures.append(capture)
        try:
            yield capture
        finally:
            with self._lock:
                self._captures.remove(capture)

    @property
    def version(self) -> str:
        """Version of the library."""
        return str(self.trt.__version__)

    @property
    def is_rtx(self) -> bool:
        """TensorRT-RTX takes no plugins."""
        return self.backend == "tensorrt-rtx"

    @property
    def is_tensorrt8(self) -> bool:
        """TensorRT 8: no INT64 and no bfloat16, weakly typed, opset 17, plugins of the second generation."""
        return not hasattr(self.trt.DataType, "INT64")

    def registry(self) -> Any:
        """The process-wide plugin registry."""
        return self.trt.get_plugin_registry()

    def has_creator(self, key: PluginKey) -> bool:
        """Whether a creator of exactly this name, version and namespace is registered."""
        registry = self.registry()
        find = registry.get_creator if hasattr(registry, "get_creator") else registry.get_plugin_creator
        return find(key.name, key.version, key.namespace) is not None

    def registered(self) -> list[PluginKey]:
        """Everything in the registry."""
        registry = self.registry()
        for name in ("all_creators_recursive", "all_creators", "plugin_creator_list"):
            if hasattr(registry, name):
                return [PluginKey(c.name, c.plugin_version, c.plugin_namespace) for c in getattr(registry, name)]
        return []

    def load_plugins(self, library: Path, keys: Iterable[PluginKey]) -> None:
        """Load a plugin library so that every key has a creator; without keys, load it for whatever it brings.

        A library that registers itself needs no more than dlopen; one that only exports getCreators is handed to the
        registry. It is never handed over when dlopen was enough: the registry would register a second time.

        Raises:
            PluginError: HSTU-E504 if the file cannot be loaded, HSTU-E503 if a key is still not registered.
        """
        wanted, path = list(keys), str(library.resolve())
        have = bool(wanted) and all(self.has_creator(key) for key in wanted)
        if not have and path not in self._libraries:
            before = self.registered()
            self._expose_tensorrt()
            try:
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise PluginError(
                    "HSTU-E504",
                    f"{library} cannot be loaded",
                    str(error),
                    "build it for this TensorRT with `hstu-compile plugin build`",
                    {"library": str(library)},
                ) from error
            arrived = self.registered() != before
            if not arrived and hasattr(self.registry(), "load_library"):
                self.registry().load_library(path)
            self._libraries.add(path)
        self.require_creators(wanted, library)

    def require_creators(self, keys: Iterable[PluginKey], library: Path | None) -> None:
        """Raise PluginError HSTU-E503, naming what is missing and what is registered in the same namespaces."""
        missing = [key for key in keys if not self.has_creator(key)]
        if not missing:
            return
        names = {key.name for key in missing}
        near = [str(key) for key in self.registered() if key.name in names or key.namespace]
        raise PluginError(
            "HSTU-E503",
            f"no plugin creator for {', '.join(map(str, missing))}",
            f"{'no plugin library was given' if library is None else f'{library} was loaded'}; registered under these "
            f"names or in any namespace: {', '.join(near) or 'nothing'}",
            "pass the library that `hstu-compile plugin build` made for this TensorRT, for instance with --plugins",
            {"missing": [dataclasses.asdict(key) for key in missing], "library": library and str(library)},
        )

    @staticmethod
    def _expose_tensorrt() -> None:
        """Make the loaded libnvinfer visible to libraries that are not linked to it (RTLD_GLOBAL, by its own path)."""
        for path in loaded_libraries().get("libnvinfer", []):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


@functools.cache
def tensorrt_api(backend: str) -> TensorRtApi:
    """The backend in this process, imported on first use.

    Raises:
        EngineError: HSTU-E401 if it cannot be imported.
    """
    return TensorRtApi(backend, import_backend(backend))
