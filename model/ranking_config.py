"""Configuration of a ranking model: features by role, tables, encoders, tasks. Level 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from hstu_compile.graph_names import is_reserved
from hstu_compile.model._validation import MAX_TIME_BUCKETS, MAX_WIDTH, from_mapping, require, require_choices
from hstu_compile.model.config import LayerConfig

TaskKind = Literal["binary", "regression"]
TimeBucketFn = Literal["sqrt", "log"]
TimeBucketClamp = Literal["embedding_dim", "table"]
RankingPostprocessor = Literal["timestamp_layer_norm", "layer_norm", "l2_norm"]
TimeFeaturePrecision = Literal["float32", "exact"]
ScalingSeqLen = Literal["fixed", "batch"]
MinHistoryCounts = Literal["history_and_candidates", "history"]
CacheRule = Literal["request"]

# Bits of an action bitmask: int32 inputs.
MAX_ACTION_BITS = 30


def _require_fields(config: Any) -> None:
    """Check the fields whose annotation tells their type, names among them."""
    require_choices(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "str":
            require(isinstance(value, str), f"{field.name} is {value!r}; it must be a string")


@dataclasses.dataclass(frozen=True)
class EmbeddingTable:
    """One id vocabulary: rows 0..num_rows - 1 of embedding_dim numbers."""

    name: str
    num_rows: int
    embedding_dim: int

    def __post_init__(self) -> None:
        _require_fields(self)
        require(self.num_rows >= 1, f"table {self.name} has {self.num_rows} rows; it must have at least 1")
        wide = 1 <= self.embedding_dim <= MAX_WIDTH
        require(wide, f"table {self.name} is {self.embedding_dim} wide; it must be 1 to {MAX_WIDTH}")


@dataclasses.dataclass(frozen=True)
class SequenceFeature:
    """An id that history events and candidates both have, under two names, looked up in one table."""

    history: str
    candidate: str
    table: str

    def __post_init__(self) -> None:
        _require_fields(self)


@dataclasses.dataclass(frozen=True)
class ContextualFeature:
    """Ids of the user that become the first `max_length` tokens of the sequence.

    Attributes:
        name: of the input, [B * max_length].
        table: the vocabulary.
        max_length: tokens, >= 1.
        min_history_len: shorter sequences get the token of an absent id; 0 is off.
    """

    name: str
    table: str
    max_length: int
    min_history_len: int

    def __post_init__(self) -> None:
        _require_fields(self)
        require(self.max_length >= 1, f"contextual feature {self.name} has max_length {self.max_length}; at least 1")
        require(self.min_history_len >= 0, f"min_history_len of {self.name} is {self.min_history_len}; at least 0")


@dataclasses.dataclass(frozen=True)
class ItemFeature:
    """An id of a candidate that the item tower reads."""

    name: str
    table: str

    def __post_init__(self) -> None:
        _require_fields(self)


@dataclasses.dataclass(frozen=True)
class RankingTask:
    """One prediction per candidate: a probability ("binary") or a value ("regression")."""

    name: str
    kind: TaskKind

    def __post_init__(self) -> None:
        _require_fields(self)


def _each(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Parse a JSON list to a tuple, item by item."""

    def parse_all(values: Any) -> tuple[Any, ...]:
        require(isinstance(values, (list, tuple)), f"expected a list, got {type(values).__name__}")
        return tuple(parse(value) for value in values)

    return parse_all


def _record(cls: type[Any]) -> Callable[[Any], Any]:
    return lambda values: from_mapping(cls, values)


