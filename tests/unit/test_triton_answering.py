"""Batches of one-user requests: what is wrong with one is its own error, and passes are shared by all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_compile.errors import EngineError, HstuCompileError, RequestError
from hstu_compile.runtime.ranking import RankingSession
from hstu_compile.serving.answering import Answerer, Arrays, RankingAnswerer
from tests.ranking_fakes import FakeGraph, FakeModel, spec_of
from tests.ranking_requests import request_of


def refusal(text: str, code: str = "HSTU-E703") -> RequestError:
    return RequestError(code, "the request has 1 fault", text, "none")


class Doubler(Answerer[int]):
    """Doubles numbers; 1xx are refused by the check, 2xx only by a pass, 3xx end the runtime."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []

    def _read(self, arrays: Arrays) -> int:
        if "x" not in arrays:
            raise refusal("x is missing", "HSTU-E701")
        return int(arrays["x"][0])

    def _check(self, request: int) -> None:
        if request // 100 == 1:
            raise refusal(f"{request} is wrong")

    def _run(self, requests: Sequence[int]) -> list[dict[str, Any]]:
        self.passes.append(list(requests))
        for request in requests:
            self._check(request)
            if request // 100 == 2:
                raise refusal(f"{request} cannot be split", "HSTU-E704")
            if request // 100 == 3:
                raise EngineError("HSTU-E404", "the runtime failed", "the test says so", "none")
        return [{"y": np.array([[2 * request]])} for request in requests]

    def close(self) -> None:
        """Nothing is open."""


def given_batch(values: Sequence[int]) -> list[dict[str, Any]]:
    return [{"x": np.array([[value]])} if value >= 0 else {"z": np.array([[0]])} for value in values]


@given(st.lists(st.sampled_from([-1, 1, 2, 3, 101, 102, 201]), max_size=12))
def test_every_good_request_is_answered_and_every_wrong_one_has_its_own_error(values: list[int]):
    answers = Doubler().answer(given_batch(values))
    assert len(answers) == len(values)
    for value, answer in zip(values, answers, strict=True):
        if 0 <= value < 100:
            assert isinstance(answer, dict)
            assert answer["y"].tolist() == [[2 * value]]
        else:
            assert isinstance(answer, RequestError)
            assert ("x is missing" if value < 0 else str(value)) in answer.why


def test_good_requests_share_a_pass_whoever_is_beside_them():
    doubler = Doubler()
    doubler.answer(given_batch([1, 2, 3]))
    assert doubler.passes == [[1, 2, 3]]
    doubler.answer(given_batch([1, 101, -1, 2, 102]))
    # One pass is refused, one has all that is left.
    assert doubler.passes[1:] == [[1, 101, 2, 102], [1, 2]]


def test_what_only_a_pass_finds_out_costs_nobody_else_the_answer():
    doubler = Doubler()
    answers = doubler.answer(given_batch([1, 201, 2]))
    assert [isinstance(answer, dict) for answer in answers] == [True, False, True]
    assert doubler.passes == [[1, 201, 2], [1], [201], [2]]


@pytest.mark.parametrize("values", [[1, 301], [1, 101, 301], [201, 301]])
def test_a_runtime_that_fails_is_an_error_of_the_requests_that_it_was_running(values: list[int]):
    answers = Doubler().answer(given_batch(values))
    failed = [answer for answer in answers if isinstance(answer, EngineError)]
    assert failed
    assert all(isinstance(answer, HstuCompileError) for answer in answers[1:])


@pytest.mark.parametrize("shape", [(), (2, 1), (0, 3)])
def test_several_users_in_a_request_are_refused(shape: tuple[int, ...]):
    (answer,) = Doubler().answer([{"x": np.zeros(shape)}])
    assert isinstance(answer, RequestError)
    assert answer.code == "HSTU-E701"
    assert f"x has shape {list(shape)}: a request is one user" in answer.why


def test_no_requests_are_answered_by_no_pass():
    doubler = Doubler()
    assert doubler.answer([]) == []
    assert doubler.passes == []


# --- ranking ----------------------------------------------------------------------------------------------------------

SPEC = spec_of(scaling="batch")


@pytest.fixture
def ranker() -> Any:
    model = FakeModel(SPEC)
    graphs = [FakeGraph(model, role) for role in ("packed", "prefill", "score")]
    with RankingSession(SPEC, *graphs, kv_budget_bytes=1 << 16) as session:
        yield session


def tensors(user: int | None, events: int, candidates: int, seed: int = 0) -> dict[str, Any]:
    """A request as Triton hands it over."""
    request = request_of(SPEC, 0, events, candidates, seed)
    arrays = {**request.history, **request.candidates, **request.context}
    keyed = {} if user is None else {"user_key": np.array([user], np.int64)}
    return {name: np.asarray(array)[None] for name, array in {**arrays, **keyed}.items()}


def test_requests_with_a_key_use_the_cache_and_others_do_not(ranker: RankingSession):
    answerer = RankingAnswerer(ranker, cached=True)
    batch = [tensors(7, 5, 3), tensors(None, 5, 3), tensors(8, 4, 2)]
    first, second = answerer.answer(batch), answerer.answer(batch)
    caches = [[answer["cache"].item() for answer in answers if isinstance(answer, dict)] for answers in (first, second)]
    assert caches == [[b"miss", b"off", b"miss"], [b"hit", b"off", b"hit"]]
    for one, other in zip(first, second, strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        assert one["preds"].shape[0] == 1
        np.testing.assert_array_equal(one["preds"], other["preds"])
    np.testing.assert_allclose(first[0]["preds"], first[1]["preds"], rtol=1e-5)  # type: ignore[index]


def test_candidates_that_no_split_answers_exactly_are_one_requests_error(ranker: RankingSession):
    """With the batch's divisor a forward takes at most nine candidates; the cached schedule takes any number."""
    answerer = RankingAnswerer(ranker, cached=True)
    answers = answerer.answer([tensors(None, 5, 3), tensors(None, 5, 20), tensors(7, 5, 20)])
    assert [isinstance(answer, dict) for answer in answers] == [True, False, True]
    assert isinstance(answers[1], RequestError)
    assert answers[1].code == "HSTU-E704"


def test_a_refused_batch_leaves_nothing_in_the_cache(ranker: RankingSession):
    answerer = RankingAnswerer(ranker, cached=True)
    wrong = tensors(None, 5, 3)
    wrong["movie_id"] = wrong["movie_id"] + 1000
    answerer.answer([wrong])
    assert ranker.stats().prefill_passes == 0
    refused, answered = answerer.answer([wrong, tensors(7, 5, 3)])
    assert isinstance(refused, RequestError)
    assert isinstance(answered, dict)
    assert answered["cache"].item() == b"miss"
    assert "(user 'without user_key')" in refused.why


def test_a_key_of_two_values_is_refused(ranker: RankingSession):
    wrong = {**tensors(None, 5, 3), "user_key": np.array([[7, 8]], np.int64)}
    (refused,) = RankingAnswerer(ranker, cached=True).answer([wrong])
    assert isinstance(refused, RequestError)
    assert "user_key" in refused.why
