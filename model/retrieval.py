"""Next-item retrieval: histories to normalised user embeddings and, on request, the best unseen items. Level 1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hstu_compile.model.attention import compute_dtype
from hstu_compile.model.casting import cast_weights, rows_in, table_type
from hstu_compile.model.config import RetrievalConfig
from hstu_compile.model.jagged import JoinedRows, joined_rows, sequence_index, with_zero_row
from hstu_compile.model.layer import CachedRows, HstuLayer, JaggedBatch, KeyValue

HOURS_PER_DAY = 24
SECONDS_PER_HOUR = 3600

# Score of a slot for which no unseen item is left. Finite, so that outputs can be compared as numbers.
NO_ITEM_SCORE = float(torch.finfo(torch.float32).min)

# Item vectors that are made at a time where nothing keeps them: 128 MiB of 256 float64 each.
_ITEMS_AT_ONCE = 1 << 16


class TopItems(NamedTuple):
    """Best unseen items: ids [B, K] int32 (0 where none is left) and scores [B, K] float32, descending."""

    ids: Tensor
    scores: Tensor


class EncodedRows(NamedTuple):
    """Encoded events.

    Attributes:
        key_values: of every layer.
        activations: residual stream before the first layer and after each one.
        joined: how these rows follow the cached ones; None where there are no others.
    """

    key_values: tuple[KeyValue, ...]
    activations: tuple[Tensor, ...]
    joined: JoinedRows | None


def hour_of_day_table(embedding_dim: int) -> Tensor:
    """[24, embedding_dim] float32: [sin(h * theta) | cos(h * theta)], theta_i = 10000 ** (-2i / embedding_dim)."""
    # On the CPU whatever the default device is: of a model on the device meta only the parameters are to come.
    half = torch.arange(embedding_dim // 2, dtype=torch.float64, device="cpu")
    hours = torch.arange(HOURS_PER_DAY, dtype=torch.float64, device="cpu")
    angle = hours[:, None] * 10000.0 ** (-2.0 * half / embedding_dim)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def next_timestamps(timestamps: Tensor, request_timestamps: Tensor, seq_offsets: Tensor, owner: Tensor) -> Tensor:
    """Timestamp of the event after each one; the request time after the last event of each sequence.

    Args:
        timestamps: [L] int64 seconds.
        request_timestamps: [B] int64 seconds.
        seq_offsets: [B + 1] int32.
        owner: [L] int64 -- sequence of each row.

    Returns:
        [L] int64 seconds.
    """
    rows = torch.arange(timestamps.shape[0], device=timestamps.device)
    following = torch.cat([timestamps[1:], timestamps[:1]])
    is_last = rows + 1 >= seq_offsets.to(torch.int64).index_select(0, owner + 1)
    return torch.where(is_last, request_timestamps.index_select(0, owner), following)


class RetrievalModel(nn.Module):
    """HSTU retrieval on jagged batches, in any float dtype.

    Shapes: L events in B sequences, D embedding_dim, V items.
    """

    hour_table: Tensor

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.config = config
        width = config.layer.embedding_dim
        self.item_embedding = nn.Embedding(config.num_items + 1, config.item_embedding_dim)
        nn.init.trunc_normal_(self.item_embedding.weight, std=0.02)
        self.rating_embedding = (
            nn.Embedding(config.num_ratings, width - config.item_embedding_dim) if config.has_ratings else None
        )
        self.position_embedding = nn.Embedding(config.num_positions, width) if config.num_positions else None
        if self.position_embedding is not None:
            nn.init.trunc_normal_(self.position_embedding.weight, std=1.0 / math.sqrt(width))
        if config.hour_encoding == "additive":
            self.register_buffer("hour_table", hour_of_day_table(width), persistent=False)
        self.layers = nn.ModuleList(HstuLayer(config.layer) for _ in range(config.num_layers))

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return cast(HstuLayer, self.layers[0]).uvqk_weight.dtype

    def cast(self, dtype: torch.dtype) -> RetrievalModel:
        """Cast weights and activations to `dtype` in place; bias tables stay at least float32.

        In float64 the item table stays in the type that it has, and its rows are widened when they are looked up.
        """
        layers = cast(Iterable[HstuLayer], self.layers)
        types = {id(table): compute_dtype(dtype) for layer in layers for table in (layer.pos_table, layer.ts_table)}
        types[id(self.item_embedding.weight)] = table_type(self.item_embedding.weight, dtype)
        cast_weights(self, lambda tensor: types.get(id(tensor), dtype))
        return self

    def embed(
        self, item_ids: Tensor, timestamps: Tensor, position: Tensor, ratings: Tensor | None, dropout: float = 0.0
    ) -> Tensor:
        """Input embedding [L, D]: features * sqrt(D) + position (+ hour), zero for item 0.

        Args:
            item_ids: [L] int32 -- clamped into the table.
            timestamps: [L] int64 seconds -- read only with hour encoding.
            position: [L] int64 -- index of each event in its sequence.
            ratings: [L] int32 or None -- clamped into the table; only for rated models.
            dropout: probability, for training.
        """
        ids = item_ids.clamp(0, self.config.num_items)
        features = rows_in(self.item_embedding(ids), self.dtype)
        if self.rating_embedding is not None:
            if ratings is None:
                raise ValueError("this model was trained with ratings; ratings [L] are missing")
            rating = self.rating_embedding(ratings.clamp(0, self.config.num_ratings - 1))
            features = torch.cat([features, rating], dim=1)
        # In a half type the factor itself would be rounded, and every event scaled by the same wrong amount.
        wide = compute_dtype(features.dtype)
        x = features.to(wide) * math.sqrt(self.config.layer.embedding_dim)
        if self.position_embedding is not None:
            x = x + self.position_embedding(position.clamp(0, self.config.num_positions - 1)).to(wide)
        if self.config.hour_encoding == "additive":
            # The remainder first: exporters divide integers in float32, which is exact below a day and not at an epoch.
            second = timestamps % (HOURS_PER_DAY * SECONDS_PER_HOUR)
            hour = torch.div(second, SECONDS_PER_HOUR, rounding_mode="floor")
            x = x + self.hour_table.index_select(0, hour).to(wide)
        if dropout:
            x = F.dropout(x, dropout, self.training)
        return (x * (ids != 0).to(wide)[:, None]).to(features.dtype)

    def batch(self, timestamps: Tensor, seq_offsets: Tensor, request_timestamps: Tensor) -> tuple[JaggedBatch, Tensor]:
        """What the layers share, and the position of each event in its sequence [L] int64."""
        owner = sequence_index(seq_offsets, timestamps.shape[0])
        position = torch.arange(timestamps.shape[0], device=owner.device) - seq_offsets.to(torch.int64).index_select(
            0, owner
        )
        row_timestamps = timestamps
        if self.config.layer.attention.time_bias == "next":
            row_timestamps = next_timestamps(timestamps, request_timestamps, seq_offsets, owner)
        return JaggedBatch(seq_offsets, row_timestamps, timestamps), position

    def normalise(self, x: Tensor) -> Tensor:
        """Postprocessor, in float32 (float64 stays): [..., D] -> [..., item_embedding_dim]; zero rows stay zero.

        Of a rated model's D columns only those of the item part are kept: they are what meets an item's vector.
        """
        item_dim = self.config.item_embedding_dim
        wide: Tensor = (x if item_dim == x.shape[-1] else x[..., :item_dim]).to(compute_dtype(x.dtype))
        eps = self.config.postprocessor_eps
        if self.config.postprocessor == "l2_norm":
            norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            return wide / norm.clamp(min=eps)
        return F.layer_norm(wide, (wide.shape[-1],), None, None, eps)

    def item_vectors(self, first: int = 0, count: int | None = None) -> Tensor:
        """[V, item_embedding_dim] float32 (float64 stays): vectors of items 1..V as the dot product sees them.

        Args:
            first: row to begin with.
            count: rows to make, where there are that many; None makes all.
        """
        items = self.item_embedding.weight[1:][first : None if count is None else first + count]
        items = items.to(compute_dtype(self.dtype))
        if self.config.item_l2_norm:
            items = items / torch.linalg.vector_norm(items, dim=-1, keepdim=True).clamp(min=1e-6)
        return items

    def item_parts(self) -> Iterator[Tensor]:
        """The item vectors, some rows at a time: all of them together would be a second table."""
        for first in range(0, self.config.num_items, _ITEMS_AT_ONCE):
            yield self.item_vectors(first, _ITEMS_AT_ONCE)

    def layer_activations(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        seq_offsets: Tensor,
        request_timestamps: Tensor,
        ratings: Tensor | None = None,
    ) -> list[Tensor]:
        """Residual stream [L, D] before the first layer and after each one: num_layers + 1 tensors."""
        batch, position = self.batch(timestamps, seq_offsets, request_timestamps)
        activations = [self.embed(item_ids, timestamps, position, ratings)]
        for layer in self.layers:
            activations.append(layer(activations[-1], batch))
        return activations

    def prefill(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        seq_offsets: Tensor,
        request_timestamps: Tensor,
        ratings: Tensor | None = None,
    ) -> EncodedRows:
        """Encode whole histories, keeping what `append` reads: arguments as for `forward`, rows as the events.

        From the second layer on, the keys and values of each history's last row hold for this request alone.
        """
        batch, position = self.batch(timestamps, seq_offsets, request_timestamps)
        return self._encode(self.embed(item_ids, timestamps, position, ratings), batch, [None] * len(self.layers))

    def append(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        seq_offsets: Tensor,
        request_timestamps: Tensor,
        cache_offsets: Tensor,
        key_values: Sequence[KeyValue],
        cached_timestamps: Tensor | None = None,
        ratings: Tensor | None = None,
        max_new: int | None = None,
    ) -> EncodedRows:
        """Encode the last events of histories whose earlier events are encoded already.

        The rows are those that `prefill` gives the same events of the whole history, as long as the cached rows are
        right: none of them may be the last row of the history that it was computed for.

        Args:
            item_ids: [L] int32 -- the last events of each history.
            timestamps: [L] int64 seconds.
            seq_offsets: [B + 1] int32 -- bounds of these events.
            request_timestamps: [B] int64 seconds.
            cache_offsets: [B + 1] int32 -- bounds of the cached rows, the earlier events of each history.
            key_values: of every layer, [Lc, H, attention_dim] and [Lc, H, linear_dim].
            cached_timestamps: [Lc] int64 seconds -- of the earlier events; only for models with a time bias.
            ratings: [L] int32 -- only for models with a rating table.
            max_new: most events of one history here; None is max_seq_len.

        Raises:
            ValueError: if a model with a time bias gets no cached timestamps.
        """
        config, num_new, num_cached = self.config, timestamps.shape[0], key_values[0].k.shape[0]
        batch, position = self.batch(timestamps, seq_offsets, request_timestamps)
        joined = joined_rows(cache_offsets, seq_offsets, num_cached, num_new)
        key_timestamps = None
        if config.has_time_bias:
            if cached_timestamps is None:
                raise ValueError("this model has a time bias; cached_timestamps [Lc] are missing")
            key_timestamps = torch.cat([cached_timestamps, timestamps]).index_select(0, joined.places)
        cached_len = (cache_offsets[1:] - cache_offsets[:-1]).to(torch.int64)
        position = position + cached_len.index_select(0, sequence_index(seq_offsets, num_new))
        cache = CachedRows(cache_offsets, max_new or config.max_seq_len)
        batch = dataclasses.replace(batch, col_timestamps=key_timestamps, cache=cache)
        return self._encode(self.embed(item_ids, timestamps, position, ratings), batch, key_values, joined)

    def _encode(
        self, x: Tensor, batch: JaggedBatch, cached: Sequence[KeyValue | None], joined: JoinedRows | None = None
    ) -> EncodedRows:
        activations, key_values = [x], []
        for layer, before in zip(cast(Iterable[HstuLayer], self.layers), cached, strict=True):
            uvqk = layer.project_uvqk(activations[-1])
            key_values.append(layer.key_value(uvqk))
            activations.append(layer.output(activations[-1], uvqk.u, layer.attend(uvqk, batch, before)))
        return EncodedRows(tuple(key_values), tuple(activations), joined)

    def user_embeddings(self, last_activation: Tensor, seq_offsets: Tensor) -> Tensor:
        """[L, D] -> [B, item_embedding_dim] float32: the normalised last row of each sequence, zeros if it is empty."""
        ends = seq_offsets[1:].to(torch.int64)
        row = torch.where(ends > seq_offsets[:-1], ends - 1, last_activation.shape[0])
        return self.normalise(with_zero_row(last_activation).index_select(0, row))

    def forward(
        self,
        item_ids: Tensor,
        timestamps: Tensor,
        seq_offsets: Tensor,
        request_timestamps: Tensor,
        ratings: Tensor | None = None,
    ) -> Tensor:
        """User embedding of each history.

        Args:
            item_ids: [L] int32 -- 1..num_items, 0 is padding; values outside are clamped.
            timestamps: [L] int64 -- seconds, ascending within a sequence.
            seq_offsets: [B + 1] int32 -- first element 0, ascending, last element L.
            request_timestamps: [B] int64 -- seconds; the time at which the next item is asked for.
            ratings: [L] int32 -- only for models with a rating table.

        Returns:
            [B, item_embedding_dim] float32.
        """
        activations = self.layer_activations(item_ids, timestamps, seq_offsets, request_timestamps, ratings)
        return self.user_embeddings(activations[-1], seq_offsets)

    def top_items(
        self, user_embeddings: Tensor, item_vectors: Tensor | None, item_ids: Tensor, seq_offsets: Tensor, top_k: int
    ) -> TopItems:
        """Best items by dot product among those not in the history.

        Args:
            user_embeddings: [B, D] from `forward`.
            item_vectors: [V, D] from the method of that name; None makes them again, some rows at a time.
            item_ids: [L] int32 histories.
            seq_offsets: [B + 1] int32.
            top_k: K, 1..num_items.
        """
        parts = self.item_parts() if item_vectors is None else [item_vectors]
        found = [user_embeddings @ part.T for part in parts]
        scores = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        owner = sequence_index(seq_offsets, item_ids.shape[0])
        # Padding (id 0) and rows behind the last sequence mark column 0, which stands for no item.
        inside = torch.arange(item_ids.shape[0], device=owner.device) < seq_offsets[-1]
        seen_ids = torch.where(inside, item_ids, 0).clamp(0, self.config.num_items).to(torch.int64)
        seen = scores.new_zeros((scores.shape[0], self.config.num_items + 1))
        seen = seen.index_put((owner, seen_ids), torch.ones((), device=scores.device, dtype=scores.dtype))[:, 1:]
        open_scores = torch.where(seen > 0, NO_ITEM_SCORE, scores)
        best, index = torch.topk(open_scores, top_k, dim=1)
        ids = torch.where(best > NO_ITEM_SCORE, index + 1, 0)
        return TopItems(ids.to(torch.int32), best)
