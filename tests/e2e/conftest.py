"""Bundles that several test files look at, each built once per run through the command line's entry point."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.__main__ import main
from hstu_compile.model.config import RetrievalConfig
from tests.dlrm_reference import DlrmForm, dlrm_state_dict
from tests.exported_models import small_config, small_model

_FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
FIXTURE = _FIXTURES / "meta_research_ml100k"
RANKING_FIXTURE = _FIXTURES / "meta_dlrm_ml100k"


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


def _builder_of(fixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    made: dict[tuple[object, ...], Built] = {}

    def build(*options: object) -> Built:
        if options not in made:
            path = tmp_path_factory.mktemp("fixture") / "meta.hstu"
            config = ("--config", fixture / "config.json")
            made[options] = Built(path, hstu_compile("build", fixture / "ckpt.pt", *config, "-o", path, *options))
        return made[options]

    return build


@pytest.fixture(scope="session")
def build_fixture(tmp_path_factory: pytest.TempPathFactory, golden: dict[str, Any]) -> Build:
    """Build Meta's retrieval checkpoint with the given options; the same options give the same bundle."""
    return _builder_of(FIXTURE, tmp_path_factory)


@pytest.fixture(scope="session")
def ranking_golden() -> dict[str, Any]:
    """Inputs and outputs of the original ranking model, three batches."""
    if not RANKING_FIXTURE.is_dir():
        pytest.skip("shared/fixtures/meta_dlrm_ml100k is absent")
    with np.load(RANKING_FIXTURE / "golden.npz") as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="session")
def build_ranking_fixture(tmp_path_factory: pytest.TempPathFactory, ranking_golden: dict[str, Any]) -> Build:
    """Build Meta's ranking checkpoint with the given options; the same options give the same bundle."""
    return _builder_of(RANKING_FIXTURE, tmp_path_factory)


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


def save_ranking_checkpoint(folder: Path, form: DlrmForm) -> tuple[Path, Path]:
    """A checkpoint of the DLRM-HSTU family with random weights, and its configuration."""
    checkpoint, config = folder / "small.pt", folder / "config.json"
    torch.save(dlrm_state_dict(form), checkpoint)
    config.write_text(json.dumps(form.user_config()))
    return checkpoint, config


@pytest.fixture(scope="session")
def build_ranking(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a small ranking model of the given form with the given options, without an engine."""
    made: dict[tuple[object, ...], Built] = {}

    def build(form: DlrmForm, *options: object) -> Built:
        key = (form, *options)
        if key not in made:
            folder = tmp_path_factory.mktemp("ranking")
            checkpoint, config = save_ranking_checkpoint(folder, form)
            path = folder / "small.hstu"
            command = ("build", checkpoint, "--config", config, "-o", path, "--backend", "onnx", *options)
            made[key] = Built(path, hstu_compile(*command))
        return made[key]

    return build
