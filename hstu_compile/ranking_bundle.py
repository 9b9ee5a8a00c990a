"""Open a ranking bundle as a `RankingSession`. Level 5; no torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hstu_compile.bundle import model_files, open_graph, read_bundle
from hstu_compile.errors import BundleError
from hstu_compile.runtime.ladder import Buckets
from hstu_compile.runtime.open_fused import FUSED_BACKEND
from hstu_compile.runtime.ranking import OverBudget, RankingSession
from hstu_compile.runtime.ranking_request import RankingPolicy
from hstu_compile.runtime.ranking_spec import RankingSpec

_GRAPHS = ("packed", "prefill", "score")
#: Graphs per engine by default: the shapes that come again are few (full micro-batches after a history of the greatest
#: length, a service's usual numbers of candidates), while each graph holds the arguments of several hundred kernels.
CUDA_GRAPHS = 16


def open_ranking_session(
    path: str | os.PathLike[str],
    runtime: str = "onnxruntime",
    *,
    kv_budget_bytes: int = 0,
    staging_rows: int | None = None,
    policy: RankingPolicy | None = None,
    over_budget: OverBudget = "refuse",
    plugin_library: str | os.PathLike[str] | None = None,
    use_gpu: bool = False,
    cuda_graphs: int | None = None,
    graph_budget_bytes: int | None = None,
    buckets: Buckets | None = None,
) -> RankingSession:
    """Open a ranking bundle for scoring.

    Args:
        path: folder that `hstu-compile build` wrote.
        runtime: onnxruntime, tensorrt or tensorrt-rtx.
        kv_budget_bytes: memory for cached keys and values; needed for a bundle built with --m-falcon.
        staging_rows: see `RankingSession`.
        policy: what to do with long histories and unknown ids.
        over_budget: what to do with a user that the budget cannot hold.
        plugin_library: plugin that the engines need (tensorrt only); None takes the bundle's own.
        use_gpu: ONNX Runtime's CUDA provider.
        cuda_graphs: most CUDA graphs that each graph of the bundle keeps (tensorrt, and tensorrt-rtx for bundles built
            with --attention fused); 0 records none. None means `CUDA_GRAPHS` with these, and none elsewhere.
        graph_budget_bytes: see `open_graph`.
        buckets: likewise; of each graph of the bundle.

    Returns:
        A session that owns the graphs; close it.

    Raises:
        BundleError: HSTU-E803 if it is no bundle, was altered, or holds no ranking model.
        EngineError: HSTU-E401 or E404 if the runtime cannot be used.
        UsageError: HSTU-E901 for arguments that do not go together.
    """
    files = read_bundle(Path(path))
    entry = files.manifest.get("ranking")
    if entry is None:
        raise BundleError(
            "HSTU-E803",
            f"{files.path} holds no ranking model",
            "its manifest has no ranking entry",
            "open a retrieval bundle with hstu_compile.load_bundle",
        )
    spec = RankingSpec.from_manifest(entry)
    if cuda_graphs is None:
        records = runtime == "tensorrt" or (runtime == FUSED_BACKEND and files.fused_graph("packed") is not None)
        cuda_graphs = CUDA_GRAPHS if records else 0
    library = Path(plugin_library) if plugin_library is not None else None
    with contextlib.ExitStack() as opened:
        graphs = {
            graph: opened.enter_context(
                open_graph(files, graph, runtime, library, use_gpu, cuda_graphs, graph_budget_bytes, buckets)
            )
            for graph in _GRAPHS
            if graph == "packed" or model_files(graph)[0] in files.manifest["files"]
        }
        session = RankingSession(
            spec,
            **graphs,
            kv_budget_bytes=kv_budget_bytes,
            staging_rows=staging_rows,
            policy=policy,
            over_budget=over_budget,
        )
        opened.pop_all()
        return session
