"""`hstu-compile profile`: how long a bundle's graphs take on this GPU, and which kernels run. Level 5; no torch.

OUTPUT/
  profile.json    versions, GPU and driver, latencies, timelines
  report.json     the bundle's report with them under "timings" and "profile"
  report.html     the same, for people

Of each graph two of the bundle's stored requests are measured: the typical one, which the build's own check was timed
with, and the one with the most rows. The bundle is only read.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hstu_compile
from hstu_compile import kernel_timeline
from hstu_compile._report_kernels import timing_note
from hstu_compile.artifacts import Feed
from hstu_compile.bundle import (
    MANIFEST,
    REPORT_HTML,
    REPORT_JSON,
    BundleFiles,
    open_graph,
    read_bundle,
    reference_files,
)
from hstu_compile.environment import collect_environment, gpu_name
from hstu_compile.errors import BundleError, EngineError, UsageError
from hstu_compile.files import check_new_folder, new_folder
from hstu_compile.polygraphy_files import load_feeds
from hstu_compile.report import render_report
from hstu_compile.runtime.open_fused import FUSED_BACKEND
from hstu_compile.session_timing import WARM_UP_MS, RequestTiming, Tracer, Way, time_request

PROFILE_JSON = "profile.json"
PROFILE_VERSION = 1
_GPU_RUNTIMES = ("tensorrt", "tensorrt-rtx")
#: Verification requests of a graph in order; the second has sequences of mixed lengths.
_TYPICAL = 1

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class ProfileRequest:
    """What to measure, and where to write it.

    Attributes:
        bundle: the bundle.
        output: folder to write; None is the bundle's name + .profile beside it.
        runtime: tensorrt or tensorrt-rtx; None is the one that the bundle's engines are of.
        calls: whole calls that are measured of each request and way.
        cuda_graphs: also measure replays; None does where the runtime records CUDA graphs.
        timeline: also record kernels, which needs torch with CUDA.
        force: replace an existing profile.
    """

    bundle: Path
    output: Path | None = None
    runtime: str | None = None
    calls: int = 50
    cuda_graphs: bool | None = None
    timeline: bool = True
    force: bool = False

    @property
    def folder(self) -> Path:
        """Where the profile goes."""
        if self.output is not None:
            return self.output
        bundle = self.bundle if self.bundle.name not in ("", "..") else self.bundle.resolve()
        return bundle.with_name(f"{bundle.name}.profile")


@dataclasses.dataclass(frozen=True)
class _Measured:
    """One row of a profile."""

    graph: str
    feed: Feed
    timing: RequestTiming

    def to_dict(self) -> dict[str, Any]:
        feed = self.feed
        return {
            "graph": self.graph,
            "request": feed.name,
            "sequences": len(feed.lengths),
            "events": int(feed.lengths.sum()),
            "rows": rows_of(feed),
            **dataclasses.asdict(self.timing),
        }


def profile_bundle(request: ProfileRequest, progress: Progress) -> dict[str, Any]:
    """Measure, and write the folder.

    Args:
        request: what to measure.
        progress: called with (what, done, total).

    Returns:
        What profile.json holds.

    Raises:
        BundleError: HSTU-E801 if the folder exists, E802 if it cannot be written, E803 for a bundle that is damaged or
            has no stored requests.
        UsageError: HSTU-E901 for a bundle without engines, or a runtime that they are not of.
        EngineError: HSTU-E401 without a GPU, E404 if an engine cannot run, E406 if kernels cannot be traced.
    """
    _check_folder(request)
    files = read_bundle(request.bundle)
    _require_requests(files)
    runtime = _runtime_of(files, request.runtime)
    planned = _planned(files, runtime, request.cuda_graphs)
    report = _report_of(files)
    gpu = _require_gpu()
    tracer = kernel_timeline.start_tracer() if request.timeline else None
    trace = kernel_timeline.traced if request.timeline else None
    measured = [each.to_dict() for each in _measured(files, runtime, planned, request, trace, progress)]
    profile = {**_facts(files, request), "runtime": runtime, "gpu": gpu, "torch": tracer, "passes": measured}
    report = {**report, "timings": [*(report["timings"] or ()), *_timings(profile)], "profile": profile}
    with new_folder(request.folder, PROFILE_JSON, request.force) as folder:
        for name, content in ((REPORT_JSON, report), (PROFILE_JSON, profile)):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (folder / REPORT_HTML).write_text(render_report(report), encoding="utf-8")
    return profile


def stored_requests(files: BundleFiles, graph: Mapping[str, Any]) -> list[Feed]:
    """The typical stored request of a graph, and the one with the most rows unless it is the same.

    Args:
        files: a bundle that was built with verification.
        graph: its entry in the manifest.
    """
    stored = load_feeds(files.path / reference_files(graph["name"]).feeds)
    feeds = [Feed(name, arrays) for name, arrays in zip(graph["verification"]["feeds"], stored, strict=True)]
    typical, largest = feeds[min(_TYPICAL, len(feeds) - 1)], max(feeds, key=rows_of)
    return [typical] if largest is typical else [typical, largest]


def rows_of(feed: Feed) -> int:
    """Entries of the first axes of all inputs."""
    return sum(array.shape[0] for array in feed.arrays.values() if array.ndim)


def _check_folder(request: ProfileRequest) -> None:
    if request.folder.resolve().is_relative_to(request.bundle.resolve()):
        _refuse(f"{request.folder} is in the bundle", "a profile does not change the bundle", "choose another -o DIR")
    check_new_folder(request.folder, PROFILE_JSON, request.force)


def _require_requests(files: BundleFiles) -> None:
    if files.manifest["verification"] is None:
        raise BundleError(
            "HSTU-E803",
            f"{files.path} holds no requests",
            "it was built with --no-verify",
            "build it again without --no-verify",
        )


def _runtime_of(files: BundleFiles, wanted: str | None) -> str:
    """The runtime of every graph's engine."""
    backend = str(files.manifest["backend"]["name"])
    if backend not in _GPU_RUNTIMES:
        _refuse(
            f"{files.path} has no engine to profile",
            f"it was built with the backend {backend}",
            "build it again with --backend tensorrt or tensorrt-rtx",
        )
    if wanted not in (None, backend):
        _refuse(
            f"--runtime {wanted} has nothing to run",
            f"the bundle's engines are of the backend {backend}",
            "leave --runtime out, or build the bundle with that --backend",
        )
    if lacking := [
        graph["name"]
        for graph in files.manifest["graphs"]
        if graph["engine"] is None and files.fused_graph(graph["name"]) is None
    ]:
        _refuse(
            f"{files.path} has no engine of {', '.join(lacking)}",
            f"its engines are of the backend {backend}",
            "build the bundle again",
        )
    return backend


