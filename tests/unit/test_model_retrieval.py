from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from hstu_compile.compare import error_bound, row_error
from hstu_compile.model import RetrievalConfig, RetrievalModel, retrieval
from hstu_compile.model.dialects import RESEARCH
from hstu_compile.model.families import model_from_state
from hstu_compile.model.retrieval import hour_of_day_table, next_timestamps
from tests import tolerances
from tests.research_reference import (
    History,
    ResearchForm,
    draw_histories,
    hour_encoding,
    jagged_inputs,
    research_state_dict,
)


def model_of(form: ResearchForm, dtype: torch.dtype = torch.float32) -> RetrievalModel:
    state = research_state_dict(form)
    config = RESEARCH.config({key: tuple(tensor.shape) for key, tensor in state.items()}, form.user_config())
    model = RetrievalModel(config)
    model.load_state_dict(
        {name: source.convert(state[source.key]) for name, source in RESEARCH.sources(config).items()}
    )
    return model.eval().requires_grad_(False).cast(dtype)


FORM = ResearchForm(item_dim=9, rating_dim=3)


@pytest.fixture(scope="module")
def model() -> RetrievalModel:
    return model_of(FORM, torch.float64)


def run(model: RetrievalModel, histories: list[History]) -> torch.Tensor:
    return model(**jagged_inputs(histories, model.config.has_ratings))


# --- Shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths",
    [[1], [0], [0, 0], [23], [0, 5, 0, 1, 0], [5, 0], [0, 5], [23, 23], [1] * 64, list(range(24))],
    ids=lambda lengths: f"{len(lengths)}x{max(lengths)}",
)
def test_a_batch_answers_as_its_sequences_do_alone(model: RetrievalModel, lengths: list[int]) -> None:
    histories = draw_histories(FORM, lengths)
    together = run(model, histories)
    assert together.shape == (len(lengths), 9)
    alone = torch.cat([run(model, [history]) for history in histories])
    assert row_error(together.numpy(), alone.numpy()).error <= tolerances.FLOAT64 * 1e3
    empty = torch.tensor([length == 0 for length in lengths])
    assert (together[empty] == 0).all()
    assert bool(torch.isclose(together[~empty].norm(dim=1), torch.ones(1, dtype=torch.float64)).all())


def test_empty_sequence_stays_zero_with_the_layer_norm_postprocessor() -> None:
    form = dataclasses.replace(FORM, postprocessor="layer_norm")
    users = run(model_of(form), draw_histories(form, [0, 4]))
    assert (users[0] == 0).all()
    assert bool(torch.isfinite(users).all())
    assert bool((users[1] != 0).any())


def test_permuting_sequences_permutes_answers(model: RetrievalModel) -> None:
    histories = draw_histories(FORM, [3, 0, 23, 1, 8])
    order = [2, 4, 0, 3, 1]
    plain, permuted = run(model, histories), run(model, [histories[b] for b in order])
    assert row_error(permuted.numpy(), plain[order].numpy()).error <= tolerances.FLOAT64 * 1e3
    assert row_error(permuted.numpy(), plain.numpy()).error > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_garbage_behind_the_last_offset_changes_nothing(dtype: torch.dtype) -> None:
    model = model_of(FORM, dtype)
    inputs = jagged_inputs(draw_histories(FORM, [3, 0, 23, 5]), True)
    garbage = {
        "item_ids": torch.tensor([-(2**31), 2**31 - 1, 7], dtype=torch.int32),
        "timestamps": torch.tensor([2**63 - 1, -(2**63), 0]),
        "ratings": torch.tensor([2**31 - 1, -5, 0], dtype=torch.int32),
    }
    dirty = {name: torch.cat([tensor, garbage[name]]) if name in garbage else tensor for name, tensor in inputs.items()}
    # More rows make the matrix products sum in another order: equal to rounding, not to the bit.
    precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    error = row_error(model(**dirty).numpy(), model(**inputs).double().numpy()).error
    assert error <= error_bound(0.0, precision)
    users, vectors = model(**inputs), model.item_vectors()
    clean = model.top_items(users, vectors, inputs["item_ids"], inputs["seq_offsets"], 10)
    same = model.top_items(users, vectors, dirty["item_ids"], dirty["seq_offsets"], 10)
    assert torch.equal(clean.ids, same.ids)
    assert torch.equal(clean.scores, same.scores)


