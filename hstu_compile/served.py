"""The graphs that a model is served as: module, inputs, outputs, taps. Level 2.

A retrieval model is one graph (`retrieval`), or three (`retrieval`, `prefill`, `append`) of the same weights; a ranking
model is one (`packed`), or three (`packed`, `prefill`, `score`). Export, verification and profiles read all they need
to know of a graph from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hstu_compile.artifacts import ITEM_EMBEDDINGS_TAP, TAP_PREFIX, USER_EMBEDDINGS_TAP
from hstu_compile.model.config import AttentionConfig
from hstu_compile.model.families import HstuModel
from hstu_compile.model.layer import KeyValue
from hstu_compile.model.ranking import (
    CACHE_OFFSETS,
    CANDIDATE_OFFSETS,
    NUM_CANDIDATES,
    REQUEST_TIMESTAMPS,
    SCALING_SEQ_LENS,
    SEQ_OFFSETS,
    RankingModel,
)
from hstu_compile.model.retrieval import RetrievalModel

# Which rows of the last layer something reads.
Consumed = Literal["all", "last_of_sequence", "candidates"]

# Sizes of the traced examples; the graphs are dynamic in all of them.
_HISTORY_LENGTHS = (5, 3, 4)
_CANDIDATE_COUNTS = (2, 3, 2)

# Inputs of `append` beside keys and values: facts about the cached events.
CACHED_TIMESTAMPS = "cached_timestamps"
CACHED_ITEM_IDS = "cached_item_ids"


@dataclasses.dataclass(frozen=True)
class GraphInput:
    """One graph input: its name, the name of its first axis, and an example to trace with."""

    name: str
    axis: str
    example: Tensor = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class ServedGraph:
    """One graph of a model.

    Attributes:
        name: retrieval, packed, prefill, score or append.
        module: takes the inputs in order, gives the outputs and then the taps.
        inputs: in order.
        outputs: names of what is served.
        taps: names of the intermediate values that a comparison looks at; the residual stream is layer_0 .. layer_n.
        num_attention: attention nodes.
        consumed: rows of the last layer that the outputs depend on.
        max_candidates: most candidates of one user; 0 in a graph without candidates.
    """

    name: str
    module: nn.Module = dataclasses.field(repr=False)
    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]
    taps: tuple[str, ...]
    num_attention: int
    consumed: Consumed
    max_candidates: int = 0

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs and taps of the eager module; the half types come as float32, which holds them exactly."""
        with torch.inference_mode():
            values = self.module(*(torch.from_numpy(np.ascontiguousarray(feeds[each.name])) for each in self.inputs))
        half = (torch.float16, torch.bfloat16)
        return {
            name: (value.float() if value.dtype in half else value).numpy()
            for name, value in zip((*self.outputs, *self.taps), values, strict=True)
        }

    def reference(self, feeds: Mapping[str, NDArray[Any]], prune: bool = True) -> dict[str, NDArray[Any]]:
        """Like `run`, but with `prune` the last layer's tap holds only the consumed rows, as in a pruned graph."""
        values = self.run(feeds)
        if prune and self.consumed != "all":
            rows = values[self.taps[-1]]
            index = _consumed_rows(self.consumed, feeds, len(rows))
            values[self.taps[-1]] = np.concatenate([rows, np.zeros_like(rows, shape=(1, *rows.shape[1:]))])[index]
        return values


def _consumed_rows(consumed: Consumed, feeds: Mapping[str, NDArray[Any]], num_rows: int) -> NDArray[np.int64]:
    """Which rows of the last layer are read; `num_rows` stands for a row of zeros."""
    offsets = feeds[SEQ_OFFSETS].astype(np.int64)
    if consumed == "last_of_sequence":
        return np.where(np.diff(offsets) > 0, offsets[1:] - 1, num_rows)
    candidates = feeds[CANDIDATE_OFFSETS].astype(np.int64)
    batch = len(offsets) - 1
    context = (num_rows - int(offsets[-1]) - int(candidates[-1])) // batch
    owner = np.repeat(np.arange(batch), np.diff(candidates))
    # Behind every candidate of an earlier user lie that user's history and context, and the own user's before it.
    rows: NDArray[np.int64] = np.arange(len(owner)) + offsets[owner + 1] + context * (owner + 1)
    return rows


