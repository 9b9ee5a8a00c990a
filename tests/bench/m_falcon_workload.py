"""The M-FALCON benchmark's work: a ranking model of DLRMv3's sizes with random weights, and one user's request.

NumPy alone: used beside TensorRT 8.5 on Python 3.10 and beside torch. Everything is drawn from raw PCG64 bits, which
NumPy keeps the same in every version, so that both machines and both Pythons have the same model and requests.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

HISTORY_LENGTHS = (1024, 4096, 8192)
CANDIDATE_COUNTS = (1, 64, 256, 1024, 2048)
MICRO_BATCHES = (64, 256, 1024, 2048)
#: Candidates forwarded alone when the cost of all of them, one at a time, is extrapolated.
ALONE_SAMPLE = 8
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

_ACTION_EMBEDDING = 8
_TOWER = 512
_TRAINED_CANDIDATES = 32
_POSITIONS, _TIME_BUCKETS = 8192, 2048
#: Half past noon of a Sunday in 2020: far from the edges of the hour and day features, and within int32.
QUERY_TIME = 1_600_000_000 - 1_600_000_000 % 3600 + 1800

Features = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Dimensions of the model; the defaults are DLRMv3's, but for the tables, which are kept small.

    Attributes:
        width: D, of a token.
        table_dim: width of the embedding tables.
        num_heads: H.
        attention_dim: of a query and key, per head.
        linear_dim: of a value, per head.
        num_layers: HSTU layers.
        hidden_dim: of the preprocessor's MLPs.
        num_items: rows of the item table, 512 wide: 20,000 rows are 20 MB in float16.
        num_categories: rows of the category table.
        num_users: rows of the user table.
        action_weights: one bit of the action bitmask each.
        min_history_len: events below which the contextual token is that of an absent user.
        max_candidates: of a request.
        max_history: events of a request.
    """

    width: int = 512
    table_dim: int = 512
    num_heads: int = 4
    attention_dim: int = 128
    linear_dim: int = 128
    num_layers: int = 5
    hidden_dim: int = 256
    num_items: int = 20_000
    num_categories: int = 128
    num_users: int = 2_000
    action_weights: tuple[int, ...] = (1, 2, 4, 8, 16)
    min_history_len: int = 20
    max_candidates: int = 2048
    max_history: int = 8192

    @property
    def name(self) -> str:
        """For the CSV and the log."""
        return (
            f"D={self.width} H={self.num_heads} dqk={self.attention_dim} dv={self.linear_dim} "
            f"layers={self.num_layers} tables={self.num_items}+{self.num_categories}+{self.num_users}x{self.table_dim}"
        )

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        """Rows and width of each embedding table."""
        rows = {"item_id": self.num_items, "item_category_id": self.num_categories, "user_id": self.num_users}
        return {name: (count, self.table_dim) for name, count in rows.items()}


DLRM_V3 = Sizes()
#: Small enough for a CPU test; every part of the model is there.
TINY = Sizes(64, 32, 2, 32, 32, 2, 32, num_items=300, num_categories=8, num_users=20)


def hstu_config(sizes: Sizes) -> dict[str, Any]:
    """Fields of Meta's DlrmHSTUConfig, as JSON."""
    return {
        "max_seq_len": sizes.max_history + _TRAINED_CANDIDATES + 1,
        "max_num_candidates": _TRAINED_CANDIDATES,
        "max_num_candidates_inference": sizes.max_candidates,
        "hstu_num_heads": sizes.num_heads,
        "hstu_attn_linear_dim": sizes.linear_dim,
        "hstu_attn_qk_dim": sizes.attention_dim,
        "hstu_attn_num_layers": sizes.num_layers,
        "hstu_embedding_table_dim": sizes.table_dim,
        "hstu_preprocessor_hidden_dim": sizes.hidden_dim,
        "hstu_transducer_embedding_dim": sizes.width,
        "hstu_group_norm": False,
        "hstu_input_dropout_ratio": 0.2,
        "hstu_linear_dropout_rate": 0.1,
        "contextual_feature_to_max_length": {"user_id": 1},
        "contextual_feature_to_min_uih_length": {"user_id": sizes.min_history_len},
        "candidates_weight_feature_name": "item_action_weights",
        "candidates_watchtime_feature_name": "item_dummy_watchtime",
        "candidates_querytime_feature_name": "item_query_time",
        "causal_multitask_weights": 0.2,
        "multitask_configs": [{"task_name": "rating", "task_weight": 1, "task_type": "BINARY_CLASSIFICATION"}],
        "user_embedding_feature_names": ["item_id", "user_id", "item_category_id"],
        "item_embedding_feature_names": ["item_candidate_id", "item_candidate_category_id"],
        "uih_post_id_feature_name": "item_id",
        "uih_action_time_feature_name": "action_timestamp",
        "uih_weight_feature_name": "item_weights",
        "hstu_uih_feature_names": [
            "user_id",
            "item_id",
            "item_category_id",
            "action_timestamp",
            "item_weights",
            "dummy_watch_time",
        ],
        "hstu_candidate_feature_names": [
            "item_candidate_id",
            "item_candidate_category_id",
            "item_query_time",
            "item_action_weights",
            "item_dummy_watchtime",
        ],
        "merge_uih_candidate_feature_mapping": [
            ["item_id", "item_candidate_id"],
            ["item_category_id", "item_candidate_category_id"],
            ["action_timestamp", "item_query_time"],
            ["item_weights", "item_action_weights"],
            ["dummy_watch_time", "item_dummy_watchtime"],
        ],
        "action_weights": list(sizes.action_weights),
        "action_embedding_init_std": 5.0,
        "enable_postprocessor": True,
        "use_layer_norm_postprocessor": False,
    }


