"""Meta's research HSTU once more, in float64 NumPy, one sequence at a time; and small checkpoints of that family.

Written from the family's specification and sharing no code with hstu_compile.model. Each `trap` replaces one detail by
what is easily mistaken for it: a test that agrees with the plain form and with a trapped one could not fail.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
Trap = Literal[
    "shape-divisor",
    "log10",
    "log2",
    "own-timestamp",
    "zero-request-time",
    "silu-u-only",
    "alpha",
    "norm-eps-1e-5",
    "norm-per-head",
    "uqkv-order",
    "per-head-layout",
    "reverse-position",
    "residual-normed",
    "transposed-output",
    "no-sqrt-d",
    "anti-causal-bias",
]


@dataclasses.dataclass(frozen=True)
class ResearchForm:
    """One member of the family: sizes and switches under the family's own names."""

    max_sequence_len: int = 20
    max_output_len: int = 3
    num_items: int = 60
    item_dim: int = 12
    rating_dim: int = 0
    num_ratings: int = 6
    num_blocks: int = 2
    num_heads: int = 2
    attention_dim: int = 5
    linear_dim: int = 7
    concat_ua: bool = False
    linear_activation: str = "silu"
    postprocessor: str = "l2_norm"
    has_bias: bool = True
    num_buckets: int = 128
    hour_encoding: str = "none"

    @property
    def width(self) -> int:
        """D."""
        return self.item_dim + self.rating_dim

    @property
    def table_len(self) -> int:
        """N, the divisor and the size of the tables."""
        return self.max_sequence_len + self.max_output_len

    def user_config(self) -> dict[str, Any]:
        """What a user passes with --config."""
        rated = "Rated" if self.rating_dim else ""
        return {
            "max_sequence_len": self.max_sequence_len,
            "max_output_len": self.max_output_len,
            "embedding_dim": self.width,
            "num_blocks": self.num_blocks,
            "num_heads": self.num_heads,
            "linear_dim": self.linear_dim,
            "attention_dim": self.attention_dim,
            "num_items": self.num_items,
            "linear_activation": self.linear_activation,
            "concat_ua": self.concat_ua,
            "preprocessor": f"LearnablePositionalEmbedding{rated}InputFeaturesPreprocessor",
            "postprocessor": self.postprocessor,
            "hour_encoding": self.hour_encoding,
        }


def research_state_dict(form: ResearchForm, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the family's names, drawn so that every part of a layer changes the result."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    width, inner = form.width, form.num_heads * form.linear_dim
    packed = 2 * inner + 2 * form.num_heads * form.attention_dim
    state = {
        "_attn_mask": torch.triu(torch.ones(form.table_len, form.table_len, dtype=torch.bool), diagonal=1),
        "_embedding_module._item_emb.weight": draw(form.num_items + 1, form.item_dim, scale=0.4),
        "_input_features_preproc._pos_emb.weight": draw(form.table_len, width, scale=0.5),
    }
    if form.rating_dim:
        state["_input_features_preproc._rating_emb.weight"] = draw(form.num_ratings, form.rating_dim, scale=0.4)
    for index in range(form.num_blocks):
        prefix = f"_hstu._attention_layers.{index}."
        state[prefix + "_uvqk"] = draw(width, packed, scale=1.0)
        if form.has_bias:
            state[prefix + "_rel_attn_bias._ts_w"] = draw(form.num_buckets + 1, scale=1.0)
            state[prefix + "_rel_attn_bias._pos_w"] = draw(2 * form.table_len - 1, scale=1.0)
        parts = 3 if form.concat_ua else 1
        state[prefix + "_o.weight"] = draw(width, inner * parts, scale=1.0 / math.sqrt(inner * parts))
        state[prefix + "_o.bias"] = draw(width, scale=0.3)
    return state


@dataclasses.dataclass(frozen=True)
class History:
    """One user: events oldest first, and the time of the request."""

    item_ids: Array
    timestamps: Array
    ratings: Array
    request_time: int


def draw_histories(form: ResearchForm, lengths: list[int], seed: int = 0) -> list[History]:
    """Histories with seconds, hours, days and years between events."""
    rng = np.random.default_rng(seed)
    histories = []
    for length in lengths:
        gaps = np.floor(np.exp(rng.uniform(0, math.log(4e7), length + 1))).astype(np.int64)
        times = 1_400_000_000 + np.cumsum(gaps)
        histories.append(
            History(
                rng.integers(1, form.num_items + 1, length),
                times[:length],
                rng.integers(0, form.num_ratings, length),
                int(times[length]),
            )
        )
    return histories


def jagged_inputs(histories: list[History], with_ratings: bool) -> dict[str, torch.Tensor]:
    """The graph inputs that hold the histories."""
    lengths = [len(history.item_ids) for history in histories]
    offsets = np.concatenate([[0], np.cumsum(lengths)])

    def joined(name: str, dtype: torch.dtype) -> torch.Tensor:
        rows = [getattr(history, name) for history in histories]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *rows])).to(dtype)

    inputs = {
        "item_ids": joined("item_ids", torch.int32),
        "timestamps": joined("timestamps", torch.int64),
        "seq_offsets": torch.from_numpy(offsets).to(torch.int32),
        "request_timestamps": torch.tensor([history.request_time for history in histories], dtype=torch.int64),
    }
    if with_ratings:
        inputs["ratings"] = joined("ratings", torch.int32)
    return inputs


def _silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def _layer_norm(x: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)


