"""Large tables of a graph as files beside it, which the graph names and nothing reads whole. Level 2; no torch.

An ONNX file is one protobuf message, and a message ends at 2 GiB. A table of a few million rows does not fit, and a
smaller one would be copied with its message by every pass. So a large table is a file of its own, its bytes and nothing
else, and what the graph keeps of it (a TensorProto with data_location EXTERNAL) is type, shape and the file's name. The
file lies in the graph's folder. Graphs that read the same table name the same file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, external_data_helper, helper

from hstu_compile.files import writing_to

#: Tables from this size on are files of their own. Tables below it, and the weights of layers with them, are far from
#: the 2 GiB that a message may have, and a model without a large catalogue stays one file, which is easier to carry.
TABLE_BYTES = 64 << 20
#: What an ONNX file may hold besides tables: a message ends at 2 GiB, and names and nodes need some of that.
MESSAGE_BYTES = (1 << 31) - (1 << 24)

_SUFFIX = ".bin"
_BLOCK = 1 << 24
#: Operator and input that read a table: rows that are looked up, and vectors that are all multiplied with.
_LOOKED_UP = (("Gather", 0), ("Transpose", 0))
_MULTIPLIED = ("MatMul", 1)


class TableFiles:
    """Writes tables into a folder, each once.

    Args:
        folder: of the graphs that will name the files; it exists.

    Attributes:
        sha256: of each file, by its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sha256: dict[str, str] = {}

    def add(self, tensor: str, content: memoryview) -> str:
        """Store a table, unless the same bytes are stored already.

        Args:
            tensor: name of the table in its graph, which the file's is made from.
            content: little-endian numbers, row by row; [n] of unsigned bytes.

        Returns:
            The file's name.

        Raises:
            BundleError: HSTU-E802, if the file cannot be written; nothing of it is left then.
        """
        digest = hashlib.sha256()
        for block in _blocks(content):
            digest.update(block)
        known = {sha256: name for name, sha256 in self.sha256.items()}
        if digest.hexdigest() in known:
            return known[digest.hexdigest()]
        name = self._fresh(tensor)
        path = self.folder / name
        try:
            with writing_to(path), path.open("wb") as file:
                for block in _blocks(content):
                    file.write(block)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self.sha256[name] = digest.hexdigest()
        return name

    def _fresh(self, tensor: str) -> str:
        """A plain file name for a table, not in use: the parameter's name without the module that was traced."""
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", tensor.removeprefix("model.").removesuffix(".weight")).strip(".")
        name, number = f"{stem or 'table'}{_SUFFIX}", 1
        while name in self.sha256:
            number += 1
            name = f"{stem or 'table'}_{number}{_SUFFIX}"
        return name


def _blocks(content: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(content), _BLOCK):
        yield content[start : start + _BLOCK]


def is_large_table(nbytes: int, readers: Iterable[tuple[str, int]], *, is_weight: bool = True) -> bool:
    """Whether a constant belongs into a file: it is large, and its numbers are read at run time alone.

    Passes compute with the weights of products and norms, and never with a table.

    Args:
        nbytes: its size.
        readers: operator and index of the input of each node that reads it.
        is_weight: whether it is a layer's weight if it is multiplied with, and not the vectors of all items.
    """
    found = list(readers) if nbytes >= TABLE_BYTES else []
    allowed = _LOOKED_UP if is_weight else (*_LOOKED_UP, _MULTIPLIED)
    return bool(found) and all(reader in allowed for reader in found)


def is_multiplied(readers: Iterable[tuple[str, int]]) -> bool:
    """Whether a product reads a constant directly."""
    return _MULTIPLIED in readers


