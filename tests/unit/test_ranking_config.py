from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_compile import graph_names
from hstu_compile.graph_names import RESERVED_NAMES
from hstu_compile.model import ranking
from hstu_compile.model._validation import MAX_LENGTH
from hstu_compile.model.dialects import DLRM_V3
from hstu_compile.model.ranking import RankingModel
from hstu_compile.model.ranking_config import (
    ContextualFeature,
    EmbeddingTable,
    ItemFeature,
    RankingConfig,
    RankingTask,
    SequenceFeature,
)
from tests.dlrm_reference import DlrmForm, dlrm_state_dict
from tests.ranking_fakes import spec_of

FORM = DlrmForm(
    contextual=(("user_id", 1, 20), ("genres", 3, 0)),
    additional=("movie_category",),
    item_only=("item_shop",),
    tasks=(("like", 0), ("minutes", 1)),
)


def config_of(form: DlrmForm) -> RankingConfig:
    shapes = {key: tuple(tensor.shape) for key, tensor in dlrm_state_dict(form).items()}
    config = DLRM_V3.config(shapes, form.user_config())
    assert isinstance(config, RankingConfig)
    return config


CONFIG = config_of(FORM)
ATTENTION = CONFIG.layer.attention


def with_attention(**changes: Any) -> Any:
    return dataclasses.replace(CONFIG.layer, attention=dataclasses.replace(ATTENTION, **changes))


