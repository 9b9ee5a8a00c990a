"""The M-FALCON benchmark's own parts, without a GPU: its model, its references, its peers on PyTorch kernels."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.artifacts import TensorSpec
from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.model.ranking import RankingModel
from hstu_compile.runtime._feeds import matched_feeds
from hstu_compile.runtime.graph_cache import GraphStats
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.runtime.ranking_spec import ContextualFeature, IdFeature, RankingSpec
from hstu_compile.runtime.resident import HostPool
from hstu_compile.served import ServedGraph, served_graphs
from tests.tolerances import RMS

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))

import bench_m_falcon  # noqa: E402
import device_timing  # noqa: E402
import m_falcon_meta as meta_peer  # noqa: E402
import m_falcon_peers as peers  # noqa: E402
import m_falcon_prepare as prepare  # noqa: E402
import m_falcon_rows as rows  # noqa: E402
import m_falcon_table as table  # noqa: E402
import m_falcon_workload as work  # noqa: E402
from m_falcon_eager import EagerModel  # noqa: E402

CPU = torch.device("cpu")
#: Where a checkout of Meta's generative-recommenders is; its smoke tests need it.
META_REPO = "HSTU_META_REPO"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(values) for key, values in work.state_dict(work.TINY).items()}


@pytest.fixture(scope="module")
def reference(state: dict[str, torch.Tensor]) -> rows.Reference:
    return peers.make_reference(150, (1, 5, 64), work.TINY, state, CPU, torch.float16)


class TorchGraph:
    """One of the eager model's served graphs behind the session protocol, in host memory."""

    graph_stats = None

    def __init__(self, graph: ServedGraph) -> None:
        self._graph, self.name = graph, graph.name
        names = {np.dtype("int32"): "int32", np.dtype("int64"): "int64", np.dtype("float32"): "float32"}
        self.inputs = tuple(
            TensorSpec(each.name, names[each.example.numpy().dtype], tuple("?" * each.example.dim()))
            for each in graph.inputs
        )

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        values = self._graph.run(matched_feeds(feeds, self.inputs))
        return {name: values[name] for name in self._graph.outputs}

    def run_resident(
        self, feeds: dict[str, Any], outputs: dict[str, Any], *, before: Any = (), after: Any = ()
    ) -> dict[str, Any]:
        for source, target in before:
            np.copyto(target.array, source.array, casting="no")
        results = self.run({name: getattr(value, "array", value) for name, value in feeds.items()})
        for name, target in outputs.items():
            np.copyto(target.array, results.pop(name), casting="no")
        for source, target in after:
            np.copyto(target.array, source.array, casting="no")
        return results

    def memory_pool(self, capacity_bytes: int) -> HostPool:
        return HostPool(capacity_bytes)

    def most_rows(self, name: str) -> None:
        """There are no profiles."""

    def close(self) -> None:
        """Nothing is held."""


def eager(state: dict[str, torch.Tensor], dtype: torch.dtype, last_bucket: int = peers.LAST_BUCKET) -> EagerModel:
    return EagerModel(state, work.TINY, CPU, dtype, last_bucket)


def test_weights_and_requests_are_the_same_bits_on_every_machine() -> None:
    tensor = work.state_dict(work.TINY)["_hstu_transducer._stu_module._stu_layers.0._uvqk_weight"]
    assert zlib.crc32(tensor.tobytes()) == 1263809185
    times = work.request(150, 5, work.TINY).history["action_timestamp"]
    assert zlib.crc32(times.tobytes()) == 2681367168


def test_half_types_hold_every_parameter_exactly() -> None:
    for key, values in work.state_dict(work.TINY).items():
        tensor = torch.from_numpy(values)
        if key.endswith("_period_units") or not tensor.is_floating_point():
            continue
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(tensor.to(dtype).float(), tensor), key


def test_requests_fit_the_engines_and_share_their_beginnings() -> None:
    whole = work.request(150, 64, work.TINY)
    times = whole.history["action_timestamp"]
    assert (np.diff(times) >= 0).all()
    assert times[-1] < work.QUERY_TIME < 2**31
    few = work.request(150, 5, work.TINY)
    for name, values in few.candidates.items():
        np.testing.assert_array_equal(values, whole.candidates[name][:5])
    for name, values in few.history.items():
        np.testing.assert_array_equal(values, whole.history[name])


