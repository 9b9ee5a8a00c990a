"""Builds that are held to a quality budget, through the command line: what they choose, print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hstu_compile import pipeline
from hstu_compile.model.config import RetrievalConfig
from tests.dlrm_reference import DlrmForm
from tests.e2e.conftest import hstu_compile, save_checkpoint, save_ranking_checkpoint
from tests.exported_models import ranking_config, small_config
from tests.labelled_cases import ranking_arrays, retrieval_arrays

# Nearly all builds here are of one model in float16: its graph is the same.
pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("traced_once")]

USERS = 300


def requests_of(config: RetrievalConfig, seed: int) -> dict[str, np.ndarray]:
    lengths = np.random.default_rng(seed).integers(1, 21, USERS).tolist()
    return retrieval_arrays(config, lengths, seed)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a calibration table, and labelled requests."""
    folder = tmp_path_factory.mktemp("quality")
    config = small_config()
    save_checkpoint(folder / "small.pt", config)
    np.savez(folder / "earlier.npz", **requests_of(config, 1))
    np.savez(folder / "labelled.npz", **requests_of(config, 2))
    done = hstu_compile("calibrate", folder / "small.pt", "--data", folder / "earlier.npz", "-o", folder / "table.json")
    assert done.exit_code == 0, done.stderr
    return folder


def build(folder: Path, name: str, *options: object):
    common = ("--backend", "onnx", "-o", folder / name)
    return hstu_compile("build", folder / "small.pt", *common, *options)


@pytest.fixture(scope="module")
def mixed(workplace: Path):
    """A build whose budget is below what quantising everything changes."""
    options = ("--fp8", "--calib", workplace / "table.json", "--data", workplace / "labelled.npz")
    return build(workplace, "mixed.hstu", *options, "--observer", "mse", "--mixed", "auto", "--budget", "0.001")


def test_mixed_auto_prints_the_ladder_and_its_end_is_what_is_built(workplace, mixed):
    assert mixed.exit_code in (0, 6), mixed.stderr
    manifest = json.loads((workplace / "mixed.hstu" / "manifest.json").read_text())
    quantization = manifest["quantization"]
    ladder = quantization["sensitivity"]
    assert mixed.stdout.startswith("fp8, 300 requests of labelled.npz with a budget of 0.001\n")
    for rung in ladder["rungs"][1:]:
        assert f"+ {rung['kept']} in fp16" in mixed.stdout
    assert len(ladder["rungs"]) > 1
    assert ladder["rungs"][-1]["worst"] <= 0.001
    assert all(rung["worst"] > 0.001 for rung in ladder["rungs"][:-1])
    assert set(ladder["kept"]) == {name for name, reason in quantization["kept"].items() if "--mixed auto" in reason}
    assert set(quantization["sites"]) == {site["site"] for site in ladder["sites"]} - set(ladder["kept"])
    assert ladder["data"]["requests"] == USERS
    assert mixed.stdout.splitlines()[-1].startswith(str(workplace / "mixed.hstu"))


def test_the_rule_is_chosen_too_unless_it_is_given(workplace, monkeypatch):
    """The table's rule is amax, with which no mix of this model keeps a budget that another rule keeps."""
    traced, export = [], pipeline.exported_from_served
    monkeypatch.setattr(pipeline, "exported_from_served", lambda *served: traced.append(served) or export(*served))
    options = ("--int8", "--calib", workplace / "table.json", "--data", workplace / "labelled.npz", "--mixed", "auto")
    budget = ("--budget", 0.0002)
    given = build(workplace, "given.hstu", *options, *budget, "--observer", "amax")
    assert given.exit_code == 7
    assert "HSTU-E832" in given.stderr
    done = build(workplace, "chosen.hstu", *options, *budget)
    assert done.exit_code in (0, 6), done.stderr
    quantization = json.loads((workplace / "chosen.hstu" / "manifest.json").read_text())["quantization"]
    assert quantization["observer"] != "amax"
    assert f"int8 by {quantization['observer']} in {len(quantization['sites'])} products" in done.stderr
    assert len(traced) == 2, "each build traces its graph once: what was measured is what is built"


def test_the_report_shows_the_quality_of_every_form(workplace, mixed):
    report = json.loads((workplace / "mixed.hstu" / "report.json").read_text())
    metrics = report["metrics"]
    names = [row["name"] for row in metrics["rows"]]
    assert names == ["eager fp32", "eager fp8 and fp16", "model.onnx on onnxruntime"]
    assert metrics["columns"] == ["HR@10", "NDCG@10", "HR@50", "MRR"]
    reference, artifact = metrics["rows"][0]["values"], metrics["rows"][2]["values"]
    assert reference == list(report["quantization"]["sensitivity"]["reference"].values())
    worst = max(abs(reference[column] - artifact[column]) for column in (0, 1))
    assert metrics["worst"] == pytest.approx(worst)
    assert metrics["within"] == (worst <= 0.001)
    assert mixed.exit_code == (0 if metrics["within"] else 6)
    page = (workplace / "mixed.hstu" / "report.html").read_text()
    for text in ("Largest change of a metric at each step of the ladder", "budget 0.001", "Ranking quality"):
        assert text in page


