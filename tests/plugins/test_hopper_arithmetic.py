"""The Hopper kernel's masks, key tiles, time table and SiLU, compiled for this machine and compared with the oracle."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention_cases import geometric_thresholds
from tests.oracle import AttentionAttrs, _valid_attn_mask

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "plugins" / "kernels" / "hopper"
HOST = Path(__file__).parent / "hopper_host"
#: (query rows, keys) of a tile: every one that variants.py has, and a small one in which little things matter.
TILES = ((128, 128), (128, 64), (192, 128), (16, 8))
#: Two times, each less than 2^30 - 1 from the sequence's first, differ by no more.
FARTHEST = 2 * (2**30 - 2)
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")


def _compiled(folder: Path, sources: Path) -> ctypes.CDLL:
    library = folder / "arithmetic.so"
    command = [str(COMPILER), "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-frounding-math"]
    command += [f"-I{sources}", f"-I{HOST}", str(HOST / "arithmetic.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.hstu_time_bias_range.restype = None
    loaded.hstu_time_bias_range.argtypes = (
        *(ctypes.c_void_p,) * 2,
        ctypes.c_int32,
        *(ctypes.c_void_p,) * 2,
        ctypes.c_int32,
        *(ctypes.c_void_p,) * 3,
    )
    loaded.hstu_searched_time_bias.restype = ctypes.c_float
    loaded.hstu_searched_time_bias.argtypes = (*(ctypes.c_void_p,) * 2, ctypes.c_int32, *(ctypes.c_int64,) * 2)
    return loaded


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The functions of hopper_host/arithmetic.cpp."""
    return _compiled(tmp_path_factory.mktemp("hopper"), SOURCES)


