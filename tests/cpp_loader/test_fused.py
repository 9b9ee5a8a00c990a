"""hstu_score on bundles in segments, on fakes of TensorRT-RTX, of the kernels' library and of CUDA."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import re
import subprocess
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_compile.artifacts import KernelCall, TensorSpec
from hstu_compile.op_schema import attention_contract, norm_contract, strided_inputs
from hstu_compile.plugin_library import KERNELS_LIBRARY
from hstu_compile.polygraphy_files import load_feeds
from hstu_compile.runtime._buffer_plan import Lifetime, planned_buffers
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime.attention_kernels import Launch, Shape
from hstu_compile.runtime.fused_session import FusedSession
from hstu_compile.runtime.schedule_file import schedule_from_text
from hstu_compile.tensorrt_api import TensorRtApi
from tests.cpp_loader import toolchain
from tests.cpp_loader.conftest import Loader
from tests.cpp_loader.fake_bundle import (
    MAX_BATCH,
    graphs_of,
    packed_answers,
    packed_feeds,
    read_manifest,
    retrieval_answers,
    retrieval_feeds,
    write_manifest,
)
from tests.cpp_loader.fake_fused import attentions_of, edit_schedule, main_width, write_fused_bundle
from tests.cpp_loader.program_facts import BUNDLE, ENGINE, QUICK, REQUEST, USAGE, stored
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import Arrays, FakeEngine, fake_tensorrt


@pytest.fixture
def retrieval(loader_rtx: Loader, tmp_path: Path) -> Path:
    return loader_rtx.bundle(tmp_path, "retrieval")


@pytest.fixture
def ranking(loader_rtx: Loader, tmp_path: Path) -> Path:
    return loader_rtx.bundle(tmp_path, "ranking")


@pytest.mark.parametrize("graphs", [0, 2, 16])
def test_a_bundle_in_segments_is_run_compared_and_measured(
    loader_rtx: Loader, retrieval: Path, tmp_path: Path, graphs: int
) -> None:
    (tmp_path / "out").mkdir()
    words = ["--cuda-graphs", graphs, "--iterations", 3, "--outputs", tmp_path / "out", "--csv", tmp_path / "rows.csv"]
    report = loader_rtx.report(retrieval, *words)
    assert (report["status"], report["backend"], report["kernels"]) == ("PASS", "TensorRT-RTX", KERNELS_LIBRARY)
    assert [row["passed"] for row in report["comparisons"]] == [True] * 4
    for index, feed in enumerate(load_feeds(retrieval / "feeds.json")):
        answer = stored(tmp_path / "out" / f"{index}.npz")["user_embeddings"]
        np.testing.assert_allclose(answer, retrieval_answers(feed)["user_embeddings"], rtol=0, atol=1e-5)
    counts = report["graphs"]
    assert [counts[name] > 0 for name in ("captures", "replays", "evictions")] == [graphs > 0, graphs > 0, graphs == 2]
    assert counts["failures"] == 0
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["backend"] for row in rows} == {"TensorRT-RTX " + ".".join(map(str, loader_rtx.version))}


@pytest.mark.parametrize("graph", ["packed", "prefill", "score"])
def test_each_graph_of_a_ranking_bundle_in_segments_runs(loader_rtx: Loader, ranking: Path, graph: str) -> None:
    report = loader_rtx.report(ranking, "--graph", graph, *QUICK)
    assert len(report["comparisons"]) == 3 * len(
        next(each for each in graphs_of("ranking") if each.name == graph).outputs
    )
    assert all(row["passed"] for row in report["comparisons"])
    assert report["graphs"]["replays"] > 0


def test_a_ranking_bundle_in_segments_scores_with_the_cache(loader_rtx: Loader, ranking: Path, tmp_path: Path) -> None:
    """Two streams over one set of engines, each with contexts, kernels and a plan of its own."""
    feeds = packed_feeds([(9, 5), (20, 3)], seed=4)
    np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    words = ["--ranking", "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out", *QUICK]
    report = loader_rtx.report(ranking, *words, "--streams", 2, "--soak", 100, "--max-growth-mib", 64)
    assert report["soak"]["different"] == 0
    assert report["cache"]["hits"] > report["cache"]["misses"] > 0
    assert report["graphs"]["replays"] > 0
    rows = {name: np.split(feeds[name], [9]) for name in ("movie", "time", "action")}
    asked = {name: np.split(feeds[name], [5]) for name in ("item", "query")}
    for user in range(2):
        alone = {name: parts[user] for name, parts in (rows | asked).items()}
        alone |= {"user": feeds["user"][2 * user : 2 * user + 2], "seq_offsets": np.array([0, len(alone["movie"])])}
        alone |= {"candidate_offsets": np.array([0, len(alone["item"])])}
        expected = packed_answers(alone)["logits"]
        np.testing.assert_allclose(stored(tmp_path / "out" / f"{user}.npz")["logits"], expected, rtol=0, atol=1e-5)


class _PlannedKernels:
    """`Kernels` that compute nothing and ask for the workspace that the fakes' library asks for."""

    name = "none"

    def prepare(self, call: KernelCall, tensors: Mapping[str, TensorSpec]) -> Any:
        def workspace_bytes(shapes: Mapping[str, Shape]) -> int:
            return 40 * shapes["q"][0] if call.operator == "HstuAttention" else 0

        def enqueue(launch: Launch, stream: int) -> None:
            return None

        return types.SimpleNamespace(workspace_bytes=workspace_bytes, enqueue=enqueue, close=lambda: None)


