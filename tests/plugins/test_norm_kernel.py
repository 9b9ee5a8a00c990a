"""The norm kernel in Triton's interpreter against the float64 oracle, and the comparator that judges it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

from hstu_compile.plugins.kernels.aot import compile_norms
from hstu_compile.plugins.kernels.norm_variants import (
    MAX_WIDTH,
    NormVariant,
    default_norm_variants,
    norm_tasks,
    norm_tile,
    norm_variant,
)
from hstu_compile.plugins.kernels.tiles import SHARED_LIMIT
from hstu_compile.plugins.kernels.variants import ARCHS
from tests.attention_cases import round_to_dtype
from tests.norm_cases import NormCase, all_norm_cases, build_norm_case, check_norm, norm_bounds, norm_error, norm_oracle
from tests.oracle import Array
from tests.plugins.kernel_interpreter import KernelInterpreter

CASES = {f"{case.name}-{case.input_type}-{case.output_type}": case for case in all_norm_cases()}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[KernelInterpreter]:
    with KernelInterpreter() as running:
        yield running


@pytest.fixture(scope="module")
def outputs(interpreter: KernelInterpreter) -> dict[str, Array]:
    """Every case's output; they run while the first is waited for."""
    futures = {name: interpreter.submit_norm(case) for name, case in CASES.items()}
    return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("name", list(CASES))
def test_the_kernel_equals_the_oracle(outputs: dict[str, Array], name: str) -> None:
    check_norm(outputs[name], CASES[name])


def test_a_row_does_not_know_the_others(interpreter: KernelInterpreter, outputs: dict[str, Array]) -> None:
    """A row of NaN, as behind the end of a padded batch, and rows left out change no bit of the rest."""
    name = "norm-concat-rows-groups-float16-float16"
    case = CASES[name]
    x = case.x.copy()
    x[2] = np.nan
    poisoned = interpreter.submit_norm(dataclasses.replace(case, x=x)).result()
    assert np.isnan(poisoned[2]).any()
    kept = [0, 1, 3, 4]
    np.testing.assert_array_equal(poisoned[kept], outputs[name][kept])
    assert case.gate is not None
    some = dataclasses.replace(case, x=case.x[kept], gate=case.gate[kept])
    np.testing.assert_array_equal(interpreter.submit_norm(some).result(), outputs[name][kept])


@pytest.mark.parametrize("name", ["norm-concat-rows-groups-float16-float16", "norm-gate-float16-float16"])
def test_rows_that_are_columns_of_wider_tensors_give_the_same(
    interpreter: KernelInterpreter, outputs: dict[str, Array], name: str
) -> None:
    for columns in ((0, 8), (3, 5)):
        found = interpreter.submit_norm(CASES[name], columns).result()
        np.testing.assert_array_equal(found, outputs[name])


def rounded_answer(case: NormCase) -> Array:
    return round_to_dtype(norm_oracle(case).out, case.output_type)


def shifted_rows(out: Array) -> Array:
    return np.roll(out, 1, axis=0)


def one_wrong_row(out: Array) -> Array:
    changed = out.copy()
    changed[-1] = out[0]
    return changed


def swapped_columns(out: Array) -> Array:
    changed = out.copy()
    changed[:, [0, 1]] = out[:, [1, 0]]
    return changed


