"""What `hstu-compile triton` writes, when it writes nothing, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from hstu_compile.__main__ import main
from hstu_compile.errors import BundleError, UsageError
from hstu_compile.runtime.ranking_spec import ContextualFeature, IdFeature
from hstu_compile.serving import new_models, repository
from hstu_compile.serving.repository import RepositoryRequest, write_repository
from hstu_compile.serving.settings import RuntimeSettings, Scheduling
from tests.ranking_fakes import spec_of
from tests.triton_bundles import EMBEDDINGS, RETRIEVAL, Tensor, graph_of, write_bundle


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_python_model_holds_the_bundle_and_what_a_client_needs(tmp_path: Path):
    bundle = write_bundle(tmp_path / "model.hstu")
    facts = write_repository(RepositoryRequest(bundle, tmp_path / "models"))
    assert (facts["backend"], facts["model"]) == ("python", "model")
    written = names(tmp_path / "models")
    assert written >= {
        "launch.sh",
        *(f"model/{name}" for name in ("config.pbtxt", "deployment.json", "SHA256SUMS", "requirements.txt")),
        *(f"model/{name}" for name in ("client_http.py", "client_grpc.py", "requests.json")),
        *(f"model/1/{name}" for name in ("model.py", "bundle/manifest.json", "bundle/model.onnx")),
    }
    assert (tmp_path / "models" / "launch.sh").stat().st_mode & 0o111
    requirements = (tmp_path / "models" / "model" / "requirements.txt").read_text()
    assert "hstu-compile[cpu]==" in requirements
    assert "numpy>=1.26,<2" in requirements
    deployment = json.loads((tmp_path / "models" / "model" / "deployment.json").read_text())
    assert deployment["bundle_sha256"] == hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        (RuntimeSettings(device="gpu"), "[gpu]"),
        (RuntimeSettings(runtime="tensorrt"), "[gpu]"),
        (RuntimeSettings(runtime="tensorrt-rtx"), "[rtx]"),
    ],
)
def test_requirements_are_those_of_the_runtime(tmp_path: Path, settings: RuntimeSettings, extra: str):
    bundle = write_bundle(tmp_path / "model.hstu", engine=None if settings.device == "gpu" else settings.runtime)
    write_repository(RepositoryRequest(bundle, tmp_path / "models", "python", settings=settings))
    assert f"hstu-compile{extra}==" in (tmp_path / "models" / "model" / "requirements.txt").read_text()
    assert "KIND_GPU" in (tmp_path / "models" / "model" / "config.pbtxt").read_text()


def test_tensorrt_model_holds_engine_plugin_and_graph(tmp_path: Path):
    bundle = write_bundle(tmp_path / "model.hstu", engine="tensorrt", plugin=b"plugin")
    facts = write_repository(RepositoryRequest(bundle, tmp_path / "models", checked=False))
    assert facts["backend"] == "tensorrt"
    model = tmp_path / "models" / "model"
    assert (model / "1" / "model.plan").read_bytes() == b"engine"
    assert (model / "libhstu_trt_plugin.so").read_bytes() == b"plugin"
    assert not [note for note in facts["notes"] if "no TensorRT engine" in note or "no plugin" in note]
    assert "1/model.py" not in names(model)


def test_a_tensorrt_model_stands_behind_its_check_unless_told_otherwise(tmp_path: Path):
    bundle = write_bundle(tmp_path / "model.hstu", engine="tensorrt", plugin=b"plugin")
    request = RepositoryRequest(bundle, tmp_path / "models", execution_env=PurePosixPath("/env.tar.gz"))
    facts = write_repository(request)
    assert (facts["backend"], facts["steps"]) == ("tensorrt", ["model_check", "model_engine"])
    models = tmp_path / "models"
    common = {"config.pbtxt", "deployment.json", "SHA256SUMS"}
    clients = {"client_http.py", "client_grpc.py", "requests.json"}
    assert names(models / "model") == common | clients | {"1/README"}
    warmup = {f"warmup/request_{i}_{name}" for i in range(3) for name, _, _ in RETRIEVAL if name != "seq_offsets"}
    check = {"requirements.txt", "1/model.py", "1/manifest.json"}
    assert names(models / "model_check") == common | warmup | check
    engine = {"1/model.plan", "model.onnx", "libhstu_trt_plugin.so"}
    assert names(models / "model_engine") == common | warmup | engine
    assert (models / "model_check" / "requirements.txt").read_text().count("hstu-compile==") == 1
    config = (models / "model_check" / "config.pbtxt").read_text()
    assert 'key: "EXECUTION_ENV_PATH"' in config
    assert {line.split('"')[1] for line in config.splitlines() if 'key: "hstu_' in line} == {
        "hstu_truncation",
        "hstu_unknown_ids",
        "hstu_lost_process",
    }
    deployed = [json.loads((models / name / "deployment.json").read_text()) for name in ("model", *facts["steps"])]
    assert [(each["model"], each["backend"], each["steps"]) for each in deployed] == [
        ("model", "tensorrt", ["model_check", "model_engine"]),
        ("model_check", "python", []),
        ("model_engine", "tensorrt", []),
    ]
    assert [note for note in facts["notes"] if "let clients reach model alone" in note]
    for each in ("model", *facts["steps"]):
        done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=models / each, check=False)
        assert done.returncode == 0


def test_the_engine_behind_a_check_is_the_one_without(tmp_path: Path):
    bundle = write_bundle(tmp_path / "model.hstu", engine="tensorrt")
    for folder, checked in (("a", True), ("b", False)):
        write_repository(RepositoryRequest(bundle, tmp_path / folder, checked=checked))
    behind, alone = tmp_path / "a" / "model_engine", tmp_path / "b" / "model"
    config = (behind / "config.pbtxt").read_text()
    assert config.replace('"model_engine"', '"model"') == (alone / "config.pbtxt").read_text()
    assert (behind / "1" / "model.plan").read_bytes() == (alone / "1" / "model.plan").read_bytes()


@pytest.mark.parametrize("changes", [{"checked": False}, {"backend": "python"}])
def test_the_steps_of_a_model_go_when_it_is_replaced_by_one_without(tmp_path: Path, changes: dict[str, Any]):
    bundle = write_bundle(tmp_path / "model.hstu", engine="tensorrt")
    for name in ("model", "other"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", name=name))
    write_repository(RepositoryRequest(bundle, tmp_path / "models", force=True, **changes))
    assert {path.name for path in (tmp_path / "models").iterdir()} == {
        "launch.sh",
        "model",
        *("other", "other_check", "other_engine"),
    }


def test_a_step_that_is_not_ours_is_never_replaced(tmp_path: Path):
    theirs = tmp_path / "models" / "model_engine" / "config.pbtxt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    bundle = write_bundle(tmp_path / "model.hstu", engine="tensorrt")
    with pytest.raises(BundleError, match=r"(?s)HSTU-E801.*model_engine exists.*it is not ours"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", force=True))
    assert names(tmp_path / "models") == {"model_engine/config.pbtxt"}


def test_models_that_cannot_all_be_put_in_place_leave_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = write_bundle(tmp_path / "model.hstu", engine="tensorrt")
    write_repository(RepositoryRequest(bundle, tmp_path / "models"))
    before = {name: (tmp_path / "models" / name).read_bytes() for name in names(tmp_path / "models")}
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        # The engine is in place by then.
        if source.name.startswith(".model_check.") and source.suffix == ".partial":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(new_models.os, "rename", full)
    with pytest.raises(BundleError, match=r"(?s)HSTU-E802.*No space left"):
        write_repository(
            RepositoryRequest(bundle, tmp_path / "models", settings=RuntimeSettings(truncation="keep_last"), force=True)
        )
    assert {name: (tmp_path / "models" / name).read_bytes() for name in names(tmp_path / "models")} == before


def test_an_input_named_as_an_output_of_the_check_is_refused(tmp_path: Path):
    inputs = [*RETRIEVAL, ("truncated", "int32", ["L"])]
    bundle = write_bundle(tmp_path / "model.hstu", inputs=inputs)
    with pytest.raises(BundleError, match=r"(?s)HSTU-E804.*named truncated"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", "tensorrt"))


@pytest.mark.parametrize("engine", [None, "tensorrt-rtx"])
def test_an_engine_that_the_backend_cannot_load_is_not_written_and_the_note_says_how_to_build_one(
    tmp_path: Path, engine: str | None
):
    bundle = write_bundle(tmp_path / "model.hstu", engine=engine)
    facts = write_repository(RepositoryRequest(bundle, tmp_path / "models", "tensorrt", checked=False))
    assert "1/model.plan" not in names(tmp_path / "models" / "model")
    (note,) = [note for note in facts["notes"] if "no TensorRT engine" in note]
    assert "hstu-compile engine" in note
    assert "--max-batch 6" in note
    assert write_repository(RepositoryRequest(bundle, tmp_path / "auto"))["backend"] == "python"


def test_a_failed_verification_is_said(tmp_path: Path):
    bundle = write_bundle(tmp_path / "model.hstu", status="FAIL")
    notes = write_repository(RepositoryRequest(bundle, tmp_path / "models"))["notes"]
    assert "the bundle's verification says FAIL" in notes


def test_checksums_cover_every_file_but_the_configuration(tmp_path: Path):
    write_repository(RepositoryRequest(write_bundle(tmp_path / "model.hstu"), tmp_path / "models"))
    model = tmp_path / "models" / "model"
    lines = (model / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == names(model) - {"config.pbtxt", "SHA256SUMS"}
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=model, check=False)
    assert done.returncode == 0


def test_warm_up_files_hold_the_first_requests(tmp_path: Path):
    write_repository(RepositoryRequest(write_bundle(tmp_path / "model.hstu"), tmp_path / "models"))
    model = tmp_path / "models" / "model"
    requests = json.loads((model / "requests.json").read_text())["data"]
    assert [request["item_ids"]["shape"] for request in requests[:2]] == [[1], [20]]
    for index, request in enumerate(requests[:3]):
        for name, dtype in (("item_ids", np.int32), ("timestamps", np.int64), ("request_timestamps", np.int64)):
            stored = np.frombuffer((model / "warmup" / f"request_{index}_{name}").read_bytes(), dtype)
            assert stored.tolist() == request[name]["content"]


def test_a_model_is_replaced_by_force_alone_and_others_stay(tmp_path: Path):
    bundle = write_bundle(tmp_path / "model.hstu")
    for name in ("a", "b"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", name=name))
    with pytest.raises(BundleError, match=r"(?s)HSTU-E801.*pass --force"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", name="a"))
    (tmp_path / "models" / "a" / "1" / "stale").write_text("x")
    write_repository(RepositoryRequest(bundle, tmp_path / "models", name="a", force=True))
    assert not (tmp_path / "models" / "a" / "1" / "stale").exists()
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"a", "b", "launch.sh"}


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path):
    (tmp_path / "models" / "model").mkdir(parents=True)
    (tmp_path / "models" / "model" / "config.pbtxt").write_text("theirs")
    bundle = write_bundle(tmp_path / "model.hstu")
    with pytest.raises(BundleError, match=r"(?s)HSTU-E801.*it is not ours.*another --name"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", force=True))
    assert (tmp_path / "models" / "model" / "config.pbtxt").read_text() == "theirs"


def test_a_write_that_fails_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = write_bundle(tmp_path / "model.hstu")
    write_repository(RepositoryRequest(bundle, tmp_path / "models"))
    before = {name: (tmp_path / "models" / name).read_bytes() for name in names(tmp_path / "models")}

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository, "_write_checksums", full)
    with pytest.raises(BundleError, match=r"(?s)HSTU-E802.*No space left.*free some disk space"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", force=True))
    assert {name: (tmp_path / "models" / name).read_bytes() for name in names(tmp_path / "models")} == before


EXTERNAL: list[Tensor] = [("movie_id", "float32", ["L", 6]), *RETRIEVAL]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (EXTERNAL, EMBEDDINGS, "movie_id has rows of 6 numbers.*--embeddings inside"),
        (RETRIEVAL[:2] + RETRIEVAL[3:], EMBEDDINGS, "it has no offsets"),
        (RETRIEVAL, [("preds", "float32", ["T", 2])], "preds has a row per candidate, and no input"),
    ],
)
def test_graphs_that_ragged_batching_cannot_serve_are_refused_by_name(
    tmp_path: Path, inputs: list[Tensor], outputs: list[Tensor], message: str
):
    bundle = write_bundle(tmp_path / "model.hstu", inputs=inputs, outputs=outputs)
    with pytest.raises(BundleError, match=f"(?s)HSTU-E804.*TensorRT backend cannot serve.*{message}"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", "tensorrt"))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("item_ids", "float64", ["L"]), "item_ids float64.*its type is none of int32"),
        (("item_ids", "int32", ["N"]), "item_ids.*axis N counts neither users"),
        (("item_ids", "int32", ["L", "k"]), "item_ids.*at most one of fixed size"),
        (("item_ids", "int32", ["L", 2, 2]), "item_ids.*at most one of fixed size"),
        (("item_ids", "int32", []), "item_ids.*one axis that counts"),
        (("seq_offsets", "int64", ["B_plus_1"]), "seq_offsets is int64; Triton makes offsets of int32"),
        (("candidate_offsets", "int32", ["B_plus_1"]), "candidate_offsets: no input has candidates"),
        (("other_offsets", "int32", ["B_plus_1"]), "other_offsets: offsets of what is not known"),
    ],
)
@pytest.mark.parametrize("backend", ["python", "tensorrt"])
def test_inputs_that_are_no_requests_are_refused_by_name(tmp_path: Path, backend: Any, changed: Tensor, message: str):
    inputs = [each for each in RETRIEVAL if each[0] != changed[0]] + [changed]
    bundle = write_bundle(tmp_path / "model.hstu", inputs=inputs)
    with pytest.raises(BundleError, match=f"(?s)HSTU-E804.*{message}"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", backend))


def test_a_manifest_that_is_not_its_graphs_is_refused(tmp_path: Path):
    other = [("item_ids", "int64", ["L"]), *RETRIEVAL[1:], ("ratings", "int32", ["L"])]
    bundle = write_bundle(tmp_path / "model.hstu", graph=graph_of(other, EMBEDDINGS))
    with pytest.raises(BundleError, match="HSTU-E804") as refusal:
        write_repository(RepositoryRequest(bundle, tmp_path / "models", "tensorrt"))
    assert refusal.value.context["problems"] == [
        "input item_ids is int64 ['L'] in the graph and int32 ['L'] in the manifest",
        "input ratings is int32 ['L'] in the graph and absent in the manifest",
    ]


def test_a_feature_named_as_the_key_of_the_cache_is_refused(tmp_path: Path):
    bundle = write_bundle(tmp_path / "model.hstu", inputs=[*RETRIEVAL, ("user_key", "int32", ["B"])])
    with pytest.raises(BundleError, match=r"(?s)HSTU-E804.*named user_key"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "python", "scheduling": Scheduling(cuda_graphs=True)}, "--cuda-graphs and --backend python"),
        ({"backend": "tensorrt", "execution_env": "/env", "checked": False}, "--execution-env and --unchecked"),
        ({"backend": "python", "checked": False}, "--unchecked and --backend python"),
        ({"backend": "tensorrt", "settings": RuntimeSettings(unknown_ids="clamp")}, "--unknown-ids is for ranking"),
        ({"settings": RuntimeSettings(runtime="tensorrt")}, "--runtime tensorrt has nothing to run"),
        ({"settings": RuntimeSettings(unknown_ids="clamp")}, "--unknown-ids is for ranking models"),
        ({"name": "a/b"}, "cannot be named 'a/b'"),
        ({"name": ".hidden"}, "cannot be named '.hidden'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    bundle = write_bundle(tmp_path / "model.hstu")
    with pytest.raises(UsageError, match=f"(?s)HSTU-E901.*{message}"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", **changes))
    assert not (tmp_path / "models").exists()


def test_a_device_for_an_engine_is_refused(tmp_path: Path):
    bundle = write_bundle(tmp_path / "model.hstu", engine="tensorrt")
    settings = RuntimeSettings(runtime="tensorrt", device="gpu")
    with pytest.raises(UsageError, match="--device is ONNX Runtime's"):
        write_repository(RepositoryRequest(bundle, tmp_path / "models", "python", settings=settings))


def test_a_ranking_model_with_external_embeddings_is_served_by_the_python_backend(tmp_path: Path):
    spec = spec_of(
        history_ids=(IdFeature("movie_id", 50, 6),),
        contextual=(ContextualFeature("user_id", 30, 6, 1, 0), ContextualFeature("devices", 5, 6, 2, 0)),
        candidate_ids=(IdFeature("item_movie_id", 50, 6),),
    )
    shapes = {"movie_id": "L", "user_id": "B", "devices": "B_times_2", "item_movie_id": "T"}
    rows = [(name, "float32", [axis, 6]) for name, axis in shapes.items()]
    bundle = write_bundle(
        tmp_path / "model.hstu",
        inputs=[*rows, ("seq_offsets", "int32", ["B_plus_1"])],
        outputs=[("preds", "float32", ["T", 2])],
        ranking=spec.to_dict(),
    )
    write_repository(RepositoryRequest(bundle, tmp_path / "models"))
    model = tmp_path / "models" / "model"
    assert (model / "config.pbtxt").read_text().count("  dims: -1\n  dims: 6\n") == len(shapes)
    request = json.loads((model / "requests.json").read_text())["data"][0]
    assert {name: request[name]["shape"][1] for name in shapes} == dict.fromkeys(shapes, 6)
    assert [request[name]["shape"][0] for name in ("movie_id", "user_id", "devices")] == [1, 1, 2]


def test_cuda_graphs_name_every_input_and_cover_batches_by_powers_of_two(tmp_path: Path):
    bundle = write_bundle(tmp_path / "model.hstu", limits={"max_batch": 6})
    scheduling = Scheduling(cuda_graphs=True)
    write_repository(RepositoryRequest(bundle, tmp_path / "models", "tensorrt", scheduling=scheduling, checked=False))
    text = (tmp_path / "models" / "model" / "config.pbtxt").read_text()
    specs = text.split("graph_spec {")[1:]
    assert [int(spec.split("batch_size: ")[1].split("\n")[0]) for spec in specs] == [
        size for size in (1, 2, 4, 6) for _ in range(3)
    ]
    for spec in specs:
        assert all(spec.count(f'key: "{name}"') == 2 for name, _, _ in RETRIEVAL)


def test_command_line_prints_what_is_to_be_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle = write_bundle(tmp_path / "model.hstu")
    command = ["triton", str(bundle), "-o", str(tmp_path / "models"), "--backend", "tensorrt", "--unchecked"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'models' / 'model'}  tensorrt backend")
    assert "note: the TensorRT backend checks no ids" in printed.err
    assert main([*command, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "tensorrt"
    assert main(command) == BundleError.exit_code
    assert "HSTU-E801" in capsys.readouterr().err