def _seen(
    library: ctypes.CDLL,
    lengths: tuple[int, int, int],
    context: int,
    attrs: AttentionAttrs,
    tile: tuple[int, int],
    *,
    is_plain: bool = False,
    cached: int = -1,
) -> np.ndarray:
    """How often each query attends to each key, over all tiles of a sequence; ``cached`` -1: by a kernel without."""
    num_queries, num_keys, targets = lengths
    rows = []
    for block in range(-(-num_queries // tile[0])):
        count = min(tile[0], num_queries - block * tile[0])
        seen, counts = np.zeros((count, num_keys), np.uint8), (ctypes.c_int32 * 2)()
        broken = library.hstu_tile_mask(
            int(is_plain),
            num_queries,
            num_keys,
            targets,
            context,
            attrs.target_group_size,
            attrs.max_attn_len,
            attrs.min_full_attn_seq_len,
            cached,
            block,
            *tile,
            seen.ctypes.data_as(ctypes.c_void_p),
            counts,
        )
        assert broken == 0, (
            f"block {block}: a key tile lies outside the sequence (1), lets rows see what is outside (2), or lies in "
            "the cache and behind it (3)"
        )
        rows.append(seen)
    return np.concatenate(rows)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_key_tiles_and_masks_are_the_contracts(arithmetic: ctypes.CDLL, data: st.DataObject) -> None:
    tile = data.draw(st.sampled_from(TILES))
    longest = 3 * tile[0] + 5
    num_keys = data.draw(st.integers(1, longest))
    num_queries = data.draw(st.integers(1, longest))
    targets = data.draw(st.integers(0, num_keys))
    context = data.draw(st.integers(0, min(num_keys, 2 * tile[1])))
    attrs = AttentionAttrs(
        target_group_size=data.draw(st.integers(1, 5)),
        max_attn_len=data.draw(st.sampled_from((0, 0, 1, tile[1] - 1, tile[1], 2 * tile[1] + 3))),
        min_full_attn_seq_len=data.draw(st.sampled_from((0, 1, tile[1]))),
    )
    cached = data.draw(st.integers(-1, num_keys))
    seen = _seen(arithmetic, (num_queries, num_keys, targets), context, attrs, tile, cached=cached)
    expected = _valid_attn_mask(num_queries, num_keys, targets, context, attrs)
    np.testing.assert_array_equal(seen, expected.astype(np.uint8))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_plain_causal_tiles_are_the_contracts(arithmetic: ctypes.CDLL, data: st.DataObject) -> None:
    tile = data.draw(st.sampled_from(TILES))
    num_keys, num_queries = (data.draw(st.integers(1, 3 * tile[0] + 5)) for _ in range(2))
    attrs = AttentionAttrs()
    cached = data.draw(st.integers(-1, num_keys))
    seen = _seen(arithmetic, (num_queries, num_keys, 0), 0, attrs, tile, is_plain=True, cached=cached)
    np.testing.assert_array_equal(seen, _valid_attn_mask(num_queries, num_keys, 0, 0, attrs).astype(np.uint8))


def test_the_comparison_of_masks_sees_a_shift(tmp_path: Path) -> None:
    altered = tmp_path / "hopper"
    shutil.copytree(SOURCES, altered)
    text = (altered / "tile.cuh").read_text(encoding="utf-8")
    assert "offset <= bounds.row - first" in text
    (altered / "tile.cuh").write_text(
        text.replace("offset <= bounds.row - first", "offset < bounds.row - first"), encoding="utf-8"
    )
    library = _compiled(tmp_path, altered)
    attrs = AttentionAttrs()
    seen = _seen(library, (40, 40, 0), 0, attrs, (16, 8))
    assert (seen != _valid_attn_mask(40, 40, 0, 0, attrs)).any()


def _table_bias(
    library: ctypes.CDLL, thresholds: np.ndarray, differences: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    biases = np.arange(len(thresholds) + 1, dtype=np.float32)
    out = np.full(len(differences), np.nan, np.float32)
    crowded = library.hstu_time_bias(
        thresholds.ctypes.data_as(ctypes.c_void_p),
        biases.ctypes.data_as(ctypes.c_void_p),
        len(thresholds),
        differences.astype(np.int32).ctypes.data_as(ctypes.c_void_p),
        len(differences),
        out.ctypes.data_as(ctypes.c_void_p),
    )
    expected = 0.5 * np.searchsorted(thresholds, differences, side="right").astype(np.float32)
    return out, expected, int(crowded)


@pytest.mark.parametrize("ratio", [1.351, 2.0, 1.2])
def test_time_buckets_are_exact_on_both_sides_of_every_threshold(arithmetic: ctypes.CDLL, ratio: float) -> None:
    # The research family's buckets, those of a power of two, and ones that are nearly as close as cells.
    thresholds = np.unique(geometric_thresholds(128, ratio, 64))
    inside = thresholds[thresholds < 2**31 - 2]
    powers = 2 ** np.arange(31, dtype=np.int64)
    around = np.concatenate([inside - 1, inside, inside + 1, powers - 1, powers, [0, FARTHEST]])
    spread = np.random.default_rng(0).integers(0, FARTHEST, 100_000)
    differences = np.concatenate([around[(around >= 0) & (around <= FARTHEST)], spread, np.arange(5000)])
    out, expected, crowded = _table_bias(arithmetic, thresholds, differences)
    assert crowded == 0
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("ratio", [1.351, 2.0, 1.2])
def test_a_range_of_times_names_its_threshold_and_both_biases(arithmetic: ctypes.CDLL, ratio: float) -> None:
    thresholds = np.unique(geometric_thresholds(128, ratio, 64))
    biases = np.random.default_rng(1).normal(size=len(thresholds) + 1).astype(np.float32)
    inside = thresholds[thresholds < 2**30]
    edges = np.concatenate([inside - 1, inside, inside + 1, [0, FARTHEST]])
    widths = np.random.default_rng(0).integers(0, 1 + inside[-1] // 8, 200)
    least = np.repeat(edges, len(widths)).clip(0, FARTHEST)
    most = (least + np.tile(widths * np.random.default_rng(2).random(len(widths)) ** 8, len(edges)).astype(int)).clip(
        0, FARTHEST
    )
    crossed, threshold = np.zeros(len(least), np.int32), np.zeros(len(least), np.int32)
    halves = np.zeros((len(least), 2), np.float32)
    first, last = least.astype(np.int32), most.astype(np.int32)
    arithmetic.hstu_time_bias_range(
        thresholds.ctypes.data_as(ctypes.c_void_p),
        biases.ctypes.data_as(ctypes.c_void_p),
        len(thresholds),
        *(array.ctypes.data_as(ctypes.c_void_p) for array in (first, last)),
        len(least),
        *(array.ctypes.data_as(ctypes.c_void_p) for array in (crossed, threshold, halves)),
    )
    buckets = [np.searchsorted(thresholds, ends, side="right") for ends in (least, most)]
    np.testing.assert_array_equal(crossed, buckets[1] - buckets[0])
    np.testing.assert_array_equal(halves, np.stack([0.5 * biases[bucket] for bucket in buckets], 1))
    is_one = crossed == 1
    np.testing.assert_array_equal(threshold[is_one], thresholds[buckets[0][is_one]])
    assert {0, 1, 2} <= set(crossed.tolist())


def test_thresholds_that_no_difference_reaches_are_no_crowd(arithmetic: ctypes.CDLL) -> None:
    # More than a block keeps: those behind 2^31 change nothing.
    near = np.unique(geometric_thresholds(60, 1.351, 64))
    thresholds = np.concatenate([near, 2**31 + np.arange(300, dtype=np.int64)])
    differences = np.concatenate([near - 1, near, [0, FARTHEST]])
    out, expected, crowded = _table_bias(arithmetic, thresholds, differences)
    assert crowded == 0
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("count", [256, 257, 400])
def test_more_thresholds_than_a_block_keeps_are_a_crowd_unless_no_difference_reaches_them(
    arithmetic: ctypes.CDLL, count: int
) -> None:
    # All at the start of one cell, where even many are none that lie inside of it.
    _, _, crowded = _table_bias(arithmetic, np.full(count, 1023, np.int64), np.arange(4))
    assert crowded == int(count > 256)


def test_close_thresholds_are_noticed(arithmetic: ctypes.CDLL) -> None:
    _, _, crowded = _table_bias(arithmetic, np.array([1_000_000, 1_000_001], np.int64), np.arange(4))
    assert crowded == 1


@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 9), (9, 5), (2**62, -(2**62)), (-(2**63), 2**63 - 1)])
def test_searched_buckets_are_exact_for_any_times(arithmetic: ctypes.CDLL, row: int, column: int) -> None:
    thresholds = np.unique(geometric_thresholds(128, 1.351, 64))
    biases = np.arange(len(thresholds) + 1, dtype=np.float32)
    bias = arithmetic.hstu_searched_time_bias(
        thresholds.ctypes.data_as(ctypes.c_void_p),
        biases.ctypes.data_as(ctypes.c_void_p),
        len(thresholds),
        row,
        column,
    )
    distance = min(abs(row - column), 2**63 - 1)
    assert bias == 0.5 * np.searchsorted(thresholds, distance, side="right")


#: Relative errors that the PTX ISA documents: of tanh.approx, of ex2.approx (2 ulps) and of rcp.approx (1 ulp).
DOCUMENTED = (2.0**-11, 2.0**-22, 2.0**-23)
#: What silu.cuh says is lost where the accurate form's denominator leaves float32's range.
FLUSHED = 2.0**-119


def _silu(library: ctypes.CDLL, halves: np.ndarray, errors: tuple[float, ...], *, is_accurate: bool) -> np.ndarray:
    out = np.full(len(halves), np.nan, np.float32)
    library.hstu_silu(
        int(is_accurate),
        halves.ctypes.data_as(ctypes.c_void_p),
        len(halves),
        (ctypes.c_double * 3)(*errors),
        out.ctypes.data_as(ctypes.c_void_p),
    )
    return out.astype(np.float64)


def _exact_silu(x: np.ndarray) -> np.ndarray:
    # By the power that is at most one: the other overflows.
    power = np.exp(-np.abs(x))
    return np.where(x >= 0, x, x * power) / (1.0 + power)


def _halves() -> np.ndarray:
    """Halves of scores of both signs: of every magnitude, and densely where SiLU bends."""
    magnitudes = np.concatenate([np.geomspace(2.0**-140, 2.0**126, 20_000), np.linspace(0, 64, 200_001)])
    return np.concatenate([magnitudes, -magnitudes]).astype(np.float32)


def _worst_share(library: ctypes.CDLL, *, is_accurate: bool) -> float:
    """The largest error as a share of the bound in silu.cuh, over all directions of the approximations' errors."""
    halves = _halves()
    x = 2.0 * halves.astype(np.float64)
    exact = _exact_silu(x)
    if is_accurate:
        bound = (4.0 + np.maximum(-x, 0.0)) * 2.0**-23 * np.abs(exact) + FLUSHED
    else:
        # Half of the least float32 beside it: of a subnormal sum, rounding is no share.
        bound = 2.0**-12 * _exact_silu(np.abs(x)) + 2.0**-24 * np.abs(exact) + 2.0**-150
    shares = [0.0]
    # The documented errors include the rounding of the results, which the functions of arithmetic.cpp add.
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        errors = tuple(sign * (error - 2.0**-24) for sign, error in zip(signs, DOCUMENTED, strict=True))
        found = _silu(library, halves, errors, is_accurate=is_accurate)
        assert np.isfinite(found).all()
        shares.append(float(np.max(np.abs(found - exact)[bound > 0] / bound[bound > 0])))
    return max(shares)


@pytest.mark.parametrize("is_accurate", [False, True])
def test_silu_keeps_the_bound_that_is_stated_and_comes_near_it(arithmetic: ctypes.CDLL, is_accurate: bool) -> None:
    # A bound twice as wide as it need be would be no statement. The exact values are float64's, which is the tolerance.
    assert 0.5 < _worst_share(arithmetic, is_accurate=is_accurate) <= 1.0 + 1e-12


def test_the_fast_silu_adds_to_a_positive_score_half_of_what_float16_rounds_by(arithmetic: ctypes.CDLL) -> None:
    halves = _halves()
    halves = halves[(halves > 2.0**-14) & (halves < 2.0**14)]
    exact = _exact_silu(2.0 * halves.astype(np.float64))
    for sign in (-1.0, 1.0):
        found = _silu(arithmetic, halves, (sign * DOCUMENTED[0], 0.0, 0.0), is_accurate=False)
        assert np.max(np.abs(found - exact) / exact) < 1.001 * 2.0**-12


def test_the_accurate_silu_is_hundreds_of_times_closer_to_the_weights_of_negative_scores(
    arithmetic: ctypes.CDLL,
) -> None:
    halves = np.linspace(-8, -1, 1001).astype(np.float32)
    exact = _exact_silu(2.0 * halves.astype(np.float64))
    worst = [
        np.max(np.abs(_silu(arithmetic, halves, DOCUMENTED, is_accurate=form) - exact) / np.abs(exact))
        for form in (False, True)
    ]
    assert worst[0] > 2.0**-11
    assert worst[1] < 2.0**-18
    assert worst[1] * 1000 < worst[0]


@pytest.mark.parametrize("is_accurate", [False, True])
def test_silu_of_what_is_not_a_number(arithmetic: ctypes.CDLL, is_accurate: bool) -> None:
    halves = np.array([np.nan, -np.inf, np.inf, 0.0, -1e30, 1e30], np.float32)
    found = _silu(arithmetic, halves, (0.0, 0.0, 0.0), is_accurate=is_accurate)
    np.testing.assert_array_equal(found, np.array([np.nan, np.nan, np.inf, 0.0, 0.0, np.float32(2e30)]))


def test_the_comparison_of_silu_sees_a_tanh_that_is_twice_as_far_off(
    arithmetic: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "DOCUMENTED", (2.0**-10, 2.0**-20, 2.0**-21))
    assert _worst_share(arithmetic, is_accurate=False) > 1.5
    assert _worst_share(arithmetic, is_accurate=True) > 1.5
