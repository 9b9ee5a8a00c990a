"""What lies in a bundle, and that its checks catch an artifact that is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hstu_compile.op_schema import is_attention
from hstu_compile.polygraphy_files import load_feeds, load_outputs, run_polygraphy, save_outputs
from tests.e2e.conftest import Build, hstu_compile

pytestmark = pytest.mark.e2e

FILES = {
    "model.onnx",
    "feeds.json",
    "eager_outputs.json",
    "reference_outputs.json",
    "report.json",
    "report.html",
    "manifest.json",
}


def manifest_of(bundle: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return content


def rehash(bundle: Path) -> None:
    """Let the manifest vouch for the files as they are now: only the verification can notice then."""
    manifest = manifest_of(bundle)
    for name, facts in manifest["files"].items():
        content = (bundle / name).read_bytes()
        facts.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A bundle that a test may damage."""
    return lambda bundle: shutil.copytree(bundle, tmp_path / "copy.hstu")


@pytest.mark.parametrize("precision", ["--fp32", "--fp16", "--bf16"])
def test_a_build_passes_and_its_manifest_vouches_for_every_file(build_small: Build, precision: str) -> None:
    built = build_small(precision, "--top-k", 10)
    assert built.result.exit_code == 0, built.result.stderr
    last = built.result.stdout.strip().splitlines()[-1]
    assert str(built.path) in last
    assert "PASS" in last
    manifest = manifest_of(built.path)
    assert manifest["status"] == "PASS"
    present = {file.name for file in built.path.iterdir()}
    assert present >= FILES
    assert set(manifest["files"]) == present - {"manifest.json"}
    for name, facts in manifest["files"].items():
        content = (built.path / name).read_bytes()
        assert (facts["bytes"], facts["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_the_manifest_says_what_was_built(build_small: Build) -> None:
    built = build_small("--fp16", "--top-k", 10)
    manifest = manifest_of(built.path)
    checkpoint = built.path.with_name("small.pt")
    assert manifest["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert manifest["precision"]["requested"] == "fp16"
    # Two layers of two norms and two projections; the last layer has those in front of attention twice, once for the
    # rows that are read and once for the keys and values of all. The list of best items is float32.
    assert manifest["precision"]["built"] == {
        "HstuAttention fp16": 2,
        "HstuNorm fp16": 5,
        "MatMul fp16": 5,
        "MatMul fp32": 1,
    }
    assert [(i["name"], i["dtype"], i["shape"]) for i in manifest["inputs"]] == [
        ("item_ids", "int32", ["L"]),
        ("timestamps", "int64", ["L"]),
        ("seq_offsets", "int32", ["B_plus_1"]),
        ("request_timestamps", "int64", ["B"]),
    ]
    assert [(o["name"], o["dtype"], o["shape"]) for o in manifest["outputs"]] == [
        ("user_embeddings", "float32", ["B", 32]),
        ("top_items", "int32", ["B", 10]),
        ("top_scores", "float32", ["B", 10]),
    ]
    assert manifest["limits"] == {"num_items": 40, "num_ratings": 0, "max_batch": 64, "max_seq_len": 20}
    assert manifest["operator"] == {"name": "HstuAttention", "namespace": "hstu", "version": "1", "nodes": 2}


def test_the_shipped_graph_has_the_served_outputs_only_and_no_paths(build_small: Build) -> None:
    built = build_small("--fp16", "--top-k", 10)
    model = onnx.load(built.path / "model.onnx")
    assert [output.name for output in model.graph.output] == ["user_embeddings", "top_items", "top_scores"]
    texts = [file for file in built.path.iterdir() if file.suffix in (".json", ".html")]
    assert len(texts) >= 6
    for file in texts:
        assert str(built.path.parent) not in file.read_text(), file.name


@pytest.mark.parametrize("precision", ["--fp32", "--bf16"])
def test_the_recorded_polygraphy_command_passes_and_fails_on_an_altered_output(
    build_small: Build, copy_of: Callable[[Path], Path], precision: str
) -> None:
    built = build_small(precision, "--top-k", 10)
    report = json.loads((built.path / "report.json").read_text())
    (recorded,) = report["verification"]["polygraphy"]
    (graph,) = manifest_of(built.path)["graphs"]
    arguments = graph["verification"]["polygraphy_arguments"]
    assert recorded["command"] == "polygraphy " + " ".join(arguments)
    assert recorded["exit_code"] == 0
    assert run_polygraphy(built.path, arguments).exit_code == 0
    copy = copy_of(built.path)
    outputs = load_outputs(copy / "eager_outputs.json")
    outputs[1] = {**outputs[1], "user_embeddings": outputs[1]["user_embeddings"] * np.float32(0.9)}
    save_outputs(copy / "eager_outputs.json", "altered", outputs)
    assert run_polygraphy(copy, arguments).exit_code == 1


def test_feeds_and_outputs_survive_their_files_bit_by_bit(build_small: Build) -> None:
    built = build_small("--fp32", "--top-k", 10)
    feeds = load_feeds(built.path / "feeds.json")
    assert [feed["item_ids"].dtype for feed in feeds] == [np.dtype(np.int32)] * len(feeds)
    exact = load_outputs(built.path / "reference_outputs.json")
    assert len(exact) == len(feeds)
    assert all(each["user_embeddings"].dtype == np.float64 for each in exact)
    assert any(np.abs(each["user_embeddings"] - each["user_embeddings"].astype(np.float32)).max() > 0 for each in exact)


@pytest.mark.parametrize("precision", ["--fp16", "--bf16"])
def test_verify_repeats_the_check(build_small: Build, precision: str) -> None:
    built = build_small(precision, "--top-k", 10)
    result = hstu_compile("verify", built.path)
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "PASS" in result.stdout.splitlines()[-1]


def flip_a_weight(model: onnx.ModelProto) -> None:
    weight = max((t for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] == 32), key=lambda t: t.dims[1])
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] *= -1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


def shift_the_mask(model: onnx.ModelProto) -> None:
    """Let each row see the next one too: `causal` is j <= i, the first comparison of its kind in the body."""
    for function in (each for each in model.functions if each.name == "HstuAttention"):
        node = next(n for n in function.node if n.op_type == "LessOrEqual" and n.input[1].startswith("unsqueeze"))
        node.op_type = "Less"


def change_an_attribute(model: onnx.ModelProto) -> None:
    """As the wrong attribute of a node shows in the body that was made for it: a divisor 10 % off."""
    for function in model.functions:
        for node in function.node:
            if node.op_type == "Constant":
                value = onnx.numpy_helper.to_array(node.attribute[0].t)
                if value.shape == () and value.dtype == np.float32 and value == 24.0:
                    node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.array(26.4, np.float32)))


