"""Bundles that nobody can run, for tests of what is written from their manifest and their graphs' inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from hstu_compile.bundle import BundleWriter

Tensor = tuple[str, str, list[Any]]

RETRIEVAL: list[Tensor] = [
    ("item_ids", "int32", ["L"]),
    ("timestamps", "int64", ["L"]),
    ("seq_offsets", "int32", ["B_plus_1"]),
    ("request_timestamps", "int64", ["B"]),
]
EMBEDDINGS: list[Tensor] = [("user_embeddings", "float32", ["B", 16])]
_TYPES = {"int32": TensorProto.INT32, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT}


def graph_of(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bytes:
    """An .onnx file with these inputs and outputs, and nothing between them."""
    values = [
        [
            helper.make_tensor_value_info(name, _TYPES.get(dtype, TensorProto.DOUBLE), shape)
            for name, dtype, shape in each
        ]
        for each in (inputs, outputs)
    ]
    model: onnx.ModelProto = helper.make_model(helper.make_graph([], "g", *values))
    return bytes(model.SerializeToString())


def write_bundle(
    path: Path,
    *,
    inputs: Sequence[Tensor] = RETRIEVAL,
    outputs: Sequence[Tensor] = EMBEDDINGS,
    engine: str | None = None,
    plugin: bytes | None = None,
    graph: bytes | None = None,
    limits: Mapping[str, int] | None = None,
    **facts: Any,
) -> Path:
    """A bundle with these inputs and outputs.

    Args:
        path: of the bundle.
        inputs: name, dtype and shape of each.
        outputs: likewise.
        engine: backend of its engine; None for no engine.
        plugin: content of its plugin library.
        graph: of its model.onnx; None makes one with these inputs and outputs.
        limits: of the manifest.
        facts: other entries of the manifest.
    """
    manifest: dict[str, Any] = {
        "status": "PASS",
        "precision": {"requested": "fp32"},
        "backend": {"name": engine or "onnx"},
        "inputs": [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in inputs],
        "outputs": [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in outputs],
        "limits": {"num_items": 40, "num_ratings": 0, "max_batch": 6, "max_seq_len": 20, **(limits or {})},
        "graphs": [],
        "ranking": None,
        "retrieval": None,
        "versions": {},
    }
    with BundleWriter(path, force=False) as writer:
        writer.add("model.onnx", graph if graph is not None else graph_of(inputs, outputs))
        if engine is not None:
            writer.add("model.engine", b"engine")
        if plugin is not None:
            writer.add("libhstu_trt_plugin.so", plugin)
        return writer.commit({**manifest, **facts})
