from __future__ import annotations

import onnx
import pytest

from hstu_compile.artifacts import OnnxGraph
from tests.exported_models import small_config, traced_retrieval


@pytest.fixture(scope="session")
def exported_two_layers() -> OnnxGraph:
    """A two-layer float32 graph as the exporter leaves it."""
    _, _, graph = traced_retrieval(small_config(num_layers=2), "fp32")
    return graph


@pytest.fixture
def exported(exported_two_layers: OnnxGraph) -> onnx.ModelProto:
    """A copy of that graph, free to be changed."""
    model = onnx.ModelProto()
    model.CopyFrom(exported_two_layers.model)
    return model
