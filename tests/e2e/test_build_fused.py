"""Bundles whose graphs are cut at their attentions: built, inspected, verified, opened; GPU and kernels are fakes."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hstu_compile import bundle as bundles
from hstu_compile import bundle_profile, load_bundle, open_ranking_session, pipeline, recheck
from hstu_compile.artifacts import OnnxGraph, SegmentedGraph
from hstu_compile.build_plan import plan_build
from hstu_compile.config import BuildConfig
from hstu_compile.errors import BundleError, EngineError, PluginError, UsageError
from hstu_compile.graph_facts import tensor_specs
from hstu_compile.plugin_library import (
    KERNELS_LIBRARY,
    HopperKernels,
    KernelsLibrary,
    PluginBuildRequest,
    build_kernels_library,
)
from hstu_compile.plugins.kernels.norm_variants import norm_variant
from hstu_compile.polygraphy_files import PolygraphyCheck
from hstu_compile.rewrite.cut_at_attention import segmented_from_onnx
from hstu_compile.runtime import _gpu_session, open_fused
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime.open_fused import open_fused_session
from hstu_compile.runtime.segmented_onnx_session import SegmentedOnnxSession
from hstu_compile.tensorrt_api import TensorRtApi
from tests.dlrm_reference import DlrmForm
from tests.e2e.conftest import CommandResult, hstu_compile, save_checkpoint, save_ranking_checkpoint
from tests.exported_models import small_config
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import fake_tensorrt
from tests.fused_fakes import FakeKernels, segment_engine
from tests.ranking_requests import request_of

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), pytest.mark.usefixtures("traced_once")]

PAGE = (Path(__file__).parents[2] / "docs" / "fused.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
DRY_RUN, BUILD, INSPECT, VERIFY, ENGINE = COMMANDS
ENGINES = [f"model.segment-{number}.engine" for number in range(3)]
FORM = DlrmForm(contextual=(("user_id", 1, 20),), scaling_seq_len=57.0)


@dataclasses.dataclass
class Compiler:
    """In place of the kernels' compiler: remembers what it was asked for, and writes a file."""

    folder: Path
    asked: list[PluginBuildRequest] = dataclasses.field(default_factory=list)

    def __call__(self, request: PluginBuildRequest, progress: Any = None) -> KernelsLibrary:
        self.asked.append(request)
        path = self.folder / KERNELS_LIBRARY
        path.write_bytes(b"no library")
        return KernelsLibrary(
            path,
            request.variants,
            request.norm_variants or (),
            (90,),
            False,
            HopperKernels((), None, "a test"),
            "0" * 32,
        )


@dataclasses.dataclass(frozen=True)
class BuiltFused:
    """The bundle of docs/fused.md, what its commands gave, and what the compiler of kernels was asked for."""

    path: Path
    results: dict[str, CommandResult]
    asked: list[PluginBuildRequest]
    checkpoint: Path

    @property
    def manifest(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return content


def run(folder: Path, compiler: Callable[..., Any], *command: object) -> CommandResult:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "build_kernels_library", compiler)
        patched.chdir(folder)
        return hstu_compile(*command)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> BuiltFused:
    folder, library = tmp_path_factory.mktemp("fused"), tmp_path_factory.mktemp("kernels")
    checkpoint, compiler = save_checkpoint(folder / "ckpt.pt", small_config()), Compiler(library)
    results = {command: run(folder, compiler, *shlex.split(command)[1:]) for command in COMMANDS}
    return BuiltFused(folder / "model.hstu", results, compiler.asked, checkpoint)


def test_every_command_of_the_page_runs(fused: BuiltFused) -> None:
    for command, result in fused.results.items():
        assert result.exit_code == 0, f"{command}\n{result.stderr}"
        assert result.stdout.strip(), f"{command} printed nothing"
    assert "segments    retrieval 3 engines around 2 attentions" in fused.results[DRY_RUN].stdout
    assert "kernels     1 portable of attention, 1 of norms, and 0 for Hopper" in fused.results[DRY_RUN].stdout
    assert "model.schedule.json on tensorrt-rtx: NOT RUN" in fused.results[VERIFY].stdout
    assert "in segments: PASS" in fused.results[VERIFY].stdout


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    cuda = FakeCuda(2**26)
    yield cuda
    assert not cuda.memory


