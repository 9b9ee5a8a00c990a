"""Graphs whose tables are moved into files after they were made, so that both forms can be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper

from hstu_compile.table_files import TableFiles, is_external, is_large_table, tensor_bytes


def with_tables_outside(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy of a graph that holds its tables, with those that are large in files of a folder."""
    folder.mkdir(exist_ok=True)
    copy, tables = onnx.ModelProto(), TableFiles(folder)
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        readers = [(n.op_type, i) for n in copy.graph.node for i, name in enumerate(n.input) if name == tensor.name]
        if is_large_table(tensor_bytes(tensor), readers):
            numbers = np.ascontiguousarray(numpy_helper.to_array(tensor))
            file = tables.add(tensor.name, memoryview(numbers.reshape(-1).view(np.uint8)))
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=file)
            tensor.external_data.add(key="length", value=str(tensor_bytes(tensor)))
    return copy


def with_tables_inside(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy of a graph that names files, holding what is in them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in filter(is_external, copy.graph.initializer):
        external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    return copy