def test_quality_is_measured_without_quantisation_too(workplace):
    done = build(workplace, "plain.hstu", "--fp16", "--data", workplace / "labelled.npz", "--budget", "0.5")
    assert done.exit_code == 0, done.stderr
    assert "quality on 300 requests changed by at most" in done.stderr
    report = json.loads((workplace / "plain.hstu" / "report.json").read_text())
    assert [row["name"] for row in report["metrics"]["rows"]][1:] == ["eager fp16", "model.onnx on onnxruntime"]
    assert report["quantization"] is None


def test_an_artifact_beyond_the_budget_is_marked_fail(workplace):
    options = ("--fp8", "--calib", workplace / "table.json", "--data", workplace / "labelled.npz", "--budget", "0")
    done = build(workplace, "fail.hstu", *options, "--observer", "amax")
    assert done.exit_code == 6
    assert "HSTU-E833" in done.stderr
    assert " FAIL " in done.stdout
    assert json.loads((workplace / "fail.hstu" / "manifest.json").read_text())["status"] == "FAIL"
    assert "exceeds its budget" in (workplace / "fail.hstu" / "report.html").read_text()


def test_a_budget_that_no_mix_keeps_leaves_nothing(workplace):
    options = ("--fp8", "--calib", workplace / "table.json", "--data", workplace / "labelled.npz", "--budget", "0")
    done = build(workplace, "none.hstu", *options, "--observer", "amax", "--mixed", "auto")
    assert done.exit_code == 7
    assert "HSTU-E832" in done.stderr
    assert not (workplace / "none.hstu").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--int8", "--calib", "table.json", "--mixed", "auto"), "--mixed auto cannot be used without --data"),
        (("--budget", "0.1"), "--budget cannot be used without --data"),
        (("--fp16", "--mixed", "auto", "--data", "labelled.npz"), "nothing is quantised without --int8 or --fp8"),
        (("--data", "labelled.npz", "--budget", "nan"), "--budget nan cannot be used"),
        (("--data", "labelled.npz", "--budget", "-0.1"), "--budget -0.1 cannot be used"),
        (("--data", "earlier.npz", "--max-seq-len", "5"), "than --max-seq-len and --max-candidates let the build take"),
    ],
)
def test_options_that_cannot_be_used(workplace, options, message):
    paths = [workplace / option if option.endswith((".json", ".npz")) else option for option in options]
    done = build(workplace, "refused.hstu", *paths)
    assert done.exit_code in (2, 7)
    assert message in done.stderr
    assert not (workplace / "refused.hstu").exists()


def test_dry_run_says_that_the_build_decides(workplace):
    options = ("--int8", "--calib", workplace / "table.json", "--data", workplace / "labelled.npz", "--mixed", "auto")
    done = build(workplace, "dry.hstu", *options, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "mixed       auto: the build leaves more products in float16 until the quality" in done.stdout


def test_a_ranking_build_is_held_to_auc_and_ne(tmp_path):
    # As plain as the family gets: nothing is in front of a history. test_build_ranking.py has more of it in slow tests.
    form = DlrmForm(contextual=(), num_layers=1, action_weights=(), postprocessor="l2_norm", scaling_seq_len=60.0)
    checkpoint, config_file = save_ranking_checkpoint(tmp_path, form)
    config = ranking_config(form)
    for name, seed in (("earlier", 1), ("labelled", 2)):
        lengths = np.random.default_rng(seed).integers(1, 40, 16).tolist()
        np.savez(tmp_path / f"{name}.npz", **ranking_arrays(config, lengths, [4] * 16, seed))
    common = ("--config", config_file)
    table = tmp_path / "table.json"
    assert (
        hstu_compile("calibrate", checkpoint, *common, "--data", tmp_path / "earlier.npz", "-o", table).exit_code == 0
    )
    options = ("--fp8", "--calib", table, "--data", tmp_path / "labelled.npz", "--mixed", "auto", "--budget", "0.5")
    bundle = tmp_path / "ranking.hstu"
    done = hstu_compile("build", checkpoint, *common, *options, "--backend", "onnx", "-o", bundle)
    assert done.exit_code == 0, done.stderr
    metrics = json.loads((bundle / "report.json").read_text())["metrics"]
    assert metrics["columns"] == ["AUC like", "NE like"]
    (auc, ne), artifact = metrics["rows"][0]["values"], metrics["rows"][2]["values"]
    assert metrics["worst"] == pytest.approx(max(abs(artifact[0] / auc - 1), abs(artifact[1] / ne - 1)))
    assert "NE like" in done.stdout
