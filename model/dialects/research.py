"""Meta's research HSTU: research/modeling/sequential/hstu.py of generative-recommenders, read at commit db1bf8f.

SiLU on all of u, v, q, k; no 1/sqrt(d); divisor and tables sized by N = max_sequence_len + max_output_len; relative
bias from positions and from the next event's timestamp; norms without parameters. The number of heads is in no shape.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from hstu_compile.model.config import AttentionConfig, LayerConfig, RetrievalConfig
from hstu_compile.model.dialects._base import Dialect, DialectError, Shapes, SourceTensor
from hstu_compile.model.dialects._user_config import UserConfig
from hstu_compile.model.families import ModelConfig

ITEM_KEY = "_embedding_module._item_emb.weight"
POSITION_KEY = "_input_features_preproc._pos_emb.weight"
RATING_KEY = "_input_features_preproc._rating_emb.weight"
LAYER_KEY = "_hstu._attention_layers.{}."
LAYER_PATTERN = re.compile(r"_hstu\._attention_layers\.(\d+)\.")

TIME_BUCKET_DIVISOR = 0.301
NORM_EPS = 1e-6

_PREPROCESSORS = {
    "LearnablePositionalEmbeddingInputFeaturesPreprocessor": "positional",
    "LearnablePositionalEmbeddingRatedInputFeaturesPreprocessor": "rated",
}
_POSTPROCESSORS = {
    "l2_norm": "l2_norm",
    "L2NormEmbeddingPostprocessor": "l2_norm",
    "layer_norm": "layer_norm",
    "LayerNormEmbeddingPostprocessor": "layer_norm",
}
_ACTIVATIONS = {"silu": "uvqk", "none": "none"}
_NORMALIZATIONS = ("rel_bias", "hstu_rel_bias")

_FIELDS = (
    "attention_dim",
    "concat_ua",
    "embedding_dim",
    "hour_encoding",
    "item_l2_norm",
    "linear_activation",
    "linear_dim",
    "max_output_len",
    "max_sequence_len",
    "normalization",
    "num_blocks",
    "num_buckets",
    "num_heads",
    "num_items",
    "postprocessor",
    "preprocessor",
)


def _transposed(key: str) -> SourceTensor:
    return SourceTensor(key, lambda tensor: tensor.t().contiguous(), lambda shape: shape[::-1])


def _as_row(key: str) -> SourceTensor:
    return SourceTensor(key, lambda tensor: tensor.unsqueeze(0), lambda shape: shape[1:])


class _Research(Dialect):
    name = "research"

    def matches(self, keys: Collection[str]) -> bool:
        return any(LAYER_PATTERN.match(key) for key in keys)

    def is_ignored(self, key: str) -> bool:
        return key == "_attn_mask"

    def config(self, shapes: Shapes, config: Mapping[str, Any] | None) -> RetrievalConfig:
        user = UserConfig(config or {}, _FIELDS)
        user.choice("normalization", dict.fromkeys(_NORMALIZATIONS, "rel_bias"), "rel_bias")
        first = LAYER_KEY.format(0)
        required = (ITEM_KEY, POSITION_KEY, first + "_uvqk", first + "_o.weight")
        if lacking := [key for key in required if key not in shapes]:
            raise DialectError(
                "keys", f"the checkpoint lacks {', '.join(lacking)}", "pass the whole model's state_dict"
            )
        tables = (first + "_rel_attn_bias._pos_w", first + "_rel_attn_bias._ts_w")
        ranks = {**dict.fromkeys((*required, RATING_KEY, "_attn_mask"), 2), **dict.fromkeys(tables, 1)}
        for key, rank in ranks.items():
            if key in shapes and len(shapes[key]) != rank:
                raise DialectError(
                    "shape", f"{key} has shape {list(shapes[key])}; it must have {rank} dimensions", "check the file"
                )
        num_layers = 1 + max(int(m[1]) for key in shapes if (m := LAYER_PATTERN.match(key)))
        if num_layers > len(shapes):
            raise DialectError(
                "keys",
                f"the checkpoint has a layer {num_layers - 1} and only {len(shapes)} tensors",
                "pass the whole model's state_dict",
            )
        embedding_dim, packed = shapes[first + "_uvqk"]
        attention = self._attention(shapes, user, first, packed)
        rated = RATING_KEY in shapes
        num_rows, item_dim = shapes[ITEM_KEY]
        preprocessor = user.choice("preprocessor", _PREPROCESSORS, list(_PREPROCESSORS)[1 if rated else 0])
        if (preprocessor == "rated") != rated:
            raise DialectError(
                "shape",
                f"preprocessor is {preprocessor} but the checkpoint has {'a' if rated else 'no'} rating table",
                "correct 'preprocessor' in the configuration",
            )
        rating_dim = shapes[RATING_KEY][1] if rated else 0
        if item_dim + rating_dim != embedding_dim:
            raise DialectError(
                "shape",
                f"item embeddings are {item_dim} wide and rating embeddings {rating_dim}, together not the "
                f"{embedding_dim} "
                f"that {first}_uvqk takes (interleaved items and ratings are not supported)",
                "use a checkpoint of the positional or the rated preprocessor",
            )
        for name, seen in (
            ("num_blocks", num_layers),
            ("embedding_dim", embedding_dim),
            ("num_items", num_rows - 1),
            ("num_buckets", attention.num_time_buckets or None),
        ):
            stated = user.integer(name)
            if stated is not None and seen is not None and stated != seen:
                raise DialectError(
                    "shape",
                    f"the configuration says {name} = {stated}, the checkpoint's shapes say {seen}",
                    f"correct {name}, or pass the configuration of this checkpoint",
                )
        concat_ua = user.flag("concat_ua", False)
        hour_encoding = user.choice("hour_encoding", {"none": "none", "additive": "additive"}, "none")
        silu_scope = user.choice("linear_activation", _ACTIVATIONS, "silu")
        postprocessor = user.choice("postprocessor", _POSTPROCESSORS, "l2_norm")
        item_l2_norm = user.flag("item_l2_norm", True)
        try:
            return RetrievalConfig(
                dialect=self.name,
                num_items=num_rows - 1,
                num_layers=num_layers,
                layer=LayerConfig(
                    embedding_dim=embedding_dim,
                    attention=attention,
                    silu_scope=silu_scope,  # type: ignore[arg-type]
                    uvqk_bias=False,
                    input_norm=True,
                    input_norm_affine=False,
                    output_norm="layer",
                    output_norm_affine=False,
                    norm_eps=NORM_EPS,
                    output_concat="u_norm_gated" if concat_ua else "gated",
                    output_projection=True,
                    output_bias=first + "_o.bias" in shapes,
                ),
                preprocessor=preprocessor,  # type: ignore[arg-type]
                item_embedding_dim=item_dim,
                num_ratings=shapes[RATING_KEY][0] if rated else 0,
                num_positions=shapes[POSITION_KEY][0],
                hour_encoding=hour_encoding,  # type: ignore[arg-type]
                postprocessor=postprocessor,  # type: ignore[arg-type]
                postprocessor_eps=NORM_EPS,
                item_l2_norm=item_l2_norm,
            )
        except ValueError as error:
            raise DialectError("shape", str(error), "pass the configuration of this checkpoint") from error

    def _attention(self, shapes: Shapes, user: UserConfig, first: str, packed: int) -> AttentionConfig:
        output_in = shapes[first + "_o.weight"][1]
        num_heads = user.integer("num_heads")
        if num_heads == 0:
            raise DialectError("config", "num_heads is 0; it must be at least 1", "correct num_heads")
        if num_heads is None:
            raise DialectError(
                "heads",
                f"the number of heads is in no tensor's shape: {first}_uvqk holds {packed} columns whatever it is",
                'pass --config FILE with the training configuration, at least {"num_heads": 1}',
            )
        parts = 3 if user.flag("concat_ua", False) else 1
        linear_dim, attention_dim = user.integer("linear_dim"), user.integer("attention_dim")
        if linear_dim is None:
            linear_dim = output_in // parts // num_heads
        if attention_dim is None:
            attention_dim = packed // 2 // num_heads - linear_dim
        if 2 * num_heads * (linear_dim + attention_dim) != packed or parts * num_heads * linear_dim != output_in:
            raise DialectError(
                "shape",
                f"num_heads {num_heads}, linear_dim {linear_dim}, attention_dim {attention_dim}, concat_ua "
                f"{str(parts == 3).lower()} need _uvqk with {2 * num_heads * (linear_dim + attention_dim)} "
                f"columns and _o with "
                f"{parts * num_heads * linear_dim} inputs; the checkpoint has {packed} and {output_in}",
                "correct num_heads, linear_dim, attention_dim or concat_ua in the configuration",
            )
        pos_shape = shapes.get(first + "_rel_attn_bias._pos_w")
        ts_shape = shapes.get(first + "_rel_attn_bias._ts_w")
        if pos_shape is not None and pos_shape[0] % 2 == 0:
            raise DialectError(
                "shape", f"{first}_rel_attn_bias._pos_w has {pos_shape[0]} entries; 2N - 1 is odd", "check the file"
            )
        table_len = (pos_shape[0] + 1) // 2 if pos_shape is not None else 0
        seq_len = table_len or shapes.get("_attn_mask", shapes[POSITION_KEY])[0]
        stated = (user.integer("max_sequence_len"), user.integer("max_output_len"))
        if stated[0] is not None and stated[1] is not None and sum(stated) != seq_len:  # type: ignore[arg-type]
            raise DialectError(
                "shape",
                f"max_sequence_len {stated[0]} + max_output_len {stated[1]} is not the N = {seq_len} of the tables",
                "correct them: N is the divisor of the attention and must be the one of training",
            )
        # One of them alone is a part of N: histories of at least one event, and what may be no output at all.
        limits = ("max_sequence_len", seq_len), ("max_output_len", seq_len - 1)
        for value, (name, most) in zip(stated, limits, strict=True):
            if value is not None and value > most:
                raise DialectError(
                    "shape",
                    f"{name} is {value}, and the tables' N = max_sequence_len + max_output_len is {seq_len}",
                    f"correct {name}, or pass the configuration of this checkpoint",
                )
        try:
            return AttentionConfig(
                num_heads=num_heads,
                attention_dim=attention_dim,
                linear_dim=linear_dim,
                alpha=1.0,
                scaling_seq_len=float(seq_len),
                max_seq_len=min(seq_len, shapes[POSITION_KEY][0]),
                pos_table_len=table_len,
                time_bias="next" if ts_shape is not None else "none",
                num_time_buckets=ts_shape[0] - 1 if ts_shape is not None else 0,
                time_bucket_divisor=TIME_BUCKET_DIVISOR if ts_shape is not None else 1.0,
            )
        except ValueError as error:
            raise DialectError("shape", str(error), "pass the configuration of this checkpoint") from error

    def sources(self, config: ModelConfig) -> dict[str, SourceTensor]:
        assert isinstance(config, RetrievalConfig)
        sources = {
            "item_embedding.weight": SourceTensor(ITEM_KEY),
            "position_embedding.weight": SourceTensor(POSITION_KEY),
        }
        if config.has_ratings:
            sources["rating_embedding.weight"] = SourceTensor(RATING_KEY)
        for index in range(config.num_layers):
            ours, theirs = f"layers.{index}.", LAYER_KEY.format(index)
            sources[ours + "uvqk_weight"] = SourceTensor(theirs + "_uvqk")
            sources[ours + "output_weight"] = _transposed(theirs + "_o.weight")
            if config.layer.output_bias:
                sources[ours + "output_bias"] = SourceTensor(theirs + "_o.bias")
            if config.layer.attention.pos_table_len:
                sources[ours + "pos_table"] = _as_row(theirs + "_rel_attn_bias._pos_w")
            if config.layer.attention.time_bias != "none":
                sources[ours + "ts_table"] = _as_row(theirs + "_rel_attn_bias._ts_w")
        return sources


RESEARCH = _Research()
