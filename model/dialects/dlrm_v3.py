"""Meta's DLRM-HSTU: modules/dlrm_hstu.py of generative-recommenders, read at commit db1bf8f; DLRMv3 of MLPerf is one.

SiLU on u alone; 1/sqrt(d); no relative bias; divisor from the batch; [u | attention | gated] into the output
projection; positions counted backwards from the candidates. Almost nothing of this is in a shape: the configuration
is the DlrmHSTUConfig of the training run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from hstu_compile.model._validation import MAX_LENGTH
from hstu_compile.model.config import AttentionConfig, LayerConfig
from hstu_compile.model.dialects._base import Dialect, DialectError, Shapes, SourceTensor
from hstu_compile.model.dialects._user_config import UserConfig
from hstu_compile.model.families import ModelConfig
from hstu_compile.model.ranking_config import (
    ContextualFeature,
    EmbeddingTable,
    ItemFeature,
    RankingConfig,
    RankingTask,
    SequenceFeature,
)
from hstu_compile.model.time_features import PERIODS

TABLE_KEY = "_embedding_collection.embeddings.{}.weight"
TABLE_PATTERN = re.compile(r"_embedding_collection\.embeddings\.(.+)\.weight$")
LAYER_KEY = "_hstu_transducer._stu_module._stu_layers.{}."
LAYER_PATTERN = re.compile(r"_hstu_transducer\._stu_module\._stu_layers\.(\d+)\.")
PREPROCESSOR_KEY = "_hstu_transducer._input_preprocessor."
ACTION_KEY = PREPROCESSOR_KEY + "_action_encoder."
ADDITIONAL_KEY = PREPROCESSOR_KEY + "_additional_embedding_mlp."
POSITION_KEY = "_hstu_transducer._positional_encoder._position_embeddings_weight"
TIME_KEY = "_hstu_transducer._positional_encoder._timestamp_embeddings_weight"
POSTPROCESSOR_KEY = "_hstu_transducer._output_postprocessor."
ITEM_KEY = "_item_embedding_mlp."
HEAD_KEY = "_multitask_module._prediction_module."

NORM_EPS = 1e-6
ACTION_EMBEDDING_DIM = 8

# Where a configuration file may keep the DlrmHSTUConfig.
_CONFIG_KEY = "dlrm_hstu_config"
_FIELDS = (
    "action_weights",
    "candidates_querytime_feature_name",
    "contextual_feature_to_max_length",
    "contextual_feature_to_min_uih_length",
    "embedding_tables",
    "enable_postprocessor",
    "external_embeddings",
    "hstu_attn_linear_dim",
    "hstu_attn_num_layers",
    "hstu_attn_qk_dim",
    "hstu_embedding_table_dim",
    "hstu_group_norm",
    "hstu_num_heads",
    "hstu_preprocessor_hidden_dim",
    "hstu_transducer_embedding_dim",
    "item_embedding_feature_names",
    "max_num_candidates",
    "max_num_candidates_inference",
    "max_seq_len",
    "merge_uih_candidate_feature_mapping",
    "min_history_counts",
    "multitask_configs",
    "scaling_seq_len",
    "time_bucket_clamp",
    "time_bucket_fn",
    "time_feature_precision",
    "uih_action_time_feature_name",
    "uih_post_id_feature_name",
    "uih_weight_feature_name",
    "use_layer_norm_postprocessor",
    "user_embedding_feature_names",
)
# Fields of DlrmHSTUConfig that say something about training, or that follow from others.
_TRAINING_FIELDS = (
    "action_embedding_init_std",
    "candidates_watchtime_feature_name",
    "candidates_weight_feature_name",
    "causal_multitask_weights",
    "hstu_candidate_feature_names",
    "hstu_input_dropout_ratio",
    "hstu_linear_dropout_rate",
    "hstu_uih_feature_names",
)
_TASK_KINDS = {"BINARY_CLASSIFICATION": "binary", "REGRESSION": "regression", 0: "binary", 1: "regression"}


def _is_table_shape(shape: Any) -> bool:
    return (
        isinstance(shape, (list, tuple))
        and len(shape) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MAX_LENGTH for size in shape)
    )


def _transposed(key: str) -> SourceTensor:
    return SourceTensor(key, lambda tensor: tensor.t().contiguous(), lambda shape: shape[::-1])


def _slice_of(key: str, index: int, count: int) -> SourceTensor:
    """One of `count` tensors that the checkpoint keeps in one."""
    return SourceTensor(key, lambda tensor: tensor[index], lambda shape: (count, *shape))


def _spread(key: str, width: int) -> SourceTensor:
    """The one number that a group norm of a single head has, for each of its columns: ours is a layer norm then."""
    return SourceTensor(key, lambda tensor: tensor.expand(width), lambda shape: (1,))


def _mlp_sources(ours: str, theirs: str, *, final_norm: bool) -> dict[str, SourceTensor]:
    """The four modules of one of the original's nn.Sequential MLPs."""
    sources = {
        f"{ours}.hidden.weight": _transposed(f"{theirs}0.weight"),
        f"{ours}.hidden.bias": SourceTensor(f"{theirs}0.bias"),
        f"{ours}.hidden_norm.weight": SourceTensor(f"{theirs}1.weight"),
        f"{ours}.hidden_norm.bias": SourceTensor(f"{theirs}1.bias"),
        f"{ours}.output.weight": _transposed(f"{theirs}2.weight"),
        f"{ours}.output.bias": SourceTensor(f"{theirs}2.bias"),
    }
    if final_norm:
        sources[f"{ours}.output_norm.weight"] = SourceTensor(f"{theirs}3.weight")
        sources[f"{ours}.output_norm.bias"] = SourceTensor(f"{theirs}3.bias")
    return sources


