"""`hstu-compile plugin build --onnx A --onnx B`: one library for several graphs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from hstu_compile import plugin_stage
from hstu_compile.__main__ import main
from hstu_compile.artifacts import Precision
from hstu_compile.cli import cli
from hstu_compile.plugin_library import HopperKernels, PluginBuildRequest, PluginLibrary
from hstu_compile.plugins.kernels.hopper.variants import SILU_FORMS, hopper_variants_for
from hstu_compile.rewrite.annotate_attention import AnnotateAttention
from tests.exported_models import shipped, small_config


class Requested(Exception):  # noqa: N818 - it ends the stage where the compiler would start
    """Carries the request that would have been built."""


@functools.cache
def shipped_model(precision: Precision, width: int) -> onnx.ModelProto:
    """The graph of a layer with heads of that width; who changes it takes a copy."""
    config = small_config(num_layers=1, attention={"attention_dim": width, "linear_dim": width})
    return shipped(config, precision)[1].model


@pytest.fixture
def graphs(tmp_path: Path) -> list[Path]:
    paths = []
    for precision in ("fp32", "fp16"):
        paths.append(tmp_path / f"{precision}.onnx")
        onnx.save(shipped_model(precision, 24), paths[-1])
    return paths


def requested(monkeypatch: pytest.MonkeyPatch, models: list[Path]) -> PluginBuildRequest:
    def stop(request: PluginBuildRequest) -> Any:
        raise Requested(request)

    monkeypatch.setattr(plugin_stage, "build_plugin_library", stop)
    with pytest.raises(Requested) as caught:
        plugin_stage.run_plugin_stage(models, None, ("9.0",), "10.14.1")
    request: PluginBuildRequest = caught.value.args[0]
    return request


def test_the_library_holds_the_kernels_of_every_graph(graphs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [set(requested(monkeypatch, [path]).variants) for path in graphs]
    together = requested(monkeypatch, graphs)
    assert all(alone)
    assert not alone[0] & alone[1]
    assert set(together.variants) == alone[0] | alone[1]
    assert together.archs == (90,)


@pytest.mark.parametrize(("precision", "width"), [("fp16", 24), ("fp16", 25), ("fp32", 24)])
def test_hopper_kernels_are_those_of_the_real_head_dims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, width: int
) -> None:
    onnx.save(shipped_model(precision, width), tmp_path / "model.onnx")
    dtype = {"fp16": "float16", "fp32": "float32"}[precision]
    fitting = hopper_variants_for(dtype, width, width, plain_causal=True, pos_bias=True, time_bias=True)
    assert requested(monkeypatch, [tmp_path / "model.onnx"]).hopper_variants == fitting
    assert bool(fitting) is ((precision, width) == ("fp16", 24))


def test_hopper_kernels_have_the_silu_of_the_node_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(shipped_model("fp16", 24))
    found = {}
    for silu in SILU_FORMS:
        AnnotateAttention(1, silu).call(model)
        onnx.save(model, tmp_path / f"{silu}.onnx")
        found[silu] = requested(monkeypatch, [tmp_path / f"{silu}.onnx"])
        assert {variant.is_accurate for variant in found[silu].hopper_variants or ()} == {silu == "accurate"}
    assert found["fast"].variants == found["accurate"].variants, "the portable kernel serves both"
    both = requested(monkeypatch, [tmp_path / f"{silu}.onnx" for silu in SILU_FORMS]).hopper_variants
    assert both == (*(found["fast"].hopper_variants or ()), *(found["accurate"].hopper_variants or ()))


def test_without_a_graph_the_default_set_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested(monkeypatch, []).variants == PluginBuildRequest().variants


def test_the_command_says_on_the_screen_which_hopper_kernels_are_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    note = "the compiler nvcc was not found. Fix: install it"
    asked: list[PluginBuildRequest] = []

    def build(request: PluginBuildRequest) -> PluginLibrary:
        asked.append(request)
        hopper = HopperKernels((), None, note)
        return PluginLibrary(
            Path("a.so"), None, "10.14.1", (), (), (90,), with_ptx=True, hopper=hopper, content_hash="0"
        )

    monkeypatch.setattr(plugin_stage, "build_plugin_library", build)
    said = CliRunner().invoke(cli, ["plugin", "build"])
    assert (said.exit_code, said.stdout) == (0, "a.so\n")
    summary = f"no Hopper kernels, Hopper GPUs run the portable ones: {note}"
    assert said.stderr == f"{summary}\n"
    facts = json.loads(CliRunner().invoke(cli, ["plugin", "build", "--hopper", "require", "--json"]).stdout)
    assert facts["hopper"] == {"variants": [], "nvcc": None, "note": note, "summary": summary}
    assert [request.hopper for request in asked] == ["auto", "require"]


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["--arch", "8.0", "--arch", "99.9"], "--arch 99.9"),
        (["--tensorrt-version", "abc"], "it is not a version"),
        (["--tensorrt-version", "9" * 5000], "it is not a version"),
    ],
)
def test_a_wrong_architecture_or_version_is_an_option_that_is_wrong(
    arguments: list[str], seen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugin", "build", *arguments]) == 2
    assert seen in capsys.readouterr().err
