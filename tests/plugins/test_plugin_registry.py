"""The libraries in a real TensorRT 11 plugin registry: every load path, every field, every refusal."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hstu_compile.plugin_library import PluginLibrary
from tests.plugins.conformance.libraries import headers_of_major, small_library

#: What a registry lists of a library.
OURS = ["hstu::HstuAttention", "hstu::HstuNorm"]
PROBE = Path(__file__).parent / "conformance" / "registry_probe.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_lean_bindings") is None
    or importlib.util.find_spec("tensorrt_lean_libs") is None,
    reason="tensorrt-lean is not installed: pip install --no-deps tensorrt-lean-cu13-libs tensorrt-lean-cu13-bindings",
)


@pytest.fixture(scope="module")
def lean_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the lean runtime also answers to libnvinfer's soname, which plugins are linked to."""
    spec = importlib.util.find_spec("tensorrt_lean_libs")
    assert spec is not None
    assert spec.origin is not None
    folder = tmp_path_factory.mktemp("lean")
    (lean,) = Path(spec.origin).parent.glob("libnvinfer_lean.so.*")
    (folder / lean.name.replace("_lean", "")).symlink_to(lean)
    return folder


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> PluginLibrary:
    """The libraries for TensorRT 11, whose registry is at hand."""
    return small_library(request.config, headers_of_major(11))


def probe(lean_dir: Path, scenario: str, *paths: Path | None) -> tuple[dict[str, Any], str]:
    """Run one scenario in a process of its own; return what it found and what was logged."""
    command = [sys.executable, str(PROBE), scenario, *map(str, paths)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(lean_dir)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, f"exit {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_dlopen_registers_once_and_unloading_takes_it_back(library: PluginLibrary, lean_dir: Path) -> None:
    found, _ = probe(lean_dir, "dlopen_twice", library.self_registering)
    assert found == {"first": OURS, "found": True, "second": OURS, "closed": []}


def test_load_library_registers_once_and_deregistering_takes_it_back(library: PluginLibrary, lean_dir: Path) -> None:
    found, _ = probe(lean_dir, "load_library_twice", library.version_compatible)
    assert found == {"first": OURS, "found": True, "second": OURS, "deregistered": [], "again": OURS}


def test_the_wrong_load_path_registers_nothing_and_does_not_crash(library: PluginLibrary, lean_dir: Path) -> None:
    found, _ = probe(lean_dir, "wrong_way_round", library.self_registering, library.version_compatible)
    assert found == {"self_registering_through_registry": [], "version_compatible_by_dlopen": []}


def test_a_second_library_is_refused_and_does_not_take_the_first_away(library: PluginLibrary, lean_dir: Path) -> None:
    found, log = probe(lean_dir, "both", library.self_registering, library.version_compatible)
    assert found == {"together": OURS, "after_close": OURS, "found": True}
    assert "another library has registered it already" in log


def test_a_library_of_another_tensorrt_is_refused_by_name(request: pytest.FixtureRequest, lean_dir: Path) -> None:
    old = small_library(request.config)
    if old.trt_version.startswith("11."):
        pytest.skip("the headers found are TensorRT 11's own: there is no other version to refuse")
    found, log = probe(lean_dir, "mismatched", old.self_registering, old.version_compatible)
    assert found["version_compatible"] == []
    assert f"built for TensorRT {old.trt_version.split('.')[0]} and this process runs TensorRT 11" in log


LEGAL = ("legal", "with_identity", "runtime")
REFUSED = {
    "runtime_without_engine_fields": "field 'engine_num_heads' is missing from the engine",
    "engine_fields_at_build": "field 'engine_num_heads' is unknown",
    "other_version": 'field \'plugin_version\' is "2"; allowed: "1"',
    "missing": "field 'max_seq_len' is missing; allowed: an int >= 1 and <= 1048576",
    "unknown": "field 'window' is unknown; allowed: alpha, scaling_seq_len",
    "out_of_range": "field 'target_group_size' is 0; allowed: an int >= 1 and <= 1048576",
    "no_such_silu": "field 'silu' is 2; allowed: an int >= 0 and <= 1",
    "not_finite": "field 'alpha' is nan; allowed: a finite float",
    "wrong_type": "field 'has_num_targets' is FLOAT32 of length 1; allowed: INT32 of length 1",
    "wrong_length": "field 'max_attn_len' is INT32 of length 2; allowed: INT32 of length 1",
}


def test_create_plugin_takes_legal_fields_and_refuses_the_others_with_a_message(
    library: PluginLibrary, lean_dir: Path
) -> None:
    found, log = probe(lean_dir, "fields", library.self_registering)
    assert {name: found[name] for name in LEGAL} == dict.fromkeys(LEGAL, True)
    assert {name: found[name] for name in REFUSED} == dict.fromkeys(REFUSED, False)
    for name, message in REFUSED.items():
        assert message in log, name
    assert "field 'pos_bias' is 2; allowed: an int >= 0 and <= 1" in log, "only the first bad field is reported"
    assert "/layers.0/attention" in log


def test_the_announced_fields_are_the_contract_s(library: PluginLibrary, lean_dir: Path) -> None:
    from hstu_compile.op_schema import attention_contract

    found, _ = probe(lean_dir, "fields", library.self_registering)
    assert found["announced"] == [attribute.name for attribute in attention_contract().attributes]


NORM_REFUSED = {
    "runtime_without_engine_fields": "field 'engine_width' is missing from the engine",
    "engine_fields_at_build": "field 'engine_width' is unknown",
    "engine_of_another_width": "the engine stores width 8193; allowed: 0 to 8192",
    "missing": "field 'num_groups' is missing; allowed: an int >= 1 and <= 8192",
    "out_of_range": "field 'epsilon' is 0; allowed: a finite float > 0",
    "concat_without_gate": "concat 1 with activation 2; allowed: 0 and 0 unless activation is 1",
    "wrong_type": "field 'epsilon' is INT32 of length 1; allowed: FLOAT32 of length 1",
}


def test_norms_are_made_of_legal_fields_and_refused_of_others_with_a_message(
    library: PluginLibrary, lean_dir: Path
) -> None:
    from hstu_compile.op_schema import norm_contract

    found, log = probe(lean_dir, "norm_fields", library.self_registering)
    assert found["announced"] == [attribute.name for attribute in norm_contract().attributes]
    assert found["legal"]
    assert found["runtime"]
    assert {name: found[name] for name in NORM_REFUSED} == dict.fromkeys(NORM_REFUSED, False)
    for name, message in NORM_REFUSED.items():
        assert message in log, name
    assert "field 'activation' is 3; allowed: an int >= 0 and <= 2" in log, "only the first bad field is reported"
    assert "hstu::HstuNorm node '/layers.0/attention'" in log
