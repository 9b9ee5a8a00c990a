"""What makes every test cheaper and none of them different."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare every test the same work on what the imports made; all of it is in memory by now."""
    # A collection walks every object of torch, ONNX and the tests; tracing a graph makes enough garbage for dozens.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    if "torch" in sys.modules:
        _keep_translations_of_operators()


def _keep_translations_of_operators() -> None:
    """Let the exporter read its 500 translations of operators from their source once, not for every graph."""
    # Inside torch, and so not certain to be there: without it, exports are slower.
    with contextlib.suppress(ImportError, AttributeError):
        from torch.onnx._internal._lazy_import import onnxscript_apis

        read = type(onnxscript_apis).__getattr__
        onnxscript_apis.get_torchlib_ops = functools.cache(lambda: read(onnxscript_apis, "get_torchlib_ops")())
