"""The end-to-end benchmark's own parts, without a GPU: cases, operations, references, baselines, rows, tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from hstu_compile.kernel_timeline import calls_of, device_events, timeline_rows
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from tests.fake_cuda import FakeCuda
from tests.fused_fakes import fused_session
from tests.kernel_traces import call_at, trace_of
from tests.segmented_cases import ranking_case, rounding_what_kernels_make
from tests.tolerances import RMS

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))

import bench_end_to_end as bench  # noqa: E402
import bench_plugin  # noqa: E402
import end_to_end_attention as attentions  # noqa: E402
import end_to_end_clock as clock  # noqa: E402
import end_to_end_engines as engines  # noqa: E402
import end_to_end_model as plain  # noqa: E402
import end_to_end_peers as peers  # noqa: E402
import end_to_end_reference as references  # noqa: E402
import end_to_end_rows as rows  # noqa: E402
import end_to_end_table as table  # noqa: E402
import end_to_end_timeline as timeline  # noqa: E402
import end_to_end_workload as work  # noqa: E402
from m_falcon_workload import DLRM_V3, TINY, state_dict  # noqa: E402

CPU = torch.device("cpu")
RAGGED = work.Case("ragged", "fp16", (40, 25, 33), 8)
CACHED = work.Case("cached_even", "fp16", (40, 40), 8, mode=work.CACHED)

Row = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> references.ReferenceModel:
    return references.ReferenceModel(TINY, CPU)


@pytest.fixture(scope="module")
def reference(model: references.ReferenceModel) -> references.Reference:
    return references.make_reference(RAGGED, model)


def logits_of(
    case: work.Case, dtype: torch.dtype, query: str | None, form: str = plain.JOINT, attend: Any = None
) -> np.ndarray[Any, Any]:
    """Of the baseline's model, attention by plain operators."""
    state = {key: torch.from_numpy(values) for key, values in state_dict(TINY).items()}
    compute = attentions.PlainProvider()
    attend = attend or (lambda *values: compute(*values[:-1]))
    built = plain.PlainModel(state, TINY, case, dtype, attentions.PLAIN, query, form, attend)
    features = {name: torch.from_numpy(values) for name, values in work.packed_arrays(case, TINY).items()}
    if case.mode == work.CACHED:
        keys = built.history_keys(features)
        features = {n: torch.from_numpy(values) for n, values in work.score_arrays(case, TINY).items()} | keys
    with torch.inference_mode():
        answer: np.ndarray[Any, Any] = built(features).double().numpy()
    return answer


# Cases and operations.


def test_every_row_of_the_issues_table_is_a_case_in_both_types_with_and_without_pruning() -> None:
    cases = {case.name: case for case in work.known_cases()}
    assert len(cases) == len(work.known_cases())
    shapes = ["B1_n1024_m256", "B1_n4096_m512", "B8_n2048_m256", "B16_n4096_m256", "B32_lognormal1024_m256"]
    wanted = [f"{dtype}_{shape}{end}" for dtype in ("bf16", "fp16") for shape in shapes for end in ("", "_pruned")]
    wanted += [f"{dtype}_cached_B{batch}_n4096_m256" for dtype in ("bf16", "fp16") for batch in (1, 8)]
    assert {case.name for case in work.all_cases()} == set(wanted)
    ragged = cases["bf16_B32_lognormal1024_m256"]
    assert ragged.batch == 32
    assert max(ragged.lengths) <= 8192
    assert np.mean(ragged.lengths) == pytest.approx(1024, rel=0.25)
    assert cases["bf16_cached_B8_n4096_m256"].bar == 2.0
    assert {case.bar for case in work.all_cases() if case.mode == work.PACKED} == {1.5}


def test_growing_cases_are_measured_only_where_they_are_named() -> None:
    assert not any("grow" in case.name for case in work.chosen_cases(["bf16_*"]))
    assert [case.batch for case in work.chosen_cases(["bf16_grow_B*_n2048_m256_pruned"])] == [4, 1, 2, 8, 16]
    grown = work.chosen_cases(["bf16_grow_*_layers*"])
    assert [work.FULL.of(case).num_layers for case in grown] == [1, 2, 3, 8]
    assert {work.FULL.of(case).num_layers for case in work.chosen_cases(["bf16_grow_B*"]) if case not in grown} == {5}
    with pytest.raises(ValueError, match="no case is named 'nothing'"):
        work.chosen_cases(["nothing"])


