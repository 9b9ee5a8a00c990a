"""The plan of a pass's memory: nothing that is alive overlaps, and the block is not much larger than it has to be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu_compile.artifacts import SegmentedGraph
from hstu_compile.axis_sizes import axis_size
from hstu_compile.rewrite.cut_at_attention import _Cut
from hstu_compile.runtime._bfloat16 import storage_dtype
from hstu_compile.runtime._buffer_plan import BufferPlan, Lifetime, planned_buffers
from hstu_compile.runtime._free_list import ALIGNMENT, aligned
from tests.segmented_cases import ranking_case, retrieval_case

_STEPS = 8


@st.composite
def tensors(draw: st.DrawFn, most: int = 10) -> list[Lifetime]:
    found = []
    for number in range(draw(st.integers(0, most))):
        first = draw(st.integers(0, _STEPS - 1))
        last = draw(st.integers(first, _STEPS - 1))
        nbytes = draw(st.sampled_from([0, 1, 255, 256, 257, 512, 1000, 4096, 5000, 65536]))
        found.append(Lifetime(f"t{number}", nbytes, first, last))
    return found


def occupied(each: Lifetime, plan: BufferPlan) -> range:
    return range(plan.offsets[each.name], plan.offsets[each.name] + max(each.nbytes, 1))


def assert_valid(lives: list[Lifetime], plan: BufferPlan) -> None:
    """By brute force: step by step, byte range by byte range."""
    assert set(plan.offsets) == {each.name for each in lives}
    for each in lives:
        assert plan.offsets[each.name] % ALIGNMENT == 0
        assert plan.offsets[each.name] + aligned(each.nbytes) <= plan.nbytes
    for step in range(_STEPS):
        alive = [each for each in lives if each.first <= step <= each.last]
        for one, other in itertools.combinations(alive, 2):
            a, b = occupied(one, plan), occupied(other, plan)
            apart = a.stop <= b.start or b.stop <= a.start
            assert apart, (step, one, other)


@settings(max_examples=150)
@given(tensors())
def test_no_two_live_tensors_overlap(lives: list[Lifetime]) -> None:
    plan = planned_buffers(lives)
    assert_valid(lives, plan)
    assert plan.least_nbytes <= plan.nbytes


@settings(max_examples=150)
@given(tensors())
def test_the_block_is_within_the_stated_bound(lives: list[Lifetime]) -> None:
    plan = planned_buffers(lives)
    together = [sum(aligned(other.nbytes) for other in lives if other.meets(each)) for each in lives]
    assert plan.nbytes <= 2 * max(together, default=0)
    assert plan.nbytes <= sum(aligned(each.nbytes) for each in lives)


def test_a_chain_takes_two_places_in_turn() -> None:
    plan = planned_buffers([Lifetime(f"x{i}", 300, i, i + 1) for i in range(6)])
    assert plan.nbytes == plan.least_nbytes == 1024


@pytest.mark.parametrize(
    "lives",
    [
        [Lifetime("a", 1, 0, 0), Lifetime("a", 1, 1, 1)],
        [Lifetime("a", -1, 0, 0)],
        [Lifetime("a", 1, 2, 1)],
    ],
)
def test_what_cannot_be_is_refused(lives: list[Lifetime]) -> None:
    with pytest.raises(ValueError, match="a"):
        planned_buffers(lives)


def test_no_tensors_take_no_memory() -> None:
    assert planned_buffers([]) == BufferPlan({}, 0, 0)


@pytest.mark.parametrize(
    "sizes",
    [{"L": 4096, "T": 512, "B": 1, "Lc": 4096, "A": 16}, {"L": 65536, "T": 4096, "B": 16, "Lc": 65536, "A": 256}],
)
def test_real_schedules_take_at_most_a_tenth_more_than_their_fullest_step(sizes: dict[str, int]) -> None:
    for cut in (ranking_case("packed", "bf16").cut, retrieval_case("append", "fp16").cut):
        lives = lifetimes(cut, sizes)
        plan = planned_buffers(lives)
        assert plan.nbytes <= 1.1 * plan.least_nbytes
        assert plan.nbytes < sum(aligned(each.nbytes) for each in lives), "nothing was reused"


def test_columns_that_are_read_in_place_add_no_more_than_what_lives_longer_of_them() -> None:
    case, rows = ranking_case("packed", "bf16", prune=False, fuse_norms=False), 4 + 4096 + 512
    sizes = {"L": 4096, "T": 512, "B": 1}
    viewed = planned_buffers(lifetimes(case.cut, sizes))
    plain = planned_buffers(lifetimes(_Cut(case.whole).result(), sizes))
    # v, q and k beside those of the next layer.
    assert plain.nbytes < viewed.nbytes <= plain.nbytes + aligned(rows * (14 + 10 + 10) * 2)


def lifetimes(cut: SegmentedGraph, sizes: dict[str, int]) -> list[Lifetime]:
    """What crosses, for these sizes of the axes."""
    lives = []
    for each in cut.crossing:
        shape = [size if isinstance(size, int) else _size(size, sizes) for size in each.spec.shape]
        nbytes = math.prod(shape) * storage_dtype(each.spec.dtype).itemsize
        lives.append(Lifetime(each.spec.name, nbytes, each.first, each.last))
    return lives


def _size(text: str, sizes: dict[str, int]) -> int:
    expression = axis_size(text)
    assert expression is not None
    return int(np.int64(expression.at(sizes)))
