"""One HSTU layer for every family, steered by `LayerConfig` alone. Level 1."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_compile.model.attention import AttentionAttrs, compute_dtype, hstu_attention
from hstu_compile.model.config import LayerConfig
from hstu_compile.model.ops import hstu_attention_op
from hstu_compile.model.product import Product
from hstu_compile.model.rab import time_bucket_thresholds


class UVQK(NamedTuple):
    """The four parts of the packed projection, in the order in which the weights store them."""

    u: Tensor
    v: Tensor
    q: Tensor
    k: Tensor


@dataclasses.dataclass(frozen=True)
class CachedRows:
    """Rows whose keys and values are known already, in front of the rows of a batch.

    Attributes:
        offsets: [B + 1] int32 -- bounds of the cached rows.
        max_query_len: most new rows of one sequence.
    """

    offsets: Tensor
    max_query_len: int


class KeyValue(NamedTuple):
    """Keys [L, H, attention_dim] and values [L, H, linear_dim] of one layer."""

    k: Tensor
    v: Tensor


@dataclasses.dataclass(frozen=True)
class JaggedBatch:
    """What every layer of one forward shares.

    Attributes:
        seq_offsets: [B + 1] int32.
        row_timestamps: [L] int64 seconds or None -- query side of the time bias.
        col_timestamps: [L] int64 seconds or None -- key side; with a cache those of the joined rows, [Lc + L].
        num_targets: [B] int32 or None -- candidates at each tail.
        scaling_seq_lens: [B] float32 or None -- divisor per sequence, instead of the model's.
        max_seq_len: most rows of one sequence, cached ones included; None is the model's own limit.
        cache: where the rows before these come from; None without a cache.
    """

    seq_offsets: Tensor
    row_timestamps: Tensor | None = None
    col_timestamps: Tensor | None = None
    num_targets: Tensor | None = None
    scaling_seq_lens: Tensor | None = None
    max_seq_len: int | None = None
    cache: CachedRows | None = None


class Norm(nn.Module):
    """Layer norm, or group norm with one group per head, computed in float32 for half inputs."""

    def __init__(self, width: int, groups: int, *, affine: bool, eps: float) -> None:
        super().__init__()
        self.width, self.groups, self.eps = width, groups, eps
        parameters = width if groups == 1 else groups
        self.weight = nn.Parameter(torch.ones(parameters)) if affine else None
        self.bias = nn.Parameter(torch.zeros(parameters)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """[L, width] -> [L, width] in `compute_dtype`: the caller rounds, once, where the result is stored."""
        dtype = compute_dtype(x.dtype)
        wide = x.to(dtype)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.groups == 1:
            return F.layer_norm(wide, (self.width,), weight, bias, self.eps)
        per_group = self.width // self.groups
        grouped = F.layer_norm(wide.view(-1, self.groups, per_group), (per_group,), None, None, self.eps)
        if weight is not None and bias is not None:
            grouped = grouped * weight[None, :, None] + bias[None, :, None]
        return grouped.reshape(-1, self.width)


class HstuLayer(nn.Module):
    """y = x + Output(u, attention(q, k, v)) with u, v, q, k = SiLU(LN(x) @ uvqk).

    In half precision the projections and what is stored between kernels are half; everything elementwise in between is
    computed in float32 and rounded once.
    """

    ts_thresholds: Tensor

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        attn, width = config.attention, config.embedding_dim
        inner = attn.num_heads * attn.linear_dim
        packed = 2 * inner + 2 * attn.num_heads * attn.attention_dim
        self.input_norm = (
            Norm(width, 1, affine=config.input_norm_affine, eps=config.norm_eps) if config.input_norm else None
        )
        self.uvqk_weight = nn.Parameter(torch.empty(width, packed).normal_(0, 0.02))
        self.uvqk_bias = nn.Parameter(torch.zeros(packed)) if config.uvqk_bias else None
        self.uvqk_product = Product()
        groups = attn.num_heads if config.output_norm == "group" else 1
        self.output_norm = Norm(inner, groups, affine=config.output_norm_affine, eps=config.norm_eps)
        parts = 1 if config.output_concat == "gated" else 3
        if config.output_projection:
            self.output_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inner * parts, width)))
            self.output_product = Product()
        self.output_bias = nn.Parameter(torch.zeros(width)) if config.output_bias else None
        # Tables and thresholds stay float32 and int64 at every precision: they are small, and buckets must be exact.
        heads = attn.num_heads if attn.bias_per_head else 1
        self.pos_table: nn.Parameter | None = None
        self.ts_table: nn.Parameter | None = None
        if attn.pos_table_len:
            self.pos_table = nn.Parameter(torch.empty(heads, 2 * attn.pos_table_len - 1).normal_(0, 0.02))
        if attn.time_bias != "none":
            self.ts_table = nn.Parameter(torch.empty(heads, attn.num_time_buckets + 1).normal_(0, 0.02))
            thresholds = time_bucket_thresholds(attn.num_time_buckets, attn.time_bucket_divisor)
            self.register_buffer("ts_thresholds", thresholds.clone(), persistent=False)

    def project_uvqk(self, x: Tensor) -> UVQK:
        """[L, D] -> u, v [L, H * linear_dim], q, k [L, H * attention_dim], SiLU applied where the family has it."""
        attn, wide = self.config.attention, compute_dtype(x.dtype)
        normed = x if self.input_norm is None else self.input_norm(x).to(x.dtype)
        packed: Tensor = self.uvqk_product(normed, self.uvqk_weight).to(wide)
        if self.uvqk_bias is not None:
            packed = packed + self.uvqk_bias.to(wide)
        if self.config.silu_scope == "uvqk":
            packed = F.silu(packed)
        inner, qk = attn.num_heads * attn.linear_dim, attn.num_heads * attn.attention_dim
        u, v, q, k = torch.split(packed.to(x.dtype), [inner, inner, qk, qk], dim=1)
        if self.config.silu_scope == "u":
            u = F.silu(u.to(wide)).to(x.dtype)
        return UVQK(u, v, q, k)

    def key_value(self, uvqk: UVQK) -> KeyValue:
        """Keys and values of the projected rows, by head."""
        attn = self.config.attention
        return KeyValue(
            uvqk.k.view(-1, attn.num_heads, attn.attention_dim), uvqk.v.view(-1, attn.num_heads, attn.linear_dim)
        )

    def attend(self, uvqk: UVQK, batch: JaggedBatch, cached: KeyValue | None = None) -> Tensor:
        """Attention of the projected rows: [L, H * linear_dim].

        Args:
            uvqk: projected rows.
            batch: their sequences.
            cached: keys and values in front of them, if the batch has a cache.
        """
        attn = self.config.attention
        q = uvqk.q.view(-1, attn.num_heads, attn.attention_dim)
        k, v = self.key_value(uvqk)
        longest = attn.max_seq_len if batch.max_seq_len is None else batch.max_seq_len
        k_cached = v_cached = cache_offsets = None
        max_query_len = longest
        if batch.cache is not None:
            assert cached is not None
            (k_cached, v_cached), cache_offsets = cached, batch.cache.offsets
            max_query_len = batch.cache.max_query_len
        attrs = AttentionAttrs(
            alpha=float(attn.alpha),
            scaling_seq_len=float(attn.scaling_seq_len),
            max_query_len=max_query_len,
            max_seq_len=longest,
            target_group_size=attn.target_group_size,
            contextual_seq_len=attn.contextual_seq_len,
            max_attn_len=attn.max_attn_len,
            min_full_attn_seq_len=attn.min_full_attn_seq_len,
        )
        use_time = self.ts_table is not None
        row_timestamps = batch.row_timestamps if use_time else None
        col_timestamps = batch.col_timestamps if use_time else None
        thresholds = self.ts_thresholds if use_time else None
        # The op is one node in an export and the fused kernel on a GPU, which has no float64 and no gradient.
        fused = q.is_cuda and q.dtype != torch.float64 and not torch.is_grad_enabled()
        if fused or torch.compiler.is_exporting():
            out: Tensor = hstu_attention_op(
                q,
                k,
                v,
                batch.seq_offsets,
                batch.seq_offsets,
                batch.num_targets,
                None,
                batch.scaling_seq_lens,
                row_timestamps,
                col_timestamps,
                self.pos_table,
                self.ts_table,
                thresholds,
                **dataclasses.asdict(attrs),
                k_cached=k_cached,
                v_cached=v_cached,
                cache_offsets=cache_offsets,
            )
        else:
            out = hstu_attention(
                q,
                k,
                v,
                batch.seq_offsets,
                batch.seq_offsets,
                attrs,
                num_targets=batch.num_targets,
                scaling_seq_lens=batch.scaling_seq_lens,
                row_timestamps=row_timestamps,
                col_timestamps=col_timestamps,
                pos_table=self.pos_table,
                ts_table=self.ts_table,
                ts_thresholds=thresholds,
                k_cached=k_cached,
                v_cached=v_cached,
                cache_offsets=cache_offsets,
            )
        return out.reshape(-1, attn.num_heads * attn.linear_dim)

    def output(self, x: Tensor, u: Tensor, attention: Tensor) -> Tensor:
        """Gate the normed attention with u, project, add the residual: [L, D]."""
        wide = compute_dtype(x.dtype)
        normed = self.output_norm(attention)
        gated = (u.to(wide) * normed).to(x.dtype)
        if self.config.output_concat == "u_norm_gated":
            gated = torch.cat([u, normed.to(x.dtype), gated], dim=1)
        elif self.config.output_concat == "u_attn_gated":
            gated = torch.cat([u, attention, gated], dim=1)
        projected = self.output_product(gated, self.output_weight) if self.config.output_projection else gated
        update: Tensor = projected.to(wide)
        if self.output_bias is not None:
            update = update + self.output_bias.to(wide)
        return (update + x.to(wide)).to(x.dtype)

    def forward(self, x: Tensor, batch: JaggedBatch, cached: KeyValue | None = None) -> Tensor:
        """[L, D] -> [L, D]; `cached` are the keys and values in front of x, if the batch has a cache."""
        uvqk = self.project_uvqk(x)
        return self.output(x, uvqk.u, self.attend(uvqk, batch, cached))