def checkpoint_config(sizes: Sizes) -> dict[str, Any]:
    """The JSON beside the checkpoint: Meta's configuration, the tables, and the clamp of Meta's Triton kernel."""
    return {
        "dlrm_hstu_config": hstu_config(sizes),
        "time_bucket_clamp": "table",
        "embedding_tables": {name: list(shape) for name, shape in sizes.tables.items()},
    }


def _shapes(sizes: Sizes) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """(shape, mean, deviation) of every parameter, by Meta's key."""
    width, table, heads = sizes.width, sizes.table_dim, sizes.num_heads
    inner, query = heads * sizes.linear_dim, heads * sizes.attention_dim
    shapes: dict[str, tuple[tuple[int, ...], float, float]] = {}

    def affine(key: str, outputs: int, inputs: int) -> None:
        shapes[f"{key}.weight"] = (outputs, inputs), 0.0, 1 / math.sqrt(inputs)
        shapes[f"{key}.bias"] = (outputs,), 0.0, 0.1

    def norm(weight: str, bias: str, size: int) -> None:
        shapes[weight] = (size,), 1.0, 0.1
        shapes[bias] = (size,), 0.0, 0.1

    def mlp(key: str, inputs: int, hidden: int, outputs: int, *, last_norm: bool) -> None:
        affine(f"{key}.0", hidden, inputs)
        norm(f"{key}.1.weight", f"{key}.1.bias", hidden)
        affine(f"{key}.2", outputs, hidden)
        if last_norm:
            norm(f"{key}.3.weight", f"{key}.3.bias", outputs)

    for name, shape in sizes.tables.items():
        shapes[f"_embedding_collection.embeddings.{name}.weight"] = shape, 0.0, 1.0
    mlp("_multitask_module._prediction_module", width, _TOWER, 1, last_norm=False)
    mlp("_item_embedding_mlp", 2 * table, _TOWER, width, last_norm=True)
    layer_key = "_hstu_transducer._stu_module._stu_layers.{}."
    for index in range(sizes.num_layers):
        layer = layer_key.format(index)
        # These three make the history matter: with them a candidate's logit moves by several times float16's error
        # when attention is off by a tenth, when candidates see each other, or when the history is reversed.
        shapes[layer + "_uvqk_weight"] = (width, 2 * inner + 2 * query), 0.0, 2 / math.sqrt(width)
        shapes[layer + "_uvqk_beta"] = (2 * inner + 2 * query,), 0.0, 0.4
        norm(layer + "_input_norm_weight", layer + "_input_norm_bias", width)
        shapes[layer + "_output_weight"] = (3 * inner, width), 0.0, 32 / math.sqrt(3 * inner)
        norm(layer + "_output_norm_weight", layer + "_output_norm_bias", inner)
    before = "_hstu_transducer._input_preprocessor."
    shapes[before + "_batched_contextual_linear_weights"] = (1, table, width), 0.0, 1 / math.sqrt(table)
    shapes[before + "_batched_contextual_linear_bias"] = (1, width), 0.0, 0.1
    actions = len(sizes.action_weights) * _ACTION_EMBEDDING
    for part, inputs in (("content", table), ("additional", table), ("action", actions)):
        mlp(f"{before}_{part}_embedding_mlp", inputs, sizes.hidden_dim, width, last_norm=True)
    encoder = before + "_action_encoder."
    shapes[encoder + "_action_embedding_table"] = (len(sizes.action_weights), _ACTION_EMBEDDING), 0.0, 1.0
    shapes[encoder + "_target_action_embedding_table"] = (1, actions), 0.0, 1.0
    positional = "_hstu_transducer._positional_encoder."
    shapes[positional + "_position_embeddings_weight"] = (_POSITIONS, width), 0.0, 1.0
    shapes[positional + "_timestamp_embeddings_weight"] = (_TIME_BUCKETS + 1, width), 0.0, 1.0
    after = "_hstu_transducer._output_postprocessor."
    affine(after + "_time_feature_combiner", width, width + 4)
    norm(after + "_layer_norm.weight", after + "_layer_norm.bias", width)
    return shapes


