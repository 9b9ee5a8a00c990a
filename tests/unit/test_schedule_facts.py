"""Steps and bytes of a schedule, as reports show them."""

from __future__ import annotations

import pytest

from hstu_compile.artifacts import Crossing, KernelCall, Profile, Schedule, Step, TensorSpec
from hstu_compile.runtime.schedule_facts import schedule_facts

IDS = TensorSpec("ids", "int32", ("L",))
OFFSETS = TensorSpec("offsets", "int32", ("B_plus_1",))
ANSWER = TensorSpec("answer", "float32", ("B", 3))
CALL = KernelCall("HstuAttention", "attend", {}, {"q": "rows", "v": "rows"}, "mixed")
SCHEDULE = Schedule(
    inputs=(IDS, OFFSETS),
    outputs=(ANSWER,),
    calls=(CALL,),
    steps=(Step("segment", 0), Step("kernel", 0), Step("segment", 1)),
    crossing=(
        Crossing(TensorSpec("rows", "bfloat16", ("2*B + L", 2, 64)), 0, 1),
        Crossing(TensorSpec("mixed", "float16", ("2*B + L", 128)), 1, 2),
        Crossing(TensorSpec("kept", "int64", (7,)), 0, 2),
        Crossing(ANSWER, 2, 2),
    ),
    constants={},
)
PROFILE = Profile("p", {"ids": (1,), "offsets": (2,)}, {"ids": (10,), "offsets": (3,)}, {"ids": (50,), "offsets": (6,)})


def test_bytes_follow_from_the_profile() -> None:
    facts = schedule_facts(SCHEDULE, PROFILE)
    assert facts["steps"] == ["segment 0", "attend", "segment 1"]
    assert facts["calls"] == [{"operator": "HstuAttention", "name": "attend", "reads": ["rows"], "makes": "mixed"}]
    found = {each["name"]: (each["typical_bytes"], each["largest_bytes"], each["served"]) for each in facts["crossing"]}
    # Rows are 14 for 2 sequences of 10 events, 60 for 5 of 50; 128 numbers of two bytes each.
    assert found == {
        "rows": (14 * 256, 60 * 256, False),
        "mixed": (14 * 256, 60 * 256, False),
        "kept": (56, 56, False),
        "answer": (2 * 3 * 4, 5 * 3 * 4, True),
    }
    # All three are alive in the attention's step; what is served lies elsewhere.
    assert facts["block_bytes"] == {"typical": 2 * 14 * 256 + 256, "largest": 2 * 60 * 256 + 256}


def test_a_profile_that_contradicts_itself_is_no_size() -> None:
    crooked = Profile("p", PROFILE.min, PROFILE.opt, {"ids": (50,)})
    with pytest.raises(KeyError, match="B"):
        schedule_facts(SCHEDULE, crooked)
