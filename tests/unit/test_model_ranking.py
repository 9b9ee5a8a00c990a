from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu_compile.compare import error_bound, row_error
from hstu_compile.model.dialects import DLRM_V3
from hstu_compile.model.layer import KeyValue
from hstu_compile.model.ranking import RankingModel, RankingOutput
from hstu_compile.model.ranking_config import RankingConfig
from tests import tolerances
from tests.dlrm_reference import (
    ACTIONS,
    HISTORY,
    QUERY_TIME,
    TIME,
    DlrmForm,
    Request,
    dlrm_state_dict,
    draw_requests,
    packed_inputs,
    reference_answers,
)

FLOAT64 = tolerances.FLOAT64 * 1e3

FORMS = {
    "plain": DlrmForm(),
    "no-context": DlrmForm(contextual=(), action_weights=()),
    "fixed-divisor": DlrmForm(scaling_seq_len=57.0, min_history_counts="history"),
    "all": DlrmForm(
        contextual=(("user_id", 1, 20), ("genres", 3, 5)),
        additional=("movie_category",),
        item_only=("item_shop",),
        tasks=(("like", 0), ("minutes", 1)),
        group_norm=True,
        postprocessor="l2_norm",
        time_bucket_clamp="table",
    ),
}
# A request answers alike in any company: nothing of the batch goes into it.
ALONE = dataclasses.replace(FORMS["fixed-divisor"], contextual=(("user_id", 1, 0), ("genres", 3, 5)))

Tensors = dict[str, torch.Tensor]


def model_of(form: DlrmForm, dtype: torch.dtype = torch.float64, **changes: Any) -> RankingModel:
    state = dlrm_state_dict(form)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    config = DLRM_V3.config(shapes, {**form.user_config(), **changes})
    assert isinstance(config, RankingConfig)
    model = RankingModel(config)
    sources = DLRM_V3.sources(config)
    model.load_state_dict({name: source.convert(state[source.key]) for name, source in sources.items()})
    return model.eval().requires_grad_(False).cast(dtype)


MODELS = {name: model_of(form) for name, form in {**FORMS, "alone": ALONE}.items()}


def packed(model: RankingModel, form: DlrmForm, requests: Sequence[Request]) -> RankingOutput:
    return model.packed(packed_inputs(form, requests))


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert row_error(actual.numpy(), expected.numpy()).error <= FLOAT64


def offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], dtype=torch.int32)


# --- Encoding once, scoring in portions -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What `prefill` leaves for `score`."""

    key_values: tuple[KeyValue, ...]
    request_inputs: Tensors


def divisors(form: DlrmForm, requests: Sequence[Request], together: bool) -> torch.Tensor:
    """[B] of the batch, or of each request as a batch of its own."""
    events, candidates = ([len(getattr(r, name)) for r in requests] for name in ("times", "query_times"))
    if together:
        events, candidates = [max(events)] * len(requests), [max(candidates)] * len(requests)
    return torch.tensor([u + t + form.context for u, t in zip(events, candidates, strict=True)], dtype=torch.float32)


def encode(model: RankingModel, form: DlrmForm, requests: Sequence[Request], *, together: bool = True) -> Encoded:
    inputs = packed_inputs(form, requests)
    times = [int(r.query_times[-1]) if len(r.query_times) else 0 for r in requests]
    of_request = {"request_timestamps": torch.tensor(times)}
    if model.config.scaling == "batch":
        of_request["scaling_seq_lens"] = divisors(form, requests, together)
    features = {name: inputs[name] for name in (*model.config.history_features, *model.config.contextual_names)}
    features |= of_request | {"seq_offsets": inputs["seq_offsets"]}
    if model.config.counts_candidates:
        features["num_candidates"] = torch.tensor([len(r.query_times) for r in requests], dtype=torch.int32)
    output = model.prefill(features)
    rows = torch.arange(len(requests) + 1, dtype=torch.int32) * form.context
    return Encoded(output.key_values, of_request | {"cache_offsets": inputs["seq_offsets"] + rows})


