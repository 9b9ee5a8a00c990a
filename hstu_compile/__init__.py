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
    from hstu_compile.model.config import AttentionConfig, LayerConfig, RetrievalConfig
    from hstu_compile.model.families import model_from_config
    from hstu_compile.model.ranking_config import RankingConfig
    from hstu_compile.native_checkpoint import save_checkpoint
    from hstu_compile.pipeline import BuildResult, compile_checkpoint
    from hstu_compile.ranking_bundle import open_ranking_session
    from hstu_compile.retrieval_bundle import open_retrieval_session
    from hstu_compile.runtime.ladder import Buckets, Ladder
    from hstu_compile.runtime.ranking import RankingSession
    from hstu_compile.runtime.ranking_request import RankingPolicy, RankingRequest, RankingResult
    from hstu_compile.runtime.retrieval import RetrievalSession
    from hstu_compile.runtime.retrieval_request import RetrievalRequest, RetrievalResult

_HOMES = {
    "AttentionConfig": "model.config",
    "BuildConfig": "config",
    "BuildResult": "pipeline",
    "Buckets": "runtime.ladder",
    "Bundle": "bundle",
    "HstuCompileError": "errors",
    "Ladder": "runtime.ladder",
    "LayerConfig": "model.config",
    "RankingConfig": "model.ranking_config",
    "RankingPolicy": "runtime.ranking_request",
    "RankingRequest": "runtime.ranking_request",
    "RankingResult": "runtime.ranking_request",
    "RankingSession": "runtime.ranking",
    "RetrievalConfig": "model.config",
    "RetrievalRequest": "runtime.retrieval_request",
    "RetrievalResult": "runtime.retrieval_request",
    "RetrievalSession": "runtime.retrieval",
    "compile_checkpoint": "pipeline",
    "load_bundle": "bundle",
    "model_from_config": "model.families",
    "open_ranking_session": "ranking_bundle",
    "open_retrieval_session": "retrieval_bundle",
    "save_checkpoint": "native_checkpoint",
}

__all__ = [
    "AttentionConfig",
    "Buckets",
    "BuildConfig",
    "BuildResult",
    "Bundle",
    "HstuCompileError",
    "Ladder",
    "LayerConfig",
    "RankingConfig",
    "RankingPolicy",
    "RankingRequest",
    "RankingResult",
    "RankingSession",
    "RetrievalConfig",
    "RetrievalRequest",
    "RetrievalResult",
    "RetrievalSession",
    "__version__",
    "compile_checkpoint",
    "load_bundle",
    "model_from_config",
    "open_ranking_session",
    "open_retrieval_session",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