def with_first(field: str, **changes: Any) -> tuple[Any, ...]:
    """The records of a field, the first of them changed."""
    first, *others = getattr(CONFIG, field)
    return (dataclasses.replace(first, **changes), *others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({name: 0}, f"{name} is 0; it must be at least 1")
            for name in (
                "num_layers",
                "action_embedding_dim",
                "hidden_dim",
                "tower_hidden_dim",
                "num_positions",
                "num_time_buckets",
                "max_history_len",
                "max_candidates",
            )
        ],
        ({"num_layers": 2.0}, "num_layers is 2.0; it must be an integer"),
        ({"num_layers": True}, "num_layers is True; it must be an integer"),
        ({"num_positions": MAX_LENGTH + 1}, f"num_positions is {MAX_LENGTH + 1}; it must be at most {MAX_LENGTH}"),
        ({"num_time_buckets": 10**9}, "num_time_buckets is 1000000000; it must be at most 1048576"),
        *[
            ({name: 70_000}, f"{name} is 70000; it must be at most 65536")
            for name in ("action_embedding_dim", "hidden_dim", "tower_hidden_dim")
        ],
        ({"dialect": 3}, "dialect is 3; it must be a string"),
        ({"history_time_feature": None}, "history_time_feature is None; it must be a string"),
        ({"external_embeddings": 1}, "external_embeddings is 1; allowed: true or false"),
        ({"time_bucket_fn": "ln"}, "time_bucket_fn is 'ln'; allowed: 'sqrt', 'log'"),
        ({"time_bucket_clamp": "rows"}, "time_bucket_clamp is 'rows'; allowed: 'embedding_dim', 'table'"),
        (
            {"postprocessor": "none"},
            "postprocessor is 'none'; allowed: 'timestamp_layer_norm', 'layer_norm', 'l2_norm'",
        ),
        ({"time_feature_precision": "f32"}, "time_feature_precision is 'f32'; allowed: 'float32', 'exact'"),
        ({"scaling": 3.0}, "scaling is 3.0; allowed: 'fixed', 'batch'"),
        ({"min_history_counts": "all"}, "min_history_counts is 'all'; allowed: 'history_and_candidates', 'history'"),
        ({"sequence_features": ()}, "sequence_features is empty; an event needs an id"),
        ({"item_features": ()}, "item_features is empty; a candidate needs an id"),
        ({"tasks": ()}, "tasks is empty; a ranking model predicts at least one"),
        ({"tasks": CONFIG.tasks[::-1]}, "tasks are regression, binary; binary tasks come before regression tasks"),
        ({"tasks": (CONFIG.tasks[0], CONFIG.tasks[0])}, "two tasks have one name"),
        ({"action_feature": ""}, "action_feature and action_weights go together"),
        ({"action_weights": ()}, "action_feature and action_weights go together"),
        *[
            ({"action_weights": (1, weight)}, f"action weight {weight!r} is not a bitmask of 1 to 30 bits")
            for weight in (0, -1, 1 << 30, "2", 2.0, True)
        ],
        ({"tables": (*CONFIG.tables, CONFIG.tables[0])}, "two tables have one name"),
        (
            {"tables": CONFIG.tables[1:]},
            "there is no table 'movie_id'; tables: movie_category, user_id, genres, item_shop",
        ),
        ({"tables": with_first("tables", embedding_dim=7)}, r"tables are \[6, 7\] wide; the model adds and joins rows"),
        ({"item_features": with_first("item_features", table="user_id")}, "item_movie_id is looked up in two tables"),
        ({"candidate_time_feature": "movie_id"}, "two inputs are named movie_id"),
        ({"history_time_feature": "user_id", "action_feature": "genres"}, "two inputs are named genres, user_id"),
        ({"history_time_feature": ""}, "an input has an empty name"),
        ({"history_time_feature": "preds", "action_feature": "k_0"}, "k_0, preds cannot name a feature"),
        ({"max_candidates": 25}, "max_seq_len 76 is not contextual 4 .* history 48 .* candidates 25"),
        ({"max_history_len": 47}, "max_seq_len 76 is not contextual 4 .* history 47 .* candidates 24"),
        ({"layer": with_attention(pos_table_len=100)}, "relative bias tables are those of retrieval models"),
        (
            {"layer": with_attention(time_bias="own", num_time_buckets=4)},
            "relative bias tables are those of retrieval models",
        ),
        ({"layer": with_attention(contextual_seq_len=1)}, "contextual tokens of a ranking model attend causally"),
        ({"layer": with_attention(target_group_size=2)}, "candidates of a ranking model do not see each other"),
    ],
)
def test_configuration_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EmbeddingTable("t", 0, 4), "table t has 0 rows; it must have at least 1"),
        (lambda: EmbeddingTable("t", 4, 0), "table t is 0 wide; it must be 1 to 65536"),
        (lambda: EmbeddingTable("t", 4, 65537), "table t is 65537 wide; it must be 1 to 65536"),
        (lambda: EmbeddingTable("t", 1 << 31, 4), "num_rows of t is 2147483648; it must be at most 2147483647"),
        (lambda: EmbeddingTable("t", 4.0, 4), "num_rows is 4.0; it must be an integer"),
        (lambda: EmbeddingTable(4, 4, 4), "name is 4; it must be a string"),
        (lambda: ContextualFeature("u", "t", 0, 0), "contextual feature u has max_length 0; at least 1"),
        (lambda: ContextualFeature("u", "t", 1, -1), "min_history_len of u is -1; at least 0"),
        (lambda: ContextualFeature("u", "t", 1, 1 << 31), "min_history_len of u is 2147483648; it must be at most"),
        (lambda: ContextualFeature("u", ["t"], 1, 0), r"table is \['t'\]; it must be a string"),
        (lambda: SequenceFeature("a", "b", None), "table is None; it must be a string"),
        (lambda: ItemFeature(1, "t"), "name is 1; it must be a string"),
        (lambda: RankingTask("like", "bce"), "kind is 'bce'; allowed: 'binary', 'regression'"),
        (lambda: RankingTask(None, "binary"), "name is None; it must be a string"),
    ],
)
def test_records_say_what_is_wrong(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_names_of_the_graph_cannot_be_features() -> None:
    inputs = {value for name, value in vars(ranking).items() if name.isupper() and isinstance(value, str)}
    assert inputs | {"preds", "logits"} == RESERVED_NAMES
    for name in (*RESERVED_NAMES, "k_0", "v_11"):
        with pytest.raises(ValueError, match=f"{name} cannot name a feature"):
            dataclasses.replace(CONFIG, action_feature=name)
    for name in ("k_", "k_x", "kv_0", "seq_offset"):
        assert name in dataclasses.replace(CONFIG, action_feature=name).history_features


def test_a_configuration_and_a_manifest_read_the_names_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    dataclasses.replace(CONFIG, action_feature="invented")
    spec_of(history_action="invented")
    monkeypatch.setattr(graph_names, "RESERVED_NAMES", RESERVED_NAMES | {"invented"})
    with pytest.raises(ValueError, match="invented cannot name a feature"):
        dataclasses.replace(CONFIG, action_feature="invented")
    with pytest.raises(ValueError, match="invented cannot name a feature"):
        spec_of(history_action="invented")


def test_what_follows_from_the_configuration() -> None:
    assert CONFIG.contextual_len == 4
    assert CONFIG.contextual_names == ("user_id", "genres")
    assert CONFIG.history_ids == {"movie_id": "movie_id", "movie_category": "movie_category"}
    assert CONFIG.candidate_ids == {
        "item_movie_id": "movie_id",
        "item_movie_category": "movie_category",
        "item_shop": "item_shop",
    }
    assert CONFIG.history_features == ("movie_id", "movie_category", "action_timestamp", "item_weights")
    assert CONFIG.candidate_features == ("item_movie_id", "item_movie_category", "item_shop", "item_query_time")
    assert (CONFIG.table_dim, CONFIG.max_seq_len, CONFIG.max_history_len, CONFIG.max_candidates) == (6, 48, 48, 24)
    assert CONFIG.cache_rule == "request"
    assert ATTENTION.max_seq_len == 4 + 48 + 24


@pytest.mark.parametrize(
    ("clamp", "num_buckets", "largest"), [("embedding_dim", 50, 11), ("embedding_dim", 6, 6), ("table", 50, 50)]
)
def test_largest_time_bucket_never_lies_behind_the_table(clamp: Any, num_buckets: int, largest: int) -> None:
    config = dataclasses.replace(CONFIG, time_bucket_clamp=clamp, num_time_buckets=num_buckets)
    assert config.largest_time_bucket == largest
    assert RankingModel(config).time_thresholds.shape == (largest + 1,)


def test_candidates_are_counted_only_where_a_token_depends_on_their_number() -> None:
    assert CONFIG.counts_candidates
    assert not dataclasses.replace(CONFIG, min_history_counts="history").counts_candidates
    without = with_first("contextual_features", min_history_len=0)
    assert not dataclasses.replace(CONFIG, contextual_features=without).counts_candidates


def test_other_limits_change_bounds_alone() -> None:
    smaller = CONFIG.with_limits(10, 3)
    assert (smaller.max_history_len, smaller.max_candidates, smaller.layer.attention.max_seq_len) == (10, 3, 17)
    assert smaller.layer.attention.scaling_seq_len == ATTENTION.scaling_seq_len
    assert smaller.with_limits(48, 24) == CONFIG
    weights = {name: tensor.shape for name, tensor in RankingModel(CONFIG).state_dict().items()}
    assert {name: tensor.shape for name, tensor in RankingModel(smaller).state_dict().items()} == weights


@pytest.mark.parametrize(
    "form",
    [FORM, DlrmForm(), DlrmForm(contextual=(), action_weights=(), scaling_seq_len=7.5, postprocessor="l2_norm")],
    ids=["all", "plain", "least"],
)
def test_json_form_gives_the_configuration_back(form: DlrmForm) -> None:
    config = config_of(form)
    assert RankingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert RankingConfig.from_dict(config.to_dict()) == config
    assert hash(RankingConfig.from_dict(config.to_dict())) == hash(config)


def test_json_form_lists_every_unknown_and_missing_field() -> None:
    values = CONFIG.to_dict()
    with pytest.raises(ValueError, match="RankingConfig has no field a, b; fields: dialect, num_layers"):
        RankingConfig.from_dict({**values, "b": 1, "a": 2})
    table = {"name": "t", "rows": 3, "embedding_dim": 6}
    with pytest.raises(ValueError, match="EmbeddingTable has no field rows"):
        RankingConfig.from_dict({**values, "tables": [table]})
    del values["tasks"], values["scaling"]
    with pytest.raises(ValueError, match="RankingConfig lacks scaling, tasks"):
        RankingConfig.from_dict(values)


def test_external_embeddings_are_off_where_an_older_form_does_not_say() -> None:
    values = CONFIG.to_dict()
    del values["external_embeddings"]
    assert RankingConfig.from_dict(values) == CONFIG


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.just(10**400),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(0, 2), st.text(max_size=2), st.none()), max_size=2),
    st.lists(st.dictionaries(st.sampled_from(["name", "table", "kind", "x"]), st.integers(), max_size=3), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_value_in_the_json_form_is_taken_or_refused_with_value_error(data: st.DataObject) -> None:
    values = json.loads(json.dumps(CONFIG.to_dict()))
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                collect(value)

    collect(values)
    target, key = data.draw(st.sampled_from(places))
    target[key] = data.draw(JUNK)
    try:
        config = RankingConfig.from_dict(values)
    except (ValueError, OverflowError):
        return
    with torch.device("meta"):
        RankingModel(config)