def score(
    model: RankingModel, form: DlrmForm, requests: Sequence[Request], encoded: Encoded, chosen: list[list[int]]
) -> torch.Tensor:
    """Logits of the chosen candidates of each request, request by request."""
    portions = [request.only(indices) for request, indices in zip(requests, chosen, strict=True)]
    inputs = packed_inputs(form, portions)
    features = {name: inputs[name] for name in model.config.candidate_features}
    features["candidate_offsets"] = inputs["candidate_offsets"]
    return model.score(features | encoded.request_inputs, encoded.key_values).logits


SIZES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes=SIZES, seed=st.integers(0, 99), data=st.data())
def test_any_portions_in_any_order_score_as_one_packed_forward(
    name: str, sizes: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    form, model = FORMS[name], MODELS[name]
    requests = draw_requests(form, sizes, seed)
    expected = packed(model, form, requests).logits
    encoded = encode(model, form, requests)
    starts = offsets([candidates for _, candidates in sizes]).tolist()
    pairs = [(user, index) for user, (_, candidates) in enumerate(sizes) for index in range(candidates)]
    order = data.draw(st.permutations(pairs))
    portion = data.draw(st.integers(1, 4))
    for first in range(0, len(order), portion):
        chosen: list[list[int]] = [[] for _ in sizes]
        for user, index in order[first : first + portion]:
            chosen[user].append(index)
        rows = [starts[user] + index for user, indices in enumerate(chosen) for index in indices]
        assert_equal(score(model, form, requests, encoded, chosen), expected[rows])


@pytest.mark.parametrize("name", ["plain", "all"])
def test_requests_encoded_together_score_as_batches_of_their_own(name: str) -> None:
    """A divisor per request: what a server does that packs requests whose training saw one batch each."""
    form, model = FORMS[name], MODELS[name]
    requests = draw_requests(form, [(7, 3), (0, 2), (19, 5), (4, 1)])
    encoded = encode(model, form, requests, together=False)
    together = score(model, form, requests, encoded, [list(range(len(r.query_times))) for r in requests])
    assert_equal(together, torch.cat([packed(model, form, [request]).logits for request in requests]))
    assert row_error(together.numpy(), packed(model, form, requests).logits.numpy()).error > 1e-3


def test_prefill_keeps_rows_of_every_layer_and_stops_before_the_last_output() -> None:
    form, model = FORMS["all"], MODELS["all"]
    requests = draw_requests(form, [(3, 1), (0, 2), (5, 0)])
    inputs = packed_inputs(form, requests)
    features = {name: inputs[name] for name in (*model.config.history_features, *model.config.contextual_names)}
    features |= {"seq_offsets": inputs["seq_offsets"], "request_timestamps": torch.zeros(3, dtype=torch.int64)}
    features |= {"num_candidates": torch.tensor([1, 2, 0]), "scaling_seq_lens": torch.full((3,), 11.0)}
    output = model.prefill(features)
    assert len(output.key_values) == len(output.activations) == form.num_layers
    for key_value in output.key_values:
        assert key_value.k.shape == (3 * 4 + 8, form.num_heads, form.attention_dim)
        assert key_value.v.shape == (3 * 4 + 8, form.num_heads, form.linear_dim)


@pytest.mark.parametrize("name", FORMS)
def test_no_candidates_and_no_history_are_empty_portions(name: str) -> None:
    form, model = FORMS[name], MODELS[name]
    requests = draw_requests(form, [(0, 0), (0, 0)])
    encoded = encode(model, form, requests)
    assert encoded.key_values[0].k.shape[0] == 2 * form.context
    assert score(model, form, requests, encoded, [[], []]).shape == (0, len(form.tasks))


# --- Shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "sizes",
    [[(0, 0)], [(0, 0)] * 3, [(1, 0)], [(0, 1)], [(1, 1)], [(0, 5)], [(5, 0)], [(0, 0), (4, 2), (0, 0)], [(48, 24)]],
    ids=lambda sizes: " ".join(f"{u}+{t}" for u, t in sizes),
)
def test_batches_of_any_shape(name: str, sizes: list[tuple[int, int]]) -> None:
    form = FORMS[name]
    requests = draw_requests(form, sizes)
    output = packed(MODELS[name], form, requests)
    expected = reference_answers(form, dlrm_state_dict(form), requests)
    assert output.preds.shape == (sum(t for _, t in sizes), len(form.tasks))
    assert output.activations[-1].shape == (sum(u + t + form.context for u, t in sizes), form.width)
    assert row_error(output.activations[-1].numpy(), expected.activations[-1]).error <= FLOAT64
    assert row_error(output.logits.numpy(), expected.logits).error <= FLOAT64


