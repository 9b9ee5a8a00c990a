"""What a person reads whose DLRM-HSTU checkpoint or configuration cannot be compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hstu_compile.model.dialects import DLRM_V3, DialectError
from hstu_compile.model.families import model_from_config
from hstu_compile.model.ranking_config import RankingConfig
from tests.dlrm_reference import DlrmForm, dlrm_state_dict

FORM = DlrmForm(contextual=(("user_id", 1, 20), ("genres", 2, 0)), additional=("movie_category",))
CONFIG = FORM.user_config()
SHAPES = {key: tuple(tensor.shape) for key, tensor in dlrm_state_dict(FORM).items()}

PREPROCESSOR = "_hstu_transducer._input_preprocessor."
ENCODER = "_hstu_transducer._positional_encoder."
LAYER_0 = "_hstu_transducer._stu_module._stu_layers.0."
MOVIES = "_embedding_collection.embeddings.movie_id.weight"

Shapes = dict[str, tuple[int, ...]]


def refusal(config: Any, shapes: Shapes, problem: str, *seen: str) -> None:
    """The refusal of a checkpoint with these shapes: its problem, and what its message and its advice name."""
    with pytest.raises(DialectError) as caught:
        DLRM_V3.config(shapes, config)
    error = caught.value
    assert error.problem == problem, str(error)
    assert error.fix
    text = f"{error} | {error.fix}"
    for value in seen:
        assert value in text, f"{value!r} is not in: {text}"


def assert_in_words(error: DialectError, *problems: str) -> None:
    """A refusal that a person can act on."""
    assert error.problem in problems
    assert str(error)
    assert error.fix


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name not in names}


def reshaped(**shapes: tuple[int, ...] | None) -> Shapes:
    """The checkpoint's shapes with some replaced; None takes a tensor out."""
    changed = {**SHAPES, **shapes}
    return {key: shape for key, shape in changed.items() if shape is not None}


def test_plain_form_is_taken() -> None:
    assert isinstance(DLRM_V3.config(SHAPES, CONFIG), RankingConfig)


def test_nothing_can_be_read_without_a_configuration() -> None:
    refusal(None, SHAPES, "config", "number of heads", "--config FILE", "DlrmHSTUConfig")


