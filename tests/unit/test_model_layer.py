from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from hstu_compile.compare import error_bound, row_error
from hstu_compile.model import AttentionConfig, HstuLayer, LayerConfig
from hstu_compile.model.layer import JaggedBatch, Norm
from tests import tolerances

HEADS, DQK, DV, WIDTH, DIVISOR = 3, 4, 5, 8, 11.0
LENGTHS, TARGETS = [6, 0, 1, 9], [2, 0, 1, 3]

DLRM = LayerConfig(
    embedding_dim=WIDTH,
    attention=AttentionConfig(
        num_heads=HEADS,
        attention_dim=DQK,
        linear_dim=DV,
        alpha=1.0 / math.sqrt(DQK),
        scaling_seq_len=DIVISOR,
        max_seq_len=9,
    ),
    silu_scope="u",
    uvqk_bias=True,
    input_norm=True,
    input_norm_affine=True,
    output_norm="layer",
    output_norm_affine=True,
    norm_eps=1e-6,
    output_concat="u_attn_gated",
    output_projection=True,
    output_bias=False,
)
FORMS: dict[str, LayerConfig] = {
    "dlrm": DLRM,
    "dlrm-group-norm": dataclasses.replace(DLRM, output_norm="group"),
    "silu-on-none": dataclasses.replace(DLRM, silu_scope="none"),
    "nvidia": dataclasses.replace(DLRM, silu_scope="uvqk", output_concat="gated", norm_eps=1e-5),
    "u-norm-gated": dataclasses.replace(DLRM, output_concat="u_norm_gated", output_bias=True),
    "no-input-norm": dataclasses.replace(DLRM, input_norm=False),
    "group-norm-without-affine": dataclasses.replace(DLRM, output_norm="group", output_norm_affine=False),
}


