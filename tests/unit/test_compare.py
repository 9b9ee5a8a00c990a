from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from hstu_compile.artifacts import Feed
from hstu_compile.compare import (
    EAGER_FACTOR,
    EAGER_FLOOR,
    NO_ITEM_SCORE,
    bound_rule,
    error_bound,
    row_error,
    row_errors,
    top_items_problem,
)
from hstu_compile.errors import EngineError, VerifyError
from hstu_compile.session_check import (
    ItemVectors,
    Reference,
    RuntimeCheck,
    check_session,
    guarded_check,
    report_of,
    tensor_error,
)

PRECISIONS = tuple(EAGER_FLOOR)
ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}

# Rows of HSTU differ in size by orders of magnitude: here from 1e-6 to 1.
RNG = np.random.default_rng(0)
REFERENCE = RNG.standard_normal((10_000, 32)) * 10.0 ** RNG.uniform(-6, 0, (10_000, 1))


def shifted(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 1, axis=0)


def swapped(rows: np.ndarray) -> np.ndarray:
    out = rows.copy()
    out[[5, 6]] = out[[6, 5]]
    return out


def one_wrong(rows: np.ndarray) -> np.ndarray:
    out = rows.copy()
    # The smallest row of all: an absolute tolerance would never see it.
    smallest = int(np.argmin(np.abs(rows).max(axis=1)))
    out[smallest] *= 0.9
    return out


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(rows: np.ndarray) -> np.ndarray:
        out = rows.copy()
        out[777, 3] = value
        return out

    return change


