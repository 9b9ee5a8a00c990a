"""Every command and link of README and the samples' READMEs does what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.exported_models import small_config, small_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The first is run whole by tests/e2e/test_demo.py (slow), the second is what runs this test.
MAKE_COMMANDS = {"make demo", "make test"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shell_commands() -> list[str]:
    lines = [line.split("   #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks to the commands like the repository after `make demo`."""
    folder = tmp_path_factory.mktemp("readme")
    config = small_config()
    checkpoint = folder / "build" / "demo" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(
        {
            "format": "hstu-compile/1",
            "config": config.to_dict(),
            "state_dict": small_model(config).state_dict(),
        },
        checkpoint,
    )
    program = shutil.which("hstu-compile", path=str(Path(sys.executable).parent)) or shutil.which("hstu-compile")
    assert program is not None, "hstu-compile is not installed beside this Python"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "hstu-compile").symlink_to(program)
    return folder


def test_readme_has_the_two_commands():
    assert set(shell_commands()) >= MAKE_COMMANDS
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command.split()[1] for command in MAKE_COMMANDS} <= set(targets)


@pytest.mark.timeout(300)
def test_readme_commands_run_in_order(workplace: Path):
    commands = [command for command in shell_commands() if command not in MAKE_COMMANDS]
    assert len(commands) >= 6
    for command in commands:
        assert command.startswith(".venv/bin/hstu-compile "), f"README has a command that no test runs: {command}"
        done = subprocess.run(command.split(), cwd=workplace, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip(), f"{command} printed nothing"


@pytest.mark.timeout(300)
def test_readme_python_example_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    [example] = blocks("python")
    monkeypatch.chdir(workplace)
    feeds = {
        "item_ids": np.array([1, 2, 3], np.int32),
        "timestamps": np.array([1_700_000_000, 1_700_000_100, 1_700_000_000], np.int64),
        "seq_offsets": np.array([0, 2, 3], np.int32),
        "request_timestamps": np.array([1_700_000_200, 1_700_000_200], np.int64),
    }
    names: dict[str, Any] = {"feeds": feeds}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 - our own README is what is tested
    assert names["answers"]["user_embeddings"].shape[0] == 2


def test_readme_names_every_command_and_input():
    from hstu_compile.cli import cli

    for name in cli.commands:
        assert f"`{name}" in README, f"README does not mention hstu-compile {name}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"{page} links to {target}, which does not exist"


def test_version_is_stated_once():
    import hstu_compile

    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated is not None
    assert stated[1] == hstu_compile.__version__
