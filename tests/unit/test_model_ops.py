"""The op hands every argument to the fused kernel under its own name."""

from __future__ import annotations

import inspect
import sys
import types

import pytest

from hstu_compile.model import ops


def test_every_argument_reaches_the_kernel_by_name(monkeypatch: pytest.MonkeyPatch):
    received: dict[str, object] = {}

    def hstu_attention_cuda(*positional: object, **named: object) -> object:
        received.update(zip(("q", "k", "v", "q_offsets", "k_offsets"), positional, strict=True))
        received.update(named)
        return positional[0]

    stand_in = types.ModuleType("dispatch")
    stand_in.hstu_attention_cuda = hstu_attention_cuda  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hstu_compile.plugins.kernels.dispatch", stand_in)
    names = list(inspect.signature(ops.hstu_attention_op._init_fn).parameters)
    values = {name: float(index) for index, name in enumerate(names)}
    ops._cuda_hstu_attention(*(values[name] for name in names))  # type: ignore[arg-type]
    bounds = {"max_query_len", "max_seq_len"}
    assert received == {name: value for name, value in values.items() if name not in bounds}
