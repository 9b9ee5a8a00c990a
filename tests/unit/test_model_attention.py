from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from hstu_compile.model import AttentionAttrs, hstu_attention
from hstu_compile.model.jagged import jagged_from_padded, padded_from_jagged, sequence_index
from hstu_compile.model.ops import hstu_attention_op
from hstu_compile.model.rab import time_bucket_thresholds
from tests import tolerances
from tests.attention_cases import attention_grid, build_case, with_dtype
from tests.oracle import AttentionCase, attention_error, check_attention, oracle_of
from tests.rewrite.attention_graphs import joined_offsets
from tests.strategies import attention_cases

DTYPES = ("float32", "float16", "bfloat16")
# Illegal offsets never reach the eager model; what a kernel does with them is for the kernels' tests.
GRID = [case for case in attention_grid() if "-offsets-" not in case.name]


def eager(case: AttentionCase, dtype: torch.dtype | None = None) -> np.ndarray:
    """The eager model's answer to a case of the operator's contract."""
    kind = dtype or getattr(torch, case.dtype)

    def tensor(values: np.ndarray | None) -> torch.Tensor | None:
        if values is None:
            return None
        given = torch.from_numpy(np.ascontiguousarray(values))
        return given.double() if kind == torch.float64 and given.is_floating_point() else given

    limit = int(max(1, *np.diff(joined_offsets(case)), 1))
    attrs = AttentionAttrs(
        alpha=case.attrs.alpha,
        scaling_seq_len=case.attrs.scaling_seq_len,
        max_query_len=limit,
        max_seq_len=limit,
        target_group_size=case.attrs.target_group_size,
        contextual_seq_len=case.attrs.contextual_seq_len,
        max_attn_len=case.attrs.max_attn_len,
        min_full_attn_seq_len=case.attrs.min_full_attn_seq_len,
    )
    out = hstu_attention(
        torch.from_numpy(case.q).to(kind),
        torch.from_numpy(case.k).to(kind),
        torch.from_numpy(case.v).to(kind),
        torch.from_numpy(case.q_offsets),
        torch.from_numpy(case.k_offsets),
        attrs,
        **{name: tensor(values) for name, values in case.optional_inputs().items()},
    )
    assert out.dtype == kind
    return out.to(torch.float64).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRID, ids=[case.name for case in GRID])
def test_eager_attention_equals_the_oracle(case: AttentionCase, dtype: str) -> None:
    rounded = with_dtype(case, dtype)
    check_attention(eager(rounded), oracle_of(rounded), dtype)


@pytest.mark.parametrize("case", GRID, ids=[case.name for case in GRID])
def test_eager_attention_in_float64_equals_the_oracle_to_rounding(case: AttentionCase) -> None:
    report = attention_error(eager(case, torch.float64), oracle_of(case), "float32")
    assert report.componentwise <= tolerances.FLOAT64, report.where


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=attention_cases(longest=20))
def test_eager_attention_equals_the_oracle_on_any_case(case: AttentionCase) -> None:
    check_attention(eager(case), oracle_of(case), "float32")


def test_operator_and_function_are_the_same() -> None:
    case = build_case([5, 0, 9], pos_bias="shared", time_bias="shared", num_targets=[1, 0, 3], seed=7)
    names = ("num_targets", "contextual_seq_lens", "scaling_seq_lens")
    tables = ("row_timestamps", "col_timestamps", "pos_table", "ts_table", "ts_thresholds")
    optional = case.optional_inputs()

    def tensor(name: str) -> torch.Tensor | None:
        return None if optional[name] is None else torch.from_numpy(optional[name])

    arguments = [torch.from_numpy(x) for x in (case.q, case.k, case.v, case.q_offsets, case.k_offsets)]
    arguments += [tensor(name) for name in (*names, *tables)]
    attrs = (case.attrs.alpha, case.attrs.scaling_seq_len, 9, 9, 1, 0, 0, 0)
    out = hstu_attention_op(*arguments, *attrs)
    np.testing.assert_array_equal(out.numpy(), eager(case))
    accurate = hstu_attention_op(*arguments, *attrs, "accurate")
    np.testing.assert_array_equal(accurate.numpy(), out.numpy(), "the eager reference has one SiLU")
    torch.library.opcheck(hstu_attention_op, (*arguments, *attrs), test_utils=("test_schema", "test_faketensor"))