@pytest.mark.parametrize(
    "case",
    [RAGGED, dataclasses.replace(RAGGED, is_pruned=True), CACHED],
    ids=lambda case: case.name,
)
def test_operations_are_those_of_the_models_products_and_of_the_pairs_that_the_mask_lets_through(
    case: work.Case,
) -> None:
    state = {key: torch.from_numpy(values) for key, values in state_dict(TINY).items()}
    query = attentions.PLAIN if case.is_pruned or case.mode == work.CACHED else None

    def nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
        return q.new_zeros((q.shape[0], q.shape[1], v.shape[2]))

    built = plain.PlainModel(state, TINY, case, torch.float32, attentions.PLAIN, query, attend=nothing)
    features = {name: torch.from_numpy(values) for name, values in work.packed_arrays(case, TINY).items()}
    if case.mode == work.CACHED:
        keys = built.history_keys(features)
        features = {n: torch.from_numpy(values) for n, values in work.score_arrays(case, TINY).items()} | keys
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        built(features)
    pairs, candidate_pairs = 0.0, 0.0
    for length in case.lengths:
        history = work.CONTEXT + length
        # Half of the diagonal of the causal part is counted, as everywhere.
        pairs += history**2 / 2 + case.candidates * (history + 1)
        candidate_pairs += case.candidates * (history + 1)
    whole, last = (pairs, candidate_pairs if case.is_pruned else pairs)
    if case.mode == work.CACHED:
        whole = last = candidate_pairs
    per_pair = 2 * (TINY.attention_dim + TINY.linear_dim) * TINY.num_heads
    expected = counter.get_total_flops() + per_pair * (whole * (TINY.num_layers - 1) + last)
    assert work.case_flop(case, TINY) == expected


def test_operations_are_those_of_the_measured_stack_plus_preprocessing_and_head() -> None:
    """The stack alone is 31.5, 192, 553 and 2824 GFLOP."""
    cases = {case.name: case for case in work.all_cases(["bf16"])}
    for shape, stack in (("B1_n1024_m256", 31.5), ("B1_n4096_m512", 192), ("B16_n4096_m256", 2824)):
        assert stack < work.case_flop(cases[f"bf16_{shape}"]) / 1e9 < 1.1 * stack


def test_cases_fit_the_engines_and_the_model() -> None:
    for case in (*work.all_cases(), *work.growth_cases()):
        assert max(case.lengths) <= DLRM_V3.max_history
        assert case.candidates <= DLRM_V3.max_candidates
        sizes = {"L": case.num_events, "T": case.num_candidates, "B": case.batch, "B_plus_1": case.batch + 1}
        if case.mode == work.CACHED:
            sizes = {"T": case.num_candidates, "B": case.batch, "Lc": sum(work.CONTEXT + n for n in case.lengths)}
        for axis, size in sizes.items():
            assert engines.AXES[axis][0] <= size <= engines.AXES[axis][2], f"{case.name}: {axis} is {size}"


def test_users_differ_and_the_first_is_that_of_the_m_falcon_benchmark() -> None:
    first, second = CACHED.requests(TINY)
    assert not np.array_equal(first.history["item_id"], second.history["item_id"])
    from m_falcon_workload import request

    np.testing.assert_array_equal(first.history["item_id"], request(40, 8, TINY).history["item_id"])


# The baseline's model and its reference.


@pytest.mark.parametrize("form", plain.FORMS)
@pytest.mark.parametrize("query", [attentions.PLAIN, None], ids=["candidates ask", "all rows ask"])
@pytest.mark.parametrize("is_pruned", [False, True], ids=["whole", "pruned"])
def test_the_baseline_is_our_model(
    model: references.ReferenceModel, reference: references.Reference, form: str, query: str | None, is_pruned: bool
) -> None:
    case = dataclasses.replace(RAGGED, is_pruned=is_pruned)
    _, rms = reference.errors(logits_of(case, torch.float64, query, form))
    assert rms <= RMS["float32"]
    single = dataclasses.replace(case, lengths=(40,))
    _, rms = references.errors_of(logits_of(single, torch.float64, query, form), model.exact(single))
    assert rms <= RMS["float32"]


