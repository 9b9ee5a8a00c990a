"""Bundles that several test files look at, each built once per run through the command line's entry point."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.__main__ import main
from hstu_compile.model.config import RetrievalConfig
from tests.dlrm_reference import DlrmForm, dlrm_state_dict
from tests.exported_models import small_config, small_model
from tests.traced_graphs import tracing_once

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


class BuiltOnce:
    """Bundles that tests read and never change: each is built once a run, by the first test process that asks for it.

    Who asks meanwhile waits.
    """

    def __init__(self, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._name, self._factory = name, tmp_path_factory
        own = tmp_path_factory.getbasetemp()
        # The processes of one run have their folders in one.
        self._records = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "built"
        self._records.mkdir(exist_ok=True)

    def get(self, key: tuple[object, ...], build: Callable[[Path], Built]) -> Built:
        """The bundle of this key, which `build` makes in the folder that it is given."""
        record = self._records / hashlib.sha256(repr((self._name, key)).encode()).hexdigest()
        with record.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not record.exists():
                with tracing_once():
                    built = build(self._factory.mktemp(self._name))
                unfinished = self._factory.mktemp("record") / record.name
                unfinished.write_text(json.dumps([str(built.path), dataclasses.astuple(built.result)]))
                unfinished.replace(record)
        path, result = json.loads(record.read_text())
        return Built(Path(path), CommandResult(*result))


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Builds of the module's tests trace no graph twice."""
    with tracing_once():
        yield


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
    once = BuiltOnce(fixture.name, tmp_path_factory)

    def build(*options: object) -> Built:
        def make(folder: Path) -> Built:
            path, config = folder / "meta.hstu", ("--config", fixture / "config.json")
            return Built(path, hstu_compile("build", fixture / "ckpt.pt", *config, "-o", path, *options))

        return once.get(options, make)

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
    once = BuiltOnce("small", tmp_path_factory)

    def build(*options: object, config: RetrievalConfig | None = None) -> Built:
        def make(folder: Path) -> Built:
            checkpoint, path = save_checkpoint(folder / "small.pt", config or small_config()), folder / "small.hstu"
            return Built(path, hstu_compile("build", checkpoint, "-o", path, "--backend", "onnx", *options))

        return once.get((*options, config), make)

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
    once = BuiltOnce("ranking", tmp_path_factory)

    def build(form: DlrmForm, *options: object) -> Built:
        def make(folder: Path) -> Built:
            checkpoint, config = save_ranking_checkpoint(folder, form)
            path = folder / "small.hstu"
            command = ("build", checkpoint, "--config", config, "-o", path, "--backend", "onnx", *options)
            return Built(path, hstu_compile(*command))

        return once.get((form, *options), make)

    return build
