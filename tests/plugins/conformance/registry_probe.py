"""Runs load paths of the plugin libraries in a real TensorRT registry and prints what happened as JSON.

A program of its own, because each path changes the registry of the process: `registry_probe.py SCENARIO PATHS...`, with
the folder of libnvinfer on LD_LIBRARY_PATH. Needs the package tensorrt-lean (a runtime with a registry, no GPU needed).
"""

from __future__ import annotations

import _ctypes
import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorrt_lean_bindings as trt

KEY = ("HstuAttention", "1", "hstu")
NORM_KEY = ("HstuNorm", "1", "hstu")
LEGAL_NORM: dict[str, Any] = {
    "epsilon": np.float32(1e-5),
    "num_groups": np.int32(4),
    "activation": np.int32(1),
    "gate_silu": np.int32(1),
    "concat": np.int32(1),
    "input_type": np.int32(1),
    "output_type": np.int32(1),
    "has_shift": np.int32(0),
    "has_bias": np.int32(1),
}
LEGAL: dict[str, Any] = {
    "alpha": np.float32(0.125),
    "scaling_seq_len": np.float32(211.0),
    "max_query_len": np.int32(200),
    "max_seq_len": np.int32(211),
    "target_group_size": np.int32(3),
    "contextual_seq_len": np.int32(4),
    "max_attn_len": np.int32(50),
    "min_full_attn_seq_len": np.int32(6),
    "silu": np.int32(1),
    "has_num_targets": np.int32(1),
    "has_contextual_seq_lens": np.int32(0),
    "has_scaling_seq_lens": np.int32(1),
    "pos_bias": np.int32(1),
    "time_bias": np.int32(1),
}


def text(value: str) -> Any:
    """Return a string as the parser passes it: characters with a terminating NUL."""
    return np.frombuffer(value.encode() + b"\0", dtype=np.int8)


def registry() -> Any:
    """Return the process-wide registry."""
    return trt.get_plugin_registry()


def ours() -> list[str]:
    """Return namespace and name of each of our creators that is listed."""
    names = (KEY[0], NORM_KEY[0])
    return sorted(f"{c.plugin_namespace}::{c.name}" for c in registry().all_creators if c.name in names)


def is_found() -> bool:
    """Whether getCreator finds both by name, version and namespace."""
    return all(registry().get_creator(*key) is not None for key in (KEY, NORM_KEY))


def create(
    changes: dict[str, Any], phase: str = "BUILD", key: tuple[str, str, str] = KEY, legal: dict[str, Any] = LEGAL
) -> bool:
    """Whether createPlugin makes a plugin of the legal fields with these changes; None drops a field."""
    kinds = {
        "float32": trt.PluginFieldType.FLOAT32,
        "int32": trt.PluginFieldType.INT32,
        "int8": trt.PluginFieldType.CHAR,
    }
    values = {name: np.atleast_1d(v) for name, v in {**legal, **changes}.items() if v is not None}
    # A PluginField only borrows its array: `values` must live until the plugin is made.
    fields = [trt.PluginField(name, v, kinds[v.dtype.name]) for name, v in values.items()]
    creator = registry().get_creator(*key)
    collection = trt.PluginFieldCollection(fields)
    return creator.create_plugin("/layers.0/attention", collection, getattr(trt.TensorRTPhase, phase)) is not None


def dlopen_twice(library: str) -> dict[str, Any]:
    """Load the self-registering library twice, then unload it."""
    first = ctypes.CDLL(library)
    after_first, found = ours(), is_found()
    second = ctypes.CDLL(library)
    after_second = ours()
    for handle in (first, second):
        _ctypes.dlclose(handle._handle)
    return {"first": after_first, "found": found, "second": after_second, "closed": ours()}


