"""The checks of ranking engines, with ONNX Runtime in their place: right graphs pass, wrong ones fail by name."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hstu_compile import bundle as bundles
from hstu_compile.artifacts import TensorSpec
from hstu_compile.runtime.graph_cache import GraphCache, GraphStats
from hstu_compile.runtime.session import Session, open_session
from tests.e2e.conftest import Build
from tests.e2e.test_build_ranking import FORM, SMALL

FOLDER = Path(__file__).parent
# The bundle that test_build_ranking.py builds: three graphs are traced for it. test_run_triton.py serves it as well.
OPTIONS = SMALL


@pytest.fixture(scope="module")
def modules() -> Mapping[str, ModuleType]:
    """The scripts as they import one another: from their own folder and the benchmark's."""
    for folder in (FOLDER, FOLDER.parent / "bench"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return {name: importlib.import_module(name) for name in ("checks", "ranking_checks", "graph_checks", "run_ranking")}


@pytest.fixture(scope="module")
def folder(build_ranking: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = build_ranking(FORM, *OPTIONS)
    assert built.result.exit_code == 0, built.result.stderr
    return Path(shutil.copytree(built.path, tmp_path_factory.mktemp("ranking") / "tiny-fp32"))


@pytest.fixture(scope="module")
def bundle(modules: Mapping[str, ModuleType], folder: Path) -> Any:
    return modules["ranking_checks"].PreparedBundle.read(folder)


def opener(bundle: Any) -> Callable[[str], Session]:
    return lambda graph: open_session("onnxruntime", onnx=bundle.onnx(graph))


class Altered:
    """A graph whose outputs are changed before anyone sees them."""

    def __init__(self, session: Session, change: Callable[[dict[str, Any]], None]) -> None:
        self._session, self._change = session, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def __enter__(self) -> Altered:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._session.close()

    def run(self, feeds: Any) -> dict[str, Any]:
        outputs = self._session.run(feeds)
        self._change(outputs)
        return outputs

    def run_resident(self, feeds: Any, outputs: Any, **copies: Any) -> dict[str, Any]:
        results = self._session.run_resident(feeds, outputs, **copies)
        self._change(results)
        return results


class Int32Times(Altered):
    """A graph that takes times as int32, as TensorRT 8 does."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(
            dataclasses.replace(tensor, dtype="int32") if tensor.dtype == "int64" else tensor
            for tensor in self._session.inputs
        )


class Recorded(Altered):
    """A graph that counts as a session with CUDA graphs does; a stale one answers by what it was recorded with."""

    def __init__(self, session: Session, capacity: int, *, stale: bool) -> None:
        super().__init__(session, lambda _: None)
        self._cache: GraphCache[Kept] = GraphCache(capacity)
        self._stale, self._lock = stale, threading.Lock()

    @property
    def graph_stats(self) -> GraphStats:
        return self._cache.stats

    def run(self, feeds: Any) -> dict[str, Any]:
        return self.run_resident(feeds, {})

    def run_resident(self, feeds: Any, outputs: Any, **copies: Any) -> dict[str, Any]:
        with self._lock:
            results = self._session.run_resident(feeds, outputs, **copies)
            key = tuple(sorted((name, value.shape) for name, value in feeds.items()))
            if (kept := self._cache.find(key)) is not None:
                self._cache.replayed()
                return kept.results if self._stale else results
            if self._cache.is_due(key):
                self._cache.keep(key, Kept(results))
            return results


class Kept:
    """What a recording would answer."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results

    def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("stale", [False, True])
def test_replays_are_compared_with_plain_runs(
    modules: Mapping[str, ModuleType], bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: bool
) -> None:
    graphs, checks = modules["graph_checks"], modules["checks"].Checks("ranking")
    # A plain run, a recording and a replay; further ones repeat the third, which costs a GPU nothing.
    monkeypatch.setattr(graphs, "_ROUNDS", 3)

    def recorded(graph: str) -> Any:
        return Recorded(opener(bundle)(graph), graphs.GRAPHS, stale=stale)

    graphs.check_graphs(checks, bundle, opener(bundle), recorded, lambda: 0, thread_seconds=0.3)
    names = failed(checks, tmp_path / "ranking.json")
    compared = [check["name"] for check in json.loads((tmp_path / "ranking.json").read_text())["checks"][:-1]]
    assert len(compared) == 5
    assert names == (compared if stale else [])


def test_sessions_that_never_replay_prove_nothing(
    modules: Mapping[str, ModuleType], bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = modules["checks"].Checks("ranking")
    monkeypatch.setattr(modules["graph_checks"], "_ROUNDS", 1)
    modules["graph_checks"].check_graphs(checks, bundle, opener(bundle), opener(bundle), lambda: 0, thread_seconds=0.3)
    assert len(failed(checks, tmp_path / "ranking.json")) == 5


def failed(checks: Any, path: Path) -> list[str]:
    checks.write(path)
    return list(json.loads(path.read_text())["failed"])


def halve(outputs: dict[str, Any]) -> None:
    for name in ("logits", "preds"):
        if name in outputs:
            outputs[name] = outputs[name] * np.float32(0.99)


def test_right_graphs_pass_every_check(modules: Mapping[str, ModuleType], bundle: Any, tmp_path: Path) -> None:
    ranking, checks = modules["ranking_checks"], modules["checks"].Checks("ranking")
    for graph in ranking.GRAPHS:
        with opener(bundle)(graph) as session:
            ranking.check_feeds(checks, bundle, graph, session)
        assert bundle.num_plugin_nodes(graph) > 0
    ranking.check_m_falcon(checks, bundle, opener(bundle), ranking.synthetic_requests(bundle.spec))
    assert failed(checks, tmp_path / "ranking.json") == []
    content = json.loads((tmp_path / "ranking.json").read_text())
    sizes = ranking.micro_batches_of(bundle.spec)
    assert sizes == [1, 5]
    assert len(content["checks"]) == 3 + 8 * len(sizes)


def test_a_wrong_score_graph_fails_by_name(modules: Mapping[str, ModuleType], bundle: Any, tmp_path: Path) -> None:
    ranking, checks = modules["ranking_checks"], modules["checks"].Checks("ranking")

    def open_graph(graph: str) -> Any:
        session = opener(bundle)(graph)
        return Altered(session, halve) if graph == "score" else session

    with open_graph("score") as session:
        ranking.check_feeds(checks, bundle, "score", session)
    ranking.check_m_falcon(checks, bundle, open_graph, ranking.synthetic_requests(bundle.spec))
    names = failed(checks, tmp_path / "ranking.json")
    assert "tiny-fp32 score: our session agrees with float64 on every feed" in names
    for micro_batch in ranking.micro_batches_of(bundle.spec):
        assert f"tiny-fp32, micro-batch {micro_batch}: cached scores equal packed ones" in names


def test_answers_that_change_from_call_to_call_are_not_warm_equals_cold(
    modules: Mapping[str, ModuleType], bundle: Any, tmp_path: Path
) -> None:
    ranking, checks = modules["ranking_checks"], modules["checks"].Checks("ranking")
    calls = iter(range(10**6))

    def drift(outputs: dict[str, Any]) -> None:
        if "logits" in outputs:
            outputs["logits"] = outputs["logits"] * np.float32(1 + 1e-7 * (next(calls) % 11))

    ranking.check_m_falcon(
        checks,
        bundle,
        lambda graph: Altered(opener(bundle)(graph), drift),
        ranking.synthetic_requests(bundle.spec),
    )
    names = failed(checks, tmp_path / "ranking.json")
    assert names == [
        f"tiny-fp32, micro-batch {size}: warm equals cold, to the bit" for size in ranking.micro_batches_of(bundle.spec)
    ]


def test_feeds_beyond_int32_are_left_out_and_named(modules: Mapping[str, ModuleType], bundle: Any) -> None:
    ranking, reference = modules["ranking_checks"], bundle.references["packed"]
    with opener(bundle)("packed") as session:
        assert ranking.fitting(reference, session.inputs) == (reference, [])
        narrow = Int32Times(session, lambda _: None).inputs
        late = dataclasses.replace(reference.feeds[1], name="late", arrays=dict(reference.feeds[1].arrays))
        times = bundle.spec.candidate_time
        late.arrays[times] = np.full_like(late.arrays[times], 2**31)
        kept, dropped = ranking.fitting(
            dataclasses.replace(reference, feeds=(reference.feeds[0], late, *reference.feeds[2:])), narrow
        )
    assert "late" in dropped
    assert len(kept.feeds) == len(kept.exact) == len(kept.eager) == len(reference.feeds) - len(dropped)
    assert kept.exact[0] is reference.exact[0]


def test_too_few_feeds_are_a_failure(modules: Mapping[str, ModuleType], bundle: Any, tmp_path: Path) -> None:
    ranking, checks = modules["ranking_checks"], modules["checks"].Checks("ranking")
    reference = bundle.references["packed"]
    parts = {name: getattr(reference, name)[:1] for name in ("feeds", "exact", "eager")}
    single = dataclasses.replace(bundle, references={"packed": dataclasses.replace(reference, **parts)})
    with opener(bundle)("packed") as session:
        ranking.check_feeds(checks, single, "packed", session)
    assert len(failed(checks, tmp_path / "ranking.json")) == 1


def test_polygraphy_agrees_with_eager_and_refuses_an_altered_reference(
    modules: Mapping[str, ModuleType], bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files and the tolerances are those of the engine's check; ONNX Runtime runs the graph."""
    run, checks = modules["run_ranking"], modules["checks"].Checks("ranking")
    real = run.run_command

    def with_onnxruntime(command: list[str], **arguments: Any) -> Any:
        words = [word for word in command if word not in ("--trt", "--model-type", "engine")]
        at = words.index("--plugins")
        words[at : at + 2] = ["--onnxrt"]
        words[words.index("run") + 1] = str(bundle.onnx(graph))
        words[words.index("-c") + 1] = f"import sys; sys.modules['torch'] = None; {words[words.index('-c') + 1]}"
        return real(words, **arguments)

    monkeypatch.setattr(run, "run_command", with_onnxruntime)
    for graph in ("packed", "prefill"):
        with opener(bundle)(graph) as session:
            run.check_polygraphy(checks, bundle, graph, session, Path("e"), Path("p"), tmp_path / graph)
    assert failed(checks, tmp_path / "ranking.json") == []
    content = json.loads((tmp_path / "ranking.json").read_text())
    assert [check["facts"]["exit_code"] for check in content["checks"]] == [0, 1, 0, 1]


@pytest.mark.slow
def test_the_soak_is_judged_by_its_report_and_by_device_memory(
    modules: Mapping[str, ModuleType], bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = modules["run_ranking"]
    plan = dataclasses.replace(run.SOAK, requests=1300, users=60, threads=2)
    monkeypatch.setattr(run, "SOAK_CACHE_USERS", 4)
    real, reports = run.soak, []

    def soaked_once(session: Any, plan: Any, progress: Callable[[int], None]) -> Any:
        if reports:
            progress(500)
        else:
            reports.append(real(session, plan, progress))
        return reports[0]

    monkeypatch.setattr(run, "soak", soaked_once)
    for taken, expected in ((0, 0), (100, 1)):
        free = iter(range(2**40, 0, -(taken << 20) or -1))
        monkeypatch.setattr(run, "free_bytes", lambda free=free: next(free))
        checks = modules["checks"].Checks("soak")
        run.check_soak(checks, bundle, opener(bundle), plan)
        assert len(failed(checks, tmp_path / "soak.json")) == expected
        facts = json.loads((tmp_path / "soak.json").read_text())["checks"][0]["facts"]
        assert facts["report"]["requests"] == 1300
        assert facts["report"]["budget_peak_bytes"] <= facts["report"]["budget_bytes"]


@pytest.mark.parametrize(
    ("report", "passed"),
    [
        ('tests="5" failures="0" errors="0" skipped="0"', True),
        ('tests="5" failures="0" errors="0" skipped="1"', False),
        ('tests="5" failures="1" errors="0" skipped="0"', False),
        ('tests="0" failures="0" errors="0" skipped="0"', False),
    ],
)
def test_device_pools_count_only_where_none_was_skipped(
    modules: Mapping[str, ModuleType], tmp_path: Path, report: str, passed: bool
) -> None:
    checks = modules["checks"].Checks("ranking")
    (tmp_path / "resident.xml").write_text(f"<testsuites><testsuite {report}/></testsuites>")
    modules["run_ranking"].check_resident(checks, tmp_path / "resident.xml")
    assert (failed(checks, tmp_path / "ranking.json") == []) is passed


def test_an_archive_is_unpacked_once_and_again_when_it_changed(tmp_path: Path) -> None:
    def packed(content: str) -> None:
        bundle = tmp_path / "b"
        bundle.mkdir(exist_ok=True)
        (bundle / bundles.MANIFEST).write_text(content)
        subprocess.run(["tar", "czf", "b.tar.gz", "b"], cwd=tmp_path, check=True)

    def unpack() -> str:
        command = ["bash", str(FOLDER / "unpack.sh"), "b.tar.gz", "out"]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    packed("first")
    assert unpack().startswith("unpacked b.tar.gz")
    assert unpack() == ""
    packed("second")
    assert unpack().startswith("unpacked b.tar.gz")
    assert (tmp_path / "out" / "b" / bundles.MANIFEST).read_text() == "second"
