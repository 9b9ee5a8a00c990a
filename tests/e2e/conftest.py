"""Bundles that several test files look at, each built once per run through the command line's entry point."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.__main__ import main
from hstu_compile.model.config import RetrievalConfig
from tests.exported_models import small_config, small_model

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "meta_research_ml100k"


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """What a command gave."""

    exit_code: int
    stdout: str
    stderr: str


def hstu_compile(*arguments: object) -> CommandResult:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return CommandResult(code, out.getvalue(), err.getvalue())


@dataclasses.dataclass(frozen=True)
class Built:
    """A bundle and the command that made it."""

    path: Path
    result: CommandResult


Build = Callable[..., Built]


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Inputs and outputs of the original model on 16 users."""
    if not FIXTURE.is_dir():
        pytest.skip("shared/fixtures/meta_research_ml100k is absent")
    with np.load(FIXTURE / "golden.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="session")
def golden_feeds(golden: dict[str, Any]) -> dict[str, Any]:
    """The golden users as one request batch."""
    lengths = golden["past_lengths"]
    valid = np.arange(golden["past_ids"].shape[1])[None, :] < lengths[:, None]
    return {
        "item_ids": golden["past_ids"][valid].astype(np.int32),
        "timestamps": golden["timestamps"][valid].astype(np.int64),
        "seq_offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "request_timestamps": golden["timestamps"][np.arange(len(lengths)), lengths].astype(np.int64),
    }


@pytest.fixture(scope="session")
def build_fixture(tmp_path_factory: pytest.TempPathFactory, golden: dict[str, Any]) -> Build:
    """Build Meta's checkpoint with the given options; the same options give the same bundle."""
    made: dict[tuple[object, ...], Built] = {}

    def build(*options: object) -> Built:
        if options not in made:
            path = tmp_path_factory.mktemp("fixture") / "meta.hstu"
            config = ("--config", FIXTURE / "config.json")
            made[options] = Built(path, hstu_compile("build", FIXTURE / "ckpt.pt", *config, "-o", path, *options))
        return made[options]

    return build


def save_checkpoint(path: Path, config: RetrievalConfig, seed: int = 0) -> Path:
    """A checkpoint of ours with random weights."""
    state = small_model(config, seed=seed).state_dict()
    torch.save({"format": "hstu-compile/1", "config": config.to_dict(), "state_dict": state}, path)
    return path


@pytest.fixture(scope="session")
def build_small(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a small random model (two heads of width 25, 20 events) with the given options, without an engine."""
    made: dict[tuple[object, ...], Built] = {}

    def build(*options: object, config: RetrievalConfig | None = None) -> Built:
        key = (*options, config)
        if key not in made:
            folder = tmp_path_factory.mktemp("small")
            checkpoint = save_checkpoint(folder / "small.pt", config or small_config())
            path = folder / "small.hstu"
            result = hstu_compile("build", checkpoint, "-o", path, "--backend", "onnx", *options)
            made[key] = Built(path, result)
        return made[key]

    return build
