from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from hstu_compile.op_schema import attention_contract
from hstu_compile.rewrite.attach_native_body import native_body
from tests import tolerances
from tests.attention_cases import attention_grid, build_case, with_dtype
from tests.oracle import Array, AttentionCase, ErrorBound, attention_error, check_attention, error_bound, oracle_of
from tests.rewrite.attention_graphs import (
    OPSET,
    attention_model,
    attention_node,
    contract_attributes,
    feeds_of,
    run_onnx,
)
from tests.strategies import attention_cases

# A pair of event times more than 2**63 seconds apart: the native body subtracts in int64, where that wraps. The
# contract's plugins are exact there; no clock produces such a pair.
BEYOND_INT64 = {"time-extremes"}


def model_of(case: AttentionCase, slack: int = 0) -> onnx.ModelProto:
    """The one-node model with its body; `slack` makes the length bounds larger than the longest sequence."""
    attributes = contract_attributes(case)
    attributes["max_query_len"] += slack
    attributes["max_seq_len"] += slack
    model = attention_model(case, [attention_node(attributes)])
    buckets = 0 if case.ts_thresholds is None else len(case.ts_thresholds)
    model.functions.append(native_body(attributes, buckets, OPSET))
    return model


def native_output(case: AttentionCase, slack: int = 0) -> Array:
    return run_onnx(model_of(case, slack), feeds_of(case))["out"]


def check_native(case: AttentionCase, slack: int = 0) -> Array:
    out = native_output(case, slack)
    assert out.dtype == np.dtype(case.dtype)
    check_attention(out, oracle_of(case), case.dtype)
    return out


GRID = [case for case in attention_grid() if case.name not in BEYOND_INT64]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_native_body_equals_the_float64_oracle(case: AttentionCase, dtype: str) -> None:
    check_native(with_dtype(case, dtype))


@pytest.mark.parametrize("case", GRID[::4], ids=lambda case: case.name)
def test_bounds_above_the_longest_sequence_change_nothing(case: AttentionCase) -> None:
    check_native(case, slack=7)


# ONNX Runtime's float32 sigmoid has an absolute error of half a unit at 0.5, which is a relative one where all scores
# of a row are far below zero: drawn rows of that kind are held to the type's bound on the rms scale.
DRAWN_BOUND = ErrorBound(tolerances.LARGEST_COMPONENTWISE, tolerances.RMS["float32"])


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(attention_cases(longest=24))
def test_native_body_equals_the_oracle_on_drawn_calls(case: AttentionCase) -> None:
    check_attention(native_output(case), oracle_of(case), case.dtype, DRAWN_BOUND)


def test_rows_behind_the_last_offset_are_zero_and_what_they_hold_is_never_read() -> None:
    case = build_case([18, 0, 5], tail=21, time_bias="shared", pos_bias="per_head", seed=1)
    out = check_native(case)
    assert np.isnan(case.q[23:]).all()
    assert (out[23:] == 0).all()
    assert (out[:23] != 0).any(axis=(1, 2)).all()


def test_no_events_at_all_gives_an_empty_output() -> None:
    case = build_case([0, 0], time_bias="shared", pos_bias="shared", num_targets=[0, 0], seed=2)
    assert native_output(case).shape == (0, 2, 16)


@pytest.mark.parametrize("wrong", ["zeros", "scaled", "shifted", "swapped", "one row"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_comparison_used_here_rejects_wrong_outputs(wrong: str, dtype: str) -> None:
    case = with_dtype(build_case([20, 20, 9], max_attn_len=5, pos_bias="shared", seed=3), dtype)
    right = native_output(case)
    if wrong == "shifted":
        attrs = dataclasses.replace(case.attrs, max_attn_len=6)
        output = native_output(dataclasses.replace(case, attrs=attrs))
    else:
        output = right.copy()
        if wrong == "zeros":
            output[:] = 0
        elif wrong == "scaled":
            output = (output * 0.9).astype(output.dtype)
        elif wrong == "swapped":
            output[:20], output[20:40] = right[20:40], right[:20]
        else:
            output[31] = right[30]
    report, bound = attention_error(output, oracle_of(case), dtype), error_bound(dtype)
    assert report.componentwise > bound.componentwise


def test_the_body_declares_every_attribute_of_the_contract_and_reads_only_present_inputs() -> None:
    contract = attention_contract()
    case = build_case([5], time_bias="shared", num_targets=[2], seed=4)
    attributes = contract_attributes(case)
    body = native_body(attributes, 24, OPSET)
    assert (body.domain, body.name) == (contract.namespace, contract.name)
    assert list(body.input) == [each.name for each in contract.present_inputs(attributes)]
    assert list(body.output) == ["out"]
    assert {a.name for a in contract.attributes} | {"plugin_version", "plugin_namespace"} == set(body.attribute)


def test_scores_that_overflow_float16_stay_finite() -> None:
    case = with_dtype(build_case([9], dqk=64, seed=5), "float16")
    loud = dataclasses.replace(case, q=case.q * 256, k=case.k * 256)
    assert np.abs(np.einsum("qhd,khd->hqk", loud.q, loud.k)).max() > np.finfo(np.float16).max
    scaled = dataclasses.replace(loud, attrs=dataclasses.replace(loud.attrs, alpha=case.attrs.alpha * 2.0**-16))
    check_native(scaled)
