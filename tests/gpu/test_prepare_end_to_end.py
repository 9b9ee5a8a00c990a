"""Archives of the end-to-end benchmark's bundles: what they hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
import prepare_end_to_end  # noqa: E402

NAMES = ("a/item_embedding.bin", "a/model.onnx", "b/model.onnx")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Files in the folders of two bundles."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(rng.bytes(2000))
    return [tmp_path / name for name in NAMES]


def unpacked(archive: Path, folder: Path) -> dict[str, bytes]:
    subprocess.run(["bash", str(FOLDER / "unpack.sh"), str(archive), str(folder)], check=True)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*")}


def test_graphs_and_the_tables_beside_them_are_packed(files: list[Path], tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    packed = [*prepare_end_to_end.graphs_in(folders), *prepare_end_to_end.tables_in(folders)]
    assert sorted(packed) == files
    prepare_end_to_end.save_packed(tmp_path / "small.tar.xz", packed)
    assert unpacked(tmp_path / "small.tar.xz", tmp_path / "out") == {
        name: file.read_bytes() for name, file in zip(NAMES, files, strict=True)
    }
