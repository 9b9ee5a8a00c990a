"""Large tables as files beside a graph: what is written, what is read back, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hstu_compile import table_files
from hstu_compile.artifacts import Profile
from hstu_compile.engine import engine_from_onnx
from hstu_compile.engine_stage import load_onnx
from hstu_compile.errors import BundleError, EngineError
from hstu_compile.runtime.session import open_session
from hstu_compile.table_files import (
    TableFiles,
    checkable,
    copy_tables,
    is_large_table,
    read_model,
    table_names,
    with_products_inside,
)
from tests.large_tables import with_tables_outside

ROWS = np.arange(40, dtype=np.float32).reshape(10, 4)
FEEDS = {"ids": np.array([3, 9], np.int64)}


def bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def lookup(location: str = "table.bin", **entries: Any) -> onnx.ModelProto:
    """A graph that looks rows up in a table of a file, and adds a small constant."""
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=ROWS.shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        table.external_data.add(key=key, value=str(value))
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["rows"]), helper.make_node("Add", ["rows", "one"], ["out"])],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 4])],
        [table, numpy_helper.from_array(np.ones(4, np.float32), "one")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def save(folder: Path, model: onnx.ModelProto, rows: np.ndarray = ROWS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "table.bin").write_bytes(bytes_of(rows))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


@pytest.fixture(autouse=True)
def _every_table_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "TABLE_BYTES", 160)


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_a_table_is_its_bytes_in_a_file_named_after_the_parameter(tmp_path: Path) -> None:
    tables = TableFiles(tmp_path)
    assert tables.add("model.item_embedding.weight", bytes_of(ROWS)) == "item_embedding.bin"
    assert tables.add("model.tables.3.weight", bytes_of(ROWS + 1)) == "tables.3.bin"
    assert (tmp_path / "item_embedding.bin").read_bytes() == ROWS.tobytes()
    assert tables.sha256["item_embedding.bin"] == hashlib.sha256(ROWS.tobytes()).hexdigest()


def test_the_same_bytes_are_one_file_whatever_their_name(tmp_path: Path) -> None:
    tables = TableFiles(tmp_path)
    assert {tables.add(name, bytes_of(ROWS)) for name in ("one", "one", "other")} == {"one.bin"}
    assert os.listdir(tmp_path) == ["one.bin"]


def test_other_bytes_of_the_same_name_are_another_file(tmp_path: Path) -> None:
    tables = TableFiles(tmp_path)
    names = [tables.add("model.t", bytes_of(ROWS + i)) for i in range(3)]
    assert names == ["t.bin", "t_2.bin", "t_3.bin"]
    assert (tmp_path / "t_2.bin").read_bytes() == (ROWS + 1).tobytes()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a\\b", "..", "", ".hidden", "model."])
def test_a_file_is_never_outside_of_the_folder_nor_hidden(tmp_path: Path, name: str) -> None:
    file = TableFiles(tmp_path).add(name, bytes_of(ROWS))
    assert file == Path(file).name
    assert not file.startswith(".")
    assert os.listdir(tmp_path) == [file]


def test_content_larger_than_a_block_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_BLOCK", 64)
    tables = TableFiles(tmp_path)
    tables.add("t", bytes_of(ROWS))
    assert (tmp_path / "t.bin").read_bytes() == ROWS.tobytes()
    assert tables.sha256["t.bin"] == hashlib.sha256(ROWS.tobytes()).hexdigest()


class FullDisk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: Any) -> None:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.write(content)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.file.close()


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open
    monkeypatch.setattr(table_files, "_BLOCK", 64)
    monkeypatch.setattr(Path, "open", lambda self, mode="r": FullDisk(real(self, mode), 100))
    tables = TableFiles(tmp_path)
    with pytest.raises(BundleError) as caught:
        tables.add("t", bytes_of(ROWS))
    assert caught.value.code == "HSTU-E802"
    assert "t.bin" in caught.value.what
    assert "No space left" in caught.value.why
    assert caught.value.fix == "free some disk space"
    assert os.listdir(tmp_path) == []
    assert tables.sha256 == {}


def test_a_copy_for_a_second_folder_is_no_link(tmp_path: Path) -> None:
    path = save(tmp_path / "one", lookup())
    other = tmp_path / "other"
    other.mkdir()
    for _ in range(2):
        copy_tables(read_model(path), path.parent, other)
        assert (other / "table.bin").read_bytes() == ROWS.tobytes()
        assert (other / "table.bin").stat().st_nlink == 1
        assert os.listdir(other) == ["table.bin"]


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "one", lookup())
    other = tmp_path / "other"
    other.mkdir()

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(table_files.shutil, "copyfile", full)
    with pytest.raises(BundleError, match="HSTU-E802"):
        copy_tables(read_model(path), path.parent, other)
    assert os.listdir(other) == []


# --- What is a table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "readers", "expected"),
    [
        (160, [("Gather", 0)], True),
        (160, [("Gather", 0), ("Transpose", 0)], True),
        (159, [("Gather", 0)], False),
        (1 << 40, [("MatMul", 1)], False),
        (1 << 40, [("Gather", 0), ("MatMul", 1)], False),
        (1 << 40, [("Gather", 1)], False),
        (1 << 40, [], False),
    ],
)
def test_a_large_table_is_looked_up_or_multiplied_with_as_a_whole(
    nbytes: int, readers: list[tuple[str, int]], expected: bool
) -> None:
    assert is_large_table(nbytes, readers) is expected


def test_the_vectors_of_all_items_are_a_table_and_the_weights_of_a_layer_are_not() -> None:
    assert is_large_table(160, [("MatMul", 1)], is_weight=False)
    assert not is_large_table(160, [("MatMul", 1)], is_weight=True)
    assert not is_large_table(160, [("MatMul", 0)], is_weight=False)
    assert not is_large_table(159, [("MatMul", 1)], is_weight=False)


def multiplied(folder: Path, kind: int = TensorProto.FLOAT) -> Path:
    """A graph whose table is the right operand of a product."""
    model = lookup(length=160 if kind == TensorProto.FLOAT else 80)
    model.graph.initializer[0].data_type = kind
    node = model.graph.node[0]
    node.op_type, node.input[0], node.input[1] = "MatMul", "ids", "table"
    return save(folder, model, ROWS if kind == TensorProto.FLOAT else ROWS.astype(np.float16))


def test_item_vectors_stay_in_their_file_until_a_pass_computes_with_them(tmp_path: Path) -> None:
    model = read_model(multiplied(tmp_path))
    assert table_names(model) == ("table.bin",)
    inside = with_products_inside(model, tmp_path)
    assert table_names(inside) == ()
    np.testing.assert_array_equal(numpy_helper.to_array(inside.graph.initializer[0]), ROWS)
    assert table_names(model) == ("table.bin",)
    looked_up = lookup()
    assert with_products_inside(looked_up, tmp_path) is looked_up


def test_weights_in_half_precision_are_read_into_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "TABLE_BYTES", 80)
    assert table_names(read_model(multiplied(tmp_path, TensorProto.FLOAT16))) == ()


def test_item_vectors_that_fit_no_message_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_model(multiplied(tmp_path))
    monkeypatch.setattr(table_files, "MESSAGE_BYTES", 100)
    with pytest.raises(ValueError, match="one ONNX message holds 100"):
        with_products_inside(model, tmp_path)


def test_the_checker_sees_all_of_a_graph_but_its_tables(tmp_path: Path) -> None:
    model = lookup("nowhere.bin")
    onnx.checker.check_model(checkable(model), full_check=True)
    assert [tensor.name for tensor in checkable(model).graph.initializer] == ["one"]
    assert [value.name for value in model.graph.input] == ["ids"]
    model.graph.node[0].input[0] = "unknown"
    with pytest.raises(onnx.checker.ValidationError, match="unknown"):
        onnx.checker.check_model(checkable(model))
    assert checkable(without := read_model(save_inside(tmp_path))) is without


def save_inside(folder: Path) -> Path:
    model = lookup()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(ROWS, "table"))
    return save(folder / "inside", model)


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_tables_stay_in_their_files_and_all_else_is_read(tmp_path: Path) -> None:
    model = lookup()
    one = model.graph.initializer[1]
    (tmp_path / "one.bin").write_bytes(b"\0" * 64 + one.raw_data)
    one.ClearField("raw_data")
    one.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "one.bin", "offset": "64", "length": "16"}.items():
        one.external_data.add(key=key, value=value)
    path = save(tmp_path, model)
    read = read_model(path)
    assert table_names(read) == ("table.bin",)
    np.testing.assert_array_equal(numpy_helper.to_array(read.graph.initializer[1]), np.ones(4, np.float32))
    with open_session("onnxruntime", onnx=path) as session:
        np.testing.assert_array_equal(session.run(FEEDS)["out"], ROWS[[3, 9]] + 1)


def test_tables_that_are_not_large_are_read_into_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "TABLE_BYTES", 161)
    read = read_model(save(tmp_path, lookup()))
    assert table_names(read) == ()
    np.testing.assert_array_equal(numpy_helper.to_array(read.graph.initializer[0]), ROWS)


def test_a_graph_in_memory_reads_its_tables_where_it_is_told(tmp_path: Path) -> None:
    model = read_model(save(tmp_path, lookup()))
    with open_session("onnxruntime", onnx=model, folder=tmp_path) as session:
        np.testing.assert_array_equal(session.run(FEEDS)["out"], ROWS[[3, 9]] + 1)


def test_weights_that_fit_no_message_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "MESSAGE_BYTES", 100)
    with pytest.raises(ValueError, match="one ONNX message holds 100"):
        read_model(save(tmp_path, lookup()))


ESCAPES = {
    "parent": "../secret.bin",
    "around": "deep/../../secret.bin",
    "link": "link.bin",
    "linked folder": "up/secret.bin",
    "absolute": "/secret.bin",
    "none": "",
}


@pytest.mark.parametrize("how", ESCAPES)
@pytest.mark.parametrize("table", [True, False], ids=["large", "small"])
def test_a_table_outside_of_the_folder_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, table: bool
) -> None:
    monkeypatch.setattr(table_files, "TABLE_BYTES", 160 if table else 161)
    (tmp_path / "secret.bin").write_bytes(ROWS.tobytes())
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "up").symlink_to(tmp_path)
    location = str(tmp_path / "secret.bin") if how == "absolute" else ESCAPES[how]
    path = save(folder, lookup(location))
    refusals = {"HSTU-E402": lambda: load_onnx(path), "HSTU-E404": lambda: open_session("onnxruntime", onnx=path)}
    for code, refused in refusals.items():
        with pytest.raises(EngineError) as caught:
            refused()
        assert caught.value.code == code
        assert f"table is in the file {location!r}, which is not in the folder of the graph" in caught.value.why


def test_onnx_runtime_itself_refuses_what_leaves_the_folder_of_a_graph_in_memory(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(ROWS.tobytes())
    (tmp_path / "folder").mkdir()
    with pytest.raises(EngineError, match="HSTU-E404"):
        open_session("onnxruntime", onnx=lookup("../secret.bin"), folder=tmp_path / "folder")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"location": "no.bin"}, "'no.bin', which is missing"),
        ({"offset": 8}, "of 160 bytes, from 8 on 160; its shape [10, 4] needs 160"),
        ({"offset": -8}, "from -8 on 160"),
        ({"length": 80}, "from 0 on 80; its shape [10, 4] needs 160"),
        ({"length": "many"}, "at no legal place: offset None, length 'many'"),
    ],
)
def test_a_table_that_its_file_cannot_hold_is_refused_by_name(
    tmp_path: Path, entries: dict[str, Any], expected: str
) -> None:
    path = save(tmp_path, lookup(**entries))
    with pytest.raises(EngineError) as caught:
        open_session("onnxruntime", onnx=path)
    assert "table is in the file" in caught.value.why
    assert expected in caught.value.why


def test_every_bad_file_is_named_also_of_constants_and_subgraphs(tmp_path: Path) -> None:
    model = lookup("../a.bin")
    inner = TensorProto(name="inner", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    inner.external_data.add(key="location", value="../b.bin")
    body = helper.make_graph([helper.make_node("Constant", [], ["c"], value=inner)], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))
    with pytest.raises(ValueError, match=r"a\.bin.*b\.bin"):
        read_model(save(tmp_path, model))


def test_an_engine_is_built_with_a_table_from_its_file_and_not_without_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx is not installed")
    profiles = [Profile("p", {"ids": (1,)}, {"ids": (2,)}, {"ids": (4,)})]
    inside = save_inside(tmp_path)
    outside = with_tables_outside(read_model(inside), tmp_path / "outside")
    engines = [
        engine_from_onnx(model, backend="tensorrt-rtx", profiles=profiles, folder=folder)
        for model, folder in ((read_model(inside), None), (outside, tmp_path / "outside"))
    ]
    assert ROWS.tobytes() in engines[0].plan
    assert ROWS.tobytes() in engines[1].plan
    assert engines[0].layers == engines[1].layers
    (tmp_path / "outside" / "table.bin").unlink()
    with pytest.raises(EngineError, match="HSTU-E402"):
        engine_from_onnx(outside, backend="tensorrt-rtx", profiles=profiles, folder=tmp_path / "outside")
