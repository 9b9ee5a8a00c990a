"""Histories encoded in parts: any split equals one pass, and every row that may not be reused is missed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_compile.compare import error_bound, row_error
from hstu_compile.model import RetrievalModel
from hstu_compile.model.layer import KeyValue
from tests import tolerances
from tests.exported_models import small_config, small_model
from tests.research_reference import History, ResearchForm, draw_histories, jagged_inputs
from tests.unit.test_model_retrieval import model_of

FORMS = {
    "research": ResearchForm(),
    "rated": ResearchForm(item_dim=9, rating_dim=3, concat_ua=True),
    "without bias": ResearchForm(has_bias=False, num_blocks=3),
    "hour of day": ResearchForm(hour_encoding="additive", postprocessor="layer_norm"),
}
MODELS = {name: model_of(form) for name, form in FORMS.items()}
EXACT = {name: model_of(form, torch.float64) for name, form in FORMS.items()}
BOUND = error_bound(0.0, "fp32")


def beginning(history: History, events: int, request_time: int | None = None) -> History:
    """The first events of a history, asked for at the time of the next one unless a time is given."""
    times = [*history.timestamps, history.request_time]
    return dataclasses.replace(
        history,
        item_ids=history.item_ids[:events],
        timestamps=history.timestamps[:events],
        ratings=history.ratings[:events],
        request_time=int(times[events]) if request_time is None else request_time,
    )


@dataclasses.dataclass
class Encoded:
    """What is kept of each user: keys and values of the first events, layer by layer."""

    events: list[int]
    rows: list[list[KeyValue]]

    @classmethod
    def nothing(cls, model: RetrievalModel, users: int) -> Encoded:
        attention = model.config.layer.attention
        empty = KeyValue(
            torch.zeros((0, attention.num_heads, attention.attention_dim), dtype=model.dtype),
            torch.zeros((0, attention.num_heads, attention.linear_dim), dtype=model.dtype),
        )
        return cls([0] * users, [[empty] * model.config.num_layers for _ in range(users)])


def reusable(events: int) -> int:
    """Rows that hold whatever comes later: all but the last, which saw the request's time."""
    return max(0, events - 1)


def extend(
    model: RetrievalModel, histories: Sequence[History], encoded: Encoded, keep: Sequence[int]
) -> tuple[torch.Tensor, Encoded]:
    """User embeddings of longer histories, and what is kept afterwards; `keep` rows of each user are not computed."""
    new = [
        dataclasses.replace(h, item_ids=h.item_ids[n:], timestamps=h.timestamps[n:], ratings=h.ratings[n:])
        for h, n in zip(histories, keep, strict=True)
    ]
    inputs = jagged_inputs(new, model.config.has_ratings)
    cached = [
        KeyValue(
            torch.cat([rows[layer].k[:n] for rows, n in zip(encoded.rows, keep, strict=True)]),
            torch.cat([rows[layer].v[:n] for rows, n in zip(encoded.rows, keep, strict=True)]),
        )
        for layer in range(model.config.num_layers)
    ]
    times = [torch.as_tensor(h.timestamps[:n]) for h, n in zip(histories, keep, strict=True)]
    output = model.append(
        **inputs,
        cache_offsets=torch.tensor([0, *keep]).cumsum(0).to(torch.int32),
        key_values=cached,
        cached_timestamps=torch.cat(times).to(torch.int64),
    )
    users = model.user_embeddings(output.activations[-1], inputs["seq_offsets"])
    bounds = inputs["seq_offsets"].tolist()
    rows = [
        [
            KeyValue(
                torch.cat([before.k[: keep[b]], after.k[bounds[b] : bounds[b + 1]]]),
                torch.cat([before.v[: keep[b]], after.v[bounds[b] : bounds[b + 1]]]),
            )
            for before, after in zip(encoded.rows[b], output.key_values, strict=True)
        ]
        for b in range(len(histories))
    ]
    return users, Encoded([len(h.item_ids) for h in histories], rows)


@dataclasses.dataclass
class OnePass:
    """User embeddings, and of each user the keys and values of every layer."""

    users: torch.Tensor
    rows: list[list[KeyValue]]


def one_pass(model: RetrievalModel, histories: Sequence[History]) -> OnePass:
    inputs = jagged_inputs(list(histories), model.config.has_ratings)
    output, bounds = model.prefill(**inputs), inputs["seq_offsets"].tolist()
    rows = [
        [KeyValue(pair.k[start:stop], pair.v[start:stop]) for pair in output.key_values]
        for start, stop in itertools.pairwise(bounds)
    ]
    return OnePass(model.user_embeddings(output.activations[-1], inputs["seq_offsets"]), rows)


def assert_as_good(actual: torch.Tensor, once: torch.Tensor, exact: torch.Tensor) -> None:
    """Within twice the error that one float32 pass makes."""
    allowed = error_bound(row_error(once.numpy(), exact.numpy()).error, "fp32")
    assert row_error(actual.numpy(), exact.numpy()).error <= allowed


# Of each user, how many events every step adds: none is a second question at another time.
STEPS = st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=4)


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=6, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 99))
def test_any_split_of_a_history_equals_one_pass(name: str, steps: list[list[int]], seed: int) -> None:
    form, model = FORMS[name], MODELS[name]
    totals = [sum(user) for user in steps]
    histories = draw_histories(form, totals, seed)
    encoded = Encoded.nothing(model, len(steps))
    for step in range(3):
        events = [sum(user[: step + 1]) for user in steps]
        asked = [beginning(h, n) for h, n in zip(histories, events, strict=True)]
        users, encoded = extend(model, asked, encoded, [reusable(n) for n in encoded.events])
        once, exact = one_pass(MODELS[name], asked), one_pass(EXACT[name], asked)
        assert_as_good(users, once.users, exact.users)
        # The rows themselves: what the next step reads is what one pass would have left.
        for ours, theirs, right in zip(encoded.rows, once.rows, exact.rows, strict=True):
            for parts in zip(ours, theirs, right, strict=True):
                for part in zip(*parts, strict=True):
                    assert_as_good(*part)