# --- Who influences whom ----------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99), data=st.data())
def test_permuting_users_permutes_answers(sizes: list[tuple[int, int]], seed: int, data: st.DataObject) -> None:
    form, model = FORMS["plain"], MODELS["plain"]
    requests = draw_requests(form, sizes, seed)
    order = data.draw(st.permutations(range(len(sizes))))
    plain, permuted = (packed(model, form, each).logits for each in (requests, [requests[b] for b in order]))
    starts = offsets([t for _, t in sizes]).tolist()
    assert_equal(permuted, plain[[row for b in order for row in range(starts[b], starts[b + 1])]])


@settings(max_examples=8, deadline=None)
@given(candidates=st.integers(2, 7), seed=st.integers(0, 99), data=st.data())
def test_candidates_do_not_see_one_another(candidates: int, seed: int, data: st.DataObject) -> None:
    """With any other candidates in front, the last one (which dates the request) and each of the rest stay."""
    model = MODELS["alone"]
    (request,) = draw_requests(ALONE, [(9, candidates)], seed)
    expected = packed(model, ALONE, [request]).logits
    kept = data.draw(st.lists(st.integers(0, candidates - 2), unique=True))
    assert_equal(packed(model, ALONE, [request.only([*kept, candidates - 1])]).logits, expected[[*kept, -1]])
    (other,) = draw_requests(ALONE, [(9, candidates)], seed + 1)
    replaced = {
        name: np.concatenate([other.candidates[name][:-1], ids[-1:]]) for name, ids in request.candidates.items()
    }
    changed = packed(model, ALONE, [dataclasses.replace(request, candidates=replaced)]).logits
    assert_equal(changed[-1:], expected[-1:])


def test_one_user_never_changes_another() -> None:
    model = MODELS["alone"]
    requests = draw_requests(ALONE, [(5, 3), (9, 2), (0, 4)])
    strangers = draw_requests(ALONE, [(30, 7), (9, 2), (2, 0)], seed=5)
    alone = packed(model, ALONE, [requests[1]]).logits
    assert_equal(packed(model, ALONE, requests).logits[3:5], alone)
    assert_equal(packed(model, ALONE, [strangers[0], requests[1], strangers[2]]).logits[7:9], alone)
    assert row_error(packed(model, ALONE, strangers).logits[7:9].numpy(), alone.numpy()).error > 1e-2


@pytest.mark.parametrize("name", FORMS)
def test_labels_of_candidates_are_no_input(name: str) -> None:
    """Actions belong to the history: the candidates' have no name here, and what else is in a batch is not read."""
    form, model = FORMS[name], MODELS[name]
    requests = draw_requests(form, [(6, 4), (0, 3)])
    assert set(model.config.candidate_features) == {*form.item_ids, QUERY_TIME}
    assert not {"item_action_weights", "item_watch_time"} & {
        *model.config.history_features,
        *model.config.candidate_features,
        *model.config.contextual_names,
    }
    inputs = packed_inputs(form, requests)
    labels = {"item_action_weights": torch.full((7,), 16), "item_watch_time": torch.full((7,), 99)}
    assert torch.equal(model.packed(inputs | labels).logits, model.packed(inputs).logits)
    # Nor do the history's actions take the place of theirs: U of them are given, not U + T.
    if form.action_weights:
        assert inputs[ACTIONS].shape == (6,)


