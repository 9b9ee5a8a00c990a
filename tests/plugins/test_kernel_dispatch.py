"""PyTorch on a GPU takes the Hopper kernel where it can, and says when it cannot for want of a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from hstu_compile.plugins.kernels import dispatch


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, object]]]]:
    """Which kernel was called with what, on a machine whose GPU takes every tensor."""
    calls: list[tuple[str, dict[str, object]]] = []
    for name in ("hstu_attention_hopper", "hstu_attention_triton"):

        def kernel(q: torch.Tensor, *_: torch.Tensor, name: str = name, **given: object) -> torch.Tensor:
            calls.append((name, given))
            return q

        monkeypatch.setattr(dispatch, name, kernel)
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    monkeypatch.setattr(dispatch, "usable_nvcc", lambda: None)
    dispatch._can_compile.cache_clear()
    yield calls
    dispatch._can_compile.cache_clear()


def _call(**given: object) -> torch.Tensor:
    q = torch.zeros(4, 9, 8, dtype=torch.float16)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    return dispatch.hstu_attention_cuda(q, q, q, offsets, offsets, **given)  # type: ignore[arg-type]


def test_the_hopper_kernel_gets_every_argument(called: list[tuple[str, dict[str, object]]]) -> None:
    table = torch.zeros(8, 3)
    _call(ts_table=table, alpha=0.5)
    assert called == [("hstu_attention_hopper", {"ts_table": table, "alpha": 0.5, "silu": "fast"})]


def test_the_form_of_silu_goes_to_the_kernel_that_has_two(
    called: list[tuple[str, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _call(silu="accurate")
    monkeypatch.setattr(dispatch, "why_not", lambda *_: "another GPU")
    _call(silu="accurate")
    assert called == [
        ("hstu_attention_hopper", {"ts_table": None, "silu": "accurate"}),
        ("hstu_attention_triton", {"ts_table": None}),
    ]
    with pytest.raises(ValueError, match="silu must be one of fast, accurate, got 'exact'"):
        _call(silu="exact")


def test_what_the_hopper_kernel_does_not_take_goes_to_the_portable_one(
    called: list[tuple[str, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _call(ts_table=torch.zeros(9, 3))
    monkeypatch.setattr(dispatch, "why_not", lambda *_: "another GPU")
    _call()
    assert [name for name, _ in called] == ["hstu_attention_triton"] * 2


def test_a_cache_goes_to_either_kernel_whole(
    called: list[tuple[str, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {name: torch.zeros(3) for name in ("k_cached", "v_cached", "cache_offsets")}
    _call(**cache)
    monkeypatch.setattr(dispatch, "why_not", lambda *_: "another GPU")
    _call(**cache)
    (hopper, given), (portable, given_portable) = called
    assert (hopper, portable) == ("hstu_attention_hopper", "hstu_attention_triton")
    for name, tensor in cache.items():
        assert given[name] is tensor
        assert given_portable[name] is tensor


def test_a_missing_compiler_is_named_once(
    called: list[tuple[str, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_found() -> None:
        raise RuntimeError("no nvcc. Fix: install one")

    monkeypatch.setattr(dispatch, "usable_nvcc", none_found)
    with pytest.warns(UserWarning, match="portable kernel, slower on this GPU: no nvcc. Fix: install one"):
        _call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _call()
    assert [name for name, _ in called] == ["hstu_attention_triton"] * 2
