"""What makes every test cheaper and none of them different."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import sys
from typing import Any

import pytest

# Files whose tests read graphs that a process traces once, see `tests/exported_models.py`.
_READS_TRACED = re.compile(r"\b(traced_r\w+|exported_graph|shipped|segmented_cases|bucketed_cases)\b")
# Files of tests/plugins whose tests take compiled kernels from one cache.
_TAKES_KERNELS = "tests.plugins.conformance.libraries"


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one process, and those that read traced graphs to the same one, which traces them once.

    So with tests/cpp_loader: of two processes that want a program one waits until the other has compiled it. And with
    tests that take kernels from a cache: two processes that want the same ones at the same time both compile them.
    In the order of collection: the long files of tests/e2e are early in it, so that the processes end together.
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFileAndTracedGraphs(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid.split("::", 1)[0])

    @functools.cache
    def scope_of(file: str) -> str:
        if file.startswith("tests/cpp_loader/"):
            return "tests/cpp_loader"
        text = (config.rootpath / file).read_text("utf-8")
        in_folder = file.startswith("tests/rewrite/")  # its conftest.py reads them for all
        if in_folder or _READS_TRACED.search(text):
            return "files that read traced graphs"
        if file.startswith("tests/plugins/") and _TAKES_KERNELS in text:
            return "files that take compiled kernels"
        return file

    config.option.loadscopereorder = False
    return ByFileAndTracedGraphs(config, log)