@pytest.mark.parametrize("types", [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_the_comparator_takes_rounding_and_rejects_errors(activation: int, types: tuple[str, str]) -> None:
    case = build_norm_case("judged", 10_000, 12, types, activation=activation)
    result = norm_oracle(case)
    right = rounded_answer(case)
    check_norm(right, case, result)
    bound = norm_bounds(case, result)[0]
    wrong = {
        "zeros": np.zeros_like(right),
        "0.9x": 0.9 * right,
        "rows shifted by one": shifted_rows(right),
        "one wrong row in 10,000": one_wrong_row(right),
        "columns swapped": swapped_columns(right),
        "a variance over D - 1": right * np.float32(np.sqrt(11 / 12)),
        "a number that is none": np.where(np.arange(right.size).reshape(right.shape) == 7, np.nan, right),
    }
    for what, values in wrong.items():
        assert norm_error(values, case, result) > bound, what
    with pytest.raises(ValueError, match="shape"):
        norm_error(right[:-1], case, result)


def test_the_oracle_is_the_textbook_s() -> None:
    case = build_norm_case("by hand", 3, 4, ("float32", "float32"), num_groups=2, activation=1, gate_silu=1, concat=1)
    assert case.gate is not None
    assert case.bias is not None
    out = norm_oracle(case).out
    for r in range(3):
        for c in range(4):
            group = case.x[r, c // 2 * 2 : c // 2 * 2 + 2].astype(float)
            mean = sum(group) / 2
            variance = sum((value - mean) ** 2 for value in group) / 2
            normed = (case.x[r, c] - mean) / (variance + 1e-5) ** 0.5 * float(case.scale[c]) + float(case.bias[c])
            gate = float(case.gate[r, c]) / (1 + np.exp(-float(case.gate[r, c])))
            assert out[r, [c, 4 + c, 8 + c]] == pytest.approx([gate, case.x[r, c], gate * normed], rel=1e-12)


# --- Variants and tiles -----------------------------------------------------------------------------------------------


def test_every_width_gets_the_block_that_holds_it_and_whole_vectors_where_it_can() -> None:
    for width in range(1, MAX_WIDTH + 1):
        variant = norm_variant("float16", "float16", width)
        assert width <= variant.block <= max(16, 2 * width - 1)
        assert variant.aligned == (width % 16 == 0)
        tile = norm_tile(variant.block)
        per_thread = tile.segments * variant.block / (32 * tile.num_warps)
        assert per_thread in (8, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_type": "int8"}, "must be one of"),
        ({"block": 24}, "power of two from 16 to 8192, got 24"),
        ({"block": 16384}, "got 16384"),
        ({"activation": 3}, "activation and concat must be 0, 1 or 2, got 3 and 0"),
        ({"concat": 1}, "go with activation 1, got activation 0"),
        ({"gate_silu": True}, "go with activation 1, got activation 0"),
    ],
)
def test_a_variant_that_no_kernel_has_is_refused(changes: dict[str, object], message: str) -> None:
    legal = NormVariant("float16", "float16", 64, aligned=True, activation=0, gate_silu=False, concat=0)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(legal, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "groups"), [(0, 1), (8193, 1), (30, 4)])
def test_a_width_or_groups_without_a_kernel_are_refused(width: int, groups: int) -> None:
    with pytest.raises(ValueError, match=f"{width}, {groups}"):
        norm_variant("float16", "float16", width, num_groups=groups)


def test_the_kernels_compile_for_every_architecture_without_scratch_and_fit_it() -> None:
    widest = norm_variant("float32", "float16", MAX_WIDTH, activation=2)
    unaligned = norm_variant("bfloat16", "float32", 51, num_groups=3, activation=1, concat=2)
    images = compile_norms([widest, unaligned])
    tasks = norm_tasks((widest, unaligned), ARCHS, with_ptx=True)
    assert [(image.variant, image.sm, image.is_ptx) for image in images] == [
        (t.variant, t.arch, t.is_ptx) for t in tasks
    ]
    for image in images:
        assert image.name == "hstu_norm"
        assert image.data[:4] == b"\x7fELF" or image.is_ptx
        assert image.shared_bytes <= SHARED_LIMIT[image.sm]


def test_aligned_halves_are_read_and_written_sixteen_bytes_at_a_time() -> None:
    layer = norm_variant("float16", "float16", 512, activation=1, gate_silu=True, concat=1)
    (ptx,) = [image for image in compile_norms([layer], archs=()) if image.is_ptx]
    text = ptx.data.rstrip(b"\0").decode()
    assert ".target sm_80\n" in text
    assert text.count("ld.global.v4.b32") + text.count("ld.global.L1::evict_first.v4.b32") >= 2  # x and gate
    assert text.count("st.global.v4.b32") == 3  # three parts


def test_the_default_norms_are_few_and_small() -> None:
    variants = default_norm_variants()
    assert len(set(variants)) == len(variants) == 9
    assert {v.input_type for v in variants} == {"float16"}