def test_no_rows_but_garbage_is_a_batch_of_empty_sequences() -> None:
    model = model_of(ResearchForm())
    users = model(
        torch.tensor([5], dtype=torch.int32),
        torch.tensor([9]),
        torch.tensor([0, 0], dtype=torch.int32),
        torch.tensor([9]),
    )
    assert torch.equal(users, torch.zeros(1, 12))


def test_rated_user_embedding_is_as_wide_as_an_item(model: RetrievalModel) -> None:
    """The postprocessor keeps the columns of the item table: a dot product over D columns could not be formed."""
    inputs = jagged_inputs(draw_histories(FORM, [5, 2]), True)
    users = model(**inputs)
    last = model.layer_activations(**inputs)[-1][[4, 6], :9].numpy()
    expected = last / np.linalg.norm(last, axis=1, keepdims=True)
    assert row_error(users.numpy(), expected).error <= tolerances.FLOAT64
    top = model.top_items(users, model.item_vectors(), inputs["item_ids"], inputs["seq_offsets"], 5)
    assert top.ids.shape == (2, 5)


# --- Time -------------------------------------------------------------------------------------------------------------


def test_last_event_takes_the_request_time_and_the_others_the_next_event() -> None:
    timestamps = torch.tensor([10, 20, 30, 100, 500])
    offsets = torch.tensor([0, 3, 3, 4, 5], dtype=torch.int32)
    owner = torch.tensor([0, 0, 0, 2, 3])
    request = torch.tensor([31, 77, 101, 501])
    assert next_timestamps(timestamps, request, offsets, owner).tolist() == [20, 30, 31, 101, 501]


def test_request_time_changes_only_the_last_row_of_the_first_layer(model: RetrievalModel) -> None:
    histories = draw_histories(FORM, [6])
    later = [dataclasses.replace(histories[0], request_time=histories[0].request_time + 40_000_000)]
    first, second = (model.layer_activations(**jagged_inputs(each, True))[1] for each in (histories, later))
    assert torch.equal(first[:-1], second[:-1])
    assert not torch.equal(first[-1], second[-1])


@pytest.mark.parametrize("width", [2, 12, 50])
def test_hour_table_is_the_additive_sinusoid_of_halves(width: int) -> None:
    table = hour_of_day_table(width)
    assert (table.shape, table.dtype) == ((24, width), torch.float32)
    expected = np.array([hour_encoding(hour, width) for hour in range(24)])
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=2.0**-24)


def test_hour_table_is_not_periodic_over_the_day() -> None:
    table = torch.nn.functional.normalize(hour_of_day_table(50), dim=1)
    assert float(table[23] @ table[0]) == pytest.approx(0.525, abs=5e-4)
    assert float(table[12] @ table[0]) == pytest.approx(0.674, abs=5e-4)