def load_library_twice(library: str) -> dict[str, Any]:
    """Load the other library through the registry twice, deregister, and load it again."""
    handle = registry().load_library(library)
    first, found = ours(), is_found()
    registry().load_library(library)
    second = ours()
    registry().deregister_library(handle)
    deregistered = ours()
    registry().load_library(library)
    return {"first": first, "found": found, "second": second, "deregistered": deregistered, "again": ours()}


def wrong_way_round(library: str, version_compatible: str) -> dict[str, Any]:
    """Use each library in the way that is meant for the other one."""
    registry().load_library(library)
    through_registry = ours()
    ctypes.CDLL(version_compatible)
    return {"self_registering_through_registry": through_registry, "version_compatible_by_dlopen": ours()}


def both(library: str, version_compatible: str) -> dict[str, Any]:
    """Load both; the second must be refused and must not take the first away when it goes."""
    registry().load_library(version_compatible)
    handle = ctypes.CDLL(library)
    together = ours()
    _ctypes.dlclose(handle._handle)
    return {"together": together, "after_close": ours(), "found": is_found()}


def mismatched(library: str, version_compatible: str) -> dict[str, Any]:
    """Use libraries that were built for another major version of TensorRT."""
    registry().load_library(version_compatible)
    return {"version_compatible": ours(), "library": library}


def fields(library: str) -> dict[str, Any]:
    """Create plugins from legal and illegal fields; what the creator says goes to standard error."""
    handle = ctypes.CDLL(library)
    engine = {
        "engine_element_type": np.int32(1),
        "engine_timestamp_bits": np.int32(64),
        "engine_num_heads": np.int32(1),
        "engine_attention_dim": np.int32(16),
        "engine_linear_dim": np.int32(16),
    }
    made = {
        "announced": [f.name for f in registry().get_creator(*KEY).field_names],
        "legal": create({}),
        "with_identity": create({"plugin_version": text("1"), "plugin_namespace": text("hstu")}),
        "runtime": create(engine, "RUNTIME"),
        "runtime_without_engine_fields": create({}, "RUNTIME"),
        "engine_fields_at_build": create(engine),
        "other_version": create({"plugin_version": text("2")}),
        "missing": create({"max_seq_len": None}),
        "unknown": create({"window": np.int32(1)}),
        "out_of_range": create({"target_group_size": np.int32(0), "pos_bias": np.int32(2)}),
        "no_such_silu": create({"silu": np.int32(2)}),
        "not_finite": create({"alpha": np.float32("nan")}),
        "wrong_type": create({"has_num_targets": np.float32(1)}),
        "wrong_length": create({"max_attn_len": np.array([1, 2], dtype=np.int32)}),
    }
    return {"library": handle._name, **made}


def norm_fields(library: str) -> dict[str, Any]:
    """The same for the other operator."""
    handle = ctypes.CDLL(library)

    def made(phase: str = "BUILD", **changes: Any) -> bool:
        return create(changes, phase, NORM_KEY, LEGAL_NORM)

    return {
        "library": handle._name,
        "announced": [f.name for f in registry().get_creator(*NORM_KEY).field_names],
        "legal": made(),
        "runtime": made("RUNTIME", engine_width=np.int32(512)),
        "runtime_without_engine_fields": made("RUNTIME"),
        "engine_fields_at_build": made(engine_width=np.int32(512)),
        "engine_of_another_width": made("RUNTIME", engine_width=np.int32(8193)),
        "missing": made(num_groups=None),
        "out_of_range": made(epsilon=np.float32(0), activation=np.int32(3)),
        "concat_without_gate": made(activation=np.int32(2), gate_silu=np.int32(0)),
        "wrong_type": made(epsilon=np.int32(1)),
    }


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (dlopen_twice, load_library_twice, wrong_way_round, both, mismatched, fields, norm_fields)
}


def main() -> None:
    """Run the scenario named by the first argument on the libraries named by the others."""
    scenario, *paths = sys.argv[1:]
    print(json.dumps(SCENARIOS[scenario](*paths)), flush=True)


if __name__ == "__main__":
    main()