def with_products_inside(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """The graph with what products read directly from files inside, for passes that compute with that.

    Raises:
        ValueError: if one message does not hold it.
    """
    readers = _readers(model)
    wanted = {t.name for t in model.graph.initializer if is_external(t) and is_multiplied(readers.get(t.name, ()))}
    if not wanted or folder is None:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _load(copy, [tensor for tensor in copy.graph.initializer if tensor.name in wanted], folder)
    return copy


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor's numbers, wherever they are."""
    size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    for dim in tensor.dims:
        size *= dim
    return int(size)


def is_external(tensor: TensorProto) -> bool:
    """Whether a tensor's numbers are in a file beside the graph."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def table_names(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the files that a graph's tables are in, in order and each once."""
    return tuple(dict.fromkeys(_entries(tensor)["location"] for tensor in _external_tensors(model)))


def checkable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as ONNX's checker takes it in memory: tables, whose files it would look for, are inputs instead."""
    if not any(map(is_external, model.graph.initializer)):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    inside = [tensor for tensor in copy.graph.initializer if not is_external(tensor)]
    for tensor in model.graph.initializer:
        if is_external(tensor):
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(inside)
    return copy


def read_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file of anybody, without its tables: weights of other kinds that lie in files are read into it.

    Args:
        path: the file. Whoever opens the graph names its folder, `path.parent`.

    Raises:
        ValueError: if a tensor's file lies outside of the folder, is absent or is too short, naming all of them; or if
            what is no table does not fit one message.
        Exception: what protobuf raises for a file that is no ONNX model.
    """
    model: onnx.ModelProto = onnx.load(str(path), load_external_data=False)
    external = list(_external_tensors(model))
    if problems := [problem for tensor in external if (problem := _problem(path.parent, tensor))]:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    readers = _readers(model)
    tables = {
        tensor.name
        for tensor in model.graph.initializer
        # Item vectors are float32 in every precision.
        if is_large_table(
            tensor_bytes(tensor), readers.get(tensor.name, ()), is_weight=tensor.data_type != TensorProto.FLOAT
        )
    }
    _load(model, [tensor for tensor in external if tensor.name not in tables], path.parent)
    return model


def _readers(model: onnx.ModelProto) -> dict[str, list[tuple[str, int]]]:
    """Operator and index of the input of the nodes that read a value, by its name."""
    readers: dict[str, list[tuple[str, int]]] = {}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node.op_type, index))
    return readers


def _load(model: onnx.ModelProto, tensors: Sequence[TensorProto], folder: Path) -> None:
    """Read tensors of a graph from their files into it."""
    wanted = model.ByteSize() + sum(map(tensor_bytes, tensors))
    if wanted > MESSAGE_BYTES:
        raise ValueError(
            f"its weights without the tables are {wanted} bytes, and one ONNX message holds {MESSAGE_BYTES}"
        )
    for tensor in tensors:
        external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def copy_tables(model: onnx.ModelProto, source: Path, target: Path) -> None:
    """Put the files of a graph's tables into a second folder, unless they are there.

    A copy and no link: ONNX refuses files with several links, as somebody could have planted them.

    Raises:
        BundleError: HSTU-E802, if one cannot be written; nothing of it is left then.
    """
    for name in table_names(model):
        made = target / name
        if made.exists():
            continue
        partial = target / f".{name}.partial"
        try:
            with writing_to(made):
                shutil.copyfile(source / name, partial)
                os.replace(partial, made)
        finally:
            partial.unlink(missing_ok=True)


def _entries(tensor: TensorProto) -> Mapping[str, str]:
    return {"location": "", **{entry.key: entry.value for entry in tensor.external_data}}


def _external_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model whose numbers are in a file, those of subgraphs and of functions too."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    tensors = list(model.graph.initializer)
    while nodes:
        for attribute in nodes.pop().attribute:
            tensors += [attribute.t, *attribute.tensors]
            for graph in (attribute.g, *attribute.graphs):
                nodes += graph.node
                tensors += graph.initializer
    yield from filter(is_external, tensors)


def _problem(folder: Path, tensor: TensorProto) -> str | None:
    """Why a tensor's file is not to be read; None if it is."""
    entries = _entries(tensor)
    location = entries["location"]
    what = f"{tensor.name} is in the file {location!r}"
    file = folder / location
    if not location or Path(location).is_absolute() or not file.resolve().is_relative_to(folder.resolve()):
        return f"{what}, which is not in the folder of the graph"
    if not file.is_file():
        return f"{what}, which is missing"
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", tensor_bytes(tensor)))
    except ValueError:
        return f"{what} at no legal place: offset {entries.get('offset')!r}, length {entries.get('length')!r}"
    needed, size = tensor_bytes(tensor), file.stat().st_size
    if offset < 0 or length != needed or offset + length > size:
        return f"{what} of {size} bytes, from {offset} on {length}; its shape {list(tensor.dims)} needs {needed}"
    return None