class _DlrmV3(Dialect):
    name = "dlrm_v3"

    def matches(self, keys: Collection[str]) -> bool:
        return any(LAYER_PATTERN.match(key) for key in keys)

    def is_ignored(self, key: str) -> bool:
        # The additional MLP is built by the original whether it has inputs or not; `config` compares its inputs with
        # the features. Tables stay behind where the graph takes rows. The buffers are `constants`.
        return (
            key.startswith(ADDITIONAL_KEY)
            or TABLE_PATTERN.match(key) is not None
            or key
            in (
                ACTION_KEY + "_combined_action_weights",
                POSTPROCESSOR_KEY + "_period_units",
                POSTPROCESSOR_KEY + "_units_per_period",
            )
        )

    def with_external_embeddings(self, config: Mapping[str, Any] | None) -> Mapping[str, Any]:
        return {**(config or {}), "external_embeddings": True}

    def constants(self, config: ModelConfig) -> dict[str, Tensor]:
        assert isinstance(config, RankingConfig)
        constants = {
            POSTPROCESSOR_KEY + "_period_units": torch.tensor([[float(period) for period, _ in PERIODS]]),
            POSTPROCESSOR_KEY + "_units_per_period": torch.tensor([[float(units) for _, units in PERIODS]]),
        }
        if config.action_weights:
            constants[ACTION_KEY + "_combined_action_weights"] = torch.tensor(config.action_weights)
        return constants

    def config(self, shapes: Shapes, config: Mapping[str, Any] | None) -> RankingConfig:
        if config is None:
            raise DialectError(
                "config",
                "names of features, tasks and the number of heads are in no tensor of a DLRM-HSTU checkpoint",
                f'pass --config FILE with the DlrmHSTUConfig of the training run (or {{"{_CONFIG_KEY}": ...}})',
            )
        if _CONFIG_KEY in config:
            nested = config[_CONFIG_KEY]
            if not isinstance(nested, Mapping):
                raise DialectError(
                    "config",
                    f"{_CONFIG_KEY} is a {type(nested).__name__}; it must be an object",
                    f"pass the DlrmHSTUConfig of the training run under {_CONFIG_KEY}",
                )
            # What lies beside it is ours: switches that the original decides in code, and the tables.
            config = {**nested, **{name: value for name, value in config.items() if name != _CONFIG_KEY}}
        user = UserConfig(config, _FIELDS, _TRAINING_FIELDS)
        self._check_ranks(shapes)
        external = user.flag("external_embeddings", False)
        num_layers = 1 + max(int(match[1]) for key in shapes if (match := LAYER_PATTERN.match(key)))
        if num_layers > len(shapes):
            raise DialectError(
                "keys",
                f"the checkpoint has a layer {num_layers - 1} and only {len(shapes)} tensors",
                "pass the whole model's state_dict",
            )
        width, table_dim = shapes[POSITION_KEY][1], shapes[PREPROCESSOR_KEY + "_content_embedding_mlp.0.weight"][1]
        for name, seen in (
            ("hstu_attn_num_layers", num_layers),
            ("hstu_transducer_embedding_dim", width),
            ("hstu_embedding_table_dim", table_dim),
            ("hstu_preprocessor_hidden_dim", shapes[PREPROCESSOR_KEY + "_content_embedding_mlp.0.weight"][0]),
        ):
            stated = user.integer(name)
            if stated is not None and stated != seen:
                raise DialectError(
                    "shape",
                    f"the configuration says {name} = {stated}, the checkpoint's shapes say {seen}",
                    f"correct {name}, or pass the configuration of this checkpoint",
                )
        merged = self._merged_features(user)
        tables = self._tables(shapes, user, table_dim, external)
        sequence_features, item_features = self._id_features(user, merged, tables)
        self._check_additional(shapes, sequence_features, table_dim)
        contextual = self._contextual(user, tables, merged)
        contextual_len = sum(feature.max_length for feature in contextual)
        max_candidates, max_history = self._limits(user, contextual_len)
        weights = self._action_weights(user)
        scaling = self._scaling(user)
        try:
            max_seq_len = contextual_len + max_history + max_candidates
            return RankingConfig(
                dialect=self.name,
                num_layers=num_layers,
                layer=self._layer(shapes, user, width, max_seq_len, scaling),
                tables=tables,
                sequence_features=sequence_features,
                contextual_features=contextual,
                item_features=item_features,
                history_time_feature=user.text("uih_action_time_feature_name"),
                candidate_time_feature=user.text("candidates_querytime_feature_name"),
                action_feature=user.text("uih_weight_feature_name") if weights else "",
                action_weights=weights,
                action_embedding_dim=ACTION_EMBEDDING_DIM,
                hidden_dim=shapes[PREPROCESSOR_KEY + "_content_embedding_mlp.0.weight"][0],
                tower_hidden_dim=shapes[ITEM_KEY + "0.weight"][0],
                num_positions=shapes[POSITION_KEY][0],
                num_time_buckets=shapes[TIME_KEY][0] - 1,
                time_bucket_fn=user.choice("time_bucket_fn", {"sqrt": "sqrt", "log": "log"}, "sqrt"),  # type: ignore[arg-type]
                time_bucket_clamp=user.choice(  # type: ignore[arg-type]
                    "time_bucket_clamp", {"embedding_dim": "embedding_dim", "table": "table"}, "embedding_dim"
                ),
                postprocessor=self._postprocessor(user),  # type: ignore[arg-type]
                time_feature_precision=user.choice(  # type: ignore[arg-type]
                    "time_feature_precision", {"float32": "float32", "exact": "exact"}, "float32"
                ),
                tasks=self._tasks(user),
                max_history_len=max_history,
                max_candidates=max_candidates,
                scaling="batch" if scaling is None else "fixed",
                min_history_counts=user.choice(  # type: ignore[arg-type]
                    "min_history_counts",
                    {"history_and_candidates": "history_and_candidates", "history": "history"},
                    "history_and_candidates",
                ),
                external_embeddings=external,
            )
        except DialectError:
            raise
        except ValueError as error:
            raise DialectError("config", str(error), "correct the configuration") from error

    def _check_ranks(self, shapes: Shapes) -> None:
        required = {
            POSITION_KEY: 2,
            TIME_KEY: 2,
            LAYER_KEY.format(0) + "_uvqk_weight": 2,
            LAYER_KEY.format(0) + "_output_weight": 2,
            PREPROCESSOR_KEY + "_content_embedding_mlp.0.weight": 2,
            ITEM_KEY + "0.weight": 2,
            HEAD_KEY + "2.weight": 2,
        }
        if lacking := [key for key in required if key not in shapes]:
            raise DialectError(
                "keys", f"the checkpoint lacks {', '.join(lacking)}", "pass the whole model's state_dict"
            )
        for key, shape in shapes.items():
            rank = required.get(key, 2 if TABLE_PATTERN.match(key) else len(shape))
            if len(shape) != rank:
                raise DialectError(
                    "shape", f"{key} has shape {list(shape)}; it must have {rank} dimensions", "check the file"
                )
            if 0 in shape and (key in required or TABLE_PATTERN.match(key)):
                raise DialectError("shape", f"{key} has shape {list(shape)}; it is empty", "check the file")
        if shapes[TIME_KEY][0] < 2:
            raise DialectError(
                "shape", f"{TIME_KEY} has 1 row; it must have one more than time buckets", "check the file"
            )

    def _check_additional(self, shapes: Shapes, sequence_features: tuple[SequenceFeature, ...], table_dim: int) -> None:
        """Refuse a configuration that would leave trained weights of additional features out."""
        names = [feature.history for feature in sequence_features[1:]]
        shape = shapes.get(ADDITIONAL_KEY + "0.weight")
        if shape is not None and shape[1:] != (table_dim * len(names),):
            raise DialectError(
                "shape",
                f"{ADDITIONAL_KEY}0.weight has shape {list(shape)}; the configuration has {len(names)} additional "
                f"features ({', '.join(names) or 'none'}) of {table_dim} numbers each",
                "correct merge_uih_candidate_feature_mapping, user_embedding_feature_names or "
                "item_embedding_feature_names",
            )

    def _contextual(
        self, user: UserConfig, tables: tuple[EmbeddingTable, ...], merged: Mapping[str, str]
    ) -> tuple[ContextualFeature, ...]:
        lengths = user.integers("contextual_feature_to_max_length")
        least = user.integers("contextual_feature_to_min_uih_length")
        if stray := sorted(set(least) - set(lengths)):
            raise DialectError(
                "config",
                f"contextual_feature_to_min_uih_length names {', '.join(stray)}, which is no contextual feature; "
                f"contextual features: {', '.join(lengths) or 'none'}",
                "correct contextual_feature_to_min_uih_length or contextual_feature_to_max_length",
            )
        for field, values, smallest in (
            ("contextual_feature_to_max_length", lengths, 1),
            ("contextual_feature_to_min_uih_length", least, 0),
        ):
            for name, value in values.items():
                if not smallest <= value <= MAX_LENGTH:
                    raise DialectError(
                        "config",
                        f"{field} of {name} is {value}; allowed: {smallest} to {MAX_LENGTH}",
                        f"correct {field}",
                    )
        return tuple(
            ContextualFeature(name, self._table_of(name, tables, merged), length, least.get(name, 0))
            for name, length in lengths.items()
        )

    def _action_weights(self, user: UserConfig) -> tuple[int, ...]:
        weights = user.raw("action_weights", ())
        if not isinstance(weights, (list, tuple)):
            raise DialectError(
                "config", f"action_weights is {weights!r}; it must be a list of bitmasks", "correct action_weights"
            )
        return tuple(weights)

    def _scaling(self, user: UserConfig) -> float | None:
        """The divisor, or None for that of the batch."""
        scaling = user.raw("scaling_seq_len", "batch")
        if scaling == "batch":
            return None
        is_number = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
        if not is_number or not 0 < scaling <= MAX_LENGTH:
            raise DialectError(
                "config",
                f'scaling_seq_len is {scaling!r}; allowed: a number above 0, or "batch"',
                "correct scaling_seq_len",
            )
        return float(scaling)

    def _merged_features(self, user: UserConfig) -> dict[str, str]:
        """Names of history features to those of the candidates' counterparts."""
        pairs = user.raw("merge_uih_candidate_feature_mapping", [])
        legal = isinstance(pairs, (list, tuple)) and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
            for pair in pairs
        )
        if not legal:
            raise DialectError(
                "config",
                "merge_uih_candidate_feature_mapping is not a list of pairs of names",
                "pass it as [[history feature, candidate feature], ...]",
            )
        merged = dict(pairs)
        if len(merged) != len(pairs):
            names = [history for history, _ in pairs]
            twice = ", ".join(sorted({name for name in names if names.count(name) > 1}))
            raise DialectError(
                "config",
                f"merge_uih_candidate_feature_mapping names {twice} more than once",
                "keep one pair for each history feature",
            )
        return merged

    def _tables(self, shapes: Shapes, user: UserConfig, table_dim: int, external: bool) -> tuple[EmbeddingTable, ...]:
        stated = user.raw("embedding_tables", {})
        if not isinstance(stated, Mapping) or not all(
            isinstance(name, str) and _is_table_shape(shape) for name, shape in stated.items()
        ):
            raise DialectError(
                "config",
                f"embedding_tables is {stated!r}; it must map names to [rows, width]",
                "correct embedding_tables",
            )
        held = {match[1]: tuple(shape) for key, shape in shapes.items() if (match := TABLE_PATTERN.match(key))}
        for name, shape in stated.items():
            if name in held and tuple(shape) != held[name]:
                raise DialectError(
                    "shape",
                    f"the configuration says table {name} is {list(shape)}, the checkpoint's is {list(held[name])}",
                    "correct embedding_tables",
                )
        sizes = {**{name: tuple(shape) for name, shape in stated.items()}, **held} if external else held
        if not sizes:
            raise DialectError(
                "keys",
                "the checkpoint holds no embedding table",
                "pass the whole model's state_dict, or --embeddings external and embedding_tables in the configuration",
            )
        for name, (_, dim) in sizes.items():
            if dim != table_dim:
                raise DialectError(
                    "shape", f"table {name} is {dim} wide, the preprocessor takes {table_dim}", "check the file"
                )
        try:
            return tuple(EmbeddingTable(name, *shape) for name, shape in sizes.items())
        except ValueError as error:
            raise DialectError("shape", f"tables {', '.join(sizes)}: {error}", "check the file") from error

    def _table_of(self, feature: str, tables: tuple[EmbeddingTable, ...], merged: Mapping[str, str]) -> str:
        """A feature's table: its own, or that of the history feature it is merged with."""
        names = {table.name for table in tables}
        candidates = [feature, *(history for history, candidate in merged.items() if candidate == feature)]
        for name in candidates:
            if name in names:
                return name
        raise DialectError(
            "config",
            f"{feature} has no embedding table: none is named {' or '.join(candidates)}; "
            f"tables: {', '.join(sorted(names))}",
            "correct the feature names, or add the pair to merge_uih_candidate_feature_mapping",
        )

    def _id_features(
        self, user: UserConfig, merged: Mapping[str, str], tables: tuple[EmbeddingTable, ...]
    ) -> tuple[tuple[SequenceFeature, ...], tuple[ItemFeature, ...]]:
        first = user.text("uih_post_id_feature_name")
        of_user, of_item = user.texts("user_embedding_feature_names"), user.texts("item_embedding_feature_names")
        if first not in merged:
            raise DialectError(
                "config",
                f"uih_post_id_feature_name {first!r} has no counterpart among the candidates",
                "add the pair to merge_uih_candidate_feature_mapping",
            )
        names = [first] + [
            history
            for history, candidate in merged.items()
            if history != first and history in of_user and candidate in of_item
        ]
        sequence = tuple(SequenceFeature(name, merged[name], self._table_of(name, tables, merged)) for name in names)
        items = tuple(ItemFeature(name, self._table_of(name, tables, merged)) for name in of_item)
        return sequence, items

    def _limits(self, user: UserConfig, contextual_len: int) -> tuple[int, int]:
        """Most candidates and most history events, as the original's data loader cuts them."""
        total = user.integer("max_seq_len")
        if total is None:
            raise DialectError("config", "max_seq_len is missing", "add the training run's max_seq_len")
        trained = user.integer("max_num_candidates") or 0
        served = user.integer("max_num_candidates_inference") or trained
        history = total - trained - contextual_len
        if total > MAX_LENGTH or served > MAX_LENGTH:
            raise DialectError(
                "config",
                f"max_seq_len {total} or max_num_candidates_inference {served} is above {MAX_LENGTH}",
                "correct max_seq_len or max_num_candidates_inference",
            )
        if history < 1 or served < 1:
            raise DialectError(
                "config",
                f"max_seq_len {total} - max_num_candidates {trained} - {contextual_len} contextual tokens leaves "
                f"{history} history events, for {served} candidates",
                "correct max_seq_len, max_num_candidates or max_num_candidates_inference",
            )
        return served, history

    def _layer(
        self, shapes: Shapes, user: UserConfig, width: int, max_seq_len: int, scaling: float | None
    ) -> LayerConfig:
        names = ("hstu_num_heads", "hstu_attn_qk_dim", "hstu_attn_linear_dim")
        heads, qk, linear = (user.integer(name) for name in names)
        if not heads or not qk or not linear:
            lacking = [name for name, value in zip(names, (heads, qk, linear), strict=True) if not value]
            raise DialectError(
                "heads" if not heads else "config",
                f"{', '.join(lacking)} must be given, at least 1: shapes only tell the products of {', '.join(names)}",
                "add what is missing to the configuration",
            )
        packed = shapes[LAYER_KEY.format(0) + "_uvqk_weight"][1]
        joined = shapes[LAYER_KEY.format(0) + "_output_weight"][0]
        if packed != 2 * heads * (qk + linear) or joined != 3 * heads * linear:
            raise DialectError(
                "shape",
                f"hstu_num_heads {heads}, hstu_attn_qk_dim {qk}, hstu_attn_linear_dim {linear} need _uvqk_weight with "
                f"{2 * heads * (qk + linear)} columns and _output_weight with {3 * heads * linear} rows; the "
                f"checkpoint has {packed} and {joined}",
                "correct them in the configuration",
            )
        return LayerConfig(
            embedding_dim=width,
            attention=AttentionConfig(
                num_heads=heads,
                attention_dim=qk,
                linear_dim=linear,
                alpha=qk**-0.5,
                scaling_seq_len=float(max_seq_len) if scaling is None else scaling,
                max_seq_len=max_seq_len,
            ),
            silu_scope="u",
            uvqk_bias=True,
            input_norm=True,
            input_norm_affine=True,
            output_norm="group" if user.flag("hstu_group_norm", False) else "layer",
            output_norm_affine=True,
            norm_eps=NORM_EPS,
            output_concat="u_attn_gated",
            output_projection=True,
            output_bias=False,
        )

    def _postprocessor(self, user: UserConfig) -> str:
        if not user.flag("enable_postprocessor", True):
            return "l2_norm"
        return "layer_norm" if user.flag("use_layer_norm_postprocessor", False) else "timestamp_layer_norm"

    def _tasks(self, user: UserConfig) -> tuple[RankingTask, ...]:
        tasks = user.raw("multitask_configs", [])
        if not isinstance(tasks, (list, tuple)) or not tasks or not all(isinstance(task, Mapping) for task in tasks):
            raise DialectError("config", "multitask_configs is missing or empty", "add the tasks of the training run")
        parsed = []
        for task in tasks:
            name, kind = task.get("task_name"), task.get("task_type")
            legal = isinstance(kind, (str, int)) and not isinstance(kind, bool) and kind in _TASK_KINDS
            if not isinstance(name, str) or not legal:
                raise DialectError(
                    "config",
                    f"task_name {name!r} has task_type {kind!r}; allowed: a string, and BINARY_CLASSIFICATION (0) or "
                    "REGRESSION (1)",
                    "correct multitask_configs",
                )
            parsed.append(RankingTask(name, _TASK_KINDS[kind]))  # type: ignore[arg-type]
        return tuple(parsed)

    def sources(self, config: ModelConfig) -> dict[str, SourceTensor]:
        assert isinstance(config, RankingConfig)
        sources = {"position_embedding": SourceTensor(POSITION_KEY), "time_embedding": SourceTensor(TIME_KEY)}
        if not config.external_embeddings:
            for index, table in enumerate(config.tables):
                sources[f"tables.{index}.weight"] = SourceTensor(TABLE_KEY.format(table.name))
        mlps = {"content_mlp": PREPROCESSOR_KEY + "_content_embedding_mlp.", "item_mlp": ITEM_KEY}
        if len(config.sequence_features) > 1:
            mlps["additional_mlp"] = ADDITIONAL_KEY
        if config.action_feature:
            mlps["action_mlp"] = PREPROCESSOR_KEY + "_action_embedding_mlp."
            sources["action_embedding"] = SourceTensor(ACTION_KEY + "_action_embedding_table")
            sources["target_action_embedding"] = SourceTensor(ACTION_KEY + "_target_action_embedding_table")
        for ours, theirs in mlps.items():
            sources |= _mlp_sources(ours, theirs, final_norm=True)
        sources |= _mlp_sources("head", HEAD_KEY, final_norm=False)
        if config.contextual_len:
            for slot in range(config.contextual_len):
                for part, name in (("weight", "weights"), ("bias", "bias")):
                    key = f"{PREPROCESSOR_KEY}_batched_contextual_linear_{name}"
                    sources[f"contextual.{slot}.{part}"] = _slice_of(key, slot, config.contextual_len)
        if config.postprocessor != "l2_norm":
            for part in ("weight", "bias"):
                sources[f"user_norm.{part}"] = SourceTensor(f"{POSTPROCESSOR_KEY}_layer_norm.{part}")
        if config.postprocessor == "timestamp_layer_norm":
            sources["time_combiner.weight"] = _transposed(POSTPROCESSOR_KEY + "_time_feature_combiner.weight")
            sources["time_combiner.bias"] = SourceTensor(POSTPROCESSOR_KEY + "_time_feature_combiner.bias")
        attention = config.layer.attention
        is_spread = config.layer.output_norm == "group" and attention.num_heads == 1
        for index in range(config.num_layers):
            ours, theirs = f"layers.{index}.", LAYER_KEY.format(index)
            sources[ours + "uvqk_weight"] = SourceTensor(theirs + "_uvqk_weight")
            sources[ours + "uvqk_bias"] = SourceTensor(theirs + "_uvqk_beta")
            sources[ours + "output_weight"] = SourceTensor(theirs + "_output_weight")
            for part in ("weight", "bias"):
                sources[f"{ours}input_norm.{part}"] = SourceTensor(f"{theirs}_input_norm_{part}")
                key = f"{theirs}_output_norm_{part}"
                sources[f"{ours}output_norm.{part}"] = (
                    _spread(key, attention.linear_dim) if is_spread else SourceTensor(key)
                )
        return sources


DLRM_V3 = _DlrmV3()
