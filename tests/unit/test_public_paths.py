"""Every public name that takes a path takes text, a Path and any other os.PathLike."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hstu_compile
from hstu_compile import BuildConfig, HstuCompileError
from tests.exported_models import small_config, small_model

PATHS = ("checkpoint", "output", "config_file", "calibration", "labelled_data", "keep_intermediates")


class Entry:
    """What os.scandir gives is such a path: one that is neither text nor a Path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


@pytest.mark.parametrize("kind", [str, Path, Entry])
def test_build_config_with_paths_as_text_has_paths(kind: Callable[[str], Any]) -> None:
    config = BuildConfig(**{name: kind(f"folder/{name}.pt") for name in PATHS})
    expected = BuildConfig(**{name: Path(f"folder/{name}.pt") for name in PATHS})
    assert config == expected
    assert hash(config) == hash(expected)
    assert all(isinstance(getattr(config, name), Path) for name in PATHS)
    assert BuildConfig(kind("a/b.pt")).bundle_path == Path("b.hstu")


def test_build_config_is_a_plain_frozen_dataclass_all_the_same() -> None:
    config = BuildConfig("a.pt")
    assert [getattr(config, name) for name in PATHS] == [Path("a.pt"), None, None, None, None, None]
    assert dataclasses.replace(config, output="b").output == Path("b")
    assert dataclasses.asdict(config)["checkpoint"] == Path("a.pt")
    assert "checkpoint=PosixPath('a.pt'), output=None, precision='fp32'" in repr(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.output = "b"  # type: ignore[misc]
    with pytest.raises(TypeError, match="checkpoint"):
        BuildConfig()
    with pytest.raises(TypeError, match="int"):
        BuildConfig(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [str, Path, Entry])
@pytest.mark.parametrize(
    "opened",
    [
        hstu_compile.load_bundle,
        lambda path: hstu_compile.open_ranking_session(path, plugin_library=path),
        lambda path: hstu_compile.open_retrieval_session(path, kv_budget_bytes=1, plugin_library=path),
        lambda path: hstu_compile.compile_checkpoint(BuildConfig(path, output=path)),
    ],
)
def test_paths_of_any_kind_are_refused_by_their_name_alone(
    tmp_path: Path, kind: Callable[[str], Any], opened: Callable[[Any], object]
) -> None:
    path = str(tmp_path / "absent.hstu")
    with pytest.raises(HstuCompileError) as caught:
        opened(kind(path))
    assert path in caught.value.what
    assert "object at 0x" not in str(caught.value)


@pytest.mark.parametrize("kind", [str, Path, Entry])
def test_checkpoint_is_saved_to_a_path_of_any_kind(tmp_path: Path, kind: Callable[[str], Any]) -> None:
    file = os.path.join(tmp_path, "model.pt")
    hstu_compile.save_checkpoint(small_model(small_config(num_layers=1)), kind(file))
    assert os.path.getsize(file)
