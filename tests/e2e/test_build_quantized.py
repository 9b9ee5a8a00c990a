"""Quantised builds of both families: verified, built for TensorRT-RTX, checked again, refused where they must be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hstu_compile import build_plan, build_quantization
from hstu_compile.bundle import load_bundle
from hstu_compile.calibration.batches import retrieval_batches
from hstu_compile.calibration.site_statistics import SiteStatistics
from hstu_compile.calibration.table import CalibrationTable
from hstu_compile.environment import BackendChoice
from hstu_compile.recheck import stored_reference
from hstu_compile.session_check import check_session
from tests.calibrated_models import calibration_table
from tests.dlrm_reference import DlrmForm
from tests.e2e.conftest import CommandResult, hstu_compile, save_checkpoint, save_ranking_checkpoint
from tests.exported_models import small_config

# Both types quantise the same float16 graph.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.usefixtures("traced_once")]

FORM = DlrmForm(contextual=(("user_id", 1, 20),))
CONFIG = small_config(num_layers=2)
# Each family and each type, and each of the graphs that sessions need once; the other family in INT8 as slow tests.
CASES = {
    "retrieval-int8": ("retrieval", "--int8", "--top-k", 5, "--incremental", "max-append=4", "--smooth-quant", 0.5),
    "retrieval-fp8": ("retrieval", "--fp8", "--top-k", 5, "--observer", "mse", "--keep-fp16", "layers.0.uvqk"),
    "ranking-int8": ("ranking", "--int8", "--observer", "mse", "--keep-fp16", "layers.0.uvqk"),
    "ranking-fp8": ("ranking", "--fp8", "--m-falcon", "micro-batch=5"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, ...]]:
    """Arguments that name the checkpoint, its configuration and its table, by family."""
    folder = tmp_path_factory.mktemp("quantized")
    retrieval = save_checkpoint(folder / "retrieval.pt", CONFIG)
    ranking, config = save_ranking_checkpoint(folder, FORM)
    calibration_table(retrieval).save(folder / "retrieval.json")
    calibration_table(ranking, config).save(folder / "ranking.json")
    return {
        "retrieval": (retrieval, "--calib", folder / "retrieval.json"),
        "ranking": (ranking, "--config", config, "--calib", folder / "ranking.json"),
    }


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name == "ranking-int8" else ()) for name in CASES],
)
def built(
    request: pytest.FixtureRequest, sources: dict[str, tuple[object, ...]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CommandResult]:
    pytest.importorskip("tensorrt_rtx")
    family, *options = CASES[request.param]
    path = tmp_path_factory.mktemp("bundle") / f"{request.param}.hstu"
    target = ("--backend", "tensorrt-rtx", "--computeCapabilities", "8.9", "--max-batch", 8, "-o", path)
    return path, hstu_compile("build", *sources[family], *options, *target)


def test_a_quantised_build_passes_says_what_it_is_and_passes_again(built: tuple[Path, CommandResult]) -> None:
    path, result = built
    assert result.exit_code == 0, result.stderr
    assert "PASS" in result.stdout
    kind = path.stem.rpartition("-")[2]
    manifest = json.loads((path / "manifest.json").read_text())
    quantization = manifest["quantization"]
    assert quantization["kind"] == kind
    # Everything that serves float16 bundles serves this one.
    assert manifest["precision"]["requested"] == "fp16"
    report = json.loads((path / "report.json").read_text())
    for graph in report["graphs"]:
        products = graph["precision_counts"][f"MatMul {kind}"]
        layers = graph["engine"]["layers"]
        assert layers["quantized_products"] == layers["eight_bit_layers"] == products > 0
        model = onnx.load(path / graph["file"])
        quantized = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
        assert quantized == products
    first = report["graphs"][0]["passes"]
    counts = next(record["counts"] for record in first if record["name"] == "quantize_products")
    # The last layer's projection is two products where it is pruned.
    assert counts["products"] == len(quantization["sites"]) + 1
    assert all(0 < error < 1 for error in quantization["cost"].values()), quantization["cost"]
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "What the quantisation itself changes" in page
    assert all(name in page for name in (*quantization["sites"], *quantization["kept"]))
    checked = hstu_compile("verify", path, "--json")
    assert checked.exit_code == 0, checked.stdout + checked.stderr
    rule = json.loads(checked.stdout)["verification"]["bound_rule"]
    assert f"{kind} numbers of the plan" in rule


def test_options_of_the_plan_reach_the_manifest(built: tuple[Path, CommandResult]) -> None:
    path, _ = built
    quantization = json.loads((path / "manifest.json").read_text())["quantization"]
    smoothed = [site["smoothing"] is not None for site in quantization["sites"].values()]
    if path.stem == "retrieval-int8":
        assert (quantization["smooth_quant"], quantization["observer"]) == (0.5, "amax")
        assert all(smoothed)
        return
    assert not any(smoothed)
    if path.stem in ("retrieval-fp8", "ranking-int8"):
        assert quantization["observer"] == "mse"
        assert quantization["kept"]["layers.0.uvqk"] == "--keep-fp16"
        assert "layers.0.uvqk" not in quantization["sites"]
    else:
        assert quantization["observer"] == "percentile"
        assert "--keep-fp16" not in quantization["kept"].values()


def test_a_bundle_answers_requests(built: tuple[Path, CommandResult]) -> None:
    path, _ = built
    if not path.stem.startswith("retrieval"):
        pytest.skip("requests here are those of a retrieval model; sessions of ranking models ran in the build")
    batch = retrieval_batches(CONFIG, 4, 4, 1 << 20)[1]
    with load_bundle(path) as bundle:
        answers = bundle.run(batch.arrays)["user_embeddings"]
    lengths = np.linalg.norm(answers, axis=1)
    np.testing.assert_allclose(lengths[batch.lengths > 0], 1, rtol=1e-5)


def test_outputs_that_are_a_tenth_too_small_fail(built: tuple[Path, CommandResult]) -> None:
    """The worst row of a quantised tensor may be far off; the tensor as a whole may not."""
    path, _ = built
    manifest = json.loads((path / "manifest.json").read_text())
    reference = stored_reference(path, manifest["graphs"][0])

    class Scaled:
        name = "scaled"

        def run(self, arrays: dict[str, Any]) -> dict[str, Any]:
            index = next(i for i, feed in enumerate(reference.feeds) if feed.arrays is arrays)
            return {name: 0.9 * values for name, values in reference.exact[index].items()}

    check = check_session(Scaled(), "x", reference, "fp16", lambda *_: None)  # type: ignore[arg-type]
    failed = {each.feed for each in check.tensors if each.status == "FAIL"}
    assert "all feeds together, rms" in failed


@pytest.mark.parametrize(
    ("options", "exit_code", "code", "text"),
    [
        (("--int8", "--fp8"), 2, "HSTU-E901", "--int8 and --fp8 exclude each other"),
        (("--int8", "--fp32"), 2, "HSTU-E901", "--int8 and --fp32 exclude each other"),
        (("--fp8", "--bf16"), 2, "HSTU-E901", "--fp8 and --bf16 exclude each other"),
        (("--fp16",), 2, "HSTU-E901", "--calib cannot be used"),
        (("--int8", "--observer", "median"), 2, "HSTU-E901", "amax, percentile, entropy, mse"),
        (("--int8", "--smooth-quant", 2), 2, "HSTU-E901", "--smooth-quant 2 cannot be used"),
        (("--int8", "--keep-fp16", "layers.0.uvk"), 2, "HSTU-E905", "nearest: layers.0.uvqk"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_is_built(
    sources: dict[str, tuple[object, ...]], options: tuple[object, ...], exit_code: int, code: str, text: str
) -> None:
    result = hstu_compile("build", *sources["retrieval"], *options, "--dry-run")
    assert result.exit_code == exit_code
    assert code in result.stderr
    assert text in result.stderr


def test_a_table_is_needed_and_says_how_to_make_one(sources: dict[str, tuple[object, ...]]) -> None:
    result = hstu_compile("build", sources["retrieval"][0], "--int8", "--dry-run")
    assert result.exit_code == 2
    assert "HSTU-E907" in result.stderr
    assert "hstu-compile calibrate CKPT" in result.stderr


def test_a_stale_table_is_refused(sources: dict[str, tuple[object, ...]], tmp_path: Path) -> None:
    trained_on = save_checkpoint(tmp_path / "retrieval.pt", CONFIG, seed=1)
    result = hstu_compile("build", trained_on, "--int8", *sources["retrieval"][1:], "--dry-run")
    assert result.exit_code == 7
    assert "HSTU-E813" in result.stderr
    assert "stale" in result.stderr


def test_a_table_made_with_another_config_is_refused_by_the_name_of_what_differs(
    sources: dict[str, tuple[object, ...]], tmp_path: Path
) -> None:
    """The same checkpoint file with another --config computes other activations."""
    checkpoint, _, config, *table = sources["ranking"]
    values = json.loads(Path(str(config)).read_text())
    (tmp_path / "log.json").write_text(json.dumps({**values, "time_bucket_fn": "log"}))
    result = hstu_compile("build", checkpoint, "--config", tmp_path / "log.json", "--int8", *table, "--dry-run")
    assert result.exit_code == 7
    assert "HSTU-E813" in result.stderr
    assert 'time_bucket_fn is "sqrt" in the table and "log" here' in result.stderr
    assert "pass the --config that the table was made with" in result.stderr


def test_tensorrt_8_refuses_fp8_by_name_and_takes_int8(
    sources: dict[str, tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_plan, "choose_backend", lambda name: BackendChoice("tensorrt", "a stand-in"))
    for module in (build_plan, build_quantization):
        monkeypatch.setattr(module, "installed_tensorrt_version", lambda: "8.5.3.1")
    refused = hstu_compile("build", *sources["retrieval"], "--fp8", "--dry-run")
    assert refused.exit_code == 2
    assert "HSTU-E906" in refused.stderr
    assert "8.5.3.1" in refused.stderr
    assert hstu_compile("build", *sources["retrieval"], "--int8", "--dry-run").exit_code == 0


def test_dry_run_lists_every_product_with_its_scales_or_its_reason(sources: dict[str, tuple[object, ...]]) -> None:
    arguments = ("build", *sources["ranking"], "--int8", "--keep-fp16", "layers.0.uvqk", "--dry-run")
    text = hstu_compile(*arguments).stdout
    facts = json.loads(hstu_compile(*arguments, "--json").stdout)["quantization"]
    assert "layers.0.uvqk" in facts["kept"]
    assert facts["sites"]
    for name in facts["sites"]:
        assert f"  int8  {name}  input scale" in text
    for name, reason in facts["kept"].items():
        assert f"  fp16  {name}  {reason}" in text


def test_dry_run_says_which_product_could_leave_float16(sources: dict[str, tuple[object, ...]], tmp_path: Path) -> None:
    checkpoint, name = sources["retrieval"][0], "layers.0.uvqk"
    table = CalibrationTable.load(sources["retrieval"][2])  # type: ignore[arg-type]
    seen = table.sites[name]
    large = SiteStatistics.of(name, np.full((8, seen.inputs), 1e5, np.float32), seen.outputs)
    dataclasses.replace(table, sites={**table.sites, name: large}).save(tmp_path / "large.json")
    text = hstu_compile("build", checkpoint, "--int8", "--calib", tmp_path / "large.json", "--dry-run").stdout
    assert f"  fp16  {name}  its sums can reach " in text
    assert "float16 ends at 65,504" in text
    assert "  int8  layers.0.output  input scale" in text


def test_an_engine_for_gpus_without_float8_is_refused(built: tuple[Path, CommandResult], tmp_path: Path) -> None:
    path, _ = built
    target = (
        "-o",
        tmp_path / "x.engine",
        "--backend",
        "tensorrt-rtx",
        "--max-batch",
        8,
        "--computeCapabilities",
        "8.6",
    )
    result = hstu_compile("engine", path / "model.onnx", *target)
    if path.stem.endswith("int8"):
        assert result.exit_code == 0, result.stderr
    else:
        assert result.exit_code == 2
        assert "HSTU-E906" in result.stderr
