"""The Triton kernel, run by Triton's interpreter on CPU, equals the float64 oracle over the whole grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
pytest.importorskip("torch")

from tests.attention_cases import among_others, attention_grid, build_case, split_requests, with_cache, with_dtype
from tests.oracle import (
    Array,
    AttentionCase,
    attention_error,
    attention_low_precision,
    check_attention,
    oracle_of,
)
from tests.plugins.kernel_interpreter import KernelInterpreter
from tests.strategies import attention_cases, seq_lengths
from tests.tolerances import LOW_PRECISION_FACTOR

GRID = attention_grid()
#: Half precision repeats the arithmetic, not the index logic: one case of each kind.
HALF_NAMES = (
    "targets",
    "window-context-targets-tail",
    "research",
    "dims-25x25",
    "dims-50x50",
    "dims-16x40",
    "dims-128x128",
    "dims-256x256",
    "delta-all",
    "garbage-tail",
    "cached-score",
    "cached-score-among-others",
    "cached-append-biased",
)
#: bfloat16 repeats float16 with other roundings: one case of each product, bias and cache.
BFLOAT16_NAMES = ("targets", "research", "dims-25x25", "dims-256x256", "cached-score")
HALF_GRID = [
    with_dtype(case, dtype)
    for dtype, names in (("float16", HALF_NAMES), ("bfloat16", BFLOAT16_NAMES))
    for case in GRID
    if case.name in names
]
#: The rest of bfloat16's cases, as slow tests.
SLOW_GRID = [with_dtype(c, "bfloat16") for c in GRID if c.name in HALF_NAMES and c.name not in BFLOAT16_NAMES]
#: Tiles that are not square, and one key tile wider than most sequences.
TILED_NAMES = (
    "window-context-targets-tail",
    "group-over-tile",
    "context-over-tile-and-targets",
    "both-per-head-targets-window",
    "one-long",
    "cached-score",
    "cached-all",
)
TILED = [(c, tile) for c in GRID if c.name in TILED_NAMES for tile in ((32, 16), (16, 64))]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[KernelInterpreter]:
    with KernelInterpreter() as pool:
        yield pool


@pytest.fixture(scope="module")
def outputs(interpreter: KernelInterpreter) -> dict[tuple[str, str], Future[Array]]:
    """The grid's outputs, all started at once: the interpreter computes while the oracle does."""
    return {(c.dtype, c.name): interpreter.submit(c) for c in [*GRID, *HALF_GRID]}


@pytest.mark.parametrize("case", GRID, ids=lambda c: c.name)
def test_grid_in_float32(case: AttentionCase, outputs: dict[tuple[str, str], Future[Array]]) -> None:
    check_attention(outputs[case.dtype, case.name].result(), oracle_of(case), case.dtype)


@pytest.mark.parametrize("case", HALF_GRID, ids=lambda c: f"{c.dtype}-{c.name}")
def test_grid_in_half_precision(case: AttentionCase, outputs: dict[tuple[str, str], Future[Array]]) -> None:
    check_half_precision(case, outputs[case.dtype, case.name].result())


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_GRID, ids=lambda c: f"{c.dtype}-{c.name}")
def test_the_rest_of_the_grid_in_bfloat16(case: AttentionCase, interpreter: KernelInterpreter) -> None:
    check_half_precision(case, interpreter.run(case))


def check_half_precision(case: AttentionCase, out: Array) -> None:
    result = oracle_of(case)
    report = check_attention(out, result, case.dtype)
    plain = attention_error(attention_low_precision(case), result, case.dtype)
    assert report.componentwise <= LOW_PRECISION_FACTOR * plain.componentwise, (report, plain)
    assert report.rms <= LOW_PRECISION_FACTOR * plain.rms, (report, plain)


@pytest.mark.parametrize(("case", "tile"), TILED, ids=lambda x: getattr(x, "name", str(x)))
def test_other_tile_shapes(case: AttentionCase, tile: tuple[int, int], interpreter: KernelInterpreter) -> None:
    check_attention(interpreter.run(case, tile=tile), oracle_of(case), case.dtype)


@pytest.mark.parametrize("name", ["causal", "position", "research", "delta", "garbage-tail"])
def test_causal_variant_equals_general_variant(name: str, interpreter: KernelInterpreter) -> None:
    case = next(c for c in GRID if c.name == name)
    plain, general = interpreter.submit(case, mask_kind=0), interpreter.submit(case, mask_kind=1)
    np.testing.assert_array_equal(plain.result(), general.result())


@pytest.mark.parametrize("cached", [[16, 20], [17, 0], [40, 20]])
def test_a_split_of_the_keys_changes_no_bit(cached: list[int], interpreter: KernelInterpreter) -> None:
    joined = build_case([40, 20], query_lengths=[20, 20], num_heads=1, time_bias="shared", seed=10)
    whole, split = interpreter.submit(joined), interpreter.submit(with_cache(joined, cached))
    np.testing.assert_array_equal(whole.result(), split.result())