@pytest.mark.parametrize("shape", [(150, 7), (3, 2), (40, 1)])
def test_plain_pytorch_is_the_model_that_the_engines_are_built_from(
    state: dict[str, torch.Tensor], shape: tuple[int, int], tmp_path: Path
) -> None:
    prepare.save_checkpoint(tmp_path, work.TINY)
    spec = spec_from_checkpoint(tmp_path / "ckpt.pt", config_from_file(tmp_path / "config.json"))
    ours = model_from_spec(spec, torch.float64)
    assert isinstance(ours, RankingModel)
    request = work.request(*shape, work.TINY)
    features = {name: torch.from_numpy(values) for name, values in request.features.items()}
    with torch.inference_mode():
        expected = ours.packed(features).logits[:, 0]
        model = eager(state, torch.float64)
        actual = model.packed(model.upload(request))
    assert float((actual - expected).abs().max() / expected.square().mean().sqrt()) <= RMS["float32"]


def test_a_reference_rejects_what_it_must(reference: rows.Reference) -> None:
    case = rows.Case("torch_eager", rows.PACKED, 150, 64)
    logits = reference.logits[64]
    swapped = logits.copy()
    swapped[[3, 40]] = swapped[[40, 3]]
    not_finite = logits.copy()
    not_finite[7] = np.nan
    wrong = {
        "zeros": np.zeros_like(logits),
        "scaled": 0.9 * logits,
        "swapped": swapped,
        "not finite": not_finite,
        "shorter": logits[:-1],
        "another request's": np.roll(logits, 1),
    }
    for name, values in wrong.items():
        assert reference.judged(case, values)["status"] == "wrong result", name
    assert "status" not in reference.judged(case, logits)
    assert 0 < reference.bound <= rows.LARGEST_ERROR