@pytest.mark.parametrize(
    ("absent", "problem", "seen"),
    [
        (("hstu_num_heads",), "heads", ("hstu_num_heads must be given", "products")),
        (("hstu_num_heads", "hstu_attn_qk_dim"), "heads", ("hstu_num_heads, hstu_attn_qk_dim must be given",)),
        (("hstu_attn_qk_dim",), "config", ("hstu_attn_qk_dim must be given",)),
        (("hstu_attn_linear_dim",), "config", ("hstu_attn_linear_dim must be given",)),
        (("max_seq_len",), "config", ("max_seq_len is missing", "training run")),
        (("multitask_configs",), "config", ("multitask_configs is missing or empty",)),
        (("uih_post_id_feature_name",), "config", ("uih_post_id_feature_name is None", "add")),
        (("uih_action_time_feature_name",), "config", ("uih_action_time_feature_name is None", "add")),
        (("candidates_querytime_feature_name",), "config", ("candidates_querytime_feature_name is None", "add")),
        (("uih_weight_feature_name",), "config", ("uih_weight_feature_name is None", "add")),
        (("item_embedding_feature_names",), "shape", ("0 additional features (none)", "item_embedding_feature_names")),
        (("user_embedding_feature_names",), "shape", ("0 additional features (none)", "user_embedding_feature_names")),
        (
            ("merge_uih_candidate_feature_mapping",),
            "config",
            ("'movie_id' has no counterpart among the candidates", "add the pair to merge_uih_candidate"),
        ),
        (("max_num_candidates", "max_num_candidates_inference"), "config", ("for 0 candidates", "correct")),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else value,
)
def test_what_must_be_in_the_configuration(absent: tuple[str, ...], problem: str, seen: tuple[str, ...]) -> None:
    refusal(without(*absent), SHAPES, problem, *seen)


@pytest.mark.parametrize(
    ("changes", "problem", "seen"),
    [
        # What the shapes say otherwise.
        ({"hstu_attn_num_layers": 3}, "shape", ("hstu_attn_num_layers = 3", "say 2", "correct hstu_attn_num_layers")),
        ({"hstu_transducer_embedding_dim": 16}, "shape", ("hstu_transducer_embedding_dim = 16", "say 12")),
        ({"hstu_embedding_table_dim": 8}, "shape", ("hstu_embedding_table_dim = 8", "say 6")),
        ({"hstu_preprocessor_hidden_dim": 256}, "shape", ("hstu_preprocessor_hidden_dim = 256", "say 10")),
        ({"hstu_num_heads": 3}, "shape", ("hstu_num_heads 3", "72 columns", "the checkpoint has 48 and 42")),
        ({"hstu_num_heads": 10**30}, "shape", ("hstu_num_heads 1000", "the checkpoint has 48 and 42")),
        ({"hstu_attn_qk_dim": 7}, "shape", ("hstu_attn_qk_dim 7", "56 columns")),
        ({"hstu_attn_qk_dim": 7, "hstu_attn_linear_dim": 5}, "shape", ("30 rows", "48 and 42")),
        ({"embedding_tables": {"movie_id": [41, 6]}}, "shape", ("table movie_id is [41, 6]", "is [40, 6]")),
        (
            {"merge_uih_candidate_feature_mapping": CONFIG["merge_uih_candidate_feature_mapping"][:-1]},
            "config",
            ("item_movie_category has no embedding table", "add the pair to merge_uih_candidate_feature_mapping"),
        ),
        # Numbers.
        ({"hstu_num_heads": 0}, "heads", ("hstu_num_heads must be given, at least 1",)),
        ({"hstu_num_heads": "2"}, "config", ("hstu_num_heads is '2'", "non-negative integer")),
        ({"hstu_num_heads": True}, "config", ("hstu_num_heads is True",)),
        ({"max_seq_len": 10}, "config", ("max_seq_len 10 - max_num_candidates 8 - 3", "leaves -1 history events")),
        ({"max_seq_len": 10**400}, "config", ("max_seq_len 1000", "is above 2147483647")),
        ({"max_num_candidates_inference": 1 << 31}, "config", ("max_num_candidates_inference 2147483648 is above",)),
        *[
            (
                {"scaling_seq_len": value},
                "config",
                (f"scaling_seq_len is {value!r}", "batch", "correct scaling_seq_len"),
            )
            for value in (0, -1.0, float("nan"), float("inf"), 10**400, "", "max", True, [1], {})
        ],
        # Switches.
        ({"hstu_group_norm": "yes"}, "config", ("hstu_group_norm is 'yes'", "true or false")),
        ({"enable_postprocessor": 1}, "config", ("enable_postprocessor is 1", "true or false")),
        ({"time_bucket_fn": "log10"}, "unsupported", ("time_bucket_fn 'log10'", "sqrt, log")),
        ({"time_bucket_clamp": "rows"}, "unsupported", ("time_bucket_clamp 'rows'", "embedding_dim, table")),
        ({"time_bucket_clamp": 63}, "config", ("time_bucket_clamp is 63", "embedding_dim, table")),
        ({"time_feature_precision": "fp32"}, "unsupported", ("'fp32'", "float32, exact")),
        ({"min_history_counts": "uih"}, "unsupported", ("'uih'", "history_and_candidates, history")),
        # Misspelt.
        ({"hstu_groupnorm": True}, "config", ("hstu_groupnorm (nearest: hstu_group_norm)", "correct or remove")),
        ({"time_bucket_clmap": "table"}, "config", ("time_bucket_clmap (nearest: time_bucket_clamp)",)),
        # Tasks.
        ({"multitask_configs": []}, "config", ("multitask_configs is missing or empty",)),
        ({"multitask_configs": ["like"]}, "config", ("multitask_configs is missing or empty",)),
        *[
            (
                {"multitask_configs": [{"task_name": "like", "task_type": kind}]},
                "config",
                (f"task_type {kind!r}", "(1)"),
            )
            for kind in ("BCE", 2, True, 1.0, None, ["REGRESSION"])
        ],
        ({"multitask_configs": [{"task_name": 3, "task_type": 0}]}, "config", ("task_name 3", "a string")),
        (
            {"multitask_configs": [{"task_name": "a", "task_type": 1}, {"task_name": "b", "task_type": 0}]},
            "config",
            ("tasks are regression, binary; binary tasks come before",),
        ),
        ({"multitask_configs": [{"task_name": "a", "task_type": 0}] * 2}, "config", ("two tasks have one name",)),
        # Actions.
        ({"action_weights": "12"}, "config", ("action_weights is '12'", "list of bitmasks")),
        ({"action_weights": {"1": 2}}, "config", ("action_weights is {'1': 2}", "list of bitmasks")),
        ({"action_weights": [1, 1 << 30]}, "config", ("action weight 1073741824 is not a bitmask of 1 to 30 bits",)),
        ({"action_weights": [0]}, "config", ("action weight 0 is not a bitmask",)),
        ({"action_weights": [1.0]}, "config", ("action weight 1.0 is not a bitmask",)),
        # Names of features and tables.
        ({"uih_post_id_feature_name": "film"}, "config", ("'film' has no counterpart",)),
        ({"uih_action_time_feature_name": ""}, "config", ("an input has an empty name",)),
        ({"uih_action_time_feature_name": "movie_id"}, "config", ("two inputs are named movie_id",)),
        ({"uih_action_time_feature_name": "seq_offsets"}, "config", ("seq_offsets cannot name a feature",)),
        ({"item_embedding_feature_names": "item_movie_id"}, "config", ("it must be a list of strings",)),
        (
            {"item_embedding_feature_names": [*CONFIG["item_embedding_feature_names"], "item_colour"]},
            "config",
            (
                "item_colour has no embedding table: none is named item_colour",
                "genres, movie_category, movie_id, user_id",
            ),
        ),
        (
            {"contextual_feature_to_max_length": {"town": 1}, "contextual_feature_to_min_uih_length": {}},
            "config",
            ("town has no embedding table",),
        ),
        (
            {"merge_uih_candidate_feature_mapping": [["movie_id", "item_movie_id"], ["movie_id", "item_other"]]},
            "config",
            ("names movie_id more than once",),
        ),
        ({"merge_uih_candidate_feature_mapping": {"a": "b"}}, "config", ("not a list of pairs", "[[history feature,")),
        ({"merge_uih_candidate_feature_mapping": [["a", "b", "c"]]}, "config", ("not a list of pairs",)),
        ({"merge_uih_candidate_feature_mapping": [["a", 1]]}, "config", ("not a list of pairs",)),
        # Contextual features.
        ({"contextual_feature_to_max_length": ["user_id"]}, "config", ("must map names to non-negative integers",)),
        ({"contextual_feature_to_max_length": {"user_id": "1"}}, "config", ("must map names to",)),
        ({"contextual_feature_to_max_length": {1: 2}}, "config", ("must map names to",)),
        (
            {"contextual_feature_to_max_length": {"user_id": 0}},
            "config",
            ("contextual_feature_to_max_length of user_id is 0; allowed: 1 to",),
        ),
        (
            {"contextual_feature_to_min_uih_length": {"user_id": 1 << 31}},
            "config",
            ("contextual_feature_to_min_uih_length of user_id is 2147483648",),
        ),
        (
            {"contextual_feature_to_min_uih_length": {"user": 20}},
            "config",
            ("names user, which is no contextual feature; contextual features: user_id, genres",),
        ),
        # Tables.
        *[
            ({"embedding_tables": tables}, "config", ("embedding_tables is", "map names to [rows, width]"))
            for tables in ({"a": [1]}, {"a": ["x", 6]}, {"a": [2.5, 6]}, {"a": [0, 6]}, {"a": [None, 6]}, {1: [2, 6]})
        ],
        ({"embedding_tables": 5}, "config", ("embedding_tables is 5",)),
        (
            {"embedding_tables": {"town": [9, 8]}, "external_embeddings": True},
            "shape",
            ("table town is 8 wide, the preprocessor takes 6",),
        ),
        ({"external_embeddings": "yes"}, "config", ("external_embeddings is 'yes'", "true or false")),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_configuration_that_cannot_be(changes: dict[str, Any], problem: str, seen: tuple[str, ...]) -> None:
    refusal({**CONFIG, **changes}, SHAPES, problem, *seen)
    if not set(changes) & {"hstu_groupnorm", "time_bucket_clmap"}:
        refusal({"dlrm_hstu_config": {**CONFIG, **changes}}, SHAPES, problem, *seen)


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        ({"dlrm_hstu_config": None}, "dlrm_hstu_config is a NoneType; it must be an object"),
        ({"dlrm_hstu_config": [1]}, "dlrm_hstu_config is a list; it must be an object"),
        ({"dlrm_hstu_config": CONFIG, "time_bucket_clmap": "table"}, "time_bucket_clmap (nearest: time_bucket_clamp)"),
        ({"dlrm_hstu_config": CONFIG, "time_bucket_clamp": True}, "time_bucket_clamp is True"),
    ],
)
def test_nested_configuration_that_cannot_be(config: dict[str, Any], seen: str) -> None:
    refusal(config, SHAPES, "config", seen)


@pytest.mark.parametrize(
    ("shapes", "problem", "seen"),
    [
        *[
            (reshaped(**{key: None}), "keys", (f"the checkpoint lacks {key}", "whole model's state_dict"))
            for key in (
                ENCODER + "_position_embeddings_weight",
                ENCODER + "_timestamp_embeddings_weight",
                LAYER_0 + "_uvqk_weight",
                LAYER_0 + "_output_weight",
                PREPROCESSOR + "_content_embedding_mlp.0.weight",
                "_item_embedding_mlp.0.weight",
                "_multitask_module._prediction_module.2.weight",
            )
        ],
        *[
            (reshaped(**{key: shape}), "shape", (f"{key} has shape {list(shape)}", "must have 2 dimensions"))
            for key, shape in (
                (ENCODER + "_position_embeddings_weight", (30,)),
                (ENCODER + "_timestamp_embeddings_weight", (51, 12, 1)),
                (LAYER_0 + "_uvqk_weight", ()),
                (MOVIES, (240,)),
            )
        ],
        *[
            (reshaped(**{key: shape}), "shape", (f"{key} has shape {list(shape)}", "it is empty"))
            for key, shape in ((ENCODER + "_position_embeddings_weight", (0, 12)), (MOVIES, (0, 6)))
        ],
        (
            reshaped(**{ENCODER + "_timestamp_embeddings_weight": (1, 12)}),
            "shape",
            ("_timestamp_embeddings_weight has 1 row",),
        ),
        (reshaped(**{MOVIES: (2**40, 6)}), "shape", ("num_rows of movie_id is 1099511627776; it must be at most",)),
        (reshaped(**{MOVIES: (40, 7)}), "shape", ("table movie_id is 7 wide, the preprocessor takes 6",)),
        (reshaped(**{MOVIES: None}), "config", ("movie_id has no embedding table: none is named movie_id",)),
        (
            {key: shape for key, shape in SHAPES.items() if not key.startswith("_embedding_collection")},
            "keys",
            ("no embedding table", "--embeddings external"),
        ),
        (
            reshaped(**{"_hstu_transducer._stu_module._stu_layers.999999999._uvqk_weight": (12, 48)}),
            "keys",
            ("a layer 999999999 and only",),
        ),
        (
            reshaped(**{PREPROCESSOR + "_additional_embedding_mlp.0.weight": (10, 12)}),
            "shape",
            ("[10, 12]", "1 additional features (movie_category) of 6 numbers each"),
        ),
        (
            reshaped(**{PREPROCESSOR + "_additional_embedding_mlp.0.weight": ()}),
            "shape",
            ("_additional_embedding_mlp.0.weight has shape []",),
        ),
        (
            reshaped(**{PREPROCESSOR + "_content_embedding_mlp.0.weight": (70_000, 6)}),
            "config",
            ("hidden_dim is 70000; it must be at most 65536",),
        ),
    ],
    ids=lambda value: None,
)
def test_checkpoint_that_cannot_be(shapes: Shapes, problem: str, seen: tuple[str, ...]) -> None:
    config = without("hstu_attn_num_layers", "hstu_preprocessor_hidden_dim")
    refusal(config, shapes, problem, *seen)


def test_heads_wider_than_the_operator_takes() -> None:
    shapes = reshaped(**{LAYER_0 + "_uvqk_weight": (12, 2 * 2 * (300 + 7))})
    refusal({**CONFIG, "hstu_attn_qk_dim": 300}, shapes, "config", "attention_dim is 300; allowed: 1 to 256")


def test_misspelt_name_of_a_note_is_let_pass() -> None:
    notes = {"comment": "run 7", "metrics": {"auc": 0.7}, 3: "a key that is no string"}
    assert DLRM_V3.config(SHAPES, {**CONFIG, **notes}) == DLRM_V3.config(SHAPES, CONFIG)


# --- Any value --------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["movie_id", "item_movie_id", "user_id", "genres", "preds", "", "x"])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 80),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 10**400, -(10**400)]),
    st.floats(),
    NAMES,
    st.sampled_from(["batch", "REGRESSION", "table", "log"]),
    st.binary(max_size=2),
)
VALUES = st.one_of(
    SCALARS,
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.one_of(NAMES, st.integers(0, 2)), inner, max_size=2),
            st.fixed_dictionaries({"task_name": inner, "task_type": inner}),
        ),
        max_leaves=6,
    ),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(
        st.one_of(st.sampled_from([*CONFIG, "embedding_tables", "external_embeddings", "dlrm_hstu_config"]), SCALARS),
        VALUES,
        min_size=1,
        max_size=2,
    )
)
@example(changes={"contextual_feature_to_max_length": {"user_id": 0}})
@example(changes={"scaling_seq_len": 10**400})
def test_any_value_is_taken_or_refused_in_words(changes: dict[Any, Any]) -> None:
    try:
        config = DLRM_V3.config(SHAPES, {**CONFIG, **changes})
    except DialectError as error:
        assert_in_words(error, "config", "heads", "shape", "unsupported", "keys")
        return
    with torch.device("meta"):
        names = model_from_config(config).state_dict().keys()
    assert names == DLRM_V3.sources(config).keys()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(key=st.sampled_from(sorted(SHAPES)), shape=st.lists(st.sampled_from([0, 1, 6, 12, 48, 2**40]), max_size=3))
def test_any_shape_is_taken_or_refused_in_words(key: str, shape: list[int]) -> None:
    try:
        DLRM_V3.config({**SHAPES, key: tuple(shape)}, CONFIG)
    except DialectError as error:
        assert_in_words(error, "config", "shape")