MISTAKES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "zeros": np.zeros_like,
    "0.9x": lambda rows: 0.9 * rows,
    "1.1x": lambda rows: 1.1 * rows,
    "negated": lambda rows: -rows,
    "shifted": shifted,
    "swapped": swapped,
    "one-wrong-row": one_wrong,
    "columns-reversed": lambda rows: rows[:, ::-1],
    "nan": with_value(math.nan),
    "inf": with_value(math.inf),
    "minus-inf": with_value(-math.inf),
    "one-row-less": lambda rows: rows[:-1],
    "one-column-less": lambda rows: rows[:, :-1],
    "transposed": lambda rows: rows.T,
    "no-rows": lambda rows: rows[:0],
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_comparator_rejects(mistake: str, precision: str) -> None:
    wrong = np.ascontiguousarray(MISTAKES[mistake](REFERENCE)).astype(np.float32)
    assert row_error(wrong, REFERENCE).error > error_bound(0.0, precision)
    # Nor does an eager model that is itself as bad as half types get widen the bound that far.
    assert row_error(wrong, REFERENCE).error > error_bound(EAGER_FLOOR[precision], precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_comparator_accepts_rounding_of_the_precision(precision: str) -> None:
    noise = np.random.default_rng(1).uniform(-1, 1, REFERENCE.shape)
    rounded = REFERENCE * (1 + ROUNDING[precision] * noise)
    assert row_error(rounded, REFERENCE).error <= error_bound(0.0, precision)
    assert row_error(REFERENCE.copy(), REFERENCE).error == 0.0


def test_a_row_that_must_be_zero_must_be_zero() -> None:
    reference = np.ones((4, 3))
    reference[2] = 0.0
    assert row_error(reference.astype(np.float32), reference).error == 0.0
    wrong = reference.copy()
    wrong[2, 1] = 1e-30
    result = row_error(wrong, reference)
    assert (result.error, result.row) == (math.inf, 2)


def test_worst_row_and_largest_difference_are_named() -> None:
    reference = np.array([[100.0, 100.0], [1.0, 1.0], [10.0, 10.0]])
    actual = reference + np.array([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    result = row_error(actual, reference)
    assert (result.row, result.error, result.max_abs) == (1, 0.5, 1.0)


def test_each_row_has_its_own_error() -> None:
    reference = np.array([[100.0, 100.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [2.0, 2.0]])
    actual = reference + np.array([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0], [1e-30, 0.0], [math.nan, 0.0]])
    assert row_errors(actual, reference).tolist() == [0.01, 0.5, 0.0, math.inf, math.inf]
    assert row_errors(actual[:0], reference[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"\[4, 2\] cannot be compared with \[5, 2\]"):
        row_errors(actual[:4], reference)


def test_nothing_equals_nothing_only_in_the_same_shape() -> None:
    assert row_error(np.zeros((0, 4)), np.zeros((0, 4))).error == 0.0
    assert row_error(np.zeros((0, 3)), np.zeros((0, 4))).error == math.inf


def test_reference_that_is_not_finite_passes_nothing() -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert row_error(np.ones((1, 2)), np.array([[1.0, value]])).error == math.inf


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("eager_error", [math.inf, math.nan])
def test_an_eager_model_that_overflows_allows_nothing(precision: str, eager_error: float) -> None:
    """An infinite bound would accept zeros, and infinity itself."""
    assert error_bound(eager_error, precision) == 0.0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bound_is_twice_the_eager_error_and_never_below_the_floor(precision: str) -> None:
    floor = EAGER_FLOOR[precision]
    assert error_bound(0.0, precision) == EAGER_FACTOR * floor
    assert error_bound(3 * floor, precision) == EAGER_FACTOR * 3 * floor
    assert precision in bound_rule(precision)
    assert error_bound(0.0, precision) < 0.05


def test_fp32_bound_is_the_one_that_is_promised() -> None:
    assert error_bound(0.0, "fp32") == 1e-5


# --- Top items --------------------------------------------------------------------------------------------------------

SCORES = np.array([[0.9, 0.8, 0.7, 0.6, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]])
SEEN = np.array([[True, False, False, False, False], [False] * 5])
IDS = np.array([[2, 3, 4], [5, 4, 3]])
TOP = np.array([[0.8, 0.7, 0.6], [0.5, 0.4, 0.3]])


def problem(
    ids: object = IDS, scores: object = TOP, seen: np.ndarray = SEEN, reference: np.ndarray = SCORES
) -> str | None:
    return top_items_problem(np.array(ids), np.array(scores), reference, seen, 0.01)


def test_right_list_has_no_problem() -> None:
    assert problem() is None


def test_near_ties_may_change_places() -> None:
    reference = SCORES.copy()
    reference[1, 3] = 0.495
    assert problem([[2, 3, 4], [4, 5, 3]], [[0.8, 0.7, 0.6], [0.5, 0.499, 0.3]], reference=reference) is None


@pytest.mark.parametrize(
    ("ids", "scores", "message"),
    [
        ([[2, 2, 4], [5, 4, 3]], TOP, "sequence 0 lists an item twice"),
        ([[1, 2, 3], [5, 4, 3]], [[0.9, 0.8, 0.7], [0.5, 0.4, 0.3]], "sequence 0 lists an item of its own history"),
        ([[2, 3, 0], [5, 4, 3]], [[0.8, 0.7, NO_ITEM_SCORE], [0.5, 0.4, 0.3]], "lists 2 items of 4 open ones"),
        (IDS, [[0.8, 0.7, 0.65], [0.5, 0.4, 0.3]], "sequence 0: score off by 0.05"),
        (IDS, [[0.8, 0.7, math.nan], [0.5, 0.4, 0.3]], "sequence 0: score off by nan"),
        ([[2, 3, 4], [4, 5, 3]], [[0.8, 0.7, 0.6], [0.4, 0.5, 0.3]], "sequence 1 is not in descending order"),
        ([[2, 3, 4], [5, 4, 2]], [[0.8, 0.7, 0.6], [0.5, 0.4, 0.2]], "sequence 1 leaves out an item"),
        ([[2, 3, 6], [5, 4, 3]], TOP, "sequence 0 lists an item outside 1..5"),
        ([[2, 3, -1], [5, 4, 3]], TOP, "sequence 0 lists an item outside 1..5"),
        ([[2, 3, 4]], TOP, r"\[1, 3\] ids and \[2, 3\] scores for 2 sequences"),
        ([[2, 3, 4]], TOP[:1], "for 2 sequences"),
    ],
)
def test_each_wrong_list_is_named(ids: object, scores: object, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert not (found := problem(ids, scores)), found


def test_swapped_requests_are_seen() -> None:
    assert problem(IDS[::-1], TOP[::-1]) is not None


def test_slots_without_an_item_hold_no_score() -> None:
    seen = np.array([[True, True, True, True, False]])
    ids, reference = np.array([[5, 0, 0]]), SCORES[:1]
    right = np.array([[0.1, NO_ITEM_SCORE, NO_ITEM_SCORE]], dtype=np.float32)
    assert top_items_problem(ids, right, reference, seen, 0.01) is None
    wrong = np.array([[0.1, 0.0, NO_ITEM_SCORE]], dtype=np.float32)
    assert top_items_problem(ids, wrong, reference, seen, 0.01) == "sequence 0 gives an empty slot a score"


# --- One artifact on one runtime --------------------------------------------------------------------------------------


class AnsweringSession:
    """A session that answers with whatever it is given."""

    name = "stub"

    def __init__(self, outputs: dict[str, np.ndarray]) -> None:
        self.outputs = outputs
        self.is_closed = False

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.outputs

    def close(self) -> None:
        self.is_closed = True

    def __enter__(self) -> AnsweringSession:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


USERS = np.array([[0.6, 0.8], [1.0, 0.0]])
ITEMS = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
FEED = Feed("two users", {"item_ids": np.array([1, 2], np.int32), "seq_offsets": np.array([0, 1, 2], np.int32)})
LIST = {
    "top_items": np.array([[3, 2], [1, 3]], np.int32),
    "top_scores": np.array([[0.96, 0.8], [1.0, 0.8]], np.float32),
}
EXACT = {"user_embeddings": USERS, "layer_0": USERS * 3}
REF = Reference(
    "retrieval",
    "user_embeddings",
    (FEED,),
    (EXACT,),
    (EXACT,),
    {"user_embeddings": 0.0, "layer_0": 0.0},
    ItemVectors.of(lambda: [ITEMS]),
)


def check(**changes: np.ndarray):
    outputs = {**{name: array.astype(np.float32) for name, array in EXACT.items()}, **LIST, **changes}
    return check_session(AnsweringSession(outputs), "model.onnx", REF, "fp32", lambda *_: None)


def test_right_answers_pass() -> None:
    result = check()
    assert result.status == "PASS"
    assert result.ranking == {"top10_overlap": 1.0, "kendall_tau": 1.0}
    assert [layer.layer for layer in result.layers] == [0]
    assert report_of([(REF, [result])], "fp32").status == "PASS"


@pytest.mark.parametrize(
    "changes",
    [
        {"user_embeddings": USERS * 0.9},
        {"user_embeddings": USERS[::-1]},
        {"user_embeddings": USERS[:1]},
        {"user_embeddings": np.hstack([USERS, USERS])},
        {"user_embeddings": USERS * np.nan},
        {"user_embeddings": np.zeros_like(USERS)},
        {"layer_0": USERS},
        {"layer_0": np.full_like(USERS, np.inf)},
        {"top_items": np.array([[3, 9], [1, 3]], np.int32)},
        {"top_items": np.array([[3, -2], [1, 3]], np.int32)},
        {"top_items": np.array([[3], [1]], np.int32)},
        {"top_scores": np.full((2, 2), np.nan, np.float32)},
    ],
    ids=str,
)
def test_wrong_answers_of_any_shape_fail_and_never_crash(changes: dict[str, np.ndarray]) -> None:
    result = check(**changes)
    assert result.status == "FAIL"
    report = report_of([(REF, [result, check()])], "fp32")
    assert report.status == "FAIL"
    assert report.worst_error > report.worst_bound or report.worst_where.startswith("top_items")


@pytest.mark.parametrize("items", [ITEMS[:1], ITEMS[[0, 0]]], ids=["one item", "equal items"])
def test_a_vocabulary_that_has_no_order_is_checked_without_agreement(items: np.ndarray) -> None:
    reference = dataclasses.replace(REF, item_vectors=ItemVectors.of(lambda: [items]))
    answers = {name: array.astype(np.float32) for name, array in EXACT.items()}
    result = check_session(AnsweringSession(answers), "model.onnx", reference, "fp32", lambda *_: None)
    assert result.status == "PASS"
    assert result.ranking is None


def test_a_bound_that_nine_tenths_of_the_answer_keep_fails_whatever_is_answered() -> None:
    # USERS' second row has the largest number of sqrt(2) times its root mean square: 0.9 of it errs by 0.1414.
    for eager_error, status in ((0.0706, "PASS"), (0.0708, "FAIL")):
        wide = dataclasses.replace(REF, eager_error={"user_embeddings": eager_error, "layer_0": 0.3})
        outputs = {**{name: array.astype(np.float32) for name, array in EXACT.items()}, **LIST}
        result = check_session(AnsweringSession(outputs), "model.onnx", wide, "bf16", lambda *_: None)
        assert result.status == status
    (wrong,) = [each for each in result.tensors if each.status == "FAIL"]
    assert (wrong.tensor, wrong.feed) == ("user_embeddings", "the bound itself")
    assert wrong.error == pytest.approx(0.1416)
    assert wrong.bound == pytest.approx(0.1 * 2**0.5)
    assert "the eager bf16 model errs by 0.0708 itself" in wrong.detail
    report = report_of([(wide, [result])], "bf16")
    assert (report.status, report.worst_where.split(" on ")[0]) == ("FAIL", "user_embeddings of 'the bound itself'")


def test_a_quantised_output_is_told_from_nine_tenths_of_it_by_all_feeds_together() -> None:
    outputs = {**{name: array.astype(np.float32) for name, array in EXACT.items()}, **LIST}
    for whole, status in ((0.049, "PASS"), (0.051, "FAIL")):
        wide = dataclasses.replace(
            REF, eager_error={"user_embeddings": 0.4, "layer_0": 0.4}, eager_whole_error={"user_embeddings": whole}
        )
        result = check_session(AnsweringSession(outputs), "m", wide, "fp16", lambda *_: None)
        assert result.status == status
    assert any("--keep-fp16" in each.detail for each in result.tensors if each.feed == "the bound itself")


def test_absent_runtime_is_reported_with_its_reason() -> None:
    def absent() -> AnsweringSession:
        raise EngineError("HSTU-E401", "tensorrt is not installed", "no module", "install it")

    result = guarded_check("tensorrt", "model.engine", absent, lambda session: check())
    assert (result.status, result.reason) == ("NOT RUN", "tensorrt is not installed: no module")
    assert report_of([(REF, [result, check()])], "fp32").status == "PASS"
    with pytest.raises(VerifyError, match="tensorrt is not installed: no module") as caught:
        report_of([(REF, [result])], "fp32")
    assert (caught.value.code, caught.value.exit_code) == ("HSTU-E602", 6)


# --- Predictions, and several graphs ----------------------------------------------------------------------------------

# Two tasks of four candidates: the first task's numbers are large, the second's small, and one prediction is near zero.
LOGITS = np.array([[30.0, 0.03], [-20.0, 0.02], [1e-7, -0.04], [10.0, 0.01]])
REQUESTS = Feed(
    "two users",
    {"seq_offsets": np.array([0, 5, 5], np.int32), "candidate_offsets": np.array([0, 3, 4], np.int32)},
)
PASS_OF_CANDIDATES = Feed("two users", {"candidate_offsets": np.array([0, 3, 4], np.int32)})
PACKED = Reference("packed", "logits", (REQUESTS,), ({"logits": LOGITS},), ({"logits": LOGITS},), {"logits": 0.0}, None)
SCORE = dataclasses.replace(PACKED, graph="score", feeds=(PASS_OF_CANDIDATES,))


def check_predictions(reference: Reference, logits: np.ndarray) -> RuntimeCheck:
    session = AnsweringSession({"logits": logits.astype(np.float32)})
    return check_session(session, f"{reference.graph}.onnx", reference, "fp32", lambda *_: None)


def test_the_bound_of_predictions_must_tell_nine_tenths_in_every_task() -> None:
    # Of the second task the largest number is 1.46 times the root mean square; of the first 1.60 times.
    shares = np.abs(LOGITS).max(axis=0) / np.sqrt((LOGITS**2).mean(axis=0))
    assert shares[1] < shares[0]
    for eager_error, status in ((0.049 * shares[1], "PASS"), (0.051 * shares[1], "FAIL")):
        wide = dataclasses.replace(PACKED, eager_error={"logits": eager_error})
        assert check_predictions(wide, LOGITS).status == status
    zeros = np.zeros_like(LOGITS)
    nothing = dataclasses.replace(PACKED, exact=({"logits": zeros},), eager_error={"logits": 0.4})
    assert check_predictions(nothing, zeros).status == "PASS"
    assert check_predictions(nothing, zeros + 1e-9).status == "FAIL"


@pytest.mark.parametrize("name", ["preds", "logits"])
def test_a_prediction_is_measured_by_its_tasks_column(name: str) -> None:
    # A number near zero has no size of its own to measure a rounding by; its task's other numbers have.
    nearly = LOGITS + np.array([[0, 0], [0, 0], [1e-6, 0], [0, 0]])
    assert tensor_error(name, nearly, LOGITS).error <= 1e-6
    assert tensor_error("user_embeddings", nearly, LOGITS).error > 1e-6
    # A small task does not hide behind a large one.
    wrong = LOGITS * np.array([1.0, 0.9])
    found = tensor_error(name, wrong, LOGITS)
    assert found.error > 0.1
    assert found.row == 1
    assert found.max_abs == pytest.approx(0.004)


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name not in ("0.9x", "1.1x", "no-rows")])
def test_wrong_predictions_are_rejected(mistake: str) -> None:
    column = np.random.default_rng(2).standard_normal((1000, 4))
    wrong = np.ascontiguousarray(MISTAKES[mistake](column) if mistake != "one-wrong-row" else swapped(column))
    for precision in PRECISIONS:
        assert tensor_error("logits", wrong, column).error > error_bound(EAGER_FLOOR[precision], precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1])
def test_scaled_predictions_are_rejected(factor: float, precision: str) -> None:
    column = np.random.default_rng(2).standard_normal((1000, 4))
    assert tensor_error("preds", factor * column, column).error > error_bound(EAGER_FLOOR[precision], precision)


@pytest.mark.parametrize("logits", [LOGITS[:, :1], LOGITS[:3], LOGITS.T, LOGITS[:0], LOGITS[:, 0], LOGITS[None]])
def test_predictions_of_another_shape_are_rejected(logits: np.ndarray) -> None:
    assert tensor_error("logits", logits, LOGITS).error == math.inf
    assert check_predictions(PACKED, logits).status == "FAIL"


def test_each_graph_is_reported_and_the_first_names_the_feeds() -> None:
    both = [(PACKED, [check_predictions(PACKED, LOGITS)]), (SCORE, [check_predictions(SCORE, LOGITS)])]
    report = report_of(both, "fp32")
    assert report.status == "PASS"
    assert [run.artifact for run in report.runs] == ["packed.onnx", "score.onnx"]
    assert report.feeds == (
        {"name": "two users", "sequences": 2, "events": 5, "max_len": 5},
        {"name": "score: two users", "sequences": 2, "events": 4, "max_len": 3},
    )


@pytest.mark.parametrize("wrong", ["packed", "score"])
def test_one_wrong_graph_fails_the_whole(wrong: str) -> None:
    checked = [
        (reference, [check_predictions(reference, LOGITS * (0.9 if reference.graph == wrong else 1.0))])
        for reference in (PACKED, SCORE)
    ]
    report = report_of(checked, "fp32")
    assert report.status == "FAIL"
    assert report.worst_error == pytest.approx(0.1 * 30 / np.sqrt((LOGITS[:, 0] ** 2).mean()), rel=0.2)
    assert report.worst_error > report.worst_bound


def test_a_graph_that_did_not_run_is_not_covered_by_another() -> None:
    absent = RuntimeCheck("onnxruntime", "score.onnx", "NOT RUN", "it is not installed")
    ran = check_predictions(PACKED, LOGITS)
    with pytest.raises(
        VerifyError, match=r"(?s)graph score could be run.*score\.onnx on onnxruntime: it is not installed"
    ):
        report_of([(PACKED, [ran]), (SCORE, [absent])], "fp32")
    with pytest.raises(VerifyError, match="graph score could be run"):
        report_of([(PACKED, [ran]), (SCORE, [])], "fp32")


def test_session_is_closed_when_its_check_fails() -> None:
    session = AnsweringSession({})

    def fail(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded_check("stub", "model.onnx", lambda: session, fail)
    assert session.is_closed


def test_reference_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        REF.feeds = ()
