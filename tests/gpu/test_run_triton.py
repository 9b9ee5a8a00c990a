"""The step that serves engines in Triton, with ONNX Runtime in their place: it passes, and wrong answers are seen."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hstu_compile.serving.local_server import find_installation
from tests.e2e.conftest import Build
from tests.gpu.test_run_ranking import FORM, OPTIONS

FOLDER = Path(__file__).parent
NAMES = ("tiny-retrieval", "tiny-ranking")
MODULES = ("checks", "collect", "run_triton", "triton_asking", "triton_checks", "triton_client", "triton_questions")


@pytest.fixture(scope="module")
def modules() -> Mapping[str, ModuleType]:
    """The scripts as they import one another: from their own folder and the benchmark's."""
    for folder in (FOLDER, FOLDER.parent / "bench"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    return {name: importlib.import_module(name) for name in MODULES}


@pytest.fixture(scope="module")
def job(build_small: Build, build_ranking: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job folder with two verified bundles, as prepare_job.py leaves them: without reports."""
    place = tmp_path_factory.mktemp("job")
    for name, built in zip(NAMES, (build_small("--fp32", "--top-k", 10), build_ranking(FORM, *OPTIONS)), strict=True):
        assert built.result.exit_code == 0, built.result.stderr
        bundle = place / "models" / name
        shutil.copytree(built.path, bundle)
        for report in bundle.glob("report.*"):
            report.unlink()
    (place / "job.json").write_text('{"commit": "c"}')
    return place


@pytest.fixture
def handlers() -> Iterator[None]:
    """The script takes SIGTERM; the test run has it back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# Slow, and how many requests meet in a batch depends on what else the machine does.
@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("handlers")
def test_the_step_passes_in_a_real_server_and_is_collected(
    modules: Mapping[str, ModuleType], job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(found := find_installation(), str):
        pytest.skip(found)
    out = tmp_path / "run" / "triton"
    words = [job, out, "--runtime", "onnxruntime", "--bundles", *NAMES, "--load-requests", 400, "--budget", 250]
    code = modules["run_triton"].main([*map(str, words), "--scratch", str(tmp_path / "scratch")])
    result = json.loads((out / "triton.json").read_text())
    assert (code, result["failed"]) == (0, [])
    facts = {check["name"]: check["facts"] for check in result["checks"]}
    for name in NAMES:
        alone = facts[f"{name}: one request after the other, to the bit as Python's session"]
        assert alone["verdict"]["changed"] == 0 < alone["verdict"]["with_float64"]
        refused = facts[f"{name}: malformed requests are refused alone"]["refusals"]
        assert all(text.startswith("400 ") for text in refused.values())
    load = facts["load: 400 requests from 16 clients"]
    assert load["verdict"]["answered"] == 400
    assert load["latency_ms"]["tiny-ranking, keyed"]["p99"] >= load["latency_ms"]["tiny-ranking, keyed"]["p50"] > 0
    assert load["verdict"]["outcomes"]["tiny-ranking hit"] > 0
    assert set(load["memory_mib"]) == {"tritonserver", *(f"stub of {name}" for name in NAMES)}
    assert "hstu-compile triton" in facts["tiny-ranking: hstu-compile triton writes the model"]["command"]
    assert (out / "tritonserver.log").stat().st_size > 0
    (out / "run.json").write_text(json.dumps({"gpu": "G", "commit": "c" * 40, "date": "2026-01-01"}))
    monkeypatch.setattr(modules["collect"], "RESULTS", tmp_path / "results")
    assert modules["collect"].main([str(tmp_path / "run")]) == 0
    kept = json.loads((tmp_path / "results" / "triton.json").read_text())
    assert (kept["run"]["gpu"], kept["facts"]["tritonserver"]) == ("G", "2.51.0")
    assert str(tmp_path) not in json.dumps(kept)


@pytest.fixture(scope="module")
def asked(modules: Mapping[str, ModuleType], job: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    bundle = tmp_path_factory.mktemp("asked") / "tiny-ranking"
    modules["run_triton"].onnx_bundle(job / "models" / "tiny-ranking", bundle)
    return modules["triton_questions"].ask_python(bundle, "onnxruntime")


def as_triton_answers(question: Any, keyed: bool) -> dict[str, Any]:
    said = b"miss" if keyed else b"off"
    return {
        **question.bits["cached" if keyed else "plain"],
        "truncated": np.zeros((1, 1), np.int32),
        "cache": np.array([[said]], np.object_),
    }


def verdict(modules: Mapping[str, ModuleType], question: Any, answer: Any, keyed: bool = False) -> Any:
    body = modules["triton_client"].Body(b"", {})
    job = modules["triton_asking"].Job(question.model, body, question, keyed)
    return modules["triton_checks"].verdict_of([modules["triton_asking"].Answered(job, answer, 0.1)])


def test_pythons_answers_are_right_and_the_bundles_float64_values_are_asked_for(
    modules: Mapping[str, ModuleType], asked: Any
) -> None:
    stored = [question for question in asked.questions if question.stored]
    assert len(stored) > 4
    assert len({len(question.sample["movie_id"]) for question in asked.questions}) > 10
    for question in asked.questions:
        for keyed in (False, True):
            if keyed and not question.cacheable:
                continue
            found = verdict(modules, question, as_triton_answers(question, keyed), keyed)
            assert modules["triton_checks"].right(dataclasses.replace(found, with_float64=1), 1, same_bits=True), found
            assert found.with_float64 == question.stored


Change = Callable[[dict[str, Any]], Any]


def with_flipped_bit(answer: dict[str, Any]) -> dict[str, Any]:
    preds = answer["preds"].copy()
    preds.view(np.uint8)[0, 0, 0] ^= 1
    return {**answer, "preds": preds}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: {**answer, "preds": answer["preds"] * 0.99}, "preds differs by"),
        (lambda answer: {**answer, "logits": np.zeros_like(answer["logits"])}, "logits differs by"),
        (lambda answer: {**answer, "logits": answer["logits"] * np.nan}, "logits differs by inf"),
        (lambda answer: {**answer, "preds": answer["preds"][:, :-1]}, "preds is float32"),
        (lambda answer: {**answer, "truncated": np.ones((1, 1), np.int32)}, "events were cut"),
        (lambda answer: {**answer, "cache": np.array([[b"hit"]], np.object_)}, "the cache said b'hit'"),
        (lambda answer: {name: array for name, array in answer.items() if name != "preds"}, "no preds"),
        (with_flipped_bit, "other bits in preds"),
    ],
)
def test_a_wrong_answer_is_called_wrong(
    modules: Mapping[str, ModuleType], asked: Any, change: Change, message: str
) -> None:
    question = next(each for each in asked.questions if each.stored and each.cacheable)
    found = verdict(modules, question, change(as_triton_answers(question, keyed=False)))
    assert not modules["triton_checks"].right(found, 1, same_bits=True)
    assert any(message in text for text in found.examples), found.examples


def test_a_refused_or_lost_request_is_lost(modules: Mapping[str, ModuleType], asked: Any) -> None:
    for answer in (modules["triton_client"].Refusal(503, "not ready"), ConnectionResetError("reset")):
        found = verdict(modules, asked.questions[0], answer)
        assert (found.answered, found.lost) == (0, 1)
        assert not modules["triton_checks"].right(found, 1, same_bits=False)


def test_engines_that_no_step_left_are_named(modules: Mapping[str, ModuleType], job: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-ranking").mkdir()
    (tmp_path / "tiny-ranking" / "model.engine").write_bytes(b"packed")
    source, plugin = job / "models" / "tiny-ranking", tmp_path / "plugin.so"
    with pytest.raises(FileNotFoundError, match=r"no engine of tiny-ranking for prefill, score in .*step cpp-loader"):
        modules["run_triton"].engine_bundle(source, [tmp_path], plugin, tmp_path / "target")


def test_a_machine_without_the_server_or_a_library_of_it_is_told_what_is_missing(
    modules: Mapping[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = modules["run_triton"]
    monkeypatch.setattr(script, "find_installation", lambda: "tritonserver is not installed: pip install it")
    checks = modules["checks"].Checks("triton")
    assert script.check_programs(checks) is None
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\necho 'error while loading shared libraries: libpython3.10.so.1.0' >&2\nexit 127\n")
    stub.chmod(0o755)
    found = script.Installation(stub, tmp_path, stub, tmp_path)
    monkeypatch.setattr(script, "find_installation", lambda: found)
    assert script.check_programs(checks) is None
    assert checks.write(tmp_path / "triton.json") == 1
    errors = [check["facts"]["error"] for check in json.loads((tmp_path / "triton.json").read_text())["checks"]]
    assert "tritonserver is not installed" in errors[0]
    assert "libpython3.10.so.1.0" in errors[1]


def test_an_answers_texts_and_arrays_are_read(modules: Mapping[str, ModuleType]) -> None:
    outputs = [
        {"name": "preds", "datatype": "FP32", "shape": [1, 2, 1], "parameters": {"binary_data_size": 8}},
        {"name": "cache", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 7}},
    ]
    head = json.dumps({"outputs": outputs}).encode()
    tail = np.array([0.5, 2], np.float32).tobytes() + b"\x03\0\0\0hit"
    read = modules["triton_client"].outputs_of(head + tail, len(head))
    assert read["preds"].tolist() == [[[0.5], [2.0]]]
    assert read["cache"].item() == b"hit"
    with pytest.raises(ValueError, match="1 bytes of the answer belong to no output"):
        modules["triton_client"].outputs_of(head + tail + b"x", len(head))