def test_a_wrong_history_or_divisor_is_seen_in_the_logits(
    state: dict[str, torch.Tensor], reference: rows.Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, exact = work.request(150, 64, work.TINY), eager(state, torch.float32)
    case = rows.Case("torch_eager", rows.PACKED, 150, 64)
    reversed_items = {**request.history, "item_id": request.history["item_id"][::-1].copy()}
    changed = dataclasses.replace(request, history=reversed_items)
    with torch.inference_mode():
        assert "status" in reference.judged(case, exact.packed(exact.upload(changed)).numpy())
        attention = EagerModel._attention
        for spoil in (
            lambda self, q, k, v, count: 0.9 * attention(self, q, k, v, count),
            lambda self, q, k, v, count: attention(self, q, k, v, 0),
        ):
            monkeypatch.setattr(EagerModel, "_attention", spoil)
            assert "status" in reference.judged(case, exact.packed(exact.upload(request)).numpy())


def test_a_reference_comes_back_from_its_file(reference: rows.Reference, tmp_path: Path) -> None:
    path = rows.reference_path(tmp_path, 150, "fp16")
    reference.save(path)
    loaded = rows.Reference.load(path)
    assert (loaded.spread, loaded.bound) == (reference.spread, reference.bound)
    np.testing.assert_array_equal(loaded.alone, reference.alone)
    assert loaded.logits.keys() == reference.logits.keys()
    # Alone, the divisor is another: the references must not be confused.
    assert reference.error(loaded.alone[:5], loaded.logits[5]) > 0


def test_every_mode_of_a_backend_has_its_cases() -> None:
    assert len(list(rows.cases_of("torch_eager"))) == 3 * 5 * 2
    ours = list(rows.cases_of(rows.ENGINES))
    assert len(ours) == 3 * (5 + 5 + 2 * (1 + 1 + 2 + 3 + 4))
    assert len({case.part_name for case in ours}) == len(ours)


def test_one_at_a_time_says_where_it_was_extrapolated() -> None:
    timing = {"median_ms": 8.0, "call_p90_ms": 16.0, "repeats": 20}
    few, many = (rows.Case("torch_eager", rows.ALONE, 1024, m) for m in (1, 1024))
    assert rows.extrapolated(few, timing) == timing
    scaled = rows.extrapolated(many, timing)
    assert (scaled["median_ms"], scaled["call_p90_ms"], scaled["repeats"]) == (1024.0, 2048.0, 20)
    assert scaled["note"].startswith("extrapolated: 8 forwards")
    assert rows.finished(many, timing)["candidates_per_s"] == 1000.0
    assert many.measured == dataclasses.replace(many, m=8)
    assert rows.finished(many.measured, timing) == timing | {"candidates_per_s": 1000.0}


@pytest.mark.parametrize("mode", [rows.PACKED, rows.COLD, rows.WARM])
def test_what_was_measured_whole_is_not_multiplied(mode: str) -> None:
    case = rows.Case(rows.ENGINES, mode, 1024, 1024, 0 if mode == rows.PACKED else 256)
    timing = {"median_ms": 8.0, "p90_ms": 9.0, "call_median_ms": 16.0, "call_p90_ms": 17.0}
    assert case.measured == case
    rates = {"candidates_per_s": 128_000.0, "call_candidates_per_s": 64_000.0}
    assert rows.finished(case, timing) == timing | rates


def test_the_most_telling_requests_come_first_and_compilers_last() -> None:
    backends = peers.GROUPS[-1]
    cases = peers.ordered(backends, work.HISTORY_LENGTHS, work.CANDIDATE_COUNTS)
    assert sorted(cases) == sorted(case for backend in backends for case in rows.cases_of(backend))
    quick = [case for case in cases if case.backend != peers.COMPILED]
    assert cases[: len(quick)] == quick
    for part in (quick, cases[len(quick) :]):
        assert [*dict.fromkeys((case.n, case.m) for case in part)][:3] == [(4096, 256), (4096, 1024), (4096, 1)]
    assert cases[len(quick)].mode == rows.PACKED
    assert [case.backend for case in quick[:4:2]] == ["meta_triton", "meta_triton_graph"]
    ours = list(rows.cases_of(rows.ENGINES))
    assert {(case.n, case.m) for case in ours[:6]} == {(4096, 256)}
    assert {name for group in peers.GROUPS for name in group} == {peers.REFERENCE, *rows.PEERS}


def test_merging_keeps_rows_and_the_table_has_the_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "gpu_name", lambda: "G")
    parts, target = tmp_path / "parts", tmp_path / "m_falcon.csv"
    parts.mkdir()
    times = {
        rows.Case("meta_triton", rows.PACKED, 4096, 256): 8.0,
        rows.Case(rows.ENGINES, rows.ALONE, 4096, 256): 512.0,
        rows.Case(rows.ENGINES, rows.PACKED, 4096, 256): 4.0,
        rows.Case(rows.ENGINES, rows.WARM, 4096, 256, 256): 1.0,
        rows.Case(rows.ENGINES, rows.WARM, 4096, 256, 64): 2.0,
        rows.Case(rows.NO_GRAPH, rows.WARM, 4096, 256, 256): 3.0,
    }
    for case, median in times.items():
        row = {"dtype": "fp16", "median_ms": median, "call_median_ms": 2 * median, "used_mib": 100.0, "max_err": 1e-3}
        row |= {"candidates_per_s": 1e3 * case.m / median}
        rows.write_part(parts, case, row, "command")
    assert rows.merge(parts, target) == 0
    again = rows.Case("meta_triton", rows.PACKED, 4096, 256)
    rows.write_part(parts, again, {"status": "error: gone", "dtype": "fp16"}, "command")
    for path in parts.glob("hstu*"):
        path.unlink()
    other = tmp_path / "bf16"
    other.mkdir()
    rows.write_part(other, again, {"dtype": "bf16", "median_ms": 16.0}, "command")
    assert rows.merge(parts, target) == 0
    assert rows.merge(other, target) == 0
    with target.open() as file:
        merged = {(row["backend"], row["mode"], row["micro_batch"], row["dtype"]): row for row in csv.DictReader(file)}
    assert len(merged) == len(times) + 1
    assert merged["meta_triton", "packed", "0", "fp16"]["status"] == "error: gone"
    assert merged["hstu_compile", "cached_warm", "256", "fp16"]["candidates_per_s"] == "2.56e+05"
    text = table.table_text(list(merged.values()))
    ours = "| 4096 | 256 | 512.0 | 4.000 (8.000) | - | 1.000 b=256 (2.000) | - | 3.000 b=256 (6.000) | 128.0x | 4.0x |"
    assert f"{ours} 16.000 meta_triton bf16 | 4.0x | 16.0x |" in text
    assert "- meta_triton packed, n=4096 m=256: error: gone" in text
    drawn = table.plot(list(merged.values()))
    assert drawn.startswith("<svg")
    assert drawn.count("<polyline") >= 1


