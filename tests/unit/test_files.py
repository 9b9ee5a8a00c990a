from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hstu_compile.errors import BundleError, UsageError
from hstu_compile.files import check_not_input, new_folder, write_whole


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BundleError, match="not a regular file") as caught:
        write_whole(pipe, b"new")
    assert caught.value.code == "HSTU-E802"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_file_behind_a_link_is_written_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "answers.npz", tmp_path / "latest.npz"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "store") == ["answers.npz"]


def test_a_folder_that_appeared_while_another_was_written_is_not_replaced(tmp_path: Path) -> None:
    place = tmp_path / "profile"

    def write() -> None:
        with new_folder(place, "profile.json", force=False) as folder:
            (folder / "profile.json").write_text("ours")
            place.mkdir()
            (place / "thesis.txt").write_text("theirs")

    with pytest.raises(BundleError, match="exists"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]
    assert (place / "thesis.txt").read_text() == "theirs"


@pytest.mark.parametrize("output", ["ckpt.pt", "link.pt", "folder/../ckpt.pt", "folder/new.npz", "folder"])
def test_what_is_read_is_not_written(tmp_path: Path, output: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "ckpt.pt").write_bytes(b"weights")
    (tmp_path / "link.pt").symlink_to("ckpt.pt")
    with pytest.raises(UsageError, match="is not written"):
        check_not_input(tmp_path / output, (tmp_path / "ckpt.pt", tmp_path / "folder"))
    check_not_input(tmp_path / "folder.json", (tmp_path / "ckpt.pt", tmp_path / "folder"))
