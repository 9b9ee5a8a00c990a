"""Shape ranges of the graph inputs: the only place that knows them. Level 2, no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from hstu_compile.artifacts import Profile
from hstu_compile.errors import EngineError

# One value per event, then one per sequence, then the offsets.
EVENT_INPUTS = ("item_ids", "timestamps", "ratings")
SEQUENCE_INPUTS = ("request_timestamps",)
OFFSET_INPUTS = ("seq_offsets",)

_INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class ProfileSizes:
    """Numbers behind one optimisation profile.

    Attributes:
        max_batch: most sequences in one request batch, >= 1.
        max_seq_len: most events in one sequence, >= 1.
        opt_batch: sequences that the engine is tuned for; None means max_batch.
        opt_seq_len: events per sequence that the engine is tuned for; None means half of max_seq_len, rounded up:
            lengths are ragged, so a full batch rarely holds more.
        min_batch: fewest sequences, >= 1.
    """

    max_batch: int
    max_seq_len: int
    opt_batch: int | None = None
    opt_seq_len: int | None = None
    min_batch: int = 1

    def __post_init__(self) -> None:
        opt_batch, opt_seq_len = self.typical()
        problems = []
        if not 1 <= self.min_batch <= opt_batch <= self.max_batch:
            problems.append(f"1 <= min {self.min_batch} <= opt {opt_batch} <= max {self.max_batch} sequences is false")
        if not 1 <= opt_seq_len <= self.max_seq_len:
            problems.append(f"1 <= opt {opt_seq_len} <= max {self.max_seq_len} events per sequence is false")
        if self.max_batch * self.max_seq_len > _INT32_MAX:
            problems.append(
                f"max_batch {self.max_batch} times max_seq_len {self.max_seq_len} is more than {_INT32_MAX} events, "
                "which int32 offsets cannot count"
            )
        if problems:
            raise EngineError(
                "HSTU-E405",
                "the profile sizes are not usable",
                "; ".join(problems),
                "set --min-batch <= --opt-batch <= --max-batch and --opt-seq-len <= --max-seq-len",
                dataclasses.asdict(self),
            )

    def typical(self) -> tuple[int, int]:
        """(opt_batch, opt_seq_len) with the defaults filled in."""
        opt_batch = self.max_batch if self.opt_batch is None else self.opt_batch
        opt_seq_len = (self.max_seq_len + 1) // 2 if self.opt_seq_len is None else self.opt_seq_len
        return opt_batch, opt_seq_len


def retrieval_profile(sizes: ProfileSizes, *, has_ratings: bool) -> tuple[Profile, ...]:
    """Profiles of the retrieval graph: L in [1, max_batch * max_seq_len], B + 1 in [min_batch + 1, max_batch + 1].

    L starts at 1 because builders refuse empty tensors in a profile; a session serves L = 0 as one event that
    belongs to no sequence.
    """
    events = EVENT_INPUTS if has_ratings else tuple(name for name in EVENT_INPUTS if name != "ratings")
    opt_batch, opt_seq_len = sizes.typical()

    def shapes(num_events: int, batch: int) -> dict[str, tuple[int, ...]]:
        return {
            **dict.fromkeys(events, (num_events,)),
            **dict.fromkeys(OFFSET_INPUTS, (batch + 1,)),
            **dict.fromkeys(SEQUENCE_INPUTS, (batch,)),
        }

    return (
        Profile(
            name="retrieval",
            min=shapes(1, sizes.min_batch),
            opt=shapes(opt_batch * opt_seq_len, opt_batch),
            max=shapes(sizes.max_batch * sizes.max_seq_len, sizes.max_batch),
        ),
    )


def profiles_for_inputs(input_names: Collection[str], sizes: ProfileSizes) -> tuple[Profile, ...]:
    """Profiles for a graph with these inputs.

    Raises:
        EngineError: HSTU-E405, if the graph is not a retrieval graph of ours.
    """
    profiles = retrieval_profile(sizes, has_ratings="ratings" in input_names)
    if unknown := sorted(set(input_names) ^ set(profiles[0].opt)):
        raise EngineError(
            "HSTU-E405",
            "the sizes do not give shapes for this graph's inputs",
            f"{', '.join(unknown)}: in the graph or in the retrieval profile, but not in both",
            "give the shapes themselves with --minShapes, --optShapes and --maxShapes",
            {"inputs": sorted(input_names)},
        )
    return profiles
