"""The script of the GPU steps, with a step of which Python is a stand-in: what a run leaves when it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "job.sh"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "job.json").write_text('{"commit": "0123abc"}', encoding="utf-8")
    return folder


def environment(tmp_path: Path, program: str) -> dict[str, str]:
    """Of a run whose Python is a shell script; its last argument but the options is where `kernels` writes."""
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\n{program}\n", encoding="utf-8")
    python.chmod(0o755)
    return os.environ | {"PYTHON": str(python), "WORK": str(tmp_path / "work"), "HSTU_COMMIT": ""}


def facts_of(archive: Path, step: str) -> tuple[dict[str, object], list[str]]:
    with tarfile.open(archive) as tar:
        run = tar.extractfile(f"{step}/run.json")
        assert run is not None
        return json.load(run), tar.getnames()


def test_a_step_that_ends_is_packed_with_its_exit_code(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = 'echo measured > "$3/row.txt"; echo done; exit 3'
    done = subprocess.run(
        ["bash", JOB, job, out, "kernels"],
        env=environment(tmp_path, program),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "== kernels: exit 3" in done.stdout
    run, names = facts_of(out / "kernels.tar.gz", "kernels")
    assert run["exit_code"] == 3
    assert run["commit"] == "0123abc"
    assert "kernels/row.txt" in names


def test_a_run_that_is_ended_packs_what_its_step_has_left_and_begins_no_other(job: Path, tmp_path: Path) -> None:
    out, begun = tmp_path / "out", tmp_path / "begun"
    program = f'echo measured > "$3/row.txt"; touch {begun}; sleep 60; touch {tmp_path / "too late"}'
    run = subprocess.Popen(
        ["bash", JOB, job, out, "kernels", "bench-torch"], env=environment(tmp_path, program), stdout=subprocess.PIPE
    )
    started = time.monotonic()
    while not begun.exists() and time.monotonic() - started < 30:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=20)
    assert run.returncode == 1
    assert b"1 steps failed" in output
    facts, names = facts_of(out / "kernels.tar.gz", "kernels")
    assert facts["exit_code"] != 0
    assert "kernels/row.txt" in names
    assert (out / "summary.txt").exists()
    assert not (out / "bench-torch.tar.gz").exists()
    assert not (tmp_path / "too late").exists()
