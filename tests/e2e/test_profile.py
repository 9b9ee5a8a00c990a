"""`hstu-compile profile`: what it measures, writes and refuses. Engines, GPU and profiler are stand-ins."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from hstu_compile import bundle_profile, kernel_timeline
from hstu_compile.bundle import BundleFiles, model_files
from hstu_compile.cli import cli
from hstu_compile.errors import EngineError, HstuCompileError
from hstu_compile.kernel_timeline import Event, calls_of, device_events
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.session import open_session
from tests.e2e.conftest import Build
from tests.kernel_traces import event, trace_of
from tests.unit.test_report import Page

# As test_bundle_files.py builds it.
FP16 = ("--fp16", "--top-k", 10)

pytestmark = pytest.mark.e2e

HOSTILE = "void <script>alert('1')</script>&\x1b[2J"
LONG = "cudnn_generated_fort_native_sm90_matMul_" + "pointwise_" * 30


def call_at(start: float) -> list[Event]:
    """Launches one after the other: their shares and that of the gaps make up the whole."""
    return [
        event("Memcpy HtoD (Pinned -> Device)", start, 5.0, "gpu_memcpy"),
        event("hstu_attention_sm90", start + 6.0, 30.0),
        event(LONG, start + 36.0, 20.0),
        event(HOSTILE, start + 60.0, 15.0),
        event("hstu_attention_sm90", start + 75.0, 25.0),
    ]


class StandIn:
    """A session that answers by ONNX Runtime and replays from the third time on."""

    def __init__(self, files: BundleFiles, graph: str, cuda_graphs: int) -> None:
        self._session = open_session("onnxruntime", onnx=files.path / model_files(graph)[0])
        self._records, self._calls = cuda_graphs > 0, 0
        self.name = "tensorrt 10.0.0"

    def run(self, feeds: Any) -> Any:
        self._calls += 1
        return self._session.run(feeds)

    @property
    def graph_stats(self) -> GraphStats | None:
        return GraphStats(replays=max(0, self._calls - 2)) if self._records else None

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._session.close()


class Machine:
    """What the command finds on a machine with a GPU; `opened` are the sessions that it asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[tuple[str, str, int]] = []
        monkeypatch.setattr(bundle_profile, "open_graph", self._open)
        monkeypatch.setattr(bundle_profile, "gpu_name", lambda: "A <GPU>")
        monkeypatch.setattr(kernel_timeline, "start_tracer", lambda: "2.13.0+cu130")
        monkeypatch.setattr(kernel_timeline, "traced", self._traced)

    def _open(self, files: BundleFiles, graph: str, runtime: str, *, cuda_graphs: int) -> StandIn:
        self.opened.append((graph, runtime, cuda_graphs))
        return StandIn(files, graph, cuda_graphs)

    def _traced(self, run: Callable[[], Any], wait: Callable[[], Any]) -> list[list[Event]]:
        run()
        wait()
        return calls_of(device_events(trace_of(call_at(0.0), call_at(100_000.0))))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def with_engines(bundle: Path, copy: Path, backend: str = "tensorrt") -> Path:
    """A copy whose manifest vouches for an engine of every graph."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["backend"] |= {"name": backend, "version": "10.0.0"}
    for graph in manifest["graphs"]:
        graph["engine"] = model_files(graph["name"])[1]
        (copy / graph["engine"]).write_bytes(b"no engine")
        manifest["files"][graph["engine"]] = {"bytes": 9, "sha256": hashlib.sha256(b"no engine").hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def with_a_second_graph(bundle: Path) -> Path:
    """The same graph once more, as `prefill`."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    names = {"model.onnx": "prefill.onnx", "model.engine": "prefill.engine", "feeds.json": "prefill_feeds.json"}
    for name, copy in names.items():
        shutil.copy(bundle / name, bundle / copy)
        manifest["files"][copy] = manifest["files"][name]
    (graph,) = manifest["graphs"]
    manifest["graphs"].append(graph | {"name": "prefill", "onnx": "prefill.onnx", "engine": "prefill.engine"})
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def profile(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["profile", *map(str, arguments)])


