"""Opening an incremental retrieval bundle: which files go to which session, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hstu_compile import bundle
from hstu_compile.bundle import BundleWriter
from hstu_compile.errors import BundleError, EngineError, UsageError
from hstu_compile.inspection import inspect_path
from hstu_compile.retrieval_bundle import open_retrieval_session
from hstu_compile.runtime.retrieval_spec import RetrievalSpec
from tests.retrieval_cases import MAX_SEQ_LEN, ROLES, EagerGraph, Served, asked, config_of, history_of, spec_of

FILES = {"retrieval": "model", "prefill": "prefill", "append": "append"}
MODELS = [f"{stem}.onnx" for stem in FILES.values()]
ENGINES = [f"{stem}.engine" for stem in FILES.values()]
SPEC = spec_of(config_of())


def written(path: Path, names: list[str], **facts: Any) -> Path:
    """A bundle with these files, whose content nobody reads."""
    manifest = {
        "status": "PASS",
        "precision": {"requested": "fp16"},
        "backend": {"name": "tensorrt-rtx"},
        "inputs": [],
        "outputs": [],
        "limits": {},
        "graphs": [],
        "ranking": None,
        "retrieval": SPEC.to_dict(),
    }
    with BundleWriter(path, force=False) as writer:
        for name in names:
            writer.add(name, name)
        return writer.commit({**manifest, **facts})


class Opener:
    """Stands in for `open_session`: remembers what it was asked, gives graphs of the eager model by file name."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.graphs: dict[str, EagerGraph] = {}
        self.failing = ""
        self._made = Served().graphs

    def __call__(self, runtime: str, **arguments: Any) -> EagerGraph:
        role = next(role for role, stem in FILES.items() if arguments["onnx"].stem == stem)
        if role == self.failing:
            raise EngineError("HSTU-E404", "it does not load", "the test says so", "none")
        self.asked.append({"runtime": runtime, **arguments})
        self.graphs[role] = self._made[role]
        return self.graphs[role]


@pytest.fixture
def opener(monkeypatch: pytest.MonkeyPatch) -> Opener:
    opener = Opener()
    monkeypatch.setattr(bundle, "open_session", opener)
    return opener


def test_three_graphs_become_one_session_that_encodes_and_owns_them(tmp_path: Path, opener: Opener) -> None:
    path = written(tmp_path / "b.hstu", MODELS)
    with open_retrieval_session(str(path), kv_budget_bytes=100_000) as session:
        assert session.spec == SPEC
        assert session.runtime == "eager retrieval"
        assert session.encode([asked("ann", history_of(0), 5)])[0].cache == "miss"
    assert [each["onnx"] for each in opener.asked] == [path / name for name in MODELS]
    assert all(each["engine"] is None and each["use_gpu"] is False for each in opener.asked)
    assert all(graph.closed for graph in opener.graphs.values())


def test_engines_get_their_files_the_plugin_and_cuda_graphs(tmp_path: Path, opener: Opener) -> None:
    path = written(tmp_path / "b.hstu", MODELS + ENGINES)
    plugin = Path("libother.so")
    open_retrieval_session(path, "tensorrt", kv_budget_bytes=1, plugin_library=plugin, cuda_graphs=3).close()
    assert [each["engine"] for each in opener.asked] == [path / name for name in ENGINES]
    assert [(each["plugin_library"], each["cuda_graphs"]) for each in opener.asked] == [(plugin, 3)] * 3


def test_options_reach_the_session(tmp_path: Path, opener: Opener) -> None:
    options: dict[str, Any] = {"truncation": "keep_last", "over_budget": "uncached", "staging_rows": 9}
    with open_retrieval_session(written(tmp_path / "b.hstu", MODELS), kv_budget_bytes=1, **options) as session:
        (result,) = session.encode([asked("ann", history_of(0, MAX_SEQ_LEN + 2), MAX_SEQ_LEN + 2)])
        assert (result.truncated, result.cache, result.reason) == (2, "off", "over_budget")
        assert session.stats().staging_bytes == 2 * session.entry_bytes(9)


def test_inspection_shows_what_the_session_is_told(tmp_path: Path) -> None:
    facts = inspect_path(
        written(
            tmp_path / "b.hstu",
            MODELS,
            profiles=[],
            backend={"name": "onnx"},
            checkpoint={},
            operator={},
            verification=None,
        )
    )
    assert facts["retrieval"] == SPEC.to_dict()
    assert RetrievalSpec.from_manifest(json.loads(json.dumps(facts["retrieval"]))) == SPEC


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"retrieval": None}, "cannot encode histories in parts"),
        ({"retrieval": {**SPEC.to_dict(), "max_append": 0}}, "retrieval entry cannot be used"),
    ],
)
def test_a_bundle_without_the_graphs_for_it_is_refused(
    tmp_path: Path, opener: Opener, facts: dict[str, Any], text: str
) -> None:
    with pytest.raises(BundleError, match=text) as caught:
        open_retrieval_session(written(tmp_path / "b.hstu", MODELS, **facts), kv_budget_bytes=1)
    assert caught.value.code == "HSTU-E803"
    assert opener.asked == []


def test_a_bundle_from_before_incremental_builds_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "b.hstu", MODELS)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    del manifest["retrieval"]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError, match="cannot encode histories in parts") as caught:
        open_retrieval_session(path, kv_budget_bytes=1)
    assert "--incremental" in caught.value.fix


@pytest.mark.parametrize("failing", ["prefill", "append", "session"])
def test_a_failure_closes_what_was_opened(tmp_path: Path, opener: Opener, failing: str) -> None:
    opener.failing = failing
    path = written(tmp_path / "b.hstu", MODELS)
    # Without memory for the cache it is the session that refuses.
    expected: Any = UsageError if failing == "session" else EngineError
    with pytest.raises(expected):
        open_retrieval_session(path, kv_budget_bytes=0 if failing == "session" else 1)
    opened = ROLES if failing == "session" else ROLES[: ROLES.index(failing)]
    assert tuple(opener.graphs) == opened
    assert all(graph.closed for graph in opener.graphs.values())