@pytest.mark.parametrize("name", FORMS)
def test_prefill_answers_as_the_model_does(name: str) -> None:
    model = MODELS[name]
    inputs = jagged_inputs(draw_histories(FORMS[name], [4, 0, 20]), model.config.has_ratings)
    output = model.prefill(**inputs)
    for ours, theirs in zip(output.activations, model.layer_activations(**inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert [part.shape for part in output.key_values[0]] == [(24, 2, 5), (24, 2, 7)]


# --- What must not pass -----------------------------------------------------------------------------------------------


def error_of(history: History, known: History, keep: int) -> float:
    """Of the answer to `history` from `keep` rows of what `known` left."""
    model = MODELS["research"]
    _, encoded = extend(model, [known], Encoded.nothing(model, 1), [0])
    users, _ = extend(model, [history], encoded, [keep])
    return row_error(users.numpy(), EXACT["research"](**jagged_inputs([history], False)).numpy()).error


@pytest.mark.parametrize("added", [1, 5])
def test_a_last_row_that_is_not_computed_again_is_caught(added: int) -> None:
    """The row was asked at one time and is followed by an event at another: it is wrong from the second layer on."""
    (history,) = draw_histories(FORMS["research"], [12], seed=3)
    known = beginning(history, 12 - added, history.request_time + 40_000_000)
    assert error_of(history, known, reusable(12 - added)) <= BOUND
    assert error_of(history, known, 12 - added) > 100 * BOUND


def test_the_same_history_at_another_time_is_one_row() -> None:
    (history,) = draw_histories(FORMS["research"], [12], seed=3)
    later = dataclasses.replace(history, request_time=history.request_time + 40_000_000)
    assert error_of(later, history, reusable(12)) <= BOUND
    answers = [EXACT["research"](**jagged_inputs([each], False)).numpy() for each in (history, later)]
    assert row_error(*answers).error > 100 * BOUND


def test_the_first_layer_alone_would_not_show_a_stale_row() -> None:
    """Keys and values of the first layer come from the events: a test on one layer could not fail."""
    model = MODELS["research"]
    (history,) = draw_histories(FORMS["research"], [6])
    later = dataclasses.replace(history, request_time=history.request_time + 40_000_000)
    first, second = (model.prefill(**jagged_inputs([each], False)).key_values for each in (history, later))
    assert torch.equal(first[0].k, second[0].k)
    assert torch.equal(first[1].k[:-1], second[1].k[:-1])
    assert row_error(second[1].k.numpy(), first[1].k.double().numpy()).error > 100 * BOUND


def test_an_edited_event_is_caught() -> None:
    (history,) = draw_histories(FORMS["research"], [12], seed=4)
    known = beginning(history, 9)
    edited = dataclasses.replace(known, item_ids=np.array([known.item_ids[0] % 60 + 1, *known.item_ids[1:]]))
    assert error_of(history, known, 8) <= BOUND
    assert error_of(history, edited, 8) > 100 * BOUND


def test_a_history_that_lost_its_oldest_event_is_caught() -> None:
    (history,) = draw_histories(FORMS["research"], [12], seed=5)
    shorter = dataclasses.replace(
        history, item_ids=history.item_ids[1:], timestamps=history.timestamps[1:], ratings=history.ratings[1:]
    )
    model = MODELS["research"]
    _, encoded = extend(model, [beginning(history, 9)], Encoded.nothing(model, 1), [0])
    # The same events' rows, from the time when each stood one place further.
    moved = Encoded([8], [[KeyValue(pair.k[1:], pair.v[1:]) for pair in encoded.rows[0]]])
    users, _ = extend(model, [shorter], moved, [7])
    expected = EXACT["research"](**jagged_inputs([shorter], False)).numpy()
    assert row_error(users.numpy(), expected).error > 100 * BOUND


# --- The rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ({}, None),
        ({"max_attn_len": 4}, None),
        ({"min_full_attn_seq_len": 3}, None),
        ({"time_bias": "own"}, None),
        ({"contextual_seq_len": 2}, "the first 2 rows see the whole history"),
        ({"max_attn_len": 4, "min_full_attn_seq_len": 3}, "the last 3 rows of a history see beyond the window"),
    ],
    ids=str,
)
def test_the_rule_says_whether_later_events_change_a_row(attention: dict[str, object], reason: str | None) -> None:
    config = small_config(2, attention)
    assert config.later_rows_matter == reason
    assert config.cache_rule == ("prefix" if reason is None else "request")
    model = small_model(config).cast(torch.float64)
    form = ResearchForm(num_items=40)
    (history,) = draw_histories(form, [12], seed=6)
    whole = model.prefill(**jagged_inputs([history], False)).key_values[1].k
    part = model.prefill(**jagged_inputs([beginning(history, 7)], False)).key_values[1].k
    same = row_error(part[:6].numpy(), whole[:6].numpy()).error <= tolerances.FLOAT64 * 1e3
    assert same is (reason is None)


def test_cached_times_are_asked_for_where_the_bias_needs_them() -> None:
    model = MODELS["research"]
    (history,) = draw_histories(FORMS["research"], [5])
    inputs = jagged_inputs([history], False)
    nothing = Encoded.nothing(model, 1).rows[0]
    offsets = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cached_timestamps \[Lc\] are missing"):
        model.append(**inputs, cache_offsets=offsets, key_values=nothing)