def test_actions_of_the_history_count() -> None:
    """The other side of the test above: were no action read at all, labels could not leak either."""
    form, model = FORMS["plain"], MODELS["plain"]
    requests = draw_requests(form, [(6, 4)])
    inputs = packed_inputs(form, requests)
    changed = inputs | {ACTIONS: inputs[ACTIONS] ^ 1}
    assert row_error(model.packed(changed).logits.numpy(), model.packed(inputs).logits.numpy()).error > 1e-2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bits_of_an_action_that_no_weight_names_are_not_read(dtype: torch.dtype) -> None:
    form = DlrmForm(action_weights=(1, 4, 1 << 29))
    model = model_of(form)
    inputs = packed_inputs(form, draw_requests(form, [(8, 2)]))
    known = torch.tensor([0, 1, 4, 5, 1 << 29, (1 << 29) + 1, (1 << 29) + 4, (1 << 29) + 5], dtype=dtype)
    expected = model.packed(inputs | {ACTIONS: known}).logits
    # The sign bit is the 32nd: a bitmask of all ones is -1.
    for others in (2, 1 << 28, 1 << 30, -(1 << 31)):
        assert_equal(model.packed(inputs | {ACTIONS: known | others}).logits, expected)


# --- Ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "all"])
def test_ids_outside_the_tables_are_clamped(name: str) -> None:
    form, model = FORMS[name], MODELS[name]
    inputs = packed_inputs(form, draw_requests(form, [(4, 3), (2, 4)]))
    outside, inside = dict(inputs), dict(inputs)
    for feature in (*model.config.history_ids, *model.config.candidate_ids):
        outside[feature], inside[feature] = inputs[feature].clone(), inputs[feature].clone()
        outside[feature][:3] = torch.tensor([-1, 2**31 - 1, form.num_rows], dtype=torch.int32)
        inside[feature][:3] = torch.tensor([0, form.num_rows - 1, form.num_rows - 1], dtype=torch.int32)
    assert torch.equal(model.packed(outside).logits, model.packed(inside).logits)
    assert row_error(model.packed(inside).logits.numpy(), model.packed(inputs).logits.numpy()).error > 1e-2


def test_negative_contextual_ids_are_absent_and_large_ones_are_clamped() -> None:
    form, model = FORMS["all"], MODELS["all"]
    requests = draw_requests(form, [(25, 3)])

    def logits(*genres: int) -> torch.Tensor:
        context = {**requests[0].context, "genres": np.array(genres)}
        return packed(model, form, [dataclasses.replace(requests[0], context=context)]).logits

    assert torch.equal(logits(3, -1, -1), logits(3, -(2**31), -7))
    assert torch.equal(logits(3, 2**31 - 1, 5), logits(3, form.num_rows - 1, 5))
    assert row_error(logits(3, -1, -1).numpy(), logits(3, 0, 0).numpy()).error > 1e-3
    assert row_error(logits(3, 4, -1).numpy(), logits(4, 3, -1).numpy()).error > 1e-3


def test_token_of_a_short_history_is_that_of_absent_ids() -> None:
    """19 events and candidates are below the least 20 of user_id, 20 are not; genres, at least 5, stay."""
    form, model = FORMS["all"], MODELS["all"]
    for events, candidates, counts in ((15, 4, False), (15, 5, True), (0, 20, True), (19, 0, False), (20, 0, True)):
        (request,) = draw_requests(form, [(events, candidates)])
        without = dataclasses.replace(request, context={**request.context, "user_id": np.array([-1])})
        first, second = (packed(model, form, [each]).activations[0] for each in (request, without))
        assert torch.equal(first[1:], second[1:])
        assert torch.equal(first[0], second[0]) != counts


@pytest.mark.parametrize("name", FORMS)
def test_rows_given_from_outside_equal_ids_inside(name: str) -> None:
    form, inside = FORMS[name], MODELS[name]
    outside = model_of(form, external_embeddings=True)
    assert len(outside.tables) == 0
    config = outside.config
    requests = draw_requests(form, [(24, 4), (0, 3), (6, 0)])
    inputs = packed_inputs(form, requests)
    given = dict(inputs)
    tables = config.history_ids | config.candidate_ids | {f.name: f.table for f in config.contextual_features}
    for feature, table in tables.items():
        rows = inside.lookup(inputs[feature], table)
        # Absence is a row of zeros: nobody else knows of it.
        given[feature] = rows * (inputs[feature] >= 0)[:, None]
    assert_equal(outside.packed(given).logits, inside.packed(inputs).logits)


