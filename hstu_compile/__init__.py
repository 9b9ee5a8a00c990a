"""hstu-compile: from a trained HSTU checkpoint to a verified, servable GPU engine.

The public names are loaded on first use: importing the package needs neither torch nor TensorRT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hstu_compile.bundle import Bundle, load_bundle
    from hstu_compile.config import BuildConfig
    from hstu_compile.errors import HstuCompileError
    from hstu_compile.pipeline import BuildResult, compile_checkpoint

_HOMES = {
    "BuildConfig": "config",
    "BuildResult": "pipeline",
    "Bundle": "bundle",
    "HstuCompileError": "errors",
    "compile_checkpoint": "pipeline",
    "load_bundle": "bundle",
}

__all__ = [
    "BuildConfig",
    "BuildResult",
    "Bundle",
    "HstuCompileError",
    "__version__",
    "compile_checkpoint",
    "load_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
