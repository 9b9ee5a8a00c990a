from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hstu_compile.errors import BundleError
from hstu_compile.files import write_whole


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
