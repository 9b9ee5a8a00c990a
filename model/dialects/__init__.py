"""Checkpoint families: how each one names its weights, and what its configuration means in ours.

Level 1. One file per family; `hstu_compile.checkpoint` is the only user. A family is a `Dialect`.
"""

from __future__ import annotations

from hstu_compile.model.dialects._base import Dialect, DialectError, SourceTensor
from hstu_compile.model.dialects.dlrm_v3 import DLRM_V3
from hstu_compile.model.dialects.native import NATIVE, NATIVE_FORMAT
from hstu_compile.model.dialects.research import RESEARCH

# In the order in which detection asks them.
DIALECTS: tuple[Dialect, ...] = (NATIVE, RESEARCH, DLRM_V3)

__all__ = ["DIALECTS", "DLRM_V3", "NATIVE", "NATIVE_FORMAT", "RESEARCH", "Dialect", "DialectError", "SourceTensor"]
