"""Buckets: what sizes are rounded to, and that padding changes no answer."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_compile.artifacts import TensorSpec
from hstu_compile.compare import row_error
from hstu_compile.errors import UsageError
from hstu_compile.runtime.ladder import LEAST_ROWS, Buckets, Ladder
from hstu_compile.runtime.onnxruntime_session import OnnxRuntimeSession
from hstu_compile.runtime.shape_buckets import Padded, ShapeBuckets
from tests.oracle import Array
from tests.segmented_cases import Case, ranking_case, retrieval_case

# Rows are products of the same numbers summed in another order at most, where a BLAS splits them by their number: far
# below what a wrong mask, divisor or row would change.
_REORDERED = 32 * 2.0**-24


@given(st.integers(1, 5000), st.integers(0, 20_000), st.integers(1, 4), st.integers(0, 30_000))
def test_a_geometric_ladder_pads_by_less_than_its_factor(least: int, more: int, per_doubling: int, size: int) -> None:
    most = least + more
    ladder = Ladder.geometric(least, most, per_doubling)
    assert (ladder.rungs[0], ladder.rungs[-1]) == (least, most)
    up = ladder.up(size)
    assert up >= size
    if least <= size <= most:
        assert up in ladder.rungs
        assert up <= np.ceil(size * 2 ** (1 / per_doubling))
    if size > most:
        assert up == size


@given(st.integers(1, 5000), st.integers(0, 20_000), st.integers(1, 16), st.integers(0, 30_000))
def test_an_even_ladder_adds_less_than_its_part(least: int, more: int, per_doubling: int, size: int) -> None:
    most = least + more
    ladder = Ladder.even(least, most, per_doubling)
    assert (ladder.rungs[0], ladder.rungs[-1]) == (least, most)
    if least <= size <= most:
        assert ladder.up(size) in ladder.rungs
        assert size <= ladder.up(size) < size * (1 + 1 / per_doubling)
    # Not finer than it was asked: from a size to its double there are so many rungs at most, and the last.
    assert sum(least <= rung < 2 * least for rung in ladder.rungs) <= per_doubling + 1


@given(st.sampled_from(["L", "A", "Lc", "T"]), st.integers(0, 1 << 22), st.integers(1, 1 << 16))
def test_default_buckets_add_less_than_an_eighth(axis: str, rows: int, sequences: int) -> None:
    up = Buckets().ladder(axis).up(rows)
    assert up == LEAST_ROWS if rows <= LEAST_ROWS else rows <= up < rows * 9 / 8
    assert up % 8 == 0
    batch = Buckets().ladder("B").up(sequences)
    assert batch == sequences if sequences <= 16 else sequences <= batch < sequences * 9 / 8


@given(st.sampled_from(["L", "A", "Lc", "T"]), st.integers(0, 1 << 22), st.integers(1, 1 << 16))
def test_coarse_buckets_add_less_than_half_and_are_few(axis: str, rows: int, sequences: int) -> None:
    ladder = Buckets.coarse().ladder(axis)
    up = ladder.up(rows)
    assert up == LEAST_ROWS if rows <= LEAST_ROWS else rows <= up < rows * 3 / 2
    assert sequences <= Buckets.coarse().ladder("B").up(sequences) < 2 * sequences
    assert sum(1024 <= rung <= 8192 for rung in ladder.rungs) == 7


def test_each_kind_of_axis_has_its_ladder() -> None:
    events, candidates, sequences = Ladder((1,)), Ladder((2,)), Ladder((3,))
    buckets = Buckets(events, candidates, sequences)
    assert [buckets.ladder(axis) for axis in ("L", "A", "Lc", "T", "B")] == [*3 * [events], candidates, sequences]


@pytest.mark.parametrize("wrong", [(64, 128), None, 64])
def test_what_is_no_ladder_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"HSTU-E901[\s\S]*candidates is .*, which is no Ladder"):
        Buckets(candidates=wrong)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True), st.integers(0, 1100))
def test_the_rung_is_the_least_that_holds_the_size(rungs: list[int], size: int) -> None:
    holds = [rung for rung in rungs if rung >= size]
    assert Ladder(tuple(sorted(rungs))).up(size) == (min(holds) if holds else size)


@pytest.mark.parametrize("rungs", [(), (0, 4), (4, 4), (8, 4), (-1,)])
def test_rungs_that_do_not_ascend_are_refused(rungs: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"HSTU-E901[\s\S]*larger than the one before"):
        Ladder(rungs)


@pytest.mark.parametrize("made", [Ladder.geometric, Ladder.even])
@pytest.mark.parametrize(("least", "most", "steps"), [(0, 4, 1), (5, 4, 1), (1, 4, 0)])
def test_a_ladder_that_leads_nowhere_is_refused(made: Any, least: int, most: int, steps: int) -> None:
    with pytest.raises(UsageError, match="no ladder leads from"):
        made(least, most, steps)


def test_a_ladder_of_an_axis_that_is_not_there_is_refused() -> None:
    inputs = (TensorSpec("ids", "int32", ("L",)),)
    with pytest.raises(UsageError, match=r"no axis T\n.*its inputs have L"):
        ShapeBuckets(inputs, (), {"T": Ladder((4,))})


def test_padding_belongs_to_no_sequence_and_comes_off_again() -> None:
    inputs = (
        TensorSpec("ids", "int32", ("L",)),
        TensorSpec("genres", "int32", ("B_times_2",)),
        TensorSpec("seq_offsets", "int32", ("B_plus_1",)),
    )
    outputs = (TensorSpec("rows", "float32", ("L + 2*B", 3)), TensorSpec("users", "float32", ("B", 3)))
    buckets = ShapeBuckets(inputs, outputs, {"L": Ladder((4, 8)), "B": Ladder((3,))})
    arrays = {"ids": np.array([7, 8, 9, 7, 8], np.int32), "genres": np.arange(4), "seq_offsets": np.array([0, 2, 5])}
    padded = buckets.padded(arrays)
    assert padded.arrays["ids"].tolist() == [7, 8, 9, 7, 8, 0, 0, 0]
    assert padded.arrays["genres"].tolist() == [0, 1, 2, 3, 3, 3]
    assert padded.arrays["seq_offsets"].tolist() == [0, 2, 5, 5]
    assert (padded.sizes, padded.bucket) == ({"L": 5, "B": 2}, {"L": 8, "B": 3})
    answers = {"rows": np.arange(14 * 3).reshape(14, 3), "users": np.arange(9).reshape(3, 3)}
    trimmed = buckets.trimmed(answers, padded)
    assert trimmed["rows"].shape == (9, 3)
    assert trimmed["users"].tolist() == [[0, 1, 2], [3, 4, 5]]


def cut_to(case: Case, feeds: dict[str, Array], ladders: dict[str, Ladder]) -> Padded:
    return ShapeBuckets(case.whole.inputs, case.whole.outputs, ladders).padded(feeds)


def assert_bucket_changes_nothing(case: Case, session: OnnxRuntimeSession, rungs: dict[str, int]) -> None:
    """Every request of the case, each axis padded by that many."""
    for feeds in case.feeds:
        plain = cut_to(case, feeds, {})
        ladders = {
            name: Ladder((plain.sizes[name] + more,)) for name, more in rungs.items() if plain.sizes[name] + more
        }
        buckets = ShapeBuckets(case.whole.inputs, case.whole.outputs, ladders)
        padded = buckets.padded(feeds)
        expected, found = session.run(feeds), buckets.trimmed(session.run(padded.arrays), padded)
        for name, values in expected.items():
            assert found[name].shape == values.shape, name
            if values.dtype.kind == "f" and "scores" not in name:
                assert row_error(found[name], values.astype(np.float64)).error <= _REORDERED, name
            elif name == "top_items":
                np.testing.assert_array_equal(found[name], values)


MORE = st.sampled_from([0, 1, 2, 5, 17, 40])


@pytest.fixture(scope="module")
def sessions() -> dict[str, tuple[Case, OnnxRuntimeSession]]:
    cases = {"packed": ranking_case("packed", "bf16"), "append": retrieval_case("append", "fp16")}
    cases["retrieval"] = retrieval_case("retrieval", "fp32", prune=False, fuse_norms=False)
    return {name: (case, OnnxRuntimeSession(case.whole.model)) for name, case in cases.items()}


@settings(max_examples=15, deadline=None)
@given(more=st.fixed_dictionaries({"L": MORE, "B": MORE}))
def test_a_padded_bucket_never_changes_a_retrieval_answer(
    sessions: dict[str, tuple[Case, OnnxRuntimeSession]], more: dict[str, int]
) -> None:
    assert_bucket_changes_nothing(*sessions["retrieval"], more)


@settings(max_examples=15, deadline=None)
@given(more=st.fixed_dictionaries({"A": MORE, "Lc": MORE, "B": MORE}))
def test_a_padded_bucket_never_changes_the_answer_of_a_history_that_grows(
    sessions: dict[str, tuple[Case, OnnxRuntimeSession]], more: dict[str, int]
) -> None:
    assert_bucket_changes_nothing(*sessions["append"], more)


@settings(max_examples=15, deadline=None)
@given(more=st.fixed_dictionaries({"L": MORE, "T": MORE, "B": MORE}))
def test_a_padded_bucket_never_changes_a_prediction(
    sessions: dict[str, tuple[Case, OnnxRuntimeSession]], more: dict[str, int]
) -> None:
    assert_bucket_changes_nothing(*sessions["packed"], more)


def test_requests_of_one_bucket_have_equal_shapes(sessions: dict[str, tuple[Case, OnnxRuntimeSession]]) -> None:
    case, _ = sessions["packed"]
    ladders = {"L": Ladder((128,)), "T": Ladder((64,)), "B": Ladder((4,))}
    shapes = [{n: a.shape for n, a in cut_to(case, feeds, ladders).arrays.items()} for feeds in case.feeds]
    own = [{n: a.shape for n, a in feeds.items()} for feeds in case.feeds]
    assert all(one == other for one, other in itertools.pairwise(shapes))
    assert any(one != other for one, other in itertools.pairwise(own))