def refusal(result: Result) -> HstuCompileError:
    assert isinstance(result.exception, HstuCompileError), result.exception
    return result.exception


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def small(build_small: Build, tmp_path: Path) -> Path:
    return with_engines(build_small(*FP16).path, tmp_path / "small.hstu")


def test_every_graph_is_measured_in_both_ways_with_two_of_its_requests(small: Path, machine: Machine) -> None:
    bundle = with_a_second_graph(small)
    before = contents(bundle)
    result = profile(bundle, "--calls", 3)
    assert result.exit_code == 0, result.exception
    assert contents(bundle) == before
    assert machine.opened == [(graph, "tensorrt", records) for graph in ("retrieval", "prefill") for records in (0, 1)]
    folder = bundle.with_name("small.hstu.profile")
    assert set(contents(folder)) == {"profile.json", "report.json", "report.html"}
    found = json.loads((folder / "profile.json").read_text())
    assert (found["gpu"], found["torch"], found["calls"], found["runtime"]) == (
        "A <GPU>",
        "2.13.0+cu130",
        3,
        "tensorrt",
    )
    assert found["bundle"]["manifest_sha256"] == hashlib.sha256(before["manifest.json"]).hexdigest()
    assert found["environment"]["packages"]["numpy"]
    assert [(each["graph"], each["way"], each["request"]) for each in found["passes"]] == [
        (graph, way, request)
        for graph in ("retrieval", "prefill")
        for way in ("plain", "replayed")
        for request in ("mixed lengths", "most sequences")
    ]
    for each in found["passes"]:
        assert each["latency"]["calls"] == 3
        assert 0 < each["latency"]["median_ms"] <= each["latency"]["p90_ms"]
        timeline = each["timeline"]
        assert (timeline["calls"], timeline["launches"], timeline["span_us"], timeline["gaps_us"]) == (2, 5, 100.0, 5.0)
        attention = next(kernel for kernel in timeline["kernels"] if kernel["kind"] == "attention")
        assert (attention["launches"], attention["us"], attention["share"]) == (2, 55.0, 0.55)
    # The screen: a header, a row for each, and the folder.
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + 8 + 1
    assert lines[-1] == str(folder)
    assert re.search(r"^retrieval, mixed lengths, plain +71 +[\d.]+ +[\d.]+ +100 +5% +55% +5$", lines[2]), lines[2]


def cells_of(source: str, caption: str) -> list[list[str]]:
    """Rows of the first table whose caption begins so, without headings."""
    start = source.index(f"<caption>{caption}")
    body = source[start : source.index("</table>", start)]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body)
    found = [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]
    return [row for row in found[1:] if len(row) == 5]


def test_the_report_says_what_was_measured_and_escapes_what_kernels_are_called(small: Path, machine: Machine) -> None:
    assert profile(small, "--calls", 2).exit_code == 0
    folder = small.with_name("small.hstu.profile")
    report = json.loads((folder / "report.json").read_text())
    own = json.loads((small / "report.json").read_text())
    assert report["timings"][: len(own["timings"])] == own["timings"]
    assert [row["name"] for row in report["timings"][len(own["timings"]) :]] == [
        f"retrieval, tensorrt 10.0.0, {request}, {way}"
        for way in ("plain", "replayed")
        for request in ("mixed lengths", "most sequences")
    ]
    assert {key: value for key, value in report.items() if key not in ("timings", "profile")} == {
        key: value for key, value in own.items() if key != "timings"
    }
    source = (folder / "report.html").read_text()
    page = Page(source)
    assert not page.all("script")
    assert "\x1b" not in source
    assert "void &lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&amp;" in source
    assert "2 calls on A <GPU>, host arrays to host arrays" in page.text
    assert "kernels traced by torch 2.13.0+cu130" in page.text
    assert "Where it was profiled" in page.text
    assert len(page.all("table", "kernels")) == 4
    rows = cells_of(source, "Kernels of retrieval, mixed lengths, plain")
    assert [row[1:] for row in rows] == [
        ["copy", "1", "5.00", "5.0%"],
        ["attention", "2", "55.0", "55.0%"],
        ["product", "1", "20.0", "20.0%"],
        ["other", "1", "15.0", "15.0%"],
        ["", "", "5.00", "5.0%"],
        ["", "5", "100", "100.0%"],
    ]
    # A long name is cut, and breaks where the table is too narrow.
    assert rows[2][0] == LONG[:160]
    assert "table.kernels code { overflow-wrap: anywhere; }" in page.style