def _refuse(what: str, why: str, fix: str) -> NoReturn:
    raise UsageError("HSTU-E901", what, why, fix)


def _report_of(files: BundleFiles) -> dict[str, Any]:
    """The bundle's own report, which can be rendered."""
    try:
        report: dict[str, Any] = json.loads((files.path / REPORT_JSON).read_text(encoding="utf-8"))
        render_report(report)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            "HSTU-E803",
            f"{files.path / REPORT_JSON} cannot be rendered",
            f"{type(error).__name__}: {error}",
            "build the bundle again with this version",
        ) from error
    return report


def _require_gpu() -> str:
    name = gpu_name()
    if name is None:
        raise EngineError(
            "HSTU-E401",
            "no GPU can be profiled",
            "the CUDA driver is absent or shows no device to this process",
            "run on a machine with an NVIDIA GPU and driver; see `hstu-compile env`",
        )
    return name


def _planned(files: BundleFiles, runtime: str, cuda_graphs: bool | None) -> list[tuple[str, Way]]:
    """Graphs, and the ways in which each is measured."""
    planned: list[tuple[str, Way]] = []
    for graph in files.manifest["graphs"]:
        name = graph["name"]
        planned.append((name, "plain"))
        # TensorRT-RTX compiles kernels while it runs: a session of one engine records nothing.
        records = runtime != FUSED_BACKEND or files.fused_graph(name) is not None
        if cuda_graphs and not records:
            _refuse(
                f"the graph {name} cannot be replayed",
                f"sessions of one engine of {runtime} record no CUDA graphs",
                "leave --cuda-graphs out, or build the bundle with --attention fused",
            )
        if records if cuda_graphs is None else cuda_graphs:
            planned.append((name, "replayed"))
    return planned


def _measured(
    files: BundleFiles,
    runtime: str,
    planned: Sequence[tuple[str, Way]],
    request: ProfileRequest,
    trace: Tracer | None,
    progress: Progress,
) -> Iterator[_Measured]:
    """One session after the other, each closed before the next one is opened."""
    graphs = {graph["name"]: graph for graph in files.manifest["graphs"]}
    for done, (graph, way) in enumerate(planned):
        progress(f"{graph}, {way}", done, len(planned))
        with open_graph(files, graph, runtime, cuda_graphs=1 if way == "replayed" else 0) as session:
            for feed in stored_requests(files, graphs[graph]):
                yield _Measured(graph, feed, time_request(session, feed, way, request.calls, trace))
    progress("profile", len(planned), len(planned))


def _facts(files: BundleFiles, request: ProfileRequest) -> dict[str, Any]:
    """What was measured, when, and on which machine."""
    manifest = files.manifest
    environment = collect_environment()
    gpus = environment["gpus"]
    return {
        "schema": PROFILE_VERSION,
        "hstu_compile": hstu_compile.__version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "bundle": {
            "name": files.path.absolute().name,
            "status": manifest["status"],
            "precision": manifest["precision"]["requested"],
            "backend": manifest["backend"],
            "manifest_sha256": hashlib.sha256((files.path / MANIFEST).read_bytes()).hexdigest(),
        },
        "calls": request.calls,
        "warm_up_ms": WARM_UP_MS,
        # All GPUs of a machine have one driver.
        "driver": gpus[0]["driver_version"] if isinstance(gpus, list) and gpus else None,
        "environment": environment,
    }


def _timings(profile: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the report's section Timings."""
    return [
        {
            "name": f"{each['graph']}, {each['session']}, {each['request']}, {each['way']}",
            "batch": each["sequences"],
            "events": each["events"],
            "median_ms": each["latency"] and each["latency"]["median_ms"],
            "p90_ms": each["latency"] and each["latency"]["p90_ms"],
            "note": timing_note(each, profile["gpu"]),
        }
        for each in profile["passes"]
    ]