def layer_of(config: LayerConfig) -> HstuLayer:
    layer = HstuLayer(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.6
    return layer.double().requires_grad_(False)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def norm(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def reference(config: LayerConfig, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """One layer in plain loops over sequences, heads, rows and keys; targets see the history and themselves."""
    normed = x
    if config.input_norm:
        normed = norm(x, config.norm_eps) * weights["input_norm.weight"] + weights["input_norm.bias"]
    packed = normed @ weights["uvqk_weight"] + weights["uvqk_bias"]
    inner, qk = HEADS * DV, HEADS * DQK
    u, v, q, k = packed[:, :inner], packed[:, inner : 2 * inner], packed[:, 2 * inner : -qk], packed[:, -qk:]
    if config.silu_scope != "none":
        u = silu(u)
    if config.silu_scope == "uvqk":
        v, q, k = silu(v), silu(q), silu(k)
    attention = np.zeros_like(u)
    start = 0
    for length, targets in zip(LENGTHS, TARGETS, strict=True):
        for head in range(HEADS):
            at, qk_at = slice(head * DV, (head + 1) * DV), slice(head * DQK, (head + 1) * DQK)
            for i in range(length):
                for j in range(i + 1):
                    if j < length - targets or j == i:
                        score = config.attention.alpha * float(q[start + i, qk_at] @ k[start + j, qk_at])
                        attention[start + i, at] += silu(np.float64(score)) / DIVISOR * v[start + j, at]
        start += length
    if config.output_norm == "group":
        parts = norm(attention.reshape(-1, HEADS, DV), config.norm_eps)
        if config.output_norm_affine:
            parts = parts * weights["output_norm.weight"][:, None] + weights["output_norm.bias"][:, None]
        gate = parts.reshape(-1, inner)
    else:
        gate = norm(attention, config.norm_eps) * weights["output_norm.weight"] + weights["output_norm.bias"]
    middle = {"gated": [], "u_norm_gated": [u, gate], "u_attn_gated": [u, attention]}[config.output_concat]
    out = np.concatenate([*middle, u * gate], axis=1) @ weights["output_weight"] + x
    return out + weights["output_bias"] if config.output_bias else out


def batch_and_input() -> tuple[JaggedBatch, torch.Tensor]:
    offsets = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    x = torch.randn(sum(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return JaggedBatch(offsets, num_targets=torch.tensor(TARGETS, dtype=torch.int32)), x


def error_of(layer: HstuLayer, config: LayerConfig) -> float:
    batch, x = batch_and_input()
    weights = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    return row_error(layer(x, batch).numpy(), reference(config, weights, x.numpy())).error


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)
def test_layer_of_other_families_equals_plain_loops(config: LayerConfig) -> None:
    assert error_of(layer_of(config), config) <= tolerances.FLOAT64 * 1e3


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dlrm", {"silu_scope": "uvqk"}),
        ("dlrm", {"output_concat": "u_norm_gated"}),
        ("u-norm-gated", {"output_concat": "u_attn_gated"}),
        ("dlrm", {"attention": dataclasses.replace(DLRM.attention, alpha=1.0)}),
        ("group-norm-without-affine", {"norm_eps": 1e-2}),
        ("nvidia", {"silu_scope": "u"}),
    ],
)
def test_every_switch_changes_the_result(name: str, wrong: dict[str, Any]) -> None:
    layer = layer_of(FORMS[name])
    assert error_of(layer, dataclasses.replace(FORMS[name], **wrong)) > 1e-3


def test_genrec_form_has_neither_norm_nor_projection_around_the_attention() -> None:
    attention = dataclasses.replace(DLRM.attention, num_heads=2, linear_dim=4)
    config = dataclasses.replace(
        DLRM,
        attention=attention,
        silu_scope="uvqk",
        input_norm=False,
        output_concat="gated",
        output_projection=False,
    )
    layer = layer_of(config)
    assert not hasattr(layer, "output_weight")
    batch, x = batch_and_input()
    parts = layer.project_uvqk(x)
    expected = x + parts.u * layer.output_norm(layer.attend(parts, batch))
    assert torch.equal(layer(x, batch), expected)


def test_parts_of_the_projection_are_stored_as_u_v_q_k() -> None:
    layer = layer_of(DLRM)
    _, x = batch_and_input()
    parts = layer.project_uvqk(x)
    assert parts._fields == ("u", "v", "q", "k")
    assert [part.shape[1] for part in parts] == [HEADS * DV, HEADS * DV, HEADS * DQK, HEADS * DQK]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    module = Norm(64, 1, affine=False, eps=1e-6)
    out = module(x)
    assert out.dtype == torch.float32
    # A sum of squares of 300 overflows float16, and its mean rounds away in bfloat16.
    assert row_error(out.numpy(), norm(x.double().numpy(), 1e-6)).error <= error_bound(0.0, "fp32")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("embedding_dim", 0, "embedding_dim is 0"),
        ("embedding_dim", 70_000, "embedding_dim is 70000; it must be at most 65536"),
        ("embedding_dim", 10**30, "embedding_dim is 10+; it must be at most 2147483647"),
        ("norm_eps", -1.0, "norm_eps is -1.0"),
        ("norm_eps", 1e308, "norm_eps is 1e.308; it must be a finite number, at most"),
        ("silu_scope", "v", "silu_scope is 'v'"),
        ("uvqk_bias", 1, "uvqk_bias is 1"),
        ("output_projection", False, "without an output projection"),
    ],
)
def test_layer_configuration_names_the_field_and_the_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DLRM, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_heads", 0, "num_heads is 0"),
        ("num_heads", 70_000, "num_heads is 70000; it must be at most 65536"),
        ("max_attn_len", 10**30, "max_attn_len is 10+; it must be at most 2147483647"),
        ("num_time_buckets", 1 << 21, "num_time_buckets is 2097152; it must be at most 1048576"),
        ("attention_dim", 257, "attention_dim is 257; allowed: 1 to 256"),
        ("linear_dim", 0, "linear_dim is 0"),
        ("alpha", float("inf"), "alpha is inf"),
        ("scaling_seq_len", 0.0, "scaling_seq_len is 0.0"),
        ("max_seq_len", 0, "max_seq_len is 0"),
        ("pos_table_len", 8, "max_seq_len 9 exceeds pos_table_len 8"),
        ("time_bias", "next", "num_time_buckets is 0 with time_bias 'next'"),
        ("num_time_buckets", 5, "num_time_buckets is 5 with time_bias 'none'"),
        ("time_bucket_divisor", 0.0, "time_bucket_divisor is 0.0"),
        ("target_group_size", 0, "target_group_size is 0"),
        ("max_attn_len", -1, "max_attn_len is -1"),
        ("num_heads", True, "num_heads is True; it must be an integer"),
    ],
)
def test_attention_configuration_names_the_field_and_the_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DLRM.attention, **{field: value})
