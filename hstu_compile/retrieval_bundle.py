"""Open a retrieval bundle that was built with --incremental as a `RetrievalSession`. Level 5; no torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hstu_compile.bundle import open_graph, read_bundle
from hstu_compile.errors import BundleError
from hstu_compile.runtime.ladder import Buckets
from hstu_compile.runtime.retrieval import OverBudget, RetrievalSession
from hstu_compile.runtime.retrieval_request import Truncation

_GRAPHS = ("retrieval", "prefill", "append")


def open_retrieval_session(
    path: str | os.PathLike[str],
    runtime: str = "onnxruntime",
    *,
    kv_budget_bytes: int,
    staging_rows: int | None = None,
    truncation: Truncation = "refuse",
    over_budget: OverBudget = "refuse",
    plugin_library: str | os.PathLike[str] | None = None,
    use_gpu: bool = False,
    cuda_graphs: int = 0,
    graph_budget_bytes: int | None = None,
    buckets: Buckets | None = None,
) -> RetrievalSession:
    """Open a retrieval bundle for histories that grow.

    Args:
        path: folder that `hstu-compile build --incremental max-append=N` wrote.
        runtime: onnxruntime, tensorrt or tensorrt-rtx.
        kv_budget_bytes: memory for cached keys and values.
        staging_rows: see `RetrievalSession`.
        truncation: what to do with histories over the limit.
        over_budget: what to do with a user that the budget cannot hold.
        plugin_library: plugin that the engines need (tensorrt only); None takes the bundle's own.
        use_gpu: ONNX Runtime's CUDA provider.
        cuda_graphs: most CUDA graphs that each graph of the bundle keeps (tensorrt, and tensorrt-rtx for bundles built
            with --attention fused). They pay where many users have histories of one length, such as the longest, or in
            `buckets`; a history that grows has a new shape every time.
        graph_budget_bytes: see `open_graph`.
        buckets: likewise; of each graph of the bundle.

    Returns:
        A session that owns the graphs; close it.

    Raises:
        BundleError: HSTU-E803 if it is no bundle, was altered, or has not the graphs for this.
        EngineError: HSTU-E401 or E404 if the runtime cannot be used.
        UsageError: HSTU-E901 for arguments that do not go together.
    """
    files = read_bundle(Path(path))
    if files.retrieval is None:
        raise BundleError(
            "HSTU-E803",
            f"{files.path} cannot encode histories in parts",
            "its manifest has no retrieval entry",
            "build a retrieval model with --incremental max-append=N; hstu_compile.load_bundle runs this one as it is",
        )
    library = Path(plugin_library) if plugin_library is not None else None
    with contextlib.ExitStack() as opened:
        graphs = [
            opened.enter_context(
                open_graph(files, graph, runtime, library, use_gpu, cuda_graphs, graph_budget_bytes, buckets)
            )
            for graph in _GRAPHS
        ]
        session = RetrievalSession(
            files.retrieval,
            *graphs,
            kv_budget_bytes=kv_budget_bytes,
            staging_rows=staging_rows,
            truncation=truncation,
            over_budget=over_budget,
        )
        opened.pop_all()
        return session
