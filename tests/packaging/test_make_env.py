"""`make env` and the environments of other checkouts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_environment_of_another_checkout_is_not_turned_over_to_this_one(tmp_path: Path) -> None:
    other = tmp_path / "other checkout"
    other.mkdir()
    environment = tmp_path / "venv"
    venv.create(environment, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    installed = environment / "lib" / version / "site-packages" / "hstu_compile-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: hstu-compile\nVersion: 0\n")
    (installed / "direct_url.json").write_text(json.dumps({"dir_info": {"editable": True}, "url": other.as_uri()}))
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={environment}", "typecheck"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"error: {environment} is the environment of {other}" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