class _Recommender(nn.Module):
    """What the graphs of a retrieval model have in common: user embeddings and, on request, the best unseen items."""

    item_vectors: Tensor | None

    def __init__(self, model: RetrievalModel, top_k: int, names: tuple[str, ...], items: Tensor | None) -> None:
        super().__init__()
        self.model, self.top_k, self.names = model, top_k, names
        self.register_buffer("item_vectors", items)

    def answers(self, last_activation: Tensor, seq_offsets: Tensor, seen: Tensor, seen_offsets: Tensor) -> list[Tensor]:
        """The outputs for rows of the last layer; `seen` are the items of the histories, [S] int32."""
        user_embeddings = self.model.user_embeddings(last_activation, seq_offsets)
        outputs = [user_embeddings]
        if self.top_k:
            outputs += self.model.top_items(user_embeddings, self.item_vectors, seen, seen_offsets, self.top_k)
        return outputs


class _Retrieval(_Recommender):
    """The answers, then the residual stream."""

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        features = dict(zip(self.names, values, strict=True))
        activations, offsets = self.model.layer_activations(**features), features[SEQ_OFFSETS]
        return (*self.answers(activations[-1], offsets, features["item_ids"], offsets), *activations)


class _RetrievalPrefill(_Recommender):
    """The answers, keys and values of every layer, then the residual stream."""

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        features = dict(zip(self.names, values, strict=True))
        output, offsets = self.model.prefill(**features), features[SEQ_OFFSETS]
        answers = self.answers(output.activations[-1], offsets, features["item_ids"], offsets)
        return (*answers, *(part for pair in output.key_values for part in pair), *output.activations)


class _Append(_Recommender):
    """The answers, keys and values of the new rows, then their residual stream."""

    def __init__(
        self, model: RetrievalModel, top_k: int, names: tuple[str, ...], items: Tensor | None, max_new: int
    ) -> None:
        super().__init__(model, top_k, names, items)
        self.max_new = max_new

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        features = dict(zip(self.names, values, strict=True))
        cached = _key_values(features, self.model.config.num_layers, self.model.dtype)
        seen = features.pop(CACHED_ITEM_IDS, None)
        output = self.model.append(**features, key_values=cached, max_new=self.max_new)
        assert output.joined is not None
        ids = features["item_ids"]
        if seen is not None:
            ids = torch.cat([seen, ids]).index_select(0, output.joined.places)
        answers = self.answers(output.activations[-1], features[SEQ_OFFSETS], ids, output.joined.offsets)
        return (*answers, *(part for pair in output.key_values for part in pair), *output.activations)


