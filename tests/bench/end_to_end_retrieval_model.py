"""The end-to-end benchmark's retrieval baseline: Meta's research HSTU in plain PyTorch, written to be fast.

No public kernel has this family's attention: SiLU in place of softmax with a bias of positions and times. So it is two
batched products of padded histories and what lies between them, which torch.compile makes one kernel of. Buckets are
found once for all layers, with a bucket of their own for pairs that do not see each other: its bias is so low that
SiLU makes a zero of it, and no mask is read. The divisor N cancels in the norm behind the attention but for the norm's
epsilon, which takes its place. Everything runs in the half type but the last norm; bias tables stay float32 until they
are added.

Two forms differ where histories are of several lengths: `jagged` has the rows of all histories one behind the other and
pads q, k and v alone, `padded` pads everything. The number of users, of all events and of the longest history's are
constants of a model, lengths are read on the device: nothing waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from end_to_end_retrieval_workload import RetrievalCase, RetrievalSizes
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_compile.model.rab import time_bucket_thresholds

JAGGED, PADDED = "jagged", "padded"
RETRIEVAL_FORMS = (JAGGED, PADDED)
_EPS = 1e-6
_TIME_BUCKET_DIVISOR = 0.301
#: SiLU of it is zero in every type, and no type makes an infinity of it and a score.
_UNSEEN = -1e4


class Places(NamedTuple):
    """Where the rows of a batch lie, and what they see.

    Attributes:
        padded: [B * N] int64 -- row of all events at each place of the padded form; of no event, that of another.
        rows: [L] int64 -- place of each event in the padded form.
        last: [B] int64 -- place of each history's last event in the padded form.
        buckets: [B, N, N] int32 -- time bucket of each pair, or the one of pairs that are not seen.
        distances: [N, N] int64 -- entry of the position table.
    """

    padded: Tensor
    rows: Tensor
    last: Tensor
    buckets: Tensor
    distances: Tensor


#: Of q [B, H, Nq, dqk], k [B, H, N, dqk], v [B, H, N, dv] and a bias [B, 1, Nq, N], before the divisor.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """[B, H, Nq, dv]: two products in the half type, what lies between them in float32 where a compiler fuses it."""
    scores = torch.matmul(q, k.transpose(2, 3))
    return torch.matmul(F.silu(scores + bias.to(scores.dtype)), v)


def attend_in_float32(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """[B, H, Nq, dv]: scores, weights and sums in float32 (float64 stays), rounded once."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(2, 3)) + bias.to(wide)
    return torch.matmul(F.silu(scores), v.to(wide)).to(q.dtype)


