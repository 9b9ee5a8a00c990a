"""What a checkpoint does not say about itself: every semantic switch of the HSTU families, explicit and validated.

Level 1. The families differ in small ways that change every number (which of u, v, q, k pass through SiLU, where the
divisor comes from, which timestamp a row uses); each way is a field here, none is a default of the code that reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from hstu_compile.model._validation import MAX_TIME_BUCKETS, MAX_WIDTH, from_mapping, require, require_choices

SiluScope = Literal["uvqk", "u", "none"]
TimeBias = Literal["none", "next", "own"]
OutputConcat = Literal["gated", "u_norm_gated", "u_attn_gated"]
NormKind = Literal["layer", "group"]
Preprocessor = Literal["positional", "rated"]
Postprocessor = Literal["l2_norm", "layer_norm"]
HourEncoding = Literal["none", "additive"]
RetrievalCacheRule = Literal["request", "prefix"]

MAX_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Semantics of one attention op (the unified op of all families).

    Attributes:
        num_heads: heads H.
        attention_dim: q and k width of one head, 1..256.
        linear_dim: u and v width of one head, 1..256.
        alpha: multiplier of <q, k> before bias and SiLU (research 1.0, DLRM 1/sqrt(attention_dim)).
        scaling_seq_len: divisor after SiLU. A model constant: never read from a padded shape or a batch.
        max_seq_len: longest sequence, in rows.
        pos_table_len: N of the relative position table of 2N - 1 entries; 0 means no position bias.
        time_bias: timestamp on the query side: the next event's (research), its own (genrec), or no time bias.
        num_time_buckets: last bucket index; the time table has num_time_buckets + 1 entries. 0 without time bias.
        time_bucket_divisor: divisor of ln(|dt|) (research 0.301, genrec 0.693). 1.0 without time bias.
        bias_per_head: each head has its own tables instead of one shared by all.
        target_group_size: targets of one group see each other causally.
        contextual_seq_len: prefix rows that see the whole history; 0 is off.
        max_attn_len: local window in positions; 0 is off.
        min_full_attn_seq_len: last positions exempt from the window.
    """

    num_heads: int
    attention_dim: int
    linear_dim: int
    alpha: float
    scaling_seq_len: float
    max_seq_len: int
    pos_table_len: int = 0
    time_bias: TimeBias = "none"
    num_time_buckets: int = 0
    time_bucket_divisor: float = 1.0
    bias_per_head: bool = False
    target_group_size: int = 1
    contextual_seq_len: int = 0
    max_attn_len: int = 0
    min_full_attn_seq_len: int = 0

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.num_heads >= 1, f"num_heads is {self.num_heads}; it must be at least 1")
        require(self.num_heads <= MAX_WIDTH, f"num_heads is {self.num_heads}; it must be at most {MAX_WIDTH}")
        for name in ("attention_dim", "linear_dim"):
            value = getattr(self, name)
            require(1 <= value <= MAX_HEAD_DIM, f"{name} is {value}; allowed: 1 to {MAX_HEAD_DIM}")
        require(self.scaling_seq_len > 0, f"scaling_seq_len is {self.scaling_seq_len}; it must be greater than 0")
        require(self.max_seq_len >= 1, f"max_seq_len is {self.max_seq_len}; it must be at least 1")
        require(self.pos_table_len >= 0, f"pos_table_len is {self.pos_table_len}; it must not be negative")
        if self.pos_table_len:
            require(
                self.max_seq_len <= self.pos_table_len,
                f"max_seq_len {self.max_seq_len} exceeds pos_table_len {self.pos_table_len}: "
                "positions beyond the table have no bias",
            )
        require(
            self.num_time_buckets <= MAX_TIME_BUCKETS,
            f"num_time_buckets is {self.num_time_buckets}; it must be at most {MAX_TIME_BUCKETS}",
        )
        has_time = self.time_bias != "none"
        require(
            (self.num_time_buckets > 0) == has_time,
            f"num_time_buckets is {self.num_time_buckets} with time_bias {self.time_bias!r}",
        )
        require(self.time_bucket_divisor > 0, f"time_bucket_divisor is {self.time_bucket_divisor}; it must be > 0")
        require(self.target_group_size >= 1, f"target_group_size is {self.target_group_size}; it must be at least 1")
        for name in ("contextual_seq_len", "max_attn_len", "min_full_attn_seq_len"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttentionConfig:
        """Parse the JSON form. Raises ValueError naming every unknown or missing field."""
        return from_mapping(cls, values)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One HSTU layer: LN, uvqk projection, SiLU, attention, gated output projection, residual.

    Attributes:
        embedding_dim: width D of the residual stream.
        attention: the attention op.
        silu_scope: which of u, v, q, k pass through SiLU.
        uvqk_bias: the uvqk projection has a bias.
        input_norm: apply LN before the projection (genrec does not).
        input_norm_affine: that LN has weight and bias.
        output_norm: LN over all heads together, or per head with one weight per head ("group"). Both are the
            same of a single head: LN with one weight per column.
        output_norm_affine: that LN has weight and bias.
        norm_eps: epsilon of both.
        output_concat: "gated" u * n; "u_norm_gated" [u, n, u * n]; "u_attn_gated" [u, a, u * n] (a raw, n = norm(a)).
        output_projection: project back to D (genrec adds u * n directly).
        output_bias: that projection has a bias.
    """

    embedding_dim: int
    attention: AttentionConfig
    silu_scope: SiluScope
    uvqk_bias: bool
    input_norm: bool
    input_norm_affine: bool
    output_norm: NormKind
    output_norm_affine: bool
    norm_eps: float
    output_concat: OutputConcat
    output_projection: bool
    output_bias: bool

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.embedding_dim >= 1, f"embedding_dim is {self.embedding_dim}; it must be at least 1")
        require(
            self.embedding_dim <= MAX_WIDTH, f"embedding_dim is {self.embedding_dim}; it must be at most {MAX_WIDTH}"
        )
        require(self.norm_eps > 0, f"norm_eps is {self.norm_eps}; it must be greater than 0")
        if not self.output_projection:
            width = self.attention.num_heads * self.attention.linear_dim
            require(
                self.output_concat == "gated" and width == self.embedding_dim,
                f"without an output projection the gated output ({width} wide, {self.output_concat}) "
                f"must be as wide as embedding_dim {self.embedding_dim}",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerConfig:
        """Parse the JSON form. Raises ValueError naming every unknown or missing field."""
        return from_mapping(cls, values, {"attention": AttentionConfig.from_dict})


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """A next-item retrieval model: item table, input features, HSTU layers, normalised user embedding, dot product.

    Attributes:
        dialect: checkpoint family the weights came from.
        num_items: items 1..num_items; row 0 of the table is padding.
        num_layers: HSTU layers.
        layer: configuration of every layer.
        preprocessor: "positional" item embedding, or "rated" item embedding joined with a rating embedding.
        item_embedding_dim: width of the item table (embedding_dim, less the rating part when rated).
        num_ratings: rows of the rating table; 0 unless rated.
        num_positions: rows of the learned position table; 0 means no learned positions.
        hour_encoding: add the sinusoid of the UTC hour of day to each token.
        postprocessor: user embedding normalisation.
        postprocessor_eps: its epsilon.
        item_l2_norm: items are L2-normalised before the dot product.
    """

    dialect: str
    num_items: int
    num_layers: int
    layer: LayerConfig
    preprocessor: Preprocessor
    item_embedding_dim: int
    num_ratings: int
    num_positions: int
    hour_encoding: HourEncoding
    postprocessor: Postprocessor
    postprocessor_eps: float
    item_l2_norm: bool

    def __post_init__(self) -> None:
        require_choices(self)
        require(isinstance(self.dialect, str), f"dialect is {self.dialect!r}; it must be a string")
        require(self.num_items >= 1, f"num_items is {self.num_items}; it must be at least 1")
        require(self.num_layers >= 1, f"num_layers is {self.num_layers}; it must be at least 1")
        require(self.postprocessor_eps > 0, f"postprocessor_eps is {self.postprocessor_eps}; it must be > 0")
        rating_dim = self.layer.embedding_dim - self.item_embedding_dim
        if self.preprocessor == "rated":
            require(self.num_ratings >= 1, f"num_ratings is {self.num_ratings}; a rated model needs at least 1")
            require(rating_dim >= 1, f"item_embedding_dim {self.item_embedding_dim} leaves no room for ratings")
        else:
            require(self.num_ratings == 0, f"num_ratings is {self.num_ratings}; only a rated model has ratings")
            require(rating_dim == 0, f"item_embedding_dim {self.item_embedding_dim} must equal embedding_dim")
        if self.num_positions:
            require(
                self.num_positions >= self.max_seq_len,
                f"max_seq_len {self.max_seq_len} exceeds the {self.num_positions} learned positions",
            )
        if self.hour_encoding == "additive":
            require(self.layer.embedding_dim % 2 == 0, "hour encoding needs an even embedding_dim")

    @property
    def max_seq_len(self) -> int:
        """Longest history in events."""
        return self.layer.attention.max_seq_len

    @property
    def has_ratings(self) -> bool:
        """Whether requests carry a rating per event."""
        return self.preprocessor == "rated"

    @property
    def has_time_bias(self) -> bool:
        """Whether attention reads the time between events."""
        return self.layer.attention.time_bias != "none"

    @property
    def later_rows_matter(self) -> str | None:
        """Why an event's keys and values depend on events behind the next one; None where they do not."""
        attention = self.layer.attention
        if attention.contextual_seq_len:
            return f"the first {attention.contextual_seq_len} rows see the whole history"
        if attention.max_attn_len and attention.min_full_attn_seq_len:
            return f"the last {attention.min_full_attn_seq_len} rows of a history see beyond the window"
        return None

    @property
    def cache_rule(self) -> RetrievalCacheRule:
        """What a history's keys and values may be used for, whatever is asked when.

        "prefix": any history that begins with the same events. Attention is causal, positions count from the oldest
        event, and a row knows no later time than the next event's; so all rows but the last stay as they are when
        events are added. The last row saw the request's time in place of the next event's: from the second layer on
        its keys and values are computed again. Dropping the oldest event moves every position: nothing stays.
        "request": the same history alone, because of `later_rows_matter`.
        """
        return "prefix" if self.later_rows_matter is None else "request"

    def with_max_seq_len(self, max_seq_len: int) -> RetrievalConfig:
        """The same model limited to shorter histories. The divisor and the tables stay: only bounds change."""
        attention = dataclasses.replace(self.layer.attention, max_seq_len=max_seq_len)
        return dataclasses.replace(self, layer=dataclasses.replace(self.layer, attention=attention))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RetrievalConfig:
        """Parse the JSON form. Raises ValueError naming every unknown or missing field."""
        return from_mapping(cls, values, {"layer": LayerConfig.from_dict})