class _Packed(nn.Module):
    """Predictions for histories and candidates in one forward, then the taps."""

    def __init__(self, model: RankingModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        output = self.model.packed(dict(zip(self.names, values, strict=True)))
        return (output.preds, output.logits, output.user_embeddings, output.item_embeddings, *output.activations)


class _Prefill(nn.Module):
    """Keys and values of every layer, then the residual stream before each layer."""

    def __init__(self, model: RankingModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        output = self.model.prefill(dict(zip(self.names, values, strict=True)))
        return (*(part for pair in output.key_values for part in pair), *output.activations)


class _Score(nn.Module):
    """Predictions for candidates against keys and values, then the taps."""

    def __init__(self, model: RankingModel, names: tuple[str, ...], micro_batch: int) -> None:
        super().__init__()
        self.model, self.names, self.micro_batch = model, names, micro_batch

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        features = dict(zip(self.names, values, strict=True))
        pairs = _key_values(features, self.model.config.num_layers, self.model.dtype)
        output = self.model.score(features, pairs, self.micro_batch)
        return (output.preds, output.logits, output.user_embeddings, output.item_embeddings, *output.activations)


def _key_values(features: dict[str, Tensor], num_layers: int, dtype: torch.dtype) -> list[KeyValue]:
    """Take the cached keys and values of every layer out of the features.

    Engines keep the type of the cache; a float64 reference reads the same stored numbers.
    """
    return [KeyValue(features.pop(f"k_{i}").to(dtype), features.pop(f"v_{i}").to(dtype)) for i in range(num_layers)]


def _cached_names(num_layers: int) -> tuple[str, ...]:
    return tuple(f"{part}_{layer}" for layer in range(num_layers) for part in ("k", "v"))


def _layer_taps(count: int) -> tuple[str, ...]:
    return tuple(f"{TAP_PREFIX}{i}" for i in range(count))


def _offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def ranked_items(model: RetrievalModel, top_k: int) -> Tensor | None:
    """What the graphs of a model rank: its item vectors, normalised once and not for each request.

    None without a ranking, and of a float64 model, which is never a graph: it makes them again for each request, some
    rows at a time.
    """
    if not top_k or model.dtype == torch.float64:
        return None
    items, table = model.item_vectors(), model.item_embedding.weight
    # A graph's constant of its own, even where these are the table's rows as they are.
    return items.clone() if items.untyped_storage().data_ptr() == table.untyped_storage().data_ptr() else items


def retrieval_graph(model: RetrievalModel, top_k: int = 0, items: Tensor | None = None) -> ServedGraph:
    """The graph of a retrieval model.

    Args:
        model: in evaluation mode, cast to the precision of the graph.
        top_k: also output the K best unseen items; 0 leaves them out.
        items: what `ranked_items` gives, so that several graphs share it; None makes it.
    """
    items = ranked_items(model, top_k) if items is None else items
    inputs = _retrieval_inputs(model, "L", _HISTORY_LENGTHS)
    return ServedGraph(
        name="retrieval",
        module=_Retrieval(model, top_k, _names(inputs), items).eval(),
        inputs=tuple(inputs),
        outputs=_recommended(top_k),
        taps=_layer_taps(model.config.num_layers + 1),
        num_attention=model.config.num_layers,
        consumed="last_of_sequence",
    )


def retrieval_prefill_graph(model: RetrievalModel, top_k: int = 0, items: Tensor | None = None) -> ServedGraph:
    """Histories to the answers of `retrieval_graph`, and to the keys and values that `append_graph` reads."""
    items = ranked_items(model, top_k) if items is None else items
    inputs, layers = _retrieval_inputs(model, "L", _HISTORY_LENGTHS), model.config.num_layers
    return ServedGraph(
        name="prefill",
        module=_RetrievalPrefill(model, top_k, _names(inputs), items).eval(),
        inputs=tuple(inputs),
        outputs=(*_recommended(top_k), *_cached_names(layers)),
        taps=_layer_taps(layers + 1),
        num_attention=layers,
        consumed="last_of_sequence",
    )


def append_graph(model: RetrievalModel, max_append: int, top_k: int = 0, items: Tensor | None = None) -> ServedGraph:
    """The last events of histories, at most `max_append` new ones each and the one before them, against cached rows."""
    items = ranked_items(model, top_k) if items is None else items
    config, layers = model.config, model.config.num_layers
    inputs = _retrieval_inputs(model, "A", _CANDIDATE_COUNTS)
    inputs.append(GraphInput(CACHE_OFFSETS, "B_plus_1", _offsets(_HISTORY_LENGTHS)))
    cached = sum(_HISTORY_LENGTHS)
    if config.has_time_bias:
        inputs.append(GraphInput(CACHED_TIMESTAMPS, "Lc", torch.arange(cached)))
    if top_k:
        inputs.append(GraphInput(CACHED_ITEM_IDS, "Lc", torch.ones(cached, dtype=torch.int32)))
    inputs += _cache_inputs(config.layer.attention, layers, cached, model.dtype)
    return ServedGraph(
        name="append",
        module=_Append(model, top_k, _names(inputs), items, min(max_append + 1, config.max_seq_len)).eval(),
        inputs=tuple(inputs),
        outputs=(*_recommended(top_k), *(f"new_{name}" for name in _cached_names(layers))),
        taps=_layer_taps(layers + 1),
        num_attention=layers,
        consumed="all",
    )


def _recommended(top_k: int) -> tuple[str, ...]:
    return ("user_embeddings", *(("top_items", "top_scores") if top_k else ()))


def _retrieval_inputs(model: RetrievalModel, axis: str, lengths: tuple[int, ...]) -> list[GraphInput]:
    """Events of that many sequences, and when the next one of each is asked for."""
    total = sum(lengths)
    inputs = [
        GraphInput("item_ids", axis, torch.ones(total, dtype=torch.int32)),
        GraphInput("timestamps", axis, torch.arange(total)),
        GraphInput(SEQ_OFFSETS, "B_plus_1", _offsets(lengths)),
        GraphInput(REQUEST_TIMESTAMPS, "B", torch.full((len(lengths),), total)),
    ]
    if model.config.has_ratings:
        inputs.append(GraphInput("ratings", axis, torch.zeros(total, dtype=torch.int32)))
    return inputs


def _cache_inputs(attention: AttentionConfig, num_layers: int, rows: int, dtype: torch.dtype) -> list[GraphInput]:
    """Keys and values of every layer."""
    widths = {"k": attention.attention_dim, "v": attention.linear_dim}
    return [
        GraphInput(name, "Lc", torch.zeros((rows, attention.num_heads, widths[name[0]]), dtype=dtype))
        for name in _cached_names(num_layers)
    ]


class _RankingInputs:
    """Examples of a ranking model's inputs, by role."""

    def __init__(self, model: RankingModel) -> None:
        self._config = model.config

    def _ids(self, name: str, axis: str, count: int) -> GraphInput:
        if self._config.external_embeddings:
            return GraphInput(name, axis, torch.ones((count, self._config.table_dim), dtype=torch.float32))
        return GraphInput(name, axis, torch.zeros(count, dtype=torch.int32))

    def history(self) -> list[GraphInput]:
        """One value per event."""
        config, total = self._config, sum(_HISTORY_LENGTHS)
        inputs = [self._ids(name, "L", total) for name in config.history_ids]
        inputs.append(GraphInput(config.history_time_feature, "L", torch.arange(total)))
        if config.action_feature:
            inputs.append(GraphInput(config.action_feature, "L", torch.ones(total, dtype=torch.int32)))
        return inputs

    def context(self) -> list[GraphInput]:
        """`max_length` values per user."""
        batch = len(_HISTORY_LENGTHS)
        return [
            self._ids(each.name, "B" if each.max_length == 1 else f"B_times_{each.max_length}", batch * each.max_length)
            for each in self._config.contextual_features
        ]

    def candidates(self) -> list[GraphInput]:
        """One value per candidate."""
        total = sum(_CANDIDATE_COUNTS)
        inputs = [self._ids(name, "T", total) for name in self._config.candidate_ids]
        return [*inputs, GraphInput(self._config.candidate_time_feature, "T", torch.full((total,), 100))]

    def request(self, *, prefill: bool) -> list[GraphInput]:
        """One value per user that a packed forward derives itself."""
        batch = len(_HISTORY_LENGTHS)
        inputs = [GraphInput(REQUEST_TIMESTAMPS, "B", torch.full((batch,), 100))]
        if prefill and self._config.counts_candidates:
            inputs.append(GraphInput(NUM_CANDIDATES, "B", torch.tensor(_CANDIDATE_COUNTS, dtype=torch.int32)))
        if self._config.scaling == "batch":
            inputs.append(GraphInput(SCALING_SEQ_LENS, "B", torch.full((batch,), 9.0)))
        return inputs

    def cache(self, dtype: torch.dtype) -> list[GraphInput]:
        """Keys and values in front of the candidates."""
        config, rows = self._config, sum(_HISTORY_LENGTHS) + len(_HISTORY_LENGTHS) * self._config.contextual_len
        offsets = _offsets(tuple(length + config.contextual_len for length in _HISTORY_LENGTHS))
        return [
            GraphInput(CACHE_OFFSETS, "B_plus_1", offsets),
            *_cache_inputs(config.layer.attention, config.num_layers, rows, dtype),
        ]


def _names(inputs: list[GraphInput]) -> tuple[str, ...]:
    return tuple(each.name for each in inputs)


def packed_graph(model: RankingModel) -> ServedGraph:
    """Histories and candidates in one forward."""
    make, layers = _RankingInputs(model), model.config.num_layers
    inputs = [
        *make.history(),
        *make.context(),
        *make.candidates(),
        GraphInput(SEQ_OFFSETS, "B_plus_1", _offsets(_HISTORY_LENGTHS)),
        GraphInput(CANDIDATE_OFFSETS, "B_plus_1", _offsets(_CANDIDATE_COUNTS)),
    ]
    return ServedGraph(
        name="packed",
        module=_Packed(model, _names(inputs)).eval(),
        inputs=tuple(inputs),
        outputs=("preds", "logits"),
        taps=(USER_EMBEDDINGS_TAP, ITEM_EMBEDDINGS_TAP, *_layer_taps(layers + 1)),
        num_attention=layers,
        consumed="candidates",
        max_candidates=model.config.max_candidates,
    )


def prefill_graph(model: RankingModel) -> ServedGraph:
    """Histories to keys and values."""
    make, layers = _RankingInputs(model), model.config.num_layers
    inputs = [
        *make.history(),
        *make.context(),
        GraphInput(SEQ_OFFSETS, "B_plus_1", _offsets(_HISTORY_LENGTHS)),
        *make.request(prefill=True),
    ]
    return ServedGraph(
        name="prefill",
        module=_Prefill(model, _names(inputs)).eval(),
        inputs=tuple(inputs),
        outputs=_cached_names(layers),
        taps=_layer_taps(layers),
        num_attention=layers - 1,
        consumed="all",
    )


def score_graph(model: RankingModel, micro_batch: int) -> ServedGraph:
    """At most `micro_batch` candidates, of all users together, against keys and values."""
    make, layers = _RankingInputs(model), model.config.num_layers
    inputs = [
        *make.candidates(),
        GraphInput(CANDIDATE_OFFSETS, "B_plus_1", _offsets(_CANDIDATE_COUNTS)),
        *make.request(prefill=False),
        *make.cache(model.dtype),
    ]
    return ServedGraph(
        name="score",
        module=_Score(model, _names(inputs), micro_batch).eval(),
        inputs=tuple(inputs),
        outputs=("preds", "logits"),
        taps=(USER_EMBEDDINGS_TAP, ITEM_EMBEDDINGS_TAP, *_layer_taps(layers + 1)),
        num_attention=layers,
        consumed="all",
        max_candidates=micro_batch,
    )


def served_graphs(
    model: HstuModel, top_k: int = 0, micro_batch: int | None = None, max_append: int | None = None
) -> tuple[ServedGraph, ...]:
    """Every graph of a model; the first is the one that answers a request by itself.

    Args:
        model: in evaluation mode, cast to the precision of the graphs.
        top_k: of a retrieval model: also output the K best unseen items.
        micro_batch: of a ranking model: candidates of one scoring pass; None leaves prefill and score out.
        max_append: of a retrieval model: most new events of one history in a pass; None leaves prefill and append out.
    """
    if isinstance(model, RetrievalModel):
        items = ranked_items(model, top_k)
        if max_append is None:
            return (retrieval_graph(model, top_k, items),)
        return (
            retrieval_graph(model, top_k, items),
            retrieval_prefill_graph(model, top_k, items),
            append_graph(model, max_append, top_k, items),
        )
    if micro_batch is None:
        return (packed_graph(model),)
    return packed_graph(model), prefill_graph(model), score_graph(model, micro_batch)