def scale_the_output(model: onnx.ModelProto) -> None:
    """0.9 times the right user embeddings."""
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "user_embeddings":
                node.output[index] = "full"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.9, np.float32), "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["full", "factor"], ["user_embeddings"], name="scaled"))


DAMAGES = [
    (flip_a_weight, "--fp32"),
    (shift_the_mask, "--fp32"),
    (change_an_attribute, "--fp32"),
    (shift_the_mask, "--fp16"),
    (scale_the_output, "--bf16"),
]


@pytest.mark.parametrize(("damage", "precision"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_verify_fails_with_exit_6_on_a_graph_that_is_wrong(
    build_small: Build, copy_of: Callable[[Path], Path], damage: Callable[[onnx.ModelProto], None], precision: str
) -> None:
    bundle = copy_of(build_small(precision, "--top-k", 10).path)
    model = onnx.load(bundle / "model.onnx")
    before = model.SerializeToString(deterministic=True)
    damage(model)
    assert model.SerializeToString(deterministic=True) != before
    assert sum(is_attention(node) for node in model.graph.node) == 2
    onnx.save(model, bundle / "model.onnx")
    rehash(bundle)
    result = hstu_compile("verify", bundle)
    assert result.exit_code == 6, result.stdout + result.stderr
    assert "FAIL" in result.stdout.splitlines()[-1]


def test_a_file_that_was_altered_is_named_before_anything_runs(
    build_small: Build, copy_of: Callable[[Path], Path]
) -> None:
    bundle = copy_of(build_small("--fp32", "--top-k", 10).path)
    model = onnx.load(bundle / "model.onnx")
    flip_a_weight(model)
    onnx.save(model, bundle / "model.onnx")
    result = hstu_compile("verify", bundle)
    assert result.exit_code == 8
    assert "model.onnx has another sha256" in result.stderr


def test_inspect_lists_inputs_and_outputs_of_a_bundle(build_small: Build) -> None:
    built = build_small("--fp16", "--top-k", 10)
    result = hstu_compile("inspect", built.path, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    manifest = manifest_of(built.path)
    assert facts["kind"] == "bundle"
    assert facts["inputs"] == manifest["inputs"]
    assert facts["outputs"] == manifest["outputs"]
    plain = hstu_compile("inspect", built.path)
    assert plain.exit_code == 0
    assert "user_embeddings" in plain.stdout


def test_inspect_lists_the_tensors_of_a_checkpoint(build_small: Build) -> None:
    checkpoint = build_small("--fp16", "--top-k", 10).path.with_name("small.pt")
    result = hstu_compile("inspect", checkpoint, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert (facts["kind"], facts["dialect"]) == ("checkpoint", "native")
    assert facts["config"]["layer"]["attention"]["attention_dim"] == 25
    tensors = {tensor["name"]: tensor["shape"] for tensor in facts["tensors"]}
    assert tensors["item_embedding.weight"] == [41, 32]
    assert facts["parameters"] == sum(int(np.prod(shape)) for shape in tensors.values())


def test_building_twice_writes_the_same_model(build_small: Build, tmp_path: Path) -> None:
    built = build_small("--fp16", "--top-k", 10)
    checkpoint = built.path.with_name("small.pt")
    again = tmp_path / "again.hstu"
    command = ("build", checkpoint, "-o", again, "--fp16", "--top-k", 10, "--backend", "onnx", "--no-verify")
    assert hstu_compile(*command).exit_code == 0
    assert (again / "model.onnx").read_bytes() == (built.path / "model.onnx").read_bytes()
    assert manifest_of(again)["status"] == "NOT VERIFIED"
    refused = hstu_compile("verify", again)
    assert refused.exit_code == 8
    assert "--no-verify" in refused.stderr