# --- Rows behind the last offset --------------------------------------------------------------------------------------


def with_garbage(form: DlrmForm, inputs: Tensors, rows: int = 3) -> Tensors:
    """More rows than the offsets say, of events and of candidates."""
    extreme = torch.tensor([2**31 - 1, -(2**31), 7], dtype=torch.int32)[:rows]
    dirty = dict(inputs)
    for name in (*form.history_ids, *form.item_ids, *((ACTIONS,) if form.action_weights else ())):
        if name in dirty:
            dirty[name] = torch.cat([inputs[name], extreme])
    for name in (TIME, QUERY_TIME):
        if name in dirty:
            dirty[name] = torch.cat([inputs[name], torch.tensor([2**62, -(2**62), 0])[:rows]])
    return dirty


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("sizes", [[(3, 2), (0, 4), (9, 0)], [(0, 0)], [(0, 1)]], ids=str)
def test_garbage_behind_the_last_offset_changes_nothing(name: str, sizes: list[tuple[int, int]]) -> None:
    form, model = FORMS[name], MODELS[name]
    requests = draw_requests(form, sizes)
    inputs = packed_inputs(form, requests)
    clean, dirty = model.packed(inputs).logits, model.packed(with_garbage(form, inputs)).logits
    assert dirty.shape[0] == clean.shape[0] + 3
    assert_equal(dirty[: clean.shape[0]], clean)


def test_garbage_behind_cached_rows_and_candidates_changes_nothing() -> None:
    form, model = FORMS["plain"], MODELS["plain"]
    requests = draw_requests(form, [(3, 2), (0, 4), (9, 1)])
    encoded = encode(model, form, requests)
    features = with_garbage(form, {n: t for n, t in packed_inputs(form, requests).items() if n != TIME})
    dirty = tuple(
        KeyValue(torch.cat([k, torch.full_like(k[:2], 1e30)]), torch.cat([v, torch.full_like(v[:2], -1e30)]))
        for k, v in encoded.key_values
    )
    logits = model.score(features | encoded.request_inputs, dirty).logits
    assert logits.shape == (10, 1)
    assert_equal(logits[:7], packed(model, form, requests).logits)


# --- Times ------------------------------------------------------------------------------------------------------------


def test_times_of_events_behind_the_query_count_as_none() -> None:
    form, model = FORMS["plain"], MODELS["plain"]
    (request,) = draw_requests(form, [(5, 2)])
    now = dataclasses.replace(request, times=np.full(5, request.query_times[-1]))
    later = dataclasses.replace(request, times=np.full(5, request.query_times[-1]) + np.array([1, 60, 10**6, 2**40, 0]))
    assert torch.equal(packed(model, form, [now]).logits, packed(model, form, [later]).logits)


