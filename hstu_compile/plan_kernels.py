"""The kernels that an engine launches, and which of them only copy. Level 2; no torch, no ONNX.

Of TensorRT-RTX they are read from the plan, of TensorRT from what its inspector says. Reformats, casts and copies in
kernels of their own are what a fused graph should not have: each reads and writes whole tensors to compute nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hstu_compile.artifacts import EngineArtifact, EngineKernel

# A program of the plan; those that launch kernels say so, others compute shapes or are the inside of a fused kernel.
_PROGRAM = re.compile(rb"main \{\n(.*?)\n\}", re.DOTALL)
_LAUNCHES = re.compile(rb"^  (?:shape_call|function|runtime_fusion)=\{", re.MULTILINE)
_STATEMENT = re.compile(
    rb'^  (function|runtime_function|runtime_fusion|fully_connected|convolution|copy)=\{ name="?([^"\s]+)', re.MULTILINE
)
_PREFIX = "__myl_"
# TensorRT-RTX names a kernel by what it computes: four letters of each operator at most, the first a capital. A long
# name ends in Etc.
_OPERATOR = re.compile(r"[A-Z][a-z]*")
_MOVES = frozenset({"Cast", "Resh", "Move", "Conc", "Slic", "Tran", "Repl", "Copy"})
_PRODUCTS = frozenset({"Fc", "Conv"})
# What TensorRT's inspector calls layers that launch nothing, and layers that only move or convert.
_NOTHING = frozenset({"noop", "constant", "shapehosttodevice"})
_COPIES = frozenset({"reformat", "cast", "slice", "shuffle"})


def kernels_of_plan(plan: bytes) -> tuple[EngineKernel, ...] | None:
    """What an engine of TensorRT-RTX launches for one pass, in order.

    The names are in the plan as text (1.6.1); this is no documented format. None where there are none.

    Args:
        plan: the serialised engine.
    """
    found = [
        _kernel(kind.decode("ascii"), name.decode("latin-1"))
        for program in _PROGRAM.findall(plan)
        if _LAUNCHES.search(program)
        for kind, name in _STATEMENT.findall(program)
    ]
    return tuple(found) or None


def _kernel(statement: str, name: str) -> EngineKernel:
    operators = _OPERATOR.findall(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else []
    if statement in ("fully_connected", "convolution") or not _PRODUCTS.isdisjoint(operators):
        return EngineKernel(name, "product")
    if statement == "copy" or (operators and _MOVES.issuperset(operators)):
        return EngineKernel(name, "copy")
    return EngineKernel(name, "other")


def kernels_of_layers(layers: Sequence[Mapping[str, Any] | str]) -> tuple[EngineKernel, ...] | None:
    """What an engine of TensorRT launches, from the layers of the inspector's JSON. None where only names are known.

    A region that Myelin compiles is one layer there, and one kernel here, however many it launches.
    """
    found = []
    for layer in layers:
        if isinstance(layer, str):
            return None
        kind, name = str(layer.get("LayerType", "")).lower(), str(layer.get("Name", ""))
        if kind in _NOTHING:
            continue
        if kind in _COPIES:
            found.append(EngineKernel(name, "copy"))
        else:
            is_product = any(word in kind for word in ("conv", "gemm", "matrixmultiply", "matmul"))
            found.append(EngineKernel(name, "product" if is_product else "other"))
    return tuple(found) or None


def joined_kernels(engines: Sequence[EngineArtifact]) -> tuple[EngineKernel, ...] | None:
    """What several engines launch, one after the other; None if one does not tell."""
    known = [engine.kernels for engine in engines if engine.kernels is not None]
    return tuple(kernel for kernels in known for kernel in kernels) if len(known) == len(engines) else None


def kernel_facts(kernels: Sequence[EngineKernel] | None) -> dict[str, Any] | None:
    """How many kernels are launched, how many of them are products, and the names of those that only copy."""
    if kernels is None:
        return None
    return {
        "launched": len(kernels),
        "products": sum(each.kind == "product" for each in kernels),
        "copies": [each.name for each in kernels if each.kind == "copy"],
    }
