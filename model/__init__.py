"""HSTU in plain PyTorch on jagged tensors: the eager reference that every artifact is compared with.

Level 1 of the package: imports nothing above it and raises only ValueError and TypeError.
"""

from hstu_compile.model.attention import AttentionAttrs, hstu_attention
from hstu_compile.model.config import AttentionConfig, LayerConfig, RetrievalConfig
from hstu_compile.model.layer import HstuLayer
from hstu_compile.model.retrieval import RetrievalModel

__all__ = [
    "AttentionAttrs",
    "AttentionConfig",
    "HstuLayer",
    "LayerConfig",
    "RetrievalConfig",
    "RetrievalModel",
    "hstu_attention",
]