def test_last_candidate_dates_the_request() -> None:
    form, model = FORMS["all"], MODELS["all"]
    (request,) = draw_requests(form, [(5, 3)])
    request = dataclasses.replace(request, times=request.query_times[-1] - 600 * np.arange(5, 0, -1))
    history = slice(form.context, form.context + 5)

    def encoded(index: int) -> torch.Tensor:
        """History rows when one candidate is asked an hour later."""
        times = request.query_times.copy()
        times[index] += 3600
        return packed(model, form, [dataclasses.replace(request, query_times=times)]).activations[0][history]

    base = packed(model, form, [request]).activations[0][history]
    assert torch.equal(encoded(0), base)
    assert torch.equal(encoded(1), base)
    assert bool((encoded(2) != base).any(dim=1).all())


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precisions_stay_close_to_float64(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    requests = draw_requests(form, [(5, 3), (23, 4), (0, 2)])
    model = model_of(form, dtype)
    output, exact = packed(model, form, requests), packed(MODELS[name], form, requests)
    assert {tensor.dtype for tensor in output.activations} == {dtype}
    assert {output.logits.dtype, output.preds.dtype, output.user_embeddings.dtype} == {torch.float32}
    for rows, reference in (
        (output.activations[0], exact.activations[0]),
        (output.user_embeddings, exact.user_embeddings),
        (output.item_embeddings, exact.item_embeddings),
    ):
        error = row_error(rows.double().numpy(), reference.numpy()).error
        assert 0 < error < 64 * float(torch.finfo(dtype).eps)
    assert float((output.preds - exact.preds).abs().max()) < 64 * float(torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_portions_in_half_precision_are_the_packed_forward_to_rounding(dtype: torch.dtype) -> None:
    form = FORMS["plain"]
    model = model_of(form, dtype)
    requests = draw_requests(form, [(7, 4), (3, 2)])
    encoded = encode(model, form, requests)
    assert {tensor.dtype for pair in encoded.key_values for tensor in pair} == {dtype}
    logits = score(model, form, requests, encoded, [[0, 1, 2, 3], [0, 1]])
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    # Other shapes make the products sum in another order: equal to rounding, not to the bit.
    expected = packed(model, form, requests).logits.double().numpy()
    assert (
        float(np.abs(logits.double().numpy() - expected).max()) <= error_bound(0.0, precision) * np.abs(expected).max()
    )


def test_float64_model_is_float64_throughout() -> None:
    model = MODELS["all"]
    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {types.pop(name) for name in list(types) if name.startswith("tables.")} == {torch.float32}
    assert set(types.values()) == {model.dtype} == {torch.float64}
    output = packed(model, FORMS["all"], draw_requests(FORMS["all"], [(4, 2)]))
    assert {output.preds.dtype, output.logits.dtype, output.activations[0].dtype} == {torch.float64}


@pytest.mark.parametrize("name", ["plain", "all"])
def test_float64_answers_are_those_of_tables_in_float64(name: str) -> None:
    form = FORMS[name]
    kept, copied = model_of(form), model_of(form, torch.float32).double()
    assert {table.dtype for table in copied.tables.parameters()} == {torch.float64}
    requests = draw_requests(form, [(4, 2), (0, 3), (7, 0)])
    ours, theirs = packed(kept, form, requests), packed(copied, form, requests)
    assert torch.equal(ours.logits, theirs.logits)
    assert all(map(torch.equal, ours.activations, theirs.activations))


def test_constants_are_no_weights_and_belong_to_one_model() -> None:
    one, other = model_of(FORMS["plain"], torch.float16), model_of(FORMS["plain"])
    assert not {"time_thresholds", "hour_table", "weekday_table"} & one.state_dict().keys()
    assert one.time_thresholds.dtype == torch.int64
    one.time_thresholds.zero_()
    assert bool((other.time_thresholds[1:] > 0).all())
    assert bool((model_of(FORMS["plain"]).time_thresholds[1:] > 0).all())


def test_random_model_of_every_form_runs() -> None:
    """Weights that no checkpoint gave: all are drawn, none is left as it lay in memory."""
    for name, form in FORMS.items():
        torch.manual_seed(0)
        model = RankingModel(MODELS[name].config).eval()
        torch.manual_seed(0)
        again = RankingModel(MODELS[name].config)
        states = model.state_dict(), again.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        preds = packed(model, form, draw_requests(form, [(6, 3)])).preds
        assert bool(torch.isfinite(preds).all())
        assert bool(((preds[:, 0] > 0) & (preds[:, 0] < 1)).all())


def test_history_ids_are_looked_up_in_the_table_of_their_name() -> None:
    """The candidates' names have no tables: they share those of the history."""
    config = MODELS["all"].config
    assert config.history_ids == {HISTORY: HISTORY, "movie_category": "movie_category"}
    rows = MODELS["all"].lookup(torch.tensor([3]), HISTORY)
    state = dlrm_state_dict(FORMS["all"])
    assert torch.equal(rows[0], state[f"_embedding_collection.embeddings.{HISTORY}.weight"][3].double())