def test_the_picture_shows_every_kind_by_its_share(small: Path, machine: Machine) -> None:
    assert profile(small, "--no-cuda-graphs", "--calls", 1).exit_code == 0
    assert [records for _, _, records in machine.opened] == [0]
    source = (small.with_name("small.hstu.profile") / "report.html").read_text()
    picture = source[source.index('id="kernels-title"') : source.index("</svg>", source.index('id="kernels-title"'))]
    # Of the first bar; the legend is five rectangles in front of it.
    bars = re.findall(r'class="share (\w+)" x="([\d.]+)" y="50" width="([\d.]+)"', picture)
    widths = {kind: float(width) for kind, _, width in bars}
    whole = sum(widths.values())
    assert {kind: round(width / whole, 2) for kind, width in widths.items()} == {
        "attention": 0.55,
        "product": 0.2,
        "copy": 0.05,
        "other": 0.15,
        "gaps": 0.05,
    }
    ends = [float(x) + float(width) for _, x, width in bars]
    assert [float(x) for _, x, _ in bars[1:]] == pytest.approx(ends[:-1], abs=0.11)
    assert "attention 55%, products 20%, copies 5%, norms and other 15%, gaps 5%" in picture


def test_latencies_need_no_torch(small: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_timeline, "start_tracer", lambda: pytest.fail("torch was asked for"))
    result = profile(small, "--no-timeline", "--calls", 1, "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    folder = small.with_name("small.hstu.profile")
    assert found == json.loads((folder / "profile.json").read_text())
    assert found["torch"] is None
    assert [each["timeline"] for each in found["passes"]] == [None] * 4
    assert "no kernels were traced (--no-timeline)" in (folder / "report.html").read_text()


def test_readmes_command_is_one(small: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a GPU, so the test of README does not run it."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [command] = re.findall(r"^```\nhstu-compile profile (.+)\n```$", text, re.MULTILINE)
    monkeypatch.chdir(small.parent)
    small.rename("model.hstu")
    result = profile(*command.split())
    assert result.exit_code == 0, result.exception
    assert json.loads(Path("model.profile/profile.json").read_text())["calls"] == 100


def test_an_engine_of_tensorrt_rtx_in_one_piece_is_not_replayed(
    build_small: Build, machine: Machine, tmp_path: Path
) -> None:
    bundle = with_engines(build_small(*FP16).path, tmp_path / "rtx.hstu", "tensorrt-rtx")
    assert profile(bundle, "--calls", 1).exit_code == 0
    assert machine.opened == [("retrieval", "tensorrt-rtx", 0)]
    error = refusal(profile(bundle, "--cuda-graphs", "--force"))
    assert error.code == "HSTU-E901"
    assert "--attention fused" in error.fix


def test_a_request_that_was_not_replayed_is_a_row_with_its_reason(
    small: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "graph_stats", GraphStats(replays=2))
    assert profile(small, "--calls", 1).exit_code == 0
    folder = small.with_name("small.hstu.profile")
    found = json.loads((folder / "profile.json").read_text())
    assert [each["reason"] for each in found["passes"]] == [
        *(None, None),
        *["0 of 1 calls were replays of a CUDA graph"] * 2,
    ]
    text = Page((folder / "report.html").read_text()).text
    assert "Not run: retrieval, mixed lengths, replayed: 0 of 1 calls were replays of a CUDA graph." in text
    assert "not run on A <GPU>: 0 of 1 calls" in text


def test_an_existing_folder_is_replaced_by_force_alone_and_only_if_it_is_a_profile(
    small: Path, machine: Machine
) -> None:
    folder = small.with_name("out")
    assert profile(small, "-o", folder, "--no-timeline", "--calls", 1).exit_code == 0
    (folder / "old").touch()
    before = contents(folder)
    error = refusal(profile(small, "-o", folder))
    assert (error.code, error.fix) == ("HSTU-E801", "pass --force, or another -o DIR")
    assert contents(folder) == before
    assert profile(small, "-o", folder, "--force", "--no-timeline", "--calls", 2).exit_code == 0
    assert "old" not in contents(folder)
    assert json.loads((folder / "profile.json").read_text())["calls"] == 2
    (folder / "profile.json").unlink()
    assert "has no profile.json" in refusal(profile(small, "-o", folder, "--force")).why
    opened = len(machine.opened)
    assert refusal(profile(small, "-o", small / "inside")).code == "HSTU-E901"
    assert len(machine.opened) == opened


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_a_profile_that_fails_leaves_what_was_there(
    small: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    folder = small.with_name("small.hstu.profile")
    if options:
        assert profile(small, "--calls", 1).exit_code == 0
    before = contents(folder) if options else None

    def fail(self: StandIn, feeds: Any) -> Any:
        raise EngineError("HSTU-E404", "the engine failed", "a test", "none")

    monkeypatch.setattr(StandIn, "run", fail)
    assert refusal(profile(small, *options)).what == "the engine failed"
    # Also where writing fails, at the last moment.
    monkeypatch.undo()
    Machine(monkeypatch)
    monkeypatch.setattr(bundle_profile, "render_report", fails_when_profiled(bundle_profile.render_report))
    assert refusal(profile(small, "--calls", 1, *options)).code == "HSTU-E802"
    assert (contents(folder) if folder.exists() else None) == before
    assert {path.name for path in small.parent.iterdir()} == {"small.hstu", *([folder.name] if options else [])}


def fails_when_profiled(render: Callable[[Any], str]) -> Callable[[Any], str]:
    def rendered(report: Any) -> str:
        if "profile" in report:
            raise OSError(28, "No space left on device")
        return render(report)

    return rendered


def test_without_a_gpu_nothing_is_profiled(small: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_profile, "gpu_name", lambda: None)
    error = refusal(profile(small))
    assert (error.code, error.exit_code) == ("HSTU-E401", 5)
    assert "no GPU can be profiled" in error.what
    assert machine.opened == []


def test_torch_without_cuda_traces_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_profile, "gpu_name", lambda: "A GPU")
    monkeypatch.setattr(torch.version, "cuda", None)
    error = refusal(profile(small))
    assert error.code == "HSTU-E406"
    assert "is built without CUDA" in error.why
    assert "--no-timeline" in error.fix


def test_a_bundle_without_requests_or_engines_is_refused(build_small: Build, machine: Machine, tmp_path: Path) -> None:
    unverified = with_engines(build_small("--fp16", "--no-verify").path, tmp_path / "unverified.hstu")
    error = refusal(profile(unverified))
    assert (error.code, error.why) == ("HSTU-E803", "it was built with --no-verify")
    error = refusal(profile(build_small(*FP16).path))
    assert error.code == "HSTU-E901"
    assert "it was built with the backend onnx" in error.why
    bundle = with_engines(build_small(*FP16).path, tmp_path / "small.hstu")
    error = refusal(profile(bundle, "--runtime", "tensorrt-rtx"))
    assert (error.code, error.why) == ("HSTU-E901", "the bundle's engines are of the backend tensorrt")
    assert machine.opened == []


def test_a_damaged_bundle_is_refused(small: Path, machine: Machine) -> None:
    with (small / "model.engine").open("ab") as file:
        file.write(b"!")
    error = refusal(profile(small))
    assert (error.code, error.exit_code) == ("HSTU-E803", 8)
    assert "model.engine has another sha256" in error.why
    assert refusal(profile(small / "absent")).code == "HSTU-E803"
    assert machine.opened == []


def test_a_report_of_another_version_is_refused_before_anything_is_measured(small: Path, machine: Machine) -> None:
    content = (small / "report.json").read_bytes().replace(b'"schema": 2', b'"schema": 1')
    (small / "report.json").write_bytes(content)
    manifest = json.loads((small / "manifest.json").read_text())
    manifest["files"]["report.json"]["sha256"] = hashlib.sha256(content).hexdigest()
    (small / "manifest.json").write_text(json.dumps(manifest))
    error = refusal(profile(small))
    assert error.code == "HSTU-E803"
    assert "report schema is 1" in error.why
    assert machine.opened == []