# --- Time buckets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divisor", "last"), [(0.301, 128), (0.693, 63), (0.301, 20)])
def test_thresholds_reproduce_the_float32_formula_exactly(divisor: float, last: int) -> None:
    thresholds = time_bucket_thresholds(last, divisor)
    rng = np.random.default_rng(0)
    reachable = thresholds[thresholds < 2**62].numpy()
    drawn = np.concatenate(
        [
            np.arange(5000),
            np.exp(rng.uniform(0, 43, 20_000)).astype(np.int64),
            rng.integers(0, 4 * 10**9, 20_000),
            *(reachable + step for step in range(-3, 4)),
        ]
    ).clip(0)
    gaps = torch.from_numpy(drawn)
    # A float64 logarithm, rounded: torch's and NumPy's of float32 are off by a unit on some CPUs.
    logarithms = np.log(drawn.clip(1).astype(np.float32).astype(np.float64)).astype(np.float32)
    formula = (logarithms / np.float32(divisor)).astype(np.int64).clip(0, last)
    counted = (thresholds[None, :] <= gaps[:, None]).sum(dim=1)
    np.testing.assert_array_equal(counted.numpy(), formula)


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0, 0), (1, 0), (60, 13), (3600, 27), (86400, 37), (30 * 86400, 49), (31557600, 57), (1_700_000_000, 70)],
)
def test_reference_values_of_the_natural_logarithm_over_0_301(seconds: int, bucket: int) -> None:
    assert int((time_bucket_thresholds(128, 0.301) <= seconds).sum()) == bucket


def test_thresholds_do_not_depend_on_the_default_device() -> None:
    time_bucket_thresholds.cache_clear()
    with torch.device("meta"):
        thresholds = time_bucket_thresholds(128, 0.301)
    assert thresholds.device.type == "cpu"
    assert int(thresholds[0]) == 2


@pytest.mark.parametrize(("num_buckets", "divisor"), [(0, 0.3), (5, 0.0), (5, -1.0), (5, float("nan"))])
def test_thresholds_refuse_what_has_no_meaning(num_buckets: int, divisor: float) -> None:
    with pytest.raises(ValueError, match=f"num_buckets {num_buckets}.*divisor {divisor}"):
        time_bucket_thresholds(num_buckets, divisor)


# --- Jagged batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[3, 0, 1, 5], [0], [1], [0, 0, 2], [4, 0, 0]])
@pytest.mark.parametrize("tail", [0, 4])
def test_padding_and_packing_are_inverse_and_blind_to_the_tail(lengths: list[int], tail: int) -> None:
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    total = sum(lengths)
    rows = torch.arange(1.0, total + tail + 1)[:, None].repeat(1, 2)
    rows[total:] = float("nan")
    padded = padded_from_jagged(rows, offsets, max([*lengths, 1]))
    for b, length in enumerate(lengths):
        assert torch.equal(padded[b, :length], rows[int(offsets[b]) : int(offsets[b + 1])])
        assert (padded[b, length:] == 0).all()
    packed = jagged_from_padded(padded, offsets, total + tail)
    assert torch.equal(packed[:total], rows[:total])
    assert (packed[total:] == 0).all()
    owner = [b for b, length in enumerate(lengths) for _ in range(length)]
    assert sequence_index(offsets, total + tail)[:total].tolist() == owner
    assert sequence_index(offsets, total + tail).tolist()[total:] == [len(lengths) - 1] * tail
