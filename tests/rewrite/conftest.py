from __future__ import annotations

import onnx
import pytest

from hstu_compile.artifacts import OnnxGraph
from tests.exported_models import exported_retrieval, small_config, small_model


@pytest.fixture(scope="session")
def exported_two_layers() -> OnnxGraph:
    """A two-layer float32 graph as the exporter leaves it."""
    return exported_retrieval(small_model(small_config(num_layers=2)), "fp32")


@pytest.fixture
def exported(exported_two_layers: OnnxGraph) -> onnx.ModelProto:
    """A copy of that graph, free to be changed."""
    model = onnx.ModelProto()
    model.CopyFrom(exported_two_layers.model)
    return model
