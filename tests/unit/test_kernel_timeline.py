"""Timelines of traces: what ran, how long, and the gaps; and what is needed to record one."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from hstu_compile.errors import EngineError
from hstu_compile.kernel_timeline import (
    ATTENTION,
    COPY,
    GAPS,
    OTHER,
    PRODUCT,
    SPAN,
    calls_of,
    device_events,
    kind_of,
    start_tracer,
    timeline_rows,
    us_by_kind,
)
from tests.kernel_traces import call_at, trace_of


def test_a_timeline_has_every_kernel_once_and_the_gaps() -> None:
    cut_off = call_at(500_000.0)[:2]
    trace = trace_of(call_at(0.0), call_at(100_000.0, slower=3.0), call_at(200_000.0), cut_off)
    calls = calls_of(device_events(trace))
    assert [len(call) for call in calls] == [4, 4, 4, 2]
    found = {row["kernel"]: row for row in timeline_rows(calls)}
    assert list(found) == [
        "nvjet_hsh_128x256",
        "hstu_attention_sm90",
        "triton_poi_fused_silu",
        GAPS,
        SPAN,
    ]
    assert found["nvjet_hsh_128x256"]["launches"] == 2
    assert found["nvjet_hsh_128x256"]["us"] == 20.0
    assert found["hstu_attention_sm90"]["kind"] == ATTENTION
    assert found[SPAN]["us"] == 46.0
    # 10 to 14; the overlap of the last two is counted once.
    assert found[GAPS]["us"] == 4.0
    assert found[GAPS]["share"] == pytest.approx(4 / 46)


def test_a_trace_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernels"):
        list(timeline_rows(calls_of(device_events(trace_of()))))


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("hstu_norm", OTHER),
        ("void cutlass::device_kernel<flash::enable_sm90<HstuFwd>>", ATTENTION),
        ("nvjet_sm90_hsh_256x128", PRODUCT),
        ("sm90_xmma_gemm_f16f16", PRODUCT),
        ("Memcpy DtoD (Device -> Device)", COPY),
        ("at::native::CatArrayBatchedCopy", COPY),
        ("triton_red_fused_native_layer_norm_3", OTHER),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_kinds_and_gaps_make_up_the_span_but_for_what_overlaps() -> None:
    calls = calls_of(device_events(trace_of(call_at(0.0), call_at(100_000.0))))
    kinds = us_by_kind(timeline_rows(calls))
    assert kinds == {ATTENTION: 20.0, PRODUCT: 20.0, COPY: 0.0, OTHER: 6.0, GAPS: 4.0, SPAN: 46.0}


def fake_torch(cuda: str | None, available: bool, used: list[Any]) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        __version__="2.13.0",
        version=types.SimpleNamespace(cuda=cuda),
        cuda=types.SimpleNamespace(is_available=lambda: available),
        zeros=lambda *shape, device: used.append(device),
    )


@pytest.mark.parametrize(
    ("torch", "why"),
    [
        (None, "torch cannot be imported"),
        (fake_torch(None, False, []), "torch 2.13.0 is built without CUDA"),
        (fake_torch("13.0", False, []), "torch 2.13.0 is built for CUDA 13.0 and sees no GPU"),
    ],
)
def test_without_torch_on_a_gpu_nothing_can_be_traced(monkeypatch: pytest.MonkeyPatch, torch: Any, why: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(EngineError, match=why) as caught:
        start_tracer()
    assert caught.value.code == "HSTU-E406"
    assert "--no-timeline" in caught.value.fix


def test_the_tracer_starts_by_using_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    monkeypatch.setitem(sys.modules, "torch", fake_torch("13.0", True, used))
    assert start_tracer() == "2.13.0"
    assert used == ["cuda"]
