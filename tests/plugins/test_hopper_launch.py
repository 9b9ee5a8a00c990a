"""The Hopper kernel's PyTorch face without a GPU: what it refuses, and what a launch is given."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import pytest
import torch

from hstu_compile.plugins.kernels.hopper import launch
from hstu_compile.plugins.kernels.hopper.driver import AttentionParameters
from hstu_compile.plugins.kernels.hopper.variants import HopperVariant

ROWS, HEADS, DIM = 6, 2, 64


def _arguments(**changed: Any) -> dict[str, Any]:
    q, k, v = (torch.zeros(ROWS, HEADS, DIM, dtype=torch.float16) for _ in range(3))
    offsets = torch.tensor([0, ROWS], dtype=torch.int32)
    given = {"q": q, "k": k, "v": v, "q_offsets": offsets, "k_offsets": offsets}
    return {**given, "alpha": 0.5, "scaling_seq_len": 8.0, **changed}


def test_tensors_without_a_hopper_gpu_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"not on a GPU of compute capability 9\.0.*Fix: call hstu_attention_triton"):
        launch.hstu_attention_hopper(**_arguments())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, AttentionParameters, dict[str, list[float]]]]:
    """Grid and parameters of every launch, and the floats that its pointers lead to at that moment."""
    seen: list[tuple[int, AttentionParameters, dict[str, list[float]]]] = []
    device = types.SimpleNamespace(multi_processor_count=132)
    image = types.SimpleNamespace(
        block_m=128, threads=384, shared_bytes=0, tile=types.SimpleNamespace(block_n=128), variant=None
    )

    def launch_kernel(_: object, grid: int, *arguments: Any) -> None:
        parameters = arguments[-1][3 if len(arguments[-1]) > 3 else -1]
        # What was freed too early is given to these.
        reused = [torch.full((count,), 7.0) for count in (6, 14) for _ in range(8)]
        lengths = {"ts_table": 6, "pos_table": 14}
        reached = {
            name: list((ctypes.c_float * count).from_address(getattr(parameters, name)))
            for name, count in lengths.items()
            if getattr(parameters, name)
        }
        assert all(float(each.min()) == 7.0 for each in reused)
        seen.append((grid, parameters, reached))

    def kernel(variant: HopperVariant, _: int) -> tuple[Any, None]:
        image.variant = variant
        return image, None

    monkeypatch.setattr(launch, "why_not", lambda *_: None)
    monkeypatch.setattr(launch, "_kernel", kernel)
    monkeypatch.setattr(launch, "_progress", lambda *_: torch.zeros(2, dtype=torch.int32))
    monkeypatch.setattr(launch, "tensor_map", lambda *_: None)
    monkeypatch.setattr(launch, "launch", launch_kernel)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: types.SimpleNamespace(cuda_stream=0))
    return seen


def test_tensors_that_are_not_contiguous_are_copied_until_the_launch(
    launched: list[tuple[int, AttentionParameters, dict[str, list[float]]]],
) -> None:
    # Two heads of two thresholds, and of seven positions, each as every second column of a wider table.
    ts_table = torch.arange(12.0).reshape(HEADS, 6)[:, ::2]
    pos_table = torch.arange(28.0).reshape(HEADS, 14)[:, ::2]
    times = torch.arange(ROWS)
    launch.hstu_attention_hopper(
        **_arguments(
            row_timestamps=times,
            col_timestamps=times,
            ts_table=ts_table,
            ts_thresholds=torch.tensor([1, 5]),
            pos_table=pos_table,
        )
    )
    [(grid, parameters, reached)] = launched
    assert reached == {"ts_table": ts_table.flatten().tolist(), "pos_table": pos_table.flatten().tolist()}
    assert (parameters.lq, parameters.lk, parameters.batch, parameters.heads, parameters.dv) == (ROWS, ROWS, 1, 2, 64)
    assert (parameters.num_buckets, parameters.ts_heads, parameters.pos_table_len, parameters.pos_heads) == (2, 2, 4, 2)
    assert (parameters.alpha, parameters.scaling_seq_len) == (0.5, 8.0)
    assert grid == HEADS


def test_a_short_launch_is_split_and_a_long_one_is_not(
    launched: list[tuple[int, AttentionParameters, dict[str, list[float]]]],
) -> None:
    keys = torch.zeros(4096, HEADS, DIM, dtype=torch.float16)
    launch.hstu_attention_hopper(**_arguments(k=keys, v=keys))
    assert launched[-1][0] == 8 * HEADS, "eight blocks a tile"
    launch.hstu_attention_hopper(**_arguments(k=keys, v=keys, split=2))
    assert launched[-1][0] == 2 * HEADS, "two, as was asked for"
    launch.hstu_attention_hopper(**_arguments())
    assert launched[-1][0] == HEADS, "too few keys for more than one block a tile"
    long = torch.zeros(128 * 100, HEADS, DIM, dtype=torch.float16)
    launch.hstu_attention_hopper(**_arguments(q=long))
    assert launched[-1][0] == 132
    launch.hstu_attention_hopper(**_arguments(q=long, split=8))
    assert launched[-1][0] == 8 * 14, "as many clusters as run at once"
    with pytest.raises(ValueError, match=r"split must be one of \(1, 2, 4, 8\) or None, got 3"):
        launch.hstu_attention_hopper(**_arguments(split=3))


def test_the_launch_says_how_large_its_clusters_are(
    launched: list[tuple[int, AttentionParameters, dict[str, list[float]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    kernel = launch._kernel
    variants: list[HopperVariant] = []
    monkeypatch.setattr(launch, "_kernel", lambda variant, _: variants.append(variant) or kernel(variant, _))
    monkeypatch.setattr(
        launch, "launch", lambda function, grid, cluster, *others: seen.append((cluster, variants[-1].shares))
    )
    for split in (1, 2, 4, 8):
        launch.hstu_attention_hopper(**_arguments(split=split))
    assert seen == [(1, False), (2, True), (4, True), (8, True)]
    assert not launched


def test_cached_keys_choose_the_kernel_and_its_split(
    launched: list[tuple[int, AttentionParameters, dict[str, list[float]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants: list[HopperVariant] = []
    arguments: list[int] = []
    kernel, launch_kernel = launch._kernel, launch.launch
    monkeypatch.setattr(launch, "_kernel", lambda variant, _: variants.append(variant) or kernel(variant, _))

    def counted(function: object, grid: int, *others: Any) -> None:
        arguments.append(len(others[-1]))
        launch_kernel(function, grid, *others[:-1], others[-1][:4])  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "launch", counted)
    cached = torch.zeros(4096, HEADS, DIM, dtype=torch.float16)
    cache_offsets = torch.tensor([0, 4096], dtype=torch.int32)
    cache = {"k_cached": cached, "v_cached": cached, "cache_offsets": cache_offsets}
    launch.hstu_attention_hopper(**_arguments(**cache))
    [(grid, parameters, _)] = launched
    assert (grid, parameters.lc, parameters.lk) == (8 * HEADS, 4096, ROWS)
    assert parameters.cache_offsets == cache_offsets.data_ptr()
    launch.hstu_attention_hopper(**_arguments())
    assert [(variant.has_cache, variant.shares) for variant in variants] == [(True, True), (False, False)]
    assert arguments == [6, 4], "maps of the cache where there is one"
    assert (launched[-1][1].lc, launched[-1][1].cache_offsets) == (0, None)
    with pytest.raises(ValueError, match="k_cached, v_cached and cache_offsets go together"):
        launch.hstu_attention_hopper(**_arguments(k_cached=cached))
    with pytest.raises(ValueError, match=r"v_cached must be \(4096, 2, 64\) torch.float16"):
        launch.hstu_attention_hopper(**_arguments(**{**cache, "v_cached": cached[:5]}))


def test_the_form_of_silu_chooses_the_kernel(
    launched: list[tuple[int, AttentionParameters, dict[str, list[float]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    kernel = launch._kernel
    monkeypatch.setattr(launch, "_kernel", lambda variant, _: asked.append(variant.is_accurate) or kernel(variant, _))
    for silu in ({}, {"silu": "fast"}, {"silu": "accurate"}):
        launch.hstu_attention_hopper(**_arguments(**silu))
    assert asked == [False, False, True]
    assert len(launched) == 3
    with pytest.raises(ValueError, match="silu must be one of fast, accurate, got 'exact'"):
        launch.hstu_attention_hopper(**_arguments(silu="exact"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_targets": torch.zeros(2, dtype=torch.int32)}, r"num_targets must be \[1\] torch.int32"),
        ({"row_timestamps": torch.zeros(ROWS, dtype=torch.int64)}, "go together"),
        ({"pos_table": torch.zeros(HEADS, 4)}, "odd"),
        ({"v": torch.zeros(ROWS - 1, HEADS, DIM, dtype=torch.float16)}, "shapes do not agree"),
    ],
)
def test_tensors_that_contradict_each_other_are_named(
    launched: list[tuple[int, AttentionParameters, dict[str, list[float]]]], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        launch.hstu_attention_hopper(**_arguments(**changed))
    assert not launched
