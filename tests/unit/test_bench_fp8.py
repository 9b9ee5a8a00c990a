"""The simulation of e4m3 attention and the floors that docs/fp8-attention.md shows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import fp8_forms  # noqa: E402
import fp8_table  # noqa: E402

from hstu_compile.compare import whole_error  # noqa: E402
from hstu_compile.quantized import rounded_to_grid  # noqa: E402


def test_numbers_are_those_of_the_quantised_graphs() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(10_000) * 100).float()
    found = fp8_forms.to_e4m3(x, 0.25)
    np.testing.assert_array_equal(found.numpy(), rounded_to_grid(x.numpy() / np.float32(0.25), "fp8") * 0.25)
    assert float(found.abs().max()) == 448 * 0.25, "what is too large is the largest number"


def test_a_searched_scale_errs_no_more_than_that_of_the_largest_magnitude() -> None:
    x = torch.from_numpy(np.random.default_rng(1).standard_normal(5_000))
    x[0] = 3000.0

    def error(rule: fp8_forms.Rule) -> float:
        return float((fp8_forms.to_e4m3(x, fp8_forms.scale_of(x, rule)) - x).square().sum())

    assert error("searched") <= error("amax") < error("one")
    assert fp8_forms.scale_of(torch.zeros(3), "amax") == 1.0


def test_a_product_of_few_bits_cuts_what_is_below_them() -> None:
    a = torch.tensor([[1.0, 2.0**-13, 2.0**-14, -(2.0**-14)]], dtype=torch.float64)
    ones = torch.ones((4, 1), dtype=torch.float64)
    assert float(fp8_forms.product(a, ones, None)) == 1 + 2.0**-13
    assert float(fp8_forms.product(a[:, :2], ones[:2], 13)) == 1 + 2.0**-13
    assert float(fp8_forms.product(a[:, ::2], ones[::2], 13)) == 1.0
    # 33 columns are two instructions: the second adds to what the first has left.
    row = torch.full((1, 33), 2.0**-13, dtype=torch.float64)
    row[0, 0] = 1.0
    assert float(fp8_forms.product(row, torch.ones((33, 1), dtype=torch.float64), 13)) == 1 + 32 * 2.0**-13


def test_each_form_errs_as_its_types_do() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (torch.from_numpy(rng.standard_normal((96, 64))).half().double() for _ in range(3))
    positions = torch.arange(96)
    exact = fp8_forms.exact_attention(q, k, v, 0.125, positions).numpy()
    errors = {
        form.name: whole_error([fp8_forms.attention(q, k, v, form, 0.125, positions).numpy()], [exact])
        for form in fp8_forms.FORMS
    }
    assert errors["float16"] < 2.0**-11 < errors["bfloat16"] < 2.0**-7 < errors["q k e4m3"] < errors["all e4m3"] < 0.07


def test_floors_are_those_of_the_notes() -> None:
    assert [fp8_table.tensor_clocks(dim, 0) for dim in (64, 128, 256)] == [0.0625, 0.125, 0.25]
    assert [fp8_table.tensor_clocks(dim, 2) for dim in (64, 128, 256)] == [0.03125, 0.0625, 0.125]
    # 128 keys at D = 128: 512 clocks of operands, 256 of copies, 256 of a transposition, for 128 x 128 elements.
    assert fp8_table.shared_clocks(128, 1, is_transposed=True) == 1024 / 128**2
    assert fp8_table.shared_clocks(128, 1, is_transposed=False) == 768 / 128**2
