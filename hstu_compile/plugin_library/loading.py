"""Loads a self-registering plugin library into this process."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import threading
from pathlib import Path

from hstu_compile.errors import PluginError

_loaded: dict[Path, ctypes.CDLL] = {}
_load_lock = threading.Lock()


def load_plugin_library(path: Path) -> ctypes.CDLL:
    """Load a self-registering plugin library with its symbols global; loading it again returns the same handle.

    TensorRT's Python package is imported first when it is installed: it brings libnvinfer, which the plugin names as a
    dependency, from a folder that the dynamic loader does not search.

    Raises:
        PluginError: HSTU-E504 if the file is missing or the dynamic loader refuses it.
    """
    resolved = Path(path).resolve()
    with _load_lock:
        if resolved in _loaded:
            return _loaded[resolved]
        if importlib.util.find_spec("tensorrt") is not None:
            importlib.import_module("tensorrt")
        try:
            library = ctypes.CDLL(str(resolved), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            needs_tensorrt = "libnvinfer" in str(error)
            raise PluginError(
                "HSTU-E504",
                f"the plugin library {resolved} cannot be loaded",
                str(error),
                "install the TensorRT that it was built for, or put the folder of its libnvinfer into LD_LIBRARY_PATH"
                if needs_tensorrt
                else "build it on this system with `hstu-compile plugin build`",
                {"library": str(resolved)},
            ) from error
        _loaded[resolved] = library
        return library