@dataclasses.dataclass(frozen=True)
class RankingConfig:
    """A ranking model: contextual tokens, history and candidates in one sequence; one row of predictions a candidate.

    Attributes:
        dialect: checkpoint family the weights came from.
        num_layers: HSTU layers.
        layer: configuration of every layer; its attention's max_seq_len is contextual + history + candidates.
        tables: vocabularies.
        sequence_features: the id that names an event first, then those added to it.
        contextual_features: in token order.
        item_features: what the item tower reads, in order.
        history_time_feature: name of the history's timestamps, seconds.
        candidate_time_feature: name of the candidates' query times, seconds.
        action_feature: name of the history's action bitmasks; "" without actions.
        action_weights: bits (or unions of bits) that stand for one action each; empty without actions.
        action_embedding_dim: width of one action's embedding.
        hidden_dim: hidden width of the preprocessor's MLPs.
        tower_hidden_dim: hidden width of the item tower and of the prediction head.
        num_positions: rows of the position table; positions count backwards from the first candidate.
        num_time_buckets: last row of the time table.
        time_bucket_fn: bucket of a time distance in minutes: its square root or its natural logarithm.
        time_bucket_clamp: largest bucket: that of the table, or embedding_dim - 1 (what Meta's PyTorch path does).
        postprocessor: what is done with a candidate's row behind the last layer.
        time_feature_precision: "float32" rounds a timestamp to float32 before its hour is taken, as training did.
        tasks: binary tasks first.
        max_history_len: most history events of a user.
        max_candidates: most candidates of a user in one packed forward.
        scaling: "fixed" divides by layer.attention.scaling_seq_len; "batch" by the longest possible sequence of the
            batch, max history + max candidates + contextual tokens: then a score depends on the batch, as in training.
        min_history_counts: whether min_history_len is compared with the history, or with history and candidates.
        external_embeddings: inputs are embedding rows instead of ids; the graph holds no table.
    """

    dialect: str
    num_layers: int
    layer: LayerConfig
    tables: tuple[EmbeddingTable, ...]
    sequence_features: tuple[SequenceFeature, ...]
    contextual_features: tuple[ContextualFeature, ...]
    item_features: tuple[ItemFeature, ...]
    history_time_feature: str
    candidate_time_feature: str
    action_feature: str
    action_weights: tuple[int, ...]
    action_embedding_dim: int
    hidden_dim: int
    tower_hidden_dim: int
    num_positions: int
    num_time_buckets: int
    time_bucket_fn: TimeBucketFn
    time_bucket_clamp: TimeBucketClamp
    postprocessor: RankingPostprocessor
    time_feature_precision: TimeFeaturePrecision
    tasks: tuple[RankingTask, ...]
    max_history_len: int
    max_candidates: int
    scaling: ScalingSeqLen
    min_history_counts: MinHistoryCounts
    external_embeddings: bool = False

    def __post_init__(self) -> None:
        _require_fields(self)
        for name in (
            *("num_layers", "action_embedding_dim", "hidden_dim", "tower_hidden_dim"),
            *("num_positions", "num_time_buckets", "max_history_len", "max_candidates"),
        ):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, value, most in (
            ("num_time_buckets", self.num_time_buckets, MAX_TIME_BUCKETS),
            ("action_embedding_dim", self.action_embedding_dim, MAX_WIDTH),
            ("hidden_dim", self.hidden_dim, MAX_WIDTH),
            ("tower_hidden_dim", self.tower_hidden_dim, MAX_WIDTH),
        ):
            require(value <= most, f"{name} is {value}; it must be at most {most}")
        require(len(self.sequence_features) >= 1, "sequence_features is empty; an event needs an id")
        require(len(self.item_features) >= 1, "item_features is empty; a candidate needs an id")
        require(len(self.tasks) >= 1, "tasks is empty; a ranking model predicts at least one")
        kinds = [task.kind for task in self.tasks]
        require(kinds == sorted(kinds), f"tasks are {', '.join(kinds)}; binary tasks come before regression tasks")
        require(len({task.name for task in self.tasks}) == len(self.tasks), "two tasks have one name")
        require(bool(self.action_feature) == bool(self.action_weights), "action_feature and action_weights go together")
        for weight in self.action_weights:
            legal = isinstance(weight, int) and not isinstance(weight, bool) and 1 <= weight < 1 << MAX_ACTION_BITS
            require(legal, f"action weight {weight!r} is not a bitmask of 1 to {MAX_ACTION_BITS} bits")
        self._check_tables()
        self._check_names()
        width = self.contextual_len + self.max_history_len + self.max_candidates
        require(
            self.layer.attention.max_seq_len == width,
            f"the attention's max_seq_len {self.layer.attention.max_seq_len} is not contextual {self.contextual_len} "
            f"+ history {self.max_history_len} + candidates {self.max_candidates}",
        )
        attention = self.layer.attention
        require(
            not attention.pos_table_len and attention.time_bias == "none",
            "relative bias tables are those of retrieval models; a ranking model adds positions and times to its input",
        )
        require(attention.contextual_seq_len == 0, "contextual tokens of a ranking model attend causally")
        require(attention.target_group_size == 1, "candidates of a ranking model do not see each other")

    def _check_tables(self) -> None:
        dims = {table.name: table.embedding_dim for table in self.tables}
        require(len(dims) == len(self.tables), "two tables have one name")
        used = [feature.table for feature in self.sequence_features]
        used += [feature.table for feature in self.item_features]
        used += [feature.table for feature in self.contextual_features]
        for name in used:
            require(name in dims, f"there is no table {name!r}; tables: {', '.join(dims)}")
        widths = {dims[name] for name in used}
        require(len(widths) == 1, f"tables are {sorted(widths)} wide; the model adds and joins rows of one width")
        tables = {feature.candidate: feature.table for feature in self.sequence_features}
        for item in self.item_features:
            require(tables.get(item.name, item.table) == item.table, f"{item.name} is looked up in two tables")

    def _check_names(self) -> None:
        names = [*self.history_features, *self.contextual_names, *self.candidate_features]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"two inputs are named {', '.join(twice)}")
        require(all(names), "an input has an empty name")
        taken = sorted(name for name in names if is_reserved(name))
        require(not taken, f"{', '.join(taken)} cannot name a feature: it is an input or output of every graph")

    @property
    def table_dim(self) -> int:
        """Width of the embedding tables."""
        return next(t.embedding_dim for t in self.tables if t.name == self.sequence_features[0].table)

    @property
    def contextual_len(self) -> int:
        """Contextual tokens C in front of every history."""
        return sum(feature.max_length for feature in self.contextual_features)

    @property
    def contextual_names(self) -> tuple[str, ...]:
        """Names of the contextual inputs, in token order."""
        return tuple(feature.name for feature in self.contextual_features)

    @property
    def history_ids(self) -> dict[str, str]:
        """Id features of history events: name to table."""
        return {feature.history: feature.table for feature in self.sequence_features}

    @property
    def candidate_ids(self) -> dict[str, str]:
        """Id features of candidates: name to table."""
        tables = {feature.candidate: feature.table for feature in self.sequence_features}
        return tables | {feature.name: feature.table for feature in self.item_features}

    @property
    def history_features(self) -> tuple[str, ...]:
        """Names of the inputs with one value per history event."""
        action = (self.action_feature,) if self.action_feature else ()
        return (*self.history_ids, self.history_time_feature, *action)

    @property
    def candidate_features(self) -> tuple[str, ...]:
        """Names of the inputs with one value per candidate."""
        return (*self.candidate_ids, self.candidate_time_feature)

    @property
    def largest_time_bucket(self) -> int:
        """Where time buckets are clamped."""
        if self.time_bucket_clamp == "table":
            return self.num_time_buckets
        return min(self.layer.embedding_dim - 1, self.num_time_buckets)

    @property
    def counts_candidates(self) -> bool:
        """Whether the contextual tokens of a user depend on the number of candidates."""
        limits = any(feature.min_history_len for feature in self.contextual_features)
        return limits and self.min_history_counts == "history_and_candidates"

    @property
    def cache_rule(self) -> CacheRule:
        """When keys and values of a history may be used again.

        Positions count backwards from the candidates and times from the query: every row changes when either moves, so
        only the same history asked at the same time has the same rows.
        """
        return "request"

    @property
    def max_seq_len(self) -> int:
        """Longest history in events."""
        return self.max_history_len

    def with_limits(self, max_history_len: int, max_candidates: int) -> RankingConfig:
        """The same model with other bounds. Divisor and tables stay."""
        width = self.contextual_len + max_history_len + max_candidates
        layer = dataclasses.replace(self.layer, attention=dataclasses.replace(self.layer.attention, max_seq_len=width))
        return dataclasses.replace(self, layer=layer, max_history_len=max_history_len, max_candidates=max_candidates)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RankingConfig:
        """Parse the JSON form. Raises ValueError naming every unknown or missing field."""
        return from_mapping(
            cls,
            values,
            {
                "layer": LayerConfig.from_dict,
                "tables": _each(_record(EmbeddingTable)),
                "sequence_features": _each(_record(SequenceFeature)),
                "contextual_features": _each(_record(ContextualFeature)),
                "item_features": _each(_record(ItemFeature)),
                "tasks": _each(_record(RankingTask)),
                "action_weights": _each(lambda value: value),
            },
        )
