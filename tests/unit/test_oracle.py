"""The oracle agrees with itself, and its comparator rejects what it must."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from tests import oracle, tolerances
from tests.attention_cases import attention_grid, build_case, round_to_dtype, split_requests, with_dtype
from tests.oracle import (
    AttentionCase,
    attention_error,
    attention_loops64,
    attention_low_precision,
    check_attention,
    error_bound,
    oracle_of,
)
from tests.strategies import attention_cases

DTYPES = ["float32", "float16", "bfloat16"]


def _assert_same_as_loops(case: AttentionCase) -> None:
    dense, loops = oracle_of(case).out, attention_loops64(case)
    np.testing.assert_allclose(dense, loops, rtol=tolerances.FLOAT64, atol=tolerances.FLOAT64)


@pytest.mark.parametrize(
    "case", [c for c in attention_grid() if np.diff(c.k_offsets.astype(np.int64)).sum() <= 45], ids=lambda c: c.name
)
def test_dense_oracle_equals_three_loops(case: AttentionCase) -> None:
    _assert_same_as_loops(case)


@given(attention_cases(longest=8))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_dense_oracle_equals_three_loops_on_drawn_cases(case: AttentionCase) -> None:
    _assert_same_as_loops(case)


@pytest.fixture(scope="module")
def many_rows() -> AttentionCase:
    return build_case([100] * 100, num_heads=1, dqk=4, dv=4, seed=1)


@pytest.fixture(scope="module")
def case() -> AttentionCase:
    return build_case([37, 37, 5], num_targets=[4, 4, 1], pos_bias="shared", seed=2)


@pytest.mark.parametrize("dtype", DTYPES)
class TestComparator:
    """Accepts the rounded truth and plain low precision; rejects every wrong output of house rule 3.7."""

    def test_accepts_rounded_oracle(self, case: AttentionCase, dtype: str) -> None:
        result = oracle_of(with_dtype(case, dtype))
        check_attention(round_to_dtype(result.out, dtype), result, dtype)

    def test_accepts_low_precision_torch_by_its_own_rule(self, case: AttentionCase, dtype: str) -> None:
        cast = with_dtype(case, dtype)
        result, actual = oracle_of(cast), attention_low_precision(cast)
        report = attention_error(actual, result, dtype)
        check_attention(actual, result, dtype, error_bound(dtype, report))

    @pytest.mark.parametrize("wrong", ["zeros", "0.9x", "1.1x", "negated", "nan", "inf"])
    def test_rejects_scaled_and_non_finite(self, case: AttentionCase, dtype: str, wrong: str) -> None:
        cast = with_dtype(case, dtype)
        result = oracle_of(cast)
        actual = round_to_dtype(result.out, dtype)
        if wrong in ("nan", "inf"):
            actual[11, 1, 3] = float(wrong)
        else:
            actual = actual * {"zeros": 0.0, "0.9x": 0.9, "1.1x": 1.1, "negated": -1.0}[wrong]
        _assert_rejected(actual, cast)

    @pytest.mark.parametrize("shift", [-1, 1])
    def test_rejects_mask_shifted_by_one(
        self, case: AttentionCase, dtype: str, shift: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cast = with_dtype(case, dtype)
        true_mask = oracle._valid_attn_mask
        with monkeypatch.context() as patch:
            patch.setattr(oracle, "_valid_attn_mask", lambda *a: np.roll(true_mask(*a), shift, axis=1))
            shifted = oracle_of(cast).out
        _assert_rejected(round_to_dtype(shifted, dtype), cast)

    def test_rejects_swapped_requests(self, case: AttentionCase, dtype: str) -> None:
        cast = with_dtype(case, dtype)
        swapped = oracle_of(split_requests(cast, [1, 0, 2])).out
        _assert_rejected(round_to_dtype(swapped, dtype), cast)

    def test_rejects_one_wrong_row_in_ten_thousand(self, many_rows: AttentionCase, dtype: str) -> None:
        cast = with_dtype(many_rows, dtype)
        result = oracle_of(cast)
        assert len(result.out) == 10_000
        actual = round_to_dtype(result.out, dtype)
        check_attention(actual, result, dtype)
        actual[5001] *= 0.9
        with pytest.raises(AssertionError, match=r"worst at sequence 50 row 1 head 0 \(token 5001\)"):
            check_attention(actual, result, dtype)

    def test_rejects_noise_in_a_row_outside_all_sequences(self, dtype: str) -> None:
        cast = build_case([3, 4], dtype=dtype, tail=2, seed=5)
        result = oracle_of(cast)
        actual = round_to_dtype(result.out, dtype)
        check_attention(actual, result, dtype)
        actual[-1, 0, 0] = 1e-30
        with pytest.raises(AssertionError, match="no sequence"):
            check_attention(actual, result, dtype)


def _assert_rejected(actual: oracle.Array, case: AttentionCase) -> None:
    """Rejected by the fixed bound and by the rule that follows low-precision PyTorch."""
    result = oracle_of(case)
    low = attention_error(attention_low_precision(case), result, case.dtype)
    for bound in (error_bound(case.dtype), error_bound(case.dtype, low)):
        with pytest.raises(AssertionError, match="differs from the float64 oracle"):
            check_attention(actual, result, case.dtype, bound)


def test_shape_mismatch_is_refused(case: AttentionCase) -> None:
    result = oracle_of(case)
    with pytest.raises(ValueError, match="has shape"):
        attention_error(result.out[:-1], result, "float32")


def test_outputs_of_the_grid_are_of_order_one() -> None:
    for grid_case in attention_grid():
        result = oracle_of(grid_case)
        if not result.scale.any():
            continue
        rms = np.sqrt(np.mean(result.out[result.scale > 0] ** 2))
        assert 0.02 < rms < 20, f"{grid_case.name}: rms {rms}"


def test_rounding_to_dtype_matches_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(3).standard_normal(1000).astype(np.float32) * 10.0 ** np.arange(-4, 4).repeat(125)
    for dtype in DTYPES:
        expected = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(round_to_dtype(values, dtype), expected)


def test_hidden_values_never_reach_the_result() -> None:
    clean = build_case([9], seed=6)
    dirty = dataclasses.replace(clean, k=clean.k.copy(), v=clean.v.copy())
    dirty.k[5], dirty.v[5] = np.inf, np.nan
    np.testing.assert_allclose(
        oracle_of(clean).out[:5], oracle_of(dirty).out[:5], rtol=tolerances.FLOAT64, atol=tolerances.FLOAT64
    )
    assert np.isnan(oracle_of(dirty).out[5:]).all()
