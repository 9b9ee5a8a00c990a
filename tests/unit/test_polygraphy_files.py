"""What is kept of a polygraphy command's output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hstu_compile import polygraphy_files
from hstu_compile.polygraphy_files import run_polygraphy


def test_files_are_written_and_read_without_torch(tmp_path: Path) -> None:
    # An interrupt while torch is imported ended `hstu-compile verify` with a segmentation fault.
    program = (
        "import sys, numpy as np, pathlib; from hstu_compile.polygraphy_files import *;"
        "folder = pathlib.Path(sys.argv[1]); feed = {'x': np.arange(3.0)};"
        "save_feeds(folder / 'f.json', [feed]); save_outputs(folder / 'o.json', 'r', [feed]);"
        "assert all((each['x'] == feed['x']).all() for name, read in (('f', load_feeds), ('o', load_outputs))"
        " for each in read(folder / f'{name}.json'));"
        "assert 'torch' not in sys.modules; import torch; torch.ones(1)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        ("[I] short\n", "[I] short\n"),
        ("", ""),
        ("x" * 1500, "x" * 1500),
        # A line of 1,000 begins before the last 1,500 characters: it is left out whole.
        ("a" * 999 + "\n" + "b" * 999 + "\n" + "[I] PASSED\n", "b" * 999 + "\n" + "[I] PASSED\n"),
        # The last 1,500 characters begin where a line does.
        ("a\n" + "b" * 1499 + "\n", "b" * 1499 + "\n"),
        # One line that is longer than what is kept, with and without its end.
        ("a\n" + "b" * 2000 + "\n", "b" * 1499 + "\n"),
        ("b" * 2000, "b" * 1500),
    ],
)
def test_output_tail_does_not_start_in_the_middle_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, kept: str
) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, printed[: len(printed) // 2], printed[len(printed) // 2 :])

    monkeypatch.setattr(polygraphy_files.subprocess, "run", run)
    check = run_polygraphy(tmp_path, ["run", "model.onnx"])
    assert (check.output_tail, check.exit_code, check.arguments) == (kept, 1, ("run", "model.onnx"))