def _bits(name: str, count: int) -> NDArray[np.uint8]:
    generator = np.random.PCG64([2024, zlib.crc32(name.encode())])
    words = np.asarray(generator.random_raw(-(-count // 8)), np.uint64)
    return words.astype("<u8").view(np.uint8)[:count]


_ONES = np.array([bin(value & 127).count("1") for value in range(256)], np.int8)


def parameter(name: str, shape: tuple[int, ...], mean: float, deviation: float) -> NDArray[np.float32]:
    """Binomial numbers: odd multiples, up to 7, of half a power of two, added to the mean.

    Eight values each: float16 and bfloat16 hold them exactly (0 and 1 are the only means), so that no backend's error
    is that of rounding the weights, and a graph full of them compresses to a fifth.
    """
    unit = 2.0 ** round(math.log2(deviation / math.sqrt(7)))
    of_bits = (mean + (2.0 * _ONES - 7) * unit).astype(np.float32)
    return of_bits[_bits(name, math.prod(shape))].reshape(shape)


def state_dict(sizes: Sizes) -> dict[str, NDArray[Any]]:
    """Every tensor of the model under Meta's keys: float32 parameters and the buffers."""
    state: dict[str, NDArray[Any]] = {key: parameter(key, *facts) for key, facts in _shapes(sizes).items()}
    state["_hstu_transducer._input_preprocessor._action_encoder._combined_action_weights"] = np.array(
        sizes.action_weights, np.int64
    )
    state["_hstu_transducer._output_postprocessor._period_units"] = np.array([[3600.0, 86400.0]], np.float32)
    state["_hstu_transducer._output_postprocessor._units_per_period"] = np.array([[24.0, 7.0]], np.float32)
    return state


def integers(name: str, count: int, limit: int) -> NDArray[np.int64]:
    """[count] numbers below the limit, the same for the same name."""
    words = _bits(name, 4 * count).view("<u4").astype(np.int64)
    drawn: NDArray[np.int64] = words % limit
    return drawn


@dataclasses.dataclass(frozen=True)
class Request:
    """One user's history, context and candidates, by Meta's feature names.

    Attributes:
        history: `item_id`, `item_category_id` and `item_weights` [n] int32, `action_timestamp` [n] int64 seconds.
        context: `user_id` [1] int32.
        candidates: `item_candidate_id`, `item_candidate_category_id` [m] int32, `item_query_time` [m] int64 seconds.
    """

    history: Features
    context: Features
    candidates: Features

    @property
    def num_history(self) -> int:
        """Events, n."""
        return len(self.history["item_id"])

    @property
    def num_candidates(self) -> int:
        """Candidates, m."""
        return len(self.candidates["item_candidate_id"])

    def only(self, first: int, last: int) -> Request:
        """The same user with a slice of the candidates."""
        kept = {name: values[first:last] for name, values in self.candidates.items()}
        return Request(self.history, self.context, kept)

    @property
    def features(self) -> Features:
        """All of them, with both offsets: what the packed graph takes."""
        return {
            **self.history,
            **self.context,
            **self.candidates,
            "seq_offsets": np.array([0, self.num_history], np.int32),
            "candidate_offsets": np.array([0, self.num_candidates], np.int32),
        }


def request(num_history: int, num_candidates: int, sizes: Sizes = DLRM_V3, user: int = 0) -> Request:
    """The request of n events and m candidates; those of fewer candidates are its beginning. Another user, other bits.

    Events lie seconds to a day apart. Half of the longest history is older than the last time bucket of Meta's PyTorch
    path (181 days at D = 512), none is older than the last one of its table.
    """
    prefix = f"n={num_history}" + (f" user={user}" if user else "")
    gaps = integers(f"{prefix} gaps", num_history, 90)
    pause = integers(f"{prefix} pauses", num_history, 10) == 0
    gaps = np.where(pause, 3600 + 900 * gaps, gaps)
    times = QUERY_TIME - 300 - np.cumsum(gaps)[::-1]
    history = {
        "item_id": integers(f"{prefix} items", num_history, sizes.num_items).astype(np.int32),
        "item_category_id": integers(f"{prefix} categories", num_history, sizes.num_categories).astype(np.int32),
        "item_weights": integers(f"{prefix} actions", num_history, 32).astype(np.int32),
        "action_timestamp": times.astype(np.int64),
    }
    user = integers(f"{prefix} user", 1, sizes.num_users).astype(np.int32)
    most = max(num_candidates, sizes.max_candidates)
    items = integers(f"{prefix} candidates", most, sizes.num_items).astype(np.int32)
    kinds = integers(f"{prefix} candidate categories", most, sizes.num_categories).astype(np.int32)
    candidates = {
        "item_candidate_id": items[:num_candidates],
        "item_candidate_category_id": kinds[:num_candidates],
        "item_query_time": np.full(num_candidates, QUERY_TIME, np.int64),
    }
    return Request(history, {"user_id": user}, candidates)
