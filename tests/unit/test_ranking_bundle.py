"""Opening a ranking bundle: which files go to which session, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hstu_compile import bundle
from hstu_compile.bundle import BundleWriter
from hstu_compile.errors import BundleError, EngineError, UsageError
from hstu_compile.ranking_bundle import open_ranking_session
from hstu_compile.runtime.ranking_request import RankingPolicy
from hstu_compile.runtime.ranking_spec import RankingSpec
from tests.ranking_cases import ROLES
from tests.ranking_fakes import FakeGraph, FakeModel, spec_of
from tests.ranking_requests import request_of

SPEC = spec_of()
FILES = {"packed": "model", "prefill": "prefill", "score": "score"}


def written(path: Path, names: list[str], **facts: Any) -> Path:
    """A bundle with these files, whose content nobody reads."""
    manifest: Mapping[str, Any] = {
        "status": "PASS",
        "precision": {"requested": "fp16"},
        "backend": {"name": "tensorrt-rtx"},
        "inputs": [],
        "outputs": [],
        "limits": {},
        "graphs": [],
        "ranking": SPEC.to_dict(),
    }
    with BundleWriter(path, force=False) as writer:
        for name in names:
            writer.add(name, name)
        return writer.commit({**manifest, **facts})


class Opener:
    """Stands in for `open_session`: remembers what it was asked, gives fake graphs by file name."""

    def __init__(self, failing: str = "") -> None:
        self.asked: list[dict[str, Any]] = []
        self.graphs: dict[str, FakeGraph] = {}
        self.failing = failing

    def __call__(self, runtime: str, **arguments: Any) -> FakeGraph:
        role = next(role for role, stem in FILES.items() if arguments["onnx"].stem == stem)
        if role == self.failing:
            raise EngineError("HSTU-E404", "it does not load", "the test says so", "none")
        self.asked.append({"runtime": runtime, **arguments})
        self.graphs[role] = FakeGraph(FakeModel(SPEC), role)
        return self.graphs[role]


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> Opener:
    opener = Opener()
    monkeypatch.setattr(bundle, "open_session", opener)
    return opener


THREE = ["model.onnx", "prefill.onnx", "score.onnx"]
ENGINES = ["model.engine", "prefill.engine", "score.engine"]


def test_three_graphs_become_one_session_that_scores_and_owns_them(tmp_path: Path, opener: Opener) -> None:
    path = written(tmp_path / "b.hstu", THREE)
    with open_ranking_session(str(path), kv_budget_bytes=100_000) as session:
        assert session.spec == SPEC
        assert session.runtime == "fake packed"
        assert session.score([request_of(SPEC, 0, 5, 3)])[0].cache == "miss"
    assert [each["runtime"] for each in opener.asked] == ["onnxruntime"] * 3
    assert [each["onnx"] for each in opener.asked] == [path / name for name in THREE]
    assert all(each["engine"] is None and each["use_gpu"] is False for each in opener.asked)
    assert all("plugin_library" not in each for each in opener.asked)
    assert all(graph.closed for graph in opener.graphs.values())


@pytest.mark.parametrize(
    ("runtime", "given", "expected"),
    [
        ("tensorrt", None, [None] * 3),
        ("tensorrt", Path("libother.so"), [Path("libother.so")] * 3),
        ("tensorrt-rtx", None, ["absent"] * 3),
    ],
)
def test_engines_get_their_files_and_the_plugin(
    tmp_path: Path, opener: Opener, runtime: str, given: Path | None, expected: list[Any]
) -> None:
    path = written(tmp_path / "b.hstu", THREE + ENGINES)
    open_ranking_session(path, runtime, kv_budget_bytes=1, plugin_library=given).close()
    assert [each["engine"] for each in opener.asked] == [path / name for name in ENGINES]
    assert [each.get("plugin_library", "absent") for each in opener.asked] == expected
    assert all("use_gpu" not in each for each in opener.asked)


@pytest.mark.parametrize(
    ("runtime", "asked", "expected"),
    [
        ("tensorrt", None, 16),
        ("tensorrt", 3, 3),
        ("tensorrt", 0, 0),
        ("tensorrt-rtx", None, 0),
        ("onnxruntime", None, 0),
        ("onnxruntime", 5, 5),
    ],
)
def test_cuda_graphs_are_tensorrts_unless_asked_for(
    tmp_path: Path, opener: Opener, runtime: str, asked: int | None, expected: int
) -> None:
    path = written(tmp_path / "b.hstu", THREE + ENGINES)
    open_ranking_session(path, runtime, kv_budget_bytes=1, cuda_graphs=asked).close()
    assert [each.get("cuda_graphs", 0) for each in opener.asked] == [expected] * 3


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("fp16", True)])
def test_float32_engines_are_loaded_without_tf32(tmp_path: Path, opener: Opener, precision: str, allowed: bool) -> None:
    path = written(tmp_path / "b.hstu", THREE + ENGINES, precision={"requested": precision})
    open_ranking_session(path, "tensorrt-rtx", kv_budget_bytes=1).close()
    assert [each["allow_tf32"] for each in opener.asked] == [allowed] * 3


def test_the_plugin_in_the_bundle_is_the_default(tmp_path: Path, opener: Opener) -> None:
    from hstu_compile.plugin_library import SELF_REGISTERING

    path = written(tmp_path / "b.hstu", [*THREE, *ENGINES, SELF_REGISTERING])
    open_ranking_session(path, "tensorrt", kv_budget_bytes=1).close()
    assert [each["plugin_library"] for each in opener.asked] == [path / SELF_REGISTERING] * 3


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt-rtx"])
def test_a_plugin_for_a_runtime_without_plugins_is_refused(tmp_path: Path, opener: Opener, runtime: str) -> None:
    path = written(tmp_path / "b.hstu", THREE + ENGINES)
    with pytest.raises(UsageError, match=f"{runtime} takes no plugins"):
        open_ranking_session(path, runtime, kv_budget_bytes=1, plugin_library=Path("libother.so"))
    assert opener.asked == []


def test_a_bundle_without_m_falcon_scores_packed(tmp_path: Path, opener: Opener) -> None:
    path = written(tmp_path / "b.hstu", ["model.onnx"])
    with open_ranking_session(path) as session:
        assert session.score_packed([request_of(SPEC, 0, 5, 3)])[0].preds.shape == (3, 2)
        with pytest.raises(UsageError, match="--m-falcon"):
            session.score([request_of(SPEC, 0, 5, 3)])
    assert list(opener.graphs) == ["packed"]


def test_options_reach_the_session(tmp_path: Path, opener: Opener) -> None:
    path = written(tmp_path / "b.hstu", THREE)
    policy = RankingPolicy(truncation="keep_last")
    options: dict[str, Any] = {"policy": policy, "over_budget": "packed", "staging_rows": 30}
    with open_ranking_session(path, kv_budget_bytes=1, **options) as session:
        (result,) = session.score([request_of(SPEC, 0, 15, 3)])
        assert (result.truncated, result.cache) == (3, "off")
        assert session.stats().staging_bytes >= session.entry_bytes(27)


@pytest.mark.parametrize("facts", [{"ranking": None}, {"ranking": {**SPEC.to_dict(), "tasks": []}}])
def test_a_bundle_of_another_kind_is_refused(tmp_path: Path, opener: Opener, facts: dict[str, Any]) -> None:
    path = written(tmp_path / "b.hstu", THREE, **facts)
    with pytest.raises(BundleError, match="ranking") as caught:
        open_ranking_session(path, kv_budget_bytes=1)
    assert caught.value.code == "HSTU-E803"
    assert opener.asked == []


def test_a_bundle_from_before_ranking_is_refused(tmp_path: Path, opener: Opener) -> None:
    path = written(tmp_path / "b.hstu", THREE)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["ranking"]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="holds no ranking model"):
        open_ranking_session(path, kv_budget_bytes=1)


def test_an_altered_file_is_refused(tmp_path: Path, opener: Opener) -> None:
    path = written(tmp_path / "b.hstu", THREE)
    (path / "score.onnx").write_text("another", encoding="utf-8")
    with pytest.raises(BundleError, match=r"score\.onnx has another sha256"):
        open_ranking_session(path, kv_budget_bytes=1)


@pytest.mark.parametrize("failing", ["prefill", "score", "session"])
def test_a_failure_closes_what_was_opened(tmp_path: Path, opener: Opener, failing: str) -> None:
    opener.failing = failing
    path = written(tmp_path / "b.hstu", THREE)
    # Without memory for the cache it is the session that refuses.
    expected: Any = UsageError if failing == "session" else EngineError
    with pytest.raises(expected):
        open_ranking_session(path, kv_budget_bytes=0 if failing == "session" else 1)
    opened = ROLES if failing == "session" else ROLES[: ROLES.index(failing)]
    assert tuple(opener.graphs) == opened
    assert all(graph.closed for graph in opener.graphs.values())


def test_the_manifest_entry_round_trips_through_a_bundle(tmp_path: Path) -> None:
    path = written(tmp_path / "b.hstu", ["model.onnx"])
    entry = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["ranking"]
    assert RankingSpec.from_manifest(entry) == SPEC


@pytest.mark.parametrize(("asked", "expected"), [(None, 16), (0, 0), (5, 5)])
def test_graphs_in_segments_open_with_their_schedules_and_the_kernels(
    tmp_path: Path, opener: Opener, monkeypatch: pytest.MonkeyPatch, asked: int | None, expected: int
) -> None:
    engines = {stem: [f"{stem}.segment-{number}.engine" for number in range(2)] for stem in FILES.values()}
    entries = [
        {
            "name": name,
            "onnx": f"{stem}.onnx",
            "inputs": [],
            "outputs": [],
            "fused": {"schedule": f"{stem}.schedule.json", "engines": engines[stem]},
        }
        for name, stem in FILES.items()
    ]
    names = [*THREE, "libkernels.so", *(f"{stem}.schedule.json" for stem in engines)]
    names += [name for each in engines.values() for name in each]
    path = written(tmp_path / "b.hstu", names, graphs=entries, kernels={"file": "libkernels.so"})
    given = []

    def opened(schedule: Path, segments: Any, kernels: Path, **options: Any) -> FakeGraph:
        given.append((schedule.name, [each.name for each in segments], kernels.name, options))
        role = next(role for role, stem in FILES.items() if schedule.name.startswith(stem))
        return FakeGraph(FakeModel(SPEC), role)

    monkeypatch.setattr(bundle, "open_fused_session", opened)
    options = {"allow_tf32": True, "cuda_graphs": expected, "graph_budget_bytes": 1 << 20}
    open_ranking_session(path, "tensorrt-rtx", kv_budget_bytes=1, cuda_graphs=asked, graph_budget_bytes=1 << 20).close()
    assert given == [(f"{stem}.schedule.json", engines[stem], "libkernels.so", options) for stem in FILES.values()]
    # In ONNX Runtime it is a bundle like any other.
    open_ranking_session(path, kv_budget_bytes=1).close()
    assert [each["onnx"].name for each in opener.asked] == THREE
