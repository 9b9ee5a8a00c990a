"""Which kernels the resource report compiles, and which rows it replaces."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import hopper_resources


def test_the_resource_report_has_every_kernel_with_and_without_a_cache() -> None:
    variants = hopper_resources.all_variants()
    cached = {variant for variant in variants if variant.has_cache}
    assert len(set(variants)) == len(variants) == 2 * len(cached)


def test_kernels_that_are_compiled_again_replace_their_own_rows_alone(tmp_path: Path) -> None:
    first, second, *_ = (dataclasses.asdict(variant) for variant in hopper_resources.all_variants())
    target = tmp_path / "resources.csv"
    hopper_resources.write_rows(target, (*first, "commit"), [{**first, "commit": "old"}, {**second, "commit": "old"}])
    rows = hopper_resources.merged(target, [{**first, "commit": "new"}])
    assert [row["commit"] for row in rows] == ["new", "old"]
    assert str(rows[1]["shares"]) == str(second["shares"])


def test_kernels_are_chosen_by_the_values_of_the_file() -> None:
    variants = hopper_resources.all_variants()
    found = hopper_resources.chosen(variants, ["block_dim=256", "shares=True", "dtype=float16"])
    assert found
    assert all(each.block_dim == 256 and each.shares and each.dtype == "float16" for each in found)
    assert hopper_resources.chosen(variants, []) == variants
    with pytest.raises(SystemExit, match=r"--only dim: a kernel has no such field. Fix: one of dtype, block_dim"):
        hopper_resources.chosen(variants, ["dim=256"])
    with pytest.raises(SystemExit, match="no kernel has block_dim=257"):
        hopper_resources.chosen(variants, ["block_dim=257"])
