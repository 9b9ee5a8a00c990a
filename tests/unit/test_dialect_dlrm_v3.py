from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from hstu_compile.checkpoint import config_from_file, model_from_spec, spec_from_checkpoint
from hstu_compile.compare import error_bound, row_error
from hstu_compile.errors import CheckpointError
from hstu_compile.model.ranking import RankingModel
from hstu_compile.model.ranking_config import RankingConfig
from tests import tolerances
from tests.dlrm_reference import (
    DlrmForm,
    Request,
    Trap,
    dlrm_state_dict,
    draw_requests,
    packed_inputs,
    reference_answers,
)

GOLDEN = Path(__file__).parents[3] / "shared" / "fixtures" / "meta_dlrm_ml100k"
# (events, candidates): below and above the least history of 20, with and without its candidates; nothing; only one.
SIZES = [(2, 20), (40, 3), (0, 4), (7, 0), (19, 1), (0, 0), (20, 0), (11, 5)]

CATEGORY, SHOP = "movie_category", "item_shop"
TWO_TASKS = (("like", "BINARY_CLASSIFICATION"), ("minutes", "REGRESSION"))
FORMS = {
    "plain": DlrmForm(),
    "one-head-one-layer": DlrmForm(num_heads=1, num_layers=1),
    "four-heads-three-layers": DlrmForm(num_heads=4, attention_dim=4, linear_dim=4, num_layers=3),
    "group-norm": DlrmForm(group_norm=True),
    "group-norm-dqk-above-dv": DlrmForm(group_norm=True, num_heads=3, attention_dim=9, linear_dim=4),
    "group-norm-of-one-head": DlrmForm(group_norm=True, num_heads=1),
    "dqk-equals-dv": DlrmForm(attention_dim=8, linear_dim=8),
    "no-context": DlrmForm(contextual=()),
    "context-without-least-history": DlrmForm(contextual=(("user_id", 1, 0),)),
    "several-contexts": DlrmForm(contextual=(("user_id", 1, 20), ("genres", 3, 0), ("towns", 2, 20))),
    "least-history-without-candidates": DlrmForm(min_history_counts="history"),
    "category": DlrmForm(additional=(CATEGORY,)),
    "two-additional-and-a-shop": DlrmForm(additional=(CATEGORY, "movie_year"), item_only=(SHOP,)),
    "two-tasks": DlrmForm(tasks=TWO_TASKS),
    "five-tasks-by-number": DlrmForm(tasks=(("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 1))),
    "regression-alone": DlrmForm(tasks=(("minutes", 1),)),
    "no-actions": DlrmForm(action_weights=()),
    "actions-of-several-bits": DlrmForm(action_weights=(3, 6, 1, 1 << 20, 5)),
    "l2-norm": DlrmForm(postprocessor="l2_norm"),
    "layer-norm": DlrmForm(postprocessor="layer_norm"),
    "clamp-at-table": DlrmForm(time_bucket_clamp="table"),
    "wider-than-the-time-table": DlrmForm(num_time_buckets=6),
    "log-buckets": DlrmForm(time_bucket_fn="log", time_bucket_clamp="table"),
    "fixed-divisor": DlrmForm(scaling_seq_len=57.0),
    "exact-hours": DlrmForm(time_feature_precision="exact"),
}


def save(form: DlrmForm, folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    path = folder / "ckpt.pt"
    torch.save(dlrm_state_dict(form) if state is None else state, path)
    return path


def model_of(form: DlrmForm, folder: Path, dtype: torch.dtype = torch.float64) -> RankingModel:
    model = model_from_spec(spec_from_checkpoint(save(form, folder), form.user_config()), dtype)
    assert isinstance(model, RankingModel)
    return model


def measured_errors(
    form: DlrmForm, model: RankingModel, trap: Trap | None = None, sizes: list[tuple[int, int]] = SIZES
) -> dict[str, float]:
    """Error of the activations of every layer, of both embeddings, of logits and predictions."""
    requests = draw_requests(form, sizes)
    expected = reference_answers(form, dlrm_state_dict(form), requests, trap).tensors()
    output = model.packed(packed_inputs(form, requests))
    actual = {f"activations {index}": rows for index, rows in enumerate(output.activations)}
    actual |= {
        "users": output.user_embeddings,
        "items": output.item_embeddings,
        "logits": output.logits,
        "preds": output.preds,
    }
    assert list(actual) == list(expected)
    return {name: row_error(tensor.numpy(), expected[name]).error for name, tensor in actual.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[DlrmForm], RankingModel]:
    """The float64 model of each form, read from a checkpoint once."""
    return functools.cache(lambda form: model_of(form, tmp_path_factory.mktemp("forms")))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_eager_model_equals_the_family_written_down_once_more(
    form: DlrmForm, models: Callable[[DlrmForm], RankingModel]
) -> None:
    errors = measured_errors(form, models(form))
    assert max(errors.values()) <= tolerances.FLOAT64 * 1e3, errors


# Where a detail can be seen; most in the plain form.
TRAP_FORMS: dict[Trap, DlrmForm] = {
    "joint-norm": FORMS["group-norm"],
    "log10-buckets": FORMS["log-buckets"],
    "action-equality": FORMS["actions-of-several-bits"],
    "additional-in-content": FORMS["category"],
    "sigmoid-everywhere": FORMS["two-tasks"],
    "float32-times": FORMS["clamp-at-table"],
    "positions-without-context": FORMS["several-contexts"],
}
# An epsilon is small beside O(1) rows, and pi is close to 3.14: still a hundred times what the agreement is held to.
SMALL_TRAPS = ("layer-eps-1e-5", "mlp-eps-1e-6", "postprocessor-eps-1e-6", "pi")


@pytest.mark.parametrize("trap", get_args(Trap))
def test_each_trap_of_the_family_would_be_seen(trap: Trap, models: Callable[[DlrmForm], RankingModel]) -> None:
    form = TRAP_FORMS.get(trap, FORMS["plain"])
    errors = measured_errors(form, models(form), trap)
    assert max(errors.values()) > (1e-7 if trap in SMALL_TRAPS else 1e-2), errors


# --- Golden outputs of the original -----------------------------------------------------------------------------------

golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/fixtures/meta_dlrm_ml100k is absent")


@pytest.fixture(scope="module")
def golden_arrays() -> dict[str, Any]:
    with np.load(GOLDEN / "golden.npz") as file:
        return dict(file)


def golden_model(dtype: torch.dtype = torch.float32, **changes: Any) -> RankingModel:
    config = {**config_from_file(GOLDEN / "config.json"), **changes}
    model = model_from_spec(spec_from_checkpoint(GOLDEN / "ckpt.pt", config), dtype)
    assert isinstance(model, RankingModel)
    return model


def golden_inputs(arrays: dict[str, Any], batch: str) -> dict[str, torch.Tensor]:
    """What the model takes of a batch: neither labels nor watch times of candidates are among it."""
    inputs = {}
    for name, dtype in (
        ("uih.user_id", torch.int32),
        ("uih.movie_id", torch.int32),
        ("uih.action_timestamp", torch.int64),
        ("uih.item_weights", torch.int32),
        ("cand.item_movie_id", torch.int32),
        ("cand.item_query_time", torch.int64),
    ):
        inputs[name.split(".")[1]] = torch.from_numpy(arrays[f"{batch}.{name}"]).to(dtype)
    for name, lengths in (("seq_offsets", "uih_lengths"), ("candidate_offsets", "num_candidates")):
        ends = np.cumsum(arrays[f"{batch}.{lengths}"]).tolist()
        inputs[name] = torch.tensor([0, *ends], dtype=torch.int32)
    return inputs


@golden
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", ["a", "b", "c"])
def test_golden_embeddings_and_predictions_of_the_original_within_1e_5(
    golden_arrays: dict[str, Any], batch: str, dtype: torch.dtype
) -> None:
    bound = error_bound(0.0, "fp32")
    assert bound == 1e-5
    output = golden_model(dtype).packed(golden_inputs(golden_arrays, batch))
    assert output.preds.dtype == dtype
    expected = {
        "users": (output.user_embeddings, golden_arrays[f"{batch}.candidates_user_embeddings"]),
        "items": (output.item_embeddings, golden_arrays[f"{batch}.candidates_item_embeddings"]),
        "preds": (output.preds, golden_arrays[f"{batch}.preds"].T),
    }
    for name, (actual, reference) in expected.items():
        assert row_error(actual.numpy(), reference.astype(np.float64)).error <= bound, name
    np.testing.assert_allclose(output.preds.numpy(), expected["preds"][1], rtol=bound, atol=0)
    np.testing.assert_allclose(output.preds.numpy(), torch.sigmoid(output.logits).numpy(), rtol=1e-6, atol=0)


@golden
@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({"min_history_counts": "history"}, "a"),
        ({"time_bucket_clamp": "table"}, "a"),
        ({"time_bucket_fn": "log"}, "a"),
        ({"scaling_seq_len": 256}, "a"),
        ({"action_weights": [2, 4, 8, 16, 1]}, "a"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_golden_is_missed_with_another_switch(
    golden_arrays: dict[str, Any], changes: dict[str, Any], batch: str
) -> None:
    if "action_weights" in changes:
        with pytest.raises(CheckpointError, match="_combined_action_weights"):
            golden_model(**changes)
        return
    users = golden_model(**changes).packed(golden_inputs(golden_arrays, batch)).user_embeddings
    assert row_error(users.numpy(), golden_arrays[f"{batch}.candidates_user_embeddings"]).error > 1e-3


@golden
def test_golden_agrees_with_the_family_written_down_once_more() -> None:
    """The reference that the other forms are compared with is held to the original too."""
    form = DlrmForm(
        width=64,
        table_dim=32,
        hidden=64,
        tower_hidden=512,
        num_layers=3,
        attention_dim=32,
        linear_dim=32,
        num_positions=8192,
        num_time_buckets=2048,
    )
    with np.load(GOLDEN / "golden.npz") as file:
        arrays = dict(file)
    requests = []
    events, candidates = (np.cumsum([0, *arrays[f"b.{name}"]]) for name in ("uih_lengths", "num_candidates"))
    for user in range(len(events) - 1):
        history, asked = slice(*events[user : user + 2]), slice(*candidates[user : user + 2])
        requests.append(
            Request(
                {"user_id": arrays["b.uih.user_id"][user : user + 1]},
                {"movie_id": arrays["b.uih.movie_id"][history]},
                arrays["b.uih.action_timestamp"][history],
                arrays["b.uih.item_weights"][history],
                {"item_movie_id": arrays["b.cand.item_movie_id"][asked]},
                arrays["b.cand.item_query_time"][asked],
            )
        )
    state = torch.load(GOLDEN / "ckpt.pt", map_location="cpu", weights_only=True)
    state = state.get("model_state_dict", state)
    expected = reference_answers(form, state, requests)
    assert row_error(arrays["b.candidates_user_embeddings"], expected.users).error <= 1e-5
    np.testing.assert_allclose(arrays["b.preds"].T, expected.preds, rtol=1e-5, atol=0)


@golden
def test_golden_config_is_accepted_as_it_is() -> None:
    config = golden_model().config
    attention = config.layer.attention
    assert (config.num_layers, config.layer.embedding_dim, config.table_dim) == (3, 64, 32)
    assert (attention.num_heads, attention.attention_dim, attention.linear_dim) == (2, 32, 32)
    assert (attention.alpha, config.scaling, config.layer.silu_scope) == (32**-0.5, "batch", "u")
    assert (config.max_history_len, config.max_candidates, config.contextual_len) == (245, 64, 1)
    assert (config.num_positions, config.num_time_buckets, config.largest_time_bucket) == (8192, 2048, 63)
    assert config.action_weights == (1, 2, 4, 8, 16)
    assert [table.num_rows for table in config.tables] == [1683, 944]


# --- Forms of checkpoints ---------------------------------------------------------------------------------------------


def states_equal(one: RankingModel, other: RankingModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_change_nothing(prefix: str, tmp_path: Path) -> None:
    form = FORMS["category"]
    plain = model_of(form, tmp_path)
    path = save(form, tmp_path, {prefix + key: tensor for key, tensor in dlrm_state_dict(form).items()})
    wrapped = model_from_spec(spec_from_checkpoint(path, form.user_config()), torch.float64)
    assert isinstance(wrapped, RankingModel)
    assert states_equal(plain, wrapped)


def test_half_tables_are_read_as_they_are(tmp_path: Path) -> None:
    form = FORMS["plain"]
    state = dlrm_state_dict(form)
    state |= {key: tensor.half() for key, tensor in state.items() if key.startswith("_embedding_collection")}
    spec = spec_from_checkpoint(save(form, tmp_path, state), form.user_config())
    assert spec.state_dict["tables.0.weight"].dtype == torch.float32
    model = model_from_spec(spec, torch.float64)
    assert isinstance(model, RankingModel)
    requests = draw_requests(form, SIZES)
    expected = reference_answers(form, state, requests)
    logits = model.packed(packed_inputs(form, requests)).logits
    assert row_error(logits.numpy(), expected.logits).error <= tolerances.FLOAT64 * 1e3


def test_configuration_may_stand_under_its_name_or_bare(tmp_path: Path) -> None:
    form = FORMS["log-buckets"]
    path, bare = save(form, tmp_path), form.user_config()
    ours = {name: bare.pop(name) for name in ("time_bucket_clamp", "time_bucket_fn", "scaling_seq_len")}
    notes = {"dataset": "random", "metrics": {"auc": 0.7}, "state_dict": {"a": [1]}}
    forms = [{**bare, **ours}, {"dlrm_hstu_config": bare, **ours, **notes}, {"dlrm_hstu_config": {**bare, **ours}}]
    first, *others = (spec_from_checkpoint(path, config).config for config in forms)
    assert isinstance(first, RankingConfig)
    assert (first.time_bucket_fn, first.time_bucket_clamp, first.scaling) == ("log", "table", "batch")
    assert all(other == first for other in others)


def test_what_stands_beside_the_nested_configuration_counts(tmp_path: Path) -> None:
    form = FORMS["plain"]
    config = {"dlrm_hstu_config": form.user_config(), "time_bucket_clamp": "table"}
    parsed = spec_from_checkpoint(save(form, tmp_path), config).config
    assert isinstance(parsed, RankingConfig)
    assert parsed.time_bucket_clamp == "table"


def test_task_types_by_number_and_by_name_are_the_same(tmp_path: Path) -> None:
    named = DlrmForm(tasks=(("like", "BINARY_CLASSIFICATION"), ("minutes", "REGRESSION")))
    numbered = DlrmForm(tasks=(("like", 0), ("minutes", 1)))
    path = save(named, tmp_path)
    one, other = (spec_from_checkpoint(path, form.user_config()).config for form in (named, numbered))
    assert one == other
    assert isinstance(one, RankingConfig)
    assert [(task.name, task.kind) for task in one.tasks] == [("like", "binary"), ("minutes", "regression")]


def test_limits_are_those_of_the_originals_data_loader(tmp_path: Path) -> None:
    form = DlrmForm(contextual=(("user_id", 1, 0), ("genres", 3, 0)))
    path = save(form, tmp_path)
    config = spec_from_checkpoint(path, form.user_config()).config
    assert isinstance(config, RankingConfig)
    assert (config.max_history_len, config.max_candidates) == (60 - 8 - 4, 24)
    served_as_trained = {**form.user_config(), "max_num_candidates_inference": None}
    config = spec_from_checkpoint(path, served_as_trained).config
    assert isinstance(config, RankingConfig)
    assert (config.max_history_len, config.max_candidates) == (48, 8)


def test_divisor_of_the_batch_or_a_number(tmp_path: Path) -> None:
    form = FORMS["plain"]
    path = save(form, tmp_path)
    for stated, scaling, divisor in (("batch", "batch", 76.0), (None, "batch", 76.0), (100, "fixed", 100.0)):
        config = spec_from_checkpoint(path, {**form.user_config(), "scaling_seq_len": stated}).config
        assert isinstance(config, RankingConfig)
        assert config.scaling == scaling
        # With "batch" no forward uses it.
        assert config.layer.attention.scaling_seq_len == (divisor if scaling == "fixed" else 1 + 51 + 24)


def test_external_embeddings_leave_the_tables_in_the_checkpoint(tmp_path: Path) -> None:
    form = FORMS["category"]
    state, config = dlrm_state_dict(form), {**form.user_config(), "external_embeddings": True}
    tables = {key for key in state if key.startswith("_embedding_collection")}
    spec = spec_from_checkpoint(save(form, tmp_path), config)
    assert isinstance(spec.config, RankingConfig)
    assert spec.config.external_embeddings
    assert not any(name.startswith("tables.") for name in spec.state_dict)
    assert tables <= set(spec.ignored_keys)
    # A checkpoint whose tables do not fit into it says their sizes beside it.
    sizes = {"embedding_tables": {table.name: [table.num_rows, 6] for table in spec.config.tables}}
    path = save(form, tmp_path, {key: tensor for key, tensor in state.items() if key not in tables})
    without = spec_from_checkpoint(path, {**config, **sizes})
    assert isinstance(without.config, RankingConfig)
    assert sorted(without.config.tables, key=str) == sorted(spec.config.tables, key=str)
    assert without.state_dict.keys() == spec.state_dict.keys()


def test_ignored_keys_are_those_that_no_weight_comes_from(tmp_path: Path) -> None:
    additional = {
        f"_hstu_transducer._input_preprocessor._additional_embedding_mlp.{layer}.{part}"
        for layer in range(4)
        for part in ("weight", "bias")
    }
    for name, ignored in (("plain", additional), ("category", set())):
        form = FORMS[name]
        spec = spec_from_checkpoint(save(form, tmp_path), form.user_config())
        assert set(spec.ignored_keys) == ignored | {
            "_hstu_transducer._input_preprocessor._action_encoder._combined_action_weights",
            "_hstu_transducer._output_postprocessor._period_units",
            "_hstu_transducer._output_postprocessor._units_per_period",
        }