class PlainRetrievalModel(nn.Module):
    """User embeddings [B, D] float32 (float64 stays) of one case.

    Args:
        state: float32 parameters under Meta's keys.
        sizes: dimensions.
        case: shapes and pruning.
        dtype: of parameters and activations.
        form: JAGGED or PADDED.
        attend: the attention.
    """

    thresholds: Tensor

    def __init__(
        self,
        state: Mapping[str, Tensor],
        sizes: RetrievalSizes,
        case: RetrievalCase,
        dtype: torch.dtype,
        form: str = PADDED,
        attend: Attend = attend_by_products,
    ) -> None:
        super().__init__()
        self.sizes, self.case, self.form, self.attend = sizes, case, form, attend
        for key, tensor in state.items():
            is_table = "_rel_attn_bias" in key
            kept = tensor.to(torch.promote_types(dtype, torch.float32) if is_table else dtype)
            if key.endswith("._ts_w"):
                kept = torch.cat([kept, kept.new_full((1,), _UNSEEN)])
            self.register_buffer(_name(key), kept.clone())
        thresholds = time_bucket_thresholds(sizes.num_time_buckets, _TIME_BUCKET_DIVISOR)
        self.register_buffer("thresholds", thresholds.clone())

    def _at(self, key: str) -> Tensor:
        return self.get_buffer(_name(key))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Inputs of `retrieval_arrays`: user embeddings [B, D]."""
        places = self._places(features)
        is_jagged = self.form == JAGGED
        x = self._embedded(features, places)
        for number in range(self.sizes.num_layers):
            if self.case.is_pruned and number + 1 == self.sizes.num_layers:
                x = self._pruned_layer(number, x, places)
            else:
                x = self._layer(number, x, places)
        if not self.case.is_pruned:
            x = x[(features["seq_offsets"][1:] - 1) if is_jagged else places.last]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return wide / length.clamp(min=_EPS)

    def _places(self, features: dict[str, Tensor]) -> Places:
        batch, longest, total = self.case.batch, self.case.max_rows, self.case.tokens
        offsets, times = features["seq_offsets"].long(), features["timestamps"]
        device = offsets.device
        step = torch.arange(longest, device=device)
        starts, lengths = offsets[:-1, None], offsets[1:, None] - offsets[:-1, None]
        is_event = step < lengths
        padded = torch.where(is_event, starts + step, 0)
        own = times[padded]
        following = times[torch.where(step + 1 < lengths, starts + step + 1, 0)]
        following = torch.where(step + 1 == lengths, features["request_timestamps"][:, None], following)
        gaps = (following[:, :, None] - own[:, None, :]).abs()
        buckets = torch.bucketize(gaps, self.thresholds, right=True, out_int32=True)
        is_seen = is_event[:, None, :] & (step[:, None] >= step)
        buckets = torch.where(is_seen, buckets, self.sizes.num_time_buckets + 1)
        # Not a slice of the offsets: torch.compile takes no view for the boundaries.
        ends = offsets[1:] + 0
        row = torch.arange(total, device=device)
        owner = torch.bucketize(row, ends, right=True)
        rows = owner * longest + row - offsets[owner]
        last = torch.arange(batch, device=device) * longest + lengths[:, 0] - 1
        distances = self.sizes.table_len - 1 + step - step[:, None]
        return Places(padded.flatten(), rows, last, buckets, distances)

    def _embedded(self, features: dict[str, Tensor], places: Places) -> Tensor:
        """[rows, D]; a padded row that is no event's is that of another, which nobody reads."""
        items = self._at("_embedding_module._item_emb.weight")
        table = self._at("_input_features_preproc._pos_emb.weight")
        ids, longest = features["item_ids"], self.case.max_rows
        if self.form == JAGGED:
            positions = places.rows % longest
        else:
            ids = ids[places.padded]
            positions = torch.arange(longest, device=ids.device).repeat(self.case.batch)
        wide = torch.promote_types(items.dtype, torch.float32)
        x = F.embedding(ids, items).to(wide) * math.sqrt(self.sizes.width) + F.embedding(positions, table)
        return (x * (ids != 0)[:, None]).to(items.dtype)

    def _bias(self, layer: str, places: Places) -> Tensor:
        """[B, 1, N, N]."""
        times, positions = (self._at(f"{layer}_rel_attn_bias.{name}") for name in ("_ts_w", "_pos_w"))
        return (times[places.buckets] + positions[places.distances])[:, None]

    def _heads(self, x: Tensor, places: Places) -> Tensor:
        """[B, H, N, d] of rows [rows, H * d]."""
        if self.form == JAGGED:
            x = x[places.padded]
        return x.view(self.case.batch, self.case.max_rows, self.sizes.num_heads, -1).transpose(1, 2)

    def _projected(self, layer: str, x: Tensor, first: int, last: int) -> Tensor:
        """Some columns of the projection, behind their SiLU."""
        return F.silu(x @ self._at(layer + "_uvqk")[:, first:last])

    def _output(self, layer: str, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        normed = F.layer_norm(attended, attended.shape[-1:], eps=_EPS * self.sizes.table_len**2)
        return x + F.linear(u * normed, self._at(layer + "_o.weight"), self._at(layer + "_o.bias"))

    def _layer(self, number: int, x: Tensor, places: Places) -> Tensor:
        layer, sizes = _layer(number), self.sizes
        normed = F.layer_norm(x, x.shape[-1:], eps=_EPS)
        uvqk = self._projected(layer, normed, 0, 2 * sizes.inner + 2 * sizes.query)
        u, *parts = torch.split(uvqk, [sizes.inner, sizes.inner, sizes.query, sizes.query], dim=1)
        v, q, k = (self._heads(part, places) for part in parts)
        attended = self.attend(q, k, v, self._bias(layer, places)).transpose(1, 2).flatten(0, 1).flatten(1)
        if self.form == JAGGED:
            attended = attended[places.rows]
        return self._output(layer, x, u, attended)

    def _pruned_layer(self, number: int, x: Tensor, places: Places) -> Tensor:
        """[B, D]: keys and values of all rows, everything else of the last rows alone."""
        layer, sizes, batch = _layer(number), self.sizes, self.case.batch
        last = places.last if self.form == PADDED else places.padded[places.last]
        normed = F.layer_norm(x, x.shape[-1:], eps=_EPS)
        inner, query = sizes.inner, sizes.query
        v = self._heads(self._projected(layer, normed, inner, 2 * inner), places)
        k = self._heads(self._projected(layer, normed, 2 * inner + query, 2 * inner + 2 * query), places)
        asking = normed[last]
        u = self._projected(layer, asking, 0, inner)
        q = self._projected(layer, asking, 2 * inner, 2 * inner + query).view(batch, sizes.num_heads, 1, -1)
        own = places.last % self.case.max_rows
        times, positions = (self._at(f"{layer}_rel_attn_bias.{name}") for name in ("_ts_w", "_pos_w"))
        users = torch.arange(batch, device=own.device)
        bias = times[places.buckets[users, own]] + positions[places.distances[own]]
        attended = self.attend(q, k, v, bias[:, None, None]).flatten(1)
        return self._output(layer, x[last], u, attended)


def _name(key: str) -> str:
    return key.replace(".", "__")


def _layer(index: int) -> str:
    return f"_hstu._attention_layers.{index}."