def _input(form: ResearchForm, weights: dict[str, Array], history: History, trap: Trap | None) -> Array:
    features = weights["_embedding_module._item_emb.weight"][history.item_ids]
    if form.rating_dim:
        ratings = weights["_input_features_preproc._rating_emb.weight"][history.ratings]
        features = np.concatenate([features, ratings], axis=1)
    length = len(history.item_ids)
    where = np.arange(length)[::-1] if trap == "reverse-position" else np.arange(length)
    x = features * (1.0 if trap == "no-sqrt-d" else math.sqrt(form.width))
    x = x + weights["_input_features_preproc._pos_emb.weight"][where]
    if form.hour_encoding == "additive":
        hours = [(int(t) // 3600) % 24 for t in history.timestamps]
        # The encoding is a constant of the graph, in float32 at every precision but the half ones.
        x = x + np.array([hour_encoding(hour, form.width) for hour in hours]).reshape(x.shape).astype(np.float32)
    return x * (history.item_ids != 0)[:, None]


def hour_encoding(hour: int, width: int) -> Array:
    """[width]: sines of hour * theta_i, then the cosines, theta_i = 10000 ** (-2i / width)."""
    angles = [hour * 10000.0 ** (-2.0 * i / width) for i in range(width // 2)]
    return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def _bias(form: ResearchForm, weights: dict[str, Array], prefix: str, history: History, trap: Trap | None) -> Array:
    length, n = len(history.item_ids), form.table_len
    if not form.has_bias:
        return np.zeros((length, length))
    request = 0 if trap == "zero-request-time" else history.request_time
    times = [int(t) for t in history.timestamps]
    following = [*times[1:], request]
    position, time = weights[prefix + "_rel_attn_bias._pos_w"], weights[prefix + "_rel_attn_bias._ts_w"]
    log = {"log10": math.log10, "log2": math.log2}.get(trap or "", math.log)
    bias = np.zeros((length, length))
    for i in range(length):
        for j in range(length):
            step = i - j if trap == "anti-causal-bias" else j - i
            gap = abs((times[i] if trap == "own-timestamp" else following[i]) - times[j])
            bucket = min(int(log(max(gap, 1)) / 0.301), form.num_buckets)
            bias[i, j] = position[n - 1 + step] + time[bucket]
    return bias


def _layer(
    form: ResearchForm, weights: dict[str, Array], index: int, x: Array, history: History, trap: Trap | None
) -> Array:
    prefix = f"_hstu._attention_layers.{index}."
    eps = 1e-5 if trap == "norm-eps-1e-5" else 1e-6
    heads, dqk, dv = form.num_heads, form.attention_dim, form.linear_dim
    normed = _layer_norm(x, eps)
    packed = normed @ weights[prefix + "_uvqk"]
    length = len(x)
    if trap == "per-head-layout":
        grouped = packed.reshape(length, heads, 2 * dv + 2 * dqk)
        parts = np.split(grouped, [dv, 2 * dv, 2 * dv + dqk], axis=2)
        u, v, q, k = (part.reshape(length, part.shape[1] * part.shape[2]) for part in parts)
    elif trap == "uqkv-order":
        u, q, k, v = np.split(packed, np.cumsum([heads * dv, heads * dqk, heads * dqk]), axis=1)
    else:
        u, v, q, k = np.split(packed, np.cumsum([heads * dv, heads * dv, heads * dqk]), axis=1)
    if form.linear_activation == "silu":
        u = _silu(u)
        if trap != "silu-u-only":
            v, q, k = _silu(v), _silu(q), _silu(k)
    q, k, v = q.reshape(length, heads, dqk), k.reshape(length, heads, dqk), v.reshape(length, heads, dv)
    bias = _bias(form, weights, prefix, history, trap)
    divisor = length if trap == "shape-divisor" else form.table_len
    alpha = 1.0 / math.sqrt(dqk) if trap == "alpha" else 1.0
    attention = np.zeros((length, heads, dv))
    for h in range(heads):
        scores = alpha * (q[:, h] @ k[:, h].T) + bias
        attention[:, h] = np.tril(_silu(scores) / divisor) @ v[:, h]
    if trap == "norm-per-head":
        normed_attention = _layer_norm(attention, eps).reshape(length, heads * dv)
    else:
        normed_attention = _layer_norm(attention.reshape(length, heads * dv), eps)
    gated = u * normed_attention
    if form.concat_ua:
        gated = np.concatenate([u, normed_attention, gated], axis=1)
    matrix = weights[prefix + "_o.weight"]
    projected = gated @ (matrix if trap == "transposed-output" else matrix.T) + weights[prefix + "_o.bias"]
    return projected + (normed if trap == "residual-normed" else x)


def reference_activations(
    form: ResearchForm, state: dict[str, torch.Tensor], history: History, trap: Trap | None = None
) -> list[Array]:
    """[L, D] float64 before the first layer and after each one."""
    weights = {key: tensor.double().numpy() for key, tensor in state.items()}
    activations = [_input(form, weights, history, trap)]
    for index in range(form.num_blocks):
        activations.append(_layer(form, weights, index, activations[-1], history, trap))
    return activations


def reference_user_embedding(form: ResearchForm, last: Array) -> Array:
    """[item_dim] float64 from the last activations [L, D]: the part that an item's vector has; zeros if empty."""
    if len(last) == 0:
        return np.zeros(form.item_dim)
    row = last[-1, : form.item_dim]
    if form.postprocessor == "layer_norm":
        return _layer_norm(row, 1e-6)
    return row / max(float(np.linalg.norm(row)), 1e-6)