@pytest.mark.parametrize("form", plain.FORMS)
def test_the_cached_baseline_is_the_packed_model(model: references.ReferenceModel, form: str) -> None:
    exact = model.exact(dataclasses.replace(CACHED, mode=work.PACKED))
    _, rms = references.errors_of(logits_of(CACHED, torch.float64, attentions.PLAIN, form), exact)
    assert rms <= RMS["float32"]


def test_a_reference_rejects_what_it_must(reference: references.Reference, tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    reference.save(path)
    kept = references.Reference.load(path)
    right = logits_of(RAGGED, torch.float16, None)
    assert kept.judged(right)["status"] == "ok"
    swapped, missing, shifted = right.copy(), right.copy(), np.roll(right, 1)
    swapped[:16] = np.concatenate([right[8:16], right[:8]])
    missing[7] = np.nan
    for wrong in (np.zeros_like(right), 0.9 * right, swapped, missing, shifted, right[:-1]):
        assert kept.judged(wrong)["status"] == "wrong result"


@pytest.mark.parametrize("what", ["a tenth less", "candidates see each other", "another divisor"])
def test_a_wrong_attention_is_a_wrong_result(reference: references.Reference, what: str) -> None:
    compute = attentions.PlainProvider()

    def attend(*values: Any) -> torch.Tensor:
        q, k, v, q_offsets, k_offsets, targets, max_q, max_k, alpha, _ = values
        if what == "candidates see each other":
            targets = torch.zeros_like(targets)
        out = compute(q, k, v, q_offsets, k_offsets, targets, max_q, max_k, alpha)
        return 0.9 * out if what == "a tenth less" else out * max_k / 40 if what == "another divisor" else out

    assert reference.judged(logits_of(RAGGED, torch.float16, None, attend=attend))["status"] == "wrong result"


def test_a_reference_that_could_tell_no_error_is_refused(model: references.ReferenceModel) -> None:
    class Blind(references.ReferenceModel):
        def __init__(self) -> None:
            self._real = model

        def exact(self, case: work.Case) -> Any:
            return self._real.exact(case)

        def rounded(self, case: work.Case) -> Any:
            return np.zeros_like(self._real.exact(case))

    with pytest.raises(ValueError, match="can tell no error"):
        references.make_reference(RAGGED, Blind())


def test_the_faster_form_of_a_backend_counts_and_a_time_beats_none() -> None:
    slow, fast, wrong = {"status": "ok", "median_ms": 2.0}, {"status": "ok", "median_ms": 1.0}, {"status": "wrong"}
    assert peers.better(wrong, None)
    assert peers.better(slow, wrong)
    assert peers.better(fast, slow)
    assert not peers.better(slow, fast)
    assert not peers.better(wrong, slow)


def test_providers_are_ranked_without_those_that_offer_nothing() -> None:
    def call(name: str) -> torch.Tensor:
        if name == "refuses":
            raise attentions.NotOfferedError("no kernel")
        return torch.zeros(1)

    assert attentions.ranked_providers(call, ["first", "refuses", "second"]) == ["first", "second"]


def test_a_library_gets_every_argument_and_tells_refusals_from_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[attentions.PeerArguments] = []
    status = 0

    class Library:
        version = "a test"

        def __init__(self, path: Path) -> None:
            assert path == Path("libpeer.so")

        def forward(self, reference: Any) -> int:
            asked.append(reference._obj)
            return status

    monkeypatch.setattr(attentions, "PeerLibrary", Library)
    monkeypatch.setattr(attentions, "current_stream", lambda device: None)
    q, k = torch.zeros((4, 2, 32), dtype=torch.float16), torch.zeros((20, 2, 32), dtype=torch.float16)
    q_offsets, k_offsets = (torch.tensor(each, dtype=torch.int32) for each in ([0, 2, 4], [0, 12, 20]))
    targets = torch.tensor([2, 2], dtype=torch.int32)
    given = (q, k, k, q_offsets, k_offsets, targets, 2, 12, 0.25)
    provider = attentions.LibraryProvider(Path("libpeer.so"), offers_queries=True)
    out = provider(*given)
    (found,) = asked
    assert (found.version, found.element, found.is_dense, found.batch, found.num_heads, found.head_dim) == (
        1,
        1,
        0,
        2,
        2,
        32,
    )
    assert (found.total_q, found.total_k, found.max_q_len, found.max_k_len, found.scaling_seq_len) == (4, 20, 2, 12, 12)
    assert (found.alpha, found.q, found.out, found.bias) == (0.25, q.data_ptr(), out.data_ptr(), None)
    assert (found.q_offsets, found.k_offsets) == (q_offsets.data_ptr(), k_offsets.data_ptr())
    assert found.num_targets == targets.data_ptr()
    provider(k, k, k, k_offsets.clone(), k_offsets, targets, 12, 12, 0.25)
    assert asked[1].q_offsets == asked[1].k_offsets == k_offsets.data_ptr()
    status = attentions.NOT_OFFERED
    with pytest.raises(attentions.NotOfferedError, match="no kernel"):
        provider(*given)
    status = 700
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        provider(*given)
    with pytest.raises(attentions.NotOfferedError, match="queries and keys differ"):
        attentions.LibraryProvider(Path("libpeer.so"), offers_queries=False)(*given)


# Our sessions, on fakes of TensorRT-RTX and of CUDA.


class TimedCuda(FakeCuda):
    """Events: each remembers when it was recorded."""

    def __init__(self) -> None:
        super().__init__(2**24)
        self._events: dict[int, float] = {}
        self._now = 0.0

    def cuEventCreate(self, event: Any, flags: int) -> int:  # noqa: N802 - libcuda's name
        event._obj.value = 1000 + len(self._events)
        self._events[1000 + len(self._events)] = 0.0
        return 0

    def cuEventRecord(self, event: Any, stream: Any) -> int:  # noqa: N802 - libcuda's name
        self._now += 0.25
        self._events[event.value] = self._now
        return 0

    def cuEventElapsedTime(self, elapsed: Any, start: Any, end: Any) -> int:  # noqa: N802 - libcuda's name
        elapsed._obj.value = self._events[end.value] - self._events[start.value]
        return 0

    def cuEventDestroy_v2(self, event: Any) -> int:  # noqa: N802 - libcuda's name
        return 0


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FLUSH_BYTES", 4096), ("FEWEST", 3), ("MOST", 3)):
        monkeypatch.setattr(clock, name, value)


@pytest.fixture
def measured(short: None) -> Iterator[tuple[engines.Measured, TimedCuda]]:
    case, cuda = ranking_case("packed", "bf16"), TimedCuda()
    feeds = case.feeds[1]
    with OnnxRuntimeSession(rounding_what_kernels_make(case)) as whole:
        exact = whole.run(feeds)["logits"][:, 0].astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fused_session(case.cut, cuda, cuda_graphs=4) as session:
            answers = functools.partial(engines.answers_of, CACHED)
            found = engines.Measured(session, feeds, references.Reference(exact, 1e-4, 1e-4), answers)
            yield found, cuda
            found.close()
    assert not cuda.memory
    assert not cuda.executables


def test_sessions_are_checked_and_timed_with_and_without_a_graph(
    measured: tuple[engines.Measured, TimedCuda],
) -> None:
    found, _ = measured
    row = found.plain()
    assert row["status"] == "ok"
    assert row["median_ms"] == 0.25
    assert row["call_median_ms"] > 0
    assert found._session.graph_stats is not None
    assert found._session.graph_stats.captures == 0
    row = found.replays()
    assert row["status"] == "ok"
    assert row["median_ms"] == 0.25
    assert row["nodes"] > 1
    assert found._session.graph_stats.replays > 0


def test_a_wrong_answer_of_a_session_has_no_time(measured: tuple[engines.Measured, TimedCuda]) -> None:
    found, _ = measured
    found._reference = dataclasses.replace(found._reference, answers=found._reference.answers + 1.0)
    for row in (found.plain(), found.replays()):
        assert row["status"] == "wrong result"
        assert "median_ms" not in row


def test_a_pass_that_is_no_replay_has_no_time(
    measured: tuple[engines.Measured, TimedCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = measured
    monkeypatch.setattr(found._session, "_unrecordable", lambda: "this runtime compiles while it runs")
    row = found.replays()
    assert row["status"].startswith("error: the pass was no replay")
    assert "compiles while it runs" in row["status"]
    assert "median_ms" not in row


def test_each_case_has_its_graph_and_cases_of_one_graph_share_its_engines(tmp_path: Path) -> None:
    ours = engines.Engines(rows.RTX_FUSED, tmp_path / "bundles", tmp_path / "engines", None, None)
    cases = {case.name: case for case in work.all_cases()}
    found = {
        name: ours.target(cases[name]).relative_to(tmp_path / "engines" / rows.RTX_FUSED).as_posix()
        for name in ("bf16_B1_n1024_m256", "bf16_B8_n2048_m256_pruned", "fp16_cached_B1_n4096_m256")
    }
    assert list(found.values()) == [
        "end_to_end-bf16-unpruned/model.schedule.json",
        "end_to_end-bf16/model.schedule.json",
        "end_to_end-fp16/score.schedule.json",
    ]
    assert len({ours.target(case) for case in work.all_cases()}) == 6
    with pytest.raises(FileNotFoundError, match=r"model\.schedule\.json was not built"):
        ours.opened(cases["bf16_B1_n1024_m256"])


def test_tensorrt_8_has_no_bfloat16(tmp_path: Path) -> None:
    ours = engines.Engines(rows.TRT85, tmp_path, tmp_path, None, None)
    assert "bfloat16" in ours.why_not(work.Case("any", "bf16", (4,), 1))
    assert not ours.why_not(work.Case("any", "fp16", (4,), 1))


def test_engines_are_built_for_the_shapes_of_the_cases() -> None:
    axes: dict[str, list[str | int]] = {"item_id": ["L"], "candidate_offsets": ["B_plus_1"], "k_0": ["Lc", 4, 128]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in axes.items()]
    model = helper.make_model(helper.make_graph([], "graph", inputs, []))
    profile = engines.options_of(model, None).explicit_profile()
    assert profile is not None
    assert profile.max == {"item_id": (65_536,), "candidate_offsets": (33,), "k_0": (32_776, 4, 128)}
    assert profile.min["k_0"] == (1, 4, 128)
    assert engines.options_of(model, Path("plugin.so")).plugins == (Path("plugin.so"),)


def test_keys_and_values_come_back_as_sessions_take_them(tmp_path: Path) -> None:
    bits = np.array([[[0x3C00, 0x4000]]], np.int16)
    rows.save_keys(tmp_path / "keys.npz", {"k_0": bits})
    half = rows.load_keys(tmp_path / "keys.npz", CACHED)["k_0"]
    assert half.dtype == np.float16
    assert half.tolist() == [[[1.0, 2.0]]]
    brain = rows.load_keys(tmp_path / "keys.npz", dataclasses.replace(CACHED, dtype="bf16"))["k_0"]
    assert brain.dtype == np.uint16


# Rows.


def row_of(median: float, *, call: float = 0.0, p90: float | None = None, **facts: Any) -> Row:
    return {
        "status": "ok",
        "median_ms": median,
        "p90_ms": median if p90 is None else p90,
        "call_median_ms": call or median,
        **facts,
    }


def test_a_row_has_its_rates_and_the_line_that_repeats_it(tmp_path: Path) -> None:
    rows.write_part(tmp_path, RAGGED, "compile_graph", row_of(2.0), TINY)
    row = json.loads((tmp_path / "fp16_ragged-compile_graph.json").read_text())
    assert set(row) <= set(rows.COLUMNS)
    assert row["command"] == "bench_end_to_end.py --parts DIR --cases fp16_ragged --backends compile"
    assert row["tokens"] == 40 + 25 + 33 + 3 * 8 + 3
    assert row["candidates_per_s"] == 1e3 * 24 / 2.0
    assert row["tflops"] == pytest.approx(work.case_flop(RAGGED, TINY) / 2e-3 / 1e12)
    assert row["ceiling_share"] == pytest.approx(row["tflops"] / 786)


def test_parts_replace_rows_of_their_case_and_backend_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [RAGGED, dataclasses.replace(RAGGED, is_pruned=True)]
    target = tmp_path / "rows.csv"
    for case in reversed(cases):
        for backend in ("ours_rtx_fused_graph", "eager"):
            rows.write_part(tmp_path, case, backend, row_of(3.0), TINY)
    assert rows.merge(tmp_path, target, cases) == 0
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    rows.write_part(fresh, cases[1], "eager", row_of(1.0), TINY)
    assert rows.merge(fresh, target, cases) == 0
    found = bench_plugin.read_rows(target)
    assert [(row["case"], row["backend"], row["median_ms"]) for row in found] == [
        ("fp16_ragged", "eager", "3"),
        ("fp16_ragged", "ours_rtx_fused_graph", "3"),
        ("fp16_ragged_pruned", "eager", "1"),
        ("fp16_ragged_pruned", "ours_rtx_fused_graph", "3"),
    ]
    assert rows.merge(fresh, target, cases[:1]) == 1
    assert "no case is named fp16_ragged_pruned" in capsys.readouterr().err
    assert rows.merge(tmp_path / "nothing", target, cases) == 1


def arguments_of(tmp_path: Path, *options: str) -> Any:
    given = ["--parts", str(tmp_path / "parts"), "--scratch", str(tmp_path / "scratch"), "--tiny", *options]
    parsed = bench.parser_of().parse_args(given)
    parsed.parts.mkdir(exist_ok=True)
    return parsed


def test_a_worker_that_dies_costs_the_case_that_it_had_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(tmp_path, "--backends", "eager", "--budget", "60")
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys\n"
        f"sys.path[:0] = [{str(REPOSITORY / 'tests' / 'bench')!r}, {str(REPOSITORY)!r}]\n"
        "from pathlib import Path\n"
        "import bench_end_to_end as bench, end_to_end_rows as rows, end_to_end_workload as work\n"
        f"parts = Path({str(arguments.parts)!r})\n"
        "cases = {case.name: case for case in bench.tiny_cases()}\n"
        "for name in json.loads((parts / bench.PLAN).read_text()):\n"
        "    bench.note(parts, name)\n"
        "    if name == 'bf16_tiny_B3_m8_pruned':\n"
        "        sys.exit('an illegal access')\n"
        "    for backend in rows.backends_of('eager'):\n"
        "        row = {'status': 'ok', 'median_ms': 1.0}\n"
        "        rows.write_part(parts, cases[name], backend, row, work.SMALL.of(cases[name]))\n"
    )
    monkeypatch.setattr(bench, "command_for", lambda *_: [sys.executable, str(script)])
    assert bench.measure(arguments) == 0
    statuses = {row["case"]: row["status"] for row in rows.rows_below(arguments.parts) if row["backend"] == "eager"}
    assert len(statuses) == len(list(bench.tiny_cases()))
    assert statuses.pop("bf16_tiny_B3_m8_pruned").endswith("an illegal access")
    assert set(statuses.values()) == {"ok"}


def test_a_worker_that_cannot_start_and_a_budget_that_is_spent_leave_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_of(tmp_path, "--backends", "compile", "--budget", "60")
    monkeypatch.setattr(bench, "command_for", lambda *_: [sys.executable, "-c", "raise SystemExit('no GPU')"])
    bench.measure(arguments)
    found = list(rows.rows_below(arguments.parts))
    assert len(found) == 2 * len(list(bench.tiny_cases()))
    assert all(row["status"].endswith("no GPU") for row in found)
    arguments.budget = -1.0
    bench.measure(arguments)
    assert {row["status"] for row in rows.rows_below(arguments.parts)} == {"not run: the time budget was used up"}


def test_a_case_that_could_not_be_planned_is_not_planned_again(tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, "--backends", "reference")
    cases = bench.cases_of(arguments)
    assert bench.unfinished(arguments, cases, rows.REFERENCE) == cases
    bench.give_up(arguments, cases[0], rows.REFERENCE, "error: out of luck")
    assert bench.unfinished(arguments, cases, rows.REFERENCE) == cases[1:]
    with pytest.raises(RuntimeError, match="out of luck"):
        peers.Plan.load(rows.plan_path(arguments.parts, cases[0]))


def test_the_gpu_step_names_families_that_there_are() -> None:
    script = (REPOSITORY / "tests" / "gpu" / "job.sh").read_text(encoding="utf-8")
    (families,) = re.findall(r"END_TO_END_FAMILIES:-([a-z0-9_ ]+)\}", script)
    assert set(families.split()) <= {rows.REFERENCE, *rows.FAMILIES}
    assert families.split()[0] == rows.REFERENCE
    assert families.split()[-1] == rows.MAX_AUTOTUNE


@pytest.mark.slow
def test_the_whole_program_runs_on_a_cpu(tmp_path: Path) -> None:
    program = [sys.executable, str(REPOSITORY / "tests" / "bench" / "bench_end_to_end.py"), "--tiny"]
    program += ["--parts", str(tmp_path / "parts"), "--scratch", str(tmp_path / "scratch")]
    names = ["fp16_tiny_B1_n40_m8_pruned", "fp16_cached_tiny_B2_n40_m8", "fp16_retrieval_tiny_B3_pruned"]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "PYTHONPATH": str(REPOSITORY)}
    families = [rows.REFERENCE, rows.EAGER, rows.COMPILE, rows.AOTI]
    subprocess.run(
        [*program, "--cases", *names, "--backends", *families, "--budget", "900", "--step-seconds", "300"],
        check=True,
        env=os.environ | cache,
    )
    found = {(row["case"], row["backend"]): row["status"] for row in rows.rows_below(tmp_path / "parts")}
    for name in names:
        for family in families[1:]:
            assert found[name, family] == "ok"
            assert found[name, family + rows.GRAPH].startswith("not offered")


# Timelines.


def test_a_backends_timeline_replaces_its_own_rows(tmp_path: Path) -> None:
    calls = calls_of(device_events(trace_of(call_at(0.0), call_at(100_000.0))))
    for _ in range(2):
        for backend in ("eager_graph", "ours_rtx_fused_graph"):
            timeline.save_timeline(tmp_path, "a_case", backend, list(timeline_rows(calls)))
    found = bench_plugin.read_rows(timeline.timeline_path(tmp_path, "a_case"))
    assert len(found) == 10
    lines = list(timeline.timeline_lines(found, longest=1))
    assert lines[2].startswith("| eager_graph | 4 | 20.0 (43%) | 20.0 (43%) | 0.0 (0%) | 6.0 (13%) | 4.0 (9%) | 46.0 |")
    assert sum("`nvjet_hsh_128x256`" in line for line in lines) == 2
    assert not any("triton_poi" in line for line in lines)


# Tables.


def synthetic_rows() -> list[Row]:
    facts = {"gpu": "a GPU", "gflop": "30", "ceiling_share": "0.5", "date": "2026-11-22"}
    times = {
        ("bf16_B1_n1024_m256", "compile_graph"): 0.30,
        ("bf16_B1_n1024_m256", "eager"): 1.5,
        ("bf16_B1_n1024_m256", "ours_rtx_fused_graph"): 0.20,
        ("bf16_B1_n1024_m256_pruned", "compile_graph"): 0.27,
        ("bf16_B1_n1024_m256_pruned", "ours_rtx_fused_graph"): 0.15,
        ("bf16_B1_n4096_m512_pruned", "aoti_graph"): 0.60,
        ("bf16_B1_n4096_m512_pruned", "ours_rtx_fused_graph"): 0.50,
        ("bf16_cached_B1_n4096_m256", "compile_graph"): 0.40,
        ("bf16_cached_B1_n4096_m256", "ours_rtx_fused_graph"): 0.10,
        ("bf16_grow_B4_n2048_m256_pruned", "compile_graph"): 1.0,
        ("bf16_grow_B4_n4096_m256_pruned", "compile_graph"): 3.0,
        ("bf16_grow_B4_n2048_m512_pruned", "compile_graph"): 1.5,
        ("bf16_grow_B4_n2048_m256_layers8_pruned", "compile_graph"): 1.6,
        ("bf16_retrieval_B8_n200", "compile_graph"): 0.80,
        ("bf16_retrieval_B8_n200_pruned", "compile_graph"): 0.75,
        ("bf16_retrieval_B8_n200_pruned", "ours_rtx_fused_graph"): 0.50,
    }
    found = [{"case": case, "backend": backend, **facts, **row_of(time)} for (case, backend), time in times.items()]
    noisy = row_of(0.01, p90=0.02)
    found.append({"case": "bf16_B1_n4096_m512_pruned", "backend": "compile", **facts, **noisy})
    problem = {"status": "not offered: TensorRT 8.5 has no bfloat16"}
    found += [
        {"case": case, "backend": "ours_trt85_plugin", **facts, **problem}
        for case in ("bf16_B1_n1024_m256", "bf16_B1_n1024_m256_pruned")
    ]
    return found


def test_ratios_are_over_the_fastest_baseline_with_and_without_pruning() -> None:
    cases = table.rows_by_case(synthetic_rows())
    lines = list(table.summary_lines(cases, work.all_cases(["bf16"])))
    assert len(lines) == 5
    assert lines[2] == (
        "| bf16_B1_n1024_m256 | 1,281 | 0.300 compile_graph | 0.270 compile_graph | 0.200 | 0.150 | "
        "1.50 | 2.00 | 1.80 | 50% | 1.5: met |"
    )
    # A row that varies by more than 5 % is no baseline.
    assert "| 0.600 aoti_graph |" in lines[3]
    assert lines[3].endswith("| 1.20 | 50% | 1.5: missed: 1.20 of 1.5 |")
    assert lines[4].endswith("| 4.00 | 50% | 2: met |")
    assert not list(table.summary_lines(cases, work.all_cases(["fp16"])))


def test_what_was_not_measured_meets_no_bar() -> None:
    case = next(work.all_cases(["fp16"]))
    assert table.verdict(case, {}) == "not all measured"
    found = {case.name: {"compile": row_of(1.0), table.BEST: {"status": "wrong result"}}}
    assert table.verdict(case, found) == "ours: wrong result"
    found = {case.name: {"compile": row_of(1.0), table.BEST: row_of(0.5, p90=0.6)}}
    assert table.verdict(case, found) == "ours varies by 20%"


def test_tables_and_plots_are_made_of_the_csv_and_the_timelines(tmp_path: Path) -> None:
    source, document, drawing = tmp_path / "rows.csv", tmp_path / "page.md", tmp_path / "plot.svg"
    bench_plugin.write_rows(source, rows.COLUMNS, synthetic_rows())
    calls = calls_of(device_events(trace_of(call_at(0.0), call_at(100_000.0))))
    timeline.save_timeline(tmp_path, "bf16_B1_n1024_m256", "eager_graph", list(timeline_rows(calls)))
    document.write_text(f"before\n{table.BEGIN}\noutdated rows\n{table.END}\nafter\n")
    assert table.main(["--csv", str(source), "--into", str(document), "--svg", str(drawing)]) == 0
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "outdated rows" not in text
    assert "0.150 (0.150)" in text
    assert "- ours_trt85_plugin, 2 cases, bf16_B1_n1024_m256 to bf16_B1_n1024_m256_pruned: not offered" in text
    assert "Kernels of bf16_B1_n1024_m256, warm L2 cache" in text
    # No speed is asked of retrieval.
    cells = ["1,600", "0.800 compile_graph", "0.750 compile_graph", "-", "0.500", "", "1.60", "1.50", "50%"]
    assert "| " + " | ".join(["bf16_retrieval_B8_n200", *cells]) + " |" in text.splitlines()
    assert "16 layers, 131,262 items" in text
    svg = drawing.read_text()
    assert svg.count("<polyline") == 3
    assert "events n" in svg
    assert "candidates m" in svg
    assert "layers" in svg
    assert "users B" not in svg


def test_without_rows_there_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(["--csv", str(tmp_path / "none.csv")]) == 1
    assert "measure first" in capsys.readouterr().err
    assert bench.main([]) == 0
    assert "stays as it is" in capsys.readouterr().out