def _planned_session(bundle: Path) -> FusedSession:
    """Python's session over the bundle's schedule, on engines that compute nothing."""
    graph, cuda = graphs_of("retrieval")[0], FakeCuda()
    width, groups, kinds = main_width(graph), attentions_of(graph), {"int32": "INT32", "int64": "INT64"}
    inputs = {name: (kinds[dtype], least, most) for name, dtype, _, least, most in graph.inputs}
    engines: dict[bytes, FakeEngine] = {}
    for number in range(groups + 1):
        makes = f"wide_{number}" if number < groups else graph.outputs[0][0]
        columns = 4 * width if number < groups else width
        reads = inputs if number == 0 else {f"normed_{number - 1}": ("FLOAT", (1, width), (4096, width))}

        def infer(shapes: dict[str, Shape], made: str = makes, columns: int = columns) -> dict[str, Shape]:
            rows = shapes["seq_offsets"][0] - 1 if "seq_offsets" in shapes else next(iter(shapes.values()))[0]
            return {made: (rows, columns)}

        def compute(arrays: Arrays, infer: Callable[..., dict[str, Shape]] = infer) -> Arrays:
            return {n: np.zeros(s, np.float32) for n, s in infer({k: a.shape for k, a in arrays.items()}).items()}

        engines[f"segment {number}".encode()] = FakeEngine(reads, {makes: ("FLOAT", (-1, columns))}, infer, compute)
    api = TensorRtApi("tensorrt-rtx", fake_tensorrt(engines, cuda))  # type: ignore[arg-type]
    schedule = schedule_from_text((bundle / "model.schedule.json").read_text(), "model.schedule.json")
    return FusedSession(api, schedule, list(engines), _PlannedKernels(), CudaDriver(cuda))


def test_order_and_places_are_those_of_pythons_session(loader_rtx: Loader, retrieval: Path, tmp_path: Path) -> None:
    """Steps in the schedule's order, and every crossing tensor, view and workspace where Python's session puts it."""
    feeds = retrieval_feeds([4, 9, 40], seed=5)
    np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
    trace = tmp_path / "trace"
    words = ["--inputs", tmp_path / "in.npz", "--cuda-graphs", 0, *QUICK]
    loader_rtx.report(retrieval, *words, HSTU_FAKE_TRACE=trace)
    lines = [line.split("\t") for line in trace.read_text().splitlines()]
    with _planned_session(retrieval) as session:
        session.run(feeds)
        schedule, arena, launches = session._schedule, session._arena, session._launches
        scratch = session._scratch.address
        steps = [
            f"segment {step.index}" if step.kind == "segment" else f"kernel {schedule.calls[step.index].name}"
            for step in schedule.steps
        ]
        # Four rounds, each the whole schedule in its order.
        assert [line[0] for line in lines] == 4 * steps
        seen: dict[str, int] = {}
        for line in lines[: len(steps)]:
            places = {name: tuple(map(int, place.split("/"))) for name, place in (each.split("=") for each in line[1:])}
            call = next((each for each in schedule.calls if line[0] == f"kernel {each.name}"), None)
            if call is None:
                seen |= {name: place[0] for name, place in places.items() if name in arena.offsets}
                continue
            launch = launches[schedule.calls.index(call)]
            start = seen["wide_0"] - arena.offsets["wide_0"]
            for name, place in places.items():
                if name == "workspace":
                    assert place[0] - start == launch.workspace - scratch
                elif name == "out":
                    assert place[0] - start == launch.output.address - scratch
                elif call.inputs[name] in arena.offsets:
                    placed = launch.inputs[name]
                    assert (place[0] - start, place[1]) == (placed.address - scratch, placed.row_stride)
        start = seen["wide_0"] - arena.offsets["wide_0"]
        assert {name: address - start for name, address in seen.items()} == {n: arena.offsets[n] for n in seen}
        assert {"wide_0", "wide_1", "normed_0", "normed_1"} <= set(seen)
        # The plan shares places, or comparing them would show little.
        assert len(set(arena.offsets.values())) < len(arena.offsets) / 2


