"""Ranking: one history and many candidates in one sequence, a row of predictions per candidate. Level 1.

Tokens of a user: contextual, history, candidates. Candidates see the history and themselves, never one another, so a
history may be encoded once (`prefill`) and its candidates scored in any portions (`score`): `packed` gives the same.
Source of the arithmetic: DlrmHSTU of Meta's generative-recommenders, read at commit db1bf8f.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hstu_compile.model.attention import compute_dtype
from hstu_compile.model.casting import cast_weights, rows_in, table_type
from hstu_compile.model.jagged import sequence_index
from hstu_compile.model.layer import CachedRows, HstuLayer, JaggedBatch, KeyValue, Norm
from hstu_compile.model.mlp import NORM_EPS, Affine, SwishNormMlp
from hstu_compile.model.ranking_config import RankingConfig
from hstu_compile.model.time_features import (
    PERIODS,
    circle_table,
    circle_units,
    distance_buckets,
    distance_thresholds,
)

Features = Mapping[str, Tensor]

# Names of the inputs that are not features of the model.
SEQ_OFFSETS = "seq_offsets"
CANDIDATE_OFFSETS = "candidate_offsets"
CACHE_OFFSETS = "cache_offsets"
REQUEST_TIMESTAMPS = "request_timestamps"
NUM_CANDIDATES = "num_candidates"
SCALING_SEQ_LENS = "scaling_seq_lens"


class RankingOutput(NamedTuple):
    """Predictions, and the values inside that a comparison looks at.

    Attributes:
        preds: [T, tasks] float32 -- probabilities of binary tasks, values of regression tasks.
        logits: [T, tasks] float32 -- before the sigmoid.
        user_embeddings: [T, D] -- the candidates' rows behind the postprocessor.
        item_embeddings: [T, D] -- of the item tower.
        activations: residual stream before the first layer and after each one.
    """

    preds: Tensor
    logits: Tensor
    user_embeddings: Tensor
    item_embeddings: Tensor
    activations: tuple[Tensor, ...]


class PrefillOutput(NamedTuple):
    """Keys and values of every layer for the rows [contextual | history], and the residual stream before each layer."""

    key_values: tuple[KeyValue, ...]
    activations: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class _Sequences:
    """A batch of sequences by row: bounds [B + 1] int32, and of each row its sequence and its index there, int64."""

    offsets: Tensor
    owner: Tensor
    index: Tensor


def _sequences(offsets: Tensor, num_rows: int) -> _Sequences:
    owner = sequence_index(offsets, num_rows)
    rows = torch.arange(num_rows, device=offsets.device)
    return _Sequences(offsets, owner, rows - offsets.to(torch.int64).index_select(0, owner))


def _lengths(offsets: Tensor) -> Tensor:
    return (offsets[1:] - offsets[:-1]).to(torch.int64)


class RankingModel(nn.Module):
    """HSTU ranking on jagged batches, in any float dtype.

    Shapes: B users, U history events and T candidates of all users together, C contextual tokens of each, D wide.
    """

    time_thresholds: Tensor
    hour_table: Tensor
    weekday_table: Tensor

    def __init__(self, config: RankingConfig) -> None:
        super().__init__()
        self.config = config
        width, table_dim = config.layer.embedding_dim, config.table_dim
        self.table_index = {table.name: index for index, table in enumerate(config.tables)}
        tables = () if config.external_embeddings else config.tables
        self.tables = nn.ModuleList(nn.Embedding(table.num_rows, table.embedding_dim) for table in tables)
        self.content_mlp = SwishNormMlp(table_dim, config.hidden_dim, width, final_norm=True)
        extra = len(config.sequence_features) - 1
        self.additional_mlp = (
            SwishNormMlp(table_dim * extra, config.hidden_dim, width, final_norm=True) if extra else None
        )
        if config.action_feature:
            actions = len(config.action_weights)
            self.action_embedding = nn.Parameter(torch.empty(actions, config.action_embedding_dim).normal_(0, 0.1))
            packed = actions * config.action_embedding_dim
            self.target_action_embedding = nn.Parameter(torch.empty(1, packed).normal_(0, 0.1))
            self.action_mlp = SwishNormMlp(packed, config.hidden_dim, width, final_norm=True)
        # One each: a slice of a joint tensor would be a product with something that no builder knows to be constant.
        self.contextual = nn.ModuleList(Affine(table_dim, width) for _ in range(config.contextual_len))
        self.position_embedding = nn.Parameter(_uniform(config.num_positions, width, config.num_positions))
        self.time_embedding = nn.Parameter(_uniform(config.num_time_buckets + 1, width, config.num_time_buckets))
        thresholds = distance_thresholds(config.largest_time_bucket, config.time_bucket_fn)
        self.register_buffer("time_thresholds", thresholds.clone(), persistent=False)
        self.layers = nn.ModuleList(HstuLayer(config.layer) for _ in range(config.num_layers))
        if config.postprocessor == "timestamp_layer_norm":
            self.time_combiner = Affine(width + 2 * len(PERIODS), width)
            for name, (_, units) in zip(("hour_table", "weekday_table"), PERIODS, strict=True):
                self.register_buffer(name, circle_table(units), persistent=False)
        if config.postprocessor != "l2_norm":
            self.user_norm = Norm(width, 1, affine=True, eps=NORM_EPS)
        self.item_mlp = SwishNormMlp(
            table_dim * len(config.item_features), config.tower_hidden_dim, width, final_norm=True
        )
        self.head = SwishNormMlp(width, config.tower_hidden_dim, len(config.tasks), final_norm=False)

    def cast(self, dtype: torch.dtype) -> RankingModel:
        """Cast weights and activations to `dtype` in place.

        In float64 the tables stay in the type that they have, and their rows are widened when they are looked up.
        """
        types = {id(table): table_type(table, dtype) for table in self.tables.parameters()}
        cast_weights(self, lambda tensor: types.get(id(tensor), dtype))
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return self.position_embedding.dtype

    def lookup(self, values: Tensor, table: str) -> Tensor:
        """Embedding rows [L, table_dim] of ids [L] clamped into the table, or of rows that are given instead of ids."""
        if values.is_floating_point():
            return values.to(self.dtype)
        embedding = self.tables[self.table_index[table]]
        assert isinstance(embedding, nn.Embedding)
        return rows_in(embedding(values.clamp(0, embedding.num_embeddings - 1)), self.dtype)

    def action_rows(self, actions: Tensor) -> Tensor:
        """[U] int32 bitmasks -> [U + 1, D] in `compute_dtype`: the history's actions, then that of every candidate.

        A candidate's action is not known yet; it has an embedding of its own.
        """
        # Mod and compare instead of a bitwise and, which TensorRT lacks; floor-mod is two's complement's lowest bits.
        bits = sorted({bit for weight in self.config.action_weights for bit in range(32) if weight >> bit & 1})
        moduli = torch.tensor([2 << bit for bit in bits], dtype=torch.int64, device=actions.device)
        halves = torch.tensor([1 << bit for bit in bits], dtype=torch.int64, device=actions.device)
        is_set = (actions.to(torch.int64)[:, None] % moduli) >= halves
        wide = compute_dtype(self.dtype)
        members = [[float(weight >> bit & 1) for weight in self.config.action_weights] for bit in bits]
        seen = (is_set.to(wide)[:, :, None] * torch.tensor(members, dtype=wide, device=actions.device)).amax(dim=1)
        embedded = (seen[:, :, None] * self.action_embedding.to(wide)).reshape(
            -1, self.target_action_embedding.shape[1]
        )
        rows: Tensor = self.action_mlp(torch.cat([embedded.to(self.dtype), self.target_action_embedding]))
        return rows

    def event_rows(self, ids: Sequence[Tensor], actions: Tensor | None, num_history: int) -> Tensor:
        """Rows of history events, then of candidates: [U + T, D] in `compute_dtype`.

        Args:
            ids: one [U + T, table_dim] of embedding rows for every sequence feature.
            actions: [U + 1, D] from `action_rows`, or None.
            num_history: U; the rows behind it are candidates.
        """
        rows: Tensor = self.content_mlp(ids[0])
        if self.additional_mlp is not None:
            rows = rows + self.additional_mlp(torch.cat(list(ids[1:]), dim=1))
        if actions is not None:
            index = torch.arange(rows.shape[0], device=rows.device).clamp(max=num_history)
            rows = rows + actions.index_select(0, index)
        return rows

    def contextual_rows(self, features: Features, lengths: Tensor) -> Tensor:
        """[B * C, D] in `compute_dtype`: the contextual tokens, user by user.

        Args:
            features: holds the contextual inputs, [B * max_length] each; a negative id is absent.
            lengths: [B] int64 -- what min_history_len is compared with. A user below it gets the tokens of absent ids.
        """
        config = self.config
        tokens: list[Tensor] = []
        for feature in config.contextual_features:
            values = features[feature.name]
            rows = self.lookup(values, feature.table)
            if not values.is_floating_point():
                rows = rows * (values >= 0).to(rows.dtype)[:, None]
            rows = rows.view(-1, feature.max_length, config.table_dim)
            if feature.min_history_len:
                rows = rows * (lengths >= feature.min_history_len).to(rows.dtype)[:, None, None]
            for slot in range(feature.max_length):
                tokens.append(self.contextual[len(tokens)](rows[:, slot]))
        return torch.stack(tokens, dim=1).view(-1, config.layer.embedding_dim)

    def encode_position(self, rows: Tensor, position: Tensor, distance: Tensor) -> Tensor:
        """First residual stream [L, D]: rows * sqrt(D) + position embedding + time embedding, rounded once.

        Args:
            rows: [L, D] in `compute_dtype`.
            position: [L] int64 rows of the position table, or [1], one for all.
            distance: [L] int64 seconds before the query.
        """
        config, wide = self.config, compute_dtype(self.dtype)
        buckets = distance_buckets(distance, self.time_thresholds, config.time_bucket_fn)
        position = position.clamp(0, config.num_positions - 1)
        added = self.time_embedding.index_select(0, buckets).to(wide) + self.position_embedding.index_select(
            0, position
        ).to(wide)
        return (rows * math.sqrt(config.layer.embedding_dim) + added).to(self.dtype)

    def _positions(self, index: Tensor, history: Tensor) -> Tensor:
        """Position of each row: contextual tokens count up, then it counts down; every candidate is at C.

        Args:
            index: [L] int64 -- row in its sequence.
            history: [L] int64 -- rows of its sequence that are not candidates.
        """
        context = self.config.contextual_len
        backwards = history - torch.minimum(index, history) + context
        return torch.where(index < context, index, backwards) if context else backwards

    def postprocess(self, x: Tensor, query_times: Tensor) -> Tensor:
        """User embedding per candidate in `compute_dtype`: [T, D] rows and [T] int64 seconds -> [T, D]."""
        config, wide = self.config, compute_dtype(x.dtype)
        if config.postprocessor == "l2_norm":
            norm: Tensor = torch.linalg.vector_norm(x.to(wide), dim=-1, keepdim=True)
            return x.to(wide) / norm.clamp(min=1e-6)
        if config.postprocessor == "timestamp_layer_norm":
            units = circle_units(query_times, config.time_feature_precision)
            circles = [
                table.index_select(0, unit).to(x.dtype)
                for table, unit in zip((self.hour_table, self.weekday_table), units, strict=True)
            ]
            # What is stored between two products is rounded to the model's type, here as everywhere.
            x = self.time_combiner(torch.cat([x, *circles], dim=1)).to(x.dtype)
        out: Tensor = self.user_norm(x)
        return out

    def predict(
        self, x: Tensor, query_times: Tensor, candidate_rows: Mapping[str, Tensor], activations: Sequence[Tensor]
    ) -> RankingOutput:
        """Predictions from the candidates' rows [T, D] behind the last layer."""
        users = self.postprocess(x, query_times)
        items: Tensor = self.item_mlp(
            torch.cat([candidate_rows[feature.name] for feature in self.config.item_features], dim=1)
        )
        logits = self.head((users * items).to(x.dtype))
        binary = sum(task.kind == "binary" for task in self.config.tasks)
        # Spelled out: the Sigmoid of ONNX Runtime on a CPU and of TensorRT 8 are good to 1e-7 absolute and no better,
        # which is half of a probability of 1e-7.
        probabilities = 1.0 / (1.0 + torch.exp(-logits[:, :binary]))
        preds = torch.cat([probabilities, logits[:, binary:]], dim=1)
        return RankingOutput(preds, logits, users, items, tuple(activations))

    def packed(self, features: Features) -> RankingOutput:
        """Histories and candidates in one forward.

        Args:
            features: history inputs [U], contextual inputs [B * max_length] and candidate inputs [T] by name,
                `seq_offsets` and `candidate_offsets` [B + 1] int32. Ids int32, actions int32, times int64 seconds.
        """
        config, context = self.config, self.config.contextual_len
        seq_offsets, candidate_offsets = features[SEQ_OFFSETS], features[CANDIDATE_OFFSETS]
        history_times = features[config.history_time_feature]
        query_times = features[config.candidate_time_feature]
        num_history, num_candidates = history_times.shape[0], query_times.shape[0]
        history_len, num_targets = _lengths(seq_offsets), _lengths(candidate_offsets)
        batch = seq_offsets.shape[0] - 1
        steps = torch.arange(batch + 1, device=seq_offsets.device, dtype=seq_offsets.dtype)
        offsets = seq_offsets + candidate_offsets + context * steps
        packed = _sequences(offsets, batch * context + num_history + num_candidates)

        first_event = batch * context
        history_end = history_len.index_select(0, packed.owner) + context
        source = torch.where(
            packed.index < history_end,
            first_event + seq_offsets.to(torch.int64).index_select(0, packed.owner) + packed.index - context,
            first_event
            + num_history
            + candidate_offsets.to(torch.int64).index_select(0, packed.owner)
            + packed.index
            - history_end,
        )
        if context:
            source = torch.where(packed.index < context, packed.owner * context + packed.index, source)
        # Rows behind the last sequence have no source; they are read by nothing.
        source = source.clamp(0, first_event + num_history + num_candidates - 1)

        candidate_rows = {name: self.lookup(features[name], table) for name, table in config.candidate_ids.items()}
        ids = [
            torch.cat([self.lookup(features[feature.history], feature.table), candidate_rows[feature.candidate]])
            for feature in config.sequence_features
        ]
        actions = self.action_rows(features[config.action_feature]) if config.action_feature else None
        rows = self.event_rows(ids, actions, num_history)
        times = torch.cat([history_times, query_times])
        if context:
            counted = (
                history_len + num_targets if config.min_history_counts == "history_and_candidates" else history_len
            )
            rows = torch.cat([self.contextual_rows(features, counted), rows])
            times = torch.cat([times.new_zeros((batch * context,)), times])
        rows, times = rows.index_select(0, source), times.index_select(0, source)
        last = (offsets[1:].to(torch.int64) - 1).clamp(min=0)
        # By row, not by user: in a batch without any row there is no last one to read.
        anchors = times.index_select(0, last.index_select(0, packed.owner))
        x = self.encode_position(rows, self._positions(packed.index, history_end), anchors - times)

        scaling: Tensor | None = None
        if config.scaling == "batch":
            # Exact in float32, in which every runtime can reduce.
            lengths = history_len.to(torch.float32), num_targets.to(torch.float32)
            scaling = (lengths[0].amax(dim=0) + lengths[1].amax(dim=0) + context).expand(batch)
        jagged = JaggedBatch(
            offsets, num_targets=candidate_offsets[1:] - candidate_offsets[:-1], scaling_seq_lens=scaling
        )
        activations = [x]
        for layer in self.layers:
            activations.append(layer(activations[-1], jagged))
        candidates = _sequences(candidate_offsets, num_candidates)
        row = offsets.to(torch.int64).index_select(0, candidates.owner) + context
        row = row + history_len.index_select(0, candidates.owner) + candidates.index
        row = row.clamp(0, packed.owner.shape[0] - 1)
        return self.predict(activations[-1].index_select(0, row), query_times, candidate_rows, activations)

    def prefill(self, features: Features) -> PrefillOutput:
        """Encode histories to the keys and values that `score` reads.

        Args:
            features: history inputs [U] and contextual inputs by name, `seq_offsets` [B + 1] int32,
                `request_timestamps` [B] int64 seconds (query time of the request's last candidate), `num_candidates`
                [B] int32 if the config counts candidates, `scaling_seq_lens` [B] float32 if scaling is "batch".

        Returns:
            Rows of user b are seq_offsets[b] + b * C and following: contextual tokens, then history.
        """
        config, context = self.config, self.config.contextual_len
        seq_offsets = features[SEQ_OFFSETS]
        times = features[config.history_time_feature]
        history_len = _lengths(seq_offsets)
        batch, num_history = seq_offsets.shape[0] - 1, times.shape[0]
        steps = torch.arange(batch + 1, device=seq_offsets.device, dtype=seq_offsets.dtype)
        offsets = seq_offsets + context * steps
        cached = _sequences(offsets, batch * context + num_history)

        ids = [self.lookup(features[feature.history], feature.table) for feature in config.sequence_features]
        actions = self.action_rows(features[config.action_feature]) if config.action_feature else None
        rows = self.event_rows(ids, actions, num_history)
        if context:
            source = batch * context + seq_offsets.to(torch.int64).index_select(0, cached.owner)
            source = torch.where(
                cached.index < context, cached.owner * context + cached.index, source + cached.index - context
            ).clamp(0, batch * context + num_history - 1)
            counted = history_len
            if config.counts_candidates:
                counted = counted + features[NUM_CANDIDATES].to(torch.int64)
            rows = torch.cat([self.contextual_rows(features, counted), rows]).index_select(0, source)
            times = torch.cat([times.new_zeros((batch * context,)), times]).index_select(0, source)
        history_end = (history_len + context).index_select(0, cached.owner)
        distance = features[REQUEST_TIMESTAMPS].index_select(0, cached.owner) - times
        x = self.encode_position(rows, self._positions(cached.index, history_end), distance)

        scaling = features[SCALING_SEQ_LENS] if config.scaling == "batch" else None
        jagged = JaggedBatch(offsets, scaling_seq_lens=scaling, max_seq_len=context + config.max_history_len)
        activations, key_values = [x], []
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, HstuLayer)
            uvqk = layer.project_uvqk(activations[-1])
            key_values.append(layer.key_value(uvqk))
            # Behind the last layer only candidates are read.
            if number + 1 < config.num_layers:
                activations.append(layer.output(activations[-1], uvqk.u, layer.attend(uvqk, jagged)))
        return PrefillOutput(tuple(key_values), tuple(activations))

    def score(
        self, features: Features, key_values: Sequence[KeyValue], micro_batch: int | None = None
    ) -> RankingOutput:
        """Candidates against encoded histories.

        Args:
            features: candidate inputs [T] by name, `candidate_offsets` and `cache_offsets` [B + 1] int32,
                `request_timestamps` [B] int64 seconds, and `scaling_seq_lens` [B] float32 if scaling is "batch"; the
                last two as they were for `prefill`.
            key_values: of `prefill`, layer by layer; user b owns rows cache_offsets[b] to cache_offsets[b + 1].
            micro_batch: most candidates of one user here; None is the config's max_candidates.
        """
        config, context = self.config, self.config.contextual_len
        candidate_offsets = features[CANDIDATE_OFFSETS]
        query_times = features[config.candidate_time_feature]
        most = config.max_candidates if micro_batch is None else micro_batch

        candidate_rows = {name: self.lookup(features[name], table) for name, table in config.candidate_ids.items()}
        ids = [candidate_rows[feature.candidate] for feature in config.sequence_features]
        rows = self.event_rows(ids, None, 0)
        if config.action_feature:
            rows = rows + self.action_mlp(self.target_action_embedding)
        # Every candidate has the same action and the same position: one row of each, which the sums repeat.
        position = torch.full((1,), context, device=query_times.device)
        owner = sequence_index(candidate_offsets, query_times.shape[0])
        distance = features[REQUEST_TIMESTAMPS].index_select(0, owner) - query_times
        x = self.encode_position(rows, position, distance)

        jagged = JaggedBatch(
            candidate_offsets,
            num_targets=candidate_offsets[1:] - candidate_offsets[:-1],
            scaling_seq_lens=features[SCALING_SEQ_LENS] if config.scaling == "batch" else None,
            max_seq_len=context + config.max_history_len + most,
            cache=CachedRows(features[CACHE_OFFSETS], most),
        )
        activations = [x]
        for layer, cached in zip(self.layers, key_values, strict=True):
            activations.append(layer(activations[-1], jagged, cached))
        return self.predict(activations[-1], query_times, candidate_rows, activations)


def _uniform(rows: int, width: int, inverse_scale: int) -> Tensor:
    bound = math.sqrt(1.0 / inverse_scale)
    return torch.empty(rows, width).uniform_(-bound, bound)