def test_rows_of_others_between_those_of_sequences_change_no_bit(interpreter: KernelInterpreter) -> None:
    alone = with_cache(build_case([40, 20], query_lengths=[20, 3], num_targets=[20, 3], num_heads=1, seed=11), [20, 17])
    among = among_others(alone, [70, 5])
    assert np.isnan(among.k_cached).any()
    apart = interpreter.submit(alone), interpreter.submit(among)
    np.testing.assert_array_equal(*(each.result() for each in apart))


@pytest.mark.parametrize("name", ["window-context-targets-tail", "cached-append-biased"])
def test_rows_of_wider_tensors_are_read_where_they_lie(name: str, interpreter: KernelInterpreter) -> None:
    case = next(c for c in GRID if c.name == name)
    contiguous, columns = interpreter.submit(case), interpreter.submit(case, columns=(1, 8, 5))
    check_attention(columns.result(), oracle_of(case), case.dtype)
    np.testing.assert_array_equal(columns.result(), contiguous.result())


def test_more_sequences_than_one_scan_step(interpreter: KernelInterpreter) -> None:
    lengths = [1, 0, 2] * 45
    case = build_case(lengths, num_heads=1, num_targets=[1, 0, 1] * 45, seed=7)
    assert len(lengths) > 128
    check_attention(interpreter.run(case), oracle_of(case), case.dtype)


def test_fault_in_a_later_scan_step_zeroes_everything(interpreter: KernelInterpreter) -> None:
    case = build_case([1] * 140, num_heads=1, seed=8)
    offsets = case.q_offsets.copy()
    offsets[135] = 3
    assert not interpreter.run(dataclasses.replace(case, q_offsets=offsets)).any()


def test_nan_behind_the_tile_of_a_row_does_not_reach_it(interpreter: KernelInterpreter) -> None:
    case = build_case([40], num_targets=[20], seed=9)
    dirty = dataclasses.replace(case, k=case.k.copy(), v=case.v.copy())
    dirty.k[32:], dirty.v[32:] = np.nan, np.inf
    clean_out, dirty_out = interpreter.submit(case).result(), interpreter.submit(dirty).result()
    np.testing.assert_array_equal(clean_out[:32], dirty_out[:32])
    assert not np.isfinite(dirty_out[32:]).any(axis=(1, 2)).any()


@given(case=attention_cases())
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_drawn_cases(case: AttentionCase, interpreter: KernelInterpreter) -> None:
    check_attention(interpreter.run(case), oracle_of(case), case.dtype)


@given(lengths=seq_lengths(longest=24), data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_permuting_requests_permutes_outputs(
    lengths: list[int], data: st.DataObject, interpreter: KernelInterpreter
) -> None:
    case = build_case(lengths, num_heads=1, num_targets=[n // 3 for n in lengths], pos_bias="shared", seed=11)
    order = data.draw(st.permutations(range(len(lengths))))
    future = interpreter.submit(case)
    permuted = interpreter.run(split_requests(case, order))
    rows = [future.result()[case.q_offsets[b] : case.q_offsets[b + 1]] for b in order]
    np.testing.assert_array_equal(permuted, np.concatenate([permuted[:0], *rows]))


def test_candidates_in_micro_batches_equal_one_pass(interpreter: KernelInterpreter) -> None:
    history, candidates = 21, 18
    whole = build_case(
        [history + candidates],
        num_targets=[candidates],
        time_bias="shared",
        pos_bias="shared",
        pos_table_len=64,
        seed=12,
    )
    assert whole.row_timestamps is not None
    assert whole.col_timestamps is not None
    expected = interpreter.submit(whole)
    for first, last in [(0, 7), (7, 8), (8, 18)]:
        keys = [*range(history), *range(history + first, history + last)]
        rows = slice(history + first, history + last)
        chunk = dataclasses.replace(
            whole,
            q=whole.q[rows],
            k=whole.k[keys],
            v=whole.v[keys],
            q_offsets=np.array([0, last - first], dtype=np.int32),
            k_offsets=np.array([0, len(keys)], dtype=np.int32),
            num_targets=np.array([last - first], dtype=np.int32),
            row_timestamps=whole.row_timestamps[rows],
            col_timestamps=whole.col_timestamps[keys],
        )
        result = oracle_of(chunk)
        check_attention(expected.result()[rows], result, "float32")
        check_attention(interpreter.run(chunk), result, "float32")


def test_comparator_sees_a_kernel_that_ignores_its_window(interpreter: KernelInterpreter) -> None:
    case = next(c for c in GRID if c.name == "window")
    unwindowed = dataclasses.replace(case, attrs=dataclasses.replace(case.attrs, max_attn_len=0))
    with pytest.raises(AssertionError, match="differs from the float64 oracle"):
        check_attention(interpreter.run(unwindowed), oracle_of(case), case.dtype)