def test_plans_are_those_of_python(readers: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    plans, lines = [], []
    for _ in range(300):
        lives = []
        for name in range(draw.randrange(12)):
            first = draw.randrange(8)
            size = draw.choice([0, 1, 256, 257, 1000, draw.randrange(1 << 20), draw.randrange(1 << 40)])
            lives.append(Lifetime(str(name), size, first, draw.randrange(first, 8)))
        lines.append(" ".join(f"{each.nbytes} {each.first} {each.last}" for each in lives))
        plan = planned_buffers(lives)
        plans.append(" ".join(str(number) for number in (*(plan.offsets[each.name] for each in lives), plan.nbytes)))
    (tmp_path / "lives").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [readers, "buffer-plans", tmp_path / "lives"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == plans


def test_operators_are_those_of_the_contracts() -> None:
    """The loader has the few words of a contract that it needs, and no more."""
    text = (toolchain.SAMPLE / "include" / "hstu" / "schedule.hpp").read_text("utf-8")
    found = re.findall(r'\{"(\w+)", "(\d+)", "(\w+)", \{([^}]*)\}\}', text)
    wanted = [
        (contract.name, contract.version, contract.inputs[0].name, strided_inputs(contract.name))
        for contract in (attention_contract(), norm_contract())
    ]
    assert [(name, version, rows, tuple(re.findall(r"\w+", inputs))) for name, version, rows, inputs in found] == wanted


@pytest.mark.parametrize(
    ("variable", "captured"), [("HSTU_FAKE_SKIP_RECORDED", True), ("HSTU_FAKE_UNCAPTURABLE", False)]
)
def test_a_graph_that_is_not_the_pass_answers_nothing(
    loader_rtx: Loader, retrieval: Path, variable: str, captured: bool
) -> None:
    """A recorded kernel that does nothing leaves what an earlier pass wrote: that is no answer."""
    report = loader_rtx.report(retrieval, *QUICK, **{variable: 1})
    assert report["status"] == "PASS"
    assert (report["graphs"]["captures"] > 0) == captured
    assert (report["graphs"]["replays"], report["graphs"]["failures"] > 0) == (0, True)


def test_a_failed_recording_leaves_the_session_usable(loader_rtx: Loader, retrieval: Path) -> None:
    report = loader_rtx.report(retrieval, *QUICK, HSTU_FAKE_NO_CAPTURE=1)
    assert (report["status"], report["graphs"]["captures"], report["graphs"]["failures"] > 0) == ("PASS", 0, True)


def test_float32_engines_are_loaded_without_tf32_and_others_with(loader_rtx: Loader, tmp_path: Path) -> None:
    library = loader_rtx.folder / KERNELS_LIBRARY
    for precision in ("fp32", "fp16"):
        bundle = write_fused_bundle(tmp_path / precision, "retrieval", loader_rtx.version, library, precision)
        assert loader_rtx.report(bundle, *QUICK)["status"] == "PASS"
    manifest = read_manifest(tmp_path / "fp16")
    manifest["precision"]["requested"] = "fp32"
    write_manifest(tmp_path / "fp16", manifest)
    assert "NVIDIA_TF32_OVERRIDE" in loader_rtx.refusal(ENGINE, tmp_path / "fp16")


def test_the_kernels_library_is_checked(loader_rtx: Loader, retrieval: Path) -> None:
    library = retrieval / KERNELS_LIBRARY
    own = library.read_bytes()

    def replaced(content: bytes) -> None:
        # A new file: the old one may be mapped.
        library.unlink()
        library.write_bytes(content)

    replaced(own + b"\0")
    text = loader_rtx.refusal(BUNDLE, retrieval)
    assert f"{KERNELS_LIBRARY} has sha256" in text
    replaced(b"no library")
    write_manifest(retrieval, read_manifest(retrieval))
    assert "cannot be loaded" in loader_rtx.refusal(ENGINE, retrieval)
    replaced((loader_rtx.folder / "libcuda.so.1").read_bytes())
    write_manifest(retrieval, read_manifest(retrieval))
    assert "it has no function hstuAttentionKernelsApiVersion" in loader_rtx.refusal(ENGINE, retrieval)
    library.unlink()
    assert f"{KERNELS_LIBRARY} is missing" in loader_rtx.refusal(BUNDLE, retrieval)
    write_manifest(retrieval, read_manifest(retrieval))
    assert f"{KERNELS_LIBRARY} is not vouched for" in loader_rtx.refusal(BUNDLE, retrieval)
    library.write_bytes(own)
    write_manifest(retrieval, {**read_manifest(retrieval), "kernels": None})
    assert "the graph retrieval is in segments" in loader_rtx.refusal(BUNDLE, retrieval)


def test_another_version_of_the_kernels_interface_is_refused(loader_rtx: Loader, retrieval: Path) -> None:
    text = loader_rtx.refusal(ENGINE, retrieval, HSTU_FAKE_KERNELS_VERSION=99)
    assert "has version 99 of the kernels' interface" in text
    assert "this loader speaks version 2" in text


def test_a_gpu_without_kernels_is_refused_in_the_librarys_words(loader_rtx: Loader, retrieval: Path) -> None:
    text = loader_rtx.refusal(ENGINE, retrieval, HSTU_FAKE_NO_KERNEL=1)
    assert "the attention attention 0 could not run" in text
    assert "hstuAttentionCreate: no kernel of this library fits the device" in text


def test_a_gpu_without_memory_is_refused(loader_rtx: Loader, retrieval: Path) -> None:
    text = loader_rtx.refusal(ENGINE, retrieval, HSTU_FAKE_MEMORY_MIB=0)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in text


def test_requests_beyond_the_profile_of_any_segment_are_refused(
    loader_rtx: Loader, retrieval: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "in.npz", **retrieval_feeds([1] * (MAX_BATCH + 1), seed=1))  # type: ignore[arg-type]
    text = loader_rtx.refusal(REQUEST, retrieval, "--inputs", tmp_path / "in.npz")
    assert f"request_timestamps is [{MAX_BATCH + 1}], and the engine takes [1] to [{MAX_BATCH}]" in text


def test_a_bundle_is_refused_by_the_program_for_another_tensorrt(
    loader_rtx: Loader, loader10: Loader, retrieval: Path, tmp_path: Path
) -> None:
    """Before anything is loaded: neither a driver nor a TensorRT would help."""
    text = loader10.refusal(ENGINE, retrieval, HSTU_FAKE_NO_DEVICE=1)
    assert "its engines are for the backend tensorrt-rtx, in segments" in text
    assert "compile hstu_score with HSTU_TENSORRT_INCLUDE_DIR of TensorRT-RTX" in text
    plain = loader10.bundle(tmp_path / "plain", "retrieval")
    text = loader_rtx.refusal(ENGINE, plain, HSTU_FAKE_NO_DEVICE=1)
    assert (
        "its engines are for the backend tensorrt, and this program was compiled with headers of TensorRT-RTX 1" in text
    )
    assert "TensorRT-RTX takes no plugins" in loader_rtx.refusal(USAGE, retrieval, "--plugin", "any.so")
    other = loader_rtx.refusal(ENGINE, retrieval, HSTU_FAKE_TENSORRT_VERSION=10500)
    assert "and 1.5.0 is loaded" in other
    wrong = loader_rtx.refusal(ENGINE, retrieval, HSTU_FAKE_TENSORRT_VERSION=101401)
    assert "is TensorRT 10.14.1" in wrong


def test_segments_that_are_not_the_schedules_are_refused(loader_rtx: Loader, retrieval: Path) -> None:
    manifest = read_manifest(retrieval)
    fused = manifest["graphs"][0]["fused"]
    names = list(fused["engines"])
    fused["engines"] = names[:2]
    write_manifest(retrieval, manifest)
    assert "it has 3 segments, and the manifest names 2 engines" in loader_rtx.refusal(BUNDLE, retrieval)
    fused["engines"] = [names[0], names[2], names[1]]
    write_manifest(retrieval, manifest)
    assert "model.segment-2.engine reads normed_1, which is not there then" in loader_rtx.refusal(BUNDLE, retrieval)
    (retrieval / names[1]).unlink()
    assert f"{names[1]} is missing" in loader_rtx.refusal(BUNDLE, retrieval)


def _newer(content: dict[str, Any]) -> None:
    content["format_version"] += 1


def _other_operator(content: dict[str, Any]) -> None:
    content["operators"]["HstuNorm"] = "7"


def _view_beyond(content: dict[str, Any]) -> None:
    content["calls"][0]["views"]["v"]["column"] += 3 * main_width(graphs_of("retrieval")[0])


def _short_life(content: dict[str, Any]) -> None:
    next(each for each in content["crossing"] if each["name"] == "wide_0")["last"] = 1


def _unknown_tensor(content: dict[str, Any]) -> None:
    content["calls"][1]["inputs"]["x"] = "nowhere"


def _short_constant(content: dict[str, Any]) -> None:
    content["constants"]["half"]["data"] = content["constants"]["half"]["data"][:-4]


def _swapped_steps(content: dict[str, Any]) -> None:
    content["steps"][1], content["steps"][2] = content["steps"][2], content["steps"][1]


BAD_SCHEDULES: dict[str, Callable[[dict[str, Any]], None]] = {
    "this loader reads format": _newer,
    "this loader knows version 1": _other_operator,
    "as v, and wide_0 has rows of 24": _view_beyond,
    "in step 2, and it lives from step 0 to 1": _short_life,
    "reads nowhere, which there is not": _unknown_tensor,
    "the constant half has 21 bytes": _short_constant,
    "the kernel 1 runs where 0 is due": _swapped_steps,
    "it lacks 'steps'": lambda content: content.pop("steps"),
    "no step makes the output user_embeddings": lambda content: content["crossing"].pop(),
    "neither a segment nor a kernel": lambda content: content["steps"][0].update(kind="graph"),
}


@pytest.mark.parametrize("text", BAD_SCHEDULES)
def test_edited_schedules_are_refused(loader_rtx: Loader, retrieval: Path, text: str) -> None:
    edit_schedule(retrieval, BAD_SCHEDULES[text])
    assert text in loader_rtx.refusal(BUNDLE, retrieval)


def test_an_altered_schedule_is_refused_by_its_hash(loader_rtx: Loader, retrieval: Path) -> None:
    path = retrieval / "model.schedule.json"
    path.write_text(path.read_text() + " ")
    assert "model.schedule.json has sha256" in loader_rtx.refusal(BUNDLE, retrieval)


def test_a_bundle_in_segments_is_inspected_without_a_gpu(loader_rtx: Loader, retrieval: Path) -> None:
    done = loader_rtx.run(retrieval, "--inspect", fakes=False)
    assert "graph retrieval, schedule model.schedule.json of 3 engines with kernels between them" in done.stdout
    content = json.loads(loader_rtx.run(retrieval, "--inspect", "--json", fakes=False).stdout)
    assert content["graphs"][0]["segments"] == [f"model.segment-{number}.engine" for number in range(3)]


def test_the_real_library_is_started_and_its_words_are_shown(loader_rtx: Loader, retrieval: Path) -> None:
    """Without a GPU it loads no engine; what comes before that, its version and its log among it, is real."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or spec.origin is None:
        pytest.skip("the library of TensorRT-RTX is not installed")
    if "HSTU_TEST_TENSORRT_RTX_INCLUDE_DIR" not in os.environ:
        pytest.skip("HSTU_TEST_TENSORRT_RTX_INCLUDE_DIR does not name the real library's headers")
    library = Path(spec.origin).with_name(f"libtensorrt_rtx.so.{loader_rtx.version[0]}")
    text = loader_rtx.refusal(ENGINE, retrieval, "--tensorrt-library", library)
    assert f"TensorRT-RTX {'.'.join(map(str, loader_rtx.version))} cannot load model.segment-0.engine" in text
    assert "Why: [ERROR] IRuntime::deserializeCudaEngine" in text