def test_a_line_without_graphs_says_so_and_its_ratios_are_without_too() -> None:
    def row(mode: str, m: int, median: float, backend: str = rows.NO_GRAPH) -> dict[str, str]:
        values = {
            "n": "1024",
            "m": str(m),
            "micro_batch": "0",
            "status": "ok",
            "median_ms": str(median),
            "dtype": "fp16",
        }
        return {"backend": backend, "mode": mode, **values}

    measured = [row(rows.PACKED, 64, 6.0), row(rows.WARM, 64, 2.0), row(rows.WARM, 64, 1.0, rows.ENGINES)]
    line = next(line for line in table.table_lines(measured) if line.startswith("| 1024"))
    assert line.startswith("| 1024 (no graph) | 64 | - | 6.000 | - | 2.000 | 6.000 | 2.000 |")
    assert "| 3.0x |" in line
    with_graphs = [*measured, row(rows.PACKED, 64, 4.0, rows.ENGINES)]
    line = next(line for line in table.table_lines(with_graphs) if line.startswith("| 1024"))
    assert line.startswith("| 1024 | 64 | - | 4.000 | - | 1.000 | 6.000 | 2.000 |")
    assert "| 4.0x |" in line


def test_merging_nothing_leaves_the_csv_alone(tmp_path: Path) -> None:
    target = tmp_path / "m_falcon.csv"
    target.write_text("untouched")
    assert rows.merge(tmp_path, target) == 1
    assert target.read_text() == "untouched"


def test_the_scripts_measure_nothing_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main([]) == 0
    assert bench_m_falcon.main([]) == 0
    assert capsys.readouterr().out.count("nothing was run") == 2


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TorchGraph]:
    folder = tmp_path_factory.mktemp("checkpoint")
    prepare.save_checkpoint(folder, work.TINY)
    checkpoint = spec_from_checkpoint(folder / "ckpt.pt", config_from_file(folder / "config.json"))
    return {graph.name: TorchGraph(graph) for graph in served_graphs(model_from_spec(checkpoint), micro_batch=64)}


def ranking_spec(micro_batch: int) -> RankingSpec:
    sizes = work.TINY
    return RankingSpec(
        history_ids=(IdFeature("item_id", sizes.num_items), IdFeature("item_category_id", sizes.num_categories)),
        history_time="action_timestamp",
        history_action="item_weights",
        contextual=(ContextualFeature("user_id", sizes.num_users, None, 1, sizes.min_history_len),),
        candidate_ids=(
            IdFeature("item_candidate_id", sizes.num_items),
            IdFeature("item_candidate_category_id", sizes.num_categories),
        ),
        candidate_time="item_query_time",
        row_dtype="float32",
        tasks=("rating",),
        max_history_len=sizes.max_history,
        max_candidates=sizes.max_candidates,
        max_batch=1,
        micro_batch=micro_batch,
        scaling="batch",
        counts_candidates=True,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        attention_dim=sizes.attention_dim,
        linear_dim=sizes.linear_dim,
        kv_dtype="float32",
        cache_rule="request",
        model_version="ab" * 32,
    )


def our_cases(micro_batch: int) -> list[rows.Case]:
    """Every mode, with 64 candidates after 150 events."""
    splits = {rows.COLD: micro_batch, rows.WARM: micro_batch}
    return [rows.Case(rows.ENGINES, mode, 150, 64, splits.get(mode, 0)) for mode in rows.MODES]