@pytest.mark.parametrize("timestamp", [0, 3599, 3600, 86399, 86400, 1_700_000_000, -1, -3601])
def test_hour_encoding_adds_the_utc_hour_before_the_padding_mask(timestamp: int) -> None:
    form = ResearchForm()
    plain, encoded = model_of(form), model_of(dataclasses.replace(form, hour_encoding="additive"))
    ids, times = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([timestamp, timestamp])
    position = torch.tensor([0, 1])
    added = encoded.embed(ids, times, position, None) - plain.embed(ids, times, position, None)
    expected = hour_encoding(timestamp // 3600 % 24, 12)
    np.testing.assert_allclose(added[0].numpy(), expected, rtol=0, atol=1e-6)
    assert (added[1] == 0).all()


def test_hour_encoding_without_learned_positions() -> None:
    form = ResearchForm()
    config = dataclasses.replace(model_of(form).config, num_positions=0, hour_encoding="additive")
    model = RetrievalModel(config)
    assert model.position_embedding is None
    ids, times = torch.tensor([4], dtype=torch.int32), torch.tensor([5 * 3600])
    expected = model.item_embedding.weight[4].detach().double().numpy() * math.sqrt(12) + hour_encoding(5, 12)
    np.testing.assert_allclose(
        model.embed(ids, times, torch.tensor([0]), None)[0].detach().numpy(), expected, atol=1e-6
    )


# --- Ids and ratings --------------------------------------------------------------------------------------------------


def test_ids_and_ratings_outside_the_tables_are_clamped(model: RetrievalModel) -> None:
    times, position = torch.arange(3), torch.arange(3)

    def embed(ids: list[int], ratings: list[int]) -> torch.Tensor:
        return model.embed(
            torch.tensor(ids, dtype=torch.int32), times, position, torch.tensor(ratings, dtype=torch.int32)
        )

    assert torch.equal(embed([2**31 - 1, -3, 61], [99, 0, -1]), embed([60, 0, 60], [5, 0, 0]))


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_keep_tables_thresholds_and_answers_in_their_types(dtype: torch.dtype) -> None:
    exact, half = model_of(FORM), model_of(FORM, dtype)
    for theirs, ours in zip(exact.layers, half.layers, strict=True):
        assert ours.pos_table.dtype == ours.ts_table.dtype == torch.float32
        assert torch.equal(ours.pos_table, theirs.pos_table)
        assert torch.equal(ours.ts_table, theirs.ts_table)
        assert ours.ts_thresholds.dtype == torch.int64
        assert ours.uvqk_weight.dtype == ours.output_weight.dtype == dtype
    inputs = jagged_inputs(draw_histories(FORM, [5, 23]), True)
    assert {tensor.dtype for tensor in half.layer_activations(**inputs)} == {dtype}
    assert half(**inputs).dtype == half.item_vectors().dtype == torch.float32
    error = row_error(half(**inputs).numpy(), exact(**inputs).double().numpy()).error
    assert 0 < error < 64 * float(torch.finfo(dtype).eps)


def test_float64_model_computes_in_float64_and_copies_no_item_table() -> None:
    single = model_of(FORM)
    address = single.item_embedding.weight.data_ptr()
    model = single.cast(torch.float64)
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert types.pop("item_embedding.weight") == torch.float32
    assert model.item_embedding.weight.data_ptr() == address
    assert set(types.values()) == {torch.float64}
    assert model.dtype == model.item_vectors().dtype == torch.float64
    assert run(model, draw_histories(FORM, [4])).dtype == torch.float64


def test_float64_answers_are_those_of_a_table_in_float64() -> None:
    kept, copied = model_of(FORM, torch.float64), model_of(FORM).double()
    inputs = jagged_inputs(draw_histories(FORM, [5, 0, 23]), True)
    for ours, theirs in zip(kept.layer_activations(**inputs), copied.layer_activations(**inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(kept(**inputs), copied(**inputs))
    assert torch.equal(kept.item_vectors(), copied.item_vectors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_hold_the_item_table_in_their_type(dtype: torch.dtype) -> None:
    model = model_of(FORM, dtype)
    assert model.item_embedding.weight.dtype == model.dtype == dtype


def test_items_ranked_some_rows_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FORM, torch.float64)
    inputs = jagged_inputs(draw_histories(FORM, [5, 23]), True)
    users, asked = model(**inputs), (inputs["item_ids"], inputs["seq_offsets"], 7)
    whole = model.top_items(users, model.item_vectors(), *asked)
    for rows in (1, 7, FORM.num_items, FORM.num_items + 1):
        monkeypatch.setattr(retrieval, "_ITEMS_AT_ONCE", rows)
        assert torch.equal(torch.cat(list(model.item_parts())), model.item_vectors())
        parts = model.top_items(users, None, *asked)
        assert torch.equal(parts.ids, whole.ids)
        assert torch.allclose(parts.scores, whole.scores, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("hours", [False, True])
def test_a_model_of_given_weights_is_the_one_that_was_filled_with_them(dtype: torch.dtype, hours: bool) -> None:
    form = dataclasses.replace(FORM, hour_encoding="additive" if hours else "none")
    single, expected = model_of(form), model_of(form, dtype)
    state = single.state_dict()
    model = model_from_state(single.config, state, dtype)
    assert not model.training
    assert {name: (t.dtype, t.is_contiguous()) for name, t in model.state_dict().items()} == {
        name: (t.dtype, True) for name, t in expected.state_dict().items()
    }
    inputs = jagged_inputs(draw_histories(form, [5, 23]), True)
    assert torch.equal(model(**inputs), expected(**inputs))
    shared = model.item_embedding.weight.data_ptr() == state["item_embedding.weight"].data_ptr()
    assert shared == (dtype != torch.float16)


# --- Top items --------------------------------------------------------------------------------------------------------


def test_history_that_covers_every_item_leaves_empty_slots() -> None:
    form = ResearchForm(num_items=3)
    model = model_of(form)
    inputs = jagged_inputs(draw_histories(form, [1]), False)
    ids = torch.tensor([1, 2, 3], dtype=torch.int32)
    users = model(**inputs)
    top = model.top_items(users, model.item_vectors(), ids, torch.tensor([0, 3], dtype=torch.int32), 2)
    assert top.ids.tolist() == [[0, 0]]
    assert (top.scores == np.finfo(np.float32).min).all()
    assert top.ids.dtype == torch.int32


def test_padding_in_the_history_hides_no_item() -> None:
    form = ResearchForm(num_items=3)
    model = model_of(form)
    users = run(model, draw_histories(form, [2]))
    history = torch.tensor([0, 0, 2], dtype=torch.int32)
    top = model.top_items(users, model.item_vectors(), history, torch.tensor([0, 3], dtype=torch.int32), 3)
    assert sorted(top.ids[0].tolist()) == [0, 1, 3]


def test_items_are_l2_normalised_only_where_the_configuration_says_so() -> None:
    form = ResearchForm()
    model = model_of(form)
    assert bool(torch.isclose(model.item_vectors().norm(dim=1), torch.ones(1)).all())
    raw = RetrievalModel(dataclasses.replace(model.config, item_l2_norm=False))
    assert torch.equal(raw.item_vectors(), raw.item_embedding.weight[1:])


# --- Configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_items", 0, "num_items is 0"),
        ("num_layers", 0, "num_layers is 0"),
        ("postprocessor_eps", 0.0, "postprocessor_eps is 0.0"),
        ("num_positions", 5, "max_seq_len 23 exceeds the 5 learned positions"),
        ("num_ratings", 0, "num_ratings is 0"),
        ("item_embedding_dim", 12, "item_embedding_dim 12 leaves no room"),
        ("preprocessor", "positional", "only a rated model has ratings"),
        ("postprocessor", "none", "postprocessor is 'none'"),
    ],
)
def test_model_configuration_names_the_field_and_the_value(
    model: RetrievalModel, field: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(model.config, **{field: value})


def test_odd_widths_have_no_hour_encoding(model: RetrievalModel) -> None:
    layer = dataclasses.replace(model.config.layer, embedding_dim=13)
    with pytest.raises(ValueError, match="even embedding_dim"):
        dataclasses.replace(model.config, layer=layer, hour_encoding="additive")


def test_from_dict_lists_every_unknown_and_missing_field(model: RetrievalModel) -> None:
    values = model.config.to_dict()
    with pytest.raises(ValueError, match="no field a, b"):
        RetrievalConfig.from_dict({**values, "a": 1, "b": 2})
    del values["layer"], values["dialect"]
    with pytest.raises(ValueError, match="lacks dialect, layer"):
        RetrievalConfig.from_dict(values)
