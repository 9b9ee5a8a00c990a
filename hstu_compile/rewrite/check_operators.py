"""Refuse a graph that some target cannot take, by operator name, before any engine builder sees it."""

from __future__ import annotations

import onnx

from hstu_compile.errors import RewriteError
from hstu_compile.op_schema import attention_contract
from hstu_compile.rewrite._pass import Pass, PassResult

# Each is refused by at least one of TensorRT-RTX 1.6, TensorRT 8.5 to 11, or makes output sizes depend on data.
_FORBIDDEN = {
    "NonZero": "its output size depends on data",
    "Compress": "its output size depends on data",
    "Unique": "its output size depends on data",
    "SplitToSequence": "TensorRT has no sequences",
    "SequenceAt": "TensorRT has no sequences",
    "Loop": "TensorRT 8.5 takes only simple loops",
    "If": "a branch would double the engine",
}


class CheckOperators(Pass):
    """Count operators and refuse the forbidden ones; changes nothing.

    Cases: 1. an operator of the table; 2. ScatterND that accumulates; 3. a domain other than ONNX's and the contract's.
    """

    name = "check_operators"

    def call(self, model: onnx.ModelProto) -> PassResult:
        problems = []
        nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
        for node in nodes:
            if node.domain not in ("", "ai.onnx", attention_contract().namespace):
                problems.append(f"{node.name}: {node.op_type} of domain {node.domain}")
            elif node.op_type in _FORBIDDEN:
                problems.append(f"{node.name}: {node.op_type} ({_FORBIDDEN[node.op_type]})")
            elif node.op_type == "ScatterND" and any(a.name == "reduction" and a.s != b"none" for a in node.attribute):
                problems.append(f"{node.name}: ScatterND that accumulates (TensorRT-RTX refuses it)")
        if problems:
            raise RewriteError(
                "HSTU-E302",
                f"the graph holds {len(problems)} operators that a runtime cannot take",
                "; ".join(problems),
                "report this with `hstu-compile env` and the .onnx of --keep-intermediates",
            )
        return PassResult({})