@pytest.fixture
def on_fakes(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Callable[[Path], None]:
    """Let the engines and kernels of a bundle run on fakes."""

    def prepare(path: Path) -> None:
        cuts = {entry["name"]: cut_of(path, entry) for entry in bundles.read_bundle(path).manifest["graphs"]}
        engines = {}
        for name, cut in cuts.items():
            files = bundles.read_bundle(path).fused_graph(name)
            assert files is not None
            for engine, segment in zip(files.engines, cut.segments, strict=True):
                engines[engine.read_bytes()] = segment_engine(segment)
        api = TensorRtApi("tensorrt-rtx", fake_tensorrt(engines, cuda))  # type: ignore[arg-type]
        monkeypatch.setattr(open_fused, "tensorrt_api", lambda backend: api)
        monkeypatch.setattr(_gpu_session, "CudaDriver", lambda: CudaDriver(cuda))
        # Every graph's attentions have names of their own; any graph serves to compute them.
        monkeypatch.setattr(open_fused, "KernelLibrary", lambda library: AnyKernels(list(cuts.values()), cuda))

    return prepare


class AnyKernels:
    """The kernels of several graphs."""

    name = "fake kernels"

    def __init__(self, cuts: list[SegmentedGraph], cuda: FakeCuda) -> None:
        self._kernels = [FakeKernels(cut, cuda) for cut in cuts]

    def prepare(self, call: Any, tensors: Any) -> Any:
        owner = next(each for each in self._kernels if call in each.graph.calls)
        return owner.prepare(call, tensors)


def cut_of(path: Path, entry: dict[str, Any]) -> SegmentedGraph:
    model = onnx.load(path / entry["onnx"])
    inputs, outputs = tensor_specs(model.graph.input), tensor_specs(model.graph.output)
    return segmented_from_onnx(OnnxGraph(entry["name"], model, "fp16", inputs, outputs))


FEEDS = {
    "item_ids": np.array([3, 1, 4, 1, 5], np.int32),
    "timestamps": np.array([10, 20, 90, 15, 70], np.int64),
    "seq_offsets": np.array([0, 3, 3, 5], np.int32),
    "request_timestamps": np.array([95, 96, 97], np.int64),
}


def test_a_bundle_has_an_engine_a_segment_and_the_kernels_but_no_second_copy_of_the_graph(fused: BuiltFused) -> None:
    manifest = fused.manifest
    assert manifest["status"] == "PASS"
    assert manifest["format_version"] == 1
    (graph,) = manifest["graphs"]
    assert graph["engine"] is None
    assert graph["fused"] == {"schedule": "model.schedule.json", "engines": ENGINES}
    assert set(graph["profiles"][0]["max"]) == {"item_ids", "timestamps", "seq_offsets", "request_timestamps"}
    assert {*ENGINES, "model.onnx", "model.schedule.json", KERNELS_LIBRARY} <= set(manifest["files"])
    assert [name for name in manifest["files"] if name.endswith(".onnx")] == ["model.onnx"]
    assert manifest["kernels"]["file"] == KERNELS_LIBRARY
    assert manifest["plugin"] is None


def test_the_kernels_are_those_of_the_attentions_and_of_the_plan(fused: BuiltFused) -> None:
    (request,) = fused.asked
    (variant,) = request.variants
    assert (variant.dtype, variant.pos_bias, variant.time_bias, variant.timestamp_bits) == ("float16", True, True, 64)
    assert (variant.block_dqk, variant.block_dv, variant.mask_kind, variant.has_cache) == (32, 32, 0, False)
    assert request.norm_variants == (norm_variant("float16", "float16", 50, activation=1),)
    plan = plan_build(BuildConfig(fused.checkpoint, precision="fp16", attention="fused"))
    assert plan.backend.name == "tensorrt-rtx"
    assert plan.fused is not None
    assert (plan.fused.segments, plan.fused.attentions) == ({"retrieval": 3}, {"retrieval": 2})
    assert (plan.fused.kernels, plan.fused.hopper_kernels) == (request.variants, request.hopper_variants)
    assert plan.fused.norm_kernels == request.norm_variants


def test_the_segments_are_compared_layer_by_layer_and_engines_that_did_not_run_say_why(fused: BuiltFused) -> None:
    runs = json.loads((fused.path / "report.json").read_text())["verification"]["runs"]
    whole, segments, engines = runs
    assert [run["artifact"] for run in runs] == ["model.onnx", "model.schedule.json", "model.schedule.json"]
    assert segments["runtime"].endswith("in segments")
    assert segments["status"] == "PASS"
    assert [each["layer"] for each in segments["layers"]] == [0, 1, 2]
    # Segments differ from the graph in one piece by roundings that ONNX Runtime makes in them alone (docs/pitfalls.md).
    assert segments["layers"] == whole["layers"]
    one, other = ({c["tensor"]: c["error"] for c in run["tensors"]} for run in (segments, whole))
    assert one == pytest.approx(other, rel=0.1)
    assert engines["runtime"] == "tensorrt-rtx"
    assert (engines["status"], bool(engines["reason"])) == ("NOT RUN", True)


def test_inspect_shows_what_crosses_with_its_bytes(fused: BuiltFused) -> None:
    facts = json.loads(fused.results[INSPECT].stdout)["fused"]
    graph = facts["graphs"]["retrieval"]
    assert [each["engine"] for each in graph["segments"]] == ENGINES
    assert all(each["bytes"] > 10_000 for each in graph["segments"])
    assert [step.startswith("segment") for step in graph["steps"]] == [True, False, False] * 2 + [True]
    assert [each["operator"] for each in graph["calls"]] == ["HstuAttention", "HstuNorm"] * 2
    assert [each["name"] for each in graph["calls"]] == [graph["steps"][place] for place in (1, 2, 4, 5)]
    (stream,) = (each for each in graph["crossing"] if each["name"] == "layer_0")
    # 64 sequences of 20 events, 32 float16 numbers each; typical are 8 of 10.
    assert (stream["shape"], stream["largest_bytes"]) == (["L", 32], 64 * 20 * 32 * 2)
    assert stream["typical_bytes"] == 8 * 10 * 32 * 2
    (answer,) = (each for each in graph["crossing"] if each["served"])
    assert (answer["name"], answer["largest_bytes"]) == ("user_embeddings", 64 * 32 * 4)
    # Places are multiples of 256 bytes, and some tensors follow others in one.
    between = [-(-each["largest_bytes"] // 256) * 256 for each in graph["crossing"] if not each["served"]]
    assert max(between) < graph["block_bytes"]["largest"] < sum(between)
    assert "model.segment-1.engine" in hstu_compile("inspect", fused.path).stdout


def test_the_report_shows_the_segments(fused: BuiltFused) -> None:
    report = json.loads((fused.path / "report.json").read_text())
    (graph,) = report["graphs"]
    assert [each["file"] for each in graph["fused"]["engines"]] == ENGINES
    assert graph["engine"]["bytes"] == sum(each["bytes"] for each in graph["fused"]["engines"])
    page = (fused.path / "report.html").read_text()
    assert all(name in page for name in (*ENGINES, "layer_1", "Between the steps"))


@pytest.fixture
def without_polygraphy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes a process of its own."""
    monkeypatch.setattr(recheck, "run_polygraphy", lambda folder, arguments: PolygraphyCheck((), 0, ""))


@pytest.mark.usefixtures("without_polygraphy")
def test_verify_does_not_take_another_cut_for_the_bundles(fused: BuiltFused, tmp_path: Path) -> None:
    path = shutil.copytree(fused.path, tmp_path / "other.hstu")
    schedule = path / "model.schedule.json"
    schedule.write_text(schedule.read_text().replace("layer_0", "layer_9"))
    files = bundles.read_bundle(path, check_files=False)
    runs = recheck.recheck_bundle(files, lambda *_: None).verification.runs
    assert [run.status for run in runs] == ["PASS", "NOT RUN", "NOT RUN"]
    assert "is not how this hstu-compile cuts model.onnx" in (runs[1].reason or "")


def test_a_bundle_opens_like_any_other_and_answers_the_same(
    fused: BuiltFused, on_fakes: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_fakes(fused.path)
    # Not the graph in one piece: there ONNX Runtime leaves out the rounding of what a norm hands to a product.
    (entry,) = bundles.read_bundle(fused.path).manifest["graphs"]
    with SegmentedOnnxSession(cut_of(fused.path, entry)) as plain:
        expected = plain.run(FEEDS)
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(examples) == 2, "at exact shapes, and in buckets"
    monkeypatch.chdir(fused.path.parent)
    for example in examples:
        names: dict[str, Any] = {"feeds": FEEDS}
        exec(compile(example, "docs/fused.md", "exec"), names)  # noqa: S102 - our own page is what is tested
        np.testing.assert_array_equal(names["answers"]["user_embeddings"], expected["user_embeddings"])
    with load_bundle(fused.path, "tensorrt-rtx", cuda_graphs=2) as bundle:
        for _ in range(4):
            np.testing.assert_array_equal(bundle.run(FEEDS)["user_embeddings"], expected["user_embeddings"])
        stats = bundle.session.graph_stats
        assert stats is not None
        assert stats.replays == 2
        assert bundle.session.name.endswith("with fake kernels")
    np.savez(tmp_path / "in.npz", **FEEDS)  # type: ignore[arg-type]
    command = ("--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz", "--runtime", "tensorrt-rtx")
    assert hstu_compile("run", fused.path, *command).exit_code == 0
    with np.load(tmp_path / "out.npz") as answers:
        np.testing.assert_array_equal(answers["user_embeddings"], expected["user_embeddings"])


@pytest.mark.usefixtures("without_polygraphy")
def test_verify_runs_the_engines_where_they_can_run(fused: BuiltFused, on_fakes: Callable[[Path], None]) -> None:
    on_fakes(fused.path)
    runs = recheck.recheck_bundle(bundles.read_bundle(fused.path), lambda *_: None).verification.runs
    assert [run.status for run in runs] == ["PASS"] * 3
    assert runs[2].runtime.endswith("with fake kernels")
    assert [check.error for check in runs[2].tensors] == [check.error for check in runs[1].tensors]


def test_a_profile_measures_replays_of_whole_passes(
    fused: BuiltFused, on_fakes: Callable[[Path], None], cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_fakes(fused.path)
    monkeypatch.setattr(bundle_profile, "gpu_name", lambda: "a fake")
    out = tmp_path / "profile"
    done = hstu_compile("profile", fused.path, "-o", out, "--calls", 4, "--no-timeline", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    passes = json.loads(done.stdout)["passes"]
    assert [(each["way"], each["request"]) for each in passes] == [
        (way, request) for way in ("plain", "replayed") for request in ("mixed lengths", "most sequences")
    ]
    assert all(each["session"].endswith("with fake kernels") for each in passes)
    assert all(each["latency"]["calls"] == 4 and each["reason"] is None for each in passes)
    # Two requests, each compared once, then launched in warm-up and in every call that is measured.
    assert cuda.launches >= 2 * (3 + 4)


def test_engines_of_another_graph_are_refused(fused: BuiltFused, on_fakes: Callable[[Path], None]) -> None:
    on_fakes(fused.path)
    files = bundles.read_bundle(fused.path).fused_graph("retrieval")
    assert files is not None
    first, second, third = files.engines
    for wrong in ((second, first, third), (first, second)):
        with pytest.raises(EngineError, match=r"HSTU-E404[\s\S]*the engines are not those of the schedule"):
            open_fused_session(files.schedule, wrong, files.kernels)


def test_an_altered_schedule_or_engine_is_found_when_the_bundle_is_opened(fused: BuiltFused, tmp_path: Path) -> None:
    path = shutil.copytree(fused.path, tmp_path / "altered.hstu")
    for name in ("model.schedule.json", ENGINES[1], KERNELS_LIBRARY):
        (path / name).write_bytes((path / name).read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"model\.schedule\.json has another sha256") as error:
        load_bundle(path, "tensorrt-rtx")
    assert all(name in error.value.why for name in (ENGINES[1], KERNELS_LIBRARY))


@pytest.mark.parametrize(
    ("backend", "why"), [("tensorrt", "takes our plugin"), ("onnx", "that backend builds no engine")]
)
def test_a_backend_that_does_not_run_segments_is_refused_before_the_checkpoint_is_read(backend: str, why: str) -> None:
    done = hstu_compile("build", "absent.pt", "--attention", "fused", "--backend", backend)
    assert done.exit_code == 2
    assert "--attention fused and --backend" in done.stderr
    assert why in done.stderr
    assert "--backend tensorrt-rtx" in done.stderr


def test_without_a_compiler_for_the_kernels_nothing_is_left(fused: BuiltFused, tmp_path: Path) -> None:
    def absent(request: PluginBuildRequest, progress: Any = None) -> KernelsLibrary:
        raise PluginError("HSTU-E501", "g++ is not installed", "the test says so", "install g++")

    done = run(tmp_path, absent, *shlex.split(BUILD)[1:2], fused.checkpoint, *shlex.split(BUILD)[3:], "--no-verify")
    assert done.exit_code == 5
    assert "HSTU-E501" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_engine_stage_cuts_the_graph_as_the_build_did(fused: BuiltFused, tmp_path: Path) -> None:
    made = fused.path.parent
    assert sorted(path.name for path in made.glob("model.s*")) == sorted(["model.schedule.json", *ENGINES])
    assert (made / "model.schedule.json").read_bytes() == (fused.path / "model.schedule.json").read_bytes()
    for words in (("--dry-run",), ("--backend", "tensorrt")):
        refused = run(tmp_path, Compiler(tmp_path), "engine", fused.path / "model.onnx", "--attention", "fused", *words)
        assert refused.exit_code == 2
        assert f"{words[0]}" in refused.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_budget_for_cuda_graphs_is_of_graphs_that_were_cut(fused: BuiltFused) -> None:
    files = bundles.read_bundle(fused.path)
    with pytest.raises(UsageError, match="onnxruntime keeps no budget for CUDA graphs"):
        bundles.open_graph(files, "retrieval", "onnxruntime", graph_budget_bytes=1)


@pytest.mark.slow
def test_a_ranking_bundle_serves_its_three_graphs_in_segments(tmp_path: Path, on_fakes: Callable[[Path], None]) -> None:
    checkpoint, config = save_ranking_checkpoint(tmp_path, FORM)
    compiler = Compiler(tmp_path)
    command = ("--config", config, "--attention", "fused", "--max-batch", 4, "--m-falcon", "micro-batch=5")
    path = tmp_path / "small.hstu"
    done = run(tmp_path, compiler, "build", checkpoint, *command, "-o", path)
    assert done.exit_code == 0, done.stderr
    manifest = json.loads((path / "manifest.json").read_text())
    count = {graph["name"]: len(graph["fused"]["engines"]) for graph in manifest["graphs"]}
    plan = plan_build(BuildConfig(checkpoint, config_file=config, attention="fused", micro_batch=5, max_batch=4))
    assert plan.fused is not None
    assert count == plan.fused.segments
    (request,) = compiler.asked
    assert set(request.variants) == set(plan.fused.kernels)
    assert set(request.hopper_variants or ()) == set(plan.fused.hopper_kernels)
    assert set(request.norm_variants or ()) == set(plan.fused.norm_kernels)
    on_fakes(path)
    spec = bundles.read_bundle(path).ranking
    assert spec is not None
    requests = [request_of(spec, f"user {number}", 7 * number, 4) for number in range(3)]
    with (
        open_ranking_session(path, kv_budget_bytes=1 << 20) as plain,
        open_ranking_session(path, "tensorrt-rtx", kv_budget_bytes=1 << 20) as served,
    ):
        expected = plain.score(requests)
        for _ in range(3):
            for one, other in zip(served.score(requests), expected, strict=True):
                np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-5)
        assert served.stats().graphs.captures > 0


@pytest.mark.slow
def test_the_library_of_kernels_is_really_built(fused: BuiltFused) -> None:
    (request,) = fused.asked
    library = build_kernels_library(dataclasses.replace(request, archs=(90,), with_ptx=False))
    assert (library.variants, library.norm_variants) == (request.variants, request.norm_variants)
    assert library.path.stat().st_size > 10_000