@pytest.mark.parametrize("micro_batch", [5, 64])
def test_the_session_is_asked_as_every_mode_says(
    reference: rows.Reference, graphs: Any, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    monkeypatch.setattr(bench_m_falcon, "request", lambda n, m: work.request(n, m, work.TINY))
    with RankingSession(ranking_spec(micro_batch), **graphs, kv_budget_bytes=2**22) as session:
        for case in our_cases(micro_batch):
            call = bench_m_falcon.calls_of(session, case)
            for _ in range(2):
                logits = np.concatenate([result.logits[:, 0] for result in call()])
                assert reference.judged(case, logits)["max_err"] <= RMS["float32"], case
        stats = session.stats()
    # Cold: two misses. Warm: its own first call, which the cold ones' entry answers, and two more.
    assert (stats.cache.hits, stats.cache.misses, stats.prefill_passes) == (3, 2, 2)
    assert stats.score_passes == 5 * -(-64 // micro_batch)


@pytest.mark.parametrize("whole", [False, True])
def test_the_device_clock_counts_every_pass(graphs: Any, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    cached_rows = 400
    milliseconds = {"packed": 7.0, "prefill": 5.0, "score": 2.0}
    candidates: list[int] = []

    class Runner:
        def __init__(self, api: Any, plan: bytes, library: Path | None) -> None:
            self.role = plan.decode()

        def set_inputs(self, feeds: Any) -> None:
            self.feeds = feeds
            if self.role == "score":
                candidates.append(len(feeds["item_query_time"]))
                assert len(feeds["k_0"]) == (cached_rows if whole else 151)

        def run(self) -> Any:
            return graphs[self.role].run(self.feeds)

        def record(self) -> int:
            return 321

        def most_rows(self, name: str) -> int:
            return {"candidate_offsets": 3}.get(name, cached_rows) if whole else 2

        def time_copies(self, sizes: list[int]) -> rows.Row:
            assert sizes == [151 * 2 * 32 * 4] * 4, "keys and values of one user, not of the cache"
            return {"median_ms": 0.5, "p90_ms": 0.5, "cv": 0.01, "repeats": 20}

        def time(self) -> rows.Row:
            return {"median_ms": milliseconds[self.role], "p90_ms": 10.0, "cv": 0.01, "repeats": 20}

        def memory(self) -> rows.Row:
            return {"peak_mib": milliseconds[self.role]}

        def close(self) -> None:
            """Nothing is held."""

    monkeypatch.setattr(device_timing, "EngineRunner", Runner)
    monkeypatch.setattr(bench_m_falcon, "request", lambda n, m: work.request(n, m, work.TINY))
    plans = {role: role.encode() for role in bench_m_falcon.ROLES}
    for recorded in (False, True):
        bundle = bench_m_falcon.Bundle(None, ranking_spec(64), plans, None, "fp32")  # type: ignore[arg-type]
        clock = bench_m_falcon.DeviceClock(bundle, recorded, cached_rows)
        timings = {case.mode: clock.timing(case.measured) for case in our_cases(16)}
        clock.close()
        medians = {mode: row["median_ms"] for mode, row in timings.items()}
        # Eight forwards alone; four passes of sixteen candidates, timed once; with graphs, keys and values are copied
        # after a prefill, and once before the passes that read them, unless these read the cache.
        staged = 0.5 * recorded * (not whole)
        cold, warm = 5.0 + 4 * 2.0 + 0.5 * recorded + staged, 4 * 2.0 + staged
        assert medians == {rows.ALONE: 8 * 7.0, rows.PACKED: 7.0, rows.COLD: cold, rows.WARM: warm}
        assert timings[rows.COLD]["peak_mib"] == 5.0
        for row in timings.values():
            assert ("a CUDA graph of 321 nodes" in row["note"]) == recorded
            assert "nodes" not in row
    assert candidates == [16, 16]


def test_a_replay_that_differs_gets_no_time(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner:
        def __init__(self, *arguments: Any) -> None:
            self.recorded = False

        def set_inputs(self, feeds: Any) -> None:
            """Nothing is read."""

        def record(self) -> int:
            self.recorded = True
            return 1

        def run(self) -> Any:
            return {"logits": np.full((2, 1), np.nan if self.recorded else 1.0)}

    monkeypatch.setattr(device_timing, "EngineRunner", Runner)
    monkeypatch.setattr(bench_m_falcon, "request", lambda n, m: work.request(n, m, work.TINY))
    bundle = bench_m_falcon.Bundle(None, ranking_spec(64), {"packed": b""}, None, "fp32")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="logits of a replay of packed differs"):
        bench_m_falcon.DeviceClock(bundle, True, 400).timing(rows.Case(rows.ENGINES, rows.PACKED, 150, 64))


def test_a_case_whose_passes_were_not_replayed_is_no_measurement(graphs: Any) -> None:
    with RankingSession(ranking_spec(64), **graphs, kv_budget_bytes=2**22) as session:
        before = session.stats()
        replayed = dataclasses.replace(before, score_passes=2, packed_passes=1, graphs=GraphStats(replays=3))
        missed = dataclasses.replace(replayed, prefill_passes=1)
        assert bench_m_falcon.unreplayed(before, replayed) == ""
        assert bench_m_falcon.unreplayed(before, missed) == "error: 3 of 4 passes were replays of a CUDA graph"


def test_without_graphs_every_request_is_measured_once() -> None:
    cases = list(rows.cases_of(rows.NO_GRAPH, (4096,), (1, 256, 2048), (64, 1024)))
    assert [(case.mode, case.m, case.micro_batch) for case in cases] == [
        ("packed", 256, 0),
        ("cached_warm", 256, 1024),
        ("packed", 1, 0),
        ("cached_warm", 1, 64),
        ("packed", 2048, 0),
        ("cached_warm", 2048, 1024),
    ]


@pytest.fixture(scope="module")
def meta_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a job carries, taken from the checkout."""
    checkout = os.environ.get(META_REPO)
    if not checkout:
        pytest.skip(f"no checkout of Meta's generative-recommenders: {META_REPO} is not set")
    folder = tmp_path_factory.mktemp("job") / "meta"
    prepare.copy_meta(Path(checkout), folder)
    return folder


@pytest.fixture
def meta(meta_repo: Path) -> Iterator[SimpleNamespace]:
    modules = meta_peer.import_meta(meta_repo)
    stu: Any = sys.modules["generative_recommenders.modules.stu"]
    original = stu.delta_hstu_mha
    # Its PyTorch kernel returns a transposed view for one sequence, which its caller cannot reshape; Triton's does not.
    stu.delta_hstu_mha = lambda **arguments: original(**arguments).contiguous()
    yield modules
    stu.delta_hstu_mha = original


@pytest.mark.parametrize("shape", [(150, 17), (5, 3), (30, 1)])
def test_meta_agrees_packed_and_cached(
    meta: SimpleNamespace, state: dict[str, torch.Tensor], shape: tuple[int, int]
) -> None:
    request, sizes = work.request(*shape, work.TINY), work.TINY
    # Meta's PyTorch kernel clamps time buckets to D - 1.
    exact = eager(state, torch.float64, sizes.width - 1)
    peer = peers.Peer(meta_peer.MetaModel(meta, state, sizes, CPU, torch.float32, "PYTORCH"))
    with torch.inference_mode():
        expected = exact.packed(exact.upload(request))
        spread = exact.packed(exact.upload(work.request(shape[0], 64, sizes))).std()
        for mode in (rows.PACKED, rows.COLD, rows.WARM):
            (run,), upload = peer.runs(mode, [request])
            upload(0)
            for _ in range(2):
                assert float((run() - expected).abs().max() / spread) <= RMS["float32"], mode


def test_meta_never_describes_slices_to_tma(meta: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: Any = sys.modules["generative_recommenders.ops.triton.triton_hstu_preprocess_and_attention"]
    asked: list[Any] = []

    def remember(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(arguments)
        return torch.empty(0), torch.empty(0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(fused._HSTUPreprocessAndAttentionFunction, "apply", remember)
    names = list(inspect.signature(fused.triton_hstu_preprocess_and_attention).parameters)
    fused.triton_hstu_preprocess_and_attention(**dict.fromkeys(names))
    assert asked[0][names.index("enable_tma")] is False


def test_another_version_of_meta_is_not_taken_for_this_one() -> None:
    with pytest.raises(AttributeError, match="_should_enable_tma"):
        meta_peer.without_tma(SimpleNamespace())


def test_meta_carries_only_what_it_imports(meta_repo: Path) -> None:
    files = [path for path in meta_repo.rglob("*") if path.is_file()]
    assert all(path.suffix in (".py", "") for path in files)
    assert sum(path.stat().st_size for path in files) < 2**20
    assert (meta_repo / "COMMIT").read_text().strip()
