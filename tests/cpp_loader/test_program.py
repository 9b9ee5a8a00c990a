"""hstu_score from end to end on fakes of TensorRT 8 and 10 and of CUDA: answers, graphs, cache, soak, refusals."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu_compile.polygraphy_files import load_feeds, load_outputs, save_outputs
from tests.cpp_loader.conftest import SANITIZER, Loader
from tests.cpp_loader.fake_bundle import (
    MAX_SEQ_LEN,
    RANKING,
    packed_answers,
    packed_feeds,
    read_manifest,
    retrieval_answers,
    retrieval_feeds,
    write_manifest,
)
from tests.cpp_loader.program_facts import BUNDLE, DIFFERENT, ENGINE, GROWTH, NO_GPU, QUICK, REQUEST, USAGE, stored


@pytest.fixture
def retrieval(loader: Loader, tmp_path: Path) -> Path:
    return loader.bundle(tmp_path, "retrieval")


@pytest.fixture
def ranking(loader: Loader, tmp_path: Path) -> Path:
    return loader.bundle(tmp_path, "ranking")


@pytest.mark.parametrize("graphs", [0, 2, 16])
def test_a_retrieval_bundle_is_run_compared_and_measured(
    loader: Loader, retrieval: Path, tmp_path: Path, graphs: int
) -> None:
    (tmp_path / "out").mkdir()
    words = ["--cuda-graphs", graphs, "--iterations", 5, "--outputs", tmp_path / "out", "--csv", tmp_path / "rows.csv"]
    report = loader.report(retrieval, *words)
    assert report["status"] == "PASS"
    assert [row["passed"] for row in report["comparisons"]] == [True] * 4
    assert report["cases"] == ["one event", "mixed", "longest", "no events"]
    assert report["tensorrt"] == ".".join(map(str, loader.version))
    feeds = load_feeds(retrieval / "feeds.json")
    for index, feed in enumerate(feeds):
        answer = stored(tmp_path / "out" / f"{index}.npz")["user_embeddings"]
        np.testing.assert_allclose(answer, retrieval_answers(feed)["user_embeddings"], rtol=0, atol=1e-5)
    # Two graphs for four shapes: the cache of graphs evicts, and answers stay the same.
    assert (report["graphs"]["captures"] > 0) == (graphs > 0)
    assert (report["graphs"]["replays"] > 0) == (graphs > 0)
    assert (report["graphs"]["evictions"] > 0) == (graphs == 2)
    assert report["graphs"]["failures"] == 0
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f"retrieval.hstu retrieval: {name}" for name in report["cases"]]
    for row in rows:
        assert 0 < float(row["p50_ms"]) <= float(row["p90_ms"]) <= float(row["p99_ms"])
        assert float(row["device_p50_ms"]) < float(row["p50_ms"])
        assert float(row["max_err"]) <= float(row["err_bound"])


def test_rows_are_appended_under_one_header(loader: Loader, retrieval: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert loader.run(retrieval, "--iterations", 1, "--csv", tmp_path / "rows.csv").returncode == 0
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 4
    assert sum(line.startswith("case,") for line in lines) == 1


@pytest.mark.parametrize("graph", ["packed", "prefill", "score"])
@pytest.mark.parametrize("graphs", [0, 16])
def test_each_graph_of_a_ranking_bundle_runs_alone(loader: Loader, ranking: Path, graph: str, graphs: int) -> None:
    report = loader.report(ranking, "--graph", graph, "--cuda-graphs", graphs, *QUICK)
    outputs = len(RANKING.cached_names()) if graph == "prefill" else 2
    assert [row["passed"] for row in report["comparisons"]] == [True] * 3 * outputs


def cached_answers(folder: Path, count: int) -> list[dict[str, Any]]:
    return [stored(folder / f"{index}.npz") for index in range(count)]


@pytest.mark.parametrize("words", [(), ("--cuda-graphs", 0), ("--micro-batch", 3)], ids=["graphs", "plain", "short"])
def test_a_ranking_bundle_scores_with_the_cache_as_packed(
    loader: Loader, ranking: Path, tmp_path: Path, words: tuple[Any, ...]
) -> None:
    (tmp_path / "out").mkdir()
    report = loader.report(ranking, "--ranking", *QUICK, *words, "--outputs", tmp_path / "out")
    users = [f"{name}/{user}" for name, count in (("one", 1), ("mixed", 3), ("longest", 2)) for user in range(count)]
    assert report["cases"] == users
    assert all(row["passed"] for row in report["comparisons"])
    assert len(report["comparisons"]) == 2 * len(users)
    answers = iter(cached_answers(tmp_path / "out", len(users)))
    passes = 0
    for feed in load_feeds(ranking / "feeds.json"):
        events, asked = feed["seq_offsets"], feed["candidate_offsets"]
        for user in range(len(events) - 1):
            # Every request is a batch of its own, or the divisor would be that of the others.
            own, wanted = slice(*events[user : user + 2]), slice(*asked[user : user + 2])
            alone = {name: feed[name][own] for name in RANKING.history_names}
            alone |= {name: feed[name][wanted] for name in RANKING.candidate_names}
            alone |= {"user": feed["user"][2 * user : 2 * user + 2]}
            alone |= {"seq_offsets": np.array([0, own.stop - own.start])}
            alone |= {"candidate_offsets": np.array([0, wanted.stop - wanted.start])}
            answer, expected = next(answers), packed_answers(alone)
            for name in ("preds", "logits"):
                assert answer[name].dtype == np.float32
                np.testing.assert_allclose(answer[name], expected[name], rtol=0, atol=1e-5)
            passes += -(
                -(wanted.stop - wanted.start) // (3 if words[:1] == ("--micro-batch",) else RANKING.micro_batch)
            )
    assert np.ptp(np.concatenate([answer["logits"] for answer in cached_answers(tmp_path / "out", len(users))])) > 0.1
    # Each user with candidates: encoded once, scored in four rounds.
    assert (report["cache"]["misses"], report["cache"]["hits"]) == (5, 15)
    assert report["cache"]["prefill_passes"] == 5
    assert report["cache"]["score_passes"] == 4 * passes
    assert (report["graphs"]["replays"] > 0) == ("--cuda-graphs" not in words)


def test_the_least_recently_used_user_goes_first_and_answers_stay(loader: Loader, ranking: Path) -> None:
    """A cache of one long user and a bit: every round evicts, and every answer is that of the first run."""
    words = ["--kv-budget-kib", 9, "--streams", 2, "--soak", 400, *QUICK, "--max-growth-mib", 64]
    report = loader.report(ranking, "--ranking", *words)
    assert report["soak"]["different"] == 0
    assert report["cache"]["evictions"] > 20
    assert report["cache"]["used_bytes"] <= 2 * 9 * 1024


def test_a_cached_history_is_reused_only_for_what_it_was_made_from(
    readers: Path, loader10: Loader, tmp_path: Path
) -> None:
    bundle = loader10.bundle(tmp_path, "ranking")
    environment = {**os.environ, **SANITIZER, "LD_LIBRARY_PATH": str(loader10.folder)}
    command = [str(readers), "cache-rules", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_session_recovers_and_loads_only_what_it_has_hashed(readers: Path, loader10: Loader, tmp_path: Path) -> None:
    """Half a pair of staging buffers was taken for a whole one, and a replaced engine for the one that was hashed."""
    bundle = loader10.bundle(tmp_path, "retrieval")
    environment = {**os.environ, **SANITIZER, "LD_LIBRARY_PATH": str(loader10.folder)}
    command = [str(readers), "session-rules", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_user_larger_than_the_cache_is_refused(loader: Loader, ranking: Path) -> None:
    text = loader.refusal(REQUEST, ranking, "--ranking", *QUICK, "--kv-budget-kib", 2)
    assert "the KV cache is too small for user 'longest/0'" in text
    assert f"{MAX_SEQ_LEN + 2} rows take" in text


def test_two_streams_are_soaked_without_a_difference_or_growth(loader: Loader, retrieval: Path) -> None:
    report = loader.report(retrieval, "--soak", 2000, "--streams", 2, *QUICK, "--max-growth-mib", 64)
    assert (report["soak"]["requests"], report["soak"]["different"], report["streams"]) == (2000, 0, 2)
    assert report["soak"]["device_mib_after"] == report["soak"]["device_mib_before"] > 0
    assert report["soak"]["requests_per_s"] > 0
    assert report["graphs"]["replays"] > 1000


def test_a_wrong_bit_in_a_soak_is_found(loader: Loader, retrieval: Path) -> None:
    report = loader.report(retrieval, "--soak", 500, *QUICK, code=DIFFERENT, HSTU_FAKE_FLIP=97, **{})
    assert report["status"] == "FAIL: answers differ"
    assert report["soak"]["different"] >= 4


def test_memory_that_grows_in_a_soak_fails_it(loader: Loader, retrieval: Path) -> None:
    report = loader.report(retrieval, "--soak", 200, *QUICK, "--cuda-graphs", 0, code=GROWTH, HSTU_FAKE_LEAK=1 << 17)
    assert report["status"] == "FAIL: memory grew"
    assert report["soak"]["device_mib_after"] - report["soak"]["device_mib_before"] == pytest.approx(180 / 8)


def test_a_graph_that_depends_on_the_context_is_not_launched_for_other_shapes(loader: Loader, retrieval: Path) -> None:
    """Where copies from the host cannot be detached; the fake computes a wrong bit if one is read too late."""
    report = loader.report(retrieval, "--soak", 300, *QUICK, HSTU_FAKE_FIXED_COPIES=1)
    assert report["status"] == "PASS"
    assert report["graphs"]["captures"] > 0


def test_a_pass_that_cannot_be_recorded_is_run_without_a_graph(loader: Loader, retrieval: Path) -> None:
    report = loader.report(retrieval, *QUICK, HSTU_FAKE_NO_CAPTURE=1)
    assert report["status"] == "PASS"
    assert (report["graphs"]["captures"], report["graphs"]["failures"]) == (0, 4)


def test_an_infinite_reference_is_not_met(loader: Loader, retrieval: Path) -> None:
    """Infinity over infinity is no number, and no number is larger than a bound."""
    path = retrieval / "reference_outputs.json"
    outputs = load_outputs(path)
    outputs[1]["user_embeddings"][2, 0] = np.inf
    save_outputs(path, "eager-float64", outputs)
    write_manifest(retrieval, read_manifest(retrieval))
    report = loader.report(retrieval, *QUICK, code=DIFFERENT)
    assert [row["passed"] for row in report["comparisons"]] == [True, False, True, True]


def with_eager_error(bundle: Path, errors: dict[str, float]) -> None:
    manifest = read_manifest(bundle)
    manifest["graphs"][0]["verification"]["eager_error"] = errors
    write_manifest(bundle, manifest)


def test_an_infinite_error_of_the_eager_model_allows_nothing(loader: Loader, retrieval: Path) -> None:
    with_eager_error(retrieval, {"user_embeddings": np.inf})
    report = loader.report(retrieval, *QUICK, code=DIFFERENT)
    # The last feed has no events: its answer is zero, exactly as in float64.
    assert [row["passed"] for row in report["comparisons"]] == [False, False, False, True]
    assert [row["bound"] for row in report["comparisons"]] == [0.0] * 4


def test_a_reference_of_no_output_is_no_comparison(loader: Loader, retrieval: Path) -> None:
    with_eager_error(retrieval, {})
    report = loader.report(retrieval, *QUICK)
    assert (report["compared"], report["comparisons"]) == (False, [])


@pytest.mark.parametrize("words", [(), ("--ranking",)], ids=["packed", "ranking"])
def test_context_of_fewer_users_than_there_are_is_refused(
    loader: Loader, ranking: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """The rows of the last users would be read from behind the tensor."""
    feeds = packed_feeds([(3, 2), (4, 1), (2, 2)], seed=1)
    np.savez(tmp_path / "in.npz", **{**feeds, "user": feeds["user"][:2]})
    text = loader.refusal(REQUEST, ranking, *words, *QUICK, "--inputs", tmp_path / "in.npz")
    assert "user has 2 rows; 3 sequences of 2 make 6" in text


@pytest.mark.parametrize("factor", [0.0, 0.9])
def test_an_answer_that_is_not_the_references_fails(loader: Loader, retrieval: Path, factor: float) -> None:
    path = retrieval / "reference_outputs.json"
    outputs = load_outputs(path)
    outputs[1]["user_embeddings"][2] *= factor
    save_outputs(path, "eager-float64", outputs)
    write_manifest(retrieval, read_manifest(retrieval))
    report = loader.report(retrieval, "--iterations", 5, code=DIFFERENT)
    assert [row["passed"] for row in report["comparisons"]] == [True, False, True, True]
    assert report["measurements"] == [], "a wrong answer gets no time"


def test_given_feeds_are_answered(loader: Loader, retrieval: Path, tmp_path: Path) -> None:
    feeds = retrieval_feeds([4, 9], seed=5)
    np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
    report = loader.report(retrieval, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz", *QUICK)
    assert report["compared"] is False
    expected = retrieval_answers(feeds)["user_embeddings"]
    np.testing.assert_allclose(stored(tmp_path / "out.npz")["user_embeddings"], expected, rtol=0, atol=1e-5)
    raw = []
    for name, array in feeds.items():
        (tmp_path / name).write_bytes(array.tobytes())
        raw += ["--raw", f"{name}={tmp_path / name}"]
    loader.report(retrieval, *raw, "--outputs", tmp_path / "raw.npz", *QUICK)
    assert (tmp_path / "raw.npz").read_bytes() == (tmp_path / "out.npz").read_bytes()


def test_tensorrt8_says_which_reference_feeds_it_cannot_be_asked(loader8: Loader, tmp_path: Path) -> None:
    feeds = retrieval_feeds([4], seed=5)
    feeds["request_timestamps"] += 2**32
    np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
    bundle = loader8.bundle(tmp_path, "retrieval")
    text = loader8.refusal(REQUEST, bundle, "--inputs", tmp_path / "in.npz")
    assert "request_timestamps is int64, and int32 cannot hold it unchanged: element 0 is" in text


# What may be wrong with a request, by the words that say so.
BAD_FEEDS: dict[str, Any] = {
    "item_ids is missing": lambda feeds: feeds.pop("item_ids"),
    "extra is not an input": lambda feeds: feeds.update(extra=np.zeros(1)),
    "item_ids is float32": lambda feeds: feeds.update(item_ids=feeds["item_ids"].astype(np.float32)),
    "item_ids has shape [2, 2], not rank 1": lambda feeds: feeds.update(item_ids=np.zeros((2, 2), np.int32)),
    "timestamps has 3 rows where": lambda feeds: feeds.update(timestamps=feeds["timestamps"][:3]),
    "ids are 0..500": lambda feeds: feeds["item_ids"].fill(501),
    "seq_offsets ends at 3, and there are 4 rows": lambda feeds: feeds.update(seq_offsets=np.array([0, 3])),
    "seq_offsets begins at 1": lambda feeds: feeds.update(seq_offsets=np.array([1, 4])),
    "rows 9 to 4": lambda feeds: feeds.update(
        seq_offsets=np.array([0, 9, 4]), request_timestamps=np.zeros(2, np.int64)
    ),
    "at most 64 rows": lambda feeds: feeds.update(
        seq_offsets=np.array([0, 65]), item_ids=np.ones(65, np.int32), timestamps=np.zeros(65, np.int64)
    ),
    "has 1 entries; a batch of one sequence has 2": lambda feeds: feeds.update(
        seq_offsets=np.array([0]), request_timestamps=np.zeros(0, np.int64)
    ),
    "3 sequences and 2 offsets": lambda feeds: feeds.update(request_timestamps=np.zeros(3, np.int64)),
    "request_timestamps is [9], and the engine takes [1] to [8]": lambda feeds: feeds.update(
        seq_offsets=np.array([0] * 9 + [4]), request_timestamps=np.zeros(9, np.int64)
    ),
}


@pytest.mark.parametrize("text", BAD_FEEDS)
def test_a_wrong_request_is_refused_with_value_and_limit(
    loader: Loader, retrieval: Path, tmp_path: Path, text: str
) -> None:
    feeds = retrieval_feeds([4], seed=5)
    BAD_FEEDS[text](feeds)
    np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
    assert text in loader.refusal(REQUEST, retrieval, "--inputs", tmp_path / "in.npz")


# What may be wrong with a ranking request.
BAD_RANKING: dict[str, Any] = {
    "item[0] is 300; ids are 0..299": lambda feeds: feeds["item"].fill(300),
    "movie[0] is -1; ids are 0..299": lambda feeds: feeds["movie"].fill(-1),
    "user[0] is 100; ids are 0..99": lambda feeds: feeds["user"].fill(100),
    "time goes back at event 1": lambda feeds: (
        feeds["time"][:2].sort() or feeds.update(time=feeds["time"][::-1].copy())
    ),
    "candidate 0 is asked for before the last event": lambda feeds: feeds["query"].fill(5),
}


@pytest.mark.parametrize("text", BAD_RANKING)
def test_a_wrong_ranking_request_is_refused(loader: Loader, ranking: Path, tmp_path: Path, text: str) -> None:
    feeds = packed_feeds([(5, 3)], seed=1)
    BAD_RANKING[text](feeds)
    np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
    assert text in loader.refusal(REQUEST, ranking, "--ranking", "--inputs", tmp_path / "in.npz")


def edit_manifest(folder: Path, **changes: Any) -> None:
    write_manifest(folder, {**read_manifest(folder), **changes})


def backend(**changes: Any) -> dict[str, Any]:
    return {"name": "tensorrt", "version": "8.5.3", "compute_capabilities": [], **changes}


def test_without_a_driver_the_message_says_so(loader: Loader, retrieval: Path) -> None:
    done = loader.run(retrieval, fakes=False)
    if done.returncode != NO_GPU:
        pytest.skip("this machine has a CUDA driver")
    assert "no CUDA driver" in done.stderr
    assert "libcuda.so.1" in done.stderr


def test_without_a_device_the_drivers_word_is_shown(loader: Loader, retrieval: Path) -> None:
    text = loader.refusal(NO_GPU, retrieval, HSTU_FAKE_NO_DEVICE=1)
    assert "cuInit: CUDA_ERROR_NO_DEVICE (100)" in text
    assert "there is no CUDA device 3" in loader.refusal(NO_GPU, retrieval, "--device", 3)


def test_another_gpu_is_refused(loader: Loader, retrieval: Path) -> None:
    text = loader.refusal(ENGINE, retrieval, HSTU_FAKE_SM=80)
    assert "it was built for compute capability 9.0, and Fake GPU has 8.0" in text


def test_another_tensorrt_is_refused(loader: Loader, retrieval: Path) -> None:
    major = loader.version[0]
    text = loader.refusal(ENGINE, retrieval, HSTU_FAKE_TENSORRT_VERSION=8601 if major == 8 else 100300)
    built = ".".join(map(str, loader.version))
    assert f"it was built by {built}.1, and {'8.6.1' if major == 8 else '10.3.0'} is loaded" in text
    other = loader.refusal(ENGINE, retrieval, HSTU_FAKE_TENSORRT_VERSION=110000 if major == 8 else 8503)
    assert f"compiled with headers of TensorRT {major}" in other
    assert "cannot be loaded" in loader.refusal(ENGINE, retrieval, "--tensorrt-library", "libnowhere.so.7")
    driver = loader.folder / "libcuda.so.1"
    assert "is not TensorRT's runtime" in loader.refusal(ENGINE, retrieval, "--tensorrt-library", driver)


def test_a_gpu_without_memory_is_refused(loader: Loader, ranking: Path) -> None:
    text = loader.refusal(ENGINE, ranking, "--ranking", HSTU_FAKE_MEMORY_MIB=10)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in text
    assert "cuMemAlloc of 67108864 bytes" in text


def test_plugins_are_checked(loader: Loader, retrieval: Path, tmp_path: Path) -> None:
    own, other = loader.folder / "libfake_plugin.so", loader.folder / "libother_plugin.so"
    assert loader.report(retrieval, "--plugin", own, *QUICK)["plugin"] == str(own)
    text = loader.refusal(ENGINE, retrieval, "--plugin", other)
    assert "is not the plugin library that the bundle was built with" in text
    # A bundle that brings none: the engine asks for it, whoever loads it checks what it registered.
    (retrieval / "libhstu_trt_plugin.so").unlink()
    write_manifest(retrieval, read_manifest(retrieval))
    assert "could not find plugin: HstuAttention" in loader.refusal(ENGINE, retrieval)
    text = loader.refusal(ENGINE, retrieval, "--plugin", other)
    assert "no creator of name 'HstuAttention', version '1', namespace 'hstu'" in text
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    assert "cannot be loaded" in loader.refusal(ENGINE, retrieval, "--plugin", broken)
    assert loader.report(retrieval, "--plugin", own, *QUICK)["status"] == "PASS"


def test_damaged_bundles_are_refused(loader: Loader, retrieval: Path) -> None:
    engine = retrieval / "model.engine"
    engine.write_text(engine.read_text() + "x")
    (retrieval / "feeds.json").unlink()
    text = loader.refusal(BUNDLE, retrieval)
    assert "feeds.json is missing" in text
    assert "model.engine has sha256" in text
    write_manifest(retrieval, read_manifest(retrieval))
    assert "feeds.json is not vouched for" in loader.refusal(BUNDLE, retrieval)


def test_an_engine_that_is_none_is_refused(loader: Loader, retrieval: Path) -> None:
    (retrieval / "model.engine").write_bytes(bytes(1000))
    write_manifest(retrieval, read_manifest(retrieval))
    text = loader.refusal(ENGINE, retrieval)
    assert "cannot load model.engine" in text
    assert "not one that this library serialized" in text


def test_an_engine_of_other_inputs_is_refused(loader: Loader, retrieval: Path) -> None:
    path = retrieval / "model.engine"
    path.write_text(path.read_text().replace("in item_ids int32", "in item_names float32"))
    write_manifest(retrieval, read_manifest(retrieval))
    text = loader.refusal(BUNDLE, retrieval)
    assert "the inputs of model.engine are not the manifest's" in text
    assert "item_ids is missing" in text


# What may be wrong with a manifest: an edit of its text, and the words that say so.
BAD_MANIFESTS: dict[str, Any] = {
    "it is not JSON": lambda text: text[: len(text) // 2],
    "has bundle format 2": lambda text: text.replace('"format_version": 1', '"format_version": 2'),
    "it lacks 'graphs'": lambda text: text.replace('"graphs"', '"graph"'),
    "is not a plain file name": lambda text: text.replace('"feeds.json": {', '"../feeds.json": {'),
    "there is no element type 'complex64'": lambda text: text.replace('"int64"', '"complex64"'),
    "'int4' is none of fp32, fp16, bf16": lambda text: text.replace('"fp32"', '"int4"'),
    "it is a string, not a number": lambda text: text.replace('"max_seq_len": 64', '"max_seq_len": "64"'),
    "-64 is not an integer in 1..": lambda text: text.replace('"max_seq_len": 64', '"max_seq_len": -64'),
    "failed its own verification": lambda text: text.replace('"PASS"', '"FAIL"'),
    "it was built with the backend onnx": lambda text: text.replace('"name": "tensorrt"', '"name": "onnx"'),
}


@pytest.mark.parametrize("text", BAD_MANIFESTS)
def test_edited_manifests_are_refused(loader: Loader, retrieval: Path, text: str) -> None:
    path = retrieval / "manifest.json"
    content = path.read_text()
    changed = BAD_MANIFESTS[text](content)
    assert changed != content
    path.write_text(changed)
    assert text in loader.refusal(BUNDLE, retrieval)


def test_a_failed_bundle_runs_on_request(loader: Loader, retrieval: Path) -> None:
    edit_manifest(retrieval, status="FAIL")
    assert loader.report(retrieval, "--accept-failed", *QUICK)["status"] == "PASS"


def test_a_folder_that_is_no_bundle_is_refused(loader: Loader, tmp_path: Path) -> None:
    assert "it has no manifest.json" in loader.refusal(BUNDLE, tmp_path)
    assert "is not a bundle" in loader.refusal(BUNDLE, tmp_path / "nowhere")


def test_outputs_that_cannot_be_written_are_an_error(loader: Loader, retrieval: Path, tmp_path: Path) -> None:
    assert "cannot be written" in loader.refusal(BUNDLE, retrieval, *QUICK, "--outputs", tmp_path / "nowhere")
    missing = tmp_path / "nowhere" / "rows.csv"
    assert "cannot be written" in loader.refusal(BUNDLE, retrieval, "--iterations", 1, "--csv", missing)


BAD_WORDS = {
    "no bundle was named": (),
    "there is no option --fast": ("BUNDLE", "--fast"),
    "two bundles were named": ("BUNDLE", "another"),
    "--streams needs a value": ("BUNDLE", "--streams"),
    "--streams cannot be 0": ("BUNDLE", "--streams", "0"),
    "--soak cannot be -5": ("BUNDLE", "--soak", "-5"),
    "--iterations cannot be 1e3": ("BUNDLE", "--iterations", "1e3"),
    "--raw cannot be x": ("BUNDLE", "--raw", "x"),
    "--inputs and --raw do not go together": ("BUNDLE", "--inputs", "a.npz", "--raw", "a=b"),
    "--ranking runs three graphs": ("BUNDLE", "--ranking", "--graph", "packed"),
    "there are several reference feeds": ("BUNDLE", "--outputs", "a.npz"),
    "has no graph 'score'": ("BUNDLE", "--graph", "score"),
    "holds no ranking model": ("BUNDLE", "--ranking"),
}


@pytest.mark.parametrize("text", BAD_WORDS)
def test_wrong_options_are_refused(loader: Loader, retrieval: Path, text: str) -> None:
    words = [retrieval if word == "BUNDLE" else word for word in BAD_WORDS[text]]
    assert text in loader.refusal(USAGE, *words)


def test_errors_are_json_too(loader: Loader, tmp_path: Path) -> None:
    done = loader.run(tmp_path, "--json")
    content = json.loads(done.stdout)
    assert (content["exit_code"], content["failure"], done.returncode) == (BUNDLE, "bundle", BUNDLE)
    assert all(content[key] for key in ("what", "why", "fix"))


def test_a_bundle_is_inspected_without_a_gpu(loader: Loader, ranking: Path) -> None:
    done = loader.run(ranking, "--inspect", fakes=False)
    assert done.returncode == 0, done.stderr
    assert "graph score, engine score.engine" in done.stdout
    assert "  in  k_0 float32 [Lc, 2, 3]" in done.stdout
    content = json.loads(loader.run(ranking, "--inspect", "--json", fakes=False).stdout)
    assert [graph["name"] for graph in content["graphs"]] == ["packed", "prefill", "score"]


def test_a_bundle_works_wherever_it_is_copied(loader: Loader, retrieval: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(retrieval, tmp_path / "a folder, with a comma" / "copy")
    report = loader.report(f"{copy}/", *QUICK)
    assert report["bundle"] == "copy"
