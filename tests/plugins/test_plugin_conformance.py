"""The conformance program without a GPU: every method that the builder calls, in TensorRT's order."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hstu_compile.plugin_library import PluginBuildRequest, build_plugin_library
from hstu_compile.plugins.kernels.aot import HOPPER_TACTIC
from hstu_compile.plugins.kernels.hopper.compile import usable_nvcc
from tests.attention_cases import bias_cases, cached_cases, mask_cases, with_dtype
from tests.norm_cases import KINDS, build_norm_case, large_norm_cases
from tests.plugins.conformance import prepare_conformance
from tests.plugins.conformance.libraries import headers_of_major, plugin_cache, small_library


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of program and cases, and the library: the cases are those that its kernels can run."""
    library = small_library(request.config)
    if not library.trt_version.startswith("10."):
        pytest.skip(f"the conformance program needs TensorRT 10 headers, found {library.trt_version}")
    folder = tmp_path_factory.mktemp("conformance")
    cases = [*mask_cases(), *(case for case in bias_cases() if case.name == "research")]
    cases += [case for case in cached_cases() if case.pos_table is None and case.ts_table is None]
    norms = [build_norm_case(f"norm-{kind}", 5, 48, **KINDS[kind]) for kind in ("plain", "swish", "concat-rows")]
    prepare_conformance.write_cases([*(with_dtype(case, "float16") for case in cases), *norms], folder)
    prepare_conformance.build_program(folder)
    assert library.version_compatible is not None
    return folder, library.version_compatible


def run(folder: Path, library: Path, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run the program; return its exit code, its results and its last line."""
    command = [str(folder / "conformance"), str(library), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    *lines, last = done.stdout.splitlines()
    return done.returncode, [json.loads(line) for line in lines], last


def test_every_builder_method_behaves_for_every_mask_and_bias(prepared: tuple[Path, Path]) -> None:
    code, results, last = run(*prepared, "--host-only")
    assert [r for r in results if r["status"] != "pass"] == []
    assert code == 0
    assert last == f"{len(results)} passed, 0 failed"
    builds = [r["case"] for r in results if r["mode"] == "build-phase"]
    assert {"causal", "targets", "window-context-targets-tail", "research"} <= set(builds)
    assert {"cached-one-user", "cached-score", "cached-append"} <= set(builds)
    assert {"norm-plain", "norm-swish", "norm-concat-rows"} <= set(builds)
    fields = [r["case"] for r in results if r["mode"] == "field-names"]
    assert len(fields) == 2
    assert "norm-plain" in fields


def test_a_norm_whose_tensors_do_not_fit_each_other_is_refused_while_the_engine_is_built(
    prepared: tuple[Path, Path],
) -> None:
    _, results, _ = run(*prepared, "--host-only", "--filter", "norm-")
    refused = {r["case"]: r["refused"] for r in results if r["mode"] == "refused-input" and r["status"] == "pass"}
    assert refused == {
        "norm-plain": "x scale bias out",
        "norm-swish": "x shift scale bias out",
        "norm-concat-rows": "x scale bias gate out",
    }


def test_the_hopper_tactic_comes_first_where_it_fits(prepared: tuple[Path, Path]) -> None:
    try:
        usable_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    _, results, _ = run(*prepared, "--host-only")
    offered = {
        r["case"]: tuple(r["tactics"])
        for r in results
        if r["mode"] == "build-phase" and not r["case"].startswith("norm-")
    }
    assert any(case.startswith("cached-") for case in offered)
    assert set(offered.values()) == {(HOPPER_TACTIC, 1, 2)}


def test_a_required_tactic_that_did_not_run_is_a_failure(prepared: tuple[Path, Path]) -> None:
    code, results, _ = run(*prepared, "--host-only", "--filter", "one-long", "--require-tactic", str(HOPPER_TACTIC))
    assert code == 1
    assert [r["mode"] for r in results if r["status"] != "pass"] == [f"required-tactic{HOPPER_TACTIC}"]


def test_the_program_fails_where_the_library_lacks_the_kernel(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    folder, library = prepared
    case = next(case for case in bias_cases() if case.name == "position")
    prepare_conformance.write_cases([with_dtype(case, "float16")], tmp_path)
    (tmp_path / "conformance").symlink_to(folder / "conformance")
    code, results, last = run(tmp_path, library, "--host-only")
    assert code == 1
    assert last.endswith("1 failed")
    (failed,) = [r for r in results if r["status"] != "pass"]
    assert "no kernel for float16, q/k head dim 16, v head dim 16, pos_bias 1, time_bias 0" in failed["log"]
    assert "hstu-compile plugin build" in failed["log"]


def test_the_program_fails_where_the_library_lacks_the_norm_s_kernel(
    prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, library = prepared
    prepare_conformance.write_cases([build_norm_case("norm-wide", 3, 130, **KINDS["swish"])], tmp_path)
    (tmp_path / "conformance").symlink_to(folder / "conformance")
    code, results, _ = run(tmp_path, library, "--host-only")
    assert code == 1
    log = "".join(r["log"] for r in results if r["status"] != "pass")
    assert "HstuNorm: this library has no kernel for float16 to float16, swish, 130 columns. It has: " in log
    assert "[float16 to float16, swish, up to 64 columns aligned, sm_90]" in log
    assert "hstu-compile plugin build" in log


def test_without_a_gpu_the_full_run_fails_instead_of_skipping(prepared: tuple[Path, Path]) -> None:
    code, results, _ = run(*prepared, "--filter", "one-long")
    opened = [r for r in results if r["case"] == "device"]
    if not opened:
        pytest.skip("this machine has a GPU: run_gpu.sh covers it")
    assert code == 1
    assert opened[0]["status"] == "FAIL"


def test_columns_need_a_gpu_and_say_so(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    program = prepare_conformance.build_columns_program(tmp_path)
    command = [str(program), str(tmp_path / "libnothing.so"), str(prepared[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "dlopen" in done.stderr:
        pytest.skip("this machine has a GPU: run_gpu.sh covers it")
    assert done.returncode == 1
    first, last = done.stdout.splitlines()
    assert json.loads(first)["status"] == "FAIL"
    assert last == "0 passed, 1 failed"


def test_the_tensorrt8_adapter_behaves_in_the_builder_and_over_serialisation(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    headers = headers_of_major(8)
    variants = [v for v in prepare_conformance.fixture_variants() if v.dtype == "float16" and not v.aligned]
    norms = [case for case in large_norm_cases(("float16", "float16")) if case.name == "large-norm-layer"]
    build = PluginBuildRequest(
        variants=tuple(variants),
        norm_variants=prepare_conformance.norm_variants_of(norms),
        archs=(90,),
        with_ptx=False,
        tensorrt_include_dir=headers,
        runtime_version="8",
        cache_dir=plugin_cache(request.config),
    )
    library = build_plugin_library(build)
    names = ("large-research-int32", "large-cached-research-int32")
    cases = [case for case in prepare_conformance.large_cases() if case.name in names]
    prepare_conformance.write_cases([*(with_dtype(case, "float16") for case in cases), *norms], tmp_path)
    program = prepare_conformance.build_program_v2(tmp_path, headers)
    done = subprocess.run(
        [str(program), str(library.self_registering), str(tmp_path), "--host-only"],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(program.parent)},
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "4 passed, 0 failed", done.stdout + done.stderr
    assert done.returncode == 0
